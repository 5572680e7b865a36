"""cron enable|disable and doctor against the real pg_cron, which lives in another database than most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pglimits import _install
from pglimits._embedded import Binaries, Server, throwaway

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]

BIN = Path("/usr/lib/postgresql/15/bin")
EXTENSION = Path("/usr/share/postgresql/15/extension")
needs_cron = pytest.mark.skipif(
    not (EXTENSION / "pg_cron.control").exists(), reason="needs Debian's PostgreSQL 15 with pg_cron"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Server]:
    settings = {
        "shared_preload_libraries": "pg_cron",
        "cron.database_name": "home",
        "cron.use_background_workers": "on",
        "max_worker_processes": "20",
    }
    with throwaway(binaries=Binaries(BIN, 15), settings=settings) as running:
        with psycopg.connect(running.dsn, autocommit=True) as connection:
            for name in ("home", "away", "it's"):
                connection.execute(f'create database "{name}"'.encode())
                _install.install(make_conninfo(running.dsn, dbname=name))
        yield running


@pytest.fixture
def home(cluster: Server) -> Iterator[Connection]:
    """The database where pg_cron lives, with nothing scheduled."""
    with psycopg.connect(make_conninfo(cluster.dsn, dbname="home"), autocommit=True) as connection:
        connection.execute("create extension if not exists pg_cron")
        connection.execute("select cron.unschedule(jobid) from cron.job")
        connection.execute("truncate cron.job_run_details")
        yield connection


def dsn_of(cluster: Server, name: str) -> tuple[str, str]:
    return ("--dsn", make_conninfo(cluster.dsn, dbname=name))


def jobs(home: Connection) -> list[tuple[Any, ...]]:
    return home.execute("select database, schedule, command from cron.job order by database").fetchall()


@needs_cron
@pytest.mark.parametrize("name", ["home", "away", "it's"])
def test_enabled_twice_it_is_scheduled_once(pglimits: Cli, cluster: Server, home: Connection, name: str) -> None:
    result = pglimits("cron", "enable", *dsn_of(cluster, name))
    assert (result.code, result.out) == (0, "pg_cron in database 'home' sweeps: * * * * *\n")
    again = pglimits("cron", "enable", "--every", "300", "-o", "json", *dsn_of(cluster, name))
    assert again.json == {"scheduled": True, "schedule": "*/5 * * * *", "cron_database": "home"}
    assert jobs(home) == [(name, "*/5 * * * *", "select pglimits.sweep()")]


@needs_cron
def test_disable_takes_only_its_own_job(pglimits: Cli, cluster: Server, home: Connection) -> None:
    for name in ("home", "away", "it's"):
        pglimits("cron", "enable", *dsn_of(cluster, name))
    assert pglimits("cron", "disable", *dsn_of(cluster, "away")).out == "pg_cron sweeps no longer.\n"
    assert [name for name, _, _ in jobs(home)] == ["home", "it's"]
    assert pglimits("cron", "disable", "-o", "json", *dsn_of(cluster, "away")).json == {"disabled": False}
    assert pglimits("cron", "disable", "-o", "json", *dsn_of(cluster, "home")).json == {"disabled": True}


@needs_cron
def test_a_tick_sweeps_a_database_that_pg_cron_does_not_live_in(
    pglimits: Cli, cluster: Server, home: Connection, wait_until: Callable[..., Any]
) -> None:
    to = dsn_of(cluster, "away")
    with psycopg.connect(to[1], autocommit=True) as away:
        away.execute("select pglimits.create_limit('database', 5)")
        away.execute("select pglimits.acquire('database', lease_duration => 1)")
        pglimits("cron", "enable", *to)
        wait_until(
            lambda: away.execute("select count(*) from pglimits.leases").fetchone() == (0,),
            timeout=200,
            what="for a minute to pass",
        )
        away.execute("select pglimits.delete_limit('database')")
    # A first tick may have come before the lease had ended.
    wait_until(
        lambda: (
            home.execute("select array_agg(distinct status) from cron.job_run_details").fetchone() == (["succeeded"],)
        )
    )
    result = pglimits("doctor", "-o", "json", *to)
    (found,) = [each for each in result.json["checks"] if each["check"] == "sweep"]
    assert found["status"] == "ok" and "* * * * *" in found["text"]


@needs_cron
def test_doctor_knows_whether_pg_cron_sweeps(pglimits: Cli, cluster: Server, home: Connection) -> None:
    def sweep(name: str) -> dict[str, Any]:
        checks = pglimits("doctor", "-o", "json", *dsn_of(cluster, name)).json["checks"]
        return next(each for each in checks if each["check"] == "sweep")

    for name in ("home", "away", "it's"):
        found = sweep(name)
        assert (found["status"], found["fix"]) == ("warn", "pglimits cron enable")
        pglimits("cron", "enable", *dsn_of(cluster, name))
        assert sweep(name)["status"] == "ok"
    home.execute("update cron.job set active = false")
    assert sweep("away")["status"] == "warn"
    home.execute("update cron.job set active = true")
    home.execute(
        "insert into cron.job_run_details (jobid, database, status, return_message)"
        " select jobid, database, 'failed', 'connection failed' from cron.job"
    )
    found = sweep("away")
    assert found["status"] == "fail" and "connection failed" in found["text"]


@needs_cron
def test_uninstall_takes_the_job_along(pglimits: Cli, cluster: Server, home: Connection) -> None:
    for name in ("away", "home"):
        pglimits("cron", "enable", *dsn_of(cluster, name))
        assert pglimits("uninstall", "--yes", *dsn_of(cluster, name)).code == 0
        assert jobs(home) == []
        pglimits("install", *dsn_of(cluster, name))


@needs_cron
def test_pg_cron_that_was_never_created(pglimits: Cli, cluster: Server, home: Connection) -> None:
    home.execute("drop extension pg_cron")
    for name in ("home", "away"):
        result = pglimits("cron", "enable", *dsn_of(cluster, name))
        assert (result.code, result.out) == (1, "")
        assert "create extension pg_cron" in result.err and result.err.count("\n") == 1
        assert pglimits("cron", "disable", *dsn_of(cluster, name)).code == 0


def test_a_server_without_pg_cron(pglimits: Cli) -> None:
    result = pglimits("cron", "enable")
    assert (result.code, result.out) == (1, "")
    assert "pglimits sweep --every 60" in result.err
    assert pglimits("cron", "disable", "-o", "json").json == {"disabled": False}
    for every in ("0", "100000", "x"):
        assert pglimits("cron", "enable", "--every", every).code == 2
