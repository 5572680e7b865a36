-- Looking: what a process calls for its requests that wait, when it is time to look, and the heartbeat of processes.
--
-- Invariant: a look touches a state only if something is due there. A process is one row, which its heartbeat updates, however many wait
-- in it; when it has died, the next process that looks finds its requests dead as they come to the heads of their lines.
-- Called by: the wrapper (_watch), repeated requests (_look), and the procedures that wait.

-- Serves the lines in which these wait, where time has made something possible, or where one of them was told to look for itself.
create or replace function pglimits._look(lease_ids uuid[], own boolean)
returns void
language plpgsql
volatile
as $$
declare
  limit_ids bigint[];
  keys text[];
  state pglimits.states;
  now timestamptz := pglimits._now();
begin
  select array_agg(p.limit_id), array_agg(p.key) into limit_ids, keys
  from (
    select x.limit_id, x.key from (
      select q.limit_id, q.key from pglimits.queue q
      where q.lease_id = any (lease_ids) and now >= (
        select s.next_look from pglimits.states s where s.limit_id = q.limit_id and s.key = q.key order by s.generation desc limit 1)
      offset 0) x
    union
    select p.limit_id, p.key collate "C" from pglimits.queue q cross join lateral unnest(q.parts) as p(limit_id, key, slots)
    where q.lease_id = any (lease_ids) and q.looks_at <= now
    order by 1, 2
  ) p;
  if keys is null then
    return;
  end if;
  perform pglimits._lock_all(limit_ids, keys);
  now := pglimits._now();
  -- Whoever was told to look for itself does so now, and can be told again.
  update pglimits.queue q set looks_at = 'infinity'
  where q.lease_id = any (lease_ids) and q.parts is not null and q.looks_at <= now;
  for p in 1 .. cardinality(keys) loop
    state := pglimits._reload(limit_ids[p], keys[p]);
    if state.active and state.waiting > 0 then
      perform pglimits._serve(state, now, own, lease_ids[1]);
    end if;
  end loop;
end $$;

comment on function pglimits._look(uuid[], boolean) is 'Serves the lines in which some requests wait, where something is due.';

-- A sign of life of a process, in a transaction of its own: nothing that is locked may hold it up. The next one is due when the first of
-- the others would have died, or before.
create or replace function pglimits._beat(channel text)
returns double precision
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  now constant timestamptz := pglimits._now();
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(
    case when channel is null then 'channel must not be null' end, pglimits._request_fault(0, 1, 0, null, false, channel)));
  insert into pglimits.processes (channel, expires_at) values (channel, now + pglimits._liveness())
  on conflict on constraint processes_pkey do update set expires_at = excluded.expires_at;
  return date_part('epoch', least(
    (select min(p.expires_at) from pglimits.processes p where p.expires_at > now), now + pglimits._heartbeat_every()) - now);
end $$;

comment on function pglimits._beat(text) is
  'Keeps alive what waits in a process, for 10 seconds. Returns in how many seconds to call again, and to look. For the wrapper.';

-- What a process calls for those of its requests that are to look, or of which it was told something; and for all of them every few
-- seconds. It takes up what was handed over.
create or replace function pglimits._watch(lease_ids uuid[], only_news boolean)
returns table (
  lease_id uuid, status text, fence bigint, expires_at timestamptz, seconds double precision, ends_in double precision)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  now timestamptz;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(coalesce(
    pglimits._ids_fault(lease_ids), case when only_news is null then 'only_news must not be null' end));
  perform pglimits._look(lease_ids, true);
  now := pglimits._now();
  -- In one statement, so that what is handed over meanwhile is either claimed or not seen yet.
  return query
  with claimed as materialized (
    select c.* from pglimits._claim(lease_ids, now) c
  ), granted as materialized (
    select l.lease_id, min(l.fence) as fence, min(coalesce(c.expires_at, l.expires_at)) as expires_at,
           max(l.acquired_at) as acquired_at
    from pglimits.leases l left join claimed c on c.lease_id = l.lease_id
    where l.lease_id = any (lease_ids) and pglimits._is_live(l.expires_at, now) and (l.fence > 0 or l.slots = 0)
    group by l.lease_id
  ), waiting as materialized (
    select q.lease_id, q.parts is not null and pglimits._is_outdated(q) as is_outdated,
           case when not only_news or (q.rank, q.arrival) = (s.head_rank, s.head_arrival) then pglimits._looks_in(
             s, (pglimits._before(s, q.rank, q.arrival)).slots, q.slots, q.lease_duration is null, now) end as looks_in
    from pglimits.queue q
    cross join lateral pglimits._reload(q.limit_id, q.key) s
    where q.lease_id = any (lease_ids)
  )
  select g.lease_id, case when g.fence > 0 then 'granted' else 'retry' end, g.fence, g.expires_at,
         greatest(date_part('epoch', g.acquired_at - now), 0), date_part('epoch', g.expires_at - now)
  from granted g
  union all
  select w.lease_id, case when w.is_outdated then 'retry' else 'queued' end, null, null, w.looks_in, null
  from waiting w where w.is_outdated or not only_news or w.looks_in < date_part('epoch', pglimits._heartbeat_every())
  union all
  select asked.id, 'retry', null, null, null, null
  from (select distinct u.id from unnest(lease_ids) as u(id)) asked
  where not exists (select from granted g where g.lease_id = asked.id)
    and not exists (select from waiting w where w.lease_id = asked.id);
end $$;

comment on function pglimits._watch(uuid[], boolean) is
$$How requests that were queued stand now. For the wrapper. A row for each: granted (its lease begins its full duration; it goes in so
many seconds), queued (look again in so many seconds; null: the heartbeat is soon enough), or retry (ask again with the same id: a limit
was changed or deleted, its time is over, or the place was lost). only_news: no rows for those who go on waiting without anything to do.
ends_in: seconds that the lease lasts without another call.$$;
