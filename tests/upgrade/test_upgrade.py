"""Upgrades: from every version, by psql and by Python, with data and while others are at work."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import pytest
from editions import VERSIONS, Edition
from installtest import assert_same, catalog
from psycopg.conninfo import make_conninfo
from sqltest import Session, check_consistent
from wrappertest import Children, WaitUntil, in_thread, open_api

from pglimits import VersionMismatch, __version__
from pglimits._embedded import Binaries, throwaway

Connection: TypeAlias = psycopg.Connection[Any]
Installs: TypeAlias = Callable[[str, Edition, str], str | None]
Editions: TypeAlias = Callable[[str], Edition]
MEANS = ["python", "psql"]

BUSY = "create table busy (n integer not null); insert into busy values (0)"
"""How many are at work on the limit `work` at the same time, as those who are at work count it."""


@pytest.fixture
def s(conn: Connection) -> Session:
    return Session(conn)


def rows(session: Session) -> dict[str, list[Any]]:
    """What every table of this version has in it."""
    return {
        table: session.all(
            f"select to_jsonb(x) - '{{note,origin}}'::text[] from pglimits.{table} x order by to_jsonb(x)"
        )
        for table in ("configs", "keys", "states", "leases", "queue")
    }


# What an upgrade makes.


@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize("old", [*VERSIONS, None], ids=lambda old: old.stem if old else "before")
def test_an_upgrade_gives_just_what_a_new_installation_gives(
    bare_dsn: str, other_dsn: str, psql: Any, old: Path | None, means: str, edition: Editions,
    next_version: Edition, install_by: Installs,
) -> None:  # fmt: skip
    assert install_by(means, next_version, other_dsn) is None
    if old is not None:
        assert psql(bare_dsn, old).returncode == 0
    else:
        assert install_by(means, edition("0.1.0").become_the_one_before(), bare_dsn) is None
        assert len(catalog(bare_dsn)["routines"]) > len(catalog(other_dsn)["routines"])
    assert install_by(means, next_version, bare_dsn) is None
    assert_same(catalog(bare_dsn), catalog(other_dsn))
    assert install_by(means, next_version, bare_dsn) is None, "again"
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_an_upgrade_keeps_limits_leases_queues_and_turns(
    dsn: str, s: Session, next_version: Edition, install_by: Installs
) -> None:
    s.create("database", 2)
    s.create("api", 1, 0.01)
    holders = [lease.lease_id for lease in s.serves("database", 2, holder={"job": 1})]
    waiters = [s.queue("database") for _ in range(3)]
    s.rate_limit("api")
    turn = s.rate_limit("api", wait="1 hour")
    before = rows(s)
    fence = s.holders()[-1].fence
    assert install_by("python", next_version, dsn) is None
    assert rows(s) == before
    assert s.watch_one(turn.lease_id).status == "granted"
    for holder, waiter in zip(holders, waiters, strict=False):
        assert s.renew(holder) and s.release(holder)
        lease = s.watch_one(waiter)
        assert lease.status == "granted" and lease.fence > fence
        fence = lease.fence
    assert s.all("select position from pglimits.waiters where name = 'database'") == [(1,)]
    check_consistent(s)


def test_what_users_have_built_and_granted_survives(
    dsn: str, s: Session, next_version: Edition, install_by: Installs
) -> None:
    s.run("create role upgrade_app")
    try:
        s.create("database", 2)
        s.run("create view mine as select name, held from pglimits.limits")
        s.run("create function take(name text) returns text language sql begin atomic"
              " select (pglimits.acquire(take.name)).status; end")  # fmt: skip
        s.run("grant execute on function pglimits._now(), pglimits.release(uuid) to upgrade_app")
        s.run("grant select on pglimits.limits to upgrade_app")
        assert install_by("python", next_version, dsn) is None
        assert s.value("select take('database')") == "granted"
        assert s.one("select * from mine") == ("database", 1)
        for function in ("_now()", "release(uuid)"):
            assert s.value("select has_function_privilege('upgrade_app', %s, 'execute')", f"pglimits.{function}")
        assert s.value("select has_table_privilege('upgrade_app', 'pglimits.limits', 'select')")
    finally:
        s.run("drop owned by upgrade_app; drop role upgrade_app")


@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize(
    "built",
    ["view mine as select * from pglimits.gone_view", "function mine() returns integer return pglimits.gone('x')"],
)
def test_what_is_built_on_something_that_is_gone_stops_the_upgrade_and_is_named(
    bare_dsn: str, built: str, means: str, edition: Editions, next_version: Edition, install_by: Installs
) -> None:
    install_by(means, edition("0.1.0").become_the_one_before(), bare_dsn)
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute(f"create {built}".encode())
        before = catalog(bare_dsn)
        problem = install_by(means, next_version, bare_dsn)
        assert problem is not None and "mine" in problem and "drop it, upgrade, and create it anew" in problem
        assert_same(catalog(bare_dsn), before)
        connection.execute(f"drop {built.split()[0]} mine".encode())
    assert install_by(means, next_version, bare_dsn) is None


@pytest.mark.parametrize("means", MEANS)
def test_an_older_version_does_not_undo_a_newer_one(
    dsn: str, means: str, edition: Editions, next_version: Edition, install_by: Installs
) -> None:
    newest = edition("0.1.10")
    assert install_by(means, newest, dsn) is None
    before = catalog(dsn)
    problem = install_by(means, edition("0.1.9"), dsn)
    assert problem is not None
    assert "has pglimits 0.1.10, which is newer than this one, 0.1.9: pip install --upgrade pglimits" in problem
    assert_same(catalog(dsn), before)


def test_the_embedded_server_is_upgraded_but_never_taken_back(
    dsn: str, s: Session, edition: Editions, install_by: Installs
) -> None:
    installer: Any = importlib.import_module("pglimits._install")
    install_by("python", edition("0.1.10"), dsn)
    installer.install_if_needed(dsn)
    assert s.value("select pglimits.version()") == "0.1.10"
    s.run("create or replace function pglimits.version() returns text language sql as $$ select '0.0.9' $$")
    install_by("python", edition(__version__), dsn)
    assert s.value("select pglimits.version()") == __version__


def test_whoever_upgrades_everything_goes_on_belonging_to_one_role(
    server: Any, next_version: Edition, install_by: Installs
) -> None:
    with throwaway(binaries=Binaries(server.bin, server.version)) as cluster:  # roles belong to the whole cluster
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            connection.execute("create role owner login; create role stranger login")
            connection.execute("create database mine owner owner")
            connection.execute("grant create on database mine to stranger")
        mine = make_conninfo(cluster.dsn, dbname="mine")
        importlib.import_module("pglimits._install").install(make_conninfo(mine, user="owner"))
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


@pytest.mark.parametrize("means", MEANS)
def test_settings_of_a_role_or_a_database_do_not_keep_anybody_from_upgrading(
    dsn: str, s: Session, means: str, next_version: Edition, install_by: Installs, wait_until: WaitUntil
) -> None:
    """Several at once: who waits for its turn must see what the one before it has made."""
    for setting, value in (
        ("default_transaction_isolation", "serializable"), ("default_transaction_read_only", "on"),
        ("statement_timeout", "5s"), ("search_path", "nowhere"),
    ):  # fmt: skip
        s.run(f"alter database {s.connection.info.dbname} set {setting} = '{value}'")
    s.run("set default_transaction_read_only = off")
    lock = psycopg.connect(dsn)
    lock.execute("select pg_advisory_xact_lock(7210911204761542)")
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(install_by, means, next_version, dsn) for _ in range(3)]
        waits = "select count(*) = 3 from pg_locks where locktype = 'advisory' and not granted"
        wait_until(lambda: s.value(waits))
        lock.rollback()
        assert [result.result(60) for result in results] == [None, None, None]
    lock.close()
    assert s.value("select pglimits.version()") == "0.1.1"


# Nothing half done.


@pytest.mark.parametrize("by", ["client", "server"])
def test_an_upgrade_that_is_killed_in_the_middle_changes_nothing(
    dsn: str, s: Session, by: str, next_version: Edition, psql: Any, install_by: Installs, wait_until: WaitUntil
) -> None:
    s.create("database", 2)
    lease = s.acquire("database").lease_id
    before = catalog(dsn)
    next_version.add("halt.sql", "select pg_advisory_xact_lock(1);")
    s.run("select pg_advisory_lock(1)")
    upgrade = subprocess.Popen(
        [sys.executable, "-c", _UPGRADE, str(next_version.folder), dsn], stderr=subprocess.DEVNULL
    )
    pid = wait_until(lambda: s.all("select pid from pg_locks where locktype = 'advisory' and not granted"))[0].pid
    with psycopg.connect(dsn, autocommit=True) as meanwhile:
        assert meanwhile.execute("select pglimits.version()").fetchone() == (__version__,)
    if by == "client":
        os.kill(upgrade.pid, signal.SIGKILL)
        s.run("select pg_advisory_unlock(1)")  # only now does its server process look at it again
    else:
        s.run("select pg_terminate_backend(%s)", pid)
        s.run("select pg_advisory_unlock(1)")
    assert upgrade.wait(60) != 0
    wait_until(lambda: not s.all("select pid from pg_stat_activity where pid = %s", pid))
    assert_same(catalog(dsn), before)
    assert s.renew(lease)
    next_version.edit("install.sql", "\\ir halt.sql\n", "")
    assert install_by("python", next_version, dsn) is None


_UPGRADE = """
import pathlib, sys
from pglimits import _install
_install._folder = lambda: pathlib.Path(sys.argv[1])
_install.install(sys.argv[2])
"""


def test_upgrades_at_once_give_one(
    dsn: str, s: Session, other_dsn: str, next_version: Edition, install_by: Installs
) -> None:
    s.create("database", 2)
    s.serves("database", 2)
    with ThreadPoolExecutor(6) as pool:
        results = pool.map(lambda nth: install_by(MEANS[nth % 2], next_version, dsn), range(6))
        assert list(results) == [None] * 6
    assert install_by("python", next_version, other_dsn) is None
    assert_same(catalog(dsn), catalog(other_dsn))
    assert s.limit("database").held == 2


# Locks.


@pytest.mark.parametrize("means", MEANS)
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
    wait_until(lambda: s.value(waits, s.pid))
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
    long.run("commit")
    assert install_by(means, next_version, dsn) is None


def test_an_upgrade_of_functions_alone_waits_too_for_calls_that_are_under_way(
    dsn: str, s: Session, connect: Any, edition: Editions, install_by: Installs, wait_until: WaitUntil
) -> None:
    s.create("database", 5)
    call = Session(connect())
    call.run("begin")
    lease = call.acquire("database").lease_id
    upgrade = in_thread(install_by, "python", edition("0.1.1"), dsn)
    waits = "select count(*) > 0 from pg_locks where mode = 'AccessExclusiveLock' and not granted and pid <> %s"
    wait_until(lambda: s.value(waits, s.pid))
    call.run("commit")
    assert upgrade.result(60) is None
    assert s.release(lease)


# Clients of the old version.

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

_WORKS_IN_TASKS = """
import asyncio, os, sys, psycopg
from pglimits import AsyncLimiter
stop = False
count = 0
async def work(limiter):
    global count
    async with await psycopg.AsyncConnection.connect(os.environ["PGLIMITS_DSN"], autocommit=True) as log:
        while not stop:
            async with limiter.concurrency("work", lease_duration=30):
                (n,) = await (await log.execute("update busy set n = n + 1 returning n")).fetchone()
                assert n <= 2, n
                await log.execute("update busy set n = n - 1")
            count += 1
async def main():
    global stop
    async with AsyncLimiter() as limiter:
        long = await limiter.acquire("long", lease_duration=3, strict=True)
        tasks = [asyncio.create_task(work(limiter)) for _ in range(4)]
        print("works")
        while True:
            line = await asyncio.to_thread(sys.stdin.readline)
            print(count)
            if line == "stop\\n": break
        stop = True
        await asyncio.gather(*tasks)
        assert not long.lost
        assert await limiter.release(long)
    print("done")
asyncio.run(main())
"""

_WAITS = """
import sys
from pglimits import Limiter
limiter = Limiter()
with limiter.concurrency("line") as lease:
    print(lease.fence)
    sys.stdin.readline()
print("done")
"""

_SLEEPS = """
from pglimits import Limiter
Limiter().rate_limit("slow")
print("its turn")
"""


def test_clients_of_the_old_version_go_on_holding_waiting_and_sleeping_through_upgrades(
    dsn: str, s: Session, connect: Any, children: Children, next_version: Edition, edition: Editions,
    install_by: Installs, wait_until: WaitUntil,
) -> None:  # fmt: skip
    s.run(BUSY)
    s.create("work", 2)
    s.create("long", 2)
    s.create("line", 1)
    s.create("slow", 1, 0.001)
    s.rate_limit("slow")
    first_in_line = s.acquire("line").lease_id
    sleeper = children(_SLEEPS)
    line = []
    for nth in range(3):
        line.append(children(_WAITS))
        wait_until(lambda nth=nth: len(s.waiters("line")) == nth + 1)
    in_sql = in_thread(Session(connect()).one, "call pglimits.acquire_wait('line')")
    wait_until(lambda: len(s.waiters("line")) == 4)
    wait_until(lambda: len(s.waiters("slow")) == 1)
    workers = [children(_WORKS), children(_WORKS_IN_TASKS)]
    for worker in workers:
        worker.expect("works")

    def count(worker: Any) -> int:
        worker.tell("count")
        return int(worker.hear())

    def all_work() -> None:
        for worker in workers:
            so_far = count(worker)
            wait_until(lambda: count(worker) > so_far + 5, timeout=60)

    all_work()
    for version in (next_version, edition("0.1.2").become_the_next()):
        assert install_by("python", version, dsn) is None
        all_work()
    assert s.all("select position from pglimits.waiters where name = 'line' order by 1") == [(1,), (2,), (3,), (4,)]
    # In order, by a client of the new version, then by those of the old.
    assert s.release(first_in_line)
    fences = []
    for child in line:
        fences.append(int(child.hear()))
        child.tell()
        child.expect("done")
        child.end()
    last = in_sql.result(60)
    assert last.status == "granted"
    assert [*fences, last.fence] == sorted([*fences, last.fence])
    assert s.release(last.granted_lease_id)
    s.update("slow", slot_decay_per_second=1000)
    sleeper.expect("its turn")
    sleeper.end()
    for worker in workers:
        worker.tell("stop")
        worker.hear()
        worker.expect("done")
        worker.end()
    assert s.value("select sum(held) + sum(waiting) from pglimits.limits") == 0
    check_consistent(s)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_client_of_an_older_or_newer_version_that_fits_is_served(
    dsn: str, s: Session, kind: str, next_version: Edition, install_by: Installs, monkeypatch: pytest.MonkeyPatch
) -> None:
    s.create("database", 1)
    database: Any = importlib.import_module("pglimits._database")
    monkeypatch.setattr(database, "__version__", "0.1.7")
    with open_api(kind, dsn=dsn) as api:  # a new client on what is there
        assert api.release(api.acquire("database"))
    monkeypatch.setattr(database, "__version__", __version__)
    assert install_by("python", next_version, dsn) is None
    with open_api(kind, dsn=dsn) as api:  # an old one on what came
        assert api.release(api.acquire("database"))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_that_an_upgrade_overtakes_is_made_again(
    dsn: str, s: Session, kind: str, connect: Any, wait_until: WaitUntil
) -> None:
    s.create("database", 2, max_waiters=5)
    with open_api(kind, dsn=dsn) as api:
        assert api.release(api.acquire("database"))
        upgrade = Session(connect())
        source = upgrade.value("select pg_get_functiondef(p.oid) from pg_proc p where p.proname = 'acquire_alike'")
        with upgrade.transaction():
            upgrade.run("lock table pglimits.configs in access exclusive mode")
            call = api.start("acquire", "database")  # begins with the function that is there now
            blocked = "select count(*) > 0 from pg_locks where relation = 'pglimits.configs'::regclass and not granted"
            wait_until(lambda: s.value(blocked))
            upgrade.run("alter function pglimits._answer_many(jsonb) rename to _answer_each")
            upgrade.run(source.replace("_answer_many", "_answer_each"))
        assert api.release(call.result(60))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_client_that_is_too_new_is_told_to_upgrade(dsn: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pglimits._database.__version__", "0.2.0")
    with (
        open_api(kind, dsn=dsn) as api,
        pytest.raises(VersionMismatch, match=f"has pglimits {__version__}, this is 0.2.0: run pglimits upgrade"),
    ):
        api.acquire("database")


_OTHER_ARGUMENT = {
    "for_rate boolean default false,\n  durable": "at_what integer default 0,\n  durable",
    "jsonb, boolean, text, boolean, boolean, interval)": "jsonb, boolean, text, integer, boolean, interval)",
    "  if for_rate then": "  if at_what > 0 then", "when for_rate is null": "when at_what is null",
    "'for_rate', for_rate": "'for_rate', at_what > 0",
}  # fmt: skip
_OTHER_RESULT = {"patience interval default null)\nreturns jsonb": "patience interval default null)\nreturns json"}


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("change", [_OTHER_ARGUMENT, _OTHER_RESULT], ids=["argument", "result"])
def test_a_client_that_is_too_old_for_what_it_calls_is_told_to_upgrade_itself_and_goes_on_with_the_rest(
    dsn: str, s: Session, kind: str, change: dict[str, str], edition: Editions, install_by: Installs
) -> None:
    s.create("database", 2)
    other = edition("0.2.0")
    for old, new in change.items():
        other.edit("functions/040_acquire.sql", old, new)
    other.add("migrations/0002_other.sql", "drop function if exists pglimits.acquire_alike;")
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
