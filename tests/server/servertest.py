"""What the tests of the server share."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

PROGRAM = [sys.executable, "-m", "pglimits_cli", "serve", "--port", "0"]
FULL, READ = "full-secret-0123456789", "read-secret-0123456789"
TOKENS = {"PGLIMITS_TOKENS": f"ops:{FULL}", "PGLIMITS_READ_TOKENS": f"eyes:{READ}"}


class Server:
    """A process of ``pglimits serve``. ``url``: without a slash at its end."""

    def __init__(
        self, dsn: str | None, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PGLIMITS_DSN", "DATABASE_URL", "PGLIMITS_TOKENS", "PGLIMITS_READ_TOKENS")
        }
        if dsn is not None:
            kept["PGLIMITS_DSN"] = dsn
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            env={**kept, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = ""
        self.url = ""

    def wait(self) -> None:
        """Wait until it has said where it listens."""
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.said)
        if found is None:
            raise AssertionError(f"it did not start: {self.said}{self.process.communicate(timeout=20)}")
        self.url = found[0].rstrip("/")

    @property
    def port(self) -> int:
        return int(re.findall(r":(\d+)", self.url)[0])

    def client(self, token: str | None = None, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(**{"base_url": self.url, "headers": headers, "timeout": 30, **options})

    def terminate(self) -> tuple[int, str]:
        """SIGTERM, and wait, half as long as tests have requests held. Its exit code and what it said on stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err

    def kill(self) -> str:
        """SIGKILL. What it had said on stderr."""
        if self.process.poll() is None:
            self.process.kill()
        if self.process.stderr is None or self.process.stderr.closed:
            return ""
        _, err = self.process.communicate()
        return err


def messages(response: httpx.Response) -> Iterator[tuple[str, str | None, Any]]:
    """The events of a stream: kind, id, data."""
    kind, event_id, data = "message", None, []
    for line in response.iter_lines():
        if not line:
            if data:
                yield kind, event_id, json.loads("\n".join(data))
            kind, event_id, data = "message", None, []
        elif line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("id:"):
            event_id = line[3:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].strip())


def until(condition: Any, what: str, seconds: float = 40.0) -> Any:
    """Wait until it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain {what}"
        time.sleep(0.01)
    return found
