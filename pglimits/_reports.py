"""What a limiter can tell: how limits are used, what happened, why somebody waits. Courses, as in ``_calls``."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Literal, TypeAlias

from . import _arguments, _sql
from ._calls import Base, Course, as_holder, page, with_holder
from ._codec import Row
from ._leases import Place
from .errors import InvalidArgument
from .models import Counters, Event, Key, Reason, Step, Usage, Waiter

if TYPE_CHECKING:
    from ._ratelimit_fields import Budget, Known

Sort: TypeAlias = Literal["busiest", "name", "limit", "held", "level", "waiting", "oldest_wait", "given"]


class Reports(Base):
    """What a limiter can tell."""

    def why_waiting(self, name: str) -> Course[builtins.list[Reason]]:
        """Why each waiter of a limit waits, in the order of the line. Raises LimitNotFound.

        Those that need this limit but stand in the line of another come last.
        """
        found = yield from self._ask(_sql.WHY_WAITING, _arguments.text("name", name))
        return [Reason(*row) for row in found]

    def counters(self, name: str | None = None) -> Course[builtins.list[Counters]]:
        """What was counted of one limit, or of all by name, since they were created."""
        found = yield from self._ask(_sql.COUNTERS, _arguments.optional_text("name", name))
        return [Counters(*row) for row in found]

    def usage(
        self,
        contains: str | None = None,
        *,
        names: Iterable[str] | None = None,
        sort: Sort = "busiest",
        count: int = 100,
        offset: int = 0,
    ) -> Course[builtins.list[Usage]]:
        """How limits are used now, a page of them: the busiest first, unless ``sort`` says otherwise.

        Args:
            contains: only limits whose name contains this, in upper or lower case.
            names: only these limits. ``sort="given"`` keeps their order.
            sort: ``busiest``, ``name``, ``limit``, ``held``, ``level``, ``waiting``, ``oldest_wait`` or ``given``.
            count, offset: at most so many limits, from the one at ``offset`` on.
        """
        if sort not in _sql.USAGE:
            raise InvalidArgument(f"sort must be one of {', '.join(map(repr, _sql.USAGE))}, not {sort!r}")
        found = yield from self._ask(
            _sql.USAGE[sort],
            _arguments.optional_text("contains", contains),
            None if names is None else [_arguments.text("names", name) for name in names],
            *page(count, offset),
        )
        return [Usage(*row) for row in found]

    def events(
        self, name: str | None = None, kind: str | None = None, *, after: int | None = None, count: int = 100
    ) -> Course[builtins.list[Event]]:
        """What happened, oldest first: the newest ``count`` events, or the first ``count`` after the event ``after``.

        name, kind: only events of this limit, of this kind. after: an event_id.

        An event gets its event_id before its transaction commits. So an event with a lower id than the last one read
        may still appear; ``pglimits events --follow`` waits for it.
        """
        wanted = (_arguments.optional_text("name", name), _arguments.optional_text("kind", kind))
        count = _arguments.whole("count", count, least=1)
        if after is None:
            found = yield from self._ask(_sql.NEWEST_EVENTS, *wanted, count)
        else:
            found = yield from self._ask(
                _sql.EVENTS_AFTER, *wanted, _arguments.whole("after", after, least=0, most=2**63 - 1), count
            )
        return [_event(row) for row in found]

    def _news(self, after: int, missing: Iterable[int], count: int) -> Course[tuple[int, int, builtins.list[Event]]]:
        """The events behind one, and those of the missing ones that are there now; before that, the oldest transaction
        that was under way, and the next one to begin."""
        found = yield from self._ask(_sql.NEWS, after, missing, count)
        return found[0][0], found[0][1], [_event(row[2:]) for row in found if row[2] is not None]

    def history(self, name: str, seconds: float = 3600, points: int = 60) -> Course[builtins.list[Step]]:
        """How a limit was used in the last so many seconds, in so many steps, oldest first. Raises LimitNotFound.

        ``sweep`` takes samples, at most once a minute. A step without a sample is left out.
        """
        found = yield from self._ask(
            _sql.HISTORY,
            _arguments.text("name", name),
            _arguments.number("seconds", seconds),
            _arguments.whole("points", points, least=1),
        )
        return [Step(*row) for row in found]

    def _sparklines(
        self, names: Iterable[str], seconds: float, points: int
    ) -> Course[dict[str, builtins.list[float | None]]]:
        """The mean of what was held, by limit; None where that is not known."""
        found = yield from self._ask(_sql.SPARKLINES, names, seconds, points)
        return {name: held for name, held in found if held is not None}

    def _queue(self, name: str, count: int, offset: int) -> Course[tuple[int, builtins.list[tuple[Waiter, Reason]]]]:
        """Who waits, in order, and why: how many there are, and a page of them."""
        found = yield from self._ask(_sql.QUEUE, name, count, offset)
        queue = []
        for _, *row in found:
            waiter = Waiter(*with_holder(tuple(row[:8])))
            queue.append((waiter, Reason(waiter.lease_id, waiter.key, waiter.position, *row[8:])))
        return found[0][0] if found else 0, queue

    def _grants(self, contains: str | None) -> Course[builtins.list[tuple[str, int, datetime]]]:
        """How many grants each limit has made until now."""
        found = yield from self._ask(_sql.GRANTS, contains)
        return [(name, grants, now) for name, grants, now in found]

    def _busiest_keys(self, name: str, count: int, offset: int) -> Course[builtins.list[Key]]:
        found = yield from self._ask(_sql.BUSIEST_KEYS, name, count, offset)
        return [Key(*row) for row in found]

    def _budgets(self, known: Known, places: Iterable[Place]) -> Course[builtins.list[Budget]]:
        """What is left of each of these keys, but for those that are not enforced."""
        places = builtins.list(places)
        if unknown := known.unknown(places):
            known.learn(unknown, (yield from self._ask(_sql.SETTINGS, unknown)))
        if not (enforced := known.enforced(places)):
            return []
        used = yield from self._ask(_sql.USED, [name for name, _ in enforced], [key for _, key in enforced])
        return known.budgets(enforced, used)

    def _may(self, functions: Iterable[str]) -> Course[set[str]]:
        """Which of these functions may be called here."""
        found = yield from self._ask(_sql.MAY, functions)
        return {function for function, may in found if may}


def _event(row: Row) -> Event:
    holder, held_seconds, *of_limit = row[8:]
    read: Row = (*row[:8], as_holder(holder), held_seconds, *map(as_holder, of_limit))
    return Event(*read)
