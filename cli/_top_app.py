"""The app of ``pglimits top``: its screens share one limiter, one theme and one way to end."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType

from pglimits import AsyncLimiter

from . import _client, _errors
from ._top_limits import LimitsScreen

_LIGHT_BACKGROUNDS = ("7", "15")


class Top(App[None]):
    """Limits, live."""

    TITLE = "pglimits top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: $background; }
    .line { height: 1; padding: 0 1; }
    #where { background: $panel; text-style: bold; }
    #trouble { background: $error-muted; color: $text-error; padding: 0 1; height: auto; max-height: 3; display: none; }
    #facts { height: auto; padding: 0 1; }
    #detail { height: 4; padding: 0 1; border-top: solid $panel; }
    #filter { border: none; height: 1; padding: 0 1; background: $panel; }
    DataTable { height: 1fr; background: $background; overflow: hidden hidden; scrollbar-size: 0 0; }
    DataTable:focus { background-tint: $foreground 0%; }
    DataTable > .datatable--header { background: $panel; color: $foreground; text-style: none; }
    DataTable > .datatable--cursor, DataTable:focus > .datatable--cursor {
        background: $primary-muted; color: $foreground; text-style: bold;
    }
    DataTable > .datatable--header-cursor, DataTable > .datatable--header-hover { background: $panel; }
    DataTable > .datatable--hover { background: $background; }
    Confirm { align: center middle; background: $background 60%; }
    Confirm > Vertical {
        width: 72; max-width: 95%; height: auto; padding: 1 2; border: round $warning; background: $surface;
    }
    Confirm #answers { height: auto; align: right middle; margin-top: 1; }
    Confirm Button { margin-left: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c,ctrl+q", "quit", show=False, priority=True),
        Binding("d", "dark", "Light/dark", show=False),
    ]

    def __init__(self, conninfo: str, every: float = 1.0) -> None:
        super().__init__()
        self.every = every
        self.place = _client.place(conninfo)
        self.limiter = AsyncLimiter(conninfo)
        self.paused = False
        self.may: set[str] = set()
        """Which functions that change something may be called; asked with the first look."""
        background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
        self.theme = "textual-light" if background in _LIGHT_BACKGROUNDS else "textual-dark"

    def get_default_screen(self) -> LimitsScreen:
        return LimitsScreen()

    def on_mount(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):  # so that the terminal is left as it was found
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._ended_by, number)

    def _ended_by(self, number: int) -> None:
        self.exit(return_code=_errors.SIGNAL + number)

    async def on_unmount(self) -> None:
        await self.limiter.close()

    def action_dark(self) -> None:
        self.theme = "textual-dark" if self.theme == "textual-light" else "textual-light"

    def colour(self, name: str) -> str:
        """A colour of the theme, as a cell has it."""
        return self.theme_variables[name]

    def say(self, message: object, severity: Any = "information") -> None:
        """Tell something in passing. It may have any characters."""
        self.notify(str(message), severity=severity, markup=False)
