"""The pages of docs/languages: their files, how to run them, and what the database sees of that."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ROOT / "docs" / "languages"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CUTS_AFTER = 500
"""After so many grants, all connections are cut."""


@dataclass(frozen=True, slots=True)
class Block:
    """An example on a page."""

    language: str
    title: str
    code: str


@dataclass(frozen=True, slots=True)
class Page:
    """A page: the files that it tells to save, the commands, and what they print."""

    name: str
    blocks: list[Block]

    @classmethod
    def read(cls, name: str) -> Page:
        found = BLOCK.findall((PAGES / name).read_text(encoding="utf-8"))
        return cls(name, [Block(*each) for each in found])

    def code(self, language: str) -> list[str]:
        """The blocks in a language that are no files."""
        return [each.code for each in self.blocks if each.language == language and not each.title]

    def commands(self) -> list[str]:
        return [line for code in self.code("bash") for line in code.splitlines()]

    def save(self, folder: Path, jobs: int) -> None:
        """Save its files, as it tells to, with so many jobs for a worker."""
        files = {each.title: each.code for each in self.blocks if each.title}
        assert any("200" in code for code in files.values())
        for title, code in files.items():
            (folder / title).write_text(code.replace("200", str(jobs)), encoding="utf-8")

    def prints(self) -> str:
        (printed,) = self.code("text")
        return printed


def environment(dsn: str) -> dict[str, str]:
    """That says to all drivers which database it is."""
    to = conninfo_to_dict(dsn)
    names = {"PGHOST": "host", "PGPORT": "port", "PGUSER": "user", "PGDATABASE": "dbname"}
    known = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    known["PATH"] = f"{Path(sys.executable).parent}:{known['PATH']}"
    return known | {name: str(to[part]) for name, part in names.items()} | {"PGSSLMODE": "disable"}


def run(command: str, folder: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=240
    )


@contextmanager
def by_tcp(dsn: str) -> Iterator[int]:
    """A port by which a driver reaches the server that knows no unix sockets."""
    to = conninfo_to_dict(dsn)
    loop = asyncio.new_event_loop()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_unix_connection(f"{to['host']}/.s.PGSQL.{to['port']}")
        await asyncio.gather(pump(reader, upstream[1]), pump(upstream[0], writer))

    listener = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listener.close()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        while any(not task.done() for task in left):
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@dataclass(slots=True)
class Watched:
    """What the database has seen of a program."""

    most: int = 0
    leases: dict[object, tuple[float, int]] = field(default_factory=dict)
    """The moment and the fence of leases on the limit, as far as somebody looked."""
    was_cut: bool = False
    listened: bool = False
    ended: int = 0
    """Leases that an operator has ended."""


@contextmanager
def watched(dsn: str, *, ends_wide: bool = False) -> Iterator[Watched]:
    """Look on what a program does, and cut all of its connections once.

    ends_wide: end leases on all three slots, as an operator may.
    """
    seen, over = Watched(), threading.Event()

    def look(connection: psycopg.Connection[tuple[object, ...]]) -> None:
        held = 0
        for lease_id, slots, moment, fence in connection.execute(
            "select lease_id, slots, date_part('epoch', acquired_at), fence from pglimits.holders"
            " where name = 'database'"
        ):
            held += int(str(slots))
            seen.leases[lease_id] = (float(str(moment)), int(str(fence)))
            if ends_wide and slots == 3:
                seen.ended += 1
                connection.execute("select pglimits.force_release(%s)", [lease_id])
        seen.most = max(seen.most, held)
        row = connection.execute("select grants from pglimits.counters where name = 'database'").fetchone()
        if row and not seen.was_cut and int(str(row[0])) >= CUTS_AFTER:
            others = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            row = connection.execute(f"select count(*) {others} and query ~* '^listen \"?pglimits_'").fetchone()
            seen.listened = row is not None and row[0] != 0
            connection.execute(f"select pg_terminate_backend(pid) {others}")
            seen.was_cut = True

    def look_on() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not over.is_set():
                look(connection)
                time.sleep(0.1)

    looking = threading.Thread(target=look_on)
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join()
