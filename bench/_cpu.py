"""The processor time that the server's processes have used, as Linux counts it, in nanoseconds."""

from __future__ import annotations

from pathlib import Path

import psycopg

from ._server import Site

MISSING = "it needs a server on this machine, and Linux (/proc/<pid>/schedstat)"


def pid_on_this_machine(connection: psycopg.Connection[object]) -> int | None:
    """The process that serves a connection; None if it is not to be seen from here."""
    pid = connection.info.backend_pid
    try:
        is_it = connection.info.host.startswith("/") and b"postgres" in Path(f"/proc/{pid}/cmdline").read_bytes()
        seconds(pid)
    except (OSError, ValueError, IndexError):
        return None
    return pid if is_it else None


def seconds(*pids: int) -> float:
    """What some processes have used until now."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


def can_be_seen(site: Site) -> bool:
    """Whether the processes of this server can be watched."""
    with site.connect() as connection:
        return pid_on_this_machine(connection) is not None
