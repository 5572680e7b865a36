"""Several connections at once: locks, deadlocks, and no limit exceeded whatever happens."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqltest import Clock, Db, Session, changes_nothing, fails

THREADS = 8


def lock_state(session: Session, name: str, key: str = "") -> None:
    """Lock a limit's state, as whoever decides about it does."""
    session.one(
        "select s.version from pglimits.states s join pglimits.configs c using (limit_id)"
        " where c.name = %s and s.key = %s for update of s",
        name,
        key,
    )


def outcome(future: Future[object]) -> object:
    try:
        return future.result(timeout=60)
    except psycopg.Error as error:
        return error


# A refusal costs nothing.


@pytest.mark.parametrize(
    "request_of",
    [
        pytest.param(lambda s: s.acquire("database").status, id="acquire"),
        pytest.param(lambda s: s.acquire("database", lease_id=uuid4()).status, id="acquire with an id"),
        pytest.param(lambda s: s.acquire(["free", "database"]).status, id="acquire several"),
        pytest.param(lambda s: s.acquire(["free", "database"], keys=["new", ""]).status, id="acquire a new key too"),
        pytest.param(lambda s: s.rate_limit("api").status, id="rate_limit"),
        pytest.param(lambda s: s.rate_limit(["other api", "api"]).status, id="rate_limit several"),
        pytest.param(lambda s: s.rate_limit("api", timeout_seconds=1).status, id="rate_limit beyond its timeout"),
        pytest.param(lambda s: s.acquire("queued").status, id="acquire behind a queue"),
        pytest.param(lambda s: s.acquire("shut").status, id="acquire with limit 0"),
        pytest.param(lambda s: s.peek("database", timeout_seconds=None).status and "refused", id="peek"),
    ],
)
def test_a_refusal_writes_nothing_takes_no_transaction_id_and_waits_for_nobody(
    db: Db, s: Session, request_of: Callable[[Session], str]
) -> None:
    for name, limit in {"database": 1, "free": 1, "queued": 1, "shut": 0}.items():
        s.create(name, limit)
    s.create("api", 1, 1 / 64)
    s.create("other api", 1, 1)
    s.serves("database", 1)
    s.serves("queued", 1)
    s.queue("queued", slots=1)
    assert s.rate_limit("api").status == "granted"
    other = db.session()
    other.run("begin")
    other.run("select from pglimits.states for update")
    s.run("set lock_timeout = '50ms'")
    with changes_nothing(db.session()):
        s.run("begin")
        assert request_of(s) == "refused"
        assert s.value("select pg_current_xact_id_if_assigned()") is None
        s.run("rollback")
        # Nor could it write: a transaction that is read-only is enough for a refusal.
        s.run("begin read only")
        assert request_of(s) == "refused"
        s.run("rollback")
    other.run("rollback")


def test_a_refusal_costs_nothing_either_once_a_lease_has_been_renewed_beyond_its_first_end(
    clock: Clock, db: Db, s: Session
) -> None:
    for name in ("database", "other"):
        s.create(name, 1)
    lease_id = s.acquire("database", lease_duration=1).lease_id
    assert s.renew(lease_id, 3600)
    clock.advance(2)
    with changes_nothing(db.session()), s.transaction("read only"):
        assert [s.acquire(names).status for names in ("database", ["database", "other"])] == ["refused"] * 2


def test_a_full_line_refuses_without_waiting_for_a_lock(db: Db, s: Session) -> None:
    s.create("database", 1, max_waiters=1)
    s.serves("database", 1)
    s.queue("database")
    other = db.session()
    other.run("begin")
    lock_state(other, "database")
    s.run("set lock_timeout = '50ms'")
    with fails("PL006", "database"):
        s.acquire("database", timeout_seconds=60)
    other.run("rollback")


# A lock that is not to be had in time.


@pytest.mark.parametrize("timeout", [0, 0.2])
@pytest.mark.parametrize("locked_by", ["acquire", "release", "update"])
def test_a_limit_that_an_open_transaction_keeps_locked_is_its_own_error_that_says_who_does(
    db: Db, s: Session, timeout: float, locked_by: str
) -> None:
    for name in ("database", "api", "free"):
        s.create(name, 2, 0.001 if name == "api" else 0)
        s.release(s.acquire(name).lease_id)
    lease_id = s.acquire("database").lease_id
    other = db.session()
    other.run("set application_name = 'a forgotten one'")
    other.run("begin")
    if locked_by == "acquire":
        other.acquire("database")
    elif locked_by == "release":
        other.release(lease_id)
    else:
        other.update("database", max_waiters=7)
    other.rate_limit("api")
    who = (f"session {other.pid} of {s.value('select session_user')}", "a forgotten one", "idle in transaction")
    with changes_nothing(db.session()):
        for names in ("database", ["free", "database"]):
            with fails("PL009", "'database'", *who):
                s.acquire(names, timeout_seconds=timeout)
        with fails("PL009", "'api'", *who):
            s.rate_limit("api", timeout_seconds=timeout)
    assert s.value("show lock_timeout") == "0"
    s.run("set lock_timeout = '20ms'")
    with fails("PL009", "'database'"):
        s.acquire("database", timeout_seconds=None)
    other.run("commit")
    assert s.acquire("free", timeout_seconds=timeout).status == "granted"


def test_a_request_that_fits_waits_for_the_lock_and_is_not_refused_and_nothing_of_that_outlasts_the_call(
    db: Db, s: Session
) -> None:
    s.create("database", 2)
    s.serves("database", 1)
    other = db.session()
    other.run("begin")
    lock_state(other, "database")
    call, session = db.start_blocked(lambda session: session.acquire("database", timeout_seconds=None))
    other.run("rollback")
    assert call.result(timeout=60).status == "granted"
    with session.transaction():
        session.acquire("database", timeout_seconds=5)
        assert session.value("show lock_timeout") == "0"


# Under contention.


def behind(db: Db, change: str | None, work: Callable[[Session], Any]) -> Any:
    """What comes of that if it waits for the state of a limit while somebody else changes something, and commits."""
    other = db.session()
    other.run("begin")
    lock_state(other, "database")
    for query in change.split("; ") if change else []:
        other.run(query)
    future, _ = db.start_blocked(work)
    other.run("commit")
    return future.result(timeout=20)


CHANGED = {
    "nothing": (None, "granted"),
    "others took all": ("select pglimits.acquire('database', 4)", "queued"),
    "some came free": ("select pglimits.release(%(held)s)", "granted"),
    "off": ("select pglimits.update_limit('database', active => false)", "unlimited"),
    "shut": ("select pglimits.update_limit('database', 0)", "queued"),
    "a rate limit": ("select pglimits.update_limit('database', slot_decay_per_second => 0.001)", "granted"),
    "renamed": ("select pglimits.update_limit('database', new_name => 'other')", "granted"),
    "deleted": ("select pglimits.delete_limit('database')", "unlimited"),
}


@pytest.mark.parametrize("own_id", [False, True], ids=["", "own id"])
@pytest.mark.parametrize(("change", "status"), CHANGED.values(), ids=CHANGED)
def test_what_waited_for_the_lock_of_a_limit_goes_by_what_it_finds_then(
    db: Db, s: Session, change: str | None, status: str, own_id: bool
) -> None:
    s.create("database", 5)
    held = s.acquire("database").lease_id
    answer = behind(
        db, change and change.replace("%(held)s", f"'{held}'::uuid"),
        lambda session: session.acquire("database", timeout_seconds=None, lease_id=uuid4() if own_id else None),
    )  # fmt: skip
    if own_id and change == CHANGED["renamed"][0]:
        status = "unlimited"  # it is asked anew, by a name that is no more
    assert answer.status == status
    db.consistent()


def test_what_waited_for_the_lock_of_the_largest_limit_there_can_be_is_not_too_much_to_compute_with(
    db: Db, s: Session
) -> None:
    s.create("database", 2_147_483_647)
    s.serves("database", 1)
    answer = behind(
        db, "select pglimits.acquire('database', 2000000000)",
        lambda session: session.acquire("database", slots=2_000_000_000, timeout_seconds=None),
    )  # fmt: skip
    assert answer.status == "queued"


ENDED = {
    "released": ("select pglimits.release(%(id)s)", False),
    "renewed": ("select pglimits.renew(%(id)s, 1000)", True),
    "taken again": (
        "select pglimits.release(%(id)s); select pglimits.acquire('database', 3, lease_id => %(id)s)", True
    ),
    "somebody in line": (
        "select pglimits.acquire('database', 5, timeout_seconds => null)", True
    ),
    "deleted": ("select pglimits.delete_limit('database')", False),
}  # fmt: skip


@pytest.mark.parametrize(("change", "live"), ENDED.values(), ids=ENDED)
def test_a_release_that_waited_for_the_lock_ends_what_it_finds_then(
    db: Db, s: Session, change: str, live: bool
) -> None:
    s.create("database", 5)
    lease_id = s.acquire("database").lease_id
    released = behind(
        db, change.replace("%(id)s", f"'{lease_id}'::uuid"), lambda session: session.release(lease_id)
    )  # fmt: skip
    assert released is live
    db.consistent()
    assert [row.lease_id for row in s.holders() if row.lease_id == lease_id] == []


def test_a_request_that_fits_is_not_refused_because_its_limit_is_changed(db: Db, s: Session) -> None:
    """What is in use is never compared with another limit than it was taken from."""
    s.create("database", 5)
    keys = [str(key) for key in range(40)]
    names = ["database"] * len(keys)
    asking = threading.Event()
    asking.set()

    def changer(session: Session) -> object:
        while asking.is_set():
            session.run("begin")
            session.update("database", limit=15)
            taken = session.acquire(names, keys=keys, slots=[10]).lease_id
            session.run("commit")
            session.run("begin")
            session.release(taken)
            session.update("database", limit=5)
            session.run("commit")
        return None

    def caller(session: Session) -> object:
        try:
            # Decided as a refusal is, without a lock.
            return {session.peek(names, keys=keys).status for _ in range(1500)}
        finally:
            asking.clear()

    assert db.together([changer, caller])[1] == {"granted"}
    assert s.acquire("database").status == "granted"


def test_the_same_request_asked_twice_at_once_acts_once_and_is_not_refused(db: Db, s: Session) -> None:
    """A client that lost its connection asks again, while the server is still at work on its first call."""
    s.create("database", 1, max_waiters=1)
    s.serves("database", 1)
    ids = [uuid4() for _ in range(500)]
    gate = threading.Barrier(2)

    def caller(session: Session) -> object:
        found = []
        for lease_id in ids:
            gate.wait(timeout=60)
            try:
                found.append(session.acquire("database", timeout_seconds=60, lease_id=lease_id).status)
            except psycopg.Error as error:
                found.append(str(error.sqlstate))
            if gate.wait(timeout=60) == 0:
                session.release(lease_id)
            gate.wait(timeout=60)
        return found

    assert [{*found} for found in db.together([caller] * 2)] == [{"queued"}] * 2


def test_what_is_handed_over_while_its_waiter_looks_is_claimed_when_it_is_told(db: Db, s: Session) -> None:
    s.create("database", 1)
    gate = threading.Barrier(2)
    rounds = range(150)

    def holder(session: Session) -> object:
        for _ in rounds:
            held = session.acquire("database").lease_id
            gate.wait(timeout=60)
            gate.wait(timeout=60)
            session.release(held)
            gate.wait(timeout=60)
        return None

    def waiter(session: Session) -> object:
        found = set()
        for _ in rounds:
            gate.wait(timeout=60)
            mine = session.queue("database", channel="pglimits_t")
            gate.wait(timeout=60)
            while (row := session.watch_one(mine)).status != "granted":
                pass
            found.add(row.ends_in > 60)
            session.release(mine)
            gate.wait(timeout=60)
        return found

    assert db.together([holder, waiter])[1] == {True}


def test_renewing_what_has_ended_keeps_nobody_from_its_slots(db: Db, s: Session, clock: Clock) -> None:
    s.create("database", 1)
    ended = s.acquire("database", lease_duration=1).lease_id
    clock.advance(2)
    other = db.session()
    other.run("begin")
    assert not other.renew(ended)
    assert s.acquire("database").status == "granted"
    other.run("rollback")


def test_the_clock_is_read_after_the_lock_is_held(db: Db, s: Session) -> None:
    s.create("database", 2)
    s.serves("database", 1)
    other = db.session()
    other.run("begin")
    lock_state(other, "database")
    future, _ = db.start_blocked(lambda session: session.acquire("database", timeout_seconds=60))
    unlocked = other.value("select clock_timestamp()")
    other.run("commit")
    lease_id = future.result(timeout=20).lease_id
    assert s.one("select * from pglimits.holders where lease_id = %s", lease_id).acquired_at > unlocked


def test_a_sweep_that_waited_for_a_lock_goes_by_the_time_after_it(db: Db, s: Session, clock: Clock) -> None:
    clock.freeze()
    s.create("api", 5, 1)
    s.rate_limit("api", slots=5)
    waiter = s.queue("api", slots=5, channel="pglimits_t")
    dead = s.queue("api", channel="pglimits_dead")
    # What it waits for has decayed, and nobody has looked.
    clock.advance(8)
    lives = "update pglimits.queue set expires_at = pglimits._now() + %s::interval where lease_id = %s"
    s.run(lives, "-1 second", dead)
    s.run(lives, "1 minute", waiter)
    other = db.session()
    other.run("begin")
    lock_state(other, "api")
    future, _ = db.start_blocked(lambda sweeping: sweeping.sweep())
    clock.advance(5)
    other.run("commit")
    future.result(timeout=30)
    assert s.release(waiter)
    assert s.rate_limit("api").status == "refused"


def test_contended_grants_of_a_rate_limit_are_charged_exactly(db: Db, s: Session) -> None:
    s.create("api", 1000, 1e-9)

    def caller(session: Session) -> int:
        return sum(session.rate_limit("api").status == "granted" for _ in range(50))

    assert sum(db.together([caller] * THREADS)) == 400
    assert s.limit("api").level == pytest.approx(400, abs=1e-5)


def test_contended_requests_are_granted_exactly_up_to_the_limit(db: Db, s: Session) -> None:
    s.create("database", 37)

    def caller(session: Session) -> int:
        return sum(session.acquire("database").status == "granted" for _ in range(10))

    assert sum(db.together([caller] * THREADS)) == 37
    assert s.limit("database").held == 37
    db.consistent()


def test_first_users_of_a_key_do_not_both_create_it(db: Db, s: Session) -> None:
    s.create("database", 1)
    for key in range(20):
        gate = threading.Barrier(THREADS)

        def caller(session: Session, gate: threading.Barrier = gate, key: int = key) -> str:
            gate.wait(timeout=20)
            return str(session.acquire("database", key=str(key)).status)

        assert sorted(db.together([caller] * THREADS)) == ["granted"] + ["refused"] * (THREADS - 1)
    db.consistent()


def test_a_killed_backend_leaves_neither_slot_nor_lease_of_an_open_transaction(db: Db, s: Session) -> None:
    s.create("database", 1)
    other = db.session()
    other.run("begin")
    assert other.acquire("database").status == "granted"
    s.value("select pg_terminate_backend(%s)", other.pid)
    s.run("set lock_timeout = 0")
    assert s.acquire("database", timeout_seconds=1).status == "granted"
    db.consistent()


class Tally:
    """Counts who is inside, by the callers themselves: the check that no product code can fool."""

    def __init__(self, limits: dict[str, int]) -> None:
        self._lock = threading.Lock()
        self._limits = limits
        self._inside = dict.fromkeys(limits, 0)
        self.passed = 0

    def enter(self, slots: dict[str, int]) -> None:
        with self._lock:
            for name, count in slots.items():
                self._inside[name] += count
                assert self._inside[name] <= self._limits[name], (name, self._inside)
            self.passed += 1

    def leave(self, slots: dict[str, int]) -> None:
        with self._lock:
            for name, count in slots.items():
                self._inside[name] -= count


def outcome_of(session: Session, ask: Callable[[], Any]) -> str:
    """What a client does with a request that may be queued, by polling."""
    answer = ask()
    status = str(answer.status)
    for nth in itertools.count(1):
        if status not in ("queued", "retry"):
            break
        time.sleep(0.002)
        status = str(ask().status if status == "retry" or nth % 50 == 0 else session.watch_one(answer.lease_id).status)
    return status


def work_until_told(db: Db, works: Sequence[Callable[[Session, random.Random], object]], seconds: float = 4) -> None:
    """All of them again and again, side by side; each has to get somewhere."""
    until = time.monotonic() + seconds

    def again(number: int, work: Callable[[Session, random.Random], object]) -> Callable[[Session], int]:
        def rounds(session: Session) -> int:
            rng, done = random.Random(number), 0
            while time.monotonic() < until:
                work(session, rng)
                done += 1
            return done

        return rounds

    assert all(db.together([again(number, work) for number, work in enumerate(works)]))
    assert db.main.holders() == []
    assert db.main.waiters() == []
    db.consistent()


def test_several_limits_in_any_order_never_deadlock_and_never_let_too_many_in(db: Db, s: Session) -> None:
    limits = {"one": 2, "two": 3, "three": 1, "four": 5}
    for name, limit in limits.items():
        s.create(name, limit)
    tally = Tally(limits)

    def caller(session: Session, rng: random.Random) -> None:
        names = rng.sample(sorted(limits), rng.randint(1, 4))
        slots = {name: rng.randint(1, limits[name]) for name in names}
        lease_id = uuid4()
        request = {"names": names, "slots": [*slots.values()], "timeout_seconds": None, "lease_id": lease_id}
        assert outcome_of(session, lambda: session.acquire(**request)) == "granted"
        tally.enter(slots)
        tally.leave(slots)
        if rng.random() < 0.5:
            assert session.release(lease_id)
        else:
            assert session.value("select pglimits._release_batch(%s::uuid[], true, 20)", [lease_id]) == []

    work_until_told(db, [caller] * THREADS)


def test_lines_give_ups_renewals_and_changes_of_the_limit_never_let_too_many_in(db: Db, s: Session) -> None:
    s.create("database", 2)
    tally = Tally({"database": 4})

    def caller(session: Session, rng: random.Random) -> None:
        lease_id, slots = uuid4(), rng.randint(1, 2)
        request = {
            "slots": slots, "timeout_seconds": None if rng.random() < 0.7 else 0, "priority": rng.randint(0, 1),
            "lease_id": lease_id,
        }  # fmt: skip
        if rng.random() < 0.2:  # gives up, perhaps in the moment of its grant
            session.acquire("database", **request)
            session.release(lease_id)
        elif outcome_of(session, lambda: session.acquire("database", **request)) == "granted":
            tally.enter({"database": slots})
            if rng.random() < 0.3:
                assert session.renew(lease_id)
            tally.leave({"database": slots})
            assert session.release(lease_id)

    def administrator(session: Session, rng: random.Random) -> None:
        session.update("database", limit=rng.randint(3, 4))
        session.sweep(0)
        session.limit("database")

    work_until_told(db, [*[caller] * (THREADS - 1), administrator])


def test_lines_of_rates_over_several_limits_give_ups_and_changes_never_deadlock(db: Db, s: Session) -> None:
    names = ["everyone", *"abcd"]
    for name in names:
        s.create(name, 2, 50)

    def caller(session: Session, rng: random.Random) -> None:
        mine = [uuid4() for _ in range(rng.randint(1, 4))]
        some = rng.sample(names, rng.choice([1, 2, 2, 3]))
        for lease_id in mine:
            session.rate_limit(some, timeout_seconds=None, lease_id=lease_id, channel=f"pglimits_{session.pid}")
        session.beat(f"pglimits_{session.pid}")
        session.watch(*mine)
        rng.shuffle(mine)
        session.all("select * from pglimits.release_all(%s::uuid[])", mine[:2])
        session.value("select pglimits._release_batch(%s::uuid[], true, 20)", mine[2:])

    def administrator(session: Session, rng: random.Random) -> None:
        name = rng.choice(names)
        session.update(name, slot_decay_per_second=rng.choice([10, 50, 200]), limit=rng.choice([2, 3]))
        session.adjust(name, rng.choice([-2, 1]))

    work_until_told(db, [*[caller] * 5, administrator])


def test_leases_that_settle_under_changes_and_deletions_never_deadlock_and_lose_no_level(db: Db, s: Session) -> None:
    lasting = {"one": 1400, "two": 1150, "three": 1090}
    for name, limit in lasting.items():
        s.create(name, limit, 1e-9)
        s.adjust(name, 1000)
    s.create("gone", 100, 1000)

    def caller(session: Session, rng: random.Random) -> None:
        names = rng.sample([*lasting, "gone"], rng.randint(2, 4))
        request = {"slots": [rng.randint(1, 90) for _ in names], "timeout_seconds": None, "clamp": True}
        lease_id = uuid4()
        assert outcome_of(session, lambda: session.acquire(names, lease_id=lease_id, **request)) == "granted"
        named = [name for name in names if name in lasting]
        used: list[int] = []
        for _ in range(2):
            rng.shuffle(named)
            used = [rng.choice([0, 20, 300]) for _ in named]
            assert session.value("select pglimits.settle_all(%s::uuid, %s::text[], %s::int[])", lease_id, named, used)
        assert session.release(lease_id)
        for name, slots in zip(named, used, strict=True):
            assert session.adjust(name, -slots) >= 999.999

    def administrator(session: Session, rng: random.Random) -> None:
        name = rng.choice([*lasting])
        session.update(name, limit=lasting[name] + rng.randint(0, 5), max_waiters=rng.choice([50, 60]))
        session.update("gone", new_name="renamed")
        session.delete("renamed")
        session.create("gone", rng.randint(50, 100), 1000)

    work_until_told(db, [*[caller] * (THREADS - 1), administrator], seconds=2)
    assert [round(s.limit(name).level, 3) for name in lasting] == [1000] * 3


# Rings of locks that there must not be. Each is set up step by step, no luck needed.


def test_changes_of_a_limit_and_first_uses_of_its_keys_do_not_deadlock(db: Db, s: Session) -> None:
    s.create("database", 1000)

    def caller(session: Session, rng: random.Random) -> None:
        answer = session.acquire(
            ["database"] * 3, keys=[f"a{rng.random()}", "m", f"z{rng.random()}"], timeout_seconds=60
        )
        assert answer.status == "granted"
        assert session.release(answer.lease_id)

    def changer(session: Session, rng: random.Random) -> None:
        session.update("database", limit=rng.randint(1000, 1001))

    def sweeper(session: Session, rng: random.Random) -> None:
        session.sweep(0)

    work_until_told(db, [caller, caller, caller, changer, changer, sweeper])


@pytest.mark.parametrize("change", ["update", "delete"])
def test_a_sweep_under_a_request_for_several_keys_and_a_change_of_the_limit_do_not_deadlock(
    db: Db, s: Session, change: str
) -> None:
    s.create("database", 2)
    s.serves("database", 1, key="busy")
    assert s.release(s.acquire("database", key="idle").lease_id)
    # A sweep, by hand: it removes the key when the request has looked, and is over before the change begins.
    sweeper = db.session()
    sweeper.run("begin")
    sweeper.run("select from pglimits.configs for update")
    for table in ("states", "known_keys"):
        sweeper.run(f"delete from pglimits.{table} where key = 'idle'")
    request, _ = db.start_blocked(
        lambda session: session.acquire(["database", "database"], keys=["busy", "idle"], timeout_seconds=60)
    )
    changer, _ = db.start_blocked(
        lambda session: session.update("database", limit=1) if change == "update" else session.delete("database")
    )
    sweeper.run("commit")
    assert request.result(timeout=60).status == "granted"
    changer.result(timeout=60)
    if change == "update":
        assert s.limit("database").held == 3
        assert s.acquire("database", key="idle").status == "refused"
    else:
        assert s.value("select count(*) from pglimits.states") == 0


def meet(db: Db, held: tuple[str, str], *works: Callable[[Session], object]) -> None:
    """They come one after the other, while somebody holds the state of a (limit, key); none of them may fail then."""
    holder = db.session()
    holder.run("begin")
    lock_state(holder, *held)
    started = [db.start_blocked(work)[0] for work in works[:-1]]
    last, session = db.start(works[-1])
    db.wait_until(lambda: last.done() or db.blocked(session.pid))
    holder.run("rollback")
    assert [each for each in map(outcome, [*started, last]) if isinstance(each, psycopg.Error)] == []
    db.consistent()


@pytest.mark.parametrize("how", ["sweep", "watch"])
def test_who_looks_after_several_limits_and_a_deletion_do_not_deadlock(
    db: Db, clock: Clock, s: Session, how: str
) -> None:
    s.create("a", 1)
    s.create("b", 1)
    s.serves(["a", "b"], 1, lease_duration=1)
    waiters = [s.queue("a"), s.queue("b")]
    clock.advance(2)
    meet(
        db,
        ("b", ""),
        lambda session: session.delete("b"),
        lambda session: session.sweep() if how == "sweep" else session.watch(*waiters),
    )


def test_a_reset_a_request_and_a_deletion_do_not_deadlock(db: Db, s: Session) -> None:
    s.create("a", 2)
    s.create("b", 2)
    s.serves(["a", "b"], 1, keys=["1", ""])
    s.serves("a", 1, key="2")
    meet(
        db,
        ("a", "2"),
        lambda session: session.acquire(["a", "b"], keys=["2", ""], timeout_seconds=60),
        lambda session: session.reset("a"),
        lambda session: session.delete("b"),
    )


def test_a_release_of_leases_and_of_a_place_in_line_and_a_request_do_not_deadlock(db: Db, s: Session) -> None:
    for name in ("a", "b", "c"):
        s.create(name, 1)
    s.serves("a", 1)
    (lease,) = s.serves(["b", "c"], 1)
    waiter = s.queue("a")
    meet(
        db,
        ("c", ""),
        lambda session: session.all("select * from pglimits.release_all(%s::uuid[])", [lease.lease_id, waiter]),
        lambda session: session.acquire(["a", "b"], timeout_seconds=60),
    )


def test_a_release_of_somebody_who_goes_to_stand_in_another_line_and_a_request_do_not_deadlock(
    db: Db, s: Session
) -> None:
    for name in ("a", "b", "c"):
        s.create(name, 1)
    (first,), (other,) = s.serves("b", 1), s.serves("c", 1)
    waiter = s.queue(["a", "b"])
    s.serves("a", 1)
    gate, mover = db.session(), db.session()
    gate.run("begin")
    lock_state(gate, "c")
    with mover.transaction():
        mover.value("select pglimits._release_batch(%s::uuid[])", [first.lease_id])
        assert [row.name for row in mover.waiters()] == ["a"]
        both = [waiter, other.lease_id]
        release, one = db.start_blocked(lambda session: session.all("select * from pglimits.release_all(%s)", both))
        request, two = db.start_blocked(lambda session: session.acquire(["a", "b"], timeout_seconds=60))
    db.wait_until(lambda: request.done() or s.value("select %s = any (pg_blocking_pids(%s))", one.pid, two.pid))
    gate.run("commit")
    assert [row.released for row in release.result(timeout=60)] == [True, True]
    assert request.result(timeout=60).status == "queued"
    assert len(s.waiters()) == 1
    db.consistent()


@pytest.mark.parametrize("how", ["alone", "in a batch"])
def test_a_request_that_finds_a_lower_limit_activated_and_another_request_do_not_deadlock(
    db: Db, s: Session, how: str
) -> None:
    """What it has locked by then comes after that limit."""
    for name in ("a", "b", "c"):
        s.create(name, 5, active=name != "a")
    for name in ("b", "c"):
        s.release(s.serves(name, 1)[0].lease_id)
    gate = db.session()
    gate.run("begin")
    lock_state(gate, "c")
    if how == "alone":
        gate.update("c", active=False)
        request, _ = db.start_blocked(lambda session: session.acquire(["a", "b", "c"], timeout_seconds=60))
    else:
        ids = [uuid4(), uuid4()]
        request, _ = db.start_blocked(
            lambda session: session.all(
                "select * from pglimits._acquire_batch('{a,b,c}', '{1}', '{\"\"}', false, 60, 300, 0, %s::uuid[],"
                " '[null,null]', false, false, null, patience => 60)", ids,
            )
        )  # fmt: skip
    s.update("a", active=True)
    other, _ = db.start_blocked(lambda session: session.acquire(["a", "b"], timeout_seconds=60))
    gate.run("commit")
    found = outcome(request)
    if how == "alone":
        assert not isinstance(found, psycopg.Error), found
        assert found.fences[0] is not None
    else:
        assert isinstance(found, psycopg.errors.LockNotAvailable), "and is sent again"
    assert other.result(timeout=60).status == "granted"
    db.consistent()


def test_who_looks_after_a_limit_that_is_gone_locks_the_others_all_the_same(db: Db, s: Session, clock: Clock) -> None:
    s.create("a", 1)
    s.create("b", 1)
    (held,) = s.serves("b", 1, lease_duration=1)
    waiter = s.queue(["a", "b"])
    s.renew(held.lease_id, 300)
    clock.advance(2)
    s.queue("b", priority=1)
    s.delete("a")
    gate = db.session()
    with gate.transaction():
        gate.release(held.lease_id)
        watch, _ = db.start_blocked(lambda session: session.watch_one(waiter))
    watch.result(timeout=60)
    db.consistent()


def test_watch_and_release_do_not_deadlock(db: Db, s: Session) -> None:
    s.create("first", 1)
    s.create("second", 1)
    holder = s.acquire("first")
    handed_over = s.queue("first")
    s.release(holder.lease_id)  # handed_over has a lease now that it has not claimed
    held = s.acquire("second", lease_duration=1)
    waiting = s.queue("second")
    db.wait_until(lambda: s.value("select next_look <= clock_timestamp() from pglimits.states where waiting > 0"))
    gate = db.session()
    gate.run("begin")
    lock_state(gate, "second")
    watch, _ = db.start_blocked(lambda session: session.watch(handed_over, waiting))
    release, _ = db.start_blocked(
        lambda session: session.all(
            "select * from pglimits.release_all(%s::uuid[])", [str(handed_over), str(held.lease_id)]
        )
    )
    gate.run("commit")
    for future in (watch, release):
        assert not isinstance(outcome(future), psycopg.Error), outcome(future)
    db.consistent()


@pytest.mark.parametrize("analyzed", [False, True])
def test_renew_and_release_of_the_same_leases_do_not_deadlock(db: Db, s: Session, analyzed: bool) -> None:
    s.create("database", 9)
    low, high = UUID(int=1), UUID(int=2)
    s.acquire("database", lease_id=high)  # first in the table, last by id
    s.acquire("database", lease_id=low)
    if analyzed:
        s.run("analyze pglimits.leases")
    gate = db.session()
    gate.run("begin")
    gate.run("select from pglimits.leases where lease_id = %s for update", low)
    both = [str(low), str(high)]
    renew, _ = db.start_blocked(lambda session: session.all("select * from pglimits.renew_all(%s::uuid[])", both))
    release, _ = db.start_blocked(lambda session: session.all("select * from pglimits.release_all(%s::uuid[])", both))
    gate.run("commit")
    for future in (renew, release):
        assert not isinstance(outcome(future), psycopg.Error), outcome(future)
    assert s.limit("database").held == 0
    db.consistent()


def test_renew_release_and_acquire_of_the_same_leases_do_not_deadlock(db: Db, s: Session) -> None:
    s.create("one", 100)
    s.create("two", 100)
    ids = [uuid4() for _ in range(20)]

    def holder(session: Session, rng: random.Random) -> None:
        for lease_id in ids:
            session.acquire(["one", "two"], lease_id=lease_id, timeout_seconds=60)
        session.all("select * from pglimits.release_all(%s::uuid[])", ids)

    def renewer(session: Session, rng: random.Random) -> None:
        session.all("select * from pglimits.renew_all(%s::uuid[])", ids)
        session.watch(*ids[:10])

    work_until_told(db, [holder, renewer, renewer, renewer])


# Names.


def test_a_name_that_is_given_twice_at_once_is_taken_for_the_second(db: Db, s: Session) -> None:
    s.create("a", 1)
    creating = db.session()
    creating.run("begin")
    creating.create("b", 1)
    renamed, _ = db.start_blocked(lambda session: session.update("a", new_name="b"))
    creating.run("commit")
    with pytest.raises(psycopg.Error) as caught:
        renamed.result(timeout=20)
    assert caught.value.sqlstate == "PL003"


# Fences.


def test_a_limit_created_while_its_namesake_is_deleted_continues_the_fences(db: Db, s: Session) -> None:
    s.create("database", 10)
    last = s.serves("database", 5)[-1].fence
    other = db.session()
    other.run("begin")
    other.delete("database")
    create, _ = db.start_blocked(lambda session: session.create("database", 10))
    other.run("commit")
    create.result(timeout=20)
    assert s.acquire("database").fence > last


def test_fences_grow_with_every_grant_under_contention(db: Db, s: Session) -> None:
    s.create("database", 2)

    def caller(session: Session) -> list[int]:
        fences = []
        for _ in range(60):
            lease = session.acquire("database")
            if lease.status == "granted":
                fences.append(int(lease.fence))
                session.release(lease.lease_id)
        return fences

    every = db.together([caller] * 6)
    for fences in every:
        assert fences == sorted(fences)
    everyone = [fence for fences in every for fence in fences]
    assert len(everyone) == len(set(everyone)) > 0


def test_a_queue_that_is_bounded_while_a_call_waits_for_its_lock_is_bounded_for_that_call_too(
    db: Db, s: Session
) -> None:
    s.create("api", 1, 0.001)
    s.rate_limit("api")
    owner = db.session()
    owner.run("begin")
    owner.run("select pglimits.update_limit('api', max_waiters => 0)")
    call, _ = db.start_blocked(
        lambda session: session.one("select * from pglimits.rate_limit('api', timeout_seconds => null)")
    )
    owner.run("commit")
    with fails("PL006", "api"):
        call.result(30)


# Leases and limits that end at the same time.


def test_a_release_of_several_limits_and_the_deletion_of_one_do_not_wait_for_each_other(db: Db, s: Session) -> None:
    s.create("a", 1)
    s.create("b", 2)
    lease_id = s.acquire(["a", "b"]).lease_id
    holder = db.session()
    holder.run("begin")
    holder.acquire("b")
    deleting, _ = db.start_blocked(lambda session: session.delete("b"))
    releasing, _ = db.start_blocked(lambda session: session.release(lease_id))
    holder.run("commit")
    deleting.result(timeout=20)
    assert releasing.result(timeout=20) is True
    assert s.holders() == []
    db.consistent()


@pytest.mark.parametrize("end", ["reset", "delete"])
def test_a_renewal_of_many_and_the_end_of_all_do_not_wait_for_each_other(db: Db, s: Session, end: str) -> None:
    s.create("many", 10)
    first, second = sorted(uuid4() for _ in range(2))
    s.acquire("many", lease_id=first, lease_duration=900)
    s.acquire("many", lease_id=second, lease_duration=100)
    renewing = db.session()
    renewing.run("begin")
    assert renewing.renew(first)
    both, _ = db.start_blocked(
        lambda session: session.all("select renewed from pglimits.renew_all(%s::uuid[])", [first, second])
    )
    ending, _ = db.start_blocked(lambda session: getattr(session, end)("many"))
    renewing.run("commit")
    assert [row.renewed for row in both.result(timeout=20)] == [True, True]
    ending.result(timeout=20)
    assert s.holders() == []
    db.consistent()


@pytest.mark.parametrize("renewed", [True, False])
def test_asked_again_by_the_id_of_a_lease_that_ends_while_it_is_renewed_it_waits_for_that(
    db: Db, s: Session, clock: Clock, renewed: bool
) -> None:
    clock.freeze()
    s.create("db", 1)
    lease_id = uuid4()
    first = s.acquire("db", lease_id=lease_id, lease_duration=2)
    renewing = db.session()
    clock.advance(1.5)
    renewing.run("begin")
    assert renewing.renew(lease_id)
    clock.advance(1)
    again, _ = db.start_blocked(
        lambda session: session.acquire("db", lease_id=lease_id, lease_duration=2, timeout_seconds=60)
    )
    renewing.run("commit" if renewed else "rollback")
    second = again.result(timeout=20)
    assert second.status == "granted"
    assert (second.fence == first.fence) == renewed
    assert [held.lease_id for held in s.holders()] == [lease_id]
    db.consistent()
