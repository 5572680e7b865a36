"""The doctor on what keeps things going, and on what slows them down."""

from __future__ import annotations

import queue
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import _client, _output, _rights
from ._doctor import FAIL, OK, SKIP, WARN, Case, Finding

if TYPE_CHECKING:
    import psycopg

PATIENCE = 10.0
"""Seconds to wait for further connections."""
OLD_SNAPSHOT = 300
"""Seconds from which on a snapshot is said to bloat."""
OLD_XIDS = 1_000_000
"""Transactions by which a replication slot or a standby may hold the horizon back."""
LONG_LOCK = 5
"""Seconds from which on a transaction with a lock on pglimits is long."""
LONG_WAIT = 300
"""Seconds from which on it is worth a look what the head of a line waits for."""
IDLE_SLOT = 4
"""Seconds for which a slot may be free beside a waiter that fits: whoever waits looks every 3 seconds."""
MANY_UNSWEPT = 10_000
"""Ended leases and dead waiters from which on a sweep is due."""
MANY_DEAD = 200_000
"""Dead rows from which on autovacuum is said not to keep up."""


# The janitor.


def _sweep(case: Case) -> Iterator[Finding]:
    other_means = "pglimits sweep --every 60"
    here = case.one("select extversion from pg_extension where extname = 'pg_cron'")
    home = case.one("select current_setting('cron.database_name', true)") or None
    mine = case.one("select current_database()::text")
    if here is None and (home is None or home == mine):
        what = "pg_cron is not created in this database" if home else "there is no pg_cron on this server"
        fix = (
            f"create extension pg_cron; then: pglimits cron enable (or let run: {other_means})" if home else other_means
        )
        yield Finding("sweep", WARN, f"{what}: nothing tidies up unless somebody calls sweep()", fix)
        return
    job_name = f"pglimits sweep {mine}"
    if here is not None:
        yield from _job(case.connection, job_name, mine)
        return
    with _client.connect(case.target.conninfo, dbname=home) as there:
        yield from _job(there, job_name, str(home))


def _job(connection: psycopg.Connection[tuple[Any, ...]], job_name: str, home: str) -> Iterator[Finding]:
    job = connection.execute(
        "select jobid, schedule, active from cron.job where jobname = %s order by active desc limit 1", [job_name]
    ).fetchone()
    if job is None:
        yield Finding(
            "sweep",
            WARN,
            f"pg_cron (in database {home}) is there, but no sweep of yours is scheduled",
            "pglimits cron enable",
        )
        return
    job_id, schedule, active = job
    if not active:
        yield Finding("sweep", WARN, f"pg_cron's job {job_name!r} is not active", "pglimits cron enable")
        return
    failed = connection.execute(
        "select status = 'failed', return_message from cron.job_run_details where jobid = %s"
        " and status in ('failed', 'succeeded') order by runid desc limit 1",
        [job_id],
    ).fetchone()
    if failed is not None and failed[0]:
        yield Finding(
            "sweep",
            FAIL,
            f"pg_cron's last sweep failed: {failed[1]}",
            "see cron.job_run_details; often pg_cron may not connect: pg_hba.conf, or cron.use_background_workers = on",
        )
        return
    yield Finding("sweep", OK, f"pg_cron sweeps: {schedule}")


# The way of a wake-up.


def _listen(case: Case) -> Iterator[Finding]:
    pooled = case.one("select pg_backend_pid()") != case.connection.info.backend_pid
    heard = _in_time(lambda: _heard(case))
    if heard is None:
        yield Finding(
            "listen",
            WARN,
            f"two more connections did not answer within {PATIENCE:g} s: the server or the pool is full",
            "raise default_pool_size of the pooler or max_connections of the server, or close connections",
        )
    elif heard:
        through = "; a pooler is in between, in session mode" if pooled else ""
        yield Finding("listen", OK, f"notifications arrive: who waits is woken at once{through}")
    else:
        why = (
            "a pooler is in between, and LISTEN does not reach through it" if pooled else "notifications do not arrive"
        )
        yield Finding(
            "listen",
            WARN,
            f"{why}: who waits has to poll, and is woken later",
            "point the DSN at the server itself, or at a pool in session mode",
        )
        if pooled:
            yield from _prepared(case)


def _in_time(look: Callable[[], bool]) -> bool | None:
    """What ``look`` finds; None if it takes too long, as where it waits for a full pool."""
    answers: queue.SimpleQueue[bool | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(look())
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=PATIENCE)
    except queue.Empty:
        return None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _heard(case: Case) -> bool:
    """Whether a notification of one connection reaches another that is idle, as a waiting one is."""
    channel = f"pglimits_doctor_{secrets.token_hex(6)}"
    with (
        _client.connect(case.target.conninfo, prepare_threshold=None) as listener,
        _client.connect(case.target.conninfo, prepare_threshold=None) as speaker,
    ):
        listener.execute(f"listen {channel}".encode())
        speaker.execute(f"notify {channel}".encode())
        return any(True for _ in listener.notifies(timeout=2, stop_after=1))


def _prepared(case: Case) -> Iterator[Finding]:
    """A pooler may hand the next statement to a server that never saw it prepared."""
    import psycopg

    works = True
    connections = [_client.connect(case.target.conninfo, prepare_threshold=0) for _ in range(2)]
    try:
        for _ in range(3):
            for connection in connections:
                connection.execute("select pg_backend_pid(), %s::int", [1])
    except psycopg.Error:
        works = False
    finally:
        for connection in connections:
            connection.close()
    if works:
        yield Finding("prepared", OK, "prepared statements work through the pooler")
    else:
        yield Finding(
            "prepared",
            WARN,
            "the pooler loses prepared statements; pglimits does not use them there, your own pool may",
            "PgBouncer 1.21 or later with max_prepared_statements, or prepare_threshold=None in a pool that you pass",
        )


# What slows things down.


def _snapshots(case: Case) -> Iterator[Finding]:
    old = case.rows(
        """
        select pid, coalesce(usename, '?'), coalesce(application_name, ''), coalesce(state, backend_type),
               extract(epoch from clock_timestamp() - coalesce(xact_start, backend_start))::float8
        from pg_stat_activity
        where backend_xmin is not null and pid <> pg_backend_pid()
          and (datname = current_database() or backend_type = 'walsender') and backend_type <> 'autovacuum worker'
          and coalesce(xact_start, backend_start) < clock_timestamp() - make_interval(secs => %s)
          and (backend_type <> 'walsender' or age(backend_xmin) > %s)
        order by 5 desc limit 5
        """,
        OLD_SNAPSHOT,
        OLD_XIDS,
    )
    for pid, user, program, state, age in old:
        yield Finding(
            "snapshots",
            WARN,
            f"{_session(pid, user, program)} holds a snapshot since {_output.duration(age)} ({state}):"
            " dead rows pile up meanwhile",
            f"let it end, or: select pg_terminate_backend({pid});",
        )
    prepared = case.rows(
        "select gid, extract(epoch from clock_timestamp() - prepared)::float8 from pg_prepared_xacts"
        " where database = current_database() and prepared < clock_timestamp() - make_interval(secs => %s)"
        " order by prepared limit 5",
        OLD_SNAPSHOT,
    )
    for gid, age in prepared:
        yield Finding(
            "snapshots",
            WARN,
            f"the prepared transaction {gid!r} is open since {_output.duration(age)}: dead rows pile up",
            f"rollback prepared {_literal(gid)}; (or commit prepared …)",
        )
    slots = case.rows(
        "select slot_name, active, greatest(age(xmin), age(catalog_xmin)) from pg_replication_slots"
        " where age(xmin) > %s order by 3 desc limit 5",
        OLD_XIDS,
    )
    for slot, active, age in slots:
        yield Finding(
            "snapshots",
            WARN,
            f"the {'' if active else 'inactive '}replication slot {slot} holds rows back, {age:,} transactions by now",
            f"let its standby catch up, or: select pg_drop_replication_slot({_literal(slot)});",
        )
    if not old and not prepared and not slots:
        blind = (
            ""
            if case.one("select pg_has_role('pg_read_all_stats', 'member')")
            else " among those that you may see (all of them: grant pg_read_all_stats)"
        )
        yield Finding("snapshots", OK, f"no snapshot older than {_output.duration(OLD_SNAPSHOT)}{blind}")


def _session(pid: int, user: str, program: str) -> str:
    return f"session {pid} of {user}" + (f" ({program})" if program else "")


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


# Who is at work on a limit, and behind whom: each up to those that wait for nobody, who alone are to blame. Process 0
# stands for the prepared transactions.
_ROOTS = """
    with recursive waits as (
      select w.pid, b.blocker, w.since
      from (select l.pid, min(l.waitstart) as since from pg_locks l where not l.granted group by l.pid) w
      cross join lateral unnest(pg_blocking_pids(w.pid)) as b(blocker)
    ), workers as (
      select distinct coalesce(l.pid, 0) as pid
      from pg_locks l join pg_class c on c.oid = l.relation
      where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'r'
        and l.mode not in ('AccessShareLock', 'ShareUpdateExclusiveLock')
        and l.database = (select d.oid from pg_database d where d.datname = current_database())
        and l.pid is distinct from pg_backend_pid()
    ), reached as (
      select w.pid as worker, w.pid, null::timestamptz as since from workers w
      union
      select r.worker, w.blocker, w.since from reached r join waits w on w.pid = r.pid
    ), roots as (
      select r.pid, count(distinct r.worker) filter (where r.worker <> r.pid) as blocked, min(r.since) as since
      from reached r where not exists (select from waits w where w.pid = r.pid) group by r.pid
    )
    select r.pid, coalesce(a.usename, '?'), coalesce(a.application_name, ''), coalesce(a.state, '?'), r.blocked,
           extract(epoch from clock_timestamp() - coalesce(a.xact_start, r.since))::float8,
           r.pid in (select w.pid from workers w)
    from roots r join pg_stat_activity a on a.pid = r.pid
    where coalesce(a.xact_start, r.since) < clock_timestamp() - make_interval(secs => %(long)s)
      and coalesce(a.backend_type, '') <> 'autovacuum worker'
    union all
    select 0, p.gid, null, null, coalesce((select r.blocked from roots r where r.pid = 0), 0),
           extract(epoch from clock_timestamp() - p.prepared)::float8, true
    from pg_prepared_xacts p
    where p.database = current_database() and p.prepared < clock_timestamp() - make_interval(secs => %(long)s)
      and exists (
        select from pg_locks t join pg_locks l on l.virtualtransaction = t.virtualtransaction and l.pid is null
        join pg_class c on c.oid = l.relation and c.relnamespace = 'pglimits'::regnamespace
        where t.pid is null and t.transactionid = p.transaction and l.mode <> 'AccessShareLock')
    order by 5 desc, 6 desc limit 5
"""


def _locks(case: Case) -> Iterator[Finding]:
    roots = case.rows(_ROOTS, {"long": LONG_LOCK})
    for pid, user, program, state, blocked, age, at_work in roots:
        who = _session(pid, user, program) if pid else f"the prepared transaction {user!r}"
        others = _output.count(blocked, "other")
        shown = f" ({state})" if state else ""
        if at_work:
            text = f"{who} keeps a limit locked since {_output.duration(age)}{shown}" + (
                f" and blocks {others}" if blocked else ""
            )
        else:
            text = f"{who} holds up {others} at work on a limit since {_output.duration(age)}{shown}"
        end = f"select pg_terminate_backend({pid});" if pid else f"rollback prepared {_literal(user)};"
        yield Finding(
            "locks",
            FAIL if blocked else WARN,
            f"{text}: call acquire and release in a transaction of their own (autocommit)" if at_work else text,
            end,
        )
    if not roots:
        yield Finding("locks", OK, "no long transaction keeps a limit locked")


_HEADS = """
    select l.name, l."limit", l.active, l.waiting, h.key, h.lease_id, h.slots,
           extract(epoch from pglimits._now() - h.waiting_since)::float8, k.held,
           l.slot_decay_per_second = 0 and l.active and l."limit" > 0 and k.held + h.slots <= l."limit"
    from pglimits.limits l
    join pglimits.waiters h on h.name = l.name and h."position" = 1
    join pglimits.keys k on k.name = h.name and k.key = h.key
    where l.waiting > 0 order by h.waiting_since
"""


def _waiters(case: Case) -> Iterator[Finding]:
    if _rights.READER not in case.may:
        yield Finding("waiters", SKIP, "you may not look at the waiters (pglimits_reader)")
        return
    heads = case.rows(_HEADS)
    unserved: set[object] = set()
    if any(fits for *_, fits in heads):  # in that very moment, or for good?
        time.sleep(IDLE_SLOT)
        fitted = {lease_id for *_, lease_id, _, _, _, fits in heads if fits}
        heads = case.rows(_HEADS)
        unserved = {lease_id for *_, lease_id, _, _, _, fits in heads if fits and lease_id in fitted}
    troubled: set[str] = set()
    for head in heads:
        found = _trouble(*head[:9], served=head[5] not in unserved)
        if found is not None and head[0] not in troubled:
            troubled.add(head[0])
            yield found
    if not troubled:
        waiting = case.one("select coalesce(sum(waiting), 0)::int from pglimits.limits")
        text = f"{_output.count(waiting, 'request')} waiting, none of them in trouble" if waiting else "nobody waits"
        yield Finding("waiters", OK, text)


def _trouble(
    name: str,
    limit: int,
    active: bool,
    waiting: int,
    key: str,
    lease_id: object,
    slots: int,
    waited: float,
    held: int,
    *,
    served: bool,
) -> Finding | None:
    """What is wrong with a line, told by its head."""
    shown = shlex.quote(name)
    requests = _output.count(waiting, "request")
    head = f"the head of {name!r}" + (f" (key {key!r})" if key else "")
    since = f"waits since {_output.duration(waited)}"
    if limit == 0:
        return Finding(
            "waiters",
            WARN,
            f"{requests} for {name!r}, whose limit is 0: nobody is let in",
            f"pglimits update {shown} --limit N",
        )
    if not active:
        return Finding(
            "waiters",
            WARN,
            f"{requests} for {name!r}, which is not active: nobody serves them",
            f"pglimits enable {shown}",
        )
    if not served:
        return Finding(
            "waiters",
            FAIL,
            f"{head} {since} for {_output.count(slots, 'slot')} although {limit - held} are free: nobody serves it",
            f"pglimits sweep (or take it out: pglimits release {lease_id})",
        )
    if waited > LONG_WAIT:
        return Finding(
            "waiters",
            WARN,
            f"{head} {since}; {held} of {limit} slots are held, {requests} in all",
            f"pglimits holders {shown} (and perhaps: pglimits release LEASE_ID)",
        )
    return None


def _tables(case: Case) -> Iterator[Finding]:
    rows = case.rows(
        """
        select c.relname::text, pg_total_relation_size(c.oid)::bigint,
               coalesce(s.n_live_tup, 0), coalesce(s.n_dead_tup, 0)
        from pg_class c left join pg_stat_all_tables s on s.relid = c.oid
        where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'r'
        """
    )
    well = True
    for name, size, live, dead in rows:
        if dead > MANY_DEAD and dead > live:
            well = False
            yield Finding(
                "tables",
                WARN,
                f"pglimits.{name} has {dead:,} dead rows beside {live:,} live ones ({size / 1e6:,.0f} MB):"
                " autovacuum cannot keep up, or an old snapshot holds it back",
                f"vacuum (verbose) pglimits.{name};",
            )
    if case.one("select current_setting('autovacuum')") == "off":
        well = False
        yield Finding("tables", WARN, "autovacuum is off", "alter system reset autovacuum; select pg_reload_conf();")
    if case.may_read_tables:
        ended, dead_waiters = case.rows(
            "select (select count(*) from pglimits.leases where expires_at <= pglimits._now()),"
            " (select count(*) from pglimits.queue q left join pglimits.processes p on p.channel = q.channel"
            " where greatest(q.expires_at, p.expires_at) <= pglimits._now())"
        )[0]
        if ended + dead_waiters > MANY_UNSWEPT:
            well = False
            yield Finding(
                "tables",
                WARN,
                f"{ended:,} ended leases and {dead_waiters:,} dead waiters were not swept away",
                "pglimits sweep",
            )
    if well:
        total = sum(size for _, size, _, _ in rows)
        yield Finding("tables", OK, f"{total / 1e6:,.1f} MB with indexes")


CHECKS = (
    ("sweep", _sweep),
    ("listen", _listen),
    ("locks", _locks),
    ("snapshots", _snapshots),
    ("waiters", _waiters),
    ("tables", _tables),
)
"""The checks of this module, in order."""
