"""What the demo's workers wrote down, and what it amounts to. Nothing here asks the limiter.

All times are seconds of the machine's monotonic clock, which all processes share; the database's are converted to it.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

LATE = 2.0
"""Seconds after which a wake-up counts as missed. A busy system may let a process sleep on, but not that long.
A heartbeat comes every 3 seconds."""

_SLACK = 0.001
"""Seconds by which a time of the database, converted, may be off."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    what: of a worker: ``ask`` for a slot, ``run`` with it, ``release`` it; ``want`` a call, ``call``; ``killed``, and
    its lease ``ended``. Of the demo: the ``limit`` was changed to ``slots``; ``said`` was ``text``.
    """

    at: float
    what: str
    worker: int = 0
    lease: str = ""
    fence: int = 0
    granted: float = 0.0
    slots: int = 0
    text: str = ""


@dataclass(slots=True)
class Seen:
    """What the database showed of a request: when it got in line, and when it was granted."""

    arrived: float | None = None
    granted: float | None = None


@dataclass(slots=True)
class Job:
    """One request for a slot, and what came of it. ``cause``: what freed the slot that it got."""

    worker: int
    asked: float
    ran: float = math.inf
    ended: float = math.inf
    lease: str = ""
    fence: int = 0
    cause: Event | None = None

    @property
    def woken_after(self) -> float | None:
        """Seconds from what freed the slot until the worker ran; None if it did not have to wait for that."""
        return None if self.cause is None or self.asked >= self.cause.at else self.ran - self.cause.at


class Jobs:
    """Follows the log, in the order of time, and pairs each slot that comes free with the job that gets it."""

    def __init__(self, slots: int) -> None:
        self.all: list[Job] = []
        self.slots = slots
        self._latest: dict[int, Job] = {}
        self._free: deque[Event | None] = deque([None] * slots)
        self._owed = 0  # slots that are held beyond a limit that has shrunk

    def follow(self, event: Event) -> Job | None:
        """Take an event in. Returns the job that it belongs to."""
        if event.what == "ask":
            self._latest[event.worker] = Job(event.worker, event.at)
            self.all.append(self._latest[event.worker])
        elif event.what == "limit":
            for _ in range(event.slots - self.slots):
                self._freed(event)
            for _ in range(self.slots - event.slots):
                self._taken()
            self.slots = event.slots
        job = self._latest.get(event.worker)
        if job is not None and event.what == "run":
            job.ran, job.lease, job.fence, job.cause = event.at, event.lease, event.fence, self._taken()
        elif job is not None and event.what in ("release", "ended"):
            job.ended = event.at
            self._freed(event)
        return job

    def _freed(self, event: Event) -> None:
        if self._owed:
            self._owed -= 1
        else:
            self._free.append(event)

    def _taken(self) -> Event | None:
        if self._free:
            return self._free.popleft()
        self._owed += 1
        return None


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, and whether the count bears it out."""

    promise: str
    kept: bool
    counted: str


@dataclass(frozen=True, slots=True)
class Phase:
    """A time during which the limit stood still, and the most slots held at once, the last of them granted in it."""

    limit: int
    grants: int
    most_held: int


@dataclass(frozen=True, slots=True)
class Killed:
    """The worker that was killed, and what became of its slot."""

    worker: int
    lease_left_seconds: float
    slot_back_seconds: float | None = None
    after_lease_end_ms: float | None = None
    to_worker: int | None = None
    was_first_in_line: bool | None = None


@dataclass(slots=True)
class Summary:
    """What was counted."""

    as_promised: bool = True
    workers: int = 0
    grants: int = 0
    releases: int = 0
    phases: list[Phase] = field(default_factory=list)
    waited: int = 0
    passed: int = 0
    wake_ups: int = 0
    wake_up_median_ms: float | None = None
    wake_up_worst_ms: float | None = None
    killed: Killed | None = None
    calls: int = 0
    calls_that_died: int = 0
    calls_per_second: float | None = None
    configured_per_second: float = 0.0
    most_calls_beyond_rate: float | None = None
    burst: int = 0
    held_at_end: int = 0
    waiting_at_end: int = 0
    failures: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Setting:
    """What the demo had configured."""

    workers: int
    slots: int
    per_second: float
    burst: int
    load: float = 0.0
    processors: int = 1


def count(
    log: Iterable[Event],
    seen: Mapping[str, Seen],
    setting: Setting,
    *,
    held_at_end: int,
    waiting_at_end: int,
    failures: Sequence[str] = (),
) -> Summary:
    """Count everything once more, from the whole log.

    failures: what else went wrong, such as a worker that ended with an error.
    """
    events = sorted(log, key=lambda event: event.at)
    jobs = Jobs(setting.slots)
    for event in events:
        jobs.follow(event)
    ran = [job for job in jobs.all if job.ran < math.inf]
    summary = Summary(
        workers=setting.workers,
        grants=len(ran),
        releases=sum(event.what == "release" for event in events),
        configured_per_second=setting.per_second,
        burst=setting.burst,
        held_at_end=held_at_end,
        waiting_at_end=waiting_at_end,
        failures=list(failures),
    )
    checks: list[Callable[[], Check]] = [
        lambda: _never_too_many(summary, ran, events, seen, setting.slots),
        lambda: _in_order(summary, ran, seen),
        lambda: _wake_ups(summary, ran, setting),
        lambda: _killed(summary, ran, events, seen),
        lambda: _rate(summary, events),
        lambda: _never_too_fast(summary, events),
        lambda: _nothing_left(summary),
    ]
    summary.checks = [check() for check in checks]
    summary.as_promised = all(check.kept for check in summary.checks)
    return summary


def _never_too_many(
    summary: Summary, ran: Sequence[Job], events: Sequence[Event], seen: Mapping[str, Seen], slots: int
) -> Check:
    # Most are held just after one more runs, so it is enough to look there. All of them held a slot when the last of
    # them was granted, so the limit of that moment is what measures them: it may change before they run, and they may
    # run in another order.
    changes = [(-math.inf, slots), *((event.at, event.slots) for event in events if event.what == "limit")]

    def phase_of(job: Job) -> int:
        granted = _of(seen, job).granted
        at = job.ran if granted is None else granted
        return max(number for number, (begin, _) in enumerate(changes) if begin <= at)

    grants, most_held = [0 for _ in changes], [0 for _ in changes]
    for job in ran:
        grants[phase_of(job)] += 1
        held = [other for other in ran if other.ran <= job.ran < other.ended]
        for last in (job, max(held, key=lambda other: other.fence, default=job)):
            number = phase_of(last)
            most_held[number] = max(most_held[number], sum(other.fence <= last.fence for other in held))
    summary.phases = [Phase(limit, *counted) for (_, limit), *counted in zip(changes, grants, most_held, strict=True)]
    words = [f"at most {summary.phases[0].most_held} of {slots} slots held at once"]
    for before, phase in zip(summary.phases, summary.phases[1:], strict=False):
        change = "growing" if phase.limit > before.limit else "shrinking"
        words.append(f"{phase.most_held} of {phase.limit} after {change}")
    kept = all(phase.most_held <= phase.limit for phase in summary.phases)
    return Check("never too many", kept, ", ".join(words))


def _in_order(summary: Summary, ran: Sequence[Job], seen: Mapping[str, Seen]) -> Check:
    """Whether any request was granted before one that had waited already when it came."""
    summary.waited = sum(_of(seen, job).arrived is not None for job in ran)
    fences = len({job.fence for job in ran}) == len(ran)
    earliest_left = math.inf  # of those granted later
    for job in sorted(ran, key=lambda job: job.fence, reverse=True):
        arrived = _of(seen, job).arrived
        came = job.asked - _SLACK if arrived is None else arrived  # it cannot have come before it asked
        summary.passed += came > earliest_left
        earliest_left = min(earliest_left, math.inf if arrived is None else arrived)
    if summary.passed:
        counted = f"{summary.passed} of {len(ran)} grants went to a request that came later than one still waiting"
    elif not fences:
        counted = "two grants had the same fence"
    else:
        counted = f"all {len(ran)} grants in the order in which the requests arrived; {summary.waited} had to wait"
    return Check("in order", fences and not summary.passed and bool(ran), counted)


def _wake_ups(summary: Summary, ran: Sequence[Job], setting: Setting) -> Check:
    took = [
        job.woken_after
        for job in ran
        if job.cause is not None and job.cause.what == "release" and job.woken_after is not None
    ]
    summary.wake_ups = len(took)
    if not took:
        return Check("woken at once", False, "nobody was ever woken by a release")
    summary.wake_up_median_ms = _ms(statistics.median(took))
    summary.wake_up_worst_ms = _ms(max(took))
    counted = (
        f"{summary.wake_up_median_ms:.1f} ms (median), {summary.wake_up_worst_ms:.1f} ms (worst) from a release "
        f"until the next in line runs, {len(took)} times"
    )
    if setting.load > setting.processors:
        counted += (
            f". This machine is busy (load {setting.load:.1f} on {setting.processors} processors), "
            "so that includes the wait for a processor"
        )
    return Check("woken at once", max(took) < LATE, counted)


def _killed(summary: Summary, ran: Sequence[Job], events: Sequence[Event], seen: Mapping[str, Seen]) -> Check:
    promise = "a dead worker's slot"
    killed = next((event for event in events if event.what == "killed"), None)
    ended = next((event for event in events if event.what == "ended"), None)
    if killed is None or ended is None:
        return Check(promise, False, "no worker was killed while it held a slot")
    summary.killed = Killed(killed.worker, round(ended.at - killed.at, 3))
    heir = next((job for job in ran if job.cause is ended), None)
    if heir is None or heir.woken_after is None:
        return Check(promise, False, f"the slot of worker {killed.worker} never went to anybody who waited for it")
    first = not any(
        arrived < (_of(seen, heir).arrived or heir.asked) and job.fence > heir.fence
        for job in ran
        if (arrived := _of(seen, job).arrived) is not None
    )
    granted = _of(seen, heir).granted or heir.ran
    summary.killed = Killed(
        killed.worker,
        summary.killed.lease_left_seconds,
        round(heir.ran - killed.at, 3),
        _ms(heir.woken_after),
        heir.worker,
        first,
    )
    counted = (
        f"back {heir.ran - killed.at:.2f} s after the kill, {_ms(heir.woken_after):.1f} ms after its lease ended, "
        f"to worker {heir.worker}, {'first' if first else 'NOT first'} in line"
    )
    return Check(promise, first and granted - ended.at >= -_SLACK and heir.woken_after < LATE, counted)


def _rate(summary: Summary, events: Sequence[Event]) -> Check:
    calls = [event.at for event in events if event.what == "call"]
    summary.calls = len(calls)
    summary.calls_that_died = sum(event.what == "want" for event in events) - len(calls)
    after_burst = calls[summary.burst :]
    if len(after_burst) < 2:
        return Check("never too slow", False, f"only {len(calls)} calls were made")
    summary.calls_per_second = round(
        (len(after_burst) - 1 + summary.calls_that_died) / (after_burst[-1] - after_burst[0]), 3
    )
    counted = (
        f"{summary.calls_per_second:.2f} calls per second, of {summary.configured_per_second:g}, after the burst of "
        f"{summary.burst}; {len(calls)} calls made"
    )
    if summary.calls_that_died:
        counted += f", {summary.calls_that_died} call died with its worker"
    # The last one may be woken a little late: not by a whole call, but for what the machine is known to be late.
    due = summary.burst + summary.configured_per_second * (calls[-1] - calls[0])
    return Check(
        "never too slow", len(calls) + summary.calls_that_died > due * 0.999 - 1 - _in_between(summary), counted
    )


def _in_between(summary: Summary) -> float:
    """How many calls fall due while this machine lets a process sleep on, by the worst wake-up from a release."""
    return summary.configured_per_second * (summary.wake_up_worst_ms or 0.0) / 1000


def _never_too_fast(summary: Summary, events: Sequence[Event]) -> Check:
    calls = [event.at for event in events if event.what == "call"]
    if not calls:
        return Check("never too fast", False, "no call was made")
    rate, first = summary.configured_per_second, 0
    most, window = 0.0, (0, 0)
    for last, at in enumerate(calls):
        if last - rate * at < first - rate * calls[first]:
            first = last  # whatever comes later, a window that begins here is fuller for its length
        beyond = last - first + 1 - rate * (at - calls[first])
        if beyond > most:
            most, window = beyond, (first, last)
    summary.most_calls_beyond_rate = round(most, 2)
    # Measured where the call is made: one that is woken late is closer to the next. Not by a whole call, as above.
    kept = most < summary.burst + 1 + _in_between(summary)
    if kept:
        counted = " and ".join(
            f"{max(bisect.bisect_right(calls, at + seconds) - i for i, at in enumerate(calls))} in any {seconds} s "
            f"(allowed: {summary.burst + rate * seconds:g})"
            for seconds in (1, 5)
        )
        return Check("never too fast", True, f"at most {counted}")
    begin, end = window
    span = calls[end] - calls[begin]
    counted = f"{end - begin + 1} calls within {span:.2f} s; allowed: {summary.burst + rate * span:.1f}"
    return Check("never too fast", False, counted)


def _nothing_left(summary: Summary) -> Check:
    dead = int(summary.killed is not None)
    counted = (
        f"{summary.held_at_end} slots held, {summary.waiting_at_end} requests waiting; "
        f"{summary.grants} grants, {summary.releases} given back, {dead} by the end of a lease"
    )
    if summary.failures:
        counted += "; " + "; ".join(summary.failures)
    even = summary.grants == summary.releases + dead
    return Check(
        "nothing left", even and not (summary.held_at_end or summary.waiting_at_end or summary.failures), counted
    )


def _of(seen: Mapping[str, Seen], job: Job) -> Seen:
    return seen.get(job.lease) or Seen()


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
