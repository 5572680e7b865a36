"""What ``concurrency`` returns: slots held while a block or a function runs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from . import _arguments
from ._leases import Lease, orphan
from ._requests import Kind, checked
from ._uses import NOBODY, AsyncUse, Canceller, Use, end_in_task, end_in_thread
from .errors import InvalidArgument

if TYPE_CHECKING:
    from ._arguments import Names
    from ._courier import Courier
    from ._limiter import AsyncLimiter, Limiter

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class _Hold:
    """The arguments of ``concurrency``, checked. One object may be entered several times, also at once."""

    def __init__(
        self,
        limiter: Callable[[], Limiter | AsyncLimiter],
        names: Names,
        occupy: int = 1,
        timeout_seconds: float | None = None,
        max_retries: int | None = None,
        lease_duration: float = 300,
        strict: bool = False,
        holder: Any = None,
        raise_on_lease_renewal_failure: bool | None = None,
        *,
        key: str = "",
        priority: int = 0,
    ) -> None:
        """Hold slots of one or several limits, all or none, for as long as a block or a function runs.

        Args:
            names: a limit, several, or a mapping of limits (or (name, key) pairs) to slots.
            occupy: how many slots of each.
            timeout_seconds: how long to wait in all; None for ever, 0 tries once.
            max_retries: 0 tries once; another number changes nothing, as a queue needs no retries.
            lease_duration: seconds after which the slots come free if this process dies; renewed at a third of it.
            strict: a missing limit is an error, and a lost lease raises.
            holder: JSON that says who holds the slots; by default host, pid, thread or task, and program.
            raise_on_lease_renewal_failure: whether a lost lease raises; None: as ``strict``.
            key: each key of a limit has the whole budget for itself.
            priority: higher goes first; within one priority, in order of arrival.

        Entering gives a Lease, which can be settled. Raises AcquireTimeout, LimitNotFound (strict), SlotsExceedLimit,
        QueueFull, InvalidArgument, LimiterUnavailable; leaving raises LeaseLost if the lease was lost and that is to
        raise. On a coroutine function the slots are held while its task runs. What returns at once and works later (a
        generator, a context manager, a task, a future) is an InvalidArgument.
        """
        self._limiter = limiter
        self._names = names
        self._strict = strict
        self._raise = raise_on_lease_renewal_failure
        self._holder = None if holder is None else _arguments.holder(holder)
        self._rest = (occupy, timeout_seconds, max_retries, lease_duration)
        self._more = (key, priority)
        self._last: tuple[bool, Kind] | None = None
        # By the thread or task that has entered it.
        self._holds: dict[Any, tuple[_Entered, ...]] = {}
        self._kind(strict)

    def _kind(self, strict: bool) -> Kind:
        if self._last is None or self._last[0] is not strict:
            self._last = strict, checked(self._names, *self._rest, strict, self._raise, *self._more)
        return self._last[1]

    def _entered(self, who: Any, lease: Lease, canceller: Canceller, courier: Courier) -> tuple[_Entered, ...]:
        """What a thread or task has entered, with a lease that it has now."""
        entered = _Entered(lease, canceller)
        if lease.enforced:
            lease._left = orphan(entered, courier.inbox.append, (lease.id, lease.places))
        return (*self._holds.get(who, ()), entered)

    def _raises(self, limiter: Limiter | AsyncLimiter) -> bool:
        """Whether a lost lease is to raise."""
        return limiter._is_strict(self._strict) if self._raise is None else self._raise

    def _as(self, kind: type[T]) -> T:
        """The same for threads, or for tasks, not entered."""
        made = kind.__new__(kind)
        made.__dict__.update(self.__dict__, _holds={})
        return made

    def __call__(self, function: F) -> F:
        """Decorate a function, sync or async: each call runs within a context of its own."""
        return _decorate(function, lambda: self._as(Concurrency), lambda: self._as(AsyncConcurrency))


class Concurrency(_Hold, AbstractContextManager[Use]):
    """Slots held while a ``with`` block or a decorated function runs."""

    def __enter__(self) -> Use:
        limiter = self._limiter()._in_threads()
        kind = self._kind(limiter._is_strict(self._strict))
        lease = cast(Use, limiter._run(limiter._acquiring(kind, self._holder)))
        mine = threading.get_ident()
        # No call between this and the body: with each, an interrupt may come.
        self._holds[mine] = self._entered(mine, lease, NOBODY, limiter._courier)
        return lease

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entered = _leave(self._holds, threading.get_ident())
        limiter = self._limiter()._in_threads()
        end_in_thread(limiter, entered.lease, kind, error, self._raises(limiter))


class AsyncConcurrency(_Hold, AbstractAsyncContextManager[AsyncUse]):
    """Slots held while an ``async with`` block or a decorated coroutine function runs."""

    async def __aenter__(self) -> AsyncUse:
        limiter = self._limiter()._in_tasks()
        kind = self._kind(limiter._is_strict(self._strict))
        lease = cast(AsyncUse, await limiter._run(limiter._acquiring(kind, self._holder)))
        canceller = Canceller.of(lease, self._raises(limiter))
        self._holds[canceller.task] = self._entered(canceller.task, lease, canceller, limiter._courier)
        return lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entered = _leave(self._holds, asyncio.current_task())
        limiter = self._limiter()._in_tasks()
        await end_in_task(limiter, entered.lease, entered.canceller, error, self._raises(limiter))


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Entered:
    """That a context has been entered. Forgotten without having been left, it gives its lease back: an interrupt can
    strike before the first line of the exit."""

    lease: Lease
    canceller: Canceller


def _leave(entered: dict[Any, tuple[_Entered, ...]], who: Any) -> _Entered:
    """What a thread or task that leaves a context had entered it with.

    A context may be left by another than the one that entered it, a generator's that is finished elsewhere for
    instance: then it is what was entered last.
    """
    if who not in entered:
        who = next(reversed(entered))
    *rest, last = entered[who]
    if rest:
        entered[who] = tuple(rest)
    else:
        del entered[who]
    return last


def _decorate(
    function: F,
    in_thread: Callable[[], AbstractContextManager[Any]],
    in_task: Callable[[], AbstractAsyncContextManager[Any]],
) -> F:
    """Wrap a function, sync or async, so that each call runs within a context of its own."""
    if isinstance(function, (staticmethod, classmethod)):
        return cast(F, type(function)(_decorate(function.__func__, in_thread, in_task)))
    if not callable(function) or _is(function, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        raise InvalidArgument(f"concurrency decorates functions and coroutine functions, not {function!r}")
    if _is(function, asyncio.iscoroutinefunction):

        @functools.wraps(function)
        async def in_task_wrapper(*args: Any, **kwargs: Any) -> Any:
            async with in_task():
                return _worked(function, await function(*args, **kwargs))

        return cast(F, in_task_wrapper)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with in_thread():
            return _worked(function, function(*args, **kwargs))

    return cast(F, wrapper)


_WORKS_LATER = (
    Awaitable,  # coroutines, tasks, and asyncio's futures
    Generator,
    AsyncGenerator,
    concurrent.futures.Future,
    contextlib._GeneratorContextManager,
    contextlib._AsyncGeneratorContextManager,
)


def _worked(function: Callable[..., Any], result: T) -> T:
    """What a function has returned, unless it is what works only now, when the slots are given back."""
    if not isinstance(result, _WORKS_LATER):
        return result
    if isinstance(result, Coroutine):
        result.close()
    elif isinstance(result, (asyncio.Future, concurrent.futures.Future)):
        result.cancel()
    raise InvalidArgument(
        f"{function!r} returned {result!r}, which would work when its slots have been given back: "
        "decorate a coroutine function, or enter the context inside"
    )


def _is(function: Callable[..., Any], *tests: Callable[[Any], bool]) -> bool:
    """Whether a function, or what an object does when it is called, passes one of the tests."""
    while isinstance(function, functools.partial):
        function = function.func
    return any(test(function) or test(type(function).__call__) for test in tests)
