-- The short ways: what most calls ask for, decided and written in one go. Each is a special case of what _serve and
-- _release_at do, takes half of their time or less, and leaves everything that is not so simple to them, by returning null
-- with nothing done but the lock taken.

-- One concurrency limit where nothing is due: it has room and nobody waits for it, or it has none and the caller may not
-- wait either.
create or replace function pglimits._take_alone(
  name text, slots integer, key text, lease_duration interval, wait interval, priority integer, holder jsonb,
  lease_id uuid, strict boolean, channel text)
returns pglimits._answer
language plpgsql
volatile
set search_path = ''
as $$
declare
  id constant uuid := coalesce(lease_id, gen_random_uuid());
  state record;
  now timestamptz;
  ends timestamptz;
begin
  if (slots >= 1 and current_setting('transaction_isolation') = 'read committed') is not true
     or pglimits._argument_error(array[name], array[slots], array[key], lease_duration, wait, priority, holder, strict,
                                 channel) is not null
  then
    return null;
  end if;
  if wait = interval '0' then
    -- It may be refused, and that takes no lock.
    select s.held::bigint + slots <= c."limit" and s.waiting = 0 as fits,
           s.held::bigint + slots > c."limit" and (slots <= c."limit" or c."limit" = 0)
             and least(s.next_expiry, s.next_look) > pglimits._now()
             and (lease_id is null or not pglimits._is_known(lease_id)) as is_refused
    into state from pglimits.configs c
    cross join lateral (
      select x.held, x.waiting, x.next_expiry, x.next_look from pglimits.states x
      where x.limit_id = c.limit_id and x.key = _take_alone.key order by x.version desc limit 1) s
    where c.name = _take_alone.name and c.active and c.slot_decay_per_second = 0;
    if state.is_refused then
      return row('refused', null, null, null, null, null, null, null)::pglimits._answer;
    elsif state.fits is not true then
      return null;
    end if;
  end if;

  select s.* into state from pglimits.configs c
  cross join lateral (
    select x.limit_id, x.version, x.held, x.waiting, x.next_expiry, x.next_look from pglimits.states x
    where x.limit_id = c.limit_id and x.key = _take_alone.key order by x.version desc limit 1 for update) s
  where c.name = _take_alone.name and c.active and c.slot_decay_per_second = 0 and c.max_waiters is null;
  if state.waiting = 0 then
    now := pglimits._now();
    -- Under the lock: whoever changes a limit waits for us, or we see what it changed.
    perform from pglimits.configs c
    where c.limit_id = state.limit_id and c.active and c.slot_decay_per_second = 0
      and state.held::bigint + slots <= c."limit" and now < least(state.next_expiry, state.next_look)
      and (lease_id is null
           or not exists (select from pglimits.leases l where l.lease_id = id)
              and not exists (select from pglimits.queue q where q.lease_id = id));
    if found then
      ends := now + make_interval(secs => extract(epoch from lease_duration)::double precision);
      insert into pglimits.leases (lease_id, limit_id, key, slots, holder, fence, priority, lease_duration, claimed,
                                   parts, acquired_at, expires_at)
      values (id, state.limit_id, key, slots, holder, state.version + 1, priority, ends - now, true, 1, now, ends);
      update pglimits.states s
      set version = s.version + 1, held = s.held + slots, next_expiry = least(s.next_expiry, ends),
          changed_at = now
      where s.limit_id = state.limit_id and s.key = _take_alone.key and s.version = state.version;
      return row('granted', id, array[state.version + 1], ends, null, null, null, null)::pglimits._answer;
    end if;
  end if;
  return null;
end $$;

comment on function pglimits._take_alone(text, integer, text, interval, interval, integer, jsonb, uuid, boolean, text) is
  'Grants slots of one concurrency limit if nothing is in the way, or refuses them; null if it is not so simple.';

-- A lease on one limit that nobody waits for. True or false: whether it was live.
create or replace function pglimits._release_alone(lease_id uuid)
returns boolean
language plpgsql
volatile
set search_path = ''
as $$
declare
  state record;
  gone record;
  now timestamptz;
begin
  select s.* into state from pglimits.leases l
  cross join lateral (
    select x.limit_id, x.key, x.version, x.waiting, x.pinned, x.next_look from pglimits.states x
    where x.limit_id = l.limit_id and x.key = l.key order by x.version desc limit 1 for update) s
  where l.lease_id = _release_alone.lease_id and l.parts = 1;
  if state.waiting = 0 and state.pinned = 0 and state.next_look = 'infinity' then
    now := pglimits._now();
    delete from pglimits.leases l
    where l.lease_id = _release_alone.lease_id
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    returning l.slots, l.expires_at > now as live into gone;
    if found then
      update pglimits.states s set version = s.version + 1, held = s.held - gone.slots, changed_at = now
      where s.limit_id = state.limit_id and s.key = state.key and s.version = state.version;
      return gone.live;
    end if;
  end if;
  return null;
end $$;

comment on function pglimits._release_alone(uuid) is
  'Ends a lease on one limit if nobody waits there: whether it was live; null if it is not so simple.';
