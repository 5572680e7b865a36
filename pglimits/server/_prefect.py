"""The routes that Prefect's clients know, so that they work with ``PREFECT_API_URL`` pointing here.

Their paths, bodies, status codes and fields are those of Prefect's server; docs/prefect-api.md says where it differs.
This module has the limits themselves and what a client asks first. ``_prefect_slots`` has what takes and gives back.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocketDisconnect

from .._problem_details import whole_seconds
from ..errors import PglimitsError
from . import _prefect_slots
from ._auth import Caller, reading, writing
from ._database import Database
from ._prefect_limits import Limits, find, find_by_name, set_active_slots, some
from ._prefect_models import MOST_LISTED, Create, CreatedLimit, Failure, Filter, GlobalLimit, Update
from ._prefect_places import Places
from ._problems import Problem, problem
from ._routing import PrefixRouter

PUBLIC = ("/api/health", "/api/ready")
"""Paths that need no token, as in Prefect's server."""

_RELEASE = "3.9.1"
"""The newest release of Prefect that this was tested with."""
_API_VERSION = "0.8.4"
_CLIENT = re.compile(r"^prefect/(\d[\w.+!-]{0,60})")

IdOrName = Annotated[str, Path(description="The id or the name of the limit.")]
Reads = Annotated[Caller, Depends(reading)]
Writes = Annotated[Caller, Depends(writing)]


class PrefectRoute(APIRoute):
    """Answers errors in the form that Prefect's clients read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _invalid(error)
            except (Problem, PglimitsError) as error:
                return _failed(error)

        return handle_errors


def routers() -> list[APIRouter]:
    """All routes under /api."""
    places, known = Places(), Limits()
    failure: dict[str, Any] = {"model": Failure}
    limits = PrefixRouter(
        prefix="/api/v2/concurrency_limits",
        tags=["for Prefect's clients"],
        route_class=PrefectRoute,
        responses={"4XX": failure, "5XX": failure},
    )
    # What is called most stands first.
    _prefect_slots.add(limits, places, known)
    _add_limits(limits, known)
    first = PrefixRouter(prefix="/api", tags=["for Prefect's clients"], route_class=PrefectRoute)
    _add_first(first, places)
    return [limits, first]


def _add_first(routes: APIRouter, places: Places) -> None:
    """What a client asks before it asks for anything, and where it sends its events."""

    @routes.get("/health")
    async def health() -> bool:
        """Whether this process lives."""
        return True

    @routes.get("/ready")
    async def ready(request: Request) -> JSONResponse:
        """Whether the database answers."""
        try:
            await request.app.state.db.check()
        except PglimitsError:
            return JSONResponse({"message": "Database is not available"}, 503)
        return JSONResponse({"message": "OK"})

    @routes.get("/hello", dependencies=[Depends(reading)])
    async def hello() -> str:
        """Say hello."""
        return "👋"

    @routes.get("/version", dependencies=[Depends(reading)])
    async def version() -> str:
        """Which version of Prefect's API this is."""
        return _API_VERSION

    @routes.get("/admin/version", dependencies=[Depends(reading)])
    async def release(request: Request) -> str:
        """The client's own version: a client refuses a server of another major version, and warns of an older one."""
        client = _CLIENT.match(request.headers.get("user-agent", ""))
        return client[1] if client else _RELEASE

    @routes.get("/csrf-token", status_code=422, dependencies=[Depends(reading)])
    async def csrf_token(request: Request) -> JSONResponse:
        """Tells a client that it needs none, and learns whether it keeps cookies."""
        response = JSONResponse({"detail": "CSRF protection is disabled."}, 422)
        places.mark(request, response)
        return response

    @routes.websocket("/events/in")
    async def events(websocket: WebSocket) -> None:
        """Clients report what they have acquired and released. Nothing is read or kept: the database has events."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, ValueError, KeyError):
            speaks_prefect = "prefect" in websocket.scope.get("subprotocols", ())
            await websocket.accept(subprotocol="prefect" if speaks_prefect else None)
            if speaks_prefect:
                await websocket.receive_text()
                await websocket.send_json({"type": "auth_success"})
            while True:
                await websocket.receive_text()


def _add_limits(routes: APIRouter, known: Limits) -> None:
    @routes.post("/", status_code=201, response_model=CreatedLimit)
    @routes.post("", status_code=201, include_in_schema=False, response_model=CreatedLimit)
    async def create(request: Request, body: Create, caller: Writes) -> CreatedLimit:
        """Create a limit."""
        db: Database = request.app.state.db
        # Slots are taken of an active limit: of another, nothing is recorded.
        later = body.active is False and bool(body.active_slots)
        await db.run(
            "select pglimits.create_limit(%s::text, %s::int, %s::float8, %s::boolean)",
            [body.name, body.limit, body.slot_decay_per_second or 0, body.active is not False or later],
            by=caller.name,
        )
        try:
            if body.active_slots:
                row = await find_by_name(db, body.name)
                await set_active_slots(db, request.app.state.grants, row, body.active_slots, caller.name)
            if later:
                await db.run("select pglimits.update_limit(%s, active => false)", [body.name], by=caller.name)
        except (Problem, PglimitsError):
            with contextlib.suppress(PglimitsError):
                await db.run("select pglimits.delete_limit(%s)", [body.name], by=caller.name)
            raise
        known.forget()
        return CreatedLimit.model_validate(GlobalLimit.of(await find_by_name(db, body.name)).model_dump())

    @routes.post("/filter", response_model=list[GlobalLimit])
    async def list_some(request: Request, caller: Reads, body: Filter | None = None) -> list[GlobalLimit]:
        """The limits in the order of their names."""
        asked = body or Filter()
        count = MOST_LISTED if asked.limit is None else asked.limit
        return [GlobalLimit.of(row) for row in await some(request.app.state.db, count, asked.offset)]

    @routes.get("/{id_or_name}", response_model=GlobalLimit)
    async def read(request: Request, id_or_name: IdOrName, caller: Reads) -> GlobalLimit:
        """One limit."""
        return GlobalLimit.of(await find(request.app.state.db, id_or_name))

    @routes.patch("/{id_or_name}", status_code=204, response_class=Response)
    async def update(request: Request, id_or_name: IdOrName, body: Update, caller: Writes) -> Response:
        """Change a limit."""
        db: Database = request.app.state.db
        row = await find(db, id_or_name)
        wanted = body.active_slots
        limit = row["limit"] if body.limit is None else body.limit
        rate = row["slot_decay_per_second"] if body.slot_decay_per_second is None else body.slot_decay_per_second
        if wanted is not None and wanted > max(limit, row["held"]) and rate == 0:
            raise Problem(422, "active_slots is greater than the limit")
        active = row["active"] if body.active is None else body.active
        if wanted not in (None, row["held"]) and rate == 0 and not row["active"] and not active:
            raise Problem(422, "active_slots of an inactive limit cannot be changed: enable it first")
        # Slots are taken of an active limit: of another, nothing is recorded.
        later = wanted is not None and row["active"] and not active
        changes = [body.limit, body.slot_decay_per_second, None if later else body.active, body.name]
        if any(change is not None for change in changes):
            await db.run(
                """select pglimits.update_limit(%s::text, "limit" => %s::int, slot_decay_per_second => %s::float8,
                                                active => %s::boolean, new_name => %s::text)""",
                [row["name"], *changes],
                by=caller.name,
            )
            known.forget()
        if wanted is not None:
            row = await find_by_name(db, body.name or row["name"])
            await set_active_slots(db, request.app.state.grants, row, wanted, caller.name)
        if later:
            await db.run("select pglimits.update_limit(%s, active => false)", [row["name"]], by=caller.name)
            known.forget()
        return Response(status_code=204)

    @routes.delete("/{id_or_name}", status_code=204, response_class=Response)
    async def delete(request: Request, id_or_name: IdOrName, caller: Writes) -> Response:
        """Delete a limit, with its leases."""
        db: Database = request.app.state.db
        row = await find(db, id_or_name)
        await db.run("select pglimits.delete_limit(%s)", [row["name"]], by=caller.name)
        known.forget()
        return Response(status_code=204)


def _invalid(error: RequestValidationError) -> Response:
    """As Prefect's server answers a body of the wrong form. What was sent is not repeated."""
    found = [{"type": one["type"], "loc": list(one["loc"]), "msg": one["msg"]} for one in error.errors()[:20]]
    body = {"exception_message": "Invalid request received.", "exception_detail": found}
    return _json(422, body)


def _failed(error: Problem | PglimitsError) -> Response:
    """An error in both forms that Prefect's clients look for, with our code."""
    meant = problem(error)
    body: dict[str, Any] = {
        "detail": meant.detail,
        "exception_message": meant.detail,
        "exception_detail": [{"type": "value_error", "loc": ["body"], "msg": meant.detail}],
    }
    if meant.code is not None:
        body["code"] = meant.code
    headers = dict(meant.headers)
    if meant.retry_after is not None:
        headers["Retry-After"] = whole_seconds(meant.retry_after)
    return _json(meant.status, body, headers)


def _json(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body, default=str), status, headers, "application/json")
