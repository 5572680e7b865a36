"""What can be done on the page: each action is a form that says who it hits, and does nothing before that was confirmed.

A form is a page of its own; ``page.js`` shows it in a dialog. What was done is answered with a redirect, or, to
``page.js``, with an event.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from ..errors import InvalidArgument, LimitNotFound, PglimitsError
from ._auth import Caller, writing
from ._page_render import is_part, limit_url, render, url_of
from ._page_text import count, exact, number, who

_SHOWN = 8
"""How many of those whom an action hits are named."""

_LIMIT = "select * from pglimits.limits where name = %(name)s"
_HIT_HOLDERS = """
select h.*, count(*) over () as found from pglimits.holders h
where h.name = %(name)s and (%(key)s::text is null or h.key = %(key)s) order by h.acquired_at limit %(most)s
"""
_HIT_WAITERS = """
select w.*, count(*) over () as found from pglimits.waiters w
where w.name = %(name)s and (%(key)s::text is null or w.key = %(key)s) order by w."position" limit %(most)s
"""
_LEASE = """
select true as holds, h.name, h.key, h.slots, h.holder, h.acquired_at as since, h.expires_at, h.fence
from pglimits.holders h where h.lease_id = %(lease)s
union all
select false, w.name, w.key, w.slots, w.holder, w.waiting_since, null, null
from pglimits.waiters w where w.lease_id = %(lease)s
"""
_CREATE = """
select pglimits.create_limit(%(name)s, %(limit)s, %(slot_decay_per_second)s, %(active)s, %(max_waiters)s, %(description)s)
"""
_UPDATE = """
select pglimits.update_limit(
  %(name)s, "limit" => %(limit)s, slot_decay_per_second => %(slot_decay_per_second)s, active => %(active)s,
  max_waiters => %(max_waiters)s, description => %(description)s, new_name => %(new_name)s)
"""
_DELETE = "select pglimits.delete_limit(%(name)s)"
_RESET = "select pglimits.reset(%(name)s, %(key)s) as ended"
_RELEASE = "select pglimits.force_release(%(lease)s) as released"
_NOW = "select pglimits._now() as now"

FIELDS = ("new_name", "limit", "slot_decay_per_second", "max_waiters", "description")
LABELS = {
    "new_name": "name",
    "limit": "limit",
    "slot_decay_per_second": "slot decay per second",
    "max_waiters": "longest line",
    "description": "description",
}


@dataclass(frozen=True, slots=True)
class Hit:
    """Whom an action hits: the first of them, and how many there are."""

    holders: list[dict[str, Any]]
    holding: int
    waiters: list[dict[str, Any]]
    waiting: int


async def _limit(request: Request, name: str) -> dict[str, Any]:
    found: dict[str, Any] | None = await request.app.state.db.row(_LIMIT, {"name": name})
    if found is None:
        raise LimitNotFound(f"there is no limit named {name!r}")
    return found


async def _hit(request: Request, name: str, key: str | None = None) -> Hit:
    db = request.app.state.db
    only = {"name": name, "key": key, "most": _SHOWN}
    holders = await db.rows(_HIT_HOLDERS, only)
    waiters = await db.rows(_HIT_WAITERS, only)
    return Hit(
        holders, holders[0]["found"] if holders else 0, waiters, waiters[0]["found"] if waiters else 0
    )


async def _do(request: Request, sql: str, **params: Any) -> dict[str, Any] | None:
    """Change something on behalf of whoever asks, so that events can say so."""
    caller: Caller = request.state.caller
    found: dict[str, Any] | None = await request.app.state.db.row(sql, params, by=caller.name, writes=True)
    state = request.app.state
    state.page.forget()
    return found


def _done(request: Request, said: str, to: str, moved: bool = False) -> Response:
    """It was done. ``moved``: the page that was shown is gone, or has another URL."""
    if not is_part(request):
        return RedirectResponse(to, 303)
    told = {"done": {"said": said, "to": to if moved else ""}}
    return Response(status_code=204, headers={"HX-Trigger": json.dumps(told), "Cache-Control": "no-store"})


def _form(request: Request, template: str, error: PglimitsError | None = None, **context: Any) -> Response:
    status = 422 if error is not None else 200
    said = str(error) if error is not None else ""
    shown = {"section": "limits", "error": said, "labels": LABELS, **context}
    return render(request, template, status, layout="dialog.html" if is_part(request) else "layout.html", **shown)
