"""Who dominates whom, and the one word per method: by hand."""

from __future__ import annotations

from typing import Any

import pytest

from vlmfix.evals.data.samples import pace
from vlmfix.evals.scores.pareto import Point, front, pareto, pareto_table
from vlmfix.evals.scores.verdicts import WORDS, verdict, verdict_legend


def interval(estimate: float, low: float, high: float, p_holm: float = 0.01) -> dict[str, Any]:
    return {"estimate": estimate, "low": low, "high": high, "n": 9, "p_value": p_holm, "p_holm": p_holm}


SURE, NOTHING = interval(-0.1, -0.2, -0.05), interval(-0.1, -0.2, 0.05)


# The front


def test_dominated_is_at_least_as_good_in_all_and_better_in_one() -> None:
    best = Point("best", 0.1, 0.9, 10.0)
    for worse in (Point("w", 0.2, 0.9, 10.0), Point("w", 0.1, 0.8, 10.0), Point("w", 0.1, 0.9, 20.0)):
        assert best.dominates(worse) and not worse.dominates(best)
    for other in (best, Point("o", 0.05, 0.8, 10.0), Point("o", 0.2, 0.95, 10.0), Point("o", 0.2, 0.8, 5.0)):
        assert not best.dominates(other)


@pytest.mark.parametrize(("seconds", "tie"), [(10.0, True), (10.5, True), (9.5, True), (10.6, False), (9.4, False)])
def test_seconds_within_five_percent_are_equal(seconds: float, tie: bool) -> None:
    a, b = Point("a", 0.1, 0.9, 10.0), Point("b", 0.1, 0.9, seconds)
    assert (a.dominates(b) or b.dominates(a)) == (not tie)
    assert Point("c", 0.1, 0.95, seconds).dominates(a) == (tie or seconds < 10)


def test_times_differ_where_quartiles_do_not_touch() -> None:
    def point(label: str, seconds: float, low: float, high: float) -> Point:
        return Point(label, 0.1, 0.9, seconds, (low, high))

    a = point("a", 1.0, 0.9, 1.1)
    assert a.dominates(point("b", 1.5, 1.2, 1.8)) and not point("b", 1.5, 1.2, 1.8).dominates(a)
    for other in (point("c", 1.5, 1.1, 1.8), point("d", 1.04, 1.11, 1.2), point("e", 1.5, 0.0, float("inf"))):
        assert not a.dominates(other) and not other.dominates(a)
    assert Point("f", 0.1, 0.95, 1.4, (1.0, 2.0)).dominates(a), "not known to be slower, and better in recall"


def test_no_two_points_dominate_each_other_and_some_front_is_left() -> None:
    """The tie of seconds is not transitive; domination stays free of cycles all the same."""
    import random

    rng = random.Random(0)
    for _ in range(300):
        points = [
            Point(str(i), rng.randrange(3) / 10, rng.randrange(3) / 10, s, rng.choice([None, (s - 0.1, s + 0.2)]))
            for i in range(6)
            for s in [rng.choice([1.0, 1.04, 1.08, 1.2, 2.0])]
        ]
        assert not any(a.dominates(b) and b.dominates(a) for a in points for b in points)
        assert any(not names for names in front(points).values())


def method(label: str, chair_i: float, recall: float, seconds: float, **more: Any) -> dict[str, Any]:
    part = {"summary": {"chair_i": chair_i, "recall": recall}, "seconds": seconds, "changed": 1}
    return {"label": label, "describe": label, "role": "method", "chair": part, **more}


def results() -> dict[str, Any]:
    rows = [
        method("none", 0.20, 0.80, 10.0) | {"role": "baseline"},
        method("good", 0.10, 0.80, 10.2, differences={"chair.chair_i": SURE}),
        method("slow", 0.10, 0.80, 20.0),
        method("short", 0.15, 0.60, 10.0),
    ]
    curve = [{"bias": b, "recall": r, "chair_i": c} for b, r, c in ((0, 0.8, 0.2), (1, 0.7, 0.14), (2, 0.0, None))]
    return {"methods": rows, "early_stop_curve": curve, "controls": []}


def test_rows_of_a_run_and_its_early_stop_curve() -> None:
    found = {row["label"]: row for row in pareto(results())}
    assert [label for label, row in found.items() if row["front"]] == ["good"]
    assert found["none"]["dominated_by"] == ["good"] and found["slow"]["dominated_by"] == ["good"]
    assert found["short"]["dominated_by"] == ["good", "early stop"]
    worse = results()
    worse["methods"].append(method("bad", 0.25, 0.78, 10.0))
    bad = pareto(worse)[-1]
    assert bad["dominated_by"] == ["none", "good"], "the curve's first point is none itself and not named twice"
    without = results()
    without["methods"] = without["methods"][:1] + without["methods"][3:]
    assert {r["label"]: r["dominated_by"] for r in pareto(without)} == {"none": [], "short": ["early stop"]}
    verified = {**without, "early_stop_curve": [], "self_verification_curve": without["early_stop_curve"]}
    for asking, dominated in ((0.0, ["self-verification"]), (5.0, [])):
        rows = pareto({**verified, "self_verification": {"pace": asking}})
        assert {r["label"]: r["dominated_by"] for r in rows}["short"] == dominated, "its questions take time"
    del without["early_stop_curve"]
    assert all(row["front"] for row in pareto(without)), "the point without a bias is none itself and no rival"


def test_the_table_has_the_front_first_and_intervals_beside() -> None:
    table = pareto_table(results())
    assert table is not None
    rows = table.rows
    assert [row[1] for row in rows] == ["method", "good", "slow", "short", "none"]
    assert rows[1] == ["*", "good", "10.0", "-10.0*", "-20.0,-5.0", "80.0", "", "", "x 1.02", "", ""]
    assert rows[3][-1] == "good +1"
    only = {**results(), "methods": results()["methods"][:1]}
    assert pareto_table(only) is None and pareto({"methods": [{"label": "none"}]}) == []


def test_seconds_are_the_median_of_ratios_within_batches() -> None:
    """One slow batch (something else ran) does not decide; equal times of one batch count once."""
    pairs = [(1.1, 1.0), (1.1, 1.0), (2.4, 2.0), (9.0, 1.5), (1.3, 1.0)]
    assert pace(pairs) == {"median": 1.25, "quartiles": [1.175, 2.475], "batches": 4}
    assert pace([(1.0, 0.0)]) is None
    made = results()
    for row, median in zip(made["methods"], (1.0, 1.02, 0.7, 1.0), strict=True):
        row["chair"]["pace"] = {"median": median, "quartiles": [median - 0.1, median + 0.1], "batches": 4}
    assert {r["label"]: r["relative_seconds"] for r in pareto(made)}["slow"] == 0.7
    assert [r["label"] for r in pareto(made) if r["front"]] == ["slow"], "the sums of seconds play no part"
    table = pareto_table(made)
    assert table is not None and table.rows[1][8:10] == ["x 0.70", "0.60,0.80"]
    for row in made["methods"]:
        row["chair"]["pace"]["batches"] = 3
    assert [r["label"] for r in pareto(made) if r["front"]] == ["good", "slow"], "three batches say nothing about time"


def test_a_row_that_changed_nothing_takes_no_part() -> None:
    made = results()
    made["methods"][1]["chair"] |= {"changed": 0}
    assert "good" not in {row["label"] for row in pareto(made)}


# The word


def line(name: str, word: str, **more: Any) -> dict[str, Any]:
    return {"method": "m", "control": name, "metric": "chair.chair_i", "verdict": word, "verdict_holm": word, **more}


def run_of(lines: list[dict[str, Any]], *, changed: int = 1, **more: Any) -> dict[str, Any]:
    return {"methods": [method("m", 0.1, 0.8, 1.0, **more) | {"chair": {"changed": changed}}], "controls": lines}


@pytest.mark.parametrize(
    ("lines", "differences", "expected"),
    [
        ([line("early stop", "better"), line("yes bias", "same")], {}, "better"),
        ([line("early stop", "same"), line("yes bias", "worse")], {}, "worse"),
        ([line("early stop", "better"), line("yes bias", "worse")], {}, "mixed"),
        ([line("early stop", "same")], {"chair.chair_i": SURE}, "trade-off"),
        ([line("early stop", "same")], {"chair.chair_i": NOTHING}, "unclear"),
        ([line("early stop", "same")], {"chair.chair_i": interval(-0.1, -0.2, -0.05, p_holm=0.2)}, "unclear"),
        ([line("early stop", "better", verdict_holm="same")], {}, "unclear"),
        ([line("every head", "better"), line("early stop", "same")], {"chair.recall": SURE}, "trade-off"),
        ([line("every head", "better")], {"chair.recall": SURE}, ""),
    ],
)
def test_one_word(lines: list[dict[str, Any]], differences: dict[str, Any], expected: str) -> None:
    made = run_of(lines, differences=differences)
    assert verdict(made, made["methods"][0]) == expected
    assert expected == "" or expected in WORDS


def test_no_word_for_the_baseline_and_unchanged_rows_say_so() -> None:
    made = run_of([line("early stop", "unchanged")], changed=0)
    assert verdict(made, made["methods"][0]) == "unchanged"
    assert verdict(made, {**made["methods"][0], "role": "baseline"}) == ""


@pytest.mark.parametrize("figure", ["looping", "truncation"])
def test_better_figures_of_captions_that_loop_are_no_merit(figure: str) -> None:
    made = run_of([line("early stop", "better")])
    quality = {"differences": {figure: interval(0.2, 0.1, 0.3)}}
    made["methods"][0]["chair"] = {"changed": 1, "text_quality": quality}
    assert verdict(made, made["methods"][0]) == "loops"
    quality["differences"][figure] = interval(-0.2, -0.3, -0.1)
    assert verdict(made, made["methods"][0]) == "better", "fewer loops are no fault"


def test_the_legend_explains_the_words_in_use() -> None:
    text = verdict_legend(word for word in ("better", "", "trade-off", "better"))
    assert text.startswith("better: beats") and "trade-off: differs" in text and "loops:" not in text
    assert "at most 5 % of runs" in text
    assert verdict_legend([""]) == ""
