"""Hygiene that a query can check is checked by a query."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import psycopg
import pytest
from installtest import SQL
from sqltest import FOREVER, Db, Session, fails, member

USE = {
    "acquire", "acquire_all", "acquire_wait", "rate_limit", "rate_limit_all", "rate_limit_wait", "renew", "renew_all",
    "release", "release_all", "release_wait", "settle", "settle_all", "peek", "peek_all", "version", "errors",
}  # fmt: skip
CHANGE = {
    "create_limit", "update_limit", "delete_limit", "adjust", "reset", "force_release", "sweep", "keep_history",
    "cron_enable", "cron_disable",
}  # fmt: skip
FILES = {"_apply", "_limit_faults"}
"""What the command line calls for limits in a file."""
READ = {"history", "sparklines", "why_waiting", "last_sweep"}
WRAPPER = {"_acquire_batch", "_release_batch", "_taken", "_watch", "_beat", "_locked_by"}
PROCEDURES = {"acquire_wait", "rate_limit_wait", "release_wait", "_wait", "_refuse_transaction"}
QUALIFIED = {"_can_commit", "_remaining", "_flush"}
"""They run as whoever calls them, and name nothing that a search_path could change."""
OF_PROCEDURES = {"_wait", "_refuse_transaction", "_sleep", "_stay", "_cannot_commit"} | QUALIFIED
"""What the procedures call, which run as whoever calls them."""
OF_VIEWS = {
    "_now", "_decayed", "_as_holder", "_ended_slots", "_ended_slot_seconds", "_slot_seconds", "_sum_waits",
    "_dead_waiters",
}  # fmt: skip
GRANTED = {
    "pglimits_user": USE | WRAPPER | OF_PROCEDURES,
    "pglimits_reader": {"version", "errors"} | OF_VIEWS | READ | {"_limit_faults"},
    "pglimits_admin": USE | WRAPPER | OF_PROCEDURES | OF_VIEWS | CHANGE | READ | FILES,
}
VIEWS = {"limits", "keys", "holders", "waiters", "counters", "events"}
TABLES = {
    "meta", "configs", "known_keys", "states", "leases", "queue", "processes", "event_log", "samples", "upkeep",
}  # fmt: skip


def routines(s: Session) -> list[Any]:
    return s.all(
        """
        select p.oid::regprocedure::text as signature, p.proname as name, p.prokind as kind, p.prosecdef as definer,
               coalesce(p.proconfig, '{}') as config, p.prosrc as source, obj_description(p.oid, 'pg_proc') as comment,
               p.pronargs as arguments, p.pronargdefaults as defaults, p.proargnames as names
        from pg_proc p where p.pronamespace = 'pglimits'::regnamespace order by 1
        """
    )


def test_what_callers_call_pins_its_search_path_and_is_of_the_owner_and_nothing_else_is(s: Session) -> None:
    """A procedure that commits can do neither, so what it calls does; and what the views call, if it reads a table."""
    pinned = {row.name for row in routines(s) if "search_path=pg_catalog, pg_temp" in row.config}
    definers = {row.name for row in routines(s) if row.definer}
    functions = (USE | WRAPPER | CHANGE | READ | FILES | OF_PROCEDURES) - PROCEDURES - QUALIFIED
    assert pinned == functions | {"_ended_slots", "_ended_slot_seconds", "_dead_waiters"}
    assert definers == pinned - {"version", "errors"}
    assert {row.name for row in routines(s) if row.kind == "p"} == PROCEDURES


def test_there_is_one_function_a_name(s: Session) -> None:
    names = [row.name for row in routines(s)]
    assert sorted(names) == sorted(set(names))


def test_everything_has_a_comment_that_is_a_sentence(s: Session) -> None:
    assert [row.signature for row in routines(s) if not re.fullmatch(r"(?s)\S.*[.]", row.comment or "")] == []
    without = s.all(
        """
        select c.oid::regclass::text from pg_class c
        where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v')
          and obj_description(c.oid, 'pg_class') is null
        union all
        select t.oid::regtype::text from pg_type t join pg_class c on c.oid = t.typrelid
        where t.typnamespace = 'pglimits'::regnamespace and c.relkind = 'c'
          and obj_description(t.oid, 'pg_type') is null
        """
    )
    assert without == []
    assert s.value("select obj_description('pglimits'::regnamespace, 'pg_namespace')")


def test_all_arguments_are_named_and_all_but_the_names_have_defaults(s: Session) -> None:
    needed = {
        "create_limit": 2, "adjust": 2, "settle": 3, "settle_all": 3, "sweep": 0, "version": 0, "errors": 0,
        "cron_enable": 0, "cron_disable": 0, "keep_history": 0, "last_sweep": 0,
    }  # fmt: skip
    for row in routines(s):
        if row.name in USE | CHANGE:
            assert row.arguments - row.defaults == needed.get(row.name, 1), row.signature
            assert row.arguments == 0 or all(row.names[: row.arguments]), row.signature


ACL = """
    select 'routine' as kind, p.oid::regprocedure::text as object, a.grantee from pg_proc p,
      aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where p.pronamespace = 'pglimits'::regnamespace
    union all
    select 'relation', c.oid::regclass::text, a.grantee from pg_class c,
      aclexplode(coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner))) a
    where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v', 'S')
    union all
    select 'type', t.oid::regtype::text, a.grantee from pg_type t join pg_class c on c.oid = t.typrelid,
      aclexplode(coalesce(t.typacl, acldefault('T', t.typowner))) a
    where t.typnamespace = 'pglimits'::regnamespace and c.relkind = 'c'
    union all
    select 'schema', n.nspname::text, a.grantee from pg_namespace n, aclexplode(n.nspacl) a where n.nspname = 'pglimits'
"""


def test_nothing_is_granted_to_public(s: Session) -> None:
    assert s.all(f"select * from ({ACL}) x where grantee = 0") == []


@pytest.mark.parametrize("role", sorted(GRANTED))
def test_each_role_can_call_exactly_what_it_should_and_no_table_is_in_its_reach(s: Session, role: str) -> None:
    callable_ = {
        row.name
        for row in s.all(
            "select p.proname as name from pg_proc p where p.pronamespace = 'pglimits'::regnamespace"
            " and has_function_privilege(%s, p.oid, 'execute')", role,
        )
    }  # fmt: skip
    assert callable_ == GRANTED[role]
    for privileges, expected in (
        ("select", set() if role == "pglimits_user" else VIEWS),
        ("insert, update, delete, truncate, references, trigger", set()),
    ):
        found = s.all(
            "select c.relname as name from pg_class c where c.relnamespace = 'pglimits'::regnamespace"
            " and c.relkind in ('r', 'v', 'S') and has_table_privilege(%s, c.oid, %s)", role, privileges,
        )  # fmt: skip
        assert {row.name for row in found} == expected
    assert s.value("select has_schema_privilege(%s, 'pglimits', 'create')", role) is False


ID = "gen_random_uuid()"
CALLS = {
    "user": [
        "select pglimits.acquire('database')", "select pglimits.acquire_all(array['database'])",
        "call pglimits.acquire_wait('database')", "call pglimits.rate_limit_wait('api')",
        f"call pglimits.release_wait({ID})", "select pglimits.rate_limit('api')",
        "select pglimits.rate_limit_all(array['api'])", f"select pglimits.renew({ID})",
        f"select * from pglimits.renew_all(array[{ID}])", f"select pglimits.release({ID})",
        f"select * from pglimits.release_all(array[{ID}])", "select pglimits.peek('database')",
        "select pglimits.peek_all(array['database'])", f"select pglimits.settle({ID}, 'api', 1)",
        f"select pglimits.settle_all({ID}, '{{api}}', '{{1}}')", f"select * from pglimits._taken({ID})",
        f"select * from pglimits._watch(array[{ID}], false)",
        "select pglimits._beat('pglimits_a')", f"select pglimits._release_batch(array[{ID}])",
    ],
    "reader": [
        *(f"select * from pglimits.{view}" for view in sorted(VIEWS)),
        """select * from pglimits._limit_faults('[{"name": "a/b"}]')""",
    ],
    "user or reader": ["select pglimits.version()", "select * from pglimits.errors()"],
    "admin": [
        "select pglimits.create_limit('new', 1)", "select pglimits.update_limit('database', 4)",
        "select pglimits.adjust('api', 1)", "select pglimits.reset('database')", "select pglimits.sweep()",
        "select pglimits.cron_disable()", "select pglimits.delete_limit('new')",
        """select pglimits._apply('{"limits": []}')""",
    ],
    "nobody": [
        *(f"select * from pglimits.{table}" for table in sorted(TABLES)),
        "delete from pglimits.leases", 'update pglimits.configs set "limit" = 100',
        "insert into pglimits.meta values (false, 1, 1)", "truncate pglimits.states",
        "create table pglimits.mine ()", "drop function pglimits.version()", "select * from pglimits._uses",
        "select pglimits._liveness()", "select pglimits._lock(1, '')", "select pglimits._fail('x', 'y')",
        "select pglimits._release(array[gen_random_uuid()], true)", "select nextval('pglimits.configs_limit_id_seq')",
    ],
}  # fmt: skip
MAY = {
    None: set(),
    "pglimits_user": {"user", "user or reader"},
    "pglimits_reader": {"reader", "user or reader"},
    "pglimits_admin": {"user", "reader", "user or reader", "admin"},
}


@pytest.mark.parametrize("role", MAY)
def test_a_role_can_do_what_it_is_for_and_nothing_else(db: Db, s: Session, role: str | None) -> None:
    s.create("database", 100)
    s.create("api", 100, 1)
    s.serves("database", 2, lease_duration=1)
    s.queue("database", slots=100)
    session = member(db, role, "tester")
    for kind, statements in CALLS.items():
        for statement in statements:
            if kind in MAY[role]:
                session.run(statement)
            else:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.run(statement)
    session.connection.close()
    s.run("drop role tester")


def test_a_reader_sees_what_has_ended_and_died_as_the_owner_does(db: Db, s: Session, clock: Any) -> None:
    clock.freeze()
    s.create("database", 1)
    s.acquire("database", lease_duration=1)
    s.queue("database")
    clock.advance(60)
    session = member(db, "pglimits_reader", "tester")
    assert (session.limit("database").held, session.limit("database").waiting) == (0, 0)
    assert session.holders() == session.waiters() == []
    session.connection.close()
    s.run("drop role tester")


# Errors.


def test_every_error_that_is_raised_is_listed_once_and_every_listed_one_is_raised(s: Session) -> None:
    listed = s.all("select * from pglimits.errors()")
    assert len({row.code for row in listed}) == len({row.kind for row in listed}) == len(listed)
    assert all(re.fullmatch(r"PL\d{3}", row.code) for row in listed)
    raised = {kind for row in routines(s) for kind in re.findall(r"_fail\(\s*'(\w+)'", row.source)}
    # Raised before there are any functions, or where the caller's own search_path holds.
    sources = [(SQL / name).read_text() for name in ("lock.sql", "install.sql", "functions/112_waiting.sql")]
    codes = re.findall(r"errcode = '(PL\d+)'", "".join(sources))
    assert raised | {row.kind for row in listed if row.code in codes} == {row.kind for row in listed}
    for row in listed:
        with fails(row.code, "what"):
            s.run("select pglimits._fail(%s, 'what')", row.kind)


def test_no_function_raises_an_error_of_its_own_making(s: Session) -> None:
    """Those two say it in PostgreSQL's own code for it; a procedure runs as its caller, and cannot call _fail."""
    own = {row.name for row in routines(s) if "raise exception" in row.source}
    assert own == {"_fail", "_refuse_standby", "_refuse_snapshot", "_refuse_transaction"}


def test_errors_that_the_wrapper_maps_are_those_that_are_listed(s: Session) -> None:
    errors = pytest.importorskip("pglimits.errors")
    listed = {row.code: row.kind for row in s.all("select * from pglimits.errors()")}
    assert {code: error.__name__ for code, error in errors.BY_SQLSTATE.items()} == listed


# How things are read.


def test_the_hot_row_is_found_from_the_live_end_of_its_index(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.release(s.acquire("database").lease_id)
    query = (
        "explain select s.* from pglimits.states s where s.limit_id = 1 and s.key = ''"
        " order by s.generation desc limit 1 for update"
    )
    found = "Index Scan Backward using states_pkey"
    assert found in str(s.all(query))
    # And when an old snapshot keeps every dead version alive.
    other = db.session()
    other.run("begin isolation level repeatable read")
    other.run("select from pglimits.states")
    s.run(
        "do $$ begin for i in 1 .. 3000 loop update pglimits.states set version = version + 1,"
        " generation = (version + 1) / 16; commit; end loop; end $$"
    )
    s.run("vacuum analyze pglimits.states")
    assert found in str(s.all(query))
    (lock,) = [row for row in routines(s) if row.name == "_lock_used"]
    assert "order by s.generation desc limit 1 for update" in " ".join(lock.source.split())


@pytest.mark.parametrize("table", ["states", "leases", "queue"])
def test_no_hot_table_is_read_from_end_to_end_whatever_its_statistics_say(db: Db, s: Session, table: str) -> None:
    """A sequential scan, right for a table of one page, walks all dead versions until somebody plans anew."""
    s.create("database", 2)
    s.create("api", 1, 1)
    s.serves("database", 2)
    s.queue("database")
    s.rate_limit("api")
    s.run(f"analyze pglimits.{table}")
    session = db.session()
    for _ in range(8):  # custom plans, then the generic one
        session.run("begin")
        lease_id = session.holders()[0].lease_id
        waiter = session.queue("database")
        several = session.queue(["api", "database"])
        calls = (
            partial(session.acquire, "database"),
            partial(session.rate_limit, "api", timeout_seconds=FOREVER),
            partial(session.watch, waiter, several),
            partial(session.renew, lease_id),
            partial(session.release, several),
            partial(session.release, waiter),
            partial(session.release, lease_id),
            partial(session.value, "select pglimits._release_batch(array[%s::uuid])", lease_id),
        )
        for nth, call in enumerate(calls):
            ask = f"select pg_stat_get_xact_numscans('pglimits.{table}'::regclass)"
            before = session.value(ask)
            call()
            assert session.value(ask) == before, nth
        session.run("rollback")


def test_what_has_plans_has_the_settings_of_settings_sql(s: Session) -> None:
    """jit off: before PostgreSQL 18, what forbids a scan makes plans look so dear that each call is compiled: 40 ms."""
    every = {"enable_seqscan=off", "enable_bitmapscan=off", "jit=off", "plan_cache_mode=force_generic_plan"}
    for row in routines(s):
        settings = {one for one in row.config if not one.startswith(("search_path=", "lock_timeout="))}
        if row.name in ("acquire", "rate_limit", "release"):
            assert settings == {"enable_seqscan=off", "enable_bitmapscan=off"}, row.signature
        else:
            assert settings == (every if row.definer or row.name in ("_answer", "_release") else set()), row.signature


def test_every_write_of_the_hot_row_raises_its_version(s: Session) -> None:
    s.create("database", 2)
    versions = []
    for _ in range(3):
        lease_id = s.acquire("database").lease_id
        versions.append(s.value("select version from pglimits.states"))
        s.release(lease_id)
        versions.append(s.value("select version from pglimits.states"))
    assert versions == sorted(set(versions))


def test_limit_and_key_are_part_of_every_hot_tables_primary_key_and_nothing_reaches_across(s: Session) -> None:
    for table in ("states", "leases", "queue"):
        columns = s.value(
            "select array_agg(a.attname::text) from pg_index i join pg_attribute a"
            " on a.attrelid = i.indrelid and a.attnum = any (i.indkey)"
            f" where i.indrelid = 'pglimits.{table}'::regclass and i.indisprimary"
        )
        assert {"limit_id", "key"} <= set(columns)
    assert s.all("select from pg_constraint where contype = 'f' and connamespace = 'pglimits'::regnamespace") == []
    assert s.all("select from pg_trigger where tgrelid::regclass::text like 'pglimits.%%'") == []


def test_only_what_waits_has_a_subtransaction_and_only_what_pg_cron_calls_has_dynamic_sql(s: Session) -> None:
    """_answer is not in the hot path: the short way comes before it."""
    handlers = {row.name for row in routines(s) if re.search(r"\bexception\s+when\b", row.source)}
    assert handlers == {"_answer", "_refuse_transaction", "_sleep", "_cannot_commit"}
    dynamic = {row.name for row in routines(s) if re.search(r"^\s*execute\s", row.source, re.MULTILINE)}
    assert dynamic == {"cron_enable", "cron_disable"}
