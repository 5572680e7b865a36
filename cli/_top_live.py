"""What the screens of ``pglimits top`` have in common: they look again and again, and say when nothing answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar, cast

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import Button, Static

from pglimits._words import ACTIVE, AT_CAPACITY, BACKLOGGED, SHUT
from pglimits.errors import LimiterUnavailable, PglimitsError

from . import _output
from ._state import state

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from textual.app import ComposeResult

    from pglimits import Usage

    from ._top_app import Top

CHANGES = ("update_limit", "force_release")
"""The functions behind the actions."""
_OVERDUE = 3.0
"""Seconds after which it is told that the database does not answer."""
_RESTS = 2.0
"""It rests at least as often as long as a look took: a look must not become the load."""


class LiveScreen(Screen[None]):
    """A screen that looks at the database every second or so, by one question at a time."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("p,space", "pause", "Pause")]

    def __init__(self) -> None:
        super().__init__()
        self._where = Static(id="where", classes="line")
        self._trouble = Static(id="trouble")
        self._wanted = asyncio.Event()
        self._asked_at = 0.0
        self._away_since: float | None = None
        self._problem = ""
        self._stopped = False

    @property
    def top(self) -> Top:
        return cast("Top", self.app)

    async def look(self) -> None:
        """Ask, and show the answer."""
        raise NotImplementedError

    def on_mount(self) -> None:
        self._looking = self.run_worker(self._live(), name="live")
        self.set_interval(0.5, self._show_where)
        self._show_where()

    def on_unmount(self) -> None:
        self._looking.cancel()

    def on_screen_suspend(self) -> None:
        self._stopped = True

    def on_screen_resume(self) -> None:
        self._stopped = False
        self.look_now()

    def on_resize(self) -> None:
        self.look_now()

    def look_now(self) -> None:
        """Look at once, or as soon as the answer to the last question is there."""
        self._wanted.set()

    async def _live(self) -> None:
        while True:
            self._wanted.clear()
            self._asked_at = began = time.monotonic()
            try:
                if not self.top.may:
                    self.top.may = await self.top.limiter._may([*CHANGES, "version"])
                await self.look()
            except LimiterUnavailable as error:
                self._away_since = self._away_since or time.time()
                self._problem = str(error)
            except PglimitsError as error:
                self._problem = str(error)
                self.failed(error)
            else:
                self._away_since, self._problem = None, ""
            if not self.is_attached:  # it was left while the database was asked
                return
            took = time.monotonic() - began
            self._asked_at = 0.0
            self._show_where()
            rest = None if self.top.paused or self._stopped else max(self.top.every - took, took * _RESTS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), rest)

    def failed(self, error: PglimitsError) -> None:
        """The database has answered that this cannot be shown."""

    def _show_where(self) -> None:
        """The first line, and below it what is wrong."""
        words = ["paused"] if self.top.paused else []
        if self.top.may and not self.top.may.issuperset(CHANGES):
            words.append("read-only")
        state = " · ".join(words) or f"every {self.top.every:g}s"
        left = f"pglimits top  {self.top.place}"
        room = self.app.size.width - 2 - len(state)
        line = Text(_output.one_line(left))
        line.truncate(max(room - 1, 1), overflow="ellipsis", pad=True)
        self._where.update(line + Text(" " + state))
        text = self._what_is_wrong()
        self._trouble.update(Text(_output.one_line(text)))
        self._trouble.display = bool(text)

    def _what_is_wrong(self) -> str:
        if self._away_since is not None:
            since = datetime.fromtimestamp(self._away_since).astimezone()
            gone = _output.duration(time.time() - self._away_since)
            return f"No database since {since:%H:%M:%S} ({gone}), what is shown is older. Trying again: {self._problem}"
        waits = time.monotonic() - self._asked_at if self._asked_at else 0.0
        if waits > _OVERDUE:
            return f"The database has not answered for {_output.duration(waits)}; what is shown is older."
        return self._problem

    def action_pause(self) -> None:
        self.top.paused = not self.top.paused
        self._show_where()
        self.look_now()

    # What is shown of a limit wherever it is shown.

    def of_state(self, usage: Usage) -> tuple[str, str, str]:
        """The word, the reason and the style."""
        word, reason = state(usage)
        colours = {BACKLOGGED: "text-error", AT_CAPACITY: "text-warning", SHUT: "text-warning", ACTIVE: "text-success"}
        return word, reason, self.top.colour(colours[word]) if word in colours else "dim"

    # Actions.

    def may(self, function: str) -> bool:
        """Whether the role may do it; if not, that is told."""
        if function in self.top.may:
            return True
        self.top.say(
            "This is read-only here: the role is no member of pglimits_admin, or the server is a standby.", "warning"
        )
        return False

    async def do(self, question: str, button: str, work: Callable[[], Awaitable[str]]) -> None:
        """Ask; where the answer is yes, do it and tell what was done."""
        if not await self.app.push_screen_wait(Confirm(question, button)):
            return
        try:
            self.top.say(await work())
        except PglimitsError as error:
            self.top.say(error, "error")
        self.look_now()

    async def switch(self, name: str) -> None:
        """Enable a limit or disable it."""
        if not self.may("update_limit"):
            return
        try:
            found = await self.top.limiter.usage(names=[name], count=1)
        except PglimitsError as error:
            self.top.say(error, "error")
            return
        if not found:
            self.top.say(f"There is no limit named {name!r} any longer.", "warning")
            return
        usage = found[0]
        to = not usage.active
        held, waiting = _output.count(usage.held, "slot"), _output.count(usage.waiting, "request")

        async def change() -> str:
            await self.top.limiter.update(name, active=to)
            return f"{'Enabled' if to else 'Disabled'} limit {name!r}."

        if to:
            question = (
                f"Enable limit {name!r}?\n\nFrom then on at most {_output.count(usage.limit, 'slot')} of it are held"
                f" for each key. {held} of before it was disabled still count."
            )
        else:
            question = (
                f"Disable limit {name!r}?\n\nNobody is held up any more: {waiting} waiting now would go on at once."
                f" {held} now held stay with their holders."
            )
        await self.do(question, "Enable" if to else "Disable", change)


class Confirm(ModalScreen[bool]):
    """A question to be answered with yes or no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape", "answer(False)", "No"),
        Binding("left,right,up,down", "app.focus_next", show=False),
    ]

    def __init__(self, question: str, button: str) -> None:
        super().__init__()
        self.question = question
        self._button = button

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(Text("\n".join(_output.one_line(line) for line in self.question.split("\n"))))
            with Horizontal(id="answers"):
                yield Button("No (n)", id="no")
                yield Button(f"{self._button} (y)", variant="warning", id="yes")

    def on_mount(self) -> None:
        self.query_one("#no").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)
