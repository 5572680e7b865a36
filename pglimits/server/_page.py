"""The live page: the list of limits, a limit, events, the login. ``_page_actions.py`` has what can be done there.

Every view is a page of its own at a URL of its own. When ``page.js`` hears of news, it asks for the same URL again, gets
the part that changes, and morphs what is shown into it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ..errors import LimiterUnavailable, PglimitsError
from . import _page_actions
from ._auth import local_path, reading, set_cookie
from ._page_data import SORTS, STATES, Overview, Picture, Query, pick
from ._page_limit import CHARTS, SPANS, history, view
from ._page_render import limit_url, render, root_of, static, url_of
from ._problems import Problem, problem

KINDS = ("created", "updated", "deleted", "reset", "expired", "lost", "force_released")
_EVENTS = 50
_LOOKS_ANYWAY = 10.0
"""Seconds after which a page is told to look although no figure has changed: a lease may have been renewed."""
_BEATS = 5.0
"""Seconds between two signs of life of a stream."""
_COLUMNS = (
    ("name", "Name", "", "By name"),
    ("", "State", "", "One word of state, and why"),
    ("held", "Held", "held", "Slots under live leases, of the limit"),
    ("level", "Level", "num", "Slots that a rate limit has used and that have not decayed yet"),
    ("waiting", "Waiting", "num", "Requests in line"),
    ("oldest", "Oldest wait", "num", "How long the one that came first has waited"),
    ("rate", "Rate", "num", "Slots granted a second, lately; for a rate limit, of how many"),
    ("", "Last hour", "hour", "Slots held in the last hour"),
)
_FIND_EVENTS = """
select * from pglimits.events e
where (%(name)s::text is null or e.name = %(name)s) and (%(kind)s::text is null or e.kind = %(kind)s)
  and (%(before)s::bigint is null or e.event_id < %(before)s)
order by e.event_id desc limit %(most)s
"""


class PageRoute(APIRoute):
    """A route that answers people: its errors are pages, too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except (Problem, PglimitsError, HTTPException) as error:
                return failed(request, error)

        return handled


def failed(request: Request, error: Exception) -> Response:
    """A page that says what went wrong."""
    said = problem(error)
    if said.status == 401:
        return RedirectResponse(url_of(request, "/login"), 303)
    down = down_of(request) if isinstance(error, LimiterUnavailable) else None
    heading = "" if down else {403: "You may not do that", 404: "There is nothing here"}.get(said.status, "That did not work")
    return render(request, "message.html", said.status, down=down, heading=heading, text=said.detail, stream=_stream(request))


@dataclass(frozen=True, slots=True)
class Down:
    """That the database is gone."""

    since: datetime
    reason: str


def down_of(request: Request) -> Down:
    db = request.app.state.db
    return Down(db.down_since or datetime.now(UTC), db.why)


def overview_of(request: Request) -> Overview:
    state = request.app.state
    if not hasattr(state, "overview"):
        state.overview = Overview(state.db)
    found: Overview = state.overview
    return found


def _number(text: str | None, most: int = 2**62) -> int | None:
    """A number out of a URL, if it is one."""
    return min(int(text), most) if text and text.isascii() and text.isdigit() and len(text) < 20 else None


def _stream(request: Request, name: str | None = None) -> str:
    return url_of(request, "/news", name=name)


async def limits(request: Request) -> Response:
    """The list of limits."""
    given = request.query_params
    sort = given.get("sort", "")
    state = given.get("state", "")
    query = Query(
        given.get("q", "")[:200],
        state if state in STATES else "",
        sort if sort in SORTS else "busiest",
        given.get("reverse") == "1",
        _number(given.get("page"), 10**9) or 1,
    )
    overview = overview_of(request)
    down = None
    try:
        picture = await overview.now()
    except LimiterUnavailable:
        picture, down = overview.last, down_of(request)
    page = pick(picture, query)
    sparklines: dict[str, list[float | None]] = {}
    if down is None:
        sparklines = await overview.sparklines([row.name for row in page.rows])

    def here(**changed: Any) -> str:
        now = {
            "q": query.text,
            "state": query.state,
            "sort": "" if query.sort == "busiest" else query.sort,
            "reverse": "1" if query.reverse else "",
            "page": page.page,
            **changed,
        }
        return url_of(request, "/", **{**now, "page": now["page"] if now["page"] != 1 else ""})

    return render(
        request,
        "limits.html",
        section="limits",
        stream=_stream(request),
        query=query,
        page=page,
        columns=_COLUMNS,
        sparklines=sparklines,
        here=here,
        page_link=lambda number: here(page=number),
        down=down,
        stale=down is not None and picture.version > 0,
        **({"now": picture.now} if picture.now is not None else {}),
    )


async def limit(request: Request, name: str) -> Response:
    """The page of one limit."""
    given = request.query_params
    span = given.get("span", "")
    key = given.get("key")
    pages = {part: _number(given.get(part), 10**9) or 1 for part in ("holders", "waiters", "keys")}
    db = request.app.state.db
    overview = overview_of(request)
    down = None
    picture: Picture
    context: dict[str, Any] = {}
    try:
        picture = await overview.now()
        row = picture.by_name.get(name)
        if row is not None:
            context = await view(db, row, key, pages)
            context["events"] = await db.rows(_FIND_EVENTS, {"name": name, "kind": None, "before": None, "most": 8})
    except LimiterUnavailable:
        row, down = None, down_of(request)

    def here(**changed: Any) -> str:
        now = {"span": span, "key": key, **{part: number if number > 1 else "" for part, number in pages.items()}, **changed}
        empty_key = now["key"] == ""  # a key of its own, and no absence
        link = limit_url(request, name, **{part: "" if value in (1, "hour") else value for part, value in now.items()})
        return link + (("&" if "?" in link else "?") + "key=" if empty_key else "")

    return render(
        request,
        "limit.html",
        200 if row is not None else 503 if down else 404,
        section="limits",
        stream=_stream(request, name),
        name=name,
        row=row,
        key=key,
        span=span if span in SPANS else "hour",
        spans=tuple(SPANS),
        charts=CHARTS,
        here=here,
        holders_link=lambda number: here(holders=number),
        waiters_link=lambda number: here(waiters=number),
        keys_link=lambda number: here(keys=number),
        down=down,
        **context,
    )


async def limit_by_query(request: Request) -> Response:
    """The same, for names that no path can have."""
    name = request.query_params.get("name")
    return await limit(request, name) if name else RedirectResponse(url_of(request, "/"), 303)


async def events(request: Request) -> Response:
    """What has happened."""
    given = request.query_params
    name, kind = given.get("name", "")[:200], given.get("kind", "")
    kind = kind if kind in KINDS else ""
    before = _number(given.get("before"))
    down = None
    found: list[dict[str, Any]] = []
    try:
        wanted = {"name": name or None, "kind": kind or None, "before": before, "most": _EVENTS + 1}
        found = await request.app.state.db.rows(_FIND_EVENTS, wanted)
    except LimiterUnavailable:
        down = down_of(request)

    def here(**changed: Any) -> str:
        return url_of(request, "/events", **{"name": name, "kind": kind, "before": before, **changed})

    return render(
        request,
        "events.html",
        503 if down else 200,
        section="events",
        stream=_stream(request),
        name=name,
        kind=kind,
        kinds=KINDS,
        before=before,
        events=found[:_EVENTS],
        older=found[_EVENTS - 1]["event_id"] if len(found) > _EVENTS else None,
        here=here,
        down=down,
    )


async def figures(request: Request, name: str, span: str = "hour") -> Response:
    """What the charts of a limit show."""
    try:
        found = await history(request.app.state.db, name, span)
    except PglimitsError as error:
        return problem(error).response()
    return JSONResponse(found, headers={"Cache-Control": "no-store"})


async def news(request: Request, name: str | None = None) -> Response:
    """Tells a page when to look again: server-sent events without any content."""
    return EventStream(_news(request, overview_of(request), name))


async def login_form(request: Request, next: str = "/") -> Response:
    if not request.app.state.auth.required:
        return RedirectResponse(url_of(request, "/"), 303)
    return render(request, "login.html", next=local_path(next), error="")


async def login(request: Request) -> Response:
    form = await request.form()
    wanted = local_path(str(form.get("next") or "/"))
    auth = request.app.state.auth
    token = auth.token(str(form.get("token") or ""))
    if token is None:
        return render(request, "login.html", 401, next=wanted, error="That token is not known here.")
    response = RedirectResponse(root_of(request) + wanted, 303)
    set_cookie(response, request, auth, auth.session(token))
    return response


async def logout(request: Request) -> Response:
    response = RedirectResponse(url_of(request, "/login"), 303)
    set_cookie(response, request, request.app.state.auth, "")
    return response
