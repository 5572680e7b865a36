"""What the tests of the routes for Prefect's clients share."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from servertest import Server

HERE = Path(__file__).resolve().parent
PREFECT = os.environ.get("PGLIMITS_TEST_PREFECT", "")
LIMITS = "/api/v2/concurrency_limits"


@pytest.fixture
def looks(shared_dsn: str, server: Any) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the database of the shared server."""
    name = str(conninfo_to_dict(shared_dsn)["dbname"])
    with psycopg.connect(server.dsn(name), autocommit=True) as connection:
        yield connection


@pytest.fixture
def client(shared: Server) -> Iterator[httpx.Client]:
    """A client that keeps cookies, for Prefect's routes of limits."""
    with shared.client(base_url=shared.url + LIMITS) as opened:
        yield opened


@dataclass
class Process:
    """A process of Prefect's."""

    id: int
    pid: int
    out_file: Path
    err_file: Path
    _ended: dict[int, int]

    @property
    def code(self) -> int | None:
        return self._ended.get(self.id)

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def said(self) -> list[Any]:
        """What it said, line by line, as JSON."""
        return [json.loads(line) for line in self.out.splitlines()]

    def wait(self, timeout: float = 120) -> Process:
        """Until it has ended well."""
        deadline = time.monotonic() + timeout
        while self.code is None:
            assert time.monotonic() < deadline, f"it does not end: {self.out}\n{self.err_file.read_text()}"
            time.sleep(0.005)
        assert self.code != 70, self.err_file.read_text()
        return self

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Prefect:
    """Starts processes of an unmodified Prefect, whose API is at a URL."""

    def __init__(self, folder: Path, url: str, **environment: str) -> None:
        self._folder = folder
        self._ids = itertools.count(1)
        self._pids: dict[int, int] = {}
        self._ended: dict[int, int] = {}
        always = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": url,
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "DO_NOT_TRACK": "1",
            "COLUMNS": "300",
        }
        self._process = subprocess.Popen(
            [PREFECT, str(HERE / "prefect_clients.py")],
            env={**always, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == '"ready"':
                break
        else:
            raise AssertionError("Prefect did not start")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "pid" in told:
                self._pids[told["id"]] = told["pid"]
            else:
                self._ended[told["id"]] = told["code"]

    def start(self, call: str, *arguments: Any) -> Process:
        """Call a function of prefect_clients.py in a process of its own."""
        number = next(self._ids)
        out, err = self._folder / f"{number}.out", self._folder / f"{number}.err"
        out.touch()
        command = {"id": number, "call": [call, *arguments], "out": str(out), "err": str(err)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        while number not in self._pids:
            assert self._process.poll() is None
            time.sleep(0.002)
        return Process(number, self._pids[number], out, err, self._ended)

    def run(self, call: str, *arguments: Any) -> Process:
        """The same, until it has ended."""
        return self.start(call, *arguments).wait()

    def close(self) -> None:
        for number, pid in self._pids.items():
            if number not in self._ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="session")
def _prefect(tmp_path_factory: pytest.TempPathFactory, _shared: Server) -> Iterator[Prefect]:
    if not PREFECT:
        pytest.skip("PGLIMITS_TEST_PREFECT does not name the Python of an environment with Prefect")
    opened = Prefect(tmp_path_factory.mktemp("prefect"), f"{_shared.url}/api")
    yield opened
    opened.close()


@pytest.fixture
def prefect(_prefect: Prefect, shared: Server) -> Prefect:
    """An unmodified Prefect, which calls the shared server."""
    return _prefect


@pytest.fixture
def gcl(prefect: Prefect) -> Callable[..., str]:
    """gcl("ls"): what ``prefect gcl ls`` prints. ``code`` is what it has to end with."""

    def call(*arguments: str, code: int = 0) -> str:
        ended = prefect.run("cli", "gcl", *arguments)
        assert ended.code == code, (ended.out, ended.err_file.read_text())
        return ended.out

    return call


@dataclass(frozen=True)
class Note:
    """A line of a diary."""

    what: str
    who: str
    at: float


def notes(diary: Path) -> list[Note]:
    """What processes have written down, in the order in which they did."""
    if not diary.exists():
        return []
    lines = (line.split() for line in diary.read_text().splitlines())
    return [Note(what, who, float(at)) for what, who, at in lines]


def most_at_once(diary: Path) -> int:
    """How many were at work at the same time, by what they wrote down."""
    at_once = most = 0
    for step in sorted(notes(diary), key=lambda note: (note.at, note.what == "begins")):
        at_once += {"begins": 1, "ends": -1}.get(step.what, 0)
        most = max(most, at_once)
    return most
