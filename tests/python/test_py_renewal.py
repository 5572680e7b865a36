"""Leases: what the handle tells, how they are renewed, and what becomes of those that are lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from wrappertest import (
    PATIENCE,
    Api,
    Connection,
    WaitUntil,
    backends,
    held,
    in_thread,
    lose_reply,
    nothing_left,
    open_api,
    run,
    terminate,
    value,
)

from pglimits import AsyncLimiter, Lease, LeaseLost, Limiter, _leases, _waiting

THIRD = 3.0
"""A lease of so many seconds is renewed every second."""


def end_of(conn: Connection, lease: Lease) -> datetime:
    ends: datetime = value(conn, "select min(expires_at) from pglimits.holders where lease_id = %s", [lease.id])
    return ends


def outlives(conn: Connection, lease: Lease, wait_until: WaitUntil, times: int) -> None:
    """Wait until the database's clock has passed the lease's first end so many times over."""
    first = lease.expires_at
    assert first is not None
    row = conn.execute("select acquired_at from pglimits.holders where lease_id = %s", [lease.id]).fetchone()
    assert row is not None
    target = row[0] + times * (first - row[0])
    wait_until(lambda: value(conn, "select clock_timestamp() > %s", [target]), timeout=PATIENCE)


def renews_not_before(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is renewed until the event is set."""
    real, begins = _leases.Leases.take_due, threading.Event()

    def held_up(self: _leases.Leases, now: float) -> Any:
        self.not_before = 0.0 if begins.is_set() else now + 0.05
        return real(self, now)

    monkeypatch.setattr(_leases.Leases, "take_due", held_up)
    return begins


# The handle.


def test_a_lease_tells_its_id_fence_and_end(api: Api, conn: Connection) -> None:
    api.create("database", 2)
    lease = api.acquire("database", lease_duration=60)
    assert isinstance(lease, Lease)
    assert isinstance(lease.id, UUID)
    held_by = api.holders("database")[0]
    assert (lease.id, lease.fence, lease.expires_at) == (held_by.lease_id, held_by.fence, held_by.expires_at)
    assert list(lease.fences) == [held_by.fence]
    assert held_by.expires_at - held_by.acquired_at == timedelta(seconds=60)
    assert lease.expires_at is not None
    assert lease.expires_at.tzinfo is not None
    assert not lease.lost
    api.release(lease)
    assert not lease.lost


def test_a_lease_that_was_granted_after_a_long_wait_for_a_lock_counts_from_then(
    limiter: Limiter, conn: Connection, server_dsn: str, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    limiter.release(limiter.acquire("database"))
    with psycopg.connect(server_dsn) as locker:
        locker.execute("select from pglimits.states for update")
        began = time.monotonic()
        asks = in_thread(lambda: limiter.acquire("database", lease_duration=1))
        wait_until(lambda: time.monotonic() > began + 1.5)
    lease = asks.result(30)
    # From when the statement that was granted was sent: each of them waits for a lock for less than half a second.
    assert lease._ends > began + 2
    limiter.release(lease)


@pytest.mark.parametrize("together", [False, True])
def test_a_lease_that_was_granted_when_it_was_asked_for_before_counts_from_then_and_is_renewed_at_once(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Its connection broke before it was answered, and it took a while until there was another."""
    names = ["database", "other"] if together else ["database"]
    for name in names:
        limiter.create(name, 1)
    lost: list[Any] = []
    ends_sooner = "update pglimits.leases set expires_at = clock_timestamp() + interval '20 seconds'"
    lose_reply(monkeypatch, then=lambda: lost.append(conn.execute(ends_sooner)))
    renews = renews_not_before(monkeypatch)
    began = time.monotonic()
    lease = limiter.acquire(names, lease_duration=60)
    counted = lease._ends - time.monotonic()
    renews.set()
    assert (len(lost), counted <= 20) == (1, True)
    wait_until(lambda: lease._ends >= began + 60)
    limiter.release(lease)


def test_a_look_from_before_a_lease_was_granted_does_not_lose_it(limiter: Limiter, conn: Connection) -> None:
    """Its waiter was told to ask again, and did, while all were looked at."""
    limiter.create("database", 1)
    lease = limiter.acquire("database", lease_duration=THIRD)
    limiter._courier.leases.claimed(lease.id, time.monotonic(), None, time.monotonic())
    assert not lease.lost
    limiter.release(lease)


def test_a_lease_lasts_five_minutes_by_default(api: Api) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    holder = api.holders()[0]
    assert holder.expires_at - holder.acquired_at == timedelta(minutes=5)
    api.release(lease)


def test_fences_are_one_for_each_name_and_grow_with_every_grant(api: Api) -> None:
    api.create("a", 5)
    api.create("b", 5)
    leases = [api.acquire(["b", "missing", "a"]) for _ in range(3)]
    for earlier, later in zip(leases, leases[1:], strict=False):
        assert later.fences[0] > earlier.fences[0]
        assert later.fences[1] is None
        assert later.fences[2] > earlier.fences[2]
    fences = {holder.name: holder.fence for holder in api.holders() if holder.lease_id == leases[0].id}
    assert list(leases[0].fences) == [fences["b"], None, fences["a"]]
    assert leases[0].fence == fences["b"]
    for lease in leases:
        api.release(lease)


def test_a_fence_of_a_waiter_is_above_that_of_who_held_before(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("a", 1)
    api.create("b", 1)
    first = api.acquire(["a", "b"])
    second = api.start("acquire", ["b", "a"])
    wait_until(lambda: value(conn, "select count(*) from pglimits.waiters") > 0)
    api.release(first)
    lease = second.result(30)
    assert lease.fences[0] > first.fences[1]
    assert lease.fences[1] > first.fences[0]
    api.release(lease)


def test_a_lease_on_nothing_holds_nothing(api: Api, conn: Connection) -> None:
    lease = api.acquire(["nowhere", "neither"])
    assert (lease.enforced, lease.fence, list(lease.fences), lease.expires_at) == (False, None, [None, None], None)
    assert not lease.lost
    assert api.release(lease) is False
    assert nothing_left(conn)


def test_releasing_twice_is_harmless(api: Api, conn: Connection) -> None:
    api.create("database", 2)
    mine, other = api.acquire("database"), api.acquire("database")
    assert api.release(mine) is True
    assert api.release(mine) is False
    assert api.release(mine.id) is False
    assert held(conn) == 1
    assert api.release(other)


def test_leaving_a_block_whose_lease_was_released_inside_is_harmless(api: Api, conn: Connection) -> None:
    api.create("database", 1)
    assert api.block("database", lambda lease: api.release(lease), strict=True) is True
    assert nothing_left(conn)


def test_a_lease_is_released_by_its_id_from_anywhere(api: Api, conn: Connection) -> None:
    api.create("database", 2)
    first, second = api.acquire("database", renew=False), api.acquire("database", renew=False)
    assert api.release(first.id) is True
    assert api.release(str(second.id)) is True
    assert held(conn) == 0


# Renewal.


def test_leases_are_renewed_at_a_third_of_their_duration(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    lease = api.acquire("database", lease_duration=THIRD)
    first = lease.expires_at
    wait_until(lambda: lease.expires_at != first)
    # By the database's clock: after a third of the duration, well before the lease would have ended.
    assert timedelta(seconds=THIRD / 4) < lease.expires_at - first < timedelta(seconds=THIRD * 2 / 3)
    assert end_of(conn, lease) >= lease.expires_at
    api.release(lease)


def test_a_lease_lives_as_long_as_its_block(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)

    def body(lease: Lease) -> int:
        outlives(conn, lease, wait_until, 3)
        assert not lease.lost
        return held(conn)

    assert api.block("database", body, lease_duration=1, strict=True) == 1
    assert held(conn) == 0


def test_a_lease_taken_without_renewal_ends_by_itself(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    lease = api.acquire("database", lease_duration=1, renew=False)
    wait_until(lambda: held(conn) == 0)
    assert not api.renew(lease)
    assert api.release(lease) is False


def test_a_lease_is_renewed_by_hand_for_any_duration(api: Api, conn: Connection) -> None:
    api.create("database", 1)
    lease = api.acquire("database", lease_duration=10, renew=False)
    before = end_of(conn, lease)
    assert api.renew(lease, 1000) is True
    assert end_of(conn, lease) - before > timedelta(seconds=900)
    assert api.renew(lease.id) is True
    api.release(lease)
    assert api.renew(lease.id) is False


def test_a_lease_that_was_renewed_by_hand_tells_its_new_end_and_is_not_taken_as_lost_before(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    lease = api.acquire("database", lease_duration=1, renew=False)
    first = end_of(conn, lease)
    assert api.renew(lease, 1000) is True
    assert lease.expires_at == end_of(conn, lease)
    wait_until(lambda: value(conn, "select clock_timestamp() > %s", [first]))
    assert not lease.lost
    # Never nearer.
    assert api.renew(lease, 10) is True
    assert lease.expires_at == end_of(conn, lease) > first + timedelta(seconds=900)
    assert api.release(lease)


def test_a_lease_that_was_renewed_by_hand_is_renewed_by_its_new_duration(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    lease = api.acquire("database", lease_duration=2 * THIRD)
    assert api.renew(lease, 1)
    outlives(conn, lease, wait_until, 2)
    assert not lease.lost
    assert held(conn) == 1
    assert api.release(lease)


def test_an_event_loop_blocked_for_three_lease_durations_loses_no_lease(dsn: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("database", 1)
            async with limiter.concurrency("database", lease_duration=1, strict=True) as lease:
                time.sleep(3.2)  # noqa: ASYNC251
                assert not lease.lost
                assert held(conn) == 1
            assert held(conn) == 0

    run(main())


def test_all_leases_of_a_process_are_renewed_in_one_statement_by_one_thread(
    dsn: str, conn: Connection, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, set[UUID]]] = []
    real = _waiting.Renew.statements

    def counting(self: _waiting.Renew, connection: Any) -> Any:
        calls.append((threading.get_ident(), {lease.id for lease in self.leases}))
        return real(self, connection)

    monkeypatch.setattr(_waiting.Renew, "statements", counting)
    with open_api("sync", dsn=dsn) as threads, open_api("async", dsn=dsn) as tasks:
        threads.create("database", 40)
        # Long enough that, on a slow machine too, all are taken within the tenth of a third that comes along.
        leases = [api.acquire("database", lease_duration=5 * THIRD) for api in (threads, tasks) * 20]
        ids = {lease.id for lease in leases}
        # Taken one after the other, they settle into one statement.
        wait_until(lambda: sum(asked == ids for _, asked in calls) >= 2, timeout=PATIENCE)
        assert len({thread for thread, _ in calls}) == 1
        for lease in leases:
            assert not lease.lost
            threads.release(lease)
    assert held(conn) == 0


def test_renewal_goes_on_through_a_lost_connection(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    lease = api.acquire("database", lease_duration=2)
    for _ in range(2):
        renewing = wait_until(lambda: backends(conn, "pglimits.renew"))
        ends = end_of(conn, lease)
        terminate(conn, renewing)
        wait_until(lambda ends=ends: end_of(conn, lease) > ends)
    assert not lease.lost
    assert api.release(lease)


def test_renewal_is_tried_until_the_end_of_the_lease_and_no_longer(
    dsn: str, conn: Connection, server: Any, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin, Limiter(dsn) as limiter:
        limiter.create("database", 2)
        short = limiter.acquire("database", lease_duration=2)
        long = limiter.acquire("database", lease_duration=60)
        wait_until(lambda: backends(conn, "pglimits.renew"))
        dbname = conn.info.dbname
        admin.execute(f'alter database "{dbname}" with allow_connections false')
        try:
            terminate(conn, backends(conn))
            wait_until(lambda: short.lost)
            wait_until(lambda: "could not be renewed" in caplog.text)
        finally:
            admin.execute(f'alter database "{dbname}" with allow_connections true')
        assert str(short.id) in caplog.text
        assert not long.lost
        # By the local clock it is lost no later than by the database's.
        wait_until(lambda: held(conn) == 1)
        assert limiter.release(short) is False
        # A pooler may say for a while that its logins fail: then it is released a little later.
        assert limiter.release(long) is not False
        wait_until(lambda: held(conn) == 0)


# Lost leases.


def lose(conn: Connection, lease: Lease, wait_until: WaitUntil) -> None:
    conn.execute("select pglimits.release(%s)", [lease.id])
    wait_until(lambda: lease.lost)


@pytest.mark.parametrize("options", [{"strict": True}, {"raise_on_lease_renewal_failure": True}])
def test_a_lost_lease_raises_at_the_exit_of_a_sync_block_and_tells_earlier(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil, options: dict[str, Any]
) -> None:
    limiter.create("database", 1)
    worked = False
    with (
        pytest.raises(LeaseLost, match="database") as caught,
        limiter.concurrency("database", lease_duration=1, **options) as lease,
    ):
        assert not lease.lost
        lose(conn, lease, wait_until)
        worked = True
    assert worked
    assert str(lease.id) in str(caught.value)
    assert nothing_left(conn)


@pytest.mark.parametrize("options", [{}, {"strict": True, "raise_on_lease_renewal_failure": False}])
def test_a_lost_lease_that_is_not_to_raise_warns_once(
    api: Api, conn: Connection, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    api.create("database", 1)

    def body(lease: Lease) -> UUID:
        lose(conn, lease, wait_until)
        return lease.id

    with caplog.at_level(logging.WARNING, "pglimits"):
        lease_id = api.block("database", body, lease_duration=1, **options)
    warnings = [record for record in caplog.records if str(lease_id) in record.getMessage()]
    assert [record.levelname for record in warnings] == ["WARNING"]


def test_a_lost_lease_warns_also_where_its_block_is_left_before_the_thread_that_renews_notices(
    limiter: Limiter, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter.create("database", 1)
    left = renews_not_before(monkeypatch)
    with caplog.at_level(logging.WARNING, "pglimits"):
        try:
            with limiter.concurrency("database", lease_duration=1) as lease:
                wait_until(lambda: lease.lost)
        finally:
            left.set()
        limiter.close()
    warnings = [record for record in caplog.records if str(lease.id) in record.getMessage()]
    assert [record.levelname for record in warnings] == ["WARNING"]


def test_a_lease_lost_only_at_the_exit_raises_too(limiter: Limiter, conn: Connection) -> None:
    """Nobody renewed in between, so the release is what finds out."""
    limiter.create("database", 1)
    with pytest.raises(LeaseLost), limiter.concurrency("database", strict=True) as lease:
        conn.execute("select pglimits.release(%s)", [lease.id])


def test_who_asks_to_be_told_that_a_lease_is_lost_is_told_once_also_when_it_is_lost_already(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 2)
    before, after = [api.acquire("database", lease_duration=1) for _ in range(2)]
    told: list[str] = []
    before.on_lost(lambda: told.append("before"))
    for lease in (before, after):
        conn.execute("select pglimits.release(%s)", [lease.id])
    wait_until(lambda: before._lost and after._lost)
    after.on_lost(lambda: told.append("after"))
    for lease in (before, after):
        assert not api.release(lease)
    assert told == ["before", "after"]


def test_who_asks_to_be_told_in_a_strict_block_is_told_and_cancelled(dsn: str, conn: Connection) -> None:
    told = []

    async def works() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("database", 1)
            async with limiter.concurrency("database", strict=True, lease_duration=1) as lease:
                for number in range(2):
                    lease.on_lost(lambda number=number: told.append(number))
                await limiter.reset("database")
                await asyncio.sleep(3600)

    with pytest.raises(LeaseLost):
        run(works())
    assert told == [0, 1]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_limiter_that_is_closed_in_a_block_loses_its_lease_and_does_not_warn(
    dsn: str, conn: Connection, caplog: pytest.LogCaptureFixture, shared: bool, strict: bool
) -> None:
    went_on = []

    def at_work(limiter: Limiter) -> None:
        with limiter.concurrency("database", strict=strict) as lease:
            limiter.close()
            assert lease.lost
            went_on.append(lease)

    async def in_task() -> None:
        limiter = AsyncLimiter(dsn)
        async with limiter.concurrency("database", strict=strict) as lease:
            await limiter.close()
            assert lease.lost
            await asyncio.sleep(0)
            went_on.append(lease)

    with open_api("sync", dsn=dsn) as other, caplog.at_level(logging.WARNING, "pglimits"):
        other.create("database", 1)
        if not shared:
            other.close()
        for work in (lambda: at_work(Limiter(dsn)), lambda: run(in_task())):
            with pytest.raises(LeaseLost) if strict else contextlib.nullcontext():
                work()
            assert nothing_left(conn)
    assert not caplog.records
    # The body in a task is cancelled, as whenever a lease is lost.
    assert len(went_on) == (1 if strict else 2)


def test_an_error_in_the_body_is_not_replaced_by_a_lost_lease(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)

    def body(lease: Lease) -> None:
        conn.execute("select pglimits.release(%s)", [lease.id])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        api.block("database", body, strict=True)


def test_a_decorated_function_raises_when_its_lease_was_lost(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)

    @limiter.concurrency("database", strict=True)
    def work() -> None:
        conn.execute("select pglimits.reset('database')")

    with pytest.raises(LeaseLost):
        work()


async def lose_soon(conn: Connection) -> None:
    await asyncio.to_thread(conn.execute, "select pglimits.reset('database')")


def in_tasks(dsn: str, body: Any) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("database", 1)
            await asyncio.wait_for(body(limiter), PATIENCE)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            await asyncio.sleep(0)

    run(main())


@pytest.mark.parametrize("options", [{"strict": True}, {"raise_on_lease_renewal_failure": True}])
def test_a_lost_lease_cancels_the_body_of_an_async_block(dsn: str, conn: Connection, options: dict[str, Any]) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        cancelled = False
        with pytest.raises(LeaseLost, match="database"):
            async with limiter.concurrency("database", lease_duration=1, **options):
                await lose_soon(conn)
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    cancelled = True
                    raise
        assert cancelled
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        # The task is as good as new.
        await asyncio.sleep(0.01)
        async with asyncio.timeout(20), limiter.concurrency("database"):
            pass

    in_tasks(dsn, body)


def test_a_body_that_swallows_the_cancellation_still_gets_lease_lost(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        with pytest.raises(LeaseLost):
            async with limiter.concurrency("database", lease_duration=1, strict=True):
                await lose_soon(conn)
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    in_tasks(dsn, body)


def test_a_body_that_answers_the_cancellation_with_an_error_keeps_its_error(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        with pytest.raises((ZeroDivisionError, LeaseLost)) as caught:
            async with limiter.concurrency("database", lease_duration=1, strict=True):
                await lose_soon(conn)
                try:
                    await asyncio.sleep(3600)
                finally:
                    raise ZeroDivisionError
        chain: list[type[BaseException]] = []
        error: BaseException | None = caught.value
        while error is not None:
            chain.append(type(error))
            error = error.__cause__ or error.__context__
        assert ZeroDivisionError in chain
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    in_tasks(dsn, body)


def test_a_timeout_around_an_async_block_is_not_confused_by_a_lost_lease(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        with pytest.raises(LeaseLost):
            async with (
                asyncio.timeout(3600) as timeout,
                limiter.concurrency("database", lease_duration=1, strict=True),
            ):
                await lose_soon(conn)
                await asyncio.sleep(3600)
        assert not timeout.expired()

    in_tasks(dsn, body)


def test_a_timeout_within_an_async_block_is_not_confused_by_a_lost_lease(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        with pytest.raises(LeaseLost):
            async with limiter.concurrency("database", lease_duration=1, strict=True):
                await lose_soon(conn)
                async with asyncio.timeout(3600):
                    await asyncio.sleep(3600)

    in_tasks(dsn, body)


def test_a_timeout_that_fires_in_a_block_with_a_live_lease_is_a_timeout(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), limiter.concurrency("database", lease_duration=1, strict=True):
                await asyncio.sleep(3600)
        assert held(conn) == 0

    in_tasks(dsn, body)


def test_a_lost_lease_in_a_task_group_fails_the_group(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        other_cancelled = False

        async def work() -> None:
            async with limiter.concurrency("database", lease_duration=1, strict=True):
                await lose_soon(conn)
                await asyncio.sleep(3600)

        async def other() -> None:
            nonlocal other_cancelled
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                other_cancelled = True
                raise

        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(work())
                group.create_task(other())
        assert [type(error) for error in caught.value.exceptions] == [LeaseLost]
        assert other_cancelled

    in_tasks(dsn, body)


def test_a_task_group_in_a_block_whose_lease_is_lost_ends_with_it(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        ended: list[str] = []

        async def work(name: str) -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(name)

        with pytest.raises(LeaseLost):
            async with limiter.concurrency("database", lease_duration=1, strict=True), asyncio.TaskGroup() as group:
                group.create_task(work("a"))
                group.create_task(work("b"))
                await lose_soon(conn)
        assert sorted(ended) == ["a", "b"]

    in_tasks(dsn, body)


def test_somebody_elses_cancellation_goes_on_even_if_the_lease_was_lost(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        lost = asyncio.Event()

        async def work() -> None:
            async with limiter.concurrency("database", lease_duration=1, strict=True):
                await lose_soon(conn)
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    lost.set()
                    await asyncio.sleep(3600)

        task = asyncio.create_task(work())
        await lost.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    in_tasks(dsn, body)


def test_a_lease_that_is_not_to_raise_leaves_the_task_alone(dsn: str, conn: Connection, wait_until: WaitUntil) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        async with limiter.concurrency("database", lease_duration=1) as lease:
            await lose_soon(conn)
            await asyncio.to_thread(wait_until, lambda: lease.lost)
            await asyncio.sleep(0.05)

    in_tasks(dsn, body)


def test_a_decorated_coroutine_function_raises_when_its_lease_was_lost(dsn: str, conn: Connection) -> None:
    async def body(limiter: AsyncLimiter) -> None:
        @limiter.concurrency("database", lease_duration=1, strict=True)
        async def work() -> None:
            await lose_soon(conn)
            await asyncio.sleep(3600)

        with pytest.raises(LeaseLost):
            await work()

    in_tasks(dsn, body)


def test_a_lease_that_ended_with_its_block_is_not_lost(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    lease = api.block("database", lambda lease: lease, lease_duration=1, strict=True)
    wait_until(lambda: value(conn, "select clock_timestamp() > %s", [lease.expires_at]))
    assert not lease.lost
