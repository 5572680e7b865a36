"""What a run has found out: lines of the table, curves, and what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from ._measure import Spread, ratio

Relation = Literal["<=", ">=", "<", ">", "within"]


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached, by the ratio or by our own figure."""

    relation: Relation
    value: float
    of: Literal["ratio", "ours"] = "ratio"
    up_to: float | None = None
    """The other end, for ``within``."""
    or_above: str = ""
    """Or ours is above theirs by no more than this takes, which is measured beside them."""

    def met_by(self, figure: float) -> bool:
        """Whether a figure reaches it."""
        if self.relation == "within":
            assert self.up_to is not None
            return self.value <= round(figure, 3) <= self.up_to
        return {
            "<=": figure <= self.value,
            ">=": figure >= self.value,
            "<": figure < self.value,
            ">": figure > self.value,
        }[self.relation]

    def told(self, unit: str) -> str:
        """For a table. unit: of our own figure."""
        if self.relation == "within":
            return f"{self.value:g}-{self.up_to:.3f}"
        return f"{self.relation} {self.value:g} {'x' if self.of == 'ratio' else unit}".rstrip()


def at_most(value: float, of: Literal["ratio", "ours"] = "ratio", or_above: str = "") -> Target:
    return Target("<=", value, of, or_above=or_above)


def at_least(value: float, of: Literal["ratio", "ours"] = "ratio") -> Target:
    return Target(">=", value, of)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table.

    Attributes:
        row: what ``--only`` calls it.
        what: what was measured.
        unit: of ours and theirs.
        ours: our figure.
        against: the floor or the peer: what it is.
        theirs: its figure; None where the target is an absolute one.
        ratio: how many times theirs ours is; None where theirs is 0.
        target: what is to be reached; None: shown for information.
        above: what ``target.or_above`` names.
        met: whether it was reached; None without a target.
        note: what one has to know to read it.
    """

    row: str
    what: str
    unit: str
    ours: Spread
    against: str
    theirs: Spread | None
    ratio: Spread | None
    target: Target | None
    above: Spread | None
    met: bool | None
    note: str = ""


def line(
    row: str,
    what: str,
    unit: str,
    ours: Spread,
    against: str = "",
    theirs: Spread | None = None,
    target: Target | None = None,
    above: Spread | None = None,
    note: str = "",
) -> Line:
    """A line, with its ratio and whether the target was met."""
    times = ratio(ours, theirs) if theirs is not None and all(theirs.values) else None
    met = None
    if target is not None:
        figure = ours if target.of == "ours" else times
        assert figure is not None, "a target for the ratio needs something to compare with"
        met = target.met_by(figure.median)
        if above is not None and theirs is not None:
            more = median(mine - other for mine, other in zip(ours.values, theirs.values, strict=True))
            met = met or more <= above.median
    return Line(row, what, unit, ours, against, theirs, times, target, above, met, note)


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve: the time of a call at one size, and what the tables of pglimits then take up."""

    x: float
    ms: Spread
    disk_bytes: int | None = None
    dead_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """How the time of a call grows with something.

    Attributes:
        row: what ``--only`` calls it.
        what: what the time of a call is looked at against.
        x: what is counted on the x axis.
        points: by x.
        note: what one has to know to read it.
    """

    row: str
    what: str
    x: str
    points: tuple[Point, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """What could not be measured, and what to do about it."""

    row: str
    what: str
    why: str


Result = Line | Curve | Skipped


@dataclass(slots=True)
class Run:
    """Everything about one run.

    Attributes:
        setup: machine, versions, settings, peers, each by name.
        seconds: how long it took; ``row_seconds``: each row.
        skipped: what could not take part. ``failed``: what should have, and why it did not.
    """

    mode: str
    started_at: str
    setup: dict[str, dict[str, str]]
    seconds: float = 0.0
    row_seconds: dict[str, float] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failed: list[Skipped] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Note a result."""
        if isinstance(result, Line):
            self.lines.append(result)
        elif isinstance(result, Curve):
            self.curves.append(result)
        else:
            self.skipped.append(result)
