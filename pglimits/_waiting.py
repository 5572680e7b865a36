"""Looks after the requests of this process that are queued: one channel, one heartbeat, and only while something waits.

A notification that tells of a grant is taken at its word: its waiter goes on while the lease is being claimed, and
counts on no more than what it has without that. Any other is a hint to look. So is the moment that the database named
when it queued a request. What is true is read with ``_watch``. One heartbeat keeps all of them alive. Where LISTEN
cannot work, behind a pooler, they poll with jitter instead.

All of it happens in the courier's thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import random
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from psycopg.pq.abc import PGresult

from . import _codec, _sql
from ._database import Busy, Cancelled, Connection
from ._leases import Lease, Place
from ._requests import Params, Request
from ._sql import Statement
from .errors import PglimitsError

if TYPE_CHECKING:
    from ._courier import Courier

log = logging.getLogger("pglimits.waiting")

LIVENESS = 10.0
"""Seconds after which a process that has not called in is dead. The database says so in ``pglimits._liveness()``."""
HEARTBEAT = 3.0
"""Seconds after which it calls in at the latest."""
ANSWERS_WITHIN = 3.0
"""Seconds after which a connection that does not answer is given up: early enough to call in on another one."""
LOCK_WAIT = 0.3
"""Seconds that what serves many waits for a lock: longer than contention takes; then somebody keeps it in a long
transaction."""
AGAIN = 0.02
"""Seconds that what has met such a lock waits for it when it is tried again: others wait behind it by now."""
_POLL = 0.05
_TRUSTED = 3.0
"""Seconds that a lease must still have, come what may, for its waiter to go on before it has been claimed."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Waiting:
    """The requests of this process that are queued."""

    def __init__(self, courier: Courier) -> None:
        self.channel = f"pglimits_{uuid4().hex}"
        self.polls = False
        self._courier = courier
        self._waiters: dict[UUID, Request] = {}
        # By the moment to look, with entries that are no longer true among them.
        self._agenda: list[tuple[float, int, Request]] = []
        self._count = itertools.count()
        # Told, and not known to wait.
        self._told: set[UUID] = set()
        # Told of their lease, which is to be claimed.
        self._unclaimed: list[UUID] = []
        # When it called in last but one, last, and does so next. What was granted just before the last time goes by the
        # one before that.
        self._beat_before = -math.inf
        self._beat_at = -math.inf
        self._beats_at = math.inf
        self._beats = False
        self._looks = False
        # Those on places that somebody keeps locked are looked at by themselves, and not before a moment.
        self._locked: dict[tuple[Place, ...], float] = {}
        # Since when no connection answers, and when it is tried again.
        self._lost_at: float | None = None
        self._not_before = 0.0
        self._pause = 0.1

    def __len__(self) -> int:
        return len(self._waiters)

    def all(self) -> list[Request]:
        """The requests that are queued."""
        return list(self._waiters.values())

    def add(self, request: Request, seconds: float | None) -> None:
        """Look after a request until it has news; it is to look in so many seconds (None: with the heartbeat)."""
        now = time.monotonic()
        request.waits = True
        request.called_in = request.asked_at
        self._waiters[request.lease_id] = request
        self._beats_at = min(self._beats_at, now + HEARTBEAT)
        looks_at = request.frees_at = math.inf if seconds is None else now + seconds
        if self.polls:
            looks_at = min(looks_at, now + self._pause_of_polls())
        self._schedule(request, 0.0 if request.lease_id in self._told else looks_at)
        self._told.discard(request.lease_id)

    def remove(self, request: Request) -> None:
        """It waits no longer."""
        if request.waits:
            request.waits = False
            request.looks_at = math.inf
            self._waiters.pop(request.lease_id, None)

    def look_again(self) -> None:
        """Whatever was told may have been missed."""
        self._locked.clear()
        for request in self._waiters.values():
            self._schedule(request, 0.0)

    def next_at(self) -> float:
        """When there is something to be done."""
        if not self._waiters and not self._unclaimed:
            return math.inf
        moments = [math.inf if self._beats else self._beats_at]
        if not self._looks:
            moments += [*self._locked.values(), self._next_look()]
            if self._unclaimed:
                moments.append(0.0)
        return max(min(moments), self._not_before)

    def next_job(self, now: float) -> Beat | Watch | None:
        """What is to be sent now."""
        if now < self._not_before:
            return None
        if not self._waiters:
            self._beats_at = math.inf
            self._locked.clear()
            self._agenda.clear()
        elif now >= self._beats_at and not self._beats:
            self._beats = True
            return Beat(self)
        if self._looks:
            return None
        due = self._due(now)
        patience = LOCK_WAIT
        if not due:
            due, patience = self._due_among_locked(now), AGAIN
        return self._watch(due, patience) if due else None

    def _watch(self, due: list[UUID], patience: float, only_news: bool = False) -> Watch:
        self._looks = True
        return Watch(self, due, patience, only_news)

    def _next_look(self) -> float:
        while self._agenda:
            looks_at, _, request = self._agenda[0]
            if looks_at == request.looks_at and request.waits:
                return looks_at
            heapq.heappop(self._agenda)
        return math.inf

    def _due(self, now: float) -> list[UUID]:
        """Which to look at, and whose leases to claim."""
        due = dict.fromkeys(self._unclaimed)
        self._unclaimed = []
        while self._next_look() <= now:
            request = heapq.heappop(self._agenda)[2]
            request.looks_at = math.inf
            due[request.lease_id] = None
        if not self._locked:
            return list(due)
        return [lease_id for lease_id in due if not self._is_locked(lease_id)]

    def _is_locked(self, lease_id: UUID) -> bool:
        request = self._waiters.get(lease_id)
        return request is not None and request.kind.places in self._locked

    def _due_among_locked(self, now: float) -> list[UUID]:
        for places, not_before in list(self._locked.items()):
            if not_before <= now:
                due = [each.lease_id for each in self._waiters.values() if each.kind.places == places]
                if due:
                    return due
                del self._locked[places]
        return []

    def _schedule(self, request: Request, looks_at: float) -> None:
        request.looks_at = looks_at
        if looks_at < math.inf:
            heapq.heappush(self._agenda, (looks_at, next(self._count), request))

    def _pause_of_polls(self) -> float:
        # Many waiters poll less often: what a look costs grows with their number.
        return (_POLL + len(self._waiters) / 10000) * random.uniform(0.5, 1.5)

    # What comes back.

    def notified(self, channel: str, payload: str) -> None:
        """A notification has come."""
        if channel != self.channel:
            return
        for line in payload.splitlines():
            try:
                self._told_of(*line.split(" "))
            except (TypeError, ValueError, OverflowError):
                log.debug("a notification that says nothing: %.100r", line)

    def _told_of(self, about: str, *numbers: str) -> None:
        """``numbers``: none, look; one, look in so many microseconds; three, it is granted: its fence, in how many
        microseconds it goes, and the end of its lease in microseconds since 1970."""
        lease_id = UUID(about)
        request = self._waiters.get(lease_id)
        now = time.monotonic()
        if len(numbers) == 1 and request is not None:
            self._schedule(request, min(request.looks_at, now + int(numbers[0]) / 1e6))
            return
        if len(numbers) == 3 and request is not None and request.renew and len(request.kind.places) == 1:
            fence, goes_in, expires = map(int, numbers)
            # Its lease ends when it would have died, or as long after it was asked for as it lasts.
            called_in = max(request.called_in, self._beat_before)
            ends = min(called_in + LIVENESS, request.called_in + request.kind.lease_duration)
            if request.kind.for_rate or ends - now > _TRUSTED:
                expires_at = _EPOCH + timedelta(microseconds=expires)
                self.remove(request)
                self._unclaimed.append(lease_id)
                self._courier.grant(request, [fence], expires_at, ends, now + goes_in / 1e6, claimed=False)
                return
        if request is not None:
            self._schedule(request, 0.0)
            return
        # It may have been told before the answer came that it is queued; or it was given up.
        self._told.add(lease_id)
        if len(self._told) > 1000:
            self._told.clear()

    def has_beaten(self, sent_at: float, seconds: float) -> Watch | None:
        """The process has called in, and does so again in so many seconds. Now it looks: one of each line for all;
        where one stands that waits for several limits, only a look can tell."""
        self._beats = False
        self._beat_before, self._beat_at = self._beat_at, sent_at
        self._beats_at = time.monotonic() + max(seconds, 0.01)
        self._well()
        looks: dict[object, UUID] = {}
        for lease_id, request in self._waiters.items():
            if request.kind.places not in self._locked:
                looks[request.kind.places if len(request.kind.places) == 1 else lease_id] = lease_id
        if self._looks or not looks:
            return None
        return self._watch(list(looks.values()), LOCK_WAIT, only_news=True)

    def has_looked(self, watch: Watch, result: PGresult) -> None:
        """What is true of some requests."""
        self._looks = False
        self._well()
        now = time.monotonic()
        if self._locked:
            for lease_id in watch.due:
                if (request := self._waiters.get(lease_id)) is not None:
                    self._locked.pop(request.kind.places, None)
        if self.polls:
            for lease_id in watch.due:
                if (request := self._waiters.get(lease_id)) is not None:
                    self._schedule(request, now + self._pause_of_polls())
        for lease_id, status, fence, expires_at, seconds, ends_in in _codec.rows(result):
            request = self._waiters.get(lease_id)
            ends = watch.sent_at + (ends_in or 0.0)
            if request is None:  # it goes on already, or has given up
                claimed = expires_at if status == "granted" else None
                self._courier.leases.claimed(lease_id, watch.sent_at, claimed, ends)
            elif status == "queued":
                request.frees_at = math.inf if seconds is None else now + seconds
                # It may have been told something since it was looked at.
                self._schedule(request, min(request.frees_at, request.looks_at))
            else:
                self.remove(request)
                if status == "granted" and len(request.kind.places) == 1:
                    self._courier.grant(request, [fence], expires_at, ends, now + (seconds or 0.0))
                else:  # it asks again, with the same id: that acts once
                    self._courier.ask(request)

    def _well(self) -> None:
        self._lost_at, self._pause = None, 0.1

    def failed(self, job: Beat | Watch, error: BaseException, problem: PglimitsError) -> None:
        """A job did not come through."""
        if isinstance(job, Beat):
            self._beats = False
        else:
            self._looks = False
        now = time.monotonic()
        if isinstance(job, Watch) and isinstance(problem, (Busy, Cancelled)):
            self._set_apart(job.due, now)
            return
        log.debug("looking after %d waiters failed: %s", len(self._waiters), error)
        self._lost_at = self._lost_at or now
        if isinstance(job, Watch):
            for lease_id in job.due:
                if (request := self._waiters.get(lease_id)) is not None:
                    self._schedule(request, 0.0)
        self._not_before = now + self._pause * random.uniform(0.5, 1.0)
        self._pause = min(self._pause * 2, 2.0)
        if now - self._lost_at > LIVENESS:
            for request in self.all():
                self.remove(request)
                self._courier.unavailable(request, problem, error)

    def _set_apart(self, due: Iterable[UUID], now: float) -> None:
        """Together they have met a lock: from now on those on the same places are looked at by themselves."""
        for lease_id in due:
            request = self._waiters.get(lease_id)
            if request is not None:
                pause = 0.0 if request.kind.places not in self._locked else random.uniform(0.1, 0.3)
                self._locked[request.kind.places] = now + pause


class Beat:
    """A sign of life of this process."""

    answers_within = ANSWERS_WITHIN

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self.sent_at = 0.0

    def statements(self, connection: Connection) -> list[tuple[Statement, Params]]:
        self.sent_at = time.monotonic()
        return [(_sql.BEAT, [self._waiting.channel.encode()])]

    def done(self, courier: Courier, result: PGresult) -> None:
        ((seconds,),) = _codec.rows(result)
        watch = self._waiting.has_beaten(self.sent_at, seconds)
        if watch is not None:
            courier.urgent.append(watch)

    def failed(self, courier: Courier, error: BaseException, problem: PglimitsError) -> None:
        self._waiting.failed(self, error, problem)


class Watch:
    """A look at some of those who wait; it claims what was handed over."""

    answers_within = ANSWERS_WITHIN

    def __init__(self, waiting: Waiting, due: list[UUID], patience: float, only_news: bool) -> None:
        self._waiting = waiting
        self.due = due
        self.only_news = only_news
        self._patience = patience
        self.sent_at = 0.0

    def statements(self, connection: Connection) -> list[tuple[Statement, Params]]:
        self.sent_at = time.monotonic()
        return [
            (
                _sql.WATCH,
                [_codec.ids(self.due), f"{self._patience * 1000:.0f}ms".encode(), _codec.encode(self.only_news)],
            )
        ]

    def done(self, courier: Courier, result: PGresult) -> None:
        self._waiting.has_looked(self, result)

    def failed(self, courier: Courier, error: BaseException, problem: PglimitsError) -> None:
        self._waiting.failed(self, error, problem)


RETRY = 0.5
"""Seconds after which a renewal that has failed is tried again, or sooner where a lease ends soon."""
_LONGEST_ANSWER = 10.0
_LOCK_WAIT = 0.1
"""Seconds that a renewal waits for the lock of a lease, which nobody but whoever ends it has any need to keep."""


class Renew:
    """Renews leases, all that are due; by itself, one that somebody keeps locked."""

    def __init__(self, leases: Sequence[Lease], *, alone: bool = False) -> None:
        now = time.monotonic()
        self.leases = list(leases)
        self._alone = alone
        # In time for another connection to be tried before the first of them ends.
        left = min(lease._ends for lease in leases) - now
        self.answers_within = min(max(left * 2 / 3, RETRY), _LONGEST_ANSWER)
        self._sent_at = now

    def statements(self, connection: Connection) -> list[tuple[Statement, Params]]:
        patience = AGAIN if self._alone else _LOCK_WAIT
        ids = _codec.ids([lease.id for lease in self.leases])
        return [(_sql.RENEW, [f"{patience * 1000:.0f}ms".encode(), ids, None])]

    def done(self, courier: Courier, result: PGresult) -> None:
        outcome = {lease_id: (renewed, expires_at) for lease_id, renewed, expires_at in _codec.rows(result)}
        for lease in self.leases:
            renewed, expires_at = outcome.get(lease.id, (False, None))
            if renewed:
                courier.leases.extend(lease, self._sent_at, expires_at)
            else:
                courier.leases.lose(lease, "it had expired, or somebody ended it")

    def failed(self, courier: Courier, error: BaseException, problem: PglimitsError) -> None:
        if isinstance(problem, (Busy, Cancelled)) and not self._alone and len(self.leases) > 1:
            courier.urgent.extend(Renew([lease], alone=True) for lease in self.leases)
            return
        log.debug("renewing %d leases failed, trying again: %s", len(self.leases), error)
        courier.leases.failed(self.leases, problem, RETRY)
