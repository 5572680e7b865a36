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
      pinned = state.pinned, next_expiry = state.next_expiry, waiting = state.waiting, head_rank = state.head_rank,
      head_arrival = state.head_arrival, last_arrival = state.last_arrival, passed = state.passed,
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

-- Tells those who sleep towards a turn to look.
create or replace function pglimits._tell_sleepers(state pglimits.states, decayed numeric)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._tell(w.channel, null)
  from (select distinct q.channel from pglimits.queue q
        where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed) w;
end $$;

comment on function pglimits._tell_sleepers(pglimits.states, numeric) is
  'Notifies those who sleep towards a turn on a rate limit that lies beyond a virtual time.';

-- The earliest turn for so many slots, not before a virtual time, at which nobody goes too fast: neither by what is
-- booked, nor by the turns pinned further ahead, between which it may find room.
create or replace function pglimits._find_turn(
  state pglimits.states, config pglimits.configs, slots integer, not_before numeric)
returns pglimits._turn
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  found_turn pglimits._turn;
  pin record;
begin
  found_turn.booked := state.booked;
  found_turn.turn := greatest(not_before, found_turn.booked + slots - config."limit");
  if state.pinned > 0 then
    for pin in
      select q.turn, q.lease_id, q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.pinned
      order by q.turn, q.lease_id
    loop
      exit when found_turn.turn <= pin.turn and pglimits._leaves_room(
        state, config, greatest(found_turn.booked, found_turn.turn) + slots, pin.turn, pin.lease_id);
      found_turn.booked := greatest(found_turn.booked, pin.turn) + pin.slots;
      found_turn.passed_turn := pin.turn;
      found_turn.passed_id := pin.lease_id;
      found_turn.turn := greatest(not_before, found_turn.booked + slots - config."limit");
    end loop;
  end if;
  return found_turn;
end $$;

comment on function pglimits._find_turn(pglimits.states, pglimits.configs, integer, numeric) is
  'The earliest turn on a rate limit that can be had for so many slots, not before a virtual time.';

-- Whether pinned turns, from the given one on, can still be kept if so much is booked before them.
create or replace function pglimits._leaves_room(
  state pglimits.states, config pglimits.configs, booked numeric, from_turn numeric, from_id uuid)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  pin record;
begin
  for pin in
    select q.turn, q.slots from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.pinned
      and (q.turn, q.lease_id) >= (from_turn, from_id)
    order by q.turn, q.lease_id
  loop
    if booked <= pin.turn then
      return true;  -- all has decayed by then: what comes later is as it was
    end if;
    booked := booked + pin.slots;
    if booked > pin.turn + config."limit" then
      return false;
    end if;
  end loop;
  return true;
end $$;

comment on function pglimits._leaves_room(pglimits.states, pglimits.configs, numeric, numeric, uuid) is
  'Whether the pinned turns from a given one on can be kept if so much is booked before them.';

-- Books slots at the earliest turn that is not before a virtual time. Their turn is then booked - limit, or that time.
create or replace function pglimits._book(
  state pglimits.states, config pglimits.configs, slots integer, not_before numeric)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  at pglimits._turn := pglimits._find_turn(state, config, slots, not_before);
begin
  if at.passed_turn is not null then
    state := pglimits._unpin(state, at.passed_turn, at.passed_id);
  end if;
  state.booked := greatest(state.booked, at.turn) + slots;
  return state;
end $$;

comment on function pglimits._book(pglimits.states, pglimits.configs, integer, numeric) is
  'Raises the level of a rate limit by slots, at the earliest turn that is not before a virtual time.';

-- Books the pinned turns up to a given one: it has come, or somebody else goes after it.
create or replace function pglimits._unpin(state pglimits.states, up_to_turn numeric, up_to_id uuid)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  pin record;
begin
  for pin in
    select q.turn, q.slots, q.lease_id from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.pinned
      and (q.turn, q.lease_id) <= (up_to_turn, up_to_id)
    order by q.turn, q.lease_id
  loop
    state.booked := greatest(state.booked, pin.turn) + pin.slots;
    state.pinned := state.pinned - 1;
    update pglimits.queue q set pinned = false
    where q.lease_id = pin.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  end loop;
  return state;
end $$;

comment on function pglimits._unpin(pglimits.states, numeric, uuid) is
  'Books the pinned turns up to a given one.';

-- The first of all where the level is to be changed: what is booked later than its turn would take as long again to decay.
create or replace function pglimits._unpin(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if state.pinned > 0 then
    return pglimits._unpin(state, pglimits._decayed(config, now), 'ffffffff-ffff-ffff-ffff-ffffffffffff');
  end if;
  return state;
end $$;

comment on function pglimits._unpin(pglimits.states, pglimits.configs, timestamptz) is
  'Books the pinned turns that have come.';

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

-- Lets those who sleep behind given-up turns move up. Whoever cannot be told (plain SQL, or bound to another limit)
-- goes at the time it knows, which is now later than it needs to be: so its turn is pinned from here on.
create or replace function pglimits._close_gaps(
  state pglimits.states, config pglimits.configs, now timestamptz, turns numeric[], slots numeric[])
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed numeric := pglimits._decayed(config, now);
  first numeric := (select min(u.turn) from unnest(turns) as u(turn));
  fixed bigint;
  fixed_slots bigint;
  sleeper record;
begin
  state.booked := state.booked - (select sum(u.slots) from unnest(slots) as u(slots));
  with pins as (
    update pglimits.queue q set pinned = true
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > first and not q.pinned
      and (q.expires_at = 'infinity' or q.several)
    returning q.slots
  )
  select count(*), coalesce(sum(p.slots), 0) into fixed, fixed_slots from pins p;
  state.pinned := state.pinned + fixed;
  state.booked := state.booked - fixed_slots;

  if state.pinned = 0 then
    -- A turn that comes by it comes now, and is remembered from now on.
    update pglimits.queue q set turn = greatest(q.turn - b.given_up, decayed)
    from (
      select x.lease_id, sum(x.slots) over (order by x.turn) as given_up
      from (
        select q.lease_id, q.turn, 0 as slots from pglimits.queue q
        where q.limit_id = state.limit_id and q.key = state.key and q.turn > first
        union all
        select null, u.turn, u.slots from unnest(turns, slots) as u(turn, slots)
      ) x
    ) b
    where q.lease_id = b.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  else
    -- One by one, as each has to find its way between the pinned turns.
    state.booked := state.booked - coalesce((
      select sum(q.slots) from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.turn > first and not q.pinned), 0);
    for sleeper in
      select q.lease_id, q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.turn > first and not q.pinned
      order by q.turn
    loop
      state := pglimits._book(state, config, sleeper.slots, decayed);
      update pglimits.queue q set turn = greatest(state.booked - config."limit", decayed)
      where q.lease_id = sleeper.lease_id
        and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
    end loop;
  end if;
  perform pglimits._tell_sleepers(state, decayed);
  return state;
end $$;

comment on function pglimits._close_gaps(pglimits.states, pglimits.configs, timestamptz, numeric[], numeric[]) is
  'Gives turns back that were given up before they came, and moves those up who sleep behind them.';

-- Takes requests out of the queue of a (limit, key), and gives the turns back that they had ahead.
create or replace function pglimits._withdraw(
  state pglimits.states, config pglimits.configs, lease_ids uuid[], now timestamptz)
returns pglimits._withdrawn
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed numeric := pglimits._decayed(config, now);
  live uuid[];
  left_line bigint;
  unpinned bigint;
  turns numeric[];
  slots numeric[];
begin
  with gone as (
    delete from pglimits.queue q
    where q.lease_id = any (lease_ids)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning q.lease_id, q.turn, q.slots, q.expires_at, q.pinned
  )
  select count(*) filter (where g.turn is null),
         coalesce(array_agg(g.lease_id) filter (where g.expires_at > now and (g.turn is null or g.turn > decayed)), '{}'),
         array_agg(g.turn) filter (where g.turn > decayed and not g.pinned),
         array_agg(g.slots) filter (where g.turn > decayed and not g.pinned),
         count(*) filter (where g.pinned)
  into left_line, live, turns, slots, unpinned from gone g;
  state.waiting := state.waiting - left_line;
  state.pinned := state.pinned - unpinned;
  if turns is not null then
    state := pglimits._close_gaps(state, config, now, turns, slots);
  end if;
  return row(state, live)::pglimits._withdrawn;
end $$;

comment on function pglimits._withdraw(pglimits.states, pglimits.configs, uuid[], timestamptz) is
  'Takes requests out of the queue of a (limit, key) and gives their turns back. Returns the state, and which were live.';

-- Removes sleepers of a rate limit whose process died before their turn. Who died after it has used its turn.
create or replace function pglimits._bury_sleepers(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed numeric := pglimits._decayed(config, now);
  turns numeric[];
  slots numeric[];
  unpinned bigint;
begin
  with dead as (
    delete from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.expires_at <= now
    returning q.turn, q.slots, q.pinned
  )
  select array_agg(d.turn) filter (where not d.pinned),
         array_agg(d.slots) filter (where not d.pinned),
         count(*) filter (where d.pinned)
  into turns, slots, unpinned from dead d;
  state.pinned := state.pinned - unpinned;
  if turns is not null then
    state := pglimits._close_gaps(state, config, now, turns, slots);
  end if;
  state.next_death := coalesce((
    select min(q.expires_at) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed), 'infinity');
  return state;
end $$;

comment on function pglimits._bury_sleepers(pglimits.states, pglimits.configs, timestamptz) is
  'Removes those who slept towards a turn on a rate limit and died, and gives their turns back.';

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

    if (head.slots > config."limit" and config."limit" > 0)
       or (head.for_rate and config.slot_decay_per_second = 0) then
      -- It can never be granted now. It is told, asks again, and gets the error.
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
    update pglimits.queue q set turn = state.booked - config."limit"
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
