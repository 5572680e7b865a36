"""Rows about what may not make a call slower: keys, leases, waiters.

Each size has a database of its own, so that all sizes can be measured in turns: what disturbs the machine disturbs all.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from uuid import UUID, uuid4

import psycopg

from ._figures import figure
from ._measure import alternate
from ._results import Curve, Point, Result
from ._rows import Bench, row
from ._scale import steps
from ._server import Site
from ._tables import fill, sizes
from .rows_calls import ROOM

_CALLS = 10
"""Calls in one measurement: few, so that all sizes have their turn before the machine is disturbed again."""

_BEAT_EVERY = 2.0
"""Seconds after which waiters are kept alive, as their process would do it."""

_ACQUIRE = "select a.lease_id from pglimits.acquire(%s, key => %s) a"
_RELEASE = "select pglimits.release(%s::uuid)"
_QUEUE = "select * from pglimits.acquire(%s, timeout_seconds => 3600, lease_id => %s, channel => %s)"
_BEAT = "select pglimits._beat(%s)"


class _Calls(Protocol):
    """Something of one size, and calls on it."""

    def ms(self) -> float:
        """Milliseconds of a call."""

    def sizes(self) -> tuple[int, int]:
        """Bytes on disk, dead rows."""

    def close(self) -> None: ...


class _Pairs:
    """Acquire and release on a limit, with another key each time where it has many."""

    def __init__(self, site: Site, many: str, size: int) -> None:
        self._connection = site.connect()
        self._name = site.name(f"{many}-{size}-")
        self._many, self._size = many, size
        self._chance = random.Random(size)
        self._connection.execute("select pglimits.create_limit(%s, %s)", [self._name, ROOM])
        fill(site, self._name, many, size, keep=many == "leases")

    def ms(self) -> float:
        began = time.perf_counter()
        for _ in range(_CALLS // 2):
            key = str(self._chance.randint(1, self._size)) if self._many == "keys" else ""
            row = self._connection.execute(_ACQUIRE, [self._name, key]).fetchone()
            assert row is not None
            self._connection.execute(_RELEASE, [row[0]])
        return (time.perf_counter() - began) * 1000 / _CALLS

    def sizes(self) -> tuple[int, int]:
        return sizes(self._connection)

    def close(self) -> None:
        self._connection.close()


class _Line:
    """One slot and a line of waiters: one comes to its end, and a release hands the slot to its head."""

    def __init__(self, site: Site, size: int) -> None:
        self._connection = site.connect()
        self._name = site.name(f"waiters-{size}")
        self._connection.execute("select pglimits.create_limit(%s, 1)", [self._name])
        self._channel = f"pglimits_{uuid4().hex}"
        self._line: deque[UUID] = deque()
        self._ends = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=[site.connect()], daemon=True)
        self._heart.start()
        for _ in range(size + 1):
            self._join()

    def _join(self) -> None:
        self._line.append(uuid4())
        self._connection.execute(_QUEUE, [self._name, self._line[-1], self._channel])

    def _beat(self, connection: psycopg.Connection[Any]) -> None:
        with connection, contextlib.suppress(psycopg.Error):
            while True:
                connection.execute(_BEAT, [self._channel])
                if self._ends.wait(_BEAT_EVERY):
                    return

    def ms(self) -> float:
        began = time.perf_counter()
        for _ in range(_CALLS // 2):
            self._join()
            row = self._connection.execute(_RELEASE, [self._line.popleft()]).fetchone()
            if row is None or not row[0]:
                raise RuntimeError("the line fell apart: its waiters could not be kept alive in time")
        return (time.perf_counter() - began) * 1000 / _CALLS

    def sizes(self) -> tuple[int, int]:
        return sizes(self._connection)

    def close(self) -> None:
        self._ends.set()
        self._heart.join()
        self._connection.close()


@row("keys")
def keys(bench: Bench) -> Iterator[Result]:
    """Keys that have all been used, one of them at random for each call."""
    yield from _grow(bench, "keys", "keys of a limit", bench.scale.keys, lambda site, n: _Pairs(site, "keys", n))


@row("leases")
def leases(bench: Bench) -> Iterator[Result]:
    """Acquire and release while so many others hold slots."""
    yield from _grow(bench, "leases", "live leases", bench.scale.leases, lambda site, n: _Pairs(site, "leases", n))


@row("waiters")
def waiters(bench: Bench) -> Iterator[Result]:
    """One more stands in line, and a release hands the slot over, with so many in line."""
    yield from _grow(bench, "waiters", "waiters", bench.scale.waiters, _Line)


def _grow(bench: Bench, name: str, x: str, most: int, make: Callable[[Site, int], _Calls]) -> Iterator[Result]:
    with contextlib.ExitStack() as stack:
        made: list[_Calls] = []
        for size in reversed(steps(most)):  # the largest takes longest to make, and no small line waits so long
            bench.say(f"{name}: {size:,}")
            made.insert(0, make(stack.enter_context(bench.site()), size))
            stack.callback(made[0].close)
        bench.say(f"{name}: measuring")
        measured = alternate([each.ms for each in made], bench.scale.repetitions * bench.scale.rounds, warm_up=5)
        points = [Point(size, ms, *each.sizes()) for size, each, ms in zip(steps(most), made, measured, strict=True)]
    note = "" if bench.server.own else "all sizes share their tables"
    yield figure(name).line(points[-1].ms, points[0].ms, size=most, note=note)
    yield Curve(name, x, name, tuple(points), note)
