"""Signals that come while slots are waited for or held."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from . import _errors, _names, _rights

if TYPE_CHECKING:
    from pglimits import AsyncLimiter

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


def with_limiter(
    conninfo: str, names: Sequence[str], work: Callable[[AsyncLimiter, Signals], Coroutine[Any, Any, T]]
) -> T:
    """Do something with a limiter and the limits of those names.

    A signal ends a wait at once and leaves nothing behind, whenever it comes. The blocking Limiter would not do: a
    handler of Python's does not run while its thread sleeps in a lock, if the signal came in the moment before.
    """
    from pglimits import AsyncLimiter

    async def main() -> T:
        signals.listen(asyncio.get_running_loop())
        async with AsyncLimiter(conninfo) as limiter:
            return await work(limiter, signals)

    signals = Signals()
    try:
        with _rights.explained(conninfo, _rights.USER), _names.guessed(conninfo, names):
            return asyncio.run(main())
    finally:
        signals.close()


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

        Should the signal come in the very moment of success, that stands, and ``first`` tells.

        Raises:
            typer.Exit: a signal ended it; 128 plus its number.
        """
        if self._kept:
            asyncio.ensure_future(work).cancel()
            raise typer.Exit(_errors.SIGNAL + self._kept[0])
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
