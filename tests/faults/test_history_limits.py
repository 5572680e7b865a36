"""Histories: limits of the server, and of what a process may do, strike anywhere, and every promise has to be kept.

PGLIMITS_FAULT_SECONDS says how long each of them runs (default 6 seconds).
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from cluster import Cluster, cluster
from histories import CALM, ONE, RATE, ROUGH, SECONDS, SEVERAL, WIDTHS, Run, Workers, granted, started
from history_checker import longest_unheard
from psycopg.conninfo import make_conninfo

from pglimits import EmbeddedUnavailable, _embedded
from pglimits._embedded_files import unlock
from pglimits._embedded_server import server_or_lock

MANY: Sequence[Mapping[str, Any]] = (*SEVERAL, *RATE)


def on_one_and_on_many(run: Run, kinds: Sequence[str] = ("sync", "async", "sql"), **plan: Any) -> Workers:
    """Workers of each kind, one that asks for one limit and another that asks for several."""
    workers = run.workers(ONE, kinds=(), **plan)
    for kind in kinds:
        workers.start(kind)
        workers.start(kind, asks=MANY)
    workers.ready()
    return workers


def test_statements_and_waits_for_locks_are_cut_short_inside_of_our_functions(run: Run) -> None:
    on_one_and_on_many(run, dsn=make_conninfo(run.dsn, options="-c statement_timeout=30"))
    run.workers((*ONE, *MANY), dsn=make_conninfo(run.dsn, options="-c statement_timeout=30 -c lock_timeout=5"))

    def keep_locked() -> None:
        with psycopg.connect(run.dsn) as connection:
            connection.execute("select from pglimits.states for update")
            connection.execute("select pg_sleep(0.2)")
            connection.rollback()

    run.let(keep_locked)
    found = run.finish(ROUGH)
    assert any("statement timeout" in said.more["message"] for said in found.said if said.what == "failed")


class Locks:
    """Keeps limits, and leases, locked in transactions of its own, several at a time, for up to 12 seconds each."""

    AT_ONCE = 2

    def __init__(self, run: Run) -> None:
        self.run = run
        self.leases: set[str] = set()
        self._threads: list[threading.Thread] = []

    def keep_one(self) -> None:
        """Keep one more locked, unless there are enough."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) < self.AT_ONCE:
            keep = self.run.random.choice([self._keep_limit, self._keep_lease])
            seconds = self.run.random.uniform(0.2, 12)
            self._threads.append(threading.Thread(target=keep, args=(seconds,), daemon=True))
            self._threads[-1].start()

    def end(self) -> None:
        for thread in self._threads:
            thread.join()

    def _keep_limit(self, seconds: float) -> None:
        name = self.run.random.choice(["database", "licence", "gpu", "api"])
        with self._noted([name]), psycopg.connect(self.run.dsn) as connection:
            connection.execute(
                "select from pglimits.states where limit_id = (select limit_id from pglimits.configs where name = %s)"
                " for update",
                [name],
            )
            time.sleep(seconds)
            connection.rollback()

    def _keep_lease(self, seconds: float) -> None:
        holders = self.run.sql("select lease_id::text, array_agg(name) from pglimits.holders group by 1")
        if not holders:
            return
        lease_id, names = self.run.random.choice(holders)
        self.leases.add(lease_id)
        with self._noted(names), psycopg.connect(self.run.dsn) as connection:
            connection.execute("select from pglimits.leases where lease_id = %s for update", [lease_id])
            time.sleep(seconds)
            connection.rollback()

    @contextlib.contextmanager
    def _noted(self, names: Sequence[str]) -> Iterator[None]:
        since = time.time()
        try:
            yield
        finally:
            for name in names:
                self.run.locked[name].append((since, time.time()))


EACH_BY_ITSELF: Sequence[Mapping[str, Any]] = (
    *WIDTHS,
    {"slots": {"licence": 1}, "keys": ["", "a"]},
    {"slots": {"gpu": 1}, "keys": ["", "a", "b"]},
    *RATE,
)


@pytest.mark.parametrize("asks", [EACH_BY_ITSELF, (*WIDTHS, *MANY)], ids=["by-itself", "together"])
def test_limits_and_leases_are_kept_locked_in_long_transactions(run: Run, asks: Sequence[Mapping[str, Any]]) -> None:
    """Nobody fails, no lease is lost but one that was locked itself, and everything else goes on."""
    # All kinds of requests in each process.
    run.workers(asks, each=2, kinds=("sync", "async"), hold=2.5, lease=4.0, at_once=8)
    # It has no patience of its own.
    run.workers(ONE, kinds=("sql",), dsn=make_conninfo(run.dsn, options="-c lock_timeout=300"))
    locks = Locks(run)
    run.let(locks.keep_one)
    locks.end()
    found = run.finish(CALM)
    assert granted(found) > SECONDS
    assert not [said for said in found.said if said.what == "failed"]
    lost = {said.attempt for said in found.said if said.more.get("lost") and not said.worker.startswith("sql")}
    assert lost <= locks.leases
    if asks is EACH_BY_ITSELF:  # else who asks for several limits keeps some of them locked while it waits for another
        seconds, which = longest_unheard(found, run.tolerance())
        assert seconds <= CALM.wake_up, which


def test_sessions_that_idle_in_a_transaction_are_ended(run: Run) -> None:
    """What they had taken is not taken, and whoever met their locks goes on."""
    impatient = make_conninfo(run.dsn, options="-c idle_in_transaction_session_timeout=50")
    # The statement and its commit are two on the connections of a pool.
    on_one_and_on_many(run, ("sync", "async"), pool=1, dsn=impatient)
    run.workers((*ONE, *MANY), kinds=("sql",))
    ended = 0

    def idle() -> None:
        nonlocal ended
        # It may be ended already before the first statement of its transaction.
        with (
            contextlib.suppress(psycopg.OperationalError, psycopg.InternalError),
            psycopg.connect(impatient) as connection,
        ):
            connection.execute("select pglimits.acquire_all(array['database', 'gpu'], lease_duration => 3600)")
            pid = connection.info.backend_pid
            run.wait_until(lambda: run.sql("select from pg_stat_activity where pid = %s", pid) == [], timeout=60)
            ended += 1

    run.let(idle)
    run.finish(ROUGH)
    assert ended


def test_the_clients_clocks_jump_by_hours(run: Run) -> None:
    workers = on_one_and_on_many(run, ("sync", "async"), script="history_worker_of_another_time.py")
    run.let(lambda: None)
    found = run.finish(CALM)
    assert granted(found) > SECONDS
    assert len({said.worker for said in found.said if said.what in ("granted", "went")}) == len(workers.logs)


def test_processes_fork_in_the_middle(run: Run) -> None:
    on_one_and_on_many(run, ("sync", "async"), script="history_worker_that_forks.py")
    run.let(lambda: None)
    found = run.finish(ROUGH)
    assert granted(found) > SECONDS


def test_processes_exit_with_leases_held(run: Run) -> None:
    """At once, and not at the end of their leases, what they held goes to those who wait."""
    run.workers(ONE, timeouts=[None])
    exiting = run.workers(
        [{"slots": {"database": 1}}, {"slots": {"database": 2, "licence": 1}}],
        kinds=(), script="history_worker_that_exits.py", timeouts=[None, 5],
    )  # fmt: skip

    def exit() -> None:
        process = exiting.start(run.random.choice(["sync", "async"]))
        exiting.ready()
        log = exiting.logs[-1]
        run.wait_until(lambda: b'"granted"' in log.read_bytes(), timeout=60)
        process.communicate("", timeout=60)
        assert process.returncode in (0, 1, 3), exiting.errors()
        exiting.running.remove(process)
        # Nothing of it is left, though its leases were good for minutes.
        ((left,),) = run.sql("select count(*) from pglimits.holders where (holder ->> 'pid')::int = %s", process.pid)
        assert left == 0

    run.let(exit)
    run.finish(ROUGH)
    assert run.happened


# No room left on the disk.


def go_on(run: Run, gone: float) -> None:
    """There is room again: have the server answer again, which may have ended itself meanwhile."""

    def answers() -> bool:
        if isinstance(lock := server_or_lock(run.server.place, timeout=30), int):
            unlock(lock)
            run.server.start()
        try:
            run.sql("select pglimits.version()")
        except psycopg.OperationalError:
            return False
        return True

    run.wait_until(answers, timeout=60, what="for the server to recover")
    run.server.away.append((gone, time.time()))


def refused_for_want_of_room(run: Run) -> bool:
    return any(word in run.server.place.log.read_text(errors="replace") for word in ("No space left", "File too large"))


@pytest.fixture
def small_disk(
    request: pytest.FixtureRequest, server: Any, tmp_path: Path, wait_until: Callable[..., Any]
) -> Iterator[Run]:
    """A run whose server has a small disk of its own."""
    chosen = _embedded.Binaries(server.bin, server.version)
    settings = {"max_connections": "100", "min_wal_size": "32MB", "max_wal_size": "48MB"}
    with cluster(chosen, settings) as own:
        root = own.place.root
        mode = root.stat().st_mode & 0o777
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size=256m,mode={mode:o}", "tmpfs", root], capture_output=True, text=True
        )
        if mounted.returncode != 0:
            pytest.skip(f"a file system of a test's own cannot be mounted here: {mounted.stderr.strip()}")
        try:
            with started(own, request.node.name, tmp_path, wait_until) as run:
                yield run
        finally:
            with contextlib.suppress(EmbeddedUnavailable):
                run.server.kill()
            subprocess.run(["umount", "--lazy", root], check=True)


def test_the_disk_is_full_now_and_then(small_disk: Run) -> None:
    run = small_disk
    on_one_and_on_many(run, limiter={"on_unavailable": "wait"})
    ballast = run.server.place.root / "ballast"

    def fill() -> None:
        gone = time.time()
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(65536)):
                pass
        time.sleep(1.0)
        ballast.unlink()
        go_on(run, gone)

    run.let(fill, every=1.0)
    run.finish(ROUGH)
    assert refused_for_want_of_room(run)


def let_files_grow_to(size: int, server: Cluster) -> None:
    """Set a limit of the server's processes. Done by a process of its user: root may not be able to."""
    owner = server.place.data.stat()
    try:
        first = psutil.Process(server.pid)
        pids = [first.pid, *(child.pid for child in first.children())]
    except (FileNotFoundError, psutil.NoSuchProcess):
        return  # it has ended itself
    pid = os.fork()
    if pid == 0:  # imports nothing, as that user may not be able to read it
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(owner.st_gid)
                os.setuid(owner.st_uid)
            for process in pids:
                with contextlib.suppress(OSError):
                    _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
                    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit, which Linux has")
def test_files_may_grow_no_further_now_and_then(run: Run) -> None:
    """A quota: as a full disk, which not everybody can have."""
    on_one_and_on_many(run, limiter={"on_unavailable": "wait"})

    def limit() -> None:
        gone = time.time()
        let_files_grow_to(8192, run.server)
        time.sleep(1.0)
        let_files_grow_to(-1, run.server)
        go_on(run, gone)

    run.let(limit, every=1.0)
    run.finish(ROUGH)
    assert refused_for_want_of_room(run)
