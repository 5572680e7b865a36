"""The application: what is around every request, what lives as long as the server, and whether it is well."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any
from urllib.parse import quote

import anyio
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from .._disconnect import ClientGone
from .._dsn import resolve
from .._ratelimit_fields import Budgets
from ..errors import InvalidArgument, PermissionDenied, PglimitsError
from . import _auth, _docs, _metrics, _openapi, _page, _prefect, _problems, _v1
from ._database import Database
from ._grants import Grants
from ._listener import Listener
from ._live import Live
from ._settings import Settings

log = logging.getLogger("pglimits.server")

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
"""What every answer has that says nothing else about it."""
_CLOSES_WITHIN = 1.5
_FULL = 1000
"""A sweep that removed so many may have left some."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application that serves one database, for any ASGI server.

    What is running is in ``app.state``: ``db``, ``grants``, ``live``, ``auth``, ``settings``. Call
    ``begin_closing(app)`` when the server is told to end: held requests and streams end then.

    Raises:
        InvalidArgument, EmbeddedUnavailable: there is no such database.
        InvalidArgument: two tokens have the same name, or the root path is one of the server's own paths.
    """
    settings = settings or Settings()
    database = Database(resolve(settings.dsn).conninfo)
    auth = _auth.Auth(settings.tokens, settings.hosts, settings.root_path)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        listener = Listener(database.conninfo)
        await database.open()
        app.state.listener = listener
        app.state.grants = Grants(database, listener, durable=settings.durable)
        app.state.live = Live(database, listener)
        app.state.budgets = Budgets(database)
        sweeper = asyncio.create_task(_sweep_on(database, settings.sweep_every), name="pglimits sweeper")
        try:
            yield
        finally:
            begin_closing(app)
            sweeper.cancel()
            parts = app.state.live, app.state.grants, app.state.budgets, listener, database
            await _close(*(part.close for part in parts))

    routers = [
        *_prefect.routers(),
        _v1.router(settings),
        _page.router(settings),
        _metrics.router(),
        _docs.router(),
    ]
    app = FastAPI(
        title="pglimits",
        version=__version__,
        summary="Concurrency limits and rate limits in PostgreSQL.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _openapi.describe(app)
    app.state.settings, app.state.auth, app.state.db = settings, auth, database
    _problems.add_handlers(app)
    app.add_exception_handler(404, _page.nothing_here)
    for router in routers:
        app.include_router(router)
    _add_health(app)
    _add_login(app)
    _check_root_path(settings.root_path, [*app.routes, *(route for router in routers for route in router.routes)])
    app.add_middleware(_auth.AuthMiddleware, auth=auth, public=_prefect.PUBLIC)
    app.add_middleware(Outermost, largest_body=settings.largest_body, root_path=settings.root_path)
    return app


def _check_root_path(root_path: str, routes: Sequence[BaseRoute]) -> None:
    """Where a proxy takes the prefix off, nobody could tell such a path from one that has it still.

    Raises:
        InvalidArgument: the prefix begins as a path of the server's own.
    """
    own = {getattr(route, "path", "/").split("/")[1] for route in routes}
    first = root_path.strip("/").split("/")[0]
    if first and first in own:
        raise InvalidArgument(
            f"the root path {root_path!r} does not do, as /{first} is a path of the server's own: take /pglimits"
        )


def begin_closing(app: FastAPI) -> None:
    """End what is held and what streams, as the server is about to end."""
    if hasattr(app.state, "live"):
        app.state.grants.begin_closing()
        app.state.live.begin_closing()


async def _close(*closings: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Close one after the other, whatever becomes of the one before. All of it takes a second and a half at most."""

    async def close() -> None:
        for closing in closings:
            try:
                await closing()
            except Exception:
                log.exception("a part of the server could not be closed")

    task = asyncio.create_task(close())
    # Not asyncio.timeout: what waits for a database that is frozen does not end when it is cancelled.
    await asyncio.wait([task], timeout=_CLOSES_WITHIN)


class Outermost:
    """Bounds bodies, adds the headers that every answer has, and turns what nobody caught into problem details."""

    def __init__(self, app: ASGIApp, largest_body: int, root_path: str = "") -> None:
        self.app, self.largest_body, self.root_path = app, largest_body, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.root_path:
            scope["root_path"] = self.root_path
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = False
        left = self.largest_body
        wants_body = scope["method"] != "HEAD"
        if not wants_body:
            scope = {**scope, "method": "GET"}
        root, path = scope.get("root_path", ""), scope["path"]
        if root and path != root and not path.startswith(f"{root}/"):
            scope["path"] = root + path  # the proxy has taken the prefix off

        async def send_on(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                said = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in said)]
            if wants_body or message["type"] != "http.response.body":
                return await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            if message.get("more_body"):
                raise ClientGone  # it has all that it wants

        async def receive_on() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _too_large(self.largest_body)
            return message

        try:
            length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
            if length.isdigit() and int(length[:20]) > self.largest_body:
                raise _too_large(self.largest_body)
            await self.app(scope, receive_on, send_on)
        except Exception as error:
            if _is_of_gone_client(error):
                return  # nobody is there to be answered
            if began:
                log.error("an answer broke off", exc_info=error)
                raise
            await _problems.problem(error).response()(scope, receive, send_on)


def _is_of_gone_client(error: Exception) -> bool:
    """Whether an error says only that the client has gone. A stream breaks off with a group of them."""
    kinds = (ClientGone, anyio.BrokenResourceError, anyio.ClosedResourceError)
    return isinstance(error, kinds) or (isinstance(error, ExceptionGroup) and error.split(kinds)[1] is None)


def _too_large(most: int) -> HTTPException:
    """One of Starlette's, which FastAPI lets through where it reads a body."""
    return HTTPException(413, f"the body of a request may have {most} bytes at most", {"Connection": "close"})


def _add_health(app: FastAPI) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """Whether this process lives."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["health"])
    async def readyz(request: Request) -> Response:
        """Whether the database answers, and has a pglimits that fits this version."""
        database: Database = request.app.state.db
        try:
            await database.check()
        except PglimitsError as error:
            if getattr(request.state, "caller", None) is not None:
                raise
            found = _problems.problem(error)  # which may name the database, its host and its role
            found.detail = "the database cannot be reached, or not be used"
            raise found from error
        return JSONResponse({"status": "ready", "version": __version__})


def _add_login(app: FastAPI) -> None:
    """The form of the page posts here. The page itself is drawn elsewhere."""

    @app.post("/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        auth: _auth.Auth = request.app.state.auth
        async with request.form(max_files=0, max_fields=5) as form:
            secret, wanted = str(form.get("token", "")), _auth.local_path(str(form.get("next", "")))
        root = request.scope.get("root_path", "")
        token = auth.token(secret.strip()) if auth.required else None
        if auth.required and token is None:
            await asyncio.sleep(0.5)  # for those who guess
            return RedirectResponse(f"{root}/login?failed=1&next={quote(wanted, safe='')}", 303)
        response = RedirectResponse(root + wanted, 303)
        if token is not None:
            _auth.set_cookie(response, request, auth, auth.session(token))
        return response

    @app.post("/logout", include_in_schema=False)
    async def logout(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        response = RedirectResponse(f"{root}/login", 303)
        _auth.set_cookie(response, request, request.app.state.auth, "")
        return response


async def _sweep_on(database: Database, every: float) -> None:
    """Sweep now and then. Nothing depends on it, so a role that may not leaves it to others."""
    while every > 0:
        try:
            while await _sweep(database) >= _FULL:
                pass
        except PermissionDenied:
            log.info("the role of this server may not sweep: have pg_cron do it, or pglimits sweep --every 60")
            return
        except PglimitsError as error:
            log.debug("a sweep failed: %s", error)
        except Exception:
            log.exception("a sweep failed")
        await asyncio.sleep(every)


async def _sweep(database: Database) -> int:
    """How much it removed."""
    (swept,) = await database.rows("select s.leases, s.waiters, s.keys from pglimits.sweep() s", writes=True, within=60)
    return int(swept["leases"] + swept["waiters"] + swept["keys"])
