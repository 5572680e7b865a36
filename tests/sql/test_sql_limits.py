"""Limits: creating, changing, deleting, resetting them; what peek tells, what the views show, what the sweep tidies."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqltest import Clock, Db, Session, changes_nothing, fails, seconds


def full(s: Session, name: str = "database", limit: int = 1, **more: Any) -> list[UUID]:
    s.create(name, limit, **more)
    return [answer.lease_id for answer in s.serves(name, limit)]


# create_limit


def test_a_created_limit_has_what_it_was_given_and_defaults_for_the_rest(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.run("select pglimits.create_limit('plain', 5)")
    row = s.limit("plain")
    assert tuple(row) == ("plain", 5, True, 0, 0, 0, 0, None, None, now, now)
    s.run("select pglimits.create_limit('full', 0, 2.5, false, 7, 'what it is for')")
    row = s.limit("full")
    assert (row.limit, row.slot_decay_per_second, row.active, row.max_waiters) == (0, 2.5, False, 7)
    assert row.description == "what it is for"


def test_a_name_is_taken_once(db: Db, s: Session) -> None:
    s.create("database", 5)
    with changes_nothing(db.session()), fails("PL003", "database"):
        s.create("database", 7)


def test_of_many_that_create_the_same_limit_one_succeeds(db: Db, s: Session) -> None:
    def create(session: Session) -> str:
        try:
            session.create("database", 1)
        except Exception as error:
            return str(getattr(error, "sqlstate", error))
        return "created"

    assert sorted(db.together([create] * 8)) == ["PL003"] * 7 + ["created"]


def test_names_are_told_apart_by_every_character(s: Session) -> None:
    names = ["a", "A", "ä", "a ", "a.b", "a\u0308"]
    for number, name in enumerate(names):
        s.create(name, number)
    assert [s.limit(name).limit for name in names] == list(range(len(names)))


# update_limit


def test_an_update_changes_only_what_it_names(clock: Clock, s: Session) -> None:
    created = clock.freeze()
    s.create("api", 5, 1.5, max_waiters=3, description="d")
    clock.advance(60)
    for change, column in (
        ({"limit": 9}, "limit"),
        ({"slot_decay_per_second": 2.5}, "slot_decay_per_second"),
        ({"active": False}, "active"),
        ({"max_waiters": 0}, "max_waiters"),
        ({"description": "e"}, "description"),
    ):
        before = s.limit("api")._asdict()
        s.update("api", **change)
        after = s.limit("api")._asdict()
        assert {name for name in after if after[name] != before[name]} - {"updated_at"} == {column}
        assert after[column] == change[column]
    row = s.limit("api")
    assert (row.created_at, row.updated_at) == (created, created + timedelta(seconds=60))


def test_an_empty_description_is_none(s: Session) -> None:
    s.create("database", 1, description="")
    assert s.limit("database").description is None


def test_an_update_can_take_max_waiters_and_description_away(s: Session) -> None:
    s.create("database", 1, max_waiters=3, description="d")
    s.update("database", max_waiters=-1, description="")
    assert (s.limit("database").max_waiters, s.limit("database").description) == (None, None)


def test_a_grown_limit_grants_waiters_at_once_in_its_transaction(db: Db, s: Session) -> None:
    full(s)
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    waiters = [s.queue("database", channel="pglimits_t") for _ in range(3)]
    other = db.session()
    other.run("begin")
    other.update("database", limit=3)
    assert len(s.holders()) == 1
    other.run("commit")
    told = [notice.payload for notice in listener.notifies(timeout=20, stop_after=2)]
    assert [payload.split()[0] for payload in told] == [str(waiter) for waiter in waiters[:2]]
    assert [row.status for row in s.watch(*waiters[:2])] == ["granted", "granted"]
    assert s.watch_one(waiters[2]).status == "queued"
    db.consistent()


def test_a_grown_limit_grants_the_waiters_of_every_key(db: Db, s: Session) -> None:
    s.create("database", 1)
    waiters = []
    for key in ("", "a", "b"):
        s.acquire("database", key=key)
        waiters.append(s.queue("database", key=key))
    s.update("database", limit=2)
    assert {row.status for row in s.watch(*waiters)} == {"granted"}
    db.consistent()


def test_a_shrunk_limit_leaves_its_holders_and_admits_nobody_until_it_fits(db: Db, s: Session) -> None:
    leases = full(s, limit=4)
    s.update("database", limit=2)
    assert s.limit("database").held == 4
    waiter = s.queue("database")
    for position, status in enumerate(["queued", "queued", "granted"]):
        assert s.acquire("database").status == "refused"
        assert s.release(leases[position])
        assert s.watch_one(waiter).status == status
    assert s.limit("database").held == 2
    db.consistent()


def test_a_waiter_that_is_now_too_wide_is_told_so_and_others_go_on(db: Db, s: Session) -> None:
    s.create("database", 3)
    (holder,) = (answer.lease_id for answer in s.serves("database", 1, slots=2))
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    wide = s.queue("database", slots=3, channel="pglimits_t")
    narrow = s.queue("database", slots=2)
    s.update("database", limit=2)
    assert [notice.payload for notice in listener.notifies(timeout=20, stop_after=1)] == [str(wide)]
    assert s.watch_one(wide).status == "retry"
    with fails("PL004", "slots", "database"):
        s.acquire("database", slots=3, wait=None, lease_id=wide)
    s.release(holder)
    assert s.watch_one(narrow).status == "granted"
    db.consistent()


def test_a_too_wide_waiter_behind_the_head_is_told_so_at_once(db: Db, s: Session) -> None:
    full(s, limit=3)
    s.queue("database")
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    wide = s.queue("database", slots=3, channel="pglimits_t")
    s.update("database", limit=2)
    s.run("select pg_notify('pglimits_t', 'end')")
    assert next(iter(listener.notifies(timeout=20, stop_after=1))).payload == str(wide)
    assert s.watch_one(wide).status == "retry"


def test_deactivating_lets_the_waiters_through_at_once(db: Db, s: Session) -> None:
    full(s)
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    waiter = s.queue("database", channel="pglimits_t")
    s.update("database", active=False)
    assert [notice.payload for notice in listener.notifies(timeout=20, stop_after=1)] == [str(waiter)]
    assert s.watch_one(waiter).status == "retry"
    assert s.acquire("database", wait=None, lease_id=waiter).status == "unlimited"
    assert s.waiters() == []
    db.consistent()


def test_renaming_keeps_everything(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("old", 2, 0.5, max_waiters=5, description="d")
    lease = s.acquire("old", key="k")
    s.acquire("old", key="k")
    waiter = s.queue("old", key="k")
    before = s.limit("old")._asdict()
    s.update("old", new_name="new")
    after = s.limit("new")._asdict()
    assert {name for name in after if after[name] != before[name]} == {"name"}
    assert s.all("select from pglimits.limits where name = 'old'") == []
    assert {held.name for held in s.holders()} == {"new"}
    assert [row.name for row in s.waiters()] == ["new"]
    assert s.renew(lease.lease_id)
    clock.advance(4)
    s.release(lease.lease_id)
    assert s.watch_one(waiter).status == "granted"
    assert s.acquire("new", key="k", lease_id=waiter).fence > lease.fence
    s.create("old", 1)
    db.consistent()


def test_a_rename_to_a_taken_name_changes_nothing(db: Db, s: Session) -> None:
    s.create("one", 1)
    s.create("two", 1)
    with changes_nothing(db.session()), fails("PL003", "two"):
        s.update("one", new_name="two", limit=9)
    s.update("one", new_name="one", limit=9)
    assert s.limit("one").limit == 9


def test_a_change_is_in_its_callers_transaction(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.run("begin")
    s.update("database", limit=9)
    s.run("rollback")
    assert s.limit("database").limit == 1


# delete_limit


def test_deleting_drops_the_leases_and_a_later_release_is_a_no_op(db: Db, s: Session) -> None:
    (lease_id,) = full(s)
    s.delete("database")
    assert s.holders() == []
    assert s.release(lease_id) is False
    assert s.renew(lease_id) is False
    assert s.all("select * from pglimits.limits") == []
    assert s.acquire("database").status == "unlimited"
    for table in ("states", "leases", "queue", "configs"):
        assert s.value(f"select count(*) from pglimits.{table}") == 0


def test_deleting_tells_the_waiters(db: Db, s: Session) -> None:
    full(s)
    listener = db.session().connection
    listener.execute("listen pglimits_t")
    waiter = s.queue("database", channel="pglimits_t")
    s.delete("database")
    assert [notice.payload for notice in listener.notifies(timeout=20, stop_after=1)] == [str(waiter)]
    assert s.watch_one(waiter).status == "retry"
    assert s.acquire("database", wait=None, lease_id=waiter).status == "unlimited"
    with fails("PL002", "database"):
        s.acquire("database", wait=None, lease_id=waiter, strict=True)


def test_deleting_one_of_several_limits_leaves_the_lease_on_the_others(db: Db, s: Session) -> None:
    s.create("one", 1)
    s.create("two", 1)
    lease_id = s.acquire(["one", "two"]).lease_id
    s.delete("one")
    assert [held.name for held in s.holders()] == ["two"]
    assert s.renew(lease_id)
    assert s.release(lease_id)
    assert s.limit("two").held == 0
    db.consistent()


def test_a_release_that_waits_while_its_limit_is_deleted_is_a_no_op(db: Db, s: Session) -> None:
    (lease_id,) = full(s)
    other = db.session()
    other.run("begin")
    other.delete("database")
    release, _ = db.start_blocked(lambda session: session.release(lease_id))
    acquire, _ = db.start_blocked(lambda session: session.acquire("database", wait=None).status)
    other.run("commit")
    assert release.result(timeout=20) is False
    assert acquire.result(timeout=20) == "unlimited"
    db.consistent()


@pytest.mark.parametrize("batch", [False, True])
def test_who_waits_for_the_lock_of_a_limit_that_is_made_anew_is_bound_by_the_new_one(
    db: Db, s: Session, batch: bool
) -> None:
    for name in ("one", "two"):
        s.create(name, 1)
        s.release(s.acquire(name).lease_id)
    other = db.session()

    def ask(session: Session) -> str:
        if batch:
            requests = [{"names": ["one", "two"]}, {"names": ["two"]}]
            return str(
                session.all("select status from pglimits.acquire_many(%s::jsonb)", json.dumps(requests))[0].status
            )
        return str(session.acquire(["one", "two"], strict=True).status)

    other.run("begin")
    other.delete("one")
    other.create("one", 1)
    acquire, _ = db.start_blocked(ask)
    other.run("commit")
    assert acquire.result(timeout=20) == "granted"
    assert sorted(held.name for held in s.holders()) == ["one", "two"]
    db.consistent()


def test_who_waits_for_the_lock_of_a_limit_that_is_deleted_is_told_with_strict(db: Db, s: Session) -> None:
    for name in ("one", "two"):
        s.create(name, 1)
        s.release(s.acquire(name).lease_id)
    other = db.session()
    other.run("begin")
    other.delete("two")
    acquire, _ = db.start_blocked(lambda session: session.acquire(["one", "two"], strict=True).status)
    other.run("commit")
    with pytest.raises(psycopg.Error, match="there is no limit named 'two'") as caught:
        acquire.result(timeout=20)
    assert caught.value.sqlstate == "PL002"
    assert s.holders() == []
    db.consistent()


def test_fences_go_on_growing_after_delete_and_create(s: Session) -> None:
    s.create("database", 9)
    last = 0
    for _ in range(3):
        for answer in s.serves("database", 3, key="k"):
            assert answer.fence > last
            last = answer.fence
        s.delete("database")
        s.create("database", 9)


def test_what_does_not_exist_can_be_neither_changed_nor_deleted_nor_reset(db: Db, s: Session) -> None:
    with changes_nothing(db.session()):
        for statement in (
            "select pglimits.update_limit('nowhere', 3)",
            "select pglimits.delete_limit('nowhere')",
            "select pglimits.reset('nowhere')",
            "select pglimits.adjust('nowhere', 3)",
        ):
            with fails("PL002", "nowhere"):
                s.run(statement)


# reset


def test_reset_ends_every_lease_zeroes_the_level_and_grants_waiters(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 0.001)
    s.serves("api", 2)
    s.serves("api", 2, key="k")
    waiter = s.queue("api")
    assert s.reset("api") == 4
    assert s.watch_one(waiter).status == "granted"
    assert s.limit("api").level == pytest.approx(1)
    assert [held.lease_id for held in s.holders()] == [waiter]
    s.serves("api", 2, key="k")
    db.consistent()


def test_reset_of_one_key_leaves_the_others(db: Db, s: Session) -> None:
    s.create("database", 2)
    s.serves("database", 2, key="a")
    s.serves("database", 2, key="b")
    assert s.reset("database", "a") == 2
    assert {held.key for held in s.holders()} == {"b"}
    assert s.reset("database", "never used") == 0
    db.consistent()


def test_reset_zeroes_the_level_of_a_limit_whose_rate_was_taken_away(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 0.5)
    s.rate_limit("api", slots=2)
    s.update("api", slot_decay_per_second=0)
    s.reset("api")
    s.update("api", slot_decay_per_second=0.5)
    assert s.limit("api").level == 0


def test_reset_counts_no_lease_that_had_ended_already(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 3)
    s.acquire("database", lease_duration="10 seconds")
    s.serves("database", 2)
    clock.advance(11)
    assert s.reset("database") == 2
    db.consistent()


def test_the_holders_find_out_by_renewing_after_a_reset(s: Session) -> None:
    (lease_id,) = full(s)
    s.reset("database")
    assert s.renew(lease_id) is False
    assert s.release(lease_id) is False


# peek


@pytest.mark.parametrize("wait", ["0", None])
def test_peek_answers_as_acquire_would_and_changes_nothing(clock: Clock, db: Db, s: Session, wait: str | None) -> None:
    clock.freeze()
    s.create("free", 2)
    full(s, "database", 2)
    s.create("off", 1, active=False)
    s.create("shut", 0)
    s.create("api", 1, 0.5)
    s.release(s.acquire("api").lease_id)
    s.queue("database", priority=1)
    s.queue("database")
    requests: list[tuple[Any, dict[str, Any]]] = [
        ("free", {"slots": 2}),
        ("database", {}),
        ("database", {"priority": 1}),
        ("database", {"priority": 2}),
        ("database", {"key": "k", "slots": 2}),
        ("off", {}),
        ("nowhere", {}),
        ("shut", {}),
        ("api", {}),
        (["free", "database"], {}),
        (["free", "off", "nowhere"], {}),
    ]
    for names, arguments in requests:
        with changes_nothing(db.session()):
            s.run("begin read only")
            peeked = s.peek(names, wait=wait, **arguments)
            s.run("rollback")
        s.run("begin")
        answer = s.acquire(names, wait=wait, **arguments)
        s.run("rollback")
        assert peeked.status == answer.status, names
        assert peeked.position == answer.position, names
        if answer.status == "refused":
            assert peeked.retry_after == answer.retry_after, names


def test_peek_answers_as_rate_limit_would_and_changes_nothing(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 0.5)
    s.rate_limit("api", slots=2)
    s.rate_limit("api", wait=None)
    for wait in ("0", "3.9 seconds", "4 seconds", None):
        with changes_nothing(db.session()):
            s.run("begin read only")
            peeked = s.peek("api", wait=wait, for_rate=True)
            s.run("rollback")
        s.run("begin")
        answer = s.rate_limit("api", wait=wait)
        s.run("rollback")
        assert (peeked.status, peeked.wait, peeked.retry_after) == (answer.status, answer.wait, answer.retry_after)


def test_peek_reckons_with_what_has_ended_and_not_been_taken_out(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database", lease_duration="10 seconds")
    assert s.peek("database").status == "refused"
    clock.advance(11)
    with changes_nothing(db.session()):
        assert s.peek("database").status == "granted"


def test_peek_fails_as_acquire_would(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 1)
    with fails("PL004", "slots"):
        s.peek("database", slots=2)
    with fails("PL002", "nowhere"):
        s.peek("nowhere", strict=True)
    with fails("PL005", "database"):
        s.peek("database", for_rate=True)
    s.update("database", max_waiters=0)
    s.acquire("database")
    with fails("PL006", "database"):
        s.peek("database", wait="1 second")
    s.create("api", 1, 0.5, max_waiters=0)
    s.rate_limit("api")
    with fails("PL006", "api"):
        s.peek("api", wait="2 seconds", for_rate=True)
    assert s.peek("api", wait="1 second", for_rate=True).status == "refused"


# Views.


def test_the_views_have_the_columns_that_are_documented(s: Session) -> None:
    columns = {
        "limits": "name limit active slot_decay_per_second held level waiting max_waiters description created_at"
        " updated_at",
        "holders": "lease_id name key slots holder fence priority acquired_at expires_at",
        "waiters": "lease_id name key slots holder priority position waiting_since",
    }
    for view, names in columns.items():
        cursor = s.connection.execute(f"select * from pglimits.{view}".encode())
        assert cursor.description is not None
        assert [column.name for column in cursor.description] == names.split()


def test_the_view_of_limits_adds_up_all_keys_and_applies_decay(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 10, 2)
    s.acquire("api", slots=3, key="a")
    s.acquire("api", slots=4, key="b")
    s.rate_limit("api", slots=2, key="c")
    row = s.limit("api")
    assert (row.held, row.level, row.waiting) == (7, pytest.approx(9), 0)
    clock.advance(1.5)
    assert s.limit("api").level == pytest.approx(0 + 1 + 0)
    clock.advance(10)
    assert s.limit("api").level == 0
    assert s.limit("api").held == 7


def test_the_view_of_waiters_shows_who_waits_in_order_with_their_place(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    full(s)
    first = s.queue("database", slots=1, holder={"pid": 1})
    clock.advance(1)
    second = s.queue("database", priority=3)
    rows = s.waiters()
    assert [(row.lease_id, row.position, row.priority) for row in rows] == [(second, 1, 3), (first, 2, 0)]
    assert [row.holder for row in rows] == [None, {"pid": 1}]
    assert (rows[1].name, rows[1].key, rows[1].slots) == ("database", "", 1)
    assert abs(seconds(rows[1].waiting_since - now)) < 0.001
    assert abs(seconds(rows[0].waiting_since - now) - 1) < 0.001


def test_an_empty_database_has_empty_views(s: Session) -> None:
    for view in ("limits", "holders", "waiters"):
        assert s.all(f"select * from pglimits.{view}") == []


# sweep


def test_sweep_removes_ended_leases_dead_waiters_and_passed_turns(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("database", 3)
    s.acquire("database", slots=2, lease_duration="5 seconds")
    s.acquire("database", lease_duration="1 hour")
    s.create("other", 1)
    s.acquire("other")
    s.queue("other")
    s.create("api", 1, 1)
    s.rate_limit("api")
    s.rate_limit("api", wait=None)
    clock.advance(60)
    swept = s.sweep()
    assert (swept.leases, swept.waiters, swept.keys) == (2, 2, 0)
    assert s.value("select count(*) from pglimits.leases") == 2
    assert s.value("select count(*) from pglimits.queue") == 0
    db.consistent()
    swept = s.sweep()
    assert (swept.leases, swept.waiters, swept.keys) == (0, 0, 0)


def test_sweep_grants_what_it_frees(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database", lease_duration="5 seconds")
    waiter = s.queue("database")
    clock.advance(6)
    s.sweep()
    assert s.watch_one(waiter).status == "granted"
    db.consistent()


def test_sweep_forgets_idle_keys_and_their_fences_go_on_growing(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    fences = {}
    for key in ("", "a", "b"):
        for _ in range(3):
            answer = s.acquire("database", key=key)
            fences[key] = answer.fence
            s.release(answer.lease_id)
    s.acquire("database", key="held", lease_duration="1 day")
    s.acquire("database", key="queued", lease_duration="1 day")
    assert s.sweep().keys == 0, "not idle for long enough"
    clock.advance(3599)
    s.queue("database", key="queued")
    clock.advance(2)
    assert s.sweep().keys == 3
    assert s.value("select array_agg(key order by key) from pglimits.states") == ["held", "queued"]
    for key, last in fences.items():
        assert s.acquire("database", key=key).fence > last
    db.consistent()


def test_sweep_keeps_a_key_whose_level_has_not_decayed(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 0.0001)
    s.rate_limit("api", slots=2)
    clock.advance(7200)
    assert s.sweep().keys == 0
    assert s.rate_limit("api", slots=2).status == "refused"
    clock.advance(20000)
    assert s.sweep().keys == 1
    assert s.rate_limit("api", slots=2).status == "granted"


def test_sweep_takes_so_many_keys_at_a_time(clock: Clock, s: Session) -> None:
    s.create("database", 1)
    for key in range(7):
        s.release(s.acquire("database", key=str(key)).lease_id)
    clock.advance(7200)
    assert [s.one("select * from pglimits.sweep(3)").keys for _ in range(4)] == [3, 3, 1, 0]


def test_a_sweep_does_not_wait_for_a_change_of_a_limit(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    s.release(s.acquire("database").lease_id)
    clock.advance(7200)
    other = db.session()
    other.run("begin")
    other.update("database", limit=2)
    s.run("set lock_timeout = '50ms'")
    assert s.sweep().keys == 0
    other.run("rollback")
    assert s.sweep().keys == 1


def test_a_key_swept_while_somebody_waits_for_it_is_made_again(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    last = s.acquire("database")
    s.release(last.lease_id)
    clock.advance(7200)
    other = db.session()
    other.run("begin")
    assert other.sweep().keys == 1
    acquire, _ = db.start_blocked(lambda session: session.acquire("database"))
    other.run("commit")
    answer = acquire.result(timeout=20)
    assert answer.status == "granted"
    assert answer.fence > last.fence
    db.consistent()


def test_nothing_depends_on_the_sweep_to_tell_an_ended_lease(clock: Clock, s: Session) -> None:
    full(s)
    clock.advance(301)
    assert s.limit("database").held == 0
    assert s.peek("database").status == "granted"
    assert s.acquire("database", lease_id=uuid4()).status == "granted"


def test_whoever_waits_or_holds_goes_on_under_the_name_it_asked_by_however_often_that_is_changed_and_reused(
    s: Session,
) -> None:
    s.create("first", 1)
    held, waits = uuid4(), uuid4()
    s.acquire("first", lease_id=held)
    s.acquire("first", wait=None, lease_id=waits)
    for name, new_name in (("first", "second"), ("second", "third")):
        s.update(name, new_name=new_name)
        s.create(name, 1)
    assert s.acquire("first", lease_id=held).status == "granted"
    assert s.acquire("first", wait=None, lease_id=waits).status == "queued"
    assert s.acquire("third", wait=None, lease_id=waits).status == "queued"
    assert [row.name for row in (*s.holders(), *s.waiters())] == ["third", "third"]
    assert s.acquire("first").status == "granted"
    s.release(held)
    assert s.acquire("first", lease_id=waits).status == "granted"
    s.delete("third")
    assert s.acquire("first", lease_id=waits).status == "refused"
    assert s.value("select count(*) from pglimits.former_names where name = 'first'") == 0
