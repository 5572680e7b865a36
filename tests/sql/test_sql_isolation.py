"""Calls from every kind of transaction and place: each has a defined outcome, and none lets too many in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqltest import FOREVER, Db, Session, check_consistent, fails

from pglimits import _install
from pglimits._embedded import Binaries, throwaway

COMMITTED = "read committed"
LEVELS = [COMMITTED, "repeatable read", "serializable"]
SNAPSHOTS = LEVELS[1:]

LEASE, HOLDER, WAITER, NEW, NEWER, USED = (f"00000000-0000-0000-0000-00000000000{n}" for n in range(1, 7))
CHANNEL = "pglimits_isolation"

CALLS = {
    "acquire": ("select status from pglimits.acquire('free')", "granted"),
    "acquire several": ("select status from pglimits.acquire_all(array['free', 'other'])", "granted"),
    "join a queue": (
        f"select status from pglimits.acquire('full', timeout_seconds => null, lease_id => '{NEW}')", "queued",
    ),
    "refused": ("select status from pglimits.acquire('full')", "refused"),
    "rate_limit": ("select status from pglimits.rate_limit('rate')", "granted"),
    "stand in line": ("select status from pglimits.rate_limit('rate', 9, timeout_seconds => null)", "queued"),
    "_acquire_batch": (
        f"select status from pglimits._acquire_batch('{{free}}', '{{1}}', '{{\"\"}}', false, 0, 300, 0,"
        f" '{{{NEW},{NEWER}}}', '[null,null]', false, false, null)", "granted",
    ),
    "renew": (f"select pglimits.renew('{LEASE}')::text", "true"),
    "release": (f"select pglimits.release('{LEASE}')::text", "true"),
    "hand over": (f"select pglimits.release('{HOLDER}')::text", "true"),
    "leave a queue": (f"select pglimits.release('{WAITER}')::text", "true"),
    "_release_batch": (f"select pglimits._release_batch('{{{LEASE},{HOLDER}}}')::text", "{}"),
    "_watch": (f"select status from pglimits._watch('{{{WAITER}}}', false)", "queued"),
    "peek": ("select status from pglimits.peek('free')", "granted"),
    "settle": (f"select pglimits.settle('{USED}', 'rate', 2)::text", "true"),
    "adjust": ("select (round(pglimits.adjust('rate', 2)) > 1)::text", "true"),
    "sweep": ("select leases::text from pglimits.sweep()", "0"),
}  # fmt: skip
IN_READ_COMMITTED = {**CALLS, "update_limit": ("select pglimits.update_limit('full', 2)::text", "")}
MEET_ALL_KEYS = {
    "update_limit": "select pglimits.update_limit('full', 2)",
    "delete_limit": "select pglimits.delete_limit('full')",
    "reset": "select pglimits.reset('full')",
    "reset one key": "select pglimits.reset('full', '')",
    "apply": """select pglimits._apply('{"limits": [{"name": "full", "action": "update",
      "old": {"limit": 1, "slot_decay_per_second": 0, "active": true},
      "new": {"limit": 2, "slot_decay_per_second": 0, "active": true}}]}')""",
}
"""A snapshot does not show the keys that were used first since."""

PLACES = {
    "a statement": "{call}",
    "a cursor": "declare c cursor for {call}; fetch all from c",
    "do": "do $do$ begin insert into said {call}; end $do$; table said",
    "a function": "create function f() returns void language plpgsql as $f$ begin insert into said {call}; end $f$;"
    " select f(); table said",
    "a function that goes on after an error": "create function f() returns void language plpgsql as $f$ begin"
    " insert into said {call}; begin perform 1 / 0; exception when division_by_zero then null; end; end $f$;"
    " select f(); table said",
    "a block with an exception clause": "do $do$ begin insert into said {call};"
    " exception when division_by_zero then null; end $do$; table said",
    "a before trigger": "create trigger t before insert on t for each row execute function on_t();"
    " insert into t values (1); table said",
    "an after trigger": "create trigger t after insert on t for each row execute function on_t();"
    " insert into t values (1); table said",
    "a deferred trigger": "create constraint trigger t after insert on t deferrable initially deferred for each row"
    " execute function on_t(); insert into t values (1); set constraints all immediate; table said",
}  # fmt: skip


@pytest.fixture
def world(s: Session) -> Session:
    """A limit with room, a second one, one that is full and waited for, and a rate limit."""
    s.create("free", 3)
    s.create("other", 2)
    s.create("full", 1)
    s.create("rate", 9, 0.001)
    s.acquire("free", lease_id=LEASE)
    s.acquire("other")
    s.acquire("rate", lease_id=USED)
    s.acquire("full", lease_id=HOLDER)
    s.queue("full", lease_id=WAITER, channel=CHANNEL)
    s.run("create table said (what text)")
    s.run("create table t (n integer)")
    return s


def calls(level: str) -> dict[str, tuple[str, str]]:
    return CALLS if level in SNAPSHOTS else IN_READ_COMMITTED


def contents(s: Session) -> dict[str, list[Any]]:
    return {
        table: s.all(f"select to_jsonb(x) from pglimits.{table} x order by to_jsonb(x)")
        for table in ("meta", "configs", "known_keys", "states", "leases", "queue")
    }


def perform(session: Session, place: str, call: str) -> str | None:
    """What a call answers in that place; the last of several."""
    if "trigger" in place:
        session.run(
            "create function on_t() returns trigger language plpgsql as $f$"
            f" begin insert into said {call}; return new; end $f$"
        )
    cursor = session.connection.execute(PLACES[place].format(call=call).encode())
    while cursor.nextset():
        pass
    row = cursor.fetchone()
    return None if row is None else row[0]


@contextmanager
def rolled_back(session: Session, level: str = "") -> Iterator[None]:
    session.run(f"begin isolation level {level}" if level else "begin")
    try:
        yield
    finally:
        session.run("rollback")


@pytest.mark.parametrize("level", LEVELS)
def test_every_call_works_everywhere_and_what_is_rolled_back_has_not_happened(
    world: Session, db: Db, level: str
) -> None:
    session = db.session()
    before = contents(world)
    for place in PLACES:
        world.beat(CHANNEL)  # who waits stays alive, however long this takes
        for call, expected in calls(level).values():
            with rolled_back(session, level):
                assert perform(session, place, call) == expected, (place, call)
                assert contents(world) == before, f"{call} in {place} is seen before its commit"
            assert contents(world) == before, (place, call)


def test_what_has_to_meet_all_keys_of_a_limit_works_in_every_place(world: Session, db: Db) -> None:
    session = db.session()
    before = contents(world)
    for place in PLACES:
        for name, call in MEET_ALL_KEYS.items():
            with rolled_back(session):
                perform(session, place, f"{call}::text")
                assert contents(session) != before, (place, name)
            assert contents(world) == before, (place, name)


@pytest.mark.parametrize("level", SNAPSHOTS)
def test_what_has_to_meet_all_keys_of_a_limit_is_refused_where_a_snapshot_may_not_show_them(
    world: Session, db: Db, level: str
) -> None:
    session = db.session()
    before = contents(world)
    for name, call in MEET_ALL_KEYS.items():
        with rolled_back(session, level), fails("25001", name.split()[0], "read committed", level):
            session.value(call)
        session.run(f"set default_transaction_isolation = '{level}'")
        with fails("25001", name.split()[0]):
            session.value(call)
        session.run("reset default_transaction_isolation")
        assert contents(world) == before, name


@pytest.mark.parametrize("level", LEVELS)
def test_a_savepoint_that_is_rolled_back_takes_everything_back_and_the_transaction_goes_on(
    world: Session, db: Db, level: str
) -> None:
    session = db.session()
    for name, (call, expected) in calls(level).items():
        session.run(f"begin isolation level {level}")
        session.run("create temporary table if not exists work (n int) on commit drop")
        before = contents(session)
        for _ in range(2):
            session.run("savepoint here")
            assert session.value(call) == expected, name
            session.run("rollback to here")
            assert contents(session) == before, name
        session.run("commit")
        assert contents(world) == before, name


@pytest.mark.parametrize("level", LEVELS)
def test_whoever_waits_is_told_when_a_release_commits_and_never_of_one_that_is_rolled_back(
    world: Session, db: Db, level: str
) -> None:
    ear = db.session()
    ear.run(f"listen {CHANNEL}")

    def told() -> list[str]:
        return [notify.payload[:36] for notify in ear.connection.notifies(timeout=0.05)]

    session = db.session()
    session.run(f"begin isolation level {level}")
    session.run("savepoint here")
    assert session.release(HOLDER)
    session.run("rollback to here")
    session.run("commit")
    with rolled_back(session, level):
        assert session.release(HOLDER)
    assert told() == []
    assert world.renew(HOLDER), "it is still held"
    session.run(f"begin isolation level {level}")
    assert session.release(HOLDER)
    assert told() == []
    assert ear.all("select key from pglimits.holders where lease_id = %s", HOLDER), "until the commit"
    session.run("commit")
    assert told() == [WAITER]
    assert ear.watch_one(WAITER).status == "granted"
    check_consistent(world)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_lease_that_was_taken_since_the_snapshot_is_not_seen_and_stays(world: Session, db: Db, level: str) -> None:
    session = db.session()
    session.run(f"begin isolation level {level}")
    session.all("select * from pglimits.limits")
    world.create("newer", 1)
    taken = world.acquire("newer").lease_id
    assert not session.renew(taken)
    assert not session.release(taken)
    session.run("commit")
    assert world.limit("newer").held == 1


@pytest.mark.parametrize("level", LEVELS)
def test_in_a_transaction_that_only_reads_only_what_changes_nothing_works(world: Session, db: Db, level: str) -> None:
    session = db.session()
    before = contents(world)
    for name, (call, expected) in calls(level).items():
        with rolled_back(session, f"{level} read only"):
            if name in ("peek", "refused", "_watch"):
                assert session.value(call) == expected
            else:
                with fails("25006"):
                    session.value(call)
        assert contents(world) == before
    for view in ("limits", "keys", "holders", "waiters"):
        with rolled_back(session, f"{level} read only"):
            assert session.all(f"select * from pglimits.{view}")


CHANGES = {
    "grants": [
        "select pglimits.acquire('free')", "select pglimits.acquire('other')", "select pglimits.rate_limit('rate')",
        "select pglimits.acquire('full', timeout_seconds => null)",
    ],
    "changed limits": [f"select pglimits.update_limit('{name}', 10)" for name in ("free", "other", "full", "rate")],
    "renewals": [f"select pglimits.renew_all('{{{LEASE},{HOLDER}}}')"],
}  # fmt: skip
LOOKS = {"peek", "refused", "renew", "sweep", "_watch"}
UNTOUCHED = {
    "grants": LOOKS,
    "changed limits": LOOKS,
    "renewals": {*CALLS} - {"hand over", "release", "_release_batch", "renew"},
}
"""What works all the same: what only looks, and so may tell what was, and what concerns nothing that was changed."""


@pytest.mark.parametrize("level", SNAPSHOTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_whose_snapshot_is_older_than_a_change_that_concerns_it_fails_to_serialize(
    world: Session, db: Db, level: str, change: str
) -> None:
    sessions = {name: db.session() for name in CALLS}
    for session in sessions.values():
        session.run(f"begin isolation level {level}")
        session.value("select count(*) from pglimits.states")  # here its snapshot is taken
    for statement in CHANGES[change]:
        world.run(statement)
    before = contents(world)
    untouched = set()
    for name, (call, expected) in CALLS.items():
        try:
            assert sessions[name].value(call) == expected, name
            untouched.add(name)
        except psycopg.errors.SerializationFailure:
            pass
        sessions[name].run("rollback")
        assert contents(world) == before, name
    assert untouched == UNTOUCHED[change]


@pytest.mark.parametrize("level", SNAPSHOTS)
def test_an_old_snapshot_does_not_admit_one_too_many(db: Db, s: Session, level: str) -> None:
    s.create("database", 1)
    s.serves("database", 1, key="used before")
    s.release(s.holders()[0].lease_id)
    for key in ("used before", "first used now"):
        other = db.session()
        other.run(f"begin isolation level {level}")
        other.value("select count(*) from pglimits.states")  # here its snapshot is taken
        assert s.release(s.acquire("database", key=key).lease_id)
        assert s.acquire("database", key=key).status == "granted"
        try:
            status = other.acquire("database", key=key).status
            other.run("commit")
        except psycopg.errors.SerializationFailure:
            other.run("rollback")
            status = "refused"
        assert status == "refused", key
        assert s.value("select sum(slots) from pglimits.leases where key = %s", key) == 1
        check_consistent(s)


@pytest.mark.parametrize("level", SNAPSHOTS)
def test_an_old_snapshot_does_not_admit_by_what_the_limit_was(db: Db, s: Session, level: str) -> None:
    s.create("database", 2)
    assert s.acquire("database").status == "granted"
    changing = db.session()
    changing.run("begin")
    changing.update("database", limit=1)

    def ask(session: Session) -> Any:
        session.run(f"set default_transaction_isolation = '{level}'")
        return session.acquire("database", timeout_seconds=FOREVER)

    asked, other = db.start_blocked(ask)
    changing.run("commit")
    with pytest.raises(psycopg.errors.SerializationFailure):
        asked.result(timeout=20)
    assert other.acquire("database").status == "refused"


@pytest.mark.parametrize("level", SNAPSHOTS)
def test_an_old_snapshot_does_not_take_a_lease_out_that_was_renewed_since(db: Db, s: Session, level: str) -> None:
    s.create("database", 1)
    lease = s.acquire("database", lease_duration=1)
    sessions = {
        call: db.session()
        for call in ("acquire('database')", "acquire('database', timeout_seconds => null)", "sweep()")
    }
    for other in sessions.values():
        other.run(f"begin isolation level {level}")
        other.value("select count(*) from pglimits.states")
    assert s.renew(lease.lease_id, 3600)
    db.wait_until(lambda: s.value("select clock_timestamp() > %s", lease.expires_at))
    for call, other in sessions.items():
        with fails("40001"):
            other.run(f"select * from pglimits.{call}")
        other.run("rollback")
    assert s.limit("database").held == 1
    assert s.renew(lease.lease_id)


@pytest.mark.parametrize("level", SNAPSHOTS)
def test_a_limit_that_was_created_or_activated_after_the_snapshot_is_not_enforced_in_it(
    db: Db, s: Session, level: str
) -> None:
    s.create("off", 0, active=False)
    other = db.session()
    with rolled_back(other, level):
        other.value("select count(*) from pglimits.states")
        s.create("new", 0)
        s.update("off", active=True)
        for name in ("new", "off"):
            assert other.acquire(name).status == "unlimited"
            assert s.acquire(name).status == "refused"
    for name in ("new", "off"):
        assert other.acquire(name).status == "refused"


@pytest.mark.parametrize("level", LEVELS)
def test_many_calls_of_one_statement_take_no_more_than_there_is(db: Db, s: Session, level: str) -> None:
    s.create("database", 7)
    s.create("api", 5, 0.000001)
    session = db.session()
    session.run(f"set default_transaction_isolation = '{level}'")
    for call, granted in (("acquire('database')", 7), ("rate_limit('api')", 5)):
        found = session.all(f"select (pglimits.{call}).status, count(*) from generate_series(1, 20) group by 1")
        assert dict(found) == {"granted": granted, "refused": 20 - granted}, call
    assert s.limit("database").held == 7
    assert session.value(
        "select count(*) from (select pglimits.release(h.lease_id) as gone from pglimits.holders h) x where gone"
    ) == 7  # fmt: skip
    check_consistent(s)


def test_whatever_transactions_call_side_by_side_there_are_never_too_many_and_fences_grow(db: Db, s: Session) -> None:
    s.create("database", 3)
    s.create("api", 20, 5)
    s.run("create table granted (fence bigint); create table passed (at timestamptz default clock_timestamp())")
    began = time.monotonic()
    until = began + 2
    most = []

    def caller(nth: int) -> Any:
        level, how = LEVELS[nth % 3], nth % 4

        def work(session: Session) -> int:
            session.run(f"set default_transaction_isolation = '{level}'")
            rounds = 0
            while time.monotonic() < until:
                try:
                    rounds += once(session, how)
                except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
                    session.run("rollback")
                most.append(session.limit("database").held)
            return rounds

        return work

    def once(session: Session, how: int) -> int:
        session.run("begin")
        if session.rate_limit("api").status == "granted":
            session.run("insert into passed default values")
        lease = session.acquire("database")
        if how == 1 and lease.status == "granted":
            session.run("savepoint here")
            session.acquire("database")
            session.release(lease.lease_id)
            session.run("rollback to here")
        if lease.status == "granted":
            session.run("insert into granted (fence) values (%s)", lease.fence)
        if how == 2:
            session.run("rollback")
            return 0
        session.run("commit")
        while lease.status == "granted":
            try:
                assert session.release(lease.lease_id)
                return 1
            except psycopg.errors.SerializationFailure:
                pass
        return 0

    assert sum(db.together([caller(nth) for nth in range(8)])) > 0
    assert max(most) <= 3
    assert s.limit("database").held == 0
    fences = [row.fence for row in s.all("select fence from granted order by fence")]
    assert len(fences) == len(set(fences)) > 0
    assert 20 <= s.value("select count(*) from passed") <= 20 + 5 * (time.monotonic() - began)
    check_consistent(s)


@pytest.mark.parametrize("level", LEVELS)
def test_a_procedure_that_commits_between_the_calls_and_one_that_waits_work_outside_of_transactions_only(
    db: Db, s: Session, level: str
) -> None:
    s.create("database", 1)
    s.create("api", 5, 1)
    session = db.session()
    session.run(f"set default_transaction_isolation = '{level}'")
    session.run(
        "create procedure job(inout told text default '') language plpgsql as $f$"
        " declare taken pglimits.acquired; answer text; id uuid; fence bigint; ends timestamptz;"
        " again float8; done boolean; begin"
        " for n in 1 .. 3 loop taken := pglimits.acquire('database'); commit;"
        " told := told || taken.status; perform pglimits.release(taken.lease_id); commit; end loop;"
        " call pglimits.acquire_wait('database', lease_id => id, status => answer, fence => fence, expires_at => ends,"
        " retry_after => again); told := told || answer; commit; call pglimits.release_wait(id, done); id := null;"
        " call pglimits.rate_limit_wait('api', lease_id => id, status => answer, retry_after => again);"
        " told := told || answer; end $f$"
    )
    assert session.value("call job()") == "granted" * 5
    assert s.limit("database").held == 0
    before = contents(s)
    for call, code in (
        ("pglimits.acquire_wait('database')", "PL010"), ("pglimits.rate_limit_wait('api')", "PL010"),
        (f"pglimits.release_wait('{NEW}')", "PL010"), ("job()", "2D000"),
    ):  # fmt: skip
        session.run("begin")
        with fails(code):
            session.run(f"call {call}")
        session.run("rollback")
        assert contents(s) == before, call


def test_in_a_parallel_worker_a_call_that_changes_something_fails_and_changes_nothing(world: Session, db: Db) -> None:
    session = db.session()
    session.run("insert into t select n from generate_series(1, 1000) n; analyze t")
    setting = "debug_parallel_query" if session.connection.info.server_version >= 160000 else "force_parallel_mode"
    session.run(f"set {setting} = on; set parallel_setup_cost = 0; set min_parallel_table_scan_size = 0")
    before = contents(world)
    for name in ("acquire", "join a queue", "rate_limit", "renew", "release", "adjust", "update_limit"):
        # Ours say that they are not safe there; somebody says it of his own.
        session.run(
            "create or replace function f() returns text language plpgsql parallel safe as"
            f" $f$ begin return ({IN_READ_COMMITTED[name][0]}); end $f$"
        )
        with pytest.raises(psycopg.Error) as caught:
            session.all("select f() from t limit 1")
        assert caught.value.sqlstate in ("25000", "XX000"), caught.value
        assert contents(world) == before, name
    assert session.value("select distinct (pglimits.peek('free')).status from t") == "granted"


@pytest.mark.parametrize("how", ["at its first use", "in a subtransaction", "at once", "to change it"])
def test_who_keeps_a_limit_locked_is_told_to_who_waits_in_vain_and_no_victim_is(db: Db, s: Session, how: str) -> None:
    s.create("database", 2)
    if how != "at its first use":
        s.release(s.acquire("database").lease_id)
    other, victim = (db.session(application_name=name) for name in ("nightly", "victim"))
    with rolled_back(other):
        if how == "to change it":
            other.update("database", limit=3)
        else:
            other.acquire("database", priority=int(how == "in a subtransaction"))
        waits, _ = db.start(lambda session: session.acquire("database", timeout_seconds=60), victim)
        db.wait_until(lambda: db.blocked(victim.pid))
        with pytest.raises(psycopg.Error) as caught:
            s.acquire("database", timeout_seconds=0.01)
        assert caught.value.sqlstate == "PL009"
        said = caught.value.diag.message_primary or ""
        assert f"'database' locked in an open transaction: session {other.pid} of " in said
        assert "nightly" in said and "victim" not in said
    assert waits.result(60).status == "granted"


def test_a_prepared_transaction_holds_what_it_took_until_it_is_decided_and_may_not_have_told_anybody(
    server: Any,
) -> None:
    binaries, settings = Binaries(server.bin, server.version), {"max_prepared_transactions": "5"}
    with throwaway(binaries=binaries, settings=settings) as cluster:
        _install.install(cluster.dsn)
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            s = Session(connection)
            s.create("database", 1)
            for level in LEVELS:
                for end in ("rollback", "commit"):
                    s.run(f"begin isolation level {level}")
                    assert s.acquire("database", lease_id=NEW).status == "granted"
                    s.run("prepare transaction 'one'")
                    assert s.holders() == []
                    s.run("set lock_timeout = '10ms'")
                    with fails("PL009", "database", "a prepared transaction"):
                        s.acquire("database")
                    s.run("reset lock_timeout")
                    s.run(f"{end} prepared 'one'")
                    assert len(s.holders()) == (end == "commit")
                s.queue("database", lease_id=WAITER, channel=CHANNEL)
                s.run(f"begin isolation level {level}")
                assert s.release(NEW)
                with fails("0A000"):
                    s.run("prepare transaction 'two'")
                assert [str(holder.lease_id) for holder in s.holders()] == [NEW]
                assert s.release(WAITER) and s.release(NEW)
            check_consistent(s)
