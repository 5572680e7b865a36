-- Waiting: what whoever waits calls when it is time to look, the heartbeat of processes, and the procedures that wait in plain SQL.
--
-- Invariant: a look touches a state only if something is due there. A process is one row, which its heartbeat updates, however many wait
-- in it; when it has died, whoever looks next finds its requests dead as they come to the heads of their lines.
-- Called by: the wrapper (_watch), repeated requests (_look), and anybody in plain SQL (acquire_wait, rate_limit_wait).

-- Serves the lines in which these wait, where time has made something possible, or where one of them was told to look for itself.
create or replace function pglimits._look(lease_ids uuid[], own boolean)
returns void
language plpgsql
volatile
as $$
declare
  limit_ids bigint[];
  keys text[];
  state pglimits.states;
  now timestamptz := pglimits._now();
begin
  select array_agg(p.limit_id), array_agg(p.key) into limit_ids, keys
  from (
    select q.limit_id, q.key from pglimits.queue q
    where q.lease_id = any (lease_ids) and now >= (
      select s.next_look from pglimits.states s where s.limit_id = q.limit_id and s.key = q.key order by s.generation desc limit 1)
    union
    select p.limit_id, p.key collate "C" from pglimits.queue q cross join lateral unnest(q.parts) as p(limit_id, key, slots)
    where q.lease_id = any (lease_ids) and q.looks_at <= now
    order by 1, 2
  ) p;
  if keys is null then
    return;
  end if;
  perform pglimits._lock_all(limit_ids, keys);
  now := pglimits._now();
  -- Whoever was told to look for itself does so now, and can be told again.
  update pglimits.queue q set looks_at = 'infinity'
  where q.lease_id = any (lease_ids) and q.parts is not null and q.looks_at <= now;
  for p in 1 .. cardinality(keys) loop
    state := pglimits._reload(limit_ids[p], keys[p]);
    if state.active and state.waiting > 0 then
      perform pglimits._serve(state, now, own, lease_ids[1]);
    end if;
  end loop;
end $$;

comment on function pglimits._look(uuid[], boolean) is 'Serves the lines in which some requests wait, where something is due.';

-- A sign of life of a process, in a transaction of its own: nothing that is locked may hold it up. The next one is due when the first of
-- the others would have died, or before.
create or replace function pglimits._beat(channel text)
returns double precision
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  now constant timestamptz := pglimits._now();
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(
    case when channel is null then 'channel must not be null' end, pglimits._request_fault(0, 1, 0, null, false, channel)));
  insert into pglimits.processes (channel, expires_at) values (channel, now + pglimits._liveness())
  on conflict on constraint processes_pkey do update set expires_at = excluded.expires_at;
  return date_part('epoch', least(
    (select min(p.expires_at) from pglimits.processes p where p.expires_at > now), now + pglimits._heartbeat_every()) - now);
end $$;

comment on function pglimits._beat(text) is
  'Keeps alive what waits in a process, for 10 seconds. Returns in how many seconds to call again, and to look. For the wrapper.';

-- What a process calls for those of its requests that are to look, or of which it was told something; and for all of them every few
-- seconds. It takes up what was handed over.
create or replace function pglimits._watch(lease_ids uuid[], only_news boolean)
returns table (
  lease_id uuid, status text, fence bigint, expires_at timestamptz, seconds double precision, ends_in double precision)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  now timestamptz;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(
    pglimits._ids_fault(lease_ids), case when only_news is null then 'only_news must not be null' end));
  perform pglimits._look(lease_ids, true);
  now := pglimits._now();
  -- In one statement, so that what is handed over meanwhile is either claimed or not seen yet.
  return query
  with claimed as materialized (
    select c.* from pglimits._claim(lease_ids, now) c
  ), granted as materialized (
    select l.lease_id, min(l.fence) as fence, min(coalesce(c.expires_at, l.expires_at)) as expires_at,
           max(l.acquired_at) as acquired_at
    from pglimits.leases l left join claimed c on c.lease_id = l.lease_id
    where l.lease_id = any (lease_ids) and l.expires_at > now and (l.fence > 0 or l.slots = 0)
    group by l.lease_id
  ), waiting as materialized (
    select q.lease_id, q.parts is not null and pglimits._is_outdated(q) as is_outdated,
           case when not only_news or (q.rank, q.arrival) = (s.head_rank, s.head_arrival) then pglimits._looks_in(
             s, (pglimits._before(s, q.rank, q.arrival)).slots, q.slots, q.lease_duration is null, now) end as looks_in
    from pglimits.queue q
    cross join lateral pglimits._reload(q.limit_id, q.key) s
    where q.lease_id = any (lease_ids)
  )
  select g.lease_id, case when g.fence > 0 then 'granted' else 'retry' end, g.fence, g.expires_at,
         greatest(date_part('epoch', g.acquired_at - now), 0), date_part('epoch', g.expires_at - now)
  from granted g
  union all
  select w.lease_id, case when w.is_outdated then 'retry' else 'queued' end, null, null, w.looks_in, null
  from waiting w where w.is_outdated or not only_news or w.looks_in < date_part('epoch', pglimits._heartbeat_every())
  union all
  select asked.id, 'retry', null, null, null, null
  from (select distinct u.id from unnest(lease_ids) as u(id)) asked
  where not exists (select from granted g where g.lease_id = asked.id)
    and not exists (select from waiting w where w.lease_id = asked.id);
end $$;

comment on function pglimits._watch(uuid[], boolean) is
$$How requests that were queued stand now. For the wrapper. A row for each: granted (its lease begins its full duration; it goes in so
many seconds), queued (look again in so many seconds; null: the heartbeat is soon enough), or retry (ask again with the same id: a limit
was changed or deleted, its time is over, or the place was lost). only_news: no rows for those who go on waiting without anything to do.
ends_in: seconds that the lease lasts without another call.$$;

-- Sleeps until there is news of a queued request, or until a moment: whether it is queued still. Reads the rows of the line and no state.
--
-- The rows stay locked against an upgrade as long as the transaction lasts: so it ends when there is one, and nothing is read until that
-- has been tried for a while.
--
-- Only who is at the head has to look every few milliseconds. Whoever is behind somebody who sleeps here too waits for the lock that this
-- one has while it sleeps, at no cost, and is woken as it leaves.
create or replace function pglimits._sleep(lease_id uuid, until timestamptz)
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '8s'
as $$
declare
  before bigint;
  is_locked boolean := false;
  polls integer := 0;
begin
  if pglimits._is_being_upgraded() then
    perform pg_sleep(0.1);
    return true;
  end if;
  loop
    if not is_locked then
      is_locked := pg_try_advisory_xact_lock(hashtextextended(lease_id::text, 0));
    end if;
    select hashtextextended(b.lease_id::text, 0) into before
    from pglimits.queue q
    join pglimits.queue b on b.limit_id = q.limit_id and b.key = q.key and (b.rank, b.arrival) < (q.rank, q.arrival)
    where q.lease_id = _sleep.lease_id
    order by b.rank desc, b.arrival desc limit 1;
    exit when not found;
    if pg_try_advisory_lock_shared(before) then
      perform pg_advisory_unlock_shared(before), pg_sleep(0.005);
    else
      begin
        perform pg_advisory_lock_shared(before);
        perform pg_advisory_unlock_shared(before);
      exception when lock_not_available then
        return true;
      end;
    end if;
    if clock_timestamp() >= until or pglimits._is_being_upgraded() then
      return true;
    end if;
  end loop;
  while exists (select from pglimits.queue q where q.lease_id = _sleep.lease_id) loop
    polls := polls + 1;
    if clock_timestamp() >= until or polls % 32 = 0 and pglimits._is_being_upgraded() then
      return true;
    end if;
    perform pg_sleep(0.005);
  end loop;
  return false;
end $$;

comment on function pglimits._sleep(uuid, timestamptz) is
  'Sleeps until there is news of a queued request, or until a moment: whether it is queued still. For acquire_wait.';

-- Whether somebody has the lock under which pglimits is installed (start.sql).
create or replace function pglimits._is_being_upgraded()
returns boolean
language plpgsql
volatile
as $$
begin
  if pg_try_advisory_lock_shared(7210911204761542) then
    perform pg_advisory_unlock_shared(7210911204761542);
    return false;
  end if;
  return true;
end $$;

comment on function pglimits._is_being_upgraded() is 'Whether an installation or an upgrade is under way.';

-- A sign of life of who sleeps there, which also serves the line, if that is due. Answers for how many seconds to sleep on; null: there
-- is news, or its time is over.
create or replace function pglimits._stay(lease_id uuid)
returns double precision
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  place record;
begin
  perform pglimits._look(array[lease_id], false);
  update pglimits.queue q set expires_at = greatest(q.expires_at, pglimits._now() + pglimits._liveness())
  where q.lease_id = _stay.lease_id and q.deadline > pglimits._now();
  if found then
    place := pglimits._place(lease_id);
    return least((pglimits._answer_known(lease_id, false)).seconds[1], place.seconds_left, date_part('epoch', pglimits._liveness() / 2));
  end if;
  return null;
end $$;

comment on function pglimits._stay(uuid) is
  'Keeps the place of who sleeps: for how many seconds to sleep on; null if it is to ask. For acquire_wait.';

-- Waits in plain SQL until there is news of a queued request, or until its time is over: then it is to ask again.
create or replace procedure pglimits._wait(lease_id uuid, "position" integer, retry_after double precision)
language plpgsql
as $$
begin
  if "position" is null then
    perform pg_catalog.pg_sleep(retry_after);  -- it is granted, as of then
    return;
  end if;
  while pglimits._sleep(lease_id, pg_catalog.clock_timestamp()
                        operator(pg_catalog.+) (interval '1 second' operator(pg_catalog.*) retry_after))
  loop
    commit;
    retry_after := pglimits._stay(lease_id);
    commit;
    exit when retry_after is null;
  end loop;
end $$;

comment on procedure pglimits._wait(uuid, integer, double precision) is
  'Sleeps until a queued request is to ask again. For acquire_wait and rate_limit_wait.';

-- What is left of a timeout. The place in line keeps its own deadline; this is for one that was lost.
create or replace function pglimits._remaining(timeout_seconds double precision, began timestamptz)
returns double precision
language sql
volatile
return case when timeout_seconds is not null then greatest(timeout_seconds - date_part('epoch', clock_timestamp() - began), 0) end;

comment on function pglimits._remaining(double precision, timestamptz) is
  'What is left of a timeout that began at a moment; null for ever.';

-- Whether the procedure that asks can certainly commit: it was called by a statement that is all of its query and the first of its
-- transaction, and from within no other function or procedure. If not, it may be able to all the same.
create or replace function pglimits._can_commit()
returns boolean
language plpgsql
volatile
as $$
declare
  callers pg_catalog.text;
begin
  get diagnostics callers = pg_context;  -- a line for each, this function being the first
  return pg_catalog.statement_timestamp() operator(pg_catalog.=) pg_catalog.transaction_timestamp()
     and pg_catalog.strpos(pg_catalog.rtrim(pg_catalog.current_query(), e'; \n'), ';') operator(pg_catalog.=) 0
     and callers operator(pg_catalog.!~) e'\n.*\n';
end $$;

comment on function pglimits._can_commit() is
  'Whether there is certainly no transaction open around the procedure that calls it. For the procedures.';

-- Finds out for sure, and raises the error of a transaction that is open around the call.
create or replace procedure pglimits._refuse_transaction()
language plpgsql
as $$
declare
  problem pg_catalog.text;
begin
  begin
    commit;  -- fails in any case within this block: how, tells whether there is a transaction around the call
  exception when invalid_transaction_termination then
    get stacked diagnostics problem = message_text;
  end;
  if problem operator(pg_catalog.=) pglimits._cannot_commit() then
    raise exception using errcode = 'PL010',
      message = 'this procedure commits by itself: call it outside a transaction block, with autocommit on',
      hint = 'Inside a transaction, or in a function, call acquire, rate_limit or release instead, and ask again after a commit.';
  end if;
end $$;

comment on procedure pglimits._refuse_transaction() is
  'Raises CommitFirst where a transaction is open around the procedure that calls it. For the procedures.';

-- What the server says, in its language, to a commit where a transaction is open around the call: a function is always such a place.
create or replace function pglimits._cannot_commit()
returns text
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  problem text;
begin
  begin
    commit;
  exception when invalid_transaction_termination then
    get stacked diagnostics problem = message_text;
  end;
  return problem;
end $$;

comment on function pglimits._cannot_commit() is 'The message of a commit that a transaction around it forbids.';

-- What commits nothing flushes nothing. It is put in place of its call.
create or replace function pglimits._flush()
returns pg_lsn
language sql
volatile
return pg_logical_emit_message(true, 'pglimits', '');

comment on function pglimits._flush() is
  'Has the transaction that calls it wait until all that was committed before is on disk. For the procedures.';

-- The procedures that wait. No security definer and no search_path here: PostgreSQL forbids both to a procedure that commits, so
-- everything in them is qualified, the operators and the types too.
--
-- Each transaction commits with synchronous_commit = off, so that it unlocks the limit at once; the last one, which has nothing locked,
-- waits until all is on disk. WAL is a prefix: nobody durable depends on something that was lost.
create or replace procedure pglimits.acquire_wait(
  name text,
  slots integer default 1,
  key text default '',
  timeout_seconds double precision default null,
  lease_duration double precision default 300,
  priority integer default 0,
  holder jsonb default null,
  inout lease_id uuid default null,
  strict boolean default false,
  inout status text default null,
  inout fence bigint default null,
  inout expires_at timestamptz default null,
  inout retry_after double precision default null,
  clamp boolean default false)
language plpgsql
as $$
declare
  is_durable constant boolean := pg_catalog.current_setting('synchronous_commit') operator(pg_catalog.<>) 'off';
  began constant pg_catalog.timestamptz := pg_catalog.clock_timestamp();
  remaining double precision := timeout_seconds;
  answer pglimits.acquired;
begin
  if not pglimits._can_commit() then
    call pglimits._refuse_transaction();
  end if;
  loop
    perform pg_catalog.set_config('synchronous_commit', 'off', true);
    answer := pglimits.acquire(name, slots, key, remaining, lease_duration, priority, holder, lease_id, strict,
                                clamp => clamp);
    commit;
    exit when answer.status operator(pg_catalog.<>) 'queued';
    lease_id := answer.lease_id;
    call pglimits._wait(lease_id, answer."position", answer.retry_after);
    remaining := pglimits._remaining(timeout_seconds, began);
  end loop;
  if is_durable and answer.status operator(pg_catalog.=) 'granted' then
    perform pglimits._flush();
  end if;
  lease_id := answer.lease_id;
  status := answer.status;
  fence := answer.fence;
  expires_at := answer.expires_at;
  retry_after := answer.retry_after;
end $$;

comment on procedure pglimits.acquire_wait(
  text, integer, text, double precision, double precision, integer, jsonb, uuid, boolean, text, bigint, timestamptz,
  double precision, boolean) is
$$Takes slots of one limit and waits for them, in plain SQL, without keeping the limit locked while its answer is written to disk. Call it
outside a transaction block.

Arguments and errors are as of acquire, but timeout_seconds is null by default, which waits for ever. status: granted, refused or
unlimited, never queued. PL010 also means that it was called inside a transaction block.

If the caller dies while it waits, the request leaves the line as soon as the server notices. Have the server look every second:
  set client_connection_check_interval = '1s'
For a role: alter role app set client_connection_check_interval = '1s'. Without it, the server takes the slots for nobody, until the lease
ends. A caller that is interrupted (Ctrl-C, statement_timeout) keeps its place for 10 seconds: call again with the same lease_id, or
release that.$$;

create or replace procedure pglimits.rate_limit_wait(
  name text,
  slots integer default 1,
  key text default '',
  timeout_seconds double precision default null,
  priority integer default 0,
  holder jsonb default null,
  inout lease_id uuid default null,
  strict boolean default false,
  inout status text default null,
  inout retry_after double precision default null)
language plpgsql
as $$
declare
  is_durable constant boolean := pg_catalog.current_setting('synchronous_commit') operator(pg_catalog.<>) 'off';
  began constant pg_catalog.timestamptz := pg_catalog.clock_timestamp();
  remaining double precision := timeout_seconds;
  answer pglimits.rate_limited;
begin
  if not pglimits._can_commit() then
    call pglimits._refuse_transaction();
  end if;
  loop
    perform pg_catalog.set_config('synchronous_commit', 'off', true);
    answer := pglimits.rate_limit(name, slots, key, remaining, priority, holder, lease_id, strict);
    commit;
    exit when answer.status operator(pg_catalog.<>) 'queued';
    lease_id := answer.lease_id;
    call pglimits._wait(lease_id, answer."position", answer.retry_after);
    remaining := pglimits._remaining(timeout_seconds, began);
  end loop;
  if is_durable and answer.status operator(pg_catalog.=) 'granted' then
    perform pglimits._flush();
  end if;
  lease_id := answer.lease_id;
  status := answer.status;
  retry_after := answer.retry_after;
end $$;

comment on procedure pglimits.rate_limit_wait(
  text, integer, text, double precision, integer, jsonb, uuid, boolean, text, double precision) is
$$Takes slots of one rate limit and waits for them, in plain SQL: what acquire_wait is to acquire, this is to rate_limit. Call it outside a
transaction block.

retry_after: after refused, in how many seconds there would be room.$$;

create or replace procedure pglimits.release_wait(lease_id uuid, inout released boolean default null)
language plpgsql
as $$
declare
  is_durable constant boolean := pg_catalog.current_setting('synchronous_commit') operator(pg_catalog.<>) 'off';
begin
  if not pglimits._can_commit() then
    call pglimits._refuse_transaction();
  end if;
  perform pg_catalog.set_config('synchronous_commit', 'off', true);
  released := pglimits.release(lease_id);
  commit;
  if is_durable then
    perform pglimits._flush();
  end if;
end $$;

comment on procedure pglimits.release_wait(uuid, boolean) is
$$Ends a lease as release does, without keeping the limit locked while that is written to disk. It is for a limit that many connections
want at once. It answers once the release is on disk. Call it outside a transaction block.$$;
