"""Keeps the leases of this process: renews them all from one thread, and notices when one is lost."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from uuid import UUID

import psycopg

from . import _sql
from ._database import ANSWERS_WITHIN, Database, Row, answering
from ._database import run as run_statement
from ._keeper import Claim
from ._wake import OURS, Orphan, ThreadWaker, orphan, started

log = logging.getLogger("pglimits.lease")

_RETRY = 0.5
_CLAIMED_WITHIN = 1.0
"""Seconds after which a lease whose claim has not been answered is renewed: that claims it as well."""


class Lease:
    """Slots that are held. Ends when it is released, or at ``expires_at`` if it can no longer be renewed.

    Attributes:
        id: the lease's id.
        fences: for each name a number that grows with every grant; None where the limit is not enforced.
        enforced: False if every limit is missing or inactive: nothing is held then.
        released: whether it was given back with ``release``, or by leaving its block.
    """

    __slots__ = (
        "__weakref__",
        "_duration",
        "_ends",
        "_expires_at",
        "_lanes",
        "_lost",
        "_on_lost",
        "_pause",
        "_unclaimed",
        "_user",
        "enforced",
        "fences",
        "id",
        "pid",
        "places",
        "released",
    )

    def __init__(
        self,
        lease_id: UUID,
        places: tuple[tuple[str, str], ...],
        lanes: tuple[tuple[str, ...], ...],
        fences: Sequence[int | None],
        expires_at: datetime | None,
        duration: float,
        ends: float,
        pid: int,
    ) -> None:
        self.id = lease_id
        self.places = places
        self._lanes = lanes
        self.fences = tuple(fences)
        self.enforced = expires_at is not None
        self.pid = pid
        self.released = False
        self._expires_at = expires_at
        self._duration = duration
        self._ends = ends
        # Seconds from one renewal to the next.
        self._pause = duration / 3
        # Handed over, and its full duration has not begun, as far as is known here.
        self._unclaimed = False
        self._lost = False
        self._on_lost: Callable[[], None] | None = None
        self._user: object = None

    @classmethod
    def foreign(cls, lease_id: UUID) -> Lease:
        """A lease that somebody else holds, or held, to be released."""
        lease = cls(lease_id, (), (), (), None, 0.0, math.inf, os.getpid())
        lease.enforced = True
        return lease

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Have something called, by the thread that renews, when the lease is lost."""
        self._on_lost = callback

    @property
    def names(self) -> tuple[str, ...]:
        """The limits that it was asked of."""
        return tuple(name for name, _ in self.places)

    @property
    def fence(self) -> int | None:
        """The fence of the first limit that is enforced."""
        return next((fence for fence in self.fences if fence is not None), None)

    @property
    def expires_at(self) -> datetime | None:
        """When it ends unless it is renewed, by the database's clock; None if nothing is held.

        For a moment after a hand-over that is at most 10 seconds ahead, until its full duration has begun.
        """
        return self._expires_at

    @property
    def lost(self) -> bool:
        """Whether it has ended while it should still be held."""
        return self._lost or (self.enforced and not self.released and time.monotonic() >= self._ends)

    def __repr__(self) -> str:
        return f"<Lease {self.id} on {', '.join(self.names)}{' (lost)' if self.lost else ''}>"


class Renewal:
    """The leases of this process, and the thread that renews them.

    A lease that nobody refers to any longer is given back: an interrupt can strike between the grant and the
    first line of the caller's body.
    """

    def __init__(self, database: Database, give_back: Callable[[Orphan[UUID]], None]) -> None:
        self._database = database
        self._give_back = give_back
        self._lock = threading.Lock()
        self._waker = ThreadWaker()
        # Leases of one pause come due in the order in which they were taken or renewed.
        self._by_pause: dict[float, dict[UUID, tuple[float, Orphan[UUID]]]] = {}
        self._due: dict[UUID, Orphan[UUID]] = {}
        self._not_before = 0.0
        self._thread: threading.Thread | None = None
        self._wakes_at = math.inf
        self._stopped = False

    def add(self, lease: Lease, claimed: bool = True) -> None:
        """Renew a lease from now on, a third of its duration after it was taken; one that is being claimed, soon."""
        now = time.monotonic()
        due = lease._ends - lease._duration + lease._pause
        if not claimed:
            lease._unclaimed = True
            lease._pause = _CLAIMED_WITHIN
            due = now + lease._pause
        reference = orphan(lease, self._give_back, lease.id)
        with self._lock:
            if due <= now:  # it was granted a while ago, and nobody heard of it
                self._due[lease.id] = reference
            else:
                self._by_pause.setdefault(lease._pause, {})[lease.id] = (due, reference)
            if (self._thread is None or not self._thread.is_alive()) and not self._stopped:
                self._thread = started(lambda: threading.Thread(target=self._work, name=f"{OURS}renewal", daemon=True))
            elif due < self._wakes_at:
                self._waker.wake()

    def claimed(self, claims: list[Claim]) -> None:
        """What has become of leases that were added before they had been claimed, if they are still held."""
        gone: list[Lease] = []
        now = time.monotonic()
        with self._lock:
            unclaimed = self._by_pause.get(_CLAIMED_WITHIN, {})
            for claim in claims:
                _, reference = unclaimed.get(claim.lease_id, (0.0, None))
                lease = None if reference is None else reference()
                if reference is None or lease is None or not lease._unclaimed:
                    continue
                asked = claim.ends - lease._duration
                if claim.expires_at is None:
                    gone.append(lease)
                elif asked + lease._duration / 3 > now:
                    # Else somebody had it locked: it is renewed soon.
                    del unclaimed[claim.lease_id]
                    self._extend(lease, reference, asked, claim.expires_at)
        for lease in gone:
            self.lose(lease, "it had ended before it was claimed, or somebody ended it")

    def remove(self, lease: Lease) -> bool:
        """Renew it no longer. Whether it was being renewed."""
        with self._lock:
            entry = self._by_pause.get(lease._pause, {}).pop(lease.id, None)
            return self._due.pop(lease.id, None) is not None or entry is not None

    def forget(self, lease_id: UUID) -> None:
        """Its lease is given back."""
        with self._lock:
            self._due.pop(lease_id, None)
            for leases in self._by_pause.values():
                leases.pop(lease_id, None)

    def all(self) -> list[Lease]:
        """The leases that are held now."""
        with self._lock:
            references = [reference for leases in self._by_pause.values() for _, reference in leases.values()]
            references += self._due.values()
        return [lease for reference in references if (lease := reference()) is not None]

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            self._stopped = True
        self._waker.wake()

    def _work(self) -> None:
        connection: psycopg.Connection[Row] | None = None
        while True:
            with self._lock:
                if self._thread is not threading.current_thread():
                    break
                now = time.monotonic()
                due = self._take_due(now)
                if not due:
                    if self._stopped:
                        break
                    next_due = self._next_due()
                    if next_due > now + 30:
                        _close(connection)
                        connection = None
                    self._wakes_at = next_due
            if not due:
                self._waker.wait(None if next_due == math.inf else max(next_due - now, 0.001))
                continue
            asked = time.monotonic()
            try:
                # In time for another connection to be tried before the first of them ends.
                within = min(max((min(lease._ends for lease in due) - asked) * 2 / 3, _RETRY), ANSWERS_WITHIN)
                connection = connection or self._database.connect(asked + within)
                with answering(connection, within):
                    rows = run_statement(connection, _sql.RENEW, ([lease.id for lease in due], None), prepare=False)
            except Exception as error:
                _close(connection)
                connection = None
                self._failed(due, error)
            else:
                self._renewed(due, asked, rows)
        _close(connection)

    def _take_due(self, now: float) -> list[Lease]:
        for pause, leases in self._by_pause.items():
            if not leases or next(iter(leases.values()))[0] > now:
                continue
            # Those due soon come along, so that all of them settle into one statement.
            soon = now + pause / 10
            for lease_id, (at, reference) in list(leases.items()):
                if at > soon:
                    break
                del leases[lease_id]
                self._due[lease_id] = reference
        if now < self._not_before:
            return []
        return [lease for reference in self._due.values() if (lease := reference()) is not None]

    def _next_due(self) -> float:
        first = [next(iter(leases.values()))[0] for leases in self._by_pause.values() if leases]
        return min([*first, *([self._not_before] if self._due else [])], default=math.inf)

    def _renewed(self, due: list[Lease], asked: float, rows: list[Row]) -> None:
        outcome = {lease_id: (renewed, expires_at) for lease_id, renewed, expires_at in rows}
        for lease in due:
            renewed, expires_at = outcome.get(lease.id, (False, None))
            if not renewed:
                self.lose(lease, "it had expired, or somebody ended it")
                continue
            with self._lock:
                reference = self._due.pop(lease.id, None)
                if reference is not None:
                    self._extend(lease, reference, asked, expires_at)

    def _extend(self, lease: Lease, reference: Orphan[UUID], asked: float, expires_at: datetime | None) -> None:
        lease._expires_at = expires_at
        lease._ends = asked + lease._duration
        lease._pause = lease._duration / 3
        lease._unclaimed = False
        self._by_pause.setdefault(lease._pause, {})[lease.id] = (asked + lease._pause, reference)

    def _failed(self, due: list[Lease], error: Exception) -> None:
        log.debug("renewing %d leases failed, trying again: %s", len(due), error)
        now = time.monotonic()
        for lease in due:
            if now >= lease._ends:
                self.lose(lease, f"it could not be renewed: {error}")
        with self._lock:
            left = [lease._ends - now for lease in due]
            self._not_before = now + min(_RETRY, *(max(seconds / 4, 0.02) for seconds in left))

    def lose(self, lease: Lease, why: str) -> None:
        """Say that a lease is lost, once, and renew it no longer."""
        if not self.remove(lease):
            return
        if lease._on_lost is None:
            log.warning("the lease %s on %s was lost: %s", lease.id, ", ".join(lease.names), why)
        lease._lost = True
        if lease._on_lost is not None:
            lease._on_lost()


def _close(connection: psycopg.Connection[Row] | None) -> None:
    if connection is not None:
        connection.close()
