"""A durable server of a test's own, which can be stopped, crashed and started again, follow another, and take over."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psycopg
import pytest

from pglimits import _embedded
from pglimits._embedded_binaries import candidates, spawn, within_reach
from pglimits._embedded_files import PORT, Account, Place, hand_over, unlock
from pglimits._embedded_server import GENTLY, USER, end, launch, server_or_lock

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
        _embedded._start(self.place, self.binaries, self.settings, lock, 60.0, leashed=True, sync=True)
        return self.dsn

    @property
    def dsn(self) -> str:
        return f"host={self.place.sockets} port={PORT} user={USER} dbname=postgres"

    @property
    def pid(self) -> int:
        """Its first process. Raises FileNotFoundError where it does not run."""
        return int((self.place.data / "postmaster.pid").read_text().split()[0])

    def stop(self) -> None:
        """End it in good order: connections are cut, nothing is lost."""
        end(self.place, GENTLY)

    def crash(self) -> None:
        """End it at once, as ``pg_ctl stop -m immediate`` does: what was not flushed is gone."""
        end(self.place, CRASH)

    def kill(self) -> None:
        """Kill its first process (SIGKILL), and wait until the others have noticed."""
        os.kill(self.pid, signal.SIGKILL)
        end(self.place, CRASH)

    def restart(self, how: str = "stop") -> None:
        """Have it gone for a moment: ``stop``, ``crash`` or ``kill``."""
        gone = time.time()
        getattr(self, how)()
        self.start()
        self.away.append((gone, time.time()))

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def follow(self, primary: Cluster) -> None:
        """Become a standby of a running server: take a copy of it, start, and wait until that is up to date."""
        data, account = self.place.data, _embedded.unprivileged_account()
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        hand_over(data, account)
        to = f"{primary.dsn} application_name={self.name}"
        program = self._within_reach(_pg_basebackup(self.binaries), account).bin / "pg_basebackup"
        process = spawn([program, "-d", to, "-D", data, "-c", "fast", "-N"], account, output=subprocess.PIPE)
        said = process.communicate()[0].decode()
        assert process.returncode == 0, said
        (data / "standby.signal").touch()
        with (data / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"primary_conninfo = '{to}'\n")
        # Not as start does, which takes no standby for ready.
        lock = server_or_lock(self.place, timeout=10)
        assert isinstance(lock, int), "it runs"
        try:
            chosen = self._within_reach(self.binaries, account)
            launch(self.place, chosen, account, self.settings, lock, leashed=True)
        finally:
            unlock(lock)
        self.catch_up(primary)

    def _within_reach(self, binaries: _embedded.Binaries, account: Account | None) -> _embedded.Binaries:
        return within_reach(binaries, account, self.place.root / "binaries") if account else binaries

    @property
    def name(self) -> str:
        """What it is called in synchronous_standby_names."""
        return self.place.root.name.replace("-", "_")

    def catch_up(self, primary: Cluster) -> None:
        """Wait until it has all that the primary has now."""
        ((written,),) = primary.sql("select pg_current_wal_lsn()::text")
        _until(
            lambda: primary.sql(
                "select 1 from pg_stat_replication"
                " where application_name = %s and state = 'streaming' and replay_lsn >= %s::pg_lsn",
                self.name,
                written,
            ),
            "for the standby to catch up",
        )

    def cut_off(self) -> None:
        """Have a standby receive no more of what its primary does."""
        self.sql("alter system set primary_conninfo = ''")
        self.sql("select pg_reload_conf()")
        _until(lambda: not self.sql("select 1 from pg_stat_wal_receiver"), "for the standby to leave its primary")

    def promote(self) -> None:
        """Make a standby a primary."""
        assert self.sql("select pg_promote(wait_seconds => 120)") == [(True,)]


def _until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain {what}"
        time.sleep(0.02)


def _pg_basebackup(binaries: _embedded.Binaries) -> _embedded.Binaries:
    """Where it is: not every folder with a server has it. A later one can copy an earlier server."""
    for found in (binaries, *candidates()):
        if found.version >= binaries.version and (found.bin / "pg_basebackup").exists():
            return found
    pytest.skip("needs pg_basebackup")


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
