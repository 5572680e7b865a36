"""The limiter for threads."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from psycopg_pool import ConnectionPool

from . import _calls
from ._arguments import Names
from ._batches import Kind, Ticket
from ._engine import OnUnavailable, Query, Request, Step, User
from ._renewal import Lease
from ._requests import F, checked, decorate, engine_of, leave, new_id, who
from ._wake import Anchor, ThreadWaker
from .errors import LeaseLost, LimiterUnavailable, LimitExists, LimitNotFound
from .models import Holder, Key, Limit, Peek, Swept, Waiter

if TYPE_CHECKING:
    from ._async_limiter import AsyncConcurrency, AsyncLimiter

T = TypeVar("T")


class Limiter:
    """Limits of one database, for threads.

    Args:
        dsn: a PostgreSQL connection string; None takes PGLIMITS_DSN, then DATABASE_URL, then the embedded server.
        pool: instead of a DSN, a psycopg_pool.ConnectionPool. It stays the caller's to close. Waiting and renewing
            open connections of their own, like the pool's.
        durable: False commits with ``synchronous_commit = off``. That is faster; a crash of the server (not of a
            client) may then forget the last moments: slots taken or released within about a second before it.
        on_unavailable: what to do when the database cannot be reached: ``"raise"`` LimiterUnavailable, ``"wait"`` and
            try on until the timeout, or ``"allow"`` the work without a slot, with a warning.

    Threads may share one. ``close()`` it, or use it in a ``with`` statement, to release what it still holds.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        pool: ConnectionPool[Any] | None = None,
        durable: bool = True,
        on_unavailable: OnUnavailable = "raise",
    ) -> None:
        self._user = User()
        self._engine = engine_of(self._user, dsn, pool, ConnectionPool, durable, on_unavailable)
        self._on_unavailable = on_unavailable

    @classmethod
    def _on(cls, other: AsyncLimiter) -> Limiter:
        """The same limiter, for threads."""
        limiter = cls.__new__(cls)
        limiter._engine, limiter._on_unavailable, limiter._user = other._engine, other._on_unavailable, other._user
        return limiter

    # Taking slots.

    def concurrency(
        self,
        names: Names,
        occupy: int = 1,
        timeout_seconds: float | None = None,
        max_retries: int | None = None,
        lease_duration: float = 300,
        strict: bool = False,
        holder: Any = None,
        raise_on_lease_renewal_failure: bool | None = None,
        *,
        key: str = "",
        priority: int = 0,
    ) -> Concurrency:
        """Hold slots of one or several limits, all or none, for as long as a ``with`` block or a function runs.

        Args:
            names: a limit, several, or a mapping of limits (or (name, key) pairs) to slots.
            occupy: how many slots of each.
            timeout_seconds: how long to wait in all; None for ever, 0 tries once.
            max_retries: 0 tries once; another number changes nothing, as a queue needs no retries.
            lease_duration: seconds after which the slots come free if this process dies; renewed at a third of it.
            strict: a missing limit is an error, and a lost lease raises.
            holder: JSON that says who holds the slots; by default host, pid, thread and program.
            raise_on_lease_renewal_failure: whether a lost lease raises; None: as ``strict``.
            key: each key of a limit has the whole budget for itself.
            priority: higher goes first; within one priority, in order of arrival.

        Entering gives a Lease. Raises AcquireTimeout, LimitNotFound (strict), SlotsExceedLimit, QueueFull,
        InvalidArgument, LimiterUnavailable; leaving raises LeaseLost if the lease was lost and that is to raise.
        """
        return Concurrency(
            lambda: self,
            (
                names,
                occupy,
                timeout_seconds,
                max_retries,
                lease_duration,
                strict,
                holder,
                raise_on_lease_renewal_failure,
                key,
                priority,
            ),
        )

    def acquire(
        self,
        names: Names,
        occupy: int = 1,
        timeout_seconds: float | None = None,
        max_retries: int | None = None,
        lease_duration: float = 300,
        strict: bool = False,
        holder: Any = None,
        *,
        key: str = "",
        priority: int = 0,
        renew: bool = True,
    ) -> Lease:
        """Take slots until ``release``. Arguments and errors as ``concurrency``.

        Keep what it returns: a lease that nobody refers to any longer is given back.

        renew: False leaves the lease alone: it lives on after this process, for ``lease_duration`` or until somebody
        releases it by its id.
        """
        kind, given = checked(
            names, occupy, timeout_seconds, max_retries, lease_duration, strict, holder, None, key, priority
        )
        return self._acquire(kind, given, renew)

    def release(self, lease: Lease | UUID | str) -> bool:
        """End a lease now instead of at its expiry. Whether it was still live; doing it twice is harmless.

        True also where the connection was lost before the reply came, and asking again found it ended.

        Given the id of a waiting request, takes it out of its queue.

        Raises:
            LimiterUnavailable: an id was given, and the database could not be reached. A lease of our own is released
                once it can be.
        """
        if not isinstance(lease, Lease):
            lease = Lease.foreign(_calls.lease_id(lease))
        return bool(self._release(lease))

    def rate_limit(
        self,
        names: Names,
        occupy: int = 1,
        timeout_seconds: float | None = None,
        strict: bool = False,
        key: str = "",
    ) -> None:
        """Take slots that come back by decay only, and sleep until the moment of the grant.

        A request whose earliest moment lies beyond ``timeout_seconds`` is refused at once and takes nothing. Raises as
        ``concurrency``, and NoSlotDecay for a limit without ``slot_decay_per_second``.
        """
        kind, given = checked(names, occupy, timeout_seconds, None, 300, strict, None, None, key, 0, for_rate=True)
        self._acquire(kind, given)

    # Limits.

    def create(
        self,
        name: str,
        limit: int,
        slot_decay_per_second: float = 0.0,
        active: bool = True,
        max_waiters: int | None = None,
        description: str | None = None,
    ) -> Limit:
        """Create a limit. Raises LimitExists, InvalidArgument."""
        self._call(_calls.create(name, limit, slot_decay_per_second, active, max_waiters, description))
        return self.get(name)

    def update(
        self,
        name: str,
        *,
        limit: int | None = None,
        slot_decay_per_second: float | None = None,
        active: bool | None = None,
        max_waiters: int | None = None,
        description: str | None = None,
        new_name: str | None = None,
    ) -> Limit:
        """Change what is given, at once. ``max_waiters=-1``: no bound. Raises LimitNotFound, LimitExists."""
        self._call(_calls.update(name, limit, slot_decay_per_second, active, max_waiters, description, new_name))
        return self.get(name if new_name is None else new_name)

    def upsert(
        self,
        name: str,
        limit: int,
        slot_decay_per_second: float = 0.0,
        active: bool = True,
        max_waiters: int | None = None,
        description: str | None = None,
    ) -> Limit:
        """Create a limit, or make the one of that name so."""
        _calls.create(name, limit, slot_decay_per_second, active, max_waiters, description)  # checks them all
        try:
            return self.update(
                name,
                limit=limit,
                slot_decay_per_second=slot_decay_per_second,
                active=active,
                max_waiters=-1 if max_waiters is None else max_waiters,
                description=description or "",
            )
        except LimitNotFound:
            with contextlib.suppress(LimitExists):
                return self.create(name, limit, slot_decay_per_second, active, max_waiters, description)
            return self.upsert(name, limit, slot_decay_per_second, active, max_waiters, description)

    def delete(self, name: str) -> None:
        """Delete a limit with its leases; its waiters are told. Raises LimitNotFound."""
        self._call(_calls.delete(name))

    def get(self, name: str) -> Limit:
        """One limit, as it stands now. Raises LimitNotFound."""
        return self._call(_calls.get(name))

    def list(self) -> builtins.list[Limit]:
        """All limits by name, as they stand now."""
        return self._call(_calls.list_limits())

    def keys(self, name: str | None = None) -> builtins.list[Key]:
        """The keys that were used, of one limit or of all, as they stand now."""
        return self._call(_calls.keys(name))

    def reset(self, name: str, key: str | None = None) -> int:
        """End every lease of a limit (or of one key) and set its level to zero. Returns how many leases ended."""
        return self._call(_calls.reset(name, key))

    def peek(
        self,
        names: Names,
        occupy: int = 1,
        *,
        key: str = "",
        priority: int = 0,
        strict: bool = False,
        for_rate: bool = False,
    ) -> Peek:
        """What a request would be answered now, without making it. ``for_rate``: for ``rate_limit``."""
        return self._call(_calls.peek(names, occupy, key, priority, strict, for_rate))

    def adjust(self, name: str, slots: int, key: str = "") -> float:
        """Add slots to (or take them off) the level of a rate limit after the fact. Returns the new level.

        Raises LimitNotFound, NoSlotDecay.
        """
        return self._call(_calls.adjust(name, slots, key))

    def holders(self, name: str | None = None) -> builtins.list[Holder]:
        """The live leases, of one limit or of all."""
        return self._call(_calls.holders(name))

    def waiters(self, name: str | None = None) -> builtins.list[Waiter]:
        """Who waits, in order, for one limit or for all."""
        return self._call(_calls.waiters(name))

    def renew(self, lease: Lease | UUID, lease_duration: float | None = None) -> bool:
        """Renew a lease that is not renewed by itself. Whether it was still live."""
        asked = time.monotonic()
        renewed = self._call(_calls.renew(lease, lease_duration))
        if isinstance(lease, Lease):
            self._engine.renewal.by_hand(lease, asked, lease_duration, renewed)
        return renewed.live

    def sweep(self) -> Swept:
        """Tidy up. Nothing depends on it but the size of the tables."""
        return self._call(_calls.sweep())

    def version(self) -> str:
        """The version of pglimits in the database."""
        return self._call(_calls.version())

    def close(self) -> None:
        """Release what is still held, which whoever is at work under it has lost, and close connections of our own."""
        if not self._user.closed:
            self._engine.close(self._user)

    def __enter__(self) -> Limiter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Doing what the engine says.

    def _acquire(self, kind: Kind, holder: str | None, renew: bool = True) -> Lease:
        if self._engine.is_inside():
            raise LimiterUnavailable(
                "slots cannot be taken in a signal handler or a finalizer that interrupts another call of the limiter"
            )
        request = Request(
            kind, ThreadWaker(), self._on_unavailable, who() if holder is None else holder, new_id(), renew
        )
        return self._drive(self._engine.acquiring(request, self._user))

    def _release(self, lease: Lease) -> bool | None:
        if self._engine.is_inside():
            return self._engine.release_later(lease)
        return self._drive(self._engine.releasing(lease, ThreadWaker()))

    def _call(self, call: _calls.Call[T]) -> T:
        if self._user.closed:
            raise LimiterUnavailable("the limiter has been closed")
        return call.read(self._engine.database.execute(call.sql, call.params))

    def _drive(self, course: Generator[Step, None, T]) -> T:
        inside = self._engine.inside
        # Gone with this frame, should an interrupt strike where it is taken back.
        anchor = Anchor()
        try:
            inside.call = weakref.ref(anchor)
            step = next(course)
            while True:
                try:
                    self._do(step)
                except BaseException as error:
                    step = course.throw(error)
                else:
                    step = course.send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            inside.call = None

    def _rest(self, waker: ThreadWaker, seconds: float | None) -> None:
        """Wait. Meanwhile a signal handler may make calls of its own."""
        inside = self._engine.inside
        call = inside.call
        try:
            inside.call = None
            # Not for ever in one go: a signal that comes just before the wait is only heard of at the next wake-up.
            waker.wait(1.0 if seconds is None else min(seconds, 1.0))
        finally:
            inside.call = call

    def _do(self, step: Step) -> None:
        if isinstance(step, Ticket):
            self._send(step, step.patience)
        elif isinstance(step, Query):
            step.rows = self._engine.database.execute(step.sql, step.params, within=1.0)
        elif isinstance(step.waker, ThreadWaker):
            self._rest(step.waker, step.seconds)

    def _send(self, ticket: Ticket, seconds: float | None) -> None:
        assert isinstance(ticket.waker, ThreadWaker)
        self._engine.batches.submit(ticket)
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            self._engine.lead(ticket, until)
            left = None if until is None else until - time.monotonic()
            if ticket.done or (left is not None and left <= 0):
                return
            self._rest(ticket.waker, ticket.patient_for(left))


class Concurrency(contextlib.AbstractContextManager[Lease]):
    """Slots held while a ``with`` block or a decorated function runs."""

    def __init__(self, limiter: Callable[[], Limiter], arguments: tuple[Any, ...]) -> None:
        self._limiter = limiter
        self._arguments = arguments
        self._kind, self._holder = checked(*arguments)
        self._raises = bool(arguments[5] if arguments[7] is None else arguments[7])
        # One object may be entered by several threads at once, and by one several times.
        self._leases: dict[int, list[Lease]] = {}

    def __enter__(self) -> Lease:
        limiter = self._limiter()
        lease = limiter._acquire(self._kind, self._holder)
        self._leases.setdefault(threading.get_ident(), []).append(lease)
        return lease

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        lease = leave(self._leases, threading.get_ident())
        ours = lease.enforced and not lease.released and lease.pid == os.getpid()
        lost = lease.lost
        limiter = self._limiter()
        if kind is GeneratorExit and asyncio._get_running_loop() is not None:
            # Perhaps of the garbage collector, in the midst of what a task does here.
            live: bool | None = limiter._engine.release_later(lease)
        else:
            live = limiter._release(lease)
        if self._raises and ours and (lost or live is False) and error is None:
            raise LeaseLost(f"the lease {lease.id} on {', '.join(lease.names)} ended before the work did")

    def __call__(self, function: F) -> F:
        return decorate(function, self._again, self._in_task)

    def _again(self) -> Concurrency:
        return Concurrency(self._limiter, self._arguments)

    def _in_task(self) -> AsyncConcurrency:
        from ._async_limiter import AsyncConcurrency, AsyncLimiter

        limiter = self._limiter()
        return AsyncConcurrency(lambda: AsyncLimiter._on(limiter), self._arguments)
