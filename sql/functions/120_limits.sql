-- Limits: what an administrator calls.
--
-- Invariant: whoever decided by what a limit was has committed before it changes, and whoever comes after sees what it is now: the config
-- is locked first, then every state, each of which has a copy of it.
-- Called by: anybody who was granted pglimits_admin.

create or replace function pglimits._limit_fault(
  most integer, slot_decay_per_second double precision, max_waiters integer, description text)
returns text
language sql
stable
return case
  when most < 0 then 'limit must be at least 0, not ' || most
  when slot_decay_per_second not between 0 and 1e9  -- NaN is above everything
    then 'slot_decay_per_second must be from 0 to 1000000000, not ' || slot_decay_per_second
  when slot_decay_per_second > 0 and slot_decay_per_second < 1e-9
    then 'slot_decay_per_second must be 0 or at least 0.000000001, not ' || slot_decay_per_second
  when max_waiters < -1 then 'max_waiters must be at least 0, or null for no bound, not ' || max_waiters
  when length(description) > 2000 then 'description must be at most 2000 characters, not ' || length(description)
end;

comment on function pglimits._limit_fault(integer, double precision, integer, text) is
  'What is wrong with properties of a limit, or null. Nulls are not looked at.';

create or replace function pglimits.create_limit(
  name text,
  "limit" integer,
  slot_decay_per_second double precision default 0,
  active boolean default true,
  max_waiters integer default null,
  description text default null)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  now constant timestamptz := pglimits._now();
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(
    pglimits._name_fault('name', name),
    case when "limit" is null then 'limit must not be null'
         when slot_decay_per_second is null then 'slot_decay_per_second must not be null'
         when active is null then 'active must not be null'
         when max_waiters < 0 then 'max_waiters must be at least 0, or null for no bound, not ' || max_waiters end,
    pglimits._limit_fault("limit", slot_decay_per_second, max_waiters, description)));
  loop
    insert into pglimits.configs (
      name, "limit", slot_decay_per_second, active, max_waiters, description, decayed_at, fence_floor, created_at, updated_at)
    select create_limit.name, create_limit."limit", create_limit.slot_decay_per_second, create_limit.active,
           create_limit.max_waiters, nullif(create_limit.description, ''), now, m.fence_floor, now, now
    from (select x.fence_floor from pglimits.meta x for share) m
    on conflict do nothing;
    exit when found;
    if exists (select from pglimits.configs c where c.name = create_limit.name) then
      perform pglimits._fail('LimitExists', format('there is a limit named %L already', name), 'update_limit changes it.');
    end if;
    -- A restore of the definitions alone has left meta empty. Or the id was taken: a restore, or logical replication, has brought limits
    -- without the sequence that numbers them.
    insert into pglimits.meta default values on conflict do nothing;
    perform setval(pg_get_serial_sequence('pglimits.configs', 'limit_id'), (select max(c.limit_id) from pglimits.configs c));
  end loop;
  perform pglimits._note('created', name, null, null, (
    select pglimits._as_event(c) from pglimits.configs c where c.name = create_limit.name), now);
end $$;

comment on function pglimits.create_limit(text, integer, double precision, boolean, integer, text) is
$$Creates a limit.

name: 1 to 200 characters, no control character, none of / % & > <. limit: how many slots; 0 admits nobody. slot_decay_per_second: slots
that come back each second; 0 makes it a concurrency limit, above 0 a rate limit. active: false does not enforce it. max_waiters: the
longest line for each key; null: no bound. description: what it is for, up to 2,000 characters.

Errors: PL001 a bad argument, PL003 the name is taken.$$;

-- Locks the config of a limit and all its states. Whoever uses a key first waits for the config.
create or replace function pglimits._lock_limit(name text)
returns pglimits.configs
language plpgsql
volatile
as $$
declare
  config pglimits.configs;
begin
  perform pglimits._check(pglimits._name_fault('name', name));
  select c.* into config from pglimits.configs c where c.name = _lock_limit.name for update;
  if not found then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name),
                           format('select pglimits.create_limit(%L, 10);', name));
  end if;
  perform from pglimits.states s where s.limit_id = config.limit_id order by s.key for update;
  return config;
end $$;

comment on function pglimits._lock_limit(text) is
  'Locks a limit with all its states, and returns its config. Raises LimitNotFound.';

create or replace function pglimits.update_limit(
  name text,
  "limit" integer default null,
  slot_decay_per_second double precision default null,
  active boolean default null,
  max_waiters integer default null,
  description text default null,
  new_name text default null)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  old pglimits.configs;
  new pglimits.configs;
  kept record;
  state pglimits.states;
  now timestamptz;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('update_limit');
  perform pglimits._check(coalesce(
    case when new_name is not null then pglimits._name_fault('new_name', new_name) end,
    pglimits._limit_fault("limit", slot_decay_per_second, max_waiters, description)));
  if new_name is not null then
    -- Names are given by one at a time: nobody creates or renames a limit meanwhile.
    perform from pglimits.meta m for update;
  end if;
  old := pglimits._lock_limit(name);
  if new_name <> old.name and exists (select from pglimits.configs c where c.name = new_name) then
    perform pglimits._fail('LimitExists', format('there is a limit named %L already', new_name));
  end if;
  now := pglimits._now();

  new := old;
  new.name := coalesce(new_name, old.name);
  new."limit" := coalesce(update_limit."limit", old."limit");
  new.slot_decay_per_second := coalesce(update_limit.slot_decay_per_second, old.slot_decay_per_second);
  new.active := coalesce(update_limit.active, old.active);
  new.max_waiters := case when max_waiters = -1 then null else coalesce(update_limit.max_waiters, old.max_waiters) end;
  new.description := nullif(coalesce(update_limit.description, old.description), '');
  if new.slot_decay_per_second <> old.slot_decay_per_second then
    new.decayed := pglimits._decayed(old.decayed, old.slot_decay_per_second, old.decayed_at, now);
    new.decayed_at := now;
  end if;
  if new is not distinct from old then
    return;
  end if;
  update pglimits.configs c
  set name = new.name, "limit" = new."limit", slot_decay_per_second = new.slot_decay_per_second, active = new.active,
      max_waiters = new.max_waiters, description = new.description, decayed = new.decayed, decayed_at = new.decayed_at,
      updated_at = now
  where c.limit_id = old.limit_id;
  update pglimits.states s
  set version = s.version + 1, generation = (s.version + 1) / 16, name = new.name, "limit" = new."limit",
      slot_decay_per_second = new.slot_decay_per_second, active = new.active, max_waiters = new.max_waiters,
      decayed = new.decayed, decayed_at = new.decayed_at
  where s.limit_id = old.limit_id;
  if not new.active then
    -- Nothing is kept of what is not enforced, for those who wait for other limits too.
    for kept in
      with gone as (
        delete from pglimits.leases l
        where l.lease_id = any (array(
            select x.lease_id from pglimits.leases x where x.limit_id = old.limit_id and x.fence = 0 order by x.key, x.expires_at))
          and l.limit_id is not distinct from old.limit_id and l.fence = 0 and l.slots > 0
        returning l.key, l.slots
      )
      select g.key, sum(g.slots) as slots from gone g group by g.key
    loop
      update pglimits.states s
      set held = s.held - kept.slots, changed_at = now,
          held_slot_seconds = s.held_slot_seconds + pglimits._slot_seconds(s.held, s.changed_at, now)
      where s.limit_id = old.limit_id and s.key = kept.key;
    end loop;
  end if;

  for state in
    select s.* from pglimits.states s where s.limit_id = old.limit_id and s.waiting > 0 order by s.key
  loop
    perform pglimits._serve(pglimits._send_away(state), now, false);
  end loop;
  perform pglimits._tell_elsewhere(old.limit_id);
  perform pglimits._note(
    'updated', new.name, null, pglimits._differing(pglimits._as_event(old), pglimits._as_event(new)),
    pglimits._differing(pglimits._as_event(new), pglimits._as_event(old)), now);
end $$;

comment on function pglimits.update_limit(text, integer, double precision, boolean, integer, text, text) is
$$Changes a limit, at once and in one transaction. An argument that is null leaves its field as it is.

limit: if it grows, waiters are granted; if it shrinks, holders keep their slots, and nobody new is granted until there is room.
slot_decay_per_second: the level so far is kept, and decays at the new rate. active: false lets waiters go on at once. max_waiters: -1
for no bound. description: an empty text for none. new_name: renames the limit and keeps everything.

Errors: PL001 a bad argument, PL002 no such limit, PL003 new_name is taken.$$;

-- Takes those out of a line who cannot be granted by a limit as it is now, or need not be: they are told, ask again, and hear why. Who is
-- clamped stays, and waits for all that the limit has.
create or replace function pglimits._send_away(state pglimits.states)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  line uuid[];
  waiter record;
begin
  if state.waiting = 0 then
    return state;
  end if;
  line := array(
    select q.lease_id from pglimits.queue q where q.limit_id = state.limit_id and q.key = state.key order by q.rank, q.arrival);
  if state.active and state."limit" > 0 then
    state.waiting_slots := state.waiting_slots - coalesce((
      select sum(q.slots - state."limit") from pglimits.queue q
      where q.lease_id = any (line)
        and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
        and q.clamp and q.slots > state."limit"), 0);
    update pglimits.queue q set slots = state."limit"
    where q.lease_id = any (line)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
      and q.clamp and q.slots > state."limit";
  end if;
  for waiter in
    delete from pglimits.queue q
    where q.lease_id = any (line)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
      and (not state.active
           or pglimits._is_hopeless(state."limit", state.slot_decay_per_second, q.slots, q.lease_duration is null))
    returning q.channel, q.lease_id, q.slots
  loop
    state := pglimits._shorten(state, waiter.slots);
    perform pglimits._tell(waiter.channel, waiter.lease_id::text);
  end loop;
  return state;
end $$;

comment on function pglimits._send_away(pglimits.states) is
  'Takes those out of a line who wait there in vain, or need not wait.';

-- Those who wait elsewhere, and need a limit too that was changed so that they wait in vain, look, and ask again.
create or replace function pglimits._tell_elsewhere(limit_id bigint)
returns void
language plpgsql
volatile
as $$
begin
  perform pglimits._tell(q.channel, q.lease_id::text)
  from pglimits.queue q
  where _tell_elsewhere.limit_id in (select p.limit_id from unnest(q.parts) p)
    and pglimits._is_outdated(q);
end $$;

comment on function pglimits._tell_elsewhere(bigint) is
  'Tells those who wait for several limits that they are to ask again, as this one was changed.';

create or replace function pglimits.delete_limit(name text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  gone pglimits.configs;
  state pglimits.states;
  leases uuid[];
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('delete_limit');
  -- First of all, so that a limit created under this name while this commits starts above its fences.
  perform from pglimits.meta m for update;
  gone := pglimits._lock_limit(name);
  for state in select s.* from pglimits.states s where s.limit_id = gone.limit_id order by s.key loop
    state.active := false;
    perform pglimits._send_away(state);
    gone.fence_floor := greatest(gone.fence_floor, state.version);
  end loop;
  leases := array(select l.lease_id from pglimits.leases l where l.limit_id = gone.limit_id order by l.key, l.expires_at);
  -- In the order in which renew locks them. A lease on other limits too goes on there.
  perform from pglimits.leases l
  where l.lease_id = any (leases)
  order by l.limit_id + 0, l.key, l.lease_id for update;
  update pglimits.leases l set parts = l.parts - (
    select count(*) from pglimits.leases x where x.lease_id = l.lease_id and x.limit_id is not distinct from gone.limit_id)
  where l.lease_id = any (leases) and l.limit_id <> gone.limit_id;
  delete from pglimits.leases l where l.lease_id = any (leases) and l.limit_id is not distinct from gone.limit_id;
  delete from pglimits.states s where s.limit_id = gone.limit_id;
  delete from pglimits.known_keys k where k.limit_id = gone.limit_id;
  delete from pglimits.configs c where c.limit_id = gone.limit_id;
  delete from pglimits.samples s where s.limit_id = gone.limit_id;
  update pglimits.meta m set fence_floor = greatest(m.fence_floor, gone.fence_floor);
  perform pglimits._tell_elsewhere(gone.limit_id);
  perform pglimits._note('deleted', gone.name, null, pglimits._as_event(gone), null, pglimits._now());
end $$;

comment on function pglimits.delete_limit(text) is
$$Deletes a limit with its leases and its counters. Its waiters are told. To release one of its leases later returns false.

Errors: PL002 no such limit.$$;

create or replace function pglimits.reset(name text, key text default null)
returns integer
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  of_limit bigint;
  state pglimits.states;
  now timestamptz;
  used_key text;
  leases uuid[];
  here integer;
  ended integer := 0;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('reset');
  perform pglimits._check(coalesce(
    pglimits._name_fault('name', name), case when key is not null then pglimits._name_fault('key', key, true) end));
  of_limit := pglimits._limit_id(name);
  -- All states first: delete_limit holds the states of one limit, and touches its leases on others.
  perform pglimits._lock_used(of_limit, k.key)
  from (select x.key from pglimits.known_keys x
        where x.limit_id = of_limit and x.key = coalesce(reset.key, x.key) order by x.key) k;
  for used_key in
    select k.key from pglimits.known_keys k where k.limit_id = of_limit and k.key = coalesce(reset.key, k.key) order by k.key
  loop
    state := pglimits._lock_used(of_limit, used_key);
    continue when state.limit_id is null;
    now := pglimits._now();
    if now >= state.next_expiry then
      state := pglimits._take_expired(state, now);
    end if;
    leases := array(
      select l.lease_id from pglimits.leases l where l.limit_id = state.limit_id and l.key = used_key order by l.expires_at);
    -- In the order in which renew locks them.
    perform from pglimits.leases l
    where l.lease_id = any (leases)
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from used_key
    order by l.lease_id for update;
    with gone as (
      delete from pglimits.leases l
      where l.lease_id = any (leases)
        and l.limit_id is not distinct from state.limit_id and l.key is not distinct from used_key
      returning l.expires_at, l.fence, l.slots
    )
    select count(*) filter (where g.expires_at > now and g.fence > 0 and g.slots > 0) into here from gone g;
    ended := ended + here;
    state.force_released_leases := state.force_released_leases + here;
    state.held := 0;
    state.next_expiry := timestamptz 'infinity';
    state.booked := least(state.booked, pglimits._decayed(state.decayed, state.slot_decay_per_second, state.decayed_at, now));
    if state.active and state.waiting > 0 then
      perform pglimits._serve(state, now, false);
    else
      perform pglimits._save(state, now);
    end if;
  end loop;
  perform pglimits._note('reset', name, key, null, jsonb_build_object('leases', ended), pglimits._now());
  return ended;
end $$;

comment on function pglimits.reset(text, text) is
$$Ends every lease of a limit, or of one key if it is given, and sets the level to zero, as if nothing had been taken. Waiters are granted.
Returns how many leases were ended. The holders are not stopped: they find out when they next renew.

Errors: PL001 a bad argument, PL002 no such limit.$$;
