"""Rows about callers that wait: how soon the next one runs, and how exactly a rate is delivered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from pglimits import Limiter

from ._figures import figure
from ._measure import Spread, percentile, slope, spread
from ._processes import Worker, worker, workers
from ._results import Result
from ._rows import Bench, row
from ._server import Site

_WAITERS = 100
_BREATH = 0.002
"""Seconds between a grant and the release that follows: nothing of the grant is still under way by then."""
_STARTING = 1.0
"""Seconds after the start of a stream that are not counted: all come at once, and use up the burst."""
_STARTING_THREE = 5.0
"""Over several limits it takes longer until the burst of the slowest is used up."""


@row("hand-over")
def hand_over(bench: Bench) -> Iterator[Result]:
    """From the call of release in one process to the waiter's next line in another, against NOTIFY to a listener."""
    yield from _hand_over(bench, "hand-over", "tasks")


@row("hand-over-threads")
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
    for part in (50, 99):
        figures = [_over_repetitions(each, part / 100) for each in (ours, floor)]
        yield figure(name, f"p{part}").line(*figures)


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


@row("delivered")
def delivered(bench: Bench) -> Iterator[Result]:
    """A rate limit that everybody always waits for, watched from outside; the burst at the start is not counted."""
    found = []
    with bench.site() as site:
        for number in range(bench.scale.streams):
            (mine,) = _deliver(bench, site, {f"rate-{number}": 200.0}, 10, [(50, [0]), (50, [0])], _STARTING)
            found.append(mine)
    yield figure("delivered").line(spread(found))


@row("delivered-three")
def delivered_three(bench: Bench) -> Iterator[Result]:
    """Callers of all kinds on three rate limits at once: of one of them, of two, and of all three."""
    rates, found = (5.0, 50.0, 200.0), []
    with bench.site() as site:
        for number in range(bench.scale.streams):
            limits = {f"rate-{number}-{rate:g}": rate for rate in rates}
            crowd = [(10, [0, 1, 2]), (40, [1]), (40, [2]), (10, [1, 2])]
            found.append(_deliver(bench, site, limits, 5, crowd, _STARTING_THREE))
    for rate, of_this in zip(rates, zip(*found, strict=True), strict=True):
        yield figure("delivered-three", f"{rate:g}").line(spread(of_this))


def _deliver(
    bench: Bench, site: Site, rates: dict[str, float], burst: int, crowd: list[tuple[int, list[int]]], starting: float
) -> list[float]:
    """How much of each rate is delivered. crowd: for each process how many callers, over which of the limits."""
    seconds = starting + bench.scale.stream_seconds
    with Limiter(site.dsn) as limiter:
        for name, rate in rates.items():
            limiter.create(site.name(name), burst, slot_decay_per_second=rate)
    task = {"role": "calls", "subject": "ours", "flavour": "tasks", "dsn": site.dsn, "rate": True}
    names = [site.name(name) for name in rates]
    with workers([{**task, "name": [names[number] for number in over]} for _, over in crowd]) as started:
        for each, (callers, _) in zip(started, crowd, strict=True):
            each.tell("stream", callers=callers, seconds=seconds)
        moments = [each.answer()["moments"] for each in started]
    # Nor the turns after the end, when fewer and fewer wait.
    first = min(map(min, moments))
    begin, end = first + starting, first + seconds
    found = []
    for number, rate in enumerate(rates.values()):
        used = [m for mine, (_, over) in zip(moments, crowd, strict=True) if number in over for m in mine]
        found.append(slope([moment for moment in used if begin <= moment <= end]) / rate)
    return found
