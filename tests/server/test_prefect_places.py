"""A client that can only poll keeps its place in line, and gets what was granted to it once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prefecttest import LIMITS, looks
from servertest import Server

Connection = Any
__all__ = ["looks"]
BODY = {"names": ["one"], "slots": 1}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture
def poller(shared: Server) -> Iterator[Callable[[], httpx.Client]]:
    """Makes clients that keep cookies, each as Prefect's are when they ask for the first time."""
    with contextlib.ExitStack() as stack:

        def make() -> httpx.Client:
            client = stack.enter_context(shared.client(base_url=shared.url + LIMITS))
            client.get(f"{shared.url}/api/csrf-token?client=x")
            return client

        yield make


def ask(client: httpx.Client, **options: Any) -> httpx.Response:
    return client.post("/increment-with-lease", json=BODY, **options)


def waiters(looks: Connection) -> list[Any]:
    return [row[0] for row in looks.execute("select lease_id from pglimits.waiters order by position")]


def take(looks: Connection, limit: int = 1) -> Any:
    """Make a limit of which all is taken. The lease."""
    looks.execute("select pglimits.create_limit('one', %s)", [limit])
    return looks.execute("select lease_id from pglimits.acquire('one', %s)", [limit]).fetchone()[0]


def release(looks: Connection, lease_id: Any) -> None:
    assert looks.execute("select pglimits.release(%s)", [lease_id]).fetchone() == (True,)


def poll(client: httpx.Client) -> httpx.Response:
    """Ask until there is an answer, as Prefect does."""
    while (answer := ask(client)).status_code == 423:
        time.sleep(float(answer.headers["Retry-After"]))
    return answer


def stand(pool: ThreadPoolExecutor, client: httpx.Client, looks: Connection, wait: Any) -> Future[httpx.Response]:
    """Have a client stand in line, as one more, and be held."""
    before = len(waiters(looks))
    future = pool.submit(poll, client)
    wait(lambda: len(waiters(looks)) > before)
    return future


def test_who_polls_is_granted_in_order_of_arrival(
    poller: Callable[[], httpx.Client], looks: Connection, pool: ThreadPoolExecutor, wait_until: Any
) -> None:
    held = take(looks)
    futures = [stand(pool, poller(), looks, wait_until) for _ in range(3)]
    in_line = waiters(looks)
    granted = []
    for future in futures:
        release(looks, held)
        answer = future.result()
        assert answer.status_code == 200
        assert len(looks.execute("select from pglimits.holders").fetchall()) == 1
        held = answer.json()["lease_id"]
        granted.append(held)
    assert granted == [str(lease_id) for lease_id in in_line]


def test_who_is_told_to_come_again_keeps_the_place(
    poller: Callable[[], httpx.Client], looks: Connection, pool: ThreadPoolExecutor, wait_until: Any
) -> None:
    held = take(looks)
    first, second = poller(), poller()
    while not waiters(looks):
        answer = ask(first)  # held until it is told to come again
    assert (answer.status_code, answer.headers["Retry-After"]) == (423, "0")
    future = stand(pool, second, looks, wait_until)
    release(looks, held)
    assert ask(poller()).status_code == 423
    answer = ask(first)
    assert answer.status_code == 200
    assert not future.done()
    release(looks, answer.json()["lease_id"])
    assert future.result().status_code == 200


def test_who_tries_once_leaves_nothing_behind(poller: Callable[[], httpx.Client], looks: Connection) -> None:
    take(looks)
    client = poller()
    answer = ask(client)
    assert (answer.status_code, answer.headers["Retry-After"]) == (423, "0")
    assert waiters(looks) == []


def test_a_line_that_is_full_refuses(poller: Callable[[], httpx.Client], looks: Connection) -> None:
    take(looks)
    looks.execute("select pglimits.update_limit('one', max_waiters => 0)")
    client = poller()
    while (answer := ask(client)).headers["Retry-After"] == "0":
        assert answer.status_code == 423
    assert (answer.status_code, answer.headers["Retry-After"]) == (423, "1")
    assert waiters(looks) == []


def test_who_goes_away_while_held_gives_the_place_up(
    poller: Callable[[], httpx.Client], looks: Connection, wait_until: Any
) -> None:
    take(looks)
    client = poller()
    with pytest.raises(httpx.ReadTimeout):
        while True:
            ask(client, timeout=1)
    wait_until(lambda: waiters(looks) == [])
    # What asks next tries once, and is answered at once.
    assert ask(client).headers["Retry-After"] == "0"
    assert waiters(looks) == []


def test_who_waits_as_told_has_a_rate_at_its_moment_and_asks_seldom(shared: Server, looks: Connection) -> None:
    looks.execute("select pglimits.create_limit('rate', 1, 0.5)")
    body = {"names": ["rate"], "slots": 1, "mode": "rate_limit"}
    said: list[tuple[int, float]] = []
    with shared.client(base_url=shared.url + LIMITS) as client:
        for _ in range(3):
            while (answer := client.post("/increment-with-lease", json=body)).status_code == 423:
                said.append((423, float(answer.headers["Retry-After"])))
                time.sleep(said[-1][1])
            said.append((answer.status_code, 0))
    # The first refusal tells the exact time. The next one finds that the client keeps cookies, and has it held.
    assert [status for status, _ in said[:4]] == [200, 423, 200, 423]
    assert 0 < said[1][1] <= 2
    assert said[3][1] == 0
    assert len(said) < 9


def test_a_client_brings_a_bounded_number_of_places(poller: Callable[[], httpx.Client], looks: Connection) -> None:
    take(looks, 50)
    client = poller()
    for slots in range(1, 41):
        before = set(client.cookies)
        assert client.post("/increment-with-lease", json={**BODY, "slots": slots}).status_code == 423
        assert set(client.cookies) - before, "the newest place is kept"
    assert len(client.cookies) == 32 + 1


def test_two_requests_with_one_cookie_never_share_a_lease(
    poller: Callable[[], httpx.Client], looks: Connection, pool: ThreadPoolExecutor, wait_until: Any
) -> None:
    held = take(looks, 2)
    clients = [poller(), poller()]
    first = stand(pool, clients[0], looks, wait_until)
    for cookie in clients[0].cookies.jar:
        clients[1].cookies.jar.set_cookie(cookie)
    second = stand(pool, clients[1], looks, wait_until)
    release(looks, held)
    leases = {future.result().json()["lease_id"] for future in (first, second)}
    assert len(leases) == 2


def test_a_grant_whose_answer_was_lost_is_told_again_and_then_never(
    poller: Callable[[], httpx.Client], looks: Connection, pool: ThreadPoolExecutor, wait_until: Any
) -> None:
    held = take(looks)
    client = poller()
    asks: list[httpx.Request] = []
    client.event_hooks["request"] = [asks.append]
    future = stand(pool, client, looks, wait_until)
    release(looks, held)
    lease_id = future.result().json()["lease_id"]
    asked = asks[-1]
    assert client.send(asked).status_code == 423  # might be another caller of the same client
    wait_until(lambda: (again := client.send(asked)).status_code == 200 and again.json()["lease_id"] == lease_id)
    assert client.post(f"/leases/{lease_id}/renew", json={}).status_code == 204
    assert client.send(asked).status_code == 423


def test_a_place_outlives_the_server(
    serve: Callable[..., Server], clock: Any, pool: ThreadPoolExecutor, connect: Any, wait_until: Any
) -> None:
    clock.freeze()  # who waits gives no sign of life while there is no server
    looks = connect()
    held = take(looks)
    first, client = serve(), httpx.Client(timeout=60)
    with client:

        def ask_at(server: Server) -> httpx.Response:
            return client.post(f"{server.url}{LIMITS}/increment-with-lease", json=BODY)

        client.get(f"{first.url}/api/csrf-token?client=x")

        def poll_at_first() -> None:
            while ask_at(first).status_code == 423:
                pass

        future = pool.submit(poll_at_first)
        wait_until(lambda: waiters(looks))
        place = waiters(looks)
        first.kill()
        with pytest.raises(httpx.TransportError):
            future.result()
        second = serve()
        clock.advance(5)
        again = pool.submit(ask_at, second)
        lives = "select from pglimits.queue where expires_at > pglimits._now() + '9 seconds'"
        wait_until(lambda: looks.execute(lives).rowcount)
        assert waiters(looks) == place
        release(looks, held)
        assert again.result().json()["lease_id"] == str(place[0])
