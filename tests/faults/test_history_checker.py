"""The checker of histories finds every breach of a promise, and nothing where they are kept. No server needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from history import Change, History, Said, read_log
from history_checker import check, longest_idle, longest_unheard, slots_gone
from history_replay import Tolerance


class Story:
    """A history, told step by step: each step is a transaction of its own unless ``together``."""

    def __init__(self, limit: int = 1, rate: float = 0.0) -> None:
        self.changes: list[Change] = []
        self.said: list[Any] = []
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.fence = 0
        self.tx = 0
        self.configure(0.0, limit, rate)

    def change(
        self, at: float, what: str, row: dict[str, Any] | None, lease_id: str = "", together: bool = False
    ) -> None:
        self.tx += not together
        was = self.rows.pop((what, lease_id), None)
        if row is not None:
            self.rows[what, lease_id] = row
        self.changes.append(Change(len(self.changes), self.tx, at, what, was, row))

    def configure(self, at: float, limit: int, rate: float = 0.0, active: bool = True, together: bool = False) -> None:
        row = {"limit_id": 1, "name": "database", "limit": limit, "slot_decay_per_second": rate, "active": active}
        self.change(at, "configs", row, together=together)

    def level(self, at: float, booked: float, limit: int = 1, rate: float = 1.0) -> None:
        """What is booked from now on, in slots beyond those that have decayed since time 0."""
        row = {"limit_id": 1, "key": "", "limit": limit, "slot_decay_per_second": rate, "booked": booked * 1e6}
        self.change(at, "states", row | {"decayed": 0.0, "decayed_at": 0.0}, "state")

    def waits(
        self, at: float, lease_id: str, slots: int = 1, rank: int = 0, alive_until: float = 1000.0, **more: Any
    ) -> None:
        row = {"limit_id": 1, "key": "", "lease_id": lease_id, "slots": slots, "rank": rank, "arrival": at}
        row |= {"expires_at": alive_until, "channel": None, "parts": None, "lease_duration": 300.0}
        self.change(at, "queue", row | more, lease_id)

    def moves(self, at: float, lease_id: str, key: str = "other", **more: Any) -> None:
        """Goes to stand in another line."""
        self.change(at, "queue", self.rows["queue", lease_id] | {"key": key} | more, lease_id)

    def beats(self, at: float, channel: str) -> None:
        self.change(at, "processes", {"channel": channel, "expires_at": at + 10}, channel)

    def leaves(self, at: float, lease_id: str, together: bool = False) -> None:
        self.change(at, "queue", None, lease_id, together)

    def granted(
        self, at: float, lease_id: str, slots: int = 1, ends: float = 1000.0, fence: int | None = None, rank: int = 0,
        together: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        self.fence = self.fence + 1 if fence is None else fence
        row = {"limit_id": 1, "key": "", "lease_id": lease_id, "slots": slots, "fence": self.fence, "priority": -rank}
        row |= {"acquired_at": at, "expires_at": ends, "parts": 1}
        self.change(at, "leases", row | more, lease_id, together)

    def kept(self, at: float, lease_id: str, slots: int = 1, ends: float = 1000.0) -> None:
        """Slots are kept for one who waits for other limits too."""
        rising = self.fence
        self.granted(at, lease_id, slots, ends, fence=0, parts=2)
        self.fence = rising

    def renewed(self, at: float, lease_id: str, ends: float, **more: Any) -> None:
        self.change(at, "leases", self.rows["leases", lease_id] | {"expires_at": ends} | more, lease_id)

    def ended(self, at: float, lease_id: str, together: bool = False) -> None:
        self.change(at, "leases", None, lease_id, together)

    def say(self, at: float, attempt: str, what: str, **more: Any) -> None:
        self.said.append(Said(at, "worker", attempt, what, more))

    def asked(self, at: float, attempt: str, slots: int = 1, **more: Any) -> None:
        self.say(at, attempt, "asked", slots={"database": slots}, key="", priority=0, **more)

    def held(self, attempt: str, begin: float, end: float, fence: int, slots: int = 1) -> None:
        """A client's word that it held a lease, whose id is that of the attempt."""
        self.asked(begin, attempt, slots)
        self.say(begin, attempt, "granted", fences=[fence], lost=False)
        self.say((begin + end) / 2, attempt, "still", lost=False)
        self.say(end, attempt, "leaving", lost=False)

    def history(self, end: float = 2000.0) -> History:
        return History(self.changes, sorted(self.said, key=lambda said: said.at), end)

    def breaks(self, tolerance: Tolerance | None = None) -> list[str]:
        return [violation.promise for violation in check(self.history(), tolerance)]


def a_queue_that_moves_on() -> Story:
    story = Story(limit=2)
    story.granted(1, "a")
    story.granted(2, "b")
    story.waits(3, "wide", slots=2)
    story.waits(4, "first", rank=-1)
    story.ended(5, "a")
    story.leaves(5, "first", together=True)
    story.granted(5, "first", rank=-1, together=True)
    story.renewed(6, "b", ends=1010)
    story.ended(7, "first")
    story.ended(8, "b")
    story.leaves(8, "wide", together=True)
    story.granted(8, "wide", slots=2, together=True)
    story.ended(9, "wide")
    for attempt, begin, end, fence, slots in (
        ("a", 1.5, 4.5, 1, 1), ("b", 2.5, 7.5, 2, 1), ("first", 5.5, 6.5, 3, 1), ("wide", 8.1, 8.9, 4, 2),
    ):  # fmt: skip
        story.held(attempt, begin, end, fence, slots)
    story.asked(6, "refused")
    story.say(6.1, "refused", "refused")
    return story


def test_a_history_that_keeps_every_promise_is_found_to() -> None:
    assert a_queue_that_moves_on().breaks() == []


def too_many(story: Story) -> None:
    story.granted(10, "x", slots=2)
    story.granted(11, "y")
    story.ended(12, "x")
    story.ended(12, "y")


def after_shrinking(story: Story) -> None:
    story.granted(10, "x")
    story.configure(11, 1)
    story.granted(12, "y")
    story.ended(13, "x")
    story.ended(13, "y")


def back_from_the_dead(story: Story) -> None:
    story.granted(10, "x", ends=12)
    story.renewed(20, "x", ends=22)


def believed_too_long(story: Story) -> None:
    story.granted(10, "x", ends=12)
    story.held("x", 10.1, 12.1, story.fence)


def two_at_once_by_their_own_word(story: Story) -> None:
    for attempt in ("x", "y", "z"):
        story.granted(10, attempt)
        story.ended(10.0001, attempt)
        story.held(attempt, 10.5, 11, story.fence)


def never_granted(story: Story) -> None:
    story.held("x", 10, 11, 77)


def out_of_order(story: Story) -> None:
    story.granted(10, "x", slots=2)
    story.waits(11, "next")
    story.waits(12, "second")
    story.ended(13, "x")
    story.leaves(13, "second", together=True)
    story.granted(13, "second", together=True)
    story.leaves(14, "next")
    story.ended(15, "second")


def a_newcomer_passes(story: Story) -> None:
    story.granted(10, "x")
    story.waits(11, "wide", slots=2)
    story.granted(12, "newcomer")
    story.leaves(13, "wide")
    story.ended(14, "x")
    story.ended(14, "newcomer")


def a_lower_priority_passes(story: Story) -> None:
    story.granted(10, "x", slots=2)
    story.waits(11, "low", rank=1)
    story.waits(12, "high", rank=-1)
    story.ended(13, "x")
    story.leaves(13, "low", together=True)
    story.granted(13, "low", rank=1, together=True)
    story.leaves(13.5, "high")
    story.ended(14, "low")


def a_rate_limit_passes(story: Story) -> None:
    story.waits(11, "next", lease_duration=None)
    story.waits(12, "second", lease_duration=None)
    story.leaves(13, "second", together=True)
    story.granted(13, "second", slots=0, together=True)
    story.leaves(14, "next")


def one_passes_that_lives_by_its_process(story: Story) -> None:
    story.granted(10, "x", slots=2)
    story.waits(11, "first", alive_until=12, channel="process")
    story.beats(14, "process")
    story.waits(15, "second")
    story.ended(20, "x")
    story.leaves(20, "second", together=True)
    story.granted(20, "second", together=True)
    story.leaves(20.5, "first")
    story.ended(21, "second")


def another_arrival_in_another_line(story: Story) -> None:
    story.waits(11, "x")
    story.moves(12, "x", arrival=12)
    story.leaves(13, "x")


def two_lines_at_once(story: Story) -> None:
    story.waits(11, "x")
    story.rows["queue", "elsewhere"] = story.rows.pop(("queue", "x"))
    story.waits(12, "x", key="other")
    story.leaves(13, "x")
    story.leaves(13, "elsewhere")


def some_of_it(story: Story) -> None:
    story.granted(10, "x", parts=2)
    story.ended(11, "x")


def what_is_kept_is_taken(story: Story) -> None:
    story.kept(10, "patient", slots=2)
    story.granted(11, "x")
    story.ended(12, "x")
    story.ended(12, "patient")


def idling(story: Story) -> None:
    story.granted(10, "x", slots=2)
    story.waits(11, "next")
    story.ended(12, "x")
    story.leaves(15, "next")
    story.granted(15, "next", together=True)
    story.ended(16, "next")


def idling_after_an_end(story: Story) -> None:
    story.granted(10, "x", slots=2, ends=12)
    story.waits(11, "next")
    story.ended(15, "x")
    story.leaves(15, "next", together=True)
    story.granted(15, "next", together=True)
    story.ended(16, "next")


def fences_fall(story: Story) -> None:
    story.granted(10, "x", fence=3)
    story.ended(11, "x")


def granted_twice(story: Story) -> None:
    story.granted(10, "x")
    story.granted(11, "x")
    story.ended(12, "x")


def held_at_the_end(story: Story) -> None:
    story.granted(10, "x", ends=3000)


def waiting_at_the_end(story: Story) -> None:
    story.configure(9, 0)
    story.waits(10, "x", alive_until=3000)


def refused_though_free(story: Story) -> None:
    story.asked(20, "x")
    story.say(20.1, "x", "refused")


@pytest.mark.parametrize(
    ("breach", "promise"),
    [
        (too_many, "Never too many"),
        (after_shrinking, "Never too many"),
        (back_from_the_dead, "Never too many"),
        (believed_too_long, "Never too many"),
        (two_at_once_by_their_own_word, "Never too many"),
        (never_granted, "Nothing is lost"),
        (out_of_order, "In order"),
        (a_newcomer_passes, "In order"),
        (a_lower_priority_passes, "In order"),
        (a_rate_limit_passes, "In order"),
        (one_passes_that_lives_by_its_process, "In order"),
        (another_arrival_in_another_line, "In order"),
        (two_lines_at_once, "In order"),
        (some_of_it, "All or nothing"),
        (what_is_kept_is_taken, "Never too many"),
        (idling, "No idling"),
        (idling_after_an_end, "No idling"),
        (fences_fall, "Fences rise"),
        (granted_twice, "Once"),
        (held_at_the_end, "Nothing is lost"),
        (waiting_at_the_end, "Nothing is lost"),
        (refused_though_free, "No false refusal"),
    ],
)
def test_a_breach_is_found(breach: Callable[[Story], None], promise: str) -> None:
    story = a_queue_that_moves_on()
    breach(story)
    assert promise in story.breaks()


def test_a_rate_limit_that_is_too_fast_is_found_and_one_at_its_full_rate_is_not() -> None:
    def story(gap: float) -> Story:
        told = Story(limit=2, rate=10)
        for number in range(50):
            moment = max(number - 1, 0) * gap
            told.asked(moment - 0.001, str(number), rate=True)
            told.say(moment, str(number), "went")
        return told

    assert story(0.1).breaks() == []
    assert "Never too fast" in story(0.09).breaks()


def test_slow_answers_do_not_look_too_fast() -> None:
    """The moment may have come long before the caller heard of it."""
    story = Story(limit=2, rate=10)
    for number in range(20):
        story.asked(number * 0.1, str(number), rate=True)
        story.say(2 + number * 0.001, str(number), "went")
    assert story.breaks() == []
    assert slots_gone(story.history(), "database")[0] == (2.0, 1)


def booked(gap: float, late: float) -> Story:
    """Those who stood in line, by their moments, and went a little later."""
    story = Story(limit=1, rate=10)
    for number in range(20):
        moment = 1 + number * gap
        story.asked(0.5, str(number), rate=True)
        story.granted(moment - 0.05, str(number), slots=0, acquired_at=moment)
        story.say(moment + late, str(number), "went")
    return story


def test_the_moments_of_those_who_stood_in_line_are_known_exactly_however_late_they_went() -> None:
    assert booked(0.1, late=5).breaks() == []
    assert booked(0.1, late=0).breaks() == []
    assert "Never too fast" in booked(0.0999, late=5).breaks()


def test_a_raised_rate_may_be_met_by_those_who_were_told_their_moments_before_and_holds_from_then_on() -> None:
    story = booked(0.1, late=0)
    story.configure(2, limit=1, rate=20)
    for number in range(20):
        story.granted(2 + number * 0.05, f"faster {number}", slots=0, acquired_at=2.05 + number * 0.05)
        story.asked(2, f"faster {number}", rate=True)
    assert "Never too fast" in story.breaks()  # the moments of the others lie up to 0.9 s ahead
    story.changes = [change for change in story.changes if not 2.2 < change.row.get("acquired_at", 0) < 3]
    assert story.breaks() == []


def test_one_that_goes_before_its_moment_is_found() -> None:
    assert "Never too fast" in booked(0.1, late=-0.002).breaks()


def a_rate_limit_that_comes_free(at: float, served: float) -> Story:
    """Its only slot has decayed at that time, and then somebody is served who waits for it."""
    story = Story(limit=1, rate=1)
    story.level(1, booked=at)
    story.waits(2, "x", lease_duration=None)
    story.leaves(served, "x")
    story.granted(served, "x", slots=0, together=True)
    return story


def test_a_rate_limit_that_leaves_somebody_in_line_whose_moment_has_come_idles() -> None:
    assert a_rate_limit_that_comes_free(10, served=11).breaks() == []
    assert a_rate_limit_that_comes_free(10, served=13).breaks() == ["No idling"]
    assert longest_idle(a_rate_limit_that_comes_free(10, served=13).history()) == pytest.approx(3)


def test_whoever_changes_a_limit_grants_by_what_it_becomes() -> None:
    story = a_queue_that_moves_on()
    story.granted(10, "x", slots=2)
    story.waits(11, "next")
    story.leaves(12, "next")
    story.granted(12, "next", together=True)
    story.configure(12, limit=3, together=True)
    story.ended(13, "x")
    story.ended(13, "next")
    assert story.breaks() == []


def test_slots_that_are_kept_are_no_grant_and_not_idle() -> None:
    story = a_queue_that_moves_on()
    story.kept(10, "patient", slots=2, ends=20)
    story.waits(11, "next")
    story.ended(20, "patient")
    story.leaves(20, "next", together=True)
    story.granted(20, "next", together=True)
    story.ended(21, "next")
    assert story.breaks() == []


def a_request_over_two_limits(served: float, other_ends: float, **more: Any) -> Story:
    """It stands at the head of one line, while slots of the other are held or kept until some time."""
    parts = [{"limit_id": 1, "key": key, "slots": 1} for key in ("", "other")]
    story = Story(limit=1)
    story.granted(1, "holder", key="other")
    story.waits(2, "x", parts=parts, **more)
    story.ended(other_ends, "holder")
    story.configure(served, 1)
    story.leaves(served, "x")
    return story


def test_a_request_over_several_limits_that_waits_while_all_are_free_idles() -> None:
    assert a_request_over_two_limits(served=11, other_ends=10, channel="process").breaks() == []
    assert a_request_over_two_limits(served=13, other_ends=10, channel="process").breaks() == ["No idling"]
    assert a_request_over_two_limits(served=13, other_ends=10).breaks() == []  # plain SQL
    assert a_request_over_two_limits(served=16, other_ends=10).breaks() == ["No idling"]
    story = a_request_over_two_limits(served=20, other_ends=10, channel="process")
    assert story.breaks(Tolerance(away=[(9, 19)])) == []


def test_a_limit_on_which_nothing_ever_happened_is_free() -> None:
    story = Story(limit=1)
    parts = [{"limit_id": 1, "key": key, "slots": 1} for key in ("", "other")]
    story.waits(2, "x", parts=parts, channel="process")
    story.configure(8, 1)
    story.leaves(8, "x")
    assert "No idling" in story.breaks()


def test_one_who_waits_for_several_limits_may_be_passed_where_it_does_not_stand() -> None:
    story = a_queue_that_moves_on()
    story.waits(11, "patient", parts=[])
    story.moves(12, "patient")
    story.granted(13, "x")
    story.ended(14, "x")
    story.leaves(15, "patient")
    assert story.breaks() == []


def test_slots_are_not_idle_while_the_server_is_away_or_the_waiter_dead_or_too_wide() -> None:
    story = a_queue_that_moves_on()
    idling(story)
    assert story.breaks(Tolerance(away=[(12.5, 14.9)])) == []
    assert longest_idle(story.history()) == pytest.approx(3)

    story = a_queue_that_moves_on()
    story.waits(10, "dead", alive_until=11)
    story.leaves(20, "dead")
    story.waits(21, "too wide", slots=3)
    story.leaves(30, "too wide")
    assert story.breaks() == []


def test_what_is_locked_is_neither_idle_nor_refused_wrongly_but_another_limit_is() -> None:
    story = a_queue_that_moves_on()
    idling(story)
    assert story.breaks(Tolerance(locked={"database": [(12.2, 14.5), (12.4, 14.9)]})) == []
    assert "No idling" in story.breaks(Tolerance(locked={"licence": [(12.2, 14.9)]}))
    assert "No idling" in story.breaks(Tolerance(locked={"database": [(12.2, 12.5), (12.3, 12.6)]}))

    story = Story()
    story.granted(1, "x")
    story.ended(2, "x")
    story.asked(10, "refused")
    story.say(10.1, "refused", "refused")
    story.configure(11, 1)
    assert "No false refusal" in story.breaks(Tolerance(locked={"licence": [(9, 11)]}))
    assert story.breaks(Tolerance(locked={"database": [(9, 11)]})) == []


def test_how_late_a_holder_hears_of_its_lease_counts_only_while_it_is_not_locked() -> None:
    story = Story(limit=2)
    for number, heard in enumerate([10.5, 13.0]):
        story.asked(9, str(number))
        story.granted(10, str(number))
        story.say(heard, str(number), "granted", fences=[number + 1], lost=False)
    assert longest_unheard(story.history())[0] == pytest.approx(3)
    assert longest_unheard(story.history(), Tolerance(locked={"database": [(9, 12)]}))[0] == pytest.approx(1)


def test_one_that_dies_or_leaves_may_be_passed() -> None:
    story = a_queue_that_moves_on()
    story.granted(10, "x", slots=2)
    story.waits(11, "dead", alive_until=12)
    story.waits(11.5, "gone")
    story.waits(11.7, "second")
    story.ended(13, "x")
    story.leaves(13, "gone", together=True)
    story.leaves(13, "second", together=True)
    story.granted(13, "second", together=True)
    story.ended(14, "second")
    story.leaves(14, "dead")
    assert story.breaks() == []


def test_a_torn_last_line_of_a_killed_worker_is_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('[1.5, "sync 0", "a", "asked", {"slots": {}}]\n[2.5, "sync 0", "a", "gra')
    assert [(said.at, said.what) for said in read_log(log)] == [(1.5, "asked")]
