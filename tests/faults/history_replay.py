"""What happened to one (limit, key) after another, as the database wrote it down, and what of that breaks a promise."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from history import Change, History, Key, Row, is_held


@dataclass(frozen=True, slots=True)
class Violation:
    promise: str
    what: str


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What the checker cannot know to the microsecond.

    Attributes:
        wake_up: for how long (seconds) a slot may stay free while a live waiter fits. What time frees, only who
            looks finds: a waiter that was killed or stopped just then is found dead after 10 s.
        visible: how long (seconds) a commit may take to be seen by others.
        away: when the server was not there (from, to), so that nobody could be granted anything.
        locked: of a limit, by its name, when somebody kept it, or one of its leases, locked: nobody could be granted
            anything of it then, nor be told that it is free.
    """

    wake_up: float = 2.0
    visible: float = 2.0
    away: Sequence[tuple[float, float]] = ()
    locked: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    def out_of_reach(self, begin: float, end: float, *names: str) -> float:
        """For how long of that nobody could be granted anything of one of these limits."""
        total, until = 0.0, begin
        for gone, back in sorted([*self.away, *(times for name in names for times in self.locked.get(name, ()))]):
            total += max(min(end, back) - max(until, gone), 0.0)
            until = max(until, back)
        return total


def replays_of(history: History, tolerance: Tolerance) -> dict[Key, Replay]:
    configs: dict[int, list[Change]] = defaultdict(list)
    places: dict[Key, list[Change]] = defaultdict(list)
    arrivals: dict[str, list[tuple[int, float]]] = defaultdict(list)
    processes = _Processes()
    for change in history.changes:
        if change.what == "configs":
            configs[int(change.row["limit_id"])].append(change)
        elif change.what == "processes":
            processes.add(change)
        else:
            for seen in change.by_place():
                places[seen.place].append(seen)
            if change.what == "queue":
                arrivals[change.row["lease_id"]].append((change.seq, change.row["arrival"]))
    return {
        place: Replay(place, tolerance, arrivals, processes).run([*configs[place[0]], *of_place], history.end)
        for place, of_place in places.items()
    }


class _Processes:
    """How long processes were alive, by their heartbeats."""

    def __init__(self) -> None:
        self._beats: dict[str, list[tuple[float, float]]] = defaultdict(list)  # when, good until when

    def add(self, change: Change) -> None:
        until = change.becomes["expires_at"] if change.becomes is not None else change.at
        bisect.insort(self._beats[change.row["channel"]], (change.at, until))

    def are_alive(self, row: Row, at: float) -> bool:
        """Whether a waiter is alive, by itself or by its process."""
        if row["expires_at"] > at:
            return True
        beats = self._beats.get(row["channel"], [])
        last = bisect.bisect_right(beats, at, key=lambda beat: beat[0]) - 1
        return last >= 0 and beats[last][1] > at

    def turning_points(self, row: Row) -> Iterator[float]:
        """The moments at which a waiter may die, or come to life."""
        yield row["expires_at"]
        for beat in self._beats.get(row["channel"], ()):
            yield from beat


@dataclass(frozen=True, slots=True)
class _Level:
    """What is booked on a rate limit, in the state's own units: millionths of a slot."""

    rate: float
    limit: int
    booked: float
    decayed: float
    decayed_at: float

    @staticmethod
    def of(state: Row) -> _Level:
        return _Level(
            state["slot_decay_per_second"], state["limit"], state["booked"], state["decayed"], state["decayed_at"]
        )

    def ready_at(self, slots: int) -> float:
        """From when on there is room for so many slots, if nothing else is booked."""
        return self.decayed_at + (self.booked + (slots - self.limit) * 1e6 - self.decayed) / (self.rate * 1e6)


@dataclass(slots=True)
class _Moment:
    """What is true of a (limit, key) from a moment on, until the next one."""

    at: float
    limit: int
    enforced: bool
    decays: bool
    level: _Level | None
    leases: list[tuple[float, int, str]]  # end, slots, id
    line: list[Row]  # who waits, in their order
    processes: _Processes

    def held(self, at: float, besides: str = "") -> int:
        return sum(slots for end, slots, lease_id in self.leases if end > at and lease_id != besides)

    def head(self, at: float) -> Row | None:
        """The first in line who is alive, and not told that it asks for too much."""
        return next(
            (row for row in self.line if row["slots"] <= self.limit and self.processes.are_alive(row, at)), None
        )

    def idles(self, at: float) -> bool:
        """Whether what somebody waits for is free. Who waits for several limits needs more than this one."""
        head = self.head(at)
        return (
            head is not None and head["parts"] is None and self.enforced and self.is_free_for(head, head["slots"], at)
        )

    def is_free_for(self, waiter: Row, slots: int, at: float) -> bool:
        """Whether so many slots are free for somebody, those that are kept for it included, and nobody is before it."""
        if not self.enforced:
            return True
        place = (waiter["rank"], waiter["arrival"])
        before = (row for row in self.line if (row["rank"], row["arrival"]) < place and row["slots"] <= self.limit)
        return (
            (waiter["lease_duration"] is None or self.held(at, waiter["lease_id"]) + slots <= self.limit)
            and (self.level is None or self.level.ready_at(slots) <= at)
            and not any(self.processes.are_alive(row, at) for row in before)
        )

    def fits(self, slots: int, rank: int, at: float) -> bool:
        in_front = any(row["rank"] <= rank and self.processes.are_alive(row, at) for row in self.line)
        return self.held(at) + slots <= self.limit and not in_front and not self.decays and self.enforced

    def turning_points(self, until: float) -> list[float]:
        """The moments before the next one at which time alone changes something."""
        points = [end for end, _, _ in self.leases]
        if until - self.at > 0.1:  # else it makes no difference when exactly somebody died
            points += [point for row in self.line for point in self.processes.turning_points(row)]
        if self.level is not None:
            points += [self.level.ready_at(slots) for slots in {row["slots"] for row in self.line}]
        return [self.at, *sorted({point for point in points if self.at < point < until})]


class Replay:
    """Goes through what happened to one (limit, key), and finds what breaks a promise."""

    def __init__(
        self,
        place: Key,
        tolerance: Tolerance,
        arrivals: Mapping[str, Sequence[tuple[int, float]]],
        processes: _Processes,
    ) -> None:
        self.place = place
        self.tolerance = tolerance
        self.arrivals = arrivals
        self.processes = processes
        self.found: list[Violation] = []
        self.config: Row | None = None
        self.level: _Level | None = None
        self.name = str(place)
        self.name_of_limit = ""
        self.leases: dict[str, Row] = {}
        self.queue: dict[str, Row] = {}
        self.fence = 0
        self.end = 0.0
        self.moments: list[_Moment] = []
        self.idle_since: float | None = None
        self.longest_idle = 0.0
        self.lives: dict[str, list[tuple[float, float, int]]] = defaultdict(list)  # of a lease: from, until, fence

    def run(self, changes: Iterable[Change], end: float) -> Replay:
        self.end = end
        transactions: dict[int, list[Change]] = defaultdict(list)
        for change in changes:
            transactions[change.tx].append(change)
        # In the order in which they ended their work here. A renewal takes no lock of the (limit, key), and may fall
        # into the middle of another.
        for transaction in sorted(transactions.values(), key=lambda each: each[-1].seq):
            self._look_for_idling(transaction[-1].at)
            # Who changes a limit is noted at its commit, and grants what fits from then on before that.
            for change in sorted(transaction, key=lambda change: (change.what != "configs", change.seq)):
                self._apply(change)
            self.moments.append(self._moment(transaction[-1].at))
        self._look_for_idling(end)
        for lease in self.leases.values():
            self._lived(lease, float("inf"))
        return self

    def left_over(self) -> list[Violation]:
        leases = self.leases.values()
        held = [lease["lease_id"] for lease in leases if lease["slots"] and lease["expires_at"] > self.end]
        waits = [row["lease_id"] for row in self.queue.values() if self.processes.are_alive(row, self.end)]
        return [Violation("Nothing is lost", f"{self.name}: {what} at the end: {ids}")
                for what, ids in (("held", held), ("waiting", waits)) if ids]  # fmt: skip

    def _wrong(self, promise: str, what: str) -> None:
        self.found.append(Violation(promise, f"{self.name}: {what}"))

    def _apply(self, change: Change) -> None:
        was, becomes = change.was, change.becomes
        if change.what == "configs":
            self.config = becomes
            self.name_of_limit = str(change.row["name"])
            self.name = self.name_of_limit + (f" with key {self.place[1]}" if self.place[1] else "")
        elif change.what == "states":
            assert becomes is not None
            self.level = _Level.of(becomes)
        elif change.what == "queue":
            if becomes is None:
                self.queue.pop(change.row["lease_id"], None)
            else:
                self.queue[becomes["lease_id"]] = becomes
        elif becomes is None:
            assert was is not None
            self.leases.pop(was["lease_id"], None)
            self._lived(was, change.at)
        elif was is None:
            self._granted(becomes, change)
        else:
            self._renewed(was, becomes, change.at)

    def _lived(self, lease: Row, until: float) -> None:
        if is_held(lease):
            self.lives[lease["lease_id"]].append(
                (lease["acquired_at"], min(until, lease["expires_at"]), int(lease["fence"]))
            )

    def _granted(self, row: Row, change: Change) -> None:
        """Or kept, for a request that waits for other limits; or noted, for a rate_limit or one whose time was over."""
        lease_id, now = str(row["lease_id"]), min(change.at, row["acquired_at"])
        if self.config is None:
            return self._wrong("Never too many", f"{lease_id} was granted though the limit is gone")
        before = self.leases.get(lease_id)
        if before is not None and before["expires_at"] > now:
            self._wrong("Once", f"{lease_id} was granted while it was held")
        limit, slots = self.config["limit"], row["slots"]
        held = sum(lease["slots"] for lease in self.leases.values() if lease["expires_at"] > now)
        if slots and held + slots > limit:
            self._wrong("Never too many", f"{held} + {slots} of {limit} slots, for {lease_id}")
        if row["fence"]:
            if row["fence"] <= self.fence:
                self._wrong("Fences rise", f"{row['fence']} of {lease_id} after {self.fence}")
            self.fence = int(row["fence"])
            self._in_order(row, change)
        self.leases[lease_id] = row

    def _in_order(self, row: Row, change: Change) -> None:
        """Nobody who lives stands in this line before who is granted: a newcomer comes after all of its priority."""
        assert self.config is not None
        arrived = [arrival for noted, arrival in self.arrivals.get(row["lease_id"], ()) if noted < change.seq]
        mine = (-row["priority"], arrived[-1] if arrived else change.at)
        for other in self.queue.values():
            theirs = (other["rank"], other["arrival"])
            passed = theirs < mine and other["lease_id"] != row["lease_id"] and other["slots"] <= self.config["limit"]
            if passed and self.processes.are_alive(other, change.at):
                self._wrong("In order", f"{row['lease_id']} went before {other['lease_id']}, {mine} before {theirs}")

    def _renewed(self, was: Row, becomes: Row, at: float) -> None:
        lease_id = becomes["lease_id"]
        if was["expires_at"] < becomes["expires_at"] and was["expires_at"] <= at - self.tolerance.visible:
            self._wrong("Never too many", f"{lease_id} came back {at - was['expires_at']:.3f} s after its end")
        if (was["fence"], was["slots"], was["acquired_at"]) != (
            becomes["fence"], becomes["slots"], becomes["acquired_at"]):  # fmt: skip
            self._wrong("Once", f"{lease_id} changed while it was held")
        self.leases[lease_id] = becomes

    def _moment(self, at: float) -> _Moment:
        config: Row = self.config or {"limit": 0, "active": False, "slot_decay_per_second": 0}
        decays = config["slot_decay_per_second"] > 0
        return _Moment(
            at,
            int(config["limit"]),
            bool(config["active"]),
            decays,
            self.level if decays else None,
            [(lease["expires_at"], int(lease["slots"]), lease["lease_id"]) for lease in self.leases.values()],
            sorted(self.queue.values(), key=lambda row: (row["rank"], row["arrival"])),
            self.processes,
        )

    def _look_for_idling(self, until: float) -> None:
        if not self.moments:
            return
        moment = self.moments[-1]
        points = moment.turning_points(until)
        for begins, ends in zip(points, [*points[1:], until], strict=True):
            if not moment.idles(begins):
                self.idle_since = None
                continue
            self.idle_since = begins if self.idle_since is None else self.idle_since
            idle = ends - self.idle_since - self.tolerance.out_of_reach(self.idle_since, ends, self.name_of_limit)
            self.longest_idle = max(self.longest_idle, idle)
            if idle > self.tolerance.wake_up:
                head = moment.head(begins)
                assert head is not None
                self._wrong("No idling", f"{head['lease_id']} waited {idle:.3f} s while its slots were free")
                self.idle_since = ends  # each is told once

    def fits_throughout(self, slots: int, rank: int, since: float, until: float) -> bool:
        """Whether a request for so many slots would have fitted at every moment between these two."""
        first = max(bisect.bisect_right(self.moments, since, key=lambda moment: moment.at) - 1, 0)
        for moment, following in zip(self.moments[first:], [*self.moments[first + 1 :], None], strict=True):
            if moment.at > until:
                break
            last = min(following.at if following else float("inf"), until)
            points = [since, *moment.turning_points(last)] if moment.at <= since else moment.turning_points(last)
            if not all(moment.fits(slots, rank, max(point, since)) for point in points):
                return False
        return bool(self.moments) and self.moments[0].at <= since


def idling_on_several(replays: Mapping[Key, Replay], tolerance: Tolerance) -> list[Violation]:
    """Nobody who stands at the head of a line waits while all its limits are free."""
    found: list[Violation] = []
    moments = sorted(
        ((moment.at, place, moment) for place, replay in replays.items() for moment in replay.moments),
        key=lambda each: each[0],
    )
    now: dict[Key, _Moment] = {}
    free_since: dict[str, float] = {}
    last = 0.0
    for at, place, moment in moments:
        free = {}
        heads = [each.head(last) for each in now.values() if each.line]
        for waiter in (head for head in heads if head is not None and head["parts"] is not None):
            lease_id = waiter["lease_id"]
            parts = {(part["limit_id"], part["key"]): part["slots"] for part in waiter["parts"]}
            if not all(now[part].is_free_for(waiter, slots, last) for part, slots in parts.items() if part in now):
                continue
            since = free[lease_id] = free_since.get(lease_id, last)
            # On a limit that is one of several, nothing may have happened at all.
            names = [replays[part].name_of_limit for part in parts if part in replays]
            idle = at - since - tolerance.out_of_reach(since, at, *names)
            # Plain SQL is told nothing, and looks when it asks again.
            if idle > tolerance.wake_up + (HEARTBEAT if waiter["channel"] is None else 0.0):
                found.append(Violation("No idling", f"{lease_id} waited {idle:.3f} s while {sorted(parts)} were free"))
                free[lease_id] = at  # each is told once
        free_since, last = free, at
        now[place] = moment
    return found


HEARTBEAT = 3.0  # seconds within which whoever waits looks, whatever it was told
