"""The row about calls already made: they may not make the next one slower, not even if nothing can be tidied up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

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


@row("calls", "time of a call against the calls already made, also with an old snapshot open")
def calls(bench: Bench) -> Iterator[Result]:
    """The same calls in two databases: in one nothing is in the way of vacuum, in one an old snapshot is."""
    pgbench, scale = bench.pgbench, bench.scale
    if pgbench is None:
        yield without_pgbench("calls")
        return
    with contextlib.ExitStack() as stack:
        plain = _History(stack.enter_context(bench.site()), pgbench)
        held = _History(stack.enter_context(bench.site()), pgbench)
        snapshot = stack.enter_context(_old_snapshot(held.connection))
        note = _make(bench, [plain, held], scale)
        yield from _compare(plain, held, scale, note)

        snapshot.rollback()
        vacuum(held.connection)
        grown = held.points[-1]
        for part in range(1, scale.repetitions + 1):
            held.go_to(held.made + scale.snapshot_calls // 50)
            bench.say(f"calls: after the snapshot has ended, {part}/{scale.repetitions}")
    after = held.points[-scale.repetitions :]
    ended = spread([held.rates[int(point.x)] for point in after])
    yield line(
        "calls",
        "calls after the snapshot has ended and a vacuum has been round",
        "calls/s",
        ended,
        "before, without one",
        plain.last([int(point.x) for point in plain.points[-scale.repetitions :]]),
        at_least(0.8),
    )
    yield _curve("calls-plain", "calls already made", plain, len(plain.points))
    yield _curve("calls-snapshot", "calls already made with an old snapshot open", held, held.points.index(grown) + 1)
    yield Curve("calls-after", "after the snapshot has ended", "calls", tuple(after), _NOTE)


def _curve(name: str, what: str, of: _History, points: int) -> Curve:
    return Curve(name, f"time of a call against {what}", "calls", tuple(of.points[:points]), _NOTE)


def _compare(plain: _History, held: _History, scale: Scale, note: str) -> Iterator[Result]:
    """By the last tenth of the calls, as far as they came."""
    marks = _last_tenth(scale.snapshot_calls, scale.repetitions)
    reached = [mark for mark in marks if mark in plain.rates and mark in held.rates]
    if len(reached) < len(marks):
        reached = sorted(set(plain.rates) & set(held.rates))[-1:]
    yield line(
        "calls",
        f"{reached[-1]:,} calls with an old snapshot open, the last tenth",
        "calls/s",
        held.last(reached),
        "the same without one",
        plain.last(reached),
        at_least(0.8),
        note,
    )


def _make(bench: Bench, histories: list[_History], scale: Scale) -> str:
    """Make all calls: in turns, or, where both share a database and the snapshot would be in the way of both, …"""
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
    found |= set(_last_tenth(scale.snapshot_calls, scale.repetitions))
    found |= set(_last_tenth(scale.calls, scale.repetitions))
    return sorted(mark for mark in found if mark <= scale.calls)


def _last_tenth(calls: int, parts: int) -> list[int]:
    begin = calls - calls // 10
    return [begin + (calls - begin) * part // parts for part in range(1, parts + 1)]


@contextlib.contextmanager
def _old_snapshot(beside: psycopg.Connection[object]) -> Iterator[psycopg.Connection[object]]:
    """A transaction that sees the database as it is now, as a dump or a report does, and keeps all that dies from then
    on."""
    with psycopg.connect(beside.info.dsn, password=beside.info.password or None) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("select count(*) from pg_class")
        yield connection
