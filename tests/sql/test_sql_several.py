"""Requests over several limits: all or nothing, in one line at a time, by age, and never starved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails

BOTH = ["one", "two"]


def full(s: Session, *names: str) -> list[UUID]:
    """Limits of one slot, which is held."""
    return [s.acquire(s.create(name, 1)).lease_id for name in names]


def line(s: Session, name: str) -> list[UUID]:
    return [row.lease_id for row in s.waiters(name)]


def ask(s: Session, lease_id: UUID, names: list[str] = BOTH, **more: Any) -> Any:
    return s.acquire(names, timeout_seconds=FOREVER, lease_id=lease_id, **more)


def give_back(s: Session, *lease_ids: UUID) -> None:
    """As the wrapper does: heads over several limits are granted on the way."""
    assert s.value("select pglimits._release_batch(%s::uuid[])", list(lease_ids)) == []


# In line.


def test_they_wait_for_the_first_that_is_full_and_hold_nothing(s: Session) -> None:
    s.create("one", 1)
    full(s, "two")
    s.queue(BOTH)
    assert s.limit("one").held == 0
    assert [row.name for row in s.waiters()] == ["two"]
    assert s.acquire("one").status == "granted", "nothing of it is reserved"


def test_the_head_is_granted_on_all_of_them_as_the_last_comes_free(
    heard: Callable[[], list[str]], db: Db, s: Session
) -> None:
    s.create("one", 1)
    (holder,) = full(s, "two")
    waiter = s.queue(BOTH, channel="pglimits_t")
    give_back(s, holder)
    assert heard() == [str(waiter)]
    assert (s.limit("one").held, s.limit("two").held) == (1, 1)
    row = s.watch_one(waiter)
    assert (row.status, row.ends_in) == ("granted", pytest.approx(300, abs=60))
    assert len(ask(s, waiter).fences) == 2
    db.consistent()


def test_they_go_to_stand_where_they_are_blocked_by_with_their_time_of_arrival(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    one, two = full(s, "one", "two")
    waiter = s.queue(BOTH)
    later, narrow = s.queue("two"), s.queue("one")
    assert (line(s, "one"), line(s, "two")) == ([waiter, narrow], [later])
    give_back(s, one)
    assert s.watch_one(narrow).status == "granted", "it lets the next through"
    assert line(s, "two") == [waiter, later]
    give_back(s, two, narrow)
    assert ask(s, waiter).status == "granted"
    assert line(s, "two") == [later]
    db.consistent()


@pytest.mark.parametrize("narrow_first", [False, True])
def test_they_are_served_by_age(clock: Clock, db: Db, s: Session, narrow_first: bool) -> None:
    clock.freeze()
    one, two = full(s, "one", "two")
    waiting: dict[str, UUID] = {}
    for kind in ("narrow", "wide") if narrow_first else ("wide", "narrow"):
        waiting[kind] = s.queue("two") if kind == "narrow" else s.queue(BOTH)
        clock.advance(0.01)
    give_back(s, one, two)
    assert {row.lease_id for row in s.holders()} == {waiting["narrow" if narrow_first else "wide"]}
    assert s.watch_one(waiting["wide" if narrow_first else "narrow"]).status == "queued"
    db.consistent()


def test_they_do_not_pass_somebody_older_who_waits_for_more_of_another_than_is_free(db: Db, s: Session) -> None:
    (one,) = full(s, "one")
    s.create("two", 2)
    held = s.acquire("two").lease_id
    older = s.queue("two", slots=2)
    waiter = s.queue(BOTH)
    give_back(s, one)
    assert (line(s, "one"), line(s, "two")) == ([], [older, waiter])
    give_back(s, held)
    assert [row.lease_id for row in s.holders()] == [older]
    give_back(s, older)
    assert ask(s, waiter).status == "granted"
    db.consistent()


def test_two_that_arrived_in_one_moment_on_different_limits_are_told_apart(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    one, two = full(s, "one", "two")
    wide, plain, behind = s.queue(BOTH), s.queue("two"), s.queue("two")
    give_back(s, one)
    assert s.limit("two").waiting == 3
    give_back(s, two)
    for lease_id, names in ((wide, BOTH), (plain, "two"), (behind, "two")):
        assert s.acquire(names, timeout_seconds=FOREVER, lease_id=lease_id).status == "granted"
        give_back(s, lease_id)
    assert s.waiters() == []
    db.consistent()


def test_the_position_is_that_where_they_stand(s: Session) -> None:
    s.create("one", 5)
    full(s, "two")
    assert [ask(s, uuid4()).position for _ in range(3)] == [1, 2, 3]
    assert s.acquire("two", timeout_seconds=FOREVER).position == 4


def test_max_waiters_counts_them_where_they_would_stand(db: Db, s: Session) -> None:
    full(s, *BOTH)
    s.update("one", max_waiters=1)
    s.queue(BOTH)
    with changes_nothing(db.session()), fails("PL006", "one"):
        ask(s, uuid4())
    assert ask(s, uuid4(), ["two"]).status == "queued"


@pytest.mark.parametrize("by", ["release", "deadline"])
def test_they_leave_without_a_trace(clock: Clock, db: Db, s: Session, by: str) -> None:
    clock.freeze()
    one, two = full(s, "one", "two")
    waiter = s.acquire(BOTH, lease_id=uuid4(), timeout_seconds=2, channel="pglimits_t").lease_id
    narrow = s.queue("two")
    clock.advance(1)
    give_back(s, one)
    assert line(s, "two") == [waiter, narrow]
    if by == "release":
        assert s.release(waiter)
    clock.advance(1)
    give_back(s, two)
    assert s.watch_one(narrow).status == "granted"
    if by == "deadline":
        assert s.acquire(BOTH, lease_id=waiter, timeout_seconds=2).status == "refused"
    assert s.acquire("one").status == "granted"
    db.consistent()


# Who may lock what.


@pytest.mark.parametrize("how", ["release", "release_all", "update_limit", "reset", "sweep"])
def test_in_a_callers_own_transaction_no_other_limit_is_locked_and_the_head_is_told_to_look_for_itself(
    heard: Callable[[], list[str]], clock: Clock, db: Db, s: Session, how: str
) -> None:
    clock.freeze()
    s.create("one", 1)
    s.create("two", 1)
    holder = s.acquire("two", lease_duration=5).lease_id
    waiter = s.queue(BOTH, channel="pglimits_t")
    caller = db.session()
    caller.run("begin")
    match how:
        case "release":
            caller.release(holder)
        case "release_all":
            caller.all("select * from pglimits.release_all(%s::uuid[])", [holder])
        case "update_limit":
            caller.update("two", limit=2)
        case "reset":
            caller.reset("two")
        case "sweep":
            clock.advance(6)
            caller.sweep()
    s.run("set lock_timeout = '5s'")
    assert s.acquire("one", key="other").status == s.acquire("one").status == "granted"
    s.reset("one")
    caller.run("commit")
    assert heard() == ([] if how == "sweep" else [str(waiter)]), "of the end of a lease it knew"
    assert s.acquire("two").status == "refused", "it keeps its place until it has looked"
    assert s.watch_one(waiter).status == "granted"
    db.consistent()


def test_where_another_limit_is_locked_while_a_line_is_served_nobody_waits_and_the_head_is_told_to_look(
    heard: Callable[[], list[str]], db: Db, s: Session
) -> None:
    s.create("one", 1)
    (holder,) = full(s, "two")
    s.release(s.acquire("one").lease_id)
    waiter = s.queue(BOTH, channel="pglimits_t")
    locking = db.session()
    with locking.transaction():
        locking.run("select from pglimits.states where name = 'one' for update")
        s.run("set lock_timeout = '50ms'")
        give_back(s, holder)
        assert heard() == [str(waiter)]
        assert s.limit("two").held == 0
        looking, _ = db.start_blocked(lambda session: session.watch_one(waiter))
    assert looking.result(timeout=60).status == "granted"
    assert (s.limit("one").held, s.limit("two").held) == (1, 1)
    db.consistent()


def test_when_the_process_of_such_a_head_dies_the_next_is_served_by_its_own_look(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("one", 1)
    (two,) = full(s, "two")
    s.queue(BOTH, channel="pglimits_dead")
    narrow = s.queue("two", channel="pglimits_t")
    s.release(two)
    assert s.watch_one(narrow).status == "granted" or s.limit("one").held == 0
    for _ in range(4):
        s.beat("pglimits_t")
        clock.advance(3)
        row = s.watch_one(narrow)
    assert row.status == "granted"
    assert [held.lease_id for held in s.holders()] == [narrow]
    db.consistent()


# Nobody starves.


@pytest.mark.parametrize("names", [BOTH, ["one", "two", "three"]])
def test_a_request_over_several_limits_that_are_always_busy_is_not_starved(
    clock: Clock, db: Db, s: Session, names: list[str]
) -> None:
    """Whoever is done stands in line again at once. Nobody holds anything for as long as the others need together."""
    clock.freeze()
    full(s, *names)
    wide = s.queue(names, channel="pglimits_t")
    for name in names:
        for _ in range(2):
            s.queue(name, channel="pglimits_t")
    for turn in range(60):
        clock.advance(0.5)
        s.beat("pglimits_t")
        held = s.holders(names[turn % len(names)])
        if held and held[0].lease_id != wide:
            give_back(s, held[0].lease_id)
            s.queue(held[0].name, channel="pglimits_t")
        s.watch(*(row.lease_id for row in s.waiters()))
        if any(row.lease_id == wide for row in s.holders()):
            break
    assert {row.name for row in s.holders() if row.lease_id == wide} == set(names)
    give_back(s, wide)
    db.consistent()


def test_what_is_kept_meanwhile_is_kept_for_a_quarter_of_the_time_it_has_waited_and_given_to_others_after_it(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    one, _ = full(s, "one", "two")
    wide = s.queue(BOTH, channel="pglimits_t")
    other = s.queue("one", channel="pglimits_t")
    for _ in range(4):
        clock.advance(2)
        s.beat("pglimits_t")
    give_back(s, one)
    assert line(s, "two") == [wide]
    assert (s.limit("one").held, s.holders("one")) == (1, [])
    clock.advance(1.999)
    assert s.watch_one(other).status == "queued"
    clock.advance(0.001)
    assert s.watch_one(other).status == "granted"
    db.consistent()


def test_nothing_is_kept_of_a_limit_that_is_switched_off(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    one, _ = full(s, "one", "two")
    s.queue(BOTH, channel="pglimits_t")
    for _ in range(4):
        clock.advance(2)
        s.beat("pglimits_t")
    give_back(s, one)
    assert s.limit("one").held == 1
    s.update("one", active=False)
    assert s.limit("one").held == 0
    s.update("one", active=True)
    assert s.acquire("one").status == "granted"
    db.consistent()


def test_a_head_that_has_looked_and_stays_is_told_again(
    heard: Callable[[], list[str]], clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("one", 1)
    holder = s.acquire(s.create("two", 1)).lease_id
    waiter = s.queue(BOTH, channel="pglimits_t")
    s.release(holder)
    assert heard() == [str(waiter)]
    holder = s.acquire("one").lease_id
    assert s.watch_one(waiter).status == "queued"
    heard()
    s.release(holder)
    assert heard() == [str(waiter)]
    assert s.watch_one(waiter).status == "granted"
    db.consistent()


@pytest.mark.parametrize("end", ["release", "delete"])
def test_what_is_kept_comes_free_with_the_request(clock: Clock, db: Db, s: Session, end: str) -> None:
    clock.freeze()
    one, _ = full(s, "one", "two")
    wide = s.queue(BOTH, channel="pglimits_t")
    for _ in range(4):
        clock.advance(2)
        s.beat("pglimits_t")
    give_back(s, one)
    other = s.queue("one")
    if end == "release":
        assert s.release(wide)
    else:
        s.delete("two")
        assert s.watch_one(wide).status == "retry"
        s.release(ask(s, wide).lease_id)
    assert s.watch_one(other).status == "granted"
    db.consistent()


class Saturated:
    """Two rate limits of which each has a crowd of its own, always in line, and some who need both."""

    def __init__(self, s: Session, clock: Clock, rates: tuple[float, float], burst: int) -> None:
        self.s, self.clock = s, clock
        clock.freeze()
        self.names = {("one",): 4, ("two",): 4, ("one", "two"): 2}
        for name, rate in zip(BOTH, rates, strict=True):
            s.create(name, burst, rate)
            s.rate_limit(name, slots=burst)
        self.waiting: dict[UUID, tuple[str, ...]] = {}
        self.went: dict[tuple[str, ...], list[float]] = {names: [] for names in self.names}
        self.now = 0.0
        self.join()

    def join(self) -> None:
        for names, crowd in self.names.items():
            while sum(each == names for each in self.waiting.values()) < crowd:
                (run,) = self.s.all(
                    "select * from pglimits._acquire_batch(%s::text[], '{1}', '{\"\"}', true, null, 1, 0,"
                    " array[%s::uuid], '[null]', false, false, 'pglimits_t')",
                    list(names), (lease_id := uuid4()),
                )  # fmt: skip
                if run.status == "granted":
                    self.went[names].append(self.now + run.seconds[0])
                else:
                    self.waiting[lease_id] = names

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            self.s.beat("pglimits_t")
            rows = self.s.watch(*self.waiting)
            for row in rows:
                if row.status == "granted":
                    self.went[self.waiting.pop(row.lease_id)].append(self.now + row.seconds)
            self.join()
            pause = max(min([3, *(row.seconds for row in rows if row.status == "queued" and row.seconds)]), 0.001)
            self.clock.advance(round(pause, 6))
            self.now += round(pause, 6)


@pytest.mark.parametrize(("rates", "burst"), [((5, 5), 5), ((5, 20), 5), ((5, 5), 1)])
def test_over_several_rate_limits_that_others_saturate_nobody_starves_or_goes_too_fast_and_little_is_lost(
    clock: Clock, db: Db, s: Session, rates: tuple[float, float], burst: int
) -> None:
    crowds = Saturated(s, clock, rates, burst)
    crowds.run(12)
    went = {names: [at for at in moments if at <= 12] for names, moments in crowds.went.items()}
    for name, rate in zip(BOTH, rates, strict=True):
        moments = sorted(at for names, each in went.items() if name in names for at in each)
        for first in range(len(moments)):
            for last in range(first, len(moments)):
                assert last - first + 1 <= burst + rate * (moments[last] - moments[first] + 2e-6)
        delivered = len(moments) / (rate * 12)
        assert delivered >= (0.97 if burst > 1 else 0.75), (name, delivered)
    assert len(went["one", "two"]) >= 10, {names: len(each) for names, each in went.items()}
    gaps = [later - earlier for earlier, later in zip(went["one", "two"], went["one", "two"][1:], strict=False)]
    assert max(gaps) < 3
    db.consistent()


# Rates.


def test_over_several_rate_limits_all_or_nothing(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("free", 5, 1)
    s.create("used", 1, 0.5)
    s.rate_limit("used")
    with changes_nothing(db.session()):
        for timeout in (0, 1.9):
            answer = s.rate_limit(["free", "used"], slots=[2, 1], timeout_seconds=timeout)
            assert (answer.status, answer.retry_after) == ("refused", 2)
    assert s.limit("free").level == 0
    clock.advance(2)
    assert s.rate_limit(["free", "used"], slots=[2, 1]).status == "granted"
    assert (s.limit("free").level, s.limit("used").level) == (2, 1)


def test_it_is_booked_on_all_as_of_their_joint_moment(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("fast", 1, 10)
    s.create("slow", 1, 0.5)
    s.rate_limit(["fast", "slow"])
    waiter = s.rate_limit(["fast", "slow"], timeout_seconds=FOREVER, lease_id=uuid4(), channel="pglimits_t")
    assert (waiter.status, waiter.position) == ("queued", 1)
    assert s.rate_limit("fast").status == "refused"
    clock.advance(1)
    assert s.rate_limit("fast").status == "granted", "it holds nothing of the fast one up"
    clock.advance(0.95)
    row = s.watch_one(waiter.lease_id)
    assert (row.status, row.seconds) == ("granted", pytest.approx(0.05))
    clock.advance(0.05)
    assert (s.limit("fast").level, s.limit("slow").level) == (pytest.approx(1), pytest.approx(1))


def test_nothing_is_booked_far_ahead_for_one_that_came_just_now(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("fast", 5, 10)
    s.create("slow", 2, 0.02)
    s.create("slower", 1, 0.01)
    s.adjust("slower", 1)
    clock.advance(98)  # two seconds to go
    waiter = s.rate_limit(["fast", "slow", "slower"], timeout_seconds=FOREVER, lease_id=uuid4(), channel="pglimits_t")
    s.adjust("slow", 2)  # fifty to go
    clock.advance(2)
    assert s.watch_one(waiter.lease_id).status == "queued"
    assert s.rate_limit("fast", slots=5).status == "granted"
    s.adjust("slow", -2)
    assert s.watch_one(waiter.lease_id).status == "granted"
    db.consistent()


def test_one_that_arrives_in_the_same_moment_as_others_and_fits_at_the_very_horizon_is_put_in_line(
    clock: Clock, db: Db, s: Session
) -> None:
    s.create("one", 3, 20)
    s.create("two", 1, 0.25)
    clock.freeze()
    s.rate_limit("one", slots=2)  # so there is room for 3 in 0.1 s
    s.rate_limit("two")
    for _ in range(4):
        s.rate_limit("two", timeout_seconds=FOREVER, priority=-1)
    s.run("set statement_timeout = '10s'")  # it went on for ever
    assert s.rate_limit(BOTH, slots=[3, 1], timeout_seconds=FOREVER).status == "queued"
    db.consistent()


def test_what_would_be_lost_until_the_joint_moment_goes_to_those_who_wait_for_that_limit_alone(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("fast", 1, 40)
    s.create("slow", 1, 0.5)
    both, *later = (uuid4() for _ in range(4))
    s.rate_limit(["fast", "slow"])
    s.rate_limit(["fast", "slow"], timeout_seconds=FOREVER, lease_id=both, channel="pglimits_t")
    clock.advance(1.84)
    for _ in range(5):  # they go ahead, the last of them in 100 ms
        s.rate_limit("fast", timeout_seconds=FOREVER, channel="pglimits_u")
    for lease_id in later:
        s.rate_limit("fast", timeout_seconds=FOREVER, lease_id=lease_id, channel="pglimits_u")
    assert [row.lease_id for row in s.waiters("fast")] == later
    clock.advance(0.12)
    s.all(
        "select * from pglimits._acquire_batch('{slow}', '{1}', '{\"\"}', true, null, 1, 0,"
        " array[%s::uuid], '[null]', false, false, 'pglimits_u')",
        uuid4(),
    )  # serves the line in which both wait
    assert [row.lease_id for row in s.waiters("fast")] == later[1:]
    row = s.watch_one(both)
    assert (row.status, row.seconds) == ("granted", pytest.approx(0.04)), "nobody puts it off"
    assert s.watch_one(later[0]).seconds == pytest.approx(0.005)


def test_a_plain_caller_is_queued_until_the_joint_moment_and_granted_then(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("fast", 1, 8)
    s.create("slow", 1, 0.5)
    names = ["fast", "slow"]
    s.rate_limit(names)
    waiter = s.rate_limit(names, timeout_seconds=FOREVER).lease_id
    clock.advance(1.95)
    answer = s.rate_limit(names, timeout_seconds=FOREVER, lease_id=waiter)
    assert (answer.status, answer.position, answer.retry_after) == ("queued", None, pytest.approx(0.05))
    clock.advance(0.05)
    for _ in range(2):
        assert s.rate_limit(names, timeout_seconds=FOREVER, lease_id=waiter).status == "granted"
    assert s.limit("slow").level == 1


# One of them is changed for which they do not stand in line.


@pytest.mark.parametrize(
    ("change", "sqlstate"),
    [
        pytest.param(lambda s: s.update("two", limit=1), "PL004", id="too small"),
        pytest.param(lambda s: s.delete("two"), "PL002", id="gone"),
    ],
)
def test_who_waits_for_several_limits_is_told_what_becomes_of_the_others(
    heard: Callable[[], list[str]], db: Db, s: Session, change: Callable[[Session], None], sqlstate: str
) -> None:
    full(s, "one")
    s.create("two", 2)
    asked: dict[str, Any] = {"slots": [1, 2], "strict": True, "channel": "pglimits_t"}
    waiter = s.queue(BOTH, **asked)
    change(s)
    assert heard() == [str(waiter)]
    assert s.watch_one(waiter).status == "retry"
    with fails(sqlstate, "two"):
        ask(s, waiter, **asked)
    assert s.release(waiter), "an error changes nothing"
    assert s.waiters() == []
    db.consistent()


@pytest.mark.parametrize("change", [{"limit": 1}, {"active": False}])
def test_they_keep_their_place_when_another_one_is_changed_and_they_still_fit(
    s: Session, change: dict[str, Any]
) -> None:
    full(s, "one")
    s.create("two", 2)
    waiter, behind = s.queue(BOTH), s.queue("one")
    s.update("two", **change)
    assert ask(s, waiter).position == 1
    assert [row.status for row in s.watch(waiter, behind)] == ["queued", "queued"]


def test_they_go_on_over_all_of_them_when_another_one_is_renamed(s: Session) -> None:
    (one,) = full(s, "one")
    s.create("two", 1)
    waiter = s.queue(BOTH)
    s.update("two", new_name="three")
    assert ask(s, waiter, strict=True).status == "queued"
    give_back(s, one)
    assert ask(s, waiter, strict=True).status == "granted"
    assert s.limit("three").held == 1


@pytest.mark.parametrize("end", ["deactivate", "delete"])
def test_they_go_by_the_others_when_one_of_them_is_no_longer_enforced(s: Session, end: str) -> None:
    (one, _) = full(s, "one", "two")
    waiter = s.queue(BOTH)
    if end == "delete":
        s.delete("two")
    else:
        s.update("two", active=False)
    give_back(s, one)
    answer = ask(s, waiter)
    assert (answer.status, answer.fences[1]) == ("granted", None)


def test_a_limit_that_was_not_enforced_when_they_came_is_not_for_them(s: Session) -> None:
    (one,) = full(s, "one")
    s.create("two", 1, active=False)
    waiter = s.queue(BOTH)
    s.update("two", active=True)
    s.release(one)
    for _ in range(2):
        answer = ask(s, waiter)
        assert (answer.status, answer.fences[1]) == ("granted", None)
    assert s.limit("two").held == 0
