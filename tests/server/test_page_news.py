"""News for open pages: what is told, and that an answer to news has them."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from servertest import Server
from test_server_live import looking

from pglimits.server import _page_live
from pglimits.server._page_live import Shared, news


def test_who_asks_because_of_news_gets_an_answer_with_them(shared: Server, shared_dsn: str) -> None:
    part = {"HX-Request": "true"}
    with (
        psycopg.connect(shared_dsn, autocommit=True) as connection,
        shared.client() as http,
        shared.client() as listener,
        listener.stream("GET", "/news?name=gpu") as stream,
    ):
        words = (line[6:].strip() for line in stream.iter_lines() if line.startswith("event:"))

        def is_shown(text: str, path: str) -> None:
            """It looks again only when it is told."""
            while text not in http.get(path, headers=part).text:
                while next(words) != "news":
                    pass

        assert next(words) == "look"
        connection.execute("select pglimits.create_limit('gpu', 100)")
        for _ in range(8):
            lease = str(uuid4())
            http.get("/limits/gpu", headers=part)
            http.get("/events")
            connection.execute("select pglimits.acquire('gpu', lease_id => %s)", [lease])
            is_shown(lease, "/limits/gpu")
            connection.execute("select pglimits.update_limit('gpu', description => %s)", [lease])
            is_shown(lease, "/events")


def test_an_answer_is_shared_unless_it_was_begun_too_early_and_made_by_one_at_a_time() -> None:
    async def run() -> None:
        shared = Shared()
        made: list[float] = []
        at_work = 0

        async def make() -> int:
            nonlocal at_work
            at_work += 1
            assert at_work == 1
            made.append(time.monotonic())
            await asyncio.sleep(0.02)
            at_work -= 1
            return len(made)

        began = time.monotonic()
        assert await asyncio.gather(*(shared.get("a", 9, make) for _ in range(5))) == [1] * 5
        assert await shared.get("a", 9, make, after=began) == 1
        running = asyncio.ensure_future(shared.get("a", 9, make, after=time.monotonic()))
        while len(made) < 2:
            await asyncio.sleep(0)
        later = time.monotonic()
        assert await asyncio.gather(*(shared.get("a", 9, make, after=later) for _ in range(5))) == [3] * 5
        assert await running == 2

    asyncio.run(run())


def test_a_page_is_told_to_look_and_only_of_changes_that_there_is_news(
    dsn: str, conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_page_live, "_BEATS", 0.3)
    monkeypatch.setattr(_page_live, "_LOOKS_ANYWAY", 1.0)
    conn.execute("select pglimits.create_limit('one', 5), pglimits.create_limit('two', 5)")

    async def run() -> None:
        async with looking(dsn) as (_, live):
            for name in ("one", None):
                async with aclosing(news(live, name)) as told:
                    word, mark = await anext(told)
                    assert word == "look"
                    while word != "beat":
                        word, _ = await anext(told)
                    while word == "beat":
                        word, same = await anext(told)
                    assert (word, same) == ("look", mark)
                async with aclosing(news(live, name, mark)) as told:
                    assert await anext(told) == ("look", mark)
                    conn.execute("select pglimits.acquire('one')")
                    while word != "news":
                        word, now = await anext(told)
                    assert now != mark
                async with aclosing(news(live, name, mark)) as told:
                    assert await anext(told) == ("news", now)

    asyncio.run(run())
