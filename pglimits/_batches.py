"""What goes out together: requests that are alike in one statement, and with them what was released meanwhile.

As a group commit does, and with no waiting to fill a batch: a lone caller's request goes at once. A (limit, key) is in
one statement at a time, so one hot limit makes large batches, and one that somebody keeps locked holds up only itself.

All of it happens in the courier's thread.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import deque
from collections.abc import Hashable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeAlias

import psycopg
from psycopg.pq.abc import PGresult

from . import _codec, _observer, _sql
from ._codec import Row
from ._database import TRIES, Busy, Connection, is_lost, may_go_again
from ._leases import Place
from ._requests import PATIENCE, Params, Release, Request
from ._sql import Statement
from ._waiting import LOCK_WAIT
from .errors import LimiterUnavailable, NotInstalled, PermissionDenied, PglimitsError, VersionMismatch

if TYPE_CHECKING:
    from ._courier import Courier

LARGEST_BATCH = 128
"""Requests in a batch at most, and releases: while the server is at work on one, the answers to another are taken."""
BATCHES_AT_ONCE = 2
"""How many batches may be on their way at the same time, beside one that has met a lock."""
ANSWERS_WITHIN = 10.0
"""Seconds after which a server that does not say the last word on a statement is taken for gone."""


class Lane:
    """Requests that can go together, or releases on the same places."""

    __slots__ = ("apart", "errands", "key", "not_before", "number", "places", "tries", "wait")

    def __init__(self, key: Hashable, number: int, places: tuple[Place, ...], wait: float | None = None) -> None:
        self.key = key
        # The order in which lanes have begun to wait.
        self.number = number
        self.places = places
        self.wait = wait
        self.errands: deque[Request | Release] = deque()
        # It goes by itself: it has met a lock, or an error that may be one's.
        self.apart = False
        self.not_before = 0.0
        self.tries = 0


Lanes: TypeAlias = dict[Hashable, Lane]


class Outbox:
    """What waits to be sent, in lanes, and which places are on their way."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._requests: Lanes = {}
        self._releases: Lanes = {}
        self._places: set[Place] = set()
        self._under_way: set[Batch] = set()
        # When the last batch was sent, if any is on its way.
        self.sent_at = -math.inf
        self._count = itertools.count()

    def is_empty(self) -> bool:
        """Nothing waits to be sent, and nothing is on its way."""
        return not self._requests and not self._releases and not self._under_way

    def put(self, request: Request) -> None:
        """Queue a request."""
        kind = request.kind
        wait = kind.timeout
        if wait and kind.for_rate and request.until is not None:
            # If all say the same, they are asked together; and only for a rate it matters how much has gone by.
            left = max(request.until - time.monotonic(), 0.0)
            wait = left if left < wait - 0.001 else wait
        key: Hashable = kind if wait is kind.timeout else (kind, wait)
        if request.alone:
            key = request.lease_id
        lane = self._requests.get(key)
        if lane is None:
            lane = self._requests[key] = Lane(key, next(self._count), kind.places, wait)
            lane.apart = request.alone
        lane.errands.append(request)

    def put_release(self, release: Release) -> None:
        """Queue a release."""
        # Where it is on is not known of one that was named by its id.
        places = release.places or (("", release.lease_id.hex),)
        key: Hashable = release.lease_id if release.alone else places
        lane = self._releases.get(key)
        if lane is None:
            lane = self._releases[key] = Lane(key, next(self._count), places)
            lane.apart = release.alone
        lane.errands.append(release)

    def take_out(self) -> list[Request | Release]:
        """Everything that waits to be sent, to be sent no more."""
        lanes = [*self._requests.values(), *self._releases.values()]
        self._requests.clear()
        self._releases.clear()
        return [errand for lane in lanes for errand in lane.errands]

    def next_at(self) -> float:
        """When what has met a lock may go again."""
        now = time.monotonic()
        moments = [
            lane.not_before for lanes in (self._requests, self._releases) for lane in lanes.values()
            if lane.not_before > now
        ]  # fmt: skip
        return min(moments, default=math.inf)

    def is_locked(self, places: tuple[Place, ...]) -> bool:
        """Whether what is on these places has met a lock, and has not gone through since."""
        under_way = [lane for batch in self._under_way for lane in batch.lanes]
        lanes = [*self._requests.values(), *self._releases.values(), *under_way]
        return any(lane.tries and lane.places == places for lane in lanes)

    def is_silent(self, places: tuple[Place, ...]) -> bool:
        """Whether a statement on one of these places has had no answer for longer than contention takes."""
        now = time.monotonic()
        return any(
            now - batch.sent_at > PATIENCE
            and not {place for lane in batch.lanes for place in lane.places}.isdisjoint(places)
            for batch in self._under_way
        )

    def can_send(self, now: float) -> bool:
        """Whether there is anything that may go."""
        if not self._requests and not self._releases:
            return False
        apart = sum(batch.apart for batch in self._under_way)
        return any(
            self._may_go(lane, now, apart) for lanes in (self._requests, self._releases) for lane in lanes.values()
        )

    def next_job(self, now: float) -> Batch | None:
        """What is to be sent now, if anything may go: what has waited longest, and what can go with it."""
        apart = sum(batch.apart for batch in self._under_way)
        request = next((lane for lane in self._requests.values() if self._may_go(lane, now, apart)), None)
        release = next((lane for lane in self._releases.values() if self._may_go(lane, now, apart)), None)
        if request is not None and release is not None and release.number < request.number:
            # Unless there are requests on the same place.
            same = (lane for lane in self._requests.values() if lane.places == release.places and not lane.apart)
            request = None if release.apart else next(same, None)
        batch = Batch(self._courier)
        if request is not None:
            self._take_requests(batch, request)
            together = self._releases.get(request.places)
            if len(request.places) == 1 and not request.apart and together is not None and not together.apart:
                self._take_releases(batch, together)
        elif release is not None and release.apart:
            self._take_releases(batch, release)
        elif release is not None:
            for lane in list(self._releases.values()):
                if not lane.apart and len(batch.releases) < LARGEST_BATCH and self._places.isdisjoint(lane.places):
                    self._take_releases(batch, lane)
        if not batch.requests and not batch.releases:
            return None
        batch.apart = batch.lanes[0].apart
        self._under_way.add(batch)
        self.sent_at = batch.sent_at = now
        for lane in batch.lanes:
            self._places.update(lane.places)
        if _observer.is_on and batch.requests:
            _observer.sent(len(batch.requests))
        return batch

    def _may_go(self, lane: Lane, now: float, apart: int) -> bool:
        if lane.apart:
            if apart or lane.not_before > now:
                return False
        elif len(self._under_way) - apart >= BATCHES_AT_ONCE:
            return False
        return self._places.isdisjoint(lane.places)

    def _take_requests(self, batch: Batch, lane: Lane) -> None:
        """As many as fit. The rest goes behind all others."""
        del self._requests[lane.key]
        batch.lanes.append(lane)
        while lane.errands and len(batch.requests) < LARGEST_BATCH:
            request = lane.errands.popleft()
            assert isinstance(request, Request)
            if not request.given_up and not request.leaving and not request.answered:
                request.under_way = True
                batch.requests.append(request)
        if lane.errands:
            self._requests[lane.key] = lane

    def _take_releases(self, batch: Batch, lane: Lane) -> None:
        """As many as fit. The rest goes behind all others."""
        del self._releases[lane.key]
        batch.lanes.append(lane)
        while lane.errands and len(batch.releases) < LARGEST_BATCH:
            release = lane.errands.popleft()
            assert isinstance(release, Release)
            batch.releases.append(release)
        if lane.errands:
            self._releases[lane.key] = lane

    def over(self, batch: Batch) -> None:
        """A batch is no longer on its way."""
        self._under_way.discard(batch)
        if not self._under_way:
            self.sent_at = -math.inf
        for lane in batch.lanes:
            self._places.difference_update(lane.places)

    def met_a_lock(self, batch: Batch) -> None:
        """Those of a batch go again, after a pause, each lane by itself."""
        tries = 1 + max(lane.tries for lane in batch.lanes)
        not_before = time.monotonic() + min(0.02 * 2**tries, 1.0) * random.uniform(0.5, 1.0)
        for request in batch.requests:
            request.locked = True
            self.put(request)
        for release in batch.releases:
            self.put_release(release)
        for lanes in (self._requests, self._releases):
            for lane in lanes.values():
                if any(mine.places == lane.places for mine in batch.lanes):
                    lane.apart, lane.tries, lane.not_before = True, tries, not_before


class Batch:
    """One statement, and for whom it goes."""

    answers_within = ANSWERS_WITHIN

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self.lanes: list[Lane] = []
        self.requests: list[Request] = []
        self.releases: list[Release] = []
        self.apart = False
        self.sent_at = 0.0

    def statements(self, connection: Connection) -> list[tuple[Statement, Params]]:
        now = time.monotonic()
        requests = self.requests
        params: list[bytes | None] = []
        durable = b"t" if self._courier.durable else b"f"
        patience = self._patience(now)
        if self.releases:
            params += (_codec.ids(release.lease_id for release in self.releases), durable, patience)
        if not requests:
            return [(_sql.RELEASE, params)]
        kind = requests[0].kind
        again = False
        for request in requests:
            request.asked_at = now
            request.began_at = request.began_at or now
            request.maybe_there = True
            again = again or request.sent
        codec = connection.codec
        holders = ",".join([request.holder if codec is None else _as_encoded(request, codec) for request in requests])
        ids = _codec.ids(request.lease_id for request in requests)
        params += (
            *kind.head, _codec.encode(self.lanes[0].wait), *kind.between, ids, f"[{holders}]".encode(),
            b"t" if again else b"f", b"t" if kind.strict else b"f", self._courier.waiting.channel.encode(), durable,
            patience, b"t" if kind.clamp else b"f",
        )  # fmt: skip
        return [(_sql.RELEASE_AND_ACQUIRE if self.releases else _sql.ACQUIRE, params)]

    def _patience(self, now: float) -> bytes | None:
        """How long it waits for a lock; None: as long as contention takes."""
        if not self.requests or self.requests[0].kind.timeout is None:
            return None
        left = min(
            [
                (request.until - now if request.kind.timeout else PATIENCE)
                for request in self.requests
                if request.until is not None
            ],
            default=LOCK_WAIT,
        )
        return None if left >= LOCK_WAIT else str(max(left, 0.001)).encode()

    def done(self, courier: Courier, result: PGresult) -> None:
        """Hand out what came back."""
        courier.outbox.over(self)
        for lane in self.lanes:
            lane.apart, lane.tries, lane.not_before = False, 0, 0.0
        found = _codec.rows(result)
        if self.releases:
            ended = set(found[0][0])
            for release in self.releases:
                courier.released(release, not ended or release.lease_id not in ended)
        if self.requests:
            for row in found:
                self._hand_out(courier, row[-8:])

    def _hand_out(self, courier: Courier, row: Row) -> None:
        """What ``_acquire_batch`` answered to those from the first to the last."""
        first, last, status, fences, expires_at, ends_in, seconds, missing = row
        if missing:
            courier.warn_missing(missing)
        now = time.monotonic()
        some = seconds or [None]
        for nth, request in enumerate(self.requests[first - 1 : last]):
            request.under_way = False
            request.sent = True
            mine = some[min(nth, len(some) - 1)]
            if status == "granted":
                later = (mine or 0.0) - (some[0] or 0.0) if nth else 0.0
                courier.grant(
                    request,
                    # One limit, and each has the next.
                    fences if not nth or fences is None or fences[0] is None else [fences[0] + nth],
                    expires_at + timedelta(seconds=later) if later and expires_at is not None else expires_at,
                    request.asked_at + (ends_in or 0.0) + later,
                    now + mine if mine else 0.0,
                )
            else:
                courier.answer(request, status, mine)

    def failed(self, courier: Courier, error: BaseException, problem: PglimitsError) -> None:
        """It could not be sent, or the database refused it. What is safe to send again is."""
        courier.outbox.over(self)
        for request in self.requests:
            request.under_way = False
        if isinstance(problem, Busy):
            courier.outbox.met_a_lock(self)
            for request in self.requests:
                courier.look_at(request)
            return
        lost, again = False, False
        if isinstance(error, psycopg.Error):
            lost, again = is_lost(error, problem), may_go_again(error, problem)
        many = len(self.requests) + len(self.releases) > 1
        by_itself = many and _blames_one(problem)
        errands: list[Request | Release] = [*self.releases, *self.requests]
        for errand in errands:
            errand.unheard = errand.unheard or lost
            errand.tries += 1
            if by_itself:
                # Nothing was done, and only one of them need be to blame.
                errand.alone = True
            elif not again or errand.tries >= TRIES:
                errand.tries = 0
                if isinstance(errand, Request):
                    errand.sent = errand.sent or lost
                    courier.unavailable(errand, problem, error)
                else:
                    courier.release_failed(errand, problem, error)
                continue
            if isinstance(errand, Request):
                errand.sent = errand.sent or lost
                if not courier.look_at(errand):
                    courier.outbox.put(errand)
            else:
                courier.outbox.put_release(errand)


def _as_encoded(request: Request, codec: str) -> str:
    """A holder as a database in another encoding takes it: nobody fails for what nobody asked for."""
    if request.says_who:
        return request.holder
    return request.holder.encode(codec, "replace").decode(codec)


def _blames_one(problem: PglimitsError) -> bool:
    return not isinstance(problem, (LimiterUnavailable, NotInstalled, VersionMismatch, PermissionDenied))
