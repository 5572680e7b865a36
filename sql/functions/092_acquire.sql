-- acquire, rate_limit and peek: what callers call.
--
-- The settings of all public functions are given to them at the end of an installation (settings.sql).
--
-- Invariant: granted means: go now. A request that is granted a moment ahead is queued until then.
-- Called by: anybody who was granted pglimits_user.

create or replace function pglimits.acquire(
  name text,
  slots integer default 1,
  key text default '',
  timeout_seconds double precision default 0,
  lease_duration double precision default 300,
  priority integer default 0,
  holder jsonb default null,
  lease_id uuid default null,
  strict boolean default false,
  channel text default null,
  clamp boolean default false)
returns pglimits.acquired
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  answer pglimits.acquired;
  whole pglimits.acquired_all;
begin
  if clamp is not null and pglimits._is_plain(timeout_seconds, lease_duration, priority, holder, strict, channel) then
    answer := pglimits._take_at_once(
      name, slots, key, timeout_seconds, lease_duration, priority, holder, lease_id, lease_id is not null, false);
    if answer.status <> 'busy' then
      return answer;
    end if;
  end if;
  whole := pglimits._answer('acquire', array[name], array[slots], array[key], false, timeout_seconds, lease_duration, priority,
                            holder, lease_id, strict, channel, answer.status is not null, clamp);
  return row(whole.status, whole.lease_id, whole.fences[1], whole.expires_at, whole.retry_after, whole."position")
         ::pglimits.acquired;
end $$;

comment on function pglimits.acquire(
  text, integer, text, double precision, double precision, integer, jsonb, uuid, boolean, text, boolean) is
$$Takes slots of one limit, until they are released or the lease ends. Durations are in seconds.

slots: how many. key: each key of a limit has the whole budget for itself. timeout_seconds: how long the request may wait in all; 0 tries
once, null waits for ever. lease_duration: from 1 second to 366 days. priority: higher goes first. holder: JSON that says who it is; null:
the session. lease_id: a random id of the caller's choice, so that the call can be repeated; null: a new one. strict: a missing limit is
an error; otherwise it is not enforced, with a warning. channel: what to notify when the request should be asked again, pglimits_ and up
to 40 of a-z, 0-9 and _. clamp: more slots than the limit has, at the first call or at the grant, count as the limit.

The answer: status: granted, go now; queued, the request stands in line; refused, there is no room in time; unlimited, the limit is
missing or inactive. lease_id: what to renew and to release by. fence: a number that grows with every grant of the limit and key.
expires_at: when the lease ends unless it is renewed. retry_after: in seconds: queued, call again within them; refused, time alone would
let the request in by then, and null means that only a release can. position: the place in line, from 1.

After queued, call again with the same arguments and lease_id, after a commit. The deadline counts from the first call. A request that is
not asked again for 10 seconds loses its place. A caller that is interrupted keeps it for as long: ask again with the same lease_id, or
release that. In plain SQL, call pglimits.acquire_wait(...) does all of this.

Errors: PL001 a bad argument; PL002 strict, and the limit is missing; PL004 more slots than the limit has; PL006 the line is full; PL009
an open transaction keeps the limit locked; PL010 asked again before a commit.

Call it in a transaction of its own: the limit is locked until the commit. Call it as select * from pglimits.acquire(...), since
select (pglimits.acquire(...)).* calls it once a column.$$;

create or replace function pglimits.acquire_all(
  names text[],
  slots integer[] default '{1}',
  keys text[] default '{""}',
  timeout_seconds double precision default 0,
  lease_duration double precision default 300,
  priority integer default 0,
  holder jsonb default null,
  lease_id uuid default null,
  strict boolean default false,
  channel text default null,
  clamp boolean default false)
returns pglimits.acquired_all
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return pglimits._answer('acquire_all', names, slots, keys, false, timeout_seconds, lease_duration, priority, holder, lease_id,
                          strict, channel, false, clamp);
end $$;

comment on function pglimits.acquire_all(
  text[], integer[], text[], double precision, double precision, integer, jsonb, uuid, boolean, text, boolean) is
$$Takes slots of several limits, all or none. Arguments, answer and errors are as of acquire. slots and keys are given once for all
names, or once for each.

fences: one for each name; null where the limit is not enforced. position: the place in the line in which the request stands now.$$;

create or replace function pglimits.rate_limit(
  name text,
  slots integer default 1,
  key text default '',
  timeout_seconds double precision default 0,
  priority integer default 0,
  holder jsonb default null,
  lease_id uuid default null,
  strict boolean default false,
  channel text default null)
returns pglimits.rate_limited
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  seconds double precision;
begin
  if pglimits._is_plain(timeout_seconds, 1, priority, holder, strict, channel) then
    seconds := pglimits._use_at_once(
      name, slots, key, timeout_seconds is distinct from 0, case when lease_id is not null then array[lease_id] end, 1);
    if seconds = 0 then
      return row('granted', null, lease_id, null)::pglimits.rate_limited;
    elsif seconds is not null then
      return row('refused', seconds, null, null)::pglimits.rate_limited;
    end if;
  end if;
  return pglimits._rate_limit('rate_limit', array[name], array[slots], array[key], timeout_seconds, priority, holder, lease_id,
                              strict, channel);
end $$;

comment on function pglimits.rate_limit(
  text, integer, text, double precision, integer, jsonb, uuid, boolean, text) is
$$Takes slots of one rate limit, which come back by decay only. Arguments and answer are as of acquire: granted means go now.

A request whose earliest moment lies beyond timeout_seconds is refused at once and takes nothing. A request that was granted at once and
is asked again under the same id is charged again. lease_id: what to ask a queued request again by, or to release it by, which takes it
out of the line.

Errors: as acquire, and PL005 for a limit without slot_decay_per_second.$$;

create or replace function pglimits.rate_limit_all(
  names text[],
  slots integer[] default '{1}',
  keys text[] default '{""}',
  timeout_seconds double precision default 0,
  priority integer default 0,
  holder jsonb default null,
  lease_id uuid default null,
  strict boolean default false,
  channel text default null)
returns pglimits.rate_limited
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return pglimits._rate_limit('rate_limit_all', names, slots, keys, timeout_seconds, priority, holder, lease_id, strict, channel);
end $$;

comment on function pglimits.rate_limit_all(
  text[], integer[], text[], double precision, integer, jsonb, uuid, boolean, text) is
$$Takes slots of several rate limits, all or none. As rate_limit, with slots and keys given once for all names, or once for each.$$;

create or replace function pglimits._rate_limit(
  what text, names text[], slots integer[], keys text[], timeout_seconds double precision, priority integer, holder jsonb,
  lease_id uuid, strict boolean, channel text)
returns pglimits.rate_limited
language plpgsql
volatile
as $$
declare
  whole constant pglimits.acquired_all := pglimits._answer(
    what, names, slots, keys, true, timeout_seconds, 1, priority, holder, lease_id, strict, channel, false);
begin
  return row(whole.status, whole.retry_after, whole.lease_id, whole."position")::pglimits.rate_limited;
end $$;

comment on function pglimits._rate_limit(
  text, text[], integer[], text[], double precision, integer, jsonb, uuid, boolean, text) is
  'Serves one call of rate_limit.';

create or replace function pglimits.peek(
  name text,
  slots integer default 1,
  key text default '',
  timeout_seconds double precision default 0,
  priority integer default 0,
  strict boolean default false,
  for_rate boolean default false)
returns pglimits.peeked
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return pglimits._peek('peek', array[name], array[slots], array[key], timeout_seconds, priority, strict, for_rate);
end $$;

comment on function pglimits.peek(text, integer, text, double precision, integer, boolean, boolean) is
$$Tells what a request with these arguments would be answered now. Takes no lock and changes nothing.

for_rate: as rate_limit would answer; otherwise as acquire would. status: granted, queued, refused or unlimited. retry_after: in how many
seconds time alone would let the request in; null: only a release can. position: the place that it would have in line.

Errors: as acquire.$$;

create or replace function pglimits.peek_all(
  names text[],
  slots integer[] default '{1}',
  keys text[] default '{""}',
  timeout_seconds double precision default 0,
  priority integer default 0,
  strict boolean default false,
  for_rate boolean default false)
returns pglimits.peeked
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return pglimits._peek('peek_all', names, slots, keys, timeout_seconds, priority, strict, for_rate);
end $$;

comment on function pglimits.peek_all(text[], integer[], text[], double precision, integer, boolean, boolean) is
$$Tells what acquire_all (for_rate: rate_limit_all) would answer now. As peek, with slots and keys given once for all names, or once for
each.$$;

create or replace function pglimits._peek(
  what text, names text[], slots integer[], keys text[], timeout_seconds double precision, priority integer, strict boolean,
  for_rate boolean)
returns pglimits.peeked
language plpgsql
volatile
as $$
declare
  request pglimits._request;
  glance record;
begin
  perform pglimits._check(coalesce(
    pglimits._request_fault(timeout_seconds, 1, priority, null, strict, null),
    case when for_rate is null then 'for_rate must not be null' end));
  request := pglimits._check_request(what, names, slots, keys, for_rate, timeout_seconds, 1, priority, strict, null);
  if cardinality(request.keys) = 0 then
    return row('unlimited', null, null)::pglimits.peeked;
  end if;
  glance := pglimits._glance(request);
  if glance.status = 'granted' then
    return row('granted', null, null)::pglimits.peeked;
  elsif glance.status = 'refused' then
    return row('refused', glance.seconds, null)::pglimits.peeked;
  elsif glance.status = 'full' then
    perform pglimits._fail('QueueFull', 'the line of ' || pglimits._listed(names) || ' is as long as its max_waiters allows');
  end if;
  return row('queued', glance.seconds, glance.waiters + 1)::pglimits.peeked;
end $$;

comment on function pglimits._peek(
  text, text[], integer[], text[], double precision, integer, boolean, boolean) is
  'What a request would be answered now.';
