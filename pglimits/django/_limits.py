"""Decorators of views and middleware."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar, cast

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.views import View as BaseView

from .._arguments import Names
from .._leases import Lease
from .._limiter import Limiter
from .._web import Entered, Refusal, Wanted
from ..errors import InvalidArgument
from ._limiter import limiter as limiter_of

View = TypeVar("View", bound=Callable[..., Any])
Key: TypeAlias = str | Callable[[HttpRequest], str | Awaitable[str | None] | None]


class Limit:
    """What each request needs. Made by ``concurrency`` and ``rate_limit``; decorates views, sync and async."""

    def __init__(self, wanted: Wanted, key: Key, limiter: Limiter | None) -> None:
        self._wanted = wanted
        self._key = key
        self._given = limiter

    def __call__(self, view: View) -> View:
        if iscoroutinefunction(view) or _dispatches_to_async(view):

            @functools.wraps(view)
            async def in_task(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
                key = self._key(request) if callable(self._key) else self._key
                if inspect.isawaitable(key):
                    key = await key
                if key is None:
                    return cast(HttpResponseBase, await view(request, *args, **kwargs))
                tasks = self._limiter()._in_tasks()
                entered = await tasks._run(self._wanted.enter(tasks, key, _holder(request)))
                if isinstance(entered, Refusal):
                    return _refused(entered)
                try:
                    response = await view(request, *args, **kwargs)
                except BaseException:
                    self._give_back(entered.lease)
                    raise
                return self._going(response, entered)

            return cast(View, in_task)

        @functools.wraps(view)
        def in_thread(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            key = self._key(request) if callable(self._key) else self._key
            if key is None:
                return cast(HttpResponseBase, view(request, *args, **kwargs))
            if not isinstance(key, str):
                raise InvalidArgument(f"the key of a view that is not async must be a string, not {key!r}")
            threads = self._limiter()
            entered = threads._run(self._wanted.enter(threads, key, _holder(request)))
            if isinstance(entered, Refusal):
                return _refused(entered)
            try:
                response = view(request, *args, **kwargs)
            except BaseException:
                self._give_back(entered.lease)
                raise
            return self._going(response, entered)

        return cast(View, in_thread)

    def _limiter(self) -> Limiter:
        return self._given or limiter_of()

    def _going(self, response: Any, entered: Entered) -> HttpResponseBase:
        """A response that is to be sent. Forgotten without having been closed, it gives back all the same."""
        for name, value in entered.headers.items():
            before = response.headers.get(name)
            response.headers[name] = value if before is None else f"{before}, {value}"
        if entered.lease is not None:
            response._resource_closers.append(functools.partial(self._give_back, entered.lease))
        return cast(HttpResponseBase, response)

    def _give_back(self, lease: Lease | None) -> None:
        if lease is None:
            return
        if asyncio._get_running_loop() is None:
            self._limiter().release(lease)
        else:
            self._limiter()._release_later(lease)


def _dispatches_to_async(view: Callable[..., Any]) -> bool:
    """Whether it is the ``dispatch`` of an async class-based view, as ``method_decorator`` hands it to a decorator."""
    of = getattr(getattr(view, "func", view), "__self__", None)
    return isinstance(of, BaseView) and of.view_is_async and getattr(view, "__name__", "") == "dispatch"


def _holder(request: HttpRequest) -> dict[str, str]:
    return {"method": str(request.method), "path": request.path}


def _refused(refusal: Refusal) -> HttpResponseBase:
    return cast(HttpResponseBase, HttpResponse(refusal.content, status=refusal.status, headers=refusal.headers))


def concurrency(
    names: Names,
    occupy: int = 1,
    timeout_seconds: float | None = 0,
    lease_duration: float = 300,
    strict: bool = False,
    *,
    key: Key = "",
    show_fields: bool = True,
    limiter: Limiter | None = None,
) -> Limit:
    """Slots that each request holds until its response has been sent, whatever transaction its view runs in.

    Args:
        names, occupy, lease_duration: as of ``pglimits.sync.concurrency``.
        strict: a missing limit is an error; else it is not enforced, with one warning.
        timeout_seconds: how long a request waits in line; 0 refuses it at once.
        key: the key, or a function of the request that returns it, for async views also an async one; None: this
            request is not limited. Derive it from what you know, such as who is logged in.
        show_fields: answers say what is left, by one more look into the database. That needs ``pglimits_reader``.
        limiter: by default the one for PGLIMITS_DATABASE.

    A request that gets no slot is answered with 429, ``Retry-After``, the RateLimit fields, and problem details; with
    503 where the database could not be reached.

    Raises:
        InvalidArgument: one of these is of the wrong form.
    """
    wanted = Wanted(names, occupy, timeout_seconds, strict, lease_duration=lease_duration, show_fields=show_fields)
    return Limit(wanted, key, limiter)


def rate_limit(
    names: Names,
    occupy: int = 1,
    timeout_seconds: float | None = 0,
    strict: bool = False,
    *,
    key: Key = "",
    show_fields: bool = True,
    limiter: Limiter | None = None,
) -> Limit:
    """Slots of a rate limit that each request uses. Arguments and errors as ``concurrency``."""
    wanted = Wanted(names, occupy, timeout_seconds, strict, lease_duration=None, show_fields=show_fields)
    return Limit(wanted, key, limiter)


def middleware(limit: Limit) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A middleware that enforces a limit for all requests. Name what it returns in MIDDLEWARE."""

    def made(get_response: Callable[..., Any]) -> Callable[..., Any]:
        return limit(get_response)

    made.sync_capable = made.async_capable = True  # type: ignore[attr-defined]
    return made
