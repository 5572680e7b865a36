"""What the tables of pglimits take up, and filling them through its functions."""

from __future__ import annotations

import contextlib
import os
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg

from ._server import Site

_CHUNK = 1_000

# Acquires on names (or keys) that end in a number. The name mentions the number in any case: else all rows would share
# one call.
_ACQUIRE = """
select array_agg(distinct a.lease_id) filter (where a.status = 'granted')
from generate_series(%(first)s::int, %(last)s::int) g
cross join lateral pglimits.acquire(
  %(name)s || case when %(many)s = 'limits' then g::text else left(g::text, 0) end,
  key => case when %(many)s = 'keys' then g::text else '' end, lease_duration => 86400) a
"""
# In another transaction, as callers do it.
_RELEASE = "select count(*) from unnest(%s::uuid[]) l(lease_id) where pglimits.release(l.lease_id)"


def fill(site: Site, name: str, many: str, size: int, *, keep: bool = False) -> None:
    """Use ``size`` limits (named by ``name`` and a number from 1), keys of one limit (numbers from 1), or leases of
    one limit: once each. Leases stay if they are to be kept."""
    chunks: queue.SimpleQueue[int] = queue.SimpleQueue()
    for first in range(1, size + 1, _CHUNK):
        chunks.put(first)

    def work() -> None:
        with site.connect() as connection, contextlib.suppress(queue.Empty):
            connection.execute("set synchronous_commit = off")
            while True:
                first = chunks.get_nowait()
                _fill(connection, name, many, first, min(first + _CHUNK - 1, size), keep)

    helpers = min(os.cpu_count() or 1, chunks.qsize(), 4) if many != "leases" else 1
    with ThreadPoolExecutor(helpers) as threads:
        try:
            for done in [threads.submit(work) for _ in range(helpers)]:
                done.result()
        except BaseException:
            with contextlib.suppress(queue.Empty):  # nobody begins another one
                while True:
                    chunks.get_nowait()
            raise
    with site.connect() as connection:
        vacuum(connection)


def _fill(connection: psycopg.Connection[Any], name: str, many: str, first: int, last: int, keep: bool) -> None:
    wanted = {"name": name, "many": many, "first": first, "last": last}
    row = connection.execute(_ACQUIRE, wanted).fetchone()
    leases = row[0] or [] if row else []
    if len(leases) != last - first + 1:
        raise RuntimeError(f"only {len(leases)} of {last - first + 1} leases were granted")
    if not keep:
        connection.execute(_RELEASE, [leases])


def vacuum(connection: psycopg.Connection[Any]) -> None:
    """What autovacuum does by itself once it comes round."""
    tables = connection.execute(
        "select c.oid::regclass::text from pg_class c "
        "where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'r'"
    ).fetchall()
    for (table,) in tables:
        connection.execute(f"vacuum (analyze) {table}".encode())


def sizes(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Bytes on disk of all tables and indexes of pglimits, and the dead rows that the statistics know of."""
    if connection.info.server_version >= 150000:
        connection.execute("select pg_stat_force_next_flush()")
    connection.execute("select pg_stat_clear_snapshot()")
    row = connection.execute(
        "select coalesce(sum(pg_total_relation_size(s.relid)), 0), coalesce(sum(s.n_dead_tup), 0) "
        "from pg_stat_user_tables s where s.schemaname = 'pglimits'"
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])
