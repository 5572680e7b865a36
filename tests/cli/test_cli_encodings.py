"""Terminals whose encoding lacks a character, and words that are no text: nothing fails that nobody asked for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from clitest import PROGRAM

Connection = psycopg.Connection[Any]
NAME = "café 日本 🐘"
ASCII = {"PYTHONIOENCODING": "ascii"}
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN = {"PYTHONIOENCODING": "latin-1"}
Say = Callable[..., tuple[int, bytes, bytes]]


@pytest.fixture
def say(environment: dict[str, str]) -> Say:
    """say("ls", **ASCII): a command's exit code, and what it printed, in bytes."""
    kept = {name: value for name, value in environment.items() if name not in ("LANG", "LC_ALL", "LC_CTYPE")}

    def call(*arguments: str | bytes, **changed: str) -> tuple[int, bytes, bytes]:
        # On no account in the encoding of the tests: the program is to find what was meant by itself.
        environment = {os.fsencode(name): value.encode() for name, value in {**kept, **changed}.items()}
        words = [word if isinstance(word, bytes) else word.encode() for word in (*PROGRAM, *arguments)]
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        assert b"Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture(autouse=True)
def limit(conn: Connection, clock: Any) -> None:
    clock.freeze()  # who waits here gives no sign of life
    conn.execute("select pglimits.create_limit(%s, 1, description => %s)", [NAME, "für alle →"])
    conn.execute("select pglimits.create_limit('rate', 1, 5)")
    for lease in (1, 2):  # the second waits
        conn.execute(
            "select pglimits.acquire(%s, key => 'schlüssel', timeout_seconds => 600, lease_id => %s::uuid,"
            ' holder => \'{"host": "höst", "who": "日本"}\')',
            [NAME, f"00000000-0000-0000-0000-00000000000{lease}"],
        )


@pytest.mark.parametrize("terminal", [ASCII, PLAIN, LATIN])
def test_tables_show_replacements(say: Say, terminal: dict[str, str]) -> None:
    encoding = "latin-1" if terminal is LATIN else "ascii"
    shown = {}
    for command in ("ls", "holders", "waiters", "doctor", "sweep", "--help", "sql"):
        code, out, err = say(command, **terminal)
        assert (code, err) == (0, b""), command
        shown[command] = out.decode(encoding)
        assert shown[command], command
    expected = "café ?? ?" if terminal is LATIN else "caf? ?? ?"
    assert expected in shown["ls"] and expected in shown["holders"] and expected in shown["waiters"]


@pytest.mark.parametrize("terminal", [ASCII, PLAIN, LATIN])
def test_json_is_whole_in_any_encoding(say: Say, terminal: dict[str, str]) -> None:
    for command in ("ls", "holders", "waiters"):
        code, out, err = say(command, "-o", "json", **terminal)
        assert (code, err) == (0, b"")
        assert json.loads(out.decode("ascii"))[0]["name"] == NAME
    assert json.loads(say("holders", "-o", "json", **terminal)[1])[0]["holder"] == {"host": "höst", "who": "日本"}
    for command in ("doctor", "sweep"):
        assert say(command, "-o", "json", **terminal)[0] == 0


@pytest.mark.parametrize("terminal", [ASCII, LATIN])
def test_commands_that_name_such_a_limit_work(say: Say, terminal: dict[str, str], conn: Connection) -> None:
    encoding = terminal["PYTHONIOENCODING"]
    for command in (
        ("inspect", NAME), ("inspect", NAME, "-o", "json"), ("holders", NAME), ("update", NAME, "-l", "2"),
        ("update", NAME, "-l", "4", "-o", "json"), ("disable", NAME), ("enable", NAME), ("run", NAME, "--", "true"),
        ("acquire", NAME), ("acquire", NAME, "--key", "größe", "-o", "json"), ("rate", "rate", "-o", "json"),
        ("create", "Ελλάδα", "-l", "1"), ("holders", "Ελλάδα"), ("waiters", "Ελλάδα"), ("reset", NAME, "--yes"),
        ("update", "Ελλάδα", "--new-name", "Україна"), ("delete", NAME, "--yes"),
    ):  # fmt: skip
        code, out, err = say(*command, **terminal)
        assert (code, err) == (0, b""), command
        out.decode(encoding)
    for refused in (("inspect", "naïve 名"), ("delete", "Україна"), ("create", "Україна", "-l", "1")):
        code, out, err = say(*refused, **terminal)
        assert code in (1, 2) and out == b"" and err.startswith(b"Error: ") and err.count(b"\n") == 1
        err.decode(encoding)
    assert conn.execute("select name from pglimits.limits where name <> 'rate'").fetchall() == [("Україна",)]


def test_where_the_encoding_has_everything_nothing_is_replaced(say: Say) -> None:
    for arguments in (("ls",), ("ls", "-o", "json"), ("inspect", NAME)):
        code, out, _ = say(*arguments, PYTHONIOENCODING="utf-8")
        assert code == 0 and NAME in out.decode()


def test_a_word_that_is_no_text_is_an_error_that_names_its_argument(say: Say, conn: Connection) -> None:
    for arguments, named in (
        (("inspect", b"a\xff"), b"'NAME'"), (("create", b"a\xff", "-l", "1"), b"'NAME'"),
        (("acquire", "rate", b"a\xff"), b"'NAME'"), (("acquire", "rate", "--key", b"\xff"), b"'--key'"),
        (("update", "rate", "--description", b"\xff"), b"'--description'"), (("ls", "--dsn", b"\xff"), b"'--dsn'"),
        (("--dsn", b"\xff", "ls"), b"'--dsn'"), (("release", b"\xff"), b"'LEASE_ID'"),
        (("create", "x", "-l", b"\xff"), b"'--limit'"), (("ls", "-o", b"\xff"), b"'--output'"),
    ):  # fmt: skip
        code, out, err = say(*arguments)
        assert (code, out) == (2, b""), arguments
        assert err.startswith(b"Error: Invalid value for " + named) and err.count(b"\n") == 1, err
    code, _, err = say("inspect", NAME, **PLAIN)
    assert code == 2 and b"ascii" in err
    for arguments in ((b"\xff",), ("ls", b"--\xff"), ("ls", b"\xff")):
        code, out, err = say(*arguments)
        assert (code, out) == (2, b"") and err.startswith(b"Error: ") and err.count(b"\n") == 1


def test_closed_output_is_no_traceback(environment: dict[str, str]) -> None:
    for command in ("ls", "ls -o json", "inspect nix", "--version", "--help"):
        line = f'"$0" -m pglimits_cli {command} >&- 2>&-'
        done = subprocess.run(["/bin/sh", "-c", line, PROGRAM[0]], env=environment, check=False)
        assert done.returncode == (1 if "nix" in command else 0)
