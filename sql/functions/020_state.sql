-- The state of one (limit, key): locking it, bringing it up to date, saving it. Everything that decides goes
--   _lock  ->  read the config and the clock  ->  _settle  ->  decide  ->  _save
-- in the order of (limit id, key) where there are several, and so no two callers ever wait for each other in a ring.

-- Virtual time: the slots that have decayed since the limit was created. A rate change bends it and never makes it jump.
create or replace function pglimits._decayed(config pglimits.configs, at timestamptz)
returns numeric
language sql
immutable
return config.decayed + config.slot_decay_per_second::numeric * extract(epoch from at - config.decayed_at);

comment on function pglimits._decayed(pglimits.configs, timestamptz) is
  'Virtual time of a limit at a moment: the slots that had decayed since it was created. A turn, a place in virtual '
  'time, is worth the same however the rate changes. After GCRA, the virtual scheduling algorithm of ITU-T I.371.';

-- Turns that came a while ago are kept for those who ask again because they did not hear of theirs. Up to this virtual time
-- that is long enough; null while a changed rate makes it hard to tell.
create or replace function pglimits._forgotten(config pglimits.configs, now timestamptz)
returns numeric
language sql
immutable
return case when config.decayed_at <= now - pglimits._liveness()
            then pglimits._decayed(config, now - pglimits._liveness()) end;

comment on function pglimits._forgotten(pglimits.configs, timestamptz) is
  'The virtual time up to which turns that have come need not be remembered any more; null: none is known.';

-- How long until a virtual time, rounded up so that nobody who sleeps just that long is early.
create or replace function pglimits._until(config pglimits.configs, turn numeric, at timestamptz)
returns interval
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  slots numeric := turn - pglimits._decayed(config, at);
begin
  if slots <= 0 then
    return interval '0';
  elsif config.slot_decay_per_second = 0 then
    return null;
  end if;
  return make_interval(secs => least(
    ceil(slots * 1000000 / config.slot_decay_per_second::numeric) / 1000000, 3e9)::double precision);
end $$;

comment on function pglimits._until(pglimits.configs, numeric, timestamptz) is
  'How long from a moment until a virtual time; zero when it has passed, null when it never comes.';

-- Locks the state of a (limit, key) and returns it. Null where there is none: it was never used, or has been swept or deleted.
create or replace function pglimits._lock_used(limit_id bigint, key text)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  state pglimits.states;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    -- Its snapshot may be older than the last change of the limit: then this is a serialization failure.
    perform from pglimits.configs c where c.limit_id = _lock_used.limit_id for share;
  end if;
  select s.* into state from pglimits.states s
  where s.limit_id = _lock_used.limit_id and s.key = _lock_used.key
  order by s.version desc limit 1 for update;
  return state;
end $$;

comment on function pglimits._lock_used(bigint, text) is
  'Locks and returns the state of a (limit, key); null where there is none.';

-- Locks the states of several (limit, key)s, in their order, as far as they have any. Who needs more than one does so before it
-- touches a lease or a waiter of any of them: delete_limit holds the states of one limit, and touches its leases on others.
create or replace function pglimits._lock_several(limit_ids bigint[], keys text[])
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._lock_used(p.limit_id, p.key)
  from (select distinct u.limit_id, u.key collate "C" as key
        from unnest(limit_ids, keys) as u(limit_id, key) order by 1, 2) p;
end $$;

comment on function pglimits._lock_several(bigint[], text[]) is
  'Locks the states of several (limit, key)s, in their order, where there are any.';

-- Locks the state of a (limit, key) and returns it; creates it at its first use. Null when the limit is gone.
create or replace function pglimits._lock(limit_id bigint, key text, beside_another boolean default false)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  state pglimits.states;
begin
  loop
    state := pglimits._lock_used(limit_id, key);
    exit when state.limit_id is not null;
    exit when not pglimits._create_state(limit_id, key, beside_another);
  end loop;
  return state;
end $$;

comment on function pglimits._lock(bigint, text, boolean) is
  'Locks and returns the state of a (limit, key), creating it at its first use; null when the limit is gone. beside_another: '
  'the caller has a state of this limit locked already.';

-- Locks every state of a limit whose config the caller has locked. Who has one of them locked may add a later one without
-- a lock of the config; so each is looked for when the one before it has been locked.
create or replace function pglimits._lock_every(limit_id bigint)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  last_key text := '';
begin
  perform from pglimits.states s where s.limit_id = _lock_every.limit_id and s.key = '' for update;
  loop
    select s.key into last_key from pglimits.states s
    where s.limit_id = _lock_every.limit_id and s.key > last_key
    order by s.key limit 1 for update;
    exit when not found;
  end loop;
end $$;

comment on function pglimits._lock_every(bigint) is
  'Locks every state of a limit whose config is locked, in the order of their keys.';

-- Creates the state of a (limit, key), unless somebody else does. False when the limit is gone.
create or replace function pglimits._create_state(limit_id bigint, key text, beside_another boolean)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if not beside_another then
    -- Shared with other first users, not with update_limit, which has to meet every state of the limit. Who has another one of
    -- them locked does not wait for the config: whoever has that may be waiting for the other state, and comes here later.
    perform from pglimits.configs c where c.limit_id = _create_state.limit_id for share;
    if not found then
      return false;
    end if;
  end if;
  insert into pglimits.keys (limit_id, key) values (_create_state.limit_id, _create_state.key) on conflict do nothing;
  if found then
    insert into pglimits.states (limit_id, key, version, changed_at)
    select c.limit_id, _create_state.key, c.fence_floor, pglimits._now()
    from pglimits.configs c where c.limit_id = _create_state.limit_id;
  end if;
  return true;
end $$;

comment on function pglimits._create_state(bigint, text, boolean) is
  'Creates the state of a (limit, key), unless somebody else does. False when the limit is gone. beside_another: as for _lock.';

-- Writes a state back if it differs from what was locked.
create or replace function pglimits._save(state pglimits.states, was pglimits.states, now timestamptz)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if state is not distinct from was then
    return;
  end if;
  update pglimits.states s
  set version = greatest(state.version, was.version + 1), held = state.held, booked = state.booked,
      pinned = state.pinned, peak = state.peak, next_expiry = state.next_expiry, waiting = state.waiting,
      head_rank = state.head_rank, head_arrival = state.head_arrival, last_arrival = state.last_arrival, passed = state.passed,
      next_death = state.next_death, next_waiter_death = state.next_waiter_death, next_look = state.next_look,
      changed_at = now
  where s.limit_id = was.limit_id and s.key = was.key and s.version = was.version;
end $$;

comment on function pglimits._save(pglimits.states, pglimits.states, timestamptz) is
  'Writes a locked state back under a higher version, if it has changed.';

-- Tells a waiting process to look, or that it was granted a lease, with its fence and its end as microseconds since 1970.
-- A hint only, that may be lost: what is true is in its row.
create or replace function pglimits._tell(
  channel text, about uuid, fence bigint default null, ends timestamptz default null)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if channel is not null then
    perform pg_notify(channel, case
      when about is null then ''
      when ends is null then about::text
      else about || ' ' || fence || ' ' || (extract(epoch from ends) * 1000000)::bigint end);
  end if;
end $$;

comment on function pglimits._tell(text, uuid, bigint, timestamptz) is
  'Notifies a waiting process about one of its requests (null: about all of them), and how it was granted, if it was.';

-- Whether a concurrency request fits now, and if not, from when on time alone may make it fit.
create or replace function pglimits._fits_at(
  state pglimits.states, config pglimits.configs, slots integer, now timestamptz)
returns timestamptz
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  fits_at timestamptz := timestamptz '-infinity';
  turn_in interval;
begin
  if slots > config."limit" then
    return timestamptz 'infinity';
  end if;
  if state.held::bigint + slots > config."limit" then
    fits_at := greatest(state.next_expiry, now + interval '1 millisecond');
  end if;
  if config.slot_decay_per_second > 0 then
    turn_in := pglimits._until(
      config, (pglimits._find_turn(state, config, slots, pglimits._decayed(config, now))).turn, now);
    if turn_in > interval '0' then
      fits_at := greatest(fits_at, now + turn_in);
    end if;
  end if;
  return fits_at;
end $$;

comment on function pglimits._fits_at(pglimits.states, pglimits.configs, integer, timestamptz) is
  '-infinity if that many slots can be held now; else the earliest moment at which time alone may have made room.';

-- Takes leases out that have ended. One that is being renewed or released right now is left to whoever does that.
create or replace function pglimits._take_expired(state pglimits.states, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  freed bigint;
begin
  with ended as (
    select l.lease_id from pglimits.leases l
    where l.limit_id = state.limit_id and l.key = state.key
      and l.expires_at >= state.next_expiry and l.expires_at <= now
    for update skip locked
  ), gone as (
    delete from pglimits.leases l using ended e
    where l.lease_id = e.lease_id
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    returning l.slots
  )
  select coalesce(sum(g.slots), 0) into freed from gone g;
  state.held := state.held - freed;
  state.next_expiry := coalesce((
    select l.expires_at from pglimits.leases l
    where l.limit_id = state.limit_id and l.key = state.key and l.expires_at >= state.next_expiry
    order by l.expires_at limit 1), 'infinity');
  return state;
end $$;

comment on function pglimits._take_expired(pglimits.states, timestamptz) is
  'Frees the slots of leases that have ended by now.';

-- Whether a limit can never grant what somebody waits for. One of 0 may grant it when it is no longer 0.
create or replace function pglimits._is_hopeless(config pglimits.configs, slots integer, for_rate boolean)
returns boolean
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return slots > config."limit" and config."limit" > 0 or for_rate and config.slot_decay_per_second = 0;
end $$;

comment on function pglimits._is_hopeless(pglimits.configs, integer, boolean) is
  'Whether a limit, as it is now, can never grant so many slots. for_rate: by decay alone.';

-- Grants the head of the queue, and the next, as long as they fit: strictly in order, so that a wide request is not
-- starved by narrow ones. Then makes sure that whoever is left at the head knows when to look.
create or replace function pglimits._advance(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  head pglimits.queue;
  fits_at timestamptz;
begin
  loop
    if state.waiting > 0 then
      select q.* into head from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.turn is null
        and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)
      order by q.rank, q.arrival limit 1;
    end if;
    if state.waiting = 0 or head.lease_id is null then
      state.waiting := 0;
      state.next_look := state.next_death;
      exit;
    end if;
    state.head_rank := head.rank;
    state.head_arrival := head.arrival;

    if head.expires_at <= now then
      -- It may have called in since it was read; then it is looked at again.
      delete from pglimits.queue q
      where q.lease_id = head.lease_id
        and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key and q.expires_at <= now;
      if found then
        state.waiting := state.waiting - 1;
      end if;
      continue;
    end if;

    if pglimits._is_hopeless(config, head.slots, head.for_rate) then
      -- It is told, asks again, and gets the error.
      delete from pglimits.queue q
      where q.lease_id = head.lease_id
        and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key;
      state.waiting := state.waiting - 1;
      perform pglimits._tell(head.channel, head.lease_id);
      continue;
    end if;

    if head.for_rate then
      fits_at := case when config."limit" = 0 then timestamptz 'infinity' else timestamptz '-infinity' end;
    else
      fits_at := pglimits._fits_at(state, config, head.slots, now);
    end if;

    if fits_at = '-infinity' and head.several then
      -- Granting it here would take locks out of order. It keeps its place until it has tried for itself.
      if not head.called and head.kept_until is null then
        update pglimits.queue q set called = true
        where q.lease_id = head.lease_id
          and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key;
        perform pglimits._tell(head.channel, head.lease_id);
      end if;
      fits_at := timestamptz 'infinity';
    end if;

    if fits_at > '-infinity' then
      state.next_look := least(state.next_death, fits_at, head.expires_at);
      if head.looks_at > state.next_look then
        update pglimits.queue q set looks_at = state.next_look
        where q.lease_id = head.lease_id
          and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key;
        perform pglimits._tell(head.channel, head.lease_id);
      end if;
      exit;
    end if;

    state := pglimits._hand_over(state, config, head, now);
  end loop;
  return state;
end $$;

comment on function pglimits._advance(pglimits.states, pglimits.configs, timestamptz) is
  'Grants waiters from the head of the queue as long as they fit, and notes when time alone may free the next one.';

-- Takes slots under a lease: the one place where held grows.
create or replace function pglimits._take_slots(
  state pglimits.states, config pglimits.configs, lease_id uuid, slots integer, rank integer,
  lease_duration interval, holder jsonb, claimed boolean, parts integer, ends timestamptz, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if config.slot_decay_per_second > 0 then
    state := pglimits._book(state, config, slots, pglimits._decayed(config, now));
  end if;
  state.version := state.version + 1;
  state.held := state.held + slots;
  state.next_expiry := least(state.next_expiry, ends);
  insert into pglimits.leases (lease_id, limit_id, key, slots, holder, fence, priority, lease_duration, claimed,
                               parts, acquired_at, expires_at)
  values (lease_id, state.limit_id, state.key, slots, holder, state.version, -rank, lease_duration, claimed, parts,
          now, ends);
  return state;
end $$;

comment on function pglimits._take_slots(
  pglimits.states, pglimits.configs, uuid, integer, integer, interval, jsonb, boolean, integer, timestamptz, timestamptz) is
  'Records a lease and returns the state with its slots held; the fence is the state''s new version.';

-- Gives the waiter at the head what it waits for. A lease handed over ends as soon as its waiter would have died,
-- until the waiter claims it: a dead process does not hold a slot for a whole lease.
create or replace function pglimits._hand_over(
  state pglimits.states, config pglimits.configs, head pglimits.queue, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  ends timestamptz;
begin
  state.waiting := state.waiting - 1;
  if head.for_rate then
    state := pglimits._book(state, config, head.slots, pglimits._decayed(config, now));
    state.next_death := least(state.next_death, head.expires_at);
    -- A turn that comes at once is remembered from now on.
    update pglimits.queue q set turn = greatest(state.booked - config."limit", pglimits._decayed(config, now))
    where q.lease_id = head.lease_id
      and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key;
  else
    -- It may have called in since it was read, and count on that.
    delete from pglimits.queue q
    where q.lease_id = head.lease_id
      and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key
    returning q.expires_at into head.expires_at;
    ends := least(head.expires_at, now + head.lease_duration);
    state := pglimits._take_slots(state, config, head.lease_id, head.slots, head.rank, head.lease_duration,
                                  head.holder, false, 1, ends, now);
  end if;
  perform pglimits._tell(head.channel, head.lease_id, state.version, ends);
  return state;
end $$;

comment on function pglimits._hand_over(pglimits.states, pglimits.configs, pglimits.queue, timestamptz) is
  'Turns the waiter at the head into a lease, or gives it its turn on a rate limit, and tells it.';

-- Brings a locked state up to the moment: what has ended is taken out, what fits is granted.
create or replace function pglimits._settle(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if now >= state.next_expiry then
    state := pglimits._take_expired(state, now);
  end if;
  state := pglimits._unpin(state, config, now);
  if now >= state.next_death then
    state := pglimits._bury_sleepers(state, config, now);
  end if;
  return pglimits._advance(state, config, now);
end $$;

comment on function pglimits._settle(pglimits.states, pglimits.configs, timestamptz) is
  'Applies to a locked state what time and the last change have made possible.';
