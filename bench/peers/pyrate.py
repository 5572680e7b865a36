"""PyrateLimiter's PostgresBucket, in the same database as ours."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from .._server import Server, Site, certainly
from ._peer import Opened, Peer, Quota

_TABLES = "ratelimit___"
"""How the names of its tables begin."""


@contextlib.contextmanager
def _open(server: Server, site: Site) -> Iterator[Sequence[Opened]]:
    def clean() -> None:
        with site.connect() as connection:
            found = connection.execute(
                "select c.oid::regclass::text from pg_class c where c.relkind = 'r' and starts_with(c.relname, %s)",
                [_TABLES + site.prefix],
            ).fetchall()
            for (table,) in found:
                connection.execute(f"drop table {table}".encode())

    try:
        yield [Opened({"subject": "pyrate", "flavour": "threads", "dsn": site.dsn})]
    finally:
        if not server.own:  # else the whole database goes
            certainly(clean)


PEER = Peer(
    name="pyrate",
    what="PyrateLimiter's PostgresBucket",
    packages={"pyrate_limiter": "pyrate-limiter", "psycopg_pool": "psycopg-pool"},
    install="pip install pyrate-limiter",
    room=Quota(100_000, 1),
    holds=False,
    open=_open,
)


class subject:
    """A bucket, called from threads, each with a limiter of its own as if it were a process: one that is shared refuses
    those who do not wait while another thread is at it, without a look at the database."""

    def __init__(self, task: dict[str, Any]) -> None:
        from psycopg_pool import ConnectionPool

        self._pool = ConnectionPool(task["dsn"], min_size=2, max_size=10, open=True)
        self._task = task
        self._mine = threading.local()

    def _limiter(self) -> Any:
        if not hasattr(self._mine, "limiter"):
            from pyrate_limiter import Limiter, PostgresBucket, Rate

            rate = Rate(self._task["slots"], int(self._task["seconds"] * 1000))
            self._mine.limiter = Limiter(PostgresBucket(self._pool, self._task["name"], [rate]))
        return self._mine.limiter

    def take(self) -> bool:
        return bool(self._limiter().try_acquire("call", blocking=self._task.get("timeout") != 0))

    def turn(self) -> None:
        while not self._limiter().try_acquire("call", blocking=True):
            pass
