"""An embedded PostgreSQL: one shared by the user's processes, and throwaway ones for tests.

Unix socket only, in a folder that nobody else can enter. As root, the server runs as an unprivileged user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from pglimits._embedded_binaries import (
    Binaries,
    can_enter,
    candidates,
    find_binaries,
    unprivileged_account,
    within_reach,
)
from pglimits._embedded_files import Account, Place, locked, own_folder, try_lock, unlock
from pglimits._embedded_server import (
    AT_ONCE,
    GENTLY,
    Server,
    await_ready,
    data_version,
    end,
    initialise,
    launch,
    running,
    server_or_lock,
)
from pglimits.errors import EmbeddedUnavailable

__all__ = [
    "Binaries",
    "EmbeddedUnavailable",
    "Server",
    "find_binaries",
    "start",
    "status",
    "stop",
    "throwaway",
]

log = logging.getLogger("pglimits.embedded")

_THROWAWAY = "pglimits-throwaway-"
_VOLATILE = {"fsync": "off", "full_page_writes": "off"}


def start(
    *, binaries: Binaries | None = None, settings: Mapping[str, str] | None = None, timeout: float = 60.0
) -> Server:
    """The user's own server, shared by all their processes: found running, or started, or made and started.

    It outlives this process, until ``stop``, and is durable. Its folder is ``PGLIMITS_HOME``, by default
    ``pglimits`` in the user's data folder (``XDG_DATA_HOME``, ``~/.local/share``), for root
    ``/var/lib/pglimits``.

    Args:
        binaries: the PostgreSQL for a server that is made now; data that exists keeps its major version.
        settings: parameters as in postgresql.conf, if this call starts the server.
        timeout: seconds each for another process that is starting or stopping it, and for it to be ready.

    Raises:
        EmbeddedUnavailable: there is no PostgreSQL, or it does not start, or ``PGLIMITS_EMBEDDED`` is ``never``; the
            message says why.
    """
    _may_start()
    place = Place(_home())
    with _as_unavailable(place):
        if server := running(place):
            return server
        own_folder(place.root, 0o711 if os.geteuid() == 0 else 0o700)
        with locked(place.root / "start.lock", timeout):
            found = server_or_lock(place, timeout)
            if isinstance(found, Server):
                return found
            return _start(place, binaries, settings or {}, found, timeout, leashed=False, sync=True)


def stop(*, timeout: float = 60.0) -> bool:
    """Stop the user's shared server, whoever started it, and wait until it is gone.

    Clients are disconnected and their transactions rolled back. Returns whether there was one.

    Args:
        timeout: seconds to wait for another process that is just starting or stopping it.

    Raises:
        EmbeddedUnavailable: it could not be stopped.
    """
    place = Place(_home())
    with _as_unavailable(place):
        if not place.server_lock.exists():
            return False
        with locked(place.root / "start.lock", timeout):
            if (lock := try_lock(place.server_lock)) is not None:
                unlock(lock)
                return False
            end(place, GENTLY)
    log.info("stopped PostgreSQL in %s", place.root)
    return True


def status() -> Server | None:
    """The user's shared server if it is ready for connections, else ``None``. Does not wait."""
    place = Place(_home())
    with _as_unavailable(place):
        return running(place)


@contextlib.contextmanager
def throwaway(
    *, binaries: Binaries | None = None, settings: Mapping[str, str] | None = None, fsync: bool = False
) -> Iterator[Server]:
    """An empty server for a test or a demo: gone, with its folder, at the end of the block.

    It dies with this process too, however that ends (on Linux; elsewhere the next throwaway one ends it), and
    the next throwaway one of this user removes its folder. A child process that is forked in the block may
    use it, but leaving the block there ends nothing.

    Args:
        binaries: which PostgreSQL, by default the one of ``find_binaries``.
        settings: parameters as in postgresql.conf.
        fsync: durable, as a real server is; without, faster.

    Raises:
        EmbeddedUnavailable: there is no PostgreSQL, or it does not start; the message says why.
    """
    owner = os.getpid()
    account = unprivileged_account()
    parent = _temporary_folder(account)
    _sweep(parent)
    root, owner_lock = _claim(parent, account)
    place = Place(root)
    try:
        with _as_unavailable(place):
            found = server_or_lock(place, timeout=0)
            assert isinstance(found, int), "a folder of our own has no server yet"
            everything = (settings or {}) if fsync else _VOLATILE | dict(settings or {})
            server = _start(place, binaries, everything, found, 60.0, leashed=True, sync=fsync)
        yield server
    finally:
        if os.getpid() == owner:
            _discard(place)
            unlock(owner_lock)


def _start(
    place: Place,
    wanted: Binaries | None,
    settings: Mapping[str, str],
    lock: int,
    timeout: float,
    *,
    leashed: bool,
    sync: bool,
) -> Server:
    """Make the data if there is none, start a server, wait until it is ready. Lets go of ``lock``."""
    try:
        account = unprivileged_account(place.data)
        if not can_enter(place.root, account):
            who = account.name if account else f"with the id {os.geteuid()}"
            raise EmbeddedUnavailable(f"user {who} cannot enter {place.root}: set PGLIMITS_HOME to another folder")
        version = data_version(place)
        binaries = _of_version(version, wanted, place) if version else wanted or find_binaries()
        if account:
            binaries = within_reach(binaries, account, (place.root if leashed else _home()) / "binaries")
        if version is None:
            initialise(place, binaries, account, lock, sync=sync)
        log_from = launch(place, binaries, account, settings, lock, leashed=leashed)
    finally:
        unlock(lock)
    return await_ready(place, log_from, timeout)


def _of_version(version: int, wanted: Binaries | None, place: Place) -> Binaries:
    """Binaries that can read data of a major version."""
    found = [wanted] if wanted else []
    for binaries in [*found, *candidates()]:
        if binaries.version == version:
            return binaries
        found.append(binaries)
    names = ", ".join(sorted({f"PostgreSQL {each.version} in {each.bin}" for each in found})) or "no PostgreSQL"
    raise EmbeddedUnavailable(
        f"{place.data} was made by PostgreSQL {version}, but there is only {names}: "
        f"install PostgreSQL {version}, or move that folder away to begin anew"
    )


def _may_start() -> None:
    """Whether the environment lets a process use the shared server.

    Raises:
        EmbeddedUnavailable: ``PGLIMITS_EMBEDDED`` is ``never``, or something that might have been meant to be that.
    """
    wish = os.environ.get("PGLIMITS_EMBEDDED", "").strip()
    if wish.lower() == "never":
        raise EmbeddedUnavailable(
            "PGLIMITS_EMBEDDED=never forbids the embedded server: set PGLIMITS_DSN or DATABASE_URL, or pass a DSN"
        )
    if wish:
        raise EmbeddedUnavailable(f"PGLIMITS_EMBEDDED is {wish!r}: set it to 'never', or unset it")


def _home() -> Path:
    """The folder of the shared server, which may not exist yet."""
    if home := os.environ.get("PGLIMITS_HOME"):
        return Path(home).expanduser().resolve()
    if os.geteuid() == 0:
        return Path("/var/lib/pglimits")
    data_home = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():
        try:
            data_home = Path.home() / ".local" / "share"
        except RuntimeError as error:
            raise EmbeddedUnavailable("you have no home folder: set PGLIMITS_HOME to a folder of yours") from error
    return (data_home / "pglimits").resolve()


@contextlib.contextmanager
def _as_unavailable(place: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # permissions, a full disk, a lock's timeout
        raise EmbeddedUnavailable(f"no embedded PostgreSQL in {place.root}: {error}") from error


def _temporary_folder(account: Account | None) -> Path:
    """Where throwaway servers go: the temporary folder, unless the server's user cannot get there."""
    folder = Path(tempfile.gettempdir()).resolve()
    return folder if account is None or can_enter(folder, account) else Path("/tmp")


def _claim(parent: Path, account: Account | None) -> tuple[Path, int]:
    """A new folder, and the lock that shows others that its owner lives."""
    while True:
        root = Path(tempfile.mkdtemp(prefix=_THROWAWAY, dir=parent))
        try:
            root.chmod(0o711 if account else 0o700)
            lock = try_lock(root / "owner.lock")
        except FileNotFoundError:
            lock = None
        if lock is not None:  # else a sweep took it for a dead one's in the moment before it was locked
            return root, lock


def _sweep(parent: Path) -> None:
    """Remove the folders of throwaway servers whose owner is dead, and end those that still run."""
    for root in parent.glob(_THROWAWAY + "*"):
        try:
            found = root.lstat()
            if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
                continue
            lock = try_lock(root / "owner.lock", create=False)
        except FileNotFoundError:  # not locked yet, or removed but for the folder itself
            with contextlib.suppress(OSError):
                root.rmdir()
            continue
        except OSError as error:
            log.warning("cannot look into %s: %s", root, error)
            continue
        if lock is not None:
            log.info("removing %s, whose owner was killed", root)
            _discard(Place(root))
            unlock(lock)


def _discard(place: Place) -> None:
    """End a throwaway server and remove its folder. What cannot be removed is left to the next sweep."""
    try:
        end(place, AT_ONCE)
        if place.sockets.parent != place.root:
            shutil.rmtree(place.sockets, ignore_errors=True)
        for path in place.root.iterdir():  # but the lock, without which no sweep would touch the rest
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "owner.lock":
                path.unlink()
        shutil.rmtree(place.root)
    except (OSError, EmbeddedUnavailable) as error:
        log.warning("could not remove %s: %s", place.root, error)
