"""What callers hand to the courier: requests, releases, and questions."""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from psycopg.pq.abc import PGresult

from . import _arguments
from ._codec import array, encode
from ._leases import Lease, Orphan, Place
from ._sql import Statement
from ._wake import Waker
from .errors import AcquireTimeout, PglimitsError

if TYPE_CHECKING:
    from ._courier import Courier

OnUnavailable = Literal["raise", "wait", "allow"]

Params = Sequence[bytes | None]

PATIENCE = 1.0
"""Seconds that a request which may not wait at all still waits for a lock, as contention is no reason to refuse."""


class User:
    """One of those who share a courier: a limiter, until it is closed."""

    __slots__ = ("closed",)

    def __init__(self) -> None:
        self.closed = False


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What requests have in common that differ in nothing but who asks.

    Attributes:
        places: each limit and key.
        timeout: seconds, None for ever.
        lease_duration: seconds.
        for_rate: whether it is a rate_limit.
        head, tail: the parameters of a statement, before and behind the timeout and the ids.
    """

    places: tuple[Place, ...]
    timeout: float | None
    lease_duration: float
    for_rate: bool
    strict: bool
    head: Params
    between: Params

    @property
    def named(self) -> str:
        return ", ".join([repr(name) for name, _ in self.places])


class Errand:
    """What a caller hands to the courier, and waits for."""

    __slots__ = ("answered", "error", "user", "waker")

    def __init__(self, waker: Waker | None, user: User | None = None) -> None:
        self.waker = waker
        self.user = user
        self.answered = False
        self.error: PglimitsError | None = None

    def arrive(self, courier: Courier) -> None:
        """The courier has it now. Called in its thread, as is everything that follows."""
        raise NotImplementedError


class Request(Errand):
    """A caller wants slots."""

    __slots__ = (
        "alone",
        "asked_at",
        "called_in",
        "given_up",
        "goes_at",
        "holder",
        "kind",
        "lease",
        "lease_id",
        "leaving",
        "locked",
        "looks_at",
        "maybe_there",
        "on_unavailable",
        "orphan",
        "pause",
        "renew",
        "says_who",
        "sent",
        "task",
        "tries",
        "under_way",
        "unheard",
        "until",
        "waits",
    )

    def __init__(
        self,
        kind: Kind,
        holder: str,
        lease_id: UUID,
        waker: Waker,
        user: User,
        on_unavailable: OnUnavailable,
        until: float | None,
        *,
        renew: bool,
        says_who: bool,
    ) -> None:
        self.waker = waker
        self.user = user
        self.answered = False
        self.error = None
        self.kind = kind
        # As JSON. Whether its caller has said so: else what the database cannot take in it is left out.
        self.holder = holder
        self.says_who = says_who
        self.lease_id = lease_id
        self.on_unavailable: OnUnavailable = on_unavailable
        # When (monotonic) its caller has no more time.
        self.until = until
        self.renew = renew
        # What came of it: a lease, or an error; and when (monotonic) it goes.
        self.lease: Lease | None = None
        self.goes_at = 0.0
        # Its caller waits no longer; or only to hear that it has left.
        self.given_up = False
        self.leaving = False
        self.under_way = False
        # It stands in line. When it is to look, unless there is news before, and when it was last known to be alive.
        self.waits = False
        self.looks_at = 0.0
        self.called_in = 0.0
        # Sent before. Nobody knows what became of that. The database may have something of it.
        self.sent = False
        self.unheard = False
        self.maybe_there = False
        # It goes by itself: it has met an error that may be another's. It has met a lock.
        self.alone = False
        self.locked = False
        self.tries = 0
        self.pause = 0.05
        # When it was sent: an answer is of no earlier moment.
        self.asked_at = 0.0
        self.orphan: Orphan | None = None
        self.task: Any = None

    def arrive(self, courier: Courier) -> None:
        courier.ask(self)

    def late(self) -> AcquireTimeout:
        """Its time is over."""
        kind = self.kind
        within = f"within {kind.timeout:g} s" if kind.timeout else "in time"
        return AcquireTimeout(f"no slot of {kind.named} {within}")


class GiveUp(Errand):
    """The caller of a request waits no longer: whatever it got, or gets, is given back."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        super().__init__(None)
        self.request = request

    def arrive(self, courier: Courier) -> None:
        courier.give_up(self.request)


class Leave(Errand):
    """The time of a request is over: it is to leave its line."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        super().__init__(None)
        self.request = request

    def arrive(self, courier: Courier) -> None:
        courier.leave(self.request)


class Release(Errand):
    """A lease, or a place in line, that is given back.

    ``live``: whether it was still live; None if the database could not be asked yet. ``again_after``: it is released
    once more so many seconds later, where the first time may come before what it is to undo. ``then``: what to do when
    it is over, however that went.
    """

    __slots__ = ("again_after", "alone", "lease", "lease_id", "live", "places", "then", "tries", "unheard")

    def __init__(
        self,
        lease_id: UUID,
        places: tuple[Place, ...] = (),
        waker: Waker | None = None,
        lease: Lease | None = None,
        again_after: float = 0.0,
        then: Callable[[], None] | None = None,
    ) -> None:
        self.waker = waker
        self.user = None
        self.answered = False
        self.error = None
        self.lease_id = lease_id
        # Each limit and key that it is on, as far as that is known: only those on the same are locked together.
        self.places = places or (("", lease_id.hex),)
        self.lease = lease
        self.live: bool | None = None
        self.again_after = again_after
        self.then = then
        self.alone = False
        self.tries = 0
        # Sent before, and nobody knows what became of that.
        self.unheard = False

    @property
    def is_foreign(self) -> bool:
        """It was named by its id: who holds it is elsewhere."""
        return self.waker is not None and (self.lease is None or not self.lease.places)

    def arrive(self, courier: Courier) -> None:
        courier.release(self)


class Query(Errand):
    """A question to the database, in a transaction of its own; asked again where the connection is lost."""

    __slots__ = ("params", "result", "statement", "then", "tries")

    def __init__(
        self,
        statement: Statement,
        params: Params,
        waker: Waker | None,
        user: User | None,
        then: Callable[[Courier, PGresult], None] | None = None,
    ) -> None:
        super().__init__(waker, user)
        self.statement = statement
        self.params = params
        self.result: PGresult | None = None
        self.then = then
        self.tries = 0

    def arrive(self, courier: Courier) -> None:
        courier.query(self)


class Close(Errand):
    """A limiter is closed, or (no user) all of them are."""

    __slots__ = ()

    def arrive(self, courier: Courier) -> None:
        courier.end(self)


def checked(
    names: _arguments.Names,
    occupy: int,
    timeout_seconds: float | None,
    max_retries: int | None,
    lease_duration: float,
    strict: bool,
    raise_on_lease_renewal_failure: bool | None,
    key: str,
    priority: int,
    for_rate: bool = False,
) -> Kind:
    """Check the arguments of a request."""
    rest = (
        occupy,
        timeout_seconds,
        max_retries,
        lease_duration,
        strict,
        raise_on_lease_renewal_failure,
        key,
        priority,
        for_rate,
    )
    try:
        return _kind_again(names, *rest) if isinstance(names, str) else _kind(names, *rest)
    except TypeError:  # something that cannot be hashed, and so is of a wrong type
        return _kind(names, *rest)


def _kind(
    names: _arguments.Names,
    occupy: int,
    timeout_seconds: float | None,
    max_retries: int | None,
    lease_duration: float,
    strict: bool,
    raise_on_lease_renewal_failure: bool | None,
    key: str,
    priority: int,
    for_rate: bool,
) -> Kind:
    _arguments.optional_flag("raise_on_lease_renewal_failure", raise_on_lease_renewal_failure)
    parts = _arguments.parts(names, occupy, key)
    duration = _arguments.lease_duration(lease_duration)
    head = (
        array(part.name for part in parts).encode(),
        array(part.slots for part in parts).encode(),
        array(part.key for part in parts).encode(),
        encode(for_rate),
    )
    between = (encode(duration), encode(_arguments.whole("priority", priority)))
    places = tuple((part.name, part.key) for part in parts)
    timeout = _arguments.timeout(timeout_seconds, max_retries)
    return _same(places, timeout, duration, for_rate, _arguments.flag("strict", strict), head, between)


# One object for all that are alike: requests of one kind travel together.
_same = functools.lru_cache(maxsize=1000)(Kind)
# By type too: True is no number of slots.
_kind_again = functools.lru_cache(maxsize=1000, typed=True)(_kind)


def who(task: str | None = None) -> str:
    """The default holder, as JSON: host, pid, program, and the thread or task."""
    if task is not None:
        return f'{_this_process(os.getpid())},"task":{encode_basestring(_storable(task))}}}'
    return f'{_this_process(os.getpid())},"thread":{encode_basestring(_storable(threading.current_thread().name))}}}'


def _storable(name: str) -> str:
    """A name that nobody passed, as the database takes it."""
    return name[:200].encode(errors="replace").decode().replace("\0", "?")


@functools.lru_cache(maxsize=1)
def _this_process(pid: int) -> str:
    program = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "python"  # noqa: PTH119
    who = {"host": _storable(socket.gethostname()), "pid": pid, "program": _storable(program)}
    return json.dumps(who, ensure_ascii=False)[:-1]


_random: list[bytes] = []
os.register_at_fork(after_in_child=_random.clear)


def new_id() -> UUID:
    """A random UUID, as ``uuid4`` makes it, but asking the system for randomness only now and then."""
    try:
        mine = _random.pop()
    except IndexError:
        block = os.urandom(16 * 256)
        _random.extend(block[at : at + 16] for at in range(16, len(block), 16))
        mine = block[:16]
    return UUID(bytes=mine, version=4)
