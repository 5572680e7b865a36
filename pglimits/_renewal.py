"""Keeps the leases of this process: renews them all from one thread, and notices when one is lost."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import psycopg

from . import _sql
from ._apart import AGAIN, Apart
from ._cleaner import Gone
from ._database import ANSWERS_WITHIN, Busy, Database, Row, answering, is_busy
from ._database import run as run_statement
from ._keeper import Claim
from ._wake import OURS, Orphan, ThreadWaker, orphan, started

log = logging.getLogger("pglimits.lease")

_RETRY = 0.5
_LOCK_WAIT = 0.1
"""Seconds that a renewal waits for the lock of a lease, which nobody but who ends it has any need to keep."""
_CLAIMED_WITHIN = 1.0
"""Seconds after which a lease whose claim has not been answered is renewed: that claims it as well."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """What renewing a lease came to: whether it was live, and when it ends now."""

    lease_id: UUID
    live: bool
    expires_at: datetime | None


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
        "_given_back",
        "_gone",
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
        gone: Gone,
        lanes: tuple[tuple[str, ...], ...],
        fences: Sequence[int | None],
        expires_at: datetime | None,
        duration: float,
        ends: float,
        pid: int,
    ) -> None:
        self.id = gone.lease_id
        self.places = gone.places
        self._gone = gone
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
        # Taken out by who calls it, so that it is called once.
        self._on_lost: list[Callable[[], None]] = []
        self._given_back = False
        self._user: object = None

    @classmethod
    def foreign(cls, lease_id: UUID) -> Lease:
        """A lease that somebody else holds, or held, to be released."""
        lease = cls(Gone(lease_id), (), (), None, 0.0, math.inf, os.getpid())
        lease.enforced = True
        return lease

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Have something called when the lease is lost, by the thread that notices; at once if it is lost already."""
        self._on_lost = [callback]
        if self._lost:
            self._tell()

    def _tell(self) -> None:
        try:
            callback = self._on_lost.pop()
        except IndexError:
            return
        callback()

    def is_ours(self) -> bool:
        """Whether it is this process that has to give it back, and has not done so."""
        return self.enforced and not self.released and not self._given_back and self.pid == os.getpid()

    def _end(self) -> None:
        """Its limiter is closed: it is given back, and lost to whoever still counts on it."""
        self._given_back = self._lost = True
        self._tell()

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

    def _extend(self, asked: float, expires_at: datetime | None) -> None:
        """It was renewed, by a statement that was sent then (monotonic). That moves its end no nearer."""
        self._expires_at = expires_at
        self._ends = max(self._ends, asked + self._duration)

    def __repr__(self) -> str:
        return f"<Lease {self.id} on {', '.join(self.names)}{' (lost)' if self.lost else ''}>"


class Renewal:
    """The leases of this process, and the thread that renews them.

    A lease that nobody refers to any longer is given back: an interrupt can strike between the grant and the
    first line of the caller's body.
    """

    def __init__(self, database: Database, give_back: Callable[[Orphan[Gone]], None]) -> None:
        self._database = database
        self._give_back = give_back
        self._lock = threading.Lock()
        self._waker = ThreadWaker()
        # Leases of one pause come due in the order in which they were taken or renewed.
        self._by_pause: dict[float, dict[UUID, tuple[float, Orphan[Gone]]]] = {}
        self._due: dict[UUID, Orphan[Gone]] = {}
        # Those of them that somebody keeps locked.
        self._apart: Apart[UUID] = Apart()
        self._not_before = 0.0
        self._thread: threading.Thread | None = None
        self._connection: psycopg.Connection[Row] | None = None
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
        reference = orphan(lease, self._give_back, lease._gone)
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

    def by_hand(self, lease: Lease, asked: float, duration: float | None, renewed: Renewed) -> None:
        """A lease was renewed by its holder, for so many seconds from then on; None: as it was taken."""
        if not renewed.live:
            return
        with self._lock:
            _, reference = self._by_pause.get(lease._pause, {}).pop(lease.id, (0.0, None))
            reference = self._due.pop(lease.id, None) or reference
            lease._duration = duration or lease._duration
            lease._extend(asked, renewed.expires_at)
            if reference is not None:
                self._schedule(lease, reference, asked)

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
        while True:
            with self._lock:
                if self._thread is not threading.current_thread():
                    break
                now = time.monotonic()
                due = self._take_due(now)
                locked = self._leases_of(self._apart) if self._apart else []
                if self._stopped and not due:
                    break
                self._wakes_at = now if due else self._next_moment(locked)
                wakes_at = self._wakes_at
            if wakes_at > now + 30:
                self._disconnect()
            if wakes_at > now:
                self._waker.wait(None if wakes_at == math.inf else max(wakes_at - now, 0.001))
                continue
            for lease in locked:
                if now >= lease._ends:
                    self.lose(lease, "somebody kept it locked until its end")
            if due:
                try:
                    self._renew(due, _LOCK_WAIT)
                except Busy:
                    self._apart.add(lease.id for lease in sorted(due, key=lambda lease: lease.places))
            self._apart.try_next(self._renew_apart)
        self._disconnect()

    def _renew_apart(self, lease_ids: list[UUID]) -> None:
        with self._lock:
            leases = self._leases_of(lease_ids)
        if leases:
            self._renew(leases, AGAIN)

    def _renew(self, leases: list[Lease], patience: float) -> None:
        asked = time.monotonic()
        # In time for another connection to be tried before the first of them ends.
        within = min(max((min(lease._ends for lease in leases) - asked) * 2 / 3, _RETRY), ANSWERS_WITHIN)
        params = f"{patience * 1000:.0f}ms", [lease.id for lease in leases], None
        try:
            self._connection = self._connection or self._database.connect(asked + within)
            with answering(self._connection, within):
                rows = run_statement(self._connection, _sql.RENEW, params, prepare=False)
        except Exception as error:
            if is_busy(error):
                raise Busy(str(error)) from error
            self._disconnect()
            self._failed(leases, error)
        else:
            self._renewed(leases, asked, rows)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

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
        return self._leases_of(lease_id for lease_id in self._due if lease_id not in self._apart)

    def _leases_of(self, due: Iterable[UUID]) -> list[Lease]:
        """Those of them that are still held."""
        references = [reference for lease_id in due if (reference := self._due.get(lease_id)) is not None]
        return [lease for reference in references if (lease := reference()) is not None]

    def _next_moment(self, locked: Iterable[Lease]) -> float:
        """When a lease is due, or is to be tried again, or ends while somebody keeps it locked."""
        moments = [next(iter(leases.values()))[0] for leases in self._by_pause.values() if leases]
        if any(lease_id not in self._apart for lease_id in self._due):
            moments.append(self._not_before)
        return min([*moments, self._apart.next_at, *(lease._ends for lease in locked)])

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

    def _extend(self, lease: Lease, reference: Orphan[Gone], asked: float, expires_at: datetime | None) -> None:
        lease._extend(asked, expires_at)
        self._schedule(lease, reference, asked)

    def _schedule(self, lease: Lease, reference: Orphan[Gone], asked: float) -> None:
        lease._pause = lease._duration / 3
        lease._unclaimed = False
        due = asked + lease._pause
        self._by_pause.setdefault(lease._pause, {})[lease.id] = (due, reference)
        if due < self._wakes_at:
            self._waker.wake()

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
        if not lease._on_lost:
            log.warning("the lease %s on %s was lost: %s", lease.id, ", ".join(lease.names), why)
        lease._lost = True
        lease._tell()
