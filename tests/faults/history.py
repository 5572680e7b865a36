"""A history of what processes asked and got, and the proof that it keeps the promises.

Two logs are compared. The clients': every worker writes down what it asks, what it gets, and for how long it believes
to hold it, by the database's clock (they share the machine, and so the clock). The database's: triggers write down
every change of a lease, of a place in line, of a level and of a limit, in the transaction that makes it, while that has
the lock of the (limit, key); and every heartbeat. An attempt has the id of its lease. What the clients believe must lie
within what the database says, and that must keep the promises.
"""

from __future__ import annotations

import bisect
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import psycopg

Key: TypeAlias = tuple[int, str]  # limit_id and key
Row: TypeAlias = Mapping[str, Any]

RECORD = """
create schema history;
create table history.changes (
  seq bigserial primary key,
  tx xid8 not null default pg_current_xact_id(),
  at timestamptz not null default clock_timestamp(),
  what text not null,
  was jsonb,
  becomes jsonb
);
create function history.note() returns trigger language plpgsql security definer set search_path = '' as $$
begin
  insert into history.changes (what, was, becomes) values (
    tg_table_name,
    case when tg_op <> 'INSERT' then to_jsonb(old) end,
    case when tg_op <> 'DELETE' then to_jsonb(new) end);
  return null;
end $$;
create trigger history after insert or update or delete on pglimits.leases for each row execute function history.note();
create trigger history after insert or update or delete on pglimits.queue for each row execute function history.note();
create trigger history after insert or update or delete on pglimits.processes
  for each row execute function history.note();
create trigger history after update on pglimits.states for each row
  when (new.slot_decay_per_second > 0
        and (new.booked, new.slot_decay_per_second, new."limit", new.decayed_at)
            is distinct from (old.booked, old.slot_decay_per_second, old."limit", old.decayed_at))
  execute function history.note();
-- At the commit, as all states of the limit are locked by then: whoever decided by the old one has been noted before.
create constraint trigger history after insert or update or delete on pglimits.configs
  deferrable initially deferred for each row execute function history.note();
"""

_TIMES = ("acquired_at", "expires_at", "arrival", "decayed_at")


def record(dsn: str) -> None:
    """Have the database write down what happens to its leases, lines, levels, limits and processes."""
    with psycopg.connect(dsn) as connection:
        connection.execute(RECORD.encode())


@dataclass(frozen=True, slots=True)
class Change:
    """One row of a table before and after a change; ``at``: seconds since 1970, read under the lock."""

    seq: int
    tx: int
    at: float
    what: str  # leases, queue, states, configs or processes
    was: Row | None
    becomes: Row | None

    @property
    def row(self) -> Row:
        found = self.becomes if self.becomes is not None else self.was
        assert found is not None
        return found

    @property
    def place(self) -> Key:
        return _place(self.row)

    def by_place(self) -> list[Change]:
        """It as each (limit, key) sees it: who goes to stand in another line leaves one."""
        if self.was is None or self.becomes is None or _place(self.was) == _place(self.becomes):
            return [self]
        return [replace(self, becomes=None), replace(self, was=None)]


def _place(row: Row) -> Key:
    return int(row["limit_id"]), str(row["key"])


def is_held(row: Row) -> bool:
    """Whether a row of leases is a lease: it may be slots that are kept, or what became of a request."""
    return bool(row["fence"] and row["slots"])


@dataclass(frozen=True, slots=True)
class Said:
    """One line of a worker's log: what it did, or learned, and when (seconds since 1970)."""

    at: float
    worker: str
    attempt: str
    what: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class History:
    """Everything that was written down until ``end`` (seconds since 1970)."""

    changes: Sequence[Change]
    said: Sequence[Said]
    end: float


def read(dsn: str, logs: Iterable[Path] = ()) -> History:
    """The history that the database and the workers have written."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "select seq, tx::text::bigint, extract(epoch from at)::float8, what, was, becomes"
            " from history.changes order by seq"
        ).fetchall()
    changes = [
        Change(seq, tx, at, what, _with_seconds(was), _with_seconds(becomes))
        for seq, tx, at, what, was, becomes in rows
    ]
    said = [line for log in logs for line in read_log(log)]
    return History(changes, sorted(said, key=lambda line: line.at), time.time())


def read_log(log: Path) -> Iterator[Said]:
    """The lines of a worker's log. Of one that was killed, the last may be torn."""
    for text in log.read_text().splitlines(keepends=True):
        if text.endswith("\n"):
            at, worker, attempt, what, more = json.loads(text)
            yield Said(at, worker, attempt, what, more)


def _with_seconds(row: dict[str, Any] | None) -> Row | None:
    if row is None:
        return None
    return row | {name: _seconds(row[name]) for name in _TIMES if name in row}


def _seconds(moment: str) -> float:
    return float("inf") if moment == "infinity" else datetime.fromisoformat(moment).timestamp()


# What may be wrong.


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


def check(history: History, tolerance: Tolerance | None = None, ended: bool = True) -> list[Violation]:
    """Everything that is wrong with a history.

    Args:
        tolerance: how exact the times are.
        ended: whether all work had ended when it was read, so that nothing may be held and nobody may wait.
    """
    tolerance = tolerance or Tolerance()
    replays = _replays(history, tolerance)
    found = [violation for replay in replays.values() for violation in replay.found]
    if ended:
        found += [violation for replay in replays.values() for violation in replay.left_over()]
    found += _idling_on_several(replays, tolerance)
    found += _lines(history)
    found += _in_parts(history)
    found += _beliefs(history, replays)
    found += _overlaps(history)
    found += _too_fast(history)
    found += _too_early(history)
    found += _false_refusals(history, replays, tolerance)
    return found


# What the database wrote down, one (limit, key) after the other.


def _replays(history: History, tolerance: Tolerance) -> dict[Key, _Replay]:
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
        place: _Replay(place, tolerance, arrivals, processes).run([*configs[place[0]], *of_place], history.end)
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


class _Replay:
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

    def run(self, changes: Iterable[Change], end: float) -> _Replay:
        self.end = end
        transactions: dict[int, list[Change]] = defaultdict(list)
        for change in changes:
            transactions[change.tx].append(change)
        # In the order in which they ended their work here. A renewal takes no lock of the (limit, key), and may fall
        # into the middle of another.
        for transaction in sorted(transactions.values(), key=lambda each: each[-1].seq):
            self._look_for_idling(transaction[-1].at)
            for change in sorted(transaction, key=lambda change: change.seq):
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


def _idling_on_several(replays: Mapping[Key, _Replay], tolerance: Tolerance) -> list[Violation]:
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
            idle = at - since - tolerance.out_of_reach(since, at, *(replays[part].name_of_limit for part in parts))
            # Plain SQL is told nothing, and looks when it asks again.
            if idle > tolerance.wake_up + (HEARTBEAT if waiter["channel"] is None else 0.0):
                found.append(Violation("No idling", f"{lease_id} waited {idle:.3f} s while {sorted(parts)} were free"))
                free[lease_id] = at  # each is told once
        free_since, last = free, at
        now[place] = moment
    return found


HEARTBEAT = 3.0  # seconds within which whoever waits looks, whatever it was told


# What the clients wrote down.


def _by_name(history: History) -> dict[str, list[Row]]:
    """Every form that the limit of a name ever had."""
    forms: dict[str, list[Row]] = defaultdict(list)
    for change in history.changes:
        if change.what == "configs" and change.becomes is not None:
            forms[str(change.becomes["name"])].append(change.becomes)
    return forms


def _attempts(history: History) -> dict[str, dict[str, list[Said]]]:
    """Of every attempt, what was said of it, by kind."""
    attempts: dict[str, dict[str, list[Said]]] = defaultdict(lambda: defaultdict(list))
    for said in history.said:
        attempts[said.attempt][said.what].append(said)
    return attempts


def _believed(said: Mapping[str, Sequence[Said]]) -> list[float]:
    """The moments at which a holder knew of nothing but that it held its lease."""
    return [each.at for what in ("granted", "still", "leaving") for each in said.get(what, ()) if not each.more["lost"]]


def _lines(history: History) -> list[Violation]:
    """A request stands in one line at a time, in each by its first arrival."""
    found: list[Violation] = []
    stands: dict[str, Row] = {}
    for change in history.changes:
        if change.what != "queue":
            continue
        lease_id, before = change.row["lease_id"], stands.pop(change.row["lease_id"], None)
        if change.becomes is None:
            continue
        stands[lease_id] = change.becomes
        if change.was is None and before is not None:
            found.append(Violation("In order", f"{lease_id} stands in two lines"))
        elif change.was is not None and any(change.was[name] != change.becomes[name] for name in ("rank", "arrival")):
            found.append(Violation("In order", f"{lease_id} stands elsewhere by another arrival"))
    return found


def _grants(history: History) -> Iterator[Change]:
    """The rows of leases that tell of a grant: one for each limit."""
    for change in history.changes:
        if change.what == "leases" and change.was is None and change.row["fence"]:
            yield change


def _in_parts(history: History) -> list[Violation]:
    """A request over several limits is granted all of them in one transaction, as of one moment."""
    grants: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for change in _grants(history):
        grants[change.row["lease_id"], change.tx].append(change.row)
    return [
        Violation("All or nothing", f"{lease_id} was granted {len(rows)} of {rows[0]['parts']} limits")
        for (lease_id, _), rows in grants.items()
        if len(rows) != rows[0]["parts"] or len({row["acquired_at"] for row in rows}) > 1
    ]


def _beliefs(history: History, replays: Mapping[Key, _Replay]) -> list[Violation]:
    """Nobody believes to hold what the database does not say that it holds."""
    found: list[Violation] = []
    lives: dict[str, list[list[tuple[float, float, int]]]] = defaultdict(list)
    for replay in replays.values():
        for lease_id, of_lease in replay.lives.items():
            lives[lease_id].append(of_lease)
    for attempt, said in _attempts(history).items():
        for granted in said.get("granted", ()):
            parts = lives.get(attempt, [])
            who = f"{attempt}, which was told the fences {granted.more['fences']}"
            if sorted(of_part[-1][2] for of_part in parts) != sorted(granted.more["fences"]):
                found.append(Violation("Nothing is lost", f"{who}: the database has {parts}"))
                continue
            for at in _believed(said):
                if not all(any(begins <= at <= ends for begins, ends, _ in of_part) for of_part in parts):
                    found.append(Violation("Never too many", f"{who}: believed in at {at:.6f}, lived {parts}"))
                    break
    return found


def _overlaps(history: History) -> list[Violation]:
    """By the clients' word alone: never more at once than the limit ever was."""
    found: list[Violation] = []
    most = {name: max(int(form["limit"]) for form in forms) for name, forms in _by_name(history).items()}
    edges: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for said in _attempts(history).values():
        believed = _believed(said)
        if believed and said.get("asked"):
            asked = said["asked"][0].more
            for name, slots in asked["slots"].items():
                edges[name, asked["key"]] += [(min(believed), slots), (max(believed), -slots)]
    for (name, key), of_place in edges.items():
        held = 0
        for at, slots in sorted(of_place):
            held += slots
            if name in most and held > most[name]:
                found.append(Violation("Never too many", f"{held} of {most[name]} slots of {name} {key} at {at:.6f}"))
                break
    return found


def _too_fast(history: History) -> list[Violation]:
    """In no window do rate limits grant more than the limit and what decays in it.

    What counts is the moment of each grant. The database tells that of those who stood in line. That of others lies
    between the question and its answer; so they count for a window that has both in it.
    """
    found: list[Violation] = []
    forms = _by_name(history)
    for (name, key), grants in _moments(history).items():
        rate = max((float(form["slot_decay_per_second"]) for form in forms[name]), default=0.0)
        if not rate:
            continue
        limit = max(int(form["limit"]) for form in forms[name])
        grants.sort(key=lambda grant: grant[1])
        for begin, _, _ in grants:
            first = bisect.bisect_left(grants, begin, key=lambda grant: grant[1])
            if worst := _first_excess(grants[first : first + WINDOWS], begin, limit, rate):
                found.append(Violation("Never too fast", f"{name} {key}: {worst}"))
                break
    return found


WINDOWS = 1000  # grants that are looked at from each on


def _moments(history: History) -> dict[tuple[str, str], list[tuple[float, float, int]]]:
    """Of each (limit, key), the grants: between which moments they were, and how many slots they took."""
    names = {form["limit_id"]: name for name, forms in _by_name(history).items() for form in forms}
    wanted: dict[tuple[str, str, str], int] = {}
    known: dict[tuple[str, str, str], float] = {}
    answered: dict[tuple[str, str, str], tuple[float, float]] = {}
    for attempt, said in _attempts(history).items():
        for name, slots in said["asked"][0].more["slots"].items() if said["asked"] else ():
            place = (attempt, name, said["asked"][0].more["key"])
            wanted[place] = slots
            for went in (*said.get("went", ()), *said.get("granted", ())):
                answered[place] = said["asked"][0].at, went.at
    for change in _grants(history):
        place = (change.row["lease_id"], names.get(change.row["limit_id"], ""), change.row["key"])
        wanted.setdefault(place, change.row["slots"])
        known[place] = change.row["acquired_at"]
    found: dict[tuple[str, str], list[tuple[float, float, int]]] = defaultdict(list)
    for place in {*known, *answered}:
        earliest, latest = (known[place], known[place]) if place in known else answered[place]
        found[place[1:]].append((earliest, latest, wanted[place]))
    return found


def _first_excess(grants: Sequence[tuple[float, float, int]], begin: float, limit: int, rate: float) -> str | None:
    slots = 0
    for earliest, latest, taken in grants:
        if earliest >= begin:
            slots += taken
            if slots > limit + rate * (latest - begin) + 1e-3:
                return f"{slots} slots in {latest - begin:.6f} s from {begin:.6f} on"
    return None


def _too_early(history: History) -> list[Violation]:
    """Nobody goes before the moment of its grant."""
    moments = {change.row["lease_id"]: change.row["acquired_at"] for change in _grants(history)}
    return [
        Violation("Never too fast", f"{said.attempt} went {moments[said.attempt] - said.at:.6f} s before its moment")
        for said in history.said
        if said.what == "went" and moments.get(said.attempt, 0.0) > said.at + 0.001
    ]


def _false_refusals(history: History, replays: Mapping[Key, _Replay], tolerance: Tolerance) -> list[Violation]:
    """What fits is not refused. For requests on one limit, from long enough before the question to its answer."""
    found: list[Violation] = []
    ids = {name: {int(form["limit_id"]) for form in forms} for name, forms in _by_name(history).items()}
    for attempt, said in _attempts(history).items():
        for refused in said.get("refused", ()):
            asked = said["asked"][0]
            if len(asked.more["slots"]) != 1 or asked.more.get("rate"):
                continue
            ((name, slots),) = asked.more["slots"].items()
            if tolerance.out_of_reach(asked.at - tolerance.visible, refused.at, name):
                continue
            for limit_id in ids.get(name, ()):
                replay = replays.get((limit_id, asked.more["key"]))
                rank = -asked.more["priority"]
                if replay and replay.fits_throughout(slots, rank, asked.at - tolerance.visible, refused.at):
                    found.append(
                        Violation("No false refusal", f"{attempt} was refused {slots} of {name} at {asked.at:.6f}")
                    )
    return found


def longest_idle(history: History, tolerance: Tolerance | None = None) -> float:
    """For how long (seconds) slots stayed free at most while a live waiter fitted."""
    replays = _replays(history, tolerance or Tolerance())
    return max((replay.longest_idle for replay in replays.values()), default=0.0)


def longest_unheard(history: History, tolerance: Tolerance | None = None) -> tuple[float, str]:
    """For how long (seconds) a lease on one limit was there at most before its holder heard of it, and which.

    One that ended before that counts too: it was granted to nobody.
    """
    tolerance = tolerance or Tolerance()
    unheard = [(0.0, "")]
    replays = _replays(history, tolerance).values()
    for attempt, said in _attempts(history).items():
        for granted in said.get("granted", ()):
            names = list(said["asked"][0].more["slots"])
            lives = [life for replay in replays for life in replay.lives.get(attempt, ())]
            for begin, end, _ in lives if len(names) == 1 else ():
                until = min(granted.at, end)
                seconds = until - begin - tolerance.out_of_reach(begin, until, names[0])
                unheard.append((seconds, f"{attempt} of {granted.worker}, for {names[0]}, from {begin:.3f} on"))
    return max(unheard)


def slots_gone(history: History, name: str) -> list[tuple[float, int]]:
    """When callers of a rate limit went, and how many slots each took."""
    return [
        (went.at, said["asked"][0].more["slots"][name])
        for said in _attempts(history).values()
        for went in said.get("went", ())
        if name in said["asked"][0].more["slots"]
    ]
