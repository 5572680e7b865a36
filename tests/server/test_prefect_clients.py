"""An unmodified Prefect, its command line and its library, works against ``pglimits serve``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from documents import blocks
from prefecttest import Prefect, Process, _prefect, gcl, looks, most_at_once, notes, prefect

Connection = Any
__all__ = ["_prefect", "gcl", "looks", "prefect"]


def test_each_command_and_flag_of_prefect_gcl(gcl: Callable[..., str], looks: Connection, tmp_path: Path) -> None:
    def limit(name: str) -> Any:
        columns = (
            'select "limit", held, active, slot_decay_per_second, round(level) from pglimits.limits where name = %s'
        )
        return looks.execute(columns, [name]).fetchone()

    assert "No global concurrency limits found" in gcl("ls")
    assert "Created global concurrency limit with name 'jobs'" in gcl("create", "jobs", "--limit", "10")
    assert limit("jobs") == (10, 0, True, 0, 0)
    assert "already exists" in gcl("create", "jobs", "--limit", "10", code=1)
    gcl("create", "tag:a b", "-l", "3", "--active-slots", "2")
    gcl("create", "mails", "-l", "5", "--slot-decay-per-second", "0.001", "--active-slots", "4", "--disable")
    assert limit("tag:a b") == (3, 2, True, 0, 0)
    assert limit("mails") == (5, 0, False, 0.001, 4)
    listed = {limit["name"]: limit for limit in json.loads(gcl("ls", "-o", "json"))}
    assert list(listed) == ["jobs", "mails", "tag:a b"]
    assert [limit["active_slots"] for limit in listed.values()] == [0, 4, 2]
    assert [limit["slot_decay_per_second"] for limit in listed.values()] == [0, 0.001, 0]
    table = gcl("ls")
    assert all(word in table for word in ("jobs", "tag:a b", "mails", "Active Slots", listed["jobs"]["id"]))

    assert "name='jobs'" in gcl("inspect", "jobs")
    gcl("inspect", "jobs", "--output", "json", "--file", str(tmp_path / "jobs.json"))
    assert json.loads((tmp_path / "jobs.json").read_text()) == listed["jobs"]
    assert "not found" in gcl("inspect", "none", code=1)

    assert "already enabled" in gcl("enable", "jobs", code=1)
    assert "Disabled" in gcl("disable", "jobs")
    assert limit("jobs") == (10, 0, False, 0, 0)
    assert "already disabled" in gcl("disable", "jobs", code=1)
    assert "Enabled" in gcl("enable", "jobs")

    assert "Updated" in gcl("update", "jobs", "--limit", "7", "--active-slots", "6")
    assert limit("jobs") == (7, 6, True, 0, 0)
    gcl("update", "jobs", "--active-slots", "1")
    gcl("update", "jobs", "--slot-decay-per-second", "0.25", "--disable")
    assert limit("jobs")[:4] == (7, 1, False, 0.25)
    gcl("update", "jobs", "--enable")
    assert limit("jobs")[:4] == (7, 1, True, 0.25)
    assert "not found" in gcl("update", "none", "--limit", "1", code=1)
    assert "active_slots is greater" in gcl("update", "tag:a b", "--active-slots", "9", code=1)

    assert "Deleted" in gcl("delete", "jobs")
    assert "not found" in gcl("delete", "jobs", code=1)
    assert limit("jobs") is None


def test_the_examples_of_the_document_run(
    prefect: Prefect, gcl: Callable[..., str], looks: Connection, tmp_path: Path
) -> None:
    (session,), (example,) = blocks("docs/prefect-api.md", "sh"), blocks("docs/prefect-api.md", "py")
    _, *commands = session.code.splitlines()  # the first line names the server: the one of the tests
    for command in commands:
        gcl(*command.removeprefix("prefect gcl ").split())
    ended = prefect.run("program", example.code)
    assert (ended.code, ended.out) == (0, "two slots of the database\n"), ended.err_file.read_text()
    looks.execute("select pglimits.delete_limit('database')")


def test_eight_processes_contend_without_too_many_at_once(prefect: Prefect, looks: Connection, tmp_path: Path) -> None:
    looks.execute("select pglimits.create_limit('pair', 2), pglimits.create_limit('wide', 5)")
    diary, go = tmp_path / "diary", tmp_path / "go"
    started = [
        prefect.start("take_turns", str(diary), f"p{n}", ["pair", "wide"][: 1 + n % 2], 5, 0.1, str(go))
        for n in range(8)
    ]
    go.touch()
    for process in started:
        assert process.wait().code == 0
    assert len([note for note in notes(diary) if note.what == "begins"]) == 40
    assert most_at_once(diary) == 2
    left = looks.execute("select held, waiting, limit_id from pglimits.limits join pglimits.configs using (name)")
    assert [row[:2] for row in left] == [(0, 0), (0, 0)]


def test_those_who_wait_go_in_order_of_arrival(
    prefect: Prefect, looks: Connection, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    looks.execute("select pglimits.create_limit('one', 1), pglimits.create_limit('warm-up', 8)")
    diary, done = tmp_path / "diary", tmp_path / "done"
    options = {"timeout_seconds": 60, "lease_duration": 60}
    started = [
        prefect.start("hold", str(diary), str(n), ["one"], str(done), options, str(tmp_path / f"go{n}"))
        for n in range(8)
    ]
    in_it = "select held, waiting from pglimits.limits where name = 'one'"
    wait_until(lambda: looks.execute("select held from pglimits.limits where name = 'warm-up'").fetchone() == (8,))
    for n in range(8):
        (tmp_path / f"go{n}").touch()
        wait_until(lambda: looks.execute(in_it).fetchone() == (1, n))
    done.touch()
    for process in started:
        process.wait()
    assert [note.who for note in notes(diary) if note.what == "begins"] == [str(n) for n in range(8)]
    assert most_at_once(diary) == 1


def test_a_rate_is_delivered_exactly(prefect: Prefect, looks: Connection, tmp_path: Path) -> None:
    looks.execute("select pglimits.create_limit('ten', 2, 10), pglimits.create_limit('warm-up', 100, 100)")
    diary, until, warm = tmp_path / "diary", tmp_path / "until", tmp_path / "warm"
    started = [prefect.start("use_rate", str(diary), str(n), ["ten"], str(until), str(warm)) for n in range(8)]
    while len(notes(warm)) < 8:
        time.sleep(0.05)
    while len(notes(diary)) < 10:
        time.sleep(0.05)
    now = """select extract(epoch from clock_timestamp())::float8, c.granted_slots, c.level
             from pglimits.counters c where c.name = 'ten'"""
    for _ in range(6):  # a machine that stands still for a moment delivers less meanwhile: not again and again
        began, granted_before, level_before = looks.execute(now).fetchone()
        time.sleep(10.5)
        ended, granted_after, level_after = looks.execute(now).fetchone()
        # What decayed was granted anew. What was used ahead, or is still free, is neither won nor lost.
        granted = granted_after - granted_before
        delivered = (granted - (level_after - level_before)) / (10 * (ended - began))
        assert delivered <= 1.01
        if delivered >= 0.99:
            break
    until.touch()
    for process in started:
        process.wait()
    assert delivered >= 0.99
    # Each grant was told to one client: but for those on their way, they have written down as many.
    went = [note for note in notes(diary) if began <= note.at <= ended]
    assert abs(len(went) - granted) <= 8
    assert len({note.who for note in notes(diary)}) == 8


def test_it_acts_as_prefect_documents(prefect: Prefect, looks: Connection) -> None:
    looks.execute(
        """select pglimits.create_limit('one', 1), pglimits.create_limit('off', 1, active => false),
                  pglimits.create_limit('shut', 0), pglimits.create_limit('rate', 1, 0.01)"""
    )
    looks.execute("select * from pglimits.acquire('one'); select * from pglimits.rate_limit('rate')")
    process = prefect.start(
        "try_each",
        {"names": ["none"]},
        {"names": ["none"], "strict": True},
        {"names": ["none", "off"], "strict": True},
        {"names": [], "strict": True},
        {"names": ["off"], "strict": True, "occupy": 1},
        {"names": ["one"], "occupy": 2},
        {"names": ["one"], "max_retries": 0},
        {"names": ["one"], "timeout_seconds": 0.3},
        {"names": ["one"], "timeout_seconds": 0.3},
        {"names": ["one", "none"], "max_retries": 0, "strict": True},
        {"names": ["shut"], "timeout_seconds": 0.3},
        {"names": ["one"], "lease_duration": 0.5},
        {"names": ["{one,two}"]},
    ).wait()
    refused = "ConcurrencySlotAcquisitionError: "
    late = "AcquireConcurrencySlotTimeoutError: Attempt to acquire concurrency slots timed out after 0.3 second(s)"
    said = [ended for ended, took_long in process.said if not took_long]
    assert said[:12] == [
        "held",
        f"{refused}Concurrency limits ['none'] must be created before acquiring slots",
        "held",
        "held",
        "held",
        f"{refused}Unable to acquire concurrency slots on ['one']: 422 Unprocessable Entity: "
        "Slots requested is greater than the limit",
        f"{refused}Unable to acquire concurrency slots on ['one']: 423 Locked: Locked",
        late,
        late,
        f"{refused}Unable to acquire concurrency slots on ['one', 'none']: 423 Locked: Locked",
        late,
        f"{refused}Unable to acquire concurrency slots on ['one']: 422 Unprocessable Entity: "
        "lease_duration: Input should be greater than or equal to 1",
    ]
    assert said[12].startswith(f"{refused}Unable to acquire concurrency slots on ['{{one,two}}']: 422")
    assert looks.execute("select held, waiting from pglimits.limits where name in ('one', 'shut')").fetchall() == [
        (1, 0), (0, 0),
    ]  # fmt: skip


def test_leases_live_as_long_as_their_clients(
    prefect: Prefect, looks: Connection, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    looks.execute(
        """select pglimits.create_limit('renewed', 1), pglimits.create_limit('killed', 1),
                  pglimits.create_limit('lost', 1), pglimits.create_limit('lost-task', 1),
                  pglimits.create_limit('lost-and-on', 1)"""
    )
    until = tmp_path / "until"
    short = {"lease_duration": 4}  # Prefect renews when three quarters of it are over

    def begun(diary: Path) -> bool:
        return any(note.what == "begins" for note in notes(diary))

    def hold(name: str, who: str, **options: Any) -> tuple[Process, Path]:
        diary = tmp_path / f"{name}-{who}"
        return prefect.start("hold", str(diary), who, [name], str(until), {**short, **options}), diary

    renewed, renewed_diary = hold("renewed", "r")
    killed, killed_diary = hold("killed", "k")
    strict, strict_diary = hold("lost", "s", strict=True)
    lax, lax_diary = hold("lost-and-on", "l")
    task_diary = tmp_path / "task"
    task = prefect.start(
        "hold_until_cancelled", str(task_diary), ["lost-task"], {**short, "raise_on_lease_renewal_failure": True}
    )
    for diary in (renewed_diary, killed_diary, strict_diary, lax_diary, task_diary):
        wait_until(lambda diary=diary: begun(diary))

    # A killed client's slot comes back at its lease's end, to who waits.
    killed.kill()
    dead = looks.execute("select expires_at from pglimits.holders where name = 'killed'").fetchone()
    heir, heir_diary = hold("killed", "heir")
    wait_until(lambda: begun(heir_diary))
    took = looks.execute("select acquired_at from pglimits.holders where name = 'killed'").fetchone()
    assert dead is not None
    assert took[0] >= dead[0]

    # A lease that somebody ends is lost: with strict, what runs under it is ended.
    looks.execute("select pglimits.release(lease_id) from pglimits.holders where name like 'lost%'")
    wait_until(lambda: any(note.what == "cancelled" for note in notes(task_diary)))
    wait_until(lambda: any(note.what == "cancelled" for note in notes(strict_diary)))
    assert task.wait().code == strict.wait().code == 0
    assert "Terminating execution to prevent over-allocation" in strict.err_file.read_text()
    wait_until(lambda: "Execution will continue" in lax.err_file.read_text())

    # One that is renewed lives on.
    lasted = "select expires_at - acquired_at > interval '9 seconds' from pglimits.holders where name = 'renewed'"
    wait_until(lambda: looks.execute(lasted).fetchone() == (True,))
    until.touch()
    for process in (renewed, heir, lax):
        assert process.wait().code == 0
    assert looks.execute("select sum(held) from pglimits.limits").fetchone() == (0,)


def test_methods_of_prefects_client(prefect: Prefect, looks: Connection) -> None:
    both = {"names": ["a", "b"], "slots": 2}
    process = prefect.run(
        "by_client",
        [
            ["api_healthcheck", {}],
            ["hello", {}],
            ["api_version", {}],
            ["upsert_global_concurrency_limit_by_name", {"name": "a", "limit": 3}],
            ["upsert_global_concurrency_limit_by_name", {"name": "a", "limit": 5}],
            ["upsert_global_concurrency_limit_by_name", {"name": "b", "limit": 4}],
            ["read_global_concurrency_limit_by_name", {"name": "a"}],
            ["read_global_concurrency_limits", {"limit": 1, "offset": 1}],
            ["increment_concurrency_slots", {**both, "mode": "concurrency"}],
            ["increment_concurrency_slots", {**both, "mode": "concurrency"}],
            ["increment_concurrency_slots", {**both, "mode": "concurrency"}],
            ["increment_concurrency_slots", {**both, "mode": "rate_limit"}],
            ["release_concurrency_slots", {**both, "occupancy_seconds": 1.5}],
            ["release_concurrency_slots", {"names": ["a"], "slots": 1, "occupancy_seconds": 1.5}],
            ["delete_global_concurrency_limit_by_name", {"name": "none"}],
        ],
    )
    healthy, hello, version, _, _, _, a, listed, *rest = process.said
    assert (healthy, hello, version.count(".")) == ("None", [200, "👋"], 2)
    assert (a["name"], a["limit"], a["active_slots"]) == ("a", 5, 0)
    assert [limit["name"] for limit in listed] == ["b"]
    first, second, third, rate, given_back, one_more, missing = rest
    assert first == second == given_back
    assert [limit["name"] for limit in first[1]] == ["a", "b"]
    assert "423 Locked" in third
    assert "do not have a decay configured: 'a,b'" in rate
    assert one_more[0] == 200
    assert missing.startswith("ObjectNotFound")
    assert looks.execute("select name, held from pglimits.limits").fetchall() == [("a", 1), ("b", 2)]
