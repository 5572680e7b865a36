"""What the limiter does with limits: create, change, look, correct; and what a request over several is answered."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import enum
import gc
import inspect
import os
import pickle
import socket
import threading
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from wrappertest import (
    Api,
    AsyncApi,
    Connection,
    WaitUntil,
    event_loop,
    held,
    in_thread,
    nothing_left,
    open_api,
    open_every,
    value,
    waiting,
)

import pglimits
from pglimits import (
    AcquireTimeout,
    AsyncLimiter,
    Holder,
    InvalidArgument,
    Limit,
    Limiter,
    LimiterUnavailable,
    LimitExists,
    LimitNotFound,
    NoSlotDecay,
    Peek,
    PglimitsError,
    SlotsExceedLimit,
    Swept,
    Waiter,
    errors,
)

# Limits.


def test_create_returns_the_limit_as_the_view_shows_it(api: Api, conn: Connection) -> None:
    made = api.create("api", 10, 2.5, False, 7, "what for")
    assert isinstance(made, Limit)
    assert (made.name, made.limit, made.slot_decay_per_second, made.active, made.max_waiters, made.description) == (
        "api",
        10,
        2.5,
        False,
        7,
        "what for",
    )
    assert (made.held, made.level, made.waiting) == (0, 0.0, 0)
    assert isinstance(made.created_at, datetime)
    assert made.created_at.tzinfo is not None
    assert api.get("api") == made
    assert api.list() == [made]


def test_create_has_the_defaults_of_a_concurrency_limit(api: Api) -> None:
    made = api.create("database", limit=3)
    assert (made.slot_decay_per_second, made.active, made.max_waiters, made.description) == (0, True, None, None)


@pytest.mark.parametrize(
    "model, view",
    [(Limit, "limits"), (Holder, "holders"), (Waiter, "waiters")],
)
def test_models_have_the_columns_of_the_views(conn: Connection, model: type[Any], view: str) -> None:
    columns = conn.execute(
        "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 order by attnum",
        [f"pglimits.{view}"],
    ).fetchall()
    assert [field.name for field in dataclasses.fields(model)] == [column[0] for column in columns]


def test_a_name_that_is_taken_is_an_error_and_changes_nothing(api: Api) -> None:
    made = api.create("database", 1)
    with pytest.raises(LimitExists, match="database"):
        api.create("database", 2)
    assert api.get("database") == made


def test_update_changes_only_what_is_given(api: Api) -> None:
    made = api.create("api", 10, 2.5, True, 7, "what for")
    changed = api.update("api", limit=11)
    assert dataclasses.replace(changed, limit=10, updated_at=made.updated_at) == made
    assert changed.limit == 11
    changed = api.update("api", slot_decay_per_second=1, active=False, max_waiters=-1, description="", new_name="new")
    assert (changed.name, changed.limit, changed.slot_decay_per_second) == ("new", 11, 1)
    assert (changed.active, changed.max_waiters, changed.description) == (False, None, None)
    assert changed.created_at == made.created_at


def test_upsert_creates_and_then_makes_the_limit_so(api: Api) -> None:
    made = api.upsert("api", 10, 2.5, max_waiters=7, description="what for")
    assert (made.limit, made.slot_decay_per_second, made.max_waiters, made.description) == (10, 2.5, 7, "what for")
    lease = api.acquire("api")
    made = api.upsert("api", 5, active=False)
    assert (made.limit, made.slot_decay_per_second, made.active) == (5, 0, False)
    assert (made.max_waiters, made.description, made.held) == (None, None, 1)
    api.release(lease)


def test_upserts_at_the_same_time_all_succeed(api: Api) -> None:
    futures = [api.start("upsert", "database", number + 1) for number in range(12)]
    assert {future.result(30).name for future in futures} == {"database"}
    assert len(api.list()) == 1


def test_what_is_not_there_is_not_found(api: Api) -> None:
    for call in (
        lambda: api.get("nowhere"),
        lambda: api.update("nowhere", limit=1),
        lambda: api.delete("nowhere"),
        lambda: api.reset("nowhere"),
        lambda: api.adjust("nowhere", 1),
    ):
        with pytest.raises(LimitNotFound, match="nowhere"):
            call()


def test_delete_drops_the_limit_with_its_leases(api: Api, conn: Connection) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    api.delete("database")
    assert (api.list(), api.holders()) == ([], [])
    assert api.release(lease) is False


def test_list_is_sorted_by_name_and_says_what_is_held_now(api: Api) -> None:
    for name in ("b", "a", "c"):
        api.create(name, 2)
    lease = api.acquire(["b", "c"])
    assert [(limit.name, limit.held) for limit in api.list()] == [("a", 0), ("b", 1), ("c", 1)]
    api.release(lease)


def test_reset_ends_leases_of_a_limit_or_of_one_key(api: Api, conn: Connection) -> None:
    api.create("database", 2)
    for key in ("", "x", "x", "y"):
        api.acquire("database", key=key, renew=False)
    assert api.reset("database", "x") == 2
    assert held(conn) == 2
    assert api.reset("database") == 2
    assert held(conn) == 0
    api.create("api", 2, slot_decay_per_second=0.001)
    api.rate_limit("api", 2)
    assert api.reset("api") == 0
    assert api.get("api").level == 0


def test_adjust_corrects_a_level_up_past_the_limit_and_down_to_zero(api: Api) -> None:
    api.create("tokens", 500, slot_decay_per_second=1e-6)
    api.rate_limit("tokens", 500)
    assert api.adjust("tokens", 812) == pytest.approx(1312, abs=0.01)
    assert api.get("tokens").level == pytest.approx(1312, abs=0.01)
    assert api.adjust("tokens", -1000) == pytest.approx(312, abs=0.01)
    assert api.adjust("tokens", -1000) == 0
    assert api.adjust("tokens", 5, key="other") == pytest.approx(5, abs=0.01)
    api.create("database", 1)
    with pytest.raises(NoSlotDecay, match="database"):
        api.adjust("database", 1)


def test_peek_tells_what_would_happen_and_changes_nothing(api: Api, conn: Connection) -> None:
    api.create("database", 1)
    api.create("api", 1, slot_decay_per_second=0.01)
    assert api.peek("database") == Peek("granted", None, None)
    lease = api.acquire("database")
    assert api.peek("database").status == "refused"
    assert api.peek("database").retry_after is None
    assert api.peek("database", key="other").status == "granted"
    assert api.peek(["nowhere"]).status == "unlimited"
    with pytest.raises(LimitNotFound):
        api.peek("nowhere", strict=True)
    with pytest.raises(SlotsExceedLimit):
        api.peek("database", 2)
    api.rate_limit("api")
    level = api.get("api").level
    peeked = api.peek("api", for_rate=True)
    assert peeked.status == "refused"
    assert 0 < peeked.retry_after <= 100
    assert api.get("api").level <= level
    assert waiting(conn) == 0
    api.release(lease)


def test_holders_and_waiters_show_who_and_how_much(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 3)
    api.create("other", 1)
    first = api.acquire({"database": 2, "other": 1}, holder={"job": 1}, priority=4)
    second = api.start("acquire", {("database", ""): 2}, holder="me", priority=2)
    wait_until(lambda: waiting(conn) == 1)
    holders = api.holders()
    assert [(h.name, h.key, h.slots, h.holder, h.lease_id, h.priority) for h in holders] == [
        ("database", "", 2, {"job": 1}, first.id, 4),
        ("other", "", 1, {"job": 1}, first.id, 4),
    ]
    assert [h.name for h in api.holders("other")] == ["other"]
    assert api.holders("nowhere") == []
    [waiter] = api.waiters("database")
    assert (waiter.slots, waiter.holder, waiter.priority, waiter.position) == (2, "me", 2, 1)
    assert api.waiters("other") == []
    api.release(first)
    api.release(second.result(30))


def test_a_waiter_is_taken_out_of_its_queue_by_its_id(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    waits = api.start("acquire", "database", timeout_seconds=4)
    wait_until(lambda: waiting(conn) == 1)
    [waiter] = api.waiters()
    assert api.release(waiter.lease_id) is True
    # It is told, or finds out; either it asks again or it gives up, and nothing is left of it.
    with pytest.raises(AcquireTimeout):
        waits.result(30)
    api.release(lease)
    wait_until(lambda: nothing_left(conn))


def test_sweep_tidies_up_and_tells_what(api: Api, conn: Connection, clock: Any) -> None:
    api.create("database", 1)
    api.acquire("database", lease_duration=10, renew=False)
    clock.advance(11)
    assert api.sweep() == Swept(1, 0, 0)
    assert value(conn, "select count(*) from pglimits.leases") == 0


def test_version_is_that_of_the_package(api: Api) -> None:
    assert api.version() == pglimits.__version__


# Requests.


def test_slots_are_counted_per_key(api: Api, conn: Connection) -> None:
    api.create("tenant", 1)
    leases = [api.acquire("tenant", key=key) for key in ("", "t1", "t2")]
    with pytest.raises(AcquireTimeout):
        api.acquire("tenant", key="t1", timeout_seconds=0)
    assert held(conn) == 3
    for lease in leases:
        api.release(lease)


def test_a_mapping_gives_a_count_and_a_key_for_each_limit(api: Api) -> None:
    api.create("tenant", 5)
    api.create("everyone", 5)
    api.create("tokens", 2000)
    lease = api.acquire({("tenant", "t42"): 2, "everyone": 1, "tokens": 1200})
    assert {(h.name, h.key, h.slots) for h in api.holders()} == {
        ("tenant", "t42", 2),
        ("everyone", "", 1),
        ("tokens", "", 1200),
    }
    assert len(lease.fences) == 3
    api.release(lease)


def test_the_key_argument_is_for_the_names_that_have_none_of_their_own(api: Api) -> None:
    api.create("tenant", 5)
    api.create("everyone", 5)
    lease = api.acquire([("tenant", "t42"), "everyone"], key="k")
    assert {(h.name, h.key) for h in api.holders()} == {("tenant", "t42"), ("everyone", "k")}
    api.release(lease)


def test_the_same_name_twice_adds_its_slots_up(api: Api, conn: Connection) -> None:
    api.create("database", 3)
    lease = api.acquire(["database", "database"])
    assert held(conn) == 2
    assert lease.fences[0] == lease.fences[1]
    with pytest.raises(SlotsExceedLimit):
        api.acquire(["database", "database"], 2, timeout_seconds=0)
    api.release(lease)


def test_all_or_nothing_over_several_limits(api: Api, conn: Connection) -> None:
    api.create("free", 1)
    api.create("taken", 1)
    lease = api.acquire("taken")
    with pytest.raises(AcquireTimeout):
        api.acquire(["free", "taken"], timeout_seconds=0)
    with pytest.raises(AcquireTimeout):
        api.acquire(["taken", "free"], timeout_seconds=0.1)
    assert held(conn, "free") == 0
    api.release(lease)


def test_a_missing_limit_is_not_enforced_and_warned_of_once_by_name(
    api: Api, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    api.create("database", 1)
    for _ in range(3):
        with caplog.at_level("WARNING", "pglimits"):
            lease = api.acquire(["missing-a", "database", "missing-b"])
        assert held(conn) == 1
        api.release(lease)
        api.rate_limit("missing-a")
    for name in ("missing-a", "missing-b"):
        assert len([record for record in caplog.records if name in record.getMessage()]) == 1


def test_strict_names_every_missing_limit_and_takes_nothing(api: Api, conn: Connection) -> None:
    api.create("database", 1)
    with pytest.raises(LimitNotFound) as caught:
        api.acquire(["missing-a", "database", "missing-b"], strict=True)
    assert "missing-a" in str(caught.value)
    assert "missing-b" in str(caught.value)
    assert "database" not in str(caught.value)
    assert nothing_left(conn)
    with pytest.raises(LimitNotFound, match="missing-a"):
        api.rate_limit("missing-a", strict=True)


def test_an_inactive_limit_is_not_enforced_and_satisfies_strict(api: Api, conn: Connection) -> None:
    api.create("database", 1, active=False)
    leases = [api.acquire("database", strict=True) for _ in range(3)]
    assert held(conn) == 0
    assert not any(lease.enforced for lease in leases)
    api.update("database", active=True)
    mine = api.acquire("database")
    # One taken while it was inactive frees nothing later.
    assert [api.release(lease) for lease in leases] == [False] * 3
    assert held(conn) == 1
    api.release(mine)


def test_more_slots_than_the_limit_is_an_error_at_once(api: Api, conn: Connection) -> None:
    api.create("database", 2)
    with pytest.raises(SlotsExceedLimit, match="database"):
        api.acquire("database", 3)
    with pytest.raises(SlotsExceedLimit, match="database"):
        api.acquire({"database": 3})
    assert nothing_left(conn)


def test_a_limit_without_decay_is_no_rate_limit(api: Api) -> None:
    api.create("database", 2)
    with pytest.raises(NoSlotDecay, match="database"):
        api.rate_limit("database")


def test_a_rate_limit_can_be_held_too_and_then_both_budgets_count(api: Api, conn: Connection) -> None:
    api.create("api", 2, slot_decay_per_second=1e-6)
    lease = api.acquire("api", 2)
    limit = api.get("api")
    assert (limit.held, round(limit.level, 3)) == (2, 2)
    api.release(lease)
    limit = api.get("api")
    assert (limit.held, round(limit.level, 3)) == (0, 2)
    with pytest.raises(AcquireTimeout):
        api.acquire("api", timeout_seconds=0)


# Who holds.


def test_the_default_holder_says_host_pid_thread_or_task_and_program(api: Api) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    holder = api.holders()[0].holder
    api.release(lease)
    assert holder["host"] == socket.gethostname()
    assert holder["pid"] == os.getpid()
    assert isinstance(holder["program"], str)
    assert holder["program"]
    if api.kind == "sync":
        assert holder["thread"].startswith("Thread-")
    else:
        assert holder["task"].startswith("Task-")
    assert len(holder) == 4


@pytest.mark.parametrize("holder", [{"a": [1, 2.5, None, True, "ü"]}, "text", 7, [1], {}, "", 0, False])
def test_a_holder_is_any_json(api: Api, holder: Any) -> None:
    api.create("database", 1)
    lease = api.acquire("database", holder=holder)
    assert api.holders()[0].holder == holder
    api.release(lease)


def test_a_pydantic_like_holder_is_taken(api: Api) -> None:
    class Model:
        def model_dump(self, mode: str) -> dict[str, str]:
            assert mode == "json"
            return {"type": "flow_run", "id": "1"}

    api.create("database", 1)
    lease = api.acquire("database", holder=Model())
    assert api.holders()[0].holder == {"type": "flow_run", "id": "1"}
    api.release(lease)


# Durability, and pools of the caller's.


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("durable", [True, False])
def test_durable_says_whether_commits_wait_for_the_disk(
    dsn: str, conn: Connection, connect: Any, kind: str, durable: bool
) -> None:
    """The clock is read inside of the statements that take and give back: there it notes the setting."""
    conn.execute("create sequence public.reads")
    conn.execute("create table public.seen (setting text)")
    with open_api(kind, dsn=dsn, durable=durable) as api:
        api.create("database", 2)
        conn.execute(
            """
            create or replace function pglimits._now() returns timestamptz language plpgsql volatile
            set search_path = '' as $$ begin
              insert into public.seen values (current_setting('synchronous_commit'));
              return clock_timestamp();
            end $$
            """
        )
        lease = api.acquire("database")
        acquiring = {row[0] for row in conn.execute("delete from seen returning setting").fetchall()}
        api.release(lease)
        releasing = {row[0] for row in conn.execute("delete from seen returning setting").fetchall()}
    assert "off" not in (acquiring | releasing) if durable else acquiring == releasing == {"off"}
    # And it stays with that transaction.
    assert value(conn, "show synchronous_commit") == "on"


@pytest.mark.parametrize("autocommit", [True, False])
def test_limits_are_changed_whatever_isolation_level_transactions_have_by_default(
    dsn: str, conn: Connection, wait_until: WaitUntil, autocommit: bool
) -> None:
    """What changes a limit has to meet what others commit meanwhile, and goes in read committed."""
    conn.execute(f"alter database {conn.info.dbname} set default_transaction_isolation = 'serializable'".encode())
    with open_every(dsn, autocommit=autocommit) as apis:
        for api in apis.values():
            api.create("database", 1)
            api.update("database", limit=3, new_name="other")
            for _ in range(2):
                with pytest.raises(LimitNotFound):
                    api.update("database", limit=4)
            lease = api.acquire("other", 3)
            assert api.reset("other") == 1
            assert api.get("other").held == 0
            assert not api.release(lease)
            api.delete("other")
            assert api.list() == []
        # None stays open; that of somebody else may just be ending.
        wait_until(
            lambda: value(conn, "select count(*) from pg_stat_activity where state ~ '^idle in transaction'") == 0
        )


@pytest.mark.parametrize("options", [{}, {"row_factory": dict_row}, {"autocommit": True}, {"prepare_threshold": 0}])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_pool_of_the_callers_is_used_and_left_open(
    dsn: str, conn: Connection, kind: str, options: dict[str, Any], wait_until: WaitUntil
) -> None:
    def check(api: Api) -> None:
        api.create("database", 1)
        assert api.get("database").limit == 1
        lease = api.acquire("database")
        waits = api.start("acquire", "database")
        wait_until(lambda: waiting(conn) == 1)
        assert [holder.lease_id for holder in api.holders()] == [lease.id]
        api.release(lease)
        api.release(waits.result(30))
        with pytest.raises(LimitExists):
            api.create("database", 1)
        # Nothing is left half done in it.
        assert value(conn, "select count(*) from pg_stat_activity where state = 'idle in transaction'") == 0
        assert nothing_left(conn)

    if kind == "sync":
        with ConnectionPool(dsn, min_size=1, max_size=2, kwargs=options, open=True) as pool:
            with open_api(kind, pool=pool) as api:
                check(api)
            with pool.connection() as connection:
                assert connection.execute("select 1 as one").fetchone() in ((1,), {"one": 1})
        return

    async def open_pool() -> AsyncConnectionPool[Any]:
        pool: AsyncConnectionPool[Any] = AsyncConnectionPool(dsn, min_size=1, max_size=2, kwargs=options, open=False)
        await pool.open()
        return pool

    async def still_open(pool: AsyncConnectionPool[Any]) -> Any:
        async with pool.connection() as connection:
            row = await (await connection.execute("select 1 as one")).fetchone()
        await pool.close()
        return row

    with event_loop() as loop:
        pool = asyncio.run_coroutine_threadsafe(open_pool(), loop).result(30)
        limiter = AsyncLimiter(pool=pool)
        try:
            check(AsyncApi(limiter, loop))
        finally:
            asyncio.run_coroutine_threadsafe(limiter.close(), loop).result(30)
            row = asyncio.run_coroutine_threadsafe(still_open(pool), loop).result(30)
        assert row in ((1,), {"one": 1})


def test_an_app_that_has_lent_out_all_of_its_pool_still_gets_slots(dsn: str, conn: Connection) -> None:
    with (
        ConnectionPool(dsn, min_size=1, max_size=1, timeout=0.2, open=True) as pool,
        pool.connection(),
        open_api("sync", pool=pool) as api,
    ):
        api.create("database", 1)
        assert api.release(api.acquire("database"))


# Errors.


def test_every_sqlstate_of_the_database_has_its_class(conn: Connection) -> None:
    listed = dict(conn.execute("select code, kind from pglimits.errors()").fetchall())
    assert {code: kind.__name__ for code, kind in errors.BY_SQLSTATE.items()} == listed


def test_errors_are_told_apart_by_sqlstate_and_not_by_message(limiter: Any, conn: Connection) -> None:
    for code, kind in errors.BY_SQLSTATE.items():
        conn.execute(
            f"create or replace function pglimits.delete_limit(name text) returns void language plpgsql"
            f" as $$ begin raise exception using errcode = '{code}', message = 'kein Wort davon'; end $$"
        )
        with pytest.raises(PglimitsError, match="kein Wort davon") as caught:
            limiter.delete("database")
        assert type(caught.value) is kind
        assert isinstance(caught.value.__cause__, psycopg.Error)


@pytest.mark.parametrize(
    "kind, bases",
    [
        ("AcquireTimeout", (TimeoutError,)),
        ("InvalidArgument", (ValueError,)),
        ("LimitExists", ()),
        ("LimitNotFound", ()),
        ("LimiterUnavailable", ()),
        ("NoSlotDecay", ()),
        ("QueueFull", ()),
        ("LeaseLost", ()),
        ("SlotsExceedLimit", (ValueError,)),
        ("NotInstalled", ()),
        ("PermissionDenied", ()),
        ("ReadOnlyServer", (errors.LimiterUnavailable,)),
        ("VersionMismatch", ()),
        ("EmbeddedUnavailable", ()),
        ("CronUnavailable", ()),
    ],
)
def test_error_classes_and_their_bases(kind: str, bases: tuple[type, ...]) -> None:
    error = getattr(pglimits, kind)
    assert issubclass(error, (PglimitsError, *bases))
    for base in (PglimitsError, *bases):
        assert issubclass(error, base)


def test_every_public_name_is_exported() -> None:
    assert set(errors.__all__) <= set(pglimits.__all__)
    for name in pglimits.__all__:
        assert hasattr(pglimits, name)


def test_the_async_limiter_has_the_methods_and_parameters_of_the_sync_one() -> None:
    def face(cls: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for name, method in vars(cls).items()
            if callable(method) and not name.startswith("_")
        }

    assert face(pglimits.Limiter) == face(pglimits.AsyncLimiter)


# Arguments: an error names the argument, and nothing has changed.

BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("names", {"names": None}),
    ("names", {"names": []}),
    ("names", {"names": {}}),
    ("names", {"names": 5}),
    ("names", {"names": b"database"}),
    ("names", {"names": ["database", 5]}),
    ("names", {"names": ["database", None]}),
    ("names", {"names": [("database", "k", 1)]}),
    ("names", {"names": [("database", 1)]}),
    ("names", {"names": {("database",): 1}}),
    ("name", {"names": ""}),
    ("name", {"names": ["database", ""]}),
    ("name", {"names": "a/b"}),
    ("name", {"names": "a\nb"}),
    ("name", {"names": "a\x00b"}),
    ("name", {"names": ["database", "a\x00b"]}),
    ("name", {"names": "n" * 201}),
    ("names", {"names": ["database"] * 101}),
    ("database", {"names": {"database": 0}}),
    ("database", {"names": {"database": True}}),
    ("database", {"names": {"database": 1.0}}),
    ("database", {"names": {"database": -1}}),
    ("database", {"names": {"database": None}}),
    ("occupy", {"names": {"database": 1}, "occupy": 2}),
    ("occupy", {"occupy": 0}),
    ("occupy", {"occupy": -1}),
    ("occupy", {"occupy": True}),
    ("occupy", {"occupy": 1.5}),
    ("occupy", {"occupy": "1"}),
    ("occupy", {"occupy": None}),
    ("occupy", {"occupy": 2**31}),
    ("timeout_seconds", {"timeout_seconds": -1}),
    ("timeout_seconds", {"timeout_seconds": -0.001}),
    ("timeout_seconds", {"timeout_seconds": float("nan")}),
    ("timeout_seconds", {"timeout_seconds": True}),
    ("timeout_seconds", {"timeout_seconds": "1"}),
    ("timeout_seconds", {"timeout_seconds": 10**400}),
    ("strict", {"strict": 1}),
    ("strict", {"strict": None}),
    ("key", {"key": None}),
    ("key", {"key": 5}),
    ("key", {"key": "a\x00b"}),
    ("key", {"key": "a\nb"}),
    ("key", {"key": "k" * 201}),
    ("key", {"names": [("database", "a\x00b")]}),
]
BAD_ACQUIRES: list[tuple[str, dict[str, Any]]] = [
    ("max_retries", {"max_retries": -1}),
    ("max_retries", {"max_retries": True}),
    ("max_retries", {"max_retries": 1.5}),
    ("lease_duration", {"lease_duration": 0}),
    ("lease_duration", {"lease_duration": 0.999}),
    ("lease_duration", {"lease_duration": -5}),
    ("lease_duration", {"lease_duration": float("nan")}),
    ("lease_duration", {"lease_duration": float("inf")}),
    ("lease_duration", {"lease_duration": True}),
    ("lease_duration", {"lease_duration": "300"}),
    ("lease_duration", {"lease_duration": None}),
    ("lease_duration", {"lease_duration": 10**9}),
    ("holder", {"holder": object()}),
    ("holder", {"holder": {1, 2}}),
    ("holder", {"holder": float("nan")}),
    ("holder", {"holder": {"a": float("inf")}}),
    ("holder", {"holder": "a\x00b"}),
    ("holder", {"holder": {"\x00": 1}}),
    ("holder", {"holder": "x" * 8001}),
    ("priority", {"priority": None}),
    ("priority", {"priority": True}),
    ("priority", {"priority": 0.5}),
    ("priority", {"priority": 1_000_001}),
    ("priority", {"priority": -(2**40)}),
]


@pytest.mark.parametrize("method", ["acquire", "rate_limit"])
def test_a_bad_argument_of_a_request_is_named_and_changes_nothing(api: Api, conn: Connection, method: str) -> None:
    api.create("database", 5, slot_decay_per_second=1)
    for argument, given in BAD_REQUESTS + (BAD_ACQUIRES if method == "acquire" else []):
        arguments = {"names": "database", **given}
        with pytest.raises(InvalidArgument) as caught:
            api.start(method, **arguments).result(30)
            pytest.fail(f"accepted {given}")
        assert argument in str(caught.value), (given, str(caught.value))
        assert isinstance(caught.value, ValueError)
    limit = api.get("database")
    assert (limit.held, limit.level, limit.waiting) == (0, 0, 0)


class Name(str, enum.Enum):  # noqa: UP042 (its str() is not its value)
    LIMIT = "database"
    KEY = "a"


class Number(int, enum.Enum):
    TWO = 2


def test_the_member_of_an_enum_is_its_value_everywhere(api: Api) -> None:
    api.create(Name.LIMIT, Number.TWO)
    lease = api.acquire({(Name.LIMIT, Name.KEY): Number.TWO}, priority=Number.TWO)
    assert [(each.name, each.key, each.slots, each.priority) for each in api.holders(Name.LIMIT)] == [
        ("database", "a", 2, 2)
    ]
    with pytest.raises(AcquireTimeout):
        api.acquire([Name.LIMIT], timeout_seconds=0, key=Name.KEY)
    api.release(lease)
    lease = api.acquire(Name.LIMIT, occupy=Number.TWO, key=Name.KEY)
    assert api.peek(Name.LIMIT, key=Name.KEY).status == "refused"
    assert api.reset(Name.LIMIT, key=Name.KEY) == 1
    api.release(lease)


def test_what_is_next_to_no_time_tries_once_as_no_time_does(api: Api) -> None:
    api.create("database", 1)
    lease = api.acquire("database", timeout_seconds=1e-9)
    with pytest.raises(AcquireTimeout):
        api.acquire("database", timeout_seconds=1e-9)
    api.release(lease)


def test_a_deeply_nested_holder_is_an_argument_error(api: Api) -> None:
    api.create("database", 5)
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidArgument, match="holder"):
        api.acquire("database", holder=nested)
    circular: list[Any] = []
    circular.append(circular)
    with pytest.raises(InvalidArgument, match="holder"):
        api.acquire("database", holder=circular)


@pytest.mark.parametrize(
    "written", ["1e5000", '{"n": -1e4999}', "[" * 990 + "]" * 990, '{"a":' * 150 + "1" + "}" * 150],
    ids=["many digits", "many digits within", "nested 990 deep", "nested 150 deep"],
)  # fmt: skip
def test_a_holder_that_is_too_much_for_python_hides_nobody(api: Api, conn: Connection, written: str) -> None:
    """SQL takes it from anybody who may acquire; whoever looks has to see the others, and it as well."""
    api.create("database", 2)
    conn.execute("select pglimits.acquire('database', holder => %s::jsonb)", [written])
    conn.execute("select pglimits.acquire('database', holder => '[{}]')")
    conn.execute(
        "select pglimits.acquire('database', slots => 2, timeout_seconds => null, holder => %s::jsonb)", [written]
    )
    strange, ordinary = sorted(api.holders(), key=lambda held: held.fence)
    text = value(conn, "select %s::jsonb::text", [written])
    assert (strange.holder, ordinary.holder) == (text, [{}])
    assert [waiter.holder for waiter in api.waiters()] == [text]


@pytest.mark.parametrize("name", ["a\x00b", "\udc80", "x" * 10_000, "\u00e9 \U0001f512"])
def test_the_default_holder_takes_any_name_of_a_thread_or_task(api: Api, name: str) -> None:
    """Nobody passed it: it is no reason to refuse a slot."""
    api.create("database", 1)

    def take() -> str:
        threading.current_thread().name = name
        with api.limiter.concurrency("database", timeout_seconds=0):
            (holder,) = api.limiter.holders()
            return str(holder.holder["thread"])

    async def take_in_loop() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.set_name(name)
        async with api.limiter.concurrency("database", timeout_seconds=0):
            (holder,) = await api.limiter.holders()
            return str(holder.holder["task"])

    if isinstance(api, AsyncApi):
        shown = asyncio.run_coroutine_threadsafe(take_in_loop(), api.loop).result(60)
    else:
        shown = in_thread(take).result(60)
    assert shown == name[:200].replace("\x00", "?").replace("\udc80", "?")


def test_a_holder_with_a_literal_backslash_u0000_is_fine(api: Api) -> None:
    api.create("database", 5)
    lease = api.acquire("database", holder="C:\\u0000")
    assert api.holders()[0].holder == "C:\\u0000"
    api.release(lease)


def test_an_infinite_timeout_waits_for_ever(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    api.create("database", 1)
    lease = api.acquire("database")
    waits = [api.start("acquire", "database", timeout_seconds=seconds) for seconds in (float("inf"), 1e300, 10**12)]
    wait_until(lambda: waiting(conn) == 3)
    for future in waits:
        api.release(lease)
        wait_until(lambda: any(future.done() for future in waits))
        lease = next(future for future in waits if future.done()).result()
        waits = [future for future in waits if not future.done()]
    api.release(lease)


BAD_CREATES: list[tuple[str, dict[str, Any]]] = [
    ("name", {"name": None}),
    ("name", {"name": 5}),
    ("name", {"name": ""}),
    ("name", {"name": "a%b"}),
    ("name", {"name": "a\tb"}),
    ("name", {"name": "a\x00b"}),
    ("name", {"name": "\ud800"}),
    ("name", {"name": "n" * 201}),
    ("limit", {"limit": None}),
    ("limit", {"limit": -1}),
    ("limit", {"limit": True}),
    ("limit", {"limit": 1.5}),
    ("limit", {"limit": "1"}),
    ("limit", {"limit": 2**31}),
    ("slot_decay_per_second", {"slot_decay_per_second": -1}),
    ("slot_decay_per_second", {"slot_decay_per_second": float("nan")}),
    ("slot_decay_per_second", {"slot_decay_per_second": float("inf")}),
    ("slot_decay_per_second", {"slot_decay_per_second": 1e10}),
    ("slot_decay_per_second", {"slot_decay_per_second": 1e-12}),
    ("slot_decay_per_second", {"slot_decay_per_second": True}),
    ("slot_decay_per_second", {"slot_decay_per_second": "1"}),
    ("slot_decay_per_second", {"slot_decay_per_second": 10**400}),
    ("active", {"active": 1}),
    ("max_waiters", {"max_waiters": -2}),
    ("max_waiters", {"max_waiters": True}),
    ("max_waiters", {"max_waiters": 1.5}),
    ("max_waiters", {"max_waiters": 2**40}),
    ("description", {"description": 5}),
    ("description", {"description": "a\x00b"}),
    ("description", {"description": "\udfff"}),
    ("description", {"description": "d" * 2001}),
]


@pytest.mark.parametrize("method", ["create", "update", "upsert"])
def test_a_bad_property_of_a_limit_is_named_and_changes_nothing(api: Api, method: str) -> None:
    before = api.create("database", 5)
    for argument, given in BAD_CREATES:
        if method == "update" and (given.get("limit", 0) is None):
            continue
        name = "new" if method == "create" else "database"
        arguments = {"name": name, "limit": 5, **given}
        with pytest.raises(InvalidArgument) as caught:
            api.start(method, **arguments).result(30)
            pytest.fail(f"accepted {given}")
        assert argument in str(caught.value), (given, str(caught.value))
    for argument, given in [("new_name", "a/b"), ("new_name", ""), ("new_name", 5), ("new_name", "\ud800")]:
        with pytest.raises(InvalidArgument, match=argument):
            api.update("database", new_name=given)
    assert api.list() == [before]


def test_bad_arguments_of_other_calls_are_named(api: Api) -> None:
    api.create("api", 5, slot_decay_per_second=1)
    for argument, call in [
        ("lease", lambda: api.release("no uuid")),
        ("lease", lambda: api.release(None)),
        ("lease", lambda: api.release(5)),
        ("lease", lambda: api.renew("no uuid")),
        ("lease_duration", lambda: api.renew(uuid4(), 0.5)),
        ("slots", lambda: api.adjust("api", True)),
        ("slots", lambda: api.adjust("api", 1.5)),
        ("slots", lambda: api.adjust("api", 2**40)),
        ("key", lambda: api.adjust("api", 1, "a\x00b")),
        ("key", lambda: api.reset("api", "a\nb")),
        ("name", lambda: api.get(5)),
        ("name", lambda: api.holders(5)),
        ("name", lambda: api.waiters("a\x00b")),
        ("for_rate", lambda: api.peek("api", for_rate=1)),
        ("priority", lambda: api.peek("api", priority="high")),
        ("occupy", lambda: api.peek("api", 0)),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            call()
        assert argument in str(caught.value)
    assert api.get("api").level == 0


def test_releasing_or_renewing_what_never_was_is_false(api: Api) -> None:
    unknown = UUID(int=7)
    assert api.release(unknown) is False
    assert api.release(str(unknown)) is False
    assert api.renew(unknown) is False


def test_a_limiter_checks_its_own_arguments(dsn: str) -> None:
    for cls in (pglimits.Limiter, AsyncLimiter):
        for argument, options in [
            ("dsn", {"dsn": 5}),
            ("dsn", {"dsn": "postgresql://[host/db"}),
            ("dsn", {"dsn": "no such thing"}),
            ("dsn", {"dsn": "mysql://host/db"}),
            ("durable", {"dsn": dsn, "durable": 1}),
            ("on_unavailable", {"dsn": dsn, "on_unavailable": "explode"}),
            ("on_unavailable", {"dsn": dsn, "on_unavailable": None}),
        ]:
            with pytest.raises(InvalidArgument) as caught:
                cls(**options)
            assert argument in str(caught.value)
        pool: ConnectionPool[Any] = ConnectionPool(dsn, open=False)
        with pytest.raises(InvalidArgument, match="pool"):
            cls(dsn, pool=pool)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="pool"):
            cls(pool="not a pool")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="connect"):
            cls(connect="not a function")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="strict"):
            cls(dsn, strict=1)  # type: ignore[arg-type]


def test_a_limiter_and_its_leases_cannot_be_copied_and_go_on_after_it_was_tried(limiter: Any) -> None:
    limiter.create("one", 1)
    lease = limiter.acquire("one")
    for original in (limiter, lease, {"settings": limiter}):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                copied(original)
    gc.collect()  # what there was of a copy closed the descriptors of the original
    assert limiter.release(lease)
    limiter.release(limiter.acquire("one"))


def test_closing_one_of_several_limiters_on_a_database_releases_what_it_holds_and_no_more(
    dsn: str, conn: Connection
) -> None:
    with Limiter(dsn) as stays:
        stays.create("database", 3)
        kept = stays.acquire("database")
        with Limiter(dsn) as goes:
            lease = goes.acquire("database")
            assert held(conn) == 2
        assert held(conn) == 1
        assert not kept.lost
        assert goes.release(lease) is False
        for call in (goes.list, lambda: goes.acquire("database"), lambda: goes.rate_limit("database")):
            with pytest.raises(LimiterUnavailable, match="closed"):
                call()
        assert stays.release(kept)
