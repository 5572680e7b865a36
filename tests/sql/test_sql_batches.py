"""acquire_many, which serves a batch, and acquire_wait, which waits in plain SQL."""

from __future__ import annotations

import json
import os
import random
import socket
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqltest import Clock, Db, Session, changes_nothing, fails, seconds


def many(s: Session, *requests: dict[str, Any]) -> list[Any]:
    rows = s.all("select * from pglimits.acquire_many(%s::jsonb)", json.dumps(requests))
    assert [row.ordinal for row in rows] == list(range(1, len(requests) + 1))
    return rows


def ask(name: str, **more: Any) -> dict[str, Any]:
    return {"names": [name], "wait": "0", **more}


# acquire_many


def test_each_request_of_a_batch_is_answered_by_itself_in_their_order(clock: Clock, db: Db, s: Session) -> None:
    now = clock.freeze()
    s.create("database", 2)
    s.create("api", 1, 0.5)
    s.create("off", 1, active=False)
    rows = many(
        s,
        ask("database", holder={"pid": 1}, priority=3, lease_duration="1 minute"),
        ask("database"),
        ask("database"),
        ask("database", wait=None),
        ask("api", for_rate=True),
        ask("api", for_rate=True),
        ask("api", for_rate=True, wait="2 seconds"),
        ask("nowhere"),
        ask("nowhere", strict=True),
        ask("off"),
        ask("database", slots=[3]),
        ask("database", for_rate=True),
        ask("da%ta"),
    )
    assert [row.status for row in rows] == [
        "granted", "granted", "refused", "queued", "granted", "refused", "granted", "unlimited", "error", "unlimited",
        "error", "error", "error",
    ]  # fmt: skip
    assert seconds(rows[0].expires_at - now) == 60
    assert rows[1].fences[0] > rows[0].fences[0]
    assert seconds(rows[5].retry_after) == 2
    assert (seconds(rows[4].wait), seconds(rows[6].wait)) == (0, 2)
    assert rows[7].missing == ["nowhere"]
    assert {row.ordinal: row.error for row in rows if row.error} == {
        9: "LimitNotFound",
        11: "SlotsExceedLimit",
        12: "NoSlotDecay",
        13: "InvalidArgument",
    }
    assert all(row.message for row in rows if row.error)
    held = {row.lease_id: row for row in s.holders()}
    assert set(held) == {rows[0].lease_id, rows[1].lease_id}
    assert (held[rows[0].lease_id].holder, held[rows[0].lease_id].priority) == ({"pid": 1}, 3)
    assert [row.lease_id for row in s.waiters("database")] == [rows[3].lease_id]
    db.consistent()


def test_an_absent_or_null_wait_waits_for_ever(s: Session) -> None:
    s.create("database", 0)
    assert [row.status for row in many(s, {"names": ["database"]}, ask("database", wait=None))] == ["queued"] * 2


def test_a_batch_repeated_with_its_ids_acts_once(db: Db, clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("one", 2)
    s.create("two", 1)
    requests = [
        {"names": ["one", "two"], "lease_id": str(uuid4()), "wait": "0"},
        ask("one", lease_id=str(uuid4())),
    ]
    first = many(s, *requests)
    assert [row.status for row in first] == ["granted", "granted"]
    with changes_nothing(db.session()):
        assert many(s, *requests) == first


def test_the_same_id_twice_in_a_batch_is_an_error_and_nothing_is_taken(db: Db, s: Session) -> None:
    s.create("database", 5)
    lease_id = str(uuid4())
    with changes_nothing(db.session()), fails("PL001", "lease_id"):
        many(s, ask("database", lease_id=lease_id), ask("database"), ask("database", lease_id=lease_id))


def test_a_batch_keeps_the_order_of_the_queue(db: Db, s: Session) -> None:
    s.create("database", 1)
    held = s.acquire("database").lease_id
    rows = many(s, *[ask("database", wait=None) for _ in range(5)])
    assert [row.lease_id for row in s.waiters()] == [row.lease_id for row in rows]
    s.release(held)
    assert s.watch_one(rows[0].lease_id).status == "granted"
    db.consistent()


def test_the_head_of_a_line_that_a_batch_makes_is_told_when_time_lets_it_go_on(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 1)
    s.acquire("database", lease_duration="2 seconds")
    rows = many(s, ask("database", wait="1 minute"), ask("database", wait="1 minute"))
    assert [(row.status, seconds(row.retry_after)) for row in rows] == [("queued", 2), ("queued", 3)]


def test_two_who_arrived_in_one_moment_on_different_limits_may_meet_at_the_head_of_a_line(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("one", 1)
    s.create("two", 1)
    held = s.acquire("one").lease_id
    s.acquire("two", lease_duration="2 seconds")
    both = {"names": ["one", "two"], "wait": "1 minute", "lease_id": str(uuid4())}
    assert [row.status for row in many(s, both, ask("two", wait="1 minute"))] == ["queued", "queued"]
    s.release(held)
    assert s.acquire(["one", "two"], wait="1 minute", lease_id=UUID(both["lease_id"])).status == "queued"
    rows = many(s, ask("two", wait="1 minute"), ask("two", wait="1 minute"))
    assert [row.status for row in rows] == ["queued", "queued"]


def test_a_batch_of_refusals_takes_no_transaction_id_and_waits_for_nobody(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    other = db.session()
    other.run("begin")
    other.run("select from pglimits.states for update")
    s.run("set lock_timeout = '50ms'")
    with changes_nothing(db.session()):
        s.run("begin read only")
        assert {row.status for row in many(s, *[ask("database") for _ in range(20)])} == {"refused"}
        assert s.value("select pg_current_xact_id_if_assigned()") is None
        s.run("rollback")
    other.run("rollback")


def test_a_batch_over_many_keys_and_limits_is_granted_as_one_by_one(db: Db, s: Session) -> None:
    for name in ("one", "two", "three"):
        s.create(name, 2)
    requests = [
        {"names": names, "keys": [key], "wait": "0"}
        for key in "zyxabc"
        for names in (["three", "one"], ["two"], ["one", "two"], ["three"], ["three"])
    ]
    assert [row.status for row in many(s, *requests)] == ["granted", "granted", "granted", "granted", "refused"] * 6
    db.consistent()


def test_an_empty_batch_is_no_rows(s: Session) -> None:
    assert many(s) == []


def test_batches_in_opposite_orders_do_not_deadlock(db: Db, s: Session) -> None:
    names = [s.create(f"limit {number}", 1000) for number in range(10)]

    def caller(order: list[str]) -> Any:
        def work(session: Session) -> int:
            granted = 0
            for _ in range(30):
                rows = many(session, *[ask(name, keys=[key]) for name in order for key in ("a", "b")])
                granted += sum(row.status == "granted" for row in rows)
            return granted

        return work

    assert sum(db.together([caller(names), caller(names[::-1]), caller(names), caller(names[::-1])])) == 4 * 30 * 20
    db.consistent()


def test_durable_false_commits_without_waiting_for_the_disk_and_only_that_transaction(s: Session) -> None:
    s.create("database", 5)
    for call in (
        'select * from pglimits.acquire_many(\'[{"names": ["database"]}]\', durable => false)',
        "select pglimits.acquire_alike('database', array[gen_random_uuid()], durable => false)",
        "select pglimits.release_many(array[]::uuid[], durable => false)",
    ):
        s.run("begin")
        s.run(call)
        assert s.value("show synchronous_commit") == "off"
        s.run("commit")
        assert s.value("show synchronous_commit") == "on"
        s.run("begin")
        s.run(call.replace("false", "true"))
        assert s.value("show synchronous_commit") == "on"
        s.run("commit")


def test_patience_bounds_how_long_a_call_waits_for_a_lock_and_nothing_after_it(db: Db, s: Session) -> None:
    s.create("database", 5)
    lease_id = s.acquire("database").lease_id
    other = db.session()
    other.run("begin")
    other.run("select from pglimits.states for update")
    for call in (
        "select * from pglimits.acquire_many('[{\"names\": [\"database\"]}]', patience => '20 milliseconds')",
        "select pglimits.acquire_alike('database', array[gen_random_uuid()], patience => '20 milliseconds')",
        f"select pglimits.release_many(array['{lease_id}'::uuid], patience => '20 milliseconds')",
        # 0.3 seconds, if none is given.
        "select pglimits.acquire_alike('database', array[gen_random_uuid()])",
        f"select pglimits.release_many(array['{lease_id}'::uuid])",
    ):
        with changes_nothing(db.session()), fails("55P03"):
            s.run(call)
        assert s.value("show lock_timeout") == "0"
    other.run("rollback")


@pytest.mark.parametrize(
    "requests",
    [
        "null", "{}", "1", '"x"', "[1]", '["x"]', "[null]", "[[]]", '[{"names": "database"}]',
        '[{"names": ["database"], "slots": ["x"]}]', '[{"names": ["database"], "slots": 1}]',
        '[{"names": ["database"], "lease_id": "x"}]', '[{"names": ["database"], "wait": "soon"}]',
        '[{"names": ["database"], "priority": 1.5}]', '[{"names": ["database"], "strict": "perhaps"}]',
        '[{"names": ["database"], "priority": 99999999999}]', '[{"names": ["database"], "keys": "k"}]',
    ],
)  # fmt: skip
def test_a_malformed_batch_is_an_error_and_changes_nothing(db: Db, s: Session, requests: str) -> None:
    s.create("database", 5)
    with changes_nothing(db.session()):
        try:
            rows = s.all("select * from pglimits.acquire_many(%s::jsonb)", requests)
        except psycopg.Error as error:
            assert error.diag.sqlstate == "PL001", error
        else:
            assert [(row.status, row.error) for row in rows] == [("error", "InvalidArgument")]


@pytest.mark.parametrize("member", ["wait", "lease_duration"])
@pytest.mark.parametrize("value", ['"soon"', "true", "[1]", '{"seconds": 1}', '"1e400 s"', "1e400", '""'])
def test_what_is_no_interval_in_a_batch_is_an_error_that_names_it(db: Db, s: Session, member: str, value: str) -> None:
    s.create("database", 5)
    with changes_nothing(db.session()), fails("PL001", member):
        s.all(f'select * from pglimits.acquire_many(\'[{{"names": ["database"], "{member}": {value}}}]\')')


@pytest.mark.parametrize("value", ['"5"', '"5 minutes"', "5", '"PT5M"', '"00:05"', "null"])
def test_an_interval_in_a_batch_may_be_written_in_every_way_that_postgresql_reads(s: Session, value: str) -> None:
    s.create("database", 5)
    members = f'"wait": {value}, "lease_duration": {value}'
    (row,) = s.all(f'select * from pglimits.acquire_many(\'[{{"names": ["database"], {members}}}]\')')
    assert row.status == "granted"


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("argument", ["slots", "keys"])
@pytest.mark.parametrize("value", [[], [None], ["1", "2"]])
def test_a_list_that_does_not_go_with_the_names_is_an_error_also_for_a_lone_request(
    db: Db, s: Session, argument: str, value: list[Any], others: int
) -> None:
    s.create("database", 5)
    s.release(s.acquire("database").lease_id)
    with changes_nothing(db.session()):
        answers = many(s, *(ask("database", **{argument: value}) for _ in range(1 + others)))
    for answer in answers:
        assert (answer.status, answer.error) == ("error", "InvalidArgument")
        assert argument.removesuffix("s") in answer.message


def test_a_batch_has_at_most_10000_requests(s: Session) -> None:
    with fails("PL001", "requests", "10000"):
        s.run("select * from pglimits.acquire_many(%s::jsonb)", json.dumps([{}] * 10001))


def test_a_request_in_a_batch_with_the_id_of_another_does_not_take_up_its_lease(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 2)
    lease_id = s.acquire("database", slots=2).lease_id
    waiter = s.queue("database")
    s.release(lease_id)
    (held,) = s.holders()
    (row,) = many(s, ask("database", slots=[2], lease_id=str(waiter)))
    assert row.error == "InvalidArgument"
    assert s.holders() == [held]


# acquire_alike


def alike(s: Session, name: str, ids: list[UUID], **more: Any) -> list[tuple[Any, ...]]:
    """What each of the requests is answered: status, fence, missing, error."""
    arguments = ", ".join(f'"{argument}" => %s::{TYPES[argument]}' for argument in more)
    rows = s.value(
        f"select pglimits.acquire_alike(%s, %s::uuid[]{', ' if more else ''}{arguments})",
        name,
        [str(lease_id) for lease_id in ids],
        *more.values(),
    )
    answers = []
    for requests, status, fence, _, *rest in rows:
        _, _, missing, error, _ = rest or (None, None, False, None, None)
        answers += [(status, fence and fence + nth, missing, error) for nth in range(requests)]
    assert len(answers) == len(ids)
    return answers


TYPES = {
    "slots": "int", "key": "text", "lease_duration": "interval", "wait": "interval", "priority": "int",
    "holders": "jsonb", "strict": "boolean",
}  # fmt: skip


def ids(number: int) -> list[UUID]:
    return [uuid4() for _ in range(number)]


def test_requests_that_are_alike_are_granted_in_their_order_with_rising_fences(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.create("database", 20)
    s.release(s.acquire("database", key="k").lease_id)
    asked = ids(5)
    answers = alike(
        s,
        "database",
        asked,
        slots=2,
        key="k",
        lease_duration="1 minute",
        priority=7,
        holders=json.dumps([*range(4), None]),
    )
    assert [status for status, *_ in answers] == ["granted"] * 5
    fences = [fence for _, fence, *_ in answers]
    assert fences == sorted(set(fences))
    holders = {row.lease_id: row for row in s.all("select * from pglimits.holders")}
    assert [holders[lease_id].fence for lease_id in asked] == fences
    assert [holders[lease_id].holder for lease_id in asked] == [*range(4), None]
    assert {(h.slots, h.key, h.priority, seconds(h.expires_at - now)) for h in holders.values()} == {(2, "k", 7, 60)}
    assert s.limit("database").held == 10


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("held", range(4))
@pytest.mark.parametrize("wait", ["0", "1 hour", None])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_requests_that_are_alike_are_answered_as_if_each_were_alone(
    clock: Clock, s: Session, used: bool, held: int, wait: str | None, slots: int
) -> None:
    clock.freeze()
    for name in ("alike", "alone"):
        s.create(name, 3)
        if used:
            s.release(s.acquire(name).lease_id)
        for _ in range(held):
            s.acquire(name)
    together = alike(s, "alike", ids(4), slots=slots, wait=wait)
    for status, fence, _, error in together:
        (one,) = many(s, {"names": ["alone"], "slots": [slots], "wait": wait, "lease_id": str(uuid4())})
        assert (status, fence, error) == (one.status, one.fences[0] if one.fences else None, one.error)
    assert s.limit("alike").held == s.limit("alone").held
    assert s.limit("alike").waiting == s.limit("alone").waiting


@pytest.mark.parametrize("seed", range(6))
def test_turns_that_are_alike_are_those_that_each_would_have_got_alone(
    clock: Clock, db: Db, s: Session, seed: int
) -> None:
    chance = random.Random(seed)
    clock.freeze()
    decay = chance.choice([0.5, 3, 7])
    s.create("alike", 4, decay)
    s.create("alone", 4, decay)
    for _ in range(25):
        clock.advance(chance.choice([0, 0, 0.1, 0.7, 3, 20]))
        slots, number = chance.randint(1, 5), chance.randint(1, 4)
        wait = chance.choice([None, "0", "0", "0.4 seconds", "2 seconds", "1 minute"])
        together = s.value(
            "select pglimits.acquire_alike('alike', %s::uuid[], slots => %s, wait => %s::interval, for_rate => true)",
            [str(lease_id) for lease_id in ids(number)],
            slots,
            wait,
        )
        answers = []
        for requests, status, _, _, waits, retry_after, *rest in together:
            error = (rest or [None, None])[1]
            answers += [(status, waits and waits[nth], retry_after, error) for nth in range(requests)]
        alone = many(
            s,
            *(
                {"names": ["alone"], "slots": [slots], "wait": wait, "lease_id": str(uuid4()), "for_rate": True}
                for _ in range(number)
            ),
        )
        expected = [
            (one.status, one.wait and seconds(one.wait), one.retry_after and seconds(one.retry_after), one.error)
            for one in alone
        ]
        assert [(a[0], a[3]) for a in answers] == [(e[0], e[3]) for e in expected]
        for mine, other in zip(answers, expected, strict=True):
            assert (mine[1] or 0, mine[2] or 0) == pytest.approx((other[1] or 0, other[2] or 0), abs=2e-6)
        assert s.limit("alike").level == pytest.approx(s.limit("alone").level, abs=1e-5)
    assert s.limit("alike").waiting == s.limit("alone").waiting


def test_requests_that_are_alike_act_once_also_when_some_of_them_are_repeated(s: Session) -> None:
    s.create("database", 10)
    first = ids(3)
    granted = alike(s, "database", first)
    assert alike(s, "database", first) == granted
    assert alike(s, "database", [*ids(1), first[1]])[1] == granted[1]
    assert s.limit("database").held == 4
    with fails("PL001", "lease_id"):
        alike(s, "database", [first[0], first[0]])
    with fails("PL001", "lease_id"):
        alike(s, "database", ids(1) * 2)
    assert s.limit("database").held == 4


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("for_rate", [False, True])
def test_refusals_of_requests_that_are_alike_wait_behind_no_lock_and_take_no_transaction_id(
    db: Db, s: Session, number: int, for_rate: bool
) -> None:
    s.create("api", 1, 0.001 if for_rate else 0)
    (s.rate_limit if for_rate else s.acquire)("api")
    other = db.session()
    other.run("begin")
    other.run("select from pglimits.states for update")
    s.run("begin")
    (answer,) = s.value(
        "select pglimits.acquire_alike('api', %s::uuid[], for_rate => %s)",
        [str(lease_id) for lease_id in ids(number)],
        for_rate,
    )
    assert answer[:2] == [number, "refused"]
    assert s.value("select pg_current_xact_id_if_assigned()") is None
    s.run("rollback")
    other.run("rollback")


def test_a_holder_is_as_long_as_its_text_however_little_it_takes_up(s: Session) -> None:
    """A number such as 1e9000 takes a few bytes, and 9,001 characters to show."""
    s.create("database", 5)
    s.release(s.acquire("database").lease_id)
    requests = [ask("database", holder=0), ask("database", holder=1)]
    sent = json.dumps(requests).replace('"holder": 0', '"holder": 1e9000')
    rows = s.all("select * from pglimits.acquire_many(%s::jsonb)", sent)
    assert [(row.status, row.error) for row in rows] == [("error", "InvalidArgument"), ("granted", None)]
    assert "holder" in rows[0].message
    asked = [str(lease_id) for lease_id in ids(2)]
    answers = s.value("select pglimits.acquire_alike('database', %s::uuid[], holders => '[1e9000, 1]')", asked)
    assert [answer[1] for answer in answers] == ["error", "granted"]


def test_what_is_wrong_with_requests_that_are_alike_is_in_their_rows(db: Db, s: Session) -> None:
    s.create("database", 5)
    s.create("off", 5, active=False)
    s.release(s.acquire("database").lease_id)
    with changes_nothing(db.session()):
        for bad in (
            {"slots": 0}, {"slots": None}, {"key": None}, {"key": "\n"}, {"lease_duration": "0.5 seconds"},
            {"wait": "-1 second"}, {"holders": json.dumps(["x" * 9000] * 2)},
        ):  # fmt: skip
            answers = alike(s, "database", ids(2), **bad)
            assert (answers[0][0], answers[0][3]) == ("error", "InvalidArgument"), bad
        for argument in ("lease_duration", "priority", "strict"):
            with fails("PL001", argument, "null"):
                alike(s, "database", ids(2), **{argument: None})
        assert alike(s, "nowhere", ids(2)) == [("unlimited", None, True, None)] * 2
        assert {answer[3] for answer in alike(s, "nowhere", ids(2), strict=True)} == {"LimitNotFound"}
        assert {answer[0] for answer in alike(s, "off", ids(2))} == {"unlimited"}
        assert {answer[3] for answer in alike(s, "database", ids(2), slots=6)} == {"SlotsExceedLimit"}


# acquire_wait

WAIT = "call pglimits.acquire_wait(%s, wait => %s::interval, lease_id => %s::uuid)"


def waits(db: Db, name: str, wait: str | None = None, lease_id: UUID | None = None) -> Any:
    """Call it in the background and wait until it is in the queue."""
    before = len(db.main.waiters())
    future, _ = db.start(lambda session: session.one(WAIT, name, wait, lease_id))
    db.wait_until(lambda: future.done() or len(db.main.waiters()) > before)
    assert not future.done(), future.exception() or future.result()
    return future


def test_acquire_wait_returns_at_once_what_is_free(s: Session) -> None:
    s.create("database", 2)
    row = s.one(WAIT, "database", None, None)
    (held,) = s.holders()
    assert (row.status, row.granted_lease_id, row.fence, row.expires_at) == (
        "granted",
        held.lease_id,
        held.fence,
        held.expires_at,
    )
    row = s.one(
        "call pglimits.acquire_wait('database', slots => 1, key => 'k', lease_duration => '1 hour', priority => 3,"
        " holder => '{\"a\": 1}', strict => true)"
    )
    held = s.one("select * from pglimits.holders where lease_id = %s", row.granted_lease_id)
    assert (held.slots, held.key, held.priority, held.holder) == (1, "k", 3, {"a": 1})
    assert seconds(held.expires_at - held.acquired_at) == pytest.approx(3600)


def test_acquire_wait_waits_for_a_release_and_is_granted_in_order(db: Db, s: Session) -> None:
    s.create("database", 1)
    holder = s.acquire("database").lease_id
    first = waits(db, "database", lease_id=uuid4())
    second = waits(db, "database")
    assert s.release(holder)
    row = first.result(timeout=20)
    assert row.status == "granted"
    (held,) = s.holders()
    assert (held.lease_id, held.fence) == (row.granted_lease_id, row.fence)
    assert held.expires_at == row.expires_at
    assert not second.done()
    s.release(row.granted_lease_id)
    assert second.result(timeout=20).status == "granted"
    db.consistent()


def test_acquire_wait_holds_no_lock_and_no_transaction_while_it_waits(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    future = waits(db, "database")
    s.run("set lock_timeout = '5s'")
    s.run("begin")
    s.run("select from pglimits.states for update")
    s.run("select from pglimits.queue for update")
    s.run("rollback")
    assert not future.done()
    s.reset("database")
    assert future.result(timeout=20).status == "granted"


def test_acquire_wait_ends_with_its_caller_where_the_server_looks_whether_that_is_there(db: Db, s: Session) -> None:
    s.create("database", 1)
    held = s.acquire("database").lease_id
    caller = db.session().connection
    caller.execute("set client_connection_check_interval = '100ms'")
    pid = caller.info.backend_pid
    caller.pgconn.send_query(b"call pglimits.acquire_wait('database')")
    db.wait_until(lambda: len(s.waiters()) == 1)
    # As when it is killed: nothing is said, the connection is closed.
    with socket.socket(fileno=os.dup(caller.pgconn.socket)) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    db.wait_until(lambda: not s.value("select exists (select from pg_stat_activity where pid = %s)", pid))
    s.run("update pglimits.queue set expires_at = clock_timestamp()")
    assert s.waiters() == []
    s.release(held)
    assert s.acquire("database").status == "granted"


def test_acquire_wait_gives_up_at_its_wait_and_leaves_the_queue(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    row = s.one(WAIT, "database", "20 milliseconds", None)
    assert (row.status, row.granted_lease_id, row.fence, row.expires_at) == ("refused", None, None, None)
    assert s.one(WAIT, "database", "0", None).status == "refused"
    assert s.waiters() == []
    db.consistent()


def test_acquire_wait_takes_an_ended_leases_slot_without_any_release(s: Session) -> None:
    s.create("database", 1)
    s.acquire("database", lease_duration="1 second")
    assert s.one(WAIT, "database", "20 seconds", None).status == "granted"


def test_acquire_wait_goes_on_waiting_when_it_lost_its_place(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    future = waits(db, "database")
    s.run("begin")
    s.delete("database")
    s.create("database", 1)
    holder = s.acquire("database").lease_id
    s.run("commit")
    db.wait_until(lambda: future.done() or s.waiters())
    assert not future.done(), future.result()
    s.release(holder)
    assert future.result(timeout=20).status == "granted"


def test_acquire_wait_goes_on_without_a_slot_when_the_limit_is_deactivated(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database")
    future = waits(db, "database")
    s.update("database", active=False)
    row = future.result(timeout=20)
    assert (row.status, row.granted_lease_id) == ("unlimited", None)


def test_acquire_wait_fails_when_the_limit_has_become_too_small(db: Db, s: Session) -> None:
    s.create("database", 2)
    s.acquire("database")
    future, _ = db.start(lambda session: session.one("call pglimits.acquire_wait('database', 2)"))
    db.wait_until(lambda: future.done() or s.waiters())
    s.update("database", limit=1)
    with fails("PL004", "slots"):
        future.result(timeout=20)


def test_acquire_wait_fails_inside_a_transaction_and_takes_nothing(s: Session) -> None:
    s.create("database", 1)
    s.run("begin")
    with pytest.raises(psycopg.errors.InvalidTransactionTermination):
        s.run(WAIT, "database", None, None)
    s.run("rollback")
    assert s.holders() == []


def test_acquire_wait_repeated_with_its_id_acts_once(s: Session) -> None:
    s.create("database", 2)
    lease_id = uuid4()
    first = s.one(WAIT, "database", None, lease_id)
    again = s.one(WAIT, "database", None, lease_id)
    assert (first.granted_lease_id, first.fence) == (again.granted_lease_id, again.fence) == (lease_id, first.fence)
    assert s.limit("database").held == 1


def test_acquire_wait_fails_as_acquire_would(s: Session) -> None:
    s.create("database", 1)
    for call, state, word in (
        ("'database', 2", "PL004", "slots"),
        ("'nowhere', strict => true", "PL002", "nowhere"),
        ("'database', lease_duration => '0'", "PL001", "lease_duration"),
        ("'database', wait => '-1 second'", "PL001", "wait"),
        ("null", "PL001", "name"),
    ):
        with fails(state, word):
            s.run(f"call pglimits.acquire_wait({call})")
    assert s.holders() == []


def test_acquire_wait_is_not_led_astray_by_the_callers_search_path(db: Db, s: Session) -> None:
    """Everything in it is qualified, as it can have no search_path of its own."""
    s.create("database", 1)
    s.acquire("database")
    s.run("create schema evil")
    for pair in ("interval, interval", "text, text", "timestamptz, timestamptz"):
        left, right = pair.split(", ")
        for operator in ("=", "<>", "<="):
            s.run(
                f"create or replace function evil.wrong({left}, {right}) returns boolean language plpgsql"
                " as $$ begin raise exception 'led astray'; end $$"
            )
            s.run(f"create operator evil.{operator} (leftarg = {left}, rightarg = {right}, function = evil.wrong)")
    for function in ("clock_timestamp() returns timestamptz", "pg_sleep(double precision) returns void"):
        s.run(f"create function evil.{function} language plpgsql as $$ begin raise exception 'led astray'; end $$")
    session = db.session()
    session.run("set search_path = evil, pg_catalog")
    assert session.one(WAIT, "database", "20 milliseconds", None).status == "refused"
    s.reset("database")
    taken = session.one(WAIT, "database", "5 seconds", None)
    assert taken.status == "granted"
    for function in ("set_config(text, text, boolean) returns text", "flush() returns void"):
        s.run(f"create function evil.{function} language plpgsql as $$ begin raise exception 'led astray'; end $$")
    assert session.one("call pglimits.release_hot(%s::uuid)", taken.granted_lease_id).released is True
    assert session.one("call pglimits.acquire_hot('database')").status == "granted"
