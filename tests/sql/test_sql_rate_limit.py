"""Rate limits: an exact bucket, the line before it, who goes when, and what corrects the level."""

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
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails

START = datetime(2025, 1, 1, tzinfo=UTC)
MICRO = Fraction(1, 1_000_000)


def since_start(moment: datetime) -> Fraction:
    """Seconds since START, exactly."""
    return Fraction((moment - START) // timedelta(microseconds=1), 1_000_000)


def exactly(seconds: float) -> Fraction:
    return Fraction(round(seconds * 1_000_000), 1_000_000)


class Bucket:
    """What a rate limit is, said in another way than the product says it: fractions, no virtual time."""

    def __init__(self, limit: int, rate: str) -> None:
        self.limit, self.rate, self.level, self.seen = limit, Fraction(rate), Fraction(0), Fraction(0)

    def decay(self, now: Fraction) -> None:
        self.level = max(self.level - self.rate * (now - self.seen), Fraction(0))
        self.seen = now

    def wait(self, slots: int) -> Fraction:
        """Rounded up to the next microsecond, which is what a clock can show."""
        return math.ceil(max((self.level + slots - self.limit) / self.rate, Fraction(0)) / MICRO) * MICRO


def never_too_fast(grants: Iterable[tuple[Fraction, int]], limit: int, rate: Fraction) -> None:
    """In any window of t seconds at most limit + rate * t slots."""
    log = sorted(grants)
    total = list(itertools.accumulate((slots for _, slots in log), initial=0))
    for first in range(len(log)):
        for last in range(first, len(log)):
            window = log[last][0] - log[first][0] + MICRO  # moments are rounded up to microseconds
            assert total[last + 1] - total[first] <= limit + rate * window, (log[first], log[last])


def waits(s: Session, name: str = "api", channel: str | None = "pglimits_t", **more: Any) -> UUID:
    """Stand in the line of a rate limit; returns the id to watch."""
    answer = s.rate_limit(name, lease_id=uuid4(), channel=channel, **{"timeout_seconds": FOREVER, **more})
    assert answer.status == "queued", answer
    lease_id: UUID = answer.lease_id
    return lease_id


def go(s: Session, clock: Clock, waiting: Iterable[UUID], late: float = 0, until: float = 1000) -> dict[UUID, float]:
    """Everybody looks when it was told to, or so much later. Returns when they go, in seconds from now."""
    began, left, moments = clock.now(), list(waiting), {}
    while left and (passed := (clock.now() - began).total_seconds()) < until:
        s.beat("pglimits_t")
        rows = s.watch(*left)
        moments.update({row.lease_id: passed + row.seconds for row in rows if row.status == "granted"})
        left = [row.lease_id for row in rows if row.status == "queued"]
        clock.advance(
            round(min([3, *(row.seconds for row in rows if row.status == "queued" and row.seconds)]) + late, 6)
        )
    return moments


# The bucket.


@pytest.mark.parametrize(
    ("limit", "rate", "widest"), [(5, "1", 1), (10, "7.3", 4), (3, "0.37", 3), (1, "1000", 1), (100, "33.333333", 60)]
)
def test_the_bucket_is_exact_over_random_arrivals(clock: Clock, s: Session, limit: int, rate: str, widest: int) -> None:
    """Denied callers and readers are all over it, and change nothing."""
    clock.freeze(START)
    s.create("api", limit, float(rate))
    rng = random.Random(limit)
    bucket = Bucket(limit, rate)
    granted = denied = 0
    for _ in range(250):
        clock.advance(round(rng.expovariate(2.5) * float(widest / bucket.rate), 6))
        bucket.decay(since_start(clock.now()))
        slots = rng.randint(1, widest)
        expected = bucket.wait(slots)
        if rng.random() < 0.2:
            answer = s.peek("api", slots=slots, for_rate=True)
            assert (answer.status == "granted") == (expected == 0)
            assert float(bucket.level) == pytest.approx(s.limit("api").level, abs=1e-9)
            continue
        answer = s.rate_limit("api", slots=slots)
        if expected == 0:
            granted += 1
            bucket.level += slots
            assert (answer.status, answer.retry_after) == ("granted", None)
        else:
            denied += 1
            assert (answer.status, exactly(answer.retry_after)) == ("refused", expected)
    assert granted > 15
    assert denied > 15


@pytest.mark.parametrize("rate", [0.01, 0.1, 7.3, 33.333333])
def test_all_of_an_idle_limit_is_granted_whatever_the_moment(clock: Clock, s: Session, rate: float) -> None:
    clock.freeze(START)
    s.create("api", 3, rate)
    rng = random.Random(rate)
    for _ in range(25):
        for call in (s.rate_limit, s.acquire):
            clock.advance(round(3 / rate + rng.random(), 6))
            assert s.peek("api", slots=3, for_rate=True).status == "granted"
            assert call("api", slots=3).status == "granted"
        s.reset("api")
        assert s.rate_limit("api", slots=3).status == "granted"


def test_a_denial_a_read_and_an_update_do_not_restart_the_decay(clock: Clock, s: Session) -> None:
    clock.freeze(START)
    s.create("api", 1, 0.1)
    assert s.rate_limit("api").status == "granted"
    for second in range(1, 10):
        clock.advance(1)
        answer = s.rate_limit("api")
        assert (answer.status, answer.retry_after) == ("refused", 10 - second)
        assert s.limit("api").level == pytest.approx(1 - second / 10)
        s.peek("api", for_rate=True)
        s.update("api", description=str(second), slot_decay_per_second=0.1)
        s.sweep(0)
    clock.advance(1)
    assert s.rate_limit("api").status == "granted"


def test_the_level_of_an_idle_limit_is_zero_and_does_not_save_up(clock: Clock, s: Session) -> None:
    s.create("api", 2, 0.01)
    s.rate_limit("api", slots=2)
    clock.advance(100_000)
    assert s.limit("api").level == 0
    assert [s.rate_limit("api").status for _ in range(3)] == ["granted", "granted", "refused"]


def test_keys_have_levels_of_their_own_and_the_view_adds_them_up(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    for key in "ab":
        assert s.rate_limit("api", slots=2, key=key).status == "granted"
    assert s.rate_limit("api", key="a").status == "refused"
    assert s.limit("api").level == pytest.approx(4)


# Granted means: go now.


def test_who_is_granted_a_moment_ahead_is_queued_until_then_and_charged_once(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 16)
    assert s.rate_limit("api").status == "granted"
    lease_id = uuid4()
    for passed, left in ((0, 0.0625), (0.0125, 0.05), (0.05 - 1e-6, 1e-6)):
        clock.advance(passed)
        answer = s.rate_limit("api", timeout_seconds=FOREVER, lease_id=lease_id)
        assert (answer.status, answer.position, answer.lease_id) == ("queued", None, lease_id)
        assert answer.retry_after == pytest.approx(left, abs=1e-9)
    assert s.limit("api").waiting == 0
    clock.advance(1e-6)
    for _ in range(2):
        answer = s.rate_limit("api", timeout_seconds=FOREVER, lease_id=lease_id)
        assert (answer.status, answer.retry_after, answer.lease_id) == ("granted", None, lease_id)
    assert s.limit("api").level == pytest.approx(1)


def test_who_is_further_ahead_stands_in_line_and_is_told_to_ask_again_half_a_horizon_before_its_moment(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("api", 1, 0.5)
    s.rate_limit("api")
    first, second = uuid4(), uuid4()

    def ask(lease_id: UUID) -> tuple[Any, ...]:
        answer = s.rate_limit("api", timeout_seconds=60, lease_id=lease_id)
        return answer.status, answer.position, answer.retry_after and round(answer.retry_after, 6)

    assert [ask(first), ask(second)] == [("queued", 1, 1.95), ("queued", 2, 3)], "3 seconds at most"
    clock.advance(1.95)
    assert [ask(first), ask(second)] == [("queued", None, 0.05), ("queued", 1, 2)]
    clock.advance(0.05)
    assert [ask(first), ask(second)] == [("granted", None, None), ("queued", 1, 1.95)]
    assert [waiter.lease_id for waiter in s.waiters()] == [second]


def test_a_rate_limit_that_was_granted_at_once_leaves_no_trace_and_is_charged_again(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 5, 1)
    lease_id = uuid4()
    for level in (1, 2, 3):
        answer = s.rate_limit("api", lease_id=lease_id)
        assert (answer.status, answer.lease_id) == ("granted", lease_id)
        assert s.limit("api").level == level
    assert s.release(lease_id) is False


@pytest.mark.parametrize("names", ["api", ["api", "other"]])
def test_who_stood_in_line_in_vain_is_told_when_time_alone_would_let_it_in(
    clock: Clock, s: Session, names: str | list[str]
) -> None:
    clock.freeze()
    s.create("api", 1, 0.5)
    s.create("other", 1, 1)
    s.rate_limit("api")
    waiter = s.rate_limit(names, timeout_seconds=5, lease_id=uuid4()).lease_id
    assert s.adjust("api", 3) == 4
    clock.advance(1)
    answer = s.rate_limit(names, timeout_seconds=5, lease_id=waiter)
    assert (answer.status, answer.retry_after) == ("refused", 7)


def test_a_request_whose_moment_lies_beyond_its_timeout_is_refused_at_once_and_takes_nothing(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("api", 1, 0.5)
    s.rate_limit("api")
    with changes_nothing(db.session()):
        answer = s.rate_limit("api", timeout_seconds=1.999999)
    assert (answer.status, answer.retry_after, answer.lease_id) == ("refused", 2, None)
    waits(s, timeout_seconds=2)
    answer = s.rate_limit("api", timeout_seconds=3.999999)
    assert (answer.status, answer.retry_after) == ("refused", 4), "behind who stands in line"
    waits(s, timeout_seconds=4)


# The line.


@pytest.mark.parametrize(("limit", "rate"), [(3, 7.0), (1, 0.5), (1, 100.0), (20, 200.0)])
@pytest.mark.parametrize("late", [0, 0.04])
def test_a_line_delivers_exactly_what_decays_though_they_look_a_little_late(
    clock: Clock, s: Session, limit: int, rate: float, late: float
) -> None:
    clock.freeze(START)
    s.create("api", limit, rate)
    s.rate_limit("api", slots=limit)
    line = [
        s.rate_limit("api", lease_id=uuid4(), channel="pglimits_t", timeout_seconds=FOREVER).lease_id for _ in range(60)
    ]
    answered = s.watch(*line)
    ahead = [row for row in answered if row.status == "granted"]
    moments = {row.lease_id: row.seconds for row in ahead}
    moments |= go(s, clock, line[len(ahead) :], late=late)
    assert [moments[lease_id] for lease_id in line] == pytest.approx([(nth + 1) / rate for nth in range(60)], abs=2e-6)


def test_those_who_wait_go_in_the_order_of_their_arrival_and_priority_at_their_moments(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    s.rate_limit("api", slots=2)
    first, wide, third, urgent = waits(s), waits(s, slots=2), waits(s), waits(s, priority=1)
    assert [waiter.lease_id for waiter in s.waiters()] == [urgent, first, wide, third]
    assert go(s, clock, [first, wide, third, urgent]) == pytest.approx({urgent: 1, first: 2, wide: 4, third: 5})


def test_acquire_and_rate_limit_stand_in_one_line(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    held = s.acquire("api").lease_id
    holding = s.queue("api", channel="pglimits_t")
    using = waits(s)
    clock.advance(2)
    assert [row.status for row in s.watch(holding, using)] == ["queued", "queued"], "the head wants a slot to hold"
    s.release(held)
    by_id = {row.lease_id: row for row in s.watch(holding, using)}
    assert (by_id[holding].status, by_id[using].status) == ("granted", "queued")
    assert go(s, clock, [using]) == {using: 1}


def test_when_somebody_gives_up_those_behind_move_up_and_the_head_is_told(
    clock: Clock, heard: Callable[[], list[str]], db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("api", 4, 1)
    s.rate_limit("api", slots=4)
    first, second, third = waits(s, slots=4), waits(s, slots=2), waits(s)
    assert s.release(third)
    assert s.release(first)
    assert heard() == [f"{second} 1950000"]
    fourth = waits(s)
    assert go(s, clock, [second, fourth]) == {second: 2, fourth: 3}
    db.consistent()


def test_what_is_given_up_within_the_horizon_is_used(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 16)
    s.rate_limit("api")
    lease_id = s.rate_limit("api", timeout_seconds=FOREVER).lease_id
    assert s.release(lease_id) is True
    assert s.release(lease_id) is False
    assert s.limit("api").level == 2


def test_when_the_process_of_the_head_dies_the_next_goes_at_its_moment_by_its_own_look(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("api", 1, 1 / 16)
    s.rate_limit("api")
    waits(s, channel="pglimits_dead")
    alive = waits(s)
    assert go(s, clock, [alive]) == {alive: 16}
    assert s.limit("api").waiting == 0
    db.consistent()


def test_max_waiters_bounds_the_line_of_a_rate_limit(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1, max_waiters=2)
    s.rate_limit("api")
    line = [waits(s), waits(s)]
    with fails("PL006", "api"):
        waits(s)
    assert s.rate_limit("api").status == "refused"
    clock.advance(1)
    s.watch(*line)
    waits(s)


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
    told: dict[UUID, int] = {}  # of a process that looks
    plain: dict[UUID, int] = {}  # these ask again
    gave_up = held = 0
    for _ in range(300):
        now = since_start(clock.now())
        action = rng.random()
        if action < 0.4:
            slots, lease_id, listens = rng.choice([1, 1, 1, 2, 3]), uuid4(), rng.random() < 0.5
            answer = s.rate_limit(
                "api", slots=slots, timeout_seconds=rng.choice([0, 2, 8, None]), lease_id=lease_id,
                channel="pglimits_t" if listens else None,
            )  # fmt: skip
            if answer.status == "granted":
                grants.append((now, slots))
            elif answer.status == "queued":
                (told if listens else plain)[lease_id] = slots
        elif action < 0.46 and (told or plain):
            lease_id = rng.choice(sorted([*told, *plain]))
            gave_up += s.release(lease_id)
            told.pop(lease_id, None)
            plain.pop(lease_id, None)
        elif action < 0.5:
            s.adjust("api", rng.randint(0, 3))
        elif action < 0.56:
            lease = s.acquire("api", slots=rng.randint(1, 2))
            if lease.status == "granted":
                held += 1
                grants.append((now, s.holders()[-1].slots))
                s.release(lease.lease_id)
        else:
            clock.advance(round(rng.expovariate(2.0), 6))
            now = since_start(clock.now())
        for row in s.watch(*told):
            if row.status == "granted":
                grants.append((now + exactly(row.seconds), told.pop(row.lease_id)))
        for lease_id, slots in [*plain.items()]:
            answer = s.rate_limit("api", slots=slots, lease_id=lease_id, timeout_seconds=FOREVER)
            if answer.status == "refused":  # its time is over
                del plain[lease_id]
            elif answer.position is None:  # it goes then, if it is not late
                grants.append((now + exactly(answer.retry_after or 0), plain.pop(lease_id)))
    assert len(grants) > 40
    assert gave_up > 1
    assert held > 0
    never_too_fast(grants, limit, rate)
    db.consistent()


# What is changed meanwhile.


@pytest.mark.parametrize(
    ("change", "goes_in"),
    [
        pytest.param(lambda s: s.update("api", slot_decay_per_second=0.25), 6, id="a lower rate"),
        pytest.param(lambda s: s.update("api", slot_decay_per_second=3), 0.5, id="a higher rate"),
        pytest.param(lambda s: s.update("api", limit=5), 0.5, id="a higher limit"),
        pytest.param(lambda s: s.adjust("api", -1), 0.5, id="adjusted down"),
        pytest.param(lambda s: s.adjust("api", 2), 3.5, id="adjusted up, past the limit"),
        pytest.param(lambda s: s.reset("api"), 0, id="reset"),
    ],
)
def test_who_is_in_line_goes_by_what_holds_then_and_is_told_where_that_is_sooner(
    clock: Clock, heard: Callable[[], list[str]], s: Session, change: Callable[[Session], object], goes_in: float
) -> None:
    clock.freeze()
    s.create("api", 4, 1)
    s.rate_limit("api", slots=4)
    waiter = waits(s, slots=2)
    clock.advance(0.5)
    change(s)
    lines = heard()
    if goes_in == 0:
        assert [line.split()[0] for line in lines] == [str(waiter)]
    else:
        assert lines == ([f"{waiter} {round((goes_in - 0.05) * 1_000_000)}"] if goes_in < 1.5 else [])
    assert go(s, clock, [waiter]) == {waiter: pytest.approx(goes_in)}


def test_the_level_so_far_is_kept_and_then_decays_at_the_new_rate(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 10, 1)
    s.rate_limit("api", slots=10)
    for rate, passes, level in ((1, 2, 8), (3, 1, 5), (0, 100, 5), (1, 2, 3)):
        s.update("api", slot_decay_per_second=rate)
        clock.advance(passes)
        s.update("api", slot_decay_per_second=1)
        assert s.limit("api").level == pytest.approx(level)


@pytest.mark.parametrize(
    ("changes", "sqlstate"),
    [({"slot_decay_per_second": 0}, "PL005"), ({"limit": 2}, "PL004"), ({"active": False}, None)],
    ids=["no decay", "too small", "inactive"],
)
def test_who_can_no_longer_be_granted_or_need_not_wait_is_told_and_hears_why_as_it_asks_again(
    clock: Clock, heard: Callable[[], list[str]], s: Session, changes: dict[str, Any], sqlstate: str | None
) -> None:
    clock.freeze()
    s.create("api", 3, 1 / 64)
    s.rate_limit("api", slots=3)
    waiter = waits(s, slots=3)
    s.update("api", **changes)
    assert heard() == [str(waiter)]
    assert s.watch_one(waiter).status == "retry"
    again = {"slots": 3, "timeout_seconds": FOREVER, "lease_id": waiter}
    if sqlstate is None:
        assert s.rate_limit("api", **again).status == "unlimited"
    else:
        with fails(sqlstate, "api" if sqlstate == "PL005" else "slots"):
            s.rate_limit("api", **again)


def test_a_limit_raised_from_zero_lets_those_go_who_wait(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 0, 1)
    answer = s.rate_limit("api")
    assert (answer.status, answer.retry_after) == ("refused", None)
    waiters = [waits(s), waits(s)]
    s.update("api", limit=1)
    assert go(s, clock, waiters) == dict(zip(waiters, [0, 1], strict=True))


# What cannot be.


def test_a_limit_without_decay_is_an_error_that_names_it(db: Db, s: Session) -> None:
    s.create("api", 1, 1)
    s.create("database", 1)
    with changes_nothing(db.session()):
        for names in ("database", ["api", "database"]):
            with fails("PL005", "database"):
                s.rate_limit(names, timeout_seconds=FOREVER)


@pytest.mark.parametrize("timeout", [0, 60, None])
def test_more_slots_than_the_limit_is_an_error_at_once(db: Db, s: Session, timeout: float | None) -> None:
    s.create("api", 2, 1)
    with changes_nothing(db.session()), fails("PL004", "slots", "api"):
        s.rate_limit("api", slots=3, timeout_seconds=timeout)


def test_a_missing_or_inactive_rate_limit_is_not_enforced(s: Session) -> None:
    s.create("off", 1, 1, active=False)
    for _ in range(3):
        answer = s.rate_limit("off")
        assert (answer.status, answer.retry_after, answer.lease_id) == ("unlimited", None, None)
    assert s.notices == []
    assert s.rate_limit("nowhere").status == "unlimited"
    (notice,) = s.notices
    assert "nowhere" in notice
    with fails("PL002", "nowhere"):
        s.rate_limit(["off", "nowhere"], strict=True)


# Concurrency on a rate limit: both budgets.


def test_acquire_on_a_rate_limit_counts_against_both_budgets(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    first, second = s.serves("api", 2)
    assert (s.limit("api").held, s.limit("api").level) == (2, pytest.approx(2))
    clock.advance(10)
    answer = s.acquire("api")
    assert (answer.status, answer.retry_after) == ("refused", None), "the level is down, but both slots are held"
    s.release(first.lease_id)
    third = s.acquire("api")
    s.release(second.lease_id)
    fourth = s.acquire("api")
    for lease in (third, fourth):
        assert s.release(lease.lease_id)
    answer = s.acquire("api")
    assert (answer.status, answer.retry_after) == ("refused", 1), "nothing is held, but the level is up"
    assert s.rate_limit("api").status == "refused"


# adjust.


def test_adjust_corrects_the_level_up_even_past_the_limit(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("tokens", 1000, 100)
    s.rate_limit("tokens", slots=500)
    assert s.adjust("tokens", 812) == pytest.approx(1312)
    assert s.limit("tokens").level == pytest.approx(1312)
    assert s.rate_limit("tokens").retry_after == pytest.approx(3.13)


def test_adjust_corrects_the_level_down_never_below_zero(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("tokens", 10, 1)
    s.rate_limit("tokens", slots=8)
    clock.advance(0.4)
    assert s.adjust("tokens", -3) == pytest.approx(4.6)
    assert s.adjust("tokens", -100) == s.limit("tokens").level == 0
    s.rate_limit("tokens", slots=10)
    assert s.rate_limit("tokens").status == "refused"


def test_adjust_past_the_limit_lets_nobody_through_in_line_or_not_before_it_has_decayed(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    s.rate_limit("api", slots=2)
    line = [waits(s, timeout_seconds=60), waits(s, timeout_seconds=3), waits(s, timeout_seconds=60)]
    s.adjust("api", 5)
    assert s.rate_limit("api").retry_after == 9
    assert go(s, clock, line) == {line[0]: 6, line[2]: 7}, "the second can no longer go in time"
    answer = s.rate_limit("api", lease_id=line[1], timeout_seconds=3, channel="pglimits_t")
    assert answer.status == "refused"
    db.consistent()


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


def test_adjust_of_a_key_leaves_the_others_alone_and_needs_a_rate_limit(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 1)
    s.create("database", 1)
    assert s.adjust("api", 1, key="a") == 1
    assert s.rate_limit("api", key="a").status == "refused"
    assert s.rate_limit("api", key="b").status == "granted"
    for name, sqlstate in (("database", "PL005"), ("nowhere", "PL002")):
        with changes_nothing(db.session()), fails(sqlstate, name):
            s.adjust(name, 1)
