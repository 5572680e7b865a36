"""A read-only standby: it answers who only looks, and says clearly that it cannot grant."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import Cluster, cluster
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner
from wrappertest import WaitUntil, open_api, open_every

from pglimits import AcquireTimeout, ReadOnlyServer, _embedded, _install

HELD = "11111111-1111-1111-1111-111111111111"
WAITS = "22222222-2222-2222-2222-222222222222"
OTHER = "33333333-3333-3333-3333-333333333333"


@pytest.fixture(scope="module")
def pair(server: Any) -> Iterator[tuple[Cluster, Cluster]]:
    """A primary and its standby, with a limit that is full, somebody in line, and limits that are not."""
    chosen = _embedded.Binaries(server.bin, server.version)
    with cluster(chosen, {"fsync": "off"}) as primary, cluster(chosen, {"fsync": "off"}) as own:
        _install.install(primary.start())
        primary.sql("select pglimits.create_limit('full', 1), pglimits.create_limit('free', 2)")
        primary.sql("select pglimits.create_limit('api', 1, 0.001), pglimits.create_limit('off', 1, active => false)")
        primary.sql("select pglimits.acquire('full', lease_id => %s, holder => '{\"job\": 7}')", HELD)
        primary.sql("select pglimits.acquire('full', lease_id => %s, timeout_seconds => null)", WAITS)
        primary.sql("update pglimits.queue set expires_at = now() + interval '1 hour'")
        primary.sql("select pglimits.rate_limit('api')")
        primary.sql("select pglimits.create_limit('many', 10), pglimits.create_limit('shut', 0)")
        own.follow(primary)
        yield primary, own


@pytest.fixture
def standby(pair: tuple[Cluster, Cluster]) -> Cluster:
    return pair[1]


def test_views_answer_as_of_what_was_replicated(standby: Cluster) -> None:
    assert standby.sql("select name, held, waiting from pglimits.limits order by name") == [
        ("api", 0, 0), ("free", 0, 0), ("full", 1, 1), ("many", 0, 0), ("off", 0, 0), ("shut", 0, 0)]  # fmt: skip
    assert standby.sql("select name, lease_id::text from pglimits.holders") == [("full", HELD)]
    assert standby.sql("select lease_id::text, position from pglimits.waiters") == [(WAITS, 1)]


def test_peek_answers_as_it_writes_nothing(standby: Cluster) -> None:
    for question, status in (
        ("peek('free')", "granted"),
        ("peek('full')", "refused"),
        ("peek('full', timeout_seconds => null)", "queued"),
        ("peek_all('{full,free}')", "refused"),
        ("peek('api', for_rate => true)", "refused"),
    ):
        assert standby.sql(f"select status from pglimits.{question}") == [(status,)], question


BATCH = "'{1}', '{\"\"}', %s, 0, 300, 0, array[%s]::uuid[], '[null]', false, false, null"
READING = [
    "peek('free')",
    "peek_all('{free,full}')",
    "version()",
    "errors()",
    "cron_disable()",
    "history('free')",
    "sparklines('{free}')",
    "why_waiting('full')",
    "last_sweep()",
    "_locked_by('{free}', '{\"\"}')",
]
WRITING = [
    "acquire('free')",
    "acquire('shut')",
    "acquire('missing')",
    "acquire('off')",
    "acquire('full', timeout_seconds => null)",
    "acquire_all('{free,full}', timeout_seconds => null)",
    "acquire_wait('free')",
    "acquire_wait('missing')",
    "rate_limit('api')",
    "rate_limit('api', timeout_seconds => null)",
    "rate_limit_all('{api}', timeout_seconds => null)",
    "rate_limit_wait('api')",
    f"renew('{HELD}')",
    f"renew_all('{{{OTHER}}}')",
    f"release('{HELD}')",
    f"release('{OTHER}')",
    f"release_all('{{{HELD}}}')",
    f"release_wait('{HELD}')",
    f"settle('{HELD}', 'api', 1)",
    f"settle_all('{HELD}', '{{api}}', '{{1}}')",
    f"_acquire_batch('{{free}}', {BATCH % ('false', repr(OTHER))})",
    f"_acquire_batch('{{shut}}', {BATCH % ('false', repr(OTHER))})",
    f"_acquire_batch('{{api}}', {BATCH % ('true', repr(OTHER))})",
    f"_release_batch('{{{HELD}}}')",
    f"_watch('{{{WAITS}}}', false)",
    "_beat('pglimits_abc')",
    "create_limit('new', 1)",
    "update_limit('free', 3)",
    "delete_limit('free')",
    "adjust('api', 1)",
    "reset('full')",
    "reset('free')",
    "sweep()",
    f"force_release('{HELD}')",
    "keep_history(60)",
]


@pytest.mark.parametrize("call", WRITING)
def test_what_writes_is_refused_by_its_sqlstate(standby: Cluster, call: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        standby.sql(f"{'call' if call.startswith(PROCEDURES) else 'select'} pglimits.{call}")
    assert caught.value.sqlstate == "25006"


PROCEDURES = ("acquire_wait", "rate_limit_wait", "release_wait")


def test_the_refusal_says_what_to_do(standby: Cluster) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction, match="standby") as caught:
        standby.sql("select pglimits.acquire('free')")
    assert "primary" in (caught.value.diag.message_hint or "")


def test_every_public_function_either_reads_or_writes(standby: Cluster) -> None:
    public = standby.sql(
        "select distinct proname::text from pg_proc"
        " where pronamespace = 'pglimits'::regnamespace and left(proname, 1) <> '_'"
    )
    calls = {call.split("(")[0] for call in (*READING, *WRITING)}
    # It is refused for want of pg_cron, wherever it is called.
    assert {name for (name,) in public} == {name for name in calls if name[0] != "_"} | {"cron_enable"}
    for call in READING:
        standby.sql(f"select pglimits.{call}")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_clients_look_and_are_told_what_cannot_be_granted(standby: Cluster, kind: str) -> None:
    with open_api(kind, dsn=standby.dsn) as api:
        assert api.get("full").held == 1
        assert [limit.name for limit in api.list()] == ["api", "free", "full", "many", "off", "shut"]
        assert [str(holder.lease_id) for holder in api.holders()] == [HELD]
        assert [str(waiter.lease_id) for waiter in api.waiters()] == [WAITS]
        assert api.peek("free").status == "granted"
        for call in (
            lambda: api.acquire("free"),
            lambda: api.acquire("full"),
            lambda: api.block("free", lambda _: None),
            lambda: api.rate_limit("api"),
            lambda: api.create("new", 1),
            lambda: api.update("free", limit=3),
            lambda: api.upsert("free", limit=3),
            lambda: api.delete("free"),
            lambda: api.reset("full"),
            lambda: api.adjust("api", 1),
            lambda: api.release(HELD),
            lambda: api.sweep(),
        ):
            with pytest.raises(ReadOnlyServer, match=r"connect to the primary.*target_session_attrs=read-write"):
                call()


def command(standby: Cluster, *arguments: str) -> Any:
    from pglimits_cli._app import app

    result = CliRunner().invoke(app, [*arguments[:1], "--dsn", standby.dsn, *arguments[1:]], prog_name="pglimits")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    "arguments", [("ls",), ("holders",), ("holders", "full"), ("waiters",), ("waiters", "full"), ("inspect", "full")]
)
def test_commands_that_look_work(standby: Cluster, arguments: tuple[str, ...]) -> None:
    shown = command(standby, *arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "full" in shown.stdout
    rows = json.loads(command(standby, *arguments, "-o", "json").stdout)
    assert "full" in [row["name"] for row in ([rows] if isinstance(rows, dict) else rows)]


def test_the_doctor_says_that_nothing_can_be_granted_here(standby: Cluster) -> None:
    shown = command(standby, "doctor")
    assert shown.exit_code == 1
    assert "standby" in shown.stdout
    assert "target_session_attrs" in shown.stdout
    shown = json.loads(command(standby, "doctor", "-o", "json").stdout)
    assert [each["check"] for each in shown["checks"] if each["status"] == "fail"] == ["writable"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("acquire", "free"),
        ("rate", "api", "--timeout", "3600"),
        ("run", "free", "--", "echo", "at work"),
        ("create", "new", "--limit", "1"),
        ("update", "free", "--limit", "3"),
        ("disable", "free"),
        ("delete", "free", "--yes"),
        ("reset", "full", "--yes"),
        ("release", HELD),
        ("renew", HELD),
        ("sweep",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_change_something_say_that_they_cannot(standby: Cluster, arguments: tuple[str, ...]) -> None:
    said = command(standby, *arguments)
    assert said.exit_code == 1
    assert "read-only" in said.stderr
    assert "target_session_attrs=read-write" in said.stderr
    assert "at work" not in said.stdout


def test_who_was_sent_to_a_standby_finds_the_primary_once_the_address_leads_there(
    pair: tuple[Cluster, Cluster],
) -> None:
    primary, standby = pair
    address = Path(tempfile.mkdtemp(prefix="pgl-")) / "address"
    address.symlink_to(standby.place.sockets)
    try:
        with open_every(make_conninfo(primary.dsn, host=str(address))) as apis:
            waits = {}
            for name, api in apis.items():
                api.list()
                if name.endswith("raises"):
                    with pytest.raises(ReadOnlyServer):
                        api.acquire("many")
                else:
                    waits[name] = api.start("acquire", "many", timeout_seconds=60)
            address.unlink()
            address.symlink_to(primary.place.sockets)
            for name, api in apis.items():
                assert api.release(waits[name].result(60) if name in waits else api.acquire("many"))
    finally:
        shutil.rmtree(address.parent)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_deadline_holds_while_commits_wait_for_a_standby_that_is_not_there(
    pair: tuple[Cluster, Cluster], kind: str, wait_until: WaitUntil
) -> None:
    primary, _ = pair
    with open_api(kind, dsn=primary.dsn) as api:
        api.list()
        try:
            synchronous(primary, "nobody")
            waits = api.start("acquire", "many", timeout_seconds=0.5)
            wait_until(lambda: primary.sql("select 1 from pg_stat_activity where wait_event = 'SyncRep'"))
            with pytest.raises(AcquireTimeout):
                waits.result(60)
        finally:
            synchronous(primary, "")
        wait_until(lambda: waits.done())


def synchronous(primary: Cluster, standbys: str) -> None:
    primary.sql(f"alter system set synchronous_standby_names = '{standbys}'")
    primary.sql("select pg_reload_conf()")
    primary.sql("select pg_sleep(0.2)")
