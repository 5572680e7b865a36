"""Looks after what waits in this process: one thread, one connection, one channel, and only while something waits.

A notification that tells of a grant is taken at its word: its waiter goes on while the lease is being claimed, and
counts on no more than what it has without that. Any other is a hint to look. So is the moment that the database named
when it queued a request. What is true is read with ``_watch``. One heartbeat keeps all of them alive. Where LISTEN
cannot work, behind a pooler, it polls with jitter instead, and says so once.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import os
import random
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import psycopg
from psycopg.adapt import Transformer
from psycopg.pq import ConnStatus, ExecStatus, Format

from . import _sql
from ._apart import AGAIN, Apart
from ._batches import Kind, Place
from ._database import LOCK_WAIT, Database, Row, answer, answering, is_busy
from ._wake import OURS, Waker, started, wake_all
from .errors import LimiterUnavailable, PglimitsError

if TYPE_CHECKING:
    from ._engine import User

log = logging.getLogger("pglimits.keeper")

LIVENESS = 10.0
"""Seconds after which a process that has not called in is dead. The database says so in ``pglimits._liveness()``."""
HEARTBEAT = 3.0
"""Seconds after which it calls in at the latest."""
_ANSWERS_WITHIN = 3.0
"""Seconds after which a connection that does not answer is given up: early enough to call in on another one."""
_LINGER = 30.0
_POLL = 0.05
_TRUSTED = 3.0
"""Seconds that a lease must still have, come what may, for its waiter to go on before it has been claimed."""
_WATCH = b"pglimits_watch"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class News:
    """What is known about a waiter: ``granted`` or ``retry``.

    ``ends``: until when the lease lasts at least, by the monotonic clock. ``claimed``: it has been claimed by then.
    ``goes_at``: the moment of the grant, by that clock too.
    """

    status: str
    fence: int | None = None
    expires_at: datetime | None = None
    ends: float = 0.0
    claimed: bool = True
    goes_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Claim:
    """What has become of a lease whose waiter went on at once. ``expires_at`` None: it is not there."""

    lease_id: UUID
    expires_at: datetime | None
    ends: float


class Waiter:
    """A request that is queued.

    ``looks_at``: when it is to look (monotonic), unless there is news before; None: the heartbeat is soon enough.
    ``called_in``: when it was last known to be alive. ``trusting``: whether it goes on with a lease that has not been
    claimed yet.
    """

    __slots__ = ("called_in", "error", "kind", "lease_id", "looks_at", "news", "trusting", "user", "waker")

    def __init__(
        self,
        lease_id: UUID,
        waker: Waker,
        looks_at: float | None,
        *,
        user: User,
        kind: Kind,
        called_in: float,
        trusting: bool,
    ) -> None:
        self.lease_id = lease_id
        self.waker = waker
        self.user = user
        self.kind = kind
        self.looks_at = math.inf if looks_at is None else looks_at
        self.called_in = called_in
        self.trusting = trusting
        self.news: News | None = None
        self.error: PglimitsError | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        """Each limit and key that it asked for."""
        return self.kind.places


class Keeper:
    """The waiters of this process, and the thread that watches them."""

    def __init__(self, database: Database, claimed: Callable[[list[Claim]], None]) -> None:
        self.channel = f"pglimits_{uuid4().hex}"
        self.listening = False
        self._database = database
        self._claimed = claimed
        self._lock = threading.Lock()
        self._waiters: dict[UUID, Waiter] = {}
        # By the moment to look, with entries that are no longer true among them.
        self._agenda: list[tuple[float, int, Waiter]] = []
        self._count = itertools.count()
        self._told: set[UUID] = set()
        # When it called in last but one, last, and does so next. What was granted just before the last time goes by the
        # one before that.
        self._beat_before = -math.inf
        self._beat_at = -math.inf
        self._beats_at = math.inf
        # Told of their lease, and not woken yet.
        self._granted: list[Waiter] = []
        # The places at which somebody keeps a lock that a look needs.
        self._apart: Apart[tuple[Place, ...]] = Apart()
        self._thread: threading.Thread | None = None
        self._pipe: tuple[int, int] | None = None
        self._said = False
        self._stopped = False

    def add(self, waiter: Waiter) -> None:
        """Look after a waiter until it has news."""
        with self._lock:
            now = time.monotonic()
            self._waiters[waiter.lease_id] = waiter
            self._beats_at = min(self._beats_at, now + HEARTBEAT)
            if self._said:
                waiter.looks_at = min(waiter.looks_at, now + self._pause_of_polls())
            # It may have been told since it asked.
            self._schedule(waiter, 0.0 if waiter.lease_id in self._told else waiter.looks_at)
            if (self._thread is None or not self._thread.is_alive()) and not self._stopped:
                self._pipe = os.pipe()
                os.set_blocking(self._pipe[1], False)
                poked = self._pipe[0]
                self._thread = started(
                    lambda: threading.Thread(target=self._work, args=(poked,), name=f"{OURS}keeper", daemon=True)
                )
            self._poke()

    def remove(self, lease_id: UUID) -> None:
        """It waits no longer."""
        with self._lock:
            self._waiters.pop(lease_id, None)
            self._told.discard(lease_id)

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            self._stopped = True
            self._poke()

    def close(self, user: User | None = None) -> list[Waiter]:
        """Have all waiters, or those of one user, see that their limiter is closed. Returns which they are."""
        with self._lock:
            waiters = [waiter for waiter in self._waiters.values() if user is None or waiter.user is user]
        wake_all([waiter.waker for waiter in waiters])
        return waiters

    def _poke(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):  # full of pokes that it has not read yet: it will look
                os.write(self._pipe[1], b"x")

    def _work(self, poked: int) -> None:
        connection: psycopg.Connection[Row] | None = None
        selector: selectors.BaseSelector | None = None
        lost_at: float | None = None
        idle_since = time.monotonic()
        pause = 0.1
        with self._lock:
            if self._thread is not threading.current_thread():
                return
        while True:
            now = time.monotonic()
            with self._lock:
                if self._waiters:
                    idle_since = now
                if self._stopped or now - idle_since > _LINGER:
                    self._thread = None
                    self.listening = False
                    for end in self._pipe or ():
                        os.close(end)
                    self._pipe = None
                    break
            try:
                if connection is None or selector is None:
                    connection = self._open()
                    selector = selectors.DefaultSelector()
                    for descriptor in (connection.fileno(), poked):
                        selector.register(descriptor, selectors.EVENT_READ)
                    self._look_again()
                self._beat(connection)
                if due := self._due():
                    self._look(connection, due)
                if not self._look_apart(connection) and not due:
                    self._sleep(selector, connection, poked)
                lost_at, pause = None, 0.1
            except Exception as error:
                self.listening = False
                _close(connection, selector)
                connection = selector = None
                self._wake_granted()
                lost_at = lost_at or now
                log.debug("the connection that waits was lost: %s", error)
                problem = self._database.noticed(error)
                if now - lost_at > LIVENESS:
                    self._give_up(problem)
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, 2.0)
        _close(connection, selector)

    def _open(self) -> psycopg.Connection[Row]:
        connection = self._database.connect(time.monotonic() + _ANSWERS_WITHIN)
        try:
            with answering(connection, _ANSWERS_WITHIN):
                self._database.check(connection)
                self._listen(connection)
            connection.pgconn.nonblocking = 0
            if self.listening:
                connection.pgconn.send_prepare(_WATCH, _sql.WATCH.encode())
                answer(connection.pgconn, _ANSWERS_WITHIN)
        except BaseException:
            connection.close()
            raise
        return connection

    def _listen(self, connection: psycopg.Connection[Row]) -> None:
        connection.add_notify_handler(self._notified)
        self.listening = False
        if not self._database.pooled or (not self._said and self._hears(connection)):
            connection.execute(f"listen {self.channel}".encode())
            self.listening = True
        elif not self._said:
            self._said = True
            log.warning(
                "LISTEN does not work on this connection (a pooler in transaction mode?): polling instead. "
                "Waiting works, but wake-ups take up to %d ms",
                _POLL * 2000,
            )

    def _hears(self, connection: psycopg.Connection[Row]) -> bool:
        """Whether notifications come through the pooler.

        Tried on a channel that is used for nothing else: a pooler in transaction mode leaves the LISTEN in a session of
        the server, and what that hears goes to whoever has it then.
        """
        channel = f"{self.channel}_trial"
        connection.execute(f"listen {channel}".encode())
        # From another connection: on one and the same, it may seem to let it through.
        with self._database.connect() as other:
            other.execute("select pg_notify(%s, '')", [channel])
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            until = time.monotonic() + 1.0
            while (left := until - time.monotonic()) > 0:
                if selector.select(left):
                    connection.pgconn.consume_input()
                    if connection.pgconn.notifies() is not None:
                        return True
        return False

    def _notified(self, notification: psycopg.Notify) -> None:
        if notification.channel != self.channel:
            return
        payload = notification.payload
        with self._lock:
            for line in payload.splitlines():
                try:
                    self._told_of(*line.split(" "))
                except (TypeError, ValueError, OverflowError):
                    log.debug("a notification that says nothing: %.100r", line)

    def _told_of(self, about: str, *numbers: str) -> None:
        """``numbers``: none, look; one, look in so many microseconds; three, it is granted: its fence, in how many
        microseconds it goes, and the end of its lease in microseconds since 1970."""
        lease_id = UUID(about)
        waiter = self._waiters.get(lease_id)
        now = time.monotonic()
        if len(numbers) == 1 and waiter is not None and waiter.news is None:
            self._schedule(waiter, min(waiter.looks_at, now + int(numbers[0]) / 1e6))
            return
        self._told.add(lease_id)
        if len(numbers) < 3 or waiter is None or waiter.news is not None or waiter.error is not None:
            return
        fence, goes_in, expires = map(int, numbers)
        # Its lease ends when it would have died, or as long after it was asked for as it lasts.
        ends = min(max(waiter.called_in, self._beat_before) + LIVENESS, waiter.called_in + waiter.kind.lease_duration)
        if waiter.trusting and (waiter.kind.for_rate or ends - now > _TRUSTED):
            expires_at = _EPOCH + timedelta(microseconds=expires)
            waiter.news = News("granted", fence, expires_at, ends, claimed=False, goes_at=now + goes_in / 1e6)
            waiter.looks_at = math.inf
            self._granted.append(waiter)

    def _look_again(self) -> None:
        self._apart.clear()
        with self._lock:
            for waiter in self._waiters.values():
                self._schedule(waiter, 0.0)

    def _schedule(self, waiter: Waiter, looks_at: float) -> None:
        waiter.looks_at = looks_at
        if looks_at < math.inf:
            heapq.heappush(self._agenda, (looks_at, next(self._count), waiter))

    def _next_moment(self) -> float | None:
        while self._agenda:
            looks_at, _, waiter = self._agenda[0]
            if looks_at == waiter.looks_at and self._waiters.get(waiter.lease_id) is waiter:
                return looks_at
            heapq.heappop(self._agenda)
        return None

    def _wake_granted(self) -> None:
        granted, self._granted = self._granted, []
        wake_all([waiter.waker for waiter in granted])

    def _due(self) -> list[UUID]:
        """Which waiters to look at, and whose leases to claim."""
        now = time.monotonic()
        due = {waiter.lease_id: None for waiter in self._granted}
        with self._lock:
            due.update((lease_id, None) for lease_id in self._told if lease_id in self._waiters)
            self._told.difference_update(due)
            if len(self._told) > 1000:  # about requests that were given up
                self._told.clear()
            while (moment := self._next_moment()) is not None and moment <= now:
                due[heapq.heappop(self._agenda)[2].lease_id] = None
            if self._apart:
                return [lease_id for lease_id in due if not self._is_apart(lease_id)]
        return list(due)

    def _beat(self, connection: psycopg.Connection[Row]) -> None:
        """Call in for all that wait here, if it is time, and look."""
        now = time.monotonic()
        if now < self._beats_at:
            return
        with self._lock:
            # One of each line looks for all; where somebody stands who waits for several limits, only a look can tell.
            looks: dict[object, UUID] = {}
            for lease_id, waiter in self._waiters.items():
                if waiter.places not in self._apart:
                    looks[waiter.places if len(waiter.places) == 1 else lease_id] = lease_id
            if not self._waiters:
                self._beats_at = math.inf
                return
        rows = self._execute(connection, b"", _sql.BEAT, [self.channel.encode()])
        self._beat_before, self._beat_at = self._beat_at, now
        self._beats_at = time.monotonic() + max(rows[0][0], 0.01)
        self._look(connection, list(looks.values()), only_news=True)

    def _is_apart(self, lease_id: UUID) -> bool:
        waiter = self._waiters.get(lease_id)
        return waiter is not None and waiter.places in self._apart

    def _look(self, connection: psycopg.Connection[Row], due: list[UUID], *, only_news: bool = False) -> None:
        try:
            self._ask(connection, due, LOCK_WAIT, only_news=only_news)
        except Exception as error:
            if not is_busy(error):
                raise
            with self._lock:
                waiters = [waiter for lease_id in due if (waiter := self._waiters.get(lease_id)) is not None]
            self._apart.add(sorted(waiter.places for waiter in waiters))

    def _look_apart(self, connection: psycopg.Connection[Row]) -> bool:
        """Look at some of those whose limits somebody keeps locked, if it is time; whether it was."""

        def look(places: list[tuple[Place, ...]]) -> None:
            with self._lock:
                due = [waiter.lease_id for waiter in self._waiters.values() if waiter.places in places]
            if due:
                self._ask(connection, due, AGAIN)

        return self._apart.try_next(look)

    def _ask(
        self, connection: psycopg.Connection[Row], due: list[UUID], patience: float, *, only_news: bool = False
    ) -> None:
        asked = time.monotonic()
        # They cannot run before this thread lets go of the interpreter, which it does to send the look: their leases
        # are claimed even if they keep it to themselves from then on.
        self._wake_granted()
        params = [
            f"{{{','.join(map(str, due))}}}".encode(),
            f"{patience * 1000:.0f}ms".encode(),
            str(only_news).encode(),
        ]
        rows = self._execute(connection, _WATCH, _sql.WATCH, params)
        self._take_in(rows, due, asked, only_news)

    def _execute(
        self, connection: psycopg.Connection[Row], prepared: bytes, sql: str, params: list[bytes]
    ) -> list[Row]:
        if prepared and self.listening:
            connection.pgconn.send_query_prepared(prepared, params, result_format=Format.BINARY)
        else:
            connection.pgconn.send_query_params(sql.encode(), params, result_format=Format.BINARY)
        result = answer(connection.pgconn, _ANSWERS_WITHIN)[-1]
        if result.status != ExecStatus.TUPLES_OK:
            self._hear(connection)  # an answer that never came is an error without a state
            raise psycopg.errors.error_from_result(result)
        rows = Transformer(connection)
        rows.set_pgresult(result)
        found = rows.load_rows(0, result.ntuples, tuple)
        self._hear(connection)
        return found

    def _sleep(self, selector: selectors.BaseSelector, connection: psycopg.Connection[Row], poked: int) -> None:
        """Wait for a notification, a new waiter, or the next moment to look."""
        with self._lock:
            until = self._next_moment()
        until = min(self._beats_at, self._apart.next_at, math.inf if until is None else until)
        for key, _ in selector.select(min(max(until - time.monotonic(), 0.0), _LINGER)):
            if key.fd == poked:
                os.read(poked, 65536)
            else:
                connection.pgconn.consume_input()
                self._hear(connection)

    def _hear(self, connection: psycopg.Connection[Row]) -> None:
        """Take in the notifications that have come."""
        while (message := connection.pgconn.notifies()) is not None:
            with contextlib.suppress(UnicodeDecodeError):  # not one of ours
                self._notified(psycopg.Notify(message.relname.decode(), message.extra.decode(), message.be_pid))
        if connection.pgconn.status != ConnStatus.OK:
            raise LimiterUnavailable("the connection was closed")

    def _take_in(self, rows: list[Row], due: list[UUID], asked: float, only_news: bool) -> None:
        now = time.monotonic()
        woken: list[Waker] = []
        claims: list[Claim] = []
        with self._lock:
            if not self.listening:
                for lease_id in due:
                    if (waiter := self._waiters.get(lease_id)) is not None and waiter.news is None:
                        self._schedule(waiter, now + self._pause_of_polls())
            for lease_id, status, fence, expires_at, seconds, ends_in in rows:
                waiter = self._waiters.get(lease_id)
                ends = asked + (ends_in or 0.0)
                if waiter is None or (waiter.news is not None and not waiter.news.claimed):
                    # It goes on already, or has given up.
                    claims.append(Claim(lease_id, expires_at if status == "granted" else None, ends))
                elif status == "queued":
                    looks_at = math.inf if seconds is None else now + seconds
                    if only_news or not self.listening:
                        looks_at = min(looks_at, waiter.looks_at)
                    self._schedule(waiter, looks_at)
                else:
                    waiter.news = News(status, fence, expires_at, ends, goes_at=now + (seconds or 0.0))
                    waiter.looks_at = math.inf
                    woken.append(waiter.waker)
        wake_all(woken)
        if claims:
            self._claimed(claims)

    def _pause_of_polls(self) -> float:
        # Many waiters poll less often: what a look costs grows with their number.
        return (_POLL + len(self._waiters) / 10000) * random.uniform(0.5, 1.5)

    def _give_up(self, problem: PglimitsError) -> None:
        with self._lock:
            waiters = list(self._waiters.values())
        for waiter in waiters:
            waiter.error = problem
        wake_all([waiter.waker for waiter in waiters])

    def forked(self) -> None:
        """Called in the child of a fork: the parent's thread, sockets and waiters are not ours."""
        self.__init__(self._database, self._claimed)  # type: ignore[misc]


def _close(connection: psycopg.Connection[Row] | None, selector: selectors.BaseSelector | None) -> None:
    if selector is not None:
        selector.close()
    if connection is not None:
        connection.close()
