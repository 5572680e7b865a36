"""Routes of /v1 that take and give back slots."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from .. import _ratelimit_fields as fields
from .._disconnect import disconnected, until_gone
from .._problem_details import whole_seconds
from ..errors import AcquireTimeout, LeaseLost
from . import _v1_models as models
from ._auth import Caller
from ._grants import Answer, Grants
from ._problems import problem
from ._settings import Settings
from ._v1_limits import Reader, Writer, database

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": models.Granted, "description": "Go now."},
    202: {"model": models.Granted, "description": "Queued: ask again within retry_after, by the same lease_id."},
    429: {"description": "No slot is free, or none came free in time."},
}


def grants(request: Request) -> Grants:
    found = request.app.state.grants
    assert isinstance(found, Grants)
    return found


def add_to(routes: APIRouter, settings: Settings) -> None:
    """Add these routes."""

    async def ask(
        request: Request, caller: Caller, body: models.RateRequest, duration: float | None, clamp: bool = False
    ) -> Response:
        parts = body.parts
        names, keys = [part.name for part in parts], [part.key for part in parts]
        hold = min(body.wait, settings.longest_wait)
        holder = body.holder
        if holder is None:
            holder = {"address": request.client.host if request.client else None}
            if caller.name is not None:
                holder["token"] = caller.name

        def give_back(lost: Answer) -> None:
            if lost.lease_id is not None and body.lease_id is None:
                grants(request).leave_later(lost.lease_id)

        asking = grants(request).acquire(
            names,
            [part.slots for part in parts],
            keys,
            for_rate=duration is None,
            timeout=body.timeout,
            hold=hold,
            lease_duration=duration or 1.0,
            priority=body.priority,
            holder=holder,
            lease_id=body.lease_id,
            strict=body.strict,
            clamp=clamp,
        )

        async def answering() -> tuple[Answer, list[fields.Budget]]:
            answer = await asking
            try:
                return answer, await request.app.state.budgets.of(names, keys)
            except (Exception, asyncio.CancelledError):  # the client goes in this moment
                give_back(answer)
                raise

        def lose(lost: tuple[Answer, list[fields.Budget]]) -> None:
            give_back(lost[0])

        answer, budgets = await (until_gone(answering(), disconnected(request.receive), lose) if hold else answering())
        return _response(answer, parts, budgets)

    @routes.post("/acquire", tags=["slots"], responses=_ANSWERS)
    async def acquire(request: Request, caller: Writer, body: models.AcquireRequest) -> Response:
        """Take slots until they are released or the lease ends.

        While it is queued, the request is held for ``wait`` seconds. If its connection ends before, it gives up its
        place. A place lives for 10 seconds after the answer ``queued``, or until it is asked for again.
        """
        return await ask(request, caller, body, body.lease_duration, body.clamp)

    @routes.post("/rate_limit", tags=["slots"], responses=_ANSWERS)
    async def rate_limit(request: Request, caller: Writer, body: models.RateRequest) -> Response:
        """Take slots that come back by decay only. Granted means: go now."""
        return await ask(request, caller, body, None)

    @routes.post("/peek", tags=["slots"], response_model=models.Peek)
    async def peek(request: Request, _: Reader, body: models.Peeked) -> dict[str, Any]:
        """What a request would be answered now, without making it."""
        parts = body.parts
        row = await database(request).row(
            'select p.status, p.retry_after, p."position" from pglimits.peek_all(%s::text[], %s::int[], %s::text[], 0,'
            " %s::int, %s::boolean, %s::boolean) p",
            [
                [part.name for part in parts],
                [part.slots for part in parts],
                [part.key for part in parts],
                body.priority,
                body.strict,
                body.for_rate,
            ],
        )
        assert row is not None
        return row

    @routes.post("/leases/{lease_id}/renew", tags=["slots"], response_model=models.RenewedLease)
    async def renew(request: Request, _: Writer, lease_id: UUID, body: models.Renewal | None = None) -> dict[str, Any]:
        """Move the end of a lease to so many seconds from now, never nearer. 410: it has ended."""
        renewed = await grants(request).renew(lease_id, None if body is None else body.lease_duration)
        if not renewed.live:
            raise LeaseLost(f"the lease {lease_id} has ended")
        return {"lease_id": lease_id, "expires_at": renewed.expires_at}

    @routes.post("/leases/{lease_id}/settle", tags=["slots"], response_model=models.Settled)
    async def settle(request: Request, _: Writer, lease_id: UUID, body: models.Settlement) -> dict[str, bool]:
        """Tell how many slots of rate limits a lease has really used: their levels get them instead of what it took.

        Before it is released, as often as you like: the last numbers count.
        """
        return {"settled": await grants(request).settle(lease_id, body.used)}

    @routes.delete("/leases/{lease_id}", tags=["slots"], response_model=models.Released)
    async def release(request: Request, _: Writer, lease_id: UUID) -> Response:
        """End a lease, or leave the line."""
        released = await grants(request).release(lease_id)
        return Response(b'{"released":true}' if released else b'{"released":false}', media_type="application/json")

    @routes.post("/leases/{lease_id}/force-release", tags=["slots"], response_model=models.Released)
    async def force_release(request: Request, caller: Writer, lease_id: UUID) -> dict[str, bool]:
        """End a lease, or a place in line, that is somebody else's. An event says who did it."""
        row = await database(request).row(
            "select pglimits.force_release(%s::uuid) as released", [lease_id], by=caller.name, writes=True
        )
        return {"released": row is not None and row["released"]}


def _response(answer: Answer, parts: list[models.Part], budgets: list[fields.Budget]) -> Response:
    """An answer of the database as one of HTTP."""
    if answer.status == "refused":
        full = fields.full([(part.name, part.key, part.slots) for part in parts], budgets)
        names = [budget.name for budget in full] or [part.name for part in parts]
        error = AcquireTimeout(f"no slot of {', '.join(map(repr, dict.fromkeys(names)))} is free")
        error.retry_after = answer.retry_after
        refused = problem(error)
        refused.more["violated-policies"] = list(dict.fromkeys(budget.policy for budget in full))
        refused.headers.update(fields.fields(budgets, answer.retry_after))
        return refused.response()
    headers = fields.fields(budgets)
    body = {
        "status": answer.status,
        "lease_id": answer.lease_id,
        "fence": answer.fence,
        "fences": answer.fences,
        "expires_at": answer.expires_at,
        "retry_after": answer.retry_after,
        "position": answer.position,
    }
    if answer.status == "queued":
        headers["Retry-After"] = whole_seconds(answer.retry_after or 3)
    return Response(to_json(body), 202 if answer.status == "queued" else 200, headers, "application/json")
