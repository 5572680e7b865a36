"""What is counted of a limit: grants, releases, expiries, what was held for how long, and who waited how long."""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import pytest
from sqltest import FOREVER, Clock, Db, Session, changes_nothing

from pglimits import _exposition, _sql
from pglimits.server import _live


def counters(s: Session, name: str = "database") -> Any:
    return s.one("select * from pglimits.counters where name = %s", name)


def counted(s: Session, name: str = "database") -> tuple[int, ...]:
    """Grants, granted slots, releases, expired and force-released leases."""
    found = counters(s, name)
    return found.grants, found.granted_slots, found.releases, found.expired_leases, found.force_released_leases


def test_a_new_limit_has_counted_nothing(s: Session) -> None:
    s.create("database", 3)
    assert counted(s) == (0, 0, 0, 0, 0)
    found = counters(s)
    assert (found.held_slot_seconds, found.waited_seconds, found.leases, found.keys) == (0, 0, 0, 0)
    assert found.oldest_waiting_since is None


def test_grants_and_releases_are_counted_over_all_keys(s: Session) -> None:
    s.create("database", 5)
    one = s.acquire("database", slots=2, key="a").lease_id
    s.acquire("database", slots=3, key="b")
    assert s.release(one)
    assert not s.release(one)
    assert s.acquire("database", slots=4, key="b").status == "refused"
    assert counted(s) == (2, 5, 1, 0, 0)
    assert (counters(s).leases, counters(s).keys) == (1, 2)


def test_what_is_refused_counts_nothing(s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    with changes_nothing(s):
        assert s.acquire("database").status == "refused"
    assert counted(s) == (1, 1, 0, 0, 0)


def test_slot_seconds_are_exact_up_to_now(clock: Clock, s: Session) -> None:
    s.create("database", 10)
    clock.freeze()
    first = s.acquire("database", slots=3).lease_id
    clock.advance(10)
    s.acquire("database", slots=2)
    clock.advance(5)
    assert counters(s).held_slot_seconds == 3 * 15 + 2 * 5
    s.release(first)
    clock.advance(7)
    assert counters(s).held_slot_seconds == 3 * 15 + 2 * 12


def test_a_lease_counts_as_held_to_its_end_and_not_until_somebody_takes_it_out(clock: Clock, s: Session) -> None:
    s.create("database", 10)
    clock.freeze()
    s.acquire("database", slots=4, lease_duration=20)
    clock.advance(100)
    assert counters(s).held_slot_seconds == 80
    assert (counters(s).leases, counters(s).expired_leases) == (0, 0)
    s.acquire("database", lease_duration=20)
    assert counted(s) == (2, 5, 0, 1, 0)
    clock.advance(5)
    assert counters(s).held_slot_seconds == 85


def test_a_lease_that_is_released_after_its_end_has_expired(clock: Clock, s: Session) -> None:
    s.create("database", 10)
    clock.freeze()
    leases = [s.acquire("database", slots=2, lease_duration=20).lease_id for _ in range(3)]
    clock.advance(30)
    assert not s.release(leases[0])
    s.run("select pglimits.release_all(%s)", leases)
    assert counted(s) == (3, 6, 0, 3, 0)
    assert counters(s).held_slot_seconds == 3 * 40


def test_a_renewed_lease_counts_until_its_new_end(clock: Clock, s: Session) -> None:
    s.create("database", 10)
    clock.freeze()
    lease = s.acquire("database", lease_duration=20).lease_id
    clock.advance(15)
    assert s.renew(lease)
    clock.advance(100)
    s.sweep()
    assert counters(s).held_slot_seconds == 35
    assert counters(s).expired_leases == 1


def test_who_waited_is_counted_when_it_is_granted(clock: Clock, s: Session) -> None:
    s.create("database", 1)
    clock.freeze()
    holder = s.acquire("database").lease_id
    waiter = s.queue("database")
    clock.advance(3)
    assert counters(s).waited_seconds == 0
    assert counters(s).oldest_waiting_since is not None
    s.release(holder)
    assert counters(s).waited_seconds == 3
    assert s.watch_one(waiter).status == "granted"
    assert counted(s) == (2, 2, 1, 0, 0)


def test_who_gives_up_has_not_waited_for_anything(clock: Clock, s: Session) -> None:
    s.create("database", 1)
    clock.freeze()
    s.acquire("database")
    waiter = s.queue("database")
    clock.advance(3)
    assert s.release(waiter)
    assert counted(s) == (1, 1, 0, 0, 0)
    assert counters(s).waited_seconds == 0


def test_rate_limits_count_their_grants_at_once_and_after_a_wait(clock: Clock, s: Session) -> None:
    s.create("api", 2, 10)
    clock.freeze()
    for _ in range(2):
        assert s.rate_limit("api").status == "granted"
    late = s.rate_limit("api", timeout_seconds=FOREVER)
    assert late.status == "queued"
    clock.advance(late.retry_after)
    assert s.rate_limit("api", timeout_seconds=FOREVER, lease_id=late.lease_id).status == "granted"
    assert counted(s, "api") == (3, 3, 0, 0, 0)
    assert counters(s, "api").waited_seconds == pytest.approx(0.1)


def test_a_request_over_several_limits_counts_on_each(s: Session) -> None:
    s.create("database", 3)
    s.create("api", 5)
    lease = s.acquire(["database", "api"], slots=[1, 4]).lease_id
    assert (counted(s), counted(s, "api")) == ((1, 1, 0, 0, 0), (1, 4, 0, 0, 0))
    s.release(lease)
    assert (counted(s), counted(s, "api")) == ((1, 1, 1, 0, 0), (1, 4, 1, 0, 0))


def test_batches_count_each_of_their_requests(s: Session) -> None:
    s.create("database", 10)
    ids = [str(UUID(int=n)) for n in range(1, 6)]
    batch = (
        "select * from pglimits._acquire_batch('{database}', '{2}', '{\"\"}', false, 0, 60, 0, %s::uuid[],"
        " '[1, 2, 3, 4, 5]', false, false, null)"
    )
    assert s.one(batch, ids).status == "granted"
    assert counted(s) == (5, 10, 0, 0, 0)
    s.run("select pglimits._release_batch(%s::uuid[])", ids[:3])
    assert counted(s) == (5, 10, 3, 0, 0)


def test_giving_back_a_turn_of_a_rate_limit_is_no_release_of_a_lease(clock: Clock, s: Session) -> None:
    s.create("api", 1, 1)
    clock.freeze()
    s.rate_limit("api")
    turns = [s.rate_limit("api", timeout_seconds=FOREVER).lease_id for _ in range(2)]
    clock.advance(1)
    assert s.watch_one(turns[0]).status == "granted"
    s.release(turns[0])
    s.run("select pglimits._release_batch(%s::uuid[])", turns)
    assert counted(s, "api") == (2, 2, 0, 0, 0)


def test_an_operator_who_ends_leases_is_counted_apart(s: Session) -> None:
    s.create("database", 5)
    leases = [answer.lease_id for answer in s.serves("database", 4)]
    assert s.value("select pglimits.force_release(%s)", leases[0]) is True
    assert s.value("select pglimits.force_release(%s)", leases[0]) is False
    assert counted(s) == (4, 4, 0, 0, 1)
    assert s.reset("database") == 3
    assert counted(s) == (4, 4, 0, 0, 4)


def test_what_was_counted_stays_when_keys_are_swept_away(clock: Clock, s: Session) -> None:
    s.create("database", 1)
    clock.freeze()
    for key in ("a", "b"):
        holder = s.acquire("database", key=key).lease_id
        waiter = s.queue("database", key=key)
        clock.advance(2)
        s.release(holder)
        s.release(waiter)
    clock.advance(4000)
    before = counters(s)
    assert s.sweep().keys == 2
    after = counters(s)
    assert after._replace(keys=2) == before
    assert (after.keys, after.grants, after.waited_seconds) == (0, 4, 4)
    s.acquire("database", key="a")
    assert counters(s).grants == 5


def test_inactive_limits_count_nothing(s: Session) -> None:
    s.create("database", 1, active=False)
    assert s.acquire("database").status == "unlimited"
    assert counted(s) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_the_counters_are_what_an_observer_adds_up(clock: Clock, s: Session, seed: int) -> None:
    chance = random.Random(seed)
    s.create("database", 6)
    clock.freeze()
    now = 0.0
    granted: dict[UUID, list[float]] = {}  # slots, since, until (its end, or when it was released)
    ended = {"released": 0, "forced": 0}
    arrived: dict[UUID, tuple[int, float]] = {}
    waited = 0.0

    def ask_again() -> None:
        """Whoever waits is alive, and hears at once that it was granted."""
        nonlocal waited
        for lease, (slots, arrival) in list(arrived.items()):
            if (
                s.acquire("database", slots=slots, lease_duration=30, timeout_seconds=FOREVER, lease_id=lease).status
                == "granted"
            ):
                del arrived[lease]
                granted[lease] = [slots, now, now + 30]
                waited += now - arrival

    for _ in range(150):
        step = chance.random()
        live = [lease for lease, (_, _, until) in granted.items() if until > now]
        if step < 0.35:
            slots = chance.randint(1, 3)
            answer = s.acquire("database", slots=slots, lease_duration=30, timeout_seconds=FOREVER)
            if answer.status == "granted":
                granted[answer.lease_id] = [slots, now, now + 30]
            else:
                arrived[answer.lease_id] = slots, now
        elif step < 0.55 and live:
            lease = chance.choice(live)
            how = chance.choice(("release", "release", "force_release"))
            assert s.value(f"select pglimits.{how}(%s)", lease)
            granted[lease][2] = now
            ended["released" if how == "release" else "forced"] += 1
        elif step < 0.65 and live:
            lease = chance.choice(live)
            assert s.renew(lease)
            granted[lease][2] = now + 30
        elif step < 0.7 and arrived:
            lease = chance.choice(list(arrived))
            assert s.release(lease)
            del arrived[lease]
        elif step < 0.8:
            s.sweep()
        else:
            for _ in range(chance.randint(1, 4)):
                clock.advance(3)
                now += 3
                ask_again()
        ask_again()

    for lease in reversed(arrived):  # the last one first: nobody behind it is let through
        assert s.release(lease)
    clock.advance(100)
    now += 100
    s.sweep()
    found = counters(s)
    assert (found.grants, found.granted_slots) == (len(granted), sum(slots for slots, _, _ in granted.values()))
    assert (found.releases, found.force_released_leases) == (ended["released"], ended["forced"])
    assert found.expired_leases == len(granted) - ended["released"] - ended["forced"]
    assert found.held_slot_seconds == pytest.approx(
        sum(slots * (min(until, now) - since) for slots, since, until in granted.values())
    )
    assert found.waited_seconds == pytest.approx(waited)


def test_counters_are_exact_after_many_sessions_at_once(db: Db, s: Session) -> None:
    s.create("database", 3)

    def work(session: Session) -> int:
        done = 0
        for _ in range(40):
            answer = session.acquire("database", timeout_seconds=0)
            if answer.status == "granted":
                done += 1
                assert session.release(answer.lease_id)
        return done

    done = sum(db.together([work] * 6))
    assert counted(s) == (done, done, done, 0, 0)


def steps(plan: dict[str, Any]) -> list[float]:
    """How many rows each step of a plan has gone through."""
    rows = sum(value for name, value in plan.items() if name == "Actual Rows" or name.startswith("Rows Removed"))
    return [rows * plan["Actual Loops"], *(each for inner in plan.get("Plans", ()) for each in steps(inner))]


def test_all_limits_are_read_once_whatever_the_planner_knows_of_them(db: Db, s: Session) -> None:
    many = 400
    for table in ("configs", "states", "leases"):
        s.run(f"alter table pglimits.{table} set (autovacuum_enabled = off)")
    for _ in "ab":  # it was told of these tables when they were empty
        s.run("analyze pglimits.configs, pglimits.states, pglimits.leases")
        s.run("select pglimits.delete_limit(name) from pglimits.limits")
        s.run("analyze pglimits.configs, pglimits.states, pglimits.leases")
        s.run("select pglimits.create_limit('limit-' || n, 5) from generate_series(1, %s) n", many)
        db.session().run("select count(*) from pglimits.limits l, pglimits.acquire(l.name)")
    usage = _sql.USAGE["busiest"].sql.decode()
    for number, value in ((4, "0"), (3, "50"), (2, "null"), (1, "null")):
        usage = usage.replace(f"${number}", value)
    every = [f"select * from pglimits.{view}" for view in ("limits", "counters", "keys", "holders")]
    for query in (*every, _live.LIMITS, _exposition.QUERY, usage):
        plan = s.value(f"explain (analyze, timing off, format json) {query}")[0]["Plan"]
        assert many <= max(steps(plan)) <= 5 * many, query
