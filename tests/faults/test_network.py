"""A connection that delays, or that swallows what is sent, without anybody being told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from proxy import BOTH, Link, Proxy
from wrappertest import Api, Children, Connection, WaitUntil, held, nothing_left, open_api, value, waiting

from pglimits import AcquireTimeout, Limiter, LimiterUnavailable, _batches, _waiting

KINDS = ["sync", "async"]


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    with Proxy(dsn) as between:
        yield between


@pytest.fixture(params=KINDS)
def far(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[Api]:
    """A limiter behind the proxy."""
    with open_api(request.param, dsn=proxy.dsn) as opened:
        yield opened
        proxy.heal()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is taken for dead after a short while."""
    for job in (_batches.Batch, _waiting.Beat, _waiting.Watch):
        monkeypatch.setattr(job, "answers_within", 0.5)


def swallow(link: Link) -> None:
    link.holes.update(BOTH)


@pytest.mark.parametrize("timeout", [0, 1, 2])
def test_a_timeout_holds_though_no_connection_answers(limiter: Limiter, proxy: Proxy, far: Api, timeout: float) -> None:
    limiter.create("database", 1)
    limiter.create("api", 1, slot_decay_per_second=1)
    far.release(far.acquire("database"))
    proxy.black_hole()
    asked = [far.start("acquire", "database", timeout_seconds=timeout) for _ in range(3)]
    asked.append(far.start("rate_limit", "api", timeout_seconds=timeout))
    # Whether there is room nobody can say who tries once and hears nothing.
    expected = (AcquireTimeout, LimiterUnavailable) if timeout else LimiterUnavailable
    for future in asked:
        with pytest.raises(expected):
            future.result(20)


@pytest.mark.parametrize("kind", KINDS)
def test_who_may_be_let_in_without_a_slot_is_when_no_connection_answers_in_time(
    limiter: Limiter, conn: Connection, proxy: Proxy, kind: str, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    with open_api(kind, dsn=proxy.dsn, on_unavailable="allow") as api:
        api.release(api.acquire("database"))
        proxy.black_hole()
        for timeout in (0, 1):
            assert not api.acquire("database", timeout_seconds=timeout).enforced
        proxy.heal()
    wait_until(lambda: nothing_left(conn))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("directions", [BOTH, ("up",), ("down",)], ids=["both", "up", "down"])
def test_a_connection_that_has_died_unseen_is_replaced_without_an_error(
    limiter: Limiter, conn: Connection, proxy: Proxy, far: Api, directions: Any
) -> None:
    limiter.create("database", 1)
    far.release(far.acquire("database"))
    assert proxy.each(lambda link: link.holes.update(directions))
    lease = far.start("acquire", "database").result(60)
    assert held(conn) == 1
    assert proxy.each(lambda link: link.holes.update(directions))
    assert far.start("release", lease).result(60)
    assert nothing_left(conn)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs TCP_USER_TIMEOUT, which Linux has")
@pytest.mark.parametrize(
    "given, expected", [("", (1, 10, 25000)), ("keepalives_idle=99 tcp_user_timeout=5", (1, 99, 5))]
)
def test_a_network_that_swallows_what_is_sent_is_found_out_by_tcp(
    proxy: Proxy, given: str, expected: tuple[int, int, int]
) -> None:
    with Limiter(f"{proxy.dsn} {given}") as limiter:
        limiter.version()
        (connection,) = limiter._courier.connections._all.values()
        with socket.fromfd(connection.fd, socket.AF_INET, socket.SOCK_STREAM) as mine:
            assert expected == (
                mine.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            )


@pytest.mark.usefixtures("impatient")
def test_a_lease_that_cannot_be_released_is_released_when_the_network_is_back(
    limiter: Limiter, conn: Connection, proxy: Proxy, far: Api, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lease = far.acquire("database")
    proxy.black_hole()
    far.start("release", lease).result(60)
    assert held(conn) == 1
    proxy.heal()
    wait_until(lambda: held(conn) == 0)


def test_a_lease_is_renewed_on_another_connection_before_it_ends(
    limiter: Limiter, conn: Connection, proxy: Proxy, far: Api, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lease = far.acquire("database", lease_duration=9)

    def ends() -> Any:
        return value(conn, "select expires_at from pglimits.holders")

    taken = ends()
    first = wait_until(lambda: ends() > taken and ends())  # the renewal has a connection now
    assert proxy.each(swallow)
    wait_until(lambda: ends() > first, timeout=30)
    assert not lease.lost
    assert far.release(lease)


def test_a_lease_that_cannot_be_renewed_is_lost_at_its_end_and_its_holder_told(
    limiter: Limiter, proxy: Proxy, far: Api, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    told: list[bool] = []
    lease = far.acquire("database", lease_duration=1)
    lease.on_lost(lambda: told.append(True))
    proxy.black_hole()
    wait_until(lambda: lease.lost)
    wait_until(lambda: told)


@pytest.mark.usefixtures("impatient")
def test_a_waiter_learns_of_its_grant_though_the_connection_that_listens_has_died_unseen(
    limiter: Limiter, conn: Connection, proxy: Proxy, far: Api, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lease = limiter.acquire("database")
    waits = far.start("acquire", "database")
    wait_until(lambda: waiting(conn) == 1 and proxy.each(lambda _: None, lambda link: link.listens))
    assert proxy.each(swallow, lambda link: link.listens)
    limiter.release(lease)
    assert far.release(waits.result(30))
    wait_until(lambda: nothing_left(conn))


def test_a_request_that_is_under_way_when_its_process_exits_is_not_granted_to_nobody(
    limiter: Limiter, conn: Connection, proxy: Proxy, children: Children, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    child = children(
        """
        import sys, threading, time
        from pglimits import Limiter
        limiter = Limiter()
        assert limiter.get("database").limit == 1
        print("connected")
        input()
        threading.Thread(target=limiter.acquire, args=("database",), daemon=True).start()
        while not limiter._courier.outbox._under_way:
            time.sleep(0.001)
        """,
        env={"PGLIMITS_DSN": proxy.dsn},
    )
    child.expect("connected")

    def hold_up(link: Link) -> None:
        link.delay = 0.5

    assert proxy.each(hold_up) == 1
    child.tell()
    child.end()
    # Whatever was under way has arrived by the time that its connection is closed.
    wait_until(
        lambda: value(conn, "select count(*) from pg_stat_activity where datname = current_database()"
                            " and application_name = 'pglimits' and pid <> pg_backend_pid()") == 1
    )  # fmt: skip
    assert nothing_left(conn)
