"""What Terraform does to limits: the tour with the real program."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import UTC
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from terraformtest import Folder, blocks, unfolded

Connection = psycopg.Connection[Any]

THREE = """
resource "pglimits_limit" "database" {
  name  = "database"
  limit = 10
}
resource "pglimits_limit" "emails" {
  name                  = "emails, daily"
  limit                 = 5
  slot_decay_per_second = 0.1
  active                = false
  max_waiters           = 7
  description           = "größer als 0"
}
resource "pglimits_limit" "third" {
  name                  = "third"
  limit                 = 0
  slot_decay_per_second = 1 / 3
  description           = ""
  max_waiters           = null
}
"""
CHANGED = """
resource "pglimits_limit" "database" {
  name        = "postgres"
  limit       = 20
  max_waiters = 0
}
resource "pglimits_limit" "emails" {
  name  = "emails, daily"
  limit = 5
}
"""
DECIDED = 'name, "limit", slot_decay_per_second, active, max_waiters, description'


def limits(conn: Connection) -> list[tuple[Any, ...]]:
    return conn.execute(f"select {DECIDED} from pglimits.limits order by name".encode()).fetchall()


def names(conn: Connection) -> list[str]:
    return [row[0] for row in limits(conn)]


def test_limits_are_created_changed_in_place_and_destroyed_and_no_password_is_told(
    folder: Folder, dsn: str, conn: Connection
) -> None:
    ((provider, _),) = [example for example in blocks("hcl") if "provider" in example[0]]
    del folder.environment["PGLIMITS_DSN"]
    folder.environment["TF_VAR_dsn"] = make_conninfo(dsn, password="geheim")
    said = folder.apply(provider + THREE)
    assert "Resources: 3 added, 0 changed, 0 destroyed" in said
    assert limits(conn) == [
        ("database", 10, 0.0, True, None, None),
        ("emails, daily", 5, 0.1, False, 7, "größer als 0"),
        ("third", 0, 1 / 3, True, None, None),
    ]
    exported = subprocess.run(
        [sys.executable, "-m", "pglimits_cli", "export", "--dsn", dsn], env=folder.environment, capture_output=True,
        text=True, check=True, timeout=200,
    ).stdout  # fmt: skip
    assert exported.startswith('[limits.database]\nlimit = 10\n\n[limits."emails, daily"]\nlimit = 5\n')
    assert "slot_decay_per_second = 0.1\nactive = false\nmax_waiters = 7\n" in exported
    with conn.cursor(row_factory=dict_row) as cursor:
        (row,) = cursor.execute('select created_at, limit_id from pglimits.counters where "limit" = 5').fetchall()
    as_stated = folder.state["emails"]
    assert as_stated["id"] == str(row["limit_id"]) and as_stated["slot_decay_per_second"] == "0.1"
    assert as_stated["created"] == f"{row['created_at'].astimezone():%Y}" + as_stated["created"][4:]
    assert folder.state["third"]["description"] == ""
    folder.plan(code=0)
    folder.run("plan", "-out", "saved")

    # In place: leases and the number stay; what is left out has its default again.
    conn.execute("select pglimits.acquire('database', 3)")
    before = folder.state
    said += folder.apply(provider + CHANGED)
    assert "Resources: 0 added, 2 changed, 1 destroyed" in said and "must be replaced" not in said
    assert limits(conn) == [("emails, daily", 5, 0.0, True, None, None), ("postgres", 20, 0.0, True, 0, None)]
    assert conn.execute("select name, slots from pglimits.holders").fetchall() == [("postgres", 3)]
    after = folder.state["database"]
    assert {name for name in after if after[name] != before["database"][name]} == {
        "name", "limit", "max_waiters", "updated",
    }  # fmt: skip
    assert "Resources: 2 destroyed" in folder.run("destroy", "-auto-approve")
    assert limits(conn) == [] and folder.state == {}
    folder.environment["TF_VAR_dsn"] = "postgresql://me:geheim@127.0.0.1:1/db"
    said += folder.run("plan", code=1)
    assert said.count("connection to server") == 1 and "geheim" not in said
    for path in folder.path.rglob("*"):
        assert not path.is_file() or b"geheim" not in path.read_bytes()
    with zipfile.ZipFile(folder.path / "saved") as saved:
        assert b"geheim" not in b"".join(saved.read(each) for each in saved.namelist())


def test_drift_is_found_and_mended(folder: Folder, conn: Connection) -> None:
    folder.apply(THREE)
    gone = folder.state["third"]["id"]
    conn.execute("select pglimits.update_limit('database', 99, 2.5, false, 3, 'by hand', 'by hand')")
    conn.execute("select pglimits.delete_limit('emails, daily')")
    conn.execute("select pglimits.delete_limit('third'), pglimits.create_limit('third', 7)")
    said = folder.run("apply", "-auto-approve")
    assert "Plan: 1 to add, 2 to change, 0 to destroy" in said
    for change in ('"by hand" -> "database"', "99 -> 10", "2.5 -> 0", "false -> true", "3 -> null"):
        assert change in said
    assert limits(conn) == [
        ("database", 10, 0.0, True, None, None),
        ("emails, daily", 5, 0.1, False, 7, "größer als 0"),
        ("third", 0, 1 / 3, True, None, None),
    ]
    assert folder.state["third"]["id"] != gone  # it is another limit, under the same name


def test_a_limit_is_imported_by_its_name_and_data_sources_find_all(folder: Folder, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('emails, daily', 5, 0.1, false, 7, 'größer als 0')")
    conn.execute("select pglimits.create_limit('theirs', 3), pglimits.create_limit('third', 0, 1.0 / 3)")
    conn.execute("select pglimits.acquire('theirs', 2)")
    folder.write(THREE)
    assert "Import successful" in folder.run("import", "pglimits_limit.third", "third")
    imports = """
import {
  to = pglimits_limit.emails
  id = "emails, daily"
}
data "pglimits_limit" "theirs" { name = "theirs" }
data "pglimits_limits" "all" { depends_on = [pglimits_limit.database] }
output "theirs" { value = data.pglimits_limit.theirs }
output "all"    { value = data.pglimits_limits.all.limits }
"""
    said = folder.apply(THREE.replace('description           = ""', "") + imports)
    assert "Resources: 1 imported, 1 added, 0 changed, 0 destroyed" in said
    outputs = {name: each["value"] for name, each in json.loads(folder.run("output", "-json")).items()}
    with conn.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(
            "select l.*, c.limit_id from pglimits.limits l join pglimits.counters c using (name) order by l.name"
        ).fetchall()
    for row, found in zip(rows, outputs["all"], strict=True):
        assert found.pop("id") == str(row.pop("limit_id"))
        for moment in ("created", "updated"):
            at = row.pop(f"{moment}_at")
            assert found.pop(moment) == f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        assert found == row
    assert outputs["theirs"]["held"] == 2 and outputs["theirs"]["name"] == "theirs"


WRONG = """
resource "pglimits_limit" "a" {
  name  = "a"
  limit = 3000000000
}
resource "pglimits_limit" "b" {
  name  = "b"
  limit = 1.5
}
resource "pglimits_limit" "c" {
  name                  = "c"
  limit                 = 1
  slot_decay_per_second = -0.5
  max_waiters           = -1
}
resource "pglimits_limit" "d" {
  name  = "d"
  limit = null
  id    = "7"

  description = join("", [for _ in range(201) : "0123456789"])
}
"""
WRONG_TO_THE_DATABASE = """
resource "pglimits_limit" "a" {
  name  = "a/b"
  limit = 1
}
resource "pglimits_limit" "b" {
  name                  = "b"
  limit                 = 1
  slot_decay_per_second = 0.0000000001
}
"""

WRONG_WHEN_KNOWN = """
resource "terraform_data" "number" {
  input = -5
}
resource "pglimits_limit" "unknown" {
  name  = "unknown ${terraform_data.number.output}"
  limit = terraform_data.number.output
}
"""
TWICE = """
resource "pglimits_limit" "database" {
  name  = "database"
  limit = 10
}
resource "pglimits_limit" "once" {
  name  = "new"
  limit = 1
}
resource "pglimits_limit" "twice" {
  name       = "new"
  limit      = 1
  depends_on = [pglimits_limit.once]
}
"""


def test_an_error_names_the_attribute_and_nothing_is_changed(folder: Folder, conn: Connection) -> None:
    folder.write(WRONG)
    assert folder.faults("plan") == [
        ("limit", 9, "limit must be at most 2147483647, not 3000000000."),
        ("limit", 13, "limit must be a whole number, not 1.5."),
        ("slot_decay_per_second", 18, "slot_decay_per_second must be at least 0, not -0.5."),
        ("max_waiters", 19, "max_waiters must be at least 0, not -1."),
        ("limit", 23, "limit must not be null."),
        ("id", 24, "id is computed, so it cannot be set."),
        ("description", 26, "description must have at most 2000 characters."),
    ]
    # What only the database knows.
    folder.write(WRONG_TO_THE_DATABASE)
    assert folder.faults("apply", "-auto-approve") == [
        ("name", 8, "name must not contain any of / % & > <: 'a/b'."),
        ("slot_decay_per_second", 14, "slot_decay_per_second must be 0 or at least 0.000000001, not 1e-10."),
    ]
    assert names(conn) == []


def test_an_error_in_the_middle_names_the_attribute_and_a_limit_that_exists_is_to_be_imported(
    folder: Folder, conn: Connection
) -> None:
    conn.execute("select pglimits.create_limit('database', 10)")
    folder.write(TWICE + WRONG_WHEN_KNOWN)
    (first, second, third) = folder.faults("apply", "-auto-approve")
    assert third == ("limit", 26, "limit must be at least 0, not -5.")
    for at, name in ((first, "database"), (second, "new")):
        assert at[0] == "name" and at[2].startswith(
            f"If no state has it, import it: terraform import ADDRESS {name}, with"
        )
    assert (names(conn), set(folder.state)) == (["database", "new"], {"once", "number"})


def test_two_applies_at_once_make_each_limit_once_and_one_of_them_is_told(
    folder_of: Callable[[str], Folder], conn: Connection
) -> None:
    configuration = "".join(
        f'resource "pglimits_limit" "n{nth}" {{\n  name = "n{nth}"\n  limit = 1\n}}\n' for nth in range(10)
    )
    folders = [folder_of("one"), folder_of("other")]
    for folder in folders:
        folder.write(configuration)
    running = [folder.start("apply", "-auto-approve") for folder in folders]
    said = [unfolded(process.communicate(timeout=200)[0]) for process in running]
    states = [{each["id"]: each["name"] for each in folder.state.values()} for folder in folders]
    assert names(conn) == [f"n{nth}" for nth in range(10)]
    assert not states[0].keys() & states[1].keys() and len(states[0]) + len(states[1]) == 10
    for mine, theirs, told, process in zip(states, reversed(states), said, running, strict=True):
        assert mine.keys() <= {str(row[0]) for row in conn.execute("select limit_id from pglimits.counters")}
        for name in theirs.values():
            assert f"Limit '{name}' exists already" in told
        assert process.returncode == (1 if theirs else 0)


INTERRUPTED = THREE.replace("limit = 10", "limit = 11")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_an_apply_that_was_interrupted_is_completed_by_the_next_after_imports_if_it_was_killed(
    folder: Folder, conn: Connection, connect: Callable[..., Connection], wait_until: Callable[..., Any], by: int
) -> None:
    conn.execute("select pglimits.create_limit('theirs', 1)")
    lock = connect(autocommit=False)
    lock.execute("select pglimits.update_limit('theirs', new_name => 'still theirs')")  # so nobody creates a limit
    folder.write(THREE)
    process = folder.start("apply", "-auto-approve")

    def providers(condition: str) -> list[int]:
        asked = "select pid from pg_stat_activity where application_name = 'terraform-provider-pglimits' and "
        return [row[0] for row in conn.execute((asked + condition).encode())]

    wait_until(lambda: providers("wait_event_type = 'Lock'"), what="for a limit to be under way")
    os.killpg(process.pid, by) if by == signal.SIGINT else os.kill(process.pid, by)
    if by == signal.SIGINT:
        assert any("Interrupt received" in line for line in process.stdout)
    lock.commit()
    process.communicate(timeout=200)
    assert process.returncode == (1 if by == signal.SIGINT else -signal.SIGKILL)
    wait_until(lambda: not providers("true"), what="for the provider to end")
    there = names(conn)
    assert "still theirs" in there and len(there) > 1
    assert (set(folder.state) != set()) is (by == signal.SIGINT)

    folder.write(INTERRUPTED)
    if by == signal.SIGKILL:
        # Nobody wrote down what was made: the next apply names it, with the command that imports it.
        imports = []
        for error in folder.errors("apply", "-auto-approve"):
            (command,) = re.findall("terraform (import ADDRESS .+), with", error["detail"])
            imports.append(shlex.split(command.replace("ADDRESS", error["address"])))
        folder.run(*imports[0])
        rest = [f"import {{\n  to = {address}\n  id = {json.dumps(name)}\n}}\n" for _, address, name in imports[1:]]
        folder.write(INTERRUPTED + "".join(rest))
    assert "0 destroyed" in folder.run("apply", "-auto-approve")
    assert limits(conn) == [
        ("database", 11, 0.0, True, None, None),
        ("emails, daily", 5, 0.1, False, 7, "größer als 0"),
        ("still theirs", 1, 0.0, True, None, None),
        ("third", 0, 1 / 3, True, None, None),
    ]
    assert set(folder.state) == {"database", "emails", "third"}


PREFECT = """
terraform {
  required_providers {
    prefect = { source = "prefecthq/prefect" }
  }
}
resource "prefect_global_concurrency_limit" "database" {
  name  = "database"
  limit = 10
}
"""
MOVED = """
moved {
  from = prefect_global_concurrency_limit.database
  to   = pglimits_limit.database
}
"""


def test_a_limit_of_prefects_provider_moves_by_its_new_type(folder: Folder, conn: Connection, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "terraform-provider-prefect"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("prefect_provider.py")}"\n')
    program.chmod(0o755)
    config = Path(folder.environment["TF_CLI_CONFIG_FILE"]).read_text()
    overrides = f'provider_installation {{\n  dev_overrides {{\n    "prefecthq/prefect" = "{program.parent}"\n  }}'
    (tmp_path / "both.tfrc").write_text(config.replace("provider_installation {", overrides))
    folder.environment["TF_CLI_CONFIG_FILE"] = str(tmp_path / "both.tfrc")
    ((page, _),) = [example for example in blocks("hcl") if "moved" in example[0]]
    theirs = page[: page.index("moved")].replace('"pglimits_limit"', '"prefect_global_concurrency_limit"')
    (folder.path / "main.tf").write_text(PREFECT + theirs)
    folder.run("apply", "-auto-approve")
    conn.execute("select pglimits.create_limit('database', 10)")
    resources = PREFECT[PREFECT.index("resource") :].replace("prefect_global_concurrency", "pglimits")
    # The one that pglimits has already is taken over, the other is created; Prefect keeps both.
    assert "Resources: 1 added, 0 changed, 0 destroyed" in folder.apply(resources + MOVED + page)
    assert limits(conn) == [("api", 5, 0.1, True, None, None), ("database", 10, 0.0, True, None, None)]
    numbers = dict(conn.execute("select name, limit_id::text from pglimits.counters").fetchall())
    assert {name: each["id"] for name, each in folder.state.items()} == numbers
    assert not (folder.path / "DELETED").exists()
