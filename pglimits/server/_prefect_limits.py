"""The limits, as Prefect's routes need them: found by id or name, and slots that are taken without a lease."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any
from uuid import UUID, uuid4

from ..errors import SlotsExceedLimit
from ._database import Database
from ._grants import Answer, Grants
from ._prefect_models import LONGEST_LEASE, is_text, limit_id_of
from ._problems import Problem

WITHOUT_LEASE = {"prefect": "without lease"}
"""What the holder of slots says that were taken without a lease. They end when they are given back by number."""
_FIRST = 1_000_000
"""The highest priority."""
_REST_WAITS = 60.0
"""Seconds for which the rest of a lease stands in line, before everybody else, where more is held than is allowed."""
_REMEMBERED_FOR = 5.0
_REMEMBERED = 10_000

_LIMIT = """
    select c.limit_id, c.name, c."limit", c.held, c.level, c.active, c.slot_decay_per_second, c.created_at, c.updated_at
    from pglimits.counters c
"""


class Limits:
    """Which id and how many slots limits have. What is known is kept for some seconds: clients do nothing by it."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, int, int]] = {}

    def forget(self) -> None:
        """One was changed."""
        self._known.clear()

    async def known(self, db: Database, names: list[str], *, surely: bool = False) -> list[tuple[int, str, int]]:
        """(limit_id, name, limit) of those that there are. surely: as of now."""
        now = time.monotonic()
        found: dict[str, tuple[float, int, int]] = {}
        if not surely:
            found = {name: kept for name in names if (kept := self._known.get(name)) is not None and kept[0] > now}
        if asked := [name for name in names if name not in found]:
            rows = await db.rows(
                'select c.limit_id, c.name, c."limit" from pglimits.counters c where c.name = any (%s)', [asked]
            )
            fresh = {row["name"]: (now + _REMEMBERED_FOR, row["limit_id"], row["limit"]) for row in rows}
            if len(self._known) + len(fresh) > _REMEMBERED:
                self._known.clear()
            self._known.update(fresh)
            found.update(fresh)
        return [(found[name][1], name, found[name][2]) for name in names if name in found]


async def find(db: Database, id_or_name: str) -> dict[str, Any]:
    """The row of a limit.

    Raises:
        Problem: there is no such limit.
    """
    limit_id = None
    with contextlib.suppress(ValueError):
        limit_id = limit_id_of(UUID(id_or_name))
    if limit_id is not None:
        row = await db.row(f"{_LIMIT} where c.limit_id = %s", [limit_id])
        if row is not None:
            return row
    return await find_by_name(db, id_or_name)


async def find_by_name(db: Database, name: str) -> dict[str, Any]:
    """The same, where it is no id: a name may look like one."""
    row = await db.row(f"{_LIMIT} where c.name = %s", [name]) if is_text(name) else None
    if row is None:
        raise Problem(404, "Concurrency Limit not found")
    return row


async def some(db: Database, limit: int, offset: int) -> list[dict[str, Any]]:
    """So many limits in the order of their names."""
    return await db.rows(f"{_LIMIT} order by c.name limit %s offset %s", [limit, offset])


async def set_active_slots(db: Database, grants: Grants, row: dict[str, Any], wanted: int, by: str | None) -> None:
    """Have so many slots taken: what is missing is taken without a lease, what is too many of such is given back.

    The slots of leases stay. Of a rate limit, it is the level.
    """
    if row["slot_decay_per_second"] > 0:
        # Whole slots, so that the level, rounded up as it is shown, is what is wanted.
        await db.run(
            """select pglimits.adjust(l.name, %s::int - least(ceil(l.level), 2147483647)::int)
               from pglimits.limits l where l.name = %s""",
            [wanted, row["name"]],
            by=by,
        )
    elif wanted < row["held"]:
        await give_back(db, grants, [row["name"]], row["held"] - wanted, by)
    elif wanted > row["limit"]:
        raise SlotsExceedLimit("active_slots is greater than the limit")
    elif wanted > row["held"]:
        answer = await grants.acquire(
            [row["name"]],
            [wanted - row["held"]],
            lease_duration=LONGEST_LEASE,
            priority=_FIRST,
            holder=WITHOUT_LEASE,
        )
        if answer.status == "refused":
            raise Problem(503, "somebody has taken these slots meanwhile", retry_after=1)
        if answer.status == "unlimited":
            raise Problem(503, "somebody has disabled the limit meanwhile", retry_after=1)


async def give_back(db: Database, grants: Grants, names: list[str], slots: int, by: str | None = None) -> None:
    """End what was taken without a lease, the newest first, until so many slots of each limit are free again.

    Of a lease that has more slots than that, the rest is taken anew: it goes to stand before everybody else in line,
    and is granted as the lease ends.
    """
    left = dict.fromkeys(names, slots)
    ended: set[UUID] = set()
    while True:
        rows = await db.rows(
            """
            select h.lease_id, h.name, h.slots from pglimits.holders h
            where h.lease_id in (select w.lease_id from pglimits.holders w
                                 where w.name = any (%s) and w.key = '' and w.holder @> '{"prefect": "without lease"}')
            order by h.acquired_at desc, h.lease_id
            """,
            [[name for name, count in left.items() if count > 0]],
        )
        leases: dict[UUID, dict[str, int]] = {}
        for row in rows:
            if row["lease_id"] in ended:
                continue
            leases.setdefault(row["lease_id"], {})[row["name"]] = row["slots"]
        lease_id = _choose(leases, left)
        if lease_id is None:
            return
        held = leases[lease_id]
        rest = {name: more for name, count in held.items() if (more := count - left.get(name, 0)) > 0}
        ended.add(lease_id)  # whatever the view says next: each is tried once
        if await _end(db, grants, lease_id, rest, by):  # else somebody else has ended it meanwhile
            for name, count in held.items():
                left[name] = max(left.get(name, 0) - count, 0)


def _choose(leases: dict[UUID, dict[str, int]], left: dict[str, int]) -> UUID | None:
    """Which lease is to end: one that is just what is given back, else the newest."""
    wanted = {name: count for name, count in left.items() if count > 0}
    return next((lease_id for lease_id, held in leases.items() if held == wanted), next(iter(leases), None))


async def _end(db: Database, grants: Grants, lease_id: UUID, rest: dict[str, int], by: str | None) -> bool:
    """End a lease, but for the rest. Whether it was live."""
    anew = {name: uuid4() for name in rest}

    async def take(name: str, hold: float) -> Answer:
        return await grants.acquire(
            [name],
            [rest[name]],
            timeout=_REST_WAITS,
            hold=hold,
            lease_duration=LONGEST_LEASE,
            priority=_FIRST,
            holder=WITHOUT_LEASE,
            lease_id=anew[name],
        )

    try:
        for name in rest:
            await take(name, 0)
        ended = await db.row("select pglimits.release(%s) as live", [lease_id], by=by, writes=True)
        live = ended is not None and bool(ended["live"])
        if not live:
            for taken in anew.values():
                await grants.leave(taken)
    except BaseException:  # what was taken, or stands in line, would be nobody's
        for taken in anew.values():
            grants.leave_later(taken)
        raise
    # From here on, the rest is what is left of it. What one limit refuses, the others keep.
    answers = await asyncio.gather(*(take(name, _REST_WAITS) for name in rest if live))
    if any(answer.status in ("queued", "refused") for answer in answers):
        for taken in (anew[name] for name, answer in zip(rest, answers, strict=True) if answer.status == "queued"):
            grants.leave_later(taken)
        raise Problem(409, "more was given back than was asked for: a limit is lower than what is held of it")
    return live
