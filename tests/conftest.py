"""A real server for every test that wants one, and a fresh database with pglimits in it for each test.

The server is a throwaway one of the binaries in PGLIMITS_TEST_PG_BIN (a folder with initdb and postgres), by default
of those that pglimits itself would embed. With PGLIMITS_TEST_POOLER=transaction, all that pglimits does in the tests
goes through a PgBouncer in that mode; what they look on with, and disturb it with, has sessions on the server itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import poolers
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pytest_postgresql import factories

ROOT = Path(__file__).resolve().parent.parent
Connection: TypeAlias = psycopg.Connection[Any]
Connect: TypeAlias = Callable[..., Connection]
T = TypeVar("T")

# Whoever starts the tests in the background of a script, or under nohup, may have these ignored, and children would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def _temporary_files_in_memory() -> None:
    """Put them there, if there is room: the files of thousands of databases cost more than what is done in these."""
    memory = Path("/dev/shm")
    if "TMPDIR" in os.environ or not os.access(memory, os.W_OK | os.X_OK):
        return
    found = os.statvfs(memory)
    if found.f_bavail * found.f_frsize >= 4 << 30 and not found.f_flag & os.ST_NOEXEC:
        os.environ["TMPDIR"] = str(memory)
        tempfile.tempdir = None


_temporary_files_in_memory()


def _import_from_checkout() -> None:
    """Make the packages that are only named so once installed importable from a checkout as well."""
    for package, folder in (("pglimits_sql", ROOT / "sql"), ("pglimits_cli", ROOT / "cli")):
        source = folder / "__init__.py"
        if package in sys.modules or importlib.util.find_spec(package) is not None or not source.exists():
            continue
        spec = importlib.util.spec_from_file_location(package, source, submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)


if importlib.util.find_spec("pglimits") is None:
    sys.path.insert(0, str(ROOT))
_import_from_checkout()

from pglimits import _embedded, _install  # noqa: E402


@dataclass(frozen=True, slots=True)
class TestServer:
    """The server of a test session, as pytest-postgresql wants it described."""

    __test__ = False

    host: str
    port: int
    user: str
    bin: Path
    version: int
    password: str | None = None
    options: str = ""
    maintenance_dbname: str = "postgres"
    template_dbname: str | None = None

    def dsn(self, dbname: str) -> str:
        return make_conninfo(host=self.host, port=self.port, user=self.user, dbname=dbname)


def binaries() -> _embedded.Binaries:
    """The PostgreSQL that the tests are to run on."""
    folder = os.environ.get("PGLIMITS_TEST_PG_BIN")
    if not folder:
        return _embedded.find_binaries()
    said = subprocess.run([f"{folder}/postgres", "--version"], capture_output=True, text=True, check=True).stdout
    major = re.search(r"(\d+)", said)
    assert major is not None, said
    return _embedded.Binaries(Path(folder), int(major[1]))


@pytest.fixture(scope="session")
def server() -> Iterator[TestServer]:
    """A throwaway server, one for the test session."""
    chosen = binaries()
    settings = {"max_connections": "150", "deadlock_timeout": "500ms", "max_wal_size": "256MB"}
    with _embedded.throwaway(binaries=chosen, settings=settings) as running:
        yield TestServer(running.host, running.port, running.user, chosen.bin, running.version)


def _load(**to: Any) -> None:
    to.pop("autocommit", None)
    _install.install(make_conninfo(**{name: value for name, value in to.items() if value is not None}))


pglimits_noproc = factories.postgresql_noproc(depends_on="server", load=[_load])
_fresh_database = factories.postgresql("pglimits_noproc")
bare_noproc = factories.postgresql_noproc(depends_on="server", dbname="bare")
_bare_database = factories.postgresql("bare_noproc")


@pytest.fixture(scope="session")
def by_way(server: TestServer) -> Iterator[Callable[[str], str]]:
    """by_way(dsn): how pglimits is to reach that database of the server, straight or through the pooler."""
    if poolers.MODE is None:
        yield lambda dsn: dsn
        return
    with poolers.pgbouncer(server.dsn("postgres"), poolers.MODE, size=20) as folder:
        yield lambda dsn: poolers.through(dsn, folder)


@pytest.fixture
def server_dsn(_fresh_database: Connection, server: TestServer) -> str:
    """Of a database of this test's own, with pglimits installed; on the server itself, for whoever needs a session."""
    dbname = _fresh_database.info.dbname
    _fresh_database.close()
    return server.dsn(dbname)


@pytest.fixture
def dsn(server_dsn: str, by_way: Callable[[str], str]) -> str:
    """Of the same database, for pglimits."""
    return by_way(server_dsn)


@pytest.fixture
def bare_dsn(_bare_database: Connection, server: TestServer, by_way: Callable[[str], str]) -> str:
    """Of a database of this test's own with nothing in it."""
    dbname = _bare_database.info.dbname
    _bare_database.close()
    return by_way(server.dsn(dbname))


@pytest.fixture
def pooled(server_dsn: str) -> Iterator[Callable[..., str]]:
    """pooled("transaction", size=2): a DSN of the test's database through a PgBouncer of its own, of that mode."""
    with contextlib.ExitStack() as running:

        def begin(mode: str, size: int = 5) -> str:
            folder = running.enter_context(poolers.pgbouncer(server_dsn, mode, size))
            return poolers.through(server_dsn, folder)

        yield begin


@pytest.fixture
def connect(server_dsn: str) -> Iterator[Connect]:
    """Opens connections to the test's database, in autocommit mode unless told otherwise, on the server itself."""
    with contextlib.ExitStack() as open_connections:

        def open_one(**options: Any) -> Connection:
            connection: Connection = psycopg.connect(server_dsn, **{"autocommit": True, **options})
            open_connections.callback(connection.close)
            return connection

        yield open_one


@pytest.fixture
def conn(connect: Connect) -> Connection:
    """A connection to the test's database, in autocommit mode."""
    return connect()


class Clock:
    """The clock of a test database, in place of pglimits._now(): goes on running, ahead of time; or stands still."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.execute(
            """
            create schema test_clock;
            create table test_clock.hands (ahead interval not null, frozen timestamptz);
            insert into test_clock.hands values ('0', null);
            grant usage on schema test_clock to public;
            grant select on test_clock.hands to public;
            create or replace function pglimits._now() returns timestamptz
            language plpgsql volatile set search_path = ''
            as $$ begin
              return (select coalesce(h.frozen, clock_timestamp() + h.ahead) from test_clock.hands h);
            end $$
            """
        )

    def advance(self, seconds: float) -> None:
        """Let that much time pass at once."""
        self._connection.execute(
            "update test_clock.hands set ahead = ahead + make_interval(secs => %(s)s),"
            " frozen = frozen + make_interval(secs => %(s)s)",
            {"s": seconds},
        )

    def freeze(self, at: datetime | None = None) -> datetime:
        """Stop the clock, at that time or as it stands. Returns where."""
        row = self._connection.execute(
            "update test_clock.hands set frozen = coalesce(%s, clock_timestamp() + ahead) returning frozen", [at]
        ).fetchone()
        assert row is not None
        frozen: datetime = row[0]
        return frozen.astimezone(UTC)

    def now(self) -> datetime:
        row = self._connection.execute("select pglimits._now()").fetchone()
        assert row is not None
        now: datetime = row[0]
        return now.astimezone(UTC)


@pytest.fixture
def clock(connect: Connect) -> Clock:
    """Replaces the clock of the test's database: clock.advance(seconds), clock.freeze()."""
    return Clock(connect())


def wait_for(condition: Callable[[], T], timeout: float = 40.0, what: str = "") -> T:
    """Wait until a condition holds and return what it returned. Fails after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} seconds in vain {what or condition}")
        time.sleep(0.005)
    return found


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    """wait_until(callable, timeout=40): waits until it returns something true, and returns that."""
    return wait_for


@pytest.fixture
def wait_blocked(connect: Connect) -> Callable[[int], None]:
    """wait_blocked(pid): waits until that backend waits for a lock of another."""
    connection = connect()

    def blocked(pid: int) -> bool:
        row = connection.execute(
            "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s", [pid]
        ).fetchone()
        return row is not None and bool(row[0])

    def wait(pid: int) -> None:
        wait_for(lambda: blocked(pid), what=f"for backend {pid} to wait for a lock")

    return wait
