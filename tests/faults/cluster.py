"""A durable server of a test's own, which can be stopped, crashed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping

from pglimits import _embedded
from pglimits._embedded_files import Place, unlock
from pglimits._embedded_server import GENTLY, end, server_or_lock

CRASH = ((signal.SIGQUIT, 20.0), (signal.SIGKILL, 10.0))


class Cluster:
    """A server that keeps its data, and its place (``dsn``), from one start to the next.

    ``away`` are the times (seconds since 1970) between which it was not there.
    """

    def __init__(self, binaries: _embedded.Binaries, place: Place, settings: Mapping[str, str]) -> None:
        self.binaries, self.place, self.settings = binaries, place, dict(settings)
        self.away: list[tuple[float, float]] = []

    def start(self) -> str:
        """Start it, and wait until it is ready. Returns its DSN."""
        lock = server_or_lock(self.place, timeout=10)
        assert isinstance(lock, int), "it runs"
        self.running = _embedded._start(self.place, self.binaries, self.settings, lock, 60.0, leashed=True, sync=True)
        return self.dsn

    @property
    def dsn(self) -> str:
        return self.running.dsn

    def stop(self) -> None:
        """End it in good order: connections are cut, nothing is lost."""
        end(self.place, GENTLY)

    def crash(self) -> None:
        """End it at once, as ``pg_ctl stop -m immediate`` does: what was not flushed is gone."""
        end(self.place, CRASH)

    def kill(self) -> None:
        """Kill its first process (SIGKILL), and wait until the others have noticed."""
        os.kill(self.running.pid, signal.SIGKILL)
        end(self.place, CRASH)

    def restart(self, how: str = "stop") -> None:
        """Have it gone for a moment: ``stop``, ``crash`` or ``kill``."""
        gone = time.time()
        getattr(self, how)()
        self.start()
        self.away.append((gone, time.time()))


@contextlib.contextmanager
def cluster(binaries: _embedded.Binaries, settings: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A folder for a server, which is not started yet. All of it is gone at the end."""
    account = _embedded.unprivileged_account()
    root, owner_lock = _embedded._claim(_embedded._temporary_folder(account), account)
    place = Place(root)
    try:
        yield Cluster(binaries, place, settings or {})
    finally:
        _embedded._discard(place)
        unlock(owner_lock)
