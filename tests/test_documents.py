"""Every block of code of the README and of docs/ is run, as it stands, and what the documents name is there.

Blocks of Python and of SQL are run here, on every page. ``RUN_BY`` says which tests run those of other languages.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import poolers
import psycopg
import pytest
from documents import GENERATED, PAGES, ROOT, Block, around_blocks, blocks, environment, every_block, shell

import pglimits

HERE = "tests/test_documents.py"
RUN_BY: dict[tuple[str, str], tuple[str, ...]] = {
    ("README.md", "bash"): (HERE,),
    ("README.md", "sh"): (HERE,),
    ("docs/architecture.md", "text"): (HERE,),
    ("docs/extension.md", "bash"): ("tests/upgrade/test_extension.py",),
    ("docs/extension.md", "sh"): ("tests/upgrade/test_extension.py", "tests/upgrade/test_pg_tle.py"),
    ("docs/frameworks.md", "py"): ("tests/frameworks/test_sqlalchemy.py", "tests/frameworks/test_pytest.py"),
    ("docs/from-prefect.md", "bash"): ("tests/cli/test_from_prefect.py",),
    ("docs/from-prefect.md", "py"): ("tests/cli/test_from_prefect.py",),
    ("docs/from-prefect.md", "sh"): ("tests/cli/test_from_prefect.py",),
    ("docs/from-prefect.md", "text"): ("tests/cli/test_from_prefect.py",),
    ("docs/how-to/api-quota.md", "bash"): (HERE,),
    ("docs/how-to/cron-jobs.md", "bash"): (HERE,),
    ("docs/how-to/cron-jobs.md", "cron"): (HERE,),
    ("docs/how-to/database-connections.md", "bash"): (HERE,),
    **{
        (f"docs/languages/{page}.md", language): ("tests/drivers/test_languages.py",)
        for page, of in (
            ("go", "go"),
            ("java", "java"),
            ("node", "js"),
            ("php", "php"),
            ("python-drivers", "python"),
            ("ruby", "ruby"),
        )
        for language in ("bash", of, "text")
    },
    ("docs/limits-as-code.md", "bash"): (HERE,),
    ("docs/limits-as-code.md", "yaml"): (HERE,),
    ("docs/metrics.md", "cron"): ("tests/server/test_metrics_files.py",),
    ("docs/metrics.md", "yaml"): ("tests/server/test_metrics_files.py",),
    ("docs/operations.md", "bash"): ("tests/test_backup.py",),
    ("docs/page.md", "sh"): (HERE,),
    ("docs/performance.md", "bash"): (HERE,),
    ("docs/prefect-api.md", "py"): ("tests/server/test_prefect_clients.py",),
    ("docs/prefect-api.md", "sh"): ("tests/server/test_prefect_clients.py",),
    ("docs/reference/python.md", "py"): ("tests/test_reference.py",),
    ("docs/server.md", "bash"): ("tests/server/test_server_document.py",),
    ("docs/server.md", "nginx"): ("tests/server/test_server_document.py",),
    ("docs/server.md", "sh"): ("tests/server/test_server_document.py",),
    ("docs/task-queues.md", "bash"): ("tests/frameworks/queues/pages.py",),
    ("docs/task-queues.md", "py"): ("tests/frameworks/queues/pages.py",),
    ("docs/terminal.md", "bash"): (HERE,),
    ("docs/terminal.md", "text"): ("tests/cli/test_cli_top.py",),
    ("docs/terraform.md", "bash"): ("tests/terraform/terraformtest.py",),
    ("docs/terraform.md", "hcl"): ("tests/terraform/terraformtest.py",),
    ("docs/terraform.md", "text"): ("tests/terraform/terraformtest.py",),
    ("docs/tutorial.md", "bash"): (HERE,),
}
"""The tests that run, or check, the blocks of a page in a language; of Python and SQL, where they are not run here."""
SESSIONS = sorted(
    {page for page, language in RUN_BY if language in ("bash", "sh") and RUN_BY[page, language] == (HERE,)}
)
"""Pages whose sessions of a shell are run here."""
TERMINAL = "docs/terminal.md"
SETTINGS = ("by", "without_roles")
"""Of a session."""


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_run_by_a_test(page: str) -> None:
    for block in every_block(page):
        if (page, block.language) not in RUN_BY:
            assert block.language in ("python", "sql"), block
            assert block.language != "python" or block.prints, f"what does it print? {block}"
    stray = re.search(r"^ *(```|~~~)|\n\n    [^\s*\d-].*", around_blocks(page), re.MULTILINE)
    assert not stray, f"code that is in no block: {stray[0]}"


def test_who_is_said_to_run_blocks_reads_them_from_the_page() -> None:
    for (page, language), modules in RUN_BY.items():
        assert blocks(page, language), f"{page} has no block of {language}"
        for module in modules:
            assert Path(page).name in (ROOT / module).read_text(encoding="utf-8"), f"{module} does not read {page}"


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
    """As psql shows it, after ``\\pset null null``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "t", False: "f"}[value]
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page, "python") if (page, "python") not in RUN_BY],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_an_example_of_python_prints_what_the_document_says(dsn: str, block: Block) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.code],
        env=environment(dsn),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    said = done.stderr if poolers.MODE is None else re.sub(r"^LISTEN does not work.*\n", "", done.stderr)
    assert (done.returncode, said) == (0, "")
    assert done.stdout == block.prints


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sql") and (page, "sql") not in RUN_BY])
def test_the_examples_of_sql_run_one_after_the_other_and_return_what_the_document_says(
    server_dsn: str, page: str
) -> None:
    with psycopg.connect(server_dsn, autocommit=True) as connection, contextlib.ExitStack() as stack:
        if page == "docs/operations.md":  # roles belong to the whole server
            stack.enter_context(connection.transaction(force_rollback=True))
            connection.execute("create role app")
        for block in blocks(page, "sql"):
            returned = run(connection, block.code)
            assert block.prints is None or returned == block.prints, block


@pytest.mark.parametrize("page", [page for page in SESSIONS if page != TERMINAL])
def test_the_sessions_of_a_page_run_one_after_the_other_and_print_what_it_says(
    dsn: str, tmp_path: Path, page: str
) -> None:
    for block in blocks(page, "bash", "sh"):
        done = shell(block.code, environment(dsn), tmp_path)
        assert done.returncode == 0, (block, done.stdout, done.stderr)
        assert block.prints is None or done.stdout == block.prints, (block, done.stderr)


@pytest.mark.parametrize("block", blocks("docs/how-to/cron-jobs.md", "cron"), ids=lambda block: str(block.line))
def test_a_line_for_cron_runs_its_job_under_a_slot(dsn: str, tmp_path: Path, block: Block) -> None:
    found = re.fullmatch(r"(?:[\d*/]+ ){5}(pglimits run (\w+) .* -- )(/usr/local/bin/\w+)\n", block.code)
    assert found is not None
    done = shell(f"pglimits create {found[2]} --limit 1; {found[1]} echo done", environment(dsn), tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "done"), done.stderr


def masked(printed: str) -> str:
    """What a command prints, but for moments, ids, numbers, bars and who it was."""
    for what, by in (
        (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID"), (r"by \S+", "by"), (r"on [^\s,]+", "on"),
        (r"[█▏▎▍▌▋▊▉]+", ""), (r"[\d.]+", "0"), (r"─+", "-"), (r"[ ]+", " "),
    ):  # fmt: skip
        printed = re.sub(what, by, printed)
    return printed


def test_the_commands_of_the_terminal_print_what_the_document_says(dsn: str, tmp_path: Path) -> None:
    examples = blocks(TERMINAL, "bash")
    assert len(examples) == 3
    script = "; echo; ".join(f"{{ {block.code}}}" for block in examples)  # one after the other, in one shell
    done = shell(script, environment(dsn), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert masked(done.stdout) == masked("\n".join(str(block.prints) for block in examples))


@pytest.mark.parametrize(
    ("limits", "code", "comments"), [("a.limit = 1", 0, 0), ("a.limit = 2", 0, 1), ('a.limit = "1"', 1, 0)]
)
def test_the_workflow_comments_on_what_there_is_to_do_and_fails_on_errors_only(
    dsn: str, tmp_path: Path, conn: psycopg.Connection[tuple[object, ...]], limits: str, code: int, comments: int
) -> None:
    from ruamel.yaml import YAML

    conn.execute("select pglimits.create_limit('a', 1)")
    (workflow,) = [YAML(typ="safe", pure=True).load(block.code) for block in blocks("docs/limits-as-code.md", "yaml")]
    script = workflow["jobs"]["plan"]["steps"][-1]["run"]
    (tmp_path / "limits.toml").write_text(f"[limits]\n{limits}\n")
    gh = tmp_path / "gh"
    gh.write_text('#!/bin/sh\necho "$@" >> said\ncat comment.md >> said\n')
    gh.chmod(0o755)
    known = environment(dsn) | {"NUMBER": "17", "GITHUB_STEP_SUMMARY": "summary"}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], env=known | {"PATH": f"{tmp_path}:{known['PATH']}"}, cwd=tmp_path,
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("Error: limits.toml:2:11: " in done.stdout) is (code == 1)
    commented = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
    assert commented.count("pr comment 17 --body-file comment.md") == comments
    assert ("~ 'a'" in commented) is (comments == 1)


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(GENERATED)])
def test_what_a_page_names_is_there(conn: psycopg.Connection[tuple[object, ...]], page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
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
        module = ROOT / "pglimits" / name
        assert (
            (name,) in there
            or name in (*SETTINGS, *pglimits.__all__)
            or module.exists()
            or module.with_suffix(".py").exists()
        ), name


def test_the_architecture_names_every_file_of_the_sql_the_wrapper_and_the_commands_and_its_drawings_no_other() -> None:
    page = "docs/architecture.md"
    text = (ROOT / page).read_text(encoding="utf-8")
    files = sorted((ROOT / "sql" / "functions").glob("*.sql"))
    for file in (file for folder in ("sql", "pglimits", "cli") for file in (ROOT / folder).rglob("*.*")):
        if file.suffix in (".py", ".sql") and not file.name.startswith("__"):
            path = file.relative_to(ROOT).as_posix()
            whole = [folder for folder in ("sql/migrations/", "pglimits/django/") if path.startswith(folder)]
            assert f"`{(whole or [path])[0]}`" in text, path
    drawn = "".join(block.code for block in blocks(page, "text"))
    numbers, modules = set(re.findall(r"\b\d{3}\b", drawn)), set(re.findall(r"\b_\w+\.py", drawn))
    assert min(len(numbers), len(modules)) > 5
    assert numbers <= {file.name[:3] for file in files}
    assert modules <= {file.name for file in (ROOT / "pglimits").glob("*.py")}
