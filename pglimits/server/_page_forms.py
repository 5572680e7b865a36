"""What all forms of the page have in common: whom an action hits, the question before it, the answer after it.

A form is a page of its own; ``page.js`` shows it in a dialog. What was done is answered with a redirect, or, to
``page.js``, with an event.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import RedirectResponse, Response

from ..errors import InvalidArgument, LimiterUnavailable, LimitNotFound, PglimitsError, ReadOnlyServer
from ._auth import Caller
from ._page_live import hub_of
from ._page_render import is_part, render

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
_NOW = "select pglimits._now() as now"

LABELS = {
    "name": "name",
    "new_name": "name",
    "limit": "limit",
    "slot_decay_per_second": "slot decay per second",
    "max_waiters": "longest line",
    "description": "description",
}


_FASTEST = 10**9
"""Slots that may decay a second."""


class WrongField(InvalidArgument):
    """What was typed into a field of a form cannot be."""

    def __init__(self, field: str, must: str) -> None:
        super().__init__(f"{LABELS[field]} {must}")
        self.field = field


@dataclass(frozen=True, slots=True)
class Hit:
    """Whom an action hits: the first of them, and how many there are."""

    holders: list[dict[str, Any]]
    holding: int
    waiters: list[dict[str, Any]]
    waiting: int


async def the_limit(request: Request, name: str) -> dict[str, Any]:
    found: dict[str, Any] | None = await request.app.state.db.row(_LIMIT, {"name": name})
    if found is None:
        raise LimitNotFound(f"there is no limit named {name!r}")
    return found


async def whom(request: Request, name: str, key: str | None = None) -> Hit:
    db = request.app.state.db
    only = {"name": name, "key": key, "most": _SHOWN}
    holders = await db.rows(_HIT_HOLDERS, only)
    waiters = await db.rows(_HIT_WAITERS, only)
    return Hit(holders, holders[0]["found"] if holders else 0, waiters, waiters[0]["found"] if waiters else 0)


async def do(request: Request, sql: str, **params: Any) -> dict[str, Any] | None:
    """Change something on behalf of whoever asks, so that events can say so."""
    caller: Caller = request.state.caller
    found: dict[str, Any] | None = await request.app.state.db.row(sql, params, by=caller.name, writes=True)
    await hub_of(request).forget()
    return found


def done(request: Request, said: str, to: str, moved: bool = False) -> Response:
    """It was done. ``moved``: the page that was shown is gone, or has another URL."""
    if not is_part(request):
        return RedirectResponse(to, 303)
    told = {"done": {"said": said, "to": to if moved else ""}}
    return Response(status_code=204, headers={"HX-Trigger": json.dumps(told), "Cache-Control": "no-store"})


def show(request: Request, template: str, error: PglimitsError | None = None, **context: Any) -> Response:
    """A form. error: why it comes back."""
    status = 200 if error is None else 503 if isinstance(error, LimiterUnavailable) else 422
    said, wrong = explain(error)
    shown = {"section": "limits", "error": said, "wrong": wrong, **context}
    return render(request, template, status, **shown)


def explain(error: PglimitsError | None) -> tuple[str, str]:
    """An error in the words of the form, and the field that is wrong, if it is one."""
    if error is None:
        return "", ""
    if isinstance(error, LimiterUnavailable) and not isinstance(error, ReadOnlyServer):
        return "The database cannot be reached. When the page is live, look whether that was done, and try again.", ""
    said = str(error)
    field = error.field if isinstance(error, WrongField) else said.split(" ")[0]
    if field not in LABELS:
        return said, ""
    return LABELS[field] + said.removeprefix(field) if said.startswith(field) else said, field


async def confirm(request: Request, **context: Any) -> Response:
    """A form that says what is about to happen, and to whom."""
    shown = {"hit": None, "lease": None, "danger": False, "hidden": {}, "changes": [], "error": None, **context}
    moment = (await request.app.state.db.rows(_NOW))[0]["now"]
    return show(request, "confirm.html", **{"now": moment, **shown})


def whole(form: dict[str, str], field: str, *, empty: int | None = None, least: int = 0) -> int | None:
    """A whole number out of a form; an empty field means ``empty``."""
    text = form.get(field, "").strip().replace(",", "").replace("_", "")
    if not text:
        return empty
    try:
        value = int(text)
    except ValueError:
        raise WrongField(field, f"must be a whole number, not {text!r}") from None
    if not least <= value < 2**31:
        raise WrongField(field, f"must be from {least} to {2**31 - 1:,}, not {value:,}")
    return value


def rate(form: dict[str, str]) -> float:
    text = form.get("slot_decay_per_second", "").strip()
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise WrongField("slot_decay_per_second", f"must be a number, not {text!r}")
    if not 0 <= value <= _FASTEST:
        raise WrongField("slot_decay_per_second", f"must be from 0 to {_FASTEST:,}, not {value:,.10g}")
    return value


async def fields(request: Request) -> dict[str, str]:
    async with request.form(max_files=0, max_fields=30) as form:
        # A browser sends line ends as CR LF; names and descriptions may have no control character.
        found = {name: str(value).replace("\r\n", "\n") for name, value in form.items()}
    if any("\0" in value for value in found.values()):
        raise InvalidArgument("no text may have a character of code 0")
    return found
