"""Requests that queue up in one process travel together, and harm each other in nothing."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from wrappertest import Api, Busy, Connection, Future, Locked, WaitUntil, held, nothing_left, open_api, value, waiting

from pglimits import (
    AcquireTimeout,
    InvalidArgument,
    Limiter,
    LimitNotFound,
    NoSlotDecay,
    SlotsExceedLimit,
)
from pglimits._batches import LARGEST_BATCH, Outbox
from pglimits._courier import Courier
from pglimits._database import Connection as Connection_
from pglimits._database import Source
from pglimits._requests import Request, User, checked, new_id
from pglimits._wake import ThreadWaker


@dataclass
class Statement:
    """A statement that was really sent."""

    thread: int
    sql: str

    @property
    def acquires(self) -> bool:
        return "pglimits._acquire_batch" in self.sql

    @property
    def releases(self) -> bool:
        return "pglimits._release_batch" in self.sql


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Statement]]:
    """What the limiters have sent, noted on its way to the real database."""
    statements: list[Statement] = []
    real = Connection_._send

    def noting(self: Connection_) -> None:
        real(self)
        if not self._preparing:
            assert self.sent is not None
            statements.append(Statement(threading.get_ident(), self.sent.sql.decode()))

    monkeypatch.setattr(Connection_, "_send", noting)
    yield statements


def blocked(conn: Connection) -> int:
    return int(value(conn, "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"))


def pending(api: Api) -> int:
    outbox = api.limiter._courier.outbox
    return sum(len(lane.errands) for lanes in (outbox._requests, outbox._releases) for lane in list(lanes.values()))


def submit(
    api: Api, wait_until: WaitUntil, *calls: tuple[Any, dict[str, Any]], method: str = "acquire"
) -> list[Future]:
    """Make requests one after the other, each once the one before has queued up in the process."""
    futures = []
    for names, options in calls:
        before = pending(api)
        futures.append(api.start(method, names, **options))
        wait_until(lambda before=before: pending(api) == before + 1, what="for the request to queue up")
    return futures


def test_a_lone_thread_has_one_statement_sent_to_acquire_and_one_to_release_by_the_courier(
    limiter: Limiter, sent: list[Statement]
) -> None:
    limiter.create("database", 1)
    sent.clear()
    with limiter.concurrency("database"):
        assert [statement.acquires for statement in sent] == [True]
    assert [statement.releases for statement in sent] == [False, True]
    assert {statement.thread for statement in sent} == {limiter._courier.ident}


def test_a_lone_task_sends_one_statement_to_acquire_and_one_to_release(dsn: str, sent: list[Statement]) -> None:
    with open_api("async", dsn=dsn) as api:
        api.create("database", 1)
        sent.clear()
        api.release(api.acquire("database"))
        assert [(statement.acquires, statement.releases) for statement in sent] == [(True, False), (False, True)]


def test_a_release_and_a_request_on_one_limit_travel_together_and_the_release_comes_first(
    api: Api, sent: list[Statement], conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    api.create("database", 2)
    lease, other = api.acquire("database"), api.acquire("database")
    locked = Busy(connect, "database")
    first = api.start("release", other)
    wait_until(lambda: blocked(conn) == 1)
    # They may not wait, and find the slots free.
    asked = submit(api, wait_until, *[("database", {"timeout_seconds": 0})] * 2)
    released = api.start("release", lease)
    wait_until(lambda: pending(api) == 3)
    sent.clear()
    locked.unlock()
    assert first.result(30)
    assert released.result(30)
    for future in asked:
        assert api.release(future.result(30))
    assert any(statement.acquires and statement.releases for statement in sent)


def asks(outbox: Outbox, name: str) -> Request:
    kind = checked(name, 1, None, None, 300, False, None, "", 0)
    request = Request(kind, "null", False, new_id(), "raise", None, True, None, waker=ThreadWaker(), user=User())
    outbox.put(request)
    return request


def next_of(outbox: Outbox) -> list[Request]:
    """The requests of the next batch, which is on its way now."""
    job = outbox.next_job(math.inf)
    assert job is not None
    return job.requests


def meets_a_lock(outbox: Outbox, *names: str) -> list[Request]:
    """Requests that have met a lock, and may go again."""
    met = [asks(outbox, name) for name in names]
    for _ in met:
        batch = outbox.next_job(0.0)
        assert batch is not None
        outbox.over(batch)
        outbox.met_a_lock(batch)
    return met


def an_outbox() -> Outbox:
    return Courier(Source(""), True).outbox


def test_what_has_met_a_lock_is_sent_however_busy_the_others_are() -> None:
    outbox = an_outbox()
    met = meets_a_lock(outbox, "one", "two")
    others = [asks(outbox, name) for name in ("three", "four", "five")]
    assert [next_of(outbox) for _ in range(3)] == [met[:1], others[:1], others[1:2]]
    # One such batch at a time, and the others have the ways that they had.
    assert not outbox.can_send(math.inf)


def test_what_has_met_a_lock_goes_with_those_who_ask_for_the_same_and_nobody_else() -> None:
    outbox = an_outbox()
    (met,) = meets_a_lock(outbox, "one")
    other, newcomer = asks(outbox, "two"), asks(outbox, "one")
    assert [next_of(outbox) for _ in range(2)] == [[met, newcomer], [other]]


def test_what_a_batch_has_no_room_for_goes_behind_the_others() -> None:
    outbox = an_outbox()
    many = [asks(outbox, "one") for _ in range(LARGEST_BATCH + 1)]
    other = asks(outbox, "two")
    first = outbox.next_job(math.inf)
    assert first is not None
    assert first.requests == many[:-1]
    outbox.over(first)
    assert [next_of(outbox) for _ in range(2)] == [[other], many[-1:]]


def test_a_rate_limit_call_is_one_statement_also_when_it_sleeps(
    api: Api, sent: list[Statement], conn: Connection
) -> None:
    api.create("api", 1, slot_decay_per_second=20)
    api.rate_limit("api")
    sent.clear()
    api.rate_limit("api")
    assert [statement.acquires for statement in sent] == [True]


def test_requests_that_queue_up_meanwhile_travel_as_one_batch(
    api: Api, sent: list[Statement], conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    api.create("database", 100)
    sent.clear()
    locked = Busy(connect, "database")
    first = api.start("acquire", "database")
    wait_until(lambda: blocked(conn) == 1)
    others = submit(api, wait_until, *[("database", {})] * 20)
    locked.unlock()
    leases = [future.result(30) for future in [first, *others]]
    assert len([statement for statement in sent if statement.acquires]) == 2
    assert held(conn) == 21
    # And so do their releases.
    sent.clear()
    locked = Busy(connect, "database")
    first = api.start("release", leases.pop())
    wait_until(lambda: blocked(conn) == 1)
    others = []
    for lease in leases:
        before = pending(api)
        others.append(api.start("release", lease))
        wait_until(lambda before=before: pending(api) == before + 1)
    locked.unlock()
    assert all(future.result(30) for future in [first, *others])
    assert len([statement for statement in sent if statement.releases]) == 2
    assert nothing_left(conn)


def test_an_event_loop_that_is_blocked_holds_up_no_thread(
    dsn: str, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    with open_api("sync", dsn=dsn) as threads, open_api("async", dsn=dsn) as tasks:
        threads.create("database", 100)
        assert threads.limiter._courier is tasks.limiter._courier
        locked = Busy(connect, "database")
        asked = tasks.start("acquire", "database")
        wait_until(lambda: blocked(conn) == 1)
        go_on = threading.Event()
        tasks.loop.call_soon_threadsafe(go_on.wait)
        locked.unlock()
        # Its answer is there, and nobody takes it in.
        wait_until(lambda: held(conn) == 1)
        threads.release(threads.acquire("database", timeout_seconds=20))
        assert not asked.done()
        go_on.set()
        threads.release(asked.result(30))
        assert nothing_left(conn)


def test_requests_of_a_batch_are_served_in_their_order(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    locked = Busy(connect, "database")
    first = api.start("acquire", "database")
    wait_until(lambda: blocked(conn) == 1)
    others = submit(api, wait_until, *[("database", {"holder": number}) for number in range(8)])
    locked.unlock()
    lease = first.result(30)
    wait_until(lambda: waiting(conn) == 8)
    assert [waiter.holder for waiter in api.waiters("database")] == list(range(8))
    for future in others:
        api.release(lease)
        lease = future.result(30)
    api.release(lease)


def test_bad_requests_in_a_batch_harm_no_other(api: Api, conn: Connection, connect: Any, wait_until: WaitUntil) -> None:
    api.create("database", 100)
    locked = Busy(connect, "database")
    first = api.start("acquire", "database")
    wait_until(lambda: blocked(conn) == 1)
    bad = [
        (["database", "nowhere"], {"strict": True}, LimitNotFound),
        (["database"], {"occupy": 101}, SlotsExceedLimit),
        (["database", "with/slash"], {}, InvalidArgument),
        (["database"], {"priority": 2_000_000}, InvalidArgument),
        (["database"], {"holder": "x" * 9000}, InvalidArgument),
        (["database", ("database", "k" * 201)], {}, InvalidArgument),
    ]
    good = submit(api, wait_until, *[("database", {})] * 3)
    futures = submit(api, wait_until, *[(names, options) for names, options, _ in bad])
    good += submit(api, wait_until, *[("database", {})] * 3)
    locked.unlock()
    leases = [future.result(30) for future in [first, *good]]
    for future, (_, options, kind) in zip(futures, bad, strict=True):
        error = future.exception(30)
        assert isinstance(error, kind), (options, error)
    assert held(conn) == len(leases) == 7
    for lease in leases:
        api.release(lease)


def test_a_rate_limit_call_on_a_limit_without_decay_harms_no_other_in_its_batch(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    api.create("database", 100)
    locked = Busy(connect, "database")
    first = api.start("acquire", "database")
    wait_until(lambda: blocked(conn) == 1)
    good = submit(api, wait_until, ("database", {}))
    bad = submit(api, wait_until, ("database", {}), method="rate_limit")
    locked.unlock()
    with pytest.raises(NoSlotDecay):
        bad[0].result(30)
    for future in [first, *good]:
        api.release(future.result(30))


@pytest.mark.parametrize(
    "names, options",
    [
        ("\ud800", {}),
        ("database", {"holder": "\ud800"}),
        ("database", {"holder": {"\udfff": 1}}),
        ("database", {"key": "\ud800"}),
        (["database", "\udc00"], {}),
        ({("database", "\ud800"): 1}, {}),
    ],
    ids=["name", "holder", "holder-key", "key", "names", "key-of-name"],
)
def test_text_that_is_no_unicode_is_refused_and_harms_no_other(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil, names: Any, options: dict[str, Any]
) -> None:
    api.create("database", 100)
    locked = Busy(connect, "database")
    first = api.start("acquire", "database")
    wait_until(lambda: blocked(conn) == 1)
    good = submit(api, wait_until, ("database", {}))
    bad = api.start("acquire", names, **options)
    wait_until(lambda: bad.done() or pending(api) == 2)
    good += submit(api, wait_until, ("database", {}))
    locked.unlock()
    error = bad.exception(30)
    assert isinstance(error, InvalidArgument), repr(error)
    for future in [first, *good]:
        api.release(future.result(30))
    assert nothing_left(conn)


def test_one_who_runs_out_of_time_in_a_batch_harms_no_other(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    api.create("database", 100)
    locked = Busy(connect, "database")
    first = api.start("acquire", "database")
    wait_until(lambda: blocked(conn) == 1)
    others = submit(
        api,
        wait_until,
        ("database", {}),
        ("database", {"timeout_seconds": 0.2}),
        ("database", {}),
    )
    with pytest.raises(AcquireTimeout):
        others[1].result(30)
    locked.unlock()
    for future in (first, others[0], others[2]):
        api.release(future.result(30))
    wait_until(lambda: nothing_left(conn))


def test_a_locked_limit_holds_up_only_its_own_requests(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    api.create("locked", 10)
    api.create("free", 10)
    locked = Locked(connect, "locked")
    stuck = [api.start("acquire", "locked") for _ in range(3)]
    wait_until(lambda: blocked(conn) == 1)
    for _ in range(5):
        api.release(api.acquire("free"))
    assert not any(future.done() for future in stuck)
    locked.unlock()
    for future in stuck:
        api.release(future.result(30))
    assert nothing_left(conn)


def test_several_locked_limits_hold_up_only_their_own_requests(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    names = ["locked-1", "locked-2", "locked-3"]
    for name in [*names, "free"]:
        api.create(name, 10)
    locked = Locked(connect, *names)
    stuck = [api.start("acquire", names[0])]
    wait_until(lambda: blocked(conn) >= 1)
    stuck += [api.start("acquire", name) for name in names[1:]]
    wait_until(lambda: blocked(conn) >= 2)
    free = api.start("acquire", "free")
    wait_until(free.done, what="for a limit that nobody has locked")
    locked.unlock()
    for future in [free, *stuck]:
        api.release(future.result(30))
    assert nothing_left(conn)


def test_a_locked_limit_holds_up_no_other_that_is_in_the_same_batch(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    for name in ("busy-1", "busy-2", "locked", "free"):
        api.create(name, 10)
    # With as many batches on their way as there may be, what queues up behind them goes in one.
    busy = [Locked(connect, "busy-1"), Locked(connect, "busy-2")]
    locked = Locked(connect, "locked")
    first = []
    for number in (1, 2):
        first.append(api.start("acquire", f"busy-{number}"))
        wait_until(lambda number=number: blocked(conn) == number)
    both = [api.start("acquire", "locked"), api.start("acquire", "free")]
    busy[0].unlock()
    wait_until(both[1].done, what="for a limit that nobody has locked")
    assert not both[0].done()
    locked.unlock()
    busy[1].unlock()
    for future in [*first, *both]:
        api.release(future.result(30))
    assert nothing_left(conn)


def test_hundreds_of_requests_over_many_limits_get_each_its_own_answer(api: Api, conn: Connection) -> None:
    for number in range(5):
        api.create(f"limit-{number}", 200)
    futures = [api.start("acquire", {f"limit-{n % 5}": n % 3 + 1}, holder=n) for n in range(200)]
    leases = {n: future.result(60) for n, future in enumerate(futures)}
    held_by = {holder.lease_id: holder for holder in api.holders()}
    for number, lease in leases.items():
        holder = held_by[lease.id]
        assert (holder.name, holder.slots, holder.holder) == (f"limit-{number % 5}", number % 3 + 1, number)
        assert lease.fence == holder.fence
    released = [api.start("release", lease) for lease in leases.values()]
    assert all(future.result(60) for future in released)
    assert nothing_left(conn)


def test_a_request_that_was_sent_again_because_of_a_lock_keeps_what_it_gets(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    """What was given up on the way, and is given back in the background, is not what was granted in the end."""
    api.create("database", 10)
    api.create("other", 10)
    locked = Locked(connect, "database", "other")
    waits = [api.start("acquire", name) for name in ("database", "other", "database", ["database", "other"])]
    since = value(conn, "select clock_timestamp()")
    wait_until(lambda: value(conn, "select clock_timestamp() > %s + interval '2.5 s'", [since]))
    locked.unlock()
    leases = [future.result(30) for future in waits]
    since = value(conn, "select clock_timestamp()")
    wait_until(lambda: value(conn, "select clock_timestamp() > %s + interval '2.5 s'", [since]))
    assert held(conn) == 5
    assert all(api.release(lease) for lease in leases)
