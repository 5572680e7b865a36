"""Waiting: the order of the queue, hand-over, what wakes whom, and who leaves it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqltest import FOREVER, Clock, Db, Session, fails, seconds


def statuses(s: Session, *lease_ids: UUID) -> list[str]:
    by_id = {row.lease_id: row.status for row in s.watch(*lease_ids)}
    return [by_id[lease_id] for lease_id in lease_ids]


def full(s: Session, name: str = "database", limit: int = 1, **more: Any) -> list[UUID]:
    """A limit with every slot taken by a lease of one slot."""
    s.create(name, limit, **more)
    return [answer.lease_id for answer in s.serves(name, limit)]


# Joining the queue.


def test_a_request_that_may_wait_is_queued_and_holds_nothing(s: Session) -> None:
    full(s)
    lease_id = uuid4()
    answer = s.acquire("database", wait="1 minute", lease_id=lease_id)
    assert (answer.status, answer.lease_id, answer.fence, answer.expires_at) == ("queued", lease_id, None, None)
    assert answer.position == 1
    assert timedelta(0) <= answer.retry_after <= timedelta(seconds=10)
    assert s.limit("database").held == 1
    assert s.limit("database").waiting == 1
    (waiter,) = s.waiters()
    assert (waiter.lease_id, waiter.name, waiter.position) == (lease_id, "database", 1)


def test_a_queued_request_gets_an_id_where_the_caller_chose_none(s: Session) -> None:
    full(s)
    answer = s.acquire("database", wait="1 minute")
    assert answer.status == "queued"
    assert [waiter.lease_id for waiter in s.waiters()] == [answer.lease_id]


def test_repeating_a_queued_request_keeps_its_place(s: Session) -> None:
    full(s)
    first, second = s.queue("database"), s.queue("database")
    for _ in range(3):
        assert s.acquire("database", wait=None, lease_id=second).position == 2
        assert s.acquire("database", wait=None, lease_id=first).position == 1
    assert [waiter.lease_id for waiter in s.waiters()] == [first, second]


def test_a_request_that_may_no_longer_wait_leaves_the_queue(db: Db, s: Session) -> None:
    full(s)
    waiter = s.queue("database")
    assert s.acquire("database", wait="0", lease_id=waiter).status == "refused"
    assert s.waiters() == []
    db.consistent()


def test_wait_null_waits_for_ever_and_wait_zero_tries_once(s: Session) -> None:
    full(s)
    assert s.acquire("database", wait="0").status == "refused"
    assert s.acquire("database", wait=None).status == "queued"


# Order.


def test_waiters_are_granted_in_order_of_arrival(db: Db, s: Session) -> None:
    (holder,) = full(s)
    waiters = [db.session().queue("database") for _ in range(5)]
    assert [waiter.position for waiter in s.waiters()] == [1, 2, 3, 4, 5]
    for position, waiter in enumerate(waiters):
        s.release(holder)
        assert statuses(s, *waiters[position:]) == ["granted"] + ["queued"] * (4 - position)
        holder = waiter
    assert s.release(holder)
    assert s.holders() == []
    db.consistent()


def test_higher_priority_goes_first_and_within_one_priority_arrival(s: Session) -> None:
    (holder,) = full(s)
    order = [s.queue("database", priority=priority) for priority in (0, 5, -3, 5, 0)]
    expected = [order[1], order[3], order[0], order[4], order[2]]
    assert [waiter.lease_id for waiter in s.waiters()] == expected
    assert [waiter.priority for waiter in s.waiters()] == [5, 5, 0, 0, -3]
    for lease_id in expected:
        s.release(holder)
        assert s.watch_one(lease_id).status == "granted"
        assert [held.lease_id for held in s.holders()] == [lease_id]
        holder = lease_id


def test_a_wide_request_is_not_starved_by_narrow_ones(db: Db, s: Session) -> None:
    one, two, three = full(s, limit=3)
    wide = s.queue("database", slots=3)
    narrow = s.queue("database")
    s.release(one)
    s.release(two)
    assert statuses(s, wide, narrow) == ["queued", "queued"]
    assert s.acquire("database").status == "refused"
    s.release(three)
    assert statuses(s, wide, narrow) == ["granted", "queued"]
    s.release(wide)
    assert statuses(s, narrow) == ["granted"]
    db.consistent()


def test_a_newcomer_never_passes_a_waiter_of_its_priority(s: Session) -> None:
    one, _ = full(s, limit=2)
    wide = s.queue("database", slots=2)
    s.release(one)
    assert s.acquire("database").status == "refused"
    assert s.acquire("database", priority=-1).status == "refused"
    assert s.acquire("database", wait=None).position == 2
    assert s.watch_one(wide).status == "queued"


def test_a_newcomer_of_higher_priority_passes_waiters_when_it_fits(s: Session) -> None:
    one, _ = full(s, limit=2)
    s.queue("database", slots=2)
    s.release(one)
    assert s.acquire("database", priority=1).status == "granted"
    assert s.acquire("database", priority=1, wait=None).position == 1


def test_keys_have_queues_of_their_own(s: Session) -> None:
    s.create("database", 1)
    held = s.acquire("database", key="a").lease_id
    s.acquire("database", key="b")
    a, b = s.queue("database", key="a"), s.queue("database", key="b")
    s.release(held)
    assert statuses(s, a, b) == ["granted", "queued"]


def test_one_release_grants_every_waiter_that_fits(db: Db, s: Session) -> None:
    s.create("database", 5)
    wide = s.acquire("database", slots=5).lease_id
    waiters = [s.queue("database", slots=slots) for slots in (2, 1, 2, 1)]
    s.release(wide)
    assert statuses(s, *waiters) == ["granted", "granted", "granted", "queued"]
    assert s.limit("database").held == 5
    db.consistent()


# Hand-over.


def test_release_grants_the_head_in_its_own_transaction(db: Db, s: Session) -> None:
    (holder,) = full(s)
    waiter = s.queue("database")
    other = db.session()
    other.run("begin")
    other.release(holder)
    assert [held.lease_id for held in s.holders()] == [holder]
    other.run("commit")
    assert [held.lease_id for held in s.holders()] == [waiter]
    assert s.waiters() == []


def test_a_grant_notifies_its_waiter_on_its_channel_and_nobody_else(db: Db, s: Session) -> None:
    (holder,) = full(s)
    listener = db.session().connection
    listener.execute("listen pglimits_t1")
    listener.execute("listen pglimits_t2")
    waiter = s.queue("database", channel="pglimits_t1")
    s.queue("database", channel="pglimits_t2")
    s.release(holder)
    (notice,) = list(listener.notifies(timeout=20, stop_after=1))
    assert (notice.channel, notice.payload.split()[0]) == ("pglimits_t1", str(waiter))
    # All that was sent before this has been delivered with it.
    s.run("select pg_notify('pglimits_t2', 'end')")
    assert [each.payload for each in listener.notifies(timeout=20, stop_after=1)] == ["end"]


def test_the_notification_of_a_grant_tells_the_fence_and_the_end_of_the_lease(db: Db, s: Session) -> None:
    (holder,) = full(s)
    listener = db.session().connection
    listener.execute("listen pglimits_t1")
    waiter = s.queue("database", channel="pglimits_t1")
    s.release(holder)
    (notice,) = list(listener.notifies(timeout=20, stop_after=1))
    (held,) = s.holders()
    microseconds = s.value("select (extract(epoch from %s::timestamptz) * 1000000)::bigint", held.expires_at)
    assert notice.payload == f"{waiter} {held.fence} {microseconds}"


def test_a_lease_handed_over_lasts_as_long_as_its_waiter_was_told_that_it_lives(
    clock: Clock, db: Db, s: Session
) -> None:
    """Also if it calls in while it is being handed over."""
    (holder,) = full(s)
    waiter = s.queue("database")
    now = clock.freeze()
    clock.advance(5)
    watching = db.session()
    watching.run("begin")
    assert seconds(watching.value("select ends_in from pglimits.watch(array[%s::uuid])", waiter)) == 10
    release, _ = db.start_blocked(lambda session: session.release(holder))
    watching.run("commit")
    assert release.result(20)
    (held,) = s.holders()
    assert held.expires_at - now == timedelta(seconds=15)


def test_of_two_waiters_that_arrived_at_the_same_moment_none_is_passed_over(clock: Clock, db: Db, s: Session) -> None:
    (first,), (second,) = full(s, "a"), full(s, "b")
    clock.freeze()
    several = s.queue(["a", "b"])
    plain = s.queue("b")
    behind = s.queue("b")
    s.release(first)
    # It moves on to the limit that blocks it now, and keeps its arrival.
    assert s.acquire(["a", "b"], wait=FOREVER, lease_id=several).status == "queued"
    s.release(second)
    assert s.limit("b").waiting == 2
    db.consistent()
    for lease_id in (plain, several, behind):
        if s.acquire(["a", "b"] if lease_id == several else "b", wait=FOREVER, lease_id=lease_id).status == "granted":
            s.release(lease_id)
    assert s.waiters() == []
    db.consistent()


def test_nothing_is_notified_where_nobody_is_granted(db: Db, s: Session) -> None:
    listener = db.session().connection
    listener.execute("listen pglimits_t1")
    s.create("database", 2)
    lease = s.acquire("database", slots=2, channel="pglimits_t1").lease_id
    assert s.acquire("database", channel="pglimits_t1").status == "refused"
    waiter = s.queue("database", channel="pglimits_t1")
    s.watch(waiter)
    s.release(waiter)
    s.release(lease)
    s.run("select pg_notify('pglimits_t1', 'end')")
    assert [each.payload for each in listener.notifies(timeout=20, stop_after=1)] == ["end"]


def test_a_grant_begins_its_full_duration_when_its_waiter_hears_of_it(clock: Clock, s: Session) -> None:
    (holder,) = full(s)
    clock.freeze()
    waiter = s.queue("database", lease_duration="5 minutes")
    clock.advance(1)
    s.release(holder)
    clock.advance(4)
    row = s.watch_one(waiter)
    assert row.status == "granted"
    assert row.fence == s.holders()[0].fence
    assert row.expires_at - clock.now() == timedelta(minutes=5)
    clock.advance(290)
    assert s.watch_one(waiter).expires_at - clock.now() == timedelta(seconds=10), "watching is not renewing"


def test_asking_again_takes_up_a_grant_as_well(clock: Clock, s: Session) -> None:
    (holder,) = full(s)
    clock.freeze()
    waiter = s.queue("database")
    s.release(holder)
    clock.advance(5)
    answer = s.acquire("database", wait=None, lease_id=waiter)
    assert (answer.status, answer.lease_id) == ("granted", waiter)
    assert answer.expires_at - clock.now() == timedelta(minutes=5)
    assert s.limit("database").held == 1


def test_a_grant_that_nobody_takes_up_ends_when_its_waiter_would_have(clock: Clock, s: Session) -> None:
    (holder,) = full(s)
    s.queue("database", lease_duration="1 hour")
    s.release(holder)
    assert s.acquire("database").status == "refused"
    clock.advance(11)
    assert s.acquire("database").status == "granted"


def test_a_given_up_request_whose_grant_landed_in_the_same_moment_frees_its_slot(db: Db, s: Session) -> None:
    (holder,) = full(s)
    waiter, next_one = s.queue("database"), s.queue("database")
    s.release(holder)
    assert s.release(waiter), "it had a lease by then"
    assert statuses(s, waiter, next_one) == ["retry", "granted"]
    db.consistent()


def test_releasing_a_waiter_takes_it_out_of_the_queue(db: Db, s: Session) -> None:
    (holder,) = full(s)
    waiter, next_one = s.queue("database"), s.queue("database")
    assert s.release(waiter)
    assert not s.release(waiter)
    s.release(holder)
    assert statuses(s, next_one) == ["granted"]
    assert s.waiters() == []
    db.consistent()


def test_a_wide_head_that_gives_up_lets_those_behind_it_through(s: Session) -> None:
    one, _ = full(s, limit=2)
    wide = s.queue("database", slots=2)
    narrow = s.queue("database")
    s.release(one)
    assert statuses(s, narrow) == ["queued"]
    s.release(wide)
    assert statuses(s, narrow) == ["granted"]


# Waiters live while they call in.


def test_a_waiter_that_does_not_call_in_is_gone_after_ten_seconds(clock: Clock, db: Db, s: Session) -> None:
    (holder,) = full(s)
    dead, alive = s.queue("database"), s.queue("database")
    for _ in range(3):
        clock.advance(4)
        assert statuses(s, alive) == ["queued"]
    assert [(waiter.lease_id, waiter.position) for waiter in s.waiters()] == [(alive, 1)]
    assert s.limit("database").waiting == 1
    s.release(holder)
    assert statuses(s, alive, dead) == ["granted", "retry"]
    db.consistent()


def test_a_waiter_that_calls_in_as_often_as_it_is_told_stays(clock: Clock, s: Session) -> None:
    clock.freeze()
    (holder,) = full(s)
    first, second = s.queue("database"), s.queue("database")
    for _ in range(40):
        rows = s.watch(first, second)
        assert {row.status for row in rows} == {"queued"}
        pause = min(seconds(row.retry_after) for row in rows)
        assert pause > 0
        clock.advance(pause)
    s.release(holder)
    assert statuses(s, first, second) == ["granted", "queued"]


def test_a_dead_wide_head_does_not_keep_a_slot_idle_that_fits_the_next(clock: Clock, db: Db, s: Session) -> None:
    one, _ = full(s, limit=2)
    s.queue("database", slots=2)  # dies
    alive = s.queue("database")
    s.release(one)
    for _ in range(3):
        clock.advance(4)
        row = s.watch_one(alive)
    assert row.status == "granted"
    db.consistent()


def test_a_newcomer_is_not_refused_because_of_a_dead_wide_head(clock: Clock, s: Session) -> None:
    one, _ = full(s, limit=2)
    s.queue("database", slots=2)
    s.release(one)
    clock.advance(11)
    assert s.peek("database").status == "granted"
    assert s.acquire("database").status == "granted"


def test_a_waiter_that_died_is_told_to_ask_again(clock: Clock, s: Session) -> None:
    full(s)
    waiter = s.queue("database")
    clock.advance(11)
    assert s.watch_one(waiter).status == "retry"
    assert s.acquire("database", wait=None, lease_id=waiter).status == "queued"


def test_watching_an_unknown_request_says_retry(s: Session) -> None:
    row = s.watch_one(uuid4())
    assert (row.status, row.fence, row.expires_at) == ("retry", None, None)
    assert s.watch() == []


def test_may_sleep_is_true_only_for_a_queued_request_with_nothing_to_do(clock: Clock, s: Session) -> None:
    (holder,) = full(s)
    waiter = s.queue("database")
    ask = "select pglimits.may_sleep(%s)"
    assert s.value(ask, waiter) is True
    clock.advance(4)
    assert s.value(ask, waiter) is False
    s.watch(waiter)
    assert s.value(ask, waiter) is True
    s.release(holder)
    assert s.value(ask, waiter) is False
    assert s.value(ask, uuid4()) is False


# Time frees slots too.


def test_the_head_gets_the_slot_at_a_leases_end_with_no_sweep_and_no_release(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database", lease_duration="5 seconds")
    waiter = s.queue("database")
    row = s.watch_one(waiter)
    assert (row.status, seconds(row.retry_after) <= 5) == ("queued", True)
    clock.advance(5.1)
    assert s.watch_one(waiter).status == "granted"
    db.consistent()


def test_a_queued_answer_says_when_time_alone_may_free_what_the_head_needs(clock: Clock, s: Session) -> None:
    s.create("database", 2)
    clock.freeze()
    s.acquire("database", lease_duration="1500 milliseconds")
    s.acquire("database", lease_duration="1 hour")
    answer = s.acquire("database", wait=None)
    assert seconds(answer.retry_after) == pytest.approx(1.5)
    assert seconds(s.watch_one(answer.lease_id).retry_after) == pytest.approx(1.5)
    s.create("api", 1, 0.5)
    s.release(s.acquire("api").lease_id)
    answer = s.acquire("api", wait=None)
    assert seconds(answer.retry_after) == pytest.approx(2)
    clock.advance(2)
    assert s.watch_one(answer.lease_id).status == "granted"


def test_a_newcomer_after_a_leases_end_does_not_pass_the_waiter_at_the_head(clock: Clock, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database", lease_duration="5 seconds")
    waiter = s.queue("database")
    clock.advance(6)
    assert s.acquire("database").status == "refused"
    assert s.watch_one(waiter).status == "granted"


def test_the_head_is_told_when_a_lease_that_ends_sooner_comes_first(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 2)
    clock.freeze()
    long = s.acquire("database", lease_duration="1 hour").lease_id
    s.acquire("database", lease_duration="1 hour")
    wide = s.queue("database", slots=2, channel="pglimits_w")
    listener = db.session().connection
    listener.execute("listen pglimits_w")
    s.release(long)
    assert s.acquire("database", lease_duration="1 second", priority=1).status == "granted"
    assert [each.payload for each in listener.notifies(timeout=20, stop_after=1)] == [str(wide)]
    assert seconds(s.watch_one(wide).retry_after) == pytest.approx(1)


# max_waiters.


def test_a_longer_queue_than_max_waiters_is_refused_with_queue_full(db: Db, s: Session) -> None:
    full(s, max_waiters=2)
    first = s.queue("database")
    s.queue("database")
    with fails("PL006", "database", "2"):
        s.acquire("database", wait=None)
    assert s.acquire("database").status == "refused", "who would not wait is not told about the queue"
    assert s.acquire("database", wait=None, lease_id=first).status == "queued", "who is in it already stays"
    s.release(first)
    assert s.acquire("database", wait=None).status == "queued"
    db.consistent()


def test_max_waiters_zero_lets_nobody_wait(s: Session) -> None:
    (holder,) = full(s, max_waiters=0)
    with fails("PL006", "database"):
        s.acquire("database", wait=None)
    s.release(holder)
    assert s.acquire("database", wait=None).status == "granted"


def test_max_waiters_is_for_each_key(s: Session) -> None:
    s.create("database", 1, max_waiters=1)
    for key in "ab":
        s.acquire("database", key=key)
        s.queue("database", key=key)


@pytest.mark.parametrize("head_lives", [False, True])
def test_dead_waiters_do_not_fill_the_queue(clock: Clock, s: Session, head_lives: bool) -> None:
    full(s, max_waiters=3)
    waiters = [s.queue("database") for _ in range(3)]
    for _ in range(3):
        clock.advance(4)
        if head_lives:
            s.watch(waiters[0])
    assert s.acquire("database", wait=None).position == (2 if head_lives else 1)


# The position: how many live waiters stand before, and oneself.


def position(s: Session, lease_id: UUID) -> int:
    (found,) = [waiter.position for waiter in s.waiters() if waiter.lease_id == lease_id]
    return int(found)


def test_the_position_does_not_count_the_dead_wherever_they_stand(clock: Clock, db: Db, s: Session) -> None:
    full(s)
    line = [s.queue("database") for _ in range(6)]
    clock.advance(4)
    s.watch(line[0], line[2], line[5])
    assert s.acquire("database", wait=None).position == 7  # nobody is dead yet
    clock.advance(6.1)
    assert s.acquire("database", wait=None).position == 5  # the three who called in, and the one of 6 s ago
    clock.advance(3.9)
    assert s.acquire("database", wait=None).position == 2  # only the last is left
    db.consistent()


def test_the_position_is_counted_where_others_stand_behind(clock: Clock, db: Db, s: Session) -> None:
    full(s)
    low = [s.queue("database", priority=0) for _ in range(3)]
    assert s.acquire("database", wait=None, priority=5).position == 1
    middle = s.acquire("database", wait=None, priority=3)
    assert middle.position == 2
    assert s.acquire("database", wait=None, priority=0).position == 6
    clock.advance(6)
    s.watch(low[0], low[2], middle.lease_id)
    clock.advance(6)
    # Dead are the highest, one in the middle, and the last.
    assert s.acquire("database", wait=None, priority=1).position == 2
    assert s.acquire("database", wait=None, priority=-1).position == 5
    assert s.acquire("database", wait=None, priority=0, lease_id=low[2]).position == 4
    db.consistent()


def test_each_key_counts_its_own_line(clock: Clock, s: Session) -> None:
    s.create("database", 1)
    for key in "abc":
        s.acquire("database", key=key)
    a = s.queue("database", key="a")
    assert [s.acquire("database", key=key, wait=None).position for key in "aabc"] == [2, 3, 1, 1]
    clock.advance(9)
    s.watch(a)
    assert s.acquire("database", key="b", wait=None).position == 2
    clock.advance(2)
    assert [s.acquire("database", key=key, wait=None).position for key in "abc"] == [2, 2, 1]


def test_the_position_of_a_request_over_several_limits_is_that_on_the_one_that_blocks(db: Db, s: Session) -> None:
    s.create("free", 5)
    (holder,) = full(s)
    for expected in (1, 2, 3):
        assert s.acquire(["free", "database"], wait=None).position == expected
    assert s.acquire("database", wait=None).position == 4
    s.release(holder)  # the head is called, and keeps its place until it has tried
    assert s.acquire(["database", "free"], wait=None).position == 5
    db.consistent()


def test_a_call_reads_no_more_of_a_long_line_than_of_a_short_one(s: Session) -> None:
    (holder,) = full(s)  # from here on all plans are made, and kept, while the queue is empty
    last = s.queue("database")
    s.value("select pglimits.may_sleep(%s)", last)
    for _ in range(200):
        last = s.queue("database")
    read = "select idx_tup_fetch + seq_tup_read from pg_stat_xact_user_tables where relid = 'pglimits.queue'::regclass"

    def reads(call: Callable[[], Any]) -> int:
        with s.transaction():
            before = int(s.value(read))
            call()
            return int(s.value(read)) - before

    assert reads(lambda: s.acquire("database", wait=None, lease_id=last)) < 20
    assert reads(lambda: s.acquire("database", wait=None)) < 20
    assert reads(lambda: s.value("select pglimits.may_sleep(%s)", last)) < 20
    assert reads(lambda: s.watch(last)) < 20
    assert reads(lambda: s.release(holder)) < 20
    assert reads(lambda: s.release(last)) < 20


@pytest.mark.parametrize("seed", range(4))
def test_the_position_is_the_one_that_a_count_gives_whatever_happened(
    clock: Clock, db: Db, s: Session, seed: int
) -> None:
    chance = random.Random(seed)
    s.create("database", 2)
    known: list[UUID] = []
    for _ in range(120):
        match chance.choice(["join", "join", "join", "many", "again", "watch", "leave", "time"]):
            case "join":
                arguments = {"key": chance.choice("ab"), "priority": chance.choice([0, 0, 0, 1, -1])}
                answer = s.acquire("database", wait=None, **arguments)
                known.append(answer.lease_id)
                if answer.status == "queued":
                    assert answer.position == position(s, answer.lease_id)
            case "many":
                requests = [
                    {"names": ["database"], "keys": [chance.choice("ab")], "lease_id": str(uuid4())} for _ in range(3)
                ]
                known += [UUID(request["lease_id"]) for request in requests]
                s.all("select * from pglimits.acquire_many(%s::jsonb)", json.dumps(requests))
            case "again" if waiting := s.waiters():
                waiter = chance.choice(waiting)
                arguments = {"key": waiter.key, "priority": waiter.priority, "lease_id": waiter.lease_id}
                answer = s.acquire("database", wait=None, **arguments)
                if answer.status == "queued":
                    assert answer.position == position(s, answer.lease_id)
            case "watch" if known:
                s.watch(*chance.sample(known, len(known) // 2))
            case "leave" if known:
                s.release(known.pop(chance.randrange(len(known))))
            case "time":
                clock.advance(chance.choice([0.5, 2, 4, 7]))
    db.consistent()


# Several limits.


def test_several_limits_wait_on_the_first_that_blocks_and_hold_nothing(s: Session) -> None:
    s.create("one", 1)
    (holder,) = full(s, "two")
    s.queue(["one", "two"])
    assert s.limit("one").held == 0
    assert [row.name for row in s.waiters()] == ["two"]
    assert s.acquire("one").status == "granted", "nothing of it is reserved"
    s.release(holder)


def test_several_limits_are_woken_to_try_again_and_are_granted_by_themselves(db: Db, s: Session) -> None:
    s.create("one", 1)
    (holder,) = full(s, "two")
    listener = db.session().connection
    listener.execute("listen pglimits_m")
    waiter = s.queue(["one", "two"], channel="pglimits_m")
    s.release(holder)
    assert [each.payload for each in listener.notifies(timeout=20, stop_after=1)] == [str(waiter)]
    assert s.limit("two").held == 0
    assert s.watch_one(waiter).status == "retry"
    assert s.acquire("two").status == "refused", "it keeps its place until it has tried"
    answer = s.acquire(["one", "two"], wait=None, lease_id=waiter)
    assert (answer.status, answer.lease_id) == ("granted", waiter)
    assert (s.limit("one").held, s.limit("two").held) == (1, 1)
    db.consistent()


def test_several_limits_move_to_the_next_that_blocks_with_their_time_of_arrival(db: Db, s: Session) -> None:
    (one,) = full(s, "one")
    (two,) = full(s, "two")
    waiter = s.queue(["one", "two"])
    later = s.queue("two")
    s.release(one)
    assert s.watch_one(waiter).status == "retry"
    assert s.acquire(["one", "two"], wait=None, lease_id=waiter).status == "queued"
    assert [row.lease_id for row in s.waiters("two")] == [waiter, later]
    assert s.waiters("one") == []
    s.release(two)
    assert s.acquire(["one", "two"], wait=None, lease_id=waiter).status == "granted"
    db.consistent()


def test_several_limits_that_move_on_let_the_next_through(s: Session) -> None:
    (one,) = full(s, "one")
    full(s, "two")
    waiter = s.queue(["one", "two"])
    narrow = s.queue("one")
    s.release(one)
    assert s.watch_one(narrow).status == "queued"
    s.acquire(["one", "two"], wait=None, lease_id=waiter)
    assert s.watch_one(narrow).status == "granted"


def test_a_called_request_over_several_limits_that_died_does_not_hold_the_next_up(clock: Clock, s: Session) -> None:
    s.create("one", 1)
    (two,) = full(s, "two")
    s.queue(["one", "two"])
    narrow = s.queue("two")
    s.release(two)
    assert s.watch_one(narrow).status == "queued"
    for _ in range(3):
        clock.advance(4)
        status = s.watch_one(narrow).status
    assert status == "granted"


class Busy:
    """Limits of one slot that are always held, with others waiting; and a request that needs all of them."""

    def __init__(self, s: Session, clock: Clock, *names: str) -> None:
        self.s, self.clock, self.names = s, clock, names
        clock.freeze()
        for name in names:
            full(s, name)
        self.wide = s.queue(list(names))
        clock.advance(1)
        self.others = {name: s.queue(name) for name in names}

    def where(self) -> str:
        """For which limit the request stands in line without having it."""
        return next(name for name in self.names if self.wide in self.line(name) and name not in self.kept())

    def line(self, name: str) -> list[UUID]:
        return [row.lease_id for row in self.s.waiters(name)]

    def kept(self) -> list[str]:
        return [
            row.name
            for row in self.s.all(
                "select c.name from pglimits.queue q join pglimits.configs c using (limit_id)"
                " where q.kept_until is not null"
            )
        ]

    def free(self, name: str) -> None:
        """Whoever holds that limit is done; somebody else waits for it at once."""
        self.clock.advance(1)
        (holder,) = self.s.holders(name)
        assert self.s.release(holder.lease_id)
        self.watch()
        self.others[name] = self.s.queue(name)

    def watch(self) -> None:
        self.s.watch(self.wide, *self.others.values())

    def ask(self) -> str:
        status = self.s.acquire(list(self.names), wait=None, lease_id=self.wide).status
        self.watch()
        return str(status)

    def call_in_vain(self, before: int = 0) -> str:
        """Free the limit for which it stands in line; the next one is taken. Returns which it was.

        before: as if it had been called in vain so often already.
        """
        if before:
            self.s.run("update pglimits.queue set in_vain = %s where lease_id = %s", before, self.wide)
        called_by = self.where()
        self.free(called_by)
        assert self.s.watch_one(self.wide).status == "retry"
        assert self.ask() == "queued"
        return called_by


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]])
def test_a_request_over_several_limits_that_are_always_busy_is_not_starved(
    db: Db, clock: Clock, s: Session, names: list[str]
) -> None:
    busy = Busy(s, clock, *names)
    for _ in range(12 * len(names)):
        busy.free(busy.where())
        if busy.ask() == "granted":
            break
    assert {row.name for row in s.holders() if row.lease_id == busy.wide} == set(names)
    assert busy.kept() == []
    db.consistent()


def test_a_request_that_is_called_in_vain_keeps_nobody_waiting_the_first_two_times(clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    for _ in range(2):
        called_by = busy.call_in_vain()
        assert s.limit(called_by).held == 1, "the next in line has it"
    called_by = busy.call_in_vain()
    assert (s.limit(called_by).held, busy.kept()) == (0, [called_by])
    assert s.acquire(called_by).status == "refused"
    assert s.watch_one(busy.others[called_by]).status == "queued"


@pytest.mark.parametrize(
    ("in_vain", "kept_for"),
    [
        pytest.param(2, 0.1, id="for a moment"),
        pytest.param(5, 0.8, id="then longer"),
        pytest.param(40, 2, id="as it has waited"),
    ],
)
def test_a_place_is_kept_for_longer_each_time_but_never_for_longer_than_was_waited(
    clock: Clock, s: Session, in_vain: int, kept_for: float
) -> None:
    busy = Busy(s, clock, "a", "b")
    called_by = busy.call_in_vain(before=in_vain)
    row = s.watch_one(busy.wide)
    assert (row.status, seconds(row.retry_after)) == ("queued", kept_for)
    s.acquire(["a", "b"], wait=None, lease_id=busy.wide)
    clock.advance(kept_for - 0.001)
    busy.watch()
    assert s.limit(called_by).held == 0
    clock.advance(0.001)
    busy.watch()
    assert s.limit(called_by).held == 1
    assert (busy.wide in busy.line("a")) + (busy.wide in busy.line("b")) == 1


def test_a_place_that_is_kept_lives_and_dies_with_its_process(clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    for _ in range(38):
        clock.advance(1)
        busy.watch()
    called_by = busy.call_in_vain(before=20)
    for _ in range(20):
        clock.advance(1)
        busy.watch()
        assert s.limit(called_by).held == 0, "kept for as long as was waited before"
    for _ in range(10):
        clock.advance(1)
        s.watch(*busy.others.values())
    assert s.limit(called_by).held == 1


def test_a_place_that_is_kept_ends_after_its_time_though_its_process_calls_in(clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    for _ in range(18):
        clock.advance(1)
        busy.watch()
    called_by = busy.call_in_vain(before=20)
    for _ in range(19):
        clock.advance(1)
        busy.watch()
        assert s.limit(called_by).held == 0
    clock.advance(1)
    busy.watch()
    assert s.limit(called_by).held == 1


def test_a_place_is_not_kept_on_when_what_is_still_needed_is_shut(clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    called_by = busy.call_in_vain(before=20)
    assert busy.kept() == [called_by]
    s.update(busy.where(), limit=0)
    assert s.watch_one(busy.wide).status == "retry"
    assert busy.ask() == "queued"
    assert (s.limit(called_by).held, busy.kept()) == (1, [])


def test_a_place_that_is_kept_does_not_fill_the_queue(clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    called_by = busy.call_in_vain(before=20)
    waiting = len(busy.line(called_by)) - 1
    s.update(called_by, max_waiters=waiting + 1)
    assert s.acquire(called_by, wait=None).status == "queued"
    with fails("PL006"):
        s.acquire(called_by, wait=None)


def test_a_called_request_may_not_sleep_on_though_it_keeps_a_place_elsewhere(clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    busy.call_in_vain(before=20)
    assert s.value("select pglimits.may_sleep(%s)", busy.wide)
    busy.free(busy.where())
    assert not s.value("select pglimits.may_sleep(%s)", busy.wide)


def test_no_place_is_kept_for_a_limit_that_is_shut(clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    (other,) = {"a", "b"} - {busy.where()}
    s.update(other, limit=0)
    assert busy.ask() == "queued"
    called_by = busy.call_in_vain(before=20)
    assert (s.limit(called_by).held, busy.kept()) == (1, [])


def test_no_place_is_kept_while_somebody_else_is_first_for_the_other_limit(clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    (other,) = {"a", "b"} - {busy.where()}
    s.queue(other, priority=1)
    called_by = busy.call_in_vain(before=20)
    assert (s.limit(called_by).held, busy.kept()) == (1, [])


def test_a_request_that_keeps_a_place_can_be_taken_back(db: Db, clock: Clock, s: Session) -> None:
    busy = Busy(s, clock, "a", "b")
    called_by = busy.call_in_vain(before=20)
    assert s.release(busy.wide)
    assert s.limit(called_by).held == 1
    assert busy.wide not in busy.line("a") + busy.line("b")
    db.consistent()


# Several limits, of which one is changed for which they do not stand in line.


@pytest.mark.parametrize(
    ("change", "sqlstate"),
    [
        pytest.param(lambda s: s.update("two", limit=1), "PL004", id="too small"),
        pytest.param(lambda s: s.delete("two"), "PL002", id="gone"),
    ],
)
def test_who_waits_for_several_limits_is_told_what_becomes_of_the_others(
    db: Db, s: Session, change: Callable[[Session], None], sqlstate: str
) -> None:
    full(s, "one", 2)
    s.create("two", 2)
    listener = db.session().connection
    listener.execute("listen pglimits_m")
    asked = {"slots": [1, 2], "strict": True, "channel": "pglimits_m"}
    waiter = s.queue(["one", "two"], **asked)
    assert s.watch_one(waiter).status == "queued"
    change(s)
    assert [each.payload for each in listener.notifies(timeout=20, stop_after=1)] == [""]
    assert s.watch_one(waiter).status == "retry"
    with fails(sqlstate, "two"):
        s.acquire(["one", "two"], wait=None, lease_id=waiter, **asked)
    db.consistent()


def test_who_waits_for_several_limits_keeps_its_place_when_another_one_is_changed(s: Session) -> None:
    full(s, "one")
    s.create("two", 2)
    waiter = s.queue(["one", "two"])
    behind = s.queue("one")
    s.update("two", limit=1)
    assert s.watch_one(waiter).status == "retry"
    assert s.acquire(["one", "two"], wait=None, lease_id=waiter).position == 1
    assert [row.status for row in s.watch(waiter, behind)] == ["queued", "queued"]


def test_who_waits_for_several_limits_goes_on_over_all_of_them_when_another_one_is_renamed(s: Session) -> None:
    (holder,) = full(s, "one")
    s.create("two", 1)
    waiter = s.queue(["one", "two"])
    s.update("two", new_name="three")
    assert s.acquire(["one", "two"], wait=None, lease_id=waiter, strict=True).status == "queued"
    s.release(holder)
    answer = s.acquire(["one", "two"], wait=None, lease_id=waiter, strict=True)
    assert answer.status == "granted"
    assert s.limit("three").held == 1


def test_acquire_behind_waiters_of_a_rate_limit_and_the_other_way_round_keep_their_order(
    clock: Clock, s: Session
) -> None:
    s.create("api", 1, 1)
    clock.freeze()
    held = s.acquire("api").lease_id  # level 1, held 1
    waiting = s.queue("api")
    rate = s.rate_limit("api", wait=None, lease_id=uuid4(), channel="pglimits_t")
    assert rate.status == "queued", "somebody who wants slots to hold is ahead"
    s.release(held)
    clock.advance(1)
    assert s.watch_one(waiting).status == "granted"
    row = s.watch_one(rate.lease_id)
    assert (row.status, seconds(row.wait)) == ("granted", 1)


def test_a_waiter_keeps_its_place_through_a_renaming_also_when_it_asks_by_the_old_name(s: Session) -> None:
    s.create("a", 1)
    holder = s.acquire("a")
    waiter = s.acquire("a", lease_id=uuid4(), wait=None)
    s.update("a", new_name="b")
    again = s.acquire("a", lease_id=waiter.lease_id, wait=None, strict=True)
    assert (again.status, again.position) == ("queued", 1)
    s.release(holder.lease_id)
    assert s.acquire("a", lease_id=waiter.lease_id, wait=None).status == "granted"


@pytest.mark.parametrize("priority", [0, 5])
def test_a_peek_reckons_with_those_who_are_granted_first_what_has_come_free(
    clock: Clock, s: Session, priority: int
) -> None:
    clock.freeze()
    s.create("database", 2)
    s.acquire("database", slots=2, lease_duration="1 second")
    s.queue("database")
    clock.advance(2)
    assert s.peek("database", slots=2, priority=priority).status == "refused"
    assert s.peek("database", slots=1, priority=priority).status == "granted"
    assert s.acquire("database", slots=2, priority=priority).status == "refused"
    assert s.acquire("database", slots=1, priority=priority).status == "granted"


def test_those_who_wait_for_a_limit_that_somebody_keeps_locked_can_be_kept_alive_in_their_order(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("db", 1)
    s.acquire("db", lease_duration="2 s")
    waiters = [s.queue("db") for _ in range(3)]
    locking = db.session()
    locking.run("begin")
    locking.run("select from pglimits.states for update")
    for _ in range(3):
        clock.advance(7)
        rows = s.all("select status, retry_after from pglimits.watch(%s::uuid[], settle => false)", waiters)
        assert [row.status for row in rows] == ["queued"] * 3
    locking.run("rollback")
    assert statuses(s, *waiters) == ["granted", "queued", "queued"]
