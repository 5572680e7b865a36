"""The model itself, where it is easy to say what is right."""

from __future__ import annotations

from fractions import Fraction
from uuid import UUID

import pytest
from limiter_model import LIVENESS, SECOND, Answer, Model, Request, Wrong


def limiter(limit: int, rate: str = "0") -> Model:
    model = Model()
    model.create("it", limit, Fraction(rate), True, None, None)
    return model


def ask(model: Model, number: int, slots: int = 1, wait: int | None = None, for_rate: bool = False) -> Answer:
    request = Request(UUID(int=number), ("it",), (slots,), ("",), wait=wait, duration=20 * SECOND, for_rate=for_rate)
    return model.ask([request])[0]


def test_slots_are_held_until_released_and_then_go_to_the_head_of_the_line() -> None:
    model = limiter(2)
    assert ask(model, 1, slots=2).status == "granted"
    assert (ask(model, 2, slots=2).position, ask(model, 3).position) == (1, 2)
    assert ask(model, 4, wait=0).status == "refused"
    assert model.release([UUID(int=1)]) == {UUID(int=1)}
    assert model.watch([UUID(int=2), UUID(int=3)]) == {UUID(int=2): "granted", UUID(int=3): "queued"}


def test_slots_come_back_at_the_end_of_a_lease_and_after_it_no_renewal_helps() -> None:
    model = limiter(1)
    ask(model, 1)
    model.move_to(15 * SECOND)
    assert model.renew(UUID(int=1), None)
    model.move_to(35 * SECOND - 1)
    assert ask(model, 2, wait=0).status == "refused"
    model.move_to(35 * SECOND)
    assert not model.renew(UUID(int=1), None)
    assert ask(model, 2, wait=0).status == "granted"


def test_a_waiter_that_does_not_call_in_is_passed_over() -> None:
    model = limiter(1)
    ask(model, 1)
    ask(model, 2)
    ask(model, 3)
    model.move_to(LIVENESS - 1)
    model.watch([UUID(int=3)])
    model.lives_for(UUID(int=3), LIVENESS)
    model.move_to(LIVENESS)
    model.release([UUID(int=1)])
    assert model.watch([UUID(int=2), UUID(int=3)]) == {UUID(int=2): "retry", UUID(int=3): "granted"}


def test_a_rate_limit_lets_go_as_fast_as_it_decays_and_turns_given_up_go_to_those_behind() -> None:
    model = limiter(2, "0.3")
    waits = [ask(model, number, for_rate=True).wait for number in range(1, 6)]
    assert waits == [0, 0, 3_333_334, 6_666_667, 10 * SECOND]
    assert model.release([UUID(int=3)]) == {UUID(int=3)}
    model.move_to(SECOND)
    assert ask(model, 5, for_rate=True).wait == 5_666_667
    assert model.limits["it"].place("").level == Fraction(37, 10)


def test_a_turn_keeps_its_place_when_the_rate_changes() -> None:
    model = limiter(1, "1")
    assert [ask(model, number, for_rate=True).wait for number in (1, 2, 3)] == [0, SECOND, 2 * SECOND]
    model.move_to(SECOND // 2)
    model.update("it", rate=Fraction(1, 2))
    assert ask(model, 3, for_rate=True).wait == 3 * SECOND


def test_a_turn_came_when_the_level_allowed_it_however_late_that_is_noticed() -> None:
    model = limiter(1, "0.5")
    for number in (1, 2, 3):
        ask(model, number, for_rate=True)
    model.move_to(60 * SECOND)
    assert [model.passed[UUID(int=number)].at for number in (1, 2, 3)] == [0, 2 * SECOND, 4 * SECOND]


def test_a_turn_that_comes_as_the_limit_grows_comes_then() -> None:
    model = limiter(1, "0.5")
    ask(model, 1, for_rate=True)
    ask(model, 2, for_rate=True)
    model.move_to(SECOND)
    model.update("it", limit=100)
    assert model.passed[UUID(int=2)].at == SECOND


def test_who_had_a_turn_may_ask_again_by_the_former_name() -> None:
    model = limiter(1, "0.5")
    assert ask(model, 1, for_rate=True).status == "granted"
    model.update("it", new_name="other")
    assert ask(model, 1, for_rate=True) == Answer("granted", wait=0)
    assert ask(model, 2, for_rate=True).status == "unlimited"


def test_who_had_a_turn_had_it_on_the_limit_that_had_the_name_then() -> None:
    model = limiter(1, "0.5")
    ask(model, 1, for_rate=True)
    model.update("it", new_name="other")
    model.create("it", 1, Fraction(1), False, None, None)
    model.update("other", new_name="another")
    assert ask(model, 1, for_rate=True) == Answer("granted", wait=0)
    assert ask(model, 2, for_rate=True).status == "unlimited"


def test_a_fence_that_does_not_rise_is_noticed() -> None:
    model = limiter(2)
    place = model.limits["it"].place("")
    for number, fence in ((1, 5), (2, 6)):
        ask(model, number)
        model.note_fence(model.leases[UUID(int=number)], place, fence)
    model.release([UUID(int=1)])
    ask(model, 3)
    with pytest.raises(AssertionError):
        model.note_fence(model.leases[UUID(int=3)], place, 6)


def test_what_is_wrong_is_told_and_changes_nothing() -> None:
    model = limiter(1)
    assert ask(model, 1, slots=2).codes == ("PL004",)
    assert ask(model, 1, for_rate=True).codes == ("PL005",)
    with pytest.raises(Wrong, match="PL002"):
        model.update("nowhere", limit=2)
    assert ask(model, 1, wait=0).status == "granted"
