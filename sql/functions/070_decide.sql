-- Decides requests under the locks of their states: grants, puts in line, or refuses.
--
-- Invariant: what is decided depends on nothing that was read before the locks were held.
-- Called by: the public functions and the batches, once the short way has found that it is not so simple.
--
-- Both answer nothing if a limit was changed, or the request was answered elsewhere, since it was checked: it is to be asked again.
-- again: some of the ids may be known.
-- told: the caller is told how long to sleep before it goes (a wrapper). To who is not, granted means: go now.

-- Requests that are all alike, over one limit. holders: an array with one for each, or null.
create or replace function pglimits._decide(
  request pglimits._request, lease_ids uuid[], holders jsonb, again boolean, told boolean)
returns setof pglimits._outcome
language plpgsql
volatile
as $$
declare
  many constant integer := cardinality(lease_ids);
  slots constant integer := request.slots[1];
  may_wait constant boolean := request.timeout_seconds is distinct from 0;
  state pglimits.states := pglimits._lock(request.limit_ids[1], request.keys[1], request.at_once);
  now constant timestamptz := pglimits._now();
  deadline constant timestamptz := coalesce(now + request.timeout_seconds * interval '1 second', 'infinity');
  rate constant double precision := state.slot_decay_per_second;
  decayed double precision;
  booked double precision;
  before record;
  granted integer := 0;
  in_time integer := 0;
  waiting integer := 0;
  seconds double precision[];
  outcome pglimits._outcome;
begin
  if state.active is not true or pglimits._is_hopeless(state."limit", rate, slots, request.for_rate)
     or again and pglimits._is_known(lease_ids)
  then
    return;
  end if;
  if may_wait and state.waiting > 0 and state.waiting + many > state.max_waiters then
    state := pglimits._bury(state, now);
    state.next_look := now;  -- of those who live, somebody may have come to the head
  end if;
  if now >= state.next_look then
    perform pglimits._serve(state, now, told);
    state := pglimits._reload(state.limit_id, state.key);
  elsif now >= state.next_expiry then
    state := pglimits._take_expired(state, now);
  end if;
  decayed := pglimits._decayed(state.decayed, rate, state.decayed_at, now);
  booked := greatest(state.booked, decayed);

  -- The first that fit go at once, or at their moments within the horizon, if nobody is before them.
  if state."limit" > 0 and (state.waiting = 0 or state.head_rank > request.rank) then
    granted := case when request.for_rate then many else least(many, greatest(state."limit" - state.held, 0) / slots) end;
    if rate > 0 then
      -- The level first, which is 0 without rounding where nothing is used.
      granted := least(granted, greatest(floor((
        pglimits._decayed(state.decayed, rate, state.decayed_at,
                          case when may_wait and (state.waiting < state.max_waiters) is not false
                               then least(now + pglimits._horizon(), deadline) else now end)
        - booked + pglimits._millionths(state."limit")) / pglimits._millionths(slots)), 0));
    end if;
  end if;
  if granted > 0 then
    for i in 1 .. granted loop
      seconds[i] := case when rate > 0 then pglimits._seconds_until(
        booked + pglimits._millionths(slots::bigint * i - state."limit"), decayed, rate) else 0 end;
    end loop;
    outcome := row(1, granted, 'granted', state.version + 1,
                   now + (seconds[1] + request.lease_duration) * interval '1 second', seconds)::pglimits._outcome;
    if seconds[1] > 0 and not told then
      outcome.status := 'queued';
      outcome.last := 1;
      granted := 1;
      state := pglimits._take(
        state, lease_ids[1], slots, request.rank, case when not request.for_rate then request.lease_duration end,
        holders -> 0, 1, now + seconds[1] * interval '1 second', false,
        now + seconds[1] * interval '1 second' + pglimits._liveness(), now);
    else
      if not request.for_rate then
        insert into pglimits.leases (
          lease_id, limit_id, key, slots, used, holder, fence, priority, lease_duration, claimed, parts, acquired_at, expires_at)
        select u.lease_id, state.limit_id, state.key, slots, case when rate > 0 then slots end, nullif(holders -> (u.nth - 1)::integer, 'null'),
               state.version + u.nth, -request.rank, request.lease_duration, true, 1,
               now + seconds[u.nth] * interval '1 second',
               now + (seconds[u.nth] + request.lease_duration) * interval '1 second'
        from unnest(lease_ids[1:granted]) with ordinality as u(lease_id, nth);
        state.held := state.held + slots * granted;
        state.next_expiry := least(state.next_expiry, outcome.expires_at);
      end if;
      state.version := state.version + granted;
      state.grants := state.grants + granted;
      state.granted_slots := state.granted_slots + slots::bigint * granted;
      if seconds[granted] > 0 then
        for i in 1 .. granted loop
          continue when seconds[i] = 0;
          state := pglimits._count_wait(state, seconds[i]);
        end loop;
      end if;
      if rate > 0 then
        state.booked := booked + pglimits._millionths(slots::bigint * granted);
      end if;
    end if;
    return next outcome;
  end if;

  -- The others stand in line, as far as it can be their turn in time, and as the line has room.
  if granted < many then
    before := pglimits._before(state, request.rank, 'infinity');
    if may_wait then
      in_time := many - granted;
      if rate > 0 and state."limit" > 0 and request.timeout_seconds is not null then
        in_time := least(in_time, greatest(floor((
          pglimits._decayed(state.decayed, rate, state.decayed_at, deadline) - greatest(state.booked, decayed)
          + pglimits._millionths(state."limit" - before.slots))
          / pglimits._millionths(slots)), 0));
      end if;
      waiting := in_time;
      if state.waiting + waiting > state.max_waiters then
        waiting := greatest(state.max_waiters - state.waiting, 0);
      end if;
    end if;
    if waiting > 0 then
      seconds := null;
      for i in 1 .. waiting loop
        seconds[i] := pglimits._looks_in(state, before.slots + slots::bigint * (i - 1), slots, request.for_rate, now);
      end loop;
      state := pglimits._stand(
        state, request, lease_ids[granted + 1:granted + waiting], holders, granted, slots, null,
        greatest(now, state.last_arrival + interval '1 microsecond'), deadline, seconds, now);
      return next row(granted + 1, granted + waiting, 'queued', null, null, seconds)::pglimits._outcome;
    end if;
    if waiting < in_time then
      return next row(granted + waiting + 1, many, 'full', null, null, null)::pglimits._outcome;
    elsif granted + waiting < many then
      seconds := array[case
        when rate > 0 and pglimits._ready_at(state, slots, request.for_rate, now) < 'infinity'
        then date_part('epoch', pglimits._moment(state, before.slots + slots::bigint * (waiting + 1), now) - now) end];
      return next row(granted + waiting + 1, many, 'refused', null, null, seconds)::pglimits._outcome;
    end if;
  end if;
  perform pglimits._save(state, now);
end $$;

comment on function pglimits._decide(pglimits._request, uuid[], jsonb, boolean, boolean) is
  'Grants requests that are alike, puts them in line, or refuses them; no outcome: ask again.';

-- One over several limits.
create or replace function pglimits._decide_several(
  request pglimits._request, lease_id uuid, holders jsonb, again boolean, told boolean)
returns pglimits._outcome
language plpgsql
volatile
as $$
declare
  many constant integer := cardinality(request.keys);
  states pglimits.states[];
  state pglimits.states;
  now timestamptz;
  arrival timestamptz;
  before record;
  ready_at timestamptz;
  blocked integer;
  seconds double precision := 0;
  by_time boolean := true;
  parts pglimits._part[];
begin
  if not pglimits._lock_all(request.limit_ids, request.keys, request.at_once) or again and pglimits._is_known(array[lease_id]) then
    return null;
  end if;
  now := pglimits._now();
  for p in 1 .. many loop
    state := pglimits._reload(request.limit_ids[p], request.keys[p]);
    if not state.active
       or pglimits._is_hopeless(state."limit", state.slot_decay_per_second, request.slots[p], request.for_rate)
    then
      return null;
    elsif now >= least(state.next_look, state.next_expiry) then
      perform pglimits._serve(state, now, told);
    end if;
  end loop;
  arrival := now;
  for p in 1 .. many loop
    states[p] := pglimits._reload(request.limit_ids[p], request.keys[p]);
    arrival := greatest(arrival, (states[p]).last_arrival + interval '1 microsecond');
    parts[p] := row(request.limit_ids[p], request.keys[p], request.slots[p])::pglimits._part;
  end loop;

  for p in 1 .. many loop
    state := states[p];
    before := pglimits._before(state, request.rank, arrival);
    ready_at := pglimits._ready_at(state, request.slots[p], request.for_rate, now);
    if before.waiters > 0 or ready_at > now then
      blocked := coalesce(blocked, p);
      by_time := by_time and state.slot_decay_per_second > 0 and ready_at < 'infinity';
    end if;
    if state.slot_decay_per_second > 0 and state."limit" > 0 then
      seconds := greatest(seconds, date_part('epoch', pglimits._moment(state, before.slots + request.slots[p], now) - now));
    end if;
  end loop;

  if blocked is null then
    for p in 1 .. many loop
      if request.for_rate then
        states[p].booked := pglimits._book(states[p], request.slots[p], now);
        states[p].grants := (states[p]).grants + 1;
        states[p].granted_slots := (states[p]).granted_slots + request.slots[p];
      else
        states[p] := pglimits._take(
          states[p], lease_id, request.slots[p], request.rank, request.lease_duration, holders -> 0, many, now, true,
          now + request.lease_duration * interval '1 second', null);
      end if;
      perform pglimits._save(states[p], now);
    end loop;
    return row(1, 1, 'granted', null, now + request.lease_duration * interval '1 second', array[0])::pglimits._outcome;
  elsif request.timeout_seconds = 0 or seconds > request.timeout_seconds then
    return row(1, 1, 'refused', null, null, array[case when by_time then seconds end])::pglimits._outcome;
  end if;

  state := states[blocked];
  if state.waiting >= state.max_waiters then
    state := pglimits._bury(state, now);
    if state.waiting >= state.max_waiters then
      perform pglimits._save(state, now);
      return row(1, 1, 'full', null, null, null)::pglimits._outcome;
    end if;
  end if;
  before := pglimits._before(state, request.rank, arrival);
  state := pglimits._stand(
    state, request, array[lease_id], holders, 0, request.slots[blocked], parts, arrival,
    coalesce(now + request.timeout_seconds * interval '1 second', 'infinity'),
    array[pglimits._looks_in(state, before.slots, request.slots[blocked], request.for_rate, now)], now);
  for p in 1 .. many loop
    if p <> blocked then
      states[p].last_arrival := greatest((states[p]).last_arrival, arrival);
      perform pglimits._save(states[p], now);
    end if;
  end loop;
  perform pglimits._serve(state, now, told, lease_id);
  return pglimits._answer_known(lease_id, told);
end $$;

comment on function pglimits._decide_several(pglimits._request, uuid, jsonb, boolean, boolean) is
  'Grants a request over several limits, puts it in a line, or refuses it; null: ask again.';
