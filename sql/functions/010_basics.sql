-- The clock, the errors, and the checks of single arguments.
--
-- What callers call (no leading underscore, or granted in grants.sql) pins its search_path and runs as the owner of the schema;
-- private functions are called by those alone, and need neither. Everything outside pg_catalog is qualified.
-- The smallest functions have bodies that are not strings: PostgreSQL puts them in place of their calls.
--
-- Invariant: nothing here reads or writes a table.
-- Called by: all of the other files.

-- The one clock. Read after the lock is held, never before.
create or replace function pglimits._now()
returns timestamptz
language sql
volatile
return clock_timestamp();

comment on function pglimits._now() is 'The only clock: the database''s, read anew at every call.';

create or replace function pglimits._liveness()
returns interval
language sql
immutable
return interval '10 seconds';

comment on function pglimits._liveness() is 'How long a waiter lives without a sign of life from it or from its process.';

create or replace function pglimits._heartbeat_every()
returns interval
language sql
immutable
return interval '3 seconds';

comment on function pglimits._heartbeat_every() is 'How often whoever waits looks, whatever it was told.';

create or replace function pglimits._horizon()
returns interval
language sql
immutable
return interval '100 milliseconds';

comment on function pglimits._horizon() is 'How far ahead of its moment a waiter for a rate limit is granted.';

-- Every error of pglimits, its SQLSTATE and its meaning: the one list.
create or replace function pglimits.errors()
returns table (code text, kind text, meaning text)
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  values
    ('PL001', 'InvalidArgument', 'an argument is of the wrong form; nothing was changed'),
    ('PL002', 'LimitNotFound', 'there is no limit of that name'),
    ('PL003', 'LimitExists', 'there is a limit of that name already'),
    ('PL004', 'SlotsExceedLimit', 'more slots were asked for than the limit has; waiting would not help'),
    ('PL005', 'NoSlotDecay', 'the limit has no slot_decay_per_second, so it is not a rate limit'),
    ('PL006', 'QueueFull', 'max_waiters requests wait already'),
    ('PL007', 'CronUnavailable', 'pg_cron is not installed in this database'),
    ('PL008', 'VersionMismatch', 'the database has a newer pglimits than the one that is to be installed'),
    ('PL009', 'LimitLocked', 'an open transaction keeps the limit locked; nothing was taken'),
    ('PL010', 'CommitFirst', 'the caller''s open transaction is in the way: commit, and call again'),
    ('PL011', 'LimitsChanged', 'the limits are not as the plan that is to be applied found them; nothing was changed')
$$;

comment on function pglimits.errors() is 'Lists the errors of pglimits: SQLSTATE, kind and meaning.';

create or replace function pglimits._fail(kind text, message text, hint text default null)
returns void
language plpgsql
volatile
as $$
declare
  error_code constant text := (select e.code from pglimits.errors() e where e.kind = _fail.kind);
begin
  if hint is null then
    raise exception using errcode = error_code, message = message;
  end if;
  raise exception using errcode = error_code, message = message, hint = hint;
end $$;

comment on function pglimits._fail(text, text, text) is 'Raises an error of the given kind.';

create or replace function pglimits._check(problem text)
returns void
language plpgsql
volatile
as $$
begin
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
end $$;

comment on function pglimits._check(text) is 'Raises InvalidArgument, unless there is no problem.';

-- A standby would otherwise answer from what it has, or fail in the words of whatever statement it cannot execute.
create or replace function pglimits._refuse_standby()
returns void
language plpgsql
volatile
as $$
begin
  raise exception using errcode = '25006',
    message = 'this server is a standby: it can show limits, but neither grant nor change anything',
    hint = 'Connect to the primary, for example with target_session_attrs=read-write.';
end $$;

comment on function pglimits._refuse_standby() is 'Raises the error of a standby, 25006.';

-- Called by whatever has to meet all keys of a limit, those too that others use for the first time just now.
create or replace function pglimits._refuse_snapshot(what text)
returns void
language plpgsql
volatile
as $$
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception using errcode = '25001',
      message = format('%s has to be called in a read committed transaction, not in a %s one', what,
                       current_setting('transaction_isolation')),
      detail = 'A snapshot does not show the keys of a limit that were used first since it was taken.',
      hint = 'begin isolation level read committed;';
  end if;
end $$;

comment on function pglimits._refuse_snapshot(text) is
  'Raises 25001 in a transaction that goes by one snapshot (repeatable read, serializable).';

-- What is wrong with a name (or a key, which may be empty), or null.
create or replace function pglimits._name_fault(argument text, value text, may_be_empty boolean default false)
returns text
language plpgsql
immutable
as $$
begin
  if value is null then
    return format('%s must not be null', argument);
  elsif value ~ '^[A-Za-z0-9_.: @-]{1,200}$' or (value = '' and may_be_empty) then
    return null;
  elsif length(value) > 200 or value = '' then
    return format('%s must have %s to 200 characters, not %s: %L', argument,
                  case when may_be_empty then 0 else 1 end, length(value), left(value, 40));
  elsif value ~ e'[\\u0001-\\u001f\\u007f-\\u009f]' then  -- as it stands, whatever standard_conforming_strings is
    return format('%s must not contain control characters: %s', argument, to_json(value));
  elsif not may_be_empty and value ~ '[/%&><]' then
    return format('%s must not contain any of / %% & > <: %L', argument, value);
  end if;
  return null;
end $$;

comment on function pglimits._name_fault(text, text, boolean) is
  'What is wrong with a name or a key, or null. Names: 1 to 200 characters, no control character, none of / % & > <. '
  'Keys: 0 to 200 characters, no control character.';

-- NaN is above everything.
create or replace function pglimits._duration_fault(lease_duration double precision)
returns text
language sql
stable
return case
  when lease_duration is null then 'lease_duration must not be null'
  when lease_duration not between 1 and 31622400
    then 'lease_duration must be from 1 second to 366 days, not ' || lease_duration || ' seconds'
end;

comment on function pglimits._duration_fault(double precision) is 'What is wrong with a lease duration, or null.';

-- What is wrong with what a request says of itself, or null.
create or replace function pglimits._request_fault(
  timeout_seconds double precision, lease_duration double precision, priority integer, holder jsonb, strict boolean,
  channel text)
returns text
language sql
stable
return case
  when timeout_seconds not between 0 and 1e9
    then 'timeout_seconds must be from 0 to 1000000000, or null to wait for ever, not ' || timeout_seconds
  when priority is null then 'priority must not be null'
  when priority not between -1000000 and 1000000 then 'priority must be from -1000000 to 1000000, not ' || priority
  when strict is null then 'strict must not be null'
  when channel !~ '^pglimits_[0-9a-z_]{1,40}$'
    then 'channel must be pglimits_ and up to 40 of a-z, 0-9, _: ' || quote_literal(left(channel, 60))
  when pg_column_size(holder) > 8000 then 'holder must be at most 8000 bytes of JSON, not ' || pg_column_size(holder)
  else pglimits._duration_fault(lease_duration)
end;

comment on function pglimits._request_fault(
  double precision, double precision, integer, jsonb, boolean, text) is
  'What is wrong with what a request says of itself, or null.';

-- The same in few words, for what most calls say: true only if nothing can be wrong with it, and this is no standby.
create or replace function pglimits._is_plain(
  timeout_seconds double precision, lease_duration double precision, priority integer, holder jsonb, strict boolean,
  channel text)
returns boolean
language sql
volatile
return (timeout_seconds >= 0 and timeout_seconds <= 1e9 and pg_column_size(holder) <= 8000) is not false
       and lease_duration >= 1 and lease_duration <= 31622400 and priority = 0 and strict is not null and channel is null
       and not pg_is_in_recovery();

comment on function pglimits._is_plain(
  double precision, double precision, integer, jsonb, boolean, text) is
  'Whether what a request says of itself is certainly right.';

-- What is wrong with a list of lease ids, or null.
create or replace function pglimits._ids_fault(lease_ids uuid[])
returns text
language sql
immutable
return case
  when lease_ids is null then 'lease_ids must not be null'
  when array_ndims(lease_ids) > 1 then 'lease_ids must be a flat array'
  when array_position(lease_ids, null) is not null then 'lease_ids must not contain null'
end;

comment on function pglimits._ids_fault(uuid[]) is 'What is wrong with a list of lease ids, or null.';

-- Who holds what was asked for without a word about it: the session. In the form that costs least to keep.
create or replace function pglimits._session()
returns text[]
language sql
stable
return array[current_setting('application_name'), session_user, host(inet_client_addr()), pg_backend_pid()::text];

comment on function pglimits._session() is 'Application_name, user, address and pid of the session.';

create or replace function pglimits._as_holder(session text[])
returns jsonb
language sql
stable
return case when session is not null then jsonb_build_object(
  'application', session[1], 'user', session[2], 'address', session[3], 'pid', session[4]::integer) end;

comment on function pglimits._as_holder(text[]) is 'A session as the holder, where none was given.';
