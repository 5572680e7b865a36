"""demo: real processes contend for slots of a real PostgreSQL, and everything is counted."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from . import _client, _errors, _output
from ._commands import command
from ._options import Format, Output

if TYPE_CHECKING:
    from ._demo_count import Event, Job, Summary
    from ._demo_crew import Crew
    from ._demo_show import Screen

app = typer.Typer()

_WORKERS = 6
_SLOTS, _MORE_SLOTS = 2, 3
_PER_SECOND, _BURST = 5.0, 5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@command(app, "Start here")
def demo(
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=8, max=600, help="How long the workers contend.")
    ] = 17.0,
    output: Output = Format.table,
) -> None:
    """Watch real processes contend for slots of a real PostgreSQL. Needs nothing, leaves nothing.

    Starts a PostgreSQL of its own and six workers, kills one in the middle of
    its work, changes a limit meanwhile, and then counts what happened. Exits
    with 1 if anything was not as promised.

    Example: pglimits demo

    Example: pglimits demo --seconds 60 -o json
    """
    with _client.ended_by_signals():
        summary = _play(seconds, output)
    if output is Format.json:
        _output.show(output, summary)
    else:
        from ._demo_show import show_summary

        show_summary(summary)
    if not summary.as_promised:
        raise typer.Exit(_errors.ERROR)


def _play(seconds: float, output: Format) -> Summary:
    from ._demo_show import intro

    intro(
        output,
        f"{_WORKERS} processes contend for {_SLOTS} slots of 'database' and for {_PER_SECOND:g} calls per second of "
        "'api', two limits in a PostgreSQL of their own. One of them is killed in the middle of its work, a limit is "
        "changed meanwhile, and then all is counted.",
    )
    from pglimits import Limiter, _embedded, _install

    from ._demo_count import Jobs, Setting, count
    from ._demo_crew import Crew, DemoFailed, hired

    with contextlib.ExitStack() as stack:
        _heed_one_signal()
        with _progress(output) as say:
            say(f"Starting {_WORKERS} processes and a PostgreSQL…")
            workers = stack.enter_context(hired(_WORKERS))
            server = stack.enter_context(_embedded.throwaway(fsync=True))  # durable, so that the figures are real ones
            stack.callback(_ignore_signals)
            say(f"PostgreSQL {server.version} is up. Installing pglimits in it…")
            _install.install(server.dsn)
        limiter = stack.enter_context(Limiter(server.dsn))
        limiter.create("database", limit=_SLOTS)
        limiter.create("api", limit=_BURST, slot_decay_per_second=_PER_SECOND)
        screen = stack.enter_context(_screen(seconds, output))
        teller = _Teller(screen)
        crew = teller.crew = Crew(workers, server.dsn, limiter, Jobs(_SLOTS), teller.tell, screen.show)
        problems = []
        with crew.at_work(server.dsn):
            try:
                _story(crew, teller, seconds)
            except DemoFailed as error:
                problems.append(str(error))
            crew.stop()
        return count(
            crew.log,
            crew.seen,
            Setting(_WORKERS, _SLOTS, _PER_SECOND, _BURST, os.getloadavg()[0], os.cpu_count() or 1),
            held_at_end=len(limiter.holders()),
            waiting_at_end=len(limiter.waiters()),
            failures=[*problems, *crew.failures()],
        )


def _story(crew: Crew, teller: _Teller, seconds: float) -> None:
    """What happens when. Each step also waits for the one before, however slow the machine."""

    def until(part: float) -> float:
        return max(crew.started + part * seconds - time.monotonic(), 0.0)

    crew.go()
    teller.say(
        f"All {_WORKERS} start. {_SLOTS} get a slot of 'database' and work, the others wait in line; "
        f"each makes calls as 'api' lets it.",
        at=crew.started,
    )
    crew.play(until(0.15))

    victim = crew.first_in_line()
    victim.tell("long")
    crew.play(until=lambda: victim.long, what="a worker to begin a long job")
    teller.say(f"Worker {victim.number} begins a long job. Its lease lasts 3 s, and it renews it while it works.")
    crew.play(0.7)
    lease_end = crew.kill(victim)
    teller.say(
        f"Worker {victim.number} was killed (SIGKILL) while it held a slot; nobody tells the database. "
        f"The slot stays taken until the lease ends, in {lease_end - time.monotonic():.1f} s."
    )
    crew.play(10, until=lambda: teller.slot_is_back)
    if not teller.slot_is_back:
        teller.say(f"Nobody got the slot of worker {victim.number}. That is not as promised.")

    crew.play(max(until(0.5), 0.6))
    teller.say(f"'database' grows from {_SLOTS} to {_MORE_SLOTS} slots, while all go on.")
    crew.set_limit(_MORE_SLOTS)
    crew.play(max(until(0.75), 1.2))
    teller.say(
        f"'database' shrinks from {_MORE_SLOTS} to {_SLOTS} slots. Who holds one keeps it; "
        f"nobody gets one until no more than {_SLOTS} would be held."
    )
    crew.set_limit(_SLOTS)
    crew.play(max(until(1.0), 1.2))
    teller.say("Time is up: all finish, and those in line get their slots one after the other.")


class _Teller:
    """Says in words what happens."""

    crew: Crew

    def __init__(self, screen: Screen) -> None:
        self.slot_is_back = False
        self._screen = screen

    def say(self, text: str, at: float | None = None) -> None:
        """Tell what happens now, or happened a moment ago, in its place among the events."""
        from ._demo_count import Event

        self.crew.happened(Event(time.monotonic() if at is None else at, "said", text=text))

    def tell(self, event: Event, job: Job | None) -> None:
        """Tell of an event of the log."""
        at = event.at - self.crew.started
        if event.what == "said":
            self._screen.say(at, event.text)
        if event.what != "run" or job is None:
            return
        cause, woken_after = job.cause, job.woken_after
        if cause is None or woken_after is None:
            self._screen.grant(at, f"worker {job.worker} got a slot at once")
            return
        waited = f"waited {event.at - job.asked:.2f} s"
        first = ", first in line," if self.crew.was_first_in_line(job.worker, cause.at) else ""
        after = f"{woken_after * 1000:.1f} ms after"
        if cause.what == "release":
            self._screen.grant(
                at, f"worker {job.worker} {waited}, has a slot {after} worker {cause.worker} released it"
            )
        elif cause.what == "limit":
            self._screen.say(at, f"Worker {job.worker}{first} has the new slot {after} the change.")
        else:
            self.slot_is_back = True
            self._screen.say(
                at,
                f"The lease of the killed worker {cause.worker} has ended: its slot went to worker {job.worker}"
                f"{first or ','} {after} that.",
            )


@contextlib.contextmanager
def _progress(output: Format) -> Iterator[Callable[[str], object]]:
    """Show what is under way before there is anything to see. For JSON, only to somebody at a terminal."""
    stream = sys.stderr if output is Format.json else sys.stdout
    if output is Format.json and not stream.isatty():
        yield lambda what: None
        return
    with _output.progress(stream) as say:
        yield say


@contextlib.contextmanager
def _screen(seconds: float, output: Format) -> Iterator[Screen]:
    """Where to show it: on a terminal live, else as a log. For JSON stdout is left alone."""
    from ._demo_show import Live, Log, Silent, console

    terminal = console(output)
    if terminal is not None:
        with Live(terminal, seconds) as live:
            yield live
    else:
        yield Silent() if output is Format.json else Log()


def _ignore_signals() -> None:
    """Let nothing keep the demo from tidying up. Until ``_client.ended_by_signals`` ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _heed_one_signal() -> None:
    """End by the first signal, and ignore whatever comes after it."""

    def heed(act: Callable[[int, FrameType | None], object]) -> Callable[[int, FrameType | None], None]:
        def once(number: int, frame: FrameType | None) -> None:
            _ignore_signals()
            act(number, frame)

        return once

    for number in _SIGNALS:
        act = signal.getsignal(number)
        if callable(act):
            signal.signal(number, heed(act))
