"""Rows about what the server pays: processor time of a call and of connections that wait, and reading the views."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg

from pglimits.errors import EmbeddedUnavailable

from . import _scripts
from ._cpu import MISSING, can_be_seen, pid_on_this_machine, seconds
from ._figures import figure
from ._measure import alternate, percentile, spread
from ._results import Result, Skipped
from ._rows import Bench, row, subject
from ._server import Server, Site, server_where
from ._tables import fill
from .rows_calls import ROOM

_AT_ONCE = 20
"""Calls in one measurement of processor time."""


@row("cpu")
def cpu(bench: Bench) -> Iterator[Result]:
    """What a call costs the process that serves it, without the flush, which is the same for all that is written."""
    with bench.site() as site, site.connect(options="-c synchronous_commit=off") as connection:
        pid = pid_on_this_machine(connection)
        if pid is None:
            yield Skipped("cpu", subject("cpu"), MISSING)
            return
        connection.execute("select pglimits.create_limit(%s, %s)", [site.name("slots"), ROOM])
        connection.execute("select pglimits.create_limit(%s, %s, %s)", [site.name("rate"), ROOM, ROOM])
        taken: deque[Any] = deque()
        update = _scripts.update_one(site.table).encode()

        def acquire() -> None:
            answer = connection.execute("select * from pglimits.acquire(%s)", [site.name("slots")]).fetchone()
            assert answer is not None
            taken.append(answer[1])

        def release() -> None:
            connection.execute("select pglimits.release(%s)", [taken.popleft()])

        def rate_limit() -> None:
            connection.execute("select * from pglimits.rate_limit(%s)", [site.name("rate")])

        def used_by(work: Callable[[], object]) -> float:
            before = seconds(pid)
            for _ in range(_AT_ONCE):
                work()
            return (seconds(pid) - before) * 1e6 / _AT_ONCE

        calls: list[Callable[[], object]] = [lambda: connection.execute(update), acquire, release, rate_limit]
        floor, *ours = alternate(
            [partial(used_by, work) for work in calls],
            bench.scale.repetitions * bench.scale.rounds,
            warm_up=5,
        )
        for part, measured in zip(("acquire", "release", "rate_limit"), ours, strict=True):
            yield figure("cpu", part).line(measured, floor)


_VIEWS = {
    "limits": "select * from pglimits.limits",
    "keys": "select * from pglimits.keys",
}
_AGGREGATES = {
    "limits": "select name, sum(held), sum(waiting), sum(booked) from {} group by name order by name",
    "keys": "select name, key, sum(held), sum(booked), sum(waiting), max(version) from {} group by name, key "
    "order by name, key",
}


@row("views")
def views(bench: Bench) -> Iterator[Result]:
    """The views beside the same sums over a copy of the states, with jit on: where PostgreSQL was built with it."""
    with contextlib.ExitStack() as stack:
        server = bench.server
        if not _has_jit(server) and server.own:
            try:
                server = stack.enter_context(server_where(_has_jit, "jit", instead_of=server))
                bench.peers["PostgreSQL for views"] = server.setup()["version"]
            except EmbeddedUnavailable:
                pass
        note = "" if _has_jit(server) else "this PostgreSQL was built without jit"
        for many, size in (("limits", bench.scale.view_limits), ("keys", bench.scale.view_keys)):
            bench.say(f"views: {size:,} {many}")
            with server.site() as site, site.connect(options="-c jit=on") as connection:
                copy = _used_once(site, connection, many, size)
                for view, of in (("limits", f"limits of {many}"), ("keys", f"keys of {many}")):
                    statements = (_VIEWS[view], _AGGREGATES[view].format(copy))
                    rounds = max(bench.scale.repetitions * bench.scale.rounds // 10, 3)
                    ours, floor = alternate(
                        [partial(_read_ms, connection, sql) for sql in statements], rounds, warm_up=2
                    )
                    yield figure("views", of).line(ours, floor, size=size, note=note)


def _used_once(site: Site, connection: psycopg.Connection[Any], many: str, size: int) -> str:
    """Rate limits, or keys of one, with a lease on each. Returns the name of a table with a copy of their states."""
    name = site.name("seen-")
    names = [f"{name}{number}" for number in range(1, size + 1)] if many == "limits" else [name]
    connection.execute("select pglimits.create_limit(n, %s, 0.001) from unnest(%s::text[]) n", [ROOM, names])
    fill(site, name, many, size, keep=True)
    copy = site.table + "_states"
    connection.execute(f"create table {copy} as select * from pglimits.states".encode())
    connection.execute(f"vacuum analyze {copy}".encode())
    return copy


def _read_ms(connection: psycopg.Connection[Any], sql: str) -> float:
    began = time.perf_counter()
    connection.execute(sql.encode())
    return (time.perf_counter() - began) * 1000


def _has_jit(server: Server) -> bool:
    with psycopg.connect(server.dsn, autocommit=True, options="-c jit=on") as connection:
        found = connection.execute("select pg_jit_available()").fetchone()
    return found is not None and bool(found[0])


_BLOCKED = 20
_AS_LONG = 10.0
"""Seconds for which the processor time of those who wait is told."""


@row("blocked")
def blocked(bench: Bench) -> Iterator[Result]:
    """Connections that wait in plain SQL: what they cost while nothing happens, and how soon they go on."""
    scale = bench.scale
    with bench.site() as site, site.connect() as connection:
        name = site.name("blocked")
        connection.execute("select pglimits.create_limit(%s, 1)", [name])
        held = connection.execute("select * from pglimits.acquire(%s, lease_duration => 86400)", [name]).fetchone()
        assert held is not None
        with _Line(site, name) as line:
            while (row := connection.execute("select count(*) from pglimits.waiters").fetchone()) and row[0] < _BLOCKED:
                line.check()
                time.sleep(0.02)
            if not can_be_seen(site):
                yield Skipped("blocked", figure("blocked", "cpu").what, MISSING)
            else:
                began, before = time.monotonic(), seconds(*line.pids)
                time.sleep(scale.blocked_seconds)
                used, watched = seconds(*line.pids) - before, time.monotonic() - began
                yield figure("blocked", "cpu").line(spread([used * _AS_LONG / watched]))
            bench.say("blocked: hand-over")
            chance, lease_id, found = random.Random(0), held[1], []
            for _ in range(scale.handovers):
                time.sleep(chance.uniform(0.01, 0.03))  # at any moment between two looks of the one at the head
                began = time.monotonic()
                connection.execute("select pglimits.release(%s)", [lease_id])
                at, lease_id = line.next()
                found.append((at - began) * 1000)
    yield figure("blocked", "p50").line(spread([percentile(found, 0.5)]))
    yield figure("blocked", "p99").line(spread([percentile(found, 0.99)]))


class _Line:
    """Connections that stand in line, each again as soon as it has gone on; their leases are released by whoever reads
    of them."""

    def __init__(self, site: Site, name: str) -> None:
        self._site, self._name = site, name
        self._connections = [site.connect() for _ in range(_BLOCKED)]
        self.pids = [each.info.backend_pid for each in self._connections]
        self._granted: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        self._failed: list[Exception] = []
        self._ends = False
        self._threads = [threading.Thread(target=self._wait, args=[each]) for each in self._connections]

    def __enter__(self) -> _Line:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends = True
        with self._site.connect() as connection:
            connection.execute("select pg_terminate_backend(p) from unnest(%s::int[]) p", [self.pids])
        for thread in self._threads:
            thread.join()
        for connection in self._connections:
            connection.close()

    def _wait(self, connection: psycopg.Connection[Any]) -> None:
        try:
            while not self._ends:
                answer = connection.execute("call pglimits.acquire_wait(%s)", [self._name]).fetchone()
                assert answer is not None
                self._granted.put((time.monotonic(), answer[0]))
        except Exception as error:
            if not self._ends:
                self._failed.append(error)

    def check(self) -> None:
        """Raise what has gone wrong."""
        if self._failed:
            raise self._failed[0]

    def next(self) -> tuple[float, Any]:
        """The moment at which one went on, and its lease."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._granted.get(timeout=1.0)
            self.check()
