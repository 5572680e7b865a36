"""Limits in a real project of Django, whose own tests run in the database that Django makes for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
from psycopg.conninfo import conninfo_to_dict

from pglimits import Limiter

PROJECT = Path(__file__).resolve().parent / "django_project"


def environment_of(dsn: str) -> dict[str, str]:
    to = conninfo_to_dict(dsn)
    kept = {name: value for name, value in os.environ.items() if name not in ("PGLIMITS_DSN", "DATABASE_URL")}
    environment = {f"PG{name}": str(to[name.lower()]) for name in ("HOST", "PORT", "USER")}
    environment |= {"PGDATABASE": str(to["dbname"]), "DJANGO_SETTINGS_MODULE": "site_of_test.settings"}
    return {**kept, **environment, "PYTHONPATH": str(PROJECT), "PGLIMITS_EMBEDDED": "never"}


def django(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "django", *arguments],
        env=environment_of(dsn), capture_output=True, text=True, check=False, timeout=200,
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


def test_a_client_that_goes_leaves_the_line_and_gives_back_its_slot(
    server_dsn: str, limiter: Limiter, asks: Any, wait_until: Callable[..., Any]
) -> None:
    limiter.create("reports", 1)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        command = ["uvicorn", "--factory", "django.core.asgi:get_asgi_application", "--fd", str(listening.fileno())]
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--lifespan", "off", "--log-level", "error"],
            env=environment_of(server_dsn), pass_fds=[listening.fileno()],
        )  # fmt: skip
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/endless"
        try:
            with httpx.stream("GET", url, timeout=30) as streaming:
                chunks = streaming.iter_raw()
                assert next(chunks) == b"x"
                assert len(limiter.holders()) == 1
                with asks(url):
                    wait_until(lambda: len(limiter.waiters()) == 1)
                wait_until(lambda: limiter.waiters() == [])
                assert len(limiter.holders()) == 1
            wait_until(lambda: limiter.holders() == [])
        finally:
            server.kill()
            server.wait()
