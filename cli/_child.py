"""A command that runs under a lease, and the signals that come meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import typer

from . import _errors

if TYPE_CHECKING:
    from pglimits import Lease

T = TypeVar("T")

PASSED_ON = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""The signals that the command gets from us."""

FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
"""The signals that a key sends to the whole foreground group: the command has its own already."""

PATIENCE = 1.0
"""Seconds after a first signal in which further ones are not yet meant to be harsher."""

KILL_AFTER = 10.0
"""Seconds between SIGTERM and SIGKILL for a command that has lost its lease."""

# Becomes the command. A child of its own and no preexec_fn, which is unsafe where there are threads: the kernel ends
# it (SIGTERM) when the thread that started it dies; and signals are as they were before we blocked them.
_LEASH = """
import os, signal, sys
parent, blocked, *command = sys.argv[1:]
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
    os.execvp(command[0], command)
except OSError as error:
    sys.stderr.write(f"Error: {command[0]}: {error.strerror}\\n")
    os._exit(127 if isinstance(error, FileNotFoundError) else 126)
"""


class Signals:
    """Signals to this process, taken by a thread of their own: they interrupt nothing, and they tell who sent them.

    Made before any other thread is, since each has to leave these signals to that one. Signals that were ignored when
    this process began (nohup) stay so.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._numbers = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
        self.inherited = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        self._kept: list[int] = []
        self._act: Callable[[int, bool], object] = self._keep

    def close(self) -> None:
        """Let signals have their usual effect again."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self.inherited)

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take signals from now on. What to do about them is decided in the loop, between two steps of a task."""
        if self._numbers:
            threading.Thread(target=self._take, args=(loop,), name="pglimits-signals", daemon=True).start()

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            number, by_key = _next_signal(self._numbers)
            try:
                loop.call_soon_threadsafe(self._deliver, number, by_key)
            except RuntimeError:  # the loop is closed: we are about to exit
                return

    def _deliver(self, number: int, by_key: bool) -> None:
        if self.first is None:
            self.first = number
        self._act(number, by_key)

    def _keep(self, number: int, by_key: bool) -> None:
        self._kept.append(number)

    def pass_on(self, send: Callable[[int], object]) -> None:
        """Hand signals on, but for those that a key has sent to everybody; first those that came meanwhile."""
        self._act = lambda number, by_key: None if by_key else send(number)
        for number in self._kept:
            send(number)
        self._kept.clear()

    async def interrupt(self, work: Awaitable[T]) -> T:
        """Wait for something that a signal ends: the first cancels it, a later one ends this process.

        Raises:
            typer.Exit: a signal ended it; 128 plus its number.
        """
        task = asyncio.ensure_future(work)
        stopped_by: int | None = None
        stopped_at = 0.0

        def stop(number: int, by_key: bool) -> None:
            nonlocal stopped_by, stopped_at
            if stopped_by is None:
                stopped_by, stopped_at = number, time.monotonic()
                task.cancel()
            elif time.monotonic() > stopped_at + PATIENCE:
                os._exit(_errors.SIGNAL + number)

        before, self._act = self._act, stop
        try:
            return await task
        except asyncio.CancelledError:
            if stopped_by is None:
                raise
            raise typer.Exit(_errors.SIGNAL + stopped_by) from None
        finally:
            self._act = before


def _next_signal(numbers: list[signal.Signals]) -> tuple[int, bool]:
    """Wait for a signal: its number, and whether a key on the terminal sent it, to the whole foreground group."""
    if sys.platform == "darwin":  # no sigwaitinfo: whoever is in the foreground gets it from the terminal
        number = int(signal.sigwait(numbers))
        return number, number in FROM_TERMINAL and _in_foreground()
    info = signal.sigwaitinfo(numbers)
    return info.si_signo, info.si_signo in FROM_TERMINAL and info.si_code > 0


def _in_foreground() -> bool:
    try:
        with open("/dev/tty") as terminal:  # noqa: PTH123
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


class Child:
    """The command, running."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, command: list[str], lease: Lease, signals: Signals) -> Child:
        """Start a command with our stdin, stdout, stderr and other files; signals go to it from now on."""
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
