"""A Redis server for the libraries that need one."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .._processes import ProcessFailed, program
from .._server import Server, Site, on_disk
from ._peer import Opened, Peer, Quota

PROGRAM = "redis-server"
_PATIENCE = 10.0

_DURABLE = ["--appendonly", "yes", "--appendfsync", "always"]
"""What makes a call durable before it is answered, as every call of ours is."""


def on_redis(subject: str, package: str, algorithm: str) -> Peer:
    """A library that limits rates on Redis."""

    @contextlib.contextmanager
    def opened(server: Server, site: Site) -> Iterator[Sequence[Opened]]:
        with _redis() as path:
            yield [
                Opened({"subject": subject, "flavour": flavour, "socket": path}, variant=flavour)
                for flavour in ("threads", "tasks")
            ]

    return Peer(
        name=f"redis-{subject}",
        what=f"{package} ({algorithm}) on Redis",
        packages={subject: package, "redis": "redis"},
        program=PROGRAM,
        install=f"pip install '{package}[redis]', and apt install redis-server",
        room=Quota(100_000, 1),
        holds=False,
        open=opened,
    )


@contextlib.contextmanager
def _redis() -> Iterator[str]:
    """Run a server for the block, with its data on disk. Gives the path of its socket."""
    found = shutil.which(PROGRAM)
    assert found is not None
    with on_disk(), tempfile.TemporaryDirectory(prefix="pglimits-bench-") as folder:
        path = str(Path(folder) / "redis.sock")
        command = [found, "--port", "0", "--unixsocket", path, "--dir", folder, *_DURABLE]
        with program(command) as process:
            _await(path, process)
            yield path


def _await(path: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                return
        if process.poll() is not None or time.monotonic() > until:
            raise ProcessFailed(f"{PROGRAM} did not start")
        time.sleep(0.02)
