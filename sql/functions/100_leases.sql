-- What happens to a lease, or to a place in line, after acquire: renew and release.
--
-- Invariant: renewing needs no state, as it only moves an end further away. Releasing changes held, or the line, together with the rows.
-- Rows of leases are locked in the order of (limit id, key, lease id), after the states.
-- Called by: anybody who was granted pglimits_user and knows the id: the id of a lease is the right to end it.

create or replace function pglimits.renew_all(lease_ids uuid[], lease_duration double precision default null)
returns table (lease_id uuid, renewed boolean, expires_at timestamptz)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  now timestamptz := pglimits._now();
  mine tid[];
  seconds constant double precision := renew_all.lease_duration;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(pglimits._ids_fault(lease_ids),
                                   case when seconds is not null then pglimits._duration_fault(seconds) end));
  -- Not those that have ended: who takes them out passes over a row that is locked.
  select array_agg(x.place) into mine from (
    select l.ctid as place from pglimits.leases l
    where l.lease_id = any (lease_ids) and pglimits._is_live(l.expires_at, now) and l.fence > 0 and l.slots > 0
    order by l.limit_id + 0, l.key, l.lease_id for update) x;
  now := pglimits._now();
  return query
  with later as (
    update pglimits.leases l
    set expires_at = greatest(
          l.expires_at, greatest(now, l.acquired_at) + coalesce(seconds, l.lease_duration) * interval '1 second'),
        lease_duration = coalesce(seconds, l.lease_duration), claimed = true
    where l.ctid = any (mine) and pglimits._is_live(l.expires_at, now)
    returning l.lease_id, l.expires_at, l.parts
  )
  select asked.id, count(later.lease_id) > 0 and count(later.lease_id) = min(later.parts), min(later.expires_at)
  from (select distinct u.id from unnest(lease_ids) as u(id)) asked
  left join later on later.lease_id = asked.id
  group by asked.id;
  perform pglimits._note_lost(lease_ids, now);
end $$;

comment on function pglimits.renew_all(uuid[], double precision) is
$$Moves the ends of live leases to lease_duration seconds from now, never nearer; null: the duration that each was taken with. Safe to
repeat.

Answers a row for each id. renewed: whether it was still live, on all its limits. expires_at: its new end.

Errors: PL001 a duration below 1 second or above 366 days.$$;

-- Those of some leases that somebody wanted to renew too late: told once, by what is left of them, or by the event of their end.
-- The fence tells apart what an id was used for before.
create or replace function pglimits._note_lost(lease_ids uuid[], now timestamptz)
returns void
language plpgsql
volatile
as $$
declare
  live uuid[];
  lost uuid[];
begin
  live := array(
    select l.lease_id from pglimits.leases l where l.lease_id = any (lease_ids) and pglimits._is_live(l.expires_at, now));
  lost := array(select u.id from unnest(lease_ids) as u(id) where u.id <> all (live));
  if cardinality(lost) = 0 then
    return;
  end if;
  perform pglimits._note_leases('lost', x.name, array_agg(x.lease), now)
  from (
    select c.name, l as lease
    from pglimits.leases l
    cross join lateral (select y.name from pglimits.configs y where y.limit_id = l.limit_id offset 0) c
    where l.lease_id = any (lost)
    union all
    (select distinct on (e.lease_id, e.name, e.key) e.name, jsonb_populate_record(null::pglimits.leases, jsonb_build_object(
              'lease_id', e.lease_id, 'key', e.key, 'slots', e.slots, 'fence', e.fence, 'holder', e.holder, 'expires_at', now,
              'acquired_at', now - e.held_seconds * interval '1 second'))
     from (select y.* from pglimits.event_log y where y.lease_id = any (lost) offset 0) e
     where e.kind in ('expired', 'force_released') and e.fence is not null
       and not exists (select from pglimits.leases l where l.lease_id = e.lease_id offset 0)
     order by e.lease_id, e.name, e.key, e.event_id desc)
  ) x
  where not exists (
    select from pglimits.event_log e
    where e.lease_id = (x.lease).lease_id and e.kind = 'lost' and e.key = (x.lease).key and e.fence = (x.lease).fence
    offset 0)
  group by x.name;
end $$;

comment on function pglimits._note_lost(uuid[], timestamptz) is 'Writes an event about each of some leases that had ended when it was to be renewed.';

create or replace function pglimits.renew(lease_id uuid, lease_duration double precision default null)
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pglimits._check(case when lease_id is null then 'lease_id must not be null' end);
  return (select r.renewed from pglimits.renew_all(array[lease_id], lease_duration) r);
end $$;

comment on function pglimits.renew(uuid, double precision) is
$$Moves the end of a live lease to lease_duration seconds from now, never nearer; null: the duration that it was taken with. False if the
lease had ended: then its slots may be somebody else's.

Errors: PL001 a duration below 1 second or above 366 days.$$;

-- Ends leases, and lets waiters leave, and hands what comes free to the heads of the lines. Returns the ids that were live. own: as in
-- _serve.
create or replace function pglimits._release(lease_ids uuid[], own boolean)
returns uuid[]
language plpgsql
volatile
as $$
declare
  place record;
  ended uuid[] := array[]::uuid[];
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if cardinality(lease_ids) = 1 then
    select l.limit_id, l.key into place from pglimits.leases l where l.lease_id = lease_ids[1] and l.parts = 1 and l.fence > 0;
    if found then  -- a lease on one limit is on nothing else
      return pglimits._release_at(place.limit_id, place.key, lease_ids, own);
    end if;
  end if;
  if cardinality(lease_ids) > 1
     or exists (select from pglimits.leases l where l.lease_id = any (lease_ids) and l.parts > 1)
     or exists (select from pglimits.queue q where q.lease_id = any (lease_ids) and q.parts is not null)
  then
    -- All states first: delete_limit holds the states of one limit, and touches its leases on others. And all that somebody waits for,
    -- who may go to stand in another line while these locks are waited for.
    perform pglimits._lock_used(p.limit_id, p.key)
    from (select x.limit_id, x.key from (
            select l.limit_id, l.key from pglimits.leases l where l.lease_id = any (lease_ids) offset 0) x
          union
          select y.limit_id, y.key from (
            select q.limit_id, q.key from pglimits.queue q where q.lease_id = any (lease_ids) offset 0) y
          union
          select w.limit_id, w.key collate "C"
          from pglimits.queue q cross join lateral unnest(q.parts) as w(limit_id, key, slots) where q.lease_id = any (lease_ids)
          order by 1, 2) p;
  end if;
  for place in
    select x.limit_id, x.key from (
      select l.limit_id, l.key from pglimits.leases l where l.lease_id = any (lease_ids) offset 0) x
    union
    select y.limit_id, y.key from (
      select q.limit_id, q.key from pglimits.queue q where q.lease_id = any (lease_ids) offset 0) y
    order by 1, 2
  loop
    ended := ended || pglimits._release_at(place.limit_id, place.key, lease_ids, own);
  end loop;
  return ended;
end $$;

comment on function pglimits._release(uuid[], boolean) is
  'Ends leases and places in line. Returns the ids that were live; one that was on several limits several times.';

-- The part of it that concerns one (limit, key).
create or replace function pglimits._release_at(limit_id bigint, key text, lease_ids uuid[], own boolean)
returns uuid[]
language plpgsql
volatile
as $$
declare
  state pglimits.states := pglimits._lock_used(limit_id, key);
  now constant timestamptz := pglimits._now();
  gone record;
  left_line record;
begin
  if state.limit_id is null then
    return array[]::uuid[];
  end if;
  if cardinality(lease_ids) > 1 then
    -- In the order in which renew locks them.
    perform from pglimits.leases l
    where l.lease_id = any (lease_ids)
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    order by l.lease_id for update;
  end if;
  with ended as (
    delete from pglimits.leases l
    where l.lease_id = any (lease_ids)
      and l.limit_id is not distinct from state.limit_id and l.key is not distinct from state.key
    returning l.lease_id, l.slots, l.fence, l.expires_at, case when l.expires_at <= now then l end as late
  )
  select coalesce(sum(e.slots), 0) as slots, array_agg(e.lease_id) filter (where e.expires_at > now and e.fence > 0) as live,
         count(*) filter (where e.expires_at > now and e.fence > 0 and e.slots > 0) as leases,
         array_agg(e.late) filter (where e.expires_at <= now) as late
  into gone from ended e;
  state.held := state.held - gone.slots;
  state.releases := state.releases + gone.leases;
  if gone.late is not null then
    state := pglimits._count_expired(state, gone.late, now);
  end if;
  if state.waiting > 0 then
    with leaving as (
      delete from pglimits.queue q
      where q.lease_id = any (lease_ids)
        and q.limit_id is not distinct from state.limit_id and q.key is not distinct from state.key
      returning q.lease_id, q.slots, greatest(q.expires_at, (
        select p.expires_at from pglimits.processes p where p.channel = q.channel)) as lives_until
    )
    select count(*)::integer as waiters, coalesce(sum(w.slots), 0) as slots,
           array_agg(w.lease_id) filter (where w.lives_until > now) as live
    into left_line from leaving w;
    state.waiting := state.waiting - left_line.waiters;
    state.waiting_slots := state.waiting_slots - left_line.slots;
    gone.live := gone.live || left_line.live;
  end if;
  if state.active and state.waiting > 0 then
    perform pglimits._serve(state, now, own);
  else
    perform pglimits._save(state, now);
  end if;
  return coalesce(gone.live, array[]::uuid[]);
end $$;

comment on function pglimits._release_at(bigint, text, uuid[], boolean) is
  'Ends those of the leases and places in line that are on one (limit, key), and grants what fits now.';

-- Safe to repeat: an unknown or ended lease is 'false', not an error.
create or replace function pglimits.release(lease_id uuid)
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  live boolean;
begin
  if lease_id is null then
    perform pglimits._check('lease_id must not be null');
  elsif not pg_is_in_recovery() then
    live := pglimits._release_at_once(lease_id);
  end if;
  return coalesce(live, cardinality(pglimits._release(array[lease_id], false)) > 0);
end $$;

comment on function pglimits.release(uuid) is
$$Ends a lease, or takes a waiting request out of its line, and grants what comes free to the heads of the lines. True if it was live or
waiting; false if not. Safe to repeat.$$;

create or replace function pglimits.release_all(lease_ids uuid[])
returns table (lease_id uuid, released boolean)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  ended uuid[];
begin
  perform pglimits._check(pglimits._ids_fault(lease_ids));
  ended := pglimits._release(lease_ids, false);
  return query select asked.id, asked.id = any (ended) from (select distinct u.id from unnest(lease_ids) as u(id)) asked;
end $$;

comment on function pglimits.release_all(uuid[]) is
$$Ends leases, and takes waiting requests out of their lines. As release.

Answers a row for each id. released: whether it was live or waiting.$$;

-- For an operator: as release, but told as what it is.
create or replace function pglimits.force_release(lease_id uuid)
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  ended pglimits.leases[];
  waiting record;
  waiter pglimits.leases;
  place record;
  now timestamptz;
begin
  perform pglimits._check(case when lease_id is null then 'lease_id must not be null' end);
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  -- States first, as everywhere.
  perform pglimits._lock_used(l.limit_id, l.key)
  from (select x.limit_id, x.key from pglimits.leases x where x.lease_id = force_release.lease_id and x.fence > 0
        order by x.limit_id + 0, x.key) l;
  now := pglimits._now();
  ended := array(
    select l from pglimits.leases l
    where l.lease_id = force_release.lease_id and l.fence > 0 and l.slots > 0 and pglimits._is_live(l.expires_at, now)
    order by l.limit_id + 0, l.key);
  select (select c.name from pglimits.configs c where c.limit_id = q.limit_id) as name, q.limit_id, q.key, q.slots, q.holder, q.channel
  into waiting from pglimits.queue q where q.lease_id = force_release.lease_id;
  waiter.lease_id := lease_id;
  waiter.key := waiting.key;
  waiter.slots := waiting.slots;
  waiter.holder := waiting.holder;
  if cardinality(pglimits._release(array[lease_id], false)) = 0 then
    return false;
  end if;
  for place in
    select e.limit_id, e.key, c.name, array_agg(e) as leases
    from unnest(ended) e
    cross join lateral (select x.name from pglimits.configs x where x.limit_id = e.limit_id offset 0) c
    where e.expires_at > pglimits._now()  -- else it has just expired, and was counted so
    group by e.limit_id, e.key, c.name
    order by e.limit_id, e.key
  loop
    update pglimits.states s set releases = s.releases - 1, force_released_leases = s.force_released_leases + 1
    where s.limit_id = place.limit_id and s.key = place.key;
    perform pglimits._note_leases('force_released', place.name, place.leases, now);
  end loop;
  if cardinality(ended) = 0 and waiting.name is not null then
    perform pglimits._note_refused(waiting.limit_id, waiting.key, lease_id, now);
    update pglimits.states s set next_expiry = least(s.next_expiry, now + pglimits._liveness())
    where s.limit_id = waiting.limit_id and s.key = waiting.key;
    perform pglimits._tell(waiting.channel, lease_id::text);
    perform pglimits._note_leases('force_released', waiting.name, array[waiter], now);
  end if;
  return true;
end $$;

comment on function pglimits.force_release(uuid) is
$$Ends somebody else's lease, or takes somebody else's request out of its line. As release, but it makes an event and has a counter of its
own. True if it was live or waiting.

The holder is not stopped: it finds out when it next renews. The request is refused when it asks again, within 10 seconds.

Errors: PL001 a bad argument.$$;
