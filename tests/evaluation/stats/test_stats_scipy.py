"""The statistics of a run against scipy and statsmodels, and intervals against how often they should be right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from declared import CHAIR_STATISTICS, POPE_STATISTICS, TEXT_STATISTICS
from test_stats import chair_table, pope_table

from vlmfix.evals.benchmarks.chair.text_quality import score_texts
from vlmfix.evals.benchmarks.yes_no import YesNoTable, score_labels
from vlmfix.evals.power import detectable
from vlmfix.evals.stats.figures import Auc, SumStatistic
from vlmfix.evals.stats.tests import holm, mcnemar

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


def image_sums(statistic: SumStatistic, table: Any) -> np.ndarray:
    """The statistic's columns, summed per image: float64 [images, k]."""
    rows = statistic.columns(table)
    ids, inverse = np.unique(table.image_ids, return_inverse=True)
    sums = np.zeros((len(ids), rows.shape[1]))
    np.add.at(sums, inverse, rows)
    return sums


@pytest.mark.parametrize(
    ("statistics", "make", "name"),
    [(CHAIR_STATISTICS, chair_table, name) for name in CHAIR_STATISTICS]
    + [(POPE_STATISTICS, pope_table, name) for name in POPE_STATISTICS],
)
def test_every_paired_interval_is_scipys(statistics: Any, make: Any, name: str) -> None:
    """scipy's paired percentile bootstrap resamples the images of both tables together, as ours does."""
    statistic = statistics[name]
    a, b = make(120, 1, 0.6), make(120, 2, 0.5)
    columns = [*image_sums(statistic, a).T, *image_sums(statistic, b).T]
    k = len(columns) // 2

    def difference(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        sums = np.stack([column.sum(axis=axis) for column in drawn], axis=-1)
        return statistic.value(sums[..., :k]) - statistic.value(sums[..., k:])

    options = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": 10_000}
    theirs = scipy_stats.bootstrap(columns, difference, rng=1, **options).confidence_interval
    ours = statistic.difference(a, b, n_resamples=10_000)
    width = ours.high - ours.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


def scored(n: int, seed: int, skill: float) -> YesNoTable:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 0
    scores = np.round(skill * labels + rng.normal(size=n), 1)  # rounding makes ties
    return score_labels(labels.tolist(), ["Yes"] * n, image_ids=range(n), scores=scores.tolist())


def test_paired_auc_interval_is_scipys() -> None:
    a, b = scored(90, 1, 1.5), scored(90, 2, 0.8)
    label = np.asarray(a.label)

    def area(scores: np.ndarray, chosen: np.ndarray) -> float:
        yes, no = scores[chosen > 0.5], scores[chosen < 0.5]
        return float(scipy_stats.mannwhitneyu(yes, no).statistic / (len(yes) * len(no)))

    def difference(first: np.ndarray, second: np.ndarray, chosen: np.ndarray) -> float:
        return area(first, chosen) - area(second, chosen)

    samples = (a.score, b.score, label)
    options = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 2000}
    theirs = scipy_stats.bootstrap(samples, difference, rng=1, **options).confidence_interval
    ours = Auc().difference(a, b)
    assert ours.estimate == pytest.approx(difference(*samples), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * (ours.high - ours.low))


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4])
def test_p_value_of_a_mean_difference_is_that_of_the_paired_t_test(shift: float) -> None:
    """For a mean of many images the bootstrap distribution is normal, and the t distribution nearly so."""
    n, rng = 500, np.random.default_rng(4)
    own = np.round(rng.normal(20 + shift, 3, n)).astype(int)
    other = np.round(rng.normal(20, 3, n)).astype(int)
    tables = [
        score_texts({i: " ".join(["w"] * int(words)) for i, words in enumerate(lengths)}) for lengths in (own, other)
    ]
    mean = SumStatistic(lambda t: np.column_stack([t.four_grams, np.ones(len(t))]), lambda s: s[..., 0] / s[..., 1])
    ours = mean.difference(*tables, n_resamples=20_000)
    theirs = scipy_stats.ttest_rel(own, other).pvalue
    assert ours.p_value == pytest.approx(theirs, rel=0.2, abs=2e-4)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 experiments of 80 images with a known difference of rates; 95 % intervals, within chance of a few percent."""
    rng, accuracy, hits = np.random.default_rng(0), POPE_STATISTICS["accuracy"], 0
    for seed in range(300):
        common = rng.random(80)
        right = [np.where(rng.random(80) < 0.5, common, rng.random(80)) < rate for rate in (0.8, 0.7)]
        a, b = (score_labels([True] * 80, ["Yes" if r else "No" for r in row], image_ids=range(80)) for row in right)
        found = accuracy.difference(a, b, n_resamples=400, seed=seed)
        hits += found.low <= 0.1 <= found.high
    assert 0.91 < hits / 300 < 0.985


@pytest.mark.parametrize("seed", range(3))
def test_text_statistics_are_the_rates_of_the_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = {i: " ".join(rng.choice(["a", "b", "c"], rng.integers(0, 14))) for i in range(30)}
    table = score_texts(texts, {i: bool(rng.random() < 0.3) for i in texts})
    for name, statistic in TEXT_STATISTICS.items():
        assert statistic.of(table) == pytest.approx(table.summary()[name], abs=1e-12), name


# statsmodels


@pytest.mark.parametrize("seed", range(4))
def test_mcnemar_and_holm_of_several_methods_are_statsmodels(seed: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    rng = np.random.default_rng(seed)
    right = rng.random((6, 150)) < rng.uniform(0.5, 0.9, (6, 1))
    made = [score_labels([True] * 150, ["Yes" if r else "No" for r in row], image_ids=range(150)) for row in right]
    ours, theirs = [], []
    for row, table in zip(right[1:], made[1:], strict=True):
        cells = [[int((row & right[0]).sum()), int((row & ~right[0]).sum())]]
        cells.append([int((~row & right[0]).sum()), int((~row & ~right[0]).sum())])
        ours.append(mcnemar(table, made[0]).p_value)
        theirs.append(tables.mcnemar(cells, exact=True).pvalue)
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert holm(ours) == pytest.approx(multitest.multipletests(theirs, method="holm")[1].tolist(), rel=1e-9)


@pytest.mark.parametrize("methods", [1, 4, 15])
@pytest.mark.parametrize("wanted", [0.8, 0.95])
def test_power_is_statsmodels_at_the_corrected_level(methods: int, wanted: float) -> None:
    power = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is not installed")
    n, deviation = 300, 0.4
    found = detectable(deviation, n, power=wanted, methods=methods)
    options = {"effect_size": found / deviation, "alpha": 0.05 / methods, "ratio": 0, "alternative": "two-sided"}
    assert power.NormalIndPower().power(nobs1=n, **options) == pytest.approx(wanted, abs=1e-4)
    assert power.NormalIndPower().solve_power(power=wanted, **options) == pytest.approx(n, rel=1e-3)
