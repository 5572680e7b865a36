"""The database goes away, comes back, refuses, or is not what was expected."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

import poolers
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from wrappertest import (
    Api,
    Connection,
    WaitUntil,
    backends,
    held,
    in_thread,
    listeners,
    lose_reply,
    nothing_left,
    open_api,
    value,
    waiting,
)

from pglimits import (
    AcquireTimeout,
    LimiterUnavailable,
    NotInstalled,
    PermissionDenied,
    ReadOnlyServer,
    VersionMismatch,
    _embedded,
    _install,
    _waiting,
)

KINDS = ["sync", "async"]
Outage = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def outage(server: Any, dsn: str, conn: Connection, wait_until: WaitUntil) -> Outage:
    """``with outage():`` nobody can connect to the test's database, and whoever was connected is not."""

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        name = conn.info.dbname
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
            admin.execute(f'alter database "{name}" with allow_connections false')
            try:
                admin.execute(
                    "select pg_terminate_backend(pid, 10000) from pg_stat_activity"
                    # A pooler has connections that it has not lent to anybody yet.
                    " where datname = %s and (application_name = 'pglimits' or %s and pid <> %s)",
                    [name, poolers.MODE is not None, conn.info.backend_pid],
                )
                yield
            finally:
                admin.execute(f'alter database "{name}" with allow_connections true')
        # A pooler finds out when it tries again.
        wait_until(lambda: poolers.reachable(dsn))

    return block


# Unavailable.


@pytest.mark.parametrize("kind", KINDS)
def test_raise_raises_and_the_limiter_recovers_by_itself(dsn: str, conn: Connection, outage: Outage, kind: str) -> None:
    with open_api(kind, dsn=dsn) as api:
        api.create("database", 1)
        api.create("api", 10, slot_decay_per_second=1)
        with outage():
            with pytest.raises(LimiterUnavailable):
                api.acquire("database")
            with pytest.raises(LimiterUnavailable):
                api.rate_limit("api")
            with pytest.raises(LimiterUnavailable):
                api.get("database")
        lease = api.acquire("database", timeout_seconds=0)
        assert held(conn) == 1
        assert api.release(lease)


@pytest.mark.parametrize("kind", KINDS)
def test_wait_tries_on_until_the_database_is_back(
    dsn: str, conn: Connection, outage: Outage, kind: str, wait_until: WaitUntil
) -> None:
    with open_api(kind, dsn=dsn, on_unavailable="wait") as api:
        api.create("database", 1)
        with outage():
            acquiring = api.start("acquire", "database")
            with pytest.raises(AcquireTimeout):
                api.acquire("database", timeout_seconds=0.3)
            with pytest.raises(AcquireTimeout):
                api.acquire("database", timeout_seconds=0)
            assert not acquiring.done()
        lease = acquiring.result(30)
        assert lease.enforced
        # What was given up on the way, and is given back behind its back, is not what was granted in the end.
        since = value(conn, "select clock_timestamp()")
        wait_until(lambda: value(conn, "select clock_timestamp() > %s + interval '2.5 s'", [since]))
        assert held(conn) == 1
        assert api.release(lease)
        wait_until(lambda: nothing_left(conn))


@pytest.mark.parametrize("kind", KINDS)
def test_allow_lets_the_work_go_on_with_a_warning(
    dsn: str, conn: Connection, outage: Outage, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_api(kind, dsn=dsn, on_unavailable="allow") as api:
        api.create("database", 1)
        with outage():
            assert api.block("database", lambda lease: lease.enforced, strict=True) is False
            api.rate_limit("database")
        assert "'database' not enforced" in caplog.text
        assert api.block("database", lambda lease: lease.enforced) is True


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_released_while_the_database_is_away_is_released_when_it_is_back(
    dsn: str, conn: Connection, outage: Outage, kind: str, wait_until: WaitUntil
) -> None:
    with open_api(kind, dsn=dsn) as api:
        api.create("database", 1)
        lease = api.acquire("database")
        with outage():
            assert not api.release(lease)
        wait_until(lambda: held(conn) == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strict_block_whose_release_cannot_be_sent_does_not_hide_the_body_s_result(
    dsn: str, conn: Connection, outage: Outage, kind: str, wait_until: WaitUntil
) -> None:
    with open_api(kind, dsn=dsn) as api:
        api.create("database", 1)
        away = outage()

        def body(_: Any) -> str:
            away.__enter__()
            return "done"

        try:
            assert api.block("database", body, strict=True) == "done"
        finally:
            away.__exit__(None, None, None)
        wait_until(lambda: held(conn) == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_waiter_that_cannot_be_watched_for_as_long_as_it_lives_is_told_or_waits_on(
    dsn: str, conn: Connection, outage: Outage, kind: str, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_waiting, "LIVENESS", 0.5)
    with (
        open_api(kind, dsn=dsn) as raising,
        open_api(kind, dsn=dsn, durable=False, on_unavailable="wait") as patient,
    ):
        raising.create("database", 1)
        lease = raising.acquire("database")
        told, waits = raising.start("acquire", "database"), patient.start("acquire", "database")
        wait_until(lambda: waiting(conn) == 2)
        with outage():
            with pytest.raises(LimiterUnavailable):
                told.result(30)
            assert not waits.done()
        # The one that was told has left the queue, the other still stands in it.
        wait_until(lambda: waiting(conn) == 1)
        assert raising.release(lease)
        assert patient.release(waits.result(30))
        wait_until(lambda: nothing_left(conn))


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_not_there_is_said_to_be_unreachable(kind: str, tmp_path: Path) -> None:
    with open_api(kind, dsn=f"host={tmp_path} dbname=nowhere") as api:
        for call in (
            lambda: api.acquire("database"),
            lambda: api.release(uuid4()),
            lambda: api.get("database"),
            lambda: api.sweep(),
        ):
            with pytest.raises(LimiterUnavailable, match="cannot be reached"):
                call()


def test_connections_that_went_stale_are_replaced_without_an_error(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    for _ in range(4):
        api.release(api.acquire("database"))
        conn.execute(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity"
            " where datname = current_database() and application_name = 'pglimits'"
        )
    lease = api.acquire("database")
    assert held(conn) == 1
    api.release(lease)


def test_a_connection_cut_in_the_middle_of_statements_loses_and_doubles_nothing(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    """Replies get lost at any moment; ids make it safe to ask again."""
    api.create("database", 3)
    done: list[int] = []
    failed: list[BaseException] = []

    def work(number: int) -> None:
        for _ in range(10):
            try:
                api.block("database", lambda _: None)
                done.append(number)
            except LimiterUnavailable as error:
                # Cut three times in a row, a statement is given up. That is said, and leaks nothing.
                failed.append(error)

    working = [in_thread(work, number) for number in range(10)]
    while not all(future.done() for future in working):
        if len(done) + len(failed) < 50:  # a slow machine gets nothing through until it ends
            conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and application_name = 'pglimits' and state = 'active'"
            )
        assert held(conn) <= 3
        time.sleep(random.random() * 0.05)
    for future in working:
        future.result(60)
    assert len(done) + len(failed) == 100
    assert done
    wait_until(lambda: nothing_left(conn))


@poolers.straight_only("the request goes to another session, which answers")
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_that_does_not_answer_does_not_break_the_deadline(
    dsn: str, conn: Connection, kind: str, wait_until: WaitUntil
) -> None:
    with open_api(kind, dsn=dsn) as api:
        api.create("database", 1)
        stopped = backends(conn)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            acquiring = api.start("acquire", "database", timeout_seconds=0.3)
            wait_until(acquiring.done, timeout=10)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert isinstance(acquiring.exception(30), AcquireTimeout | LimiterUnavailable)
        wait_until(lambda: nothing_left(conn))


# A restart of the server.


@pytest.fixture
def own_server(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """A durable server of this test's own: call it to start it, or to find it running."""
    folder = Path(tempfile.mkdtemp(prefix="pgl-"))
    folder.chmod(0o711)
    monkeypatch.setenv("PGLIMITS_HOME", str(folder / "h"))
    chosen = _embedded.Binaries(server.bin, server.version)
    try:
        yield lambda: _embedded.start(binaries=chosen)
    finally:
        _embedded.stop()
        shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["restart", "crash"])
def test_a_restart_of_the_server_is_survived_by_holders_and_whoever_waits(
    own_server: Callable[[], Any], how: str, wait_until: WaitUntil
) -> None:
    running = own_server()
    _install.install(running.dsn)
    with open_api("sync", dsn=running.dsn) as threads, open_api("async", dsn=running.dsn) as tasks:
        threads.create("database", 1)
        threads.create("api", 1, slot_decay_per_second=0.5)
        threads.rate_limit("api")
        lease = threads.acquire("database", lease_duration=30)
        waits = [threads.start("acquire", "database"), tasks.start("acquire", "database")]
        sleeps = [threads.start("rate_limit", "api"), tasks.start("rate_limit", "api")]
        wait_until(lambda: threads.get("database").waiting == 2 and threads.get("api").waiting == 2)
        if how == "restart":
            _embedded.stop()
        else:
            os.kill(running.pid, signal.SIGQUIT)
            wait_until(lambda: _embedded.status() is None)
        running = own_server()
        wait_until(lambda: poolers.reachable(running.dsn))
        # What was granted and queued before is there after it.
        assert threads.get("database").held == 1
        assert threads.release(lease)
        while waits:
            done = wait_until(lambda: next((future for future in waits if future.done()), None))
            waits.remove(done)
            assert threads.release(done.result())
        for future in sleeps:
            future.result(30)
        wait_until(lambda: threads.get("database").held == 0)
        assert threads.get("database").waiting == threads.get("api").waiting == 0


# Not what was expected: each its own message, with the command that mends it.


@pytest.mark.parametrize("kind", KINDS)
def test_a_database_without_pglimits_says_so(bare_dsn: str, kind: str) -> None:
    with open_api(kind, dsn=bare_dsn) as api:
        for call in (lambda: api.acquire("database"), lambda: api.create("database", 1)):
            with pytest.raises(NotInstalled, match="pglimits install"):
                call()
        # Once it is installed, the same limiter works.
        _install.install(bare_dsn)
        api.create("database", 1)
        assert api.release(api.acquire("database"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version, command", [("0.0.9", "pglimits upgrade"), ("99.0.0", "pip install --upgrade")])
def test_another_version_in_the_database_says_so(
    dsn: str, conn: Connection, kind: str, version: str, command: str
) -> None:
    conn.execute(f"create or replace function pglimits.version() returns text language sql as $$ select '{version}' $$")
    with open_api(kind, dsn=dsn) as api, pytest.raises(VersionMismatch, match=command) as caught:
        api.acquire("database")
    assert version in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_where_transactions_are_serializable_by_default_nobody_fails_for_it(
    dsn: str, conn: Connection, kind: str
) -> None:
    conn.execute(f"alter database {conn.info.dbname} set default_transaction_isolation = 'serializable'".encode())
    at_work: list[int] = []
    most: list[int] = []

    def work(_: object) -> None:
        at_work.append(1)
        most.append(len(at_work))
        at_work.pop()

    with open_api(kind, dsn=dsn) as one, open_api(kind, dsn=dsn) as other:
        one.create("database", 2)
        for _ in range(5):
            calls = [api.start_block("database", work) for api in (one, other) for _ in range(10)]
            for call in calls:
                call.result(60)
    assert max(most) <= 2
    assert nothing_left(conn)


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_is_missing_is_another_version(dsn: str, conn: Connection, kind: str) -> None:
    conn.execute("drop function pglimits._acquire_batch")
    with open_api(kind, dsn=dsn) as api, pytest.raises(VersionMismatch, match="pglimits upgrade"):
        api.acquire("database")


@pytest.fixture
def role(conn: Connection) -> Iterator[str]:
    conn.execute("create role wrapper_stranger login")
    yield "wrapper_stranger"
    conn.execute("drop owned by wrapper_stranger")
    conn.execute("drop role wrapper_stranger")


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_without_grants_is_told_what_to_grant(dsn: str, conn: Connection, role: str, kind: str) -> None:
    with open_api(kind, dsn=make_conninfo(dsn, user=role)) as api:
        with pytest.raises(PermissionDenied, match="pglimits_user"):
            api.acquire("database")
        conn.execute("grant pglimits_user to wrapper_stranger")
        with open_api(kind, dsn=dsn) as admin:
            admin.create("database", 1)
        assert api.release(api.acquire("database"))
        # The views are the reader's, changes the admin's.
        for call in (lambda: api.create("other", 1), lambda: api.delete("database"), lambda: api.list()):
            with pytest.raises(PermissionDenied):
                call()
        conn.execute("grant pglimits_reader to wrapper_stranger")
        assert [limit.name for limit in api.list()] == ["database"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_server_says_so(dsn: str, conn: Connection, role: str, kind: str) -> None:
    with open_api(kind, dsn=dsn) as api:
        api.create("database", 1)
    conn.execute("grant pglimits_user, pglimits_reader, pglimits_admin to wrapper_stranger")
    conn.execute("alter role wrapper_stranger set default_transaction_read_only = on")
    with open_api(kind, dsn=make_conninfo(dsn, user=role)) as api:
        for call in (lambda: api.acquire("database"), lambda: api.create("other", 1)):
            with pytest.raises(ReadOnlyServer, match="target_session_attrs"):
                call()
        # What only looks still works.
        assert api.get("database").held == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_fails_within_is_unavailable(dsn: str, conn: Connection, kind: str) -> None:
    """It has no room for its files, or finds them broken."""
    with open_api(kind, dsn=dsn) as api:
        api.create("database", 1)
        conn.execute(
            "create function fails() returns trigger language plpgsql as"
            " $$ begin raise exception 'could not extend file' using errcode = 'internal_error'; end $$"
        )
        conn.execute("create trigger fails before insert on pglimits.leases execute function fails()")
        with pytest.raises(LimiterUnavailable, match="could not extend file"):
            api.acquire("database")
        conn.execute("drop trigger fails on pglimits.leases")
        assert api.release(api.acquire("database"))


# Behind PgBouncer.


@pytest.fixture
def bouncer(pooled: Callable[..., str]) -> str:
    """The test's database behind PgBouncer in transaction mode, with two server connections."""
    return pooled("transaction", size=2)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_works_behind_pgbouncer_by_polling_which_is_said_once(
    bouncer: str, conn: Connection, kind: str, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pglimits"), open_api(kind, dsn=bouncer) as api:
        api.create("database", 2)
        api.create("one", 1)
        api.create("api", 1, slot_decay_per_second=5)
        # Enough for psycopg to prepare statements, on either server connection, if nobody told it not to.
        futures = [api.start_block("database", lambda _: None) for _ in range(60)]
        for future in futures:
            future.result(60)
        lease = api.acquire("one", lease_duration=1)
        waits = [api.start("acquire", "one", holder=number, lease_duration=1) for number in range(3)]
        wait_until(lambda: waiting(conn, "one") == 3)
        in_order = [waiter.holder for waiter in api.waiters("one")]
        for number in in_order:
            api.release(lease)
            lease = waits[number].result(30)
        # Renewed while it is held, several times over.
        ends = value(conn, "select expires_at + interval '1 s' from pglimits.holders where name = 'one'")
        wait_until(lambda: value(conn, "select clock_timestamp() > %s", [ends]) or lease.lost)
        api.release(lease)
        api.rate_limit("api")
        api.rate_limit("api")
        sleeps = api.start("rate_limit", {"api": 1})
        wait_until(lambda: sleeps.done() or waiting(conn, "api") == 1)
        sleeps.result(30)
        wait_until(lambda: nothing_left(conn))
    said = [record for record in caplog.records if "LISTEN does not work" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_a_limit_prepares_nothing_behind_pgbouncer(bouncer: str, conn: Connection, kind: str) -> None:
    with open_api(kind, dsn=bouncer) as one, open_api(kind, dsn=bouncer) as other:
        one.create("database", 1)
        for limit in range(2, 20):
            one.update("database", limit=limit)
            other.update("database", limit=limit)
        assert other.get("database").limit == 19
    with psycopg.connect(bouncer, prepare_threshold=None) as connection:
        assert connection.execute("select name from pg_prepared_statements").fetchall() == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_session_of_the_server_is_left_to_hear_of_waiters_behind_pgbouncer(
    bouncer: str, conn: Connection, kind: str, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    """What it heard would go to whoever has it next, in the middle of something else."""
    with open_api(kind, dsn=bouncer) as api:
        api.create("database", 1)
        lease = api.acquire("database")
        waits = api.start("acquire", "database")
        wait_until(lambda: "LISTEN does not work" in caplog.text)
        channel = value(conn, "select channel from pglimits.queue")
        with psycopg.connect(bouncer) as one, psycopg.connect(bouncer) as other:
            # Each is in a transaction: these are the two that there are.
            assert value(one, "select pg_backend_pid()") != value(other, "select pg_backend_pid()")
            for connection in (one, other):
                assert (channel,) not in connection.execute("select pg_listening_channels()").fetchall()
        api.release(lease)
        assert api.release(waits.result(30))


def test_what_another_client_of_pgbouncer_listens_to_is_not_taken_for_news(
    bouncer: str, conn: Connection, connect: Any, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes to whoever has the session: a process that believed it heard would wait for news that never come."""
    with psycopg.connect(bouncer) as one, psycopg.connect(bouncer) as other:
        for connection in (one, other):
            connection.execute("listen somebody")
    noisy, over = connect(), threading.Event()

    def notify() -> None:
        while not over.is_set():
            noisy.execute("notify somebody")

    noise = threading.Thread(target=notify)
    noise.start()
    with open_api("sync", dsn=bouncer) as api, contextlib.ExitStack() as at_end:
        at_end.callback(noise.join)
        at_end.callback(over.set)
        api.create("database", 1)
        lease = api.acquire("database")
        waits = api.start("acquire", "database")
        wait_until(lambda: "LISTEN does not work" in caplog.text)
        api.release(lease)
        assert api.release(waits.result(30))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_rate_reaches_waiters_behind_pgbouncer(
    bouncer: str, conn: Connection, kind: str, wait_until: WaitUntil
) -> None:
    with open_api(kind, dsn=bouncer) as api:
        api.create("api", 1, slot_decay_per_second=0.001)
        api.rate_limit("api")
        sleeps = api.start("rate_limit", "api")
        wait_until(lambda: waiting(conn) == 1)
        api.update("api", slot_decay_per_second=1000)
        sleeps.result(30)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_many_waiters_behind_pgbouncer_is_served_in_order(
    bouncer: str, conn: Connection, kind: str, wait_until: WaitUntil
) -> None:
    with open_api(kind, dsn=bouncer) as api:
        api.create("database", 1)
        lease = api.acquire("database")
        order: list[int] = []
        blocks = []
        for number in range(8):
            blocks.append(api.start_block("database", lambda _, number=number: order.append(number)))
            wait_until(lambda number=number: waiting(conn) == number + 1)
        api.release(lease)
        for block in blocks:
            block.result(60)
        assert order == list(range(8))


@poolers.straight_only("it is said that LISTEN does not work")
def test_without_a_pooler_nothing_is_said_and_waiting_listens(
    api: Api, conn: Connection, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    waits = api.start("acquire", "database")
    wait_until(lambda: waiting(conn) == 1 and len(listeners(conn)) == 1)
    api.release(lease)
    api.release(waits.result(30))
    assert "LISTEN" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_whose_reply_was_lost_is_no_lost_lease(
    dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The server has released it; asked again, on another connection, it knows nothing of it any more."""
    lost: list[bool] = []
    lose_reply(monkeypatch, then=lambda: lost.append(True), of="_release_batch")
    with open_api(kind, dsn=dsn) as api:
        api.create("database", 1)
        assert api.block("database", lambda lease: "done", strict=True) == "done"
        assert len(lost) == 1
        assert nothing_left(conn)
