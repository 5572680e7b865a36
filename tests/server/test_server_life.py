"""Bad days of a server: it is told to end, killed, and started again; its database goes and comes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from cluster import Cluster, cluster
from servertest import Server, messages, until

from pglimits import _embedded, _install
from pglimits.errors import InvalidArgument
from pglimits.server import Settings, create_app


@pytest.fixture
def private(server: Any) -> Iterator[Cluster]:
    """A PostgreSQL of this test's own, to be stopped and started."""
    with cluster(_embedded.Binaries(server.bin, server.version), {"shared_buffers": "16MB"}) as made:
        made.start()
        _install.install(made.dsn)
        yield made


@pytest.fixture
def freeze() -> Iterator[Callable[[Cluster], None]]:
    """freeze(cluster): no process of it does anything any more, until the end of the test."""
    frozen: list[int] = []

    def begin(private: Cluster) -> None:
        children = Path(f"/proc/{private.pid}/task/{private.pid}/children").read_text()
        frozen.extend([private.pid, *map(int, children.split())])
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)

    yield begin
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)


def test_it_says_where_it_is_in_one_line(serve: Callable[..., Server], dsn: str) -> None:
    server = serve()
    assert re.fullmatch(r"Serving database \S+ at \S+ as \S+ on http://127\.0\.0\.1:\d+/\n", server.said)
    assert server.terminate() == (0, "")


def test_sigterm_answers_what_is_held_and_ends_streams(
    serve: Callable[..., Server], conn: psycopg.Connection[Any]
) -> None:
    server = serve()
    answers: list[httpx.Response] = []
    streamed: list[str] = []

    def hold() -> None:
        with server.client() as http:
            answers.append(http.post("/v1/acquire", json={"name": "one", "wait": 60, "timeout_seconds": None}))

    def look() -> None:
        with server.client() as http, http.stream("GET", "/v1/changes") as response:
            streamed.extend(kind for kind, _, _ in messages(response))

    with server.client() as http:
        http.post("/v1/limits", json={"name": "one", "limit": 1})
        http.post("/v1/acquire", json={"name": "one"})
        threads = [threading.Thread(target=work) for work in (hold, look, hold, look)]
        for thread in threads:
            thread.start()
        until(lambda: len(http.get("/v1/waiters").json()["waiters"]) == 2, "for both to stand in line")
        until(lambda: len(streamed) >= 4, "for both to stream")
        assert server.terminate() == (0, "")
        for thread in threads:
            thread.join()
    assert [answer.json()["status"] for answer in answers] == ["queued", "queued"]
    assert conn.execute("select count(*) from pglimits.holders").fetchone() == (1,)  # it lives on, as its holder does
    assert conn.execute("select count(*) from pglimits.waiters").fetchone() == (2,)


def test_killed_and_started_again_it_has_lost_nothing(serve: Callable[..., Server], clock: Any) -> None:
    clock.freeze()  # who waits gives no sign of life while there is no server
    server = serve()
    wanted: dict[str, Any] = {"name": "one", "wait": 0, "timeout_seconds": 60}
    with server.client() as http:
        http.post("/v1/limits", json={"name": "one", "limit": 1})
        held = http.post("/v1/acquire", json={"name": "one", "holder": {"who": "first"}}).json()
        second, third = (http.post("/v1/acquire", json=wanted).json() for _ in range(2))
    server.kill()
    with serve().client() as http:
        (holder,) = http.get("/v1/holders").json()["holders"]
        assert (holder["lease_id"], holder["holder"]) == (held["lease_id"], {"who": "first"})
        assert http.post(f"/v1/leases/{held['lease_id']}/renew").status_code == 200
        assert http.post("/v1/acquire", json={**wanted, "lease_id": third["lease_id"]}).json()["position"] == 2
        assert http.delete(f"/v1/leases/{held['lease_id']}").json() == {"released": True}
        granted = http.post("/v1/acquire", json={**wanted, "lease_id": second["lease_id"]})
        assert granted.json()["status"] == "granted"


def test_killed_under_load_it_neither_loses_nor_doubles_a_lease(
    serve: Callable[..., Server], dsn: str, conn: psycopg.Connection[Any]
) -> None:
    """Clients repeat what was not answered, under the id that they chose."""
    conn.execute("select pglimits.create_limit('many', 100000)")
    server = serve()
    url, port = server.url, str(server.port)
    ends = threading.Event()
    told: list[str] = []

    def work() -> None:
        with httpx.Client(timeout=30) as client:
            while not ends.is_set():
                wanted = {"name": "many", "lease_id": str(uuid.uuid4())}
                while (answer := ask(client, wanted)) is None:
                    time.sleep(0.02)
                assert answer.json()["status"] == "granted"
                told.append(wanted["lease_id"])

    def ask(client: httpx.Client, wanted: dict[str, str]) -> httpx.Response | None:
        try:
            return client.post(f"{url}/v1/acquire", json=wanted)
        except httpx.HTTPError:
            return None

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        before = len(told)
        until(lambda before=before: len(told) >= before + 50, "for some grants")
        server.kill()
        server = serve("--port", port)
    before = len(told)
    until(lambda: len(told) >= before + 20, "for some grants after the last start")
    ends.set()
    for thread in threads:
        thread.join()
    there = [str(row[0]) for row in conn.execute("select lease_id from pglimits.holders").fetchall()]
    assert sorted(there) == sorted(told)
    assert conn.execute("select held from pglimits.limits").fetchone() == (len(told),)


def test_the_database_gone_is_said_and_it_comes_back_by_itself(private: Cluster, serve: Callable[..., Server]) -> None:
    server = serve(on=private.dsn)
    with server.client() as http, server.client() as other, other.stream("GET", "/v1/changes?only=limits") as response:
        stream = messages(response)
        assert next(data for kind, _, data in stream if kind == "database") == {"down_since": None}
        http.post("/v1/limits", json={"name": "one", "limit": 1})
        lease = http.post("/v1/acquire", json={"name": "one"}).json()
        private.stop()
        for method, path, body in (
            ("GET", "/v1/limits", None),
            ("GET", "/readyz", None),
            ("POST", "/v1/acquire", {"name": "one"}),
            ("POST", "/v1/acquire", {"name": "one", "wait": 5}),
            ("DELETE", f"/v1/leases/{lease['lease_id']}", None),
            ("PATCH", "/v1/limits/one", {"limit": 3}),
        ):
            answer = http.request(method, path, json=body)
            assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json"), path
            assert int(answer.headers["Retry-After"]) >= 1
        assert http.get("/healthz").status_code == 200
        gone = next(data for kind, _, data in stream if kind == "database")
        assert gone["down_since"] is not None
        private.start()
        assert next(data for kind, _, data in stream if kind == "database") == {"down_since": None}
        until(lambda: http.get("/readyz").status_code == 200, "for it to be ready")
        assert http.get("/v1/limits/one").json()["held"] in (0, 1)  # the release may have come through late
        until(lambda: http.post("/v1/acquire", json={"name": "missing"}).status_code == 200, "for it to grant again")
    code, err = server.terminate()
    assert (code, "Traceback" in err) == (0, False), err


def test_a_held_request_outlasts_a_restart_of_the_database(private: Cluster, serve: Callable[..., Server]) -> None:
    server = serve(on=private.dsn)
    answers: list[httpx.Response] = []
    with server.client() as http:
        http.post("/v1/limits", json={"name": "one", "limit": 1})
        lease = http.post("/v1/acquire", json={"name": "one"}).json()

        def hold() -> None:
            with server.client() as held:
                answers.append(held.post("/v1/acquire", json={"name": "one", "wait": 60}))

        thread = threading.Thread(target=hold)
        thread.start()
        until(lambda: http.get("/v1/waiters").json()["waiters"], "for it to stand in line")
        private.restart()
        until(lambda: http.delete(f"/v1/leases/{lease['lease_id']}").status_code == 200, "for the release")
        thread.join()
    assert answers[0].json()["status"] == "granted", answers[0].text


def test_behind_a_pooler_in_transaction_mode_it_works_without_listening(
    serve: Callable[..., Server], pooled: Callable[..., str]
) -> None:
    server = serve(on=pooled("transaction", size=4))
    answers: list[httpx.Response] = []
    with server.client() as http:
        http.post("/v1/limits", json={"name": "one", "limit": 1})
        lease = http.post("/v1/acquire", json={"name": "one"}).json()

        def hold() -> None:
            with server.client() as held:
                answers.append(held.post("/v1/acquire", json={"name": "one", "wait": 60}))

        thread = threading.Thread(target=hold)
        thread.start()
        until(lambda: http.get("/v1/waiters").json()["waiters"], "for it to stand in line")
        http.delete(f"/v1/leases/{lease['lease_id']}")
        thread.join()
    assert answers[0].json()["status"] == "granted"
    assert server.terminate() == (0, "")


def test_those_who_wait_for_a_locked_limit_keep_nobody_from_others(
    serve: Callable[..., Server], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    server = serve()
    locker = connect(autocommit=False)
    locker.execute("select pglimits.create_limit('stuck', 6)")
    locker.execute("select pglimits.create_limit('other', 20)")
    locker.commit()
    locker.execute("select pglimits.acquire('stuck')")
    answers: list[httpx.Response] = []

    def hold(nth: int) -> None:
        wanted: dict[str, Any] = {"name": "stuck", "wait": 60}
        if nth % 2:
            wanted["lease_id"] = str(uuid.uuid4())
        with server.client() as http:
            answers.append(http.post("/v1/acquire", json=wanted))

    threads = [threading.Thread(target=hold, args=[nth]) for nth in range(6)]
    for thread in threads:
        thread.start()
    with server.client() as http:
        until(lambda: http.post("/v1/acquire", json={"name": "stuck"}).json().get("code") == "PL009", "for the lock")
        for _ in range(10):
            asked = http.post("/v1/acquire", json={"name": "other", "lease_id": str(uuid.uuid4())})
            assert asked.json()["status"] == "granted"
        assert not answers
    locker.rollback()
    for thread in threads:
        thread.join()
    assert [answer.json()["status"] for answer in answers] == ["granted"] * 6


def test_it_may_be_started_before_its_database(private: Cluster, serve: Callable[..., Server]) -> None:
    private.stop()
    server = serve(on=private.dsn)
    with server.client() as http:
        assert http.get("/readyz").status_code == 503
        private.start()
        until(lambda: http.get("/readyz").status_code == 200, "for it to be ready")
    assert "Warning: the database cannot be reached" in server.terminate()[1]


def test_where_no_database_is_named_it_serves_the_embedded_one(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(tempfile.mkdtemp(prefix="pgl-"))
    home.chmod(0o711)
    monkeypatch.setenv("PGLIMITS_HOME", str(home / "home"))
    try:
        server = serve(on=None)
        with server.client() as http:
            assert http.get("/readyz").status_code == 200
            assert http.post("/v1/limits", json={"name": "one", "limit": 1}).status_code == 201
        assert server.terminate()[0] == 0
    finally:
        _embedded.stop()
        shutil.rmtree(home)


def test_a_database_without_pglimits_is_an_error_at_once(bare_dsn: str) -> None:
    server = Server(bare_dsn)
    _, err = server.process.communicate(timeout=200)
    assert (server.process.returncode, "run pglimits install" in err) == (1, True)


def test_a_port_that_is_taken_is_an_error_of_one_line(serve: Callable[..., Server], dsn: str) -> None:
    server = serve()
    second = Server(dsn, ["--port", str(server.port)])
    _, err = second.process.communicate(timeout=200)
    assert second.process.returncode == 1
    assert re.fullmatch(r"Error: .*Address already in use.*\n", err), err


def test_it_sweeps_by_itself(serve: Callable[..., Server], conn: psycopg.Connection[Any]) -> None:
    conn.execute("select pglimits.create_limit('one', 1)")
    conn.execute("select pglimits.acquire('one', lease_duration => 1)")
    serve("--sweep-every", "0.2")
    until(lambda: not conn.execute("select from pglimits.leases").fetchall(), "for the lease to be swept")


def test_where_it_may_not_sweep_it_says_nothing(
    serve: Callable[..., Server], conn: psycopg.Connection[Any], dsn: str
) -> None:
    name = f"looker_{conn.info.dbname}"
    conn.execute(f"create role {name} login in role pglimits_reader, pglimits_user".encode())
    server = serve("--sweep-every", "0.1", on=psycopg.conninfo.make_conninfo(dsn, user=name))
    with server.client() as http:
        assert http.get("/v1/limits").status_code == 200
        refused = http.post("/v1/limits", json={"name": "a", "limit": 1})
        assert refused.status_code == 403
    assert server.terminate() == (0, "")


def test_bodies_are_bounded(shared: Server) -> None:
    json = {"Content-Type": "application/json"}
    with shared.client() as http:
        for content in (b"x" * 1_000_001, iter([b"x" * 100_000] * 11)):
            assert http.post("/v1/acquire", content=content).status_code == 413
        assert http.post("/v1/acquire", content=b"[" * 100_000, headers=json).status_code == 400
        assert http.post("/v1/acquire", content=b'{"name": "\xff"}', headers=json).status_code == 400
        assert http.post("/v1/acquire", json={"name": "missing"}).status_code == 200


def test_under_a_prefix_it_is_found_with_and_without_it(serve: Callable[..., Server]) -> None:
    server = serve("--root-path", "/pglimits/")
    assert server.said.rstrip().endswith("/pglimits/")
    with server.client(base_url=server.url.removesuffix("/pglimits")) as bare:
        assert bare.get("/pglimits/healthz").status_code == 200
        assert bare.get("/healthz").status_code == 200
        made = bare.post("/v1/limits", json={"name": "a", "limit": 1})
        assert made.headers["location"] == "/pglimits/v1/limits/a"
        for page in ("/limits/a", "/pglimits/limits/a"):
            shown = bare.get(page)
            assert (shown.status_code, "/pglimits/static/" in shown.text) == (200, True), page


@pytest.mark.parametrize("root_path", ["/limits", "/v1/x", "/static", "/login", "/docs", "/openapi.json"])
def test_a_prefix_that_is_a_path_of_its_own_is_refused(dsn: str, root_path: str) -> None:
    with pytest.raises(InvalidArgument, match="is a path of the server's own"):
        create_app(Settings(dsn=dsn, root_path=root_path))


def test_the_command_refuses_such_a_prefix_in_one_line(dsn: str) -> None:
    server = Server(dsn, ["--root-path", "/limits"])
    _, err = server.process.communicate(timeout=200)
    assert (server.process.returncode != 0, err.count("\n"), "own" in err) == (True, 1, True), err


def test_whether_it_is_well_can_be_asked_by_head(shared: Server) -> None:
    with shared.client() as http:
        for path in ("/healthz", "/readyz"):
            answer = http.head(path)
            assert (answer.status_code, answer.content) == (200, b"")


def test_sigterm_ends_it_though_its_database_is_frozen(
    private: Cluster, serve: Callable[..., Server], freeze: Callable[[Cluster], None]
) -> None:
    server = serve("--sweep-every", "0.3", on=private.dsn)

    def ask(method: str, path: str, body: Any = None) -> None:
        with server.client() as http, contextlib.suppress(httpx.HTTPError):
            http.request(method, path, json=body)

    with server.client() as http:
        http.post("/v1/limits", json={"name": "one", "limit": 1})
        http.post("/v1/acquire", json={"name": "one"})
    asked: list[tuple[Any, ...]] = [
        ("GET", "/v1/limits"),
        ("POST", "/v1/acquire", {"name": "one", "wait": 60}),
        ("POST", "/v1/acquire", {"name": "one", "wait": 60, "lease_id": str(uuid.uuid4())}),
        ("GET", "/v1/changes"),
    ]
    threads = [threading.Thread(target=ask, args=each) for each in asked]
    freeze(private)
    for thread in threads:
        thread.start()
    time.sleep(1)  # for them to be asked: there is nothing to see from outside
    server.terminate()
    for thread in threads:
        thread.join()
