-- Begins an installation or an upgrade, in a transaction that is open. It runs alone, whatever the caller's settings are, and
-- in the name of the role that owns the schema: so all of it belongs to one role, and no function runs as another.
-- The isolation comes first: it cannot be chosen once the transaction has looked at anything.
set transaction isolation level read committed, read write;

do $$
begin
  if current_setting('server_version_num')::integer < 140000 then
    raise exception using errcode = 'feature_not_supported',
      message = 'pglimits needs PostgreSQL 14 or later; this server is ' || current_setting('server_version');
  end if;
  if exists (select from pg_catalog.pg_extension x where x.extname = 'pglimits')
     and coalesce(pg_catalog.current_setting('pglimits.as_extension', true), '') <> 'on' then
    raise exception using errcode = 'object_not_in_prerequisite_state',
      message = 'pglimits is an extension in this database: nothing was changed',
      hint = 'alter extension pglimits update;';
  end if;
end $$;

set local search_path = pg_catalog;
set local lock_timeout = 0;
set local statement_timeout = 0;
set local client_min_messages = warning;

do $$
begin
  perform pg_advisory_xact_lock(7210911204761542);
  -- What is there already, and where: what this installation writes is somewhere else then, also if each of its statements runs in a
  -- subtransaction, or another installation came before it in this transaction.
  perform set_config('pglimits.before', coalesce((
    select string_agg(x.what, ' ') from (
      select 'schema' as what from pg_namespace n where n.nspname = 'pglimits'
      union all
      select 'f' || p.oid || '@' || p.ctid from pg_proc p where p.pronamespace = to_regnamespace('pglimits')
      union all
      select 'v' || c.oid || '@' || c.ctid from pg_class c where c.relnamespace = to_regnamespace('pglimits') and c.relkind = 'v') x
  ), ''), true);
end $$;

create schema if not exists pglimits;

do $$
declare
  owner constant name := (select pg_get_userbyid(n.nspowner) from pg_namespace n where n.nspname = 'pglimits');
begin
  if owner <> current_user and not pg_has_role(owner, 'member') then
    raise exception using
      errcode = 'insufficient_privilege',
      message = format('the schema pglimits belongs to the role %I here: install as that role, or as a member of it', owner);
  elsif owner <> current_user then
    perform set_config('role', owner, true);
  end if;
  perform set_config('pglimits.version_before', '', true);
  if to_regprocedure('pglimits.version()') is not null then
    perform set_config('pglimits.version_before', pglimits.version(), true);
  end if;
end $$;
