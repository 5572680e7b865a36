"""Turns reserved ahead over several rate limits: in which order they go when one gives up, or a limit is changed."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqltest import Clock, Db, Session, fails, seconds

BOTH = ["one", "two"]


def reserve(s: Session, names: str | list[str], channel: str | None = "pglimits_t", **more: Any) -> UUID:
    lease_id = uuid4()
    assert s.rate_limit(names, wait=None, channel=channel, lease_id=lease_id, **more).status == "granted"
    return lease_id


def turn(s: Session, lease_id: UUID) -> float:
    """When it goes, as it is told when it looks."""
    rows = s.watch(lease_id)
    assert {row.status for row in rows} == {"granted"}
    return max(seconds(row.wait) for row in rows)


def told_turn(s: Session, lease_id: UUID) -> float:
    """When it goes, before it looks."""
    return seconds(s.value("select pglimits._turn_in(%s, pglimits._now())", lease_id))


def create(s: Session) -> None:
    s.create("one", 1, 1)
    s.create("two", 1, 0.5)


def test_what_is_given_up_goes_to_those_behind_and_not_to_a_newcomer(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    create(s)
    s.rate_limit(BOTH)
    first, second, third = (reserve(s, BOTH) for _ in range(3))
    assert [turn(s, each) for each in (first, second, third)] == [2, 4, 6]
    assert s.release(first)
    alone, newcomer = reserve(s, "two"), reserve(s, BOTH)
    assert [turn(s, each) for each in (newcomer, alone, third, second)] == [8, 6, 4, 2]
    db.consistent()


def test_who_moves_up_is_told(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    create(s)
    s.rate_limit(BOTH)
    first = reserve(s, BOTH)
    for nth in (2, 3):
        reserve(s, BOTH, channel=f"pglimits_{nth}")
    listener = db.session().connection
    listener.execute("listen pglimits_2")
    listener.execute("listen pglimits_3")
    s.release(first)
    told = [each.channel for each in listener.notifies(timeout=20, stop_after=2)]
    assert sorted(told) == ["pglimits_2", "pglimits_3"]


def test_those_who_are_bound_to_other_limits_move_up_in_the_same_transaction(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("everyone", 1, 1)
    for tenant in "abc":
        s.create(tenant, 5, 5)
    s.rate_limit("everyone")
    given_up = reserve(s, ["everyone", "b"])
    behind = [reserve(s, ["everyone", "c"]), reserve(s, ["a", "everyone"]), reserve(s, "everyone")]
    assert [turn(s, each) for each in [given_up, *behind]] == [1, 2, 3, 4]
    s.release(given_up)
    assert [told_turn(s, each) for each in behind] == [1, 2, 3]
    db.consistent()


def test_nobody_passes_somebody_who_cannot_be_moved_yet(clock: Clock, db: Db, s: Session) -> None:
    """Whoever finds that one has died has only the state of one limit locked."""
    clock.freeze()
    s.create("everyone", 1, 0.05)
    s.create("tenant", 5, 5)
    s.rate_limit("everyone")
    reserve(s, "everyone")
    clock.advance(5)
    bound, free = reserve(s, ["everyone", "tenant"], channel="pglimits_bound"), reserve(s, "everyone")
    assert [turn(s, each) for each in (bound, free)] == [35, 55]
    listener = db.session().connection
    listener.execute("listen pglimits_bound")
    clock.advance(5)
    assert seconds(s.rate_limit("everyone", wait="1 second").retry_after) == 70
    newcomer = reserve(s, "everyone")
    assert [told_turn(s, each) for each in (bound, free, newcomer)] == [30, 50, 70]
    assert s.limit("everyone").level == 3.5
    assert [each.channel for each in listener.notifies(timeout=20, stop_after=1)] == ["pglimits_bound"]
    # Whoever looks first has what it takes, also for those before it.
    assert [turn(s, each) for each in (newcomer, free, bound)] == [50, 30, 10]
    db.consistent()


def test_the_turn_of_one_who_died_goes_to_those_behind_in_their_order(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("one", 1, 0.05)
    s.create("two", 1, 0.05)
    s.rate_limit(BOTH)
    reserve(s, BOTH)
    clock.advance(5)
    second, third = reserve(s, BOTH), reserve(s, BOTH)
    assert [turn(s, each) for each in (second, third)] == [35, 55]
    clock.advance(5)
    assert [turn(s, each) for each in (third, second)] == [30, 10]
    db.consistent()


def test_who_is_pinned_behind_one_who_gives_up_moves_up_too(clock: Clock, s: Session) -> None:
    """On 'narrow' it is not what came free in line, but that the pinned turn is gone."""
    clock.freeze()
    s.create("narrow", 1, 1)
    s.create("slow", 1, 0.1)
    s.create("slower", 1, 0.09)
    s.rate_limit("slow")
    s.rate_limit("slower")
    first = reserve(s, ["narrow", "slow"])
    second = reserve(s, ["narrow", "slower"])
    assert turn(s, first) == 10
    assert turn(s, second) == pytest.approx(11.111112)
    s.create("third", 1, 0.0995)
    s.rate_limit("third")
    third = reserve(s, ["narrow", "third"])
    assert turn(s, third) == pytest.approx(12.111112)
    s.release(first)
    # Between the two others there is no room for it yet; before them there is now.
    assert turn(s, third) == pytest.approx(10.050252)
    assert turn(s, second) == pytest.approx(11.111112)


@pytest.mark.parametrize(
    "change",
    [{"slot_decay_per_second": 0.25}, {"slot_decay_per_second": 4}, {"limit": 3}, {"limit": 2}],
    ids=lambda change: str(change),
)
def test_a_changed_limit_leaves_them_in_their_order_whoever_looks_first(
    clock: Clock, db: Db, s: Session, change: dict[str, Any]
) -> None:
    clock.freeze()
    s.create("one", 2, 1)
    s.create("two", 2, 2)
    s.rate_limit(BOTH, slots=[2, 2])
    over_both = [reserve(s, BOTH) for _ in range(4)]
    alone = reserve(s, "one")
    before = [turn(s, each) for each in [*over_both, alone]]
    assert before == sorted(before)
    s.update("one", **change)
    newcomer = reserve(s, BOTH)
    last, *others = [turn(s, each) for each in [newcomer, *reversed(over_both)]]
    assert others == sorted(others, reverse=True)
    assert last >= others[0]
    most, rate = change.get("limit", 2), change.get("slot_decay_per_second", 1)
    # On 'two' they go at 0.5, 1, 1.5 and 2.
    assert others[::-1] == pytest.approx([max((2 + nth - most) / rate, nth / 2) for nth in range(1, 5)])
    assert turn(s, alone) == pytest.approx((7 - most) / rate if rate <= 1 else 1 / rate)
    db.consistent()


def test_a_change_that_is_beyond_the_timeout_is_told_and_not_refused(clock: Clock, s: Session) -> None:
    clock.freeze()
    create(s)
    s.rate_limit(BOTH)
    lease_id = uuid4()
    assert s.rate_limit(BOTH, wait="3 seconds", channel="pglimits_t", lease_id=lease_id).status == "granted"
    s.update("two", slot_decay_per_second=0.1)
    assert turn(s, lease_id) == 10
    assert s.rate_limit(BOTH, wait="3 seconds", channel="pglimits_t", lease_id=lease_id).status == "granted"


@pytest.mark.parametrize("change, code", [({"limit": 1}, "PL004"), ({"slot_decay_per_second": 0}, "PL005")])
def test_who_can_never_go_any_more_is_sent_to_ask_again_and_gets_the_error(
    clock: Clock, db: Db, s: Session, change: dict[str, Any], code: str
) -> None:
    clock.freeze()
    s.create("one", 2, 1)
    s.create("two", 2, 1)
    s.rate_limit(BOTH, slots=[2, 2])
    wide, narrow = reserve(s, BOTH, slots=[2, 2]), reserve(s, "two")
    assert (turn(s, wide), turn(s, narrow)) == (2, 3)
    s.update("one", **change)
    assert [row.status for row in s.watch(wide)] == ["retry"]
    with fails(code, "one"):
        s.rate_limit(BOTH, slots=[2, 2], wait=None, channel="pglimits_t", lease_id=wide)
    assert turn(s, narrow) == 1
    db.consistent()


def test_a_limit_of_zero_stops_who_sleeps_towards_it_and_another(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    create(s)
    s.rate_limit(BOTH)
    lease_id, behind = reserve(s, BOTH), reserve(s, "two")
    assert (turn(s, lease_id), turn(s, behind)) == (2, 4)
    s.update("one", limit=0)
    assert [row.status for row in s.watch(lease_id)] == ["queued"]
    assert turn(s, behind) == 2
    assert s.rate_limit(BOTH, wait=None, channel="pglimits_t", lease_id=lease_id).status == "queued"
    s.update("one", limit=1)
    assert [row.status for row in s.watch(lease_id)] == ["retry"]
    s.rate_limit(BOTH, wait=None, channel="pglimits_t", lease_id=lease_id)
    assert (turn(s, lease_id), turn(s, behind)) == (4, 2)
    db.consistent()


def test_those_who_sleep_towards_a_limit_that_is_shut_go_in_order_of_arrival_when_it_is_opened(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    create(s)
    s.rate_limit(BOTH)
    one = [reserve(s, "one") for _ in range(2)]
    both, last = reserve(s, BOTH), reserve(s, "one")
    in_order = [*one, both, last]
    for _ in range(2):
        s.update("one", limit=0)
        assert {row.status for row in s.watch(*in_order)} == {"queued"}
        assert [row.lease_id for row in s.waiters() if row.name == "one"] == in_order
        s.update("one", limit=1)
        assert [row.status for row in s.watch(last)] == ["queued"]
        s.rate_limit(BOTH, wait=None, channel="pglimits_t", lease_id=both)
        moments = [turn(s, each) for each in in_order]
        assert moments == sorted(moments)
    db.consistent()


def test_what_adjust_adds_lies_behind_those_who_sleep_and_is_taken_off_there(clock: Clock, s: Session) -> None:
    """Else they would be moved up by what they never waited for."""
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    before = [reserve(s, "api") for _ in range(2)]
    assert s.adjust("api", 3) == 6
    behind = reserve(s, "api")
    assert [turn(s, each) for each in [*before, behind]] == [1, 2, 6]
    assert s.adjust("api", -2) == 5
    assert [turn(s, each) for each in [*before, behind]] == [1, 2, 4]
    assert s.adjust("api", -2) == 3
    assert [turn(s, each) for each in [*before, behind]] == [0, 1, 2]


def test_what_adjust_adds_stays_behind_those_who_sleep_when_one_of_them_gives_up(clock: Clock, s: Session) -> None:
    clock.freeze()
    create(s)
    s.rate_limit(BOTH)
    first, second = reserve(s, BOTH), reserve(s, BOTH)
    s.adjust("two", 2)
    behind = reserve(s, BOTH)
    assert [turn(s, each) for each in (first, second, behind)] == [2, 4, 10]
    s.release(first)
    assert [turn(s, each) for each in (second, behind)] == [2, 8]
    assert s.adjust("two", -1) == 4
    assert [turn(s, each) for each in (second, behind)] == [2, 6]


def test_what_adjust_takes_off_lets_no_newcomer_pass_who_came_between_two_times_that_it_added(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    first = reserve(s, "api")
    s.adjust("api", 3)
    second = reserve(s, "api")
    assert s.adjust("api", 2) == 8
    assert s.adjust("api", -4) == 4
    newcomer = reserve(s, "api")
    assert [turn(s, each) for each in (first, second, newcomer)] == [1, 3, 4]
    assert s.adjust("api", -2) == 3
    assert [turn(s, each) for each in (first, second, newcomer)] == [0, 1, 2]
    db.consistent()


def test_nor_does_it_where_one_of_them_sleeps_over_several_limits(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("one", 1, 1)
    s.create("two", 1, 1)
    s.rate_limit("one")
    first = reserve(s, "one")
    s.adjust("one", 3)
    second = reserve(s, BOTH)
    s.adjust("one", 2)
    s.adjust("one", -4)
    newcomer = reserve(s, "one")
    assert [turn(s, each) for each in (first, second, newcomer)] == [1, 3, 4]
    db.consistent()


def test_what_was_added_counts_as_used_once_those_before_it_have_gone(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    reserve(s, "api")
    s.adjust("api", 3)
    second = reserve(s, "api")
    s.adjust("api", 2)
    clock.advance(2)
    assert s.adjust("api", -3) == 3
    assert turn(s, second) == 2
    assert turn(s, reserve(s, "api")) == 3


def test_what_was_added_stays_behind_those_over_several_limits_when_some_of_it_is_taken_off(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("one", 1, 1)
    s.create("two", 1, 1)
    s.adjust("one", 1)
    first, second = reserve(s, "one"), reserve(s, BOTH)
    s.adjust("one", 2)
    behind = reserve(s, "one")
    assert s.adjust("one", -1) == 5
    assert [turn(s, each) for each in (first, second, behind)] == [1, 2, 4]
    db.consistent()


def test_what_was_used_is_not_taken_off_before_what_was_added(clock: Clock, db: Db, s: Session) -> None:
    """Else somebody over several limits would go at once, right after who has just gone."""
    clock.freeze()
    s.create("one", 1, 1)
    s.create("two", 1, 1)
    s.rate_limit("one")
    both = reserve(s, BOTH)
    assert s.rate_limit("two").status == "granted"
    s.adjust("two", 1)
    s.adjust("two", -1)
    s.adjust("one", -1)
    assert turn(s, both) == 1
    db.consistent()


def test_turns_that_are_bound_to_a_slower_limit_weigh_on_each_other(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("slow", 1, 1)
    s.create("fast", 6, 4)
    s.rate_limit("slow")
    s.rate_limit("slow", wait=None)
    six = reserve(s, ["slow", "fast"], slots=[1, 6])
    fives = [reserve(s, ["slow", "fast"], slots=[1, 5]) for _ in range(2)]
    # 16 slots take 2.5 seconds from the first of them on.
    assert [turn(s, each) for each in (six, *fives)] == [2, 3.25, 4.5]


def test_what_adjust_adds_before_a_turn_that_is_bound_to_a_slower_limit_is_used_at_once(
    clock: Clock, db: Db, s: Session
) -> None:
    """Taken off again, it leaves no room for more than it took."""
    clock.freeze()
    s.create("one", 5, 1)
    s.create("two", 5, 0.5)
    s.adjust("two", 6)
    bound = reserve(s, BOTH, slots=[4, 1])
    s.adjust("one", 3)
    alone = reserve(s, "one", slots=4)
    assert [turn(s, each) for each in (bound, alone)] == [4, 7]
    s.adjust("one", -3)
    assert [turn(s, each) for each in (bound, alone)] == [4, 0]
    db.consistent()


def test_what_adjust_added_decays_before_a_turn_that_is_bound_to_a_slower_limit(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("one", 6, 1)
    s.create("two", 8, 0.5)
    s.rate_limit("two", slots=8)
    first = reserve(s, "two", slots=7)
    bound = reserve(s, BOTH, slots=[6, 1])
    assert [turn(s, each) for each in (first, bound)] == [14, 16]
    s.adjust("one", 5)
    clock.advance(4)
    assert s.rate_limit("one", slots=5).status == "granted"
    assert s.release(first)
    assert turn(s, bound) == 6
    db.consistent()


def test_what_is_given_up_reaches_those_who_are_connected_by_others_only(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("all", 5, 4)
    s.create("tenant", 1, 0.125)
    for key in ("a", "b"):
        s.rate_limit("tenant", key=key)
    alone = [reserve(s, "tenant", key=key) for key in ("a", "b")]
    both = [reserve(s, ["all", "tenant"], keys=["", key]) for key in ("a", "b")]
    assert [turn(s, each) for each in (*alone, *both)] == [8, 8, 16, 16]
    assert s.release(alone[1])
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    assert [turn(s, each) for each in (alone[0], *both)] == [8, 16, 8]
    s.run("select pg_notify('pglimits_t', 'end')")
    assert [each.payload for each in listener.notifies(timeout=20, stop_after=1)] == ["end"]
    db.consistent()


def test_an_adjustment_by_nothing_tells_nobody(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    asleep = reserve(s, "api")
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    assert s.adjust("api", 0) == 2
    s.run("select pg_notify('pglimits_t', 'end')")
    assert [each.payload for each in listener.notifies(timeout=20, stop_after=1)] == ["end"]
    assert turn(s, asleep) == 1


def test_alike_requests_stay_in_their_order_when_a_limit_shrinks(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("one", 3, 0.125)
    s.create("two", 3, 8)
    s.rate_limit("one", slots=2, wait=None)
    s.adjust("one", 4)
    s.adjust("one", 6, "k")
    reserve(s, "one")
    for _ in range(2):
        reserve(s, BOTH, slots=[2, 2])
    reserve(s, "one", slots=2, key="k")
    first = reserve(s, BOTH, slots=[1, 1], keys=["k", ""])
    reserve(s, BOTH, slots=[2, 2], keys=["k", ""])
    second = reserve(s, BOTH, slots=[1, 1], keys=["k", ""])
    s.update("one", limit=8)
    s.update("two", slot_decay_per_second=0.25)
    s.update("one", limit=5)
    assert turn(s, first) < turn(s, second)
    db.consistent()


def test_what_is_added_and_taken_off_again_takes_no_room_from_others(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("one", 6, 0.125)
    s.create("two", 6, 0.25)
    for slots, times in (([6, 1], 1), ([1, 6], 7), ([6, 1], 2)):
        for _ in range(times):
            reserve(s, BOTH, slots=slots)
    reserve(s, "one", slots=6)
    before = s.peek("one", for_rate=True, wait=None).wait
    s.adjust("two", 1)
    s.adjust("two", -1)
    assert s.peek("one", for_rate=True, wait=None).wait == before
    db.consistent()


@pytest.mark.parametrize("other", [True, False])
def test_what_adjust_adds_does_not_put_off_those_who_are_bound_to_a_slower_limit(
    clock: Clock, s: Session, other: bool
) -> None:
    clock.freeze()
    s.create("one", 1, 1)
    s.create("slow", 1, 0.1)
    s.rate_limit(["one", "slow"])
    if other:
        reserve(s, "one")
    first, second = (reserve(s, ["one", "slow"]) for _ in range(2))
    s.adjust("one", 50)
    assert [turn(s, each) for each in (first, second)] == [10, 20]
    s.release(first)
    assert turn(s, second) == 20


def test_nor_does_it_when_another_of_their_limits_is_deactivated(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("one", 1, 1)
    s.create("two", 2, 2)
    s.create("three", 3, 1)
    s.adjust("three", 4)
    asleep = reserve(s, ["one", "two", "three"], slots=[1, 1, 2])
    s.adjust("one", 5)
    s.update("two", active=False)
    assert turn(s, asleep) == 3
    s.update("three", active=False)
    assert turn(s, asleep) == 3
    s.update("one", slot_decay_per_second=0.5)
    assert turn(s, asleep) == 10
    db.consistent()


def test_a_turn_days_ahead_is_right_where_the_clocks_are_set_back_meanwhile(clock: Clock, s: Session) -> None:
    clock.freeze(datetime(2026, 10, 24, 12, tzinfo=UTC))
    s.run("set timezone = 'Europe/Berlin'")
    s.create("one", 1, 1 / 3600)
    s.create("two", 1, 1 / 86400)
    s.rate_limit("two", wait=None)
    assert turn(s, reserve(s, BOTH)) == 86400


@pytest.mark.parametrize("rate", [3, 7, 0.3])
def test_a_moment_that_is_rounded_up_finds_its_place_among_turns_that_lie_close(
    clock: Clock, s: Session, rate: float
) -> None:
    clock.freeze()
    s.create("packed", 1, rate)
    s.create("idle", 5, 100)
    s.rate_limit("packed")
    deaf = [reserve(s, "packed", channel=None) for _ in range(3)]
    told = reserve(s, ["packed", "idle"])
    for _ in range(3):
        reserve(s, "packed", channel=None)
    assert turn(s, told) == pytest.approx(4 / rate, abs=0.00001)
    s.release(deaf[0])
    assert turn(s, told) == pytest.approx(1 / rate, abs=0.00001)
    assert seconds(s.peek(["packed", "idle"], wait=None, for_rate=True).wait) == pytest.approx(4 / rate, abs=0.00001)


def test_what_came_free_before_one_who_could_not_move_goes_to_those_behind_when_it_dies(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("everyone", 1, 0.02)
    s.create("tenant", 5, 5)
    s.rate_limit("everyone")
    reserve(s, "everyone")
    bound = reserve(s, ["everyone", "tenant"])
    reserve(s, "everyone")
    last = reserve(s, "everyone")
    clock.advance(5)
    assert [turn(s, each) for each in (bound, last)] == [95, 195]
    clock.advance(4.5)
    turn(s, last)
    clock.advance(1)
    assert s.rate_limit("everyone", wait="1 second").status == "refused"
    clock.advance(4.6)
    assert s.rate_limit("everyone", wait="1 second").status == "refused"
    assert turn(s, last) == pytest.approx(34.9)
    assert seconds(s.rate_limit("everyone", wait=None).wait) == pytest.approx(84.9)
    db.consistent()


def test_whose_turn_comes_as_others_give_up_is_charged_when_it_comes(clock: Clock, s: Session) -> None:
    """Also where it moves over a gap that has passed already."""
    clock.freeze()
    s.create("one", 1, 1)
    s.create("two", 1, 0.1)
    s.rate_limit("two")
    bound, behind = reserve(s, BOTH), reserve(s, "one", slots=1)
    wide = reserve(s, "one")
    clock.advance(5)
    assert s.release(bound)
    for lease_id in (behind, wide):
        turn(s, lease_id)
    assert s.limit("one").level <= 1
    assert seconds(s.rate_limit("one", wait=None).wait) == s.limit("one").level - 1


def test_who_cannot_be_told_keeps_its_moment_and_others_are_placed_around_it(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    create(s)
    s.rate_limit(BOTH)
    first, deaf = reserve(s, BOTH), reserve(s, BOTH, channel=None)
    third, fourth = reserve(s, BOTH), reserve(s, BOTH)
    assert [told_turn(s, each) for each in (first, deaf, third, fourth)] == [2, 4, 6, 8]
    s.release(first)
    assert [turn(s, each) for each in (third, fourth)] == [2, 6]
    assert told_turn(s, deaf) == 4
    db.consistent()


def test_a_newcomer_comes_right_behind_where_one_died_before_somebody_who_cannot_be_told(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("one", 5, 1)
    s.create("two", 3, 0.125)
    s.rate_limit(BOTH, slots=[1, 3])
    reserve(s, "two", slots=3)
    clock.advance(5)
    reserve(s, BOTH, slots=[1, 3], channel=None)
    told = reserve(s, BOTH, slots=[1, 3])
    assert turn(s, told) == 67
    clock.advance(5)
    # One has died by now, and nobody has moved up yet.
    newcomer = s.rate_limit(BOTH, slots=[1, 3], wait=None, channel="pglimits_t", lease_id=uuid4())
    assert seconds(newcomer.wait) == 86
    db.consistent()


def test_moves_give_ups_and_changes_of_the_limits_never_deadlock(db: Db, s: Session) -> None:
    names = ["everyone", *"abcd"]
    for name in names:
        s.create(name, 2, 50)

    def work(seed: int) -> object:
        def run(session: Session) -> None:
            rng = random.Random(seed)
            mine: list[UUID] = []
            for _ in range(150):
                some = rng.sample(names, rng.choice([1, 2, 2, 3]))
                action = rng.random()
                if action < 0.5 and len(mine) < 12:
                    mine.append(reserve(session, some, channel=f"pglimits_{seed}"))
                elif action < 0.75 and mine:
                    session.release(mine.pop(rng.randrange(len(mine))))
                elif mine:
                    session.watch(*mine)
            for lease_id in mine:
                session.release(lease_id)

        return run

    def change(session: Session) -> None:
        rng = random.Random(0)
        for _ in range(60):
            name = rng.choice(names)
            session.update(name, slot_decay_per_second=rng.choice([10, 50, 200]), limit=rng.choice([2, 3]))
            session.adjust(name, rng.choice([-2, 1]))

    try:
        db.together([*(work(seed) for seed in range(5)), change])  # type: ignore[list-item]
    except psycopg.errors.DeadlockDetected as error:
        pytest.fail(str(error))
    assert s.value("select count(*) from pglimits.waiters") == 0
    assert s.value("select count(*) from pglimits.states where pinned <> 0") == 0
    db.consistent()
