"""What pgbench runs: the floors, and ours.

A pgbench script keeps no UUID, but it does keep the text of a column (\\gset), which a prepared statement takes back.
"""

from __future__ import annotations

ROWS = 1_000
"""Rows of the floor's table, and limits of ours that are compared with them."""


def update_one(table: str) -> str:
    """The statement that no limit on one row can do without."""
    return f"update {table} set n = n + 1 where id = 1;\n"


def update_any(table: str, rows: int = ROWS) -> str:
    """The same over many rows."""
    return f"\\set id random(1, {rows})\nupdate {table} set n = n + 1 where id = :id;\n"


def select_any(table: str, rows: int = ROWS) -> str:
    """A read by primary key: what a refusal cannot do without."""
    return f"\\set id random(1, {rows})\nselect n from {table} where id = :id;\n"


CALLS_IN_PAIR = 2


def pair(name: str) -> str:
    """Acquire and release on one limit: two calls, each in a transaction of its own."""
    return f"select lease_id as id from pglimits.acquire('{name}') \\gset\nselect pglimits.release(:id::uuid);\n"


def waiting_pair(name: str) -> str:
    """The same by the procedures, which unlock the limit before the answer is on disk."""
    return f"call pglimits.acquire_wait('{name}') \\gset\ncall pglimits.release_wait(:lease_id::uuid);\n"


def pair_any(prefix: str, limits: int = ROWS) -> str:
    """The same over many limits, named by a prefix and a number from 1."""
    return (
        f"\\set n random(1, {limits})\n"
        f"select lease_id as id from pglimits.acquire('{prefix}' || :n) \\gset\n"
        "select pglimits.release(:id::uuid);\n"
    )


def refusal(name: str) -> str:
    """A call on a limit that is full."""
    return f"select status from pglimits.acquire('{name}');\n"
