"""The clients that people call SQL functions with, each in every style that it has of passing parameters.

A style is a function that opens it: with that, ``ask("acquire", "database", 1)`` calls a function, and ``query`` sends
any SQL, whose parameters are written ``$1``.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeAlias

import asyncpg
import django
import django.conf
import django.db.utils
import pg8000.dbapi
import pg8000.native
import psycopg
import psycopg2
import psycopg2.extras
import sqlalchemy
import sqlalchemy.dialects.postgresql
import sqlalchemy.ext.asyncio
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb

Rows: TypeAlias = list[dict[str, Any]]
Query: TypeAlias = Callable[[str, Sequence[Any]], Rows]
TIMEZONE = "America/Caracas"
SETTINGS = f"-c timezone={TIMEZONE}"
TYPED = ("str", "text id")
"""A text that is sent as one, and not as a value of any type, is neither a number nor an id."""

django.conf.settings.configure(USE_TZ=True, LOGGING_CONFIG=None)
django.setup(set_prefix=False)


@dataclass(frozen=True, slots=True)
class Driver:
    """An open client, in autocommit mode."""

    query: Query
    json: Callable[[Any], Any] = json.dumps
    refuses: frozenset[str] = frozenset()
    """What it does not send, or sends as a type that has nothing in common with what is expected: an error, always."""
    call: Callable[[str, Sequence[Any]], Rows] | None = None

    def ask(self, function: str, *arguments: Any) -> Rows:
        if self.call is not None:
            return self.call(f"pglimits.{function}", arguments)
        marks = ", ".join(f"${nth}" for nth in range(1, len(arguments) + 1))
        return self.query(f"select * from pglimits.{function}({marks})", arguments)

    def one(self, function: str, *arguments: Any) -> dict[str, Any]:
        (row,) = self.ask(function, *arguments)
        return row


def sqlstate(error: BaseException) -> str | None:
    """Of a database's error, by whichever driver."""
    for each in (error, getattr(error, "orig", None), error.__cause__):
        if each is not None:
            first = each.args[0] if each.args else None
            found = first.get("C") if isinstance(first, Mapping) else None
            found = found or getattr(each, "sqlstate", None) or getattr(each, "pgcode", None)
            if found:
                return str(found)
    return None


def numbered(sql: str, mark: str) -> str:
    """With other placeholders, for example ``%(a1)s`` by ``%(a{})s``."""
    return re.sub(r"\$(\d+)", lambda found: mark.format(found[1]), sql)


def by_number(arguments: Sequence[Any]) -> dict[str, Any]:
    return {f"a{nth}": argument for nth, argument in enumerate(arguments, 1)}


def of_dbapi(new_cursor: Callable[[], Any], mark: str = "%s", **options: Any) -> Query:
    def query(sql: str, arguments: Sequence[Any]) -> Rows:
        given = by_number(arguments) if "a{}" in mark else list(arguments)
        with closing(new_cursor()) as cursor:
            cursor.execute(numbered(sql, mark), given, **options)
            return fetch(cursor)

    return query


def by_callproc(new_cursor: Callable[[], Any]) -> Query:
    def call(function: str, arguments: Sequence[Any]) -> Rows:
        with closing(new_cursor()) as cursor:
            cursor.callproc(function, list(arguments))
            return fetch(cursor)

    return call


def fetch(cursor: Any) -> Rows:
    if cursor.description is None:
        return []
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def psycopg_2(mark: str = "%s", callproc: bool = False) -> Any:
    @contextmanager
    def opened(to: dict[str, Any]) -> Iterator[Driver]:
        with closing(psycopg2.connect(**to, options=SETTINGS)) as connection:
            connection.autocommit = True
            psycopg2.extras.register_uuid(conn_or_curs=connection)
            yield Driver(
                of_dbapi(connection.cursor, mark), psycopg2.extras.Json,
                call=by_callproc(connection.cursor) if callproc else None,
            )  # fmt: skip

    return opened


def psycopg_3(
    mark: str = "%s", cursors: type[psycopg.Cursor[Any]] = psycopg.Cursor, *refuses: str, **options: Any
) -> Any:
    @contextmanager
    def opened(to: dict[str, Any]) -> Iterator[Driver]:
        with psycopg.connect(**to, options=SETTINGS, autocommit=True, cursor_factory=cursors) as connection:
            yield Driver(of_dbapi(connection.cursor, mark, **options), Jsonb, frozenset(refuses))

    return opened


def of_asyncpg(to: dict[str, Any]) -> dict[str, Any]:
    address = {"host": to["host"], "port": to["port"], "user": to["user"], "database": to["dbname"]}
    return {**address, "server_settings": {"timezone": TIMEZONE}}


@contextmanager
def asyncpg_(to: dict[str, Any]) -> Iterator[Driver]:
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(**of_asyncpg(to)))

        def query(sql: str, arguments: Sequence[Any]) -> Rows:
            return [dict(row) for row in runner.run(connection.fetch(sql, *arguments))]

        yield Driver(query, refuses=frozenset({"str"}))
        runner.run(connection.close())


def of_pg8000(to: dict[str, Any]) -> dict[str, Any]:
    socket = f"{to['host']}/.s.PGSQL.{to['port']}"
    return {
        "unix_sock": socket, "user": to["user"], "database": to["dbname"], "startup_params": {"timezone": TIMEZONE},
    }  # fmt: skip


@contextmanager
def pg8000_(to: dict[str, Any]) -> Iterator[Driver]:
    with closing(pg8000.dbapi.connect(**of_pg8000(to))) as connection:
        connection.autocommit = True
        yield Driver(of_dbapi(connection.cursor))


@contextmanager
def pg8000_native(to: dict[str, Any]) -> Iterator[Driver]:
    with closing(pg8000.native.Connection(**of_pg8000(to))) as connection:

        def query(sql: str, arguments: Sequence[Any]) -> Rows:
            rows = connection.run(numbered(sql, ":a{}"), **by_number(arguments))
            names = [column["name"] for column in connection.columns or ()]
            return [dict(zip(names, row, strict=True)) for row in rows or ()]

        yield Driver(query)


def sqlalchemy_(dialect: str, func: bool = False) -> Any:
    def statement(sql: str, arguments: Sequence[Any]) -> Any:
        bound = [
            sqlalchemy.bindparam(name, value.value, type_=value.type)
            if isinstance(value, sqlalchemy.BindParameter)
            else sqlalchemy.bindparam(name, value)
            for name, value in by_number(arguments).items()
        ]
        return sqlalchemy.text(numbered(sql, ":a{}")).bindparams(*bound)

    def document(value: Any) -> Any:
        return sqlalchemy.literal(value, sqlalchemy.dialects.postgresql.JSONB)

    def of_func(function: str, arguments: Sequence[Any]) -> Any:
        schema, name = function.split(".")
        called = getattr(getattr(sqlalchemy.func, schema), name)(*arguments)
        return sqlalchemy.select(sqlalchemy.literal_column("*")).select_from(called)

    def run(connection: sqlalchemy.Connection, made: Any) -> Rows:
        result = connection.execute(made)
        return [dict(row) for row in result.mappings()] if result.returns_rows else []

    @contextmanager
    def opened(to: dict[str, Any]) -> Iterator[Driver]:
        address = {
            "psycopg": {**to, "options": SETTINGS}, "psycopg2": {**to, "options": SETTINGS}, "pg8000": of_pg8000(to),
            "asyncpg": of_asyncpg(to),
        }[dialect]  # fmt: skip
        url, options = f"postgresql+{dialect}://", {"connect_args": address, "isolation_level": "AUTOCOMMIT"}
        with asyncio.Runner() as runner:
            if dialect == "asyncpg":
                engine = sqlalchemy.ext.asyncio.create_async_engine(url, **options).sync_engine
            else:
                engine = sqlalchemy.create_engine(url, **options)

            def do(work: Callable[..., Any], *arguments: Any) -> Any:
                if dialect == "asyncpg":
                    return runner.run(sqlalchemy.util.greenlet_spawn(work, *arguments))
                return work(*arguments)

            connection = do(engine.connect)
            yield Driver(
                lambda sql, arguments: do(run, connection, statement(sql, arguments)), document,
                frozenset(() if dialect == "psycopg2" else TYPED),
                (lambda function, arguments: do(run, connection, of_func(function, arguments))) if func else None,
            )  # fmt: skip
            do(connection.close)
            do(engine.dispose)

    return opened


def django_(**options: Any) -> Any:
    @contextmanager
    def opened(to: dict[str, Any]) -> Iterator[Driver]:
        settings = {
            "ENGINE": "django.db.backends.postgresql", "NAME": to["dbname"], "USER": to["user"], "HOST": to["host"],
            "PORT": to["port"], "TIME_ZONE": TIMEZONE, "OPTIONS": options,
        }  # fmt: skip
        connection = django.db.utils.ConnectionHandler({"default": settings})["default"]
        with closing(connection):
            yield Driver(of_dbapi(connection.cursor), Jsonb)

    return opened


_NODE = """
const { Client } = require('pg');
(async () => {
  const client = new Client(JSON.parse(process.argv[1]));
  await client.connect();
  for await (const line of require('readline').createInterface({ input: process.stdin })) {
    const { sql, values } = JSON.parse(line);
    try {
      console.log(JSON.stringify({ rows: (await client.query(sql, values)).rows }));
    } catch (error) {
      console.log(JSON.stringify({ code: error.code, message: error.message }));
    }
  }
  await client.end();
})();
"""


class NodeError(Exception):
    """What Node's client was told."""

    def __init__(self, code: str | None, message: str) -> None:
        super().__init__(message)
        self.sqlstate = code


def node_pg(folder: str) -> Any:
    """Of a folder where its module is installed."""

    def plain(value: Any) -> Any:
        return {"seconds": value.total_seconds()} if isinstance(value, timedelta) else str(value)

    @contextmanager
    def opened(to: dict[str, Any]) -> Iterator[Driver]:
        address = {"host": to["host"], "port": int(to["port"]), "user": to["user"], "database": to["dbname"]}
        command = ["node", "-e", _NODE, json.dumps({**address, "options": SETTINGS})]
        with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            written, read = process.stdin, process.stdout

            def query(sql: str, arguments: Sequence[Any]) -> Rows:
                values = [str(value) if value != value else value for value in arguments]  # JSON has no NaN
                print(json.dumps({"sql": sql, "values": values}, default=plain), file=written, flush=True)
                said = json.loads(read.readline())
                if "rows" not in said:
                    raise NodeError(said.get("code"), said["message"])
                rows: Rows = said["rows"]
                for row in rows:
                    if row.get("expires_at"):
                        row["expires_at"] = datetime.fromisoformat(row["expires_at"])
                return rows

            yield Driver(query, lambda value: value)
            written.close()

    return opened


def address(dsn: str) -> dict[str, Any]:
    parts = conninfo_to_dict(dsn)
    return {name: parts[name] for name in ("host", "port", "user", "dbname")}


STYLES: dict[str, Any] = {
    "psycopg2": psycopg_2(),
    "psycopg2, named": psycopg_2("%(a{})s"),
    "psycopg2, callproc": psycopg_2(callproc=True),
    "psycopg": psycopg_3(),
    "psycopg, named": psycopg_3("%(a{})s"),
    "psycopg, binary": psycopg_3("%b", psycopg.Cursor, *TYPED, binary=True),
    "psycopg, prepared": psycopg_3(prepare=True),
    "psycopg, raw": psycopg_3("${}", psycopg.RawCursor),
    "psycopg, bound by the client": psycopg_3("%s", psycopg.ClientCursor),
    "asyncpg": asyncpg_,
    "pg8000": pg8000_,
    "pg8000, native": pg8000_native,
    "SQLAlchemy, psycopg2": sqlalchemy_("psycopg2"),
    "SQLAlchemy, psycopg": sqlalchemy_("psycopg"),
    "SQLAlchemy, asyncpg": sqlalchemy_("asyncpg"),
    "SQLAlchemy, pg8000": sqlalchemy_("pg8000"),
    "SQLAlchemy, psycopg2, func": sqlalchemy_("psycopg2", func=True),
    "SQLAlchemy, psycopg, func": sqlalchemy_("psycopg", func=True),
    "Django": django_(),
    "Django, bound by the server": django_(server_side_binding=True),
}
