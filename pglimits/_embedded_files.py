"""The folders and locks of an embedded PostgreSQL, and whom they belong to."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pglimits.errors import EmbeddedUnavailable

PORT = 5432
POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged user whom root starts PostgreSQL as, which refuses to run as root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of a server, owned by who calls, and what is where in it.

    ``server.lock`` is held by every process of the server, as each inherits it, and by who is about to start
    one. So whoever gets that lock knows that nothing runs, whatever a pid file says.
    """

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def server_lock(self) -> Path:
        return self.root / "server.lock"

    @property
    def sockets(self) -> Path:
        """The socket's folder: here, or in ``/tmp`` if that is too long or cannot stand in a DSN."""
        near = self.root / "run"
        longest = f"{near}/.s.PGSQL.{PORT}.lock"
        if len(longest) < 100 and re.fullmatch(r"[\w./~+-]+", longest, re.ASCII):
            return near
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        return Path(f"/tmp/pglimits-{os.geteuid()}") / name

    def make_sockets(self, account: Account | None) -> None:
        """Make the socket's folder, which only its owner (and root) can enter: who connects is superuser."""
        folder = self.sockets
        if folder.parent != self.root:
            own_folder(folder.parent, 0o711 if account else 0o700)
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink():
            raise EmbeddedUnavailable(f"{folder} is a symbolic link: remove it")
        hand_over(folder, account)
        for stale in folder.glob(".s.PGSQL.*"):
            stale.unlink()


def own_folder(folder: Path, mode: int) -> None:
    """Make a folder if there is none, with its parents, and refuse one that is not safely ours."""
    try:
        folder.mkdir(mode, parents=True)  # never wider than this: another process may check it just now
        folder.chmod(mode)
    except FileExistsError:
        pass
    except OSError as error:
        raise EmbeddedUnavailable(f"cannot make {folder} ({error.strerror}): set PGLIMITS_HOME to another") from error
    check_own(folder)


def check_own(folder: Path) -> None:
    """Refuse a folder that anybody else made or may write to.

    Raises:
        EmbeddedUnavailable: it is such a one.
        FileNotFoundError: there is none.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise EmbeddedUnavailable(
            f"{folder} must be a folder that you (uid {os.geteuid()}) own and only you write to (chmod go-w)"
        )


def hand_over(folder: Path, account: Account | None) -> None:
    """Give a folder to the account that the server runs as, and close it to all others."""
    if account:
        os.chown(folder, account.uid, account.gid)
    folder.chmod(0o700)


_held: set[int] = set()


def _forget_in_child() -> None:
    # A lock belongs to the open file, which a fork shares: a child would keep what its parent has let go.
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def try_lock(path: Path, *, create: bool = True) -> int | None:
    """Lock a file if nobody has it: a descriptor for ``unlock``, or ``None``.

    A program that inherits the descriptor (``pass_fds``) holds the lock with us, as do all its children,
    until the last of them is gone.

    Raises:
        FileNotFoundError: the file (or with ``create`` its folder) does not exist.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    fd = os.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), path.stat()):  # deleted, and made anew
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError):
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    _held.add(fd)
    return fd


def unlock(fd: int) -> None:
    """Let go of a lock. Programs that inherited it keep it; a forked child never had it."""
    if fd in _held:
        _held.remove(fd)
        os.close(fd)


@contextlib.contextmanager
def locked(path: Path, timeout: float = 60.0) -> Iterator[None]:
    """Hold a lock, which another process or thread may hold first, for at most ``timeout`` seconds.

    Raises:
        TimeoutError: it still does.
    """
    deadline = time.monotonic() + timeout
    while (fd := try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has held {path} for {timeout:g} s")
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        unlock(fd)
