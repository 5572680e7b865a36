-- Slots of a (limit, key) that are held: taken under leases, freed when they have ended.
--
-- Invariant: held is the sum of the slots of the leases that are there, and changes in the same transaction as they do. Nobody has to
-- take out a lease that has ended: whoever needs its slots does.
-- Called by: the line, and whoever decides, with the state locked; who looks without a lock finds what is due by _ended_slots().

-- Whether a lease has not ended yet. In a form that no index knows: where leases are looked up by their ids, the one on expires_at must not
-- be taken, which a plan made while there were few of them may do, and then read all that there are.
create or replace function pglimits._is_live(expires_at timestamptz, now timestamptz)
returns boolean
language sql
immutable
return greatest(expires_at, now) > now;

comment on function pglimits._is_live(timestamptz, timestamptz) is 'Whether a lease with that end has not ended yet.';

-- Takes leases out that have ended. One that is being renewed or released right now is left to whoever does that.
create or replace function pglimits._take_expired(state pglimits.states, now timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  freed record;
begin
  with ended as (
    select l.lease_id from pglimits.leases l
    where l.limit_id = state.limit_id and l.key = state.key
      and l.expires_at >= state.next_expiry and l.expires_at <= now
    order by l.expires_at for update skip locked
  ), gone as (
    delete from pglimits.leases l
    where l.lease_id = any (array(select e.lease_id from ended e))
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    returning l as lease
  )
  select sum((g.lease).slots) as slots, array_agg(g.lease) as leases into freed from gone g;
  if freed.slots is not null then
    state.held := state.held - freed.slots;
    state := pglimits._count_expired(state, freed.leases, now);
  end if;
  state.next_expiry := coalesce((
    select l.expires_at from pglimits.leases l
    where l.limit_id = state.limit_id and l.key = state.key and l.expires_at >= state.next_expiry
    order by l.expires_at limit 1), 'infinity');
  return state;
end $$;

comment on function pglimits._take_expired(pglimits.states, timestamptz) is
  'Frees the slots of leases that have ended by now.';

-- Slots of leases that have ended and that nobody took out yet. next_expiry alone does not tell: the leases may have been renewed.
-- For whoever looks without a lock, the views too.
create or replace function pglimits._ended_slots(limit_id bigint, key text, next_expiry timestamptz, now timestamptz)
returns bigint
language plpgsql
stable
cost 1
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return case when next_expiry > now then 0 else (
    select coalesce(sum(x.slots), 0) from (
      select l.slots from pglimits.leases l
      where l.limit_id = _ended_slots.limit_id and l.key = _ended_slots.key
        and l.expires_at >= _ended_slots.next_expiry and l.expires_at <= _ended_slots.now
      order by l.expires_at offset 0) x) end;
end $$;

comment on function pglimits._ended_slots(bigint, text, timestamptz, timestamptz) is
  'How many slots of a (limit, key) still count as held by leases that have ended.';

-- Takes slots under a lease, as of a moment: with the level that goes with it, this is the one place where a waiter, or a request
-- that had to look closely, gets what it asked for. lease_duration null: a rate_limit, whose row only tells its caller. arrival:
-- since when it has waited.
create or replace function pglimits._take(
  state pglimits.states, lease_id uuid, slots integer, rank integer, lease_duration double precision, holder jsonb, parts integer,
  moment timestamptz, claimed boolean, ends timestamptz, arrival timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
begin
  state.version := state.version + 1;
  state.next_expiry := least(state.next_expiry, ends);
  if state.slot_decay_per_second > 0 then
    state.booked := pglimits._book(state, slots, moment);
  end if;
  if lease_duration is not null then
    state.held := state.held + slots;
  end if;
  state.grants := state.grants + 1;
  state.granted_slots := state.granted_slots + slots;
  if arrival < moment then
    state := pglimits._count_wait(state, date_part('epoch', moment - arrival));
  end if;
  insert into pglimits.leases (
    lease_id, limit_id, key, slots, used, holder, fence, priority, lease_duration, claimed, parts, acquired_at, expires_at)
  values (
    lease_id, state.limit_id, state.key, case when lease_duration is not null then slots else 0 end,
    case when lease_duration is not null and state.slot_decay_per_second > 0 then slots end, holder, state.version,
    -rank, coalesce(lease_duration, 0), claimed, parts, moment, ends);
  return state;
end $$;

comment on function pglimits._take(
  pglimits.states, uuid, integer, integer, double precision, jsonb, integer, timestamptz, boolean, timestamptz, timestamptz) is
  'Records a lease and returns the state with its slots held and booked; the fence is the state''s new version.';

-- What somebody who waits for several limits keeps of this one until then, in case the others come free before.
create or replace function pglimits._keep(
  state pglimits.states, lease_id uuid, slots integer, rank integer, parts integer, now timestamptz, until timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
begin
  state.held := state.held + slots;
  state.next_expiry := least(state.next_expiry, until);
  insert into pglimits.leases (
    lease_id, limit_id, key, slots, fence, priority, lease_duration, claimed, parts, acquired_at, expires_at)
  values (lease_id, state.limit_id, state.key, slots, 0, -rank, 0, false, parts, now, until);
  return state;
end $$;

comment on function pglimits._keep(pglimits.states, uuid, integer, integer, integer, timestamptz, timestamptz) is
  'Keeps slots for a request over several limits that goes to wait for another of them.';

-- Takes that back, when it has come to the head of a line again.
create or replace function pglimits._take_back(state pglimits.states, lease_id uuid)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  kept integer;
begin
  delete from pglimits.leases l
  where l.lease_id = _take_back.lease_id
    and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key and l.fence = 0
  returning l.slots into kept;
  state.held := state.held - coalesce(kept, 0);
  return state;
end $$;

comment on function pglimits._take_back(pglimits.states, uuid) is 'Ends what is kept of a (limit, key) for a request.';

-- From when on a state has room for a request: now; the moment at which the level does; or infinity, where slots have to be
-- released, or the limit is shut.
create or replace function pglimits._ready_at(state pglimits.states, slots integer, for_rate boolean, now timestamptz)
returns timestamptz
language plpgsql
immutable
as $$
begin
  return case
    when state."limit" = 0 or not for_rate and state.held::bigint + slots > state."limit" then timestamptz 'infinity'
    when state.slot_decay_per_second = 0 then now
    else pglimits._moment(state, slots, now)
  end;
end $$;

comment on function pglimits._ready_at(pglimits.states, integer, boolean, timestamptz) is
  'From when on a state has room for so many slots; infinity where time alone does not tell.';

-- Whether a limit, as it is now, can never grant so many slots. One of 0 may when it is no longer 0.
create or replace function pglimits._is_hopeless(
  "limit" integer, slot_decay_per_second double precision, slots integer, for_rate boolean)
returns boolean
language sql
immutable
return slots > "limit" and "limit" > 0 or for_rate and slot_decay_per_second = 0;

comment on function pglimits._is_hopeless(integer, double precision, integer, boolean) is
  'Whether a limit can never grant so many slots. for_rate: by decay alone.';
