-- Waiting in plain SQL: the procedures acquire_wait, rate_limit_wait and release_wait, which commit by themselves.
--
-- Invariant: a procedure that sleeps has no state locked.
-- Called by: anybody in plain SQL, outside a transaction.

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
    cross join lateral (
      select x.lease_id from pglimits.queue x
      where x.limit_id = q.limit_id and x.key = q.key and (x.rank, x.arrival) < (q.rank, q.arrival)
      order by x.rank desc, x.arrival desc limit 1) b
    where q.lease_id = _sleep.lease_id;
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
