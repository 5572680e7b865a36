"""Every SQL statement of the wrapper: calls of pglimits.*, and what goes around them.

Rows travel in binary, so that no setting of a session (DateStyle, TimeZone) can change what is read. How long a lease
lasts is told as well: counted from when the statement was sent, it ends no earlier than that.
"""

from __future__ import annotations

VERSION = "select pglimits.version(), pg_backend_pid()"

ACQUIRE = """
    select a.first, a.last, a.status, a.fences, a.expires_at, a.ends_in, a.seconds, a.missing
    from pglimits._acquire_batch(%s::text[], %s::int[], %s::text[], %s::bool, %s::float8, %s::float8, %s::int,
                                 %s::uuid[], %s::jsonb, %s::bool, %s::bool, %s, %s::bool, %s::float8) a"""

RELEASE = "select pglimits._release_batch(%s::uuid[], %s::bool, %s::float8)"

RELEASE_AND_ACQUIRE = """
    select r.ended, a.first, a.last, a.status, a.fences, a.expires_at, a.ends_in, a.seconds, a.missing
    from (select pglimits._release_batch(%s::uuid[], %s::bool, %s::float8) as ended offset 0) r,
         pglimits._acquire_batch(case when r.ended is not null then %s::text[] end, %s::int[], %s::text[], %s::bool,
                                 %s::float8, %s::float8, %s::int, %s::uuid[], %s::jsonb, %s::bool, %s::bool, %s,
                                 %s::bool, %s::float8) a"""
"""What is released comes first, as the call of the other depends on it."""

LOCKED_BY = "select pglimits._locked_by(%s::text[], %s::text[])"

RENEW = """
    select r.lease_id, r.renewed, r.expires_at
    from set_config('lock_timeout', coalesce(%s, current_setting('lock_timeout')), true) as patience,
         pglimits.renew_all(case when patience <> '' then %s::uuid[] end, %s::float8) r"""
"""How long it waits for a lock comes first, as the call depends on it; for this transaction alone, as a session may be
a pooler's."""

BEAT = "select pglimits._beat($1)"

WATCH = """
    select w.lease_id, w.status, w.fence, w.expires_at, w.seconds, w.ends_in
    from set_config('lock_timeout', $2, true) as patience,
         pglimits._watch(case when patience <> '' then $1::uuid[] end, $3::boolean) w"""

LIMITS = """
    select name, "limit", held, waiting, active, slot_decay_per_second, level, max_waiters, description, created_at,
           updated_at
    from pglimits.limits where name = coalesce(%s::text, name) order by name"""

KEYS = """
    select name, key, held, level, waiting, fence
    from pglimits.keys where name = coalesce(%s::text, name) order by name, key"""

HOLDERS = """
    select lease_id, name, key, slots, holder::text, fence, priority, acquired_at, expires_at
    from pglimits.holders where name = coalesce(%s::text, name) order by name, key, acquired_at, lease_id"""

WAITERS = """
    select lease_id, name, key, slots, holder::text, priority, "position", waiting_since
    from pglimits.waiters where name = coalesce(%s::text, name) order by name, key, "position" """

CREATE = "select pglimits.create_limit(%s, %s::int, %s::float8, %s::bool, %s::int, %s::text)"
UPDATE = "select pglimits.update_limit(%s, %s::int, %s::float8, %s::bool, %s::int, %s::text, %s::text)"
DELETE = "select pglimits.delete_limit(%s)"
RESET = "select pglimits.reset(%s, %s::text)"
MEET_ALL_KEYS = {UPDATE, DELETE, RESET}
"""Refused but in read committed: a snapshot does not show the keys that were used first since."""
BEGIN = "begin isolation level read committed"
GO_ON = "set transaction isolation level read committed"
"""The same where psycopg has begun the transaction."""

ADJUST = "select pglimits.adjust(%s, %s::int, %s)"
SWEEP = "select s.leases, s.waiters, s.keys from pglimits.sweep() s"
PEEK = """
    select p.status, p.retry_after, p."position"
    from pglimits.peek_all(%s::text[], %s::int[], %s::text[], 0, %s::int, %s::bool, %s::bool) p"""
