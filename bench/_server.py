"""The server that everything is measured on: one of its own, durable and on disk, or the one that a DSN names."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.conninfo import make_conninfo

from pglimits import _embedded, _install
from pglimits._database import connect
from pglimits._embedded_binaries import Binaries, candidates, find_binaries
from pglimits.errors import EmbeddedUnavailable, NotInstalled

from ._scripts import ROWS

_TEMPLATE = "pglimits_bench"
_SHOWN = (
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_level",
    "shared_buffers",
    "max_connections",
    "max_wal_size",
    "checkpoint_timeout",
    "autovacuum",
    "autovacuum_naptime",
    "commit_delay",
    "jit",
)
_FLOOR = (
    "fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, "
    "autovacuum_vacuum_cost_delay = 0"
)
"""The settings of the floor's table: what our own hot table has, so that neither is better off."""
_IN_MEMORY = {"tmpfs", "ramfs"}


@dataclass(frozen=True, slots=True)
class Site:
    """A place to measure in: a database with pglimits and the floor's table, and names that are in nobody's way."""

    dsn: str
    table: str
    prefix: str

    def name(self, short: str) -> str:
        """A limit's name."""
        return self.prefix + short

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """A connection in autocommit."""
        return psycopg.connect(self.dsn, autocommit=True, **options)


@dataclass(frozen=True, slots=True)
class Server:
    """The server under test.

    Attributes:
        dsn: of a database in it.
        own: whether it was started for this run; each row then gets a database of its own, else all share one.
        bin: the folder of its programs, if it is ours.
    """

    dsn: str
    own: bool
    bin: Path | None

    @contextlib.contextmanager
    def site(self) -> Iterator[Site]:
        """A place to measure in, which is removed at the end."""
        with self._own_site() if self.own else self._shared_site() as found:
            yield found

    @contextlib.contextmanager
    def _own_site(self) -> Iterator[Site]:
        name = f"bench_{uuid4().hex[:12]}"
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(f"create database {name} template {_TEMPLATE}".encode())
            try:
                yield Site(make_conninfo(self.dsn, dbname=name), "bench.counters", "")
            finally:
                with contextlib.suppress(psycopg.Error):  # the server has ended, as all does on ctrl-C
                    connection.execute(f"drop database {name} with (force)".encode())

    @contextlib.contextmanager
    def _shared_site(self) -> Iterator[Site]:
        mark = uuid4().hex[:8]
        schema, prefix = f"pglimits_bench_{mark}", f"pglimits-bench-{mark}-"

        def clean() -> None:
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                connection.execute(f"drop schema if exists {schema} cascade".encode())
                connection.execute(
                    "select pglimits.delete_limit(l.name) from pglimits.limits l where starts_with(l.name, %s)",
                    [prefix],
                )

        try:
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                _make_floor(connection, schema)
            yield Site(self.dsn, f"{schema}.counters", prefix)
        finally:
            certainly(clean)

    def has(self, extension: str) -> bool:
        """Whether an extension could be created."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            found = connection.execute("select from pg_available_extensions where name = %s", [extension]).fetchone()
        return found is not None

    def setup(self) -> dict[str, str]:
        """Version and settings, as the server says them."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            rows = connection.execute(
                "select name, current_setting(name) from pg_settings where name = any (%s)", [list(_SHOWN)]
            ).fetchall()
            found = {str(name): str(value) for name, value in rows}
            said = connection.execute("select current_setting('server_version')").fetchone()
        assert said is not None
        shown = {"version": str(said[0]), **{name: found[name] for name in _SHOWN if name in found}}
        if not self.own:
            shown["not ours"] = (
                "settings, load, vacuum and what else is in it are as they were; all rows share a database"
            )
        if "off" in (shown["fsync"], shown["synchronous_commit"]):
            shown["not durable"] = "what is called durable here is not, on this server"
        return shown


def certainly(clean: Callable[[], None]) -> None:
    """Tidy up, and once more from the start if ctrl-C strikes in the middle of it."""
    try:
        clean()
    except BaseException:
        clean()
        raise


@contextlib.contextmanager
def server(dsn: str | None) -> Iterator[Server]:
    """The server of a DSN, which has pglimits installed already; without one, a server that lives for the block.

    Raises:
        NotInstalled: the database of the DSN has no pglimits. LimiterUnavailable: it cannot be reached.
        EmbeddedUnavailable: there is no PostgreSQL to start.
    """
    if dsn is not None:
        with connect(dsn) as connection:
            if _install.version(connection) is None:
                raise NotInstalled("pglimits is not installed in this database: run pglimits install")
        yield Server(dsn, False, None)
        return
    with _started(find_binaries()) as started:
        yield started


@contextlib.contextmanager
def server_where(suits: Callable[[Server], bool], what: str, instead_of: Server) -> Iterator[Server]:
    """A server like the own one, of the first PostgreSQL on this machine that has something, as that one has not.

    Raises:
        EmbeddedUnavailable: none has it.
    """
    for binaries in candidates():
        if binaries.bin == instead_of.bin:
            continue
        with _started(binaries) as started:
            if suits(started):
                yield started
                return
    raise EmbeddedUnavailable(f"no PostgreSQL with {what}")


@contextlib.contextmanager
def _started(binaries: Binaries) -> Iterator[Server]:
    with on_disk(), _embedded.throwaway(binaries=binaries, fsync=True, settings=_settings()) as started:
        with psycopg.connect(started.dsn, autocommit=True) as connection:
            connection.execute(f"create database {_TEMPLATE}".encode())
        template = make_conninfo(started.dsn, dbname=_TEMPLATE)
        _install.install(template)
        with psycopg.connect(template, autocommit=True) as connection:
            _make_floor(connection, "bench")
        yield Server(started.dsn, True, binaries.bin)


def _make_floor(connection: psycopg.Connection[Any], schema: str) -> None:
    connection.execute(f"create schema {schema}".encode())
    connection.execute(
        f"create table {schema}.counters (id integer primary key, n bigint not null) with ({_FLOOR})".encode()
    )
    connection.execute(f"insert into {schema}.counters select g, 0 from generate_series(1, {ROWS}) g".encode())
    connection.execute(f"vacuum analyze {schema}.counters".encode())


def _settings() -> dict[str, str]:
    """As for a machine that does little else: a quarter of its memory, and seldom a checkpoint."""
    quarter = _memory_bytes() // 4 // 1024**2
    return {
        "shared_buffers": f"{max(min(quarter, 1024), 128)}MB",
        "max_connections": "300",
        "max_wal_size": "4GB",
        "checkpoint_timeout": "15min",
        # A database of a row is gone before autovacuum would come round for the first time, as it does where one stays.
        "autovacuum_naptime": "10s",
        "synchronous_commit": "on",
        "fsync": "on",
        "full_page_writes": "on",
    }


@contextlib.contextmanager
def on_disk() -> Iterator[None]:
    """Have temporary folders made on a disk where the usual ones are in memory."""
    usual = tempfile.gettempdir()
    if _filesystem(Path(usual)) in _IN_MEMORY and _filesystem(Path("/var/tmp")) not in {"", *_IN_MEMORY}:
        tempfile.tempdir = "/var/tmp"
    try:
        yield
    finally:
        tempfile.tempdir = usual


def _filesystem(folder: Path) -> str:
    """The kind of file system that a folder is on; empty where that cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    around = {str(folder), *map(str, folder.parents)}
    found = [mount for mount in mounts if mount[1] in around]
    return max(found, key=lambda mount: len(mount[1]))[2] if found else ""


def _disk(folder: Path) -> str:
    """The kind of disk that a folder is on; empty where that cannot be told."""
    with contextlib.suppress(OSError):
        number = folder.stat().st_dev
        device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
        if device.name.startswith(("vd", "xvd")):
            return "virtual"
        for each in (device, device.parent):
            if (each / "queue" / "rotational").exists():
                return "rotating" if (each / "queue" / "rotational").read_text().strip() == "1" else "solid state"
    return ""


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 1024**3


def machine(own: bool) -> dict[str, str]:
    """What it all runs on."""
    shown = {
        "processors": str(os.cpu_count()),
        "memory": f"{_memory_bytes() / 1024**3:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    with contextlib.suppress(OSError, StopIteration):
        text = Path("/proc/cpuinfo").read_text()
        model = next(line for line in text.splitlines() if line.startswith("model name"))
        shown["processor"] = model.partition(":")[2].strip()
    if own:
        with on_disk():
            folder = Path(tempfile.gettempdir())
            shown["file system"] = _filesystem(folder) or "unknown"
            shown["disk"] = _disk(folder) or "unknown"
    with contextlib.suppress(OSError):
        shown["load before"] = f"{os.getloadavg()[0]:.1f}"
    return shown


def versions() -> dict[str, str]:
    """Of what is used on the client's side."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("pglimits", "psycopg", "psycopg-pool")},
    }
