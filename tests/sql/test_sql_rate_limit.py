"""Rate limits: an exact bucket, turns reserved ahead, and what is given back."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqltest import Clock, Db, Session, changes_nothing, fails, seconds

START = datetime(2025, 1, 1, tzinfo=UTC)
MICRO = Fraction(1, 1_000_000)
GIVES_UP = uuid4()


def at(moment: datetime) -> Fraction:
    """Seconds since START, exactly."""
    return Fraction((moment - START) // timedelta(microseconds=1), 1_000_000)


def interval(value: timedelta | None) -> Fraction:
    assert value is not None
    return Fraction(value // timedelta(microseconds=1), 1_000_000)


class Bucket:
    """What a rate limit is, said in another way than the product says it: fractions, no virtual time."""

    def __init__(self, limit: int, rate: str) -> None:
        self.limit, self.rate, self.level, self.seen = limit, Fraction(rate), Fraction(0), Fraction(0)

    def decay(self, now: Fraction) -> None:
        self.level = max(self.level - self.rate * (now - self.seen), Fraction(0))
        self.seen = now

    def wait(self, slots: int) -> Fraction:
        return max((self.level + slots - self.limit) / self.rate, Fraction(0))


def up(value: Fraction) -> Fraction:
    """To the next microsecond, which is what a clock can show."""
    return math.ceil(value / MICRO) * MICRO


def never_too_fast(grants: Iterable[tuple[Fraction, int]], limit: int, rate: Fraction) -> None:
    """In any window of t seconds at most limit + rate * t slots."""
    log = sorted(grants)
    total = list(itertools.accumulate((slots for _, slots in log), initial=0))
    for first in range(len(log)):
        for last in range(first, len(log)):
            window = log[last][0] - log[first][0] + MICRO  # turns are rounded up to microseconds
            assert total[last + 1] - total[first] <= limit + rate * window, (log[first], log[last])


# The bucket.


@pytest.mark.parametrize(
    ("limit", "rate", "widest"), [(5, "1", 1), (10, "7.3", 4), (3, "0.37", 3), (1, "1000", 1), (100, "33.333333", 60)]
)
def test_the_bucket_is_exact_over_random_arrivals(clock: Clock, s: Session, limit: int, rate: str, widest: int) -> None:
    """Denied callers and readers are all over it, and change nothing."""
    now = at(clock.freeze(START))
    s.create("api", limit, float(rate))
    rng = random.Random(limit)
    bucket = Bucket(limit, rate)
    granted = denied = 0
    for _ in range(250):
        pause = rng.expovariate(2.5) * float(widest / bucket.rate)
        clock.advance(round(pause, 6))
        now = at(clock.now())
        bucket.decay(now)
        slots = rng.randint(1, widest)
        expected = bucket.wait(slots)
        if rng.random() < 0.2:
            answer = s.peek("api", slots=slots, for_rate=True)
            assert (answer.status == "granted") == (expected == 0)
            assert float(bucket.level) == pytest.approx(s.limit("api").level, abs=1e-9)
            continue
        answer = s.rate_limit("api", slots=slots)
        assert answer.status == ("granted" if expected == 0 else "refused")
        if expected == 0:
            granted += 1
            bucket.level += slots
            assert answer.wait == timedelta(0)
            assert answer.retry_after is None
        else:
            denied += 1
            assert interval(answer.retry_after) == up(expected)
    assert granted > 15
    assert denied > 15


@pytest.mark.parametrize(("limit", "rate"), [(5, "2"), (7, "0.9"), (1, "12.5")])
def test_reserved_turns_are_exact_over_random_arrivals(clock: Clock, s: Session, limit: int, rate: str) -> None:
    clock.freeze(START)
    s.create("api", limit, float(rate))
    rng = random.Random(limit)
    bucket = Bucket(limit, rate)
    grants: list[tuple[Fraction, int]] = []
    refused = 0
    for _ in range(200):
        clock.advance(round(rng.expovariate(1.2) / float(bucket.rate), 6))
        now = at(clock.now())
        bucket.decay(now)
        slots = 1 if rng.random() < 0.8 else rng.randint(1, limit)
        longest = rng.choice([None, 0, 1, 2, 5])
        answer = s.rate_limit("api", slots=slots, wait=None if longest is None else f"{longest} seconds")
        expected = bucket.wait(slots)
        if longest is None or up(expected) <= longest:
            assert answer.status == "granted"
            assert interval(answer.wait) == up(expected)
            bucket.level += slots
            grants.append((now + interval(answer.wait), slots))
        else:
            refused += 1
            assert (answer.status, interval(answer.retry_after)) == ("refused", up(expected))
    assert refused > 10
    never_too_fast(grants, limit, bucket.rate)


def test_callers_that_wait_get_all_that_decays(clock: Clock, s: Session) -> None:
    clock.freeze(START)
    s.create("api", 3, 7.0)
    waits = [interval(s.rate_limit("api", wait=None).wait) for _ in range(703)]
    assert waits[:3] == [0, 0, 0]
    assert waits[-1] == 100, "700 turns at 7 per second"


def test_a_denial_a_read_and_an_update_do_not_restart_the_decay(clock: Clock, s: Session) -> None:
    clock.freeze(START)
    s.create("api", 1, 0.1)
    assert s.rate_limit("api").status == "granted"
    for second in range(1, 10):
        clock.advance(1)
        answer = s.rate_limit("api")
        assert (answer.status, seconds(answer.retry_after)) == ("refused", 10 - second)
        assert s.limit("api").level == pytest.approx(1 - second / 10)
        s.peek("api", for_rate=True)
        s.update("api", description=str(second), slot_decay_per_second=0.1)
        s.sweep("0 seconds")
    clock.advance(1)
    assert s.rate_limit("api").status == "granted"


def test_the_level_of_an_idle_limit_is_zero_and_does_not_save_up(clock: Clock, s: Session) -> None:
    s.create("api", 2, 1)
    s.rate_limit("api", slots=2)
    clock.advance(1000)
    assert s.limit("api").level == 0
    assert [s.rate_limit("api").status for _ in range(3)] == ["granted", "granted", "refused"]


def test_keys_have_levels_of_their_own_and_the_view_adds_them_up(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    for key in "ab":
        assert s.rate_limit("api", slots=2, key=key).status == "granted"
    assert s.rate_limit("api", key="a").status == "refused"
    assert s.limit("api").level == pytest.approx(4)


# Reserving ahead.


def test_a_turn_beyond_the_wait_is_refused_at_once_and_takes_nothing(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 0.5)
    s.rate_limit("api")
    with changes_nothing(db.session()):
        answer = s.rate_limit("api", wait="1.999999 seconds")
    assert (answer.status, answer.wait, answer.lease_id) == ("refused", None, None)
    assert seconds(answer.retry_after) == 2
    assert seconds(s.rate_limit("api", wait="2 seconds").wait) == 2


def test_one_round_trip_reserves_the_place(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    waits = [seconds(s.rate_limit("api", wait="10 seconds").wait) for _ in range(5)]
    assert waits == [0, 1, 2, 3, 4]
    assert s.limit("api").level == pytest.approx(5)
    assert s.limit("api").waiting == 4
    assert [row.position for row in s.waiters()] == [1, 2, 3, 4]
    clock.advance(2)
    assert s.limit("api").waiting == 2


def test_repeating_a_reservation_with_its_id_keeps_the_turn_and_charges_once(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    lease_id = uuid4()
    assert seconds(s.rate_limit("api", wait=None, lease_id=lease_id).wait) == 1
    clock.advance(0.25)
    answer = s.rate_limit("api", wait=None, lease_id=lease_id)
    assert (answer.status, seconds(answer.wait), answer.lease_id) == ("granted", 0.75, lease_id)
    clock.advance(1)
    answer = s.rate_limit("api", wait=None, lease_id=lease_id)
    assert (answer.status, seconds(answer.wait)) == ("granted", 0)
    assert s.limit("api").level == pytest.approx(0.75)


def test_repeating_an_immediate_grant_with_its_id_charges_once(s: Session, clock: Clock) -> None:
    clock.freeze()
    s.create("api", 5, 1)
    lease_id = uuid4()
    for _ in range(3):
        assert s.rate_limit("api", lease_id=lease_id).status == "granted"
    assert s.limit("api").level == pytest.approx(1)


def test_a_turn_that_has_come_is_remembered_also_when_the_rate_falls(s: Session, clock: Clock) -> None:
    clock.freeze()
    s.create("api", 5, 100)
    lease_id = uuid4()
    clock.advance(1)
    s.rate_limit("api", lease_id=lease_id)
    clock.advance(1)
    s.update("api", slot_decay_per_second=0.001)
    s.rate_limit("api", lease_id=uuid4())
    assert s.rate_limit("api", lease_id=lease_id).status == "granted"
    assert s.limit("api").level == pytest.approx(1)


def test_a_turn_that_has_come_is_remembered_also_of_who_has_died_since(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 0.125)
    s.rate_limit("api")
    lease_id = s.rate_limit("api", wait=None, lease_id=uuid4(), channel="pglimits_t").lease_id
    clock.advance(11)
    answer = s.rate_limit("api", wait=None, lease_id=lease_id, channel="pglimits_t")
    assert (answer.status, seconds(answer.wait)) == ("granted", 0)
    assert s.limit("api").level == pytest.approx(2 - 11 * 0.125)


@pytest.mark.parametrize("change", ["given up", "grown"])
def test_a_turn_that_has_come_early_is_remembered_from_then_on(clock: Clock, s: Session, change: str) -> None:
    clock.freeze()
    s.create("api", 30, 1)
    clock.advance(60)
    s.rate_limit("api", slots=25)
    ahead = s.rate_limit("api", slots=29, wait=None, channel="pglimits_t").lease_id
    lease_id = s.rate_limit("api", wait=None, lease_id=uuid4(), channel="pglimits_t").lease_id
    if change == "given up":
        s.release(ahead)
    else:
        s.update("api", limit=59)
    clock.advance(7)
    s.rate_limit("api", wait=None, lease_id=uuid4())
    level = s.limit("api").level
    answer = s.rate_limit("api", wait=None, lease_id=lease_id, channel="pglimits_t")
    assert (answer.status, seconds(answer.wait)) == ("granted", 0)
    assert s.limit("api").level == level


def test_max_waiters_bounds_those_who_sleep(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1, max_waiters=2)
    for _ in range(3):
        s.rate_limit("api", wait=None)
    with fails("PL006", "api"):
        s.rate_limit("api", wait=None)
    assert s.rate_limit("api").status == "refused"
    clock.advance(1)
    assert s.rate_limit("api", wait=None).status == "granted"


def test_a_sleeper_is_told_its_turn_by_watch(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 0.25)
    s.rate_limit("api")
    sleeper = s.rate_limit("api", wait=None, channel="pglimits_t").lease_id
    clock.advance(1)
    row = s.watch_one(sleeper)
    assert (row.status, seconds(row.wait), row.retry_after) == ("granted", 3, None)


def test_what_watch_says_of_a_turn_reserved_without_a_channel_can_be_read_by_clients(clock: Clock, s: Session) -> None:
    """Such a sleeper never dies. But Python, for one, has no 'infinity' among its times."""
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    sleeper = s.rate_limit("api", wait=None).lease_id
    (row,) = s.all("select * from pglimits.watch(%s)", [sleeper])
    assert (row.status, seconds(row.wait)) == ("granted", 1)


# Giving up.


def sleeping(s: Session, count: int, channel: str | None = "pglimits_t", **more: Any) -> list[UUID]:
    return [s.rate_limit("api", wait=None, channel=channel, lease_id=uuid4(), **more).lease_id for _ in range(count)]


def turns(s: Session, *lease_ids: UUID) -> list[float]:
    by_id = {row.lease_id: seconds(row.wait) for row in s.watch(*lease_ids)}
    return [by_id[lease_id] for lease_id in lease_ids]


def test_a_turn_given_up_at_the_tail_goes_to_the_next_caller(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    first, second = sleeping(s, 2, channel=None)
    assert s.release(second) is True
    assert s.release(second) is False
    assert s.limit("api").level == pytest.approx(2)
    assert seconds(s.rate_limit("api", wait=None).wait) == 2
    assert turns(s, first) == [1]


def test_a_turn_given_up_in_the_middle_moves_up_those_behind_it_and_tells_them(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    s.rate_limit("api", slots=2)
    first, second = sleeping(s, 2)
    (third,) = sleeping(s, 1, channel="pglimits_u", slots=2)
    assert turns(s, first, second, third) == [1, 2, 4]
    listener = db.session().connection
    listener.execute("listen pglimits_u")
    assert s.release(second)
    assert [each.channel for each in listener.notifies(timeout=20, stop_after=1)] == ["pglimits_u"]
    assert turns(s, first, third) == [1, 3]
    assert seconds(s.rate_limit("api", wait=None).wait) == 4


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: s.release(GIVES_UP), id="the one before gives up"),
        pytest.param(lambda s: s.adjust("api", -2), id="adjusted"),
        pytest.param(lambda s: s.reset("api"), id="reset"),
        pytest.param(lambda s: s.update("api", limit=10), id="grown"),
    ],
)
def test_a_sleeper_whose_turn_comes_by_what_others_do_is_told(
    clock: Clock, db: Db, s: Session, change: Callable[[Session], object]
) -> None:
    clock.freeze()
    s.create("api", 4, 1)
    s.rate_limit("api", slots=4)
    s.rate_limit("api", lease_id=GIVES_UP, slots=2, wait=None, channel="pglimits_t")
    (told,) = sleeping(s, 1, channel="pglimits_u")
    clock.advance(1.5)
    assert turns(s, told) == [1.5]
    listener = db.session().connection
    listener.execute("listen pglimits_u")
    change(s)
    assert [each.channel for each in listener.notifies(timeout=20, stop_after=1)] == ["pglimits_u"]
    assert turns(s, told) == [0]


def test_who_stood_in_line_for_a_turn_and_cannot_be_told_goes_when_it_hears_that_it_does(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("api", 1, 0.1)
    s.acquire("api")
    before = s.queue("api", channel="pglimits_t")
    deaf = uuid4()
    assert s.rate_limit("api", wait=None, lease_id=deaf).status == "queued"
    s.adjust("api", 1)
    s.release(before)
    assert not s.value("select pglimits.may_sleep(%s)", deaf)
    assert [row.status for row in s.watch(deaf)] == ["retry"]
    told = s.rate_limit("api", wait=None, lease_id=deaf)
    assert (told.status, seconds(told.wait)) == ("granted", 20)
    s.adjust("api", -1)
    assert seconds(s.rate_limit("api", wait=None).wait) == 10, "the place that came free goes to another"
    clock.advance(11)
    assert seconds(s.rate_limit("api", wait=None).wait) == 19, "it is not taken for dead"


def test_a_turn_that_is_handed_to_who_stood_in_line_is_remembered_from_then_on(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 600, 50)
    clock.advance(15)
    held = s.acquire("api", slots=600).lease_id
    s.queue("api", channel="pglimits_x")
    behind = uuid4()
    ask = {"slots": 50, "wait": None, "lease_id": behind, "channel": "pglimits_x"}
    assert s.rate_limit("api", **ask).status == "queued"
    s.adjust("api", -600)
    s.release(held)
    s.rate_limit("api", wait=None, lease_id=uuid4())
    level = s.limit("api").level
    assert [row.status for row in s.watch(behind)] == ["granted"]
    assert s.rate_limit("api", **ask).status == "granted"
    assert s.limit("api").level == level


def test_adjusting_by_nothing_changes_nothing_for_those_who_sleep(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    before = sleeping(s, 1)[0]
    s.adjust("api", 2)
    behind = sleeping(s, 1)[0]
    s.adjust("api", 0)
    s.adjust("api", -2)
    (last,) = sleeping(s, 1)
    assert turns(s, before, behind, last) == [1, 2, 3]


def test_what_is_given_back_before_a_sleeper_in_plain_sql_goes_to_those_who_can_be_told(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    (gives_up,) = sleeping(s, 1)
    (plain,) = sleeping(s, 1, channel=None)
    (behind,) = sleeping(s, 1)
    s.release(gives_up)
    assert turns(s, plain, behind) == [2, 1], "its time is fixed, and it is not delayed by who goes before"
    assert seconds(s.peek("api", for_rate=True, wait=None).wait) == 3
    s.release(behind)
    assert seconds(s.peek("api", for_rate=True, wait=None).wait) == 1


def test_adjusting_down_helps_who_comes_later_also_past_sleepers_who_cannot_be_told(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 10, 1)
    s.rate_limit("api", slots=10)
    (plain,) = sleeping(s, 1, channel=None, slots=2)
    (told,) = sleeping(s, 1, slots=3)
    assert turns(s, plain, told) == [2, 5]
    assert s.adjust("api", -4) == 9, "six of ten used, and three reserved; the other's turn counts when it comes"
    assert turns(s, plain, told) == [2, 0]
    assert s.adjust("api", -100) == 0
    assert seconds(s.peek("api", slots=5, for_rate=True, wait=None).wait) == 0
    clock.advance(2)
    assert s.adjust("api", 0) == 2, "its turn has come"


def test_turns_that_can_never_come_are_given_back(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    sleeping(s, 5)
    s.update("api", slot_decay_per_second=0)
    s.update("api", slot_decay_per_second=1)
    assert seconds(s.rate_limit("api", wait=None).wait) == 1


def test_a_turn_that_has_come_is_not_given_back(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    (sleeper,) = sleeping(s, 1)
    clock.advance(1)
    assert s.release(sleeper) is False
    assert s.limit("api").level == pytest.approx(1)


def test_a_sleeper_that_died_gives_its_turn_back(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1 / 16)
    s.rate_limit("api")
    dead, alive = sleeping(s, 2)
    assert turns(s, dead, alive) == [16, 32]
    clock.advance(6)
    turns(s, alive)
    clock.advance(5)
    assert turns(s, alive) == [5]
    assert [row.lease_id for row in s.waiters()] == [alive]


@pytest.mark.parametrize("seed", range(3))
def test_nobody_goes_too_fast_whatever_is_given_up_adjusted_or_held(
    clock: Clock, db: Db, s: Session, seed: int
) -> None:
    """A random life of one rate limit, its grants logged at the times at which they really go."""
    rng = random.Random(seed)
    limit, rate = 4, Fraction(5, 2)
    clock.freeze(START)
    s.create("api", limit, float(rate))
    grants: list[tuple[Fraction, int]] = []
    told: dict[UUID, tuple[Fraction, int]] = {}  # when it goes, as it knows; may be told a new time
    fixed: dict[UUID, tuple[Fraction, int]] = {}  # plain SQL: nobody can tell it
    gave_up = held = 0
    for _ in range(250):
        now = at(clock.now())
        for sleepers in (told, fixed):
            for lease_id, (goes, slots) in list(sleepers.items()):
                if goes <= now:
                    grants.append((goes, slots))
                    del sleepers[lease_id]
        action = rng.random()
        if action < 0.35:
            slots = rng.choice([1, 1, 1, 2, 3])
            lease_id = uuid4()
            tellable = rng.random() < 0.7
            longest = rng.choice(["0", "2 seconds", "8 seconds"])
            answer = s.rate_limit(
                "api", slots=slots, wait=longest, lease_id=lease_id, channel="pglimits_t" if tellable else None
            )
            if answer.status == "granted":
                (told if tellable else fixed)[lease_id] = (now + interval(answer.wait), slots)
        elif action < 0.45 and (told or fixed):
            sleepers = told if told and (not fixed or rng.random() < 0.7) else fixed
            lease_id = rng.choice(sorted(sleepers))
            if s.release(lease_id):
                gave_up += 1
                del sleepers[lease_id]
        elif action < 0.48:
            s.adjust("api", rng.randint(0, 3))
        elif action < 0.56:
            lease = s.acquire("api", slots=rng.randint(1, 2))
            if lease.status == "granted":
                held += 1
                grants.append((now, s.holders()[-1].slots))
                s.release(lease.lease_id)
        elif action < 0.58:
            s.sweep("0 seconds")
        else:
            clock.advance(round(rng.expovariate(2.0), 6))
            now = at(clock.now())
        for row in s.watch(*told):
            goes, slots = told[row.lease_id]
            if goes > now:
                told[row.lease_id] = (now + interval(row.wait), slots)
    assert len(grants) > 40
    assert gave_up > 5
    assert held > 0
    never_too_fast(grants, limit, rate)


def test_the_level_and_peek_do_not_count_the_turns_of_the_dead(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1 / 64)
    s.rate_limit("api")
    sleeping(s, 1)
    clock.advance(11)
    assert s.limit("api").level == 1 - 11 / 64
    peeked = s.peek("api", wait=None, for_rate=True)
    assert seconds(peeked.wait) == seconds(s.rate_limit("api", wait=None).wait) == 64 - 11


# A rate changed meanwhile.


def test_a_changed_rate_moves_the_turns_of_those_who_sleep_and_tells_them(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    first, second = sleeping(s, 2)
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    clock.advance(0.5)
    s.update("api", slot_decay_per_second=0.25)
    assert [each.channel for each in listener.notifies(timeout=20, stop_after=1)] == ["pglimits_t"]
    assert turns(s, first, second) == [2, 6]
    s.update("api", slot_decay_per_second=5)
    assert turns(s, first, second) == [0.1, 0.3]
    assert seconds(s.rate_limit("api", wait=None).wait) == 0.5


def test_the_level_so_far_is_kept_and_then_decays_at_the_new_rate(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 10, 1)
    s.rate_limit("api", slots=10)
    clock.advance(2)
    s.update("api", slot_decay_per_second=3)
    assert s.limit("api").level == pytest.approx(8)
    clock.advance(1)
    assert s.limit("api").level == pytest.approx(5)
    s.update("api", slot_decay_per_second=0)
    clock.advance(100)
    s.update("api", slot_decay_per_second=1)
    assert s.limit("api").level == pytest.approx(5)
    clock.advance(2)
    assert s.limit("api").level == pytest.approx(3)


def test_a_changed_limit_moves_the_turns_of_those_who_sleep(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    first, second = sleeping(s, 2)
    s.update("api", limit=2)
    assert turns(s, first, second) == [0, 1]
    assert seconds(s.rate_limit("api", wait=None).wait) == 2


def test_a_rate_taken_away_tells_those_who_sleep_to_ask_and_they_get_the_error(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    (sleeper,) = sleeping(s, 1)
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    s.update("api", slot_decay_per_second=0)
    assert str(sleeper) in [each.payload for each in listener.notifies(timeout=20, stop_after=2)]
    assert s.watch_one(sleeper).status == "retry"
    with fails("PL005", "api"):
        s.rate_limit("api", wait=None, lease_id=sleeper)


def test_a_sleeper_that_is_now_too_wide_is_told_so(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 3, 1)
    s.rate_limit("api", slots=3)
    (wide,) = sleeping(s, 1, slots=3)
    (narrow,) = sleeping(s, 1)
    s.update("api", limit=2)
    assert s.watch_one(wide).status == "retry"
    with fails("PL004", "slots"):
        s.rate_limit("api", slots=3, wait=None, lease_id=wide)
    assert turns(s, narrow) == [2], "it moves up to where the level 3 and itself fit in 2"


def test_a_deactivated_limit_lets_its_sleepers_go_at_once(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 0.001)
    s.rate_limit("api")
    (sleeper,) = sleeping(s, 1)
    s.update("api", active=False)
    assert s.watch_one(sleeper).status == "retry"
    assert s.rate_limit("api", wait=None, lease_id=sleeper).status == "unlimited"


# Several limits.


def test_over_several_limits_the_latest_of_their_turns_counts(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("fast", 1, 10)
    s.create("slow", 1, 0.5)
    assert seconds(s.rate_limit(["fast", "slow"]).wait) == 0
    answer = s.rate_limit(["fast", "slow"], wait=None)
    assert (answer.status, seconds(answer.wait)) == ("granted", 2)
    assert seconds(s.rate_limit("slow", wait=None).wait) == 4


def test_over_several_limits_all_or_nothing(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("free", 5, 1)
    s.create("used", 1, 1)
    s.rate_limit("used")
    with changes_nothing(db.session()):
        answer = s.rate_limit(["free", "used"], slots=[2, 1])
        assert (answer.status, seconds(answer.retry_after)) == ("refused", 1)
        answer = s.rate_limit(["free", "used"], wait="0.5 seconds")
        assert (answer.status, seconds(answer.retry_after)) == ("refused", 1)
    assert s.limit("free").level == 0


def test_a_far_turn_on_one_limit_does_not_hold_up_others_on_another(clock: Clock, s: Session) -> None:
    """Promise 3: with callers waiting, 'fast' has to deliver what decays."""
    clock.freeze()
    s.create("fast", 10, 10)
    s.create("slow", 1, 1 / 64)
    s.rate_limit(["fast", "slow"])
    assert seconds(s.rate_limit(["fast", "slow"], wait=None).wait) == 64
    assert seconds(s.rate_limit("fast", wait=None).wait) == 0
    waits = [seconds(s.rate_limit("fast", wait=None).wait) for _ in range(20)]
    assert max(waits) <= 2


@pytest.mark.parametrize("seed", range(4))
def test_over_several_limits_nobody_goes_too_fast_on_any_of_them(clock: Clock, db: Db, s: Session, seed: int) -> None:
    limits = {"one": (3, Fraction(2)), "two": (5, Fraction(1)), "three": (1, Fraction(4))}
    clock.freeze(START)
    for name, (limit, rate) in limits.items():
        s.create(name, limit, float(rate))
    rng = random.Random(seed)
    grants: dict[str, list[tuple[Fraction, int]]] = {name: [] for name in limits}
    asleep: dict[UUID, tuple[Fraction, dict[str, int], bool]] = {}
    gave_up = 0
    for _ in range(200):
        now = at(clock.now())
        for lease_id, (goes, slots, _) in list(asleep.items()):
            if goes <= now:
                for name, count in slots.items():
                    grants[name].append((goes, count))
                del asleep[lease_id]
        action = rng.random()
        if action < 0.45:
            names = rng.sample(sorted(limits), rng.choice([1, 1, 2, 3]))
            slots = {name: rng.randint(1, min(2, limits[name][0])) for name in names}
            told, lease_id = rng.random() < 0.6, uuid4()
            answer = s.rate_limit(
                names,
                slots=list(slots.values()),
                wait=rng.choice(["0", "3 seconds", "9 seconds"]),
                lease_id=lease_id if rng.random() < 0.9 else None,
                channel="pglimits_t" if told else None,
            )
            if answer.status == "granted":
                asleep[answer.lease_id] = (now + interval(answer.wait), slots, told)
        elif action < 0.55 and asleep:
            lease_id = rng.choice(sorted(asleep))
            if s.release(lease_id):
                gave_up += 1
                del asleep[lease_id]
        else:
            clock.advance(round(rng.expovariate(2.0), 6))
            now = at(clock.now())
        for name in limits:
            s.limit(name)
        waits: dict[UUID, Fraction] = {}
        for row in s.watch(*(lease_id for lease_id, (_, _, told) in asleep.items() if told)):
            if row.status == "granted":
                waits[row.lease_id] = max(interval(row.wait), waits.get(row.lease_id, Fraction(0)))
        for lease_id, wait in waits.items():
            goes, slots, told = asleep[lease_id]
            if goes > now:
                asleep[lease_id] = (now + wait, slots, told)
    assert gave_up > 3
    for name, (limit, rate) in limits.items():
        assert len(grants[name]) > 15
        never_too_fast(grants[name], limit, rate)
    db.consistent()


def test_a_reservation_over_several_limits_is_given_back_on_each(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("one", 1, 1)
    s.create("two", 1, 0.5)
    s.rate_limit(["one", "two"])
    lease_id = s.rate_limit(["one", "two"], wait=None).lease_id
    assert s.release(lease_id)
    assert seconds(s.rate_limit("two", wait=None).wait) == 2
    assert seconds(s.rate_limit("one", wait=None).wait) <= 1


def turn_in(s: Session, lease_id: UUID) -> float:
    rows = s.watch(lease_id)
    assert {row.status for row in rows} == {"granted"}
    return max(seconds(row.wait) for row in rows)


@pytest.mark.parametrize("change", [{"slot_decay_per_second": 0.1}, {"slot_decay_per_second": 4}, {"limit": 3}])
@pytest.mark.parametrize("changed", ["one", "two"])
def test_who_sleeps_over_several_limits_moves_on_all_of_them_when_one_is_changed(
    clock: Clock, db: Db, s: Session, change: dict[str, Any], changed: str
) -> None:
    """Its turns on the others are for a moment that was reckoned by this one."""
    clock.freeze()
    s.create("one", 2, 1)
    s.create("two", 2, 1)
    s.rate_limit("one", slots=2)
    names, lease_id = ["one", "two"], uuid4()
    answer = s.rate_limit(names, slots=[2, 2], wait=None, channel="pglimits_t", lease_id=lease_id)
    assert seconds(answer.wait) == 2
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    s.update(changed, **change)
    assert len(list(listener.notifies(timeout=20, stop_after=1))) > 0
    goes_at = turn_in(s, lease_id)
    assert goes_at == seconds(
        s.rate_limit(names, slots=[2, 2], wait=None, channel="pglimits_t", lease_id=lease_id).wait
    )
    assert goes_at == (2 if changed == "two" else {0.1: 20, 4: 0.5}.get(change.get("slot_decay_per_second", 0), 1))
    # It takes its slots when it goes, not before.
    clock.advance(goes_at)
    for name in names:
        limit = s.limit(name)
        if (name, limit.limit) == ("one", 3):
            continue
        wait = seconds(s.rate_limit(name, slots=limit.limit, wait=None).wait)
        assert wait == pytest.approx(2 / limit.slot_decay_per_second, abs=0.00001)
    db.consistent()


@pytest.mark.parametrize("end", ["deactivate", "delete"])
def test_who_sleeps_over_several_limits_goes_as_soon_as_the_others_let_it_when_one_is_no_longer_enforced(
    clock: Clock, s: Session, end: str
) -> None:
    clock.freeze()
    s.create("slow", 1, 0.1)
    s.create("fast", 1, 1)
    s.rate_limit(["slow", "fast"])
    lease_id = uuid4()
    assert seconds(s.rate_limit(["slow", "fast"], wait=None, channel="pglimits_t", lease_id=lease_id).wait) == 10
    if end == "delete":
        s.delete("slow")
    else:
        s.update("slow", active=False)
    assert turn_in(s, lease_id) == 1
    assert seconds(s.rate_limit(["slow", "fast"], wait=None, channel="pglimits_t", lease_id=lease_id).wait) == 1
    assert s.limit("fast").level == 2


@pytest.mark.parametrize("change", [{"slot_decay_per_second": 50}, {"limit": 8}])
def test_who_gave_no_channel_goes_at_the_time_it_knows_and_is_charged_then(
    clock: Clock, s: Session, change: dict[str, Any]
) -> None:
    clock.freeze()
    s.create("api", 5, 0.5)
    s.rate_limit("api", slots=5)
    deaf = s.rate_limit("api", slots=5, wait=None)
    assert seconds(deaf.wait) == 10
    s.update("api", **change)
    clock.advance(10)
    assert s.limit("api").level == 5
    answer = s.rate_limit("api", slots=5, wait=None)
    assert seconds(answer.wait) == {50: 0.1}.get(change.get("slot_decay_per_second", 0), 4)


def test_nobody_sleeps_any_longer_for_a_limit_that_has_lost_its_decay(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 0.1, max_waiters=1)
    s.rate_limit("api")
    s.rate_limit("api", wait=None)
    s.update("api", slot_decay_per_second=0)
    assert s.limit("api").waiting == 0
    s.acquire("api")
    assert s.acquire("api", wait=None).status == "queued"


def test_a_turn_that_has_come_on_a_faster_limit_decays_from_when_it_came(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("fast", 1, 1)
    s.create("slow", 1, 0.5)
    s.rate_limit("slow")
    assert seconds(s.rate_limit(["fast", "slow"], wait=None).wait) == 2
    clock.advance(2)
    assert s.limit("fast").level == 1
    clock.advance(0.75)
    assert s.limit("fast").level == 0.25
    clock.advance(60)
    assert s.limit("fast").level == 0
    assert s.adjust("fast", 0) == 0


def test_a_limit_that_is_deactivated_keeps_nothing_for_those_whom_it_lets_through(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.rate_limit("api")
    sleeping(s, 3)
    assert s.limit("api").level == 4
    s.update("api", active=False)
    s.update("api", active=True)
    assert s.limit("api").level == 1


# What cannot be.


def test_a_limit_without_decay_is_an_error_that_names_it(db: Db, s: Session) -> None:
    s.create("api", 1, 1)
    s.create("database", 1)
    with changes_nothing(db.session()):
        for names in ("database", ["api", "database"]):
            with fails("PL005", "database"):
                s.rate_limit(names, wait=None)


@pytest.mark.parametrize("wait", ["0", "1 minute", None])
def test_more_slots_than_the_limit_is_an_error_at_once(db: Db, s: Session, wait: str | None) -> None:
    s.create("api", 2, 1)
    with changes_nothing(db.session()), fails("PL004", "slots", "api"):
        s.rate_limit("api", slots=3, wait=wait)


def test_limit_zero_admits_nobody_and_is_no_error(s: Session) -> None:
    s.create("api", 0, 1)
    answer = s.rate_limit("api")
    assert (answer.status, answer.retry_after) == ("refused", None)
    assert s.rate_limit("api", wait="5 seconds").status in ("refused", "queued")


def test_a_limit_raised_from_zero_lets_those_go_who_wait_for_a_turn(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 0, 1)
    answer = s.rate_limit("api", wait=None)
    assert answer.status == "queued"
    s.update("api", limit=1)
    assert s.watch_one(answer.lease_id).status == "retry"
    answer = s.rate_limit("api", wait=None, lease_id=answer.lease_id)
    assert (answer.status, seconds(answer.wait)) == ("granted", 0)


def test_a_limit_raised_from_zero_gives_turns_to_those_who_can_be_told(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 0, 1)
    waiters = [s.rate_limit("api", wait=None, channel="pglimits_t").lease_id for _ in range(2)]
    s.update("api", limit=1)
    assert turns(s, *waiters) == [0, 1]


def test_a_missing_or_inactive_rate_limit_is_not_enforced(s: Session) -> None:
    s.create("off", 1, 1, active=False)
    for _ in range(3):
        answer = s.rate_limit("off")
        assert (answer.status, answer.wait, answer.lease_id) == ("unlimited", None, None)
    assert s.notices == []
    assert s.rate_limit("nowhere").status == "unlimited"
    assert len(s.notices) == 1
    assert "nowhere" in s.notices[0]
    with fails("PL002", "nowhere"):
        s.rate_limit(["off", "nowhere"], strict=True)


# Concurrency on a rate limit: both budgets.


def test_acquire_on_a_rate_limit_counts_against_both_budgets(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    first, _ = s.serves("api", 2)
    assert (s.limit("api").held, s.limit("api").level) == (2, pytest.approx(2))
    clock.advance(10)
    assert s.acquire("api").status == "refused", "the level is down, but both slots are held"
    s.release(first.lease_id)
    assert s.acquire("api").status == "granted"
    s.release(s.holders()[0].lease_id)
    assert s.acquire("api").status == "granted"
    for lease in s.holders():
        s.release(lease.lease_id)
    answer = s.acquire("api")
    assert (answer.status, seconds(answer.retry_after)) == ("refused", 1), "nothing is held, but the level is up"
    assert s.rate_limit("api").status == "refused"


# adjust.


def test_adjust_corrects_the_level_up_even_past_the_limit(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("tokens", 1000, 100)
    s.rate_limit("tokens", slots=500)
    assert s.adjust("tokens", 812) == pytest.approx(1312)
    assert s.limit("tokens").level == pytest.approx(1312)
    assert seconds(s.rate_limit("tokens", wait=None).wait) == pytest.approx(3.13)


def test_adjust_corrects_the_level_down_never_below_zero(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("tokens", 10, 1)
    s.rate_limit("tokens", slots=8)
    assert s.adjust("tokens", -3) == pytest.approx(5)
    assert s.adjust("tokens", -100) == 0
    assert s.limit("tokens").level == 0
    s.rate_limit("tokens", slots=10)
    assert s.rate_limit("tokens").status == "refused"


def test_adjust_down_takes_off_fractions_too(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("tokens", 10, 1)
    s.rate_limit("tokens", slots=3)
    clock.advance(0.4)
    assert s.adjust("tokens", -3) == 0
    s.rate_limit("tokens", slots=3)
    clock.advance(0.4)
    assert s.adjust("tokens", -1) == pytest.approx(1.6)


def test_adjust_down_lets_those_who_sleep_go_earlier_and_keeps_what_they_reserved(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    s.rate_limit("api", slots=2)
    first, second = sleeping(s, 2)
    assert turns(s, first, second) == [1, 2]
    s.adjust("api", -1)
    assert turns(s, first, second) == [0, 1]
    assert s.limit("api").level == pytest.approx(3)
    s.adjust("api", -100)
    assert turns(s, second) == [0]


def test_adjust_by_huge_amounts_and_back_works(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    for _ in range(2):
        s.adjust("api", 2_147_483_647)
    assert s.adjust("api", -2_147_483_648) == pytest.approx(2_147_483_646)
    s.adjust("api", 2_147_483_647)
    assert s.reset("api") == 0
    assert s.limit("api").level == 0
    assert s.rate_limit("api").status == "granted"


def test_adjust_of_a_key_leaves_the_others_alone(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    assert s.adjust("api", 1, key="a") == 1
    assert s.rate_limit("api", key="a").status == "refused"
    assert s.rate_limit("api", key="b").status == "granted"


def test_adjust_needs_a_rate_limit(db: Db, s: Session) -> None:
    s.create("database", 1)
    with changes_nothing(db.session()):
        with fails("PL005", "database"):
            s.adjust("database", 1)
        with fails("PL002", "nowhere"):
            s.adjust("nowhere", 1)


def test_adjust_down_grants_waiters(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 0.001)
    for lease in s.serves("api", 2):
        s.release(lease.lease_id)
    waiter = s.queue("api")
    s.adjust("api", -1)
    assert s.watch_one(waiter).status == "granted"
