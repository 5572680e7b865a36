"""acquire, renew, release, expiry: what a lease is and what happens to it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails


def lasts(s: Session, lease_id: UUID, clock: Clock) -> float:
    """Seconds from now until the lease ends."""
    ends = s.value("select min(expires_at) from pglimits.holders where lease_id = %s", lease_id)
    return float((ends - clock.now()).total_seconds())


def renew_all(s: Session, *lease_ids: UUID) -> dict[UUID, Any]:
    return {row.lease_id: row for row in s.all("select * from pglimits.renew_all(%s::uuid[])", list(lease_ids))}


# Grants.


def test_a_grant_is_a_lease_with_an_id_a_fence_and_an_end(clock: Clock, s: Session) -> None:
    now = clock.freeze()
    s.create("database", 3)
    answer = s.acquire("database", slots=2, holder={"host": "h", "pid": 7}, priority=4)
    assert (answer.status, answer.retry_after, answer.position) == ("granted", None, None)
    assert answer.expires_at - now == timedelta(minutes=5)
    (held,) = s.holders()
    assert (held.lease_id, held.fence) == (answer.lease_id, answer.fence)
    assert (held.name, held.key, held.slots, held.priority) == ("database", "", 2, 4)
    assert held.holder == {"host": "h", "pid": 7}
    assert (held.acquired_at, held.expires_at) == (now, answer.expires_at)
    assert s.limit("database").held == 2
    lease_id = uuid4()
    assert s.acquire("database", lease_id=lease_id).lease_id == lease_id, "the caller may choose the id"


def test_where_no_holder_is_given_it_is_the_session(s: Session) -> None:
    s.create("database", 1)
    s.create("other", 1)
    s.run("set application_name = 'a job'")
    s.acquire("database")
    s.acquire(["database", "other"], keys=["k"])
    s.queue("database")
    me = {"application": "a job", "user": s.value("select session_user"), "address": None, "pid": s.pid}
    assert [row.holder for row in s.holders() + s.waiters()] == [me] * 4


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
    most = 2_147_483_647
    s.create("database", most)
    for key in ("", "a", "b", "a/b%&><", "ключ"):
        assert s.acquire("database", slots=most, key=key).status == "granted"
        assert s.acquire("database", key=key).status == "refused"
    assert s.limit("database").held == 5 * most
    assert {held.key for held in s.holders()} == {"", "a", "b", "a/b%&><", "ключ"}


def test_fences_grow_with_every_grant_of_a_limit_and_key(clock: Clock, s: Session) -> None:
    s.create("database", 2)
    fences = []
    for round_ in range(6):
        answer = s.acquire("database", lease_duration=1)
        fences.append(answer.fence)
        if round_ % 2:
            s.renew(answer.lease_id)
            s.release(answer.lease_id)
        else:
            clock.advance(2)
    assert fences == sorted(set(fences))


def test_occupancy_and_lease_move_in_one_transaction(db: Db, s: Session) -> None:
    s.create("database", 1)
    other = db.session()
    with other.transaction():
        other.acquire("database")
        assert (s.limit("database").held, s.holders()) == (0, [])
    assert (s.limit("database").held, len(s.holders())) == (1, 1)
    other.run("begin")
    assert other.release(s.holders()[0].lease_id)
    other.run("rollback")
    assert (s.limit("database").held, len(s.holders())) == (1, 1)


# Once.


@pytest.mark.parametrize("names", ["one", ["two", "one"]], ids=["one limit", "several"])
def test_acquire_repeated_with_its_id_acts_once_and_answers_the_same(
    clock: Clock, db: Db, s: Session, names: str | list[str]
) -> None:
    clock.freeze()
    for name in ("one", "two"):
        s.create(name, 1)
    lease_id = uuid4()
    first = s.acquire(names, lease_id=lease_id)
    with changes_nothing(db.session()):
        assert s.acquire(names, lease_id=lease_id) == first, "also as the limit is full by now"
        assert s.acquire(names, lease_id=lease_id, timeout_seconds=None) == first
    assert s.limit("one").held == 1


def test_a_repeated_acquire_gets_its_lease_also_when_its_limits_could_not_grant_it_any_more(
    clock: Clock, db: Db, s: Session
) -> None:
    clock.freeze()
    s.create("one", 2)
    s.create("two", 2)
    both: dict[str, Any] = {"names": ["one", "two"], "slots": [2, 2], "strict": True, "lease_id": uuid4()}
    first = s.acquire("one", slots=2, lease_id=uuid4())
    s.update("one", limit=1)
    with changes_nothing(db.session()):
        for timeout in (0, None):
            assert s.acquire("one", slots=2, lease_id=first.lease_id, timeout_seconds=timeout) == first
    with fails("PL004"):
        s.acquire("one", slots=2, lease_id=uuid4())
    s.update("one", limit=1, active=False)
    assert s.acquire("one", slots=2, lease_id=first.lease_id) == first
    s.update("one", limit=4, active=True)
    fences = s.acquire(**both).fences
    s.delete("one")
    assert s.acquire(**both).fences == [None, fences[1]]
    with fails("PL002"):
        s.acquire(**{**both, "lease_id": uuid4()})
    clock.advance(301)
    with fails("PL002"):
        s.acquire(**both)
    db.consistent()


def test_a_repetition_finds_its_lease_though_the_limit_was_renamed_meanwhile(s: Session) -> None:
    s.create("a", 1)
    granted = s.acquire("a", lease_id=uuid4())
    s.update("a", new_name="b")
    again = s.acquire("a", lease_id=granted.lease_id)
    assert (again.status, again.fence) == ("granted", granted.fence)
    assert s.acquire("a").status == "unlimited"


def test_a_limit_that_was_not_enforced_the_first_time_does_not_spoil_a_repetition(s: Session) -> None:
    s.create("a", 2)
    s.create("b", 2, active=False)
    lease_id = s.acquire(["a", "b"]).lease_id
    s.update("b", active=True)
    answer = s.acquire(["a", "b"], lease_id=lease_id)
    assert (answer.status, answer.fences[1]) == ("granted", None)


def test_an_id_whose_lease_has_ended_is_granted_anew(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 2)
    lease_id = uuid4()
    first = s.acquire("database", lease_id=lease_id)
    s.release(lease_id)
    second = s.acquire("database", lease_id=lease_id, lease_duration=1)
    clock.advance(2)
    third = s.acquire("database", lease_id=lease_id)
    assert first.fence < second.fence < third.fence
    assert s.limit("database").held == 1
    db.consistent()


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("rate", [0, 1])
def test_an_id_that_is_in_use_for_another_request_is_an_error_and_changes_nothing(
    db: Db, s: Session, queued: bool, rate: float
) -> None:
    for name in ("a", "b"):
        s.create(name, 2, rate)
    if queued:
        s.acquire("a", slots=2)
    lease_id = s.acquire("a", timeout_seconds=None, lease_id=uuid4()).lease_id
    for other in ({"names": "b"}, {"names": "a", "slots": 2}, {"names": "a", "key": "k"}):
        with changes_nothing(db.session()), fails("PL001", "lease_id", str(lease_id)):
            s.acquire(**other, lease_id=lease_id, timeout_seconds=None)
    with changes_nothing(db.session()), fails("PL001", "lease_id", str(lease_id)):
        s.rate_limit("a", lease_id=lease_id, timeout_seconds=None)
    assert s.acquire("a", lease_id=lease_id, timeout_seconds=None).lease_id == lease_id


# Several limits.


def test_several_limits_are_taken_all_together_with_a_fence_for_each_in_the_order_of_the_names(
    db: Db, s: Session
) -> None:
    for name, limit in {"one": 1, "two": 5, "three": 9}.items():
        s.create(name, limit)
    answer = s.acquire(["two", "three", "one"], slots=[4, 7, 1])
    assert answer.status == "granted"
    held = {row.name: row for row in s.holders()}
    assert {name: (row.slots, row.lease_id) for name, row in held.items()} == {
        "one": (1, answer.lease_id), "two": (4, answer.lease_id), "three": (7, answer.lease_id)
    }  # fmt: skip
    assert answer.fences == [held[name].fence for name in ("two", "three", "one")]
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


def test_slots_and_keys_are_given_once_for_all_names_or_once_for_each(s: Session) -> None:
    s.create("tenant", 5)
    s.create("everyone", 5)
    s.acquire(["tenant", "everyone"], slots=[3], keys=["k"])
    s.acquire(["tenant", "everyone"], slots=[1, 2], keys=["t42", ""])
    assert {(held.name, held.key, held.slots) for held in s.holders()} == {
        ("tenant", "k", 3), ("everyone", "k", 3), ("tenant", "t42", 1), ("everyone", "", 2)
    }  # fmt: skip


def test_a_limit_named_twice_adds_up_and_with_two_keys_takes_of_both(s: Session) -> None:
    s.create("database", 5)
    answer = s.acquire(["database", "database"], slots=[2, 3])
    (held,) = s.holders()
    assert (held.slots, answer.fences) == (5, [held.fence] * 2)
    with fails("PL004", "slots", "database", "6"):
        s.acquire(["database", "database"], slots=[3])
    answer = s.acquire(["database", "database"], keys=["b", "a"])
    fences = {held.key: held.fence for held in s.holders()}
    assert answer.fences == [fences["b"], fences["a"]]


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
    (notice,) = s.notices
    assert "nowhere" in notice


def test_among_several_only_the_missing_are_not_enforced_with_one_warning(s: Session) -> None:
    s.create("database", 1)
    answer = s.acquire(["nowhere", "database", "elsewhere", "nowhere"])
    assert answer.status == "granted"
    assert [fence is None for fence in answer.fences] == [True, False, True, True]
    (notice,) = s.notices
    assert (notice.count("nowhere"), notice.count("elsewhere"), notice.count("database")) == (1, 1, 0)
    assert s.acquire(["nowhere", "database"]).status == "refused"


def test_strict_names_every_missing_limit_and_takes_nothing(db: Db, s: Session) -> None:
    s.create("database", 1)
    with changes_nothing(db.session()):
        with fails("PL002", "'nowhere'", "'elsewhere'"):
            s.acquire(["nowhere", "database", "elsewhere"], strict=True)
        with fails("PL002", "'nowhere'"):
            s.acquire("nowhere", strict=True, timeout_seconds=None)
    assert s.notices == []


@pytest.mark.parametrize("name", ["{a,b}", "a,b", "{a}", "{}", "{NULL}"])
def test_a_name_that_a_driver_may_have_made_of_a_list_is_an_error_unless_there_is_such_a_limit(
    db: Db, s: Session, name: str
) -> None:
    for each in ("a", "b"):
        s.create(each, 1, 1)
    with changes_nothing(db.session()):
        for function in ("acquire", "rate_limit", "peek"):
            with fails("PL001", name, f"{function}_all"):
                s.call(function, name)
            with fails("PL001", name, f"{function}_all"):
                s.call(function, [name])
    s.create(name, 1)
    assert s.acquire(name).status == "granted"
    assert s.acquire(name).status == "refused"


@pytest.mark.parametrize("function", ["acquire", "rate_limit", "peek"])
def test_an_empty_list_is_an_error_in_every_form_in_which_it_can_arrive(db: Db, s: Session, function: str) -> None:
    s.create("database", 1)
    with changes_nothing(db.session()):
        for names in ("'{}'", "'{}'::text[]", "array[]::text[]", "null", "'{{}}'"):
            with fails("PL001" if names != "'{{}}'" or s.connection.info.server_version >= 170000 else "22P02"):
                s.run(f"select * from pglimits.{function}_all({names})")
        for argument in ("slots", "keys"):
            with fails("PL001", argument):
                s.run(f"select * from pglimits.{function}_all('{{database}}', {argument} => '{{}}')")


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
    s.acquire("database", lease_duration=30)
    s.update("database", active=False)
    assert s.limit("database").held == 2
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


@pytest.mark.parametrize("timeout", [0, 3600, None])
def test_more_slots_than_the_limit_is_an_error_at_once_never_a_wait(db: Db, s: Session, timeout: float | None) -> None:
    s.create("database", 2)
    s.create("other", 9)
    with changes_nothing(db.session()):
        with fails("PL004", "slots", "database", "2", "3"):
            s.acquire("database", slots=3, timeout_seconds=timeout)
        with fails("PL004", "slots", "database"):
            s.acquire(["other", "database"], slots=[3], timeout_seconds=timeout)


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


def test_release_acts_once_and_says_whether_the_lease_was_live(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 2)
    lease_id = s.acquire("database").lease_id
    assert [s.release(lease_id), s.release(lease_id), s.release(uuid4())] == [True, False, False]
    ended = s.acquire("database").lease_id
    clock.advance(301)
    assert s.release(ended) is False
    assert s.limit("database").held == 0
    assert len(s.serves("database", 2)) == 2
    db.consistent()


def test_release_of_many_says_of_each_whether_it_was_live(db: Db, clock: Clock, s: Session) -> None:
    for name in ("database", "other"):
        s.create(name, 9)
    live, ended, both = s.acquire("database"), s.acquire("database", lease_duration=1), s.acquire(["database", "other"])
    clock.advance(2)
    expected = {live.lease_id: True, ended.lease_id: False, both.lease_id: True, uuid4(): False}
    rows = s.all("select * from pglimits.release_all(%s::uuid[])", [*expected, live.lease_id])
    assert len(rows) == len(expected)
    assert {row.lease_id: row.released for row in rows} == expected
    assert s.limit("database").held == s.limit("other").held == 0
    db.consistent()


def test_release_and_renew_of_none_are_nothing_and_take_strings_without_a_type(s: Session) -> None:
    for call in ("release_all", "renew_all"):
        assert s.all(f"select * from pglimits.{call}('{{}}')") == []
    s.create("database", 1)
    lease_id = str(s.acquire("database").lease_id)
    assert s.value(f"select pglimits.renew('{lease_id}')") is True
    assert s.value(f"select pglimits.renew('{lease_id}', '600')") is True
    assert s.value(f"select pglimits.renew('{lease_id}', 600)") is True
    assert s.value(f"select renewed from pglimits.renew_all('{{{lease_id}}}')") is True
    assert s.value(f"select pglimits.release('{lease_id}')") is True
    assert s.value(f"select released from pglimits.release_all('{{{lease_id}}}')") is False


# Renewing.


def test_renew_moves_the_end_from_now_by_the_duration_it_was_taken_with(clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 1)
    lease_id = s.acquire("database", lease_duration=30).lease_id
    clock.advance(20)
    for _ in range(2):
        assert s.renew(lease_id)
        assert lasts(s, lease_id, clock) == 30, "repeated, it moves no further"
    assert s.renew(lease_id, 60)
    clock.advance(10)
    assert s.renew(lease_id)
    assert lasts(s, lease_id, clock) == 60, "by the new duration from then on"
    assert s.renew(lease_id, 1)
    assert lasts(s, lease_id, clock) == 60, "and never nearer"


def test_a_renewed_lease_is_live_past_its_first_end(db: Db, clock: Clock, s: Session) -> None:
    s.create("database", 1)
    lease_id = s.acquire("database", lease_duration=10).lease_id
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
    clock.freeze()
    s.create("database", 2)
    ended = s.acquire("database", lease_duration=10).lease_id
    live = s.acquire("database", lease_duration=20)
    clock.advance(10)
    assert not s.renew(ended), "at its very end, even if nobody has taken its slot"
    rows = renew_all(s, live.lease_id, ended)
    assert (rows[live.lease_id].renewed, rows[live.lease_id].expires_at) == (True, live.expires_at + timedelta(0, 10))
    assert (rows[ended].renewed, rows[ended].expires_at) == (False, None)
    assert not s.renew(uuid4())


def test_a_lease_over_several_limits_is_lost_when_it_is_lost_on_one_and_ends_on_all(clock: Clock, s: Session) -> None:
    s.create("one", 1)
    s.create("two", 1)
    lease_id = s.acquire(["one", "two"], lease_duration=10).lease_id
    assert s.renew(lease_id)
    s.reset("one")
    assert s.acquire("one").status == "granted"
    assert not s.renew(lease_id), "somebody else has its slot of 'one'"
    clock.advance(11)
    assert not s.renew(lease_id)
    assert s.acquire("two").status == "granted"


# Expiry.


def test_an_ended_leases_slots_are_granted_with_no_sweep(db: Db, clock: Clock, s: Session) -> None:
    clock.freeze()
    s.create("database", 3)
    s.acquire("database", slots=2, lease_duration=10)
    s.acquire("database", lease_duration=3600)
    clock.advance(9.9)
    assert s.acquire("database").status == "refused"
    clock.advance(0.1)
    assert s.peek("database", slots=2).status == "granted"
    assert s.acquire("database", slots=2).status == "granted"
    assert len(s.holders()) == 2
    db.consistent()


def test_views_show_ended_leases_no_more_whatever_has_been_taken_out_yet(clock: Clock, s: Session) -> None:
    s.create("database", 5)
    s.acquire("database", slots=2, lease_duration=10)
    s.acquire("database", slots=1, lease_duration=20)
    s.acquire("database", slots=2, lease_duration=20, key="other")
    clock.advance(15)
    assert s.limit("database").held == 3
    assert sorted(held.slots for held in s.holders()) == [1, 2]
    assert s.value("select sum(held) from pglimits.states") == 5
    clock.advance(5)
    assert s.limit("database").held == 0
    assert s.holders() == []


# What sessions are set to.


@pytest.mark.parametrize("timezone", ["America/New_York", "Asia/Kathmandu"])
def test_settings_of_the_session_change_nothing(clock: Clock, s: Session, timezone: str) -> None:
    now = clock.freeze(datetime(2025, 3, 8, 17, tzinfo=UTC))  # clocks change in New York in the night
    s.create("database", 1)
    s.create("api", 1, 0.5)
    s.run(f"set timezone = '{timezone}'")
    s.run("set extra_float_digits = -15")
    s.run("set search_path = pg_temp")
    s.run("set standard_conforming_strings = off")
    s.run("set escape_string_warning = off")
    for style in ("sql_standard", "iso_8601", "postgres_verbose"):
        s.run(f"set intervalstyle = '{style}'")
        s.run("set datestyle = 'German'")
        ends = "select extract(epoch from min(expires_at)) from pglimits.holders"
        lease_id = s.value("select lease_id from pglimits.acquire('database', lease_duration => 86400)")
        assert float(s.value(ends)) == pytest.approx(now.timestamp() + 86400, abs=1e-3), "a day has 24 hours"
        assert s.value("select pglimits.renew(%s, 2 * 86400)", lease_id) is True
        assert float(s.value(ends)) == pytest.approx(now.timestamp() + 2 * 86400, abs=1e-3)
        assert s.release(lease_id)
    assert s.rate_limit("api", timeout_seconds=FOREVER).status == "granted"
    assert s.value("select retry_after from pglimits.rate_limit('api')") == 2
