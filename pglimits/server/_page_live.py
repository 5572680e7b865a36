"""News for open pages, and what they share: ``_live`` looks on for all of them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Any, TypeVar

from fastapi import Request

from ._changes import Change
from ._database import Database
from ._live import Live
from ._page_data import Overview

T = TypeVar("T")

_LOOKS_ANYWAY = 10.0
"""Seconds after which a page is told to look although no figure has changed: a lease may have been renewed."""
_BEATS = 5.0
"""Seconds between two signs of life of a stream."""
_MOST_KEPT = 200
_SPARKLINE_KEEPS = 30.0
"""Seconds for which a sparkline is shown again without a look: samples come once a minute."""
_SPARKLINES = "select name, held from pglimits.sparklines(%(names)s::text[], 3600, 30)"


class Shared:
    """Answers that all who ask within a moment share, so that a hundred pages of one limit ask the database once."""

    def __init__(self) -> None:
        self._asked: dict[Hashable, tuple[float, asyncio.Task[Any]]] = {}
        self._last: OrderedDict[Hashable, Any] = OrderedDict()

    async def get(self, key: Hashable, seconds: float, make: Callable[[], Awaitable[T]]) -> T:
        """What ``make`` returns, or has returned not more than so many seconds ago."""
        began, task = self._asked.get(key, (0.0, None))
        if task is not None and task.done() and (time.monotonic() - began > seconds or task.exception() is not None):
            task = None
        if task is None:
            if len(self._asked) >= _MOST_KEPT:
                self._asked = {each: asked for each, asked in self._asked.items() if not asked[1].done()}
            task = asyncio.ensure_future(self._make(key, make))
            self._asked[key] = (time.monotonic(), task)
        found: T = await asyncio.shield(task)
        return found

    async def _make(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        found = await make()
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


class Hub:
    """What all open pages share."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.overview = Overview(live)
        self.shared = Shared()
        self._sparklines: dict[str, tuple[float, list[float | None]]] = {}

    async def sparklines(self, db: Database, names: list[str]) -> dict[str, list[float | None]]:
        """What was held in the last hour, of each name."""
        now = time.monotonic()
        kept = self._sparklines
        missing = [name for name in names if name not in kept or now - kept[name][0] > _SPARKLINE_KEEPS]
        if missing:
            if len(kept) > _MOST_KEPT * 25:
                kept.clear()
            found = {row["name"]: row["held"] for row in await db.rows(_SPARKLINES, {"names": missing})}
            for name in missing:
                kept[name] = (now, found.get(name) or [])
        return {name: kept[name][1] if name in kept else [] for name in names}

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


async def news(live: Live, name: str | None) -> AsyncIterator[str]:
    """Yields ``news`` whenever something has changed, of one limit or of any; else ``beat``, as a sign of life.

    The first is ``news``: the listener cannot know what it has missed.
    """
    changes = live.stream()
    told = beat = time.monotonic()
    coming: asyncio.Task[Any] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(anext(changes, None))
            await asyncio.wait({coming}, timeout=_BEATS)
            now = time.monotonic()
            is_news = now - told >= _LOOKS_ANYWAY
            if coming.done():
                change = coming.result()
                coming = None
                if change is None:
                    return
                is_news = is_news or _concerns(change, name)
            if is_news:
                told = beat = now
                yield "news"
            elif now - beat >= _BEATS * 0.9:
                beat = now
                yield "beat"
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
