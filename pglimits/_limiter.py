"""The limiter for threads and the one for tasks: how they wait. What they can do is in ``_calls``."""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from ._calls import Base, Calls, Course
from ._concurrency import AsyncConcurrency, Concurrency, _Hold
from ._leases import Lease
from ._reports import Reports
from ._uses import Acquiring, AsyncUse, Use
from ._wake import TaskWaker, ThreadWaker

P = ParamSpec("P")
T = TypeVar("T")
L = TypeVar("L", bound=Base)
H = TypeVar("H")
U = TypeVar("U", bound=Lease)


def _as_made(wrapper: Any, made: Callable[..., Any]) -> None:
    """Give a method the name, the signature and the docstring of what it does."""
    functools.update_wrapper(wrapper, made)
    signature = inspect.signature(made)
    returns = re.sub(r"^Course\[(.*)\]$", r"\1", str(signature.return_annotation))
    wrapper.__signature__ = signature.replace(return_annotation=returns)


def _in_thread(made: Callable[Concatenate[Any, P], Course[T]]) -> Callable[Concatenate[Limiter, P], T]:
    def method(self: Limiter, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(made(self, *args, **kwargs))

    _as_made(method, made)
    return method


def _in_task(
    made: Callable[Concatenate[Any, P], Course[T]],
) -> Callable[Concatenate[AsyncLimiter, P], Coroutine[Any, Any, T]]:
    async def method(self: AsyncLimiter, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(made(self, *args, **kwargs))

    _as_made(method, made)
    return method


def _using(
    made: Callable[Concatenate[Any, P], Course[Lease]], use: type[U]
) -> Callable[Concatenate[Any, P], Course[U]]:
    """Of that limiter, leases are of that class."""
    return cast("Callable[Concatenate[Any, P], Course[U]]", made)


def _acquiring(
    made: Callable[Concatenate[Any, P], Course[AsyncUse]],
) -> Callable[Concatenate[AsyncLimiter, P], Acquiring]:
    in_task = _in_task(made)

    def method(self: AsyncLimiter, /, *args: P.args, **kwargs: P.kwargs) -> Acquiring:
        return Acquiring(self, in_task(self, *args, **kwargs))

    _as_made(method, made)
    return method


def _holds(
    made: Callable[Concatenate[_Hold, Any, P], None], kind: Callable[..., H], limiter: type[L]
) -> Callable[Concatenate[L, P], H]:
    def concurrency(self: L, /, *args: P.args, **kwargs: P.kwargs) -> H:
        return kind(lambda: self, *args, **kwargs)

    of_class(concurrency, made, "concurrency", keeps=1)
    return concurrency


def of_class(wrapper: Any, made: Callable[..., Any], name: str, keeps: int = 0) -> None:
    """Give a function the parameters and the docstring of what a class is made with, but for the limiter."""
    signature = inspect.signature(made)
    parameters = list(signature.parameters.values())
    mine = parameters[:keeps] + parameters[2:]
    wrapper.__name__ = wrapper.__qualname__ = name
    wrapper.__doc__ = made.__doc__
    wrapper.__signature__ = signature.replace(parameters=mine, return_annotation=inspect.Signature.empty)


def on_default(made: Callable[Concatenate[Any, P], T], call: Callable[..., T]) -> Callable[P, T]:
    """A function with the parameters and the docstring of a limiter's method, on the limiter of the environment."""

    def function(*args: P.args, **kwargs: P.kwargs) -> T:
        return call(*args, **kwargs)

    function.__name__ = function.__qualname__ = made.__name__
    function.__doc__ = made.__doc__
    signature = inspect.signature(made)
    function.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return function


class _Either(Base):
    def _in_threads(self) -> Limiter:
        """The same limiter, for threads."""
        return self._as(Limiter)

    def _in_tasks(self) -> AsyncLimiter:
        """The same limiter, for tasks."""
        return self._as(AsyncLimiter)


class Limiter(_Either):
    """Limits of one database, for threads.

    Args:
        dsn: a PostgreSQL connection string; None takes PGLIMITS_DSN, then DATABASE_URL, then the embedded server.
        pool: instead of a DSN, a psycopg_pool.ConnectionPool or AsyncConnectionPool. The limiter opens up to three
            connections of its own as the pool does: by its connection class, conninfo, kwargs and configure, the
            callables among them called each time. They do not count as the pool's, which stays the caller's to close.
        connect: instead of both, a function, sync or async, that opens a psycopg connection for the limiter.
        durable: False commits with ``synchronous_commit = off``. That is faster; a crash of the server (not of a
            client) may then forget the last moments: slots taken or released within about a second before it.
        strict: all calls are strict: a missing limit is an error, and a lost lease raises.
        on_unavailable: what to do when the database cannot be reached: ``"raise"`` LimiterUnavailable, ``"wait"`` and
            try on until the timeout, or ``"allow"`` the work without a slot, with a warning.

    Threads may share one. ``close()`` it, or use it in a ``with`` statement, to release what it still holds.
    """

    concurrency = _holds(_Hold.__init__, Concurrency, _Either)
    _use = Use
    acquire = _in_thread(_using(Calls.acquire, Use))
    release = _in_thread(Calls.release)
    settle = _in_thread(Calls.settle)
    rate_limit = _in_thread(Calls.rate_limit)
    create = _in_thread(Calls.create)
    update = _in_thread(Calls.update)
    upsert = _in_thread(Calls.upsert)
    delete = _in_thread(Calls.delete)
    get = _in_thread(Calls.get)
    list = _in_thread(Calls.list)
    keys = _in_thread(Calls.keys)
    reset = _in_thread(Calls.reset)
    peek = _in_thread(Calls.peek)
    adjust = _in_thread(Calls.adjust)
    holders = _in_thread(Calls.holders)
    waiters = _in_thread(Calls.waiters)
    usage = _in_thread(Reports.usage)
    counters = _in_thread(Reports.counters)
    why_waiting = _in_thread(Reports.why_waiting)
    events = _in_thread(Reports.events)
    history = _in_thread(Reports.history)
    force_release = _in_thread(Calls.force_release)
    _news = _in_thread(Reports._news)
    _sparklines = _in_thread(Reports._sparklines)
    _busiest_keys = _in_thread(Reports._busiest_keys)
    _grants = _in_thread(Reports._grants)
    _queue = _in_thread(Reports._queue)
    _may = _in_thread(Reports._may)
    _limit_faults = _in_thread(Calls._limit_faults)
    _apply = _in_thread(Calls._apply)
    _budgets = _in_thread(Reports._budgets)
    renew = _in_thread(Calls.renew)
    sweep = _in_thread(Calls.sweep)
    version = _in_thread(Calls.version)
    close = _in_thread(Calls.close)

    def __enter__(self) -> Limiter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _caller(self) -> tuple[ThreadWaker, None]:
        return ThreadWaker(), None

    def _run(self, course: Course[T]) -> T:
        try:
            waker, seconds = next(course)
            while True:
                assert isinstance(waker, ThreadWaker)
                # Not for ever in one go: a signal that comes just before the wait is only heard of at the next wake-up.
                waker.wait(1.0 if seconds is None or seconds > 1.0 else seconds)
                waker, seconds = next(course)
                self._courier.poke()
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            course.close()


class AsyncLimiter(_Either):
    """Limits of one database, for asyncio. Arguments as Limiter.

    Requests of its tasks travel together. Leases are renewed from a thread, so a blocked event loop loses none.
    """

    concurrency = _holds(_Hold.__init__, AsyncConcurrency, _Either)
    _use = AsyncUse
    acquire = _acquiring(_using(Calls.acquire, AsyncUse))
    release = _in_task(Calls.release)
    settle = _in_task(Calls.settle)
    rate_limit = _in_task(Calls.rate_limit)
    create = _in_task(Calls.create)
    update = _in_task(Calls.update)
    upsert = _in_task(Calls.upsert)
    delete = _in_task(Calls.delete)
    get = _in_task(Calls.get)
    list = _in_task(Calls.list)
    keys = _in_task(Calls.keys)
    reset = _in_task(Calls.reset)
    peek = _in_task(Calls.peek)
    adjust = _in_task(Calls.adjust)
    holders = _in_task(Calls.holders)
    waiters = _in_task(Calls.waiters)
    usage = _in_task(Reports.usage)
    counters = _in_task(Reports.counters)
    why_waiting = _in_task(Reports.why_waiting)
    events = _in_task(Reports.events)
    history = _in_task(Reports.history)
    force_release = _in_task(Calls.force_release)
    _news = _in_task(Reports._news)
    _sparklines = _in_task(Reports._sparklines)
    _busiest_keys = _in_task(Reports._busiest_keys)
    _grants = _in_task(Reports._grants)
    _queue = _in_task(Reports._queue)
    _may = _in_task(Reports._may)
    _limit_faults = _in_task(Calls._limit_faults)
    _apply = _in_task(Calls._apply)
    _budgets = _in_task(Reports._budgets)
    renew = _in_task(Calls.renew)
    sweep = _in_task(Calls.sweep)
    version = _in_task(Calls.version)
    close = _in_task(Calls.close)

    async def __aenter__(self) -> AsyncLimiter:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _caller(self) -> tuple[TaskWaker, asyncio.Task[Any] | None]:
        task = asyncio.current_task()
        return TaskWaker(asyncio.get_running_loop() if task is None else task.get_loop()), task

    async def _run(self, course: Course[T]) -> T:
        try:
            waker, seconds = next(course)
            while True:
                assert isinstance(waker, TaskWaker)
                try:
                    await waker.wait(seconds)
                except BaseException as error:
                    waker, seconds = course.throw(error)
                else:
                    waker, seconds = next(course)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            course.close()
