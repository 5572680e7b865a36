"""A worker that makes calls of one library, from threads or from tasks, and counts and times them."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

from ._measure import percentile
from ._subjects import Tasks, Threads, subject


def tell(**facts: Any) -> None:
    """A line to the benchmark, in one write."""
    os.write(1, json.dumps(facts).encode() + b"\n")


def serve(task: dict[str, Any], commands: Callable[[], dict[str, Any]]) -> None:
    """The role ``calls``: do what is asked, until there is nothing more."""
    driver = _InTasks() if task["flavour"] == "tasks" else _InThreads()
    if "subject" in task:
        driver.use(task)
    tell(ready=True)
    while True:
        command = commands()
        do: Callable[..., dict[str, Any]] = getattr(driver, command.pop("do"))
        try:
            tell(**do(**command))
        except Exception as error:
            tell(error=f"{type(error).__name__}: {error}"[:500])


class _Count:
    """Calls and how long each took, of all callers of one run."""

    def __init__(self) -> None:
        self.granted = 0
        self.refused = 0
        self.seconds: list[float] = []

    def facts(self, elapsed: float) -> dict[str, Any]:
        return {
            "granted": self.granted,
            "refused": self.refused,
            "elapsed": elapsed,
            "ms": percentile(self.seconds, 0.5) * 1000,
            "p99_ms": percentile(self.seconds, 0.99) * 1000,
        }


class _Gaps:
    """How long a slot was free between a release and the next grant."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self._freed_at: float | None = None

    def granted(self) -> None:
        if self._freed_at is not None:
            self.ms.append((time.monotonic() - self._freed_at) * 1000)

    def freed(self) -> None:
        self._freed_at = time.monotonic()


class _InThreads:
    _measured: Threads

    def use(self, task: dict[str, Any]) -> dict[str, Any]:
        """Call this from now on."""
        self._measured = cast(Threads, subject(task))
        return {}

    def run(self, callers: int, seconds: float, pause: float = 0.0) -> dict[str, Any]:
        """As many units of work as so many callers can do in so many seconds, with so many seconds between two."""
        count = _Count()

        def call() -> None:
            granted, taken = 0, []
            while (began := time.perf_counter()) < until:
                granted += self._measured.take()
                taken.append(time.perf_counter() - began)
                if pause:
                    time.sleep(pause)
            with lock:
                count.granted += granted
                count.refused += len(taken) - granted
                count.seconds += taken

        lock = threading.Lock()
        started = time.perf_counter()
        until = started + seconds
        _in_threads(call, callers)
        return count.facts(time.perf_counter() - started)

    def hand_over(self, waiters: int, rounds: int, hold: float, settle: float) -> dict[str, Any]:
        """A slot goes through all who wait for it, one after the other, ``rounds`` times.

        Args:
            hold: seconds that each keeps it.
            settle: seconds until all are waiting for certain.
        """
        gaps: list[float] = []
        for _ in range(rounds):
            gap = _Gaps()
            held = self._measured.acquire()

            def wait(gap: _Gaps = gap) -> None:
                mine = self._measured.acquire()
                gap.granted()
                time.sleep(hold)
                gap.freed()
                self._measured.release(mine)

            threads = [threading.Thread(target=wait) for _ in range(waiters)]
            for thread in threads:
                thread.start()
            time.sleep(settle)
            gap.freed()
            self._measured.release(held)
            for thread in threads:
                thread.join()
            gaps += gap.ms
        return {"ms": gaps}

    def stream(self, callers: int, seconds: float) -> dict[str, Any]:
        """The moments at which so many callers, each asking again and again, were let in."""
        moments: list[float] = []
        until = time.monotonic() + seconds

        def ask() -> None:
            while time.monotonic() < until:
                self._measured.turn()
                moments.append(time.monotonic())

        _in_threads(ask, callers)
        return {"moments": moments}


def _in_threads(work: Callable[[], None], callers: int) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class _InTasks:
    _measured: Tasks

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def use(self, task: dict[str, Any]) -> dict[str, Any]:
        """As ``_InThreads.use``."""
        self._measured = cast(Tasks, subject(task))
        return {}

    def run(self, callers: int, seconds: float, pause: float = 0.0) -> dict[str, Any]:
        """As ``_InThreads.run``."""
        return self._runner.run(self._run(callers, seconds, pause))

    async def _run(self, callers: int, seconds: float, pause: float) -> dict[str, Any]:
        count = _Count()
        started = time.perf_counter()
        until = started + seconds

        async def call() -> None:
            while (began := time.perf_counter()) < until:
                if await self._measured.take():
                    count.granted += 1
                else:
                    count.refused += 1
                count.seconds.append(time.perf_counter() - began)
                if pause:
                    await asyncio.sleep(pause)

        await _together(call, callers)
        return count.facts(time.perf_counter() - started)

    def hand_over(self, waiters: int, rounds: int, hold: float, settle: float) -> dict[str, Any]:
        """As ``_InThreads.hand_over``."""
        return self._runner.run(self._hand_over(waiters, rounds, hold, settle))

    async def _hand_over(self, waiters: int, rounds: int, hold: float, settle: float) -> dict[str, Any]:
        gaps: list[float] = []
        for _ in range(rounds):
            gap = _Gaps()
            held = await self._measured.acquire()

            async def wait(gap: _Gaps = gap) -> None:
                mine = await self._measured.acquire()
                gap.granted()
                await asyncio.sleep(hold)
                gap.freed()
                await self._measured.release(mine)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(waiters):
                    tasks.create_task(wait())
                await asyncio.sleep(settle)
                gap.freed()
                await self._measured.release(held)
            gaps += gap.ms
        return {"ms": gaps}

    def stream(self, callers: int, seconds: float) -> dict[str, Any]:
        """As ``_InThreads.stream``."""
        return self._runner.run(self._stream(callers, seconds))

    async def _stream(self, callers: int, seconds: float) -> dict[str, Any]:
        moments: list[float] = []
        until = time.monotonic() + seconds

        async def ask() -> None:
            while time.monotonic() < until:
                await self._measured.turn()
                moments.append(time.monotonic())

        await _together(ask, callers)
        return {"moments": moments}


async def _together(work: Callable[[], Coroutine[Any, Any, None]], callers: int) -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(work())
