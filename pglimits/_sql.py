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
    *("uuid[]", "jsonb", "bool", "bool", "text", "bool", "float8", "bool"),
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

BUSIEST_KEYS = Statement(
    b"""
    select name, key, held, level, waiting, fence
    from pglimits.keys where name = $1 order by waiting desc, held desc, level desc, key limit $2::int offset $3::int"""
)

SETTINGS = Statement(
    b'select name, "limit", slot_decay_per_second, active from pglimits.limits where name = any ($1::text[])'
)
USED = Statement(
    b"""
    select n.nth::int, k.held, k.level
    from unnest($1::text[], $2::text[]) with ordinality as n(name, key, nth)
    cross join lateral (select k.held, k.level from pglimits.keys k where k.name = n.name and k.key = n.key) k"""
)
"""What is used of each of these keys."""

HOLDERS = Statement(
    b"""
    select lease_id, name, key, slots, holder::text, fence, priority, acquired_at, expires_at
    from pglimits.holders where name = coalesce($1::text, name)
    order by name, key, acquired_at, lease_id limit $2::int offset $3::int"""
)

WAITERS = Statement(
    b"""
    select lease_id, name, key, slots, holder::text, priority, "position", waiting_since
    from pglimits.waiters where name = coalesce($1::text, name)
    order by name, key, "position" limit $2::int offset $3::int"""
)

WHY_WAITING = Statement(
    b"""
    select y.lease_id, y.key, y."position", y.blocked_by, y.reason, y.earliest
    from pglimits.why_waiting($1) y order by y.blocked_by <> $1, y.blocked_by, y.key, y."position" """
)

QUEUE = Statement(
    b"""
    select count(*) over (), w.lease_id, w.name, w.key, w.slots, w.holder::text, w.priority, w."position",
           w.waiting_since, y.blocked_by, y.reason, y.earliest
    from pglimits.why_waiting($1) y
    join pglimits.waiters w on w.lease_id = y.lease_id
    order by y.blocked_by <> $1, y.blocked_by, y.key, y."position" limit $2::int offset $3::int"""
)
"""Who stands in the line of a limit, and who needs it and stands in another one."""

COUNTERS = Statement(
    b"""
    select name, limit_id, grants, granted_slots, releases, expired_leases, force_released_leases, held_slot_seconds,
           waited_seconds, leases, keys, oldest_waiting_since
    from pglimits.counters where name = coalesce($1::text, name) order by name"""
)

GRANTS = Statement(
    b"""
    select c.name, c.grants, clock.now
    from (select pglimits._now() as now) clock cross join pglimits.counters c
    where $1::text is null or strpos(lower(c.name), lower($1)) > 0"""
)

_ROOM = 'c."limit" * greatest(c.keys, 1)'
_STATE = f"""
      case when not c.active then 5 when c."limit" = 0 then 4 when c.waiting > 0 then 0
           when c.held >= {_ROOM} or c.level > {_ROOM} - 1 then 1 when c.held > 0 or c.level > 0 then 2 else 3 end"""
_ORDERS = {
    # Rounded, so that they do not change places over trifles.
    "busiest": f"{_STATE}, c.waiting desc, round(10 * greatest(c.held, c.level) / nullif({_ROOM}, 0)) desc",
    "name": "",
    "limit": 'c."limit" desc',
    "held": "c.held desc",
    "level": "c.level desc",
    "waiting": "c.waiting desc, c.oldest_waiting_since",
    "oldest_wait": "c.oldest_waiting_since nulls last",
    "given": "array_position($2::text[], c.name)",
}
_USAGE = """
    select u.name, u."limit", u.held, u.waiting, u.active, u.slot_decay_per_second, u.level, u.max_waiters,
           u.description, u.grants, u.leases, u.keys, u.oldest_wait, u.now, u.of
    from (
      select c.*, clock.now, extract(epoch from clock.now - c.oldest_waiting_since)::float8 as oldest_wait,
             count(*) over () as of, row_number() over (order by {order}) as nth
      from (select pglimits._now() as now) clock
      cross join pglimits.counters c
      where ($1::text is null or strpos(lower(c.name), lower($1)) > 0) and ($2::text[] is null or c.name = any ($2))
    ) u
    order by u.nth limit $3::int offset $4::int"""
USAGE = {
    sort: Statement(_USAGE.format(order=", ".join(filter(None, (order, "c.name")))).encode())
    for sort, order in _ORDERS.items()
}
"""Limits and how they are used, the rows of one page, by how they are sorted."""

_EVENT = """
    e.event_id, e.at, e.kind, e.name, e.key, e.lease_id, e.slots, e.fence, e.holder::text, e.held_seconds,
    e.old::text, e.new::text, e.by::text"""
_WANTED = "($1::text is null or e.name = $1) and ($2::text is null or e.kind = $2)"
EVENTS_AFTER = Statement(
    f"""
    select {_EVENT} from pglimits.events e
    where {_WANTED} and e.event_id > $3::bigint order by e.event_id limit $4::int""".encode()
)
NEWEST_EVENTS = Statement(
    f"""
    select * from (
      select {_EVENT} from pglimits.events e where {_WANTED} order by e.event_id desc limit $3::int
    ) newest order by event_id""".encode()
)
NEWS = Statement(
    f"""
    select pg_snapshot_xmin(s.seen)::text::bigint, pg_snapshot_xmax(s.seen)::text::bigint, {_EVENT}
    from (select pg_current_snapshot() as seen) s
    left join lateral (
      select * from pglimits.events e
      where e.event_id > $1::bigint or e.event_id = any ($2::bigint[]) order by e.event_id limit $3::int
    ) e on true
    order by e.event_id""".encode()
)
"""Events, and which transactions had ended: ids are drawn before a commit, so that a lower one may show later."""

HISTORY = Statement(
    b"""
    select h.at, h.covered_seconds, h."limit", h.held, h.level, h.waiting, h.grants, h.granted_slots, h.releases,
           h.expired_leases, h.force_released_leases, h.waited_seconds, h.waited_p50, h.waited_p95
    from pglimits.history($1, $2::float8, $3::int) h order by h.at"""
)
SPARKLINES = Statement(b"select s.name, s.held from pglimits.sparklines($1::text[], $2::float8, $3::int) s(name, held)")
FORCE_RELEASE = Statement(b"select pglimits.force_release($1::uuid)")
MAY = Statement(
    b"""
    select p.proname::text, has_function_privilege(p.oid, 'execute') and not pg_is_in_recovery()
    from pg_proc p where p.pronamespace = 'pglimits'::regnamespace and p.proname = any ($1::text[])"""
)
"""Which of these functions the role may call, on a server that can be written to."""

CREATE = Statement(b"select pglimits.create_limit($1, $2::int, $3::float8, $4::bool, $5::int, $6::text)")
UPDATE = Statement(b"select pglimits.update_limit($1, $2::int, $3::float8, $4::bool, $5::int, $6::text, $7::text)")
DELETE = Statement(b"select pglimits.delete_limit($1)")
RESET = Statement(b"select pglimits.reset($1, $2::text)")
LIMIT_FAULTS = Statement(b"select f.nth, f.field, f.fault from pglimits._limit_faults($1::jsonb) f")
APPLY = Statement(b"select pglimits._apply($1::jsonb)")
MEET_ALL_KEYS = {UPDATE, DELETE, RESET, APPLY}
"""Refused but in read committed: a snapshot does not show the keys that were used first since."""
BEGIN = Statement(b"begin isolation level read committed")
COMMIT = Statement(b"commit")

ADJUST = Statement(b"select pglimits.adjust($1, $2::int, $3)")
SETTLE = Statement(b"select pglimits.settle_all($1::uuid, $2::text[], $3::int[], $4::text[])", b"pglimits_settle")
TAKEN = Statement(b"select t.name, t.key, t.slots from pglimits._taken($1::uuid) t", b"pglimits_taken")
SWEEP = Statement(b"select s.leases, s.waiters, s.keys from pglimits.sweep() s")
PEEK = Statement(
    b"""
    select p.status, p.retry_after, p."position"
    from pglimits.peek_all($1::text[], $2::int[], $3::text[], 0, $4::int, $5::bool, $6::bool) p"""
)
