"""The programs of docs/languages, run as their pages say: never over the limit, and nothing is lost."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import pytest
from languages import CUTS, PAGES, Page, environment, run, watched

Env: TypeAlias = dict[str, str]
JOBS = 1600
GOPATH = Path("/usr/share/gocode")
GO_PACKAGES = ("jackc/pgx/v4", "lib/pq")


@pytest.fixture
def node(tmp_path: Path, node_folder: Path) -> Env:
    (tmp_path / "node_modules").symlink_to(node_folder / "node_modules")
    return {}


@pytest.fixture
def python() -> Env:
    """The interpreter of the tests has the drivers."""
    return {}


@pytest.fixture
def go(tmp_path: Path) -> Env:
    """With Debian's packages, which need no module, and whose pgx is the older one."""
    if shutil.which("go") is None or not all((GOPATH / "src/github.com" / each).exists() for each in GO_PACKAGES):
        pytest.skip("needs golang-go, golang-github-jackc-pgx-v4-dev and golang-github-lib-pq-dev")
    changes = re.findall(r"`(\S+)`\s+in\s+place\s+of\s+`(\S+)`", (PAGES / "go.md").read_text(encoding="utf-8"))
    assert len(changes) == 2
    program = tmp_path / "with_pgx.go"
    text = program.read_text(encoding="utf-8")
    for of_debian, of_page in changes:
        assert of_page in text
        text = text.replace(of_page, of_debian)
    program.write_text(text, encoding="utf-8")
    return {"GO111MODULE": "off", "GOPATH": str(GOPATH)}


@pytest.mark.parametrize(
    ("language", "page", "command", "listens"),
    [
        ("node", "node.md", "node with_pg.mjs", True),
        ("node", "node.md", "node with_postgres.mjs", True),
        ("go", "go.md", "go run slots.go work.go with_pgx.go", True),
        ("go", "go.md", "go run slots.go work.go with_pq.go", True),
        ("python", "python-drivers.md", "python with_psycopg2.py", True),
        ("python", "python-drivers.md", "python with_asyncpg.py", True),
        ("python", "python-drivers.md", "python with_sqlalchemy.py", False),
        ("python", "python-drivers.md", "python with_django.py", False),
    ],
)
def test_eight_workers_of_200_jobs_are_never_over_a_limit_of_3(
    language: str, page: str, command: str, listens: bool, request: pytest.FixtureRequest, tmp_path: Path,
    server_dsn: str, connect: Callable[[], psycopg.Connection[Any]],
) -> None:  # fmt: skip
    read = Page.read(page)
    assert command in read.commands()
    read.save(tmp_path)
    env = environment(server_dsn) | request.getfixturevalue(language)
    for statements in read.code("sql"):
        connect().execute(statements.encode())
    with watched(server_dsn) as seen:
        done = run(command, tmp_path, env)
    assert (done.returncode, done.stdout) == (0, read.prints()), done.stderr

    assert 0 < seen.most <= 3
    fences = [fence for _, fence in sorted(seen.leases.values())]
    assert fences == sorted(set(fences))
    assert (seen.cuts, seen.listened) == (len(CUTS), listens)
    conn = connect()
    # One more has all three slots for a while.
    row = conn.execute("select grants, releases, leases from pglimits.counters where name = 'database'").fetchone()
    assert row == (JOBS + 1, JOBS + 1, 0)
    assert conn.execute("select held, waiting from pglimits.limits where name = 'database'").fetchone() == (0, 0)
    row = conn.execute("select granted_slots from pglimits.counters where name = 'starts'").fetchone()
    assert row == (8,)
