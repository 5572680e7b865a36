"""Databases in other encodings than UTF-8: a cluster of a bare machine has SQL_ASCII."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from typing import Protocol

import psycopg
import pytest

from pglimits import AsyncLimiter, InvalidArgument, Limiter, _install


class Server(Protocol):
    def dsn(self, dbname: str) -> str: ...


@pytest.fixture(params=["SQL_ASCII", "LATIN1", "WIN1252", "EUC_JP"])
def encoded_dsn(request: pytest.FixtureRequest, server: Server) -> Iterator[str]:
    """Of a database in that encoding, with pglimits installed."""
    dbname = f"encoded_{uuid.uuid4().hex}"
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        options = f"template template0 encoding '{request.param}' lc_collate 'C' lc_ctype 'C'"
        connection.execute(f"create database {dbname} {options}".encode())
        try:
            _install.install(server.dsn(dbname))
            yield server.dsn(dbname)
        finally:
            connection.execute(f"drop database {dbname} with (force)".encode())


def test_threads_take_and_show_what_is_not_ascii(encoded_dsn: str) -> None:
    with Limiter(encoded_dsn) as limiter:
        for name in ("database", "\u00e9t\u00e9"):
            limiter.upsert(name, limit=2, description=name)
            with limiter.concurrency(name, holder={name: ["\u00fc", None]}, key=name, timeout_seconds=0) as lease:
                (held,) = limiter.holders()
                assert (held.lease_id, held.name, held.key, held.holder) == (
                    lease.id,
                    name,
                    name,
                    {name: ["\u00fc", None]},
                )
                assert limiter.get(name).held == 1
        with limiter.concurrency(["database", "\u00e9t\u00e9"], timeout_seconds=0):
            assert {held.name for held in limiter.holders()} == {"database", "\u00e9t\u00e9"}
        with pytest.raises(InvalidArgument, match="name must not contain control characters"):
            limiter.create("a\nb", limit=1)


def test_nobody_fails_for_a_name_that_it_did_not_choose(encoded_dsn: str) -> None:
    """What the database lacks in the name of a thread or task is left out; what a caller says itself is an error."""
    with psycopg.connect(encoded_dsn) as connection:
        encoding = connection.info.parameter_status("server_encoding")
    assert encoding is not None
    lacks = encoding != "SQL_ASCII"
    name = "\u0416\U0001f600"
    with Limiter(encoded_dsn) as limiter:
        limiter.create("database", limit=9)
        leases = []
        thread = threading.Thread(target=lambda: leases.append(limiter.acquire("database")), name=name)
        thread.start()
        thread.join(30)
        (holder,) = limiter.holders()
        assert holder.holder["thread"] == {"SQL_ASCII": name, "EUC_JP": f"{name[0]}?"}.get(encoding, "??")

        async def in_task() -> None:
            async with AsyncLimiter(encoded_dsn) as tasks:
                kept = await asyncio.create_task(tasks.acquire("database"), name=name)
                assert len(await tasks.holders()) == 2
                await tasks.release(kept)

        asyncio.run(in_task())
        if lacks:
            for call in (
                lambda: limiter.acquire("database", holder=name),
                lambda: limiter.acquire("database", key=name),
                lambda: limiter.create("x", limit=1, description=name),
            ):
                with pytest.raises(InvalidArgument, match="encoding of the database lacks"):
                    call()
        assert limiter.get("database").held == 1
        limiter.release(leases[0])


async def _in_a_loop(dsn: str) -> None:
    async with AsyncLimiter(dsn) as limiter:
        await limiter.upsert("\u00e9t\u00e9", limit=1)
        async with limiter.concurrency("\u00e9t\u00e9", holder="\u00fc", timeout_seconds=0):
            assert [(held.name, held.holder) for held in await limiter.holders()] == [("\u00e9t\u00e9", "\u00fc")]


def test_tasks_take_and_show_what_is_not_ascii(encoded_dsn: str) -> None:
    asyncio.run(_in_a_loop(encoded_dsn))


def test_patterns_mean_the_same_with_backslashes_as_escapes(encoded_dsn: str) -> None:
    with psycopg.connect(encoded_dsn, autocommit=True, options="-c standard_conforming_strings=off") as connection:
        for bad in ("e'a\\nb'", "e'a\\x7fb'"):
            with pytest.raises(psycopg.Error) as caught:
                connection.execute(f"select pglimits.acquire({bad})".encode())
            assert caught.value.sqlstate == "PL001"
