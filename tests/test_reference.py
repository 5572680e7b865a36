"""The reference is what the database, the docstrings, the commands and the routes say."""

from __future__ import annotations

import ast
import importlib.util
from typing import Any

import psycopg
import pytest
from documents import GENERATED, ROOT, blocks

PYTHON = "docs/reference/python.md"


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_page_for_each_and_no_other(reference: Any) -> None:
    assert sorted(path.name for path in (ROOT / GENERATED).iterdir()) == sorted(reference.PAGES)


@pytest.mark.parametrize("name", ["sql.md", "python.md", "cli.md", "http.md"])
def test_a_page_of_the_reference_is_current(
    conn: psycopg.Connection[tuple[object, ...]], reference: Any, name: str
) -> None:
    written = (ROOT / GENERATED / name).read_text(encoding="utf-8")
    assert written == reference.PAGES[name](conn), "run python docs/reference.py"


def test_everything_public_is_in_the_reference(conn: psycopg.Connection[tuple[object, ...]], reference: Any) -> None:
    import pglimits

    python, sql, cli = ((ROOT / GENERATED / page).read_text() for page in ("python.md", "sql.md", "cli.md"))
    for name in pglimits.__all__:
        assert f"\n### {name}\n" in python or f"\n| `{name}` |" in python, name
    for (routine,) in conn.execute("select proname from pg_proc where pronamespace = 'pglimits'::regnamespace"):
        told = f"### {routine}\n" in sql or f"### Procedure {routine}\n" in sql
        assert told is not str(routine).startswith("_"), routine
    from pglimits_cli._commands import FAMILIES

    for names in FAMILIES.values():
        for name in names:
            assert f"\n## pglimits {name}" in cli, name


def test_signatures_are_python() -> None:
    for block in blocks(PYTHON, "py"):
        name, arguments = block.code.split("(", 1)
        ast.parse(f"def {name.replace('.', '_')}({arguments.rstrip()}: ...")
