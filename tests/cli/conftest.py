"""The CLI as scripts see it (a process), and, where that is enough, called within the test's own process."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clitest import PROGRAM, Result, Terminal
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a child process needs to find the packages, also where they are not installed."""
    try:
        importlib.metadata.distribution("pglimits")
    except importlib.metadata.PackageNotFoundError:
        folder = tmp_path_factory.mktemp("packages")
        for package, source in (("pglimits", "pglimits"), ("pglimits_cli", "cli"), ("pglimits_sql", "sql")):
            (folder / package).symlink_to(ROOT / source)
        return {"PYTHONPATH": str(folder)}
    return {}


@pytest.fixture
def embedded_home() -> Iterator[Path]:
    """A folder for embedded servers of this test's own, which the user that root runs them as can enter."""
    folder = Path(tempfile.mkdtemp(prefix="pgl-"))
    folder.chmod(0o711)
    yield folder / "home"
    shutil.rmtree(folder)


@pytest.fixture
def environment(dsn: str, checkout: dict[str, str], embedded_home: Path) -> dict[str, str]:
    """Of a child process: it uses the test's database, and no server of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "COLUMNS")}
    return {**kept, **checkout, "PGLIMITS_DSN": dsn, "PGLIMITS_HOME": str(embedded_home)}


@pytest.fixture
def pglimits(dsn: str, monkeypatch: pytest.MonkeyPatch, embedded_home: Path) -> Callable[..., Result]:
    """pglimits("ls", "-o", "json"): a command on the test's database, called within this process."""
    from pglimits_cli._app import app

    monkeypatch.setenv("PGLIMITS_DSN", dsn)
    monkeypatch.setenv("PGLIMITS_HOME", str(embedded_home))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments: str, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=stdin, prog_name="pglimits")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture
def process(environment: dict[str, str]) -> Callable[..., Result]:
    """process("ls"): the same as a process of its own, until it ends."""

    def call(*arguments: str, stdin: str | None = None, **changed: str) -> Result:
        done = subprocess.run(
            [*PROGRAM, *arguments],
            env={**environment, **changed},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start("run", …): a process of its own that goes on; killed at the end of the test if it still does."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*PROGRAM, *arguments], **{"env": environment, "text": True, **pipes, **options})
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def terminal(environment: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    """terminal("delete", "database"): a command on a terminal."""
    opened: list[Terminal] = []

    def begin(*arguments: str) -> Terminal:
        opened.append(Terminal(arguments, environment))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()
