-- Settings of the functions that bring plans.
--
-- Plain index scans only: a sequential or bitmap scan, chosen while a table had one page, would walk all the dead versions of the next
-- hour. jit off, since such plans look expensive enough to be compiled. And one plan for all arguments: a plan for each array takes longer
-- than its work.
--
-- Each setting costs a call some 4 % of a bare UPDATE. So acquire, rate_limit and release have just those that the short way needs; the
-- long way is entered by _answer and _release, which have all of them. The functions that read no table (errors, version) have none.
do $$
declare
  routine record;
  setting text;
begin
  for routine in
    select p.oid::regprocedure as name, p.proname in ('acquire', 'rate_limit', 'release') as is_short from pg_proc p
    where p.pronamespace = 'pglimits'::regnamespace and p.prokind = 'f' and (p.prosecdef or p.proname in ('_answer', '_release'))
  loop
    foreach setting in array case
      when routine.is_short then array['enable_seqscan = off', 'enable_bitmapscan = off']
      else array['enable_seqscan = off', 'enable_bitmapscan = off', 'jit = off', 'plan_cache_mode = force_generic_plan'] end
    loop
      execute format('alter function %s set %s', routine.name, setting);
    end loop;
  end loop;
end $$;
