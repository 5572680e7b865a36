"""What a call reads, whatever the planner knew of the tables when it made the plans that a session keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqltest import Db, Session

LONG = "repeat('-', 150)"
"""What the names of limits end in, so that it takes many blocks to read all of an index."""
TABLES = ("configs", "states", "known_keys", "leases", "queue", "processes", "event_log", "samples")


def many(s: Session, first: int, last: int) -> None:
    """Limits with a lease each, leases of one limit, waiters of another, and what is remembered of them."""
    each = f"from generate_series({first}, {last}) n"
    s.run(f"select pglimits.create_limit('limit' || n || {LONG}, 2) {each}")
    s.run(f"select pglimits.acquire('limit' || n || {LONG}, lease_duration => 86400) {each}")
    for name, timeout, lease in (("big", "0", "big"), ("full", "null", "waiter")):
        s.run(
            f"select from pglimits._acquire_batch('{{{name}}}', '{{1}}', '{{\"\"}}', false, {timeout}, 86400, 0,"
            f" (select array_agg(md5('{lease}' || n)::uuid) {each}), (select jsonb_agg('{{}}'::jsonb) {each}),"
            " false, false, 'pglimits_p1')"
        )
    s.run(f"insert into pglimits.processes select 'pglimits_p' || n, 'infinity' {each}")
    s.run(
        "insert into pglimits.event_log (at, kind, name, key, lease_id, slots, fence)"
        f" select now(), 'expired', 'limit1', '', md5('gone' || n)::uuid, 1, n {each}"
    )
    s.run(
        "insert into pglimits.samples select c.limit_id, now() - interval '1 hour', 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0"
        f" {each} join pglimits.configs c on c.name = 'limit' || n || {LONG}"
    )


def begin(s: Session) -> None:
    for name, limit, rate in (
        ("big", 10**6, 0),
        ("full", 1, 0),
        ("gpu", 1, 0),
        ("tokens", 10**6, 1),
        ("api", 1, 0.001),
    ):
        s.create(name, limit, rate)
    for name in ("full", "gpu"):
        s.run("select pglimits.acquire(%s, lease_id => md5(%s)::uuid, lease_duration => 86400)", name, name)
    s.run("select pglimits.acquire_all('{big,tokens}', lease_id => md5('several')::uuid, lease_duration => 86400)")
    s.run("select pglimits.acquire_all('{gpu,big}', lease_id => md5('waits')::uuid, timeout_seconds => 86400)")
    s.run("select pglimits.rate_limit('api')")


CALLS = {
    "acquire": "pglimits.acquire('limit1')",
    "acquire, in line": "pglimits.acquire('full', timeout_seconds => 60)",
    "acquire, again": "pglimits.acquire('big', lease_id => md5('big1')::uuid)",
    "acquire, again, in line": "pglimits.acquire('full', timeout_seconds => 60, lease_id => md5('waiter1')::uuid)",
    "acquire, missing": "pglimits.acquire('missing')",
    "acquire_all": "pglimits.acquire_all(array['big', 'limit1'])",
    "acquire_all, again": "pglimits.acquire_all('{gpu,big}', lease_id => md5('waits')::uuid, timeout_seconds => 60)",
    "rate_limit_all": "pglimits.rate_limit_all('{tokens,api}', timeout_seconds => 0)",
    "release": "pglimits.release(md5('big1')::uuid)",
    "release, to a waiter": "pglimits.release(md5('full')::uuid)",
    "release, of a waiter": "pglimits.release(md5('waiter2')::uuid)",
    "release, of several": "pglimits.release(md5('several')::uuid)",
    "release_batch": "pglimits._release_batch(array[md5('big1'), md5('big2')]::uuid[])",
    "renew": "pglimits.renew(md5('big1')::uuid)",
    "renew, too late": "pglimits.renew(md5('gone1')::uuid)",
    "settle": "pglimits.settle(md5('several')::uuid, 'tokens', 5)",
    "taken": "pglimits._taken(md5('several')::uuid)",
    "watch": "pglimits._watch(array[md5('waiter1'), md5('waits')]::uuid[], false)",
    "watch, granted": "pglimits.update_limit('full', 3), pglimits._watch(array[md5('waiter1')]::uuid[], false)",
    "sleep": "pglimits._sleep(md5('waiter2')::uuid, now())",
    "force_release": "pglimits.force_release(md5('big1')::uuid)",
    "force_release, of a waiter": "pglimits.force_release(md5('waiter2')::uuid)",
    "create_limit": "pglimits.create_limit('new', 1)",
    "delete_limit": "pglimits.delete_limit('limit1')",
    "delete_limit, big": "pglimits.delete_limit('big')",
    "reset": "pglimits.reset('limit1')",
    "reset, big": "pglimits.reset('big')",
    "history": "pglimits.history('limit1')",
    "why_waiting": "pglimits.why_waiting('full')",
    "apply": "pglimits._apply((select jsonb_build_object('prune', true, 'limits', jsonb_agg(jsonb_build_object("
    "'name', c.name, 'action', 'none', 'old', to_jsonb(c)))) from pglimits.configs c))",
    "sweep, an hour later": "pglimits.sweep(idle_seconds => 0)",
}


def blocks(s: Session, call: str) -> int:
    """How many blocks a call reads, once its plans are made."""
    read = []
    for _ in range(3):
        s.run("begin")
        if "later" in call:
            s.run("update pglimits.leases set expires_at = now() - interval '1 ms' where lease_id <= md5('big1')::uuid")
            s.run("update pglimits.states set next_expiry = '-infinity'")
            s.run("update pglimits.upkeep set sampled_at = '-infinity'")
        steps = CALLS[call].replace("'limit1'", f"'limit1' || {LONG}").split("), pglimits.")
        for step in steps[:-1]:
            s.run(f"select {step})")
        last = steps[-1] if len(steps) == 1 else "pglimits." + steps[-1]
        (plan,) = s.value(f"explain (analyze, buffers, format json) select * from {last}")
        read.append(int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]))
        s.run("rollback")
    return min(read)


def analyzed_when_there_were_few(db: Db, s: Session, size: int) -> Session:
    begin(s)
    many(s, 1, 2)
    for table in TABLES:
        s.run(f"analyze pglimits.{table}")
    session = db.session()
    for call in CALLS:
        blocks(session, call)
    many(s, 3, size)
    return session


def analyzed_when_there_were_none(db: Db, s: Session, size: int) -> Session:
    begin(s)
    many(s, 1, size)
    for table in TABLES:
        s.run(f"delete from pglimits.{table}")
        s.run(f"analyze pglimits.{table}")
    begin(s)
    many(s, 1, size)
    return db.session()


def reindexed_and_analyzed_when_there_were_none(db: Db, s: Session, size: int) -> Session:
    """The primary keys are the newest indexes then, as in a restore: where plans seem to cost the same, others win."""
    for (name,) in s.all(
        "select k.conname from pg_constraint k where k.contype = 'p' and k.connamespace = 'pglimits'::regnamespace"
    ):
        s.run(f"reindex index concurrently pglimits.{name}")
    return analyzed_when_there_were_none(db, s, size)


@pytest.mark.parametrize(
    "planned",
    [analyzed_when_there_were_few, analyzed_when_there_were_none, reindexed_and_analyzed_when_there_were_none],
    ids=["few", "none", "reindexed"],
)
def test_a_call_reads_no_more_than_with_right_statistics(
    db: Db, s: Session, planned: Callable[[Db, Session, int], Session]
) -> None:
    session = planned(db, s, 1000)
    session.run("set statement_timeout = '30s'")
    read = {call: blocks(session, call) for call in CALLS}
    for table in TABLES:
        s.run(f"analyze pglimits.{table}")
    other = db.session()
    right = {call: blocks(other, call) for call in CALLS}
    assert {call: (read[call], right[call]) for call in CALLS if read[call] > 1.2 * right[call] + 5} == {}
