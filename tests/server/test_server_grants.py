"""How the server asks for slots: what it does where the database is busy, locked, or breaks off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from pglimits._database import Busy
from pglimits.errors import LimiterUnavailable, LimitLocked
from pglimits.server import _database
from pglimits.server._app import _close, _sweep_on
from pglimits.server._batches import Alike, Batches
from pglimits.server._grants import Grants
from pglimits.server._listener import Listener

Connect = Callable[..., psycopg.Connection[Any]]


class Database(_database.Database):
    """A real one that counts, and fails as it is told to: before it asks, or when it was answered."""

    asked = 0
    before: tuple[Exception, ...] = ()
    after: Exception | None = None
    answer: list[dict[str, Any]] | None = None

    async def rows(self, *arguments: Any, **options: Any) -> Any:
        self.asked += 1
        if self.before:
            error, *rest = self.before
            self.before = tuple(rest)
            raise error
        found = await super().rows(*arguments, **options)
        if self.after is not None:
            raise self.after
        return found if self.answer is None else self.answer


def alike(*names: str) -> Alike:
    return Alike(names, (1,) * len(names), ("",) * len(names), False, 60.0, 0, False)


async def asks(batches: Batches, kind: Alike, times: int = 1) -> list[Any]:
    asking = [batches.ask(kind, uuid4(), "null") for _ in range(times)]
    return await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 20)


def with_batches(dsn: str, work: Callable[[Database, Batches], Any]) -> Any:
    async def go() -> Any:
        database = Database(dsn)
        await database.open()
        try:
            return await work(database, Batches(database, asyncio.Semaphore(3)))
        finally:
            await database.close()

    return asyncio.run(go())


def with_grants(dsn: str, work: Callable[[Database, Grants], Any]) -> Any:
    async def go() -> Any:
        database = Database(dsn)
        listener = Listener(database.conninfo)
        await database.open()
        grants = Grants(database, listener)
        try:
            return await work(database, grants)
        finally:
            await grants.close()
            await listener.close()
            await database.close()

    return asyncio.run(go())


def test_a_batch_that_meets_a_locked_limit_is_not_sent_one_by_one(dsn: str, connect: Connect) -> None:
    locker = connect(autocommit=False)
    locker.execute("select pglimits.create_limit('stuck', 9)")
    locker.commit()
    locker.execute("select pglimits.acquire('stuck')")

    async def work(database: Database, batches: Batches) -> tuple[list[Any], int]:
        return await asks(batches, alike("stuck"), 4), database.asked

    answers, asked = with_batches(dsn, work)
    assert ([type(answer) for answer in answers], asked) == ([LimitLocked] * 4, 1)


def test_a_batch_that_met_a_deadlock_is_sent_again(dsn: str, conn: psycopg.Connection[Any]) -> None:
    conn.execute("select pglimits.create_limit('one', 1)")

    async def work(database: Database, batches: Batches) -> list[Any]:
        database.before = (Busy("deadlock detected"),)
        return await asks(batches, alike("one"))

    assert [answer.status for answer in with_batches(dsn, work)] == ["granted"]


def test_an_answer_that_does_not_fit_is_told_and_the_next_is_asked_for(dsn: str) -> None:
    async def work(database: Database, batches: Batches) -> list[Any]:
        database.answer = []
        broken = await asks(batches, alike("missing"), 2)
        database.answer = None
        return [*broken, *await asks(batches, alike("missing"))]

    *broken, last = with_batches(dsn, work)
    assert [type(answer) for answer in broken] == [ValueError] * 2
    assert last.status == "unlimited"


def test_who_may_wait_is_asked_for_again_after_a_deadlock(dsn: str, conn: psycopg.Connection[Any]) -> None:
    conn.execute("select pglimits.create_limit('one', 1)")

    async def work(database: Database, grants: Grants) -> Any:
        database.before = (Busy("deadlock detected"),)
        return await grants.acquire(["one"], timeout=60, hold=30, lease_id=uuid4())

    assert with_grants(dsn, work).status == "granted"


def test_a_limit_asked_for_with_a_locked_one_is_not_taken_for_locked(dsn: str, connect: Connect) -> None:
    locker = connect(autocommit=False)
    locker.execute("select pglimits.create_limit('a', 9), pglimits.create_limit('b', 9)")
    locker.commit()
    locker.execute("select pglimits.acquire('a')")

    async def work(database: Database, grants: Grants) -> tuple[Any, int]:
        with pytest.raises(LimitLocked):
            await grants.acquire(["a", "b"], timeout=60, lease_id=uuid4())
        asked = database.asked
        with pytest.raises(LimitLocked):
            await grants.acquire(["a", "b"], timeout=60, lease_id=uuid4())
        assert database.asked == asked  # that was known
        return await grants.acquire(["b"], timeout=60, lease_id=uuid4())

    assert with_grants(dsn, work).status == "granted"


def test_a_place_whose_answer_was_lost_is_given_up(dsn: str, conn: psycopg.Connection[Any]) -> None:
    conn.execute("select pglimits.create_limit('one', 1)")
    conn.execute("select pglimits.acquire('one')")

    async def work(database: Database, grants: Grants) -> None:
        database.after = LimiterUnavailable("the connection broke off")
        with pytest.raises(LimiterUnavailable):
            await grants.acquire(["one"], timeout=60)

    with_grants(dsn, work)
    assert conn.execute("select count(*) from pglimits.waiters").fetchone() == (0,)


class Counted(Listener):
    """One that counts how often it connects."""

    connected = 0

    async def _listen_once(self) -> None:
        self.connected += 1
        await super()._listen_once()


def test_behind_a_pooler_it_is_not_tried_again_and_again_to_listen(pooled: Callable[..., str]) -> None:
    async def work() -> int:
        listener = Counted(pooled("transaction", size=2))
        for _ in range(3):
            with listener.news_of("x"):
                assert listener._task is not None
                await asyncio.wait([listener._task], timeout=20)
        await listener.close()
        return listener.connected

    assert asyncio.run(work()) == 1


def test_the_listener_goes_on_whatever_happens(dsn: str) -> None:
    async def work() -> None:
        listener = Counted(dsn)
        told = asyncio.Event()

        def tell() -> None:
            if listener.connected == 1:
                raise RuntimeError("nobody expects that")
            told.set()

        listener.on_event(tell)
        with listener.news_of("x"):
            await asyncio.wait_for(told.wait(), 20)
        await listener.close()

    asyncio.run(work())


def test_a_sweep_that_fails_is_not_the_last(dsn: str, conn: psycopg.Connection[Any]) -> None:
    conn.execute("select pglimits.create_limit('one', 1)")
    conn.execute("select pglimits.acquire('one', lease_duration => 1)")

    async def work(database: Database, _: Batches) -> None:
        database.before = (RuntimeError("nobody expects that"),)
        sweeper = asyncio.create_task(_sweep_on(database, 0.05))
        while not sweeper.done() and conn.execute("select from pglimits.leases").fetchall():
            await asyncio.sleep(0.05)
        assert not sweeper.done()
        sweeper.cancel()

    with_batches(dsn, work)


def test_what_cannot_be_closed_does_not_keep_the_rest_open() -> None:
    closed: list[str] = []

    async def fails() -> None:
        raise RuntimeError("nobody expects that")

    async def closes() -> None:
        closed.append("it")

    asyncio.run(_close(fails, closes))
    assert closed == ["it"]
