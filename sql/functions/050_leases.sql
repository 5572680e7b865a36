-- What happens to a lease, or to a place in a queue, after acquire: renew, release, watch.

-- What is wrong with a list of lease ids is an error.
create or replace function pglimits._check_ids(lease_ids uuid[])
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  problem constant text := case
    when lease_ids is null then 'lease_ids must not be null'
    when array_ndims(lease_ids) > 1 then 'lease_ids must be a flat array'
    when array_position(lease_ids, null) is not null then 'lease_ids must not contain null'
  end;
begin
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
end $$;

comment on function pglimits._check_ids(uuid[]) is
  'Raises InvalidArgument for a list of lease ids that is null or nested, and for a null in it.';

-- Renews leases. Needs no state: it only moves an end further away. Rows are locked in the order of
-- (limit id, key, lease id), as everywhere.
create or replace function pglimits.renew(lease_ids uuid[], lease_duration interval default null)
returns table (lease_id uuid, renewed boolean, expires_at timestamptz)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  now timestamptz := pglimits._now();
  mine tid[];
  seconds constant double precision := extract(epoch from renew.lease_duration);
  problem text := case when renew.lease_duration is not null then pglimits._duration_error(renew.lease_duration) end;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check_ids(lease_ids);
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  -- Not those that have ended: who takes them out passes over a row that is locked.
  select array_agg(x.place) into mine from (
    select l.ctid as place from pglimits.leases l where l.lease_id = any (lease_ids) and l.expires_at > now
    order by l.limit_id, l.key, l.lease_id for update) x;
  now := pglimits._now();
  return query
  with later as (
    update pglimits.leases l
    set expires_at = greatest(l.expires_at, now + coalesce(make_interval(secs => seconds), l.lease_duration)),
        lease_duration = coalesce(make_interval(secs => seconds), l.lease_duration),
        claimed = true
    where l.ctid = any (mine) and l.expires_at > now
    returning l.lease_id, l.expires_at, l.parts
  )
  select asked.id, count(later.lease_id) > 0 and count(later.lease_id) = min(later.parts), min(later.expires_at)
  from (select distinct u.id from unnest(lease_ids) as u(id)) asked
  left join later on later.lease_id = asked.id
  group by asked.id;
end $$;

comment on function pglimits.renew(uuid[], interval) is
  'Moves the ends of live leases to lease_duration from now (null: the duration they were taken with), never nearer. '
  'A row for each id: whether it was still live (on all its limits), and its new end. Safe to repeat. PL001 for a duration below 1 second.';

create or replace function pglimits.renew(lease_id uuid, lease_duration interval default null)
returns boolean
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
  if lease_id is null then
    perform pglimits._fail('InvalidArgument', 'lease_id must not be null');
  end if;
  return (select r.renewed from pglimits.renew(array[lease_id], lease_duration) r);
end $$;

comment on function pglimits.renew(uuid, interval) is
  'Moves the end of a live lease to lease_duration from now (null: as it was taken). False if it had ended.';

-- Ends leases, and lets waiters leave, and hands what comes free to the waiters at the head. Returns the ids that were
-- live, one that was on several limits several times.
create or replace function pglimits._release(lease_ids uuid[])
returns uuid[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  limit_ids bigint[];
  keys text[];
  asleep pglimits._places;
  around pglimits._places;
  place record;
  ended uuid[] := array[]::uuid[];
  waits boolean;
begin
  perform pglimits._check_ids(lease_ids);
  for attempt in 1 .. 5 loop
    waits := exists (select from pglimits.queue q where q.lease_id = any (lease_ids));
    if waits or cardinality(lease_ids) > 1
       or exists (select from pglimits.leases l where l.lease_id = any (lease_ids) and l.parts > 1)
    then
      select array_agg(p.limit_id), array_agg(p.key) into limit_ids, keys
      from (
        select l.limit_id, l.key from pglimits.leases l where l.lease_id = any (lease_ids)
        union
        select q.limit_id, q.key from pglimits.queue q where waits and q.lease_id = any (lease_ids)
        union
        -- Where a waiter for several limits may move to.
        select o.limit_id, o.key
        from pglimits.queue q cross join lateral unnest(q.limit_ids, q.keys) as o(limit_id, key)
        where waits and q.lease_id = any (lease_ids)
      ) p;
      select array_agg(q.limit_id), array_agg(q.key) into asleep.limit_ids, asleep.keys
      from pglimits.queue q
      where waits and q.lease_id = any (lease_ids) and case when q.turn is null then false else true end;
      around := pglimits._around(asleep);
      perform pglimits._lock_several(limit_ids || around.limit_ids, keys || around.keys);
    end if;
    for place in
      select here.limit_id, here.key, array_agg(here.lease_id) as lease_ids
      from (
        select l.limit_id, l.key, l.lease_id from pglimits.leases l where l.lease_id = any (lease_ids)
        union all
        select q.limit_id, q.key, q.lease_id from pglimits.queue q where waits and q.lease_id = any (lease_ids)
      ) here
      group by here.limit_id, here.key order by here.limit_id, here.key
    loop
      ended := ended || pglimits._release_at(place.limit_id, place.key, place.lease_ids);
    end loop;
    perform pglimits._rearrange_at(around);
    around := null;
    -- A waiter may have asked for other limits while we waited for a lock: look where it is now.
    exit when not waits;
  end loop;
  return ended;
end $$;

comment on function pglimits._release(uuid[]) is 'Ends leases, places in a queue and turns. Returns the ids that were live.';

-- What the clients call. Safe to repeat, as release is.
create or replace function pglimits.release_many(
  lease_ids uuid[], durable boolean default true, patience interval default null)
returns uuid[]
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
  ended uuid[];
begin
  if (durable and patience is null) is not true then
    perform pglimits._for_this_call(durable, patience);
  end if;
  ended := pglimits._release_alike(lease_ids);
  if cardinality(ended) = cardinality(lease_ids) then
    return array[]::uuid[];
  end if;
  ended := coalesce(ended, pglimits._release(lease_ids));
  return array(select distinct u.id from unnest(lease_ids) as u(id) where u.id <> all (ended));
end $$;

comment on function pglimits.release_many(uuid[], boolean, interval) is
  'As release. Returns the ids of those that had ended already. durable: false commits with synchronous_commit = off. '
  'patience: how long to wait for a lock, as in acquire_alike.';

-- Safe to repeat: an unknown or ended lease is 'false', not an error.
create or replace function pglimits.release(lease_ids uuid[])
returns table (lease_id uuid, released boolean)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  ended uuid[] := coalesce(pglimits._release_alike(lease_ids), pglimits._release(lease_ids));
begin
  return query select asked.id, asked.id = any (ended) from (select distinct u.id from unnest(lease_ids) as u(id)) asked;
end $$;

comment on function pglimits.release(uuid[]) is
  'Ends leases, takes waiting requests out of their queue, and gives reserved turns back. A row for each id: true if it '
  'was live, false if it had ended already. Wakes waiters.';

create or replace function pglimits.release(lease_id uuid)
returns boolean
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
  if lease_id is null then
    perform pglimits._fail('InvalidArgument', 'lease_id must not be null');
  end if;
  return cardinality(coalesce(pglimits._release_alike(array[lease_id]), pglimits._release(array[lease_id]))) > 0;
end $$;

comment on function pglimits.release(uuid) is
  'Ends a lease. True if it was live (or waiting), false if it had ended already. Wakes waiters.';

-- The part of release that concerns one (limit, key). Returns the ids that were live.
create or replace function pglimits._release_at(limit_id bigint, key text, lease_ids uuid[])
returns uuid[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  was pglimits.states := pglimits._lock_used(limit_id, key);
  state pglimits.states := was;
  config pglimits.configs;
  now timestamptz := pglimits._now();
  freed bigint;
  live uuid[];
  withdrawn pglimits._withdrawn;
begin
  if state.limit_id is null then
    return array[]::uuid[];
  end if;
  select c.* into config from pglimits.configs c where c.limit_id = state.limit_id;
  -- A turn that has come stays booked.
  state := pglimits._unpin(state, config, now);

  if cardinality(lease_ids) > 1 then
    -- In the order in which renew locks them.
    perform from pglimits.leases l
    where l.lease_id = any (lease_ids)
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    order by l.lease_id for update;
  end if;
  with gone as (
    delete from pglimits.leases l
    where l.lease_id = any (lease_ids)
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    returning l.lease_id, l.slots, l.expires_at
  )
  select coalesce(sum(g.slots), 0), coalesce(array_agg(g.lease_id) filter (where g.expires_at > now), '{}')
  into freed, live from gone g;
  state.held := state.held - freed;

  if state.waiting > 0 or state.pinned > 0 or state.next_death < 'infinity' or freed = 0 then
    withdrawn := pglimits._withdraw(state, config, lease_ids, now);
    state := withdrawn.state;
    live := live || withdrawn.live;
  end if;

  if config.active and (state.waiting > 0 or now >= state.next_look) then
    state := pglimits._settle(state, config, now);
  end if;
  perform pglimits._save(state, was, now);
  return live;
end $$;

comment on function pglimits._release_at(bigint, text, uuid[]) is
  'Ends those of the leases, places and turns that are on one (limit, key), and grants what fits now.';

-- What waiting processes call when they are notified, when it is time to look again, and at least every few seconds.
-- It takes up what was handed over, keeps the others alive, and tells all of them how they stand. It touches a state
-- only if something is due there, and not at all if it is not to settle anything.
create or replace function pglimits.watch(lease_ids uuid[], settle boolean default true)
returns table (
  lease_id uuid, status text, fence bigint, expires_at timestamptz, retry_after interval, wait interval,
  ends_in interval)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  waits boolean;
  limit_ids bigint[];
  keys text[];
  moving pglimits._places;
  was pglimits.states;
  state pglimits.states;
  config pglimits.configs;
  now timestamptz := pglimits._now();
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check_ids(lease_ids);
  if settle is null then
    perform pglimits._fail('InvalidArgument', 'settle must not be null');
  end if;
  waits := exists (select from pglimits.queue q where q.lease_id = any (lease_ids));

  if waits and settle then
    select array_agg(p.limit_id), array_agg(p.key) into limit_ids, keys
    from (select distinct q.limit_id, q.key from pglimits.queue q where q.lease_id = any (lease_ids)) p
    where now >= (select s.next_look from pglimits.states s
                  where s.limit_id = p.limit_id and s.key = p.key order by s.version desc limit 1);
    moving := pglimits._moving(lease_ids, now);
    if moving.keys is not null or cardinality(keys) > 1 then
      perform pglimits._lock_several(limit_ids || moving.limit_ids, keys || moving.keys);
    end if;
    for i in 1 .. coalesce(cardinality(keys), 0) loop
      was := pglimits._lock_used(limit_ids[i], keys[i]);
      continue when was.limit_id is null;
      now := pglimits._now();
      select c.* into config from pglimits.configs c where c.limit_id = limit_ids[i];
      if config.active and now >= was.next_look then
        state := pglimits._settle(was, config, now);
        perform pglimits._save(state, was, now);
      end if;
    end loop;
    perform pglimits._rearrange_at(moving);
  end if;

  now := pglimits._now();
  if waits then
    -- Never waits for a row: one that is locked is being granted or removed right now.
    update pglimits.queue q
    set expires_at = least(now + pglimits._liveness(), q.kept_until), looks_at = due.looks_at
    from (
      select w.lease_id, w.limit_id, w.key, least(
        now + pglimits._liveness() * 0.3,
        -- The head looks at the very moment; the others a little later, in case the head has died.
        s.next_look + case when (w.rank, w.arrival) = (s.head_rank, s.head_arrival) then interval '0'
                           else interval '50 milliseconds' end) as looks_at
      from pglimits.queue w
      cross join lateral (
        select h.head_rank, h.head_arrival, h.next_look from pglimits.states h
        where h.limit_id = w.limit_id and h.key = w.key order by h.version desc limit 1) s
      where w.lease_id = any (lease_ids) and w.expires_at > now and w.expires_at < coalesce(w.kept_until, 'infinity')
        and case when w.kept_until is null
                 then w.looks_at <= now + interval '1 second' or w.expires_at < now + pglimits._liveness() * 0.7
                 else w.expires_at < now + pglimits._liveness() * 0.9 end
      for update of w skip locked
    ) due
    where q.lease_id = due.lease_id
      and q.limit_id is not distinct from due.limit_id and q.key is not distinct from due.key;
  end if;

  -- In one statement, so that what is handed over meanwhile is either claimed or not seen yet.
  return query
  with claimed as materialized (select c.* from pglimits._claim(lease_ids, now) c)
  select l.lease_id, 'granted', l.fence, e.expires_at, null::interval, null::interval, e.expires_at - now
  from pglimits.leases l
  left join claimed c on c.lease_id = l.lease_id and c.limit_id = l.limit_id and c.key = l.key
  cross join lateral (select coalesce(c.expires_at, l.expires_at) as expires_at) e
  where l.lease_id = any (lease_ids) and l.expires_at > now
  union all
  select q.lease_id,
         case when q.expires_at <= now then 'retry'
              when q.turn is not null then case when pglimits._until(c, q.turn, now) is null then 'retry' else 'granted' end
              when q.called or q.limit_ids is not null and pglimits._is_outdated(q) then 'retry'
              else 'queued' end,
         null, null,
         case when q.turn is null then greatest(
           least(q.looks_at, case when q.limit_ids is not null then pglimits._kept_until(q.lease_id, now) end) - now,
           interval '0') end,
         case when q.turn is not null then pglimits._until(c, q.turn, now) end,
         case when q.turn is null then q.expires_at - now end
  from pglimits.queue q join pglimits.configs c on c.limit_id = q.limit_id
  where q.lease_id = any (lease_ids) and q.kept_until is null
  union all
  select asked.id, 'retry', null, null, null, null, null
  from (select distinct u.id from unnest(lease_ids) as u(id)) asked
  where not exists (select from pglimits.leases l where l.lease_id = asked.id and l.expires_at > now)
    and not exists (select from pglimits.queue q where q.lease_id = asked.id and q.kept_until is null);
end $$;

comment on function pglimits.watch(uuid[], boolean) is
$$How requests that were queued stand now; keeps them alive for another 10 seconds. settle: grant, and move, what time or a
change has made possible where they wait; false waits for no limit that somebody keeps locked. A row for each (one for each limit
of a turn on several): granted (a lease begins its full duration; a turn comes after wait), queued (watch again within
retry_after; also who slept towards a limit that was set to 0), or retry (ask again with the same lease_id: the limit was
changed or deleted, the place was lost, or a request over several limits, or one for a turn without a channel, has been
called; where one of its rows says so). ends_in: how long the lease, or the place in line, lasts without another call.$$;

-- Where some of these sleep behind somebody who may move up, or has to move, or may be found dead.
create or replace function pglimits._moving(lease_ids uuid[], now timestamptz)
returns pglimits._places
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  here pglimits._places;
begin
  select array_agg(p.limit_id), array_agg(p.key) into here.limit_ids, here.keys
  from (
    select q.limit_id, q.key, bool_or(q.limit_ids is not null and q.expires_at < 'infinity' and pglimits._is_outdated(q)) as moves
    from pglimits.queue q
    where q.lease_id = any (lease_ids) and case when q.turn is null then false else true end
    group by q.limit_id, q.key
  ) p
  where p.moves
     or exists (select from pglimits.queue o where o.limit_id = p.limit_id and o.key = p.key and o.called and o.turn is not null)
     or now >= (select s.next_death from pglimits.states s
                where s.limit_id = p.limit_id and s.key = p.key order by s.version desc limit 1);
  return pglimits._around(here);
end $$;

comment on function pglimits._moving(uuid[], timestamptz) is
  'The (limit, key)s that are needed to move those behind whom some of these sleep; null if nobody moves.';

-- Whether one of the limits of a waiting request was changed since it asked, also one for which it does not stand in line.
create or replace function pglimits._is_outdated(waiter pglimits.queue)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return waiter.seen <> pglimits._changes(waiter.limit_ids);
end $$;

comment on function pglimits._is_outdated(pglimits.queue) is
  'Whether one of the limits of a waiting request over several was changed since it asked.';

-- Whether a waiter may go on sleeping. Reads its own row and no state.
create or replace function pglimits.may_sleep(lease_id uuid)
returns boolean
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
  return exists (
    select from pglimits.queue q
    where q.lease_id = may_sleep.lease_id
      and case when q.turn is null and q.kept_until is null
               then not q.called and q.looks_at > pglimits._now() and not (q.limit_ids is not null and pglimits._is_outdated(q)) end);
end $$;

comment on function pglimits.may_sleep(uuid) is
  'Whether a queued request has nothing to do yet. Cheap: reads its own row, and no state. False: call watch.';

-- Waits in plain SQL. No security definer and no search_path here: PostgreSQL forbids both to a procedure that commits,
-- so everything in it is qualified, the operators and the types too.
create or replace procedure pglimits.acquire_wait(
  name text,
  slots integer default 1,
  key text default '',
  lease_duration interval default '5 minutes',
  wait interval default null,
  priority integer default 0,
  holder jsonb default null,
  lease_id uuid default null,
  strict boolean default false,
  inout status text default null,
  inout granted_lease_id uuid default null,
  inout fence bigint default null,
  inout expires_at timestamptz default null)
language plpgsql
as $$
declare
  request_id pg_catalog.uuid := coalesce(lease_id, pg_catalog.gen_random_uuid());
  started pg_catalog.timestamptz := pg_catalog.clock_timestamp();
  remaining interval := wait;
  answer pglimits.acquired_one;
  news pg_catalog.record;
begin
  -- Fails at once, with nothing taken, where a transaction is open around the call.
  commit;
  loop
    answer := pglimits.acquire(name, slots, key, lease_duration, remaining, priority, holder, request_id, strict);
    commit;
    while answer.status operator(pg_catalog.=) 'queued' loop
      if wait operator(pg_catalog.<=) (pg_catalog.clock_timestamp() operator(pg_catalog.-) started) then
        perform pglimits.release(request_id);
        commit;
        answer.status := 'refused';
        exit;
      end if;
      if pglimits.may_sleep(request_id) then
        commit;
        perform pg_catalog.pg_sleep(0.005);
        continue;
      end if;
      select * into news from pglimits.watch(array[request_id]);
      commit;
      answer.status := news.status;
      answer.lease_id := request_id;
      answer.fence := news.fence;
      answer.expires_at := news.expires_at;
    end loop;
    exit when answer.status operator(pg_catalog.<>) 'retry';
    remaining := case when wait is not null then greatest(
      wait operator(pg_catalog.-) (pg_catalog.clock_timestamp() operator(pg_catalog.-) started), interval '0') end;
  end loop;
  status := answer.status;
  if answer.status operator(pg_catalog.=) 'granted' then
    granted_lease_id := answer.lease_id;
    fence := answer.fence;
    expires_at := answer.expires_at;
  end if;
end $$;

comment on procedure pglimits.acquire_wait(
  text, integer, text, interval, interval, integer, jsonb, uuid, boolean, text, uuid, bigint, timestamptz) is
$$Takes slots of one limit and waits for them, in plain SQL: queues, commits, and watches its own row.

Arguments as acquire, but wait null, the default, waits for ever. Answers status (granted, refused when wait is over,
unlimited), granted_lease_id, fence and expires_at. Must be called outside a transaction block.

A caller that dies while it waits leaves the queue as soon as the server notices: call
  set client_connection_check_interval = '1s'
in the session before, or the server looks only when it has an answer, and the caller's turn comes to nobody for a whole lease.$$;

-- Drivers that send strings without a type reach these instead of "function is not unique".
create or replace function pglimits._uuid(lease_id text)
returns uuid
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if lease_id is null
     or lease_id !~* '^(([0-9a-f]{4}-?){7}[0-9a-f]{4}|[{]([0-9a-f]{4}-?){7}[0-9a-f]{4}[}])$' then
    perform pglimits._fail('InvalidArgument', format('lease_id must be a UUID, not %L', left(lease_id, 60)));
  end if;
  return lease_id::uuid;
end $$;

comment on function pglimits._uuid(text) is 'A lease id from its text. Raises InvalidArgument.';

create or replace function pglimits.renew(lease_id text, lease_duration interval default null)
returns boolean
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
  return pglimits.renew(pglimits._uuid(lease_id), lease_duration);
end $$;

comment on function pglimits.renew(text, interval) is 'renew(uuid), for drivers that send untyped strings.';

create or replace function pglimits.release(lease_id text)
returns boolean
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
  return pglimits.release(pglimits._uuid(lease_id));
end $$;

comment on function pglimits.release(text) is 'release(uuid), for drivers that send untyped strings.';
