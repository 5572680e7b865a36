"""Histories: processes work at random while faults happen, and the history has to keep every promise.

PGLIMITS_FAULT_SECONDS says how long each of them runs (default 6 seconds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from histories import CALM, KINDS, ONE, RATE, ROUGH, SECONDS, SEVERAL, WIDTHS, Run, granted


@pytest.mark.parametrize("asks", [ONE, WIDTHS, SEVERAL, RATE], ids=["one", "widths", "several", "rate"])
def test_nothing_happens(run: Run, asks: Sequence[Mapping[str, Any]]) -> None:
    run.workers(asks)
    run.let(lambda: None)
    found = run.finish(CALM)
    assert granted(found) > SECONDS * 10
    assert not [said for said in found.said if said.what == "failed"]


@pytest.mark.parametrize("asks", [ONE, SEVERAL, RATE], ids=["one", "several", "rate"])
def test_processes_are_killed(run: Run, asks: Sequence[Mapping[str, Any]]) -> None:
    workers = run.workers(asks, each=2)

    def kill() -> None:
        process = run.random.choice(workers.running)
        kind = KINDS[run.random.randrange(3)]
        workers.kill(process)
        workers.start(kind)

    run.let(kill)
    run.finish(ROUGH)
