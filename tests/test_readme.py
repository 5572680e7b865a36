"""The README's examples, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(README)
PYTHON = [(code, BLOCKS[number + 1][1]) for number, (language, code) in enumerate(BLOCKS) if language == "python"]
SQL = [code for language, code in BLOCKS if language == "sql"]
SHELL = [code for language, code in BLOCKS if language == "bash" and code.startswith("pglimits ")]


def environment(dsn: str) -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "PGLIMITS_DSN": dsn, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_every_example_of_python_is_followed_by_what_it_prints() -> None:
    languages = [language for language, _ in BLOCKS]
    assert len(PYTHON) >= 3
    assert all(languages[i + 1] == "text" for i, language in enumerate(languages) if language == "python")


@pytest.mark.parametrize(("code", "prints"), PYTHON)
def test_python_example_prints_what_the_readme_says(dsn: str, code: str, prints: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(dsn), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == prints


def test_sql_examples_run(dsn: str) -> None:
    assert len(SQL) >= 2
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in re.sub(r"--.*$", "", "\n".join(SQL), flags=re.MULTILINE).split(";"):
            if statement.strip():
                connection.execute(statement.encode())


@pytest.mark.parametrize("script", SHELL)
def test_shell_example_runs(dsn: str, script: str) -> None:
    done = subprocess.run(
        ["bash", "-euc", script], env=environment(dsn), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "the work, under a slot" in done.stdout
