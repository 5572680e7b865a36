"""All limits: the first screen of ``pglimits top``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Input, Static

from pglimits._words import room

from . import _output
from ._state import Rates, used
from ._top_limit import LimitScreen
from ._top_live import LiveScreen
from ._top_table import Column, Page, cell

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from pglimits import Usage

Sort = Literal["busiest", "name", "held", "level", "waiting", "oldest_wait", "rate", "limit"]
SORTS: tuple[Sort, ...] = ("busiest", "name", "held", "level", "waiting", "oldest_wait", "rate", "limit")
WORDS = {"busiest": "busiest first", "name": "by name", "oldest_wait": "longest wait first", "rate": "fastest first"}

_BAR = 8
_SPARKS = 20
_SPARKS_EVERY = 20.0
"""Seconds for which the last hour is not asked for again."""

COLUMNS = (
    Column("Limit", 0, sort="name", share=2),
    Column("", _BAR, from_width=66),
    Column("Held/limit", 10, is_number=True, sort="held"),
    Column("Level", 6, is_number=True, from_width=74, sort="level"),
    Column("Wait", 5, is_number=True, sort="waiting"),
    Column("Oldest", 6, is_number=True, from_width=58, sort="oldest_wait"),
    Column("Grants/s", 8, is_number=True, from_width=58, sort="rate"),
    Column("State", 11),
    Column("because", 0, from_width=120, share=4),
    Column("Last hour", _SPARKS, from_width=140),
)


class Limits(Page):
    """A page of limits, each of which can be opened."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Open")]


class LimitsScreen(LiveScreen):
    """A page of limits."""

    BINDINGS: ClassVar[list[BindingType]] = [
        # First of all: a widget would come to it only when the keys behind it have been given to that widget.
        Binding("slash", "filter", "Filter", key_display="/", priority=True),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", show=False),
        Binding("e", "switch", "Enable/disable"),
        Binding("escape", "no_filter", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.page = Limits(id="limits")
        self._summary = Static(id="summary", classes="line")
        self._field = Input(id="filter", placeholder="part of a name; enter keeps it, escape shows all", compact=True)
        self.sort: Sort = "busiest"
        self.filter = ""
        self._rates = Rates()
        self._all_rates = Rates()
        self._latest: dict[str, float] = {}
        self._usages: list[Usage] = []
        self._sparks: dict[str, list[float | None]] = {}
        self._sparks_of: tuple[float, frozenset[str]] = (0.0, frozenset())

    def compose(self) -> ComposeResult:
        yield self._where
        yield self._trouble
        yield self._summary
        yield self.page
        yield self._field
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        super().on_mount()
        self._field.display = False
        self.page.focus()

    async def look(self) -> None:
        page = self.page
        found = await self._ask()
        if not found and page.first:  # some were deleted
            page.first = 0
            found = await self._ask()
        self._usages = found
        rates = self._rates.look(found) if self.sort != "rate" else self._latest
        if any(column.title == "Last hour" for column in self._shown()):
            await self._look_back(frozenset(usage.name for usage in found))
        page.show(COLUMNS, [(usage.name, self._cells(usage, rates.get(usage.name))) for usage in found], self.sort)
        self._summarise()

    def _shown(self) -> list[Column]:
        return [COLUMNS[nth] for nth in self.page.columns_shown(COLUMNS)]

    async def _ask(self) -> list[Usage]:
        limiter, page, contains = self.top.limiter, self.page, self.filter or None
        found: list[Usage]
        if self.sort != "rate":
            found = await limiter.usage(contains, sort=self.sort, count=page.room, offset=page.first)
            page.of = found[0].of if found else 0
            return found
        # How fast a limit goes is known from two looks only, and so here only.
        counted = await limiter._grants(contains)
        self._latest = self._all_rates.look_at(counted)
        names = sorted((name for name, _, _ in counted), key=lambda name: (-self._latest.get(name, 0.0), name))
        page.of = len(names)
        names = names[page.first : page.first + page.room]
        found = await limiter.usage(names=names, sort="given", count=page.room) if names else []
        return found

    async def _look_back(self, names: frozenset[str]) -> None:
        """Ask for the last hour of these limits, unless that is known."""
        asked_at, of = self._sparks_of
        if names and (not names <= of or time.monotonic() > asked_at + _SPARKS_EVERY):
            self._sparks = await self.top.limiter._sparklines(sorted(names), 3600, _SPARKS)
            self._sparks_of = (time.monotonic(), names)

    def _cells(self, usage: Usage, rate: float | None) -> list[Text]:
        word, reason, style = self.of_state(usage)
        several = f"\N{MULTIPLICATION SIGN}{_output.short(usage.keys)}" if usage.keys > 1 else ""
        sparks = self._sparks.get(usage.name, [])
        most = max(usage.limit, *(value or 0.0 for value in sparks), 1.0)
        return [
            cell(usage.name),
            self._bar(used(usage), room(usage), style),
            cell(f"{_output.short(usage.held)}/{_output.short(usage.limit)}{several}"),
            cell(_output.short(usage.level) if usage.slot_decay_per_second else "-"),
            cell(_output.short(usage.waiting), style if usage.waiting else "dim"),
            cell("-" if usage.oldest_wait is None else _output.duration(usage.oldest_wait)),
            cell("" if rate is None else f"{rate:,.1f}", "" if rate else "dim"),
            cell(word, style),
            cell(reason, "dim"),
            cell(_output.sparkline(sparks, most), self.top.colour("text-primary")),
        ]

    def _bar(self, value: float, most: float, style: str) -> Text:
        filled = _output.bar(value, most, _BAR)
        return Text.assemble((filled, style), ("·" * (_BAR - len(filled)), "dim"), end="")

    def _summarise(self) -> None:
        first, here, of = self.page.first, len(self._usages), self.page.of
        rows = f"{first + 1:,} to {first + here:,} of " if here < of else ""
        words = [f"{rows}{_output.count(of, 'limit')}", WORDS.get(self.sort, f"most {self.sort} first")]
        if self.filter:
            words.append(f"with {self.filter!r} in the name")
        elif not of:
            words = ["No limits yet: pglimits create NAME --limit 10"]
        self._summary.update(cell(" · ".join(words), "dim"))

    # Keys.

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        if self.page.at is not None:
            self.app.push_screen(LimitScreen(self.page.at))

    def on_page_turned(self, event: Page.Turned) -> None:
        self.look_now()

    def action_sort(self, by: int) -> None:
        self._sort_by(SORTS[(SORTS.index(self.sort) + by) % len(SORTS)])

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        sort: Any = self._shown()[event.column_index].sort
        if sort:
            self._sort_by("busiest" if sort == self.sort else sort)

    def _sort_by(self, sort: Sort) -> None:
        self.sort = sort
        self.page.turn_to(0, 0)

    def action_filter(self) -> None:
        self._field.display = True
        self.set_focus(self._field)  # at once: the next keys are meant for it

    def on_input_changed(self, event: Input.Changed) -> None:
        self.filter = event.value
        self.page.turn_to(0, 0)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._field.display = bool(self.filter)
        self.set_focus(self.page)

    def action_no_filter(self) -> None:
        self._field.value = ""
        self._field.display = False
        self.set_focus(self.page)

    def action_switch(self) -> None:
        if self.page.at is not None:
            self.run_worker(self.switch(self.page.at))
