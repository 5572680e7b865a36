"""What goes on, told to many: what it costs the database, and that nobody misses anything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest

from pglimits.errors import LimiterUnavailable
from pglimits.server._changes import KEPT, Change, KnownEvents, KnownLimits
from pglimits.server._database import Database, Params, Rows
from pglimits.server._listener import Listener
from pglimits.server._live import Live


class Counting(Database):
    """Counts what it asks."""

    asked = 0
    within = 15.0

    async def rows(self, query: str, params: Params = (), **options: Any) -> Rows:
        self.asked += 1
        return await super().rows(query, params, **{"within": self.within, **options})


@contextlib.asynccontextmanager
async def looking(dsn: str) -> AsyncIterator[tuple[Counting, Live]]:
    database = Counting(dsn)
    await database.open()
    listener = Listener(dsn)
    live = Live(database, listener)
    try:
        yield database, live
    finally:
        live.begin_closing()
        await live.close()
        await listener.close()
        await database.close()


async def follow(live: Live, seen: list[Change], names: tuple[str, ...] = ()) -> None:
    async for change in live.stream(names):
        seen.append(change)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_two_hundred_streams_cost_the_database_as_much_as_twenty(dsn: str, conn: psycopg.Connection[Any]) -> None:
    conn.execute("select pglimits.create_limit('one', 5)")

    async def asked_per_poll(live: Live, database: Counting) -> float:
        begin, asked = live.polls, database.asked
        await until(lambda: live.polls >= begin + 3)
        return (database.asked - asked) / (live.polls - begin)

    async def main() -> None:
        async with looking(dsn) as (database, live), asyncio.TaskGroup() as tasks:
            streams: list[list[Change]] = [[] for _ in range(200)]
            for seen in streams[:20]:
                tasks.create_task(follow(live, seen, ("one",)))
            await until(lambda: all(streams[:20]))
            few = await asked_per_poll(live, database)
            for seen in streams[20:]:
                tasks.create_task(follow(live, seen, ("one",)))
            await until(lambda: all(streams))
            assert await asked_per_poll(live, database) <= few
            conn.execute("select pglimits.acquire('one')")
            await until(lambda: all(seen[-1].limits and seen[-1].limits[0]["held"] == 1 for seen in streams))
            told = {id(seen[-1].difference) for seen in streams}
            assert len(told) == 1  # they share what they are told
            live.begin_closing()

    asyncio.run(main())


def test_a_database_that_does_not_answer_in_time_is_told_of_and_nothing_old_is_taken_for_new(
    dsn: str, conn: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        async with looking(dsn) as (database, live):
            seen: list[Change] = []
            task = asyncio.create_task(follow(live, seen))
            await until(lambda: seen)
            database.within = 0.3
            with conn.transaction():
                conn.execute("lock table pglimits.configs")
                await until(lambda: seen[-1].down_since is not None)
                with pytest.raises(LimiterUnavailable, match="not answered in time"):
                    await live.snapshot()
            database.within = 15.0
            conn.execute("select pglimits.create_limit('one', 1)")
            await until(lambda: seen[-1].down_since is None and "one" in live.limits)
            assert await live.snapshot() == live.limits
            task.cancel()

    asyncio.run(main())


def test_it_polls_only_while_somebody_looks(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pglimits.server._live._LINGERS", 0.0)
    monkeypatch.setattr("pglimits.server._listener._LINGERS", 0.0)

    async def main() -> None:
        async with looking(dsn) as (database, live):
            assert await live.snapshot() == {}
            await until(lambda: live._task is not None and live._task.done())
            await until(lambda: live._listener._task is None)
            asked = database.asked
            assert live.at is None
            seen: list[Change] = []
            task = asyncio.create_task(follow(live, seen))
            await until(lambda: seen)
            assert database.asked > asked and seen[0].first
            task.cancel()

    asyncio.run(main())


def test_a_slow_stream_gets_what_changed_in_one_go(dsn: str, conn: psycopg.Connection[Any]) -> None:
    async def main() -> None:
        async with looking(dsn) as (_, live):
            stream = live.stream()
            assert (await anext(stream)).first
            for nth in range(5):
                conn.execute("select pglimits.create_limit(%s, 1)", [f"limit-{nth}"])
                await live._next_poll()
            conn.execute("select pglimits.delete_limit('limit-0')")
            await live._next_poll()
            change = await anext(stream)
            assert ({row["name"] for row in change.limits}, change.gone) == (
                {f"limit-{nth}" for nth in range(1, 5)},
                ["limit-0"],
            )
            await stream.aclose()

    asyncio.run(main())


def test_the_details_of_a_limit_are_told_to_who_looks_at_it(dsn: str, conn: psycopg.Connection[Any]) -> None:
    conn.execute("select pglimits.create_limit('one', 1)")

    async def main() -> None:
        async with looking(dsn) as (_, live):
            stream = live.stream(["one"])
            assert (await anext(stream)).details["one"].holders == []
            conn.execute("select pglimits.acquire('one', holder => '{\"who\": 1}')")
            conn.execute("select pglimits.acquire('one', timeout_seconds => 60)")
            async for change in stream:
                detail = change.details.get("one")
                if detail is not None and detail.waiters:
                    assert [row["holder"] for row in detail.holders] == [{"who": 1}]
                    break
            await stream.aclose()
            assert live.details == {}

    asyncio.run(main())


def rows(*names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"name": name, **more} for name in names]


def test_who_is_too_far_behind_gets_all_limits_again() -> None:
    known = KnownLimits()
    known.take(rows("a"))
    begin = known.version
    for nth in range(KEPT + 10):
        known.take(rows("a", f"limit-{nth}"))
    assert (known.since(begin).first, len(known.since(begin).limits)) == (True, 2)
    recent = known.version
    known.take(rows("a", held=1))
    difference = known.since(recent)
    assert (difference.first, difference.limits, difference.gone) == (
        False,
        rows("a", held=1),
        [f"limit-{KEPT + 9}"],
    )


def test_an_event_that_was_committed_late_is_told_and_none_twice(
    dsn: str, conn: psycopg.Connection[Any], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    late, rolled_back = connect(autocommit=False), connect(autocommit=False)

    async def main() -> None:
        async with looking(dsn) as (_, live):
            stream = live.stream()
            assert (await anext(stream)).first
            late.execute("select pglimits.create_limit('late', 1)")
            rolled_back.execute("select pglimits.create_limit('never', 1)")
            told: list[str] = []
            conn.execute("select pglimits.create_limit('limit-' || n, 1) from generate_series(1, 200) n")
            while len(told) < 200:
                told += [event["name"] for event in (await anext(stream)).events]
            late.commit()
            rolled_back.rollback()
            conn.execute("select pglimits.create_limit('last', 1)")
            while "last" not in told:
                told += [event["name"] for event in (await anext(stream)).events]
            assert told == [*(f"limit-{n}" for n in range(1, 201)), "late", "last"]
            await stream.aclose()

    asyncio.run(main())


def test_a_stream_that_was_too_slow_is_told_that_it_missed_events() -> None:
    known = KnownEvents()
    known.begin([{"event_id": 5}, {"event_id": 3}])
    known.take([{"event_id": 7}])
    number = known.number
    known.take([{"event_id": 7}, {"event_id": 8}])
    assert known.since(number) == ([{"event_id": 8}], False)
    known.take([{"event_id": event_id} for event_id in range(10, 10 + KEPT + 1)])
    assert known.since(number)[1] is True
