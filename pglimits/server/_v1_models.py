"""What /v1 takes and answers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from ..models import Event, Holder, Key, Limit, Step, Waiter

_MOST = 2**31 - 1


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain the character U+0000")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    return text


Text = Annotated[str, Field(max_length=2000), AfterValidator(_storable)]
LimitName = Annotated[str, Field(min_length=1, max_length=200, description="The limit."), AfterValidator(_storable)]
KeyText = Annotated[
    str, Field(max_length=200, description="Each key has the whole limit for itself."), AfterValidator(_storable)
]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Slots = Annotated[StrictInt, Field(ge=1, le=_MOST, description="How many slots.")]
Count = Annotated[StrictInt, Field(ge=0, le=_MOST)]
Rate = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False, description="Slots that come back each second.")]
Total = Annotated[int, Field(description="How many there are, on all pages.")]
Duration = Annotated[float, Field(ge=1, le=366 * 86400, allow_inf_nan=False, description="Seconds.")]


class Body(BaseModel):
    """What a client sends. A field that is not known is an error: it may be misspelt."""

    model_config = ConfigDict(extra="forbid")


class NewLimit(Body):
    """A limit to be created."""

    name: LimitName
    limit: Annotated[Count, Field(description="Slots. 0 admits nobody.")]
    slot_decay_per_second: Rate = 0.0
    active: Annotated[StrictBool, Field(description="Whether it is enforced.")] = True
    max_waiters: Annotated[Count | None, Field(description="The longest line, for each key; null: no bound.")] = None
    description: Annotated[Text | None, Field(description="What it is for.")] = None


class LimitChange(Body):
    """What is to change. What is not sent stays as it is."""

    name: Annotated[LimitName, Field(description="A new name. Everything is kept.")] = ""
    limit: Annotated[Count, Field(description="Slots. 0 admits nobody.")] = 0
    slot_decay_per_second: Rate = 0.0
    active: Annotated[StrictBool, Field(description="Whether it is enforced.")] = True
    max_waiters: Annotated[Count | None, Field(description="The longest line, for each key; null: no bound.")] = None
    description: Annotated[Text | None, Field(description="What it is for; null: none.")] = None


class Part(Body):
    """What is wanted of one limit."""

    name: LimitName
    slots: Slots = 1
    key: KeyText = ""


class Wanted(Body):
    """One limit by its name, or several as ``limits``: then all of them or none."""

    name: LimitName | None = None
    slots: Slots = 1
    key: KeyText = ""
    limits: Annotated[
        Annotated[list[Part], Field(min_length=1, max_length=100)] | None,
        Field(description="In place of name, slots and key: several limits, all or none."),
    ] = None
    priority: Annotated[StrictInt, Field(ge=-1_000_000, le=1_000_000, description="Higher goes first.")] = 0
    strict: Annotated[StrictBool, Field(description="A limit that is missing is an error.")] = False

    @model_validator(mode="after")
    def _one_or_several(self) -> Wanted:
        if (self.name is None) == (self.limits is None):
            raise ValueError("one of name and limits is needed")
        if self.limits is not None and not {"slots", "key"}.isdisjoint(self.model_fields_set):
            raise ValueError("with limits, slots and key belong to each of them")
        return self

    @property
    def parts(self) -> list[Part]:
        if self.limits is not None:
            return self.limits
        return [Part.model_construct(name=self.name or "", slots=self.slots, key=self.key)]


class Peeked(Wanted):
    """A request that is not made."""

    for_rate: Annotated[StrictBool, Field(description="As rate_limit would answer, not acquire.")] = False


class RateRequest(Wanted):
    """A request for slots that come back by decay only."""

    wait: Annotated[Seconds, Field(description="Seconds for which this HTTP request is held while it is queued.")] = 0.0
    timeout_seconds: Annotated[
        Seconds | None,
        Field(description="Seconds to stand in line in all; null: for ever. If it is not sent: as long as wait."),
    ] = 0.0
    holder: Annotated[Any, Field(description="JSON that says who has the lease, or waits.")] = None
    lease_id: Annotated[UUID | None, Field(description="Chosen by you, it makes the request safe to repeat.")] = None

    @property
    def timeout(self) -> float | None:
        return self.timeout_seconds if "timeout_seconds" in self.model_fields_set else self.wait


class AcquireRequest(RateRequest):
    """A request for slots that are held."""

    lease_duration: Duration = 300.0
    clamp: Annotated[StrictBool, Field(description="More slots than a limit has count as the limit.")] = False


class UsedPart(Body):
    """What was used of one rate limit."""

    name: LimitName
    slots: Annotated[Count, Field(description="How many were really used.")]
    key: KeyText = ""


class Settlement(Body):
    """What a lease has really used of rate limits."""

    limits: Annotated[
        list[UsedPart], Field(min_length=1, max_length=100, description="Each rate limit that is settled.")
    ]

    @property
    def used(self) -> dict[tuple[str, str], int]:
        """The same limit named twice: the slots add up, as they do when they are taken."""
        found: dict[tuple[str, str], int] = {}
        for part in self.limits:
            found[part.name, part.key] = min(found.get((part.name, part.key), 0) + part.slots, _MOST)
        return found


class Settled(BaseModel):
    """Whether it was settled."""

    settled: Annotated[bool, Field(description="Whether the lease was still live. If not, what it took stands.")]


class Granted(BaseModel):
    """What a request was answered.

    Attributes:
        status: granted: go now. queued: ask again with the same body and this lease_id, within retry_after. unlimited:
            nothing is enforced, as every limit is missing or inactive.
        lease_id: what to renew, settle and release by, or to ask again by.
        fence: a number that grows with every grant of the limit and key; of several, that of the first enforced limit.
        fences: one for each limit of a lease; null where one is not enforced.
        expires_at: when the lease ends unless it is renewed.
        retry_after: in how many seconds to ask again at the latest.
        position: the place in line, from 1.
    """

    status: Literal["granted", "queued", "unlimited"]
    lease_id: UUID | None
    fence: int | None
    fences: list[int | None] | None
    expires_at: datetime | None
    retry_after: float | None
    position: int | None


class Peek(BaseModel):
    """What a request would be answered.

    Attributes:
        status: as the request would have it.
        retry_after: in how many seconds time alone would let it in; null: only a release can.
        position: the place that it would have in line, from 1.
    """

    status: Literal["granted", "queued", "refused", "unlimited"]
    retry_after: float | None
    position: int | None


class Renewal(Body):
    """How long the lease is to last from now."""

    lease_duration: Annotated[
        Duration | None, Field(description="Seconds from now; null: as long as it was taken for.")
    ] = None


class RenewedLease(BaseModel):
    """A lease that was renewed."""

    lease_id: UUID
    expires_at: Annotated[datetime | None, Field(description="Its new end.")]


class Released(BaseModel):
    """Whether it was released. Safe to repeat."""

    released: Annotated[bool, Field(description="Whether it was still live, or waiting.")]


class OneKey(Body):
    """Which key: one of them, or all."""

    key: Annotated[KeyText | None, Field(description="Only this key; null: all.")] = None


class Adjustment(Body):
    """Slots to be added to the level of a rate limit, or taken off."""

    slots: Annotated[StrictInt, Field(ge=-_MOST, le=_MOST, description="How many to add; below 0: to take off.")]
    key: KeyText = ""


class Limits(BaseModel):
    limits: list[Limit]
    total: Total


class Keys(BaseModel):
    keys: list[Key]
    total: Total


class Holders(BaseModel):
    holders: list[Holder]
    total: Total


class Waiters(BaseModel):
    waiters: list[Waiter]
    total: Total


class Reason(BaseModel):
    """Why a request waits.

    Attributes:
        blocked_by: the limit in whose line it stands, which may be another limit that it needs too.
        key: of that line.
        position: in that line, from 1.
        reason: a sentence.
        earliest: its turn does not come before; null where only a release can tell.
        slots: how many it asks for.
        priority: higher goes first.
        waiting_since: when it arrived.
    """

    lease_id: UUID
    key: str
    position: int
    blocked_by: str
    reason: str
    earliest: datetime | None
    slots: int | None
    holder: Any
    priority: int | None
    waiting_since: datetime | None


class Waiting(BaseModel):
    waiters: list[Reason]
    total: Total


class Events(BaseModel):
    """A page of events.

    Attributes:
        events: newest first, or with ``after`` oldest first.
        next: pass it on as ``before``, or as ``after``; null: that is all.
    """

    events: list[Event]
    next: int | None


class History(BaseModel):
    name: str
    steps: list[Step]


class ProblemDetails(BaseModel):
    """RFC 9457. code: the SQLSTATE of our errors. retry_after: seconds; null: only a release can tell."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str | None = None
    retry_after: float | None = None
