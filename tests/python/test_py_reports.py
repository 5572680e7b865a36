"""What limiters tell: how limits are used, what happened, why somebody waits; and what an administrator ends."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest
from wrappertest import Api

from pglimits import InvalidArgument, LimitNotFound, PermissionDenied

Connection = psycopg.Connection[Any]


@pytest.fixture(autouse=True)
def limits(conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('database', 3), pglimits.create_limit('api', 5, 0.001)")
    conn.execute("select pglimits.create_limit('Spare', 9), pglimits.create_limit('tenant', 1)")


def names(found: Any) -> list[str]:
    return [each.name for each in found]


def test_usage_is_sorted_filtered_and_has_pages(api: Api, conn: Connection) -> None:
    conn.execute("select pglimits.rate_limit('api', 2), pglimits.acquire('database', 3)")
    conn.execute("select pglimits.acquire('database', timeout_seconds => 60)")
    conn.execute("select count(pglimits.acquire('tenant', key => key)) from unnest('{a,b}'::text[]) key")
    assert names(api.usage()) == ["database", "tenant", "api", "Spare"]
    orders = {
        "name": ["Spare", "api", "database", "tenant"], "limit": ["Spare", "api", "database", "tenant"],
        "held": ["database", "tenant", "Spare", "api"], "level": ["api", "Spare", "database", "tenant"],
        "waiting": ["database", "Spare", "api", "tenant"], "oldest_wait": ["database", "Spare", "api", "tenant"],
    }  # fmt: skip
    for sort, order in orders.items():
        assert names(api.usage(sort=sort)) == order, sort
    assert names(api.usage(names=["tenant", "nix", "api"], sort="given")) == ["tenant", "api"]
    assert names(api.usage("A", sort="name", count=2, offset=1)) == ["api", "database"]
    assert {usage.of for usage in api.usage("a", count=1)} == {4} and api.usage("%") == []
    database, tenant, *_ = api.usage()
    assert (database.held, database.waiting, database.leases, database.keys) == (3, 1, 1, 1)
    assert database.oldest_wait is not None and database.oldest_wait >= 0 and database.grants == 1
    assert (tenant.held, tenant.keys, tenant.oldest_wait) == (2, 2, None)
    with pytest.raises(InvalidArgument, match="sort must be one of"):
        api.usage(sort="colour")
    with pytest.raises(InvalidArgument):
        api.usage(count=0)


def test_holders_and_waiters_have_pages(api: Api, conn: Connection) -> None:
    conn.execute("select count(pglimits.acquire('database')) from generate_series(1, 3)")
    conn.execute("select count(pglimits.acquire('database', timeout_seconds => 60)) from generate_series(1, 3)")
    for ask in (api.holders, api.waiters):
        everything = ask("database")
        assert len(everything) == 3
        assert ask("database", count=2) == everything[:2]
        assert ask("database", count=2, offset=2) == everything[2:]


def test_events_are_read_on_from_one_that_was_seen(api: Api) -> None:
    api.update("database", limit=4, description="orders")
    api.delete("api")
    events = api.events()
    assert [(event.kind, event.name) for event in events[-2:]] == [("updated", "database"), ("deleted", "api")]
    assert events[-2].old == {"limit": 3, "description": None}
    assert events[-2].new == {"limit": 4, "description": "orders"}
    assert events[-1].by["application"] == "pglimits" and events[-1].lease_id is None
    assert api.events(count=2) == events[-2:]
    assert api.events(after=0, count=2) == events[:2]
    assert api.events(after=events[1].event_id) == events[2:]
    assert api.events("database", "updated") == [events[-2]]
    assert api.events(after=events[-1].event_id) == []
    with pytest.raises(InvalidArgument):
        api.events(after=-1)


def test_counters_and_history_tell_what_was_done(api: Api, clock: Any) -> None:
    lease = api.acquire("database", 2, renew=False)
    api.release(lease)
    (counters,) = api.counters("database")
    assert (counters.grants, counters.granted_slots, counters.releases, counters.leases) == (1, 2, 1, 0)
    assert names(api.counters()) == ["Spare", "api", "database", "tenant"] and api.counters("nix") == []
    api.sweep()
    clock.advance(70)
    steps = api.history("database", 600, 10)
    assert sum(step.granted_slots for step in steps) == 2 and {step.limit for step in steps} == {3}
    with pytest.raises(LimitNotFound):
        api.history("nix")


def test_why_somebody_waits(api: Api, conn: Connection) -> None:
    conn.execute("select pglimits.acquire('database', 3)")
    conn.execute("select pglimits.acquire('database', timeout_seconds => 60)")
    conn.execute("select pglimits.acquire_all('{Spare,database}', timeout_seconds => 60)")
    first, second = api.why_waiting("database")
    assert (first.position, first.blocked_by) == (1, "database") and "3 of 3 are held" in first.reason
    assert second.position == 2 and second.earliest is None
    assert [reason.lease_id for reason in api.why_waiting("Spare")] == [second.lease_id]
    with pytest.raises(LimitNotFound):
        api.why_waiting("nix")


def test_an_administrator_ends_what_somebody_else_holds(api: Api, conn: Connection) -> None:
    lease = uuid4()
    conn.execute("select pglimits.acquire('database', lease_id => %s)", [lease])
    assert api.force_release(str(lease)) is True
    assert api.force_release(lease) is False
    assert [event.lease_id for event in api.events(kind="force_released")] == [lease]
    with pytest.raises(InvalidArgument):
        api.force_release("no-uuid")


def test_force_release_is_for_administrators(conn: Connection, server_dsn: str) -> None:
    from pglimits import Limiter

    conn.execute("create role clerk login in role pglimits_user, pglimits_reader")
    try:
        with Limiter(psycopg.conninfo.make_conninfo(server_dsn, user="clerk")) as limiter:
            assert limiter.usage() and limiter.events() and limiter.history("database") is not None
            with pytest.raises(PermissionDenied):
                limiter.force_release(uuid4())
            assert limiter._may(["force_release", "release"]) == {"release"}
    finally:
        conn.execute("drop role clerk")
