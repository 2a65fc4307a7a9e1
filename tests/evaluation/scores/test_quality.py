"""Text quality, paired answers and corrections: their place in the scores of a run and in its tables."""

import copy

import pytest

from vlmfix.evals.benchmarks.chair.figures import score_captions
from vlmfix.evals.benchmarks.chair.text_quality import length_matched
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.benchmarks.yes_no import paired_answers, score_labels
from vlmfix.evals.report.rows import answers_table, quality_table
from vlmfix.evals.report.summary import legend
from vlmfix.evals.scores import verdicts as quality
from vlmfix.evals.scores.verdicts import verdict
from vlmfix.evals.stats.tests import mcnemar
from vlmfix.evals.tables import Table, difference_cell, interval_cell, p_cell

MATCHER = ChairMatcher()


def interval(estimate, low, high, **more):
    return {"estimate": estimate, "low": low, "high": high, "n": 9, "undefined": 0, **more}


def row(label, p_value, *, changed=1, **more):
    return {"label": label, "chair": {"changed": changed}, "pope": {"changed": changed}, **more} | {
        "differences": {"chair.chair_i": interval(-0.1, -0.2, -0.05, p_value=p_value)}
    }


# Corrections


def test_rows_are_corrected_per_figure_and_without_the_unchanged():
    rows = [row("a", 0.03), row("b", 0.01), row("c", 1.0, changed=0)]
    rows[0]["differences"]["pope.auc"] = interval(0.1, 0.0, 0.2, p_value=0.04)
    assert quality.correct_rows(rows)["rows"] == 2
    assert [r["differences"]["chair.chair_i"]["p_holm"] for r in rows] == pytest.approx([0.03, 0.02, 1.0])
    assert rows[0]["differences"]["pope.auc"]["p_holm"] == 0.04, "another figure is another family"


def test_without_a_test_there_is_nothing_to_correct():
    rows = [row("a", None), row("b", 0.04)]
    quality.correct_rows(rows)
    assert [r["differences"]["chair.chair_i"]["p_holm"] for r in rows] == [None, 0.04]
    assert quality.correct_rows([])["rows"] == 0


def test_everything_with_a_p_value_is_corrected():
    captions = ({1: "a dog", 2: "a cat and a dog"}, {1: "a cat", 2: "a cat"})
    truth = {1: ["dog"], 2: ["dog"]}
    tables = tuple(score_captions(c, truth, MATCHER) for c in captions)
    answers = [score_labels([True, False], words, image_ids=[1, 2]) for words in (["Yes", "No"], ["No", "No"])]
    rows = []
    for label in "ab":
        one = row(label, 0.01)
        one["chair"]["text_quality"] = {"length_matched": length_matched(captions, tables, truth, MATCHER, seed=0)}
        one["pope"]["paired"] = paired_answers(*answers, seed=0)
        rows.append(one)
    quality.correct_rows(rows)
    matched = rows[0]["chair"]["text_quality"]["length_matched"]
    found = [matched[way][figure]["difference"] for way in ("words", "mentions") for figure in ("chair_i", "chair_s")]
    found += list(rows[0]["pope"]["paired"].values())
    for test in found:
        expected = None if test["p_value"] is None else min(1.0, 2 * test["p_value"])
        assert test["p_holm"] == expected


def control(method, p_value, verdict="better", kind="early stop"):
    return {
        "method": method,
        "control": kind,
        "metric": "chair.chair_i",
        "difference": interval(-0.1, -0.2, -0.05, p_value=p_value),
        "verdict": verdict,
    }


def test_verdicts_that_do_not_survive_the_correction():
    lines = [control("a", 0.04), control("b", 0.002), control("c", 0.9, "same"), control("d", 1.0, "unchanged")]
    lines += [control("a", 0.04, kind="yes bias"), control("b", 0.03, "worse", kind="every head")]
    quality.correct_controls(lines, [])
    assert [line["verdict_holm"] for line in lines] == ["same", "better", "same", "unchanged", "same", "worse"]
    assert lines[0]["verdict"] == "better", "the uncorrected verdict stays on record"
    # What decides words is one family, whatever the control; other heads decide none.
    found = [line["difference"]["p_holm"] for line in lines]
    assert found == pytest.approx([3 * 0.04, 4 * 0.002, 0.9, 1.0, 3 * 0.04, 0.03])


def test_loops_are_in_the_family_that_decides_words():
    looping, still = interval(0.1, 0.02, 0.2, p_value=0.02), interval(0.0, 0.0, 0.0, p_value=1.0)
    row = {"label": "a", "role": "method", "differences": {}} | {
        "chair": {"changed": 1, "text_quality": {"differences": {"looping": looping, "truncation": still}}}
    }
    lines = [control("a", 0.03)]
    quality.correct_controls(lines, [row])
    assert (looping["p_word"], lines[0]["difference"]["p_holm"]) == (0.04, 0.04) and "p_word" not in still
    assert verdict({"methods": [row], "controls": lines}, row) == "loops"
    lines.append(control("a", 0.5, "same", kind="yes bias"))
    quality.correct_controls(lines, [row])
    assert looping["p_word"] == pytest.approx(0.06)
    assert verdict({"methods": [row], "controls": lines}, row) == "unclear"


def test_stars():
    found = interval(-0.1, -0.2, -0.05)
    assert difference_cell(found) == "-10.0*"
    assert difference_cell({**found, "p_holm": 0.02}) == "-10.0*"
    assert difference_cell({**found, "p_holm": 0.06}) == "-10.0(*)"
    assert difference_cell(interval(-0.1, -0.2, 0.05, p_holm=0.01)) == "-10.0"
    near, far = interval(0.01, 0.0004, 0.02), interval(-0.01, -0.02, -0.000041)
    assert (difference_cell(near), interval_cell(near)) == ("+1.0*", "+0.04,+2.0"), (
        "no star beside an end shown as zero"
    )
    assert (difference_cell(far), interval_cell(far)) == ("-1.0*", "-2.0,-0.004")
    assert interval_cell(interval(0.01, -0.0004, 0.02)) == "0.0,+2.0" and interval_cell(None) == ""
    assert [p_cell(p) for p in (None, 0.0004, 0.0312, 1.0)] == ["-", "<0.001", "0.031", "1.000"]


# Paired answers


def test_a_question_asked_in_three_splits_is_one_piece_of_evidence():
    right, wrong = ["Yes", "No", "Yes"], ["No", "No", "Yes"]
    method, none = (
        score_labels([True] * 9, words * 3, image_ids=[1, 2, 3] * 3, items=["dog?"] * 9) for words in (right, wrong)
    )
    found = paired_answers(method, none, seed=0)["mcnemar"]
    assert found == {"questions": 3, "only_method": 1, "only_baseline": 0, "p_value": 1.0}
    assert mcnemar(method, none).only_a == 3


def test_mcc_difference():
    labels = [True, False] * 20
    sharp = ["Yes" if label else "No" for label in labels]
    method, none = (score_labels(labels, words, image_ids=range(40)) for words in (sharp, sharp[::-1]))
    found = paired_answers(method, none, seed=0)["mcc"]
    assert found["estimate"] == 2.0 and found["p_value"] < 0.01
    none = score_labels(labels, ["Yes"] * 40, image_ids=range(40))
    assert paired_answers(method, none, seed=0)["mcc"]["estimate"] == 1.0


def test_chosen_rows_of_a_table():
    table = score_labels([True, False, True], ["Yes", "Yes", "No"], image_ids=[1, 2, 3], scores=[1.0, 0.5, -1.0])
    taken = table.take([2, 0])
    assert (taken.question_ids, taken.image_ids.tolist()) == ((":2", ":0"), [3, 1])
    assert taken.score is not None and taken.score.tolist() == [-1.0, 1.0]
    assert taken.counts() == {"n": 2, "TP": 1, "FP": 0, "TN": 0, "FN": 1, "unparsed": 0}


# Tables


def results():
    matched = {"method_value": 0.12, "baseline_value": 0.15, "difference": interval(-0.03, -0.05, -0.01, p_holm=0.2)}
    ways = {way: {"chair_i": copy.deepcopy(matched)} for way in ("words", "mentions")}
    ways["mentions"]["chair_i"]["difference"] = interval(0.01, -0.02, 0.04, p_holm=1.0)
    text = {"summary": {"repetition": 0.013, "looping": 0.02, "truncation": 0.1, "unfinished": 0.1}}
    chair = {"changed": 5, "summary": {"length_words": 12.34}, "text_quality": text}
    pope = {"changed": 5, "all": {"summary": {"mcc": 0.8}}}
    test = {"questions": 60, "only_method": 5, "only_baseline": 2, "p_value": 0.453, "p_holm": 0.9}
    paired = {"mcnemar": test, "mcc": interval(0.02, -0.01, 0.05, p_holm=0.5)}
    vhr = {**chair, "text_quality": {**text, "length_matched": ways}}
    return {
        "methods": [
            {"label": "none", "chair": {**chair, "changed": 0}, "pope": pope},
            {"label": "vhr", "chair": vhr, "pope": {**pope, "paired": paired}},
            {"label": "var", "chair": {**vhr, "changed": 0}, "pope": {**pope, "paired": paired, "changed": 0}},
        ]
    }


QUALITY = """\
                                            at equal words                       at equal mentions
method  words  rep-4 ↓  loops ↓  cut off ↓  CHAIR_i ↓  none   - none       95 %  - none       95 %
none     12.3      1.3      2.0       10.0
vhr      12.3      1.3      2.0       10.0       12.0  15.0  -3.0(*)  -5.0,-1.0    +1.0  -2.0,+4.0
var      12.3      1.3      2.0       10.0     = none"""

ANSWERS = """\
      method  unparsed  MCC ↑  - none       95 %  questions  only method  only none      p  p (Holm)
pope  none               80.0
pope  vhr                80.0    +2.0  -1.0,+5.0         60            5          2  0.453     0.900
pope  var                80.0  = none"""


def test_small_tables_snapshot():
    assert quality_table(results()).plain(120) == QUALITY
    assert answers_table(results()).plain(120) == ANSWERS


def test_a_run_of_the_baseline_alone():
    alone = {"methods": results()["methods"][:1]}
    assert quality_table(alone).rows == [
        ["method", "words", "rep-4 ↓", "loops ↓", "cut off ↓"],
        ["none", "12.3", "1.3", "2.0", "10.0"],
    ]
    assert answers_table(alone) is None


def test_tables_of_what_was_not_measured_are_left_out():
    old = {"methods": [{"label": "none", "chair": {"changed": 0}, "pope": {"changed": 0}}]}
    assert quality_table(old) is None and answers_table(old) is None


def test_a_wide_table_is_drawn_narrower():
    rows = [["a" * 20, "b" * 20, "c" * 20]] * 2
    assert len(Table(rows).plain(64).split("\n")[0]) == 64
    assert len(Table(rows).plain(63).split("\n")[0]) == 62


def test_legend_names_the_correction_only_where_it_does_something():
    fixed = {"methods": [], "intervals": {"resamples": 2000}}
    assert "Holm" not in " ".join(legend({**fixed, "corrections": {"rows": 1}}))
    assert "Holm's correction for 3 rows" in " ".join(legend({**fixed, "corrections": {"rows": 3}}))
