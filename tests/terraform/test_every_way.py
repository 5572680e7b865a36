"""A limit that was made in one way looks the same in all others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row
from servertest import Server
from terraformtest import Folder

from pglimits import Limiter

Limits: TypeAlias = dict[str, dict[str, Any]]
FIELDS = {
    "limit": 7,
    "slot_decay_per_second": 0.1,
    "active": False,
    "max_waiters": 3,
    "description": 'für "alle" \\ 100 %',
}
DECIDED = ("name", *FIELDS)
SEEN = (*DECIDED, "created_at", "updated_at")


class Ways:
    """The ways to a database: each makes a limit, and shows all that there are."""

    def __init__(self, dsn: str, http: httpx.Client, folder: Path, terraform: Folder | None) -> None:
        self.dsn = dsn
        self.http = http
        self.folder = folder
        self.terraform = terraform
        self.resources = 'data "pglimits_limits" "all" {}\noutput "all" { value = data.pglimits_limits.all.limits }\n'
        self.names = ["sql", "python", "cli", "file", "http", *(["terraform"] if terraform is not None else [])]

    def make(self, way: str, name: str, **fields: Any) -> None:
        getattr(self, f"_make_by_{way}")(name, fields)

    def show(self, way: str) -> Limits:
        shown = getattr(self, f"_show_by_{way}")()
        return {limit["name"]: {field: limit[field] for field in SEEN if field in limit} for limit in shown}

    def _cli(self, *words: str) -> str:
        environment = {**os.environ, "PGLIMITS_DSN": self.dsn}
        command = [sys.executable, "-m", "pglimits_cli", *words]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=200).stdout

    def _make_by_sql(self, name: str, fields: dict[str, Any]) -> None:
        arguments = ", ".join(f'"{field}" => %({field})s' for field in fields)
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(
                f"select pglimits.create_limit(%(name)s, {arguments})".encode(), {"name": name, **fields}
            )

    def _show_by_sql(self) -> list[dict[str, Any]]:
        with psycopg.connect(self.dsn, row_factory=dict_row) as connection:
            return connection.execute("select * from pglimits.limits").fetchall()

    def _make_by_python(self, name: str, fields: dict[str, Any]) -> None:
        with Limiter(self.dsn) as limiter:
            limiter.create(name, **fields)

    def _show_by_python(self) -> list[dict[str, Any]]:
        with Limiter(self.dsn) as limiter:
            return [{field: getattr(limit, field) for field in SEEN} for limit in limiter.list()]

    def _make_by_cli(self, name: str, fields: dict[str, Any]) -> None:
        active = fields.pop("active", True)
        options = [word for field, value in fields.items() for word in (f"--{field.replace('_', '-')}", str(value))]
        self._cli("create", name, *options, *([] if active else ["--disable"]))

    def _show_by_cli(self) -> list[dict[str, Any]]:
        return [with_moments(limit) for limit in json.loads(self._cli("ls", "-o", "json"))]

    def _make_by_file(self, name: str, fields: dict[str, Any]) -> None:
        written = self.folder / "limits.toml"
        # A text of JSON is one of TOML.
        lines = [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
        written.write_text("\n".join([f"[limits.{json.dumps(name)}]", *lines]), encoding="utf-8")
        self._cli("apply", str(written), "--yes")

    def _show_by_file(self) -> list[dict[str, Any]]:
        usual = {"slot_decay_per_second": 0, "active": True, "max_waiters": None, "description": None}
        found = json.loads(self._cli("export", "-o", "json"))["limits"]
        return [{"name": name, **usual, **fields} for name, fields in found.items()]

    def _make_by_http(self, name: str, fields: dict[str, Any]) -> None:
        self.http.post("/v1/limits", json={"name": name, **fields}).raise_for_status()

    def _show_by_http(self) -> list[dict[str, Any]]:
        return [with_moments(limit) for limit in self.http.get("/v1/limits").json()["limits"]]

    def _make_by_terraform(self, name: str, fields: dict[str, Any]) -> None:
        assert self.terraform is not None
        lines = [f"  {field} = {json.dumps(value)}" for field, value in {"name": name, **fields}.items()]
        self.resources += "\n".join([f'resource "pglimits_limit" "_{len(self.resources)}" {{', *lines, "}\n"])
        self.terraform.apply(self.resources)

    def _show_by_terraform(self) -> list[dict[str, Any]]:
        assert self.terraform is not None
        self.terraform.apply(self.resources)
        found = json.loads(self.terraform.run("output", "-json", "all"))
        return [
            with_moments({**limit, "created_at": limit["created"], "updated_at": limit["updated"]}) for limit in found
        ]


def with_moments(limit: dict[str, Any]) -> dict[str, Any]:
    return limit | {field: datetime.fromisoformat(limit[field]) for field in ("created_at", "updated_at")}


def look_the_same(ways: Ways) -> None:
    for way in ways.names:
        ways.make(way, f"by {way}", limit=7)
        ways.make(way, f"by {way}, with all fields", **FIELDS)
    by_sql = ways.show("sql")
    usual = {"limit": 7, "slot_decay_per_second": 0, "active": True, "max_waiters": None, "description": None}
    for way in ways.names:
        plain, full = (by_sql[f"by {way}{more}"] for more in ("", ", with all fields"))
        assert {field: plain[field] for field in DECIDED} == {"name": f"by {way}", **usual}
        assert {field: full[field] for field in DECIDED} == {"name": f"by {way}, with all fields", **FIELDS}
    for way in ways.names:
        shown = ways.show(way)
        known = DECIDED if way == "file" else SEEN
        assert shown == {name: {field: limit[field] for field in known} for name, limit in by_sql.items()}, way


@pytest.fixture
def http(dsn: str) -> Iterator[httpx.Client]:
    server = Server(dsn)
    try:
        server.wait()
        with server.client() as client:
            yield client
    finally:
        server.kill()


def test_a_limit_made_in_any_way_looks_the_same_in_all(dsn: str, http: httpx.Client, tmp_path: Path) -> None:
    look_the_same(Ways(dsn, http, tmp_path, None))


def test_so_does_one_that_terraform_makes(folder: Folder, dsn: str, http: httpx.Client, tmp_path: Path) -> None:
    look_the_same(Ways(dsn, http, tmp_path, folder))
