"""The figures: what is measured, beside which floor or peer, and what is to be reached. Nothing else says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._measure import Spread
from ._results import Line, Target, at_least, at_most, line


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table, before it is measured.

    Attributes:
        row: what ``--only`` calls the row that measures it.
        part: of that row; empty where it has no other.
        what: is measured; ``{size}`` in it stands for how many, which a short run has fewer of.
        unit: of the figure, and of the floor's.
        floor: what it is compared with, measured in the same run; empty: nothing.
        reach: what is to be reached; None: shown for information.
        peer: whether others have to be installed for it.
    """

    row: str
    part: str
    what: str
    unit: str
    floor: str = ""
    reach: Target | None = None
    peer: bool = False
    size: int = 0
    """How many ``{size}`` is, in a full run."""

    def named(self, size: int = 0) -> str:
        """What is measured, with so many."""
        return self.what.format(size=f"{size or self.size:,}")

    def wanted(self) -> str:
        """What is to be reached, in words."""
        if self.reach is None:
            return ""
        other = f", or above by no more than {self.reach.or_above}" if self.reach.or_above else ""
        return self.reach.told(self.unit) + other

    def line(
        self, ours: Spread, theirs: Spread | None = None, *, variant: str = "", size: int = 0, **more: Any
    ) -> Line:
        """The line with what was measured.

        Args:
            ours: our figure.
            theirs: the floor's.
            variant: which of several floors or peers it is.
            size: how many there were.
            more: ``above``, ``note``, as of ``Line``.
        """
        against = self.floor + (f", {variant}" if variant else "")
        return line(self.row, self.named(size), self.unit, ours, against, theirs, self.reach, **more)


_ONE_ROW = "pgbench: UPDATE of one row"
_BEST = f"{_ONE_ROW}, best of 1, 8, 32 clients"
_UPDATE = "a bare UPDATE through psycopg"
_SUMS = "a bare aggregate over as many rows"
_FIRST = "the same with 1"
_RATE = Target("within", 0.999, "ours", 1.0)


def _alone(row: str, what: str, commits: str, factor: float) -> Figure:
    """What one caller pays beside bare commits, with nobody else there."""
    floor = f"{commits} through psycopg, durable"
    return Figure(row, "", what, "ms", floor, at_most(factor, or_above=f"{commits} with synchronous_commit = off"))


def _hand_over(row: str, waiters: str) -> list[Figure]:
    """How soon a waiter runs."""
    return [
        Figure(
            row, part, f"release -> waiter running, {waiters}, {part}", "ms", f"bare NOTIFY -> listener, {part}", reach
        )
        for part, reach in (("p50", at_most(4)), ("p99", at_most(5, "ours")))
    ]


def _peer(row: str, called: str, work: str, unit: str) -> list[Figure]:
    """What a peer is compared by: calls, with a target; and what else is known of it."""
    found = [
        Figure(row, "1", f"1 caller, {work}", "ms", called, Target("<", 1), peer=True),
        Figure(row, "8", f"8 callers, one hot limit, {work}", unit, called, Target(">", 1), peer=True),
        Figure(row, "64", f"64 callers, one hot limit, {work}", unit, called, Target(">", 1), peer=True),
        Figure(row, "refused", "8 callers that do not wait, refused though there is room", "%", called, peer=True),
        Figure(row, "hand-over", "a slot comes free -> a waiter has it", "ms", called, peer=True),
        Figure(row, "delivered", "delivered / configured rate, 8 callers", "", called, peer=True),
    ]
    return [each for each in found if each.part != "hand-over" or unit == "pairs/s"]


def _reads(view: str, many: str, of: str, most: int) -> Figure:
    """A view over so many limits, or keys of one limit."""
    what = f"the view of {view}, {{size}} {of}, jit on"
    return Figure("views", f"{view} of {many}", what, "ms", _SUMS, at_most(3), size=most)


def _three(rate: str) -> Figure:
    """One of three limits that callers use at once."""
    what = f"delivered / configured rate over three limits, 100 waiters, that of {rate}/s"
    return Figure("delivered-three", rate, what, "", reach=_RATE)


_TASKS = "1 process, 256 tasks, one limit, durable, acquire + release"
_PROCESSES = "8 processes with 32 tasks each, one limit, durable, acquire + release"
_WAITING = "8 connections calling acquire_wait and release_wait, one limit, durable"
_MANY = "8 connections calling acquire and release, over 1,000 limits, durable"
_REFUSED = "refusals of a full limit, 8 connections"
_MANY_ROWS, _BY_KEY = "pgbench: UPDATE over 1,000 rows, 8 clients", "pgbench: SELECT by primary key, 8 clients"
_SNAPSHOT = "{size} calls with an old snapshot open, the last tenth"
_BLOCKED = "20 connections that block in acquire_wait for 10 s: server CPU"
_WOKEN = "release -> a connection in acquire_wait has its slot"

FIGURES = (
    _alone("uncontended", "1 client, sync, acquire + release, durable", "two bare UPDATE commits", 1.4),
    _alone("uncontended-rate", "1 client, sync, rate_limit that need not wait, durable", "one bare UPDATE commit", 1.3),
    Figure("cpu", "acquire", "server CPU of acquire", "us", _UPDATE, at_most(2.5)),
    Figure("cpu", "release", "server CPU of release", "us", _UPDATE, at_most(2)),
    Figure("cpu", "rate_limit", "server CPU of rate_limit", "us", _UPDATE, at_most(2)),
    Figure("one-process", "", _TASKS, "pairs/s", _BEST, at_least(8)),
    Figure("eight-processes", "", _PROCESSES, "pairs/s", _BEST, at_least(5)),
    Figure("sql-one-limit", "", _WAITING, "calls/s", f"{_ONE_ROW}, 8 clients", at_least(2)),
    Figure("sql-many-limits", "", _MANY, "calls/s", _MANY_ROWS, at_least(0.7)),
    Figure("refusals", "", _REFUSED, "calls/s", _BY_KEY, at_least(0.5)),
    *_hand_over("hand-over", "100 waiters"),
    *_hand_over("hand-over-threads", "100 waiters in threads"),
    Figure("snapshot", "", _SNAPSHOT, "calls/s", "the same without one", at_least(0.9), size=500_000),
    Figure("keys", "", "time of a call, 1 -> {size} keys of a limit", "ms", _FIRST, at_most(1.1), size=1_000_000),
    Figure("leases", "", "time of a call, 1 -> {size} leases on a limit", "ms", _FIRST, at_most(1.1), size=100_000),
    Figure("waiters", "", "time of a call, 1 -> {size} waiters on a limit", "ms", _FIRST, at_most(1.1), size=10_000),
    *(_reads(view, "limits", "limits", 10_000) for view in ("limits", "keys")),
    *(_reads(view, "keys", "keys of one limit", 100_000) for view in ("limits", "keys")),
    Figure("blocked", "cpu", _BLOCKED, "s", reach=at_most(0.3, "ours")),
    Figure("blocked", "p50", f"{_WOKEN}, p50", "ms"),
    Figure("blocked", "p99", f"{_WOKEN}, p99", "ms", reach=at_most(10, "ours")),
    Figure("delivered", "", "delivered / configured rate of 200/s, 100 waiters", "", reach=_RATE),
    *map(_three, ("5", "50", "200")),
    *_peer("prefect", "Prefect's server", "acquire + release", "pairs/s"),
    *_peer("redis-limits", "limits on Redis, appendfsync always", "a call", "calls/s"),
    *_peer("redis-throttled", "throttled-py on Redis, appendfsync always", "a call", "calls/s"),
    *_peer("pyrate", "PyrateLimiter on PostgreSQL", "a call", "calls/s"),
)
"""In the order in which they are measured and shown."""


def figures(row: str) -> list[Figure]:
    """Those of a row."""
    return [each for each in FIGURES if each.row == row]


def figure(row: str, part: str = "") -> Figure:
    """One of them."""
    (found,) = (each for each in figures(row) if each.part == part)
    return found
