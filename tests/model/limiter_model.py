"""What limits promise, in Python, with a clock that is passed in and no regard to speed.

Times are whole microseconds and levels are fractions, so nothing is rounded but waits, up to the next microsecond.
What the promises leave open (fences, the moment from which a waiter is dead) is told to the model, which checks that
they allow it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, TypeAlias
from uuid import UUID

SECOND = 1_000_000
LIVENESS = 10 * SECOND
# For how long a place in line is kept at first.
KEPT = SECOND // 10
# A sign of life may be written down only when so much of the last one is used up.
SURELY_ALIVE = 7 * SECOND


class Wrong(Exception):
    """A request with an error: the SQLSTATEs with which it may be answered."""

    def __init__(self, *codes: str) -> None:
        super().__init__(*codes)
        self.codes = codes


@dataclass(eq=False)
class Limit:
    name: str
    most: int
    rate: Fraction
    active: bool
    max_waiters: int | None
    description: str | None
    number: int
    fence_floor: int
    former_names: set[str] = field(default_factory=set)
    places: dict[str, Place] = field(default_factory=dict)

    def place(self, key: str) -> Place:
        if key not in self.places:
            self.places[key] = Place(self, key)
        return self.places[key]


@dataclass(eq=False)
class Place:
    """A (limit, key)."""

    limit: Limit
    key: str
    level: Fraction = Fraction(0)
    line: list[Waiter] = field(default_factory=list)
    sleepers: list[Sleeper] = field(default_factory=list)
    # Of each grant, as far as they were told: its number and its fence.
    fences: list[tuple[int, int]] = field(default_factory=list)

    def order(self) -> tuple[int, str]:
        return (self.limit.number, self.key)

    def everybody(self) -> list[UUID]:
        """Who stands in line here, or sleeps."""
        return [each.request.lease_id for each in self.line] + [each.request.lease_id for each in self.sleepers]


@dataclass(eq=False)
class Waiter:
    """Stands in line."""

    request: Request
    slots: int
    arrival: int
    several: bool
    alive_until: int
    # Of one over several: all the limits that it needs; whether one of them was changed since it asked; whether it was
    # called, how often in vain; and until when it keeps this place while it waits for another limit.
    over: frozenset[Limit] = frozenset()
    outdated: bool = False
    called: bool = False
    in_vain: int = 0
    kept_until: int | None = None
    # Of one that slept before: until when it is alive for certain.
    surely_until: int | None = None

    def order(self) -> tuple[int, int]:
        return (-self.request.priority, self.arrival)


@dataclass(eq=False)
class Sleeper:
    """Has a turn ahead, when so many slots more will have decayed."""

    request: Request
    slots: int
    arrival: int
    ahead: Fraction
    surely_until: int
    alive_until: int


@dataclass(eq=False)
class Passed:
    """Had a turn, which has come."""

    parts: dict[Place, int]
    at: int


@dataclass(eq=False)
class Part:
    slots: int
    fence: int | None = None


@dataclass(eq=False)
class Lease:
    request: Request
    parts: dict[Place, Part]
    acquired_at: int
    expires_at: int
    duration: int
    claimed: bool = True
    whole: bool = True
    number: int = 0


@dataclass(frozen=True)
class Request:
    lease_id: UUID
    names: tuple[str, ...]
    slots: tuple[int, ...]
    keys: tuple[str, ...]
    wait: int | None = 0
    duration: int = 300 * SECOND
    priority: int = 0
    holder: Any = None
    strict: bool = False
    for_rate: bool = False

    def may_wait(self) -> bool:
        return self.wait is None or self.wait > 0


@dataclass(frozen=True)
class Answer:
    status: str
    expires_at: int | None = None
    retry_after: int | None = None
    wait: int | None = None
    position: int | None = None
    codes: tuple[str, ...] = ()
    # For each name, the (limit, key) whose fence is told.
    places: tuple[Place | None, ...] = ()


Parts: TypeAlias = dict[Place, int]


class Model:
    def __init__(self, now: int = 0) -> None:
        self.now = now
        self.limits: dict[str, Limit] = {}
        self.leases: dict[UUID, Lease] = {}
        self.fence_floor = 0
        self.numbers = 0
        self.passed: dict[UUID, Passed] = {}
        # What the names of each request stood for when it last asked.
        self.named: dict[UUID, tuple[Place | None, ...]] = {}
        # Waiters that died. The place of one that comes back may be kept.
        self.lost: dict[UUID, int] = {}

    # Looking.

    def live(self, lease_id: UUID) -> Lease | None:
        lease = self.leases.get(lease_id)
        return lease if lease is not None and lease.expires_at > self.now and lease.parts else None

    def live_leases(self) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.expires_at > self.now and lease.parts]

    def places(self) -> list[Place]:
        return [place for limit in self.limits.values() for place in limit.places.values()]

    def held(self, place: Place) -> int:
        return sum(lease.parts[place].slots for lease in self.live_leases() if place in lease.parts)

    def waiting(self, place: Place) -> list[Waiter]:
        return [waiter for waiter in place.line if waiter.alive_until > self.now]

    def sleeping(self, place: Place) -> list[Sleeper]:
        return [sleeper for sleeper in place.sleepers if sleeper.alive_until > self.now]

    def lost_level(self, place: Place) -> int:
        """The slots of those who sleep and are dead."""
        return sum(sleeper.slots for sleeper in place.sleepers if sleeper.alive_until <= self.now)

    def waiter(self, lease_id: UUID) -> tuple[Place, Waiter] | None:
        found = [(p, w) for p, w in self.in_line(lease_id) if w.kept_until is None]
        assert len(found) <= 1
        return found[0] if found else None

    def in_line(self, lease_id: UUID) -> list[tuple[Place, Waiter]]:
        """Where it waits, and where it keeps its place meanwhile."""
        found = [(p, w) for p in self.places() for w in p.line if w.request.lease_id == lease_id]
        return sorted(found, key=lambda each: each[1].kept_until is not None)

    def sleeper(self, lease_id: UUID) -> tuple[Place, Sleeper] | None:
        found = [(p, w) for p in self.places() for w in p.sleepers if w.request.lease_id == lease_id]
        assert len(found) <= 1
        return found[0] if found else None

    def is_known(self, lease_id: UUID) -> bool:
        known = self.live(lease_id) or self.sleeper(lease_id) or self.waiter(lease_id) or self.passed.get(lease_id)
        return known is not None

    def is_full(self, place: Place) -> bool:
        bound = place.limit.max_waiters
        waiting = [waiter for waiter in self.waiting(place) if waiter.kept_until is None]
        return bound is not None and len(waiting) + len(self.sleeping(place)) >= bound

    def find(self, name: str, lease_id: UUID | None) -> Limit | None:
        """The limit of that name; or, for who waits, holds or had a turn, the one that had that name then."""
        named = self.limits.get(name)
        if lease_id is None or (named is not None and self.is_at(named, lease_id)):
            return named
        for limit in sorted(self.limits.values(), key=lambda limit: limit.number):
            if name in limit.former_names and self.is_at(limit, lease_id):
                return limit
        return named

    def is_at(self, limit: Limit, lease_id: UUID) -> bool:
        """Whether that id holds slots of a limit, waits for them, or had a turn."""
        lease, asleep = self.leases.get(lease_id), self.sleeper(lease_id)
        places = [] if lease is None else [*lease.parts]
        places += self.passed[lease_id].parts if lease_id in self.passed else []
        places += [asleep[0]] if asleep is not None else []
        in_line = self.in_line(lease_id)
        return any(place.limit is limit for place in places) or any(
            place.limit is limit or limit in waiter.over for place, waiter in in_line
        )

    def is_behind(self, priority: int, mine: Waiter | None, place: Place) -> bool:
        """Whether somebody in line goes before: a newcomer passes only those of lower priority."""
        if not place.line:
            return False
        head = place.line[0]
        return head.request.priority >= priority if mine is None else head.order() < mine.order()

    def has_room(self, place: Place, slots: int) -> bool:
        limit = place.limit
        return self.held(place) + slots <= limit.most and (not limit.rate or place.level + slots <= limit.most)

    def turn_in(self, place: Place, slots: int) -> int:
        return self.until(place, place.level + slots - place.limit.most)

    @staticmethod
    def until(place: Place, ahead: Fraction) -> int:
        return math.ceil(ahead * SECOND / place.limit.rate) if ahead > 0 else 0

    # Time.

    def move_to(self, now: int) -> None:
        was = self.now
        passed = Fraction(now - was, SECOND)
        self.now = now
        for place in self.places():
            decayed = place.limit.rate * passed
            place.level = max(place.level - decayed, Fraction(0))
            for sleeper in place.sleepers:
                sleeper.ahead -= decayed
            self.let_go(place, was)
        self.leases = {lease_id: lease for lease_id, lease in self.leases.items() if lease.expires_at > now}

    def let_go(self, place: Place, since: int | None = None) -> None:
        """Those whose turn has come are no longer asleep. It came now, or by mere time since a moment."""
        for sleeper in [each for each in place.sleepers if each.ahead <= 0]:
            place.sleepers.remove(sleeper)
            came = self.now
            if since is not None and place.limit.rate:
                came = max(since, self.now + math.floor(sleeper.ahead * SECOND / place.limit.rate))
            passed = self.passed.setdefault(sleeper.request.lease_id, Passed({}, came))
            passed.parts[place] = sleeper.slots

    def settle(self, place: Place) -> None:
        """What time or a change has made possible: the dead are gone, and the head of the line goes while it fits."""
        if not place.limit.active:
            return
        self.give_back(place, [each for each in place.sleepers if each.alive_until <= self.now])
        for dead in [each for each in place.line if each.alive_until <= self.now]:
            place.line.remove(dead)
            if dead.kept_until is None:
                self.lost[dead.request.lease_id] = dead.arrival
        while place.line and self.goes(place):
            head = place.line[0]
            if head.several:
                head.called = head.kept_until is None
                return
            self.hand_over(place, place.line.pop(0))

    def goes(self, place: Place) -> bool:
        """Whether the head of the line can go: on to its slots, or to a turn."""
        head = place.line[0]
        return place.limit.most > 0 if head.request.for_rate else self.has_room(place, head.slots)

    def is_idle(self, place: Place) -> bool:
        """Whether something is free that the head of the line waits for, and it was not told."""
        if not place.limit.active or not place.line or place.line[0].kept_until is not None:
            return False
        return not place.line[0].called and self.goes(place)

    @staticmethod
    def is_hopeless(place: Place, each: Waiter | Sleeper) -> bool:
        """It can never be granted now: it is told, asks again, and gets the error."""
        limit = place.limit
        return (each.slots > limit.most > 0) or (each.request.for_rate and not limit.rate)

    def hand_over(self, place: Place, head: Waiter) -> None:
        if head.request.for_rate:
            self.take_turn(place, head.request, head.slots, head.arrival, head.alive_until, head.surely_until)
        else:
            # Until it takes it up, the lease ends when the waiter would have died.
            ends = min(head.alive_until, self.now + head.request.duration)
            self.take_slots(head.request, {place: head.slots}, ends, claimed=False)

    def take_turn(
        self,
        place: Place,
        request: Request,
        slots: int,
        arrival: int,
        alive_until: int,
        surely_until: int | None = None,
    ) -> int:
        ahead = place.level + slots - place.limit.most
        place.level += slots
        surely_until = alive_until if surely_until is None else surely_until
        place.sleepers.append(Sleeper(request, slots, arrival, ahead, surely_until, alive_until))
        wait = self.until(place, ahead)
        self.let_go(place)
        return wait

    def take_slots(self, request: Request, parts: Parts, ends: int, claimed: bool) -> None:
        for place, slots in parts.items():
            if place.limit.rate:
                place.level += slots
        self.numbers += 1
        kept = {place: Part(slots) for place, slots in parts.items()}
        self.leases[request.lease_id] = Lease(
            request, kept, self.now, ends, request.duration, claimed, number=self.numbers
        )  # fmt: skip

    def give_back(self, place: Place, given_up: list[Sleeper]) -> None:
        """Turns that have not come go to those behind."""
        for gone in given_up:
            at = place.sleepers.index(gone)
            place.sleepers.remove(gone)
            place.level -= gone.slots
            for behind in place.sleepers[at:]:
                behind.ahead -= gone.slots
        self.let_go(place)

    # Asking.

    def check(self, request: Request) -> tuple[Parts, Wrong | None]:
        """Its parts that are enforced, in the order in which they are looked at, and why it can never be granted."""
        found = [self.find(name, request.lease_id) for name in request.names]
        named = tuple(
            limit.place(key) if limit is not None and limit.active else None
            for limit, key in zip(found, request.keys, strict=True)
        )
        self.named[request.lease_id] = named
        parts: Parts = {}
        for place, slots in zip(named, request.slots, strict=True):
            if place is not None:
                parts[place] = parts.get(place, 0) + slots
        codes = set()
        for place, slots in parts.items():
            if request.for_rate and not place.limit.rate:
                codes.add("PL005")
            if slots > place.limit.most > 0:
                codes.add("PL004")
        if request.strict and None in found:
            codes = {"PL002"}
        ordered = {place: parts[place] for place in sorted(parts, key=Place.order)}
        return ordered, Wrong(*codes) if codes else None

    def ask(
        self, requests: list[Request], refused: Mapping[UUID, int | None] | None = None, full: Collection[UUID] = ()
    ) -> list[Answer]:
        """Answers requests in their order, as of one moment.

        refused: who was refused, with its retry_after, in case that it was certain before the others of its batch took
        anything: that takes no lock. full: who was told that the queue is full, likewise.
        """
        checked = [(request, *self.check(request)) for request in requests]
        # What is wrong is no matter to who has what it asks for.
        touched = [
            place
            for request, parts, wrong in checked
            if wrong is None or self.is_known(request.lease_id)
            for place in parts
        ]  # fmt: skip
        for place in touched:
            self.settle(place)
        news = [
            (request, parts)
            for request, parts, wrong in checked
            if wrong is None and parts and not self.is_known(request.lease_id)
        ]
        certain = {
            request.lease_id: refusal
            for request, parts in news
            if (refusal := self.refusal(request, parts, None)) is not None
        }
        certainly_full = {request.lease_id for request, parts in news if self.finds_it_full(request, parts)} & {*full}
        answers = []
        for request, parts, wrong in checked:
            try:
                if wrong is not None:
                    answers.append(self.decide(request, parts, wrong))
                    continue
                refusal = certain.get(request.lease_id)
                if request.lease_id in certainly_full:
                    raise Wrong("PL006")
                if refusal and refused and refused.get(request.lease_id, -1) == refusal.retry_after:
                    answers.append(refusal)
                    continue
                answers.append(self.decide(request, parts))
            except Wrong as wrong:
                answers.append(Answer("error", codes=wrong.codes))
        for place in touched:
            self.settle(place)
        return answers

    def decide(self, request: Request, parts: Parts, wrong: Wrong | None = None) -> Answer:
        if (lease := self.live(request.lease_id)) is not None:
            return self.answer_again(request, parts, lease)
        if (asleep := self.sleeper(request.lease_id)) is not None:
            place, sleeper = asleep
            if not request.for_rate or parts != {place: sleeper.slots}:
                raise Wrong("PL001")
            return Answer("granted", wait=self.until(place, sleeper.ahead))
        if (passed := self.passed.get(request.lease_id)) is not None:
            if not request.for_rate or any(parts.get(place) != slots for place, slots in passed.parts.items()):
                raise Wrong("PL001")
            return Answer("granted", wait=0)
        mine: Waiter | None = None
        if in_line := self.in_line(request.lease_id):
            at, mine = in_line[0]
            if mine.request.for_rate != request.for_rate or parts.get(at) != mine.slots:
                raise Wrong("PL001")
            if wrong is not None:
                raise wrong
            again = replace(mine, in_vain=mine.in_vain + mine.called)
            self.leave(request, in_line, self.blocked(request, parts, mine))
            mine = again
        if wrong is not None:
            raise wrong
        if not parts:
            return Answer("unlimited")
        if (refusal := self.refusal(request, parts, mine)) is not None:
            return refusal
        if mine is None and self.finds_it_full(request, parts):
            raise Wrong("PL006")
        blocked = self.blocked(request, parts, mine)
        if blocked:
            return self.enqueue(request, blocked[0], parts, mine)
        if request.for_rate:
            return self.reserve(request, parts, mine)
        ends = self.now + request.duration
        self.take_slots(request, parts, ends, claimed=True)
        return Answer("granted", expires_at=ends, places=self.named[request.lease_id])

    def leave(self, request: Request, in_line: list[tuple[Place, Waiter]], blocked: list[Place]) -> None:
        """Its places in line go, but for those that it keeps while it waits on.

        If it is first to have what it still needs, that is where it was called in vain for the third time, or more.
        """
        waits = blocked and request.may_wait() and blocked[0].limit.most > 0
        for place, waiter in in_line:
            first = waits and not any(each.order() < waiter.order() for each in blocked[0].line)
            if first and place is not blocked[0]:
                if waiter.called and waiter.in_vain >= 2:
                    waiter.kept_until = self.now + min(self.now - waiter.arrival, KEPT * 2 ** (waiter.in_vain - 2))
                waiter.called = False
                if waiter.kept_until is not None and waiter.kept_until > self.now:
                    waiter.alive_until = min(self.now + LIVENESS, waiter.kept_until)
                    continue
            place.line.remove(waiter)

    def blocked(self, request: Request, parts: Parts, mine: Waiter | None) -> list[Place]:
        """Where it would have to stand in line."""
        return [
            place
            for place, slots in parts.items()
            if self.is_behind(request.priority, mine, place)
            or not (place.limit.most if request.for_rate else self.has_room(place, slots))
        ]

    def finds_it_full(self, request: Request, parts: Parts) -> bool:
        """Whether it would have to wait, in line or for its turn, where no more may."""
        if self.refusal(request, parts, None) is not None:
            return False
        blocked = self.blocked(request, parts, None)
        ahead = request.for_rate and any(self.turn_in(place, slots) for place, slots in parts.items())
        return any(self.is_full(place) for place in (blocked[:1] or (parts if ahead else ())))

    def refusal(self, request: Request, parts: Parts, mine: Waiter | None) -> Answer | None:
        """Why it may not go, and may not wait so long; with the time after which it might go, if time alone will do."""
        blocked = self.blocked(request, parts, mine)
        if blocked and request.may_wait():
            return None
        if blocked:
            by_time = not any(
                self.is_behind(request.priority, mine, place) or self.held(place) + parts[place] > place.limit.most
                for place in blocked
            )
            return Answer(
                "refused",
                retry_after=max(self.turn_in(place, parts[place]) for place in blocked) if by_time else None,
            )
        turn_in = max((self.turn_in(place, slots) for place, slots in parts.items() if request.for_rate), default=0)
        if request.wait is not None and turn_in > request.wait:
            return Answer("refused", retry_after=turn_in)
        return None

    def reserve(self, request: Request, parts: Parts, mine: Waiter | None) -> Answer:
        arrival = self.now if mine is None else mine.arrival
        wait = max(self.turn_in(place, slots) for place, slots in parts.items())
        assert wait == 0 or len(parts) == 1, "turns ahead on several limits are for the model of turns"
        for place, slots in parts.items():
            self.take_turn(place, request, slots, arrival, self.now + LIVENESS)
        return Answer("granted", wait=wait)

    def enqueue(self, request: Request, place: Place, parts: Parts, mine: Waiter | None) -> Answer:
        arrival = self.now if mine is None else mine.arrival
        # What is not enforced now may be when it can go.
        several = len(parts) > 1 or None in self.named[request.lease_id]
        over = frozenset(each.limit for each in parts) if several else frozenset()
        waiter = Waiter(request, parts[place], arrival, several, self.now + LIVENESS, over)
        if mine is not None:
            waiter.in_vain = mine.in_vain
        place.line.append(waiter)
        place.line.sort(key=Waiter.order)
        return Answer("queued", position=self.waiting(place).index(waiter) + 1)

    def answer_again(self, request: Request, parts: Parts, lease: Lease) -> Answer:
        """Once: who asks again is told of the lease that the first call took."""
        if request.for_rate:
            raise Wrong("PL001")
        for place, part in lease.parts.items():
            if parts.get(place) != part.slots and place.limit.active:
                raise Wrong("PL001")
        self.claim(lease)
        named = self.named[request.lease_id]
        return Answer(
            "granted",
            expires_at=lease.expires_at,
            places=tuple(each if each in lease.parts else None for each in named),
        )

    def claim(self, lease: Lease) -> None:
        if not lease.claimed:
            lease.claimed = True
            lease.expires_at = max(lease.expires_at, self.now + lease.duration)

    # What comes after.

    def watch(self, lease_ids: list[UUID]) -> dict[UUID, str]:
        """How those who wait stand: granted, queued, or retry. They are alive."""
        for place in self.places():
            if any(lease_id in lease_ids for lease_id in place.everybody()):
                self.settle(place)
        found: dict[UUID, str] = {}
        for lease_id in lease_ids:
            in_line, asleep = self.waiter(lease_id), self.sleeper(lease_id)
            if (lease := self.live(lease_id)) is not None:
                self.claim(lease)
                found[lease_id] = "granted"
            elif asleep is not None:
                _, sleeper = asleep
                sleeper.surely_until = max(sleeper.surely_until, self.now + SURELY_ALIVE)
                sleeper.alive_until = self.now + LIVENESS
                found[lease_id] = "granted"
            elif in_line is not None:
                for _, kept in self.in_line(lease_id)[1:]:
                    if self.now < kept.alive_until < self.now + LIVENESS * 9 // 10:
                        kept.alive_until = min(self.now + LIVENESS, kept.kept_until or 0)
                found[lease_id] = "retry" if in_line[1].called or in_line[1].outdated else "queued"
            else:
                found[lease_id] = "granted" if lease_id in self.passed else "retry"
        return found

    def lives_for(self, lease_id: UUID, ends_in: int) -> None:
        """What a waiter in line was told of its life after a call of watch."""
        assert SURELY_ALIVE <= ends_in <= LIVENESS
        in_line = self.waiter(lease_id)
        assert in_line is not None
        in_line[1].alive_until = self.now + ends_in
        in_line[1].surely_until = None

    def unsure(self) -> list[Waiter | Sleeper]:
        return [
            each
            for place in self.places()
            for each in (*place.sleepers, *place.line)
            if each.surely_until is not None and each.surely_until <= self.now < each.alive_until
        ]

    def renew(self, lease_id: UUID, duration: int | None) -> bool:
        lease = self.live(lease_id)
        if lease is None:
            return False
        lease.duration = duration or lease.duration
        lease.expires_at = max(lease.expires_at, self.now + lease.duration)
        lease.claimed = True
        return lease.whole

    def release(self, lease_ids: list[UUID]) -> set[UUID]:
        """The ids that were live."""
        live: set[UUID] = set()
        touched: list[Place] = []
        for place in self.places():
            mine = [each for each in place.line if each.request.lease_id in lease_ids]
            asleep = [each for each in place.sleepers if each.request.lease_id in lease_ids]
            held = any(place in lease.parts for lease_id, lease in self.leases.items() if lease_id in lease_ids)
            if mine or asleep or held:
                touched.append(place)
            live |= {each.request.lease_id for each in mine if each.alive_until > self.now}
            live |= {each.request.lease_id for each in asleep if each.alive_until > self.now}
            place.line = [each for each in place.line if each not in mine]
            self.give_back(place, asleep)
        live |= {lease_id for lease_id in lease_ids if self.live(lease_id) is not None}
        for lease_id in lease_ids:
            self.leases.pop(lease_id, None)
            self.passed.pop(lease_id, None)
        for place in sorted(touched, key=Place.order):
            self.settle(place)
        return live

    # Limits.

    def create(
        self, name: str, most: int, rate: Fraction, active: bool, max_waiters: int | None, description: str | None
    ) -> None:
        if name in self.limits:
            raise Wrong("PL003")
        self.numbers += 1
        self.limits[name] = Limit(
            name, most, rate, active, max_waiters, description or None, self.numbers, self.fence_floor
        )

    def get(self, name: str) -> Limit:
        if name not in self.limits:
            raise Wrong("PL002")
        return self.limits[name]

    def update(
        self,
        name: str,
        limit: int | None = None,
        rate: Fraction | None = None,
        active: bool | None = None,
        max_waiters: int | None = None,
        description: str | None = None,
        new_name: str | None = None,
    ) -> None:
        changed = self.get(name)
        if new_name is not None and new_name != name:
            if new_name in self.limits:
                raise Wrong("PL003")
            del self.limits[name]
            changed.name = new_name
            changed.former_names.add(name)
            self.limits[new_name] = changed
        grown = 0 if limit is None else limit - changed.most
        changed.most += grown
        changed.rate = changed.rate if rate is None else rate
        changed.active = changed.active if active is None else active
        if max_waiters is not None:
            changed.max_waiters = None if max_waiters == -1 else max_waiters
        if description is not None:
            changed.description = description or None
        for place in changed.places.values():
            if not changed.active:
                place.level -= sum(sleeper.slots for sleeper in place.sleepers)
                self.send_away(place)
                continue
            for sleeper in place.sleepers:
                sleeper.ahead -= grown
            self.let_go(place)
            self.give_back(place, [each for each in place.sleepers if self.is_hopeless(place, each)])
            place.line = [each for each in place.line if not self.is_hopeless(place, each)]
            if changed.most == 0:
                self.stand_in_line(place)
            self.settle(place)
        self.outdate(changed)

    def stand_in_line(self, place: Place) -> None:
        """Nobody knows when the turn of those who sleep will come."""
        for each in [*place.sleepers]:
            self.give_back(place, [each])
            waiter = Waiter(each.request, each.slots, each.arrival, False, each.alive_until)
            waiter.surely_until = each.surely_until
            place.line.append(waiter)
        place.line.sort(key=Waiter.order)

    def outdate(self, changed: Limit) -> None:
        """Those who wait for several limits notice that one was changed, whichever they stand in line for."""
        for place in self.places():
            for waiter in place.line:
                waiter.outdated = waiter.outdated or changed in waiter.over

    def send_away(self, place: Place) -> None:
        for passed in self.passed.values():
            passed.parts.pop(place, None)
        self.passed = {lease_id: passed for lease_id, passed in self.passed.items() if passed.parts}
        place.line, place.sleepers = [], []

    def delete(self, name: str) -> None:
        limit = self.get(name)
        fences = [fence for place in limit.places.values() for _, fence in place.fences]
        self.fence_floor = max([self.fence_floor, limit.fence_floor, *fences])
        for lease in self.leases.values():
            lease.parts = {place: part for place, part in lease.parts.items() if place.limit is not limit}
        for place in limit.places.values():
            self.send_away(place)
        del self.limits[name]
        self.outdate(limit)

    def adjust(self, name: str, slots: int, key: str) -> Fraction:
        limit = self.get(name)
        if not limit.rate:
            raise Wrong("PL005")
        place = limit.place(key)
        self.add_to_level(place, slots)
        self.settle(place)
        return place.level

    def add_to_level(self, place: Place, slots: Fraction | int) -> None:
        """Up at will, behind those who sleep; down by what lies there, then before the last of them, and so on.

        What they have reserved stays reserved, only earlier.
        """
        if slots > 0:
            place.level += slots
            return
        too_much, behind, ends = -slots, [], place.level
        for sleeper in [*reversed(place.sleepers), None]:
            # It goes when all but the limit has decayed of what lies before it and of its own.
            begins = place.limit.most + sleeper.ahead if sleeper is not None else 0
            off = min(too_much, ends - begins)
            for later in behind:
                later.ahead -= off
            place.level -= off
            too_much -= off
            if sleeper is not None:
                ends = begins - sleeper.slots
                behind.append(sleeper)
        self.let_go(place)

    def reset(self, name: str, key: str | None) -> int:
        limit = self.get(name)
        ended = 0
        for place in sorted(limit.places.values(), key=Place.order):
            if key is not None and place.key != key:
                continue
            for lease in self.live_leases():
                if lease.parts.pop(place, None) is not None:
                    ended += 1
                    lease.whole = False
            self.add_to_level(place, -place.level)
            self.settle(place)
        return ended

    def note_fence(self, lease: Lease, place: Place, fence: int) -> None:
        """Fences rise with every grant of a (limit, key), and stay."""
        part = lease.parts[place]
        if part.fence is None:
            part.fence = fence
            assert fence > place.limit.fence_floor
            assert all((number < lease.number) == (other < fence) for number, other in place.fences)
            place.fences.append((lease.number, fence))
        assert part.fence == fence
