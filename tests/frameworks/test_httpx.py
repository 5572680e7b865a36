"""Limits for calls by httpx, to a real server on this machine."""

from __future__ import annotations

import asyncio
import email.utils
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from pglimits import AsyncLimiter, InvalidArgument, Limiter, LimitNotFound
from pglimits.httpx import AsyncLimitTransport, LimitTransport

LOCAL = "127.0.0.1"
TOGETHER = threading.Barrier(8)


class Server(BaseHTTPRequestHandler):
    """Answers with the status and the Retry-After of the query; its answers are two chunks."""

    def do_GET(self) -> None:
        query = httpx.URL(self.path).params
        if "together" in query:
            TOGETHER.wait(20)
        self.send_response_only(int(query.get("status", "200")))
        for name in ("Retry-After", "Date"):
            if name in query:
                self.send_header(name, query[name])
        self.send_header("Content-Length", "20000")
        self.end_headers()
        self.wfile.write(b"x" * 20_000)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer((LOCAL, 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{LOCAL}:{server.server_port}/"
        server.shutdown()


def get(how: str, dsn: str, url: str, pool: float = 0, **options: Any) -> httpx.Response:
    """One call, by a client for threads or one for tasks."""
    timeout = httpx.Timeout(20, pool=pool)
    if how == "sync":
        with Limiter(dsn) as limiter, httpx.Client(transport=LimitTransport(limiter=limiter, **options)) as client:
            return client.get(url, timeout=timeout)

    async def work() -> httpx.Response:
        async with (
            AsyncLimiter(dsn) as limiter,
            httpx.AsyncClient(transport=AsyncLimitTransport(limiter=limiter, **options)) as client,
        ):
            return await client.get(url, timeout=timeout)

    return asyncio.run(work())


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, dsn: str, url: str) -> Callable[..., httpx.Response]:
    return lambda query="", **options: get(request.param, dsn, url + query, **options)


def test_a_call_beyond_the_rate_of_its_host_is_a_pool_timeout(
    call: Callable[..., httpx.Response], limiter: Limiter
) -> None:
    limiter.create(LOCAL, 2, slot_decay_per_second=0.001)
    assert [call().status_code, call().status_code] == [200, 200]
    with pytest.raises(httpx.PoolTimeout, match="no slot"):
        call()
    assert call(name=lambda request: None).status_code == 200
    limiter.create("other", 1, slot_decay_per_second=0.001)
    assert call(name="other", key="a").status_code == 200
    assert call(name="other", key="b").status_code == 200


@pytest.mark.parametrize("said", ["seconds", "a date", "a date of a server whose clock is wrong"])
def test_retry_after_makes_everybody_wait(call: Callable[..., httpx.Response], limiter: Limiter, said: str) -> None:
    limiter.create(LOCAL, 10, slot_decay_per_second=10)
    now = time.time() + (86400 if "wrong" in said else 0)
    until, date = (email.utils.formatdate(at, usegmt=True) for at in (now + 61, now + 1))
    query = "Retry-After=60" if said == "seconds" else f"Retry-After={until}&Date={date if 'wrong' in said else ''}"
    assert call(f"?status=429&{query}").status_code == 429
    told = limiter.peek(LOCAL, for_rate=True)
    assert (told.status, 40 < (told.retry_after or 0) < 62) == ("refused", True)
    assert limiter.peek(LOCAL, key="other", for_rate=True).status == "granted"
    with pytest.raises(httpx.PoolTimeout):
        call()


def test_several_that_hear_it_at_once_raise_it_once(dsn: str, url: str, limiter: Limiter) -> None:
    limiter.create(LOCAL, 100, slot_decay_per_second=10)
    transport = LimitTransport(limiter=limiter)
    with httpx.Client(transport=transport, timeout=30) as client, ThreadPoolExecutor(8) as threads:
        asked = [url + "?status=503&Retry-After=30&together="] * 8
        assert {each.status_code for each in threads.map(client.get, asked)} == {503}
    assert 20 < (limiter.peek(LOCAL, for_rate=True).retry_after or 0) < 31


@pytest.mark.parametrize(
    "query", ["status=429", "status=429&Retry-After=soon", "status=500&Retry-After=60", "status=429&Retry-After=0"]
)
def test_other_answers_change_nothing(dsn: str, url: str, limiter: Limiter, query: str) -> None:
    limiter.create(LOCAL, 10, slot_decay_per_second=10)
    get("sync", dsn, f"{url}?{query}")
    assert limiter.peek(LOCAL, for_rate=True).status == "granted"


def test_no_answer_makes_everybody_wait_longer_than_it_may(dsn: str, url: str, limiter: Limiter) -> None:
    limiter.create(LOCAL, 10, slot_decay_per_second=10)
    get("sync", dsn, f"{url}?status=429&Retry-After={10**30}", longest_retry_after=50)
    assert 30 < (limiter.peek(LOCAL, for_rate=True).retry_after or 0) < 51


def test_a_role_that_may_not_adjust_is_warned(
    conn: Any, server_dsn: str, url: str, limiter: Limiter, caplog: pytest.LogCaptureFixture
) -> None:
    limiter.create(LOCAL, 10, slot_decay_per_second=10)
    conn.execute("drop role if exists only_caller")
    conn.execute("create role only_caller login in role pglimits_user")
    assert get("async", server_dsn + " user=only_caller", f"{url}?status=429&Retry-After=60").status_code == 429
    assert "pglimits_admin" in caplog.text


def test_a_slot_is_held_until_the_response_is_closed(dsn: str, url: str, limiter: Limiter) -> None:
    limiter.create(LOCAL, 1)
    with httpx.Client(transport=LimitTransport(limiter=limiter, kind="concurrency"), timeout=30) as client:
        with client.stream("GET", url) as response:
            assert [holder.holder["host"] for holder in limiter.holders()] == [LOCAL]
            with pytest.raises(httpx.PoolTimeout):
                client.get(url, timeout=httpx.Timeout(20, pool=0))
            response.read()
        assert limiter.holders() == []
        assert client.get(url + "?status=429&Retry-After=60").status_code == 429
        assert client.get(url).content == b"x" * 20_000

    async def work() -> None:
        async with AsyncLimiter(dsn) as tasks:
            transport = AsyncLimitTransport(limiter=tasks, kind="concurrency")
            async with httpx.AsyncClient(transport=transport, timeout=30) as client:
                async with client.stream("GET", url):
                    assert len(await tasks.holders()) == 1
                assert await tasks.holders() == []
                waiting = asyncio.create_task(client.get(url))
                await waiting
                assert await tasks.holders() == []

    asyncio.run(work())


def test_a_call_that_fails_gives_its_slot_back(call: Callable[..., httpx.Response], limiter: Limiter) -> None:
    limiter.create("gone", 1)

    class Failing(httpx.BaseTransport, httpx.AsyncBaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("nobody is there")

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("nobody is there")

    for _ in range(2):
        with pytest.raises(httpx.ConnectError):
            call(kind="concurrency", name="gone", transport=Failing())
    assert limiter.holders() == []


def test_a_call_that_is_cancelled_while_it_heeds_an_answer_gives_its_connection_back(
    dsn: str, conn: Any, url: str, limiter: Limiter
) -> None:
    limiter.create(LOCAL, 5, slot_decay_per_second=1)
    busy = "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"

    async def work() -> None:
        only_one = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=1))
        async with (
            asyncio.timeout(60),
            AsyncLimiter(dsn) as tasks,
            httpx.AsyncClient(transport=AsyncLimitTransport(only_one, tasks), timeout=15) as client,
        ):
            await client.get(url)
            with conn.transaction():
                conn.execute("lock table pglimits.configs in access exclusive mode")
                asking = asyncio.create_task(client.get(url + "?status=429&Retry-After=1"))
                while not conn.execute(busy).fetchone():
                    await asyncio.sleep(0.01)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            assert asking.cancelled()
            assert (await client.get(url)).status_code == 200

    asyncio.run(work())


def test_mistakes_are_told(call: Callable[..., httpx.Response]) -> None:
    assert call().status_code == 200  # no limit of that name
    with pytest.raises(LimitNotFound):
        call(strict=True)
    with pytest.raises(InvalidArgument, match="kind must be"):
        call(kind="both")
    with pytest.raises(InvalidArgument, match="longest_retry_after"):
        call(longest_retry_after=-1)
