-- Installs or upgrades pglimits in the database you are connected to: psql -f sql/install.sql
-- One transaction; safe to repeat, and safe when several run it at once. An upgrade gives just what a new installation
-- gives. Tables change by numbered migrations; functions and views are created or replaced each time, and those that are
-- gone from here are dropped. What cannot be replaced (another type of result, other names of arguments, a column of a
-- view less) a migration has to drop before, if it exists.
\set ON_ERROR_STOP on
\set QUIET on
begin;
-- Begins an installation or an upgrade, in a transaction that is open: one at a time, whatever the caller's settings are,
-- and in the name of the role that owns the schema, so that all of it belongs to one, and nobody's functions run as another.
set transaction isolation level read committed, read write;
set local search_path = pg_catalog;
set local lock_timeout = 0;
set local statement_timeout = 0;
set local client_min_messages = warning;

do $$
begin
  perform pg_advisory_xact_lock(7210911204761542);
end $$;

create schema if not exists pglimits;

do $$
declare
  owner constant name := (select pg_get_userbyid(n.nspowner) from pg_namespace n where n.nspname = 'pglimits');
begin
  if owner <> current_user and not pg_has_role(owner, 'member') then
    raise exception using
      errcode = 'insufficient_privilege',
      message = format('the schema pglimits belongs to the role %I here: install as that role, or as a member of it', owner);
  elsif owner <> current_user then
    perform set_config('role', owner, true);
  end if;
  perform set_config('pglimits.version_before', '', true);
  if to_regprocedure('pglimits.version()') is not null then
    perform set_config('pglimits.version_before', pglimits.version(), true);
  end if;
end $$;
create or replace function pglimits.version()
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select '0.1.0'
$$;

comment on function pglimits.version() is 'The version of pglimits that is installed in this database.';
-- Refuses to go back to an older version. Then waits until nobody is at work here, so that every transaction is served by
-- one version alone. While it waits it steps aside again and again: it never keeps others waiting for longer than 0.2
-- seconds for each lock, and it gives up after a while.
do $$
declare
  before constant text := nullif(current_setting('pglimits.version_before'), '');
  number_before constant integer[] := string_to_array(substring(before from '[0-9]+(?:[.][0-9]+)*'), '.');
  number constant integer[] := string_to_array(substring(pglimits.version() from '[0-9]+(?:[.][0-9]+)*'), '.');
  views text[];
  relations text;
  holders text;
begin
  if number_before > number then
    raise exception using
      errcode = 'PL008',
      message = format('the database has pglimits %s, which is newer than this one, %s: pip install --upgrade pglimits',
                       before, pglimits.version());
  end if;
  select array_agg(c.oid::regclass::text) filter (where c.relkind = 'v'), string_agg(c.oid::regclass::text, ', ')
  into views, relations
  from pg_class c where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v');

  for attempt in 1 .. 20 loop
    begin
      set local lock_timeout = '200ms';
      if before <> pglimits.version() and relations is not null then
        execute 'lock table ' || relations || ' in access exclusive mode';
      end if;
      -- To be replaced by the same they are locked too, alone: lock table would lock what they read as well.
      for i in 1 .. coalesce(cardinality(views), 0) loop
        execute format('alter view %s owner to current_user', views[i]);
      end loop;
      set local lock_timeout = '10s';  -- nothing that comes may wait for long either: others wait for us now
      return;
    exception when lock_not_available or deadlock_detected then
      null;
    end;
    perform pg_sleep(0.2);
  end loop;
  select string_agg(distinct coalesce('session ' || l.pid, 'a prepared transaction'), ', ') into holders
  from pg_locks l join pg_class c on c.oid = l.relation
  where l.database = (select d.oid from pg_database d where d.datname = current_database())
    and c.relnamespace = 'pglimits'::regnamespace and l.granted and l.pid is distinct from pg_backend_pid();
  raise exception using
    errcode = 'lock_not_available',
    message = format('an open transaction keeps pglimits locked (%s): nothing was changed; end it, or try again later',
                     coalesce(holders, 'it has ended by now'));
end $$;

select to_regclass('pglimits.meta') is null as fresh \gset
\if :fresh
\set installed 0
\else
select schema_version as installed from pglimits.meta \gset
\endif

select :installed > 1 as too_new, :installed < 1 as need_0001 \gset
\if :too_new
do $$ begin
  raise exception using errcode = 'PL008',
    message = 'this database has a newer schema of pglimits than this script knows: pip install --upgrade pglimits';
end $$;
\endif
\if :need_0001
-- Tables and types. Private: nobody but the functions and views of this schema reads or writes them.
--
-- A (limit, key) is the unit of locking: its one row in states is locked first, by everybody, and only then are
-- its leases and its queue touched. Every hot table has (limit_id, key) in its primary key, and no constraint
-- reaches from one (limit, key) to another.

create table pglimits.meta (
  only_row boolean primary key default true check (only_row),
  schema_version integer not null,
  fence_floor bigint not null default 0
);
comment on table pglimits.meta is 'One row about the installation.';
comment on column pglimits.meta.schema_version is 'Number of the newest migration that was applied.';
comment on column pglimits.meta.fence_floor is
  'No deleted limit ever gave a higher fence; new limits start above it.';

create table pglimits.configs (
  limit_id bigint generated always as identity primary key,
  name text collate "C" not null unique,
  "limit" integer not null check ("limit" >= 0),
  slot_decay_per_second double precision not null check (slot_decay_per_second >= 0),
  active boolean not null,
  max_waiters integer check (max_waiters >= 0),
  description text,
  decayed numeric not null default 0,
  decayed_at timestamptz not null,
  fence_floor bigint not null,
  changes integer not null default 0,
  created_at timestamptz not null,
  updated_at timestamptz not null
);
comment on table pglimits.configs is
  'One row per limit: what its owner decided. Changed rarely, read by every request after it has locked a state.';
comment on column pglimits.configs.decayed is
  'Virtual time at decayed_at: the slots that had decayed since the limit was created. See _decayed().';
comment on column pglimits.configs.fence_floor is
  'No key that was swept away ever gave a higher fence; a key starts above it when it is used again.';
comment on column pglimits.configs.changes is 'How often it was changed: a request that waits for several limits notices by this.';

create table pglimits.former_names (
  name text collate "C" not null,
  limit_id bigint not null,
  primary key (name, limit_id)
);
comment on table pglimits.former_names is
  'Names that a limit had before it was renamed: who asked under one, and waits or holds, asks again under it.';

create table pglimits.keys (
  limit_id bigint not null,
  key text collate "C" not null,
  primary key (limit_id, key)
);
comment on table pglimits.keys is
  'Which (limit, key)s have a state. Its primary key is what keeps two first users from creating two: that of states '
  'cannot tell once the version has moved on, and a transaction with an old snapshot does not see the state at all.';

create table pglimits.states (
  limit_id bigint not null,
  key text collate "C" not null,
  version bigint not null,
  held integer not null default 0,
  booked numeric not null default 0,
  pinned integer not null default 0,
  peak numeric not null default 0,
  next_expiry timestamptz not null default 'infinity',
  waiting integer not null default 0,
  head_rank integer not null default 0,
  head_arrival timestamptz not null default '-infinity',
  last_arrival timestamptz not null default '-infinity',
  passed numeric not null default 0,
  next_death timestamptz not null default 'infinity',
  next_waiter_death timestamptz not null default 'infinity',
  next_look timestamptz not null default 'infinity',
  changed_at timestamptz not null,
  primary key (limit_id, key, version)
) with (
  fillfactor = 50,
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 2000,
  autovacuum_analyze_scale_factor = 0.5,
  autovacuum_vacuum_cost_delay = 0
);
comment on table pglimits.states is
  'The hot row: one per (limit, key), rewritten by every grant. Its version is part of the key and only grows, so '
  'that "order by version desc limit 1" meets the live row first even while an old snapshot keeps every dead '
  'version alive. Being locked by whoever decides, it is also where every decision is recorded.';
comment on column pglimits.states.version is 'Grows with every write and with every grant: the source of fences.';
comment on column pglimits.states.held is 'Slots under leases, including those that ended but that nobody took out yet.';
comment on column pglimits.states.booked is
  'The virtual time at which the level reaches zero. level = greatest(booked - virtual time now, 0).';
comment on column pglimits.states.pinned is
  'Turns that lie ahead because another limit of the same request is slower; they are not in booked yet.';
comment on column pglimits.states.peak is
  'No such turn leaves more than this on the level, or than the limit if that is more. More where adjust has added since.';
comment on column pglimits.states.next_expiry is
  'No lease ends before this. A lower bound: renewing and releasing leave it alone. The expiry index is read from here.';
comment on column pglimits.states.waiting is 'Rows of the queue that have no turn yet.';
comment on column pglimits.states.head_rank is
  'With head_arrival: no waiter stands before this place. The queue is read from here.';
comment on column pglimits.states.passed is 'Turns up to this virtual time were removed from the queue.';
comment on column pglimits.states.next_death is 'No sleeper of the rate limit can be found dead before this.';
comment on column pglimits.states.next_waiter_death is
  'No waiter in line can be found dead before this, so that until then waiting counts the live ones. A lower bound: calling '
  'in and leaving leave it alone.';
comment on column pglimits.states.next_look is
  'The moment at which time alone (a lease ends, a level decays, a waiter dies) may let somebody in the queue go on.';

create table pglimits.leases (
  lease_id uuid not null,
  limit_id bigint not null,
  key text collate "C" not null,
  slots integer not null,
  holder jsonb,
  fence bigint not null,
  priority integer not null,
  lease_duration interval not null,
  claimed boolean not null,
  parts integer not null,
  acquired_at timestamptz not null,
  expires_at timestamptz not null,
  primary key (lease_id, limit_id, key)
) with (
  fillfactor = 80,
  autovacuum_vacuum_scale_factor = 0.01,
  autovacuum_vacuum_threshold = 5000,
  autovacuum_vacuum_cost_delay = 0
);
create index leases_expiry on pglimits.leases (limit_id, key, expires_at);
comment on table pglimits.leases is 'Slots held. A request over several limits has one row for each.';
comment on column pglimits.leases.claimed is
  'False between a hand-over and the moment its waiter hears of it; until then the lease ends when the waiter would have.';

comment on column pglimits.leases.parts is
  'How many rows the lease has over all its limits: lost on one, it is lost.';

create table pglimits.queue (
  lease_id uuid not null,
  limit_id bigint not null,
  key text collate "C" not null,
  slots integer not null,
  rank integer not null,
  arrival timestamptz not null,
  turn numeric,
  pinned boolean not null default false,
  gap numeric not null default 0,
  added boolean not null default false,
  for_rate boolean not null,
  several boolean not null,
  limit_ids bigint[],
  keys text[],
  seen integer[],
  called boolean not null default false,
  in_vain integer not null default 0,
  kept_until timestamptz,
  lease_duration interval not null,
  holder jsonb,
  channel text,
  expires_at timestamptz not null,
  looks_at timestamptz not null,
  primary key (lease_id, limit_id, key)
) with (
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0.01,
  autovacuum_vacuum_threshold = 2000,
  autovacuum_vacuum_cost_delay = 0
);
create index queue_order on pglimits.queue (limit_id, key, rank, arrival) where turn is null;
create index queue_turns on pglimits.queue (limit_id, key, turn) where turn is not null;
create index queue_pinned on pglimits.queue (limit_id, key, turn, lease_id) where pinned;
create index queue_asleep_over_several on pglimits.queue (limit_id, key) where turn is not null and limit_ids is not null;
create index queue_added on pglimits.queue (limit_id, key, turn) where added;
create index queue_gaps on pglimits.queue (limit_id, key) where gap > 0;
create index queue_called on pglimits.queue (limit_id, key) where called and turn is not null;
comment on table pglimits.queue is
  'Who waits. Without a turn: in line for slots. With a turn: has its place on a rate limit and sleeps until then.';
comment on column pglimits.queue.rank is 'The priority, negated, so that the index is read in one direction.';
comment on column pglimits.queue.arrival is
  'When the request arrived by the database clock, made unique within the (limit, key). Kept when it moves to another limit.';
comment on column pglimits.queue.turn is 'Virtual time at which it may go. Moves by itself when the rate changes.';
comment on column pglimits.queue.pinned is
  'The turn lies later than this limit needs, since another is slower: it is charged when it comes, and others may go before.';
comment on column pglimits.queue.gap is
  'Slots of virtual time right before it that nobody uses: they came free and it has not moved up yet, or it was pinned later '
  'than where those before it end.';
comment on column pglimits.queue.added is
  'No request, but what adjust has added while some slept, who keep their turns: it has a turn behind theirs.';
comment on column pglimits.queue.several is
  'Part of a request over several limits, or, in line, of one for a turn that cannot be told: it is to try again, and never '
  'granted by others.';
comment on column pglimits.queue.limit_ids is 'With keys: all the (limit, key)s of such a request that are enforced.';
comment on column pglimits.queue.seen is 'How often each of them had been changed when it asked. See _changes().';
comment on column pglimits.queue.called is
  'In line: such a request was woken and has not tried again yet. With a turn: it may move up, or has to move. See _rearrange().';
comment on column pglimits.queue.in_vain is 'How often it was called, and found another of its limits taken.';
comment on column pglimits.queue.kept_until is
  'Called in vain too often, it waits on another limit now, and until then nobody behind it goes before it here.';
comment on column pglimits.queue.expires_at is 'The waiter is dead after this unless it calls in. infinity: it never has to.';
comment on column pglimits.queue.looks_at is
  'When its process was told to look again; of a turn without a channel: when it was told to go, and will.';

-- What travels between the functions.

create type pglimits._request as (
  lease_id uuid,
  for_rate boolean,
  limit_ids bigint[],
  keys text[],
  slots integer[],
  places integer[],
  rank integer,
  lease_duration interval,
  wait interval,
  holder jsonb,
  channel text,
  chosen boolean,
  bounded boolean,
  missing text[],
  error text,
  message text
);
comment on type pglimits._request is
  'A checked request. limit_ids, keys and slots are its parts, in the order in which they are locked; places says '
  'which part each given name became (null: not enforced). wait null: for ever. chosen: the caller gave the id, so this may be a repetition. '
  'bounded: some of its limits have max_waiters. '
  'error and message: what was wrong with it.';

create type pglimits._answer as (
  status text,
  lease_id uuid,
  fences bigint[],
  expires_at timestamptz,
  retry_after interval,
  wait interval,
  error text,
  message text
);
comment on type pglimits._answer is 'What became of a request.';

create type pglimits._places as (
  limit_ids bigint[],
  keys text[],
  labels text[]
);
comment on type pglimits._places is 'The (limit, key)s of a batch, in the order in which they are locked.';

create type pglimits._findings as (
  enforced integer,
  impossible text,
  blocked_at integer,
  looks_at timestamptz,
  fits_at timestamptz,
  turn_in interval,
  queue_full text
);
comment on type pglimits._findings is
  'What stands in the way of a request. enforced: how many of its parts are. impossible: why it can never be granted. '
  'blocked_at: the first state that blocks it. looks_at: when time alone may change that. fits_at: null, it can go on; '
  'else the moment from which on it could, infinity where only a release can tell. turn_in: how long until its turn '
  'on the slowest rate limit. queue_full: why it may not wait.';

create type pglimits._decision as (
  answer pglimits._answer,
  states pglimits.states[]
);
comment on type pglimits._decision is 'What becomes of a request, and of the states that it touches.';

create type pglimits._withdrawn as (
  state pglimits.states,
  live uuid[]
);
comment on type pglimits._withdrawn is 'A state without requests that were taken out of its queue, and which of them were live.';

create type pglimits._served as (
  answers pglimits._answer[],
  states pglimits.states[]
);
comment on type pglimits._served is 'What becomes of a batch, and of the states that it touches.';

create type pglimits._placed as (
  state pglimits.states,
  turn numeric,
  pinned boolean
);
comment on type pglimits._placed is 'A state with one more turn, where in virtual time that is, and whether it is pinned.';

create type pglimits._sleeper as (
  lease_id uuid,
  added boolean,
  changed boolean,
  deaf boolean,
  elsewhere boolean,
  channel text,
  at integer[],
  slots integer[],
  pinned boolean[],
  booked numeric[],
  goes_in numeric
);
comment on type pglimits._sleeper is
  'Who sleeps towards turns on some locked states (at). slots, pinned, booked: of each, how many; whether it is pinned '
  'there; and what it takes of what is booked there. added: what adjust has added. changed: one of their limits was, since it '
  'asked. deaf: it cannot be told. elsewhere: it has turns on others too. goes_in: seconds until it goes.';

create type pglimits._turn as (
  turn numeric,
  booked numeric,
  passed_turn numeric,
  passed_id uuid
);
comment on type pglimits._turn is
  'The earliest turn that can be had. booked: before it, with the pinned turns that it comes after, the last of which is '
  'passed_turn, passed_id.';

create type pglimits.acquired as (
  status text,
  lease_id uuid,
  fences bigint[],
  expires_at timestamptz,
  retry_after interval,
  "position" integer
);
comment on type pglimits.acquired is
  'Answer of acquire over several limits: status granted, queued, refused or unlimited; one fence for each name, '
  'in the order of the names (null where not enforced); when to look again; the place in the queue.';

create type pglimits.acquired_one as (
  status text,
  lease_id uuid,
  fence bigint,
  expires_at timestamptz,
  retry_after interval,
  "position" integer
);
comment on type pglimits.acquired_one is 'Answer of acquire on one limit: as pglimits.acquired, with one fence.';

create type pglimits.reserved as (
  status text,
  wait interval,
  retry_after interval,
  lease_id uuid
);
comment on type pglimits.reserved is
  'Answer of rate_limit: granted (sleep for wait, then go), queued (ask again with lease_id after retry_after), '
  'refused (retry_after tells when it would be granted; null: time alone does not help) or unlimited.';

create type pglimits.peeked as (
  status text,
  wait interval,
  retry_after interval,
  "position" integer
);
comment on type pglimits.peeked is
  'What would happen: status granted (for a rate limit after wait), queued (at position), refused or unlimited.';
insert into pglimits.meta (schema_version) values (1) on conflict (only_row) do update set schema_version = 1;
\endif

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
-- The state of one (limit, key): locking it, bringing it up to date, saving it. Everything that decides goes
--   _lock  ->  read the config and the clock  ->  _settle  ->  decide  ->  _save
-- in the order of (limit id, key) where there are several, and so no two callers ever wait for each other in a ring.

-- Virtual time: the slots that have decayed since the limit was created. A rate change bends it and never makes it jump.
create or replace function pglimits._decayed(config pglimits.configs, at timestamptz)
returns numeric
language sql
immutable
return config.decayed + config.slot_decay_per_second::numeric * extract(epoch from at - config.decayed_at);

comment on function pglimits._decayed(pglimits.configs, timestamptz) is
  'Virtual time of a limit at a moment: the slots that had decayed since it was created. A turn, a place in virtual '
  'time, is worth the same however the rate changes. After GCRA, the virtual scheduling algorithm of ITU-T I.371.';

-- Turns that came a while ago are kept for those who ask again because they did not hear of theirs. Up to this virtual time
-- that is long enough; null while a changed rate makes it hard to tell.
create or replace function pglimits._forgotten(config pglimits.configs, now timestamptz)
returns numeric
language sql
immutable
return case when config.decayed_at <= now - pglimits._liveness()
            then pglimits._decayed(config, now - pglimits._liveness()) end;

comment on function pglimits._forgotten(pglimits.configs, timestamptz) is
  'The virtual time up to which turns that have come need not be remembered any more; null: none is known.';

-- How long until a virtual time, rounded up so that nobody who sleeps just that long is early.
create or replace function pglimits._until(config pglimits.configs, turn numeric, at timestamptz)
returns interval
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  slots numeric := turn - pglimits._decayed(config, at);
begin
  if slots <= 0 then
    return interval '0';
  elsif config.slot_decay_per_second = 0 then
    return null;
  end if;
  return make_interval(secs => least(
    ceil(slots * 1000000 / config.slot_decay_per_second::numeric) / 1000000, 3e9)::double precision);
end $$;

comment on function pglimits._until(pglimits.configs, numeric, timestamptz) is
  'How long from a moment until a virtual time; zero when it has passed, null when it never comes.';

-- Locks the state of a (limit, key) and returns it. Null where there is none: it was never used, or has been swept or deleted.
create or replace function pglimits._lock_used(limit_id bigint, key text)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  state pglimits.states;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    -- Its snapshot may be older than the last change of the limit: then this is a serialization failure.
    perform from pglimits.configs c where c.limit_id = _lock_used.limit_id for share;
  end if;
  select s.* into state from pglimits.states s
  where s.limit_id = _lock_used.limit_id and s.key = _lock_used.key
  order by s.version desc limit 1 for update;
  return state;
end $$;

comment on function pglimits._lock_used(bigint, text) is
  'Locks and returns the state of a (limit, key); null where there is none.';

-- Locks the states of several (limit, key)s, in their order, as far as they have any. Who needs more than one does so before it
-- touches a lease or a waiter of any of them: delete_limit holds the states of one limit, and touches its leases on others.
create or replace function pglimits._lock_several(limit_ids bigint[], keys text[])
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._lock_used(p.limit_id, p.key)
  from (select distinct u.limit_id, u.key collate "C" as key
        from unnest(limit_ids, keys) as u(limit_id, key) order by 1, 2) p;
end $$;

comment on function pglimits._lock_several(bigint[], text[]) is
  'Locks the states of several (limit, key)s, in their order, where there are any.';

-- Locks the state of a (limit, key) and returns it; creates it at its first use. Null when the limit is gone.
create or replace function pglimits._lock(limit_id bigint, key text, beside_another boolean default false)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  state pglimits.states;
begin
  loop
    state := pglimits._lock_used(limit_id, key);
    exit when state.limit_id is not null;
    exit when not pglimits._create_state(limit_id, key, beside_another);
  end loop;
  return state;
end $$;

comment on function pglimits._lock(bigint, text, boolean) is
  'Locks and returns the state of a (limit, key), creating it at its first use; null when the limit is gone. beside_another: '
  'the caller has a state of this limit locked already.';

-- Locks every state of a limit whose config the caller has locked. Who has one of them locked may add a later one without
-- a lock of the config; so each is looked for when the one before it has been locked.
create or replace function pglimits._lock_every(limit_id bigint)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  last_key text := '';
begin
  perform from pglimits.states s where s.limit_id = _lock_every.limit_id and s.key = '' for update;
  loop
    select s.key into last_key from pglimits.states s
    where s.limit_id = _lock_every.limit_id and s.key > last_key
    order by s.key limit 1 for update;
    exit when not found;
  end loop;
end $$;

comment on function pglimits._lock_every(bigint) is
  'Locks every state of a limit whose config is locked, in the order of their keys.';

-- Creates the state of a (limit, key), unless somebody else does. False when the limit is gone.
create or replace function pglimits._create_state(limit_id bigint, key text, beside_another boolean)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if not beside_another then
    -- Shared with other first users, not with update_limit, which has to meet every state of the limit. Who has another one of
    -- them locked does not wait for the config: whoever has that may be waiting for the other state, and comes here later.
    perform from pglimits.configs c where c.limit_id = _create_state.limit_id for share;
    if not found then
      return false;
    end if;
  end if;
  insert into pglimits.keys (limit_id, key) values (_create_state.limit_id, _create_state.key) on conflict do nothing;
  if found then
    insert into pglimits.states (limit_id, key, version, changed_at)
    select c.limit_id, _create_state.key, c.fence_floor, pglimits._now()
    from pglimits.configs c where c.limit_id = _create_state.limit_id;
  end if;
  return true;
end $$;

comment on function pglimits._create_state(bigint, text, boolean) is
  'Creates the state of a (limit, key), unless somebody else does. False when the limit is gone. beside_another: as for _lock.';

-- Writes a state back if it differs from what was locked.
create or replace function pglimits._save(state pglimits.states, was pglimits.states, now timestamptz)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if state is not distinct from was then
    return;
  end if;
  update pglimits.states s
  set version = greatest(state.version, was.version + 1), held = state.held, booked = state.booked,
      pinned = state.pinned, peak = state.peak, next_expiry = state.next_expiry, waiting = state.waiting,
      head_rank = state.head_rank, head_arrival = state.head_arrival, last_arrival = state.last_arrival, passed = state.passed,
      next_death = state.next_death, next_waiter_death = state.next_waiter_death, next_look = state.next_look,
      changed_at = now
  where s.limit_id = was.limit_id and s.key = was.key and s.version = was.version;
end $$;

comment on function pglimits._save(pglimits.states, pglimits.states, timestamptz) is
  'Writes a locked state back under a higher version, if it has changed.';

-- Tells a waiting process to look, or that it was granted a lease, with its fence and its end as microseconds since 1970.
-- A hint only, that may be lost: what is true is in its row.
create or replace function pglimits._tell(
  channel text, about uuid, fence bigint default null, ends timestamptz default null)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if channel is not null then
    perform pg_notify(channel, case
      when about is null then ''
      when ends is null then about::text
      else about || ' ' || fence || ' ' || (extract(epoch from ends) * 1000000)::bigint end);
  end if;
end $$;

comment on function pglimits._tell(text, uuid, bigint, timestamptz) is
  'Notifies a waiting process about one of its requests (null: about all of them), and how it was granted, if it was.';

-- Whether a concurrency request fits now, and if not, from when on time alone may make it fit.
create or replace function pglimits._fits_at(
  state pglimits.states, config pglimits.configs, slots integer, now timestamptz)
returns timestamptz
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  fits_at timestamptz := timestamptz '-infinity';
  turn_in interval;
begin
  if slots > config."limit" then
    return timestamptz 'infinity';
  end if;
  if state.held::bigint + slots > config."limit" then
    fits_at := greatest(state.next_expiry, now + interval '1 millisecond');
  end if;
  if config.slot_decay_per_second > 0 then
    turn_in := pglimits._until(
      config, (pglimits._find_turn(state, config, slots, pglimits._decayed(config, now))).turn, now);
    if turn_in > interval '0' then
      fits_at := greatest(fits_at, now + turn_in);
    end if;
  end if;
  return fits_at;
end $$;

comment on function pglimits._fits_at(pglimits.states, pglimits.configs, integer, timestamptz) is
  '-infinity if that many slots can be held now; else the earliest moment at which time alone may have made room.';

-- Takes leases out that have ended. One that is being renewed or released right now is left to whoever does that.
create or replace function pglimits._take_expired(state pglimits.states, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  freed bigint;
begin
  with ended as (
    select l.lease_id from pglimits.leases l
    where l.limit_id = state.limit_id and l.key = state.key
      and l.expires_at >= state.next_expiry and l.expires_at <= now
    for update skip locked
  ), gone as (
    delete from pglimits.leases l using ended e
    where l.lease_id = e.lease_id
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    returning l.slots
  )
  select coalesce(sum(g.slots), 0) into freed from gone g;
  state.held := state.held - freed;
  state.next_expiry := coalesce((
    select l.expires_at from pglimits.leases l
    where l.limit_id = state.limit_id and l.key = state.key and l.expires_at >= state.next_expiry
    order by l.expires_at limit 1), 'infinity');
  return state;
end $$;

comment on function pglimits._take_expired(pglimits.states, timestamptz) is
  'Frees the slots of leases that have ended by now.';

-- Whether a limit can never grant what somebody waits for. One of 0 may grant it when it is no longer 0.
create or replace function pglimits._is_hopeless(config pglimits.configs, slots integer, for_rate boolean)
returns boolean
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return slots > config."limit" and config."limit" > 0 or for_rate and config.slot_decay_per_second = 0;
end $$;

comment on function pglimits._is_hopeless(pglimits.configs, integer, boolean) is
  'Whether a limit, as it is now, can never grant so many slots. for_rate: by decay alone.';

-- Grants the head of the queue, and the next, as long as they fit: strictly in order, so that a wide request is not
-- starved by narrow ones. Then makes sure that whoever is left at the head knows when to look.
create or replace function pglimits._advance(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  head pglimits.queue;
  fits_at timestamptz;
begin
  loop
    if state.waiting > 0 then
      select q.* into head from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.turn is null
        and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)
      order by q.rank, q.arrival limit 1;
    end if;
    if state.waiting = 0 or head.lease_id is null then
      state.waiting := 0;
      state.next_look := state.next_death;
      exit;
    end if;
    state.head_rank := head.rank;
    state.head_arrival := head.arrival;

    if head.expires_at <= now then
      -- It may have called in since it was read; then it is looked at again.
      delete from pglimits.queue q
      where q.lease_id = head.lease_id
        and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key and q.expires_at <= now;
      if found then
        state.waiting := state.waiting - 1;
      end if;
      continue;
    end if;

    if pglimits._is_hopeless(config, head.slots, head.for_rate) then
      -- It is told, asks again, and gets the error.
      delete from pglimits.queue q
      where q.lease_id = head.lease_id
        and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key;
      state.waiting := state.waiting - 1;
      perform pglimits._tell(head.channel, head.lease_id);
      continue;
    end if;

    if head.for_rate then
      fits_at := case when config."limit" = 0 then timestamptz 'infinity' else timestamptz '-infinity' end;
    else
      fits_at := pglimits._fits_at(state, config, head.slots, now);
    end if;

    if fits_at = '-infinity' and head.several then
      -- Granting it here would take locks out of order. It keeps its place until it has tried for itself.
      if not head.called and head.kept_until is null then
        update pglimits.queue q set called = true
        where q.lease_id = head.lease_id
          and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key;
        perform pglimits._tell(head.channel, head.lease_id);
      end if;
      fits_at := timestamptz 'infinity';
    end if;

    if fits_at > '-infinity' then
      state.next_look := least(state.next_death, fits_at, head.expires_at);
      if head.looks_at > state.next_look then
        update pglimits.queue q set looks_at = state.next_look
        where q.lease_id = head.lease_id
          and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key;
        perform pglimits._tell(head.channel, head.lease_id);
      end if;
      exit;
    end if;

    state := pglimits._hand_over(state, config, head, now);
  end loop;
  return state;
end $$;

comment on function pglimits._advance(pglimits.states, pglimits.configs, timestamptz) is
  'Grants waiters from the head of the queue as long as they fit, and notes when time alone may free the next one.';

-- Takes slots under a lease: the one place where held grows.
create or replace function pglimits._take_slots(
  state pglimits.states, config pglimits.configs, lease_id uuid, slots integer, rank integer,
  lease_duration interval, holder jsonb, claimed boolean, parts integer, ends timestamptz, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if config.slot_decay_per_second > 0 then
    state := pglimits._book(state, config, slots, pglimits._decayed(config, now));
  end if;
  state.version := state.version + 1;
  state.held := state.held + slots;
  state.next_expiry := least(state.next_expiry, ends);
  insert into pglimits.leases (lease_id, limit_id, key, slots, holder, fence, priority, lease_duration, claimed,
                               parts, acquired_at, expires_at)
  values (lease_id, state.limit_id, state.key, slots, holder, state.version, -rank, lease_duration, claimed, parts,
          now, ends);
  return state;
end $$;

comment on function pglimits._take_slots(
  pglimits.states, pglimits.configs, uuid, integer, integer, interval, jsonb, boolean, integer, timestamptz, timestamptz) is
  'Records a lease and returns the state with its slots held; the fence is the state''s new version.';

-- Gives the waiter at the head what it waits for. A lease handed over ends as soon as its waiter would have died,
-- until the waiter claims it: a dead process does not hold a slot for a whole lease.
create or replace function pglimits._hand_over(
  state pglimits.states, config pglimits.configs, head pglimits.queue, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  ends timestamptz;
begin
  state.waiting := state.waiting - 1;
  if head.for_rate then
    state := pglimits._book(state, config, head.slots, pglimits._decayed(config, now));
    state.next_death := least(state.next_death, head.expires_at);
    -- A turn that comes at once is remembered from now on.
    update pglimits.queue q set turn = greatest(state.booked - config."limit", pglimits._decayed(config, now))
    where q.lease_id = head.lease_id
      and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key;
  else
    -- It may have called in since it was read, and count on that.
    delete from pglimits.queue q
    where q.lease_id = head.lease_id
      and q.limit_id is not distinct from head.limit_id and q.key is not distinct from head.key
    returning q.expires_at into head.expires_at;
    ends := least(head.expires_at, now + head.lease_duration);
    state := pglimits._take_slots(state, config, head.lease_id, head.slots, head.rank, head.lease_duration,
                                  head.holder, false, 1, ends, now);
  end if;
  perform pglimits._tell(head.channel, head.lease_id, state.version, ends);
  return state;
end $$;

comment on function pglimits._hand_over(pglimits.states, pglimits.configs, pglimits.queue, timestamptz) is
  'Turns the waiter at the head into a lease, or gives it its turn on a rate limit, and tells it.';

-- Brings a locked state up to the moment: what has ended is taken out, what fits is granted.
create or replace function pglimits._settle(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if now >= state.next_expiry then
    state := pglimits._take_expired(state, now);
  end if;
  state := pglimits._unpin(state, config, now);
  if now >= state.next_death then
    state := pglimits._bury_sleepers(state, config, now);
  end if;
  return pglimits._advance(state, config, now);
end $$;

comment on function pglimits._settle(pglimits.states, pglimits.configs, timestamptz) is
  'Applies to a locked state what time and the last change have made possible.';
-- Turns on rate limits that are reserved ahead: finding one, booking it, and moving those up who sleep behind one that is given up.

-- The earliest turn for so many slots, not before a virtual time, at which nobody goes too fast: neither by what is
-- booked, nor by the turns pinned further ahead, between which it may find room.
create or replace function pglimits._find_turn(
  state pglimits.states, config pglimits.configs, slots integer, not_before numeric)
returns pglimits._turn
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  -- Moments are whole microseconds; what that puts off does not count.
  rounded constant numeric := config.slot_decay_per_second::numeric / 1000000;
  peak constant numeric := greatest(state.peak, config."limit" + 2 * rounded);
  found_turn pglimits._turn;
  first_turn numeric := numeric '-Infinity';
  slots_since numeric := 0;
  booked_since numeric := numeric '-Infinity';
  pin record;
begin
  found_turn.booked := state.booked;
  found_turn.turn := greatest(not_before, found_turn.booked + slots - config."limit");
  if state.pinned > 0 then
    -- Back to where earlier ones cannot matter at that time: none leaves more than the peak, and those since have booked as much.
    for pin in
      select q.turn, q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.pinned and q.turn < not_before
      order by q.turn desc, q.lease_id desc
    loop
      first_turn := pin.turn;
      slots_since := slots_since + pin.slots;
      booked_since := greatest(booked_since, pin.turn + slots_since);
      exit when booked_since >= pin.turn + peak + slots_since;
    end loop;
    for pin in
      select q.turn, q.lease_id, q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.pinned and q.turn >= first_turn
      order by q.turn, q.lease_id
    loop
      exit when found_turn.turn <= pin.turn + rounded and pglimits._leaves_room(
        state, config, greatest(found_turn.booked, found_turn.turn) + slots, pin.turn, pin.lease_id);
      found_turn.booked := greatest(found_turn.booked, pin.turn) + pin.slots;
      found_turn.passed_turn := pin.turn;
      found_turn.passed_id := pin.lease_id;
      found_turn.turn := greatest(not_before, found_turn.booked + slots - config."limit");
    end loop;
  end if;
  return found_turn;
end $$;

comment on function pglimits._find_turn(pglimits.states, pglimits.configs, integer, numeric) is
  'The earliest turn on a rate limit that can be had for so many slots, not before a virtual time.';

-- Notes how much the pinned turns leave on the level, those that are kept although more was added since among them.
create or replace function pglimits._note_peak(state pglimits.states)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  booked numeric := state.booked;
  pin record;
begin
  state.peak := 0;
  if state.pinned > 0 then
    for pin in
      select q.turn, q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.pinned
      order by q.turn, q.lease_id
    loop
      booked := greatest(booked, pin.turn) + pin.slots;
      state.peak := greatest(state.peak, booked - pin.turn);
    end loop;
  end if;
  return state;
end $$;

comment on function pglimits._note_peak(pglimits.states) is 'Notes how much the pinned turns leave on the level at most.';

-- Whether pinned turns, from the given one on, can still be kept if so much is booked before them.
create or replace function pglimits._leaves_room(
  state pglimits.states, config pglimits.configs, booked numeric, from_turn numeric, from_id uuid)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  pin record;
begin
  for pin in
    select q.turn, q.slots from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.pinned
      and (q.turn, q.lease_id) >= (from_turn, from_id)
    order by q.turn, q.lease_id
  loop
    if booked <= pin.turn then
      return true;  -- all has decayed by then: what comes later is as it was
    end if;
    booked := booked + pin.slots;
    if booked > pin.turn + config."limit" + config.slot_decay_per_second::numeric / 1000000 then
      return false;
    end if;
  end loop;
  return true;
end $$;

comment on function pglimits._leaves_room(pglimits.states, pglimits.configs, numeric, numeric, uuid) is
  'Whether the pinned turns from a given one on can be kept if so much is booked before them.';

-- Books slots at the earliest turn that is not before a virtual time. Their turn is then booked - limit, or that time.
create or replace function pglimits._book(
  state pglimits.states, config pglimits.configs, slots integer, not_before numeric)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  at pglimits._turn := pglimits._find_turn(state, config, slots, not_before);
begin
  if at.passed_turn is not null then
    state := pglimits._unpin(state, at.passed_turn, at.passed_id);
  end if;
  state.booked := greatest(state.booked, at.turn) + slots;
  return state;
end $$;

comment on function pglimits._book(pglimits.states, pglimits.configs, integer, numeric) is
  'Raises the level of a rate limit by slots, at the earliest turn that is not before a virtual time.';

-- Books the pinned turns up to a given one: it has come, or somebody else goes after it.
create or replace function pglimits._unpin(state pglimits.states, up_to_turn numeric, up_to_id uuid)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  pin record;
begin
  for pin in
    select q.turn, q.slots, q.lease_id from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.pinned
      and (q.turn, q.lease_id) <= (up_to_turn, up_to_id)
    order by q.turn, q.lease_id
  loop
    update pglimits.queue q set pinned = false, gap = greatest(pin.turn - state.booked, 0)
    where q.lease_id = pin.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
    state.booked := greatest(state.booked, pin.turn) + pin.slots;
    state.pinned := state.pinned - 1;
  end loop;
  return state;
end $$;

comment on function pglimits._unpin(pglimits.states, numeric, uuid) is
  'Books the pinned turns up to a given one.';

-- The first of all where the level is to be changed: what is booked later than its turn would take as long again to decay.
create or replace function pglimits._unpin(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if state.pinned > 0 then
    return pglimits._unpin(state, pglimits._decayed(config, now), 'ffffffff-ffff-ffff-ffff-ffffffffffff');
  end if;
  return state;
end $$;

comment on function pglimits._unpin(pglimits.states, pglimits.configs, timestamptz) is
  'Books the pinned turns that have come.';

-- How long until every rate limit of a request has a turn for it. In seconds, never in days: these may have 23 or 25 hours.
create or replace function pglimits._common_turn(
  request pglimits._request, at integer[], states pglimits.states[], configs pglimits.configs[], now timestamptz)
returns interval
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  go_in interval := interval '0';
  later interval := interval '0';
  config pglimits.configs;
begin
  loop
    for p in 1 .. cardinality(at) loop
      config := configs[at[p]];
      continue when config.active is not true;
      later := greatest(later, pglimits._until(config, (pglimits._find_turn(
        states[at[p]], config, request.slots[p], pglimits._decayed(config, now + go_in))).turn, now));
    end loop;
    -- A turn that one limit has put off may not be free on the others.
    exit when later = go_in or cardinality(at) = 1;
    go_in := later;
  end loop;
  return later;
end $$;

comment on function pglimits._common_turn(
  pglimits._request, integer[], pglimits.states[], pglimits.configs[], timestamptz) is
  'How long until every rate limit of a request has a turn for it.';

-- Places a turn on one of the rate limits of a request. The level rises at once; but if another one is slower, so that the turn
-- lies later than this limit needs, it is only pinned: charged now, the slots would have decayed before they are used, and kept
-- back until then, they would be missing to others. So it is where somebody keeps a turn that this limit no longer has.
create or replace function pglimits._place_turn(
  state pglimits.states, config pglimits.configs, slots integer, turn_in interval, several boolean, stays_pinned boolean,
  now timestamptz)
returns pglimits._placed
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
begin
  if several and turn_in > interval '0' and (
    stays_pinned or pglimits._until(config, (pglimits._find_turn(state, config, slots, decayed)).turn, now) <> turn_in)
  then
    state.pinned := state.pinned + 1;
    return row(state, pglimits._decayed(config, now + turn_in), true)::pglimits._placed;
  end if;
  state := pglimits._book(state, config, slots, decayed);
  return row(state, greatest(state.booked - config."limit", decayed), false)::pglimits._placed;
end $$;

comment on function pglimits._place_turn(
  pglimits.states, pglimits.configs, integer, interval, boolean, boolean, timestamptz) is
  'Books or pins a turn that comes after turn_in. Returns the state with it, and where in virtual time it lies.';

-- Takes a turn on a rate limit, and notes it if it may be asked for again.
-- arrival: when it arrived, if it has stood in line.
create or replace function pglimits._take_turn(
  state pglimits.states, config pglimits.configs, request pglimits._request, slots integer, turn_in interval,
  several boolean, arrival timestamptz, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  alive_until timestamptz := case when request.channel is null then 'infinity' else now + pglimits._liveness() end;
  forget numeric := pglimits._forgotten(config, now);
  placed constant pglimits._placed := pglimits._place_turn(state, config, slots, turn_in, several, false, now);
begin
  state := placed.state;
  if turn_in = interval '0' and not request.chosen then
    return state;
  end if;
  -- Turns that have passed stay a while, for those who ask again because they did not hear of theirs.
  delete from pglimits.queue q
  where q.limit_id = state.limit_id and q.key = state.key and q.turn > state.passed and q.turn <= forget and not q.pinned;
  state.passed := greatest(state.passed, forget);
  arrival := coalesce(arrival, greatest(now, state.last_arrival + interval '1 microsecond'));
  state.last_arrival := greatest(state.last_arrival, arrival);
  insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, turn, pinned, for_rate, several, limit_ids, keys,
                              seen, lease_duration, holder, channel, expires_at, looks_at)
  values (request.lease_id, state.limit_id, state.key, slots, request.rank, arrival, placed.turn, placed.pinned, true, several,
          case when several then request.limit_ids end, case when several then request.keys end,
          case when several then pglimits._changes(request.limit_ids) end,
          request.lease_duration, request.holder, request.channel, alive_until, now + turn_in);
  if turn_in > interval '0' then
    state.next_death := least(state.next_death, alive_until);
    state.next_look := least(state.next_look, alive_until);
  end if;
  return state;
end $$;

comment on function pglimits._take_turn(
  pglimits.states, pglimits.configs, pglimits._request, integer, interval, boolean, timestamptz, timestamptz) is
  'Records a turn on a rate limit, now or ahead, and returns the state with it booked or pinned.';

-- Whether all who sleep from a turn on move by just what is given up before them: nobody has turns on other limits too, or cannot
-- be told, and no gap waits to be closed.
create or replace function pglimits._move_alike(state pglimits.states, decayed numeric, from_turn numeric)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return state.pinned = 0 and not exists (
    select from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.turn >= from_turn
      and (q.several or q.expires_at = 'infinity' and not q.added or q.called));
end $$;

comment on function pglimits._move_alike(pglimits.states, numeric, numeric) is
  'Whether all who sleep on a rate limit from a turn on move by just what is given up before them.';

-- Gives up turns that have not come: those who sleep behind them move up. slots: what each leaves free right behind its turn;
-- nothing where it was pinned.
create or replace function pglimits._close_gaps(
  state pglimits.states, config pglimits.configs, now timestamptz, turns numeric[], slots numeric[])
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  first constant numeric := (select min(u.turn) from unnest(turns) as u(turn));
  given_up constant numeric := (select sum(u.slots) from unnest(slots) as u(slots));
  gap record;
  called text;
begin
  if pglimits._move_alike(state, decayed, first)
    and state.booked - given_up - pglimits._reserved(state, decayed) >= decayed
  then
    state.booked := state.booked - given_up;
    -- Also those whose turn comes by it: it comes now, and is remembered from now on.
    perform pglimits._tell_sleepers(state, decayed);
    update pglimits.queue q set turn = greatest(q.turn - b.given_up, decayed)
    from (
      select x.lease_id, sum(x.slots) over (order by x.turn, x.lease_id is null) as given_up
      from (
        select q.lease_id, q.turn, 0 as slots from pglimits.queue q
        where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.turn >= first
        union all
        select null, u.turn, u.slots from unnest(turns, slots) as u(turn, slots)
      ) x
    ) b
    where q.lease_id = b.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
    return state;
  end if;
  for gap in select u.turn, u.slots from unnest(turns, slots) as u(turn, slots) loop
    -- Who is pinned on all its limits goes so late because it did not fit before, or between, other turns.
    update pglimits.queue q set called = true
    where q.lease_id = (
      select n.lease_id from pglimits.queue n
      where n.limit_id = state.limit_id and n.key = state.key and n.pinned and n.turn >= gap.turn
        and not exists (select from pglimits.queue o where o.lease_id = n.lease_id and not o.pinned)
      order by n.turn limit 1)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning q.channel into called;
    perform pglimits._tell(called, null);
    continue when gap.slots = 0;
    update pglimits.queue q set gap = q.gap + gap.slots, called = true
    where q.lease_id = (
      select n.lease_id from pglimits.queue n
      where n.limit_id = state.limit_id and n.key = state.key and n.turn > decayed and n.turn > gap.turn and not n.pinned
      order by n.turn limit 1)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning q.channel into called;
    if found then
      perform pglimits._tell(called, null);
    else
      state.booked := state.booked - gap.slots;
    end if;
  end loop;
  return (pglimits._rearrange(array[state], array[config], now))[1];
end $$;

comment on function pglimits._close_gaps(pglimits.states, pglimits.configs, timestamptz, numeric[], numeric[]) is
  'Gives turns back that were given up before they came, and moves those up who sleep behind them.';

-- Who has to be looked at when something changes for those who sleep on some locked states, in the order in which they go; null
-- if nobody has: it begins with the first who is called, or sleeps over several limits of which one was changed.
create or replace function pglimits._sleepers(states pglimits.states[], configs pglimits.configs[], now timestamptz)
returns pglimits._sleeper[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  place_ids bigint[];
  place_keys text[];
  decayed numeric[];
  rates numeric[];
  changes integer[];
  changed boolean[];
  -- Of each turn that lies ahead here: whose it is, on which state, the how manieth there, and when the sleeper goes.
  ids uuid[];
  at integer[];
  nths bigint[];
  goes_at numeric[];
  from_here numeric;
  and_before numeric;
begin
  for i in 1 .. cardinality(states) loop
    place_ids[i] := (states[i]).limit_id;
    place_keys[i] := (states[i]).key;
    decayed[i] := pglimits._decayed(configs[i], now);
    rates[i] := (configs[i]).slot_decay_per_second;
    changes[i] := (configs[i]).changes;
    -- Since somebody asked who sleeps there and on others too.
    changed[i] := exists (
      select from pglimits.queue q
      where q.limit_id = place_ids[i] and q.key = place_keys[i] and q.turn > decayed[i] and q.limit_ids is not null
        and q.seen[array_position(q.limit_ids, q.limit_id)] <> changes[i]);
  end loop;
  with ahead as (
    select p.at::integer, q.lease_id, q.expires_at = 'infinity' and not q.added as deaf,
           row_number() over (partition by p.at order by q.turn, q.lease_id) as nth,
           q.called or q.limit_ids is not null and q.expires_at < 'infinity' and pglimits._is_outdated(q) as moves,
           max(case when p.rate > 0 then (q.turn - p.decayed) / p.rate else 'Infinity' end)
             over (partition by q.lease_id) as goes_in
    from unnest(place_ids, place_keys, decayed, rates) with ordinality as p(limit_id, key, decayed, rate, at)
    cross join lateral (
      select w.* from pglimits.queue w
      where w.limit_id = p.limit_id and w.key = p.key and w.turn > p.decayed offset 0) q
  ), ordered as (
    -- Where a limit was changed, somebody may go later than others behind it; they come after it all the same.
    select a.*, case when a.deaf then a.goes_in else max(a.goes_in) over (partition by a.at order by a.nth) end as goes_after
    from ahead a
  ), each as (
    select o.*, max(o.goes_after) over (partition by o.lease_id) as goes_at from ordered o
  )
  select array_agg(e.lease_id), array_agg(e.at), array_agg(e.nth), array_agg(e.goes_at), min(e.goes_at) filter (where e.moves)
  into ids, at, nths, goes_at, from_here from each e;
  -- With everybody who comes behind one of them.
  while from_here is not null loop
    select min(x.goes_at) into and_before
    from (select u.goes_at, min(u.nth) filter (where u.goes_at >= from_here) over (partition by u.at) <= u.nth as is_behind
          from unnest(at, nths, goes_at) as u(at, nth, goes_at)) x
    where x.is_behind;
    exit when and_before = from_here;
    from_here := and_before;
  end loop;
  return (
    select array_agg(
      row(s.lease_id, x.added, x.changed, x.deaf, x.elsewhere, x.channel, x.at, x.slots, x.pinned, x.booked,
          x.goes_in)::pglimits._sleeper
      order by s.goes_at, x.arrival, s.nth, s.lease_id)
    from (
      select u.lease_id, min(u.nth) as nth, min(u.goes_at) as goes_at
      from unnest(ids, nths, goes_at) as u(lease_id, nth, goes_at) where u.goes_at >= from_here group by u.lease_id
    ) s
    cross join lateral (
      select bool_or(q.added) as added, bool_or(q.expires_at = 'infinity' and not q.added) as deaf,
             bool_or(p.at is null) as elsewhere, max(q.channel) as channel,
             min(q.arrival) as arrival,
             array_agg(p.at::integer order by p.at) filter (where p.at is not null) as at,
             array_agg(q.slots order by p.at) filter (where p.at is not null) as slots,
             bool_or(coalesce(q.seen[array_position(q.limit_ids, q.limit_id)] <> p.changes, p.changed)) as changed,
             array_agg(q.pinned order by p.at) filter (where p.at is not null) as pinned,
             array_agg(case when q.turn > p.decayed and not q.pinned then q.slots + q.gap else 0 end order by p.at)
               filter (where p.at is not null) as booked,
             max(case when p.rate > 0 then (q.turn - p.decayed) / p.rate else 'Infinity' end) as goes_in
      from pglimits.queue q
      left join unnest(place_ids, place_keys, decayed, rates, changes, changed)
        with ordinality as p(limit_id, key, decayed, rate, changes, changed, at)
        on p.limit_id = q.limit_id and p.key = q.key
      where q.lease_id = s.lease_id) x);
end $$;

comment on function pglimits._sleepers(pglimits.states[], pglimits.configs[], timestamptz) is
  'Who has to be looked at when something changes for those who sleep on some states, in the order in which they go.';

-- Moves those up who sleep where something came free before them, in the order in which they go: each to the first moment that
-- those before it leave free, and so nobody to a later one. Who sleeps over several limits of which one was changed may have to
-- move back.
--
-- Who sleeps over several limits moves on all of them at once, and so only if all their states are here. Where one is not, it
-- keeps what came free before it, and all behind it stay; it is called, and told: whoever watches there, it or another, locks
-- what it needs. Who cannot be told goes at the moment that it knows.
--
-- Where a limit was changed, those who sleep there may have to move back. Each makes room for those who sleep on others only and
-- need not move, wherever these go, and for none of those that come after it and have to move as well.
create or replace function pglimits._rearrange(
  states pglimits.states[], configs pglimits.configs[], now timestamptz, again boolean default false)
returns pglimits.states[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  sleepers pglimits._sleeper[] := pglimits._sleepers(states, configs, now);
  sleeper pglimits._sleeper;
  state pglimits.states;
  -- Of each state: what is booked for those who have not been looked at, where that ended at first, whether all stay from here
  -- on, and what is left by those who are pinned, since they cannot be told.
  rest numeric[] := array_fill(0::numeric, array[cardinality(states)]);
  ends numeric[];
  stopped boolean[] := array_fill(false, array[cardinality(states)]);
  gaps numeric[] := rest;
  -- Whether all can move, and some may have to move back.
  all_here constant boolean := (select not bool_or(s.elsewhere) from unnest(sleepers) s);
  some_changed constant boolean := (select bool_or(s.changed and not s.deaf) from unnest(sleepers) s);
  make_room constant boolean := some_changed and all_here;
  stays boolean;
  free numeric;
  moved record;
  some_back boolean := false;
  i integer;
begin
  if sleepers is null then
    return states;
  end if;
  for nth in 1 .. cardinality(sleepers) loop
    sleeper := sleepers[nth];
    for p in 1 .. cardinality(sleeper.at) loop
      i := sleeper.at[p];
      state := states[i];
      if sleeper.deaf and all_here then
        update pglimits.queue q set pinned = q.pinned or sleeper.booked[p] > 0, gap = 0, called = false
        where q.lease_id = sleeper.lease_id
          and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
        state.pinned := state.pinned + (sleeper.booked[p] > 0)::integer;
        states[i] := state;
        gaps[i] := gaps[i] + sleeper.booked[p];
      elsif make_room then
        rest[i] := rest[i] + sleeper.booked[p];
        if not sleeper.added and (sleeper.changed and sleeper.pinned[p] or not sleeper.changed and sleeper.booked[p] > 0) then
          update pglimits.queue q set pinned = not sleeper.changed
          where q.lease_id = sleeper.lease_id
            and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
          state.pinned := state.pinned + case when sleeper.changed then -1 else 1 end;
          states[i] := state;
          sleeper.pinned[p] := not sleeper.changed;
        end if;
      elsif sleeper.booked[p] > 0 then
        if gaps[i] > 0 then
          perform pglimits._tell(sleeper.channel, null);
          update pglimits.queue q set gap = q.gap + gaps[i], called = true
          where q.lease_id = sleeper.lease_id
            and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
          sleeper.booked[p] := sleeper.booked[p] + gaps[i];
          gaps[i] := 0;
        end if;
        rest[i] := rest[i] + sleeper.booked[p];
      end if;
    end loop;
    sleeper.changed := some_changed and (sleeper.changed or not make_room);
    sleepers[nth] := sleeper;
  end loop;
  for at in 1 .. cardinality(states) loop
    state := states[at];
    ends[at] := state.booked - gaps[at];
    state.booked := ends[at] - rest[at];
    states[at] := state;
  end loop;

  foreach sleeper in array sleepers loop
    continue when sleeper.deaf and all_here;
    stays := sleeper.elsewhere or sleeper.deaf;
    for p in 1 .. cardinality(sleeper.at) loop
      i := sleeper.at[p];
      stays := stays or stopped[i];
    end loop;
    if not stays then
      moved := pglimits._move(sleeper, states, configs, now);
      states := moved.states;
      some_back := some_back or moved.back;
    end if;
    for p in 1 .. cardinality(sleeper.at) loop
      i := sleeper.at[p];
      state := states[i];
      if stopped[i] then
        null;
      elsif stays then
        free := greatest(ends[i] - rest[i] - state.booked, 0);
        update pglimits.queue q
        set called = q.called or free > 0, gap = q.gap + case when sleeper.booked[p] > 0 then free else 0 end
        where q.lease_id = sleeper.lease_id
          and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
        state.booked := state.booked + rest[i] + case when rest[i] > 0 then free else 0 end;
        stopped[i] := true;
        if free > 0 then
          perform pglimits._tell(sleeper.channel, null);
        end if;
      end if;
      states[i] := state;
      rest[i] := rest[i] - sleeper.booked[p];
    end loop;
  end loop;
  if some_back and not again then
    -- It kept clear of those behind it where they were, some of whom are before it now.
    return pglimits._rearrange(states, configs, now, true);
  end if;
  for at in 1 .. cardinality(states) loop
    states[at] := pglimits._note_peak(states[at]);
  end loop;
  return states;
end $$;

comment on function pglimits._rearrange(pglimits.states[], pglimits.configs[], timestamptz, boolean) is
  'Moves those up who sleep where something came free before them, and those over several limits of which one was changed.';

-- Gives a sleeper that is not booked anywhere the first moment that it can have, on all its limits. If it can never be granted
-- now, it is sent away to ask again, and gets the error; if one of them is 0, it stands in line there. It goes no later than it
-- was told, whatever was added since, unless one of them was changed. What adjust has added comes right behind those before it.
create or replace function pglimits._move(
  sleeper pglimits._sleeper, inout states pglimits.states[], configs pglimits.configs[], now timestamptz,
  out back boolean)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  request pglimits._request;
  turn_in interval;
  told interval;
  state pglimits.states;
  config pglimits.configs;
  placed pglimits._placed;
  hopeless boolean := false;
  shut integer;
begin
  back := false;
  if sleeper.added then
    placed := pglimits._add_behind(states[sleeper.at[1]], configs[sleeper.at[1]], sleeper.slots[1], now);
    states[sleeper.at[1]] := placed.state;
    update pglimits.queue q set turn = placed.turn, gap = 0, called = false
    where q.lease_id = sleeper.lease_id
      and q.limit_id is not distinct from (placed.state).limit_id and q.key is not distinct from (placed.state).key;
    return;
  end if;
  for p in 1 .. cardinality(sleeper.at) loop
    state := states[sleeper.at[p]];
    config := configs[sleeper.at[p]];
    hopeless := hopeless or pglimits._is_hopeless(config, sleeper.slots[p], true);
    shut := coalesce(shut, case when config."limit" = 0 then sleeper.at[p] end);
    continue when not sleeper.pinned[p];
    update pglimits.queue q set pinned = false
    where q.lease_id = sleeper.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key and q.pinned;
    if found then
      state.pinned := state.pinned - 1;
    else
      -- More was charged since it was pinned, and so somebody had to go behind it.
      state.booked := state.booked - sleeper.slots[p];
    end if;
    states[sleeper.at[p]] := state;
  end loop;
  if hopeless then
    delete from pglimits.queue q where q.lease_id = sleeper.lease_id;
    perform pglimits._tell(sleeper.channel, sleeper.lease_id);
    return;
  elsif shut is not null then
    states[shut] := pglimits._stand_in_line(states[shut], array[sleeper.lease_id], now);
    delete from pglimits.queue q where q.lease_id = sleeper.lease_id and q.turn is not null;
    return;
  end if;

  request.slots := sleeper.slots;
  turn_in := pglimits._common_turn(request, sleeper.at, states, configs, now);
  told := make_interval(secs => least(ceil(sleeper.goes_in * 1000000) / 1000000, 3e9)::double precision);
  if not sleeper.changed then
    turn_in := least(turn_in, told);
  end if;
  back := extract(epoch from turn_in) > sleeper.goes_in + 0.000002;
  for p in 1 .. cardinality(sleeper.at) loop
    state := states[sleeper.at[p]];
    placed := pglimits._place_turn(
      state, configs[sleeper.at[p]], sleeper.slots[p], turn_in, true,
      -- Booked now, it would take the room between those that are pinned before it from others.
      not sleeper.changed and sleeper.pinned[p] and sleeper.booked[p] = 0 and turn_in = told, now);
    states[sleeper.at[p]] := placed.state;
    update pglimits.queue q
    set turn = placed.turn, pinned = placed.pinned, gap = 0, called = back,
        seen = case when q.limit_ids is not null then pglimits._changes(q.limit_ids) end
    where q.lease_id = sleeper.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  end loop;
  if back or extract(epoch from turn_in) < sleeper.goes_in - 0.000002 then
    perform pglimits._tell(sleeper.channel, null);
  end if;
end $$;

comment on function pglimits._move(pglimits._sleeper, pglimits.states[], pglimits.configs[], timestamptz) is
  'Gives a sleeper the first moment that it can have on all its limits, and tells it. back: it is later than the one it had.';

-- Has some who slept stand in line: their limit is 0, and nobody knows when their turn will come.
create or replace function pglimits._stand_in_line(state pglimits.states, lease_ids uuid[], now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  line record;
begin
  with stood as (
    update pglimits.queue q
    set turn = null, gap = 0, called = false, looks_at = now + pglimits._liveness() * 0.3,
        seen = case when q.limit_ids is not null then pglimits._changes(q.limit_ids) end
    where q.lease_id = any (lease_ids)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning q.rank, q.arrival, q.expires_at, pglimits._tell(q.channel, q.lease_id)
  )
  select s.rank, s.arrival, count(*) over () as waiters, min(s.expires_at) over () as dies_at
  into line from stood s order by s.rank, s.arrival limit 1;
  return pglimits._lengthen(state, line.waiters, line.rank, line.arrival, line.dies_at);
end $$;

comment on function pglimits._stand_in_line(pglimits.states, uuid[], timestamptz) is
  'Has some who slept towards a turn stand in line, in their order of arrival, and tells them.';

-- Books what adjust adds behind all that is booked, past the limit if need be. Its turn comes with its first slot, so that it lies
-- between the turns of those before it and of those behind it, however wide it is.
create or replace function pglimits._add_behind(
  state pglimits.states, config pglimits.configs, slots integer, now timestamptz)
returns pglimits._placed
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  turn constant numeric := greatest(state.booked + 1 - config."limit", decayed);
begin
  state.booked := greatest(state.booked, decayed) + slots;
  return row(state, turn, false)::pglimits._placed;
end $$;

comment on function pglimits._add_behind(pglimits.states, pglimits.configs, integer, timestamptz) is
  'Books what adjust adds behind all that is booked.';

-- Raises the level. Where some sleep towards turns that are booked, what is added is noted as a turn behind theirs: it moves with
-- them, and is the first to be taken off.
create or replace function pglimits._add_turn(
  state pglimits.states, config pglimits.configs, slots integer, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  placed constant pglimits._placed := pglimits._add_behind(state, config, slots, now);
begin
  if placed.turn > decayed and exists (
    select from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and not q.pinned)
  then
    insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, turn, added, for_rate, several, lease_duration,
                                expires_at, looks_at)
    values (gen_random_uuid(), state.limit_id, state.key, slots, 0, now, placed.turn, true, true, false, interval '0',
            'infinity', now);
  end if;
  return pglimits._note_peak(placed.state);
end $$;

comment on function pglimits._add_turn(pglimits.states, pglimits.configs, integer, timestamptz) is
  'Raises the level of a rate limit, behind those who sleep.';

-- What is needed to move those who sleep on some (limit, key)s: these, with all the others of who sleeps there over several, and
-- so on: whoever has to stay stops all those behind it.
create or replace function pglimits._around(places pglimits._places)
returns pglimits._places
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  around pglimits._places;
begin
  if places.keys is null then
    return null;
  end if;
  with recursive connected as (
    select h.limit_id, h.key collate "C" as key from unnest(places.limit_ids, places.keys) as h(limit_id, key)
    union
    select o.limit_id, o.key collate "C"
    from connected c
    cross join lateral (
      select q.limit_ids, q.keys from pglimits.queue q
      where q.limit_id = c.limit_id and q.key = c.key and q.turn is not null and q.limit_ids is not null offset 0) s
    cross join lateral unnest(s.limit_ids, s.keys) as o(limit_id, key)
  )
  select array_agg(c.limit_id), array_agg(c.key) into around.limit_ids, around.keys from connected c;
  return around;
end $$;

comment on function pglimits._around(pglimits._places) is
  'Some (limit, key)s with all the others of those who sleep there over several limits, and the others of who sleeps on these.';

-- The same for all keys of a limit.
create or replace function pglimits._around_limit(limit_id bigint)
returns pglimits._places
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  here pglimits._places;
begin
  select array_agg(q.limit_id), array_agg(q.key) into here.limit_ids, here.keys
  from (select distinct w.limit_id, w.key from pglimits.queue w
        where w.limit_id = _around_limit.limit_id and w.turn is not null and w.limit_ids is not null) q;
  return pglimits._around(here);
end $$;

comment on function pglimits._around_limit(bigint) is
  'What is needed to move those who sleep on any key of a limit and on others too; null if nobody does.';

-- Locks those of some states that come before, or after, those of a limit.
create or replace function pglimits._lock_beside(places pglimits._places, limit_id bigint, before boolean)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._lock_several(array_agg(u.limit_id), array_agg(u.key))
  from unnest(places.limit_ids, places.keys) as u(limit_id, key)
  where case when before then u.limit_id < _lock_beside.limit_id else u.limit_id > _lock_beside.limit_id end;
end $$;

comment on function pglimits._lock_beside(pglimits._places, bigint, boolean) is
  'Locks those of some states that come before, or after, those of a limit.';

-- Does so on (limit, key)s whose states are locked; nowhere if that is null.
create or replace function pglimits._rearrange_at(places pglimits._places)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  now constant timestamptz := pglimits._now();
  was pglimits.states[] := array[]::pglimits.states[];
  states pglimits.states[] := array[]::pglimits.states[];
  configs pglimits.configs[];
  state pglimits.states;
  config pglimits.configs;
begin
  if places.keys is null then
    return;
  end if;
  for i in 1 .. cardinality(places.keys) loop
    state := pglimits._lock_used(places.limit_ids[i], places.keys[i]);
    select c.* into config from pglimits.configs c where c.limit_id = state.limit_id;
    continue when config.active is not true;
    was := was || state;
    states := states || pglimits._unpin(state, config, now);
    configs := configs || config;
  end loop;
  states := pglimits._rearrange(states, configs, now);
  for i in 1 .. cardinality(states) loop
    state := states[i];
    if state.waiting > 0 then
      state := pglimits._advance(state, configs[i], now);
    end if;
    perform pglimits._save(state, was[i], now);
  end loop;
end $$;

comment on function pglimits._rearrange_at(pglimits._places) is
  '_rearrange on (limit, key)s whose states are locked.';

-- What is booked on a rate limit for those who sleep towards turns beyond a virtual time, with the gaps before them.
create or replace function pglimits._reserved(state pglimits.states, decayed numeric)
returns numeric
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(sum(q.slots + q.gap), 0) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and not q.pinned);
end $$;

comment on function pglimits._reserved(pglimits.states, numeric) is
  'What is booked on a rate limit for those who sleep towards turns beyond a virtual time.';

-- The level of a rate limit: what was used, and what those who sleep have reserved, but not what lies free before them.
create or replace function pglimits._level(state pglimits.states, config pglimits.configs, now timestamptz)
returns numeric
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  free constant numeric := (
    select coalesce(sum(q.gap), 0) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.gap > 0 and q.turn > decayed and not q.pinned);
begin
  -- A gap that has begun to pass is no longer booked as a whole.
  return greatest(state.booked - decayed, case when free > 0 then pglimits._reserved(state, decayed) end, free) - free;
end $$;

comment on function pglimits._level(pglimits.states, pglimits.configs, timestamptz) is
  'The level of a rate limit, without what lies free before those who sleep.';

-- Takes requests out of the queue of a (limit, key), and gives the turns back that they had ahead.
create or replace function pglimits._withdraw(
  state pglimits.states, config pglimits.configs, lease_ids uuid[], now timestamptz)
returns pglimits._withdrawn
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed numeric := pglimits._decayed(config, now);
  live uuid[];
  left_line bigint;
  unpinned bigint;
  turns numeric[];
  slots numeric[];
begin
  with gone as (
    delete from pglimits.queue q
    where q.lease_id = any (lease_ids)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning q.lease_id, q.turn, q.slots, q.gap, q.expires_at, q.pinned
  )
  select count(*) filter (where g.turn is null),
         coalesce(array_agg(g.lease_id) filter (where g.expires_at > now and (g.turn is null or g.turn > decayed)), '{}'),
         array_agg(g.turn) filter (where g.turn > decayed),
         array_agg(case when g.pinned then 0 else g.slots + g.gap end) filter (where g.turn > decayed),
         count(*) filter (where g.pinned)
  into left_line, live, turns, slots, unpinned from gone g;
  state.waiting := state.waiting - left_line;
  state.pinned := state.pinned - unpinned;
  if turns is not null then
    state := pglimits._close_gaps(state, config, now, turns, slots);
  end if;
  return row(state, live)::pglimits._withdrawn;
end $$;

comment on function pglimits._withdraw(pglimits.states, pglimits.configs, uuid[], timestamptz) is
  'Takes requests out of the queue of a (limit, key) and gives their turns back. Returns the state, and which were live.';

-- Removes sleepers of a rate limit whose process died before their turn. Who died after it has used its turn.
create or replace function pglimits._bury_sleepers(state pglimits.states, config pglimits.configs, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  dead constant uuid[] := array(
    select q.lease_id from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.expires_at <= now);
begin
  if cardinality(dead) > 0 then
    state := (pglimits._withdraw(state, config, dead, now)).state;
  end if;
  state.next_death := coalesce((
    select min(q.expires_at) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed), 'infinity');
  return state;
end $$;

comment on function pglimits._bury_sleepers(pglimits.states, pglimits.configs, timestamptz) is
  'Removes those who slept towards a turn on a rate limit and died, and gives their turns back.';

-- Tells those who sleep towards a turn to look.
create or replace function pglimits._tell_sleepers(state pglimits.states, decayed numeric)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._tell(w.channel, null)
  from (select distinct q.channel from pglimits.queue q
        where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed) w;
end $$;

comment on function pglimits._tell_sleepers(pglimits.states, numeric) is
  'Notifies those who sleep towards a turn on a rate limit that lies beyond a virtual time.';
-- The heart: checks a request, and serves a batch of them under the locks of all their states.

-- What is wrong with what a request says of itself, or null: a template for _argument_error.
create or replace function pglimits._argument_fault(
  lease_duration interval, wait interval, priority integer, holder jsonb, strict boolean, channel text)
returns text
language sql
stable
return case
  when strict is null then 'strict must not be null'
  when wait < interval '0' then 'wait must not be negative: %4$s'
  when channel !~ '^pglimits_[0-9a-z_]{1,40}$' then 'channel must be pglimits_ and up to 40 of a-z, 0-9, _: %5$L'
  when priority is null then 'priority must not be null'
  when priority not between -1000000 and 1000000 then 'priority must be from -1000000 to 1000000, not %6$s'
  when length(holder::text) > 8000 then 'holder must be at most 8000 characters of JSON, not %7$s'
  else pglimits._duration_error(lease_duration)
end;

comment on function pglimits._argument_fault(interval, interval, integer, jsonb, boolean, text) is
  'What is wrong with what a request says of itself, as a template for _argument_error; or null.';

-- What is wrong with the arguments of a request as such, or null. The names and keys themselves are looked at one by one.
create or replace function pglimits._argument_error(
  names text[], slots integer[], keys text[], lease_duration interval, wait interval, priority integer,
  holder jsonb, strict boolean, channel text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  fault constant text := case
    when names is null then 'names must not be null'
    when cardinality(names) = 0 then 'names must not be empty'
    when array_ndims(names) <> 1 then 'names must be a flat array'
    when cardinality(names) > 100 then 'names must be at most 100, not %1$s'
    when slots is null then 'slots must not be null'
    when array_ndims(slots) <> 1 or cardinality(slots) not in (1, cardinality(names))
      then 'slots must be one number for all names or one for each of the %1$s names, not %2$s'
    when keys is null then 'keys must not be null'
    when array_ndims(keys) <> 1 or cardinality(keys) not in (1, cardinality(names))
      then 'keys must be one for all names or one for each of the %1$s names, not %3$s'
    else pglimits._argument_fault(lease_duration, wait, priority, holder, strict, channel)
  end;
begin
  if fault is null then
    return null;
  end if;
  return format(fault, cardinality(names), left(slots::text, 60), left(keys::text, 60), wait, left(channel, 60),
                priority, length(holder::text));
end $$;

comment on function pglimits._argument_error(
  text[], integer[], text[], interval, interval, integer, jsonb, boolean, text) is
  'What is wrong with the arguments of a request, or null.';

-- Whether a request waits for a limit, holds slots of it, or had a turn on it a moment ago.
create or replace function pglimits._is_at(lease_id uuid, limit_id bigint)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from pglimits.queue q
                 where q.lease_id = _is_at.lease_id and _is_at.limit_id = any (q.limit_id || q.limit_ids))
      or exists (select from pglimits.leases l
                 where l.lease_id = _is_at.lease_id and l.limit_id = _is_at.limit_id and l.expires_at > pglimits._now());
end $$;

comment on function pglimits._is_at(uuid, bigint) is 'Whether a request waits for a limit, holds slots of it, or had a turn on it.';

-- Checks what a caller passes and finds its limits. Raises nothing: what is wrong comes back in error and message,
-- so that one bad request in a batch spoils no other.
create or replace function pglimits._check_request(
  names text[], slots integer[], keys text[], lease_duration interval, wait interval, priority integer,
  holder jsonb, lease_id uuid, strict boolean, channel text, for_rate boolean)
returns pglimits._request
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  -- The parts.
  limit_ids bigint[] := array[]::bigint[];
  part_keys text[] := array[]::text[];
  part_slots integer[] := array[]::integer[];
  places integer[] := array[]::integer[];
  config pglimits.configs;
  renamed pglimits.configs;
  key text;
  amount integer;
  place integer;
  bounded boolean := false;
  missing text[];
  impossible text;
  error text := 'InvalidArgument';
  message text := pglimits._argument_error(
    names, slots, keys, lease_duration, wait, priority, holder, strict, channel);
  request pglimits._request;
begin
  -- Arrays may begin anywhere; slices begin at 1.
  names := names[:];
  slots := slots[:];
  keys := keys[:];
  for i in 1 .. coalesce(cardinality(names), 0) loop
    exit when message is not null;
    key := keys[least(i, cardinality(keys))];
    amount := slots[least(i, cardinality(slots))];
    select c.* into config from pglimits.configs c where c.name = names[i];
    if not found then
      message := pglimits._name_error('name', names[i]);
    end if;
    if lease_id is not null and message is null then
      -- It may have been renamed since this was first asked, and another may have the name by now.
      select c.* into renamed from pglimits.former_names f join pglimits.configs c on c.limit_id = f.limit_id
      where f.name = names[i] and pglimits._is_at(lease_id, f.limit_id)
        and (config.limit_id is null or not pglimits._is_at(lease_id, config.limit_id))
      order by f.limit_id limit 1;
      if found then
        config := renamed;
      end if;
    end if;
    if key <> '' is not false then
      message := coalesce(message, pglimits._name_error('key', key, true));
    end if;
    if amount >= 1 is not true then
      message := coalesce(message, case when amount is null then 'slots must not be null'
                                        else format('slots must be at least 1, not %s', amount) end);
    end if;
    exit when message is not null;

    place := null;
    if config.limit_id is null then
      missing := missing || names[i];
    elsif config.active then
      -- The same limit named twice: the slots add up.
      for p in 1 .. cardinality(part_keys) loop
        if limit_ids[p] = config.limit_id and part_keys[p] = key then
          place := p;
          if part_slots[p]::bigint + amount > 2147483647 then
            message := format('slots must add up to at most 2147483647 for %L', names[i]);
            exit;
          end if;
          part_slots[p] := part_slots[p] + amount;
        end if;
      end loop;
      if place is null then
        limit_ids := limit_ids || config.limit_id;
        part_keys := part_keys || key;
        part_slots := part_slots || amount;
        place := cardinality(part_keys);
      end if;
      bounded := bounded or config.max_waiters is not null;
      if part_slots[place] > config."limit" or for_rate then
        impossible := coalesce(impossible, pglimits._impossible(
          names[i], part_slots[place], config."limit", config.slot_decay_per_second, for_rate));
      end if;
    end if;
    places := places || place;
  end loop;

  if message is not null then
    null;
  elsif strict and missing is not null then
    error := 'LimitNotFound';
    message := format('there is no limit named %s',
      (select string_agg(format('%L', m.name), ', ') from (select distinct u.name from unnest(missing) as u(name)) m));
  elsif impossible is not null then
    error := split_part(impossible, ' ', 1);
    message := substr(impossible, strpos(impossible, ' ') + 1);
  else
    error := null;
  end if;
  request := row(
    coalesce(lease_id, gen_random_uuid()), for_rate, limit_ids, part_keys, part_slots, places,
    case when error is distinct from 'InvalidArgument' then -priority end,
    -- A day has 24 hours, whatever the session's time zone.
    case when error is distinct from 'InvalidArgument'
         then make_interval(secs => extract(epoch from lease_duration)::double precision) end,
    wait, holder, channel, lease_id is not null, bounded, missing, error, message);
  if error is distinct from 'InvalidArgument' and cardinality(part_keys) > 1 then
    request := pglimits._in_lock_order(request);
  end if;
  return request;
end $$;

comment on function pglimits._check_request(
  text[], integer[], text[], interval, interval, integer, jsonb, uuid, boolean, text, boolean) is
  'Checks the arguments of a request and finds its limits. What is wrong is in error and message.';

-- Why a limit could never grant that much: the kind of error, a space, and the message; or null.
create or replace function pglimits._impossible(
  name text, slots integer, most integer, slot_decay_per_second double precision, for_rate boolean)
returns text
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if for_rate and slot_decay_per_second = 0 then
    return format('NoSlotDecay limit %L has no slot_decay_per_second: its slots never come back by themselves', name);
  elsif slots > most and most > 0 then
    return format('SlotsExceedLimit slots must be at most the limit: %L has %s, asked for %s', name, most, slots);
  end if;
  return null;
end $$;

comment on function pglimits._impossible(text, integer, integer, double precision, boolean) is
  'Why a limit could never grant a request (kind of error and message), or null.';

-- Sorts the parts of a request by (limit id, key).
create or replace function pglimits._in_lock_order(request pglimits._request)
returns pglimits._request
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  new_places integer[];
begin
  select array_agg(o.limit_id order by o.now_at), array_agg(o.key order by o.now_at),
         array_agg(o.slots order by o.now_at), array_agg(o.now_at order by o.was_at)
  into request.limit_ids, request.keys, request.slots, new_places
  from (
    select p.*, (row_number() over (order by p.limit_id, p.key collate "C"))::integer as now_at
    from unnest(request.limit_ids, request.keys, request.slots) with ordinality as p(limit_id, key, slots, was_at)
  ) o;
  for i in 1 .. cardinality(request.places) loop
    request.places[i] := new_places[request.places[i]];
  end loop;
  return request;
end $$;

comment on function pglimits._in_lock_order(pglimits._request) is 'Sorts the parts of a request by (limit id, key).';

-- The answer to a request whose id has a lease already: a reply was lost, or the lease was handed over.
create or replace function pglimits._answer_again(request pglimits._request, now timestamptz)
returns pglimits._answer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  answer pglimits._answer;
  lease record;
  part integer;
begin
  if request.for_rate then
    return pglimits._in_use(request);  -- no call of rate_limit gets a lease
  end if;
  answer.status := 'granted';
  answer.lease_id := request.lease_id;
  answer.fences := array_fill(null::bigint, array[cardinality(request.places)]);
  for lease in select l.* from pglimits.leases l where l.lease_id = request.lease_id loop
    part := (
      select p.part
      from unnest(request.limit_ids, request.keys, request.slots) with ordinality as p(limit_id, key, slots, part)
      where p.limit_id = lease.limit_id and p.key = lease.key and p.slots = lease.slots);
    if part is null then
      -- Unless its limit has been deactivated meanwhile, and so is no part of the request any longer.
      if exists (select from pglimits.configs c where c.limit_id = lease.limit_id and c.active) then
        return pglimits._in_use(request);
      end if;
      continue;
    end if;
    answer.fences := pglimits._note_fence(answer.fences, request.places, part, lease.fence);
  end loop;
  -- A part without a lease is one whose limit was not enforced at the time, and so has changed since.
  if exists (
    select from unnest(request.limit_ids, request.keys) as p(limit_id, key)
    join pglimits.configs c on c.limit_id = p.limit_id
    where c.updated_at < lease.acquired_at and not exists (
      select from pglimits.leases l
      where l.lease_id = request.lease_id
        and l.limit_id is not distinct from p.limit_id and l.key is not distinct from p.key))
  then
    return pglimits._in_use(request);
  end if;
  perform pglimits._claim(array[request.lease_id], now);
  answer.expires_at := (select max(l.expires_at) from pglimits.leases l where l.lease_id = request.lease_id);
  return answer;
end $$;

comment on function pglimits._answer_again(pglimits._request, timestamptz) is
  'Answers a repeated request from the lease that it got the first time.';

-- The answer to a request whose id belongs to another one.
create or replace function pglimits._in_use(request pglimits._request)
returns pglimits._answer
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  answer pglimits._answer;
begin
  answer.status := 'error';
  answer.lease_id := request.lease_id;
  answer.error := 'InvalidArgument';
  answer.message := format('lease_id %s is in use for another request', request.lease_id);
  return answer;
end $$;

comment on function pglimits._in_use(pglimits._request) is 'The answer to a request whose id belongs to another one.';

-- Begins the full duration of leases that were handed over.
create or replace function pglimits._claim(lease_ids uuid[], now timestamptz)
returns table (lease_id uuid, limit_id bigint, key text, expires_at timestamptz)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  -- Never waits for a row: whoever has it locked claims it, renews it or ends it right now.
  return query
  update pglimits.leases l
  set claimed = true, expires_at = greatest(l.expires_at, now + l.lease_duration)
  from (
    select u.lease_id, u.limit_id, u.key from pglimits.leases u
    where u.lease_id = any (lease_ids) and not u.claimed and u.expires_at > now for update skip locked
  ) mine
  where l.lease_id = mine.lease_id
    and l.limit_id is not distinct from mine.limit_id and l.key is not distinct from mine.key
  returning l.lease_id, l.limit_id, l.key, l.expires_at;
end $$;

comment on function pglimits._claim(uuid[], timestamptz) is
  'Begins the full duration of leases that were handed over to waiters. Returns those, with their new ends.';

-- What stands in the way of a request, given the states of its parts. Writes nothing: the same rules answer a peek, a
-- refusal without a lock, and a decision under the locks.
-- mine: the request's own place in the queue, if it has one.
create or replace function pglimits._survey(
  request pglimits._request, at integer[], states pglimits.states[], configs pglimits.configs[],
  mine pglimits.queue, now timestamptz)
returns pglimits._findings
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  findings pglimits._findings;
  state pglimits.states;
  config pglimits.configs;
  fits_at timestamptz;
begin
  findings.enforced := 0;
  findings.turn_in := interval '0';
  for p in 1 .. cardinality(at) loop
    config := configs[at[p]];
    continue when config.active is not true;
    state := states[at[p]];
    findings.enforced := findings.enforced + 1;
    if request.slots[p] > config."limit" or request.for_rate then
      findings.impossible := pglimits._impossible(
        config.name, request.slots[p], config."limit", config.slot_decay_per_second, request.for_rate);
      if findings.impossible is not null then
        return findings;
      end if;
    end if;

    if state.waiting > 0 and (
      case when mine.lease_id is null then state.head_rank <= request.rank
           else (state.head_rank, state.head_arrival) < (mine.rank, mine.arrival) end)
    then
      fits_at := 'infinity';
    elsif not request.for_rate and config.slot_decay_per_second = 0
          and state.held::bigint + request.slots[p] <= config."limit" then
      fits_at := '-infinity';
    elsif not request.for_rate then
      fits_at := pglimits._fits_at(state, config, request.slots[p], now);
      if fits_at > '-infinity' and state.held::bigint + request.slots[p] > config."limit" then
        -- When the lease that ends first is not renewed; so it is worth a look, but no promise.
        findings.looks_at := coalesce(findings.looks_at, fits_at);
        fits_at := 'infinity';
      end if;
    elsif config."limit" = 0 then
      fits_at := 'infinity';
    else
      fits_at := '-infinity';
    end if;

    if fits_at > '-infinity' then
      findings.blocked_at := coalesce(findings.blocked_at, at[p]);
      findings.looks_at := coalesce(findings.looks_at, fits_at);
      findings.fits_at := greatest(findings.fits_at, fits_at);
    end if;
  end loop;
  if request.for_rate and findings.blocked_at is null then
    findings.turn_in := pglimits._common_turn(request, at, states, configs, now);
  end if;
  if findings.blocked_at is null and findings.turn_in > coalesce(request.wait, findings.turn_in) then
    findings.fits_at := now + findings.turn_in;
  end if;
  return findings;
end $$;

comment on function pglimits._survey(
  pglimits._request, integer[], pglimits.states[], pglimits.configs[], pglimits.queue, timestamptz) is
  'What stands in the way of a request. See the type pglimits._findings.';

-- How often each of some limits has been changed. Null for one that was deleted.
create or replace function pglimits._changes(limit_ids bigint[])
returns integer[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select (select c.changes from pglimits.configs c where c.limit_id = u.limit_id)
    from unnest(limit_ids) with ordinality as u(limit_id, nth) order by u.nth);
end $$;

comment on function pglimits._changes(bigint[]) is
  'How often each of some limits has been changed; null for one that was deleted.';

-- Puts a request in line. One that named more limits than this tries again for itself when it can go: what is not enforced
-- now may be by then. So does one for a turn that cannot be told of it: what it did not hear of in time would have decayed.
create or replace function pglimits._enqueue(
  state pglimits.states, request pglimits._request, slots integer, mine pglimits.queue, looks_at timestamptz,
  now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  arrival timestamptz := mine.arrival;
  several boolean := cardinality(request.slots) > 1 or array_position(request.places, null) is not null
                     or request.for_rate and request.channel is null;
begin
  arrival := coalesce(arrival, greatest(now, state.last_arrival + interval '1 microsecond'));
  state.last_arrival := greatest(state.last_arrival, arrival);
  insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, for_rate, several, limit_ids, keys, seen,
                              in_vain, lease_duration, holder, channel, expires_at, looks_at)
  values (request.lease_id, state.limit_id, state.key, slots, request.rank, arrival, request.for_rate, several,
          case when several then request.limit_ids end, case when several then request.keys end,
          case when several then pglimits._changes(request.limit_ids) end,
          coalesce(mine.in_vain + mine.called::integer, 0), request.lease_duration,
          request.holder, request.channel, now + pglimits._liveness(), looks_at);
  return pglimits._lengthen(state, 1, request.rank, arrival, now + pglimits._liveness());
end $$;

comment on function pglimits._enqueue(
  pglimits.states, pglimits._request, integer, pglimits.queue, timestamptz, timestamptz) is
  'Puts a request in line: where it arrived if it has a place (mine) already, or behind everybody of its priority.';

-- Notes that so many more stand in line, the first of them at that place, none of whom dies before a moment.
create or replace function pglimits._lengthen(
  state pglimits.states, waiters bigint, rank integer, arrival timestamptz, dies_at timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if state.waiting = 0 or (rank, arrival) < (state.head_rank, state.head_arrival) then
    state.head_rank := rank;
    state.head_arrival := arrival;
  end if;
  state.next_waiter_death := least(case when state.waiting > 0 then state.next_waiter_death end, dies_at);
  state.waiting := state.waiting + waiters;
  return state;
end $$;

comment on function pglimits._lengthen(pglimits.states, bigint, integer, timestamptz, timestamptz) is
  'Returns a state with so many more in line, the first of them at a place (rank, arrival).';

-- Takes those out of the line who have died, wherever they stand in it. One whose row is locked is calling in, or being
-- removed right now.
create or replace function pglimits._bury_waiters(state pglimits.states, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  buried integer;
begin
  with dead as (
    select q.lease_id from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn is null
      and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival) and q.expires_at <= now
    for update skip locked
  )
  delete from pglimits.queue q using dead d
  where q.lease_id = d.lease_id
    and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  get diagnostics buried = row_count;
  state.waiting := state.waiting - buried;
  state.next_waiter_death := coalesce((
    select min(q.expires_at) from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn is null
      and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)), 'infinity');
  return state;
end $$;

comment on function pglimits._bury_waiters(pglimits.states, timestamptz) is
  'Takes dead waiters out of the line, and notes when the next of them can die.';

-- Until when a request that was called, and found another of its limits taken, keeps its place where it was called: nobody
-- goes before it there, so that it has this one when the other comes free. Else, where all its limits are always busy, it
-- would never find them free at the same moment. From the third time on that it is called in vain, at first for a moment, each
-- time for twice as long, and never for longer than it has waited: so the faster of its limits is the one that it soon finds
-- free while it keeps the other, and neither stands still for much longer than that takes. Null: it keeps none, as others are
-- first to have what it still needs, or nobody is.
create or replace function pglimits._keeps_until(
  mine pglimits.queue, needed pglimits.states, config pglimits.configs, now timestamptz)
returns timestamptz
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if config."limit" = 0 or needed.waiting > 0 and (needed.head_rank, needed.head_arrival) < (mine.rank, mine.arrival) then
    return null;
  elsif mine.called and mine.in_vain >= 2 then
    return now + least(now - mine.arrival, interval '100 milliseconds' * 2 ^ least(mine.in_vain - 2, 30));
  end if;
  return now;
end $$;

comment on function pglimits._keeps_until(pglimits.queue, pglimits.states, pglimits.configs, timestamptz) is
  'Until when a request over several limits keeps the place where it was called in vain; now: only those that it keeps '
  'already; null: none.';

-- The next moment at which a request gives up one of the places that it keeps.
create or replace function pglimits._kept_until(lease_id uuid, now timestamptz)
returns timestamptz
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (select min(q.kept_until) from pglimits.queue q where q.lease_id = _kept_until.lease_id and q.kept_until > now);
end $$;

comment on function pglimits._kept_until(uuid, timestamptz) is
  'When a request next gives up one of the places that it keeps; null: it keeps none.';

-- Takes a request out of the line, unless it keeps its place there: until the given moment if it was called there, or for as
-- long as it was going to if it keeps it already. Null: it keeps none.
create or replace function pglimits._leave(
  state pglimits.states, lease_id uuid, keep_until timestamptz, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  lives_until timestamptz;
begin
  if keep_until is not null then
    update pglimits.queue q
    set kept_until = coalesce(q.kept_until, keep_until), called = false,
        expires_at = least(now + pglimits._liveness(), coalesce(q.kept_until, keep_until))
    where q.lease_id = _leave.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
      and (q.called and keep_until > now or q.kept_until > now)
    returning q.expires_at into lives_until;
    if found then
      state.next_look := least(state.next_look, lives_until);
      state.next_waiter_death := least(state.next_waiter_death, lives_until);
      return state;
    end if;
  end if;
  delete from pglimits.queue q
  where q.lease_id = _leave.lease_id
    and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  if found then
    state.waiting := state.waiting - 1;
  end if;
  return state;
end $$;

comment on function pglimits._leave(pglimits.states, uuid, timestamptz, timestamptz) is
  'Takes a waiting request out of the queue of a (limit, key), or has it keep its place there.';

-- Why one more may not wait on a (limit, key), or null.
-- Stable, so that it counts in the snapshot of who asks.
create or replace function pglimits._queue_full(state pglimits.states, config pglimits.configs, now timestamptz)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if config.max_waiters <= (
    select count(*) from (
      select from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.expires_at > now
        and (q.turn is null and q.kept_until is null and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)
             or q.turn > pglimits._decayed(config, now) and not q.added)
      limit config.max_waiters) live)
  then
    return format('%s requests wait for %L already, and that is its max_waiters', config.max_waiters, config.name);
  end if;
  return null;
end $$;

comment on function pglimits._queue_full(pglimits.states, pglimits.configs, timestamptz) is
  'Why one more request may not wait (in line or for its turn) on a (limit, key), or null.';

-- Why a request that has to wait may not, or null.
-- full_at: for each state, why one more may not wait there.
create or replace function pglimits._may_not_wait(findings pglimits._findings, full_at text[])
returns text
language sql
immutable
return case
  when findings.blocked_at is not null then full_at[findings.blocked_at]
  when findings.turn_in > interval '0' then (select u.problem from unnest(full_at) as u(problem) where u.problem is not null limit 1)
end;

comment on function pglimits._may_not_wait(pglimits._findings, text[]) is
  'Why a request that has to wait, in line or for its turn, may not: the queue is full; or null.';

-- The (limit, key)s that a batch touches, in the order in which they are locked.
create or replace function pglimits._gather(requests pglimits._request[])
returns pglimits._places
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  places pglimits._places;
begin
  if cardinality(requests) = 1 then
    places.limit_ids := (requests[1]).limit_ids;
    places.keys := (requests[1]).keys;
  else
    select array_agg(p.limit_id order by p.limit_id, p.key collate "C"),
           array_agg(p.key order by p.limit_id, p.key collate "C")
    into places.limit_ids, places.keys
    from (select distinct u.limit_id, u.key
          from unnest(requests) r, unnest(r.limit_ids, r.keys) as u(limit_id, key)) p;
  end if;
  for i in 1 .. coalesce(cardinality(places.keys), 0) loop
    places.labels[i] := places.limit_ids[i] || ' ' || places.keys[i];
  end loop;
  return places;
end $$;

comment on function pglimits._gather(pglimits._request[]) is
  'The (limit, key)s that a batch touches, in the order in which they are locked.';

-- Where in a batch the parts of a request are.
create or replace function pglimits._locate(request pglimits._request, places pglimits._places)
returns integer[]
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  at integer[] := array[]::integer[];
begin
  for p in 1 .. cardinality(request.keys) loop
    at[p] := array_position(places.labels, request.limit_ids[p] || ' ' || request.keys[p]);
  end loop;
  return at;
end $$;

comment on function pglimits._locate(pglimits._request, pglimits._places) is
  'Where in a batch the parts of a request are.';

-- Locks the states of a batch, in their order.
create or replace function pglimits._lock_all(places pglimits._places)
returns pglimits.states[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  states pglimits.states[];
begin
  for i in 1 .. coalesce(cardinality(places.keys), 0) loop
    states[i] := pglimits._lock(places.limit_ids[i], places.keys[i],
                                i > 1 and (states[i - 1]).limit_id is not distinct from places.limit_ids[i]);
  end loop;
  return states;
end $$;

comment on function pglimits._lock_all(pglimits._places) is 'Locks the states of a batch, in their order.';

-- Notes the fence of a part for every name that it stands for.
create or replace function pglimits._note_fence(fences bigint[], places integer[], part integer, fence bigint)
returns bigint[]
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  for n in 1 .. cardinality(places) loop
    if places[n] = part then
      fences[n] := fence;
    end if;
  end loop;
  return fences;
end $$;

comment on function pglimits._note_fence(bigint[], integer[], integer, bigint) is
  'Notes the fence of a part for every name that it stands for.';

-- How long until the turn of a sleeper, on the slowest of its limits.
create or replace function pglimits._turn_in(lease_id uuid, now timestamptz)
returns interval
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (select max(case when q.turn is not null then pglimits._until(c, q.turn, now) end)
          from pglimits.queue q join pglimits.configs c on c.limit_id = q.limit_id
          where q.lease_id = _turn_in.lease_id);
end $$;

comment on function pglimits._turn_in(uuid, timestamptz) is 'How long a sleeper has until its turn comes.';

-- Takes what a request is granted: slots under a lease, or turns on rate limits. arrival: when it arrived, if it has stood in
-- line.
create or replace function pglimits._take(
  request pglimits._request, at integer[], states pglimits.states[], configs pglimits.configs[],
  findings pglimits._findings, arrival timestamptz, now timestamptz)
returns pglimits._decision
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  answer pglimits._answer;
begin
  answer.status := 'granted';
  answer.lease_id := request.lease_id;
  if request.for_rate then
    answer.wait := findings.turn_in;
  else
    answer.expires_at := now + request.lease_duration;
    answer.fences := array_fill(null::bigint, array[cardinality(request.places)]);
  end if;
  for p in 1 .. cardinality(at) loop
    continue when (configs[at[p]]).active is not true;
    if request.for_rate then
      states[at[p]] := pglimits._take_turn(states[at[p]], configs[at[p]], request, request.slots[p],
                                           findings.turn_in, findings.enforced > 1, arrival, now);
    else
      states[at[p]] := pglimits._take_slots(
        states[at[p]], configs[at[p]], request.lease_id, request.slots[p], request.rank, request.lease_duration,
        request.holder, true, findings.enforced, answer.expires_at, now);
      if cardinality(request.places) = 1 then
        answer.fences := array[(states[at[p]]).version];
      else
        answer.fences := pglimits._note_fence(answer.fences, request.places, p, (states[at[p]]).version);
      end if;
    end if;
  end loop;
  return row(answer, states)::pglimits._decision;
end $$;

comment on function pglimits._take(
  pglimits._request, integer[], pglimits.states[], pglimits.configs[], pglimits._findings, timestamptz, timestamptz) is
  'Takes what a request is granted, on all its limits.';

-- Decides one request under the locks of its states: grants, books, queues or refuses it.
create or replace function pglimits._decide(
  request pglimits._request, at integer[], states pglimits.states[], configs pglimits.configs[],
  mine pglimits.queue, at_mine integer, now timestamptz)
returns pglimits._decision
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  findings pglimits._findings := pglimits._survey(request, at, states, configs, mine, now);
  may_wait boolean := findings.blocked_at is not null and coalesce(request.wait > interval '0', true);
  answer pglimits._answer;
  keep_until timestamptz;
  full_at text[];
begin
  answer.lease_id := request.lease_id;
  if request.error = 'LimitNotFound' then
    findings.impossible := request.error || ' ' || request.message;
  end if;
  -- Its old place in line goes; if it has to wait on, it comes back at its old time of arrival.
  if at_mine is not null and mine.turn is null and findings.impossible is null then
    if may_wait then
      keep_until := pglimits._keeps_until(mine, states[findings.blocked_at], configs[findings.blocked_at], now);
    end if;
    for p in 1 .. cardinality(at) loop
      states[at[p]] := pglimits._leave(
        states[at[p]], request.lease_id, case when at[p] <> findings.blocked_at then keep_until end, now);
    end loop;
  end if;
  if mine.lease_id is null and request.bounded
     and (may_wait or findings.fits_at is null and findings.turn_in > interval '0')
  then
    for p in 1 .. cardinality(at) loop
      full_at[at[p]] := pglimits._queue_full(states[at[p]], configs[at[p]], now);
    end loop;
    findings.queue_full := pglimits._may_not_wait(findings, full_at);
  end if;

  if mine.turn is not null then
    -- A turn was taken the first time that this was asked.
    answer.status := 'granted';
    answer.wait := pglimits._turn_in(mine.lease_id, now);
  elsif findings.impossible is not null then
    answer.status := 'error';
    answer.error := split_part(findings.impossible, ' ', 1);
    answer.message := substr(findings.impossible, strpos(findings.impossible, ' ') + 1);
  elsif findings.enforced = 0 then
    answer.status := 'unlimited';
  elsif findings.queue_full is not null then
    answer.status := 'error';
    answer.error := 'QueueFull';
    answer.message := findings.queue_full;
  elsif findings.fits_at is null then
    return pglimits._take(request, at, states, configs, findings, mine.arrival, now);
  elsif may_wait then
    findings.looks_at := least(
      findings.looks_at, now + pglimits._liveness() * 0.3,
      case when keep_until is not null then pglimits._kept_until(request.lease_id, now) end);
    answer.status := 'queued';
    answer.retry_after := greatest(findings.looks_at - now, interval '0');
    states[findings.blocked_at] := pglimits._enqueue(
      states[findings.blocked_at], request, request.slots[array_position(at, findings.blocked_at)], mine,
      findings.looks_at, now);
  else
    answer.status := 'refused';
    answer.retry_after := case when findings.fits_at < 'infinity' then findings.fits_at - now end;
  end if;
  return row(answer, states)::pglimits._decision;
end $$;

comment on function pglimits._decide(
  pglimits._request, integer[], pglimits.states[], pglimits.configs[], pglimits.queue, integer, timestamptz) is
  'Decides one request under the locks of its states. mine, at_mine: its place in a queue, and in which state that is.';

-- Serves what a batch asks of single limits, as far as it comes in runs: on each (limit, key) the first requests that fit
-- together are granted, and if all behind them have to wait, they are put in line; all that with one statement, instead
-- of one for each. What it leaves, _decide decides: its answer is null. The rules are those of _survey.
create or replace function pglimits._serve_runs(
  requests pglimits._request[], states pglimits.states[], configs pglimits.configs[], repeated uuid[],
  now timestamptz)
returns pglimits._served
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  served pglimits._served;
  run record;
  state pglimits.states;
  config pglimits.configs;
  -- For each (limit, key): how many slots fit (null: no runs here), and the places in line behind which a run goes.
  rooms bigint[];
  versions bigint[];
  arrivals timestamptz[];
  ranks integer[];
  most integer[];
begin
  served.states := states;
  for i in 1 .. coalesce(cardinality(states), 0) loop
    state := states[i];
    config := configs[i];
    versions[i] := state.version;
    arrivals[i] := greatest(now, state.last_arrival + interval '1 microsecond');
    ranks[i] := case when state.waiting > 0 then state.head_rank end;
    most[i] := case when state.waiting > 0 or config.slot_decay_per_second = 0 then config."limit" else 0 end;
    rooms[i] := case
      when config.active is not true or state.pinned > 0 then null
      when state.waiting > 0 then 0
      when config.slot_decay_per_second = 0 then config."limit"::bigint - state.held
      else least(config."limit"::bigint - state.held,
                 floor(config."limit" - greatest(state.booked - pglimits._decayed(config, now), 0))) end;
  end loop;

  for run in
    with asked as (
      select u.ordinal, u.lease_id, u.limit_ids[1] as limit_id, u.keys[1] as key, u.slots[1] as slots, u.rank,
             u.lease_duration, u.holder, u.channel,
             dense_rank() over (order by u.limit_ids[1], u.keys[1] collate "C") as place,
             not u.for_rate and cardinality(u.places) = 1 and u.lease_id <> all (repeated) and u.error is null as plain,
             coalesce(u.wait > interval '0', true) and not u.bounded as may_wait
      from unnest(requests) with ordinality as u(
        lease_id, for_rate, limit_ids, keys, slots, places, rank, lease_duration, wait, holder, channel, chosen,
        bounded, missing, error, message, ordinal)
      where cardinality(u.slots) = 1
    ), summed as (
      select a.*, row_number() over run_of as nth,
             coalesce(bool_and(a.plain) over run_of and sum(a.slots) over run_of <= rooms[a.place], false) as fits
      from asked a
      window run_of as (partition by a.place order by a.ordinal)
    ), behind as (
      select s.*, row_number() over here as nth_behind,
             bool_and(s.plain and s.may_wait and s.slots <= most[s.place]) over all_here
             and min(s.rank) over all_here >= coalesce(ranks[s.place], first_value(s.rank) over here) as all_wait
      from summed s where not s.fits and rooms[s.place] is not null
      window all_here as (partition by s.place), here as (partition by s.place order by s.ordinal)
    ), leased as (
      insert into pglimits.leases (lease_id, limit_id, key, slots, holder, fence, priority, lease_duration, claimed,
                                   parts, acquired_at, expires_at)
      select s.lease_id, s.limit_id, s.key, s.slots, s.holder, versions[s.place] + s.nth, -s.rank, s.lease_duration,
             true, 1, now, now + s.lease_duration
      from summed s where s.fits
    ), queued as (
      insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, for_rate, several, lease_duration,
                                  holder, channel, expires_at, looks_at)
      select b.lease_id, b.limit_id, b.key, b.slots, b.rank,
             arrivals[b.place] + (b.nth_behind - 1) * interval '1 microsecond', false, false, b.lease_duration,
             b.holder, b.channel, now + pglimits._liveness(), now + pglimits._liveness() * 0.3
      from behind b where b.all_wait
    )
    select s.place, true as granted, count(*) as requests, sum(s.slots) as slots, min(s.lease_duration) as shortest,
           null::integer as first_rank, array_agg(s.ordinal) as ordinals,
           array_agg(row('granted', s.lease_id, array[versions[s.place] + s.nth], now + s.lease_duration, null, null,
                         null, null)::pglimits._answer) as answers
    from summed s where s.fits group by s.place
    union all
    select b.place, false, count(*), null, null, min(b.rank), array_agg(b.ordinal),
           array_agg(row('queued', b.lease_id, null, null, pglimits._liveness() * 0.3, null, null,
                         null)::pglimits._answer)
    from behind b where b.all_wait group by b.place
  loop
    state := served.states[run.place];
    if run.granted then
      config := configs[run.place];
      state.version := state.version + run.requests;
      state.held := state.held + run.slots;
      state.next_expiry := least(state.next_expiry, now + run.shortest);
      if config.slot_decay_per_second > 0 then
        state.booked := greatest(state.booked, pglimits._decayed(config, now)) + run.slots;
      end if;
    else
      state := pglimits._lengthen(
        state, run.requests, run.first_rank, arrivals[run.place], now + pglimits._liveness());
      state.last_arrival := arrivals[run.place] + (run.requests - 1) * interval '1 microsecond';
    end if;
    served.states[run.place] := state;
    for i in 1 .. cardinality(run.ordinals) loop
      served.answers[run.ordinals[i]] := run.answers[i];
    end loop;
  end loop;
  return served;
end $$;

comment on function pglimits._serve_runs(
  pglimits._request[], pglimits.states[], pglimits.configs[], uuid[], timestamptz) is
  'Grants, and puts in line, what a batch asks of single limits in runs. Null answers are left to be decided one by one.';

-- Serves requests in their order, all in one transaction: locks every state that they touch, in the order of
-- (limit id, key), reads the clock, decides one after the other, and writes every state once. Null, with nothing done but the
-- locks taken: one of their limits was deleted meanwhile, and another may have its name by now. Check them again.
create or replace function pglimits._serve(requests pglimits._request[])
returns pglimits._answer[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  places pglimits._places := pglimits._gather(requests);
  here integer := coalesce(cardinality(places.keys), 0);
  states pglimits.states[] := case when here = 1 then array[pglimits._lock(places.limit_ids[1], places.keys[1])]
                                   else pglimits._lock_all(places) end;
  was pglimits.states[] := states;
  -- Under the locks: whoever changes a limit waits for us, or we see what it changed.
  now timestamptz := pglimits._now();
  configs pglimits.configs[];
  config pglimits.configs;
  chosen uuid[];
  leased uuid[];
  ended bigint;
  queued uuid[];
  request pglimits._request;
  mine pglimits.queue;
  decision pglimits._decision;
  served pglimits._served;
  answers pglimits._answer[];
  at integer[];
  at_mine integer;
  head_id uuid;
begin
  for i in 1 .. here loop
    if (states[i]).limit_id is null then
      return null;
    end if;
  end loop;
  for i in 1 .. here loop
    select c.* into config from pglimits.configs c where c.limit_id = places.limit_ids[i];
    configs[i] := config;
    if config.active and (now >= least((states[i]).next_expiry, (states[i]).next_look) or (states[i]).pinned > 0) then
      states[i] := pglimits._settle(states[i], config, now);
    end if;
  end loop;

  if cardinality(requests) > 1 then
    select array_agg(r.lease_id) into chosen from unnest(requests) r where r.chosen;
  elsif (requests[1]).chosen then
    chosen := array[(requests[1]).lease_id];
  end if;
  if chosen is not null then
    select array_agg(l.lease_id) filter (where l.expires_at > now), count(*) filter (where l.expires_at <= now)
    into leased, ended from pglimits.leases l where l.lease_id = any (chosen);
    if ended > 0 then
      -- Somebody renews or releases it right now: only then is known what becomes of it.
      perform from pglimits.leases l where l.lease_id = any (chosen) and l.expires_at <= now
      order by l.limit_id, l.key, l.lease_id for update;
      for i in 1 .. here loop
        states[i] := pglimits._take_expired(states[i], now);
      end loop;
      select array_agg(l.lease_id) into leased from pglimits.leases l
      where l.lease_id = any (chosen) and l.expires_at > now;
    end if;
    select array_agg(q.lease_id) into queued from pglimits.queue q where q.lease_id = any (chosen);
  end if;

  if cardinality(requests) > 1 then
    if not exists (select from unnest(requests) r where cardinality(r.slots) > 1) then
      served := pglimits._serve_runs(
        requests, states, configs, coalesce(leased, '{}') || coalesce(queued, '{}'), now);
      states := served.states;
      answers := served.answers;
    end if;
  end if;

  for i in 1 .. cardinality(requests) loop
    continue when (answers[i]).status is not null;
    request := requests[i];
    if request.lease_id = any (leased) then
      answers[i] := pglimits._answer_again(request, now);
      continue;
    end if;
    mine := null;
    if request.lease_id = any (queued) then
      select q.* into mine from pglimits.queue q where q.lease_id = request.lease_id
      order by q.turn nulls last, q.kept_until nulls first limit 1;
    end if;
    at := case when here = 1 and cardinality(request.keys) = 1 then array[1]
               else pglimits._locate(request, places) end;
    at_mine := case when mine.lease_id is not null
                    then array_position(places.labels, mine.limit_id || ' ' || mine.key) end;
    if mine.lease_id is not null
       and (mine.for_rate, mine.slots) is distinct from (request.for_rate, request.slots[array_position(at, at_mine)])
    then
      answers[i] := pglimits._in_use(request);
      continue;
    end if;
    decision := pglimits._decide(request, at, states, configs, mine, at_mine, now);
    states := decision.states;
    answers[i] := decision.answer;
  end loop;

  for i in 1 .. here loop
    if (states[i]).waiting > 0 and states[i] is distinct from was[i] and (configs[i]).active then
      states[i] := pglimits._advance(states[i], configs[i], now);
    end if;
    perform pglimits._save(states[i], was[i], now);
    if served.answers is not null and (states[i]).waiting > 0 and (states[i]).next_look < now + pglimits._liveness() * 0.3 then
      -- Who was put in line at its head hears when time alone may let it go on.
      head_id := (
        select q.lease_id from pglimits.queue q
        where q.limit_id = (states[i]).limit_id and q.key = (states[i]).key and q.turn is null
          and q.rank = (states[i]).head_rank and q.arrival = (states[i]).head_arrival limit 1);
      for n in 1 .. cardinality(requests) loop
        if (served.answers[n]).status = 'queued' and (requests[n]).lease_id = head_id then
          answers[n].retry_after := greatest((states[i]).next_look - now, interval '0');
        end if;
      end loop;
    end if;
  end loop;
  return answers;
end $$;

comment on function pglimits._serve(pglimits._request[]) is
  'Serves a batch of checked requests in one transaction, in their order; one answer for each. Null: check them again.';
-- The short ways: what most calls ask for, decided and written in one go. Each is a special case of what _serve and
-- _release_at do, takes half of their time or less, and leaves everything that is not so simple to them, by returning null
-- with nothing done but the lock taken.
--
-- First the state is locked; what is read afterwards is what was committed until then.

-- Requests that are all alike, on one concurrency limit where nothing is due: there is room for all and nobody waits, or
-- there is room for none and they may not wait either. The answer is that to the first; each of the others has the next fence.
-- chosen: the callers gave the ids, so this may be a repetition. holders: an array of one for each, or null.
create or replace function pglimits._take_alike(
  name text, slots integer, key text, lease_duration interval, wait interval, priority integer, holders jsonb,
  lease_ids uuid[], chosen boolean, strict boolean, channel text)
returns pglimits._answer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  wanted constant bigint := slots::bigint * cardinality(lease_ids);
  state record;
  now timestamptz;
  ends timestamptz;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if (slots >= 1 and current_setting('transaction_isolation') = 'read committed') is not true
     or pglimits._argument_fault(lease_duration, wait, priority, holders -> 0, strict, channel) is not null
  then
    return null;
  end if;
  if cardinality(lease_ids) > 1 then
    if pglimits._not_each_its_own(lease_ids, holders) then
      return null;
    end if;
  end if;
  if wait = interval '0' then
    -- They may be refused, and that takes no lock. The clock is read after the snapshot was taken.
    select s.held + wanted <= c."limit" and s.waiting = 0 as fit,
           s.held::bigint + slots > c."limit" and (slots <= c."limit" or c."limit" = 0)
             and s.next_look > pglimits._now()
             and (s.next_expiry > pglimits._now() or not exists (  -- it was renewed
               select from pglimits.leases l
               where l.limit_id = c.limit_id and l.key = _take_alike.key
                 and l.expires_at >= s.next_expiry and l.expires_at <= (select pglimits._now())))
             and not (chosen and pglimits._are_known(lease_ids)) as are_refused
    into state from pglimits.configs c
    cross join lateral (
      select x.held, x.waiting, x.next_expiry, x.next_look from pglimits.states x
      where x.limit_id = c.limit_id and x.key = _take_alike.key order by x.version desc limit 1) s
    where c.name = _take_alike.name and c.active and c.slot_decay_per_second = 0;
    if state.are_refused then
      return row('refused', null, null, null, null, null, null, null)::pglimits._answer;
    elsif state.fit is not true then
      return null;
    end if;
  end if;

  select s.* into state from pglimits.configs c
  cross join lateral (
    select x.limit_id, x.version, x.held, x.waiting, x.next_expiry, x.next_look from pglimits.states x
    where x.limit_id = c.limit_id and x.key = _take_alike.key order by x.version desc limit 1 for update) s
  where c.name = _take_alike.name and c.active and c.slot_decay_per_second = 0 and c.max_waiters is null;
  now := pglimits._now();
  if (state.waiting = 0 and now < state.next_expiry and now < state.next_look) is not true then
    return null;
  end if;
  ends := now + make_interval(secs => extract(epoch from lease_duration)::double precision);
  update pglimits.states s
  set version = s.version + cardinality(lease_ids), held = s.held + wanted, next_expiry = least(s.next_expiry, ends),
      changed_at = now
  from pglimits.configs c
  where s.limit_id = state.limit_id and s.key = _take_alike.key and s.version = state.version
    and c.limit_id = state.limit_id and c.active and c.slot_decay_per_second = 0
    and state.held + wanted <= c."limit"
    and (not chosen
         or not exists (select from pglimits.leases l where l.lease_id = any (lease_ids))
            and not exists (select from pglimits.queue q where q.lease_id = any (lease_ids)));
  if not found then
    return null;
  end if;
  insert into pglimits.leases (lease_id, limit_id, key, slots, holder, fence, priority, lease_duration, claimed,
                               parts, acquired_at, expires_at)
  select asked.lease_id, state.limit_id, _take_alike.key, _take_alike.slots,
         nullif(holders -> (asked.nth - 1)::integer, 'null'), state.version + asked.nth, _take_alike.priority,
         ends - now, true, 1, now, ends
  from unnest(lease_ids) with ordinality as asked(lease_id, nth);
  return row('granted', lease_ids[1], array[state.version + 1], ends, null, null, null, null)::pglimits._answer;
end $$;

comment on function pglimits._take_alike(
  text, integer, text, interval, interval, integer, jsonb, uuid[], boolean, boolean, text) is
  'Grants requests that are alike if nothing is in the way, or refuses them; null if it is not so simple.';

-- Calls of rate_limit that are all alike, on one limit where nobody is in line: each has a turn, now or ahead, and none comes
-- after wait; or already the first would. waits: how long until their turns, in seconds.
create or replace function pglimits._turns_alike(
  name text, slots integer, key text, wait interval, holders jsonb, lease_ids uuid[], chosen boolean, strict boolean,
  channel text, out status text, out waits double precision[], out retry_after interval)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  wanted constant numeric := slots::bigint * cardinality(lease_ids);
  alive_for constant interval := case when channel is not null then pglimits._liveness() end;
  state record;
  config pglimits.configs;
  now timestamptz;
  decayed numeric;
  base numeric;
  first_in interval;
  last_in interval;
  noted boolean;
  arrival timestamptz;
  forget numeric;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if (slots >= 1 and current_setting('transaction_isolation') = 'read committed') is not true
     or pglimits._argument_fault('1 second', wait, 0, holders -> 0, strict, channel) is not null
  then
    return;
  end if;
  if cardinality(lease_ids) > 1 then
    if pglimits._not_each_its_own(lease_ids, holders) then
      return;
    end if;
  end if;
  if wait is not null then
    -- They may be refused, and that takes no lock. The clock is read after the snapshot was taken.
    select c as config, s.booked, s.next_expiry, s.next_look into state
    from pglimits.configs c
    cross join lateral (
      select x.booked, x.waiting, x.pinned, x.next_expiry, x.next_look from pglimits.states x
      where x.limit_id = c.limit_id and x.key = _turns_alike.key order by x.version desc limit 1) s
    where c.name = _turns_alike.name and c.active and c.slot_decay_per_second > 0 and slots <= c."limit"
      and s.waiting = 0 and s.pinned = 0;
    now := pglimits._now();
    if now < state.next_expiry and now < state.next_look then
      config := state.config;
      first_in := pglimits._until(
        config, greatest(state.booked, pglimits._decayed(config, now)) + slots - config."limit", now);
    end if;
    if first_in > wait then
      if chosen and pglimits._are_known(lease_ids) then
        return;
      end if;
      status := 'refused';
      retry_after := first_in;
      return;
    end if;
  end if;

  select s.* into state from pglimits.configs c
  cross join lateral (
    select x.limit_id, x.version, x.booked, x.waiting, x.pinned, x.last_arrival, x.passed, x.next_expiry, x.next_look
    from pglimits.states x
    where x.limit_id = c.limit_id and x.key = _turns_alike.key order by x.version desc limit 1 for update) s
  where c.name = _turns_alike.name and c.active and c.slot_decay_per_second > 0 and c.max_waiters is null;
  now := pglimits._now();
  if (state.waiting = 0 and state.pinned = 0 and now < state.next_expiry and now < state.next_look) is not true then
    return;
  end if;
  select c.* into config from pglimits.configs c
  where c.limit_id = state.limit_id and c.active and c.slot_decay_per_second > 0 and slots <= c."limit"
    and c.max_waiters is null
    and (not chosen
         or not exists (select from pglimits.leases l where l.lease_id = any (lease_ids))
            and not exists (select from pglimits.queue q where q.lease_id = any (lease_ids)));
  if not found then
    return;
  end if;
  decayed := pglimits._decayed(config, now);
  base := greatest(state.booked, decayed);
  last_in := pglimits._until(config, base + wanted - config."limit", now);
  if last_in > wait then
    return;
  end if;
  noted := chosen or last_in > interval '0';
  forget := case when noted then pglimits._forgotten(config, now) end;
  arrival := greatest(now, state.last_arrival + interval '1 microsecond');
  update pglimits.states s
  set version = s.version + 1, booked = base + wanted, passed = greatest(s.passed, forget), changed_at = now,
      last_arrival = case when noted then arrival + (cardinality(lease_ids) - 1) * interval '1 microsecond'
                          else s.last_arrival end,
      next_death = case when last_in > interval '0' then least(s.next_death, now + alive_for) else s.next_death end,
      next_look = case when last_in > interval '0' then least(s.next_look, now + alive_for) else s.next_look end
  where s.limit_id = state.limit_id and s.key = _turns_alike.key and s.version = state.version;
  status := 'granted';
  if not noted then
    waits := array_fill(0::double precision, array[cardinality(lease_ids)]);
    return;
  end if;
  -- Turns that have passed stay a while, for those who ask again because they did not hear of theirs.
  delete from pglimits.queue q
  where q.limit_id = state.limit_id and q.key = _turns_alike.key and q.turn > state.passed and q.turn <= forget
    and not q.pinned;
  with turns as (
    select asked.lease_id, asked.nth, greatest(base + slots * asked.nth - config."limit", decayed) as turn,
           pglimits._until(config, base + slots * asked.nth - config."limit", now) as turn_in
    from unnest(lease_ids) with ordinality as asked(lease_id, nth)
  ), booked as (
    insert into pglimits.queue (lease_id, limit_id, key, slots, rank, arrival, turn, for_rate, several, lease_duration,
                                holder, channel, expires_at, looks_at)
    select t.lease_id, state.limit_id, _turns_alike.key, slots, 0,
           arrival + (t.nth - 1) * interval '1 microsecond', t.turn, true, false, interval '5 minutes',
           nullif(holders -> (t.nth - 1)::integer, 'null'), channel, coalesce(now + alive_for, 'infinity'),
           now + t.turn_in
    from turns t
  )
  select array_agg(extract(epoch from t.turn_in)::double precision order by t.nth) into waits from turns t;
end $$;

comment on function pglimits._turns_alike(
  text, integer, text, interval, jsonb, uuid[], boolean, boolean, text) is
  'Gives turns on a rate limit to calls that are alike, or refuses them; its status is null if it is not so simple.';

-- Whether requests that are to be alike but for ids and holders give the same id twice, or too long a holder.
create or replace function pglimits._not_each_its_own(lease_ids uuid[], holders jsonb)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from jsonb_array_elements(holders) as h(holder) where length(h.holder::text) > 8000)
      or (select count(distinct u.id) < count(*) from unnest(lease_ids) as u(id));
end $$;

comment on function pglimits._not_each_its_own(uuid[], jsonb) is
  'Whether some of several ids are the same, or some of their holders too long.';

-- Whether a live lease, or a waiter, has one of these ids: what is wrong with a request now, or in its way, is then no answer to it.
create or replace function pglimits._are_known(lease_ids uuid[])
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from pglimits.leases l where l.lease_id = any (lease_ids) and l.expires_at > pglimits._now())
      or exists (select from pglimits.queue q where q.lease_id = any (lease_ids));
end $$;

comment on function pglimits._are_known(uuid[]) is 'Whether a live lease, or a waiter, has one of these ids.';

-- Leases that are all on one (limit, key) where nobody waits, and on no other. Returns the ids that were live.
create or replace function pglimits._release_alike(lease_ids uuid[])
returns uuid[]
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  state record;
  now timestamptz;
  freed bigint;
  live uuid[];
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if cardinality(lease_ids) > 1 then
    if (select count(*) = cardinality(lease_ids) and min(l.limit_id) = max(l.limit_id) and min(l.key) = max(l.key)
        from pglimits.leases l where l.lease_id = any (lease_ids)) is not true
    then
      return null;
    end if;
  end if;
  select s.* into state from pglimits.leases l
  cross join lateral (
    select x.limit_id, x.key, x.version, x.waiting, x.pinned, x.next_look from pglimits.states x
    where x.limit_id = l.limit_id and x.key = l.key order by x.version desc limit 1 for update) s
  where l.lease_id = lease_ids[1] and l.parts = 1;
  if (state.waiting = 0 and state.pinned = 0 and state.next_look = 'infinity') is not true then
    return null;
  end if;
  now := pglimits._now();
  -- Read through the index on lease_id, and so in the order in which renew locks them. One alone needs no sum, which takes
  -- as long as its deletion.
  if cardinality(lease_ids) = 1 then
    delete from pglimits.leases l
    where l.lease_id = lease_ids[1]
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    returning l.slots, case when l.expires_at > now then lease_ids else '{}' end into freed, live;
  else
    with gone as (
      delete from pglimits.leases l
      where l.lease_id = any (lease_ids)
        and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
      returning l.lease_id, l.slots, l.expires_at > now as live
    )
    select sum(g.slots), coalesce(array_agg(g.lease_id) filter (where g.live), '{}') into freed, live from gone g;
  end if;
  if freed > 0 then
    update pglimits.states s set version = s.version + 1, held = s.held - freed, changed_at = now
    where s.limit_id = state.limit_id and s.key = state.key and s.version = state.version;
  end if;
  return coalesce(live, '{}');
end $$;

comment on function pglimits._release_alike(uuid[]) is
  'Ends leases on one (limit, key) if nobody waits there: the ids that were live; null if it is not so simple.';
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
-- Limits: what an administrator calls.

create or replace function pglimits._check_limit(
  most integer, slot_decay_per_second double precision, max_waiters integer, description text)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  problem text := case
    when most < 0 then format('limit must be at least 0, not %s', most)
    when slot_decay_per_second not between 0 and 1e9  -- NaN is above everything
      then format('slot_decay_per_second must be from 0 to 1000000000, not %s', slot_decay_per_second)
    when slot_decay_per_second > 0 and slot_decay_per_second < 1e-9
      then format('slot_decay_per_second must be 0 or at least 0.000000001, not %s', slot_decay_per_second)
    when max_waiters < -1 then format('max_waiters must be at least 0, or null for no bound, not %s', max_waiters)
    when length(description) > 2000
      then format('description must be at most 2000 characters, not %s', length(description))
  end;
begin
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
end $$;

comment on function pglimits._check_limit(integer, double precision, integer, text) is
  'Raises InvalidArgument for properties that no limit can have. Nulls are not looked at.';

create or replace function pglimits.create_limit(
  name text,
  "limit" integer,
  slot_decay_per_second double precision default 0,
  active boolean default true,
  max_waiters integer default null,
  description text default null)
returns void
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
  now timestamptz := pglimits._now();
  problem text := coalesce(
    pglimits._name_error('name', name),
    case when "limit" is null then 'limit must not be null'
         when slot_decay_per_second is null then 'slot_decay_per_second must not be null'
         when active is null then 'active must not be null'
         when max_waiters < 0 then format('max_waiters must be at least 0, or null for no bound, not %s', max_waiters)
    end);
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  perform pglimits._check_limit("limit", slot_decay_per_second, max_waiters, description);
  insert into pglimits.configs (name, "limit", slot_decay_per_second, active, max_waiters, description,
                                decayed_at, fence_floor, created_at, updated_at)
  select create_limit.name, create_limit."limit", create_limit.slot_decay_per_second, create_limit.active,
         create_limit.max_waiters, nullif(create_limit.description, ''), now, m.fence_floor, now, now
  from (select x.fence_floor from pglimits.meta x for share) m
  on conflict do nothing;
  if not found then
    perform pglimits._fail('LimitExists', format('there is a limit named %L already', name),
                           'update_limit changes it.');
  end if;
end $$;

comment on function pglimits.create_limit(text, integer, double precision, boolean, integer, text) is
$$Creates a limit. name: 1 to 200 characters, no control character, none of / % & > <. limit: slots, 0 admits nobody.
slot_decay_per_second: 0 for a concurrency limit, above 0 for a rate limit. active: false does not enforce it.
max_waiters: the longest queue for each key; null, no bound. Errors: PL001 a bad argument, PL003 the name is taken.$$;

create or replace function pglimits.update_limit(
  name text,
  "limit" integer default null,
  slot_decay_per_second double precision default null,
  active boolean default null,
  max_waiters integer default null,
  description text default null,
  new_name text default null)
returns void
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
  of_limit bigint;
  around pglimits._places;
  old pglimits.configs;
  new pglimits.configs;
  waited_for text;
  now timestamptz;
  problem text := case when new_name is not null then pglimits._name_error('new_name', new_name) end;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('update_limit');
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  perform pglimits._check_limit("limit", slot_decay_per_second, max_waiters, description);
  if new_name is not null then
    -- Names are given by one at a time: nobody creates or renames a limit meanwhile.
    perform from pglimits.meta m for update;
  end if;
  -- First the config, then every state: whoever decided by the old config has committed, whoever comes sees the new.
  of_limit := pglimits._limit_id(update_limit.name);
  around := pglimits._around_limit(of_limit);
  perform pglimits._lock_beside(around, of_limit, true);
  select c.* into old from pglimits.configs c where c.limit_id = of_limit for update;
  if not found then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name));
  end if;
  if new_name <> old.name and exists (select from pglimits.configs c where c.name = new_name) then
    perform pglimits._fail('LimitExists', format('there is a limit named %L already', new_name));
  end if;
  perform pglimits._lock_every(of_limit);
  perform pglimits._lock_beside(around, of_limit, false);
  now := pglimits._now();

  new := old;
  new.name := coalesce(new_name, old.name);
  new."limit" := coalesce(update_limit."limit", old."limit");
  new.slot_decay_per_second := coalesce(update_limit.slot_decay_per_second, old.slot_decay_per_second);
  new.active := coalesce(update_limit.active, old.active);
  new.max_waiters := case when max_waiters = -1 then null else coalesce(update_limit.max_waiters, old.max_waiters) end;
  new.description := coalesce(update_limit.description, old.description);
  new.changes := old.changes + 1;
  if new.slot_decay_per_second <> old.slot_decay_per_second then
    new.decayed := pglimits._decayed(old, now);
    new.decayed_at := now;
  end if;
  update pglimits.configs c
  set name = new.name, "limit" = new."limit", slot_decay_per_second = new.slot_decay_per_second, active = new.active,
      max_waiters = new.max_waiters, description = nullif(new.description, ''), decayed = new.decayed,
      decayed_at = new.decayed_at, changes = new.changes, updated_at = now
  where c.limit_id = old.limit_id;
  if new.name <> old.name then
    insert into pglimits.former_names (name, limit_id) values (old.name, old.limit_id) on conflict do nothing;
  end if;

  for waited_for in
    select distinct q.key from pglimits.queue q where q.limit_id = old.limit_id order by q.key
  loop
    perform pglimits._apply_change(waited_for, old, new, now);
  end loop;
  perform pglimits._rearrange_at(around);
  perform pglimits._tell_elsewhere(of_limit);
end $$;

comment on function pglimits.update_limit(text, integer, double precision, boolean, integer, text, text) is
$$Changes a limit, at once and in one transaction; what is null stays as it is. max_waiters -1: no bound. description '':
none. new_name renames it and keeps everything. Grown: waiters are granted. Shrunk: holders keep their slots, nobody new
until it fits. Rate: the level so far is kept and decays at the new rate. Inactive: waiters go on at once.
Errors: PL001 a bad argument, PL002 no such limit, PL003 new_name is taken.$$;

-- What a change of a limit means to those who wait on one of its keys.
create or replace function pglimits._apply_change(
  key text, old pglimits.configs, new pglimits.configs, now timestamptz)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  was pglimits.states := pglimits._lock(new.limit_id, key);
  state pglimits.states := pglimits._unpin(was, new, now);
  decayed numeric := pglimits._decayed(new, now);
  grown integer := new."limit" - old."limit";
  turns numeric[];
  slots numeric[];
  left_line bigint;
  unpinned bigint;
  over_several boolean;
  shift integer;
  shut uuid[];
begin
  if not new.active then
    -- What adjust has added stays.
    state.booked := state.booked - pglimits._reserved(state, decayed) + (
      select coalesce(sum(q.slots), 0) from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and q.added and q.turn > decayed);
    perform pglimits._send_away(state.limit_id, state.key);
    state.waiting := 0;
    state.pinned := 0;
    state.next_death := timestamptz 'infinity';
    state.next_look := timestamptz 'infinity';
    perform pglimits._save(state, was, now);
    return;
  end if;

  perform pglimits._tell_sleepers(state, decayed);
  -- Who sleeps over several limits moves when all changes are made; those behind it with it.
  with moves as (
    update pglimits.queue q
    set called = true, pinned = false, gap = case when q.pinned then -q.slots else q.gap end,
        turn = case when q.pinned then greatest(
          pglimits._decayed(new, now + pglimits._until(old, q.turn, now)), decayed + 0.000001) else q.turn end
    from (select x.lease_id, x.pinned from pglimits.queue x
          where x.limit_id = state.limit_id and x.key = state.key and x.turn > decayed and x.several and x.expires_at < 'infinity'
            and (grown <> 0 or new.slot_decay_per_second <> old.slot_decay_per_second)) b
    where q.lease_id = b.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning b.pinned
  )
  select count(*) > 0, state.pinned - count(*) filter (where m.pinned) into over_several, state.pinned from moves m;
  shift := case when over_several then 0 else grown end;
  -- Turns lie where the level will have come down to the limit: as the limit moves, so do they, but not into the past.
  update pglimits.queue q set called = q.called or over_several, turn = greatest(q.turn - shift, decayed)
  where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed
    and (q.expires_at < 'infinity' or q.added) and not q.several and grown <> 0;
  -- Whoever can never be granted now is sent away to ask again, and gets the error. Who slept towards a limit that is 0 now
  -- stands in line. Who cannot be told of anything goes at the moment that it was told at first, and is pinned there.
  with hopeless as (
    delete from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and pglimits._is_hopeless(new, q.slots, q.for_rate)
      and case when q.turn is null then true else q.turn > decayed and q.expires_at < 'infinity' and not q.several end
    returning q.turn, q.slots + q.gap as slots, q.pinned as was_pinned, false as pinned, null::uuid as shut,
              pglimits._tell(q.channel, q.lease_id)
  ), stopped as (
    select q.turn, q.slots + q.gap, false, false, q.lease_id, null::void from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn > decayed and q.expires_at < 'infinity' and not q.several
      and new."limit" = 0 and new.slot_decay_per_second > 0
  ), deaf as (
    update pglimits.queue q set turn = pglimits._decayed(new, q.looks_at), pinned = true, gap = 0
    from (
      select x.lease_id, x.turn, x.pinned, x.slots + x.gap as slots from pglimits.queue x
      where x.limit_id = state.limit_id and x.key = state.key and x.turn > decayed and x.expires_at = 'infinity' and not x.added
        and (grown <> 0 or new.slot_decay_per_second <> old.slot_decay_per_second)
    ) b
    where q.lease_id = b.lease_id
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
    returning greatest(b.turn - shift, decayed), b.slots, b.pinned, true, null::uuid, null::void
  )
  select array_agg(h.turn) filter (where not h.was_pinned and h.turn is not null),
         array_agg(h.slots) filter (where not h.was_pinned and h.turn is not null),
         count(*) filter (where h.turn is null),
         count(*) filter (where h.was_pinned) - count(*) filter (where h.pinned),
         array_agg(h.shut) filter (where h.shut is not null)
  into turns, slots, left_line, unpinned, shut
  from (select * from hopeless union all select * from stopped union all select * from deaf) h;
  state.waiting := state.waiting - left_line;
  state.pinned := state.pinned - unpinned;
  if shut is not null then
    state := pglimits._stand_in_line(state, shut, now);
  end if;
  if turns is not null then
    state := pglimits._close_gaps(state, new, now, turns, slots);
  end if;
  state := pglimits._settle(pglimits._note_peak(state), new, now);
  perform pglimits._save(state, was, now);
end $$;

comment on function pglimits._apply_change(text, pglimits.configs, pglimits.configs, timestamptz) is
  'Applies a change of a limit to those who wait on one of its keys.';

-- Empties a queue: everybody in it is told, and asks again. Who sleeps over several limits goes on for the others.
create or replace function pglimits._send_away(limit_id bigint, key text)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  waiter record;
begin
  for waiter in
    delete from pglimits.queue q where q.limit_id = _send_away.limit_id and q.key = _send_away.key
    returning q.channel, q.lease_id
  loop
    perform pglimits._tell(waiter.channel, waiter.lease_id);
  end loop;
end $$;

comment on function pglimits._send_away(bigint, text) is 'Empties the queue of a (limit, key) and tells everybody who was in it.';

-- Tells those who need slots of a limit that was changed, and wait for others too: they look, find that it was changed, and ask
-- again, or move to another turn.
create or replace function pglimits._tell_elsewhere(limit_id bigint)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._tell(w.channel, null)
  from (select distinct q.channel from pglimits.queue q where _tell_elsewhere.limit_id = any (q.limit_ids)) w;
end $$;

comment on function pglimits._tell_elsewhere(bigint) is
  'Tells those who wait for several limits, this one among them, that it was changed.';

create or replace function pglimits.delete_limit(name text)
returns void
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
  of_limit bigint;
  around pglimits._places;
  gone pglimits.configs;
  state record;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('delete_limit');
  -- First of all, so that a limit created under this name while this commits starts above its fences.
  perform from pglimits.meta m for update;
  of_limit := pglimits._limit_id(delete_limit.name);
  around := pglimits._around_limit(of_limit);
  perform pglimits._lock_beside(around, of_limit, true);
  select c.* into gone from pglimits.configs c where c.limit_id = of_limit for update;
  if not found then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name));
  end if;
  perform pglimits._lock_every(of_limit);
  perform pglimits._lock_beside(around, of_limit, false);
  for state in
    select s.key, s.version from pglimits.states s where s.limit_id = gone.limit_id order by s.key
  loop
    perform pglimits._send_away(gone.limit_id, state.key);
    gone.fence_floor := greatest(gone.fence_floor, state.version);
  end loop;
  -- In the order in which renew locks them. A lease on other limits too goes on there.
  perform from pglimits.leases l
  where l.lease_id in (select d.lease_id from pglimits.leases d where d.limit_id = gone.limit_id)
  order by l.limit_id, l.key, l.lease_id for update;
  update pglimits.leases l set parts = l.parts - d.dropped
  from (select x.lease_id, count(*)::integer as dropped from pglimits.leases x
        where x.limit_id = gone.limit_id and x.parts > 1 group by x.lease_id) d
  where l.lease_id = d.lease_id and l.limit_id <> gone.limit_id;
  delete from pglimits.leases l where l.limit_id = gone.limit_id;
  delete from pglimits.states s where s.limit_id = gone.limit_id;
  delete from pglimits.keys k where k.limit_id = gone.limit_id;
  delete from pglimits.former_names f where f.limit_id = gone.limit_id;
  delete from pglimits.configs c where c.limit_id = gone.limit_id;
  update pglimits.meta m set fence_floor = greatest(m.fence_floor, gone.fence_floor);
  perform pglimits._rearrange_at(around);
  perform pglimits._tell_elsewhere(of_limit);
end $$;

comment on function pglimits.delete_limit(text) is
  'Deletes a limit with its leases; its waiters are told; a later release is a no-op. Errors: PL002 no such limit.';

-- Corrects what was charged before the call was made: up, even past the limit, or down, never below zero.
create or replace function pglimits.adjust(name text, slots integer, key text default '')
returns double precision
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
  here pglimits._places;
  around pglimits._places;
  was pglimits.states;
  state pglimits.states;
  config pglimits.configs;
  now timestamptz;
  problem text := coalesce(case when slots is null then 'slots must not be null' end,
                           pglimits._name_error('key', key, true));
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  here.limit_ids := array[pglimits._limit_id(name)];
  here.keys := array[key];
  if slots < 0 then
    around := pglimits._around(here);
    perform pglimits._lock_several(around.limit_ids, around.keys);
  end if;
  was := pglimits._lock(here.limit_ids[1], key);
  now := pglimits._now();
  select c.* into config from pglimits.configs c where c.limit_id = was.limit_id;
  if config.limit_id is null then
    perform pglimits._fail('LimitNotFound', format('there is no limit named %L', name));
  elsif config.slot_decay_per_second = 0 then
    perform pglimits._fail('NoSlotDecay', format('limit %L has no slot_decay_per_second: it has no level', name));
  end if;
  state := pglimits._add_to_level(pglimits._unpin(was, config, now), config, slots, now);
  if config.active then
    state := pglimits._settle(state, config, now);
  end if;
  perform pglimits._save(state, was, now);
  perform pglimits._rearrange_at(around);
  return (
    select pglimits._level(s, config, now) from pglimits.states s
    where s.limit_id = here.limit_ids[1] and s.key = adjust.key order by s.version desc limit 1);
end $$;

comment on function pglimits.adjust(text, integer, text) is
$$Adds slots to the level of a rate limit after the fact (an estimate was 500 tokens, the call used 1312: adjust by 812),
or takes them off, never below zero. Past the limit, later callers wait longer. Returns the new level in slots.
Errors: PL001 a bad argument, PL002 no such limit, PL005 the limit has no slot_decay_per_second.$$;

-- Raises the level behind those who sleep, or lowers it: by what was added behind the last of them, then behind the one before,
-- and so on, and at last by what was used before they came. What they have reserved stays reserved, only earlier.
create or replace function pglimits._add_to_level(
  state pglimits.states, config pglimits.configs, slots numeric, now timestamptz)
returns pglimits.states
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  decayed constant numeric := pglimits._decayed(config, now);
  used numeric;
  turns numeric[];
  given_back numeric[];
  added record;
begin
  if slots > 0 then
    return pglimits._add_turn(state, config, slots::integer, now);
  elsif slots = 0 then
    return state;
  end if;
  state.booked := greatest(state.booked, decayed);
  used := state.booked - decayed - pglimits._reserved(state, decayed);
  if used < 0 then
    -- So much of the first gap has passed.
    update pglimits.queue q set gap = q.gap + used
    where q.lease_id = (
      select n.lease_id from pglimits.queue n
      where n.limit_id = state.limit_id and n.key = state.key and n.turn > decayed and not n.pinned
      order by n.turn limit 1)
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
    used := 0;
  end if;
  for added in
    select q.lease_id, q.turn, q.slots, q.gap from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.added and q.turn > decayed
    order by q.turn desc
  loop
    exit when slots = 0;
    turns := turns || added.turn;
    if added.slots > -slots then
      update pglimits.queue q set slots = q.slots + _add_to_level.slots
      where q.lease_id = added.lease_id
        and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
      given_back := given_back || -slots;
      slots := 0;
    else
      delete from pglimits.queue q
      where q.lease_id = added.lease_id
        and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
      given_back := given_back || (added.slots + added.gap);
      slots := slots + added.slots;
    end if;
  end loop;
  return pglimits._close_gaps(state, config, now, turns || decayed, given_back || least(-slots, used));
end $$;

comment on function pglimits._add_to_level(pglimits.states, pglimits.configs, numeric, timestamptz) is
  'Raises or lowers the level of a rate limit.';

create or replace function pglimits.reset(name text, key text default null)
returns integer
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
  was pglimits.states;
  state pglimits.states;
  config pglimits.configs;
  now timestamptz;
  ended integer := 0;
  ended_here integer;
  of_limit bigint := pglimits._limit_id(name);
  used_keys text[];
  places pglimits._places;
  around pglimits._places;
  used_key text;
  problem text := case when key is not null then pglimits._name_error('key', key, true) end;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('reset');
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  used_keys := array(select s.key from pglimits.states s
                     where s.limit_id = of_limit and s.key = coalesce(reset.key, s.key));
  places.limit_ids := array_fill(of_limit, array[cardinality(used_keys)]);
  places.keys := used_keys;
  around := pglimits._around(places);
  perform pglimits._lock_several(places.limit_ids || around.limit_ids, places.keys || around.keys);
  foreach used_key in array used_keys loop
    was := pglimits._lock_used(of_limit, used_key);
    continue when was.limit_id is null;
    now := pglimits._now();
    select c.* into config from pglimits.configs c where c.limit_id = of_limit;
    -- In the order in which renew locks them.
    perform from pglimits.leases l
    where l.limit_id = of_limit and l.key = used_key order by l.lease_id for update;
    with gone as (
      delete from pglimits.leases l where l.limit_id = of_limit and l.key = used_key
      returning l.expires_at
    )
    select count(*) filter (where g.expires_at > now) into ended_here from gone g;
    ended := ended + ended_here;
    state := pglimits._unpin(was, config, now);
    state.held := 0;
    state.next_expiry := timestamptz 'infinity';
    state := pglimits._add_to_level(state, config, -state.booked, now);
    if config.active then
      state := pglimits._settle(state, config, now);
    end if;
    perform pglimits._save(state, was, now);
  end loop;
  perform pglimits._rearrange_at(around);
  return ended;
end $$;

comment on function pglimits.reset(text, text) is
$$Ends every lease of a limit (of one key, if given) and sets its level to zero, as if nothing had been taken; waiters are
granted. The holders are not stopped: they find out when they next renew. Returns how many leases were ended.
Errors: PL001 a bad argument, PL002 no such limit.$$;
-- The janitor. Nothing's correctness or liveness depends on it.

-- Tidies up to max_keys (limit, key)s: ended leases nobody wanted, dead waiters, turns that have passed, idle keys.
create or replace function pglimits.sweep(max_keys integer default 1000, idle interval default '1 hour')
returns table (leases integer, waiters integer, keys integer)
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
  limit_ids bigint[];
  due_keys text[];
  was pglimits.states;
  state pglimits.states;
  config pglimits.configs;
  now timestamptz := pglimits._now();
  removed integer;
  problem text := case
    when max_keys is null or max_keys < 1 then format('max_keys must be at least 1, not %s', coalesce(max_keys::text, 'null'))
    when idle is null or extract(epoch from idle) < 0
      then format('idle must not be negative, not %s', coalesce(idle::text, 'null'))
  end;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  leases := 0;
  waiters := 0;
  keys := 0;
  select array_agg(p.limit_id), array_agg(p.key) into limit_ids, due_keys
  from (
    select due.limit_id, due.key
    from (
      select l.limit_id, l.key from pglimits.leases l where l.expires_at <= now
      union
      select q.limit_id, q.key from pglimits.queue q join pglimits.configs c on c.limit_id = q.limit_id
      where q.expires_at <= now or q.turn <= pglimits._forgotten(c, now)
    ) due
    order by due.limit_id, due.key limit max_keys
  ) p;
  perform pglimits._lock_several(limit_ids, due_keys);
  now := pglimits._now();
  for i in 1 .. coalesce(cardinality(due_keys), 0) loop
    was := pglimits._lock_used(limit_ids[i], due_keys[i]);
    continue when was.limit_id is null;
    select c.* into config from pglimits.configs c where c.limit_id = limit_ids[i];
    state := pglimits._take_expired(was, now);
    leases := least(leases::bigint + (was.held - state.held), 2147483647);
    delete from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn is null and q.expires_at <= now;
    get diagnostics removed = row_count;
    state.waiting := state.waiting - removed;
    waiters := waiters + removed;
    state := pglimits._unpin(state, config, now);
    delete from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key
      and q.turn <= pglimits._forgotten(config, now);
    get diagnostics removed = row_count;
    waiters := waiters + removed;
    if config.active then
      state := pglimits._settle(state, config, now);
    end if;
    perform pglimits._save(state, was, now);
  end loop;
  keys := pglimits._sweep_idle_keys(
    max_keys, now - make_interval(secs => least(extract(epoch from idle), 3e10)::double precision), now);
  return next;
end $$;

comment on function pglimits.sweep(integer, interval) is
$$Tidies: removes ended leases that nobody wanted, dead waiters, turns that have passed, and keys that have been idle for
that long; at most max_keys of each at a time. Returns how many slots, waiters and keys it freed. Nothing depends on it
but the size of the tables. Errors: PL001 a bad argument.$$;

-- Forgets keys with nothing in them. Waits for no lock: it holds the config's, which comes before the states'.
create or replace function pglimits._sweep_idle_keys(max_keys integer, idle_since timestamptz, now timestamptz)
returns integer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  config pglimits.configs;
  highest bigint;
  removed integer;
  total integer := 0;
begin
  for config in
    select c.* from pglimits.configs c
    where exists (select from pglimits.states s where s.limit_id = c.limit_id and s.changed_at <= idle_since
                                                  and s.held = 0 and s.waiting = 0)
    order by c.limit_id for update skip locked
  loop
    with unused as (
      select s.limit_id, s.key, s.version from pglimits.states s
      where s.limit_id = config.limit_id and s.changed_at <= idle_since and s.held = 0 and s.waiting = 0
        and s.booked <= pglimits._decayed(config, now)
        and not exists (select from pglimits.queue q where q.limit_id = s.limit_id and q.key = s.key)
      order by s.key limit max_keys - total for update skip locked
    ), gone as (
      delete from pglimits.states s using unused u
      where s.limit_id = u.limit_id and s.key = u.key and s.version = u.version
      returning s.limit_id, s.key, s.version
    ), forgotten as (
      delete from pglimits.keys k using gone g where k.limit_id = g.limit_id and k.key = g.key
    )
    select count(*), max(g.version) into removed, highest from gone g;
    if removed > 0 then
      update pglimits.configs c set fence_floor = greatest(c.fence_floor, highest) where c.limit_id = config.limit_id;
      total := total + removed;
    end if;
    exit when total >= max_keys;
  end loop;
  return total;
end $$;

comment on function pglimits._sweep_idle_keys(integer, timestamptz, timestamptz) is
  'Deletes the states of keys that nothing uses; remembers their fences. Returns how many.';
-- pg_cron, where it is there, calls the sweep. Its functions are called by dynamic SQL, because this has to be
-- installable without it.

-- How often pg_cron is asked to sweep: seconds from pg_cron 1.5 on, whole minutes before (it would misread seconds).
create or replace function pglimits._cron_schedule(every interval, extension_version text)
returns text
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  seconds numeric := extract(epoch from every);
  parts integer[] := (regexp_match(extension_version, '^([0-9]+)[.]([0-9]+)'))::integer[];
  minutes integer;
begin
  if every is null or seconds < 1 or seconds > 86400 then
    perform pglimits._fail('InvalidArgument',
      format('every must be from 1 second to 1 day, not %s', coalesce(every::text, 'null')));
  elsif ceil(seconds) < 60 and (parts[1], parts[2]) >= (1, 5) then
    return ceil(seconds) || ' seconds';
  end if;
  minutes := ceil(seconds / 60);
  return case when minutes = 1 then '* * * * *'
              when minutes < 60 then format('*/%s * * * *', minutes)
              when minutes <= 23 * 60 then format('0 */%s * * *', ceil(minutes / 60.0)::integer)
              else '0 0 * * *' end;
end $$;

comment on function pglimits._cron_schedule(interval, text) is
  'The schedule for pg_cron of that version; rounded up to what it can express.';

create or replace function pglimits.cron_enable(every interval default '1 minute')
returns text
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
  cron_version text := (select x.extversion from pg_catalog.pg_extension x where x.extname = 'pg_cron');
  cron_database text := current_setting('cron.database_name', true);
  -- Also the check of its argument, which comes first.
  schedule text := pglimits._cron_schedule(every, coalesce(cron_version, '1.4'));
begin
  if cron_version is null and cron_database <> current_database() then
    perform pglimits._fail('CronUnavailable',
      format('pg_cron lives in database %L, not in this one', cron_database),
      format('Run ''pglimits cron enable'', or in %I: select cron.schedule_in_database(%L, %L, %L, %L);',
             cron_database, pglimits._cron_job(), schedule, 'select pglimits.sweep()',
             current_database()));
  elsif cron_version is null then
    perform pglimits._fail('CronUnavailable', 'pg_cron is not installed in this database',
      'Install the package (Debian: postgresql-NN-cron), set shared_preload_libraries = ''pg_cron'' and '
      'cron.database_name, restart, and run: create extension pg_cron. Without it: pglimits sweep --every 60');
  end if;
  execute 'select cron.schedule($1, $2, $3)' using pglimits._cron_job(), schedule, 'select pglimits.sweep()';
  return schedule;
end $$;

comment on function pglimits.cron_enable(interval) is
$$Has pg_cron call sweep() that often (below a minute from pg_cron 1.5 on, else rounded up to minutes). Run twice, it is
scheduled once. Returns the schedule. Errors: PL001 a bad argument, PL007 pg_cron is not in this database.$$;

create or replace function pglimits.cron_disable()
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
declare
  job bigint;
begin
  if not exists (select from pg_catalog.pg_extension x where x.extname = 'pg_cron') then
    return false;
  end if;
  execute 'select j.jobid from cron.job j where j.jobname = $1' into job using pglimits._cron_job();
  if job is null then
    return false;
  end if;
  execute 'select cron.unschedule($1)' using job;
  return true;
end $$;

comment on function pglimits.cron_disable() is 'Stops pg_cron from calling sweep(). False if it was not scheduled here.';

create or replace function pglimits._cron_job()
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return 'pglimits sweep ' || current_database();
end $$;

comment on function pglimits._cron_job() is 'The name of the job in pg_cron.';
-- What anybody may see who may see anything. Decay and expiry are applied as of now, whatever has been taken out yet.

create or replace view pglimits.limits as
select
  c.name, c."limit", c.active, c.slot_decay_per_second,
  coalesce(s.held, 0)::bigint as held,
  coalesce(s.level, 0)::double precision as level,
  coalesce(w.waiting, 0) as waiting,
  c.max_waiters, c.description, c.created_at, c.updated_at
from (select pglimits._now() as now) clock
cross join pglimits.configs c
cross join lateral (
  select c.decayed + c.slot_decay_per_second::numeric * extract(epoch from clock.now - c.decayed_at) as decayed
) v
left join lateral (
  select
    sum(k.held - case when k.next_expiry > clock.now then 0 else coalesce((
      select sum(l.slots) from pglimits.leases l
      where l.limit_id = k.limit_id and l.key = k.key
        and l.expires_at >= k.next_expiry and l.expires_at <= clock.now), 0) end) as held,
    -- Without the turns of the dead, and without what lies free before those who sleep.
    sum(greatest(greatest(b.booked, f.reserved, f.free) - coalesce(f.free, 0)
      - case when k.next_death > clock.now then 0 else coalesce((
        select sum(q.slots + least(q.gap, 0)) from pglimits.queue q
        where q.limit_id = k.limit_id and q.key = k.key and q.turn > v.decayed and q.expires_at <= clock.now
          and not q.pinned), 0) end, 0))
      filter (where c.slot_decay_per_second > 0) as level
  from pglimits.states k
  cross join lateral (
    -- Pinned turns that have come are charged: each when it came.
    select case when k.pinned = 0 then k.booked else (
      select greatest(k.booked + coalesce(sum(p.slots), 0), max(p.turn + p.following))
      from (select q.turn, q.slots, sum(q.slots) over (order by q.turn desc, q.lease_id desc) as following
            from pglimits.queue q
            where q.limit_id = k.limit_id and q.key = k.key and q.pinned and q.turn <= v.decayed) p) end - v.decayed as booked
  ) b
  left join lateral (
    select sum(q.slots + q.gap) as reserved, sum(greatest(q.gap, 0)) as free from pglimits.queue q
    where q.limit_id = k.limit_id and q.key = k.key and q.turn > v.decayed and not q.pinned
      and exists (select from pglimits.queue g where g.limit_id = k.limit_id and g.key = k.key and g.gap > 0)
  ) f on true
  where k.limit_id = c.limit_id
) s on true
left join lateral (
  select count(*) as waiting from pglimits.queue q
  where q.limit_id = c.limit_id and q.expires_at > clock.now and (q.turn is null or q.turn > v.decayed) and not q.added
) w on true;

comment on view pglimits.limits is
  'Every limit. held, level and waiting are over all its keys: slots under live leases; slots used (or reserved ahead) '
  'and not decayed yet; live requests in the queue or asleep until their turn.';

create or replace view pglimits.holders as
select l.lease_id, c.name, l.key, l.slots, l.holder, l.fence, l.priority, l.acquired_at, l.expires_at
from (select pglimits._now() as now) clock
cross join pglimits.leases l
join pglimits.configs c on c.limit_id = l.limit_id
where l.expires_at > clock.now;

comment on view pglimits.holders is 'Every live lease: one row for each limit that it is on.';

create or replace view pglimits.waiters as
select
  q.lease_id, c.name, q.key, q.slots, q.holder, -q.rank as priority,
  (row_number() over (partition by q.limit_id, q.key order by q.turn nulls last, q.rank, q.arrival))::integer
    as "position",
  q.arrival as waiting_since
from (select pglimits._now() as now) clock
cross join pglimits.queue q
join pglimits.configs c on c.limit_id = q.limit_id
where q.expires_at > clock.now and not q.added
  and (q.turn is null or q.turn > c.decayed + c.slot_decay_per_second::numeric
                                              * extract(epoch from clock.now - c.decayed_at));

comment on view pglimits.waiters is
  'Every live waiter, in the order in which they go on: those asleep until a reserved turn, then the queue. '
  'A request over several limits has a row for each where it has a turn or a place in line.';
-- Drops what an older version had and this one has not: the views and routines that were not written in this transaction.
-- Those that are as they were keep their grants, and whatever of yours is built on them.
do $$
declare
  views text;
  routines text;
  dependents text;
begin
  select string_agg(c.oid::regclass::text, ', ') into views from pg_class c
  where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'v' and c.xmin <> pg_current_xact_id()::xid;
  select string_agg(p.oid::regprocedure::text, ', ') into routines from pg_proc p
  where p.pronamespace = 'pglimits'::regnamespace and p.xmin <> pg_current_xact_id()::xid;
  if views is not null then
    execute 'drop view ' || views;
  end if;
  if routines is not null then
    execute 'drop routine ' || routines;
  end if;
exception when dependent_objects_still_exist then
  get stacked diagnostics dependents = pg_exception_detail;
  raise exception using
    errcode = 'dependent_objects_still_exist',
    message = format('something of yours is built on what pglimits %s no longer has (%s): nothing was changed; drop it, '
                     'upgrade, and create it anew', pglimits.version(), replace(dependents, E'\n', '; '));
end $$;
-- Who may what. Nothing for PUBLIC; pglimits_user acquires, pglimits_reader looks, pglimits_admin does everything.

set local client_min_messages = notice;  -- what could not be done has to be said

revoke all on schema pglimits from public;
revoke all on all tables in schema pglimits from public;
revoke all on all routines in schema pglimits from public;

do $$
declare
  users constant text[] := '{acquire,acquire_alike,acquire_hot,acquire_many,acquire_wait,rate_limit,renew,release,release_hot,release_many,flush,watch,may_sleep,peek,version,errors}';
  administrators constant text[] := '{create_limit,update_limit,delete_limit,adjust,reset,sweep,cron_enable,cron_disable}';
  needed constant text[] := '{pglimits_user,pglimits_reader,pglimits_admin}';
  type_name name;
  routine regprocedure;
  routine_name name;
  wanted text;
begin
  for type_name in
    select t.typname from pg_catalog.pg_type t left join pg_catalog.pg_class c on c.oid = t.typrelid
    where t.typnamespace = 'pglimits'::pg_catalog.regnamespace and t.typtype = 'c' and c.relkind = 'c'
  loop
    execute format('revoke all on type pglimits.%I from public', type_name);
  end loop;

  foreach wanted in array needed loop
    if not exists (select from pg_catalog.pg_roles r where r.rolname = wanted) then
      begin
        execute format('create role %I nologin', wanted);
      exception
        when insufficient_privilege then
          raise notice using
            message = format('pglimits: %I may not create the role %I', current_user, wanted),
            hint = 'As a role that may: create role pglimits_user; create role pglimits_reader; create role '
                   'pglimits_admin; then install again. Or grant by hand: grant usage on schema pglimits to your_role; '
                   'grant execute on all routines in schema pglimits to your_role.';
        when duplicate_object or unique_violation then
          null;  -- another installation in the same cluster was faster
      end;
    end if;
  end loop;

  foreach wanted in array needed loop
    continue when not exists (select from pg_catalog.pg_roles r where r.rolname = wanted);
    -- What an older version granted goes.
    execute format('revoke all on all tables in schema pglimits from %I', wanted);
    execute format('revoke all on all routines in schema pglimits from %I', wanted);
    execute format('grant usage on schema pglimits to %I', wanted);
    for routine, routine_name in
      select p.oid::pg_catalog.regprocedure, p.proname from pg_catalog.pg_proc p
      where p.pronamespace = 'pglimits'::pg_catalog.regnamespace
    loop
      if (wanted in ('pglimits_user', 'pglimits_admin') and routine_name = any (users))
         or (wanted = 'pglimits_admin' and routine_name = any (administrators))
         or (wanted in ('pglimits_reader', 'pglimits_admin') and routine_name in ('_now', 'version', 'errors')) then
        execute format('grant execute on routine %s to %I', routine, wanted);
      end if;
    end loop;
    if wanted in ('pglimits_reader', 'pglimits_admin') then
      execute format('grant select on pglimits.limits, pglimits.holders, pglimits.waiters to %I', wanted);
    end if;
  end loop;
end $$;

comment on schema pglimits is 'Concurrency limits and rate limits, as SQL functions.';
commit;
select 'pglimits ' || pglimits.version() || ' is installed in ' || current_database() as done \gset
\echo :done

