"""Connections, and what their errors mean."""

from __future__ import annotations

import contextlib
import math
import re
import selectors
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import psycopg
from psycopg import waiting
from psycopg.conninfo import conninfo_to_dict, timeout_from_conninfo
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGconn, PGresult
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
C = TypeVar("C", bound=psycopg.BaseConnection[Any])
T = TypeVar("T")

ANSWERS_WITHIN = 10.0
"""Seconds after which a server that does not say the last word on a statement is taken for gone.

It waits for a lock for a fraction of that."""

LOCK_WAIT = 0.3
"""Seconds that what serves many waits for a lock: longer than contention takes; then somebody keeps it in a long
transaction."""

_LOOKS_EVERY = 0.1
"""Seconds after which a wait for an answer looks how late it is."""

BATCHES_AT_ONCE = 2
"""How many batches of one process may be on their way at the same time, beside one that has met a lock; each needs a
connection."""


class NoAnswer(psycopg.OperationalError):
    """The server has said nothing for so long that the connection is taken for dead. It has been closed."""


class Late(Exception):
    """Whoever sent a statement has no more time. The server may still be at work on it."""


class Busy(LimiterUnavailable):
    """Nothing was done and it may be tried again at once: a deadlock, a lock timeout, a serialization failure."""


class Cancelled(LimiterUnavailable):
    """Nothing was done: a statement timeout, or somebody who cancelled it.

    Or a lock timeout: one that fires in the moment in which the server goes on to wait for its next lock is taken for a
    user's request. Among many who wait for a lock that somebody keeps, that is not rare.
    """


_ALWAYS: dict[str, Any] = {"autocommit": True, "client_encoding": "utf8"}
"""How every connection of ours is opened, whatever the encoding of the database is."""

_NOTHING_DONE = (Busy, Cancelled, ReadOnlyServer, VersionMismatch)

_BUSY = {"40001", "40P01", "55P03"}
_CANCELLED = "57014"
_CHANGED = {"42883", "42P01", "42703", "42704", "42804"}
"""What a statement meets, at its start or in its middle, that counts on functions or tables of another version."""
_CHANGED_UNDERNEATH = ("cache lookup failed", "could not open relation")
"""The same as an internal error (XX000), whose messages are in no language but this."""
_CHANGED_RESULT = "0A000"
"""The same of a prepared statement: the type of its result has changed."""
_GAVE_UP = {"08", "53", "57", "58", "XX"}
_ENDS_THE_SESSION = {"FATAL", "PANIC"}


def connect(conninfo: str, **options: Any) -> psycopg.Connection[Row]:
    """Open a connection in autocommit. Raises what ``translate`` says."""
    try:
        return psycopg.Connection.connect(conninfo, **{**_ALWAYS, **options})
    except psycopg.Error as error:
        raise translate(error) from error


def numbers(version: str) -> list[int]:
    """A version, to be compared."""
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in found[0].split(".")] if found else []


def mismatch(there: str, what: str = "") -> VersionMismatch:
    """What to say where the database has another version, and what to do about it."""
    newer = numbers(there) > numbers(__version__)
    return VersionMismatch(
        f"the database has pglimits {there}, this is {__version__}{what}: "
        + ("pip install --upgrade pglimits" if newer else "run pglimits upgrade")
    )


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
    changed = state in _CHANGED or (state == "XX000" and message.startswith(_CHANGED_UNDERNEATH))
    if (changed and "pglimits" in f"{message} {error.diag.context}") or state == _CHANGED_RESULT:
        return VersionMismatch(
            f"the pglimits in this database is not this version, {__version__} ({message}): run pglimits upgrade"
        )
    if state == "42501":
        return PermissionDenied(
            f"{message}: members of pglimits_user may acquire, of pglimits_reader look, of pglimits_admin do all; "
            "pglimits doctor says which role lacks what"
        )
    ended = error.diag.severity_nonlocalized in _ENDS_THE_SESSION
    if isinstance(error, psycopg.OperationalError) or state[:2] in _GAVE_UP or ended:
        kind = Cancelled if state == _CANCELLED else LimiterUnavailable
        return kind(f"the database cannot be reached or gave up: {message}")
    return PglimitsError(message)


def is_busy(error: BaseException) -> bool:
    """Whether it says that nothing was done, and that it may be tried again."""
    return isinstance(translate(error), Busy)


class Sender(Protocol):
    """Who waits for a statement.

    ``connection`` is where, as long as the server may be at work on it. ``goes_again`` is called where it is sent once
    more, and nobody knows what became of it before.
    """

    connection: psycopg.BaseConnection[Any] | None

    def goes_again(self) -> None: ...


class _Nobody:
    connection: psycopg.BaseConnection[Any] | None = None

    def goes_again(self) -> None:
        """Whatever it is, its sender does not care."""


class Database:
    """Where statements go: a pool of the caller's, or connections of its own, opened when they are needed.

    Its own are kept in a plain list: an interrupt can strike a thread at any moment, and a connection that got lost by
    it is then missing from no count. After a fork the child opens its own; the parent's sockets are left alone.
    """

    def __init__(
        self,
        conninfo: str,
        options: dict[str, Any],
        pool: ConnectionPool[Any] | AsyncConnectionPool[Any] | None = None,
    ) -> None:
        self.conninfo = conninfo
        self.options = options
        self.pooled = False
        self.checked = False
        self._there: str | None = None
        self._pool = pool if isinstance(pool, ConnectionPool) else None
        self._pool_in_loops = pool if isinstance(pool, AsyncConnectionPool) else None
        self._idle: list[psycopg.Connection[Row]] = []
        self._idle_in_loops: list[psycopg.AsyncConnection[Row]] = []
        self._closed = False
        self._left_to_parent: list[object] = []

    def forked(self) -> None:
        """Called in the child of a fork: forget the parent's sockets without closing them."""
        self._left_to_parent += [self._pool, self._pool_in_loops, *self._idle, *self._idle_in_loops]
        self._pool = None
        self._pool_in_loops = None
        self._idle = []
        self._idle_in_loops = []

    def execute(
        self,
        sql: str,
        params: Sequence[object],
        sender: Sender | None = None,
        within: float | None = None,
        until: float | None = None,
    ) -> list[Row]:
        """Run one statement in a transaction of its own, again if the connection had gone stale.

        Args:
            sender: is left with the connection if an exception of another's making strikes in the middle, a signal's
                for instance: the server may then still be at work on it. ``let_end`` it.
            within: seconds after which a connection on which no answer has come is taken for stale; None: never.
            until: when (monotonic) the sender has no more time.

        Raises:
            PglimitsError: as ``translate`` says.
            Late: it is ``until``.
        """
        if sender is not None:
            return self._try(sql, params, sender, within, until)
        sender = _Nobody()
        try:
            return self._try(sql, params, sender, within, until)
        finally:
            if sender.connection is not None:
                self._drop(sender.connection)

    def _try(
        self, sql: str, params: Sequence[object], sender: Sender, within: float | None, until: float | None
    ) -> list[Row]:
        for last in (False, False, True):
            try:
                if self._pool is not None:
                    return self._execute_in_pool(self._pool, sql, params, sender, within, until)
                return self._execute(sql, params, sender, within, until)
            except psycopg.Error as error:
                problem = self.noticed(error)
                if last or not worth_another_try(problem, error):
                    raise problem from error
                if not isinstance(problem, _NOTHING_DONE):
                    sender.goes_again()
        raise AssertionError("unreachable")

    def _execute(
        self, sql: str, params: Sequence[object], sender: Sender, within: float | None, until: float | None
    ) -> list[Row]:
        if self._closed:
            raise LimiterUnavailable("the limiter has been closed")
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self.connect(until)
        sender.connection = connection
        try:
            rows = self._run(connection, sql, params, within, until)
        except (psycopg.Error, PglimitsError) as error:
            sender.connection = None
            self._keep(connection, self._idle, error)
            raise
        sender.connection = None
        self._keep(connection, self._idle)
        return rows

    def _keep(self, connection: C, idle: list[C], error: Exception | None = None) -> None:
        """Keep a connection of ours for the next statement, if it is still good after this one."""
        if isinstance(error, psycopg.Error) and not error.sqlstate and isinstance(translate(error), LimiterUnavailable):
            # If one connection has gone stale, so have the others.
            self._drop_idle()
        if _is_stale(error) or connection.info.transaction_status == TransactionStatus.INERROR:
            self._drop(connection)
        elif not connection.closed:
            idle.append(connection)
        if len(idle) > BATCHES_AT_ONCE:
            self._drop(idle.pop(0))

    def _run(
        self,
        connection: psycopg.Connection[Any],
        sql: str,
        params: Sequence[object],
        within: float | None,
        until: float | None,
    ) -> list[Row]:
        with answering(connection, within, until):
            self.check(connection)
            # Another connection may have been opened before this one found out that there is a pooler.
            if sql in _sql.MEET_ALL_KEYS:
                connection.execute(_begin(connection), prepare=False)
            rows = run(connection, sql, params, prepare=False if self.pooled else None)
            if not connection.autocommit or sql in _sql.MEET_ALL_KEYS:
                connection.commit()
        return rows

    def _execute_in_pool(
        self,
        pool: ConnectionPool[Any],
        sql: str,
        params: Sequence[object],
        sender: Sender,
        within: float | None,
        until: float | None,
    ) -> list[Row]:
        try:
            left = None if until is None else min(max(until - time.monotonic(), 0.001), pool.timeout)
            connection = pool.getconn(left)
        except PoolTimeout as error:
            if until is not None and time.monotonic() >= until:
                raise Late from error
            raise LimiterUnavailable(f"no connection of the pool came free: {error}") from error
        sender.connection = connection
        try:
            rows = self._run(connection, sql, params, within, until)
        except (psycopg.Error, PglimitsError) as error:
            with contextlib.suppress(psycopg.Error):
                connection.rollback()
            sender.connection = None
            if _is_stale(error):
                connection.close()
            pool.putconn(connection)
            if isinstance(error, psycopg.OperationalError):
                pool.check()
            raise
        sender.connection = None
        pool.putconn(connection)
        return rows

    async def execute_in_loop(
        self,
        sql: str,
        params: Sequence[object],
        sender: Sender | None = None,
        within: float | None = None,
    ) -> list[Row]:
        """As ``execute``, in an event loop: on a connection of a pool of the caller's, or on one of our own."""
        sender = sender or _Nobody()
        pool = self._pool_in_loops
        try:
            for last in (False, False, True):
                try:
                    if pool is not None:
                        return await self._execute_in_async_pool(pool, sql, params, within)
                    return await self._execute_in_loop(sql, params, sender, within)
                except psycopg.Error as error:
                    problem = self.noticed(error)
                    if last or not worth_another_try(problem, error):
                        raise problem from error
                    if not isinstance(problem, _NOTHING_DONE):
                        sender.goes_again()
                        if pool is not None:
                            await pool.check()
        finally:
            if sender.connection is not None and isinstance(sender, _Nobody):
                self._drop(sender.connection)
        raise AssertionError("unreachable")

    async def _execute_in_loop(
        self, sql: str, params: Sequence[object], sender: Sender, within: float | None
    ) -> list[Row]:
        if self._closed:
            raise LimiterUnavailable("the limiter has been closed")
        try:
            connection = self._idle_in_loops.pop()
        except IndexError:
            connection = await self._connect_in_loop()
        sender.connection = connection
        try:
            rows = await self._run_in_loop(connection, sql, params, within)
        except (psycopg.Error, PglimitsError) as error:
            sender.connection = None
            self._keep(connection, self._idle_in_loops, error)
            raise
        sender.connection = None
        self._keep(connection, self._idle_in_loops)
        return rows

    async def _execute_in_async_pool(
        self, pool: AsyncConnectionPool[Any], sql: str, params: Sequence[object], within: float | None
    ) -> list[Row]:
        try:
            async with pool.connection() as connection:
                try:
                    return await self._run_in_loop(connection, sql, params, within)
                except psycopg.Error as error:
                    if _is_stale(error):
                        await connection.close()
                    raise
        except PoolTimeout as error:
            raise LimiterUnavailable(f"no connection of the pool came free: {error}") from error

    async def _run_in_loop(
        self, connection: psycopg.AsyncConnection[Any], sql: str, params: Sequence[object], within: float | None
    ) -> list[Row]:
        with answering(connection, within):
            return await self._ask_in_loop(connection, sql, params)

    async def _ask_in_loop(
        self, connection: psycopg.AsyncConnection[Any], sql: str, params: Sequence[object]
    ) -> list[Row]:
        async with connection.cursor(row_factory=tuple_row, binary=True) as cursor:
            if not self.checked:
                await cursor.execute(_sql.VERSION.encode(), prepare=False)
                self.check_on((await cursor.fetchall())[0], connection.info.backend_pid)
            if sql in _sql.MEET_ALL_KEYS:
                await connection.execute(_begin(connection), prepare=False)
            await cursor.execute(sql.encode(), params, prepare=False if self.pooled else None)
            rows: list[Row] = await cursor.fetchall()
            if sql in _sql.MEET_ALL_KEYS:
                await connection.commit()
            return rows

    async def _connect_in_loop(self) -> psycopg.AsyncConnection[Row]:
        try:
            return await psycopg.AsyncConnection.connect(self.conninfo, **{**_ALWAYS, **self._connection_options()})
        except psycopg.Error as error:
            raise translate(error) from error

    def let_end(self, connection: psycopg.BaseConnection[Any]) -> None:
        """Wait for the end of a statement that its sender has left, and close its connection.

        To close it at once would not do: the server notices that only when it answers, and what has been given back
        meanwhile it would grant afterwards.
        """
        try:
            while connection.pgconn.transaction_status == TransactionStatus.ACTIVE:
                answer(connection.pgconn, ANSWERS_WITHIN)
        except NoAnswer:
            self._drop_idle()
        except (psycopg.Error, OSError, ValueError):
            pass
        self._drop(connection)

    def _drop(self, connection: psycopg.BaseConnection[Any]) -> None:
        if isinstance(connection, psycopg.Connection):
            connection.close()
            if self._pool is not None:
                self._pool.putconn(connection)
        else:
            connection.pgconn.finish()  # its loop may have ended

    def _drop_idle(self) -> None:
        for idle in (self._idle, self._idle_in_loops):
            with contextlib.suppress(IndexError):
                while True:
                    self._drop(idle.pop())

    def connect(self, until: float | None = None) -> psycopg.Connection[Row]:
        """Open a connection. ``until``: when (monotonic) it has to be there; it is given 2 seconds at least."""
        options = self._connection_options()
        if until is not None:
            given = timeout_from_conninfo(conninfo_to_dict(self.conninfo) | options)
            options["connect_timeout"] = min(max(math.ceil(until - time.monotonic()), 2), given)
        return connect(self.conninfo, **options)

    def _connection_options(self) -> dict[str, Any]:
        options = dict(self.options)
        if self.pooled:
            options["prepare_threshold"] = None
        return options

    def noticed(self, error: BaseException) -> PglimitsError:
        """What an error of a statement means. If another version may be there now, the next statement looks first."""
        problem = translate(error)
        if isinstance(problem, VersionMismatch):
            self.checked = False
            if self._there is not None and isinstance(error, psycopg.Error):
                return mismatch(self._there, f" ({error.diag.message_primary})")
        return problem

    def check(self, connection: psycopg.Connection[Any]) -> None:
        """Find out, on a first connection, whether the versions match, and whether there is a pooler."""
        if not self.checked:
            self.check_on(run(connection, _sql.VERSION, (), prepare=False)[0], connection.info.backend_pid)

    def check_on(self, row: Row, backend_pid: int) -> None:
        """Note what a first connection has found out: whether the versions match, and whether there is a pooler.

        Versions that differ in their last number only serve each other, in both directions: where that is not so, the
        number before it is raised.
        """
        version, real_pid = row
        ours, theirs = numbers(__version__)[:2], numbers(str(version))[:2]
        if ours != theirs:
            raise mismatch(str(version))
        self._there = str(version)
        # A pooler hands out a process id of its own.
        self.pooled = real_pid != backend_pid
        self.checked = True

    def close(self) -> None:
        """Close our own connections."""
        self._closed = True
        self._drop_idle()


def _is_stale(error: Exception | None) -> bool:
    """Whether a connection is of no more use: what it has prepared was made for what was there before, or it leads to a
    server that is read-only, and another may lead to the primary."""
    return isinstance(error, psycopg.Error) and isinstance(translate(error), (ReadOnlyServer, VersionMismatch))


def worth_another_try(problem: PglimitsError, error: psycopg.Error) -> bool:
    """Whether a statement that failed so may go through if it is sent again at once."""
    if isinstance(problem, VersionMismatch):
        return True  # an upgrade may have come in the middle
    return isinstance(problem, LimiterUnavailable) and error.sqlstate not in ("55P03", "53300")


@contextlib.contextmanager
def answering(
    connection: psycopg.BaseConnection[Any], within: float | None, until: float | None = None
) -> Iterator[None]:
    """No statement of this block waits for its answer for more than ``within`` seconds, nor beyond ``until``.

    Whoever waits forever for a connection whose packets get lost does so without an error. And an interrupt that
    strikes a thread leaves the connection as it is: psycopg would cancel the statement and, interrupted again, close
    the connection, so that nobody could tell any longer when the server is done with it. Where a task is cancelled
    psycopg does cancel the statement, and waits for its end: a connection of a pool goes back there at once.
    """
    if within is None and until is None:
        yield
        return
    dead_at = math.inf if within is None else time.monotonic() + within
    last = math.inf if until is None else until

    def wait_in_time(generator: Generator[Any, Any, T], interval: float = _LOOKS_EVERY, **options: Any) -> Any:
        bounded = _in_time(connection, generator, dead_at, last)
        if isinstance(connection, psycopg.AsyncConnection):
            return psycopg.AsyncConnection.wait(connection, bounded, interval=interval, **options)
        return waiting.wait(bounded, connection.pgconn.socket, interval=interval, **options)

    connection.wait = wait_in_time  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del connection.wait  # type: ignore[attr-defined]


def _in_time(
    connection: psycopg.BaseConnection[Any], generator: Generator[Any, Any, T], dead_at: float, until: float
) -> Generator[Any, Any, T]:
    """What psycopg waits for, as long as there is time."""
    try:
        wanted = next(generator)
        while True:
            ready = yield wanted
            if not ready and (now := time.monotonic()) >= min(dead_at, until):
                if now < dead_at:
                    raise Late
                connection.pgconn.finish()
                raise NoAnswer("the server did not answer")
            wanted = generator.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result


def answer(pgconn: PGconn, within: float) -> list[PGresult]:
    """The results of what was sent. Raises NoAnswer if they do not come."""
    results: list[PGresult] = []
    until = time.monotonic() + within
    with selectors.DefaultSelector() as selector:
        selector.register(pgconn.socket, selectors.EVENT_READ)
        while True:
            if not pgconn.is_busy():
                result = pgconn.get_result()
                if result is None:
                    return results
                results.append(result)
            elif selector.select(max(until - time.monotonic(), 0)):
                pgconn.consume_input()
            else:
                raise NoAnswer("the server did not answer")


def _begin(connection: psycopg.BaseConnection[Any]) -> bytes:
    return (_sql.BEGIN if connection.autocommit else _sql.GO_ON).encode()


def run(connection: psycopg.Connection[Any], sql: str, params: Sequence[object], prepare: bool | None) -> list[Row]:
    """Execute one statement and fetch its rows, whatever row factory the connection has."""
    with connection.cursor(row_factory=tuple_row, binary=True) as cursor:
        cursor.execute(sql.encode(), params, prepare=prepare)
        return cursor.fetchall()


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
