"""What is measured, as a worker calls it: ours, and the peers, in one form for threads and one for tasks."""

from __future__ import annotations

import importlib
from collections.abc import Coroutine
from typing import Any, Protocol

from pglimits import AcquireTimeout, AsyncLimiter, Limiter

# One of ours, or a module of a peer with a function ``subject``.
_PEERS = {
    "limits": "redis_limits",
    "throttled": "throttled",
    "pyrate": "pyrate",
    "prefect": "prefect",
}


class Threads(Protocol):
    """A library that is called from threads."""

    def take(self) -> bool:
        """One unit of work: slots taken and given back, or a call counted. Whether it was let in."""

    def acquire(self) -> Any:
        """Take a slot and wait for it. Returns what ``release`` needs."""

    def release(self, held: Any) -> None:
        """Give it back."""

    def turn(self) -> None:
        """Wait for a turn on a rate limit."""


class Tasks(Protocol):
    """The same, called from tasks of one event loop."""

    def take(self) -> Coroutine[Any, Any, bool]: ...
    def acquire(self) -> Coroutine[Any, Any, Any]: ...
    async def release(self, held: Any) -> None: ...
    async def turn(self) -> None: ...


class OursInThreads:
    """pglimits, from threads. ``timeout`` 0 does not wait; with ``rate`` a unit of work is a call of rate_limit.
    ``name`` is one, or a list of several."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._limiter = Limiter(task["dsn"])
        self._name: str | list[str] = task["name"]
        self._timeout: float | None = task.get("timeout")
        self._rate = bool(task.get("rate"))

    def take(self) -> bool:
        try:
            if self._rate:
                self._limiter.rate_limit(self._name, timeout_seconds=self._timeout, strict=True)
            else:
                with self._limiter.concurrency(self._name, timeout_seconds=self._timeout, strict=True):
                    pass
        except AcquireTimeout:
            return False
        return True

    def acquire(self) -> Any:
        return self._limiter.acquire(self._name, strict=True)

    def release(self, held: Any) -> None:
        self._limiter.release(held)

    def turn(self) -> None:
        self._limiter.rate_limit(self._name, strict=True)


class OursInTasks:
    """pglimits, from tasks."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._limiter = AsyncLimiter(task["dsn"])
        self._name: str | list[str] = task["name"]
        self._timeout: float | None = task.get("timeout")
        self._rate = bool(task.get("rate"))

    async def take(self) -> bool:
        try:
            if self._rate:
                await self._limiter.rate_limit(self._name, timeout_seconds=self._timeout, strict=True)
            else:
                async with self._limiter.concurrency(self._name, timeout_seconds=self._timeout, strict=True):
                    pass
        except AcquireTimeout:
            return False
        return True

    async def acquire(self) -> Any:
        return await self._limiter.acquire(self._name, strict=True)

    async def release(self, held: Any) -> None:
        await self._limiter.release(held)

    async def turn(self) -> None:
        await self._limiter.rate_limit(self._name, strict=True)


def subject(task: dict[str, Any]) -> Threads | Tasks:
    """What a worker is to call: ``task["subject"]``, from ``task["flavour"]`` (threads or tasks)."""
    wanted = task["subject"]
    if wanted == "ours":
        return OursInTasks(task) if task["flavour"] == "tasks" else OursInThreads(task)
    made: Threads | Tasks = importlib.import_module(f"{__package__}.peers.{_PEERS[wanted]}").subject(task)
    return made
