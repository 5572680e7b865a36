"""Installing and removing: new and again, twenty at once, with rights that are given by default, or too few of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from installtest import SQL, assert_same, catalog
from psycopg.conninfo import make_conninfo
from sqltest import Session, fails

from pglimits import _install
from pglimits._embedded import Binaries, Server, throwaway

INSTALL, UNINSTALL = SQL / "install.sql", SQL / "uninstall.sql"
ROLES = ("pglimits_user", "pglimits_reader", "pglimits_admin")


@pytest.fixture
def cluster(server: Any) -> Iterator[Server]:
    """One of its own, without the roles of pglimits, which belong to the whole cluster."""
    with throwaway(binaries=Binaries(server.bin, server.version)) as running:
        yield running


def installed(dsn: str) -> bool:
    with psycopg.connect(dsn) as connection:
        return connection.execute("select to_regnamespace('pglimits')").fetchone() != (None,)


# Installing.


@pytest.mark.parametrize("way", ["psql", "a savepoint for each statement", "one script", "python"])
def test_every_way_installs_the_same_new_and_again_and_keeps_what_is_there(
    bare_dsn: str, other_dsn: str, psql: Any, tmp_path: Path, way: str
) -> None:
    _install.install(other_dsn)
    script = tmp_path / "all.sql"
    script.write_text(_install.script())

    def install() -> None:
        if way == "python":
            _install.install(bare_dsn)
            return
        options = ("-v", "ON_ERROR_ROLLBACK=on") if "savepoint" in way else ()
        result = psql(bare_dsn, script if way == "one script" else INSTALL, *options)
        assert (result.returncode, result.stderr) == (0, "")
        assert re.fullmatch(r"pglimits \S+ is installed in \w+\n", result.stdout)

    install()
    assert_same(catalog(bare_dsn), catalog(other_dsn))
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        session = Session(connection)
        session.create("database", 1)
        lease_id = session.acquire("database").lease_id
        waiter = session.queue("database")
        install()
        assert_same(catalog(bare_dsn), catalog(other_dsn))
        assert session.release(lease_id)
        assert session.watch_one(waiter).status == "granted"


def test_twenty_installations_at_once_give_one(bare_dsn: str, other_dsn: str, psql: Any) -> None:
    _install.install(other_dsn)
    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(lambda _: psql(bare_dsn, INSTALL), range(20)))
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 20
    assert_same(catalog(bare_dsn), catalog(other_dsn))


@pytest.mark.parametrize("options", [(), ("-v", "ON_ERROR_ROLLBACK=on")])
def test_a_failed_installation_leaves_nothing(
    bare_dsn: str, psql: Any, tmp_path: Path, options: tuple[str, ...]
) -> None:
    for file in SQL.rglob("*.sql"):
        copy = tmp_path / file.relative_to(SQL)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text() if file.name != "views.sql" else "select 1 / 0;")
    assert psql(bare_dsn, tmp_path / "install.sql", *options).returncode != 0
    assert not installed(bare_dsn)


def test_the_callers_settings_change_nothing_of_what_is_installed(bare_dsn: str, other_dsn: str, psql: Any) -> None:
    _install.install(other_dsn)
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("create schema evil; create table evil.meta (only_row int)")
    options = (
        "search_path=evil check_function_bodies=off default_tablespace= client_min_messages=error row_security=off"
        " datestyle=German default_transaction_isolation=serializable statement_timeout=1min"
    )
    dsn = make_conninfo(bare_dsn, options=" ".join(f"-c {option}" for option in options.split()))
    assert psql(dsn, INSTALL).returncode == 0
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_install_sql_lists_every_file_once_in_order_and_needs_psql_for_nothing_else() -> None:
    listed = re.findall(r"^\\ir (\S+)$", INSTALL.read_text(), re.MULTILINE)
    present = [str(file.relative_to(SQL)) for file in SQL.rglob("*.sql") if file not in (INSTALL, UNINSTALL)]
    assert sorted(listed) == sorted(present)
    for folder in ("migrations/", "functions/"):
        numbered = [file for file in listed if file.startswith(folder)]
        assert numbered == sorted(numbered)
    for file in present:
        assert not re.search(r"^\s*\\", (SQL / file).read_text(), re.MULTILINE), file


# Rights.


GRANTED = """
    select c.relname from pg_class c, aclexplode(c.relacl) a
    where c.relnamespace = 'pglimits'::regnamespace and a.grantee in (0, 'app'::regrole)
    union
    select p.proname from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
    where p.pronamespace = 'pglimits'::regnamespace and a.grantee in (0, 'app'::regrole)
    union
    select t.typname from pg_type t join pg_class c on c.oid = t.typrelid and c.relkind = 'c',
      aclexplode(coalesce(t.typacl, acldefault('T', t.typowner))) a
    where t.typnamespace = 'pglimits'::regnamespace and a.grantee in (0, 'app'::regrole)
    union
    select n.nspname from pg_namespace n, aclexplode(n.nspacl) a
    where n.nspname = 'pglimits' and a.grantee in (0, 'app'::regrole)
"""


def test_what_the_owners_default_privileges_give_is_taken_and_what_was_granted_since_on_what_is_public_stays(
    bare_dsn: str, psql: Any
) -> None:
    """As where an owner migrates, and a role of the app works with whatever that makes."""
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        session = Session(connection)
        session.run("drop role if exists app; create role app")
        try:
            for kind in ("tables", "sequences", "routines", "types", "schemas"):
                session.run(f"alter default privileges grant all on {kind} to app, public")
            assert psql(bare_dsn, INSTALL).returncode == 0
            assert session.all(GRANTED) == []
            for kind in ("tables", "sequences", "routines"):
                session.run(f"grant all on all {kind} in schema pglimits to app")
            assert psql(bare_dsn, INSTALL).returncode == 0
            names = {row[0] for row in session.all(GRANTED)}
            assert {"acquire", "delete_limit", "acquire_wait", "limits", "keys", "holders", "waiters"} <= names
            assert {name for name in names if name[0] == "_"} <= {"_now"}
            assert not names & {"configs", "states", "leases", "queue", "meta", "configs_limit_id_seq"}
        finally:
            session.run("drop owned by app cascade; drop role app")


def test_an_owner_that_may_not_create_roles_is_told_what_to_have_run_first(cluster: Server, psql: Any) -> None:
    with psycopg.connect(cluster.dsn, autocommit=True) as administrator:
        administrator.execute("create role owner login; create role app login")
        administrator.execute("create database mine owner owner")
        mine = make_conninfo(cluster.dsn, user="owner", dbname="mine")
        result = psql(mine, INSTALL)
        assert result.returncode != 0
        assert "nothing was installed" in result.stderr and not installed(mine)
        lines = re.findall(r"^  (create role \w+;)$", result.stderr, re.MULTILINE)
        assert lines == [f"create role {role};" for role in ROLES]

        # Without them nobody but the owner may do anything.
        assert psql(make_conninfo(mine, options="-c pglimits.without_roles=on"), INSTALL).returncode == 0
        with psycopg.connect(mine, autocommit=True) as owner:
            session = Session(owner)
            session.create("database", 2)
            assert session.acquire("database").status == "granted"
        app = make_conninfo(mine, user="app")
        with psycopg.connect(app, autocommit=True) as connection, fails("42501"):
            Session(connection).acquire("database")

        # Then the lines are run; to install again grants to them.
        for line in lines:
            administrator.execute(line.encode())
        result = psql(mine, INSTALL)
        assert (result.returncode, result.stderr) == (0, "")
        administrator.execute("grant pglimits_user to app")
        with psycopg.connect(app, autocommit=True) as connection:
            assert Session(connection).acquire("database").status == "granted"
            with fails("42501"):
                connection.execute("select * from pglimits.leases")


def test_a_role_without_the_right_to_the_database_cannot_install(bare_dsn: str, psql: Any) -> None:
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute("drop role if exists stranger; create role stranger login")
        result = psql(make_conninfo(bare_dsn, user="stranger"), INSTALL)
        assert result.returncode != 0
        assert "permission denied for database" in result.stderr
        connection.execute("drop role stranger")


# Removing.


def test_uninstalling_leaves_nothing(cluster: Server, psql: Any) -> None:
    tables = ["class", "proc", "type", "namespace", "roles", "description", "shdescription", "default_acl"]
    counts = f"select {', '.join(f'(select count(*) from pg_{table})' for table in tables)}".encode()
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        before = connection.execute(counts).fetchone()
        for _ in range(2):
            assert psql(cluster.dsn, INSTALL).returncode == 0
            assert connection.execute(counts).fetchone() != before
            with psycopg.connect(cluster.dsn, autocommit=True) as other:
                session = Session(other)
                session.create("database", 1)
                session.acquire("database")
                session.queue("database")
            for _ in range(2):  # twice is harmless
                result = psql(cluster.dsn, UNINSTALL)
                assert result.returncode == 0, result.stderr
                assert connection.execute(counts).fetchone() == before


@pytest.mark.parametrize("way", ["psql", "python"])
def test_uninstalling_keeps_roles_that_another_database_needs(dsn: str, bare_dsn: str, psql: Any, way: str) -> None:
    _install.install(bare_dsn)
    said = psql(bare_dsn, UNINSTALL).stderr if way == "psql" else "\n".join(_install.uninstall(bare_dsn))
    for role in ROLES:
        assert f"the role {role} is left in place" in said
    assert not installed(bare_dsn)
    with psycopg.connect(dsn) as connection:
        privilege = "select has_function_privilege('pglimits_user', 'pglimits.version()', 'execute')"
        assert connection.execute(privilege).fetchone() == (True,)
