"""What was found last of all limits and events, and what somebody who looks on has not seen of it yet.

Each row is kept once, with the number of the poll in which it changed. Whoever looks on is no more than the number up
to which it has seen: a slow one costs no memory, and gets what changed since in one go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from .._gaps import Gaps

T = TypeVar("T")

Row = dict[str, Any]

KEPT = 1000
"""So many events, and names that are gone, are kept."""


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
        down_since: since when the database has not been reached, or not answered; None if it answers.
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


_NOTHING = Difference(False, [], [])


@dataclass(slots=True)
class Seen:
    """How far a stream has come. number: of the last event that it was sent."""

    number: int
    version: int = -1
    down_since: datetime | None = None
    details: dict[str, Detail | None] = field(default_factory=dict)


class KnownLimits:
    """The limits as they were found last.

    Attributes:
        rows: by name.
        version: how often something was found to have changed.
        mark: the same whenever the rows are the same.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.version = 0
        self.mark = 0
        self._changed: dict[str, int] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()
        self._knows_since = 0
        self._differences: dict[int, Difference] = {}

    def take(self, rows: Iterable[Row]) -> None:
        """Note which have changed."""
        found = {row["name"]: row for row in rows}
        changed = [name for name, row in found.items() if self.rows.get(name) != row]
        gone = self.rows.keys() - found.keys()
        for known, names in ((self.rows, gone), (self.rows, changed), (found, changed)):
            for name in names:
                self.mark ^= mark_of(known[name]) if name in known else 0
        self.rows = found
        if not changed and not gone:
            return
        self.version += 1
        self._differences.clear()
        for name in changed:
            self._changed[name] = self.version
            self._gone.pop(name, None)
        for name in gone:
            del self._changed[name]
            self._gone[name] = self.version
        while len(self._gone) > KEPT:
            self._knows_since = self._gone.popitem(last=False)[1]

    def forget(self) -> None:
        """Nobody looks any longer."""
        self.rows = {}
        self.mark = 0
        self._changed.clear()
        self._gone.clear()
        self._differences.clear()
        self.version += 1
        self._knows_since = self.version

    def since(self, version: int) -> Difference:
        """What has changed since a version; all limits, where that is not known any longer. -1: all."""
        if version == self.version:
            return _NOTHING
        if version < self._knows_since:
            version = -1
        found = self._differences.get(version)
        if found is None:
            if version < 0:
                found = Difference(True, list(self.rows.values()), [])
            else:
                found = Difference(
                    False,
                    [self.rows[name] for name, at in self._changed.items() if at > version],
                    [name for name, at in self._gone.items() if at > version],
                )
            self._differences[version] = found
        return found


def mark_of(row: Row) -> int:
    """The same for rows that are the same, in one process."""
    return hash(tuple(row.values()))


class KnownEvents:
    """The last events, in the order in which they were found.

    Attributes:
        number: of the one that was found last.
        gaps: how far they were read; None before the first ones were taken.
    """

    def __init__(self) -> None:
        self.number = 0
        self.gaps: Gaps | None = None
        self._found: OrderedDict[int, tuple[int, Row]] = OrderedDict()

    def begin(self, rows: Iterable[Row]) -> None:
        """The last ones that were there before anybody looked: they are no news."""
        there = sorted(rows, key=lambda row: row["event_id"])
        self._found.update((row["event_id"], (self.number, row)) for row in there)
        self.gaps = Gaps(row["event_id"] for row in there)

    def take(self, rows: Iterable[Row]) -> None:
        """Take up those that are new."""
        for row in rows:
            if row["event_id"] not in self._found:
                self.number += 1
                self._found[row["event_id"]] = (self.number, row)
        while len(self._found) > KEPT:
            self._found.popitem(last=False)

    def forget(self) -> None:
        """Nobody looks any longer."""
        self._found.clear()
        self.gaps = None

    def since(self, number: int) -> tuple[list[Row], bool]:
        """Those that were found since, oldest first, and whether some are not kept any longer."""
        if number >= self.number:
            return [], False
        news = []
        for at, row in reversed(self._found.values()):
            if at <= number:
                break
            news.append(row)
        news.reverse()
        return news, len(news) < self.number - number
