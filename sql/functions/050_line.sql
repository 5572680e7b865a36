-- The line of a (limit, key): who waits, in order of priority and arrival, for acquire and rate_limit, over one limit and over several.
--
-- Whoever looks serves it: from the head on, all are granted whose moment has come or comes within the horizon, each as of its moment
-- and told how long to sleep. Nothing is reserved beyond. A request over several limits stands in one line at a time (055_several.sql).
-- Every waiter is told when to look, should it hear nothing before; so a process that dies at the head delays nobody.
--
-- Invariant: waiting and waiting_slots count the rows of the queue, and nobody stands before (head_rank, head_arrival). Whoever leaves
-- a line from its head, frees slots, or changes what fits has it served in the same transaction.
-- Called by: whoever decides, releases, changes a limit or looks, with the state locked.

-- A hint, which may be lost: what is true is in the tables. The text begins with the id that it is about. That alone: look. A number:
-- look in so many microseconds. A fence, microseconds to sleep, the end of the lease in microseconds since 1970: granted.
create or replace function pglimits._tell(channel text, message text)
returns void
language sql
volatile
return case when channel is not null then pg_notify(channel, message) end;

comment on function pglimits._tell(text, text) is 'Notifies a waiting process about one of its requests.';

-- Whoever is granted by another's transaction, and goes as soon as it is told, goes by what is on disk: whatever the one that frees the
-- slots wants for itself (Limiter(durable=False), the procedures), a crash must not forget that they are taken again.
create or replace function pglimits._be_durable()
returns void
language plpgsql
volatile
as $$
begin
  if current_setting('synchronous_commit') = 'off' then
    perform set_config('synchronous_commit', 'on', true);
  end if;
end $$;

comment on function pglimits._be_durable() is 'Has the transaction that calls it commit with synchronous_commit = on.';

-- How many stand before a place in a line, which may be taken, and what they wait for. Who is last, or comes last, need not count.
create or replace function pglimits._before(
  state pglimits.states, rank integer, arrival timestamptz, out waiters integer, out slots bigint)
language plpgsql
volatile
as $$
declare
  here record;
begin
  waiters := state.waiting;
  slots := state.waiting_slots;
  if waiters = 0 then
    return;
  end if;
  select count(*) as others, bool_or(x.is_it) as is_taken, sum(x.slots) as slots into here from (
    select (q.rank, q.arrival) = (_before.rank, _before.arrival) as is_it, q.slots from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and (q.rank, q.arrival) >= (_before.rank, _before.arrival)
    order by q.rank, q.arrival limit 2) x;
  if here.others = 1 and here.is_taken then
    waiters := waiters - 1;
    slots := slots - here.slots;
  elsif here.others > 0 then
    select count(*), coalesce(sum(x.slots), 0) into waiters, slots from (
      select q.slots from pglimits.queue q
      where q.limit_id = state.limit_id and q.key = state.key and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)
        and (q.rank, q.arrival) < (_before.rank, _before.arrival)
      order by q.rank, q.arrival offset 0) x;
  end if;
end $$;

comment on function pglimits._before(pglimits.states, integer, timestamptz) is
  'How many stand before a place in a line, and how many slots they wait for.';

-- Seconds until a request is to look that has so many slots before it: half a horizon before the earliest moment at which it can be
-- its turn. Null: only a release can tell, and the heartbeat looks.
create or replace function pglimits._looks_in(
  state pglimits.states, slots_before bigint, slots integer, for_rate boolean, now timestamptz)
returns double precision
language plpgsql
volatile
as $$
declare
  at timestamptz;
begin
  if state."limit" = 0 then
    return null;
  elsif state.slot_decay_per_second > 0 and (slots_before > 0 or for_rate or state.held::bigint + slots <= state."limit") then
    at := pglimits._moment(state, slots_before + slots, now) - pglimits._horizon() / 2;
    if slots_before > 0 and at <= now then
      return null;  -- it is not the level that whoever is before it waits for
    end if;
  elsif slots_before = 0 then
    -- Not at once, where whoever renews or releases a lease that has ended has it locked.
    at := greatest(state.next_expiry, now + pglimits._horizon() / 10);
  end if;
  return case when at < 'infinity' then greatest(date_part('epoch', at - now), 0) end;
end $$;

comment on function pglimits._looks_in(pglimits.states, bigint, integer, boolean, timestamptz) is
  'Seconds until somebody in a line is to look, by who is before it; null where time alone cannot tell.';

-- Puts requests that are alike in line, one behind the other.
create or replace function pglimits._stand(
  state pglimits.states, request pglimits._request, lease_ids uuid[], holders jsonb, skipped integer, slots integer,
  parts pglimits._part[], arrival timestamptz, deadline timestamptz, looks_in double precision[], now timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  many constant integer := cardinality(lease_ids);
begin
  insert into pglimits.queue (
    lease_id, limit_id, key, slots, rank, arrival, parts, clamp, lease_duration, holder, channel, deadline, looks_at, expires_at)
  select u.lease_id, state.limit_id, state.key, _stand.slots, request.rank, arrival + (u.nth - 1) * interval '1 microsecond',
         _stand.parts, request.clamp, case when not request.for_rate then request.lease_duration end,
         nullif(holders -> (skipped + u.nth - 1)::integer, 'null'), request.channel, _stand.deadline,
         coalesce(now + looks_in[u.nth] * interval '1 second', 'infinity'), now + pglimits._liveness()
  from unnest(lease_ids) with ordinality as u(lease_id, nth);
  return pglimits._lengthen(state, request.rank, arrival, many, slots, least(now + looks_in[1] * interval '1 second',
                                                                             now + pglimits._liveness()));
end $$;

comment on function pglimits._stand(
  pglimits.states, pglimits._request, uuid[], jsonb, integer, integer, pglimits._part[], timestamptz, timestamptz,
  double precision[], timestamptz) is
  'Puts requests that are alike in line. skipped: so many of holders belong to others. looks_in: seconds until each is to look.';

-- Counts requests that are alike and stand in line now, from a place on.
create or replace function pglimits._lengthen(
  state pglimits.states, rank integer, arrival timestamptz, many integer, slots integer, next_look timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
begin
  if state.waiting = 0 or (rank, arrival) < (state.head_rank, state.head_arrival) then
    state.head_rank := rank;
    state.head_arrival := arrival;
    state.next_look := next_look;
  end if;
  state.waiting := state.waiting + many;
  state.waiting_slots := state.waiting_slots + slots::bigint * many;
  state.last_arrival := greatest(state.last_arrival, arrival + (many - 1) * interval '1 microsecond');
  return state;
end $$;

comment on function pglimits._lengthen(pglimits.states, integer, timestamptz, integer, integer, timestamptz) is
  'Counts those who have come to stand in a line. next_look: when it is to be served, if the first of them is its head.';

-- Counts one less in line.
create or replace function pglimits._shorten(state pglimits.states, slots integer)
returns pglimits.states
language plpgsql
immutable
as $$
begin
  state.waiting := state.waiting - 1;
  state.waiting_slots := state.waiting_slots - slots;
  return state;
end $$;

comment on function pglimits._shorten(pglimits.states, integer) is 'Counts one less in a line.';

-- Takes a request out of the line.
create or replace function pglimits._leave(state pglimits.states, lease_id uuid)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  slots integer;
begin
  delete from pglimits.queue q
  where q.lease_id = _leave.lease_id
    and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
  returning q.slots into slots;
  return case when found then pglimits._shorten(state, slots) else state end;
end $$;

comment on function pglimits._leave(pglimits.states, uuid) is 'Takes a request out of the line of a (limit, key).';

-- Notes for a while that a request is refused, as it may ask again. The caller sees to next_expiry.
create or replace function pglimits._note_refused(limit_id bigint, key text, lease_id uuid, now timestamptz)
returns void
language sql
volatile
begin atomic
  insert into pglimits.leases (
    lease_id, limit_id, key, slots, fence, priority, lease_duration, claimed, parts, acquired_at, expires_at)
  values (lease_id, limit_id, key, 0, 0, 0, 0, true, 1, now, now + pglimits._liveness());
end;

comment on function pglimits._note_refused(bigint, text, uuid, timestamptz) is 'Has a request that was taken out of the line refused when it asks again.';

-- Takes a request out of the line whose time is over.
create or replace function pglimits._time_out(state pglimits.states, lease_id uuid, now timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
begin
  perform pglimits._note_refused(state.limit_id, state.key, lease_id, now);
  state.next_expiry := least(state.next_expiry, now + pglimits._liveness());
  return pglimits._leave(state, lease_id);
end $$;

comment on function pglimits._time_out(pglimits.states, uuid, timestamptz) is
  'Takes a request out of the line that cannot be granted before its deadline.';

-- Takes the dead out of the line, wherever they stand in it. Elsewhere they count until they come to its head.
create or replace function pglimits._bury(state pglimits.states, now timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  gone record;
begin
  with dead as (
    delete from pglimits.queue q
    where q.lease_id = any (array(
        select w.lease_id from pglimits.queue w
        where w.limit_id = state.limit_id and w.key = state.key and (w.rank, w.arrival) >= (state.head_rank, state.head_arrival)
          and w.expires_at <= now
        order by w.rank, w.arrival))
      and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key and q.expires_at <= now
      and not exists (select from pglimits.processes p where p.channel = q.channel and p.expires_at > now offset 0)
    returning q.slots
  )
  select count(*)::integer as waiters, coalesce(sum(d.slots), 0)::bigint as slots into gone from dead d;
  state.waiting := state.waiting - gone.waiters;
  state.waiting_slots := state.waiting_slots - gone.slots;
  return state;
end $$;

comment on function pglimits._bury(pglimits.states, timestamptz) is 'Takes those out of a line who have died.';

-- How many of a line have died and count as waiting still. For whoever looks without a lock, the views too.
create or replace function pglimits._dead_waiters(
  limit_id bigint, key text, head_rank integer, head_arrival timestamptz, now timestamptz)
returns bigint
language plpgsql
stable
cost 1
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select count(*) from (
      select q.expires_at, q.channel from pglimits.queue q
      where q.limit_id = _dead_waiters.limit_id and q.key = _dead_waiters.key
        and (q.rank, q.arrival) >= (_dead_waiters.head_rank, _dead_waiters.head_arrival)
      order by q.rank, q.arrival offset 0) x
    where greatest(x.expires_at, (select p.expires_at from pglimits.processes p where p.channel = x.channel)) <= _dead_waiters.now);
end $$;

comment on function pglimits._dead_waiters(bigint, text, integer, timestamptz, timestamptz) is
  'How many of a line have died and were not taken out yet.';

-- Serves a line, strictly in order, so that a wide request is not starved by narrow ones; sees to it that whoever is left at its head
-- knows when to look; and saves the state.
-- own: this transaction is nobody else's, and so may lock other states for a head that needs them. mine: for this one, whoever
-- calls has them locked already. until: whose moment comes later is not granted yet; null: beyond the horizon.
create or replace function pglimits._serve(
  state pglimits.states, now timestamptz, own boolean, mine uuid default null, until timestamptz default null)
returns void
language plpgsql
volatile
as $$
declare
  head record;
  step record;
  ready_at timestamptz;
  ends timestamptz;
  looks_in double precision;
  due_at timestamptz;
  channels text[];
  messages text[];
begin
  if now >= state.next_expiry then
    state := pglimits._take_expired(state, now);
  end if;
  state.next_look := timestamptz 'infinity';
  loop
    select q.*, greatest(q.expires_at, (
      select p.expires_at from pglimits.processes p where p.channel = q.channel)) as lives_until into head
    from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and (q.rank, q.arrival) >= (state.head_rank, state.head_arrival)
    order by q.rank, q.arrival limit 1;
    exit when not found;
    state.head_rank := head.rank;
    state.head_arrival := head.arrival;
    if head.parts is not null then
      state := pglimits._take_back(state, head.lease_id);
    end if;
    ready_at := pglimits._ready_at(state, head.slots, head.lease_duration is null, now);

    if head.lives_until <= now then
      state := pglimits._leave(state, head.lease_id);
    elsif pglimits._is_hopeless(state."limit", state.slot_decay_per_second, head.slots, head.lease_duration is null) then
      -- It is told, asks again, and hears why.
      state := pglimits._leave(state, head.lease_id);
      perform pglimits._tell(head.channel, head.lease_id::text);
    elsif head.deadline <= now or head.deadline < ready_at and ready_at < 'infinity' then
      state := pglimits._time_out(state, head.lease_id, now);
      perform pglimits._tell(head.channel, head.lease_id::text);
    elsif ready_at > coalesce(until, now + pglimits._horizon()) then
      looks_in := pglimits._looks_in(state, 0, head.slots, head.lease_duration is null, now);
      exit;
    elsif head.parts is not null then
      step := pglimits._serve_several(state, head.lease_id, head.lives_until, now, own or head.lease_id = mine);
      state := step.state;
      if step.stays then
        looks_in := null;
        exit;
      end if;
    else
      -- A lease that is handed over ends when its waiter would have died, until that claims it: so a dead process does not hold a
      -- slot for a whole lease.
      ends := case when head.lease_duration is null then ready_at + pglimits._liveness()
                   else least(head.lives_until, ready_at + head.lease_duration * interval '1 second') end;
      state := pglimits._leave(state, head.lease_id);
      state := pglimits._take(state, head.lease_id, head.slots, head.rank, head.lease_duration, head.holder, 1, ready_at, false,
                              ends, head.arrival);
      -- A lease is claimed, in a transaction of its waiter's, before that is told by plain SQL.
      if head.channel is not null or head.lease_duration is null then
        perform pglimits._be_durable();
      end if;
      if head.channel is not null then
        channels := channels || head.channel;
        messages := messages || format('%s %s %s %s', head.lease_id, state.version,
          (date_part('epoch', ready_at - now) * 1000000)::bigint, (date_part('epoch', ends) * 1000000)::bigint);
      end if;
    end if;
  end loop;

  if head.lease_id is not null then
    due_at := now + looks_in * interval '1 second';
    state.next_look := least(due_at, head.lives_until);
    -- The heartbeat is soon enough for what is further ahead; and what it was told before now, it has done.
    if due_at < least(case when head.looks_at > now then head.looks_at - pglimits._horizon() / 20 end,
                      now + pglimits._heartbeat_every()) then
      update pglimits.queue q set looks_at = due_at
      where q.lease_id = head.lease_id
        and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key;
      perform pglimits._tell(head.channel, head.lease_id || ' ' || (looks_in * 1000000)::bigint);
    end if;
  end if;
  perform pglimits._save(state, now);

  if cardinality(channels) = 1 then
    perform pg_notify(channels[1], messages[1]);
  elsif channels is not null then
    -- One notification for each process, which holds some 80 of them.
    perform pg_notify(m.channel, string_agg(m.message, e'\n'))
    from (select u.channel, u.message, (row_number() over (partition by u.channel order by u.nth) - 1) / 80 as packet
          from unnest(channels, messages) with ordinality as u(channel, message, nth)) m
    group by m.channel, m.packet;
  end if;
end $$;

comment on function pglimits._serve(pglimits.states, timestamptz, boolean, uuid, timestamptz) is
  'Grants from the head of a line what fits, tells whoever stays there when to look, and saves the state.';
