"""Turns reserved ahead, on one and on several rate limits, against a bucket for each of them.

Where a turn is to lie among others that may move, may not be told, or are bound to a slower limit, the product decides.
Whatever it decides, nobody may go too fast for the bucket of any limit; nobody may be given a turn that lies later than
behind everybody else, or lose the one that it has to somebody who asked later; what somebody gives up makes nobody
later, and is left to a newcomer only if nobody who sleeps could go earlier by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar
from uuid import UUID

import hypothesis.strategies as st
import pytest
from entry_points import CHANNEL, START, interval, micros
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from limiter_model import SECOND
from machines import EXAMPLES, PROFILE, empty
from sqltest import Clock, Session, check_consistent

NAMES = ("one", "two", "three")
# Each with the name and key of its limit.
PLACES = {"one": ("one", ""), "one a": ("one", "a"), "two": ("two", ""), "three": ("three", "")}
LOOK = 3 * SECOND
# Each move rounds up to a microsecond.
ROUNDED = 20

names = st.sampled_from(NAMES)
places = st.sampled_from([*PLACES])
rates = st.sampled_from(["1", "2", "4", "0.5", "0.125", "2.5"]).map(Fraction)
limits = st.sampled_from([1, 2, 3, 5, 6, 8])
waits = st.sampled_from([0, 3 * SECOND, 9 * SECOND, None, None])
asked_for = st.dictionaries(places, st.sampled_from([1, 1, 1, 2, 4, 5, 6, 7]), min_size=1, max_size=3)
which = st.integers(0, 30)
pauses = st.one_of(st.integers(1, 3 * SECOND), st.sampled_from([SECOND, 5 * SECOND, 12 * SECOND, 60 * SECOND]))


@dataclass(eq=False)
class Bucket:
    most: int
    rate: Fraction
    active: bool = True
    # What has gone and has not decayed; with what was added by adjust; and what of that is left.
    gone: Fraction = Fraction(0)
    level: Fraction = Fraction(0)
    added: Fraction = Fraction(0)

    def decay(self, passed: int) -> None:
        decayed = self.rate * Fraction(passed, SECOND)
        self.added = max(self.added - max(decayed - self.gone, Fraction(0)), Fraction(0))
        self.gone = max(self.gone - decayed, Fraction(0))
        self.level = max(self.level - decayed, Fraction(0))

    def go(self, slots: int) -> None:
        assert self.gone + slots <= self.most + self.rate / SECOND, "too fast"  # turns are whole microseconds
        self.gone += slots
        self.level += slots

    def adjust(self, slots: int) -> None:
        self.level = max(self.level + slots, Fraction(0))
        if slots >= 0:
            self.added += slots
            return
        of_added = min(-slots, self.added)
        self.added -= of_added
        self.gone = max(self.gone + slots + of_added, Fraction(0))

    def has_room(self, now: int, others: list[tuple[int, int]], slots: int, at: int) -> int:
        """The first moment from `at` on with room for so many slots among others who keep their moments."""
        while True:
            level, when, mine = self.level, now, False
            for goes_at, their_slots in [*sorted(others), (None, 0)]:
                if not mine and (goes_at is None or goes_at > at):
                    level = max(level - self.rate * Fraction(at - when, SECOND), Fraction(0))
                    when, mine = at, True
                    if level + slots > self.most:
                        at += math.ceil((level + slots - self.most) * SECOND / self.rate)
                        break
                    level += slots
                if goes_at is not None:
                    level = max(level - self.rate * Fraction(goes_at - when, SECOND), Fraction(0)) + their_slots
                    when = goes_at
                    if mine and level > self.most + self.rate / SECOND:
                        at = goes_at
                        break
            else:
                return at

    def last_turn(self, now: int, others: list[tuple[int, int]], slots: int) -> int:
        """When there is room for so many slots behind all others, who go at these times with these slots."""
        level, at = self.level, now
        for goes_at, their_slots in sorted(others):
            level = max(level - self.rate * Fraction(goes_at - at, SECOND), Fraction(0)) + their_slots
            at = goes_at
        too_much = max(level + slots - self.most, Fraction(0))
        return at + math.ceil(too_much * SECOND / self.rate)


@dataclass(eq=False)
class Sleeper:
    lease_id: UUID
    slots: dict[str, int]
    wait: int | None
    told: bool
    goes_at: int
    alive: bool = True
    arrival: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Turns(RuleBasedStateMachine):
    s: ClassVar[Session]
    clock: ClassVar[Clock]
    heard: ClassVar[list[str]]

    def __init__(self) -> None:
        super().__init__()
        empty(self.s)
        self.now = 0
        self.heard.clear()
        self.clock.freeze(START)
        self.buckets: dict[str, Bucket] = {}
        self.sleepers: list[Sleeper] = []
        self.ids = self.arrivals = 0
        # Whether all that was booked is for somebody who sleeps, or has gone.
        self.exact = True
        # Whether turns may come later: a limit has just been changed, or one who is dead has not moved since.
        self.slower = False
        self.dead_moves = False
        # Until when somebody who is dead may be taken for alive.
        self.alive_until = 0

    @initialize(given=st.lists(st.tuples(limits, rates), min_size=3, max_size=3), widest=st.sampled_from([1, 2, 8]))
    def begin(self, given: list[tuple[int, Fraction]], widest: int) -> None:
        self.widest = widest
        for name, (most, rate) in zip(NAMES, given, strict=True):
            self.s.create(name, most, float(rate))
            for place in self.places_of(name):
                self.buckets[place] = Bucket(most, rate)

    @staticmethod
    def places_of(name: str) -> list[str]:
        return [place for place, (its_name, _) in PLACES.items() if its_name == name]

    # Asking.

    def ask(self, sleeper: Sleeper) -> Any:
        return self.s.rate_limit(
            [PLACES[place][0] for place in sleeper.slots], keys=[PLACES[place][1] for place in sleeper.slots],
            slots=list(sleeper.slots.values()), wait=interval(sleeper.wait), lease_id=sleeper.lease_id,
            channel=CHANNEL if sleeper.told else None,
        )  # fmt: skip

    def enforced(self, sleeper: Sleeper) -> dict[str, int]:
        return {name: slots for name, slots in sleeper.slots.items() if self.buckets[name].active}

    def reserve(self, sleeper: Sleeper) -> None:
        parts = self.enforced(sleeper)
        if any(slots > self.buckets[name].most for name, slots in parts.items()):
            return
        latest = self.latest(parts)
        answer = self.ask(sleeper)
        if not parts:
            assert answer.status == "unlimited"
            return
        found = micros(answer.wait if answer.status == "granted" else answer.retry_after)
        assert answer.status in ("granted", "refused")
        assert found is not None
        assert self.now + found <= latest + 1 or not self.exact, "later than behind everybody"
        if answer.status == "refused":
            assert sleeper.wait is not None
            assert found > sleeper.wait
            return
        assert sleeper.wait is None or found <= sleeper.wait
        self.arrivals += 1
        sleeper.parts, sleeper.goes_at, sleeper.arrival = parts, self.now + found, self.arrivals
        self.sleepers.append(sleeper)
        self.let_go()

    def latest(self, parts: dict[str, int]) -> int:
        at = self.now
        for _ in range(20):
            before = at
            for name, slots in parts.items():
                others = [
                    (max(each.goes_at, self.now), each.parts[name]) for each in self.sleepers if name in each.parts
                ]
                at = max(at, self.buckets[name].last_turn(self.now, others, slots))
            if at == before:
                break
        return at

    # Time.

    def let_go(self) -> None:
        for sleeper in [each for each in self.sleepers if each.goes_at <= self.now]:
            self.sleepers.remove(sleeper)
            for name, slots in sleeper.parts.items():
                if sleeper.alive:
                    self.buckets[name].go(slots)

    def look(self) -> None:
        """Who can be told looks, and so do those who are told by what it moves."""
        for sleeper in [each for each in self.sleepers if not each.parts]:
            # It asks again: meanwhile others of its limits may be enforced.
            self.sleepers.remove(sleeper)
            if sleeper.told and sleeper.alive:
                sleeper.wait = None
                self.reserve(sleeper)
        told = {each.lease_id: each for each in self.sleepers if each.told and each.alive}
        # Who knows that it goes now does so without another look.
        asleep = [each for each in told.values() if each.goes_at > self.now]
        was = {lease_id: sleeper.goes_at for lease_id, sleeper in told.items()}
        moved = True
        while moved:
            turns: dict[UUID, int] = {}
            for row in self.s.all("select * from pglimits.watch(%s::uuid[])", list(told)) if told else []:
                assert row.status == "granted"
                turns[row.lease_id] = max(turns.get(row.lease_id, 0), self.now + (micros(row.wait) or 0))
            assert turns.keys() == told.keys()
            moved = any(told[lease_id].goes_at != turn for lease_id, turn in turns.items())
            assert self.heard or all(each.goes_at == turns[each.lease_id] for each in asleep), (
                "it moves, and was not told"
            )
            for lease_id, turn in turns.items():
                told[lease_id].goes_at = turn
        if not (self.slower or self.dead_moves):
            for lease_id, sleeper in told.items():
                assert sleeper.goes_at <= was[lease_id] + ROUNDED, "later than it was told"
        self.slower = False
        self.heard.clear()
        self.nobody_could_go_earlier()
        self.nobody_goes_before_whom_it_came_after()
        self.let_go()

    def no_turn_leaves_more_than_the_peak(self) -> None:
        """Else those that matter to later ones are not looked at."""
        booked: dict[tuple[int, str], Fraction] = {}
        for turn in self.s.all("""
            select s.limit_id, s.key, s.booked, s.peak, q.turn, q.slots, c."limit", c.slot_decay_per_second
            from pglimits.states s join pglimits.configs c using (limit_id) join pglimits.queue q using (limit_id, key)
            where q.pinned order by q.turn, q.lease_id
        """):
            place = (turn.limit_id, turn.key)
            booked[place] = max(booked.get(place, Fraction(turn.booked)), Fraction(turn.turn)) + turn.slots
            peak = max(turn.peak, turn.limit + 2 * turn.slot_decay_per_second / SECOND)
            assert booked[place] - Fraction(turn.turn) <= peak, "past the peak"

    def nobody_could_go_earlier(self) -> None:
        if not self.exact or any(slots > 1 for each in self.sleepers for slots in each.parts.values()):
            # A wide request may be waited for by narrow ones, which would find room before it.
            return
        for sleeper in self.sleepers:
            if not (sleeper.told and sleeper.alive):
                continue
            others = [each for each in self.sleepers if each is not sleeper]
            at, before = self.now, -1
            while at > before:
                before = at
                for name, slots in sleeper.parts.items():
                    here = [(max(each.goes_at, self.now), each.parts[name]) for each in others if name in each.parts]
                    at = self.buckets[name].has_room(self.now, here, slots, at)
            assert sleeper.goes_at <= at + ROUNDED, "later than it could go"

    def nobody_goes_before_whom_it_came_after(self) -> None:
        told = [each for each in self.sleepers if each.told and each.alive]
        for sleeper in told:
            for later in told:
                if (sleeper.slots, sleeper.parts) == (later.slots, later.parts) and sleeper.arrival < later.arrival:
                    assert sleeper.goes_at <= later.goes_at + ROUNDED, "out of order"

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        if not self.buckets:
            return
        self.look()
        self.no_turn_leaves_more_than_the_peak()
        if not self.sleepers:
            self.dead_moves = False
            levels = {name: self.s.limit(name).level for name in NAMES}
            for name, level in levels.items():
                buckets = [self.buckets[place] for place in self.places_of(name)]
                gone, charged = (
                    float(sum(amounts)) for amounts in zip(*((b.gone, b.level) for b in buckets), strict=True)
                )
                assert level >= gone - 1e-5, "what has gone was not charged"
                assert not self.exact or level <= charged + 1e-5, "more was charged than has gone"
            self.exact = self.exact or not any(levels.values())

    def teardown(self) -> None:
        self.pass_time(60 * SECOND)
        check_consistent(self.s)

    def pass_time(self, pause: int) -> None:
        until = self.now + pause
        while self.now < until:
            at = min([until, self.now + LOOK, *(each.goes_at for each in self.sleepers if each.goes_at > self.now)])
            for bucket in self.buckets.values():
                bucket.decay(at - self.now)
            self.now = at
            self.clock.freeze(START + (interval(at) or interval(0)))  # type: ignore[operator]
            self.let_go()
            self.look()

    # The steps.

    @rule(slots=asked_for, wait=waits, told=st.sampled_from([True, True, False]))
    def rate_limit(self, slots: dict[str, int], wait: int | None, told: bool) -> None:
        self.ids += 1
        slots = {name: min(each, self.widest, self.buckets[name].most) for name, each in slots.items()}
        self.reserve(Sleeper(UUID(int=self.ids), slots, wait, told, 0))

    @precondition(lambda self: self.sleepers)
    @rule(nth=which)
    def ask_again(self, nth: int) -> None:
        sleeper = self.sleepers[nth % len(self.sleepers)]
        if sleeper.parts and sleeper.parts == self.enforced(sleeper) and sleeper.alive:
            answer = self.ask(sleeper)
            assert answer.status == "granted"
            if sleeper.told:
                assert self.now + (micros(answer.wait) or 0) == sleeper.goes_at

    @precondition(lambda self: self.sleepers)
    @rule(nth=which)
    def give_up(self, nth: int) -> None:
        sleeper = self.sleepers[nth % len(self.sleepers)]
        if self.s.release(sleeper.lease_id):
            self.sleepers.remove(sleeper)
        else:
            assert not sleeper.alive or not sleeper.parts

    @precondition(lambda self: any(each.told and each.alive for each in self.sleepers))
    @rule(nth=which)
    def die(self, nth: int) -> None:
        mortal = [each for each in self.sleepers if each.told and each.alive]
        mortal[nth % len(mortal)].alive = False
        self.alive_until = self.now + 10 * SECOND
        self.exact = False

    @rule(pause=pauses)
    def time_passes(self, pause: int) -> None:
        self.pass_time(pause)

    def asleep_at(self, name: str) -> list[Sleeper]:
        return [each for each in self.sleepers if not each.parts.keys().isdisjoint(self.places_of(name))]

    def may_change(self, name: str, is_less: bool) -> bool:
        """Whether nobody sleeps for it who would have to be told of less."""
        deaf = any(not each.told for each in self.asleep_at(name))
        self.exact = self.exact and not deaf
        return not (deaf and is_less)

    def expect_later_turns(self) -> None:
        self.slower = True
        # Who is over several limits takes its new place when somebody looks, the dead too.
        self.dead_moves = self.dead_moves or any(not each.alive and len(each.parts) > 1 for each in self.sleepers)

    @rule(name=names, rate=rates)
    def change_the_rate(self, name: str, rate: Fraction) -> None:
        buckets = [self.buckets[place] for place in self.places_of(name)]
        if self.may_change(name, rate < buckets[0].rate):
            self.expect_later_turns()
            self.s.update(name, slot_decay_per_second=float(rate))
            for bucket in buckets:
                bucket.rate = rate

    @rule(name=names, most=limits)
    def change_the_limit(self, name: str, most: int) -> None:
        here = self.places_of(name)
        wanted = [slots for each in self.sleepers for place, slots in each.parts.items() if place in here]
        if self.may_change(name, most < self.buckets[here[0]].most) and most >= max(wanted, default=0):
            self.expect_later_turns()
            self.s.update(name, limit=most)
            for place in here:
                self.buckets[place].most = most

    @rule(name=names)
    def shut_and_open(self, name: str) -> None:
        """Those who slept stand in line meanwhile, in their order of arrival."""
        here = {each.lease_id: each for each in self.asleep_at(name)}
        if self.now <= self.alive_until or not all(each.told and each.alive for each in here.values()):
            return
        self.expect_later_turns()
        self.s.update(name, limit=0)
        assert {row.status for row in self.s.all("select * from pglimits.watch(%s::uuid[])", list(here))} <= {"queued"}
        self.s.update(name, limit=self.buckets[self.places_of(name)[0]].most)
        waiting = set(here)
        while waiting:
            rows = self.s.all("select * from pglimits.watch(%s::uuid[])", list(waiting))
            again = {row.lease_id for row in rows if row.status == "retry"}
            waiting -= {row.lease_id for row in rows if row.status == "granted"}
            for sleeper in [here[lease_id] for lease_id in again]:
                assert len(sleeper.slots) > 1
                sleeper.wait, sleeper.parts = None, self.enforced(sleeper)
                if any(slots > self.buckets[each].most for each, slots in sleeper.parts.items()):
                    self.s.release(sleeper.lease_id)
                    self.sleepers.remove(sleeper)
                    waiting.discard(sleeper.lease_id)
                elif self.ask(sleeper).status == "granted":
                    waiting.discard(sleeper.lease_id)
            assert again or not waiting, "nobody was called"

    @rule(name=names)
    def turn_off_or_on(self, name: str) -> None:
        active = not self.buckets[self.places_of(name)[0]].active
        self.s.update(name, active=active)
        for place in self.places_of(name):
            self.buckets[place].active = active
            for each in self.sleepers:
                slots = each.parts.pop(place, 0) if not active else 0
                self.exact = self.exact and not slots

    @rule(place=places, slots=st.integers(-6, 6))
    def adjust(self, place: str, slots: int) -> None:
        name, key = PLACES[place]
        if self.buckets[place].active:
            level = self.s.adjust(name, slots, key)
            beside = [self.s.adjust(name, 0, PLACES[each][1]) for each in self.places_of(name) if each != place]
            assert level + sum(beside) == pytest.approx(self.s.limit(name).level, abs=1e-5)
            self.buckets[place].adjust(slots)
            # It may fill a gap that was left in front of a turn.
            self.exact = self.exact and not (slots and self.sleepers)


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_over_several_limits_nobody_is_too_fast_or_later_than_needs_be(
    clock: Clock, connect: Callable[..., Any]
) -> None:
    session = Session(connect())
    session.run("set synchronous_commit = off")
    heard: list[str] = []
    session.connection.add_notify_handler(lambda notify: heard.append(notify.payload))
    session.run(f"listen {CHANNEL}")
    here = type("TurnsHere", (Turns,), {"s": session, "clock": clock, "heard": heard})
    run_state_machine_as_test(here, settings=PROFILE)
