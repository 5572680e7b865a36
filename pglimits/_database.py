"""Connections, and what their errors mean."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout

from . import __version__, _sql
from .errors import (
    BY_SQLSTATE,
    LimiterUnavailable,
    NotInstalled,
    PermissionDenied,
    PglimitsError,
    ReadOnlyServer,
    VersionMismatch,
)

Row = tuple[Any, ...]

BATCHES_AT_ONCE = 2
"""How many batches of one process may be on their way at the same time; each needs a connection."""


class Busy(LimiterUnavailable):
    """Nothing was done and it may be tried again at once: a deadlock, a lock timeout, a serialization failure."""


_BUSY = {"40001", "40P01", "55P03"}


def connect(conninfo: str, **options: Any) -> psycopg.Connection[Row]:
    """Open a connection in autocommit. Raises what ``translate`` says."""
    options["autocommit"] = True
    try:
        return psycopg.Connection.connect(conninfo, **options)
    except psycopg.Error as error:
        raise translate(error) from error


def translate(error: BaseException) -> PglimitsError:
    """What an error of the database means here, told by its SQLSTATE."""
    if isinstance(error, PglimitsError):
        return error
    if not isinstance(error, psycopg.Error):
        return LimiterUnavailable(str(error) or type(error).__name__)
    state = error.sqlstate or ""
    message = error.diag.message_primary or str(error).strip() or type(error).__name__
    if state in BY_SQLSTATE:
        return BY_SQLSTATE[state](message)
    if state in _BUSY:
        return Busy(message)
    if state == "25006":
        return ReadOnlyServer(
            f"the server is read-only ({message}): connect to the primary, "
            "for example with target_session_attrs=read-write in the DSN"
        )
    if state == "3F000":
        return NotInstalled("pglimits is not installed in this database: run pglimits install")
    if state in ("42883", "42P01", "42703") and "pglimits" in message:
        return VersionMismatch(
            f"the pglimits in this database is not this version, {__version__} ({message}): run pglimits upgrade"
        )
    if state == "42501":
        return PermissionDenied(f"{message}: grant pglimits_user (or pglimits_admin) to the role")
    if isinstance(error, psycopg.OperationalError) or state[:2] in ("08", "53", "57", "58"):
        return LimiterUnavailable(f"the database cannot be reached or gave up: {message}")
    return PglimitsError(message)


class Database:
    """Where statements go: a pool of the caller's, or one of its own, opened when it is first needed.

    After a fork the child opens its own; the parent's sockets are left alone.
    """

    def __init__(self, conninfo: str, options: dict[str, Any], pool: ConnectionPool[Any] | None = None) -> None:
        self.conninfo = conninfo
        self.options = options
        self.pooled = False
        self._given = pool
        self._pool: ConnectionPool[Any] | None = None
        self.checked = False
        self._closed = False
        self._lock = threading.Lock()
        self._left_to_parent: list[object] = []

    def forked(self) -> None:
        """Called in the child of a fork: forget the parent's sockets without closing them."""
        self._left_to_parent += [self._given, self._pool]
        self._given = self._pool = None
        self._lock = threading.Lock()

    def execute(self, sql: str, params: Sequence[object]) -> list[Row]:
        """Run one statement in a transaction of its own, again if the connection had gone stale.

        Raises:
            PglimitsError: as ``translate`` says.
        """
        for last in (False, False, True):
            pool = self._ready()
            try:
                with pool.connection() as connection:
                    return run(connection, sql, params, prepare=False if self.pooled else None)
            except PoolTimeout as error:
                self.connect().close()  # raises what is really wrong
                raise LimiterUnavailable(f"no connection came free: {error}") from error
            except psycopg.Error as error:
                problem = translate(error)
                if last or not isinstance(problem, LimiterUnavailable) or isinstance(problem, ReadOnlyServer):
                    raise problem from error
                if not isinstance(problem, Busy):
                    pool.check()
                elif error.sqlstate == "55P03":
                    raise problem from error
        raise AssertionError("unreachable")

    def connect(self) -> psycopg.Connection[Row]:
        """A connection of its own, for what must not wait for the pool."""
        options = dict(self.options)
        if self.pooled:
            options["prepare_threshold"] = None
        return connect(self.conninfo, **options)

    def check(self) -> None:
        """Find out, once, whether the database is there, is ours, and is behind a pooler."""
        if self.checked:
            return
        with self._lock:
            if self.checked:
                return
            with self.connect() as connection:
                self.check_on(run(connection, _sql.VERSION, (), prepare=False)[0], connection.info.backend_pid)

    def check_on(self, row: Row, backend_pid: int) -> None:
        """Note what a first connection has found out."""
        version, real_pid = row
        ours, theirs = __version__.split(".")[:2], str(version).split(".")[:2]
        if ours != theirs:
            older = [int(part) for part in theirs] < [int(part) for part in ours]
            raise VersionMismatch(
                f"the database has pglimits {version}, this is {__version__}: "
                + ("run pglimits upgrade" if older else "pip install --upgrade pglimits")
            )
        # A pooler hands out a process id of its own.
        self.pooled = real_pid != backend_pid
        self.checked = True

    def _ready(self) -> ConnectionPool[Any]:
        if self._given is not None:
            if not self.checked:
                with self._given.connection() as connection:
                    try:
                        row = run(connection, _sql.VERSION, (), prepare=False)[0]
                    except psycopg.Error as error:
                        raise translate(error) from error
                    self.check_on(row, connection.info.backend_pid)
            return self._given
        self.check()
        with self._lock:
            if self._closed:
                raise LimiterUnavailable("the limiter has been closed")
            if self._pool is None:
                options: dict[str, Any] = {**self.options, "autocommit": True}
                if self.pooled:
                    options["prepare_threshold"] = None
                self._pool = ConnectionPool(
                    self.conninfo,
                    kwargs=options,
                    min_size=0,
                    max_size=BATCHES_AT_ONCE,
                    timeout=10,
                    max_idle=60,
                    reconnect_timeout=10,
                    open=True,
                    name="pglimits",
                )
            return self._pool

    def close(self) -> None:
        """Close the pool, if it is our own."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close(timeout=2)


def run(connection: psycopg.Connection[Any], sql: str, params: Sequence[object], prepare: bool | None) -> list[Row]:
    """Execute one statement and fetch its rows, whatever row factory the connection has."""
    with connection.cursor(row_factory=tuple_row, binary=True) as cursor:
        cursor.execute(sql.encode(), params, prepare=prepare)
        return cursor.fetchall()


async def run_async(
    pool: AsyncConnectionPool[Any], database: Database, sql: str, params: Sequence[object]
) -> list[Row]:
    """As ``Database.execute``, through a caller's pool for asyncio."""
    for last in (False, False, True):
        try:
            async with (
                pool.connection() as connection,
                connection.cursor(row_factory=tuple_row, binary=True) as cursor,
            ):
                if not database.checked:
                    await cursor.execute(_sql.VERSION.encode(), prepare=False)
                    database.check_on((await cursor.fetchall())[0], connection.info.backend_pid)
                await cursor.execute(sql.encode(), params, prepare=False if database.pooled else None)
                rows: list[Row] = await cursor.fetchall()
                return rows
        except PoolTimeout as error:
            raise LimiterUnavailable(f"no connection came free: {error}") from error
        except psycopg.Error as error:
            problem = translate(error)
            if last or not isinstance(problem, LimiterUnavailable) or error.sqlstate in ("25006", "55P03"):
                raise problem from error
            if not isinstance(problem, Busy):
                await pool.check()
    raise AssertionError("unreachable")


def connection_source(pool: Any) -> tuple[str, dict[str, Any]]:
    """The conninfo and connection options of a caller's pool, to open further connections like its own."""

    def value_of(source: Any) -> Any:
        return source() if isinstance(source, Callable) else source  # type: ignore[arg-type]

    conninfo = str(value_of(pool.conninfo))
    options = dict(value_of(pool.kwargs) or {})
    conninfo_to_dict(conninfo)
    return conninfo, {
        name: value for name, value in options.items() if name not in ("autocommit", "row_factory", "cursor_factory")
    }
