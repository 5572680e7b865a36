"""The batches of the wrapper, and the procedures that wait in plain SQL."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails


def ids(number: int) -> list[UUID]:
    return [uuid4() for _ in range(number)]


def batch(s: Session, names: str | list[str], lease_ids: list[UUID], **more: Any) -> list[Any]:
    """The runs of a batch, as they come."""
    given = {
        "slots": [1], "keys": [""], "for_rate": False, "timeout_seconds": 0, "lease_duration": 300, "priority": 0,
        "holders": [None] * len(lease_ids), "again": True, "strict": False, "channel": None, "durable": True,
        "patience": None, **more,
    }  # fmt: skip
    runs = s.all(
        "select * from pglimits._acquire_batch(%s::text[], %s::int[], %s::text[], %s, %s::float8, %s::float8, %s::int,"
        " %s::uuid[], %s::jsonb, %s, %s, %s, %s, %s::float8)",
        [names] if isinstance(names, str) else names, given["slots"], given["keys"], given["for_rate"],
        given["timeout_seconds"], given["lease_duration"], given["priority"], lease_ids, json.dumps(given["holders"]),
        given["again"], given["strict"], given["channel"], given["durable"], given["patience"],
    )  # fmt: skip
    assert [run.first for run in runs] == [1, *(run.last + 1 for run in runs[:-1])]
    assert runs[-1].last == len(lease_ids)
    return runs


def each(runs: list[Any]) -> list[str]:
    """The status of each of the requests."""
    return [run.status for run in runs for _ in range(run.last - run.first + 1)]


# _acquire_batch


def test_requests_that_are_alike_are_granted_in_their_order_with_rising_fences(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.create("database", 20)
    asked = ids(5)
    (run,) = batch(
        s, "database", asked, slots=[2], keys=["k"], lease_duration=60, priority=7, holders=[*range(4), None]
    )  # fmt: skip
    assert (run.status, run.last, run.ends_in, run.missing) == ("granted", 5, 60, None)
    held = {row.lease_id: row for row in s.holders()}
    assert [held[lease_id].fence for lease_id in asked] == [run.fences[0] + nth for nth in range(5)]
    assert [held[lease_id].holder for lease_id in asked] == [*range(4), None]
    assert {(row.slots, row.key, row.priority, (row.expires_at - now).total_seconds()) for row in held.values()} == {
        (2, "k", 7, 60)
    }
    assert s.limit("database").held == 10


@pytest.mark.parametrize("held", range(4))
@pytest.mark.parametrize("timeout", [0, 3600, None])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("rate", [0, 1])
def test_requests_that_are_alike_are_answered_as_if_each_were_alone(
    clock: Clock, db: Db, s: Session, held: int, timeout: float | None, slots: int, rate: float
) -> None:
    clock.freeze()
    for name in ("alike", "alone"):
        s.create(name, 3, rate, max_waiters=2)
        for _ in range(held):
            s.acquire(name)
    asked = {"slots": [slots], "timeout_seconds": timeout, "channel": "pglimits_t"}
    for_rates = (False, True) if rate else (False,)
    for for_rate in for_rates:
        together = batch(s, "alike", ids(5), for_rate=for_rate, **asked)
        alone = [batch(s, "alone", ids(1), for_rate=for_rate, **asked)[0] for _ in range(5)]
        assert each(together) == [one.status for one in alone]
        for run in together:
            told = [one.seconds and one.seconds[0] for one in alone[run.first - 1 : run.last]]
            if run.status in ("granted", "queued"):
                assert [second or 0 for second in run.seconds or [None]] == pytest.approx([wait or 0 for wait in told])
            elif run.status == "refused":
                assert (run.seconds or [None])[0] == told[0]
    assert [tuple(s.limit(name))[2:7] for name in ("alike",)] == [tuple(s.limit("alone"))[2:7]]
    db.consistent()


def test_who_is_refused_behind_others_of_its_batch_is_told_when_it_would_be_its_turn(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 0.05)
    batch(s, "api", ids(1), for_rate=True)
    waits, refused = batch(s, "api", ids(5), for_rate=True, timeout_seconds=50, channel="pglimits_t")
    assert (waits.status, waits.last) == ("queued", 2)
    assert (refused.status, refused.seconds) == ("refused", [60])


def test_a_batch_keeps_the_order_of_the_line_and_tells_its_head_when_time_lets_it_go_on(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("database", 1)
    held = s.acquire("database", lease_duration=2).lease_id
    asked = ids(3)
    (run,) = batch(s, "database", asked, timeout_seconds=60, channel="pglimits_t")
    assert (run.status, run.seconds) == ("queued", [2, None, None])
    assert [row.lease_id for row in s.waiters()] == asked
    s.release(held)
    assert [s.watch_one(lease_id).status for lease_id in asked] == ["granted", "queued", "queued"]
    db.consistent()


def test_moments_within_the_horizon_are_told_to_whoever_sends_a_batch(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 32)
    granted, queued = batch(s, "api", ids(6), for_rate=True, timeout_seconds=FOREVER, channel="pglimits_t")
    assert (granted.status, granted.seconds) == ("granted", [0, 0, 0.03125, 0.0625, 0.09375])
    assert (queued.status, queued.seconds) == ("queued", [0.125 - 0.05])
    assert s.limit("api").level == 5


def test_where_nobody_may_stand_in_line_nobody_is_granted_ahead_of_its_moment(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 1, 100, max_waiters=0)
    assert each(batch(s, "api", ids(3), for_rate=True, timeout_seconds=10)) == ["granted", "full", "full"]


def test_what_is_sent_again_acts_once_also_beside_what_is_new(db: Db, s: Session) -> None:
    for name in ("database", "other"):
        s.create(name, 10)
    first = ids(3)
    (granted,) = batch(s, "database", first)
    with changes_nothing(db.session()):
        runs = batch(s, "database", first)
    assert [run.fences[0] for run in runs] == [granted.fences[0] + nth for nth in range(3)]
    runs = batch(s, "database", [*ids(1), first[1]])
    assert (each(runs), runs[1].fences[0]) == (["granted"] * 2, granted.fences[0] + 1)
    assert s.limit("database").held == 4
    both = ids(2)
    runs = batch(s, ["database", "other"], both)
    with changes_nothing(db.session()):
        assert [run.fences for run in batch(s, ["database", "other"], both)] == [run.fences for run in runs]
    assert s.limit("other").held == 2
    db.consistent()


def test_a_batch_that_waited_for_the_limit_goes_by_what_it_finds_then(db: Db, s: Session) -> None:
    s.create("database", 4)
    s.serves("database", 1)
    for room, expected in ((3, ["granted"] * 3), (2, ["granted"] * 2 + ["refused"])):
        asked = ids(3)
        with s.transaction():
            before = [] if room == 3 else s.serves("database", 1)
            s.run("select from pglimits.states for update")
            waits, _ = db.start_blocked(lambda other, asked=asked: batch(other, "database", asked, patience=20))
        assert each(waits.result(20)) == expected
        assert s.limit("database").held == 4
        fences = [row.fence for row in s.holders()]
        assert fences == sorted(set(fences))
        for lease_id in (*asked, *(answer.lease_id for answer in before)):
            s.release(lease_id)
        db.consistent()


def test_a_batch_of_calls_of_rate_limit_is_charged_in_one_or_goes_as_far_as_the_level_lets_it(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("api", 10, 1)
    (run,) = batch(s, "api", ids(3), slots=[2], for_rate=True)
    assert (run.status, run.last, run.seconds[0]) == ("granted", 3, 0)
    assert s.limit("api").level == 6
    assert each(batch(s, "api", ids(3), slots=[2], for_rate=True)) == ["granted", "granted", "refused"]
    assert s.limit("api").level == 10
    assert s.limit("api").held == 0


def test_the_same_ids_asked_by_two_batches_at_once_act_once(db: Db, s: Session) -> None:
    s.create("database", 100)
    for _ in range(20):
        asked = ids(4)
        first, second = db.together([lambda other, asked=asked: batch(other, "database", asked, patience=20)] * 2)
        assert each(first) == each(second) == ["granted"] * 4
        assert s.limit("database").held == 4
        assert s.value("select pglimits._release_batch(%s::uuid[])", asked) == []
    db.consistent()


def test_a_batch_of_releases_ends_what_is_there_when_it_has_the_limit(db: Db, s: Session) -> None:
    """One of its leases was ended, and its id taken anew, while it waited."""
    s.create("database", 10)
    gone, anew, *others = [answer.lease_id for answer in s.serves("database", 5)]
    release = "select pglimits._release_batch(%s::uuid[], true, 20)"
    with s.transaction():
        s.release(gone)
        s.release(anew)
        s.acquire("database", slots=3, lease_id=anew)
        ends, _ = db.start_blocked(lambda other: other.value(release, [gone, anew, *others]))
    assert set(ends.result(20)) >= {gone}
    left = {row.lease_id for row in s.holders()}
    assert left <= {anew}
    assert s.limit("database").held == (3 if left else 0)
    db.consistent()


def test_batches_that_come_and_go_at_once_never_let_too_many_in_and_lose_nothing(db: Db, s: Session) -> None:
    s.create("database", 6)

    def caller(session: Session) -> int:
        granted = 0
        for number in range(60):
            asked = ids(1 + number % 4)
            runs = batch(session, "database", asked, patience=20, again=number % 3 == 0)
            granted += each(runs).count("granted")
            held = session.limit("database").held
            assert held <= 6, held
            session.value("select pglimits._release_batch(%s::uuid[], true, 20)", asked)
        return granted

    assert all(db.together([caller] * 6))
    assert s.limit("database").held == 0
    db.consistent()


def test_the_names_of_missing_limits_are_told(s: Session) -> None:
    s.create("database", 5)
    (run,) = batch(s, "nowhere", ids(3))
    assert (run.status, run.last, run.missing) == ("unlimited", 3, ["nowhere"])
    (run,) = batch(s, ["nowhere", "database"], ids(1))
    assert (run.status, run.fences[0], run.missing) == ("granted", None, ["nowhere"])


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("for_rate", [False, True])
def test_refusals_of_a_batch_wait_behind_no_lock_and_take_no_transaction_id(
    db: Db, s: Session, number: int, for_rate: bool
) -> None:
    s.create("api", 1, 0.001 if for_rate else 0)
    (s.rate_limit if for_rate else s.acquire)("api")
    other = db.session()
    other.run("begin")
    other.run("select from pglimits.states for update")
    with changes_nothing(db.session()), s.transaction("read only"):
        assert each(batch(s, "api", ids(number), for_rate=for_rate)) == ["refused"] * number
        assert s.value("select pg_current_xact_id_if_assigned()") is None
    other.run("rollback")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("wrong", "sqlstate"),
    [
        ({"slots": [0]}, "PL001"), ({"slots": [None]}, "PL001"), ({"slots": []}, "PL001"), ({"slots": [6]}, "PL004"),
        ({"keys": [None]}, "PL001"), ({"keys": ["\n"]}, "PL001"), ({"lease_duration": 0.5}, "PL001"),
        ({"lease_duration": None}, "PL001"), ({"timeout_seconds": -1}, "PL001"), ({"priority": None}, "PL001"),
        ({"strict": None}, "PL001"), ({"for_rate": None}, "PL001"), ({"for_rate": True}, "PL005"),
        ({"holders": []}, "PL001"), ({"channel": "x"}, "PL001"), ({"names": "no", "strict": True}, "PL002"),
        ({"names": "{a,b}"}, "PL001"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_a_batch_is_raised_and_nothing_is_taken(
    db: Db, s: Session, number: int, wrong: dict[str, Any], sqlstate: str
) -> None:
    s.create("database", 5)
    s.release(s.acquire("database").lease_id)
    with changes_nothing(db.session()), fails(sqlstate):
        batch(s, **{"names": "database", "lease_ids": ids(number), **wrong})


def test_durable_false_commits_without_waiting_for_the_disk_and_patience_bounds_a_wait_for_a_lock(
    db: Db, s: Session
) -> None:
    s.create("database", 5)
    lease_id = s.acquire("database").lease_id
    calls: list[Callable[..., object]] = [
        lambda **how: batch(s, "database", ids(1), **how),
        lambda **how: batch(s, "database", ids(2), **how),
        lambda durable=True, patience=None: s.value(
            "select pglimits._release_batch(%s::uuid[], %s, %s::float8)", [lease_id], durable, patience
        ),
    ]
    for call in calls:
        for durable in (False, True):
            s.run("begin")
            call(durable=durable)
            assert s.value("show synchronous_commit") == ("on" if durable else "off")
            s.run("rollback")
    assert s.value("show synchronous_commit") == "on"
    other = db.session()
    other.run("begin")
    other.run("select from pglimits.states for update")
    for call in calls:
        for patience in (0.02, None):  # 0.3 seconds, if none is given
            with changes_nothing(db.session()), fails("55P03"):
                call(patience=patience)
            assert s.value("show lock_timeout") == "0"


def test_release_of_a_batch_returns_those_that_had_ended(clock: Clock, db: Db, s: Session) -> None:
    for name in ("a", "b"):
        s.create(name, 3)
    live, both, ended, unknown = s.acquire("a"), s.acquire(["a", "b"]), s.acquire("b", lease_duration=1), uuid4()
    clock.advance(2)
    release = "select pglimits._release_batch(%s::uuid[])"
    assert s.value(release, [live.lease_id]) == []
    gone = [live.lease_id, ended.lease_id, unknown]
    assert sorted(s.value(release, [*gone, both.lease_id])) == sorted(gone)
    assert s.limit("a").held == s.limit("b").held == 0
    db.consistent()


# acquire_wait, rate_limit_wait, release_wait

WAIT = "call pglimits.acquire_wait(%s, timeout_seconds => %s::float8, lease_id => %s::uuid)"
RATE = "call pglimits.rate_limit_wait(%s, timeout_seconds => %s::float8, lease_id => %s::uuid)"


def waits(db: Db, name: str, lease_id: UUID | None = None, call: str = WAIT) -> tuple[Future[Any], Session]:
    """Call it in the background and wait until it is in line."""
    before = len(db.main.waiters())
    future, session = db.start(lambda session: session.one(call, name, None, lease_id))
    db.wait_until(lambda: future.done() or len(db.main.waiters()) > before, timeout=60)
    assert not future.done(), future.exception() or future.result()
    return future, session


def test_what_is_free_is_had_at_once(s: Session) -> None:
    s.create("database", 2)
    s.create("api", 1, 0.001)
    row = s.one(WAIT, "database", None, None)
    (held,) = s.holders()
    assert tuple(row) == (held.lease_id, "granted", held.fence, held.expires_at, None)
    row = s.one(
        "call pglimits.acquire_wait('database', slots => 1, key => 'k', lease_duration => 3600, priority => 3,"
        " holder => '{\"a\": 1}', strict => true)"
    )
    held = s.one("select * from pglimits.holders where lease_id = %s", row.lease_id)
    assert (held.slots, held.key, held.priority, held.holder) == (1, "k", 3, {"a": 1})
    assert (held.expires_at - held.acquired_at).total_seconds() == 3600
    assert s.one(RATE, "api", None, None).status == "granted"
    row = s.one(RATE, "api", 0, None)
    assert (row.status, row.lease_id, row.retry_after > 900) == ("refused", None, True)
    for released in (True, False):
        assert s.one("call pglimits.release_wait(%s)", held.lease_id).released is released
    assert s.value("show synchronous_commit") == "on"


def test_five_that_wait_are_granted_in_their_order_as_it_is_released(db: Db, s: Session) -> None:
    s.create("database", 1)
    holder = s.acquire("database").lease_id
    line = ids(5)
    futures = [waits(db, "database", lease_id)[0] for lease_id in line]
    assert [row.lease_id for row in s.waiters()] == line
    for nth, future in enumerate(futures):
        assert s.one("call pglimits.release_wait(%s)", holder).released is True
        row = future.result(timeout=60)
        (held,) = s.holders()
        assert (row.status, row.lease_id, row.fence) == ("granted", line[nth], held.fence)
        assert not any(later.done() for later in futures[nth + 1 :])
        holder = row.lease_id
    db.consistent()


def test_rate_limit_wait_goes_when_its_moment_comes(db: Db, s: Session) -> None:
    s.create("api", 1, 20)
    began = s.value("select clock_timestamp()")
    for _ in range(4):  # the first at once, the others at their moments
        assert s.one(RATE, "api", None, None).status == "granted"
    assert s.value("select clock_timestamp() - %s >= interval '0.15 s'", began), "nobody goes too fast"
    s.update("api", slot_decay_per_second=1 / 64)
    s.adjust("api", 1)  # however much has decayed by now
    future, _ = waits(db, "api", call=RATE)
    s.adjust("api", -2)
    assert future.result(timeout=60).status == "granted"
    assert s.waiters() == []


def test_nothing_is_locked_and_no_transaction_is_open_while_it_waits(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    future, _ = waits(db, "database")
    with s.transaction():
        s.run("set local lock_timeout = '20s'")
        s.run("select from pglimits.states for update")
        s.run("select from pglimits.queue for update")
    assert not future.done()
    s.reset("database")
    assert future.result(timeout=60).status == "granted"


def test_it_gives_up_at_its_timeout_and_leaves_the_line(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    for timeout in (0.02, 0):
        assert tuple(s.one(WAIT, "database", timeout, None)) == (None, "refused", None, None, None)
    assert s.waiters() == []
    db.consistent()


def test_it_takes_an_ended_leases_slot_without_any_release(s: Session) -> None:
    s.create("database", 1)
    s.acquire("database", lease_duration=1)
    assert s.one(WAIT, "database", 60, None).status == "granted"


@pytest.mark.parametrize(
    ("call", "inside"),
    [
        (
            WAIT,
            "call pglimits.acquire_wait('database', 1, '', 5, 300, 0, null, id, false, said, fence, ends, wait)",
        ),
        (RATE, "call pglimits.rate_limit_wait('database', 1, '', 5, 0, null, id, false, said, wait)"),
    ],
    ids=["acquire_wait", "rate_limit_wait"],
)
def test_inside_a_transaction_block_or_a_function_it_fails_with_a_clear_error_and_takes_nothing(
    s: Session, call: str, inside: str
) -> None:
    s.create("database", 1, 1)
    s.run("begin")
    with fails("PL010", "transaction block", "autocommit"):
        s.run(call, "database", None, None)
    s.run("rollback")
    s.run(
        "create function around() returns void language plpgsql as"
        f" $$ declare id uuid; said text; fence bigint; ends timestamptz; wait float8; begin {inside}; end $$"
    )
    with fails("PL010", "transaction block"):
        s.run("select around()")
    assert s.holders() == []
    assert s.limit("database").level == 0


WITHIN = {
    "a block": ["begin", "{}"],
    "a block in one query": ["begin; {}; commit"],
    "a query of two statements": ["select 1; {}"],
    "a function": [
        "create function f() returns void language plpgsql as $$ declare done boolean; begin {}; end $$", "select f()"
    ],
    "a procedure with settings": [
        "create procedure f() language plpgsql set work_mem = '4MB' as $$ declare done boolean; begin {}; end $$",
        "call f()",
    ],
}  # fmt: skip


@pytest.mark.parametrize("queries", WITHIN.values(), ids=WITHIN)
def test_a_release_wait_inside_any_kind_of_transaction_fails_and_changes_nothing(
    s: Session, queries: list[str]
) -> None:
    s.create("database", 1)
    lease_id = s.acquire("database").lease_id
    with fails("PL010", "transaction block"):
        for query in queries:
            inside = "$$" in query
            s.run(query.format(f"call pglimits.release_wait('{lease_id}'{', done' if inside else ''})"))
    s.run("rollback")
    assert s.limit("database").held == 1


@pytest.mark.parametrize(
    "query", ["{}", " {} ; ", "do $$ declare done boolean; begin {}; end $$", "-- ; comes first\n{}"],
    ids=["alone", "with a semicolon", "a block of code", "after a comment"],
)  # fmt: skip
def test_a_release_wait_that_is_alone_is_done_however_it_is_written(s: Session, query: str) -> None:
    s.create("database", 1)
    lease_id = s.acquire("database").lease_id
    s.run(query.format(f"call pglimits.release_wait('{lease_id}'{', done' if '$$' in query else ''})"))
    assert s.limit("database").held == 0


def test_interrupted_and_called_again_with_the_same_id_it_keeps_its_place(db: Db, s: Session) -> None:
    s.create("database", 1)
    holder = s.acquire("database").lease_id
    first, second = ids(2)
    interrupted, session = waits(db, "database", first)
    behind, _ = waits(db, "database", second)
    s.value("select pg_cancel_backend(%s)", session.pid)
    with fails("57014"):
        interrupted.result(timeout=60)
    assert [row.lease_id for row in s.waiters()] == [first, second]
    again, _ = db.start(lambda session: session.one(WAIT, "database", None, first), session)
    s.release(holder)
    assert again.result(timeout=60).lease_id == first
    assert not behind.done()
    assert s.release(first)
    assert behind.result(timeout=60).lease_id == second


def test_when_the_session_at_the_head_is_terminated_the_next_goes_on(db: Db, s: Session) -> None:
    s.create("database", 1)
    holder = s.acquire("database").lease_id
    dies, session = waits(db, "database")
    behind, _ = waits(db, "database")
    s.value("select pg_terminate_backend(%s)", session.pid)
    with pytest.raises(psycopg.OperationalError):
        dies.result(timeout=60)
    died = "(select min(arrival) from pglimits.queue)"
    s.run(f"update pglimits.queue set expires_at = clock_timestamp() where arrival = {died}")
    s.release(holder)
    assert behind.result(timeout=60).status == "granted"
    db.consistent()


def test_it_ends_with_its_caller_where_the_server_looks_whether_that_is_there(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    caller = db.session().connection
    caller.execute("set client_connection_check_interval = '100ms'")
    pid = caller.info.backend_pid
    caller.pgconn.send_query(b"call pglimits.acquire_wait('database')")
    db.wait_until(lambda: len(s.waiters()) == 1)
    # As when it is killed: nothing is said, the connection is closed.
    with socket.socket(fileno=os.dup(caller.pgconn.socket)) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    db.wait_until(lambda: not s.value("select exists (select from pg_stat_activity where pid = %s)", pid))


def test_it_goes_on_waiting_when_its_limit_is_made_anew(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    future, _ = waits(db, "database")
    with s.transaction():
        s.delete("database")
        s.create("database", 1)
        holder = s.acquire("database").lease_id
    db.wait_until(lambda: future.done() or s.waiters())
    assert not future.done(), future.result()
    s.release(holder)
    assert future.result(timeout=60).status == "granted"


def test_it_goes_on_without_a_slot_when_the_limit_is_deactivated_and_fails_when_it_became_too_small(
    db: Db, s: Session
) -> None:
    for name in ("off", "small"):
        s.create(name, 2)
        s.serves(name, 2)
    future, _ = waits(db, "off")
    s.update("off", active=False)
    row = future.result(timeout=60)
    assert (row.status, row.lease_id) == ("unlimited", None)
    future, _ = waits(db, "small", call=WAIT.replace("%s,", "%s, 2,", 1))
    s.update("small", limit=1)
    with fails("PL004", "slots"):
        future.result(timeout=60)


def test_repeated_with_its_id_it_acts_once(s: Session) -> None:
    s.create("database", 2)
    lease_id = uuid4()
    first, again = s.one(WAIT, "database", None, lease_id), s.one(WAIT, "database", None, lease_id)
    assert (first.lease_id, first.fence) == (again.lease_id, again.fence) == (lease_id, first.fence)
    assert s.limit("database").held == 1


def test_it_fails_as_the_functions_would(s: Session) -> None:
    s.create("database", 1)
    for call, state, word in (
        ("acquire_wait('database', 2)", "PL004", "slots"),
        ("acquire_wait('nowhere', strict => true)", "PL002", "nowhere"),
        ("acquire_wait('database', lease_duration => 0)", "PL001", "lease_duration"),
        ("acquire_wait('database', timeout_seconds => -1)", "PL001", "timeout_seconds"),
        ("acquire_wait(null)", "PL001", "name"),
        ("acquire_wait('{a,b}')", "PL001", "acquire_all"),
        ("rate_limit_wait('database')", "PL005", "database"),
        ("release_wait(null)", "PL001", "lease_id"),
    ):
        with fails(state, word):
            s.run(f"call pglimits.{call}")
    assert s.holders() == []


def test_the_limit_is_unlocked_before_the_answer_is_on_disk(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.run(
        "create or replace function pglimits._flush() returns pg_lsn language plpgsql"
        " as $$ begin raise 'on its way'; end $$"
    )
    session = db.session()
    with fails("P0001", "on its way"):
        session.run(WAIT, "database", None, None)
    (holder,) = s.holders()
    with fails("P0001", "on its way"):
        session.run("call pglimits.release_wait(%s)", holder.lease_id)
    assert s.limit("database").held == 0


def test_what_was_committed_without_waiting_for_the_disk_is_there_after_a_flush(s: Session) -> None:
    s.create("database", 1)
    s.run("set synchronous_commit = off")
    s.acquire("database")
    written = s.value("select pg_current_wal_insert_lsn()")
    s.run("set synchronous_commit = on")
    s.run("select pglimits._flush()")
    assert s.value("select pg_current_wal_flush_lsn() >= %s::pg_lsn", written)
