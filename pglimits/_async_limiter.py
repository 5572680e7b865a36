"""The limiter for tasks: as the one for threads, with the same names and parameters."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from psycopg_pool import AsyncConnectionPool

from . import _calls
from ._arguments import Names
from ._batches import Batches, Kind, Ticket
from ._engine import OnUnavailable, Query, Request, Step, User
from ._renewal import Lease
from ._requests import F, checked, decorate, engine_of, leave, new_id, who
from ._wake import TaskWaker
from .errors import LeaseLost, LimiterUnavailable, LimitExists, LimitNotFound
from .models import Holder, Key, Limit, Peek, Swept, Waiter

if TYPE_CHECKING:
    from ._limiter import Concurrency, Limiter

T = TypeVar("T")


class AsyncLimiter:
    """Limits of one database, for asyncio. Arguments as Limiter; ``pool`` is a psycopg_pool.AsyncConnectionPool.

    Statements are sent by the event loop itself, on connections of the caller's pool or on one or two of our own; what
    its tasks ask meanwhile travels together. Leases are renewed from a thread: a blocked event loop loses none.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        pool: AsyncConnectionPool[Any] | None = None,
        durable: bool = True,
        on_unavailable: OnUnavailable = "raise",
    ) -> None:
        self._user = User()
        self._engine = engine_of(self._user, dsn, pool, AsyncConnectionPool, durable, on_unavailable)
        self._on_unavailable = on_unavailable
        self._leads: set[asyncio.Task[None]] = set()

    @classmethod
    def _on(cls, other: Limiter) -> AsyncLimiter:
        """The same limiter, for tasks."""
        limiter = cls.__new__(cls)
        limiter._engine, limiter._on_unavailable, limiter._user = other._engine, other._on_unavailable, other._user
        limiter._leads = set()
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
    ) -> AsyncConcurrency:
        """Hold slots for as long as an ``async with`` block or a function runs. As ``Limiter.concurrency``.

        When the lease is lost and that is to raise, the body is cancelled and LeaseLost is raised.
        """
        return AsyncConcurrency(
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

    async def acquire(
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
        """Take slots until ``release``. As ``Limiter.acquire``."""
        kind, given = checked(
            names, occupy, timeout_seconds, max_retries, lease_duration, strict, holder, None, key, priority
        )
        return await self._acquire(kind, given, renew)

    async def release(self, lease: Lease | UUID | str) -> bool:
        """End a lease now instead of at its expiry. As ``Limiter.release``."""
        if not isinstance(lease, Lease):
            lease = Lease.foreign(_calls.lease_id(lease))
        return bool(await self._drive(self._engine.releasing(lease, _waker())))

    async def rate_limit(
        self,
        names: Names,
        occupy: int = 1,
        timeout_seconds: float | None = None,
        strict: bool = False,
        key: str = "",
    ) -> None:
        """Take slots that come back by decay only, and sleep until the moment of the grant.

        As ``Limiter.rate_limit``.
        """
        kind, given = checked(names, occupy, timeout_seconds, None, 300, strict, None, None, key, 0, for_rate=True)
        await self._acquire(kind, given)

    # Limits.

    async def create(
        self,
        name: str,
        limit: int,
        slot_decay_per_second: float = 0.0,
        active: bool = True,
        max_waiters: int | None = None,
        description: str | None = None,
    ) -> Limit:
        """Create a limit. Raises LimitExists, InvalidArgument."""
        await self._call(_calls.create(name, limit, slot_decay_per_second, active, max_waiters, description))
        return await self.get(name)

    async def update(
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
        await self._call(_calls.update(name, limit, slot_decay_per_second, active, max_waiters, description, new_name))
        return await self.get(name if new_name is None else new_name)

    async def upsert(
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
            return await self.update(
                name,
                limit=limit,
                slot_decay_per_second=slot_decay_per_second,
                active=active,
                max_waiters=-1 if max_waiters is None else max_waiters,
                description=description or "",
            )
        except LimitNotFound:
            with contextlib.suppress(LimitExists):
                return await self.create(name, limit, slot_decay_per_second, active, max_waiters, description)
            return await self.upsert(name, limit, slot_decay_per_second, active, max_waiters, description)

    async def delete(self, name: str) -> None:
        """Delete a limit with its leases; its waiters are told. Raises LimitNotFound."""
        await self._call(_calls.delete(name))

    async def get(self, name: str) -> Limit:
        """One limit, as it stands now. Raises LimitNotFound."""
        return await self._call(_calls.get(name))

    async def list(self) -> builtins.list[Limit]:
        """All limits by name, as they stand now."""
        return await self._call(_calls.list_limits())

    async def keys(self, name: str | None = None) -> builtins.list[Key]:
        """The keys that were used, of one limit or of all, as they stand now."""
        return await self._call(_calls.keys(name))

    async def reset(self, name: str, key: str | None = None) -> int:
        """End every lease of a limit (or of one key) and set its level to zero. Returns how many leases ended."""
        return await self._call(_calls.reset(name, key))

    async def peek(
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
        return await self._call(_calls.peek(names, occupy, key, priority, strict, for_rate))

    async def adjust(self, name: str, slots: int, key: str = "") -> float:
        """Add slots to (or take them off) the level of a rate limit after the fact. Returns the new level.

        Raises LimitNotFound, NoSlotDecay.
        """
        return await self._call(_calls.adjust(name, slots, key))

    async def holders(self, name: str | None = None) -> builtins.list[Holder]:
        """The live leases, of one limit or of all."""
        return await self._call(_calls.holders(name))

    async def waiters(self, name: str | None = None) -> builtins.list[Waiter]:
        """Who waits, in order, for one limit or for all."""
        return await self._call(_calls.waiters(name))

    async def renew(self, lease: Lease | UUID, lease_duration: float | None = None) -> bool:
        """Renew a lease that is not renewed by itself. Whether it was still live."""
        asked = time.monotonic()
        renewed = await self._call(_calls.renew(lease, lease_duration))
        if isinstance(lease, Lease):
            self._engine.renewal.by_hand(lease, asked, lease_duration, renewed)
        return renewed.live

    async def sweep(self) -> Swept:
        """Tidy up. Nothing depends on it but the size of the tables."""
        return await self._call(_calls.sweep())

    async def version(self) -> str:
        """The version of pglimits in the database."""
        return await self._call(_calls.version())

    async def close(self) -> None:
        """Release what is still held, which whoever is at work under it has lost, and close connections of our own."""
        if not self._user.closed:
            await asyncio.to_thread(self._engine.close, self._user)

    async def __aenter__(self) -> AsyncLimiter:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # Doing what the engine says.

    async def _acquire(self, kind: Kind, holder: str | None, renew: bool = True) -> Lease:
        request = Request(kind, _waker(), self._on_unavailable, _who() if holder is None else holder, new_id(), renew)
        return await self._drive(self._engine.acquiring(request, self._user))

    async def _call(self, call: _calls.Call[T]) -> T:
        if self._user.closed:
            raise LimiterUnavailable("the limiter has been closed")
        return call.read(await self._engine.database.execute_in_loop(call.sql, call.params))

    async def _drive(self, course: Generator[Step, None, T]) -> T:
        try:
            step = next(course)
            while True:
                try:
                    if isinstance(step, Ticket):
                        await self._send(step)
                    elif isinstance(step, Query):
                        database = self._engine.database
                        step.rows = await database.execute_in_loop(step.sql, step.params, within=1.0)
                    elif isinstance(step.waker, TaskWaker):
                        await step.waker.wait(step.seconds)
                except BaseException as error:
                    step = course.throw(error)
                else:
                    step = course.send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def _send(self, ticket: Ticket) -> None:
        waker = ticket.waker
        assert isinstance(waker, TaskWaker)
        batches = self._engine.batches_of(waker.loop)
        batches.submit(ticket)
        until = None if ticket.patience is None else time.monotonic() + ticket.patience
        while not ticket.done and (until is None or time.monotonic() < until):
            self._have_sent(batches, ticket)
            await waker.wait(ticket.patient_for(None if until is None else until - time.monotonic()))

    def _have_sent(self, batches: Batches, ticket: Ticket) -> None:
        if not batches.summoned and batches.can_go(ticket):
            batches.summoned = True
            # In a task of its own: whoever asked may be cancelled, and the batch carries others' requests too.
            lead = asyncio.create_task(self._engine.lead_in_loop(batches), name="pglimits-send")
            self._leads.add(lead)
            lead.add_done_callback(lambda done: self._led(batches, done))

    def _led(self, batches: Batches, lead: asyncio.Task[None]) -> None:
        self._leads.discard(lead)
        if lead.cancelled():  # perhaps before its first step
            batches.summoned = False
            batches.nudge()


class AsyncConcurrency(contextlib.AbstractAsyncContextManager[Lease]):
    """Slots held while an ``async with`` block or a decorated coroutine function runs."""

    def __init__(self, limiter: Callable[[], AsyncLimiter], arguments: tuple[Any, ...]) -> None:
        self._limiter = limiter
        self._arguments = arguments
        self._kind, self._holder = checked(*arguments)
        self._raises = bool(arguments[5] if arguments[7] is None else arguments[7])
        # One object may be entered by several tasks at once, and by one several times.
        self._holds: dict[asyncio.Task[Any] | None, list[_Hold]] = {}

    async def __aenter__(self) -> Lease:
        limiter = self._limiter()
        lease = await limiter._acquire(self._kind, self._holder)
        hold = _Hold(lease, asyncio.current_task())
        if self._raises:
            lease.on_lost(hold.lost_elsewhere)
        self._holds.setdefault(hold.task, []).append(hold)
        return lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        hold = leave(self._holds, asyncio.current_task())
        hold.over = True
        lease = hold.lease
        ours = lease.enforced and not lease.released and lease.pid == os.getpid()
        lost = lease.lost
        limiter = self._limiter()
        live = await limiter._drive(limiter._engine.releasing(lease, _waker()))
        if not self._raises or not ours or not (lost or live is False):
            return
        if hold.cancelled and hold.task is not None and hold.task.uncancel() > hold.cancelling:
            return  # as asyncio.timeout does it: our own cancellation ends here, somebody else's goes on
        if error is not None and not (hold.cancelled and isinstance(error, asyncio.CancelledError)):
            return
        raise LeaseLost(f"the lease {lease.id} on {', '.join(lease.names)} ended before the work did") from error

    def __call__(self, function: F) -> F:
        return decorate(function, self._in_thread, self._again)

    def _again(self) -> AsyncConcurrency:
        return AsyncConcurrency(self._limiter, self._arguments)

    def _in_thread(self) -> Concurrency:
        from ._limiter import Concurrency, Limiter

        limiter = self._limiter()
        return Concurrency(lambda: Limiter._on(limiter), self._arguments)


class _Hold:
    """A lease, and the task that works under it."""

    __slots__ = ("cancelled", "cancelling", "lease", "over", "task")

    def __init__(self, lease: Lease, task: asyncio.Task[Any] | None) -> None:
        self.lease = lease
        self.task = task
        self.cancelling = task.cancelling() if task is not None else 0
        self.cancelled = False
        self.over = False

    def lost_elsewhere(self) -> None:
        """Called by the thread that renews."""
        if self.task is not None:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed
                self.task.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if not self.over and self.task is not None:
            self.cancelled = True
            self.task.cancel()


def _waker() -> TaskWaker:
    return TaskWaker(asyncio.get_running_loop())


def _who() -> str:
    task = asyncio.current_task()
    return who(task=task.get_name() if task is not None else None)
