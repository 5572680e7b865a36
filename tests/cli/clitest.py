"""What the tests of the CLI share."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
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


class Terminal:
    """A command on a terminal of its own, 80 columns wide."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a piece may end amid a character
        self.code: int | None = None
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(PROGRAM[0], [*PROGRAM, *arguments], {**environment, "TERM": "xterm-256color"})
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def read(self) -> bool:
        """Read what is there, or wait for some. False if there will be no more."""
        try:
            piece = os.read(self.fd, 4096)
        except OSError:  # Linux, when the last process on the terminal is gone
            return False
        self.shown += self._decoder.decode(piece)
        return bool(piece)

    def read_until(self, text: str) -> str:
        """Read until a text has been shown."""
        while text not in self.plain:
            assert self.read(), self.plain
        return self.plain

    def interrupt(self) -> None:
        """Press ctrl-C until the command ends: Python misses one that comes right before it begins to read.

        Not before it has had time to end: one that comes while Python itself is on its way out is not the command's.
        """
        with contextlib.suppress(OSError):  # Linux, when the last process on the terminal is gone
            while True:
                self.type("\x03")
                while select.select([self.fd], [], [], 10)[0]:
                    if not self.read():
                        return

    def wait(self) -> int:
        """Read to the end."""
        while self.read():
            pass
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    @property
    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown).replace("\r\n", "\n")

    def close(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)
