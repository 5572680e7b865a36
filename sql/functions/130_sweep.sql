-- The janitor. Nothing's correctness or liveness depends on it.
--
-- Invariant: it frees only what nobody uses, under the locks that whoever does would take.
-- Called by: pg_cron, or pglimits sweep, or nobody.

-- Tidies up to max_keys (limit, key)s: ended leases nobody wanted, dead waiters, idle keys.
create or replace function pglimits.sweep(max_keys integer default 1000, idle_seconds double precision default 3600)
returns table (leases integer, waiters integer, keys integer)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  limit_ids bigint[];
  due_keys text[];
  was pglimits.states;
  state pglimits.states;
  now timestamptz := pglimits._now();
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(case
    when max_keys is null or max_keys < 1 then format('max_keys must be at least 1, not %s', coalesce(max_keys::text, 'null'))
    when idle_seconds between 0 and 1e9 is not true
      then format('idle_seconds must be from 0 to 1000000000, not %s', coalesce(idle_seconds::text, 'null'))
  end);
  perform pglimits._keep_history(now);  -- before anything is locked that others need
  leases := 0;
  waiters := 0;
  select array_agg(p.limit_id), array_agg(p.key) into limit_ids, due_keys
  from (
    select due.limit_id, due.key
    from (
      select l.limit_id, l.key from pglimits.leases l where l.expires_at <= now
      union
      select q.limit_id, q.key from pglimits.queue q
      where greatest(q.expires_at, (select p.expires_at from pglimits.processes p where p.channel = q.channel)) <= now
    ) due
    order by due.limit_id, due.key limit max_keys
  ) p;
  -- All states first: delete_limit holds the states of one limit, and touches its leases on others.
  perform pglimits._lock_used(u.limit_id, u.key) from unnest(limit_ids, due_keys) as u(limit_id, key);
  for i in 1 .. coalesce(cardinality(due_keys), 0) loop
    was := pglimits._lock_used(limit_ids[i], due_keys[i]);
    continue when was.limit_id is null;
    now := pglimits._now();
    state := pglimits._bury(pglimits._take_expired(was, now), now);
    leases := least(leases::bigint + (was.held - state.held), 2147483647);
    waiters := waiters + (was.waiting - state.waiting);
    if state.active and state.waiting > 0 then
      perform pglimits._serve(state, now, false);
    else
      perform pglimits._save(state, now);
    end if;
  end loop;
  delete from pglimits.processes p
  where p.expires_at <= now - interval '1 minute'
    and p.channel <> all (array(select distinct q.channel from pglimits.queue q where q.channel is not null));
  keys := pglimits._sweep_idle_keys(max_keys, now - idle_seconds * interval '1 second', now);
  return next;
end $$;

comment on function pglimits.sweep(integer, double precision) is
$$Tidies: removes ended leases that nobody wanted, dead waiters, and idle keys. Also takes the samples of every limit that was used, at most
once a minute, and deletes old samples and events. Nothing depends on it but the history and the size of the tables.

max_keys: at most so many of each at a time. idle_seconds: a key is idle if it was not used for so long.
leases: how many slots of ended leases it freed. waiters: how many dead waiters it removed. keys: how many idle keys it removed.

Errors: PL001 a bad argument.$$;

-- Forgets keys with nothing in them. Waits for no lock: it holds the config's, which comes before the states'.
create or replace function pglimits._sweep_idle_keys(max_keys integer, idle_since timestamptz, now timestamptz)
returns integer
language plpgsql
volatile
as $$
declare
  config pglimits.configs;
  removed record;
  total integer := 0;
begin
  for config in
    select c.* from pglimits.configs c
    where exists (select from pglimits.states s where s.limit_id = c.limit_id and s.changed_at <= idle_since
                                                  and s.held = 0 and s.waiting = 0 offset 0)
    order by c.limit_id for update skip locked
  loop
    with unused as (
      select s.ctid as place from pglimits.states s
      where s.limit_id = config.limit_id and s.changed_at <= idle_since and s.held = 0 and s.waiting = 0
        and s.booked <= pglimits._decayed(s.decayed, s.slot_decay_per_second, s.decayed_at, now)
        and not exists (select from pglimits.leases l where l.limit_id = s.limit_id and l.key = s.key order by l.expires_at offset 0)
      order by s.key limit max_keys - total for update skip locked
    ), gone as (
      delete from pglimits.states s where s.ctid = any (array(select u.place from unused u))
      returning s.*
    ), forgotten as (
      delete from pglimits.known_keys k
      where k.ctid = any (array(
        select y.place from gone g
        cross join lateral (select x.ctid as place from pglimits.known_keys x where x.limit_id = g.limit_id and x.key = g.key offset 0) y))
    )
    select count(*)::integer as keys, max(g.version) as fence, sum(g.grants) as grants, sum(g.granted_slots) as granted_slots,
           sum(g.releases) as releases, sum(g.expired_leases) as expired_leases, sum(g.force_released_leases) as force_released_leases,
           sum(g.held_slot_seconds) as held_slot_seconds, sum(g.waited_seconds) as waited_seconds,
           pglimits._sum_waits(array_agg(g.waits) filter (where g.waits is not null)) as waits
    into removed from gone g;
    if removed.keys > 0 then
      update pglimits.configs c
      set fence_floor = greatest(c.fence_floor, removed.fence), grants = c.grants + removed.grants,
          granted_slots = c.granted_slots + removed.granted_slots, releases = c.releases + removed.releases,
          expired_leases = c.expired_leases + removed.expired_leases,
          force_released_leases = c.force_released_leases + removed.force_released_leases,
          held_slot_seconds = c.held_slot_seconds + removed.held_slot_seconds,
          waited_seconds = c.waited_seconds + removed.waited_seconds,
          waits = case when c.waits is null or removed.waits is null then coalesce(c.waits, removed.waits)
                       else pglimits._sum_waits(array[c.waits, removed.waits]) end
      where c.limit_id = config.limit_id;
      total := total + removed.keys;
    end if;
    exit when total >= max_keys;
  end loop;
  return total;
end $$;

comment on function pglimits._sweep_idle_keys(integer, timestamptz, timestamptz) is
  'Deletes the states of keys that nothing uses; remembers their fences, and what they had counted. Returns how many.';
