"""What a lease is to its holder: a block that ends it, and what it has used of rate limits, settled afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import _arguments
from ._arguments import Counts, Part
from ._leases import Lease, Place
from .errors import InvalidArgument, LeaseLost

if TYPE_CHECKING:
    from ._limiter import AsyncLimiter, Limiter


class Use(Lease):
    """A lease that a thread has taken. Used in a ``with`` statement, it ends with the block."""

    __slots__ = ()

    def settle(self, used: Counts) -> bool:
        """Tell how many slots of rate limits were really used. As ``Limiter.settle``."""
        settled: bool = self._limiter.settle(self, used)
        return settled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        end_in_thread(self._limiter, self, kind, error, self._strict)


class AsyncUse(Lease):
    """A lease that a task has taken."""

    __slots__ = ()

    async def settle(self, used: Counts) -> bool:
        """Tell how many slots of rate limits were really used. As ``AsyncLimiter.settle``."""
        settled: bool = await self._limiter.settle(self, used)
        return settled


class Acquiring(Coroutine[Any, Any, AsyncUse]):
    """What ``AsyncLimiter.acquire`` returns: ``await`` it for a lease, or ``async with`` it for as long as a block."""

    __slots__ = ("_canceller", "_course", "_lease", "_limiter")

    def __init__(self, limiter: AsyncLimiter, course: Coroutine[Any, Any, AsyncUse]) -> None:
        self._limiter = limiter
        self._course = course

    def send(self, value: Any) -> Any:
        return self._course.send(value)

    def throw(self, *error: Any) -> Any:
        return self._course.throw(*error)

    def close(self) -> None:
        self._course.close()

    def __await__(self) -> Generator[Any, Any, AsyncUse]:
        return self._course.__await__()

    async def __aenter__(self) -> AsyncUse:
        self._lease = lease = await self._course
        self._canceller = Canceller.of(lease, lease._strict)
        return lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await end_in_task(self._limiter, self._lease, self._canceller, error, self._lease._strict)


def settled(lease: Lease, used: Counts) -> list[Part]:
    """What there is to settle of a lease that is ours: not what is not enforced. Raises InvalidArgument."""
    fences = dict(zip(lease.places, lease.fences, strict=True))
    parts = [Part(*_place(lease, name), slots) for name, slots in _counted(used)]
    return [part for part in parts if fences[part.name, part.key] is not None]


def settled_by_id(used: Counts) -> list[Part]:
    """The same of a lease of which only the id is known."""
    return [Part(*((name, "") if isinstance(name, str) else name), slots) for name, slots in _counted(used)]


def _counted(used: Counts) -> list[tuple[str | Place, int]]:
    if not isinstance(used, Mapping):
        raise InvalidArgument(f"used must be a mapping of limits to slots, not {used!r}")
    if not used:
        raise InvalidArgument("used must not be empty")
    for name in used:
        if not isinstance(name, str) and not (
            isinstance(name, tuple) and len(name) == 2 and all(isinstance(item, str) for item in name)
        ):
            raise InvalidArgument(f"used must name limits or (name, key) pairs, not {name!r}")
    return [(name, _arguments.whole(f"what was used of {name!r}", slots, least=0)) for name, slots in used.items()]


def _place(lease: Lease, name: str | Place) -> Place:
    """The limit and the key that a lease was asked of. The key need not be said where there is one."""
    found = {place for place in lease.places if name in (place, place[0])}
    if len(found) == 1:
        return found.pop()
    if found:
        keys = ", ".join(repr(place) for place in sorted(found))
        raise InvalidArgument(f"used must say which key of {name!r} it is about: {keys}")
    of = ", ".join(repr(place if place[1] else place[0]) for place in lease.places)
    raise InvalidArgument(f"used names {name!r}, and the lease is of {of}")


class Canceller:
    """Cancels the task that works under a lease when that is lost. It knows the task and not the lease: else the two
    would keep each other alive."""

    __slots__ = ("cancelled", "cancelling", "over", "task")

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self.task = task
        self.cancelling = task.cancelling() if task is not None else 0
        self.cancelled = False
        self.over = False

    @classmethod
    def of(cls, lease: Lease, raises: bool) -> Canceller:
        """Of the task that has taken a lease. ``raises``: whether it is to be cancelled."""
        canceller = cls(None if lease._task is None else lease._task())
        if raises:
            lease.on_lost(canceller.lost_elsewhere)
        return canceller

    def lost_elsewhere(self) -> None:
        """Called by the courier."""
        if self.task is not None:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed
                self.task.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if not self.over and self.task is not None:
            self.cancelled = True
            self.task.cancel()


NOBODY = Canceller(None)


def end_in_thread(
    limiter: Limiter, lease: Lease, kind: type[BaseException] | None, error: BaseException | None, raises: bool
) -> None:
    """Give a lease back at the end of a block. ``raises``: whether that it was lost does."""
    ours = lease.is_here()
    lost = lease.lost
    if kind is GeneratorExit and asyncio._get_running_loop() is not None:
        # Perhaps of the garbage collector, in the midst of what a task does here.
        live: bool | None = limiter._release_later(lease)
    else:
        live = limiter._run(limiter._releasing(lease))
    lease._left = None
    if ours and (lost or live is False) and error is None and raises:
        raise _lost(lease)


async def end_in_task(
    limiter: AsyncLimiter, lease: Lease, canceller: Canceller, error: BaseException | None, raises: bool
) -> None:
    """The same at the end of a task's block, which may have been cancelled because its lease was lost."""
    canceller.over = True
    ours = lease.is_here()
    lost = lease.lost
    live = await limiter._run(limiter._releasing(lease))
    lease._left = None
    if not ours or not (lost or live is False) or not raises:
        return
    if canceller.cancelled and canceller.task is not None and canceller.task.uncancel() > canceller.cancelling:
        return  # as asyncio.timeout does it: our own cancellation ends here, somebody else's goes on
    if error is not None and not (canceller.cancelled and isinstance(error, asyncio.CancelledError)):
        return
    raise _lost(lease) from error


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"the lease {lease.id} on {', '.join(lease.names)} ended before the work did")
