-- What anybody may see who may see anything. Decay and expiry are applied as of now, whatever has been taken out yet.
--
-- Sets are joined to sets, with no query for each row: such would look so expensive to the planner that it has them compiled (jit).

create or replace view pglimits._uses as
select s.limit_id, s.key, s.held, s.waiting, s.booked, s.version
from pglimits.states s
union all
select l.limit_id, l.key, -l.slots, 0, null, null
from (select pglimits._now() as now) clock
join pglimits.states s on s.next_expiry <= clock.now
join pglimits.leases l on l.limit_id = s.limit_id and l.key = s.key and l.expires_at >= s.next_expiry and l.expires_at <= clock.now
union all
select q.limit_id, q.key, 0, -1, null, null
from (select pglimits._now() as now) clock
join pglimits.queue q on q.expires_at <= clock.now
left join pglimits.processes p on p.channel = q.channel
where coalesce(p.expires_at <= clock.now, true);

comment on view pglimits._uses is
  'What each (limit, key) holds: its state, less what has ended or died and was not taken out yet. Sum it up.';

create or replace view pglimits.limits as
select
  c.name, c."limit", coalesce(sum(u.held), 0) as held, coalesce(sum(u.waiting), 0) as waiting, c.active, c.slot_decay_per_second,
  coalesce(sum(greatest(u.booked - pglimits._decayed(c.decayed, c.slot_decay_per_second, c.decayed_at, clock.now), 0))
           filter (where c.slot_decay_per_second > 0), 0) / 1000000 as level,
  c.max_waiters, c.description, c.created_at, c.updated_at
from (select pglimits._now() as now) clock
cross join pglimits.configs c
left join pglimits._uses u on u.limit_id = c.limit_id
group by c.limit_id, c.name
order by c.name;

comment on view pglimits.limits is
  'Every limit. held, waiting and level are over all its keys: slots under live leases; live requests in line; slots that a rate limit '
  'has used and that have not decayed yet.';


create or replace view pglimits.keys as
select
  c.name, u.key, sum(u.held) as held,
  coalesce(sum(greatest(u.booked - pglimits._decayed(c.decayed, c.slot_decay_per_second, c.decayed_at, clock.now), 0))
           filter (where c.slot_decay_per_second > 0), 0) / 1000000 as level,
  sum(u.waiting) as waiting, max(u.version) as fence
from (select pglimits._now() as now) clock
cross join pglimits.configs c
join pglimits._uses u on u.limit_id = c.limit_id
group by c.limit_id, c.name, u.key
order by c.name, u.key;

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
