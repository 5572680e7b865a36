-- Virtual time: what has decayed on a limit since it was created, in millionths of a slot.
--
-- Levels are kept in it: a limit's level is what is booked beyond it, so that nothing has to be written for a level to decay, and
-- fractions survive. After GCRA, the virtual scheduling algorithm of ITU-T I.371. A changed rate bends it and never makes it jump.
-- Millionths, as clocks count millionths of a second: then what a rate without rounding makes of time is a number without rounding.
--
-- Invariant: it never runs backwards, and _moment is never early.
-- Called by: whatever reads or books a level.

create or replace function pglimits._decayed(
  decayed double precision, slot_decay_per_second double precision, decayed_at timestamptz, at timestamptz)
returns double precision
language sql
immutable
return decayed + slot_decay_per_second * round(date_part('epoch', at - decayed_at) * 1000000);

comment on function pglimits._decayed(double precision, double precision, timestamptz, timestamptz) is
  'Virtual time of a limit at a moment. The first three arguments are columns of its state.';

-- What a number of slots is in virtual time.
create or replace function pglimits._millionths(slots bigint)
returns double precision
language sql
immutable
return slots::double precision * 1000000;

comment on function pglimits._millionths(bigint) is 'Slots as a length of virtual time.';

-- Seconds until a virtual time, in whole microseconds, rounded up so that whoever sleeps just that long is not early.
create or replace function pglimits._seconds_until(
  virtual_time double precision, decayed double precision, slot_decay_per_second double precision)
returns double precision
language sql
immutable
return case
  when virtual_time <= decayed then 0
  else least(ceil((virtual_time - decayed) / slot_decay_per_second), 3e15) / 1000000
end;

comment on function pglimits._seconds_until(double precision, double precision, double precision) is
  'Seconds until a virtual time, now being another; 0 when it has passed.';

-- The moment from which on the level has room for so many slots.
create or replace function pglimits._moment(state pglimits.states, slots bigint, now timestamptz)
returns timestamptz
language plpgsql
immutable
as $$
declare
  decayed constant double precision := pglimits._decayed(
    state.decayed, state.slot_decay_per_second, state.decayed_at, now);
begin
  return now + interval '1 second' * pglimits._seconds_until(
    greatest(state.booked, decayed) + pglimits._millionths(slots - state."limit"), decayed, state.slot_decay_per_second);
end $$;

comment on function pglimits._moment(pglimits.states, bigint, timestamptz) is
  'When the level of a rate limit has room for so many slots; now, if it has.';

-- Books slots as of a moment: what decayed before it is gone.
create or replace function pglimits._book(state pglimits.states, slots bigint, at timestamptz)
returns double precision
language plpgsql
immutable
as $$
begin
  return greatest(state.booked, pglimits._decayed(state.decayed, state.slot_decay_per_second, state.decayed_at, at))
         + pglimits._millionths(slots);
end $$;

comment on function pglimits._book(pglimits.states, bigint, timestamptz) is
  'What is booked on a rate limit once so many slots more were used at a moment.';
