"""The fixtures for the tests of a project, in a run of pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import blocks

import pglimits

TESTS = """
import asyncio
import pytest
from pglimits import AcquireTimeout
from pglimits.sync import concurrency

@concurrency("reports", strict=True, timeout_seconds=0)
def report(body):
    return body()

def test_a_limit(pglimits_limiter):
    pglimits_limiter.create("reports", limit=1)
    assert report(lambda: pglimits_limiter.get("reports").held) == 1
    with pytest.raises(AcquireTimeout):
        report(lambda: report(lambda: None))
    pglimits_limiter.acquire("reports", renew=False)

def test_the_next_one_begins_anew(pglimits_limiter, pglimits_async_limiter):
    assert "reports" not in [limit.name for limit in pglimits_limiter.list()]

    async def work():
        await pglimits_async_limiter.create("reports", 1)
        async with pglimits_async_limiter.concurrency("reports"):
            assert (await pglimits_async_limiter.get("reports")).held == 1

    asyncio.run(work())
"""


CONFTEST, EXAMPLE = (block.code for block in blocks("docs/frameworks.md", "py") if block.section == "pytest")


def run(folder: Path, *options: str, **environment: str) -> None:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_project.py").write_text(TESTS)
    (folder / "test_reports.py").write_text(EXAMPLE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PGLIMITS_DSN"))}
    kept["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    nothing_else = ("-p", "no:cacheprovider", "--rootdir", str(folder), "-c", os.devnull)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *nothing_else, *options],
        cwd=folder, env={**kept, **environment}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert (done.returncode, "3 passed" in done.stdout) == (0, True), done.stdout + done.stderr


def test_a_project_without_a_database_gets_a_throwaway_one(tmp_path: Path) -> None:
    run(tmp_path)


@pytest.mark.parametrize("pooler", [None, "transaction"])
def test_limits_of_a_given_database_stay(
    tmp_path: Path, dsn: str, limiter: pglimits.Limiter, request: pytest.FixtureRequest, pooler: str | None
) -> None:
    limiter.create("kept", 1)
    given = dsn if pooler is None else request.getfixturevalue("pooled")(pooler, size=10)
    run(tmp_path, "-p", "xdist", "-n", "2", PGLIMITS_TEST_DSN=given)  # workers take turns
    assert [limit.name for limit in limiter.list()] == ["kept"]


def test_nothing_of_a_framework_is_imported_unasked(dsn: str) -> None:
    code = (
        "import sys, pglimits.sync, pglimits.asyncio; pglimits.Limiter().list();"
        "print({'django', 'starlette', 'fastapi', 'httpx', 'http_sf', 'sqlalchemy', 'alembic', 'pytest'}"
        " & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PGLIMITS_DSN": dsn},
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    assert done.stdout == "set()\n"
