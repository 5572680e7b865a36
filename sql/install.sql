-- Installs or upgrades pglimits in the database you are connected to: psql -f sql/install.sql
-- One transaction; safe to repeat, and safe when several run it at once. An upgrade gives just what a new installation
-- gives. Tables change by numbered migrations; functions and views are created or replaced each time, and those that are
-- gone from here are dropped. What cannot be replaced (another type of result, other names of arguments, a column of a
-- view less) a migration has to drop before, if it exists.
\set ON_ERROR_STOP on
\set QUIET on
begin;
\ir start.sql
\ir version.sql
\ir lock.sql

select to_regclass('pglimits.meta') is null as fresh \gset
\if :fresh
\set installed 0
\else
select schema_version as installed from pglimits.meta \gset
\endif

select :installed > 1 as too_new, :installed < 1 as need_0001 \gset
\if :too_new
do $$ begin
  raise exception using errcode = 'PL008',
    message = 'this database has a newer schema of pglimits than this script knows: pip install --upgrade pglimits';
end $$;
\endif
\if :need_0001
\ir migrations/0001_tables.sql
insert into pglimits.meta (schema_version) values (1) on conflict (only_row) do update set schema_version = 1;
\endif

\ir functions/010_basics.sql
\ir functions/015_events.sql
\ir functions/020_virtual_time.sql
\ir functions/030_state.sql
\ir functions/035_counters.sql
\ir functions/040_slots.sql
\ir functions/050_line.sql
\ir functions/055_several.sql
\ir functions/060_request.sql
\ir functions/070_decide.sql
\ir functions/080_short_way.sql
\ir functions/090_answer.sql
\ir functions/092_acquire.sql
\ir functions/095_batches.sql
\ir functions/100_leases.sql
\ir functions/105_settle.sql
\ir functions/110_looking.sql
\ir functions/112_waiting.sql
\ir functions/115_why_waiting.sql
\ir functions/120_limits.sql
\ir functions/125_apply.sql
\ir functions/130_sweep.sql
\ir functions/135_history.sql
\ir functions/140_cron.sql
\ir views.sql
\ir tidy.sql
\ir settings.sql
\ir grants.sql
commit;
select 'pglimits ' || pglimits.version() || ' is installed in ' || current_database() as done \gset
\echo :done
