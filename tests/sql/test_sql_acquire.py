"""acquire, renew, release, expiry: what a lease is and what happens to it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqltest import Clock, Db, Session, changes_nothing, fails, seconds

# Grants.


def test_a_grant_is_a_lease_with_an_id_a_fence_and_an_end(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.create("database", 3)
    answer = s.acquire("database", slots=2, holder={"host": "h", "pid": 7}, priority=4)
    assert (answer.status, answer.retry_after, answer.position) == ("granted", None, None)
    assert answer.expires_at - now == timedelta(minutes=5)
    (held,) = s.holders()
    assert held.lease_id == answer.lease_id
    assert held.fence == answer.fence
    assert (held.name, held.key, held.slots, held.priority) == ("database", "", 2, 4)
    assert held.holder == {"host": "h", "pid": 7}
    assert (held.acquired_at, held.expires_at) == (now, answer.expires_at)
    assert s.limit("database").held == 2


def test_the_caller_may_choose_the_id(s: Session) -> None:
    s.create("database", 1)
    lease_id = uuid4()
    assert s.acquire("database", lease_id=lease_id).lease_id == lease_id


def test_as_many_slots_as_the_limit_has_are_granted_and_not_one_more(db: Db, s: Session) -> None:
    s.create("database", 5)
    assert [s.acquire("database", slots=2).status for _ in range(3)] == ["granted", "granted", "refused"]
    assert s.acquire("database").status == "granted"
    answer = s.acquire("database")
    assert (answer.status, answer.lease_id, answer.fence, answer.expires_at) == ("refused", None, None, None)
    assert answer.retry_after is None, "only a release can tell"
    assert s.limit("database").held == 5
    db.consistent()


def test_each_key_has_the_whole_budget_for_itself(s: Session) -> None:
    s.create("database", 2)
    for key in ("", "a", "b", "a/b%&><", "ключ"):
        assert s.acquire("database", slots=2, key=key).status == "granted"
        assert s.acquire("database", key=key).status == "refused"
    assert s.limit("database").held == 10
    assert {held.key for held in s.holders()} == {"", "a", "b", "a/b%&><", "ключ"}


def test_the_lease_duration_is_from_one_second_up(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.create("database", 9)
    for duration, length in {"1 second": 1, "90 minutes": 5400, "366 days": 366 * 86400}.items():
        answer = s.acquire("database", lease_duration=duration)
        assert seconds(answer.expires_at - now) == length


def test_fences_grow_with_every_grant_of_a_limit_and_key(clock: Clock, s: Session) -> None:
    s.create("database", 2)
    fences = []
    for round_ in range(6):
        answer = s.acquire("database", lease_duration="1 second")
        fences.append(answer.fence)
        if round_ % 2:
            s.renew(answer.lease_id)
            s.release(answer.lease_id)
        else:
            clock.advance(2)
    assert fences == sorted(set(fences))


# Once.


def test_acquire_repeated_with_its_id_acts_once_and_answers_the_same(db: Db, clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 2)
    lease_id = uuid4()
    first = s.acquire("database", lease_id=lease_id)
    with changes_nothing(db.session()):
        assert s.acquire("database", lease_id=lease_id) == first
        assert s.acquire("database", lease_id=lease_id, wait=None) == first
    assert s.limit("database").held == 1
    s.acquire("database")
    assert s.acquire("database", lease_id=lease_id) == first, "also when the limit is full by now"


def test_acquire_over_several_repeated_with_its_id_acts_once(db: Db, clock: Clock, s: Session) -> None:
    clock.freeze()
    for name in ("one", "two"):
        s.create(name, 1)
    s.acquire("one")
    s.release(s.holders()[0].lease_id)
    lease_id = uuid4()
    first = s.acquire(["two", "one"], lease_id=lease_id)
    with changes_nothing(db.session()):
        assert s.acquire(["two", "one"], lease_id=lease_id) == first


def test_a_repeated_acquire_gets_its_lease_also_when_its_limits_could_not_grant_it_any_more(
    db: Db, clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("one", 2)
    s.create("two", 2)
    one, both = uuid4(), uuid4()
    first = s.acquire("one", slots=2, lease_id=one)
    s.update("one", limit=1)
    with changes_nothing(db.session()):
        assert s.acquire("one", slots=2, lease_id=one) == first
        assert s.acquire("one", slots=2, lease_id=one, wait=None) == first
    with fails("PL004"):
        s.acquire("one", slots=2, lease_id=uuid4())
    s.update("one", limit=4)
    fences = s.acquire(["one", "two"], slots=[2, 2], lease_id=both, strict=True).fences
    s.delete("one")
    assert s.acquire(["one", "two"], slots=[2, 2], lease_id=both, strict=True).fences == [None, fences[1]]
    with fails("PL002"):
        s.acquire(["one", "two"], slots=[2, 2], lease_id=uuid4(), strict=True)
    clock.advance(301)
    with fails("PL002"):
        s.acquire(["one", "two"], slots=[2, 2], lease_id=both, strict=True)
    db.consistent()


def test_a_repeated_rate_limit_has_had_its_turn_also_when_its_limit_could_not_give_it_any_more(
    clock: Clock, s: Session
) -> None:
    clock.freeze()
    s.create("api", 2, 1)
    lease_id = uuid4()
    assert seconds(s.rate_limit("api", slots=2, lease_id=lease_id).wait) == 0
    s.update("api", limit=1)
    again = s.rate_limit("api", slots=2, lease_id=lease_id)
    assert (again.status, seconds(again.wait)) == ("granted", 0)
    with fails("PL004"):
        s.rate_limit("api", slots=2, lease_id=uuid4())


@pytest.mark.parametrize("rate", [0, 1])
def test_rate_limit_with_the_id_of_a_lease_is_an_error_and_takes_nothing(db: Db, s: Session, rate: float) -> None:
    s.create("it", 2, rate)
    lease_id = s.acquire("it").lease_id
    request = {"names": ["it"], "lease_id": str(lease_id), "for_rate": True}
    with changes_nothing(db.session()):
        with fails("PL001"):
            s.rate_limit("it", lease_id=lease_id)
        asked = "select error from pglimits.acquire_many(%s::jsonb)"
        assert s.value(asked, json.dumps([request])) == "InvalidArgument"
    assert s.renew(lease_id)


def test_a_waiter_that_asks_again_and_can_never_be_granted_gets_the_error(db: Db, clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("one", 1)
    s.create("two", 1)
    s.acquire("one")
    lease_id = uuid4()
    assert s.acquire(["one", "two"], lease_id=lease_id, wait=None, strict=True).status == "queued"
    s.delete("two")
    with fails("PL002"):
        s.acquire(["one", "two"], lease_id=lease_id, wait=None, strict=True)
    request = {"names": ["one", "two"], "lease_id": str(lease_id), "wait": None, "strict": True}
    assert s.value("select error from pglimits.acquire_many(%s::jsonb)", json.dumps([request])) == "LimitNotFound"
    assert s.release(lease_id), "an error changes nothing"
    assert s.waiters() == []
    db.consistent()


def test_an_id_whose_lease_has_ended_is_granted_anew(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 2)
    lease_id = uuid4()
    first = s.acquire("database", lease_id=lease_id)
    s.release(lease_id)
    second = s.acquire("database", lease_id=lease_id, lease_duration="1 second")
    clock.advance(2)
    third = s.acquire("database", lease_id=lease_id)
    assert first.fence < second.fence < third.fence
    assert s.limit("database").held == 1
    db.consistent()


def test_an_id_that_holds_something_else_is_not_granted_without_taking_anything(s: Session) -> None:
    s.create("one", 1)
    s.create("two", 1)
    lease_id = s.acquire("one").lease_id
    with fails("PL001", "lease_id"):
        s.acquire("two", lease_id=lease_id)


def test_release_acts_once(db: Db, s: Session) -> None:
    s.create("database", 2)
    first, second = s.serves("database", 2)
    assert s.release(first.lease_id) is True
    assert s.release(first.lease_id) is False
    assert s.limit("database").held == 1
    assert s.release(second.lease_id) is True
    assert s.release(uuid4()) is False
    db.consistent()


def test_renew_repeated_moves_the_end_once(db: Db, clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.create("database", 1)
    lease_id = s.acquire("database").lease_id
    for _ in range(3):
        assert s.renew(lease_id, "10 minutes")
    assert s.holders()[0].expires_at - now == timedelta(minutes=10)
    assert s.limit("database").held == 1
    db.consistent()


# Several limits.


def test_several_limits_are_taken_all_together(db: Db, s: Session) -> None:
    for name, limit in {"one": 1, "two": 5, "three": 9}.items():
        s.create(name, limit)
    answer = s.acquire(["two", "three", "one"], slots=[4, 7, 1])
    assert answer.status == "granted"
    assert {(held.name, held.slots, held.lease_id) for held in s.holders()} == {
        ("one", 1, answer.lease_id),
        ("two", 4, answer.lease_id),
        ("three", 7, answer.lease_id),
    }
    by_name = {held.name: held.fence for held in s.holders()}
    assert answer.fences == [by_name["two"], by_name["three"], by_name["one"]], "in the order of the names"
    assert s.release(answer.lease_id)
    assert s.holders() == []
    db.consistent()


def test_several_limits_all_or_none(db: Db, s: Session) -> None:
    for name in ("one", "two", "three"):
        s.create(name, 1)
    s.acquire("two")
    with changes_nothing(db.session()):
        answer = s.acquire(["one", "two", "three"])
        assert (answer.status, answer.fences) == ("refused", None)
    assert s.limit("one").held == s.limit("three").held == 0


def test_one_number_of_slots_and_one_key_count_for_all_names(s: Session) -> None:
    s.create("one", 5)
    s.create("two", 5)
    s.acquire(["one", "two"], slots=[3], keys=["k"])
    assert {(held.name, held.key, held.slots) for held in s.holders()} == {("one", "k", 3), ("two", "k", 3)}


def test_slots_and_keys_may_be_given_for_each_name(s: Session) -> None:
    s.create("tenant", 5)
    s.create("everyone", 5)
    s.acquire(["tenant", "everyone"], slots=[1, 2], keys=["t42", ""])
    assert {(held.name, held.key, held.slots) for held in s.holders()} == {("tenant", "t42", 1), ("everyone", "", 2)}


def test_a_limit_named_twice_adds_up(s: Session) -> None:
    s.create("database", 5)
    answer = s.acquire(["database", "database"], slots=[2, 3])
    assert s.limit("database").held == 5
    (held,) = s.holders()
    assert answer.fences == [held.fence, held.fence]
    with fails("PL004", "slots", "database", "6"):
        s.acquire(["database", "database"], slots=[3])


def test_a_limit_named_with_two_keys_takes_of_both(s: Session) -> None:
    s.create("database", 1)
    answer = s.acquire(["database", "database"], keys=["b", "a"])
    assert {(held.key, held.slots) for held in s.holders()} == {("a", 1), ("b", 1)}
    by_key = {held.key: held.fence for held in s.holders()}
    assert answer.fences == [by_key["b"], by_key["a"]]


def test_a_hundred_limits_at_once(db: Db, s: Session) -> None:
    names = [s.create(f"limit {number}", 1) for number in range(100)]
    answer = s.acquire(names)
    assert (answer.status, len(answer.fences)) == ("granted", 100)
    assert s.release(answer.lease_id)
    db.consistent()


# Missing and inactive.


def test_a_missing_limit_is_not_enforced_with_one_warning_that_names_it(db: Db, s: Session) -> None:
    with changes_nothing(db.session()):
        answer = s.acquire("nowhere")
    assert (answer.status, answer.lease_id, answer.fence, answer.expires_at) == ("unlimited", None, None, None)
    assert len(s.notices) == 1
    assert "nowhere" in s.notices[0]


def test_among_several_only_the_missing_are_not_enforced_with_one_warning(s: Session) -> None:
    s.create("database", 1)
    answer = s.acquire(["nowhere", "database", "elsewhere", "nowhere"])
    assert answer.status == "granted"
    assert [fence is None for fence in answer.fences] == [True, False, True, True]
    assert len(s.notices) == 1
    assert s.notices[0].count("nowhere") == 1
    assert "elsewhere" in s.notices[0]
    assert "database" not in s.notices[0]
    assert s.acquire(["nowhere", "database"]).status == "refused"


def test_strict_names_every_missing_limit_and_takes_nothing(db: Db, s: Session) -> None:
    s.create("database", 1)
    with changes_nothing(db.session()):
        with fails("PL002", "'nowhere'", "'elsewhere'"):
            s.acquire(["nowhere", "database", "elsewhere"], strict=True)
        with fails("PL002", "'nowhere'"):
            s.acquire("nowhere", strict=True, wait=None)
    assert s.notices == []


def test_an_inactive_limit_is_not_enforced_records_nothing_and_satisfies_strict(db: Db, s: Session) -> None:
    s.create("off", 1, active=False)
    with changes_nothing(db.session()):
        for _ in range(3):
            answer = s.acquire("off", strict=True, slots=7)
            assert (answer.status, answer.lease_id) == ("unlimited", None)
        assert s.acquire(["off", "off"], strict=True, lease_id=uuid4()).status == "unlimited"
    assert s.notices == []


def test_a_lease_taken_while_inactive_frees_nothing_later(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.serves("database", 1)
    s.update("database", active=False)
    lease_id = uuid4()
    assert s.acquire("database", lease_id=lease_id).status == "unlimited"
    s.update("database", active=True)
    assert s.release(lease_id) is False
    assert s.acquire("database").status == "refused"
    db.consistent()


def test_leases_taken_before_a_limit_was_deactivated_keep_counting_until_they_end(
    clock: Clock, db: Db, s: Session
) -> None:
    s.create("database", 2)
    first = s.acquire("database").lease_id
    s.acquire("database", lease_duration="30 seconds")
    s.update("database", active=False)
    assert s.limit("database").held == 2
    assert s.acquire("database").status == "unlimited"
    s.update("database", active=True)
    assert s.acquire("database").status == "refused"
    s.update("database", active=False)
    assert s.release(first) is True
    clock.advance(31)
    assert s.limit("database").held == 0
    s.update("database", active=True)
    s.serves("database", 2)
    assert s.acquire("database").status == "refused"
    db.consistent()


# What can never be.


@pytest.mark.parametrize("wait", ["0", "1 hour", None])
def test_more_slots_than_the_limit_is_an_error_at_once_never_a_wait(db: Db, s: Session, wait: str | None) -> None:
    s.create("database", 2)
    s.create("other", 9)
    with changes_nothing(db.session()):
        with fails("PL004", "slots", "database", "2", "3"):
            s.acquire("database", slots=3, wait=wait)
        with fails("PL004", "slots", "database"):
            s.acquire(["other", "database"], slots=[3], wait=wait)


def test_limit_zero_refuses_and_queues_but_is_no_error(s: Session) -> None:
    s.create("shut", 0)
    answer = s.acquire("shut")
    assert (answer.status, answer.retry_after) == ("refused", None)
    assert s.acquire("shut", slots=5).status == "refused"
    waiter = s.queue("shut")
    assert s.watch_one(waiter).status == "queued"
    s.update("shut", limit=1)
    assert s.watch_one(waiter).status == "granted"


# Release.


def test_release_of_many_says_of_each_whether_it_was_live(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 9)
    live = s.acquire("database").lease_id
    ended = s.acquire("database", lease_duration="1 second").lease_id
    clock.advance(2)
    unknown = uuid4()
    rows = s.all("select * from pglimits.release(%s::uuid[])", [str(live), str(ended), str(unknown), str(live)])
    assert {row.lease_id: row.released for row in rows} == {live: True, ended: False, unknown: False}
    assert len(rows) == 3
    assert s.limit("database").held == 0
    db.consistent()


def test_release_of_many_tells_those_that_had_ended_beside_a_lease_on_several_limits(s: Session) -> None:
    s.create("a", 1)
    s.create("b", 1)
    lease_id, ended = s.acquire(["a", "b"]).lease_id, uuid4()
    assert s.value("select pglimits.release_many(%s)", [lease_id, ended]) == [ended]


def test_release_of_none_is_nothing(s: Session) -> None:
    assert s.all("select * from pglimits.release('{}'::uuid[])") == []
    assert s.all("select * from pglimits.renew('{}'::uuid[])") == []


@pytest.mark.parametrize("literal", ["'{}'", "'{{{}}}'"])
def test_release_and_renew_take_strings_without_a_type(s: Session, literal: str) -> None:
    s.create("database", 1)
    lease_id = str(s.acquire("database").lease_id)
    text = literal.format(lease_id)
    assert s.value(f"select pglimits.renew({text})") is True
    assert s.value(f"select pglimits.renew({text}, '10 minutes')") is True
    assert s.value(f"select pglimits.release({text})") is True


def test_release_of_an_expired_lease_is_false_and_frees_its_slots(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 1)
    lease_id = s.acquire("database").lease_id
    clock.advance(301)
    assert s.release(lease_id) is False
    assert s.limit("database").held == 0
    db.consistent()


# Renewing.


def test_renew_moves_the_end_from_now_by_the_duration_it_was_taken_with(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.create("database", 1)
    lease_id = s.acquire("database", lease_duration="30 seconds").lease_id
    clock.advance(20)
    assert s.renew(lease_id)
    assert seconds(s.holders()[0].expires_at - now) == 50
    (row,) = s.all("select * from pglimits.renew(%s::uuid[], '1 minute')", [str(lease_id)])
    assert (row.lease_id, row.renewed, seconds(row.expires_at - now)) == (lease_id, True, 80)
    clock.advance(10)
    assert s.renew(lease_id)
    assert seconds(s.holders()[0].expires_at - now) == 90, "by the new duration from then on"


def test_renew_never_moves_the_end_nearer(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 1)
    answer = s.acquire("database", lease_duration="1 hour")
    assert s.renew(answer.lease_id, "1 second")
    assert s.holders()[0].expires_at == answer.expires_at


def test_a_renewed_lease_is_live_past_its_first_end(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 1)
    lease_id = s.acquire("database", lease_duration="10 seconds").lease_id
    for _ in range(5):
        clock.advance(9)
        assert s.renew(lease_id)
        assert s.acquire("database").status == "refused"
        assert s.limit("database").held == 1
    clock.advance(11)
    assert not s.renew(lease_id)
    assert s.acquire("database").status == "granted"
    db.consistent()


def test_a_lease_that_has_ended_cannot_be_renewed(clock: Clock, s: Session) -> None:
    s.create("database", 1)
    lease_id = s.acquire("database", lease_duration="10 seconds").lease_id
    clock.advance(10)
    assert not s.renew(lease_id), "at its very end, even if nobody has taken its slot"
    assert not s.renew(uuid4())
    assert s.limit("database").held == 0


def test_renew_of_many_says_of_each(clock: Clock, s: Session) -> None:
    s.create("database", 9)
    live = s.acquire("database").lease_id
    ended = s.acquire("database", lease_duration="1 second").lease_id
    clock.advance(2)
    rows = s.all("select * from pglimits.renew(%s::uuid[])", [str(live), str(ended)])
    by_id = {row.lease_id: row for row in rows}
    assert (by_id[live].renewed, by_id[ended].renewed) == (True, False)
    assert by_id[ended].expires_at is None


def test_a_lease_over_several_limits_is_lost_when_it_is_lost_on_one(clock: Clock, s: Session) -> None:
    s.create("one", 1)
    s.create("two", 1)
    lease_id = s.acquire(["one", "two"]).lease_id
    assert s.renew(lease_id)
    s.reset("one")
    s.acquire("one")
    assert not s.renew(lease_id), "somebody else has its slot of 'one'"


def test_a_lease_over_several_limits_that_ended_is_lost_on_all(clock: Clock, s: Session) -> None:
    s.create("one", 1)
    s.create("two", 1)
    lease_id = s.acquire(["one", "two"], lease_duration="10 seconds").lease_id
    clock.advance(11)
    assert s.acquire("one").status == "granted"
    assert not s.renew(lease_id)
    assert s.acquire("two").status == "granted"


# Expiry.


def test_an_ended_leases_slots_are_granted_with_no_sweep(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 3)
    s.acquire("database", slots=2, lease_duration="10 seconds")
    s.acquire("database", lease_duration="1 hour")
    clock.advance(9.9)
    assert s.acquire("database").status == "refused"
    clock.advance(0.1)
    assert s.peek("database", slots=2).status == "granted"
    assert s.acquire("database", slots=2).status == "granted"
    assert len(s.holders()) == 2
    db.consistent()


def test_views_show_ended_leases_no_more_whatever_has_been_taken_out_yet(clock: Clock, s: Session) -> None:
    s.create("database", 5)
    s.acquire("database", slots=2, lease_duration="10 seconds")
    s.acquire("database", slots=1, lease_duration="20 seconds")
    s.acquire("database", slots=2, lease_duration="20 seconds", key="other")
    clock.advance(15)
    assert s.limit("database").held == 3
    assert [held.slots for held in s.holders()] == [1, 2] or [held.slots for held in s.holders()] == [2, 1]
    assert s.value("select sum(held) from pglimits.states") == 5
    clock.advance(5)
    assert s.limit("database").held == 0
    assert s.holders() == []


def test_occupancy_and_lease_move_in_one_transaction(db: Db, s: Session) -> None:
    s.create("database", 1)
    other = db.session()
    other.run("begin")
    other.acquire("database")
    assert (s.limit("database").held, s.holders()) == (0, [])
    other.run("commit")
    assert (s.limit("database").held, len(s.holders())) == (1, 1)


# What sessions are set to.


@pytest.mark.parametrize("intervalstyle", ["sql_standard", "iso_8601", "postgres_verbose"])
@pytest.mark.parametrize("timezone", ["America/New_York", "Asia/Kathmandu"])
def test_settings_of_the_session_change_nothing(
    clock: Clock, db: Db, s: Session, timezone: str, intervalstyle: str
) -> None:
    now = clock.freeze()
    s.create("database", 1)
    s.create("api", 1, 0.5)
    s.run(f"set timezone = '{timezone}'")
    s.run(f"set intervalstyle = '{intervalstyle}'")
    s.run("set extra_float_digits = -15")
    s.run("set search_path = pg_temp")
    for style in ("SQL, DMY", "German", "Postgres, MDY"):
        s.run(f"set datestyle = '{style}'")
        ask = "select status, extract(epoch from expires_at), lease_id from pglimits.acquire('database')"
        status, ends, lease_id = s.one(ask)
        assert (status, float(ends)) == ("granted", pytest.approx(now.timestamp() + 300, abs=1e-3))
        assert s.value("select pglimits.renew(%s, make_interval(secs => 301))", lease_id) is True
        ends = s.value("select extract(epoch from min(expires_at)) from pglimits.holders")
        assert float(ends) == pytest.approx(now.timestamp() + 301, abs=1e-3)
        assert s.release(lease_id)
    many = '[{"names": ["api"], "for_rate": true, "wait": 9.5}, {"names": ["api"], "for_rate": true, "wait": "9.5 s"}]'
    waits = s.all(
        "select ordinal, extract(epoch from wait) from pglimits.acquire_many(%s::jsonb) order by ordinal", many
    )
    assert [row[1] for row in waits] == [0, 2]


@pytest.mark.parametrize("timezone", ["UTC", "America/New_York"])
def test_a_day_has_24_hours_whatever_the_timezone_of_the_session(clock: Clock, s: Session, timezone: str) -> None:
    now = clock.freeze(datetime(2025, 3, 8, 17, tzinfo=UTC))  # clocks change there in the night
    s.create("database", 1)
    s.run(f"set timezone = '{timezone}'")
    answer = s.acquire("database", lease_duration="1 day")
    assert seconds(answer.expires_at - now) == 86400
    assert s.renew(answer.lease_id, "2 days")
    assert seconds(s.holders()[0].expires_at - now) == 2 * 86400


def test_held_is_right_however_many_keys_are_full(s: Session) -> None:
    s.create("huge", 2_147_483_647)
    for key in "ab":
        assert s.acquire("huge", slots=2_147_483_647, key=key).status == "granted"
    assert s.limit("huge").held == 2 * 2_147_483_647


@pytest.mark.parametrize("queued", [False, True])
def test_an_id_that_is_in_use_for_another_request_is_an_error_and_changes_nothing(
    db: Db, s: Session, queued: bool
) -> None:
    s.create("a", 2)
    s.create("b", 2)
    if queued:
        s.acquire("a", slots=2)
    lease_id = s.acquire("a", wait=None, lease_id=uuid4()).lease_id
    for other in ({"names": "b"}, {"names": "a", "slots": 2}, {"names": "a", "key": "k"}, {"names": ["a", "b"]}):
        if queued and isinstance(other["names"], list):
            continue  # it waits on a, and may be asking for more than it did
        with changes_nothing(db.session()), fails("PL001", "lease_id", str(lease_id)):
            s.acquire(**other, lease_id=lease_id, wait=None)
    assert s.acquire("a", lease_id=lease_id, wait=None).lease_id == lease_id


def test_a_limit_that_was_not_enforced_the_first_time_does_not_spoil_a_repetition(s: Session) -> None:
    s.create("a", 2)
    s.create("b", 2, active=False)
    lease_id = s.acquire(["a", "b"]).lease_id
    s.update("b", active=True)
    answer = s.acquire(["a", "b"], lease_id=lease_id)
    assert (answer.status, answer.fences[1]) == ("granted", None)


def test_a_limit_that_was_not_enforced_when_the_waiter_came_is_when_it_is_granted(s: Session) -> None:
    s.create("a", 1)
    s.create("b", 1, active=False)
    first = s.acquire("a").lease_id
    waiter = s.queue(["a", "b"])
    s.update("b", active=True)
    s.release(first)
    assert s.watch_one(waiter).status == "retry"
    for _ in range(2):
        answer = s.acquire(["a", "b"], lease_id=waiter, wait=None)
        assert (answer.status, len(answer.fences)) == ("granted", 2)
        assert None not in answer.fences
    assert [row.lease_id for row in s.holders()] == [waiter] * 2


def test_a_repetition_finds_its_lease_though_the_limit_was_deactivated_or_renamed_meanwhile(s: Session) -> None:
    s.create("a", 1)
    granted = s.acquire("a", lease_id=uuid4())
    s.update("a", active=False)
    assert s.acquire("a", lease_id=granted.lease_id).expires_at == granted.expires_at
    s.update("a", active=True)
    s.update("a", new_name="b")
    again = s.acquire("a", lease_id=granted.lease_id)
    assert (again.status, again.fence) == ("granted", granted.fence)
    assert s.acquire("a").status == "unlimited"


# Early lock release.


def test_flush_puts_on_disk_what_was_committed_without_waiting_for_it(s: Session) -> None:
    s.create("database", 1)
    s.run("set synchronous_commit = off")
    s.acquire("database")
    written = s.value("select pg_current_wal_insert_lsn()")
    s.run("select pglimits.flush()")
    assert s.value("select pg_current_wal_flush_lsn() >= %s::pg_lsn", written)
    assert s.value("show synchronous_commit") == "off"


def test_the_procedures_for_hot_limits_answer_as_the_functions_do(s: Session) -> None:
    s.create("database", 1)
    taken = s.one("call pglimits.acquire_hot('database', holder => '7')")
    (holder,) = s.all("select * from pglimits.holders")
    assert (taken.status, taken.granted_lease_id) == ("granted", holder.lease_id)
    assert (taken.fence, taken.expires_at, holder.holder) == (holder.fence, holder.expires_at, 7)
    assert s.one("call pglimits.acquire_hot('database')").status == "refused"
    assert s.one("call pglimits.release_hot(%s::uuid)", taken.granted_lease_id).released is True
    assert s.one("call pglimits.release_hot(%s::uuid)", taken.granted_lease_id).released is False
    assert s.value("show synchronous_commit") == "on"
    with fails("PL002", "nowhere"):
        s.run("call pglimits.acquire_hot('nowhere', strict => true)")
    with fails("PL001", "slots"):
        s.run("call pglimits.acquire_hot('database', slots => 0)")


def test_a_hot_limit_is_unlocked_before_the_answer_is_on_disk(db: Db, s: Session) -> None:
    s.create("database", 1)
    s.run(
        "create or replace function pglimits.flush() returns void language plpgsql"
        " as $$ begin raise 'on its way'; end $$"
    )
    session = db.session()
    with fails("P0001", "on its way"):
        session.run("call pglimits.acquire_hot('database')")
    (holder,) = s.all("select * from pglimits.holders")
    with fails("P0001", "on its way"):
        session.run("call pglimits.release_hot(%s::uuid)", holder.lease_id)
    assert s.limit("database").held == 0


@pytest.mark.parametrize("call", ["acquire_hot('database')", "release_hot('{lease_id}')"])
def test_the_procedures_for_hot_limits_fail_inside_a_transaction_and_change_nothing(s: Session, call: str) -> None:
    s.create("database", 2)
    lease_id = s.acquire("database").lease_id
    s.run("begin")
    with fails("2D000"):
        s.run(f"call pglimits.{call.format(lease_id=lease_id)}")
    s.run("rollback")
    assert s.limit("database").held == 1
