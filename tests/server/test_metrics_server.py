"""The database's view of its limits as Prometheus reads it: under /metrics, and from the command line."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from metricstest import OF_A_LIMIT, OF_THE_SERVER, PROMTOOL, REFUSALS, Scraped, needs_promtool
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from servertest import READ, Server, until

from pglimits import __version__
from pglimits._exposition import QUERY, exposition

Connection = psycopg.Connection[Any]

NAMES = [
    "plain",
    'a"b',
    "back\\slash",
    "\\",
    "\\n",
    "ends\\",
    "'quotes'",
    '{limit="x"} 1',
    "# HELP x",
    "ü 中 🎉",
    "a b, c=1",
]


def scrape(http: httpx.Client) -> Scraped:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scraped(answer.text)


def look(conn: Connection) -> Scraped:
    with conn.cursor(row_factory=dict_row) as cursor:
        return Scraped(exposition(cursor.execute(QUERY.encode()).fetchall()))


def command(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "pglimits_cli", "metrics", "--dsn", dsn, *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=200)


# What it says.


def test_the_server_counts_what_it_has_refused_as_the_database_cannot(http: httpx.Client) -> None:
    http.post("/v1/limits", json={"name": "often full", "limit": 1})
    http.post("/v1/limits", json={"name": "slow", "limit": 1, "slot_decay_per_second": 0.001})
    http.post("/v1/acquire", json={"name": "often full"})
    http.post("/v1/rate_limit", json={"name": "slow"})
    for _ in range(3):
        assert http.post("/v1/acquire", json={"name": "often full"}).status_code == 429
    assert http.post("/v1/rate_limit", json={"name": "slow"}).status_code == 429
    assert http.post("/v1/acquire", json={"name": "not there"}).status_code == 200

    def counted() -> dict[tuple[str, str], float]:
        names = ("often full", "slow", "not there")
        found = [each for each in scrape(http).samples if each.name == REFUSALS and each.labels["limit"] in names]
        return {(each.labels["limit"], each.labels["operation"]): each.value for each in found}

    until(lambda: counted() == {("often full", "acquire"): 3, ("slow", "rate_limit"): 1}, "for a scrape of its own")
    both = {"limits": [{"name": "often full"}, {"name": "not there"}]}
    assert http.post("/v1/acquire", json=both).status_code == 429  # nobody knows by which: names may be invented
    http.delete("/v1/limits/slow")
    until(lambda: counted() == {("often full", "acquire"): 3}, "for what was deleted to be forgotten")


def test_all_metrics_are_there_under_their_names_with_texts_and_no_label_but_limit(conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('x', 5)")
    conn.execute("select pglimits.sweep()")
    found = look(conn)
    assert found.names - {REFUSALS} == OF_THE_SERVER
    assert set(found.of("x")) == {name.removeprefix("pglimits_") for name in OF_A_LIMIT}
    assert all(family.documentation.endswith(".") for family in found.families)
    for sample in found.samples:
        labels = {"limit"} if sample.name in OF_A_LIMIT else set()
        assert set(sample.labels) == labels or sample.name == "pglimits_info"


def test_a_reader_may_see_them(conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('x', 5)")
    conn.execute("set role pglimits_reader")
    assert look(conn).value("limit_slots", limit="x") == 5


def test_what_is_held_who_waits_and_what_happened_is_told_over_all_keys(conn: Connection, clock: Any) -> None:
    conn.execute("select pglimits.create_limit('x', 4), pglimits.create_limit('r', 10, slot_decay_per_second => 0.5)")
    clock.freeze()
    ids = [f"00000000-0000-4000-8000-{n:012}" for n in range(5)]
    acquire = "select status from pglimits.acquire('x', %s, %s, timeout_seconds => %s, lease_id => %s)"
    for arguments in ((3, "k1", 0, ids[0]), (2, "k2", 0, ids[1]), (1, "k1", 0, ids[2]), (4, "k1", 60, ids[3])):
        conn.execute(acquire, arguments)
    conn.execute("select pglimits.rate_limit('r', 6)")
    clock.advance(2)
    found = look(conn)
    assert found.of("x") == {
        "limit_slots": 4, "limit_active": 1, "decay_slots_per_second": 0, "held_slots": 6, "level_slots": 0,
        "leases": 3, "keys": 2, "waiters": 1, "oldest_waiter_age_seconds": 2, "grants_total": 3,
        "granted_slots_total": 6, "releases_total": 0, "expired_leases_total": 0, "force_released_leases_total": 0,
        "held_slot_seconds_total": 12, "waited_seconds_total": 0,
    }  # fmt: skip
    assert {name: found.value(name, limit="r") for name in ("decay_slots_per_second", "level_slots", "leases")} == {
        "decay_slots_per_second": 0.5, "level_slots": 5, "leases": 0
    }  # fmt: skip

    conn.execute("select pglimits.release(%s), pglimits.force_release(%s)", [ids[0], ids[2]])
    conn.execute("select pglimits.update_limit('r', active => false)")
    granted = look(conn)
    assert {
        name: granted.value(name, limit="x")
        for name in ("waiters", "oldest_waiter_age_seconds", "releases_total", "force_released_leases_total")
    } == {"waiters": 0, "oldest_waiter_age_seconds": 0, "releases_total": 1, "force_released_leases_total": 1}
    assert granted.value("waited_seconds_total", limit="x") == 2
    assert granted.value("limit_active", limit="r") == 0
    clock.advance(1000)
    conn.execute("select pglimits.sweep()")
    later = look(conn)
    assert later.value("expired_leases_total", limit="x") == 2
    assert later.value("last_sweep_timestamp_seconds") == pytest.approx(clock.now().timestamp(), abs=1)


def test_a_name_of_any_characters_comes_out_as_it_went_in(conn: Connection) -> None:
    for name in NAMES:
        conn.execute("select pglimits.create_limit(%s, 1)", [name])
    found = [sample.labels["limit"] for sample in look(conn).samples if sample.name == "pglimits_limit_slots"]
    assert sorted(found) == sorted(NAMES)


def test_without_limits_and_never_swept_there_is_only_what_is_known(conn: Connection) -> None:
    found = look(conn)
    assert found.names == {"pglimits_up", "pglimits_info"}
    (info,) = [sample.labels for sample in found.samples if sample.name == "pglimits_info"]
    assert info["version"] == __version__
    assert info["database_version"].split(".")[0].isdigit()
    assert info["postgresql_version"].split(".")[0].isdigit()


@needs_promtool
def test_promtool_finds_nothing_to_say(conn: Connection) -> None:
    for name in NAMES:
        conn.execute("select pglimits.create_limit(%s, 1)", [name])
    conn.execute("select pglimits.sweep()")
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=look(conn).text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Of the server.


def test_the_server_tells_of_all_limits(shared: Server, http: httpx.Client) -> None:
    http.post("/v1/limits", json={"name": 'a"b', "limit": 3}).raise_for_status()
    found = until(lambda: _if(scrape(http), lambda it: it.of('a"b')), "for the limit to be told of")
    assert found.value("limit_slots", limit='a"b') == 3
    assert found.value("up") == 1


def _if(found: Scraped, is_so: Callable[[Scraped], object]) -> Scraped | None:
    return found if is_so(found) else None


def test_where_there_are_tokens_one_that_may_read_is_needed(guarded: Server) -> None:
    with guarded.client() as nobody, guarded.client(READ) as reader:
        assert nobody.get("/metrics").status_code == 401
        assert scrape(reader).value("up") == 1


def test_a_database_that_is_gone_is_a_metric_and_no_error(serve: Callable[..., Server], server: Any, dsn: str) -> None:
    name = conninfo_to_dict(dsn)["dbname"]
    running = serve("--sweep-every", "0")
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin, running.client() as http:
        assert scrape(http).value("up") == 1
        admin.execute(f"alter database {name} allow_connections false".encode())
        admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
        gone = until(lambda: _if(scrape(http), lambda it: it.value("up") == 0), "for the database to be gone")
        assert gone.names == {"pglimits_up", "pglimits_info"}
        admin.execute(f"alter database {name} allow_connections true".encode())
        until(lambda: scrape(http).value("up") == 1, "for the database to come back")


# Of the command.


def test_the_command_prints_the_same(dsn: str, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('x', 5)")
    conn.execute("select pglimits.sweep()")
    done = command(dsn)
    assert (done.returncode, done.stderr) == (0, "")
    assert Scraped(done.stdout).names == OF_THE_SERVER


def test_the_command_puts_a_whole_file_in_place_that_everybody_may_read(
    dsn: str, conn: Connection, tmp_path: Path
) -> None:
    conn.execute("select pglimits.create_limit('x', 5)")
    file = tmp_path / "pglimits.prom"
    file.write_text("old")
    done = command(dsn, "--file", str(file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Scraped(file.read_text(encoding="utf-8")).value("limit_slots", limit="x") == 5
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_says_that_the_database_is_gone_in_the_file_and_by_its_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "pglimits.prom"
    done = command("host=/nowhere dbname=x", "--file", str(file))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert Scraped(file.read_text()).value("up") == 0


def test_the_command_leaves_the_file_alone_where_something_else_is_wrong(bare_dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "pglimits.prom"
    assert command(bare_dsn, "--file", str(file)).returncode == 1
    assert list(tmp_path.iterdir()) == []
    missing = command("host=/nowhere dbname=x", "--file", str(tmp_path / "nowhere" / "x.prom"))
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr
