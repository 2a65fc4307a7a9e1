"""McNemar's test, bootstrap p-values and Holm's correction against closed forms, enumeration, scipy and statsmodels."""

import itertools
import math

import numpy as np
import pytest
from declared import POPE_STATISTICS

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.yes_no import score_labels
from vlmfix.evals.stats.bootstrap import percentile_interval
from vlmfix.evals.stats.tests import holm, holm_by_name, mcnemar


def labelled(answers):
    return score_labels([True] * len(answers), answers, image_ids=range(len(answers)))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (5, 1), (2, 9), (0, 12)])
def test_mcnemar_equals_enumeration(only_a, only_b):
    n = only_a + only_b
    a = labelled(["Yes"] * only_a + ["No"] * only_b + ["Yes", "No"])
    b = labelled(["No"] * only_a + ["Yes"] * only_b + ["Yes", "No"])
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (only_a, only_b)
    extreme = [abs(sum(flips) - n / 2) >= abs(only_a - n / 2) for flips in itertools.product((0, 1), repeat=n)]
    assert result.p_value == pytest.approx(np.mean(extreme), abs=1e-15)


def test_mcnemar_of_many_questions_stays_exact():
    a, b = labelled(["Yes"] * 2100 + ["No"] * 1900), labelled(["No"] * 2100 + ["Yes"] * 1900)
    z = (200 - 1) / math.sqrt(4000)  # normal approximation with continuity correction
    assert mcnemar(a, b).p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


def test_mcnemar_needs_the_same_questions():
    with pytest.raises(DataError, match="same questions"):
        mcnemar(labelled(["Yes", "No"]), labelled(["Yes"]))
    with pytest.raises(DataError, match="same questions"):
        mcnemar(labelled(["Yes"]), score_labels([False], ["Yes"], image_ids=[0]))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (3, 3), (7, 19), (40, 25), (300, 250)])
def test_mcnemar_equals_scipy_and_statsmodels(only_a, only_b):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    a = labelled(["Yes"] * only_a + ["No"] * only_b + ["Yes", "No"])
    b = labelled(["No"] * only_a + ["Yes"] * only_b + ["Yes", "No"])
    ours = mcnemar(a, b).p_value
    assert ours == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue, rel=1e-10)
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    assert ours == pytest.approx(tables.mcnemar([[1, only_a], [only_b, 1]], exact=True).pvalue, rel=1e-10)


@pytest.mark.parametrize("n", [1, 5, 12])
def test_mcnemar_of_one_sided_disagreement_in_closed_form(n):
    assert mcnemar(labelled(["Yes"] * n), labelled(["No"] * n)).p_value == min(1.0, 2 * 0.5**n)


# Bootstrap p-values


def interval(draws, confidence=0.95):
    return percentile_interval(float(np.mean(draws)), np.asarray(draws, float), 10, confidence, difference=True)


@pytest.mark.parametrize("shift", [-2.5, -1.9, -0.3, 0.0, 0.4, 1.7, 2.2])
def test_p_value_is_where_the_interval_touches_zero(shift):
    draws = np.round(np.random.default_rng(3).normal(shift, 1, 2000), 2)  # rounding makes ties, some of them at zero
    p = interval(draws).p_value
    for alpha in (0.001, 0.01, 0.05, 0.1, 0.3, 0.7, p - 1e-6, p + 1e-6):
        if 2 / 2001 < alpha < 1:
            assert interval(draws, 1 - alpha).excludes_zero == (p < alpha)


def test_p_value_of_normal_draws_is_the_normal_one():
    draws = np.random.default_rng(0).normal(2.0, 1, 200_000)
    assert interval(draws).p_value == pytest.approx(math.erfc(2 / math.sqrt(2)), rel=0.03)


def test_p_value_limits():
    assert interval(np.ones(999)).p_value == 2 / 1000, "never zero: the resamples are finitely many"
    assert interval(np.zeros(999)).p_value == 1.0
    assert interval([-1.0, 1.0] * 500).p_value == pytest.approx(1.0, abs=2e-3)
    assert math.isnan(percentile_interval(1.0, np.ones(9), 10, 0.95).p_value), "a single figure has no null hypothesis"
    assert math.isnan(interval([math.nan] * 3).p_value)


def test_p_values_under_the_null_are_uniform():
    """Two equally skilled sets of answers: p < 0.1 in a tenth of the experiments, within chance."""
    rng = np.random.default_rng(1)
    accuracy = POPE_STATISTICS["accuracy"]
    p = []
    for _ in range(300):
        a, b = (labelled(["Yes" if right else "No" for right in rng.random(80) < 0.7]) for _ in range(2))
        p.append(accuracy.difference(a, b, n_resamples=400).p_value)
    assert 0.05 < np.mean(np.array(p) < 0.1) < 0.17


# Holm


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_ignores_what_is_no_test():
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[0] == 0.04 and math.isnan(adjusted[1]) and adjusted[2] == 0.04
    assert holm_by_name({"a": 0.02, "b": None, "c": 0.03}) == {"a": 0.04, "b": None, "c": 0.04}


def test_holm_rejects_what_the_step_down_rule_rejects():
    """Reject from the smallest p on while the k-th is at most alpha / (m - k + 1)."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = np.round(rng.random(rng.integers(1, 8)) ** 3, 3)
        rejected = set()
        for k, i in enumerate(np.argsort(p, kind="stable")):
            if p[i] > 0.05 / (len(p) - k):
                break
            rejected.add(int(i))
        assert {i for i, value in enumerate(holm(p.tolist())) if value <= 0.05 + 1e-12} == rejected


def test_holm_equals_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    p = np.random.default_rng(2).random(9) ** 4
    assert holm(p.tolist()) == pytest.approx(multitest.multipletests(p, method="holm")[1].tolist(), abs=1e-12)


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(DataError, match="between 0 and 1"):
        holm([0.1, 1.2])
