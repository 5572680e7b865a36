"""Rows about callers that wait: how soon the next one runs, and how exactly a rate is delivered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from pglimits import Limiter

from ._measure import Spread, percentile, slope, spread
from ._processes import Worker, worker, workers
from ._results import Result, Target, at_most, line
from ._rows import ROWS, Bench, row
from ._server import Site

_WAITERS = 100
_BREATH = 0.002
"""Seconds between a grant and the release that follows: nothing of the grant is still under way by then."""
_STARTING = 1.0
"""Seconds after the start of a stream that are not counted."""


@row("hand-over", "release -> waiter running, 100 waiters")
def hand_over(bench: Bench) -> Iterator[Result]:
    """From the call of release in one process to the waiter's next line in another, against NOTIFY to a listener."""
    yield from _hand_over(bench, "hand-over", "tasks")


@row("hand-over-threads", "release -> waiter running, 100 waiters, threads")
def hand_over_threads(bench: Bench) -> Iterator[Result]:
    """The same to threads, which a process wakes more slowly than tasks."""
    yield from _hand_over(bench, "hand-over-threads", "threads")


def _hand_over(bench: Bench, name: str, flavour: str) -> Iterator[Result]:
    scale = bench.scale
    with bench.site() as site, Limiter(site.dsn) as limiter:
        limit, channel = site.name("turns"), site.name("floor").replace("-", "_")
        limiter.create(limit, 1)
        held = str(limiter.acquire(limit, renew=False).id)
        queue = {"role": "queue", "flavour": flavour, "dsn": site.dsn, "name": limit, "waiters": _WAITERS}
        with (
            worker(queue) as in_line,
            worker({"role": "listen", "dsn": site.dsn, "channel": channel}) as listener,
        ):
            _until_waiting(limiter, limit, _WAITERS)
            notify, released = _Notify(site, channel, listener), _Release(limiter, in_line, held)
            ours: list[list[float]] = []
            floor: list[list[float]] = []
            for number in range(scale.repetitions + 1):  # the first warms up
                mine, other = ([measure.ms() for _ in range(scale.handovers)] for measure in (released, notify))
                if number:
                    ours.append(mine)
                    floor.append(other)
            notify.close()
    for part, target in ((0.5, at_most(4)), (0.99, at_most(5, "ours"))):
        yield line(
            name,
            f"{ROWS[name].what}, p{part * 100:.0f}",
            "ms",
            _over_repetitions(ours, part),
            f"bare NOTIFY -> listener, p{part * 100:.0f}",
            _over_repetitions(floor, part),
            target,
        )


def _over_repetitions(measured: list[list[float]], part: float) -> Spread:
    """A percentile of all, with those of the repetitions as its spread."""
    of_each = spread([percentile(each, part) for each in measured])
    return replace(of_each, median=percentile([ms for each in measured for ms in each], part))


class _Release:
    """Gives the slot to the next in line."""

    def __init__(self, limiter: Limiter, in_line: Worker, held: str) -> None:
        self._limiter, self._in_line, self._held = limiter, in_line, held

    def ms(self) -> float:
        time.sleep(_BREATH)
        began = time.monotonic_ns()
        self._limiter.release(self._held)
        ran = self._in_line.answer()
        self._held = ran["lease"]
        return float(ran["at"] - began) / 1e6


class _Notify:
    """Wakes a listener."""

    def __init__(self, site: Site, channel: str, listener: Worker) -> None:
        self._connection = site.connect()
        self._sql, self._listener = f'notify "{channel}"'.encode(), listener

    def ms(self) -> float:
        time.sleep(_BREATH)
        began = time.monotonic_ns()
        self._connection.execute(self._sql)
        return float(self._listener.answer()["at"] - began) / 1e6

    def close(self) -> None:
        self._connection.close()


def _until_waiting(limiter: Limiter, name: str, waiters: int, patience: float = 60.0) -> None:
    until = time.monotonic() + patience
    while limiter.get(name).waiting < waiters:
        if time.monotonic() > until:
            raise TimeoutError(f"{limiter.get(name).waiting} of {waiters} wait after {patience:g} s")
        time.sleep(0.02)


@row("delivered", "delivered / configured rate, 100 waiters")
def delivered(bench: Bench) -> Iterator[Result]:
    """A rate limit that everybody always waits for, watched from outside; the burst at the start is not counted."""
    per_second, burst, processes = 200.0, 10, 2
    scale = bench.scale
    found = []
    with bench.site() as site, Limiter(site.dsn) as limiter:
        task = {"role": "calls", "subject": "ours", "flavour": "tasks", "dsn": site.dsn, "rate": True}
        for number in range(1 if scale.repetitions < 5 else 3):
            name = site.name(f"rate-{number}")
            limiter.create(name, burst, slot_decay_per_second=per_second)
            with workers([{**task, "name": name}] * processes) as started:
                for each in started:
                    each.tell("stream", callers=_WAITERS // processes, seconds=scale.stream_seconds)
                moments = sorted(moment for each in started for moment in each.answer()["moments"])
            # Not the start, when all come at once, nor the turns after the end, when fewer and fewer wait.
            begin, end = moments[0] + _STARTING, moments[0] + scale.stream_seconds
            steady = [moment for moment in moments if begin <= moment <= end]
            found.append(slope(steady) / per_second)
    target = Target("within", 0.999, "ours", 1.0)
    yield line("delivered", ROWS["delivered"].what, "", spread(found), f"{per_second:g}/s", target=target)
