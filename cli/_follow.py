"""Follows the events of a database: none is missed, and none comes twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import _client

if TYPE_CHECKING:
    import psycopg

    from pglimits import Event, Limiter

_AT_ONCE = 1000
"""Events that are asked for at a time."""
_LOOKS_EVERY = 1.0
"""Seconds after which it looks, also where nothing was heard."""
_SETTLES_AFTER = 1.0
"""Seconds between the moment in which an id was drawn and the moment in which its transaction has a number, at most."""
_WIDEST_GAP = 10_000
"""Ids that are waited for at once: a larger gap is one in the sequence."""
_LISTENS_AGAIN_AFTER = 5.0


class Follower:
    """Reads events on from where it was.

    An event_id is drawn before the commit. So an id that is not there yet may still come, until all transactions have
    ended that were under way when it was missed.
    """

    def __init__(self, seen: list[Event]) -> None:
        self._last = 0
        # What was read and not handed over yet: a later page may fail.
        self._unread: list[Event] = []
        # Those that are not there: since when, and the transactions below which number must have ended.
        self._missing: dict[int, tuple[float, int | None]] = {}
        self._take([event.event_id for event in seen], from_start=bool(seen))

    def read(self, limiter: Limiter) -> list[Event]:
        """What is new. Raises LimiterUnavailable: it may be asked again, and goes on from here."""
        while True:
            oldest, following, found = limiter._news(self._last, self._missing, _AT_ONCE)
            for event in found:
                self._missing.pop(event.event_id, None)
            self._settle(oldest, following)
            self._take([event.event_id for event in found])
            self._unread += found
            if len(found) < _AT_ONCE:
                news, self._unread = self._unread, []
                return news

    def _take(self, ids: list[int], from_start: bool = False) -> None:
        now = time.monotonic()
        for event_id in ids:
            if event_id <= self._last:
                continue
            if not from_start and event_id - self._last <= _WIDEST_GAP:
                self._missing.update((each, (now, None)) for each in range(self._last + 1, event_id))
            self._last, from_start = event_id, False

    def _settle(self, oldest: int, following: int) -> None:
        now = time.monotonic()
        for event_id, (since, until) in list(self._missing.items()):
            if until is None:
                if now > since + _SETTLES_AFTER:
                    self._missing[event_id] = (since, following)
            elif oldest >= until:
                del self._missing[event_id]  # its transaction was rolled back


class Listener:
    """Waits for the news of events: by LISTEN, or where that cannot work, as behind PgBouncer, for a while."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._connection: psycopg.Connection[Any] | None = None
        self._can_listen = True
        self._listens_after = 0.0

    def wait(self) -> None:
        """Until something was heard, or it is time to look."""
        connection = self.open()
        if connection is None:
            time.sleep(_LOOKS_EVERY)
            return
        from psycopg import Error

        try:
            for _ in connection.notifies(timeout=_LOOKS_EVERY, stop_after=1):
                pass
        except Error:
            self.close()

    def open(self) -> psycopg.Connection[Any] | None:
        """A connection that hears. Whoever looks after it was opened misses nothing."""
        if self._connection is None and self._can_listen and time.monotonic() >= self._listens_after:
            from psycopg import Error

            from pglimits.errors import PglimitsError

            self._listens_after = time.monotonic() + _LISTENS_AGAIN_AFTER
            with contextlib.suppress(Error, PglimitsError):
                connection = _client.connect(self._conninfo)
                try:
                    ((pid,),) = connection.execute("select pg_backend_pid()").fetchall()
                    self._can_listen = pid == connection.info.backend_pid  # a pooler tells one of its own
                    if self._can_listen:
                        connection.execute("listen pglimits_events")
                        self._connection = connection
                finally:
                    if self._connection is None:
                        connection.close()
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextlib.contextmanager
def listening(conninfo: str) -> Iterator[Listener]:
    """A listener, closed at the end."""
    listener = Listener(conninfo)
    try:
        yield listener
    finally:
        listener.close()
