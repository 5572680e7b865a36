"""The row about an old snapshot: calls may not become slower because nothing of those before can be tidied up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import psycopg

from . import _scripts
from ._figures import figure
from ._measure import spread
from ._pgbench import Pgbench
from ._results import Curve, Point, Result
from ._rows import Bench, row, without_pgbench
from ._scale import Scale
from ._server import Site
from ._tables import sizes
from .rows_calls import ROOM

_CLIENTS = 4
_NOTE = f"{_CLIENTS} clients of pgbench on one limit, synchronous_commit off, so that nothing hides behind the disk"

_PART = 10_000
"""Calls in a part of the last tenth: enough that the start of pgbench's sessions does not count."""


class _History:
    """A limit on which call follows call."""

    def __init__(self, site: Site, pgbench: Pgbench) -> None:
        self.connection = site.connect()
        self.connection.execute("select pglimits.create_limit(%s, %s)", [site.name("used"), ROOM])
        self._dsn, self._pgbench, self._script = site.dsn, pgbench, _scripts.pair(site.name("used"))
        self._made = 0
        self.points: list[Point] = []
        self.rates: dict[int, float] = {}

    def go_to(self, calls: int) -> None:
        """Make calls until there were so many, and note their time, and what the tables take up then."""
        pairs = max((calls - self._made) // _scripts.CALLS_IN_PAIR, 1)
        rate = _scripts.CALLS_IN_PAIR * self._pgbench.make(self._dsn, self._script, _CLIENTS, pairs, durable=False)
        self._made = calls
        self.rates[calls] = rate
        self.points.append(Point(calls, spread([1000 / rate]), *sizes(self.connection)))

    def curve(self, what: str, tenth: list[int]) -> Curve:
        """With one point for all parts of the last tenth."""
        parts = [point for point in self.points if point.x in tenth]
        found = [point for point in self.points if point.x not in tenth]
        if parts:
            found.append(replace(parts[-1], ms=spread([ms for point in parts for ms in point.ms.values])))
        return Curve("snapshot", what, "calls", tuple(found), _NOTE)


@row("snapshot")
def snapshot(bench: Bench) -> Iterator[Result]:
    """The same calls in two databases: in one nothing is in the way of vacuum, in one an old snapshot is."""
    pgbench, scale = bench.pgbench, bench.scale
    if pgbench is None:
        yield without_pgbench("snapshot")
        return
    with contextlib.ExitStack() as stack:
        plain = _History(stack.enter_context(bench.site()), pgbench)
        held = _History(stack.enter_context(bench.site()), pgbench)
        if not bench.server.own:  # all is in one database, where the snapshot would be in the way of both
            _make(bench, [plain], scale)
        stack.enter_context(_old_snapshot(held.connection))
        _make(bench, [plain, held] if bench.server.own else [held], scale)
    made = sorted(set(plain.rates) & set(held.rates))
    tenth = [mark for mark in _last_tenth(scale.snapshot_calls)[1:] if mark in made] or made[-1:]
    ours, theirs = (spread([each.rates[mark] for mark in tenth]) for each in (held, plain))
    note = f"cut short after {scale.patience:g} s" if made[-1] < scale.snapshot_calls else ""
    yield figure("snapshot").line(ours, theirs, size=made[-1], note=note)
    yield plain.curve("calls already made", tenth)
    yield held.curve("calls made with an old snapshot open", tenth)


def _make(bench: Bench, histories: list[_History], scale: Scale) -> None:
    """Make all calls, in turns, as far as there is time."""
    until = time.monotonic() + scale.patience
    for mark in _marks(scale.snapshot_calls):
        for history in histories:
            bench.say(f"snapshot: {mark:,}")
            history.go_to(mark)
        if time.monotonic() > until:
            return


def _marks(calls: int) -> list[int]:
    """1, 2, 5, 10 … thousand, and the last tenth in small steps."""
    tenth = _last_tenth(calls)
    steps = [digit * 10**power for power in range(3, 7) for digit in (1, 2, 5)]
    return [*(mark for mark in steps if mark < tenth[0]), *tenth]


def _last_tenth(calls: int) -> list[int]:
    """The number before it, and how many calls there will have been after each part of it."""
    begin = calls - calls // 10
    parts = max(calls // 10 // _PART, 1)
    return [begin + (calls - begin) * part // parts for part in range(parts + 1)]


@contextlib.contextmanager
def _old_snapshot(beside: psycopg.Connection[object]) -> Iterator[None]:
    """A transaction that sees the database as it is now, as a dump or a report does, and keeps all that dies from then
    on."""
    with psycopg.connect(beside.info.dsn, password=beside.info.password or None) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("select count(*) from pg_class")
        yield
        connection.rollback()
