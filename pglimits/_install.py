"""Installs, upgrades and removes the SQL of pglimits. The order of its files is the one in sql/install.sql."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

import psycopg

from . import __version__
from ._database import connect, numbers, translate
from .errors import PermissionDenied, VersionMismatch

_INCLUDE = re.compile(r"^\\ir (\S+)$", re.MULTILINE)
_MIGRATION = re.compile(r"^migrations/(\d+)_")


@dataclass(frozen=True, slots=True)
class Report:
    """What an installation did. ``version_before`` is None for a fresh one; ``remarks`` are the server's."""

    version_before: str | None
    version_after: str
    remarks: tuple[str, ...] = ()


def _folder() -> Traversable:
    return resources.files("pglimits_sql")


def _read(path: str) -> str:
    return _folder().joinpath(*path.split("/")).read_text(encoding="utf-8")


def _files() -> Iterator[tuple[str, int | None]]:
    for path in _INCLUDE.findall(_read("install.sql")):
        migration = _MIGRATION.match(path)
        yield path, int(migration[1]) if migration else None


def script() -> str:
    """The whole installation as one script for psql, which needs no other file."""
    return _INCLUDE.sub(lambda include: _read(include[1]).rstrip("\n"), _read("install.sql"))


def install(conninfo: str) -> Report:
    """Install pglimits in a database, or bring what is there up to this version, in one transaction.

    Safe to repeat, and safe when many processes do it at once.

    Raises:
        VersionMismatch: the database has a newer schema than this version knows.
        LimiterUnavailable, PermissionDenied: as they say.
    """
    remarks: list[str] = []
    with connect(conninfo) as connection:
        connection.add_notice_handler(
            lambda notice: remarks.append(". ".join(filter(None, (notice.message_primary, notice.message_hint))))
        )
        try:
            with connection.transaction():
                before, after = _install(connection)
        except psycopg.errors.InsufficientPrivilege as error:
            raise PermissionDenied(error.diag.message_primary) from error
        except psycopg.Error as error:
            raise translate(error) from error
    return Report(before, after, tuple(remark for remark in remarks if remark.startswith("pglimits:")))


def _install(connection: psycopg.Connection[tuple[object, ...]]) -> tuple[str | None, str]:
    def run(sql: str) -> None:
        connection.execute(sql.encode())

    files = list(_files())
    newest = max(number for _, number in files if number is not None)
    schema: int | None = None
    for path, migration in files:
        if migration is None:
            run(_read(path))
            continue
        if schema is None:
            schema = _schema_version(connection)
            if schema > newest:
                raise VersionMismatch(
                    f"the database has a newer schema of pglimits than this version knows, {__version__}: "
                    "pip install --upgrade pglimits"
                )
        if migration > schema:
            run(_read(path))
            connection.execute(
                "insert into pglimits.meta (schema_version) values (%s) "
                "on conflict (only_row) do update set schema_version = excluded.schema_version",
                [migration],
            )
    row = connection.execute(
        "select nullif(current_setting('pglimits.version_before'), ''), pglimits.version()"
    ).fetchone()
    assert row is not None
    before, after = row
    return None if before is None else str(before), str(after)


def _schema_version(connection: psycopg.Connection[tuple[object, ...]]) -> int:
    exists = connection.execute("select to_regclass('pglimits.meta') is not null").fetchone()
    if exists is None or not exists[0]:
        return 0
    row = connection.execute("select schema_version from pglimits.meta").fetchone()
    return int(str(row[0])) if row else 0


def version(connection: psycopg.Connection[tuple[object, ...]]) -> str | None:
    """The version of pglimits in the database, or None."""
    exists = connection.execute("select to_regprocedure('pglimits.version()') is not null").fetchone()
    if exists is None or not exists[0]:
        return None
    row = connection.execute("select pglimits.version()").fetchone()
    return None if row is None else str(row[0])


def install_if_needed(conninfo: str) -> None:
    """Bring a database up to this version, if it is not there already. For the embedded server.

    A newer one is left alone: others of the user's programs brought it there, and whether it serves this version too is
    found out by its first statement.
    """
    with connect(conninfo) as connection:
        there = version(connection)
    if there is None or numbers(there) < numbers(__version__):
        install(conninfo)


def uninstall(conninfo: str) -> list[str]:
    """Remove pglimits from a database, with every limit and lease. Returns what the server remarked."""
    remarks: list[str] = []
    with connect(conninfo) as connection:
        connection.add_notice_handler(lambda notice: remarks.append(notice.message_primary or ""))
        body = re.search(r"^do \$\$.*?^end \$\$;", _read("uninstall.sql"), re.MULTILINE | re.DOTALL)
        assert body is not None
        try:
            connection.execute(body[0].encode())
        except psycopg.Error as error:
            raise translate(error) from error
    return [remark for remark in remarks if remark.startswith("the role")]
