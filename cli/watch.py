"""What goes on, and what went on: watch, events, history."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _client, _errors, _output, _rights
from ._commands import command
from ._options import Dsn, Format, Name, OfName, Output

if TYPE_CHECKING:
    from pglimits import Event, Limiter, Step, Usage

app = typer.Typer()
_PANEL = "Limits"
_LOOKS_EVERY = 0.5
_RESTS = 4.0
"""It rests at least as often as long as a look took: a look must not become the load."""
_SAMPLED_EVERY = 120.0
"""Seconds between two samples, at most, where a sweep runs as it should."""
_NAPS = 0.25
"""Seconds that it sleeps in one go: a signal in the moment before a sleep does not end that one."""


@command(app, _PANEL)
def watch(
    name: Name,
    every: Annotated[
        float | None,
        typer.Option(
            "--every",
            metavar="S",
            min=0.1,
            show_default=False,
            help="A line every so many seconds. Default: whenever something has changed.",
        ),
    ] = None,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Print a line each time that a limit's use changes, until ctrl-C.

    It looks twice a second: what comes and goes in between is not seen. With -o json each line is an object.

    Example: pglimits watch database

    Example: pglimits watch database --every 60 -o json >> database.log
    """
    from ._state import Rates

    rates = Rates()
    printed: object = None

    def look(limiter: Limiter) -> None:
        nonlocal printed
        found = limiter.usage(names=[name], count=1)
        if not found:
            limiter.get(name)  # says that there is none
            return
        rate = rates.look(found).get(name)
        shown = _facts(found[0])
        if every is not None or shown != printed:
            printed = shown
            line = (
                _output.as_json(_full(found[0], rate), indent=None) if output is Format.json else _line(found[0], rate)
            )
            _errors.write(line)

    with _client.ended_by_signals(), _client.limiter(dsn, _rights.READER, name) as limiter:
        look(limiter)
        reach = _Reach()
        took = 0.0
        while True:
            _sleep(max(every or _LOOKS_EVERY, took * _RESTS))
            began = time.monotonic()
            with reach.tried():
                look(limiter)
            took = time.monotonic() - began


def _facts(usage: Usage) -> tuple[object, ...]:
    """What has changed if this has, as far as a line shows it."""
    level = _output.number(usage.level)
    return (usage.limit, usage.active, usage.slot_decay_per_second, usage.held, usage.waiting, level, usage.max_waiters)


def _full(usage: Usage, rate: float | None) -> dict[str, Any]:
    from ._state import state

    word, reason = state(usage)
    fields = _output.plain(usage)
    kept = ("name", "limit", "active", "slot_decay_per_second", "held", "waiting", "level", "leases", "keys", "grants")
    return {
        "at": fields["now"],
        **{field: fields[field] for field in kept},
        "oldest_wait": usage.oldest_wait,
        "grants_per_second": rate,
        "state": word,
        "reason": reason,
    }


def _line(usage: Usage, rate: float | None) -> str:
    from ._state import state

    parts = [f"held {_output.number(usage.held)}/{_output.number(usage.limit)}"]
    if usage.slot_decay_per_second:
        parts.append(f"level {_output.number(usage.level)}")
    parts.append(f"waiting {_output.number(usage.waiting)}")
    if usage.oldest_wait is not None:
        parts.append(f"oldest {_output.duration(usage.oldest_wait)}")
    if rate is not None:
        parts.append(f"{_output.number(rate)} grants/s")
    return "  ".join([_output.moment(usage.now), *parts, state(usage)[0]])


@command(app, _PANEL)
def events(
    limit: Annotated[
        int, typer.Option("--limit", "-l", metavar="N", min=0, max=100_000, help="How many at most: the newest.")
    ] = 50,
    name: OfName = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            show_default=False,
            help="Only created, updated, deleted, reset, expired, lost or force_released.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, until ctrl-C.")] = False,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Show what happened, oldest first: limits that were changed, and by whom; leases that ended by themselves.

    expired: a holder never came back, and its lease ended. lost: it came back too late.

    With --follow none is missed and none comes twice, also where the database is away for a while. With -o json each
    line is then an object.

    Example: pglimits events --limit 10

    Example: pglimits events --follow --kind expired -o json
    """
    from pglimits._words import EVENT_KINDS

    from ._event_text import line

    if kind is not None and kind not in EVENT_KINDS:
        raise _errors.usage(f"--kind must be one of {', '.join(EVENT_KINDS)}, not {kind!r}")

    def show(found: list[Event]) -> None:
        for event in found:
            _errors.write(_output.as_json(event, indent=None) if output is Format.json else line(event))

    if follow:
        _follow(dsn, limit, name, kind, show)
        return
    with _client.limiter(dsn, _rights.READER) as limiter:
        found = limiter.events(name, kind, count=limit) if limit else []
    if output is Format.json:
        _output.show(output, found)
    elif found:
        show(found)
    else:
        _errors.write("Nothing is known to have happened.")


def _follow(dsn: str | None, limit: int, name: str | None, kind: str | None, show: Any) -> None:
    from ._follow import Follower, listening

    conninfo = _client.target(dsn).conninfo
    with (
        _client.ended_by_signals(),
        _client.limiter(conninfo, _rights.READER) as limiter,
        listening(conninfo) as listener,
    ):
        listener.open()
        follower = Follower(limiter.events(count=1000))
        first = limiter.events(name, kind, count=limit) if limit else []
        show(first)
        # Those that came between the two looks.
        twice = {event.event_id for event in first}
        reach = _Reach()
        while True:
            with reach.tried():
                show(
                    [
                        event
                        for event in follower.read(limiter)
                        if name in (None, event.name) and kind in (None, event.kind) and event.event_id not in twice
                    ]
                )
            _stop_without_reader()
            listener.wait()


@command(app, _PANEL)
def history(
    name: Name,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=1, help="How far back.", show_default=False)
    ] = 3600.0,
    points: Annotated[int, typer.Option("--points", metavar="N", min=1, max=10_000, help="In how many steps.")] = 30,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Show how a limit was used: in the last hour, unless --seconds says otherwise.

    Each row is a step that ends then: slots held on average, the level and the line at its end, and what happened in
    it. `pglimits sweep` or pg_cron takes the samples, one a minute; a step without one is missing, and what happened
    meanwhile is told by the next one.

    Example: pglimits history database --seconds 86400 --points 24
    """
    with _client.limiter(dsn, _rights.READER, name) as limiter:
        limit = limiter.get(name)
        steps = limiter.history(name, seconds, points)
    if output is Format.json:
        _output.show(output, steps)
    elif not steps:
        _errors.write(f"Nothing is known of limit {name!r} in that time. Does a sweep run? (pglimits cron enable)")
    else:
        _table(steps, seconds / points, rated=bool(limit.slot_decay_per_second) or any(step.level for step in steps))


def _table(steps: list[Step], length: float, *, rated: bool) -> None:
    """length: of a step, in seconds."""
    from datetime import timedelta

    bars = _output.is_unicode(sys.stdout)
    most = max(*(max(step.limit, step.held, step.level) for step in steps), 1)
    longest = timedelta(days=1) < steps[-1].at - steps[0].at
    numbers = ["Held", "Limit", *(["Level"] if rated else []), "Waiting", "Grants", "Expired", "Wait p50", "p95"]
    table = _output.table("Until", *([""] if bars else []), *numbers, numbers=numbers, whole=["Until"])
    for step in steps:
        at = step.at.astimezone()
        table.add_row(
            f"{at:%m-%d %H:%M}" if longest else f"{at:%H:%M:%S}",
            *([_output.text(_output.bar(max(step.held, step.level), most, 10))] if bars else []),
            _output.number(step.held),
            _output.number(step.limit),
            *([_output.number(step.level)] if rated else []),
            _output.number(step.waiting),
            _output.number(step.grants),
            _output.number(step.expired_leases),
            "-" if step.waited_p50 is None else f"{step.waited_p50:.3g}s",
            "-" if step.waited_p95 is None else f"{step.waited_p95:.3g}s",
        )
    _output.render(table)
    covered = max(step.covered_seconds for step in steps)
    if covered > 1.5 * length + _SAMPLED_EVERY:
        _errors.write(
            f"No samples were taken for a while: one of these rows tells of {_output.duration(covered)}."
            " Have a sweep run: pglimits cron enable",
            err=True,
        )


class _Reach:
    """Says once that the database cannot be reached, and once that it can again."""

    def __init__(self) -> None:
        self._away = False

    @contextlib.contextmanager
    def tried(self) -> Iterator[None]:
        """Do something that fails where there is no database; it will be done again."""
        from pglimits.errors import LimiterUnavailable

        try:
            yield
        except LimiterUnavailable as error:
            if not self._away:
                _errors.say("Warning", f"{error}; it is tried again")
            self._away = True
            _sleep(1.0)
        else:
            if self._away:
                _errors.say("Warning", "the database can be reached again")
            self._away = False


def _sleep(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _NAPS))
        _stop_without_reader()


def _stop_without_reader() -> None:
    """Nobody would see the next line: end as if it had been printed."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # not a file: a test's
        return
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        raise BrokenPipeError
