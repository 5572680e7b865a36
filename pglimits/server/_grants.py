"""Grants for clients that come by HTTP.

Who tries once goes by the wrapper's courier, or under an id of its own by ``_batches``: requests that arrive together
share their statements. Who may wait stands in line by plain SQL, under the id of its request. Its place lives for 10
seconds from when it was asked for last. While a request is held, the server asks for it: when there is news of it, and
every few seconds. A client that polls asks for itself, by the same id. The server keeps nothing in between: killed and
started again, it has lost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from .. import _sql
from .._arguments import holder as as_json
from .._database import Busy, Cancelled
from .._limiter import AsyncLimiter
from .._requests import checked, new_id
from ..errors import AcquireTimeout, InvalidArgument, LimiterUnavailable, LimitLocked, PglimitsError, QueueFull
from ._batches import Alike, Answer, Batches
from ._database import Database
from ._listener import Listener

__all__ = ["Answer", "Grants", "Renewed"]

log = logging.getLogger("pglimits.server")

PLACE_LIVES = 10.0
"""Seconds that a place in line lives after it was asked for last."""
ASKS_EVERY = 3.0
_MOMENT = 0.15
"""Who is granted as of a moment that is no further away is slept for, held or not."""
_LOCK = "500ms"
"""How long one statement waits for a limit that somebody keeps locked. It has a connection of the pool meanwhile."""
_LOCK_AGAIN = "50ms"
"""The same of one that was found locked before."""
_LOOKS_AGAIN = 1.0
"""Seconds until it is looked whether a limit is locked still."""
_MOST_LOCKED = 1000
"""So many requests are known to meet a lock at most: clients choose the names, and may choose any."""
_ASKS_AT_ONCE = 3
"""So many connections of the pool are used for that at most: others are left for those who look on."""
_PAUSE = 0.25
"""Seconds until somebody who is held is asked for again where a limit is locked, or the database gone."""

_ACQUIRE = """
    select a.status, a.lease_id, a.fences, a.expires_at, a.retry_after, a."position"
    from set_config('lock_timeout', %(lock)s, true) as patience,
         pglimits.acquire_all(
           case when patience <> '' then %(names)s::text[] end, %(slots)s::int[], %(keys)s::text[], %(timeout)s::float8,
           %(duration)s::float8, %(priority)s::int, %(holder)s::jsonb, %(id)s::uuid, %(strict)s::boolean,
           %(channel)s::text, %(clamp)s::boolean) a
"""
_ACQUIRE_ONE = """
    select a.status, a.lease_id, array[a.fence] as fences, a.expires_at, a.retry_after, a."position"
    from set_config('lock_timeout', %(lock)s, true) as patience,
         pglimits.acquire(
           case when patience <> '' then %(name)s::text end, %(count)s::int, %(key)s::text, %(timeout)s::float8,
           %(duration)s::float8, %(priority)s::int, %(holder)s::jsonb, %(id)s::uuid, %(strict)s::boolean,
           %(channel)s::text, %(clamp)s::boolean) a
"""
"""The same of one limit, which has a shorter way."""
_RATE_LIMIT = """
    select a.status, a.lease_id, null::bigint[] as fences, null::timestamptz as expires_at, a.retry_after, a."position"
    from set_config('lock_timeout', %(lock)s, true) as patience,
         pglimits.rate_limit_all(
           case when patience <> '' then %(names)s::text[] end, %(slots)s::int[], %(keys)s::text[], %(timeout)s::float8,
           %(priority)s::int, %(holder)s::jsonb, %(id)s::uuid, %(strict)s::boolean, %(channel)s::text) a
"""


@dataclass(frozen=True, slots=True)
class Renewed:
    """Whether a lease was live when it was renewed, and its new end."""

    live: bool
    expires_at: datetime | None


class Grants:
    """Acquire, rate_limit, renew and release for clients that come by HTTP."""

    def __init__(self, database: Database, listener: Listener, *, durable: bool = True) -> None:
        self._db = database
        self._listener = listener
        self._limiter = AsyncLimiter(database.conninfo, durable=durable)
        self._leaving: set[asyncio.Task[None]] = set()
        self._asks = asyncio.Semaphore(_ASKS_AT_ONCE)
        self._locked: dict[tuple[str, ...], float] = {}
        """Which names, asked for together, met a lock, and until when nobody else finds out whether it is over."""
        self._batches = Batches(database, self._asks)
        self._closing = asyncio.Event()
        self.refusals: Counter[tuple[str, str]] = Counter()
        """How often this server has refused slots of each limit, to acquire and to rate_limit. The database does not
        know: a refusal writes nothing. Of several limits it is not known which refused, and some may be missing."""

    async def acquire(
        self,
        names: Sequence[str],
        slots: Sequence[int] = (1,),
        keys: Sequence[str] = ("",),
        *,
        for_rate: bool = False,
        timeout: float | None = 0,  # noqa: ASYNC109
        hold: float = 0,
        lease_duration: float = 300.0,
        priority: int = 0,
        holder: Any = None,
        lease_id: UUID | None = None,
        strict: bool = False,
        clamp: bool = False,
    ) -> Answer:
        """Ask for slots of one limit or several, all or none.

        slots, keys: one for all names or one for each.
        timeout: seconds that the request may stand in line in all, from when it was asked first; None for ever.
        hold: seconds after which a request that is still queued is answered so. Its place then lives for 10 seconds:
            it is asked for again by its lease_id, and with the same arguments.
        lease_id: chosen by the client, so that it may repeat the request; or that of its place in line.
        clamp: slots above a limit count as the limit.

        Cancelled, it gives up its place, or what it was granted. Under an id that the client knows, the place lapses
        instead: the client may be asking again already, of another server.

        Raises:
            PglimitsError: as ``pglimits.acquire`` does.
        """
        operation = "rate_limit" if for_rate else "acquire"
        try:
            answer = await self._acquire(
                names, slots, keys, for_rate, timeout, hold, lease_duration, priority, holder, lease_id, strict, clamp
            )
        except QueueFull:
            self._count_refusal(names, operation)
            raise
        if answer.status == "refused":
            self._count_refusal(names, operation)
        return answer

    def _count_refusal(self, names: Sequence[str], operation: str) -> None:
        if len(set(names)) == 1:
            self.refusals[names[0], operation] += 1

    def forget_refusals(self, known: Collection[str]) -> None:
        """Forget those of limits that are not among these: they were deleted or renamed."""
        for name, operation in list(self.refusals):
            if name not in known:
                del self.refusals[name, operation]

    async def _acquire(
        self,
        names: Sequence[str],
        slots: Sequence[int],
        keys: Sequence[str],
        for_rate: bool,
        timeout: float | None,  # noqa: ASYNC109
        hold: float,
        lease_duration: float,
        priority: int,
        holder: Any,
        lease_id: UUID | None,
        strict: bool,
        clamp: bool,
    ) -> Answer:
        many = len(names)
        if len(slots) not in (1, many) or len(keys) not in (1, many):
            raise InvalidArgument("slots and keys must be one for all names, or one for each")
        slots = list(slots) if len(slots) == many else list(slots) * many
        keys = list(keys) if len(keys) == many else list(keys) * many
        if lease_id is None:
            try:
                answer = await self._once(names, slots, keys, for_rate, lease_duration, priority, holder, strict, clamp)
            except (LimitLocked, Busy, Cancelled):
                if not hold:
                    raise
            else:
                if answer.status != "refused" or timeout == 0:
                    return answer
        elif timeout == 0:
            duration = 1.0 if for_rate else lease_duration
            alike = Alike(tuple(names), tuple(slots), tuple(keys), for_rate, duration, priority, strict, clamp)
            return await self._batches.ask(alike, lease_id, "null" if holder is None else as_json(holder))
        arguments = {
            "names": list(names),
            "slots": slots,
            "keys": keys,
            "timeout": timeout,
            "duration": lease_duration,
            "priority": priority,
            "holder": None if holder is None else Jsonb(holder, dumps=as_json),
            "id": lease_id or new_id(),
            "strict": strict,
            "clamp": clamp,
            "channel": self._listener.channel if timeout != 0 else None,  # who tries once has nothing to be told
        }
        query = _RATE_LIMIT if for_rate else _ACQUIRE
        if many == 1 and not for_rate:
            query = _ACQUIRE_ONE
            arguments.update(name=names[0], count=slots[0], key=keys[0])
        return await self._in_line(query, arguments, hold, lease_id is None)

    async def _once(
        self,
        names: Sequence[str],
        slots: Sequence[int],
        keys: Sequence[str],
        for_rate: bool,
        duration: float,
        priority: int,
        holder: Any,
        strict: bool,
        clamp: bool,
    ) -> Answer:
        """Try once, by the courier."""
        counts: dict[str | tuple[str, str], int] = {}
        for name, count, key in zip(names, slots, keys, strict=True):
            counts[name, key] = counts.get((name, key), 0) + count
        limiter = self._limiter
        kind = checked(counts, 1, 0, None, 1 if for_rate else duration, strict, None, "", priority, for_rate, clamp)
        try:
            lease = await limiter._run(limiter._acquiring(kind, None if holder is None else as_json(holder), False))
        except LimitLocked:
            raise
        except AcquireTimeout as error:
            return Answer("refused", retry_after=error.retry_after)
        if for_rate:  # nothing is held then: but what was granted has a duration
            return Answer("granted" if lease._duration else "unlimited")
        if not lease.enforced:
            return Answer("unlimited")
        fences = dict(zip(lease.places, lease.fences, strict=True))
        return Answer(
            "granted",
            lease.id,
            [fences[name, key] for name, key in zip(names, keys, strict=True)],
            lease.expires_at,
        )

    async def _in_line(self, query: str, arguments: dict[str, Any], hold: float, is_new: bool) -> Answer:
        """Ask until there is an answer other than queued, or the hold is over."""
        lease_id: UUID = arguments["id"]
        try:
            with self._listener.news_of(lease_id) if hold else contextlib.nullcontext() as news:
                return await self._ask_on(query, arguments, hold, news)
        except QueueFull:
            raise  # it has no place
        except (Exception, asyncio.CancelledError):
            if is_new:  # its client does not know the id, so it cannot
                self.leave_later(lease_id)
            raise

    async def _ask_on(self, query: str, arguments: dict[str, Any], hold: float, news: asyncio.Event | None) -> Answer:
        clock = asyncio.get_running_loop().time
        began = clock()
        timeout: float | None = arguments["timeout"]
        heard_at = 0.0
        while True:
            if news is not None:
                news.clear()
            if timeout is not None:
                arguments["timeout"] = max(timeout - (clock() - began), 0.0)
            left = began + hold - clock()
            is_over = left <= 0 or news is None or self._closing.is_set()
            try:
                answer = await self._ask(query, arguments)
                heard_at = clock()
            except (LimitLocked, Busy, Cancelled):  # nothing was done
                if is_over:
                    raise
                await asyncio.sleep(_PAUSE)
                continue
            except LimiterUnavailable:
                # A restart: the place is still there when it is asked for within its time.
                if is_over or clock() - heard_at > PLACE_LIVES:
                    raise
                await asyncio.sleep(_PAUSE)
                continue
            if answer.status != "queued":
                return answer
            nap = ASKS_EVERY * random.uniform(0.8, 1.0)
            if answer.retry_after is not None:
                nap = min(nap, answer.retry_after)
            if answer.position is None and nap <= _MOMENT:
                await asyncio.sleep(nap)  # it is granted as of then
            elif is_over or news is None:
                return answer
            else:
                await self._news_or(news, min(nap, left))

    async def _ask(self, query: str, arguments: dict[str, Any]) -> Answer:
        """Ask once. Of limits that somebody keeps locked, one request a second finds out whether that is over.

        Else those who ask for such a limit would keep all connections from those who ask for others.
        """
        now = asyncio.get_running_loop().time()
        names = tuple(arguments["names"])
        suspect = [some for some in dict.fromkeys([names, *((name,) for name in names)]) if some in self._locked]
        if any(self._locked[some] > now for some in suspect):
            raise LimitLocked(f"somebody keeps one of these limits locked: {', '.join(map(repr, names))}")
        if suspect:
            self._met_lock(names, now)
        try:
            async with self._asks:
                arguments["lock"] = _LOCK_AGAIN if suspect else _LOCK
                row = await self._db.row(query, arguments)
        except LimitLocked:
            self._met_lock(names, now)
            raise
        except LimiterUnavailable:
            raise
        except PglimitsError:
            self._met_no_lock([*suspect, names])
            raise
        self._met_no_lock([*suspect, names])
        return Answer(**(row or {}))

    def _met_lock(self, names: tuple[str, ...], now: float) -> None:
        """Of several names it is not known which is locked: the others may be had alone."""
        if len(self._locked) >= _MOST_LOCKED:
            self._locked.clear()
        self._locked[names] = now + _LOOKS_AGAIN

    def _met_no_lock(self, found: Sequence[tuple[str, ...]]) -> None:
        for names in found:
            self._locked.pop(names, None)

    async def _news_or(self, news: asyncio.Event, seconds: float) -> None:
        """Sleep until there is news, or the server closes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.005)):
                await news.wait()

    async def rate_limit(self, names: Sequence[str], slots: Sequence[int] = (1,), **options: Any) -> Answer:
        """``acquire`` of slots that come back by decay only."""
        return await self.acquire(names, slots, for_rate=True, **options)

    async def renew(self, lease_id: UUID, lease_duration: float | None = None) -> Renewed:
        """Move the end of a lease to so many seconds from now; None: the duration that it was taken with."""
        limiter = self._limiter
        rows = await limiter._run(limiter._ask(_sql.RENEW, None, [lease_id], lease_duration))
        _, live, expires_at = rows[0]
        return Renewed(bool(live), expires_at)

    async def release(self, lease_id: UUID) -> bool:
        """End a lease. Whether it was still live; doing it twice is harmless."""
        return await self._limiter.release(lease_id)

    async def settle(self, lease_id: UUID, used: Mapping[tuple[str, str], int]) -> bool:
        """Tell how many slots of rate limits a lease has really used. Whether it was live."""
        return await self._limiter.settle(lease_id, used)

    async def leave(self, lease_id: UUID) -> bool:
        """Give up a place in line, or what was granted under that id meanwhile."""
        return await self._limiter.release(lease_id)

    def leave_later(self, lease_id: UUID) -> None:
        """Give up a place in line, or what was granted, in the background: nobody is there to be told."""

        async def leave() -> None:
            try:
                await self._limiter.release(lease_id)
            except PglimitsError as error:
                log.debug("a place in line lapses by itself: %s", error)

        task = asyncio.create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def begin_closing(self) -> None:
        """Have all that is held answered now. Places stay for 10 seconds, to be asked for again."""
        self._closing.set()
        self._listener.tell_all()

    async def close(self) -> None:
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=1.0)
        await self._limiter.close()
