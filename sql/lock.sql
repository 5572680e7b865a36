-- Refuses to go back to an older version. Then waits until nobody is at work here, so that every transaction is served by
-- one version alone. While it waits it steps aside again and again: it never keeps others waiting for longer than 0.2
-- seconds for each lock, and it gives up after a while.
do $$
declare
  before constant text := nullif(current_setting('pglimits.version_before'), '');
  number_before constant integer[] := string_to_array(substring(before from '[0-9]+(?:[.][0-9]+)*'), '.');
  number constant integer[] := string_to_array(substring(pglimits.version() from '[0-9]+(?:[.][0-9]+)*'), '.');
  views text[];
  relations text;
  holders text;
begin
  if number_before > number then
    raise exception using
      errcode = 'PL008',
      message = format('the database has pglimits %s, which is newer than this one, %s: pip install --upgrade pglimits',
                       before, pglimits.version());
  end if;
  select array_agg(c.oid::regclass::text) filter (where c.relkind = 'v'), string_agg(c.oid::regclass::text, ', ')
  into views, relations
  from pg_class c where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v');

  for attempt in 1 .. 20 loop
    begin
      set local lock_timeout = '200ms';
      if before <> pglimits.version() and relations is not null then
        execute 'lock table ' || relations || ' in access exclusive mode';
      end if;
      -- To be replaced by the same they are locked too, alone: lock table would lock what they read as well.
      for i in 1 .. coalesce(cardinality(views), 0) loop
        execute format('alter view %s owner to current_user', views[i]);
      end loop;
      set local lock_timeout = '10s';  -- nothing that comes may wait for long either: others wait for us now
      return;
    exception when lock_not_available or deadlock_detected then
      null;
    end;
    perform pg_sleep(0.2);
  end loop;
  select string_agg(distinct coalesce('session ' || l.pid, 'a prepared transaction'), ', ') into holders
  from pg_locks l join pg_class c on c.oid = l.relation
  where l.database = (select d.oid from pg_database d where d.datname = current_database())
    and c.relnamespace = 'pglimits'::regnamespace and l.granted and l.pid is distinct from pg_backend_pid();
  raise exception using
    errcode = 'lock_not_available',
    message = format('an open transaction keeps pglimits locked (%s): nothing was changed; end it, or try again later',
                     coalesce(holders, 'it has ended by now'));
end $$;

-- A restore of the definitions alone has left no row here.
do $$
begin
  if to_regclass('pglimits.meta') is not null then
    insert into pglimits.meta default values on conflict do nothing;
  end if;
end $$;
