"""What the state machines share: how much they run, and an empty database to begin with."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings
from sqltest import Session

EXAMPLES = os.environ.get("PGLIMITS_MODEL_EXAMPLES")
SHRINK = EXAMPLES is None or "PGLIMITS_MODEL_SHRINK" in os.environ
"""Shrinking what was found takes minutes: to be done in a second run, with the seed of the first."""
PROFILE = settings(
    max_examples=int(EXAMPLES or 40),
    stateful_step_count=50,
    deadline=None,
    derandomize=EXAMPLES is None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink] if SHRINK else [Phase.generate],
)


def empty(s: Session) -> None:
    for table in ("configs", "known_keys", "states", "leases", "queue", "processes"):
        # Not truncate, after which every plan is made anew.
        s.run(f"delete from pglimits.{table}")
    s.run("update pglimits.meta set fence_floor = 0")
