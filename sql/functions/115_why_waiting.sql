-- Why somebody waits: for whoever asks.
--
-- Invariant: it only reads, and locks nothing.
-- Called by: anybody who was granted pglimits_reader.

create or replace function pglimits.why_waiting(name text)
returns table (lease_id uuid, key text, "position" integer, blocked_by text, reason text, earliest timestamptz)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  now constant timestamptz := pglimits._now();
  of_limit bigint;
  waiter record;
  state pglimits.states;
  held bigint;
  needs text;
begin
  perform pglimits._check(pglimits._name_fault('name', why_waiting.name));
  of_limit := pglimits._limit_id(why_waiting.name);
  for waiter in
    with places as (
      -- The lines of this limit, and those in which somebody stands who needs this limit too.
      select s.limit_id, s.key from pglimits.states s where s.limit_id = of_limit and s.waiting > 0
      union
      select q.limit_id, q.key from pglimits.queue q cross join lateral unnest(q.parts) p
      where p.limit_id = of_limit
    )
    select q.*, row_number() over line as nth, sum(q.slots) over line - q.slots as slots_before,
           exists (select from unnest(q.parts) p where p.limit_id = of_limit) as needs_it
    from places x
    cross join lateral (select w.* from pglimits.queue w where w.limit_id = x.limit_id and w.key = x.key
                        order by w.rank, w.arrival offset 0) q
    where greatest(q.expires_at, (select p.expires_at from pglimits.processes p where p.channel = q.channel)) > now
    window line as (partition by q.limit_id, q.key order by q.rank, q.arrival)
    order by q.limit_id <> of_limit, q.key, nth
  loop
    continue when waiter.limit_id <> of_limit and not waiter.needs_it;
    if state.limit_id is distinct from waiter.limit_id or state.key is distinct from waiter.key then
      state := pglimits._reload(waiter.limit_id, waiter.key);
      held := state.held - pglimits._ended_slots(state.limit_id, state.key, state.next_expiry, now);
    end if;
    lease_id := waiter.lease_id;
    key := waiter.key;
    "position" := waiter.nth;
    blocked_by := state.name;
    earliest := null;
    needs := case when waiter.slots = 1 then 'it needs 1 slot' else format('it needs %s slots', waiter.slots) end;
    if state.slot_decay_per_second > 0 and state."limit" > 0 then
      earliest := pglimits._moment(state, waiter.slots_before + waiter.slots, now);
    end if;
    if state."limit" = 0 then
      reason := format('limit ''%s'' is shut: it has 0 slots', state.name);
    elsif waiter.nth > 1 then
      reason := format('it stands behind %s in the line of ''%s''', case when waiter.nth = 2 then '1 other' else (waiter.nth - 1) || ' others' end,
                       state.name);
    elsif waiter.lease_duration is not null and held + waiter.slots > state."limit" then
      reason := format('%s of ''%s'', and %s of %s are held', needs, state.name, held, state."limit");
      earliest := null;
    elsif earliest > now then
      reason := format('%s of ''%s'', whose level has to decay first', needs, state.name);
    elsif waiter.parts is not null then
      reason := format('%s of ''%s'', and waits for the other limits that it needs', needs, state.name);
    else
      reason := format('it is about to be granted by ''%s''', state.name);
    end if;
    earliest := nullif(earliest, 'infinity');
    return next;
  end loop;
end $$;

comment on function pglimits.why_waiting(text) is
$$Lists the requests that wait for a limit, in order, and why.

lease_id: that of the request. key: of the line in which it stands. position: in that line, from 1. blocked_by: the limit of that line,
which may be another limit that the request needs too; such requests come last. reason: a sentence. earliest: its turn does not come
before; null where only a release can tell.

Errors: PL001 a bad argument, PL002 no such limit.$$;
