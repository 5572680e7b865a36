"""One engine for each database that a process uses: what sync and async callers share, and how a request goes.

``acquiring`` is the course of a request, without I/O: it yields what has to be done (a ticket to be sent, or ``Wait``)
and is told what came of it. The two shells, for threads and for tasks, do just that.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from uuid import UUID

from . import _sql
from ._arguments import Part
from ._batches import PATIENCE, Answer, Batches, Kind, Place, Slot, Ticket
from ._cleaner import Cleaner, Gone
from ._database import ANSWERS_WITHIN, Busy, Database, Late, Row
from ._keeper import Keeper, News, Waiter
from ._renewal import Lease, Renewal
from ._wake import OURS, Anchor, Orphan, Waker, orphan
from .errors import AcquireTimeout, LimiterUnavailable, LimitLocked, PglimitsError, QueueFull

log = logging.getLogger("pglimits")

OnUnavailable = Literal["raise", "wait", "allow"]

_LEAVES_WITHIN = 0.25
"""Seconds that a request whose time is over waits to be out of the queue. If that takes longer, nobody waits for it."""


class Request:
    """What a caller wants."""

    __slots__ = ("asked", "gone", "holder", "kind", "lease_id", "on_unavailable", "renew", "waker")

    def __init__(
        self,
        kind: Kind,
        waker: Waker,
        on_unavailable: OnUnavailable,
        holder: str,
        lease_id: UUID,
        renew: bool = True,
    ) -> None:
        self.kind = kind
        self.waker = waker
        self.on_unavailable: OnUnavailable = on_unavailable
        self.holder = holder
        self.lease_id = lease_id
        self.renew = renew
        self.asked = False
        # What is to be released if nobody waits for it any longer.
        self.gone = Gone(lease_id, kind.places)

    def ticket(self, left: float | None) -> Ticket:
        """To ask, with so many seconds left."""
        kind = self.kind
        wait = left
        if left and not (kind.for_rate and left < (kind.timeout or 0) - 0.001):
            # If all say the same, they are asked together; and only for a rate it matters how much has gone by.
            wait = kind.timeout
        patience = None if left is None else left or PATIENCE
        ticket = Ticket(self.lease_id, kind, kind.places, wait, self.holder, self.waker, patience)
        ticket.again, self.asked = self.asked, True
        return ticket

    def named(self) -> str:
        return ", ".join(repr(name) for name, _ in self.kind.places)


def kind_of(
    parts: tuple[Part, ...], timeout: float | None, lease_duration: float, priority: int, strict: bool, for_rate: bool
) -> Kind:
    """What requests with these arguments have in common."""
    places = tuple((part.name, part.key) for part in parts)
    return Kind(
        places,
        tuple(("release", *place) for place in places),
        timeout,
        lease_duration,
        for_rate,
        _array(part.name for part in parts),
        _array(str(part.slots) for part in parts),
        _array(part.key for part in parts),
        priority,
        strict,
    )


def _array(texts: Iterable[str]) -> str:
    """As PostgreSQL writes it."""
    quoted = [text.replace("\\", "\\\\").replace('"', '\\"') for text in texts]
    return "{" + ",".join([f'"{text}"' for text in quoted]) + "}"


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until woken, at most so many seconds."""

    waker: Waker
    seconds: float | None


@dataclass(slots=True)
class Query:
    """Ask the database something, beside what is asked in batches."""

    sql: str
    params: Sequence[object]
    rows: list[Row] = field(default_factory=list)


Step: TypeAlias = Ticket | Wait | Query
Course: TypeAlias = Generator[Step, None, Lease]


class User:
    """One of those who share an engine: a limiter, until it is closed."""

    __slots__ = ("closed",)

    def __init__(self) -> None:
        self.closed = False


class Engine:
    """What a process needs for one database."""

    def __init__(self, database: Database, durable: bool) -> None:
        self.database = database
        self.durable = durable
        self.users: set[User] = set()
        self._warned: set[str] = set()
        self._begin()
        _engines.add(self)

    def _begin(self) -> None:
        self.pid = os.getpid()
        self.closed = False
        self._asking: dict[UUID, Orphan[Gone]] = {}
        # Gives back in the background what nobody waits for any longer.
        self.cleaner = Cleaner(self.database, self.durable, self._forget)
        self.keeper = Keeper(self.database, lambda claims: self.renewal.claimed(claims))
        self.batches = self._new_batches()
        self._last_loop: tuple[asyncio.AbstractEventLoop | None, Batches | None] = None, None
        self._of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Batches] = weakref.WeakKeyDictionary()
        # Of each thread: what lives as long as its call here, and None while that waits.
        self.inside = threading.local()
        self.renewal = Renewal(self.database, self.cleaner.put)

    def forked(self) -> None:
        """Called in the child of a fork."""
        self._parents = getattr(self, "_parents", []), self.batches, self.keeper, self.renewal, self._of_loops
        self.database.forked()
        self._begin()

    # The course of a request.

    def acquiring(self, request: Request, user: User) -> Course:
        """Take slots.

        Raises:
            AcquireTimeout, QueueFull, and what the database says.
        """
        timeout = request.kind.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        waiter: Waiter | None = None
        pause = 0.05
        # Whether the database may have something of ours if this ends without a lease.
        taken = False
        out_of_touch = False
        anchor = Anchor()
        self._asking[request.lease_id] = orphan(anchor, self.cleaner.put, request.gone)
        try:
            while True:
                if self.closed or user.closed:
                    raise LimiterUnavailable("the limiter has been closed")
                self.cleaner.ready()
                taken = True
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                ticket = request.ticket(left)
                try:
                    yield ticket
                finally:
                    ticket.withdraw()
                asked = ticket.sent
                if ticket.error is not None or not isinstance(ticket.answer, Answer):
                    problem = ticket.error or LimiterUnavailable("the database did not answer in time")
                    out_of_touch = not isinstance(problem, Busy)
                    # Nothing was done in that statement; but who was in line before stands there still.
                    taken = isinstance(problem, LimiterUnavailable) or waiter is not None or ticket.again
                    if isinstance(problem, Busy) or ticket.error is None:
                        if left is not None and time.monotonic() >= (deadline or 0):
                            late = AcquireTimeout(f"no slot of {request.named()} in time")
                            raise (yield from self._locked(request)) if ticket.apart else late from problem
                    elif not isinstance(problem, LimiterUnavailable) or request.on_unavailable == "raise":
                        raise problem
                    elif request.on_unavailable == "allow":
                        log.warning("%s not enforced: %s", request.named(), problem)
                        self.give_back(request.lease_id, request.kind.places, 1.0)
                        return self._lease(request, user, None, asked)
                    elif left is not None and left <= 0:
                        raise AcquireTimeout(f"no slot of {request.named()} in time") from problem
                    yield Wait(request.waker, pause if left is None else min(pause, left))
                    pause = min(pause * 2, 2.0)
                    continue

                answer = ticket.answer
                now = time.monotonic()
                out_of_touch = False
                taken = answer.status in ("granted", "queued")
                self._warn_missing(answer.missing)
                if answer.status == "unlimited":
                    return self._lease(request, user, None, asked)
                if answer.status == "granted":
                    yield from self._sleep(request, user, now + (answer.seconds or 0.0))
                    return self._lease(request, user, answer, asked)
                if answer.status == "refused":
                    raise _refusal(request, answer)
                if answer.status == "full":
                    raise QueueFull(f"the line of {request.named()} is as long as its max_waiters allows")

                waiter = Waiter(
                    request.lease_id,
                    request.waker,
                    None if answer.seconds is None else now + answer.seconds,
                    user=user,
                    kind=request.kind,
                    called_in=asked,
                    # A lease that is left alone is claimed before it is left.
                    trusting=request.renew and len(request.kind.places) == 1,
                )
                self.keeper.add(waiter)
                yield from self._await_news(waiter, deadline)
                self.keeper.remove(waiter.lease_id)
                if waiter.error is not None and request.on_unavailable == "raise":
                    raise waiter.error
                news = waiter.news
                if news is not None and news.status == "granted" and len(request.kind.places) == 1:
                    yield from self._sleep(request, user, news.goes_at)
                    return self._lease(request, user, Answer("granted", [news.fence], news.expires_at), asked, news)
                if news is None and waiter.error is None:
                    released = _releasing(request.lease_id, request.kind.release_lanes, request.waker, _LEAVES_WITHIN)
                    try:
                        yield released
                    finally:
                        released.withdraw()
                    taken = released.error is not None or not released.done
                    raise AcquireTimeout(f"no slot of {request.named()} within {timeout:g} s")
                # Else ask again, with the same id: it acts once.
        except BaseException:
            if taken:
                # Once more a little later where the first time may come before what it is to undo.
                self.give_back(request.lease_id, request.kind.places, 1.0 if out_of_touch else 0.0)
            self._asking.pop(request.lease_id, None)
            raise
        finally:
            if waiter is not None:
                self.keeper.remove(waiter.lease_id)

    def _await_news(self, waiter: Waiter, deadline: float | None) -> Generator[Step, None, None]:
        while waiter.news is None and waiter.error is None:
            if self.closed or waiter.user.closed:
                raise LimiterUnavailable("the limiter has been closed")
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return
            yield Wait(waiter.waker, None if deadline is None else deadline - now)

    def _sleep(self, request: Request, user: User, goes_at: float) -> Generator[Step, None, None]:
        """It is granted, as of then."""
        while (now := time.monotonic()) < goes_at:
            if self.closed or user.closed:
                raise LimiterUnavailable("the limiter has been closed")
            yield Wait(request.waker, goes_at - now)

    def _locked(self, request: Request) -> Generator[Step, None, AcquireTimeout]:
        """What to raise where a lock was not to be had in time: who has it."""
        query = Query(_sql.LOCKED_BY, (request.kind.names, request.kind.keys))
        with contextlib.suppress(PglimitsError):
            yield query
        by = query.rows[0][0] if query.rows else "somebody"
        return LimitLocked(f"{request.named()} could not be had in time: an open transaction keeps it locked: {by}")

    def releasing(self, lease: Lease, waker: Waker) -> Generator[Step, None, bool | None]:
        """End a lease. Whether it was still live; None if the database could not be asked."""
        if not lease.is_ours():
            return False
        self.cleaner.ready()
        ticket = _releasing(lease.id, lease._lanes, waker, None)
        anchor = Anchor()
        self._asking[lease.id] = orphan(anchor, self.cleaner.put, lease._gone)
        lost = lease.lost
        lease.released = True
        try:
            if lost:  # its time is over, and the thread that renews may not have noticed yet
                self.renewal.lose(lease, "it was not renewed in time")
            self.renewal.remove(lease)
            yield ticket
        except BaseException:
            ticket.withdraw()
            self.give_back(lease.id, lease.places)
            self._asking.pop(lease.id, None)
            raise
        self._asking.pop(lease.id, None)
        if ticket.error is not None:
            if not lease.places:
                raise ticket.error  # it was named by its id: who holds it is elsewhere
            self.give_back(lease.id, lease.places, 0.5)
            if not isinstance(ticket.error, LimiterUnavailable):
                raise ticket.error
            log.warning("the lease %s could not be released yet, trying on: %s", lease.id, ticket.error)
            return None
        # Where this is a repetition, and nothing else speaks against it, the first time has released it.
        return bool(ticket.answer) or (ticket.again and not lost)

    def is_inside(self) -> bool:
        """Whether this thread is in the midst of a call: this one comes from a signal handler or a finalizer then.

        The call that it interrupts goes on only after it, and may have locks, or a batch on its way.
        """
        call = getattr(self.inside, "call", None)
        return (call is not None and call() is not None) or threading.current_thread().name.startswith(OURS)

    def release_later(self, lease: Lease) -> bool:
        """End a lease in the background. Whether it was still live, as far as is known here. Callable from anywhere."""
        if not lease.is_ours():
            return False
        live = not lease.lost
        lease.released = True
        self.give_back(lease.id, lease.places)
        return live

    def _lease(
        self, request: Request, user: User, answer: Answer | None, asked: float, news: News | None = None
    ) -> Lease:
        answer = answer or Answer("unlimited")
        kind = request.kind
        enforced = answer.expires_at is not None and not kind.for_rate
        lease = Lease(
            request.gone,
            kind.release_lanes,
            answer.fences if answer.fences is not None else [None] * len(kind.places),
            answer.expires_at if enforced else None,
            kind.lease_duration,
            # Where this was asked before, it may have been granted then.
            news.ends if news is not None else asked + (answer.ends_in or 0.0),
            self.pid,
        )
        if enforced:
            if self.closed or user.closed:
                raise LimiterUnavailable("the limiter has been closed")
            lease._user = user
            if request.renew:
                self.renewal.add(lease, claimed=news is None or news.claimed)
        self._asking.pop(request.lease_id, None)
        return lease

    def _warn_missing(self, missing: list[str] | None) -> None:
        for name in missing or ():
            if name not in self._warned:
                self._warned.add(name)
                log.warning("there is no limit named %r: it is not enforced", name)

    # Sending.

    def _new_batches(self) -> Batches:
        return Batches(self.durable, self.keeper.channel, self.give_back)

    def batches_of(self, loop: asyncio.AbstractEventLoop) -> Batches:
        """The batches of an event loop: sent in the loop, they hold up, and are held up by, nobody else."""
        last, batches = self._last_loop
        if last is not loop or batches is None:
            batches = self._of_loops.get(loop)
            if batches is None:
                batches = self._of_loops[loop] = self._new_batches()
            self._last_loop = loop, batches
        return batches

    def lead(self, ticket: Ticket, until: float | None = None) -> None:
        """Send batches from the caller's thread, as long as there are any with this ticket in them, and until then."""
        batches = self.batches
        while not ticket.done:
            slot = Slot(batches)
            anchor = Anchor()
            try:
                slot.orphan = orphan(anchor, self.cleaner.put, slot)
                if not batches.take(slot, ticket):
                    slot.orphan = None
                    return
                batches.nudge()
                sql, params = batches.statement(slot)
                batches.finish(slot, self.database.execute(sql, params, slot, ANSWERS_WITHIN, until))
            except Late:
                self.cleaner.put(slot)
                return
            except BaseException as error:
                if isinstance(error, PglimitsError):
                    batches.fail(slot, error)
                    continue
                # Not the database's: a signal's, for instance, raised wherever the caller's thread happened to be.
                self.cleaner.put(slot)
                raise

    async def lead_in_loop(self, batches: Batches) -> None:
        """Send batches from an event loop, as long as there are any."""
        batches.summoned = False
        while True:
            slot = Slot(batches)
            anchor = Anchor()
            try:
                slot.orphan = orphan(anchor, self.cleaner.put, slot)
                if not batches.take(slot):
                    slot.orphan = None
                    return
                sql, params = batches.statement(slot)
                batches.finish(slot, await self.database.execute_in_loop(sql, params, slot, ANSWERS_WITHIN))
            except BaseException as error:
                if isinstance(error, Exception) and slot.batch is not None:
                    batches.fail(slot, error)
                    continue
                self.cleaner.put(slot)
                raise

    def give_back(self, lease_id: UUID, places: tuple[Place, ...] = (), again_after: float = 0.0) -> None:
        """Release a lease or a place in line in the background. Callable from anywhere. Arguments as of Gone."""
        self.cleaner.put(Gone(lease_id, places, again_after))

    def _forget(self, lease_id: UUID) -> None:
        self.renewal.forget(lease_id)
        self.keeper.remove(lease_id)
        for batches in (self.batches, *list(self._of_loops.values())):
            batches.forget(lease_id)
        self._asking.pop(lease_id, None)

    def close(self, user: User) -> None:
        """One user less: release what it holds, and end its waits. The last one stops the engine."""
        user.closed = True
        with _shared_lock:
            self.users.discard(user)
            last = not self.users
            for key in [key for key, engine in _shared.items() if last and engine is self]:
                del _shared[key]
        if last:
            self.shut()
            return
        gone = [Gone(waiter.lease_id, waiter.places) for waiter in self.keeper.close(user)]
        self._release_all([*gone, *self._end_leases(user)])

    def shut(self) -> None:
        """Release what is held, and stop."""
        self.closed = True
        self.keeper.stop()
        self._let_all_end()
        # Together with who still waits here, so that nothing is handed over to a process that goes.
        gone = [asking.subject for asking in list(self._asking.values())]
        gone += self._end_leases()
        self.keeper.close()
        self._release_all(gone)
        self.renewal.stop()
        self.cleaner.stop()
        self.database.close()
        _engines.discard(self)

    def _end_leases(self, user: User | None = None) -> list[Gone]:
        """Have all leases, or those of one user, be given back: whoever is at work under one has lost it."""
        leases = [lease for lease in self.renewal.all() if user is None or lease._user is user]
        leases = [lease for lease in leases if self.renewal.remove(lease)]
        for lease in leases:
            lease._end()
        return [lease._gone for lease in leases]

    def _release_all(self, gone: list[Gone]) -> None:
        if gone:
            with contextlib.suppress(Exception):
                self.cleaner.release_all(gone)

    def _let_all_end(self) -> None:
        """Have nothing on its way: what comes after all has been released might be granted, to nobody."""
        of_loops = list(self._of_loops.items())
        for batches in (self.batches, *(batches for _, batches in of_loops)):
            batches.close()
        for loop, batches in of_loops:
            if not loop.is_running():
                for slot in batches.under_way():
                    self.cleaner.put(slot)
        mine = asyncio._get_running_loop()
        waited_for = [self.batches, *(batches for loop, batches in of_loops if loop is not mine)]
        until = time.monotonic() + ANSWERS_WITHIN / 2
        while any(batches.under_way() for batches in waited_for) and time.monotonic() < until:
            time.sleep(0.001)


def _releasing(lease_id: UUID, lanes: tuple[tuple[str, ...], ...], waker: Waker, patience: float | None) -> Ticket:
    return Ticket(lease_id, None, lanes, None, "", waker, patience)


def _refusal(request: Request, answer: Answer) -> AcquireTimeout:
    said = f"no slot of {request.named()} "
    said += f"within {request.kind.timeout:g} s" if request.kind.timeout else "is free"
    if answer.seconds is not None:
        said += f"; it could be had in {answer.seconds:.3f} s"
    error = AcquireTimeout(said)
    error.retry_after = answer.seconds
    return error


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()
    for engine in list(_engines):
        engine.forked()


def _at_exit() -> None:
    for engine in list(_engines):
        with contextlib.suppress(Exception):
            engine.shut()


_shared: dict[tuple[str, bool], Engine] = {}
_shared_lock = threading.Lock()


def engine_for(conninfo: str, durable: bool, user: User) -> Engine:
    """The engine for a database, shared by all limiters of this process that ask for the same."""
    with _shared_lock:
        engine = _shared.get((conninfo, durable))
        if engine is None:
            engine = _shared[conninfo, durable] = Engine(Database(conninfo, {}), durable)
        engine.users.add(user)
        return engine


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
