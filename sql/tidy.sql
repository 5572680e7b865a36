-- Drops what an older version had and this one has not: the views and routines that were there before and were not written since.
-- Those that are as they were keep their grants, and whatever of yours is built on them.
do $$
declare
  before constant text[] := string_to_array(current_setting('pglimits.before'), ' ');
  views text;
  routines text;
  dependents text;
begin
  select string_agg(c.oid::regclass::text, ', ') into views from pg_class c
  where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'v' and 'v' || c.oid || '@' || c.ctid = any (before);
  select string_agg(p.oid::regprocedure::text, ', ') into routines from pg_proc p
  where p.pronamespace = 'pglimits'::regnamespace and 'f' || p.oid || '@' || p.ctid = any (before);
  if views is not null then
    execute 'drop view ' || views;
  end if;
  if routines is not null then
    execute 'drop routine ' || routines;
  end if;
exception when dependent_objects_still_exist then
  get stacked diagnostics dependents = pg_exception_detail;
  raise exception using
    errcode = 'dependent_objects_still_exist',
    message = format('something of yours is built on what pglimits %s no longer has (%s): nothing was changed; drop it, '
                     'upgrade, and create it anew', pglimits.version(), replace(dependents, E'\n', '; '));
end $$;
