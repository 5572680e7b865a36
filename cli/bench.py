"""bench: every figure beside its floor or its peer, in one run on one server."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _client, _errors, _output
from ._commands import command
from ._options import Format, Output, given_dsn

app = typer.Typer()
_PACKAGE = "pglimits_bench"


@command(app, "Start here")
def bench(
    full: Annotated[bool, typer.Option("--full/--short", help="All of it, or little of it, sooner.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ROW", show_default=False, help="Only this row. Can be repeated."),
    ] = None,
    peers: Annotated[
        bool | None,
        typer.Option(
            "--peers/--no-peers",
            show_default=False,
            help="Measure what others use as well, a minute more. Default: only with --full.",
        ),
    ] = None,
    rows: Annotated[bool, typer.Option("--rows", help="List what is measured, and measure nothing.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            file_okay=False,
            show_default=False,
            help="Also write bench.json, bench.txt and growth.svg there.",
        ),
    ] = None,
    dsn: Annotated[
        str | None,
        typer.Option(
            "--dsn",
            metavar="DSN",
            callback=given_dsn,
            show_default=False,
            help="Measure in this database, which has pglimits. Default: on a server that is started for it.",
        ),
    ] = None,
    output: Output = Format.table,
) -> None:
    """Measure how fast it is, each figure beside its floor or what others use.

    Takes two to three minutes on two idle processors, with --full a quarter of
    an hour; longer where something else runs, and then the figures say little.

    Starts a PostgreSQL of its own, durable and on disk, and leaves nothing
    behind. With --dsn it measures on that server, with limits of its own that
    it deletes at the end, and takes the settings as they are. What others use
    (Redis, Prefect, …) takes part with --peers or --full, each if it is
    installed: pip install 'pglimits\\[bench]', and a redis-server.

    Each figure is a median of several measurements that alternate with those
    of the floor; below it the lowest and the highest, or of more than ten the
    quartiles. A target that is missed is shown and is no error: exits with 1
    only if something could not be measured.

    Example: pglimits bench

    Example: pglimits bench --only uncontended --only hand-over

    Example: pglimits bench --full --out results
    """
    runner, scales, report = _parts()
    if rows:
        _list(output)
        return
    try:
        wanted = runner.chosen(only or [], full if peers is None else peers)
    except ValueError as error:
        raise _errors.usage(str(error)) from error
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with _client.ended_by_signals():
        from .demo import _heed_one_signal, _ignore_signals

        _heed_one_signal()
        scale = scales.FULL if full else scales.SHORT
        _errors.write(_estimate(len(wanted), None if only else scale.takes), err=True)
        with _output.progress(sys.stderr) as say:
            done = runner.run(wanted, scale, dsn, _stamped(say), _ignore_signals)
    if out is not None:
        report.write(done, out)
    if output is Format.json:
        _output.show(output, report.as_dict(done))
    else:
        _output.render(*report.tables(done))
    if done.failed:
        raise typer.Exit(_errors.ERROR)


def _estimate(rows: int, takes: str | None) -> str:
    """What is to come. ``takes``: how long, if that is known."""
    measured = f"Measuring {_output.count(rows, 'row')}."
    return f"{measured} On two idle processors that takes {takes}; else longer." if takes else measured


def _stamped(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same with how long it has taken so far."""
    began = time.monotonic()
    return lambda what: say(f"{what} ({_output.duration(time.monotonic() - began)} so far)")


def _parts() -> tuple[Any, Any, Any]:
    """How to run it, how much of it, and how to show it."""
    if importlib.util.find_spec(_PACKAGE) is None:
        raise _errors.fail(f"the benchmark is not installed (no {_PACKAGE}): pip install pglimits again")
    return (
        importlib.import_module(f"{_PACKAGE}._run"),
        importlib.import_module(f"{_PACKAGE}._scale"),
        importlib.import_module(f"{_PACKAGE}._report"),
    )


def _list(output: Format) -> None:
    figures = importlib.import_module(f"{_PACKAGE}._figures").FIGURES
    cells = [(each.row, each.named(), each.floor, each.wanted()) for each in figures]
    if output is Format.json:
        _output.show(output, [dict(zip(("row", "what", "floor", "reach"), each, strict=True)) for each in cells])
        return
    shown = _output.table("row", "what", "floor or peer", "reach", whole=("row",))
    for row, *rest in cells:
        shown.add_row(row, *map(_output.text, rest))
    _output.render(shown)
