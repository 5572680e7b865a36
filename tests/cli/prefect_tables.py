"""The tables of Prefect 3.9 that have limits in them, with what matters here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COLUMNS = {
    "concurrency_limit_v2": (
        "id", "created", "updated", "active", "name", "limit", "active_slots", "denied_slots", "slot_decay_per_second",
        "avg_slot_occupancy_seconds",
    ),
    "concurrency_limit": ("id", "created", "updated", "tag", "concurrency_limit", "active_slots"),
}  # fmt: skip
"""What a test compares with a real one."""

LIMITS = """
create table concurrency_limit_v2 (
  id char(36) not null primary key, created timestamp not null default current_timestamp,
  updated timestamp not null default current_timestamp, active boolean not null, name varchar not null unique,
  "limit" {integer} not null, active_slots {integer} not null, denied_slots {integer} not null,
  slot_decay_per_second float not null, avg_slot_occupancy_seconds float not null)
"""
TAGS = """
create table concurrency_limit (
  id char(36) not null primary key, created timestamp not null default current_timestamp,
  updated timestamp not null default current_timestamp, tag varchar not null, concurrency_limit integer not null,
  active_slots json not null default '[]')
"""


def create(execute: Callable[..., Any], *rows: tuple[Any, ...], tags: tuple[str, ...] = (), mark: str = "?") -> None:
    """Make both tables. A row: name, limit, slot_decay_per_second, active, active_slots."""
    execute(LIMITS.format(integer="bigint"))
    execute(TAGS)
    for nth, (name, limit, decay, active, held) in enumerate(rows):
        values = (f"{nth:036}", active, name, limit, held, decay)
        execute(
            'insert into concurrency_limit_v2 (id, active, name, "limit", active_slots, denied_slots,'
            " slot_decay_per_second, avg_slot_occupancy_seconds)"
            f" values ({', '.join([mark] * 5)}, 0, {mark}, 2.0)",
            values,
        )
    for nth, tag in enumerate(tags):
        execute(
            f"insert into concurrency_limit (id, tag, concurrency_limit) values ({mark}, {mark}, 1)",
            (f"{nth:036}", tag),
        )
