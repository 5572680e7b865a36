"""How a thread or a task is woken. The rest of the wrapper does not know which of the two is waiting."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

OURS = "pglimits-"
"""How the names of our threads begin."""


class Anchor:
    """Lives as long as a call; see Orphan."""

    __slots__ = ("__weakref__",)


class Orphan(weakref.ref[Any], Generic[T]):
    """What is left behind when a call ends without having dropped this: its subject, handed to ``take``.

    The last resort against interrupts: one that strikes in the handler of another can end that too. ``take`` has to
    be a function of C, in which no signal is heard.
    """

    __slots__ = ("subject",)
    subject: T


def orphan(anchor: object, take: Callable[[Orphan[T]], None], subject: T) -> Orphan[T]:
    """Have the subject handed to ``take`` when the anchor dies, unless what this returns is dropped before."""
    made: Orphan[T] = Orphan(anchor, take)
    made.subject = subject
    return made


class _Begun(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(1.0 if timeout is None else timeout)


def started(make: Callable[[], threading.Thread]) -> threading.Thread:
    """A thread, started.

    ``Thread.start`` waits for the new thread's first step. But an exception that is thrown at the thread that starts it
    may strike the new one instead, which has the same number for a moment; it never takes that step.
    """
    while True:
        thread = make()
        begun = thread._started = _Begun()  # type: ignore[attr-defined]
        thread.start()
        if begun.is_set():
            return thread


class Waker:
    """Something that waits for a wake-up. A wake-up that comes before the wait is not lost."""

    __slots__ = ()

    def wake(self) -> None:
        raise NotImplementedError


class ThreadWaker(Waker):
    """A waiting thread.

    A bare lock, which is held while nobody has woken it: an exception that strikes a thread inside the Python code of
    an Event or a Condition can leave their locks taken for good, and who wakes it would hang.
    """

    __slots__ = ("_asleep",)

    def __init__(self) -> None:
        self._asleep = threading.Lock()
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

    def wake(self) -> None:
        wake_all((self,))

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
        else:
            waker.wake()
    for loop, tasks in loops.items():
        if loop is asyncio._get_running_loop():
            _wake_in_loop(tasks)
            continue
        with contextlib.suppress(RuntimeError):  # the loop was closed, and its tasks with it
            loop.call_soon_threadsafe(_wake_in_loop, tasks)


def _wake_in_loop(tasks: list[TaskWaker]) -> None:
    for task in tasks:
        task.wake_in_loop()
