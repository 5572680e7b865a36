"""Waiting: the order of a line, hand-over, what tells whom, deadlines, and who leaves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails


def statuses(s: Session, *lease_ids: UUID) -> list[str]:
    by_id = {row.lease_id: row.status for row in s.watch(*lease_ids)}
    return [by_id[lease_id] for lease_id in lease_ids]


def full(s: Session, name: str = "database", limit: int = 1, **more: Any) -> list[UUID]:
    """A limit with every slot taken by a lease of one slot."""
    s.create(name, limit, **more)
    return [answer.lease_id for answer in s.serves(name, limit)]


def ask(s: Session, lease_id: UUID, timeout: float | None = FOREVER, **more: Any) -> Any:
    return s.acquire("database", timeout_seconds=timeout, lease_id=lease_id, **more)


def micros(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


# Joining the line.


def test_a_request_that_may_wait_is_queued_and_holds_nothing(s: Session) -> None:
    full(s)
    lease_id = uuid4()
    answer = s.acquire("database", timeout_seconds=60, lease_id=lease_id)
    assert (answer.status, answer.lease_id, answer.fence, answer.expires_at) == ("queued", lease_id, None, None)
    assert (answer.position, answer.retry_after) == (1, 3)
    assert (s.limit("database").held, s.limit("database").waiting) == (1, 1)
    (waiter,) = s.waiters()
    assert (waiter.lease_id, waiter.name, waiter.position) == (lease_id, "database", 1)


def test_a_queued_request_gets_an_id_where_the_caller_chose_none(s: Session) -> None:
    full(s)
    answer = s.acquire("database", timeout_seconds=FOREVER)
    assert answer.status == "queued"
    assert [waiter.lease_id for waiter in s.waiters()] == [answer.lease_id]


def test_asking_again_keeps_the_place(s: Session) -> None:
    full(s)
    first, second = s.queue("database"), s.queue("database")
    for _ in range(3):
        assert ask(s, second).position == 2
        assert ask(s, first).position == 1
    assert [waiter.lease_id for waiter in s.waiters()] == [first, second]


def test_a_request_that_may_no_longer_wait_leaves_the_line(db: Db, s: Session) -> None:
    full(s)
    waiter = s.queue("database")
    assert ask(s, waiter, 0).status == "refused"
    assert s.waiters() == []
    db.consistent()


# Deadlines.


def test_the_deadline_counts_from_the_first_call_however_often_it_is_made_again(
    clock: Clock, db: Db, s: Session
) -> None:
    (holder,) = full(s)
    clock.freeze()
    waiter = s.queue("database", timeout_seconds=5)
    for passed, left in ((1, 3), (2, 2), (1, 1)):
        clock.advance(passed)
        answer = ask(s, waiter, 5)
        assert (answer.status, answer.retry_after) == ("queued", left)
    clock.advance(1)
    assert ask(s, waiter, 5).status == "refused"
    assert s.waiters() == []
    s.release(holder)
    assert s.holders() == []
    db.consistent()


def test_a_later_call_can_bring_the_deadline_nearer_and_not_put_it_off(clock: Clock, s: Session) -> None:
    full(s)
    clock.freeze()
    forever, bounded = s.queue("database"), s.queue("database", timeout_seconds=2)
    assert ask(s, forever, 2.5).retry_after == 2.5
    assert ask(s, bounded, FOREVER).retry_after == 2
    clock.advance(2.5)
    assert [ask(s, each, FOREVER).status for each in (forever, bounded)] == ["refused", "refused"]


def test_whose_deadline_has_passed_is_not_granted_and_hears_that_its_time_was_over(
    clock: Clock, heard: Callable[[], list[str]], db: Db, s: Session
) -> None:
    (holder,) = full(s)
    clock.freeze()
    late = s.queue("database", timeout_seconds=2, channel="pglimits_t")
    behind = s.queue("database")
    clock.advance(2)
    s.release(holder)
    assert heard() == [str(late)]
    assert statuses(s, late, behind) == ["retry", "granted"]
    assert ask(s, late, 2, channel="pglimits_t").status == "refused"
    db.consistent()


# Asked again before a commit.


@pytest.mark.parametrize("function", ["acquire", "rate_limit"])
def test_asking_again_in_the_transaction_that_was_queued_is_an_error_that_says_commit_first(
    db: Db, s: Session, function: str
) -> None:
    s.create("it", 1, 1 / 64)
    s.call(function, "it")
    lease_id = uuid4()

    def again(session: Session) -> Any:
        return session.call(function, "it", timeout_seconds=FOREVER, lease_id=lease_id)

    s.run("begin")
    assert again(s).status == "queued"
    with fails("PL010", "commit first"):
        again(s)
    s.run("rollback")
    assert s.waiters() == []
    with s.transaction():
        assert again(s).status == "queued"
        other = s.call(function, "it", timeout_seconds=FOREVER, lease_id=uuid4())
        assert other.position == 2, "others may ask in it"
    for session in (s, db.session()):
        with session.transaction():
            assert again(session).position == 1
        with session.transaction(), fails("PL010"):
            again(session)
            again(session)


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
    assert [(waiter.lease_id, waiter.priority) for waiter in s.waiters()] == [
        *zip(expected, [5, 5, 0, 0, -3], strict=True)
    ]
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


def test_a_newcomer_passes_waiters_of_lower_priority_only(s: Session) -> None:
    one, _ = full(s, limit=2)
    wide = s.queue("database", slots=2)
    s.release(one)
    assert s.acquire("database").status == "refused"
    assert s.acquire("database", priority=-1).status == "refused"
    assert s.acquire("database", timeout_seconds=FOREVER).position == 2
    assert s.watch_one(wide).status == "queued"
    assert s.acquire("database", priority=1).status == "granted"
    assert s.acquire("database", priority=1, timeout_seconds=FOREVER).position == 1


def test_keys_have_lines_of_their_own(s: Session) -> None:
    s.create("database", 1)
    held = s.acquire("database", key="a").lease_id
    s.acquire("database", key="b")
    a, b = s.queue("database", key="a"), s.queue("database", key="b")
    assert [waiter.position for waiter in s.waiters()] == [1, 1]
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
    with other.transaction():
        other.release(holder)
        assert [held.lease_id for held in s.holders()] == [holder]
    assert [held.lease_id for held in s.holders()] == [waiter]
    assert s.waiters() == []


def test_a_grant_tells_its_waiter_the_fence_and_the_end_of_the_lease_and_tells_nobody_else(
    heard: Callable[[], list[str]], s: Session
) -> None:
    (holder,) = full(s)
    waiter, _ = s.queue("database", channel="pglimits_t"), s.queue("database", channel="pglimits_t")
    s.release(holder)
    (held,) = s.holders()
    assert heard() == [f"{waiter} {held.fence} 0 {micros(held.expires_at)}"]


def test_all_who_are_granted_in_a_process_are_told_in_one_notification(
    db: Db, heard: Callable[[], list[str]], s: Session
) -> None:
    s.create("database", 200)
    holder = s.acquire("database", slots=200).lease_id
    waiters = [str(s.queue("database", channel="pglimits_t")) for _ in range(20)]
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    s.release(holder)
    assert [line.split()[0] for line in heard()] == waiters
    (notice, _) = listener.notifies(timeout=60, stop_after=2)
    assert notice.payload.count("\n") == 19


def test_nothing_is_notified_where_nobody_is_granted(heard: Callable[[], list[str]], s: Session) -> None:
    s.create("database", 2)
    lease = s.acquire("database", slots=2, channel="pglimits_t").lease_id
    assert s.acquire("database", channel="pglimits_t").status == "refused"
    waiter = s.queue("database", channel="pglimits_t")
    s.watch(waiter)
    s.release(waiter)
    s.release(lease)
    assert heard() == []


def test_a_grant_begins_its_full_duration_when_its_waiter_hears_of_it(clock: Clock, s: Session) -> None:
    first, second = full(s, limit=2)
    clock.freeze()
    watches, asks = s.queue("database"), s.queue("database")
    clock.advance(1)
    s.release(first)
    s.release(second)
    clock.advance(4)
    row = s.watch_one(watches)
    assert (row.status, row.fence, row.ends_in) == ("granted", s.holders()[0].fence, 300)
    answer = ask(s, asks)
    assert (answer.status, answer.lease_id) == ("granted", asks)
    assert row.expires_at == answer.expires_at == clock.now() + timedelta(minutes=5)
    clock.advance(290)
    assert [s.watch_one(watches).ends_in, s.watch_one(asks).ends_in] == [10, 10], "looking is not renewing"


@pytest.mark.parametrize("beats", [False, True])
def test_a_grant_that_nobody_takes_up_ends_when_its_waiter_would_have(clock: Clock, s: Session, beats: bool) -> None:
    (holder,) = full(s)
    clock.freeze()
    s.queue("database", lease_duration=3600, channel="pglimits_t")
    clock.advance(5)
    if beats:
        s.beat("pglimits_t")
    s.release(holder)
    clock.advance(9.9 if beats else 4.9)
    assert s.acquire("database").status == "refused"
    clock.advance(0.1)
    assert s.acquire("database").status == "granted"


def test_a_given_up_request_whose_grant_landed_in_the_same_moment_frees_its_slot(db: Db, s: Session) -> None:
    (holder,) = full(s)
    waiter, next_one = s.queue("database"), s.queue("database")
    s.release(holder)
    assert s.release(waiter), "it had a lease by then"
    assert statuses(s, waiter, next_one) == ["retry", "granted"]
    db.consistent()


def test_a_waiter_that_is_released_leaves_the_line_and_lets_those_behind_it_through(db: Db, s: Session) -> None:
    one, _ = full(s, limit=2)
    wide, narrow, last = s.queue("database", slots=2), s.queue("database"), s.queue("database")
    s.release(one)
    assert s.release(last)
    assert statuses(s, narrow) == ["queued"]
    assert s.release(wide)
    assert not s.release(wide)
    assert statuses(s, narrow) == ["granted"]
    assert s.waiters() == []
    db.consistent()


# Waiters live while they, or their processes, call in.


def test_a_waiter_that_does_not_call_in_is_gone_after_ten_seconds(clock: Clock, db: Db, s: Session) -> None:
    (holder,) = full(s)
    dead, alive = s.queue("database"), s.queue("database")
    for _ in range(3):
        clock.advance(4)
        assert ask(s, alive).status == "queued"
    assert [(waiter.lease_id, waiter.position) for waiter in s.waiters()] == [(alive, 1)]
    assert s.limit("database").waiting == 1
    s.release(holder)
    assert ask(s, alive).status == "granted"
    assert s.watch_one(dead).status == "retry"
    db.consistent()


def test_one_heartbeat_keeps_all_that_wait_in_a_process(clock: Clock, db: Db, s: Session) -> None:
    (holder,) = full(s)
    waiters = [s.queue("database", channel="pglimits_t") for _ in range(3)]
    s.queue("database", channel="pglimits_u")
    for _ in range(6):
        assert 0 < s.beat("pglimits_t") <= 3
        clock.advance(3)
    assert [waiter.lease_id for waiter in s.waiters()] == waiters
    s.release(holder)
    assert statuses(s, *waiters) == ["granted", "queued", "queued"]
    for waiter in waiters:
        assert s.release(waiter)
    db.consistent()


def test_a_waiter_in_plain_sql_that_asks_as_it_is_told_stays(clock: Clock, s: Session) -> None:
    clock.freeze()
    (holder,) = full(s)
    first, second = s.queue("database"), s.queue("database")
    for _ in range(12):
        answers = [ask(s, first), ask(s, second)]
        assert {answer.status for answer in answers} == {"queued"}
        clock.advance(min(answer.retry_after for answer in answers))
    s.release(holder)
    assert [ask(s, first).status, ask(s, second).status] == ["granted", "queued"]


@pytest.mark.parametrize("slots", [1, 2])
def test_when_the_process_of_the_head_dies_the_next_is_served_by_its_own_look(
    clock: Clock, db: Db, s: Session, slots: int
) -> None:
    """Its slot came free, or what it leaves is enough for the next; and nobody releases anything after that."""
    one, _ = full(s, limit=2)
    clock.freeze()
    dead = s.queue("database", slots=slots, channel="pglimits_dead")
    alive = s.queue("database", channel="pglimits_t")
    s.release(one)
    for _ in range(4):
        s.beat("pglimits_t")
        clock.advance(3)
        row = s.watch_one(alive)
    assert row.status == "granted"
    assert s.watch_one(dead).status == "retry"
    db.consistent()


def test_a_newcomer_is_not_refused_because_of_a_dead_wide_head(clock: Clock, s: Session) -> None:
    one, _ = full(s, limit=2)
    s.queue("database", slots=2)
    s.release(one)
    clock.advance(11)
    assert s.acquire("database").status == "granted"


def test_a_waiter_that_died_asks_again_and_is_queued_anew(clock: Clock, s: Session) -> None:
    full(s)
    waiter = s.queue("database")
    clock.advance(11)
    assert s.waiters() == []
    assert ask(s, waiter).status == "queued"
    assert s.limit("database").waiting == 1


def test_watching_an_unknown_request_says_retry(s: Session) -> None:
    row = s.watch_one(uuid4())
    assert (row.status, row.fence, row.expires_at) == ("retry", None, None)
    assert s.watch() == []


def test_only_news_leaves_out_who_goes_on_waiting_with_nothing_to_do(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 1)
    s.acquire("database", lease_duration=4)
    waiters = [s.queue("database"), s.queue("database")]
    news = "select lease_id, status, seconds from pglimits._watch(%s::uuid[], true)"
    assert s.all(news, waiters) == []
    clock.advance(2)
    assert s.all(news, waiters) == [(waiters[0], "queued", 2)]
    clock.advance(2)
    assert s.all(news, waiters) == [(waiters[0], "granted", 0)]


def test_those_who_wait_for_a_limit_that_somebody_keeps_locked_stay_alive_in_their_order(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("database", 1)
    s.acquire("database", lease_duration=2)
    waiters = [s.queue("database", channel="pglimits_t") for _ in range(3)]
    locking = db.session()
    locking.run("begin")
    locking.run("select from pglimits.states for update")
    for _ in range(3):
        clock.advance(7)
        s.beat("pglimits_t")
    locking.run("rollback")
    assert statuses(s, *waiters) == ["granted", "queued", "queued"]


# Time frees slots too.


def test_the_head_gets_the_slot_at_a_leases_end_with_no_sweep_and_no_release(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    clock.freeze()
    s.acquire("database", lease_duration=1.5)
    waiter = s.queue("database")
    assert s.watch_one(waiter).seconds == ask(s, waiter).retry_after == 1.5
    clock.advance(1.5)
    assert s.acquire("database").status == "refused", "a newcomer does not pass it"
    assert s.watch_one(waiter).status == "granted"
    db.consistent()


def test_an_acquire_on_a_rate_limit_waits_for_the_level_too(clock: Clock, s: Session) -> None:
    s.create("api", 1, 0.5)
    clock.freeze()
    s.release(s.acquire("api").lease_id)
    answer = s.acquire("api", timeout_seconds=FOREVER)
    assert (answer.status, answer.retry_after) == ("queued", 1.95), "half a horizon before its moment"
    clock.advance(1.95)
    row = s.watch_one(answer.lease_id)
    assert (row.status, row.seconds, row.ends_in) == ("granted", 0.05, 300.05)


# max_waiters.


def test_a_longer_line_than_max_waiters_is_refused_with_queue_full(db: Db, s: Session) -> None:
    full(s, max_waiters=2)
    first = s.queue("database")
    s.queue("database")
    with changes_nothing(db.session()), fails("PL006", "database"):
        s.acquire("database", timeout_seconds=FOREVER)
    assert s.acquire("database").status == "refused", "who would not wait is not told about the line"
    assert ask(s, first).status == "queued", "who is in it already stays"
    s.release(first)
    assert s.acquire("database", timeout_seconds=FOREVER).status == "queued"
    db.consistent()


def test_max_waiters_zero_lets_nobody_wait(s: Session) -> None:
    (holder,) = full(s, max_waiters=0)
    with fails("PL006", "database"):
        s.acquire("database", timeout_seconds=FOREVER)
    s.release(holder)
    assert s.acquire("database", timeout_seconds=FOREVER).status == "granted"


def test_max_waiters_is_for_each_key(s: Session) -> None:
    s.create("database", 1, max_waiters=1)
    for key in "ab":
        s.acquire("database", key=key)
        s.queue("database", key=key)


@pytest.mark.parametrize("lives", [None, 0, 1])
def test_dead_waiters_do_not_fill_the_line(clock: Clock, db: Db, s: Session, lives: int | None) -> None:
    full(s, max_waiters=3)
    waiters = [s.queue("database") for _ in range(3)]
    for _ in range(3):
        clock.advance(4)
        if lives is not None:
            ask(s, waiters[lives])
    assert s.limit("database").waiting == (lives is not None)
    assert s.acquire("database", timeout_seconds=FOREVER).status == "queued"
    assert s.waiters()[-1].position == (1 if lives is None else 2)
    db.consistent()


def test_a_line_that_is_full_of_dead_waiters_hands_on_what_they_had_stood_before(clock: Clock, s: Session) -> None:
    one, _ = full(s, limit=2, max_waiters=2)
    s.queue("database", slots=2)
    behind = s.queue("database", channel="pglimits_t")
    s.release(one)
    clock.advance(8)
    s.beat("pglimits_t")
    clock.advance(3)
    assert s.acquire("database", timeout_seconds=FOREVER).status == "queued"
    assert s.watch_one(behind).status == "granted"


# Long lines.


def test_a_call_reads_no_more_of_a_long_line_than_of_a_short_one(s: Session) -> None:
    (holder,) = full(s)  # from here on all plans are made, and kept, while the queue is empty
    last = s.queue("database", channel="pglimits_t")
    watch = "select * from pglimits._watch(array[%s::uuid], true)"
    s.all(watch, last)
    for _ in range(200):
        last = s.queue("database", channel="pglimits_t")
    read = "select idx_tup_fetch + seq_tup_read from pg_stat_xact_user_tables where relid = 'pglimits.queue'::regclass"

    def reads(call: Callable[[], Any]) -> int:
        with s.transaction():
            before = int(s.value(read))
            call()
            return int(s.value(read)) - before

    assert reads(lambda: s.acquire("database")) < 20
    assert reads(lambda: s.all(watch, last)) < 20
    assert reads(lambda: s.beat("pglimits_t")) < 20
    assert reads(lambda: s.release(holder)) < 20
    assert reads(lambda: s.release(last)) < 20


# What a waiter goes by is on disk.


def committing(s: Session, what: str, *parameters: Any) -> str:
    """How a transaction commits that does that, and wanted to commit with synchronous_commit = off."""
    with s.transaction():
        s.run("set local synchronous_commit = off")
        s.run(what, *parameters)
        return str(s.value("show synchronous_commit"))


def test_a_hand_over_to_whoever_goes_when_it_is_told_is_durable_whatever_the_releaser_wants(s: Session) -> None:
    first, second = full(s, limit=2)
    s.queue("database", channel="pglimits_t")
    s.queue("database")  # in plain SQL it claims its lease first, in a transaction of its own
    assert committing(s, "select pglimits.release(%s)", first) == "on"
    assert committing(s, "select pglimits.release(%s)", second) == "off"
    assert committing(s, "select pglimits.acquire('database')") == "off"


def test_a_turn_of_a_rate_limit_that_another_has_served_is_durable(clock: Clock, s: Session) -> None:
    s.create("api", 1, 1)
    clock.freeze()
    s.rate_limit("api")
    first = s.rate_limit("api", timeout_seconds=FOREVER)
    s.rate_limit("api", timeout_seconds=FOREVER)
    clock.advance(2.5)
    assert (
        committing(s, "select pglimits.rate_limit('api', timeout_seconds => null, lease_id => %s)", first.lease_id)
        == "on"
    )


def test_what_is_taken_with_a_release_does_not_undo_that_its_hand_over_is_durable(s: Session) -> None:
    (holder,) = full(s)
    s.create("api", 5)
    s.queue("database", channel="pglimits_t")
    with s.transaction():
        s.run("select pglimits._release_batch(%s::uuid[], false)", [holder])
        s.run(
            "select * from pglimits._acquire_batch('{api}', '{1}', '{\"\"}', false, 0, 300, 0,"
            " array[gen_random_uuid()], '[null]', false, false, null, false)"
        )
        assert s.value("show synchronous_commit") == "on"
    with s.transaction():
        s.run(
            "select * from pglimits._acquire_batch('{api}', '{1}', '{\"\"}', false, 0, 300, 0,"
            " array[gen_random_uuid()], '[null]', false, false, null, false)"
        )
        assert s.value("show synchronous_commit") == "off"
