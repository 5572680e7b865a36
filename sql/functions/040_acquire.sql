-- acquire, rate_limit, peek: what callers call.
--
-- Every public function plans once (plan_cache_mode: a custom plan for every array takes longer than its work), and by plain
-- index scans only: a sequential or bitmap scan, chosen while a table had one page, would walk all the dead versions of the
-- next hour. And with jit = off, since such plans look expensive enough to be compiled.
-- A row that is looked up by its lease id is compared with "is not distinct from" in the rest of its key: with "=", a
-- plan made on empty tables may take the index on (limit_id, key, ...) instead, and walk all that was ever there. For the same
-- reason whether its turn is null is asked of the row that was found, never in the where clause: two indexes have just such rows.

-- What a look without any lock finds. Null where only the locks can tell: something is due that would change the answer.
-- settled: instead of null, reckon with what is due as if it had been applied.
--
-- Of each limit everything is read in one snapshot, and the clock after it was taken: what is found was so at that moment.
create or replace function pglimits._glance(request pglimits._request, settled boolean)
returns pglimits._findings
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  seen record;
  states pglimits.states[];
  configs pglimits.configs[];
  full_at text[];
  at integer[] := array[]::integer[];
  findings pglimits._findings;
begin
  for p in 1 .. cardinality(request.keys) loop
    select c as config, t.state, h.is_due,
           case when c.max_waiters is not null then pglimits._queue_full(t.state, c, n.now) end as is_full into seen
    from (select pglimits._now() as now offset 0) n
    cross join pglimits.configs c
    left join lateral (
      -- A lease that was renewed has not ended.
      select s as state,
             s.next_look <= n.now or s.next_expiry <= n.now and exists (
               select from pglimits.leases l
               where l.limit_id = s.limit_id and l.key = s.key and l.expires_at >= s.next_expiry and l.expires_at <= n.now) as is_due
      from pglimits.states s
      where s.limit_id = c.limit_id and s.key = request.keys[p]
      order by s.version desc limit 1) h on true
    cross join lateral (
      select case when h.is_due is null then pglimits._unused(c.limit_id, request.keys[p])
                  when h.is_due and settled then pglimits._as_settled(h.state, c, n.now)
                  else h.state end as state offset 0) t
    where c.limit_id = request.limit_ids[p];
    if seen.is_due and not settled then
      return null;
    end if;
    states[p] := seen.state;
    configs[p] := seen.config;
    full_at[p] := seen.is_full;
    at[p] := p;
  end loop;
  findings := pglimits._survey(request, at, states, configs, null, pglimits._now());
  findings.queue_full := pglimits._may_not_wait(findings, full_at);
  return findings;
end $$;

comment on function pglimits._glance(pglimits._request, boolean) is
  'What stands in the way of a request, read without a lock.';

-- The state of a key that was never used.
create or replace function pglimits._unused(limit_id bigint, key text)
returns pglimits.states
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  state pglimits.states;
begin
  state.limit_id := limit_id;
  state.key := key;
  state.held := 0;
  state.booked := 0;
  state.pinned := 0;
  state.peak := 0;
  state.waiting := 0;
  state.next_expiry := timestamptz 'infinity';
  return state;
end $$;

comment on function pglimits._unused(bigint, text) is 'The state of a key that was never used.';

-- A state as _settle would leave it, as far as it can be told without writing. Stable, as _queue_full is.
create or replace function pglimits._as_settled(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed numeric := pglimits._decayed(config, now);
  head record;
  goes boolean;
begin
  state.held := state.held - (
    select coalesce(sum(l.slots), 0) from pglimits.leases l
    where l.limit_id = state.limit_id and l.key = state.key
      and l.expires_at >= state.next_expiry and l.expires_at <= now);
  if now >= state.next_death then
    state.booked := state.booked - (
      select coalesce(sum(q.slots + q.gap), 0) from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.expires_at <= now and not q.pinned);
  end if;
  if state.waiting = 0 then
    return state;
  end if;
  for head in
    select q.rank, q.arrival, q.slots, q.several, q.for_rate from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn is null and q.expires_at > now
      and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)
    order by q.rank, q.arrival
  loop
    state.head_rank := head.rank;
    state.head_arrival := head.arrival;
    goes := not head.several and case
      when head.for_rate then config."limit" > 0
      else pglimits._fits_at(state, config, head.slots, now) = '-infinity' end;
    if not goes then
      return state;
    elsif not head.for_rate then
      state.held := state.held + head.slots;
    end if;
    if config.slot_decay_per_second > 0 then
      state.booked := greatest(state.booked, decayed) + head.slots;
    end if;
  end loop;
  state.waiting := 0;
  return state;
end $$;

comment on function pglimits._as_settled(pglimits.states, pglimits.configs, timestamptz) is
  'A state without ended leases and the dead, with those granted who can go. For looking only.';

-- The answer to a request that is certain without a lock, a row or a transaction id: it is wrong, or it cannot be granted
-- and may not wait (at all, or that long, or because the queue is full). Else its status is null: the locks will tell.
create or replace function pglimits._answer_at_once(request pglimits._request)
returns pglimits._answer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  answer pglimits._answer;
  findings pglimits._findings;
begin
  answer.lease_id := request.lease_id;
  -- Who has what it asks for gets it again, whatever would be wrong with it now.
  if request.error is not null
     and (request.error = 'InvalidArgument' or not request.chosen or not pglimits._are_known(array[request.lease_id]))
  then
    answer.status := 'error';
    answer.error := request.error;
    answer.message := request.message;
  elsif cardinality(request.keys) = 0 and not request.chosen then
    answer.status := 'unlimited';
  elsif request.wait = interval '0' or request.bounded or request.for_rate and request.wait is not null then
    findings := pglimits._glance(request, false);
    -- Asked after the look: what was granted to it meanwhile, when it was first asked, is no reason to refuse it.
    if request.chosen and pglimits._are_known(array[request.lease_id]) then
      null;
    elsif findings.fits_at is not null and (request.wait = interval '0' or findings.blocked_at is null) then
      answer.status := 'refused';
      if findings.fits_at < 'infinity' then
        answer.retry_after := greatest(findings.fits_at - pglimits._now(), interval '0');
      end if;
    elsif findings.queue_full is not null then
      answer.status := 'error';
      answer.error := 'QueueFull';
      answer.message := findings.queue_full;
    end if;
  end if;
  return answer;
end $$;

comment on function pglimits._answer_at_once(pglimits._request) is
  'The answer to a request that is certain without a lock; its status is null if there is none.';

-- Answers a batch of requests: refusals that are certain without a lock, the others under the locks. Null: check them again.
create or replace function pglimits._answer_all(requests pglimits._request[])
returns pglimits._answer[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  served pglimits._request[];
  at integer[];
  served_answers pglimits._answer[];
  answer pglimits._answer;
  answers pglimits._answer[];
begin
  if not exists (
    select from unnest(requests) r
    where r.error is not null or cardinality(r.slots) = 0 or r.wait = interval '0' or r.bounded
       or r.for_rate and r.wait is not null)
  then
    return pglimits._serve(requests);
  end if;
  for i in 1 .. cardinality(requests) loop
    answer := pglimits._answer_at_once(requests[i]);
    if answer.status is null then
      served := served || requests[i];
      at := at || i;
    end if;
    answers[i] := answer;
  end loop;
  if served is not null then
    served_answers := pglimits._serve(served);
    if served_answers is null then
      return null;
    end if;
    for i in 1 .. cardinality(at) loop
      answers[at[i]] := served_answers[i];
    end loop;
  end if;
  return answers;
end $$;

comment on function pglimits._answer_all(pglimits._request[]) is
  'Answers requests in their order: refusals that are certain without a lock, the others under the locks. Null: check them again.';

-- One request, with its errors raised and its missing limits named.
create or replace function pglimits._answer(
  names text[], slots integer[], keys text[], lease_duration interval, wait interval, priority integer,
  holder jsonb, lease_id uuid, strict boolean, channel text, for_rate boolean)
returns pglimits._answer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  request pglimits._request;
  answer pglimits._answer;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  loop
    request := pglimits._check_request(
      names, slots, keys, lease_duration, wait, priority, holder, lease_id, strict, channel, for_rate);
    answer := pglimits._answer_at_once(request);
    if answer.status is null then
      answer := (pglimits._serve(array[request]))[1];
    end if;
    exit when answer.status is not null;
  end loop;
  if answer.error is not null then
    perform pglimits._fail(answer.error, answer.message);
  end if;
  if request.missing is not null then
    raise warning 'not enforced, because there is no such limit: %',
      (select string_agg(format('%L', m.name), ', ') from (select distinct u.name from unnest(request.missing) as u(name)) m);
  end if;
  if answer.status in ('refused', 'unlimited') then
    answer.lease_id := null;
  end if;
  return answer;
end $$;

comment on function pglimits._answer(
  text[], integer[], text[], interval, interval, integer, jsonb, uuid, boolean, text, boolean) is
  'Serves one request; raises what is wrong with it.';

-- The place of a waiter in its queue, whose state is locked. The last of a line without dead stands where the line is long;
-- only who has others behind it is counted, and all are looked at only as often as one may have died.
create or replace function pglimits._position(lease_id uuid)
returns integer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  mine pglimits.queue;
  was pglimits.states;
  state pglimits.states;
  now timestamptz := pglimits._now();
begin
  select q.* into mine from pglimits.queue q where q.lease_id = _position.lease_id
  order by q.turn nulls first, q.kept_until nulls first limit 1;
  if mine.lease_id is null or mine.turn is not null then
    return null;
  end if;
  select s.* into was from pglimits.states s
  where s.limit_id = mine.limit_id and s.key = mine.key order by s.version desc limit 1;
  state := was;
  if now >= state.next_waiter_death then
    state := pglimits._bury_waiters(state, now);
    perform pglimits._save(state, was, now);
  end if;
  if now < state.next_waiter_death and not exists (
    select from pglimits.queue q
    where q.limit_id = mine.limit_id and q.key = mine.key and q.turn is null
      and (q.rank, q.arrival) > (mine.rank, mine.arrival))
  then
    return state.waiting;
  end if;
  return (select count(*) from pglimits.queue q
          where q.limit_id = mine.limit_id and q.key = mine.key and q.turn is null
            and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)
            and (q.rank, q.arrival) <= (mine.rank, mine.arrival) and q.expires_at > now);
end $$;

comment on function pglimits._position(uuid) is 'The place of a waiter in its queue, 1 being the head; null if it waits in none.';

create or replace function pglimits.acquire(
  names text[],
  slots integer[] default '{1}',
  keys text[] default '{""}',
  lease_duration interval default '5 minutes',
  wait interval default '0',
  priority integer default 0,
  holder jsonb default null,
  lease_id uuid default null,
  strict boolean default false,
  channel text default null)
returns pglimits.acquired
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
  answer pglimits._answer := pglimits._answer(
    names, slots, keys, lease_duration, wait, priority, holder, lease_id, strict, channel, false);
begin
  return row(answer.status, answer.lease_id, answer.fences, answer.expires_at, answer.retry_after,
             case when answer.status = 'queued' then pglimits._position(answer.lease_id) end)::pglimits.acquired;
end $$;

comment on function pglimits.acquire(
  text[], integer[], text[], interval, interval, integer, jsonb, uuid, boolean, text) is
$$Takes slots of several limits, all or none, until they are released or the lease ends.

names: the limits. slots: how many, one number for all or one for each. keys: likewise. lease_duration: 1 second to
366 days. wait: how long the caller is ready to wait in all; 0 tries once, null waits for ever. priority: higher goes
first. holder: who it is. lease_id: an id of the caller's choice, so that the call can be repeated. strict: a missing
limit is an error. channel: what to notify when it is granted.

status: granted; queued (call again with the same arguments and lease_id within retry_after, or lose the place after
10 seconds); refused (retry_after: when time alone would let it in; null: only a release can tell); unlimited (no limit
was enforced: each is missing or inactive).

Errors: PL001 a bad argument, PL002 strict and a limit is missing, PL004 more slots than a limit has, PL006 the queue is
full. Call it in a transaction of its own: the limit is locked until commit.$$;

create or replace function pglimits.acquire(
  name text,
  slots integer default 1,
  key text default '',
  lease_duration interval default '5 minutes',
  wait interval default '0',
  priority integer default 0,
  holder jsonb default null,
  lease_id uuid default null,
  strict boolean default false,
  channel text default null)
returns pglimits.acquired_one
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
  answer pglimits._answer := pglimits._take_alike(
    name, slots, key, lease_duration, wait, priority, case when holder is not null then jsonb_build_array(holder) end,
    array[coalesce(lease_id, gen_random_uuid())], lease_id is not null, strict, channel);
begin
  if answer.status is null then
    answer := pglimits._answer(
      array[name], array[slots], array[key], lease_duration, wait, priority, holder, lease_id, strict, channel, false);
  end if;
  return row(answer.status, answer.lease_id, answer.fences[1], answer.expires_at, answer.retry_after,
             case when answer.status = 'queued' then pglimits._position(answer.lease_id) end)::pglimits.acquired_one;
end $$;

comment on function pglimits.acquire(
  text, integer, text, interval, interval, integer, jsonb, uuid, boolean, text) is
  'Takes slots of one limit until they are released or the lease ends. As acquire over several limits, with one fence.';

create or replace function pglimits.rate_limit(
  names text[],
  slots integer[] default '{1}',
  wait interval default '0',
  keys text[] default '{""}',
  strict boolean default false,
  lease_id uuid default null,
  channel text default null)
returns pglimits.reserved
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
  answer pglimits._answer := pglimits._answer(
    names, slots, keys, '5 minutes', wait, 0, null, lease_id, strict, channel, true);
begin
  return row(answer.status, answer.wait, answer.retry_after, answer.lease_id)::pglimits.reserved;
end $$;

comment on function pglimits.rate_limit(text[], integer[], interval, text[], boolean, uuid, text) is
$$Takes slots that come back by decay only; the place on every limit is reserved at once.

names, slots, keys, strict: as in acquire. wait: how far ahead a turn may be reserved; 0: now or never, null: any turn.

status: granted (sleep for wait, then go: no second call is needed); refused (the turn would come after wait; nothing
was taken; retry_after: when it could go at once); queued (somebody who also wants slots to hold is ahead: call again
with the same arguments and lease_id within retry_after); unlimited. Over several limits: the latest of their turns.
release(lease_id) before the turn gives it back as far as nobody goes too fast by it.

Errors: as acquire, and PL005 for a limit without slot_decay_per_second.$$;

create or replace function pglimits.rate_limit(
  name text,
  slots integer default 1,
  wait interval default '0',
  key text default '',
  strict boolean default false,
  lease_id uuid default null,
  channel text default null)
returns pglimits.reserved
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
  id constant uuid := coalesce(lease_id, gen_random_uuid());
  turns record;
  answer pglimits._answer;
begin
  turns := pglimits._turns_alike(name, slots, key, wait, null, array[id], lease_id is not null, strict, channel);
  if turns.status = 'granted' then
    return row(turns.status, make_interval(secs => turns.waits[1]), null, id)::pglimits.reserved;
  elsif turns.status is not null then
    return row(turns.status, null, turns.retry_after, null)::pglimits.reserved;
  end if;
  answer := pglimits._answer(
    array[name], array[slots], array[key], '5 minutes', wait, 0, null, lease_id, strict, channel, true);
  return row(answer.status, answer.wait, answer.retry_after, answer.lease_id)::pglimits.reserved;
end $$;

comment on function pglimits.rate_limit(text, integer, interval, text, boolean, uuid, text) is
  'Takes slots of one rate limit, now or at a turn reserved ahead. As rate_limit over several limits.';

-- What acquire (or, with for_rate, rate_limit) would answer. It takes no lock and changes nothing.
create or replace function pglimits.peek(
  names text[],
  slots integer[] default '{1}',
  keys text[] default '{""}',
  wait interval default '0',
  priority integer default 0,
  strict boolean default false,
  for_rate boolean default false)
returns pglimits.peeked
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
  request pglimits._request;
  findings pglimits._findings;
  peeked pglimits.peeked;
begin
  if for_rate is null then
    perform pglimits._fail('InvalidArgument', 'for_rate must not be null');
  end if;
  request := pglimits._check_request(names, slots, keys, '5 minutes', wait, priority, null, null, strict, null, for_rate);
  if request.error is not null then
    perform pglimits._fail(request.error, request.message);
  end if;
  findings := pglimits._glance(request, true);
  peeked.status := case
    when findings.enforced = 0 then 'unlimited'
    when findings.fits_at is null then 'granted'
    when findings.blocked_at is not null and coalesce(wait > interval '0', true) then 'queued'
    else 'refused' end;
  if peeked.status in ('granted', 'queued') and findings.queue_full is not null then
    perform pglimits._fail('QueueFull', findings.queue_full);
  elsif peeked.status = 'granted' then
    peeked.wait := findings.turn_in;
  elsif findings.fits_at < 'infinity' then
    peeked.retry_after := greatest(findings.fits_at - pglimits._now(), interval '0');
  end if;
  if peeked.status = 'queued' then
    peeked."position" := 1 + (
      select count(*) from pglimits.queue q
      where q.limit_id = request.limit_ids[findings.blocked_at] and q.key = request.keys[findings.blocked_at]
        and q.turn is null and q.rank <= request.rank and q.expires_at > pglimits._now());
  end if;
  return peeked;
end $$;

comment on function pglimits.peek(text[], integer[], text[], interval, integer, boolean, boolean) is
  'What acquire (for_rate: rate_limit) with these arguments would answer now: status, wait, retry_after, position. '
  'Changes nothing and waits for nobody. Errors as acquire.';

create or replace function pglimits.peek(
  name text,
  slots integer default 1,
  key text default '',
  wait interval default '0',
  priority integer default 0,
  strict boolean default false,
  for_rate boolean default false)
returns pglimits.peeked
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
begin
  return pglimits.peek(array[name], array[slots], array[key], wait, priority, strict, for_rate);
end $$;

comment on function pglimits.peek(text, integer, text, interval, integer, boolean, boolean) is
  'What acquire (for_rate: rate_limit) on one limit would answer now. Changes nothing and waits for nobody.';

-- What can be read as an interval only PostgreSQL can tell, and by an error that names nothing. This is not called where one is
-- written as the clients do it: an exception block is a subtransaction.
create or replace function pglimits._check_interval(argument text, value jsonb)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  problem boolean := jsonb_typeof(value) in ('array', 'object');  -- '[1]' can be read as an interval
begin
  begin
    perform (value #>> '{}')::interval;
  exception when data_exception then
    problem := true;
  end;
  if problem then
    perform pglimits._fail('InvalidArgument', format('%s must be an interval, not %s', argument, left(value::text, 60)));
  end if;
end $$;

comment on function pglimits._check_interval(text, jsonb) is 'Raises InvalidArgument where a member of a request is no interval.';

-- What requests of a batch have in common, if its members are of the types that they are read as. Else an error that names one.
create or replace function pglimits._typed(kind jsonb)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  -- Numbers and booleans may be written as strings. What a path cannot tell, because a member is not there, is no fault.
  problem constant text := case
    when kind @@ 'strict exists($.names ? (@.type() != "null" && (@.type() != "array" ||
                             exists(@[*] ? (@.type() == "array" || @.type() == "object")))))'
      then 'names must be an array of strings'
    when kind @@ 'strict exists($.keys ? (@.type() != "null" && (@.type() != "array" ||
                             exists(@[*] ? (@.type() == "array" || @.type() == "object")))))'
      then 'keys must be an array of strings'
    when kind @@ 'strict exists($.slots ? (@.type() != "null" && (@.type() != "array" ||
                             exists(@[*] ? (@.type() != "number" && @.type() != "null" && @.type() != "string" ||
                                            @.type() == "string" && !(@ like_regex "^[-+]?[0-9]{1,9}$") ||
                                            @ < -2147483648 || @ > 2147483647 || @ != @.floor())))))'
      then 'slots must be an array of integers'
    when kind @@ 'strict exists($.priority ? (@.type() != "number" && @.type() != "null" && @.type() != "string" ||
                                              @.type() == "string" && !(@ like_regex "^[-+]?[0-9]{1,9}$") ||
                                              @ < -2147483648 || @ > 2147483647 || @ != @.floor()))'
      then 'priority must be an integer'
    when kind @@ 'strict exists($.strict ? (@.type() == "array" || @.type() == "object" ||
                                            @.type() == "number" && @ != 0 && @ != 1 ||
                                            @.type() == "string" && !(@ like_regex "^(true|false)$")))'
      then 'strict must be a boolean'
    when kind @@ 'strict exists($.for_rate ? (@.type() == "array" || @.type() == "object" ||
                                              @.type() == "number" && @ != 0 && @ != 1 ||
                                              @.type() == "string" && !(@ like_regex "^(true|false)$")))'
      then 'for_rate must be a boolean'
  end;
begin
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  elsif kind @@ 'strict exists($.lease_duration ? (@.type() != "null" && @.type() != "string" ||
                        !(@ like_regex "^[0-9]{1,9}[.][0-9]{6} s$")))' then
    perform pglimits._check_interval('lease_duration', kind -> 'lease_duration');
  end if;
  return kind;
end $$;

comment on function pglimits._typed(jsonb) is
  'What requests of a batch have in common. Raises InvalidArgument where a member is of the wrong type.';

-- Checks the requests of a batch. Most of them ask alike: what is the same is checked once, and copied for each who asks; where
-- that has found something, or what is each one's own may be wrong, each is checked by itself.
create or replace function pglimits._check_requests(requests jsonb)
returns pglimits._request[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  checked pglimits._request[];
begin
  with asked as materialized (
    select e.ordinal, e.request - '{lease_id,wait,holder}'::text[] as kind, (e.request ->> 'lease_id')::uuid as lease_id,
           (e.request ->> 'wait')::interval as wait, nullif(e.request -> 'holder', 'null') as holder
    from jsonb_array_elements(requests) with ordinality as e(request, ordinal)
  ), kinds as materialized (
    select k.kind, r.names, coalesce(r.slots, '{1}') as slots, coalesce(r.keys, '{""}') as keys,
           coalesce(r.lease_duration, '5 minutes') as lease_duration, coalesce(r.priority, 0) as priority,
           coalesce(r.strict, false) as strict, r.channel, coalesce(r.for_rate, false) as for_rate
    from (select distinct a.kind from asked a) k
    cross join lateral jsonb_to_record(pglimits._typed(k.kind)) as r(
      names text[], slots integer[], keys text[], lease_duration interval, priority integer, strict boolean,
      channel text, for_rate boolean)
  ), models as materialized (
    select k.*, exists (select from pglimits.former_names f where f.name = any (k.names)) as were_others,
           pglimits._check_request(k.names, k.slots, k.keys, k.lease_duration, null, k.priority, null, null,
                                   k.strict, k.channel, k.for_rate) as model
    from kinds k
  )
  select array_agg(
    case
      when (m.model).error is null and (m.model).missing is null and not m.were_others
           and coalesce(a.wait >= interval '0', true) and coalesce(length(a.holder::text) <= 8000, true)
      then row(coalesce(a.lease_id, gen_random_uuid()), (m.model).for_rate, (m.model).limit_ids, (m.model).keys,
               (m.model).slots, (m.model).places, (m.model).rank, (m.model).lease_duration, a.wait, a.holder,
               (m.model).channel, a.lease_id is not null, (m.model).bounded, null, null, null)::pglimits._request
      else pglimits._check_request(m.names, m.slots, m.keys, m.lease_duration, a.wait, m.priority, a.holder,
                                   a.lease_id, m.strict, m.channel, m.for_rate)
    end order by a.ordinal)
  into checked
  from asked a join models m on m.kind = a.kind;
  return checked;
end $$;

comment on function pglimits._check_requests(jsonb) is 'Checks the requests of a batch, in their order; null if there are none.';

-- The answers to the requests of a batch, in their order.
create or replace function pglimits._answer_many(requests jsonb)
returns table (
  ordinal integer, status text, lease_id uuid, fences bigint[], expires_at timestamptz, retry_after interval,
  wait interval, missing text[], error text, message text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  checked pglimits._request[];
  answers pglimits._answer[];
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  loop
    checked := pglimits._check_requests(requests);
    if checked is null then
      return;
    elsif (select count(distinct c.lease_id) < count(*) from unnest(checked) c) then
      perform pglimits._fail('InvalidArgument', 'requests must not give the same lease_id twice');
    end if;
    answers := pglimits._answer_all(checked);
    exit when answers is not null;
  end loop;
  return query
  select a.ordinal::integer, a.status, a.lease_id, a.fences, a.expires_at, a.retry_after, a.wait,
         (checked[a.ordinal]).missing, a.error, a.message
  from unnest(answers) with ordinality as a(
    status, lease_id, fences, expires_at, retry_after, wait, error, message, ordinal);
end $$;

comment on function pglimits._answer_many(jsonb) is 'Checks and serves the requests of a batch.';

-- Many requests in one call, each answered by itself: what the clients use to send what queued up meanwhile.
create or replace function pglimits.acquire_many(
  requests jsonb, durable boolean default true, patience interval default null)
returns table (
  ordinal integer, status text, lease_id uuid, fences bigint[], expires_at timestamptz, retry_after interval,
  wait interval, missing text[], error text, message text)
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
  lock_timeout text;
begin
  if requests is null or jsonb_typeof(requests) <> 'array' or requests @? 'strict $[*] ? (@.type() != "object")' then
    perform pglimits._fail('InvalidArgument', 'requests must be an array of objects');
  elsif jsonb_array_length(requests) > 10000 then
    perform pglimits._fail('InvalidArgument',
      format('requests must be at most 10000, not %s', jsonb_array_length(requests)));
  elsif requests @? 'strict $[*] ? (exists(@.lease_id ? (@.type() != "null" && (@.type() != "string" ||
                     !(@ like_regex "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$" flag "i")))))' then
    perform pglimits._fail('InvalidArgument', 'lease_id must be a UUID in each of requests');
  elsif requests @? 'strict $[*] ? (exists(@.wait ? (@.type() != "null" && @.type() != "string" ||
                     !(@ like_regex "^[0-9]{1,9}[.][0-9]{6} s$"))))' then
    perform pglimits._check_interval('wait', e.request -> 'wait') from jsonb_array_elements(requests) as e(request);
  end if;
  lock_timeout := pglimits._for_this_call(durable, patience);
  return query select a.* from pglimits._answer_many(requests) a;
  if lock_timeout is not null then
    perform set_config('lock_timeout', lock_timeout, true);
  end if;
end $$;

comment on function pglimits.acquire_many(jsonb, boolean, interval) is
$$Serves many requests in one call and one transaction, in their order, each with an answer of its own.

requests: an array of objects with the arguments of acquire as members (names, slots, keys, lease_duration, wait,
priority, holder, lease_id, strict, channel; wait null or absent: for ever), and for_rate: true for what rate_limit does.
durable: false commits with synchronous_commit = off. patience: how long to wait for the lock of a limit that somebody
keeps in a long transaction (null: as lock_timeout says); past it error 55P03, and nothing was done.

A row for each: its ordinal, what acquire or rate_limit would have answered, the limits that are missing, and, with
status error, the kind of error (as errors() lists them) and its message.$$;

-- The same for requests that differ in nothing but their ids and holders. Most batches are such.
create or replace function pglimits.acquire_alike(
  name text,
  lease_ids uuid[],
  slots integer default 1,
  key text default '',
  lease_duration interval default '5 minutes',
  wait interval default '0',
  priority integer default 0,
  holders jsonb default null,
  strict boolean default false,
  channel text default null,
  for_rate boolean default false,
  durable boolean default true,
  patience interval default null)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
set lock_timeout = '300ms'
as $$
declare
  answer pglimits._answer;
  turns record;
  problem constant text := case
    when lease_ids is null or cardinality(lease_ids) not between 1 and 10000 then 'lease_ids must be 1 to 10000'
    when array_ndims(lease_ids) <> 1 then 'lease_ids must be a flat array'
    when array_position(lease_ids, null) is not null then 'lease_ids must not contain null'
    when holders is not null and (jsonb_typeof(holders) <> 'array' or jsonb_array_length(holders) <> cardinality(lease_ids))
      then 'holders must be an array with one for each of lease_ids'
    when lease_duration is null then 'lease_duration must not be null'
    when priority is null then 'priority must not be null'
    when strict is null then 'strict must not be null'
    when for_rate is null then 'for_rate must not be null'
  end;
begin
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  elsif (durable and patience is null) is not true then
    perform pglimits._for_this_call(durable, patience);
  end if;
  if for_rate then
    turns := pglimits._turns_alike(name, slots, key, wait, holders, lease_ids, true, strict, channel);
    if turns.status is not null then
      return jsonb_build_array(jsonb_build_array(
        cardinality(lease_ids), turns.status, null, null, turns.waits, extract(epoch from turns.retry_after)));
    end if;
  else
    answer := pglimits._take_alike(
      name, slots, key, lease_duration, wait, priority, holders, lease_ids, true, strict, channel);
    if answer.status is not null then
      return jsonb_build_array(jsonb_build_array(
        cardinality(lease_ids), answer.status, answer.fences[1], extract(epoch from answer.expires_at)));
    end if;
  end if;
  return (
    select jsonb_agg(jsonb_build_array(
      1, a.status, a.fences[1], extract(epoch from a.expires_at),
      case when a.wait is not null then array[extract(epoch from a.wait)] end, extract(epoch from a.retry_after),
      a.missing is not null, a.error, a.message) order by a.ordinal)
    from pglimits._answer_many((
      select jsonb_agg(jsonb_build_object(
        'names', array[name], 'slots', array[slots], 'keys', array[key], 'lease_duration', lease_duration, 'wait', wait,
        'priority', priority, 'strict', strict, 'channel', channel, 'for_rate', for_rate, 'lease_id', asked.lease_id,
        'holder', holders -> (asked.nth - 1)::integer) order by asked.nth)
      from unnest(lease_ids) with ordinality as asked(lease_id, nth))) a);
end $$;

comment on function pglimits.acquire_alike(
  text, uuid[], integer, text, interval, interval, integer, jsonb, boolean, text, boolean, boolean, interval) is
$$Serves requests on one limit that differ in nothing but lease_ids and holders (an array, one for each id), in one call and
one transaction, in their order. The other arguments are those of acquire; for_rate: do what rate_limit does; durable as in
acquire_many; patience: how long to wait for the lock of the limit, 0.3 seconds if null; past it error 55P03, and nothing was done.

Answers an array of arrays: how many requests in a row it answers, their status, the fence of the first (each of the others
has one above that of the one before), when their leases end (epoch), how long each has until its turn (an array, seconds),
retry_after (seconds), whether the limit is missing, and, with status error, the kind of error (as errors() lists them) and
its message.$$;

-- Settings of one call: how durable it is, and how long it waits for a lock. Returns the lock_timeout to go back to.
create or replace function pglimits._for_this_call(durable boolean, patience interval)
returns text
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  before text;
begin
  if durable is null then
    perform pglimits._fail('InvalidArgument', 'durable must not be null');
  elsif extract(epoch from patience) <= 0 or extract(epoch from patience) > 1728000 then
    perform pglimits._fail('InvalidArgument', format('patience must be above 0 and at most 20 days, not %s', patience));
  end if;
  if not durable then
    perform set_config('synchronous_commit', 'off', true);
  end if;
  if patience is null then
    return null;
  end if;
  before := current_setting('lock_timeout');
  perform set_config('lock_timeout', ceil(extract(epoch from patience) * 1000)::bigint::text, true);
  return before;
end $$;

comment on function pglimits._for_this_call(boolean, interval) is
  'durable false: this transaction commits with synchronous_commit = off. patience: the lock_timeout from now on; '
  'returns what it was, null if it stays.';
