"""What limits promise, in Python, with a clock that is passed in and no regard to speed.

Times are whole microseconds and levels are fractions, so nothing is rounded but moments, up to the next microsecond.
What the promises leave open (fences) is told to the model, which checks that they allow it.

A (limit, key) is a Place: it has leases, a level in virtual time, and one line. ``serve`` is the rule of the line, and
``serve_several`` that of requests over several limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias
from uuid import UUID

SECOND = 1_000_000
LIVENESS = 10 * SECOND
HEARTBEAT = 3 * SECOND
HORIZON = SECOND // 10


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
    decayed_at: int
    decayed: Fraction = Fraction(0)
    places: dict[str, Place] = field(default_factory=dict)

    def place(self, key: str) -> Place:
        if key not in self.places:
            self.places[key] = Place(self, key)
        return self.places[key]

    def virtual(self, at: int) -> Fraction:
        """Virtual time: the slots that have decayed since the limit was created."""
        return self.decayed + self.rate * Fraction(at - self.decayed_at, SECOND)


@dataclass(eq=False)
class Place:
    """A (limit, key)."""

    limit: Limit
    key: str
    booked: Fraction = Fraction(0)
    line: list[Waiter] = field(default_factory=list)
    # What requests over several limits keep of it: how many slots, and until when.
    kept: dict[UUID, tuple[int, int]] = field(default_factory=dict)
    # When time alone may let the head go, and when a lease may end. None: never.
    next_look: int | None = None
    next_expiry: int | None = None
    last_arrival: int = -1
    # Of each grant, as far as they were told: its number and its fence.
    fences: list[tuple[int, int]] = field(default_factory=list)

    def order(self) -> tuple[int, str]:
        return (self.limit.number, self.key)


Parts: TypeAlias = dict[Place, int]


@dataclass(eq=False)
class Waiter:
    request: Request
    slots: int
    arrival: int
    deadline: int | None
    looks_at: int | None
    expires_at: int
    # Of a request over several limits: all that it wants.
    parts: Parts | None = None

    def order(self) -> tuple[int, int]:
        return (-self.request.priority, self.arrival)


@dataclass(eq=False)
class Part:
    slots: int
    fence: int | None = None
    # What it has used of a rate limit, as far as is known.
    used: int | None = None


@dataclass(eq=False)
class Lease:
    request: Request
    parts: dict[Place, Part]
    acquired_at: int
    expires_at: int
    duration: int
    claimed: bool = True
    # Not so if a part was reset.
    whole: bool = True
    number: int = 0


@dataclass(eq=False)
class Told:
    """What became of a request that stood in line and gets no lease: a rate_limit, or a refusal (no moment)."""

    request: Request
    places: list[Place]
    moment: int | None
    until: int
    number: int = 0


@dataclass(frozen=True)
class Request:
    lease_id: UUID
    names: tuple[str, ...]
    slots: tuple[int, ...]
    keys: tuple[str, ...]
    timeout: int | None = 0
    duration: int = 300 * SECOND
    priority: int = 0
    holder: Any = None
    strict: bool = False
    for_rate: bool = False
    channel: str | None = None
    clamp: bool = False


@dataclass(frozen=True)
class Answer:
    status: str
    expires_at: int | None = None
    # Until it may go, is to look, or might be let in.
    wait: int | None = None
    position: int | None = None
    codes: tuple[str, ...] = ()


class Model:
    def __init__(self, now: int = 0) -> None:
        self.now = now
        self.limits: dict[str, Limit] = {}
        self.leases: dict[UUID, Lease] = {}
        self.told: dict[UUID, Told] = {}
        # Until when a process is alive, by its channel.
        self.processes: dict[str, int] = {}
        self.fence_floor = 0
        self.numbers = 0

    # Looking.

    def places(self) -> list[Place]:
        return [place for limit in self.limits.values() for place in limit.places.values()]

    def live(self, lease_id: UUID) -> Lease | None:
        lease = self.leases.get(lease_id)
        return lease if lease is not None and lease.expires_at > self.now and lease.parts else None

    def live_leases(self) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.expires_at > self.now and lease.parts]

    def held(self, place: Place) -> int:
        leased = sum(lease.parts[place].slots for lease in self.live_leases() if place in lease.parts)
        return leased + sum(slots for slots, until in place.kept.values() if until > self.now)

    def level(self, place: Place) -> Fraction:
        return max(place.booked - place.limit.virtual(self.now), Fraction(0))

    def lives_until(self, waiter: Waiter) -> int:
        return max(waiter.expires_at, self.processes.get(waiter.request.channel or "", 0))

    def waiting(self, place: Place) -> list[Waiter]:
        return [waiter for waiter in place.line if self.lives_until(waiter) > self.now]

    def waiter(self, lease_id: UUID) -> tuple[Place, Waiter] | None:
        found = [(p, w) for p in self.places() for w in p.line if w.request.lease_id == lease_id]
        assert len(found) <= 1
        return found[0] if found else None

    def is_known(self, lease_id: UUID) -> bool:
        told = self.told.get(lease_id)
        keeps = any(lease_id in place.kept for place in self.places())
        return bool(self.live(lease_id) or self.waiter(lease_id) or (told and told.until > self.now) or keeps)

    @staticmethod
    def before(place: Place, order: tuple[int, float]) -> list[Waiter]:
        return [waiter for waiter in place.line if waiter.order() < order]

    @staticmethod
    def slots_of(waiters: Iterable[Waiter]) -> int:
        return sum(waiter.slots for waiter in waiters)

    # When.

    def moment(self, place: Place, slots: int) -> int:
        """When the level has room for so many slots."""
        too_much = self.level(place) + slots - place.limit.most
        return self.now + (math.ceil(too_much * SECOND / place.limit.rate) if too_much > 0 else 0)

    def ready_at(self, place: Place, slots: int, for_rate: bool) -> int | None:
        """From when on it has room for that; None where slots have to be released, or the limit is shut."""
        limit = place.limit
        if limit.most == 0 or (not for_rate and self.held(place) + slots > limit.most):
            return None
        return self.moment(place, slots) if limit.rate else self.now

    def looks_in(self, place: Place, before: int, slots: int, for_rate: bool) -> int | None:
        limit, at = place.limit, None
        if limit.most == 0:
            return None
        if limit.rate and (before > 0 or for_rate or self.held(place) + slots <= limit.most):
            at = self.moment(place, before + slots) - HORIZON // 2
            if before > 0 and at <= self.now:
                return None  # it is not the level that whoever is before it waits for
        elif before == 0 and place.next_expiry is not None:
            at = max(place.next_expiry, self.now + HORIZON // 10)
        return None if at is None else max(at - self.now, 0)

    def later(self, seconds: int | None) -> int | None:
        return None if seconds is None else self.now + seconds

    @staticmethod
    def clamped(limit: Limit, request: Request, slots: int) -> int:
        return min(slots, limit.most or slots) if request.clamp else slots

    @staticmethod
    def is_hopeless(limit: Limit, slots: int, for_rate: bool) -> bool:
        return (slots > limit.most > 0) or (for_rate and not limit.rate)

    # Time.

    def move_to(self, now: int) -> None:
        self.now = now

    def take_expired(self, place: Place) -> None:
        """What has ended counts no longer (anywhere here); from now on is known when the next one ends."""
        if place.next_expiry is None or self.now < place.next_expiry:
            return
        for lease_id, lease in [*self.leases.items()]:
            if lease.expires_at <= self.now:
                lease.parts.pop(place, None)
                if not lease.parts:
                    del self.leases[lease_id]
        for lease_id, told in [*self.told.items()]:
            if told.until <= self.now and place in told.places:
                told.places.remove(place)
                if not told.places:
                    del self.told[lease_id]
        place.kept = {each: (slots, until) for each, (slots, until) in place.kept.items() if until > self.now}
        ends = [lease.expires_at for lease in self.leases.values() if place in lease.parts]
        ends += [told.until for told in self.told.values() if place in told.places]
        ends += [until for _, until in place.kept.values()]
        place.next_expiry = min(ends, default=None)

    def expires(self, place: Place, at: int) -> None:
        place.next_expiry = at if place.next_expiry is None else min(place.next_expiry, at)

    # The line.

    def stand(self, place: Place, waiters: list[Waiter]) -> None:
        first = waiters[0]
        if not place.line or first.order() < place.line[0].order():
            place.next_look = self.next_look(first, first.looks_at)
        place.line += waiters
        place.line.sort(key=Waiter.order)
        place.last_arrival = max(place.last_arrival, waiters[-1].arrival)

    def next_look(self, head: Waiter, looks_at: int | None) -> int:
        """When somebody has to serve the line: time may let the head go, or it may have died."""
        lives_until = self.lives_until(head)
        return lives_until if looks_at is None else min(looks_at, lives_until)

    def serve(self, place: Place, own: bool, mine: UUID | None = None, until: int | None = None) -> None:
        """Grants from the head all whose moment is within the horizon; tells the one that stays when to look."""
        last = self.now + HORIZON if until is None else until
        self.take_expired(place)
        place.next_look = None
        looks_in = None
        while place.line:
            head = place.line[0]
            lease_id, for_rate = head.request.lease_id, head.request.for_rate
            if head.parts is not None:
                place.kept.pop(lease_id, None)
            ready = self.ready_at(place, head.slots, for_rate)
            if self.lives_until(head) <= self.now or self.is_hopeless(place.limit, head.slots, for_rate):
                place.line.remove(head)
            elif head.deadline is not None and (
                head.deadline <= self.now or (ready is not None and head.deadline < ready)
            ):
                self.time_out(place, head)
            elif ready is None or ready > last:
                looks_in = self.looks_in(place, 0, head.slots, for_rate)
                break
            elif head.parts is not None:
                others = any(each is not place and self.is_enforced(each) for each in head.parts)
                if others and not (own or lease_id == mine):
                    # It is to look for itself, as its other limits must not be locked.
                    head.looks_at = self.now if head.looks_at is None else min(head.looks_at, self.now)
                    break
                self.serve_several(place, head)
            else:
                place.line.remove(head)
                self.hand_over(head, {place: head.slots}, ready)
        if place.line:
            head, looks_at = place.line[0], self.later(looks_in)
            place.next_look = self.next_look(head, looks_at)
            told = head.looks_at
            told_at = self.now + HEARTBEAT if told is None or told <= self.now else told - HORIZON // 20
            if looks_at is not None and looks_at < min(told_at, self.now + HEARTBEAT):
                head.looks_at = looks_at

    def serve_several(self, here: Place, head: Waiter) -> None:
        assert head.parts is not None
        for_rate = head.request.for_rate
        parts = {
            place: head.slots if place is here else self.clamped(place.limit, head.request, slots)
            for place, slots in head.parts.items()
            if self.is_enforced(place)
        }
        had = set()
        for place in parts:
            if place is not here:
                self.take_expired(place)
                if place.kept.pop(head.request.lease_id, None):
                    had.add(place)
        ready = {place: self.ready_at(place, slots, for_rate) for place, slots in parts.items()}
        takes = {place: slots / place.limit.rate if place.limit.rate else Fraction(0) for place, slots in parts.items()}
        older = [place for place in parts if place is not here and self.before(place, head.order())]
        waited = round(Fraction(self.now - head.arrival, 4))
        soon = {place: self.now + HORIZON + min(round(takes[place] * SECOND), waited) for place in parts}
        wanting = [place for place, at in ready.items() if place is not here and (at is None or at > soon[place])]
        slowest = max(parts, key=lambda place: takes[place])
        slowest_at = ready[slowest]
        beyond = takes[slowest] > 0 and slowest_at is not None and slowest_at > self.now + HORIZON
        beyond = beyond and slowest is not here
        targets = older or wanting or ([slowest] if beyond else [])
        joint = max((at for at in ready.values() if at is not None), default=self.now)
        if not targets and for_rate:
            for place, slots in parts.items():
                if place is not here and place.line and place.limit.virtual(joint) > place.booked:
                    # What would be lost goes to those who wait for this one alone.
                    self.serve(place, own=False, until=joint - math.ceil(slots * SECOND / place.limit.rate))
        if not targets and (head.deadline is None or joint <= head.deadline):
            here.line.remove(head)
            self.hand_over(head, parts, joint)
        elif not targets:
            self.time_out(here, head)
        else:
            here.line.remove(head)
            self.stand_again(targets[0], head, parts[targets[0]])
            for place in parts:
                at = ready[place]
                keeps = not older and not for_rate and place is not targets[0]
                if keeps and self.now > head.arrival + HORIZON and at is not None and at <= self.now + HORIZON:
                    until = self.now + round(Fraction(self.now - head.arrival, 4))
                    place.kept[head.request.lease_id] = (parts[place], until)
                    self.expires(place, until)
                    had.add(place)
        for place in parts:
            if place in had and place is not here and place.line:
                self.serve(place, own=False)

    def stand_again(self, place: Place, head: Waiter, slots: int) -> None:
        head.slots = slots
        looks_in = self.looks_in(
            place, self.slots_of(self.before(place, head.order())), head.slots, head.request.for_rate
        )
        looks_at = self.later(looks_in)
        told = head.looks_at
        head.looks_at = looks_at
        self.stand(place, [head])
        if looks_at is None or (told is not None and told < looks_at):
            head.looks_at = told

    def exists(self, place: Place) -> bool:
        return self.limits.get(place.limit.name) is place.limit

    def is_enforced(self, place: Place) -> bool:
        return place.limit.active and self.exists(place)

    def time_out(self, place: Place, waiter: Waiter) -> None:
        place.line.remove(waiter)
        until = self.now + LIVENESS
        self.told[waiter.request.lease_id] = Told(waiter.request, [place], None, until)
        self.expires(place, until)

    def hand_over(self, waiter: Waiter, parts: Parts, moment: int) -> None:
        """A lease that is handed over ends when its waiter would have died, until that claims it."""
        request = waiter.request
        if request.for_rate:
            self.use(request, parts, moment)
        else:
            ends = min(self.lives_until(waiter), moment + request.duration)
            self.take(request, parts, moment, ends, claimed=False)

    def book(self, place: Place, slots: int, moment: int) -> None:
        if place.limit.rate:
            place.booked = max(place.booked, place.limit.virtual(moment)) + slots

    def take(
        self,
        request: Request,
        parts: Parts,
        moment: int,
        ends: int,
        claimed: bool = True,
        booked_at: int | None = None,
    ) -> None:
        for place, slots in parts.items():
            self.book(place, slots, moment if booked_at is None else booked_at)
            self.expires(place, ends)
        self.numbers += 1
        kept = {place: Part(slots, used=slots if place.limit.rate else None) for place, slots in parts.items()}
        self.leases[request.lease_id] = Lease(
            request, kept, moment, ends, request.duration, claimed, number=self.numbers
        )

    def use(self, request: Request, parts: Parts, moment: int) -> None:
        for place, slots in parts.items():
            self.book(place, slots, moment)
            self.expires(place, moment + LIVENESS)
        self.told[request.lease_id] = Told(request, [*parts], moment, moment + LIVENESS)

    # Asking.

    def check(self, request: Request) -> Parts:
        """Its parts that are enforced, in the order in which they are locked. Raises why it can never be granted."""
        found = [self.limits.get(name) for name in request.names]
        parts: Parts = {}
        for limit, key, slots in zip(found, request.keys, request.slots, strict=True):
            if limit is not None and limit.active:
                parts[limit.place(key)] = parts.get(limit.place(key), 0) + slots
        parts = {place: self.clamped(place.limit, request, slots) for place, slots in parts.items()}
        codes = set()
        for place, slots in parts.items():
            if request.for_rate and not place.limit.rate:
                codes.add("PL005")
            if slots > place.limit.most > 0:
                codes.add("PL004")
        if request.strict and None in found:
            codes.add("PL002")
        if codes:
            raise Wrong(*codes)
        return {place: parts[place] for place in sorted(parts, key=Place.order)}

    def ask(self, request: Request, told: bool, many: int = 1) -> Answer:
        """told: the caller is told how long to sleep before it goes. To who is not, granted means: go now.

        many: so many that are alike ask at once, of which it is the first.
        """
        try:
            if self.is_known(request.lease_id) and (answer := self.ask_again(request, told)) is not None:
                return answer
            parts = self.check(request)
            if not parts:
                return Answer("unlimited")
            if (refusal := self.refusal(request, parts)) is not None:
                return refusal
            if len(parts) == 1:
                ((place, slots),) = parts.items()
                return self.decide(request, place, slots, told, many)
            return self.decide_several(request, parts, told)
        except Wrong as wrong:
            return Answer("error", codes=wrong.codes)

    def glance(self, request: Request, parts: Parts) -> tuple[Place | None, bool, bool, int, bool]:
        """Without any lock: where it is blocked; if that is certain; if somebody there is due; when it can be its turn,
        by who is before it, and whether time alone will do."""
        blocked: Place | None = None
        waits, certain, by_time, is_due = [0], False, True, False
        for place, slots in parts.items():
            ready = self.ready_at(place, slots, request.for_rate)
            before = self.before(place, (-request.priority, math.inf))
            if ready is None or ready > self.now or before:
                blocked = blocked or place
                # Its head may have died, and everybody in it.
                is_due = is_due or (bool(place.line) and place.next_look is not None and place.next_look <= self.now)
                certain = certain or ((ready is None or ready > self.now) and request.timeout == 0)
                by_time = by_time and bool(place.limit.rate) and ready is not None
                if place.limit.rate and place.limit.most:
                    waits.append(self.moment(place, self.slots_of(before) + slots) - self.now)
        return blocked, certain, is_due, max(waits), by_time

    def refusal(self, request: Request, parts: Parts) -> Answer | None:
        """What is certain without any lock: there is no room even without a line, or not in time, or none in line."""
        blocked, certain, is_due, wait, by_time = self.glance(request, parts)
        if blocked is None:
            return None
        if request.timeout is not None and (request.timeout == 0 or wait > request.timeout):
            is_certain = certain or (request.timeout > 0 and not is_due)
            return Answer("refused", wait=wait if by_time else None) if is_certain else None
        if blocked.limit.max_waiters is not None and len(self.waiting(blocked)) >= blocked.limit.max_waiters:
            raise Wrong("PL006")
        return None

    def decide(self, request: Request, place: Place, slots: int, told: bool, many: int) -> Answer:
        most = place.limit.max_waiters
        is_full = request.timeout != 0 and place.line and most is not None and len(place.line) + many > most
        if is_full:
            place.line = self.waiting(place)
        if is_full or (place.next_look is not None and self.now >= place.next_look):
            self.serve(place, told)
        self.take_expired(place)
        limit, timeout = place.limit, request.timeout
        before = self.before(place, (-request.priority, math.inf))
        ready = self.ready_at(place, slots, request.for_rate)
        ahead = 0 if most is not None and len(place.line) >= most else HORIZON
        latest = self.now + (ahead if timeout is None else min(ahead, timeout))
        if not before and ready is not None and ready <= latest:
            if told or ready == self.now:
                if request.for_rate:
                    self.book(place, slots, self.now)
                else:
                    self.take(request, {place: slots}, ready, ready + request.duration, booked_at=self.now)
                return self.granted(request, ready)
            if request.for_rate:
                self.use(request, {place: slots}, ready)
            else:
                self.take(request, {place: slots}, ready, ready + LIVENESS, claimed=False)
            return Answer("queued", wait=ready - self.now)
        by_time = limit.rate and limit.most > 0
        earliest = self.moment(place, self.slots_of(before) + slots) - self.now if by_time else 0
        if timeout == 0 or (timeout is not None and earliest > timeout):
            return Answer("refused", wait=earliest if by_time and ready is not None else None)
        if not self.has_room_in_line(place):
            raise Wrong("PL006")
        before = self.before(place, (-request.priority, math.inf))
        arrival = max(self.now, place.last_arrival + 1)
        looks_in = self.looks_in(place, self.slots_of(before), slots, request.for_rate)
        self.stand(place, [self.new_waiter(request, slots, arrival, looks_in)])
        return Answer("queued", wait=looks_in, position=len(before) + 1)

    def new_waiter(self, request: Request, slots: int, arrival: int, looks_in: int | None) -> Waiter:
        return Waiter(request, slots, arrival, self.later(request.timeout), self.later(looks_in), self.now + LIVENESS)

    def has_room_in_line(self, place: Place) -> bool:
        most = place.limit.max_waiters
        if most is not None and len(place.line) >= most:
            place.line = self.waiting(place)
        return most is None or len(place.line) < most

    def granted(self, request: Request, moment: int) -> Answer:
        ends = None if request.for_rate else moment + request.duration
        return Answer("granted", expires_at=ends, wait=moment - self.now)

    def decide_several(self, request: Request, parts: Parts, told: bool) -> Answer:
        for place in parts:
            if self.is_due(place):
                self.serve(place, told)
            self.take_expired(place)
        arrival = max(self.now, *(place.last_arrival + 1 for place in parts))
        blocked, waits, by_time = None, [0], True
        for place, slots in parts.items():
            ready = self.ready_at(place, slots, request.for_rate)
            before = self.before(place, (-request.priority, arrival))
            if before or ready is None or ready > self.now:
                blocked = blocked or place
                by_time = by_time and bool(place.limit.rate) and ready is not None
            if place.limit.rate and place.limit.most:
                waits.append(self.moment(place, self.slots_of(before) + slots) - self.now)
        if blocked is None:
            if request.for_rate:
                for place, slots in parts.items():
                    self.book(place, slots, self.now)
            else:
                self.take(request, parts, self.now, self.now + request.duration)
            return self.granted(request, self.now)
        if request.timeout == 0 or (request.timeout is not None and max(waits) > request.timeout):
            return Answer("refused", wait=max(waits) if by_time else None)
        if not self.has_room_in_line(blocked):
            raise Wrong("PL006")
        before = self.before(blocked, (-request.priority, arrival))
        looks_in = self.looks_in(blocked, self.slots_of(before), parts[blocked], request.for_rate)
        waiter = self.new_waiter(request, parts[blocked], arrival, looks_in)
        waiter.parts = dict(parts)
        self.stand(blocked, [waiter])
        for place in parts:
            place.last_arrival = max(place.last_arrival, arrival)
        self.serve(blocked, told, request.lease_id)
        answer = self.answer_known(request, told)
        assert answer is not None
        return answer

    def is_due(self, place: Place) -> bool:
        return any(at is not None and self.now >= at for at in (place.next_look, place.next_expiry))

    def ask_again(self, request: Request, told: bool) -> Answer | None:
        if not self.is_same(request):
            raise Wrong("PL001")
        found = self.waiter(request.lease_id)
        if found is not None:
            waiter = found[1]
            waiter.expires_at = max(waiter.expires_at, self.now + LIVENESS)
            if request.timeout is not None:
                until = self.now + request.timeout
                waiter.deadline = until if waiter.deadline is None else min(waiter.deadline, until)
            self.look([request.lease_id], told)
            is_over = waiter.deadline is not None and waiter.deadline <= self.now
            if self.waiter(request.lease_id) is not None and (is_over or self.is_outdated(waiter)):
                self.release([request.lease_id], told)
                return self.refused(request) if is_over else None
        answer = self.answer_known(request, told)
        if answer is None:
            self.release([request.lease_id], told)  # what was kept for it, as it stood in a line that it had to leave
        elif answer.status == "refused":
            return self.refused(request)
        return answer

    def refused(self, request: Request) -> Answer:
        """It has stood in line in vain: when time alone would let it in."""
        parts: Parts = {}
        for name, key, slots in zip(request.names, request.keys, request.slots, strict=True):
            if name in self.limits and self.limits[name].active:
                place = self.limits[name].place(key)
                parts[place] = parts.get(place, 0) + slots
        parts = {place: self.clamped(place.limit, request, slots) for place, slots in parts.items()}
        hopeless = any(self.is_hopeless(place.limit, slots, request.for_rate) for place, slots in parts.items())
        _, _, _, wait, by_time = self.glance(request, parts)
        return Answer("refused", wait=wait if parts and by_time and not hopeless else None)

    def is_same(self, request: Request) -> bool:
        known: dict[Place, int | None] = {}
        for_rate = request.for_rate
        if (lease := self.live(request.lease_id)) is not None:
            known = {place: part.slots for place, part in lease.parts.items()}
            for_rate = False
        elif (told := self.told.get(request.lease_id)) is not None and told.until > self.now:
            known, for_rate = dict.fromkeys(told.places), told.moment is not None or request.for_rate
        elif (found := self.waiter(request.lease_id)) is not None:
            place, waiter = found
            known = dict(waiter.parts if waiter.parts is not None else {place: waiter.slots})
            for_rate = waiter.request.for_rate
        asked: Parts = {}
        for name, key, slots in zip(request.names, request.keys, request.slots, strict=True):
            if name in self.limits:
                place = self.limits[name].place(key)
                asked[place] = asked.get(place, 0) + slots
        same = [place for place in asked if place in known]
        for place in same:
            slots = known[place]
            if slots is not None and (slots > asked[place] or (slots < asked[place] and not request.clamp)):
                return False
        return not (asked and known) or (bool(same) and for_rate == request.for_rate)

    def is_outdated(self, waiter: Waiter) -> bool:
        return waiter.parts is not None and any(
            not self.exists(place)
            or (
                place.limit.active
                and self.is_hopeless(
                    place.limit, self.clamped(place.limit, waiter.request, slots), waiter.request.for_rate
                )
            )
            for place, slots in waiter.parts.items()
        )

    def answer_known(self, request: Request, told: bool) -> Answer | None:
        lease, trace = self.live(request.lease_id), self.told.get(request.lease_id)
        if lease is not None:
            if lease.acquired_at > self.now and not told:
                return Answer("queued", wait=lease.acquired_at - self.now)
            self.claim(lease)
            return Answer("granted", expires_at=lease.expires_at, wait=max(lease.acquired_at - self.now, 0))
        if trace is not None and trace.until > self.now:
            if trace.moment is None:
                return Answer("refused")
            if trace.moment > self.now and not told:
                return Answer("queued", wait=trace.moment - self.now)
            return Answer("granted", wait=max(trace.moment - self.now, 0))
        found = self.waiter(request.lease_id)
        if found is None:
            return None
        place, waiter = found
        before = self.before(place, waiter.order())
        looks_in = self.looks_in(place, self.slots_of(before), waiter.slots, request.for_rate)
        return Answer("queued", wait=looks_in, position=len(before) + 1)

    def claim(self, lease: Lease) -> None:
        if not lease.claimed:
            lease.claimed = True
            lease.expires_at = max(lease.expires_at, max(self.now, lease.acquired_at) + lease.duration)

    # What comes after.

    def look(self, lease_ids: list[UUID], own: bool) -> None:
        places: set[Place] = set()
        for lease_id in lease_ids:
            if (found := self.waiter(lease_id)) is not None:
                place, waiter = found
                if place.next_look is not None and self.now >= place.next_look:
                    places.add(place)
                if waiter.parts is not None and waiter.looks_at is not None and waiter.looks_at <= self.now:
                    places |= {place for place in waiter.parts if self.exists(place)}
                    waiter.looks_at = None
        for place in sorted(places, key=Place.order):
            if place.limit.active and place.line:
                self.serve(place, own, lease_ids[0])

    def beat(self, channel: str) -> int:
        """In which time to call again: the next of the others to die would be dead by then."""
        self.processes[channel] = self.now + LIVENESS
        return min([HEARTBEAT, *(until - self.now for until in self.processes.values() if until > self.now)])

    def watch(self, lease_ids: list[UUID]) -> dict[UUID, str]:
        """How those who wait stand: granted, queued, or retry."""
        self.look(lease_ids, own=True)
        found: dict[UUID, str] = {}
        for lease_id in lease_ids:
            lease, trace, in_line = self.live(lease_id), self.told.get(lease_id), self.waiter(lease_id)
            if lease is not None:
                self.claim(lease)
                found[lease_id] = "granted"
            elif trace is not None and trace.until > self.now:
                found[lease_id] = "retry" if trace.moment is None else "granted"
            elif in_line is not None:
                found[lease_id] = "retry" if self.is_outdated(in_line[1]) else "queued"
            else:
                found[lease_id] = "retry"
        return found

    def renew(self, lease_id: UUID, duration: int | None) -> bool:
        lease = self.live(lease_id)
        if lease is None:
            return False
        lease.duration = duration or lease.duration
        lease.expires_at = max(lease.expires_at, max(self.now, lease.acquired_at) + lease.duration)
        lease.claimed = True
        return lease.whole

    def release(self, lease_ids: list[UUID], own: bool) -> set[UUID]:
        """The ids that were live."""
        live: set[UUID] = set()
        for _ in range(5):
            touched = [place for place in self.places() if self.is_on(place, lease_ids)]
            for place in sorted(touched, key=Place.order):
                live |= self.release_at(place, lease_ids, own)
            if not any(self.waiter(lease_id) for lease_id in lease_ids):
                break
        return live

    def is_on(self, place: Place, lease_ids: list[UUID]) -> bool:
        return any(
            (lease_id in self.leases and place in self.leases[lease_id].parts)
            or (lease_id in self.told and place in self.told[lease_id].places)
            or lease_id in place.kept
            or any(waiter.request.lease_id == lease_id for waiter in place.line)
            for lease_id in lease_ids
        )

    def release_at(self, place: Place, lease_ids: list[UUID], own: bool) -> set[UUID]:
        live: set[UUID] = set()
        for lease_id in lease_ids:
            lease, trace = self.leases.get(lease_id), self.told.get(lease_id)
            if lease is not None and lease.parts.pop(place, None) is not None:
                live |= {lease_id} if lease.expires_at > self.now else set()
                if not lease.parts:
                    del self.leases[lease_id]
            if trace is not None and place in trace.places:
                live |= {lease_id} if trace.until > self.now and trace.moment is not None else set()
                trace.places.remove(place)
                if not trace.places:
                    del self.told[lease_id]
            place.kept.pop(lease_id, None)
        gone = [waiter for waiter in place.line if waiter.request.lease_id in lease_ids]
        live |= {waiter.request.lease_id for waiter in gone if self.lives_until(waiter) > self.now}
        place.line = [waiter for waiter in place.line if waiter not in gone]
        if place.limit.active and place.line:
            self.serve(place, own)
        return live

    def settle(self, lease_id: UUID, used: dict[Place, int]) -> bool:
        """Whether it was live."""
        lease = self.live(lease_id)
        if lease is None:
            return False
        if any(lease.parts[place].used is None and not place.limit.rate for place in used):
            raise Wrong("PL005")
        for place in sorted(used, key=Place.order):
            part = lease.parts[place]
            before, part.used = part.used, None if part.used is None else used[place]
            if before is not None and before != used[place] and place.limit.rate:
                self.correct(place, used[place] - before)
        return True

    def correct(self, place: Place, slots: int) -> None:
        virtual = place.limit.virtual(self.now)
        place.booked = max(max(place.booked, virtual) + slots, virtual)
        if place.limit.active and place.line:
            self.serve(place, own=False)

    # Limits.

    def create(
        self, name: str, most: int, rate: Fraction, active: bool, max_waiters: int | None, description: str | None
    ) -> None:
        if name in self.limits:
            raise Wrong("PL003")
        self.numbers += 1
        self.limits[name] = Limit(
            name, most, rate, active, max_waiters, description or None, self.numbers, self.fence_floor, self.now
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
            self.limits[new_name] = changed
        changed.decayed, changed.decayed_at = changed.virtual(self.now), self.now
        changed.most = changed.most if limit is None else limit
        changed.rate = changed.rate if rate is None else rate
        changed.active = changed.active if active is None else active
        if max_waiters is not None:
            changed.max_waiters = None if max_waiters == -1 else max_waiters
        if description is not None:
            changed.description = description or None
        for place in sorted(changed.places.values(), key=Place.order):
            if not changed.active:
                place.kept.clear()
            if place.line:
                for waiter in place.line:
                    waiter.slots = self.clamped(changed, waiter.request, waiter.slots)
                place.line = [
                    waiter
                    for waiter in place.line
                    if changed.active and not self.is_hopeless(changed, waiter.slots, waiter.request.for_rate)
                ]
                self.serve(place, own=False)

    def delete(self, name: str) -> None:
        limit = self.get(name)
        fences = [fence for place in limit.places.values() for _, fence in place.fences]
        self.fence_floor = max([self.fence_floor, limit.fence_floor, *fences])
        for lease_id, lease in [*self.leases.items()]:
            lease.parts = {place: part for place, part in lease.parts.items() if place.limit is not limit}
            if not lease.parts:
                del self.leases[lease_id]
        for lease_id, told in [*self.told.items()]:
            told.places = [place for place in told.places if place.limit is not limit]
            if not told.places:
                del self.told[lease_id]
        del self.limits[name]

    def adjust(self, name: str, slots: int, key: str) -> Fraction:
        limit = self.get(name)
        if not limit.rate:
            raise Wrong("PL005")
        place = limit.place(key)
        self.correct(place, slots)
        return self.level(place)

    def reset(self, name: str, key: str | None) -> int:
        limit = self.get(name)
        ended = 0
        for place in sorted(limit.places.values(), key=Place.order):
            if key is not None and place.key != key:
                continue
            for lease_id, lease in [*self.leases.items()]:
                if lease.parts.pop(place, None) is not None:
                    ended += lease.expires_at > self.now
                    lease.whole = False
                    if not lease.parts:
                        del self.leases[lease_id]
            for lease_id, told in [*self.told.items()]:
                if place in told.places:
                    told.places.remove(place)
                    if not told.places:
                        del self.told[lease_id]
            place.kept.clear()
            place.next_expiry = None
            place.booked = min(place.booked, limit.virtual(self.now))
            if limit.active and place.line:
                self.serve(place, own=False)
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
