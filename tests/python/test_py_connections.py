"""Connections are the app's, and what is read is ours: nothing that an app does to psycopg reaches the wrapper."""

from __future__ import annotations

import asyncio
import contextlib
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import poolers
import psycopg
import pytest
from psycopg import AsyncClientCursor, AsyncRawCursor, ClientCursor, RawCursor, sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import ExecStatus
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from wrappertest import (
    Api,
    AsyncApi,
    Children,
    Connection,
    SyncApi,
    WaitUntil,
    backends,
    event_loop,
    held,
    in_thread,
    nothing_left,
    open_api,
    run,
    value,
    waiting,
)

from pglimits import AsyncLimiter, InvalidArgument, Limiter, LimiterUnavailable, _connections, _courier, _database
from pglimits._requests import Errand, Release, Request, checked, new_id

KINDS = ["sync", "async"]

# What an app sets for all of psycopg.

SETTINGS = {
    "nothing": "",
    "uuid as text": """
        class Text(Loader):
            def load(self, data): return bytes(data).decode()
        class Binary(Loader):
            format = Format.BINARY
            def load(self, data): return str(uuid.UUID(bytes=bytes(data)))
        for loader in (Text, Binary):
            psycopg.adapters.register_loader("uuid", loader)
    """,
    "json as text": "psycopg.types.json.set_json_loads(lambda data: data)",
    "json with Decimal": "psycopg.types.json.set_json_loads(functools.partial(json.loads, parse_float=Decimal))",
    "numbers and moments as text": """
        class Text(Loader):
            def load(self, data): return bytes(data).decode()
        class Binary(Text):
            format = Format.BINARY
            def load(self, data): return bytes(data).hex()
        for name in ("int4", "int8", "float8", "bool", "text", "timestamptz"):
            for loader in (Text, Binary):
                psycopg.adapters.register_loader(name, loader)
    """,
    "texts and lists dumped otherwise": """
        class Bad(psycopg.adapt.Dumper):
            def dump(self, obj): return b"nonsense"
        for kind in (str, list, int, bool, float, uuid.UUID):
            psycopg.adapters.register_dumper(kind, Bad)
    """,
    "OpenTelemetry with its commenter": """
        from opentelemetry import trace
        from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
        from opentelemetry.sdk.trace import TracerProvider
        trace.set_tracer_provider(TracerProvider())
        PsycopgInstrumentor().instrument(enable_commenter=True)
    """,
    "a tracer around connections": """
        import wrapt
        class Traced(wrapt.ObjectProxy):
            def cursor(self, *args, **kwargs): raise AssertionError
            def execute(self, *args, **kwargs): raise AssertionError
        real = psycopg.Connection.connect
        psycopg.Connection.connect = classmethod(lambda cls, *args, **kwargs: Traced(real(*args, **kwargs)))
    """,
}

USES = """
    import asyncio, functools, json, sys, time, uuid
    from decimal import Decimal
    import psycopg
    from psycopg.adapt import Loader
    from psycopg.pq import Format
    exec(sys.argv[1])
    from pglimits import AsyncLimiter, Limiter
    limiter = Limiter()
    holder = {"who": [1.5, None], "id": "x"}
    with limiter.concurrency("database", holder=holder, timeout_seconds=3, lease_duration=1, strict=True) as lease:
        (mine,) = limiter.holders("database")
        assert (mine.lease_id, mine.holder, mine.fence, type(mine.fence)) == (lease.id, holder, lease.fence, int), mine
        first = lease.expires_at
        while lease.expires_at == first:
            time.sleep(0.01)
        assert not lease.lost
        assert (limiter.get("database").held, limiter.get("database").level) == (1, 0.0)
    limiter.rate_limit("api")
    async def main():
        async with AsyncLimiter() as limiter, limiter.concurrency(["database", "api"], timeout_seconds=3) as lease:
            assert len(await limiter.holders()) == 2
    asyncio.run(main())
    print("done")
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_an_app_sets_for_all_of_psycopg_makes_no_difference(
    limiter: Limiter, conn: Connection, children: Children, setting: str
) -> None:
    limiter.create("database", 1)
    limiter.create("api", 100, slot_decay_per_second=100)
    child = children(USES, textwrap.dedent(SETTINGS[setting]))
    child.expect("done")
    child.end()
    assert nothing_left(conn)


# Pools, and functions that connect.


@contextlib.contextmanager
def on_pool(kind: str, dsn: Any, **options: Any) -> Iterator[Api]:
    """A limiter on a pool of that kind."""
    with contextlib.ExitStack() as opened:
        if kind == "sync":
            pool = opened.enter_context(ConnectionPool(dsn, min_size=1, max_size=2, open=True, **options))
            yield SyncApi(opened.enter_context(Limiter(pool=pool)))
            return
        loop = opened.enter_context(event_loop())

        async def enter() -> tuple[Any, AsyncLimiter]:
            pool: Any = AsyncConnectionPool(dsn, min_size=1, max_size=2, open=False, **options)
            await pool.open()
            return pool, AsyncLimiter(pool=pool)

        pool, limiter = asyncio.run_coroutine_threadsafe(enter(), loop).result(30)
        yield AsyncApi(limiter, loop)
        asyncio.run_coroutine_threadsafe(limiter.close(), loop).result(30)
        asyncio.run_coroutine_threadsafe(pool.close(), loop).result(30)


def serves(api: Api, other: Limiter, conn: Connection, wait_until: WaitUntil) -> None:
    """Slots are taken, leases renewed, and waiters told."""
    lease = api.acquire("database", lease_duration=1, timeout_seconds=10)
    first = lease.expires_at
    wait_until(lambda: lease.expires_at != first)
    assert not lease.lost
    assert api.release(lease)
    held_by_other = other.acquire("database")
    waits = api.start("acquire", "database", timeout_seconds=30)
    wait_until(lambda: waiting(conn) == 1)
    other.release(held_by_other)
    assert api.release(waits.result(30))
    assert (held(conn, "database"), waiting(conn, "database")) == (0, 0)


@pytest.mark.parametrize("cursor", ["client", "raw", "dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_may_make_any_cursors_and_rows(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, kind: str, cursor: str
) -> None:
    limiter.create("database", 1)
    factories = {"client": (ClientCursor, AsyncClientCursor), "raw": (RawCursor, AsyncRawCursor)}
    options: dict[str, Any] = {"row_factory": dict_row}
    if cursor in factories:
        options = {"cursor_factory": factories[cursor][kind == "async"]}
    with on_pool(kind, dsn, kwargs=options) as api:
        serves(api, limiter, conn, wait_until)


@pytest.fixture
def roles(conn: Connection) -> Iterator[Any]:
    """roles(name, options): makes a role that is gone with the test. Returns its name."""
    made: list[str] = []

    def make(suffix: str, options: str = "login in role pglimits_user, pglimits_reader") -> str:
        name = f"{conn.info.dbname}_{suffix}"
        conn.execute(sql.SQL("create role {} " + options).format(sql.Identifier(name)))
        made.append(name)
        return name

    yield make
    for name in reversed(made):
        conn.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.mark.parametrize("how", ["sync", "async", "async function"])
def test_credentials_that_rotate_are_asked_for_at_each_connect(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, roles: Any, how: str
) -> None:
    limiter.create("database", 1)
    old, new = roles("old"), roles("new")
    now = {"user": old}

    def conninfo() -> str:
        return make_conninfo(dsn, user=now["user"])

    async def in_task() -> str:
        return conninfo()

    with on_pool(how.split()[0], in_task if how == "async function" else conninfo) as api:
        assert api.release(api.acquire("database"))
        now["user"] = new
        conn.execute(sql.SQL("alter role {} nologin").format(sql.Identifier(old)))
        conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [old])
        serves(api, limiter, conn, wait_until)


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_class_may_know_what_a_conninfo_does_not(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, roles: Any, kind: str
) -> None:
    limiter.create("database", 1)
    known = roles("known")

    class Knows(psycopg.Connection[Any]):
        @classmethod
        def connect(cls, conninfo: str = "", **options: Any) -> Any:
            return super().connect(make_conninfo(conninfo, user=known), **options)

    class AsyncKnows(psycopg.AsyncConnection[Any]):
        @classmethod
        async def connect(cls, conninfo: str = "", **options: Any) -> Any:
            return await super().connect(make_conninfo(conninfo, user=known), **options)

    options: dict[str, Any] = {"connection_class": Knows if kind == "sync" else AsyncKnows}
    with on_pool(kind, make_conninfo(dsn, user="nobody_there"), **options) as api:
        serves(api, limiter, conn, wait_until)


@poolers.straight_only("a pooler in transaction mode knows no role of a session")
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_may_configure_its_connections(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, roles: Any, kind: str
) -> None:
    limiter.create("database", 1)
    worker = roles("worker", "in role pglimits_user, pglimits_reader")
    login = roles("login", f'login noinherit in role "{worker}"')
    set_role = sql.SQL("set role {}").format(sql.Identifier(worker))

    def configure(connection: psycopg.Connection[Any]) -> None:
        connection.execute(set_role)
        connection.commit()

    async def configure_async(connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute(set_role)
        await connection.commit()

    options: dict[str, Any] = {"configure": configure if kind == "sync" else configure_async}
    with on_pool(kind, make_conninfo(dsn, user=login), **options) as api:
        serves(api, limiter, conn, wait_until)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool_kind", KINDS)
def test_either_limiter_takes_either_pool(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, kind: str, pool_kind: str
) -> None:
    limiter.create("database", 1)
    pool: Any = (ConnectionPool if pool_kind == "sync" else AsyncConnectionPool)(dsn, open=False)
    with open_api(kind, pool=pool) as api:
        serves(api, limiter, conn, wait_until)


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_the_apps_opens_the_connections(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, kind: str
) -> None:
    limiter.create("database", 1)
    mine = make_conninfo(dsn, application_name="mine")

    def connect() -> psycopg.Connection[Any]:
        return psycopg.connect(mine)

    async def connect_async() -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(mine)

    for function in (connect, connect_async):
        with open_api(kind, connect=function) as api:
            serves(api, limiter, conn, wait_until)
            if poolers.MODE is None:
                assert backends(conn, application="mine")
        wait_until(lambda: not backends(conn, application="mine") or poolers.MODE)


def test_what_a_function_that_connects_raises_or_returns_is_said(limiter: Limiter) -> None:
    def fails() -> Any:
        raise OSError("no token to be had")

    with Limiter(connect=fails) as unlucky, pytest.raises(LimiterUnavailable, match="no token to be had"):
        unlucky.acquire("database")
    with Limiter(connect=lambda: "nonsense") as wrong, pytest.raises(InvalidArgument, match="connect"):  # type: ignore
        wrong.acquire("database")


# Connections that are not to be had.


@poolers.straight_only("a limit of a role on connections is the pooler's matter")
@pytest.mark.parametrize("kind", KINDS)
def test_where_one_connection_is_all_that_is_to_be_had_everything_goes_over_it(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, roles: Any, kind: str
) -> None:
    for name in ("database", "other"):
        limiter.create(name, 1)
    lonely = roles("lonely", "login connection limit 1 in role pglimits_user, pglimits_reader")
    with open_api(kind, dsn=make_conninfo(dsn, user=lonely)) as api:
        lease = api.acquire("other", lease_duration=2)
        first = lease.expires_at
        serves(api, limiter, conn, wait_until)
        waits = [api.start("acquire", "other", timeout_seconds=20) for _ in range(2)]
        wait_until(lambda: waiting(conn) == 2)
        wait_until(lambda: value(conn, "select clock_timestamp() > %s + interval '3 s'", [first]))
        assert not lease.lost
        # It hears of grants as well.
        assert [connection.listens for connection in api.limiter._courier.connections._all.values()] == [True]
        api.release(lease)
        while waits:
            (done,) = wait_until(lambda: [wait for wait in waits if wait.done()])
            waits.remove(done)
            api.release(done.result())
    assert nothing_left(conn)


@poolers.straight_only("a limit of a role on connections is the pooler's matter")
def test_a_pool_lends_a_connection_where_no_further_one_is_to_be_had(
    dsn: str, limiter: Limiter, conn: Connection, roles: Any, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lonely = roles("lonely", "login connection limit 1 in role pglimits_user, pglimits_reader")
    with (
        ConnectionPool(make_conninfo(dsn, user=lonely), min_size=1, max_size=1, open=True) as pool,
        Limiter(pool=pool) as mine,
    ):
        pool.wait()
        with mine.concurrency("database", lease_duration=1) as lease:
            first = lease.expires_at
            # It has its connection back meanwhile.
            with pool.connection(timeout=10) as connection:
                assert connection.execute("select 1").fetchone() == (1,)
            wait_until(lambda: lease.expires_at != first)
            assert held(conn) == 1
        assert nothing_left(conn)


def test_limiters_of_one_pool_or_function_share_their_connections_also_where_nobody_closes_them(
    dsn: str, limiter: Limiter, conn: Connection
) -> None:
    limiter.create("database", 1)
    named = make_conninfo(dsn, application_name="of_one")

    class App:
        def connect(self) -> Connection:
            return psycopg.connect(named, autocommit=True)

    app = App()
    with ConnectionPool(named, min_size=1, max_size=1, open=True) as pool:
        pool.wait()
        limiters = [Limiter(pool=pool) for _ in range(30)] + [Limiter(connect=app.connect) for _ in range(30)]
        for each in limiters:
            with each.concurrency("database"):
                pass
        opened = value(conn, "select count(*) from pg_stat_activity where application_name = 'of_one'")
        assert opened <= 1 + 2 * 3
        limiters[0].close()
        with limiters[1].concurrency("database"):
            assert held(conn) == 1
        for each in limiters:
            each.close()


def test_a_connection_that_is_of_no_use_is_named_as_the_reason(dsn: str) -> None:
    def in_pipeline_mode() -> Connection:
        connection: Connection = psycopg.connect(dsn, autocommit=True)
        connection.pgconn.enter_pipeline_mode()
        return connection

    with (
        Limiter(connect=in_pipeline_mode) as limiter,
        pytest.raises(LimiterUnavailable, match="pipeline mode"),
    ):
        limiter.acquire("database", timeout_seconds=5)


# Loops that end, and processes that fork.


def test_what_the_tasks_of_a_loop_hold_and_wait_for_is_given_back_when_it_is_closed(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    for name in ("database", "other"):
        limiter.create(name, 1)
    tasks = AsyncLimiter(dsn)

    async def works() -> None:
        async with tasks.concurrency("database"):
            await asyncio.sleep(3600)

    loop = asyncio.new_event_loop()
    # Kept, so that it is not the garbage collector that ends them.
    kept = [loop.create_task(works()), loop.create_task(works())]
    loop.run_until_complete(_until(lambda: (held(conn), waiting(conn)) == (1, 1)))
    outlives = loop.run_until_complete(tasks.acquire("other"))
    loop.close()
    wait_until(lambda: (held(conn, "database"), waiting(conn)) == (0, 0))
    # What a task has handed out before it ended is held on.
    assert held(conn, "other") == 1
    assert not outlives.lost
    assert run(tasks.release(outlives))
    for task in kept:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        with contextlib.suppress(RuntimeError):
            task.get_coro().close()  # type: ignore[union-attr]
    run(tasks.close())


async def _until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_many_loops_in_many_threads_share_a_limit(dsn: str, limiter: Limiter, conn: Connection) -> None:
    limiter.create("database", 2)
    tasks = AsyncLimiter(dsn)
    over: list[int] = []
    at_once = [0]
    lock = threading.Lock()

    async def work() -> None:
        async with tasks.concurrency("database", timeout_seconds=60):
            with lock:
                at_once[0] += 1
                assert at_once[0] <= 2
            await asyncio.sleep(0.001)
            with lock:
                at_once[0] -= 1

    async def many(number: int) -> None:
        await asyncio.gather(*[work() for _ in range(10)])
        over.append(number)

    threads = [threading.Thread(target=lambda n=n: asyncio.run(many(n)), daemon=True) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(over) == list(range(6))
    run(tasks.close())
    assert nothing_left(conn)


def test_a_loop_within_a_task_of_another_loop_is_served(dsn: str, limiter: Limiter, conn: Connection) -> None:
    """A call of sync code, from a task, that runs a loop of its own in a thread, while the outer loop is blocked."""
    limiter.create("database", 2)

    async def inner() -> None:
        async with AsyncLimiter(dsn) as tasks, tasks.concurrency("database", timeout_seconds=20):
            pass

    async def outer() -> None:
        async with AsyncLimiter(dsn) as tasks, tasks.concurrency("database", timeout_seconds=20):
            thread = threading.Thread(target=lambda: asyncio.run(inner()))
            thread.start()
            thread.join(30)  # the outer loop stands still
            assert not thread.is_alive()
            with limiter.concurrency("database", timeout_seconds=20):
                pass

    asyncio.run(outer())
    assert nothing_left(conn)


def test_gevent_is_served_also_where_it_is_put_in_place_after_a_fork(
    limiter: Limiter, conn: Connection, children: Children
) -> None:
    limiter.create("database", 1)
    child = children(
        """
        import faulthandler, os, sys
        faulthandler.dump_traceback_later(50, exit=True)
        from pglimits.sync import concurrency
        with concurrency("database"):  # before the fork, as a server that loads the app first
            pass
        if os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
        from gevent import monkey
        monkey.patch_all()
        import gevent
        ticks = []
        def tick():
            while True:
                ticks.append(1)
                gevent.sleep(0.01)
        gevent.spawn(tick)
        def work():
            with concurrency("database", timeout_seconds=20, lease_duration=1, strict=True):
                gevent.sleep(0.5)
        gevent.joinall([gevent.spawn(work) for _ in range(4)], raise_error=True)
        assert len(ticks) > 20, ticks  # nobody blocked the others
        print("done", flush=True)
        os._exit(0)
        """
    )
    child.expect("done")
    child.end()
    assert nothing_left(conn)


# Rare moments of the courier.


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_batch_that_is_larger_than_what_a_socket_takes_at_once_goes_through(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is prepared first, and what follows is sent from within the answer to that."""
    limiter.create("database", 200)
    real, go_on = _database.Source.open, threading.Event()

    def held_up(self: _database.Source) -> Any:
        assert go_on.wait(30)
        return real(self)

    failed: list[Exception] = []
    monkeypatch.setattr(_database.Source, "open", held_up)
    with open_api(kind, dsn=dsn, durable=False) as api:
        monkeypatch.setattr(api.limiter._courier.connections, "_failed", lambda _, error: failed.append(error))
        waits = [api.start("acquire", "database", holder="x" * 7900) for _ in range(128)]
        outbox = api.limiter._courier.outbox
        wait_until(lambda: sum(len(lane.errands) for lane in list(outbox._requests.values())) == 128)
        go_on.set()
        wait_until(lambda: failed or all(wait.done() for wait in waits), timeout=60)
        assert not failed
        for wait in waits:
            assert api.release(wait.result())
    assert nothing_left(conn)


def test_closing_an_unused_limiter_leaves_the_others_on_its_database_alone(dsn: str, conn: Connection) -> None:
    unused, used = Limiter(dsn), Limiter(dsn)
    unused.close()
    used.create("database", 1)
    with Limiter(dsn) as later, later.concurrency("database", timeout_seconds=20):
        assert held(conn) == 1
    used.close()


def test_an_interrupt_that_strikes_who_wakes_the_courier_lets_it_be_woken_by_others(
    dsn: str, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    with Limiter(dsn) as limiter:
        limiter.create("database", 1)
        wait_until(lambda: limiter._courier._asleep)

        def strike() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as struck, pytest.raises(KeyboardInterrupt):
            struck.setattr(limiter._courier.bell, "ring", strike)
            limiter.get("database")
        assert in_thread(lambda: limiter.get("database")).result(30).limit == 1


def test_a_request_that_is_given_up_before_it_is_sent_keeps_back_nothing_else(
    dsn: str, conn: Connection, wait_until: WaitUntil
) -> None:
    with Limiter(dsn) as limiter:
        for name in ("one", "other"):
            limiter.create(name, 1)
        lease = limiter.acquire("other")
        courier = limiter._courier
        given_up = threading.Event()

        def both(_: object) -> None:  # as if they came at once
            kind = checked("one", 1, None, None, 300, False, None, "", 0)
            request = Request(kind, "null", False, new_id(), "raise", None, True, None)
            courier.ask(request)
            courier.give_up(request)
            courier.release(Release(lease.id, lease.places))
            given_up.set()

        courier.put(both, Errand())
        assert given_up.wait(20)
        wait_until(lambda: nothing_left(conn))


@pytest.mark.parametrize("call", ["get", "release"])
def test_closing_the_last_limiter_answers_whoever_still_waits_for_an_answer(
    dsn: str, conn: Connection, connect: Any, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(_courier, "_ENDS_WITHIN", 0.5)
    limiter = Limiter(dsn)
    limiter.create("database", 1)
    lease_id = limiter.acquire("database", renew=False).id
    other = connect(autocommit=False)
    other.execute("lock table pglimits.configs, pglimits.leases in access exclusive mode")
    waits = in_thread(getattr(limiter, call), "database" if call == "get" else lease_id)
    blocked = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    wait_until(lambda: value(conn, blocked))
    limiter.close()
    with pytest.raises(LimiterUnavailable):
        waits.result(30)
    other.rollback()


def test_where_all_connections_are_busy_as_somebody_begins_to_wait_one_of_them_hears_of_grants(
    dsn: str, limiter: Limiter, conn: Connection, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connections, "CONNECTIONS", 2)
    limiter.create("database", 1)
    lease = limiter.acquire("database")
    with Limiter(dsn, durable=False) as mine:
        assert mine.version()
        courier = mine._courier
        courier.put(lambda _: courier.connections._grow(time.monotonic()), Errand())
        wait_until(lambda: len(courier.connections) == 2)
        waits = in_thread(mine.acquire, "database")
        wait_until(lambda: waiting(conn) == 1)
        wait_until(lambda: poolers.MODE or mine._courier.connections.listens())
        limiter.release(lease)
        assert mine.release(waits.result(30))


def test_where_no_thread_can_be_started_that_is_said_and_it_goes_on_when_one_can(
    dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _connections._thread.start_new_thread

    def none(function: Any, *rest: Any) -> Any:
        if function is _connections._open:
            raise RuntimeError("can't start new thread")
        return real(function, *rest)

    with Limiter(dsn) as limiter:
        with monkeypatch.context() as starved:
            starved.setattr(_connections._thread, "start_new_thread", none)
            with pytest.raises(LimiterUnavailable, match="can't start new thread"):
                limiter.acquire("database")
        assert limiter.version()


# Results.


def test_of_the_results_of_a_statement_the_first_error_counts(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        make = connection.pgconn.make_empty_result
        rows, done = make(ExecStatus.TUPLES_OK), make(ExecStatus.COMMAND_OK)
        ended, gone = make(ExecStatus.FATAL_ERROR), make(ExecStatus.FATAL_ERROR)
        assert _database._graver(None, rows) is rows
        assert _database._graver(rows, gone) is gone
        assert _database._graver(ended, gone) is ended
        assert _database._graver(rows, done) is rows


def test_a_connection_that_ends_behind_the_rows_is_a_database_that_cannot_be_reached(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        made = connection.pgconn.make_empty_result(ExecStatus.FATAL_ERROR)
        with pytest.raises(psycopg.OperationalError) as caught:
            _database._raise(made)
        assert isinstance(_database.translate(caught.value), LimiterUnavailable)


def test_a_character_that_a_database_in_sql_ascii_cannot_have_is_no_other_version(server: Any) -> None:
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        connection.execute("create database ascii_only encoding 'SQL_ASCII' locale 'C' template template0")
    try:
        there = psycopg.connect(server.dsn("ascii_only"), client_encoding="utf8")
        with there, pytest.raises(psycopg.Error) as caught:
            there.execute("""select '"\\u00fc"'::jsonb""")
        said = _database.translate(caught.value)
        assert isinstance(said, InvalidArgument) and "the encoding of the database lacks a character" in str(said)
    finally:
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
            connection.execute("drop database ascii_only with (force)")
