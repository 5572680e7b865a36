"""install, upgrade, uninstall, sql, sweep, embedded."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pglimits import __version__
from pglimits._embedded import Binaries, throwaway

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]


def installed(dsn: str) -> bool:
    with psycopg.connect(dsn) as connection:
        return connection.execute("select to_regnamespace('pglimits')").fetchone() != (None,)


def test_install_installs_and_may_be_repeated(pglimits: Cli, bare_dsn: str) -> None:
    result = pglimits("install", "--dsn", bare_dsn)
    assert result.code == 0 and result.out.startswith(f"Installed pglimits {__version__} in database ")
    assert "(from --dsn)" in result.out
    assert pglimits("create", "x", "-l", "1", "--dsn", bare_dsn).code == 0
    again = pglimits("install", "--dsn", bare_dsn)
    assert again.code == 0 and again.out.startswith(f"pglimits {__version__} is up to date in database ")
    assert [row["name"] for row in pglimits("ls", "-o", "json", "--dsn", bare_dsn).json] == ["x"]


def test_install_tells_a_role_that_may_not_create_roles_what_to_do(pglimits: Cli, server: Any) -> None:
    with throwaway(binaries=Binaries(server.bin, server.version)) as cluster:  # roles belong to the whole cluster
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            connection.execute("create role owner login")
            connection.execute("create database mine owner owner")
        result = pglimits("install", "--dsn", make_conninfo(cluster.dsn, user="owner", dbname="mine"), "-o", "json")
        assert result.code == 0 and result.json["changed"]
        for role in ("pglimits_user", "pglimits_reader", "pglimits_admin"):
            assert f"may not create the role {role}" in result.err
        assert "Or grant by hand" in result.err


def test_upgrade_says_what_changed(pglimits: Cli, conn: Connection) -> None:
    conn.execute("create or replace function pglimits.version() returns text language sql as $$select '0.0.1'$$")
    result = pglimits("upgrade")
    assert result.code == 0
    assert result.out.startswith(f"Upgraded pglimits from 0.0.1 to {__version__} in database ")
    assert pglimits("upgrade", "-o", "json").json == {
        "version_before": __version__, "version_after": __version__, "changed": False,
    }  # fmt: skip


def test_a_newer_schema_is_left_alone(pglimits: Cli, conn: Connection) -> None:
    conn.execute("update pglimits.meta set schema_version = 1000")
    result = pglimits("install")
    assert (result.code, result.out) == (1, "") and result.err.startswith("Error: ") and "newer" in result.err


def test_uninstall_removes_all_of_it(pglimits: Cli, dsn: str) -> None:
    result = pglimits("uninstall", "--yes")
    assert result.code == 0 and result.out.startswith("Removed pglimits from database ")
    assert not installed(dsn)
    again = pglimits("uninstall", "--yes", "-o", "json")
    assert (again.code, again.out) == (1, "") and "not installed" in again.err


def test_uninstall_does_not_ask_without_a_terminal(pglimits: Cli, dsn: str) -> None:
    assert pglimits("uninstall", "-o", "json", stdin="n\n").json == {"uninstalled": True}
    assert not installed(dsn)


def test_without_an_installation_every_command_says_what_to_run(pglimits: Cli, bare_dsn: str) -> None:
    for arguments in (("ls",), ("create", "x", "-l", "1"), ("acquire", "x"), ("holders",), ("sweep",)):
        result = pglimits(*arguments, "--dsn", bare_dsn)
        assert (result.code, result.out) == (1, ""), arguments
        assert "run pglimits install" in result.err and result.err.count("\n") == 1


def test_sql_prints_scripts_for_psql(pglimits: Cli, server: Any, bare_dsn: str, tmp_path: Path) -> None:
    psql = server.bin / "psql"
    if not psql.exists():
        pytest.skip("this PostgreSQL has no psql")
    for arguments, there in ((("sql",), True), (("sql", "--uninstall"), False)):
        script = pglimits(*arguments)
        assert script.code == 0
        done = subprocess.run(
            [psql, "-X", "-q", "-d", bare_dsn], input=script.out, cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert installed(bare_dsn) is there


def test_sweep_tidies_up_and_counts(pglimits: Cli, conn: Connection, clock: Any) -> None:
    assert pglimits("sweep").out == "Swept 0 slots of ended leases, 0 waiters, 0 idle keys.\n"
    conn.execute("select pglimits.create_limit('database', 5)")
    conn.execute("select pglimits.acquire('database', slots => 3)")
    clock.advance(301)
    assert pglimits("sweep", "-o", "json").json == {"leases": 3, "waiters": 0, "keys": 0}


def test_sweep_does_not_stop_before_all_is_tidy(pglimits: Cli, conn: Connection, clock: Any) -> None:
    conn.execute("select pglimits.create_limit('database', 5)")
    conn.execute(
        "select count(pglimits.acquire('database', key => 'k' || n)) from generate_series(1, 2500) n",
    )
    clock.advance(301)
    assert pglimits("sweep", "-o", "json").json["leases"] == 2500


def test_sweep_every_so_often_until_a_signal(start: Callable[..., Any], pglimits: Cli) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        sweeping = start("sweep", "--every", "1", "-o", "json")
        for _ in range(2):
            assert set(json.loads(sweeping.stdout.readline())) == {"at", "leases", "waiters", "keys"}
        sweeping.send_signal(number)
        _, err = sweeping.communicate(timeout=30)
        assert (sweeping.returncode, err) == (0, "")
    assert pglimits("sweep", "--every", "0").code == 2


def test_sweep_goes_on_after_the_database_was_away(
    start: Callable[..., Any], conn: Connection, wait_until: Callable[..., Any]
) -> None:
    sweeping = start("sweep", "--every", "1")
    sweeping.stdout.readline()
    conn.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pglimits' and datname = "
        "current_database() and pid <> pg_backend_pid()"
    )
    assert "Swept" in sweeping.stdout.readline()


def test_embedded_starts_once_and_stops(process: Cli, environment: dict[str, str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pgl-", dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        home = {"PGLIMITS_HOME": f"{folder}/home", "PGLIMITS_DSN": ""}
        try:
            status = process("embedded", "status", **home)
            assert (status.code, status.out) == (1, "It is not running. Start it: pglimits embedded start\n")
            assert process("embedded", "status", "-o", "json", **home).json == {"running": False}
            started = process("embedded", "start", "-o", "json", **home)
            assert started.code == 0
            assert set(started.json) == {"running", "dsn", "host", "port", "user", "data", "pid", "version"}
            again = process("embedded", "start", **home)
            assert again.code == 0 and f"pid {started.json['pid']}" in again.out
            assert process("embedded", "status", **home).code == 0
            assert process("create", "x", "-l", "3", **home).code == 0  # no DSN: this is where it goes
            assert [row["name"] for row in process("ls", "-o", "json", **home).json] == ["x"]
            doctor = process("doctor", **home)
            assert doctor.code == 0 and "(from the embedded server)" in doctor.out
        finally:
            stopped = process("embedded", "stop", "-o", "json", **home)
        assert stopped.json == {"stopped": True}
        assert process("embedded", "stop", **home).out == "It was not running.\n"
