"""The live page: the list of limits, a limit, events, the login. ``_page_actions.py`` has what can be done there.

Every view has a URL of its own. When ``page.js`` hears of news, it asks for the same URL again, gets the part that
changes, and morphs what is shown into it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException

from .._words import EVENT_KINDS, STATES
from ..errors import LimiterUnavailable, PglimitsError, ReadOnlyServer
from . import _page_actions
from ._auth import local_path, reading
from ._page_data import SORTS, Query, pick
from ._page_limit import CHARTS, SPANS, history, view
from ._page_live import hub_of, news
from ._page_render import in_dialog, is_part, limit_url, render, root_of, static, url_of
from ._problems import Problem, problem
from ._settings import Settings

_HEADINGS = {403: "You may not do that", 404: "There is nothing here"}
_FOR_PROGRAMS = ("/v1/", "/api/")
_EVENTS = 50
_SHARED = 0.5
"""Seconds for which all pages that show the same share one look at it."""
_HISTORY_SHARED = 10.0
_COLUMNS = (
    ("name", "Name", "", "By name"),
    ("", "State", "", "One word of state, and why"),
    ("held", "Held", "held", "Slots under live leases, of the limit; of a rate limit its level, if that is higher"),
    ("level", "Level", "num", "Slots that a rate limit has used and that have not decayed yet"),
    ("waiting", "Waiting", "num", "Requests in line"),
    ("oldest", "Oldest wait", "num", "How long the one that came first has waited"),
    ("rate", "Rate", "num", "Slots granted a second, lately; for a rate limit, of how many"),
    ("", "Last hour", "hour", "Slots held in the last hour; of a rate limit its level"),
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
                if any("\0" in text for text in (*request.path_params.values(), *request.query_params.values())):
                    raise Problem(404, "nothing here has a name with such a character")
                return await handle(request)
            except (Problem, PglimitsError, HTTPException, RequestValidationError) as error:
                return failed(request, error)

        return handled


def failed(request: Request, error: Exception) -> Response:
    """A page that says what went wrong."""
    said = problem(error)
    if said.status == 401:
        return RedirectResponse(url_of(request, "/login"), 303)
    is_down = isinstance(error, LimiterUnavailable) and not isinstance(error, ReadOnlyServer)
    down = down_of(request) if is_down else None
    heading, text = "" if down else _HEADINGS.get(said.status, "That did not work"), said.detail
    if down and in_dialog(request):
        heading = down.text
        text = "It is not known what this would do. Try again when the page is live."
        if request.method == "POST":
            text = "It is not known whether that was done. Look again when the page is live."
    shown = {"down": down, "heading": heading, "text": text, "stream": _stream(request)}
    return render(request, "message.html", said.status, **shown)


async def nothing_here(request: Request, error: Exception) -> Response:
    """Where there is nothing: a page for whoever looks with a browser, and problem details for programs."""
    path = request.scope["path"].removeprefix(root_of(request))
    looks = "text/html" in request.headers.get("accept", "") and request.method in ("GET", "HEAD")
    if not looks or f"{path}/".startswith(_FOR_PROGRAMS):
        return problem(error).response()
    return failed(request, Problem(404, "No page has this address."))


@dataclass(frozen=True, slots=True)
class Down:
    """That the database is gone, or does not answer in time."""

    text: str
    since: datetime
    now: datetime


def down_of(request: Request) -> Down:
    now = datetime.now(UTC)
    gone_since, silent_since = request.app.state.db.down_since, request.app.state.live.down_since
    text = "The database cannot be reached" if gone_since else "The database has not answered in time"
    return Down(text, gone_since or silent_since or now, now)


def _number(text: str | None, most: int = 2**62) -> int | None:
    """A number out of a URL, if it is one."""
    return min(int(text), most) if text and text.isascii() and text.isdigit() and len(text) < 20 else None


def _stream(request: Request, name: str | None = None) -> str:
    return url_of(request, "/news", name=name)


def _after(request: Request) -> float:
    """An answer to ``page.js``, which asks because of news, was begun after the last change that was told."""
    return hub_of(request).live.changed_at if is_part(request) else -math.inf


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
    hub = hub_of(request)
    overview = hub.overview
    down = None
    sparklines: dict[str, list[float | None]] = {}
    try:
        picture = await overview.now()
        page = pick(picture, query)
        sparklines = await hub.sparklines(request.app.state.db, page.rows)
    except LimiterUnavailable:
        picture, down = overview.last, down_of(request)
        page = pick(picture, query)

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
        stale=down is not None and picture.now is not None,
        now=picture.now or datetime.now(UTC),
    )


async def limit(request: Request, name: str) -> Response:
    """The page of one limit."""
    given = request.query_params
    span = given.get("span", "")
    span = span if span in SPANS else "hour"
    key = given.get("key")
    pages = {part: _number(given.get(part), 10**9) or 1 for part in ("holders", "waiters", "keys")}
    hub = hub_of(request)
    db = request.app.state.db

    async def look() -> dict[str, Any] | None:
        with contextlib.suppress(LimiterUnavailable):
            await hub.overview.now()  # how fast it grants
        found = await view(db, name, key, pages, hub.overview.rate(name))
        if found is not None:
            found["events"] = await db.rows(_FIND_EVENTS, {"name": name, "kind": None, "before": None, "most": 8})
        return found

    down = None
    context: dict[str, Any] | None = None
    asked = ("limit", name, key, *pages.values())
    try:
        context = await hub.shared.get(asked, _SHARED, look, _after(request))
    except LimiterUnavailable:
        down, context = down_of(request), hub.shared.last(asked)

    def here(**changed: Any) -> str:
        now: dict[str, Any] = {"span": span, "key": key, **pages, **changed}
        shown = {part: now[part] for part in pages if now[part] > 1}
        if now["span"] != "hour":
            shown["span"] = now["span"]
        link = limit_url(request, name, **shown)
        if now["key"] is None:
            return link
        return link + ("&" if "?" in link else "?") + urlencode({"key": now["key"]}, quote_via=quote)

    return render(
        request,
        "limit.html",
        200 if context is not None else 503 if down else 404,
        section="limits",
        stream=_stream(request, name),
        name=name,
        key=key,
        span=span,
        spans=tuple(SPANS),
        charts=CHARTS,
        here=here,
        holders_link=lambda number: here(holders=number),
        waiters_link=lambda number: here(waiters=number),
        keys_link=lambda number: here(keys=number),
        down=down,
        stale=down is not None and context is not None,
        **(context or {"row": None}),
    )


async def limit_by_query(request: Request) -> Response:
    """The same, for names that no path can have."""
    name = request.query_params.get("name")
    return await limit(request, name) if name else RedirectResponse(url_of(request, "/"), 303)


async def events(request: Request) -> Response:
    """What has happened."""
    given = request.query_params
    name, kind = given.get("name", "")[:200], given.get("kind", "")
    kind = kind if kind in EVENT_KINDS else ""
    before = _number(given.get("before"))
    hub = hub_of(request)
    asked = ("events", name, kind, before)
    wanted = {"name": name or None, "kind": kind or None, "before": before, "most": _EVENTS + 1}
    down = None
    found: list[dict[str, Any]] | None
    try:
        found = await hub.shared.get(
            asked, _SHARED, lambda: request.app.state.db.rows(_FIND_EVENTS, wanted), _after(request)
        )
    except LimiterUnavailable:
        down, found = down_of(request), hub.shared.last(asked)
    stale = down is not None and found is not None
    found = found or []

    def here(**changed: Any) -> str:
        return url_of(request, "/events", **{"name": name, "kind": kind, "before": before, **changed})

    return render(
        request,
        "events.html",
        503 if down and not stale else 200,
        section="events",
        stream=_stream(request),
        name=name,
        kind=kind,
        kinds=EVENT_KINDS,
        before=before,
        events=found[:_EVENTS],
        older=found[_EVENTS - 1]["event_id"] if len(found) > _EVENTS else None,
        here=here,
        down=down,
        stale=stale,
    )


async def figures(request: Request, name: str, span: str = "hour") -> Response:
    """What the charts of a limit show."""
    span = span if span in SPANS else "hour"
    try:
        found = await hub_of(request).shared.get(
            ("history", name, span), _HISTORY_SHARED, lambda: history(request.app.state.db, name, span)
        )
    except PglimitsError as error:
        return problem(error).response()
    return JSONResponse(found, headers={"Cache-Control": "no-store"})


async def tell(request: Request, name: str | None = None) -> AsyncIterator[ServerSentEvent]:
    """Tells a page when to look again: server-sent events that say no more than that."""
    async for word, mark in news(request.app.state.live, name, request.headers.get("last-event-id", "")):
        yield ServerSentEvent(event=word, raw_data=word, id=mark)


async def login_form(request: Request, next: str = "/", failed: str = "") -> Response:
    """Sends the token to the route of the login."""
    if not request.app.state.auth.required:
        return RedirectResponse(url_of(request, "/"), 303)
    error = "That token is not known here." if failed else ""
    return render(request, "login.html", next=local_path(next), error=error)


async def static_file(request: Request, name: str) -> Response:
    return static(request, name)


def router(settings: Settings) -> APIRouter:
    """The page: everything that people look at."""
    routes = APIRouter(route_class=PageRoute, include_in_schema=False)
    may_read = [Depends(reading)]

    def add(path: str, show: Callable[..., Any], dependencies: Sequence[Any] = may_read, **more: Any) -> None:
        routes.add_api_route(path, show, methods=["GET"], dependencies=dependencies, **more)

    add("/static/{name:path}", static_file, ())
    add("/login", login_form, ())
    add("/", limits)
    add("/limits", limit_by_query)
    add("/limits/{name}", limit)
    add("/events", events)
    add("/history", figures)
    add("/news", tell, response_class=EventSourceResponse)
    _page_actions.add_routes(routes)
    return routes
