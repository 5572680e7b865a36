"""The curves as one drawing: SVG, small, and readable on white and on black."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from ._results import Curve

_WIDTH, _HEIGHT = 380, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 34, 40
_HEAD = 24
_COLUMNS = 2
_APART = 32
"""Between two numbers on the x axis."""
_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #444 }
.title { font-weight: 600; font-size: 12px; fill: #111 }
.grid { stroke: #ddd } .axis { stroke: #999 }
.line { stroke: #1668c7; fill: none; stroke-width: 1.8 } .dot { fill: #1668c7 }
.spread { stroke: #1668c7; stroke-opacity: .35; stroke-width: 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #bbb } .title { fill: #eee } .grid { stroke: #333 } .axis { stroke: #777 }
  .line, .spread { stroke: #6cb0ff } .dot { fill: #6cb0ff }
}
"""


def svg(curves: Sequence[Curve]) -> str:
    """Each curve in a field of its own, both axes logarithmic, all with the same height for a factor of ten."""
    rows = math.ceil(len(curves) / _COLUMNS) or 1
    width, height = _COLUMNS * _WIDTH, rows * _HEIGHT + _HEAD
    top, bottom = _range([point.ms.median for curve in curves for point in curve.points])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-label="Time of a call as things grow">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_LEFT}" y="18">Time of a call against …</text>',
    ]
    for number, curve in enumerate(curves):
        x, y = number % _COLUMNS * _WIDTH, _HEAD + number // _COLUMNS * _HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_field(curve, bottom, top)}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Round numbers around all values: the upper, the lower."""
    positive = [value for value in values if value > 0] or [1.0]
    lower = max(step for step in _STEPS if step <= max(min(positive), _STEPS[0]))
    return min(step for step in _STEPS if step >= min(max(*positive, lower * 10), _STEPS[-1])), lower


_STEPS = [digit * 10.0**power for power in range(-5, 6) for digit in (1, 2, 5)]


def _field(curve: Curve, bottom: float, top: float) -> str:
    left = min(point.x for point in curve.points)
    right = max(max(point.x for point in curve.points), left * 2)

    def across(x: float) -> float:
        part = math.log10(max(x, left) / left) / math.log10(right / left)
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)

    def down(ms: float) -> float:
        part = math.log10(min(max(ms, bottom), top) / bottom) / math.log10(top / bottom)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text class="title" x="{_LEFT}" y="18">{escape(curve.what)}</text>']
    for ms in (step for step in _STEPS if bottom <= step <= top):
        y = down(ms)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{ms:g} ms</text>')
    marked: list[float] = []
    for x in sorted({point.x for point in curve.points}, key=lambda x: (left < x < right, math.log10(x) % 1, -x)):
        if any(abs(across(x) - place) < _APART for place in marked):
            continue
        marked.append(across(x))
        parts.append(f'<text x="{across(x):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_short(x)}</text>')
    axis = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"'
    parts.append(f'<line class="axis" {axis}/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(curve.x)}</text>')
    first, last = curve.points[0].ms.median, curve.points[-1].ms.median
    if first > 0:
        at = f'x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end"'
        parts.append(f"<text {at}>last / first: {last / first:.2f}</text>")
    for point in curve.points:
        x = across(point.x)
        parts.append(
            f'<line class="spread" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{down(point.ms.low):.1f}" y2="{down(point.ms.high):.1f}"/>'
        )
    places = [(across(point.x), down(point.ms.median)) for point in curve.points]
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    for (x, y), point in zip(places, curve.points, strict=True):
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{point.x:,.0f}: {point.ms.median:.3f} ms</title></circle>"
        )
    return "".join(parts)


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
