"""``limits`` on Redis: its moving window, the strategy that never lets too many in."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from .._subjects import Tasks, Threads
from ._redis import on_redis

PEER = on_redis("limits", "limits", "moving window")


def subject(task: dict[str, Any]) -> Threads | Tasks:
    """A limit."""
    return _InTasks(task) if task["flavour"] == "tasks" else _InThreads(task)


class _InThreads:
    def __init__(self, task: dict[str, Any]) -> None:
        import limits

        storage = limits.storage.storage_from_string(f"redis+unix://{task['socket']}")
        self._limiter = limits.strategies.MovingWindowRateLimiter(storage)
        self._item = limits.RateLimitItemPerSecond(task["slots"], int(task["seconds"]))
        self._name: str = task["name"]

    def acquire(self) -> Any:
        raise NotImplementedError

    def release(self, held: Any) -> None:
        raise NotImplementedError

    def take(self) -> bool:
        return bool(self._limiter.hit(self._item, self._name))

    def turn(self) -> None:
        while not self._limiter.hit(self._item, self._name):
            reset_at = self._limiter.get_window_stats(self._item, self._name).reset_time
            time.sleep(max(reset_at - time.time(), 0.001))


class _InTasks:
    def __init__(self, task: dict[str, Any]) -> None:
        import limits

        uri = f"async+redis+unix://{task['socket']}"
        storage = limits.storage.storage_from_string(uri, implementation="redispy")
        self._limiter = limits.aio.strategies.MovingWindowRateLimiter(storage)
        self._item = limits.RateLimitItemPerSecond(task["slots"], int(task["seconds"]))
        self._name: str = task["name"]

    async def take(self) -> bool:
        return bool(await self._limiter.hit(self._item, self._name))

    async def acquire(self) -> Any:
        raise NotImplementedError

    async def release(self, held: Any) -> None:
        raise NotImplementedError

    async def turn(self) -> None:
        while not await self._limiter.hit(self._item, self._name):
            reset_at = (await self._limiter.get_window_stats(self._item, self._name)).reset_time
            await asyncio.sleep(max(reset_at - time.time(), 0.001))
