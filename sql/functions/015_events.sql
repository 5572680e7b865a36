-- Events: what happened to limits and leases, for whoever asks afterwards.
--
-- Invariant: an event is written in the transaction that does what it tells, so neither is there without the other. The sweep keeps the
-- table short. Whoever listens on the channel pglimits_events hears that there are new ones; ids may become visible out of order.
-- Called by: whatever changes a limit, ends a lease that its holder did not end, or finds that one came back too late.

-- lease: whose event it is, as its row is or was; null: the limit's. old and new: what was changed.
create or replace function pglimits._note(
  kind text, name text, key text, lease pglimits.leases, old jsonb, new jsonb, now timestamptz)
returns void
language plpgsql
volatile
as $$
begin
  loop
    insert into pglimits.event_log (
      at, kind, name, key, lease_id, slots, fence, holder, held_seconds, old, new, session, on_behalf_of)
    values (
      now, kind, name, key, lease.lease_id, lease.slots, lease.fence, coalesce(lease.holder, pglimits._as_holder(lease.session)),
      date_part('epoch', least(lease.expires_at, now) - lease.acquired_at), old, new, pglimits._session(),
      pglimits._on_behalf_of())
    on conflict (event_id) do nothing;
    exit when found;
    -- A restore, or logical replication, has brought events without the sequence that numbers them.
    perform setval(pg_get_serial_sequence('pglimits.event_log', 'event_id'), (select max(e.event_id) from pglimits.event_log e));
  end loop;
  perform pg_notify('pglimits_events', '');
end $$;

comment on function pglimits._note(text, text, text, pglimits.leases, jsonb, jsonb, timestamptz) is
  'Writes an event about a limit, or about a lease.';

-- Rows that are no leases (what became of a request, what is kept for one) are passed over.
create or replace function pglimits._note_leases(kind text, name text, ended pglimits.leases[], now timestamptz)
returns void
language plpgsql
volatile
as $$
declare
  lease pglimits.leases;
begin
  for lease in select e.* from unnest(ended) e where e.fence > 0 and e.slots > 0 order by e.expires_at loop
    perform pglimits._note(kind, name, lease.key, lease, null, null, now);
  end loop;
end $$;

comment on function pglimits._note_leases(text, text, pglimits.leases[], timestamptz) is 'Writes an event about each of some leases.';

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
