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
  s.version as fence
from (select pglimits._now() as now) clock
cross join pglimits.states s;

comment on view pglimits._uses is 'Every state, less what has ended or died and was not taken out yet.';

-- Sums of integers: those of bigint are computed as numeric.
create or replace view pglimits.limits as
select
  c.name, c."limit", coalesce(sum(u.held::integer), 0) as held, coalesce(sum(u.waiting::integer), 0) as waiting, c.active,
  c.slot_decay_per_second, coalesce(sum(u.level), 0) as level, c.max_waiters, c.description, c.created_at, c.updated_at
from pglimits.configs c
left join pglimits._uses u on u.limit_id = c.limit_id
group by c.limit_id, c.name
order by c.name;

comment on view pglimits.limits is
  'Every limit. held, waiting and level are over all its keys: slots under live leases; live requests in line; slots that a rate limit '
  'has used and that have not decayed yet.';

create or replace view pglimits.keys as
select u.name, u.key, u.held, u.level, u.waiting, u.fence
from pglimits._uses u
order by u.name, u.key;

comment on view pglimits.keys is
  'Every key that was used and not swept since. fence: no grant of this key had a higher one.';

create or replace view pglimits.holders as
select l.lease_id, c.name, l.key, l.slots,
       coalesce(l.holder, pglimits._as_holder(l.session)) as holder, l.fence, l.priority, l.acquired_at, l.expires_at
from (select pglimits._now() as now) clock
join pglimits.leases l on l.expires_at > clock.now
join pglimits.configs c on c.limit_id = l.limit_id
where l.slots > 0 and l.fence > 0
order by c.name, l.key, l.acquired_at, l.lease_id;

comment on view pglimits.holders is 'Every live lease: one row for each limit that it is on.';

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
  'Every live waiter, in the order in which they go on. A request over several limits has one row, where it stands in line.';
