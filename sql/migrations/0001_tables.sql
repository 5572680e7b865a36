-- Tables and types. Private: nobody but the functions and views of this schema reads or writes them.
--
-- A (limit, key) is the unit of locking: its one row in states is locked first, by everybody, and only then are
-- its leases and its queue touched. Every hot table has (limit_id, key) in its primary key, and no constraint
-- reaches from one (limit, key) to another.

create table pglimits.meta (
  only_row boolean primary key default true check (only_row),
  schema_version integer not null,
  fence_floor bigint not null default 0
);
comment on table pglimits.meta is 'One row about the installation.';
comment on column pglimits.meta.schema_version is 'Number of the newest migration that was applied.';
comment on column pglimits.meta.fence_floor is
  'No deleted limit ever gave a higher fence; new limits start above it.';

create table pglimits.configs (
  limit_id bigint generated always as identity primary key,
  name text collate "C" not null unique,
  "limit" integer not null check ("limit" >= 0),
  slot_decay_per_second double precision not null check (slot_decay_per_second >= 0),
  active boolean not null,
  max_waiters integer check (max_waiters >= 0),
  description text,
  decayed numeric not null default 0,
  decayed_at timestamptz not null,
  fence_floor bigint not null,
  changes integer not null default 0,
  created_at timestamptz not null,
  updated_at timestamptz not null
);
comment on table pglimits.configs is
  'One row per limit: what its owner decided. Changed rarely, read by every request after it has locked a state.';
comment on column pglimits.configs.decayed is
  'Virtual time at decayed_at: the slots that had decayed since the limit was created. See _decayed().';
comment on column pglimits.configs.fence_floor is
  'No key that was swept away ever gave a higher fence; a key starts above it when it is used again.';
comment on column pglimits.configs.changes is 'How often it was changed: a request that waits for several limits notices by this.';

create table pglimits.former_names (
  name text collate "C" not null,
  limit_id bigint not null,
  primary key (name, limit_id)
);
comment on table pglimits.former_names is
  'Names that a limit had before it was renamed: who asked under one, and waits or holds, asks again under it.';

create table pglimits.keys (
  limit_id bigint not null,
  key text collate "C" not null,
  primary key (limit_id, key)
);
comment on table pglimits.keys is
  'Which (limit, key)s have a state. Its primary key is what keeps two first users from creating two: that of states '
  'cannot tell once the version has moved on, and a transaction with an old snapshot does not see the state at all.';

create table pglimits.states (
  limit_id bigint not null,
  key text collate "C" not null,
  version bigint not null,
  held integer not null default 0,
  booked numeric not null default 0,
  pinned integer not null default 0,
  peak numeric not null default 0,
  next_expiry timestamptz not null default 'infinity',
  waiting integer not null default 0,
  head_rank integer not null default 0,
  head_arrival timestamptz not null default '-infinity',
  last_arrival timestamptz not null default '-infinity',
  passed numeric not null default 0,
  next_death timestamptz not null default 'infinity',
  next_waiter_death timestamptz not null default 'infinity',
  next_look timestamptz not null default 'infinity',
  changed_at timestamptz not null,
  primary key (limit_id, key, version)
) with (
  fillfactor = 50,
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 2000,
  autovacuum_analyze_scale_factor = 0.5,
  autovacuum_vacuum_cost_delay = 0
);
comment on table pglimits.states is
  'The hot row: one per (limit, key), rewritten by every grant. Its version is part of the key and only grows, so '
  'that "order by version desc limit 1" meets the live row first even while an old snapshot keeps every dead '
  'version alive. Being locked by whoever decides, it is also where every decision is recorded.';
comment on column pglimits.states.version is 'Grows with every write and with every grant: the source of fences.';
comment on column pglimits.states.held is 'Slots under leases, including those that ended but that nobody took out yet.';
comment on column pglimits.states.booked is
  'The virtual time at which the level reaches zero. level = greatest(booked - virtual time now, 0).';
comment on column pglimits.states.pinned is
  'Turns that lie ahead because another limit of the same request is slower; they are not in booked yet.';
comment on column pglimits.states.peak is
  'No such turn leaves more than this on the level, or than the limit if that is more. More where adjust has added since.';
comment on column pglimits.states.next_expiry is
  'No lease ends before this. A lower bound: renewing and releasing leave it alone. The expiry index is read from here.';
comment on column pglimits.states.waiting is 'Rows of the queue that have no turn yet.';
comment on column pglimits.states.head_rank is
  'With head_arrival: no waiter stands before this place. The queue is read from here.';
comment on column pglimits.states.passed is 'Turns up to this virtual time were removed from the queue.';
comment on column pglimits.states.next_death is 'No sleeper of the rate limit can be found dead before this.';
comment on column pglimits.states.next_waiter_death is
  'No waiter in line can be found dead before this, so that until then waiting counts the live ones. A lower bound: calling '
  'in and leaving leave it alone.';
comment on column pglimits.states.next_look is
  'The moment at which time alone (a lease ends, a level decays, a waiter dies) may let somebody in the queue go on.';

create table pglimits.leases (
  lease_id uuid not null,
  limit_id bigint not null,
  key text collate "C" not null,
  slots integer not null,
  holder jsonb,
  fence bigint not null,
  priority integer not null,
  lease_duration interval not null,
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
comment on table pglimits.leases is 'Slots held. A request over several limits has one row for each.';
comment on column pglimits.leases.claimed is
  'False between a hand-over and the moment its waiter hears of it; until then the lease ends when the waiter would have.';

comment on column pglimits.leases.parts is
  'How many rows the lease has over all its limits: lost on one, it is lost.';

create table pglimits.queue (
  lease_id uuid not null,
  limit_id bigint not null,
  key text collate "C" not null,
  slots integer not null,
  rank integer not null,
  arrival timestamptz not null,
  turn numeric,
  pinned boolean not null default false,
  gap numeric not null default 0,
  added boolean not null default false,
  for_rate boolean not null,
  several boolean not null,
  limit_ids bigint[],
  keys text[],
  seen integer[],
  called boolean not null default false,
  in_vain integer not null default 0,
  kept_until timestamptz,
  lease_duration interval not null,
  holder jsonb,
  channel text,
  expires_at timestamptz not null,
  looks_at timestamptz not null,
  primary key (lease_id, limit_id, key)
) with (
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0.01,
  autovacuum_vacuum_threshold = 2000,
  autovacuum_vacuum_cost_delay = 0
);
create index queue_order on pglimits.queue (limit_id, key, rank, arrival) where turn is null;
create index queue_turns on pglimits.queue (limit_id, key, turn) where turn is not null;
create index queue_pinned on pglimits.queue (limit_id, key, turn, lease_id) where pinned;
create index queue_asleep_over_several on pglimits.queue (limit_id, key) where turn is not null and limit_ids is not null;
create index queue_added on pglimits.queue (limit_id, key, turn) where added;
create index queue_gaps on pglimits.queue (limit_id, key) where gap > 0;
create index queue_called on pglimits.queue (limit_id, key) where called and turn is not null;
comment on table pglimits.queue is
  'Who waits. Without a turn: in line for slots. With a turn: has its place on a rate limit and sleeps until then.';
comment on column pglimits.queue.rank is 'The priority, negated, so that the index is read in one direction.';
comment on column pglimits.queue.arrival is
  'When the request arrived by the database clock, made unique within the (limit, key). Kept when it moves to another limit.';
comment on column pglimits.queue.turn is 'Virtual time at which it may go. Moves by itself when the rate changes.';
comment on column pglimits.queue.pinned is
  'The turn lies later than this limit needs, since another is slower: it is charged when it comes, and others may go before.';
comment on column pglimits.queue.gap is
  'Slots of virtual time right before it that nobody uses: they came free and it has not moved up yet, or it was pinned later '
  'than where those before it end.';
comment on column pglimits.queue.added is
  'No request, but what adjust has added while some slept, who keep their turns: it has a turn behind theirs.';
comment on column pglimits.queue.several is
  'Part of a request over several limits, or, in line, of one for a turn that cannot be told: it is to try again, and never '
  'granted by others.';
comment on column pglimits.queue.limit_ids is 'With keys: all the (limit, key)s of such a request that are enforced.';
comment on column pglimits.queue.seen is 'How often each of them had been changed when it asked. See _changes().';
comment on column pglimits.queue.called is
  'In line: such a request was woken and has not tried again yet. With a turn: it may move up, or has to move. See _rearrange().';
comment on column pglimits.queue.in_vain is 'How often it was called, and found another of its limits taken.';
comment on column pglimits.queue.kept_until is
  'Called in vain too often, it waits on another limit now, and until then nobody behind it goes before it here.';
comment on column pglimits.queue.expires_at is 'The waiter is dead after this unless it calls in. infinity: it never has to.';
comment on column pglimits.queue.looks_at is
  'When its process was told to look again; of a turn without a channel: when it was told to go, and will.';

-- What travels between the functions.

create type pglimits._request as (
  lease_id uuid,
  for_rate boolean,
  limit_ids bigint[],
  keys text[],
  slots integer[],
  places integer[],
  rank integer,
  lease_duration interval,
  wait interval,
  holder jsonb,
  channel text,
  chosen boolean,
  bounded boolean,
  missing text[],
  error text,
  message text
);
comment on type pglimits._request is
  'A checked request. limit_ids, keys and slots are its parts, in the order in which they are locked; places says '
  'which part each given name became (null: not enforced). wait null: for ever. chosen: the caller gave the id, so this may be a repetition. '
  'bounded: some of its limits have max_waiters. '
  'error and message: what was wrong with it.';

create type pglimits._answer as (
  status text,
  lease_id uuid,
  fences bigint[],
  expires_at timestamptz,
  retry_after interval,
  wait interval,
  error text,
  message text
);
comment on type pglimits._answer is 'What became of a request.';

create type pglimits._places as (
  limit_ids bigint[],
  keys text[],
  labels text[]
);
comment on type pglimits._places is 'The (limit, key)s of a batch, in the order in which they are locked.';

create type pglimits._findings as (
  enforced integer,
  impossible text,
  blocked_at integer,
  looks_at timestamptz,
  fits_at timestamptz,
  turn_in interval,
  queue_full text
);
comment on type pglimits._findings is
  'What stands in the way of a request. enforced: how many of its parts are. impossible: why it can never be granted. '
  'blocked_at: the first state that blocks it. looks_at: when time alone may change that. fits_at: null, it can go on; '
  'else the moment from which on it could, infinity where only a release can tell. turn_in: how long until its turn '
  'on the slowest rate limit. queue_full: why it may not wait.';

create type pglimits._decision as (
  answer pglimits._answer,
  states pglimits.states[]
);
comment on type pglimits._decision is 'What becomes of a request, and of the states that it touches.';

create type pglimits._withdrawn as (
  state pglimits.states,
  live uuid[]
);
comment on type pglimits._withdrawn is 'A state without requests that were taken out of its queue, and which of them were live.';

create type pglimits._served as (
  answers pglimits._answer[],
  states pglimits.states[]
);
comment on type pglimits._served is 'What becomes of a batch, and of the states that it touches.';

create type pglimits._placed as (
  state pglimits.states,
  turn numeric,
  pinned boolean
);
comment on type pglimits._placed is 'A state with one more turn, where in virtual time that is, and whether it is pinned.';

create type pglimits._sleeper as (
  lease_id uuid,
  added boolean,
  changed boolean,
  deaf boolean,
  elsewhere boolean,
  channel text,
  at integer[],
  slots integer[],
  pinned boolean[],
  booked numeric[],
  goes_in numeric
);
comment on type pglimits._sleeper is
  'Who sleeps towards turns on some locked states (at). slots, pinned, booked: of each, how many; whether it is pinned '
  'there; and what it takes of what is booked there. added: what adjust has added. changed: one of their limits was, since it '
  'asked. deaf: it cannot be told. elsewhere: it has turns on others too. goes_in: seconds until it goes.';

create type pglimits._turn as (
  turn numeric,
  booked numeric,
  passed_turn numeric,
  passed_id uuid
);
comment on type pglimits._turn is
  'The earliest turn that can be had. booked: before it, with the pinned turns that it comes after, the last of which is '
  'passed_turn, passed_id.';

create type pglimits.acquired as (
  status text,
  lease_id uuid,
  fences bigint[],
  expires_at timestamptz,
  retry_after interval,
  "position" integer
);
comment on type pglimits.acquired is
  'Answer of acquire over several limits: status granted, queued, refused or unlimited; one fence for each name, '
  'in the order of the names (null where not enforced); when to look again; the place in the queue.';

create type pglimits.acquired_one as (
  status text,
  lease_id uuid,
  fence bigint,
  expires_at timestamptz,
  retry_after interval,
  "position" integer
);
comment on type pglimits.acquired_one is 'Answer of acquire on one limit: as pglimits.acquired, with one fence.';

create type pglimits.reserved as (
  status text,
  wait interval,
  retry_after interval,
  lease_id uuid
);
comment on type pglimits.reserved is
  'Answer of rate_limit: granted (sleep for wait, then go), queued (ask again with lease_id after retry_after), '
  'refused (retry_after tells when it would be granted; null: time alone does not help) or unlimited.';

create type pglimits.peeked as (
  status text,
  wait interval,
  retry_after interval,
  "position" integer
);
comment on type pglimits.peeked is
  'What would happen: status granted (for a rate limit after wait), queued (at position), refused or unlimited.';
