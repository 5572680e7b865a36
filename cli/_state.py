"""How a limit is doing: one word, and the reason for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from pglimits import _words

from . import _output

if TYPE_CHECKING:
    from pglimits import Usage

_LOOKS = 8
"""Over how many looks a rate is taken: of a slow one, most seconds see no grant."""
_SHORTEST = 0.5
"""Seconds between two looks from which a rate is taken."""


def state(usage: Usage) -> tuple[str, str]:
    """The word for what a limit does right now, and why it is this one."""
    return _words.state(usage, "" if usage.oldest_wait is None else _output.duration(usage.oldest_wait))


def used(usage: Usage) -> float:
    """What counts against that: slots that are held, or a rate limit's level."""
    return max(usage.held, usage.level)


class Rates:
    """Grants per second, over the last few looks at limits."""

    def __init__(self) -> None:
        self._looks: deque[dict[str, tuple[float, int]]] = deque(maxlen=_LOOKS)

    def look(self, found: Iterable[Usage]) -> dict[str, float]:
        """The rate of each limit that was seen before."""
        return self.look_at([(usage.name, usage.grants, usage.now) for usage in found])

    def look_at(self, counted: Iterable[tuple[str, int, datetime]]) -> dict[str, float]:
        """The same from what was counted until when."""
        seen = {name: (now.timestamp(), grants) for name, grants, now in counted}
        rates = {}
        for name, (at, grants) in seen.items():
            since, had = next((look[name] for look in self._looks if name in look), (at, grants))
            if at - since >= _SHORTEST and grants >= had:  # one that was deleted and created anew starts from nothing
                rates[name] = (grants - had) / (at - since)
        self._looks.append(seen)
        return rates
