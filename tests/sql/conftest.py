"""Fixtures of the SQL tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from installtest import other_dsn, psql
from sqltest import Db, Session

__all__ = ["db", "other_dsn", "psql", "s"]


@pytest.fixture
def db(connect: Callable[..., psycopg.Connection[Any]], wait_until: Callable[..., Any]) -> Iterator[Db]:
    """The test's database, with threads to call it from."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        db = Db(connect, wait_until, pool)
        yield db
        # Whatever a failed test left waiting must not keep the pool from ending.
        db.main.connection.rollback()
        db.main.run(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'"
        )


@pytest.fixture
def s(db: Db) -> Session:
    """The test's main session."""
    return db.main


@pytest.fixture
def heard(db: Db) -> Callable[[], list[str]]:
    """heard(): what was sent so far to the channel pglimits_t, and not heard before."""
    listener = db.session().connection
    listener.execute("listen pglimits_t")

    def all_so_far() -> list[str]:
        db.main.run("select pg_notify('pglimits_t', 'end')")
        found: list[str] = []
        for notice in listener.notifies(timeout=60):
            if notice.payload == "end":
                return found
            found += notice.payload.split("\n")
        raise AssertionError(found)

    return all_so_far
