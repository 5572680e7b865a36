-- What anybody may see who may see anything. Decay and expiry are applied as of now, whatever has been taken out yet.
--
-- What is due in a state is asked of a function, and only where something can be: joins for all of them would look so expensive to the
-- planner that it has them compiled (jit). Readers may call these functions (grants.sql).

create or replace view pglimits._uses as
select
  s.limit_id, s.name, s.key,
  s.held - case when s.held > 0 and s.next_expiry <= clock.now
                then pglimits._ended_slots(s.limit_id, s.key, s.next_expiry, clock.now) else 0 end as held,
  case when s.slot_decay_per_second > 0
       then greatest(s.booked - pglimits._decayed(s.decayed, s.slot_decay_per_second, s.decayed_at, clock.now), 0) / 1000000
       else 0 end as level,
  s.waiting - case when s.waiting > 0
                   then pglimits._dead_waiters(s.limit_id, s.key, s.head_rank, s.head_arrival, clock.now) else 0 end as waiting,
  s.version as fence, s.changed_at, s.grants, s.granted_slots, s.releases, s.expired_leases, s.force_released_leases,
  s.held_slot_seconds + pglimits._slot_seconds(s.held, s.changed_at, clock.now)
  - case when s.held > 0 and s.next_expiry <= clock.now
         then pglimits._ended_slot_seconds(s.limit_id, s.key, s.next_expiry, clock.now) else 0 end as held_slot_seconds,
  s.waited_seconds, s.waits
from (select pglimits._now() as now) clock
cross join pglimits.states s;

comment on view pglimits._uses is 'Every state, less what has ended or died and was not taken out yet.';

-- Sums of integers: those of bigint are computed as numeric. A full join, though no state is without its limit: it is never a nested loop,
-- which the planner would take, for minutes, where there were few limits when they were analyzed last, and are many now.
create or replace view pglimits._totals as
select
  c.limit_id, c.name, c."limit", coalesce(sum(u.held::integer), 0) as held, coalesce(sum(u.waiting::integer), 0) as waiting, c.active,
  c.slot_decay_per_second, coalesce(sum(u.level), 0) as level, c.max_waiters, c.description, c.created_at, c.updated_at,
  count(u.key) as keys, greatest(max(u.changed_at), c.updated_at) as changed_at,
  (c.grants + coalesce(sum(u.grants), 0))::bigint as grants,
  (c.granted_slots + coalesce(sum(u.granted_slots), 0))::bigint as granted_slots,
  (c.releases + coalesce(sum(u.releases), 0))::bigint as releases,
  (c.expired_leases + coalesce(sum(u.expired_leases), 0))::bigint as expired_leases,
  (c.force_released_leases + coalesce(sum(u.force_released_leases), 0))::bigint as force_released_leases,
  c.held_slot_seconds + coalesce(sum(u.held_slot_seconds), 0) as held_slot_seconds,
  c.waited_seconds + coalesce(sum(u.waited_seconds), 0) as waited_seconds,
  pglimits._sum_waits(
    array_agg(u.waits) filter (where u.waits is not null) || case when c.waits is not null then array[c.waits] end) as waits
from pglimits.configs c
full join pglimits._uses u on u.limit_id = c.limit_id
group by c.limit_id, c.name
having count(c.name) > 0;

comment on view pglimits._totals is 'Every limit with what is so now, and with what was counted since it was created.';

create or replace view pglimits.limits as
select
  t.name, t."limit", t.held, t.waiting, t.active, t.slot_decay_per_second, t.level, t.max_waiters, t.description, t.created_at,
  t.updated_at
from pglimits._totals t
order by t.name;

comment on view pglimits.limits is
$$Every limit, and how it is used now, over all its keys.

limit: its slots. held: slots under live leases, and those that are kept for a moment for a request over several limits. waiting: live
requests in line. active: false, it is not enforced. slot_decay_per_second: slots that come back each second; 0 for a concurrency limit.
level: slots that a rate limit has used and that have not decayed yet. max_waiters: the longest line for each key; null: no bound.
updated_at: when its definition was changed last.$$;

create or replace view pglimits.keys as
select u.name, u.key, u.held, u.level, u.waiting, u.fence
from pglimits._uses u
order by u.name, u.key;

comment on view pglimits.keys is
$$Every key that was used and not swept since.

held: slots under its live leases, and those that are kept for a moment for a request over several limits. level: slots used and not
decayed yet. waiting: live requests in its line. fence: no grant of this key had a higher one.$$;

create or replace view pglimits.holders as
select l.lease_id, c.name, l.key, l.slots,
       coalesce(l.holder, pglimits._as_holder(l.session)) as holder, l.fence, l.priority, l.acquired_at, l.expires_at
from (select pglimits._now() as now) clock
join pglimits.leases l on l.expires_at > clock.now
join pglimits.configs c on c.limit_id = l.limit_id
where l.slots > 0 and l.fence > 0
order by c.name, l.key, l.acquired_at, l.lease_id;

comment on view pglimits.holders is
$$Every live lease: one row for each limit that it is on.

slots: how many it holds. holder: who has it, as the caller said, or else its session. fence: a number that grows with every grant of the
limit and key. acquired_at: when it was granted. expires_at: when it ends unless it is renewed.$$;

create or replace view pglimits.waiters as
select
  q.lease_id, c.name, q.key, q.slots, q.holder, -q.rank as priority,
  (row_number() over (partition by q.limit_id, q.key order by q.rank, q.arrival))::integer as "position",
  q.arrival as waiting_since
from (select pglimits._now() as now) clock
cross join pglimits.queue q
join pglimits.configs c on c.limit_id = q.limit_id
left join pglimits.processes p on p.channel = q.channel
where greatest(q.expires_at, p.expires_at) > clock.now
order by c.name, q.key, "position";

comment on view pglimits.waiters is
$$Every live waiter, in the order in which they go on. A request over several limits has one row, where it stands in line.

slots: how many it asks for. priority: higher goes first. position: the place in the line of its limit and key, from 1. waiting_since: when
it arrived.$$;

-- It has the columns of limits, too: a join of the two would sum up everything twice, and takes minutes where the planner takes the limits
-- for few, as it does when it looked last while there were few.
create or replace view pglimits.counters as
select
  t.name, t.limit_id, t.grants, t.granted_slots, t.releases, t.expired_leases, t.force_released_leases, t.held_slot_seconds,
  t.waited_seconds,
  case when t.held > 0 then (
    select count(*) from pglimits.leases l
    where l.limit_id = t.limit_id and l.expires_at > clock.now and l.slots > 0 and l.fence > 0) else 0 end as leases,
  t.keys,
  case when t.waiting > 0 then (
    select min(q.arrival) from pglimits.queue q left join pglimits.processes p on p.channel = q.channel
    where q.limit_id = t.limit_id and greatest(q.expires_at, p.expires_at) > clock.now) end as oldest_waiting_since,
  t."limit", t.held, t.waiting, t.active, t.slot_decay_per_second, t.level, t.max_waiters, t.description, t.created_at, t.updated_at
from (select pglimits._now() as now) clock
cross join pglimits._totals t
order by t.name;

comment on view pglimits.counters is
$$What was counted of every limit since it was created, over all its keys, and its use now. It has all columns of the view limits, with the
same meaning, so that nobody has to join the two.

grants: requests that were granted. granted_slots: slots that they got. releases: leases that were released. expired_leases: leases that
ended without a release, counted when they are taken out. force_released_leases: leases that an administrator ended. held_slot_seconds:
slots times the seconds that they were held, until now. waited_seconds: how long the granted requests had waited, together. leases: live
now. keys: used and not swept since. oldest_waiting_since: when the oldest request in line arrived; null if none waits.$$;

create or replace view pglimits.events as
select
  e.event_id, e.at, e.kind, e.name, e.key, e.lease_id, e.slots, e.fence, e.holder, e.held_seconds, e.old, e.new,
  pglimits._as_holder(e.session) || case when e.on_behalf_of is null then '{}' else jsonb_build_object('for', e.on_behalf_of) end as by
from pglimits.event_log e
order by e.event_id;

comment on view pglimits.events is
$$What happened to limits and leases. Grants and releases are no events.

event_id: grows, but becomes visible with its transaction, so not always in order. at: when. kind: created, updated, deleted, reset,
expired, lost or force_released. slots: that the lease held. held_seconds: for how long. old: what was changed, as it was. new: as it is
since. by: whose session did it, or found it, and for whom.$$;
