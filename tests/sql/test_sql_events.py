"""Events: what they tell, in whose transaction, to whom, and for how long."""

from __future__ import annotations

from typing import Any

import pytest
from sqltest import Clock, Db, Session, changes_nothing


def events(s: Session, *kinds: str) -> list[Any]:
    return s.all("select * from pglimits.events where kind = any (%s) or %s = '{}'", list(kinds), list(kinds))


def test_creating_changing_and_deleting_a_limit_is_told_with_what_it_was_and_is(s: Session) -> None:
    s.create("database", 3)
    s.update("database", limit=5, description="for reports")
    s.update("database", limit=5)
    s.update("database", new_name="db")
    s.delete("db")
    created, updated, renamed, deleted = events(s)
    assert (created.kind, created.name, created.old) == ("created", "database", None)
    assert created.new == {
        "name": "database", "limit": 3, "slot_decay_per_second": 0, "active": True, "max_waiters": None,
        "description": None,
    }  # fmt: skip
    assert (updated.kind, updated.name) == ("updated", "database")
    assert updated.old == {"limit": 3, "description": None}
    assert updated.new == {"limit": 5, "description": "for reports"}
    assert (renamed.name, renamed.old, renamed.new) == ("db", {"name": "database"}, {"name": "db"})
    assert (deleted.kind, deleted.name, deleted.old["limit"], deleted.new) == ("deleted", "db", 5, None)


def test_an_event_says_whose_session_it_was_and_for_whom_that_acted(s: Session) -> None:
    s.run("set application_name = 'ops'")
    s.create("database", 3)
    s.run("set pglimits.by = 'Ann'")
    s.update("database", limit=4)
    own, acted = events(s)
    assert (own.by["application"], own.by["pid"]) == ("ops", s.pid)
    assert "for" not in own.by
    assert acted.by["for"] == "Ann"


def test_what_is_rolled_back_is_not_told(s: Session) -> None:
    s.run("begin")
    s.create("database", 3)
    s.run("rollback")
    assert events(s) == []


def test_a_holder_that_never_came_back_is_told_with_who_and_for_how_long(clock: Clock, s: Session) -> None:
    s.create("database", 3)
    clock.freeze()
    lost = s.acquire("database", slots=2, lease_duration=30, holder={"job": "nightly"})
    clock.advance(45)
    s.sweep()
    (expired,) = events(s, "expired")
    assert (expired.name, expired.key, expired.lease_id, expired.slots, expired.fence) == (
        "database", "", lost.lease_id, 2, lost.fence,
    )  # fmt: skip
    assert (expired.holder, expired.held_seconds) == ({"job": "nightly"}, 30)


def test_a_holder_that_comes_back_too_late_is_told_once_as_lost(clock: Clock, s: Session) -> None:
    s.create("database", 3)
    clock.freeze()
    first, second = (s.acquire("database", lease_duration=30).lease_id for _ in range(2))
    clock.advance(31)
    assert not s.renew(first)  # nobody has taken it out yet
    assert not s.renew(first)
    s.sweep()
    assert not s.renew(second)
    assert not s.renew(second)
    assert not s.renew(first)
    assert [event.lease_id for event in events(s, "lost")] == [first, second]
    assert sorted(event.lease_id for event in events(s, "expired")) == sorted([first, second])


def test_an_id_that_is_used_again_and_lost_again_is_told_again(clock: Clock, s: Session) -> None:
    s.create("database", 3)
    clock.freeze()
    fences = []
    for swept in (False, True, False, True):
        lease = s.acquire("database", lease_duration=30, lease_id="00000000-0000-0000-0000-000000000001")
        fences.append(lease.fence)
        clock.advance(31)
        if swept:
            s.sweep()
        for _ in range(2):
            assert not s.renew(lease.lease_id)
        s.sweep()
    assert [event.fence for event in events(s, "lost")] == fences


def test_renewing_what_was_never_there_or_was_released_is_no_event(s: Session) -> None:
    s.create("database", 3)
    lease = s.acquire("database").lease_id
    s.release(lease)
    assert not s.renew(lease)
    assert not s.renew("00000000-0000-0000-0000-000000000001")
    assert events(s, "lost") == []


def test_what_an_operator_ends_is_told_leases_and_places_in_line(s: Session) -> None:
    s.create("database", 1)
    s.create("api", 1)
    both = s.acquire(["database", "api"], holder={"job": 1}).lease_id
    waiter = s.queue("database", holder={"job": 2})
    assert s.value("select pglimits.force_release(%s)", waiter)
    assert s.value("select pglimits.force_release(%s)", both)
    told = [(event.name, event.lease_id, event.holder) for event in events(s, "force_released")]
    assert told == [("database", waiter, {"job": 2}), ("database", both, {"job": 1}), ("api", both, {"job": 1})]
    assert not s.renew(both)
    assert {event.lease_id for event in events(s, "lost")} == {both}


def test_a_forced_release_hands_the_slot_to_the_head_of_the_line(s: Session) -> None:
    s.create("database", 1)
    holder = s.acquire("database").lease_id
    waiter = s.queue("database")
    assert s.value("select pglimits.force_release(%s)", holder)
    assert s.watch_one(waiter).status == "granted"


def test_a_request_that_an_operator_takes_out_of_the_line_is_refused(clock: Clock, s: Session) -> None:
    s.create("database", 1)
    s.create("api", 1)
    clock.freeze()
    s.acquire("database")
    for names in ("database", ["database", "api"]):
        waiter = s.queue(names)
        assert s.value("select pglimits.force_release(%s)", waiter)
        assert s.acquire(names, timeout_seconds=60, lease_id=waiter).status == "refused"
        clock.advance(11)
        assert s.acquire(names, timeout_seconds=60, lease_id=waiter).status == "queued"
        s.release(waiter)
    s.sweep()


def test_a_forced_release_of_nothing_changes_nothing(s: Session) -> None:
    s.create("database", 1)
    with changes_nothing(s):
        assert not s.value("select pglimits.force_release('00000000-0000-0000-0000-000000000001')")


def test_a_reset_is_told_with_how_many_leases_it_ended(s: Session) -> None:
    s.create("database", 3)
    s.serves("database", 2, key="k")
    s.reset("database", "k")
    (reset,) = events(s, "reset")
    assert (reset.name, reset.key, reset.new) == ("database", "k", {"leases": 2})


def test_whoever_listens_hears_once_per_transaction_and_not_of_grants(db: Db, s: Session) -> None:
    listener = db.session().connection
    listener.execute("listen pglimits_events")
    s.run("begin")
    s.create("database", 3)
    s.create("api", 3)
    s.run("commit")
    s.release(s.acquire("database").lease_id)
    s.run("select pg_notify('pglimits_events', 'end')")
    heard = []
    for notice in listener.notifies(timeout=60):
        heard.append(notice.payload)
        if notice.payload == "end":
            break
    assert heard == ["", "end"]


@pytest.mark.parametrize(("keep", "left"), [(3600, 2), (0, 0)])
def test_the_sweep_forgets_what_is_older_than_it_is_told_to_keep(
    clock: Clock, s: Session, keep: int, left: int
) -> None:
    s.run("select pglimits.keep_history(%s)", keep)
    clock.freeze()
    s.create("old", 3)
    clock.advance(4000)
    s.create("database", 3)
    s.create("api", 3)
    clock.advance(10)
    s.sweep()
    assert len(events(s)) == left


def test_the_table_of_events_is_bounded_whatever_their_age(s: Session) -> None:
    s.create("database", 3)
    s.run(
        "insert into pglimits.event_log (at, kind, name)"
        " select pglimits._now(), 'updated', 'database' from generate_series(1, 100500)"
    )
    s.sweep()
    assert s.value("select count(*) from pglimits.events") == 100_000
    assert s.value("select min(event_id) from pglimits.events") == 502


def test_events_of_a_deleted_limit_stay(s: Session) -> None:
    s.create("database", 3)
    s.delete("database")
    s.sweep()
    assert [event.kind for event in events(s)] == ["created", "deleted"]
