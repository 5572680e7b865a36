"""pg_cron calls the sweep: against the real extension, on a private cluster of Debian's PostgreSQL 15."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pglimits._embedded import Binaries, Server, throwaway

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

BIN = Path("/usr/lib/postgresql/15/bin")
EXTENSION = Path("/usr/share/postgresql/15/extension")
SQL = Path(__file__).resolve().parent.parent.parent / "sql"

pytestmark = pytest.mark.skipif(
    not (EXTENSION / "pg_cron.control").exists(), reason="needs Debian's PostgreSQL 15 with pg_cron"
)


def install(dsn: str) -> None:
    import subprocess

    subprocess.run(
        [BIN / "psql", "-X", "-q", "-d", dsn, "-f", str(SQL / "install.sql")], check=True, capture_output=True, cwd="/"
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Server]:
    settings = {
        "shared_preload_libraries": "pg_cron",
        "cron.database_name": "with_cron",
        "cron.use_background_workers": "on",
        "max_worker_processes": "20",
    }
    with throwaway(binaries=Binaries(BIN, 15), settings=settings) as running:
        with psycopg.connect(running.dsn, autocommit=True) as connection:
            connection.execute("create database with_cron")
            connection.execute("create database without_cron")
        with psycopg.connect(make_conninfo(running.dsn, dbname="with_cron"), autocommit=True) as connection:
            connection.execute("create extension pg_cron")
        for name in ("with_cron", "without_cron"):
            install(make_conninfo(running.dsn, dbname=name))
        yield running


@pytest.fixture
def here(cluster: Server) -> Iterator[Connection]:
    """The database where pg_cron lives, with nothing scheduled and no limit."""
    with psycopg.connect(make_conninfo(cluster.dsn, dbname="with_cron"), autocommit=True) as connection:
        connection.execute("select pglimits.cron_disable()")
        connection.execute("select pglimits.delete_limit(name) from pglimits.limits")
        yield connection
        connection.execute("select pglimits.cron_disable()")


@pytest.fixture
def elsewhere(cluster: Server) -> Iterator[Connection]:
    with psycopg.connect(make_conninfo(cluster.dsn, dbname="without_cron"), autocommit=True) as connection:
        yield connection


def value(connection: Connection, query: str, *parameters: Any) -> Any:
    row = connection.execute(query.encode(), parameters or None).fetchone()
    assert row is not None
    return row[0]


def jobs(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "select schedule, command, database, username, active from cron.job where jobname like 'pglimits%'"
    ).fetchall()


def test_enabling_again_changes_the_one_job(here: Connection) -> None:
    assert value(here, "select pglimits.cron_enable()") == "* * * * *"
    ((schedule, command, database, _, active),) = jobs(here)
    assert (schedule, database, active) == ("* * * * *", "with_cron", True)
    assert "pglimits.sweep" in command
    assert value(here, "select pglimits.cron_enable(300)") == "*/5 * * * *"
    assert [job[0] for job in jobs(here)] == ["*/5 * * * *"]
    assert value(here, "select extversion from pg_extension where extname = 'pg_cron'").startswith("1.4")
    assert value(here, "select pglimits.cron_enable(10)") == "* * * * *", "it knows no seconds"
    assert [job[0] for job in jobs(here)] == ["* * * * *"]


@pytest.mark.parametrize(
    ("every", "version", "schedule"),
    [
        (10, "1.4-1", "* * * * *"),
        (10, "1.5", "10 seconds"),
        (10, "1.10", "10 seconds"),
        (10, "2.0", "10 seconds"),
        (1.2, "1.6", "2 seconds"),
        (59, "1.6", "59 seconds"),
        (59.5, "1.6", "* * * * *"),
        (61, "1.6", "*/2 * * * *"),
        (300, "1.4", "*/5 * * * *"),
        (3540, "1.4", "*/59 * * * *"),
        (3600, "1.4", "0 */1 * * *"),
        (3660, "1.4", "0 */2 * * *"),
        (82800, "1.4", "0 */23 * * *"),
        (84600, "1.4", "0 0 * * *"),
        (86400, "1.4", "0 0 * * *"),
    ],
)
def test_the_schedule_is_chosen_by_version_and_never_misread(
    here: Connection, every: float, version: str, schedule: str
) -> None:
    assert value(here, "select pglimits._cron_schedule(%s::float8, %s)", every, version) == schedule


def test_pg_cron_takes_every_schedule_that_is_chosen_for_it(here: Connection) -> None:
    for minutes in (1, 2, 7, 30, 59, 60, 61, 120, 1379, 1381, 1439, 1440):
        chosen = value(here, "select pglimits.cron_enable(60.0 * %s)", minutes)
        assert [job[0] for job in jobs(here)] == [chosen]


def test_bad_input_is_an_error_that_names_the_argument_and_schedules_nothing(here: Connection) -> None:
    for every in (None, 0, -60, 86401, 0.5, "NaN"):
        with pytest.raises(psycopg.Error) as caught:
            value(here, "select pglimits.cron_enable(%s::float8)", every)
        assert caught.value.diag.sqlstate == "PL001"
        assert "every" in (caught.value.diag.message_primary or "")
    assert jobs(here) == []


def test_disabling_stops_it_once(here: Connection) -> None:
    value(here, "select pglimits.cron_enable()")
    assert value(here, "select pglimits.cron_disable()") is True
    assert jobs(here) == []
    assert value(here, "select pglimits.cron_disable()") is False


def test_other_jobs_are_left_alone(here: Connection) -> None:
    value(here, "select cron.schedule('mine', '0 0 * * *', 'select 1')")
    value(here, "select pglimits.cron_enable()")
    value(here, "select pglimits.cron_disable()")
    assert value(here, "select array_agg(jobname) from cron.job") == ["mine"]
    value(here, "select cron.unschedule('mine')")


def test_in_another_database_the_error_has_the_command_that_works(here: Connection, elsewhere: Connection) -> None:
    with pytest.raises(psycopg.Error) as caught:
        value(elsewhere, "select pglimits.cron_enable(300)")
    assert caught.value.diag.sqlstate == "PL007"
    assert "'with_cron'" in (caught.value.diag.message_primary or "")
    hint = caught.value.diag.message_hint or ""
    command = hint[hint.index("select cron.") :]
    assert value(here, command.rstrip(";")) is not None
    ((schedule, sweep, database, _, _),) = jobs(here)
    assert (schedule, database) == ("*/5 * * * *", "without_cron")
    assert "pglimits.sweep" in sweep
    here.execute("select cron.unschedule(jobid) from cron.job")
    assert value(elsewhere, "select pglimits.cron_disable()") is False


def test_uninstalling_unschedules(cluster: Server, here: Connection) -> None:
    import subprocess

    dsn = make_conninfo(cluster.dsn, dbname="with_cron")
    value(here, "select pglimits.cron_enable()")
    try:
        subprocess.run(
            [BIN / "psql", "-X", "-q", "-d", dsn, "-f", str(SQL / "uninstall.sql")],
            check=True,
            capture_output=True,
            cwd="/",
        )
        assert jobs(here) == []
    finally:
        install(dsn)


def test_a_real_tick_sweeps(here: Connection, wait_until: Callable[..., Any]) -> None:
    value(here, "select pglimits.create_limit('database', 5)")
    here.execute("select pglimits.acquire('database', lease_duration => 1)")
    assert value(here, "select count(*) from pglimits.leases") == 1
    value(here, "select pglimits.cron_enable(1)")
    wait_until(lambda: value(here, "select count(*) from pglimits.leases") == 0, timeout=90)
    finished = (
        "select count(*) from cron.job_run_details where command like '%pglimits.sweep%' and status = 'succeeded'"
    )
    wait_until(lambda: value(here, finished) >= 1, timeout=30)
    assert value(here, "select count(*) from cron.job_run_details where status = 'failed'") == 0


def test_plpgsql_check_finds_nothing_in_the_functions_for_pg_cron(here: Connection) -> None:
    if not (EXTENSION / "plpgsql_check.control").exists():
        pytest.skip("this server has no plpgsql_check")
    here.execute("create extension if not exists plpgsql_check")
    found = here.execute(
        """
        select p.oid::regprocedure::text, c.lineno, c.level, c.message
        from pg_proc p cross join lateral plpgsql_check_function_tb(p.oid, extra_warnings => true,
          performance_warnings => false, security_warnings => true) c
        where p.pronamespace = 'pglimits'::regnamespace and p.proname like '%cron%'
        """
    ).fetchall()
    assert found == []
