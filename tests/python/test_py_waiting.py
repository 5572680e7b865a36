"""Waiting: for a slot and for a rate, from threads and tasks, without a connection of one's own."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path
from typing import Any

import poolers
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from wrappertest import (
    Api,
    AsyncApi,
    Children,
    Connection,
    WaitUntil,
    event_loop,
    held,
    in_thread,
    is_watched,
    listeners,
    lose_reply,
    nothing_left,
    open_api,
    run,
    terminate,
    value,
    waiting,
)

from pglimits import (
    AcquireTimeout,
    AsyncLimiter,
    Limiter,
    LimiterUnavailable,
    LimitNotFound,
    NoSlotDecay,
    QueueFull,
    SlotsExceedLimit,
    _database,
    _requests,
    _waiting,
)


def test_a_waiter_that_an_operator_takes_out_of_the_line_is_refused(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    waiter = api.start("acquire", "database")
    wait_until(lambda: waiting(conn) == 1)
    assert value(conn, "select pglimits.force_release(lease_id) from pglimits.waiters")
    with pytest.raises(AcquireTimeout):
        waiter.result(30)
    assert api.release(lease)
    assert held(conn) == 0


def test_a_waiter_gets_the_slot_when_it_is_released(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    first = api.acquire("database")
    second = api.start("acquire", "database")
    wait_until(lambda: waiting(conn) == 1)
    assert not second.done()
    assert api.release(first)
    lease = second.result(30)
    assert lease.fence > first.fence
    assert held(conn) == 1
    assert api.release(lease)
    assert nothing_left(conn)


def test_waiters_are_granted_in_the_order_of_their_arrival(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    first = api.acquire("database")
    order: list[int] = []
    blocks = []
    for number in range(6):
        blocks.append(api.start_block("database", lambda _, number=number: order.append(number)))
        wait_until(lambda number=number: waiting(conn) == number + 1)
    api.release(first)
    for block in blocks:
        block.result(30)
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_higher_priority_goes_first_and_arrival_counts_within_one(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    first = api.acquire("database")
    order: list[str] = []
    blocks = []
    for name, priority in [("a", 0), ("b", 5), ("c", -1), ("d", 5), ("e", 0)]:
        blocks.append(api.start_block("database", lambda _, name=name: order.append(name), priority=priority))
        wait_until(lambda count=len(blocks): waiting(conn) == count)
    api.release(first)
    for block in blocks:
        block.result(30)
    assert order == ["b", "d", "a", "e", "c"]


def test_threads_tasks_and_processes_stand_in_one_queue(
    dsn: str, conn: Connection, children: Children, wait_until: WaitUntil
) -> None:
    conn.execute("create table turns (fence bigint, who text)")
    with open_api("sync", dsn=dsn) as threads, open_api("async", dsn=dsn) as tasks:
        threads.create("database", 1)
        first = threads.acquire("database")
        blocks = []

        def log(who: str) -> Any:
            def body(lease: Any) -> None:
                with psycopg.connect(conn.info.dsn, autocommit=True) as own:
                    own.execute("insert into turns values (%s, %s)", [lease.fence, who])

            return body

        expected = []
        for number in range(6):
            who = ("thread", "task", "process")[number % 3] + str(number)
            expected.append(who)
            if number % 3 == 2:
                children(
                    """
                    import os, sys, psycopg
                    from pglimits.sync import concurrency
                    with psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as own:
                        with concurrency("database") as lease:
                            own.execute("insert into turns values (%s, %s)", [lease.fence, sys.argv[1]])
                    """,
                    who,
                )
            else:
                blocks.append((threads, tasks)[number % 3].start_block("database", log(who)))
            wait_until(lambda number=number: waiting(conn) == number + 1)
        threads.release(first)
        for block in blocks:
            block.result(30)
        wait_until(lambda: value(conn, "select count(*) from turns") == 6)
        assert [row[0] for row in conn.execute("select who from turns order by fence")] == expected


# Timeouts.


def test_a_timeout_of_zero_tries_once(api: Api, conn: Connection) -> None:
    api.create("database", 1)
    lease = api.acquire("database", timeout_seconds=0)
    with pytest.raises(AcquireTimeout):
        api.acquire("database", timeout_seconds=0)
    assert (held(conn), waiting(conn)) == (1, 0)
    api.release(lease)


def test_max_retries_of_zero_tries_once_and_another_number_changes_nothing(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    lease = api.acquire("database", max_retries=0)
    with pytest.raises(AcquireTimeout):
        api.acquire("database", max_retries=0)
    with pytest.raises(AcquireTimeout):
        api.acquire("database", timeout_seconds=3600, max_retries=0)
    waits = api.start("acquire", "database", max_retries=1)
    wait_until(lambda: waiting(conn) == 1)
    api.release(lease)
    assert api.release(waits.result(30))


def test_a_timeout_leaves_the_queue_and_takes_nothing(api: Api, conn: Connection) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    with pytest.raises(AcquireTimeout) as caught:
        api.acquire("database", timeout_seconds=0.2)
    assert isinstance(caught.value, TimeoutError)
    assert "database" in str(caught.value)
    assert (held(conn), waiting(conn)) == (1, 0)
    assert api.release(lease)
    assert held(conn) == 0


def test_many_timeouts_in_the_moment_of_the_grant_leak_nothing(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    """Slots are passed on while their waiters' timeouts run out: what comes in that moment is taken or given back."""
    api.create("database", 1)
    outcomes: list[str] = []
    lock = threading.Lock()

    def note(_: Any) -> None:
        with lock:
            outcomes.append("granted")

    for round_ in range(6):
        lease = api.acquire("database")
        waiters = [api.start_block("database", note, timeout_seconds=0.02 + 0.002 * number) for number in range(20)]
        wait_until(lambda waiters=waiters: waiters[round_].done())
        api.release(lease)
        for waiter in waiters:
            error = waiter.exception(30)
            assert error is None or isinstance(error, AcquireTimeout), repr(error)
            outcomes.append("" if error is None else "timeout")
    assert outcomes.count("timeout") >= 6
    wait_until(lambda: nothing_left(conn))


def test_a_limit_of_zero_admits_nobody_until_the_timeout(api: Api, conn: Connection) -> None:
    api.create("closed", 0)
    with pytest.raises(AcquireTimeout):
        api.acquire("closed", timeout_seconds=0)
    with pytest.raises(AcquireTimeout):
        api.acquire("closed", timeout_seconds=0.1)
    assert nothing_left(conn)


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_a_lock_kept_in_a_long_transaction_does_not_break_the_deadline(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil, seconds: float
) -> None:
    api.create("database", 2)
    other = connect(autocommit=False)
    other.execute("select pglimits.acquire('database')")
    # It ends although the transaction does not.
    with pytest.raises(AcquireTimeout):
        api.acquire("database", timeout_seconds=seconds)
    other.rollback()
    wait_until(lambda: nothing_left(conn))
    assert api.release(api.acquire("database"))


def test_a_lock_kept_in_a_long_transaction_only_delays_who_waits_for_ever(
    api: Api, conn: Connection, connect: Any, wait_blocked: Any, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    other = connect(autocommit=False)
    other.execute("select pglimits.acquire('database')")
    waits = api.start("acquire", "database")
    wait_until(lambda: value(conn, "select count(*) from pg_stat_activity where wait_event_type = 'Lock'") == 1)
    assert not waits.done()
    other.rollback()
    assert api.release(waits.result(30))


# The queue's bound.


def test_a_full_queue_refuses_at_once(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1, max_waiters=1)
    lease = api.acquire("database")
    waits = api.start("acquire", "database")
    wait_until(lambda: waiting(conn) == 1)
    with pytest.raises(QueueFull):
        api.acquire("database")
    assert waiting(conn) == 1
    api.release(lease)
    assert api.release(waits.result(30))


# Changing a limit while somebody waits.


def test_a_limit_that_grows_lets_its_waiters_in(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    leases = [api.acquire("database")]
    waits = [api.start("acquire", "database") for _ in range(3)]
    wait_until(lambda: waiting(conn) == 3)
    api.update("database", limit=3)
    wait_until(lambda: sum(future.done() for future in waits) == 2)
    assert (held(conn), waiting(conn)) == (3, 1)
    api.update("database", limit=4)
    leases += [future.result(30) for future in waits]
    for lease in leases:
        assert api.release(lease)


def test_a_limit_that_is_deleted_lets_its_waiters_go_with_a_warning(
    api: Api, conn: Connection, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    api.create("database", 1)
    holder = api.acquire("database")
    waits = api.start("acquire", "database")
    strict = api.start("acquire", "database", strict=True)
    wait_until(lambda: waiting(conn) == 2)
    api.delete("database")
    lease = waits.result(30)
    assert not lease.enforced
    with pytest.raises(LimitNotFound, match="database"):
        strict.result(30)
    assert "'database'" in caplog.text
    # What was held is gone with the limit: releasing is a no-op.
    assert api.release(holder) is False


def test_a_limit_that_is_deactivated_lets_its_waiters_through(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    holder = api.acquire("database")
    waits = api.start("acquire", "database", strict=True)
    wait_until(lambda: waiting(conn) == 1)
    api.update("database", active=False)
    lease = waits.result(30)
    assert not lease.enforced
    assert lease.fences == (None,) or list(lease.fences) == [None]
    # The lease from before counts on, and one taken while inactive frees nothing later.
    assert held(conn) == 1
    api.update("database", active=True)
    assert api.release(lease) is False
    assert held(conn) == 1
    assert api.release(holder)


def test_a_waiter_that_became_too_wide_is_told(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 3)
    holder = api.acquire("database")
    wide = api.start("acquire", "database", 3)
    wait_until(lambda: waiting(conn) == 1)
    api.update("database", limit=2)
    with pytest.raises(SlotsExceedLimit, match="database"):
        wide.result(30)
    assert (held(conn), waiting(conn)) == (1, 0)
    api.release(holder)


@pytest.mark.skipif(poolers.MODE is not None, reason="who polls looks again without being told")
def test_news_that_come_before_the_answer_of_a_look_that_has_not_seen_them_are_heeded(
    api: Api, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute("select pglimits.create_limit('database', 2)")
    lease = api.acquire("database")
    has_looked, notified = _waiting.Waiting.has_looked, _waiting.Waiting.notified
    looks: list[object] = []

    def has_looked_too_early(waiting: _waiting.Waiting, watch: _waiting.Watch, result: Any) -> None:
        if not looks:
            conn.execute("select pglimits.update_limit('database', 1)")
            notified(waiting, waiting.channel, str(watch.due[0]))
        looks.append(watch)
        has_looked(waiting, watch, result)

    monkeypatch.setattr(_waiting, "HEARTBEAT", 3600.0)
    monkeypatch.setattr(_waiting.Waiting, "notified", lambda *_: None)
    monkeypatch.setattr(_waiting.Waiting, "has_looked", has_looked_too_early)
    with pytest.raises(SlotsExceedLimit):
        api.start("acquire", "database", 2).result(30)
    assert held(conn) == 1 and not lease.lost


def test_a_waiter_over_several_limits_is_told_what_becomes_of_one_for_which_it_does_not_stand_in_line(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("first", 1)
    for name in ("narrowed", "gone"):
        api.create(name, 2)
    lease = api.acquire("first")
    too_wide = api.start("acquire", {"first": 1, "narrowed": 2})
    strict = api.start("acquire", ["first", "gone"], strict=True)
    wait_until(lambda: waiting(conn) == 2 and is_watched(conn))
    api.update("narrowed", limit=1)
    with pytest.raises(SlotsExceedLimit, match="narrowed"):
        too_wide.result(30)
    api.delete("gone")
    with pytest.raises(LimitNotFound, match="gone"):
        strict.result(30)
    wait_until(lambda: waiting(conn) == 0)
    assert api.release(lease)
    assert nothing_left(conn)


def test_a_request_over_limits_that_others_never_leave_free_has_its_turn(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    names = ("first", "second")
    for name in names:
        api.create(name, 1)
    done = threading.Event()

    def keep_busy(name: str) -> None:
        while not done.is_set():
            lease = api.acquire(name)
            done.wait(0.01)
            api.release(lease)

    busy = [in_thread(keep_busy, name) for name in names for _ in range(4)]
    try:
        wait_until(lambda: waiting(conn) >= 4)
        assert api.release(api.acquire(names, timeout_seconds=60))
    finally:
        done.set()
        for each in busy:
            each.result(30)
    assert nothing_left(conn)


@pytest.mark.parametrize("names", ["database", ["database", "other"]])
def test_a_waiter_stays_in_its_queue_while_the_limit_is_renamed(
    api: Api, conn: Connection, wait_until: WaitUntil, names: Any
) -> None:
    api.create("database", 1)
    api.create("other", 1)
    holder = api.acquire("database")
    waits = api.start("acquire", names, strict=True)
    wait_until(lambda: waiting(conn) == 1)
    for name, new_name in (("database", "second"), ("second", "renamed")):
        api.update(name, new_name=new_name)
        api.create(name, 1)
    assert waiting(conn, "renamed") == 1
    api.release(holder)
    lease = waits.result(30)
    assert held(conn, "renamed") == 1
    assert held(conn, "database") == 0
    assert api.release(lease)


# Rate limits.


def test_who_waits_for_a_rate_goes_when_its_moment_comes(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    conn.execute("create table started (at timestamptz)")
    conn.execute("insert into started values (clock_timestamp())")
    api.create("api", 1, slot_decay_per_second=5)
    for _ in range(3):
        api.rate_limit("api")
    # By the database's clock: one at once, the third no sooner than two fifths of a second later.
    assert value(conn, "select clock_timestamp() >= at + interval '0.4 s' from started")
    assert waiting(conn) == 0


def test_who_waited_in_vain_is_told_when_time_alone_would_let_it_in(api: Api, conn: Connection) -> None:
    api.create("database", 1)
    for seconds, expected in ((100, True), (None, False)):
        conn.execute(
            "select pglimits.acquire('database', lease_duration => %s, lease_id => gen_random_uuid())",
            [seconds or 3600],
        )
        with pytest.raises(AcquireTimeout) as caught:
            api.acquire("database", timeout_seconds=0.3)
        left = caught.value.retry_after
        assert left is not None
        assert (left <= 100) is expected
        conn.execute("select pglimits.reset('database')")


def test_a_moment_beyond_the_timeout_is_refused_at_once_and_takes_nothing(api: Api, conn: Connection) -> None:
    api.create("api", 1, slot_decay_per_second=0.001)
    api.rate_limit("api")
    before = api.get("api").level
    for seconds in (0, 10, 900):
        with pytest.raises(AcquireTimeout) as caught:
            api.rate_limit("api", timeout_seconds=seconds)
        assert 900 < (caught.value.retry_after or 0) <= 1000
    assert api.get("api").level <= before
    assert waiting(conn) == 0


def test_who_waits_for_a_rate_is_told_that_it_rose_and_goes_sooner(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("api", 1, slot_decay_per_second=0.001)
    api.rate_limit("api")
    sleeps = api.start("rate_limit", "api")
    wait_until(lambda: waiting(conn) == 1)
    api.update("api", slot_decay_per_second=1000)
    # Its moment was a thousand seconds away.
    sleeps.result(30)
    assert waiting(conn) == 0


def test_who_waits_for_a_rate_stays_in_line_while_its_limit_is_shut(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("api", 1, slot_decay_per_second=0.001)
    api.rate_limit("api")
    sleeps = api.start("rate_limit", "api")
    wait_until(lambda: waiting(conn) == 1)
    api.update("api", limit=0)
    # By this rate it would have gone.
    api.update("api", slot_decay_per_second=1000)
    # Its process has called in, and looked.
    since = value(conn, "select clock_timestamp() + interval '10 s'")
    wait_until(lambda: value(conn, "select max(expires_at) > %s from pglimits.processes", [since]))
    assert (sleeps.done(), waiting(conn)) == (False, 1)
    api.update("api", limit=1)
    sleeps.result(30)


def test_who_waits_for_a_rate_that_is_shut_waits_no_longer_than_its_timeout(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("api", 1, slot_decay_per_second=0.2)
    api.rate_limit("api")
    sleeps = api.start("rate_limit", "api", timeout_seconds=6)
    wait_until(lambda: waiting(conn) == 1)
    api.update("api", limit=0)
    with pytest.raises(AcquireTimeout):
        sleeps.result(30)
    assert nothing_left(conn)


def test_who_waits_for_a_rate_is_told_when_its_moment_has_moved_beyond_its_timeout(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("api", 1, slot_decay_per_second=0.1)
    api.rate_limit("api")
    sleeps = api.start("rate_limit", "api", timeout_seconds=60)
    wait_until(lambda: waiting(conn) == 1)
    api.update("api", limit=0)
    api.update("api", limit=1, slot_decay_per_second=0.001)
    with pytest.raises(AcquireTimeout):
        sleeps.result(30)
    wait_until(lambda: nothing_left(conn))


def test_who_could_not_be_told_for_too_long_asks_again_and_does_not_go_early(
    dsn: str, conn: Connection, wait_until: WaitUntil
) -> None:
    with Limiter(dsn, on_unavailable="wait") as limiter:
        limiter.create("api", 1, slot_decay_per_second=0.001)
        limiter.rate_limit("api")
        sleeps = in_thread(lambda: limiter.rate_limit("api"))
        wait_until(lambda: waiting(conn) == 1)
        since = wait_until(lambda: _asked_at(limiter))
        # As after seconds without a connection, where there is one again by the time that it looks.
        _give_up(limiter)
        wait_until(lambda: _asked_at(limiter) > since)
        assert not sleeps.done()
        limiter.update("api", slot_decay_per_second=10000)
        sleeps.result(30)


def test_who_waits_for_a_rate_does_not_go_early_while_the_database_is_away(
    dsn: str, conn: Connection, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Limiter(dsn, on_unavailable="wait") as limiter:
        limiter.create("api", 1, slot_decay_per_second=0.001)
        limiter.rate_limit("api")
        sleeps = in_thread(lambda: limiter.rate_limit("api"))
        wait_until(lambda: _asked_at(limiter))
        asked = []

        def away(_: Any) -> Any:
            asked.append(1)
            raise psycopg.OperationalError("the database is away")

        with monkeypatch.context() as outage:
            outage.setattr(_database.Connection, "_send", away)
            _give_up(limiter)
            wait_until(lambda: len(asked) >= 2)
            assert not sleeps.done()
        limiter.update("api", slot_decay_per_second=10000)
        sleeps.result(30)


def _asked_at(limiter: Limiter) -> float:
    """When the only request that is queued was sent."""
    return max([request.asked_at for request in limiter._courier.waiting.all()], default=0.0)


def _give_up(limiter: Limiter) -> None:
    """No connection could be had for so long that what is queued is given up."""

    def unreachable(_: object) -> None:
        courier = limiter._courier
        for request in courier.waiting.all():
            courier.waiting.remove(request)
            courier.unavailable(request, LimiterUnavailable("no connection"))

    limiter._courier.put(unreachable, _requests.Errand())


@pytest.mark.parametrize("full", [False, True])
def test_a_request_whose_reply_was_lost_gets_what_it_was_granted_or_leaves_the_line_if_it_is_an_error_by_now(
    dsn: str, conn: Connection, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    with Limiter(dsn) as limiter:
        for name in ("database", "other"):
            limiter.create(name, 5)
        holds = limiter.acquire("database", 5) if full else None
        lost: list[int] = []

        def delete() -> None:
            lost.append(waiting(conn))
            conn.execute("select pglimits.delete_limit('other')")

        lose_reply(monkeypatch, then=delete)
        if holds is None:
            lease = limiter.acquire(["database", "other"], 5, timeout_seconds=60, strict=True)
            assert (lease.fences[0] is not None, lease.fences[1]) == (True, None)
        else:
            with pytest.raises(LimitNotFound):
                limiter.acquire(["database", "other"], 5, timeout_seconds=60, strict=True)
            lease = holds
        assert lost == [int(full)]
        wait_until(lambda: waiting(conn) == 0)
        limiter.release(lease)
        assert nothing_left(conn)


def test_who_waits_for_a_rate_is_told_that_it_fell_and_goes_later(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("api", 1, slot_decay_per_second=0.5)
    api.rate_limit("api")
    sleeps = api.start("rate_limit", "api")
    wait_until(lambda: waiting(conn) == 1)
    api.update("api", slot_decay_per_second=0.25)
    moment = value(conn, "select pglimits._moment(s, 1, clock_timestamp()) from pglimits.states s")
    sleeps.result(30)
    assert value(conn, "select clock_timestamp() >= %s", [moment])


@pytest.mark.parametrize("changed", ["slow", "fast"])
def test_who_waits_for_several_rates_goes_by_what_they_are_now(
    api: Api, conn: Connection, wait_until: WaitUntil, changed: str
) -> None:
    api.create("slow", 1, slot_decay_per_second=0.001)
    api.create("fast", 1, slot_decay_per_second=1000)
    api.rate_limit("slow")
    sleeps = api.start("rate_limit", ["slow", "fast"])
    wait_until(lambda: waiting(conn) == 1)
    api.update(changed, limit=2)
    if changed == "fast":
        assert waiting(conn) == 1
        api.update("slow", slot_decay_per_second=1000)
    sleeps.result(30)
    assert waiting(conn) == 0


def test_who_waits_for_a_limit_that_lost_its_decay_gets_the_error(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("api", 1, slot_decay_per_second=0.001)
    api.rate_limit("api")
    sleeps = api.start("rate_limit", "api")
    wait_until(lambda: waiting(conn) == 1)
    api.update("api", slot_decay_per_second=0)
    with pytest.raises(NoSlotDecay):
        sleeps.result(30)


@pytest.mark.parametrize("names", [["api"], ["api", "fast"]])
@pytest.mark.parametrize("change", ["delete", "deactivate"])
def test_who_waits_for_a_rate_goes_at_once_when_it_is_no_longer_enforced(
    api: Api, conn: Connection, wait_until: WaitUntil, change: str, names: list[str]
) -> None:
    api.create("api", 1, slot_decay_per_second=0.001)
    api.create("fast", 1, slot_decay_per_second=1000)
    api.rate_limit("api")
    sleeps = api.start("rate_limit", names)
    wait_until(lambda: waiting(conn) == 1)
    if change == "delete":
        api.delete("api")
    else:
        api.update("api", active=False)
    sleeps.result(30)
    assert waiting(conn) == 0


# What waiting costs.


@poolers.straight_only("nobody can listen")
def test_nobody_listens_until_something_waits_and_then_one_connection_does(
    dsn: str, conn: Connection, wait_until: WaitUntil
) -> None:
    with open_api("sync", dsn=dsn) as threads, open_api("async", dsn=dsn) as tasks:
        threads.create("database", 1)
        lease = threads.acquire("database")
        tasks.release(tasks.acquire("nonexistent"))
        assert listeners(conn) == []
        waits = [api.start("acquire", "database") for api in (threads, tasks) * 5]
        wait_until(lambda: waiting(conn) == 10)
        wait_until(lambda: len(listeners(conn)) == 1)
        for _ in range(10):
            threads.release(lease)
            wait_until(lambda: any(future.done() for future in waits))
            done = next(future for future in waits if future.done())
            waits.remove(done)
            lease = done.result()
            assert len(listeners(conn)) == 1
        threads.release(lease)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_those_who_wait_and_sleep_hold_no_connection_of_the_pool(
    dsn: str, conn: Connection, wait_until: WaitUntil, kind: str
) -> None:
    """With a pool of one connection, ten wait and the eleventh still gets through."""

    def check(api: Api) -> None:
        api.create("database", 1)
        api.create("api", 1, slot_decay_per_second=0.001)
        api.rate_limit("api")
        lease = api.acquire("database")
        waits = [api.start("acquire", "database") for _ in range(10)]
        sleeps = [api.start("rate_limit", "api") for _ in range(3)]
        wait_until(lambda: waiting(conn) == 13)
        assert len(api.waiters()) == 13
        assert api.get("database").held == 1
        api.update("api", slot_decay_per_second=10000)
        for future in sleeps:
            future.result(30)
        api.release(lease)
        while waits:
            done = wait_until(lambda: next((future for future in waits if future.done()), None))
            waits.remove(done)
            api.release(done.result())
        assert nothing_left(conn)

    if kind == "sync":
        with ConnectionPool(dsn, min_size=1, max_size=1, open=True) as pool, open_api(kind, pool=pool) as api:
            check(api)
            return

    pools: list[AsyncConnectionPool[Any]] = []

    async def open_pool() -> AsyncConnectionPool[Any]:
        pool: AsyncConnectionPool[Any] = AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False)
        await pool.open()
        pools.append(pool)
        return pool

    with event_loop() as loop:
        pool = asyncio.run_coroutine_threadsafe(open_pool(), loop).result(30)
        limiter = AsyncLimiter(pool=pool)
        try:
            check(AsyncApi(limiter, loop))
        finally:
            asyncio.run_coroutine_threadsafe(limiter.close(), loop).result(30)
            asyncio.run_coroutine_threadsafe(pool.close(), loop).result(30)


def test_a_lost_listening_connection_is_replaced_and_nobody_is_forgotten(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    waits = [api.start("acquire", "database") for _ in range(3)]
    wait_until(lambda: waiting(conn) == 3 and is_watched(conn))
    for _ in range(3):
        before = listeners(conn)
        terminate(conn, before)
        # Granted while nobody listens, or after: it comes to hear of it.
        api.release(lease)
        done = wait_until(lambda: next((future for future in waits if future.done()), None))
        waits.remove(done)
        lease = done.result()
    api.release(lease)
    assert nothing_left(conn)


def test_losing_every_connection_at_once_is_survived_by_those_who_wait(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    waits = api.start("acquire", "database")
    wait_until(lambda: waiting(conn) == 1 and is_watched(conn))
    conn.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and application_name = 'pglimits'"
    )
    assert api.release(lease)
    assert api.release(waits.result(30))


def test_wakers_do_not_depend_on_the_loop_that_was_there_first(dsn: str, conn: Connection) -> None:
    """One engine serves several event loops, one after the other."""
    limiter = AsyncLimiter(dsn)

    async def main() -> None:
        await limiter.upsert("database", 1)
        async with limiter.concurrency("database"):
            waits = asyncio.create_task(limiter.acquire("database"))
            while not await asyncio.to_thread(waiting, conn):
                await asyncio.sleep(0.01)
        assert await limiter.release(await waits)

    run(main())
    run(main())
    run(limiter.close())
    assert nothing_left(conn)


def test_a_closed_limiter_says_so_and_starts_nothing(api: Api, wait_until: WaitUntil) -> None:
    before = {thread for thread in threading.enumerate() if thread.name.startswith("pglimits-")}
    api.create("database", 1)
    if api.kind == "sync":
        api.limiter.close()
        with pytest.raises(LimiterUnavailable, match="closed"):
            api.limiter.get("database")
        with pytest.raises(LimiterUnavailable, match="closed"):
            api.limiter.acquire("database")
    else:
        in_thread(api.close).result(30)
        with pytest.raises(LimiterUnavailable, match="closed"):
            api.get("database")
        with pytest.raises(LimiterUnavailable, match="closed"):
            api.acquire("database")
    wait_until(
        lambda: {thread for thread in threading.enumerate() if thread.name.startswith("pglimits-")} <= before, timeout=5
    )


def test_closing_a_limiter_releases_what_it_holds(dsn: str, conn: Connection) -> None:
    for kind in ("sync", "async"):
        with open_api(kind, dsn=dsn) as api:
            api.upsert("database", 2)
            leases = [api.acquire("database"), api.acquire("database")]
            assert held(conn) == 2
        assert held(conn) == 0
        assert leases


def test_limiters_on_one_database_share_a_courier_until_the_last_is_closed(dsn: str, conn: Connection) -> None:
    with open_api("sync", dsn=dsn) as first:
        first.create("database", 2)
        with open_api("sync", dsn=dsn) as second:
            lease = second.acquire("database")
            kept = first.acquire("database")
        assert first.release(kept)
        assert first.release(lease) is False, "closing gave it back"


@pytest.mark.parametrize("how", ["raise", "wait"])
def test_closing_one_of_several_limiters_on_a_database_ends_the_waits_of_its_own_and_of_no_other(
    api: Api, dsn: str, conn: Connection, wait_until: WaitUntil, how: str
) -> None:
    api.create("database", 1)
    api.create("api", 1, slot_decay_per_second=0.001)
    lease = api.acquire("database")
    api.rate_limit("api")
    with open_api(api.kind, dsn=dsn, on_unavailable=how) as goes:
        waits, stays = [], []
        for number, (method, name) in enumerate([("acquire", "database"), ("rate_limit", "api")], 1):
            waits.append(goes.start(method, name))
            wait_until(lambda: waiting(conn) == 2 * number - 1)
            stays.append(api.start(method, name))
            wait_until(lambda: waiting(conn) == 2 * number)
        wait_until(lambda: is_watched(conn))
        goes.close()
        for wait in waits:
            with pytest.raises(LimiterUnavailable, match="closed"):
                wait.result(30)
    assert (waiting(conn, "database"), waiting(conn, "api"), held(conn)) == (1, 1, 1)
    assert not any(wait.done() for wait in stays)
    assert api.release(lease)
    assert api.release(stays[0].result(30))
    api.update("api", slot_decay_per_second=1000)
    stays[1].result(30)
    assert nothing_left(conn)


def test_closing_a_limiter_ends_the_waits_of_the_functions_of_the_other_kind_that_it_decorates(
    api: Api, dsn: str, conn: Connection, wait_until: WaitUntil
) -> None:
    async def in_task() -> None:
        raise AssertionError

    def in_its_thread() -> None:
        raise AssertionError

    api.create("database", 1)
    lease = api.acquire("database")
    with open_api(api.kind, dsn=dsn) as goes:
        decorate = goes.limiter.concurrency("database")
        job = decorate(in_its_thread) if api.kind == "async" else lambda: run(decorate(in_task)())
        waits = in_thread(job)
        wait_until(lambda: waiting(conn) == 1 and len(goes.limiter._courier.waiting))
        goes.close()
        with pytest.raises(LimiterUnavailable, match="closed"):
            waits.result(30)
    wait_until(lambda: waiting(conn) == 0)
    assert api.release(lease)


def test_opening_and_closing_limiters_leaves_no_thread_descriptor_or_connection(
    dsn: str, conn: Connection, wait_until: WaitUntil
) -> None:
    def use() -> None:
        with open_api("sync", dsn=dsn) as api:
            api.upsert("database", 1)
            lease = api.acquire("database")
            waits = api.start("acquire", "database")
            wait_until(lambda: waiting(conn) == 1)
            api.release(lease)
            api.release(waits.result(30))

    def connections() -> int:
        if poolers.MODE:
            return 0  # those to the server are the pooler's
        return int(value(conn, "select count(*) from pg_stat_activity where application_name = 'pglimits'"))

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    use()
    wait_until(lambda: connections() == 0)
    wait_until(lambda: threads() <= before)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        use()
    wait_until(lambda: connections() == 0)
    wait_until(lambda: threads() <= before)
    gc.collect()
    wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= descriptors, timeout=5)
