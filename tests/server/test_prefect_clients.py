"""An unmodified Prefect, its command line and its library, works against ``pglimits serve``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefecttest import Prefect, client, gcl, most_at_once, notes, prefect, prefect_alone, url

Connection = Any
__all__ = ["client", "gcl", "prefect", "prefect_alone", "url"]


def test_each_command_and_flag_of_prefect_gcl(gcl: Callable[..., str], conn: Connection, tmp_path: Path) -> None:
    assert "No global concurrency limits found" in gcl("ls")
    assert json.loads(gcl("ls", "-o", "json")) == []
    assert "Created global concurrency limit with name 'jobs'" in gcl("create", "jobs", "--limit", "10")
    assert "already exists" in gcl("create", "jobs", "--limit", "10", code=1)
    gcl("create", "tag:a b", "-l", "3", "--active-slots", "2")
    gcl("create", "mails", "-l", "5", "--slot-decay-per-second", "0.5", "--active-slots", "4", "--disable")
    assert conn.execute('select name, "limit", held, level, active from pglimits.limits').fetchall()[0][:5] == (
        "jobs", 10, 0, 0, True,
    )  # fmt: skip
    listed = {limit["name"]: limit for limit in json.loads(gcl("ls", "-o", "json"))}
    assert list(listed) == ["jobs", "mails", "tag:a b"]
    assert listed["tag:a b"]["active_slots"] == 2
    assert listed["mails"] | {"active_slots": 0} == listed["mails"] | {
        "active_slots": 0, "limit": 5, "active": False, "slot_decay_per_second": 0.5,
    }  # fmt: skip
    table = gcl("ls")
    assert all(word in table for word in ("jobs", "tag:a b", "mails", "Active Slots", listed["jobs"]["id"]))

    assert "name='jobs'" in gcl("inspect", "jobs")
    assert json.loads(gcl("inspect", "jobs", "-o", "json"))["id"] == listed["jobs"]["id"]
    gcl("inspect", "jobs", "--output", "json", "--file", str(tmp_path / "jobs.json"))
    assert json.loads((tmp_path / "jobs.json").read_text())["limit"] == 10
    assert "not found" in gcl("inspect", "none", code=1)

    assert "already enabled" in gcl("enable", "jobs", code=1)
    assert "Disabled" in gcl("disable", "jobs")
    assert "already disabled" in gcl("disable", "jobs", code=1)
    assert json.loads(gcl("inspect", "jobs", "-o", "json"))["active"] is False
    assert "Enabled" in gcl("enable", "jobs")

    assert "Updated" in gcl("update", "jobs", "--limit", "7", "--active-slots", "6")
    gcl("update", "jobs", "--active-slots", "1")
    gcl("update", "jobs", "--slot-decay-per-second", "0.25", "--disable")
    changed = json.loads(gcl("inspect", "jobs", "-o", "json"))
    assert (changed["limit"], changed["active"], changed["slot_decay_per_second"]) == (7, False, 0.25)
    assert changed["active_slots"] == 1
    assert changed["id"] == listed["jobs"]["id"]
    gcl("update", "jobs", "--enable")
    assert "No update arguments" in gcl("update", "jobs", code=1)
    assert "not found" in gcl("update", "none", "--limit", "1", code=1)
    assert "active_slots is greater" in gcl("update", "tag:a b", "--active-slots", "9", code=1)

    assert "Deleted" in gcl("delete", "jobs")
    assert "not found" in gcl("delete", "jobs", code=1)
