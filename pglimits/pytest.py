"""Fixtures for the tests of a project that uses limits (extra ``pytest``).

``pytest_plugins = ["pglimits.pytest"]`` in the project's conftest.py makes them known. Nothing is loaded unasked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import psycopg
import pytest

from . import _default, _embedded, _install
from ._limiter import AsyncLimiter, Limiter

__all__ = ["pglimits_async_limiter", "pglimits_dsn", "pglimits_limiter"]


@pytest.fixture(scope="session")
def pglimits_dsn() -> Iterator[str]:
    """The database of the tests, with pglimits in it: that of PGLIMITS_TEST_DSN, else a throwaway embedded server.

    A project overrides this fixture with its own database. The throwaway server dies with the tests.

    Raises:
        EmbeddedUnavailable: there is no PostgreSQL to embed, and PGLIMITS_TEST_DSN is not set.
    """
    given = os.environ.get("PGLIMITS_TEST_DSN")
    if given is not None:
        _install.install(given)
        yield given
        return
    with _embedded.throwaway() as server:
        _install.install(server.dsn)
        yield server.dsn


@pytest.fixture
def pglimits_limiter(pglimits_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Limiter]:
    """A limiter on the database of the tests. Until the test ends, ``pglimits.sync`` and ``pglimits.asyncio`` use it.

    Limits that a test creates are deleted at its end, with their leases. Those that were there before stay as they are.
    So tests that share a database take turns, such as those of several workers of pytest-xdist.
    """
    with psycopg.connect(pglimits_dsn) as turn, Limiter(pglimits_dsn) as limiter:
        # Of the transaction: a pooler would leave one of the session to whoever has that next.
        turn.execute("set local idle_in_transaction_session_timeout = 0")
        turn.execute("select pg_advisory_xact_lock(hashtextextended('pglimits.pytest', 0))")
        monkeypatch.setenv("PGLIMITS_DSN", pglimits_dsn)
        monkeypatch.setattr(_default, "_limiter", limiter)
        before = {limit.name for limit in limiter.list()}
        yield limiter
        for limit in limiter.list():
            if limit.name not in before:
                limiter.delete(limit.name)


@pytest.fixture
def pglimits_async_limiter(pglimits_limiter: Limiter) -> AsyncLimiter:
    """The same limiter for tasks."""
    return pglimits_limiter._in_tasks()
