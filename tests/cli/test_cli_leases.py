"""holders, waiters, release, acquire, renew, rate."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]
Wait = Callable[..., Any]


@pytest.fixture(autouse=True)
def limits(conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('database', 2)")
    conn.execute("select pglimits.create_limit('api', 2, slot_decay_per_second => 0.001)")


def count(conn: Connection, view: str) -> int:
    row = conn.execute(f"select count(*) from pglimits.{view}".encode()).fetchone()
    assert row is not None
    return int(row[0])


def test_acquire_prints_the_id_of_a_lease_that_outlives_it(process: Cli, conn: Connection) -> None:
    result = process("acquire", "database", "--lease-duration", "600")
    assert (result.code, result.err) == (0, "")
    row = conn.execute(
        "select lease_id, slots, holder->>'pid', expires_at > now() + '9 minutes' from pglimits.holders"
    ).fetchone()
    assert row == (UUID(result.out.strip()), 1, str(os.getpid()), True)


def test_acquire_takes_all_or_none_of_several(pglimits: Cli, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('license', 2)")
    taken = pglimits("acquire", "database", "license", "--slots", "2", "--key", "t42", "-o", "json").json
    assert set(taken) == {"id", "fence", "fences", "expires_at", "enforced"}
    assert len(taken["fences"]) == 2 and taken["fence"] == taken["fences"][0] and taken["enforced"] is True
    assert datetime.fromisoformat(taken["expires_at"]).tzinfo is not None
    holders = pglimits("holders", "-o", "json").json
    assert [(row["name"], row["key"], row["slots"]) for row in holders] == [
        ("database", "t42", 2),
        ("license", "t42", 2),
    ]
    assert pglimits("acquire", "database", "license", "--key", "t42", "--timeout", "0").code == 75


def test_acquire_exits_with_75_when_there_is_no_slot_in_time(pglimits: Cli, conn: Connection) -> None:
    conn.execute("select pglimits.acquire('database', slots => 2)")
    for timeout in ("0", "2"):
        result = pglimits("acquire", "database", "--timeout", timeout, "-o", "json")
        assert (result.code, result.out) == (75, "")
        assert result.err.startswith("Error: no slot of 'database'")
    assert count(conn, "waiters") == 0


def test_acquire_exits_with_75_when_the_queue_is_full(pglimits: Cli, conn: Connection) -> None:
    conn.execute("select pglimits.update_limit('database', max_waiters => 0)")
    conn.execute("select pglimits.acquire('database', slots => 2)")
    assert pglimits("acquire", "database", "--timeout", "5").code == 75


def test_acquire_waits_for_a_release_and_goes_by_priority(
    pglimits: Cli, start: Callable[..., Any], conn: Connection, wait_until: Wait
) -> None:
    lease = pglimits("acquire", "database", "--slots", "2").out.strip()
    low = start("acquire", "database", "--slots", "2", "--timeout", "60")
    wait_until(lambda: count(conn, "waiters") == 1)
    high = start("acquire", "database", "--slots", "2", "--priority", "5")
    wait_until(lambda: count(conn, "waiters") == 2)
    assert [row["priority"] for row in pglimits("waiters", "database", "-o", "json").json] == [5, 0]
    pglimits("release", lease)
    first, _ = high.communicate(timeout=100)
    assert high.returncode == 0 and low.poll() is None
    pglimits("release", first.strip())
    low.communicate(timeout=100)
    assert low.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_acquire_waits_gives_up_its_place(
    start: Callable[..., Any], conn: Connection, wait_until: Wait, number: signal.Signals
) -> None:
    conn.execute("select pglimits.acquire('database', slots => 2)")
    waiting = start("acquire", "database")
    wait_until(lambda: count(conn, "waiters") == 1)
    waiting.send_signal(number)
    out, err = waiting.communicate(timeout=100)
    assert (waiting.returncode, out, err) == (128 + number, "", "")
    assert count(conn, "waiters") == 0


def test_a_lease_whose_id_nobody_could_read_is_given_back(start: Callable[..., Any], conn: Connection) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("acquire", "database", stdout=writer)
    os.close(writer)
    process.wait(timeout=100)
    assert process.returncode == 1
    assert count(conn, "holders") == 0


def test_a_missing_limit_is_a_warning_and_with_strict_an_error(process: Cli, conn: Connection) -> None:
    result = process("acquire", "nix", "-o", "json")
    assert result.code == 0 and result.json["enforced"] is False
    assert result.err.startswith("Warning: ") and "'nix'" in result.err
    strict = process("acquire", "nix", "database", "--strict")
    assert (strict.code, strict.out) == (1, "") and "'nix'" in strict.err
    assert count(conn, "holders") == 0


def test_what_no_request_can_be_is_refused_at_once(pglimits: Cli) -> None:
    for arguments in (("--slots", "0"), ("--timeout", "-1"), ("--lease-duration", "0.5"), ("--key", "a\nb")):
        assert pglimits("acquire", "database", *arguments).code == 2, arguments
    too_wide = pglimits("acquire", "database", "--slots", "3")
    assert too_wide.code == 1 and "'database'" in too_wide.err
    assert pglimits("acquire").code == 2


def test_release_ends_leases_and_may_be_repeated(pglimits: Cli) -> None:
    first, second = (pglimits("acquire", "database").out.strip() for _ in range(2))
    assert pglimits("release", first).out == f"Released {first}.\n"
    assert pglimits("release", first, second, "-o", "json").json == [
        {"lease_id": first, "released": False},
        {"lease_id": second, "released": True},
    ]
    again = pglimits("release", second)
    assert (again.code, again.out) == (0, f"{second} had ended already.\n")
    assert pglimits("release", "no-uuid").code == 2


def test_renew_moves_the_end_and_says_when_it_is_too_late(pglimits: Cli) -> None:
    taken = pglimits("acquire", "database", "-o", "json").json
    assert pglimits("renew", taken["id"], "--lease-duration", "3600").code == 0
    (holder,) = pglimits("holders", "-o", "json").json
    assert datetime.fromisoformat(holder["expires_at"]) > datetime.fromisoformat(taken["expires_at"])
    assert pglimits("renew", taken["id"], "-o", "json").json == {"lease_id": taken["id"], "renewed": True}
    pglimits("release", taken["id"])
    late = pglimits("renew", taken["id"])
    assert late.code == 1 and "has ended" in late.err
    assert pglimits("renew", str(uuid4())).code == 1


def test_what_holders_say_of_themselves_steers_no_terminal(pglimits: Cli, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('open', 3)")
    sly = {"host": "\x1b]0;title\x07\x1b[31m\x9b31m", "program": "x\n\rforged line", "\u202eturned": "\x7f\u2066"}
    ask = "select pglimits.acquire('open', key => U&'\\202Ek', timeout_seconds => null, holder => %s::jsonb)"
    for holder in (sly, "\x1b[2J\nforged line", ["\x1b[2J", "\x85"], sly, "\x1b[2J"):
        conn.execute(ask, [json.dumps(holder)])
    for arguments in (["holders"], ["waiters"], ["holders", "-o", "json"], ["waiters", "-o", "json"]):
        shown = pglimits(*arguments).out
        assert "open" in shown
        assert not [found for found in shown if found != "\n" and not found.isprintable()], shown
        assert not [line for line in shown.splitlines() if line.startswith("forged")], shown
    assert sly in [row["holder"] for row in pglimits("holders", "-o", "json").json]


def test_holders_shows_who_since_when_and_how_long_still(pglimits: Cli, conn: Connection) -> None:
    assert pglimits("holders").out == "Nobody holds a slot.\n"
    assert pglimits("holders", "database").out == "Nobody holds a slot of limit 'database'.\n"
    conn.execute(
        "select pglimits.acquire('database', key => 'k', holder => %s::jsonb)",
        [json.dumps({"host": "web-1", "pid": 4711, "program": "[i]job"})],
    )
    (row,) = pglimits("holders", "database", "-o", "json").json
    assert set(row) == {
        "lease_id", "name", "key", "slots", "holder", "fence", "priority", "acquired_at", "expires_at",
    }  # fmt: skip
    table = pglimits("holders").out
    assert "[i]job (pid 4711) on web-1" in table and row["lease_id"] in table
    assert pglimits("holders", "api", "-o", "json").json == []


def test_waiters_shows_who_waits_in_order(pglimits: Cli, conn: Connection) -> None:
    assert pglimits("waiters").out == "Nobody waits.\n"
    conn.execute("select pglimits.acquire('database', slots => 2)")
    for pid in (1, 2):
        conn.execute(
            "select pglimits.acquire('database', timeout_seconds => null, holder => %s::jsonb)",
            [json.dumps({"pid": pid})],
        )
    rows = pglimits("waiters", "-o", "json").json
    assert [(row["position"], row["holder"]["pid"]) for row in rows] == [(1, 1), (2, 2)]
    table = pglimits("waiters", "database").out
    assert table.index(rows[0]["lease_id"]) < table.index(rows[1]["lease_id"])


def test_lease_ids_are_never_folded(pglimits: Cli, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    conn.execute("select pglimits.create_limit(%s, 2)", ["a long name of a limit that folds"])
    conn.execute(
        "select pglimits.acquire(%s, key => 'a long key as well', holder => %s::jsonb)",
        ["a long name of a limit that folds", json.dumps({"host": "h" * 60, "pid": 1, "program": "a long program"})],
    )
    monkeypatch.setenv("COLUMNS", "80")
    (row,) = pglimits("holders", "-o", "json").json
    out = pglimits("holders").out
    assert row["lease_id"] in out and out.count("h") >= 60
    assert max(map(len, out.splitlines())) <= 80


def test_rate_takes_a_turn_or_says_that_it_comes_too_late(pglimits: Cli) -> None:
    result = pglimits("rate", "api", "--slots", "2")
    assert (result.code, result.out, result.err) == (0, "", "")
    late = pglimits("rate", "api", "--timeout", "1")
    assert late.code == 75 and late.err.startswith("Error: ")
    assert pglimits("reset", "api", "--yes").code == 0
    assert pglimits("rate", "api", "-o", "json").json == {"names": ["api"], "slots": 1, "key": "", "granted": True}


def test_rate_needs_a_limit_with_decay(pglimits: Cli) -> None:
    result = pglimits("rate", "database")
    assert result.code == 1 and "'database'" in result.err
    assert pglimits("rate", "nix").code == 0
    assert pglimits("rate", "nix", "--strict").code == 1


def test_a_signal_while_rate_sleeps_gives_up_its_turn(
    start: Callable[..., Any], pglimits: Cli, conn: Connection, wait_until: Wait
) -> None:
    pglimits("rate", "api", "--slots", "2")
    sleeping = start("rate", "api")
    wait_until(lambda: count(conn, "waiters") == 1)
    sleeping.send_signal(signal.SIGTERM)
    sleeping.communicate(timeout=100)
    assert sleeping.returncode == 128 + signal.SIGTERM
    assert count(conn, "waiters") == 0
