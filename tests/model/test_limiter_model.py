"""The model itself, where it is easy to say what is right."""

from __future__ import annotations

from fractions import Fraction
from uuid import UUID

import pytest
from limiter_model import HORIZON, LIVENESS, SECOND, Answer, Model, Request, Wrong


def limiter(limit: int, rate: str = "0") -> Model:
    model = Model()
    model.create("it", limit, Fraction(rate), True, None, None)
    return model


def ask(
    model: Model, number: int, slots: int = 1, timeout: int | None = None, for_rate: bool = False, names: str = "it"
) -> Answer:
    parts = tuple(names.split())
    request = Request(
        UUID(int=number), parts, (slots,) * len(parts), ("",) * len(parts), timeout=timeout, duration=20 * SECOND,
        for_rate=for_rate,
    )  # fmt: skip
    return model.ask(request, told=True)


def watch(model: Model, *numbers: int) -> dict[int, str]:
    found = model.watch([UUID(int=number) for number in numbers])
    return {lease_id.int: status for lease_id, status in found.items()}


def test_slots_are_held_until_released_and_then_go_to_the_head_of_the_line() -> None:
    model = limiter(2)
    assert ask(model, 1, slots=2).status == "granted"
    assert (ask(model, 2, slots=2).position, ask(model, 3).position) == (1, 2)
    assert ask(model, 4, timeout=0).status == "refused"
    assert model.release([UUID(int=1)], own=True) == {UUID(int=1)}
    assert watch(model, 2, 3) == {2: "granted", 3: "queued"}


def test_slots_come_back_at_the_end_of_a_lease_and_after_it_no_renewal_helps() -> None:
    model = limiter(1)
    ask(model, 1)
    model.move_to(15 * SECOND)
    assert model.renew(UUID(int=1), None)
    model.move_to(35 * SECOND - 1)
    assert ask(model, 2, timeout=0).status == "refused"
    model.move_to(35 * SECOND)
    assert not model.renew(UUID(int=1), None)
    assert ask(model, 2, timeout=0).status == "granted"


def test_a_waiter_that_does_not_call_in_is_passed_over() -> None:
    model = limiter(1)
    ask(model, 1)
    ask(model, 2)
    model.move_to(SECOND)
    ask(model, 3)
    model.move_to(LIVENESS)
    model.release([UUID(int=1)], own=True)
    assert watch(model, 2, 3) == {2: "retry", 3: "granted"}


def test_a_rate_limit_grants_who_is_at_the_head_and_has_the_others_look_half_a_horizon_before_their_moment() -> None:
    model = limiter(1, "2")
    waits = [ask(model, number, for_rate=True).wait for number in (1, 2, 3)]
    assert waits == [0, SECOND // 2 - HORIZON // 2, SECOND - HORIZON // 2]
    model.move_to(SECOND // 2 - HORIZON // 2)
    assert watch(model, 2, 3) == {2: "granted", 3: "queued"}
    assert ask(model, 2, for_rate=True) == Answer("granted", wait=HORIZON // 2)


def test_who_looks_late_is_granted_as_of_then() -> None:
    model = limiter(1, "2")
    ask(model, 1, for_rate=True)
    ask(model, 2, for_rate=True)
    model.move_to(3 * SECOND)
    assert watch(model, 2) == {2: "granted"}
    assert model.limits["it"].place("").booked == model.limits["it"].virtual(3 * SECOND) + 1


def test_a_changed_rate_counts_from_the_change_on() -> None:
    model = limiter(1, "1")
    ask(model, 1, for_rate=True)
    assert ask(model, 2, for_rate=True).wait == SECOND - HORIZON // 2
    model.move_to(SECOND // 2)
    model.update("it", rate=Fraction(1, 4))
    assert ask(model, 2, for_rate=True).wait == 2 * SECOND - HORIZON // 2


def test_a_request_over_several_limits_goes_to_stand_where_it_is_not_its_turn() -> None:
    model = limiter(1)
    model.create("other", 1, Fraction(0), True, None, None)
    ask(model, 1)
    ask(model, 2, names="other")
    assert ask(model, 3, names="it other").position == 1
    model.release([UUID(int=1)], own=True)
    assert [waiter.request.lease_id.int for waiter in model.limits["other"].place("").line] == [3]
    model.release([UUID(int=2)], own=True)
    assert watch(model, 3) == {3: "granted"}


def test_a_fence_that_does_not_rise_is_noticed() -> None:
    model = limiter(2)
    place = model.limits["it"].place("")
    for number, fence in ((1, 5), (2, 6)):
        ask(model, number)
        model.note_fence(model.leases[UUID(int=number)], place, fence)
    model.release([UUID(int=1)], own=True)
    ask(model, 3)
    with pytest.raises(AssertionError):
        model.note_fence(model.leases[UUID(int=3)], place, 6)


def test_what_is_wrong_is_told_and_changes_nothing() -> None:
    model = limiter(1)
    assert ask(model, 1, slots=2).codes == ("PL004",)
    assert ask(model, 1, for_rate=True).codes == ("PL005",)
    with pytest.raises(Wrong, match="PL002"):
        model.update("nowhere", limit=2)
    assert ask(model, 1, timeout=0).status == "granted"
