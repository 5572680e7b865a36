-- The short ways: what most calls ask for, decided and written in one go. Each is a special case of what _serve and
-- _release_at do, takes half of their time or less, and leaves everything that is not so simple to them, by returning null
-- with nothing done but the lock taken.
--
-- First the state is locked; what is read afterwards is what was committed until then.

-- Requests that are all alike, on one concurrency limit where nothing is due: there is room for all and nobody waits, or
-- there is room for none and they may not wait either. The answer is that to the first; each of the others has the next fence.
-- chosen: the callers gave the ids, so this may be a repetition. holders: an array of one for each, or null.
create or replace function pglimits._take_alike(
  name text, slots integer, key text, lease_duration interval, wait interval, priority integer, holders jsonb,
  lease_ids uuid[], chosen boolean, strict boolean, channel text)
returns pglimits._answer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  wanted constant bigint := slots::bigint * cardinality(lease_ids);
  state record;
  now timestamptz;
  ends timestamptz;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if (slots >= 1 and current_setting('transaction_isolation') = 'read committed') is not true
     or pglimits._argument_fault(lease_duration, wait, priority, holders -> 0, strict, channel) is not null
  then
    return null;
  end if;
  if cardinality(lease_ids) > 1 then
    if pglimits._not_each_its_own(lease_ids, holders) then
      return null;
    end if;
  end if;
  if wait = interval '0' then
    -- They may be refused, and that takes no lock. The clock is read after the snapshot was taken.
    select s.held + wanted <= c."limit" and s.waiting = 0 as fit,
           s.held::bigint + slots > c."limit" and (slots <= c."limit" or c."limit" = 0)
             and s.next_look > pglimits._now()
             and (s.next_expiry > pglimits._now() or not exists (  -- it was renewed
               select from pglimits.leases l
               where l.limit_id = c.limit_id and l.key = _take_alike.key
                 and l.expires_at >= s.next_expiry and l.expires_at <= (select pglimits._now())))
             and not (chosen and pglimits._are_known(lease_ids)) as are_refused
    into state from pglimits.configs c
    cross join lateral (
      select x.held, x.waiting, x.next_expiry, x.next_look from pglimits.states x
      where x.limit_id = c.limit_id and x.key = _take_alike.key order by x.version desc limit 1) s
    where c.name = _take_alike.name and c.active and c.slot_decay_per_second = 0;
    if state.are_refused then
      return row('refused', null, null, null, null, null, null, null)::pglimits._answer;
    elsif state.fit is not true then
      return null;
    end if;
  end if;

  select s.* into state from pglimits.configs c
  cross join lateral (
    select x.limit_id, x.version, x.held, x.waiting, x.next_expiry, x.next_look from pglimits.states x
    where x.limit_id = c.limit_id and x.key = _take_alike.key order by x.version desc limit 1 for update) s
  where c.name = _take_alike.name and c.active and c.slot_decay_per_second = 0 and c.max_waiters is null;
  now := pglimits._now();
  if (state.waiting = 0 and now < state.next_expiry and now < state.next_look) is not true then
    return null;
  end if;
  ends := now + make_interval(secs => extract(epoch from lease_duration)::double precision);
  update pglimits.states s
  set version = s.version + cardinality(lease_ids), held = s.held + wanted, next_expiry = least(s.next_expiry, ends),
      changed_at = now
  from pglimits.configs c
  where s.limit_id = state.limit_id and s.key = _take_alike.key and s.version = state.version
    and c.limit_id = state.limit_id and c.active and c.slot_decay_per_second = 0
    and state.held + wanted <= c."limit"
    and (not chosen
         or not exists (select from pglimits.leases l where l.lease_id = any (lease_ids))
            and not exists (select from pglimits.queue q where q.lease_id = any (lease_ids)));
  if not found then
    return null;
  end if;
  insert into pglimits.leases (lease_id, limit_id, key, slots, holder, fence, priority, lease_duration, claimed,
                               parts, acquired_at, expires_at)
  select asked.lease_id, state.limit_id, _take_alike.key, _take_alike.slots,
         nullif(holders -> (asked.nth - 1)::integer, 'null'), state.version + asked.nth, _take_alike.priority,
         ends - now, true, 1, now, ends
  from unnest(lease_ids) with ordinality as asked(lease_id, nth);
  return row('granted', lease_ids[1], array[state.version + 1], ends, null, null, null, null)::pglimits._answer;
end $$;

comment on function pglimits._take_alike(
  text, integer, text, interval, interval, integer, jsonb, uuid[], boolean, boolean, text) is
  'Grants requests that are alike if nothing is in the way, or refuses them; null if it is not so simple.';

-- Calls of rate_limit that are all alike, on one limit where nobody is in line: each has a turn, now or ahead, and none comes
-- after wait; or already the first would. waits: how long until their turns, in seconds.
create or replace function pglimits._turns_alike(
  name text, slots integer, key text, wait interval, holders jsonb, lease_ids uuid[], chosen boolean, strict boolean,
  channel text, out status text, out waits double precision[], out retry_after interval)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  wanted constant numeric := slots::bigint * cardinality(lease_ids);
  alive_for constant interval := case when channel is not null then pglimits._liveness() end;
  state record;
  config pglimits.configs;
  now timestamptz;
  decayed numeric;
  base numeric;
  first_in interval;
  last_in interval;
  noted boolean;
  arrival timestamptz;
  forget numeric;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if (slots >= 1 and current_setting('transaction_isolation') = 'read committed') is not true
     or pglimits._argument_fault('1 second', wait, 0, holders -> 0, strict, channel) is not null
  then
    return;
  end if;
  if cardinality(lease_ids) > 1 then
    if pglimits._not_each_its_own(lease_ids, holders) then
      return;
    end if;
  end if;
  if wait is not null then
    -- They may be refused, and that takes no lock. The clock is read after the snapshot was taken.
    select c as config, s.booked, s.next_expiry, s.next_look into state
    from pglimits.configs c
    cross join lateral (
      select x.booked, x.waiting, x.pinned, x.next_expiry, x.next_look from pglimits.states x
      where x.limit_id = c.limit_id and x.key = _turns_alike.key order by x.version desc limit 1) s
    where c.name = _turns_alike.name and c.active and c.slot_decay_per_second > 0 and slots <= c."limit"
      and s.waiting = 0 and s.pinned = 0;
    now := pglimits._now();
    if now < state.next_expiry and now < state.next_look then
      config := state.config;
      first_in := pglimits._until(
        config, greatest(state.booked, pglimits._decayed(config, now)) + slots - config."limit", now);
    end if;
    if first_in > wait then
      if chosen and pglimits._are_known(lease_ids) then
        return;
      end if;
      status := 'refused';
      retry_after := first_in;
      return;
    end if;
  end if;

  select s.* into state from pglimits.configs c
  cross join lateral (
    select x.limit_id, x.version, x.booked, x.waiting, x.pinned, x.last_arrival, x.passed, x.next_expiry, x.next_look
    from pglimits.states x
    where x.limit_id = c.limit_id and x.key = _turns_alike.key order by x.version desc limit 1 for update) s
  where c.name = _turns_alike.name and c.active and c.slot_decay_per_second > 0 and c.max_waiters is null;
  now := pglimits._now();
  if (state.waiting = 0 and state.pinned = 0 and now < state.next_expiry and now < state.next_look) is not true then
    return;
  end if;
  select c.* into config from pglimits.configs c
  where c.limit_id = state.limit_id and c.active and c.slot_decay_per_second > 0 and slots <= c."limit"
    and c.max_waiters is null
    and (not chosen
         or not exists (select from pglimits.leases l where l.lease_id = any (lease_ids))
            and not exists (select from pglimits.queue q where q.lease_id = any (lease_ids)));
  if not found then
    return;
  end if;
  decayed := pglimits._decayed(config, now);
  base := greatest(state.booked, decayed);
  last_in := pglimits._until(config, base + wanted - config."limit", now);
  if last_in > wait then
    return;
  end if;
  noted := chosen or last_in > interval '0';
  forget := case when noted then pglimits._forgotten(config, now) end;
  arrival := greatest(now, state.last_arrival + interval '1 microsecond');
  update pglimits.states s
  set version = s.version + 1, booked = base + wanted, passed = greatest(s.passed, forget), changed_at = now,
      last_arrival = case when noted then arrival + (cardinality(lease_ids) - 1) * interval '1 microsecond'
                          else s.last_arrival end,
      next_death = case when last_in > interval '0' then least(s.next_death, now + alive_for) else s.next_death end,
      next_look = case when last_in > interval '0' then least(s.next_look, now + alive_for) else s.next_look end
  where s.limit_id = state.limit_id and s.key = _turns_alike.key and s.version = state.version;
  status := 'granted';
  if not noted then
    waits := array_fill(0::double precision, array[cardinality(lease_ids)]);
    return;
  end if;
  -- Turns that have passed stay a while, for those who ask again because they did not hear of theirs.
  delete from pglimits.queue q
  where q.limit_id = state.limit_id and q.key = _turns_alike.key and q.turn > state.passed and q.turn <= forget
    and not q.pinned;
  with turns as (
    select asked.lease_id, asked.nth, greatest(base + slots * asked.nth - config."limit", decayed) as turn,
           pglimits._until(config, base + slots * asked.nth - config."limit", now) as turn_in
    from unnest(lease_ids) with ordinality as asked(lease_id, nth)
  ), booked as (
    insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, turn, for_rate, several, lease_duration,
                                holder, channel, expires_at, looks_at)
    select t.lease_id, state.limit_id, _turns_alike.key, slots, 0,
           arrival + (t.nth - 1) * interval '1 microsecond', t.turn, true, false, interval '5 minutes',
           nullif(holders -> (t.nth - 1)::integer, 'null'), channel, coalesce(now + alive_for, 'infinity'),
           now + t.turn_in
    from turns t
  )
  select array_agg(extract(epoch from t.turn_in)::double precision order by t.nth) into waits from turns t;
end $$;

comment on function pglimits._turns_alike(
  text, integer, text, interval, jsonb, uuid[], boolean, boolean, text) is
  'Gives turns on a rate limit to calls that are alike, or refuses them; its status is null if it is not so simple.';

-- Whether requests that are to be alike but for ids and holders give the same id twice, or too long a holder.
create or replace function pglimits._not_each_its_own(lease_ids uuid[], holders jsonb)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from jsonb_array_elements(holders) as h(holder) where length(h.holder::text) > 8000)
      or (select count(distinct u.id) < count(*) from unnest(lease_ids) as u(id));
end $$;

comment on function pglimits._not_each_its_own(uuid[], jsonb) is
  'Whether some of several ids are the same, or some of their holders too long.';

-- Whether a live lease, or a waiter, has one of these ids: what is wrong with a request now, or in its way, is then no answer to it.
create or replace function pglimits._are_known(lease_ids uuid[])
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from pglimits.leases l where l.lease_id = any (lease_ids) and l.expires_at > pglimits._now())
      or exists (select from pglimits.queue q where q.lease_id = any (lease_ids));
end $$;

comment on function pglimits._are_known(uuid[]) is 'Whether a live lease, or a waiter, has one of these ids.';

-- Leases that are all on one (limit, key) where nobody waits, and on no other. Returns the ids that were live.
create or replace function pglimits._release_alike(lease_ids uuid[])
returns uuid[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  state record;
  now timestamptz;
  freed bigint;
  live uuid[];
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if cardinality(lease_ids) > 1 then
    if (select count(*) = cardinality(lease_ids) and min(l.limit_id) = max(l.limit_id) and min(l.key) = max(l.key)
        from pglimits.leases l where l.lease_id = any (lease_ids)) is not true
    then
      return null;
    end if;
  end if;
  select s.* into state from pglimits.leases l
  cross join lateral (
    select x.limit_id, x.key, x.version, x.waiting, x.pinned, x.next_look from pglimits.states x
    where x.limit_id = l.limit_id and x.key = l.key order by x.version desc limit 1 for update) s
  where l.lease_id = lease_ids[1] and l.parts = 1;
  if (state.waiting = 0 and state.pinned = 0 and state.next_look = 'infinity') is not true then
    return null;
  end if;
  now := pglimits._now();
  -- Read through the index on lease_id, and so in the order in which renew locks them. One alone needs no sum, which takes
  -- as long as its deletion.
  if cardinality(lease_ids) = 1 then
    delete from pglimits.leases l
    where l.lease_id = lease_ids[1]
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    returning l.slots, case when l.expires_at > now then lease_ids else '{}' end into freed, live;
  else
    with gone as (
      delete from pglimits.leases l
      where l.lease_id = any (lease_ids)
        and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
      returning l.lease_id, l.slots, l.expires_at > now as live
    )
    select sum(g.slots), coalesce(array_agg(g.lease_id) filter (where g.live), '{}') into freed, live from gone g;
  end if;
  if freed > 0 then
    update pglimits.states s set version = s.version + 1, held = s.held - freed, changed_at = now
    where s.limit_id = state.limit_id and s.key = state.key and s.version = state.version;
  end if;
  return coalesce(live, '{}');
end $$;

comment on function pglimits._release_alike(uuid[]) is
  'Ends leases on one (limit, key) if nobody waits there: the ids that were live; null if it is not so simple.';
