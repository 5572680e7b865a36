-- Requests over several limits, all or nothing: in which line they stand, and how they are granted.
--
-- Such a request stands, with its arrival, in one line at a time. At the head of that:
--   where somebody older waits for another of its limits, or another cannot be had soon, it goes to stand there;
--   else it is the oldest everywhere, and is granted on all as of their joint moment, if that lies within the horizon or the slowest
--   of its limits has come so far (what decays until then goes to others who wait); else it goes to stand on the slowest.
-- A rate limit can be had soon if its moment is ahead by no more than the horizon and a quarter of the time that the request has waited:
-- nothing is booked far ahead for one that came just now.
-- So it is served by age like everybody else. But where all its limits are always in use, it would never find them free at the same
-- moment: as it goes to wait for one, what it has found free of the others is kept for it for a quarter of the time that it has waited.
--
-- Invariant: it has a row in one line only. Other states than that of its line are locked if that does not take any waiting.
-- Called by: _serve, for heads of that kind.

-- The head of a line whose state has room for it. The state comes back changed, unless the head stays: then it was told to look for
-- itself, as another of its states is in use, or must not be locked by this transaction.
create or replace function pglimits._serve_several(
  inout state pglimits.states, lease_id uuid, lives_until timestamptz, now timestamptz, own boolean,
  out stays boolean)
language plpgsql
volatile
as $$
declare
  mine pglimits.queue;
  part pglimits._part;
  other pglimits.states;
  states pglimits.states[];
  here integer;
  ready timestamptz[];
  joint timestamptz := now;
  had boolean[];
  kept boolean[];
  enforced integer := 0;
  slowest integer;
  takes double precision;
  takes_longest double precision := 0;
  older integer;
  wanting integer;
  target integer;
begin
  select q.* into mine from pglimits.queue q
  where q.lease_id = _serve_several.lease_id
    and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
  -- First all locks, then all changes.
  for p in 1 .. cardinality(mine.parts) loop
    part := mine.parts[p];
    if (part.limit_id, part.key) = (state.limit_id, state.key) then
      here := p;
      states[p] := state;
      continue;
    elsif not exists (select from pglimits.configs c where c.limit_id = part.limit_id and c.active) then
      continue;  -- not enforced by now
    end if;
    other := null;
    if own then
      select s.* into other from pglimits.states s
      where s.limit_id = part.limit_id and s.key = part.key order by s.generation desc limit 1 for update skip locked;
    end if;
    if other.limit_id is null then
      stays := true;
      if mine.looks_at > now then
        update pglimits.queue q set looks_at = now
        where q.lease_id = mine.lease_id
          and q.limit_id is not distinct from mine.limit_id and q.key is not distinct from mine.key;
        perform pglimits._tell(mine.channel, mine.lease_id::text);
      end if;
      return;
    end if;
    states[p] := other;
  end loop;
  stays := false;

  for p in 1 .. cardinality(mine.parts) loop
    continue when (states[p]).active is not true;
    part := mine.parts[p];
    other := states[p];
    if p = here then
      part.slots := mine.slots;
    elsif mine.clamp and other."limit" > 0 then
      part.slots := least(part.slots, other."limit");
    end if;
    mine.parts[p] := part;
    enforced := enforced + 1;
    if p <> here then
      if now >= other.next_expiry then
        other := pglimits._take_expired(other, now);
      end if;
      states[p] := pglimits._take_back(other, mine.lease_id);
      had[p] := (states[p]).held < other.held;
      other := states[p];
      if other.waiting > 0 and (pglimits._before(other, mine.rank, mine.arrival)).waiters > 0 then
        older := coalesce(older, p);
      end if;
    end if;
    ready[p] := pglimits._ready_at(other, part.slots, mine.lease_duration is null, now);
    joint := greatest(joint, ready[p]);
    takes := case when other.slot_decay_per_second > 0 then part.slots / other.slot_decay_per_second else 0 end;
    -- Full of leases; or it would be booked further ahead than this limit takes for it, or than a quarter of the time it has waited
    -- (it may have arrived a moment after now: of those who come together, each arrives a microsecond after the one before).
    if p <> here and ready[p] > now + pglimits._horizon() + least(takes * interval '1 second', (now - mine.arrival) / 4) then
      wanting := coalesce(wanting, p);
    end if;
    if takes > takes_longest then
      takes_longest := takes;
      slowest := p;
    end if;
  end loop;
  target := coalesce(older, wanting, case when slowest <> here and ready[slowest] > now + pglimits._horizon() then slowest end);
  if target is null and mine.lease_duration is null then
    for p in 1 .. cardinality(mine.parts) loop
      continue when p = here or ready[p] is null;
      states[p] := pglimits._serve_before(states[p], (mine.parts[p]).slots, joint, now);
    end loop;
  end if;

  if target is null and joint <= mine.deadline then
    states[here] := pglimits._leave(states[here], mine.lease_id);
    for p in 1 .. cardinality(mine.parts) loop
      continue when ready[p] is null;
      part := mine.parts[p];
      states[p] := pglimits._take(
        states[p], mine.lease_id, part.slots, mine.rank, mine.lease_duration, mine.holder, enforced, joint, false,
        case when mine.lease_duration is null then joint + pglimits._liveness()
             else least(lives_until, joint + mine.lease_duration * interval '1 second') end, mine.arrival);
    end loop;
    if mine.lease_duration is null then
      perform pglimits._be_durable();  -- a lease is claimed first
    end if;
    perform pglimits._tell(mine.channel, mine.lease_id::text);
  elsif target is null then
    states[here] := pglimits._time_out(states[here], mine.lease_id, now);
    perform pglimits._tell(mine.channel, mine.lease_id::text);
  else
    states[here] := pglimits._shorten(states[here], (mine.parts[here]).slots);
    states[target] := pglimits._stand_again(states[target], mine, mine.parts[target], lives_until, now);
    for p in 1 .. cardinality(mine.parts) loop
      if older is null and target <> p and mine.lease_duration is not null
         and ready[p] <= now + pglimits._horizon() and now > mine.arrival + pglimits._horizon()
      then
        states[p] := pglimits._keep(states[p], mine.lease_id, (mine.parts[p]).slots, mine.rank, enforced, now,
                                    now + (now - mine.arrival) / 4);
        kept[p] := true;
      end if;
    end loop;
  end if;

  for p in 1 .. cardinality(mine.parts) loop
    continue when p = here or (states[p]).limit_id is null;
    if (states[p]).waiting > 0 and (had[p] or kept[p]) then
      -- Whoever waits there gets what is given up, or is told when that which is kept comes free.
      perform pglimits._serve(states[p], now, false);
    else
      perform pglimits._save(states[p], now);
    end if;
  end loop;
  state := states[here];
end $$;

comment on function pglimits._serve_several(pglimits.states, uuid, timestamptz, timestamptz, boolean) is
  'Grants the head of a line that needs other limits too, or has it go to stand in the line of one of these.';

-- What decays on a rate limit until the moment at which a request over several goes would be lost. So those who wait for this one alone get
-- it, though they came later: as far as that does not put off the one over several.
create or replace function pglimits._serve_before(state pglimits.states, slots integer, moment timestamptz, now timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
begin
  if state.waiting > 0 and state.slot_decay_per_second > 0
     and state.booked < pglimits._decayed(state.decayed, state.slot_decay_per_second, state.decayed_at, moment)
  then
    perform pglimits._serve(state, now, false, null, moment - interval '1 second' * pglimits._seconds_until(
      pglimits._millionths(slots), 0, state.slot_decay_per_second));
    return pglimits._reload(state.limit_id, state.key);
  end if;
  return state;
end $$;

comment on function pglimits._serve_before(pglimits.states, integer, timestamptz, timestamptz) is
  'Grants those who wait for one of the limits of a request over several what would be lost by its moment; returns the state.';

-- Goes to stand in another line, by its arrival.
create or replace function pglimits._stand_again(
  state pglimits.states, mine pglimits.queue, part pglimits._part, lives_until timestamptz, now timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  before constant record := pglimits._before(state, mine.rank, mine.arrival);
  looks_in constant double precision := pglimits._looks_in(
    state, before.slots, part.slots, mine.lease_duration is null, now);
  due_at constant timestamptz := now + looks_in * interval '1 second';
begin
  update pglimits.queue q
  set limit_id = state.limit_id, key = state.key, slots = part.slots, looks_at = least(due_at, q.looks_at)
  where q.lease_id = mine.lease_id
    and q.limit_id is not distinct from mine.limit_id and q.key is not distinct from mine.key;
  if due_at < least(mine.looks_at, now + pglimits._heartbeat_every()) then
    perform pglimits._tell(mine.channel, mine.lease_id || ' ' || (looks_in * 1000000)::bigint);
  end if;
  return pglimits._lengthen(state, mine.rank, mine.arrival, 1, part.slots, least(due_at, lives_until));
end $$;

comment on function pglimits._stand_again(pglimits.states, pglimits.queue, pglimits._part, timestamptz, timestamptz) is
  'Has a request over several limits stand in another line than before.';
