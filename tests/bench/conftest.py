"""The benchmark as a command, and as a package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = (("pglimits", "pglimits"), ("pglimits_bench", "bench"), ("pglimits_cli", "cli"), ("pglimits_sql", "sql"))


@pytest.fixture(scope="session", autouse=True)
def packages(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make the benchmark importable, here and in child processes, also where it is not installed."""
    if importlib.util.find_spec("pglimits_bench") is not None:
        return
    folder = tmp_path_factory.mktemp("packages")
    for package, source in PACKAGES:
        (folder / package).symlink_to(ROOT / source)
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder))))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a child process that uses no server of whoever runs the tests."""
    unwanted = ("DATABASE_URL", "PGLIMITS_DSN", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "PGLIMITS_HOME": str(tmp_path / "home")}


@pytest.fixture
def bench(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """bench("--only", "uncontended"): the command, until it ends."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pglimits_cli", "bench", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)

    return call


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start("--only", "processes"): the command, which goes on; killed at the end of the test if it still does."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command: list[Any] = [sys.executable, "-m", "pglimits_cli", "bench", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
