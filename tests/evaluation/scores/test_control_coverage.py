"""By simulation: how often intervals against controls cover the truth, and how often a method gets a false word."""

import math

import numpy as np
import pytest
from pope_rule import score_logits

from vlmfix.evals.benchmarks.chair.task import Chair
from vlmfix.evals.benchmarks.yes_no import ACCURACY, YES_RATIO
from vlmfix.evals.scores.bias_curves import Thinned
from vlmfix.evals.scores.controls import bias_curves, bias_lines
from vlmfix.evals.scores.verdicts import correct_controls, correct_rows, verdict
from vlmfix.evals.stats.bootstrap import interval_dict
from vlmfix.evals.stats.table import Table
from vlmfix.evals.tables import is_certain

RECALL, CHAIR_I = (Chair.figure(name).statistic for name in ("recall", "chair_i"))
MENTIONS = 6


def captions(rng, images, skill):
    """Which mentions are right, later ones less often, and the gap to the end token before each: [n, MENTIONS] both."""
    chance = 1 / (1 + np.exp(-(images[:, None] + skill - 0.5 * np.arange(MENTIONS))))
    return rng.random(chance.shape) < chance, rng.exponential(2.0, chance.shape)


def counted(right, length, **more):
    said = np.arange(MENTIONS) < length[:, None]
    recalled = (right & said).sum(axis=1)
    columns = {"mentions": length, "distinct": length, "recalled": recalled, "hallucinated": length - recalled}
    columns |= {"gt_objects": np.full(len(length), MENTIONS), "words": length, **more}
    return Table(np.arange(len(length)), columns)


def versions(right, gaps):
    """The captions cut at each new minimum of their gaps, the smallest first."""
    before = np.minimum.accumulate(np.pad(gaps, ((0, 0), (1, 0)), constant_values=np.inf), axis=1)[:, :-1]
    places = -np.sort(-np.where(gaps < before, np.arange(MENTIONS), -1), axis=1)
    now = np.full(len(gaps), MENTIONS)
    found = [counted(right, now, knob=np.zeros(len(gaps)))]
    for place in places.T:
        bias = np.where(place >= 0, np.take_along_axis(gaps, np.maximum(place, 0)[:, None], axis=1)[:, 0], np.nan)
        now = np.where(place >= 0, place, now)
        found.append(counted(right, now, knob=bias))
    return found


def stopped(right, gaps, bias):
    hit = gaps <= bias
    return counted(right, np.where(hit.any(axis=1), hit.argmax(axis=1), MENTIONS))


def belief(rng, right):
    """The probability of yes to each mention, higher for what is there."""
    return 1 / (1 + np.exp(-rng.normal(1.5 * right - 0.5, 1.0)))


def kept(right, yes, threshold, **more):
    """The captions without what the model denies."""
    stays = yes > np.asarray(threshold)[:, None]
    recalled, length = (right & stays).sum(axis=1), stays.sum(axis=1)
    columns = {"mentions": length, "distinct": length, "recalled": recalled, "hallucinated": length - recalled}
    return Table(np.arange(len(right)), columns | {"gt_objects": np.full(len(right), MENTIONS), **more})


def verified(right, yes):
    """The captions without their most doubtful mention, without the two most doubtful ones, ..."""
    nothing = np.zeros(len(right))
    return [kept(right, yes, level, knob=level) for level in (nothing, *np.sort(yes, axis=1).T)]


def baseline_and_method(rng, n, skill=0.0, bias=0.4, control="early stop"):
    """The baseline under every bias, and a method that is it under one, said anew and perhaps better."""
    images = rng.normal(1, 1, n)
    (own, gaps), (right, other_gaps) = captions(rng, images, 0.0), captions(rng, images, skill)
    if control == "early stop":
        return versions(own, gaps), stopped(right, other_gaps, bias)
    return verified(own, belief(rng, own)), kept(right, belief(rng, right), np.full(n, bias))


def answers(rng, n, skill=0.0, shift=0.0):
    """Two questions about each image: what makes one hard is the same for both methods."""
    label, ease, images = rng.random(2 * n) < 0.5, rng.normal(0, 0.5, 2 * n), np.arange(2 * n) // 2

    def said(skill, shift):
        scores = label * (1.5 + skill) - 0.75 + ease + shift + rng.normal(0, 1, 2 * n)
        return score_logits(label.tolist(), scores.tolist(), image_ids=images)

    return said(0.0, 0.0), said(skill, shift)


@pytest.mark.parametrize(
    ("skill", "bias", "control"),
    [
        (0.0, 0.8, "early stop"),
        (0.5, 0.3, "early stop"),
        (0.0, 0.5, "self-verification"),
        (0.5, 0.3, "self-verification"),
    ],
)
def test_intervals_against_thinned_captions_cover_what_they_say(skill, bias, control):
    rng, runs = np.random.default_rng(0), 300
    cut, method = baseline_and_method(rng, 20_000, skill, bias, control)
    curve = Thinned(cut)
    other = curve.table(curve.nearest(RECALL, RECALL.of(method)))
    truth = CHAIR_I.of(method) - CHAIR_I.of(other) if skill else 0.0
    covered, covered_fixed = 0, 0
    for seed in range(runs):
        cut, method = baseline_and_method(rng, 120, skill, bias, control)
        curve = Thinned(cut)
        (found,) = curve.differences(RECALL, method, [CHAIR_I], seed=seed, n_resamples=200)
        fixed = curve.table(curve.nearest(RECALL, RECALL.of(method)))
        held = CHAIR_I.difference(method, fixed, seed=seed, n_resamples=200)
        covered += found.low <= truth <= found.high
        covered_fixed += held.low <= truth <= held.high
    assert 0.93 <= covered / runs <= 0.97
    if control == "early stop":
        assert covered_fixed < covered - 0.02 * runs, "with the choice held fixed they cover too little"


def test_intervals_against_a_yes_bias_cover_what_they_say():
    rng, runs = np.random.default_rng(1), 300
    covered = 0
    for seed in range(runs):
        none, method = answers(rng, 80, shift=0.6)
        curve = bias_curves("pope", none, {})["yes bias"]
        (found,) = curve.differences(YES_RATIO, method, [ACCURACY], seed=seed, n_resamples=200)
        covered += found.low <= 0 <= found.high  # moving the threshold back is all that differs
    assert 0.93 <= covered / runs <= 0.975


def lines_of(rng, n, seed, skill=0.0):
    cut, method = baseline_and_method(rng, n, skill)
    none, said = answers(rng, n, skill)
    lines, _ = bias_lines(
        "m", "chair", "early stop", bias_curves("chair", cut[0], {"early stop": cut})["early stop"], method, seed, 300
    )
    more, _ = bias_lines("m", "pope", "yes bias", bias_curves("pope", none, {})["yes bias"], said, seed, 600)
    return [*lines, *more]


def word(lines, differences=()):
    rows = [
        {
            "label": label,
            "role": role,
            "chair": {"changed": 1},
            "pope": {"changed": 1},
            "differences": dict(differences),
        }
        for label, role in (("none", "baseline"), ("m", "method"))
    ]
    correct_rows(rows[1:])
    correct_controls(lines, rows)
    return verdict({"methods": rows, "controls": lines}, rows[1])


def test_a_method_that_equals_its_controls_rarely_gets_a_word():
    rng, runs = np.random.default_rng(2), 200
    single = words = 0
    for seed in range(runs):
        lines = lines_of(rng, 100, seed)
        assert len(lines) == 3
        single += any(line["verdict"] != "same" for line in lines)
        words += word(lines) != "unclear"
    by_chance = 1.64 * math.sqrt(runs * 0.05 * 0.95)
    assert words <= 0.05 * runs + by_chance < single, "each line is right in 95 % of runs, all three together are not"


def test_a_method_that_equals_none_is_rarely_called_a_trade_off():
    rng, runs = np.random.default_rng(4), 300
    figures = [(figure.key, figure.statistic) for figure in Chair.figures if figure.headline]
    single = words = 0
    for seed in range(runs):
        images = rng.normal(1, 1, 100)
        none, method = (counted(captions(rng, images, 0.0)[0], rng.integers(1, MENTIONS + 1, 100)) for _ in range(2))
        found = {
            key: interval_dict(statistic.difference(method, none, seed=seed, n_resamples=400))
            for key, statistic in figures
        }
        single += any(is_certain(difference) for difference in found.values())
        line = {"method": "m", "control": "early stop", "metric": "chair.chair_i", "verdict": "same"}
        words += word([{**line, "difference": dict(found["chair.chair_i"])}], found) == "trade-off"
    assert words <= 0.05 * runs + 1.64 * math.sqrt(runs * 0.05 * 0.95) < single


def test_a_better_method_still_gets_its_word():
    rng = np.random.default_rng(3)
    assert [word(lines_of(rng, 150, seed, skill=1.5)) for seed in range(5)] == ["better"] * 5
