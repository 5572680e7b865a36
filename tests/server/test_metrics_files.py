"""The dashboard and the alert rules: they load, they ask for what there is, and each alert fires when it should."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from documents import blocks, environment, shell
from metricstest import OF_A_CLIENT, OF_THE_SERVER, PROMTOOL, ROOT, metrics_in, needs_promtool
from prometheus_client import CollectorRegistry

from pglimits import metrics

ALERTS = ROOT / "docs" / "alerts.yml"
DASHBOARD = ROOT / "docs" / "grafana" / "pglimits.json"
DOCUMENT = ROOT / "docs" / "metrics.md"
NAMES = re.findall(r"- alert: (\w+)", ALERTS.read_text())


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = [str(PROMTOOL), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=200)


# What is asked for is there.


def test_what_a_process_counts_has_the_names_that_are_asked_for() -> None:
    registry = CollectorRegistry()
    metrics.enable(registry)
    kinds = {family.name: family.type for family in registry.collect()}
    metrics.disable(registry)
    names = set()
    for name, kind in kinds.items():
        names |= {f"{name}_{part}" for part in (["total"] if kind == "counter" else ["bucket", "sum", "count"])}
    assert names == OF_A_CLIENT


def test_the_alert_rules_ask_for_metrics_that_there_are() -> None:
    text = re.sub(r"^\s*(summary|description|#).*$", "", ALERTS.read_text(), flags=re.MULTILINE)
    assert len(NAMES) >= 8
    assert metrics_in(text) <= OF_THE_SERVER | OF_A_CLIENT


def test_the_document_tells_of_every_metric_and_every_alert_and_of_no_other() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(pglimits_\w+)`", text, re.MULTILINE))
    whole = {re.sub(r"_(bucket|sum|count)$", "", name) for name in OF_A_CLIENT}
    assert told == OF_THE_SERVER | whole
    assert re.findall(r"^\| `(Pglimits\w+)`", text, re.MULTILINE) == NAMES


@needs_promtool
def test_prometheus_reads_the_configuration_of_the_document(tmp_path: Path) -> None:
    (block,) = blocks("docs/metrics.md", "yaml")
    token = tmp_path / "token"
    token.write_text("secret")
    file = tmp_path / "prometheus.yml"
    file.write_text(block.code.replace("/etc/prometheus/pglimits-token", str(token)))
    done = promtool("check", "config", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_line_for_cron_writes_metrics_into_the_file(dsn: str, tmp_path: Path) -> None:
    (block,) = blocks("docs/metrics.md", "cron")
    found = re.fullmatch(r"(?:\S+ ){5}(pglimits .*) (/var/lib/\S+)\n", block.code)
    assert found is not None
    file = tmp_path / "pglimits.prom"
    done = shell(f"{found[1]} {file}", environment(dsn), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pglimits_up 1\n" in file.read_text()


# The dashboard.


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]


def test_the_dashboard_asks_for_metrics_that_there_are_and_for_all_that_matter() -> None:
    asked = set().union(*map(metrics_in, expressions()))
    assert asked <= OF_THE_SERVER | OF_A_CLIENT
    assert asked >= OF_THE_SERVER - {"pglimits_info", "pglimits_limit_active", "pglimits_releases_total"}


def test_the_dashboard_needs_nothing_but_a_data_source() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert "__inputs" not in board
    assert board.get("id") is None
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert set(variables) == {"datasource", "instance", "limit"}
    sources = [variables["instance"], variables["limit"], *panels()]
    sources += [target for panel in panels() for target in panel["targets"]]
    assert {source["datasource"]["uid"] for source in sources} == {"${datasource}"}
    used = set(re.findall(r"\$(\w+)", " ".join(expressions())))
    assert used == {"instance", "limit", "__rate_interval"}


def test_the_panels_have_titles_texts_and_places_of_their_own() -> None:
    every = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells: set[tuple[int, int]] = set()
    for panel in every:
        assert panel["title"]
        place = panel["gridPos"]
        taken = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert cells.isdisjoint(taken), panel["title"]
        cells |= taken
    assert all(panel["description"].endswith(".") for panel in panels())


@needs_promtool
def test_prometheus_understands_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{n}", "expr": re.sub(r"\$(instance|limit)", ".*", each).replace("$__rate_interval", "1m")}
        for n, each in enumerate(expressions())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


# The alerts.

LIMIT = '{instance="a", job="p", limit="x"}'
SERVER = '{instance="a", job="p"}'


def requests(result: str, limit: str = "x") -> str:
    labels = f'instance="b", job="c", limit="{limit}", operation="acquire", result="{result}"'
    return f"pglimits_client_requests_total{{{labels}}}"


def of_limit(name: str, values: str) -> tuple[str, str]:
    return f"pglimits_{name}{LIMIT}", values


@dataclass
class Case:
    """One alert, with values each minute with which it fires after half an hour, and others with which it does not."""

    alert: str
    fires: list[tuple[str, str]]
    quiet: list[list[tuple[str, str]]] = field(default_factory=list)


UP = (f"pglimits_up{SERVER}", "1x40")
TEN = of_limit("limit_slots", "10x40")
NO_DECAY = of_limit("decay_slots_per_second", "0x40")
FULL = of_limit("held_slots", "10 9 10 10x37")
CASES = [
    Case(
        "PglimitsDown",
        [(f"pglimits_up{SERVER}", "1x10 0x30")],
        [[UP], [(f"pglimits_up{SERVER}", "1x10 0 1x29")]],
    ),
    Case("PglimitsAbsent", [("up", "1x40")], [[UP]]),
    Case(
        "PglimitsLimitSaturated",
        [TEN, NO_DECAY, FULL, of_limit("waiters", "2x40")],
        [
            # Nobody waits; somebody did not always wait; half of the slots are free.
            [TEN, NO_DECAY, FULL, of_limit("waiters", "0x40")],
            [TEN, NO_DECAY, FULL, of_limit("waiters", "2x26 0 2x20")],
            [TEN, NO_DECAY, of_limit("held_slots", "5x40"), of_limit("waiters", "2x40")],
        ],
    ),
    Case(
        "PglimitsLimitSaturated",
        [TEN, of_limit("decay_slots_per_second", "5x40"), of_limit("held_slots", "0x40"), of_limit("waiters", "2x40")],
        [[of_limit("limit_slots", "0x40"), NO_DECAY, of_limit("held_slots", "0x40"), of_limit("waiters", "2x40")]],
    ),
    Case(
        "PglimitsWaiterTooOld",
        [TEN, of_limit("oldest_waiter_age_seconds", "0+60x40")],
        [
            [TEN, of_limit("oldest_waiter_age_seconds", "500x40")],
            [of_limit("limit_slots", "0x40"), of_limit("oldest_waiter_age_seconds", "0+60x40")],
        ],
    ),
    Case(
        "PglimitsLeasesExpired",
        [of_limit("expired_leases_total", "7x25 8x15")],
        [[of_limit("expired_leases_total", "7x40")], [of_limit("expired_leases_total", "7x5 8x35")]],
    ),
    Case(
        "PglimitsLeasesForceReleased",
        [of_limit("force_released_leases_total", "0x25 1x15")],
        [[of_limit("force_released_leases_total", "1x40")]],
    ),
    Case(
        "PglimitsLeasesLost",
        [('pglimits_client_lost_leases_total{instance="b", job="c", limit="x"}', "0x25 1x15")],
        [[('pglimits_client_lost_leases_total{instance="b", job="c", limit="x"}', "3x40")]],
    ),
    Case(
        "PglimitsClientsCannotReachDatabase",
        [(requests("unavailable"), "0+1x40")],
        [[(requests("unavailable"), "5x40"), (requests("granted"), "0+1x40")]],
    ),
    Case(
        "PglimitsLimitShut",
        [of_limit("limit_slots", "0x40"), of_limit("waiters", "1x40")],
        [
            [TEN, of_limit("waiters", "1x40")],
            [of_limit("limit_slots", "0x40"), of_limit("waiters", "0x40"), (requests("refused"), "9x40")],
        ],
    ),
    Case(
        "PglimitsLimitShut",
        [of_limit("limit_slots", "0x40"), of_limit("waiters", "0x40"), (requests("refused"), "0+1x40")],
    ),
    Case(
        "PglimitsLimitOff",
        [of_limit("limit_active", "0x40"), (requests("unlimited"), "0+1x40")],
        [
            [of_limit("limit_active", "1x40"), (requests("granted"), "0+1x40")],
            [of_limit("limit_active", "0x40"), (requests("unlimited"), "9x40")],
            [of_limit("limit_active", "0x40"), (requests("unlimited", "another"), "0+1x40")],
        ],
    ),
    Case(
        "PglimitsLimitMissing",
        [UP, of_limit("limit_slots", "1x40"), (requests("unlimited", "misspelt"), "0+1x40")],
        [
            [UP, of_limit("limit_slots", "1x40"), (requests("unlimited"), "0+1x40")],
            [UP, (requests("granted", "misspelt"), "0+1x40"), (requests("unlimited", "misspelt"), "4x40")],
            [(f"pglimits_up{SERVER}", "0x40"), (requests("unlimited"), "0+1x40")],
        ],
    ),
    Case(
        "PglimitsNotSwept",
        [UP, (f"pglimits_last_sweep_timestamp_seconds{SERVER}", "-5000x40")],
        [
            [UP, (f"pglimits_last_sweep_timestamp_seconds{SERVER}", "0+60x40")],
            [(f"pglimits_up{SERVER}", "0x40")],
        ],
    ),
    Case("PglimitsNotSwept", [UP]),
]


def at(series: list[tuple[str, str]], **test: Any) -> dict[str, Any]:
    given = [{"series": name, "values": values} for name, values in series]
    return {"interval": "1m", "input_series": given, **test}


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert {case.alert for case in CASES if case.fires} == {case.alert for case in CASES if case.quiet} == set(NAMES)


@needs_promtool
def test_the_alert_rules_load() -> None:
    done = promtool("check", "rules", ALERTS)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"SUCCESS: {len(NAMES)} rules found" in done.stdout


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    tests = []
    for case in CASES:
        firing = f'count by (alertname) (ALERTS{{alertname="{case.alert}", alertstate="firing"}})'
        for series, fires in [(case.fires, True), *((quiet, False) for quiet in case.quiet)]:
            expected = [{"labels": f'{{alertname="{case.alert}"}}', "value": 1}] if fires else []
            tests.append(at(series, promql_expr_test=[{"expr": firing, "eval_time": "30m", "exp_samples": expected}]))
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_what_an_alert_says_can_be_written(case: Case, tmp_path: Path) -> None:
    nothing = {"eval_time": "30m", "alertname": case.alert, "exp_alerts": []}
    file = tmp_path / "test.yml"
    tests = [at(case.fires, alert_rule_test=[nothing])]
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}))
    done = promtool("test", "rules", file)  # it fails, and shows what the alert would say
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "summary" in said
    assert "error expanding" not in said
    assert "<no value>" not in said
