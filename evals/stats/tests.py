"""Tests beside the bootstrap: McNemar's for paired answers, and Holm's correction for several comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmfix.errors import DataError


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of two sets of answers to the same questions.

    Attributes:
        only_a: Questions that only the first answers right.
        only_b: Questions that only the second answers right.
        p_value: Two-sided; 1 if there is no such question.
    """

    only_a: int
    only_b: int
    p_value: float


def mcnemar(table_a: Any, table_b: Any) -> McNemar:
    """Exact McNemar test between two tables of yes/no answers to the same questions in the same order.

    Of the questions that only one of the two answers right, the first one's share is Binomial(1/2) if both are equally
    good: p = min(1, 2 * P(X <= min(only_a, only_b))). It takes questions as independent; the intervals do
    not.

    Raises:
        DataError: the tables are not about the same questions in the same order.
    """
    if table_a.question_ids != table_b.question_ids or not np.array_equal(table_a.label, table_b.label):
        raise DataError(
            "the two tables are not about the same questions in the same order: score both methods on one question list"
        )
    right_a, right_b = np.asarray(table_a.correct), np.asarray(table_b.correct)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    n = only_a + only_b
    # Integers keep it exact for any n; Python divides big integers without overflow.
    ways, tail = 1, 0
    for i in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm's step-down procedure (Scand. J. Statist. 6:65-70, 1979), in the order given.

    With m p-values in rising order, the k-th (from 1) is multiplied by m - k + 1, made at least as large as the one
    before, and capped at 1. Rejecting what stays below alpha keeps the chance of any false rejection at alpha, however
    the comparisons depend on each other. NaN (no test) stays NaN and does not count.

    Args:
        p_values: Each 0 to 1, or NaN.

    Raises:
        DataError: A p-value outside [0, 1].
    """
    for p in p_values:
        if not (math.isnan(p) or 0 <= p <= 1):
            raise DataError(f"a p-value must lie between 0 and 1, found {p}")
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def holm_by_name(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """:func:`holm` for named p-values, None standing for no test."""
    given = [math.nan if p is None else p for p in p_values.values()]
    return {name: None if math.isnan(value) else value for name, value in zip(p_values, holm(given), strict=True)}
