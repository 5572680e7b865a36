"""Names of limits: completed by a shell, and guessed where one was mistyped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]
NOWHERE = "host=127.0.0.1 port=1"


@pytest.fixture(autouse=True)
def limits(conn: Connection) -> None:
    for name in ("two", "twice", "database"):
        conn.execute("select pglimits.create_limit(%s, 2)", [name])


@pytest.fixture
def offered(process: Cli) -> Callable[..., list[str]]:
    """offered("inspect", "t"): what bash offers for the last word."""

    def ask(*words: str, **changed: str) -> list[str]:
        line = {"COMP_WORDS": " ".join(("pglimits", *words)), "COMP_CWORD": str(len(words))}
        result = process(**{**line, "_PGLIMITS_COMPLETE": "complete_bash", **changed})
        assert (result.code, result.err) == (0, "")
        return result.out.split()

    return ask


def test_a_shell_completes_names_wherever_a_limit_is_named(offered: Callable[..., list[str]], dsn: str) -> None:
    for command in (
        "inspect", "update", "delete", "enable", "disable", "reset", "holders", "waiters", "acquire", "rate", "run",
    ):  # fmt: skip
        assert offered(command, "t") == ["twice", "two"], command
    assert offered("create", "t") == []
    assert offered("run", "two", "t") == ["twice"]
    assert offered("inspect", "%") == []
    assert offered("inspect", "--dsn", f"'{dsn}'", "two", PGLIMITS_DSN=NOWHERE) == ["two"]
    assert offered("--dsn", f"'{dsn}'", "inspect", "two", PGLIMITS_DSN=NOWHERE) == ["two"]


def test_a_shell_is_offered_nothing_where_the_database_cannot_be_asked(
    offered: Callable[..., list[str]], environment: dict[str, str], embedded_home: Path, bare_dsn: str
) -> None:
    for wrong in (NOWHERE, "nonsense", "", bare_dsn):
        assert offered("inspect", "t", PGLIMITS_DSN=wrong) == []
    assert offered("inspect", "--dsn", "''", "t") == []
    del environment["PGLIMITS_DSN"]
    assert offered("inspect", "t") == []
    assert not embedded_home.exists()


def test_a_mistyped_name_is_guessed(pglimits: Cli) -> None:
    for command in (
        ("inspect", "tow"), ("update", "tow", "-l", "1"), ("delete", "tow", "--yes"), ("enable", "tow"),
        ("disable", "tow"), ("reset", "tow", "--yes"), ("holders", "tow"), ("waiters", "tow"), ("inspect", "TWO"),
        ("acquire", "tow", "--strict"), ("run", "tow", "--strict", "--", "true"), ("rate", "tow", "--strict"),
    ):  # fmt: skip
        result = pglimits(*command)
        assert (result.code, result.out) == (1, ""), command
        assert result.err == f"Error: there is no limit named '{command[1]}': did you mean 'two'?\n"
    result = pglimits("acquire", "two", "databse", "--strict")
    assert result.err == "Error: there is no limit named 'databse': did you mean 'database'?\n"


def test_a_name_like_no_other_is_not_guessed(pglimits: Cli) -> None:
    assert pglimits("inspect", "quota").err == "Error: there is no limit named 'quota'\n"


def test_who_may_not_look_is_told_of_the_missing_limit_alone(process: Cli, conn: Connection, dsn: str) -> None:
    conn.execute("create role caller login")
    try:
        conn.execute("grant pglimits_user to caller")
        as_caller = ("--dsn", psycopg.conninfo.make_conninfo(dsn, user="caller"))
        assert process("acquire", "tow", "--strict", *as_caller).err == "Error: there is no limit named 'tow'\n"
    finally:
        conn.execute("drop role caller")
