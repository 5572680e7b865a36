"""Prefect's global concurrency limits: its server on PostgreSQL, through its own client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote, urlencode
from uuid import uuid4

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .._processes import ProcessFailed, program
from .._server import Server, Site
from ._peer import Opened, Peer, Quota

_PATIENCE = 120.0


@contextlib.contextmanager
def _open(server: Server, site: Site) -> Iterator[Sequence[Opened]]:
    database = f"prefect_{uuid4().hex[:12]}"
    with (
        psycopg.connect(server.dsn, autocommit=True) as connection,
        tempfile.TemporaryDirectory(prefix="pglimits-bench-") as home,
    ):
        connection.execute(f"create database {database}".encode())
        try:
            port = _free_port()
            environment = {
                "PREFECT_HOME": home,
                "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": _url(server.dsn, database),
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_LOGGING_LEVEL": "ERROR",
                "DO_NOT_TRACK": "1",
            }
            command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
            command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", "--no-access-log"]
            with program(command, environment) as process:
                _await(port, process)
                yield [Opened({"subject": "prefect", "flavour": "tasks"}, environment=environment)]
        finally:
            with contextlib.suppress(psycopg.Error):
                connection.execute(f"drop database {database} with (force)".encode())


def _url(dsn: str, database: str) -> str:
    """As SQLAlchemy wants it, for a server that is reached by a unix socket."""
    given = conninfo_to_dict(dsn)
    where = urlencode({"host": given["host"], "port": given.get("port", 5432)})
    return f"postgresql+asyncpg://{quote(str(given['user']))}@/{database}?{where}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/ready", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        if process.poll() is not None or time.monotonic() > until:
            raise ProcessFailed(
                "Prefect's server did not start (an older FastAPI may help: pip install 'fastapi<0.140')"
            )
        time.sleep(0.2)


PEER = Peer(
    name="prefect",
    what="Prefect's global concurrency limits, its server on PostgreSQL",
    packages={"prefect": "prefect", "uvicorn": "uvicorn", "asyncpg": "asyncpg"},
    install="pip install prefect",
    room=Quota(1_000_000),
    holds=True,
    open=_open,
    settle=1.0,
    extension="pg_trgm",
    database=True,
)


class subject:
    """A limit, called from tasks."""

    def __init__(self, task: dict[str, Any]) -> None:
        from prefect.concurrency import asyncio as concurrency

        self._prefect: Any = concurrency
        self._name: str = task["name"]
        self._rate: bool = task["rate"]
        self._once = task.get("timeout") == 0
        asyncio.run(self._create(task["slots"], task["slots"] / task["seconds"] if task["seconds"] else 0.0))

    async def _create(self, slots: int, per_second: float) -> None:
        from prefect import get_client
        from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

        wanted = GlobalConcurrencyLimitCreate(name=self._name, limit=slots, slot_decay_per_second=per_second)
        async with get_client() as client:
            await client.create_global_concurrency_limit(wanted)

    async def take(self) -> bool:
        once = {"max_retries": 0} if self._once else {}
        try:
            async with self._prefect.concurrency(self._name, strict=True, **once):
                pass
        except self._prefect.ConcurrencySlotAcquisitionError:
            return False
        return True

    async def acquire(self) -> Any:
        held = self._prefect.concurrency(self._name, strict=True)
        await held.__aenter__()
        return held

    async def release(self, held: Any) -> None:
        await held.__aexit__(None, None, None)

    async def turn(self) -> None:
        await self._prefect.rate_limit(self._name, strict=True)
