"""What goes on, for everybody who looks on: one poller and one listener, however many look.

It polls only while somebody looks. What it found last is kept once, each row with the number of the poll in which it
changed. A stream is no more than the number up to which it has seen, so a slow one costs no memory: it gets what
changed since, in one go. The last events are kept too; a stream that is further behind is told that it has missed some.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from ..errors import LimiterUnavailable, PglimitsError
from ._database import Database
from ._listener import Listener

log = logging.getLogger("pglimits.server")
T = TypeVar("T")

Row = dict[str, Any]

POLLS_EVERY = 1.0
_AT_MOST_EVERY = 0.2
"""Seconds between two polls where events come by the hundred."""
_SHARE = 10
"""A poll that takes long is repeated later: it takes one tenth of the time at most."""
EVENTS_KEPT = 1000
_LINGERS = 5.0
"""Seconds for which it polls on when nobody looks any longer: a page that is loaded anew finds it running."""
_AGAIN = 100
"""So many of the last events are read again: transactions may commit in another order than they took their numbers."""

LIMITS = """
    select l.name, l."limit", l.held::int, l.waiting::int, l.active, l.slot_decay_per_second, l.level, l.max_waiters,
           l.description, l.created_at, l.updated_at, c.leases, c.keys, c.grants, c.granted_slots, c.releases,
           c.expired_leases, c.force_released_leases, c.oldest_waiting_since
    from pglimits.limits l left join pglimits.counters c on c.name = l.name
"""
_LIMITS_WITHOUT_COUNTERS = """
    select name, "limit", held::int, waiting::int, active, slot_decay_per_second, level, max_waiters, description,
           created_at, updated_at
    from pglimits.limits
"""
EVENTS = """
    select event_id, at, kind, name, key, lease_id, slots, fence, holder, held_seconds, old, new, by
    from pglimits.events where event_id > %s order by event_id limit %s
"""
_HOLDERS = """
    select lease_id, name, key, slots, holder, fence, priority, acquired_at, expires_at
    from pglimits.holders where name = any (%s::text[]) limit 2000
"""
_WAITERS = """
    select lease_id, name, key, slots, holder, priority, "position", waiting_since
    from pglimits.waiters where name = any (%s::text[]) limit 2000
"""


@dataclass(frozen=True, slots=True)
class Detail:
    """Who holds one limit, and who waits for it. Of all that are looked at, 2,000 rows each."""

    holders: list[Row]
    waiters: list[Row]


@dataclass(frozen=True, slots=True)
class Difference:
    """What limits have changed between two polls. It is shared by all streams that have come as far."""

    first: bool
    limits: list[Row]
    gone: list[str]
    made: dict[Any, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Change:
    """What a stream has not seen yet.

    Attributes:
        at: when it was read, by the database's clock.
        difference: the limits that changed. first: it has all of them.
        events: oldest first. missed: there were more than are kept.
        details: of the names that the stream asked for, where that has changed.
        down_since: since when the database has not been reached; None if it is there.
        database_changed: whether that is news.
    """

    at: datetime | None
    difference: Difference
    events: list[Row]
    missed: bool
    details: dict[str, Detail]
    down_since: datetime | None
    database_changed: bool

    @property
    def first(self) -> bool:
        return self.difference.first

    @property
    def limits(self) -> list[Row]:
        return self.difference.limits

    @property
    def gone(self) -> list[str]:
        return self.difference.gone

    def shared(self, make: Callable[[Change], T]) -> T:
        """What is made of the changed limits, once for all streams that are sent the same."""
        made = self.difference.made
        if make not in made:
            made[make] = make(self)
        found: T = made[make]
        return found


_NONE = Difference(False, [], [])


@dataclass(slots=True)
class _Seen:
    """How far a stream has come. number: of the last event that it was sent."""

    number: int
    version: int = -1
    down_since: datetime | None = None
    details: dict[str, Detail | None] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)


class Live:
    """What goes on.

    Attributes:
        limits: the row of each limit as of ``at``, while somebody looks.
        details: by name, of the limits that somebody looks at.
        polls: how often the database was asked.
    """

    def __init__(self, database: Database, listener: Listener) -> None:
        self._db = database
        self._listener = listener
        self.limits: dict[str, Row] = {}
        self.details: dict[str, Detail] = {}
        self.at: datetime | None = None
        self.polls = 0
        self._version = 0
        self._versions: dict[str, int] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()
        self._knows_since = 0
        self._differences: dict[int, Difference] = {}
        self._events: OrderedDict[int, tuple[int, Row]] = OrderedDict()
        self._number = 0
        self._last_event: int | None = None
        self._names: dict[str, int] = {}
        self._looking = 0
        self._idle_since = 0.0
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._polled = asyncio.Event()
        self._changed = asyncio.Event()
        self._closing = False
        self._counts: bool | None = None
        listener.on_event(self._wake.set)

    @property
    def down_since(self) -> datetime | None:
        """Since when the database has not been reached; None if it is there."""
        return self._db.down_since

    async def snapshot(self) -> dict[str, Row]:
        """The rows of all limits, as of the last second. However many ask, the database is asked once.

        Raises:
            LimiterUnavailable: the database is gone.
        """
        async with self._look():
            if self.at is None:
                await self._next_poll()
            if self._db.down_since is not None or self.at is None:
                raise LimiterUnavailable(self._db.why or "the server ends")
            return self.limits

    async def stream(
        self, names: Iterable[str] = (), *, after: int | None = None, events: bool = True
    ) -> AsyncGenerator[Change, None]:
        """What changes, until the server closes. The first change has all limits.

        names: of limits of which the details are wanted.
        after: the id of the last event that the client has; None: it wants new ones only.
        """
        wanted = list(dict.fromkeys(names))
        async with self._look(wanted):
            if self.at is None or any(name not in self.details for name in wanted):
                await self._next_poll()
            seen = _Seen(self._number, details=dict.fromkeys(wanted))
            old, missed = await self._events_after(after, seen) if events and after is not None else ([], False)
            while not self._closing:
                changed = self._changed
                change = self._since(seen, old, missed, events)
                old, missed = [], False
                if change is not None:
                    yield change
                elif not self._closing:
                    await changed.wait()

    async def _next_poll(self) -> None:
        polled = self._polled
        self._wake.set()
        if not self._closing:
            await polled.wait()

    @contextlib.asynccontextmanager
    async def _look(self, names: Iterable[str] = ()) -> AsyncIterator[None]:
        """Have it polled meanwhile."""
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

    def _since(self, seen: _Seen, old: list[Row], missed: bool, events: bool) -> Change | None:
        """What a stream has not seen; None if there is nothing."""
        difference = self._difference(seen.version)
        down_since = self._db.down_since
        news = list(old)
        if events and self._number > seen.number:
            oldest = next(iter(self._events.values()))[0]
            missed = missed or oldest > seen.number + 1
            for event_id, (number, row) in reversed(self._events.items()):
                if number <= seen.number:
                    break
                if event_id not in seen.sent:
                    news.insert(len(old), row)
            seen.sent = set()
        details = {
            name: detail
            for name, had in seen.details.items()
            if (detail := self.details.get(name)) is not None and detail is not had
        }
        first = seen.version < 0
        changed = first or down_since != seen.down_since
        nothing = not (first or difference.limits or difference.gone or news or missed or details or changed)
        seen.version, seen.number, seen.down_since = self._version, self._number, down_since
        seen.details.update(details)
        return None if nothing else Change(self.at, difference, news, missed, details, down_since, changed)

    def _difference(self, version: int) -> Difference:
        """What limits have changed since a poll; all of them, where that is not known any longer."""
        if version == self._version:
            return _NONE
        if version < self._knows_since:
            version = -1
        found = self._differences.get(version)
        if found is None:
            if version < 0:
                found = Difference(True, list(self.limits.values()), [])
            else:
                found = Difference(
                    False,
                    [self.limits[name] for name, at in self._versions.items() if at > version],
                    [name for name, at in self._gone.items() if at > version],
                )
            self._differences[version] = found
        return found

    async def _events_after(self, after: int, seen: _Seen) -> tuple[list[Row], bool]:
        """The events since one that a client has seen, and whether there were more."""
        if not await self._has_counts():
            return [], False
        try:
            rows = await self._db.rows(EVENTS, [after, EVENTS_KEPT + 1])
        except PglimitsError:
            return [], True
        seen.sent = {row["event_id"] for row in rows}
        return rows[:EVENTS_KEPT], len(rows) > EVENTS_KEPT

    async def _poll_on(self) -> None:
        """Poll while somebody looks, and a little longer."""
        while self._looking or time.monotonic() - self._idle_since < _LINGERS:
            began = time.monotonic()
            self._wake.clear()
            was_down = self._db.down_since
            before = self._version, self._number
            try:
                details_changed = await self._poll()
            except PglimitsError as error:
                log.debug("a poll failed: %s", error)
                details_changed = False
            self.polls += 1
            self._polled = _tell(self._polled)
            if details_changed or before != (self._version, self._number) or was_down != self._db.down_since:
                self._changed = _tell(self._changed)
            pause = max(POLLS_EVERY, (time.monotonic() - began) * _SHARE)
            await asyncio.sleep(min(_AT_MOST_EVERY, pause))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause - _AT_MOST_EVERY):
                    await self._wake.wait()
        self.limits, self.details, self.at = {}, {}, None
        self._versions.clear()
        self._gone.clear()
        self._differences.clear()
        self._version += 1
        self._knows_since = self._version
        self._events.clear()
        self._last_event = None

    async def _poll(self) -> bool:
        """Ask the database once. Whether the details of a limit have changed."""
        counts = await self._has_counts()
        self._take_limits(await self._db.rows(LIMITS if counts else _LIMITS_WITHOUT_COUNTERS))
        if counts:
            await self._take_events()
        changed = False
        if names := list(self._names):
            holders = await self._db.rows(_HOLDERS, [names])
            waiters = await self._db.rows(_WAITERS, [names])
            for name in names:
                detail = Detail(_of(name, holders), _of(name, waiters))
                if self.details.get(name) != detail:
                    self.details[name] = detail
                    changed = True
        clock = await self._db.row("select pglimits._now() as now")
        self.at = None if clock is None else clock["now"]
        return changed

    def _take_limits(self, rows: list[Row]) -> None:
        """Note which limits have changed."""
        found = {row["name"]: row for row in rows}
        version = self._version + 1
        changed = [name for name, row in found.items() if self.limits.get(name) != row]
        gone = self.limits.keys() - found.keys()
        self.limits = found
        if not changed and not gone:
            return
        for name in changed:
            self._versions[name] = version
            self._gone.pop(name, None)
        for name in gone:
            del self._versions[name]
            self._gone[name] = version
        while len(self._gone) > EVENTS_KEPT:
            self._knows_since = self._gone.popitem(last=False)[1]
        self._version = version
        self._differences.clear()

    async def _take_events(self) -> None:
        """Take up the events that are new. Of those that were there before anybody looked, none is."""
        if self._last_event is None:
            newest = await self._db.row("select max(event_id) as event_id from pglimits.events")
            self._last_event = (newest and newest["event_id"]) or 0
            again = await self._db.rows(EVENTS, [self._last_event - _AGAIN, _AGAIN])
            for row in again:
                self._events[row["event_id"]] = (self._number, row)
            return
        while True:
            rows = await self._db.rows(EVENTS, [self._last_event - _AGAIN, EVENTS_KEPT])
            for row in rows:
                if row["event_id"] not in self._events:
                    self._number += 1
                    self._events[row["event_id"]] = (self._number, row)
                    self._last_event = max(self._last_event, row["event_id"])
            while len(self._events) > EVENTS_KEPT:
                self._events.popitem(last=False)
            if len(rows) < EVENTS_KEPT:
                return

    async def _has_counts(self) -> bool:
        """Whether this pglimits has counters and events."""
        if self._counts is None:
            row = await self._db.row("select to_regclass('pglimits.events') is not null as there")
            self._counts = row is not None and row["there"]
        return self._counts

    def begin_closing(self) -> None:
        """End all streams."""
        self._closing = True
        self._polled, self._changed = _tell(self._polled), _tell(self._changed)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task


def _tell(event: asyncio.Event) -> asyncio.Event:
    """Wake all who wait, and return what they wait for next."""
    event.set()
    return asyncio.Event()


def _of(name: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["name"] == name]
