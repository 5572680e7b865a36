"""Who may do what: tokens, the login of the page, other sites, and where it listens."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, routing
from servertest import FULL, READ, TOKENS, Server
from starlette.datastructures import Headers

from pglimits.server import Settings, create_app
from pglimits.server._auth import is_same_site, reading, writing
from pglimits.server._prefect import PUBLIC


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def basic(secret: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{secret}".encode()).decode()}


def test_every_route_says_whether_it_reads_or_writes(dsn: str) -> None:
    """But for those that have to be open: health, and the way in."""
    open_to_all = {"/healthz", "/readyz", "/login", "/logout", "/openapi.json", *PUBLIC}
    app = create_app(Settings(dsn=dsn))
    seen = 0
    for path, methods, calls in _routes(app):
        if path in open_to_all or path.startswith("/static"):
            continue
        seen += 1
        assert calls & {reading, writing}, path
        if methods - {"GET", "HEAD"} and not path.endswith(("/peek", "/filter", "/read")):
            assert writing in calls, (path, methods)
    assert seen > 15


def _routes(app: FastAPI) -> Iterator[tuple[str, set[str], set[Any]]]:
    """Path, methods, and all that is called before the route itself."""
    walk = getattr(routing, "iter_route_contexts", iter)
    for route in walk(app.routes):
        dependant = getattr(route, "dependant", None)
        if dependant is not None and route.methods is not None:  # a socket only takes in what is thrown away
            yield route.path, set(route.methods), set(_calls(dependant))


def _calls(dependant: Any) -> Iterator[Any]:
    for inner in dependant.dependencies:
        yield inner.call
        yield from _calls(inner)


@pytest.mark.parametrize("form", [bearer, basic])
def test_a_full_token_may_do_all_and_one_for_reading_may_look(
    guarded: Server, form: Callable[[str], dict[str, str]]
) -> None:
    with guarded.client() as http:
        asked = [
            ("GET", "/v1/limits", None),
            ("POST", "/v1/limits", {"name": "a", "limit": 1}),
            ("PATCH", "/v1/limits/a", {"limit": 2}),
            ("POST", "/v1/acquire", {"name": "a"}),
            ("POST", "/v1/peek", {"name": "a"}),
            ("DELETE", "/v1/limits/a", None),
        ]
        by_read = [http.request(m, p, json=b, headers=form(READ)).status_code for m, p, b in asked]
        assert by_read == [200, 403, 403, 403, 200, 403]
        assert [http.request(m, p, json=b, headers=form(FULL)).status_code for m, p, b in asked] == [
            200,
            201,
            200,
            200,
            200,
            204,
        ]
        for headers in ({}, form("wrong-secret-0123456789"), {"Authorization": ""}):
            for method, path, body in asked:
                response = http.request(method, path, json=body, headers=headers)
                assert (response.status_code, response.headers["www-authenticate"]) == (401, 'Bearer realm="pglimits"')
        assert [http.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]


def test_an_origin_that_is_none_is_of_another_site(guarded: Server) -> None:
    with guarded.client() as http:
        for path in ("/login", "/v1/limits"):
            assert http.post(path, headers={"Origin": "http://["}).status_code in (401, 403), path
    assert not is_same_site(Headers({"Origin": "http://[", "Host": "localhost"}), needs_proof=False)


def test_why_the_database_cannot_be_reached_is_told_to_those_who_may_read(serve: Callable[..., Server]) -> None:
    server = serve(on="host=127.0.0.1 port=1 user=somebody dbname=x connect_timeout=2", **TOKENS)
    with server.client() as http:
        for headers in ({}, bearer(READ)):
            answer = http.get("/readyz", headers=headers)
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
            if not headers:
                assert answer.json()["detail"] == "the database cannot be reached, or not be used"


def test_no_secret_is_said_anywhere(serve: Callable[..., Server]) -> None:
    guarded = serve(**TOKENS)
    with guarded.client() as http:
        said = [
            http.get("/v1/limits", headers=bearer(f"{FULL}x")).text,
            http.post("/v1/limits", headers=bearer(READ), json={"name": "a", "limit": 1}).text,
            http.post("/login", data={"token": FULL, "next": "/"}).text,
            str(http.post("/login", data={"token": FULL, "next": "/"}).headers),
            http.get("/v1/limits?token=" + FULL).text,
        ]
    _, err = guarded.terminate()
    assert not [text for text in [*said, err, guarded.said] if FULL in text or READ in text]


def test_a_login_sets_a_cookie_that_opens_the_page_and_a_logout_ends_it(guarded: Server) -> None:
    with guarded.client() as http:
        response = http.get("/", headers={"Accept": "text/html"})
        assert (response.status_code, response.headers["location"]) == (303, "/login?next=%2F")
        wrong = http.post("/login", data={"token": "wrong", "next": "/limits/a"})
        assert (wrong.status_code, wrong.headers["location"]) == (303, "/login?failed=1&next=%2Flimits%2Fa")
        assert not http.cookies
        right = http.post("/login", data={"token": READ, "next": "/limits/a"})
        assert (right.status_code, right.headers["location"]) == (303, "/limits/a")
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "Secure" not in cookie
        assert http.get("/v1/limits").status_code == 200
        assert http.post("/v1/limits", json={"name": "a", "limit": 1}, headers=same_site()).status_code == 403
        http.post("/logout", headers=same_site())
        assert http.get("/v1/limits").status_code == 401


def same_site() -> dict[str, str]:
    return {"Sec-Fetch-Site": "same-origin"}


def test_the_cookie_is_for_https_alone_where_the_page_came_that_way(guarded: Server) -> None:
    with guarded.client() as http:
        response = http.post("/login", data={"token": FULL}, headers={"X-Forwarded-Proto": "https"})
        assert "Secure" in response.headers["set-cookie"]


@pytest.mark.parametrize("wanted", ["//evil.example/", "https://evil.example/", "/\\evil.example", "", "javascript:x"])
def test_a_login_leads_nowhere_else(guarded: Server, wanted: str) -> None:
    with guarded.client() as http:
        assert http.post("/login", data={"token": FULL, "next": wanted}).headers["location"] == "/"


def test_a_forged_cookie_opens_nothing(guarded: Server) -> None:
    with guarded.client() as http:
        http.post("/login", data={"token": READ})
        value = http.cookies["pglimits_session"]
    name, ends, signature = value.split(".")
    other = base64.urlsafe_b64encode(b"ops").decode().rstrip("=")
    for forged in (
        f"{other}.{ends}.{signature}",
        f"{name}.{int(ends) + 1}.{signature}",
        f"{name}.1.{signature}",
        "",
        "x.y",
    ):
        with guarded.client() as nobody:
            response = nobody.get("/v1/limits", headers={"Cookie": f"pglimits_session={forged}".encode()})
        assert response.status_code == 401


def test_the_page_of_another_site_changes_nothing(guarded: Server, serve: Callable[..., Server]) -> None:
    """With a cookie, and without tokens, a browser sends it along with whatever another site has it send."""
    with guarded.client() as http:
        http.post("/login", data={"token": FULL})
        body = {"name": "a", "limit": 1}
        for headers in (
            {},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
        ):
            assert http.post("/v1/limits", json=body, headers=headers).status_code == 403
        assert http.post("/v1/limits", json=body, headers={"Origin": guarded.url}).status_code == 201
    with serve().client() as http:
        assert http.post("/v1/limits", json=body, headers={"Origin": "http://evil.example"}).status_code == 403
        assert http.post("/v1/limits", json=body, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert http.post("/v1/acquire", json={"name": "b"}).status_code == 200


def test_a_socket_of_another_site_is_refused(shared: Server) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    url = shared.url.replace("http://", "ws://") + "/api/events/in"
    with connect(url):
        pass
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        with pytest.raises(InvalidStatus), connect(url, additional_headers=headers):
            pass


def test_without_tokens_it_is_called_by_names_of_this_machine_only(serve: Callable[..., Server]) -> None:
    server = serve("--allow-host", "limits.internal")
    with server.client() as http:
        for host, status in (
            ("localhost", 200),
            ("127.0.0.1:4200", 200),
            ("[::1]:4200", 200),
            ("x.localhost", 200),
            ("limits.internal", 200),
            ("evil.example", 421),
            ("127.0.0.1.evil.example", 421),
            ("", 421),
        ):
            assert http.get("/v1/limits", headers={"Host": host}).status_code == status, host


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, dsn: str) -> Callable[..., str]:
    """refused("--host", "::", PGLIMITS_TOKENS="…"): what is said of a command line that is wrong."""
    from pglimits_cli._app import app
    from typer.testing import CliRunner

    def call(*arguments: str, **environment: str) -> str:
        result = CliRunner().invoke(app, ["serve", "--dsn", dsn, *arguments], env=environment)
        assert result.exit_code == 2, result
        return result.stderr

    for name in ("PGLIMITS_TOKENS", "PGLIMITS_READ_TOKENS"):
        monkeypatch.delenv(name, raising=False)
    return call


def test_elsewhere_than_on_this_machine_it_wants_tokens(refused: Callable[..., str]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        assert "PGLIMITS_TOKENS=name:secret" in refused("--host", host)


@pytest.mark.parametrize(
    "tokens", ["onlyasecret0123456789", "a:short", ":nameless-secret-0123", "a:same-0123456789abc,a:same-0123456789abc"]
)
def test_tokens_that_are_written_wrong_are_an_error_that_does_not_repeat_them(
    refused: Callable[..., str], tokens: str
) -> None:
    said = refused(PGLIMITS_TOKENS=tokens)
    assert not [part for part in re.split(r"[: ]", tokens) if len(part) > 4 and part in said], said


def test_tokens_may_come_from_files(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "full").write_text(f"# ops\nops:{FULL}\n")
    (tmp_path / "read").write_text(f"eyes:{READ}\n")
    server = serve("--token-file", str(tmp_path / "full"), "--read-token-file", str(tmp_path / "read"))
    with server.client(FULL) as http:
        assert http.post("/v1/limits", json={"name": "a", "limit": 1}).status_code == 201
    with server.client(READ) as http:
        assert http.delete("/v1/limits/a").status_code == 403
