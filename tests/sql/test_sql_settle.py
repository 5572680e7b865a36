"""A lease tells what it has used of rate limits; and requests that are clamped to what a limit has."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails, member

BOTH = ["tokens", "requests"]
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def tokens(clock: Clock, db: Db, s: Session) -> Iterator[Session]:
    """At a clock that stands still: 1,000 tokens that come back at 10 a second, 20 requests at 1, 2 calls at once."""
    clock.freeze(START)
    s.create("tokens", 1000, 10)
    s.create("requests", 20, 1)
    s.create("calls", 2)
    yield s
    db.consistent()


def level(s: Session, name: str = "tokens", key: str = "") -> float:
    return float(s.value("select level from pglimits.keys where name = %s and key = %s", name, key))


def settle_all(s: Session, lease_id: UUID, names: Any, slots: Any, keys: Any = ("",)) -> Any:
    return s.value(
        "select pglimits.settle_all(%s::uuid, %s::text[], %s::int[], %s::text[])", lease_id, names, slots, list(keys)
    )


# Settling.


def test_the_level_gets_what_was_used_in_place_of_the_estimate_up_or_down_and_the_last_number_counts(
    tokens: Session,
) -> None:
    lease = tokens.acquire(["calls", "requests", "tokens"], slots=[1, 1, 500]).lease_id
    tokens.acquire("tokens", slots=100)
    for used in (1312, 200, 200, 0, 700):
        assert tokens.settle(lease, "tokens", used) is True
        assert level(tokens) == 100 + used
        assert tokens.limit("tokens").held == 600, "what is held stays the estimate"
    assert (level(tokens, "requests"), tokens.limit("calls").held) == (1, 1)
    assert tokens.release(lease)
    assert (level(tokens), tokens.limit("tokens").held) == (800, 100)


def test_what_has_decayed_meanwhile_is_not_given_back_below_zero(clock: Clock, tokens: Session) -> None:
    lease = tokens.acquire("tokens", slots=300).lease_id
    clock.advance(29)
    assert level(tokens) == 10
    assert tokens.settle(lease, "tokens", 100)
    assert level(tokens) == 0
    assert tokens.settle(lease, "tokens", 250)
    assert level(tokens) == 150


def test_the_same_number_again_writes_nothing(db: Db, tokens: Session) -> None:
    lease = tokens.acquire(BOTH, slots=[500, 1]).lease_id
    assert tokens.settle(lease, "tokens", 400)
    with changes_nothing(db.session()):
        assert tokens.settle(lease, "tokens", 400) is True
        assert tokens.settle(lease, "requests", 1) is True


def test_above_the_limit_those_in_line_wait_until_it_has_decayed_and_below_they_are_told(
    clock: Clock, heard: Callable[[], list[str]], tokens: Session
) -> None:
    tokens.update("tokens", slot_decay_per_second=200)
    lease = tokens.acquire("tokens", slots=600).lease_id
    waiter = tokens.queue("tokens", slots=500, channel="pglimits_t")
    assert tokens.settle(lease, "tokens", 1700)
    tokens.release(lease)
    clock.advance(5.8)
    assert tokens.watch_one(waiter).status == "queued"
    clock.advance(0.2)
    assert tokens.watch_one(waiter).status == "granted"

    assert level(tokens) == 1000
    tokens.release(waiter)
    lease = tokens.queue("tokens", slots=300, channel="pglimits_t")
    clock.advance(1.5)
    assert tokens.watch_one(lease).status == "granted", "through the line"
    waiter = tokens.queue("tokens", slots=200, channel="pglimits_t")
    heard()
    assert tokens.settle(lease, "tokens", 100)
    assert [message.split()[0] for message in heard()] == [str(waiter)], "it is granted by who settles"
    assert tokens.watch_one(waiter).status == "granted"
    assert level(tokens) == 1000


def test_several_limits_are_settled_in_one_call_each_with_its_key(tokens: Session) -> None:
    names, keys = ["tokens", "requests", "tokens"], ["a", "", "b"]
    lease = tokens.acquire(names, slots=[500, 1, 50], keys=keys).lease_id
    assert settle_all(tokens, lease, names, [400, 3, 60], keys)
    assert (level(tokens, key="a"), level(tokens, "requests"), level(tokens, key="b")) == (400, 3, 60)
    assert settle_all(tokens, lease, ["tokens", "tokens"], [7], ["a", "a"]), "named twice they add up, as when taken"
    assert (level(tokens, key="a"), level(tokens, key="b")) == (14, 60)
    lease = tokens.acquire(["tokens", "calls"]).lease_id
    with changes_nothing(tokens), fails("PL005", "calls"):
        settle_all(tokens, lease, ["tokens", "calls"], [9, 9])


ENDS: dict[str, Callable[[Session, Clock, UUID], Any]] = {
    "released": lambda s, clock, lease: s.release(lease),
    "expired": lambda s, clock, lease: clock.advance(60),
    "taken out": lambda s, clock, lease: (clock.advance(60), s.sweep()),
    "reset": lambda s, clock, lease: (s.reset("tokens"), s.reset("requests")),
    "deleted": lambda s, clock, lease: (s.delete("requests"), s.delete("tokens"), s.create("tokens", 9, 1)),
    "never there": lambda s, clock, lease: s.release(lease),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_lease_that_has_ended_is_not_settled_any_more_and_what_it_took_stands(
    clock: Clock, tokens: Session, how: str
) -> None:
    lease = tokens.acquire(BOTH, slots=[500, 2], lease_duration=60).lease_id
    ENDS[how](tokens, clock, lease)
    with changes_nothing(tokens):
        for used in (0, 2000):
            assert tokens.settle(lease if how != "never there" else uuid4(), "tokens", used) is False
            assert settle_all(tokens, lease, BOTH, [used]) is False


def test_when_a_holder_dies_its_estimate_stands_and_decays_and_its_slots_come_back_at_its_end(
    clock: Clock, tokens: Session
) -> None:
    tokens.acquire("tokens", slots=1000, lease_duration=30)
    clock.advance(20)
    assert tokens.acquire("tokens", slots=200).status == "refused", "the level has room, and what is held has not"
    clock.advance(10)
    assert level(tokens) == 700
    assert tokens.acquire("tokens", slots=300).status == "granted"


def test_a_lease_that_lives_on_elsewhere_settles_what_is_left_of_it(tokens: Session) -> None:
    lease = tokens.acquire(BOTH, slots=[500, 2]).lease_id
    tokens.reset("tokens")
    assert settle_all(tokens, lease, BOTH, [700, 3]) is True
    assert (level(tokens), level(tokens, "requests")) == (0, 3)
    tokens.delete("tokens")
    assert tokens.settle(lease, "tokens", 1) is True
    assert tokens.notices[-1] == "not settled, because there is no such limit: 'tokens'"


def test_what_is_not_enforced_is_not_settled(clock: Clock, tokens: Session) -> None:
    tokens.create("off", 5, 1, active=False)
    lease = tokens.acquire(["tokens", "off", "missing"], slots=[500, 9, 9]).lease_id
    assert settle_all(tokens, lease, ["tokens", "off", "missing"], [400, 5, 5]) is True
    assert tokens.notices[-1] == "not settled, because there is no such limit: 'missing'"
    clock.advance(1)
    tokens.update("off", active=True)
    assert tokens.settle(lease, "off", 5) is True, "it was not enforced when the lease was taken"
    assert (level(tokens), tokens.limit("off").level) == (390, 0)
    tokens.update("tokens", active=False)
    assert tokens.settle(lease, "tokens", 800) is True
    assert level(tokens) == 790, "it counts should the limit be activated again"


def test_another_key_than_those_of_the_lease_is_an_error_and_a_limit_that_it_is_not_on_a_warning(
    tokens: Session,
) -> None:
    lease = tokens.acquire(BOTH, slots=[500, 2], keys=["t", ""]).lease_id
    with changes_nothing(tokens):
        for names, keys in ((["requests", "tokens"], ["", "u"]), (["tokens"], [""])):
            with fails("PL001", "key", str(lease), names[-1]):
                settle_all(tokens, lease, names, [1], keys)
        with fails("PL001", "call settle_all"):
            tokens.settle(lease, "{tokens,requests}", 1)
    other = tokens.acquire("calls").lease_id
    with changes_nothing(tokens):
        assert settle_all(tokens, other, BOTH, [0]) is True
        assert tokens.notices == ["not settled, because the lease is not on it: 'requests', 'tokens'"]
        with fails("PL005", "calls"):
            tokens.settle(other, "calls", 1)


def test_a_limit_that_was_not_enforced_when_it_was_asked_for_has_nothing_to_settle_though_it_is_by_the_grant(
    tokens: Session,
) -> None:
    tokens.update("tokens", active=False)
    (call,) = tokens.serves("calls", 1, slots=2)
    waiter = tokens.queue(["calls", "requests", "tokens", "later"])
    tokens.update("tokens", active=True)
    tokens.create("later", 5, 1)
    tokens.release(call.lease_id)
    assert tokens.watch_one(waiter).status == "granted"
    assert settle_all(tokens, waiter, ["requests", "tokens", "later"], [3]) is True
    assert (level(tokens, "requests"), tokens.limit("tokens").level, tokens.limit("later").level) == (3, 0, 0)


def test_a_lease_corrects_no_more_than_it_took_itself(tokens: Session) -> None:
    """What it took of the limit while that was a concurrency limit is on no level; and what others took is theirs."""
    mine = tokens.acquire("calls", slots=2).lease_id
    tokens.update("calls", slot_decay_per_second=1, limit=10)
    tokens.acquire("calls", slots=5)
    assert tokens.settle(mine, "calls", 0) is True
    assert tokens.settle(mine, "calls", 10) is True
    assert level(tokens, "calls") == 5
    theirs = tokens.acquire("tokens", slots=400).lease_id
    mine = tokens.acquire("tokens", slots=100).lease_id
    for _ in range(3):
        tokens.settle(mine, "tokens", 0)
    assert level(tokens) == 400
    tokens.update("tokens", slot_decay_per_second=0)
    assert tokens.settle(theirs, "tokens", 10) is True, "there is no level just now"
    tokens.update("tokens", slot_decay_per_second=1)
    assert level(tokens) == 10, "and here it is again"
    tokens.settle(mine, "tokens", 2_147_483_647)
    assert tokens.acquire("tokens").status == "refused"
    tokens.reset("tokens")
    assert tokens.acquire("tokens", slots=1000).status == "granted", "an administrator ends that"


def test_what_was_kept_for_a_request_or_used_by_rate_limit_is_no_lease(tokens: Session) -> None:
    used = tokens.rate_limit("tokens", slots=900, lease_id=(lease := uuid4()))
    assert used.status == "granted"
    with changes_nothing(tokens):
        assert tokens.settle(lease, "tokens", 1) is False
    waiter = tokens.queue("tokens", slots=500)
    with changes_nothing(tokens):
        assert tokens.settle(waiter, "tokens", 1) is False


def test_a_user_may_settle_and_a_reader_may_not(db: Db, tokens: Session) -> None:
    user = member(db, "pglimits_user", "tester")
    lease = user.acquire("tokens", slots=100).lease_id
    assert user.settle(lease, "tokens", 30)
    user.connection.close()
    reader = member(db, "pglimits_reader", "tester")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        reader.settle(lease, "tokens", 0)
    reader.connection.close()
    tokens.run("drop role tester")
    assert level(tokens) == 30


def test_leases_of_a_batch_are_settled_each_by_itself(tokens: Session) -> None:
    ids = [uuid4() for _ in range(4)]
    (row,) = tokens.all(
        "select * from pglimits._acquire_batch('{tokens}', '{200}', '{\"\"}', false, 0, 300, 0, %s::uuid[],"
        " '[null,null,null,null]', false, false, null)", ids,
    )  # fmt: skip
    assert (row.status, row.last) == ("granted", 4)
    assert [tokens.settle(lease, "tokens", 50) for lease in ids[:2]] == [True, True]
    assert level(tokens) == 500


def test_many_settle_at_once_in_any_order_and_every_slot_is_counted(db: Db, tokens: Session) -> None:
    tokens.update("tokens", limit=100_000)
    tokens.update("requests", limit=100_000)

    def work(seed: int) -> Callable[[Session], int]:
        def run(session: Session) -> int:
            rng, total = random.Random(seed), 0
            for _ in range(12):
                names = rng.sample(BOTH, 2)
                lease = session.acquire(names, slots=[50, 50]).lease_id
                for _ in range(2):
                    used = rng.randint(0, 150)
                    assert settle_all(session, lease, rng.sample(BOTH, 2), [used]) is True
                total += used
                if rng.random() < 0.5:
                    session.release(lease)
            return total

        return run

    total = sum(db.together([work(seed) for seed in range(6)]))
    assert (level(tokens), level(tokens, "requests")) == (total, total)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_really_used_in_a_window_is_at_most_twice_the_limit_and_what_decays(
    clock: Clock, tokens: Session, seed: int
) -> None:
    """However long calls take, with estimates that are not too low: a provider counts when the answer is made."""
    rng, now = random.Random(seed), 0.0
    under_way: list[tuple[UUID, int]] = []
    answered: list[tuple[float, int]] = []
    for _ in range(150):
        estimate = rng.choice([50, 200, 400])
        answer = tokens.acquire("tokens", slots=estimate, lease_duration=3600)
        if answer.status == "granted":
            under_way.append((answer.lease_id, estimate))
        if under_way and (rng.random() < 0.4 or answer.status == "refused"):
            lease, estimate = under_way.pop(rng.randrange(len(under_way)))
            answered.append((now, rng.choice([estimate, rng.randint(0, estimate)])))
            assert tokens.settle(lease, "tokens", answered[-1][1])
            tokens.release(lease)
        seconds = rng.choice([0, 0, 1, 5, 20])
        now += seconds
        clock.advance(seconds)
    moments = [moment for moment, _ in answered]
    for since in moments:
        for until in moments:
            used = sum(slots for moment, slots in answered if since <= moment <= until)
            assert until < since or used <= 2 * 1000 + 10 * (until - since)
    assert sum(slots for _, slots in answered) > 1000 + 10 * now / 2, "and they are not kept from it"


@pytest.mark.parametrize(("so_far", "used_at_once"), [(900, 2000), (0, 2900)])
def test_who_settles_below_the_estimate_while_at_work_gives_that_up(
    clock: Clock, tokens: Session, so_far: int, used_at_once: int
) -> None:
    long_call = tokens.acquire("tokens", slots=1000).lease_id
    clock.advance(100)
    used = 1000  # counted when its answer is made, now
    tokens.release(long_call)
    stream = tokens.acquire("tokens", slots=900).lease_id
    used += 900  # counted at once
    assert tokens.settle(stream, "tokens", so_far)
    while (short := tokens.acquire("tokens", slots=100)).status == "granted":
        used += 100
        tokens.release(short.lease_id)
    assert tokens.settle(stream, "tokens", 900)
    assert used == used_at_once, "of 2 * 1000"


# Clamping.


def test_more_than_a_limit_has_is_an_error_unless_it_is_clamped(db: Db, tokens: Session) -> None:
    with changes_nothing(db.session()), fails("PL004", "tokens"):
        tokens.acquire("tokens", slots=5000, timeout_seconds=FOREVER)
    for names, slots in (("tokens", 5000), (BOTH, [1001, 21]), (["tokens"] * 2, [600])):
        lease = tokens.acquire(names, slots=slots, clamp=True).lease_id
        taken = {row.name: row.slots for row in tokens.all("select * from pglimits._taken(%s)", lease)}
        assert taken == {name: {"tokens": 1000, "requests": 20}[name] for name in taken}
        assert len(taken) == len(set([names] if isinstance(names, str) else names))
        assert tokens.settle(lease, "tokens", 5000)
        assert level(tokens) == 5000
        tokens.release(lease)
        tokens.reset("tokens")
        tokens.reset("requests")
    assert tokens.acquire("calls", slots=2_147_483_647, clamp=True).status == "granted"
    assert tokens.limit("calls").held == 2
    assert tokens.acquire("tokens", slots=1000, clamp=True).status == "granted"
    assert tokens.acquire("tokens", slots=1, clamp=True).status == "refused"


def test_a_clamped_request_that_is_repeated_is_the_same_and_another_is_not(tokens: Session) -> None:
    lease = uuid4()
    first = tokens.acquire("tokens", slots=5000, clamp=True, lease_id=lease)
    again = tokens.acquire("tokens", slots=5000, clamp=True, lease_id=lease)
    assert (again.status, again.fence) == ("granted", first.fence)
    with fails("PL001", "lease_id"):
        tokens.acquire("tokens", slots=5000, lease_id=lease)
    with fails("PL001", "lease_id"):
        tokens.acquire("tokens", slots=999, clamp=True, lease_id=lease)
    waiter = tokens.queue(BOTH, slots=[5000, 1], clamp=True)
    assert tokens.acquire(BOTH, slots=[5000, 1], clamp=True, lease_id=waiter, timeout_seconds=FOREVER).position == 1


@pytest.mark.parametrize("names", ["tokens", BOTH])
def test_who_waits_clamped_gets_what_the_limit_has_when_its_turn_comes(
    clock: Clock, heard: Callable[[], list[str]], tokens: Session, names: Any
) -> None:
    holder = tokens.acquire("tokens", slots=1).lease_id
    more = {"slots": 5000 if names == "tokens" else [5000, 1], "clamp": True, "timeout_seconds": FOREVER}
    waiter = tokens.queue(names, channel="pglimits_t", **more)
    behind = tokens.queue("tokens", slots=200)
    heard()
    clock.advance(1)
    tokens.update("tokens", limit=300)
    assert heard() == [], "it need not ask again"
    assert [(row.lease_id, row.slots) for row in tokens.waiters("tokens")] == [(waiter, 300), (behind, 200)]
    assert tokens.acquire(names, lease_id=waiter, **more).status == "queued"
    tokens.update("tokens", limit=700)
    tokens.release(holder)
    assert tokens.acquire(names, lease_id=waiter, **more).status == "granted"
    assert tokens.holders("tokens")[0].slots == 300, "grown, it keeps what it has waited for"


def test_who_waits_clamped_elsewhere_takes_what_the_limit_has_by_then_and_keeps_its_place(
    clock: Clock, heard: Callable[[], list[str]], tokens: Session
) -> None:
    (call,) = tokens.serves("calls", 1, slots=2)
    more = {"slots": [1, 5000], "clamp": True, "timeout_seconds": FOREVER}
    waiter = tokens.queue(["calls", "tokens"], channel="pglimits_t", **more)
    behind = tokens.queue("calls")
    holder = tokens.acquire("tokens", slots=10).lease_id
    clock.advance(1)
    tokens.update("tokens", limit=300)
    assert heard() == [], "it need not ask again"
    assert tokens.watch_one(waiter).status == "queued"
    tokens.value("select pglimits._release_batch(%s::uuid[])", [call.lease_id])
    assert [(row.lease_id, row.name, row.slots) for row in tokens.waiters()] == [(waiter, "tokens", 300)]
    assert [row.lease_id for row in tokens.holders("calls")] == [behind]
    tokens.release(holder)
    assert tokens.watch_one(waiter).status == "granted"
    assert [row.slots for row in tokens.holders() if row.lease_id == waiter] == [1, 300]


def test_a_limit_of_none_keeps_a_clamped_request_out_until_it_has_some(tokens: Session) -> None:
    tokens.update("tokens", limit=0)
    assert tokens.acquire("tokens", slots=5000, clamp=True).status == "refused"
    waiter = tokens.queue("tokens", slots=5000, clamp=True)
    tokens.update("tokens", limit=400)
    answer = tokens.acquire("tokens", slots=5000, clamp=True, lease_id=waiter, timeout_seconds=FOREVER)
    assert (answer.status, level(tokens)) == ("granted", 400)


def test_the_procedure_that_waits_clamps_too(tokens: Session) -> None:
    answer = tokens.one("call pglimits.acquire_wait('tokens', 5000, clamp => true)")
    assert answer.status == "granted"
    assert [row.slots for row in tokens.holders()] == [1000]


def test_requests_that_are_alike_are_clamped_alike(tokens: Session) -> None:
    ids = [uuid4(), uuid4()]
    rows = tokens.all(
        "select * from pglimits._acquire_batch('{tokens}', '{5000}', '{\"\"}', false, null, 300, 0, %s::uuid[],"
        " '[null,null]', false, false, 'pglimits_t', clamp => true)", ids,
    )  # fmt: skip
    assert [row.status for row in rows] == ["granted", "queued"]
    assert [row.slots for row in tokens.waiters()] == [1000]
