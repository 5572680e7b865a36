"""Increment and decrement, as Prefect's clients know them, with and without a lease.

Who comes for the first time is answered at once. Who comes again with its place in line is held for a few seconds, so
that a release or its moment wakes it at once; see ``_prefect_places``.
"""

from __future__ import annotations

import json
import math
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from .._disconnect import ClientGone, disconnected, until_gone
from ..errors import InvalidArgument, LimitLocked, NoSlotDecay, QueueFull, SlotsExceedLimit
from ._auth import writing
from ._database import Database
from ._grants import Answer, Grants
from ._prefect_gone import Gone
from ._prefect_limits import WITHOUT_LEASE, Limits, give_back
from ._prefect_models import (
    LONGEST_LEASE,
    Decrement,
    Increment,
    IncrementWithLease,
    Locked,
    MinimalLimit,
    OfLease,
    Renew,
    WithLease,
    as_minimal,
    id_of_nothing,
    is_of_nothing,
)
from ._prefect_places import Places, digest_of, keeps_cookies
from ._problems import Problem

HOLD = 5.0
"""Seconds for which a request is held that stands in line."""
_MOMENT = 0.1
"""A first request for a rate whose moment is no further away waits for it: it need not come again."""
_LONGEST_NAP = 8.0
"""Seconds after which a client is asked to come again at the latest: its place lives for 10."""
_COMES_AGAIN = 1.0
"""Seconds after which a client comes again where only a release can tell, and it may not keep cookies."""

_LOCKED: dict[int | str, dict[str, Any]] = {
    423: {"model": Locked, "description": "No slot is free. Ask again after Retry-After."}
}


def add(routes: APIRouter, places: Places, limits: Limits) -> None:
    """Add the routes to those of the limits."""
    gone = Gone()

    @routes.post("/increment-with-lease", response_model=WithLease, dependencies=[Depends(writing)], responses=_LOCKED)
    async def increment_with_lease(request: Request, body: IncrementWithLease) -> Response:
        """Take slots under a lease."""
        return await _increment(request, body, places, limits, gone)

    @routes.post("/decrement-with-lease", status_code=204, response_class=Response, dependencies=[Depends(writing)])
    async def decrement_with_lease(request: Request, body: OfLease) -> Response:
        """End a lease. Doing it twice is harmless."""
        places.named(body.lease_id)
        if not is_of_nothing(body.lease_id):
            await request.app.state.grants.release(body.lease_id)
        return Response(status_code=204)

    @routes.post("/leases/{lease_id}/renew", status_code=204, response_class=Response, dependencies=[Depends(writing)])
    async def renew(request: Request, lease_id: UUID, body: Renew | None = None) -> Response:
        """Have a lease live for so many seconds from now."""
        places.named(lease_id)
        duration = (body or Renew()).lease_duration
        if not is_of_nothing(lease_id) and not (await request.app.state.grants.renew(lease_id, duration)).live:
            raise Problem(410, "Lease not found - it may have expired or been revoked")
        return Response(status_code=204)

    @routes.post("/increment", response_model=list[MinimalLimit], dependencies=[Depends(writing)], responses=_LOCKED)
    async def increment(request: Request, body: Increment) -> Response:
        """Take slots that end when they are given back by number; of rate limits, slots that come back by decay."""
        return await _increment(request, body, places, limits, gone)

    @routes.post("/decrement", response_model=list[MinimalLimit], dependencies=[Depends(writing)])
    async def decrement(request: Request, body: Decrement) -> Response:
        """Give slots back that were taken without a lease. What a rate limit has used comes back by decay only."""
        state = request.app.state
        known = await limits.known(state.db, body.names, surely=True)
        if known:
            await give_back(state.db, state.grants, [name for _, name, _ in known], body.slots)
        return _json(200, as_minimal(known))


async def _increment(request: Request, body: Increment, places: Places, limits: Limits, gone: Gone) -> Response:
    """Ask for slots, and answer as Prefect's server would."""
    state = request.app.state
    digest = digest_of(request, body.model_dump(mode="json"))
    known = await limits.known(state.db, body.names)  # before anything is granted: it may fail
    with places.serving(request, digest) as place:
        try:
            answer = await _ask(request, body, place)
        except ClientGone:
            if place is not None:
                places.give_up(place)
                gone.leave_line(state.db, place)
            raise
        except (LimitLocked, QueueFull):
            return _locked(request, places, digest, place, _COMES_AGAIN)
        except SlotsExceedLimit as error:
            raise Problem(422, "Slots requested is greater than the limit", code="PL004") from error
        except NoSlotDecay as error:
            raise await _no_decay(state.db, body.names) from error
        if answer.status in ("queued", "refused"):
            return _locked(request, places, digest, place, _comes_again(request, body, place, answer))
        if answer.status == "unlimited":
            known = await limits.known(state.db, body.names, surely=True)
        lease_id = id_of_nothing()
        if answer.status == "granted" and body.mode == "concurrency" and answer.lease_id is not None:
            lease_id = answer.lease_id
            if await request.is_disconnected():
                places.give_up(lease_id)
                state.grants.leave_later(lease_id)
                raise ClientGone
            if place is not None:
                places.hand_out(lease_id)
        found: Any = as_minimal(known)
        if isinstance(body, IncrementWithLease):
            found = {"lease_id": str(lease_id), "limits": found}
        response = _json(200, found)
        places.drop(request, response, digest)
        return response


async def _ask(request: Request, body: Increment, place: UUID | None) -> Answer:
    grants: Grants = request.app.state.grants
    options: dict[str, Any] = {
        "for_rate": body.mode == "rate_limit",
        "holder": _holder(request, body),
        "lease_duration": body.lease_duration if isinstance(body, IncrementWithLease) else LONGEST_LEASE,
    }
    if place is not None:
        asking = grants.acquire(body.names, [body.slots], timeout=None, hold=HOLD, lease_id=place, **options)
        try:
            return await until_gone(asking, disconnected(request.receive), lambda lost: _give_back(grants, lost))
        except InvalidArgument:
            pass  # that id is of something else: as without
    answer = await grants.acquire(body.names, [body.slots], **options)
    if (
        answer.status == "refused"
        and options["for_rate"]
        and answer.retry_after is not None
        and answer.retry_after <= _MOMENT
    ):
        asking = grants.acquire(body.names, [body.slots], timeout=_MOMENT, hold=_MOMENT, **options)
        answer = await until_gone(asking, disconnected(request.receive))
    return answer


def _give_back(grants: Grants, lost: Answer) -> None:
    """What this very request was granted just as its client went."""
    if lost.status == "granted" and lost.lease_id is not None:
        grants.leave_later(lost.lease_id)


def _holder(request: Request, body: Increment) -> dict[str, Any]:
    """What the views show of whoever has the slots."""
    program = "".join(char for char in request.headers.get("user-agent", "")[:200] if char.isprintable())
    holder: dict[str, Any] = {"program": program}
    if request.client is not None:
        holder["address"] = request.client.host
    if not isinstance(body, IncrementWithLease):
        holder |= WITHOUT_LEASE
    elif body.holder is not None:
        holder |= body.holder.model_dump(mode="json")
    return holder


def _comes_again(request: Request, body: Increment, place: UUID | None, answer: Answer) -> float:
    """When the client is to ask again."""
    if place is not None:
        # In line for a slot, it is held again at once: a release may come at any time. A rate has its moment.
        return min(answer.retry_after or 0, _LONGEST_NAP) if body.mode == "rate_limit" else 0
    if keeps_cookies(request):
        return 0  # to stand in line
    return _COMES_AGAIN if answer.retry_after is None else answer.retry_after


def _locked(request: Request, places: Places, digest: str, place: UUID | None, retry_after: float) -> Response:
    seconds = math.ceil(retry_after * 1000) / 1000  # never too early
    response = _json(423, {"detail": "Locked", "retry_after": seconds})
    response.headers["Retry-After"] = f"{seconds:.3f}".rstrip("0").rstrip(".")
    places.keep(request, response, digest, place, seconds)
    return response


async def _no_decay(db: Database, names: list[str]) -> Problem:
    """In Prefect's words."""
    rows = await db.rows(
        "select l.name from pglimits.limits l where l.name = any (%s) and l.active and l.slot_decay_per_second = 0",
        [names],
    )
    return Problem(
        422,
        "Only concurrency limits with slot decay can be used for rate limiting. The following limits do not have a "
        f"decay configured: {','.join(row['name'] for row in rows)!r}",
        code="PL005",
    )


def _json(status: int, body: Any) -> Response:
    return Response(json.dumps(body), status, media_type="application/json")
