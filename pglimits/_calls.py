"""What a limiter can do: one source for the limiter of threads and for that of tasks, which differ in how they wait.

Each method is a course without I/O. It hands errands to the courier, and yields what it waits for and how long at
most; the limiters do just that, and hand out what the course returns.
"""

from __future__ import annotations

import builtins
import json
import logging
import math
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar
from uuid import UUID

from psycopg.pq.abc import PGresult

from . import _arguments, _codec, _observer, _sql
from ._arguments import Counts, Names
from ._codec import Row, Value
from ._courier import Courier, courier_for, forget
from ._database import Callback, OfPool, Source
from ._dsn import resolve
from ._leases import Lease, orphan
from ._requests import PATIENCE, Errand, Kind, OnUnavailable, Query, Release, Request, User, checked, new_id, who
from ._sql import Statement
from ._uses import settled, settled_by_id
from ._wake import Waker
from .errors import InvalidArgument, LimiterUnavailable, LimitExists, LimitNotFound
from .models import Holder, Key, Limit, Peek, Swept, Waiter

if TYPE_CHECKING:
    import psycopg
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

log = logging.getLogger("pglimits")

T = TypeVar("T")
B = TypeVar("B", bound="Base")

Course: TypeAlias = Generator[tuple[Waker, float | None], None, T]

_LEAVES_WITHIN = 0.25
"""Seconds that a request whose time is over waits to be out of the line. If that takes longer, nobody waits for it. One
that tries once waits for as long again as for the lock: only an answer tells whether that is what it has met."""
_CONNECTS_WITHIN = 2.0
"""Seconds that a request which may not wait in line waits for a connection."""
_DEEPEST = 100
"""A holder nested deeper stays text, as whoever walks it would run out of stack."""


class _Anchor:
    """Lives as long as a call."""

    __slots__ = ("__weakref__",)


class Base:
    """What both limiters are made of."""

    _courier: Courier
    _user: User
    _on_unavailable: OnUnavailable
    _strict: bool
    _use: type[Lease] = Lease

    def __init__(
        self,
        dsn: str | None = None,
        *,
        pool: ConnectionPool[Any] | AsyncConnectionPool[Any] | None = None,
        connect: Callable[[], psycopg.Connection[Any] | Coroutine[Any, Any, psycopg.AsyncConnection[Any]]]
        | None = None,
        durable: bool = True,
        strict: bool = False,
        on_unavailable: OnUnavailable = "raise",
    ) -> None:
        _arguments.flag("durable", durable)
        self._strict = _arguments.flag("strict", strict)
        if on_unavailable not in ("raise", "wait", "allow"):
            raise InvalidArgument(f"on_unavailable must be 'raise', 'wait' or 'allow', not {on_unavailable!r}")
        if sum(given is not None for given in (dsn, pool, connect)) > 1:
            raise InvalidArgument("only one of dsn, pool and connect may be given")
        self._on_unavailable: OnUnavailable = on_unavailable
        self._user = User()
        if pool is not None:
            source: Source = OfPool(pool)
        elif connect is not None:
            source = Callback(connect)
        else:
            source = Source(resolve(dsn).conninfo)
        self._courier = courier_for(source, durable, self._user)

    def __reduce__(self) -> NoReturn:
        # A copy would have the connections and descriptors of this one, and close them when it is forgotten.
        raise TypeError("a limiter cannot be copied or pickled: make one where it is needed")

    def _as(self, kind: type[B]) -> B:
        """The same limiter, which waits as that kind does."""
        if isinstance(self, kind):
            return self
        made = kind.__new__(kind)
        made._courier, made._user = self._courier, self._user
        made._on_unavailable, made._strict = self._on_unavailable, self._strict
        return made

    def _caller(self) -> tuple[Waker, Any]:
        """How to wake the caller; and the task that it is, if it is one."""
        raise NotImplementedError

    def _is_strict(self, strict: bool) -> bool:
        """Whether a call is strict: it says so, or all are."""
        return _arguments.flag("strict", strict) or self._strict

    def _acquiring(self, kind: Kind, holder: str | None, renew: bool = True) -> Course[Lease]:
        courier = self._courier
        self._check_open()
        now = time.monotonic()
        timeout = kind.timeout
        waker, task = self._caller()
        request = Request(
            kind,
            who(courier.pid, None if task is None else task.get_name()) if holder is None else holder,
            holder is not None,
            new_id(),
            self._on_unavailable,
            None if timeout is None else now + timeout,
            renew,
            None if task is None else weakref.ref(task),
            self._use,
            waker=waker,
            user=self._user,
        )
        if _observer.is_on:
            _observer.asked(request, now)
        leaves_by = 0.0
        # The last resort: an interrupt can strike in the handler of another.
        anchor = _Anchor()
        request.orphan = orphan(anchor, courier.inbox.append, request)
        try:
            courier.put(courier.ask, request)
            while not request.answered:
                left = (leaves_by or _until(timeout, now, request.began_at)) - time.monotonic()
                if left > 0:
                    yield waker, None if left == math.inf else min(left, timeout or PATIENCE)
                elif leaves_by:
                    raise request.late()
                else:
                    leaves_by = time.monotonic() + (_LEAVES_WITHIN if timeout else PATIENCE)
                    courier.put(courier.leave, request)
            if request.error is not None:
                raise request.error
            while (left := request.goes_at - time.monotonic()) > 0:
                self._check_open()
                yield waker, left
            lease, request.lease = request.lease, None
            assert lease is not None
            lease.slots, lease._limiter, lease._strict = kind.counts, self, kind.strict
            request.orphan = None
        except BaseException:
            if request.error is None:
                courier.put(courier.give_up, request)
            request.orphan = None  # not before: another interrupt may strike here
            raise
        if kind.clamp and lease.enforced:
            yield from self._clamped(lease, request, _until(timeout, now, time.monotonic()) + _LEAVES_WITHIN)
        return lease

    def _clamped(self, lease: Lease, request: Request, until: float) -> Course[None]:
        """Find out how many slots a lease has got, until then (monotonic) at the latest."""
        try:
            found = yield from self._ask(_sql.TAKEN, lease.id, until=until)
        except BaseException as error:
            if isinstance(error, LimiterUnavailable) and self._on_unavailable == "allow":
                log.warning("what was taken of %s is not known: %s", ", ".join(lease.names), error)
                return
            self._release_later(lease)
            if request.kind.timeout and time.monotonic() >= until:
                raise request.late() from error
            raise
        left = {(name, key): slots for name, key, slots in found}
        slots = []
        for place, count in zip(lease.places, lease.slots, strict=True):
            slots.append(min(count, left.get(place, count)))
            if place in left:
                left[place] -= slots[-1]
        lease.slots = tuple(slots)

    def _releasing(self, lease: Lease) -> Course[bool | None]:
        """Whether it was still live; None if the database could not be asked."""
        if not lease.is_ours():
            return False
        if self._courier.is_inside():
            return self._release_later(lease)
        waker, _ = self._caller()
        release = Release(lease.id, lease.places, lease, waker=waker, user=self._user)
        self._courier.put(self._courier.release, release)
        lease.released = True
        while not release.answered:
            yield waker, None
        if release.error is not None:
            raise release.error
        return release.live

    def _release_later(self, lease: Lease) -> bool:
        """End a lease in the background. Whether it was still live, as far as is known here. Callable from anywhere."""
        if not lease.is_ours():
            return False
        live = not lease.lost
        self._courier.put(self._courier.release, Release(lease.id, lease.places))
        lease.released = True
        return live

    def _ask(
        self,
        statement: Statement,
        *params: Value | Iterable[Value],
        then: Callable[[PGresult], None] | None = None,
        until: float = math.inf,
    ) -> Course[builtins.list[Row]]:
        """Ask the database something, and wait until then (monotonic) for the answer. Returns the rows."""
        self._check_open()
        waker, _ = self._caller()
        query = Query(statement, [_codec.encode(param) for param in params], then, waker=waker, user=self._user)
        self._courier.put(self._courier.ask_query, query)
        while not query.answered:
            left = until - time.monotonic()
            if left <= 0:
                raise LimiterUnavailable("the database has not answered in time")
            yield waker, None if left == math.inf else left
        if query.error is not None:
            raise query.error
        return [] if query.result is None else _codec.rows(query.result)

    def _check_open(self) -> None:
        if self._user.closed:
            raise LimiterUnavailable("the limiter has been closed")
        if self._courier.is_inside():
            raise LimiterUnavailable("a finalizer that runs in a thread of the limiter cannot wait for it")


class Calls(Base):
    """What a limiter can do."""

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
        clamp: bool = False,
    ) -> Course[Lease]:
        """Take slots until ``release``, or for a block. Arguments and errors as ``concurrency``.

        ``with limiter.acquire(…) as use`` (``async with`` for tasks) gives them back at the end of the block. Otherwise
        keep the lease that it returns: a lease that is no longer referred to is given back.

        Slots of a rate limit are held, and also added to its level. ``use.settle({name: slots})`` corrects the level.

        clamp: more slots than a limit has count as the limit; ``use.slots`` says what was taken.

        renew: False does not renew the lease. It goes on after this process has ended, for ``lease_duration`` seconds
        or until it is released by its id.
        """
        kind = checked(
            *(names, occupy, timeout_seconds, max_retries, lease_duration, self._is_strict(strict)),
            *(None, key, priority, False, clamp),
        )
        return self._acquiring(kind, None if holder is None else _arguments.holder(holder), renew)

    def rate_limit(
        self,
        names: Names,
        occupy: int = 1,
        timeout_seconds: float | None = None,
        strict: bool = False,
        key: str = "",
    ) -> Course[None]:
        """Take slots that come back by decay only, and sleep until the moment of the grant.

        A request whose earliest moment lies beyond ``timeout_seconds`` is refused at once and takes nothing. Raises as
        ``concurrency``, and NoSlotDecay for a limit without ``slot_decay_per_second``.
        """
        kind = checked(names, occupy, timeout_seconds, None, 300, self._is_strict(strict), None, key, 0, True)
        yield from self._acquiring(kind, None)

    def release(self, lease: Lease | UUID | str) -> Course[bool]:
        """End a lease now instead of at its expiry. Safe to repeat.

        Given the id of a waiting request, it takes that request out of its line.

        Returns whether it was still live, or waiting. Also True if the connection was lost before the reply came, and
        the lease had ended when the release was repeated.

        Raises:
            LimiterUnavailable: an id was given, and the database could not be reached. A lease of this limiter is
                released as soon as it can be.
        """
        if not isinstance(lease, Lease):
            lease = Lease.foreign(_lease_id(lease))
        return bool((yield from self._releasing(lease)))

    def settle(self, lease: Lease | UUID | str, used: Counts) -> Course[bool]:
        """Tell how many slots of rate limits a lease has really used: their levels get them instead of what was taken.

        A level goes up, even past the limit, so that waiters wait until it has decayed; or it goes down. The slots that
        are held stay the same until the lease ends. If it is called again, the last numbers count. Without it, what was
        taken stands.

        used: slots by limit, or by (name, key) where the lease has several keys of a limit. A limit that is not
        enforced is left out. So is one that was renamed meanwhile: what was taken of it stands.

        Returns whether the lease was live. If it had ended, nothing was changed: settle before the release. With
        ``on_unavailable="allow"`` also False, with a warning, where the database cannot be reached.

        Raises:
            InvalidArgument: a number below 0, or a limit or key that the lease is not of. Where only its id is given,
                a limit that it is not on is left out.
            NoSlotDecay: the limit has no ``slot_decay_per_second``, and so no level.
            LimiterUnavailable: what was taken stands, unless the database has heard of it.
        """
        if isinstance(lease, Lease) and lease.places:
            parts = settled(lease, used)
            if not parts or lease.released:
                return False
        else:
            parts = settled_by_id(used)
        columns = ([part.name for part in parts], [part.slots for part in parts], [part.key for part in parts])
        try:
            found = yield from self._ask(_sql.SETTLE, _lease_id(lease), *columns)
        except LimiterUnavailable as error:
            if self._on_unavailable != "allow":
                raise
            log.warning("%s not settled: %s", ", ".join(columns[0]), error)
            return False
        return bool(found[0][0])

    # Limits.

    def create(
        self,
        name: str,
        limit: int,
        slot_decay_per_second: float = 0.0,
        active: bool = True,
        max_waiters: int | None = None,
        description: str | None = None,
    ) -> Course[Limit]:
        """Create a limit, and return it. Raises LimitExists, InvalidArgument.

        Args:
            name: 1 to 200 characters, no control character, none of ``/ % & > <``.
            limit: how many slots; 0 admits nobody.
            slot_decay_per_second: slots that come back each second; 0 makes it a concurrency limit.
            active: False does not enforce it.
            max_waiters: the longest line for each key; None: no bound.
            description: what it is for.
        """
        yield from self._ask(
            _sql.CREATE,
            _arguments.text("name", name),
            _arguments.whole("limit", limit, least=0),
            _arguments.rate(slot_decay_per_second),
            _arguments.flag("active", active),
            _arguments.optional_whole("max_waiters", max_waiters, least=0),
            _arguments.optional_text("description", description),
        )
        return (yield from Calls.get(self, name))

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
    ) -> Course[Limit]:
        """Change the fields that are given, at once, and return the limit. Raises LimitNotFound, LimitExists.

        ``max_waiters=-1``: no bound. ``description=""``: none. ``new_name`` renames the limit and keeps everything.
        """
        yield from self._ask(
            _sql.UPDATE,
            _arguments.text("name", name),
            _arguments.optional_whole("limit", limit, least=0),
            None if slot_decay_per_second is None else _arguments.rate(slot_decay_per_second),
            _arguments.optional_flag("active", active),
            _arguments.optional_whole("max_waiters", max_waiters, least=-1),
            _arguments.optional_text("description", description),
            _arguments.optional_text("new_name", new_name),
        )
        return (yield from Calls.get(self, name if new_name is None else new_name))

    def upsert(
        self,
        name: str,
        limit: int,
        slot_decay_per_second: float = 0.0,
        active: bool = True,
        max_waiters: int | None = None,
        description: str | None = None,
    ) -> Course[Limit]:
        """Create a limit, or change the one of that name to these values, and return it. Arguments as ``create``."""
        _arguments.whole("limit", limit, least=0)
        _arguments.flag("active", active)
        _arguments.optional_whole("max_waiters", max_waiters, least=0)
        _arguments.rate(slot_decay_per_second)
        while True:
            try:
                return (
                    yield from Calls.update(
                        self,
                        name,
                        limit=limit,
                        slot_decay_per_second=slot_decay_per_second,
                        active=active,
                        max_waiters=-1 if max_waiters is None else max_waiters,
                        description="" if description is None else description,
                    )
                )
            except LimitNotFound:
                pass
            try:
                return (
                    yield from Calls.create(self, name, limit, slot_decay_per_second, active, max_waiters, description)
                )
            except LimitExists:
                pass

    def delete(self, name: str) -> Course[None]:
        """Delete a limit with its leases; its waiters are told. Raises LimitNotFound."""
        yield from self._ask(_sql.DELETE, _arguments.text("name", name))

    def get(self, name: str) -> Course[Limit]:
        """One limit, as it stands now. Raises LimitNotFound."""
        found = yield from self._ask(_sql.LIMITS, _arguments.text("name", name))
        if not found:
            raise LimitNotFound(f"there is no limit named {name!r}")
        return Limit(*found[0])

    def list(self) -> Course[builtins.list[Limit]]:
        """All limits by name, as they stand now."""
        found = yield from self._ask(_sql.LIMITS, None)
        return [Limit(*row) for row in found]

    def keys(self, name: str | None = None) -> Course[builtins.list[Key]]:
        """The keys that were used, of one limit or of all, as they stand now."""
        found = yield from self._ask(_sql.KEYS, _arguments.optional_text("name", name))
        return [Key(*row) for row in found]

    def reset(self, name: str, key: str | None = None) -> Course[int]:
        """End every lease of a limit (or of one key) and set its level to zero. Returns how many leases ended."""
        found = yield from self._ask(_sql.RESET, _arguments.text("name", name), _arguments.optional_text("key", key))
        return int(found[0][0])

    def _limit_faults(self, limits: str) -> Course[builtins.list[tuple[int, str, str]]]:
        """What is wrong with limits that somebody wants, an array of JSON: the number of each, the field, the fault."""
        found = yield from self._ask(_sql.LIMIT_FAULTS, limits)
        return [(nth, field, fault) for nth, field, fault in found]

    def _apply(self, plan: str) -> Course[None]:
        """Do what a plan says, given as JSON. Raises LimitsChanged if the limits are not as the plan found them."""
        yield from self._ask(_sql.APPLY, plan)

    def peek(
        self,
        names: Names,
        occupy: int = 1,
        *,
        key: str = "",
        priority: int = 0,
        strict: bool = False,
        for_rate: bool = False,
    ) -> Course[Peek]:
        """Tell what a request would be answered now, without making it. ``for_rate``: by ``rate_limit``."""
        parts = _arguments.parts(names, occupy, key)
        found = yield from self._ask(
            _sql.PEEK,
            [part.name for part in parts],
            [part.slots for part in parts],
            [part.key for part in parts],
            _arguments.whole("priority", priority),
            self._is_strict(strict),
            _arguments.flag("for_rate", for_rate),
        )
        return Peek(*found[0])

    def adjust(self, name: str, slots: int, key: str = "") -> Course[float]:
        """Add slots to the level of a rate limit; a number below 0 takes them off. Returns the new level in slots.

        Needs the role pglimits_admin. Raises LimitNotFound, NoSlotDecay.
        """
        found = yield from self._ask(
            _sql.ADJUST, _arguments.text("name", name), _arguments.whole("slots", slots), _arguments.text("key", key)
        )
        return float(found[0][0])

    def holders(
        self, name: str | None = None, *, count: int | None = None, offset: int = 0
    ) -> Course[builtins.list[Holder]]:
        """The live leases, of one limit or of all: at most ``count`` of them, from the one at ``offset`` on."""
        found = yield from self._ask(_sql.HOLDERS, _arguments.optional_text("name", name), *page(count, offset))
        return [Holder(*with_holder(row)) for row in found]

    def waiters(
        self, name: str | None = None, *, count: int | None = None, offset: int = 0
    ) -> Course[builtins.list[Waiter]]:
        """The waiters of one limit or of all, in order: at most ``count`` of them, from the one at ``offset`` on."""
        found = yield from self._ask(_sql.WAITERS, _arguments.optional_text("name", name), *page(count, offset))
        return [Waiter(*with_holder(row)) for row in found]

    def force_release(self, lease: UUID | str) -> Course[bool]:
        """End a lease that somebody else holds, or take a request out of its line. Returns whether it was still there.

        It makes an event. The holder is not stopped: it finds out when it next renews.

        Raises:
            PermissionDenied: the role is no pglimits_admin.
        """
        found = yield from self._ask(_sql.FORCE_RELEASE, _lease_id(lease))
        return bool(found[0][0])

    def renew(self, lease: Lease | UUID | str, lease_duration: float | None = None) -> Course[bool]:
        """Renew a lease that is not renewed by itself. Returns whether it was still live."""
        seconds = None if lease_duration is None else _arguments.lease_duration(lease_duration)
        asked = time.monotonic()

        def then(result: PGresult) -> None:
            ((_, live, expires_at),) = _codec.rows(result)
            if live and isinstance(lease, Lease):
                self._courier.leases.extend(lease, asked, expires_at, seconds)

        found = yield from self._ask(_sql.RENEW, None, [_lease_id(lease)], seconds, then=then)
        return bool(found[0][1])

    def sweep(self) -> Course[Swept]:
        """Tidy up, and take the samples of ``history``. Nothing else depends on it but the size of the tables."""
        found = yield from self._ask(_sql.SWEEP)
        return Swept(*found[0])

    def version(self) -> Course[str]:
        """The version of pglimits in the database."""
        found = yield from self._ask(_sql.VERSION)
        return str(found[0][0])

    def close(self) -> Course[None]:
        """Release every lease that is still held, and close the limiter's connections.

        Work that goes on under such a lease has lost it.
        """
        if self._user.gone:
            return
        self._user.closed = True
        last = forget(self._courier, self._user)
        if not self._courier.is_needed():
            if last:
                self._courier.shut()
            return
        waker, _ = self._caller()
        close = Errand(waker=waker, user=None if last else self._user)
        self._courier.put(self._courier.end, close)
        self._user.gone = True
        while not close.answered:
            yield waker, None


def _until(timeout: float | None, called_at: float, began_at: float) -> float:
    """When (monotonic) the time of a request is over. One that may not wait has a moment for the lock once it was sent,
    and longer until there is a connection."""
    if timeout is None:
        return math.inf
    return called_at + timeout if timeout else (began_at + PATIENCE if began_at else called_at + _CONNECTS_WITHIN)


def _lease_id(lease: Lease | UUID | str) -> UUID:
    """The id of a lease, given as itself, as a UUID, or as the text of one."""
    if isinstance(lease, Lease):
        return lease.id
    try:
        return lease if isinstance(lease, UUID) else UUID(lease)
    except (ValueError, AttributeError, TypeError):
        raise InvalidArgument(f"lease must be a Lease or the UUID of one, not {lease!r}") from None


def page(count: int | None, offset: int) -> tuple[int | None, int]:
    """Which rows: at most so many, from the one at this offset on."""
    return _arguments.optional_whole("count", count, least=1), _arguments.whole("offset", offset, least=0)


def with_holder(row: Row) -> Row:
    return (*row[:4], as_holder(row[4]), *row[5:])


def as_holder(text: str | None) -> Any:
    """A holder from its JSON. What is too much for Python, numbers of thousands of digits for instance, stays text."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    level = [found]
    for _ in range(_DEEPEST):
        if not level:
            return found
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _items(outer)]
    return text


def _items(found: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return found.values() if isinstance(found, dict) else found
