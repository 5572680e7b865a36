"""watch, events, history: what goes on and what went on, as processes print it; and release --force."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]
Start = Callable[..., "subprocess.Popen[str]"]
Wait = Callable[..., Any]


class Reader:
    """The lines that a process prints, as they come."""

    def __init__(self, process: subprocess.Popen[str], stream: Any = None) -> None:
        self.process = process
        self._lines: queue.Queue[str] = queue.Queue()
        stream = process.stdout if stream is None else stream
        threading.Thread(target=lambda: [self._lines.put(line) for line in stream], daemon=True).start()

    def line(self) -> str:
        return self._lines.get(timeout=60).rstrip("\n")

    def object(self) -> Any:
        return json.loads(self.line())

    def until(self, *texts: str) -> str:
        """The next line that has all this in it."""
        line = self.line()
        while not all(text in line for text in texts):
            line = self.line()
        return line

    def rest(self) -> list[str]:
        lines = []
        with contextlib.suppress(queue.Empty):
            while True:
                lines.append(self._lines.get_nowait())
        return lines


@pytest.fixture(autouse=True)
def limits(conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('database', 2), pglimits.create_limit('api', 5, 0.5)")


def acquire(conn: Connection, name: str, lease: UUID | None = None, **options: Any) -> None:
    named = "".join(f", {option} => %({option})s" for option in options)
    conn.execute(
        f"select pglimits.acquire(%(name)s, lease_id => %(lease)s{named})".encode(),
        {"name": name, "lease": lease or uuid4(), **options},
    )


@contextlib.contextmanager
def without_the_database(conn: Connection, server: Any) -> Iterator[None]:
    """Nobody can reach the test's database inside."""
    name = conn.info.dbname
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as elsewhere:
        elsewhere.execute(f'alter database "{name}" allow_connections false'.encode())
        elsewhere.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
        try:
            yield
        finally:
            elsewhere.execute(f'alter database "{name}" allow_connections true'.encode())


# watch


def test_watch_prints_a_line_whenever_something_changes(start: Start, conn: Connection) -> None:
    watching = Reader(start("watch", "database"))
    assert "held 0/2  waiting 0  idle" in watching.line()
    lease = uuid4()
    acquire(conn, "database", lease, slots=2)
    assert watching.until("held 2/2").endswith("at capacity")
    conn.execute("select pglimits.update_limit('database', 5)")
    assert "active" in watching.until("held 2/5")
    conn.execute("select pglimits.release(%s)", [lease])
    watching.until("held 0/5", "idle")
    conn.execute("select pglimits.update_limit('database', active => false)")
    assert watching.until("off")
    watching.process.send_signal(signal.SIGINT)
    assert watching.process.wait(60) == 130
    assert watching.process.stderr is not None and watching.process.stderr.read() == ""


def test_watch_prints_json_lines_and_a_level_that_decays(start: Start, conn: Connection) -> None:
    conn.execute("select pglimits.update_limit('api', 500)")
    conn.execute("select pglimits.rate_limit('api', 500)")  # gone in 1000 seconds
    watching = Reader(start("watch", "api", "-o", "json"))
    first, second = watching.object(), watching.object()
    assert set(first) == {
        "at", "name", "limit", "active", "slot_decay_per_second", "held", "waiting", "level", "leases", "keys",
        "grants", "oldest_wait", "grants_per_second", "state", "reason",
    }  # fmt: skip
    assert first["grants_per_second"] is None and (first["name"], first["limit"]) == ("api", 500)
    assert second["level"] < first["level"] and second["at"] > first["at"]


def test_watch_prints_at_every_tick_if_it_is_told_to(start: Start) -> None:
    watching = Reader(start("watch", "database", "--every", "0.1"))
    assert len({watching.line() for _ in range(3)}) >= 1
    watching.process.send_signal(signal.SIGTERM)
    assert watching.process.wait(60) == 128 + signal.SIGTERM


def test_watch_of_a_missing_limit_says_which_may_have_been_meant(process: Cli) -> None:
    result = process("watch", "databse")
    assert (result.code, result.out) == (1, "")
    assert result.err == "Error: there is no limit named 'databse': did you mean 'database'?\n"


def test_watch_ends_when_its_limit_is_deleted(start: Start, conn: Connection) -> None:
    watching = Reader(start("watch", "database"))
    watching.line()
    conn.execute("select pglimits.delete_limit('database')")
    assert watching.process.wait(60) == 1
    assert watching.process.stderr is not None and "no limit named 'database'" in watching.process.stderr.read()


@pytest.mark.parametrize("command", [("watch", "database"), ("events", "--follow")])
def test_a_reader_that_leaves_ends_it_quietly(start: Start, command: tuple[str, ...]) -> None:
    watching = start(*command)
    assert watching.stdout is not None and watching.stderr is not None
    if command[0] == "watch":
        watching.stdout.readline()
    watching.stdout.close()
    assert watching.wait(60) == 1
    assert watching.stderr.read() == ""
    watching.stdout = None


def test_watch_survives_a_database_that_is_away(start: Start, conn: Connection, server: Any, server_dsn: str) -> None:
    watching = Reader(start("watch", "database", "--dsn", server_dsn))
    said = Reader(watching.process, watching.process.stderr)
    watching.line()
    with without_the_database(conn, server):
        assert said.line().endswith("; it is tried again")
    with psycopg.connect(server_dsn, autocommit=True) as again:
        acquire(again, "database")
    watching.until("held 1/2")
    assert said.line() == "Warning: the database can be reached again"
    assert said.rest() == []


# events


def test_events_tell_what_happened_oldest_first(pglimits: Cli, conn: Connection) -> None:
    conn.execute("select pglimits.update_limit('database', 3, active => false)")
    conn.execute("select pglimits.delete_limit('api')")
    assert pglimits("events", "-o", "json", "--limit", "1").json[0]["kind"] == "deleted"
    found = pglimits("events", "-o", "json").json
    assert [(event["kind"], event["name"]) for event in found] == [
        ("created", "database"), ("created", "api"), ("updated", "database"), ("deleted", "api"),
    ]  # fmt: skip
    assert (found[2]["old"], found[2]["new"]) == ({"limit": 2, "active": True}, {"limit": 3, "active": False})
    assert found[2]["by"]["user"] == conn.info.user and datetime.fromisoformat(found[2]["at"]).tzinfo is not None
    lines = pglimits("events").out.splitlines()
    assert len(lines) == 4
    assert "created" in lines[0] and "database" in lines[0] and "limit 2" in lines[0]
    assert "updated" in lines[2] and "limit 2 → 3" in lines[2] and "active yes → no" in lines[2]
    assert f"by {conn.info.user}" in lines[2]
    assert [event["name"] for event in pglimits("events", "--name", "api", "-o", "json").json] == ["api", "api"]
    assert [event["kind"] for event in pglimits("events", "--kind", "updated", "-o", "json").json] == ["updated"]
    assert pglimits("events", "--name", "nix").out == "Nothing is known to have happened.\n"
    assert pglimits("events", "--name", "nix", "-o", "json").json == []
    wrong = pglimits("events", "--kind", "lots")
    assert (wrong.code, wrong.out) == (2, "") and "force_released" in wrong.err


def test_a_lease_that_nobody_gave_back_is_an_event_that_names_its_holder(
    pglimits: Cli, conn: Connection, clock: Any
) -> None:
    lease = uuid4()
    acquire(conn, "database", lease, slots=2, holder='{"program": "job.py\\n", "host": "worker"}', lease_duration=60)
    clock.advance(61)
    conn.execute("select pglimits.acquire('database')")
    (event,) = pglimits("events", "--kind", "expired", "-o", "json").json
    assert (event["lease_id"], event["slots"], event["holder"]["host"]) == (str(lease), 2, "worker")
    assert event["held_seconds"] >= 60
    (line,) = pglimits("events", "--kind", "expired").out.splitlines()
    assert "2 slots for 1m" in line and "job.py\\n on worker" in line and str(lease) in line


def test_follow_shows_what_was_and_goes_on(start: Start, conn: Connection) -> None:
    following = Reader(start("events", "--follow", "--limit", "1", "-o", "json"))
    assert following.object()["name"] == "api"
    conn.execute("select pglimits.update_limit('database', n) from generate_series(3, 6) n")
    assert [following.object()["new"] for _ in range(4)] == [{"limit": limit} for limit in (3, 4, 5, 6)]
    conn.execute("select pglimits.delete_limit('api')")
    assert following.object()["kind"] == "deleted"
    following.process.send_signal(signal.SIGINT)
    assert following.process.wait(60) == 130


def test_follow_shows_only_what_was_asked_for(
    start: Start, conn: Connection, wait_until: Wait, server_dsn: str
) -> None:
    following = Reader(
        start("events", "-f", "--name", "database", "--kind", "updated", "--limit", "0", "--dsn", server_dsn)
    )
    wait_until(lambda: is_listening(conn))
    conn.execute("select pglimits.update_limit('api', 7), pglimits.update_limit('database', 8)")
    conn.execute("select pglimits.delete_limit('database')")
    conn.execute("select pglimits.create_limit('database', 1)")
    conn.execute("select pglimits.update_limit('database', 9)")
    assert "limit 2 → 8" in following.line()
    assert "limit 1 → 9" in following.line()


def is_listening(conn: Connection) -> bool:
    """Whether somebody listens, and has read what there was."""
    queries = conn.execute(
        "select query from pg_stat_activity where state = 'idle' and datname = current_database()"
    ).fetchall()
    return ("listen pglimits_events",) in queries and any("pg_current_snapshot" in query for (query,) in queries)


def test_follow_misses_no_event_whose_transaction_ends_after_a_later_one(
    start: Start, conn: Connection, connect: Callable[..., Connection], wait_until: Wait, server_dsn: str
) -> None:
    following = Reader(start("events", "--follow", "--limit", "0", "-o", "json", "--dsn", server_dsn))
    wait_until(lambda: is_listening(conn))
    slow, rolled_back = connect(autocommit=False), connect(autocommit=False)
    slow.execute("select pglimits.update_limit('database', 3)")
    rolled_back.execute("select pglimits.update_limit('api', 3)")
    for number in range(3):
        conn.execute("select pglimits.create_limit(%s, 1)", [f"later-{number}"])
        assert following.object()["name"] == f"later-{number}"
    rolled_back.rollback()
    slow.commit()
    assert following.object()["new"] == {"limit": 3}
    conn.execute("select pglimits.create_limit('last', 1)")
    assert following.object()["name"] == "last"
    assert following.rest() == []


def test_a_gap_is_waited_for_as_long_as_its_transaction_may_still_end(
    conn: Connection, connect: Callable[..., Connection], dsn: str, wait_until: Wait
) -> None:
    from pglimits_cli._follow import Follower

    from pglimits import Limiter

    with Limiter(dsn) as limiter:
        follower = Follower(limiter.events())
        rolled_back = connect(autocommit=False)
        rolled_back.execute("select pglimits.update_limit('api', 3)")
        conn.execute("select pglimits.update_limit('database', 3)")
        assert [event.name for event in follower.read(limiter)] == ["database"]
        assert len(follower._gaps.missing) == 1
        wait_until(lambda: follower.read(limiter) or any(until for _, until in follower._gaps._missing.values()))
        assert follower.read(limiter) == [] and len(follower._gaps.missing) == 1
        rolled_back.rollback()
        wait_until(lambda: not follower.read(limiter) and not follower._gaps.missing)


def test_what_was_read_before_the_database_went_is_handed_over_later(
    conn: Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pglimits_cli import _follow

    from pglimits import Limiter, LimiterUnavailable

    monkeypatch.setattr(_follow, "_AT_ONCE", 2)
    with Limiter(dsn) as limiter:
        follower = _follow.Follower(limiter.events())
        conn.execute("select pglimits.create_limit('n' || n, 1) from generate_series(1, 3) n")
        pages = iter([limiter._news])
        with monkeypatch.context() as patched:

            def once(*arguments: Any) -> Any:
                for page in pages:
                    return page(*arguments)
                raise LimiterUnavailable("away")

            patched.setattr(limiter, "_news", once)
            with pytest.raises(LimiterUnavailable):
                follower.read(limiter)
        assert [event.name for event in follower.read(limiter)] == ["n1", "n2", "n3"]
        assert follower.read(limiter) == []


def test_follow_goes_on_where_it_was_when_the_connection_was_lost(
    start: Start, conn: Connection, server: Any, server_dsn: str, wait_until: Wait
) -> None:
    following = Reader(start("events", "--follow", "--limit", "0", "-o", "json", "--dsn", server_dsn))
    said = Reader(following.process, following.process.stderr)
    wait_until(lambda: is_listening(conn))
    conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()")
    conn.execute("select pglimits.create_limit('first', 1)")
    assert following.object()["name"] == "first"
    with without_the_database(conn, server):
        assert "it is tried again" in said.line()
    with psycopg.connect(server_dsn, autocommit=True) as again:
        again.execute("select pglimits.create_limit(name, 1) from unnest('{second,third}'::text[]) name")
        assert [following.object()["name"] for _ in range(2)] == ["second", "third"]
        wait_until(lambda: is_listening(again))
        again.execute("select pglimits.create_limit('fourth', 1)")
    assert following.object()["name"] == "fourth"
    assert following.rest() == []


def test_follow_polls_behind_a_pooler(start: Start, conn: Connection, pooled: Callable[..., str]) -> None:
    following = Reader(start("events", "--follow", "--dsn", pooled("transaction")))
    following.until("created", "api")
    conn.execute("select pglimits.delete_limit('api')")
    following.until("deleted", "api")
    assert not is_listening(conn)


# history


def test_history_is_a_table_with_bars_or_json(pglimits: Cli, process: Cli, conn: Connection, clock: Any) -> None:
    acquire(conn, "database", lease_duration=9000)
    for _ in range(4):
        conn.execute("select pglimits.sweep()")
        clock.advance(61)
    steps = pglimits("history", "database", "--points", "60", "-o", "json").json
    assert steps and {step["limit"] for step in steps} == {2}
    assert sum(step["grants"] for step in steps) <= 1 and steps[-1]["held"] == pytest.approx(1, rel=0.05)
    assert [step["at"] for step in steps] == sorted(step["at"] for step in steps)
    table = pglimits("history", "database", "--points", "60").out
    assert table.split("\n")[0].split() == [
        "Until", "Held", "Limit", "Waiting", "Grants", "Expired", "Wait", "p50", "p95",
    ]  # fmt: skip
    assert "█████ " in table
    assert "█" not in process("history", "database", PYTHONIOENCODING="ascii").out


def test_history_says_where_a_row_tells_of_more_than_its_step(pglimits: Cli, conn: Connection, clock: Any) -> None:
    acquire(conn, "database", lease_duration=9000)
    for seconds in (61, 61, 1800, 61):
        conn.execute("select pglimits.sweep()")
        clock.advance(seconds)
    conn.execute("select pglimits.sweep()")
    assert "one of these rows tells of 31m" in pglimits("history", "database").err
    assert "tells of" not in pglimits("history", "database", "--points", "1").err


def test_history_that_nobody_wrote_says_who_would(pglimits: Cli) -> None:
    said = pglimits("history", "database")
    assert said.code == 0 and ("sweep" in said.out or "Held" in said.out)
    missing = pglimits("history", "databse")
    assert missing.code == 1 and "did you mean 'database'?" in missing.err


# release --force


def test_release_by_force_is_an_event_and_a_plain_one_is_not(pglimits: Cli, conn: Connection) -> None:
    mine, theirs = (pglimits("acquire", "database").out.strip() for _ in range(2))
    assert pglimits("release", mine).out == f"Released {mine}.\n"
    assert pglimits("events", "--kind", "force_released", "-o", "json").json == []
    assert pglimits("release", "--force", theirs, mine, "-o", "json").json == [
        {"lease_id": theirs, "released": True},
        {"lease_id": mine, "released": False},
    ]
    (event,) = pglimits("events", "--kind", "force_released", "-o", "json").json
    assert (event["lease_id"], event["name"], event["holder"]["program"]) == (theirs, "database", "pglimits acquire")
    assert event["by"]["user"] == conn.info.user


def test_only_an_administrator_releases_by_force(process: Cli, conn: Connection, server_dsn: str) -> None:
    conn.execute("create role worker login in role pglimits_user")
    try:
        lease = uuid4()
        acquire(conn, "database", lease)
        dsn = psycopg.conninfo.make_conninfo(server_dsn, user="worker")
        forced = process("release", "--force", str(lease), "--dsn", dsn)
        assert (forced.code, forced.out) == (1, "") and "is not a member of pglimits_admin" in forced.err
        assert process("release", str(lease), "--dsn", dsn).out == f"Released {lease}.\n"
    finally:
        conn.execute("drop role worker")
