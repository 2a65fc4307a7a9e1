"""Paired statistics against closed forms, brute force, and the figures of the tables themselves."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from declared import CHAIR_STATISTICS, POPE_STATISTICS

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.chair.figures import ChairTable, score_captions
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.benchmarks.yes_no import YesNoTable, score_labels
from vlmfix.evals.stats.figures import SumStatistic, share, stacked

OBJECTS = ("dog", "cat", "car", "person", "cup", "chair")


def chair_table(n: int, seed: int, wordy: float = 0.5) -> ChairTable:
    rng = np.random.default_rng(seed)
    truth_rng = np.random.default_rng(99)
    truth = {i: [name for name in OBJECTS if truth_rng.random() < 0.5] or ["dog"] for i in range(n)}
    captions = {
        i: "a " + " and a ".join([name for name in OBJECTS if rng.random() < wordy] or ["tree"]) for i in range(n)
    }
    return score_captions(captions, truth, ChairMatcher())


def pope_table(images: int, seed: int, skill: float = 0.7) -> YesNoTable:
    rng = np.random.default_rng(seed)
    labels = [k % 2 == 0 for _ in range(images) for k in range(6)]
    answers = ["Yes" if label == (rng.random() < skill) else "No" for label in labels]
    return score_labels(labels, answers, image_ids=[i for i in range(images) for _ in range(6)])


def take(table, images):
    """The table of a resample: the rows of each drawn image, as often as it was drawn."""
    return table.take(np.concatenate([np.flatnonzero(table.image_ids == i) for i in images]))


@pytest.mark.parametrize("name", CHAIR_STATISTICS)
def test_chair_statistics_are_the_figures_of_the_table(name):
    table = chair_table(40, seed=1)
    assert CHAIR_STATISTICS[name].of(table) == pytest.approx(table.summary()[name], abs=1e-12)


@pytest.mark.parametrize("name", POPE_STATISTICS)
def test_pope_statistics_are_the_figures_of_the_table(name):
    table = pope_table(20, seed=1)
    assert POPE_STATISTICS[name].of(table) == pytest.approx(table.summary()[name], abs=1e-12)


@pytest.mark.parametrize("parser", ["official", "vlmeval"])
@pytest.mark.parametrize("answer", ["No", "Perhaps"])
def test_pope_statistics_in_the_corners(answer, parser):
    table = score_labels([True, False], [answer, answer], image_ids=[1, 2], parser=parser)
    for name, statistic in POPE_STATISTICS.items():
        assert statistic.of(table) == table.summary()[name], name


def test_undefined_figures_are_nan():
    table = score_captions({1: "a tree"}, {1: ["dog"]}, ChairMatcher())
    assert math.isnan(CHAIR_STATISTICS["chair_i"].of(table))
    assert CHAIR_STATISTICS["chair_s"].of(table) == 0


@pytest.mark.parametrize(
    ("statistics", "make"), [(CHAIR_STATISTICS, chair_table), (POPE_STATISTICS, pope_table)], ids=["chair", "pope"]
)
def test_bootstrap_equals_recomputing_every_resampled_table(statistics, make):
    a, b = make(12, 1, 0.6), make(12, 2, 0.4)
    weights = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=50)
    for name, statistic in statistics.items():
        brute = []
        for row in weights:
            images = np.repeat(np.arange(12), row)
            brute.append(take(a, images).summary()[name] - take(b, images).summary()[name])
        interval = statistic.difference(a, b, n_resamples=50, seed=5)
        assert (interval.low, interval.high) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=1e-12)
        assert interval.estimate == pytest.approx(a.summary()[name] - b.summary()[name], abs=1e-12)
        assert interval.n == 12


def test_bootstrap_quantiles_equal_full_enumeration():
    """Four images have 4^4 equally likely resamples; their exact distribution has the same quantiles."""
    table = score_captions(
        {1: "a dog", 2: "a cat", 3: "a dog, a cat, a cup", 4: "a car and a dog"},
        {i: ["dog"] for i in (1, 2, 3, 4)},
        ChairMatcher(),
    )
    wrong, said = table.hallucinated, table.mentions
    exact = np.sort([wrong[list(i)].sum() / said[list(i)].sum() for i in itertools.product(range(4), repeat=4)])
    interval = CHAIR_STATISTICS["chair_i"].interval(table, n_resamples=40_000, confidence=0.9)
    below = [(exact < interval.low - 1e-12).mean(), (exact > interval.high + 1e-12).mean()]
    upto = [(exact <= interval.low + 1e-12).mean(), (exact >= interval.high - 1e-12).mean()]
    assert max(below) <= 0.05 + 0.01 and min(upto) >= 0.05 - 0.01


def test_interval_of_a_mean_difference_equals_the_closed_form():
    """For a paired difference of means the bootstrap variance is var(d) / n, and the distribution is nearly normal."""
    n = 800
    a, b = chair_table(n, seed=1, wordy=0.7), chair_table(n, seed=2, wordy=0.5)
    difference = (a.words - b.words).astype(float)
    half = 1.959964 * difference.std() / math.sqrt(n)
    interval = CHAIR_STATISTICS["length_words"].difference(a, b, n_resamples=8000)
    assert interval.estimate == pytest.approx(difference.mean(), abs=1e-12)
    assert interval.high - interval.estimate == pytest.approx(half, rel=0.06)
    assert interval.estimate - interval.low == pytest.approx(half, rel=0.06)
    assert interval.excludes_zero


def test_interval_of_a_ratio_agrees_with_the_delta_method():
    n = 800
    table = chair_table(n, seed=3)
    r = CHAIR_STATISTICS["chair_i"].of(table)
    residual = table.hallucinated - r * table.mentions
    error = residual.std() / math.sqrt(n) / table.mentions.mean()
    interval = CHAIR_STATISTICS["chair_i"].interval(table, n_resamples=8000)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.959964 * error, rel=0.06)


def test_intervals_equal_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    a, b = chair_table(150, 1, 0.6), chair_table(150, 2, 0.5)

    def chair_i(wrong_a, said_a, wrong_b, said_b, axis=-1):
        return wrong_a.sum(axis=axis) / said_a.sum(axis=axis) - wrong_b.sum(axis=axis) / said_b.sum(axis=axis)

    samples = (a.hallucinated, a.mentions, b.hallucinated, b.mentions)
    theirs = stats.bootstrap(
        samples, chair_i, paired=True, vectorized=True, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    ours = CHAIR_STATISTICS["chair_i"].difference(a, b, n_resamples=20_000)
    width = ours.high - ours.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * width)


def test_pairing_removes_what_the_images_share():
    a = chair_table(300, seed=4)
    assert CHAIR_STATISTICS["chair_i"].difference(a, a) == CHAIR_STATISTICS["f1"].difference(a, a)
    same = CHAIR_STATISTICS["chair_i"].difference(a, a)
    assert (same.estimate, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)
    assert CHAIR_STATISTICS["chair_i"].interval(a).high > CHAIR_STATISTICS["chair_i"].interval(a).low


def test_images_are_resampled_not_questions():
    """Six copies of one answer per image are worth one answer: the interval must not shrink."""
    images = 60
    right = np.random.default_rng(0).random(images) < 0.7
    once = score_labels([True] * images, ["Yes" if r else "No" for r in right], image_ids=range(images))
    answers = ["Yes" if r else "No" for r in right for _ in range(6)]
    six = score_labels([True] * 6 * images, answers, image_ids=[i for i in range(images) for _ in range(6)])
    accuracy = POPE_STATISTICS["accuracy"]
    a, b = accuracy.interval(once, seed=1), accuracy.interval(six, seed=1)
    assert (b.low, b.high, b.n) == pytest.approx((a.low, a.high, a.n))
    by_question = accuracy.interval(replace(six, image_ids=np.arange(6 * images)), seed=1)
    assert by_question.high - by_question.low < 0.6 * (a.high - a.low)


def test_a_seed_fixes_the_interval():
    a, b = chair_table(50, 1), chair_table(50, 2)
    f1 = CHAIR_STATISTICS["f1"]
    assert f1.difference(a, b, seed=7) == f1.difference(a, b, seed=7)
    assert f1.difference(a, b, seed=7) != f1.difference(a, b, seed=8)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator must stay untouched
    f1.difference(a, b)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_chunking_does_not_change_the_resamples(monkeypatch):
    a, b = chair_table(30, 1), chair_table(30, 2)
    whole = CHAIR_STATISTICS["chair_i"].difference(a, b)
    monkeypatch.setattr("vlmfix.evals.stats.bootstrap._CHUNK", 100)
    assert CHAIR_STATISTICS["chair_i"].difference(a, b) == whole


def test_rows_may_come_in_another_order():
    a, b = pope_table(10, 1), pope_table(10, 2)
    shuffled = take(b, range(9, -1, -1))
    accuracy = POPE_STATISTICS["accuracy"]
    assert accuracy.difference(a, shuffled) == accuracy.difference(a, b)


def test_more_confidence_is_wider_and_no_two_images_no_interval():
    a, b = chair_table(50, 1), chair_table(50, 2)
    wide, narrow = (CHAIR_STATISTICS["f1"].difference(a, b, confidence=c) for c in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    one = CHAIR_STATISTICS["f1"].interval(take(a, [3]))
    assert math.isnan(one.low) and math.isnan(one.high) and one.n == 1


def test_undefined_resamples_are_counted():
    table = score_captions({1: "a dog", 2: "a tree"}, {1: ["cat"], 2: ["cat"]}, ChairMatcher())
    interval = CHAIR_STATISTICS["chair_i"].interval(table, n_resamples=400)
    assert 60 < interval.undefined < 140  # both draws are image 2: a quarter
    assert (interval.low, interval.high) == (1, 1)
    silent = score_captions({1: "a tree", 2: "a tree"}, {1: ["cat"], 2: ["cat"]}, ChairMatcher())
    assert CHAIR_STATISTICS["chair_i"].interval(silent, n_resamples=10).undefined == 10


def test_a_statistic_of_ones_own():
    repeats = share(lambda t: t.mentions - t.distinct, "mentions")
    table = score_captions({1: "a dog and a dog", 2: "a cat"}, {1: [], 2: []}, ChairMatcher())
    assert repeats.of(table) == pytest.approx(1 / 3)
    biggest = SumStatistic(lambda t: stacked(t.mentions), lambda sums: sums[..., 0])
    assert biggest.of(table) == 3


def test_errors():
    a, b = chair_table(5, 1), chair_table(6, 2)
    f1 = CHAIR_STATISTICS["f1"]
    with pytest.raises(DataError, match="same images"):
        f1.difference(a, b)
    with pytest.raises(DataError, match="n_resamples"):
        f1.interval(a, n_resamples=0)
    with pytest.raises(DataError, match="confidence"):
        f1.interval(a, confidence=95)
    with pytest.raises(DataError, match="no rows"):
        f1.interval(a.take([]))
