"""Limits: creating, changing, deleting, resetting them; what peek tells, what the views show, what the sweep tidies."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails


def full(s: Session, name: str = "database", limit: int = 1, **more: Any) -> list[UUID]:
    s.create(name, limit, **more)
    return [answer.lease_id for answer in s.serves(name, limit)]


@pytest.fixture
def told(db: Db) -> Callable[[int], list[str]]:
    """told(count): whom the next notifications of the channel pglimits_t are about."""
    listener = db.session().connection
    listener.execute("listen pglimits_t")

    def next_ones(count: int) -> list[str]:
        notices = listener.notifies(timeout=60, stop_after=count)
        return [line.split()[0] for notice in notices for line in notice.payload.splitlines()]

    return next_ones


# create_limit


def test_a_created_limit_has_what_it_was_given_and_defaults_for_the_rest(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.run("select pglimits.create_limit('plain', 5)")
    assert tuple(s.limit("plain")) == ("plain", 5, 0, 0, True, 0, 0, None, None, now, now)
    s.run("select pglimits.create_limit('full', 0, 2.5, false, 7, 'what it is for')")
    assert tuple(s.limit("full")) == ("full", 0, 0, 0, False, 2.5, 0, 7, "what it is for", now, now)
    s.create("described by nothing", 1, description="")
    assert s.limit("described by nothing").description is None


def test_a_name_is_taken_once(db: Db, s: Session) -> None:
    def create(session: Session) -> str | None:
        try:
            session.create("database", 1)
        except psycopg.Error as error:
            return error.sqlstate
        return "created"

    assert sorted(map(str, db.together([create] * 8))) == ["PL003"] * 7 + ["created"]
    with changes_nothing(db.session()), fails("PL003", "database"):
        s.create("database", 7)


def test_names_are_told_apart_by_every_character(s: Session) -> None:
    names = ["a", "A", "ä", "a ", "a.b", "a\u0308"]
    for number, name in enumerate(names):
        s.create(name, number)
    assert [s.limit(name).limit for name in names] == list(range(len(names)))


def test_a_limit_gets_a_free_id_after_others_were_restored_without_the_sequence(db: Db, s: Session) -> None:
    """As logical replication, or the restore of an extension's data, leaves it."""
    s.create("old", 1)
    s.run("alter sequence pglimits.configs_limit_id_seq restart")
    s.run("update pglimits.configs set limit_id = default")  # no state has it yet
    s.run("alter sequence pglimits.configs_limit_id_seq restart")
    s.create("new", 1)
    assert s.acquire("old").status == s.acquire("new").status == "granted"
    with fails("PL003", "old"):
        s.create("old", 1)
    db.consistent()


# update_limit


def test_an_update_changes_only_what_it_names(clock: Clock, s: Session) -> None:
    created = clock.freeze()
    s.create("api", 5, 1.5, max_waiters=3, description="d")
    clock.advance(60)
    for column, value in (
        ("limit", 9), ("slot_decay_per_second", 2.5), ("active", False), ("max_waiters", 0), ("description", "e"),
    ):  # fmt: skip
        before = s.limit("api")._asdict()
        s.update("api", **{column: value})
        assert s.limit("api")._asdict() == {**before, column: value, "updated_at": created + timedelta(seconds=60)}
    s.update("api", max_waiters=-1, description="")
    assert (s.limit("api").max_waiters, s.limit("api").description) == (None, None)


def test_a_grown_limit_grants_the_waiters_of_every_key_once_it_commits(
    db: Db, s: Session, told: Callable[[int], list[str]]
) -> None:
    full(s)
    s.acquire("database", key="k")
    waiters = [s.queue("database", key=key, channel="pglimits_t") for key in ("", "", "k", "")]
    other = db.session()
    with other.transaction():
        other.update("database", limit=3)
        assert len(s.holders()) == 2
    assert set(told(2)) == {str(waiter) for waiter in waiters[:3]}
    assert {row.status for row in s.watch(*waiters[:3])} == {"granted"}
    assert s.watch_one(waiters[3]).status == "queued"
    db.consistent()


def test_a_shrunk_limit_leaves_its_holders_and_admits_nobody_until_it_fits(db: Db, s: Session) -> None:
    leases = full(s, limit=4)
    s.update("database", limit=2)
    assert s.limit("database").held == 4
    waiter = s.queue("database")
    for lease_id, status in zip(leases, ["queued", "queued", "granted"], strict=False):
        assert s.acquire("database").status == "refused"
        assert s.release(lease_id)
        assert s.watch_one(waiter).status == status
    assert s.limit("database").held == 2
    db.consistent()


def test_a_waiter_that_is_now_too_wide_is_told_so_wherever_it_stands_and_others_go_on(
    db: Db, s: Session, told: Callable[[int], list[str]]
) -> None:
    s.create("database", 3)
    holder = s.acquire("database", slots=2).lease_id
    head, narrow, behind = (s.queue("database", slots=n, channel="pglimits_t") for n in (3, 2, 3))
    s.update("database", limit=2)
    assert set(told(2)) == {str(head), str(behind)}
    for wide in (head, behind):
        assert s.watch_one(wide).status == "retry"
        with fails("PL004", "slots", "database"):
            s.acquire("database", slots=3, timeout_seconds=FOREVER, lease_id=wide)
    s.release(holder)
    assert s.watch_one(narrow).status == "granted"
    db.consistent()


@pytest.mark.parametrize("end", ["deactivated", "deleted"])
def test_who_waits_for_a_limit_that_ends_is_told_and_goes_on(
    db: Db, s: Session, end: str, told: Callable[[int], list[str]]
) -> None:
    (lease_id,) = full(s)
    waiter = s.queue("database", channel="pglimits_t")
    if end == "deleted":
        s.delete("database")
    else:
        s.update("database", active=False)
    assert told(1) == [str(waiter)]
    assert s.watch_one(waiter).status == "retry"
    assert s.waiters() == []
    assert s.acquire("database", timeout_seconds=FOREVER, lease_id=waiter).status == "unlimited"
    assert s.release(lease_id) == (end == "deactivated"), "leases taken before keep counting until they end"
    db.consistent()


def test_renaming_keeps_everything(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("old", 2, 0.5, max_waiters=5, description="d")
    lease, _ = s.serves("old", 2, key="k")
    waiter = s.queue("old", key="k")
    before = s.limit("old")._asdict()
    s.update("old", new_name="new")
    assert s.limit("new")._asdict() == {**before, "name": "new"}
    assert s.all("select from pglimits.limits where name = 'old'") == []
    assert {row.name for row in (*s.holders(), *s.waiters())} == {"new"}
    assert s.acquire("old", key="k", timeout_seconds=FOREVER, lease_id=waiter).status == "queued", "still its place"
    assert s.renew(lease.lease_id)
    clock.advance(4)
    s.release(lease.lease_id)
    assert s.watch_one(waiter).status == "granted"
    assert s.acquire("new", key="k", lease_id=waiter).fence > lease.fence
    s.create("old", 1)
    with fails("PL001", "lease_id"):
        s.acquire("old", key="k", lease_id=waiter)
    db.consistent()


def test_a_rename_to_a_taken_name_changes_nothing(db: Db, s: Session) -> None:
    s.create("one", 1)
    s.create("two", 1)
    with changes_nothing(db.session()), fails("PL003", "two"):
        s.update("one", new_name="two", limit=9)
    s.update("one", new_name="one", limit=9)
    assert s.limit("one").limit == 9


# delete_limit


def test_deleting_drops_the_leases_and_a_later_release_is_a_no_op(s: Session) -> None:
    (lease_id,) = full(s)
    s.queue("database")
    s.delete("database")
    for table in ("configs", "known_keys", "states", "leases", "queue"):
        assert s.value(f"select count(*) from pglimits.{table}") == 0
    assert s.release(lease_id) is s.renew(lease_id) is False
    assert s.acquire("database").status == "unlimited"
    with fails("PL002", "database"):
        s.acquire("database", strict=True)


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


def test_who_waits_for_the_lock_of_a_limit_that_is_deleted_finds_it_gone(db: Db, s: Session) -> None:
    (lease_id,) = full(s)
    s.create("other", 1)
    s.release(s.acquire("other").lease_id)
    other = db.session()
    with other.transaction():
        other.delete("database")
        release, _ = db.start_blocked(lambda session: session.release(lease_id))
        acquire, _ = db.start_blocked(lambda session: session.acquire("database", timeout_seconds=FOREVER).status)
        several = {"strict": True, "timeout_seconds": FOREVER}
        strict, _ = db.start_blocked(lambda session: session.acquire(["other", "database"], **several))
    assert release.result(timeout=60) is False
    assert acquire.result(timeout=60) == "unlimited"
    with fails("PL002", "database"):
        strict.result(timeout=60)
    assert s.holders() == []
    db.consistent()


@pytest.mark.parametrize("names", ["one", ["one", "two"]], ids=["one", "several"])
def test_who_waits_for_the_lock_of_a_limit_that_is_made_anew_is_bound_by_the_new_one(
    db: Db, s: Session, names: str | list[str]
) -> None:
    for name in ("one", "two"):
        s.create(name, 1)
        s.release(s.acquire(name).lease_id)
    other = db.session()
    with other.transaction():
        other.delete("one")
        other.create("one", 1)
        acquire, _ = db.start_blocked(lambda session: session.acquire(names, strict=True).status)
    assert acquire.result(timeout=60) == "granted"
    assert {held.name for held in s.holders()} == {*([names] if isinstance(names, str) else names)}
    db.consistent()


def test_fences_go_on_growing_after_delete_and_create(s: Session) -> None:
    fences = []
    for _ in range(3):
        s.create("database", 9)
        fences += [answer.fence for answer in s.serves("database", 3, key="k")]
        s.delete("database")
    assert fences == sorted(set(fences))


def test_what_does_not_exist_can_be_neither_changed_nor_deleted_nor_reset(db: Db, s: Session) -> None:
    with changes_nothing(db.session()):
        for call in (
            "update_limit('nowhere', 3)",
            "delete_limit('nowhere')",
            "reset('nowhere')",
            "adjust('nowhere', 3)",
        ):
            with fails("PL002", "nowhere"):
                s.run(f"select pglimits.{call}")


# reset


def test_reset_ends_every_lease_zeroes_the_level_and_grants_waiters(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 0.001)
    leases = s.serves("api", 2)
    s.serves("api", 2, key="k")
    waiter = s.queue("api")
    assert s.reset("api") == 4
    assert s.watch_one(waiter).status == "granted"
    assert s.limit("api").level == pytest.approx(1)
    assert [held.lease_id for held in s.holders()] == [waiter]
    assert s.renew(leases[0].lease_id) is s.release(leases[0].lease_id) is False, "its holder finds out"
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
    s.acquire("database", lease_duration=10)
    s.serves("database", 2)
    clock.advance(11)
    assert s.reset("database") == 2
    db.consistent()


# peek


@pytest.mark.parametrize("timeout", [0, FOREVER])
def test_peek_answers_as_acquire_would_and_changes_nothing(
    clock: Clock, db: Db, s: Session, timeout: float | None
) -> None:
    clock.freeze()
    s.create("free", 2)
    full(s, limit=2)
    s.create("off", 1, active=False)
    s.create("shut", 0)
    s.create("api", 1, 0.5)
    s.release(s.acquire("api").lease_id)
    s.queue("database", priority=1)
    s.queue("database")
    requests: list[tuple[Any, dict[str, Any]]] = [
        ("free", {"slots": 2}), ("database", {}), ("database", {"priority": 1}), ("database", {"priority": 2}),
        ("database", {"key": "k", "slots": 2}), ("off", {}), ("nowhere", {}), ("shut", {}), ("api", {}),
        (["free", "database"], {}), (["free", "off", "nowhere"], {}),
    ]  # fmt: skip
    for names, arguments in requests:
        with changes_nothing(db.session()):
            s.run("begin read only")
            peeked = s.peek(names, timeout_seconds=timeout, **arguments)
            s.run("rollback")
        s.run("begin")
        answer = s.acquire(names, timeout_seconds=timeout, **arguments)
        s.run("rollback")
        assert (peeked.status, peeked.position) == (answer.status, answer.position), names
        if answer.status == "refused":
            assert peeked.retry_after == answer.retry_after, names


def test_peek_answers_as_rate_limit_would_and_changes_nothing(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("api", 2, 0.5)
    assert s.peek("api", for_rate=True).status == "granted"
    s.rate_limit("api", slots=2)
    s.rate_limit("api", timeout_seconds=FOREVER)
    for timeout in (0, 3.9, 4.1, FOREVER):
        with changes_nothing(db.session()):
            s.run("begin read only")
            peeked = s.peek("api", timeout_seconds=timeout, for_rate=True)
            s.run("rollback")
        s.run("begin")
        answer = s.rate_limit("api", timeout_seconds=timeout)
        s.run("rollback")
        assert (peeked.status, peeked.position) == (answer.status, answer.position)
        assert peeked.retry_after == pytest.approx(4)


def test_peek_fails_as_acquire_would(clock: Clock, s: Session) -> None:
    clock.freeze()
    full(s, max_waiters=0)
    s.create("api", 1, 0.5, max_waiters=0)
    s.rate_limit("api")
    with fails("PL004", "slots"):
        s.peek("database", slots=2)
    with fails("PL002", "nowhere"):
        s.peek("nowhere", strict=True)
    with fails("PL005", "database"):
        s.peek("database", for_rate=True)
    with fails("PL006", "database"):
        s.peek("database", timeout_seconds=1)
    with fails("PL006", "api"):
        s.peek("api", timeout_seconds=2, for_rate=True)
    assert s.peek("api", timeout_seconds=1, for_rate=True).status == "refused"


# Views.


def test_the_views_have_the_columns_that_are_documented_and_begin_empty(s: Session) -> None:
    columns = {
        "limits": "name limit held waiting active slot_decay_per_second level max_waiters description created_at"
        " updated_at",
        "keys": "name key held level waiting fence",
        "holders": "lease_id name key slots holder fence priority acquired_at expires_at",
        "waiters": "lease_id name key slots holder priority position waiting_since",
    }
    for view, names in columns.items():
        cursor = s.connection.execute(f"select * from pglimits.{view}".encode())
        assert [column.name for column in cursor.description or ()] == names.split()
        assert cursor.fetchall() == []


def test_the_view_of_limits_adds_up_what_that_of_keys_shows_and_both_apply_decay(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("api", 10, 2)
    fences = [s.acquire("api", slots=3, key="a").fence, s.acquire("api", slots=4, key="b").fence]
    s.rate_limit("api", slots=2, key="c")
    s.queue("api", slots=9, key="b")

    def keys() -> list[tuple[Any, ...]]:
        return [(row.key, row.held, round(row.level, 9), row.waiting) for row in s.all("select * from pglimits.keys")]

    row = s.limit("api")
    assert (row.held, row.level, row.waiting) == (7, pytest.approx(9), 1)
    assert keys() == [("a", 3, 3, 0), ("b", 4, 4, 1), ("c", 0, 2, 0)]
    assert s.all("select fence from pglimits.keys where key < 'c' order by key")[0] == (fences[0],)
    clock.advance(1.5)
    assert (s.limit("api").held, s.limit("api").level) == (7, pytest.approx(1))
    assert keys() == [("a", 3, 0, 0), ("b", 4, 1, 1), ("c", 0, 0, 0)]


def test_the_view_of_waiters_shows_who_waits_in_order_with_their_place(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    full(s)
    first = s.queue("database", holder={"pid": 1})
    clock.advance(1)
    second = s.queue("database", priority=3)
    above, below = s.waiters()
    assert (above.lease_id, above.position, above.priority) == (second, 1, 3)
    assert (below.lease_id, below.position, below.priority) == (first, 2, 0)
    assert (below.name, below.key, below.slots, below.holder) == ("database", "", 1, {"pid": 1})
    assert below.waiting_since - now < timedelta(milliseconds=1)
    assert timedelta(0) <= above.waiting_since - now - timedelta(seconds=1) < timedelta(milliseconds=1)


def test_who_gives_no_holder_is_shown_as_its_session(s: Session) -> None:
    full(s)
    s.queue("database")
    s.run("set application_name = 'nightly'")
    s.acquire("database", key="k")
    s.acquire("database", key="given", holder={"job": 1})
    by_key = {row.key: row.holder for row in s.holders()}
    session = {"user": s.value("select session_user::text"), "pid": s.pid, "address": None}
    for shown, application in ((by_key["k"], "nightly"), (by_key[""], ""), (s.waiters()[0].holder, "")):
        assert shown == {**session, "application": application, "address": shown["address"]}
    assert by_key["given"] == {"job": 1}


# sweep


def test_sweep_removes_ended_leases_and_dead_waiters(clock: Clock, db: Db, s: Session) -> None:
    clock.freeze()
    s.create("database", 3)
    s.acquire("database", slots=2, lease_duration=5)
    s.acquire("database", lease_duration=3600)
    full(s, "other")
    s.queue("other")
    s.create("api", 1, 0.001)
    s.rate_limit("api")
    s.rate_limit("api", timeout_seconds=FOREVER)
    s.beat("pglimits_dead")
    clock.advance(120)
    assert tuple(s.sweep()) == (2, 2, 0)
    assert s.value("select count(*) from pglimits.leases") == 2
    for table in ("queue", "processes"):
        assert s.value(f"select count(*) from pglimits.{table}") == 0
    db.consistent()
    assert tuple(s.sweep()) == (0, 0, 0)


def test_sweep_grants_what_it_frees(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    s.acquire("database", lease_duration=5)
    waiter = s.queue("database")
    clock.advance(6)
    s.sweep()
    assert s.holders()[0].lease_id == waiter
    db.consistent()


def test_sweep_forgets_idle_keys_and_their_fences_go_on_growing(clock: Clock, db: Db, s: Session) -> None:
    s.create("database", 1)
    fences = {}
    for key in ("", "a", "b"):
        for _ in range(3):
            answer = s.acquire("database", key=key)
            fences[key] = answer.fence
            s.release(answer.lease_id)
    s.acquire("database", key="held", lease_duration=86400)
    s.acquire("database", key="queued", lease_duration=86400)
    assert s.sweep().keys == 0, "not idle for long enough"
    clock.advance(3599)
    s.queue("database", key="queued")
    clock.advance(2)
    assert s.sweep().keys == 3
    assert s.value("select array_agg(key order by key) from pglimits.keys") == ["held", "queued"]
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
    with other.transaction():
        assert other.sweep().keys == 1
        acquire, _ = db.start_blocked(lambda session: session.acquire("database"))
    answer = acquire.result(timeout=60)
    assert (answer.status, answer.fence > last.fence) == ("granted", True)
    db.consistent()


def test_nothing_depends_on_the_sweep_to_tell_an_ended_lease(clock: Clock, db: Db, s: Session) -> None:
    full(s)
    clock.advance(301)
    assert s.limit("database").held == 0
    with changes_nothing(db.session()):
        assert s.peek("database").status == "granted"
    assert s.acquire("database", lease_id=uuid4()).status == "granted"
