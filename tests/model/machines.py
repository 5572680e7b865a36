"""What the state machines share: how much they run, and an empty database to begin with."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from sqltest import Session

EXAMPLES = os.environ.get("PGLIMITS_MODEL_EXAMPLES")
PROFILE = settings(
    max_examples=int(EXAMPLES or 40),
    stateful_step_count=50,
    deadline=None,
    derandomize=EXAMPLES is None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


def empty(s: Session) -> None:
    for table in ("configs", "former_names", "keys", "states", "leases", "queue"):
        # Not truncate, after which every plan is made anew.
        s.run(f"delete from pglimits.{table}")
    s.run("update pglimits.meta set fence_floor = 0")
