"""Every SQL statement of the wrapper: calls of pglimits.*, and what goes around them.

Results travel in binary, so that no setting of a session (DateStyle, TimeZone) can change what is read. How long a
lease lasts is told as well: counted from when the statement was sent, it ends no earlier than that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """One statement. ``name``: under which each connection prepares it when it is first needed; empty: it does not."""

    sql: bytes
    name: bytes = b""


VERSION = Statement(b"select pglimits.version(), pg_backend_pid()")

_ACQUIRED = "a.first, a.last, a.status, a.fences, a.expires_at, a.ends_in, a.seconds, a.missing"
_TYPES = (
    *("text[]", "int[]", "text[]", "bool", "float8", "float8", "int"),
    *("uuid[]", "jsonb", "bool", "bool", "text", "bool", "float8"),
)


def _parameters(first: int) -> str:
    """The parameters of _acquire_batch, from a number on, but for the names."""
    return ", ".join(f"${first + nth}::{kind}" for nth, kind in enumerate(_TYPES[1:], 1))


ACQUIRE = Statement(
    f"select {_ACQUIRED} from pglimits._acquire_batch($1::text[], {_parameters(1)}) a".encode(), b"pglimits_acquire"
)

RELEASE = Statement(b"select pglimits._release_batch($1::uuid[], $2::bool, $3::float8)", b"pglimits_release")

RELEASE_AND_ACQUIRE = Statement(
    f"""
    select r.ended, {_ACQUIRED}
    from (select pglimits._release_batch($1::uuid[], $2::bool, $3::float8) as ended offset 0) r,
         pglimits._acquire_batch(case when r.ended is not null then $4::text[] end, {_parameters(4)}) a""".encode(),
    b"pglimits_release_and_acquire",
)
"""What is released comes first, as the call of the other depends on it."""

LOCKED_BY = Statement(b"select pglimits._locked_by($1::text[], $2::text[])")

RENEW = Statement(
    b"""
    select r.lease_id, r.renewed, r.expires_at
    from set_config('lock_timeout', coalesce($1, current_setting('lock_timeout')), true) as patience,
         pglimits.renew_all(case when patience <> '' then $2::uuid[] end, $3::float8) r""",
    b"pglimits_renew",
)
"""How long it waits for a lock comes first, as the call depends on it; for this transaction alone, as a session may be
a pooler's."""

BEAT = Statement(b"select pglimits._beat($1)", b"pglimits_beat")

WATCH = Statement(
    b"""
    select w.lease_id, w.status, w.fence, w.expires_at, w.seconds, w.ends_in
    from set_config('lock_timeout', $2, true) as patience,
         pglimits._watch(case when patience <> '' then $1::uuid[] end, $3::boolean) w""",
    b"pglimits_watch",
)

LIMITS = Statement(
    b"""
    select name, "limit", held, waiting, active, slot_decay_per_second, level, max_waiters, description, created_at,
           updated_at
    from pglimits.limits where name = coalesce($1::text, name) order by name"""
)

KEYS = Statement(
    b"""
    select name, key, held, level, waiting, fence
    from pglimits.keys where name = coalesce($1::text, name) order by name, key"""
)

HOLDERS = Statement(
    b"""
    select lease_id, name, key, slots, holder::text, fence, priority, acquired_at, expires_at
    from pglimits.holders where name = coalesce($1::text, name) order by name, key, acquired_at, lease_id"""
)

WAITERS = Statement(
    b"""
    select lease_id, name, key, slots, holder::text, priority, "position", waiting_since
    from pglimits.waiters where name = coalesce($1::text, name) order by name, key, "position" """
)

CREATE = Statement(b"select pglimits.create_limit($1, $2::int, $3::float8, $4::bool, $5::int, $6::text)")
UPDATE = Statement(b"select pglimits.update_limit($1, $2::int, $3::float8, $4::bool, $5::int, $6::text, $7::text)")
DELETE = Statement(b"select pglimits.delete_limit($1)")
RESET = Statement(b"select pglimits.reset($1, $2::text)")
MEET_ALL_KEYS = {UPDATE, DELETE, RESET}
"""Refused but in read committed: a snapshot does not show the keys that were used first since."""
BEGIN = Statement(b"begin isolation level read committed")
COMMIT = Statement(b"commit")

ADJUST = Statement(b"select pglimits.adjust($1, $2::int, $3)")
SWEEP = Statement(b"select s.leases, s.waiters, s.keys from pglimits.sweep() s")
PEEK = Statement(
    b"""
    select p.status, p.retry_after, p."position"
    from pglimits.peek_all($1::text[], $2::int[], $3::text[], 0, $4::int, $5::bool, $6::bool) p"""
)
