"""PgBouncer, between what the tests test and their server."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

MODE = os.environ.get("PGLIMITS_TEST_POOLER") or None
"""The mode of the PgBouncer that everything the product does goes through: ``transaction``; None for none."""

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

_SETTINGS = """
[databases]
* = host={host} port={port} auth_user={user}
[pgbouncer]
listen_addr =
listen_port = {port}
unix_socket_dir = {folder}
auth_type = trust
auth_file = {folder}/users
auth_query = select rolname::text, ''::text from pg_catalog.pg_roles where rolname = $1
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 500
server_login_retry = 0.01
query_wait_timeout = 2
"""


def straight_only(reason: str) -> pytest.MarkDecorator:
    """Skips a test behind the pooler. ``reason``: why what it states cannot be there, or cannot be seen."""
    return pytest.mark.skipif(MODE is not None, reason=f"behind a pooler {reason}")


def account(uid: int, gid: int) -> dict[str, Any]:
    """How to start, as root, a process that refuses to run as root."""
    return {"user": uid, "group": gid, "extra_groups": []} if os.geteuid() == 0 else {}


def through(dsn: str, folder: str) -> str:
    """That database, by way of the PgBouncer whose socket is in this folder."""
    return make_conninfo(dsn, host=folder)


def reachable(dsn: str) -> bool:
    try:
        with psycopg.connect(dsn) as connection:
            connection.execute("select 1")
    except psycopg.OperationalError:
        return False
    return True


@contextlib.contextmanager
def pgbouncer(dsn: str, mode: str, size: int) -> Iterator[str]:
    """A PgBouncer in front of the server of this DSN, for its databases and roles.

    ``size``: how many connections it has to the server, for each database and role. Yields the folder of its socket.
    """
    if PROGRAM is None:
        pytest.fail("needs pgbouncer") if MODE else pytest.skip("needs pgbouncer")
    to = conninfo_to_dict(dsn)
    # Who runs the server, and that is not root, can reach its socket.
    owner = (Path(str(to["host"])) / f".s.PGSQL.{to['port']}").stat()
    with tempfile.TemporaryDirectory(prefix="pgl-") as folder:
        settings, users = Path(folder, "pgbouncer.ini"), Path(folder, "users")
        settings.write_text(_SETTINGS.format(**to, folder=folder, mode=mode, size=size))
        users.write_text(f'"{to["user"]}" ""\n')
        if os.geteuid() == 0:
            for each in (folder, settings, users):
                os.chown(each, owner.st_uid, owner.st_gid)
        Path(folder).chmod(0o711)
        process = subprocess.Popen(
            [PROGRAM, "-q", settings],
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **account(owner.st_uid, owner.st_gid),
        )
        try:
            deadline = time.monotonic() + 20
            while not reachable(through(dsn, folder)):
                assert process.poll() is None, "pgbouncer ended"
                assert time.monotonic() < deadline, "pgbouncer does not answer"
                time.sleep(0.02)
            yield folder
        finally:
            process.kill()
            process.wait()
