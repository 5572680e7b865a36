"""A limit, or a lease, that somebody keeps locked in a long transaction holds up what needs it, and nothing else."""

from __future__ import annotations

import logging
import textwrap
from typing import Any

import pytest
from wrappertest import Api, Connection, Locked, WaitUntil, held, in_thread, nothing_left, value, waiting

from pglimits import AcquireTimeout, Lease, Limiter, _batches

LONGER_THAN_A_WAITER_LIVES = "12 seconds"
"""If it does not call in."""


def blocked(conn: Connection, query: str) -> bool:
    """Whether a statement with this in it waits for a lock."""
    return bool(
        value(
            conn,
            "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and query like %s)",
            [f"%{query}%"],
        )
    )


def passes(conn: Connection, wait_until: WaitUntil, interval: str) -> None:
    since = value(conn, "select clock_timestamp()")
    wait_until(lambda: value(conn, "select clock_timestamp() > %s + %s::interval", [since, interval]), timeout=60)


def taken_for_a_second(conn: Connection, clock: Any, *names: str) -> None:
    """Whoever waits for these limits looks again in a second, as time alone frees a slot then. The clock stands still
    until the test lets that second pass."""
    clock.freeze()
    for name in names:
        conn.execute("select pglimits.acquire(%s, lease_duration => 1)", [name])


# Who waits.


@pytest.mark.parametrize("several", [1, 3])
def test_who_waits_for_a_limit_gets_its_slot_while_somebody_keeps_others_locked(
    api: Api, conn: Connection, connect: Any, clock: Any, wait_until: WaitUntil, several: int
) -> None:
    locks = [f"locked-{number}" for number in range(several)]
    frees = [f"free-{number}" for number in range(several)]
    for name in (*locks, *frees):
        api.create(name, 1)
    leases = [api.acquire(name) for name in frees]
    taken_for_a_second(conn, clock, *locks)
    held_up = [api.start("acquire", name) for name in locks]
    wait_until(lambda: waiting(conn) == several)
    locked = Locked(connect, *locks)
    clock.advance(1)
    wait_until(lambda: blocked(conn, "pglimits._watch"))
    served = [api.start("acquire", name) for name in frees]
    wait_until(lambda: waiting(conn) == 2 * several)
    for lease in leases:
        api.release(lease)
    for wait in served:
        api.release(wait.result(30))
    assert not any(wait.done() for wait in held_up)
    locked.unlock()
    for wait in held_up:
        api.release(wait.result(30))
    assert nothing_left(conn)


def test_who_waits_keeps_its_place_while_somebody_keeps_its_limit_or_another_one_locked_for_long(
    limiter: Limiter, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    for name in ("locked", "free"):
        limiter.create(name, 1)
    conn.execute("select pglimits.acquire('locked', lease_duration => 5)")
    lease = limiter.acquire("free")
    served = in_thread(limiter.acquire, "free")
    wait_until(lambda: waiting(conn) == 1)
    held_up = []
    for nth in range(2):
        held_up.append(in_thread(limiter.acquire, "locked"))
        wait_until(lambda nth=nth: waiting(conn, "locked") == nth + 1)
    locked = Locked(connect, "locked")
    # Until there is something due, they are kept alive without the lock.
    wait_until(lambda: blocked(conn, "pglimits._watch"))
    passes(conn, wait_until, LONGER_THAN_A_WAITER_LIVES)
    assert waiting(conn, "free") == 1
    limiter.release(lease)
    limiter.release(served.result(30))
    assert waiting(conn, "locked") == 2
    locked.unlock()
    fences = []
    for wait in held_up:
        held = wait.result(30)
        fences.append(held.fence)
        limiter.release(held)
    assert fences == sorted(fences)
    assert nothing_left(conn)


def test_what_time_frees_is_found_while_somebody_keeps_another_limit_locked(
    api: Api, conn: Connection, connect: Any, clock: Any, wait_until: WaitUntil
) -> None:
    for name in ("locked", "free"):
        api.create(name, 1)
    taken_for_a_second(conn, clock, "locked")
    held_up = api.start("acquire", "locked")
    wait_until(lambda: waiting(conn) == 1)
    locked = Locked(connect, "locked")
    clock.advance(1)
    wait_until(lambda: blocked(conn, "pglimits._watch"))
    for _ in range(3):
        taken_for_a_second(conn, clock, "free")
        acquiring = api.start("acquire", "free")
        wait_until(lambda: waiting(conn, "free") == 1)
        clock.advance(1)
        api.release(acquiring.result(30))
    assert not held_up.done()
    locked.unlock()
    api.release(held_up.result(30))


def test_who_waits_for_a_limit_that_somebody_keeps_locked_waits_no_longer_than_its_timeout(
    api: Api, conn: Connection, connect: Any, clock: Any, wait_until: WaitUntil
) -> None:
    api.create("locked", 1)
    taken_for_a_second(conn, clock, "locked")
    held_up = api.start("acquire", "locked", timeout_seconds=4)
    wait_until(lambda: waiting(conn) == 1)
    locked = Locked(connect, "locked")
    clock.advance(1)
    with pytest.raises(AcquireTimeout):
        held_up.result(30)
    locked.unlock()
    wait_until(lambda: nothing_left(conn))


def test_a_request_over_a_locked_limit_and_another_is_apart_from_those_on_the_other(
    api: Api, conn: Connection, connect: Any, clock: Any, wait_until: WaitUntil
) -> None:
    for name in ("locked", "free"):
        api.create(name, 1)
    taken_for_a_second(conn, clock, "locked")
    lease = api.acquire("free")
    # It stands in line for the first of them.
    both = api.start("acquire", ["locked", "free"])
    wait_until(lambda: waiting(conn) == 1)
    locked = Locked(connect, "locked")
    clock.advance(1)
    one = api.start("acquire", "free")
    wait_until(lambda: waiting(conn) == 2)
    wait_until(lambda: blocked(conn, "pglimits._watch"))
    api.release(lease)
    api.release(one.result(30))
    assert not both.done()
    locked.unlock()
    api.release(both.result(30))


def test_a_request_goes_on_whose_wait_for_a_lock_ends_as_if_it_had_been_cancelled(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    """As the server says of some lock timeouts: a statement that is cancelled has done nothing."""
    api.create("locked", 2)
    lease = api.acquire("locked")
    locked = Locked(connect, "locked")
    calls = [api.start("acquire", "locked"), api.start("release", lease)]
    cancels = (
        "select count(pg_cancel_backend(pid)) from pg_stat_activity where wait_event_type = 'Lock' and query like %s"
    )
    for statement in ("pglimits._acquire_batch", "pglimits._release_batch"):
        wait_until(lambda like=f"%{statement}%": value(conn, cancels, [like]))
    locked.unlock()
    other, released = (call.result(30) for call in calls)
    assert released
    assert held(conn) == 1
    api.release(other)


# Who holds.


class LockedLease:
    """Keeps the row of a lease locked in a transaction of its own."""

    def __init__(self, connect: Any, *leases: Lease) -> None:
        self.connection = connect(autocommit=False)
        self.connection.execute(
            "select from pglimits.leases where lease_id = any (%s) for update", [[lease.id for lease in leases]]
        )

    def unlock(self) -> None:
        self.connection.rollback()


def test_a_lease_that_somebody_keeps_locked_loses_no_other(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    api.create("database", 20)
    shorts = [api.acquire("database", lease_duration=2) for _ in range(8)]
    locked_one, longer = api.acquire("database", lease_duration=2), api.acquire("database", lease_duration=60)
    locked = LockedLease(connect, locked_one, longer)
    with caplog.at_level(logging.WARNING, logger="pglimits.lease"):
        wait_until(lambda: locked_one.lost)
        passes(conn, wait_until, "4 seconds")
        wait_until(lambda: str(locked_one.id) in caplog.text)
    assert not any(lease.lost for lease in (*shorts, longer))
    assert held(conn) == 9
    locked.unlock()
    assert all(api.release(lease) for lease in (*shorts, longer))
    assert not api.release(locked_one)


def test_a_lease_that_somebody_kept_locked_for_less_than_its_duration_is_not_lost(
    api: Api, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    api.create("database", 3)
    leases = [api.acquire("database", lease_duration=6) for _ in range(2)]
    first = value(conn, "select min(expires_at) from pglimits.holders")
    locked = LockedLease(connect, *leases)
    wait_until(lambda: blocked(conn, "pglimits.renew"))
    passes(conn, wait_until, "1 second")
    locked.unlock()
    wait_until(lambda: value(conn, "select clock_timestamp() > %s", [first]))
    assert not any(lease.lost for lease in leases)
    assert all(api.release(lease) for lease in leases)


# What is given back in the background.


def test_what_is_given_back_on_a_free_limit_does_not_wait_for_what_somebody_keeps_locked(
    limiter: Limiter, conn: Connection, connect: Any, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("free", "locked"):
        limiter.create(name, 100)
    leases = [limiter.acquire(name) for _ in range(40) for name in ("locked", "free")]
    attempts: list[int] = []
    real = _batches.Batch.statements

    def counting(self: _batches.Batch, connection: Any) -> Any:
        attempts.append(held(conn, "free"))
        return real(self, connection)

    monkeypatch.setattr(_batches.Batch, "statements", counting)
    locked = Locked(connect, "locked")
    leases.clear()
    wait_until(lambda: held(conn, "free") == 0)
    # With all of them at once, with all of a locked limit, and so on: not with one after the other.
    assert len([before for before in attempts if before]) <= 4
    assert held(conn, "locked") == 40
    # What comes later does not wait for it either.
    limiter.acquire("free")
    wait_until(lambda: held(conn, "free") == 0)
    locked.unlock()
    wait_until(lambda: nothing_left(conn))


# What fails at its commit.


FAILS_AT_COMMIT = """
    create function public.fails() returns trigger language plpgsql as $$
    begin
      raise exception 'at the commit' using errcode = 'serialization_failure';
    end $$;
    create constraint trigger fails after insert or delete on pglimits.leases
      deferrable initially deferred for each row execute function public.fails();
"""


def test_what_fails_at_its_commit_is_neither_granted_nor_released(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lease = limiter.acquire("database")
    conn.execute(textwrap.dedent(FAILS_AT_COMMIT))
    released = in_thread(limiter.release, lease)
    limiter.create("other", 1)
    with pytest.raises(AcquireTimeout):
        limiter.acquire("other", timeout_seconds=0)
    assert held(conn, "other") == 0
    assert held(conn, "database") == 1
    assert not released.done()
    conn.execute("drop trigger fails on pglimits.leases")
    assert released.result(30) is True
    assert nothing_left(conn)
