"""Every SQL statement of the wrapper: calls of pglimits.*, and what goes around them.

Intervals travel as seconds and rows in binary, so that no setting of a session (DateStyle, IntervalStyle, TimeZone)
can change what is read. How long a lease lasts is told as well: counted from when the statement was sent, it ends no
earlier than that.
"""

from __future__ import annotations

VERSION = "select pglimits.version(), pg_backend_pid()"

ACQUIRE_MANY = """
    select a.status, a.fences, a.expires_at, extract(epoch from a.retry_after)::float8,
           extract(epoch from a.wait)::float8, a.missing, a.error, a.message,
           extract(epoch from a.expires_at - clock_timestamp())::float8,
           extract(epoch from clock_timestamp() + a.wait)::float8
    from pglimits.acquire_many(%s::jsonb, %s, make_interval(secs => %s)) a order by a.ordinal"""

ACQUIRE_ALIKE = """
    select pglimits.acquire_alike(%s, %s::uuid[], %s::int, %s, %s::interval, %s::interval, %s::int, %s::jsonb, %s::bool,
                                  %s, %s::bool, %s, make_interval(secs => %s)),
           extract(epoch from clock_timestamp())::float8"""

RELEASE_AND_ACQUIRE = """
    select pglimits.release_many(%s::uuid[], %s, make_interval(secs => %s)),
           pglimits.acquire_alike(%s, %s::uuid[], %s::int, %s, %s::interval, %s::interval, %s::int, %s::jsonb, %s::bool,
                                  %s, %s::bool, %s, make_interval(secs => %s)),
           extract(epoch from clock_timestamp())::float8"""

RELEASE = "select pglimits.release_many(%s::uuid[], %s, make_interval(secs => %s))"

RENEW = """
    select r.lease_id, r.renewed, r.expires_at
    from set_config('lock_timeout', coalesce(%s, current_setting('lock_timeout')), true) as patience,
         pglimits.renew(case when patience <> '' then %s::uuid[] end, make_interval(secs => %s)) r"""
"""How long it waits for a lock comes first, as the call depends on it; for this transaction alone, as a session may be
a pooler's."""

WATCH = """
    select w.lease_id, w.status, w.fence, w.expires_at, extract(epoch from w.retry_after)::float8,
           extract(epoch from w.wait)::float8, extract(epoch from w.ends_in)::float8,
           extract(epoch from clock_timestamp() + w.wait)::float8
    from set_config('lock_timeout', $2, true) as patience,
         pglimits.watch(case when patience <> '' then $1::uuid[] end, $3::boolean) w"""

LIMITS = """
    select name, "limit", active, slot_decay_per_second, held, level, waiting, max_waiters, description,
           created_at, updated_at
    from pglimits.limits where name = coalesce(%s::text, name) order by name"""

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
    select p.status, extract(epoch from p.wait)::float8, extract(epoch from p.retry_after)::float8, p."position"
    from pglimits.peek(%s::text[], %s::int[], %s::text[], '0', %s::int, %s::bool, %s::bool) p"""
