-- How a request is answered, whoever sends it: a new one, and one that is asked again.
--
-- Invariant: an id has one answer. A request that is asked again is never decided anew while something is known of it.
-- Called by: the functions of 092_acquire.sql, and those by which the wrapper sends many requests at once.

-- What is known of a request by its id: what it was granted, that its time was over, or that it waits. Null: nothing.
create or replace function pglimits._answer_known(lease_id uuid, told boolean)
returns pglimits._outcome
language plpgsql
volatile
as $$
declare
  now constant timestamptz := pglimits._now();
  lease record;
  waiter pglimits.queue;
  state pglimits.states;
  goes_in double precision;
begin
  select min(l.fence) as fence, max(l.acquired_at) as acquired_at, min(l.expires_at) as expires_at, max(l.slots) as slots,
         bool_and(l.claimed) as claimed
  into lease from pglimits.leases l
  where l.lease_id = _answer_known.lease_id and pglimits._is_live(l.expires_at, now) and (l.fence > 0 or l.slots = 0);
  if lease.fence = 0 then
    return row(1, 1, 'refused', null, null, null)::pglimits._outcome;
  elsif lease.fence > 0 then
    goes_in := greatest(date_part('epoch', lease.acquired_at - now), 0);
    if goes_in > 0 and not told then
      return row(1, 1, 'queued', lease.fence, null, array[goes_in])::pglimits._outcome;
    elsif not lease.claimed and lease.slots > 0 then
      lease.expires_at := (select min(c.expires_at) from pglimits._claim(array[lease_id], now) c);
    end if;
    return row(1, 1, 'granted', lease.fence, lease.expires_at, array[goes_in])::pglimits._outcome;
  end if;
  select q.* into waiter from pglimits.queue q where q.lease_id = _answer_known.lease_id;
  if waiter.lease_id is null then
    return null;
  end if;
  state := pglimits._reload(waiter.limit_id, waiter.key);
  return row(1, 1, 'queued', null, null, array[pglimits._looks_in(
    state, (pglimits._before(state, waiter.rank, waiter.arrival)).slots, waiter.slots, waiter.lease_duration is null,
    now)])::pglimits._outcome;
end $$;

comment on function pglimits._answer_known(uuid, boolean) is
  'What is known of a request by its id; null if nothing is. told: as in _decide.';

-- Begins the full duration of leases that were handed over. Never waits for a row: whoever has it locked claims it, renews it or ends it.
create or replace function pglimits._claim(lease_ids uuid[], now timestamptz)
returns table (lease_id uuid, expires_at timestamptz)
language plpgsql
volatile
as $$
#variable_conflict use_column
declare
  -- In a statement of its own: a row that was written since the snapshot is where the next one sees it.
  mine constant tid[] := array(
    select u.ctid from pglimits.leases u
    where u.lease_id = any (lease_ids) and not u.claimed and u.slots > 0 and u.fence > 0 and pglimits._is_live(u.expires_at, now)
    for update skip locked);
begin
  return query
  update pglimits.leases l
  set claimed = true,
      expires_at = greatest(l.expires_at, greatest(now, l.acquired_at) + l.lease_duration * interval '1 second')
  where l.ctid = any (mine)
  returning l.lease_id, l.expires_at;
end $$;

comment on function pglimits._claim(uuid[], timestamptz) is
  'Begins the full duration of leases that were handed over to waiters. Returns those, with their new ends.';

-- Whether what is asked now can be what is known under that id: a request over none of the same limits, or for another number of slots,
-- is another one (clamped, it may have got less). Names of limits that are missing by now say nothing.
create or replace function pglimits._is_same(request pglimits._request, lease_id uuid)
returns boolean
language plpgsql
volatile
as $$
begin
  return (
    with known as (
      select l.limit_id, l.key, nullif(l.slots, 0) as slots, case when l.fence > 0 then l.slots = 0 end as for_rate
      from pglimits.leases l
      where l.lease_id = _is_same.lease_id and (l.fence > 0 or l.slots = 0) and l.expires_at > pglimits._now()
      union all
      select p.limit_id, p.key, p.slots, q.lease_duration is null from pglimits.queue q
      cross join lateral unnest(coalesce(q.parts, array[row(q.limit_id, q.key, q.slots)::pglimits._part])) p
      where q.lease_id = _is_same.lease_id
    ), asked as (
      select c.limit_id, n.key, sum(n.slots) as slots
      from unnest(request.names, request.keys, request.slots) as n(name, key, slots)
      cross join lateral (select x.limit_id from pglimits.configs x where x.name = n.name offset 0) c
      group by c.limit_id, n.key
    )
    select not coalesce(bool_or(k.slots <> a.slots and (k.slots > a.slots or request.clamp is not true)), false) and coalesce(bool_and(k.for_rate = request.for_rate), true)
           and (count(k.limit_id) > 0 or count(a.limit_id) = 0 or not exists (select from known))
    from asked a left join known k on k.limit_id = a.limit_id and k.key = a.key);
end $$;

comment on function pglimits._is_same(pglimits._request, uuid) is
  'Whether a request can be the one that is known under an id.';

-- The answer to a request that has stood in line in vain: like one that is refused at once, it is told when time alone would let it in.
create or replace function pglimits._refused(request pglimits._request)
returns pglimits._outcome
language plpgsql
volatile
as $$
declare
  is_hopeless boolean;
begin
  select array_agg(p.limit_id), array_agg(p.key), array_agg(p.slots),
         bool_or(pglimits._is_hopeless(p."limit", p.slot_decay_per_second, p.slots, request.for_rate))
  into request.limit_ids, request.keys, request.slots, is_hopeless
  from (
    select c.limit_id, n.key, c."limit", c.slot_decay_per_second,
           least(sum(n.slots), case when request.clamp and c."limit" > 0 then c."limit" else 2147483647 end)::integer as slots
    from unnest(request.names, request.keys, request.slots) as n(name, key, slots)
    cross join lateral (select x.* from pglimits.configs x where x.name = n.name and x.active offset 0) c
    group by c.limit_id, n.key, c."limit", c.slot_decay_per_second
  ) p;
  return row(1, 1, 'refused', null, null,
             case when not is_hopeless then array[(pglimits._glance(request)).seconds] end)::pglimits._outcome;
end $$;

comment on function pglimits._refused(pglimits._request) is 'The answer to a request that has stood in line in vain.';

-- A request whose id is known: asked again, as a reply was lost, or as it waits. Null: it is to be asked as a new one. The request is
-- not checked: what would be wrong with it now is no matter to who has what it asked for.
create or replace function pglimits._ask_again(request pglimits._request, lease_id uuid, told boolean)
returns pglimits._outcome
language plpgsql
volatile
as $$
declare
  now timestamptz;
  waiter pglimits.queue;
  outcome pglimits._outcome;
begin
  if lease_id::text = any (string_to_array(current_setting('pglimits.queued', true), ',')) then
    perform pglimits._fail('CommitFirst',
      'the request was queued in the transaction that asks again, and nobody can grant it before that has ended: commit first');
  elsif not pglimits._is_same(request, lease_id) then
    perform pglimits._fail('InvalidArgument', format('lease_id %s is in use for another request', lease_id));
  end if;
  -- As everywhere, states first, and only then the rows of a line; of all that it wants, as it may go to stand elsewhere meanwhile.
  select q.* into waiter from pglimits.queue q where q.lease_id = _ask_again.lease_id;
  if waiter.parts is not null then
    perform pglimits._lock_all(array_agg(p.limit_id order by nth), array_agg(p.key order by nth), request.at_once)
    from unnest(waiter.parts) with ordinality as p(limit_id, key, slots, nth);
  elsif waiter.lease_id is not null then
    perform pglimits._lock_used(waiter.limit_id, waiter.key, request.at_once);
  end if;
  now := pglimits._now();
  update pglimits.queue q
  set expires_at = greatest(q.expires_at, now + pglimits._liveness()),
      deadline = least(q.deadline, now + request.timeout_seconds * interval '1 second')
  where q.lease_id = _ask_again.lease_id
  returning q.* into waiter;
  if waiter.lease_id is not null then
    perform pglimits._look(array[lease_id], told);
    if waiter.deadline <= now or waiter.parts is not null and pglimits._is_outdated(waiter) then
      -- Unless it has just been granted: its time is over, or it is another request by now.
      if exists (select from pglimits.queue q where q.lease_id = _ask_again.lease_id) then
        perform pglimits._release(array[lease_id], told);
        return case when waiter.deadline <= now then pglimits._refused(request) end;
      end if;
    end if;
  end if;
  outcome := pglimits._answer_known(lease_id, told);
  if outcome.status is null then
    -- What has ended is all that is known of it, unless somebody is renewing it right now.
    perform pglimits._lock_used(p.limit_id, p.key, request.at_once)
    from (select l.limit_id, l.key from pglimits.leases l where l.lease_id = _ask_again.lease_id order by l.limit_id + 0, l.key) p;
    perform from pglimits.leases l where l.lease_id = _ask_again.lease_id order by l.limit_id + 0, l.key for update;
    outcome := pglimits._answer_known(lease_id, told);
  end if;
  if outcome.status is null then
    perform pglimits._release(array[lease_id], told);
  elsif outcome.status = 'refused' then
    outcome := pglimits._refused(request);
  end if;
  return outcome;
end $$;

comment on function pglimits._ask_again(pglimits._request, uuid, boolean) is
  'Answers a request whose id is known; null: it is to be asked as a new one.';

-- Whether one of the limits of a request was deleted, or became too small for it since it asked. One that was deactivated is passed over.
create or replace function pglimits._is_outdated(waiter pglimits.queue)
returns boolean
language plpgsql
volatile
as $$
begin
  return exists (
    select from unnest(waiter.parts) as p(limit_id, key, slots)
    left join lateral (select x.* from pglimits.configs x where x.limit_id = p.limit_id offset 0) c on true
    where c.limit_id is null
       or c.active and not waiter.clamp
          and pglimits._is_hopeless(c."limit", c.slot_decay_per_second, p.slots, waiter.lease_duration is null));
end $$;

comment on function pglimits._is_outdated(pglimits.queue) is
  'Whether a request over several limits can no longer be granted as it was asked for.';

-- Requests that are all alike, from first to last. what: the function that was called, for its errors. holders: an array with one for each.
-- again: some of their ids may be known. at_once: this call has locked states already. So it has in a batch once one was decided, and
-- whoever finds that the limits were changed since they were looked up, and needs others now.
create or replace function pglimits._ask(
  what text, names text[], slots integer[], keys text[], for_rate boolean, timeout_seconds double precision,
  lease_duration double precision, priority integer, strict boolean, channel text, lease_ids uuid[], holders jsonb, again boolean,
  told boolean, clamp boolean default false, at_once boolean default false)
returns setof pglimits._outcome
language plpgsql
volatile
as $$
declare
  many constant integer := cardinality(lease_ids);
  request pglimits._request;
  outcome pglimits._outcome;
begin
  loop
    if many > 1 and (cardinality(names) > 1 or again and pglimits._is_known(lease_ids)) then
      for i in 1 .. many loop
        for outcome in
          select a.* from pglimits._ask(what, names, slots, keys, for_rate, timeout_seconds, lease_duration, priority, strict, channel,
                                        array[lease_ids[i]], jsonb_build_array(holders -> (i - 1)), again, told, clamp,
                                        i > 1 and pg_current_xact_id_if_assigned() is not null) a
        loop
          outcome.first := i;
          outcome.last := i;
          return next outcome;
        end loop;
      end loop;
      return;
    end if;
    if again and pglimits._is_known(lease_ids) then
      request.for_rate := for_rate;
      request.rank := -priority;
      request.timeout_seconds := timeout_seconds;
      request.names := names;
      request.clamp := clamp;
      request.at_once := at_once;
      select array_agg(keys[array_lower(keys, 1) + least(n, cardinality(keys)) - 1]),
             array_agg(slots[array_lower(slots, 1) + least(n, cardinality(slots)) - 1])
      into request.keys, request.slots from generate_series(1, cardinality(names)) n;
      outcome := pglimits._ask_again(request, lease_ids[1], told);
      if outcome.status is not null then
        return next outcome;
        return;
      end if;
      at_once := true;
    end if;
    request := pglimits._check_request(
      what, names, slots, keys, for_rate, timeout_seconds, lease_duration, priority, strict, channel, clamp);
    request.at_once := at_once;
    if cardinality(request.keys) = 0 then
      return next row(1, many, 'unlimited', null, null, null)::pglimits._outcome;
      return;
    end if;
    outcome := pglimits._refusal(request, many);
    if outcome.status is not null then
      -- Unless the same request, asked elsewhere at the same time, was the one that came first.
      continue when again and pglimits._is_known(lease_ids);
      return next outcome;
      return;
    elsif cardinality(request.keys) = 1 then
      return query select d.* from pglimits._decide(request, lease_ids, holders, again, told) d;
      exit when found;
    else
      outcome := pglimits._decide_several(request, lease_ids[1], holders, again, told);
      if outcome.status is not null then
        return next outcome;
        return;
      end if;
    end if;
    at_once := true;
  end loop;
end $$;

comment on function pglimits._ask(
  text, text[], integer[], text[], boolean, double precision, double precision, integer, boolean, text, uuid[], jsonb, boolean,
  boolean, boolean, boolean) is
  'Answers requests that are alike, in their order. Raises what is wrong with them.';

-- One request, as plain SQL makes it: with its missing limits named, and no longer wait for a lock than its caller is ready to wait (a
-- second, if not at all: contention is no reason to refuse). Past that, somebody keeps a limit locked in an open transaction.
create or replace function pglimits._answer(
  what text, names text[], slots integer[], keys text[], for_rate boolean, timeout_seconds double precision,
  lease_duration double precision, priority integer, holder jsonb, lease_id uuid, strict boolean, channel text, contended boolean,
  clamp boolean default false)
returns pglimits.acquired_all
language plpgsql
volatile
as $$
declare
  id constant uuid := coalesce(lease_id, gen_random_uuid());
  lock_timeout constant text := current_setting('lock_timeout');
  bounded constant boolean := lock_timeout = '0' and timeout_seconds is not null;
  tried_at timestamptz := clock_timestamp();
  until timestamptz;
  taken pglimits.acquired;
  outcome pglimits._outcome;
  missing text[];
  answer pglimits.acquired_all;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(
    pglimits._request_fault(timeout_seconds, lease_duration, priority, holder, strict, channel),
    pglimits._arrays_fault(names, slots, keys), case when clamp is null then 'clamp must not be null' end));
  until := tried_at + case when bounded then coalesce(nullif(timeout_seconds, 0), 1) * interval '1 second'
                           else nullif(lock_timeout, '0')::interval end;
  loop
    begin
      if bounded then
        -- In milliseconds, an integer. To try once, a lock is waited for one second.
        perform set_config('lock_timeout', least(ceil(coalesce(nullif(timeout_seconds, 0), 1) * 1000), 2147483647)::integer::text, true);
      end if;
      if contended then
        taken := pglimits._take_at_once(
          names[1], slots[1], keys[1], timeout_seconds, lease_duration, priority, holder, id, lease_id is not null, true);
      end if;
      if taken.status = 'granted' then
        outcome := row(1, 1, 'granted', taken.fence, taken.expires_at, array[0])::pglimits._outcome;
      else
        select a.* into outcome
        from pglimits._ask(what, names, slots, keys, for_rate, timeout_seconds, lease_duration, priority, strict, channel, array[id],
                           jsonb_build_array(coalesce(holder, pglimits._as_holder(pglimits._session()))), lease_id is not null, false,
                           clamp) a;
      end if;
      if bounded then
        perform set_config('lock_timeout', lock_timeout, true);
      end if;
      exit;
    exception when lock_not_available then
      if clock_timestamp() >= until then
        perform pglimits._fail('LimitLocked',
          format(
            'somebody keeps %s locked in an open transaction: %s', pglimits._listed(names),
            coalesce(pglimits._locked_by(names, keys), 'one that has ended by now')),
          'It has to commit or roll back: call acquire and release in transactions of their own.');
      end if;
    end;
    -- It had locked something, and could not have at once what it found that it needs by now. None of it is locked any more.
    perform pg_sleep(0.005);
    contended := false;
    timeout_seconds := pglimits._remaining(timeout_seconds, tried_at);
    tried_at := clock_timestamp();
  end loop;

  if outcome.status = 'full' then
    perform pglimits._fail('QueueFull', 'the line of ' || pglimits._listed(names) || ' is as long as its max_waiters allows');
  end if;
  missing := pglimits._missing(names);
  if missing is not null then
    raise warning 'not enforced, because there is no such limit: %', pglimits._listed(missing);
  end if;
  answer.status := outcome.status;
  answer.expires_at := outcome.expires_at;
  if outcome.status = 'queued' then
    answer.lease_id := id;
    select p."position", least(outcome.seconds[1], p.seconds_left, date_part('epoch', pglimits._heartbeat_every()))
    into answer."position", answer.retry_after from pglimits._place(id) p;
    perform set_config('pglimits.queued', concat_ws(',', nullif(current_setting('pglimits.queued', true), ''), id), true);
  elsif outcome.status = 'refused' then
    answer.retry_after := outcome.seconds[1];
  elsif outcome.status = 'granted' then
    answer.lease_id := id;
    if not for_rate then
      answer.fences := case when cardinality(names) = 1 then array[outcome.fence] else pglimits._fences(id, names, keys) end;
    end if;
  end if;
  return answer;
end $$;

comment on function pglimits._answer(
  text, text[], integer[], text[], boolean, double precision, double precision, integer, jsonb, uuid, boolean, text, boolean,
  boolean) is
  'Serves one request; raises what is wrong with it. contended: the short way was clear, but for somebody else at work.';

-- The fences of a lease, one for each name; null where it is not enforced.
create or replace function pglimits._fences(lease_id uuid, names text[], keys text[])
returns bigint[]
language plpgsql
volatile
as $$
begin
  return array(
    select (
      select l.fence from pglimits.leases l
      where l.lease_id = _fences.lease_id and l.expires_at > pglimits._now()
        and l.limit_id is not distinct from (select c.limit_id from pglimits.configs c where c.name = n.name)
        and l.key is not distinct from keys[array_lower(keys, 1) + least(n.nth, cardinality(keys))::integer - 1])
    from unnest(names) with ordinality as n(name, nth)
    order by n.nth);
end $$;

comment on function pglimits._fences(uuid, text[], text[]) is 'The fences of a lease, in the order of the names it was asked under.';

-- The place of a waiter in its line, which counts those too who have died and not been noticed, and the time until its deadline.
create or replace function pglimits._place(lease_id uuid, out "position" integer, out seconds_left double precision)
language plpgsql
volatile
as $$
declare
  waiter record;
begin
  select q.limit_id, q.key, q.rank, q.arrival, q.deadline into waiter from pglimits.queue q where q.lease_id = _place.lease_id;
  if found then
    "position" := 1 + (pglimits._before(
      pglimits._reload(waiter.limit_id, waiter.key), waiter.rank, waiter.arrival)).waiters;
    if waiter.deadline < 'infinity' then
      seconds_left := greatest(date_part('epoch', waiter.deadline - pglimits._now()), 0);
    end if;
  end if;
end $$;

comment on function pglimits._place(uuid) is
  'The place of a waiter in its line, 1 being the head, and the seconds until its deadline; null if it has left the line, as its moment '
  'is near.';
