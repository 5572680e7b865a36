"""ls, inspect, create, update, delete, enable, disable, reset."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]

COLUMNS = {
    "name", "limit", "active", "slot_decay_per_second", "held", "level", "waiting", "max_waiters", "description",
    "created_at", "updated_at",
}  # fmt: skip


def test_create_makes_a_limit_and_says_what_it_is(pglimits: Cli, conn: Connection) -> None:
    result = pglimits("create", "database", "--limit", "10")
    assert (result.code, result.err) == (0, "")
    assert result.out == "Created limit 'database': 10 slots.\n"
    row = conn.execute('select "limit", slot_decay_per_second, active from pglimits.limits').fetchone()
    assert row == (10, 0.0, True)


def test_create_takes_every_property(pglimits: Cli) -> None:
    result = pglimits(
        "create", "api", "-l", "5", "--slot-decay-per-second", "0.5", "--disable", "--max-waiters", "3",
        "--description", "the [red] one", "-o", "json",
    )  # fmt: skip
    assert result.code == 0
    made = result.json
    assert set(made) == COLUMNS
    assert (made["limit"], made["slot_decay_per_second"], made["active"]) == (5, 0.5, False)
    assert (made["max_waiters"], made["description"]) == (3, "the [red] one")
    assert datetime.fromisoformat(made["created_at"]).tzinfo is not None


def test_create_without_a_limit_is_a_usage_error(pglimits: Cli) -> None:
    result = pglimits("create", "database")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Error: Missing option '--limit'")


def test_create_twice_is_an_error(pglimits: Cli) -> None:
    pglimits("create", "database", "-l", "1")
    result = pglimits("create", "database", "-l", "2", "-o", "json")
    assert (result.code, result.out) == (1, "")
    assert result.err == "Error: there is a limit named 'database' already\n"


def test_what_no_limit_can_be_is_a_usage_error_in_one_line(pglimits: Cli) -> None:
    for arguments in (
        ("a/b", "-l", "1"), ("", "-l", "1"), ("a", "-l", "-1"), ("a", "-l", "1", "--slot-decay-per-second", "nan"),
        ("a", "-l", "x"), ("a", "-l", "1", "--max-waiters", "-1"), ("a", "-l", "99999999999"),
    ):  # fmt: skip
        result = pglimits("create", *arguments)
        assert (result.code, result.out) == (2, ""), arguments
        assert result.err.startswith("Error: ") and result.err.count("\n") == 1, result.err
    assert pglimits("ls", "-o", "json").json == []


def test_active_slots_of_prefect_is_explained(pglimits: Cli) -> None:
    result = pglimits("create", "database", "-l", "5", "--active-slots", "3")
    assert result.code == 2
    assert "--active-slots has no meaning here" in result.err


def test_ls_shows_what_is_in_use(pglimits: Cli, conn: Connection) -> None:
    assert "There are no limits." in pglimits("ls").out
    pglimits("create", "database", "-l", "3")
    pglimits("create", "api", "-l", "5", "--slot-decay-per-second", "0.001")
    conn.execute("select pglimits.acquire('database', slots => 3)")
    conn.execute("select pglimits.acquire('database', timeout_seconds => null, channel => 'pglimits_test')")
    conn.execute("select pglimits.rate_limit('api', slots => 4)")
    rows = pglimits("ls", "-o", "json").json
    assert [row["name"] for row in rows] == ["api", "database"]
    assert all(set(row) == COLUMNS for row in rows)
    assert (rows[1]["held"], rows[1]["waiting"]) == (3, 1)
    assert 3.9 < rows[0]["level"] <= 4
    table = pglimits("ls").out
    assert [word for word in table.splitlines()[-1].split() if word][:5] == ["database", "yes", "3", "3", "1"]


def test_ls_in_a_pipe_has_a_line_for_each_limit_however_long_its_name(pglimits: Cli) -> None:
    name = "n" * 200
    pglimits("create", name, "-l", "3", "--description", "d" * 300)
    lines = pglimits("ls").out.splitlines()
    assert sum(name in line and "d" * 300 in line for line in lines) == 1


def test_ls_folds_a_long_name_and_cuts_nothing_off(pglimits: Cli, monkeypatch: Any) -> None:
    name = "x" * 150
    pglimits("create", name, "-l", "3")
    monkeypatch.setenv("COLUMNS", "80")
    out = pglimits("ls").out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("x") == 150


def test_names_are_shown_as_they_are(pglimits: Cli) -> None:
    pglimits("create", "[bold]x :smile: \\", "-l", "1")
    assert "[bold]x :smile: \\" in pglimits("ls").out


def test_inspect_shows_one_limit_and_the_busiest_of_its_keys(pglimits: Cli, conn: Connection) -> None:
    pglimits("create", "database", "-l", "1234", "--description", "all of it")
    conn.execute("select pglimits.acquire('database')")
    table = pglimits("inspect", "database")
    assert table.code == 0
    assert "1,234 slots" in table.out and "all of it" in table.out and "Key" not in table.out
    conn.execute("select pglimits.acquire('database', n, key => 'k' || n) from generate_series(1, 25) n")
    table = pglimits("inspect", "database")
    shown = [line.split() for line in table.out.splitlines() if line.startswith("k")]
    assert [row[:2] for row in shown] == [[f"k{n}", str(n)] for n in range(25, 5, -1)]
    assert "and 6 keys more" in table.out
    found = pglimits("inspect", "database", "-o", "json").json
    assert set(found) == COLUMNS | {"keys"} and found["limit"] == 1234
    assert len(found["keys"]) == 26 and set(found["keys"][0]) == {"name", "key", "held", "level", "waiting", "fence"}


def test_inspect_writes_a_file(pglimits: Cli, tmp_path: Path) -> None:
    pglimits("create", "database", "-l", "7")
    file = tmp_path / "limit.json"
    result = pglimits("inspect", "database", "-o", "json", "-f", str(file))
    assert (result.code, result.out) == (0, "")
    assert json.loads(file.read_text())["limit"] == 7
    assert pglimits("inspect", "database", "-f", str(file)).code == 2
    unwritable = pglimits("inspect", "database", "-o", "json", "-f", str(tmp_path / "no" / "limit.json"))
    assert unwritable.code == 1 and unwritable.err.startswith("Error: ")


def test_a_missing_limit_is_an_error_of_every_command(pglimits: Cli) -> None:
    for arguments in (
        ("inspect", "nix"), ("update", "nix", "-l", "1"), ("delete", "nix"), ("enable", "nix"), ("disable", "nix"),
        ("reset", "nix"), ("holders", "nix"), ("waiters", "nix"),
    ):  # fmt: skip
        result = pglimits(*arguments)
        assert (result.code, result.out) == (1, ""), arguments
        assert result.err == "Error: there is no limit named 'nix'\n"


def test_update_changes_only_what_is_given(pglimits: Cli) -> None:
    pglimits("create", "api", "-l", "5", "--slot-decay-per-second", "2", "--max-waiters", "4", "--description", "x")
    changed = pglimits("update", "api", "--limit", "9", "-o", "json").json
    assert changed["limit"] == 9
    assert (changed["slot_decay_per_second"], changed["max_waiters"], changed["description"]) == (2, 4, "x")
    assert pglimits("update", "api", "--slot-decay-per-second", "0", "-o", "json").json["slot_decay_per_second"] == 0
    assert pglimits("update", "api", "--no-max-waiters", "-o", "json").json["max_waiters"] is None
    assert pglimits("update", "api", "--max-waiters", "0", "-o", "json").json["max_waiters"] == 0
    assert pglimits("update", "api", "--description", "", "-o", "json").json["description"] is None
    assert pglimits("update", "api", "--disable", "-l", "3", "-o", "json").json["active"] is False
    assert pglimits("update", "api", "--enable", "-o", "json").json["active"] is True


def test_update_renames(pglimits: Cli) -> None:
    pglimits("create", "old", "-l", "5")
    result = pglimits("update", "old", "--new-name", "new")
    assert result.out == "Updated limit 'old', now 'new': 5 slots.\n"
    assert [row["name"] for row in pglimits("ls", "-o", "json").json] == ["new"]


def test_update_says_when_there_is_nothing_to_do_or_too_much(pglimits: Cli) -> None:
    pglimits("create", "api", "-l", "5")
    for arguments, said in (
        ((), "nothing to update"),
        (("--enable", "--disable"), "--enable and --disable cannot both be given"),
        (("--max-waiters", "3", "--no-max-waiters"), "cannot both be given"),
        (("--active-slots", "3"), "--active-slots has no meaning here"),
    ):
        result = pglimits("update", "api", *arguments)
        assert result.code == 2 and said in result.err


def test_delete_without_a_terminal_needs_yes(pglimits: Cli) -> None:
    pglimits("create", "database", "-l", "5")
    for stdin in (None, "y\n"):
        result = pglimits("delete", "database", stdin=stdin)
        assert (result.code, result.out) == (2, "")
        assert result.err == (
            "Error: Delete limit 'database' (0 slots held, 0 waiting)?"
            " There is no terminal to ask on: give --yes to do it\n"
        )
    for yes in ("--yes", "-y"):
        assert pglimits("delete", "database", yes).out == "Deleted limit 'database'.\n"
        pglimits("create", "database", "-l", "5")
    assert pglimits("delete", "database", "-y", "-o", "json").json == {"name": "database", "deleted": True}


def test_enable_and_disable_switch(pglimits: Cli) -> None:
    pglimits("create", "database", "-l", "5")
    again = pglimits("enable", "database")
    assert (again.code, again.err) == (1, "Error: limit 'database' is already enabled\n")
    assert pglimits("disable", "database").out == "Disabled limit 'database'.\n"
    again = pglimits("disable", "database")
    assert (again.code, again.err) == (1, "Error: limit 'database' is already disabled\n")
    assert pglimits("enable", "database", "-o", "json").json["active"] is True


def test_reset_ends_the_leases_of_a_limit_or_of_one_key(pglimits: Cli, conn: Connection) -> None:
    pglimits("create", "database", "-l", "5")
    for key in ("a", "a", "b"):
        conn.execute("select pglimits.acquire('database', key => %s::text)", [key])
    assert pglimits("reset", "database", "--key", "a", "-y", "-o", "json").json == {
        "name": "database", "key": "a", "ended": 2,
    }  # fmt: skip
    refused = pglimits("reset", "database")
    assert (refused.code, refused.out) == (2, "") and "--yes" in refused.err
    assert pglimits("reset", "database", "--yes").out == "Reset limit 'database': 1 lease ended.\n"
