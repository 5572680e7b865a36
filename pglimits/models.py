"""What the limiter returns: the rows of the views, as dataclasses with the views' columns."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

__all__ = ["Counters", "Event", "Holder", "Key", "Limit", "Peek", "Reason", "Step", "Swept", "Usage", "Waiter"]


@dataclass(frozen=True, slots=True)
class Limit:
    """A named budget of slots, and how much of it is used right now, over all its keys."""

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
    """How much of a limit one of its keys uses right now. No grant of this key had a higher fence."""

    name: str
    key: str
    held: int
    level: float
    waiting: int
    fence: int


@dataclass(frozen=True, slots=True)
class Holder:
    """A live lease on one limit."""

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
    """A request that stands in line."""

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
    """What a limit has done since it was created, over all its keys; and who uses it right now.

    ``held_slot_seconds``: slots times the seconds that they were held. ``waited_seconds``: of all that were granted.
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
    """A limit and how it is used, as of ``now``; ``of``: how many limits there are that were asked for.

    ``keys``: each of them has the whole limit. ``oldest_wait``: seconds.
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

    ``kind``: ``created``, ``updated`` (``old`` and ``new`` have what changed), ``deleted``, ``reset``, ``expired``,
    ``lost`` or ``force_released``. ``by``: who did it: application, user, address, pid, and whom it was done ``for``.
    ``held_seconds``: for how long a lease was held.
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
    """A step of a limit's history, which ends at ``at``; its samples cover ``covered_seconds``.

    ``held`` is the mean; limit, level and waiting are those at the end. ``waited_p50`` and ``waited_p95``: half, and
    95 of 100, of those that were granted had waited for so many seconds at most; None where nobody was granted.
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
    """Why a waiter waits: in the line of which limit, in words, and when its turn can come at the earliest.

    ``earliest`` is None where only a release can tell. ``key`` and ``position`` are those of that line.
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

    ``retry_after``: in how many seconds time alone would let it in (None: only a release can tell). ``position`` is
    the place that it would have in the queue.
    """

    status: str
    retry_after: float | None
    position: int | None


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed: slots under ended leases, dead waiters, idle keys."""

    leases: int
    waiters: int
    keys: int
