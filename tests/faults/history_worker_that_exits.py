"""A worker of the histories that ends with leases held and requests waiting: what it held comes free as it exits.

It takes what it can get, says so, and ends in one of the ways a program ends, at the end of its standard input.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

from history_worker import Ask, Worker, start

from pglimits import AcquireTimeout, AsyncLimiter, Limiter, LimiterUnavailable

KEPT: list[Any] = []


def keep(worker: Worker, ask: Ask, lease: Any) -> None:
    KEPT.append(lease)
    worker.say_granted(ask, lease)


def take_in_threads(worker: Worker) -> None:
    """Take some, and leave threads behind that wait for more."""
    limiter = Limiter(worker.plan.dsn)
    KEPT.append(limiter)

    def take() -> None:
        while True:
            ask = worker.next()
            try:
                keep(worker, ask, limiter.acquire(ask.names, timeout_seconds=ask.timeout, lease_duration=300))
            except AcquireTimeout:
                worker.log.say(ask.attempt, "timed out")
            except LimiterUnavailable as error:  # it has been closed
                return worker.log.say(ask.attempt, "failed", error=type(error).__name__, message=str(error))

    for _ in range(worker.plan.at_once):
        threading.Thread(target=take, daemon=True).start()
    worker.ended.wait()


async def take_in_tasks(worker: Worker) -> None:
    limiter = AsyncLimiter(worker.plan.dsn)
    KEPT.append(limiter)

    async def take() -> None:
        while True:
            ask = worker.next()
            try:
                keep(worker, ask, await limiter.acquire(ask.names, timeout_seconds=ask.timeout, lease_duration=300))
            except AcquireTimeout:
                worker.log.say(ask.attempt, "timed out")
            except LimiterUnavailable as error:  # it has been closed
                return worker.log.say(ask.attempt, "failed", error=type(error).__name__, message=str(error))

    KEPT.extend(asyncio.create_task(take()) for _ in range(worker.plan.at_once))
    while not worker.ended.is_set():
        await asyncio.sleep(0.01)


def main() -> None:
    worker = start()
    if worker.plan.kind == "sync":
        take_in_threads(worker)
    else:
        asyncio.run(take_in_tasks(worker))
    way = worker.random.choice(["falls off the end", "sys.exit", "an unhandled exception"])
    if way == "sys.exit":
        sys.exit(3)
    if way == "an unhandled exception":
        raise RuntimeError("the work failed")


if __name__ == "__main__":
    main()
