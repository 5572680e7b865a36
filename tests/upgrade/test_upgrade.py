"""Upgrades, by psql and by Python, from a made-up version before this one to one after it, while others are at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import psycopg
import pytest
from editions import Edition
from installtest import assert_same, catalog
from psycopg.conninfo import make_conninfo
from sqltest import Session, check_consistent
from wrappertest import Children, WaitUntil, in_thread, open_api

from pglimits import VersionMismatch, __version__, _install
from pglimits._embedded import Binaries, throwaway

Connection: TypeAlias = psycopg.Connection[Any]
Installs: TypeAlias = Callable[[str, Edition, str], str | None]
MEANS = pytest.mark.parametrize("means", ["python", "psql"])

BEFORE = """
create or replace function pglimits.version() returns text language sql immutable as $$ select '0.0.9' $$;
create function pglimits._gone() returns integer language sql return 1;
create function pglimits.gone(name text) returns integer language sql return pglimits._gone();
create procedure pglimits.gone_wait(name text) language plpgsql as $$ begin commit; end $$;
create view pglimits.gone_view as select pglimits.gone('x') as gone;
grant select on pglimits.gone_view to pglimits_reader;
grant execute on function pglimits.gone(text), pglimits.peek, pglimits._lock to pglimits_reader, public;
drop function pglimits.peek_all, pglimits._listed;
drop view pglimits.waiters;
create or replace function pglimits.renew(lease_id uuid, lease_duration double precision default null) returns boolean
language sql set work_mem = '1MB' as $$ select false $$;
comment on function pglimits.renew is null;
"""
"""Makes an installation one of a version before: some functions and views are gone by now, some are new, or others."""

NEXT = """
drop view if exists pglimits.waiters;
drop function if exists pglimits._ids_fault(uuid[]);
alter table pglimits.configs add column note text;
comment on column pglimits.configs.note is 'What comes next.';
alter table pglimits.states set (fillfactor = 60);
create index leases_acquired on pglimits.leases (acquired_at);
create table pglimits.notes (limit_id bigint primary key, taken_at timestamptz not null);
comment on table pglimits.notes is 'What comes next.';
alter type pglimits._request add attribute remark text;
"""


@pytest.fixture
def s(conn: Connection) -> Session:
    return Session(conn)


def become_next(made: Edition) -> Edition:
    made.migrate(NEXT)
    made.edit("functions/010_basics.sql", "_ids_fault(lease_ids uuid[])", "_ids_fault(ids uuid[])")
    for use in ("when {} is null", "array_ndims({})", "array_position({}, null)"):
        made.edit("functions/010_basics.sql", use.format("lease_ids"), use.format("ids"))
    made.edit("views.sql", "q.lease_id, c.name, q.key, q.slots,", "c.name, q.lease_id, q.key, q.slots,")
    return made


@pytest.fixture
def next_version(edition: Callable[[str], Edition]) -> Edition:
    """A version to come, which serves the clients of this one, with other tables, arguments, and order of columns."""
    return become_next(edition("0.1.1"))


def rows(session: Session) -> dict[str, list[Any]]:
    """What every table of this version has in it."""
    return {
        table: session.all(f"select to_jsonb(x) - 'note' from pglimits.{table} x order by to_jsonb(x)")
        for table in ("configs", "known_keys", "states", "leases", "queue", "processes")
    }


# What an upgrade makes.


@MEANS
def test_an_upgrade_gives_just_what_a_new_installation_gives_and_keeps_what_is_there(
    dsn: str, s: Session, other_dsn: str, means: str, next_version: Edition, install_by: Installs
) -> None:
    assert install_by(means, next_version, other_dsn) is None
    s.create("database", 2)
    s.create("api", 1, 0.01)
    holders = [lease.lease_id for lease in s.serves("database", 2, holder={"job": 1})]
    waiters = [s.queue("database") for _ in range(3)]
    s.rate_limit("api")
    s.rate_limit("api", timeout_seconds=3600)
    s.run(BEFORE)
    before, fence = rows(s), s.holders()[-1].fence
    for _ in ("new", "again"):
        assert install_by(means, next_version, dsn) is None
        assert_same(catalog(dsn), catalog(other_dsn))
        assert rows(s) == before
    for holder, waiter in zip(holders, waiters, strict=False):
        assert s.renew(holder) and s.release(holder)
        lease = s.watch_one(waiter)
        assert lease.status == "granted" and lease.fence > fence
        fence = lease.fence
    assert [(row.name, row.position) for row in s.waiters()] == [("api", 1), ("database", 1)]
    check_consistent(s)


def test_what_users_have_built_on_and_granted_of_what_is_public_survives_and_of_what_is_private_does_not(
    dsn: str, s: Session, next_version: Edition, install_by: Installs
) -> None:
    s.run("create role upgrade_app")
    try:
        s.create("database", 2)
        s.run("create view mine as select name, held from pglimits.limits")
        s.run("create function take(name text) returns text language sql begin atomic"
              " select (pglimits.acquire(take.name)).status; end")  # fmt: skip
        s.run(
            "grant execute on function pglimits.release(uuid), pglimits._lock, pglimits._acquire_batch to upgrade_app"
        )
        s.run(
            "grant select on pglimits.limits, pglimits.leases to upgrade_app; grant usage on schema pglimits to public"
        )
        assert install_by("python", next_version, dsn) is None
        assert s.value("select take('database')") == "granted"
        assert s.one("select * from mine") == ("database", 1)
        may = "select has_function_privilege('upgrade_app', p.oid, 'execute') from pg_proc p where p.proname = %s"
        assert [s.value(may, name) for name in ("release", "_lock", "_acquire_batch")] == [True, False, False]
        may = "select has_table_privilege('upgrade_app', 'pglimits.' || %s, 'select')"
        assert [s.value(may, name) for name in ("limits", "leases")] == [True, False]
        assert s.value("select has_schema_privilege('upgrade_app', 'pglimits', 'usage')") is False
    finally:
        s.run("drop owned by upgrade_app; drop role upgrade_app")


@MEANS
@pytest.mark.parametrize(
    "built",
    ["view mine as select * from pglimits.gone_view", "function mine() returns integer return pglimits.gone('x')"],
)
def test_what_is_built_on_something_that_is_gone_stops_the_upgrade_and_is_named(
    dsn: str, s: Session, built: str, means: str, edition: Callable[[str], Edition], install_by: Installs
) -> None:
    s.run(BEFORE)
    s.run(f"create {built}")
    before = catalog(dsn)
    problem = install_by(means, edition("0.1.1"), dsn)
    assert problem is not None and "mine" in problem and "drop it, upgrade, and create it anew" in problem
    assert_same(catalog(dsn), before)
    s.run(f"drop {built.split()[0]} mine")
    assert install_by(means, Edition(edition("0.1.2").folder / "same", "0.1.2"), dsn) is None


@MEANS
def test_an_older_version_does_not_undo_a_newer_one(
    dsn: str, s: Session, means: str, edition: Callable[[str], Edition], install_by: Installs
) -> None:
    assert install_by(means, edition("0.1.10"), dsn) is None
    before = catalog(dsn)
    problem = install_by(means, edition("0.1.9"), dsn)
    assert problem is not None
    assert "has pglimits 0.1.10, which is newer than this one, 0.1.9: pip install --upgrade pglimits" in problem
    assert_same(catalog(dsn), before)
    _install.install_if_needed(dsn)
    assert s.value("select pglimits.version()") == "0.1.10"
    # Nor where only the tables are newer.
    s.run("update pglimits.meta set schema_version = 999; drop view pglimits.waiters")
    before = catalog(dsn)
    problem = install_by(means, edition("0.1.11"), dsn)
    assert problem is not None and "newer schema" in problem
    assert_same(catalog(dsn), before)


def test_whoever_upgrades_everything_goes_on_belonging_to_one_role(
    server: Any, next_version: Edition, install_by: Installs
) -> None:
    with throwaway(binaries=Binaries(server.bin, server.version)) as cluster:  # roles belong to the whole cluster
        mine = make_conninfo(cluster.dsn, dbname="mine")
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            for role in ("user", "reader", "admin"):
                connection.execute(f"create role pglimits_{role}".encode())
            connection.execute("create role owner login; create role stranger login")
            connection.execute("create database mine owner owner")
            connection.execute("grant create on database mine to stranger")
        _install.install(make_conninfo(mine, user="owner"))
        problem = install_by("python", next_version, make_conninfo(mine, user="stranger"))
        assert problem is not None and "belongs to the role owner" in problem and "grant pglimits_user" not in problem
        assert install_by("python", next_version, mine) is None
        with psycopg.connect(mine, autocommit=True) as connection:
            owners = """
                select relowner::regrole::text from pg_class where relnamespace = 'pglimits'::regnamespace
                union select proowner::regrole::text from pg_proc where pronamespace = 'pglimits'::regnamespace
            """
            assert connection.execute(owners).fetchall() == [("owner",)]
            session = Session(connection)
            session.create("database", 1)
            assert session.acquire("database").status == "granted"


@MEANS
def test_settings_of_a_database_do_not_keep_several_that_upgrade_at_once_from_it(
    dsn: str, s: Session, other_dsn: str, means: str, next_version: Edition, install_by: Installs, wait_until: WaitUntil
) -> None:
    """Who waits for its turn must see what the one before it has made."""
    assert install_by("python", next_version, other_dsn) is None
    s.run(BEFORE)
    for setting, value in (
        ("default_transaction_isolation", "serializable"), ("default_transaction_read_only", "on"),
        ("statement_timeout", "5s"), ("search_path", "nowhere"),
    ):  # fmt: skip
        s.run(f"alter database {s.connection.info.dbname} set {setting} = '{value}'")
    s.run("set default_transaction_read_only = off")
    lock = psycopg.connect(dsn)
    lock.execute("select pg_advisory_xact_lock(7210911204761542)")
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(install_by, means, next_version, dsn) for _ in range(4)]
        waits = "select count(*) = 4 from pg_locks where locktype = 'advisory' and not granted"
        wait_until(lambda: s.value(waits), timeout=60)
        lock.rollback()
        assert [result.result(120) for result in results] == [None] * 4
    lock.close()
    for setting in ("search_path", "default_transaction_isolation"):
        s.run(f"alter database {s.connection.info.dbname} reset {setting}")
    assert_same(catalog(dsn), catalog(other_dsn))


# Nothing half done.


_UPGRADE = """
import pathlib, sys
from pglimits import _install
_install._folder = lambda: pathlib.Path(sys.argv[1])
_install.install(sys.argv[2])
"""


@pytest.mark.parametrize("by", ["client", "server"])
def test_an_upgrade_that_is_killed_in_the_middle_changes_nothing(
    dsn: str, s: Session, by: str, next_version: Edition, install_by: Installs, wait_until: WaitUntil
) -> None:
    s.run(BEFORE)
    before = catalog(dsn)
    next_version.edit("tidy.sql", "-- Drops what an older", "select pg_advisory_xact_lock(1);\n-- Drops what an older")
    s.run("select pg_advisory_lock(1)")
    upgrade = subprocess.Popen(
        [sys.executable, "-c", _UPGRADE, str(next_version.folder), dsn], stderr=subprocess.DEVNULL
    )
    waiting = "select pid from pg_locks where locktype = 'advisory' and not granted"
    pid = wait_until(lambda: s.all(waiting), timeout=60)[0].pid
    if by == "client":
        os.kill(upgrade.pid, signal.SIGKILL)
    else:
        s.run("select pg_terminate_backend(%s)", pid)
    s.run("select pg_advisory_unlock(1)")  # only now does a server process look at its client again
    assert upgrade.wait(60) != 0
    wait_until(lambda: not s.all("select pid from pg_stat_activity where pid = %s", pid), timeout=60)
    assert_same(catalog(dsn), before)
    assert install_by("python", next_version, dsn) is None


# Locks.


@MEANS
def test_an_upgrade_does_not_wait_for_ever_for_a_long_transaction_nor_keep_others_waiting_meanwhile(
    dsn: str, s: Session, means: str, connect: Any, next_version: Edition, install_by: Installs, wait_until: WaitUntil
) -> None:
    s.create("database", 5)
    s.create("another", 5)
    before = catalog(dsn)
    long = Session(connect())
    long.run("begin")
    long.acquire("another")
    upgrade = in_thread(install_by, means, next_version, dsn)
    waits = "select count(*) > 0 from pg_locks where mode = 'AccessExclusiveLock' and not granted and pid <> %s"
    wait_until(lambda: s.value(waits, s.pid), timeout=60)
    served = 0
    while not upgrade.done():
        assert s.release(s.acquire("database").lease_id)
        served += 1
    problem = upgrade.result()
    assert served > 10
    assert problem is not None and f"session {long.pid}" in problem and "nothing was changed" in problem
    assert_same(catalog(dsn), before)
    # To install the same once more waits for nobody who is at work.
    assert install_by(means, Edition(next_version.folder / "same", __version__), dsn) is None
    # An upgrade that comes while a call is under way waits for its end.
    upgrade = in_thread(install_by, means, next_version, dsn)
    wait_until(lambda: s.value(waits, s.pid), timeout=60)
    long.run("commit")
    assert upgrade.result(60) is None


# Clients of another version.

_WORKS = """
import os, sys, threading, psycopg
from pglimits import Limiter
stop = threading.Event()
limiter = Limiter()
count = 0
def work():
    global count
    with psycopg.connect(os.environ["PGLIMITS_DSN"], autocommit=True) as log:
        while not stop.is_set():
            with limiter.concurrency("work", lease_duration=30):
                (n,) = log.execute("update busy set n = n + 1 returning n").fetchone()
                assert n <= 2, n
                log.execute("update busy set n = n - 1")
            count += 1
long = limiter.acquire("long", lease_duration=3, strict=True)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
print("works")
for line in sys.stdin:
    print(count)
    if line == "stop\\n": break
stop.set()
for thread in threads: thread.join()
assert not long.lost
assert limiter.release(long)
print("done")
"""

_WAITS = """
import sys
from pglimits import Limiter
with Limiter().concurrency("line") as lease:
    print(lease.fence)
    sys.stdin.readline()
print("done")
"""


def test_clients_of_the_old_version_go_on_holding_and_waiting_through_upgrades(
    dsn: str, s: Session, connect: Any, children: Children, next_version: Edition, edition: Callable[[str], Edition],
    install_by: Installs, wait_until: WaitUntil,
) -> None:  # fmt: skip
    s.run("create table busy (n integer not null); insert into busy values (0)")
    for name, limit in (("work", 2), ("long", 2), ("line", 1)):
        s.create(name, limit)
    first_in_line = s.acquire("line").lease_id
    line = []
    for nth in range(1, 3):
        line.append(children(_WAITS))
        wait_until(lambda nth=nth: len(s.waiters("line")) == nth, timeout=60)
    in_sql = in_thread(Session(connect()).one, "call pglimits.acquire_wait('line')")
    wait_until(lambda: len(s.waiters("line")) == 3, timeout=60)
    workers = [children(_WORKS), children(_WORKS)]
    for worker in workers:
        worker.expect("works")

    def count(worker: Any) -> int:
        worker.tell("count")
        return int(worker.hear())

    def all_work() -> None:
        for worker in workers:
            so_far = count(worker)
            wait_until(lambda: count(worker) > so_far + 5, timeout=120)

    all_work()
    for version in (next_version, become_next(edition("0.1.2"))):
        assert install_by("python", version, dsn) is None
        all_work()
    positions = s.all("select position from pglimits.waiters where name = 'line' order by 1")
    assert positions == [(1,), (2,), (3,)]
    assert s.release(first_in_line)
    fences = []
    for child in line:  # in order
        fences.append(int(child.hear()))
        child.tell()
        child.expect("done")
        child.end()
    last = in_sql.result(120)
    assert last.status == "granted"
    assert [*fences, last.fence] == sorted([*fences, last.fence])
    assert s.release(last.lease_id)
    for worker in workers:
        worker.tell("stop")
        worker.hear()
        worker.expect("done")
        worker.end()
    assert s.value("select sum(held) + sum(waiting) from pglimits.limits") == 0
    check_consistent(s)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_client_is_served_by_versions_that_fit_and_told_to_upgrade_where_it_is_too_new(
    dsn: str, s: Session, kind: str, next_version: Edition, install_by: Installs, monkeypatch: pytest.MonkeyPatch
) -> None:
    s.create("database", 1)
    for version in ("0.1.7", __version__):  # a new client on what is there, then an old one on what came
        monkeypatch.setattr("pglimits._database.__version__", version)
        with open_api(kind, dsn=dsn) as api:
            assert api.release(api.acquire("database"))
        assert install_by("python", next_version, dsn) is None
    monkeypatch.setattr("pglimits._database.__version__", "0.2.0")
    with (
        open_api(kind, dsn=dsn) as api,
        pytest.raises(VersionMismatch, match=r"has pglimits 0\.1\.1, this is 0\.2\.0: run pglimits upgrade"),
    ):
        api.acquire("database")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_client_that_is_too_old_for_what_it_calls_is_told_to_upgrade_itself_and_goes_on_with_the_rest(
    dsn: str, s: Session, kind: str, edition: Callable[[str], Edition], install_by: Installs
) -> None:
    s.create("database", 2)
    other = edition("0.2.0").migrate("drop function if exists pglimits._acquire_batch;")
    other.edit("functions/095_batches.sql", "  for_rate boolean,\n", "  at_what text,\n  for_rate boolean,\n")
    other.edit(
        "functions/095_batches.sql",
        "text[], integer[], text[], boolean, double",
        "text[], integer[], text[], text, boolean, double",
    )
    with open_api(kind, dsn=dsn) as api:
        for _ in range(8):  # until its statements are prepared
            assert api.release(api.acquire("database"))
        lease = api.acquire("database")
        assert install_by("python", other, dsn) is None
        assert api.renew(lease)
        with pytest.raises(VersionMismatch, match=f"has pglimits 0.2.0, this is {__version__}: pip install --upgrade"):
            api.acquire("database")
        assert s.renew(lease.id)
    with open_api(kind, dsn=dsn) as api, pytest.raises(VersionMismatch, match="pip install --upgrade"):
        api.get("database")
