"""What the tests of installing and upgrading share: the whole catalog of an installation, psql, a second database."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

SQL = Path(__file__).resolve().parent.parent.parent / "sql"


def catalog(dsn: str) -> dict[str, list[Any]]:
    """Everything in the schema, its privileges and its comments."""
    queries = {
        "relations": "select c.oid::regclass::text, c.relkind::text, c.reloptions, c.relacl::text,"
        " c.relowner::regrole::text, obj_description(c.oid, 'pg_class') from pg_class c"
        " where c.relnamespace = 'pglimits'::regnamespace",
        "columns": "select a.attrelid::regclass::text, a.attnum, a.attname::text, format_type(a.atttypid, a.atttypmod),"
        " a.attnotnull, a.attidentity::text, pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum),"
        " a.attcollation::regcollation::text"
        " from pg_attribute a join pg_class c on c.oid = a.attrelid left join pg_attrdef d on d.adrelid = a.attrelid"
        " and d.adnum = a.attnum where c.relnamespace = 'pglimits'::regnamespace and a.attnum > 0"
        " and not a.attisdropped",
        "indexes": "select indexrelid::regclass::text, pg_get_indexdef(indexrelid) from pg_index i"
        " join pg_class c on c.oid = i.indrelid where c.relnamespace = 'pglimits'::regnamespace",
        "constraints": "select conname::text, conrelid::regclass::text, pg_get_constraintdef(oid) from pg_constraint"
        " where connamespace = 'pglimits'::regnamespace",
        "views": "select c.oid::regclass::text, pg_get_viewdef(c.oid) from pg_class c"
        " where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'v'",
        "routines": "select p.oid::regprocedure::text, pg_get_functiondef(p.oid), p.proacl::text,"
        " p.proowner::regrole::text, obj_description(p.oid, 'pg_proc') from pg_proc p"
        " where p.pronamespace = 'pglimits'::regnamespace",
        "types": "select t.oid::regtype::text, t.typtype::text, t.typacl::text, obj_description(t.oid, 'pg_type')"
        " from pg_type t where t.typnamespace = 'pglimits'::regnamespace",
        "schema": "select n.nspacl::text, obj_description(n.oid, 'pg_namespace') from pg_namespace n"
        " where n.nspname = 'pglimits'",
    }
    with psycopg.connect(dsn) as connection:
        found = {
            what: sorted(connection.execute(query.encode()).fetchall(), key=repr) for what, query in queries.items()
        }
        found["meta"] = []
        if connection.execute("select to_regclass('pglimits.meta') is not null").fetchone() == (True,):
            found["meta"] = connection.execute("select schema_version from pglimits.meta").fetchall()
    return found


def assert_same(one: dict[str, list[Any]], two: dict[str, list[Any]]) -> None:
    for what in one:
        assert one[what] == two[what], what


@pytest.fixture
def psql(server: Any) -> Any:
    # Some packages of binaries come without it.
    command = server.bin / "psql" if (server.bin / "psql").exists() else shutil.which("psql")
    if command is None:
        pytest.skip("needs psql")

    def run(dsn: str, file: Path | str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, "-X", *options, "-d", dsn, "-f", str(file)],
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
            cwd="/",
        )

    return run


@pytest.fixture
def other_dsn(bare_dsn: str) -> Iterator[str]:
    """A second database with nothing in it."""
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("create database other_bare template template0")
    yield make_conninfo(bare_dsn, dbname="other_bare")
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("drop database other_bare with (force)")
