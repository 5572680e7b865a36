-- Limits: what an administrator calls.

create or replace function pglimits._check_limit(
  most integer, slot_decay_per_second double precision, max_waiters integer, description text)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  problem text := case
    when most < 0 then format('limit must be at least 0, not %s', most)
    when slot_decay_per_second not between 0 and 1e9  -- NaN is above everything
      then format('slot_decay_per_second must be from 0 to 1000000000, not %s', slot_decay_per_second)
    when slot_decay_per_second > 0 and slot_decay_per_second < 1e-9
      then format('slot_decay_per_second must be 0 or at least 0.000000001, not %s', slot_decay_per_second)
    when max_waiters < -1 then format('max_waiters must be at least 0, or null for no bound, not %s', max_waiters)
    when length(description) > 2000
      then format('description must be at most 2000 characters, not %s', length(description))
  end;
begin
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
end $$;

comment on function pglimits._check_limit(integer, double precision, integer, text) is
  'Raises InvalidArgument for properties that no limit can have. Nulls are not looked at.';

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
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  now timestamptz := pglimits._now();
  problem text := coalesce(
    pglimits._name_error('name', name),
    case when "limit" is null then 'limit must not be null'
         when slot_decay_per_second is null then 'slot_decay_per_second must not be null'
         when active is null then 'active must not be null'
         when max_waiters < 0 then format('max_waiters must be at least 0, or null for no bound, not %s', max_waiters)
    end);
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  perform pglimits._check_limit("limit", slot_decay_per_second, max_waiters, description);
  insert into pglimits.configs (name, "limit", slot_decay_per_second, active, max_waiters, description,
                                decayed_at, fence_floor, created_at, updated_at)
  select create_limit.name, create_limit."limit", create_limit.slot_decay_per_second, create_limit.active,
         create_limit.max_waiters, nullif(create_limit.description, ''), now, m.fence_floor, now, now
  from (select x.fence_floor from pglimits.meta x for share) m
  on conflict do nothing;
  if not found then
    perform pglimits._fail('LimitExists', format('there is a limit named %L already', name),
                           'update_limit changes it.');
  end if;
end $$;

comment on function pglimits.create_limit(text, integer, double precision, boolean, integer, text) is
$$Creates a limit. name: 1 to 200 characters, no control character, none of / % & > <. limit: slots, 0 admits nobody.
slot_decay_per_second: 0 for a concurrency limit, above 0 for a rate limit. active: false does not enforce it.
max_waiters: the longest queue for each key; null, no bound. Errors: PL001 a bad argument, PL003 the name is taken.$$;

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
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  of_limit bigint;
  around pglimits._places;
  old pglimits.configs;
  new pglimits.configs;
  waited_for text;
  now timestamptz;
  problem text := case when new_name is not null then pglimits._name_error('new_name', new_name) end;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('update_limit');
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  perform pglimits._check_limit("limit", slot_decay_per_second, max_waiters, description);
  if new_name is not null then
    -- Names are given by one at a time: nobody creates or renames a limit meanwhile.
    perform from pglimits.meta m for update;
  end if;
  -- First the config, then every state: whoever decided by the old config has committed, whoever comes sees the new.
  of_limit := pglimits._limit_id(update_limit.name);
  around := pglimits._around_limit(of_limit);
  perform pglimits._lock_beside(around, of_limit, true);
  select c.* into old from pglimits.configs c where c.limit_id = of_limit for update;
  if not found then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name));
  end if;
  if new_name <> old.name and exists (select from pglimits.configs c where c.name = new_name) then
    perform pglimits._fail('LimitExists', format('there is a limit named %L already', new_name));
  end if;
  perform pglimits._lock_every(of_limit);
  perform pglimits._lock_beside(around, of_limit, false);
  now := pglimits._now();

  new := old;
  new.name := coalesce(new_name, old.name);
  new."limit" := coalesce(update_limit."limit", old."limit");
  new.slot_decay_per_second := coalesce(update_limit.slot_decay_per_second, old.slot_decay_per_second);
  new.active := coalesce(update_limit.active, old.active);
  new.max_waiters := case when max_waiters = -1 then null else coalesce(update_limit.max_waiters, old.max_waiters) end;
  new.description := coalesce(update_limit.description, old.description);
  new.changes := old.changes + 1;
  if new.slot_decay_per_second <> old.slot_decay_per_second then
    new.decayed := pglimits._decayed(old, now);
    new.decayed_at := now;
  end if;
  update pglimits.configs c
  set name = new.name, "limit" = new."limit", slot_decay_per_second = new.slot_decay_per_second, active = new.active,
      max_waiters = new.max_waiters, description = nullif(new.description, ''), decayed = new.decayed,
      decayed_at = new.decayed_at, changes = new.changes, updated_at = now
  where c.limit_id = old.limit_id;
  if new.name <> old.name then
    insert into pglimits.former_names (name, limit_id) values (old.name, old.limit_id) on conflict do nothing;
  end if;

  for waited_for in
    select distinct q.key from pglimits.queue q where q.limit_id = old.limit_id order by q.key
  loop
    perform pglimits._apply_change(waited_for, old, new, now);
  end loop;
  perform pglimits._rearrange_at(around);
  perform pglimits._tell_elsewhere(of_limit);
end $$;

comment on function pglimits.update_limit(text, integer, double precision, boolean, integer, text, text) is
$$Changes a limit, at once and in one transaction; what is null stays as it is. max_waiters -1: no bound. description '':
none. new_name renames it and keeps everything. Grown: waiters are granted. Shrunk: holders keep their slots, nobody new
until it fits. Rate: the level so far is kept and decays at the new rate. Inactive: waiters go on at once.
Errors: PL001 a bad argument, PL002 no such limit, PL003 new_name is taken.$$;

-- What a change of a limit means to those who wait on one of its keys.
create or replace function pglimits._apply_change(
  key text, old pglimits.configs, new pglimits.configs, now timestamptz)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  was pglimits.states := pglimits._lock(new.limit_id, key);
  state pglimits.states := pglimits._unpin(was, new, now);
  decayed numeric := pglimits._decayed(new, now);
  grown integer := new."limit" - old."limit";
  turns numeric[];
  slots numeric[];
  left_line bigint;
  unpinned bigint;
  over_several boolean;
  shift integer;
  shut uuid[];
begin
  if not new.active then
    -- What adjust has added stays.
    state.booked := state.booked - pglimits._reserved(state, decayed) + (
      select coalesce(sum(q.slots), 0) from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.added and q.turn > decayed);
    perform pglimits._send_away(state.limit_id, state.key);
    state.waiting := 0;
    state.pinned := 0;
    state.next_death := timestamptz 'infinity';
    state.next_look := timestamptz 'infinity';
    perform pglimits._save(state, was, now);
    return;
  end if;

  perform pglimits._tell_sleepers(state, decayed);
  -- Who sleeps over several limits moves when all changes are made; those behind it with it.
  with moves as (
    update pglimits.queue q
    set called = true, pinned = false, gap = case when q.pinned then -q.slots else q.gap end,
        turn = case when q.pinned then greatest(
          pglimits._decayed(new, now + pglimits._until(old, q.turn, now)), decayed + 0.000001) else q.turn end
    from (select x.lease_id, x.pinned from pglimits.queue x
          where x.limit_id = state.limit_id and x.key = state.key and x.turn > decayed and x.several and x.expires_at < 'infinity'
            and (grown <> 0 or new.slot_decay_per_second <> old.slot_decay_per_second)) b
    where q.lease_id = b.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning b.pinned
  )
  select count(*) > 0, state.pinned - count(*) filter (where m.pinned) into over_several, state.pinned from moves m;
  shift := case when over_several then 0 else grown end;
  -- Turns lie where the level will have come down to the limit: as the limit moves, so do they, but not into the past.
  update pglimits.queue q set called = q.called or over_several, turn = greatest(q.turn - shift, decayed)
  where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed
    and (q.expires_at < 'infinity' or q.added) and not q.several and grown <> 0;
  -- Whoever can never be granted now is sent away to ask again, and gets the error. Who slept towards a limit that is 0 now
  -- stands in line. Who cannot be told of anything goes at the moment that it was told at first, and is pinned there.
  with hopeless as (
    delete from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and pglimits._is_hopeless(new, q.slots, q.for_rate)
      and case when q.turn is null then true else q.turn > decayed and q.expires_at < 'infinity' and not q.several end
    returning q.turn, q.slots + q.gap as slots, q.pinned as was_pinned, false as pinned, null::uuid as shut,
              pglimits._tell(q.channel, q.lease_id)
  ), stopped as (
    select q.turn, q.slots + q.gap, false, false, q.lease_id, null::void from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.expires_at < 'infinity' and not q.several
      and new."limit" = 0 and new.slot_decay_per_second > 0
  ), deaf as (
    update pglimits.queue q set turn = pglimits._decayed(new, q.looks_at), pinned = true, gap = 0
    from (
      select x.lease_id, x.turn, x.pinned, x.slots + x.gap as slots from pglimits.queue x
      where x.limit_id = state.limit_id and x.key = state.key and x.turn > decayed and x.expires_at = 'infinity' and not x.added
        and (grown <> 0 or new.slot_decay_per_second <> old.slot_decay_per_second)
    ) b
    where q.lease_id = b.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning greatest(b.turn - shift, decayed), b.slots, b.pinned, true, null::uuid, null::void
  )
  select array_agg(h.turn) filter (where not h.was_pinned and h.turn is not null),
         array_agg(h.slots) filter (where not h.was_pinned and h.turn is not null),
         count(*) filter (where h.turn is null),
         count(*) filter (where h.was_pinned) - count(*) filter (where h.pinned),
         array_agg(h.shut) filter (where h.shut is not null)
  into turns, slots, left_line, unpinned, shut
  from (select * from hopeless union all select * from stopped union all select * from deaf) h;
  state.waiting := state.waiting - left_line;
  state.pinned := state.pinned - unpinned;
  if shut is not null then
    state := pglimits._stand_in_line(state, shut, now);
  end if;
  if turns is not null then
    state := pglimits._close_gaps(state, new, now, turns, slots);
  end if;
  state := pglimits._settle(pglimits._note_peak(state), new, now);
  perform pglimits._save(state, was, now);
end $$;

comment on function pglimits._apply_change(text, pglimits.configs, pglimits.configs, timestamptz) is
  'Applies a change of a limit to those who wait on one of its keys.';

-- Empties a queue: everybody in it is told, and asks again. Who sleeps over several limits goes on for the others.
create or replace function pglimits._send_away(limit_id bigint, key text)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  waiter record;
begin
  for waiter in
    delete from pglimits.queue q where q.limit_id = _send_away.limit_id and q.key = _send_away.key
    returning q.channel, q.lease_id
  loop
    perform pglimits._tell(waiter.channel, waiter.lease_id);
  end loop;
end $$;

comment on function pglimits._send_away(bigint, text) is 'Empties the queue of a (limit, key) and tells everybody who was in it.';

-- Tells those who need slots of a limit that was changed, and wait for others too: they look, find that it was changed, and ask
-- again, or move to another turn.
create or replace function pglimits._tell_elsewhere(limit_id bigint)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._tell(w.channel, null)
  from (select distinct q.channel from pglimits.queue q where _tell_elsewhere.limit_id = any (q.limit_ids)) w;
end $$;

comment on function pglimits._tell_elsewhere(bigint) is
  'Tells those who wait for several limits, this one among them, that it was changed.';

create or replace function pglimits.delete_limit(name text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  of_limit bigint;
  around pglimits._places;
  gone pglimits.configs;
  state record;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('delete_limit');
  -- First of all, so that a limit created under this name while this commits starts above its fences.
  perform from pglimits.meta m for update;
  of_limit := pglimits._limit_id(delete_limit.name);
  around := pglimits._around_limit(of_limit);
  perform pglimits._lock_beside(around, of_limit, true);
  select c.* into gone from pglimits.configs c where c.limit_id = of_limit for update;
  if not found then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name));
  end if;
  perform pglimits._lock_every(of_limit);
  perform pglimits._lock_beside(around, of_limit, false);
  for state in
    select s.key, s.version from pglimits.states s where s.limit_id = gone.limit_id order by s.key
  loop
    perform pglimits._send_away(gone.limit_id, state.key);
    gone.fence_floor := greatest(gone.fence_floor, state.version);
  end loop;
  -- In the order in which renew locks them. A lease on other limits too goes on there.
  perform from pglimits.leases l
  where l.lease_id in (select d.lease_id from pglimits.leases d where d.limit_id = gone.limit_id)
  order by l.limit_id, l.key, l.lease_id for update;
  update pglimits.leases l set parts = l.parts - d.dropped
  from (select x.lease_id, count(*)::integer as dropped from pglimits.leases x
        where x.limit_id = gone.limit_id and x.parts > 1 group by x.lease_id) d
  where l.lease_id = d.lease_id and l.limit_id <> gone.limit_id;
  delete from pglimits.leases l where l.limit_id = gone.limit_id;
  delete from pglimits.states s where s.limit_id = gone.limit_id;
  delete from pglimits.keys k where k.limit_id = gone.limit_id;
  delete from pglimits.former_names f where f.limit_id = gone.limit_id;
  delete from pglimits.configs c where c.limit_id = gone.limit_id;
  update pglimits.meta m set fence_floor = greatest(m.fence_floor, gone.fence_floor);
  perform pglimits._rearrange_at(around);
  perform pglimits._tell_elsewhere(of_limit);
end $$;

comment on function pglimits.delete_limit(text) is
  'Deletes a limit with its leases; its waiters are told; a later release is a no-op. Errors: PL002 no such limit.';

-- Corrects what was charged before the call was made: up, even past the limit, or down, never below zero.
create or replace function pglimits.adjust(name text, slots integer, key text default '')
returns double precision
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  here pglimits._places;
  around pglimits._places;
  was pglimits.states;
  state pglimits.states;
  config pglimits.configs;
  now timestamptz;
  problem text := coalesce(case when slots is null then 'slots must not be null' end,
                           pglimits._name_error('key', key, true));
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  here.limit_ids := array[pglimits._limit_id(name)];
  here.keys := array[key];
  if slots < 0 then
    around := pglimits._around(here);
    perform pglimits._lock_several(around.limit_ids, around.keys);
  end if;
  was := pglimits._lock(here.limit_ids[1], key);
  now := pglimits._now();
  select c.* into config from pglimits.configs c where c.limit_id = was.limit_id;
  if config.limit_id is null then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name));
  elsif config.slot_decay_per_second = 0 then
    perform pglimits._fail('NoSlotDecay', format('limit %L has no slot_decay_per_second: it has no level', name));
  end if;
  state := pglimits._add_to_level(pglimits._unpin(was, config, now), config, slots, now);
  if config.active then
    state := pglimits._settle(state, config, now);
  end if;
  perform pglimits._save(state, was, now);
  perform pglimits._rearrange_at(around);
  return (
    select pglimits._level(s, config, now) from pglimits.states s
    where s.limit_id = here.limit_ids[1] and s.key = adjust.key order by s.version desc limit 1);
end $$;

comment on function pglimits.adjust(text, integer, text) is
$$Adds slots to the level of a rate limit after the fact (an estimate was 500 tokens, the call used 1312: adjust by 812),
or takes them off, never below zero. Past the limit, later callers wait longer. Returns the new level in slots.
Errors: PL001 a bad argument, PL002 no such limit, PL005 the limit has no slot_decay_per_second.$$;

-- Raises the level behind those who sleep, or lowers it: by what was added behind the last of them, then behind the one before,
-- and so on, and at last by what was used before they came. What they have reserved stays reserved, only earlier.
create or replace function pglimits._add_to_level(
  state pglimits.states, config pglimits.configs, slots numeric, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  used numeric;
  turns numeric[];
  given_back numeric[];
  added record;
begin
  if slots > 0 then
    return pglimits._add_turn(state, config, slots::integer, now);
  elsif slots = 0 then
    return state;
  end if;
  state.booked := greatest(state.booked, decayed);
  used := state.booked - decayed - pglimits._reserved(state, decayed);
  if used < 0 then
    -- So much of the first gap has passed.
    update pglimits.queue q set gap = q.gap + used
    where q.lease_id = (
      select n.lease_id from pglimits.queue n
      where n.limit_id = state.limit_id and n.key = state.key and n.turn > decayed and not n.pinned
      order by n.turn limit 1)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
    used := 0;
  end if;
  for added in
    select q.lease_id, q.turn, q.slots, q.gap from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.added and q.turn > decayed
    order by q.turn desc
  loop
    exit when slots = 0;
    turns := turns || added.turn;
    if added.slots > -slots then
      update pglimits.queue q set slots = q.slots + _add_to_level.slots
      where q.lease_id = added.lease_id
        and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
      given_back := given_back || -slots;
      slots := 0;
    else
      delete from pglimits.queue q
      where q.lease_id = added.lease_id
        and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
      given_back := given_back || (added.slots + added.gap);
      slots := slots + added.slots;
    end if;
  end loop;
  return pglimits._close_gaps(state, config, now, turns || decayed, given_back || least(-slots, used));
end $$;

comment on function pglimits._add_to_level(pglimits.states, pglimits.configs, numeric, timestamptz) is
  'Raises or lowers the level of a rate limit.';

create or replace function pglimits.reset(name text, key text default null)
returns integer
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  was pglimits.states;
  state pglimits.states;
  config pglimits.configs;
  now timestamptz;
  ended integer := 0;
  ended_here integer;
  of_limit bigint := pglimits._limit_id(name);
  used_keys text[];
  places pglimits._places;
  around pglimits._places;
  used_key text;
  problem text := case when key is not null then pglimits._name_error('key', key, true) end;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('reset');
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  used_keys := array(select s.key from pglimits.states s
                     where s.limit_id = of_limit and s.key = coalesce(reset.key, s.key));
  places.limit_ids := array_fill(of_limit, array[cardinality(used_keys)]);
  places.keys := used_keys;
  around := pglimits._around(places);
  perform pglimits._lock_several(places.limit_ids || around.limit_ids, places.keys || around.keys);
  foreach used_key in array used_keys loop
    was := pglimits._lock_used(of_limit, used_key);
    continue when was.limit_id is null;
    now := pglimits._now();
    select c.* into config from pglimits.configs c where c.limit_id = of_limit;
    -- In the order in which renew locks them.
    perform from pglimits.leases l
    where l.limit_id = of_limit and l.key = used_key order by l.lease_id for update;
    with gone as (
      delete from pglimits.leases l where l.limit_id = of_limit and l.key = used_key
      returning l.expires_at
    )
    select count(*) filter (where g.expires_at > now) into ended_here from gone g;
    ended := ended + ended_here;
    state := pglimits._unpin(was, config, now);
    state.held := 0;
    state.next_expiry := timestamptz 'infinity';
    state := pglimits._add_to_level(state, config, -state.booked, now);
    if config.active then
      state := pglimits._settle(state, config, now);
    end if;
    perform pglimits._save(state, was, now);
  end loop;
  perform pglimits._rearrange_at(around);
  return ended;
end $$;

comment on function pglimits.reset(text, text) is
$$Ends every lease of a limit (of one key, if given) and sets its level to zero, as if nothing had been taken; waiters are
granted. The holders are not stopped: they find out when they next renew. Returns how many leases were ended.
Errors: PL001 a bad argument, PL002 no such limit.$$;
