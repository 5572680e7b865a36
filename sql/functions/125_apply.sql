-- Limits as code: what `pglimits plan` checks by, and what `pglimits apply` does.
--
-- A plan is {"prune": ..., "limits": [{"name", "action", "old", "new"}, ...]}. It says of each limit what the plan found (old), and
-- what it is to be (new). The actions: create, update, delete, none (it is as wanted), keep (it only has to be there).
--
-- Invariant: all of a plan is done in one transaction, or nothing. It is done only if every limit is still as the plan found it. From that
-- comparison to the commit nobody else changes these limits, and nobody creates, renames or deletes any limit.
-- Lock order: meta, as delete_limit has it; then all configs; then all states; then leases. So what it calls waits for nobody.
-- Called by: the command line.

create or replace function pglimits._limit_faults(limits jsonb)
returns table (nth integer, field text, fault text)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select w.nth::integer, f.field, f.fault
  from jsonb_array_elements(limits) with ordinality w(wanted, nth)
  cross join lateral jsonb_populate_record(null::pglimits.configs, w.wanted) c
  cross join lateral (values
    (1, 'name', case when c.name is not null then pglimits._name_fault('name', c.name) end),
    (2, 'limit', pglimits._limit_fault(c."limit", null, null, null)),
    (3, 'slot_decay_per_second', pglimits._limit_fault(null, c.slot_decay_per_second, null, null)),
    (4, 'max_waiters', pglimits._limit_fault(null, null, c.max_waiters, null)),
    (5, 'description', pglimits._limit_fault(null, null, null, c.description))) f(place, field, fault)
  where f.fault is not null
  order by w.nth, f.place
$$;

comment on function pglimits._limit_faults(jsonb) is
  'What is wrong with limits that somebody wants, given as objects: each fault with the number of the limit, from 1, and the field.';

-- What a plan found and is no longer so: a text for each limit.
create or replace function pglimits._changed_since(plan jsonb)
returns text[]
language sql
volatile
as $$
  select array_agg(format('%L (%s)', x.name, x.what) order by x.name)
  from (
    select w.name, case
      when c.name is null then 'it is gone'
      when w.action = 'create' then 'it was created'
      else (select string_agg(format('%s: %s -> %s', d.key, d.value, pglimits._as_event(c) -> d.key), ', ' order by d.key)
            from jsonb_each(pglimits._differing(pglimits._as_event(o), pglimits._as_event(c))) d where d.key <> 'name')
      end as what
    from jsonb_to_recordset(plan -> 'limits') w(name text, action text, old jsonb)
    left join lateral (select x.* from pglimits.configs x where x.name = w.name offset 0) c on true
    cross join lateral jsonb_populate_record(null::pglimits.configs, w.old) o
    where case w.action
      when 'create' then c.name is not null
      when 'keep' then c.name is null
      else (c.name, c."limit", c.slot_decay_per_second, c.active, c.max_waiters, c.description)
           is distinct from (w.name, o."limit", o.slot_decay_per_second, o.active, o.max_waiters, o.description) end
    union all
    select c.name, 'it was created' from pglimits.configs c
    where (plan ->> 'prune')::boolean
      and c.name not in (select w.name from jsonb_to_recordset(plan -> 'limits') w(name text) where w.name is not null)
  ) x
$$;

comment on function pglimits._changed_since(jsonb) is
  'The limits that are not as a plan found them, and how they differ; null if there are none.';

create or replace function pglimits._apply(plan jsonb)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  doomed bigint[];
  changed text[];
  step record;
begin
  if pg_is_in_recovery() then
    perform pglimits._refuse_standby();
  end if;
  perform pglimits._refuse_snapshot('apply');
  perform from pglimits.meta m for update;
  -- Each config before its states, and limit after limit, as whoever needs several of them and uses a key first.
  for step in
    select c.limit_id, w.action from jsonb_to_recordset(plan -> 'limits') w(name text, action text)
    cross join lateral (select x.limit_id from pglimits.configs x where x.name = w.name offset 0) c
    order by c.limit_id
  loop
    perform from pglimits.configs c where c.limit_id = step.limit_id for update;
    if step.action in ('update', 'delete') then
      perform from pglimits.states s where s.limit_id = step.limit_id order by s.key for update;
    end if;
  end loop;
  changed := pglimits._changed_since(plan);
  if changed is not null then
    perform pglimits._fail('LimitsChanged', format(
      'the limits are not as the plan found them, so nothing was changed: %s%s', array_to_string(changed[1:20], ', '),
      case when cardinality(changed) > 20 then format(' and %s more', cardinality(changed) - 20) end));
  end if;

  doomed := array(
    select c.limit_id from jsonb_to_recordset(plan -> 'limits') w(name text, action text)
    cross join lateral (select x.limit_id from pglimits.configs x where x.name = w.name offset 0) c
    where w.action = 'delete');
  -- In the order in which renew locks them.
  perform from pglimits.leases l
  where l.lease_id = any (array(
    select d.lease_id from unnest(doomed) as u(limit_id)
    cross join lateral (select x.lease_id from pglimits.leases x where x.limit_id = u.limit_id
                        order by x.key, x.expires_at offset 0) d))
  order by l.limit_id + 0, l.key, l.lease_id for update;

  for step in
    select w.name as called, w.action, n.*
    from jsonb_to_recordset(plan -> 'limits') w(name text, action text, new jsonb)
    cross join lateral jsonb_populate_record(null::pglimits.configs, w.new) n
    where w.action in ('create', 'update', 'delete')
    order by array_position(array['delete', 'update', 'create'], w.action), w.name
  loop
    case step.action
      when 'delete' then
        perform pglimits.delete_limit(step.called);
      when 'update' then
        perform pglimits.update_limit(step.called, step."limit", step.slot_decay_per_second, step.active,
                                      coalesce(step.max_waiters, -1), coalesce(step.description, ''));
      when 'create' then
        perform pglimits.create_limit(step.called, step."limit", step.slot_decay_per_second, step.active, step.max_waiters,
                                      step.description);
    end case;
  end loop;
end $$;

comment on function pglimits._apply(jsonb) is
$$Does what a plan of limits says, all in one transaction, by create_limit, update_limit and delete_limit.
Errors: PL001 a bad argument, PL011 the limits are not as the plan found them.$$;
