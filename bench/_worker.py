"""A process that makes calls: ``python -m pglimits_bench._worker '{"role": …}'``.

It says when it is ready, then answers commands, an object in JSON a line each way. It ends at once when stdin does:
then the benchmark has no more use for it, or is gone.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

from . import _drive, _waiting

Commands = Callable[[], dict[str, Any]]

_ROLES: dict[str, Callable[[dict[str, Any], Commands], None]] = {
    "calls": _drive.serve,
    "queue": _waiting.queue_up,
    "listen": _waiting.listen,
}


def _commands() -> Commands:
    """Read commands, until there will be no more. Unbuffered: nothing here may be in the way of the exit."""
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        rest = b""
        while said := os.read(0, 65536):
            *whole, rest = (rest + said).split(b"\n")
            for line in whole:
                waiting.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return waiting.get


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    _ROLES[given["role"]](given, _commands())
