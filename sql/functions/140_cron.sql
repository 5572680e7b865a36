-- pg_cron, where it is there, calls the sweep. Its functions are called by dynamic SQL, because this has to be installable without it.
--
-- Invariant: one job for each database, whatever is called how often.
-- Called by: anybody who was granted pglimits_admin.

-- How often pg_cron is asked to sweep: seconds from pg_cron 1.5 on, whole minutes before (it would misread seconds).
create or replace function pglimits._cron_schedule(every_seconds double precision, extension_version text)
returns text
language plpgsql
immutable
as $$
declare
  parts integer[] := (regexp_match(extension_version, '^([0-9]+)[.]([0-9]+)'))::integer[];
  minutes integer;
begin
  if every_seconds between 1 and 86400 is not true then
    perform pglimits._check(format('every_seconds must be from 1 to 86400, not %s', coalesce(every_seconds::text, 'null')));
  elsif ceil(every_seconds) < 60 and (parts[1], parts[2]) >= (1, 5) then
    return ceil(every_seconds) || ' seconds';
  end if;
  minutes := ceil(every_seconds / 60);
  return case when minutes = 1 then '* * * * *'
              when minutes < 60 then format('*/%s * * * *', minutes)
              when minutes <= 23 * 60 then format('0 */%s * * *', ceil(minutes / 60.0)::integer)
              else '0 0 * * *' end;
end $$;

comment on function pglimits._cron_schedule(double precision, text) is
  'The schedule for pg_cron of that version; rounded up to what it can express.';

create or replace function pglimits.cron_enable(every_seconds double precision default 60)
returns text
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  cron_version text := (select x.extversion from pg_catalog.pg_extension x where x.extname = 'pg_cron');
  cron_database text := current_setting('cron.database_name', true);
  -- Also the check of its argument, which comes first.
  schedule text := pglimits._cron_schedule(every_seconds, coalesce(cron_version, '1.4'));
begin
  if cron_version is null and cron_database <> current_database() then
    perform pglimits._fail('CronUnavailable',
      format('pg_cron lives in database %L, not in this one', cron_database),
      format('Run ''pglimits cron enable'', or in %I: select cron.schedule_in_database(%L, %L, %L, %L);',
             cron_database, pglimits._cron_job(), schedule, 'select pglimits.sweep()',
             current_database()));
  elsif cron_version is null then
    perform pglimits._fail('CronUnavailable', 'pg_cron is not installed in this database',
      'Install the package (Debian: postgresql-NN-cron), set shared_preload_libraries = ''pg_cron'' and '
      'cron.database_name, restart, and run: create extension pg_cron. Without it: pglimits sweep --every 60');
  end if;
  execute 'select cron.schedule($1, $2, $3)' using pglimits._cron_job(), schedule, 'select pglimits.sweep()';
  return schedule;
end $$;

comment on function pglimits.cron_enable(double precision) is
$$Has pg_cron call sweep() every so many seconds: below a minute from pg_cron 1.5 on, before that rounded up to minutes. Scheduled twice, it
is one job. Returns the schedule.

Errors: PL001 a bad argument, PL007 pg_cron is not in this database.$$;

create or replace function pglimits.cron_disable()
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  job bigint;
begin
  if not exists (select from pg_catalog.pg_extension x where x.extname = 'pg_cron') then
    return false;
  end if;
  execute 'select j.jobid from cron.job j where j.jobname = $1' into job using pglimits._cron_job();
  if job is null then
    return false;
  end if;
  execute 'select cron.unschedule($1)' using job;
  return true;
end $$;

comment on function pglimits.cron_disable() is
$$Stops pg_cron from calling sweep(). False if it was not scheduled for this database.$$;

create or replace function pglimits._cron_job()
returns text
language plpgsql
stable
as $$
begin
  return 'pglimits sweep ' || current_database();
end $$;

comment on function pglimits._cron_job() is 'The name of the job in pg_cron.';
