"""What the list of limits shows: one picture of all limits, shared by every open page, and what is picked out of it.

``_live`` reads all limits at once, at most once a second, and only while somebody looks. Filtering, sorting and paging
happen here, so 200 open pages cost the database what one does.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .._words import STATES, room, state

if TYPE_CHECKING:
    from ._live import Live

PER_PAGE = 50
SORTS = ("busiest", "name", "held", "level", "waiting", "oldest", "rate")
_RATE_OVER = 10.0
"""Seconds over which the rate of grants is measured."""
_RATE_EVERY = 2.0
_RATE_AT_LEAST = 0.8


@dataclass(slots=True)
class Row:
    """A limit as the list shows it."""

    name: str
    limit: int
    held: int
    waiting: int
    active: bool
    slot_decay_per_second: float
    level: float
    max_waiters: int | None
    description: str | None
    created_at: datetime
    updated_at: datetime
    grants: int
    granted_slots: int
    leases: int
    keys: int
    oldest_waiting_since: datetime | None
    oldest_wait: float | None
    rate: float | None = None
    state: str = "idle"
    reason: str = ""

    @property
    def id(self) -> str:
        """For the id of an element: a name may have any characters."""
        return hashlib.blake2b(self.name.encode(), digest_size=8).hexdigest()

    @property
    def is_rate_limit(self) -> bool:
        return self.slot_decay_per_second > 0

    @property
    def room(self) -> int:
        """Slots of all keys together: each has the whole limit."""
        return room(self)

    @property
    def taken(self) -> float:
        """Slots that are in use: held, or used by a rate limit and not decayed yet."""
        return max(self.held, self.level)

    @property
    def used(self) -> float:
        """The share of its slots that are in use."""
        return self.taken / self.room if self.room else 0.0


_OF_ROW = [each.name for each in fields(Row) if each.default is MISSING and each.name != "oldest_wait"]


def make_row(of: dict[str, Any], now: datetime, rate: float | None) -> Row:
    """Out of a row of the views ``limits`` and ``counters`` together."""
    since: datetime | None = of["oldest_waiting_since"]
    oldest = max((now - since).total_seconds(), 0.0) if since is not None and of["waiting"] else None
    row = Row(**{name: of[name] for name in _OF_ROW}, oldest_wait=oldest, rate=rate)
    row.state, row.reason = state(row)
    return row


@dataclass(slots=True)
class Picture:
    """All limits at one moment. ``now``: the database's clock; None where it was never reached."""

    now: datetime | None
    rows: list[Row]


@dataclass(slots=True)
class Query:
    """What a reader of the list asked for: all of it is in the URL."""

    text: str = ""
    state: str = ""
    sort: str = "busiest"
    reverse: bool = False
    page: int = 1


@dataclass(slots=True)
class Page:
    """What the reader gets."""

    rows: list[Row]
    found: int
    total: int
    page: int
    pages: int
    first: int
    states: dict[str, int]


def pick(picture: Picture, query: Query) -> Page:
    """Filter, sort and cut out one page. A page beyond the last is the last."""
    wanted = query.text.casefold()
    named = [row for row in picture.rows if wanted in row.name.casefold()] if wanted else picture.rows
    states = dict.fromkeys(STATES, 0)
    for row in named:
        states[row.state] += 1
    found = [row for row in named if row.state == query.state] if query.state else named
    ordered = order(found, query.sort, query.reverse)
    pages = max(-(-len(ordered) // PER_PAGE), 1)
    page = min(max(query.page, 1), pages)
    first = (page - 1) * PER_PAGE
    return Page(ordered[first : first + PER_PAGE], len(ordered), len(picture.rows), page, pages, first, states)


def order(rows: Iterable[Row], by: str, reverse: bool = False) -> list[Row]:
    """By a column: names from a to z, numbers from the highest. ``reverse`` turns that round; ties go by name."""
    named = sorted(rows, key=lambda row: row.name.casefold(), reverse=reverse and by == "name")
    if by == "name":
        return named
    rank = {word: -index for index, word in enumerate(STATES)}

    def value(row: Row) -> Any:
        match by:
            case "held":
                return (row.used, row.taken)
            case "level":
                return row.level
            case "waiting":
                return row.waiting
            case "oldest":
                return row.oldest_wait or -1.0
            case "rate":
                return row.rate or 0.0
            case _:  # busiest: rounded, so that rows do not change places over trifles
                return (rank[row.state], row.waiting, round(row.used, 1), round(row.rate or 0.0, -1))

    # sorted() keeps ties in order also when it reverses.
    return sorted(named, key=value, reverse=not reverse)


class Overview:
    """The picture of all limits, out of what ``live`` has found last."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._source: dict[str, Any] | None = None
        self._before: deque[tuple[float, dict[str, int]]] = deque()
        self._rates: dict[str, float] = {}
        self.last = Picture(None, [])
        """The last picture that there was, however old."""

    async def now(self) -> Picture:
        """A picture of now. All who ask within a second share it.

        Raises:
            PglimitsError: the database could not be asked.
        """
        live = self._live
        source = live.limits if live.at is not None and live.error is None else await live.snapshot()
        if source is not self._source and live.at is not None:
            self._measure(time.monotonic(), {name: each["granted_slots"] for name, each in source.items()})
            rows = [make_row(each, live.at, self._rates.get(name)) for name, each in source.items()]
            self._source = source
            self.last = Picture(live.at, rows)
        return self.last

    def rate(self, name: str) -> float | None:
        """Slots that a limit has granted a second, lately, if that is known."""
        return self._rates.get(name)

    def _measure(self, at: float, granted: dict[str, int]) -> None:
        """Slots granted a second, lately. Nothing of limits that were not there before."""
        before = self._before
        if before and at - before[-1][0] > _RATE_OVER:
            before.clear()  # nobody has looked for a while
        while len(before) > 1 and at - before[1][0] >= _RATE_OVER:
            before.popleft()
        self._rates = {}
        if before and at - before[0][0] >= _RATE_AT_LEAST:
            then, were = before[0]
            self._rates = {
                name: round(max(now - were[name], 0) / (at - then), 2) for name, now in granted.items() if name in were
            }
        if not before or at - before[-1][0] >= _RATE_EVERY:
            before.append((at, granted))
