"""What the tests of the extension share: its files, a database that is full, and what is in it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import pytest
from documents import blocks
from editions import Edition
from sqltest import Session, check_consistent

from pglimits import __version__, _extension, _install

ROOT = Path(__file__).resolve().parent.parent.parent
NEXT = "0.1.1"
MIGRATION = """
alter table pglimits.meta alter schema_version set default 2;
alter table pglimits.configs add column note text;
comment on column pglimits.configs.note is 'What comes next.';
create table pglimits.notes (note_id bigint generated always as identity primary key, taken_at timestamptz not null);
comment on table pglimits.notes is 'What comes next.';
comment on column pglimits.notes.taken_at is 'When.';
drop view if exists pglimits.waiters;
drop function if exists pglimits._ids_fault(uuid[]);
"""
TABLES = ("meta", "configs", "known_keys", "states", "leases", "queue", "processes", "event_log", "samples", "upkeep")
MEMBERS = """
select pg_describe_object(d.classid, d.objid, 0) from pg_depend d
left join pg_type t on d.classid = 'pg_type'::regclass and t.oid = d.objid
left join pg_class c on c.oid = t.typrelid
where d.refclassid = 'pg_extension'::regclass and d.deptype = 'e'
  and d.refobjid = (select x.oid from pg_extension x where x.extname = 'pglimits')
  and (t.oid is null or c.relkind = 'c') order by 1
"""
"""But for the types of tables and arrays, which belong to an extension on some versions and not on others."""
DUMPED = """
select c.oid::regclass::text, x.condition
from pg_extension e cross join lateral unnest(e.extconfig, e.extcondition) x(relation, condition)
join pg_class c on c.oid = x.relation where e.extname = 'pglimits' order by 1
"""


Cli: TypeAlias = Callable[..., Any]


def sections(language: str = "bash") -> dict[str, list[str]]:
    """The commands for a shell of each part of the document."""
    found: dict[str, list[str]] = {}
    for block in blocks("docs/extension.md", language):
        found.setdefault(block.section, []).append(block.code)
    return found


def files_of(edition: Edition | None = None) -> dict[str, str]:
    """The files of this version, or of another."""
    with pytest.MonkeyPatch.context() as patch:
        if edition is not None:
            patch.setattr(_install, "_folder", lambda: edition.folder)
            patch.setattr(_extension, "__version__", NEXT)
            patch.setattr(_extension, "RELEASED", (__version__,))
        return _extension.files()


def share(binaries: Path) -> Path | None:
    """Where a server looks for its extensions."""
    for folder in (binaries / "../share/postgresql/extension", binaries / "../share/extension"):
        if (folder / "plpgsql.control").exists():
            return folder.resolve()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        said = subprocess.run([binaries / "pg_config", "--sharedir"], capture_output=True, text=True, check=True).stdout
        return Path(said.strip()) / "extension"
    return None


@contextlib.contextmanager
def session(dsn: str) -> Iterator[Session]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield Session(connection)


def run(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def create(dsn: str, version: str = __version__) -> None:
    run(dsn, f"create extension pglimits version '{version}'")


def fill(dsn: str) -> None:
    """With limits, of which one was deleted, leases, a waiter, a level, events, samples, and a setting."""
    with session(dsn) as s:
        s.create("gone", 1)
        for _ in range(40):
            s.release(s.acquire("gone").lease_id)
        s.run("select pglimits.delete_limit('gone')")
        s.create("db", 1)
        s.create("mails", 5, 0.001)
        s.acquire("db", holder={"job": 1})
        s.queue("db")
        s.run("update pglimits.queue set expires_at = expires_at + interval '1 hour'")  # a restore may take its time
        s.rate_limit("mails", slots=3)
        s.run("select pglimits.keep_history(86400); select pglimits.sweep()")


def rows(dsn: str) -> dict[str, list[Any]]:
    """What every table has in it."""
    with session(dsn) as s:
        return {
            table: s.all(f"select to_jsonb(x) - 'note' - 'schema_version' from pglimits.{table} x order by to_jsonb(x)")
            for table in TABLES
        }


def goes_on(dsn: str, was: dict[str, list[Any]]) -> None:
    """New limits get ids of their own, and fences never go back."""
    ids = [row[0]["limit_id"] for row in was["configs"]]
    events = [row[0]["event_id"] for row in was["event_log"]]
    ((meta,),) = was["meta"]
    with session(dsn) as s:
        s.create("new", 1)
        assert s.value("select limit_id from pglimits.configs where name = 'new'") > max(ids)
        assert s.value("select max(event_id) from pglimits.event_log") > max(events)
        assert s.acquire("new").fence > meta["fence_floor"] >= 40
        (holder,) = s.holders("db")
        (waiter,) = s.waiters("db")
        assert s.release(holder.lease_id)
        lease = s.watch_one(waiter.lease_id)
        assert lease.status == "granted" and lease.fence > holder.fence
        check_consistent(s)


def of_extension(dsn: str) -> list[Any]:
    """What belongs to the extension, and what of it is part of a dump."""
    with session(dsn) as s:
        return [
            s.value("select extversion from pg_extension where extname = 'pglimits'"),
            s.all(MEMBERS),
            s.all(DUMPED),
        ]
