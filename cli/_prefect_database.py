"""Prefect's limits, read in its database: PostgreSQL, or its default file of SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from . import _client, _errors
from ._prefect import Found, GlobalLimit, found

_LIMITS = """
    select name, "limit", coalesce(slot_decay_per_second, 0), active, active_slots
    from concurrency_limit_v2 order by name
"""
_LIMITS_OF_TAGS = "select tag from concurrency_limit"

Query = Callable[[str], list[tuple[Any, ...]]]
Exists = Callable[[str], bool]


def read(database: str) -> Found:
    """The limits in a database: a URL as Prefect's own setting has it, or the path of a file of SQLite."""
    scheme, separator, rest = database.strip().partition("://")
    kind = scheme.split("+")[0].lower()
    if not separator:
        return _sqlite(database.strip())
    if kind == "sqlite":
        return _sqlite(rest.partition("?")[0].removeprefix("/"))
    if kind in ("postgresql", "postgres"):
        return _postgresql(database.strip())
    raise _errors.fail("--database must be a URL of PostgreSQL or SQLite, or the path of a file of SQLite")


def _sqlite(path: str) -> Found:
    file = Path(path).expanduser()
    if not file.is_file():
        raise _errors.fail(
            f"there is no file {path!r}: Prefect's is ~/.prefect/prefect.db, unless PREFECT_HOME says other"
        )
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)) as connection:

            def exists(table: str) -> bool:
                there = connection.execute("select 1 from sqlite_master where type = 'table' and name = ?", [table])
                return there.fetchone() is not None

            return _found(str(file), lambda query: connection.execute(query).fetchall(), exists)
    except sqlite3.Error as error:
        raise _errors.fail(f"{path} cannot be read as a database of Prefect: {error}") from None


def _postgresql(url: str) -> Found:
    import psycopg

    from pglimits.errors import InvalidArgument, PglimitsError

    try:
        conninfo = _client.target(_for_libpq(url)).conninfo
    except InvalidArgument:
        raise _errors.fail("--database is not a URL as postgresql+asyncpg://user@host/prefect is") from None
    place = _client.place(conninfo)
    try:
        with _client.connect(conninfo) as connection:
            connection.read_only = True

            def query(text: str) -> list[tuple[Any, ...]]:
                return connection.execute(text.encode()).fetchall()

            def exists(table: str) -> bool:
                return connection.execute("select to_regclass(%s) is not null", [table]).fetchall() == [(True,)]

            with connection.transaction():
                return _found(place, query, exists)
    except psycopg.Error as error:
        said = error.diag.message_primary or str(error) or type(error).__name__
        raise _errors.fail(f"Prefect's {place}: {said}") from None
    except PglimitsError as error:
        raise _errors.fail(f"Prefect's {place}: {error}") from None


def _for_libpq(url: str) -> str:
    """A URL of SQLAlchemy without the options that only its driver knows."""
    from pglimits._dsn import keywords

    address, _, query = url.partition("?")
    options = [("sslmode" if name == "ssl" else name, value) for name, value in parse_qsl(query)]
    known = [option for option in options if option[0] in keywords()]
    return f"{address}?{urlencode(known, quote_via=quote)}" if known else address


def _found(source: str, query: Query, exists: Exists) -> Found:
    of_tags = exists("concurrency_limit")
    if not exists("concurrency_limit_v2"):
        if of_tags:
            raise _errors.fail(f"{source} is of a Prefect that is too old for global concurrency limits")
        raise _errors.fail(f"{source} is not Prefect's: it has no table concurrency_limit_v2")
    limits = [
        GlobalLimit(name, limit, decay, bool(active), held) for name, limit, decay, active, held in query(_LIMITS)
    ]
    return found(source, limits, [tag for (tag,) in query(_LIMITS_OF_TAGS)] if of_tags else [])
