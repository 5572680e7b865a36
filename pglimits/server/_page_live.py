"""News for open pages, and what they share: ``_live`` looks on for all of them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from ._changes import Change
from ._database import Database
from ._live import Live
from ._page_data import Overview, Row

T = TypeVar("T")

_LOOKS_ANYWAY = 10.0
"""Seconds after which a page is told to look although no figure has changed: a lease may have been renewed."""
_BEATS = 5.0
"""Seconds between two signs of life of a stream."""
_SHARE = 5
"""An answer that took long is kept so many times as long."""
_MOST_KEPT = 200
_SPARKLINE_KEEPS = 30.0
"""Seconds for which a sparkline is shown again without a look: samples come once a minute."""
_POINTS = 30
_SPARKLINES = f"select name, held from pglimits.sparklines(%(names)s::text[], 3600, {_POINTS})"
_LEVELS = """
select l.name, h.level, %(points)s - round(date_part('epoch', n.now - h.at) * %(points)s / 3600)::integer as nth
from (select pglimits._now() as now) n
cross join pglimits.limits l
cross join lateral pglimits.history(l.name, 3600, %(points)s) h
where l.name = any (%(names)s::text[])
"""


@dataclass(slots=True)
class _Asked:
    """A question: since when, and how long the answer took."""

    began: float
    task: asyncio.Task[Any]
    took: float = 0.0


class Shared:
    """Answers that all who ask within a moment share, so that a hundred pages of one limit ask the database once."""

    def __init__(self) -> None:
        self._asked: dict[Hashable, _Asked] = {}
        self._last: OrderedDict[Hashable, Any] = OrderedDict()

    async def get(self, key: Hashable, seconds: float, make: Callable[[], Awaitable[T]], after: float = -math.inf) -> T:
        """What ``make`` returns, or has returned not more than so many seconds ago; longer ago if it took long.

        after: by ``time.monotonic()``. An answer that was begun before is not shared. Where a new one would come too
        soon after one that took long, whoever asks waits.
        """
        asked = self._asked.get(key)
        if asked is not None and asked.began < after:
            await asyncio.wait({asked.task})  # one at a time
            await asyncio.sleep(asked.began + asked.took * _SHARE - time.monotonic())
            asked = self._asked.get(key)
        if asked is not None and asked.task.done():
            age = time.monotonic() - asked.began
            is_old = asked.began < after or age > max(seconds, asked.took * _SHARE)
            if is_old or asked.task.exception() is not None:
                asked = None
        if asked is None:
            if len(self._asked) >= _MOST_KEPT:
                self._asked = {each: kept for each, kept in self._asked.items() if not kept.task.done()}
            asked = self._asked[key] = _Asked(time.monotonic(), asyncio.ensure_future(self._make(key, make)))
            asked.task.add_done_callback(_look_at)
        found: T = await asyncio.shield(asked.task)
        return found

    async def _make(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        began = time.monotonic()
        found = await make()
        if key in self._asked:
            self._asked[key].took = time.monotonic() - began
        self._last[key] = found
        self._last.move_to_end(key)
        if len(self._last) > _MOST_KEPT:
            self._last.popitem(last=False)
        return found

    def last(self, key: Hashable) -> Any:
        """The last answer that there was, however old; None if there was none."""
        return self._last.get(key)

    def clear(self) -> None:
        """Whoever asks next gets a new answer: something was changed here."""
        self._asked = {}


def _look_at(task: asyncio.Task[Any]) -> None:
    """An error is no news for asyncio, also where whoever asked has gone meanwhile."""
    if not task.cancelled():
        task.exception()


class Hub:
    """What all open pages share."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.overview = Overview(live)
        self.shared = Shared()
        self._sparklines: dict[str, tuple[float, list[float | None]]] = {}

    async def sparklines(self, db: Database, rows: list[Row]) -> dict[str, list[float | None]]:
        """Of each limit what was held in the last hour; of a rate limit its level."""
        now = time.monotonic()
        kept = self._sparklines
        missing = [row for row in rows if row.name not in kept or now - kept[row.name][0] > _SPARKLINE_KEEPS]
        if len(kept) > _MOST_KEPT * 25:
            kept.clear()
        names = [row.name for row in missing if not row.is_rate_limit]
        if names:
            found = {each["name"]: each["held"] for each in await db.rows(_SPARKLINES, {"names": names})}
            kept.update({name: (now, found.get(name) or []) for name in names})
        rates = [row.name for row in missing if row.is_rate_limit]
        if rates:
            levels: dict[str, list[float | None]] = {name: [None] * _POINTS for name in rates}
            for each in await db.rows(_LEVELS, {"names": rates, "points": _POINTS}):
                levels[each["name"]][min(max(each["nth"], 1), _POINTS) - 1] = each["level"]
            kept.update({name: (now, levels[name]) for name in rates})
        return {row.name: kept[row.name][1] if row.name in kept else [] for row in rows}

    async def forget(self) -> None:
        """Something was changed here: whoever asks from now on is to see it."""
        self.shared.clear()
        await self.live.refresh()


def hub_of(request: Request) -> Hub:
    state = request.app.state
    if not hasattr(state, "hub"):
        state.hub = Hub(state.live)
    hub: Hub = state.hub
    return hub


async def news(live: Live, name: str | None, seen: str = "") -> AsyncIterator[tuple[str, str]]:
    """Yields ``news`` whenever something has changed, of one limit or of any; ``look`` where a page had better look
    although nothing is known to have changed; else ``beat``, as a sign of life. Each with a mark of what there is.

    The first is ``look``: the listener cannot know what it has missed. seen: the mark that it was told last; where
    there is something else now, the first is ``news``.
    """
    changes = live.stream()
    told = 0.0
    beat = time.monotonic()
    coming: asyncio.Task[Any] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(anext(changes, None))
            await asyncio.wait({coming}, timeout=_BEATS)
            now = time.monotonic()
            word = "look" if told and now - told >= _LOOKS_ANYWAY else "beat" if now - beat >= _BEATS * 0.9 else ""
            if coming.done():
                change = coming.result()
                coming = None
                if change is None:
                    return
                if not told:
                    word = "news" if seen and seen != live.mark(name) else "look"
                elif _concerns(change, name):
                    word = "news"
            if word:
                beat = now
                told = told if word == "beat" else now
                yield word, live.mark(name)
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
        await changes.aclose()


def _concerns(change: Change, name: str | None) -> bool:
    """Whether a page shows something of that: the page of a limit has only that limit's figures and events."""
    if name is None or change.first or change.missed or change.database_changed:
        return True
    return name in change.shared(_names) or any(each["name"] == name for each in change.events)


def _names(change: Change) -> frozenset[str]:
    return frozenset((*change.gone, *(each["name"] for each in change.limits)))
