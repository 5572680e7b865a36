"""What a role may not do, it cannot: neither by what it passes, nor by what it plants, nor by its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails, member

TYPES = ("uuid", "text", "timestamptz", "jsonb", "record", "tid", "name", "regprocedure")
"""What SQL looks up by name, and so first where the session says."""


@contextmanager
def attacker(db: Db, role: str | None = "pglimits_user") -> Iterator[Session]:
    """A session of a role that is a member of nothing but that, and that has really logged in."""
    member(db, role, "attacker").connection.close()
    dsn = make_conninfo(db.main.connection.info.dsn, user="attacker")
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            yield Session(connection)
    finally:
        db.main.run("drop owned by attacker cascade; drop role attacker")


def plant(session: Session, schema: str) -> None:
    """Types under the names of those that functions use, which report as whom they were looked at."""
    for name in TYPES:
        if name == "record":
            session.run(f"create type {schema}.record as (planted int)")
            continue
        session.run(
            f"create function {schema}.looks_at_{name}(pg_catalog.{name}) returns boolean language plpgsql"
            f" as $$ begin raise notice '{name}: led astray as %', current_user; return true; end $$"
        )
        session.run(f"create domain {schema}.{name} as pg_catalog.{name} check ({schema}.looks_at_{name}(value))")


ONE, TWO = (f"00000000-0000-0000-0000-00000000000{n}" for n in (1, 2))
CALLS = (
    f"select pglimits.acquire('database', holder => '{{}}', lease_id => '{ONE}')",
    "select pglimits.acquire_all(array['database', 'api'], timeout_seconds => null)",
    f"select pglimits.acquire('database', lease_id => '{TWO}', timeout_seconds => null)",
    "select pglimits.rate_limit('api', timeout_seconds => null, channel => 'pglimits_a')",
    "select pglimits.rate_limit_all(array['api', 'api'], timeout_seconds => null)",
    "select pglimits._acquire_batch('{database}', '{1}', '{\"\"}', false, 0, 300, 0,"
    " array[gen_random_uuid(), gen_random_uuid()], '[{}, {}]', false, false, null)",
    "select pglimits.peek('api'), pglimits.peek_all(array['database', 'api'])",
    "select pglimits._beat('pglimits_a'), pglimits._locked_by(array['database'], array[''])",
    f"select pglimits._watch(array['{TWO}']::pg_catalog.uuid[], false)",
    f"select pglimits.renew('{ONE}'), pglimits.renew_all('{{{ONE}}}')",
    f"select pglimits.release('{ONE}'), pglimits.release_all('{{{ONE}}}')",
    "select pglimits._release_batch(array[gen_random_uuid()])",
    "select pglimits.create_limit('new', 1)",
    "select pglimits.update_limit('new', 2, new_name => 'newer')",
    "select pglimits.adjust('api', -1)",
    "select pglimits.reset('database')",
    "select pglimits.sweep(idle_seconds => 0)",
    "select pglimits.delete_limit('newer')",
    "select pglimits.reset('api')",
    "call pglimits.acquire_wait('database')",
    "call pglimits.acquire_wait('database', timeout_seconds => 0.05)",
    "call pglimits.rate_limit_wait('api')",
    "call pglimits.release_wait(gen_random_uuid())",
)


@pytest.mark.parametrize("schema", ["pg_temp", "own"])
def test_types_planted_by_the_caller_are_never_looked_at_as_another(db: Db, s: Session, schema: str) -> None:
    """Names of types are looked up in pg_temp before all else, unless a search_path puts it last."""
    s.create("database", 1)
    s.create("api", 5, 1)
    s.run("create schema own; grant all on schema own to public")
    with attacker(db, "pglimits_admin") as session:
        session.run("create temp table configs ()")
        plant(session, schema)
        session.run(f"set search_path = {schema}, pg_catalog")
        for call in CALLS:
            session.run(call)
        assert [notice for notice in session.notices if "led astray" in notice] == []
    db.consistent()


ROLES: dict[str | None, set[str]] = {
    None: set(),
    "pglimits_user": {"use"},
    "pglimits_reader": {"look"},
    "pglimits_admin": {"use", "look", "change"},
}
TABLES = ("meta", "configs", "known_keys", "states", "leases", "queue", "processes")
ATTACKS = {
    "use": [
        "select * from pglimits._watch(array[gen_random_uuid()], false)",
        "select pglimits.peek('database')",
    ],
    "look": [f"select * from pglimits.{view}" for view in ("limits", "keys", "holders", "waiters")],
    "change": ["select pglimits.update_limit('database', description => 'x')", "select pglimits.adjust('api', 1)"],
    "nobody": [
        *(f"select * from pglimits.{table}" for table in TABLES),
        *(f"lock table pglimits.{table} in access share mode" for table in ("configs", "states", "leases")),
        *(f"copy pglimits.{table} to stdout" for table in ("leases", "queue")),
        *(f"explain analyze select * from pglimits.{table}" for table in ("leases", "queue")),
        "update pglimits.limits set active = false",
        "delete from pglimits.holders",
        "insert into pglimits.leases select * from pglimits.leases",
        "truncate pglimits.queue",
        "create table pglimits.mine ()",
        "create function pglimits._now() returns int language sql as 'select 1'",
        "create or replace function pglimits.version() returns text language sql as $$ select '1' $$",
        "create or replace view pglimits.holders as select 1",
        "create trigger t before insert on pglimits.leases execute function suppress_redundant_updates_trigger()",
        "create rule r as on select to pglimits.holders do instead select 1",
        "create policy p on pglimits.leases",
        "create index on pglimits.leases (holder)",
        "create statistics pglimits.s on slots, fence from pglimits.leases",
        "alter function pglimits.release(uuid) set search_path = public",
        "alter function pglimits.release(uuid) owner to current_user",
        "alter type pglimits.acquired add attribute mine int",
        "alter table pglimits.leases disable row level security",
        "alter schema pglimits rename to mine",
        "alter default privileges in schema pglimits grant all on tables to attacker; drop schema pglimits cascade",
        "comment on function pglimits.release(uuid) is 'mine'",
        "grant select on pglimits.leases to attacker",
        "grant pglimits_admin to attacker",
        "grant execute on all routines in schema pglimits to attacker; select pglimits._fail('x', 'y')",
        "create temp table mine (lease pglimits.leases); select pglimits._unused(1, '')",
        "create cast (uuid as pglimits._outcome) with inout",
        "do $$ begin perform pglimits._now(), pglimits._bury(null, null); end $$",
        "do $$ begin delete from pglimits.leases; end $$",
        "select pglimits._release(array[gen_random_uuid()], true)",
        "select pglimits._take_expired(null, 'infinity')",
        "select pglimits._claim(array[gen_random_uuid()], now())",
        "select * from pglimits._uses",
        "select nextval('pglimits.configs_limit_id_seq')",
        "select pglimits._tell('pglimits_a', null)",
        "select pglimits._is_known(array[gen_random_uuid()])",
        "select pglimits._send_away(null)",
        "select pglimits._cron_job()",
        "select pg_get_expr(c.relpartbound, 0), l.* from pg_class c, pglimits.leases l",
        "select most_common_vals from pg_statistic",
        "select pg_read_file('postgresql.conf')",
        "select * from pg_logical_slot_peek_changes('x', null, null)",
        "set session_replication_role = replica",
        "set role pglimits_owner",
        "set session authorization postgres; select * from pglimits.leases",
        "begin; set local row_security = off; select * from pglimits.leases",
    ],
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_a_role_cannot_do_what_it_is_not_for_in_any_way(db: Db, s: Session, role: str | None) -> None:
    s.create("database", 1)
    s.create("api", 5, 1)
    lease_id = s.acquire("database", holder={"secret": "holder of another"}).lease_id
    s.queue("database")
    s.run("analyze pglimits.leases, pglimits.queue, pglimits.configs")
    s.run("revoke create on schema public from public")
    with attacker(db, role) as session:
        for kind, statements in ATTACKS.items():
            for statement in statements:
                if kind in ROLES[role]:
                    session.run(statement)
                else:
                    with changes_nothing(s), pytest.raises(psycopg.Error) as caught:
                        try:
                            session.run(statement)
                        finally:
                            session.run("rollback")
                    assert "holder of another" not in str(caught.value), statement
        assert session.value("select current_user::text") == "attacker"
    assert [held.lease_id for held in s.holders()] == [lease_id]


def test_statistics_and_plans_tell_a_user_nothing_of_the_leases(db: Db, s: Session) -> None:
    s.create("database", 5)
    s.acquire("database", holder={"secret": 1})
    s.run("analyze pglimits.leases")
    with attacker(db) as session:
        assert session.all("select * from pg_stats where schemaname = 'pglimits'") == []
        session.run("set client_min_messages = debug5")
        session.run("set debug_print_plan = on; set debug_print_rewritten = on")
        plan = "\n".join(row[0] for row in session.all("explain (verbose, analyze) select pglimits.peek('database')"))
        assert "leases" not in plan
        assert not any("secret" in notice for notice in session.notices)


def test_what_another_has_is_neither_told_nor_ended_by_who_does_not_know_its_id(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.create("api", 1, 1)
    held = s.acquire("database", holder={"secret": 1}, key="of another").lease_id
    waiting = s.queue("database", holder={"secret": 2}, key="of another")
    s.rate_limit("api", key="of another")
    asleep = s.rate_limit("api", timeout_seconds=FOREVER, key="of another").lease_id
    many = "array(select gen_random_uuid() from generate_series(1, 1000))"
    with attacker(db) as session:
        told: list[str] = []
        for ask in (
            "select pglimits.acquire('database', key => 'of another')",
            "select pglimits.acquire('database', key => 'of another', timeout_seconds => null)",
            "select pglimits.rate_limit('api', key => 'of another')",
            "select pglimits.peek('database', key => 'of another')",
            "select pglimits._watch(array[gen_random_uuid(), '00000000-0000-0000-0000-000000000000'], false)",
            f"select pglimits.release_all({many})", f"select pglimits.renew_all({many})",
            f"select pglimits._release_batch({many})", f"select * from pglimits._watch({many}, true)",
        ):  # fmt: skip
            told += [str(row) for row in session.all(ask)]
        for wrong in ("slots => 0", "key => repeat('x', 201)", "slots => 2", "channel => 'x'", "lease_duration => 0"):
            with pytest.raises(psycopg.Error) as caught:
                session.run(f"select pglimits.acquire('database', {wrong})")
            diag = caught.value.diag
            told += [str(getattr(diag, part)) for part in dir(diag) if part[0] != "_"]
        text = "\n".join([*told, *session.notices])
        assert "secret" not in text
        assert not any(str(lease_id) in text for lease_id in (held, waiting, asleep))
    assert [row.lease_id for row in s.holders()] == [held]
    assert {row.lease_id for row in s.waiters()} >= {waiting, asleep}
    db.consistent()


def test_the_id_of_another_is_no_way_onto_another_limit_or_to_more_slots(db: Db, s: Session) -> None:
    """Who was told an id can end it or repeat the call that it came from; it gets nothing that was not granted."""
    s.create("database", 5)
    s.create("other", 5)
    s.create("api", 5, 1)
    held = s.acquire("database").lease_id
    s.acquire("other", slots=5)
    waiting = s.queue("other")
    with attacker(db) as session:
        for lease_id in (held, waiting):
            for ask in (
                "acquire('database', slots => 2, lease_id => %s, timeout_seconds => null)",
                "acquire('database', key => 'k', lease_id => %s)",
                "acquire_all(array['database', 'api'], slots => array[2, 1], lease_id => %s)",
                "rate_limit('api', timeout_seconds => null, lease_id => %s)",
                "_acquire_batch('{other}', '{2}', '{\"\"}', false, null, 300, 0, array[%s], '[{}]', true, false, null)",
            ):
                with changes_nothing(s), fails("PL001", "lease_id"):
                    session.run(f"select pglimits.{ask}", lease_id)
    db.consistent()


HOSTILE_SETTINGS = {
    "standard_conforming_strings": "off", "escape_string_warning": "off", "backslash_quote": "off",
    "array_nulls": "off", "transform_null_equals": "on",
    "timezone": "'America/Caracas'", "extra_float_digits": "-15", "bytea_output": "escape", "xmloption": "document",
    "quote_all_identifiers": "on", "row_security": "off", "search_path": "pg_temp, own, pg_catalog",
    "plan_cache_mode": "force_custom_plan", "enable_indexscan": "off", "enable_indexonlyscan": "off",
    "enable_seqscan": "on", "enable_sort": "off", "enable_hashjoin": "off", "enable_nestloop": "off",
    "enable_mergejoin": "off", "enable_hashagg": "off", "enable_material": "off", "join_collapse_limit": "1",
    "from_collapse_limit": "1", "geqo_threshold": "2", "jit": "on", "jit_above_cost": "0", "work_mem": "'64kB'",
    "lock_timeout": "'10min'", "idle_in_transaction_session_timeout": "0", "synchronous_commit": "off",
    "default_transaction_isolation": "serializable", "default_transaction_deferrable": "on",
    "check_function_bodies": "off",
    "client_min_messages": "error", "lc_monetary": "'C'", "constraint_exclusion": "on", "cursor_tuple_fraction": "0",
    "default_tablespace": "''", "max_parallel_workers_per_gather": "8", "parallel_setup_cost": "0",
    "parallel_tuple_cost": "0", "min_parallel_table_scan_size": "0", "statement_timeout": "'1min'",
}  # fmt: skip


def test_no_setting_of_a_session_changes_what_it_is_answered(db: Db, s: Session) -> None:
    s.run("create schema own; grant all on schema own to public")
    with attacker(db, "pglimits_admin") as session:
        for setting, value in HOSTILE_SETTINGS.items():
            database, api = s.create(setting, 2), s.create(f"{setting} api", 2, 0.001)
            session.run(f"set {setting} = {value}")
            first = session.acquire(database, holder={"a": "\\ '"})
            assert first.status == "granted"
            assert session.acquire([database, api]).status == "granted"
            assert session.acquire(database).status == "refused"
            waiter = session.queue(database, timeout_seconds=9.5, lease_duration=90)
            assert session.rate_limit(api).status == "granted"
            assert session.rate_limit(api).status == "refused"
            for bad in ("e'a\\nb'", "'a' || chr(133)", "'a/b'"):
                with fails("PL001", "name"):
                    session.run(f"select pglimits.acquire({bad})")
            assert session.renew(first.lease_id, 86400) is True
            assert session.release(first.lease_id) is True
            with session.transaction("isolation level read committed"):
                session.update(database, limit=3)
            session.sweep(0)
            assert waiter in [row.lease_id for row in s.holders(database)]
            session.run(f"reset {setting}")
    db.consistent()


@pytest.mark.parametrize(
    "channel",
    ["pglimits_a'; drop schema pglimits; --", 'pglimits_"', "pglimits_a\n", "news", "pglimits_" + "a" * 41, ""],
)
def test_a_channel_is_one_of_pglimits_or_an_error(db: Db, s: Session, channel: str) -> None:
    s.create("database", 1)
    s.acquire("database")
    with attacker(db) as session, changes_nothing(s), fails("PL001", "channel"):
        session.acquire("database", timeout_seconds=FOREVER, channel=channel)


def test_a_channel_of_another_gets_hints_and_nothing_that_anybody_believes(db: Db, s: Session) -> None:
    s.create("database", 1)
    mine = s.acquire("database").lease_id
    with attacker(db) as session:
        theirs = session.queue("database", channel="pglimits_ofanother")
        listener = db.session()
        listener.run("listen pglimits_ofanother")
        assert s.release(mine)
        told = [hint.payload for hint in listener.connection.notifies(timeout=20, stop_after=1)]
        assert [payload.split()[0] for payload in told] == [str(theirs)]
        # What it says is of the sender's own request.
        assert [row.lease_id for row in s.holders()] == [theirs]


def test_a_long_queue_is_bounded_by_max_waiters_and_dies_with_who_made_it(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1, max_waiters=3)
    s.create("api", 1, 0.001, max_waiters=3)
    s.acquire("database")
    s.rate_limit("api")
    with attacker(db) as session:
        for kind in ("database", "api"):
            ask = session.acquire if kind == "database" else session.rate_limit
            for _ in range(3):
                assert ask(kind, timeout_seconds=FOREVER).status == "queued"
            with changes_nothing(s), fails("PL006", kind):
                ask(kind, timeout_seconds=FOREVER)
    clock.advance(11)
    assert s.acquire("database", timeout_seconds=FOREVER).status == "queued"
    assert s.rate_limit("api", timeout_seconds=FOREVER).status == "queued"
    db.consistent()


def test_keys_that_were_used_once_leave_nothing_after_a_sweep(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    s.create("api", 1, 1)
    s.create("shut", 0)
    with attacker(db) as session:
        session.run("select pglimits.release((pglimits.acquire('database', key => k::text)).lease_id)"
                    " from generate_series(1, 200) k")  # fmt: skip
        session.run("select pglimits.rate_limit('api', key => k::text) from generate_series(1, 200) k")
        before = s.value("select count(*) from pglimits.known_keys")
        session.run("select pglimits.acquire('shut', key => k::text) from generate_series(1, 200) k")
        session.run("select pglimits.peek('database', key => 'new ' || k) from generate_series(1, 200) k")
        assert s.value("select count(*) from pglimits.known_keys") == before == 400
    clock.advance(3601)
    assert s.sweep().keys == 400
    assert s.all("select from pglimits.known_keys") == s.all("select from pglimits.states") == []
