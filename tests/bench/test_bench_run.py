"""The command measures what it is asked to, says so in a form that programs can read, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import psycopg
import pytest

Bench = Callable[..., subprocess.CompletedProcess[str]]

LINE = {"row", "what", "unit", "ours", "against", "theirs", "ratio", "target", "above", "met", "note"}
SPREAD = {"median", "low", "high", "values"}


def _is_spread(found: dict[str, Any]) -> bool:
    return set(found) == SPREAD and found["low"] <= found["median"] <= found["high"] and bool(found["values"])


def test_rows_yield_figures_and_curves_as_json_text_and_chart(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = bench("--short", "--only", "uncontended", "--only", "leases", "-o", "json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((out / "bench.json").read_text())
    assert (found["mode"], found["skipped"], found["failed"]) == ("short", [], [])
    assert found["setup"]["server"]["synchronous_commit"] == found["setup"]["server"]["fsync"] == "on"
    assert {"python", "pglimits", "psycopg"} <= set(found["setup"]["versions"])
    assert set(found["row_seconds"]) == {"uncontended", "leases"}

    lines = {line["row"]: line for line in found["lines"]}
    assert set(lines) == {"uncontended", "leases"}
    for line in lines.values():
        assert set(line) == LINE
        assert all(_is_spread(line[name]) for name in ("ours", "theirs", "ratio"))
        assert line["met"] or line["ratio"]["median"] > line["target"]["value"]
    assert _is_spread(lines["uncontended"]["above"])

    (curve,) = found["curves"]
    assert [point["x"] for point in curve["points"]] == [1, 10, 100, 1000]
    for point in curve["points"]:
        assert _is_spread(point["ms"])
        assert point["disk_bytes"] > 0
        assert point["dead_rows"] >= 0

    assert "1 client, sync, acquire + release" in (out / "bench.txt").read_text()
    ElementTree.parse(out / "growth.svg")
    assert "1/2 uncontended" in done.stderr


def test_on_the_server_of_a_dsn_it_leaves_nothing_behind(bench: Bench, dsn: str) -> None:
    def contents() -> list[tuple[Any, ...]]:
        with psycopg.connect(dsn) as connection:
            return connection.execute(
                "select 'limit', name from pglimits.configs union all select 'schema', nspname from pg_namespace "
                "union all select 'table', relname from pg_class where relnamespace = 'public'::regnamespace "
                "union all select 'database', datname from pg_database where datname like 'bench%' order by 1, 2"
            ).fetchall()

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select pglimits.create_limit('mine', 1)")
    before = contents()
    done = bench("--only", "waiters", "--only", "prefect", "--dsn", dsn, "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "waiters" in [line["row"] for line in found["lines"]]
    assert "not ours" in found["setup"]["server"]
    assert [skipped["row"] for skipped in found["skipped"]] == ["prefect"]
    assert contents() == before


def test_interrupted_it_ends_everything_that_it_started(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("--only", "eight-processes")
    assert process.stderr is not None
    while not process.stderr.readline().startswith("eight-processes: "):
        assert process.poll() is None
    started = psutil.Process(process.pid).children(recursive=True)
    (server,) = [child for child in started if child.name() == "postgres" and "-D" in child.cmdline()]
    data = Path(server.cmdline()[server.cmdline().index("-D") + 1])
    assert len(started) > 4  # the server with its processes, and workers
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=200)
    assert process.returncode == 130
    psutil.wait_procs(started, timeout=20)
    assert not [child for child in started if child.is_running()]
    assert not data.parent.exists()


def test_a_row_that_does_not_exist_is_refused_and_all_are_named(bench: Bench) -> None:
    done = bench("--only", "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "hand-over" in done.stderr
    listed = bench("--rows", "-o", "json")
    figures = json.loads(listed.stdout)
    assert {"row": "refusals", "what": "refusals of a full limit, 8 connections"}.items() <= figures[9].items()
    assert "two bare UPDATE commits with synchronous_commit = off" in figures[0]["reach"]
    assert all(set(each) == {"row", "what", "floor", "reach"} for each in figures)


@pytest.fixture
def blank() -> Any:
    """A benchmark with no server and no pgbench behind it."""
    from pglimits_bench._rows import Bench as Blank
    from pglimits_bench._scale import SHORT
    from pglimits_bench._server import Server

    return Blank(Server("", own=True, bin=None), SHORT, None, lambda what: None)


def test_a_missing_peer_is_skipped_and_says_how_to_install_it(blank: Any) -> None:
    from pglimits_bench._results import Skipped
    from pglimits_bench.peers import redis_limits
    from pglimits_bench.peers.rows import PEERS, measure

    for gone in ({"packages": {"no_such_module": "no-such-package"}}, {"program": "no-such-program"}):
        peer = dataclasses.replace(redis_limits.PEER, **gone)
        (found,) = measure(peer, blank)
        assert isinstance(found, Skipped)
        assert "no-such-p" in found.why
        assert "pip install 'limits[redis]'" in found.why
    assert all(peer.install or not peer.packages for peer in PEERS)


def test_without_pgbench_its_rows_are_skipped_and_say_how_to_install_it(blank: Any) -> None:
    from pglimits_bench._run import ROWS

    for name in ("one-process", "sql-one-limit", "snapshot"):
        (found,) = ROWS[name](blank)
        assert (found.row, found.why.startswith("no pgbench: ")) == (name, True)


def test_a_row_that_fails_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    from pglimits_bench import _run
    from pglimits_bench._measure import spread
    from pglimits_bench._results import line
    from pglimits_bench._scale import SHORT
    from pglimits_bench._server import Server

    class Nowhere(Server):
        def setup(self) -> dict[str, str]:
            return {}

    monkeypatch.setattr(_run, "server", lambda dsn: contextlib.nullcontext(Nowhere("", own=False, bin=None)))

    def breaks(bench: Any) -> Any:
        yield line("one", "first", "ms", spread([1.0]))
        raise RuntimeError("as expected")

    began = time.monotonic()
    monkeypatch.setitem(_run.ROWS, "cpu", breaks)
    monkeypatch.setitem(_run.ROWS, "views", lambda bench: iter([line("two", "x", "", spread([2.0]))]))
    done = _run.run(["cpu", "views"], SHORT)
    assert [found.row for found in done.lines] == ["one", "two"]
    assert [(failed.row, failed.why) for failed in done.failed] == [("cpu", "RuntimeError: as expected")]
    assert done.seconds <= time.monotonic() - began
