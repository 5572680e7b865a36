"""The rows of the benchmark: each a function that measures and yields lines and curves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ._pgbench import Pgbench
from ._results import Result, Skipped
from ._scale import Scale
from ._server import Server, Site

INSTALL_PGBENCH = "no pgbench: pip install 'pglimits[embedded]', or apt install postgresql-contrib"


@dataclass(slots=True)
class Bench:
    """What a row has to work with. ``say`` shows what is under way."""

    server: Server
    scale: Scale
    pgbench: Pgbench | None
    say: Callable[[str], None]
    peers: dict[str, str] = field(default_factory=dict)
    """Versions of the peers that took part."""
    best_clients: int = 0
    """With how many clients the floor on one row goes best; 0: not known yet."""

    @contextlib.contextmanager
    def site(self) -> Iterator[Site]:
        """A place to measure in."""
        with self.server.site() as site:
            yield site


Measure = Callable[[Bench], Iterator[Result]]


@dataclass(frozen=True, slots=True)
class Row:
    """A row: what ``--only`` calls it, what it measures, and whether others have to be installed for it."""

    name: str
    what: str
    measure: Measure
    peer: bool = False


ROWS: dict[str, Row] = {}


def row(name: str, what: str, *, peer: bool = False) -> Callable[[Measure], Measure]:
    """Make a function a row."""

    def register(measure: Measure) -> Measure:
        assert name not in ROWS, name
        ROWS[name] = Row(name, what, measure, peer)
        return measure

    return register


def without_pgbench(name: str) -> Skipped:
    """What a row yields that cannot do without it."""
    return Skipped(name, ROWS[name].what, INSTALL_PGBENCH)
