"""How a thread or a task is woken. The rest of the wrapper does not know which of the two is waiting."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import os
import threading
from collections.abc import Iterable


class Waker:
    """Something that waits for a wake-up. A wake-up that comes before the wait is not lost."""

    __slots__ = ()


class ThreadWaker(Waker):
    """A waiting thread.

    A bare lock, which is held while nobody has woken it: an exception that strikes a thread inside the Python code of
    an Event or a Condition can leave their locks taken for good, and whoever wakes it would hang.
    """

    __slots__ = ("_asleep",)

    def __init__(self) -> None:
        self._asleep = _thread.allocate_lock()
        self._asleep.acquire()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake already
            self._asleep.release()

    def wait(self, seconds: float | None) -> None:
        """Return when woken or after that many seconds."""
        self._asleep.acquire(timeout=-1 if seconds is None else min(max(seconds, 0.0), threading.TIMEOUT_MAX))


class TaskWaker(Waker):
    """A waiting task. Woken from any thread."""

    __slots__ = ("_future", "_woken", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._woken = False
        self._future: asyncio.Future[None] | None = None

    def wake_in_loop(self) -> None:
        """To be called in the loop's own thread."""
        self._woken = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self, seconds: float | None) -> None:
        """Return when woken or after that many seconds."""
        if not self._woken:
            self._future = self.loop.create_future()
            timer = None if seconds is None else self.loop.call_later(max(seconds, 0), self._time_is_up)
            try:
                await self._future
            finally:
                self._future = None
                if timer is not None:
                    timer.cancel()
        self._woken = False

    def _time_is_up(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


def wake_all(wakers: Iterable[Waker]) -> None:
    """Wake many, with one message to each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[TaskWaker]] = {}
    for waker in wakers:
        if isinstance(waker, TaskWaker):
            loops.setdefault(waker.loop, []).append(waker)
        elif isinstance(waker, ThreadWaker):
            waker.wake()
    for loop, tasks in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed, and its tasks with it
            loop.call_soon_threadsafe(_wake_in_loop, tasks)


def _wake_in_loop(tasks: list[TaskWaker]) -> None:
    for task in tasks:
        task.wake_in_loop()


class Bell:
    """Wakes a thread that waits for descriptors. Rung from anywhere, also from a signal handler."""

    def __init__(self) -> None:
        self.fd, self._ringer = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._ringer, False)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been rung so often that it will be heard
            os.write(self._ringer, b"x")

    def heard(self) -> None:
        """It is silent again."""
        os.read(self.fd, 4096)

    def __del__(self) -> None:
        os.close(self.fd)
        os.close(self._ringer)
