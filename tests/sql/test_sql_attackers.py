"""What a role may not do, it cannot: neither by what it passes, nor by what it plants, nor by its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from sqltest import Db, Session, member

TYPES = ("uuid", "text", "timestamptz", "jsonb", "record", "tid", "name", "regprocedure")
"""What SQL looks up by name, and so first where the session says."""


@contextmanager
def attacker(db: Db, role: str | None = "pglimits_user") -> Iterator[Session]:
    """A session of a login role that is a member of nothing but that."""
    session = member(db, role, "attacker")
    try:
        yield session
    finally:
        session.connection.close()
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


CALLS = (
    "select pglimits.acquire('database', holder => '{}', lease_id => '00000000-0000-0000-0000-000000000001')",
    "select pglimits.acquire(array['database', 'api'], wait => null)",
    "select pglimits.acquire('database', lease_id => '00000000-0000-0000-0000-000000000002', wait => null)",
    "select pglimits.rate_limit('api', wait => null, channel => 'pglimits_a')",
    "select pglimits.rate_limit(array['api', 'api'], wait => null)",
    """select pglimits.acquire_many('[{"names": ["database"]}, {"names": ["api"], "for_rate": true}]')""",
    "select pglimits.acquire_alike('database', array[gen_random_uuid(), gen_random_uuid()])",
    "select pglimits.peek(array['database', 'api'])",
    "select pglimits.watch(array['00000000-0000-0000-0000-000000000002']::pg_catalog.uuid[])",
    "select pglimits.may_sleep('00000000-0000-0000-0000-000000000002')",
    "select pglimits.renew('00000000-0000-0000-0000-000000000001'::pg_catalog.text)",
    "select pglimits.release('00000000-0000-0000-0000-000000000001'::pg_catalog.text)",
    "select pglimits.release_many(array[gen_random_uuid()])",
    "select pglimits.flush()",
    "select pglimits.create_limit('new', 1)",
    "select pglimits.update_limit('new', 2, new_name => 'newer')",
    "select pglimits.adjust('api', -1)",
    "select pglimits.reset('database')",
    "select pglimits.sweep(idle => '0')",
    "select pglimits.delete_limit('newer')",
    "call pglimits.acquire_wait('database', wait => '1 millisecond')",
    "call pglimits.acquire_hot('database')",
    "call pglimits.release_hot(gen_random_uuid())",
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
