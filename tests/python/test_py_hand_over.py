"""Hand-over: a waiter goes on at the notification of its lease, and the lease is claimed while it works."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import poolers
import pytest
from wrappertest import (
    Api,
    Children,
    Connection,
    WaitUntil,
    backends,
    held,
    in_thread,
    is_watched,
    listeners,
    nothing_left,
    terminate,
    value,
    waiting,
)

from pglimits import Lease, LeaseLost, Limiter
from pglimits._waiting import LIVENESS

by_notification = poolers.straight_only("no notification comes, and a waiter goes on when it finds its lease")

Handed = Callable[..., contextlib.AbstractContextManager[Connection]]


@pytest.fixture
def handed_over(connect: Any, wait_blocked: Any) -> Handed:
    """``with handed_over(lease) as other:`` its slots go to who waits; until the end nobody can claim that lease.

    ``other`` has the leases to itself.
    """

    @contextlib.contextmanager
    def hand_over(lease: Lease) -> Iterator[Connection]:
        releasing, other = connect(autocommit=False), connect(autocommit=False)
        assert value(releasing, "select pglimits.release(%s)", [lease.id])
        # Next in line for the lock, so that it has it before anybody can hear of the hand-over.
        locked = in_thread(other.execute, "lock table pglimits.leases in access exclusive mode")
        wait_blocked(other.info.backend_pid)
        releasing.commit()
        locked.result(30)
        yield other
        other.commit()

    return hand_over


def end_of(conn: Connection, lease_id: UUID) -> datetime:
    ends: datetime = value(conn, "select expires_at from pglimits.leases where lease_id = %s", [lease_id])
    return ends


def looks(conn: Connection) -> list[int]:
    """The keepers' connections, where they wait for a lock."""
    return [
        pid
        for pid in backends(conn, "pglimits._watch")
        if value(conn, "select coalesce(wait_event_type, '') from pg_stat_activity where pid = %s", [pid]) == "Lock"
    ]


def queue_up(api: Api, conn: Connection, wait_until: WaitUntil, **options: Any) -> tuple[Lease, Any]:
    """Who holds the only slot, and who waits for it."""
    api.create("database", 1)
    holder = api.acquire("database")
    waits = api.start("acquire", "database", **options)
    wait_until(lambda: waiting(conn) == 1 and is_watched(conn))
    return holder, waits


@by_notification
def test_a_waiter_runs_before_its_lease_has_been_claimed(
    api: Api, conn: Connection, handed_over: Handed, wait_until: WaitUntil
) -> None:
    holder, waits = queue_up(api, conn, wait_until)
    with handed_over(holder) as other:
        lease = waits.result(30)
        assert (lease.fence, lease.expires_at) == other.execute(
            "select fence, expires_at from pglimits.leases where lease_id = %s", [lease.id]
        ).fetchone()
        # As if it died now: no longer than it would have lived in the queue.
        assert lease.expires_at <= value(conn, "select clock_timestamp() + interval '10 s'")
        assert not lease.lost
    wait_until(lambda: end_of(conn, lease.id) > value(conn, "select clock_timestamp() + interval '200 s'"))
    wait_until(lambda: lease.expires_at == end_of(conn, lease.id))
    assert api.release(lease)
    assert nothing_left(conn)


def test_a_waiter_may_be_done_before_its_lease_has_been_claimed(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    api.create("database", 1)
    for _ in range(20):
        holder = api.acquire("database")
        block = api.start_block("database", lambda lease: lease.fence, strict=True)
        wait_until(lambda: waiting(conn) == 1)
        api.release(holder)
        assert block.result(30) > holder.fence
    assert nothing_left(conn)
    assert "lost" not in caplog.text


@pytest.mark.parametrize("options", [{"renew": False}, {"lease_duration": 2}], ids=["left alone", "short"])
def test_a_lease_that_is_left_alone_or_short_is_claimed_first(
    api: Api, conn: Connection, handed_over: Handed, wait_until: WaitUntil, options: dict[str, Any]
) -> None:
    holder, waits = queue_up(api, conn, wait_until, **options)
    with handed_over(holder):
        # It would have been woken before its keeper looked.
        wait_until(lambda: looks(conn))
        assert not waits.done()
    lease = waits.result(30)
    assert lease.expires_at == end_of(conn, lease.id) or "renew" not in options
    assert api.release(lease)


@by_notification
def test_a_claim_that_finds_nothing_loses_the_lease(
    api: Api, conn: Connection, handed_over: Handed, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    holder = api.acquire("database")
    entered: list[Lease] = []

    def body(lease: Lease) -> None:
        entered.append(lease)
        wait_until(lambda: lease.lost)

    block = api.start_block("database", body, strict=True)
    wait_until(lambda: waiting(conn) == 1 and is_watched(conn))
    with handed_over(holder) as other:
        wait_until(lambda: entered)
        assert not entered[0].lost
        assert value(other, "select pglimits.release(%s)", [entered[0].id])
    with pytest.raises(LeaseLost):
        block.result(30)
    assert nothing_left(conn)


@by_notification
def test_a_claim_whose_answer_is_lost_is_made_good_by_renewal(
    api: Api, conn: Connection, handed_over: Handed, wait_until: WaitUntil
) -> None:
    holder, waits = queue_up(api, conn, wait_until)
    with handed_over(holder):
        lease = waits.result(30)
        terminate(conn, wait_until(lambda: looks(conn)))
    wait_until(lambda: lease.expires_at > value(conn, "select clock_timestamp() + interval '200 s'"))
    assert not lease.lost
    assert api.release(lease)


def test_a_body_that_keeps_the_interpreter_to_itself_has_its_lease_claimed(
    api: Api, conn: Connection, children: Children, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    holder = api.acquire("database")
    child = children(
        """
        import ctypes
        from pglimits.sync import concurrency
        with concurrency("database"):
            ctypes.PyDLL(None).sleep(600)
        """
    )
    wait_until(lambda: waiting(conn) == 1 and is_watched(conn))
    api.release(holder)
    wait_until(
        lambda: conn.execute(
            "select true from pglimits.leases where claimed and expires_at > clock_timestamp() + interval '200 s'"
            " and lease_id <> %s",
            [holder.id],
        ).fetchone()
    )
    child.stop()


# Notifications that are lost, or say something else.


def test_a_notification_that_does_not_come_delays_and_nothing_else(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    holder, waits = queue_up(api, conn, wait_until)
    conn.execute("update pglimits.queue set channel = null")
    assert api.release(holder)
    lease = waits.result(30)
    assert lease.expires_at == end_of(conn, lease.id)
    assert api.release(lease)


def test_notifications_that_mean_nothing_do_no_harm(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    holder, waits = queue_up(api, conn, wait_until)
    lease_id, channel = value(conn, "select (lease_id, channel) from pglimits.queue")
    before = listeners(conn)
    end = 2_000_000_000_000_000
    for payload in [
        "",
        "nonsense",
        "x" * 7000,
        "self",
        lease_id,
        f"{lease_id} ",
        f"{lease_id} soon",
        f"{lease_id} 1 2",
        f"{lease_id} one 0 {end}",
        f"{lease_id} 1 0 soon",
        f"{lease_id} 1 0 {'9' * 40}",
        f"{lease_id} 1 0 -{'9' * 18}",
        f"{lease_id} 1 0 {end} more",
        f"{uuid4()} 1 0 {end}",
        f"{holder.id} 1 0 {end}\nnonsense\n{lease_id}",
    ]:
        conn.execute("select pg_notify(%s, %s)", [channel, payload])
    # It has read them when it has called in again.
    since = value(conn, "select clock_timestamp() + interval '10 s'")
    wait_until(lambda: value(conn, "select max(expires_at) > %s from pglimits.processes", [since]))
    assert not waits.done()
    assert listeners(conn) == before
    assert api.release(holder)
    assert api.release(waits.result(30))
    assert nothing_left(conn)


@by_notification
def test_a_lease_is_counted_from_the_last_heartbeat_that_was_surely_before_its_grant(
    limiter: Limiter, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before it is claimed, and the heartbeat may have overtaken the grant."""
    limiter.create("database", 1)
    holder = limiter.acquire("database")
    waits = in_thread(limiter.acquire, "database")
    wait_until(lambda: limiter._courier.connections.listens())
    waiting_here, now = limiter._courier.waiting, time.monotonic()
    (request,) = wait_until(waiting_here.all)
    request.called_in = now - 60
    waiting_here._beat_before, waiting_here._beat_at = now - 4, now - 1
    counted: list[float] = []
    real = limiter._courier.grant

    def counting(request: Any, fences: Any, expires_at: Any, ends: float, *more: Any, **how: Any) -> None:
        counted.append(ends)
        real(request, fences, expires_at, ends, *more, **how)

    monkeypatch.setattr(limiter._courier, "grant", counting)
    limiter.release(holder)
    lease = waits.result(30)
    assert counted == [now - 4 + LIVENESS]
    limiter.release(lease)


@by_notification
def test_a_forged_grant_is_a_lost_lease_and_leaves_nothing_behind(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    api.create("database", 1)
    holder = api.acquire("database")
    block = api.start_block("database", lambda lease: wait_until(lambda: lease.lost), strict=True)
    wait_until(lambda: waiting(conn) == 1 and is_watched(conn))
    conn.execute(
        "select pg_notify(channel, lease_id || ' 99 0 ' || %s) from pglimits.queue",
        [int((holder.expires_at + timedelta(days=1)).timestamp()) * 1_000_000],
    )
    with pytest.raises(LeaseLost):
        block.result(30)
    assert (held(conn), waiting(conn)) == (1, 0)
    assert api.release(holder)
