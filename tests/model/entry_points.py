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
CHANNEL = "pglimits_model"
KINDS = {
    "InvalidArgument": "PL001", "LimitNotFound": "PL002", "LimitExists": "PL003", "SlotsExceedLimit": "PL004",
    "NoSlotDecay": "PL005", "QueueFull": "PL006",
}  # fmt: skip

Reply: TypeAlias = dict[str, Any]
Way: TypeAlias = Callable[[Session, Sequence[Request]], list[Reply]]


def moment(value: datetime | None) -> int | None:
    return None if value is None else (value - START) // timedelta(microseconds=1)


def micros(value: timedelta | None) -> int | None:
    return None if value is None else value // timedelta(microseconds=1)


def interval(value: int | None) -> timedelta | None:
    return None if value is None else timedelta(microseconds=value)


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
    for name in ("retry_after", "wait"):
        if name in reply:
            reply[name] = micros(reply[name])
    if "fence" in reply:
        reply["fences"] = [reply.pop("fence")]
    return reply


def _arguments(request: Request, several: bool, channel: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {
        "slots": list(request.slots) if several else request.slots[0],
        "wait": interval(request.wait),
        "strict": request.strict,
        "lease_id": request.lease_id,
    }
    found["keys" if several else "key"] = list(request.keys) if several else request.keys[0]
    if channel:
        found["channel"] = CHANNEL
    if not request.for_rate:
        found |= {
            "lease_duration": interval(request.duration), "priority": request.priority, "holder": request.holder,
        }  # fmt: skip
    return found


def one_by_one(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire and rate_limit on one limit, or on several."""

    def call(request: Request, several: bool) -> Reply:
        names = list(request.names) if several else request.names[0]
        function = s.rate_limit if request.for_rate else s.acquire
        return _read(function(names, **_arguments(request, several)))

    return [attempt(lambda: call(request, len(request.names) > 1)) for request in requests]


def as_arrays(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire and rate_limit on several limits, which may be one."""

    def call(request: Request) -> Reply:
        function = s.rate_limit if request.for_rate else s.acquire
        return _read(function(list(request.names), **_arguments(request, True)))

    return [attempt(lambda: call(request)) for request in requests]


def many(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire_many."""

    def asked(request: Request) -> dict[str, Any]:
        texts = {"lease_duration": request.duration} | ({} if request.wait is None else {"wait": request.wait})
        found = _arguments(request, True) | {name: f"{value / SECOND:f} seconds" for name, value in texts.items()}
        found |= {"names": list(request.names), "lease_id": str(request.lease_id), "for_rate": request.for_rate}
        return found

    rows = s.all("select * from pglimits.acquire_many(%s::jsonb)", json.dumps([asked(each) for each in requests]))
    assert [row.ordinal for row in rows] == list(range(1, len(requests) + 1))
    replies = [_read(row) for row in rows]
    for reply in replies:
        if reply["status"] == "error":
            reply["code"] = KINDS[reply["error"]]
    return replies


def alike(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire_alike: requests on one limit that differ in nothing but ids and holders."""
    first = requests[0]

    def call() -> list[Any]:
        found: list[Any] = s.value(
            "select pglimits.acquire_alike("
            "%s, %s::uuid[], %s, %s, %s::interval, %s::interval, %s, %s::jsonb, %s, %s, %s)",
            first.names[0], [each.lease_id for each in requests], first.slots[0], first.keys[0],
            interval(first.duration), interval(first.wait), first.priority,
            json.dumps([each.holder for each in requests]), first.strict, CHANNEL, first.for_rate,
        )  # fmt: skip
        return found

    try:
        runs = call()
    except psycopg.Error as error:
        return [{"status": "error", "code": error.diag.sqlstate}] * len(requests)
    replies: list[Reply] = []
    for run in runs:
        count, status = run[:2]
        told: list[Any] = [*run[2:], *[None] * (9 - len(run))]
        fence, ends, waits, retry_after, _, kind, _ = told
        for nth in range(count):
            reply: Reply = {"status": status, "retry_after": _micros(retry_after)}
            if kind is not None:
                reply["code"] = KINDS[kind]
            if status == "granted" and first.for_rate:
                reply["wait"] = _micros(waits[nth])
            elif status == "granted":
                reply["fences"] = [None if fence is None else fence + nth]
                reply["expires_at"] = _micros(ends - START.timestamp())
            replies.append(reply)
    assert len(replies) == len(requests)
    return replies


def _micros(value: float | None) -> int | None:
    return None if value is None else round(value * SECOND)


def _call(s: Session, procedure: str, request: Request) -> Reply:
    return _read(
        s.one(
            f"call pglimits.{procedure}(%s, %s::int, %s, %s::interval, %s::interval, %s::int, %s::jsonb, %s::uuid, %s)",
            request.names[0], request.slots[0], request.keys[0], interval(request.duration), interval(request.wait),
            request.priority, json.dumps(request.holder), request.lease_id, request.strict,
        )
    )  # fmt: skip


def hot(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire_hot."""
    return [attempt(lambda: _call(s, "acquire_hot", request)) for request in requests]


def wait_in_sql(s: Session, requests: Sequence[Request]) -> list[Reply]:
    """acquire_wait, where there is nothing to wait for."""

    def call(request: Request) -> Reply:
        reply = _call(s, "acquire_wait", request)
        if reply["status"] != "granted":
            del reply["expires_at"]
        return reply

    return [attempt(lambda: call(request)) for request in requests]


def ways(requests: Sequence[Request]) -> list[Way]:
    """By which of them these requests can be made."""
    found: list[Way] = [many]
    first = requests[0]
    kinds = {
        (r.names, r.slots, r.keys, r.wait, r.duration, r.priority, r.strict, r.for_rate) for r in requests
    }  # fmt: skip
    if len(first.names) == 1 and len(kinds) == 1:
        found.append(alike)
    if len(requests) == 1:
        found += [one_by_one, as_arrays]
        if len(first.names) == 1 and not first.for_rate:
            found.append(hot)
            if first.wait == 0:
                found.append(wait_in_sql)
    return found


def peek(s: Session, request: Request) -> Reply:
    return attempt(
        lambda: _read(
            s.peek(
                list(request.names), slots=list(request.slots), keys=list(request.keys), wait=interval(request.wait),
                priority=request.priority, strict=request.strict, for_rate=request.for_rate,
            )
        )
    )  # fmt: skip


def release(s: Session, lease_ids: Sequence[UUID], way: int) -> set[UUID]:
    """The ids that were live."""
    if len(lease_ids) == 1 and way % 5 < 3:
        query = (
            "select pglimits.release(%s::uuid)", "call pglimits.release_hot(%s::uuid)",
            "select pglimits.release(%s::text)",
        )[way % 5]  # fmt: skip
        return set(lease_ids) if s.value(query, lease_ids[0]) else set()
    if way % 2:
        return set(lease_ids) - set(s.value("select pglimits.release_many(%s)", list(lease_ids)))
    rows = s.all("select * from pglimits.release(%s::uuid[])", list(lease_ids))
    return {row.lease_id for row in rows if row.released}


def renew(s: Session, lease_ids: Sequence[UUID], duration: int | None, way: int) -> dict[UUID, bool]:
    if len(lease_ids) == 1 and way % 3 < 2:
        query = f"select pglimits.renew(%s::{('uuid', 'text')[way % 3]}, %s::interval)"
        return {lease_ids[0]: s.value(query, lease_ids[0], interval(duration))}
    rows = s.all("select * from pglimits.renew(%s::uuid[], %s::interval)", list(lease_ids), interval(duration))
    return {row.lease_id: row.renewed for row in rows}
