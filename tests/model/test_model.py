"""The SQL functions against a model of them: the same random steps, the same answers, the same seen after each.

A few dozen lives of a few limits in each run of the tests. PGLIMITS_MODEL_EXAMPLES=20000 makes it that many, and other
ones each time (pytest's --hypothesis-seed repeats a run).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar
from uuid import UUID

import entry_points
import hypothesis.strategies as st
import pytest
from entry_points import START, attempt, micros, moment, tells, ways
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from limiter_model import HEARTBEAT, HORIZON, LIVENESS, SECOND, Answer, Limit, Model, Place, Request, Wrong
from machines import EXAMPLES, PROFILE, empty
from sqltest import Clock, Session, check_consistent

TICK = 1000
CHANNELS = ("pglimits_model_1", "pglimits_model_2")

names = st.sampled_from(["a", "a", "b", "b", "c"])
keys = st.sampled_from(["", "", "", "", "", "k"])
rated = st.sampled_from(["b", "b", "b", "c"])
few = st.sampled_from([1, 1, 1, 1, 1, 2, 2, 3])
limits = st.sampled_from([1, 2, 2, 3, 3, 4, 0])
some = st.sampled_from([1, 2, 3, 3])
# Without rounding in binary, so that both agree to the last digit.
rates = st.sampled_from(["0", "0", "1", "1/4", "5/2", "7", "20", "100", "1/8", "1/64"]).map(Fraction)
bounds = st.sampled_from([None, None, None, 0, 1, 2])
holders = st.sampled_from([None, {"pid": 1}, {"host": "h", "pid": 2}])
durations = st.sampled_from([SECOND, 2 * SECOND, 5 * SECOND, 20 * SECOND, 300 * SECOND])
pauses = st.one_of(
    st.sampled_from([1, 20_000, 60_000, 500_000, SECOND, 2 * SECOND, 4 * SECOND]),
    st.integers(1, 3 * SECOND),
    st.sampled_from([5 * SECOND, LIVENESS, 30 * SECOND, 4000 * SECOND]),
)
timeouts = st.sampled_from([0, 0, 50_000, SECOND, 10 * SECOND, None, None])
channels = st.sampled_from([CHANNELS[0], CHANNELS[0], CHANNELS[1], None])
which = st.integers(0, 30)
parts = st.lists(st.tuples(names, keys, few), min_size=1, max_size=3)
one_part = st.lists(st.tuples(names, keys, few), min_size=1, max_size=1)
clamps = st.sampled_from([False, False, True])
for_rates = st.sampled_from([False, False, True])
priorities = st.sampled_from([0, 0, 0, 1, -1])


class Lives(RuleBasedStateMachine):
    """A client for every request that waits: it looks when it was told to, or is notified; until its process dies.

    Those with a channel are of a process that listens there and calls in for all of them every 3 seconds, as the
    wrapper does. The others ask again, as plain SQL does.
    """

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
        # When the live client of a request that waits will look again; None: with its process.
        self.looks: dict[UUID, int | None] = {}
        self.beats: dict[str, int] = {}

    # What both are asked.

    def new_id(self) -> UUID:
        self.ids += 1
        return UUID(int=self.ids * 0x1F3_5792_4680_ACE1_3579_BDF0 % 2**128)

    def ask(self, requests: Sequence[Request], way: int = 0) -> list[Answer]:
        """Requests that differ in nothing but their ids and holders."""
        possible = [each for each in ways(requests) if tells(each) == (requests[0].channel is not None)]
        if any(self.is_to_come(each.lease_id) for each in requests) and entry_points.waiting in possible:
            possible.remove(entry_points.waiting)  # it would wait for a clock that stands still
        chosen = possible[way % len(possible)]
        known = any(self.model.is_known(request.lease_id) for request in requests)
        before = copy.deepcopy(self.model) if known or not tells(chosen) else None
        answers = [
            self.model.ask(request, tells(chosen), 1 if known else len(requests) - nth)
            for nth, request in enumerate(requests)
        ]
        replies = chosen(self.s, requests)
        wrong = [each for each in answers if each.status == "error" and (each.codes != ("PL006",) or not tells(chosen))]
        if wrong:
            self.model = before or self.model  # an error undoes what it found out on the way, and all that came with it
            answers = [wrong[0]] * len(answers)
        for nth, (request, answer, reply) in enumerate(zip(requests, answers, replies, strict=True)):
            self.agree(request, answer, reply, nth == 0)
            self.asked[request.lease_id] = request
            waited = self.looks.pop(request.lease_id, self) is not self
            if waited and answer.status == "error":
                self.end([request.lease_id], way)
            if answer.status == "queued":
                self.waits(request, answer)
        return answers

    def is_to_come(self, lease_id: UUID) -> bool:
        """Whether it was asked before, and its moment has not come."""
        lease = self.model.live(lease_id)
        return self.model.is_known(lease_id) and (lease is None or lease.acquired_at > self.model.now)

    def waits(self, request: Request, answer: Answer) -> None:
        if request.channel is not None:
            self.beats.setdefault(request.channel, self.model.now)
            self.looks[request.lease_id] = None if answer.wait is None else self.model.now + answer.wait
        else:
            self.looks[request.lease_id] = self.model.now + self.retry_after(request, answer)

    def retry_after(self, request: Request, answer: Answer) -> int:
        """In which time somebody who is queued by plain SQL is to ask again."""
        found = self.model.waiter(request.lease_id)
        deadline = None if found is None else found[1].deadline
        left = None if deadline is None else deadline - self.model.now
        return min(each for each in (answer.wait, left, HEARTBEAT) if each is not None)

    def agree(self, request: Request, answer: Answer, reply: dict[str, Any], is_first: bool) -> None:
        found = (request, answer, reply)
        assert reply["status"] == answer.status, found
        if answer.status == "error":
            assert reply["code"] in answer.codes, found
        if answer.status == "granted" and "expires_at" in reply and not request.for_rate:
            assert reply["expires_at"] == answer.expires_at, found
        if answer.status == "granted" and request.channel is not None:
            assert reply["wait"] == answer.wait, found
        if answer.status == "refused" and is_first:
            assert reply["wait"] == answer.wait, found
        if answer.status == "queued" and "position" in reply:
            assert reply["position"] == answer.position, found
        if answer.status == "queued":
            is_plain = request.channel is None
            assert reply["wait"] == (self.retry_after(request, answer) if is_plain else answer.wait), found
        if answer.status == "granted" and not request.for_rate and reply.get("fences") is not None:
            self.see_fences(request, reply["fences"])

    def see_fences(self, request: Request, fences: list[int | None]) -> None:
        lease = self.model.leases[request.lease_id]
        if len(fences) == 1:  # whatever the limit is called by now
            (place,) = lease.parts
            assert fences[0] is not None
            self.model.note_fence(lease, place, fences[0])
            return
        for name, key, fence in zip(request.names, request.keys, fences, strict=True):
            limit = self.model.limits.get(name)
            place = None if limit is None else limit.place(key)
            assert (fence is None) == (place not in lease.parts), (request, fences)
            if fence is not None and place is not None:
                self.model.note_fence(lease, place, fence)

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
        self.clock.freeze(START + entry_points.timedelta(microseconds=now))
        self.model.move_to(now)

    def hear(self) -> None:
        for payload in self.told:
            for line in payload.split("\n"):
                about, *rest = line.split(" ")
                lease_id = UUID(about)
                if lease_id in self.looks and self.asked[lease_id].channel in self.beats:
                    self.looks[lease_id] = self.model.now + (int(rest[0]) if len(rest) == 1 else 0)
        self.told.clear()

    def of(self, channel: str) -> list[UUID]:
        return sorted(lease_id for lease_id in self.looks if self.asked[lease_id].channel == channel)

    def pump(self) -> None:
        """Whoever has to look now does so, until nobody has to."""
        for _ in range(200):
            self.hear()
            due = sorted(lease_id for lease_id, at in self.looks.items() if at is not None and at <= self.model.now)
            listening = [lease_id for lease_id in due if self.asked[lease_id].channel is not None]
            beating = sorted(channel for channel, at in self.beats.items() if at <= self.model.now)
            if listening:
                self.watch(listening, only_news=False)
            elif due:
                self.ask([self.asked[due[0]]])
            elif beating:
                self.beat(beating[0])
            else:
                break
        else:
            pytest.fail(f"they look again and again: {due}")
        for lease_id in self.looks:
            # Whoever was granted something, or sent away, was told, if it listens.
            assert self.model.waiter(lease_id) or self.asked[lease_id].channel is None
        for place in self.model.places():
            if all(
                self.asked[each.request.lease_id].channel and each.request.lease_id in self.looks for each in place.line
            ):
                assert not self.is_idle(place), (place.limit.name, place.key)

    def is_idle(self, place: Place) -> bool:
        if not place.line or not place.limit.active:
            return False
        head = place.line[0]
        ready = self.model.ready_at(place, head.slots, head.request.for_rate)
        # Unless it looks at once, as something has just ended.
        soon = place.next_look is not None and place.next_look <= self.model.now + HORIZON // 10
        return head.parts is None and ready is not None and ready <= self.model.now + HORIZON // 2 and not soon

    def is_to_look(self, place: Place) -> bool:
        """The head was told to look for itself: whoever may lock other limits serves it, if its process has died."""
        head = place.line[0] if place.line else None
        return head is not None and head.looks_at is not None and head.looks_at <= self.model.now

    def beat(self, channel: str) -> None:
        again_in = self.model.beat(channel)
        assert micros(self.s.beat(channel)) == again_in
        mine = self.of(channel)
        if mine:
            self.beats[channel] = self.model.now + again_in
            self.watch(mine, only_news=True)
        else:
            del self.beats[channel]

    def watch(self, lease_ids: list[UUID], only_news: bool) -> None:
        expected = self.model.watch(lease_ids)
        rows = {row.lease_id: row for row in self.s.all("select * from pglimits._watch(%s, %s)", lease_ids, only_news)}
        again = []
        for lease_id, status in expected.items():
            if lease_id not in rows:
                assert only_news and status == "queued"
                self.looks[lease_id] = (
                    None if self.looks[lease_id] is None else max(self.looks[lease_id], self.model.now + 1)
                )  # type: ignore[type-var]
                continue
            row = rows.pop(lease_id)
            assert row.status == status, (row, status)
            if status == "queued":
                answer = self.model.answer_known(self.asked[lease_id], True)
                assert answer is not None and (micros(row.seconds) == answer.wait or only_news), (row, answer)
                self.looks[lease_id] = None if answer.wait is None else self.model.now + answer.wait
                continue
            del self.looks[lease_id]
            lease = self.model.live(lease_id)
            if status == "retry":
                again.append(lease_id)
            elif lease is not None:
                assert moment(row.expires_at) == lease.expires_at
                assert micros(row.seconds) == max(lease.acquired_at - self.model.now, 0)
                if len(lease.parts) == 1:
                    (place,) = lease.parts
                    self.model.note_fence(lease, place, row.fence)
        assert not rows
        for lease_id in again:
            self.move_to(self.model.now + TICK)
            self.ask([self.asked[lease_id]])

    # What is to be seen.

    def see(self) -> None:
        model, s = self.model, self.s
        with s.connection.pipeline():
            limits, held, waiters, keys_ = (
                s.connection.execute(f"select * from pglimits.{view}")
                for view in ("limits", "holders", "waiters", "keys")
            )
        shown = {row.name: row for row in limits}
        assert [*shown] == sorted(model.limits)
        for limit in model.limits.values():
            self.see_limit(limit, shown[limit.name])
        self.see_holders(held.fetchall())
        self.see_waiters(waiters.fetchall())
        for row in keys_:
            place = model.limits[row.name].place(row.key)
            assert (row.held, row.waiting) == (model.held(place), len(model.waiting(place)))

    def see_limit(self, limit: Limit, row: Any) -> None:
        model, places = self.model, limit.places.values()
        assert (row.limit, row.active, row.slot_decay_per_second, row.max_waiters, row.description) == (
            limit.most, limit.active, float(limit.rate), limit.max_waiters, limit.description
        )  # fmt: skip
        assert row.held == sum(model.held(place) for place in places)
        assert row.waiting == sum(len(model.waiting(place)) for place in places)
        level = sum((model.level(place) for place in places), Fraction(0)) if limit.rate else 0
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
            assert (row.slots, row.priority, moment(row.acquired_at), moment(row.expires_at)) == (
                part.slots, request.priority, lease.acquired_at, lease.expires_at
            )  # fmt: skip
            assert row.holder == request.holder or (request.holder is None and request.channel is None)

    def see_waiters(self, rows: list[Any]) -> None:
        shown: dict[tuple[str, str], list[Any]] = {}
        for row in rows:
            shown.setdefault((row.name, row.key), []).append(row)
        for place in self.model.places():
            expected = [
                (each.request.lease_id, each.slots, each.request.priority, nth, each.arrival)
                for nth, each in enumerate(self.model.waiting(place), 1)
            ]
            assert expected == [
                (row.lease_id, row.slots, row.priority, row.position, moment(row.waiting_since))
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

    def held(self) -> list[UUID]:
        return [lease.request.lease_id for lease in self.model.live_leases()]

    def in_line(self) -> list[UUID]:
        return [each.request.lease_id for place in self.model.places() for each in place.line]

    # The steps.

    @initialize(most=st.tuples(some, some, some), rate=rates, missing=st.sampled_from([False, False, True]))
    def begin(self, most: tuple[int, int, int], rate: Fraction, missing: bool) -> None:
        given = (("a", most[0], Fraction(0)), ("b", most[1], Fraction(5, 2)), ("c", most[2], rate))
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
        more["clamp"] = more.get("clamp", False) and not more.get("for_rate")
        return Request(
            self.new_id(), tuple(part[0] for part in parts), tuple(part[2] for part in parts),
            tuple(part[1] for part in parts), **more,
        )  # fmt: skip

    @rule(
        parts=one_part | parts, timeout=timeouts, duration=durations, priority=priorities, for_rate=for_rates,
        holder=holders, strict=st.sampled_from([False, False, False, True]), channel=channels, way=which,
        look_first=st.booleans(), clamp=clamps,
    )  # fmt: skip
    def ask_for(self, parts: Any, way: int, look_first: bool, **more: Any) -> None:
        request = self.request(parts, **more)
        peeked = entry_points.peek(self.s, request) if look_first and not request.clamp else None
        due = any(self.model.is_due(place) or self.is_to_look(place) for place in self.model.places())
        (answer,) = self.ask([request], way)
        if peeked is not None and not due and answer.wait in (None, 0) and answer.codes != ("PL006",):
            # What is due to others, it does not reckon with.
            assert peeked["status"] == answer.status, (peeked, answer)
            assert peeked.get("code") in (answer.codes or (None,)), (peeked, answer)

    @rule(name=names, slots=few, priority=priorities, channel=channels, for_rate=for_rates, clamp=clamps)
    def wait_for(self, name: str, slots: int, **more: Any) -> None:
        self.ask([self.request([(name, "", slots)], timeout=None, **more)])

    @rule(slots=few, channel=channels, for_rate=for_rates, timeout=timeouts)
    def wait_for_both(self, slots: int, **more: Any) -> None:
        self.ask([self.request([("a", "", slots), ("b", "", 1)], **more)])

    @rule(nth=which, priority=st.sampled_from([0, 0, 1]), times=st.integers(1, 4), channel=channels)
    def wait_for_several_that_are_busy(self, nth: int, priority: int, times: int, channel: str | None) -> None:
        """Others take all that it needs, again and again."""
        busy = [
            (limit.name, key, limit.most)
            for limit in self.model.limits.values() for key in ("", "k") if limit.most and not limit.rate
        ]  # fmt: skip
        if len(busy) < 2:
            return
        both = [busy[nth % len(busy)], busy[(nth + 1) % len(busy)]]
        self.take_all(both)
        self.ask_a_tick_later(
            self.request([(name, key, 1) for name, key, _ in both], timeout=None, priority=priority, channel=channel)
        )
        for _ in range(times):
            self.take_all(both)
            for name, key, _ in both:
                place = self.model.limits[name].place(key)
                held = [each.request.lease_id for each in self.model.live_leases() if place in each.parts]
                if held:
                    self.end([min(held)], 0)
                self.the_same_is_to_be_seen()

    def take_all(self, parts: list[tuple[str, str, int]]) -> None:
        for part in parts:
            self.ask_a_tick_later(self.request([part], timeout=None, channel=CHANNELS[1]))

    def ask_a_tick_later(self, request: Request) -> None:
        self.pump()
        self.move_to(self.model.now + TICK)
        self.ask([request])

    @rule(
        part=one_part, count=st.integers(2, 5), timeout=timeouts, duration=durations, for_rate=for_rates,
        priority=priorities, channel=st.sampled_from(CHANNELS), again=st.none() | which, clamp=clamps,
    )  # fmt: skip
    def several_alike(self, part: Any, count: int, again: int | None, **more: Any) -> None:
        requests = [self.request(part, **more) for _ in range(count)]
        known = [each for each in self.asked.values() if replace(each, lease_id=requests[0].lease_id) == requests[0]]
        if again is not None and known:
            requests[again % count] = known[again % len(known)]
        self.ask(requests)

    @precondition(lambda self: self.asked)
    @rule(nth=which, way=which)
    def repeat(self, nth: int, way: int) -> None:
        """A reply was lost."""
        lease_id = self.among(list(self.asked), nth)
        lease = self.model.live(lease_id)
        if lease is None or lease.whole:
            self.ask([self.asked[lease_id]], way)

    @precondition(lambda self: self.held() or self.in_line())
    @rule(nth=which, other=st.sampled_from(["slots", "kind"]), way=which)
    def give_the_id_of_another_request(self, nth: int, other: str, way: int) -> None:
        request = self.asked[self.among(self.held() + self.in_line(), nth)]
        if other == "slots":
            request = replace(request, slots=tuple(slots + 1 for slots in request.slots))
        else:
            request = replace(request, for_rate=not request.for_rate)
        asked = self.asked[request.lease_id]
        looks = {each: at for each, at in self.looks.items() if each == request.lease_id}
        if all(name in self.model.limits for name in request.names) and not self.model.is_same(request):
            (answer,) = self.ask([request], way)
            assert answer.codes == ("PL001",)
            self.asked[request.lease_id] = asked
            self.looks.update({each: at for each, at in looks.items() if each in self.in_line()})

    @precondition(lambda self: self.looks)
    @rule(nth=which, ask_again=st.booleans(), way=which)
    def time_out(self, nth: int, ask_again: bool, way: int) -> None:
        lease_id = self.among(list(self.looks), nth)
        if ask_again:
            self.ask([replace(self.asked[lease_id], timeout=0)], way)
        else:
            self.end([lease_id], way)

    @precondition(lambda self: self.held())
    @rule(nth=which, way=which)
    def release_one(self, nth: int, way: int) -> None:
        self.end([self.among(self.held(), nth)], way)

    @precondition(lambda self: self.asked)
    @rule(nths=st.lists(which, min_size=1, max_size=4), known=st.booleans(), way=which)
    def release(self, nths: list[int], known: bool, way: int) -> None:
        lease_ids = list(self.asked) if known else self.held()
        if lease_ids:
            self.end(sorted({self.among(lease_ids, nth) for nth in nths}), way)

    def end(self, lease_ids: list[UUID], way: int) -> None:
        for lease_id in lease_ids:
            self.looks.pop(lease_id, None)
        before = copy.deepcopy(self.model)
        live, own = entry_points.release(self.s, lease_ids, way)
        assert before.release(lease_ids, own) == live
        self.model = before

    @precondition(lambda self: self.asked)
    @rule(nths=st.lists(which, min_size=1, max_size=3), duration=st.none() | durations, way=which)
    def renew(self, nths: list[int], duration: int | None, way: int) -> None:
        lease_ids = sorted({self.among(list(self.asked), nth) for nth in nths})
        expected = {lease_id: self.model.renew(lease_id, duration) for lease_id in lease_ids}
        assert entry_points.renew(self.s, lease_ids, duration, way) == expected

    @precondition(lambda self: self.held())
    @rule(nth=which, used=st.lists(st.sampled_from([0, 1, 2, 5, 9, 100]), min_size=1, max_size=3))
    def settle(self, nth: int, used: list[int]) -> None:
        lease_id = self.among(self.held(), nth)
        lease = self.model.live(lease_id)
        places = [] if lease is None else sorted(lease.parts, key=Place.order)
        wanted = dict(zip(places[nth % len(places) :] if places else [], used, strict=False))
        if lease is None:  # it has ended: whatever is said of it
            named = dict.fromkeys(zip(self.asked[lease_id].names, self.asked[lease_id].keys, strict=True), 1)
        else:
            named = {(place.limit.name, place.key): slots for place, slots in wanted.items()}
        expected, live = self.both(
            lambda: self.model.settle(lease_id, wanted),
            lambda: self.s.value(
                "select pglimits.settle_all(%s::uuid, %s::text[], %s::int[], %s::text[])", lease_id,
                [name for name, _ in named], list(named.values()), [key for _, key in named],
            ),
        )  # fmt: skip
        assert live == expected

    @precondition(lambda self: self.looks)
    @rule(nth=which)
    def die(self, nth: int) -> None:
        """Somebody who waits in plain SQL, or a whole process."""
        lease_id = self.among(list(self.looks), nth)
        channel = self.asked[lease_id].channel
        for each in [lease_id] if channel is None else self.of(channel):
            del self.looks[each]
        if channel is not None:
            self.beats.pop(channel, None)

    @precondition(lambda self: self.in_line())
    @rule(nth=which)
    def come_back(self, nth: int) -> None:
        """A process that had stopped goes on."""
        lease_id = self.among(self.in_line(), nth)
        channel = self.asked[lease_id].channel
        for each in [lease_id] if channel is None else self.in_line():
            if self.asked[each].channel == channel:
                self.looks.setdefault(each, self.model.now)
        if channel is not None:
            self.beats.setdefault(channel, self.model.now)

    @rule(name=rated, key=keys, slots=st.sampled_from([0, 1, 2, 5, -1, -2, -100]))
    def adjust(self, name: str, key: str, slots: int) -> None:
        expected, level = self.both(
            lambda: self.model.adjust(name, slots, key), lambda: self.s.adjust(name, slots, key)
        )  # fmt: skip
        if expected is not None:
            assert level == pytest.approx(float(expected), rel=1e-12, abs=1e-9)

    @rule(idle=st.sampled_from([1, 3600]))
    def sweep(self, idle: float) -> None:
        """Nothing is to be seen of it."""
        if not any(each.parts for place in self.model.places() for each in place.line):
            for place in sorted(self.model.places(), key=Place.order):
                self.swept(place)
            waited_for = {each.request.channel for place in self.model.places() for each in place.line}
            for channel, until in [*self.model.processes.items()]:
                if until <= self.model.now - 60 * SECOND and channel not in waited_for:
                    del self.model.processes[channel]
            self.s.sweep(idle)
            used = {(row.name, row.key) for row in self.s.all("select name, key from pglimits.keys")}
            for place in self.model.places():
                if (place.limit.name, place.key) not in used:
                    assert not (self.model.held(place) or place.line or self.model.level(place))
                    place.next_expiry = None

    def swept(self, place: Place) -> None:
        model = self.model
        is_due = any(place in lease.parts and lease.expires_at <= model.now for lease in model.leases.values())
        is_due = is_due or any(place in told.places and told.until <= model.now for told in model.told.values())
        is_due = is_due or any(until <= model.now for _, until in place.kept.values())
        if is_due or len(model.waiting(place)) < len(place.line):
            model.take_expired(place)
            place.line = model.waiting(place)
            if place.limit.active and place.line:
                model.serve(place, own=False)

    @rule(pause=pauses)
    def time_passes(self, pause: int) -> None:
        # Whoever waits looks every few seconds.
        until = self.model.now + (min(pause, 12 * SECOND) if self.looks else pause)
        while self.model.now < until:
            events = [
                at for at in (*self.looks.values(), *self.beats.values()) if at is not None and at > self.model.now
            ]
            self.move_to(min([until, *events]))
            self.pump()

    @rule(
        call=st.sampled_from(
            [
                "acquire('a', slots => 0)", "acquire('a', slots => null)", "acquire('a/b')", "acquire('{a,b}')",
                "acquire('a', key => null)", "acquire('a', lease_duration => 0.5)",
                "acquire('a', timeout_seconds => -1)", "acquire('a', timeout_seconds => 'NaN')", "acquire_all('{}')",
                "acquire_all('{a,b}', slots => '{1,1,1}')", "acquire('b', lease_duration => 'NaN')",
                "rate_limit('a', slots => -1)", "renew_all('{}', 0)", "adjust('a', null)", "create_limit('a', -1)",
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
    session.connection.add_notify_handler(lambda notify: told.append(notify.payload))
    for channel in CHANNELS:
        session.run(f"listen {channel}")
    here = type("LivesHere", (Lives,), {"s": session, "clock": clock, "told": told})
    run_state_machine_as_test(here, settings=PROFILE)
