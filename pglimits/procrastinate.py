"""Limits for tasks of procrastinate, in the database that its jobs are in (extra ``procrastinate``).

``@limited(app, concurrency="database")`` stands in place of ``@app.task``: a job whose turn has not come goes back to
its queue until later, and occupies neither a thread nor one of the places that a worker has.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import random
import threading
from collections.abc import Callable
from typing import Any

from procrastinate import App, BaseRetryStrategy, Blueprint, JobContext, RetryDecision, exceptions, utils
from procrastinate.jobs import Job
from procrastinate.retry import get_retry_strategy
from procrastinate.tasks import Task
from procrastinate.testing import InMemoryConnector

from . import _arguments, _default
from ._arguments import Names
from ._limiter import AsyncLimiter, Limiter
from ._tasks import Key, Wanted
from .errors import AcquireTimeout, InvalidArgument, LimiterUnavailable, QueueFull

__all__ = ["Postponed", "limited", "limiter"]

_MOST_LATER = 60.0
"""Seconds after which a job looks again at the latest: somebody may have changed the limit."""

_NOT_YET = (AcquireTimeout, QueueFull, LimiterUnavailable)

# A postponement is no attempt, and procrastinate is about to count it as one.
_UNCOUNT = "update procrastinate_jobs set attempts = attempts - 1 where id = %(job_id)s and status = 'doing'"
_WAITED = """
select coalesce(extract(epoch from clock_timestamp() - min(at)), 0)::float8 as seconds
from procrastinate_events where job_id = %(job_id)s and type = 'started'
"""

_limiters: dict[Any, Limiter] = {}
_lock = threading.Lock()


class Postponed(Exception):
    """The turn of a job has not come. procrastinate writes it into its log, and runs the job again in ``seconds``."""

    # In the log, each time would be a dozen lines of where it was raised.
    __traceback__: Any = property(lambda self: None, lambda self, traceback: None)

    def __init__(self, seconds: float) -> None:
        super().__init__(f"its turn has not come: it looks again in {seconds:.3g} s")
        self.seconds = seconds


def limiter(app: App) -> Limiter:
    """The limiter on the database of an app, for threads. It opens connections of its own as the app's pool does.

    An app that has no pool of psycopg gets the limiter for the database that the environment names.

    Raises:
        AppNotOpen: the app has not been opened.
    """
    connector: Any = app.connector.get_sync_connector()  # the one that is open, be it sync or async
    if not hasattr(type(connector), "pool"):
        return _default.limiter()
    pool = connector.pool
    with _lock:
        if pool not in _limiters:
            for other in [other for other in _limiters if other.closed]:
                del _limiters[other]
            _limiters[pool] = Limiter(pool=pool)
        return _limiters[pool]


def limited(
    app: App | Blueprint,
    concurrency: Names | None = None,
    rate: Names | None = None,
    *,
    occupy: int = 1,
    key: Key = "",
    timeout_seconds: float | None = None,
    stand_seconds: float = 0,
    postpone_seconds: float = 1,
    lease_duration: float = 300,
    strict: bool = False,
    limiter: Limiter | AsyncLimiter | Callable[[], Limiter | AsyncLimiter] | None = None,
    retry: bool | int | BaseRetryStrategy = False,
    pass_context: bool = False,
    **options: Any,
) -> Callable[[Callable[..., Any]], Task[Any, Any, Any]]:
    """A task whose jobs run when it is their turn.

    Args:
        concurrency: limits whose slots a job holds while it runs: a name, several, or a mapping to counts.
        rate: rate limits of which a job uses slots as it starts.
        occupy: how many slots of each.
        key: the key, or a function of the job's arguments that returns it; None: this job is not limited.
        timeout_seconds: how long after its first start a job may wait before it fails with AcquireTimeout; None for
            ever.
        stand_seconds: how long a job stands in line, and occupies a place of its worker, before it goes back.
        postpone_seconds: about how long it then stays away; where only time is needed, until there is room.
        lease_duration: seconds after which the slots come free if the worker dies; renewed at a third of it.
        strict: a missing limit fails the job, and so does a lost lease; else there is one warning.
        limiter: a limiter, or a function that returns one; by default the one on the database of the app.
        retry: as of ``app.task``. To be postponed is no attempt.
        pass_context, options: as of ``app.task``.

    Raises:
        InvalidArgument: an option is of the wrong form; the error names it.
    """
    wanted = Wanted(concurrency, rate, occupy, key, timeout_seconds, lease_duration, 0, strict, limiter)
    for name, seconds in (("stand_seconds", stand_seconds), ("postpone_seconds", postpone_seconds)):
        if not 0 <= _arguments.number(name, seconds) <= 3600:
            raise InvalidArgument(f"{name} must be from 0 to 3600, not {seconds!r}")

    def decorate(function: Callable[..., Any]) -> Task[Any, Any, Any]:
        turns = _Turns(wanted, stand_seconds, postpone_seconds)
        wrapper = (turns.of_tasks if inspect.iscoroutinefunction(function) else turns.of_threads)(
            function, pass_context
        )
        return app.task(retry=_Retry(get_retry_strategy(retry)), pass_context=True, **options)(wrapper)

    return decorate


class _Retry(BaseRetryStrategy):
    """What a task does otherwise, but for those that were postponed."""

    def __init__(self, otherwise: BaseRetryStrategy | None) -> None:
        self.otherwise = otherwise

    def get_retry_exception(self, exception: BaseException, job: Job) -> exceptions.JobRetry | None:
        if isinstance(exception, Postponed):
            later = utils.utcnow() + datetime.timedelta(seconds=exception.seconds)
            return exceptions.JobRetry(RetryDecision(retry_at=later))
        return self.otherwise.get_retry_exception(exception, job) if self.otherwise is not None else None


class _Turns:
    def __init__(self, wanted: Wanted, stand_seconds: float, postpone_seconds: float) -> None:
        self._wanted = wanted
        self._stand = stand_seconds
        self._postpone = postpone_seconds

    def _kwargs(self, context: JobContext, key: str) -> dict[str, Any]:
        holder = {"task": context.job.task_name, "job": context.job.id, "worker": context.worker_name}
        wanted = self._wanted
        return {"occupy": wanted.occupy, "timeout_seconds": self._stand, "lease_duration": wanted.lease_duration} | {
            "strict": wanted.strict, "holder": holder, "key": key,
        }  # fmt: skip

    def of_tasks(self, function: Callable[..., Any], pass_context: bool) -> Callable[..., Any]:
        wanted = self._wanted

        @functools.wraps(function)
        async def in_task(*args: Any, **kwargs: Any) -> Any:
            context, args = _split(args, pass_context)
            key = wanted.key_of((), kwargs) if context is not None else None
            if context is None or key is None:
                return await function(*args, **kwargs)
            tasks = wanted.limiter_or(lambda: limiter(context.app))._in_tasks()
            async with contextlib.AsyncExitStack() as held:
                by_time = False
                try:
                    if wanted.concurrency is not None:
                        hold = tasks.concurrency(wanted.concurrency, **self._kwargs(context, key))
                        await held.enter_async_context(hold)
                    by_time = True
                    if wanted.rate is not None:
                        await tasks.rate_limit(wanted.rate, wanted.occupy, self._stand, wanted.strict, key)
                except _NOT_YET as error:
                    raise await self._later(context, error, by_time) from None
                return await function(*args, **kwargs)

        return in_task

    def of_threads(self, function: Callable[..., Any], pass_context: bool) -> Callable[..., Any]:
        wanted = self._wanted

        @functools.wraps(function)
        def in_thread(*args: Any, **kwargs: Any) -> Any:
            context, args = _split(args, pass_context)
            key = wanted.key_of((), kwargs) if context is not None else None
            if context is None or key is None:
                return function(*args, **kwargs)
            threads = wanted.limiter_or(lambda: limiter(context.app))._in_threads()
            with contextlib.ExitStack() as held:
                by_time = False
                try:
                    if wanted.concurrency is not None:
                        hold = threads.concurrency(wanted.concurrency, **self._kwargs(context, key))
                        held.enter_context(hold)
                    by_time = True
                    if wanted.rate is not None:
                        threads.rate_limit(wanted.rate, wanted.occupy, self._stand, wanted.strict, key)
                except _NOT_YET as error:
                    raise utils.async_to_sync(self._later, context, error, by_time) from None
                return function(*args, **kwargs)

        return in_thread

    async def _later(self, context: JobContext, error: Exception, by_time: bool) -> Exception:
        """What a job raises whose turn has not come. ``by_time``: time alone will let it in, and nothing before."""
        seconds = self._postpone * random.uniform(0.75, 1.25)
        if isinstance(error, AcquireTimeout) and error.retry_after is not None:
            exact = error.retry_after + random.uniform(0, self._postpone / 4)  # all that wait know the same moment
            seconds = min(exact, _MOST_LATER) if by_time else min(exact, seconds)
        in_memory = isinstance(context.app.connector, InMemoryConnector)  # it knows no SQL
        timeout = self._wanted.timeout_seconds
        if timeout is not None:
            waited = 0.0
            if timeout and not in_memory:
                row = await context.app.connector.execute_query_one_async(_WAITED, job_id=context.job.id)
                waited = row["seconds"]
            if waited >= timeout:
                return AcquireTimeout(f"no slot came free within {timeout:g} s")
            seconds = min(seconds, timeout - waited)
        if not in_memory:
            await context.app.connector.execute_query_async(_UNCOUNT, job_id=context.job.id)
        return Postponed(seconds)


def _split(args: tuple[Any, ...], pass_context: bool) -> tuple[JobContext | None, tuple[Any, ...]]:
    """The context that a worker passes, and what the function itself is to be passed. A plain call has no context, or
    one that is the function's own."""
    if args and isinstance(args[0], JobContext):
        return args[0], args if pass_context else args[1:]
    return None, args
