-- Batches: what the wrapper calls. Requests that queued up in a process while the last statement was under way travel together: those that
-- differ in nothing but who asks in one call, as do the leases that were given back meanwhile. Private: it may change with any version.
--
-- Invariant: each request is answered as it would be by itself, in their order.
-- Called by: the wrapper alone, in transactions that are nobody else's; so heads over several limits are granted here.

-- How one call commits, and how long it waits for a lock; its callers have lock_timeout among their settings, and so it ends with them.
create or replace function pglimits._for_this_call(durable boolean, patience double precision)
returns void
language plpgsql
volatile
as $$
begin
  -- Where this transaction has written before, that has decided: it may have granted somebody who goes by it.
  if not durable and pg_current_xact_id_if_assigned() is null then
    perform set_config('synchronous_commit', 'off', true);
  end if;
  if patience is not null then
    perform set_config('lock_timeout', ceil(patience * 1000)::integer::text, true);
  end if;
end $$;

comment on function pglimits._for_this_call(boolean, double precision) is
  'durable false: this transaction commits with synchronous_commit = off. patience: seconds to wait for a lock, null as it is.';

-- Requests that are all alike. holders: an array with one for each. again: some of the ids may have been sent before.
create or replace function pglimits._acquire_batch(
  names text[],
  slots integer[],
  keys text[],
  for_rate boolean,
  timeout_seconds double precision,
  lease_duration double precision,
  priority integer,
  lease_ids uuid[],
  holders jsonb,
  again boolean,
  strict boolean,
  channel text,
  durable boolean default true,
  patience double precision default null,
  clamp boolean default false)
returns table (
  first integer, last integer, status text, fences bigint[], expires_at timestamptz, ends_in double precision,
  seconds double precision[], missing text[])
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '300ms'
as $$
declare
  many constant integer := cardinality(lease_ids);
  taken pglimits.acquired;
  granted record;
  outcome pglimits._outcome;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  elsif (durable and patience is null) is not true then
    perform pglimits._for_this_call(durable, patience);
  end if;
  perform pglimits._check(coalesce(
    pglimits._request_fault(timeout_seconds, lease_duration, priority, null, strict, channel), pglimits._ids_fault(lease_ids),
    case when many not between 1 and 10000 then 'lease_ids must be from 1 to 10000, not ' || many
         when (jsonb_typeof(holders) = 'array' and jsonb_array_length(holders) = many) is not true
           then 'holders must be an array with one for each of lease_ids'
         when pg_column_size(holders) > 8000 and exists (
           select from jsonb_array_elements(holders) h where pg_column_size(h.value) > 8000)
           then 'holder must be at most 8000 bytes of JSON'
         when for_rate is null then 'for_rate must not be null'
         when clamp is null then 'clamp must not be null' end));

  if cardinality(names) = 1 then
    first := 1;
    last := many;
    if for_rate then
      seconds[1] := pglimits._use_at_once(
        names[1], slots[1], keys[1], timeout_seconds is distinct from 0, case when again then lease_ids end, many);
      status := case when seconds[1] = 0 then 'granted' when seconds[1] is not null then 'refused' end;
    elsif many > 1 then
      granted := pglimits._take_many_at_once(
        names[1], slots[1], keys[1], lease_duration, priority, holders, lease_ids, again);
      if granted.fence is not null then
        status := 'granted';
        fences[1] := granted.fence;
        expires_at := granted.now + lease_duration * interval '1 second';
        ends_in := lease_duration;
      end if;
    else
      taken := pglimits._take_at_once(
        names[1], slots[1], keys[1], timeout_seconds, lease_duration, priority, holders -> 0, lease_ids[1], again, true);
      if taken.status = 'granted' then
        fences[1] := taken.fence;
        expires_at := taken.expires_at;
        ends_in := lease_duration;
      end if;
      status := nullif(taken.status, 'busy');
    end if;
    if status is not null then
      return next;
      return;
    end if;
  end if;

  perform pglimits._check(pglimits._arrays_fault(names, slots, keys));
  missing := pglimits._missing(names);
  for outcome in
    select a.* from pglimits._ask('acquire', names, slots, keys, for_rate, timeout_seconds, lease_duration, priority, strict, channel,
                                  lease_ids, holders, again, true, clamp) a
  loop
    first := outcome.first;
    last := outcome.last;
    status := outcome.status;
    fences := case when cardinality(names) = 1 then array[outcome.fence]
                   when status = 'granted' and not for_rate then pglimits._fences(lease_ids[first], names, keys) end;
    expires_at := outcome.expires_at;
    ends_in := date_part('epoch', outcome.expires_at - pglimits._now());
    seconds := outcome.seconds;
    return next;
  end loop;
end $$;

comment on function pglimits._acquire_batch(
  text[], integer[], text[], boolean, double precision, double precision, integer, uuid[], jsonb, boolean, boolean, text, boolean,
  double precision, boolean) is
$$Answers requests that differ in nothing but their ids and holders, in their order, in one transaction. For the wrapper.

A row for each run of them, from the first to the last: status (as acquire; or full: their line is), the fences of the first (one for
each name; on one limit, each of the others has the next), the end of its lease, and for how many seconds that lasts; seconds of each until
it goes (null: now; the others' leases end as much later), or until it is to look (null: the heartbeat is soon enough), or, of all, until
they might be let in; and the names of which there is no limit. What is wrong with them is raised.
durable: false commits with synchronous_commit = off. patience: seconds to wait for a lock, 0.3 if null; past that error 55P03, and nothing
was done.$$;

-- Leases, and places in line, that were given up.
create or replace function pglimits._release_batch(
  lease_ids uuid[], durable boolean default true, patience double precision default null)
returns uuid[]
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '300ms'
as $$
declare
  ended uuid[];
begin
  if (durable and patience is null) is not true then
    perform pglimits._for_this_call(durable, patience);
  end if;
  if cardinality(lease_ids) = 1 and not pg_is_in_recovery() and pglimits._release_at_once(lease_ids[1]) then
    return array[]::uuid[];
  end if;
  perform pglimits._check(pglimits._ids_fault(lease_ids));
  if cardinality(lease_ids) > 1 and not pg_is_in_recovery() then
    ended := pglimits._release_many_at_once(lease_ids);
  end if;
  ended := coalesce(ended, pglimits._release(lease_ids, true));
  return array(select distinct u.id from unnest(lease_ids) as u(id) where u.id <> all (ended));
end $$;

comment on function pglimits._release_batch(uuid[], boolean, double precision) is
  'Ends leases and places in line, as release does. Returns the ids of those that had ended already. durable, patience: as in '
  '_acquire_batch. For the wrapper.';
