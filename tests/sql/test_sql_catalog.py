"""Hygiene that a query can check is checked by a query."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import psycopg
import pytest
from installtest import SQL
from sqltest import Db, Session, fails, member

PUBLIC = {
    "pglimits_user": {
        "acquire", "acquire_alike", "acquire_hot", "acquire_many", "acquire_wait", "rate_limit", "renew", "release",
        "release_hot", "release_many", "flush", "watch", "may_sleep", "peek", "version", "errors",
    },
    "pglimits_reader": {"version", "errors", "_now"},
    "pglimits_admin": {
        "acquire", "acquire_alike", "acquire_hot", "acquire_many", "acquire_wait", "rate_limit", "renew", "release",
        "release_hot", "release_many", "flush", "watch", "may_sleep", "peek", "version", "errors", "_now",
        "create_limit", "update_limit",
        "delete_limit", "adjust", "reset", "sweep", "cron_enable", "cron_disable",
    },
}  # fmt: skip
VIEWS = {"limits", "holders", "waiters"}
TABLES = {"meta", "configs", "former_names", "states", "leases", "queue"}


def routines(s: Session) -> list[Any]:
    return s.all(
        """
        select p.oid::regprocedure::text as signature, p.proname as name, p.prokind as kind, p.prosecdef as definer,
               p.proconfig as config, l.lanname as language, p.prosrc as source, p.provolatile as volatility,
               obj_description(p.oid, 'pg_proc') as comment, p.proacl::text as acl, p.pronargs as arguments,
               p.pronargdefaults as defaults, p.proargnames as names, p.prosqlbody is not null as bound
        from pg_proc p join pg_language l on l.oid = p.prolang
        where p.pronamespace = 'pglimits'::regnamespace order by 1
        """
    )


def test_every_function_has_a_pinned_search_path_but_the_procedure_that_commits(s: Session) -> None:
    """Nor need those have one whose body was bound when they were made."""
    wrong = [
        row.signature
        for row in routines(s)
        if row.kind == "f" and not row.bound and "search_path=pg_catalog, pg_temp" not in (row.config or [])
    ]
    assert wrong == []
    procedures = [row for row in routines(s) if row.kind != "f"]
    assert [row.name for row in procedures] == ["acquire_hot", "acquire_wait", "release_hot"]
    assert all("commit" in row.source for row in procedures)


def test_every_public_function_is_security_definer_and_no_private_one(s: Session) -> None:
    plain = {"errors", "version"}  # they read nothing
    for row in routines(s):
        public = not row.name.startswith("_") and row.name not in plain and row.kind == "f"
        assert row.definer == public, row.signature


def test_every_function_table_view_and_type_has_a_comment(s: Session) -> None:
    assert [row.signature for row in routines(s) if not row.comment] == []
    without = s.all(
        """
        select c.oid::regclass::text from pg_class c
        where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v', 'm', 'p', 'f')
          and obj_description(c.oid, 'pg_class') is null
        union all
        select t.oid::regtype::text from pg_type t left join pg_class c on c.oid = t.typrelid
        where t.typnamespace = 'pglimits'::regnamespace and t.typtype in ('c', 'e', 'd')
          and coalesce(c.relkind, 'c') = 'c' and obj_description(t.oid, 'pg_type') is null
        """
    )
    assert without == []
    assert s.value("select obj_description('pglimits'::regnamespace, 'pg_namespace')")


def test_comments_are_sentences(s: Session) -> None:
    assert [row.signature for row in routines(s) if not re.fullmatch(r"(?s)\S.*[.]", row.comment)] == []


def test_public_functions_have_defaults_for_all_but_the_names(s: Session) -> None:
    needed = {"create_limit": 2, "adjust": 2, "acquire_alike": 2}
    none = {"version", "errors", "flush", "sweep", "cron_enable", "cron_disable"}
    for row in routines(s):
        if not row.name.startswith("_"):
            expected = 0 if row.name in none else needed.get(row.name, 1)
            assert row.arguments - row.defaults == expected, row.signature
            assert row.arguments == 0 or all(row.names[: row.arguments]), row.signature


def test_nothing_is_granted_to_public(s: Session) -> None:
    granted = s.all(
        """
        select 'routine', p.oid::regprocedure::text from pg_proc p,
          aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        where p.pronamespace = 'pglimits'::regnamespace and a.grantee = 0
        union all
        select 'relation', c.oid::regclass::text from pg_class c,
          aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
        where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v', 'S') and a.grantee = 0
        union all
        select 'schema', n.nspname from pg_namespace n, aclexplode(n.nspacl) a
        where n.nspname = 'pglimits' and a.grantee = 0
        union all
        select 'type', t.oid::regtype::text from pg_type t left join pg_class c on c.oid = t.typrelid,
          aclexplode(coalesce(t.typacl, acldefault('T', t.typowner))) a
        where t.typnamespace = 'pglimits'::regnamespace and c.relkind = 'c' and a.grantee = 0
        """
    )
    assert granted == []


@pytest.mark.parametrize("role", sorted(PUBLIC))
def test_each_role_can_call_exactly_what_it_should_and_no_table_is_in_its_reach(s: Session, role: str) -> None:
    callable_ = s.all(
        "select distinct p.proname as name from pg_proc p where p.pronamespace = 'pglimits'::regnamespace"
        " and has_function_privilege(%s, p.oid, 'execute')",
        role,
    )
    assert {row.name for row in callable_} == PUBLIC[role]
    overloads = s.all(
        "select p.oid::regprocedure::text from pg_proc p where p.pronamespace = 'pglimits'::regnamespace"
        " and p.proname = any (%s) and not has_function_privilege(%s, p.oid, 'execute')",
        sorted(PUBLIC[role]),
        role,
    )
    assert overloads == []
    readable = s.all(
        "select c.relname as name from pg_class c where c.relnamespace = 'pglimits'::regnamespace"
        " and c.relkind in ('r', 'v', 'S') and has_table_privilege(%s, c.oid, 'select')",
        role,
    )
    assert {row.name for row in readable} == (set() if role == "pglimits_user" else VIEWS)
    writable = s.all(
        "select c.relname from pg_class c where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v')"
        " and has_table_privilege(%s, c.oid, 'insert, update, delete, truncate, references, trigger')",
        role,
    )
    assert writable == []
    assert s.value("select has_schema_privilege(%s, 'pglimits', 'create')", role) is False


CALLS = {
    "pglimits_user": [
        "select pglimits.acquire('database')",
        "select pglimits.acquire(array['database'])",
        "call pglimits.acquire_wait('database')",
        "select pglimits.rate_limit('api')",
        "select pglimits.rate_limit(array['api'])",
        'select * from pglimits.acquire_many(\'[{"names": ["database"]}]\')',
        "select pglimits.renew(gen_random_uuid())",
        "select pglimits.renew('00000000-0000-0000-0000-000000000000')",
        "select * from pglimits.renew(array[gen_random_uuid()])",
        "select pglimits.release(gen_random_uuid())",
        "select pglimits.release('00000000-0000-0000-0000-000000000000')",
        "select * from pglimits.release(array[gen_random_uuid()])",
        "select * from pglimits.watch(array[gen_random_uuid()])",
        "select pglimits.may_sleep(gen_random_uuid())",
        "select pglimits.peek('database')",
        "select pglimits.peek(array['database'])",
    ],
    "pglimits_reader": [
        "select * from pglimits.limits",
        "select * from pglimits.holders",
        "select * from pglimits.waiters",
    ],
    "both": ["select pglimits.version()", "select * from pglimits.errors()"],
    "pglimits_admin": [
        "select pglimits.create_limit('new', 1)",
        "select pglimits.update_limit('database', 4)",
        "select pglimits.adjust('api', 1)",
        "select pglimits.reset('database')",
        "select pglimits.sweep()",
        "select pglimits.cron_disable()",
        "select pglimits.delete_limit('new')",
    ],
    "nobody": [
        *(f"select * from pglimits.{table}" for table in sorted(TABLES)),
        "delete from pglimits.leases",
        'update pglimits.configs set "limit" = 100',
        "insert into pglimits.meta values (false, 1, 1)",
        "truncate pglimits.states",
        "create table pglimits.mine ()",
        "drop function pglimits.version()",
        "select pglimits._liveness()",
        "select pglimits._lock(1, '')",
        "select pglimits._fail('x', 'y')",
    ],
}


@pytest.mark.parametrize("role", [None, "pglimits_user", "pglimits_reader", "pglimits_admin"])
def test_a_role_can_do_what_it_is_for_and_nothing_else(db: Db, s: Session, role: str | None) -> None:
    s.create("database", 100)
    s.create("api", 100, 1)
    session = member(db, role, "tester")
    kinds = {
        None: set(),
        "pglimits_user": {"pglimits_user", "both"},
        "pglimits_reader": {"pglimits_reader", "both"},
        "pglimits_admin": {"pglimits_user", "pglimits_reader", "both", "pglimits_admin"},
    }
    for kind, statements in CALLS.items():
        for statement in statements:
            if kind in kinds[role]:
                session.run(statement)
            else:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.run(statement)
    session.connection.close()
    s.run("drop role tester")


def test_a_user_whose_search_path_is_hostile_is_not_led_astray(db: Db, s: Session) -> None:
    """Security definer functions would run what stands first in a search_path that they do not pin."""
    s.create("database", 1)
    session = member(db, "pglimits_user", "tester")
    s.run("create schema evil; grant all on schema evil to public")
    session.run(
        "create function evil.clock_timestamp() returns timestamptz language plpgsql as"
        " $$ begin raise exception 'led astray by %', current_user; end $$"
    )
    session.run("set search_path = evil, pg_catalog, pglimits")
    assert session.acquire("database").status == "granted"
    assert session.acquire("database").status == "refused"
    session.connection.close()
    s.run("drop schema evil cascade; drop role tester")


# Errors.


def test_every_error_that_is_raised_is_listed_once_and_every_listed_one_is_raised(s: Session) -> None:
    listed = s.all("select * from pglimits.errors()")
    assert len({row.code for row in listed}) == len({row.kind for row in listed}) == len(listed)
    assert all(re.fullmatch(r"PL\d{3}", row.code) for row in listed)
    kinds = {row.kind for row in listed}
    raised: set[str] = set()
    for row in routines(s):
        if row.name == "errors":
            continue
        raised.update(re.findall(r"_fail\(\s*'(\w+)'", row.source))
        raised.update(re.findall(r"\.error := '(\w+)'", row.source))
        raised.update(re.findall(r"format\('([A-Z][a-z]+[A-Z]\w+) ", row.source))
    # Raised before there are any functions.
    codes = re.findall(r"errcode = '(PL\d+)'", (SQL / "lock.sql").read_text() + (SQL / "install.sql").read_text())
    raised.update(row.kind for row in listed if row.code in codes)
    assert raised == kinds
    for row in listed:
        with fails(row.code, "what"):
            s.run("select pglimits._fail(%s, 'what')", row.kind)


def test_no_function_raises_an_error_of_its_own_making(s: Session) -> None:
    for row in routines(s):
        if row.name not in ("_fail", "_refuse_standby", "_refuse_snapshot"):  # these in PostgreSQL's own words for it
            assert "raise exception" not in row.source, row.signature


def test_errors_that_the_wrapper_maps_are_those_that_are_listed(s: Session) -> None:
    errors = pytest.importorskip("pglimits.errors")
    listed = {row.code: row.kind for row in s.all("select * from pglimits.errors()")}
    assert {code: error.__name__ for code, error in errors.BY_SQLSTATE.items()} == listed


# How things are read.


def plan(s: Session, query: str) -> str:
    return "\n".join(row[0] for row in s.all(f"explain {query}"))


def test_the_hot_row_is_found_from_the_live_end_of_its_index(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.release(s.acquire("database").lease_id)
    query = (
        "select s.* from pglimits.states s where s.limit_id = 1 and s.key = ''"
        " order by s.version desc limit 1 for update"
    )
    assert "Index Scan Backward using states_pkey" in plan(s, query)
    # And when an old snapshot keeps every dead version alive.
    other = db.session()
    other.run("begin isolation level repeatable read")
    other.run("select from pglimits.states")
    s.run(
        "do $$ begin for i in 1 .. 3000 loop update pglimits.states set version = version + 1; commit; end loop; end $$"
    )
    s.run("vacuum analyze pglimits.states")
    assert "Index Scan Backward using states_pkey" in plan(s, query)
    (lock,) = [row for row in routines(s) if row.name == "_lock_used"]
    assert "order by s.version desc limit 1 for update" in " ".join(lock.source.split())


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
        for what, call in enumerate(
            (
                partial(session.acquire, "database"),
                partial(session.rate_limit, "api", wait=None),
                partial(session.watch, waiter),
                partial(session.renew, lease_id),
                partial(session.release, waiter),
                partial(session.release, lease_id),
            )
        ):
            ask = f"select pg_stat_get_xact_numscans('pglimits.{table}'::regclass)"
            before = session.value(ask)
            call()
            assert session.value(ask) == before, what
        session.run("rollback")


def test_no_function_that_forbids_sequential_scans_is_compiled_for_it(s: Session) -> None:
    """Before PostgreSQL 18, what forbids them makes every plan look so dear that each call is JIT-compiled: 40 ms."""
    forbid = [row for row in routines(s) if "enable_seqscan=off" in (row.config or [])]
    assert [row.signature for row in forbid if "jit=off" not in row.config] == []


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
    assert (
        s.all("select conname from pg_constraint where contype = 'f' and connamespace = 'pglimits'::regnamespace") == []
    )
    assert s.all("select tgname from pg_trigger where tgrelid::regclass::text like 'pglimits.%%'") == []


def test_no_function_has_a_subtransaction_and_only_those_of_cron_have_dynamic_sql(s: Session) -> None:
    for row in routines(s):
        if row.name != "_check_interval":  # not called for what clients send
            assert not re.search(r"^\s*exception\s*$|exception\s+when", row.source, re.MULTILINE), row.signature
        if not row.name.startswith(("cron_", "_cron_")):
            assert not re.search(r"^\s*execute\s", row.source, re.MULTILINE), row.signature
