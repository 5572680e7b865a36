-- A grant on disk without holding up others. A commit keeps its limit locked until it is on disk; one with
-- synchronous_commit = off lets go at once, and the next one may flush for all. WAL is a prefix: nobody durable depends
-- on something that was lost.

create or replace function pglimits.flush()
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  -- What commits nothing flushes nothing.
  perform pg_logical_emit_message(true, 'pglimits', '');
end $$;

comment on function pglimits.flush() is
$$Makes sure that a crash of the server forgets nothing that this session has committed so far with synchronous_commit = off.

For a limit that many connections fight over: call acquire and release in transactions with synchronous_commit = off, so
that each keeps the limit locked no longer than it works on it, and flush() in a transaction of its own before anything
relies on the answer.$$;

-- The same in one round trip. No security definer and no search_path here, as in acquire_wait; so everything is qualified.
create or replace procedure pglimits.acquire_hot(
  name text,
  slots integer default 1,
  key text default '',
  lease_duration interval default '5 minutes',
  wait interval default '0',
  priority integer default 0,
  holder jsonb default null,
  lease_id uuid default null,
  strict boolean default false,
  inout status text default null,
  inout granted_lease_id uuid default null,
  inout fence bigint default null,
  inout expires_at timestamptz default null,
  inout retry_after interval default null)
language plpgsql
as $$
declare
  answer pglimits.acquired_one;
begin
  perform pg_catalog.set_config('synchronous_commit', 'off', true);
  answer := pglimits.acquire(name, slots, key, lease_duration, wait, priority, holder, lease_id, strict);
  commit;
  perform pglimits.flush();
  status := answer.status;
  granted_lease_id := answer.lease_id;
  fence := answer.fence;
  expires_at := answer.expires_at;
  retry_after := answer.retry_after;
end $$;

comment on procedure pglimits.acquire_hot(
  text, integer, text, interval, interval, integer, jsonb, uuid, boolean, text, uuid, bigint, timestamptz, interval) is
$$acquire on a limit that many connections fight over: the limit is locked no longer than the work on it takes, and yet the
answer is on disk. With few callers acquire is faster: this commits twice.

Arguments and answer as acquire. Must be called outside a transaction block.$$;

create or replace procedure pglimits.release_hot(lease_id uuid, inout released boolean default null)
language plpgsql
as $$
begin
  perform pg_catalog.set_config('synchronous_commit', 'off', true);
  released := pglimits.release(lease_id);
  commit;
  perform pglimits.flush();
end $$;

comment on procedure pglimits.release_hot(uuid, boolean) is
'release on a limit that many connections fight over, as acquire_hot. Must be called outside a transaction block.';
