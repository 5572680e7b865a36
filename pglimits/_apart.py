"""What has met a lock that somebody keeps in a long transaction, kept apart from the rest until it goes through.

A statement that serves many waits for the locks of all, and one that is kept is enough to hold up everybody in it. So
it waits for a moment only. What was in it is then tried in halves, and these in halves, until what is locked is by
itself; meanwhile the rest goes on without it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from ._database import is_busy

T = TypeVar("T")

AGAIN = 0.02
"""Seconds that what has met a lock waits for it when it is tried again: others wait behind it by now."""

_LONGEST_PAUSE = 0.5


class Apart(Generic[T]):
    """What has met a lock, in parts that are tried one at a time. For one thread."""

    def __init__(self) -> None:
        # When to try it next, a number that no other has, how often it was tried by itself, and what it is.
        self._parts: list[tuple[float, int, int, list[T]]] = []
        self._count = itertools.count()
        self._all: set[T] = set()

    def __bool__(self) -> bool:
        return bool(self._all)

    def __iter__(self) -> Iterator[T]:
        return iter(self._all)

    def __contains__(self, item: T) -> bool:
        return item in self._all

    def add(self, items: Iterable[T]) -> None:
        """Keep these apart, which have met a lock together. Those that may be locked together side by side."""
        part = list(dict.fromkeys(items))
        self._all.update(part)
        self._put(part, 0)

    def clear(self) -> None:
        """Keep nothing apart any longer."""
        self._parts.clear()
        self._all.clear()

    @property
    def next_at(self) -> float:
        """When (monotonic) there is something to be tried."""
        return self._parts[0][0] if self._parts else math.inf

    def try_next(self, work: Callable[[list[T]], None]) -> bool:
        """Try a part, if it is time; whether it was. It is apart no longer unless that meets a lock again."""
        if self.next_at > time.monotonic():
            return False
        _, _, tried, part = heapq.heappop(self._parts)
        try:
            work(part)
        except BaseException as error:
            if not is_busy(error):
                self._all.difference_update(part)
                raise
            middle = len(part) // 2
            if middle:
                self._put(part[:middle], 0)
                self._put(part[middle:], 0)
            else:
                self._put(part, tried + 1)
        else:
            self._all.difference_update(part)
        return True

    def _put(self, part: list[T], tried: int) -> None:
        pause = min(0.05 * 2 ** (tried - 1), _LONGEST_PAUSE) if tried else 0.0
        heapq.heappush(self._parts, (time.monotonic() + pause, next(self._count), tried, part))
