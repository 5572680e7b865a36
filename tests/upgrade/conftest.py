"""Fixtures of the tests of upgrades: those of the SQL tests and of the Python wrapper, and versions to upgrade to."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sql"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from editions import Edition
from extensiontest import MIGRATION, NEXT, ROOT, Cli
from installtest import other_dsn, psql
from wrappertest import _nothing_stays_open, children

from pglimits import _embedded, _install
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


@pytest.fixture(scope="module")
def next_edition() -> Iterator[Edition]:
    with tempfile.TemporaryDirectory() as folder:
        made = Edition(Path(folder) / NEXT, NEXT).migrate(MIGRATION)
        made.edit("functions/010_basics.sql", "_ids_fault(lease_ids uuid[])", "_ids_fault(ids uuid[])")
        for use in ("when {} is null", "array_ndims({})", "array_position({}, null)"):
            made.edit("functions/010_basics.sql", use.format("lease_ids"), use.format("ids"))
        yield made


def version_of(pg_dump: Path) -> int:
    said = subprocess.run([pg_dump, "--version"], capture_output=True, text=True, check=False).stdout
    number = re.search(r"\) (\d+)", said)
    return int(number[1]) if number else 0


@pytest.fixture(scope="module")
def shell(server: Any) -> Callable[..., str]:
    """shell(script, folder, NEW=dsn): has a shell run commands of the document, with pg_dump in reach."""
    found = [*server.bin.glob("pg_dump"), *Path("/usr/lib/postgresql").glob("*/bin/pg_dump")]
    with contextlib.suppress(PglimitsError):
        found += _embedded.find_binaries().bin.glob("pg_dump")
    # That of another version puts settings into a dump that an older server does not know.
    near = sorted(
        (version, path) for path in found if server.version <= (version := version_of(path)) <= server.version + 1
    )
    if not near:
        pytest.skip(f"needs pg_dump of PostgreSQL {server.version}")
    path = f"{near[0][1].parent}:{Path(sys.executable).parent}"

    def run(script: str, folder: Path | None = None, **to: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", script], env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}", **to},
            cwd=folder or ROOT, capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def cli() -> Cli:
    from pglimits_cli._app import app

    def call(*arguments: str) -> Any:
        result = CliRunner().invoke(app, list(arguments), prog_name="pglimits")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def database(here: str) -> Iterator[Callable[[str], str]]:
    """database("one"): the DSN of a new database that belongs to the role owner."""
    made: list[str] = []

    def create(name: str) -> str:
        with psycopg.connect(here, autocommit=True) as connection:
            connection.execute(f"create database {name} owner owner".encode())
        made.append(name)
        return make_conninfo(here, dbname=name, user="owner")

    yield create
    with psycopg.connect(here, autocommit=True) as connection:
        for name in made:
            connection.execute(f"drop database {name} with (force)".encode())
