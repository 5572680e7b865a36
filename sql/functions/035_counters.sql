-- Counters of a (limit, key): grants, releases, expiries, what was held for how long, and who waited how long.
--
-- Invariant: they change in the writes that a state gets anyway, and in the same transaction as what they count; so they are exact.
-- Called by: whatever grants and releases, with the state locked; who looks without a lock adds what has come since.

create or replace function pglimits._slot_seconds(slots integer, since timestamptz, until timestamptz)
returns double precision
language sql
immutable
return slots * greatest(date_part('epoch', until - since), 0);

comment on function pglimits._slot_seconds(integer, timestamptz, timestamptz) is 'Slots times how long they were held.';

-- What leases that have ended were counted for since, as nobody took them out yet. As _ended_slots, for whoever looks without a lock.
create or replace function pglimits._ended_slot_seconds(limit_id bigint, key text, next_expiry timestamptz, now timestamptz)
returns double precision
language plpgsql
stable
cost 1
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(sum(pglimits._slot_seconds(x.slots, x.expires_at, _ended_slot_seconds.now)), 0) from (
      select l.slots, l.expires_at from pglimits.leases l
      where l.limit_id = _ended_slot_seconds.limit_id and l.key = _ended_slot_seconds.key
        and l.expires_at >= _ended_slot_seconds.next_expiry and l.expires_at <= _ended_slot_seconds.now
      order by l.expires_at offset 0) x);
end $$;

comment on function pglimits._ended_slot_seconds(bigint, text, timestamptz, timestamptz) is
  'For how many slot-seconds leases that have ended were counted since.';

-- Leases that have ended, and are taken out now. The slots are the caller's to free.
create or replace function pglimits._count_expired(state pglimits.states, ended pglimits.leases[], now timestamptz)
returns pglimits.states
language plpgsql
volatile
as $$
declare
  counted record;
begin
  select count(*) filter (where e.fence > 0 and e.slots > 0) as leases,
         coalesce(sum(pglimits._slot_seconds(e.slots, e.expires_at, now)), 0) as too_much
  into counted from unnest(ended) e;
  state.held_slot_seconds := state.held_slot_seconds - counted.too_much;
  state.expired_leases := state.expired_leases + counted.leases;
  perform pglimits._note_leases('expired', state.name, ended, now);
  return state;
end $$;

comment on function pglimits._count_expired(pglimits.states, pglimits.leases[], timestamptz) is
  'Counts leases that have ended and are taken out, and writes events about them.';

-- Waits are told apart by powers of two: up to 1 ms, up to 2 ms, ... up to 2^20 ms (17 minutes), and longer.
create or replace function pglimits._wait_classes()
returns integer
language sql
immutable
return 22;

comment on function pglimits._wait_classes() is 'Into how many classes waits are sorted.';

create or replace function pglimits._wait_class(seconds double precision)
returns integer
language sql
immutable
return case when seconds <= 0.001 then 1
            else least(1 + ceil(ln(least(seconds, 1e9) * 1000) / ln(2::double precision)), pglimits._wait_classes())::integer end;

comment on function pglimits._wait_class(double precision) is 'Into which class a wait falls: the first up to 1 ms, each other up to twice as long.';

-- Somebody is granted who has waited.
create or replace function pglimits._count_wait(state pglimits.states, seconds double precision)
returns pglimits.states
language plpgsql
immutable
as $$
declare
  class constant integer := pglimits._wait_class(seconds);
begin
  state.waits := coalesce(state.waits, array_fill(0::bigint, array[pglimits._wait_classes()]));
  state.waits[class] := state.waits[class] + 1;
  state.waited_seconds := state.waited_seconds + greatest(seconds, 0);
  return state;
end $$;

comment on function pglimits._count_wait(pglimits.states, double precision) is 'Counts how long somebody has waited who is granted now.';

-- How long so many of all who were granted have waited at most, by their classes; between the bounds of a class as if evenly.
create or replace function pglimits._wait_quantile(share double precision, grants bigint, waits bigint[])
returns double precision
language plpgsql
immutable
as $$
declare
  rank constant double precision := share * grants;
  upto double precision := grants - coalesce((select sum(w) from unnest(waits) w), 0);  -- those who did not wait
  bound double precision;
begin
  if grants <= 0 then
    return null;
  elsif rank <= upto then
    return 0;
  end if;
  for class in 1 .. cardinality(waits) loop
    bound := 0.001 * 2 ^ (class - 1);
    if rank <= upto + waits[class] then
      return case when class = 1 then 0 else bound / 2 end
             + case when class = 1 then bound else bound / 2 end * (rank - upto) / waits[class];
    end if;
    upto := upto + waits[class];
  end loop;
  return bound;
end $$;

comment on function pglimits._wait_quantile(double precision, bigint, bigint[]) is
  'How long a share of those who were granted has waited at most; null if nobody was.';

-- The sum of such counts. all_waits: an array of arrays; null, if nobody waited.
create or replace function pglimits._sum_waits(all_waits bigint[])
returns bigint[]
language sql
immutable
return (
  select array_agg(c.many order by c.class)
  from (select s.class, sum(coalesce(all_waits[r.nth][s.class], 0))::bigint as many
        from generate_subscripts(all_waits, 1) as r(nth) cross join generate_subscripts(all_waits, 2) as s(class) group by s.class) c);

comment on function pglimits._sum_waits(bigint[]) is 'The sum of counts of waits, class by class.';

-- How many waits came between two of such counts.
create or replace function pglimits._waits_since(before bigint[], after bigint[])
returns bigint[]
language sql
immutable
return (
  select array_agg(after[c.class] - coalesce(before[c.class], 0) order by c.class) from generate_subscripts(after, 1) as c(class));

comment on function pglimits._waits_since(bigint[], bigint[]) is 'What was added to counts of waits, class by class; null if nobody waited.';
