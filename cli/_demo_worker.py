"""A worker of the demo: a process of its own, which uses the limiter as any program would and tells what it does.

It takes commands from stdin (connect DSN, go, long, stop) and writes its log to stdout, a JSON object a line. Each has
the machine's monotonic clock, which all its processes share. It ends at once when stdin does: then the demo is gone.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pglimits import Limiter
from pglimits.sync import concurrency, rate_limit

LEASE_SECONDS = 3.0
LONG_JOB_SECONDS = 8.0

_connect = threading.Event()
_go = threading.Event()
_stop = threading.Event()
_long = threading.Event()


def _obey() -> None:
    """Take commands, until the demo has no more. Unbuffered: nothing here may be in the way of the exit."""
    commands = {"go": _go, "stop": _stop, "long": _long}
    rest = b""
    while said := os.read(0, 4096):
        *lines, rest = (rest + said).split(b"\n")
        for command, _, what in (line.decode().partition(" ") for line in lines):
            if command == "connect":
                os.environ["PGLIMITS_DSN"] = what
                _connect.set()
            else:
                commands[command].set()
    os._exit(1)


def _tell(what: str, **facts: Any) -> None:
    """A line of the log, in one write: whoever is killed has written all of it or nothing."""
    os.write(1, json.dumps({"at": time.monotonic(), "what": what, **facts}).encode() + b"\n")


def _jobs(chance: random.Random) -> None:
    while not _stop.is_set():
        _tell("ask")
        with concurrency("database", lease_duration=LEASE_SECONDS, strict=True) as lease:
            assert lease.expires_at is not None  # strict: it is enforced
            granted = lease.expires_at.timestamp() - LEASE_SECONDS
            _tell("run", lease=str(lease.id), fence=lease.fence, granted=granted)
            long = _long.is_set()
            if long:
                _long.clear()
                _tell("long")
            try:
                _stop.wait(LONG_JOB_SECONDS if long else chance.uniform(0.5, 1.1))
            finally:
                _tell("release")
        _stop.wait(chance.uniform(0.05, 0.3))


def _calls() -> None:
    while not _stop.is_set():
        _tell("want")
        rate_limit("api", strict=True)
        _tell("call")


def main() -> None:
    threading.Thread(target=_obey, daemon=True).start()
    _connect.wait()  # it is started before there is a server, to be ready when there is one
    Limiter().get("database")  # to be connected before the start, so that all start at once
    _tell("ready")
    _go.wait()
    with ThreadPoolExecutor(2) as threads:
        for work in (threads.submit(_jobs, random.Random(sys.argv[1])), threads.submit(_calls)):
            work.result()


if __name__ == "__main__":
    main()
