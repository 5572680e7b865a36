"""Whoever wants to know what becomes of requests and leases: metrics and traces.

``is_on`` is false until an app asks for one of them, so an app that does not pays for a few looks at it.

The courier puts what has happened into a queue, and a thread of its own tells it to the observers. An observer may
take locks, be slow, hang or fail (an exporter that has no network): no request and no renewal waits for it. What it is
too slow for is forgotten.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias
from uuid import UUID

from ._wake import ThreadWaker
from .errors import AcquireTimeout, LimiterUnavailable, QueueFull

if TYPE_CHECKING:
    from ._leases import Lease
    from ._requests import Request

log = logging.getLogger("pglimits.metrics")

Operation = Literal["acquire", "rate_limit"]
Result = Literal["granted", "unlimited", "refused", "timeout", "queue_full", "cancelled", "unavailable", "error"]

MOST = 100_000
"""So many things that have happened wait to be told at most."""
_GATHERS = 0.1
"""Seconds that the reporter sleeps, so that it is not woken for each request."""
_FORK_WAITS = 0.1
"""Seconds that a fork waits at most for what is being told: a lock that is taken then stays taken in the child."""


@dataclass(slots=True, eq=False)
class Answer:
    """What became of a request. Moments are of the monotonic clock.

    Attributes:
        limits, slots: each limit, and how many slots were wanted of it.
        result: of the request as a whole. unlimited: the limits that are not enforced, where others are.
        asked_at, answered_at: from the call to the moment when its caller goes on.
        error: the name of the exception's class, if it is one.
    """

    limits: tuple[str, ...]
    slots: tuple[int, ...]
    operation: Operation
    result: Result
    unlimited: frozenset[str]
    asked_at: float
    answered_at: float
    error: str | None

    def results(self) -> Iterator[tuple[str, Result]]:
        """What it got of each limit."""
        for limit in self.limits:
            yield limit, "unlimited" if limit in self.unlimited else self.result


@dataclass(slots=True, eq=False)
class Hold:
    """Slots that this process holds, or has held, from ``granted_at`` to ``ended_at``."""

    limits: tuple[str, ...]
    slots: tuple[int, ...]
    granted_at: float
    lease_id: UUID
    listeners: Listeners
    ended_at: float = 0.0
    lost: bool = False


class Observer(Protocol):
    """Is told what happens, one thing after the other, in a thread that does nothing else."""

    def context(self) -> Any:
        """What of the caller is wanted later. The only one that is called in the caller's own thread or task: it must
        be quick and take no lock."""

    def answered(self, answer: Answer, context: Any) -> None:
        """A request was answered, or given up."""

    def ended(self, hold: Hold, context: Any) -> None:
        """A lease was released or lost."""

    def lost(self, limits: tuple[str, ...], context: None) -> None:
        """A lease was lost."""

    def sent(self, requests: int, context: None) -> None:
        """So many requests went to the database in one statement."""

    def reconnected(self, connections: int, context: None) -> None:
        """So many connections were opened in place of broken ones."""


Listeners: TypeAlias = tuple[tuple[Any, Any], ...]
"""Those who were there when a request was made, each with the context of that."""


@dataclass(slots=True, eq=False)
class Asked:
    """A request is observed since ``at`` (monotonic)."""

    at: float
    listeners: Listeners


class _Reached:
    """Is told that all before it has been told."""

    def __init__(self) -> None:
        self.waker = ThreadWaker()
        self.told = False

    def reached(self, about: None, context: None) -> None:
        self.told = True
        self.waker.wake()


class Reporter:
    """Tells the observers, in a thread of its own."""

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self._begin()

    def _begin(self) -> None:
        # What is to be told, about what, and to whom.
        self._events: deque[tuple[str, Any, Listeners | None]] = deque()
        self._waker = ThreadWaker()
        self._only = _thread.allocate_lock()
        self._runs = self._asleep = self._busy = False
        self._quiet_until = 0.0
        self._said: set[object] = set()

    # Called by callers.

    def asked(self, at: float) -> Asked:
        """A request is made."""
        listeners = []
        for observer in self.observers:
            context = None
            try:
                context = observer.context()
            except Exception:
                self._say_once(observer)
            listeners.append((observer, context))
        return Asked(at, tuple(listeners))

    def flush(self, seconds: float) -> bool:
        """Wait until what has happened so far has been told, for so long at most. Whether it has."""
        reached = _Reached()
        self.put("reached", None, ((reached, None),))
        self._waker.wake()
        until = time.monotonic() + seconds
        while not reached.told and (left := until - time.monotonic()) > 0:
            reached.waker.wait(min(left, 0.5))
        return reached.told

    # Called by couriers.

    def put(self, what: str, about: Any, listeners: Listeners | None = None) -> None:
        """Have something told: which method of an observer, with what. To all, or to those who were there then."""
        if len(self._events) >= MOST:
            self._say_once("slow")
            return
        self._events.append((what, about, listeners))
        if not self._runs:
            try:
                _thread.start_new_thread(self._run, ())
            except RuntimeError:  # the system gives no further thread; the next event tries again
                self._say_once("thread")
        elif self._asleep:
            self._asleep = False
            self._waker.wake()

    # The thread.

    def _run(self) -> None:
        if not self._only.acquire(blocking=False):
            return
        try:
            self._runs = True
            while True:
                while self._events:
                    self._tell_next()
                self._waker.wait(_GATHERS)
                if not self._events:
                    self._asleep = True
                    if not self._events:
                        self._waker.wait(None)
                    self._asleep = False
        finally:
            self._runs = False
            self._only.release()

    def _tell_next(self) -> None:
        self._busy = True
        while (until := self._quiet_until) and time.monotonic() < until:
            self._busy = False
            time.sleep(0.001)
            self._busy = True
        what, about, listeners = self._events.popleft()
        for observer, context in self._all if listeners is None else listeners:
            if observer in self.observers or what == "reached":
                try:
                    getattr(observer, what)(about, context)
                except BaseException:
                    self._say_once(observer)
        self._busy = False

    def _say_once(self, what: object) -> None:
        if what in self._said:
            return
        self._said.add(what)
        if what == "slow":
            log.warning("metrics or traces are too slow for what happens: some of it is not counted")
        elif what == "thread":
            log.warning("there is no thread to be had for metrics and traces")
        else:
            log.exception("metrics or traces have failed; the limits are not affected")

    @property
    def _all(self) -> Listeners:
        return tuple((observer, None) for observer in self.observers)

    # Forks.

    def be_quiet(self) -> None:
        """Before a fork: let nothing be told meanwhile."""
        self._quiet_until = until = time.monotonic() + _FORK_WAITS
        while self._busy and time.monotonic() < until:
            time.sleep(0.0005)

    def go_on(self) -> None:
        """After a fork, in the parent."""
        self._quiet_until = 0.0

    def forked(self) -> None:
        """After a fork, in the child: the thread and what it had to tell are the parent's."""
        self._begin()


is_on = False
"""Whether anybody wants to know."""
held: dict[UUID, Hold] = {}
"""What this process holds, as far as it was taken while somebody wanted to know."""

_made = Reporter()
_flushes_at_exit = False
_NONE: frozenset[str] = frozenset()


def add(observer: Observer) -> None:
    """Tell an observer what happens from now on."""
    global is_on, _flushes_at_exit
    _made.observers = (*_made.observers, observer)
    is_on = True
    if not _flushes_at_exit:  # only now, to be before the end of an SDK that there was before
        _flushes_at_exit = True
        atexit.register(flush, 1.0)


def remove(observer: Observer) -> None:
    """Tell it no longer."""
    global is_on
    _made.observers = tuple(each for each in _made.observers if each is not observer)
    if not _made.observers:
        is_on = False
        held.clear()


def flush(seconds: float) -> bool:
    """Wait until what has happened so far has been told, for so long at most. Whether it has."""
    return not is_on or _made.flush(seconds)


def answered(request: Request, error: BaseException | None, result: Result) -> None:
    """A request that is observed was answered. ``result``: where there was no error."""
    asked, request.asked = request.asked, None
    if asked is None:
        return
    kind, lease = request.kind, request.lease
    answer = Answer(
        kind.limits,
        kind.slots,
        "rate_limit" if kind.for_rate else "acquire",
        result if error is None else _result_of(request, error),
        _unlimited(lease) if lease is not None and lease.enforced else _NONE,
        asked.at,
        max(time.monotonic(), request.goes_at),
        None if error is None else type(error).__name__,
    )
    _made.put("answered", answer, asked.listeners)


def _unlimited(lease: Lease) -> frozenset[str]:
    if None not in lease.fences:
        return _NONE
    return frozenset(name for (name, _), fence in zip(lease.places, lease.fences, strict=True) if fence is None)


def _result_of(request: Request, error: BaseException) -> Result:
    if isinstance(error, AcquireTimeout):
        # One that was told so at once, as there is no room in time, has not waited.
        return "timeout" if request.leaving or request.called_in else "refused"
    if isinstance(error, QueueFull):
        return "queue_full"
    return "unavailable" if isinstance(error, LimiterUnavailable) else "error"


def granted(request: Request, lease: Lease) -> None:
    """A request that is observed got a lease, which is renewed from now on."""
    if request.asked is None:
        return
    limits, slots = request.kind.limits, request.kind.slots
    if unlimited := _unlimited(lease):
        enforced = [(limit, many) for limit, many in zip(limits, slots, strict=True) if limit not in unlimited]
        limits, slots = tuple(limit for limit, _ in enforced), tuple(many for _, many in enforced)
    held[lease.id] = Hold(limits, slots, time.monotonic(), lease.id, request.asked.listeners)


def ended(lease_id: UUID, lost: bool = False) -> None:
    """A lease is no longer held here."""
    hold = held.pop(lease_id, None)
    if hold is not None:
        hold.ended_at, hold.lost = time.monotonic(), lost
        _made.put("ended", hold, hold.listeners)


def lost(lease: Lease) -> None:
    """A lease was lost."""
    ended(lease.id, lost=True)
    if is_on:
        _made.put("lost", tuple(dict.fromkeys(lease.names)))


def asked(request: Request, at: float) -> None:
    """A request is made. Called by its caller."""
    request.asked = _made.asked(at)


def sent(requests: int) -> None:
    """So many requests go to the database in one statement."""
    _made.put("sent", requests)


def reconnected() -> None:
    """A connection was opened in place of one that had broken."""
    _made.put("reconnected", 1)


def _forked() -> None:
    held.clear()
    _made.forked()


def _before_fork() -> None:
    if is_on:
        _made.be_quiet()


os.register_at_fork(before=_before_fork, after_in_parent=_made.go_on, after_in_child=_forked)
