"""Follows the events of a database: none is missed, and none comes twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pglimits._gaps import Gaps

from . import _client

if TYPE_CHECKING:
    import psycopg

    from pglimits import Event, Limiter

_AT_ONCE = 1000
"""Events that are asked for at a time."""
_LOOKS_EVERY = 1.0
"""Seconds after which it looks, also where nothing was heard."""
_LISTENS_AGAIN_AFTER = 5.0


class Follower:
    """Reads events on from where it was."""

    def __init__(self, seen: list[Event]) -> None:
        self._gaps = Gaps(event.event_id for event in seen)
        # What was read and not handed over yet: a later page may fail.
        self._unread: list[Event] = []

    def read(self, limiter: Limiter) -> list[Event]:
        """What is new. Raises LimiterUnavailable: it may be asked again, and goes on from here."""
        while True:
            oldest, following, found = limiter._news(self._gaps.last, self._gaps.missing, _AT_ONCE)
            self._gaps.take((event.event_id for event in found), oldest, following)
            self._unread += found
            if len(found) < _AT_ONCE:
                news, self._unread = self._unread, []
                return news


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
