"""Requests of one event loop, or of the threads of a process, travel together: whoever may send takes along what has
queued up meanwhile.

As a group commit does, and with no waiting to fill a batch: a lone caller sends its own request at once, from its own
thread. A (limit, key) is in one batch of requests and one of releases at a time, so one hot limit makes large batches,
one of which is under way while the callers in the other go on; and a limit that somebody keeps locked holds up only
itself.

This module does no I/O: it says what to send and takes in what came back.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from psycopg import BaseConnection

from . import _sql
from ._database import BATCHES_AT_ONCE, LOCK_WAIT, Busy, Row, translate
from ._wake import Orphan, Waker, wake_all
from .errors import LimiterUnavailable, NotInstalled, PermissionDenied, PglimitsError, VersionMismatch

Place = tuple[str, str]

LARGEST_BATCH = 128
"""Requests in a batch at most: while the server is at work on one, the answers to another are handed out."""
SMALL_BATCH = 48
"""Releases and requests on one (limit, key) that are no more than this travel together."""

_AGAIN = -5
"""Where among the parameters of a statement it says whether some of its ids may have been sent before."""

PATIENCE = 1.0
"""Seconds that a request which may not wait at all still waits for a lock, as contention is no reason to refuse."""


@dataclass(slots=True)
class Answer:
    """What became of a request.

    ``seconds``: until it goes (granted), until it is to look (queued; None: the heartbeat is soon enough), or until it
    might be let in (refused). ``ends_in``: how many seconds its lease lasts.
    """

    status: str
    fences: list[int | None] | None = None
    expires_at: datetime | None = None
    ends_in: float | None = None
    seconds: float | None = None
    missing: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """What requests have in common that differ in nothing but who asks.

    Attributes:
        places: each limit and key. One batch of requests at a time may have one.
        release_lanes: the same for batches of releases.
        timeout: seconds, None for ever.
        lease_duration: seconds.
        for_rate: whether it is a rate_limit.
        names, slots, keys: arrays as PostgreSQL writes them.
    """

    places: tuple[Place, ...]
    release_lanes: tuple[tuple[str, ...], ...]
    timeout: float | None
    lease_duration: float
    for_rate: bool
    names: str
    slots: str
    keys: str
    priority: int
    strict: bool


class Ticket:
    """A request on its way: an acquire or rate_limit of some kind, or a release (``kind`` None)."""

    __slots__ = (
        "abandoned",
        "again",
        "alone",
        "answer",
        "apart",
        "batches",
        "done",
        "error",
        "holder",
        "kind",
        "lanes",
        "lease_id",
        "not_before",
        "patience",
        "sent",
        "tries",
        "wait",
        "waker",
    )

    def __init__(
        self,
        lease_id: UUID,
        kind: Kind | None,
        lanes: tuple[tuple[str, ...], ...],
        wait: float | None,
        holder: str,
        waker: Waker,
        patience: float | None,
    ) -> None:
        self.lease_id = lease_id
        self.kind = kind
        self.lanes = lanes
        # For how many seconds it is ready to wait in line.
        self.wait = wait
        self.holder = holder
        self.waker = waker
        self.patience = patience
        self.batches: Batches | None = None
        # Sent before, and nobody knows what became of that.
        self.again = False
        # When (monotonic) it was sent: an answer is of no earlier moment.
        self.sent = 0.0
        # Sent by itself: it has met an error that may be another's. Or only with others on the same limits, and not
        # before that moment: it has met a lock.
        self.alone = False
        self.apart = False
        self.not_before = 0.0
        self.tries = 0
        self.abandoned = False
        self.done = False
        self.answer: Answer | bool | None = None
        self.error: PglimitsError | None = None

    def is_like(self, other: Ticket) -> bool:
        """Whether the two differ in nothing but who asks, and so can be asked together."""
        return (self.kind is other.kind or self.kind == other.kind) and self.wait == other.wait

    def is_of(self, lease_id: UUID) -> bool:
        """Whether it asks for that lease."""
        return self.kind is not None and self.lease_id == lease_id

    def withdraw(self) -> None:
        """Its caller waits no longer, if it has not been served."""
        if self.batches is not None and not self.done:
            self.batches.withdraw(self)

    def patient_for(self, left: float | None) -> float | None:
        """How long its caller waits before it looks again; None: until it is woken."""
        if not self.not_before:
            return left
        seconds = max(self.not_before - time.monotonic(), 0.001)
        return seconds if left is None else min(left, seconds)


class Slot:
    """Holds the batch that its owner has to send, and the connection while the server may be at work on it."""

    __slots__ = ("apart", "batch", "batches", "connection", "orphan", "params", "releases", "requests", "sql")

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        # It has met a lock, or an error: it has a way of its own, and leaves the others theirs.
        self.apart = False
        self.batch: list[Ticket] | None = None
        self.sql = ""
        self.params: list[object] = []
        self.releases: list[Ticket] = []
        self.requests: list[Ticket] = []
        self.orphan: Orphan[Slot] | None = None
        self.connection: BaseConnection[Any] | None = None

    def goes_again(self) -> None:
        """It is sent once more, and nobody knows what became of it before: ids make that safe."""
        for ticket in self.batch or ():
            ticket.again = True
        if self.requests:
            self.params[_AGAIN] = True


class Batches:
    """What waits to be sent, and what is on its way.

    An exception can strike a caller's thread anywhere, so each step here can be taken again: what counts is which slots
    are under way, not a counter, and a batch whose sender was struck is put back as a whole and sent again.
    """

    def __init__(self, durable: bool, channel: str, abandon: Callable[[UUID, tuple[Place, ...]], None]) -> None:
        self.durable = durable
        self.channel = channel
        self._abandon = abandon
        self._closed = False
        # Whether a task that sends is on its way: whoever queues up meanwhile need not make another.
        self.summoned = False
        self._lock = threading.Lock()
        self._pending: dict[Ticket, None] = {}
        self._under_way: dict[Slot, set[tuple[str, ...]]] = {}

    def submit(self, ticket: Ticket) -> None:
        """Queue a request."""
        ticket.batches = self
        with self._lock:
            self._queue(ticket)

    def _queue(self, ticket: Ticket) -> None:
        if self._closed and ticket.kind is not None:
            ticket.error = LimiterUnavailable("the limiter has been closed")
            ticket.done = True
        else:
            self._pending[ticket] = None

    def close(self) -> None:
        """Send no more requests: what is not on its way by now never is. Releases still are."""
        with self._lock:
            self._closed = True
            unsent = [ticket for ticket in self._pending if ticket.kind is not None]
            for ticket in unsent:
                del self._pending[ticket]
                self._queue(ticket)
        wake_all([ticket.waker for ticket in unsent])

    def under_way(self) -> list[Slot]:
        """What has been sent and not been answered yet."""
        with self._lock:
            return list(self._under_way)

    def take(self, slot: Slot, ticket: Ticket | None = None) -> bool:
        """Put the next batch into the slot; false if nothing can be sent now (or not ``ticket``, when one is given)."""
        with self._lock:
            first = ticket if ticket is not None else next(filter(self._can_go, self._pending), None)
            if first is None or first not in self._pending or not self._can_go(first):
                return False
            slot.batch = batch = self._batch_with(first)
            slot.apart = any(taken.alone or taken.apart for taken in batch)
            self._under_way[slot] = {lane for taken in batch for lane in taken.lanes}
            now = time.monotonic()
            for taken in batch:
                taken.sent = now
                self._pending.pop(taken, None)
        return True

    def _batch_with(self, first: Ticket) -> list[Ticket]:
        if first.alone:
            return [first]
        busy = set().union(*self._under_way.values())
        now = time.monotonic()
        none_apart = not any(slot.apart for slot in self._under_way)
        batch = [
            other
            for other in self._pending
            if other.is_like(first)
            and not other.alone
            and (none_apart or not other.apart)
            and other.not_before <= now
            and busy.isdisjoint(other.lanes)
        ]
        apart = any(other.apart and other.lanes == first.lanes for other in batch)
        batch = [other for other in batch if (other.lanes == first.lanes if apart else not other.apart)]
        del batch[LARGEST_BATCH:]
        if first not in batch:
            batch[-1] = first
        if len(batch) <= SMALL_BATCH and not apart:
            batch += self._companions(batch, busy)
        return batch

    def _companions(self, batch: list[Ticket], busy: set[tuple[str, ...]]) -> list[Ticket]:
        """Releases that can go with few requests, or requests with few releases: all on one (limit, key)."""
        first = batch[0]
        if len(first.lanes) != 1 or any(ticket.lanes != first.lanes for ticket in batch):
            return []
        lane = first.lanes[0]
        other_lanes = (("release", *lane) if first.kind is not None else lane[1:],)
        if not busy.isdisjoint(other_lanes):
            return []
        others = [
            ticket for ticket in self._pending if ticket.lanes == other_lanes and not ticket.alone and not ticket.apart
        ]
        others = [ticket for ticket in others if ticket.is_like(others[0])]
        return others if len(others) <= SMALL_BATCH else []

    def statement(self, slot: Slot) -> tuple[str, list[object]]:
        """The one statement that serves the batch."""
        batch = slot.batch or []
        patience = min((ticket.patience for ticket in batch if ticket.patience is not None), default=None)
        if patience is not None:
            patience = min(max(patience, 0.001), LOCK_WAIT)
        slot.releases = [ticket for ticket in batch if ticket.kind is None]
        slot.requests = [ticket for ticket in batch if ticket.kind is not None]
        slot.params = params = []
        if slot.releases:
            params += [_ids(slot.releases), self.durable, patience]
        if not slot.requests:
            slot.sql = _sql.RELEASE
            return slot.sql, params
        slot.sql = _sql.RELEASE_AND_ACQUIRE if slot.releases else _sql.ACQUIRE
        first, kind = slot.requests[0], slot.requests[0].kind
        assert kind is not None
        holders = ",".join([ticket.holder for ticket in slot.requests])
        params += [
            kind.names, kind.slots, kind.keys, kind.for_rate, first.wait, kind.lease_duration, kind.priority,
            _ids(slot.requests), f"[{holders}]", any(ticket.again for ticket in slot.requests), kind.strict,
            self.channel, self.durable, patience,
        ]  # fmt: skip
        return slot.sql, params

    def finish(self, slot: Slot, rows: Sequence[Row]) -> None:
        """Hand out what came back."""
        if slot.releases:
            ended = set(rows[0][0])
            for ticket in slot.releases:
                ticket.answer = not ended or ticket.lease_id not in ended
        if slot.requests:
            for row in rows:
                _hand_out(slot.requests, *row[-8:])
        self._close(slot)

    def put_back(self, slot: Slot) -> None:
        """Nobody knows what became of a batch, but it is over: ids make it safe to ask again."""
        for ticket in slot.batch or ():
            ticket.again = True
        self._close(slot)

    def fail(self, slot: Slot, error: Exception) -> None:
        """A batch could not be sent, or the database refused it. What is safe to send again is."""
        problem = translate(error)
        for ticket in slot.batch or ():
            if ticket.answer is not None:
                continue
            if isinstance(problem, Busy):
                ticket.apart = True
                ticket.tries += 1
                ticket.not_before = time.monotonic() + min(0.02 * 2**ticket.tries, 1.0) * random.uniform(0.5, 1.0)
            elif len(slot.batch or ()) > 1 and _blames_the_request(problem):
                # Nothing was done, and only one of them need be to blame.
                ticket.alone = True
            else:
                # Each its own: an exception that many raise gathers the tracebacks of all.
                ticket.error = copy.copy(problem)
                ticket.error.__cause__ = problem.__cause__
        self._close(slot)

    def _close(self, slot: Slot) -> None:
        batch = slot.batch
        if batch is None:
            return
        with self._lock:
            for ticket in batch:
                if ticket.answer is not None or ticket.error is not None or ticket.abandoned:
                    ticket.done = True
                    self._pending.pop(ticket, None)
                else:
                    self._queue(ticket)
            self._under_way.pop(slot, None)
        # Those that were put back as well: they may have to wait until another moment now.
        wake_all([ticket.waker for ticket in batch if not ticket.abandoned])
        for ticket in batch:
            if ticket.done and ticket.abandoned and ticket.kind is not None:
                self._abandon(ticket.lease_id, ticket.kind.places)
        slot.batch = None
        slot.orphan = None
        self.nudge()

    def nudge(self) -> None:
        """Wake somebody who can send the next batch, if there is one to send."""
        if not self._pending:
            return  # who queues up next looks for himself
        with self._lock:
            ticket = next(filter(self._can_go, self._pending), None)
        if ticket is not None:
            ticket.waker.wake()

    def withdraw(self, ticket: Ticket) -> None:
        """Its caller has given up. If it was sent already, what it gets is given back."""
        with self._lock:
            ticket.abandoned = True
            never_sent = ticket in self._pending and not ticket.tries
            self._pending.pop(ticket, None)
            under_way = any(ticket in (slot.batch or ()) for slot in self._under_way)
        if not never_sent and not under_way and ticket.kind is not None:
            self._abandon(ticket.lease_id, ticket.kind.places)
        self.nudge()

    def forget(self, lease_id: UUID) -> None:
        """A request was given up, and its caller may have been struck before it withdrew it: it is sent no more."""
        with self._lock:
            for ticket in [ticket for ticket in self._pending if ticket.is_of(lease_id)]:
                ticket.abandoned = True
                del self._pending[ticket]
            for slot in self._under_way:
                for ticket in slot.batch or ():
                    ticket.abandoned = ticket.abandoned or ticket.is_of(lease_id)

    def can_go(self, ticket: Ticket) -> bool:
        """Whether a batch with this ticket could be taken now. Read without the lock: who is in its way wakes it."""
        return ticket in self._pending and self._can_go(ticket)

    def _can_go(self, ticket: Ticket) -> bool:
        apart = sum(slot.apart for slot in tuple(self._under_way))
        if ticket.alone or ticket.apart:
            if apart or ticket.not_before > time.monotonic():
                return False
        elif len(self._under_way) - apart >= BATCHES_AT_ONCE:
            return False
        return all(lanes.isdisjoint(ticket.lanes) for lanes in tuple(self._under_way.values()))


def _hand_out(
    requests: Sequence[Ticket],
    first: int,
    last: int,
    status: str,
    fences: list[int | None] | None,
    expires_at: datetime | None,
    ends_in: float | None,
    seconds: list[float | None] | None,
    missing: list[str] | None,
) -> None:
    """What ``_acquire_batch`` answered to those from the first to the last."""
    seconds = seconds or [None]
    for nth, ticket in enumerate(requests[first - 1 : last]):
        mine = seconds[min(nth, len(seconds) - 1)]
        ticket.answer = answer = Answer(status, fences, expires_at, ends_in, mine, missing)
        if nth and status == "granted":
            if fences is not None and fences[0] is not None:  # one limit, and each has the next
                answer.fences = [fences[0] + nth]
            later = (mine or 0.0) - (seconds[0] or 0.0)
            if later and expires_at is not None and ends_in is not None:
                answer.expires_at, answer.ends_in = expires_at + timedelta(seconds=later), ends_in + later


def _ids(batch: Sequence[Ticket]) -> str:
    return "{" + ",".join([ticket.lease_id.hex for ticket in batch]) + "}"


def _blames_the_request(problem: PglimitsError) -> bool:
    return not isinstance(problem, (LimiterUnavailable, NotInstalled, VersionMismatch, PermissionDenied))
