"""The pages of docs/languages: their files, how to run them, and what the database sees of that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

PAGES = Path(__file__).resolve().parent.parent.parent / "docs" / "languages"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CUTS = (300, 900)
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

    def save(self, folder: Path) -> None:
        """Save its files, as it tells to."""
        for each in self.blocks:
            if each.title:
                (folder / each.title).write_text(each.code, encoding="utf-8")

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


def run(command: str, folder: Path, env: Mapping[str, str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=timeout
    )


@dataclass(slots=True)
class Watched:
    """What the database has seen of a program."""

    most: int = 0
    leases: dict[object, tuple[float, int]] = field(default_factory=dict)
    """The moment and the fence of leases on the limit, as far as somebody looked."""
    cuts: int = 0
    listened: bool = False


@contextmanager
def watched(dsn: str) -> Iterator[Watched]:
    """Look on what a program does, and cut all of its connections now and then."""
    seen, over = Watched(), threading.Event()

    def look(connection: psycopg.Connection[tuple[object, ...]]) -> None:
        held = 0
        for lease_id, slots, moment, fence in connection.execute(
            "select lease_id, slots, date_part('epoch', acquired_at), fence from pglimits.holders"
            " where name = 'database'"
        ):
            held += int(str(slots))
            seen.leases[lease_id] = (float(str(moment)), int(str(fence)))
        seen.most = max(seen.most, held)
        row = connection.execute("select grants from pglimits.counters where name = 'database'").fetchone()
        if row and seen.cuts < len(CUTS) and int(str(row[0])) >= CUTS[seen.cuts]:
            others = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            row = connection.execute(f"select count(*) {others} and query ~* '^listen \"?pglimits_'").fetchone()
            seen.listened = seen.listened or (row is not None and row[0] != 0)
            connection.execute(f"select pg_terminate_backend(pid) {others}")
            seen.cuts += 1

    def look_on() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not over.is_set():
                look(connection)
                time.sleep(0.05)

    looking = threading.Thread(target=look_on)
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join()
