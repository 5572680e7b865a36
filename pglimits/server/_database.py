"""The server's own way to the database: one small pool, and whether the database answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import psycopg
from psycopg import IsolationLevel
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from .._calls import as_holder
from .._database import is_lost, numbers, translate
from ..errors import LimiterUnavailable

Rows: TypeAlias = list[dict[str, Any]]
Params: TypeAlias = Sequence[Any] | Mapping[str, Any]

SIZE = 5
_CONNECTS_WITHIN = 3.0
_ANSWERS_WITHIN = 15.0
_LOOKS_AGAIN = 1.0
"""Seconds for which a database that did not answer is taken for gone without asking it."""

_Connection: TypeAlias = psycopg.AsyncConnection[dict[str, Any]]


class Database:
    """A small pool of connections to one database.

    Attributes:
        conninfo: of the database.
        down_since: since when it has not been reached; None if it was, last time.
        why: what was said then.
    """

    def __init__(self, conninfo: str, size: int = SIZE) -> None:
        given = conninfo_to_dict(conninfo)
        if given.get("application_name") == "pglimits":
            given["application_name"] = "pglimits serve"
        self.conninfo = make_conninfo("", **given)
        self.down_since: datetime | None = None
        self.why = ""
        self._failed_at = 0.0
        self._busy = 0
        self._size = size
        self._answered_at = 0.0
        self._pool: AsyncConnectionPool[_Connection] = AsyncConnectionPool(
            self.conninfo,
            kwargs={
                "autocommit": True,
                "prepare_threshold": None,
                "client_encoding": "utf8",
                "row_factory": dict_row,
            },
            min_size=1,
            max_size=size,
            timeout=_CONNECTS_WITHIN,
            reconnect_timeout=1.0,
            configure=_configure,
            open=False,
            name="pglimits",
        )

    async def open(self) -> None:
        """Begin to connect. A database that is not there is no error: it may come."""
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close(2.0)

    async def rows(
        self,
        query: str,
        params: Params = (),
        *,
        by: str | None = None,
        writes: bool = False,
        within: float = _ANSWERS_WITHIN,
    ) -> Rows:
        """The rows of one statement, in a transaction of its own.

        by: on whose behalf it is. Events say so.
        writes: it is not to be sent twice, where the connection breaks and nobody knows what became of it; and it is
            run in read committed. Implied by ``by``.
        within: seconds that it may take.

        Raises:
            LimiterUnavailable: the database is gone.
            PglimitsError: as its SQLSTATE says.
        """
        now = time.monotonic()
        if self.down_since is not None and now - self._failed_at < _LOOKS_AGAIN:
            raise LimiterUnavailable(self.why)
        tries = 1 if by is not None or writes else 2
        while True:
            tries -= 1
            try:
                async with asyncio.timeout(within):
                    found = await self._run(query, params, by, writes)
            except PoolTimeout:
                if self._busy >= self._size or self._answered_at > now:
                    raise LimiterUnavailable("the server has more to do than its database connections can") from None
                raise self._gone("the database cannot be reached") from None
            except TimeoutError:
                if not await self._answers():
                    raise self._gone("the database does not answer") from None
                raise LimiterUnavailable("the database has not answered in time") from None
            except psycopg.Error as error:
                meant = translate(error)
                if not is_lost(error, meant):
                    raise meant from error
                if tries:
                    await self._drop_dead()
                    continue
                raise self._gone(str(meant)) from error
            self.down_since = None
            return found

    async def row(
        self, query: str, params: Params = (), *, by: str | None = None, writes: bool = False
    ) -> dict[str, Any] | None:
        """The first row, or None."""
        found = await self.rows(query, params, by=by, writes=writes)
        return found[0] if found else None

    async def run(self, query: str, params: Params = (), *, by: str | None = None) -> None:
        """Run a statement that changes something."""
        await self.rows(query, params, by=by, writes=True)

    async def _run(self, query: str, params: Params, by: str | None, writes: bool) -> Rows:
        async with self._pool.connection() as connection:
            self._busy += 1
            try:
                if by is None and not writes:
                    cursor = await connection.execute(query.encode(), params)
                    return await cursor.fetchall() if cursor.description else []
                async with connection.transaction():
                    if by is not None:
                        await connection.execute(b"select set_config('pglimits.by', %s, true)", [by])
                    cursor = await connection.execute(query.encode(), params)
                    return await cursor.fetchall() if cursor.description else []
            finally:
                self._busy -= 1
                if connection.info.transaction_status == TransactionStatus.IDLE:
                    self._answered_at = time.monotonic()

    async def _drop_dead(self) -> None:
        """One connection is dead: so may be the others."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CONNECTS_WITHIN):
                await self._pool.check()

    async def _answers(self) -> bool:
        """Whether the database answers anything at all."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(_CONNECTS_WITHIN):
                await self._run("select 1", (), None, False)
        except (TimeoutError, PoolTimeout, psycopg.Error):
            return self._answered_at > began
        return True

    def _gone(self, why: str) -> LimiterUnavailable:
        self._failed_at = time.monotonic()
        self.why = why
        if self.down_since is None:
            self.down_since = datetime.now(UTC)
        return LimiterUnavailable(why)

    async def check(self) -> None:
        """Whether the database answers, and has a pglimits in it that this version can use.

        Raises:
            LimiterUnavailable, NotInstalled, VersionMismatch, PermissionDenied
        """
        from .. import __version__
        from .._database import mismatch

        found = await self.row("select pglimits.version() as version")
        there = "" if found is None else str(found["version"])
        if numbers(__version__)[:2] != numbers(there)[:2]:
            raise mismatch(there)


async def _configure(connection: psycopg.AsyncConnection[Any]) -> None:
    await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
    set_json_loads(_loads, connection)


def _loads(text: str | bytes) -> Any:
    """JSON as the limiter reads it: what is too much for Python stays text."""
    return as_holder(text if isinstance(text, str) else text.decode())
