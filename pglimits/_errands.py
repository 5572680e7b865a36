"""What becomes of errands: requests, releases and questions, from their arrival to their answers.

All of it happens in the courier's thread.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq.abc import PGresult

from . import _codec, _observer, _sql
from ._batches import Outbox
from ._database import TRIES, Connection, may_go_again
from ._leases import Leases
from ._requests import Errand, Params, Query, Release, Request
from ._sql import Statement
from ._waiting import Waiting
from ._wake import TaskWaker, Waker
from .errors import AcquireTimeout, LimiterUnavailable, LimitLocked, PglimitsError, QueueFull

if TYPE_CHECKING:
    import asyncio
    import weakref

    from ._connections import Connections

log = logging.getLogger("pglimits")

_WARNS_OF = 10_000
"""Names of limits that are missing, of which each is told once."""


class Errands:
    """The errands that the courier has taken on."""

    pid: int
    leases: Leases
    waiting: Waiting
    outbox: Outbox
    questions: deque[Question]
    asking: set[Request]
    closes: bool
    exits: bool
    connections: Connections
    # Those whose tasks count on the courier.
    loops: weakref.WeakSet[asyncio.AbstractEventLoop]
    to_wake: list[Waker]

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._later: list[tuple[float, int, Callable[[], Any]]] = []
        self._count = itertools.count()

    def later(self, seconds: float, what: Callable[[], Any]) -> None:
        """Have something done after a while."""
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._count), what))

    def _answered(self, errand: Errand, error: PglimitsError | None = None, cause: BaseException | None = None) -> None:
        if error is not None and self.exits:
            return  # only daemon threads can wait by now: what they write as the interpreter ends may abort it
        if error is not None:
            # Each its own: an exception that many raise gathers the tracebacks of all.
            errand.error = copy.copy(error)
            errand.error.__cause__ = error.__cause__ if cause is error else cause
        errand.answered = True
        if errand.waker is not None:
            self.to_wake.append(errand.waker)

    def _settle(
        self,
        request: Request,
        error: PglimitsError | None = None,
        cause: BaseException | None = None,
        result: _observer.Result = "granted",
    ) -> None:
        self.asking.discard(request)
        if not request.answered:
            self._answered(request, error, cause)
            if request.asked is not None:
                _observer.answered(request, error, result)

    def ask(self, request: Request) -> None:
        """Send a request, or send it again."""
        if self.look_at(request):
            return
        if request not in self.asking:
            self.asking.add(request)
            if isinstance(request.waker, TaskWaker):
                self.loops.add(request.waker.loop)
        self.outbox.put(request)

    def _is_closed_to(self, errand: Errand) -> bool:
        return self.closes or (errand.user is not None and errand.user.closed)

    def look_at(self, request: Request) -> bool:
        """Whether a request is not to be sent any more."""
        if request.given_up:
            self._give_back(request)
        elif request.leaving:
            self.leave(request)
        elif self._is_closed_to(request) and not request.answered:
            self._settle(request, closed())
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
        lease = request.made(
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
            if request.asked is not None:
                _observer.granted(request, lease)
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
            self._let_in(request, "unlimited")
        elif status == "full":
            self._settle(request, QueueFull(f"the line of {request.kind.named} is as long as its max_waiters allows"))
        else:
            self._settle(request, _refusal(request, seconds))

    def _let_in(self, request: Request, result: _observer.Result) -> None:
        kind = request.kind
        request.lease = request.made(
            request.lease_id, kind.places, (None,) * len(kind.places), False, self.pid, _task=request.task
        )
        self._settle(request, result=result)

    def unavailable(self, request: Request, problem: PglimitsError, cause: BaseException | None = None) -> None:
        """A request has failed, as the database says so or could not be asked."""
        if self.look_at(request):
            return
        if isinstance(problem, LimiterUnavailable) and request.on_unavailable == "wait":
            pause = request.pause if request.until is None else min(request.pause, request.until - time.monotonic())
            request.pause = min(request.pause * 2, 2.0)
            self.later(max(pause, 0.02), lambda: self.ask(request))
            return
        if isinstance(problem, LimiterUnavailable) and request.on_unavailable == "allow":
            log.warning("%s not enforced: %s", request.kind.named, problem)
            self._let_in(request, "unavailable")
        else:
            self._settle(request, problem, cause)
        self._give_back(request, 1.0 if isinstance(problem, LimiterUnavailable) else 0.0)

    def _give_back(self, request: Request, again_after: float = 0.0) -> None:
        """Release whatever the database may have of a request."""
        if request.maybe_there:
            request.maybe_there = False
            again_after = 1.0 if request.unheard else again_after
            self.release(Release(request.lease_id, request.kind.places, again_after=again_after))

    def give_up(self, request: Request) -> None:
        """Nobody waits for a request any longer. If it is under way, what it gets is given back then."""
        request.given_up = True
        if request.asked is not None:
            _observer.answered(request, request.late() if request.leaving else None, "cancelled")
        self.asking.discard(request)
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
        if request.on_unavailable == "allow" and (
            not self.connections.are_reachable() or self.outbox.is_silent(request.kind.places)
        ):
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
            self.ask_query(Query(_sql.LOCKED_BY, (kind.head[0], kind.head[2]), partial(self._is_locked, request)))
        elif not request.began_at and not request.kind.timeout and request.on_unavailable == "raise":
            self._settle(request, LimiterUnavailable("there was no connection to the database in time"))
        elif request.maybe_there:
            request.maybe_there = False
            again_after = 1.0 if request.unheard else 0.0
            then = partial(self._settle, request, request.late())
            self.release(Release(request.lease_id, request.kind.places, None, again_after, then))
        else:
            self._settle(request, request.late())

    def _is_locked(self, request: Request, result: PGresult) -> None:
        """The time of a request is over, and somebody keeps its limits locked."""
        ((by,),) = _codec.rows(result)
        if by is None:  # it has ended by now
            self._settle(request, request.late())
            return
        said = f"{request.kind.named} could not be had in time: an open transaction keeps it locked: {by}"
        self._settle(request, LimitLocked(said))

    def orphaned(self, subject: Any) -> None:
        """Nobody refers any longer to a lease, or to a request."""
        if isinstance(subject, Request):
            if not subject.answered or subject.lease is not None:
                self.give_up(subject)
            return
        lease_id, places = subject
        if self.leases.remove(lease_id):
            self.release(Release(lease_id, places))

    def release(self, release: Release) -> None:
        """Give back a lease or a place in line."""
        lease = release.lease
        if lease is not None and not lease._lost and time.monotonic() >= lease._ends:
            # Its time is over, and the renewal may not have noticed yet.
            self.leases.lose(lease, "it was not renewed in time")
        self.leases.remove(release.lease_id, lease._pause if lease is not None else None)
        if _observer.held:
            _observer.ended(release.lease_id)
        if release.again_after:
            again = Release(release.lease_id, release.places)
            self.later(release.again_after, lambda: self.release(again))
        self.outbox.put_release(release)

    def released(self, release: Release, live: bool) -> None:
        """The database has answered a release."""
        # Where this is a repetition, and nothing else speaks against it, the first time has released it.
        lost = release.lease is not None and release.lease._lost
        release.live = live or (release.unheard and not lost)
        if release.lease is not None and not release.live and not lost:
            _observer.lost(release.lease)
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
        again = Release(release.lease_id, release.places, pause=min(release.pause * 2, 30.0))
        self.later(release.pause, lambda: self.release(again))

    def ask_query(self, query: Query) -> None:
        """Ask a question."""
        if self._is_closed_to(query):
            self._answered(query, closed())
            return
        self.questions.append(Question(query))

    def asked(self, query: Query, result: PGresult) -> None:
        """The database has answered a question."""
        query.result = result
        if query.then is not None:
            query.then(result)
        self._answered(query)

    def query_failed(self, query: Query, error: BaseException, problem: PglimitsError) -> None:
        """A question was not answered."""
        query.tries += 1
        if query.tries < TRIES and isinstance(error, psycopg.Error) and may_go_again(error, problem):
            self.questions.append(Question(query))
            return
        self._answered(query, problem, error)

    def warn_missing(self, missing: list[str]) -> None:
        """Say once that there is no limit of a name, of so many names at most: a server is told any."""
        for name in missing:
            if name not in self._warned and len(self._warned) < _WARNS_OF:
                self._warned.add(name)
                log.warning("there is no limit named %r: it is not enforced", name)


def _refusal(request: Request, seconds: float | None) -> AcquireTimeout:
    said = f"no slot of {request.kind.named} "
    said += f"within {request.kind.timeout:g} s" if request.kind.timeout else "is free"
    if seconds is not None:
        said += f"; it could be had in {seconds:.3f} s"
    error = AcquireTimeout(said)
    error.retry_after = seconds
    return error


def closed() -> LimiterUnavailable:
    """What to say to those who come after the end."""
    return LimiterUnavailable("the limiter has been closed")


class Question:
    """A query, on its way."""

    answers_within = math.inf

    def __init__(self, query: Query) -> None:
        self.query = query

    def statements(self, connection: Connection) -> list[tuple[Statement, Params]]:
        asked = (self.query.statement, self.query.params)
        if self.query.statement in _sql.MEET_ALL_KEYS:
            return [(_sql.COMMIT, ()), asked, (_sql.BEGIN, ())]
        return [asked]

    def done(self, courier: Errands, result: PGresult) -> None:
        courier.asked(self.query, result)

    def failed(self, courier: Errands, error: BaseException, problem: PglimitsError) -> None:
        courier.query_failed(self.query, error, problem)
