"""A hand-written ``pg_advisory_lock``: what people do who have PostgreSQL and no library. One slot only."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg

from .._server import Server, Site
from ._peer import Opened, Peer, Quota


@contextlib.contextmanager
def _open(server: Server, site: Site) -> Iterator[Sequence[Opened]]:
    note = "one slot, no lease; a connection for each who holds or waits"
    yield [
        Opened(
            "pg_advisory_lock", {"subject": "advisory", "flavour": "threads", "dsn": site.dsn}, target=False, note=note
        )
    ]


PEER = Peer(
    name="advisory-lock",
    what="a hand-written pg_advisory_lock",
    packages={},
    install="",
    room=Quota(1),
    holds=True,
    rates=False,
    open=_open,
)


class subject:
    """A lock, called from threads, each with a connection of its own."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._dsn: str = task["dsn"]
        self._key = zlib.crc32(task["name"].encode())
        self._once = task.get("timeout") == 0
        self._mine = threading.local()

    def _connection(self) -> psycopg.Connection[Any]:
        if not hasattr(self._mine, "connection"):
            self._mine.connection = psycopg.connect(self._dsn, autocommit=True)
        connection: psycopg.Connection[Any] = self._mine.connection
        return connection

    def take(self) -> bool:
        connection = self._connection()
        if self._once:
            row = connection.execute("select pg_try_advisory_lock(%s)", [self._key]).fetchone()
            if row is None or not row[0]:
                return False
        else:
            connection.execute("select pg_advisory_lock(%s)", [self._key])
        connection.execute("select pg_advisory_unlock(%s)", [self._key])
        return True

    def acquire(self) -> Any:
        connection = self._connection()
        connection.execute("select pg_advisory_lock(%s)", [self._key])
        return connection

    def release(self, held: Any) -> None:
        held.execute("select pg_advisory_unlock(%s)", [self._key])
