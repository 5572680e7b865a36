"""History: what the sweep samples, how it grows coarser, and what is read of it."""

from __future__ import annotations

from typing import Any

import pytest
from sqltest import FOREVER, Clock, Session, fails


def history(s: Session, name: str = "database", seconds: float = 3600, points: int = 60) -> list[Any]:
    return s.all("select * from pglimits.history(%s, %s::float8, %s::int)", name, seconds, points)


def samples(s: Session) -> int:
    return int(s.value("select count(*) from pglimits.samples"))


def test_a_limit_that_was_never_used_has_no_samples(clock: Clock, s: Session) -> None:
    clock.freeze()
    clock.advance(10)
    s.sweep()
    s.create("database", 3)
    clock.advance(100)
    s.sweep()
    clock.advance(100)
    s.sweep()
    assert {row.grants for row in history(s)} == {0}


def test_the_sweep_samples_at_most_once_a_minute(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 3)
    s.acquire("database", lease_duration=3000)
    for _ in range(10):
        s.sweep()
        clock.advance(5)
    first = samples(s)
    clock.advance(60)
    s.sweep()
    assert samples(s) == first + 1


def test_steps_tell_what_was_counted_within_them_and_what_was_held_on_average(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 4)
    s.sweep()
    leases = [answer.lease_id for answer in s.serves("database", 4, lease_duration=3000)]
    clock.advance(60)
    s.sweep()
    for lease in leases[:2]:
        s.release(lease)
    clock.advance(60)
    s.sweep()
    before, last = history(s, seconds=120, points=2)
    assert (before.grants, before.granted_slots, before.releases, before.held) == (4, 4, 0, 4)
    assert (last.grants, last.releases, last.held, last.limit) == (0, 2, 2, 4)
    assert (before.covered_seconds, last.covered_seconds) == (60, 60)


def test_what_came_since_the_last_sample_is_in_the_last_step(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 4)
    s.sweep()
    clock.advance(30)
    s.serves("database", 2)
    clock.advance(30)
    (row,) = history(s, seconds=60, points=1)
    assert (row.grants, row.held, row.at) == (2, 1, clock.now())


def test_a_limit_that_was_idle_for_long_is_not_thought_to_have_been_used_all_the_time(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 4)
    s.release(s.acquire("database").lease_id)
    s.sweep()
    for _ in range(30):
        clock.advance(60)
        s.sweep()
    assert samples(s) <= 3, "nothing is sampled of what is idle"
    s.serves("database", 4)
    clock.advance(60)
    s.sweep()
    *_, last = history(s)
    assert (last.grants, last.held) == (4, 4)
    assert last.covered_seconds == 60


def test_waits_are_told_by_half_and_95_percent_of_those_who_were_granted(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 1)
    holder = s.acquire("database").lease_id
    for seconds in (3, 3, 6):
        waiter = s.queue("database")
        clock.advance(seconds)
        s.release(holder)
        assert s.watch_one(waiter).status == "granted"
        holder = waiter
    (row,) = history(s, points=1)
    assert (row.grants, row.waited_seconds) == (4, 12)
    assert 2 <= row.waited_p50 <= 4.1
    assert 4 <= row.waited_p95 <= 8.2


def test_who_was_granted_at_once_has_waited_for_no_time(s: Session) -> None:
    s.create("database", 5)
    s.serves("database", 5)
    (row,) = history(s, points=1)
    assert (row.waited_p50, row.waited_p95) == (0, 0)


@pytest.mark.parametrize("seconds", [0.0004, 0.001, 0.0011, 0.5, 1, 3, 100, 2000, 1e7])
def test_a_wait_is_told_within_a_factor_of_two(s: Session, seconds: float) -> None:
    told = s.value(
        "select pglimits._wait_quantile(1, 1, (pglimits._count_wait(null::pglimits.states, %s::float8)).waits)", seconds
    )
    assert told >= seconds or seconds > 1048
    assert told <= max(2.0 * seconds, 0.001) or told == 0.001 * 2**21


def test_samples_grow_coarser_with_age_and_what_was_counted_is_not_lost(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 4)
    s.sweep()
    grants = 0
    for _ in range(60 * 6):
        s.release(s.acquire("database").lease_id)
        grants += 1
        clock.advance(60)
        s.sweep()
    young, old = (
        int(s.value("select count(*) from pglimits.samples where at > %s - interval '3 hours'", clock.now())),
        int(s.value("select count(*) from pglimits.samples where at <= %s - interval '3 hours'", clock.now())),
    )
    assert 175 <= young <= 186
    assert 34 <= old <= 44
    assert sum(row.grants for row in history(s, seconds=7 * 3600)) == grants


def test_samples_go_when_they_are_older_than_what_is_kept(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 4)
    s.acquire("database", lease_duration=60)
    s.sweep()
    clock.advance(60)
    s.sweep()
    assert samples(s) > 0
    clock.advance(8 * 86400 + 1)
    s.sweep()
    assert s.value("select count(*) from pglimits.samples where at < %s - interval '8 days'", clock.now()) == 0


def test_a_limit_that_was_idle_for_longer_than_samples_are_kept_tells_only_what_is_new(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("database", 4)
    for _ in range(7):
        s.release(s.acquire("database").lease_id)
    s.sweep()
    clock.advance(9 * 86400)
    s.sweep(idle_seconds=1e9)
    clock.advance(60)
    assert sum(row.grants for row in history(s)) == 0
    s.serves("database", 2)
    clock.advance(60)
    s.sweep()
    assert sum(row.grants for row in history(s)) == 2


@pytest.mark.parametrize("waits", [False, True])
def test_what_a_key_had_counted_that_is_swept_at_once_is_sampled_once(clock: Clock, s: Session, waits: bool) -> None:
    clock.freeze()
    s.create("database", 1)
    s.sweep()
    holder = s.acquire("database", key="k").lease_id
    waiter = s.queue("database", key="k") if waits else None
    clock.advance(3)
    s.release(holder)
    if waiter:
        s.release(waiter)
    clock.advance(7200)
    assert s.sweep(idle_seconds=60).keys == 1
    clock.advance(60)
    s.acquire("database", key="other")
    clock.advance(60)
    s.sweep()
    assert sum(row.grants for row in history(s, seconds=86400)) == (3 if waits else 2)
    (last,) = history(s, seconds=100, points=1)
    assert (last.grants, last.waited_p95) == (1, 0)


def test_history_in_steps_that_are_shorter_than_anything_is_no_error(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 1)
    s.acquire("database")
    s.sweep()
    clock.advance(5 * 86400)
    assert len(history(s, seconds=1, points=10000)) == 1


def test_deleting_a_limit_takes_its_samples_along(clock: Clock, s: Session) -> None:
    s.create("database", 4)
    s.acquire("database")
    s.sweep()
    assert samples(s) > 0
    s.delete("database")
    assert samples(s) == 0


def test_sparklines_tell_what_was_held_with_nulls_where_nothing_is_known(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 4)
    s.create("api", 4)
    s.sweep()
    clock.advance(1800)
    s.sweep()
    s.serves("database", 2, lease_duration=3600)
    clock.advance(60)
    s.sweep()
    found = dict(s.all("select * from pglimits.sparklines('{database, api, unknown}', 600, 10)"))
    assert set(found) == {"database", "api"}
    assert found["database"][-1] == 2
    assert found["database"][:5] == [None] * 5
    assert len(found["api"]) == 10


def test_last_sweep_is_when_the_sweep_was_called(clock: Clock, s: Session) -> None:
    clock.freeze()
    assert s.value("select pglimits.last_sweep()") is None
    s.sweep()
    assert s.value("select pglimits.last_sweep()") == clock.now()


@pytest.mark.parametrize("call", ["history", "why_waiting"])
def test_a_limit_that_is_not_there_is_named(s: Session, call: str) -> None:
    with fails("PL002", "there is no limit named 'nobody'"):
        s.run(f"select * from pglimits.{call}('nobody')")


def test_why_waiting_tells_each_place_what_it_waits_for(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 2)
    s.serves("database", 2)
    first, second = s.queue("database"), s.queue("database", slots=2)
    rows = s.all("select * from pglimits.why_waiting('database')")
    assert [(row.lease_id, row.position, row.blocked_by, row.earliest) for row in rows] == [
        (first, 1, "database", None), (second, 2, "database", None),
    ]  # fmt: skip
    assert [row.reason for row in rows] == [
        "it needs 1 slot of 'database', and 2 of 2 are held",
        "it stands behind 1 other in the line of 'database'",
    ]
    s.update("database", limit=0)
    assert (
        s.all("select reason from pglimits.why_waiting('database')")[0].reason
        == "limit 'database' is shut: it has 0 slots"
    )


def test_why_waiting_names_a_limit_as_it_is(s: Session) -> None:
    name = "quo\"te's \\"
    s.create(name, 1)
    s.serves(name, 1)
    s.queue(name)
    (row,) = s.all("select reason from pglimits.why_waiting(%s)", name)
    assert row.reason == f"it needs 1 slot of '{name}', and 1 of 1 are held"


def test_why_waiting_tells_from_when_on_a_level_has_room(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 0.5)
    s.rate_limit("api")
    s.rate_limit("api", timeout_seconds=FOREVER)
    s.rate_limit("api", timeout_seconds=FOREVER)
    rows = s.all("select *, earliest - %s as wait from pglimits.why_waiting('api')", clock.now())
    assert [row.wait.total_seconds() for row in rows] == [2, 4]
    assert rows[0].reason == "it needs 1 slot of 'api', whose level has to decay first"


def test_why_waiting_tells_of_requests_that_stand_in_the_line_of_another_limit(s: Session) -> None:
    s.create("database", 1)
    s.create("api", 1)
    s.acquire("api")
    waiter = s.queue(["database", "api"])
    (row,) = s.all("select * from pglimits.why_waiting('database')")
    assert (row.lease_id, row.blocked_by) == (waiter, "api")
    (row,) = s.all("select * from pglimits.why_waiting('api')")
    assert (row.lease_id, row.reason) == (waiter, "it needs 1 slot of 'api', and 1 of 1 are held")
