"""A run: one row after the other, on one server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from . import growth, history, memory, rows_calls, rows_waiting
from ._pgbench import Pgbench
from ._results import Run, Skipped
from ._rows import ROWS, Bench, Row
from ._scale import Scale
from ._server import machine, server, versions
from .peers import rows as peer_rows

__all__ = ["chosen", "run"]

_ORDER = [module.__name__ for module in (rows_calls, rows_waiting, history, growth, memory, peer_rows)]


class UnknownRow(ValueError):
    """There is no such row; the message names those that there are."""


def chosen(only: Sequence[str], peers: bool) -> list[Row]:
    """The rows to measure: those named, else all, with or without the peers'.

    Raises:
        UnknownRow: one of the names is none.
    """
    for name in only:
        if name not in ROWS:
            raise UnknownRow(f"there is no row {name!r}; rows: {', '.join(ROWS)}")
    wanted = [row for row in ROWS.values() if (row.name in only if only else peers or not row.peer)]
    return sorted(wanted, key=lambda row: _ORDER.index(row.measure.__module__))


def run(
    rows: Sequence[Row],
    scale: Scale,
    dsn: str | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Run:
    """Measure rows. One that fails is noted, and the others go on.

    Args:
        dsn: of a database with pglimits; None starts a server for the run, which is gone after it.
        say: is told what is under way.

    Raises:
        EmbeddedUnavailable, NotInstalled: there is nothing to measure on.
    """
    began = time.monotonic()
    done = Run(scale.name, datetime.now(UTC).isoformat(timespec="seconds"), {"machine": machine(dsn is None)})
    say("starting PostgreSQL" if dsn is None else "connecting")
    with server(dsn) as tested:
        folder: Path | None = tested.bin
        bench = Bench(tested, scale, Pgbench.find(folder), say)
        tools = {"pgbench": bench.pgbench.version} if bench.pgbench else {}
        done.setup |= {"versions": versions() | tools, "server": tested.setup(), "peers": bench.peers}
        for number, row in enumerate(rows, 1):
            say(f"{number}/{len(rows)} {row.name}: {row.what}")
            try:
                for result in row.measure(bench):
                    done.add(result)
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                done.failed.append(Skipped(row.name, row.what, why))
    done.seconds = time.monotonic() - began
    return done
