"""What goes on, for everybody who looks on: one poller and one listener, however many look.

It polls only while somebody looks. What it found last is kept once, each row with the number of the poll in which it
changed; a stream is no more than the number up to which it has seen. So a slow one costs no memory: it gets what
changed since, in one go. Events are kept for a while; who is further behind is told that some are missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..errors import PglimitsError
from ._database import Database
from ._listener import Listener

log = logging.getLogger("pglimits.server")

Row = dict[str, Any]

POLLS_EVERY = 1.0
_SHARE = 10
"""A poll that takes long is repeated later: it takes at most this fraction of the time."""
_EVENTS_KEPT = 1000
_LINGERS = 5.0

LIMITS = """
    select name, "limit", held::int, waiting::int, active, slot_decay_per_second, level, max_waiters, description,
           created_at, updated_at
    from pglimits.limits
"""
COUNTERS = """
    select name, grants, granted_slots, releases, expired_leases, force_released_leases, held_slot_seconds,
           waited_seconds, leases, keys, oldest_waiting_since
    from pglimits.counters
"""
EVENTS = """
    select event_id, at, kind, name, key, lease_id, slots, fence, holder, held_seconds, old, new, by
    from pglimits.events where event_id > %s order by event_id limit %s
"""
_HOLDERS = """
    select lease_id, name, key, slots, holder, fence, priority, acquired_at, expires_at
    from pglimits.holders where name = any (%s) limit 2000
"""
_WAITERS = """
    select lease_id, name, key, slots, holder, priority, "position", waiting_since
    from pglimits.waiters where name = any (%s) limit 2000
"""


@dataclass(frozen=True, slots=True)
class Detail:
    """Who holds one limit and who waits for it. At most 2,000 rows of all that are looked at."""

    holders: list[Row]
    waiters: list[Row]


@dataclass(frozen=True, slots=True)
class Change:
    """What a stream has not seen yet.

    Attributes:
        at: when it was read, by the database's clock.
        limits: rows that changed, or all of them in the first one. gone: names that are no longer there.
        events: oldest first. missed: whether there were more than are kept.
        details: for the names that the stream asked for, where that has changed.
        down_since: since when the database has not been reached.
        first: whether it is the stream's first.
    """

    at: datetime | None
    limits: list[Row]
    gone: list[str]
    events: list[Row]
    missed: bool
    details: dict[str, Detail]
    down_since: datetime | None
    first: bool


@dataclass(slots=True)
class _Seen:
    """How far a stream has come."""

    version: int = 0
    event_id: int | None = None
    down_since: datetime | None = None
    details: dict[str, Detail | None] = field(default_factory=dict)


class Live:
    """What goes on. ``limits``: rows by name, as of ``at``, while somebody looks.

    Attributes:
        limits: the row of each limit (views ``limits`` and ``counters`` together).
        events: those of the last while, oldest first.
        details: by name, of the limits that somebody looks at.
        polls: how often the database was asked.
    """

    def __init__(self, database: Database, listener: Listener) -> None:
        self._db = database
        self._listener = listener
        self.limits: dict[str, Row] = {}
        self.details: dict[str, Detail] = {}
        self.events: deque[Row] = deque(maxlen=_EVENTS_KEPT)
        self.at: datetime | None = None
        self.polls = 0
        self._versions: dict[str, int] = {}
        self._gone: dict[str, int] = {}
        self._forgot = 0
        self._version = 0
        self._last_event: int | None = None
        self._names: dict[str, int] = {}
        self._looking = 0
        self._task: asyncio.Task[None] | None = None
        self._idle_since = 0.0
        self._wake = asyncio.Event()
        self._news = asyncio.Condition()
        self._closing = False
        self._has_history = True
        listener.on_event(self._wake.set)

    @property
    def down_since(self) -> datetime | None:
        """Since when the database has not been reached; None if it is there."""
        return self._db.down_since

    async def snapshot(self) -> dict[str, Row]:
        """The rows of all limits, no older than a poll. Polls go on for a while, so that many who ask cost one.

        Raises:
            LimiterUnavailable: the database is gone.
        """
        async with self._watched():
            before = self.polls
            if self.at is None or self._looking == 1:
                async with self._news:
                    await self._news.wait_for(lambda: self.polls > before or self._closing)
            if self._db.down_since is not None:
                from ..errors import LimiterUnavailable

                raise LimiterUnavailable(self._db.why)
            return self.limits

    async def stream(self, names: Iterable[str] = (), *, after: int | None = None) -> AsyncIterator[Change]:
        """What changes, until the server closes. The first one has all limits.

        names: of limits of which the details are wanted.
        after: the id of the last event that the client has seen; None: only new ones.
        """
        wanted = list(dict.fromkeys(names))
        seen = _Seen(event_id=after, details=dict.fromkeys(wanted))
        first = True
        async with self._watched(wanted):
            if self.at is None or wanted:
                await self._next_poll()
            while not self._closing:
                change = self._since(seen, first)
                if change is not None:
                    first = False
                    yield change
                    continue
                async with self._news:
                    await self._news.wait()

    async def _next_poll(self) -> None:
        before = self.polls
        self._wake.set()
        async with self._news:
            await self._news.wait_for(lambda: self.polls > before or self._closing)

    @contextlib.asynccontextmanager
    async def _watched(self, names: Iterable[str] = ()) -> AsyncIterator[None]:
        self._looking += 1
        for name in names:
            self._names[name] = self._names.get(name, 0) + 1
        self._listener.want()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll_on(), name="pglimits live")
        try:
            yield
        finally:
            self._looking -= 1
            self._idle_since = time.monotonic()
            self._listener.done()
            for name in names:
                self._names[name] -= 1
                if not self._names[name]:
                    del self._names[name]
                    self.details.pop(name, None)

    def _since(self, seen: _Seen, first: bool) -> Change | None:
        """What a stream has not seen; None if there is nothing."""
        down_since = self._db.down_since
        limits, gone = [], []
        if first or seen.version < self._version:
            if first or seen.version < self._forgot:
                first = True  # too far behind to be told who is gone: it gets all
                limits = list(self.limits.values())
            else:
                limits = [self.limits[name] for name, at in self._versions.items() if at > seen.version]
                gone = [name for name, at in self._gone.items() if at > seen.version]
        events, missed = self._events_since(seen)
        details = {
            name: detail
            for name, had in seen.details.items()
            if (detail := self.details.get(name)) is not None and detail is not had
        }
        if not (first or limits or gone or events or missed or details or down_since != seen.down_since):
            seen.version = self._version
            return None
        seen.version = self._version
        seen.down_since = down_since
        seen.details.update(details)
        if self._last_event is not None:
            seen.event_id = self._last_event
        return Change(self.at, limits, gone, events, missed, details, down_since, first)

    def _events_since(self, seen: _Seen) -> tuple[list[Row], bool]:
        if seen.event_id is None or not self.events:
            return [], False
        events = [event for event in self.events if event["event_id"] > seen.event_id]
        return events, len(events) == len(self.events) == self.events.maxlen

    async def _poll_on(self) -> None:
        """Poll while somebody looks, and a little longer."""
        while self._looking or time.monotonic() - self._idle_since < _LINGERS:
            began = time.monotonic()
            self._wake.clear()
            try:
                await self._poll()
            except PglimitsError as error:
                log.debug("a poll failed: %s", error)
            except Exception:
                log.exception("a poll failed")
            self.polls += 1
            async with self._news:
                self._news.notify_all()
            took = time.monotonic() - began
            pause = max(POLLS_EVERY, took * _SHARE)
            await asyncio.sleep(min(0.2, pause))  # events may come by the hundred
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
        self.limits, self.details, self.at = {}, {}, None
        self._versions, self._gone, self._forgot = {}, {}, self._version

    async def _poll(self) -> None:
        rows = await self._db.rows(LIMITS)
        found = {row["name"]: row for row in rows}
        version = self._version + 1
        changed = False
        for name, row in found.items():
            if self.limits.get(name) != row:
                self._versions[name] = version
                changed = True
            self._gone.pop(name, None)
        for name in self.limits.keys() - found.keys():
            del self._versions[name]
            self._gone[name] = version
            changed = True
        self.limits = found
        if changed:
            self._version = version
        while len(self._gone) > _EVENTS_KEPT:
            oldest = next(iter(self._gone))
            self._forgot = self._gone.pop(oldest)
        names = list(self._names)
        if names:
            await self._poll_details(names)
        at = await self._db.row("select pglimits._now() as now")
        self.at = None if at is None else at["now"]

    async def _poll_details(self, names: list[str]) -> None:
        holders = await self._db.rows(_HOLDERS, [names])
        waiters = await self._db.rows(_WAITERS, [names])
        for name in names:
            detail = Detail(
                [row for row in holders if row["name"] == name], [row for row in waiters if row["name"] == name]
            )
            if self.details.get(name) != detail:
                self.details[name] = detail

    def begin_closing(self) -> None:
        """End all streams."""
        self._closing = True

        async def tell() -> None:
            async with self._news:
                self._news.notify_all()

        self._told = asyncio.ensure_future(tell())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
