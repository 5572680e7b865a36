"""Fixtures of the tests of bad days: those of the Python wrapper, and the run of a history."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from histories import run
from wrappertest import _nothing_stays_open, api, children, environment, limiter

__all__ = ["_nothing_stays_open", "api", "children", "environment", "limiter", "run"]
