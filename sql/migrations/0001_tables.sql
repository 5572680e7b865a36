-- Tables and types. Private: only the functions and views of this schema read or write them.
--
-- A (limit, key) is the unit of locking: its one row in states is locked first, by everybody, and only then are its leases
-- and its line touched. Every hot table has (limit_id, key) in its primary key, and no constraint reaches from one
-- (limit, key) to another.

create table pglimits.meta (
  only_row boolean primary key default true check (only_row),
  schema_version integer not null default 1,
  fence_floor bigint not null default 0
);
comment on table pglimits.meta is 'One row about the installation.';
comment on column pglimits.meta.schema_version is
  'Number of the newest migration that was applied. Each migration makes its own the default: a restore of the definitions alone has no row.';
comment on column pglimits.meta.fence_floor is 'No deleted limit ever gave a higher fence; new limits start above it.';

create table pglimits.configs (
  limit_id bigint generated always as identity primary key,
  name text collate "C" not null unique,
  "limit" integer not null check ("limit" >= 0),
  slot_decay_per_second double precision not null check (slot_decay_per_second >= 0),
  active boolean not null,
  max_waiters integer check (max_waiters >= 0),
  description text,
  decayed double precision not null default 0,
  decayed_at timestamptz not null,
  fence_floor bigint not null,
  created_at timestamptz not null,
  updated_at timestamptz not null,
  grants bigint not null default 0,
  granted_slots bigint not null default 0,
  releases bigint not null default 0,
  expired_leases bigint not null default 0,
  force_released_leases bigint not null default 0,
  held_slot_seconds double precision not null default 0,
  waited_seconds double precision not null default 0,
  waits bigint[]
);
comment on table pglimits.configs is
  'One row per limit: what its owner decided. Each of its states has a copy of what decisions need, so that whoever has locked that has it.';
comment on column pglimits.configs.decayed is 'Virtual time at decayed_at. See _decayed().';
comment on column pglimits.configs.fence_floor is
  'No key that was swept away ever gave a higher fence; a key starts above it when it is used again.';
comment on column pglimits.configs.grants is 'With the seven that follow: what the states of keys had counted that were swept away.';

create table pglimits.known_keys (
  limit_id bigint not null,
  key text collate "C" not null,
  primary key (limit_id, key)
);
comment on table pglimits.known_keys is
  'Which (limit, key)s have a state. Its primary key keeps two first users from creating two: that of states cannot, once the '
  'generation has moved on.';

create table pglimits.states (
  limit_id bigint not null,
  key text collate "C" not null,
  generation bigint not null,
  name text collate "C" not null,
  "limit" integer not null,
  slot_decay_per_second double precision not null,
  active boolean not null,
  max_waiters integer,
  decayed double precision not null,
  decayed_at timestamptz not null,
  version bigint not null,
  held integer not null,
  booked double precision not null,
  next_expiry timestamptz not null,
  waiting integer not null,
  waiting_slots bigint not null,
  head_rank integer not null,
  head_arrival timestamptz not null,
  last_arrival timestamptz not null,
  next_look timestamptz not null,
  changed_at timestamptz not null,
  grants bigint not null,
  granted_slots bigint not null,
  releases bigint not null,
  expired_leases bigint not null,
  force_released_leases bigint not null,
  held_slot_seconds double precision not null,
  waited_seconds double precision not null,
  waits bigint[],
  primary key (limit_id, key, generation)
) with (
  fillfactor = 50,
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 2000,
  autovacuum_analyze_scale_factor = 0.5,
  autovacuum_vacuum_cost_delay = 0
);
-- Of expressions, so that only who looks a limit up by its name takes it. Who has its id might, too, where the tables were empty when they
-- were analyzed, and would read all of it.
create unique index states_by_name on pglimits.states (name, (key || ''), (generation + 0));
comment on table pglimits.states is
  'The hot row: one per (limit, key), rewritten by every grant and release. Whoever decides has it locked.';
comment on column pglimits.states.generation is
  'version / 16, and part of the key: while an old snapshot keeps all dead versions alive, "order by generation desc limit 1" '
  'meets at most 16 of them. Between two generations no index has to change (HOT).';
comment on column pglimits.states.name is 'As the six that follow, a copy of what is in configs: update_limit changes all of them.';
comment on column pglimits.states.version is 'Grows with every write and with every grant: the source of fences.';
comment on column pglimits.states.held is 'Slots under leases, including those that have ended and that nobody took out yet.';
comment on column pglimits.states.booked is 'The virtual time at which the level reaches zero.';
comment on column pglimits.states.next_expiry is
  'No lease ends before this. A lower bound: renewing and releasing leave it alone. The expiry index is read from here.';
comment on column pglimits.states.waiting is 'Rows of the queue in this line, those of the dead included that nobody took out yet.';
comment on column pglimits.states.waiting_slots is 'What all of these wait for.';
comment on column pglimits.states.head_rank is 'With head_arrival: no waiter stands before this place. The queue is read from here.';
comment on column pglimits.states.last_arrival is 'Nobody arrived later. Makes arrivals differ.';
comment on column pglimits.states.next_look is
  'When time alone may let the head of the line go: then the line has to be served by whoever comes by.';

comment on column pglimits.states.grants is 'With the seven that follow, counted since the key was used first: they ride on writes that are made anyway.';
comment on column pglimits.states.held_slot_seconds is
  'What was held, times how long, until changed_at; less what leases that had ended were counted for until they were taken out.';
comment on column pglimits.states.waited_seconds is 'How long those who were granted had waited, together.';
comment on column pglimits.states.waits is
  'How many waited how long before they were granted: see _wait_class(). Null: nobody had to. Who was granted at once is not in it.';

create table pglimits.leases (
  lease_id uuid not null,
  limit_id bigint not null,
  key text collate "C" not null,
  slots integer not null,
  used integer,
  holder jsonb,
  session text[],
  fence bigint not null,
  priority integer not null,
  lease_duration double precision not null,
  claimed boolean not null,
  parts integer not null,
  acquired_at timestamptz not null,
  expires_at timestamptz not null,
  primary key (lease_id, limit_id, key)
) with (
  fillfactor = 80,
  autovacuum_vacuum_scale_factor = 0.01,
  autovacuum_vacuum_threshold = 5000,
  autovacuum_vacuum_cost_delay = 0
);
create index leases_expiry on pglimits.leases (limit_id, key, expires_at);
comment on table pglimits.leases is 'What was granted: a row for each limit of a lease.';
comment on column pglimits.leases.slots is
  '0: no lease, but what became of a request that stood in line, until its caller knows: a rate_limit that was granted, or, with '
  'fence 0, one whose time was over.';
comment on column pglimits.leases.used is
  'What it has used of a rate limit, as far as is known: what it took, until that is settled. Null: it added to no level.';
comment on column pglimits.leases.session is 'Where no holder was given: whose it is.';
comment on column pglimits.leases.fence is '0: slots that are kept for a request over several limits while it waits for the others.';
comment on column pglimits.leases.claimed is
  'False between a hand-over and the moment its waiter hears of it; until then the lease ends when the waiter would have.';
comment on column pglimits.leases.parts is 'How many rows the lease has over all its limits: lost on one, it is lost.';
comment on column pglimits.leases.acquired_at is 'The moment of the grant: its holder goes then, and not before.';

create type pglimits._part as (
  limit_id bigint,
  key text,
  slots integer
);
comment on type pglimits._part is 'What a request over several limits wants of one of them.';

create table pglimits.queue (
  lease_id uuid not null,
  limit_id bigint not null,
  key text collate "C" not null,
  slots integer not null,
  rank integer not null,
  arrival timestamptz not null,
  parts pglimits._part[],
  clamp boolean not null,
  lease_duration double precision,
  holder jsonb,
  channel text,
  deadline timestamptz not null,
  looks_at timestamptz not null,
  expires_at timestamptz not null,
  primary key (lease_id, limit_id, key)
) with (
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0.01,
  autovacuum_vacuum_threshold = 2000,
  autovacuum_vacuum_cost_delay = 0
);
create index queue_order on pglimits.queue (limit_id, key, rank, arrival);
comment on table pglimits.queue is 'Who waits: a row for each request, in one line, also where it is one over several limits.';
comment on column pglimits.queue.rank is 'The priority, negated, so that the index is read in one direction.';
comment on column pglimits.queue.arrival is
  'When the request arrived by the database clock, made unique. Kept when it goes to stand in another line.';
comment on column pglimits.queue.parts is 'Of a request over several limits: all that it wants, in the order of locking.';
comment on column pglimits.queue.clamp is
  'Where the limit has fewer slots than it wants when its turn comes, it takes all that the limit has.';
comment on column pglimits.queue.lease_duration is 'Seconds. Null: a rate_limit, which gets no lease.';
comment on column pglimits.queue.deadline is 'Not to be granted later than this: its timeout, counted from its first call.';
comment on column pglimits.queue.looks_at is 'When its process was told to look, unless it hears something before.';
comment on column pglimits.queue.expires_at is 'It is dead after this, unless it, or its process, calls in.';

create table pglimits.processes (
  channel text collate "C" primary key,
  expires_at timestamptz not null
) with (
  fillfactor = 50,
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 1000
);
comment on table pglimits.processes is 'The heartbeats of processes that wait, by the channels on which they listen.';
comment on column pglimits.processes.expires_at is 'The process is dead after this, and all that waits in it, unless it calls in.';

-- What is remembered: events, and samples of what was used. sweep() keeps both short.

create table pglimits.event_log (
  event_id bigint generated always as identity primary key,
  at timestamptz not null,
  kind text not null,
  name text collate "C" not null,
  key text collate "C",
  lease_id uuid,
  slots integer,
  fence bigint,
  holder jsonb,
  held_seconds double precision,
  old jsonb,
  new jsonb,
  session text[],
  on_behalf_of text
);
create index event_log_lease on pglimits.event_log (lease_id) where lease_id is not null;
create index event_log_name on pglimits.event_log (name, event_id);
comment on table pglimits.event_log is 'What happened to limits and leases, written in the transaction in which it did.';
comment on column pglimits.event_log.held_seconds is 'For how long the lease was held.';
comment on column pglimits.event_log.old is 'What was changed, as it was; new: as it is since.';
comment on column pglimits.event_log.on_behalf_of is 'Whom the session acted for: its setting pglimits.by.';

create table pglimits.samples (
  limit_id bigint not null,
  at timestamptz not null,
  "limit" integer not null,
  held bigint not null,
  level double precision not null,
  waiting bigint not null,
  grants bigint not null,
  granted_slots bigint not null,
  releases bigint not null,
  expired_leases bigint not null,
  force_released_leases bigint not null,
  held_slot_seconds double precision not null,
  waited_seconds double precision not null,
  waits bigint[],
  primary key (limit_id, at)
);
create index samples_at on pglimits.samples (at);
comment on table pglimits.samples is
  'Every limit that was used, once a minute: what was held and waited for at that moment, and what had been counted until then. '
  'Samples between two others may go without a loss: what was counted is in the later one.';

create table pglimits.upkeep (
  only_row boolean primary key default true check (only_row),
  history_seconds double precision not null default 691200,
  swept_at timestamptz not null default '-infinity',
  sampled_at timestamptz not null default '-infinity'
);
comment on table pglimits.upkeep is 'One row about the sweep: when it was called and when it sampled last, and for how long events and samples are kept.';

-- What travels between the functions.

create type pglimits._request as (
  for_rate boolean,
  names text[],
  limit_ids bigint[],
  keys text[],
  slots integer[],
  rank integer,
  timeout_seconds double precision,
  lease_duration double precision,
  channel text,
  missing text[],
  clamp boolean,
  at_once boolean
);
comment on type pglimits._request is
  'A checked request. limit_ids, keys and slots are its parts that are enforced, in the order in which they are locked. '
  'timeout_seconds null: for ever. missing: the names of which there is no limit. '
  'clamp: slots above a limit count as the limit. at_once: the call that it is part of has locked states before.';

create type pglimits._outcome as (
  first integer,
  last integer,
  status text,
  fence bigint,
  expires_at timestamptz,
  seconds double precision[]
);
comment on type pglimits._outcome is
  'What became of requests that are alike, from the first to the last. status: granted, queued, refused, or full (the line is). '
  'fence: of the first; each of the others has the next. seconds: of each, until it may go, or until it is to look (null: not known).';

-- What callers get.

create type pglimits.acquired as (
  status text,
  lease_id uuid,
  fence bigint,
  expires_at timestamptz,
  retry_after double precision,
  "position" integer
);
comment on type pglimits.acquired is
  'Answer of acquire. status: granted, queued, refused or unlimited. retry_after: seconds. position: the place in line.';

create type pglimits.acquired_all as (
  status text,
  lease_id uuid,
  fences bigint[],
  expires_at timestamptz,
  retry_after double precision,
  "position" integer
);
comment on type pglimits.acquired_all is
  'Answer of acquire_all: as pglimits.acquired, with a fence for each name, in the order of the names (null where not enforced).';

create type pglimits.rate_limited as (
  status text,
  retry_after double precision,
  lease_id uuid,
  "position" integer
);
comment on type pglimits.rate_limited is
  'Answer of rate_limit. status: granted (go now), queued, refused or unlimited. retry_after: seconds. position: the place in line.';

create type pglimits.peeked as (
  status text,
  retry_after double precision,
  "position" integer
);
comment on type pglimits.peeked is 'Answer of peek: what the request would be told.';
