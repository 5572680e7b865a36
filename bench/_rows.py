"""The rows of the benchmark: each a function that measures figures of ``_figures.py`` and yields lines and curves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ._figures import FIGURES, Figure, figures
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

ROWS: dict[str, Measure] = {}
"""By the names that ``--only`` takes."""


def row(name: str) -> Callable[[Measure], Measure]:
    """Make a function measure a row."""

    def register(measure: Measure) -> Measure:
        assert name not in ROWS and figures(name), name
        ROWS[name] = measure
        return measure

    return register


def order() -> list[str]:
    """The names of all rows, in the order of their figures."""
    return list(dict.fromkeys(each.row for each in FIGURES))


def subject(name: str) -> str:
    """What a row measures: in one line, for whoever watches."""
    found: list[Figure] = figures(name)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return found[0].named() + (f", beside {found[0].floor}" if found[0].peer else "") + more


def without_pgbench(name: str) -> Skipped:
    """What a row yields that cannot do without it."""
    return Skipped(name, subject(name), INSTALL_PGBENCH)
