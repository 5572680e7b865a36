"""The proof that a history keeps the promises."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from history import History, Key, Row, Said, grants
from history_replay import Replay, Tolerance, Violation, idling_on_several, replays_of


def check(history: History, tolerance: Tolerance | None = None, ended: bool = True) -> list[Violation]:
    """Everything that is wrong with a history.

    Args:
        tolerance: how exact the times are.
        ended: whether all work had ended when it was read, so that nothing may be held and nobody may wait.
    """
    tolerance = tolerance or Tolerance()
    replays = replays_of(history, tolerance)
    found = [violation for replay in replays.values() for violation in replay.found]
    if ended:
        found += [violation for replay in replays.values() for violation in replay.left_over()]
    found += idling_on_several(replays, tolerance)
    found += _lines(history)
    found += _in_parts(history)
    found += _beliefs(history, replays)
    found += _overlaps(history)
    found += _too_fast(history)
    found += _too_early(history)
    found += _false_refusals(history, replays, tolerance)
    return found


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


def _in_parts(history: History) -> list[Violation]:
    """A request over several limits is granted all of them in one transaction, as of one moment."""
    granted: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for change in grants(history):
        granted[change.row["lease_id"], change.tx].append(change.row)
    return [
        Violation("All or nothing", f"{lease_id} was granted {len(rows)} of {rows[0]['parts']} limits")
        for (lease_id, _), rows in granted.items()
        if len(rows) != rows[0]["parts"] or len({row["acquired_at"] for row in rows}) > 1
    ]


def _beliefs(history: History, replays: Mapping[Key, Replay]) -> list[Violation]:
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
    between the question and its answer; so they count for a window that has both in it. Windows between two changes of
    the limit are looked at: whoever was told its moment by a lower rate goes then, beside those who go by a higher one.
    """
    found: list[Violation] = []
    for (name, key), of_limit in _moments(history).items():
        for begins, ends, form in _eras(history, name):
            if not form["slot_decay_per_second"]:
                continue
            of_place = sorted(
                (grant for grant in of_limit if begins <= grant[0] and grant[1] <= ends), key=lambda grant: grant[1]
            )
            for begin, _, _ in of_place:
                first = bisect.bisect_left(of_place, begin, key=lambda grant: grant[1])
                window = of_place[first : first + WINDOWS]
                if worst := _first_excess(window, begin, form["limit"], form["slot_decay_per_second"]):
                    found.append(Violation("Never too fast", f"{name} {key}: {worst}"))
                    break
    return found


WINDOWS = 1000  # grants that are looked at from each on
SETTLES = 0.3  # seconds around a change of a limit: longer than moments are told ahead, and than it takes to commit


def _eras(history: History, name: str) -> Iterator[tuple[float, float, Row]]:
    """From when until when a limit had which form."""
    changes = [change for change in history.changes if change.what == "configs" and change.row["name"] == name]
    for change, following in zip(changes, [*changes[1:], None], strict=True):
        begins = change.at + SETTLES if change.was is not None else 0.0
        if change.becomes is not None:
            yield begins, float("inf") if following is None else following.at - SETTLES, change.becomes


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
    for change in grants(history):
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
    moments = {change.row["lease_id"]: change.row["acquired_at"] for change in grants(history)}
    return [
        Violation("Never too fast", f"{said.attempt} went {moments[said.attempt] - said.at:.6f} s before its moment")
        for said in history.said
        if said.what == "went" and moments.get(said.attempt, 0.0) > said.at + 0.001
    ]


def _false_refusals(history: History, replays: Mapping[Key, Replay], tolerance: Tolerance) -> list[Violation]:
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
    replays = replays_of(history, tolerance or Tolerance())
    return max((replay.longest_idle for replay in replays.values()), default=0.0)


def longest_unheard(history: History, tolerance: Tolerance | None = None) -> tuple[float, str]:
    """For how long (seconds) a lease on one limit was there at most before its holder heard of it, and which.

    One that ended before that counts too: it was granted to nobody.
    """
    tolerance = tolerance or Tolerance()
    unheard = [(0.0, "")]
    replays = replays_of(history, tolerance).values()
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
