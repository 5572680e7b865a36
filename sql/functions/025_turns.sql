-- Turns on rate limits that are reserved ahead: finding one, booking it, and moving those up who sleep behind one that is given up.

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
  -- Moments are whole microseconds; what that puts off does not count.
  rounded constant numeric := config.slot_decay_per_second::numeric / 1000000;
  peak constant numeric := greatest(state.peak, config."limit" + 2 * rounded);
  found_turn pglimits._turn;
  first_turn numeric := numeric '-Infinity';
  slots_since numeric := 0;
  booked_since numeric := numeric '-Infinity';
  pin record;
begin
  found_turn.booked := state.booked;
  found_turn.turn := greatest(not_before, found_turn.booked + slots - config."limit");
  if state.pinned > 0 then
    -- Back to where earlier ones cannot matter at that time: none leaves more than the peak, and those since have booked as much.
    for pin in
      select q.turn, q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.pinned and q.turn < not_before
      order by q.turn desc, q.lease_id desc
    loop
      first_turn := pin.turn;
      slots_since := slots_since + pin.slots;
      booked_since := greatest(booked_since, pin.turn + slots_since);
      exit when booked_since >= pin.turn + peak + slots_since;
    end loop;
    for pin in
      select q.turn, q.lease_id, q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.pinned and q.turn >= first_turn
      order by q.turn, q.lease_id
    loop
      exit when found_turn.turn <= pin.turn + rounded and pglimits._leaves_room(
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

-- Notes how much the pinned turns leave on the level, those that are kept although more was added since among them.
create or replace function pglimits._note_peak(state pglimits.states)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  booked numeric := state.booked;
  pin record;
begin
  state.peak := 0;
  if state.pinned > 0 then
    for pin in
      select q.turn, q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.pinned
      order by q.turn, q.lease_id
    loop
      booked := greatest(booked, pin.turn) + pin.slots;
      state.peak := greatest(state.peak, booked - pin.turn);
    end loop;
  end if;
  return state;
end $$;

comment on function pglimits._note_peak(pglimits.states) is 'Notes how much the pinned turns leave on the level at most.';

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
    if booked > pin.turn + config."limit" + config.slot_decay_per_second::numeric / 1000000 then
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
    update pglimits.queue q set pinned = false, gap = greatest(pin.turn - state.booked, 0)
    where q.lease_id = pin.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
    state.booked := greatest(state.booked, pin.turn) + pin.slots;
    state.pinned := state.pinned - 1;
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

-- How long until every rate limit of a request has a turn for it. In seconds, never in days: these may have 23 or 25 hours.
create or replace function pglimits._common_turn(
  request pglimits._request, at integer[], states pglimits.states[], configs pglimits.configs[], now timestamptz)
returns interval
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  go_in interval := interval '0';
  later interval := interval '0';
  config pglimits.configs;
begin
  loop
    for p in 1 .. cardinality(at) loop
      config := configs[at[p]];
      continue when config.active is not true;
      later := greatest(later, pglimits._until(config, (pglimits._find_turn(
        states[at[p]], config, request.slots[p], pglimits._decayed(config, now + go_in))).turn, now));
    end loop;
    -- A turn that one limit has put off may not be free on the others.
    exit when later = go_in or cardinality(at) = 1;
    go_in := later;
  end loop;
  return later;
end $$;

comment on function pglimits._common_turn(
  pglimits._request, integer[], pglimits.states[], pglimits.configs[], timestamptz) is
  'How long until every rate limit of a request has a turn for it.';

-- Places a turn on one of the rate limits of a request. The level rises at once; but if another one is slower, so that the turn
-- lies later than this limit needs, it is only pinned: charged now, the slots would have decayed before they are used, and kept
-- back until then, they would be missing to others. So it is where somebody keeps a turn that this limit no longer has.
create or replace function pglimits._place_turn(
  state pglimits.states, config pglimits.configs, slots integer, turn_in interval, several boolean, stays_pinned boolean,
  now timestamptz)
returns pglimits._placed
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
begin
  if several and turn_in > interval '0' and (
    stays_pinned or pglimits._until(config, (pglimits._find_turn(state, config, slots, decayed)).turn, now) <> turn_in)
  then
    state.pinned := state.pinned + 1;
    return row(state, pglimits._decayed(config, now + turn_in), true)::pglimits._placed;
  end if;
  state := pglimits._book(state, config, slots, decayed);
  return row(state, greatest(state.booked - config."limit", decayed), false)::pglimits._placed;
end $$;

comment on function pglimits._place_turn(
  pglimits.states, pglimits.configs, integer, interval, boolean, boolean, timestamptz) is
  'Books or pins a turn that comes after turn_in. Returns the state with it, and where in virtual time it lies.';

-- Takes a turn on a rate limit, and notes it if it may be asked for again.
-- arrival: when it arrived, if it has stood in line.
create or replace function pglimits._take_turn(
  state pglimits.states, config pglimits.configs, request pglimits._request, slots integer, turn_in interval,
  several boolean, arrival timestamptz, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  alive_until timestamptz := case when request.channel is null then 'infinity' else now + pglimits._liveness() end;
  forget numeric := pglimits._forgotten(config, now);
  placed constant pglimits._placed := pglimits._place_turn(state, config, slots, turn_in, several, false, now);
begin
  state := placed.state;
  if turn_in = interval '0' and not request.chosen then
    return state;
  end if;
  -- Turns that have passed stay a while, for those who ask again because they did not hear of theirs.
  delete from pglimits.queue q
  where q.limit_id = state.limit_id and q.key = state.key and q.turn > state.passed and q.turn <= forget and not q.pinned;
  state.passed := greatest(state.passed, forget);
  arrival := coalesce(arrival, greatest(now, state.last_arrival + interval '1 microsecond'));
  state.last_arrival := greatest(state.last_arrival, arrival);
  insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, turn, pinned, for_rate, several, limit_ids, keys,
                              seen, lease_duration, holder, channel, expires_at, looks_at)
  values (request.lease_id, state.limit_id, state.key, slots, request.rank, arrival, placed.turn, placed.pinned, true, several,
          case when several then request.limit_ids end, case when several then request.keys end,
          case when several then pglimits._changes(request.limit_ids) end,
          request.lease_duration, request.holder, request.channel, alive_until, now + turn_in);
  if turn_in > interval '0' then
    state.next_death := least(state.next_death, alive_until);
    state.next_look := least(state.next_look, alive_until);
  end if;
  return state;
end $$;

comment on function pglimits._take_turn(
  pglimits.states, pglimits.configs, pglimits._request, integer, interval, boolean, timestamptz, timestamptz) is
  'Records a turn on a rate limit, now or ahead, and returns the state with it booked or pinned.';

-- Whether all who sleep from a turn on move by just what is given up before them: nobody has turns on other limits too, or cannot
-- be told, and no gap waits to be closed.
create or replace function pglimits._move_alike(state pglimits.states, decayed numeric, from_turn numeric)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return state.pinned = 0 and not exists (
    select from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.turn >= from_turn
      and (q.several or q.expires_at = 'infinity' and not q.added or q.called));
end $$;

comment on function pglimits._move_alike(pglimits.states, numeric, numeric) is
  'Whether all who sleep on a rate limit from a turn on move by just what is given up before them.';

-- Gives up turns that have not come: those who sleep behind them move up. slots: what each leaves free right behind its turn;
-- nothing where it was pinned.
create or replace function pglimits._close_gaps(
  state pglimits.states, config pglimits.configs, now timestamptz, turns numeric[], slots numeric[])
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  first constant numeric := (select min(u.turn) from unnest(turns) as u(turn));
  given_up constant numeric := (select sum(u.slots) from unnest(slots) as u(slots));
  gap record;
  called text;
begin
  if pglimits._move_alike(state, decayed, first)
    and state.booked - given_up - pglimits._reserved(state, decayed) >= decayed
  then
    state.booked := state.booked - given_up;
    -- Also those whose turn comes by it: it comes now, and is remembered from now on.
    perform pglimits._tell_sleepers(state, decayed);
    update pglimits.queue q set turn = greatest(q.turn - b.given_up, decayed)
    from (
      select x.lease_id, sum(x.slots) over (order by x.turn, x.lease_id is null) as given_up
      from (
        select q.lease_id, q.turn, 0 as slots from pglimits.queue q
        where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.turn >= first
        union all
        select null, u.turn, u.slots from unnest(turns, slots) as u(turn, slots)
      ) x
    ) b
    where q.lease_id = b.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
    return state;
  end if;
  for gap in select u.turn, u.slots from unnest(turns, slots) as u(turn, slots) loop
    -- Who is pinned on all its limits goes so late because it did not fit before, or between, other turns.
    update pglimits.queue q set called = true
    where q.lease_id = (
      select n.lease_id from pglimits.queue n
      where n.limit_id = state.limit_id and n.key = state.key and n.pinned and n.turn >= gap.turn
        and not exists (select from pglimits.queue o where o.lease_id = n.lease_id and not o.pinned)
      order by n.turn limit 1)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning q.channel into called;
    perform pglimits._tell(called, null);
    continue when gap.slots = 0;
    update pglimits.queue q set gap = q.gap + gap.slots, called = true
    where q.lease_id = (
      select n.lease_id from pglimits.queue n
      where n.limit_id = state.limit_id and n.key = state.key and n.turn > decayed and n.turn > gap.turn and not n.pinned
      order by n.turn limit 1)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning q.channel into called;
    if found then
      perform pglimits._tell(called, null);
    else
      state.booked := state.booked - gap.slots;
    end if;
  end loop;
  return (pglimits._rearrange(array[state], array[config], now))[1];
end $$;

comment on function pglimits._close_gaps(pglimits.states, pglimits.configs, timestamptz, numeric[], numeric[]) is
  'Gives turns back that were given up before they came, and moves those up who sleep behind them.';

-- Who has to be looked at when something changes for those who sleep on some locked states, in the order in which they go; null
-- if nobody has: it begins with the first who is called, or sleeps over several limits of which one was changed.
create or replace function pglimits._sleepers(states pglimits.states[], configs pglimits.configs[], now timestamptz)
returns pglimits._sleeper[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  place_ids bigint[];
  place_keys text[];
  decayed numeric[];
  rates numeric[];
  changes integer[];
  changed boolean[];
  -- Of each turn that lies ahead here: whose it is, on which state, the how manieth there, and when the sleeper goes.
  ids uuid[];
  at integer[];
  nths bigint[];
  goes_at numeric[];
  from_here numeric;
  and_before numeric;
begin
  for i in 1 .. cardinality(states) loop
    place_ids[i] := (states[i]).limit_id;
    place_keys[i] := (states[i]).key;
    decayed[i] := pglimits._decayed(configs[i], now);
    rates[i] := (configs[i]).slot_decay_per_second;
    changes[i] := (configs[i]).changes;
    -- Since somebody asked who sleeps there and on others too.
    changed[i] := exists (
      select from pglimits.queue q
      where q.limit_id = place_ids[i] and q.key = place_keys[i] and q.turn > decayed[i] and q.limit_ids is not null
        and q.seen[array_position(q.limit_ids, q.limit_id)] <> changes[i]);
  end loop;
  with ahead as (
    select p.at::integer, q.lease_id, q.expires_at = 'infinity' and not q.added as deaf,
           row_number() over (partition by p.at order by q.turn, q.lease_id) as nth,
           q.called or q.limit_ids is not null and q.expires_at < 'infinity' and pglimits._is_outdated(q) as moves,
           max(case when p.rate > 0 then (q.turn - p.decayed) / p.rate else 'Infinity' end)
             over (partition by q.lease_id) as goes_in
    from unnest(place_ids, place_keys, decayed, rates) with ordinality as p(limit_id, key, decayed, rate, at)
    cross join lateral (
      select w.* from pglimits.queue w
      where w.limit_id = p.limit_id and w.key = p.key and w.turn > p.decayed offset 0) q
  ), ordered as (
    -- Where a limit was changed, somebody may go later than others behind it; they come after it all the same.
    select a.*, case when a.deaf then a.goes_in else max(a.goes_in) over (partition by a.at order by a.nth) end as goes_after
    from ahead a
  ), each as (
    select o.*, max(o.goes_after) over (partition by o.lease_id) as goes_at from ordered o
  )
  select array_agg(e.lease_id), array_agg(e.at), array_agg(e.nth), array_agg(e.goes_at), min(e.goes_at) filter (where e.moves)
  into ids, at, nths, goes_at, from_here from each e;
  -- With everybody who comes behind one of them.
  while from_here is not null loop
    select min(x.goes_at) into and_before
    from (select u.goes_at, min(u.nth) filter (where u.goes_at >= from_here) over (partition by u.at) <= u.nth as is_behind
          from unnest(at, nths, goes_at) as u(at, nth, goes_at)) x
    where x.is_behind;
    exit when and_before = from_here;
    from_here := and_before;
  end loop;
  return (
    select array_agg(
      row(s.lease_id, x.added, x.changed, x.deaf, x.elsewhere, x.channel, x.at, x.slots, x.pinned, x.booked,
          x.goes_in)::pglimits._sleeper
      order by s.goes_at, x.arrival, s.nth, s.lease_id)
    from (
      select u.lease_id, min(u.nth) as nth, min(u.goes_at) as goes_at
      from unnest(ids, nths, goes_at) as u(lease_id, nth, goes_at) where u.goes_at >= from_here group by u.lease_id
    ) s
    cross join lateral (
      select bool_or(q.added) as added, bool_or(q.expires_at = 'infinity' and not q.added) as deaf,
             bool_or(p.at is null) as elsewhere, max(q.channel) as channel,
             min(q.arrival) as arrival,
             array_agg(p.at::integer order by p.at) filter (where p.at is not null) as at,
             array_agg(q.slots order by p.at) filter (where p.at is not null) as slots,
             bool_or(coalesce(q.seen[array_position(q.limit_ids, q.limit_id)] <> p.changes, p.changed)) as changed,
             array_agg(q.pinned order by p.at) filter (where p.at is not null) as pinned,
             array_agg(case when q.turn > p.decayed and not q.pinned then q.slots + q.gap else 0 end order by p.at)
               filter (where p.at is not null) as booked,
             max(case when p.rate > 0 then (q.turn - p.decayed) / p.rate else 'Infinity' end) as goes_in
      from pglimits.queue q
      left join unnest(place_ids, place_keys, decayed, rates, changes, changed)
        with ordinality as p(limit_id, key, decayed, rate, changes, changed, at)
        on p.limit_id = q.limit_id and p.key = q.key
      where q.lease_id = s.lease_id) x);
end $$;

comment on function pglimits._sleepers(pglimits.states[], pglimits.configs[], timestamptz) is
  'Who has to be looked at when something changes for those who sleep on some states, in the order in which they go.';

-- Moves those up who sleep where something came free before them, in the order in which they go: each to the first moment that
-- those before it leave free, and so nobody to a later one. Who sleeps over several limits of which one was changed may have to
-- move back.
--
-- Who sleeps over several limits moves on all of them at once, and so only if all their states are here. Where one is not, it
-- keeps what came free before it, and all behind it stay; it is called, and told: whoever watches there, it or another, locks
-- what it needs. Who cannot be told goes at the moment that it knows.
--
-- Where a limit was changed, those who sleep there may have to move back. Each makes room for those who sleep on others only and
-- need not move, wherever these go, and for none of those that come after it and have to move as well.
create or replace function pglimits._rearrange(
  states pglimits.states[], configs pglimits.configs[], now timestamptz, again boolean default false)
returns pglimits.states[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  sleepers pglimits._sleeper[] := pglimits._sleepers(states, configs, now);
  sleeper pglimits._sleeper;
  state pglimits.states;
  -- Of each state: what is booked for those who have not been looked at, where that ended at first, whether all stay from here
  -- on, and what is left by those who are pinned, since they cannot be told.
  rest numeric[] := array_fill(0::numeric, array[cardinality(states)]);
  ends numeric[];
  stopped boolean[] := array_fill(false, array[cardinality(states)]);
  gaps numeric[] := rest;
  -- Whether all can move, and some may have to move back.
  all_here constant boolean := (select not bool_or(s.elsewhere) from unnest(sleepers) s);
  some_changed constant boolean := (select bool_or(s.changed and not s.deaf) from unnest(sleepers) s);
  make_room constant boolean := some_changed and all_here;
  stays boolean;
  free numeric;
  moved record;
  some_back boolean := false;
  i integer;
begin
  if sleepers is null then
    return states;
  end if;
  for nth in 1 .. cardinality(sleepers) loop
    sleeper := sleepers[nth];
    for p in 1 .. cardinality(sleeper.at) loop
      i := sleeper.at[p];
      state := states[i];
      if sleeper.deaf and all_here then
        update pglimits.queue q set pinned = q.pinned or sleeper.booked[p] > 0, gap = 0, called = false
        where q.lease_id = sleeper.lease_id
          and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
        state.pinned := state.pinned + (sleeper.booked[p] > 0)::integer;
        states[i] := state;
        gaps[i] := gaps[i] + sleeper.booked[p];
      elsif make_room then
        rest[i] := rest[i] + sleeper.booked[p];
        if not sleeper.added and (sleeper.changed and sleeper.pinned[p] or not sleeper.changed and sleeper.booked[p] > 0) then
          update pglimits.queue q set pinned = not sleeper.changed
          where q.lease_id = sleeper.lease_id
            and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
          state.pinned := state.pinned + case when sleeper.changed then -1 else 1 end;
          states[i] := state;
          sleeper.pinned[p] := not sleeper.changed;
        end if;
      elsif sleeper.booked[p] > 0 then
        if gaps[i] > 0 then
          perform pglimits._tell(sleeper.channel, null);
          update pglimits.queue q set gap = q.gap + gaps[i], called = true
          where q.lease_id = sleeper.lease_id
            and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
          sleeper.booked[p] := sleeper.booked[p] + gaps[i];
          gaps[i] := 0;
        end if;
        rest[i] := rest[i] + sleeper.booked[p];
      end if;
    end loop;
    sleeper.changed := some_changed and (sleeper.changed or not make_room);
    sleepers[nth] := sleeper;
  end loop;
  for at in 1 .. cardinality(states) loop
    state := states[at];
    ends[at] := state.booked - gaps[at];
    state.booked := ends[at] - rest[at];
    states[at] := state;
  end loop;

  foreach sleeper in array sleepers loop
    continue when sleeper.deaf and all_here;
    stays := sleeper.elsewhere or sleeper.deaf;
    for p in 1 .. cardinality(sleeper.at) loop
      i := sleeper.at[p];
      stays := stays or stopped[i];
    end loop;
    if not stays then
      moved := pglimits._move(sleeper, states, configs, now);
      states := moved.states;
      some_back := some_back or moved.back;
    end if;
    for p in 1 .. cardinality(sleeper.at) loop
      i := sleeper.at[p];
      state := states[i];
      if stopped[i] then
        null;
      elsif stays then
        free := greatest(ends[i] - rest[i] - state.booked, 0);
        update pglimits.queue q
        set called = q.called or free > 0, gap = q.gap + case when sleeper.booked[p] > 0 then free else 0 end
        where q.lease_id = sleeper.lease_id
          and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
        state.booked := state.booked + rest[i] + case when rest[i] > 0 then free else 0 end;
        stopped[i] := true;
        if free > 0 then
          perform pglimits._tell(sleeper.channel, null);
        end if;
      end if;
      states[i] := state;
      rest[i] := rest[i] - sleeper.booked[p];
    end loop;
  end loop;
  if some_back and not again then
    -- It kept clear of those behind it where they were, some of whom are before it now.
    return pglimits._rearrange(states, configs, now, true);
  end if;
  for at in 1 .. cardinality(states) loop
    states[at] := pglimits._note_peak(states[at]);
  end loop;
  return states;
end $$;

comment on function pglimits._rearrange(pglimits.states[], pglimits.configs[], timestamptz, boolean) is
  'Moves those up who sleep where something came free before them, and those over several limits of which one was changed.';

-- Gives a sleeper that is not booked anywhere the first moment that it can have, on all its limits. If it can never be granted
-- now, it is sent away to ask again, and gets the error; if one of them is 0, it stands in line there. It goes no later than it
-- was told, whatever was added since, unless one of them was changed. What adjust has added comes right behind those before it.
create or replace function pglimits._move(
  sleeper pglimits._sleeper, inout states pglimits.states[], configs pglimits.configs[], now timestamptz,
  out back boolean)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  request pglimits._request;
  turn_in interval;
  told interval;
  state pglimits.states;
  config pglimits.configs;
  placed pglimits._placed;
  hopeless boolean := false;
  shut integer;
begin
  back := false;
  if sleeper.added then
    placed := pglimits._add_behind(states[sleeper.at[1]], configs[sleeper.at[1]], sleeper.slots[1], now);
    states[sleeper.at[1]] := placed.state;
    update pglimits.queue q set turn = placed.turn, gap = 0, called = false
    where q.lease_id = sleeper.lease_id
      and q.limit_id is not distinct from (placed.state).limit_id and q.key is not distinct from (placed.state).key;
    return;
  end if;
  for p in 1 .. cardinality(sleeper.at) loop
    state := states[sleeper.at[p]];
    config := configs[sleeper.at[p]];
    hopeless := hopeless or pglimits._is_hopeless(config, sleeper.slots[p], true);
    shut := coalesce(shut, case when config."limit" = 0 then sleeper.at[p] end);
    continue when not sleeper.pinned[p];
    update pglimits.queue q set pinned = false
    where q.lease_id = sleeper.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key and q.pinned;
    if found then
      state.pinned := state.pinned - 1;
    else
      -- More was charged since it was pinned, and so somebody had to go behind it.
      state.booked := state.booked - sleeper.slots[p];
    end if;
    states[sleeper.at[p]] := state;
  end loop;
  if hopeless then
    delete from pglimits.queue q where q.lease_id = sleeper.lease_id;
    perform pglimits._tell(sleeper.channel, sleeper.lease_id);
    return;
  elsif shut is not null then
    states[shut] := pglimits._stand_in_line(states[shut], array[sleeper.lease_id], now);
    delete from pglimits.queue q where q.lease_id = sleeper.lease_id and q.turn is not null;
    return;
  end if;

  request.slots := sleeper.slots;
  turn_in := pglimits._common_turn(request, sleeper.at, states, configs, now);
  told := make_interval(secs => least(ceil(sleeper.goes_in * 1000000) / 1000000, 3e9)::double precision);
  if not sleeper.changed then
    turn_in := least(turn_in, told);
  end if;
  back := extract(epoch from turn_in) > sleeper.goes_in + 0.000002;
  for p in 1 .. cardinality(sleeper.at) loop
    state := states[sleeper.at[p]];
    placed := pglimits._place_turn(
      state, configs[sleeper.at[p]], sleeper.slots[p], turn_in, true,
      -- Booked now, it would take the room between those that are pinned before it from others.
      not sleeper.changed and sleeper.pinned[p] and sleeper.booked[p] = 0 and turn_in = told, now);
    states[sleeper.at[p]] := placed.state;
    update pglimits.queue q
    set turn = placed.turn, pinned = placed.pinned, gap = 0, called = back,
        seen = case when q.limit_ids is not null then pglimits._changes(q.limit_ids) end
    where q.lease_id = sleeper.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  end loop;
  if back or extract(epoch from turn_in) < sleeper.goes_in - 0.000002 then
    perform pglimits._tell(sleeper.channel, null);
  end if;
end $$;

comment on function pglimits._move(pglimits._sleeper, pglimits.states[], pglimits.configs[], timestamptz) is
  'Gives a sleeper the first moment that it can have on all its limits, and tells it. back: it is later than the one it had.';

-- Has some who slept stand in line: their limit is 0, and nobody knows when their turn will come.
create or replace function pglimits._stand_in_line(state pglimits.states, lease_ids uuid[], now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  line record;
begin
  with stood as (
    update pglimits.queue q
    set turn = null, gap = 0, called = false, looks_at = now + pglimits._liveness() * 0.3,
        seen = case when q.limit_ids is not null then pglimits._changes(q.limit_ids) end
    where q.lease_id = any (lease_ids)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning q.rank, q.arrival, q.expires_at, pglimits._tell(q.channel, q.lease_id)
  )
  select s.rank, s.arrival, count(*) over () as waiters, min(s.expires_at) over () as dies_at
  into line from stood s order by s.rank, s.arrival limit 1;
  return pglimits._lengthen(state, line.waiters, line.rank, line.arrival, line.dies_at);
end $$;

comment on function pglimits._stand_in_line(pglimits.states, uuid[], timestamptz) is
  'Has some who slept towards a turn stand in line, in their order of arrival, and tells them.';

-- Books what adjust adds behind all that is booked, past the limit if need be. Its turn comes with its first slot, so that it lies
-- between the turns of those before it and of those behind it, however wide it is.
create or replace function pglimits._add_behind(
  state pglimits.states, config pglimits.configs, slots integer, now timestamptz)
returns pglimits._placed
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  turn constant numeric := greatest(state.booked + 1 - config."limit", decayed);
begin
  state.booked := greatest(state.booked, decayed) + slots;
  return row(state, turn, false)::pglimits._placed;
end $$;

comment on function pglimits._add_behind(pglimits.states, pglimits.configs, integer, timestamptz) is
  'Books what adjust adds behind all that is booked.';

-- Raises the level. Where some sleep towards turns that are booked, what is added is noted as a turn behind theirs: it moves with
-- them, and is the first to be taken off.
create or replace function pglimits._add_turn(
  state pglimits.states, config pglimits.configs, slots integer, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  placed constant pglimits._placed := pglimits._add_behind(state, config, slots, now);
begin
  if placed.turn > decayed and exists (
    select from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and not q.pinned)
  then
    insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, turn, added, for_rate, several, lease_duration,
                                expires_at, looks_at)
    values (gen_random_uuid(), state.limit_id, state.key, slots, 0, now, placed.turn, true, true, false, interval '0',
            'infinity', now);
  end if;
  return pglimits._note_peak(placed.state);
end $$;

comment on function pglimits._add_turn(pglimits.states, pglimits.configs, integer, timestamptz) is
  'Raises the level of a rate limit, behind those who sleep.';

-- What is needed to move those who sleep on some (limit, key)s: these, with all the others of who sleeps there over several, and
-- so on: whoever has to stay stops all those behind it.
create or replace function pglimits._around(places pglimits._places)
returns pglimits._places
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  around pglimits._places;
begin
  if places.keys is null then
    return null;
  end if;
  with recursive connected as (
    select h.limit_id, h.key collate "C" as key from unnest(places.limit_ids, places.keys) as h(limit_id, key)
    union
    select o.limit_id, o.key collate "C"
    from connected c
    cross join lateral (
      select q.limit_ids, q.keys from pglimits.queue q
      where q.limit_id = c.limit_id and q.key = c.key and q.turn is not null and q.limit_ids is not null offset 0) s
    cross join lateral unnest(s.limit_ids, s.keys) as o(limit_id, key)
  )
  select array_agg(c.limit_id), array_agg(c.key) into around.limit_ids, around.keys from connected c;
  return around;
end $$;

comment on function pglimits._around(pglimits._places) is
  'Some (limit, key)s with all the others of those who sleep there over several limits, and the others of who sleeps on these.';

-- The same for all keys of a limit.
create or replace function pglimits._around_limit(limit_id bigint)
returns pglimits._places
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  here pglimits._places;
begin
  select array_agg(q.limit_id), array_agg(q.key) into here.limit_ids, here.keys
  from (select distinct w.limit_id, w.key from pglimits.queue w
        where w.limit_id = _around_limit.limit_id and w.turn is not null and w.limit_ids is not null) q;
  return pglimits._around(here);
end $$;

comment on function pglimits._around_limit(bigint) is
  'What is needed to move those who sleep on any key of a limit and on others too; null if nobody does.';

-- Locks those of some states that come before, or after, those of a limit.
create or replace function pglimits._lock_beside(places pglimits._places, limit_id bigint, before boolean)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._lock_several(array_agg(u.limit_id), array_agg(u.key))
  from unnest(places.limit_ids, places.keys) as u(limit_id, key)
  where case when before then u.limit_id < _lock_beside.limit_id else u.limit_id > _lock_beside.limit_id end;
end $$;

comment on function pglimits._lock_beside(pglimits._places, bigint, boolean) is
  'Locks those of some states that come before, or after, those of a limit.';

-- Does so on (limit, key)s whose states are locked; nowhere if that is null.
create or replace function pglimits._rearrange_at(places pglimits._places)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  now constant timestamptz := pglimits._now();
  was pglimits.states[] := array[]::pglimits.states[];
  states pglimits.states[] := array[]::pglimits.states[];
  configs pglimits.configs[];
  state pglimits.states;
  config pglimits.configs;
begin
  if places.keys is null then
    return;
  end if;
  for i in 1 .. cardinality(places.keys) loop
    state := pglimits._lock_used(places.limit_ids[i], places.keys[i]);
    select c.* into config from pglimits.configs c where c.limit_id = state.limit_id;
    continue when config.active is not true;
    was := was || state;
    states := states || pglimits._unpin(state, config, now);
    configs := configs || config;
  end loop;
  states := pglimits._rearrange(states, configs, now);
  for i in 1 .. cardinality(states) loop
    state := states[i];
    if state.waiting > 0 then
      state := pglimits._advance(state, configs[i], now);
    end if;
    perform pglimits._save(state, was[i], now);
  end loop;
end $$;

comment on function pglimits._rearrange_at(pglimits._places) is
  '_rearrange on (limit, key)s whose states are locked.';

-- What is booked on a rate limit for those who sleep towards turns beyond a virtual time, with the gaps before them.
create or replace function pglimits._reserved(state pglimits.states, decayed numeric)
returns numeric
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(sum(q.slots + q.gap), 0) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and not q.pinned);
end $$;

comment on function pglimits._reserved(pglimits.states, numeric) is
  'What is booked on a rate limit for those who sleep towards turns beyond a virtual time.';

-- The level of a rate limit: what was used, and what those who sleep have reserved, but not what lies free before them.
create or replace function pglimits._level(state pglimits.states, config pglimits.configs, now timestamptz)
returns numeric
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  free constant numeric := (
    select coalesce(sum(q.gap), 0) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.gap > 0 and q.turn > decayed and not q.pinned);
begin
  -- A gap that has begun to pass is no longer booked as a whole.
  return greatest(state.booked - decayed, case when free > 0 then pglimits._reserved(state, decayed) end, free) - free;
end $$;

comment on function pglimits._level(pglimits.states, pglimits.configs, timestamptz) is
  'The level of a rate limit, without what lies free before those who sleep.';

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
    returning q.lease_id, q.turn, q.slots, q.gap, q.expires_at, q.pinned
  )
  select count(*) filter (where g.turn is null),
         coalesce(array_agg(g.lease_id) filter (where g.expires_at > now and (g.turn is null or g.turn > decayed)), '{}'),
         array_agg(g.turn) filter (where g.turn > decayed),
         array_agg(case when g.pinned then 0 else g.slots + g.gap end) filter (where g.turn > decayed),
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
  decayed constant numeric := pglimits._decayed(config, now);
  dead constant uuid[] := array(
    select q.lease_id from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.expires_at <= now);
begin
  if cardinality(dead) > 0 then
    state := (pglimits._withdraw(state, config, dead, now)).state;
  end if;
  state.next_death := coalesce((
    select min(q.expires_at) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed), 'infinity');
  return state;
end $$;

comment on function pglimits._bury_sleepers(pglimits.states, pglimits.configs, timestamptz) is
  'Removes those who slept towards a turn on a rate limit and died, and gives their turns back.';

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
