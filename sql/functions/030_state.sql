-- The state of one (limit, key): locking it, creating it, saving it. Everything that decides goes
--   _lock  ->  read the clock  ->  decide  ->  _save (or _serve, which saves)
-- in the order of (limit id, key) where there are several, and so no two callers ever wait for each other in a ring. A caller that has
-- locked some, and finds that by now it needs others, takes those at once or not at all (at_once): error 55P03 has it begin again.
--
-- Invariant: all that a decision needs is in the row that is locked. A state is in one variable at a time, and saved before another
-- function looks at it. Every change raises its version, so whoever took a look without the lock can tell that something has changed.
-- Called by: whatever decides; states are created here alone.

-- The state of a (limit, key), locked. Null where there is none: it was never used, or has been swept or deleted.
create or replace function pglimits._lock_used(limit_id bigint, key text, at_once boolean default false)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  state pglimits.states;
begin
  if at_once then
    select s.* into state from pglimits.states s
    where s.limit_id = _lock_used.limit_id and s.key = _lock_used.key
    order by s.generation desc limit 1 for update nowait;
  else
    select s.* into state from pglimits.states s
    where s.limit_id = _lock_used.limit_id and s.key = _lock_used.key
    order by s.generation desc limit 1 for update;
  end if;
  return state;
end $$;

comment on function pglimits._lock_used(bigint, text, boolean) is
  'Locks and returns the state of a (limit, key); null where there is none. at_once: without waiting, or error 55P03.';

-- The same, created at its first use. Null when the limit is gone. For callers that have no other state locked, unless at once.
create or replace function pglimits._lock(limit_id bigint, key text, at_once boolean default false)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  state pglimits.states := pglimits._lock_used(limit_id, key, at_once);
begin
  if state.limit_id is null then
    perform pglimits._create_state(limit_id, key, at_once);
    state := pglimits._lock_used(limit_id, key, at_once);
  end if;
  return state;
end $$;

comment on function pglimits._lock(bigint, text, boolean) is
  'Locks and returns the state of a (limit, key), creating it at its first use; null when the limit is gone. at_once: as in _lock_used.';

-- The state of a key that was never used.
create or replace function pglimits._unused(config pglimits.configs, key text)
returns pglimits.states
language plpgsql
immutable
as $$
declare
  state pglimits.states;
begin
  state.limit_id := config.limit_id;
  state.key := key;
  state.name := config.name;
  state."limit" := config."limit";
  state.slot_decay_per_second := config.slot_decay_per_second;
  state.active := config.active;
  state.max_waiters := config.max_waiters;
  state.decayed := config.decayed;
  state.decayed_at := config.decayed_at;
  state.version := config.fence_floor;
  state.generation := state.version / 16;
  state.held := 0;
  state.booked := 0;
  state.next_expiry := timestamptz 'infinity';
  state.waiting := 0;
  state.waiting_slots := 0;
  state.head_rank := 0;
  state.head_arrival := timestamptz '-infinity';
  state.last_arrival := timestamptz '-infinity';
  state.next_look := timestamptz 'infinity';
  state.grants := 0;
  state.granted_slots := 0;
  state.releases := 0;
  state.expired_leases := 0;
  state.force_released_leases := 0;
  state.held_slot_seconds := 0;
  state.waited_seconds := 0;
  return state;
end $$;

comment on function pglimits._unused(pglimits.configs, text) is 'The state of a key that was never used.';

-- Creates the state of a (limit, key), unless there is one or the limit is gone. Before any state of the limit is locked: the config is
-- shared with other first users, but not with update_limit and delete_limit, which have to meet every state of the limit.
create or replace function pglimits._create_state(limit_id bigint, key text, at_once boolean default false)
returns void
language plpgsql
volatile
as $$
declare
  config pglimits.configs;
  state pglimits.states;
begin
  if at_once then
    -- Shared with nobody, as another first user's key would be waited for.
    perform from pglimits.configs c where c.limit_id = _create_state.limit_id for update nowait;
  end if;
  select c.* into config from pglimits.configs c where c.limit_id = _create_state.limit_id for share;
  if found then
    insert into pglimits.known_keys (limit_id, key) values (_create_state.limit_id, _create_state.key) on conflict do nothing;
    if found then
      state := pglimits._unused(config, key);
      state.changed_at := pglimits._now();
      insert into pglimits.states select state.*;
    end if;
  end if;
end $$;

comment on function pglimits._create_state(bigint, text, boolean) is
  'Creates the state of a (limit, key), unless there is one already. at_once: as in _lock_used.';

-- Locks the states of several (limit, key)s, in their order, each created at its turn: whoever has created one, and has not committed yet,
-- waits for none of a lower order. False: one of the limits is gone; the others are locked all the same.
create or replace function pglimits._lock_all(limit_ids bigint[], keys text[], at_once boolean default false)
returns boolean
language plpgsql
volatile
as $$
declare
  state pglimits.states;
  all_there boolean := true;
begin
  for p in 1 .. cardinality(keys) loop
    if limit_ids[p] = limit_ids[p + 1] then
      -- Several keys of a limit: none of them may be swept away, to be created again, once another is locked.
      if at_once then
        perform from pglimits.configs c where c.limit_id = limit_ids[p] for share nowait;
      else
        perform from pglimits.configs c where c.limit_id = limit_ids[p] for share;
      end if;
    end if;
    if not exists (select from pglimits.known_keys k where k.limit_id = limit_ids[p] and k.key = keys[p]) then
      perform pglimits._create_state(limit_ids[p], keys[p], at_once);
    end if;
    state := pglimits._lock_used(limit_ids[p], keys[p], at_once);
    all_there := all_there and state.limit_id is not null;
  end loop;
  return all_there;
end $$;

comment on function pglimits._lock_all(bigint[], text[], boolean) is
  'Locks the states of several (limit, key)s, given in the order of locking; false if one of the limits is gone. at_once: as in _lock_used.';

-- Reads a state that is locked already, as it was saved last.
create or replace function pglimits._reload(limit_id bigint, key text)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  state pglimits.states;
begin
  select s.* into state from pglimits.states s
  where s.limit_id = _reload.limit_id and s.key = _reload.key order by s.generation desc limit 1;
  return state;
end $$;

comment on function pglimits._reload(bigint, text) is 'The state of a (limit, key) that is locked already.';

-- Writes a locked state back.
create or replace function pglimits._save(state pglimits.states, now timestamptz)
returns void
language plpgsql
volatile
as $$
begin
  update pglimits.states s
  set version = greatest(state.version, s.version + 1), generation = greatest(state.version, s.version + 1) / 16,
      held = state.held, booked = state.booked, next_expiry = state.next_expiry, waiting = state.waiting,
      waiting_slots = state.waiting_slots, head_rank = state.head_rank, head_arrival = state.head_arrival,
      last_arrival = state.last_arrival, next_look = state.next_look, changed_at = now, grants = state.grants,
      granted_slots = state.granted_slots, releases = state.releases, expired_leases = state.expired_leases,
      force_released_leases = state.force_released_leases,
      held_slot_seconds = state.held_slot_seconds + pglimits._slot_seconds(s.held, s.changed_at, now),
      waited_seconds = state.waited_seconds, waits = state.waits
  where s.limit_id = state.limit_id and s.key = state.key and s.generation = state.generation;
end $$;

comment on function pglimits._save(pglimits.states, timestamptz) is 'Writes a locked state back under a higher version.';

-- Who keeps the states of some limits locked, in words, as far as the server tells the owner of this schema.
--
-- Nobody can tell the transaction of a subtransaction, nor see a state that was created in an open one. Where it is such a one: who has
-- written here in a transaction that was open already, and waits for nobody.
create or replace function pglimits._locked_by(names text[], keys text[])
returns text
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  lockers text;
begin
  with lockers as (
    select l.pid, case when l.locktype = 'transactionid' then l.transactionid in (
      select s.xmax from pglimits.states s where s.name = any (names) and s.key = any (keys)) end as is_sure
    from pg_locks l
    where l.granted and l.pid is distinct from pg_backend_pid() and (
      l.locktype = 'transactionid'
      or l.mode = 'RowExclusiveLock' and l.relation in (to_regclass('pglimits.states'), to_regclass('pglimits.configs'))
         and not exists (select from pg_locks waits where waits.pid = l.pid and not waits.granted))
  )
  select string_agg(distinct case
           when l.pid is null then 'a prepared transaction (see pg_prepared_xacts)'
           else format(
             'session %s of %s (%s, %s since %s)', l.pid, coalesce(a.usename, 'an unknown user'),
             coalesce(nullif(a.application_name, ''), 'no application_name'), coalesce(a.state, 'in a transaction'),
             coalesce(to_char(a.xact_start, 'HH24:MI:SS'), 'some time')) end, '; ')
  into lockers
  from lockers l left join pg_stat_activity a on a.pid = l.pid
  where l.is_sure
     or l.is_sure is null and (a.xact_start > statement_timestamp()) is not true
        and not exists (select from lockers sure where sure.is_sure);
  return lockers;
end $$;

comment on function pglimits._locked_by(text[], text[]) is
  'Which sessions keep limits locked, in words; null if none does any more. For the messages of LimitLocked, those of the wrapper too.';
