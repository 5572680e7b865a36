"""A table of one page: what changes is written in place, and the cursor stays on what it is on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import DataTable

from . import _output

_NARROW = 100
"""Screens that are narrower have one blank between columns, others two."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column. ``width`` 0: its share of what the others leave; ``from_width``: of the screen that has it."""

    title: str
    width: int
    is_number: bool = False
    from_width: int = 0
    sort: str = ""
    share: int = 1


def cell(value: object, style: str = "") -> Text:
    """A text as it is: nothing in it is markup, and nothing steers the terminal."""
    return Text(_output.one_line(str(value)), style=style, no_wrap=True, end="")


class Page(DataTable[Text]):
    """The rows of one page."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("home", "scroll_top", show=False),
        Binding("end", "scroll_bottom", show=False),
    ]

    class Turned(Message):
        """Another page is wanted: from ``first`` on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cursor_type="row", cell_padding=0, cursor_foreground_priority="renderable", **options)
        self._made: tuple[tuple[Column, ...], int, str] = ((), 0, "")
        self._widths: list[int] = []
        self._gap = 1
        self._rows: list[tuple[str, list[Text]]] = []
        self._to: int | None = None
        self.first = 0
        """How many rows come before this page."""
        self.of = 0
        """How many rows there are on all pages."""

    @property
    def room(self) -> int:
        """How many rows there is room for."""
        return max(self.size.height - 1, 1)

    @property
    def at(self) -> str | None:
        """The key of the row under the cursor."""
        return self._rows[self.cursor_row][0] or None if 0 <= self.cursor_row < len(self._rows) else None

    def columns_shown(self, columns: Sequence[Column]) -> list[int]:
        """Which of these columns a screen of this width has."""
        return [nth for nth, column in enumerate(columns) if self.app.size.width >= column.from_width]

    def show(self, columns: Sequence[Column], rows: Sequence[tuple[str, Sequence[Text]]], sort: str = "") -> None:
        """Show these rows, each with its key and a text for each column."""
        nths = self.columns_shown(columns)
        shown = tuple(columns[nth] for nth in nths)
        was, was_at = self.at, self.cursor_row
        anew = self._lay_out(shown, sort)
        fitted = [(key, [self._fit(texts[nth], place) for place, nth in enumerate(nths)]) for key, texts in rows]
        if anew or len(fitted) != len(self._rows):
            self.clear()
            for _, texts in fitted:
                self.add_row(*texts)
        else:
            for row, ((_, texts), (_, before)) in enumerate(zip(fitted, self._rows, strict=True)):
                for place, text in enumerate(texts):
                    if not _same(text, before[place]):
                        self.update_cell_at((row, place), text)  # type: ignore[arg-type]
        self._rows = fitted
        keys = [key for key, _ in fitted]
        row = keys.index(was) if was in keys else min(was_at if self._to is None else self._to, len(keys) - 1)
        self._to = None
        if row >= 0 and row != self.cursor_row:
            self.move_cursor(row=row, animate=False)

    def _lay_out(self, columns: tuple[Column, ...], sort: str) -> bool:
        """Make the columns, if they are not those that are there."""
        width = self.size.width
        if self._made == (columns, width, sort):
            return False
        self._made = (columns, width, sort)
        self._gap = 1 if width < _NARROW else 2
        rest = width - sum(column.width + self._gap for column in columns)
        shares = sum(column.share for column in columns if not column.width)
        self._widths = [column.width or max(rest * column.share // shares, 10) for column in columns]
        self.clear(columns=True)
        for place, column in enumerate(columns):
            title = Text(column.title)
            if sort and column.sort == sort:
                title.stylize("bold underline")
            self.add_column(self._fit(title, place), width=self._widths[place] + self._gap)
        return True

    def _fit(self, text: Text, place: int) -> Text:
        column, width = self._made[0][place], self._widths[place]
        fitted = text.copy()
        fitted.truncate(width, overflow="ellipsis")
        fitted.align("right" if column.is_number else "left", width)
        fitted.pad_left(1)
        fitted.pad_right(self._gap - 1)
        return fitted

    def turn_to(self, first: int, row: int | None = None) -> None:
        """Have another page shown; the cursor stays in its place, or goes to this row."""
        self.first = first
        self._to = self.cursor_row if row is None else row
        self._rows = [("", texts) for _, texts in self._rows]  # it stays with none of them
        self.post_message(self.Turned())

    def _turn(self, by: float, row: int | None, end: int) -> None:
        """So many pages on, if there are; else to the row at that end."""
        last = max((self.of - 1) // self.room * self.room, 0)
        first = int(min(max(self.first + by * self.room, 0), last))
        if first != self.first:
            self.turn_to(first, row)
        else:
            self.move_cursor(row=end, animate=False)

    def action_cursor_down(self) -> None:
        if self.cursor_row < self.row_count - 1:
            super().action_cursor_down()
        else:
            self._turn(1, 0, self.cursor_row)

    def action_cursor_up(self) -> None:
        if self.cursor_row > 0:
            super().action_cursor_up()
        else:
            self._turn(-1, self.room - 1, 0)

    def action_page_down(self) -> None:
        self._turn(1, None, self.row_count - 1)

    def action_page_up(self) -> None:
        self._turn(-1, None, 0)

    def action_scroll_top(self) -> None:
        self._turn(-math.inf, 0, 0)

    def action_scroll_bottom(self) -> None:
        self._turn(math.inf, self.room - 1, self.row_count - 1)


def _same(one: Text, other: Text) -> bool:
    return one.plain == other.plain and one.style == other.style and one.spans == other.spans
