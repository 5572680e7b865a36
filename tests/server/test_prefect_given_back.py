"""What the routes for Prefect's clients have made or taken is undone where they fail halfway."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest

from pglimits.errors import LimiterUnavailable
from pglimits.server import Settings, _prefect_limits, create_app
from pglimits.server._database import Database
from pglimits.server._grants import Grants
from pglimits.server._listener import Listener
from pglimits.server._prefect_gone import Gone
from pglimits.server._prefect_limits import WITHOUT_LEASE, give_back
from pglimits.server._prefect_models import LONGEST_LEASE
from pglimits.server._problems import Problem

Connect = Callable[..., Any]
Test = Callable[[Database, Grants], Awaitable[None]]


def within(dsn: str, test: Test) -> None:
    """Run a test with what a server has."""

    async def run() -> None:
        database, listener = Database(dsn), Listener(dsn)
        await database.open()
        grants = Grants(database, listener)
        try:
            async with asyncio.timeout(20):
                await test(database, grants)
        finally:
            await grants.close()
            await listener.close()
            await database.close()

    asyncio.run(run())


async def take(grants: Grants, slots: int) -> None:
    """As an increment without a lease does."""
    answer = await grants.acquire(["one"], [slots], lease_duration=LONGEST_LEASE, holder=WITHOUT_LEASE)
    assert answer.status == "granted"


def answer_releases(database: Database, monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any]) -> None:
    """Have no release reach the database."""
    row = database.row

    async def answered(query: str, *arguments: Any, **options: Any) -> Any:
        return answer() if "pglimits.release(" in query else await row(query, *arguments, **options)

    monkeypatch.setattr(database, "row", answered)


@pytest.mark.parametrize(("away", "seconds"), [(False, "1"), (True, "2")])
def test_a_limit_whose_slots_cannot_be_taken_is_not_created(
    dsn: str, connect: Connect, away: bool, seconds: str
) -> None:
    looks = connect()
    app = create_app(Settings(dsn=dsn))

    async def create() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            acquire = app.state.grants.acquire

            async def too_late(*arguments: Any, **options: Any) -> Any:
                if away:
                    raise LimiterUnavailable("away")
                looks.execute("select pglimits.acquire('new', 5)")
                return await acquire(*arguments, **options)

            app.state.grants.acquire = too_late
            body = {"name": "new", "limit": 5, "active_slots": 3, "active": False}
            return await client.post("/api/v2/concurrency_limits/", json=body)

    refused = asyncio.run(create())
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, seconds)
    assert looks.execute("select name from pglimits.limits").fetchall() == []


def test_a_rest_that_was_taken_is_given_up_where_the_release_fails(
    dsn: str, connect: Connect, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = connect()
    looks.execute("select pglimits.create_limit('one', 10)")

    def held() -> Any:
        return looks.execute("select held from pglimits.limits").fetchone()[0]

    def fail() -> None:
        assert held() == 7  # the rest was free, and taken
        raise LimiterUnavailable("away")

    async def test(database: Database, grants: Grants) -> None:
        await take(grants, 4)
        answer_releases(database, monkeypatch, fail)
        with pytest.raises(LimiterUnavailable):
            await give_back(database, grants, ["one"], 1)

    within(dsn, test)
    assert wait_until(held) == 4


def test_a_rest_that_no_longer_fits_is_told(dsn: str, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = connect()
    looks.execute("select pglimits.create_limit('one', 6), pglimits.acquire('one', 2)")
    monkeypatch.setattr(_prefect_limits, "_REST_WAITS", 0.5)

    async def test(database: Database, grants: Grants) -> None:
        await take(grants, 4)
        looks.execute("select pglimits.update_limit('one', 4)")
        with pytest.raises(Problem) as told:
            await give_back(database, grants, ["one"], 1)
        assert told.value.status == 409

    within(dsn, test)
    assert looks.execute("select held, waiting from pglimits.limits").fetchone() == (2, 0)


def test_a_lease_that_cannot_be_ended_is_tried_once(
    dsn: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = connect()
    looks.execute("select pglimits.create_limit('one', 9)")
    tries: list[None] = []

    def refuse() -> dict[str, bool]:
        tries.append(None)
        assert len(tries) < 9
        return {"live": False}

    async def test(database: Database, grants: Grants) -> None:
        await take(grants, 2)
        await take(grants, 2)
        answer_releases(database, monkeypatch, refuse)
        await give_back(database, grants, ["one"], 1)

    within(dsn, test)
    assert len(tries) == 2
    assert looks.execute("select held from pglimits.limits").fetchone() == (4,)


def test_a_client_that_goes_loses_its_place_but_not_what_another_server_has_told_it(
    dsn: str, connect: Connect, wait_until: Any
) -> None:
    looks = connect()
    looks.execute("select pglimits.create_limit('one', 1)")
    granted, waits, stays = (uuid4() for _ in range(3))
    for place in (granted, waits, stays):
        looks.execute("select pglimits.acquire('one', timeout_seconds => 60, lease_id => %s)", [place])

    async def test(database: Database, grants: Grants) -> None:
        gone = Gone()
        for place in (granted, waits, uuid4()):
            gone.leave_line(database, place)
        assert gone._leaving is not None
        await gone._leaving

    within(dsn, test)
    assert looks.execute("select lease_id from pglimits.holders").fetchall() == [(granted,)]
    assert looks.execute("select lease_id from pglimits.waiters").fetchall() == [(stays,)]
