"""Requests of one process travel together: whoever may send takes along what has queued up meanwhile.

As a group commit does, and with no waiting to fill a batch: a lone caller sends its own request at once, from its own
thread. A (limit, key) is in one batch at a time, so one hot limit makes large batches; and a limit that somebody keeps
locked holds up only itself.

This module does no I/O: it says what to send and takes in what came back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from . import _sql
from ._database import BATCHES_AT_ONCE, Busy, Row, translate
from ._wake import Waker, wake_all
from .errors import PglimitsError

Place = tuple[str, str]

LARGEST_BATCH = 1000
PATIENCE = 1.0
"""Seconds that a request which may not wait at all still waits for a lock, as contention is no reason to refuse."""


@dataclass(slots=True)
class Answer:
    """What became of a request. ``retry_after`` and ``wait`` in seconds."""

    status: str
    fences: list[int | None] | None = None
    expires_at: datetime | None = None
    retry_after: float | None = None
    wait: float | None = None
    missing: list[str] | None = None
    error: str | None = None
    message: str | None = None


class Ticket:
    """A request on its way: an acquire or rate_limit (``body``), or a release (``body`` None)."""

    __slots__ = (
        "abandoned",
        "alone",
        "answer",
        "body",
        "done",
        "error",
        "lease_id",
        "patience",
        "places",
        "waker",
    )

    def __init__(
        self,
        lease_id: UUID,
        places: tuple[Place, ...],
        body: dict[str, Any] | None,
        waker: Waker,
        patience: float | None,
    ) -> None:
        self.lease_id = lease_id
        self.places = places
        self.body = body
        self.waker = waker
        self.patience = patience
        self.alone = False
        self.abandoned = False
        self.done = False
        self.answer: Answer | bool | None = None
        self.error: PglimitsError | None = None


class Slot:
    """Holds the batch that its owner has to send, from the moment that it is taken."""

    __slots__ = ("batch",)

    def __init__(self) -> None:
        self.batch: list[Ticket] | None = None


class Batches:
    """What waits to be sent, and what is on its way."""

    def __init__(self, durable: bool, abandon: Callable[[Ticket], None]) -> None:
        self.durable = durable
        self._abandon = abandon
        self._lock = threading.Lock()
        self._pending: dict[Ticket, None] = {}
        self._on_their_way: set[Place] = set()
        self._batches = 0

    def submit(self, ticket: Ticket) -> None:
        """Queue a request."""
        with self._lock:
            self._pending[ticket] = None

    def take(self, slot: Slot, ticket: Ticket | None = None) -> bool:
        """Put the next batch into the slot; false if nothing can be sent now (or not ``ticket``, when one is given)."""
        with self._lock:
            if self._batches >= BATCHES_AT_ONCE:
                return False
            first = ticket if ticket is not None else next(filter(self._can_go, self._pending), None)
            if first is None or first not in self._pending or not self._can_go(first):
                return False
            batch = [first]
            if not first.alone:
                batch = [
                    other
                    for other in self._pending
                    if (other.body is None) == (first.body is None) and not other.alone and self._can_go(other)
                ][:LARGEST_BATCH]
                if first not in batch:
                    batch[-1] = first
            slot.batch = batch
            self._batches += 1
            for taken in batch:
                del self._pending[taken]
                self._on_their_way.update(taken.places)
        return True

    def statement(self, batch: Sequence[Ticket]) -> tuple[str, list[object]]:
        """The one statement that serves the batch."""
        patience = min((ticket.patience for ticket in batch if ticket.patience is not None), default=None)
        if patience is not None:
            patience = min(max(patience, 0.001), 86400.0)
        if batch[0].body is None:
            return _sql.RELEASE, [[ticket.lease_id for ticket in batch], self.durable, patience]
        return _sql.ACQUIRE_MANY, [json.dumps([ticket.body for ticket in batch]), self.durable, patience]

    def finish(self, slot: Slot, rows: Sequence[Row]) -> None:
        """Hand out what came back."""
        batch = slot.batch or []
        if batch and batch[0].body is None:
            released: dict[UUID, bool] = dict(rows)
            for ticket in batch:
                ticket.answer = released.get(ticket.lease_id, False)
        else:
            for ticket, row in zip(batch, rows, strict=True):
                ticket.answer = Answer(*row)
        self._done(slot, batch)

    def fail(self, slot: Slot, error: BaseException) -> None:
        """A batch could not be sent, or nobody knows what became of it. What is safe to send again is."""
        batch = slot.batch
        if batch is None:
            return
        problem = translate(error)
        again: list[Ticket] = []
        for ticket in batch:
            if isinstance(problem, Busy) and len(batch) > 1:
                ticket.alone = True
                again.append(ticket)
            elif not isinstance(error, Exception):
                # Its sender was interrupted, the others were not: ids make it safe to ask again.
                again.append(ticket)
            else:
                ticket.error = problem
        with self._lock:
            for ticket in again:
                if not ticket.abandoned:
                    self._pending[ticket] = None
        self._done(slot, [ticket for ticket in batch if ticket.error is not None or ticket.abandoned])

    def _done(self, slot: Slot, finished: Sequence[Ticket]) -> None:
        with self._lock:
            batch, slot.batch = slot.batch, None
            if batch is None:
                return
            self._batches -= 1
            for ticket in batch:
                self._on_their_way.difference_update(ticket.places)
            for ticket in finished:
                ticket.done = True
        wake_all([ticket.waker for ticket in finished if not ticket.abandoned])
        for ticket in finished:
            if ticket.abandoned and ticket.body is not None:
                self._abandon(ticket)
        self.nudge()

    def nudge(self) -> None:
        """Wake somebody who can send the next batch, if there is one to send."""
        with self._lock:
            if self._batches >= BATCHES_AT_ONCE:
                return
            ticket = next(filter(self._can_go, self._pending), None)
        if ticket is not None:
            ticket.waker.wake()

    def withdraw(self, ticket: Ticket) -> None:
        """Its caller has given up. If it was sent already, what it gets is given back."""
        with self._lock:
            ticket.abandoned = True
            never_sent = self._pending.pop(ticket, self) is None
            unknown = not never_sent and ticket.done
        if unknown and ticket.body is not None:
            self._abandon(ticket)
        self.nudge()

    def can_go(self, ticket: Ticket) -> bool:
        """Whether a batch with this ticket could be taken now."""
        with self._lock:
            return self._batches < BATCHES_AT_ONCE and ticket in self._pending and self._can_go(ticket)

    def _can_go(self, ticket: Ticket) -> bool:
        return self._on_their_way.isdisjoint(ticket.places)
