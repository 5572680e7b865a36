"""One connection that listens for the whole server, and only while somebody in it waits for news.

A notification is a hint. Whoever waits for it also looks by itself, at intervals: behind a pooler nothing is heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Iterator

import psycopg

log = logging.getLogger("pglimits.server")

EVENTS = "pglimits_events"
_LINGERS = 10.0
"""Seconds for which it goes on listening when nobody waits any longer."""
_TRIES_AGAIN = 1.0
_DEAF = 60.0
"""Seconds until it tries again behind a pooler, where nothing can be heard."""


class Listener:
    """Hears what the database notifies.

    Attributes:
        channel: the one of this server, on which it is told of its waiting requests.
        hears: whether notifications arrive.
    """

    def __init__(self, conninfo: str) -> None:
        self.channel = f"pglimits_serve_{secrets.token_hex(8)}"
        self.hears = False
        self._conninfo = conninfo
        self._wanted = 0
        self._task: asyncio.Task[None] | None = None
        self._deaf_until = 0.0
        self._idle: asyncio.TimerHandle | None = None
        self._by_id: dict[str, set[asyncio.Event]] = {}
        self._on_event: list[Callable[[], None]] = []

    def want(self) -> None:
        """Somebody waits: listen."""
        self._wanted += 1
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        is_deaf = asyncio.get_running_loop().time() < self._deaf_until
        if not is_deaf and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._listen(), name="pglimits listener")

    def done(self) -> None:
        """Somebody waits no longer."""
        self._wanted -= 1
        if not self._wanted:
            self._idle = asyncio.get_running_loop().call_later(_LINGERS, self._stop)

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None  # whoever wants it in this very moment starts another

    @contextlib.contextmanager
    def news_of(self, lease_id: object) -> Iterator[asyncio.Event]:
        """An event that is set when there may be news of that request."""
        event = asyncio.Event()
        key = str(lease_id)
        self._by_id.setdefault(key, set()).add(event)
        self.want()
        try:
            yield event
        finally:
            self.done()
            others = self._by_id[key]
            others.discard(event)
            if not others:
                del self._by_id[key]

    def on_event(self, callback: Callable[[], None]) -> None:
        """Have something called when an event was written, or may have been."""
        self._on_event.append(callback)

    async def close(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
                self._deaf_until = asyncio.get_running_loop().time() + _DEAF
                return  # a pooler: nothing can be heard
            except (psycopg.Error, OSError) as error:
                log.debug("the listener lost its connection: %s", error)
            except Exception:
                log.exception("the listener failed")
            finally:
                self.hears = False
            await asyncio.sleep(_TRIES_AGAIN * random.uniform(0.7, 1.3))

    async def _listen_once(self) -> None:
        connection = await psycopg.AsyncConnection.connect(
            self._conninfo, autocommit=True, prepare_threshold=None, client_encoding="utf8"
        )
        try:
            cursor = await connection.execute("select pg_backend_pid()")
            row = await cursor.fetchone()
            if row is None or row[0] != connection.pgconn.backend_pid:
                log.debug("a pooler is in between: the server looks for itself")
                return
            await connection.execute(f'listen "{self.channel}"'.encode())
            await connection.execute(f"listen {EVENTS}".encode())
            self.hears = True
            self.tell_all()
            async for notice in connection.notifies():
                if notice.channel == EVENTS:
                    self._tell_events()
                else:
                    for event in self._by_id.get(notice.payload[:36], ()):
                        event.set()
        finally:
            with contextlib.suppress(psycopg.Error, asyncio.CancelledError):
                await connection.close()

    def tell_all(self) -> None:
        """Have everybody look: what was told before may be lost."""
        for events in self._by_id.values():
            for event in events:
                event.set()
        self._tell_events()

    def _tell_events(self) -> None:
        for callback in self._on_event:
            callback()
