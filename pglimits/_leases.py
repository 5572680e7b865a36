"""Leases: the handle that a caller has, and when each is renewed.

The courier sends the renewals, all that are due in one statement.
"""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

from . import _observer

if TYPE_CHECKING:
    from ._requests import User

log = logging.getLogger("pglimits.lease")

Place = tuple[str, str]
"""A limit and a key."""

_pid = os.getpid()


def _after_fork() -> None:
    global _pid
    _pid = os.getpid()


os.register_at_fork(after_in_child=_after_fork)

CLAIMED_WITHIN = 1.0
"""Seconds after which a lease whose claim has not been answered is renewed: that claims it as well."""


class Orphan(weakref.ref[Any]):
    """What is left behind when its anchor dies without having dropped this: it is handed to a function.

    The last resort against interrupts, one of which can strike in the handler of another. The function has to be one
    of C, in which no signal is heard.
    """

    __slots__ = ("subject",)
    subject: Any


def orphan(anchor: object, take: Callable[[Any], None], subject: object) -> Orphan:
    """Have the subject handed to ``take`` when the anchor dies, unless what this returns is dropped before."""
    made = Orphan(anchor, take)
    made.subject = subject
    return made


@dataclass(slots=True, weakref_slot=True, eq=False, repr=False)
class Lease:
    """Slots that are held. Ends when it is released, or at ``expires_at`` if it can no longer be renewed.

    Attributes:
        id: the lease's id.
        places: each limit and key that it was asked of.
        fences: for each of them a number that grows with every grant; None where the limit is not enforced.
        slots: for each of them, how many were taken; with ``clamp`` they may be fewer than were asked for.
        enforced: False if every limit is missing or inactive: nothing is held then.
        released: whether it was given back with ``release``, or by leaving its block.
        pid: of the process that holds it.
    """

    id: UUID
    places: tuple[Place, ...]
    fences: tuple[int | None, ...]
    enforced: bool
    pid: int
    _expires_at: datetime | None = None
    # By the monotonic clock.
    _ends: float = math.inf
    _duration: float = 0.0
    # Seconds from one renewal to the next.
    _pause: float = 0.0
    # Handed over, and its full duration has not begun, as far as is known here.
    _unclaimed: bool = False
    _user: User | None = None
    # The task that took it, if there is one.
    _task: Callable[[], Any] | None = None
    released: bool = field(default=False, init=False)
    _lost: bool = field(default=False, init=False)
    # Given back when the context that has it is forgotten.
    _left: Orphan | None = field(default=None, init=False)
    slots: tuple[int, ...] = field(default=(), init=False)
    # Whose it is, and whether that it was lost raises at the end of a block.
    _limiter: Any = field(default=None, init=False)
    _strict: bool = field(default=False, init=False)
    # By the courier, as its limiter or its loop was closed.
    _given_back: bool = field(default=False, init=False)
    # Taken out by whoever calls it, so that it is called once.
    _on_lost: list[Callable[[], None]] = field(default_factory=list, init=False)

    @classmethod
    def foreign(cls, lease_id: UUID) -> Lease:
        """A lease that somebody else holds, or held, to be released."""
        return cls(lease_id, (), (), True, _pid)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Have a function called when the lease is lost, by the thread that notices. At once, if it is lost already."""
        self._on_lost.append(callback)
        if self._lost:
            self._tell()

    def _tell(self) -> None:
        while True:
            try:
                callback = self._on_lost.pop(0)
            except IndexError:
                return
            try:
                callback()
            except Exception:
                log.exception("what is to be done when the lease %s is lost has failed", self.id)

    def is_here(self) -> bool:
        """Whether this process took it, and has not released it. False in a process that was forked since."""
        return self.enforced and not self.released and self.pid == _pid

    def is_ours(self) -> bool:
        """Whether this process still has to give it back. False once its limiter was closed."""
        return not self._given_back and self.is_here()

    @property
    def names(self) -> tuple[str, ...]:
        """The limits that it was asked of."""
        return tuple(name for name, _ in self.places)

    @property
    def fence(self) -> int | None:
        """The fence of the first limit that is enforced."""
        return next((fence for fence in self.fences if fence is not None), None)

    @property
    def expires_at(self) -> datetime | None:
        """When it ends unless it is renewed, by the database's clock; None if nothing is held.

        For a moment after a waiter was granted it is at most 10 seconds ahead. Then the full duration has begun.
        """
        return self._expires_at

    @property
    def lost(self) -> bool:
        """Whether it has ended before it was released: somebody else may have its slots."""
        return self._lost or (self.enforced and not self.released and time.monotonic() >= self._ends)

    def _extend(self, asked: float, expires_at: datetime | None) -> None:
        """It was renewed, by a statement that was sent then (monotonic). That moves its end no nearer."""
        self._expires_at = expires_at
        self._ends = max(self._ends, asked + self._duration)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lease cannot be copied or pickled: hand on its id, with which it can be released")

    def __repr__(self) -> str:
        return f"<Lease {self.id} on {', '.join(self.names)}{' (lost)' if self.lost else ''}>"


class Leases:
    """The leases that the courier renews. All of it happens in the courier's thread.

    A lease that nobody refers to any longer is handed to ``take``: an interrupt can strike between the grant and the
    first line of the caller's body.
    """

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take
        # Leases of one pause come due in the order in which they were taken or renewed.
        self._by_pause: dict[float, dict[UUID, tuple[float, Orphan]]] = {}
        # Those that are due, or have been sent, by id.
        self._due: dict[UUID, Orphan] = {}
        self.sent: set[UUID] = set()
        self.not_before = 0.0

    def add(self, lease: Lease, asked: float) -> None:
        """Renew a lease from now on: a third of its duration after it was taken; one that is being claimed, soon."""
        due = asked + lease._duration / 3
        if lease._unclaimed:
            lease._pause = CLAIMED_WITHIN
            due = asked + CLAIMED_WITHIN
        self._schedule(lease, orphan(lease, self._take, (lease.id, lease.places)), due)

    def _schedule(self, lease: Lease, reference: Orphan, due: float) -> None:
        of_pause = self._by_pause.get(lease._pause)
        if of_pause is None:
            of_pause = self._by_pause[lease._pause] = {}
        if due <= time.monotonic():  # it was granted a while ago, and nobody heard of it
            self._due[lease.id] = reference
        else:
            of_pause[lease.id] = due, reference

    def remove(self, lease_id: UUID, pause: float | None = None) -> bool:
        """Renew it no longer. Whether it was being renewed. ``pause``: its lease's, if that is known."""
        found = bool(self._due) and self._due.pop(lease_id, None) is not None
        self.sent.discard(lease_id)
        if pause is not None and (of_pause := self._by_pause.get(pause)) is not None:
            return of_pause.pop(lease_id, None) is not None or found
        for of_pause in self._by_pause.values():
            found = of_pause.pop(lease_id, None) is not None or found
        return found

    def all(self) -> list[Lease]:
        """The leases that are held now."""
        references = [reference for of_pause in self._by_pause.values() for _, reference in of_pause.values()]
        return [lease for each in [*references, *self._due.values()] if (lease := each()) is not None]

    def __bool__(self) -> bool:
        return bool(self._due) or any(self._by_pause.values())

    def next_at(self) -> float:
        """When there is one to be renewed."""
        moments = [next(iter(of_pause.values()))[0] for of_pause in self._by_pause.values() if of_pause]
        if len(self._due) > len(self.sent):
            moments.append(self.not_before)
        return min(moments, default=math.inf)

    def take_due(self, now: float) -> list[Lease]:
        """Those to be renewed now, which is to be tried. Each stays due until it is renewed or lost."""
        for pause, of_pause in list(self._by_pause.items()):
            if not of_pause:
                del self._by_pause[pause]
            elif next(iter(of_pause.values()))[0] <= now:
                # Those due soon come along, so that all of them settle into one statement.
                for lease_id, (at, reference) in list(of_pause.items()):
                    if at > now + pause / 10:
                        break
                    del of_pause[lease_id]
                    self._due[lease_id] = reference
        if now < self.not_before:
            return []
        due = [reference() for lease_id, reference in self._due.items() if lease_id not in self.sent]
        leases = [lease for lease in due if lease is not None]
        self.sent.update([lease.id for lease in leases])
        return leases

    def lose_ended(self, now: float) -> None:
        """No renewal came through in time."""
        for lease in [reference() for reference in self._due.values()]:
            if lease is not None and now >= lease._ends:
                self.lose(lease, "it could not be renewed in time")

    def extend(self, lease: Lease, asked: float, expires_at: datetime | None, duration: float | None = None) -> None:
        """It was renewed, or claimed, by a statement that was sent then; from now on for so many seconds each time."""
        reference = self._due.pop(lease.id, None)
        self.sent.discard(lease.id)
        for of_pause in self._by_pause.values():
            entry = of_pause.pop(lease.id, None)
            reference = reference or (entry and entry[1])
        lease._duration = duration or lease._duration
        lease._extend(asked, expires_at)
        lease._pause = lease._duration / 3
        lease._unclaimed = False
        if reference is not None:
            self._schedule(lease, reference, asked + lease._pause)

    def claimed(self, lease_id: UUID, asked_at: float, expires_at: datetime | None, ends: float) -> None:
        """What a look has found of a lease that was told of before it was claimed. ``expires_at`` None: it is gone.

        A look that was sent before the lease was told of says nothing.
        """
        due, reference = self._by_pause.get(CLAIMED_WITHIN, {}).get(lease_id, (0.0, None))
        lease = None if reference is None else reference()
        if lease is None or not lease._unclaimed or asked_at < due - CLAIMED_WITHIN:
            return
        asked = ends - lease._duration
        if expires_at is None:
            self.lose(lease, "it had ended before it was claimed, or somebody ended it")
        elif asked + lease._duration / 3 > time.monotonic():
            self.extend(lease, asked, expires_at)
        # Else somebody had it locked: it is renewed soon.

    def failed(self, leases: Iterable[Lease], why: object, retry: float) -> None:
        """They could not be renewed, and are tried again, as often as it takes until they end."""
        now = time.monotonic()
        left = [retry]
        for lease in leases:
            self.sent.discard(lease.id)
            if now >= lease._ends:
                self.lose(lease, f"it could not be renewed: {why}")
            left.append(max((lease._ends - now) / 4, 0.02))
        self.not_before = now + min(left)

    def lose(self, lease: Lease, why: str) -> None:
        """Say that a lease is lost, once, and renew it no longer."""
        if not self.remove(lease.id):
            return
        if not lease._on_lost:
            log.warning("the lease %s on %s was lost: %s", lease.id, ", ".join(lease.names), why)
        lease._lost = True
        _observer.lost(lease)
        lease._tell()
