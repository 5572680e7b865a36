"""How the demo is shown: a live table on a terminal, plain lines anywhere else, and the summary on both."""

from __future__ import annotations

import sys
import textwrap
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from . import _errors, _output
from ._options import Format

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ._demo_count import Summary
    from ._demo_crew import View, Worker

_STATE_EVERY = 2.5
_FRAME = 0.15
_LATEST = 3


class Screen(Protocol):
    """Where the demo is shown."""

    def say(self, at: float, text: str) -> None:
        """Tell what has happened, so many seconds after the start."""

    def grant(self, at: float, text: str) -> None:
        """Tell of a grant, of which there are many."""

    def show(self, view: View) -> None:
        """Show how things stand."""


class Silent:
    """Shows nothing."""

    def say(self, at: float, text: str) -> None: ...

    def grant(self, at: float, text: str) -> None: ...

    def show(self, view: View) -> None: ...


class Log:
    """A line per event, and now and then one on how things stand. No colours, nothing moves."""

    def __init__(self) -> None:
        self._stated = 0.0

    def say(self, at: float, text: str) -> None:
        _line(at, text)

    def grant(self, at: float, text: str) -> None:
        _line(at, text)

    def show(self, view: View) -> None:
        if not view.holders and not view.waiters:
            return
        if view.elapsed - self._stated >= _STATE_EVERY:
            self._stated += _STATE_EVERY
            _line(view.elapsed, _state(view))


def _line(at: float, text: str) -> None:
    _errors.write(textwrap.fill(f"{at:6.2f} s  {text}", 80, subsequent_indent=" " * 10, break_on_hyphens=False))


def _state(view: View) -> str:
    number = {worker.pid: worker.number for worker in view.workers}
    held = " ".join(str(number[pid]) for pid in sorted(view.holders, key=lambda pid: view.holders[pid].acquired_at))
    line = " ".join(str(number[pid]) for pid in sorted(view.waiters, key=lambda pid: view.waiters[pid].position))
    return (
        f"-- {len(view.holders)} of {view.database.limit} slots held, by {held or 'nobody'}; "
        f"in line: {line or 'nobody'}; "
        f"{sum(worker.grants for worker in view.workers)} grants, {sum(worker.calls for worker in view.workers)} calls"
    )


class Live:
    """What happens scrolls by; below it stands a table of how things are at this moment."""

    def __init__(self, console: Console, seconds: float) -> None:
        from rich.live import Live as RichLive

        self._console = console
        self._seconds = seconds
        self._grants: deque[tuple[float, str]] = deque(maxlen=_LATEST)
        self._drawn = 0.0
        self._live = RichLive(console=console, auto_refresh=False, transient=True, redirect_stderr=False)
        self._on, self._off = ("●", "○") if console.encoding.startswith("utf") else ("*", "-")

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def say(self, at: float, text: str) -> None:
        self._console.print(_stamped([(at, text)]))

    def grant(self, at: float, text: str) -> None:
        self._grants.append((at, text))

    def show(self, view: View) -> None:
        if time.monotonic() - self._drawn >= _FRAME:
            self._drawn = time.monotonic()
            self._live.update(self._picture(view), refresh=True)

    def _picture(self, view: View) -> RenderableType:
        from rich.console import Group
        from rich.rule import Rule

        left = max(self._seconds - view.elapsed, 0.0)
        title = f"{view.elapsed:4.1f} s, {left:.0f} s to go" if left else "finishing"
        latest = [("", "")] * (_LATEST - len(self._grants)) + [(f"{at:.1f} s", text) for at, text in self._grants]
        return Group(
            Rule(_output.text(title, "bold"), style="dim", characters="-" if self._on == "*" else "─"),
            self._limits(view),
            "",
            self._workers(view),
            "",
            *(_output.text(f"  {at:>7}  {text}" if text else "", "dim") for at, text in latest),
        )

    def _limits(self, view: View) -> Table:
        from rich.table import Table

        held, limit = len(view.holders), view.database.limit
        slots = _output.text(self._on * held, "bold green")
        slots.append(self._off * (limit - held), "dim")
        slots.append(f"  {held} of {limit} slots held, {view.database.waiting} in line", "")
        api = _output.text(f"{self._on * min(round(view.api.level), view.api.limit)}", "bold cyan")
        api.append(self._off * (view.api.limit - min(round(view.api.level), view.api.limit)), "dim")
        api.append(
            f"  {view.api.slot_decay_per_second:g} calls/s after a burst of {view.api.limit}, "
            f"{view.api.waiting} in line",
            "",
        )
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_row("database", slots)
        table.add_row("api", api)
        return table

    def _workers(self, view: View) -> Table:
        table = _output.table(
            "Worker", "Pid", "Slot of 'database'", "Slots got", "Calls", numbers=("Slots got", "Calls")
        )
        table.columns[2].min_width = min(38, max(self._console.width - 40, 10))
        for worker in view.workers:
            now, style = self._now(view, worker)
            name = _output.text(worker.number, "red" if worker.killed else "")
            table.add_row(name, str(worker.pid), _output.text(now, style), str(worker.grants), str(worker.calls))
        return table

    def _now(self, view: View, worker: Worker) -> tuple[str, str]:
        """What a worker is at, as the database shows it."""
        holder = view.holders.get(worker.pid)
        waiter = view.waiters.get(worker.pid)
        if worker.killed and holder is not None:
            return f"{self._on} killed; its lease ends in {holder.expires_at.timestamp() - view.now:.1f} s", "bold red"
        if worker.killed:
            return "  killed; its slot is somebody else's", "red"
        if holder is not None:
            return f"{self._on} holds a slot, for {view.now - holder.acquired_at.timestamp():.1f} s", "green"
        if waiter is not None:
            since = view.now - waiter.waiting_since.timestamp()
            return f"  {_ordinal(waiter.position)} in line, for {since:.1f} s", "yellow"
        if worker.process.poll() is not None:
            return "  has ended", "dim"
        return "  between two jobs" if worker.ready else "  is starting", "dim"


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"


def _stamped(lines: list[tuple[float, str]]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True, width=7, style="bold cyan")
    table.add_column(overflow="fold")
    for at, text in lines:
        table.add_row(f"{at:.1f} s", text)
    return table


def console(output: Format) -> Console | None:
    """The terminal to show it on; None where there is none."""
    if not (sys.stderr if output is Format.json else sys.stdout).isatty():
        return None
    from rich.console import Console

    found = Console(stderr=output is Format.json, highlight=False, markup=False, emoji=False)
    return None if found.is_dumb_terminal else found


def intro(output: Format, text: str) -> None:
    """Say what is about to be seen."""
    terminal = console(output)
    if terminal is not None:
        terminal.print(text + "\n")
    elif output is not Format.json:
        _errors.write(textwrap.fill(text, 80) + "\n")


def show_summary(summary: Summary) -> None:
    """Print what was counted."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in summary.checks:
        verdict = _output.text("ok" if check.kept else "NO", "green" if check.kept else "bold red")
        table.add_row(verdict, _output.text(check.promise, "bold"), check.counted)
    broken = ", ".join(check.promise for check in summary.checks if not check.kept)
    verdict = (
        _output.text(f"NOT as promised: {broken}.", "bold red")
        if broken
        else _output.text("All as promised.", "bold green")
    )
    parts = ("", _output.text("Counted afterwards, from what the workers wrote down:"), "", table, "", verdict)
    if sys.stdout.isatty():
        _output.render(*parts)
        return
    console = Console(width=80, highlight=False, markup=False, emoji=False, color_system=None)
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    _errors.write("\n".join(line.rstrip() for line in capture.get().splitlines()))
