"""Routes of /v1 that look: keys, holders, waiters, history, events."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from .._words import EventKind
from . import _v1_models as models
from ._live import EVENT
from ._v1_limits import Most, Name, NameFilter, Reader, Skip, database, paged, the_limit

_ID = Annotated[int | None, Query(ge=0, le=2**63 - 1)]

_KEYS = """
    select k.name, k.key, k.held, k.level, k.waiting, k.fence from pglimits.keys k where k.name = %(name)s
"""
_HOLDERS = """
    select h.lease_id, h.name, h.key, h.slots, h.holder, h.fence, h.priority, h.acquired_at, h.expires_at
    from pglimits.holders h
    where h.name = coalesce(%(name)s::text, h.name) and h.key = coalesce(%(key)s::text, h.key)
"""
_WAITERS = """
    select w.lease_id, w.name, w.key, w.slots, w.holder, w.priority, w."position", w.waiting_since
    from pglimits.waiters w
    where w.name = coalesce(%(name)s::text, w.name) and w.key = coalesce(%(key)s::text, w.key)
"""
_WHY = """
    select y.lease_id, y.key, y."position", y.blocked_by, y.reason, y.earliest, w.slots, w.holder, w.priority,
           w.waiting_since, y.nth
    from pglimits.why_waiting(%(name)s)
         with ordinality as y(lease_id, key, "position", blocked_by, reason, earliest, nth)
    left join pglimits.waiters w on w.lease_id = y.lease_id
"""
_HISTORY = """
    select h.at, h.covered_seconds, h."limit", h.held, h.level, h.waiting, h.grants, h.granted_slots, h.releases,
           h.expired_leases, h.force_released_leases, h.waited_seconds, h.waited_p50, h.waited_p95
    from pglimits.history(%s, %s::float8, %s::int) h order by h.at
"""


def add_to(routes: APIRouter) -> None:
    """Add these routes."""

    @routes.get("/limits/{name}/keys", tags=["views"], response_model=models.Keys)
    async def keys(request: Request, _: Reader, name: Name, limit: Most = 100, offset: Skip = 0) -> dict[str, Any]:
        """The keys of a limit that were used, the busiest first."""
        db = database(request)
        await the_limit(db, name)
        return await paged(db, "keys", _KEYS, "waiting desc, held desc, level desc, key", limit, offset, name=name)

    @routes.get("/holders", tags=["views"], response_model=models.Holders)
    async def holders(
        request: Request,
        _: Reader,
        name: NameFilter = None,
        key: NameFilter = None,
        limit: Most = 100,
        offset: Skip = 0,
    ) -> dict[str, Any]:
        """The live leases, of one limit or of all: a row for each limit that one is on."""
        order = "name, key, acquired_at, lease_id"
        return await paged(database(request), "holders", _HOLDERS, order, limit, offset, name=name, key=key)

    @routes.get("/waiters", tags=["views"], response_model=models.Waiters)
    async def waiters(
        request: Request,
        _: Reader,
        name: NameFilter = None,
        key: NameFilter = None,
        limit: Most = 100,
        offset: Skip = 0,
    ) -> dict[str, Any]:
        """Who waits, in order, for one limit or for all."""
        order = 'name, key, "position"'
        return await paged(database(request), "waiters", _WAITERS, order, limit, offset, name=name, key=key)

    @routes.get("/limits/{name}/waiters", tags=["views"], response_model=models.Waiting)
    async def why_waiting(
        request: Request, _: Reader, name: Name, limit: Most = 100, offset: Skip = 0
    ) -> dict[str, Any]:
        """Who waits for a limit, and why. Those who stand in the line of another limit, and need this one too, last."""
        return await paged(database(request), "waiters", _WHY, "nth", limit, offset, name=name)

    @routes.get("/limits/{name}/history", tags=["views"], response_model=models.History)
    async def history(
        request: Request,
        _: Reader,
        name: Name,
        seconds: Annotated[float, Query(ge=1, le=366 * 86400, allow_inf_nan=False)] = 3600,
        points: Annotated[int, Query(ge=1, le=1000)] = 60,
    ) -> dict[str, Any]:
        """How much of a limit was used: a row for each step that has samples, oldest first."""
        db = database(request)
        await the_limit(db, name)
        return {"name": name, "steps": await db.rows(_HISTORY, [name, seconds, points])}

    @routes.get("/events", tags=["views"], response_model=models.Events)
    async def events(
        request: Request,
        _: Reader,
        name: NameFilter = None,
        kind: Annotated[list[EventKind] | None, Query()] = None,
        after: Annotated[_ID, Query(description="Those that are newer, oldest first.")] = None,
        before: Annotated[_ID, Query(description="Those that are older, newest first.")] = None,
        limit: Most = 100,
    ) -> dict[str, Any]:
        """What happened."""
        rows = await database(request).rows(
            f"{EVENT} where (%(name)s::text is null or e.name = %(name)s)"
            " and (%(kinds)s::text[] is null or e.kind = any (%(kinds)s))"
            " and (%(after)s::bigint is null or e.event_id > %(after)s)"
            " and (%(before)s::bigint is null or e.event_id < %(before)s)"
            f" order by e.event_id {'desc' if after is None else 'asc'} limit %(limit)s",
            {"name": name, "kinds": kind, "after": after, "before": before, "limit": limit},
        )
        return {"events": rows, "next": rows[-1]["event_id"] if len(rows) == limit else None}
