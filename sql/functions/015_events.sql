-- Events: what happened to limits and leases, for whoever asks afterwards.
--
-- Invariant: an event is written in the transaction that does what it tells, so neither is there without the other. The sweep keeps the
-- table short. Whoever listens on the channel pglimits_events hears that there are new ones; ids may become visible out of order.
-- Called by: whatever changes a limit, ends a lease that its holder did not end, or finds that one came back too late.

-- old and new: what was changed.
create or replace function pglimits._note(kind text, name text, key text, old jsonb, new jsonb, now timestamptz)
returns void
language plpgsql
volatile
as $$
begin
  perform pglimits._number_events();
  insert into pglimits.event_log (at, kind, name, key, old, new, session, on_behalf_of)
  values (now, kind, name, key, old, new, pglimits._session(), pglimits._on_behalf_of());
  perform pg_notify('pglimits_events', '');
end $$;

comment on function pglimits._note(text, text, text, jsonb, jsonb, timestamptz) is 'Writes an event about a limit.';

-- ended: rows of leases, which may be gone by now. Those that are no leases (what became of a request, what is kept for one) are passed over.
create or replace function pglimits._note_leases(kind text, name text, ended pglimits.leases[], now timestamptz)
returns void
language plpgsql
volatile
as $$
begin
  perform pglimits._number_events();
  insert into pglimits.event_log (
    at, kind, name, key, lease_id, slots, fence, holder, held_seconds, session, on_behalf_of)
  select now, _note_leases.kind, _note_leases.name, e.key, e.lease_id, e.slots, e.fence,
         coalesce(e.holder, pglimits._as_holder(e.session)),
         case when e.acquired_at < now then date_part('epoch', least(e.expires_at, now) - e.acquired_at) end, pglimits._session(),
         pglimits._on_behalf_of()
  from unnest(ended) e
  where e.fence is distinct from 0 and e.slots > 0
  order by e.expires_at;
  if found then
    perform pg_notify('pglimits_events', '');
  end if;
end $$;

comment on function pglimits._note_leases(text, text, pglimits.leases[], timestamptz) is
  'Writes an event about each of some leases, or (without a fence) of some requests in line.';

-- A restore, or logical replication, brings events without the sequence that numbers them.
create or replace function pglimits._number_events()
returns void
language plpgsql
volatile
as $$
begin
  if (select e.event_id from pglimits.event_log e order by e.event_id desc limit 1)
     > (select n.last_value from pglimits.event_log_event_id_seq n)
  then
    -- One at a time: who comes second finds that it has been done.
    perform pg_advisory_xact_lock(7210911204761543);
    perform setval('pglimits.event_log_event_id_seq', greatest(
      (select max(e.event_id) from pglimits.event_log e), (select n.last_value from pglimits.event_log_event_id_seq n)));
  end if;
end $$;

comment on function pglimits._number_events() is 'Has the numbers of events go on where those end that there are.';

-- A session that acts for somebody else, as a server does, says so: set pglimits.by = 'name'.
create or replace function pglimits._on_behalf_of()
returns text
language sql
stable
return nullif(left(current_setting('pglimits.by', true), 200), '');

comment on function pglimits._on_behalf_of() is 'Whom the session acts for; null if it has not said.';

-- What an owner decides about a limit, as an event tells it.
create or replace function pglimits._as_event(config pglimits.configs)
returns jsonb
language sql
stable
return jsonb_build_object(
  'name', config.name, 'limit', config."limit", 'slot_decay_per_second', config.slot_decay_per_second,
  'active', config.active, 'max_waiters', config.max_waiters, 'description', config.description);

comment on function pglimits._as_event(pglimits.configs) is 'What an owner has decided about a limit.';

-- What differs in the first of two such.
create or replace function pglimits._differing(one jsonb, other jsonb)
returns jsonb
language sql
stable
return (select jsonb_object_agg(d.key, d.value) from jsonb_each(one) d where d.value is distinct from other -> d.key);

comment on function pglimits._differing(jsonb, jsonb) is 'The members of one object that are not the same in another; null if there are none.';
