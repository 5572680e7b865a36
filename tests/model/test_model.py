"""The SQL functions against a model of them: the same random steps, the same answers, the same seen after each.

A few dozen lives of a few limits in each run of the tests. PGLIMITS_MODEL_EXAMPLES=20000 makes it that many, and other
ones each time (pytest's --hypothesis-seed repeats a run).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar
from uuid import UUID

import entry_points
import hypothesis.strategies as st
import pytest
from entry_points import CHANNEL, START, attempt, interval, micros, moment, ways
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from limiter_model import LIVENESS, SECOND, Answer, Limit, Model, Request, Sleeper, Waiter, Wrong
from machines import EXAMPLES, PROFILE, empty
from sqltest import Clock, Session, check_consistent

TICK = 1000
LOOK = 3 * SECOND

names = st.sampled_from(["a", "a", "b", "b", "c"])
keys = st.sampled_from(["", "", "", "", "", "k"])
rated = st.sampled_from(["b", "b", "b", "c"])
few = st.sampled_from([1, 1, 1, 1, 1, 2, 2, 3])
limits = st.sampled_from([1, 2, 2, 3, 3, 4, 0])
some = st.sampled_from([1, 2, 3, 3])
rates = st.sampled_from(["0", "0", "1", "0.25", "2.5", "7", "0.1", "0.02"]).map(Fraction)
bounds = st.sampled_from([None, None, None, 0, 1, 2])
holders = st.sampled_from([None, None, {"pid": 1}, {"host": "h", "pid": 2}])
seconds = st.sampled_from([SECOND, 2 * SECOND, 5 * SECOND, 20 * SECOND, 300 * SECOND])
pauses = st.one_of(
    st.sampled_from([1, 500_000, SECOND, 2 * SECOND, 4 * SECOND]),
    st.integers(1, 3 * SECOND),
    st.sampled_from([5 * SECOND, LIVENESS, 30 * SECOND, 4000 * SECOND]),
)
waits = st.sampled_from([0, 0, SECOND, 10 * SECOND, None, None])
which = st.integers(0, 30)
parts = st.lists(st.tuples(names, keys, few), min_size=1, max_size=3)
one_part = st.lists(st.tuples(names, keys, few), min_size=1, max_size=1)


def named(kind: str) -> st.SearchStrategy[str]:
    return st.sampled_from(["it", "it", "it", kind])


class Lives(RuleBasedStateMachine):
    """A client for every request that waits: it looks when it was told to, or is notified; until its process dies."""

    s: ClassVar[Session]
    clock: ClassVar[Clock]
    told: ClassVar[list[str]]

    def __init__(self) -> None:
        super().__init__()
        empty(self.s)
        self.clock.freeze(START)
        self.told.clear()
        self.model = Model()
        self.ids = 0
        self.asked: dict[UUID, Request] = {}
        # When the live client of a request that waits will look again, and when one that sleeps goes by what it knows.
        self.looks: dict[UUID, int] = {}
        self.goes: dict[UUID, int] = {}
        # Who waits and can be told nothing, as it gave no channel.
        self.deaf: set[UUID] = set()

    # What both are asked.

    def new_id(self) -> UUID:
        self.ids += 1
        return UUID(int=self.ids * 0x1F3_5792_4680_ACE1_3579_BDF0 % 2**128)

    def ask(self, requests: Sequence[Request], way: int = 2) -> list[Answer]:
        requests = list(requests)
        possible = ways(requests)
        chosen = possible[way % len(possible)]
        lost = [each.lease_id for each in requests if each.lease_id in self.model.lost]
        replies = chosen(self.s, requests)
        if "code" in replies[0] and len(requests) == 1 and chosen is not entry_points.many:
            # What had become possible meanwhile, an error has undone; in a batch it does not.
            assert entry_points.many(self.s, requests)[0].get("code") == replies[0]["code"]
        refused = {
            each.lease_id: reply.get("retry_after")
            for each, reply in zip(requests, replies, strict=True)
            if reply["status"] == "refused" and len(requests) > 1
        }
        full = {each.lease_id for each, reply in zip(requests, replies, strict=True) if reply.get("code") == "PL006"}
        answers = self.model.ask(requests, refused, full)
        for request, answer, reply in zip(requests, answers, replies, strict=True):
            self.agree(request, answer, reply, request.lease_id in lost)
            self.asked[request.lease_id] = request
            self.looks.pop(request.lease_id, None)
            self.deaf.discard(request.lease_id)
            if answer.status == "queued":
                assert 0 <= reply["retry_after"] <= LOOK
                self.looks[request.lease_id] = self.model.now + reply["retry_after"]
                if chosen is entry_points.hot:
                    self.deaf.add(request.lease_id)
            elif answer.status == "granted" and answer.wait:
                self.looks[request.lease_id] = self.model.now + LOOK
                self.goes[request.lease_id] = self.model.now + answer.wait
        return answers

    def agree(self, request: Request, answer: Answer, reply: dict[str, Any], was_lost: bool) -> None:
        found = (request, answer, reply)
        assert reply["status"] == answer.status, found
        if answer.status == "error":
            assert reply["code"] in answer.codes, found
        if answer.status == "granted" and "expires_at" in reply:
            assert reply["expires_at"] == answer.expires_at, found
        if answer.status == "granted" and "wait" in reply and request.for_rate:
            assert reply["wait"] == answer.wait, found
        if answer.status == "refused" and "retry_after" in reply:
            assert reply["retry_after"] == answer.retry_after, found
        if answer.status == "queued" and "position" in reply and not was_lost:
            assert reply["position"] == answer.position, found
        if answer.status == "queued" and was_lost:
            since = self.s.value("select waiting_since from pglimits.waiters where lease_id = %s", request.lease_id)
            self.arrived(request.lease_id, moment(since) or 0)
        if answer.status == "granted" and not request.for_rate and reply.get("fences") is not None:
            lease = self.model.leases[request.lease_id]
            for place, fence in zip(answer.places, reply["fences"], strict=True):
                assert (fence is None) == (place is None), found
                if place is not None:
                    self.model.note_fence(lease, place, fence)

    def arrived(self, lease_id: UUID, arrival: int) -> None:
        """Arrivals in one moment are microseconds apart; who comes back from the dead may have kept its place."""
        found = self.model.waiter(lease_id) or self.model.sleeper(lease_id)
        assert found is not None
        place, waiter = found
        if waiter.arrival != arrival:
            assert 0 < arrival - waiter.arrival < TICK or arrival == self.model.lost.get(lease_id)
            waiter.arrival = arrival
            place.line.sort(key=lambda each: each.order())

    def both(self, change: Callable[[], object], call: Callable[[], object]) -> tuple[Any, Any]:
        """What the model and the functions answer, once they agree whether it is an error."""
        code: str | None = None
        expected: object = None
        try:
            expected = change()
        except Wrong as wrong:
            (code,) = wrong.codes
        reply = attempt(lambda: {"status": "done", "value": call()})
        assert reply.get("code") == code, (reply, code)
        return expected, reply.get("value")

    # Time, and those who wait.

    def move_to(self, now: int) -> None:
        self.clock.freeze(START + (interval(now) or interval(0)))  # type: ignore[operator]
        self.model.move_to(now)

    def tick(self) -> None:
        """Arrivals in one moment on different limits are not told apart."""
        self.move_to(self.model.now + TICK)
        self.find_dead()

    def find_dead(self) -> None:
        """The model is told who is alive of those that sleep, or slept, and may be."""
        unsure = self.model.unsure()
        if unsure:
            alive = {row.lease_id for row in self.s.waiters()}
            for each in unsure:
                if each.request.lease_id in alive:
                    each.surely_until = self.model.now + 1
                else:
                    each.alive_until = self.model.now

    def hear(self) -> None:
        for about in self.told:
            for lease_id in self.looks:
                if lease_id not in self.deaf and about in ("", str(lease_id)):
                    self.looks[lease_id] = self.model.now
        self.told.clear()

    def pump(self) -> None:
        """Who has to look now does so, until nobody has to."""
        for _ in range(100):
            self.hear()
            for lease_id in self.looks.keys() & self.model.passed.keys():
                # Who sleeps until its turn goes then without another look.
                if self.goes.get(lease_id, 0) <= self.model.now:
                    del self.looks[lease_id]
                else:
                    assert self.looks[lease_id] <= self.model.now, "its turn has come, and it was not told"
            for lease_id in sorted(self.deaf & self.looks.keys()):
                if self.looks[lease_id] > self.model.now and not self.may_sleep(lease_id):
                    self.looks[lease_id] = self.model.now
            due = sorted(lease_id for lease_id, at in self.looks.items() if at <= self.model.now)
            if not due:
                break
            self.watch(due)
        else:
            pytest.fail(f"they look again and again: {due}")
        for lease_id in self.looks.keys() - self.deaf - self.model.passed.keys():
            # Whoever was handed something, or sent away, was told.
            assert self.model.waiter(lease_id) or self.model.sleeper(lease_id), lease_id
        for place in self.model.places():
            if all(lease_id in self.looks.keys() - self.deaf for lease_id in place.everybody()):
                assert not self.model.is_idle(place), (place.limit.name, place.key)

    def may_sleep(self, lease_id: UUID) -> bool:
        may = bool(self.s.value("select pglimits.may_sleep(%s)", lease_id))
        in_line = self.model.waiter(lease_id)
        assert not may or (in_line is not None and not in_line[1].called)
        return may

    def watch(self, lease_ids: list[UUID]) -> None:
        expected = self.model.watch(lease_ids)
        rows: dict[UUID, list[Any]] = {}
        for row in self.s.all("select * from pglimits.watch(%s::uuid[])", lease_ids):
            rows.setdefault(row.lease_id, []).append(row)
        assert rows.keys() == expected.keys()
        again = []
        for lease_id, status in expected.items():
            (row,) = rows[lease_id]
            assert row.status == status, (row, status)
            lease, asleep = self.model.live(lease_id), self.model.sleeper(lease_id)
            if status == "queued":
                self.model.lives_for(lease_id, micros(row.ends_in) or 0)
                retry_after = micros(row.retry_after)
                assert retry_after is not None
                assert 0 <= retry_after <= LOOK + 50_000
                if lease_id in self.looks:
                    self.looks[lease_id] = self.model.now + retry_after
            elif asleep is not None:
                assert micros(row.wait) == self.model.until(asleep[0], asleep[1].ahead)
                if lease_id in self.looks:
                    self.looks[lease_id] = self.model.now + LOOK
                    self.goes[lease_id] = self.model.now + self.model.until(asleep[0], asleep[1].ahead)
            else:
                if status == "retry" and self.model.waiter(lease_id) is not None:
                    # It may get an error when it asks again, and stay in line for as long as it lives.
                    self.model.lives_for(lease_id, micros(row.ends_in) or 0)
                was_looking = self.looks.pop(lease_id, None) is not None
                self.deaf.discard(lease_id)
                if status == "granted" and lease is not None:
                    (place,) = lease.parts
                    self.model.note_fence(lease, place, row.fence)
                    assert moment(row.expires_at) == lease.expires_at
                elif status == "retry" and was_looking:
                    again.append(lease_id)
        for lease_id in again:
            self.tick()
            self.ask([self.asked[lease_id]])

    # What is to be seen.

    def see(self) -> None:
        self.find_dead()
        model, s = self.model, self.s
        with s.connection.pipeline():
            limits, holders, waiters = (
                s.connection.execute(f"select * from pglimits.{view} order by {order}")
                for view, order in (("limits", "name"), ("holders", "fence"), ("waiters", "name, key, position"))
            )
        shown = {row.name: row for row in limits}
        assert shown.keys() == model.limits.keys()
        for limit in model.limits.values():
            self.see_limit(limit, shown[limit.name])
        self.see_holders(holders.fetchall())
        self.see_waiters(waiters.fetchall())

    def see_limit(self, limit: Limit, row: Any) -> None:
        model = self.model
        assert (row.limit, row.active, row.slot_decay_per_second, row.max_waiters, row.description) == (
            limit.most, limit.active, float(limit.rate), limit.max_waiters, limit.description
        )  # fmt: skip
        places = limit.places.values()
        assert row.held == sum(model.held(place) for place in places)
        assert row.waiting == sum(len(model.waiting(place)) + len(model.sleeping(place)) for place in places)
        level = sum(max(place.level - model.lost_level(place), Fraction(0)) for place in places) if limit.rate else 0
        assert row.level == pytest.approx(float(level), rel=1e-12, abs=1e-9)

    def see_holders(self, rows: list[Any]) -> None:
        shown = {(row.lease_id, row.name, row.key): row for row in rows}
        expected = {
            (lease.request.lease_id, place.limit.name, place.key): (lease, place)
            for lease in sorted(self.model.live_leases(), key=lambda lease: lease.number)
            for place in lease.parts
        }
        assert shown.keys() == expected.keys()
        for which, (lease, place) in expected.items():
            row, part, request = shown[which], lease.parts[place], lease.request
            self.model.note_fence(lease, place, row.fence)
            assert (row.slots, row.holder, row.priority, moment(row.acquired_at), moment(row.expires_at)) == (
                part.slots, request.holder, request.priority, lease.acquired_at, lease.expires_at
            )  # fmt: skip

    def see_waiters(self, rows: list[Any]) -> None:
        for row in rows:
            if self.model.waiter(row.lease_id) or self.model.sleeper(row.lease_id):
                self.arrived(row.lease_id, moment(row.waiting_since) or 0)
        shown: dict[tuple[str, str], list[Any]] = {}
        for row in rows:
            shown.setdefault((row.name, row.key), []).append(row)
        for place in self.model.places():
            waiting: list[Sleeper | Waiter] = [*self.model.sleeping(place), *self.model.waiting(place)]
            expected = [
                (each.request.lease_id, each.slots, each.request.holder, each.request.priority, nth, each.arrival)
                for nth, each in enumerate(waiting, 1)
            ]
            assert expected == [
                (row.lease_id, row.slots, row.holder, row.priority, row.position, moment(row.waiting_since))
                for row in shown.pop((place.limit.name, place.key), [])
            ]
        assert not shown

    @invariant()
    def the_same_is_to_be_seen(self) -> None:
        if self.ids or self.model.limits:
            self.pump()
            self.move_to(self.model.now + TICK)
            self.see()

    def teardown(self) -> None:
        check_consistent(self.s)

    # Whom a step is about.

    def among(self, lease_ids: Sequence[UUID], nth: int) -> UUID:
        return sorted(lease_ids)[nth % len(lease_ids)]

    def current(self) -> list[UUID]:
        """Who holds, waits, or sleeps."""
        held = [lease.request.lease_id for lease in self.model.live_leases()]
        return held + [lease_id for place in self.model.places() for lease_id in place.everybody()]

    def sleepers(self) -> list[UUID]:
        return [each.request.lease_id for place in self.model.places() for each in place.sleepers]

    def is_settled(self) -> bool:
        """Whether nothing is due: nobody can have been found dead, no head can go."""
        return not any(
            place.limit.active
            and (
                self.model.is_idle(place)
                or len(self.model.waiting(place)) < len(place.line)
                or len(self.model.sleeping(place)) < len(place.sleepers)
            )
            for place in self.model.places()
        )

    # The steps.

    @initialize(most=st.tuples(some, some, some), rate=rates, missing=st.sampled_from([False, False, True]))
    def begin(self, most: tuple[int, int, int], rate: Fraction, missing: bool) -> None:
        given = (("a", most[0], Fraction(0)), ("b", most[1], Fraction(1, 8)), ("c", most[2], rate))
        for name, limit, its_rate in given[: 2 if missing else 3]:
            self.create(name, limit=limit, rate=its_rate)

    @rule(
        name=names,
        changes=st.fixed_dictionaries(
            {},
            optional={
                "limit": limits, "rate": rates, "max_waiters": st.sampled_from([-1, -1, 0, 1, 2]),
                "description": st.sampled_from(["", "other"]),
            },
        ),
    )  # fmt: skip
    def change(self, name: str, changes: dict[str, Any]) -> None:
        self.update(name, **changes)

    @precondition(lambda self: self.sleepers())
    @rule(nth=which)
    def shut(self, nth: int) -> None:
        """A limit towards which somebody sleeps."""
        slept = self.model.sleeper(self.among(self.sleepers(), nth))
        assert slept is not None
        self.update(slept[0].limit.name, limit=0)

    @precondition(lambda self: any(limit.most == 0 for limit in self.model.limits.values()))
    @rule(most=some)
    def open_again(self, most: int) -> None:
        for limit in [*self.model.limits.values()]:
            if limit.most == 0:
                self.update(limit.name, limit=most)

    @rule(name=names, off=st.integers(0, 3))
    def turn_on(self, name: str, off: int) -> None:
        """Or off, and not so often."""
        limit = self.model.limits.get(name)
        if limit is None or not limit.active or off == 3:
            self.update(name, active=limit is None or not limit.active)

    @rule(
        name=names,
        step=st.one_of(
            st.fixed_dictionaries(
                {"limit": limits},
                optional={
                    "rate": rates, "active": st.booleans(), "max_waiters": bounds,
                    "description": st.sampled_from([None, "", "what for"]),
                },
            ),
            names, names, st.none(), keys.map(lambda key: ("reset", key)), st.just(("reset", None)),
        ),
    )  # fmt: skip
    def administer(self, name: str, step: Any) -> None:
        """Creates it, renames it, deletes it, or resets it."""
        match step:
            case {"limit": _}:
                self.create(name, **step)
            case str():
                self.update(name, new_name=step)
            case None:
                self.both(lambda: self.model.delete(name), lambda: self.s.delete(name))
            case ("reset", key):
                expected, ended = self.both(lambda: self.model.reset(name, key), lambda: self.s.reset(name, key))
                assert ended == expected

    def create(
        self,
        name: str,
        limit: int,
        rate: Fraction = Fraction(0),
        active: bool = True,
        max_waiters: int | None = None,
        description: str | None = None,
    ) -> None:
        self.both(
            lambda: self.model.create(name, limit, rate, active, max_waiters, description),
            lambda: self.s.create(
                name, limit, float(rate), active=active, max_waiters=max_waiters, description=description
            ),
        )

    def update(self, name: str, **changes: Any) -> None:
        texts = {{"rate": "slot_decay_per_second"}.get(each, each): value for each, value in changes.items()}
        if "rate" in changes:
            texts["slot_decay_per_second"] = float(changes["rate"])
        self.both(lambda: self.model.update(name, **changes), lambda: self.s.update(name, **texts))

    def request(self, parts: list[tuple[str, str, int]], **more: Any) -> Request:
        return Request(
            self.new_id(), tuple(part[0] for part in parts), tuple(part[2] for part in parts),
            tuple(part[1] for part in parts), **more,
        )  # fmt: skip

    @rule(
        parts=one_part | parts, wait=waits, duration=seconds, priority=st.sampled_from([0, 0, 0, 1, -1]),
        holder=holders, strict=st.sampled_from([False, False, False, True]), way=which, look_first=st.booleans(),
    )  # fmt: skip
    def acquire(self, parts: Any, way: int, look_first: bool, **more: Any) -> None:
        self.ask_newly(self.request(parts, **more), way, look_first)

    @rule(name=names, slots=few, priority=st.sampled_from([0, 0, 1]), duration=st.sampled_from([SECOND, 300 * SECOND]))
    def wait_for(self, name: str, slots: int, priority: int, duration: int) -> None:
        self.ask([self.request([(name, "", slots)], wait=None, priority=priority, duration=duration)])

    @rule(slots=few, name=rated)
    def sleep_until_a_turn(self, slots: int, name: str) -> None:
        self.ask([self.request([(name, "", slots)], wait=None, for_rate=True)])

    @rule(wait=waits, slots=few)
    def wait_for_several(self, wait: int | None, slots: int) -> None:
        self.ask([self.request([("a", "", slots), ("b", "", 1)], wait=wait)])

    @rule(nth=which, priority=st.sampled_from([0, 0, 1]), times=st.integers(1, 4))
    def wait_for_several_that_are_busy(self, nth: int, priority: int, times: int) -> None:
        """It is called again and again, while others take all that it needs."""
        busy = [
            (limit.name, key, limit.most) for limit in self.model.limits.values() for key in ("", "k") if limit.most
        ]
        if len(busy) < 2:
            return
        both = [busy[nth % len(busy)], busy[(nth + 1) % len(busy)]]
        self.take_all(both)
        wide = self.request([(name, key, 1) for name, key, _ in both], wait=None, priority=priority)
        self.ask_a_tick_later(wide)
        for _ in range(times):
            self.take_all(both)
            found = self.model.waiter(wide.lease_id)
            held = [each.request.lease_id for each in self.model.live_leases() if found and found[0] in each.parts]
            if held:
                self.end(held, 0)
            self.the_same_is_to_be_seen()

    def take_all(self, parts: list[tuple[str, str, int]]) -> None:
        for part in parts:
            self.ask_a_tick_later(self.request([part], wait=None))

    def ask_a_tick_later(self, request: Request) -> None:
        self.pump()
        self.tick()
        self.ask([request])

    @rule(name=rated, key=keys, slots=few, wait=waits, way=which, look_first=st.booleans())
    def rate_limit(self, name: str, key: str, slots: int, wait: int | None, way: int, look_first: bool) -> None:
        self.ask_newly(self.request([(name, key, slots)], wait=wait, for_rate=True), way, look_first)

    @rule(parts=parts, way=which, look_first=st.booleans())
    def rate_limit_over_several_limits(self, parts: Any, way: int, look_first: bool) -> None:
        self.ask_newly(self.request(parts, wait=0, for_rate=True), way, look_first)

    def ask_newly(self, request: Request, way: int, look_first: bool) -> None:
        # What is due to others is not reckoned with by peek.
        peeked = entry_points.peek(self.s, request) if look_first and self.is_settled() else None
        (answer,) = self.ask([request], way)
        if peeked is not None:
            assert peeked["status"] == answer.status, (peeked, answer)
            assert peeked.get("code") in (answer.codes or (None,)), (peeked, answer)
            if answer.status == "granted":
                assert peeked["wait"] == (answer.wait or 0)
            if answer.status == "refused":
                assert peeked["retry_after"] == answer.retry_after
            assert peeked.get("position") == answer.position

    @rule(
        part=one_part, count=st.integers(2, 5), wait=waits, duration=seconds,
        for_rate=st.sampled_from([False, False, True]), priority=st.sampled_from([0, 0, 1]), way=which,
    )  # fmt: skip
    def several_alike(self, part: Any, count: int, for_rate: bool, priority: int, way: int, **more: Any) -> None:
        priority = 0 if for_rate else priority
        self.ask([self.request(part, for_rate=for_rate, priority=priority, **more) for _ in range(count)], way)

    @rule(
        asked=st.lists(
            st.tuples(one_part, waits, st.sampled_from([False, False, True]), st.sampled_from([0, 0, 1])),
            min_size=2, max_size=5,
        ),
        several=st.none() | parts,
        again=st.none() | which,
    )  # fmt: skip
    def a_batch(self, asked: list[Any], several: Any, again: int | None) -> None:
        requests = [
            self.request(part, wait=wait, for_rate=for_rate, priority=0 if for_rate else priority)
            for part, wait, for_rate, priority in asked
        ]
        held = [lease.request.lease_id for lease in self.model.live_leases() if lease.whole]
        if again is not None and held:
            requests.insert(again % len(requests), self.asked[self.among(held, again)])
        if several is not None:
            # Arrivals in one moment on different limits are not told apart.
            used = {name for request in requests for name in request.names}
            apart = [part for part in several if part[0] not in used]
            if apart:
                requests.append(self.request(apart, wait=None))
        self.ask(requests, 0)

    @precondition(lambda self: self.asked)
    @rule(nth=which, way=which)
    def repeat(self, nth: int, way: int) -> None:
        """A reply was lost."""
        lease_id = self.among(list(self.asked), nth)
        lease = self.model.live(lease_id)
        passed = self.model.passed.get(lease_id)
        if lease_id in self.model.lost or (lease is not None and not lease.whole):
            return
        # It is remembered for a while.
        if passed is None or passed.at + LIVENESS > self.model.now:
            self.ask([self.asked[lease_id]], way)

    @precondition(lambda self: self.current() and self.is_settled())
    @rule(nth=which, way=which)
    def give_the_id_of_another_request(self, nth: int, way: int) -> None:
        lease_id = self.among(self.current(), nth)
        request = self.asked[lease_id]
        lease = self.model.live(lease_id)
        enforced = [self.model.find(name, lease_id) for name in request.names]
        if any(limit is None or not limit.active for limit in enforced):
            return
        if lease is not None and {place.limit for place in lease.parts} != set(enforced):
            return
        slots = tuple(slots + 1 for slots in request.slots)
        other = replace(request, slots=slots)
        (answer,) = self.model.ask([other])
        assert answer.status == "error"
        (reply,) = ways([other])[way % len(ways([other]))](self.s, [other])
        assert reply["code"] in (*answer.codes, "PL001")

    @precondition(lambda self: self.looks)
    @rule(nth=which, ask_again=st.booleans(), way=which)
    def time_out(self, nth: int, ask_again: bool, way: int) -> None:
        lease_id = self.among(list(self.looks), nth)
        if ask_again:
            request = self.asked[lease_id]
            self.ask([replace(request, wait=0)], way)
        else:
            self.end([lease_id], way)

    @precondition(lambda self: self.model.live_leases())
    @rule(nth=which, way=which)
    def release_one(self, nth: int, way: int) -> None:
        self.end([self.among([lease.request.lease_id for lease in self.model.live_leases()], nth)], way)

    @precondition(lambda self: self.sleepers())
    @rule(nth=which, way=which, dies=st.booleans())
    def give_up_a_turn(self, nth: int, way: int, dies: bool) -> None:
        lease_id = self.among(self.sleepers(), nth)
        if dies:
            self.looks.pop(lease_id, None)
        else:
            self.end([lease_id], way)

    @precondition(lambda self: self.asked)
    @rule(nths=st.lists(which, min_size=1, max_size=4), known=st.booleans(), way=which)
    def release(self, nths: list[int], known: bool, way: int) -> None:
        lease_ids = [lease.request.lease_id for lease in self.model.live_leases()]
        if not lease_ids or known:
            # Where a turn that has come is still remembered is looked for what is due, as everywhere.
            settled = self.is_settled()
            lease_ids = [lease_id for lease_id in self.asked if settled or lease_id not in self.model.passed]
        if not lease_ids:
            return
        self.end(sorted({self.among(lease_ids, nth) for nth in nths}), way)

    def end(self, lease_ids: list[UUID], way: int) -> None:
        expected = self.model.release(lease_ids)
        assert entry_points.release(self.s, lease_ids, way) == expected
        for lease_id in lease_ids:
            self.looks.pop(lease_id, None)
            self.deaf.discard(lease_id)

    @precondition(lambda self: self.asked)
    @rule(nths=st.lists(which, min_size=1, max_size=3), duration=st.none() | seconds, way=which)
    def renew(self, nths: list[int], duration: int | None, way: int) -> None:
        lease_ids = sorted({self.among(list(self.asked), nth) for nth in nths})
        expected = {lease_id: self.model.renew(lease_id, duration) for lease_id in lease_ids}
        assert entry_points.renew(self.s, lease_ids, duration, way) == expected

    @precondition(lambda self: self.looks)
    @rule(nth=which)
    def die(self, nth: int) -> None:
        """The process of somebody who waits."""
        del self.looks[self.among(list(self.looks), nth)]

    @precondition(lambda self: self.current())
    @rule(nth=which)
    def come_back(self, nth: int) -> None:
        """A process that had stopped goes on looking."""
        lease_id = self.among(self.current(), nth)
        in_line = self.model.waiter(lease_id)
        if in_line is not None and in_line[0].limit.max_waiters is None:
            self.looks.setdefault(lease_id, self.model.now)

    @rule(name=rated, key=keys, slots=st.sampled_from([0, 1, 2, 5, -1, -2, -100]))
    def adjust(self, name: str, key: str, slots: int) -> None:
        expected, level = self.both(
            lambda: self.model.adjust(name, slots, key), lambda: self.s.adjust(name, slots, key)
        )  # fmt: skip
        if expected is not None:
            assert level == pytest.approx(float(expected), rel=1e-12, abs=1e-9)

    @rule(idle=st.sampled_from(["0", "1 second", "1 hour"]))
    def sweep(self, idle: str) -> None:
        """Nothing is to be seen of it."""
        if self.is_settled():
            self.s.sweep(idle)

    @rule(pause=pauses)
    def time_passes(self, pause: int) -> None:
        # Whoever waits looks every few seconds.
        until = self.model.now + (min(pause, 12 * SECOND) if self.looks else pause)
        while self.model.now < until:
            self.move_to(min([until, *(at for at in self.looks.values() if at > self.model.now)]))
            self.find_dead()
            self.pump()

    @rule(
        call=st.sampled_from(
            [
                "acquire('a', slots => 0)", "acquire('a', slots => null::int)", "acquire('a/b')",
                "acquire('a', key => null::text)",
                "acquire('a', lease_duration => '0.5 seconds')", "acquire('a', wait => '-1 seconds')",
                "acquire('{}'::text[])", "acquire('{a,b}'::text[], slots => '{1,1,1}')", "rate_limit('a', slots => -1)",
                "renew('{}'::uuid[], '0 seconds')", "adjust('a', null)", "create_limit('a', -1)",
                "update_limit('a', slot_decay_per_second => -1)", "sweep(0)", "peek('a', slots => 0)",
            ]
        )
    )  # fmt: skip
    def err(self, call: str) -> None:
        reply = attempt(lambda: {"status": "done", "value": self.s.all(f"select pglimits.{call}")})
        assert reply.get("code") == "PL001"


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_the_functions_do_what_the_model_does(clock: Clock, connect: Callable[..., Any]) -> None:
    session = Session(connect())
    session.run("set synchronous_commit = off")
    told: list[str] = []
    session.connection.add_notify_handler(lambda notify: told.append(notify.payload.split(" ")[0]))
    session.run(f"listen {CHANNEL}")
    here = type("LivesHere", (Lives,), {"s": session, "clock": clock, "told": told})
    run_state_machine_as_test(here, settings=PROFILE)
