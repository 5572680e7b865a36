"""What the tests of metrics share: which metrics there are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parent.parent.parent
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool (Debian's package prometheus)")

OF_A_LIMIT = {
    "pglimits_limit_slots", "pglimits_limit_active", "pglimits_decay_slots_per_second", "pglimits_held_slots",
    "pglimits_level_slots", "pglimits_leases", "pglimits_keys", "pglimits_waiters",
    "pglimits_oldest_waiter_age_seconds", "pglimits_grants_total", "pglimits_granted_slots_total",
    "pglimits_releases_total", "pglimits_expired_leases_total", "pglimits_force_released_leases_total",
    "pglimits_held_slot_seconds_total", "pglimits_waited_seconds_total",
}  # fmt: skip
REFUSALS = "pglimits_server_refusals_total"
OF_THE_SERVER = OF_A_LIMIT | {"pglimits_info", "pglimits_last_sweep_timestamp_seconds", "pglimits_up"}
_TIMES = [f"pglimits_client_{what}" for what in ("wait_seconds", "hold_seconds", "batch_requests")]
OF_A_CLIENT = {
    "pglimits_client_requests_total",
    "pglimits_client_lost_leases_total",
    "pglimits_client_reconnects_total",
    *(f"{name}_{part}" for name in _TIMES for part in ("bucket", "sum", "count")),
}


class Scraped:
    """What a scrape has found."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]
        self.names = {sample.name for sample in self.samples}

    def value(self, name: str, **labels: str) -> float:
        (found,) = [
            sample.value
            for sample in self.samples
            if sample.name == f"pglimits_{name}" and labels.items() <= sample.labels.items()
        ]
        return float(found)

    def of(self, limit: str) -> dict[str, float]:
        return {
            sample.name.removeprefix("pglimits_"): sample.value
            for sample in self.samples
            if sample.labels.get("limit") == limit
        }


def metrics_in(expression: str) -> set[str]:
    """The metrics of ours that an expression asks for."""
    return set(re.findall(r"\bpglimits_\w+", re.sub(r'"[^"]*"', "", expression)))
