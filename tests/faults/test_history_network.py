"""Histories: the network between processes and the server delays, cuts and swallows, and every promise has to be kept.

PGLIMITS_FAULT_SECONDS says how long each of them runs (default 6 seconds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from histories import ONE, RATE, ROUGH, SECONDS, SEVERAL, Run, Workers, granted
from history import History
from proxy import BOTH, Link, Proxy

MANY: Sequence[Mapping[str, Any]] = (*SEVERAL, *RATE)
ANSWERS_WITHIN = min(10.0, SECONDS / 6)
"""Seconds after which workers take a connection for dead: what pglimits has where there is time for it."""


@pytest.fixture
def proxy(run: Run) -> Iterator[Proxy]:
    with Proxy(run.dsn) as between:
        yield between


def on_one_and_on_many(run: Run, proxy: Proxy, **plan: Any) -> Workers:
    """Workers that come by the proxy: some ask for one limit, others for several; and plain SQL, which does not."""
    workers = run.workers(ONE, kinds=(), dsn=proxy.dsn, answers_within=ANSWERS_WITHIN, **plan)
    for kind in ("sync", "async"):
        workers.start(kind)
        workers.start(kind, asks=MANY)
    workers.start("sql", dsn=run.dsn, asks=(*ONE, *MANY))
    workers.ready()
    return workers


def works_again(run: Run, workers: Workers) -> None:
    """Wait until every worker has been granted something from now on."""
    seen = [(log, log.stat().st_size) for log in workers.logs]

    def all_were_granted() -> bool:
        new = [log.read_bytes()[size:] for log, size in seen]
        return all(b'"granted"' in text or b'"went"' in text for text in new)

    run.wait_until(all_were_granted, timeout=60, what="for every worker to be granted something again")


OVERDUE = 10.0
"""Seconds: far more than a slow machine is late, far less than the network takes to report a dead connection."""


def overdue(found: History) -> list[str]:
    """Who was told nothing until long after the timeout. Those of the workers of plain SQL look after themselves."""
    answers = {"granted", "went", "refused", "timed out", "failed", "cancelled"}
    answered: dict[str, float] = {}
    for said in found.said:
        if said.what in answers:
            answered.setdefault(said.attempt, said.at)
    return [
        f"{said.worker} asked with {said.more['timeout']} s and was answered after {answered[said.attempt] - said.at} s"
        for said in found.said
        if said.what == "asked"
        and not said.worker.startswith("sql")
        and said.more["timeout"] is not None
        and answered.get(said.attempt, said.at) - said.at > said.more["timeout"] + OVERDUE
    ]


def finish(run: Run, proxy: Proxy, workers: Workers) -> History:
    """Everything is well again: everybody works again by himself, and the history keeps the promises."""
    proxy.heal()
    works_again(run, workers)
    found = run.finish(ROUGH)
    assert overdue(found) == []
    return found


def swallow(link: Link) -> None:
    link.holes.update(BOTH)


def test_connections_are_delayed_cut_half_closed_and_refused(run: Run, proxy: Proxy) -> None:
    workers = on_one_and_on_many(run, proxy)

    def delay() -> None:
        proxy.delay = run.random.random() * 0.2
        proxy.each(lambda link: setattr(link, "delay", run.random.random() * 0.2))

    def cut() -> None:
        proxy.one(Link.cut, run.random)

    def cut_all() -> None:
        proxy.each(Link.cut)

    def half_close() -> None:
        direction = run.random.choice(BOTH)
        proxy.one(lambda link: link.half_close(direction), run.random)

    def refuse() -> None:
        proxy.refuses = True
        cut_all()
        time.sleep(0.2)
        proxy.refuses = False

    faults: Sequence[Callable[[], None]] = (delay, cut, cut, cut_all, half_close, half_close, refuse, proxy.heal)
    run.let(lambda: run.random.choice(faults)(), every=0.1)
    finish(run, proxy, workers)


def test_everything_that_is_sent_disappears_for_a_while(run: Run, proxy: Proxy) -> None:
    """Those who hold are told in time that their leases end, those who wait that their time is over."""
    workers = on_one_and_on_many(run, proxy, hold=3.0)
    while_healthy = SECONDS / 6

    def disappear() -> None:
        proxy.black_hole(run.random.choice([BOTH, ("up",), ("down",)]))
        time.sleep(2.5)  # longer than a lease
        proxy.heal()
        works_again(run, workers)
        time.sleep(while_healthy)

    run.let(disappear)
    found = finish(run, proxy, workers)
    assert [said for said in found.said if said.what in ("still", "leaving") and said.more["lost"]]


def test_one_connection_after_the_other_goes_dead_unseen(run: Run, proxy: Proxy) -> None:
    workers = on_one_and_on_many(run, proxy)

    def go_dead() -> None:
        directions = run.random.choice([BOTH, ("up",), ("down",)])
        proxy.one(lambda link: link.holes.update(directions), run.random)

    run.let(go_dead, every=0.5)
    finish(run, proxy, workers)


def test_the_connections_that_listen_go_dead_unseen(run: Run, proxy: Proxy) -> None:
    workers = on_one_and_on_many(run, proxy)
    dead = 0

    def go_deaf() -> None:
        nonlocal dead
        dead += proxy.each(swallow, lambda link: link.listens and not link.holes)

    run.let(go_deaf, every=1.0)
    found = finish(run, proxy, workers)
    assert dead
    assert granted(found) > SECONDS


def test_notifications_are_lost(run: Run, proxy: Proxy) -> None:
    workers = on_one_and_on_many(run, proxy)
    proxy.deaf = True
    run.let(lambda: None)
    found = finish(run, proxy, workers)
    assert proxy.lost
    assert granted(found) > SECONDS


def test_a_pool_of_one_connection_that_is_cut_now_and_then(run: Run, proxy: Proxy) -> None:
    workers = on_one_and_on_many(run, proxy, pool=1)
    run.let(lambda: proxy.one(Link.cut, run.random), every=1.0)
    finish(run, proxy, workers)
