"""The row about calls already made: they may not make the next one slower, not even if nothing can be tidied up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import psycopg

from . import _scripts
from ._measure import Spread, spread
from ._pgbench import Pgbench
from ._results import Curve, Point, Result, at_least, line
from ._rows import Bench, row, without_pgbench
from ._scale import Scale
from ._server import Site
from ._tables import sizes, vacuum
from .rows_calls import ROOM

_CLIENTS = 4
_NOTE = f"{_CLIENTS} clients of pgbench on one limit, synchronous_commit off, so that nothing hides behind the disk"


_PART = 25_000
"""Calls in a part of the last tenth: enough that the start of pgbench's sessions does not count."""

_AFTER = 3
"""Measurements after the snapshot has ended."""


class _History:
    """A limit on which call follows call."""

    def __init__(self, site: Site, pgbench: Pgbench) -> None:
        self.connection = site.connect()
        self.connection.execute("select pglimits.create_limit(%s, %s)", [site.name("used"), ROOM])
        self._dsn, self._pgbench, self._script = site.dsn, pgbench, _scripts.pair(site.name("used"))
        self.made = 0
        self.points: list[Point] = []
        self.rates: dict[int, float] = {}

    def go_to(self, calls: int) -> None:
        """Make calls until there were so many, and note their time, and what the tables take up then."""
        pairs = max((calls - self.made) // _scripts.CALLS_IN_PAIR, 1)
        rate = _scripts.CALLS_IN_PAIR * self._pgbench.make(self._dsn, self._script, _CLIENTS, pairs, durable=False)
        self.made = calls
        self.rates[calls] = rate
        self.points.append(Point(calls, spread([1000 / rate]), *sizes(self.connection)))

    def last(self, marks: list[int]) -> Spread:
        """Calls per second on the way to these numbers of calls."""
        return spread([self.rates[mark] for mark in marks])


@row("calls", "time of a call against the calls already made, with and without an old snapshot open")
def calls(bench: Bench) -> Iterator[Result]:
    """The same calls in two databases: in one nothing is in the way of vacuum, in one an old snapshot is."""
    pgbench, scale = bench.pgbench, bench.scale
    if pgbench is None:
        yield without_pgbench("calls")
        return
    with contextlib.ExitStack() as stack:
        plain = _History(stack.enter_context(bench.site()), pgbench)
        held = _History(stack.enter_context(bench.site()), pgbench)
        note = "" if bench.server.own else _make(bench, [plain], scale)  # a snapshot would be in its way
        snapshot = stack.enter_context(_old_snapshot(held.connection))
        note = _make(bench, [plain, held] if bench.server.own else [held], scale) or note
        yield from _compare(plain, held, scale, note)

        snapshot.rollback()
        vacuum(held.connection)
        grown = held.points[-1]
        for part in range(1, _AFTER + 1):
            bench.say(f"calls: after the snapshot has ended, {part}/{_AFTER}")
            held.go_to(held.made + scale.snapshot_calls // 10)
    after = held.points[-_AFTER:]
    ended = held.last([int(point.x) for point in after])
    shrunk = f"{(grown.disk_bytes or 0) / 1e6:.1f} MB on disk before, {(after[-1].disk_bytes or 0) / 1e6:.1f} MB now"
    yield line(
        "calls",
        "calls after the snapshot has ended and a vacuum has been round",
        "calls/s",
        ended,
        "before, without one",
        plain.last([int(plain.points[-1].x)]),
        at_least(0.8),
        shrunk,
    )
    yield Curve("calls", "calls already made", "calls", _drawn(plain.points, scale), _NOTE)
    yield Curve("calls", "calls made with an old snapshot open", "calls", _drawn(held.points[:-_AFTER], scale), _NOTE)


def _drawn(points: list[Point], scale: Scale) -> tuple[Point, ...]:
    """With one point for the parts of a last tenth."""
    found: list[Point] = []
    tenths = [set(_last_tenth(calls)[1:]) for calls in {scale.snapshot_calls, scale.calls}]
    for point in points:
        parts = next((tenth for tenth in tenths if point.x in tenth), {point.x})
        values = found[-1].ms.values if found and found[-1].x in parts else ()
        if values:
            found.pop()
        found.append(replace(point, ms=spread([*values, *point.ms.values])))
    return tuple(found)


def _compare(plain: _History, held: _History, scale: Scale, note: str) -> Iterator[Result]:
    """By the last tenth of the calls, as far as they came."""
    marks = _last_tenth(scale.snapshot_calls)
    reached = [mark for mark in marks[1:] if mark in plain.rates and mark in held.rates]
    part = "the last tenth"
    if not reached:
        reached, part = sorted(set(plain.rates) & set(held.rates))[-1:], "the last of them"
    yield line(
        "calls",
        f"{reached[-1]:,} calls with an old snapshot open, {part}",
        "calls/s",
        held.last(reached),
        "the same without one",
        plain.last(reached),
        at_least(0.8),
        note,
    )


def _make(bench: Bench, histories: list[_History], scale: Scale) -> str:
    """Make all calls, in turns. Returns whether there was no time for all."""
    until = time.monotonic() + scale.patience
    for mark in _marks(scale):
        for history in histories:
            bench.say(f"calls: {mark:,}")
            history.go_to(mark)
        if time.monotonic() > until:
            if mark < scale.calls:
                return f"cut short after {scale.patience:g} s"
            break
    return ""


def _marks(scale: Scale) -> list[int]:
    """1, 2, 5, 10 … thousand, and the last tenth of what matters in small steps."""
    found = {digit * 10**power for power in range(3, 7) for digit in (1, 2, 5)}
    found |= set(_last_tenth(scale.snapshot_calls)) | set(_last_tenth(scale.calls))
    return sorted(mark for mark in found if mark <= scale.calls)


def _last_tenth(calls: int) -> list[int]:
    """The number before it, and how many calls there will have been after each part of it."""
    begin = calls - calls // 10
    parts = max(calls // 10 // _PART, 1)
    return [begin + (calls - begin) * part // parts for part in range(parts + 1)]


@contextlib.contextmanager
def _old_snapshot(beside: psycopg.Connection[object]) -> Iterator[psycopg.Connection[object]]:
    """A transaction that sees the database as it is now, as a dump or a report does, and keeps all that dies from then
    on."""
    with psycopg.connect(beside.info.dsn, password=beside.info.password or None) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("select count(*) from pg_class")
        yield connection
