"""Limits for the routes of FastAPI and Starlette, and for whole apps (extra ``starlette``).

``concurrency`` and ``rate_limit`` make a limit: a dependency of FastAPI, or what ``LimitMiddleware`` enforces. A
request that gets no slot is answered with 429, ``Retry-After``, the RateLimit fields, and problem details (RFC 9457).
"""

# Without ``from __future__ import annotations``: FastAPI before 0.124 looks for types, and not for their names, at a
# dependency that is an instance.

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from . import _default
from ._arguments import Names
from ._disconnect import ClientGone, disconnected, until_gone
from ._limiter import AsyncLimiter
from ._web import Entered, Refusal, Wanted

__all__ = ["Limit", "LimitMiddleware", "Refused", "add_handler", "concurrency", "rate_limit"]

Key: TypeAlias = str | Callable[[Any], str | Awaitable[str | None] | None]
"""Or a function of the request. That of a WebSocket is one of Starlette's WebSocket."""


class Refused(HTTPException):
    """A request that a dependency refuses: 429, or 503 where the database could not be reached.

    FastAPI answers it as any HTTPException; ``add_handler`` has it answered with problem details.
    """

    def __init__(self, refusal: Refusal) -> None:
        headers = {name: value for name, value in refusal.headers.items() if name != "Content-Type"}
        super().__init__(refusal.status, refusal.body["detail"], headers)
        self.refusal = refusal


class Limit:
    """What each request needs. Made by ``concurrency`` and ``rate_limit``; ``Depends`` takes it as it is."""

    def __init__(self, wanted: Wanted, key: Key, limiter: AsyncLimiter | None) -> None:
        self._wanted = wanted
        self._key = key
        self._limiter = limiter

    async def __call__(self, connection: HTTPConnection, response: Response) -> AsyncIterator[None]:
        """As a dependency of FastAPI, of a route or of a WebSocket. Raises Refused."""

        async def gone() -> None:
            assert isinstance(connection, Request | WebSocket)
            if isinstance(connection, Request):
                with contextlib.suppress(RuntimeError):  # FastAPI has read it: it was a form
                    await connection.body()
            await disconnected(connection.receive)

        entered = await self._enter(connection, gone)
        if isinstance(entered, Refusal):
            raise Refused(entered)
        for name, value in entered.headers.items():
            response.headers.append(name, value)
        async with self._leaving(entered):
            yield

    async def _enter(self, request: HTTPConnection, gone: Callable[[], Coroutine[Any, Any, None]]) -> Entered | Refusal:
        """``gone``: returns when the client has gone, whose request then leaves the line."""
        key = self._key(request) if callable(self._key) else self._key
        if inspect.isawaitable(key):
            key = await key
        if key is None:
            return Entered(None, {})
        limiter = self._limiter or _default.async_limiter()
        holder = {"method": request.scope.get("method", "WEBSOCKET"), "path": request.url.path}
        entering = self._wanted.enter(limiter, key, holder)
        if not self._wanted.may_wait:
            return await limiter._run(entering)

        def lose(lost: Entered | Refusal) -> None:
            if isinstance(lost, Entered) and lost.lease is not None:
                limiter._release_later(lost.lease)

        try:
            return await until_gone(limiter._run(entering), gone(), lose)
        except ClientGone:  # nobody is there to read this
            return Refusal(499, {"detail": "the client has closed its connection"}, {})

    @contextlib.asynccontextmanager
    async def _leaving(self, entered: Entered) -> AsyncIterator[None]:
        try:
            yield
        finally:
            if entered.lease is not None:
                await (self._limiter or _default.async_limiter()).release(entered.lease)


def concurrency(
    names: Names,
    occupy: int = 1,
    timeout_seconds: float | None = 0,
    lease_duration: float = 300,
    strict: bool = False,
    *,
    key: Key = "",
    show_fields: bool = True,
    limiter: AsyncLimiter | None = None,
) -> Limit:
    """Slots that each request holds until its response is sent and its background tasks have run.

    Args:
        names, occupy, lease_duration: as of ``pglimits.asyncio.concurrency``.
        strict: a missing limit is an error; else it is not enforced, with one warning.
        timeout_seconds: how long a request waits in line; 0 refuses it at once. One whose client goes leaves the line.
        key: the key, or a function of the request, sync or async, that returns it; None: this request is not limited.
            Derive it from what you know, such as who is logged in: each key has the whole budget.
        show_fields: answers say what is left, by one more look into the database. That needs ``pglimits_reader``.
        limiter: by default the one for the database that the environment names.

    A client that goes while its request is at work gives the slots back when that work has ended.

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
    limiter: AsyncLimiter | None = None,
) -> Limit:
    """Slots of a rate limit that each request uses. Arguments and errors as ``concurrency``."""
    wanted = Wanted(names, occupy, timeout_seconds, strict, lease_duration=None, show_fields=show_fields)
    return Limit(wanted, key, limiter)


class LimitMiddleware:
    """Enforces a limit for all requests to an app, or to a route of Starlette.

    ``app.add_middleware(LimitMiddleware, limit=rate_limit("api", key=tenant))``. WebSockets are not limited.
    """

    def __init__(self, app: ASGIApp, limit: Limit) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(receive)
        entered = await self.limit._enter(Request(scope, body.receive), body.gone)
        if isinstance(entered, Refusal):
            await Response(entered.content, entered.status, entered.headers)(scope, body.receive, send)
            return

        async def with_fields(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in entered.headers.items():
                    headers.append(name, value)
            await send(message)

        async with self.limit._leaving(entered):
            await self.app(scope, body.receive, with_fields)


class _Body:
    """What a client sends. Somebody may look whether it has gone, before the app hears what it has sent.

    That reads the first message alone: what is more stays with the client until the app asks for it.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: list[Message] = []

    async def receive(self) -> Message:
        return self._read.pop(0) if self._read else await self._receive()

    async def gone(self) -> None:
        if not self._read:
            self._read.append(await self._receive())
        first = self._read[-1]
        if first["type"] == "http.request":
            if first.get("more_body", False):
                await asyncio.Event().wait()
            self._read.append(await self._receive())


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return Response(error.refusal.content, error.refusal.status, error.refusal.headers)


def add_handler(app: Starlette) -> None:
    """Have the refusals of dependencies answered with problem details."""
    app.add_exception_handler(Refused, _answer)
