"""Histories: processes work at random while processes and the server come and go, and every promise has to be kept.

PGLIMITS_FAULT_SECONDS says how long each of them runs. Without it, each runs for 6 seconds, and once,
with workers who ask for all kinds of things.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import history
import psycopg
import pytest
from histories import BOTH, CALM, KINDS, ONE, RATE, RATES, ROUGH, SECONDS, SEVERAL, WIDTHS, Run, granted
from history import History, Said
from history_checker import check, slots_gone

Asks: TypeAlias = Sequence[Mapping[str, Any]]
MANY: Asks = [
    {"slots": {f"limit {one}": 1, f"limit {other}": 1} if other else {f"limit {one}": 1}, "keys": ["", "a"]}
    for one in range(1, 41)
    for other in (0, one % 40 + 1, one * 7 % 40 + 1)
    if one != other
]
MIXED: Asks = [*WIDTHS, *SEVERAL, *RATE, *RATES, *BOTH]
ALL = {
    "mixed": MIXED,
    "one": ONE,
    "widths": WIDTHS,
    "several": SEVERAL,
    "rate": RATE,
    "rates": RATES,
    "both": BOTH,
    "many": MANY,
}
FORGETS = 1.0
"""For how long (seconds) before a crash commits with synchronous_commit = off may be forgotten: three times
wal_writer_delay (0.2 s), says PostgreSQL's documentation of asynchronous commit."""


@pytest.fixture
def asks(request: pytest.FixtureRequest, run: Run) -> Asks:
    """What the workers ask for: the names of the parameters are those of ALL."""
    run.sql("select pglimits.create_limit('limit ' || n, 1 + n %% 2) from generate_series(1, 40) n")
    return ALL[request.param]


def of(first: str, *others: str) -> pytest.MarkDecorator:
    """The first of these is asked for; where there is time for it, the others too, each in a history of its own."""
    names = [first, *(others if "PGLIMITS_FAULT_SECONDS" in os.environ else ())]
    return pytest.mark.parametrize("asks", names, indirect=True)


@of(*ALL)
def test_nothing_happens(run: Run, asks: Asks) -> None:
    run.workers(asks)
    run.let(lambda: None)
    found = run.finish(CALM)
    assert granted(found) > SECONDS
    assert not [said for said in found.said if said.what == "failed"]


def test_a_rate_limit_that_is_always_asked_for_delivers_all_that_decays(run: Run) -> None:
    run.workers(RATE, timeouts=[None], at_once=8)
    run.let(lambda: None)
    went = sorted(slots_gone(run.finish(CALM), "api"))
    stop = went[0][0] + SECONDS - 1.0
    while_asked = [slots for at, slots in went if at <= stop]
    # All that decayed until then has been used, but for what was on its way at the end.
    late = 1.0
    assert sum(while_asked) >= 5 + 0.999 * 50 * (stop - late - went[0][0]) - 2


@of("rates", "mixed")
def test_limits_are_changed(run: Run, asks: Asks) -> None:
    """Whoever stands in line goes by what holds when it comes to the head."""
    run.workers(asks, each=2, kinds=("sync", "async"), at_once=6)

    def change() -> None:
        name, rate = run.random.choice([("api", 50), ("mails", 15), ("tokens", 60), ("database", 0)])
        changes = {
            "limit": run.random.choice([7, 8, 10]) if name == "tokens" else run.random.choice([2, 3, 5]),
            "slot_decay_per_second": run.random.choice([0.5, 1, 2]) * rate,
        }
        for what, value in changes.items():
            run.sql(f'select pglimits.update_limit(%s, "{what}" => %s)', name, value)
        if rate and run.random.random() < 0.3:
            run.sql("select pglimits.adjust(%s, 2)", name)

    run.let(change, every=0.2)
    found = run.finish(ROUGH)
    assert granted(found) > SECONDS


@of("mixed", "one", "several", "rate", "rates", "many")
def test_processes_are_killed(run: Run, asks: Asks) -> None:
    workers = run.workers(asks, each=2)

    def kill() -> None:
        workers.kill(run.random.choice(workers.running))
        workers.start(run.random.choice(KINDS))

    run.let(kill)
    run.finish(ROUGH)


@of("mixed", "one", "several", "rate", "rates")
def test_processes_are_stopped_for_longer_than_their_leases_last(run: Run, asks: Asks) -> None:
    """A zombie that goes on is told, and its fence is an old one."""
    workers = run.workers(asks, each=2, lease=1.0, hold=0.5)
    stopped: dict[subprocess.Popen[str], float] = {}

    def stop_or_go_on() -> None:
        now = time.monotonic()
        for process, since in list(stopped.items()):
            if now - since > 2.5:
                process.send_signal(signal.SIGCONT)
                del stopped[process]
        process = run.random.choice(workers.running)
        if process not in stopped and len(stopped) < 4:
            process.send_signal(signal.SIGSTOP)
            stopped[process] = now

    run.let(stop_or_go_on, every=0.2)
    found = run.finish(ROUGH)
    if "rate" not in str(asks):
        assert [said for said in found.said if said.what in ("still", "leaving") and said.more["lost"]]


@of("mixed", "one", "several", "rate", "rates", "many")
def test_connections_are_ended_by_the_server(run: Run, asks: Asks) -> None:
    run.workers(asks)
    ended = 0

    def terminate() -> None:
        nonlocal ended
        backends = run.sql(
            "select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        for (pid,) in run.random.sample(backends, min(2, len(backends))):
            ended += run.sql("select pg_terminate_backend(%s)", pid) == [(True,)]

    run.let(terminate, every=0.05)
    run.finish(ROUGH)
    assert ended > SECONDS


@pytest.mark.parametrize("how", ["stop", "crash", "kill"])
@of("mixed", "one", "several", "rate", "rates")
def test_the_server_goes_away_and_comes_back(run: Run, asks: Asks, how: str) -> None:
    """What anybody was told of is there after it: slots, and places in line."""
    run.workers(asks, limiter={"on_unavailable": "wait"}, lease=5.0)
    run.let(lambda: run.server.restart(how), every=1.0)
    run.finish(ROUGH)


@of("mixed", "one", "several")
def test_the_server_crashes_in_the_middle_of_batches(run: Run, asks: Asks) -> None:
    run.workers(asks, kinds=("async", "sync"), at_once=100, hold=0.01, timeouts=[None, 1], lease=5.0)
    run.let(lambda: run.server.restart("crash"), every=1.0)
    found = run.finish(ROUGH)
    assert granted(found) > SECONDS


@of("several", "one")
def test_a_crash_without_durability_forgets_nothing_but_the_last_moments(run: Run, asks: Asks) -> None:
    run.workers(asks, kinds=("sync", "async"), limiter={"durable": False, "on_unavailable": "wait"}, lease=5.0)
    run.let(lambda: run.server.restart("crash"), every=1.0)
    found = run.finish(ROUGH, allowed=["Nothing is lost", "Never too many", "Fences rise"])
    assert granted(found) > SECONDS
    forgotten = {
        said.attempt
        for said in found.said
        if said.what in ("granted", "refused")
        and any(gone - FORGETS <= said.at <= back for gone, back in run.server.away)
    }
    remembered = History(found.changes, [said for said in found.said if said.attempt not in forgotten], found.end)
    assert check(remembered, run.tolerance(ROUGH)) == []


def test_a_zombie_is_told_and_its_fence_is_lower_than_that_of_who_came_after_it(run: Run) -> None:
    run.sql("select pglimits.update_limit('gpu', 1)")
    workers = run.workers([{"slots": {"gpu": 1}}], kinds=("sync",), at_once=1, hold=600, lease=1.0, timeouts=[None])
    (zombie,) = workers.running

    def fence_of(name: str) -> list[int]:
        return [fence for (fence,) in run.sql("select fence from pglimits.holders where name = %s", name)]

    (old,) = run.wait_until(lambda: fence_of("gpu"))
    zombie.send_signal(signal.SIGSTOP)
    with psycopg.connect(run.dsn, autocommit=True) as connection:
        connection.execute("call pglimits.acquire_wait('gpu', lease_duration => 60)")
    (new,) = fence_of("gpu")
    assert new > old
    zombie.send_signal(signal.SIGCONT)

    def told() -> list[Said]:
        return [said for said in history.read_log(workers.logs[0]) if said.what == "still" and said.more["lost"]]

    assert run.wait_until(told)
    run.sql("select pglimits.reset('gpu')")
    workers.kill(zombie)
