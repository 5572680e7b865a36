"""What the page of one limit shows: who holds it, who waits and why, its keys, its history."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from ._database import Database
from ._page_data import make_row

SPANS = {"hour": (3600, 120), "day": (86400, 144), "week": (7 * 86400, 168)}
"""Seconds and points of the charts."""
CHARTS = (
    ("held", "Held against the limit"),
    ("waiting", "Waiting"),
    ("granted", "Grants and expiries a second"),
    ("wait", "Wait of those who were granted"),
)
_COVERS_AT_LEAST = 10.0
"""Seconds over which a rate is taken at least: of one grant in the first moment of a limit, nobody wants to know how
many that would be a second."""
_PART = 25
"""Rows of a table."""

_HOLDERS = """
select h.*, count(*) over () as found from pglimits.holders h
where h.name = %(name)s and (%(key)s::text is null or h.key = %(key)s)
order by h.acquired_at, h.lease_id limit %(most)s offset %(skip)s
"""
_WAITERS = """
select w.*, count(*) over () as found from pglimits.waiters w
where w.name = %(name)s and (%(key)s::text is null or w.key = %(key)s)
order by w."position", w.waiting_since, w.lease_id limit %(most)s offset %(skip)s
"""
_WHY = "select lease_id, key, blocked_by, reason, earliest from pglimits.why_waiting(%(name)s)"
_ELSEWHERE = """
select w.* from pglimits.waiters w
where w.lease_id = any (%(leases)s::uuid[]) and w.name <> %(name)s order by w.waiting_since limit %(most)s
"""
_KEYS = """
select k.*, count(*) over () as found, sum(k.held) over () as all_held, sum(k.level) over () as all_level
from pglimits.keys k where k.name = %(name)s
order by k.waiting desc, k.held desc, k.level desc, k.key limit %(most)s offset %(skip)s
"""
_HISTORY = "select * from pglimits.history(%(name)s, %(seconds)s, %(points)s)"
_ROW = """
select c.*, pglimits._now() as now from pglimits.counters c where c.name = %(name)s
"""


@dataclass(slots=True)
class Part:
    """One page of a table."""

    rows: list[dict[str, Any]]
    found: int
    page: int
    pages: int


async def _part(db: Database, sql: str, page: int, **params: Any) -> Part:
    """That page; where there are not so many, the last."""
    found = await db.rows(sql, {**params, "most": _PART, "skip": (page - 1) * _PART})
    if not found and page > 1:
        first = await db.rows(sql, {**params, "most": 1, "skip": 0})
        last = max(math.ceil(first[0]["found"] / _PART), 1) if first else 1
        return await _part(db, sql, last, **params) if last < page else Part([], 0, 1, 1)
    total = found[0]["found"] if found else 0
    return Part(found, total, page, max(math.ceil(total / _PART), 1))


async def view(
    db: Database, name: str, key: str | None, pages: dict[str, int], rate: float | None
) -> dict[str, Any] | None:
    """The limit, its holders, the line, and keys; None if there is no such limit. ``key``: only of that key."""
    found = await db.row(_ROW, {"name": name})
    if found is None:
        return None
    moment = found["now"]
    row = make_row(found, moment, rate)
    only = {"name": row.name, "key": key}
    holders = await _part(db, _HOLDERS, pages["holders"], **only)
    waiters = await _part(db, _WAITERS, pages["waiters"], **only)
    elsewhere = await _explain(db, name, waiters.rows)
    keys = await _part(db, _KEYS, pages["keys"], name=row.name)
    for each in keys.rows:
        whole = each["all_level"] if row.is_rate_limit and not each["all_held"] else each["all_held"]
        part = each["level"] if row.is_rate_limit and not each["all_held"] else each["held"]
        each["share"] = 100 * float(part) / float(whole) if whole else 0.0
    keyed = keys.found > 1 or any(each["key"] for each in (*keys.rows, *holders.rows, *waiters.rows))
    return {
        "now": moment,
        "row": row,
        "holders": holders,
        "waiters": waiters,
        "elsewhere": elsewhere if key is None else [],
        "keys": keys,
        "keyed": keyed,
    }


async def _explain(db: Database, name: str, waiters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Says of each why it waits. Returns those who need this limit too, and stand in the line of another."""
    why = {each["lease_id"]: each for each in await db.rows(_WHY, {"name": name})}
    elsewhere: list[dict[str, Any]] = []
    if others := [lease for lease, each in why.items() if each["blocked_by"] != name]:
        elsewhere = await db.rows(_ELSEWHERE, {"name": name, "leases": others, "most": _PART})
    for each in (*waiters, *elsewhere):
        known = why.get(each["lease_id"], {})
        each["earliest"] = known.get("earliest")
        each["why"] = _why(known.get("reason") or "", known.get("blocked_by"), name)
    return elsewhere


def _why(reason: str, blocked_by: str | None, here: str) -> tuple[str, str | None, str]:
    """A reason for the page of a limit: what comes before the name of another limit, that name, and the rest. The limit
    whose page it is needs no name."""
    before, named, after = reason.partition(f"'{blocked_by}'")
    if not named:
        return reason, None, ""
    if blocked_by == here:
        return f"{before.removesuffix('limit ')}this limit{after}", None, ""
    return before, blocked_by, after


async def history(db: Database, name: str, span: str) -> dict[str, Any]:
    """What the charts draw: a list for each line, beside a list of moments."""
    seconds, points = SPANS.get(span, SPANS["hour"])
    found = await db.rows(_HISTORY, {"name": name, "seconds": float(seconds), "points": points})

    def rate(row: dict[str, Any], counter: str) -> float | None:
        covered: float = row["covered_seconds"]
        counted: int | None = row[counter]
        return round(counted / max(covered, _COVERS_AT_LEAST), 4) if covered and counted is not None else None

    step = seconds / points
    rows: list[dict[str, Any] | None] = []
    moments: list[float] = []
    for row in found:
        at = row["at"].timestamp()
        if moments and at - moments[-1] > 1.5 * max(step, row["covered_seconds"]):
            moments.append(at - row["covered_seconds"])  # nothing is known in between: the line has a gap
            rows.append(None)
        moments.append(at)
        rows.append(row)
    end = moments[-1] if moments else time.time()

    def line(part: str) -> list[Any]:
        return [row and row[part] for row in rows]

    return {
        "span": span,
        "from": end - seconds,
        "to": end,
        "at": moments,
        **{part: line(part) for part in ("limit", "held", "level", "waiting")},
        "grants": [row and rate(row, "granted_slots") for row in rows],
        "expiries": [row and rate(row, "expired_leases") for row in rows],
        "p50": line("waited_p50"),
        "p95": line("waited_p95"),
    }
