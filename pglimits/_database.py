"""Connections: where they come from, how a statement goes over one, and what its errors mean.

Statements go over libpq itself, below psycopg's cursors: what an app sets for psycopg (adapters, cursor and row
factories, instrumentation) does not reach them.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import inspect
import re
import select
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import ConnStatus, ExecStatus, PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from . import __version__, _sql
from ._codec import Row, rows
from ._sql import Statement
from .errors import (
    BY_SQLSTATE,
    InvalidArgument,
    LimiterUnavailable,
    NotInstalled,
    PermissionDenied,
    PglimitsError,
    ReadOnlyServer,
    VersionMismatch,
)


class NoAnswer(psycopg.OperationalError):
    """The server has said nothing for so long that the connection is taken for dead. It has been closed."""


class Busy(LimiterUnavailable):
    """Nothing was done and it may be tried again at once: a deadlock, a lock timeout, a serialization failure."""


class Cancelled(LimiterUnavailable):
    """Nothing was done: a statement timeout, or somebody who cancelled it.

    Or a lock timeout: one that fires in the moment in which the server goes on to wait for its next lock is taken for a
    user's request. Among many who wait for a lock that somebody keeps, that is not rare.
    """


_ALWAYS: dict[str, Any] = {"autocommit": True, "client_encoding": "utf8"}
"""How every connection to a conninfo of ours is opened, whatever the encoding of the database is."""
TRIES = 3
"""How often a statement is sent, where it may go through if it is sent again at once."""
_OPENS_WITHIN = 10.0
"""Seconds that the first statement on a new connection may take."""

_BUSY = {"40001", "40P01", "55P03"}
_CANCELLED = "57014"
_ENCODING = {"22021", "22P05"}
"""A character that the encoding of the database lacks."""
_OF_ENCODINGS = "pg_unicode_to_server"
"""Where the server says the same of a database in SQL_ASCII, as a feature that is missing (0A000)."""
_CHANGED = {"26000", "42883", "42P01", "42703", "42704", "42804"}
"""What a statement meets, at its start or in its middle, that counts on functions or tables of another version, or on
what somebody has told the session to forget."""
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
        # Of the app's own code, which opens connections: a token that could not be fetched, for instance.
        return LimiterUnavailable(f"{type(error).__name__}: {error}")
    state = error.sqlstate or ""
    message = error.diag.message_primary or str(error).strip() or type(error).__name__
    if state in BY_SQLSTATE:
        return BY_SQLSTATE[state](message)
    if state in _BUSY:
        return Busy(message)
    if state in _ENCODING or error.diag.source_function == _OF_ENCODINGS:
        return InvalidArgument(f"the encoding of the database lacks a character: {message}")
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


def may_go_again(error: psycopg.Error, problem: PglimitsError) -> bool:
    """Whether a statement that failed so may go through if it is sent again at once, on another connection."""
    if isinstance(problem, VersionMismatch):
        return True  # an upgrade may have come in the middle
    return isinstance(problem, LimiterUnavailable) and error.sqlstate not in ("55P03", "53300")


def is_lost(error: psycopg.Error, problem: PglimitsError) -> bool:
    """Whether nobody knows what became of a statement that failed so."""
    return isinstance(problem, LimiterUnavailable) and not isinstance(problem, (Busy, Cancelled, ReadOnlyServer))


class Job(Protocol):
    """What goes over a connection: statements one after the other, the last of which gives the answer."""

    answers_within: float

    def statements(self, connection: Connection) -> list[tuple[Statement, Sequence[bytes | None]]]:
        """The statements, the last one first. The answer is that of the last one that has rows."""

    def done(self, courier: Any, result: PGresult) -> None: ...
    def failed(self, courier: Any, error: BaseException, problem: PglimitsError) -> None: ...


class Connection:
    """A connection of the courier, and the job that is under way on it."""

    def __init__(self, opened: psycopg.BaseConnection[Any], give_back: Callable[[], None] | None) -> None:
        # Kept, as it closes the connection when it is forgotten.
        self._opened = opened
        self.lent = give_back is not None
        self.pgconn = opened.pgconn
        self._close = give_back or self.pgconn.finish
        self.fd = self.pgconn.socket
        self.version = ""
        # A pooler may give each transaction another session: nothing is prepared, and nothing heard.
        self.pooled = self.lent
        self.listens = False
        # How Python calls the encoding of the database; None if it takes any character.
        self.codec: str | None = None
        self.job: Job | None = None
        self.sent: Statement | None = None
        self.answers_by = 0.0
        self.used_at = 0.0
        self.events = select.POLLIN
        self._prepared: set[bytes] = set()
        self._left: list[tuple[Statement, Sequence[bytes | None]]] = []
        self._preparing = False
        self._result: PGresult | None = None
        self._answer: PGresult | None = None

    # For the thread that opens it, and may wait.

    def execute(self, statement: Statement, params: Sequence[bytes | None] = ()) -> list[Row]:
        """Execute one statement and wait for its rows."""
        pgconn = self.pgconn
        until = time.monotonic() + _OPENS_WITHIN
        pgconn.send_query_params(statement.sql, params, result_format=1)
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while pgconn.flush() or pgconn.is_busy():
            if not poll.poll(max(until - time.monotonic(), 0) * 1000):
                raise NoAnswer("the server did not answer")
            pgconn.consume_input()
        result = pgconn.get_result()
        while (more := pgconn.get_result()) is not None:
            result = _graver(result, more)
        assert result is not None
        _raise(result)
        return rows(result)

    def hears_within(self, channel: str, seconds: float) -> bool:
        """Whether a notification on a channel comes within so many seconds. By a pooler come those of others, too."""
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            while (found := self.pgconn.notifies()) is not None:
                if found.relname == channel.encode():
                    return True
            left = until - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return False
            self.pgconn.consume_input()

    def begin(self) -> None:
        """Find out whether the versions match, and whether there is a pooler.

        Versions that differ in their last number only serve each other, in both directions: where that is not so, the
        number before it is raised.
        """
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            raise LimiterUnavailable("the connection has a transaction open")
        if self.pgconn.pipeline_status != PipelineStatus.OFF:
            raise LimiterUnavailable("the connection is in pipeline mode")
        self.pgconn.nonblocking = 1
        ((version, real_pid),) = self.execute(_sql.VERSION)
        if numbers(__version__)[:2] != numbers(str(version))[:2]:
            raise mismatch(str(version))
        self.version = str(version)
        self.codec = self._codec()
        # A pooler hands out a process id of its own.
        self.pooled = self.lent or real_pid != self.pgconn.backend_pid
        if self.pgconn.parameter_status(b"client_encoding") != b"UTF8":
            self.execute(Statement(b"set client_encoding to 'UTF8'"))

    def _codec(self) -> str | None:
        encoding = (self.pgconn.parameter_status(b"server_encoding") or b"UTF8").decode()
        if encoding in ("UTF8", "SQL_ASCII"):
            return None
        try:
            return codecs.lookup(encoding.replace("WIN", "cp").replace("KOI8", "koi8_")).name
        except LookupError:
            return "ascii"

    # For the courier, which waits for all of them at once.

    def start(self, job: Job, now: float) -> None:
        """Send a job. Raises psycopg.Error."""
        self.job = job
        self.used_at = now
        self.answers_by = now + job.answers_within
        self._left = job.statements(self)
        self._send()

    def _send(self) -> None:
        statement, params = self._left[-1]
        self.sent = statement
        name = statement.name
        self._preparing = False
        if not name or self.pooled:
            self.pgconn.send_query_params(statement.sql, params, result_format=1)
        elif name in self._prepared:
            self.pgconn.send_query_prepared(name, params, None, 1)
        else:
            self._preparing = True
            self.pgconn.send_prepare(name, statement.sql)
        self.flush()

    def flush(self) -> None:
        """Go on sending what the network has not taken yet."""
        self.events = select.POLLIN | select.POLLOUT if self.pgconn.flush() else select.POLLIN

    def receive(self) -> PGresult | None:
        """Take in what has come. The result, if the job is done. Raises psycopg.Error."""
        pgconn = self.pgconn
        pgconn.consume_input()
        while self.job is not None and not pgconn.is_busy():
            result = pgconn.get_result()
            if result is not None:
                self._result = _graver(self._result, result)
                continue
            result, self._result = self._result, None
            if result is None:
                raise psycopg.OperationalError("the connection was closed")
            if result.status not in _FINE:
                self._left = []
                _raise(result)
            if self._preparing:
                self._prepared.add(self._left[-1][0].name)
            else:
                self._left.pop()
                if result.status == ExecStatus.TUPLES_OK:
                    self._answer = result
            if not self._left:
                answer, self._answer = self._answer, None
                return answer if answer is not None else result
            self._send()
        if pgconn.status != ConnStatus.OK:
            raise psycopg.OperationalError("the connection was closed")
        return None

    def is_usable(self) -> bool:
        """Whether another job can go over it."""
        return self.pgconn.status == ConnStatus.OK and self.pgconn.transaction_status == TransactionStatus.IDLE

    def close(self) -> None:
        """Close it, or give it back to where it came from."""
        with contextlib.suppress(Exception):
            self._close()


_FINE = (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK)


def _graver(result: PGresult | None, more: PGresult) -> PGresult:
    """The result of a statement that has two, as an error at the commit comes behind the rows: the first error."""
    return more if result is None or (result.status in _FINE and more.status not in _FINE) else result


def _raise(result: PGresult) -> None:
    if result.status not in _FINE:
        error = psycopg.errors.error_from_result(result)
        # Without a SQLSTATE it is libpq that says so: the connection is gone.
        raise error if error.sqlstate else psycopg.OperationalError(str(error))


Opened: TypeAlias = tuple[psycopg.BaseConnection[Any], Callable[[], None] | None]
"""A connection, and how to give it back if it is lent."""


class Source:
    """Where the courier's connections come from: a conninfo of ours.

    What opens one runs in a thread of its own, as it may take long, and as it may be the app's code.
    """

    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        # Limiters whose sources have the same share a courier.
        self.key: Hashable = conninfo

    def open(self) -> Connection:
        """Open a connection. Raises psycopg.Error, PglimitsError, and what the app's code raises."""
        connection = Connection(*self._connect())
        try:
            connection.begin()
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self) -> Opened:
        opened = psycopg.Connection.connect(self.conninfo, **_ALWAYS)
        return opened, None


class Callback(Source):
    """A function of the app's, sync or async, that opens a connection."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        if not callable(connect):
            raise InvalidArgument(f"connect must be a function that returns a psycopg connection, not {connect!r}")
        self._opens = connect
        # A method of an object is made anew each time that it is named, and equal.
        self.key = connect if isinstance(connect, Hashable) else id(connect)

    def _connect(self) -> Opened:
        opened = _in_a_loop_if_need_be(self._opens)
        if not isinstance(opened, psycopg.BaseConnection):
            raise InvalidArgument(f"connect must return a psycopg connection, not {opened!r}")
        return opened, None


class OfPool(Source):
    """A pool of the app's, sync or async: each connection is opened and configured as the pool does it.

    They do not count as the pool's: an app that has lent out all of those loses no lease. Only where the server allows
    no further connection does a pool of threads lend one.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.key = pool
        if any(not hasattr(pool, name) for name in _RECIPE):
            raise InvalidArgument(f"pool must be a psycopg_pool.ConnectionPool or AsyncConnectionPool, not {pool!r}")
        if not callable(pool.conninfo):
            conninfo_to_dict(pool.conninfo or "")

    def _connect(self) -> Opened:
        try:
            opened: psycopg.BaseConnection[Any] = _in_a_loop_if_need_be(self._as_the_pool_does)
        except psycopg.OperationalError:
            lent = self._borrow()
            if lent is None:
                raise
            return lent
        return opened, None

    def _as_the_pool_does(self) -> Any:
        pool = self._pool
        if not inspect.iscoroutinefunction(pool.connection_class.connect):
            opened = pool.connection_class.connect(_value(pool.conninfo) or "", **(_value(pool.kwargs) or {}))
            if pool._configure:
                pool._configure(opened)
            return opened
        return self._as_the_async_pool_does()

    async def _as_the_async_pool_does(self) -> Any:
        pool = self._pool
        conninfo, options = await _awaited(_value(pool.conninfo)), await _awaited(_value(pool.kwargs))
        opened = await pool.connection_class.connect(conninfo or "", **(options or {}))
        if pool._configure:
            await pool._configure(opened)
        return opened

    def _borrow(self) -> Opened | None:
        pool = self._pool
        if inspect.iscoroutinefunction(pool.getconn):
            return None
        try:
            lent = pool.getconn(_LENDS_WITHIN)
        except psycopg.OperationalError:
            return None
        return lent, lambda: pool.putconn(lent)


_RECIPE = ("conninfo", "kwargs", "connection_class", "_configure", "getconn")
"""What makes a pool's connections what they are."""
_LENDS_WITHIN = 1.0


def _value(source: Any) -> Any:
    return source() if callable(source) else source


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _in_a_loop_if_need_be(make: Callable[[], Any]) -> Any:
    made = make()
    if not inspect.isawaitable(made):
        return made
    return asyncio.run(_awaited(made))
