-- A grant on disk without holding up others. A commit keeps its limit locked until it is on disk; one with
-- synchronous_commit = off lets go at once, and the next one may flush for all. WAL is a prefix: nobody durable depends
-- on something that was lost.

create or replace function pglimits.flush()
returns void
language plpgsql
volatile
security definer
set search_path = ''
as $$
begin
  if current_setting('synchronous_commit') = 'off' then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  -- What commits nothing flushes nothing.
  perform pg_logical_emit_message(true, 'pglimits', '');
end $$;

comment on function pglimits.flush() is
$$Makes sure that a crash of the server forgets nothing that this session has committed so far with synchronous_commit = off.

For a limit that many connections fight over: call acquire and release in transactions with synchronous_commit = off, so
that each keeps the limit locked no longer than it works on it, and flush() in a transaction of its own before anything
relies on the answer.$$;
