"""Which database the provider talks to, what its errors tell, and numbers on their way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo
from terraformtest import Folder

pytest.importorskip("tf", reason="needs the extra pglimits[terraform]")

from tf.gen import tfplugin_pb2 as pb
from tf.types import Unknown
from tf.utils import Diagnostics, read_dynamic_value

from pglimits._install import install
from pglimits.terraform._provider import PglimitsProvider
from pglimits.terraform._resource import LimitResource
from pglimits.terraform._schema import Numeral
from pglimits.terraform._servicer import Servicer


def told(dsn: Any) -> list[tuple[str, list[str] | None]]:
    """What Terraform is told of a dsn."""
    provider, diags = PglimitsProvider(), Diagnostics()
    provider.configure_provider(diags, {"dsn": dsn})
    provider.close()
    return [(f"{each.summary} {each.detail}", each.path) for each in diags.diagnostics]


@pytest.fixture(autouse=True)
def _no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGLIMITS_DSN", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_the_database_is_the_one_of_the_dsn_or_of_the_environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(dsn) == []
    monkeypatch.setenv("DATABASE_URL", dsn)
    assert told(None) == []
    monkeypatch.setenv("PGLIMITS_DSN", "host=/nowhere")
    assert "cannot be reached" in told(None)[0][0]


def test_a_database_without_pglimits_is_told_of_once(bare_dsn: str) -> None:
    assert told(bare_dsn) == [("pglimits is not installed in this database: run pglimits install ", ["dsn"])]


def test_no_embedded_server_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PGLIMITS_HOME", str(tmp_path / "home"))
    ((said, path),) = told(None)
    assert said == "No database is named: set the provider's dsn, or PGLIMITS_DSN, or DATABASE_URL " and path is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        "geheim",
        "postgresql://me:geheim@127.0.0.1:1/database",
        "postgresql://me:12@geheim@127.0.0.1:1/database",
        "postgresql://me:geheim/34@127.0.0.1:1/database",
        "postgresql://me:12@geheim/34@127.0.0.1:1/database",
        "host=127.0.0.1 port=1 password=geheim sslmode=geheim",
        "host=geheim.invalid password=geheim user=me",
        "host=127.0.0.1 port=geheim",
    ],
)
def test_no_error_tells_a_password(dsn: str) -> None:
    ((said, _),) = told(dsn)
    assert "geheim" not in said


def test_a_dsn_that_is_not_known_yet_keeps_what_is_known() -> None:
    provider, diags = PglimitsProvider(), Diagnostics()
    provider.configure_provider(diags, {"dsn": Unknown})
    resource, state = LimitResource(provider), {"name": "a", "limit": 1}
    context = SimpleNamespace(diagnostics=diags)
    assert resource.read(context, state) is state and diags.has_warnings() and not diags.has_errors()
    assert resource.plan(context, None, state) is state
    assert resource.delete(context, state) is state and diags.has_errors()


def test_a_role_that_may_look_can_plan_and_is_told_who_may_apply(server_dsn: str, conn: Any) -> None:
    conn.execute("create role looks login in role pglimits_reader")
    try:
        provider, diags = PglimitsProvider(), Diagnostics()
        provider.configure_provider(diags, {"dsn": make_conninfo(server_dsn, user="looks")})
        resource, wanted = LimitResource(provider), {"name": "a", "limit": 1}
        context = SimpleNamespace(diagnostics=diags)
        resource.validate(diags, "pglimits_limit", wanted)
        resource.plan(context, None, wanted)
        assert resource.read(context, {**wanted, "id": "1", "created": ""}) is None and not diags.diagnostics
        planned = {**wanted, "slot_decay_per_second": 0, "active": True, "max_waiters": None, "description": None}
        assert resource.create(context, planned) is None
        provider.close()
        assert "pglimits_admin" in diags.diagnostics[0].summary
    finally:
        conn.execute("drop role looks")


def test_a_plan_warns_of_a_name_that_is_taken_and_an_import_of_one_that_is_not(dsn: str) -> None:
    provider, diags = PglimitsProvider(), Diagnostics()
    provider.configure_provider(diags, {"dsn": dsn})
    provider.limiter.create("taken", 1)
    context = SimpleNamespace(diagnostics=diags)
    LimitResource(provider).plan(context, None, {"name": "taken"})
    assert [each.summary for each in diags.diagnostics] == ["Limit 'taken' exists already"] and not diags.has_errors()
    assert LimitResource(provider).import_(context, "nowhere") is None
    assert diags.diagnostics[1].summary == "There is no limit named 'nowhere'"
    provider.close()


def test_a_limit_is_not_renamed_to_the_name_of_another_nor_changed_once_it_is_gone(dsn: str) -> None:
    provider, diags = PglimitsProvider(), Diagnostics()
    provider.configure_provider(diags, {"dsn": dsn})
    resource, context = LimitResource(provider), SimpleNamespace(diagnostics=diags)
    for name in ("a", "taken"):
        provider.limiter.create(name, 1)
    state = resource.import_(context, "a")
    assert state is not None
    assert resource.update(context, state, {**state, "name": "taken", "limit": 2}) is state
    provider.limiter.delete("a")
    diags.diagnostics, renaming = [], diags.diagnostics
    assert resource.update(context, state, {**state, "limit": 2}) is state
    found = [(each.summary, each.path) for each in (*renaming, *diags.diagnostics)]
    assert found == [
        ("There is a limit named 'taken' already", ["name"]),
        ("Limit 'a' was deleted since the plan: plan and apply again", None),
    ]
    assert [(limit.name, limit.limit) for limit in provider.limiter.list()] == [("taken", 1)]
    provider.close()


def test_a_limit_that_was_renamed_is_the_same_and_one_of_its_number_elsewhere_is_not(dsn: str, bare_dsn: str) -> None:
    provider, diags = PglimitsProvider(), Diagnostics()
    provider.configure_provider(diags, {"dsn": dsn})
    resource, context = LimitResource(provider), SimpleNamespace(diagnostics=diags)
    provider.limiter.create("a", 1)
    state = resource.import_(context, "a")
    assert state is not None
    provider.limiter.update("a", new_name="b")
    provider.limiter.create("a", 2)
    renamed = resource.read(context, state)
    assert renamed is not None and (renamed["name"], renamed["id"]) == ("b", state["id"])
    # Another database numbers its limits anew.
    install(bare_dsn)
    elsewhere = PglimitsProvider()
    elsewhere.configure_provider(diags, {"dsn": bare_dsn})
    elsewhere.limiter.create("other", 1)
    assert elsewhere.by_name("other")[1] == int(state["id"])  # type: ignore[index]
    assert LimitResource(elsewhere).read(context, state) is None
    assert LimitResource(elsewhere).delete(context, state) is None
    assert [limit.name for limit in elsewhere.limiter.list()] == ["other"] and not diags.diagnostics
    for each in (provider, elsewhere):
        each.close()


def test_a_number_comes_as_it_was_written_and_goes_back_so() -> None:
    number = Numeral()
    for travels, is_, goes in (
        (7, 7, 7), ("0.1", 0.1, "0.1"), (0.5, 0.5, "0.5"), ("1e-9", 1e-9, "1e-09"), (2.0, 2.0, 2), (None, None, None),
        ("123456789012345678901234567890", 123456789012345678901234567890, 123456789012345678901234567890),
    ):  # fmt: skip
        assert number.decode(travels) == is_ and number.encode(number.decode(travels)) == goes
    assert isinstance(number.decode("10.00000000000000000000000000001"), float)  # not a whole number


@pytest.mark.parametrize("kind", ["pglimits_limit", "prefect_global_concurrency_limit", "aws_instance"])
def test_a_state_is_moved_from_another_registry_or_from_prefects_provider(kind: str) -> None:
    state = dict.fromkeys(("id", "created", "updated", "max_waiters", "description"))
    state |= {"name": "a", "limit": 1, "active": True, "slot_decay_per_second": 0.1, "id": "7", "active_slots": 3}
    request = pb.MoveResourceState.Request(source_type_name=kind, target_type_name="pglimits_limit")
    request.source_state.json = json.dumps(state).encode()
    answer = Servicer(PglimitsProvider()).MoveResourceState(request, None)
    moved = read_dynamic_value(answer.target_state)
    if kind == "aws_instance":
        assert answer.diagnostics[0].summary == "A aws_instance cannot become a pglimits_limit" and moved is None
        return
    assert (moved["name"], moved["limit"], moved["slot_decay_per_second"]) == ("a", 1, "0.1")
    assert moved["id"] == ("7" if kind == "pglimits_limit" else None) and "active_slots" not in moved


def test_the_provider_says_who_starts_it(folder: Folder) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("terraform-provider-pglimits")], env=folder.environment, capture_output=True,
        text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1 and "pglimits terraform install" in done.stderr
