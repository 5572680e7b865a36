"""import prefect: the limits of a Prefect, by its API or out of its database."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import prefect_tables
import psycopg
import pytest
from clitest import Terminal
from psycopg.conninfo import conninfo_to_dict

from pglimits import Limiter, _install

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]

ROWS = (
    ("database", 10, 0.0, True, 0),
    ("mails", 5, 0.25, True, 4),
    ("off", 2, 0.0, False, 0),
    ("shut", 0, 0.0, True, 0),
    ("tag:gpu", 2, 0.0, True, 1),
    ("deployment:0d2cbb0e-4b3b-4a0f-9d5e-123456789abc", 1, 0.0, True, 1),
)
TAKEN = [
    ("database", 10, 0.0, True, None, None),
    ("mails", 5, 0.25, True, None, None),
    ("off", 2, 0.0, False, None, None),
    ("shut", 0, 0.0, True, None, None),
]
SHOWN = """\
+ 'database'  limit: 10
+ 'mails'  limit: 5, slot_decay_per_second: 0.25
+ 'off'  limit: 2, active: false
+ 'shut'  limit: 0

"""


@pytest.fixture(autouse=True)
def _no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """file(*rows, tags=…): the path of a file as Prefect has it by default."""

    def made(*rows: tuple[Any, ...], tags: tuple[str, ...] = ()) -> str:
        path = tmp_path / "prefect 1.db"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            prefect_tables.create(connection.execute, *rows, tags=tags)
            connection.commit()
        return str(path)

    return made


def limits(conn: Connection) -> list[tuple[Any, ...]]:
    return conn.execute(
        'select name, "limit", slot_decay_per_second, active, max_waiters, description from pglimits.limits'
        " order by name"
    ).fetchall()


def refuses(result: Any, *said: str) -> None:
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("Error: ") and "Traceback" not in result.err
    for text in said:
        assert text in result.err, result.err


# Out of a database.


@pytest.fixture(params=["a path", "a URL of SQLite", "a URL of PostgreSQL"])
def database(request: pytest.FixtureRequest, file: Any) -> str:
    if request.param == "a path":
        return str(file(*ROWS, tags=("old",)))
    if request.param == "a URL of SQLite":
        return f"sqlite+aiosqlite:///{file(*ROWS, tags=('old',))}"
    dsn: str = request.getfixturevalue("bare_dsn")
    with psycopg.connect(dsn, autocommit=True) as connection:
        prefect_tables.create(connection.execute, *ROWS, tags=("old",), mark="%s")
    return as_prefect_has_it(dsn)


def as_prefect_has_it(dsn: str) -> str:
    given = conninfo_to_dict(dsn)
    return (
        f"postgresql+asyncpg://{given['user']}@/{given['dbname']}?host={quote(str(given['host']), safe='')}"
        f"&port={given['port']}&prepared_statement_cache_size=0&ssl=prefer"
    )


def test_limits_come_out_of_a_database_and_the_plan_is_what_is_done(
    pglimits: Cli, conn: Connection, database: str
) -> None:
    notes = "Not taken over, as Prefect itself enforces them: 2 limits of tags and 1 limit of deployments.\n"
    planned = pglimits("import", "prefect", "--database", database, "--plan")
    assert (planned.code, planned.out, planned.err) == (2, f"{SHOWN}Plan: 4 to create.\n", notes)
    assert limits(conn) == []
    done = pglimits("import", "prefect", "--database", database)
    assert (done.code, done.err) == (0, notes)
    assert re.fullmatch(re.escape(SHOWN) + r"Imported from \S.*: 4 created\.\n", done.out)
    assert limits(conn) == TAKEN
    for again in ((), ("--plan",)):
        result = pglimits("import", "prefect", "--database", database, *again)
        assert (result.code, result.out) == (0, "Nothing to do: 4 unchanged.\n")


def test_a_limit_that_is_here_is_changed_only_if_that_is_confirmed_and_keeps_what_prefect_does_not_know(
    pglimits: Cli, conn: Connection, file: Any, terminal: Callable[..., Terminal]
) -> None:
    conn.execute("select pglimits.create_limit('database', 5, 0.5, false, 7, 'the main one')")
    conn.execute("select pglimits.create_limit('ours', 1)")
    source = ("import", "prefect", "--database", file(*ROWS))
    before = limits(conn)
    result = pglimits(*source)
    assert result.code == 2 and "Change 1 limit that is here already: 'database'?" in result.err
    assert "Not in Prefect, and left alone: 'ours'.\n" in result.err
    assert result.out.startswith(
        "~ 'database'\n    limit: 5 → 10\n    slot_decay_per_second: 0.5 → 0\n    active: false → true\n+ 'mails'"
    )
    assert limits(conn) == before

    result = pglimits(*source, "--create-only", "--plan")
    assert "= 'database' stays as it is (create-only): limit: 5, not 10" in result.out
    assert result.out.endswith("Plan: 3 to create, 1 kept.\n")

    asked = terminal(*source)
    asked.read_until("[y/N]")
    asked.type("n\n")
    assert asked.wait() == 1
    assert limits(conn) == before

    assert pglimits(*source, "--create-only").code == 0
    assert limits(conn) == [before[0], *TAKEN[1:2], TAKEN[2], before[1], TAKEN[3]]
    result = pglimits(*source, "--yes")
    assert result.code == 0 and result.out.endswith(": 1 changed, 3 unchanged.\n")
    assert limits(conn)[0] == ("database", 10, 0.0, True, 7, "the main one")


def test_what_cannot_be_taken_over_is_named_and_nothing_is_done_unless_it_is_left_out(
    pglimits: Cli, conn: Connection, file: Any
) -> None:
    path = file(
        *ROWS[:2], ("a\tb", 1, 0.0, True, 0), ("big", 2**31, 0.0, True, 0), ("fast", 1, 1e10, True, 0),
        ("x" * 201, 1, 0.0, True, 0), ("a/b", 1, 0.0, True, 0), ("", 1, 0.0, True, 0), ("less", -1, 0.0, True, 0),
    )  # fmt: skip
    for wish in ("--plan", "--yes"):
        result = pglimits("import", "prefect", "--database", path, wish)
        refuses(
            result,
            "'a\\tb' cannot be taken over: name must not contain control characters",
            "'big' cannot be taken over: limit must be at most 2147483647, not 2147483648",
            "'fast' cannot be taken over: slot_decay_per_second must be at most 1000000000",
            f"'{'x' * 60}…' cannot be taken over: name must have 1 to 200 characters, not 201",
            "'a/b' cannot be taken over: name must not contain any of / % & > <",
            "'' cannot be taken over: name must have 1 to 200 characters",
            "'less' cannot be taken over: limit must be at least 0",
            "Error: nothing was changed. Take over the others with --leave-out, and create these as pglimits allows it",
        )
        assert len(result.err.splitlines()) == 8
    assert limits(conn) == []
    result = pglimits("import", "prefect", "--database", path, "--leave-out")
    assert result.code == 0 and result.out.endswith(": 2 created.\n")
    assert result.err.count("Left out: ") == 7
    assert limits(conn) == TAKEN[:2]


def test_slots_that_are_held_in_prefect_are_not_taken_over_and_that_is_said(
    pglimits: Cli, conn: Connection, file: Any
) -> None:
    path = file(("database", 10, 0.0, True, 3), ("mails", 5, 0.25, True, 4), ("other", 1, 0.0, True, 1))
    result = pglimits("import", "prefect", "--database", path)
    assert result.err == (
        "Held in Prefect now, and not taken over: 4 slots of 'database', 'other'."
        " Until they are released there, they do not count here.\n"
    )
    assert conn.execute("select sum(held), sum(level) from pglimits.limits").fetchone() == (0, 0)


def test_json_says_all_of_it(pglimits: Cli, file: Any) -> None:
    path = file(*ROWS[:2], ("held", 1, 0.0, True, 1), ("a\tb", 1, 0.0, True, 0), *ROWS[4:])
    asked = ("import", "prefect", "--database", path, "--leave-out", "-o", "json")
    result = pglimits(*asked, "--plan")
    assert (result.code, result.err) == (2, "")
    told = result.json
    assert [(step["name"], step["action"]) for step in told.pop("limits")] == [
        ("database", "create"), ("held", "create"), ("mails", "create"),
    ]  # fmt: skip
    assert told == {
        "pglimits_plan": 1,
        "file": path,
        "prune": False,
        "summary": {"create": 3, "update": 0, "delete": 0, "keep": 0, "none": 0},
        "left_out": [{"name": "a\tb", "fault": 'name must not contain control characters: "a\\tb"'}],
        "held_in_prefect": {"held": 1},
        "limits_of_tags": 1,
        "limits_of_deployments": 1,
        "applied": False,
    }
    done = pglimits(*asked)
    assert (done.code, done.err, done.json["applied"]) == (0, "", True)
    assert pglimits(*asked).json["summary"]["none"] == 3


def test_a_database_that_has_no_limits_of_prefect_is_an_error_that_says_why(
    pglimits: Cli, conn: Connection, server_dsn: str, tmp_path: Path
) -> None:
    def asked(database: str) -> Any:
        return pglimits("import", "prefect", "--database", database)

    refuses(asked(str(tmp_path / "none.db")), "there is no file", "none.db", "PREFECT_HOME")
    refuses(asked(f"sqlite+aiosqlite:///{tmp_path}"), "there is no file")
    (tmp_path / "text.db").write_text("this is no database " * 100)
    refuses(asked(str(tmp_path / "text.db")), "cannot be read as a database of Prefect", "not a database")
    sqlite3.connect(tmp_path / "other.db").close()
    refuses(asked(str(tmp_path / "other.db")), "other.db is not Prefect's: it has no table concurrency_limit_v2")
    with contextlib.closing(sqlite3.connect(tmp_path / "old.db")) as connection:
        connection.execute(prefect_tables.TAGS)
    refuses(asked(str(tmp_path / "old.db")), "is of a Prefect that is too old for global concurrency limits")

    url = as_prefect_has_it(server_dsn)
    name = conninfo_to_dict(server_dsn)["dbname"]
    refuses(asked(url), f"database {name} at", "is not Prefect's: it has no table concurrency_limit_v2")
    conn.execute(prefect_tables.TAGS)
    refuses(asked(url), "too old for global concurrency limits")
    conn.execute("create table concurrency_limit_v2 (name text)")
    refuses(asked(url), f"Prefect's database {name} at", 'column "limit" does not exist')
    refuses(asked("postgresql+asyncpg://secret@127.0.0.1:1/prefect"), "Prefect's database prefect at 127.0.0.1:1")
    refuses(asked(url.replace(str(name), "not-there")), "Prefect's database not-there at", "does not exist")
    refuses(asked("postgresql+asyncpg://u:secret@[/prefect"), "--database is not a URL as postgresql+asyncpg://")
    refuses(asked("mysql://root@localhost/prefect"), "--database must be a URL of PostgreSQL or SQLite")
    assert limits(conn) == []


# Through the API.


def test_all_pages_of_a_server_are_read(pglimits: Cli, conn: Connection, bare_dsn: str, start: Any) -> None:
    """A server of ours has Prefect's routes."""
    _install.install(bare_dsn)
    with Limiter(bare_dsn) as limiter:
        for nth in range(205):
            limiter.create(f"limit {nth:03}", nth, nth / 4, nth % 2 == 0)
    secret = "a-secret-of-twenty-characters"
    serving = start("serve", "--port", "0", "--dsn", bare_dsn, env={**os.environ, "PGLIMITS_TOKENS": f"ops:{secret}"})
    said = serving.stdout.readline()
    url = re.findall(r"http://[^\s/]+", said)[0] + "/api"
    refuses(
        pglimits("import", "prefect", "--api-url", url), f"{url} refuses to answer (401 ", "nothing was given",
        "--api-key",
    )  # fmt: skip
    refuses(pglimits("import", "prefect", "--api-url", url, "--api-key", "wrong"), "(401 ", "--api-key was given")
    refuses(
        pglimits("import", "prefect", "--api-url", url[:-4], "--api-key", secret),
        "is not the address of Prefect's API",
        "/api",
    )
    result = pglimits("import", "prefect", "--api-url", f"{url}/", "--api-key", secret)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith(f"Imported from {url}: 205 created.\n")
    with Limiter(bare_dsn) as limiter:
        theirs = [(of.name, of.limit, of.slot_decay_per_second, of.active, None, None) for of in limiter.list()]
    assert limits(conn) == theirs


class Prefect(ThreadingHTTPServer):
    """Answers as a Prefect that is not to be had here, or is having a bad day. ``heard``: what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.answers: dict[str, Any] = {}
        self.heard: list[tuple[str, dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/api"


class _Answer(BaseHTTPRequestHandler):
    server: Prefect

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0].removeprefix("/api")
        self.server.heard.append((path, dict(self.headers)))
        answer = self.server.answers.get(path, (404, {"detail": "Not Found"}))
        status, body, *headers = answer(self.headers) if callable(answer) else answer
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def prefect() -> Iterator[Prefect]:
    with Prefect() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


V2 = "/v2/concurrency_limits/filter"


def test_an_api_that_cannot_be_read_is_an_error_that_says_why_and_what_to_do(
    pglimits: Cli, conn: Connection, prefect: Prefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(url: str = prefect.url, *more: str) -> Any:
        return pglimits("import", "prefect", "--api-url", url, *more)

    refuses(pglimits("import", "prefect"), "which Prefect? Give --api-url or set PREFECT_API_URL", "--database")
    refuses(asked(prefect.url, "--database", "x.db"), "--database does not go with --api-url")
    for url in (
        "ftp://host/api",
        "file:///etc/passwd",
        "127.0.0.1:4200/api",
        "http://h:x/api",
        "http://[/api",
        "http:",
    ):
        refuses(asked(url), "--api-url must be a URL such as http://127.0.0.1:4200/api")
    refuses(asked("http://me:hush@127.0.0.1/api"), "no user and password", "PREFECT_API_AUTH_STRING")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refuses(asked(f"http://127.0.0.1:{closed.getsockname()[1]}/api"), "cannot be reached: ", "Connection refused")
    for key in ("", "a\nb", "ké"):
        result = asked(prefect.url, "--api-key", key)
        refuses(result, "--api-key is empty, or has characters that no key has")

    refuses(asked(), f"{prefect.url} is not the address of Prefect's API, which ends with /api (404 Not Found")
    prefect.answers = {"/admin/version": (200, "2.10.21".join('""'))}
    refuses(asked(), f"the Prefect 2.10.21 at {prefect.url} is too old for global concurrency limits")
    prefect.answers = {V2: (200, "<html>")}
    refuses(asked(), "is not the address of Prefect's API, which ends with /api (it answers, but not with JSON)")
    for page in ((200, {"limits": []}), (200, [{"id": 1}]), (200, [{"name": "a", "limit": 1}])):
        prefect.answers = {V2: page}
        result = asked()
        assert result.code == 1 and prefect.url in result.err and "Traceback" not in result.err
    prefect.answers = {V2: (503, {"exception_message": "database is locked"})}
    refuses(asked(), "answers with an error: 503 Service Unavailable: database is locked")
    prefect.answers = {V2: (403, {"detail": "Forbidden for this workspace"})}
    monkeypatch.setenv("PREFECT_API_KEY", "pnu_1")
    refuses(asked(), "refuses to answer (403 Forbidden: Forbidden for this workspace); PREFECT_API_KEY was given")
    prefect.answers = {V2: (307, "", ("Location", "https://elsewhere.example/api"))}
    refuses(asked(), "307", "it has moved to https://elsewhere.example/api")
    assert limits(conn) == []


def test_a_name_that_postgresql_cannot_keep_is_named(pglimits: Cli, prefect: Prefect) -> None:
    row = {"limit": 1, "slot_decay_per_second": 0.0, "active": True, "active_slots": 0}
    for name in ("half \ud800", "nul \x00"):
        prefect.answers[V2] = (200, [{**row, "name": name}])
        refuses(
            pglimits("import", "prefect", "--api-url", prefect.url, "--plan"),
            f"{name!r} cannot be taken over: name must be Unicode without the character U+0000",
        )


def test_who_asks_is_said_as_prefects_client_says_it(
    pglimits: Cli, prefect: Prefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefect.answers = {V2: (200, [])}
    monkeypatch.setenv("PREFECT_API_URL", prefect.url)

    def sent(*options: str) -> str | None:
        prefect.heard.clear()
        assert pglimits("import", "prefect", *options).out == "Nothing to do.\n"
        return prefect.heard[0][1].get("Authorization")

    assert sent() is None
    monkeypatch.setenv("PREFECT_API_KEY", "pnu_1")
    assert sent() == "Bearer pnu_1"
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:pass")
    assert sent() == "Basic YWRtaW46cGFzcw=="
    assert sent("--api-key", "pnu_2") == "Bearer pnu_2"


def test_tags_of_an_old_server_are_counted_and_one_that_protects_itself_from_csrf_is_asked_as_it_wants(
    pglimits: Cli, conn: Connection, prefect: Prefect
) -> None:
    def page(rows: list[dict[str, Any]]) -> Callable[[Any], tuple[int, Any]]:
        def answer(headers: Any) -> tuple[int, Any]:
            if headers.get("Prefect-Csrf-Token") != "token" or len(headers.get("Prefect-Csrf-Client", "")) != 36:
                return 403, {"detail": "Missing CSRF token."}
            return 200, rows

        return answer

    database = {"name": "database", "limit": 3, "slot_decay_per_second": 0.0, "active": True, "active_slots": 0}
    prefect.answers = {
        V2: page([database, {**database, "name": "tag:a"}]),
        "/concurrency_limits/filter": page([{"tag": "a"}, {"tag": "b"}]),
        "/csrf-token": (200, {"token": "token"}),
    }
    result = pglimits("import", "prefect", "--api-url", prefect.url)
    assert (result.code, result.err) == (0, "Not taken over, as Prefect itself enforces them: 2 limits of tags.\n")
    assert limits(conn) == [("database", 3, 0.0, True, None, None)]
