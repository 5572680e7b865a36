-- The short way: what most calls and batches ask for, in a few statements. A look without a lock, and if it shows room and nobody in
-- line, one UPDATE that changes the state if all of that still holds. Where another transaction is at work, acquire and release wait for
-- it in this UPDATE. So only what has to be written comes between the lock and the commit. PostgreSQL looks at the conditions of an
-- UPDATE again, in the newest version of the row, when it had to wait. Everything that is not so simple is left to those who decide. A
-- limit is looked up by its name in the words of the index on that (0001_tables.sql): key || '' and generation + 0.
--
-- Invariant: what is done here is what _decide, or _release_at, would do.
-- Called by: the public functions and the batches, first.

-- Whether nobody has a row locked: who has is its xmax. xmax is xmin where the transaction that wrote the row had it locked before; had
-- it done that in another subtransaction, the row counts as locked until it is written again, which is slower and no less right.
create or replace function pglimits._is_unlocked(xmin xid, xmax xid)
returns boolean
language sql
volatile
return xmax = '0' or xmax = xmin;

comment on function pglimits._is_unlocked(xid, xid) is
  'Whether a row with these two is certainly locked by nobody.';

-- A request over one concurrency limit, for a lease from now on. lease_id null: it gets one. chosen: its id may be known. patient: it
-- waits for somebody else who is at work, as long as lock_timeout lets it. Answers what acquire does; the status is null if it is not so
-- simple, and 'busy' if that is only because somebody else is at work.
create or replace function pglimits._take_at_once(
  name text, slots integer, key text, timeout_seconds double precision, lease_duration double precision, priority integer,
  holder jsonb, lease_id uuid, chosen boolean, patient boolean)
returns pglimits.acquired
language plpgsql
volatile
as $$
declare
  seen record;
  fence bigint;
  now timestamptz;
  ends timestamptz;
begin
  select s.limit_id, s.generation, s.version, s."limit", s."limit" - s.held as room, s.next_expiry,
         s.next_expiry > pglimits._now() as is_current, s.waiting,
         patient or pglimits._is_unlocked(s.xmin, s.xmax)
         or timeout_seconds is null and current_setting('lock_timeout') = '0' as may_go
  into seen from pglimits.states s
  where s.name = _take_at_once.name and s.key || '' = _take_at_once.key and s.active and s.slot_decay_per_second = 0
  order by s.generation + 0 desc limit 1;
  if chosen then
    if pglimits._is_known(array[lease_id]) then
      return null;
    end if;
  end if;
  if slots > 0 and slots <= seen.room and seen.waiting = 0 and seen.is_current then
    if seen.may_go then
      update pglimits.states s
      set version = s.version + 1, generation = (s.version + 1) / 16, held = s.held + slots,
          next_expiry = least(s.next_expiry, pglimits._now() + lease_duration * interval '1 second'), changed_at = pglimits._now(),
          grants = s.grants + 1, granted_slots = s.granted_slots + slots,
          held_slot_seconds = s.held_slot_seconds + pglimits._slot_seconds(s.held, s.changed_at, pglimits._now())
      where s.limit_id = seen.limit_id and s.key = _take_at_once.key and s.generation >= seen.generation
        and s.active and s.slot_decay_per_second = 0 and s.waiting = 0 and slots <= s."limit" - s.held
        and s.next_expiry > pglimits._now() and (s.version = seen.version or not chosen)
      returning s.version, pglimits._now() into fence, now;
      if found then
        insert into pglimits.leases as l (
          lease_id, limit_id, key, slots, holder, session, fence, priority, lease_duration, claimed, parts, acquired_at, expires_at)
        values (coalesce(lease_id, gen_random_uuid()), seen.limit_id, key, slots, holder,
                case when holder is null then pglimits._session() end, fence, priority, lease_duration, true, 1, now,
                now + lease_duration * interval '1 second')
        returning l.lease_id, l.expires_at into lease_id, ends;
        return row('granted', lease_id, fence, ends, null, null)::pglimits.acquired;
      end if;
    end if;
    return row('busy', null, null, null, null, null)::pglimits.acquired;
  elsif timeout_seconds = 0 and slots > greatest(seen.room, 0) and slots <= seen."limit" then
    if seen.is_current or pglimits._ended_slots(seen.limit_id, key, seen.next_expiry, pglimits._now()) = 0 then
      return row('refused', null, null, null, null, null)::pglimits.acquired;
    end if;
  end if;
  return null;
end $$;

comment on function pglimits._take_at_once(
  text, integer, text, double precision, double precision, integer, jsonb, uuid, boolean, boolean) is
  'Grants a request if nothing is in the way, or refuses it if there is no room; status null: it is not so simple.';

-- Requests over one concurrency limit that are all alike, each for so many slots, if there is room for all. chosen: their ids may be
-- known. Answers the fence of the first, of which each of the others has the next, and the moment of the grant; null if it is not so
-- simple.
create or replace function pglimits._take_many_at_once(
  name text, slots integer, key text, lease_duration double precision, priority integer, holders jsonb, lease_ids uuid[],
  chosen boolean, out fence bigint, out now timestamptz)
language plpgsql
volatile
as $$
declare
  many constant integer := cardinality(lease_ids);
  seen record;
begin
  select s.limit_id, s.generation, s.version, s."limit" - s.held as room, s.next_expiry > pglimits._now() as is_current, s.waiting
  into seen from pglimits.states s
  where s.name = _take_many_at_once.name and s.key || '' = _take_many_at_once.key and s.active and s.slot_decay_per_second = 0
  order by s.generation + 0 desc limit 1;
  if (slots > 0 and slots::bigint * many <= seen.room and seen.waiting = 0 and seen.is_current) is not true then
    return;
  elsif chosen then
    if pglimits._is_known(lease_ids) then
      return;
    end if;
  end if;
  update pglimits.states s
  set version = s.version + many, generation = (s.version + many) / 16, held = s.held + slots * many,
      next_expiry = least(s.next_expiry, pglimits._now() + lease_duration * interval '1 second'), changed_at = pglimits._now(),
      grants = s.grants + many, granted_slots = s.granted_slots + slots * many,
      held_slot_seconds = s.held_slot_seconds + pglimits._slot_seconds(s.held, s.changed_at, pglimits._now())
  where s.limit_id = seen.limit_id and s.key = _take_many_at_once.key
    and s.generation >= seen.generation and s.active and s.slot_decay_per_second = 0 and s.waiting = 0
    and slots * many <= s."limit" - s.held and s.next_expiry > pglimits._now() and (s.version = seen.version or not chosen)
  returning s.version - many + 1, pglimits._now() into fence, now;
  if found then
    insert into pglimits.leases (
      lease_id, limit_id, key, slots, holder, fence, priority, lease_duration, claimed, parts, acquired_at, expires_at)
    select u.lease_id, seen.limit_id, _take_many_at_once.key, _take_many_at_once.slots, nullif(holders -> (u.nth - 1)::integer, 'null'),
           _take_many_at_once.fence + u.nth - 1, _take_many_at_once.priority, _take_many_at_once.lease_duration, true, 1,
           _take_many_at_once.now, _take_many_at_once.now + _take_many_at_once.lease_duration * interval '1 second'
    from unnest(lease_ids) with ordinality as u(lease_id, nth);
  end if;
end $$;

comment on function pglimits._take_many_at_once(
  text, integer, text, double precision, integer, jsonb, uuid[], boolean) is
  'Grants requests that are alike if nothing is in the way of any of them; null: it is not so simple.';

-- Calls of rate_limit over one limit, many that are alike, which leave nothing but the level. lease_ids: if they may be known. Answers
-- seconds: 0, they are granted; more, it is refused (one alone), and could go then; null, it is not so simple.
create or replace function pglimits._use_at_once(
  name text, slots integer, key text, may_wait boolean, lease_ids uuid[], many integer)
returns double precision
language plpgsql
volatile
as $$
declare
  seen record;
  now timestamptz;
  decayed double precision;
  used double precision;
  too_much double precision;
begin
  select s.limit_id, s.ctid as place, s.xmin as written_by, s."limit", s.slot_decay_per_second, s.decayed, s.decayed_at, s.version,
         s.booked, s.waiting, pglimits._is_unlocked(s.xmin, s.xmax) as is_unlocked
  into seen from pglimits.states s
  where s.name = _use_at_once.name and s.key || '' = _use_at_once.key and s.active and s.slot_decay_per_second > 0
  order by s.generation + 0 desc limit 1;
  if (slots > 0 and slots <= seen."limit" and seen.waiting = 0) is not true then
    return null;
  elsif lease_ids is not null then
    if pglimits._is_known(lease_ids) then
      return null;
    end if;
  end if;
  now := pglimits._now();
  decayed := pglimits._decayed(seen.decayed, seen.slot_decay_per_second, seen.decayed_at, now);
  used := greatest(seen.booked, decayed) + pglimits._millionths(slots::bigint * many);
  -- The level first, which is 0 without rounding where nothing is used.
  too_much := greatest(seen.booked - decayed, 0) + pglimits._millionths(slots::bigint * many - seen."limit");
  if too_much > 0 then
    return case when not may_wait and many = 1 then pglimits._seconds_until(too_much, 0, seen.slot_decay_per_second) end;
  elsif not seen.is_unlocked then
    return null;
  end if;
  update pglimits.states s
  set version = seen.version + 1, generation = (seen.version + 1) / 16, booked = used, changed_at = now,
      grants = s.grants + many, granted_slots = s.granted_slots + slots::bigint * many,
      held_slot_seconds = s.held_slot_seconds + pglimits._slot_seconds(s.held, s.changed_at, now)
  where s.ctid = seen.place and s.xmin = seen.written_by;
  if not found then
    return null;
  elsif pglimits._now() > now + interval '1 millisecond' then
    -- Somebody had it locked after all, and has changed nothing: it goes now, and not when it was looked at.
    update pglimits.states s
    set booked = greatest(s.booked, pglimits._millionths(slots::bigint * many) + pglimits._decayed(
          s.decayed, s.slot_decay_per_second, s.decayed_at, pglimits._now()))
    where s.limit_id = seen.limit_id and s.key = _use_at_once.key and s.version = seen.version + 1;
  end if;
  return 0;
end $$;

comment on function pglimits._use_at_once(text, integer, text, boolean, uuid[], integer) is
  'Charges calls of rate_limit if nothing is in the way, or refuses one; null if it is not so simple.';

-- Whether something is known of one of these requests: it waits, or holds, or it was told what became of it a moment ago.
create or replace function pglimits._is_known(lease_ids uuid[])
returns boolean
language plpgsql
volatile
as $$
begin
  return exists (select from pglimits.leases l where l.lease_id = any (lease_ids))
      or exists (select from pglimits.queue q where q.lease_id = any (lease_ids));
end $$;

comment on function pglimits._is_known(uuid[]) is 'Whether some of these requests were asked before, and are known.';

-- Ends a lease on one limit where nobody waits. Whether it was live; null if it is not so simple.
create or replace function pglimits._release_at_once(lease_id uuid)
returns boolean
language plpgsql
volatile
as $$
declare
  seen record;
  live boolean;
begin
  select l.limit_id, l.key, l.slots, l.fence, s.generation into seen
  from pglimits.leases l
  cross join lateral (
    select x.generation, x.waiting from pglimits.states x
    where x.limit_id = l.limit_id and x.key = l.key order by x.generation desc limit 1) s
  where l.lease_id = _release_at_once.lease_id and l.parts = 1 and l.fence > 0 and l.slots > 0 and l.expires_at > pglimits._now()
    and s.waiting = 0;
  if not found then
    return null;
  end if;
  update pglimits.states s
  set version = s.version + 1, generation = (s.version + 1) / 16, held = s.held - seen.slots, changed_at = pglimits._now(),
      releases = s.releases + 1,
      held_slot_seconds = s.held_slot_seconds + pglimits._slot_seconds(s.held, s.changed_at, pglimits._now())
  where s.limit_id = seen.limit_id and s.key = seen.key and s.generation >= seen.generation and s.waiting = 0;
  if not found then
    return null;
  end if;
  delete from pglimits.leases l
  where l.lease_id = _release_at_once.lease_id and l.fence = seen.fence
    and l.limit_id is not distinct from seen.limit_id and l.key is not distinct from seen.key
  returning l.expires_at > pglimits._now() into live;
  if not found then
    -- Somebody else ended it before its state was locked.
    update pglimits.states s set held = s.held + seen.slots, releases = s.releases - 1
    where s.limit_id = seen.limit_id and s.key = seen.key and s.generation >= seen.generation;
  end if;
  return live;
end $$;

comment on function pglimits._release_at_once(uuid) is
  'Ends a lease on one limit where nobody waits: whether it was live; null if it is not so simple.';

-- Ends leases that are all on one limit and key, where nobody waits. Answers those that were live; null if it is not so simple.
create or replace function pglimits._release_many_at_once(lease_ids uuid[])
returns uuid[]
language plpgsql
volatile
as $$
declare
  seen record;
  place record;
  ended record;
begin
  select count(*) as leases, sum(l.slots) as slots, min(l.limit_id) as limit_id, min(l.key) as key,
         min(l.limit_id) = max(l.limit_id) and min(l.key) = max(l.key) and min(l.fence) > 0 and max(l.parts) = 1
         and min(l.slots) > 0 and min(l.expires_at) > pglimits._now() as is_simple,
         array_agg(l.lease_id) as ids, max(l.fence) as last_fence
  into seen from pglimits.leases l where l.lease_id = any (lease_ids);
  if (seen.leases = cardinality(lease_ids) and seen.is_simple) is not true then
    return null;
  end if;
  select s.generation, s.waiting into place from pglimits.states s
  where s.limit_id = seen.limit_id and s.key = seen.key order by s.generation desc limit 1;
  update pglimits.states s
  set version = s.version + 1, generation = (s.version + 1) / 16, held = s.held - seen.slots, changed_at = pglimits._now(),
      releases = s.releases + seen.leases,
      held_slot_seconds = s.held_slot_seconds + pglimits._slot_seconds(s.held, s.changed_at, pglimits._now())
  where s.limit_id = seen.limit_id and s.key = seen.key and s.generation >= place.generation and s.waiting = 0;
  if not found then
    return null;
  end if;
  -- In the order in which renew locks them.
  perform from pglimits.leases l
  where l.lease_id = any (lease_ids)
    and l.limit_id is not distinct from seen.limit_id and l.key is not distinct from seen.key
  order by l.lease_id for update;
  with gone as (
    -- Whoever took one of these ids anew since has a later fence.
    delete from pglimits.leases l
    where l.lease_id = any (seen.ids) and l.fence <= seen.last_fence
      and l.limit_id is not distinct from seen.limit_id and l.key is not distinct from seen.key
    returning l.lease_id, l.slots, l.expires_at
  )
  select count(*) as leases, coalesce(sum(g.slots), 0) as slots,
         coalesce(array_agg(g.lease_id) filter (where g.expires_at > pglimits._now()), '{}') as live
  into ended from gone g;
  if ended.slots < seen.slots then
    -- Somebody else ended some of them before their state was locked.
    update pglimits.states s set held = s.held + (seen.slots - ended.slots), releases = s.releases - (seen.leases - ended.leases)
    where s.limit_id = seen.limit_id and s.key = seen.key and s.generation >= place.generation;
  end if;
  return ended.live;
end $$;

comment on function pglimits._release_many_at_once(uuid[]) is
  'Ends leases on one limit where nobody waits: those that were live; null if it is not so simple.';
