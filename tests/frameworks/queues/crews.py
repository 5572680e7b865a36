"""Workers in processes of their own, on a database that the tests of a module share."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

from pglimits import Limiter, _install

QUEUES = Path(__file__).resolve().parent
PATIENCE = 60


class Crew:
    """Workers on one database."""

    limiter: Limiter
    """Of the test that runs."""

    def __init__(self, dsn: str, server_dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder
        self.conn = psycopg.connect(server_dsn, autocommit=True)
        self.conn.execute("create table said (said text)")
        self.conn.execute(
            "create table at_work (nth int generated always as identity, task text, number int, change int,"
            " retries int, attempts int, fence bigint)"
        )
        self.processes: list[subprocess.Popen[bytes]] = []

    def begin(self) -> None:
        """Another test."""
        self.limiter = Limiter(self.dsn)
        for name, limit in (("crowd", 2), ("one", 1), ("brief", 1), ("tenant", 1)):
            self.limiter.upsert(name, limit)
        self.limiter.upsert("slow", 2, slot_decay_per_second=1e-6)
        self.limiter.reset("slow")

    def run(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """A worker: a module of Python, with options."""
        with (self.folder / f"{name}.log").open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=QUEUES, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
                # What a killed worker leaves goes with the folder.
                env={**os.environ, "TMPDIR": str(self.folder)},
            )  # fmt: skip
        self.processes.append(worker)
        return worker

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def await_start(self, **said: str) -> None:
        """Wait until workers have said in their logs that they are at work."""
        deadline = time.monotonic() + 2 * PATIENCE
        while missing := [name for name, text in said.items() if text not in self.log(name)]:
            assert time.monotonic() < deadline, "".join(map(self.log, missing))
            time.sleep(0.05)

    def say(self, word: str) -> None:
        """What some tasks work until."""
        self.conn.execute("insert into said values (%s)", [word])

    def rows(self, sql: str, *params: Any) -> list[Any]:
        return self.conn.execute(sql.encode(), params).fetchall()

    def at_once(self, task: str) -> int:
        """How many of these were at work at the same moment, at most."""
        ((most,),) = self.rows(
            "select max(sum) from (select sum(change) over (order by nth) from at_work where task like %s) s",
            f"%.{task}",
        )
        return int(most)

    def waiting(self, name: str) -> int:
        return self.limiter.get(name).waiting

    def held(self, name: str) -> int:
        return self.limiter.get(name).held

    def stop(self) -> None:
        for worker in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # its pool too
            worker.wait(PATIENCE)
        self.conn.close()


@contextlib.contextmanager
def database(server: Any, by_way: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """A database of one's own with pglimits in it: how pglimits is to reach it, and its DSN on the server itself."""
    name = f"queue_{uuid4().hex}"
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
        try:
            _install.install(server.dsn(name))
            yield by_way(server.dsn(name)), server.dsn(name)
        finally:
            admin.execute(f"drop database {name} with (force)".encode())
