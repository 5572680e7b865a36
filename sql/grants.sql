-- Who may what. Nothing for PUBLIC; pglimits_user acquires, pglimits_reader looks, pglimits_admin does everything.
--
-- The tables, the types and the private functions are out of everybody's reach, and so is what is new, whatever the owner's default
-- privileges have granted. What somebody else was granted since on a function or a view that callers call stays.

do $$
declare
  -- What callers call, and what only the wrapper and the procedures do.
  users constant text[] := '{acquire,acquire_all,acquire_wait,rate_limit,rate_limit_all,rate_limit_wait,renew,renew_all,release,release_all,release_wait,settle,settle_all,peek,peek_all,version,errors,_acquire_batch,_release_batch,_taken,_watch,_beat,_locked_by,_wait,_sleep,_stay,_remaining,_can_commit,_cannot_commit,_refuse_transaction,_flush}';
  administrators constant text[] := '{create_limit,update_limit,delete_limit,adjust,reset,force_release,sweep,keep_history,cron_enable,cron_disable,_apply}';
  readers constant text[] := '{history,sparklines,why_waiting,last_sweep,_limit_faults,_now,_decayed,_as_holder,_ended_slots,_ended_slot_seconds,_slot_seconds,_sum_waits,_dead_waiters,version,errors}';
  visible constant text[] := '{limits,keys,holders,waiters,counters,events}';
  roles constant text[] := '{pglimits_user,pglimits_reader,pglimits_admin}';
  before constant text := ' ' || current_setting('pglimits.before') || ' ';
  missing text[];
  item record;
  wanted text;
begin
  -- What is there by default, or was granted by an older version, or by nobody who knew what it was.
  for item in
    select x.kind, x.object, a.grantee, pg_get_userbyid(a.grantee) as role, x.is_private, x.is_new
    from (
      select case c.relkind when 'S' then 'sequence' else 'table' end as kind, c.oid::regclass::text as object,
             coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner)) as acl,
             c.relowner as owner, c.relkind <> 'v' or c.relname <> all (visible) as is_private,
             strpos(before, ' v' || c.oid || '@') = 0 as is_new
      from pg_class c where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v', 'S')
      union all
      select 'routine', p.oid::regprocedure::text, coalesce(p.proacl, acldefault('f', p.proowner)), p.proowner,
             left(p.proname, 1) = '_' and p.proname <> '_now', strpos(before, ' f' || p.oid || '@') = 0
      from pg_proc p where p.pronamespace = 'pglimits'::regnamespace
      union all
      select 'type', t.oid::regtype::text, coalesce(t.typacl, acldefault('T', t.typowner)), t.typowner, true, true
      from pg_type t join pg_class c on c.oid = t.typrelid
      where t.typnamespace = 'pglimits'::regnamespace and c.relkind = 'c'
      union all
      select 'schema', 'pglimits', n.nspacl, n.nspowner, false, strpos(before, ' schema ') = 0
      from pg_namespace n where n.nspname = 'pglimits'
    ) x
    cross join lateral (select distinct e.grantee from aclexplode(x.acl) e where e.grantee <> x.owner) a
  loop
    if item.is_private or item.is_new or item.grantee = 0 or item.role = any (roles) then
      execute format('revoke all on %s %s from %s cascade', item.kind, item.object,
                     case when item.grantee = 0 then 'public' else quote_ident(item.role) end);
    end if;
  end loop;

  foreach wanted in array roles loop
    if not exists (select from pg_roles r where r.rolname = wanted) then
      begin
        execute format('create role %I nologin', wanted);
      exception
        when insufficient_privilege then
          missing := missing || wanted;
        when duplicate_object or unique_violation then
          null;  -- another installation in the same cluster was faster
      end;
    end if;
  end loop;
  if missing is not null and coalesce(current_setting('pglimits.without_roles', true), '') <> 'on' then
    raise exception using errcode = 'insufficient_privilege',
      message = format('the role %I may not create roles, and there is no %s: nothing was installed', current_user,
                       array_to_string(missing, ', ')),
      hint = 'Have a role that may run these lines first, and install again:'
             || (select string_agg(format(e'\n  create role %I;', m), '') from unnest(missing) m)
             || e'\nOr install without them (pglimits install --without-roles, or set pglimits.without_roles = on), and grant by hand.';
  end if;

  foreach wanted in array roles loop
    continue when wanted = any (missing);
    execute format('grant usage on schema pglimits to %I', wanted);
    for item in
      select p.oid::regprocedure as routine from pg_proc p
      where p.pronamespace = 'pglimits'::regnamespace
        and (wanted in ('pglimits_user', 'pglimits_admin') and p.proname = any (users)
             or wanted = 'pglimits_admin' and p.proname = any (administrators)
             or wanted in ('pglimits_reader', 'pglimits_admin') and p.proname = any (readers))
    loop
      execute format('grant execute on routine %s to %I', item.routine, wanted);
    end loop;
    if wanted in ('pglimits_reader', 'pglimits_admin') then
      execute format('grant select on pglimits.limits, pglimits.keys, pglimits.holders, pglimits.waiters, pglimits.counters, pglimits.events to %I',
                     wanted);
    end if;
  end loop;
end $$;

comment on schema pglimits is 'Concurrency limits and rate limits, as SQL functions. \df pglimits.[a-z]* lists those to call.';
