"""Installing and removing: by psql and by Python, twice, twenty at once, by a role that may not create roles."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from installtest import SQL, assert_same, catalog
from psycopg.conninfo import make_conninfo
from sqltest import Session

from pglimits._embedded import Binaries, throwaway

ROLES = ("pglimits_user", "pglimits_reader", "pglimits_admin")


@pytest.fixture
def install() -> Any:
    module = pytest.importorskip("pglimits._install", exc_type=ImportError)
    return module


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
