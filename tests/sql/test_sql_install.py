"""Installing and removing: by psql and by Python, twice, twenty at once, by a role that may not create roles."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from sqltest import Session

from pglimits._embedded import Binaries, throwaway

SQL = Path(__file__).resolve().parent.parent.parent / "sql"
ROLES = ("pglimits_user", "pglimits_reader", "pglimits_admin")


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


@pytest.fixture
def psql(server: Any) -> Any:
    # Some packages of binaries come without it.
    command = server.bin / "psql" if (server.bin / "psql").exists() else shutil.which("psql")
    if command is None:
        pytest.skip("needs psql")

    def run(dsn: str, file: Path | str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, "-X", "-d", dsn, "-f", str(file)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd="/",
        )

    return run


@pytest.fixture
def install() -> Any:
    module = pytest.importorskip("pglimits._install", exc_type=ImportError)
    return module


@pytest.fixture
def other_dsn(bare_dsn: str) -> Iterator[str]:
    """A second database with nothing in it."""
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("create database other_bare template template0")
    yield make_conninfo(bare_dsn, dbname="other_bare")
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("drop database other_bare with (force)")


def assert_same(one: dict[str, list[Any]], two: dict[str, list[Any]]) -> None:
    for what in one:
        assert one[what] == two[what], what


# psql -f sql/install.sql


def test_psql_installs_without_python_and_without_a_word_of_noise(bare_dsn: str, psql: Any) -> None:
    result = psql(bare_dsn, SQL / "install.sql")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert re.fullmatch(r"pglimits \S+ is installed in \w+\n", result.stdout), result.stdout
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        session = Session(connection)
        session.create("database", 1)
        assert session.acquire("database").status == "granted"


def test_installing_twice_changes_nothing_and_keeps_what_is_there(bare_dsn: str, psql: Any) -> None:
    assert psql(bare_dsn, SQL / "install.sql").returncode == 0
    first = catalog(bare_dsn)
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        session = Session(connection)
        session.create("database", 1)
        lease_id = session.acquire("database").lease_id
        result = psql(bare_dsn, SQL / "install.sql")
        assert (result.returncode, result.stderr) == (0, "")
        assert_same(catalog(bare_dsn), first)
        assert session.acquire("database").status == "refused"
        assert session.renew(lease_id)


def test_psql_and_python_install_the_same(bare_dsn: str, other_dsn: str, psql: Any, install: Any) -> None:
    assert psql(bare_dsn, SQL / "install.sql").returncode == 0
    install.install(other_dsn)
    assert_same(catalog(bare_dsn), catalog(other_dsn))
    # And each over the other.
    install.install(bare_dsn)
    assert psql(other_dsn, SQL / "install.sql").returncode == 0
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_the_script_that_python_prints_installs_the_same(
    bare_dsn: str, other_dsn: str, psql: Any, install: Any, tmp_path: Path
) -> None:
    script = tmp_path / "all.sql"
    script.write_text(install.script())
    result = psql(bare_dsn, script)
    assert result.returncode == 0, result.stderr
    assert psql(other_dsn, SQL / "install.sql").returncode == 0
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_twenty_installations_at_once_give_one(bare_dsn: str, other_dsn: str, psql: Any) -> None:
    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(lambda _: psql(bare_dsn, SQL / "install.sql"), range(20)))
    assert [result.returncode for result in results] == [0] * 20, [result.stderr for result in results]
    assert psql(other_dsn, SQL / "install.sql").returncode == 0
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_a_failed_installation_leaves_nothing(bare_dsn: str, psql: Any, tmp_path: Path) -> None:
    for file in SQL.rglob("*.sql"):
        copy = tmp_path / file.relative_to(SQL)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text() if file.name != "views.sql" else "select 1 / 0;")
    assert psql(bare_dsn, tmp_path / "install.sql").returncode != 0
    with psycopg.connect(bare_dsn) as connection:
        assert connection.execute("select to_regnamespace('pglimits')").fetchone() == (None,)


def test_a_newer_schema_is_not_touched(bare_dsn: str, psql: Any) -> None:
    assert psql(bare_dsn, SQL / "install.sql").returncode == 0
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("update pglimits.meta set schema_version = 999")
        connection.execute("drop view pglimits.waiters")
    before = catalog(bare_dsn)
    result = psql(bare_dsn, SQL / "install.sql")
    assert result.returncode != 0
    assert "newer" in result.stderr
    assert_same(catalog(bare_dsn), before)


def test_the_callers_settings_change_nothing_of_what_is_installed(bare_dsn: str, other_dsn: str, psql: Any) -> None:
    assert psql(other_dsn, SQL / "install.sql").returncode == 0
    options = (
        "-c search_path=evil -c standard_conforming_strings=on -c check_function_bodies=off -c default_tablespace="
        " -c client_min_messages=error -c row_security=off -c datestyle=German"
        " -c default_transaction_isolation=serializable"
    )
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("create schema evil")
        connection.execute("create table evil.meta (only_row int)")
    result = psql(make_conninfo(bare_dsn, options=options), SQL / "install.sql")
    assert result.returncode == 0, result.stderr
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_install_sql_lists_every_file_once_in_order() -> None:
    listed = re.findall(r"^\\ir (\S+)$", (SQL / "install.sql").read_text(), re.MULTILINE)
    apart = {"install.sql", "uninstall.sql"}
    present = {str(file.relative_to(SQL)) for file in SQL.rglob("*.sql")} - apart
    assert len(listed) == len(set(listed))
    assert set(listed) == present
    for folder in ("migrations/", "functions/"):
        numbered = [file for file in listed if file.startswith(folder)]
        assert numbered == sorted(numbered)


def test_the_files_need_nothing_of_psql_but_install_sql(bare_dsn: str) -> None:
    """Any driver can run them, which the Python installer does."""
    for file in SQL.rglob("*.sql"):
        if file.name not in ("install.sql", "uninstall.sql"):
            assert not re.search(r"^\s*\\", file.read_text(), re.MULTILINE), file


# Roles.


def test_a_role_that_may_not_create_roles_can_install_and_is_told(server: Any, bare_dsn: str, psql: Any) -> None:
    """In a cluster of its own: roles belong to the whole cluster."""
    with throwaway(binaries=Binaries(server.bin, server.version)) as cluster:
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            connection.execute("create role owner login")
            connection.execute("create role app login")
            connection.execute("create database mine owner owner")
        as_owner = make_conninfo(cluster.dsn, user="owner", dbname="mine")
        result = psql(as_owner, SQL / "install.sql")
        assert result.returncode == 0, result.stderr
        for role in ROLES:
            assert f"may not create the role {role}" in result.stderr
        assert "grant" in result.stderr
        hint = re.search(r"grant by hand: (grant usage.*?); (grant execute[^.]*?)\.", result.stderr)
        assert hint is not None, result.stderr
        with psycopg.connect(as_owner, autocommit=True) as connection:
            session = Session(connection)
            session.create("database", 1)
            assert session.acquire("database").status == "granted"
            for statement in hint.groups():
                connection.execute(statement.replace("your_role", "app").encode())
        with psycopg.connect(make_conninfo(as_owner, user="app"), autocommit=True) as connection:
            assert Session(connection).acquire("database").status == "refused"
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("select * from pglimits.leases")
        # Somebody who may creates them; installing again grants to them.
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            for role in ROLES:
                connection.execute(f"create role {role}".encode())
            connection.execute("grant pglimits_user to app")
        result = psql(as_owner, SQL / "install.sql")
        assert (result.returncode, result.stderr) == (0, "")
        with psycopg.connect(make_conninfo(cluster.dsn, dbname="mine")) as connection:
            granted = "select has_function_privilege('pglimits_reader', 'pglimits.version()', 'execute')"
            assert connection.execute(granted).fetchone() == (True,)


def test_a_role_without_the_right_to_the_database_cannot_install(bare_dsn: str, psql: Any) -> None:
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("drop role if exists stranger")
        connection.execute("create role stranger login")
    result = psql(make_conninfo(bare_dsn, user="stranger"), SQL / "install.sql")
    assert result.returncode != 0
    assert "permission denied for database" in result.stderr
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("drop role stranger")


# Removing.


def test_uninstalling_leaves_nothing(server: Any, psql: Any) -> None:
    """In a cluster of its own, so that the roles go as well."""
    counts = (
        "select (select count(*) from pg_class), (select count(*) from pg_proc), (select count(*) from pg_type),"
        " (select count(*) from pg_namespace), (select count(*) from pg_roles), (select count(*) from pg_description),"
        " (select count(*) from pg_shdescription), (select count(*) from pg_default_acl)"
    )
    with throwaway(binaries=Binaries(server.bin, server.version)) as cluster:
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            before = connection.execute(counts.encode()).fetchone()
            assert psql(cluster.dsn, SQL / "install.sql").returncode == 0
            assert connection.execute(counts.encode()).fetchone() != before
            session = Session(psycopg.connect(cluster.dsn, autocommit=True))
            session.create("database", 1)
            session.acquire("database")
            session.queue("database")
            session.connection.close()
            result = psql(cluster.dsn, SQL / "uninstall.sql")
            assert result.returncode == 0, result.stderr
            assert connection.execute(counts.encode()).fetchone() == before
        assert psql(cluster.dsn, SQL / "uninstall.sql").returncode == 0, "twice is harmless"
        assert psql(cluster.dsn, SQL / "install.sql").returncode == 0, "and it can be installed again"


def test_uninstalling_keeps_roles_that_another_database_needs(dsn: str, bare_dsn: str, psql: Any) -> None:
    assert psql(bare_dsn, SQL / "install.sql").returncode == 0
    result = psql(bare_dsn, SQL / "uninstall.sql")
    assert result.returncode == 0, result.stderr
    assert "pglimits_user is left in place" in result.stderr
    with psycopg.connect(dsn) as connection:
        privilege = "select has_function_privilege('pglimits_user', 'pglimits.version()', 'execute')"
        assert connection.execute(privilege).fetchone() == (True,)
    with psycopg.connect(bare_dsn) as connection:
        assert connection.execute("select to_regnamespace('pglimits')").fetchone() == (None,)


def test_python_uninstalls_too(bare_dsn: str, install: Any) -> None:
    install.install(bare_dsn)
    remarks = install.uninstall(bare_dsn)
    assert all("is left in place" in remark for remark in remarks)
    with psycopg.connect(bare_dsn) as connection:
        assert connection.execute("select to_regnamespace('pglimits')").fetchone() == (None,)
