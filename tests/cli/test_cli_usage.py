"""What all commands have in common: help, version, which database, errors as one line, JSON and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from clitest import PROGRAM

from pglimits import __version__

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]


def commands(pglimits: Cli) -> Iterator[tuple[str, ...]]:
    """Every command but the demo, as the app has them."""
    import typer.main
    from pglimits_cli._app import app

    group: Any = typer.main.get_command(app)
    for name in group.list_commands(None):
        inner = getattr(group.get_command(None, name), "commands", None)
        if inner is not None:
            yield from ((name, each) for each in inner)
        elif name != "demo":
            yield (name,)


def test_every_command_of_the_design_is_there(pglimits: Cli) -> None:
    names = {" ".join(command) for command in commands(pglimits)}
    assert names >= {
        "install", "upgrade", "uninstall", "doctor", "ls", "inspect", "create", "update", "delete", "enable", "disable",
        "reset", "holders", "waiters", "release", "acquire", "renew", "rate", "run", "sweep", "cron enable",
        "cron disable", "embedded start", "embedded stop", "embedded status", "sql", "top", "watch", "events",
        "history",
    }  # fmt: skip


def test_every_help_has_an_example_that_names_the_command(pglimits: Cli) -> None:
    for command in commands(pglimits):
        for flag in ("--help", "-h"):
            result = pglimits(*command, flag)
            assert result.code == 0
            said = " ".join(result.out.split())
            assert "Example: " in said
            assert f"pglimits {' '.join(command)}" in said[said.index("Example: ") :], command


def test_every_command_that_connects_takes_a_dsn_and_prints_json(pglimits: Cli) -> None:
    for command in commands(pglimits):
        said = pglimits(*command, "--help").out
        assert ("--dsn" in said) is (command[0] not in ("sql", "embedded", "terraform")), command
        assert ("--output" in said) is (command[0] not in ("sql", "run", "top", "serve")), command


def test_without_a_command_there_is_help(pglimits: Cli) -> None:
    for arguments in ((), ("cron",), ("embedded",), ("import",), ("terraform",)):
        result = pglimits(*arguments)
        assert result.code == 2
        assert "Usage: pglimits" in result.out


def test_help_lists_what_there_is(pglimits: Cli) -> None:
    result = pglimits("--help")
    assert result.code == 0
    for word in ("ls", "run", "doctor", "cron", "embedded"):
        assert f" {word} " in result.out


def test_version(process: Cli) -> None:
    result = process("--version")
    assert (result.code, result.out, result.err) == (0, f"pglimits {__version__}\n", "")


def test_an_unknown_command_or_option_is_a_usage_error_in_one_line(pglimits: Cli) -> None:
    for arguments, said in (
        (("lss",), "Did you mean 'ls'?"),
        (("ls", "--frob"), "No such option"),
        (("ls", "-o", "yaml"), "'yaml'"),
        (("ls", "x"), "unexpected extra argument"),
        (("inspect",), "Missing argument"),
    ):
        result = pglimits(*arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("Error: ") and said in result.err and result.err.count("\n") == 1


def test_the_dsn_may_stand_before_or_behind_the_command(pglimits: Cli, dsn: str, monkeypatch: Any) -> None:
    pglimits("create", "here", "-l", "1")
    monkeypatch.setenv("PGLIMITS_DSN", "host=127.0.0.1 port=1")
    assert pglimits("ls").code == 1
    assert [row["name"] for row in pglimits("--dsn", dsn, "ls", "-o", "json").json] == ["here"]
    assert [row["name"] for row in pglimits("ls", "-o", "JSON", "--dsn", dsn).json] == ["here"]
    assert pglimits("--dsn", "host=127.0.0.1 port=1", "ls", "--dsn", dsn).code == 0
    assert pglimits("--dsn", dsn, "ls", "--dsn", "host=127.0.0.1 port=1").code == 1


def test_database_url_is_used_where_nothing_else_is_named(pglimits: Cli, dsn: str, monkeypatch: Any) -> None:
    pglimits("create", "here", "-l", "1")
    monkeypatch.delenv("PGLIMITS_DSN")
    with psycopg.connect(dsn) as connection:
        info = connection.info
        url = f"postgresql+psycopg://{info.user}@/{info.dbname}?host={info.host}&port={info.port}"
    monkeypatch.setenv("DATABASE_URL", url)
    assert [row["name"] for row in pglimits("ls", "-o", "json").json] == ["here"]


BLANK = ("", "  ", "\t\n")


@pytest.mark.parametrize("blank", BLANK)
def test_an_empty_dsn_is_an_error_and_never_the_embedded_server(
    pglimits: Cli, monkeypatch: Any, embedded_home: Path, blank: str
) -> None:
    monkeypatch.delenv("PGLIMITS_DSN")
    for arguments in (
        ("--dsn", blank, "ls"), ("ls", "--dsn", blank), ("--dsn", blank, "cron", "disable"),
        ("install", "--dsn", blank), ("run", "x", "--dsn", blank, "--", "true"), ("doctor", "--dsn", blank),
        ("bench", "--rows", "--dsn", blank),
    ):  # fmt: skip
        result = pglimits(*arguments)
        assert (result.code, result.out) == (2, ""), arguments
        assert result.err.startswith("Error: Invalid value for '--dsn': it is empty"), arguments
    assert not embedded_home.exists()


@pytest.mark.parametrize("blank", BLANK)
def test_a_variable_that_is_set_but_empty_is_an_error_that_names_it(
    pglimits: Cli, monkeypatch: Any, embedded_home: Path, dsn: str, blank: str
) -> None:
    monkeypatch.setenv("PGLIMITS_DSN", blank)
    monkeypatch.setenv("DATABASE_URL", dsn)
    result = pglimits("ls")
    assert (result.code, result.out) == (2, "") and "PGLIMITS_DSN is set but empty" in result.err
    monkeypatch.delenv("PGLIMITS_DSN")
    monkeypatch.setenv("DATABASE_URL", blank)
    result = pglimits("ls")
    assert (result.code, result.out) == (2, "") and "DATABASE_URL is set but empty" in result.err
    assert pglimits("ls", "--dsn", dsn).code == 0
    monkeypatch.setenv("PGLIMITS_DSN", dsn)
    assert pglimits("ls").code == 0
    assert not embedded_home.exists()


def test_the_library_takes_no_empty_dsn_either(dsn: str, monkeypatch: Any) -> None:
    from pglimits import InvalidArgument, _dsn

    monkeypatch.setenv("PGLIMITS_DSN", dsn)
    for blank in BLANK:
        with pytest.raises(InvalidArgument, match=r"^dsn is empty"):
            _dsn.resolve(blank)


def test_the_environment_can_forbid_the_embedded_server(
    pglimits: Cli, monkeypatch: Any, embedded_home: Path, dsn: str
) -> None:
    monkeypatch.delenv("PGLIMITS_DSN")
    monkeypatch.setenv("PGLIMITS_EMBEDDED", "never")
    for command in (("ls",), ("run", "x", "--", "true"), ("embedded", "start")):
        result = pglimits(*command)
        assert (result.code, result.out) == (1, "")
        assert "PGLIMITS_EMBEDDED=never" in result.err and "set PGLIMITS_DSN" in result.err
    assert pglimits("embedded", "stop").out == "It was not running.\n"
    assert pglimits("ls", "--dsn", dsn).code == 0
    monkeypatch.setenv("PGLIMITS_EMBEDDED", "nevr")
    assert "PGLIMITS_EMBEDDED is 'nevr'" in pglimits("ls").err
    assert not embedded_home.exists()


def test_an_empty_path_is_an_error(pglimits: Cli, monkeypatch: Any) -> None:
    pglimits("create", "x", "-l", "1")
    for arguments in (("inspect", "x", "-o", "json", "-f", ""), ("bench", "--rows", "--out", "")):
        result = pglimits(*arguments)
        assert (result.code, result.out) == (2, "") and "it is empty" in result.err


def test_a_database_that_is_not_there_is_one_line_and_shows_no_password(process: Cli) -> None:
    for command in (("ls",), ("install",), ("acquire", "x"), ("cron", "enable"), ("run", "x", "--", "true")):
        at = command.index("--") if "--" in command else len(command)
        dsn = ("--dsn", "postgresql://me:secret@127.0.0.1:1/app")
        result = process(*command[:at], *dsn, *command[at:])
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("Error: ") and result.err.count("\n") == 1
        assert "secret" not in result.err


def test_a_dsn_that_cannot_be_read_is_a_usage_error(pglimits: Cli) -> None:
    result = pglimits("ls", "--dsn", "nonsense")
    assert (result.code, result.out) == (2, "") and result.err.count("\n") == 1


def test_a_role_without_rights_is_told_what_it_lacks_and_the_line_that_mends_it(
    process: Cli, conn: Connection, dsn: str
) -> None:
    conn.execute("create role stranger login")
    try:
        for command, role in (
            (("ls",), "pglimits_reader"), (("holders",), "pglimits_reader"), (("acquire", "x"), "pglimits_user"),
            (("rate", "x"), "pglimits_user"), (("create", "x", "-l", "1"), "pglimits_admin"),
            (("cron", "enable"), "pglimits_admin"),
        ):  # fmt: skip
            result = process(*command, "--dsn", psycopg.conninfo.make_conninfo(dsn, user="stranger"))
            assert (result.code, result.out) == (1, "")
            assert result.err == (
                f"Error: permission denied for schema pglimits: the role stranger is not a member of {role}."
                f" An administrator mends it: grant {role} to stranger;\n"
            )
    finally:
        conn.execute("drop role stranger")


def test_a_reader_that_leaves_early_is_no_traceback(environment: dict[str, str], pglimits: Cli) -> None:
    pglimits("create", "x", "-l", "1")
    for command in (["ls"], ["ls", "-o", "json"], ["sql"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*PROGRAM, *command], env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")


def test_heavy_modules_are_not_loaded_before_they_are_needed(environment: dict[str, str]) -> None:
    heavy = ["psycopg", "rich", "asyncio", "pglimits"]
    code = f"import sys, pglimits_cli._app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([PROGRAM[0], "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


HEAVY = {"pydantic", "rich", "asyncio", "importlib.metadata", "psycopg", "pglimits", "pglimits_cli.demo", "textual"}


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (["--version"], {"importlib.metadata"}),
        (["sql", "--uninstall"], HEAVY - {"pydantic", "rich", "pglimits_cli.demo", "textual"}),
        (["create", "x", "-l", "1"], HEAVY - {"pydantic", "rich", "pglimits_cli.demo", "textual"}),
        (["ls", "-o", "json"], HEAVY - {"pydantic", "rich", "pglimits_cli.demo", "textual"}),
        (["run", "x", "--slots", "1", "--", "true"], HEAVY - {"pydantic", "rich", "pglimits_cli.demo", "textual"}),
        (["ls"], HEAVY - {"pydantic", "pglimits_cli.demo", "textual"}),
    ],
)
def test_a_command_loads_only_what_it_needs(environment: dict[str, str], command: list[str], needed: set[str]) -> None:
    """What takes long to start is what is loaded."""
    code = f"""
import atexit, sys
sys.argv[0] = "pglimits"
atexit.register(lambda: print(*(set({HEAVY - needed}) & set(sys.modules)), file=sys.stderr))
import pglimits_cli
pglimits_cli.main()
"""
    done = subprocess.run(
        [PROGRAM[0], "-c", code, *command], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.split("\n")[-2] == ""


def test_no_help_shows_the_type_of_a_value_in_the_place_of_its_name(pglimits: Cli) -> None:
    for command in ((), ("cron",), ("embedded",), ("demo",), *commands(pglimits)):
        said = pglimits(*command, "--help").out
        odd = re.search(r"<\w+(\[\w+\])?>|\b(BOOLEAN|INTEGER|FLOAT)\b|\{\w+\}|2147483647", said)
        assert odd is None, (command, said)


@pytest.mark.parametrize("command", [("ls",), ("doctor",), ("inspect", "x")])
def test_output_is_plain_where_there_is_no_terminal(process: Cli, pglimits: Cli, command: tuple[str, ...]) -> None:
    pglimits("create", "x", "-l", "1")
    assert "\x1b" not in process(*command).out


def test_bench_says_how_long_it_takes_and_how_far_it_is(process: Cli) -> None:
    help = " ".join(process("bench", "--help").out.split())
    assert "Takes two to three minutes on two idle processors" in help
    result = process("bench", "--only", "uncontended", "-o", "json")
    assert result.code == 0
    first, *rest = result.err.splitlines()
    assert first == "Measuring 1 row."
    assert re.fullmatch(r"1/1 uncontended: .* \(\d+s so far\)", rest[1])


def test_bench_says_how_long_all_of_it_takes(pglimits: Cli, monkeypatch: Any) -> None:
    import pglimits_bench._run as runner

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    for options, takes in (((), "two to three minutes"), (("--full",), "ten minutes, and five more with what others")):
        result = pglimits("bench", *options)
        assert result.code == 130 and f"On two idle processors that takes {takes}" in result.err
