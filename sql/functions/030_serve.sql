-- The heart: checks a request, and serves a batch of them under the locks of all their states.

-- What is wrong with what a request says of itself, or null: a template for _argument_error.
create or replace function pglimits._argument_fault(
  lease_duration interval, wait interval, priority integer, holder jsonb, strict boolean, channel text)
returns text
language sql
stable
return case
  when strict is null then 'strict must not be null'
  when wait < interval '0' then 'wait must not be negative: %4$s'
  when channel !~ '^pglimits_[0-9a-z_]{1,40}$' then 'channel must be pglimits_ and up to 40 of a-z, 0-9, _: %5$L'
  when priority is null then 'priority must not be null'
  when priority not between -1000000 and 1000000 then 'priority must be from -1000000 to 1000000, not %6$s'
  when length(holder::text) > 8000 then 'holder must be at most 8000 characters of JSON, not %7$s'
  else pglimits._duration_error(lease_duration)
end;

comment on function pglimits._argument_fault(interval, interval, integer, jsonb, boolean, text) is
  'What is wrong with what a request says of itself, as a template for _argument_error; or null.';

-- What is wrong with the arguments of a request as such, or null. The names and keys themselves are looked at one by one.
create or replace function pglimits._argument_error(
  names text[], slots integer[], keys text[], lease_duration interval, wait interval, priority integer,
  holder jsonb, strict boolean, channel text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  fault constant text := case
    when names is null then 'names must not be null'
    when cardinality(names) = 0 then 'names must not be empty'
    when array_ndims(names) <> 1 then 'names must be a flat array'
    when cardinality(names) > 100 then 'names must be at most 100, not %1$s'
    when slots is null then 'slots must not be null'
    when array_ndims(slots) <> 1 or cardinality(slots) not in (1, cardinality(names))
      then 'slots must be one number for all names or one for each of the %1$s names, not %2$s'
    when keys is null then 'keys must not be null'
    when array_ndims(keys) <> 1 or cardinality(keys) not in (1, cardinality(names))
      then 'keys must be one for all names or one for each of the %1$s names, not %3$s'
    else pglimits._argument_fault(lease_duration, wait, priority, holder, strict, channel)
  end;
begin
  if fault is null then
    return null;
  end if;
  return format(fault, cardinality(names), left(slots::text, 60), left(keys::text, 60), wait, left(channel, 60),
                priority, length(holder::text));
end $$;

comment on function pglimits._argument_error(
  text[], integer[], text[], interval, interval, integer, jsonb, boolean, text) is
  'What is wrong with the arguments of a request, or null.';

-- Whether a request waits for a limit, holds slots of it, or had a turn on it a moment ago.
create or replace function pglimits._is_at(lease_id uuid, limit_id bigint)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from pglimits.queue q
                 where q.lease_id = _is_at.lease_id and _is_at.limit_id = any (q.limit_id || q.limit_ids))
      or exists (select from pglimits.leases l
                 where l.lease_id = _is_at.lease_id and l.limit_id = _is_at.limit_id and l.expires_at > pglimits._now());
end $$;

comment on function pglimits._is_at(uuid, bigint) is 'Whether a request waits for a limit, holds slots of it, or had a turn on it.';

-- Checks what a caller passes and finds its limits. Raises nothing: what is wrong comes back in error and message,
-- so that one bad request in a batch spoils no other.
create or replace function pglimits._check_request(
  names text[], slots integer[], keys text[], lease_duration interval, wait interval, priority integer,
  holder jsonb, lease_id uuid, strict boolean, channel text, for_rate boolean)
returns pglimits._request
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  -- The parts.
  limit_ids bigint[] := array[]::bigint[];
  part_keys text[] := array[]::text[];
  part_slots integer[] := array[]::integer[];
  places integer[] := array[]::integer[];
  config pglimits.configs;
  renamed pglimits.configs;
  key text;
  amount integer;
  place integer;
  bounded boolean := false;
  missing text[];
  impossible text;
  error text := 'InvalidArgument';
  message text := pglimits._argument_error(
    names, slots, keys, lease_duration, wait, priority, holder, strict, channel);
  request pglimits._request;
begin
  -- Arrays may begin anywhere; slices begin at 1.
  names := names[:];
  slots := slots[:];
  keys := keys[:];
  for i in 1 .. coalesce(cardinality(names), 0) loop
    exit when message is not null;
    key := keys[least(i, cardinality(keys))];
    amount := slots[least(i, cardinality(slots))];
    select c.* into config from pglimits.configs c where c.name = names[i];
    if not found then
      message := pglimits._name_error('name', names[i]);
    end if;
    if lease_id is not null and message is null then
      -- It may have been renamed since this was first asked, and another may have the name by now.
      select c.* into renamed from pglimits.former_names f join pglimits.configs c on c.limit_id = f.limit_id
      where f.name = names[i] and pglimits._is_at(lease_id, f.limit_id)
        and (config.limit_id is null or not pglimits._is_at(lease_id, config.limit_id))
      order by f.limit_id limit 1;
      if found then
        config := renamed;
      end if;
    end if;
    if key <> '' is not false then
      message := coalesce(message, pglimits._name_error('key', key, true));
    end if;
    if amount >= 1 is not true then
      message := coalesce(message, case when amount is null then 'slots must not be null'
                                        else format('slots must be at least 1, not %s', amount) end);
    end if;
    exit when message is not null;

    place := null;
    if config.limit_id is null then
      missing := missing || names[i];
    elsif config.active then
      -- The same limit named twice: the slots add up.
      for p in 1 .. cardinality(part_keys) loop
        if limit_ids[p] = config.limit_id and part_keys[p] = key then
          place := p;
          if part_slots[p]::bigint + amount > 2147483647 then
            message := format('slots must add up to at most 2147483647 for %L', names[i]);
            exit;
          end if;
          part_slots[p] := part_slots[p] + amount;
        end if;
      end loop;
      if place is null then
        limit_ids := limit_ids || config.limit_id;
        part_keys := part_keys || key;
        part_slots := part_slots || amount;
        place := cardinality(part_keys);
      end if;
      bounded := bounded or config.max_waiters is not null;
      if part_slots[place] > config."limit" or for_rate then
        impossible := coalesce(impossible, pglimits._impossible(
          names[i], part_slots[place], config."limit", config.slot_decay_per_second, for_rate));
      end if;
    end if;
    places := places || place;
  end loop;

  if message is not null then
    null;
  elsif strict and missing is not null then
    error := 'LimitNotFound';
    message := format('there is no limit named %s',
      (select string_agg(format('%L', m.name), ', ') from (select distinct u.name from unnest(missing) as u(name)) m));
  elsif impossible is not null then
    error := split_part(impossible, ' ', 1);
    message := substr(impossible, strpos(impossible, ' ') + 1);
  else
    error := null;
  end if;
  request := row(
    coalesce(lease_id, gen_random_uuid()), for_rate, limit_ids, part_keys, part_slots, places,
    case when error is distinct from 'InvalidArgument' then -priority end,
    -- A day has 24 hours, whatever the session's time zone.
    case when error is distinct from 'InvalidArgument'
         then make_interval(secs => extract(epoch from lease_duration)::double precision) end,
    wait, holder, channel, lease_id is not null, bounded, missing, error, message);
  if error is distinct from 'InvalidArgument' and cardinality(part_keys) > 1 then
    request := pglimits._in_lock_order(request);
  end if;
  return request;
end $$;

comment on function pglimits._check_request(
  text[], integer[], text[], interval, interval, integer, jsonb, uuid, boolean, text, boolean) is
  'Checks the arguments of a request and finds its limits. What is wrong is in error and message.';

-- Why a limit could never grant that much: the kind of error, a space, and the message; or null.
create or replace function pglimits._impossible(
  name text, slots integer, most integer, slot_decay_per_second double precision, for_rate boolean)
returns text
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if for_rate and slot_decay_per_second = 0 then
    return format('NoSlotDecay limit %L has no slot_decay_per_second: its slots never come back by themselves', name);
  elsif slots > most and most > 0 then
    return format('SlotsExceedLimit slots must be at most the limit: %L has %s, asked for %s', name, most, slots);
  end if;
  return null;
end $$;

comment on function pglimits._impossible(text, integer, integer, double precision, boolean) is
  'Why a limit could never grant a request (kind of error and message), or null.';

-- Sorts the parts of a request by (limit id, key).
create or replace function pglimits._in_lock_order(request pglimits._request)
returns pglimits._request
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  new_places integer[];
begin
  select array_agg(o.limit_id order by o.now_at), array_agg(o.key order by o.now_at),
         array_agg(o.slots order by o.now_at), array_agg(o.now_at order by o.was_at)
  into request.limit_ids, request.keys, request.slots, new_places
  from (
    select p.*, (row_number() over (order by p.limit_id, p.key collate "C"))::integer as now_at
    from unnest(request.limit_ids, request.keys, request.slots) with ordinality as p(limit_id, key, slots, was_at)
  ) o;
  for i in 1 .. cardinality(request.places) loop
    request.places[i] := new_places[request.places[i]];
  end loop;
  return request;
end $$;

comment on function pglimits._in_lock_order(pglimits._request) is 'Sorts the parts of a request by (limit id, key).';

-- The answer to a request whose id has a lease already: a reply was lost, or the lease was handed over.
create or replace function pglimits._answer_again(request pglimits._request, now timestamptz)
returns pglimits._answer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  answer pglimits._answer;
  lease record;
  part integer;
begin
  if request.for_rate then
    return pglimits._in_use(request);  -- no call of rate_limit gets a lease
  end if;
  answer.status := 'granted';
  answer.lease_id := request.lease_id;
  answer.fences := array_fill(null::bigint, array[cardinality(request.places)]);
  for lease in select l.* from pglimits.leases l where l.lease_id = request.lease_id loop
    part := (
      select p.part
      from unnest(request.limit_ids, request.keys, request.slots) with ordinality as p(limit_id, key, slots, part)
      where p.limit_id = lease.limit_id and p.key = lease.key and p.slots = lease.slots);
    if part is null then
      -- Unless its limit has been deactivated meanwhile, and so is no part of the request any longer.
      if exists (select from pglimits.configs c where c.limit_id = lease.limit_id and c.active) then
        return pglimits._in_use(request);
      end if;
      continue;
    end if;
    answer.fences := pglimits._note_fence(answer.fences, request.places, part, lease.fence);
  end loop;
  -- A part without a lease is one whose limit was not enforced at the time, and so has changed since.
  if exists (
    select from unnest(request.limit_ids, request.keys) as p(limit_id, key)
    join pglimits.configs c on c.limit_id = p.limit_id
    where c.updated_at < lease.acquired_at and not exists (
      select from pglimits.leases l
      where l.lease_id = request.lease_id
        and l.limit_id is not distinct from p.limit_id and l.key is not distinct from p.key))
  then
    return pglimits._in_use(request);
  end if;
  perform pglimits._claim(array[request.lease_id], now);
  answer.expires_at := (select max(l.expires_at) from pglimits.leases l where l.lease_id = request.lease_id);
  return answer;
end $$;

comment on function pglimits._answer_again(pglimits._request, timestamptz) is
  'Answers a repeated request from the lease that it got the first time.';

-- The answer to a request whose id belongs to another one.
create or replace function pglimits._in_use(request pglimits._request)
returns pglimits._answer
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  answer pglimits._answer;
begin
  answer.status := 'error';
  answer.lease_id := request.lease_id;
  answer.error := 'InvalidArgument';
  answer.message := format('lease_id %s is in use for another request', request.lease_id);
  return answer;
end $$;

comment on function pglimits._in_use(pglimits._request) is 'The answer to a request whose id belongs to another one.';

-- Begins the full duration of leases that were handed over.
create or replace function pglimits._claim(lease_ids uuid[], now timestamptz)
returns table (lease_id uuid, limit_id bigint, key text, expires_at timestamptz)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  -- Never waits for a row: whoever has it locked claims it, renews it or ends it right now.
  return query
  update pglimits.leases l
  set claimed = true, expires_at = greatest(l.expires_at, now + l.lease_duration)
  from (
    select u.lease_id, u.limit_id, u.key from pglimits.leases u
    where u.lease_id = any (lease_ids) and not u.claimed and u.expires_at > now for update skip locked
  ) mine
  where l.lease_id = mine.lease_id
    and l.limit_id is not distinct from mine.limit_id and l.key is not distinct from mine.key
  returning l.lease_id, l.limit_id, l.key, l.expires_at;
end $$;

comment on function pglimits._claim(uuid[], timestamptz) is
  'Begins the full duration of leases that were handed over to waiters. Returns those, with their new ends.';

-- What stands in the way of a request, given the states of its parts. Writes nothing: the same rules answer a peek, a
-- refusal without a lock, and a decision under the locks.
-- mine: the request's own place in the queue, if it has one.
create or replace function pglimits._survey(
  request pglimits._request, at integer[], states pglimits.states[], configs pglimits.configs[],
  mine pglimits.queue, now timestamptz)
returns pglimits._findings
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  findings pglimits._findings;
  state pglimits.states;
  config pglimits.configs;
  fits_at timestamptz;
begin
  findings.enforced := 0;
  findings.turn_in := interval '0';
  for p in 1 .. cardinality(at) loop
    config := configs[at[p]];
    continue when config.active is not true;
    state := states[at[p]];
    findings.enforced := findings.enforced + 1;
    if request.slots[p] > config."limit" or request.for_rate then
      findings.impossible := pglimits._impossible(
        config.name, request.slots[p], config."limit", config.slot_decay_per_second, request.for_rate);
      if findings.impossible is not null then
        return findings;
      end if;
    end if;

    if state.waiting > 0 and (
      case when mine.lease_id is null then state.head_rank <= request.rank
           else (state.head_rank, state.head_arrival) < (mine.rank, mine.arrival) end)
    then
      fits_at := 'infinity';
    elsif not request.for_rate and config.slot_decay_per_second = 0
          and state.held::bigint + request.slots[p] <= config."limit" then
      fits_at := '-infinity';
    elsif not request.for_rate then
      fits_at := pglimits._fits_at(state, config, request.slots[p], now);
      if fits_at > '-infinity' and state.held::bigint + request.slots[p] > config."limit" then
        -- When the lease that ends first is not renewed; so it is worth a look, but no promise.
        findings.looks_at := coalesce(findings.looks_at, fits_at);
        fits_at := 'infinity';
      end if;
    elsif config."limit" = 0 then
      fits_at := 'infinity';
    else
      fits_at := '-infinity';
    end if;

    if fits_at > '-infinity' then
      findings.blocked_at := coalesce(findings.blocked_at, at[p]);
      findings.looks_at := coalesce(findings.looks_at, fits_at);
      findings.fits_at := greatest(findings.fits_at, fits_at);
    end if;
  end loop;
  if request.for_rate and findings.blocked_at is null then
    findings.turn_in := pglimits._common_turn(request, at, states, configs, now);
  end if;
  if findings.blocked_at is null and findings.turn_in > coalesce(request.wait, findings.turn_in) then
    findings.fits_at := now + findings.turn_in;
  end if;
  return findings;
end $$;

comment on function pglimits._survey(
  pglimits._request, integer[], pglimits.states[], pglimits.configs[], pglimits.queue, timestamptz) is
  'What stands in the way of a request. See the type pglimits._findings.';

-- How often each of some limits has been changed. Null for one that was deleted.
create or replace function pglimits._changes(limit_ids bigint[])
returns integer[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select (select c.changes from pglimits.configs c where c.limit_id = u.limit_id)
    from unnest(limit_ids) with ordinality as u(limit_id, nth) order by u.nth);
end $$;

comment on function pglimits._changes(bigint[]) is
  'How often each of some limits has been changed; null for one that was deleted.';

-- Puts a request in line. One that named more limits than this tries again for itself when it can go: what is not enforced
-- now may be by then. So does one for a turn that cannot be told of it: what it did not hear of in time would have decayed.
create or replace function pglimits._enqueue(
  state pglimits.states, request pglimits._request, slots integer, mine pglimits.queue, looks_at timestamptz,
  now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  arrival timestamptz := mine.arrival;
  several boolean := cardinality(request.slots) > 1 or array_position(request.places, null) is not null
                     or request.for_rate and request.channel is null;
begin
  arrival := coalesce(arrival, greatest(now, state.last_arrival + interval '1 microsecond'));
  state.last_arrival := greatest(state.last_arrival, arrival);
  insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, for_rate, several, limit_ids, keys, seen,
                              in_vain, lease_duration, holder, channel, expires_at, looks_at)
  values (request.lease_id, state.limit_id, state.key, slots, request.rank, arrival, request.for_rate, several,
          case when several then request.limit_ids end, case when several then request.keys end,
          case when several then pglimits._changes(request.limit_ids) end,
          coalesce(mine.in_vain + mine.called::integer, 0), request.lease_duration,
          request.holder, request.channel, now + pglimits._liveness(), looks_at);
  return pglimits._lengthen(state, 1, request.rank, arrival, now + pglimits._liveness());
end $$;

comment on function pglimits._enqueue(
  pglimits.states, pglimits._request, integer, pglimits.queue, timestamptz, timestamptz) is
  'Puts a request in line: where it arrived if it has a place (mine) already, or behind everybody of its priority.';

-- Notes that so many more stand in line, the first of them at that place, none of whom dies before a moment.
create or replace function pglimits._lengthen(
  state pglimits.states, waiters bigint, rank integer, arrival timestamptz, dies_at timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if state.waiting = 0 or (rank, arrival) < (state.head_rank, state.head_arrival) then
    state.head_rank := rank;
    state.head_arrival := arrival;
  end if;
  state.next_waiter_death := least(case when state.waiting > 0 then state.next_waiter_death end, dies_at);
  state.waiting := state.waiting + waiters;
  return state;
end $$;

comment on function pglimits._lengthen(pglimits.states, bigint, integer, timestamptz, timestamptz) is
  'Returns a state with so many more in line, the first of them at a place (rank, arrival).';

-- Takes those out of the line who have died, wherever they stand in it. One whose row is locked is calling in, or being
-- removed right now.
create or replace function pglimits._bury_waiters(state pglimits.states, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  buried integer;
begin
  with dead as (
    select q.lease_id from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn is null
      and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival) and q.expires_at <= now
    for update skip locked
  )
  delete from pglimits.queue q using dead d
  where q.lease_id = d.lease_id
    and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  get diagnostics buried = row_count;
  state.waiting := state.waiting - buried;
  state.next_waiter_death := coalesce((
    select min(q.expires_at) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn is null
      and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)), 'infinity');
  return state;
end $$;

comment on function pglimits._bury_waiters(pglimits.states, timestamptz) is
  'Takes dead waiters out of the line, and notes when the next of them can die.';

-- Until when a request that was called, and found another of its limits taken, keeps its place where it was called: nobody
-- goes before it there, so that it has this one when the other comes free. Else, where all its limits are always busy, it
-- would never find them free at the same moment. From the third time on that it is called in vain, at first for a moment, each
-- time for twice as long, and never for longer than it has waited: so the faster of its limits is the one that it soon finds
-- free while it keeps the other, and neither stands still for much longer than that takes. Null: it keeps none, as others are
-- first to have what it still needs, or nobody is.
create or replace function pglimits._keeps_until(
  mine pglimits.queue, needed pglimits.states, config pglimits.configs, now timestamptz)
returns timestamptz
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if config."limit" = 0 or needed.waiting > 0 and (needed.head_rank, needed.head_arrival) < (mine.rank, mine.arrival) then
    return null;
  elsif mine.called and mine.in_vain >= 2 then
    return now + least(now - mine.arrival, interval '100 milliseconds' * 2 ^ least(mine.in_vain - 2, 30));
  end if;
  return now;
end $$;

comment on function pglimits._keeps_until(pglimits.queue, pglimits.states, pglimits.configs, timestamptz) is
  'Until when a request over several limits keeps the place where it was called in vain; now: only those that it keeps '
  'already; null: none.';

-- The next moment at which a request gives up one of the places that it keeps.
create or replace function pglimits._kept_until(lease_id uuid, now timestamptz)
returns timestamptz
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (select min(q.kept_until) from pglimits.queue q where q.lease_id = _kept_until.lease_id and q.kept_until > now);
end $$;

comment on function pglimits._kept_until(uuid, timestamptz) is
  'When a request next gives up one of the places that it keeps; null: it keeps none.';

-- Takes a request out of the line, unless it keeps its place there: until the given moment if it was called there, or for as
-- long as it was going to if it keeps it already. Null: it keeps none.
create or replace function pglimits._leave(
  state pglimits.states, lease_id uuid, keep_until timestamptz, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  lives_until timestamptz;
begin
  if keep_until is not null then
    update pglimits.queue q
    set kept_until = coalesce(q.kept_until, keep_until), called = false,
        expires_at = least(now + pglimits._liveness(), coalesce(q.kept_until, keep_until))
    where q.lease_id = _leave.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
      and (q.called and keep_until > now or q.kept_until > now)
    returning q.expires_at into lives_until;
    if found then
      state.next_look := least(state.next_look, lives_until);
      state.next_waiter_death := least(state.next_waiter_death, lives_until);
      return state;
    end if;
  end if;
  delete from pglimits.queue q
  where q.lease_id = _leave.lease_id
    and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  if found then
    state.waiting := state.waiting - 1;
  end if;
  return state;
end $$;

comment on function pglimits._leave(pglimits.states, uuid, timestamptz, timestamptz) is
  'Takes a waiting request out of the queue of a (limit, key), or has it keep its place there.';

-- Why one more may not wait on a (limit, key), or null.
-- Stable, so that it counts in the snapshot of who asks.
create or replace function pglimits._queue_full(state pglimits.states, config pglimits.configs, now timestamptz)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if config.max_waiters <= (
    select count(*) from (
      select from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.expires_at > now
        and (q.turn is null and q.kept_until is null and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)
             or q.turn > pglimits._decayed(config, now) and not q.added)
      limit config.max_waiters) live)
  then
    return format('%s requests wait for %L already, and that is its max_waiters', config.max_waiters, config.name);
  end if;
  return null;
end $$;

comment on function pglimits._queue_full(pglimits.states, pglimits.configs, timestamptz) is
  'Why one more request may not wait (in line or for its turn) on a (limit, key), or null.';

-- Why a request that has to wait may not, or null.
-- full_at: for each state, why one more may not wait there.
create or replace function pglimits._may_not_wait(findings pglimits._findings, full_at text[])
returns text
language sql
immutable
return case
  when findings.blocked_at is not null then full_at[findings.blocked_at]
  when findings.turn_in > interval '0' then (select u.problem from unnest(full_at) as u(problem) where u.problem is not null limit 1)
end;

comment on function pglimits._may_not_wait(pglimits._findings, text[]) is
  'Why a request that has to wait, in line or for its turn, may not: the queue is full; or null.';

-- The (limit, key)s that a batch touches, in the order in which they are locked.
create or replace function pglimits._gather(requests pglimits._request[])
returns pglimits._places
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  places pglimits._places;
begin
  if cardinality(requests) = 1 then
    places.limit_ids := (requests[1]).limit_ids;
    places.keys := (requests[1]).keys;
  else
    select array_agg(p.limit_id order by p.limit_id, p.key collate "C"),
           array_agg(p.key order by p.limit_id, p.key collate "C")
    into places.limit_ids, places.keys
    from (select distinct u.limit_id, u.key
          from unnest(requests) r, unnest(r.limit_ids, r.keys) as u(limit_id, key)) p;
  end if;
  for i in 1 .. coalesce(cardinality(places.keys), 0) loop
    places.labels[i] := places.limit_ids[i] || ' ' || places.keys[i];
  end loop;
  return places;
end $$;

comment on function pglimits._gather(pglimits._request[]) is
  'The (limit, key)s that a batch touches, in the order in which they are locked.';

-- Where in a batch the parts of a request are.
create or replace function pglimits._locate(request pglimits._request, places pglimits._places)
returns integer[]
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  at integer[] := array[]::integer[];
begin
  for p in 1 .. cardinality(request.keys) loop
    at[p] := array_position(places.labels, request.limit_ids[p] || ' ' || request.keys[p]);
  end loop;
  return at;
end $$;

comment on function pglimits._locate(pglimits._request, pglimits._places) is
  'Where in a batch the parts of a request are.';

-- Locks the states of a batch, in their order.
create or replace function pglimits._lock_all(places pglimits._places)
returns pglimits.states[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  states pglimits.states[];
begin
  for i in 1 .. coalesce(cardinality(places.keys), 0) loop
    states[i] := pglimits._lock(places.limit_ids[i], places.keys[i],
                                i > 1 and (states[i - 1]).limit_id is not distinct from places.limit_ids[i]);
  end loop;
  return states;
end $$;

comment on function pglimits._lock_all(pglimits._places) is 'Locks the states of a batch, in their order.';

-- Notes the fence of a part for every name that it stands for.
create or replace function pglimits._note_fence(fences bigint[], places integer[], part integer, fence bigint)
returns bigint[]
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  for n in 1 .. cardinality(places) loop
    if places[n] = part then
      fences[n] := fence;
    end if;
  end loop;
  return fences;
end $$;

comment on function pglimits._note_fence(bigint[], integer[], integer, bigint) is
  'Notes the fence of a part for every name that it stands for.';

-- How long until the turn of a sleeper, on the slowest of its limits.
create or replace function pglimits._turn_in(lease_id uuid, now timestamptz)
returns interval
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (select max(case when q.turn is not null then pglimits._until(c, q.turn, now) end)
          from pglimits.queue q join pglimits.configs c on c.limit_id = q.limit_id
          where q.lease_id = _turn_in.lease_id);
end $$;

comment on function pglimits._turn_in(uuid, timestamptz) is 'How long a sleeper has until its turn comes.';

-- Takes what a request is granted: slots under a lease, or turns on rate limits. arrival: when it arrived, if it has stood in
-- line.
create or replace function pglimits._take(
  request pglimits._request, at integer[], states pglimits.states[], configs pglimits.configs[],
  findings pglimits._findings, arrival timestamptz, now timestamptz)
returns pglimits._decision
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  answer pglimits._answer;
begin
  answer.status := 'granted';
  answer.lease_id := request.lease_id;
  if request.for_rate then
    answer.wait := findings.turn_in;
  else
    answer.expires_at := now + request.lease_duration;
    answer.fences := array_fill(null::bigint, array[cardinality(request.places)]);
  end if;
  for p in 1 .. cardinality(at) loop
    continue when (configs[at[p]]).active is not true;
    if request.for_rate then
      states[at[p]] := pglimits._take_turn(states[at[p]], configs[at[p]], request, request.slots[p],
                                           findings.turn_in, findings.enforced > 1, arrival, now);
    else
      states[at[p]] := pglimits._take_slots(
        states[at[p]], configs[at[p]], request.lease_id, request.slots[p], request.rank, request.lease_duration,
        request.holder, true, findings.enforced, answer.expires_at, now);
      if cardinality(request.places) = 1 then
        answer.fences := array[(states[at[p]]).version];
      else
        answer.fences := pglimits._note_fence(answer.fences, request.places, p, (states[at[p]]).version);
      end if;
    end if;
  end loop;
  return row(answer, states)::pglimits._decision;
end $$;

comment on function pglimits._take(
  pglimits._request, integer[], pglimits.states[], pglimits.configs[], pglimits._findings, timestamptz, timestamptz) is
  'Takes what a request is granted, on all its limits.';

-- Decides one request under the locks of its states: grants, books, queues or refuses it.
create or replace function pglimits._decide(
  request pglimits._request, at integer[], states pglimits.states[], configs pglimits.configs[],
  mine pglimits.queue, at_mine integer, now timestamptz)
returns pglimits._decision
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  findings pglimits._findings := pglimits._survey(request, at, states, configs, mine, now);
  may_wait boolean := findings.blocked_at is not null and coalesce(request.wait > interval '0', true);
  answer pglimits._answer;
  keep_until timestamptz;
  full_at text[];
begin
  answer.lease_id := request.lease_id;
  if request.error = 'LimitNotFound' then
    findings.impossible := request.error || ' ' || request.message;
  end if;
  -- Its old place in line goes; if it has to wait on, it comes back at its old time of arrival.
  if at_mine is not null and mine.turn is null and findings.impossible is null then
    if may_wait then
      keep_until := pglimits._keeps_until(mine, states[findings.blocked_at], configs[findings.blocked_at], now);
    end if;
    for p in 1 .. cardinality(at) loop
      states[at[p]] := pglimits._leave(
        states[at[p]], request.lease_id, case when at[p] <> findings.blocked_at then keep_until end, now);
    end loop;
  end if;
  if mine.lease_id is null and request.bounded
     and (may_wait or findings.fits_at is null and findings.turn_in > interval '0')
  then
    for p in 1 .. cardinality(at) loop
      full_at[at[p]] := pglimits._queue_full(states[at[p]], configs[at[p]], now);
    end loop;
    findings.queue_full := pglimits._may_not_wait(findings, full_at);
  end if;

  if mine.turn is not null then
    -- A turn was taken the first time that this was asked.
    answer.status := 'granted';
    answer.wait := pglimits._turn_in(mine.lease_id, now);
  elsif findings.impossible is not null then
    answer.status := 'error';
    answer.error := split_part(findings.impossible, ' ', 1);
    answer.message := substr(findings.impossible, strpos(findings.impossible, ' ') + 1);
  elsif findings.enforced = 0 then
    answer.status := 'unlimited';
  elsif findings.queue_full is not null then
    answer.status := 'error';
    answer.error := 'QueueFull';
    answer.message := findings.queue_full;
  elsif findings.fits_at is null then
    return pglimits._take(request, at, states, configs, findings, mine.arrival, now);
  elsif may_wait then
    findings.looks_at := least(
      findings.looks_at, now + pglimits._liveness() * 0.3,
      case when keep_until is not null then pglimits._kept_until(request.lease_id, now) end);
    answer.status := 'queued';
    answer.retry_after := greatest(findings.looks_at - now, interval '0');
    states[findings.blocked_at] := pglimits._enqueue(
      states[findings.blocked_at], request, request.slots[array_position(at, findings.blocked_at)], mine,
      findings.looks_at, now);
  else
    answer.status := 'refused';
    answer.retry_after := case when findings.fits_at < 'infinity' then findings.fits_at - now end;
  end if;
  return row(answer, states)::pglimits._decision;
end $$;

comment on function pglimits._decide(
  pglimits._request, integer[], pglimits.states[], pglimits.configs[], pglimits.queue, integer, timestamptz) is
  'Decides one request under the locks of its states. mine, at_mine: its place in a queue, and in which state that is.';

-- Serves what a batch asks of single limits, as far as it comes in runs: on each (limit, key) the first requests that fit
-- together are granted, and if all behind them have to wait, they are put in line; all that with one statement, instead
-- of one for each. What it leaves, _decide decides: its answer is null. The rules are those of _survey.
create or replace function pglimits._serve_runs(
  requests pglimits._request[], states pglimits.states[], configs pglimits.configs[], repeated uuid[],
  now timestamptz)
returns pglimits._served
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  served pglimits._served;
  run record;
  state pglimits.states;
  config pglimits.configs;
  -- For each (limit, key): how many slots fit (null: no runs here), and the places in line behind which a run goes.
  rooms bigint[];
  versions bigint[];
  arrivals timestamptz[];
  ranks integer[];
  most integer[];
begin
  served.states := states;
  for i in 1 .. coalesce(cardinality(states), 0) loop
    state := states[i];
    config := configs[i];
    versions[i] := state.version;
    arrivals[i] := greatest(now, state.last_arrival + interval '1 microsecond');
    ranks[i] := case when state.waiting > 0 then state.head_rank end;
    most[i] := case when state.waiting > 0 or config.slot_decay_per_second = 0 then config."limit" else 0 end;
    rooms[i] := case
      when config.active is not true or state.pinned > 0 then null
      when state.waiting > 0 then 0
      when config.slot_decay_per_second = 0 then config."limit"::bigint - state.held
      else least(config."limit"::bigint - state.held,
                 floor(config."limit" - greatest(state.booked - pglimits._decayed(config, now), 0))) end;
  end loop;

  for run in
    with asked as (
      select u.ordinal, u.lease_id, u.limit_ids[1] as limit_id, u.keys[1] as key, u.slots[1] as slots, u.rank,
             u.lease_duration, u.holder, u.channel,
             dense_rank() over (order by u.limit_ids[1], u.keys[1] collate "C") as place,
             not u.for_rate and cardinality(u.places) = 1 and u.lease_id <> all (repeated) and u.error is null as plain,
             coalesce(u.wait > interval '0', true) and not u.bounded as may_wait
      from unnest(requests) with ordinality as u(
        lease_id, for_rate, limit_ids, keys, slots, places, rank, lease_duration, wait, holder, channel, chosen,
        bounded, missing, error, message, ordinal)
      where cardinality(u.slots) = 1
    ), summed as (
      select a.*, row_number() over run_of as nth,
             coalesce(bool_and(a.plain) over run_of and sum(a.slots) over run_of <= rooms[a.place], false) as fits
      from asked a
      window run_of as (partition by a.place order by a.ordinal)
    ), behind as (
      select s.*, row_number() over here as nth_behind,
             bool_and(s.plain and s.may_wait and s.slots <= most[s.place]) over all_here
             and min(s.rank) over all_here >= coalesce(ranks[s.place], first_value(s.rank) over here) as all_wait
      from summed s where not s.fits and rooms[s.place] is not null
      window all_here as (partition by s.place), here as (partition by s.place order by s.ordinal)
    ), leased as (
      insert into pglimits.leases (lease_id, limit_id, key, slots, holder, fence, priority, lease_duration, claimed,
                                   parts, acquired_at, expires_at)
      select s.lease_id, s.limit_id, s.key, s.slots, s.holder, versions[s.place] + s.nth, -s.rank, s.lease_duration,
             true, 1, now, now + s.lease_duration
      from summed s where s.fits
    ), queued as (
      insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, for_rate, several, lease_duration,
                                  holder, channel, expires_at, looks_at)
      select b.lease_id, b.limit_id, b.key, b.slots, b.rank,
             arrivals[b.place] + (b.nth_behind - 1) * interval '1 microsecond', false, false, b.lease_duration,
             b.holder, b.channel, now + pglimits._liveness(), now + pglimits._liveness() * 0.3
      from behind b where b.all_wait
    )
    select s.place, true as granted, count(*) as requests, sum(s.slots) as slots, min(s.lease_duration) as shortest,
           null::integer as first_rank, array_agg(s.ordinal) as ordinals,
           array_agg(row('granted', s.lease_id, array[versions[s.place] + s.nth], now + s.lease_duration, null, null,
                         null, null)::pglimits._answer) as answers
    from summed s where s.fits group by s.place
    union all
    select b.place, false, count(*), null, null, min(b.rank), array_agg(b.ordinal),
           array_agg(row('queued', b.lease_id, null, null, pglimits._liveness() * 0.3, null, null,
                         null)::pglimits._answer)
    from behind b where b.all_wait group by b.place
  loop
    state := served.states[run.place];
    if run.granted then
      config := configs[run.place];
      state.version := state.version + run.requests;
      state.held := state.held + run.slots;
      state.next_expiry := least(state.next_expiry, now + run.shortest);
      if config.slot_decay_per_second > 0 then
        state.booked := greatest(state.booked, pglimits._decayed(config, now)) + run.slots;
      end if;
    else
      state := pglimits._lengthen(
        state, run.requests, run.first_rank, arrivals[run.place], now + pglimits._liveness());
      state.last_arrival := arrivals[run.place] + (run.requests - 1) * interval '1 microsecond';
    end if;
    served.states[run.place] := state;
    for i in 1 .. cardinality(run.ordinals) loop
      served.answers[run.ordinals[i]] := run.answers[i];
    end loop;
  end loop;
  return served;
end $$;

comment on function pglimits._serve_runs(
  pglimits._request[], pglimits.states[], pglimits.configs[], uuid[], timestamptz) is
  'Grants, and puts in line, what a batch asks of single limits in runs. Null answers are left to be decided one by one.';

-- Serves requests in their order, all in one transaction: locks every state that they touch, in the order of
-- (limit id, key), reads the clock, decides one after the other, and writes every state once. Null, with nothing done but the
-- locks taken: one of their limits was deleted meanwhile, and another may have its name by now. Check them again.
create or replace function pglimits._serve(requests pglimits._request[])
returns pglimits._answer[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  places pglimits._places := pglimits._gather(requests);
  here integer := coalesce(cardinality(places.keys), 0);
  states pglimits.states[] := case when here = 1 then array[pglimits._lock(places.limit_ids[1], places.keys[1])]
                                   else pglimits._lock_all(places) end;
  was pglimits.states[] := states;
  -- Under the locks: whoever changes a limit waits for us, or we see what it changed.
  now timestamptz := pglimits._now();
  configs pglimits.configs[];
  config pglimits.configs;
  chosen uuid[];
  leased uuid[];
  ended bigint;
  queued uuid[];
  request pglimits._request;
  mine pglimits.queue;
  decision pglimits._decision;
  served pglimits._served;
  answers pglimits._answer[];
  at integer[];
  at_mine integer;
  head_id uuid;
begin
  for i in 1 .. here loop
    if (states[i]).limit_id is null then
      return null;
    end if;
  end loop;
  for i in 1 .. here loop
    select c.* into config from pglimits.configs c where c.limit_id = places.limit_ids[i];
    configs[i] := config;
    if config.active and (now >= least((states[i]).next_expiry, (states[i]).next_look) or (states[i]).pinned > 0) then
      states[i] := pglimits._settle(states[i], config, now);
    end if;
  end loop;

  if cardinality(requests) > 1 then
    select array_agg(r.lease_id) into chosen from unnest(requests) r where r.chosen;
  elsif (requests[1]).chosen then
    chosen := array[(requests[1]).lease_id];
  end if;
  if chosen is not null then
    select array_agg(l.lease_id) filter (where l.expires_at > now), count(*) filter (where l.expires_at <= now)
    into leased, ended from pglimits.leases l where l.lease_id = any (chosen);
    if ended > 0 then
      -- Somebody renews or releases it right now: only then is known what becomes of it.
      perform from pglimits.leases l where l.lease_id = any (chosen) and l.expires_at <= now
      order by l.limit_id, l.key, l.lease_id for update;
      for i in 1 .. here loop
        states[i] := pglimits._take_expired(states[i], now);
      end loop;
      select array_agg(l.lease_id) into leased from pglimits.leases l
      where l.lease_id = any (chosen) and l.expires_at > now;
    end if;
    select array_agg(q.lease_id) into queued from pglimits.queue q where q.lease_id = any (chosen);
  end if;

  if cardinality(requests) > 1 then
    if not exists (select from unnest(requests) r where cardinality(r.slots) > 1) then
      served := pglimits._serve_runs(
        requests, states, configs, coalesce(leased, '{}') || coalesce(queued, '{}'), now);
      states := served.states;
      answers := served.answers;
    end if;
  end if;

  for i in 1 .. cardinality(requests) loop
    continue when (answers[i]).status is not null;
    request := requests[i];
    if request.lease_id = any (leased) then
      answers[i] := pglimits._answer_again(request, now);
      continue;
    end if;
    mine := null;
    if request.lease_id = any (queued) then
      select q.* into mine from pglimits.queue q where q.lease_id = request.lease_id
      order by q.turn nulls last, q.kept_until nulls first limit 1;
    end if;
    at := case when here = 1 and cardinality(request.keys) = 1 then array[1]
               else pglimits._locate(request, places) end;
    at_mine := case when mine.lease_id is not null
                    then array_position(places.labels, mine.limit_id || ' ' || mine.key) end;
    if mine.lease_id is not null
       and (mine.for_rate, mine.slots) is distinct from (request.for_rate, request.slots[array_position(at, at_mine)])
    then
      answers[i] := pglimits._in_use(request);
      continue;
    end if;
    decision := pglimits._decide(request, at, states, configs, mine, at_mine, now);
    states := decision.states;
    answers[i] := decision.answer;
  end loop;

  for i in 1 .. here loop
    if (states[i]).waiting > 0 and states[i] is distinct from was[i] and (configs[i]).active then
      states[i] := pglimits._advance(states[i], configs[i], now);
    end if;
    perform pglimits._save(states[i], was[i], now);
    if served.answers is not null and (states[i]).waiting > 0 and (states[i]).next_look < now + pglimits._liveness() * 0.3 then
      -- Who was put in line at its head hears when time alone may let it go on.
      head_id := (
        select q.lease_id from pglimits.queue q
        where q.limit_id = (states[i]).limit_id and q.key = (states[i]).key and q.turn is null
          and q.rank = (states[i]).head_rank and q.arrival = (states[i]).head_arrival limit 1);
      for n in 1 .. cardinality(requests) loop
        if (served.answers[n]).status = 'queued' and (requests[n]).lease_id = head_id then
          answers[n].retry_after := greatest((states[i]).next_look - now, interval '0');
        end if;
      end loop;
    end if;
  end loop;
  return answers;
end $$;

comment on function pglimits._serve(pglimits._request[]) is
  'Serves a batch of checked requests in one transaction, in their order; one answer for each. Null: check them again.';
