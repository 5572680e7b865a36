"""One PostgreSQL server in one folder: make, run, watch and end it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from pglimits._embedded_binaries import Binaries, spawn
from pglimits._embedded_files import (
    POLL_SECONDS,
    PORT,
    Account,
    Place,
    check_own,
    hand_over,
    try_lock,
    unlock,
)
from pglimits.errors import EmbeddedUnavailable

log = logging.getLogger("pglimits.embedded")

USER = "postgres"
LOG_BYTES = 10_000_000  # a longer log is put aside at the next start
SHM_BYTES = 16_000_000  # at least so much must be free in /dev/shm to use it
DEFAULTS = {
    "max_connections": "200",
    "shared_buffers": "64MB",
    "huge_pages": "off",  # 'try' is killed by SIGBUS in a container that may not use them
    "cluster_name": "pglimits",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}
# How to end a server: each signal, and the seconds until the next. SIGINT: roll back, write all out, exit.
# SIGQUIT: exit at once, the WAL has all that was committed.
GENTLY = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 20.0))
AT_ONCE = ((signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))

# Becomes the server, which the kernel then ends (SIGQUIT) when the thread that started it does. Set after the
# change of user, which would clear it; and a parent that died before it was set has left us to another one.
_LEASH = """
import os, sys
try:
    import ctypes
    prctl = ctypes.CDLL(None).prctl
except (ImportError, OSError, AttributeError):
    prctl = None  # a Python without ctypes: no leash, the next sweep does it
parent, uid, gid, *command = sys.argv[1:]
if int(uid):
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
if prctl:
    prctl(1, ctypes.c_ulong(3), 0, 0, 0)  # PR_SET_PDEATHSIG, SIGQUIT
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, reached by ``dsn``: its superuser ``user``, a unix socket in ``host``."""

    dsn: str
    host: str
    port: int
    user: str
    data: Path
    pid: int
    version: int


def data_version(place: Place) -> int | None:
    """The major version of the data, or ``None`` if there is none yet."""
    try:
        return int((place.data / "PG_VERSION").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise EmbeddedUnavailable(f"{place.data}/PG_VERSION is broken: move {place.data} away") from error


def initialise(place: Place, binaries: Binaries, account: Account | None, lock: int, *, sync: bool) -> None:
    """Make the data folder, whole or not at all. ``lock``: the server lock, which ``initdb`` holds too.

    Raises:
        EmbeddedUnavailable: ``initdb`` failed; the message has what it said.
    """
    if place.data.exists() and any(place.data.iterdir()):
        raise EmbeddedUnavailable(f"{place.data} is there but is no PostgreSQL data (no PG_VERSION): move it away")
    for leftover in place.root.glob("data.new-*"):  # of one that was killed
        shutil.rmtree(leftover)
    new = Path(tempfile.mkdtemp(prefix="data.new-", dir=place.root))
    hand_over(new, account)
    command: list[str | Path] = [binaries.bin / "initdb", "-D", new]
    command += [f"--username={USER}", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    if not sync:
        command.append("--no-sync")
    if binaries.version >= 16:  # an earlier one has no such option
        for name, value in _memory_settings().items():
            command += ["-c", f"{name}={value}"]
    process = spawn(command, account, output=subprocess.PIPE, pass_fds=(lock,))
    try:
        said = process.communicate()[0].decode(errors="replace")
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        shutil.rmtree(new, ignore_errors=True)
        raise EmbeddedUnavailable(f"{binaries.bin}/initdb failed in {place.root}:\n{said.strip()}")
    new.rename(place.data)
    if sync:
        folder = os.open(place.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def launch(
    place: Place,
    binaries: Binaries,
    account: Account | None,
    settings: Mapping[str, str],
    lock: int,
    *,
    leashed: bool,
) -> int:
    """Start the server, without waiting until it is ready. ``lock``: the server lock, which it keeps.

    Detached for good, or ``leashed``: it ends when this process does. Returns where in the log its own lines
    begin.
    """
    # We have the server lock, so nothing runs here. A pid of before a reboot may be somebody else's by now,
    # and PostgreSQL would then refuse to start.
    (place.data / "postmaster.pid").unlink(missing_ok=True)
    place.make_sockets(account)
    fixed = {
        "listen_addresses": "",
        "port": str(PORT),
        "unix_socket_directories": str(place.sockets),
        "unix_socket_permissions": "0700",
    }
    command = [str(binaries.bin / "postgres"), "-D", str(place.data)]
    for name, value in (DEFAULTS | _memory_settings() | dict(settings) | fixed).items():
        command += ["-c", f"{name}={value}"]
    with contextlib.suppress(FileNotFoundError):
        if place.log.stat().st_size > LOG_BYTES:
            place.log.replace(place.log.with_name("log.1"))
    output = os.open(place.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        begin = os.fstat(output).st_size
        if leashed:
            _spawn_leashed(command, account, output, lock)
        else:  # as a grandchild: not ours to reap, whoever ends it
            shell = ["/bin/sh", "-c", '"$@" &', "sh", *command]
            spawn(shell, account, output=output, pass_fds=(lock,), detached=True).wait()
    finally:
        os.close(output)
    return begin


def _memory_settings() -> dict[str, str]:
    """Do without ``/dev/shm`` where that has next to no room. Docker's 64 MB are enough."""
    try:
        room = os.statvfs("/dev/shm")
    except OSError:  # PostgreSQL sees that itself
        return {}
    return {} if room.f_bavail * room.f_frsize >= SHM_BYTES else {"dynamic_shared_memory_type": "sysv"}


def _spawn_leashed(command: list[str], account: Account | None, output: int, lock: int) -> None:
    # The leash is tied to the thread that forks: one of its own, which lives as long as the server does.
    if sys.platform == "linux" and sys.executable and not getattr(sys, "frozen", False):
        ids = [str(account.uid), str(account.gid)] if account else ["0", "0"]
        command = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *ids, *command]
        account = None
    started: Future[None] = Future()

    def hold() -> None:
        try:
            process = spawn(command, account, output=output, pass_fds=(lock,), detached=True)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        process.wait()

    threading.Thread(target=hold, name="pglimits-embedded", daemon=True).start()
    started.result()


def running(place: Place) -> Server | None:
    """The server, if it is ready for connections."""
    pid, ready = _pid_file(place)
    if pid is None or not ready:
        return None
    if place.sockets.parent != place.root and place.sockets.parent.exists():
        check_own(place.sockets.parent)  # somebody else's server may listen there
    if not _answers(place.sockets / f".s.PGSQL.{PORT}"):
        return None
    host = str(place.sockets)
    dsn = f"host={host} port={PORT} user={USER} dbname=postgres"
    return Server(dsn, host, PORT, USER, place.data, pid, data_version(place) or 0)


def await_ready(place: Place, log_from: int, timeout: float) -> Server:
    """Wait until the server that was just launched takes connections, for at most ``timeout`` seconds.

    Raises:
        EmbeddedUnavailable: it ended, or takes longer; the message has the end of its log.
    """
    deadline = time.monotonic() + timeout
    while (server := running(place)) is None:
        if (lock := try_lock(place.server_lock)) is not None:
            unlock(lock)
            raise EmbeddedUnavailable(f"PostgreSQL did not start in {place.root}:\n{_log_tail(place, log_from)}")
        if time.monotonic() > deadline:
            tail = _log_tail(place, log_from)
            raise EmbeddedUnavailable(f"PostgreSQL in {place.root} is not ready after {timeout:g} s:\n{tail}")
        time.sleep(POLL_SECONDS)
    log.info("started PostgreSQL %s in %s, pid %s", server.version, place.root, server.pid)
    return server


def server_or_lock(place: Place, timeout: float) -> Server | int:
    """The server that runs here, or else the server lock. Waits while one starts or stops.

    Raises:
        EmbeddedUnavailable: after ``timeout`` seconds there is still neither.
    """
    deadline = time.monotonic() + timeout
    while (server := running(place)) is None:
        if (lock := try_lock(place.server_lock)) is not None:
            return lock
        if time.monotonic() > deadline:
            pid = _postmaster(place)
            raise EmbeddedUnavailable(
                f"PostgreSQL in {place.root} (pid {pid}) has neither got ready nor ended in {timeout:g} s: "
                f"see {place.log}"
                if pid
                else f"processes of an earlier PostgreSQL, or of another container, still use {place.root}: "
                "end them, or set PGLIMITS_HOME to another folder"
            )
        time.sleep(POLL_SECONDS)
    return server


def end(place: Place, steps: Sequence[tuple[signal.Signals, float]]) -> None:
    """End whatever server there is (``GENTLY`` or ``AT_ONCE``), and wait until its last process is gone.

    Raises:
        EmbeddedUnavailable: it outlived the last step.
    """
    for step, seconds in steps:
        deadline = time.monotonic() + seconds
        told: int | None = None
        while time.monotonic() < deadline:
            if (lock := try_lock(place.server_lock)) is not None:
                unlock(lock)
                return
            if (pid := _postmaster(place)) != told and pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, step)
                told = pid
            time.sleep(POLL_SECONDS)
    raise EmbeddedUnavailable(f"could not end the PostgreSQL in {place.root}; its log is {place.log}")


def _pid_file(place: Place) -> tuple[int | None, bool]:
    """The pid in ``postmaster.pid``, and whether that says 'ready'."""
    try:
        lines = (place.data / "postmaster.pid").read_text(errors="replace").splitlines()
        return int(lines[0]), len(lines) > 7 and lines[7].strip() == "ready"
    except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
        return None, False


def _postmaster(place: Place) -> int | None:
    """The pid of the server's first process, if that is certainly it and no later owner of the pid."""
    pid, _ = _pid_file(place)
    if pid is None or pid <= 1:
        return None
    data = os.fsencode(place.data)
    if sys.platform == "linux":
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        return pid if words[0].endswith(b"/postgres") and words[1:3] == [b"-D", data] else None
    command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    shown = subprocess.run(command, capture_output=True, check=False).stdout
    return pid if b"postgres -D " + data + b" -c " in shown else None


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            return probe.connect_ex(str(path)) in (
                0,
                errno.EAGAIN,
            )  # EAGAIN: so many connect that it must be there
        except OSError:
            return False


def _log_tail(place: Place, begin: int) -> str:
    with place.log.open("rb") as file:
        file.seek(begin)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-20:])
