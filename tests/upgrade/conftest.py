"""Fixtures of the tests of upgrades: those of the SQL tests and of the Python wrapper, and versions to upgrade to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sql"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from editions import Edition
from installtest import other_dsn, psql
from wrappertest import _nothing_stays_open, children

from pglimits import _install
from pglimits.errors import PglimitsError

__all__ = ["_nothing_stays_open", "children", "edition", "install_by", "other_dsn", "psql"]


@pytest.fixture
def edition(tmp_path: Path) -> Callable[[str], Edition]:
    """edition(version): a copy of the SQL of this version, to be changed and installed under that number."""
    return lambda version: Edition(tmp_path / version, version)


@pytest.fixture
def install_by(psql: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Edition, str], str | None]:
    """install_by(means, edition, dsn): installs by "python" or "psql". Returns what went wrong, or None."""

    def install(means: str, edition: Edition, dsn: str) -> str | None:
        if means == "psql":
            done = psql(dsn, edition.folder / "install.sql")
            return None if done.returncode == 0 else str(done.stderr)
        monkeypatch.setattr(_install, "_folder", lambda: edition.folder)
        try:
            _install.install(dsn)
        except PglimitsError as error:
            return str(error)
        return None

    return install
