create or replace function pglimits.version()
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select '0.1.0'
$$;

comment on function pglimits.version() is 'The version of pglimits that is installed in this database.';
