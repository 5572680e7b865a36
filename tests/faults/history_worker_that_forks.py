"""A worker of the histories that forks all the time: its children go on with the same limiter, beside it."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable

from history_worker import Worker, ask_once, ask_once_in_loop, run_threads, start

from pglimits import AsyncLimiter, Limiter

CHILD_ASKS = 3
"""Times that a child asks, in each of its threads or tasks."""
CHILD_AT_ONCE = 2


def fork_until_ended(worker: Worker, work: Callable[[], None]) -> None:
    """Work in one child of this process after the other."""
    while not worker.ended.is_set():
        seed = random.SystemRandom().random()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                worker.random.seed(seed)
                work()
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            worker.log.say("", "unexpected", error=f"a child ended with {code}")
        time.sleep(worker.random.random() * 0.05)


def work_in_threads(worker: Worker) -> None:
    with Limiter(worker.plan.dsn, **worker.plan.limiter) as limiter:

        def work() -> None:
            while not worker.ended.is_set():
                ask_once(worker, limiter)

        def few() -> None:
            for _ in range(CHILD_ASKS):
                ask_once(worker, limiter)

        def in_child() -> None:
            threads = [threading.Thread(target=few) for _ in range(CHILD_AT_ONCE)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        forks = threading.Thread(target=fork_until_ended, args=(worker, in_child), daemon=True)
        forks.start()
        run_threads(worker, work)
        forks.join()


async def work_in_tasks(worker: Worker) -> None:
    async with AsyncLimiter(worker.plan.dsn, **worker.plan.limiter) as limiter:

        async def work() -> None:
            while not worker.ended.is_set():
                await ask_once_in_loop(worker, limiter)

        async def few() -> None:
            for _ in range(CHILD_ASKS):
                await ask_once_in_loop(worker, limiter)

        async def in_child() -> None:
            await asyncio.gather(*(few() for _ in range(CHILD_AT_ONCE)))

        forks = asyncio.to_thread(fork_until_ended, worker, lambda: asyncio.run(in_child()))
        await asyncio.gather(forks, *(work() for _ in range(worker.plan.at_once)))


def main() -> None:
    worker = start()
    if worker.plan.kind == "sync":
        work_in_threads(worker)
    else:
        asyncio.run(work_in_tasks(worker))


if __name__ == "__main__":
    main()
