"""Rows about what a crowd of waiting callers costs: memory of its process, and connections."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from psycopg.conninfo import make_conninfo

from pglimits import Limiter

from ._measure import spread
from ._processes import worker
from ._results import Result, Target, at_most, line
from ._rows import Bench, row
from ._server import Site

_PATIENCE = 120.0
_WATCHED = 5
"""How long the crowd is watched once it is complete, in measurements of a rate. It is kept alive meanwhile."""


@row("crowd", "memory and connections of a process with 10,000 waiting tasks")
def crowd(bench: Bench) -> Iterator[Result]:
    """Waiting for a slot, and asleep until their turn on a rate limit."""
    waiters = bench.scale.waiting_tasks
    with bench.site() as site, Limiter(site.dsn) as limiter:
        limiter.create(site.name("slot"), 1)
        limiter.create(site.name("turn"), 1, slot_decay_per_second=0.01)
        held = limiter.acquire(site.name("slot"))
        limiter.rate_limit(site.name("turn"))
        for name, what in (("slot", "waiting for a slot"), ("turn", "asleep until their turn")):
            task = {"role": "crowd", "name": site.name(name), "waiters": waiters, "rate": name == "turn"}
            seen = _watch(site, limiter, task, _WATCHED * bench.scale.seconds)
            tasks = f"1 process, {waiters:,} tasks {what}"
            note = f"complete after {seen.seconds:.1f} s"
            if seen.bytes:
                megabytes = spread([seen.bytes / 1e6])
                yield line("crowd", f"{tasks}: memory", "MB", megabytes, "", None, Target("<", 200, "ours"), note)
            now, most = spread([float(seen.connections)]), spread([float(seen.most_connections)])
            yield line("crowd", f"{tasks}: connections", "", now, "", None, at_most(3, "ours"))
            yield line("crowd", f"{tasks}: connections at most, ever", "", most, "", None, at_most(3, "ours"))
        limiter.release(held)


class _Seen:
    """What a crowd took up. ``bytes``: resident memory at its peak; 0 where the system does not tell."""

    def __init__(self) -> None:
        self.bytes = 0
        self.connections = 0
        self.most_connections = 0
        self.seconds = 0.0


def _watch(site: Site, limiter: Limiter, task: dict[str, object], watched: float) -> _Seen:
    mark = f"pglimits-bench-{os.getpid()}"
    dsn = make_conninfo(site.dsn, application_name=mark)
    seen = _Seen()
    waiters = int(str(task["waiters"]))
    with site.connect() as connection, worker({**task, "dsn": dsn}) as crowded:
        crowded.tell("go")
        began = time.monotonic()
        while True:
            row = connection.execute(
                "select count(*) from pg_stat_activity where application_name = %s", [mark]
            ).fetchone()
            assert row is not None
            seen.connections = int(row[0])
            seen.most_connections = max(seen.most_connections, seen.connections)
            seen.bytes = max(seen.bytes, _resident_bytes(crowded.process.pid))
            if not seen.seconds:
                if limiter.get(str(task["name"])).waiting >= waiters:
                    seen.seconds = time.monotonic() - began
                elif time.monotonic() - began > _PATIENCE:
                    waiting = limiter.get(str(task["name"])).waiting
                    raise TimeoutError(f"only {waiting:,} of {waiters:,} tasks wait after {_PATIENCE:g} s")
            elif time.monotonic() - began > seen.seconds + watched:
                return seen
            time.sleep(0.05)


def _resident_bytes(pid: int) -> int:
    """The memory that a process has in use: its peak where the system knows that."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
        return int(said) * 1024
    return 0
