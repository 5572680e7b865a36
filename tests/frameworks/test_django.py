"""Limits in a real project of Django, whose own tests run in the database that Django makes for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

PROJECT = Path(__file__).resolve().parent / "django_project"


def django(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    to = conninfo_to_dict(dsn)
    kept = {name: value for name, value in os.environ.items() if name not in ("PGLIMITS_DSN", "DATABASE_URL")}
    environment = {f"PG{name}": str(to[name.lower()]) for name in ("HOST", "PORT", "USER")}
    environment |= {"PGDATABASE": str(to["dbname"]), "DJANGO_SETTINGS_MODULE": "site_of_test.settings"}
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "django", *arguments],
        env={**kept, **environment, "PYTHONPATH": str(PROJECT), "PGLIMITS_EMBEDDED": "never"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_tests_of_a_project_pass_and_its_database_is_dropped(server_dsn: str) -> None:
    done = django(server_dsn, "test", "site_of_test", "--noinput")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK" in done.stderr
    with psycopg.connect(server_dsn) as connection:
        assert connection.execute("select from pg_database where datname = 'test_' || current_database()").rowcount == 0


def test_a_project_migrates_and_back(bare_dsn: str, server_dsn: str) -> None:
    to = conninfo_to_dict(server_dsn)
    dsn = f"host={to['host']} port={to['port']} user={to['user']} dbname={conninfo_to_dict(bare_dsn)['dbname']}"
    for target, there in (([], True), (["pglimits", "zero"], False)):
        done = django(dsn, "migrate", "--database", "limits", *target)
        assert done.returncode == 0, done.stdout + done.stderr
        with psycopg.connect(dsn) as connection:
            found = connection.execute("select to_regprocedure('pglimits.version()') is not null").fetchone()
            assert found == (there,)
