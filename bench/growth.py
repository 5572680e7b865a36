"""Rows about what may not make a call slower: limits, keys, leases, waiters, processes.

Each size has a database of its own, so that all sizes can be measured in turns: what disturbs the machine disturbs all.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from uuid import UUID, uuid4

from pglimits import Limiter

from ._measure import Spread, alternate, spread
from ._processes import workers
from ._results import Curve, Point, Result, at_most, line
from ._rows import ROWS, Bench, row
from ._scale import steps
from ._server import Site
from ._tables import fill, sizes
from .rows_calls import ROOM, calls, together

_CALLS = 10
"""Calls in one measurement: few, so that all sizes have their turn before the machine is disturbed again."""

_CALL_IN = 2.0
"""Seconds after which waiters are kept alive."""

_ACQUIRE = "select a.lease_id from pglimits.acquire(%s, key => %s) a"
_RELEASE = "select pglimits.release(%s::uuid)"
_QUEUE = "select a.status from pglimits.acquire(%s, wait => '1 hour', lease_id => %s) a"


class _Calls(Protocol):
    """Something of one size, and calls on it."""

    def ms(self) -> float:
        """Milliseconds of a call."""

    def sizes(self) -> tuple[int, int]:
        """Bytes on disk, dead rows."""


class _Pairs:
    """Acquire and release on a limit or a key, another one each time."""

    def __init__(self, site: Site, many: str, size: int) -> None:
        self._connection = site.connect()
        self._name = site.name(f"{many}-{size}-")
        self._many, self._size = many, size
        self._chance = random.Random(size)
        create = "select pglimits.create_limit(%s, %s)"
        if many == "limits":
            series = "select pglimits.create_limit(%s || g, %s) from generate_series(1, %s::int) g"
            self._connection.execute(series, [self._name, ROOM, size])
        else:
            self._connection.execute(create, [self._name, ROOM])
        fill(site, self._name, many, size, keep=many == "leases")

    def ms(self) -> float:
        began = time.perf_counter()
        for _ in range(_CALLS // 2):
            number = str(self._chance.randint(1, self._size))
            name = self._name + (number if self._many == "limits" else "")
            row = self._connection.execute(_ACQUIRE, [name, number if self._many == "keys" else ""]).fetchone()
            assert row is not None
            self._connection.execute(_RELEASE, [row[0]])
        return (time.perf_counter() - began) * 1000 / _CALLS

    def sizes(self) -> tuple[int, int]:
        return sizes(self._connection)


class _Line:
    """One slot and a line of waiters: one comes to its end, and a release hands the slot to its head."""

    def __init__(self, site: Site, size: int) -> None:
        self._connection = site.connect()
        self._name = site.name(f"waiters-{size}")
        self._connection.execute("select pglimits.create_limit(%s, 1)", [self._name])
        self._line: deque[UUID] = deque()
        self._called_in = time.monotonic()
        for _ in range(size + 1):
            self._join()
            self._keep_alive()

    def _join(self) -> None:
        self._line.append(uuid4())
        self._connection.execute(_QUEUE, [self._name, self._line[-1]])

    def _keep_alive(self) -> None:
        """Call in for all, as their processes would, if it is about time."""
        now = time.monotonic()
        if now - self._called_in > _CALL_IN:
            self._called_in = now
            self._connection.execute("select count(*) from pglimits.watch(%s::uuid[])", [list(self._line)])

    def ms(self) -> float:
        self._keep_alive()
        began = time.perf_counter()
        for _ in range(_CALLS // 2):
            self._join()
            row = self._connection.execute(_RELEASE, [self._line.popleft()]).fetchone()
            if row is None or not row[0]:
                raise RuntimeError("the line fell apart: its waiters could not be kept alive in time")
        return (time.perf_counter() - began) * 1000 / _CALLS

    def sizes(self) -> tuple[int, int]:
        return sizes(self._connection)


@row("limits", "time of a call against the number of limits")
def limits(bench: Bench) -> Iterator[Result]:
    """Limits that have all been used, one of them at random for each call."""
    yield from _grow(bench, "limits", "limits", bench.scale.limits, lambda site, n: _Pairs(site, "limits", n))


@row("keys", "time of a call against the number of keys of a limit")
def keys(bench: Bench) -> Iterator[Result]:
    """Keys that have all been used, one of them at random for each call."""
    yield from _grow(bench, "keys", "keys", bench.scale.keys, lambda site, n: _Pairs(site, "keys", n))


@row("leases", "time of a call against the live leases on a limit")
def leases(bench: Bench) -> Iterator[Result]:
    """Acquire and release while so many others hold slots."""
    yield from _grow(bench, "leases", "leases", bench.scale.leases, lambda site, n: _Pairs(site, "leases", n))


@row("waiters", "time of a call against the waiters on a limit")
def waiters(bench: Bench) -> Iterator[Result]:
    """One more stands in line, and a release hands the slot over, with so many in line."""
    yield from _grow(bench, "waiters", "waiters", bench.scale.waiters, _Line)


def _grow(bench: Bench, name: str, x: str, most: int, make: Callable[[Site, int], _Calls]) -> Iterator[Result]:
    with contextlib.ExitStack() as stack:
        made: list[_Calls] = []
        for size in reversed(steps(most)):  # the largest takes longest to make, and no small line waits so long
            bench.say(f"{name}: {size:,}")
            made.insert(0, make(stack.enter_context(bench.site()), size))
        bench.say(f"{name}: measuring")
        measured = alternate([each.ms for each in made], bench.scale.repetitions * bench.scale.rounds, warm_up=5)
        points = [Point(size, ms, *each.sizes()) for size, each, ms in zip(steps(most), made, measured, strict=True)]
    yield from _grown(name, x, points, "" if bench.server.own else "all sizes share their tables")


def _grown(name: str, x: str, points: list[Point], note: str, target: float | None = 1.5) -> Iterator[Result]:
    first, last = points[0], points[-1]
    yield line(
        name,
        f"time of a call, {first.x:,.0f} -> {last.x:,.0f} {x}",
        "ms",
        last.ms,
        f"the same with {first.x:,.0f}",
        first.ms,
        None if target is None else at_most(target),
        note,
    )
    what = ROWS[name].what.removeprefix("time of a call against the ")
    yield Curve(name, what, x, tuple(points), note)


@row("processes", "time of a call against the number of processes")
def processes(bench: Bench) -> Iterator[Result]:
    """Each calls as fast as it can on the same limit; the time is that of all divided by all calls."""
    scale = bench.scale
    numbers = [2**power for power in range(scale.processes.bit_length()) if 2**power <= scale.processes]
    points = []
    with bench.site() as site, site.connect() as connection:
        task: dict[str, Any] = calls(site, "hot")
        with Limiter(site.dsn) as limiter:
            limiter.create(task["name"], ROOM)
        with workers([task] * numbers[-1]) as started:
            together(started, 1, scale.seconds / 4)
            for number in numbers:
                bench.say(f"processes: {number}")
                rates = [together(started[:number], 1, scale.seconds) for _ in range(scale.repetitions)]
                points.append(Point(number, _per_call(rates), *sizes(connection)))
    note = "time of all divided by all calls"
    yield from _grown("processes", "processes", points, note, target=None)


def _per_call(pairs_per_second: list[float]) -> Spread:
    return spread([1000 / (2 * rate) for rate in pairs_per_second])
