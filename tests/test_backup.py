"""Dumps, restores and logical replication, by the commands of docs/operations.md."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import pytest
from documents import blocks
from psycopg.conninfo import make_conninfo

from pglimits import _install
from pglimits._embedded import Binaries, throwaway

ROOT = Path(__file__).resolve().parent.parent

Connection: TypeAlias = psycopg.Connection[Any]
Run: TypeAlias = Callable[..., str]

HELD = "11111111-0000-4000-8000-000000000001"


def commands(section: str, language: str = "bash") -> list[str]:
    found = [block.code for block in blocks("docs/operations.md", language) if block.section == section]
    assert found, section
    return found


def connect(dsn: str) -> Connection:
    return psycopg.connect(dsn, autocommit=True)


def one(connection: Connection, query: str, *parameters: Any) -> tuple[Any, ...]:
    row = connection.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return tuple(row)


def definitions(binaries: Binaries, dsn: str) -> list[str]:
    """Everything that was installed, with owners and privileges."""
    command = [binaries.bin / "pg_dump", "--schema-only", "--schema=pglimits", "-d", dsn]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]


def later(connection: Connection, seconds: int) -> None:
    """Has the database's clock be ahead by so much."""
    connection.execute(
        "create or replace function pglimits._now() returns timestamptz language sql volatile"
        f" return clock_timestamp() + interval '{seconds} seconds'".encode()
    )


@pytest.fixture(scope="module")
def binaries(server: Any) -> Binaries:
    if not (server.bin / "pg_dump").exists():
        pytest.skip("needs pg_dump")
    return Binaries(server.bin, server.version)


@pytest.fixture(scope="module")
def old_server(binaries: Binaries) -> Iterator[str]:
    with throwaway(binaries=binaries, settings={"wal_level": "logical"}) as running:
        yield running.dsn


@pytest.fixture
def old(old_server: str, request: pytest.FixtureRequest) -> str:
    """A database with limits, of which one was deleted, with a lease, a waiter, and a level."""
    name = re.sub(r"\W", "_", request.node.name)[-60:]
    with connect(old_server) as connection:
        connection.execute(f'create database "{name}"'.encode())
    dsn = make_conninfo(old_server, dbname=name)
    _install.install(dsn)
    with connect(dsn) as connection:
        for statement in (
            "select pglimits.create_limit('gone', 1)",
            "select pglimits.acquire('gone')",
            "select pglimits.delete_limit('gone')",
            "select pglimits.create_limit('db', 1)",
            "select pglimits.create_limit('mails', 5, slot_decay_per_second => 0.001)",
            f"select pglimits.acquire('db', lease_id => '{HELD}')",
            "select pglimits.acquire('db', timeout_seconds => 1000)",
            "select pglimits.rate_limit('mails', 3)",
        ):
            connection.execute(statement.encode())
    return dsn


@pytest.fixture
def new(binaries: Binaries) -> Iterator[str]:
    """An empty database of a role that may create roles, in a server of its own that has never seen pglimits."""
    with throwaway(binaries=binaries) as running:
        with connect(running.dsn) as connection:
            connection.execute("create role owner login createrole")
            connection.execute("create role app")
            connection.execute("create database app owner owner")
        yield make_conninfo(running.dsn, dbname="app")


@pytest.fixture
def run(binaries: Binaries, old: str, tmp_path: Path) -> Run:
    """run(commands, new): has a shell run them as the document has them. Returns what they say that is wrong."""
    (tmp_path / "sql").symlink_to(ROOT / "sql")

    def run(script: str, new: str) -> str:
        to = {"OLD": old, "NEW": new, "PATH": f"{binaries.bin}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-uc", script],
            env={**os.environ, **to},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


def by_owner(dsn: str) -> str:
    return make_conninfo(dsn, user="owner")


@pytest.mark.parametrize("is_superuser", [True, False])
def test_a_dba_installs_without_python(binaries: Binaries, new: str, run: Run, is_superuser: bool) -> None:
    install, use = commands("Installing without Python")
    dba = new if is_superuser else by_owner(new)
    run(install, dba)
    run(use, dba)
    with connect(new) as connection:
        connection.execute("create database fresh owner limits_owner")
        connection.execute("alter role limits_owner createrole")
        fresh = make_conninfo(new, dbname="fresh")
        _install.install(make_conninfo(fresh, options="-c role=limits_owner"))
        assert definitions(binaries, new) == definitions(binaries, fresh)
        connection.execute("set role app")
        assert one(connection, "select status from pglimits.acquire('warehouse', 20)") == ("granted",)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select pglimits.delete_limit('warehouse')")


def test_a_restored_database_goes_on_where_the_dump_was(binaries: Binaries, old: str, new: str, run: Run) -> None:
    run(commands("Dump and restore")[0], new)
    assert definitions(binaries, new) == definitions(binaries, old)
    with connect(new) as connection:
        assert one(connection, "select status from pglimits.acquire('db')") == ("refused",)
        assert one(connection, "select round(level) from pglimits.limits where name = 'mails'") == (3,)
        assert one(connection, "select pglimits.renew(%s)", HELD) == (True,)
        later(connection, 11)
        assert one(connection, "select count(*) from pglimits.waiters") == (0,)
        later(connection, 311)
        # No fence of the deleted limit is given again.
        assert one(connection, "select status, fence > 2 from pglimits.acquire('db')") == ("granted", True)


def test_installing_again_gives_a_restore_without_owners_and_privileges_both(
    binaries: Binaries, new: str, run: Run
) -> None:
    dump = commands("Dump and restore")[0].splitlines()[1]
    restore, install = commands("Dump and restore")[1].splitlines()
    run(dump, new)
    run(restore, by_owner(new))
    with connect(new) as connection:
        assert one(connection, "select count(*) from pg_roles where rolname ~ '^pglimits_'") == (0,)
    run(install, by_owner(new))
    with connect(new) as connection:
        connection.execute("create database fresh owner owner")
        fresh = make_conninfo(new, dbname="fresh")
        _install.install(by_owner(fresh))
        assert definitions(binaries, new) == definitions(binaries, fresh)
        connection.execute("grant pglimits_user to app; set role app")
        assert one(connection, "select status from pglimits.acquire('db')") == ("refused",)
        assert one(connection, "select pglimits.release(%s)", HELD) == (True,)


def test_what_default_privileges_granted_at_a_restore_can_be_taken_back(new: str, run: Run) -> None:
    with connect(by_owner(new)) as connection:
        for what in ("usage on schemas", "all on functions", "all on tables"):
            connection.execute(f"alter default privileges grant {what} to app".encode())
    run(commands("Dump and restore")[0].splitlines()[1], new)
    run(commands("Dump and restore")[1], by_owner(new))
    with connect(new) as connection:
        connection.execute("set role app")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select from pglimits.configs")
        assert one(connection, "select count(*) from pglimits.limits") == (2,)
        connection.execute("reset role")
        connection.execute(commands("Dump and restore", "sql")[0].encode())
        connection.execute("set role app")
        for forbidden in (
            "select pglimits.delete_limit('db')",
            "select from pglimits.limits",
            "select pglimits.sweep()",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(forbidden.encode())
        assert one(connection, "select status from pglimits.acquire('db')") == ("refused",)


def test_definitions_alone_make_a_limiter_without_limits(new: str, run: Run) -> None:
    script = commands("Dump and restore")[2]
    run(script, new)
    with connect(new) as connection:
        connection.execute("set statement_timeout = '20s'")
        connection.execute("select pglimits.create_limit('db', 1)")
        assert one(connection, "select status, fence from pglimits.acquire('db')") == ("granted", 1)
        connection.execute("create database another")
    another = make_conninfo(new, dbname="another")
    run(script, another)
    run(commands("Dump and restore")[1].splitlines()[1], another)
    _install.install(another)
    with connect(another) as connection:
        assert one(connection, "select schema_version from pglimits.meta") == (1,)


def test_a_logical_subscriber_takes_over(old: str, new: str, run: Run, wait_until: Callable[..., Any]) -> None:
    begin, end = commands("Logical replication")
    (has_everything,) = commands("Logical replication", "sql")
    run(begin, new)
    with connect(old) as connection, connect(new) as subscriber:
        for number in range(200):  # over more than one generation of the state
            connection.execute("select pglimits.adjust('mails', %s)", [1 if number % 2 else -1])
        connection.execute("select pglimits.create_limit('later', 2)")
        (fence,) = one(connection, "select fence from pglimits.acquire('later')")
        wait_until(
            lambda: (
                one(subscriber, "select bool_and(srsubstate = 'r') from pg_subscription_rel") == (True,)
                and one(connection, has_everything)[1]
            ),
            timeout=200,
            what="for the subscriber to have everything",
        )
        states = "select name, version, held, booked, waiting from pglimits.states order by name"
        assert subscriber.execute(states.encode()).fetchall() == connection.execute(states.encode()).fetchall()
        run(end, new)
        assert one(subscriber, "select status, fence from pglimits.acquire('later')") == ("granted", fence + 1)
        assert one(subscriber, "select pglimits.release(%s)", HELD) == (True,)
        subscriber.execute("select pglimits.create_limit('of its own', 1)")
        assert one(subscriber, "select count(*) = 4 and count(distinct limit_id) = 4 from pglimits.configs") == (True,)
