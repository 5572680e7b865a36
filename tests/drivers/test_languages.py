"""The programs of docs/languages, run as their pages say: never over the limit, and nothing is lost."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import pytest
from languages import PAGES, ROOT, Page, by_tcp, environment, run, watched
from psycopg.conninfo import conninfo_to_dict

Env: TypeAlias = dict[str, str]
Connect: TypeAlias = Callable[[], psycopg.Connection[Any]]
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


@pytest.fixture
def java(tmp_path: Path, server_dsn: str) -> Iterator[Env]:
    """Compiled as its page says, with Debian's jars. JDBC knows no unix sockets."""
    path, compile_all = Page.read("java.md").commands()[:2]
    jars = [Path(each) for each in path.split("=")[1].split(":")[1:]]
    if shutil.which("javac") is None or not all(each.exists() for each in jars):
        pytest.skip("needs default-jdk-headless, libpostgresql-jdbc-java and libhikaricp-java")
    env = {"CLASSPATH": path.split("=")[1]}
    compiled = run(compile_all, tmp_path, os.environ | env)
    assert compiled.returncode == 0, compiled.stderr
    with by_tcp(server_dsn) as port:
        to = conninfo_to_dict(server_dsn)
        yield env | {"JDBC_URL": f"jdbc:postgresql://127.0.0.1:{port}/{to['dbname']}?user={to['user']}"}


@pytest.fixture
def ruby() -> Env:
    if shutil.which("ruby") is None or run("ruby -e 'require %(pg); require %(connection_pool)'", ROOT).returncode:
        pytest.skip("needs ruby, ruby-pg and ruby-connection-pool")
    return {}


@pytest.fixture
def php() -> Env:
    if shutil.which("php") is None or "pdo_pgsql" not in run("php -m", ROOT).stdout:
        pytest.skip("needs php-cli and php-pgsql")
    return {}


@dataclass(frozen=True, slots=True)
class Program:
    """How a page says to run one of its programs."""

    language: str
    page: str
    command: str
    listens: bool = True
    """By a connection that does nothing else."""


PROGRAMS = [
    Program("node", "node.md", "node with_pg.mjs"),
    Program("node", "node.md", "node with_postgres.mjs"),
    Program("java", "java.md", "java WithJdbc"),
    Program("java", "java.md", "java WithHikari"),
    Program("go", "go.md", "go run slots.go work.go with_pgx.go"),
    Program("go", "go.md", "go run slots.go work.go with_pq.go"),
    Program("ruby", "ruby.md", "ruby work.rb"),
    Program("php", "php.md", "php work.php", listens=False),
    Program("python", "python-drivers.md", "python with_psycopg2.py"),
    Program("python", "python-drivers.md", "python with_asyncpg.py"),
    Program("python", "python-drivers.md", "python with_sqlalchemy.py", listens=False),
    Program("python", "python-drivers.md", "python with_django.py", listens=False),
]
OF_EACH_HELPER = [PROGRAMS[nth] for nth in (1, 2, 5, 6, 7, 8, 9)]


def command_of(program: Program) -> str:
    return program.command


@pytest.fixture
def jobs() -> int:
    """Of each worker."""
    return 200


@pytest.fixture
def env(
    program: Program, jobs: int, request: pytest.FixtureRequest, tmp_path: Path, server_dsn: str, connect: Connect
) -> Env:
    """In which the program runs: the files of its page in a folder, and the limits."""
    page = Page.read(program.page)
    page.save(tmp_path, jobs)
    for statements in page.code("sql"):
        connect().execute(statements.encode())
    of_language: Env = request.getfixturevalue(program.language)
    return environment(server_dsn) | of_language


@pytest.mark.parametrize("program", PROGRAMS, ids=command_of)
def test_eight_workers_of_200_jobs_are_never_over_a_limit_of_3(
    program: Program, env: Env, tmp_path: Path, server_dsn: str, connect: Connect
) -> None:
    with watched(server_dsn) as seen:
        done = run(program.command, tmp_path, env)
    stderr = re.sub(r"^FATAL:  terminating connection .*\n", "", done.stderr, flags=re.MULTILINE)  # libpq, of the cuts
    assert (done.returncode, stderr, done.stdout) == (0, "", Page.read(program.page).prints())

    assert 0 < seen.most <= 3
    fences = [fence for _, fence in sorted(seen.leases.values())]
    assert fences == sorted(set(fences))
    assert (seen.was_cut, seen.listened) == (True, program.listens)
    conn = connect()
    # One more has all three slots for a while.
    row = conn.execute("select grants, releases, leases from pglimits.counters where name = 'database'").fetchone()
    assert row == (JOBS + 1, JOBS + 1, 0)
    assert conn.execute("select held, waiting from pglimits.limits where name = 'database'").fetchone() == (0, 0)
    row = conn.execute("select granted_slots from pglimits.counters where name = 'starts'").fetchone()
    assert row == (8,)


@pytest.mark.parametrize("jobs", [1])
@pytest.mark.parametrize("program", OF_EACH_HELPER, ids=command_of)
def test_a_helper_tells_that_its_lease_was_lost(program: Program, env: Env, tmp_path: Path, server_dsn: str) -> None:
    with watched(server_dsn, ends_wide=True) as seen:
        done = run(program.command, tmp_path, env)
    assert (done.returncode, done.stderr, seen.ended) == (0, "", 1)
    said = done.stdout.splitlines()
    assert said[0].startswith("8 jobs, ")
    assert said[1].lower() == "after 3 s under a lease of 2 s, lost: true"
    assert [line[:5] for line in said[2:]] == ["PL004", "PL002"]  # and nobody was refused


def test_a_page_shows_nothing_that_is_not_run() -> None:
    pages = {each.name for each in PAGES.glob("*.md")}
    assert pages == {"index.md", *(program.page for program in PROGRAMS)}
    for name in pages - {"index.md"}:
        page = Page.read(name)
        commands = [line for line in page.commands() if not line.startswith(("npm ", "export ", "javac "))]
        assert sorted(commands) == sorted(program.command for program in PROGRAMS if program.page == name)
        files = {each.title for each in page.blocks if each.title}
        shown = " ".join([*page.commands(), *(each.code for each in page.blocks)])
        assert all(Path(each).stem in shown for each in files)
        assert {each.language for each in page.blocks if not each.title} == {"sql", "bash", "text"}


def test_a_request_lives_as_the_index_says(connect: Connect) -> None:
    page, conn = Page.read("index.md"), connect()
    returned = []
    for code in page.code("sql"):
        rows = []
        for statement in code.split(";\n"):
            cursor = conn.execute(statement.encode())
            rows += [" | ".join(map(shown, row)) for row in cursor if row != ("",)] if cursor.description else []
        returned.append("".join(f"{row}\n" for row in rows))
    assert returned == page.code("text")
    (news,) = conn.notifies(timeout=10, stop_after=1)
    assert news.payload.split()[0].endswith("0b")


def shown(value: object) -> str:
    return str(value).lower()[0] if isinstance(value, bool) else str(value)
