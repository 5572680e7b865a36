"""What callers hand to the courier: requests, releases, and questions."""

from __future__ import annotations

import functools
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from psycopg.pq.abc import PGresult

from . import _arguments
from ._codec import array, encode
from ._leases import Lease, Orphan, Place
from ._sql import Statement
from ._wake import Waker
from .errors import AcquireTimeout, LimiterUnavailable, PglimitsError

if TYPE_CHECKING:
    from ._observer import Asked

OnUnavailable = Literal["raise", "wait", "allow"]

Params = Sequence[bytes | None]

PATIENCE = 1.0
"""Seconds that a request which may not wait at all still waits for a lock, as contention is no reason to refuse."""


class User:
    """One of those who share a courier: a limiter, until it is closed. ``gone``: the courier has been told so."""

    __slots__ = ("closed", "gone")

    def __init__(self) -> None:
        self.closed = self.gone = False


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What requests have in common that differ in nothing but who asks.

    Attributes:
        places: each limit and key.
        timeout: seconds, None for ever.
        lease_duration: seconds.
        for_rate: whether it is a rate_limit.
        limits, slots: each limit, and how many slots of all its keys.
        counts: of each of the places, how many slots.
        clamp: more slots than a limit has count as the limit.
        head, tail: the parameters of a statement, before and behind the timeout and the ids.
    """

    places: tuple[Place, ...]
    timeout: float | None
    lease_duration: float
    for_rate: bool
    strict: bool
    head: Params
    between: Params
    limits: tuple[str, ...]
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    clamp: bool

    @property
    def named(self) -> str:
        return ", ".join([repr(name) for name, _ in self.places])


@dataclass(slots=True, eq=False)
class Errand:
    """What a caller hands to the courier, and waits for."""

    waker: Waker | None = field(default=None, kw_only=True)
    user: User | None = field(default=None, kw_only=True)
    answered: bool = field(default=False, init=False)
    error: PglimitsError | None = field(default=None, init=False)


@dataclass(slots=True, eq=False)
class Request(Errand):
    """A caller wants slots.

    Attributes:
        holder: as JSON. says_who: its caller has said so; else what the database cannot take in it is left out.
        until: when (monotonic) its caller has no more time.
        task: a reference to the task that asks, if one does. made: of which class its lease is.
        lease, goes_at: what came of it, and when (monotonic) it goes.
        given_up: its caller waits no longer. leaving: it waits only to hear that it has left.
        waits: it stands in line. looks_at: when it is to look, unless there is news before. frees_at: when time alone
            may let it in. called_in: when it was last known to be alive.
        began_at, asked_at: when it was sent first, and last: an answer is of no earlier moment.
        sent: before. unheard: nobody knows what became of that. maybe_there: the database may have something of it.
        alone: it goes by itself, as it has met an error that may be another's. locked: it has met a lock.
        asked: somebody wants to know what becomes of it.
    """

    kind: Kind
    holder: str
    says_who: bool
    lease_id: UUID
    on_unavailable: OnUnavailable
    until: float | None
    renew: bool
    task: Any
    made: type[Lease] = Lease
    lease: Lease | None = field(default=None, init=False)
    goes_at: float = field(default=0.0, init=False)
    given_up: bool = field(default=False, init=False)
    leaving: bool = field(default=False, init=False)
    under_way: bool = field(default=False, init=False)
    waits: bool = field(default=False, init=False)
    looks_at: float = field(default=math.inf, init=False)
    frees_at: float = field(default=math.inf, init=False)
    called_in: float = field(default=0.0, init=False)
    began_at: float = field(default=0.0, init=False)
    asked_at: float = field(default=0.0, init=False)
    sent: bool = field(default=False, init=False)
    unheard: bool = field(default=False, init=False)
    maybe_there: bool = field(default=False, init=False)
    alone: bool = field(default=False, init=False)
    locked: bool = field(default=False, init=False)
    tries: int = field(default=0, init=False)
    pause: float = field(default=0.05, init=False)
    orphan: Orphan | None = field(default=None, init=False)
    asked: Asked | None = field(default=None, init=False)

    def late(self) -> PglimitsError:
        """Its time is over. Whether there was room nobody knows where one that tries once has had no answer."""
        kind = self.kind
        if self.under_way and not kind.timeout and self.on_unavailable == "raise":
            return LimiterUnavailable("the database has not answered in time")
        error = AcquireTimeout(
            f"no slot of {kind.named} " + (f"within {kind.timeout:g} s" if kind.timeout else "in time")
        )
        if self.frees_at < math.inf:
            error.retry_after = max(self.frees_at - time.monotonic(), 0.0)
        return error


@dataclass(slots=True, eq=False)
class Release(Errand):
    """A lease, or a place in line, that is given back.

    Attributes:
        places: each limit and key that it is on, as far as that is known: those on the same are locked together.
        again_after: it is released once more so many seconds later, where the first time may be too early.
        then: what to do when it is over, however that went.
        live: whether it was still live; None if the database could not be asked yet.
        alone, unheard: as of a request.
    """

    lease_id: UUID
    places: tuple[Place, ...]
    lease: Lease | None = None
    again_after: float = 0.0
    then: Callable[[], None] | None = None
    live: bool | None = field(default=None, init=False)
    alone: bool = field(default=False, init=False)
    unheard: bool = field(default=False, init=False)
    tries: int = field(default=0, init=False)
    pause: float = 1.0

    @property
    def is_foreign(self) -> bool:
        """It was named by its id: who holds it is elsewhere."""
        return self.waker is not None and not self.places


@dataclass(slots=True, eq=False)
class Query(Errand):
    """A question to the database, in a transaction of its own; asked again where the connection is lost."""

    statement: Statement
    params: Params
    then: Callable[[PGresult], None] | None = None
    result: PGresult | None = field(default=None, init=False)
    tries: int = field(default=0, init=False)


def checked(names: _arguments.Names, *rest: Any) -> Kind:
    """Check the arguments of a request, which are those of ``_kind``."""
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
    for_rate: bool = False,
    clamp: bool = False,
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
    slots: dict[str, int] = {}
    for part in parts:
        slots[part.name] = slots.get(part.name, 0) + part.slots
    is_strict = _arguments.flag("strict", strict)
    counts = tuple(part.slots for part in parts)
    clamp = _arguments.flag("clamp", clamp)
    return _same(
        places, timeout, duration, for_rate, is_strict, head, between, tuple(slots), tuple(slots.values()), counts,
        clamp,
    )  # fmt: skip


# One object for all that are alike: requests of one kind travel together.
_same = functools.lru_cache(maxsize=1000)(Kind)
# By type too: True is no number of slots.
_kind_again = functools.lru_cache(maxsize=1000, typed=True)(_kind)


def who(pid: int, task: str | None = None) -> str:
    """The default holder, as JSON: host, pid, program, and the thread or task."""
    kind, name = ("thread", threading.current_thread().name) if task is None else ("task", task)
    return f'{_this_process(pid)},"{kind}":{encode_basestring(_storable(name))}}}'


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
