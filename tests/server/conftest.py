"""A real server process, started as a user starts it, on a real database."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "faults"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from psycopg.conninfo import conninfo_to_dict
from servertest import TOKENS, Server

from pglimits import _install


@pytest.fixture
def serve(dsn: str) -> Iterator[Callable[..., Server]]:
    """serve("--root-path", "/x", PGLIMITS_TOKENS="…"): a process of this test's own, on its own database."""
    started: list[Server] = []

    def begin(*arguments: str, on: str | None = dsn, **environment: str) -> Server:
        server = Server(on, arguments, environment)
        started.append(server)
        server.wait()
        return server

    yield begin
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def shared_dsn(server: Any, by_way: Callable[[str], str], worker_id: str) -> str:
    """Of a database that several tests use, one after the other."""
    name = f"served_{worker_id}"
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f"create database {name}".encode())
    _install.install(server.dsn(name))
    return by_way(server.dsn(name))


@pytest.fixture(scope="session")
def _shared(shared_dsn: str) -> Iterator[Server]:
    yield from _running(Server(shared_dsn))


@pytest.fixture(scope="session")
def _guarded(shared_dsn: str) -> Iterator[Server]:
    yield from _running(Server(shared_dsn, environment=TOKENS))


def _running(started: Server) -> Iterator[Server]:
    started.wait()
    yield started
    said = started.kill()
    assert "Traceback" not in said, said
    assert "Exception in ASGI" not in said, said


@pytest.fixture
def no_limits(shared_dsn: str, server: Any) -> None:
    """What other tests have left in the shared database is gone."""
    name = conninfo_to_dict(shared_dsn)["dbname"]
    with psycopg.connect(server.dsn(str(name)), autocommit=True) as connection:
        connection.execute("select pglimits.delete_limit(name) from pglimits.limits")


@pytest.fixture
def shared(_shared: Server, no_limits: None) -> Server:
    """A server without tokens that several tests use, one after the other. There are no limits."""
    return _shared


@pytest.fixture
def guarded(_guarded: Server, no_limits: None) -> Server:
    """The same with tokens."""
    return _guarded


@pytest.fixture
def http(shared: Server) -> Iterator[httpx.Client]:
    """A client of it."""
    with shared.client() as client:
        yield client
