"""The courier's connections: which one is free, when another one is opened, and what comes in over them.

All of it happens in the courier's thread, but for the opening of a connection.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import math
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq.abc import PGresult

from . import _observer
from ._batches import ANSWERS_WITHIN
from ._database import Connection, NoAnswer, Source, mismatch, translate
from ._errands import Question
from ._requests import Params
from ._sql import Statement
from .errors import LimiterUnavailable, PglimitsError, ReadOnlyServer, VersionMismatch

if TYPE_CHECKING:
    from ._courier import Courier

log = logging.getLogger("pglimits")

CONNECTIONS = 3
"""How many connections there are at most, beside those on which questions are under way."""
_LINGER = 30.0
"""Seconds after which a connection that nobody needs is closed. One is kept."""
_TAKES_LONG = 3.0
"""Seconds after which a question says nothing any more about whether its connection is alive."""
_OPENS_AGAIN_AFTER = 0.05
_GROWS_AGAIN_AFTER = 5.0
"""Seconds until it is tried again to open a connection: the first; one more."""


class Connections:
    """The connections of a courier to its database."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._all: dict[int, Connection] = {}
        self._opening = False
        self._opening_since = 0.0
        self._has_failed = False
        # One has broken, and none was opened since.
        self._has_broken = False
        # The threads in which connections are opened.
        self.openers: set[int] = set()
        self._listens_after = 0.0
        self._opens_after = 0.0
        self._grows_after = 0.0
        self._poll: select.poll

    def __len__(self) -> int:
        return len(self._all)

    def are_reachable(self) -> bool:
        """Whether there is one, or one may come soon."""
        if self._all:
            return True
        return not self._has_failed and not (self._opening and time.monotonic() - self._opening_since > 1.0)

    def jobs(self) -> list[Any]:
        """What is under way on them."""
        return [connection.job for connection in self._all.values() if connection.job is not None]

    def begin(self, fd: int) -> None:
        """To be called by the courier's thread first: not before, as gevent may have put its own in place of poll."""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        for connection in self._all.values():
            self._poll.register(connection.fd, connection.events)

    def wait(self, seconds: float) -> None:
        """Wait until something comes in, or for so many seconds, and take it in."""
        for fd, event in self._poll.poll(None if seconds == math.inf else math.ceil(seconds * 1000)):
            if (connection := self._all.get(fd)) is not None:
                self._hear(connection, event)
            elif fd == self._courier.bell.fd:
                self._courier.bell.heard()

    def next_at(self, now: float, wants_one: bool) -> float:
        """When an answer is overdue, or another connection may be opened for those who want one."""
        moments = [connection.answers_by for connection in self._all.values() if connection.job is not None]
        may_grow_at = self._grows_after if self._all else self._opens_after
        if may_grow_at > now and not self._opening and wants_one:
            moments.append(may_grow_at)
        return min(moments, default=math.inf)

    def look_round(self, now: float) -> None:
        """Close what nobody needs."""
        for connection in list(self._all.values()):
            unneeded = connection.job is None and now - connection.used_at > _LINGER
            if unneeded and len(self._all) > 1 and not (connection.listens and len(self._courier.waiting)):
                self._drop(connection)

    def give_back_lent(self) -> None:
        """What was lent goes back as soon as nothing is under way on it."""
        for connection in list(self._all.values()):
            if connection.lent and connection.job is None:
                self._drop(connection)

    def fail_overdue(self, now: float) -> None:
        """A connection that does not answer in time is given up."""
        for connection in list(self._all.values()):
            if connection.job is not None and connection.answers_by <= now:
                self._failed(connection, NoAnswer("the server did not answer"))

    def close(self) -> None:
        """Close all."""
        for connection in list(self._all.values()):
            self._drop(connection)

    def listens(self) -> bool:
        """Whether one of them hears of grants."""
        return any(connection.listens for connection in self._all.values())

    def questions_under_way(self) -> int:
        """On how many of them a question is under way."""
        return sum(isinstance(connection.job, Question) for connection in self._all.values())

    def find(self, now: float, listening: bool = False) -> Connection | None:
        """A connection that is free. The one that listens goes with what concerns waiters and leases; with others only
        where no further one is to be had."""
        other = None
        for connection in self._all.values():
            if connection.job is None:
                if connection.listens is listening:
                    return connection
                other = connection
        if listening or (other is not None and now < self._grows_after):
            return other
        return None

    def free(self, now: float, listening: bool = False) -> Connection | None:
        """A connection that is free; if there is none, another one is opened."""
        found = self.find(now, listening)
        if found is None:
            self._grow(now, listens=listening and self._courier.is_to_listen())
        return found

    def _is_full(self) -> bool:
        return len(self._all) - self.questions_under_way() >= CONNECTIONS

    def _grow(self, now: float, listens: bool = False) -> None:
        may_grow = now >= self._grows_after and not self._is_full()
        if self._opening or not (may_grow if self._all else now >= self._opens_after):
            return
        self._opening, self._opening_since = True, now
        try:
            _thread.start_new_thread(_open, (self._courier, self.openers, self._courier.inbox, listens))
        except RuntimeError as error:  # the system gives no further thread
            self.opened((None, error, False))

    def listen(self, now: float) -> None:
        """Hear of grants: on a connection of its own, or, where there is none to be had, on any."""
        if now >= self._grows_after and not self._is_full():
            self._grow(now, listens=True)
        elif now >= self._listens_after and (free := self.find(now, listening=True)) is not None:
            if free.pooled:
                self._begin_to_poll()
            else:
                free.listens = True
                self.send(free, _Listen(self, free, self._courier.waiting.channel), now)

    def has_not_listened(self, connection: Connection) -> None:
        """LISTEN was refused."""
        connection.listens = False
        self._listens_after = time.monotonic() + _GROWS_AGAIN_AFTER

    def _begin_to_poll(self) -> None:
        if not self._courier.waiting.polls:
            self._courier.waiting.polls = True
            log.warning(
                "LISTEN does not work on this connection (a pooler in transaction mode?): polling instead. "
                "Waiting works, but wake-ups take up to 100 ms"
            )
        self._courier.waiting.look_again()

    def send(self, connection: Connection, job: Any, now: float) -> None:
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
            watched, result = connection.events, connection.receive()
            if connection.events != watched:  # it has sent what comes next
                self._poll.modify(connection.fd, connection.events)
            if connection.listens:
                self._take_notifications(connection)
            if result is not None:
                job: Any = connection.job
                job.done(self._courier, result)
                connection.job = None
        except Exception as error:
            self._failed(connection, error)

    def _take_notifications(self, connection: Connection) -> None:
        while (message := connection.pgconn.notifies()) is not None:
            with contextlib.suppress(UnicodeDecodeError):  # not one of ours
                self._courier.waiting.notified(message.relname.decode(), message.extra.decode())

    def _failed(self, connection: Connection, error: Exception) -> None:
        """The statement that was under way on a connection failed, or the connection itself."""
        job: Any = connection.job
        connection.job = None
        if not isinstance(error, psycopg.Error):
            log.error("an error of pglimits itself", exc_info=error)
            error = psycopg.InternalError(f"{type(error).__name__}: {error}")
        problem = translate(error)
        if isinstance(problem, VersionMismatch) and connection.version:
            problem = mismatch(connection.version, f" ({error.diag.message_primary})")
        goes_stale = isinstance(problem, (LimiterUnavailable, VersionMismatch)) and not error.sqlstate
        if isinstance(error, NoAnswer) or not connection.is_usable() or _is_stale(problem):
            self._has_broken = True
            self._drop(connection)
        if goes_stale or _is_stale(problem):
            # If one connection has gone stale, so have the others.
            for other in list(self._all.values()):
                if other.job is None:
                    self._drop(other)
        if job is not None:
            job.failed(self._courier, error, problem)

    def _drop(self, connection: Connection) -> None:
        if self._all.pop(connection.fd, None) is not None:
            with contextlib.suppress(KeyError, OSError):
                self._poll.unregister(connection.fd)
        if connection.listens:
            self._courier.waiting.look_again()
        connection.close()

    def opened(self, what: tuple[Connection | None, BaseException | None, bool]) -> None:
        """A connection was opened, or could not be; and whether LISTEN was found not to work on it."""
        connection, error, polls = what
        now = time.monotonic()
        self._opening = False
        if connection is not None:
            connection.used_at = now
            self._all[connection.fd] = connection
            self._poll.register(connection.fd, select.POLLIN)
            self._has_failed = False
            if self._has_broken:
                self._has_broken = False
                if _observer.is_on:
                    _observer.reconnected()
            if polls:
                self._begin_to_poll()
            elif connection.listens:
                self._courier.waiting.look_again()
            return
        assert error is not None
        # A question that takes long may be on a connection that is dead.
        if any(not isinstance(each.job, Question) or now - each.used_at < _TAKES_LONG for each in self._all.values()):
            log.debug("no further connection is to be had: %s", error)
            self._grows_after = now + _GROWS_AGAIN_AFTER
            return
        self._has_failed = True
        self._opens_after = self._grows_after = now + _OPENS_AGAIN_AFTER
        self._courier.cannot_send(error, now)


def _is_stale(problem: PglimitsError) -> bool:
    """Whether connections are of no more use: what they have prepared was made for what was there before, or they lead
    to a server that is read-only, and another may lead to the primary."""
    return isinstance(problem, (ReadOnlyServer, VersionMismatch))


class _Listen:
    """Has a connection that also does other things hear of grants."""

    answers_within = ANSWERS_WITHIN

    def __init__(self, connections: Connections, connection: Connection, channel: str) -> None:
        self._connections, self._connection = connections, connection
        self._channel = channel

    def statements(self, connection: Connection) -> list[tuple[Statement, Params]]:
        return [(Statement(f"listen {self._channel}".encode()), ())]

    def done(self, courier: Courier, result: PGresult) -> None:
        courier.waiting.look_again()

    def failed(self, courier: Courier, error: BaseException, problem: PglimitsError) -> None:
        log.debug("LISTEN failed: %s", error)
        self._connections.has_not_listened(self._connection)


def _open(courier: Courier, openers: set[int], inbox: deque[Any], listens: bool) -> None:
    """Open a connection, in a thread of its own: it may take long, and run the app's code."""
    mine = threading.get_ident()
    openers.add(mine)
    source, channel, then = courier.source, courier.waiting.channel, courier.connections.opened
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
    finally:
        openers.discard(mine)
        courier.has_opened()


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
    try:
        other = source.open()
    except (psycopg.Error, PglimitsError):
        return False
    try:
        other.execute(Statement(b"select pg_notify($1, '')"), [trial.encode()])
    finally:
        other.close()
    return connection.hears_within(trial, 1.0)
