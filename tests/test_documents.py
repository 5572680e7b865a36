"""The examples of the README and of docs/, run as they stand, and what the documents name is there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

import pglimits

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
TERMINAL = ROOT / "docs" / "terminal.md"
AS_CODE = ROOT / "docs" / "limits-as-code.md"
OPERATIONS = ROOT / "docs" / "operations.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = ("by",)
"""Of a session."""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[tuple[str, str | None]]:
    """The examples in a language, each with what it prints, where the document says so."""
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [(code, prints or None) for of, code, prints in found if of == language]


def environment(dsn: str) -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "PGLIMITS_DSN": dsn, "PATH": f"{folder}:{os.environ['PATH']}"}


def run(connection: psycopg.Connection[tuple[object, ...]], code: str) -> str:
    """The rows that some statements return; the answer of one that returns nothing is no row."""
    lines: list[str] = []
    for statement in re.sub(r"--.*$", "", code, flags=re.MULTILINE).split(";"):
        if not statement.strip():
            continue
        cursor = connection.execute(statement.encode())
        if cursor.description:
            lines += [" | ".join(map(shown, row)) for row in cursor if any(value != "" for value in row)]
    return "".join(line + "\n" for line in lines)


def shown(value: object) -> str:
    return {None: "null", True: "t", False: "f"}[value] if value is None or isinstance(value, bool) else str(value)


def test_every_example_of_python_is_followed_by_what_it_prints() -> None:
    assert len(blocks(README, "python")) >= 3
    assert all(prints for document in DOCUMENTS for _, prints in blocks(document, "python"))


@pytest.mark.parametrize(
    ("code", "prints"), [example for document in DOCUMENTS for example in blocks(document, "python")]
)
def test_an_example_of_python_prints_what_the_document_says(dsn: str, code: str, prints: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(dsn), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == prints


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "sql")], ids=lambda document: document.name)
def test_the_examples_of_sql_run_one_after_the_other_and_return_what_the_document_says(
    server_dsn: str, document: Path
) -> None:
    with psycopg.connect(server_dsn, autocommit=True) as connection, contextlib.ExitStack() as stack:
        if document == OPERATIONS:  # roles belong to the whole server
            stack.enter_context(connection.transaction(force_rollback=True))
            connection.execute("create role app")
        for code, prints in blocks(document, "sql"):
            returned = run(connection, code)
            assert prints is None or returned == prints, code


@pytest.mark.parametrize("script", [code for code, _ in blocks(README, "bash") if code.startswith("pglimits ")])
def test_an_example_of_the_shell_runs(dsn: str, script: str) -> None:
    done = subprocess.run(
        ["bash", "-euc", script], env=environment(dsn), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "the work, under a slot" in done.stdout


def masked(printed: str) -> str:
    """What a command prints, but for moments, ids, numbers, bars and who it was."""
    for what, by in (
        (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID"), (r"by \S+", "by"), (r"on [^\s,]+", "on"),
        (r"[█▏▎▍▌▋▊▉]+", ""), (r"[\d.]+", "0"), (r"─+", "-"), (r"[ ]+", " "),
    ):  # fmt: skip
        printed = re.sub(what, by, printed)
    return printed


def test_the_commands_of_the_terminal_print_what_the_document_says(dsn: str) -> None:
    examples = blocks(TERMINAL, "bash")
    assert len(examples) == 3
    script = "; echo; ".join(f"{{ {code}}}" for code, _ in examples)  # one after the other, in one shell
    done = subprocess.run(
        ["bash", "-euc", script], env=environment(dsn), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert masked(done.stdout) == masked("\n".join(str(prints) for _, prints in examples))


def test_the_commands_for_files_of_limits_print_what_the_document_says(dsn: str, tmp_path: Path) -> None:
    examples = blocks(AS_CODE, "bash")
    assert len(examples) == 6
    for code, prints in examples:  # one after the other, in one folder
        done = subprocess.run(
            ["bash", "-euc", code], env=environment(dsn), capture_output=True, text=True, check=False, timeout=60,
            cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, prints), done.stderr


@pytest.mark.parametrize(
    ("limits", "code", "comments"), [("a.limit = 1", 0, 0), ("a.limit = 2", 0, 1), ('a.limit = "1"', 1, 0)]
)
def test_the_workflow_comments_on_what_there_is_to_do_and_fails_on_errors_only(
    dsn: str, tmp_path: Path, conn: psycopg.Connection[tuple[object, ...]], limits: str, code: int, comments: int
) -> None:
    from ruamel.yaml import YAML

    conn.execute("select pglimits.create_limit('a', 1)")
    (workflow,) = [YAML(typ="safe", pure=True).load(example) for example, _ in blocks(AS_CODE, "yaml")]
    script = workflow["jobs"]["plan"]["steps"][-1]["run"]
    (tmp_path / "limits.toml").write_text(f"[limits]\n{limits}\n")
    gh = tmp_path / "gh"
    gh.write_text('#!/bin/sh\necho "$@" >> said\ncat comment.md >> said\n')
    gh.chmod(0o755)
    known = environment(dsn) | {"NUMBER": "17", "GITHUB_STEP_SUMMARY": "summary"}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], env=known | {"PATH": f"{tmp_path}:{known['PATH']}"}, cwd=tmp_path,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("Error: limits.toml:2:11: " in done.stdout) is (code == 1)
    commented = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
    assert commented.count("pr comment 17 --body-file comment.md") == comments
    assert ("~ 'a'" in commented) is (comments == 1)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_what_a_document_links_to_and_names_is_there(
    conn: psycopg.Connection[tuple[object, ...]], document: Path
) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:sql|pglimits|cli|bench|tests|docs)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
    for file in re.findall(r"`(\d{3}_\w+\.sql)`", text):
        assert (ROOT / "sql" / "functions" / file).exists(), file
    there = conn.execute(
        "select proname::text from pg_proc where pronamespace = 'pglimits'::regnamespace union"
        " select relname::text from pg_class where relnamespace = 'pglimits'::regnamespace"
    ).fetchall()
    for name in re.findall(
        r"\bpglimits\.(\w+)(?=[(;`, ])", re.sub(r"```(?:python|text).*?```", "", text, flags=re.DOTALL)
    ):
        assert (
            (name,) in there or name in (*SETTINGS, *pglimits.__all__) or (ROOT / "pglimits" / f"{name}.py").exists()
        ), name


def test_the_architecture_names_every_file_of_the_functions() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    for file in sorted((ROOT / "sql" / "functions").glob("*.sql")):
        assert f"`sql/functions/{file.name}`" in text
