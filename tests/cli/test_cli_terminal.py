"""What happens on a terminal: prompts, and the keys that interrupt."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from clitest import Terminal, lines, recorder

Connection = psycopg.Connection[Any]
Wait = Callable[..., Any]


@pytest.fixture(autouse=True)
def limits(conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('database', 2)")
    conn.execute("select pglimits.acquire('database')")


def names(conn: Connection) -> list[str]:
    return [name for (name,) in conn.execute("select name from pglimits.limits").fetchall()]


def test_delete_asks_and_takes_no_for_an_answer(terminal: Callable[..., Terminal], conn: Connection) -> None:
    asked = terminal("delete", "database")
    asked.read_until("Delete limit 'database' (1 slot held, 0 waiting)? [y/N]")
    asked.type("\n")
    assert asked.wait() == 1
    assert "Error: aborted; nothing was changed" in asked.plain
    assert names(conn) == ["database"]


def test_delete_asks_and_takes_yes(terminal: Callable[..., Terminal], conn: Connection) -> None:
    asked = terminal("delete", "database")
    asked.read_until("[y/N]")
    asked.type("y\n")
    assert asked.wait() == 0
    assert names(conn) == []


def test_an_interrupt_at_the_prompt_changes_nothing(terminal: Callable[..., Terminal], conn: Connection) -> None:
    asked = terminal("delete", "database")
    asked.read_until("[y/N]")
    asked.interrupt()
    assert asked.wait() in (1, 130)
    assert "Traceback" not in asked.plain
    assert names(conn) == ["database"]


def test_yes_skips_the_prompt(terminal: Callable[..., Terminal], conn: Connection) -> None:
    asked = terminal("delete", "database", "--yes")
    assert asked.wait() == 0
    assert "?" not in asked.plain
    assert names(conn) == []


def test_reset_and_uninstall_ask_as_well(terminal: Callable[..., Terminal], conn: Connection) -> None:
    for command, question in (
        (("reset", "database"), "End every lease of limit 'database' (1 slot held, 0 waiting)?"),
        (("uninstall",), "with every limit and lease?"),
    ):
        asked = terminal(*command)
        while question not in asked.plain.replace("\n", " "):
            assert asked.read(), asked.plain
        asked.type("n\n")
        assert asked.wait() == 1
    assert conn.execute("select count(*) from pglimits.holders").fetchone() == (1,)


def test_a_missing_limit_is_not_asked_about(terminal: Callable[..., Terminal]) -> None:
    asked = terminal("delete", "nix")
    assert asked.wait() == 1
    assert "there is no limit named 'nix'" in asked.plain and "[y/N]" not in asked.plain


def test_nothing_else_asks(terminal: Callable[..., Terminal], conn: Connection) -> None:
    row = conn.execute("select lease_id from pglimits.holders").fetchone()
    assert row is not None
    for command in (("release", str(row[0])), ("update", "database", "-l", "0"), ("disable", "database"), ("sweep",)):
        asked = terminal(*command)
        assert asked.wait() == 0
        assert "?" not in asked.plain


def test_tables_fit_into_80_columns(terminal: Callable[..., Terminal], conn: Connection) -> None:
    conn.execute("select pglimits.create_limit(%s, 100000, 1.5)", ["x" * 120])
    conn.execute('select pglimits.acquire(%s, holder => \'{"host": "a-host", "pid": 1}\')', ["x" * 120])
    for command in (("ls",), ("inspect", "x" * 120), ("holders",), ("doctor",)):
        asked = terminal(*command)
        assert asked.wait() == 0
        assert max(map(len, asked.plain.splitlines())) <= 80
        assert "…" not in asked.plain or command == ("doctor",)


def test_a_key_that_interrupts_reaches_the_command_once(
    terminal: Callable[..., Terminal], wait_until: Wait, tmp_path: Path
) -> None:
    diary = tmp_path / "diary"
    diary.touch()
    running = terminal("run", "database", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    running.type("\x03")
    wait_until(lambda: "SIGINT" in lines(diary))
    os.kill(running.pid, signal.SIGUSR1)  # comes after whatever has been passed on by then
    wait_until(lambda: "SIGUSR1" in lines(diary))
    assert lines(diary)[1:] == ["SIGINT", "SIGUSR1"]
    os.kill(running.pid, signal.SIGINT)
    wait_until(lambda: lines(diary)[1:] == ["SIGINT", "SIGUSR1", "SIGINT"])
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 42


def test_an_interrupt_while_run_waits_ends_it(
    terminal: Callable[..., Terminal], conn: Connection, wait_until: Wait
) -> None:
    conn.execute("select pglimits.acquire('database')")
    running = terminal("run", "database", "--", "echo", "ran")
    wait_until(lambda: conn.execute("select from pglimits.waiters").fetchone() is not None)
    running.type("\x03")
    assert running.wait() == 130
    assert conn.execute("select count(*) from pglimits.waiters").fetchone() == (0,)


def test_a_command_on_a_terminal_has_the_terminal(terminal: Callable[..., Terminal]) -> None:
    running = terminal("run", "database", "--", sys.executable, "-c", "print('tty', __import__('os').isatty(0))")
    assert running.wait() == 0
    assert "tty True" in running.plain
