"""Repetitions that alternate, and what is made of their figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure that was measured several times: its median, and between what it lies.

    That is the lowest and the highest, or, of more than ``MANY``, the quartiles.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...] = ()


MANY = 10
"""More measurements than this are summed up by their quartiles: one of them is bound to be far off."""


def spread(values: Sequence[float]) -> Spread:
    """What several measurements of a figure say, at least one."""
    return Spread(statistics.median(values), *_ends(values), tuple(values))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    if len(values) > MANY:
        return percentile(values, 0.25), percentile(values, 0.75)
    return min(values), max(values)


def ratio(ours: Spread, theirs: Spread) -> Spread:
    """How many times theirs, which is never 0, ours is, in each repetition.

    Repetitions belong together by their place; without as many of both, all with all.
    """
    if len(ours.values) == len(theirs.values):
        pairs = list(zip(ours.values, theirs.values, strict=True))
    else:
        pairs = [(mine, other) for mine in ours.values for other in theirs.values]
    return spread([mine / other for mine, other in pairs])


def alternate(contenders: Sequence[Callable[[], float]], repetitions: int, warm_up: int = 0) -> list[Spread]:
    """Let contenders measure in turns (A B A B …), so that what disturbs the machine disturbs all of them.

    Args:
        contenders: each measures once and returns the figure.
        repetitions: rounds that count.
        warm_up: rounds before, whose figures are thrown away.
    """
    figures: list[list[float]] = [[] for _ in contenders]
    for number in range(warm_up + repetitions):
        for contender, measured in zip(contenders, figures, strict=True):
            figure = contender()
            if number >= warm_up:
                measured.append(figure)
    return [spread(measured) for measured in figures]


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which that part (0 to 1) of the values lies, between two of them if need be."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def slope(times: Sequence[float]) -> float:
    """Events per second of a steady stream, from the moments (in seconds) at which they came: a straight line laid
    through all of them, so that one that came late at either end does not count for much."""
    ordered = sorted(times)
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        return 0.0
    seconds = [moment - ordered[0] for moment in ordered]
    fitted = statistics.linear_regression(seconds, range(len(seconds)))
    return fitted.slope
