"""What the histories share: workers that are processes, a run that is checked at its end, and what is asked for.

PGLIMITS_FAULT_SECONDS says how long each of them runs (default 6 seconds), and PGLIMITS_FAULT_SEED says which of them.
PGLIMITS_FAULT_REPORT names a file to which each adds a line of JSON that sums it up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import history
import poolers
import psycopg
import pytest
from cluster import Cluster, cluster
from history_checker import check, longest_idle
from history_replay import Tolerance, Violation

from pglimits import _embedded, _install

SECONDS = float(os.environ.get("PGLIMITS_FAULT_SECONDS", "6"))
SEED = int(os.environ.get("PGLIMITS_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
KINDS = ("sync", "async", "sql")

ONE: Sequence[Mapping[str, Any]] = ({"slots": {"database": 1}},)
WIDTHS = ({"slots": {"database": 1}}, {"slots": {"database": 1}, "priorities": [1, 2]}, {"slots": {"database": 2}})
SEVERAL = (
    {"slots": {"database": 1}, "keys": ["", "a"]},
    {"slots": {"licence": 1}},
    {"slots": {"database": 2, "licence": 1}},
    {"slots": {"licence": 1, "database": 1, "gpu": 1}, "keys": ["a"]},
    {"slots": {"gpu": 1}, "keys": ["a", "b"]},
)
RATE = ({"slots": {"api": 1}, "rate": True}, {"slots": {"api": 2}, "rate": True})
RATES = (
    {"slots": {"api": 1, "mails": 1}, "rate": True},
    {"slots": {"api": 1, "tokens": 3}, "rate": True},
    {"slots": {"tokens": 7, "mails": 1, "api": 2}, "rate": True},
    {"slots": {"mails": 1}, "rate": True},
    {"slots": {"tokens": 2}, "keys": ["", "a"], "rate": True},
)
BOTH = (
    {"slots": {"api": 1}},
    {"slots": {"api": 2}, "rate": True},
    {"slots": {"api": 1, "database": 1}, "priorities": [0, 1]},
    {"slots": {"mails": 1, "api": 1}},
    {"slots": {"mails": 1}, "rate": True},
)

CALM = Tolerance(wake_up=2.0)
ROUGH = Tolerance(wake_up=14.0, visible=5.0)  # who would have taken it up may be dead, which shows after 10 seconds


class Workers:
    """Processes that work at random and write down what they knew."""

    def __init__(self, dsn: str, folder: Path, rng: random.Random, asks: Sequence[Mapping[str, Any]], **plan: Any):
        self.dsn, self.folder, self.random, self.asks, self.plan = dsn, folder, rng, asks, plan
        self.logs: list[Path] = []
        self.running: list[subprocess.Popen[str]] = []

    def start(self, kind: str, **plan: Any) -> subprocess.Popen[str]:
        plan = {**self.plan, **plan}
        script = plan.pop("script", "history_worker.py")
        number = sum(1 for _ in self.folder.glob("*.jsonl"))  # those of others are there too
        log = self.folder / f"{number}.jsonl"
        log.touch()
        self.logs.append(log)
        wanted = {
            "dsn": self.dsn,
            "name": f"{kind} {number}",
            "kind": kind,
            "log": str(log),
            "asks": self.asks,
            "seed": self.random.randrange(2**31),
            **plan,
        }
        with (self.folder / f"{number}.errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(script)), json.dumps(wanted)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.running.append(process)
        return process

    def ready(self) -> None:
        for process in self.running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", self.errors()

    def errors(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.errors")))

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate(timeout=90)
        self.running.remove(process)

    def end(self) -> None:
        """Have all of them finish what they do, and end."""
        for process in self.running:
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdin = None  # communicate would flush it
        for process in self.running:
            process.communicate(timeout=90)
            assert process.returncode == 0, self.errors()
        self.running.clear()

    def abandon(self) -> None:
        for process in list(self.running):
            process.send_signal(signal.SIGCONT)
            self.kill(process)


class Run:
    """One history: a server that writes it down, workers, and what happens to them.

    ``way``: the DSN by which the workers reach it, straight or through the pooler.
    """

    def __init__(
        self, name: str, server: Cluster, dsn: str, way: str, folder: Path, wait_until: Callable[..., Any]
    ) -> None:
        self.name, self.server, self.dsn, self.way = name, server, dsn, way
        self.folder, self.wait_until = folder, wait_until
        self.random = random.Random(SEED)
        self.happened = 0
        self.locked: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._all: list[Workers] = []

    def workers(
        self, asks: Sequence[Mapping[str, Any]], each: int = 1, kinds: Sequence[str] = KINDS, **plan: Any
    ) -> Workers:
        """So many workers of each kind, at work."""
        made = Workers(plan.pop("dsn", self.way), self.folder, self.random, asks, **plan)
        self._all.append(made)
        for kind in kinds:
            for _ in range(each):
                made.start(kind)
        made.ready()
        return made

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def let(self, happen: Callable[[], object], every: float = 0.3) -> None:
        """Have something happen at random moments, for as long as the history runs."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            time.sleep(self.random.random() * 2 * every)
            happen()
            self.happened += 1

    def finish(self, tolerance: Tolerance | None = None, allowed: Sequence[str] = ()) -> history.History:
        """End the work, wait until everything has come back, and check the history."""
        for workers in self._all:
            workers.end()
        self.wait_until(
            lambda: (
                self.sql("select coalesce(sum(held), 0) + coalesce(sum(waiting), 0) from pglimits.limits") == [(0,)]
            ),
            timeout=40,
            what="for everything to come back",
        )
        found = history.read(self.dsn, [log for workers in self._all for log in workers.logs])
        wrong = [each for each in check(found, self.tolerance(tolerance)) if each.promise not in allowed]
        self.report(found, wrong)
        if wrong:
            evidence = self.folder / "history.pickle"
            evidence.write_bytes(pickle.dumps(found))
            pytest.fail(f"seed {SEED}: {len(wrong)} violations, evidence in {evidence}; the first: {wrong[:5]}")
        unexpected = [said for said in found.said if said.what == "unexpected"]
        assert not unexpected, unexpected[:3]
        return found

    def report(self, found: history.History, wrong: Sequence[Violation]) -> None:
        """Add a line to the report, if one is wanted."""
        if "PGLIMITS_FAULT_REPORT" not in os.environ:
            return
        line = {
            "test": self.name,
            "postgresql": self.server.binaries.version,
            "seed": SEED,
            "seconds": SECONDS,
            "happened": self.happened,
            "asked": sum(said.what == "asked" for said in found.said),
            "granted": granted(found),
            "idle": round(longest_idle(found, self.tolerance()), 3),
            "violations": len(wrong),
        }
        with Path(os.environ["PGLIMITS_FAULT_REPORT"]).open("a") as report:
            report.write(json.dumps(line) + "\n")

    def tolerance(self, tolerance: Tolerance | None = None) -> Tolerance:
        """The same, and that nobody can be granted anything while the server is away, or of what is kept locked."""
        return dataclasses.replace(tolerance or Tolerance(), away=self.server.away, locked=self.locked)

    def abandon(self) -> None:
        for workers in self._all:
            workers.abandon()


@pytest.fixture
def run(request: pytest.FixtureRequest, server: Any, tmp_path: Path, wait_until: Callable[..., Any]) -> Iterator[Run]:
    chosen = _embedded.Binaries(server.bin, server.version)
    with (
        cluster(chosen, {"max_connections": "200", "deadlock_timeout": "500ms"}) as own,
        started(own, request.node.name, tmp_path, wait_until) as run,
    ):
        yield run


@contextlib.contextmanager
def started(own: Cluster, name: str, folder: Path, wait_until: Callable[..., Any]) -> Iterator[Run]:
    """A run on a server that is started for it."""
    dsn = own.start()
    _install.install(dsn)
    history.record(dsn)
    way = dsn
    with contextlib.ExitStack() as pooler:
        if poolers.MODE is not None:
            way = poolers.through(dsn, pooler.enter_context(poolers.pgbouncer(dsn, poolers.MODE, size=20)))
        run = Run(name, own, dsn, way, folder, wait_until)
        run.sql("select pglimits.create_limit('database', 3), pglimits.create_limit('licence', 2)")
        run.sql("select pglimits.create_limit('gpu', 1), pglimits.create_limit('api', 5, 50)")
        run.sql("select pglimits.create_limit('mails', 2, 15), pglimits.create_limit('tokens', 10, 60)")
        try:
            yield run
        finally:
            run.abandon()


def granted(found: history.History) -> int:
    return sum(said.what in ("granted", "went") for said in found.said)
