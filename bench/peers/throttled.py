"""``throttled-py`` on Redis: its GCRA, the algorithm that counts in fractions of a second."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from .._subjects import Tasks, Threads
from ._redis import on_redis

PEER = on_redis("throttled", "throttled-py", "GCRA")


def subject(task: dict[str, Any]) -> Threads | Tasks:
    """A limit."""
    return _InTasks(task) if task["flavour"] == "tasks" else _InThreads(task)


def _made(task: dict[str, Any], package: Any) -> Any:
    quota = package.rate_limiter.per_duration(timedelta(seconds=task["seconds"]), task["slots"], task["slots"])
    kept = package.RedisStore(server=f"unix://{task['socket']}")
    return package.Throttled(key=task["name"], using=package.RateLimiterType.GCRA.value, quota=quota, store=kept)


class _InThreads:
    def __init__(self, task: dict[str, Any]) -> None:
        import throttled

        self._throttled = _made(task, throttled)

    def take(self) -> bool:
        return not self._throttled.limit().limited

    def acquire(self) -> Any:
        raise NotImplementedError

    def release(self, held: Any) -> None:
        raise NotImplementedError

    def turn(self) -> None:
        while self._throttled.limit(timeout=3600.0).limited:
            pass


class _InTasks:
    def __init__(self, task: dict[str, Any]) -> None:
        import throttled.asyncio

        self._throttled = _made(task, throttled.asyncio)

    async def take(self) -> bool:
        return not (await self._throttled.limit()).limited

    async def acquire(self) -> Any:
        raise NotImplementedError

    async def release(self, held: Any) -> None:
        raise NotImplementedError

    async def turn(self) -> None:
        while (await self._throttled.limit(timeout=3600.0)).limited:
            pass
