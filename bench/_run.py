"""A run: one row after the other, on one server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from . import growth, history, rows_calls, rows_server, rows_waiting
from ._figures import figures
from ._pgbench import Pgbench
from ._results import Run, Skipped
from ._rows import ROWS, Bench, order, subject
from ._scale import Scale
from ._server import machine, server, versions
from .peers import rows as peer_rows

__all__ = ["chosen", "run"]

_MEASURED_IN = (rows_calls, rows_server, rows_waiting, history, growth, peer_rows)
"""Each has made its functions rows."""


class UnknownRow(ValueError):
    """There is no such row; the message names those that there are."""


def chosen(only: Sequence[str], peers: bool) -> list[str]:
    """The rows to measure: those named, else all, with or without the peers'.

    Raises:
        UnknownRow: one of the names is none.
    """
    for name in only:
        if name not in ROWS:
            raise UnknownRow(f"there is no row {name!r}; rows: {', '.join(order())}")
    return [name for name in order() if (name in only if only else peers or not figures(name)[0].peer)]


def run(
    rows: Sequence[str],
    scale: Scale,
    dsn: str | None = None,
    say: Callable[[str], None] = lambda what: None,
    at_end: Callable[[], None] = lambda: None,
) -> Run:
    """Measure rows. One that fails is noted, and the others go on.

    Args:
        dsn: of a database with pglimits; None starts a server for the run, which is gone after it.
        say: is told what is under way.
        at_end: is called when all is measured, before the server goes.

    Raises:
        EmbeddedUnavailable, NotInstalled: there is nothing to measure on.
    """
    began = time.monotonic()
    done = Run(scale.name, datetime.now(UTC).isoformat(timespec="seconds"), {"machine": machine(dsn is None)})
    say("starting PostgreSQL" if dsn is None else "connecting")
    with contextlib.ExitStack() as stack:
        tested = stack.enter_context(server(dsn))
        stack.callback(at_end)
        bench = Bench(tested, scale, Pgbench.find(tested.bin), say)
        tools = {"pgbench": bench.pgbench.version} if bench.pgbench else {}
        done.setup |= {"versions": versions() | tools, "server": tested.setup(), "peers": bench.peers}
        for number, name in enumerate(rows, 1):
            say(f"{number}/{len(rows)} {name}: {subject(name)}")
            row_began = time.monotonic()
            try:
                for result in ROWS[name](bench):
                    done.add(result)
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                done.failed.append(Skipped(name, subject(name), why))
            done.row_seconds[name] = round(time.monotonic() - row_began, 1)
    done.seconds = time.monotonic() - began
    return done
