"""plan, apply, export: limits as code."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import psycopg
import pytest
from clitest import PROGRAM, Terminal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]
Cli = Callable[..., Any]
Wait = Callable[..., Any]

TOML = """\
[limits.database]
limit = 10
description = "the main one"

[limits."emails, daily"]
limit = 5
slot_decay_per_second = 0.5
max_waiters = 100
active = false
"""
YAML = """\
limits:
  database:
    limit: 10
    description: the main one
  "emails, daily": {limit: 5, slot_decay_per_second: 0.5, max_waiters: 100, active: false}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write("limits.toml", text): the path of a file with that in it."""

    def to(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return to


def limits(conn: Connection) -> list[tuple[Any, ...]]:
    return conn.execute(
        'select name, "limit", slot_decay_per_second, active, max_waiters, description from pglimits.limits'
        " order by name"
    ).fetchall()


WANTED = [("database", 10, 0.0, True, None, "the main one"), ("emails, daily", 5, 0.5, False, 100, None)]


# plan and apply.


@pytest.mark.parametrize(("name", "text"), [("limits.toml", TOML), ("limits.YML", YAML)])
def test_plan_shows_what_apply_does(pglimits: Cli, conn: Connection, write: Any, name: str, text: str) -> None:
    file = write(name, text)
    shown = """\
+ 'database'  limit: 10, description: "the main one"
+ 'emails, daily'  limit: 5, slot_decay_per_second: 0.5, active: false, max_waiters: 100

"""
    planned = pglimits("plan", file)
    assert (planned.code, planned.out, planned.err) == (2, f"{shown}Plan: 2 to create.\n", "")
    assert limits(conn) == []
    applied = pglimits("apply", file)
    assert (applied.code, applied.out, applied.err) == (0, f"{shown}Applied {file}: 2 created.\n", "")
    assert limits(conn) == WANTED
    for command in ("plan", "apply"):
        again = pglimits(command, file)
        assert (again.code, again.out, again.err) == (0, "Nothing to do: 2 unchanged.\n", "")


def test_a_change_is_shown_field_by_field_and_a_field_that_is_left_out_has_its_default(
    pglimits: Cli, conn: Connection, write: Any
) -> None:
    conn.execute("select pglimits.create_limit('database', 5, 0.25, false, 7, 'old')")
    file = write("limits.toml", '[limits.database]\nlimit = 10\ndescription = "new"')
    result = pglimits("plan", file)
    assert (result.code, result.out) == (
        2,
        """\
~ 'database'
    limit: 5 → 10
    slot_decay_per_second: 0.25 → 0
    active: false → true
    max_waiters: 7 → none
    description: "old" → "new"

Plan: 1 to change.
""",
    )
    assert pglimits("apply", file).code == 0
    assert limits(conn) == [("database", 10, 0.0, True, None, "new")]


def test_what_a_file_does_not_name_stays_unless_it_is_pruned(pglimits: Cli, conn: Connection, write: Any) -> None:
    file = write("limits.toml", TOML)
    pglimits("apply", file)
    conn.execute("select pglimits.create_limit('old', 3)")
    lease = conn.execute("select lease_id from pglimits.acquire('old', 2)").fetchone()
    assert lease is not None
    result = pglimits("plan", file)
    assert (result.code, result.err) == (0, "Not in the file, and left alone without --prune: 'old'.\n")
    assert pglimits("apply", file).code == 0
    assert len(limits(conn)) == 3

    result = pglimits("plan", file, "--prune")
    assert result.code == 2
    assert result.out == "- 'old'  2 slots held, 0 waiting\n\nPlan: 1 to delete, 2 unchanged.\n"
    result = pglimits("apply", file, "--prune")
    assert result.code == 2
    assert "Delete 1 limit: 'old' (2 slots held, 0 waiting)?" in result.err and "--yes" in result.err
    assert len(limits(conn)) == 3
    result = pglimits("apply", file, "--prune", "--yes")
    assert result.code == 0 and result.out.endswith(": 1 deleted, 2 unchanged.\n")
    assert limits(conn) == WANTED
    assert conn.execute("select pglimits.release(%s)", lease).fetchone() == (False,)


def test_prune_asks_on_a_terminal(terminal: Callable[..., Terminal], conn: Connection, write: Any) -> None:
    file = write("limits.toml", "[limits.database]\nlimit = 1")
    conn.execute("select pglimits.create_limit('old', 3)")
    asked = terminal("apply", file, "--prune")
    asked.read_until("Delete 1 limit: 'old' (0 slots held, 0 waiting)? [y/N]")
    asked.type("n\n")
    assert asked.wait() == 1
    assert [row[0] for row in limits(conn)] == ["old"]
    asked = terminal("apply", file, "--prune")
    asked.read_until("[y/N]")
    asked.type("y\n")
    assert asked.wait() == 0
    assert asked.plain.count("- 'old'") == 1
    assert "\x1b[31m- 'old'" in asked.shown
    assert [row[0] for row in limits(conn)] == ["database"]


def test_a_limit_that_is_create_only_is_made_and_then_left_to_whoever_changes_it(
    pglimits: Cli, conn: Connection, write: Any
) -> None:
    file = write("limits.toml", '[limits.api]\nlimit = 3\non_conflict = "create-only"')
    assert pglimits("apply", file).code == 0
    conn.execute("select pglimits.update_limit('api', 7)")
    kept = "= 'api' stays as it is (create-only): limit: 7, not 3\n\nNothing to do: 1 kept.\n"
    for command in (("plan", file), ("apply", file), ("apply", file, "--prune")):
        result = pglimits(*command)
        assert (result.code, result.out) == (0, kept)
    assert limits(conn) == [("api", 7, 0.0, True, None, None)]


def test_a_holder_keeps_its_slots_and_a_waiter_is_let_in(pglimits: Cli, conn: Connection, write: Any) -> None:
    conn.execute("select pglimits.create_limit('a', 1), pglimits.create_limit('b', 2)")
    conn.execute("select pglimits.acquire('a')")
    conn.execute("select pglimits.acquire('a', timeout_seconds => null, channel => 'pglimits_test')")
    conn.execute("select pglimits.acquire('b', 2)")
    assert pglimits("apply", write("limits.toml", "[limits]\na.limit = 2\nb.limit = 1")).code == 0
    assert conn.execute('select name, "limit", held, waiting from pglimits.limits order by name').fetchall() == [
        ("a", 2, 2, 0), ("b", 1, 2, 0),
    ]  # fmt: skip


def test_limits_with_leases_over_several_are_deleted_changed_and_made_at_once(
    pglimits: Cli, conn: Connection, write: Any
) -> None:
    conn.execute("select pglimits.create_limit(n, 5) from unnest(array['a', 'b', 'c']) n")
    lease = conn.execute("select lease_id from pglimits.acquire_all(array['a', 'b', 'c'])").fetchone()
    file = write("limits.toml", "[limits]\nb.limit = 9\nd.limit = 1")
    result = pglimits("apply", file, "--prune", "--yes")
    assert result.code == 0 and result.out.endswith(": 1 created, 1 changed, 2 deleted.\n")
    assert conn.execute("select name, held from pglimits.limits order by name").fetchall() == [("b", 1), ("d", 0)]
    assert conn.execute("select pglimits.release(%s)", lease).fetchone() == (True,)


def test_events_tell_what_was_applied(pglimits: Cli, conn: Connection, write: Any) -> None:
    conn.execute("select pglimits.create_limit('a', 1), pglimits.create_limit('b', 1)")
    pglimits("apply", write("limits.toml", "[limits]\na.limit = 2\nc.limit = 3"), "--prune", "--yes")
    told = conn.execute("select kind, name from pglimits.events order by event_id offset 2").fetchall()
    assert told == [("deleted", "b"), ("updated", "a"), ("created", "c")]


# Standard input, JSON.


def test_standard_input_is_toml_unless_it_is_said_to_be_yaml(pglimits: Cli, conn: Connection) -> None:
    assert pglimits("plan", "-", stdin=TOML).code == 2
    assert pglimits("plan", "-", "--format", "yaml", stdin=YAML).code == 2
    result = pglimits("apply", "-", "--format", "YAML", stdin=YAML)
    assert result.code == 0 and result.out.endswith("Applied stdin: 2 created.\n")
    assert limits(conn) == WANTED


def test_json_says_all_of_it_and_nothing_else(pglimits: Cli, conn: Connection, write: Any) -> None:
    conn.execute("select pglimits.create_limit('database', 5), pglimits.create_limit('old', 1)")
    file = write("limits.toml", "[limits.database]\nlimit = 6\n[limits.new]\nlimit = 1\nslot_decay_per_second = 0.1")

    def definition(limit: int, rate: float = 0.0) -> dict[str, Any]:
        return {
            "limit": limit, "slot_decay_per_second": rate, "active": True, "max_waiters": None, "description": None,
        }  # fmt: skip

    expected = {
        "pglimits_plan": 1,
        "file": file,
        "prune": True,
        "limits": [
            {"name": "database", "action": "update", "old": definition(5), "new": definition(6)},
            {"name": "new", "action": "create", "old": None, "new": definition(1, 0.1)},
            {"name": "old", "action": "delete", "old": definition(1), "new": None},
        ],
        "summary": {"create": 1, "update": 1, "delete": 1, "keep": 0, "none": 0},
    }
    planned = pglimits("plan", file, "--prune", "-o", "json")
    assert (planned.code, planned.json, planned.err) == (2, expected, "")
    applied = pglimits("apply", file, "--prune", "--yes", "-o", "json")
    assert (applied.code, applied.json, applied.err) == (0, {**expected, "applied": True}, "")
    assert pglimits("plan", file, "-o", "json").json["summary"]["none"] == 2


# Saved plans.


def test_a_saved_plan_is_applied_as_it_is(pglimits: Cli, conn: Connection, write: Any, tmp_path: Path) -> None:
    saved = str(tmp_path / "plan.json")
    conn.execute("select pglimits.create_limit('old', 1)")
    result = pglimits("plan", write("limits.toml", TOML), "--prune", "--out", saved)
    assert (result.code, result.err) == (2, f"Saved the plan: pglimits apply {saved}\n")
    result = pglimits("apply", saved)
    assert result.code == 2 and "Delete 1 limit: 'old'" in result.err
    result = pglimits("apply", saved, "--prune", "--yes")
    assert result.code == 2 and "--prune does not go with a saved plan" in result.err
    result = pglimits("plan", saved)
    assert result.code == 1 and "is a saved plan already" in result.err
    file = write("limits.toml", TOML)
    result = pglimits("plan", file, "--out", file)
    assert result.code == 1 and "--out names the file of limits itself" in result.err
    assert Path(file).read_text() == TOML
    result = pglimits("apply", "-", "--yes", "-o", "json", stdin=Path(saved).read_text())
    assert result.code == 0 and result.json["summary"]["create"] == 2
    assert limits(conn) == WANTED


def test_a_saved_plan_is_refused_where_limits_were_changed_since_and_says_which(
    pglimits: Cli, conn: Connection, write: Any, tmp_path: Path
) -> None:
    saved = str(tmp_path / "plan.json")
    conn.execute(
        "select pglimits.create_limit(n, 1) from unnest(array['changes', 'same', 'goes', 'kept', 'pruned', 'unused']) n"
    )
    conn.execute("select pglimits.update_limit('kept', 2)")
    text = "[limits]\nchanges.limit = 2\nsame.limit = 1\ngoes.limit = 5\nnew.limit = 1\n"
    kept = 'kept = {limit = 1, on_conflict = "create-only"}\n'
    assert pglimits("plan", write("limits.toml", text + kept), "--prune", "--out", saved).code == 2
    conn.execute("select pglimits.update_limit('kept', 3)")  # that is what create-only is for
    conn.execute("select pglimits.acquire('unused')")  # in use is not changed
    before = limits(conn)
    conn.execute("select pglimits.update_limit('changes', 7, slot_decay_per_second => 0.1)")
    conn.execute("select pglimits.update_limit('same', description => 'x')")
    conn.execute("select pglimits.delete_limit('goes')")
    conn.execute("select pglimits.update_limit('pruned', active => false)")
    conn.execute("select pglimits.create_limit('new', 1), pglimits.create_limit('newer', 1)")
    changed = limits(conn)
    result = pglimits("apply", saved, "--yes")
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "Error: the limits are not as the plan found them, so nothing was changed:"
        " 'changes' (limit: 1 -> 7, slot_decay_per_second: 0 -> 0.1), 'goes' (it is gone), 'new' (it was created),"
        " 'newer' (it was created), 'pruned' (active: true -> false), 'same' (description: null -> \"x\")."
        " Make a new plan\n"
    )
    assert limits(conn) == changed
    conn.execute("select pglimits.update_limit('changes', 1, 0), pglimits.update_limit('same', description => '')")
    conn.execute("select pglimits.create_limit('goes', 1), pglimits.update_limit('pruned', active => true)")
    conn.execute("select pglimits.delete_limit('new'), pglimits.delete_limit('newer')")
    assert limits(conn) == before
    assert pglimits("apply", saved, "--yes").code == 0
    assert [row[:2] for row in limits(conn)] == [("changes", 2), ("goes", 5), ("kept", 3), ("new", 1), ("same", 1)]


def test_a_plan_that_was_damaged_is_an_error(pglimits: Cli, conn: Connection, write: Any, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    pglimits("plan", write("limits.toml", TOML), "--out", str(saved))
    whole = json.loads(saved.read_text())
    first = whole["limits"][0]
    for damaged, said in (
        (saved.read_text()[:-30], "no JSON"),
        ({**whole, "pglimits_plan": 2}, "pglimits_plan must be 1, not 2"),
        ({"pglimits_plan": 1}, "file is missing"),
        ({**whole, "limits": [{**first, "action": "explode"}]}, "limits.0.action must be 'create', 'update'"),
        ({**whole, "limits": [{**first, "action": "delete"}]}, "do not fit"),
        (
            {**whole, "limits": [{**first, "new": {**first["new"], "limit": "x"}}]},
            "limits.0.new.limit must be a whole number, not 'x'",
        ),
        ({**whole, "limits": [{**first, "new": {"active": True}}]}, "limits.0.new.limit is missing"),
        ({**whole, "limits": [{**first, "name": "a/b"}]}, "name must not contain"),
        ({**whole, "limits": [first, first]}, "names a limit twice"),
        ({**whole, "limits": 5}, "limits must be a valid array"),
    ):
        text = damaged if isinstance(damaged, str) else json.dumps(damaged)
        file = write("damaged.json", text)
        result = pglimits("apply", file)
        assert (result.code, result.out) == (1, ""), said
        assert result.err.startswith(f"Error: {file}: ") and said in result.err, result.err
    assert limits(conn) == []


# Others at the same time.


def blocked(conn: Connection, count: int) -> bool:
    row = conn.execute(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    ).fetchone()
    return row is not None and row[0] >= count


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def test_two_applies_at_once_come_one_after_the_other(
    start: Callable[..., subprocess.Popen[str]], connect: Connect, conn: Connection, write: Any, wait_until: Wait
) -> None:
    conn.execute("select pglimits.create_limit('b', 1)")
    files = [
        write("1.toml", "[limits]\na.limit = 1\nb.limit = 2"),
        write("2.toml", "[limits]\na.limit = 3\nc.limit = 4"),
    ]
    other = connect(autocommit=False)
    other.execute("select from pglimits.meta for update")
    applies = [start("apply", file, "--prune", "--yes") for file in files]
    wait_until(lambda: blocked(conn, 2))
    other.commit()
    results = [ended(each) for each in applies]
    assert [(code, err) for code, _, err in results] == [(0, ""), (0, "")]
    # Whoever came second found what the first had made, and says so.
    first, second = (0, 1) if "~ 'a'" in results[1][1] else (1, 0)
    assert "+ 'a'" in results[first][1]
    assert "    limit: " in results[second][1]
    expected = [[("a", 1), ("b", 2)], [("a", 3), ("c", 4)]][second]
    assert [row[:2] for row in limits(conn)] == expected


def test_a_change_by_somebody_else_in_the_middle_is_seen(
    start: Callable[..., subprocess.Popen[str]], connect: Connect, conn: Connection, write: Any, wait_until: Wait
) -> None:
    conn.execute("select pglimits.create_limit('a', 1)")
    other = connect(autocommit=False)
    other.execute("select pglimits.update_limit('a', 7, description => 'x')")
    applying = start("apply", write("limits.toml", "[limits]\na.limit = 2"))
    wait_until(lambda: blocked(conn, 1))
    other.commit()
    code, out, err = ended(applying)
    assert (code, err) == (0, "")
    assert "limit: 7 → 2" in out and 'description: "x" → none' in out
    assert [row[:2] for row in limits(conn)] == [("a", 2)]


def test_applying_does_not_deadlock_with_whoever_needs_several_limits_for_the_first_time(
    start: Callable[..., subprocess.Popen[str]], connect: Connect, conn: Connection, write: Any, wait_until: Wait
) -> None:
    conn.execute("select pglimits.create_limit('a', 5), pglimits.create_limit('b', 5)")
    conn.execute("select pglimits.acquire('a')")
    other = connect(autocommit=False)
    other.execute("set deadlock_timeout = '1ms'")  # it is the one to find a deadlock
    other.execute("select pglimits.acquire('a')")
    applying = start("apply", write("limits.toml", "[limits]\na.limit = 2\nb.limit = 2"))
    wait_until(lambda: blocked(conn, 1))
    other.execute("select pglimits.acquire('b', key => 'new')")  # shares the config of b, which nobody has locked yet
    other.commit()
    assert ended(applying)[0] == 0
    assert [row[:2] for row in limits(conn)] == [("a", 2), ("b", 2)]


# What is wrong with a file.

WRONG_TOML = """\
# Numbers as text, and so on.
[limits.database]
limit = "10"
activ = true
active = "true"

[limits."a/b"]
limit = -1
slot_decay_per_second = nan

[limits.x]
slot_decay_per_second = 1e-10
max_waiters = 10000000000000000000000000
description = ["]", '''
 }''', {b = 1}]
on_conflict = "replace"

[limits]
y = {limit = 10.0, "max-waiters" = 3}
z = 5
"a\\u0085" = {limit = true, description = {}}

[limit]
"""
WRONG_YAML = """\
limits:
  database:
    limit: "10"
    activ: true
    active: yes
  a/b: {limit: -1, slot_decay_per_second: .nan}
  10:
    limit: 1
  database: {limit: 2}
  c:
  d:
    limit: 99999999999
    description: [x]
"""


def test_everything_that_is_wrong_with_a_file_is_said_at_once_and_where_it_is(
    pglimits: Cli, conn: Connection, write: Any
) -> None:
    for name, text, faults in (
        (
            "wrong.toml",
            WRONG_TOML,
            """\
3:9: limit 'database': limit must be a whole number, not '10'
4:1: limit 'database': there is no field 'activ'; did you mean 'active'?
5:10: limit 'database': active must be true or false, not 'true'
7:9: limit 'a/b': name must not contain any of / % & > <: 'a/b'
8:9: limit 'a/b': limit must be at least 0, not -1
9:25: limit 'a/b': slot_decay_per_second must be a number, not nan
11:9: limit 'x': it has no 'limit', which says how many slots there are
12:25: limit 'x': slot_decay_per_second must be 0 or at least 0.000000001, not 1e-10
13:15: limit 'x': max_waiters must be at most 2147483647, not 10000000000000000000000000
14:15: limit 'x': description must be a string, not [']', ' }', {'b': 1}]
16:15: limit 'x': on_conflict must be 'update' or 'create-only', not 'replace'
19:14: limit 'y': limit must be a whole number, not 10.0
19:20: limit 'y': there is no field 'max-waiters'; did you mean 'max_waiters'?
20:5: limit 'z': it must be a table with a 'limit', such as {limit = 10} or {limit: 10}
21:1: limit 'a\\x85': name must not contain control characters: "a\\u0085"
21:22: limit 'a\\x85': limit must be a whole number, not true
21:42: limit 'a\\x85': description must be a string, not {}
23:2: there is no field 'limit'; did you mean 'limits'?
""",
        ),
        (
            "wrong.yaml",
            WRONG_YAML,
            """\
3:12: limit 'database': limit must be a whole number, not '10'
4:5: limit 'database': there is no field 'activ'; did you mean 'active'?
5:13: limit 'database': active must be true or false, not 'yes'
6:3: limit 'a/b': name must not contain any of / % & > <: 'a/b'
6:16: limit 'a/b': limit must be at least 0, not -1
6:43: limit 'a/b': slot_decay_per_second must be a number, not nan
7:3: a name must be a string: write "10"
9:3: 'database' is there twice, first in line 2
10:3: limit 'c': it must be a table with a 'limit', such as {limit = 10} or {limit: 10}
12:12: limit 'd': limit must be at most 2147483647, not 99999999999
13:18: limit 'd': description must be a string, not []
""",
        ),
    ):
        file = write(name, text)
        for command in ("plan", "apply"):
            result = pglimits(command, file)
            assert (result.code, result.out) == (1, "")
            assert result.err == "".join(f"Error: {file}:{line}\n" for line in faults.splitlines())
    assert limits(conn) == []


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.toml", "", "1:1: there is no table 'limits'; a file of no limits has an empty one"),
        ("a.yaml", "# nothing\n", "1:1: there is no table 'limits'; a file of no limits has an empty one"),
        ("a.yaml", "limits:\n", "1:1: 'limits' must be a table, with a table for each limit"),
        ("a.yaml", "- 1\n", "1:1: it must have a table 'limits', and nothing else"),
        ("a.toml", "[[limits]]\nlimit = 1", "1:3: 'limits' must be a table, with a table for each limit"),
        ("a.toml", "[limits.a]\nlimit = 1\n\n[limits.a]\n", "4:10: limit 'a' is there twice"),
        ("a.toml", "[limits.a]\nlimit = 1\nlimit = 2\n", "3:10: cannot overwrite a value"),
        ("a.toml", "[limits.a", "1:10: expected ']' at the end of a table declaration"),
        ("a.toml", "[limits.a]\nlimit = 010\n", "2:10: expected newline or end of document after a statement"),
        ("a.yaml", "limits:\n  a: {limit: 1\n", "3:1: while parsing a flow mapping, expected ',' or '}'"),
        ("a.yaml", "limits:\n\ta: 1\n", "2:1: while scanning for the next token, found character '\\t'"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "2:1: expected a single document"),
        ("a.yaml", "limits:\n  a: \x01\n", "2:6: the character U+0001 is not allowed"),
        ("a.yaml", "a: !!python/object:os.system 1\nlimits: {}", "1:1: there is no field 'a', only limits"),
        ("a.toml", f"[limits.a]\nlimit = {HUGE}", "2:9: a number has too many digits"),
        ("a.yaml", f"limits:\n  a: {{limit: {HUGE}}}", "2:14: it is no int, or one of too many digits"),
        ("a.yaml", "limits: {a: {limit: !!int , active: !!bool x}}", "1:21: it is no int, or one of too many digits"),
        ("a.yaml", "limits: {a: {limit: 1, active: !!bool x}}", "1:32: it is no bool, or one of too many digits"),
        (
            "a.toml",
            f"[limits.a]\nlimit = 0x{HUGE}",
            "2:9: limit 'a': limit must be at most 2147483647, not one of so many digits",
        ),
        ("a.yaml", 'limits: {"\\ud800": {limit: 1}}', "1:10: what \\u stands for is no character"),
        ("a.yaml", 'limits: {a: {limit: 1, description: "\\ud800"}}', "1:37: what \\u stands for is no character"),
        ("a.yaml", "limits: {'[key]': 5}", "1:19: limit '[key]': it must be a table"),
        ("a.toml", "a = " + "[" * 5000, "1:1: it is nested too deeply"),
        ("a.yaml", "a: " + "[" * 5000, "1:1: it is nested too deeply"),
        ("a.toml", "# grün\n# größe".encode("latin-1"), "1:5: the byte 0xfc is not UTF-8: save the file as UTF-8"),
        ("a.yaml", "limits: {}\n".encode("utf-16"), "1:1: the byte 0xff is not UTF-8: save the file as UTF-8"),
        ("a.toml", "[limits.a]\nlimit = inf", "2:9: limit 'a': limit must be a whole number, not inf"),
        ("a.toml", "[limits.a]\nlimit = 1\ndescription = 2020-01-01", "3:15: limit 'a': description must be a string"),
        ("a.toml", f"[limits.{'n' * 201}]\nlimit = 1", f"1:9: limit '{'n' * 201}': name must have 1 to 200 characters"),
        ("a.toml", '[limits.""]\nlimit = 1', "1:9: limit '': name must have 1 to 200 characters"),
        ("a.toml", '[limits."\\u0000"]\nlimit = 1', "1:9: limit '\\x00': name must be Unicode without"),
        (
            "a.toml",
            f'[limits.a]\nlimit = 1\ndescription = "{"d" * 2001}"',
            "3:15: limit 'a': description must have at most 2000 characters",
        ),
    ],
)
def test_a_file_that_is_none_is_an_error_with_its_place(
    pglimits: Cli, conn: Connection, write: Any, name: str, content: str | bytes, said: str
) -> None:
    file = write(name, content)
    result = pglimits("plan", file)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"Error: {file}:{said}"), result.err
    assert len(result.err) < 1000
    assert pglimits("apply", file, "--prune", "--yes").code == 1


def test_a_byte_order_mark_and_carriage_returns_are_nothing(pglimits: Cli, write: Any) -> None:
    for name, text in (("a.toml", TOML), ("a.yaml", YAML)):
        for end in ("\r\n", "\r\r\n"):
            file = write(name, b"\xef\xbb\xbf" + text.replace("\n", end).encode())
            assert pglimits("plan", file, "-o", "json").json["summary"]["create"] == 2


def test_yaml_can_name_what_limits_have_in_common(
    pglimits: Cli, conn: Connection, write: Any, recwarn: pytest.WarningsRecorder
) -> None:
    text = "limits:\n  a: &a {limit: 3, max_waiters: 5}\n  b: {<<: *a, limit: 4}\n  c: &a {limit: 1}\n  d: *a\n"
    assert pglimits("apply", write("a.yaml", text)).code == 0
    assert [(name, limit, most) for name, limit, _, _, most, _ in limits(conn)] == [
        ("a", 3, 5), ("b", 4, 5), ("c", 1, None), ("d", 1, None),
    ]  # fmt: skip
    assert not recwarn.list


def test_yaml_whose_anchors_multiply_is_read_to_its_end(pglimits: Cli, write: Any) -> None:
    before = [f"{{<<: [*a{n}, *a{n}], x: *a{n}, description: &l{n + 1} [*l{n}, *l{n}]}}" for n in range(60)]
    tables = ["{limit: 1, description: &l0 [y]}", *before]
    text = "limits:\n" + "".join(f"  a{n}: &a{n} {table}\n" for n, table in enumerate(tables))
    result = pglimits("plan", write("a.yaml", text))
    assert result.code == 1
    assert "limit 'a60': there is no field 'x'" in result.err and "limit 'a60': it has no" not in result.err


def test_json_is_read_as_yaml(pglimits: Cli, conn: Connection, write: Any) -> None:
    text = json.dumps({"limits": {"😀": {"limit": 1, "description": "ü 😀"}}})
    assert "\\ud83d" in text
    assert pglimits("apply", write("a.yaml", text)).code == 0
    assert limits(conn) == [("😀", 1, 0.0, True, None, "ü 😀")]


def test_what_is_no_file_of_limits_is_an_error(pglimits: Cli, write: Any, tmp_path: Path) -> None:
    for arguments, code, said in (
        (("plan", str(tmp_path / "nix.toml")), 1, "No such file"),
        (("plan", str(tmp_path)), 1, "Is a directory"),
        (("plan", ""), 1, "FILE is empty"),
        (("plan", write("limits.json", "{}")), 1, "give --format"),
        (("plan", write("limits.toml", TOML), "--format", "xml"), 1, "--format must be 'toml' or 'yaml', not 'xml'"),
        (("plan", write("limits.toml", TOML), "--frob"), 1, "No such option"),
        (("plan",), 1, "Missing argument"),
        (("plan", write("limits.toml", TOML), "--dsn", "nonsense"), 1, ""),
        (("apply", write("limits.toml", TOML), "--format", "xml"), 2, "--format must be"),
        (("apply",), 2, "Missing argument"),
    ):
        result = pglimits(*arguments)
        assert (result.code, result.out) == (code, ""), arguments
        assert result.err.startswith("Error: ") and said in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("hidden", ["pydantic", "ruamel"])
def test_without_what_files_need_the_extra_is_named(process: Cli, write: Any, tmp_path: Path, hidden: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{hidden!r}] = None")
    result = process("plan", write("limits.yaml", YAML), PYTHONPATH=str(tmp_path))
    assert (result.code, result.out) == (1, "")
    assert result.err == "Error: this needs more than is installed: pip install 'pglimits[files]'\n"


def test_who_may_only_look_can_plan_and_export_but_not_apply(
    process: Cli, pglimits: Cli, conn: Connection, dsn: str, write: Any
) -> None:
    file = write("limits.toml", TOML)
    conn.execute("create role onlooker login in role pglimits_reader")
    try:
        as_reader = ("--dsn", psycopg.conninfo.make_conninfo(dsn, user="onlooker"))
        assert process("plan", file, *as_reader).code == 2
        assert process("export", *as_reader).code == 0
        result = process("apply", file, *as_reader)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("Error: permission denied") and "grant pglimits_admin to onlooker;" in result.err
        assert limits(conn) == []
    finally:
        conn.execute("drop role onlooker")


# export.


def test_export_writes_what_apply_reads(pglimits: Cli, conn: Connection, write: Any, tmp_path: Path) -> None:
    assert pglimits("export").out == "[limits]\n"
    assert pglimits("plan", "-", stdin="[limits]").out == "Nothing to do.\n"
    assert pglimits("export", "--format", "yaml").out == "limits: {}\n"
    pglimits("apply", write("limits.toml", TOML))
    assert pglimits("export").out == (
        '[limits.database]\nlimit = 10\ndescription = "the main one"\n\n'
        '[limits."emails, daily"]\nlimit = 5\nslot_decay_per_second = 0.5\nactive = false\nmax_waiters = 100\n'
    )
    for name in ("a.toml", "a.yaml", "a.yml"):
        file = str(tmp_path / name)
        result = pglimits("export", "--out", file)
        assert (result.code, result.out, result.err) == (0, "", f"Wrote 2 limits to {file}.\n")
        result = pglimits("plan", file, "--prune")
        assert (result.code, result.out) == (0, "Nothing to do: 2 unchanged.\n")
    assert pglimits("export", "-o", "json").json["limits"]["database"] == {"limit": 10, "description": "the main one"}
    assert pglimits("plan", "-", "--format", "yaml", stdin=pglimits("export", "-o", "json").out).code == 0
    conn.execute("select pglimits.update_limit('database', description => E'\\u202e\\u009b')")
    assert 'description = "\\u202e\\u009b"' in pglimits("export").out
    assert pglimits("export", "--out", str(tmp_path / "a.txt")).code == 1


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
ODD = ["null", "true", "No", "~", "==", "1", "1.5", "-", "limits", "2020-01-01", "#", '"', "'", "a.b", " ", "😀"]
NAMES = st.sampled_from(ODD) | st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/%&><"), min_size=1, max_size=200
)
DEFINITIONS = st.fixed_dictionaries(
    {
        "limit": st.integers(0, 2**31 - 1),
        "slot_decay_per_second": st.just(0.0) | st.floats(1e-9, 1e9),
        "active": st.booleans(),
        "max_waiters": st.none() | st.integers(0, 2**31 - 1),
        "description": st.none() | st.text(CHARACTERS, min_size=1, max_size=300),
    }
)
WORLDS = st.dictionaries(NAMES, DEFINITIONS, max_size=5)


@settings(max_examples=400, deadline=None)
@given(WORLDS, st.sampled_from(["toml", "yaml"]))
def test_what_is_written_is_read_as_it_was(world: dict[str, dict[str, Any]], syntax: str) -> None:
    from pglimits_cli import _limits_file as files

    limits = {name: files.Definition(**of).model_dump(exclude_defaults=True) for name, of in world.items()}
    text = files.written(limits, files.Syntax(syntax))
    text = text.encode().decode()  # as a file has it
    read = files.read(text, files.Syntax(syntax), lambda _: [])
    assert {name: each.definition.model_dump() for name, each in read.items()} == world


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORLDS, st.sampled_from(["toml", "yaml"]))
def test_what_is_exported_applied_elsewhere_and_exported_again_is_the_same(
    pglimits: Cli, conn: Connection, world: dict[str, dict[str, Any]], syntax: str
) -> None:
    conn.execute("select pglimits.delete_limit(name) from pglimits.limits")
    for name, of in world.items():
        conn.execute(
            "select pglimits.create_limit(%s, %s, %s, %s, %s, %s)",
            [
                name,
                *(of[field] for field in ("limit", "slot_decay_per_second", "active", "max_waiters", "description")),
            ],
        )
    before = limits(conn)
    text = pglimits("export", "--format", syntax).out
    assert pglimits("plan", "-", "--prune", "--format", syntax, stdin=text).code == 0
    conn.execute("select pglimits.delete_limit(name) from pglimits.limits")
    assert pglimits("apply", "-", "--format", syntax, stdin=text).code == 0
    assert limits(conn) == before
    assert pglimits("export", "--format", syntax).out == text


@settings(max_examples=100, deadline=None)
@given(WORLDS)
def test_what_the_product_allows_the_schema_allows(world: dict[str, dict[str, Any]]) -> None:
    from pglimits_cli import _limits_file as files

    jsonschema_rs.validate(files.schema(), {"limits": world})


def test_the_schema_refuses_what_the_product_refuses(pglimits: Cli, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    result = pglimits("export", "--schema", "--out", str(file))
    assert (result.code, result.out, result.err) == (0, "", f"Wrote the JSON Schema to {file}.\n")
    schema = json.loads(file.read_text())
    assert pglimits("export", "--schema").json == schema
    jsonschema_rs.validate(schema, {"limits": {"a": {"limit": 1, "on_conflict": "create-only"}}})
    for wrong in (
        {}, {"limits": {"a": {}}}, {"limits": {"a": {"limit": -1}}}, {"limits": {"a/b": {"limit": 1}}},
        {"limits": {"": {"limit": 1}}}, {"limits": {"a": {"limit": 1, "activ": True}}},
        {"limits": {"a": {"limit": 2**31}}}, {"limits": {"a": {"limit": 1, "active": "true"}}},
        {"limits": {"a": {"limit": 1, "slot_decay_per_second": 1e10}}}, {"limit": {}},
        {"limits": {"a": {"limit": 1, "on_conflict": "replace"}}}, {"limits": {"n" * 201: {"limit": 1}}},
    ):  # fmt: skip
        assert not jsonschema_rs.is_valid(schema, wrong), wrong


def test_a_file_in_toml_loads_no_reader_of_yaml(environment: dict[str, str], write: Any) -> None:
    code = """
import atexit, sys
sys.argv[0] = "pglimits"
atexit.register(lambda: print(*({"ruamel", "rich"} & set(sys.modules)), file=sys.stderr))
import pglimits_cli
pglimits_cli.main()
"""
    file = write("limits.toml", TOML)
    done = subprocess.run(
        [PROGRAM[0], "-c", code, "plan", file, "-o", "json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "\n")
