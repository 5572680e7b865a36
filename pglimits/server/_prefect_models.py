"""What Prefect's clients send and are answered: bodies with their bounds, and ids that say what they mean."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_LISTED = 200
"""Limits that one answer lists at most; Prefect's server has the same bound."""
LONGEST_LEASE = 366 * 86400
MOST_SLOTS = 2**31 - 1

# A limit's id is a UUID of version 8: "pglimits" in its first 8 bytes, but for the digit of the version, and its
# limit_id in the last 60 bits. So every server gives a limit the same id, and finds the limit by it without a table.
_LIMIT_IDS = 0x70676C69_6D69_8473_8 << 60
_NOTHING_HELD = 0x70676C69_6D69_8475_8 << 60
"""The same for leases of which nothing is held in the database: their limits are inactive, or have only a level."""


def id_of_limit(limit_id: int) -> UUID:
    """The UUID of a limit."""
    return UUID(int=_LIMIT_IDS | limit_id)


def limit_id_of(given: UUID) -> int | None:
    """The limit that a UUID is of; None if it is of none."""
    return given.int ^ _LIMIT_IDS if given.int >> 60 == _LIMIT_IDS >> 60 else None


def id_of_nothing() -> UUID:
    """The id of a lease of which nothing is held."""
    return UUID(int=_NOTHING_HELD | secrets.randbits(60))


def is_of_nothing(lease_id: UUID) -> bool:
    """Whether nothing is held of that lease: it is live as long as its client likes."""
    return lease_id.int >> 60 == _NOTHING_HELD >> 60


def is_text(value: str) -> bool:
    """Whether the database can read it at all."""
    return "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)


def _text(value: str) -> str:
    if not is_text(value):
        raise ValueError("must not contain NUL or half of a surrogate pair")
    return value


def _distinct(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


Text = Annotated[str, AfterValidator(_text)]
Name = Annotated[Text, Field(min_length=1, pattern=r"^[^/%&><]+$")]
Names = Annotated[list[Text], Field(min_length=1, max_length=100), AfterValidator(_distinct)]
Slots = Annotated[int, Field(gt=0, le=MOST_SLOTS)]
Count = Annotated[int, Field(ge=0, le=MOST_SLOTS)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Duration = Annotated[float, Field(ge=1, le=LONGEST_LEASE, allow_inf_nan=False)]


class Body(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid")


class Create(Body):
    """A new limit."""

    name: Name
    limit: Count
    active: bool | None = True
    active_slots: Count | None = 0
    denied_slots: Count | None = 0
    slot_decay_per_second: Rate | None = 0


class Update(Body):
    """What is to change of a limit. What is null or absent stays as it is."""

    name: Name | None = None
    limit: Count | None = None
    active: bool | None = None
    active_slots: Count | None = None
    denied_slots: Count | None = None
    slot_decay_per_second: Rate | None = None


class Filter(BaseModel):
    """Which of all limits, in the order of their names."""

    limit: Annotated[int, Field(ge=0, le=MOST_LISTED)] | None = None
    offset: Annotated[int, Field(ge=0, le=2**62)] = 0


class LeaseHolder(Body):
    """Which run of a flow or task has a lease."""

    type: Literal["flow_run", "task_run", "deployment"]
    id: UUID


class Increment(BaseModel):
    """A request for slots of limits, all or none."""

    names: Names
    slots: Slots
    mode: Literal["concurrency", "rate_limit"] = "concurrency"
    create_if_missing: bool | None = None


class IncrementWithLease(Increment):
    """The same, for a lease."""

    lease_duration: Duration = 300
    holder: LeaseHolder | None = None


class Decrement(BaseModel):
    """Slots that were taken without a lease are free again."""

    names: Names
    slots: Slots
    occupancy_seconds: Annotated[float, Field(gt=0)] | None = None
    create_if_missing: bool | None = None


class OfLease(BaseModel):
    """A lease."""

    lease_id: UUID


class Renew(BaseModel):
    """How much longer a lease is to live."""

    lease_duration: Duration = 300


class GlobalLimit(BaseModel):
    """A limit, as it is now."""

    id: UUID
    created: datetime
    updated: datetime
    active: bool
    name: str
    limit: int
    active_slots: int
    slot_decay_per_second: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> GlobalLimit:
        """Of a row of the view of limits, with its limit_id."""
        return cls(
            id=id_of_limit(row["limit_id"]),
            created=row["created_at"],
            updated=row["updated_at"],
            active=row["active"],
            name=row["name"],
            limit=row["limit"],
            active_slots=active_slots(row),
            slot_decay_per_second=row["slot_decay_per_second"],
        )


class CreatedLimit(GlobalLimit):
    """A limit that was just created. Nothing of what its last two fields say is kept."""

    denied_slots: int = 0
    avg_slot_occupancy_seconds: float = 2.0


class MinimalLimit(BaseModel):
    """A limit that slots were taken of."""

    id: UUID
    name: str
    limit: int


class WithLease(BaseModel):
    """What was granted. Without limits, nothing: there are none of these names."""

    lease_id: UUID
    limits: list[MinimalLimit]


class What(BaseModel):
    """What is wrong with a part of a request."""

    type: str
    loc: list[str | int]
    msg: str


class Failure(BaseModel):
    """Why a request has failed, in the two forms that Prefect's clients read."""

    detail: str | None = None
    exception_message: str | None = None
    exception_detail: list[What] | None = None
    code: str | None = None


class Locked(BaseModel):
    """No slot is free."""

    detail: str
    retry_after: float


def active_slots(row: dict[str, Any]) -> int:
    """What Prefect calls so: slots that are held, or used and not decayed yet, a broken one counting as whole."""
    held: int = row["held"]
    level: float = row["level"]
    return max(held, math.ceil(level))


def as_minimal(known: Iterable[tuple[int, str, int]]) -> list[dict[str, Any]]:
    """MinimalLimits, ready for JSON, of (limit_id, name, limit)."""
    return [{"id": str(id_of_limit(limit_id)), "name": name, "limit": limit} for limit_id, name, limit in known]
