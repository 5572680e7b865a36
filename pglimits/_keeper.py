"""Looks after what waits in this process: one thread, one connection, one channel, and only while something waits.

A notification is a hint to look. So is the moment that the database named when it queued a request. What is true is
read with ``watch``. Where LISTEN cannot work, behind a pooler, it polls with jitter instead, and says so once.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import random
import selectors
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

import psycopg

from . import _sql
from ._database import Database, Row, run, translate
from ._wake import Waker, started, wake_all
from .errors import LimiterUnavailable, PglimitsError

log = logging.getLogger("pglimits.keeper")

LIVENESS = 10.0
"""Seconds after which a waiter that has not called in is dead. The database says so in ``pglimits._liveness()``."""
_LINGER = 30.0
_POLL = 0.05


@dataclass(frozen=True, slots=True)
class News:
    """What watching has found out about a waiter: ``granted`` or ``retry``."""

    status: str
    fence: int | None = None
    expires_at: datetime | None = None


class Waiter:
    """A request that waits in this process: queued, or asleep until ``turn_at`` (monotonic)."""

    __slots__ = ("error", "lease_id", "looks_at", "news", "put_off", "turn_at", "waker")

    def __init__(self, lease_id: UUID, waker: Waker, looks_at: float, turn_at: float | None) -> None:
        self.lease_id = lease_id
        self.waker = waker
        self.looks_at = looks_at
        self.turn_at = turn_at
        self.put_off = False
        self.news: News | None = None
        self.error: PglimitsError | None = None


class Keeper:
    """The waiters of this process, and the thread that watches them."""

    def __init__(self, database: Database) -> None:
        self.channel = f"pglimits_{uuid4().hex}"
        self.listening = False
        self._database = database
        self._lock = threading.Lock()
        self._waiters: dict[UUID, Waiter] = {}
        # By the moment to look, with entries that are no longer true among them.
        self._agenda: list[tuple[float, int, Waiter]] = []
        self._count = itertools.count()
        self._told: set[UUID] = set()
        self._told_all = False
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
            self._schedule(waiter, 0.0 if waiter.lease_id in self._told else waiter.looks_at)
            if (self._thread is None or not self._thread.is_alive()) and not self._stopped:
                self._pipe = os.pipe()
                os.set_blocking(self._pipe[1], False)
                poked = self._pipe[0]
                self._thread = started(
                    lambda: threading.Thread(target=self._work, args=(poked,), name="pglimits-keeper", daemon=True)
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

    def close(self) -> None:
        """Tell all waiters that the limiter is closed."""
        self._give_up(LimiterUnavailable("the limiter has been closed"))

    def _poke(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):  # full of pokes that it has not read yet: it will look
                os.write(self._pipe[1], b"x")

    def _work(self, poked: int) -> None:
        connection: psycopg.Connection[Row] | None = None
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
                if connection is None:
                    connection = self._open()
                    self._look_again()
                due = self._due()
                if due:
                    self._take_in(run(connection, _sql.WATCH, (due,), prepare=False))
                else:
                    self._sleep(connection, poked)
                lost_at, pause = None, 0.1
            except Exception as error:
                self.listening = False
                if connection is not None:
                    connection.close()
                    connection = None
                lost_at = lost_at or now
                log.debug("the connection that waits was lost: %s", error)
                if now - lost_at > LIVENESS:
                    self._give_up(translate(error))
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, 2.0)
        if connection is not None:
            connection.close()

    def _open(self) -> psycopg.Connection[Row]:
        connection = self._database.connect()
        connection.add_notify_handler(self._notified)
        self.listening = False
        if not self._said:
            connection.execute(f"listen {self.channel}".encode())
            self.listening = not self._database.pooled
        if self._database.pooled and not self._said:
            # From another connection: on one and the same, a pooler in transaction mode may seem to let it through.
            with self._database.connect() as other:
                other.execute("select pg_notify(%s, 'self')", [self.channel])
            until = time.monotonic() + 1.0
            while not self.listening and (left := until - time.monotonic()) > 0:
                self._sleep_until_ready(connection, (), left)
        if not self.listening and not self._said:
            self._said = True
            log.warning(
                "LISTEN does not work on this connection (a pooler in transaction mode?): polling instead. "
                "Waiting works, but wake-ups take up to %d ms",
                _POLL * 2000,
            )
        return connection

    def _notified(self, notification: psycopg.Notify) -> None:
        if notification.channel != self.channel:
            return
        with self._lock:
            if notification.payload == "self":
                # Only this proves it: now and then a pooler lets one through by accident.
                self.listening = True
            elif notification.payload == "":
                self._told_all = True
            else:
                self._told.add(UUID(notification.payload))

    def _look_again(self) -> None:
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

    def _due(self) -> list[UUID]:
        now = time.monotonic()
        with self._lock:
            if self._told_all:
                self._told_all = False
                return list(self._waiters)
            due = [lease_id for lease_id in self._told if lease_id in self._waiters]
            self._told.difference_update(due)
            if len(self._told) > 1000:  # about requests that were given up
                self._told.clear()
            while (moment := self._next_moment()) is not None and moment <= now:
                due.append(heapq.heappop(self._agenda)[2].lease_id)
            return due

    def _sleep(self, connection: psycopg.Connection[Row], poked: int) -> None:
        """Wait for a notification, a new waiter, or the next moment to look."""
        with self._lock:
            until = self._next_moment()
        seconds = _LINGER if until is None else max(until - time.monotonic(), 0.0)
        if poked in self._sleep_until_ready(connection, (poked,), seconds):
            os.read(poked, 65536)

    def _sleep_until_ready(
        self, connection: psycopg.Connection[Row], others: Sequence[int], seconds: float
    ) -> set[int]:
        """Take in notifications, if any come in that time. Returns which descriptors were ready."""
        with selectors.DefaultSelector() as selector:
            for descriptor in (connection.fileno(), *others):
                selector.register(descriptor, selectors.EVENT_READ)
            ready = {key.fd for key, _ in selector.select(seconds)}
        if connection.fileno() in ready:
            connection.pgconn.consume_input()
            while (message := connection.pgconn.notifies()) is not None:
                self._notified(psycopg.Notify(message.relname.decode(), message.extra.decode(), message.be_pid))
            if connection.pgconn.status != psycopg.pq.ConnStatus.OK:
                raise LimiterUnavailable("the connection was closed")
        return ready

    def _take_in(self, rows: list[Row]) -> None:
        now = time.monotonic()
        woken: list[Waker] = []
        turns: dict[UUID, float] = {}
        with self._lock:
            for lease_id, status, fence, expires_at, retry_after, wait in rows:
                waiter = self._waiters.get(lease_id)
                if waiter is None:
                    continue
                if wait is not None:
                    turns[lease_id] = max(turns.get(lease_id, 0.0), wait)
                    turn_at = now + turns[lease_id]
                    if waiter.turn_at is None or abs(turn_at - waiter.turn_at) > 0.005:
                        woken.append(waiter.waker)
                        waiter.put_off = waiter.turn_at is not None and turn_at > waiter.turn_at
                        waiter.turn_at = turn_at
                    self._schedule(waiter, self._next_look(now, LIVENESS * 0.3))
                elif status == "queued":
                    self._schedule(waiter, self._next_look(now, retry_after))
                else:
                    waiter.news = News(status, fence, expires_at)
                    waiter.looks_at = float("inf")
                    woken.append(waiter.waker)
        wake_all(woken)

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
        self.__init__(self._database)  # type: ignore[misc]
