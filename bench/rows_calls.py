"""Rows about calls that need not wait: one at a time, many at once, from Python and from SQL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from pglimits import Limiter

from . import _scripts
from ._measure import alternate
from ._pgbench import Pgbench
from ._processes import Worker, workers
from ._results import Result, at_least, at_most, line
from ._rows import ROWS, Bench, row, without_pgbench
from ._server import Site

ROOM = 1_000_000
"""Slots of a limit that has room for all."""

_PAIRS = 10
"""Pairs in one measurement: few, so that the floor has its turn before the machine is disturbed again."""

FLOOR = "pgbench: UPDATE of one row"


@row("uncontended", "1 client, sync, acquire + release")
def uncontended(bench: Bench) -> Iterator[Result]:
    """A pair of calls through the wrapper, against two bare commits over the same driver."""
    with bench.site() as site, Limiter(site.dsn) as limiter, site.connect() as connection:
        name = site.name("one")
        limiter.create(name, ROOM)
        update = f"update {site.table} set n = n + 1 where id = 1".encode()

        def ours() -> None:
            with limiter.concurrency(name):
                pass

        def floor() -> None:
            connection.execute(update)
            connection.execute(update)

        ours_ms, floor_ms = alternate(
            [lambda: _mean_ms(ours, _PAIRS), lambda: _mean_ms(floor, _PAIRS)],
            bench.scale.pairs * bench.scale.repetitions // _PAIRS,
            warm_up=5,
        )
    against = "two bare UPDATE commits through psycopg"
    yield line("uncontended", ROWS["uncontended"].what, "ms", ours_ms, against, floor_ms, at_most(1.4))


def _mean_ms(work: Callable[[], None], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) * 1000 / times


@row("one-process", "1 process, 256 tasks, one limit, acquire + release")
def one_process(bench: Bench) -> Iterator[Result]:
    """Pairs from one process, whose requests travel together."""
    yield from _pairs(bench, "one-process", processes=1, tasks=256, target=5)


@row("eight-processes", "8 processes with 32 tasks each, one limit, acquire + release")
def eight_processes(bench: Bench) -> Iterator[Result]:
    """Pairs from several processes, which meet at the limit's row."""
    yield from _pairs(bench, "eight-processes", processes=8, tasks=32, target=4)


def _pairs(bench: Bench, name: str, *, processes: int, tasks: int, target: float) -> Iterator[Result]:
    pgbench = bench.pgbench
    if pgbench is None:
        yield without_pgbench(name)
        return
    scale = bench.scale
    with bench.site() as site:
        task = calls(site, "hot", flavour="tasks")
        with Limiter(site.dsn) as limiter:
            limiter.create(task["name"], ROOM)
        best = _best_clients(bench, pgbench, site)
        with workers([task] * processes) as started:
            ours, floor = alternate(
                [
                    lambda: together(started, tasks, scale.seconds),
                    lambda: pgbench.rate(site.dsn, _scripts.update_one(site.table), best, scale.seconds),
                ],
                scale.repetitions,
                warm_up=1,
            )
    yield line(
        name,
        ROWS[name].what,
        "pairs/s",
        ours,
        f"{FLOOR}, best of 1, 8, 32 clients ({best})",
        floor,
        at_least(target),
    )


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


@row("sql-one-limit", "8 connections calling the SQL functions, one limit, calls")
def sql_one_limit(bench: Bench) -> Iterator[Result]:
    """What any language calls, as procedures for hot limits, against as many bare UPDATEs of one row."""
    yield from _from_sql(
        bench,
        "sql-one-limit",
        lambda site: _scripts.pair_on_hot_limit(site.name("hot")),
        lambda site: _scripts.update_one(site.table),
        f"{FLOOR}, 8 clients",
        at_least(1.5),
    )


@row("sql-many-limits", "8 connections calling the SQL functions, over 1,000 limits, calls")
def sql_many_limits(bench: Bench) -> Iterator[Result]:
    """The same where nobody is in anybody's way."""
    yield from _from_sql(
        bench,
        "sql-many-limits",
        lambda site: _scripts.pair_any(site.name("many-")),
        lambda site: _scripts.update_any(site.table),
        "pgbench: UPDATE over 1,000 rows, 8 clients",
        at_least(0.6),
    )


@row("refusals", "refusals of a full limit, 8 connections, calls")
def refusals(bench: Bench) -> Iterator[Result]:
    """What may cost no more than a read."""
    yield from _from_sql(
        bench,
        "refusals",
        lambda site: _scripts.refusal(site.name("full")),
        lambda site: _scripts.select_any(site.table),
        "pgbench: SELECT by primary key, 8 clients",
        at_least(0.3),
        calls_each=1,
    )


def _from_sql(
    bench: Bench,
    name: str,
    script_of: Callable[[Site], str],
    floor_of: Callable[[Site], str],
    against: str,
    target: Any,
    calls_each: int = _scripts.CALLS_IN_PAIR,
) -> Iterator[Result]:
    pgbench, scale = bench.pgbench, bench.scale
    if pgbench is None:
        yield without_pgbench(name)
        return
    with bench.site() as site, site.connect() as connection:
        create = "select pglimits.create_limit(%s, %s)"
        connection.execute(create, [site.name("hot"), ROOM])
        connection.execute(create, [site.name("full"), 1])
        connection.execute("select pglimits.acquire(%s, lease_duration => '1 day')", [site.name("full")])
        connection.execute(
            "select pglimits.create_limit(%s || g, %s) from generate_series(1, %s) g",
            [site.name("many-"), ROOM, _scripts.ROWS],
        )
        ours_script, floor_script = script_of(site), floor_of(site)
        ours, floor = alternate(
            [
                lambda: calls_each * pgbench.rate(site.dsn, ours_script, 8, scale.seconds),
                lambda: pgbench.rate(site.dsn, floor_script, 8, scale.seconds),
            ],
            scale.repetitions,
            warm_up=1,
        )
    note = "fewer processors than connections" if (os.cpu_count() or 8) < 8 else ""
    yield line(name, ROWS[name].what, "calls/s", ours, against, floor, target, note)
