"""Which events may still come although later ones have been read."""

from __future__ import annotations

import time
from collections.abc import Iterable

_SETTLES_AFTER = 1.0
"""Seconds between the moment in which an id was drawn and the moment in which its transaction has a number, at most."""
_WIDEST = 10_000
"""Ids that are waited for at once: a larger gap is one in the sequence."""


class Gaps:
    """How far the ids of events were read.

    An event_id is drawn before the commit. So an id that is not there yet may still come, until all transactions have
    ended that were under way when it was missed.

    Attributes:
        last: the highest id that was read.
    """

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self.last = 0
        # Those that are not there: since when, and the transactions below which number must have ended.
        self._missing: dict[int, tuple[float, int | None]] = {}
        for event_id in ids:
            self._take(event_id, waits=self.last > 0)

    @property
    def missing(self) -> list[int]:
        """The ids to ask for besides those behind the last one."""
        return list(self._missing)

    def take(self, ids: Iterable[int], oldest: int, following: int) -> None:
        """Some of those that were asked for, in order, have been read.

        oldest, following: the oldest transaction that was under way before, and the next one that was to begin.
        """
        found = list(ids)
        for event_id in found:
            self._missing.pop(event_id, None)
        self._settle(oldest, following)
        for event_id in found:
            self._take(event_id, waits=True)

    def _take(self, event_id: int, waits: bool) -> None:
        if event_id <= self.last:
            return
        if waits and event_id - self.last <= _WIDEST:
            now = time.monotonic()
            self._missing.update((each, (now, None)) for each in range(self.last + 1, event_id))
        self.last = event_id

    def _settle(self, oldest: int, following: int) -> None:
        now = time.monotonic()
        for event_id, (since, until) in list(self._missing.items()):
            if until is None:
                if now > since + _SETTLES_AFTER:
                    self._missing[event_id] = (since, following)
            elif oldest >= until:
                del self._missing[event_id]  # its transaction was rolled back
