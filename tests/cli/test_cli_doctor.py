"""doctor finds each of the things that it is there to find, and says what mends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import poolers
import psycopg
import pytest
from pglimits_cli import _doctor_health
from psycopg.conninfo import make_conninfo

from pglimits import _install
from pglimits._embedded import Binaries, throwaway

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]
Cli = Callable[..., Any]
Wait = Callable[..., Any]

ALL = [
    "target", "reachable", "server", "writable", "durable", "installed", "owner", "roles", "rights", "private",
    "clients", "sweep", "listen",
    *(["prepared"] if poolers.MODE else []), "locks", "snapshots", "waiters", "tables",
]  # fmt: skip


@pytest.fixture
def find(pglimits: Cli) -> Callable[..., dict[str, Any]]:
    """find("locks"): what the doctor says of it. Fails if the exit code does not fit."""

    def findings(check: str, *arguments: str) -> dict[str, Any]:
        result = pglimits("doctor", "-o", "json", *arguments)
        checks = result.json["checks"]
        failed = any(each["status"] == "fail" for each in checks)
        assert (result.code, result.json["ok"]) == (1 if failed else 0, not failed)
        for each in checks:
            assert set(each) == {"check", "status", "text", "fix"}
            assert each["status"] in ("ok", "warn", "fail", "skip")
            assert each["fix"] or each["status"] not in ("warn", "fail") or each["check"] == "reachable"
        found: dict[str, Any] = next(each for each in checks if each["check"] == check)
        return found

    return findings


@pytest.fixture
def role(conn: Connection) -> Iterator[Callable[[str], str]]:
    """role("pglimits_user"): a new login role with that one granted; its name."""
    made: list[str] = []

    def create(*granted: str) -> str:
        name = f"doctor_test_{len(made)}"
        conn.execute(f"create role {name} login".encode())
        made.append(name)
        for each in granted:
            conn.execute(f"grant {each} to {name}".encode())
        return name

    yield create
    for name in made:
        conn.execute(f"drop owned by {name}; drop role {name}".encode())


def test_all_is_looked_at_and_shown(pglimits: Cli) -> None:
    result = pglimits("doctor")
    assert result.code == 0
    shown = [line.split()[1] for line in result.out.splitlines() if line[:4] in ("ok  ", "warn", "fail", "skip")]
    assert shown == ALL
    assert result.out.splitlines()[-1].startswith("0 failed, ")
    found = pglimits("doctor", "-o", "json").json
    assert [each["check"] for each in found["checks"]] == ALL and found["ok"] is True


def test_how_the_database_was_found_without_its_password(
    find: Callable[..., Any], dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "(from $PGLIMITS_DSN)" in find("target")["text"]
    found = find("target", "--dsn", make_conninfo(dsn, password="geheim"))
    assert "(from --dsn)" in found["text"] and "geheim" not in found["text"]
    monkeypatch.setenv("DATABASE_URL", os.environ["PGLIMITS_DSN"])
    monkeypatch.delenv("PGLIMITS_DSN")
    assert "(from $DATABASE_URL)" in find("target")["text"]


def test_a_dsn_that_cannot_be_read(find: Callable[..., Any]) -> None:
    assert find("target", "--dsn", "nonsense")["status"] == "fail"


def test_why_the_server_cannot_be_reached(find: Callable[..., Any], dsn: str) -> None:
    for change, fix in (
        ({"host": "127.0.0.1", "port": 1}, "start the server"),
        ({"host": "/nonexistent"}, "start the server"),
        ({"host": "no-such-host.invalid"}, "correct the host"),
        ({"dbname": "no_such_database"}, "correct the database"),
        ({"user": "no_such_role"}, "correct the database or user"),
    ):
        found = find("reachable", "--dsn", make_conninfo(dsn, **change))
        assert found["status"] == "fail" and fix in found["fix"], found


def test_not_installed(find: Callable[..., Any], pglimits: Cli, bare_dsn: str) -> None:
    found = find("installed", "--dsn", bare_dsn)
    assert (found["status"], found["fix"]) == ("fail", "pglimits install")
    text = pglimits("doctor", "--dsn", bare_dsn)
    assert text.code == 1 and "→ pglimits install" in text.out


def test_an_installation_of_another_version(find: Callable[..., Any], conn: Connection) -> None:
    for version, status, fix in (
        ("0.0.1", "fail", "pglimits upgrade"),
        ("99.0.0", "fail", "pip install --upgrade pglimits"),
        ("0.1.99", "warn", "pip install --upgrade pglimits"),
    ):
        change = f"create or replace function pglimits.version() returns text language sql as $$ select '{version}' $$"
        conn.execute(change.encode())
        found = find("installed")
        assert (found["status"], found["fix"]) == (status, fix)


def test_an_installation_that_lacks_something(find: Callable[..., Any], pglimits: Cli, conn: Connection) -> None:
    conn.execute("drop function pglimits.renew; drop view pglimits.holders")
    found = find("installed")
    assert (found["status"], found["fix"]) == ("fail", "pglimits install")
    assert "without holders, renew" in found["text"]
    assert pglimits("install").code == 0
    assert find("installed")["status"] == "ok"


def test_what_the_role_may_do(find: Callable[..., Any], role: Callable[..., str], dsn: str) -> None:
    stranger, user, reader, admin = role(), role("pglimits_user"), role("pglimits_reader"), role("pglimits_admin")
    for name, status, said in (
        (stranger, "fail", f"only: nothing; the role {stranger} is not a member of pglimits_user"),
        (reader, "fail", f"only: look; the role {reader} is not a member of pglimits_user"),
        (user, "ok", "not granted: pglimits_reader, pglimits_admin"),
        (admin, "ok", "may take slots, look, change limits"),
    ):
        found = find("rights", "--dsn", make_conninfo(dsn, user=name))
        assert (found["status"], found["fix"]) == (
            status, f"grant pglimits_user to {name};" if status == "fail" else None
        )  # fmt: skip
        assert found["text"].endswith(said)
    assert find("waiters", "--dsn", make_conninfo(dsn, user=user))["status"] == "skip"
    assert find("waiters", "--dsn", make_conninfo(dsn, user=admin))["status"] == "ok"
    assert find("tables", "--dsn", make_conninfo(dsn, user=admin))["status"] == "ok"


def test_why_a_member_of_pglimits_user_may_not_take_slots_all_the_same(
    find: Callable[..., Any], pglimits: Cli, role: Callable[..., str], conn: Connection, dsn: str
) -> None:
    """And the line that is proposed does mend it."""
    new = conn.info.server_version >= 160000
    name = role()
    conn.execute(
        f"grant pglimits_user to {name} with inherit false".encode()
        if new
        else f"alter role {name} noinherit; grant pglimits_user to {name}".encode()
    )
    as_member = ("--dsn", make_conninfo(dsn, user=name))
    said = f"the role {name} is a member of pglimits_user, but does not inherit its rights"
    found = find("rights", *as_member)
    assert found["status"] == "fail" and found["text"].endswith(said)
    refused = pglimits("acquire", "x", *as_member)
    assert refused.code == 1 and f"{said}. An administrator mends it: {found['fix']}\n" in refused.err
    conn.execute(found["fix"].encode())
    assert find("rights", *as_member)["status"] == "ok"
    conn.execute("revoke usage on schema pglimits from pglimits_user")
    found = find("rights", *as_member)
    assert "lacks its own rights" in found["text"] and found["fix"].startswith("pglimits install")
    assert pglimits("install").code == 0
    assert find("rights", *as_member)["status"] == "ok"


def test_what_somebody_was_granted_of_the_private_parts(
    pglimits: Cli, role: Callable[..., str], conn: Connection
) -> None:
    """By hand, or by default privileges before the installation took care of them. The lines revoke it."""

    def found() -> list[dict[str, Any]]:
        checks = pglimits("doctor", "-o", "json").json["checks"]
        return [each for each in checks if each["check"] == "private"]

    (well,) = found()
    assert well["status"] == "ok"
    name = role("pglimits_user")
    conn.execute(
        f"""grant select, delete on pglimits.leases, pglimits.queue to {name};
        grant execute on function pglimits._bury to {name};
        grant usage on sequence pglimits.configs_limit_id_seq to {name};
        grant execute on function pglimits.delete_limit to public;
        grant execute on function pglimits.acquire to {name};
        grant create on schema pglimits to {name}""".encode()
    )
    shown = found()
    assert {each["status"] for each in shown} == {"warn"}
    assert any(each["text"].startswith(f"{name} has delete, select on 2 private tables") for each in shown)
    assert {each["fix"] for each in shown} == {
        f"revoke all on table pglimits.leases, pglimits.queue from {name};",
        f"revoke all on routine pglimits._bury from {name};",
        f"revoke all on sequence pglimits.configs_limit_id_seq from {name};",
        f"revoke create on schema pglimits from {name};",
        "revoke all on routine pglimits.delete_limit from public;",
    }
    for each in shown:
        conn.execute(each["fix"].encode())
    assert found() == [well]


def test_roles_whose_dead_clients_the_server_would_not_notice(
    find: Callable[..., Any], role: Callable[..., str], conn: Connection
) -> None:
    assert find("clients")["status"] == "ok"
    direct, group = role("pglimits_user"), role("pglimits_user")
    conn.execute(f"alter role {group} nologin".encode())
    indirect, _ = role(group), role("pglimits_reader")
    found = find("clients")
    lines = [f"alter role {name} set client_connection_check_interval = '1s';" for name in (direct, indirect)]
    assert (found["status"], found["fix"].splitlines()) == ("warn", lines)
    for line in lines:
        conn.execute(line.encode())
    assert find("clients")["status"] == "ok"
    conn.execute(f"alter role {direct} reset all".encode())
    assert find("clients")["fix"] == lines[0]
    conn.execute(f"alter database {conn.info.dbname} set client_connection_check_interval = 1000".encode())
    assert find("clients")["status"] == "ok"


def test_a_server_whose_text_is_of_no_encoding(
    find: Callable[..., Any], role: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a database in SQL_ASCII has its clients by default."""
    monkeypatch.setenv("PGCLIENTENCODING", "SQL_ASCII")
    name = role("pglimits_user")
    assert name in find("clients")["text"]


def test_a_server_that_is_read_only(
    find: Callable[..., Any], role: Callable[..., str], conn: Connection, dsn: str
) -> None:
    name = role("pglimits_user")
    conn.execute(f"alter role {name} set default_transaction_read_only = on".encode())
    found = find("writable", "--dsn", make_conninfo(dsn, user=name))
    assert found["status"] == "fail" and "read-only" in found["text"]


def test_a_server_without_durability(find: Callable[..., Any], dsn: str) -> None:
    found = find("durable")  # the tests' own has fsync off
    assert found["status"] == "warn" and "fsync" in found["text"] and "alter system reset fsync" in found["fix"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_standby_and_a_server_that_forgets(find: Callable[..., Any], wait_until: Wait) -> None:
    settings = {"synchronous_commit": "off", "fsync": "on", "full_page_writes": "on"}
    with throwaway(settings=settings, fsync=True) as primary:
        _install.install(primary.dsn)
        found = find("durable", "--dsn", primary.dsn)
        assert found["status"] == "warn" and "synchronous_commit = off" in found["text"]
        owner = primary.data.stat()
        program = Path(f"/proc/{primary.pid}/exe").resolve()  # where the server's user can reach it
        (primary.data / "standby.signal").touch()
        os.chown(primary.data / "standby.signal", owner.st_uid, owner.st_gid)
        os.kill(primary.pid, signal.SIGINT)
        wait_until(lambda: not (primary.data / "postmaster.pid").exists())
        options = {"unix_socket_directories": primary.host, "listen_addresses": "", "max_connections": "200"}
        standby = subprocess.Popen(
            [program, "-D", primary.data, *(f"--{name}={value}" for name, value in options.items())],
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **poolers.account(owner.st_uid, owner.st_gid),
        )
        try:
            wait_until(lambda: poolers.reachable(primary.dsn))
            found = find("writable", "--dsn", primary.dsn)
            assert found["status"] == "fail"
            assert "standby" in found["text"] and "target_session_attrs=read-write" in found["fix"]
        finally:
            standby.send_signal(signal.SIGQUIT)
            standby.wait(timeout=30)


def test_nobody_calls_the_sweep(find: Callable[..., Any]) -> None:
    found = find("sweep")
    assert found["status"] == "warn"
    assert "no pg_cron" in found["text"] and found["fix"] == "pglimits sweep --every 60"


@poolers.straight_only("they do not")
def test_notifications_arrive(find: Callable[..., Any]) -> None:
    assert find("listen")["status"] == "ok"


def test_a_pooler_in_the_way_of_notifications(find: Callable[..., Any], pooled: Callable[..., str]) -> None:
    found = find("listen", "--dsn", pooled("transaction"))
    assert found["status"] == "warn"
    assert "pooler" in found["text"] and "session mode" in found["fix"]


def test_a_pool_that_is_full(
    find: Callable[..., Any], pooled: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doctor_health, "PATIENCE", 0.5)
    found = find("listen", "--dsn", pooled("session", size=2))
    assert found["status"] == "warn" and "the pool is full" in found["text"]


def test_a_pooler_that_lets_notifications_through(find: Callable[..., Any], pooled: Callable[..., str]) -> None:
    through = pooled("session")
    found = find("listen", "--dsn", through)
    assert found["status"] == "ok" and "pooler" in found["text"]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A doctor to whom every transaction is a long one."""
    monkeypatch.setattr(_doctor_health, "LONG_LOCK", 0)


@pytest.fixture
def blocked(connect: Connect, wait_blocked: Any) -> Iterator[Callable[[str], int]]:
    """blocked("select …"): a session whose statement waits for a lock, in a transaction; its pid."""
    threads: list[threading.Thread] = []

    def begin(sql: str) -> int:
        session = connect(autocommit=False)
        session.execute("select 1 from pglimits.limits")

        def work() -> None:
            session.execute(sql.encode())
            session.commit()

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        wait_blocked(session.info.backend_pid)
        return session.info.backend_pid

    yield begin
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_of_a_chain_behind_one_idle_transaction_only_that_is_named(
    find: Callable[..., Any],
    pglimits: Cli,
    role: Callable[..., str],
    conn: Connection,
    connect: Connect,
    blocked: Any,
    dsn: str,
    eager: None,
) -> None:
    """Also by a doctor who may not see how old it is."""
    who = role("pglimits_user")
    conn.execute("select pglimits.create_limit('database', 2)")
    assert find("locks")["status"] == "ok"
    careless = connect(autocommit=False, application_name="careless")
    careless.execute("select pglimits.acquire('database')")
    terminate = f"select pg_terminate_backend({careless.info.backend_pid});"
    found = find("locks")
    assert (found["status"], found["fix"]) == ("warn", terminate) and "(careless)" in found["text"]
    for _ in range(3):
        blocked("select pglimits.update_limit('database', 3)")
    for to in ((), ("--dsn", make_conninfo(dsn, user=who))):
        checks = [each for each in pglimits("doctor", "-o", "json", *to).json["checks"] if each["check"] == "locks"]
        assert [(each["status"], each["fix"]) for each in checks] == [("fail", terminate)]
        assert "(careless)" in checks[0]["text"] and "blocks 3 others" in checks[0]["text"]
    careless.rollback()


def test_who_holds_up_limits_by_a_lock_on_something_else_is_named(
    find: Callable[..., Any], conn: Connection, connect: Connect, blocked: Any, eager: None
) -> None:
    conn.execute("select pglimits.create_limit('database', 2); create table mine ()")
    app = connect(autocommit=False, application_name="app")
    app.execute("lock table mine")
    blocked("select pglimits.acquire('database'); lock table mine")
    blocked("select pglimits.update_limit('database', 3)")
    found = find("locks")
    assert (found["status"], found["fix"]) == ("fail", f"select pg_terminate_backend({app.info.backend_pid});")
    assert "(app) holds up 2 others at work on a limit" in found["text"]
    app.rollback()


def test_a_prepared_transaction_that_keeps_a_limit_locked(pglimits: Cli, server: Any, eager: None) -> None:
    settings = {"max_prepared_transactions": "2"}
    with throwaway(binaries=Binaries(server.bin, server.version), settings=settings) as running:
        _install.install(running.dsn)
        with psycopg.connect(running.dsn) as connection:
            connection.execute("select pglimits.create_limit('database', 2)")
            connection.commit()
            connection.execute("select pglimits.acquire('database')")
            connection.execute("prepare transaction 'it''s'")
        checks = pglimits("doctor", "-o", "json", "--dsn", running.dsn).json["checks"]
        found = next(each for each in checks if each["check"] == "locks")
        assert (found["status"], found["fix"]) == ("warn", "rollback prepared 'it''s';")


def test_reading_in_a_long_transaction_locks_nothing(find: Callable[..., Any], connect: Connect, eager: None) -> None:
    connect(autocommit=False).execute("select * from pglimits.limits")
    assert find("locks")["status"] == "ok"


def test_an_old_snapshot(find: Callable[..., Any], connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("snapshots")["status"] == "ok"
    monkeypatch.setattr(_doctor_health, "OLD_SNAPSHOT", 0)
    dump = connect(autocommit=False, application_name="dump")
    dump.execute("set transaction isolation level repeatable read")
    dump.execute("select 1")
    found = find("snapshots")
    assert found["status"] == "warn"
    assert "(dump)" in found["text"] and f"pg_terminate_backend({dump.info.backend_pid})" in found["fix"]


def test_waiters_of_a_limit_that_lets_nobody_in(find: Callable[..., Any], conn: Connection) -> None:
    """By the front door they would be told."""
    conn.execute("select pglimits.create_limit('a base', 1)")
    assert find("waiters")["text"] == "nobody waits"
    conn.execute("select pglimits.acquire('a base')")
    conn.execute("select pglimits.acquire('a base', timeout_seconds => null)")
    assert find("waiters") == {
        "check": "waiters", "status": "ok", "text": "1 request waiting, none of them in trouble", "fix": None,
    }  # fmt: skip
    conn.execute("update pglimits.configs set active = false")
    found = find("waiters")
    assert found["status"] == "warn" and found["fix"] == "pglimits enable 'a base'"
    conn.execute('update pglimits.configs set "limit" = 0')
    found = find("waiters")
    assert found["status"] == "warn"
    assert "whose limit is 0" in found["text"] and found["fix"] == "pglimits update 'a base' --limit N"


def test_waiters_beside_free_slots(find: Callable[..., Any], conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor_health, "IDLE_SLOT", 0.1)
    conn.execute("select pglimits.create_limit('database', 3)")
    conn.execute("select pglimits.acquire('database', slots => 3)")
    conn.execute("select pglimits.acquire('database', slots => 2, timeout_seconds => null)")
    conn.execute("update pglimits.states set held = 0")  # nothing of ours does that without a look at the line
    found = find("waiters")
    assert found["status"] == "fail"
    assert "although 3 are free" in found["text"] and "2 slots" in found["text"]


def test_a_head_that_waits_for_long(
    find: Callable[..., Any], conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doctor_health, "LONG_WAIT", 0)
    conn.execute("select pglimits.create_limit('database', 1)")
    conn.execute("select pglimits.acquire('database', key => 'k')")
    conn.execute("select pglimits.acquire('database', key => 'k', timeout_seconds => null)")
    found = find("waiters")
    assert found["status"] == "warn"
    assert "the head of 'database' (key 'k') waits since" in found["text"] and "1 of 1 slots are held" in found["text"]
    assert found["fix"].startswith("pglimits holders database")


def test_leases_that_were_not_swept_away(
    find: Callable[..., Any], conn: Connection, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doctor_health, "MANY_UNSWEPT", 1)
    conn.execute("select pglimits.create_limit('database', 5)")
    for _ in range(2):
        conn.execute("select pglimits.acquire('database')")
    assert find("tables")["status"] == "ok"
    clock.advance(301)
    found = find("tables")
    assert (found["status"], found["fix"]) == ("warn", "pglimits sweep")
    assert "2 ended leases" in found["text"]


def test_dead_rows(
    find: Callable[..., Any], conn: Connection, connect: Connect, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doctor_health, "MANY_DEAD", 50)
    conn.execute("alter table pglimits.states set (autovacuum_enabled = off)")
    conn.execute("select pglimits.create_limit('database', 5)")
    with connect() as busy:
        for _ in range(100):
            busy.execute("select pglimits.release((pglimits.acquire('database')).lease_id)")
    # Now that it has ended, it has told what it counted.
    wait_until(lambda: find("tables")["status"] == "warn")
    assert "vacuum" in find("tables")["fix"]


def test_it_changes_nothing(pglimits: Cli, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('database', 5)")
    conn.execute("select pglimits.acquire('database')")

    def contents() -> list[Any]:
        return [
            conn.execute(f"select t::text, t.xmin::text from pglimits.{table} t".encode()).fetchall()
            for table in ("configs", "states", "leases", "queue")
        ]

    before = contents()
    pglimits("doctor")
    assert contents() == before
