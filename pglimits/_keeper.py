"""Looks after what waits in this process: one thread, one connection, one channel, and only while something waits.

A notification that tells of a lease is taken at its word: its waiter goes on while the lease is being claimed, and
counts on no more than what it has without that. Any other is a hint to look. So is the moment that the database named
when it queued a request. What is true is read with ``watch``. Where LISTEN cannot work, behind a pooler, it polls with
jitter instead, and says so once.
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
from ._batches import Place
from ._database import LOCK_WAIT, Database, Row, answer, answering, is_busy
from ._wake import OURS, Waker, started, wake_all
from .errors import LimiterUnavailable, PglimitsError

if TYPE_CHECKING:
    from ._engine import User

log = logging.getLogger("pglimits.keeper")

LIVENESS = 10.0
"""Seconds after which a waiter that has not called in is dead. The database says so in ``pglimits._liveness()``."""
_ANSWERS_WITHIN = 3.0
"""Seconds after which a connection that does not answer is given up: early enough to call in on another one."""
_LINGER = 30.0
_POLL = 0.05
_TRUSTED = 3.0
"""Seconds that a lease must still have, come what may, for its waiter to go on before it has been claimed."""
_AS_BEFORE = 0.005
"""Seconds by which a turn may seem to have moved that has not."""
_WATCH = b"pglimits_watch"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class News:
    """What is known about a waiter: ``granted`` or ``retry``.

    ``ends``: until when the lease lasts at least, by the monotonic clock. ``claimed``: it has been claimed by then.
    """

    status: str
    fence: int | None = None
    expires_at: datetime | None = None
    ends: float = 0.0
    claimed: bool = True


@dataclass(frozen=True, slots=True)
class Claim:
    """What has become of a lease whose waiter went on at once. ``expires_at`` None: it is not there."""

    lease_id: UUID
    expires_at: datetime | None
    ends: float


class Waiter:
    """A request that waits in this process: queued, or asleep until ``turn_at`` (monotonic).

    ``ends``: when a lease that it is handed ends at the earliest (monotonic), counted from when it last called in.
    ``places``: each limit and key that it asked for.
    ``put_off_to``: not before that (monotonic) its turn comes, if it was put off.
    ``trusting``: whether it goes on with a lease that has not been claimed yet.
    ``turn``: its turn by the database's clock, which alone tells whether it has moved: how long an answer travels does
    not count. ``turn_at`` is as much later as the answer took, and never too early.
    """

    __slots__ = (
        "called_in",
        "ends",
        "error",
        "lease_duration",
        "lease_id",
        "looks_at",
        "news",
        "places",
        "put_off_to",
        "trusting",
        "turn",
        "turn_at",
        "user",
        "waker",
    )

    def __init__(
        self,
        lease_id: UUID,
        waker: Waker,
        looks_at: float,
        turn_at: float | None,
        *,
        user: User,
        places: tuple[Place, ...],
        turn: float | None = None,
        called_in: float = 0.0,
        lease_duration: float = 0.0,
        trusting: bool = False,
    ) -> None:
        self.lease_id = lease_id
        self.waker = waker
        self.user = user
        self.places = places
        self.turn = turn
        self.looks_at = looks_at
        self.turn_at = turn_at
        self.lease_duration = lease_duration
        self.called_in = called_in
        self.ends = called_in + min(LIVENESS, lease_duration)
        self.trusting = trusting and turn_at is None
        self.put_off_to: float | None = None
        self.news: News | None = None
        self.error: PglimitsError | None = None


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
        self._told_all = False
        self._told_all_at = 0.0
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
            self._waiters[waiter.lease_id] = waiter
            if self._said:
                waiter.looks_at = min(waiter.looks_at, self._next_look(time.monotonic(), LIVENESS))
            # It may have been told, with all others, since it asked.
            told = waiter.lease_id in self._told or waiter.called_in <= self._told_all_at
            self._schedule(waiter, 0.0 if told else waiter.looks_at)
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
            if payload == "":
                self._told_all = True
                self._told_all_at = time.monotonic()
            else:
                try:
                    self._told_of(*payload.split(" "))
                except (TypeError, ValueError, OverflowError):
                    log.debug("a notification that says nothing: %.100r", payload)

    def _told_of(self, about: str, fence: str | None = None, ends: str | None = None) -> None:
        lease_id = UUID(about)
        self._told.add(lease_id)
        waiter = self._waiters.get(lease_id)
        if fence is None or ends is None or waiter is None or waiter.news is not None or waiter.error is not None:
            return
        if waiter.trusting and waiter.ends - time.monotonic() > _TRUSTED:
            expires_at = _EPOCH + timedelta(microseconds=int(ends))
            waiter.news = News("granted", int(fence), expires_at, waiter.ends, claimed=False)
            waiter.looks_at = float("inf")
            self._granted.append(waiter)

    def _look_again(self) -> None:
        self._apart.clear()
        with self._lock:
            for waiter in self._waiters.values():
                self._schedule(waiter, 0.0)

    def _schedule(self, waiter: Waiter, looks_at: float) -> None:
        waiter.looks_at = looks_at
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
            if self._told_all:
                self._told_all = False
                due.update(dict.fromkeys(self._waiters))
            due.update((lease_id, None) for lease_id in self._told if lease_id in self._waiters)
            self._told.difference_update(due)
            if len(self._told) > 1000:  # about requests that were given up
                self._told.clear()
            while (moment := self._next_moment()) is not None and moment <= now:
                due[heapq.heappop(self._agenda)[2].lease_id] = None
            if self._apart:
                return [lease_id for lease_id in due if not self._is_apart(lease_id)]
        return list(due)

    def _is_apart(self, lease_id: UUID) -> bool:
        waiter = self._waiters.get(lease_id)
        return waiter is not None and waiter.places in self._apart

    def _look(self, connection: psycopg.Connection[Row], due: list[UUID]) -> None:
        try:
            self._ask(connection, due, LOCK_WAIT)
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
                try:
                    self._ask(connection, due, AGAIN)
                except Exception as error:
                    if is_busy(error):  # they have to be kept alive all the same
                        self._ask(connection, due, AGAIN, settle=False)
                    raise

        return self._apart.try_next(look)

    def _ask(
        self, connection: psycopg.Connection[Row], due: list[UUID], patience: float, *, settle: bool = True
    ) -> None:
        asked = time.monotonic()
        # They cannot run before this thread lets go of the interpreter, which it does to send the look: their leases
        # are claimed even if they keep it to themselves from then on.
        self._wake_granted()
        params = [f"{{{','.join(map(str, due))}}}".encode(), f"{patience * 1000:.0f}ms".encode(), str(settle).encode()]
        if self.listening:
            connection.pgconn.send_query_prepared(_WATCH, params, result_format=Format.BINARY)
        else:
            connection.pgconn.send_query_params(_sql.WATCH.encode(), params, result_format=Format.BINARY)
        result = answer(connection.pgconn, _ANSWERS_WITHIN)[-1]
        if result.status != ExecStatus.TUPLES_OK:
            self._hear(connection)  # an answer that never came is an error without a state
            raise psycopg.errors.error_from_result(result)
        rows = Transformer(connection)
        rows.set_pgresult(result)
        self._take_in(rows.load_rows(0, result.ntuples, tuple), asked)
        self._hear(connection)

    def _sleep(self, selector: selectors.BaseSelector, connection: psycopg.Connection[Row], poked: int) -> None:
        """Wait for a notification, a new waiter, or the next moment to look."""
        with self._lock:
            until = self._next_moment()
        if self._apart:
            until = min(self._apart.next_at, math.inf if until is None else until)
        for key, _ in selector.select(_LINGER if until is None else max(until - time.monotonic(), 0.0)):
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

    def _take_in(self, rows: list[Row], asked: float) -> None:
        now = time.monotonic()
        woken: list[Waker] = []
        # Who sleeps over several limits has a turn on each, and goes at the last of them.
        turns: dict[UUID, tuple[float, float]] = {}
        for lease_id, *_, wait, _, turn in rows:
            if wait is not None:
                turns[lease_id] = max(turns.get(lease_id, (0.0, 0.0)), (wait, turn))
        claims: list[Claim] = []
        with self._lock:
            for lease_id, status, fence, expires_at, retry_after, wait, ends_in, _ in rows:
                waiter = self._waiters.get(lease_id)
                ends = asked + (ends_in or 0.0)
                if waiter is None or (waiter.news is not None and not waiter.news.claimed):
                    # It goes on already, or has given up.
                    claims.append(Claim(lease_id, expires_at if status == "granted" else None, ends))
                elif wait is not None:
                    if self._has_moved(waiter, *turns[lease_id], asked, now):
                        woken.append(waiter.waker)
                    self._schedule(waiter, self._next_look(now, LIVENESS * 0.3))
                elif status == "queued":
                    waiter.ends = min(ends, asked + waiter.lease_duration)
                    if waiter.turn_at is not None:  # its limit was set to 0
                        woken.append(waiter.waker)
                        waiter.turn_at = waiter.turn = None
                    self._schedule(waiter, self._next_look(now, retry_after))
                else:
                    waiter.news = News(status, fence, expires_at, ends)
                    waiter.looks_at = float("inf")
                    woken.append(waiter.waker)
        wake_all(woken)
        if claims:
            self._claimed(claims)

    def _has_moved(self, waiter: Waiter, wait: float, turn: float, asked: float, now: float) -> bool:
        """Note when a waiter's turn comes, as it was answered now. Whether that is not when it counted on."""
        before, turn_at = waiter.turn, now + wait
        moved = before is None or abs(turn - before) > _AS_BEFORE
        if not moved and (waiter.turn_at is None or turn_at > waiter.turn_at - _AS_BEFORE):
            return False
        # Also where it stood in line before: nobody knew of its timeout who gave it the turn.
        if moved and (before is None or turn > before or waiter.put_off_to is not None):
            waiter.put_off_to = asked + wait
        waiter.turn, waiter.turn_at = turn, turn_at
        return True

    def _next_look(self, now: float, seconds: float) -> float:
        if not self.listening:
            # Many waiters poll less often: what a look costs grows with their number.
            seconds = min(seconds, (_POLL + len(self._waiters) / 10000) * random.uniform(0.5, 1.5))
        return now + seconds

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
