"""The courier: one thread for each database that a process uses, which does all I/O with it.

Callers, threads and tasks alike, hand it errands and wait for the answers. Interrupted, cancelled or dead, they leave
an errand that it gives back; no interrupt, cancellation, fork or closed loop ever strikes in the middle of a statement.
It sends batches, listens, calls in, renews, and releases, on two or three connections of its own; whatever can go over
another connection does so where one is lost, or is not to be had.

Callers take no lock: an errand is appended to a deque, and a byte wakes the thread. What is said here of ``self`` is
touched by the courier's thread alone, but for the inbox.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextlib
import copy
import heapq
import itertools
import logging
import math
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import psycopg
from psycopg.pq.abc import PGresult

from . import _codec, _sql
from ._batches import ANSWERS_WITHIN, Outbox
from ._database import Connection, NoAnswer, Source, may_go_again, translate
from ._leases import Lease, Leases, Orphan
from ._requests import Errand, Params, Query, Release, Request, User
from ._sql import Statement
from ._waiting import Beat, Renew, Waiting, Watch
from ._wake import Bell, ThreadWaker, Waker, wake_all
from .errors import (
    AcquireTimeout,
    LimiterUnavailable,
    LimitLocked,
    PglimitsError,
    QueueFull,
    ReadOnlyServer,
    VersionMismatch,
)

log = logging.getLogger("pglimits")

CONNECTIONS = 3
"""How many connections there are at most, beside those on which questions are under way."""
QUERIES_AT_ONCE = 4
"""Questions that may be under way at once: one may take long, or wait for a lock."""
_LINGER = 30.0
"""Seconds after which a connection that nobody needs is closed. One is kept."""
_TICK = 1.0
"""Seconds after which the courier looks round at the latest, while anybody counts on it."""
_GATHERS = 0.001
"""Seconds after the last batch was sent that the courier is not woken by what comes in, but by the answer."""
_OPENS_AGAIN_AFTER = 0.05
_GROWS_AGAIN_AFTER = 5.0
"""Seconds until it is tried again to open a connection: the first; one more."""
_RELEASES_AGAIN_AFTER = 1.0
_ENDS_WITHIN = 5.0
"""Seconds that closing waits for what is released at the end."""
_TRIES = 3


class Courier:
    """What a process needs for one database."""

    def __init__(self, source: Source, durable: bool) -> None:
        self.source = source
        self.durable = durable
        self.users: set[User] = set()
        self._warned: set[str] = set()
        self._parents: list[object] = []
        self._begin()
        _couriers.add(self)

    def _begin(self) -> None:
        self.pid = os.getpid()
        # What is to be done, and with what; or what nobody refers to any longer.
        self.inbox: deque[tuple[Callable[[Any], None], Any] | Orphan] = deque()
        self.ident = 0
        self._only = _thread.allocate_lock()
        self._runs = False
        self._asleep = False
        self._ended = False
        self._bell = Bell()
        self._poll: select.poll
        self.leases = Leases(self.inbox.append)
        self.waiting = Waiting(self)
        self.outbox = Outbox(self)
        self.urgent: deque[Beat | Watch | Renew] = deque()
        self._questions: deque[_Question] = deque()
        self._asking: set[Request] = set()
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._connections: dict[int, Connection] = {}
        self._opening = False
        self._opens_after = 0.0
        self._grows_after = 0.0
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._closing: list[_Closing] = []
        self._to_wake: list[Waker] = []
        self._looks_round_at = 0.0

    def forked(self) -> None:
        """Called in the child of a fork: the parent's thread, sockets and errands are not ours."""
        self._parents += [self._connections, self.inbox, self.leases, self.waiting, self.outbox]
        self._begin()

    # For callers, in any thread, at any moment.

    def put(self, what: Callable[[Any], None], errand: Errand) -> None:
        """Hand over an errand: one of the methods below. One that comes after the end is answered at once."""
        self.inbox.append((what, errand))
        self.poke()
        if self._ended:
            self._refuse_all()

    def poke(self) -> None:
        """Have the courier look into its inbox."""
        if not self._runs:
            _thread.start_new_thread(self._run, ())
        elif self._asleep:
            self._asleep = False
            self._bell.ring()

    def _refuse_all(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                item = self.inbox.popleft()
                if isinstance(item, tuple) and isinstance(item[1], Errand) and not item[1].answered:
                    item[1].error = _closed()
                    item[1].answered = True
                    if item[1].waker is not None:
                        wake_all([item[1].waker])

    def is_inside(self) -> bool:
        """Whether this is the courier's own thread, in which a finalizer may run: it cannot wait for itself."""
        return threading.get_ident() == self.ident and self._runs

    def is_needed(self) -> bool:
        """Whether there is anything to be ended."""
        return self._runs or bool(self.inbox)

    def shut(self) -> None:
        """Release what is held, and stop."""
        if self._runs and not self._ended:
            waker = ThreadWaker()
            self.put(self.end, Errand(waker, None))
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
            # Not before: gevent may have put its own in place since the fork.
            self._poll = select.poll()
            self._poll.register(self._bell.fd, select.POLLIN)
            for connection in self._connections.values():
                self._poll.register(connection.fd, connection.events)
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
                self._orphaned(item.subject)
            else:
                item[0](item[1])
        now = time.monotonic()
        self._do_what_is_due(now)
        self._send_all(now)
        # Only now: what goes out next is on its way before whoever is woken keeps the interpreter busy.
        if self._to_wake:
            to_wake, self._to_wake = self._to_wake, []
            wake_all(to_wake)
        seconds = self._idle_for(now)
        # While a batch is on its way that was sent just now, whatever comes in joins the next one: nobody need ring.
        busy = self.outbox.sent_at > now - _GATHERS
        if busy:
            seconds = min(seconds, _GATHERS)
        self._asleep = not busy
        if inbox or self._ended:
            seconds = 0.0
        events = self._poll.poll(None if seconds == math.inf else math.ceil(seconds * 1000))
        self._asleep = False
        for fd, event in events:
            if fd == self._bell.fd:
                self._bell.heard()
            elif (connection := self._connections.get(fd)) is not None:
                self._hear(connection, event)

    def _do_what_is_due(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        for connection in list(self._connections.values()):
            if connection.job is not None and connection.answers_by <= now:
                self._failed(connection, NoAnswer("the server did not answer"))
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

    def _idle_for(self, now: float) -> float:
        """For how many seconds there is nothing to do, as far as is known."""
        moments = [self.outbox.next_at(), self.leases.next_at()]
        if self._later:
            moments.append(self._later[0][0])
        if len(self.waiting) and self._find(now, listening=True) is not None:
            moments.append(self.waiting.next_at())
        for connection in self._connections.values():
            if connection.job is not None:
                moments.append(connection.answers_by)
        may_grow_at = self._grows_after if self._connections else self._opens_after
        if may_grow_at > now and not self._opening and self._wants_connection():
            moments.append(may_grow_at)
        if self._asking or self.leases or len(self._connections) > 1:
            moments.append(self._looks_round_at)
        moments += [closing.until for closing in self._closing]
        return max(min(moments) - now, 0.0)

    def _look_round(self, now: float) -> None:
        """What needs no haste: leases that have ended, loops that were closed, connections that nobody needs."""
        self.leases.lose_ended(now)
        closed = {loop for loop in self._loops if loop.is_closed()}
        if closed:
            self._loops -= closed
            for request in list(self._asking):
                if getattr(request.waker, "loop", None) in closed:
                    self.give_up(request)
            for lease in self.leases.all():
                task = None if lease._task is None else lease._task()
                if task is not None and not task.done() and task.get_loop() in closed:
                    lease._given_back = lease._lost = True
                    self.release(Release(None, None, lease.id, lease.places))
        for connection in list(self._connections.values()):
            unneeded = connection.job is None and now - connection.used_at > _LINGER
            if unneeded and len(self._connections) > 1 and not (connection.listens and len(self.waiting)):
                self._drop(connection)

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        """Have something done after a while."""
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._count), what))

    # Sending.

    def _send_all(self, now: float) -> None:
        while (self.urgent or self.waiting.next_at() <= now) and (free := self._free(now, listening=True)) is not None:
            job = self.urgent.popleft() if self.urgent else self.waiting.next_job(now)
            if job is None:
                break
            self._send(free, job, now)
        while self.outbox.can_send(now) and (free := self._free(now)) is not None:
            batch = self.outbox.next_job(now)
            if batch is None:
                break
            self._send(free, batch, now)
        while self._questions and self._questions_under_way() < QUERIES_AT_ONCE:
            free = self._free(now)
            if free is None:
                break
            self._send(free, self._questions.popleft(), now)
        if len(self.waiting) and not self.waiting.polls and not any(c.listens for c in self._connections.values()):
            self._listen(now)
        for connection in list(self._connections.values()):
            if connection.lent and connection.job is None:
                self._drop(connection)

    def _questions_under_way(self) -> int:
        return sum(isinstance(connection.job, _Question) for connection in self._connections.values())

    def _wants_connection(self) -> bool:
        if self._find(0.0, listening=True) is not None:
            return (
                bool(len(self.waiting))
                and not self.waiting.polls
                and not any(connection.listens for connection in self._connections.values())
            )
        return bool(self.urgent or self._questions or len(self.waiting)) or self.outbox.can_send(time.monotonic())

    def _find(self, now: float, listening: bool = False) -> Connection | None:
        """A connection that is free. The one that listens goes with what concerns waiters and leases; with others only
        where no further one is to be had."""
        other = None
        for connection in self._connections.values():
            if connection.job is None:
                if connection.listens is listening:
                    return connection
                other = connection
        if listening or (other is not None and now < self._grows_after):
            return other
        return None

    def _free(self, now: float, listening: bool = False) -> Connection | None:
        """A connection that is free; if there is none, another one is opened."""
        found = self._find(now, listening)
        if found is None:
            self._grow(now)
        return found

    def _grow(self, now: float, listens: bool = False) -> None:
        there = len(self._connections)
        may = there - self._questions_under_way() < CONNECTIONS and now >= self._grows_after
        if not self._opening and (may if there else now >= self._opens_after):
            self._opening = True
            _thread.start_new_thread(
                _open, (self.opened, self.inbox, self._bell, self.source, listens, self.waiting.channel)
            )

    def _listen(self, now: float) -> None:
        """Hear of grants: on a connection of its own, or, where there is none to be had, on any."""
        if now >= self._grows_after:
            self._grow(now, listens=True)
        elif (free := self._find(now, listening=True)) is not None and not free.pooled:
            free.listens = True
            self._send(free, _Listen(self.waiting.channel), now)

    def _send(self, connection: Connection, job: Any, now: float) -> None:
        try:
            connection.start(job, now)
        except Exception as error:
            self._failed(connection, error)
            return
        if connection.events != select.POLLIN:
            self._poll.modify(connection.fd, connection.events)

    def _hear(self, connection: Connection, event: int) -> None:
        """Take in what has come over a connection."""
        try:
            if event & select.POLLOUT:
                connection.flush()
                self._poll.modify(connection.fd, connection.events)
            result = connection.receive()
            if connection.listens:
                self._take_notifications(connection)
            if result is not None:
                job: Any = connection.job
                job.done(self, result)
                connection.job = None
        except Exception as error:
            self._failed(connection, error)

    def _take_notifications(self, connection: Connection) -> None:
        while (message := connection.pgconn.notifies()) is not None:
            with contextlib.suppress(UnicodeDecodeError):  # not one of ours
                self.waiting.notified(message.relname.decode(), message.extra.decode())

    def _failed(self, connection: Connection, error: Exception) -> None:
        """The statement that was under way on a connection failed, or the connection itself."""
        job: Any = connection.job
        connection.job = None
        if not isinstance(error, psycopg.Error):
            log.error("an error of pglimits itself", exc_info=error)
            error = psycopg.InternalError(f"{type(error).__name__}: {error}")
        problem = translate(error)
        if isinstance(problem, VersionMismatch) and connection.version:
            problem = VersionMismatch(f"{problem}; the database had pglimits {connection.version} before")
        goes_stale = isinstance(problem, (LimiterUnavailable, VersionMismatch)) and not error.sqlstate
        if isinstance(error, NoAnswer) or not connection.is_usable() or _is_stale(problem):
            self._drop(connection)
        if goes_stale or _is_stale(problem):
            # If one connection has gone stale, so have the others.
            for other in list(self._connections.values()):
                if other.job is None:
                    self._drop(other)
        if job is not None:
            job.failed(self, error, problem)

    def _drop(self, connection: Connection) -> None:
        if self._connections.pop(connection.fd, None) is not None:
            with contextlib.suppress(KeyError, OSError):
                self._poll.unregister(connection.fd)
        if connection.listens:
            self.waiting.look_again()
        connection.close()

    def opened(self, what: tuple[Connection | None, BaseException | None, bool]) -> None:
        """A connection was opened, or could not be; and whether LISTEN was found not to work on it."""
        connection, error, polls = what
        now = time.monotonic()
        self._opening = False
        if connection is not None:
            connection.used_at = now
            self._connections[connection.fd] = connection
            self._poll.register(connection.fd, select.POLLIN)
            if polls and not self.waiting.polls:
                self.waiting.polls = True
                log.warning(
                    "LISTEN does not work on this connection (a pooler in transaction mode?): polling instead. "
                    "Waiting works, but wake-ups take up to 100 ms"
                )
            if connection.listens or polls:
                self.waiting.look_again()
            return
        assert error is not None
        if self._connections:
            log.debug("no further connection is to be had: %s", error)
            self._grows_after = now + _GROWS_AGAIN_AFTER
            return
        self._opens_after = now + _OPENS_AGAIN_AFTER
        self._cannot_send(error, now)

    def _cannot_send(self, error: BaseException, now: float) -> None:
        """There is no connection: whatever waits for one has failed."""
        problem = translate(error)
        problem.__cause__ = error if error is not problem else None
        jobs: list[Any] = [*self.urgent, *self._questions]
        self.urgent.clear()
        self._questions.clear()
        if (job := self.waiting.next_job(now)) is not None:
            jobs.append(job)
        for job in jobs:
            job.failed(self, problem, problem)
        for errand in self.outbox.take_out():
            if isinstance(errand, Request):
                self.unavailable(errand, problem, error)
            else:
                self.release_failed(errand, problem, error)

    # What becomes of errands.

    def _answered(self, errand: Errand, error: PglimitsError | None = None, cause: BaseException | None = None) -> None:
        if error is not None:
            # Each its own: an exception that many raise gathers the tracebacks of all.
            errand.error = copy.copy(error)
            errand.error.__cause__ = error.__cause__ if cause is error else cause
        errand.answered = True
        if errand.waker is not None:
            self._to_wake.append(errand.waker)

    def _settle(self, request: Request, error: PglimitsError | None = None, cause: BaseException | None = None) -> None:
        self._asking.discard(request)
        if not request.answered:
            self._answered(request, error, cause)

    def ask(self, request: Request) -> None:
        """Send a request, or send it again."""
        if self.look_at(request):
            return
        if request not in self._asking:
            self._asking.add(request)
            loop = getattr(request.waker, "loop", None)
            if loop is not None:
                self._loops.add(loop)
        self.outbox.put(request)

    def look_at(self, request: Request) -> bool:
        """Whether a request is not to be sent any more."""
        if request.given_up:
            self._give_back(request)
        elif request.leaving:
            self.leave(request)
        elif request.user is not None and request.user.closed and not request.answered:
            self._settle(request, _closed())
            self._give_back(request)
        return request.given_up or request.answered or request.leaving

    def grant(
        self,
        request: Request,
        fences: Sequence[int | None] | None,
        expires_at: datetime | None,
        ends: float,
        goes_at: float,
        *,
        claimed: bool = True,
    ) -> None:
        """The database has granted a request."""
        if request.given_up or request.answered:
            self._give_back(request)
            return
        kind = request.kind
        enforced = expires_at is not None and not kind.for_rate
        duration = kind.lease_duration
        lease = Lease(
            request.lease_id,
            kind.places,
            tuple(fences) if fences is not None else (None,) * len(kind.places),
            enforced,
            self.pid,
            expires_at if enforced else None,
            ends,
            duration,
            duration / 3,
            not claimed,
            request.user,
            request.task,
        )
        if enforced and request.renew:
            self.leases.add(lease, ends - duration if claimed else time.monotonic())
        request.lease = lease
        request.goes_at = goes_at
        self._settle(request)

    def answer(self, request: Request, status: str, seconds: float | None) -> None:
        """The database has answered something else: queued, refused, full, or unlimited."""
        request.locked = False
        if status == "queued":
            if not self.look_at(request):
                self.waiting.add(request, seconds)
            return
        request.maybe_there = False
        if request.given_up or request.answered:
            return
        if status == "unlimited":
            self._let_in(request)
        elif status == "full":
            self._settle(request, QueueFull(f"the line of {request.kind.named} is as long as its max_waiters allows"))
        else:
            self._settle(request, _refusal(request, seconds))

    def _let_in(self, request: Request) -> None:
        kind = request.kind
        request.lease = Lease(
            request.lease_id, kind.places, (None,) * len(kind.places), False, self.pid, _task=request.task
        )
        self._settle(request)

    def unavailable(self, request: Request, problem: PglimitsError, cause: BaseException | None = None) -> None:
        """A request has failed, as the database says so or could not be asked."""
        if self.look_at(request):
            return
        if isinstance(problem, LimiterUnavailable) and request.on_unavailable == "wait":
            pause = request.pause if request.until is None else min(request.pause, request.until - time.monotonic())
            request.pause = min(request.pause * 2, 2.0)
            self.later(max(pause, 0.001), lambda: self.ask(request))
            return
        if isinstance(problem, LimiterUnavailable) and request.on_unavailable == "allow":
            log.warning("%s not enforced: %s", request.kind.named, problem)
            self._let_in(request)
        else:
            self._settle(request, problem, cause)
        self._give_back(request, 1.0 if isinstance(problem, LimiterUnavailable) else 0.0)

    def _give_back(self, request: Request, again_after: float = 0.0) -> None:
        """Release whatever the database may have of a request."""
        if request.maybe_there:
            request.maybe_there = False
            again_after = 1.0 if request.unheard else again_after
            self.release(Release(None, None, request.lease_id, request.kind.places, again_after=again_after))

    def give_up(self, request: Request) -> None:
        """Nobody waits for a request any longer. If it is under way, what it gets is given back then."""
        request.given_up = True
        self._asking.discard(request)
        self.waiting.remove(request)
        if request.lease is not None:
            request.maybe_there = request.lease.enforced or request.kind.for_rate
            request.lease = None
        if not request.under_way:
            self._give_back(request)

    def leave(self, request: Request) -> None:
        """The time of a request is over. Once it has left its line, its caller is told."""
        if request.answered or request.given_up:
            return
        if request.on_unavailable == "allow" and (not self._connections or self.outbox.is_silent(request.kind.places)):
            self.unavailable(request, LimiterUnavailable("the database has not answered in time"))
            return
        # From now on it is sent no more. What is under way decides.
        request.leaving = True
        if request.under_way:
            return
        self.waiting.remove(request)
        if request.locked or self.outbox.is_locked(request.kind.places):
            self._give_back(request)
            kind = request.kind
            self.ask_query(
                Query(None, None, _sql.LOCKED_BY, (kind.head[0], kind.head[2]), partial(self._is_locked, request))
            )
        elif request.maybe_there:
            request.maybe_there = False
            again_after = 1.0 if request.unheard else 0.0
            then = partial(self._settle, request, request.late())
            self.release(Release(None, None, request.lease_id, request.kind.places, None, again_after, then))
        else:
            self._settle(request, request.late())

    def _is_locked(self, request: Request, result: PGresult) -> None:
        """The time of a request is over, and somebody keeps its limits locked."""
        found = _codec.rows(result)
        by = found[0][0] if found and found[0][0] else "somebody"
        said = f"{request.kind.named} could not be had in time: an open transaction keeps it locked: {by}"
        self._settle(request, LimitLocked(said))

    def _orphaned(self, subject: Any) -> None:
        """Nobody refers any longer to a lease, or to a request."""
        if isinstance(subject, Request):
            if not subject.answered or subject.lease is not None:
                self.give_up(subject)
            return
        lease_id, places = subject
        if self.leases.remove(lease_id):
            self.release(Release(None, None, lease_id, places))

    def release(self, release: Release) -> None:
        """Give back a lease or a place in line."""
        lease = release.lease
        if lease is not None and not lease._lost and time.monotonic() >= lease._ends:
            # Its time is over, and the renewal may not have noticed yet.
            self.leases.lose(lease, "it was not renewed in time")
        self.leases.remove(release.lease_id, lease._pause if lease is not None else None)
        if release.again_after:
            again = Release(None, None, release.lease_id, release.places)
            self.later(release.again_after, lambda: self.release(again))
        self.outbox.put_release(release)

    def released(self, release: Release, live: bool) -> None:
        """The database has answered a release."""
        # Where this is a repetition, and nothing else speaks against it, the first time has released it.
        lost = release.lease is not None and release.lease._lost
        release.live = live or (release.unheard and not lost)
        self._answered(release)
        if release.then is not None:
            release.then()

    def release_failed(self, release: Release, problem: PglimitsError, cause: BaseException | None = None) -> None:
        """It could not be released. What is ours is tried again."""
        if release.is_foreign:
            self._answered(release, problem, cause)
            return
        if release.waker is not None:
            if isinstance(problem, LimiterUnavailable):
                log.warning("the lease %s could not be released yet, trying on: %s", release.lease_id, problem)
                self._answered(release)
            else:
                self._answered(release, problem, cause)
        else:
            self._answered(release)
        if release.then is not None:
            release.then()
        again = Release(None, None, release.lease_id, release.places)
        self.later(_RELEASES_AGAIN_AFTER, lambda: self.release(again))

    def ask_query(self, query: Query) -> None:
        """Ask a question."""
        if query.user is not None and query.user.closed:
            self._answered(query, _closed())
            return
        self._questions.append(_Question(query))

    def asked(self, query: Query, result: PGresult) -> None:
        """The database has answered a question."""
        query.result = result
        if query.then is not None:
            query.then(result)
        self._answered(query)

    def query_failed(self, query: Query, error: BaseException, problem: PglimitsError) -> None:
        """A question was not answered."""
        query.tries += 1
        if query.tries < _TRIES and isinstance(error, psycopg.Error) and may_go_again(error, problem):
            self._questions.append(_Question(query))
            return
        self._answered(query, problem, error)

    def warn_missing(self, missing: list[str]) -> None:
        """Say once that there is no limit of a name."""
        for name in missing:
            if name not in self._warned:
                self._warned.add(name)
                log.warning("there is no limit named %r: it is not enforced", name)

    # The end.

    def end(self, close: Errand) -> None:
        """Release what a limiter holds, or all; fail its requests."""
        user = close.user
        releases, leases = [], []
        for request in [each for each in self._asking if user is None or each.user is user]:
            self.waiting.remove(request)
            if request.maybe_there and not request.under_way:
                request.maybe_there = False
                releases.append(Release(None, None, request.lease_id, request.kind.places))
            request.given_up = True
            self._settle(request, _closed())
        for lease in self.leases.all():
            if user is None or lease._user is user:
                self.leases.remove(lease.id)
                lease._given_back = lease._lost = True
                leases.append(lease)
                releases.append(Release(None, None, lease.id, lease.places))
        if user is None:
            for errand in self.outbox.take_out():
                if isinstance(errand, Release):
                    releases.append(errand)
            while self._later:  # releases that are to be tried again
                heapq.heappop(self._later)[2]()
        for release in releases:
            self.outbox.put_release(release)
        self._closing.append(_Closing(close, releases, leases, time.monotonic() + _ENDS_WITHIN))

    def _end(self, closing: _Closing) -> None:
        """All is released. Whoever is at work under one of the leases is told only now: it may be what closes."""
        for lease in closing.leases:
            lease._tell()
        self._answered(closing.close)
        if closing.close.user is None:
            self._ended = True
            for connection in list(self._connections.values()):
                self._drop(connection)
            wake_all(self._to_wake)
            self._refuse_all()


def _is_stale(problem: PglimitsError) -> bool:
    """Whether connections are of no more use: what they have prepared was made for what was there before, or they lead
    to a server that is read-only, and another may lead to the primary."""
    return isinstance(problem, (ReadOnlyServer, VersionMismatch))


def _closed() -> LimiterUnavailable:
    return LimiterUnavailable("the limiter has been closed")


def _refusal(request: Request, seconds: float | None) -> AcquireTimeout:
    said = f"no slot of {request.kind.named} "
    said += f"within {request.kind.timeout:g} s" if request.kind.timeout else "is free"
    if seconds is not None:
        said += f"; it could be had in {seconds:.3f} s"
    error = AcquireTimeout(said)
    error.retry_after = seconds
    return error


@dataclass(frozen=True, slots=True)
class _Closing:
    """What is released, and lost, as a limiter is closed."""

    close: Errand
    releases: list[Release]
    leases: list[Lease]
    until: float


class _Question:
    """A query, on its way."""

    answers_within = math.inf

    def __init__(self, query: Query) -> None:
        self._query = query

    def statements(self, connection: Connection) -> list[tuple[Statement, Params]]:
        asked = (self._query.statement, self._query.params)
        if self._query.statement in _sql.MEET_ALL_KEYS:
            return [(_sql.COMMIT, ()), asked, (_sql.BEGIN, ())]
        return [asked]

    def done(self, courier: Courier, result: PGresult) -> None:
        courier.asked(self._query, result)

    def failed(self, courier: Courier, error: BaseException, problem: PglimitsError) -> None:
        courier.query_failed(self._query, error, problem)


class _Listen:
    """Has a connection that also does other things hear of grants."""

    answers_within = ANSWERS_WITHIN

    def __init__(self, channel: str) -> None:
        self._channel = channel

    def statements(self, connection: Connection) -> list[tuple[Statement, Params]]:
        return [(Statement(f"listen {self._channel}".encode()), ())]

    def done(self, courier: Courier, result: PGresult) -> None:
        courier.waiting.look_again()

    def failed(self, courier: Courier, error: BaseException, problem: PglimitsError) -> None:
        log.debug("LISTEN failed: %s", error)


def _open(
    then: Callable[[Any], None], inbox: deque[Any], bell: Bell, source: Source, listens: bool, channel: str
) -> None:
    """Open a connection, in a thread of its own: it may take long, and run the app's code."""
    try:
        connection = source.open()
        polls = False
        if listens:
            try:
                polls = not _hears(connection, source, channel)
                if not polls:
                    connection.execute(Statement(f"listen {channel}".encode()))
                    connection.listens = True
            except BaseException:
                connection.close()
                raise
        inbox.append((then, (connection, None, polls)))
    except BaseException as error:
        inbox.append((then, (None, error, False)))
    bell.ring()


def _hears(connection: Connection, source: Source, channel: str) -> bool:
    """Whether notifications come: without a pooler they do.

    Behind one it is tried on a channel that is used for nothing else: a pooler in transaction mode leaves the LISTEN in
    a session of the server, and what that hears goes to whoever has it then.
    """
    if not connection.pooled:
        return True
    if connection.lent:
        return False
    trial = f"{channel}_trial"
    connection.execute(Statement(f"listen {trial}".encode()))
    # From another connection: on one and the same, it may seem to let it through.
    other = source.open()
    try:
        other.execute(Statement(b"select pg_notify($1, '')"), [trial.encode()])
    finally:
        other.close()
    return connection.hears_within(1.0)


_couriers: weakref.WeakSet[Courier] = weakref.WeakSet()
_shared: dict[tuple[str, bool], Courier] = {}
_shared_lock = threading.Lock()


def courier_for(conninfo: str, durable: bool, user: User) -> Courier:
    """The courier for a database, shared by all limiters of this process that ask for the same."""
    with _shared_lock:
        courier = _shared.get((conninfo, durable))
        if courier is None:
            courier = _shared[conninfo, durable] = Courier(Source(conninfo), durable)
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
        with contextlib.suppress(Exception):
            courier.shut()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
