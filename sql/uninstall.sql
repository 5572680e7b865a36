-- Removes pglimits from the database you are connected to, with every limit and lease: psql -f sql/uninstall.sql
-- The roles go as well, unless another database of the cluster still grants them something.
\set ON_ERROR_STOP on
begin;
do $$
declare
  unwanted text;
begin
  if to_regprocedure('pglimits.cron_disable()') is not null then
    perform pglimits.cron_disable();
  end if;
  perform set_config('client_min_messages', 'warning', true);  -- not a line for each object that goes along
  drop extension if exists pglimits cascade;
  drop schema if exists pglimits cascade;
  perform set_config('client_min_messages', 'notice', true);
  foreach unwanted in array '{pglimits_user,pglimits_reader,pglimits_admin}'::text[] loop
    begin
      execute format('drop role if exists %I', unwanted);
    exception when dependent_objects_still_exist or insufficient_privilege then
      raise notice 'the role % is left in place: %', unwanted, sqlerrm;
    end;
  end loop;
end $$;
commit;
