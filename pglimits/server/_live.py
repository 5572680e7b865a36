"""What goes on, for everybody who looks on: one poller and one listener, however many look.

It polls only while somebody looks, and at once when an event was notified. All that look share what it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import UTC, datetime

from ..errors import LimiterUnavailable, PglimitsError
from ._changes import KEPT, Change, Detail, KnownEvents, KnownLimits, Row, Seen, mark_of
from ._database import Database
from ._listener import Listener

log = logging.getLogger("pglimits.server")

POLLS_EVERY = 1.0
_AT_MOST_EVERY = 0.2
"""Seconds between two polls where events come by the hundred."""
_SHARE = 10
"""A poll that takes long is repeated later: it takes one tenth of the time, if that is not too seldom."""
_AT_LEAST_EVERY = 3.0
"""Seconds between two polls at most: also one that fails takes long, and the database may be back."""
_LINGERS = 5.0
"""Seconds for which it polls on when nobody looks any longer: a page that is loaded anew finds it running."""
LIMITS = """
    select c.name, c."limit", c.held, c.waiting, c.active, c.slot_decay_per_second, c.level, c.max_waiters,
           c.description, c.created_at, c.updated_at, c.leases, c.keys, c.grants, c.granted_slots, c.releases,
           c.expired_leases, c.force_released_leases, c.oldest_waiting_since
    from pglimits.counters c
"""
EVENT = """
    select e.event_id, e.at, e.kind, e.name, e.key, e.lease_id, e.slots, e.fence, e.holder, e.held_seconds, e.old,
           e.new, e.by
    from pglimits.events e
"""
_EVENTS_SINCE = f"{EVENT} where e.event_id > %s order by e.event_id desc limit %s"
_LAST_EVENTS = f"{EVENT} order by e.event_id desc limit 100"
_NEWS = f"""
    select pg_snapshot_xmin(s.seen)::text::bigint as oldest, pg_snapshot_xmax(s.seen)::text::bigint as following, e.*
    from (select pg_current_snapshot() as seen) s
    left join lateral (
      {EVENT} where e.event_id > %s or e.event_id = any (%s::bigint[]) order by e.event_id limit {KEPT}
    ) e on true
    order by e.event_id
"""
_HOLDERS = """
    select lease_id, name, key, slots, holder, fence, priority, acquired_at, expires_at
    from pglimits.holders where name = any (%s::text[]) limit 2000
"""
_WAITERS = """
    select n.name, y.lease_id, y.key, y."position", y.blocked_by, y.reason, y.earliest, w.slots, w.holder, w.priority,
           w.waiting_since
    from pglimits.limits n cross join lateral pglimits.why_waiting(n.name) y
    left join pglimits.waiters w on w.lease_id = y.lease_id
    where n.name = any (%s::text[]) limit 2000
"""


class Live:
    """What goes on.

    Attributes:
        details: by name, of the limits that somebody looks at.
        at: when all of it was read, by the database's clock; None while nobody looks.
        polls: how often the database was asked.
        error: why the last poll failed, so that all of it is old; None if it did not.
        down_since: since when polls have failed; None if they do not.
        changed_at: when the last poll was over that found a change, by ``time.monotonic()``.
    """

    def __init__(self, database: Database, listener: Listener) -> None:
        self._db = database
        self._listener = listener
        self.details: dict[str, Detail] = {}
        self.at: datetime | None = None
        self.polls = 0
        self.error: PglimitsError | None = None
        self.down_since: datetime | None = None
        self.changed_at = 0.0
        self._begun = 0
        self._limits = KnownLimits()
        self._events = KnownEvents()
        self._names: dict[str, int] = {}
        self._looking = 0
        self._idle_since = 0.0
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._polled = asyncio.Event()
        self._changed = asyncio.Event()
        self._closing = False
        listener.on_event(self._wake.set)

    @property
    def limits(self) -> dict[str, Row]:
        """The row of each limit by its name, as of ``at``, while somebody looks."""
        return self._limits.rows

    def mark(self, name: str | None = None) -> str:
        """Tells whether anything is different from before, of one limit or of any: of this process only."""
        if name is None:
            return str(self._limits.mark)
        row = self.limits.get(name)
        return "0" if row is None else str(mark_of(row))

    async def snapshot(self) -> dict[str, Row]:
        """The rows of all limits, as of the last second. However many ask, the database is asked once.

        Raises:
            PglimitsError: why the last poll failed. LimiterUnavailable: the database is gone, or has not answered.
        """
        async with self._look():
            if self.at is None:
                await self._next_poll()
            if self.error is not None:
                raise self.error.with_traceback(None)
            if self.at is None:
                raise LimiterUnavailable("the server ends")
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
            old, missed = await self._events_after(after) if events and after is not None else ([], False)
            seen = Seen(self._events.number, details=dict.fromkeys(wanted))
            while not self._closing:
                changed = self._changed
                change = self._since(seen, old, missed, events)
                old, missed = [], False
                if change is not None:
                    yield change
                elif not self._closing:
                    await changed.wait()

    async def refresh(self) -> None:
        """Look again now, if anybody looks: something was changed here."""
        if self._looking:
            await self._next_poll()

    async def _next_poll(self) -> None:
        """Return when a poll is over that has begun from now on."""
        wanted = self._begun + 1
        while self.polls < wanted and not self._closing:
            polled = self._polled
            self._wake.set()
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

    def _since(self, seen: Seen, old: list[Row], missed: bool, events: bool) -> Change | None:
        """What a stream has not seen; None if there is nothing."""
        difference = self._limits.since(seen.version)
        news, lost = self._events.since(seen.number) if events else ([], False)
        details = {
            name: detail
            for name, had in seen.details.items()
            if (detail := self.details.get(name)) is not None and detail is not had
        }
        first, down_since = seen.version < 0, self.down_since
        changed = first or down_since != seen.down_since
        seen.version, seen.number, seen.down_since = self._limits.version, self._events.number, down_since
        seen.details.update(details)
        if not (changed or difference.limits or difference.gone or old or news or missed or lost or details):
            return None
        return Change(self.at, difference, [*old, *news], missed or lost, details, down_since, changed)

    async def _events_after(self, after: int) -> tuple[list[Row], bool]:
        """The events since one that a client has seen, up to the last poll, and whether there were more."""
        before = self._events.number
        try:
            rows = await self._db.rows(_EVENTS_SINCE, [after, KEPT + 1])
        except PglimitsError:
            return [], True
        await self._next_poll()
        told = {row["event_id"] for row in rows}
        news, lost = self._events.since(before)
        meanwhile = [row for row in news if row["event_id"] > after and row["event_id"] not in told]
        return [*reversed(rows[:KEPT]), *meanwhile], lost or len(rows) > KEPT

    async def _poll_on(self) -> None:
        """Poll while somebody looks, and a little longer."""
        while self._looking or time.monotonic() - self._idle_since < _LINGERS:
            began = time.monotonic()
            self._begun += 1
            self._wake.clear()
            before = self._limits.version, self._events.number, self.down_since
            details_changed = False
            try:
                details_changed = await self._poll()
                self.error = self.down_since = None
            except PglimitsError as error:
                log.debug("a poll failed: %s", error)
                self._failed(error)
            except Exception as error:
                log.exception("a poll failed")
                self._failed(PglimitsError(f"the server cannot read the limits: {error}"))
            self.polls = self._begun
            self._polled = _tell(self._polled)
            if details_changed or before != (self._limits.version, self._events.number, self.down_since):
                self.changed_at = time.monotonic()
                self._changed = _tell(self._changed)
            pause = min(max(POLLS_EVERY, (time.monotonic() - began) * _SHARE), _AT_LEAST_EVERY)
            await asyncio.sleep(min(_AT_MOST_EVERY, pause))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause - _AT_MOST_EVERY):
                    await self._wake.wait()
        self.details, self.at = {}, None
        self.error = self.down_since = None
        self._limits.forget()
        self._events.forget()

    def _failed(self, error: PglimitsError) -> None:
        self.error = error
        self.down_since = self.down_since or self._db.down_since or datetime.now(UTC)

    async def _poll(self) -> bool:
        """Ask the database once. Whether the details of a limit have changed."""
        self._limits.take(await self._db.rows(LIMITS))
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

    async def _take_events(self) -> None:
        """Take up the events that are new. Of those that were there before anybody looked, none is."""
        known = self._events
        if known.gaps is None:
            known.begin(await self._db.rows(_LAST_EVENTS))
            return
        while True:
            rows = await self._db.rows(_NEWS, [known.gaps.last, known.gaps.missing])
            oldest, following = rows[0]["oldest"], rows[0]["following"]
            for row in rows:
                del row["oldest"], row["following"]
            found = [row for row in rows if row["event_id"] is not None]
            known.gaps.take((row["event_id"] for row in found), oldest, following)
            known.take(found)
            if len(rows) < KEPT:
                return

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
