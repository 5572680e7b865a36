"""A run as people and as programs read it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ._chart import svg
from ._measure import Spread
from ._results import Curve, Line, Run, Target

_WIDE = 120


def as_dict(run: Run) -> dict[str, Any]:
    """Everything, with plain values only."""
    return dataclasses.asdict(run)


def write(run: Run, folder: Path) -> None:
    """Write bench.json, bench.txt and, if there are curves, growth.svg."""
    text = json.dumps(as_dict(run), indent=1, ensure_ascii=False)
    (folder / "bench.json").write_text(text + "\n", encoding="utf-8")
    (folder / "bench.txt").write_text(as_text(run), encoding="utf-8")
    if run.curves:
        (folder / "growth.svg").write_text(svg(run.curves), encoding="utf-8")


def lines_of(found: dict[str, Any]) -> list[Line]:
    """The lines of a run that ``as_dict`` made something plain of."""

    def measured(each: dict[str, Any] | None) -> Spread | None:
        return None if each is None else Spread(**{**each, "values": tuple(each["values"])})

    spreads = ("ours", "theirs", "ratio", "above")
    return [
        Line(
            **{
                **each,
                **{name: measured(each[name]) for name in spreads},
                "target": None if each["target"] is None else Target(**each["target"]),
            }
        )
        for each in found["lines"]
    ]


def as_text(run: Run) -> str:
    """The tables without colours, as wide as they want to be."""
    console = Console(file=io.StringIO(), width=_WIDE, highlight=False, emoji=False, markup=False)
    with console.capture() as captured:
        console.print(*tables(run), sep="\n")
    return "\n".join(each.rstrip() for each in captured.get().splitlines()) + "\n"


def as_markdown(run: Run) -> str:
    """The figures as a table for a document, and what they were measured on: docs/performance.md has it."""
    table = _markdown(("what", "ours", "theirs", "ratio", "target", "met"), map(_told, run.lines))
    setup = "\n".join(f"- {line}" for line in str(_setup(run)).splitlines())
    closing = "\n".join(f"- {said}" for said in _closing(run) if not str(said).startswith(_MISSED))
    return f"{table}\n\n{setup}\n{closing}\n"


def _markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(columns), *map(list, rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells)


def _told(each: Line) -> Iterable[str]:
    what = f"{each.what} ({each.note})" if each.note else each.what
    theirs = figure(each.theirs, each.unit) if each.theirs else ""
    against = f"({each.against})" if theirs and each.against else each.against
    met = {True: "yes", False: "**no**", None: ""}[each.met]
    ratio = figure(each.ratio) if each.ratio else ""
    return what, figure(each.ours, each.unit), f"{theirs} {against}".strip(), ratio, _target(each), met


def tables(run: Run) -> list[RenderableType]:
    """The tables, and what stands around them."""
    parts: list[RenderableType] = [_setup(run)]
    if run.lines:
        parts += ["", _lines(run.lines)]
    for curve in run.curves:
        note = f" ({curve.note})" if curve.note else ""
        parts += ["", Text(f"Time of a call against {curve.what}{note}", "bold"), _curve(curve)]
    parts += ["", *_closing(run)]
    return parts


def _setup(run: Run) -> Text:
    lines = [f"pglimits bench, {run.mode} mode, {run.started_at}, {run.seconds:.0f} s"]
    for subject, facts in run.setup.items():
        if facts:
            lines.append(f"{subject}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return Text("\n".join(lines))


def _table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    right = set(numbers)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column != "what")
    return made


def _lines(lines: list[Line]) -> Table:
    """A figure and below it between what it lies; what was measured and below it what it is compared with."""
    made = _table("what", "ours", "theirs", "ratio", "target", "met", numbers=("ours", "theirs", "ratio"))
    for each in lines:
        what = Text(each.what)
        for more in (each.against and f"/ {each.against}", each.note and f"({each.note})"):
            what.append(f"\n  {more}" if more else "", "dim")
        met = {True: Text("met", "green"), False: Text("not met", "red"), None: Text("")}[each.met]
        figures = (_cell(each.ours, each.unit), _cell(each.theirs, each.unit), _cell(each.ratio))
        made.add_row(what, *figures, _target(each), met)
    return made


def _cell(measured: Spread | None, unit: str = "") -> Text:
    if measured is None:
        return Text("")
    cell = Text(f"{_number(measured.median)} {unit}".rstrip())
    if len(measured.values) > 1:
        cell.append(f"\n{_number(measured.low)}-{_number(measured.high)}", "dim")
    return cell


def _curve(curve: Curve) -> Table:
    made = _table(curve.x, "ms per call", "times the first", "on disk", "dead rows", numbers=(curve.x, *_POINT))
    for cells in _points(curve):
        made.add_row(*cells)
    return made


def _points(curve: Curve) -> Iterable[tuple[str, ...]]:
    first = curve.points[0].ms.median
    for point in curve.points:
        yield (
            f"{point.x:,.0f}",
            figure(point.ms),
            f"{point.ms.median / first:.2f}" if first else "",
            "" if point.disk_bytes is None else f"{point.disk_bytes / 1e6:,.1f} MB",
            "" if point.dead_rows is None else f"{point.dead_rows:,}",
        )


_POINT = ("ms per call", "times the first", "on disk", "dead rows")


_MISSED = "Not met: "


def _closing(run: Run) -> list[Text]:
    judged = [each for each in run.lines if each.met is not None]
    missed = [each for each in judged if not each.met]
    said = [Text(f"{len(judged) - len(missed)} of {len(judged)} targets met.")]
    said += [Text(f"{_MISSED}{each.what}" + (f" / {each.against}" if each.against else "")) for each in missed]
    said += [Text(f"Skipped: {each.what}: {each.why}") for each in run.skipped]
    said += [Text(f"Failed: {each.what}: {each.why}", "red") for each in run.failed]
    said += [
        Text("Seconds that each row took: " + ", ".join(f"{name} {took:.0f}" for name, took in run.row_seconds.items()))
    ]
    return said


def figure(measured: Spread, unit: str = "") -> str:
    """The median, and in brackets between what it lies."""
    text = _number(measured.median)
    if len(measured.values) > 1:
        text += f" ({_number(measured.low)}-{_number(measured.high)})"
    return f"{text} {unit}".rstrip()


def _number(value: float) -> str:
    """Three or four digits that count."""
    size = abs(value)
    if size >= 100 or (value == round(value) and size > 1):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1.005 else f"{value:.3f}"


def _target(each: Line) -> str:
    told = each.target.told(each.unit) if each.target else ""
    return told if each.above is None else f"{told}, or {_number(each.above.median)} {each.unit} more"
