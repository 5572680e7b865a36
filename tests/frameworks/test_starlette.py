"""Limits in apps of FastAPI and Starlette, in process and behind a real uvicorn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Body, Depends, FastAPI, File, UploadFile, WebSocket
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import WebSocketDenialResponse

import pglimits.starlette as limits
from pglimits import AsyncLimiter, Limiter, LimitNotFound

Serve = Callable[[Any], str]
WAITS = (("/at-once", 0), ("/in-line", 60))
QUOTA = "https://iana.org/assignments/http-problem-types#quota-exceeded"


@pytest.fixture
def tasks(dsn: str) -> Iterator[AsyncLimiter]:
    limiter = AsyncLimiter(dsn)
    yield limiter
    asyncio.run(limiter.close())


def ask(app: Any, *requests: tuple[str, str], **options: Any) -> list[httpx.Response]:
    """One request after the other, in process."""

    async def work() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(method, path, **options) for method, path in requests]

    return asyncio.run(work())


def is_refusal(response: httpx.Response, name: str) -> bool:
    body = response.json()
    return bool(
        response.status_code == 429
        and response.headers["content-type"] == "application/problem+json"
        and (body["type"], body["status"], body["violated-policies"]) == (QUOTA, 429, [name])
    )


def test_a_dependency_refuses_what_is_beyond_the_rate(limiter: Limiter, tasks: AsyncLimiter) -> None:
    limiter.create("api", 2, slot_decay_per_second=0.01)
    app = FastAPI()
    limits.add_handler(app)

    def tenant(request: Request) -> str | None:
        return request.headers.get("tenant")

    @app.get("/", dependencies=[Depends(limits.rate_limit("api", key=tenant, limiter=tasks))])
    async def root() -> str:
        return "done"

    get = ("GET", "/")
    first, second, third = ask(app, get, get, get, headers={"tenant": "a"})
    assert (first.json(), first.headers["ratelimit-policy"]) == ("done", '"api";q=2;w=200;pk=:YQ==:')
    assert first.headers["ratelimit"].startswith('"api";r=1;t=')
    assert second.status_code == 200
    assert is_refusal(third, "api")
    assert 90 <= int(third.headers["retry-after"]) <= 100
    assert third.headers["ratelimit"].startswith('"api";r=0;t=')
    assert ask(app, get, headers={"tenant": "b"})[0].status_code == 200
    assert [each.status_code for each in ask(app, *[get] * 4)] == [200] * 4  # no key: not limited


def test_the_parameters_of_a_dependency_are_types_as_older_versions_of_fastapi_need_them() -> None:
    assert not [each for each in limits.Limit.__call__.__annotations__.values() if isinstance(each, str)]


def test_without_the_handler_a_refusal_is_an_http_exception(limiter: Limiter, tasks: AsyncLimiter) -> None:
    limiter.create("shut", 0)
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limits.concurrency("shut", limiter=tasks))])
    async def root() -> None: ...

    (refused,) = ask(app, ("GET", "/"))
    assert (refused.status_code, refused.json()) == (429, {"detail": "no slot of 'shut' is free"})
    assert refused.headers["ratelimit-policy"] == '"shut";q=0;qu="concurrent-requests"'
    assert "retry-after" not in refused.headers


def test_several_dependencies_add_their_fields_to_the_same_answer(limiter: Limiter, tasks: AsyncLimiter) -> None:
    limiter.create("api", 2, slot_decay_per_second=0.01)
    limiter.create("reports", 1)
    both = [limits.rate_limit("api", limiter=tasks), limits.concurrency("reports", limiter=tasks)]
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limit) for limit in both])
    async def root() -> None: ...

    (answer,) = ask(app, ("GET", "/"))
    assert answer.headers.get_list("ratelimit") == ['"api";r=1;t=100', '"reports";r=0']


def test_a_dependency_of_a_websocket_holds_its_slot_while_it_is_open_and_denies_the_next(
    limiter: Limiter, tasks: AsyncLimiter, wait_until: Callable[..., Any]
) -> None:
    limiter.create("sockets", 1)
    router = APIRouter()
    wants = {path: limits.concurrency("sockets", timeout_seconds=seconds, limiter=tasks) for path, seconds in WAITS}

    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(await socket.receive_text())

    for path, limit in wants.items():
        router.add_api_websocket_route(path, echo, dependencies=[Depends(limit)])
    app = FastAPI()
    app.include_router(router)
    limits.add_handler(app)
    with TestClient(app) as client:
        with client.websocket_connect("/at-once") as socket:
            assert [each.holder for each in limiter.holders()] == [{"method": "WEBSOCKET", "path": "/at-once"}]
            with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/at-once"):
                pass
            assert is_refusal(denied.value, "sockets")
            socket.send_text("hello")
            assert socket.receive_text() == "hello"
        wait_until(lambda: not limiter.holders())
        with client.websocket_connect("/in-line") as socket:
            socket.send_text("hello")
            assert socket.receive_text() == "hello"
    wait_until(lambda: not limiter.holders())


def test_a_dependency_holds_its_slot_until_stream_and_background_tasks_are_over(
    limiter: Limiter, tasks: AsyncLimiter
) -> None:
    limiter.create("reports", 1)
    app = FastAPI()
    seen = []

    def look() -> None:
        ((holder,),) = ([h.holder for h in limiter.holders("reports")],)
        seen.append(holder)

    @app.get("/stream", dependencies=[Depends(limits.concurrency("reports", limiter=tasks))])
    async def stream(background: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            for _ in range(2):
                look()
                yield b"x"

        background.add_task(look)
        return StreamingResponse(body())

    assert ask(app, ("GET", "/stream"), ("GET", "/stream"))[1].text == "xx"
    assert seen == [{"method": "GET", "path": "/stream"}] * 6
    assert limiter.holders() == []


def test_a_route_that_raises_gives_its_slot_back(limiter: Limiter, tasks: AsyncLimiter) -> None:
    limiter.create("reports", 1)
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limits.concurrency("reports", limiter=tasks))])
    async def root() -> None:
        raise ValueError("of the app")

    for _ in range(2):
        with pytest.raises(ValueError, match="of the app"):
            ask(app, ("GET", "/"))
    assert limiter.holders() == []


def test_a_request_that_waits_still_has_its_body(limiter: Limiter, tasks: AsyncLimiter) -> None:
    limiter.create("reports", 1)
    app = FastAPI()
    wait = [Depends(limits.concurrency("reports", timeout_seconds=20, limiter=tasks))]

    @app.post("/json", dependencies=wait)
    async def json(number: int = Body(embed=True)) -> int:
        return number

    @app.post("/raw", dependencies=wait)
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.post("/file", dependencies=wait)
    async def file(file: UploadFile = File()) -> int:
        return len(await file.read())

    @app.post("/whole")
    async def whole(request: Request) -> int:
        return len(await request.body())

    app.mount(
        "/app", limits.LimitMiddleware(app.router, limits.concurrency("reports", timeout_seconds=20, limiter=tasks))
    )
    assert ask(app, ("POST", "/json"), json={"number": 7})[0].json() == 7
    assert ask(app, ("POST", "/raw"), content=b"x" * 100_000)[0].json() == 100_000
    assert ask(app, ("POST", "/file"), files={"file": b"abc"})[0].json() == 3
    assert ask(app, ("POST", "/app/whole"), content=b"x" * 100_000)[0].json() == 100_000


def test_the_middleware_limits_an_app_or_a_route_and_tells_what_is_left(limiter: Limiter, tasks: AsyncLimiter) -> None:
    limiter.create("app", 5)
    limiter.create("slow", 1, slot_decay_per_second=0.01)

    async def answer(request: Request) -> Response:
        return PlainTextResponse("done")

    route = [Middleware(limits.LimitMiddleware, limit=limits.rate_limit("slow", limiter=tasks))]
    app = Starlette(
        routes=[Route("/free", answer), Route("/slow", answer, middleware=route)],
        middleware=[Middleware(limits.LimitMiddleware, limit=limits.concurrency("app", limiter=tasks))],
    )
    free, slow, refused = ask(app, ("GET", "/free"), ("GET", "/slow"), ("GET", "/slow"))
    assert (free.text, free.headers["ratelimit"]) == ("done", '"app";r=4')
    assert slow.headers.get_list("ratelimit") == ['"slow";r=0;t=100', '"app";r=4']
    assert is_refusal(refused, "slow")
    assert limiter.holders() == []


def test_a_refusal_over_several_limits_names_those_that_are_full(limiter: Limiter, tasks: AsyncLimiter) -> None:
    limiter.create("free", 5)
    limiter.create("füll", 0)
    for show_fields, named in ((True, ["f%C3%BCll"]), (False, ["free", "f%C3%BCll"])):
        limit = limits.concurrency(["free", "füll"], show_fields=show_fields, limiter=tasks)
        (refused,) = ask(limits.LimitMiddleware(PlainTextResponse("done"), limit), ("GET", "/"))
        assert (refused.status_code, refused.json()["violated-policies"]) == (429, named)
        assert ("ratelimit" in refused.headers) is show_fields
    assert limiter.holders() == []


def test_a_request_that_is_cancelled_at_any_moment_leaves_no_slot_held(
    limiter: Limiter, tasks: AsyncLimiter, wait_until: Callable[..., Any]
) -> None:
    limiter.create("database", 100)
    limit = limits.concurrency("database", timeout_seconds=30, limiter=tasks)
    app = limits.LimitMiddleware(PlainTextResponse("done"), limit)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None: ...

    async def cancelled(after: float) -> None:
        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(after)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def main() -> None:
        await app(scope, receive, send)
        for nth in range(200):
            await cancelled(nth % 50 / 10_000)

    asyncio.run(main())
    wait_until(lambda: not limiter.holders("database"))


def test_what_is_the_apps_own_mistake_is_raised(tasks: AsyncLimiter) -> None:
    app = limits.LimitMiddleware(PlainTextResponse("done"), limits.concurrency("none", strict=True, limiter=tasks))
    with pytest.raises(LimitNotFound):
        ask(app, ("GET", "/"))
    app = limits.LimitMiddleware(PlainTextResponse("done"), limits.concurrency("none", limiter=tasks))
    assert ask(app, ("GET", "/"))[0].status_code == 200


def test_a_database_that_is_gone_is_503() -> None:
    nowhere = AsyncLimiter("host=127.0.0.1 port=1")
    app = limits.LimitMiddleware(PlainTextResponse("done"), limits.concurrency("api", limiter=nowhere))
    (refused,) = ask(app, ("GET", "/"))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    allowing = AsyncLimiter("host=127.0.0.1 port=1", on_unavailable="allow")
    app = limits.LimitMiddleware(PlainTextResponse("done"), limits.concurrency("api", limiter=allowing))
    assert ask(app, ("GET", "/"))[0].status_code == 200


def test_an_answer_does_not_wait_for_its_fields_where_the_database_cannot_tell(
    conn: Any, limiter: Limiter, tasks: AsyncLimiter
) -> None:
    limiter.create("api", 3, slot_decay_per_second=1)
    app = limits.LimitMiddleware(PlainTextResponse("done"), limits.rate_limit("api", limiter=tasks))
    assert "ratelimit" in ask(app, ("GET", "/"))[0].headers
    another = limits.LimitMiddleware(PlainTextResponse("done"), limits.rate_limit("api", limiter=tasks))
    with conn.transaction():
        conn.execute("lock table pglimits.configs in access exclusive mode")
        (answer,) = ask(another, ("GET", "/"))
    assert (answer.status_code, "ratelimit" in answer.headers) == (200, False)


def test_a_role_that_may_not_look_gets_slots_without_the_fields(
    conn: Any, server_dsn: str, limiter: Limiter, caplog: pytest.LogCaptureFixture
) -> None:
    limiter.create("api", 1)
    conn.execute("drop role if exists only_user")
    conn.execute("create role only_user login in role pglimits_user")
    only = AsyncLimiter(server_dsn + " user=only_user")
    app = limits.LimitMiddleware(PlainTextResponse("done"), limits.concurrency("api", limiter=only))
    first, second = ask(app, ("GET", "/"), ("GET", "/"))
    assert (first.status_code, second.status_code) == (200, 200)
    assert "ratelimit" not in second.headers
    assert caplog.text.count("pglimits_reader") == 1
    asyncio.run(only.close())


@pytest.mark.parametrize("kind", ["dependency", "middleware"])
def test_a_client_that_goes_leaves_the_line_and_gives_back_its_slot(
    kind: str, limiter: Limiter, tasks: AsyncLimiter, serve: Serve, asks: Any, wait_until: Callable[..., Any]
) -> None:
    limiter.create("reports", 1)
    limit = limits.concurrency("reports", timeout_seconds=60, limiter=tasks)
    ended = threading.Event()

    async def endless(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        return StreamingResponse(body())

    app: Any = FastAPI()
    if kind == "dependency":
        app.get("/", dependencies=[Depends(limit)], response_model=None)(endless)
    else:
        app.add_route("/", endless)
        app.add_middleware(limits.LimitMiddleware, limit=limit)
    url = serve(app)

    with httpx.stream("GET", url, timeout=30) as streaming:
        chunks = streaming.iter_raw()
        next(chunks)
        assert len(limiter.holders()) == 1
        with asks(url):
            wait_until(lambda: len(limiter.waiters()) == 1)
        wait_until(lambda: limiter.waiters() == [])
        assert len(limiter.holders()) == 1
    wait_until(lambda: limiter.holders() == [])
    assert ended.wait(10)
