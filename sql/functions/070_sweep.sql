-- The janitor. Nothing's correctness or liveness depends on it.

-- Tidies up to max_keys (limit, key)s: ended leases nobody wanted, dead waiters, turns that have passed, idle keys.
create or replace function pglimits.sweep(max_keys integer default 1000, idle interval default '1 hour')
returns table (leases integer, waiters integer, keys integer)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  limit_ids bigint[];
  due_keys text[];
  was pglimits.states;
  state pglimits.states;
  config pglimits.configs;
  now timestamptz := pglimits._now();
  removed integer;
  problem text := case
    when max_keys is null or max_keys < 1 then format('max_keys must be at least 1, not %s', coalesce(max_keys::text, 'null'))
    when idle is null or extract(epoch from idle) < 0
      then format('idle must not be negative, not %s', coalesce(idle::text, 'null'))
  end;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  if problem is not null then
    perform pglimits._fail('InvalidArgument', problem);
  end if;
  leases := 0;
  waiters := 0;
  keys := 0;
  select array_agg(p.limit_id), array_agg(p.key) into limit_ids, due_keys
  from (
    select due.limit_id, due.key
    from (
      select l.limit_id, l.key from pglimits.leases l where l.expires_at <= now
      union
      select q.limit_id, q.key from pglimits.queue q join pglimits.configs c on c.limit_id = q.limit_id
      where q.expires_at <= now or q.turn <= pglimits._forgotten(c, now)
    ) due
    order by due.limit_id, due.key limit max_keys
  ) p;
  perform pglimits._lock_several(limit_ids, due_keys);
  now := pglimits._now();
  for i in 1 .. coalesce(cardinality(due_keys), 0) loop
    was := pglimits._lock_used(limit_ids[i], due_keys[i]);
    continue when was.limit_id is null;
    select c.* into config from pglimits.configs c where c.limit_id = limit_ids[i];
    state := pglimits._take_expired(was, now);
    leases := least(leases::bigint + (was.held - state.held), 2147483647);
    delete from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key and q.turn is null and q.expires_at <= now;
    get diagnostics removed = row_count;
    state.waiting := state.waiting - removed;
    waiters := waiters + removed;
    state := pglimits._unpin(state, config, now);
    delete from pglimits.queue q
    where q.limit_id = state.limit_id and q.key = state.key
      and q.turn <= pglimits._forgotten(config, now);
    get diagnostics removed = row_count;
    waiters := waiters + removed;
    if config.active then
      state := pglimits._settle(state, config, now);
    end if;
    perform pglimits._save(state, was, now);
  end loop;
  keys := pglimits._sweep_idle_keys(
    max_keys, now - make_interval(secs => least(extract(epoch from idle), 3e10)::double precision), now);
  return next;
end $$;

comment on function pglimits.sweep(integer, interval) is
$$Tidies: removes ended leases that nobody wanted, dead waiters, turns that have passed, and keys that have been idle for
that long; at most max_keys of each at a time. Returns how many slots, waiters and keys it freed. Nothing depends on it
but the size of the tables. Errors: PL001 a bad argument.$$;

-- Forgets keys with nothing in them. Waits for no lock: it holds the config's, which comes before the states'.
create or replace function pglimits._sweep_idle_keys(max_keys integer, idle_since timestamptz, now timestamptz)
returns integer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  config pglimits.configs;
  highest bigint;
  removed integer;
  total integer := 0;
begin
  for config in
    select c.* from pglimits.configs c
    where exists (select from pglimits.states s where s.limit_id = c.limit_id and s.changed_at <= idle_since
                                                  and s.held = 0 and s.waiting = 0)
    order by c.limit_id for update skip locked
  loop
    with unused as (
      select s.limit_id, s.key, s.version from pglimits.states s
      where s.limit_id = config.limit_id and s.changed_at <= idle_since and s.held = 0 and s.waiting = 0
        and s.booked <= pglimits._decayed(config, now)
        and not exists (select from pglimits.queue q where q.limit_id = s.limit_id and q.key = s.key)
      order by s.key limit max_keys - total for update skip locked
    ), gone as (
      delete from pglimits.states s using unused u
      where s.limit_id = u.limit_id and s.key = u.key and s.version = u.version
      returning s.limit_id, s.key, s.version
    ), forgotten as (
      delete from pglimits.keys k using gone g where k.limit_id = g.limit_id and k.key = g.key
    )
    select count(*), max(g.version) into removed, highest from gone g;
    if removed > 0 then
      update pglimits.configs c set fence_floor = greatest(c.fence_floor, highest) where c.limit_id = config.limit_id;
      total := total + removed;
    end if;
    exit when total >= max_keys;
  end loop;
  return total;
end $$;

comment on function pglimits._sweep_idle_keys(integer, timestamptz, timestamptz) is
  'Deletes the states of keys that nothing uses; remembers their fences. Returns how many.';
