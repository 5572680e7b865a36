-- Who may what. Nothing for PUBLIC; pglimits_user acquires, pglimits_reader looks, pglimits_admin does everything.

set local client_min_messages = notice;  -- what could not be done has to be said

revoke all on schema pglimits from public;
revoke all on all tables in schema pglimits from public;
revoke all on all routines in schema pglimits from public;

do $$
declare
  users constant text[] := '{acquire,acquire_alike,acquire_hot,acquire_many,acquire_wait,rate_limit,renew,release,release_hot,release_many,flush,watch,may_sleep,peek,version,errors}';
  administrators constant text[] := '{create_limit,update_limit,delete_limit,adjust,reset,sweep,cron_enable,cron_disable}';
  needed constant text[] := '{pglimits_user,pglimits_reader,pglimits_admin}';
  type_name name;
  routine regprocedure;
  routine_name name;
  wanted text;
begin
  for type_name in
    select t.typname from pg_catalog.pg_type t left join pg_catalog.pg_class c on c.oid = t.typrelid
    where t.typnamespace = 'pglimits'::pg_catalog.regnamespace and t.typtype = 'c' and c.relkind = 'c'
  loop
    execute format('revoke all on type pglimits.%I from public', type_name);
  end loop;

  foreach wanted in array needed loop
    if not exists (select from pg_catalog.pg_roles r where r.rolname = wanted) then
      begin
        execute format('create role %I nologin', wanted);
      exception
        when insufficient_privilege then
          raise notice using
            message = format('pglimits: %I may not create the role %I', current_user, wanted),
            hint = 'As a role that may: create role pglimits_user; create role pglimits_reader; create role '
                   'pglimits_admin; then install again. Or grant by hand: grant usage on schema pglimits to your_role; '
                   'grant execute on all routines in schema pglimits to your_role.';
        when duplicate_object or unique_violation then
          null;  -- another installation in the same cluster was faster
      end;
    end if;
  end loop;

  foreach wanted in array needed loop
    continue when not exists (select from pg_catalog.pg_roles r where r.rolname = wanted);
    -- What an older version granted goes.
    execute format('revoke all on all tables in schema pglimits from %I', wanted);
    execute format('revoke all on all routines in schema pglimits from %I', wanted);
    execute format('grant usage on schema pglimits to %I', wanted);
    for routine, routine_name in
      select p.oid::pg_catalog.regprocedure, p.proname from pg_catalog.pg_proc p
      where p.pronamespace = 'pglimits'::pg_catalog.regnamespace
    loop
      if (wanted in ('pglimits_user', 'pglimits_admin') and routine_name = any (users))
         or (wanted = 'pglimits_admin' and routine_name = any (administrators))
         or (wanted in ('pglimits_reader', 'pglimits_admin') and routine_name in ('_now', 'version', 'errors')) then
        execute format('grant execute on routine %s to %I', routine, wanted);
      end if;
    end loop;
    if wanted in ('pglimits_reader', 'pglimits_admin') then
      execute format('grant select on pglimits.limits, pglimits.holders, pglimits.waiters to %I', wanted);
    end if;
  end loop;
end $$;

comment on schema pglimits is 'Concurrency limits and rate limits, as SQL functions.';
