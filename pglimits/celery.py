"""Limits for tasks of Celery (extra ``celery``).

``@app.task(base=limited(concurrency="database"))``: a task whose turn has not come waits in its worker's main process,
where it stands in the limiter's line, and occupies no process of the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from celery import Task
from celery.utils.imports import symbol_by_name

from . import _arguments, _default
from ._arguments import Names
from ._celery_gate import TOLD, Gate, LimitedRequest, gate_of
from ._limiter import AsyncLimiter, Limiter
from ._tasks import Key, Wanted
from .errors import InvalidArgument

__all__ = ["limited"]


def limited(
    concurrency: Names | None = None,
    rate: Names | None = None,
    *,
    occupy: int = 1,
    key: Key = "",
    timeout_seconds: float | None = None,
    lease_duration: float = 300,
    priority: int = 0,
    strict: bool = False,
    hold_seconds: float = 600,
    limiter: Limiter | AsyncLimiter | Callable[[], Limiter | AsyncLimiter] | None = None,
    base: type[Any] = Task,
) -> type[Any]:
    """A base class for tasks: each of them waits for its turn before a worker runs it.

    Args:
        concurrency: limits whose slots a task holds while it runs: a name, several, or a mapping to counts.
        rate: rate limits of which a task uses slots as it starts.
        occupy: how many slots of each.
        key: the key, or a function of the task's arguments that returns it; None: this task is not limited. It is
            called in the worker's main process.
        timeout_seconds: how long a task may wait in all before it fails with AcquireTimeout; None for ever.
        lease_duration: seconds after which the slots come free if the whole worker dies; renewed at a third of it.
        priority: higher goes first among those who wait for the limit.
        strict: a missing limit fails the task; else it is not enforced, with one warning.
        hold_seconds: after so many seconds of waiting, the worker sends the message anew, so that the broker does not
            lose patience with it. Keep it below the broker's visibility timeout. The task loses its place.
        limiter: a limiter, or a function that returns it; by default the one for the database that the environment
            names.
        base: the class that your tasks have as their base otherwise.

    While it runs, ``self.fence`` of a bound task is the fence of its lease.

    Raises:
        InvalidArgument: an option is of the wrong form; the error names it.
    """
    once = functools.cache(limiter) if callable(limiter) else limiter
    wanted = Wanted(concurrency, rate, occupy, key, timeout_seconds, lease_duration, priority, strict, once)
    hold = _arguments.number("hold_seconds", hold_seconds)
    if hold <= 0:
        raise InvalidArgument(f"hold_seconds must be above 0, not {hold_seconds!r}")
    if not (isinstance(base, type) and issubclass(base, Task)):
        raise InvalidArgument(f"base must be a class of tasks, not {base!r}")
    options = {"abstract": True, "_wanted": wanted, "_hold_seconds": hold, "__module__": __name__}
    return type("LimitedTask", (_LimitedTask, base), options)


class _LimitedTask:
    _wanted: Wanted
    _hold_seconds: float

    @property
    def fence(self) -> int | None:
        """Of the lease under which the task runs."""
        told = cast(Any, self).request.get(TOLD) or {}
        return cast("int | None", told.get("fence"))

    def start_strategy(self, app: Any, consumer: Any, **kwargs: Any) -> Any:
        """A worker is about to fetch such tasks."""
        mine = cast(Any, self)
        gate: Gate | None = None
        if not consumer.pool.is_green:
            gate = gate_of(consumer)
            gate.open(mine.name)
        of_task = symbol_by_name(type(mine).Request)
        members = {"gate": gate, "wanted": self._wanted, "hold_seconds": self._hold_seconds}
        mine.Request = type("LimitedRequest", (LimitedRequest, of_task), members)
        return super().start_strategy(app, consumer, **kwargs)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = cast(Any, self).request
        told = request.get(TOLD)
        if request.headers:  # where Celery puts all that it does not know, and its retries copy that
            request.headers.pop(TOLD, None)
        if told is None and not request.called_directly:
            return self._wait_and_call(request, args, kwargs)
        return self._call(super().__call__, told, args, kwargs)  # type: ignore[misc]

    def _call(self, run: Callable[..., Any], told: Any, args: Any, kwargs: Any) -> Any:
        if told and "error" in told and "_orig_run" not in self.__dict__:
            raise told["error"]
        return run(*args, **kwargs)

    @property
    def _orig_run(self) -> Any:
        """What Celery's ``autoretry_for`` wraps and calls: so it hears that the turn of a task has not come."""
        told = cast(Any, self).request.get(TOLD) or {}
        if "error" in told:
            raise told["error"]
        if "_orig_run" not in self.__dict__:
            raise AttributeError("_orig_run")
        return self.__dict__["_orig_run"]

    @_orig_run.setter
    def _orig_run(self, run: Any) -> None:
        self.__dict__["_orig_run"] = run

    def _wait_and_call(self, request: Any, args: Any, kwargs: Any) -> Any:
        """No gate has let it in: it runs eagerly, or in a greenlet, which may wait."""
        wanted = self._wanted
        run = cast(Any, self).run if request.is_eager else super().__call__  # type: ignore[misc]
        key = wanted.key_of(args, kwargs)
        if key is None:
            return run(*args, **kwargs)
        limiter = wanted.limiter_or(_default.limiter)._in_threads()
        holder = {"task": cast(Any, self).name, "id": request.id}
        lease = None
        told: dict[str, Any] = {}
        try:
            lease = limiter._run(wanted.take(limiter, key, wanted.timeout_seconds, holder))
        except Exception as error:
            told = {"error": error}
        try:
            if lease is not None:
                told = {"fence": lease.fence}
            setattr(request, TOLD, told)
            return self._call(run, told, args, kwargs)
        finally:
            if lease is not None:
                limiter.release(lease)
