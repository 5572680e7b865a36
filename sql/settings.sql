-- Settings of the functions that bring plans.
--
-- Plain index scans only: a sequential or bitmap scan, chosen while a table had one page, would walk all the dead versions of the next
-- hour. jit off, since such plans look expensive enough to be compiled. And one plan for all arguments: a plan for each array takes longer
-- than its work.
--
-- Each setting costs a call some 4 % of a bare UPDATE. So acquire, rate_limit and release have just those that the short way needs; the
-- long way is entered by _answer and _release, which have all of them. The functions that read no table (errors, version) have none.
--
-- A session keeps its plans, and they outlive what the planner knew when it made them: for tables that were empty, or were when they were
-- analyzed, a plan may read all of an index, or compare all rows of one table with all of another. Some 10,000 rows later that takes
-- seconds. So the queries are written in such a way that one plan is possible, which fits any number of rows:
--   A state is looked up by its key, as the index on its name is one of expressions (0001_tables.sql).
--   A lease or a waiter is looked up by its id: the rest of its key is compared with "is not distinct from", its end with _is_live(), and
--   it is put in order by limit_id + 0, since the index on (limit_id, key, ...) knows none of these.
--   All leases, or waiters, of a limit and key are looked up in the order of that index, without a sort; what is written of them is then
--   found by its id.
--   What is looked up for each row of something else is a subquery with "offset 0", which is not made a join.
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
