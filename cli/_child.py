"""A command that runs under a lease."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from . import _errors

if TYPE_CHECKING:
    from pglimits import Lease

    from ._signals import Signals

KILL_AFTER = 10.0
"""Seconds between SIGTERM and SIGKILL for a command that has lost its lease."""

# Becomes the command. A child of its own and no preexec_fn, which is unsafe where there are threads: the kernel ends
# it (SIGTERM) when the thread that started it dies; and signals are as they were before we blocked them. A file of no
# format that the kernel knows is a script without #!. It goes to sh, as execvp of the C library has it.
_LEASH = """
import errno, os, signal, sys
parent, blocked, path, *command = sys.argv[1:]
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(15), 0, 0, 0)  # PR_SET_PDEATHSIG, SIGTERM
except (ImportError, OSError, AttributeError):
    pass  # not Linux
if os.getppid() != int(parent):
    os._exit(1)
for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
    if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)  # Python has changed these
signal.pthread_sigmask(signal.SIG_SETMASK, [int(number) for number in blocked.split()])
try:
    try:
        os.execv(path, command)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        os.execv("/bin/sh", ["/bin/sh", path, *command[1:]])
except OSError as error:
    sys.stderr.write(f"Error: {command[0]}: {error.strerror}\\n")
    os._exit(127 if isinstance(error, FileNotFoundError) else 126)
"""


class Child:
    """The command, running."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, path: str, command: list[str], lease: Lease, signals: Signals) -> Child:
        """Start a command with our stdin, stdout, stderr and other files; signals go to it from now on.

        path: of the program that ``command`` names.
        """
        blocked = " ".join(str(int(number)) for number in signals.inherited)
        fences = [str(fence) for fence in lease.fences if fence is not None]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            "-c",
            _LEASH,
            str(os.getpid()),
            blocked,
            path,
            *command,
            env={**os.environ, "PGLIMITS_LEASE_ID": str(lease.id), "PGLIMITS_FENCE": ",".join(fences)},
            close_fds=False,
        )
        child = cls(process)
        signals.pass_on(child.send)
        return child

    def send(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def wait(self) -> int:
        """Wait for its end: its exit code, or 128 plus the signal that killed it."""
        code = await self._process.wait()
        return code if code >= 0 else _errors.SIGNAL - code

    async def terminate(self) -> None:
        """End it: by SIGTERM, and if it does not heed that, by SIGKILL."""
        self.send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), KILL_AFTER)
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self._process.wait()
