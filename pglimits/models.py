"""What the limiter returns: the rows of the views, as dataclasses with the views' columns."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

__all__ = ["Holder", "Key", "Limit", "Peek", "Swept", "Waiter"]


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
