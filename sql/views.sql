-- What anybody may see who may see anything. Decay and expiry are applied as of now, whatever has been taken out yet.

create or replace view pglimits.limits as
select
  c.name, c."limit", c.active, c.slot_decay_per_second,
  coalesce(s.held, 0)::bigint as held,
  coalesce(s.level, 0)::double precision as level,
  coalesce(w.waiting, 0) as waiting,
  c.max_waiters, c.description, c.created_at, c.updated_at
from (select pglimits._now() as now) clock
cross join pglimits.configs c
cross join lateral (
  select c.decayed + c.slot_decay_per_second::numeric * extract(epoch from clock.now - c.decayed_at) as decayed
) v
left join lateral (
  select
    sum(k.held - case when k.next_expiry > clock.now then 0 else coalesce((
      select sum(l.slots) from pglimits.leases l
      where l.limit_id = k.limit_id and l.key = k.key
        and l.expires_at >= k.next_expiry and l.expires_at <= clock.now), 0) end) as held,
    -- Without the turns of the dead, and without what lies free before those who sleep.
    sum(greatest(greatest(b.booked, f.reserved, f.free) - coalesce(f.free, 0)
      - case when k.next_death > clock.now then 0 else coalesce((
        select sum(q.slots + least(q.gap, 0)) from pglimits.queue q
        where q.limit_id = k.limit_id and q.key = k.key and q.turn > v.decayed and q.expires_at <= clock.now
          and not q.pinned), 0) end, 0))
      filter (where c.slot_decay_per_second > 0) as level
  from pglimits.states k
  cross join lateral (
    -- Pinned turns that have come are charged: each when it came.
    select case when k.pinned = 0 then k.booked else (
      select greatest(k.booked + coalesce(sum(p.slots), 0), max(p.turn + p.following))
      from (select q.turn, q.slots, sum(q.slots) over (order by q.turn desc, q.lease_id desc) as following
            from pglimits.queue q
            where q.limit_id = k.limit_id and q.key = k.key and q.pinned and q.turn <= v.decayed) p) end - v.decayed as booked
  ) b
  left join lateral (
    select sum(q.slots + q.gap) as reserved, sum(greatest(q.gap, 0)) as free from pglimits.queue q
    where q.limit_id = k.limit_id and q.key = k.key and q.turn > v.decayed and not q.pinned
      and exists (select from pglimits.queue g where g.limit_id = k.limit_id and g.key = k.key and g.gap > 0)
  ) f on true
  where k.limit_id = c.limit_id
) s on true
left join lateral (
  select count(*) as waiting from pglimits.queue q
  where q.limit_id = c.limit_id and q.expires_at > clock.now and (q.turn is null or q.turn > v.decayed) and not q.added
) w on true;

comment on view pglimits.limits is
  'Every limit. held, level and waiting are over all its keys: slots under live leases; slots used (or reserved ahead) '
  'and not decayed yet; live requests in the queue or asleep until their turn.';

create or replace view pglimits.holders as
select l.lease_id, c.name, l.key, l.slots, l.holder, l.fence, l.priority, l.acquired_at, l.expires_at
from (select pglimits._now() as now) clock
cross join pglimits.leases l
join pglimits.configs c on c.limit_id = l.limit_id
where l.expires_at > clock.now;

comment on view pglimits.holders is 'Every live lease: one row for each limit that it is on.';

create or replace view pglimits.waiters as
select
  q.lease_id, c.name, q.key, q.slots, q.holder, -q.rank as priority,
  (row_number() over (partition by q.limit_id, q.key order by q.turn nulls last, q.rank, q.arrival))::integer
    as "position",
  q.arrival as waiting_since
from (select pglimits._now() as now) clock
cross join pglimits.queue q
join pglimits.configs c on c.limit_id = q.limit_id
where q.expires_at > clock.now and not q.added
  and (q.turn is null or q.turn > c.decayed + c.slot_decay_per_second::numeric
                                              * extract(epoch from clock.now - c.decayed_at));

comment on view pglimits.waiters is
  'Every live waiter, in the order in which they go on: those asleep until a reserved turn, then the queue. '
  'A request over several limits has a row for each where it has a turn or a place in line.';
