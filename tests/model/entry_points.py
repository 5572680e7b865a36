"""The ways to ask the SQL functions for the same thing. Answers in whole microseconds, and only what each way tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

import psycopg
from limiter_model import SECOND, Request
from sqltest import Session

START = datetime(2025, 1, 1, tzinfo=UTC)

Reply: TypeAlias = dict[str, Any]
Way: TypeAlias = Callable[[Session, Sequence[Request]], list[Reply]]


def moment(value: datetime | None) -> int | None:
    return None if value is None else (value - START) // timedelta(microseconds=1)


def micros(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * SECOND)


def seconds(value: int | None) -> float | None:
    return None if value is None else value / SECOND


def attempt(call: Callable[[], Reply]) -> Reply:
    """What the call replies, or its error."""
    try:
        return call()
    except psycopg.Error as error:
        return {"status": "error", "code": error.diag.sqlstate}


def _read(row: Any) -> Reply:
    reply: Reply = row._asdict()
    if "expires_at" in reply:
        reply["expires_at"] = moment(reply["expires_at"])
    if "retry_after" in reply:
        reply["wait"] = micros(reply.pop("retry_after"))
    if "fence" in reply:
        reply["fences"] = [reply.pop("fence")]
    return reply


def _arguments(request: Request, several: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "slots": list(request.slots) if several else request.slots[0],
        "keys" if several else "key": list(request.keys) if several else request.keys[0],
        "timeout_seconds": seconds(request.timeout),
        "priority": request.priority,
        "holder": request.holder,
        "strict": request.strict,
        "lease_id": request.lease_id,
        "channel": request.channel,
    }
    if not request.for_rate:
        found |= {"lease_duration": seconds(request.duration), "clamp": request.clamp}
    return found


def by_itself(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire and rate_limit, or acquire_all and rate_limit_all."""

    def call(request: Request, several: bool) -> Reply:
        names = list(request.names) if several else request.names[0]
        function = s.rate_limit if request.for_rate else s.acquire
        return _read(function(names, **_arguments(request, several)))

    return [attempt(lambda: call(request, len(request.names) > 1)) for request in requests]


def as_arrays(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire_all and rate_limit_all, also of one limit."""

    def call(request: Request) -> Reply:
        function = s.rate_limit if request.for_rate else s.acquire
        return _read(function(list(request.names), **_arguments(request, True)))

    return [attempt(lambda: call(request)) for request in requests]


def batch(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """_acquire_batch: requests that differ in nothing but ids and holders."""
    first = requests[0]
    try:
        runs = s.all(
            "select * from pglimits._acquire_batch(%s::text[], %s::int[], %s::text[], %s, %s::float8, %s::float8, %s,"
            " %s::uuid[], %s::jsonb, true, %s, %s, clamp => %s)",
            list(first.names), list(first.slots), list(first.keys), first.for_rate, seconds(first.timeout),
            seconds(first.duration), first.priority, [each.lease_id for each in requests],
            json.dumps([each.holder for each in requests]), first.strict, first.channel,
            first.clamp,
        )  # fmt: skip
    except psycopg.Error as error:
        return [{"status": "error", "code": error.diag.sqlstate}] * len(requests)
    replies: list[Reply] = []
    for run in runs:
        assert run.first == len(replies) + 1
        for nth in range(run.last - run.first + 1):
            waits = run.seconds or [None]
            wait = waits[min(nth, len(waits) - 1)]
            reply: Reply = {"status": run.status, "wait": micros(wait)}
            if run.status == "full":
                reply = {"status": "error", "code": "PL006"}
            elif run.status == "granted":
                later = (wait or 0) - (waits[0] or 0)
                reply["expires_at"] = None if run.expires_at is None else (moment(run.expires_at) or 0) + micros(later)  # type: ignore[operator]
                reply["wait"] = micros(wait or 0)
                if not first.for_rate:
                    assert run.fences is not None
                    reply["fences"] = [fence + nth if len(first.names) == 1 else fence for fence in run.fences]
            replies.append(reply)
    assert len(replies) == len(requests)
    return replies


def waiting(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire_wait and rate_limit_wait, where there is nothing to wait for."""

    def call(request: Request) -> Reply:
        lasts, values = ("", []) if request.for_rate else ("%s::float8, ", [seconds(request.duration)])
        clamp = ", clamp => true" if request.clamp else ""
        reply = _read(
            s.one(
                f"call pglimits.{'rate_limit' if request.for_rate else 'acquire'}_wait("
                f"%s, %s::int, %s, %s::float8, {lasts}%s::int, %s::jsonb, %s::uuid, %s{clamp})",
                request.names[0], request.slots[0], request.keys[0], seconds(request.timeout), *values,
                request.priority, json.dumps(request.holder), request.lease_id, request.strict,
            )
        )  # fmt: skip
        if reply["status"] != "granted":
            reply.pop("expires_at", None)
        return reply

    return [attempt(lambda: call(request)) for request in requests]


def tells(way: Way) -> bool:
    """Whether its callers are told how long to sleep before they go."""
    return way is batch


def ways(requests: Sequence[Request]) -> list[Way]:
    """By which of them these requests can be made."""
    first = requests[0]
    if len(requests) > 1:
        return [batch]
    found: list[Way] = [batch, by_itself, as_arrays]
    if len(first.names) == 1 and first.timeout == 0 and first.channel is None:
        found.append(waiting)
    return found


def peek(s: Session, request: Request) -> Reply:
    return attempt(
        lambda: _read(
            s.peek(
                list(request.names), slots=list(request.slots), keys=list(request.keys),
                timeout_seconds=seconds(request.timeout), priority=request.priority, strict=request.strict,
                for_rate=request.for_rate,
            )
        )
    )  # fmt: skip


def release(s: Session, lease_ids: Sequence[UUID], way: int) -> tuple[set[UUID], bool]:
    """The ids that were live, and whether other lines were served with those of the wrapper."""
    if len(lease_ids) == 1 and way % 4 < 2:
        query = ("select pglimits.release(%s::uuid)", "call pglimits.release_wait(%s::uuid)")[way % 4]
        return (set(lease_ids) if s.value(query, lease_ids[0]) else set()), False
    if way % 2:
        return set(lease_ids) - set(s.value("select pglimits._release_batch(%s)", list(lease_ids))), True
    rows = s.all("select * from pglimits.release_all(%s::uuid[])", list(lease_ids))
    return {row.lease_id for row in rows if row.released}, False


def renew(s: Session, lease_ids: Sequence[UUID], duration: int | None, way: int) -> dict[UUID, bool]:
    if len(lease_ids) == 1 and way % 2:
        return {lease_ids[0]: s.renew(lease_ids[0], seconds(duration))}
    rows = s.all("select * from pglimits.renew_all(%s::uuid[], %s::float8)", list(lease_ids), seconds(duration))
    return {row.lease_id: row.renewed for row in rows}
