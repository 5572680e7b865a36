"""What is made of the figures: medians, spreads, ratios, targets, tables and charts. No server needed."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest


def test_a_spread_is_the_median_with_the_lowest_and_the_highest() -> None:
    from pglimits_bench._measure import spread

    found = spread([3.0, 1.0, 8.0])
    assert (found.median, found.low, found.high, found.values) == (3.0, 1.0, 8.0, (3.0, 1.0, 8.0))
    assert spread([2.0, 4.0]).median == 3.0


def test_many_measurements_are_summed_up_by_their_quartiles() -> None:
    from pglimits_bench._measure import spread

    found = spread([float(value) for value in range(1, 101)])
    assert (found.median, found.low, found.high) == (50.5, 25.75, 75.25)


def test_a_ratio_is_taken_in_each_repetition() -> None:
    from pglimits_bench._measure import ratio, spread

    found = ratio(spread([10.0, 20.0, 60.0]), spread([5.0, 4.0, 20.0]))
    assert (found.median, found.low, found.high) == (3.0, 2.0, 5.0)
    unequal = ratio(spread([10.0]), spread([5.0, 2.0]))
    assert (unequal.median, unequal.low, unequal.high) == (3.5, 2.0, 5.0)
    # Of these, the ratio of the medians (4) is outside of the quartiles (1 and 2).
    apart = ratio(
        spread([1.0, 2.0, 1.0, 4.0, 4.0, 1.0, 4.0, 4.0, 1.0, 4.0, 4.0]),
        spread([1.0, 1.0, 1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 4.0, 2.0, 4.0]),
    )
    assert (apart.median, apart.low, apart.high) == (1.0, 1.0, 2.0)


def test_contenders_take_turns_and_a_warm_up_does_not_count() -> None:
    from pglimits_bench._measure import alternate

    turns: list[str] = []

    def contender(name: str, first: float) -> float:
        turns.append(name)
        return first + len(turns)

    ours, theirs = alternate([lambda: contender("a", 0), lambda: contender("b", 100)], 2, warm_up=1)
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert (ours.values, theirs.values) == ((3, 5), (104, 106))


def test_percentiles_lie_between_values() -> None:
    from pglimits_bench._measure import percentile

    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 0.99) == pytest.approx(1.99)
    assert percentile([7.0], 0.99) == 7.0


def test_the_slope_of_a_steady_stream_is_its_rate_whatever_comes_late_at_one_end() -> None:
    from pglimits_bench._measure import slope

    steady = [moment / 100 for moment in range(1000)]
    assert slope(steady) == pytest.approx(100)
    assert slope([*steady[:-1], steady[-1] + 0.005]) == pytest.approx(100, rel=1e-4)
    assert slope([1.0]) == 0.0


@pytest.mark.parametrize(("ours", "met"), [(6.9, True), (7.0, True), (8.1, False)])
def test_a_target_of_a_ratio_is_also_met_by_being_no_more_above_than_something_else_takes(
    ours: float, met: bool
) -> None:
    from pglimits_bench._measure import spread
    from pglimits_bench._results import at_most, line

    target = at_most(1.4, or_above="another")
    found = line("row", "a call", "ms", spread([ours]), "one", spread([5.0]), target, above=spread([3.0]))
    assert found.met is met


@pytest.mark.parametrize(
    ("relation", "value", "figure", "met"),
    [
        ("<=", 1.4, 1.4, True),
        ("<=", 1.4, 1.41, False),
        (">=", 5.0, 4.9, False),
        ("<", 1.0, 1.0, False),
        (">", 1.0, 1.1, True),
        ("within", 0.999, 1.0004, True),
        ("within", 0.999, 1.002, False),
        ("within", 0.999, 0.998, False),
    ],
)
def test_a_target_is_met_or_not(relation: str, value: float, figure: float, met: bool) -> None:
    from pglimits_bench._results import Target

    assert Target(relation, value, up_to=1.0).met_by(figure) is met  # type: ignore[arg-type]


def test_every_figure_is_measured_by_a_row_and_is_another_one() -> None:
    from pglimits_bench._figures import FIGURES
    from pglimits_bench._rows import ROWS
    from pglimits_bench._run import chosen

    assert {each.row for each in FIGURES} == set(ROWS)
    assert len({(each.row, each.part) for each in FIGURES}) == len(FIGURES)
    assert chosen([], peers=True) == list(dict.fromkeys(each.row for each in FIGURES))
    assert "prefect" not in chosen([], peers=False)


def test_nothing_is_compared_with_zero() -> None:
    from pglimits_bench._measure import spread
    from pglimits_bench._results import at_most, line

    found = line("row", "refused", "%", spread([0.0]), "another", spread([0.0]), at_most(0, "ours"))
    assert found.ratio is None
    assert found.met is True


def test_sizes_grow_tenfold_up_to_the_last() -> None:
    from pglimits_bench._scale import steps

    assert steps(1000) == [1, 10, 100, 1000]
    assert steps(50) == [1, 10, 50]


def test_a_chart_is_valid_xml_with_a_line_for_each_curve() -> None:
    from pglimits_bench._chart import svg
    from pglimits_bench._measure import spread
    from pglimits_bench._results import Curve, Point

    points = tuple(Point(10.0**power, spread([0.4, 0.5 + power / 10]), 1000, 5) for power in range(7))
    curves = [Curve("keys", "keys of a limit <&>", "keys", points), Curve("calls", "calls", "calls", points[:1])]
    drawn = ElementTree.fromstring(svg(curves))
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    for circle in drawn.iter("{http://www.w3.org/2000/svg}circle"):
        assert all(math.isfinite(float(circle.attrib[name])) for name in ("cx", "cy"))
    assert ElementTree.fromstring(svg([])).tag.endswith("svg")


def test_a_chart_tells_how_much_slower_the_last_size_is_and_numbers_no_two_places_on_top_of_each_other() -> None:
    from pglimits_bench._chart import svg
    from pglimits_bench._measure import spread
    from pglimits_bench._results import Curve, Point

    sizes = [2**power for power in range(7)] + [63]
    points = tuple(Point(size, spread([0.1 + size / 640])) for size in sorted(sizes))
    drawn = svg([Curve("processes", "processes", "processes", points)])
    texts = [
        (float(text.attrib["x"]), text.text) for text in ElementTree.fromstring(drawn).iter() if "x" in text.attrib
    ]
    assert "last / first: 1.97" in {text for _, text in texts}
    numbered = {text: x for x, text in texts if text in {str(size) for size in sizes}}
    assert {"1", "64"} <= set(numbered)
    assert "63" not in numbered
    places = sorted(numbered.values())
    assert all(after - before > 25 for before, after in zip(places, places[1:], strict=False))


def test_a_report_is_a_table_for_a_document_too() -> None:
    from pglimits_bench import _report
    from pglimits_bench._measure import spread
    from pglimits_bench._results import Run, at_least, at_most, line

    run = Run("full", "2026-01-01T00:00:00+00:00", {"machine": {"processors": "2"}}, row_seconds={"one": 12.3})
    run.add(line("one", "first | thing", "calls/s", spread([9.0, 11.0]), "floor", spread([5.0, 5.0]), at_least(2.5)))
    reach = at_most(1.4, or_above="a third")
    run.add(line("two", "second", "ms", spread([5.0]), "floor", spread([2.0]), reach, above=spread([4.0])))
    run.add(line("three", "third", "s", spread([0.2]), target=at_most(0.3, "ours")))
    said = _report.as_markdown(run).splitlines()
    assert "| first / thing | 10 (9-11) calls/s | 5 (5-5) calls/s (floor) | 2 (1.80-2.20) | >= 2.5 x | **no** |" in said
    assert "| second | 5 ms | 2 ms (floor) | 2.50 | <= 1.4 x, or 4 ms more | yes |" in said
    assert "| third | 0.200 s |  |  | <= 0.3 s | yes |" in said
    assert "- machine: processors 2" in said
    assert "- Seconds that each row took: one 12" in said


def test_the_document_has_the_figures_of_the_results_that_are_kept() -> None:
    from pglimits_bench import document

    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.with_figures(text) == text
    results = json.loads(document.RESULTS.read_text(encoding="utf-8"))
    assert results["started_at"] in text
    assert all(f"| {line['what']}" in text for line in results["lines"])


def test_a_document_without_a_place_for_the_figures_is_refused() -> None:
    from pglimits_bench import document

    with pytest.raises(ValueError, match="<!-- figures -->"):
        document.with_figures("# A document\n")


def test_a_report_names_what_was_missed_skipped_and_failed() -> None:
    from pglimits_bench import _report
    from pglimits_bench._measure import spread
    from pglimits_bench._results import Run, Skipped, at_least, line

    run = Run("short", "2026-01-01T00:00:00+00:00", {"versions": {"python": "3.11"}})
    run.add(line("one", "first thing", "calls/s", spread([10.0]), "floor", spread([5.0]), at_least(1.5)))
    run.add(line("two", "second [thing]", "calls/s", spread([1.0]), "floor", spread([5.0]), at_least(1.5)))
    run.add(Skipped("three", "third thing", "no tool: pip install tool"))
    run.failed.append(Skipped("four", "fourth thing", "it broke"))
    said = _report.as_text(run)
    assert "1 of 2 targets met." in said
    assert "Not met: second [thing] / floor" in said
    assert "Skipped: third thing: no tool: pip install tool" in said
    assert "Failed: fourth thing: it broke" in said
    json.dumps(_report.as_dict(run), allow_nan=False)
