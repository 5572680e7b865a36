-- Levels that are corrected afterwards: by a lease that knows by now what it used (settle), or by an administrator (adjust).
--
-- A lease on a rate limit took an estimate: that is held, and was added to the level. Settled, the level has what was really used in its
-- place. What is held stays the estimate until the lease ends, so what is under way never exceeds the limit. If no estimate is too low and
-- each is settled once, what is really used in t seconds is at most twice the limit and what decays in t.
--
-- Invariant: a lease takes off a level no more than it has added itself (leases.used). What it really used, its holder says.
-- Called by: anybody who was granted pglimits_user and knows the lease's id; adjust: pglimits_admin.

-- Adds slots to the level of a state that is locked, or takes them off, has its line served, and saves it.
create or replace function pglimits._correct(state pglimits.states, slots bigint, now timestamptz)
returns void
language plpgsql
volatile
as $$
declare
  decayed constant double precision := pglimits._decayed(state.decayed, state.slot_decay_per_second, state.decayed_at, now);
begin
  state.booked := greatest(greatest(state.booked, decayed) + pglimits._millionths(slots), decayed);
  if state.active and state.waiting > 0 then
    perform pglimits._serve(state, now, false);
  else
    perform pglimits._save(state, now);
  end if;
end $$;

comment on function pglimits._correct(pglimits.states, bigint, timestamptz) is
  'Adds slots to the level of a locked state, or takes them off, never below zero; serves its line and saves it.';

create or replace function pglimits.settle(lease_id uuid, name text, slots integer, key text default '')
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return pglimits._settle(lease_id, array[name], array[slots], array[key]);
end $$;

comment on function pglimits.settle(uuid, text, integer, text) is
$$Tells how many slots of a rate limit a lease has really used: the level gets that number in place of what was taken, or settled before.
If it is more, the level goes up, even past the limit, and waiters wait until it has decayed. If it is less, waiters are granted. The
slots that are held stay the same until the release.

Call it before the release, as often as you like: the last number counts. True if the lease is live; false if it has ended, and then what
it took, or was settled last, stands. A limit that is missing, or that the lease is not on as it was inactive then, is not settled: a warning
names it. Errors: PL001 a bad argument, or another key of the limit than those of the lease; PL005 the limit has no
slot_decay_per_second.$$;

create or replace function pglimits.settle_all(lease_id uuid, names text[], slots integer[], keys text[] default '{""}')
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return pglimits._settle(lease_id, names, slots, keys);
end $$;

comment on function pglimits.settle_all(uuid, text[], integer[], text[]) is
$$Settles a lease on several limits, in one transaction. As settle, with slots and keys given once for all names, or once for each. A limit
that is named twice gets the sum.$$;

create or replace function pglimits._settle(lease_id uuid, names text[], slots integer[], keys text[])
returns boolean
language plpgsql
volatile
as $$
declare
  asked record;
  part record;
  parts pglimits._part[] := array[]::pglimits._part[];
  stray text;
  missing text[];
  elsewhere text[];
  state pglimits.states;
  now timestamptz;
  used integer;
  live boolean;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(
    case when lease_id is null then 'lease_id must not be null' end, pglimits._arrays_fault(names, slots, keys)));
  for asked in
    select n.name, keys[array_lower(keys, 1) + least(n.nth, cardinality(keys))::integer - 1] as key,
           slots[array_lower(slots, 1) + least(n.nth, cardinality(slots))::integer - 1] as slots
    from unnest(names) with ordinality as n(name, nth)
  loop
    perform pglimits._check(coalesce(
      pglimits._name_fault('name', asked.name), pglimits._name_fault('key', asked.key, true),
      case when asked.slots is null then 'slots must not be null'
           when asked.slots < 0 then 'slots must be at least 0, not ' || asked.slots end));
    select c.limit_id, c.active, lease.* into part
    from pglimits.configs c
    cross join lateral (
      select bool_or(l.limit_id = c.limit_id and l.key = asked.key) as is_on, bool_or(l.limit_id = c.limit_id) as has_other_keys,
             count(*) = min(l.parts) as is_whole
      from pglimits.leases l
      where l.lease_id = _settle.lease_id and l.fence > 0 and l.slots > 0 and l.expires_at > pglimits._now()) lease
    where c.name = asked.name;
    if not found then
      perform pglimits._check(pglimits._list_fault('settle', asked.name));
      missing := missing || asked.name;
    elsif part.is_on then
      parts := parts || row(part.limit_id, asked.key, asked.slots)::pglimits._part;
    elsif part.has_other_keys and part.is_whole then
      stray := coalesce(stray, format('key: lease %s is on other keys of %L, not on %L', _settle.lease_id, asked.name, asked.key));
    elsif part.active and part.is_on is not null then
      -- It may have been inactive when the lease was asked for, or have ended the lease since (reset).
      elsewhere := elsewhere || asked.name;
    end if;
  end loop;
  perform pglimits._check(stray);

  -- States first, as everywhere.
  perform pglimits._lock_used(p.limit_id, p.key)
  from (select distinct u.limit_id, u.key collate "C" as key from unnest(parts) u order by 1, 2) p;
  now := pglimits._now();
  live := exists (
    select from pglimits.leases l
    where l.lease_id = _settle.lease_id and l.fence > 0 and l.slots > 0 and pglimits._is_live(l.expires_at, now));
  for part in
    -- The same limit named twice: the slots add up.
    select u.limit_id, u.key collate "C" as key, least(sum(u.slots), 2147483647)::integer as slots
    from unnest(parts) u group by 1, 2 order by 1, 2
  loop
    state := pglimits._reload(part.limit_id, part.key);
    select l.used into used from pglimits.leases l
    where l.lease_id = _settle.lease_id
      and l.limit_id is not distinct from part.limit_id and l.key is not distinct from part.key
      and l.fence > 0 and l.slots > 0 and pglimits._is_live(l.expires_at, now)
    for update;
    continue when not found or state.limit_id is null;
    if used is null and state.slot_decay_per_second = 0 then
      perform pglimits._fail('NoSlotDecay', format('limit %L has no slot_decay_per_second: it has no level', state.name));
    end if;
    continue when used is null or used = part.slots;
    update pglimits.leases l set used = part.slots
    where l.lease_id = _settle.lease_id
      and l.limit_id is not distinct from part.limit_id and l.key is not distinct from part.key;
    perform pglimits._correct(state, part.slots::bigint - used, now);
  end loop;
  if missing is not null then
    raise warning 'not settled, because there is no such limit: %', pglimits._listed(missing);
  end if;
  if elsewhere is not null then
    raise warning 'not settled, because the lease is not on it: %', pglimits._listed(elsewhere);
  end if;
  return live;
end $$;

comment on function pglimits._settle(uuid, text[], integer[], text[]) is
  'Has the levels of rate limits show what a lease has used, in place of what it took: whether it is live.';

-- What a lease holds, as its caller may have asked for more (clamp).
create or replace function pglimits._taken(lease_id uuid)
returns table (name text, key text, slots integer)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select c.name, l.key, l.slots from pglimits.leases l
  cross join lateral (select x.name from pglimits.configs x where x.limit_id = l.limit_id offset 0) c
  where l.lease_id = _taken.lease_id and l.fence > 0 and l.slots > 0 and l.expires_at > pglimits._now()
  order by c.name, l.key;
end $$;

comment on function pglimits._taken(uuid) is 'The slots of a live lease on each of its limits and keys. For the wrapper.';

-- Corrects what was charged before the call was made: up, even past the limit, or down, never below zero.
create or replace function pglimits.adjust(name text, slots integer, key text default '')
returns double precision
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  state pglimits.states;
  now timestamptz;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(
    pglimits._name_fault('name', name), case when slots is null then 'slots must not be null' end,
    pglimits._name_fault('key', key, true)));
  while state.limit_id is null loop
    state := pglimits._lock(pglimits._limit_id(name), key);
  end loop;
  now := pglimits._now();
  if state.slot_decay_per_second = 0 then
    perform pglimits._fail('NoSlotDecay', format('limit %L has no slot_decay_per_second: it has no level', name));
  end if;
  perform pglimits._correct(state, slots, now);
  state := pglimits._reload(state.limit_id, state.key);
  return greatest(
    state.booked - pglimits._decayed(state.decayed, state.slot_decay_per_second, state.decayed_at, now), 0) / 1000000;
end $$;

comment on function pglimits.adjust(text, integer, text) is
$$Adds slots to the level of a rate limit, or takes them off, never below zero. Returns the new level in slots.

An example: an estimate was 500 tokens, and the call used 1312, so adjust by 812. While the level is past the limit, waiters wait until it
has decayed. A lease corrects its own slots by settle, which needs no administrator.

Errors: PL001 a bad argument, PL002 no such limit, PL005 the limit has no slot_decay_per_second.$$;
