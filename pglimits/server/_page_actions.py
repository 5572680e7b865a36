"""What can be done on the page. Each action says who it hits, and does nothing before that was confirmed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from .._words import count
from ..errors import InvalidArgument, LimiterUnavailable, LimitExists
from ._auth import writing
from ._page_forms import LABELS, WrongField, confirm, do, done, fields, rate, show, the_limit, whole, whom
from ._page_render import limit_url, render, url_of
from ._page_text import exact, is_spaced, number, quoted

_LEASE = """
select true as holds, h.name, h.key, h.slots, h.holder, h.acquired_at as since, h.expires_at, h.fence
from pglimits.holders h where h.lease_id = %(lease)s
union all
select false, w.name, w.key, w.slots, w.holder, w.waiting_since, null, null
from pglimits.waiters w where w.lease_id = %(lease)s
"""
_CREATE = """
select pglimits.create_limit(
  %(name)s, %(limit)s, %(slot_decay_per_second)s, %(active)s, %(max_waiters)s, %(description)s)
"""
_UPDATE = """
select pglimits.update_limit(
  %(name)s, "limit" => %(limit)s, slot_decay_per_second => %(slot_decay_per_second)s, active => %(active)s,
  max_waiters => %(max_waiters)s, description => %(description)s, new_name => %(new_name)s)
"""
_DELETE = "select pglimits.delete_limit(%(name)s)"
_RESET = "select pglimits.reset(%(name)s, %(key)s) as ended"
_RELEASE = "select pglimits.force_release(%(lease)s) as released"

FIELDS = ("new_name", "limit", "slot_decay_per_second", "max_waiters", "description")


async def create_form(request: Request) -> Response:
    return show(request, "create.html", given={"active": "1", "name": request.query_params.get("name", "")})


async def create(request: Request) -> Response:
    form = await fields(request)
    try:
        limit = whole(form, "limit")
        if limit is None:
            raise WrongField("limit", "is missing: how many slots?")
        name = form.get("name", "")
        if is_spaced(name) and form.get("spaced") != name:
            raise WrongField("name", f'"{name}" has spaces that are hard to see. If they are meant, create it again.')
        await do(
            request,
            _CREATE,
            name=name,
            limit=limit,
            slot_decay_per_second=rate(form),
            active=form.get("active") == "1",
            max_waiters=whole(form, "max_waiters"),
            description=form.get("description") or None,
        )
    except (InvalidArgument, LimitExists, LimiterUnavailable) as error:
        return show(request, "create.html", error, given=form)
    return done(request, f"Created {quoted(name)}.", limit_url(request, name), moved=True)


def _as_typed(limit: dict[str, Any]) -> dict[str, str]:
    """The properties of a limit as a form shows them."""
    return {
        "new_name": limit["name"],
        "limit": str(limit["limit"]),
        "slot_decay_per_second": exact(limit["slot_decay_per_second"]),
        "max_waiters": "" if limit["max_waiters"] is None else str(limit["max_waiters"]),
        "description": limit["description"] or "",
    }


async def edit_form(request: Request, name: str) -> Response:
    typed = _as_typed(await the_limit(request, name))
    return show(request, "edit.html", name=name, given=typed, was=typed)


async def edit(request: Request, name: str) -> Response:
    """First shows what would change and who that hits, then changes it. What was left as it was is not written."""
    form = await fields(request)
    was = {field: form.get(f"was_{field}", "") for field in FIELDS}
    given = {field: form.get(field, was[field]) for field in FIELDS}
    changed = [field for field in FIELDS if given[field] != was[field]]
    try:
        limit = await the_limit(request, name)
        if not changed or form.get("back"):
            said = None if form.get("back") else InvalidArgument("nothing was changed")
            return show(request, "edit.html", said, name=name, given=given, was=was)
        new = _changes(given, changed)
        if form.get("confirmed") != "1":
            return await _review(request, limit, given, was, changed, new)
        await do(request, _UPDATE, **{"name": name, "active": None, **new})
    except (InvalidArgument, LimitExists, LimiterUnavailable) as error:
        return show(request, "edit.html", error, name=name, given=given, was=was)
    now_named = new["new_name"] or name
    return done(request, f"Changed {quoted(now_named)}.", limit_url(request, now_named), moved=now_named != name)


def _changes(given: dict[str, str], changed: list[str]) -> dict[str, Any]:
    """The arguments of update_limit: null for what stays."""
    new: dict[str, Any] = dict.fromkeys(FIELDS)
    if "limit" in changed:
        new["limit"] = whole(given, "limit")
        if new["limit"] is None:
            raise WrongField("limit", "is missing: how many slots?")
    if "slot_decay_per_second" in changed:
        new["slot_decay_per_second"] = rate(given)
    if "max_waiters" in changed:
        new["max_waiters"] = whole(given, "max_waiters", empty=-1)
    for field in ("new_name", "description"):
        if field in changed:
            new[field] = given[field]
    return new


async def _review(
    request: Request,
    limit: dict[str, Any],
    given: dict[str, str],
    was: dict[str, str],
    changed: list[str],
    new: dict[str, Any],
) -> Response:
    now_typed = _as_typed(limit)
    lines = [(LABELS[field], now_typed[field] or "none", given[field].strip() or "none") for field in changed]
    name = limit["name"]
    effects = []
    hit = await whom(request, name)
    fewer = new["limit"] is not None and new["limit"] < limit["limit"]
    if new["limit"] == 0:
        effects.append("A limit of 0 admits nobody. Those who hold slots keep them; whoever asks is refused.")
    elif fewer:
        over = f" {number(limit['held'])} are held now." if limit["held"] else ""
        effects.append(f"Those who hold slots keep them; nobody new gets in until it fits.{over}")
    elif new["limit"] is not None:
        effects.append("Those who wait are granted at once, as far as there is room.")
    if fewer and hit.waiting:
        effects.append("Those in line who want more slots than that get an error.")
    if new["slot_decay_per_second"] is not None:
        effects.append("The level so far is kept, and decays at the new rate.")
    if new["max_waiters"] is not None:
        effects.append("Those in line stay there. Whoever comes when the line is full is refused.")
    if new["new_name"] is not None:
        effects.append(
            "Everything is kept under the new name. Programs that ask for the old one are not limited any more."
        )
    hidden = {**{field: given[field] for field in FIELDS}, **{f"was_{field}": was[field] for field in FIELDS}}
    hits = changed != ["description"]
    return await confirm(
        request,
        title="Change this limit?",
        name=name,
        action=url_of(request, "/edit", name=name),
        effects=effects,
        changes=lines,
        hit=hit if hits else None,
        hidden={**hidden, "confirmed": "1"},
        button="Change",
        back=True,
    )


async def switch_form(request: Request, name: str, active: bool) -> Response:
    await the_limit(request, name)
    hit = await whom(request, name)
    if active:
        title, button = "Enforce this limit?", "Enable"
        effects = [
            "From now on, requests that find no room wait or are refused. Whoever went through meanwhile holds nothing."
        ]
    else:
        title, button = "Stop enforcing this limit?", "Disable"
        effects = [
            "Every request goes through until it is enabled again. Those in line go on at once.",
            "Holders keep their leases.",
        ]
    path = "/enable" if active else "/disable"
    return await confirm(
        request,
        title=title,
        name=name,
        action=url_of(request, path, name=name),
        effects=effects,
        hit=hit,
        button=button,
        danger=not active,
    )


async def switch(request: Request, name: str, active: bool) -> Response:
    await do(request, _UPDATE, **{**dict.fromkeys(FIELDS), "name": name, "active": active})
    return done(request, f"{'Enabled' if active else 'Disabled'} {quoted(name)}.", limit_url(request, name))


async def delete_form(request: Request, name: str) -> Response:
    await the_limit(request, name)
    return await confirm(
        request,
        title="Delete this limit?",
        name=name,
        action=url_of(request, "/delete", name=name),
        effects=[
            "Its leases and its line are gone at once. Nobody is stopped: holders work on, and those in line go on.",
            "Programs that ask for it are not limited any more, unless they are strict.",
        ],
        hit=await whom(request, name),
        button="Delete",
        danger=True,
    )


async def delete(request: Request, name: str) -> Response:
    await do(request, _DELETE, name=name)
    return done(request, f"Deleted {quoted(name)}.", url_of(request, "/"), moved=True)


async def reset_form(request: Request, name: str, key: str | None = None) -> Response:
    limit = await the_limit(request, name)
    effects = [
        "All its leases end, and the level is zero. Holders are not stopped: they find out when they next renew."
    ]
    effects.append("So more than the limit may be at work for a while. Those in line are granted at once.")
    return await confirm(
        request,
        title="Reset this limit?" if key is None else "Reset this key?",
        name=limit["name"],
        key=key,
        action=url_of(request, "/reset", name=name) + ("" if key is None else f"&{urlencode({'key': key})}"),
        effects=effects,
        hit=await whom(request, name, key),
        button="Reset",
        danger=True,
    )


async def reset(request: Request, name: str, key: str | None = None) -> Response:
    found = await do(request, _RESET, name=name, key=key)
    ended = found["ended"] if found is not None else 0
    return done(request, f"Reset {quoted(name)}: {count(ended, 'lease')} ended.", limit_url(request, name))


async def release_form(request: Request, lease: UUID, name: str = "") -> Response:
    """Of one lease, or of one place in line. The lease may be on several limits: all of them are named."""
    parts = await request.app.state.db.rows(_LEASE, {"lease": lease})
    to = limit_url(request, name) if name else url_of(request, "/")
    if not parts:
        return render(
            request,
            "message.html",
            404,
            section="limits",
            heading="It has ended already",
            text="That lease is not there any more.",
        )
    holds = parts[0]["holds"]
    effects = (
        ["Its slots go to whoever is next. The holder is not stopped: it finds out when it next renews."]
        if holds
        else ["It leaves the line, and is refused as if no slot had come free in time."]
    )
    return await confirm(
        request,
        title="Release this lease?" if holds else "Take this request out of the line?",
        name=name or parts[0]["name"],
        action=url_of(request, "/release", lease=lease, name=name),
        effects=effects,
        lease=parts,
        request_lease=lease,
        button="Release" if holds else "Remove",
        danger=True,
        to=to,
    )


async def release(request: Request, lease: UUID, name: str = "") -> Response:
    found = await do(request, _RELEASE, lease=lease)
    said = "Released." if found is not None and found["released"] else "It had ended already."
    return done(request, said, limit_url(request, name) if name else url_of(request, "/"))


def add_routes(routes: APIRouter) -> None:
    """All forms and what they do."""
    may_write = [Depends(writing)]

    def add(path: str, show: Callable[..., Any], act: Callable[..., Any]) -> None:
        routes.add_api_route(path, show, methods=["GET"], dependencies=may_write, include_in_schema=False)
        routes.add_api_route(path, act, methods=["POST"], dependencies=may_write, include_in_schema=False)

    async def enable_form(request: Request, name: str) -> Response:
        return await switch_form(request, name, True)

    async def enable(request: Request, name: str) -> Response:
        return await switch(request, name, True)

    async def disable_form(request: Request, name: str) -> Response:
        return await switch_form(request, name, False)

    async def disable(request: Request, name: str) -> Response:
        return await switch(request, name, False)

    add("/create", create_form, create)
    add("/edit", edit_form, edit)
    add("/enable", enable_form, enable)
    add("/disable", disable_form, disable)
    add("/delete", delete_form, delete)
    add("/reset", reset_form, reset)
    add("/release", release_form, release)
