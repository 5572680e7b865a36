"""pglimits.sync and pglimits.asyncio: the same as Prefect's, and which database they use."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import importlib
import inspect
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from wrappertest import Connection, WaitUntil, held, in_thread, nothing_left, run, value, waiting

import pglimits.asyncio
import pglimits.sync
from pglimits import (
    AcquireTimeout,
    AsyncLimiter,
    InvalidArgument,
    Lease,
    LeaseLost,
    Limiter,
    LimitNotFound,
    SlotsExceedLimit,
    _dsn,
)

BOTH = pytest.mark.parametrize("module", [pglimits.sync, pglimits.asyncio], ids=["sync", "asyncio"])

# What Prefect 3 has, in its order; and behind it, by keyword only, what it does not have.
CONCURRENCY = [
    ("names", inspect.Parameter.empty),
    ("occupy", 1),
    ("timeout_seconds", None),
    ("max_retries", None),
    ("lease_duration", 300),
    ("strict", False),
    ("holder", None),
    ("raise_on_lease_renewal_failure", None),
]
OURS = [("key", ""), ("priority", 0)]
RATE_LIMIT = [
    ("names", inspect.Parameter.empty),
    ("occupy", 1),
    ("timeout_seconds", None),
    ("strict", False),
    ("key", ""),
]


def parameters(function: Any, kind: Any = None) -> list[tuple[str, Any]]:
    return [
        (p.name, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.name != "self" and (kind is None or p.kind is kind)
    ]


@pytest.mark.parametrize(
    "function",
    [
        pglimits.sync.concurrency,
        pglimits.asyncio.concurrency,
        Limiter.concurrency,
        AsyncLimiter.concurrency,
    ],
)
def test_concurrency_has_prefects_parameters_in_its_order(function: Any) -> None:
    assert parameters(function, inspect.Parameter.POSITIONAL_OR_KEYWORD) == CONCURRENCY
    assert parameters(function, inspect.Parameter.KEYWORD_ONLY) == OURS


@pytest.mark.parametrize(
    "function",
    [pglimits.sync.rate_limit, pglimits.asyncio.rate_limit, Limiter.rate_limit, AsyncLimiter.rate_limit],
)
def test_rate_limit_has_prefects_parameters_in_its_order(function: Any) -> None:
    assert parameters(function) == RATE_LIMIT


@BOTH
def test_the_modules_export_what_they_say(module: ModuleType) -> None:
    assert set(module.__all__) == {"Lease", "acquire", "concurrency", "rate_limit"}


# Examples as they stand in Prefect's documentation, with only the import changed.

PREFECT = [
    (
        """
from prefect.concurrency.sync import concurrency

def process_data(x, y):
    with concurrency("database", occupy=1):
        return x + y

assert [process_data(x, y) for x, y in [(1, 2), (2, 3), (3, 4), (4, 5)]] == [3, 5, 7, 9]
""",
        {"database"},
    ),
    (
        """
import asyncio
from prefect.concurrency.asyncio import concurrency

async def process_data(x, y):
    async with concurrency("database", occupy=1):
        return x + y

async def my_flow():
    return await asyncio.gather(*(process_data(x, y) for x, y in [(1, 2), (2, 3), (3, 4), (4, 5)]))

assert asyncio.run(my_flow()) == [3, 5, 7, 9]
""",
        {"database"},
    ),
    (
        """
from prefect.concurrency.sync import rate_limit

def make_http_request():
    rate_limit("rate-limited-api")
    return "made an HTTP request"

assert [make_http_request() for _ in range(5)] == ["made an HTTP request"] * 5
""",
        {"rate-limited-api"},
    ),
    (
        """
import asyncio
from prefect.concurrency.asyncio import rate_limit

async def main():
    for _ in range(3):
        await rate_limit("data-processing", occupy=2)
    await rate_limit(["rate-limited-api", "data-processing"], occupy=1, timeout_seconds=10, strict=True)

asyncio.run(main())
""",
        {"rate-limited-api", "data-processing"},
    ),
    (
        """
from prefect.concurrency.sync import concurrency

with concurrency(["database", "cache"], occupy=1, timeout_seconds=30, max_retries=5, lease_duration=60.0, strict=True):
    pass
try:
    with concurrency("database", 1, 0, None, 60.0, True, None):
        with concurrency("database", occupy=5, timeout_seconds=0.01):
            raise AssertionError
except TimeoutError:
    print("timed out")
""",
        {"database", "cache"},
    ),
]


@pytest.mark.parametrize("code, used", PREFECT, ids=["sync", "async", "rate", "async-rate", "options"])
def test_examples_written_for_prefect_run_with_only_the_import_changed(
    environment: str, conn: Connection, tmp_path: Path, code: str, used: set[str]
) -> None:
    with Limiter(environment) as limiter:
        for name in ("database", "cache"):
            limiter.create(name, 5)
        for name in ("rate-limited-api", "data-processing"):
            limiter.create(name, 5, slot_decay_per_second=50)
    changed = code.replace("prefect.concurrency", "pglimits")
    assert changed.count("pglimits") == 1
    script = tmp_path / "example.py"
    script.write_text(changed)
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    # It really used the limits: each has a state now.
    rows = conn.execute("select distinct c.name from pglimits.states s join pglimits.configs c using (limit_id)")
    assert {row[0] for row in rows} == used
    assert nothing_left(conn)


# The module-level functions.


def test_the_functions_of_the_sync_module(environment: str, conn: Connection) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 2)
        limiter.create("api", 2, slot_decay_per_second=1e-6)
    with pglimits.sync.concurrency("database", 2, holder={"job": 7}) as lease:
        assert isinstance(lease, Lease)
        assert (held(conn), value(conn, "select holder from pglimits.holders")) == (2, {"job": 7})
    assert held(conn) == 0
    pglimits.sync.rate_limit("api", 2)
    with pytest.raises(AcquireTimeout):
        pglimits.sync.rate_limit("api", timeout_seconds=1)
    pglimits.sync.rate_limit("api", key="other")
    with pytest.raises(LimitNotFound):
        pglimits.sync.rate_limit("nowhere", strict=True)
    with pytest.raises(SlotsExceedLimit), pglimits.sync.concurrency("database", 3):
        pass


def test_the_functions_of_the_asyncio_module(environment: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter(environment) as limiter:
            await limiter.create("database", 2)
            await limiter.create("api", 2, slot_decay_per_second=1e-6)
        async with pglimits.asyncio.concurrency("database", 2, holder={"job": 7}) as lease:
            assert isinstance(lease, Lease)
            assert (held(conn), value(conn, "select holder from pglimits.holders")) == (2, {"job": 7})
        assert held(conn) == 0
        await pglimits.asyncio.rate_limit("api", 2)
        with pytest.raises(AcquireTimeout):
            await pglimits.asyncio.rate_limit("api", timeout_seconds=1)
        await pglimits.asyncio.rate_limit("api", key="other")
        with pytest.raises(LimitNotFound):
            await pglimits.asyncio.rate_limit("nowhere", strict=True)
        with pytest.raises(SlotsExceedLimit):
            async with pglimits.asyncio.concurrency("database", 3):
                pass

    run(main())


# Decorators.


@BOTH
def test_a_decorated_function_holds_slots_while_it_runs_and_a_coroutine_function_too(
    environment: str, conn: Connection, module: ModuleType
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 2)

    @module.concurrency("database", occupy=2)
    def job(x: int, *, y: int = 0) -> tuple[int, int]:
        """What the job does."""
        return x + y, held(conn)

    @module.concurrency("database")
    async def coroutine_job(x: int) -> tuple[int, int]:
        await asyncio.sleep(0)
        return x, held(conn)

    assert (job.__name__, job.__doc__) == ("job", "What the job does.")
    assert asyncio.iscoroutinefunction(coroutine_job)
    assert not asyncio.iscoroutinefunction(job)
    for _ in range(3):
        assert job(1, y=2) == (3, 2)
        assert run(coroutine_job(5)) == (5, 1)
    assert held(conn) == 0


@BOTH
def test_a_decorated_function_gives_its_slots_back_when_it_raises(
    environment: str, conn: Connection, module: ModuleType
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 1)

    @module.concurrency("database")
    def job() -> None:
        raise ZeroDivisionError

    @module.concurrency("database")
    async def coroutine_job() -> None:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            job()
        with pytest.raises(ZeroDivisionError):
            run(coroutine_job())
    assert held(conn) == 0


@BOTH
def test_calls_of_a_decorated_function_at_the_same_time_hold_a_lease_each(
    environment: str, conn: Connection, module: ModuleType, wait_until: WaitUntil
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 2)
    go = threading.Event()

    @module.concurrency("database")
    def job() -> None:
        go.wait(60)

    calls = [in_thread(job) for _ in range(4)]
    wait_until(lambda: held(conn) == 2 and waiting(conn) == 2)
    go.set()
    for call in calls:
        call.result(30)
    assert nothing_left(conn)

    @module.concurrency("database")
    async def coroutine_job() -> int:
        await asyncio.sleep(0.001)
        return held(conn)

    async def main() -> list[int]:
        return await asyncio.gather(*(coroutine_job() for _ in range(10)))

    seen = run(main())
    assert all(1 <= count <= 2 for count in seen)
    assert nothing_left(conn)


@BOTH
def test_a_recursive_decorated_function_holds_a_lease_for_each_level(
    environment: str, conn: Connection, module: ModuleType
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 3)

    @module.concurrency("database", strict=True)
    def job(depth: int) -> list[int]:
        mine = [held(conn)]
        return mine if depth == 1 else [*mine, *job(depth - 1), held(conn)]

    assert job(3) == [1, 2, 3, 2, 1]
    assert held(conn) == 0


def test_one_context_entered_several_times_at_once_keeps_its_leases_apart(
    environment: str, conn: Connection, wait_until: WaitUntil
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 4)
    shared = pglimits.sync.concurrency("database", strict=True)
    with shared as outer:
        with shared as inner:
            assert held(conn) == 2
        assert [row[0] for row in conn.execute("select lease_id from pglimits.holders")] == [outer.id]
        assert inner.released
        assert not outer.released
    # And in threads: whoever leaves first must not give back another's lease.
    entered, leave_first, leave_second = threading.Event(), threading.Event(), threading.Event()

    def first() -> bool:
        with shared as mine:
            entered.set()
            leave_first.wait(60)
        return mine.released

    def second() -> bool:
        entered.wait(60)
        with shared as mine:
            leave_first.set()
            leave_second.wait(60)
            assert not mine.released
        return mine.released

    a, b = in_thread(first), in_thread(second)
    assert a.result(30)
    leave_second.set()
    assert b.result(30)
    assert nothing_left(conn)


def test_one_async_context_entered_by_several_tasks_keeps_its_leases_apart(environment: str, conn: Connection) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 2)

    async def main() -> None:
        shared = pglimits.asyncio.concurrency("database", strict=True)
        entered, inside, left = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def first() -> None:
            async with shared as lease:
                entered.set()
                await inside.wait()
            assert lease.released
            left.set()

        async def second() -> None:
            await entered.wait()
            async with shared as lease:
                inside.set()
                await left.wait()
                assert not lease.released
            assert lease.released

        await asyncio.wait_for(asyncio.gather(first(), second()), 30)

    run(main())
    assert nothing_left(conn)


@BOTH
def test_a_decorated_method_without_an_instance_holds_slots_while_it_runs(
    environment: str, conn: Connection, module: ModuleType
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 1)

    class Jobs:
        @module.concurrency("database")
        @staticmethod
        def static(x: int) -> tuple[int, int]:
            return x, held(conn)

        @module.concurrency("database")
        @staticmethod
        async def static_coroutine(x: int) -> tuple[int, int]:
            await asyncio.sleep(0)
            return x, held(conn)

        @module.concurrency("database")
        @classmethod
        def of_class(cls) -> tuple[type, int]:
            return cls, held(conn)

        @module.concurrency("database")
        @classmethod
        async def coroutine_of_class(cls) -> tuple[type, int]:
            await asyncio.sleep(0)
            return cls, held(conn)

    for jobs in (Jobs, Jobs()):
        assert jobs.static(5) == (5, 1)
        assert run(jobs.static_coroutine(5)) == (5, 1)
        assert jobs.of_class() == (Jobs, 1)
        assert run(jobs.coroutine_of_class()) == (Jobs, 1)
    assert held(conn) == 0


@BOTH
def test_a_decorated_object_whose_calls_are_coroutines_holds_slots_while_they_run(
    environment: str, conn: Connection, module: ModuleType
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 1)

    class Job:
        async def __call__(self, x: int) -> tuple[int, int]:
            await asyncio.sleep(0)
            return x, held(conn)

    for job in (Job(), functools.partial(Job()), functools.partial(Job().__call__)):
        decorated = module.concurrency("database")(job)
        assert asyncio.iscoroutinefunction(decorated)
        assert run(decorated(5)) == (5, 1)
    # To call the class itself is to make an object.
    assert isinstance(module.concurrency("database")(Job)(), Job)
    assert held(conn) == 0


@BOTH
def test_a_decorated_function_that_returns_what_would_run_without_its_slots_raises(
    environment: str, conn: Connection, module: ModuleType
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 1)
    ran: list[str] = []

    async def coroutine() -> None:
        ran.append("coroutine")

    def generator() -> Any:
        yield ran.append("generator")

    async def async_generator() -> Any:
        yield ran.append("async generator")

    for function in (coroutine, generator, async_generator):
        for job in (lambda function=function: function(), functools.lru_cache(function)):
            with pytest.raises(InvalidArgument, match="when its slots have been given back"):
                module.concurrency("database")(job)()
            assert nothing_left(conn)
    assert not ran


@BOTH
def test_a_decorated_function_that_returns_at_once_what_works_later_raises_and_lets_nothing_run(
    environment: str, conn: Connection, module: ModuleType
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 1)
    ran: list[str] = []

    @contextlib.contextmanager
    def context() -> Any:
        yield ran.append("context")

    @contextlib.asynccontextmanager
    async def async_context() -> Any:
        yield ran.append("async context")

    async def work() -> None:
        ran.append("task")

    def task() -> Any:
        return asyncio.get_running_loop().create_task(work())

    def future() -> Any:
        return asyncio.get_running_loop().create_future()

    async def later() -> Any:
        return task()

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        go_on = threading.Event()
        threads.submit(go_on.wait)

        def submitted() -> Any:
            return threads.submit(ran.append, "submitted")

        async def calls() -> None:
            for function in (context, async_context, task, future, submitted, later):
                with pytest.raises(InvalidArgument, match="when its slots have been given back"):
                    made = module.concurrency("database")(function)()
                    if function is later:
                        await made
                await asyncio.sleep(0)

        asyncio.run(calls())
        go_on.set()
    assert not ran
    assert nothing_left(conn)
    # Entered inside, or as a coroutine, it is as it should be.
    with module.concurrency("database")(lambda: contextlib.nullcontext(5))() as five:
        assert five == 5


def test_a_strict_limiter_is_strict_in_all_calls(dsn: str, conn: Connection, wait_until: WaitUntil) -> None:
    with Limiter(dsn, strict=True) as limiter:
        limiter.create("database", 1)
        for call in (
            limiter.acquire,
            limiter.rate_limit,
            limiter.peek,
            lambda name: limiter.concurrency(name)(print)(),
        ):
            with pytest.raises(LimitNotFound, match="no-such-limit"):
                call("no-such-limit")
        with pytest.raises(LimitNotFound), limiter.concurrency(["database", "no-such-limit"]):
            pass
        with pytest.raises(LeaseLost), limiter.concurrency("database") as lease:
            conn.execute("select pglimits.release(%s)", [lease.id])

    async def in_tasks() -> None:
        async with AsyncLimiter(dsn, strict=True) as tasks:
            with pytest.raises(LimitNotFound):
                await tasks.acquire("no-such-limit")
            with pytest.raises(LimitNotFound):
                async with tasks.concurrency("no-such-limit"):
                    pass

    run(in_tasks())
    assert nothing_left(conn)


@BOTH
def test_what_is_not_a_function_cannot_be_decorated(environment: str, module: ModuleType) -> None:
    def generator() -> Any:
        yield 1

    async def async_generator() -> Any:
        yield 1

    class Yields:
        def __call__(self) -> Any:
            yield 1

    wrapped = (staticmethod(generator), classmethod(async_generator), functools.partial(generator), Yields())
    for wrong in (generator, async_generator, *wrapped, 5, None):
        with pytest.raises(InvalidArgument):
            module.concurrency("database")(wrong)


@BOTH
def test_bad_arguments_are_found_when_the_decorator_is_written(environment: str, module: ModuleType) -> None:
    with pytest.raises(InvalidArgument, match="occupy"):
        module.concurrency("database", occupy=0)


def test_importing_and_decorating_connects_to_nothing(tmp_path: Path) -> None:
    """Where nothing answers and no DSN is given: neither is noticed, and no thread or server is started."""
    code = """
import os, sys, threading
os.environ.pop("PGLIMITS_DSN", None); os.environ.pop("DATABASE_URL", None)
os.environ["PGLIMITS_HOME"] = sys.argv[1]
import pglimits, pglimits.sync, pglimits.asyncio
@pglimits.sync.concurrency("database")
def a(): pass
@pglimits.asyncio.concurrency("database", strict=True)
async def b(): pass
c = pglimits.sync.concurrency({("a", "k"): 2})
limiter = pglimits.Limiter("postgresql://nowhere.invalid/x")
@limiter.concurrency("database")
def d(): pass
assert threading.active_count() == 1, threading.enumerate()
assert not os.path.exists(sys.argv[1])
print("fine")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "home")], capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.stdout == "fine\n", ended.stderr


def test_a_strict_decorated_function_that_lost_its_lease_raises(environment: str, conn: Connection) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 1)

    @pglimits.sync.concurrency("database", strict=True)
    def job() -> None:
        conn.execute("select pglimits.reset('database')")

    with pytest.raises(LeaseLost):
        job()


def test_a_lease_of_the_sync_module_is_released_at_the_exit_of_the_process(
    environment: str, conn: Connection, children: Any
) -> None:
    with Limiter(environment) as limiter:
        limiter.create("database", 1)
    child = children(
        """
        from pglimits.sync import concurrency
        block = concurrency("database")
        block.__enter__()
        print("holds")
        input()
        """
    )
    child.expect("holds")
    assert held(conn) == 1
    child.tell()
    child.end()
    assert held(conn) == 0


# Which database.


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("PGLIMITS_DSN", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_argument_comes_before_pglimits_dsn_and_that_before_database_url(
    bare_environment: pytest.MonkeyPatch,
) -> None:
    bare_environment.setenv("DATABASE_URL", "postgresql://host/url")
    assert (_dsn.resolve().source, conninfo_to_dict(_dsn.resolve().conninfo)["dbname"]) == ("DATABASE_URL", "url")
    bare_environment.setenv("PGLIMITS_DSN", "host=host dbname=ours")
    assert conninfo_to_dict(_dsn.resolve().conninfo)["dbname"] == "ours"
    assert conninfo_to_dict(_dsn.resolve("dbname=mine").conninfo)["dbname"] == "mine"


@pytest.mark.parametrize("variable", ["PGLIMITS_DSN", "DATABASE_URL"])
@pytest.mark.parametrize(
    "scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2", "postgresql+asyncpg"]
)
def test_urls_as_other_tools_write_them_are_understood(
    dsn: str, conn: Connection, bare_environment: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    from urllib.parse import quote

    to = conninfo_to_dict(dsn)
    url = f"{scheme}://{to['user']}@/{to['dbname']}?host={quote(str(to['host']), safe='')}&port={to['port']}"
    bare_environment.setenv(variable, url)
    with Limiter() as limiter:
        limiter.create("database", 1)
    assert value(conn, "select count(*) from pglimits.limits") == 1


@pytest.mark.parametrize("variable", ["PGLIMITS_DSN", "DATABASE_URL"])
def test_a_bad_dsn_in_the_environment_names_its_variable(bare_environment: pytest.MonkeyPatch, variable: str) -> None:
    bare_environment.setenv(variable, "mysql://host/db")
    with pytest.raises(InvalidArgument, match=variable):
        Limiter()


@pytest.mark.parametrize("bad", ["host=\udcff", "postgresql://\udcff/x", "postgresql://host/%ff", "host=h\0", "host"])
def test_what_is_no_dsn_is_an_error_of_the_argument(bare_environment: pytest.MonkeyPatch, bad: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^dsn is not a PostgreSQL connection string"):
        Limiter(bad)


def test_a_password_in_a_bad_dsn_is_not_told(bare_environment: pytest.MonkeyPatch) -> None:
    for bad in ("postgresql://me:s3cret@[host/db", "host=x password=s3cret nonsense"):
        with pytest.raises(InvalidArgument) as caught:
            Limiter(bad)
        assert "s3cret" not in str(caught.value)


def test_connections_have_a_name_that_an_administrator_recognizes(dsn: str, conn: Connection, environment: str) -> None:
    with Limiter(dsn) as limiter:
        limiter.list()
        names = {row[0] for row in conn.execute("select application_name from pg_stat_activity where state = 'idle'")}
        assert "pglimits" in names
    with Limiter(f"{dsn} application_name=mine") as limiter:
        limiter.list()
        names = {row[0] for row in conn.execute("select application_name from pg_stat_activity where state = 'idle'")}
        assert "mine" in names


def test_only_the_embedded_server_is_installed_into_unasked(
    server: Any, bare_dsn: str, bare_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(pglimits.NotInstalled), Limiter(bare_dsn) as limiter:
        limiter.list()
    with psycopg.connect(bare_dsn) as connection:
        assert value(connection, "select to_regnamespace('pglimits') is null")


def test_without_any_dsn_the_embedded_server_is_used_and_installed_into(
    server: Any, bare_environment: pytest.MonkeyPatch
) -> None:
    import shutil
    import tempfile

    from pglimits import _embedded

    folder = Path(tempfile.mkdtemp(prefix="pgl-"))
    folder.chmod(0o711)
    bare_environment.setenv("PGLIMITS_HOME", str(folder / "h"))
    try:
        with Limiter() as limiter:
            assert limiter.create("database", 1).limit == 1
        with Limiter() as again:
            assert [limit.name for limit in again.list()] == ["database"]
        assert _embedded.stop()
    finally:
        _embedded.stop()
        shutil.rmtree(folder)


def test_the_modules_can_be_imported_in_any_order() -> None:
    for first, second in (("pglimits.sync", "pglimits.asyncio"), ("pglimits.asyncio", "pglimits.sync")):
        code = f"import {first}, {second}; import asyncio; asyncio.run(asyncio.sleep(0))"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
    assert importlib.import_module("asyncio") is asyncio


def test_a_context_may_be_left_by_another_thread_than_the_one_that_entered_it(
    environment: str, conn: Connection
) -> None:
    Limiter().create("database", 2)
    context = pglimits.sync.concurrency("database")
    in_thread(context.__enter__).result(30)
    with pglimits.sync.concurrency("database"):
        assert held(conn) == 2
        in_thread(context.__exit__, None, None, None).result(30)
        assert held(conn) == 1


def test_a_context_may_be_left_by_another_task_than_the_one_that_entered_it(environment: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter() as limiter:
            await limiter.create("database", 1)
            context = limiter.concurrency("database")
            await asyncio.create_task(context.__aenter__())
            assert held(conn) == 1
            await asyncio.create_task(context.__aexit__(None, None, None))
            assert held(conn) == 0

    run(main())
