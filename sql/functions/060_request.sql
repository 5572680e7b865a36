-- Requests: checking what a caller asks for, and looking at what would become of it without any lock.
--
-- Invariant: nothing is written here, and nothing is locked. A refusal that needs no lock stands on what one snapshot shows of a limit.
-- Called by: the public functions, before anything is locked.

-- What is wrong with the arrays of a request, or null.
create or replace function pglimits._arrays_fault(names text[], slots integer[], keys text[])
returns text
language sql
stable
return case
  when names is null then 'names must not be null'
  when cardinality(names) = 0 then 'names must not be empty'
  when array_ndims(names) <> 1 then 'names must be a flat array'
  when cardinality(names) > 100 then 'names must be at most 100, not ' || cardinality(names)
  when slots is null then 'slots must not be null'
  when array_ndims(slots) <> 1 or cardinality(slots) not in (1, cardinality(names))
    then format('slots must be one number for all names or one for each of the %s names, not %s', cardinality(names),
                left(slots::text, 60))
  when keys is null then 'keys must not be null'
  when array_ndims(keys) <> 1 or cardinality(keys) not in (1, cardinality(names))
    then format('keys must be one for all names or one for each of the %s names, not %s', cardinality(names),
                left(keys::text, 60))
end;

comment on function pglimits._arrays_fault(text[], integer[], text[]) is 'What is wrong with the arrays of a request, or null.';

-- Of a name of which there is no limit: a driver may have made such a text of a list; to take it for one limit that is missing would let
-- everybody in.
create or replace function pglimits._list_fault(what text, name text)
returns text
language sql
immutable
return case when name ~ '[{},]|^[[(].*[])]$' then
  format('there is no limit named %L; for several limits call %s', name, case when what like '%\_all' then what else what || '_all' end) end;

comment on function pglimits._list_fault(text, text) is
  'What is wrong with a name of which there is no limit, and that looks like a list, or null. what: the function that was called.';

-- Checks what a caller asks for and finds its limits. Raises what is wrong with it. what: the function, as an error names it.
create or replace function pglimits._check_request(
  what text, names text[], slots integer[], keys text[], for_rate boolean, timeout_seconds double precision,
  lease_duration double precision, priority integer, strict boolean, channel text, clamp boolean default false)
returns pglimits._request
language plpgsql
volatile
as $$
declare
  request pglimits._request;
  config pglimits.configs;
  key text;
  amount bigint;
  place integer;
begin
  perform pglimits._check(pglimits._arrays_fault(names, slots, keys));
  request.for_rate := for_rate;
  request.names := names[:];  -- arrays may begin anywhere; slices begin at 1
  request.rank := -priority;
  request.timeout_seconds := timeout_seconds;
  request.lease_duration := lease_duration;
  request.channel := channel;
  request.clamp := clamp;
  request.limit_ids := '{}';
  request.keys := '{}';
  request.slots := '{}';
  slots := slots[:];
  keys := keys[:];
  for i in 1 .. cardinality(names) loop
    key := keys[least(i, cardinality(keys))];
    amount := slots[least(i, cardinality(slots))];
    select c.* into config from pglimits.configs c where c.name = request.names[i];
    if not found then
      perform pglimits._check(pglimits._name_fault('name', request.names[i]));
      perform pglimits._check(pglimits._list_fault(what, request.names[i]));
    end if;
    perform pglimits._check(coalesce(
      pglimits._name_fault('key', key, true),
      case when amount is null then 'slots must not be null'
           when amount < 1 then format('slots must be at least 1, not %s', amount) end));

    place := null;
    if config.limit_id is null then
      request.missing := request.missing || request.names[i];
    elsif config.active then
      -- The same limit named twice: the slots add up.
      for p in 1 .. cardinality(request.keys) loop
        if request.limit_ids[p] = config.limit_id and request.keys[p] = key then
          place := p;
          amount := amount + request.slots[p];
        end if;
      end loop;
      if clamp and config."limit" > 0 then
        amount := least(amount, config."limit");
      elsif amount > config."limit" and config."limit" > 0 and not (strict and request.missing is not null) then
        perform pglimits._fail('SlotsExceedLimit', format(
          'slots must be at most the limit: %L has %s, asked for %s', config.name, config."limit", amount));
      end if;
      if for_rate and config.slot_decay_per_second = 0 then
        perform pglimits._fail('NoSlotDecay', format(
          'limit %L has no slot_decay_per_second: its slots never come back by themselves', config.name));
      end if;
      place := coalesce(place, cardinality(request.keys) + 1);
      request.limit_ids[place] := config.limit_id;
      request.keys[place] := key;
      request.slots[place] := least(amount, 2147483647);
    end if;
  end loop;

  if strict and request.missing is not null then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %s', pglimits._listed(request.missing)));
  elsif cardinality(request.keys) > 1 then
    request := pglimits._in_lock_order(request);
  end if;
  return request;
end $$;

comment on function pglimits._check_request(
  text, text[], integer[], text[], boolean, double precision, double precision, integer, boolean, text, boolean) is
  'Checks the arguments of a request and finds its limits. clamp: slots above a limit count as the limit. Raises InvalidArgument, LimitNotFound, SlotsExceedLimit, NoSlotDecay.';

create or replace function pglimits._missing(names text[])
returns text[]
language plpgsql
volatile
as $$
begin
  return (select array_agg(n.name) from unnest(names) as n(name)
          where not exists (select from pglimits.configs c where c.name = n.name offset 0));
end $$;

comment on function pglimits._missing(text[]) is 'Those of some names of which there is no limit; null if there are none.';

-- The id of a limit whose name was checked, without a lock; _lock_limit is for who changes it.
create or replace function pglimits._limit_id(name text)
returns bigint
language plpgsql
stable
as $$
declare
  found_id bigint;
begin
  select c.limit_id into found_id from pglimits.configs c where c.name = _limit_id.name;
  if not found then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name));
  end if;
  return found_id;
end $$;

comment on function pglimits._limit_id(text) is 'The id of a limit. Raises LimitNotFound.';

create or replace function pglimits._listed(names text[])
returns text
language sql
immutable
return (select string_agg(format('%L', u.name), ', ' order by u.name) from (select distinct n.name from unnest(names) as n(name)) u);

comment on function pglimits._listed(text[]) is 'Names for a message, each once.';

-- Sorts the parts of a request by (limit id, key), the order in which states are locked.
create or replace function pglimits._in_lock_order(request pglimits._request)
returns pglimits._request
language plpgsql
immutable
as $$
begin
  select array_agg(p.limit_id order by p.limit_id, p.key), array_agg(p.key order by p.limit_id, p.key),
         array_agg(p.slots order by p.limit_id, p.key)
  into request.limit_ids, request.keys, request.slots
  from (select u.limit_id, u.key collate "C" as key, u.slots
        from unnest(request.limit_ids, request.keys, request.slots) as u(limit_id, key, slots)) p;
  return request;
end $$;

comment on function pglimits._in_lock_order(pglimits._request) is 'Sorts the parts of a request by (limit id, key).';

-- What would become of a request, read without any lock: granted, queued, refused, or full (the line is). certain: it is not granted,
-- whatever the locks show. seconds: until it can be its turn, by who is before it; null where only a release can tell. waiters: before it,
-- where it would stand.
create or replace function pglimits._glance(
  request pglimits._request, out status text, out certain boolean, out seconds double precision, out waiters integer)
language plpgsql
volatile
as $$
declare
  state pglimits.states;
  before record;
  now timestamptz;
  ready_at timestamptz;
  by_time boolean := true;
  is_full boolean := false;
  is_due boolean := false;
begin
  status := 'granted';
  certain := false;
  seconds := 0;
  for p in 1 .. cardinality(request.keys) loop
    -- Each state in one snapshot, and the clock after it was taken: what is found was so at that moment.
    state := pglimits._reload(request.limit_ids[p], request.keys[p]);
    now := pglimits._now();
    if state.limit_id is null then
      state := pglimits._unused(c, request.keys[p]) from pglimits.configs c where c.limit_id = request.limit_ids[p];
    elsif state.next_expiry <= now then
      state.held := state.held - pglimits._ended_slots(state.limit_id, state.key, state.next_expiry, now);
    end if;
    ready_at := pglimits._ready_at(state, request.slots[p], request.for_rate, now);
    before := pglimits._before(state, request.rank, 'infinity');
    if ready_at > now or before.waiters > 0 then
      if state.slot_decay_per_second > 0 and state."limit" > 0 then
        seconds := greatest(seconds, date_part('epoch', pglimits._moment(state, before.slots + request.slots[p], now) - now));
      end if;
      if status = 'granted' then
        status := 'queued';
        waiters := before.waiters;
        is_full := coalesce(state.waiting >= state.max_waiters, false) and state.max_waiters <= state.waiting - pglimits._dead_waiters(
          state.limit_id, state.key, state.head_rank, state.head_arrival, now);
      end if;
      by_time := by_time and state.slot_decay_per_second > 0 and ready_at < 'infinity';
      certain := certain or ready_at > now and request.timeout_seconds = 0;
      is_due := is_due or state.waiting > 0 and state.next_look <= now;  -- its head may have died, and everybody in it
    end if;
  end loop;
  if status = 'queued' and (request.timeout_seconds = 0 or seconds > request.timeout_seconds) then
    status := 'refused';
    certain := certain or request.timeout_seconds > 0 and not is_due;
  elsif is_full then
    status := 'full';
    certain := true;
  end if;
  if not by_time then
    seconds := null;
  end if;
end $$;

comment on function pglimits._glance(pglimits._request) is
  'What would become of a request that is made now, read without a lock.';

-- A refusal (or: the line is full) that is certain without a lock, a row or a transaction id; null if only the locks can tell.
create or replace function pglimits._refusal(request pglimits._request, many integer)
returns pglimits._outcome
language plpgsql
volatile
as $$
declare
  glance constant record := pglimits._glance(request);
begin
  return case when glance.certain then row(1, many, glance.status, null, null, array[glance.seconds])::pglimits._outcome end;
end $$;

comment on function pglimits._refusal(pglimits._request, integer) is
  'The answer to requests that are alike if it is certain without a lock that they are refused; else null.';
