"""Workers that wait: who stands in line, and a bare listener as the floor.

All tell the machine's monotonic clock, which its processes share, in nanoseconds.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg

from pglimits import AsyncLimiter, Lease, Limiter

from ._drive import tell

_KEPT = 24 * 3600.0
"""Seconds: longer than any run, so that nobody renews what another process has released."""

Commands = Callable[[], dict[str, Any]]


def queue_up(task: dict[str, Any], commands: Commands) -> None:
    """The role ``queue``: ``waiters`` tasks or threads wait for a slot, tell when they run, and stand in line again.

    What they get is released by whoever reads that; until then they keep it, so it is not given back twice.
    """
    if task["flavour"] == "tasks":
        asyncio.run(_tasks_in_line(task))
    else:
        _threads_in_line(task)


async def _tasks_in_line(task: dict[str, Any]) -> None:
    async with AsyncLimiter(task["dsn"]) as limiter:
        kept: list[Lease] = []

        async def stand_in_line() -> None:
            while True:
                lease = await limiter.acquire(task["name"], strict=True, lease_duration=_KEPT)
                tell(at=time.monotonic_ns(), lease=str(lease.id))
                kept.append(lease)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(task["waiters"]):
                tasks.create_task(stand_in_line())
            tell(ready=True)


def _threads_in_line(task: dict[str, Any]) -> None:
    limiter = Limiter(task["dsn"])
    kept: list[Lease] = []

    def stand_in_line() -> None:
        while True:
            lease = limiter.acquire(task["name"], strict=True, lease_duration=_KEPT)
            tell(at=time.monotonic_ns(), lease=str(lease.id))
            kept.append(lease)

    tell(ready=True)
    threads = [threading.Thread(target=stand_in_line) for _ in range(task["waiters"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def listen(task: dict[str, Any], commands: Commands) -> None:
    """The role ``listen``: tell when a notification came, with nothing between it and the socket but libpq."""
    connection = psycopg.connect(task["dsn"], autocommit=True)
    connection.execute(f'listen "{task["channel"]}"')
    pgconn = connection.pgconn
    with selectors.DefaultSelector() as selector:
        selector.register(pgconn.socket, selectors.EVENT_READ)
        tell(ready=True)
        while True:
            selector.select()
            pgconn.consume_input()
            while pgconn.notifies() is not None:
                tell(at=time.monotonic_ns())
