"""What the tests of the Python wrapper share: one face for both limiters, child processes, looks into the database."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeAlias, TypeVar

import poolers
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from pglimits import AsyncLimiter, Lease, Limiter, _courier, _database, _default

T = TypeVar("T")
Connection: TypeAlias = psycopg.Connection[Any]
Future: TypeAlias = "concurrent.futures.Future[Any]"
WaitUntil: TypeAlias = Callable[..., Any]

PATIENCE = 60.0


class Api:
    """A limiter, for threads or for tasks, that a test can call in the same way and from its own thread."""

    kind: str
    limiter: Any

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.start(name, *args, **kwargs).result(PATIENCE)

    def start(self, name: str, /, *args: Any, **kwargs: Any) -> Future:
        """Call a method of the limiter in a thread or a task of its own."""
        raise NotImplementedError

    def start_block(self, names: Any, body: Callable[[Lease], T], **kwargs: Any) -> Future:
        """Run a body in a ``concurrency`` block, in a thread or a task of its own."""
        raise NotImplementedError

    def block(self, names: Any, body: Callable[[Lease], T], **kwargs: Any) -> T:
        result: T = self.start_block(names, body, **kwargs).result(PATIENCE)
        return result


class SyncApi(Api):
    kind = "sync"

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter

    def start(self, name: str, /, *args: Any, **kwargs: Any) -> Future:
        return in_thread(getattr(self.limiter, name), *args, **kwargs)

    def start_block(self, names: Any, body: Callable[[Lease], T], **kwargs: Any) -> Future:
        def work() -> T:
            with self.limiter.concurrency(names, **kwargs) as lease:
                return body(lease)

        return in_thread(work)


class AsyncApi(Api):
    kind = "async"

    def __init__(self, limiter: AsyncLimiter, loop: asyncio.AbstractEventLoop) -> None:
        self.limiter = limiter
        self.loop = loop

    def start(self, name: str, /, *args: Any, **kwargs: Any) -> Future:
        async def call() -> Any:
            return await getattr(self.limiter, name)(*args, **kwargs)

        return asyncio.run_coroutine_threadsafe(call(), self.loop)

    def start_block(self, names: Any, body: Callable[[Lease], T], **kwargs: Any) -> Future:
        async def work() -> T:
            async with self.limiter.concurrency(names, **kwargs) as lease:
                return await asyncio.to_thread(body, lease)

        return asyncio.run_coroutine_threadsafe(work(), self.loop)


def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
    """Call a function in a daemon thread: one that hangs fails its test and not the whole run."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


@contextlib.contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-loop", daemon=True)
    thread.start()

    async def cancel_all() -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(cancel_all(), loop).result(PATIENCE)
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


@contextlib.contextmanager
def open_api(kind: str, **options: Any) -> Iterator[Api]:
    """A limiter of that kind (``sync`` or ``async``) with these options, closed at the end."""
    if kind == "sync":
        with Limiter(**options) as limiter:
            yield SyncApi(limiter)
        return
    with event_loop() as loop:

        async def make() -> AsyncLimiter:
            return AsyncLimiter(**options)

        async_limiter = asyncio.run_coroutine_threadsafe(make(), loop).result(PATIENCE)
        try:
            yield AsyncApi(async_limiter, loop)
        finally:
            asyncio.run_coroutine_threadsafe(async_limiter.close(), loop).result(PATIENCE)


@contextlib.contextmanager
def open_every(dsn: str, autocommit: bool = True) -> Iterator[dict[str, Api]]:
    """Limiters of all kinds on a database, by what to call them: with its DSN, and with pools of the caller's."""
    options: dict[str, Any] = {"min_size": 1, "max_size": 3, "open": False, "kwargs": {"autocommit": autocommit}}
    with contextlib.ExitStack() as opened:
        pool: ConnectionPool[Any] = opened.enter_context(ConnectionPool(dsn, **options))
        loop = opened.enter_context(event_loop())

        async def enter() -> AsyncConnectionPool[Any]:
            in_loop: AsyncConnectionPool[Any] = AsyncConnectionPool(dsn, **options)
            await in_loop.open()
            return in_loop

        def run_in_loop(work: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result(60)

        in_loop = run_in_loop(enter())
        opened.callback(lambda: run_in_loop(in_loop.close()))

        async def of_pool() -> AsyncLimiter:
            return AsyncLimiter(pool=in_loop, on_unavailable="wait")

        made: dict[str, Api] = {
            f"{kind} that {how}s": opened.enter_context(open_api(kind, dsn=dsn, on_unavailable=how))
            for kind in ("sync", "async")
            for how in ("raise", "wait")
        }
        limiter = opened.enter_context(Limiter(pool=pool, on_unavailable="wait"))
        made["sync with a pool"] = SyncApi(limiter)
        made["async with a pool"] = AsyncApi(run_in_loop(of_pool()), loop)
        yield made
        run_in_loop(made["async with a pool"].limiter.close())


@pytest.fixture(params=["sync", "async"])
def api(request: pytest.FixtureRequest, dsn: str) -> Iterator[Api]:
    """A limiter on the test's database: each test runs with one for threads and with one for tasks."""
    with open_api(request.param, dsn=dsn) as opened:
        yield opened


@pytest.fixture
def limiter(dsn: str) -> Iterator[Limiter]:
    """A limiter for threads on the test's database."""
    with Limiter(dsn) as opened:
        yield opened


@pytest.fixture
def environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """PGLIMITS_DSN names the test's database, for the functions of pglimits.sync and pglimits.asyncio."""
    monkeypatch.setenv("PGLIMITS_DSN", dsn)
    monkeypatch.setattr(_default, "_limiter", None)
    yield dsn
    if _default._limiter is not None:
        _default._limiter.close()


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    for courier in list(_courier._couriers):
        courier.shut()
    _courier._shared.clear()


# Looks into the database.


def value(conn: Connection, sql: str, params: Any = ()) -> Any:
    row = conn.execute(sql.encode(), params).fetchone()
    assert row is not None
    return row[0]


def held(conn: Connection, name: str | None = None) -> int:
    return int(
        value(conn, "select coalesce(sum(held), 0) from pglimits.limits where name = coalesce(%s, name)", [name])
    )


def waiting(conn: Connection, name: str | None = None) -> int:
    return int(
        value(conn, "select coalesce(sum(waiting), 0) from pglimits.limits where name = coalesce(%s, name)", [name])
    )


def nothing_left(conn: Connection) -> bool:
    """Nobody holds a slot and nobody waits."""
    return held(conn) == 0 and waiting(conn) == 0


def backends(conn: Connection, query: str = "", application: str = "pglimits") -> list[int]:
    """The server's processes that serve the wrapper and whose last statement has this in it."""
    rows = conn.execute(
        "select pid from pg_stat_activity where datname = current_database() and application_name = %s"
        " and query like %s order by pid",
        [application, f"%{query}%"],
    ).fetchall()
    return [row[0] for row in rows]


def listeners(conn: Connection) -> list[int]:
    """The connections that listen: what they last did is LISTEN, its test, or a look at those who wait."""
    rows = conn.execute(
        "select pid from pg_stat_activity where datname = current_database() and application_name = 'pglimits'"
        " and query ~ 'pglimits._watch|pglimits._beat|pg_notify|listen pglimits' order by pid"
    ).fetchall()
    return [row[0] for row in rows]


def is_watched(conn: Connection) -> bool:
    """Somebody listens for those who wait. Behind a pooler, where nobody can, they look again and again."""
    return poolers.MODE is not None or len(listeners(conn)) == 1


def lose_reply(monkeypatch: pytest.MonkeyPatch, then: Callable[[], Any], of: str = "_acquire_batch") -> None:
    """The connection of the first statement of that kind breaks once the server has answered, and nobody hears it."""
    real, lost = _database.Connection.receive, []

    def lossy(connection: _database.Connection) -> Any:
        result = real(connection)
        if result is not None and not lost and of in repr(connection.sent):
            lost.append(result)
            then()
            connection.pgconn.finish()
            raise psycopg.OperationalError("the reply was lost")
        return result

    monkeypatch.setattr(_database.Connection, "receive", lossy)


class Locked:
    """Keeps a limit locked in a transaction of its own."""

    def __init__(self, connect: Any, *names: str) -> None:
        self.connection = connect(autocommit=False)
        for name in names:
            # Its key '' must exist for it to be locked; what this takes is undone.
            self.connection.execute("select pglimits.acquire(%s)", [name])
            # A refusal locks nothing.
            self.connection.execute(
                "select from pglimits.states where limit_id in (select limit_id from pglimits.configs where name = %s)"
                " for update",
                [name],
            )

    def unlock(self) -> None:
        self.connection.rollback()


class Busy(Locked):
    """Keeps a limit locked as somebody does who is at work: batches wait for it, however slow the machine is."""

    def __init__(self, connect: Any, *names: str) -> None:
        for function in ("_acquire_batch", "_release_batch"):
            connect().execute(f"alter function pglimits.{function} set lock_timeout = '60s'")
        super().__init__(connect, *names)


def terminate(conn: Connection, pids: list[int]) -> None:
    conn.execute("select pg_terminate_backend(pid) from unnest(%s::int[]) as u(pid)", [pids])


# Child processes.


class Child:
    """A Python process that runs a piece of code. What it prints are its messages."""

    def __init__(self, code: str, *args: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", textwrap.dedent(code), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.pid = self.process.pid

    def tell(self, message: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """The next line that it prints. Fails if it ends instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, errors = self.process.communicate(timeout=PATIENCE)
            pytest.fail(f"the child ended with {self.process.returncode}: {errors}")
        return line.rstrip("\n")

    def expect(self, message: str) -> None:
        assert self.hear() == message

    def end(self, code: int | None = 0) -> str:
        """Wait for its end, with that exit code unless None. Returns what else it printed."""
        said, errors = self.process.communicate(timeout=PATIENCE)
        assert code is None or self.process.returncode == code, f"{self.process.returncode}: {said}{errors}"
        self.errors = errors
        return said

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ValueError):
            self.process.communicate(timeout=PATIENCE)


class Children:
    """Starts child processes that know the test's database, and ends them with the test."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.all: list[Child] = []

    def __call__(self, code: str, *args: str, env: dict[str, str] | None = None) -> Child:
        child = Child(code, *args, env={**self.env, **(env or {})})
        self.all.append(child)
        return child


@pytest.fixture
def children(dsn: str, server_dsn: str) -> Iterator[Children]:
    """Starts Python processes: ``children(code, *args)``. Their PGLIMITS_DSN is the test's database.

    With what is in their SERVER_DSN they can look at it as ``conn`` does.
    """
    started = Children({"PGLIMITS_DSN": dsn, "SERVER_DSN": server_dsn})
    yield started
    for child in started.all:
        child.stop()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, for tests of what only tasks can do."""
    return asyncio.run(coroutine)
