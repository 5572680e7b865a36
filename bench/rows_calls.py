"""Rows about calls that need not wait: one at a time, many at once, from Python and from SQL."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg

from pglimits import Limiter

from . import _scripts
from ._figures import figure
from ._measure import alternate
from ._pgbench import Pgbench
from ._processes import Worker, workers
from ._results import Line, Result
from ._rows import Bench, row, without_pgbench
from ._server import Site
from ._tables import fill

ROOM = 1_000_000
"""Slots of a limit that has room for all."""

_AT_ONCE = 10
"""Calls or pairs in one measurement: few, so that the floor has its turn before the machine is disturbed again."""


@row("uncontended")
def uncontended(bench: Bench) -> Iterator[Result]:
    """A pair of calls through the wrapper, against two bare commits over the same driver."""
    with bench.site() as site, Limiter(site.dsn) as limiter:
        name = site.name("one")
        limiter.create(name, ROOM)

        def ours() -> None:
            with limiter.concurrency(name):
                pass

        yield _alone(bench, "uncontended", site, ours, commits=2)


@row("uncontended-rate")
def uncontended_rate(bench: Bench) -> Iterator[Result]:
    """A call of rate_limit that need not wait, against one bare commit."""
    with bench.site() as site, Limiter(site.dsn) as limiter:
        name = site.name("one")
        limiter.create(name, ROOM, slot_decay_per_second=ROOM)
        yield _alone(bench, "uncontended-rate", site, lambda: limiter.rate_limit(name), commits=1)


def _alone(bench: Bench, name: str, site: Site, ours: Callable[[], None], commits: int) -> Line:
    """One caller with nobody beside it, against so many bare commits, durable ones and such that are not."""
    update = _scripts.update_one(site.table).encode()
    with site.connect() as durable, site.connect(options="-c synchronous_commit=off") as quick:

        def bare(connection: psycopg.Connection[Any]) -> None:
            for _ in range(commits):
                connection.execute(update)

        measured = [partial(_mean_ms, work, _AT_ONCE) for work in (ours, partial(bare, durable), partial(bare, quick))]
        rounds = bench.scale.pairs * bench.scale.repetitions // _AT_ONCE
        ours_ms, floor_ms, quick_ms = alternate(measured, rounds, warm_up=5)
    return figure(name).line(ours_ms, floor_ms, above=quick_ms)


def _mean_ms(work: Callable[[], None], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) * 1000 / times


@row("one-process")
def one_process(bench: Bench) -> Iterator[Result]:
    """Pairs from one process, whose requests travel together."""
    yield _pairs(bench, "one-process", processes=1, tasks=256)


@row("eight-processes")
def eight_processes(bench: Bench) -> Iterator[Result]:
    """Pairs from several processes, which meet at the limit's row."""
    yield _pairs(bench, "eight-processes", processes=8, tasks=32)


def _pairs(bench: Bench, name: str, *, processes: int, tasks: int) -> Result:
    pgbench, scale = bench.pgbench, bench.scale
    if pgbench is None:
        return without_pgbench(name)
    with bench.site() as site:
        task = calls(site, "hot", flavour="tasks")
        with Limiter(site.dsn) as limiter:
            limiter.create(task["name"], ROOM)
        best = _best_clients(bench, pgbench, site)
        with workers([task] * processes) as started:
            bench.say(f"{name}: measuring")
            ours, floor = alternate(
                [
                    lambda: together(started, tasks, scale.seconds),
                    lambda: pgbench.rate(site.dsn, _scripts.update_one(site.table), best, scale.seconds),
                ],
                scale.repetitions,
                warm_up=1,
            )
    return figure(name).line(ours, floor, variant=f"with {best}")


def calls(site: Site, name: str, flavour: str = "threads", **more: Any) -> dict[str, Any]:
    """The task of a worker that calls us on a limit of a site."""
    return {
        "role": "calls",
        "subject": "ours",
        "flavour": flavour,
        "dsn": site.dsn,
        "name": site.name(name),
        **more,
    }


def together(started: list[Worker], callers: int, seconds: float) -> float:
    """Have all workers call at once. Units of work per second, of all of them."""
    for each in started:
        each.tell("run", callers=callers, seconds=seconds)
    answers = [each.answer() for each in started]
    return float(sum(answer["granted"] for answer in answers) / max(answer["elapsed"] for answer in answers))


def _best_clients(bench: Bench, pgbench: Pgbench, site: Site) -> int:
    """With how many clients a bare UPDATE of one row goes best. Found out once for all rows."""
    if not bench.best_clients:
        script, seconds = _scripts.update_one(site.table), bench.scale.seconds
        bench.best_clients = max((1, 8, 32), key=lambda clients: pgbench.rate(site.dsn, script, clients, seconds))
    return bench.best_clients


@row("sql-one-limit")
def sql_one_limit(bench: Bench) -> Iterator[Result]:
    """What any language calls where many connections fight over a limit, against as many bare UPDATEs of one row."""
    yield _from_sql(
        bench,
        "sql-one-limit",
        lambda site: _scripts.waiting_pair(site.name("hot")),
        lambda site: _scripts.update_one(site.table),
    )


@row("sql-many-limits")
def sql_many_limits(bench: Bench) -> Iterator[Result]:
    """What any language calls where nobody is in anybody's way."""
    yield _from_sql(
        bench,
        "sql-many-limits",
        lambda site: _scripts.pair_any(site.name("many-")),
        lambda site: _scripts.update_any(site.table),
    )


@row("refusals")
def refusals(bench: Bench) -> Iterator[Result]:
    """What may cost no more than a read."""
    yield _from_sql(
        bench,
        "refusals",
        lambda site: _scripts.refusal(site.name("full")),
        lambda site: _scripts.select_any(site.table),
        calls_each=1,
    )


def _from_sql(
    bench: Bench,
    name: str,
    script_of: Callable[[Site], str],
    floor_of: Callable[[Site], str],
    calls_each: int = _scripts.CALLS_IN_PAIR,
) -> Result:
    pgbench, scale = bench.pgbench, bench.scale
    if pgbench is None:
        return without_pgbench(name)
    with bench.site() as site, site.connect() as connection:
        create = "select pglimits.create_limit(%s, %s)"
        connection.execute(create, [site.name("hot"), ROOM])
        connection.execute(create, [site.name("full"), 1])
        connection.execute("select * from pglimits.acquire(%s, lease_duration => 86400)", [site.name("full")])
        connection.execute(
            "select pglimits.create_limit(%s || g, %s) from generate_series(1, %s) g",
            [site.name("many-"), ROOM, _scripts.ROWS],
        )
        fill(site, site.name("many-"), "limits", _scripts.ROWS)
        ours_script, floor_script = script_of(site), floor_of(site)
        ours, floor = alternate(
            [
                lambda: calls_each * pgbench.rate(site.dsn, ours_script, 8, scale.seconds),
                lambda: pgbench.rate(site.dsn, floor_script, 8, scale.seconds),
            ],
            scale.repetitions,
            warm_up=1,
        )
    return figure(name).line(ours, floor)
