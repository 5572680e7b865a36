-- History: what the sweep samples, and how it is read.
--
-- A sample has what was held and waited for at its moment, and what had been counted until then; so what lies between two samples is
-- their difference, and no sample is missed when it is thinned out. Kept are one a minute for three hours, one in 5 minutes for a day,
-- one in half an hour up to history_seconds.
--
-- Samples of a limit are read by their key, and asked for in ways that the index on their moments does not know (comparisons of rows,
-- "between"): a plan that was made on an empty table may take that, and read those of all limits.
--
-- Invariant: it only reads what it samples, and locks none of it.
-- Called by: sweep() (_keep_history), and anybody who was granted pglimits_reader.

-- Samples, at most once a minute, and forgets. One at a time; who comes second has nothing to do.
create or replace function pglimits._keep_history(now timestamptz)
returns void
language plpgsql
volatile
as $$
declare
  last pglimits.upkeep;
  is_due boolean;
begin
  insert into pglimits.upkeep default values on conflict do nothing;
  select u.* into last from pglimits.upkeep u for update skip locked;
  if not found then
    return;
  end if;
  is_due := last.sampled_at <= now - interval '55 seconds' and last.history_seconds > 0;
  update pglimits.upkeep u set swept_at = now, sampled_at = case when is_due then now else u.sampled_at end;
  if is_due then
    perform pglimits._sample(last.sampled_at, now);
  end if;
  -- The oldest first, as whoever deletes a limit does. Of each limit the last one stays: what is counted from then on is told by it.
  delete from pglimits.samples s
  where s.at < now - last.history_seconds * interval '1 second'
    and (exists (select from pglimits.samples n
                 where (n.limit_id, n.at) > (s.limit_id, s.at) and (n.limit_id, n.at) <= (s.limit_id, 'infinity') offset 0)
         or not exists (select from pglimits.configs c where c.limit_id = s.limit_id));
  if is_due then
    perform pglimits._thin(now - interval '1 day', last.sampled_at - interval '1 day', interval '30 minutes');
    perform pglimits._thin(now - interval '3 hours', last.sampled_at - interval '3 hours', interval '5 minutes');
  end if;
  delete from pglimits.event_log e
  where e.event_id < (
    select greatest(max(m.event_id) - 99999, coalesce((
      select min(y.event_id) from pglimits.event_log y where y.at >= now - last.history_seconds * interval '1 second'),
      max(m.event_id) + 1))
    from pglimits.event_log m);
end $$;

comment on function pglimits._keep_history(timestamptz) is 'Samples every limit that was used, at most once a minute, and forgets what is old.';

-- Every limit that was used since the last sample, or is in use. Of one that was idle until then its last sample is repeated first, for
-- the moment of the last sampling: what has been counted since came later.
create or replace function pglimits._sample(last timestamptz, now timestamptz)
returns void
language plpgsql
volatile
as $$
begin
  with used as (
    select t.*, s as before
    from pglimits._totals t
    left join lateral (
      select x.* from pglimits.samples x where x.limit_id between t.limit_id and t.limit_id
      order by x.limit_id desc, x.at desc limit 1) s on true
    where t.changed_at >= last or t.held > 0 or t.waiting > 0 or t.level > 0
       or t.grants + t.releases + t.expired_leases + t.force_released_leases
          > coalesce(s.grants + s.releases + s.expired_leases + s.force_released_leases, 0)
  ), idle as (
    insert into pglimits.samples
    select u.limit_id, least(greatest(last, c.created_at), now), u."limit", 0, 0, 0, coalesce((u.before).grants, 0),
           coalesce((u.before).granted_slots, 0), coalesce((u.before).releases, 0), coalesce((u.before).expired_leases, 0),
           coalesce((u.before).force_released_leases, 0), coalesce((u.before).held_slot_seconds, 0),
           coalesce((u.before).waited_seconds, 0), (u.before).waits
    from used u
    join pglimits.configs c on c.limit_id = u.limit_id
    where (u.before).at is null or (u.before).at < last
    on conflict do nothing
  )
  insert into pglimits.samples
  select u.limit_id, now, u."limit", u.held, u.level, u.waiting, u.grants, u.granted_slots, u.releases, u.expired_leases,
         u.force_released_leases, u.held_slot_seconds, u.waited_seconds, u.waits
  from used u
  on conflict do nothing;
end $$;

comment on function pglimits._sample(timestamptz, timestamptz) is 'Writes a sample of every limit that was used since the last one.';

-- Of the samples that have come to this age since the last time, keeps the last one of each step.
create or replace function pglimits._thin(until timestamptz, since timestamptz, step interval)
returns void
language sql
volatile
begin atomic
  delete from pglimits.samples s
  where s.at >= date_bin(step, greatest(since, timestamptz '2000-01-01 00:00+00'), timestamptz '2000-01-01 00:00+00')
    and s.at < date_bin(step, until, timestamptz '2000-01-01 00:00+00')
    and exists (
      select from pglimits.samples n
      where (n.limit_id, n.at) > (s.limit_id, s.at)
        and (n.limit_id, n.at) < (s.limit_id, date_bin(step, s.at, timestamptz '2000-01-01 00:00+00') + step) offset 0);
end;

comment on function pglimits._thin(timestamptz, timestamptz, interval) is 'Keeps the last sample of each step, of those that have just become this old.';

create or replace function pglimits.keep_history(seconds double precision default 691200)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._check(case when seconds between 0 and 31622400 is not true
    then format('seconds must be from 0 to 31622400 (366 days), not %s', coalesce(seconds::text, 'null')) end);
  insert into pglimits.upkeep as u (history_seconds) values (seconds)
  on conflict (only_row) do update set history_seconds = excluded.history_seconds;
end $$;

comment on function pglimits.keep_history(double precision) is
$$Sets for how many seconds samples and events are kept: 8 days, if it is never called. 0 keeps none. The next sweep deletes what is older,
but for the last sample of each limit.

Errors: PL001 a bad argument.$$;

create or replace function pglimits.last_sweep()
returns timestamptz
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (select nullif(u.swept_at, '-infinity') from pglimits.upkeep u);
end $$;

comment on function pglimits.last_sweep() is
$$When sweep() was called last; null: never.$$;

-- What is known of a limit by samples, and by a look now. since: the first sample is the last one before it.
create or replace function pglimits._samples_since(of_limit bigint, since timestamptz, now timestamptz)
returns setof pglimits.samples
language plpgsql
stable
as $$
declare
  sample pglimits.samples;
  last pglimits.samples;
  before constant timestamptz := (
    select s.at from pglimits.samples s where s.limit_id between of_limit and of_limit and s.at < since
    order by s.limit_id desc, s.at desc limit 1);
  sampled_at constant timestamptz := (select u.sampled_at from pglimits.upkeep u);
begin
  if before is null then
    -- Nothing was counted before it was created; nor since, if it was never sampled.
    select c.limit_id, c.created_at, c."limit", 0::bigint, 0::double precision, 0::bigint, 0::bigint, 0::bigint, 0::bigint,
           0::bigint, 0::bigint, 0::double precision, 0::double precision, null::bigint[]
    into last from pglimits.configs c
    where c.limit_id = of_limit and (c.created_at >= since or sampled_at > '-infinity' and not exists (
      select from pglimits.samples s where s.limit_id = of_limit));
    if found then
      return next last;
    end if;
  end if;
  for sample in
    select s.* from pglimits.samples s
    where (s.limit_id, s.at) >= (of_limit, coalesce(before, since)) and (s.limit_id, s.at) <= (of_limit, now)
    order by s.limit_id, s.at
  loop
    last := sample;
    return next last;
  end loop;
  if last.at < sampled_at then
    -- It was idle until then, or it would have been sampled.
    last.at := sampled_at;
    last.held := 0;
    last.level := 0;
    last.waiting := 0;
    return next last;
  end if;
  return query
  select t.limit_id, now, t."limit", t.held, t.level, t.waiting, t.grants, t.granted_slots, t.releases, t.expired_leases,
         t.force_released_leases, t.held_slot_seconds, t.waited_seconds, t.waits
  from pglimits._totals t
  where t.limit_id = of_limit and t.name = (select c.name from pglimits.configs c where c.limit_id = of_limit);  -- whatever index is taken
end $$;

comment on function pglimits._samples_since(bigint, timestamptz, timestamptz) is 'The samples of a limit since a moment, with the last one before, and what is so now.';

create or replace function pglimits._steps_fault(seconds double precision, points integer)
returns text
language sql
immutable
return case
  when seconds between 1 and 31622400 is not true then format('seconds must be from 1 to 31622400, not %s', coalesce(seconds::text, 'null'))
  when points between 1 and 10000 is not true then format('points must be from 1 to 10000, not %s', coalesce(points::text, 'null'))
end;

comment on function pglimits._steps_fault(double precision, integer) is 'What is wrong with the steps in which history is asked for, or null.';

create or replace function pglimits.history(name text, seconds double precision default 3600, points integer default 60)
returns table (
  at timestamptz, covered_seconds double precision, "limit" integer, held double precision, level double precision, waiting bigint,
  grants bigint, granted_slots bigint, releases bigint, expired_leases bigint, force_released_leases bigint,
  waited_seconds double precision, waited_p50 double precision, waited_p95 double precision)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  now constant timestamptz := pglimits._now();
  of_limit bigint;
  width double precision;
  since timestamptz;
begin
  perform pglimits._check(coalesce(
    pglimits._name_fault('name', history.name), pglimits._steps_fault(history.seconds, history.points)));
  of_limit := pglimits._limit_id(history.name);
  width := history.seconds / history.points;
  since := now - interval '1 second' * history.seconds;
  return query
  with step as (
    select s.*, lag(s.at) over w as before,
           s.grants - lag(s.grants) over w as new_grants,
           s.granted_slots - lag(s.granted_slots) over w as new_granted_slots,
           s.releases - lag(s.releases) over w as new_releases,
           s.expired_leases - lag(s.expired_leases) over w as new_expired_leases,
           s.force_released_leases - lag(s.force_released_leases) over w as new_force_released_leases,
           s.held_slot_seconds - lag(s.held_slot_seconds) over w as new_held_slot_seconds,
           s.waited_seconds - lag(s.waited_seconds) over w as new_waited_seconds,
           pglimits._waits_since(lag(s.waits) over w, s.waits) as new_waits,
           greatest(least(ceil(date_part('epoch', s.at - since) / width), history.points), 0)::integer as nth
    from pglimits._samples_since(of_limit, since, now) s
    window w as (order by s.at)
  )
  select since + y.nth * width * interval '1 second', y.length, y."limit",
         greatest(y.held_slot_seconds / nullif(y.length, 0), 0), y.level, y.waiting, y.grants, y.granted_slots, y.releases,
         y.expired_leases, y.force_released_leases, y.waited_seconds, pglimits._wait_quantile(0.5, y.grants, y.waits),
         pglimits._wait_quantile(0.95, y.grants, y.waits)
  from (
    select x.nth, sum(x.length) as length, (array_agg(x."limit" order by x.at desc))[1] as "limit",
           (array_agg(x.level order by x.at desc))[1] as level, (array_agg(x.waiting order by x.at desc))[1] as waiting,
           sum(x.new_held_slot_seconds) as held_slot_seconds, sum(x.new_grants)::bigint as grants,
           sum(x.new_granted_slots)::bigint as granted_slots, sum(x.new_releases)::bigint as releases,
           sum(x.new_expired_leases)::bigint as expired_leases,
           sum(x.new_force_released_leases)::bigint as force_released_leases, sum(x.new_waited_seconds) as waited_seconds,
           pglimits._sum_waits(array_agg(x.new_waits) filter (where x.new_waits is not null)) as waits
    from (select s.*, date_part('epoch', s.at - s.before) as length from step s where s.before is not null and s.nth > 0) x
    group by x.nth) y
  order by y.nth;
end $$;

comment on function pglimits.history(text, double precision, integer) is
$$How a limit was used in the last so many seconds, in so many steps (points) of the same length, the oldest first. A step without a sample
is left out.

at: the end of the step. covered_seconds: how much of it the samples cover. limit: slots, at its last sample. held: slots, on average.
level: slots, at its last sample. waiting: requests, at its last sample. grants: requests granted within the step. granted_slots: slots
that they got. releases: leases that were released. expired_leases: leases that ended without a release. force_released_leases: leases that
an administrator ended. waited_seconds: how long the granted requests had waited, together. waited_p50: half of them had waited no longer.
waited_p95: 95 of 100 had waited no longer. A request that was granted at once counts with 0.

Errors: PL001 a bad argument, PL002 no such limit.$$;

create or replace function pglimits.sparklines(names text[], seconds double precision default 3600, points integer default 30)
returns table (name text, held double precision[])
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  now constant timestamptz := pglimits._now();
begin
  perform pglimits._check(coalesce(
    case when names is null then 'names must not be null' end, pglimits._steps_fault(sparklines.seconds, sparklines.points)));
  return query
  select c.name::text, (
    select array_agg(h.held order by n)
    from generate_series(1, sparklines.points) n
    left join (
      select sparklines.points - round(date_part('epoch', now - x.at) / (sparklines.seconds / sparklines.points))::integer as nth, x.held
      from pglimits.history(c.name, sparklines.seconds, sparklines.points) x offset 0) h on h.nth = n)
  from pglimits.configs c where c.name = any (sparklines.names) order by c.name;
end $$;

comment on function pglimits.sparklines(text[], double precision, integer) is
$$The slots that were held of some limits on average, in the last so many seconds, in so many steps (points), the oldest first.

held: one number for each step; null where there is no sample. A name without a limit has no row.

Errors: PL001 a bad argument.$$;
