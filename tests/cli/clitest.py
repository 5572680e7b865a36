"""What the tests of the CLI share."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m", "pglimits_cli"]

# A command that writes down every signal that reaches it, and ends with 42 on all but SIGUSR1 and SIGINT.
RECORDER = """
import os, signal, sys, time
def note(number, _):
    with open(sys.argv[1], "a") as file:
        print(signal.Signals(number).name, file=file)
    if number not in (signal.SIGUSR1, signal.SIGINT) or "once" in sys.argv:
        os._exit(42)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
with open(sys.argv[1], "a") as file:
    print("ready", os.getpid(), file=file)
while True:
    time.sleep(0.05)
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def recorder(diary: Path, *words: str) -> list[str]:
    return [sys.executable, "-c", RECORDER, str(diary), *words]


def lines(diary: Path) -> list[str]:
    return diary.read_text().splitlines()
