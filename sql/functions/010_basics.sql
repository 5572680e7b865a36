-- The clock, the errors, and the checks of what callers pass.
--
-- The bodies of the smallest functions are not strings: names in them are looked up once, when the function is made, so they
-- need no search_path, and PostgreSQL puts them in place of their calls, which then cost nothing. All others name pg_temp, last:
-- where a search_path does not name it, the names of types are looked up there before all else, in what the caller planted.

-- The one clock. Read after the lock is held, never before.
create or replace function pglimits._now()
returns timestamptz
language sql
volatile
return clock_timestamp();

comment on function pglimits._now() is 'The only clock: the database''s, read anew at every call.';

-- How long a waiter lives without calling in.
create or replace function pglimits._liveness()
returns interval
language sql
immutable
return interval '10 seconds';

comment on function pglimits._liveness() is
  'A waiter that has not called in for this long is dead. Waiters are asked to call in after 3/10 of it.';

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
    ('PL007', 'CronUnavailable', 'pg_cron is not to be had here'),
    ('PL008', 'VersionMismatch', 'the database has a newer pglimits than the one that is to be installed')
$$;

comment on function pglimits.errors() is 'Lists the errors of pglimits: SQLSTATE, kind and meaning.';

create or replace function pglimits._fail(kind text, message text, hint text default null)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  error_code text := (select e.code from pglimits.errors() e where e.kind = _fail.kind);
begin
  if hint is null then
    raise exception using errcode = error_code, message = message;
  end if;
  raise exception using errcode = error_code, message = message, hint = hint;
end $$;

comment on function pglimits._fail(text, text, text) is 'Raises an error of the given kind.';

-- Called where a standby would otherwise answer, or fail in the words of whatever statement it cannot execute.
create or replace function pglimits._refuse_standby()
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
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
set search_path = pg_catalog, pg_temp
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
create or replace function pglimits._name_error(argument text, value text, may_be_empty boolean default false)
returns text
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
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

comment on function pglimits._name_error(text, text, boolean) is
  'What is wrong with a name or a key, or null. Names: 1 to 200 characters, no control character, none of / % & > <. '
  'Keys: 0 to 200 characters, no control character.';

-- What is wrong with a lease duration, or null. It is looked at in seconds, as it is used: compared as intervals, a year has
-- 360 days.
create or replace function pglimits._duration_error(lease_duration interval)
returns text
language sql
stable
return case
  when lease_duration is null then 'lease_duration must not be null'
  when extract(epoch from lease_duration) not between 1 and 31622400
    then 'lease_duration must be from 1 second to 366 days, not ' || lease_duration
end;

comment on function pglimits._duration_error(interval) is 'What is wrong with a lease duration, or null.';

-- The id of a limit, or LimitNotFound.
create or replace function pglimits._limit_id(name text)
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  found_id bigint;
  problem text := pglimits._name_error('name', name);
begin
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  select c.limit_id into found_id from pglimits.configs c where c.name = _limit_id.name;
  if not found then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name),
                           format('select pglimits.create_limit(%L, 10);', name));
  end if;
  return found_id;
end $$;

comment on function pglimits._limit_id(text) is 'The id of the limit of that name. Raises LimitNotFound.';
