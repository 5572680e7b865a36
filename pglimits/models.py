"""What the limiter returns: the rows of the views, as dataclasses with the views' columns."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

__all__ = ["Holder", "Limit", "Peek", "Swept", "Waiter"]


@dataclass(frozen=True, slots=True)
class Limit:
    """A named budget of slots, and how much of it is used right now, over all its keys."""

    name: str
    limit: int
    active: bool
    slot_decay_per_second: float
    held: int
    level: float
    waiting: int
    max_waiters: int | None
    description: str | None
    created_at: datetime
    updated_at: datetime


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
    """A request that is queued, or asleep until its turn on a rate limit."""

    lease_id: UUID
    name: str
    key: str
    slots: int
    holder: Any
    priority: int
    position: int
    waiting_since: datetime


@dataclass(frozen=True, slots=True)
class Peek:
    """What a request would be answered now: ``granted``, ``queued``, ``refused`` or ``unlimited``.

    ``wait`` and ``retry_after`` are seconds: how long until its turn on a rate limit, and when time alone would let
    it in (None: only a release can tell). ``position`` is the place that it would have in the queue.
    """

    status: str
    wait: float | None
    retry_after: float | None
    position: int | None


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed: slots under ended leases, dead waiters and passed turns, idle keys."""

    leases: int
    waiters: int
    keys: int
