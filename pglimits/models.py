"""What the limiter returns: the rows of the views, as dataclasses with the views' columns."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

__all__ = ["Counters", "Event", "Holder", "Key", "Limit", "Peek", "Reason", "Step", "Swept", "Usage", "Waiter"]


@dataclass(frozen=True, slots=True)
class Limit:
    """A named budget of slots, and how much of it is used now, over all its keys.

    Attributes:
        limit: how many slots it has, for each key.
        held: slots under live leases.
        waiting: live requests in line.
        active: whether it is enforced.
        slot_decay_per_second: slots that come back each second; 0 for a concurrency limit.
        level: slots that a rate limit has used and that have not decayed yet.
        max_waiters: the longest line for each key; None: no bound.
        updated_at: when its definition was changed last.
    """

    name: str
    limit: int
    held: int
    waiting: int
    active: bool
    slot_decay_per_second: float
    level: float
    max_waiters: int | None
    description: str | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Key:
    """How much of a limit one of its keys uses now.

    Attributes:
        name: the limit.
        held: slots under live leases.
        level: slots that a rate limit has used and that have not decayed yet.
        waiting: live requests in line.
        fence: no grant of this key had a higher one.
    """

    name: str
    key: str
    held: int
    level: float
    waiting: int
    fence: int


@dataclass(frozen=True, slots=True)
class Holder:
    """A live lease on one limit. A lease on several limits is several of these, with the same ``lease_id``.

    Attributes:
        name: the limit.
        slots: how many it holds.
        holder: JSON that says who has it.
        fence: a number that grows with every grant of the limit and key.
        acquired_at: when it was granted.
        expires_at: when it ends unless it is renewed.
    """

    lease_id: UUID
    name: str
    key: str
    slots: int
    holder: Any
    fence: int
    priority: int
    acquired_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Waiter:
    """A request that stands in line.

    Attributes:
        name: the limit in whose line it stands.
        slots: how many it asks for.
        holder: JSON that says who waits.
        priority: higher goes first.
        position: its place in the line of the limit and key, from 1.
        waiting_since: when it arrived.
    """

    lease_id: UUID
    name: str
    key: str
    slots: int
    holder: Any
    priority: int
    position: int
    waiting_since: datetime


@dataclass(frozen=True, slots=True)
class Counters:
    """What was counted of a limit since it was created, over all its keys, and its use now.

    Attributes:
        grants: requests that were granted.
        granted_slots: slots that they got.
        releases: leases that were released.
        expired_leases: leases that ended without a release, counted when they are taken out.
        force_released_leases: leases that an administrator ended.
        held_slot_seconds: slots times the seconds that they were held, until now.
        waited_seconds: how long the granted requests had waited, together.
        leases: live now.
        keys: used and not swept since.
        oldest_waiting_since: when the oldest request in line arrived; None if none waits.
    """

    name: str
    limit_id: int
    grants: int
    granted_slots: int
    releases: int
    expired_leases: int
    force_released_leases: int
    held_slot_seconds: float
    waited_seconds: float
    leases: int
    keys: int
    oldest_waiting_since: datetime | None


@dataclass(frozen=True, slots=True)
class Usage:
    """A limit and how it is used. The fields of ``Limit`` and of ``Counters`` mean the same here.

    Attributes:
        keys: how many keys are in use; each of them has the whole limit.
        oldest_wait: for how many seconds the oldest request in line has waited; None if none waits.
        now: the moment of which all of this is, by the database's clock.
        of: how many limits match the question, on all pages.
    """

    name: str
    limit: int
    held: int
    waiting: int
    active: bool
    slot_decay_per_second: float
    level: float
    max_waiters: int | None
    description: str | None
    grants: int
    leases: int
    keys: int
    oldest_wait: float | None
    now: datetime
    of: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a limit or to a lease.

    Attributes:
        event_id: grows, but becomes visible with its transaction, so not always in order.
        at: when it happened.
        kind: ``created``, ``updated``, ``deleted``, ``reset``, ``expired``, ``lost`` or ``force_released``.
        name: the limit.
        slots: that the lease held.
        holder: who had the lease.
        held_seconds: for how long the lease was held.
        old: what was changed, as it was.
        new: what was changed, as it is since.
        by: who did it: application, user, address, pid, and whom it was done ``for``.
    """

    event_id: int
    at: datetime
    kind: str
    name: str
    key: str | None
    lease_id: UUID | None
    slots: int | None
    fence: int | None
    holder: Any
    held_seconds: float | None
    old: Any
    new: Any
    by: Any


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a limit's history.

    Attributes:
        at: its end.
        covered_seconds: how much of it the samples cover.
        limit, level, waiting: at its last sample.
        held: slots, on average.
        grants, granted_slots, releases, expired_leases, force_released_leases: counted within the step.
        waited_seconds: how long the granted requests had waited, together.
        waited_p50: half of the granted requests had waited for so many seconds at most; None if none was granted.
        waited_p95: 95 of 100 had waited for so many seconds at most.
    """

    at: datetime
    covered_seconds: float
    limit: int
    held: float
    level: float
    waiting: int
    grants: int
    granted_slots: int
    releases: int
    expired_leases: int
    force_released_leases: int
    waited_seconds: float
    waited_p50: float | None
    waited_p95: float | None


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a waiter waits.

    Attributes:
        blocked_by: the limit in whose line it stands, which may be another limit that it needs too.
        key: of that line.
        position: in that line, from 1.
        reason: a sentence.
        earliest: its turn does not come before; None where only a release can tell.
    """

    lease_id: UUID
    key: str
    position: int
    blocked_by: str
    reason: str
    earliest: datetime | None


@dataclass(frozen=True, slots=True)
class Peek:
    """What a request would be answered now: ``granted``, ``queued``, ``refused`` or ``unlimited``.

    ``retry_after``: in how many seconds time alone would let it in (None: only a release can). ``position`` is the
    place that it would have in line.
    """

    status: str
    retry_after: float | None
    position: int | None


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed. ``leases``: slots of ended leases. ``waiters``: dead ones. ``keys``: idle ones."""

    leases: int
    waiters: int
    keys: int
