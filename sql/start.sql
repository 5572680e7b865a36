-- Begins an installation or an upgrade, in a transaction that is open: one at a time, whatever the caller's settings are,
-- and in the name of the role that owns what is there, so that all of it goes on belonging to one.
set transaction isolation level read committed, read write;
set local search_path = pg_catalog;
set local lock_timeout = 0;
set local statement_timeout = 0;
set local client_min_messages = warning;

do $$
begin
  perform pg_advisory_xact_lock(7210911204761542);
end $$;

create schema if not exists pglimits;

do $$
declare
  owner constant name := (
    select pg_get_userbyid(c.relowner) from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'pglimits' and c.relname = 'meta');
begin
  if owner <> current_user and not pg_has_role(owner, 'member') then
    raise exception using
      errcode = 'insufficient_privilege',
      message = format('pglimits belongs to the role %I here: install as that role, or as a member of it', owner);
  elsif owner <> current_user then
    perform set_config('role', owner, true);
  end if;
  perform set_config('pglimits.version_before', '', true);
  if to_regprocedure('pglimits.version()') is not null then
    perform set_config('pglimits.version_before', pglimits.version(), true);
  end if;
end $$;
