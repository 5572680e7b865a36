"""metrics: what /metrics of `pglimits serve` says, once, for a textfile collector."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _client, _errors, _output, _rights
from ._commands import command
from ._options import Dsn, Format, Output

app = typer.Typer()


@command(app, "Set up and look after")
def metrics(
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="PATH",
            dir_okay=False,
            show_default=False,
            help="Write them there, whole or not at all, instead of printing them.",
        ),
    ] = None,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Show the metrics of all limits as Prometheus reads them.

    For a textfile collector, as node_exporter has one: run it every minute, with --file. `pglimits serve` has the
    same under /metrics. A database that cannot be reached is a metric too, pglimits_up 0, and exit code 1.

    Example: pglimits metrics --file /var/lib/prometheus/node-exporter/pglimits.prom
    """
    from pglimits._exposition import exposition, samples
    from pglimits.errors import LimiterUnavailable

    rows, problem = None, None
    try:
        rows = _rows(dsn)
    except LimiterUnavailable as error:
        problem = error
    text = _output.as_json(samples(rows)) + "\n" if output is Format.json else exposition(rows)
    if file is None:
        _errors.write(text, end="")
    else:
        _replace(file, text)
    if problem is not None:
        raise _errors.fail(problem)


def _rows(dsn: str | None) -> list[dict[str, Any]]:
    from psycopg import Error
    from psycopg.rows import dict_row

    from pglimits._exposition import QUERY

    conninfo = _client.target(dsn).conninfo
    with _rights.explained(conninfo, _rights.READER):
        try:
            with _client.connect(conninfo) as connection, connection.cursor(row_factory=dict_row) as cursor:
                return cursor.execute(QUERY.encode()).fetchall()
        except Error as error:
            raise _client.explained(error) from error


def _replace(file: Path, text: str) -> None:
    """Put a text in place of a file, for everybody to read. Whoever reads it meanwhile has the old one or the new."""
    try:
        descriptor, path = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    except OSError as error:
        raise _errors.fail(f"cannot write {file}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as written:
            written.write(text)
            os.fchmod(written.fileno(), 0o644)
        Path(path).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(path).unlink()
        raise
