"""The courier: one thread for each database that a process uses, which does all I/O with it.

Callers, threads and tasks alike, hand it errands and wait for the answers. Interrupted, cancelled or dead, they leave
an errand that it gives back; no interrupt, cancellation, fork or closed loop ever strikes in the middle of a statement.
It sends batches, listens, calls in, renews, and releases, on two or three connections of its own; whatever can go over
another connection does so where one is lost, or is not to be had.

Callers take no lock: an errand is appended to a deque, and a byte wakes the thread. All else here is touched by the
courier's thread alone.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextlib
import heapq
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from . import _observer
from ._batches import Batch, Outbox
from ._connections import Connections
from ._database import Source, translate
from ._errands import Errands, Question, closed
from ._leases import Lease, Leases, Orphan
from ._requests import Errand, Release, Request, User
from ._waiting import Beat, Renew, Waiting, Watch
from ._wake import Bell, TaskWaker, ThreadWaker, Waker, wake_all

log = logging.getLogger("pglimits")

QUESTIONS_AT_ONCE = 4
"""Questions that may be under way at once: one may take long, or wait for a lock."""
_TICK = 1.0
"""Seconds after which the courier looks round at the latest, while anybody counts on it."""
_GATHERS = 0.001
"""Seconds after the last batch was sent that the courier is not woken by what comes in, but by the answer."""
_ENDS_WITHIN = 5.0
"""Seconds that closing waits for what is released at the end."""


class Courier(Errands):
    """What a process needs for one database."""

    def __init__(self, source: Source, durable: bool) -> None:
        self.source = source
        self.durable = durable
        self.users: set[User] = set()
        self._parents: list[object] = []
        self._begin()
        _couriers.add(self)

    def _begin(self) -> None:
        super().__init__()
        self.pid = os.getpid()
        # What is to be done, and with what; or what nobody refers to any longer.
        self.inbox: deque[tuple[Callable[[Any], None], Any] | Orphan] = deque()
        self.bell = Bell()
        self.connections = Connections(self)
        self.leases = Leases(self.inbox.append)
        self.waiting = Waiting(self)
        self.outbox = Outbox(self)
        self.urgent: deque[Beat | Watch | Renew] = deque()
        self.questions: deque[Question] = deque()
        self.asking: set[Request] = set()
        self.to_wake: list[Waker] = []
        self.ident = 0
        self._only = _thread.allocate_lock()
        self._runs = False
        self._asleep = False
        # How often it has slept, and for which of these it was rung.
        self._nap = self._rung = 0
        self._ended = False
        # It is about to end: nobody is let in any more.
        self.closes = False
        # The interpreter is about to end, too.
        self.exits = False
        self._closing: list[_Closing] = []
        self.loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._looks_round_at = 0.0

    def forked(self) -> None:
        """Called in the child of a fork: the parent's thread, sockets and errands are not ours."""
        self._parents += [self.connections, self.inbox, self.leases, self.waiting, self.outbox]
        self._begin()

    # For callers, in any thread, at any moment.

    def put(self, what: Callable[[Any], None], errand: Errand) -> None:
        """Hand over an errand, and which method takes it. One that comes after the end is answered at once."""
        self.inbox.append((what, errand))
        self.poke()
        if self._ended:
            self._refuse_all()

    def poke(self) -> None:
        """Have the courier look into its inbox."""
        if not self._runs:
            _thread.start_new_thread(self._run, ())
        elif self._asleep and self._rung != (nap := self._nap):
            # Once for each time that it sleeps: with every ring, it might get the interpreter before others who are
            # at it have put theirs in. Rather once too often: an interrupt that strikes in between does no harm.
            self.bell.ring()
            self._rung = nap

    def _refuse_all(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                item = self.inbox.popleft()
                subject = item[1] if isinstance(item, tuple) else None
                if isinstance(subject, Errand):
                    self._refuse(subject)
                elif isinstance(subject, tuple) and subject[0] is not None:
                    subject[0].close()  # a connection that comes too late

    def _refuse(self, errand: Errand) -> None:
        if not errand.answered and not self.exits:
            errand.error = closed()
            errand.answered = True
            if errand.waker is not None:
                wake_all([errand.waker])

    def has_opened(self) -> None:
        """There is news of a connection in the inbox. Called by the thread that opens it."""
        self.bell.ring()
        if self._ended:
            self._refuse_all()

    def is_inside(self) -> bool:
        """Whether this is a thread of the courier's, in which a finalizer may run: it cannot wait for itself."""
        mine = threading.get_ident()
        return (mine == self.ident and self._runs) or mine in self.connections.openers

    def is_needed(self) -> bool:
        """Whether there is anything to be ended."""
        return self._runs or bool(self.inbox)

    def shut(self) -> None:
        """Release what is held, and stop."""
        if self._runs and not self._ended:
            waker = ThreadWaker()
            self.put(self.end, Errand(waker=waker))
            until = time.monotonic() + _ENDS_WITHIN + 1.0
            while self._runs and not self._ended and (left := until - time.monotonic()) > 0:
                waker.wait(min(left, 0.5))
        self._ended = True
        self._refuse_all()
        _couriers.discard(self)

    # The thread.

    def _run(self) -> None:
        if not self._only.acquire(blocking=False):
            return
        try:
            self.ident = threading.get_ident()
            self.connections.begin(self.bell.fd)
            self._runs = True
            while not self._ended:
                try:
                    self._turn()
                except Exception:
                    log.exception("an error of pglimits itself")
                    time.sleep(0.1)
        finally:
            self._runs = False
            self._only.release()

    def _turn(self) -> None:
        inbox = self.inbox
        while inbox and not self._ended:
            item = inbox.popleft()
            if isinstance(item, Orphan):
                self.orphaned(item.subject)
            else:
                item[0](item[1])
        now = time.monotonic()
        self._do_what_is_due(now)
        self._send_all(now)
        # Only now: what goes out next is on its way before whoever is woken keeps the interpreter busy.
        if self.to_wake:
            to_wake, self.to_wake = self.to_wake, []
            wake_all(to_wake)
        seconds = max(self._next_moment(now) - now, 0.0)
        # While a batch is on its way that was sent just now, whatever comes in joins the next one: nobody need ring.
        busy = self.outbox.sent_at > now - _GATHERS
        if busy:
            seconds = min(seconds, _GATHERS)
        if not busy:
            self._nap += 1
            self._asleep = True
        if inbox or self._ended:
            seconds = 0.0
        self.connections.wait(seconds)
        self._asleep = False

    def _do_what_is_due(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        self.connections.fail_overdue(now)
        if self.leases.next_at() <= now and (due := self.leases.take_due(now)):
            self.urgent.append(Renew(due))
        if now >= self._looks_round_at:
            self._looks_round_at = now + _TICK
            self._look_round(now)
        for closing in list(self._closing):
            over = all(release.answered for release in closing.releases)
            if (over and (closing.close.user is not None or self.outbox.is_empty())) or now >= closing.until:
                self._closing.remove(closing)
                self._end(closing)

    def _send_all(self, now: float) -> None:
        connections, waiting = self.connections, self.waiting
        while self.urgent or waiting.next_at() <= now:
            free = connections.free(now, listening=True)
            job = None if free is None else self.urgent.popleft() if self.urgent else waiting.next_job(now)
            if free is None or job is None:
                break
            connections.send(free, job, now)
        while self.outbox.can_send(now):
            free = connections.free(now)
            if free is None:
                break
            if (batch := self.outbox.next_job(now)) is not None:
                connections.send(free, batch, now)
        while self.questions and connections.questions_under_way() < QUESTIONS_AT_ONCE:
            free = connections.free(now)
            if free is None:
                break
            connections.send(free, self.questions.popleft(), now)
        if self.is_to_listen():
            connections.listen(now)
        connections.give_back_lent()

    def is_to_listen(self) -> bool:
        """Whether somebody waits, and no connection hears of grants though one may."""
        return len(self.waiting) > 0 and not self.waiting.polls and not self.connections.listens()

    def _next_moment(self, now: float) -> float:
        """When there is something to do, as far as is known."""
        free = self.connections.find(0.0, listening=True)
        wants_one = self.is_to_listen() if free is not None else self._waits_for_connection(now)
        moments = [self.outbox.next_at(), self.leases.next_at(), self.connections.next_at(now, wants_one)]
        if self._later:
            moments.append(self._later[0][0])
        if free is not None:
            moments.append(self.waiting.next_at())
        if self.asking or self.leases or len(self.connections) > 1:
            moments.append(self._looks_round_at)
        moments += [closing.until for closing in self._closing]
        return min(moments)

    def _waits_for_connection(self, now: float) -> bool:
        return bool(self.urgent or self.questions or len(self.waiting)) or self.outbox.can_send(now)

    def _look_round(self, now: float) -> None:
        """What needs no haste: leases that have ended, loops that were closed, connections that nobody needs."""
        self.leases.lose_ended(now)
        self.connections.look_round(now)
        ended = {loop for loop in self.loops if loop.is_closed()}
        if not ended:
            return
        self.loops -= ended
        for request in list(self.asking):
            if isinstance(request.waker, TaskWaker) and request.waker.loop in ended:
                self.give_up(request)
        for lease in self.leases.all():
            task = None if lease._task is None else lease._task()
            if task is not None and not task.done() and task.get_loop() in ended:
                lease._given_back = lease._lost = True
                self.release(Release(lease.id, lease.places))

    def cannot_send(self, error: BaseException, now: float) -> None:
        """There is no connection: whatever waits for one has failed."""
        problem = translate(error)
        problem.__cause__ = error if error is not problem else None
        jobs: list[Any] = [*self.urgent, *self.questions]
        self.urgent.clear()
        self.questions.clear()
        if (job := self.waiting.next_job(now)) is not None:
            jobs.append(job)
        for job in jobs:
            job.failed(self, problem, problem)
        for errand in self.outbox.take_out():
            if isinstance(errand, Request):
                self.unavailable(errand, problem, error)
            else:
                self.release_failed(errand, problem, error)

    # The end.

    def end(self, close: Errand) -> None:
        """Release what a limiter holds, or all; fail its requests."""
        user = close.user
        self.closes = self.closes or user is None
        releases, leases = [], []
        for request in [each for each in self.asking if user is None or each.user is user]:
            self.waiting.remove(request)
            if request.maybe_there and not request.under_way:
                request.maybe_there = False
                releases.append(Release(request.lease_id, request.kind.places))
            request.given_up = True
            self._settle(request, closed())
        for lease in self.leases.all():
            if user is None or lease._user is user:
                self.leases.remove(lease.id)
                _observer.ended(lease.id)
                lease._given_back = lease._lost = True
                leases.append(lease)
                releases.append(Release(lease.id, lease.places))
        if user is None:
            for errand in self.outbox.take_out():
                if isinstance(errand, Release):
                    releases.append(errand)
            while self._later:  # releases that are to be tried again
                heapq.heappop(self._later)[2]()
        for release in releases:
            self.outbox.put_release(release)
        self._closing.append(_Closing(close, releases, leases, time.monotonic() + _ENDS_WITHIN))

    def _left(self) -> list[Errand]:
        """What has not been answered by the end."""
        jobs: list[Any] = [*self.questions, *self.connections.jobs()]
        left: list[Errand] = [job.query for job in jobs if isinstance(job, Question)]
        left += [release for job in jobs if isinstance(job, Batch) for release in job.releases]
        return [*left, *self.outbox.take_out()]

    def _end(self, closing: _Closing) -> None:
        """All is released. Whoever is at work under one of the leases is told only now: it may be what closes."""
        for lease in closing.leases:
            lease._tell()
        self._answered(closing.close)
        if closing.close.user is None:
            self._ended = True
            for errand in self._left():
                self._refuse(errand)
            self.connections.close()
            wake_all(self.to_wake)
            self._refuse_all()


@dataclass(frozen=True, slots=True)
class _Closing:
    """What is released, and lost, as a limiter is closed."""

    close: Errand
    releases: list[Release]
    leases: list[Lease]
    until: float


_couriers: weakref.WeakSet[Courier] = weakref.WeakSet()
_shared: dict[tuple[Hashable, bool], Courier] = {}
_shared_lock = threading.Lock()


def courier_for(source: Source, durable: bool, user: User) -> Courier:
    """The courier for a database, shared by all limiters of this process that have the same DSN, pool or function."""
    with _shared_lock:
        courier = _shared.get((source.key, durable))
        if courier is None:
            courier = _shared[source.key, durable] = Courier(source, durable)
        courier.users.add(user)
        return courier


def forget(courier: Courier, user: User) -> bool:
    """One user less. Whether it was the last one: then the courier serves nobody any more."""
    with _shared_lock:
        courier.users.discard(user)
        last = not courier.users
        for key in [key for key, each in _shared.items() if last and each is courier]:
            del _shared[key]
    return last


def _after_fork() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()
    for courier in list(_couriers):
        courier.forked()


def _at_exit() -> None:
    for courier in list(_couriers):
        courier.exits = True
        with contextlib.suppress(Exception):
            courier.shut()
        courier.exits = False  # what is still called at exit after this hears that the limiter has been closed


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
