"""Fixtures of the tests of the Python wrapper."""

from __future__ import annotations

from wrappertest import _nothing_stays_open, api, children, environment, limiter

__all__ = ["_nothing_stays_open", "api", "children", "environment", "limiter"]
