"""A history of what processes asked and got, and the proof that it keeps the promises.

Two logs are compared. The clients': every worker writes down what it asks, what it gets, and for how long it believes
to hold it, by the database's clock (they share the machine, and so the clock). The database's: triggers write down
every change of a lease, of a place in line and of a limit, in the transaction that makes it, while that has the lock
of the (limit, key). What the clients believe must lie within what the database says, and that must keep the promises.
"""

from __future__ import annotations

import bisect
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
-- At the commit, as all states of the limit are locked by then: whoever decided by the old one has been noted before.
create constraint trigger history after insert or update or delete on pglimits.configs
  deferrable initially deferred for each row execute function history.note();
"""

_TIMES = ("acquired_at", "expires_at", "arrival")


def record(dsn: str) -> None:
    """Have the database write down what happens to its leases, its queue and its limits."""
    with psycopg.connect(dsn) as connection:
        connection.execute(RECORD.encode())


@dataclass(frozen=True, slots=True)
class Change:
    """One row of a table before and after a change; ``at``: seconds since 1970, read under the lock."""

    seq: int
    tx: int
    at: float
    what: str  # leases, queue or configs
    was: Row | None
    becomes: Row | None

    @property
    def row(self) -> Row:
        found = self.becomes if self.becomes is not None else self.was
        assert found is not None
        return found

    @property
    def place(self) -> Key:
        return int(self.row["limit_id"]), str(self.row["key"])


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

    def out_of_reach(self, name: str, begin: float, end: float) -> float:
        """For how long of that nobody could be granted anything of a limit."""
        total, until = 0.0, begin
        for gone, back in sorted([*self.away, *self.locked.get(name, ())]):
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
    found += _beliefs(history, replays)
    found += _overlaps(history)
    found += _too_fast(history)
    found += _false_refusals(history, replays, tolerance)
    return found


# What the database wrote down, one (limit, key) after the other.


def _replays(history: History, tolerance: Tolerance) -> dict[Key, _Replay]:
    configs: dict[int, list[Change]] = defaultdict(list)
    places: dict[Key, list[Change]] = defaultdict(list)
    arrivals: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for change in history.changes:
        if change.what == "configs":
            configs[int(change.row["limit_id"])].append(change)
            continue
        places[change.place].append(change)
        if change.what == "queue" and change.row["turn"] is None:
            arrivals[change.row["lease_id"]].append((change.seq, change.row["arrival"]))
    return {
        place: _Replay(place, tolerance, arrivals).run([*configs[place[0]], *of_place], history.end)
        for place, of_place in places.items()
    }


@dataclass(slots=True)
class _Moment:
    """What is true of a (limit, key) from a moment on, until the next one."""

    at: float
    limit: int
    enforced: bool
    decays: bool
    leases: list[tuple[float, int]]  # end, slots
    line: list[Row]  # who waits for slots, in their order

    def held(self, at: float) -> int:
        return sum(slots for end, slots in self.leases if end > at)

    def head(self, at: float) -> Row | None:
        """The first in line who is alive, and not told that it asks for too much."""
        return next((row for row in self.line if row["expires_at"] > at and row["slots"] <= self.limit), None)

    def idles(self, at: float) -> bool:
        """Whether a slot is free that somebody waits for. Who waits for several limits needs more than this one, and
        a rate limit more than a slot."""
        head = self.head(at)
        if head is None or head["several"] or self.decays or not self.enforced:
            return False
        return self.held(at) + int(head["slots"]) <= self.limit

    def fits(self, slots: int, rank: int, at: float) -> bool:
        in_front = any(row["expires_at"] > at and row["rank"] <= rank for row in self.line)
        return self.held(at) + slots <= self.limit and not in_front and not self.decays and self.enforced

    def turning_points(self, until: float) -> list[float]:
        """The moments before the next one at which time alone changes something."""
        ends = [*(end for end, _ in self.leases), *(row["expires_at"] for row in self.line)]
        return [self.at, *sorted(end for end in ends if self.at < end < until)]


class _Replay:
    """Goes through what happened to one (limit, key), and finds what breaks a promise."""

    def __init__(self, place: Key, tolerance: Tolerance, arrivals: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        self.place = place
        self.tolerance = tolerance
        self.arrivals = arrivals
        self.found: list[Violation] = []
        self.config: Row | None = None
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
            transaction.sort(key=lambda change: change.seq)
            self._look_for_idling(transaction[-1].at)
            self._apply(transaction)
            self.moments.append(self._moment(transaction[-1].at))
        self._look_for_idling(end)
        for lease in self.leases.values():
            self._lived(lease, float("inf"))
        return self

    def left_over(self) -> list[Violation]:
        held = [lease["lease_id"] for lease in self.leases.values() if lease["expires_at"] > self.end]
        waits = [row["lease_id"] for row in self.queue.values() if row["expires_at"] > self.end and row["turn"] is None]
        return [Violation("Nothing is lost", f"{self.name}: {what} at the end: {ids}")
                for what, ids in (("held", held), ("waiting", waits)) if ids]  # fmt: skip

    def _wrong(self, promise: str, what: str) -> None:
        self.found.append(Violation(promise, f"{self.name}: {what}"))

    def _apply(self, transaction: Sequence[Change]) -> None:
        granted: list[Change] = []
        served = {change.row["lease_id"] for change in transaction if change.what == "leases" and change.was is None}
        left = {change.row["lease_id"] for change in transaction if change.what == "queue" and change.becomes is None}
        in_line = {lease_id: row for lease_id, row in self.queue.items() if lease_id not in left - served}
        for change in transaction:
            was, becomes = change.was, change.becomes
            lease_id = change.row.get("lease_id")
            if change.what == "configs":
                self.config = becomes
                self.name_of_limit = str(change.row["name"])
                self.name = self.name_of_limit + (f" with key {self.place[1]}" if self.place[1] else "")
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
                granted.append(change)
            elif lease_id not in served:
                self._renewed(was, becomes, change.at)
        for change in sorted(granted, key=lambda change: int(change.row["fence"])):
            self._granted(change.row, in_line, change.seq)
        for change in transaction:  # what became of those that it granted
            if change.what == "leases" and change.row["lease_id"] in served:
                self.leases.pop(change.row["lease_id"], None)
                if change.becomes is not None:
                    self.leases[change.becomes["lease_id"]] = change.becomes

    def _lived(self, lease: Row, until: float) -> None:
        self.lives[lease["lease_id"]].append(
            (lease["acquired_at"], min(until, lease["expires_at"]), int(lease["fence"]))
        )

    def _granted(self, row: Row, in_line: Mapping[str, Row], seq: int) -> None:
        lease_id, now = str(row["lease_id"]), float(row["acquired_at"])
        if self.config is None:
            return self._wrong("Never too many", f"{lease_id} was granted though the limit is gone")
        held = sum(lease["slots"] for lease in self.leases.values() if lease["expires_at"] > now)
        if held + row["slots"] > self.config["limit"]:
            self._wrong("Never too many", f"{held} + {row['slots']} of {self.config['limit']} slots, for {lease_id}")
        if row["fence"] <= self.fence:
            self._wrong("Fences rise", f"{row['fence']} of {lease_id} after {self.fence}")
        self.fence = max(self.fence, int(row["fence"]))
        before = self.leases.get(lease_id)
        if before is not None and before["expires_at"] > now:
            self._wrong("Once", f"{lease_id} was granted while it was held")
        arrived = [arrival for noted, arrival in self.arrivals.get(lease_id, ()) if noted < seq]
        mine = (-row["priority"], arrived[-1] if arrived else now)
        for other in in_line.values():
            live = other["turn"] is None and other["expires_at"] > now and other["slots"] <= self.config["limit"]
            if live and (other["rank"], other["arrival"]) < mine and other["lease_id"] not in self.leases:
                self._wrong("In order", f"{lease_id} went before {other['lease_id']}, {mine} before "
                                        f"{(other['rank'], other['arrival'])}")  # fmt: skip
        self.leases[lease_id] = row

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
        line = [row for row in self.queue.values() if row["turn"] is None]
        return _Moment(
            at,
            int(config["limit"]),
            bool(config["active"]),
            config["slot_decay_per_second"] > 0,
            [(lease["expires_at"], int(lease["slots"])) for lease in self.leases.values()],
            sorted(line, key=lambda row: (row["rank"], row["arrival"])),
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
            idle = ends - self.idle_since - self.tolerance.out_of_reach(self.name_of_limit, self.idle_since, ends)
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


def _beliefs(history: History, replays: Mapping[Key, _Replay]) -> list[Violation]:
    """Nobody believes to hold what the database does not say that it holds."""
    found: list[Violation] = []
    lives: dict[str, list[list[tuple[float, float, int]]]] = defaultdict(list)
    for replay in replays.values():
        for lease_id, of_lease in replay.lives.items():
            lives[lease_id].append(of_lease)
    for attempt, said in _attempts(history).items():
        for granted in said.get("granted", ()):
            lease_id, fences = granted.more["lease_id"], granted.more["fences"]
            parts = lives.get(lease_id, [])
            who = f"{lease_id}, of which {attempt} was told the fences {fences}"
            if sorted(of_part[-1][2] for of_part in parts) != sorted(fences):
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

    The moment of a grant lies between the question and its answer; so those count for a window that were asked and
    answered in it.
    """
    found: list[Violation] = []
    forms = _by_name(history)
    grants: dict[tuple[str, str], list[tuple[float, float, int]]] = defaultdict(list)
    for said in _attempts(history).values():
        for went in (*said.get("went", ()), *said.get("granted", ())):
            asked = said["asked"][0]
            for name, slots in asked.more["slots"].items():
                grants[name, asked.more["key"]].append((asked.at, went.at, slots))
    for (name, key), of_place in grants.items():
        rate = max((float(form["slot_decay_per_second"]) for form in forms[name]), default=0.0)
        if not rate:
            continue
        limit = max(int(form["limit"]) for form in forms[name])
        of_place.sort(key=lambda grant: grant[1])
        for begin, _, _ in of_place:
            first = bisect.bisect_left(of_place, begin, key=lambda grant: grant[1])
            if worst := _first_excess(of_place[first : first + WINDOWS], begin, limit, rate):
                found.append(Violation("Never too fast", f"{name} {key}: {worst}"))
                break
    return found


WINDOWS = 1000  # answers that are looked at from each question on


def _first_excess(grants: Sequence[tuple[float, float, int]], begin: float, limit: int, rate: float) -> str | None:
    slots = 0
    for asked, answered, taken in grants:
        if asked >= begin:
            slots += taken
            if slots > limit + rate * (answered - begin) + 1e-6:
                return f"{slots} slots in {answered - begin:.6f} s from {begin:.6f} on"
    return None


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
            if tolerance.out_of_reach(name, asked.at - tolerance.visible, refused.at):
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
            names, lease_id = list(said["asked"][0].more["slots"]), granted.more["lease_id"]
            lives = [life for replay in replays for life in replay.lives.get(lease_id, ())]
            for begin, end, _ in lives if len(names) == 1 else ():
                until = min(granted.at, end)
                seconds = until - begin - tolerance.out_of_reach(names[0], begin, until)
                unheard.append((seconds, f"{attempt} of {granted.worker}, for {names[0]}, from {begin:.3f} on"))
    return max(unheard)


def slots_gone(history: History, name: str) -> list[tuple[float, int]]:
    """When the turns of a rate limit came, as its callers saw it, and how many slots each took."""
    return [
        (went.at, said["asked"][0].more["slots"][name])
        for said in _attempts(history).values()
        for went in said.get("went", ())
        if name in said["asked"][0].more["slots"]
    ]
