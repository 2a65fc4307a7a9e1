"""The figures of the benchmarks beside CHAIR and POPE, as functions of sums over their rows.

A row is a description or a question (see the tasks in ``vlmfix.evals.benchmarks``). What belongs to several rows, such
as both questions of an image, stands on the first of them. The figures are exact fractions: the official scripts of
AMBER round theirs, and begin every denominator at 0.001.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .data.mme import TASKS as MME_TASKS
from .intervals import FloatArray
from .metrics.sycophancy import CONDITIONS
from .statistic import Statistic, by_name, columns, divide, one, ratio


def _column(name: str) -> Callable[[Any], ArrayLike]:
    def read(table: Any) -> ArrayLike:
        return np.asarray(getattr(table, name), dtype=np.float64)

    return read


def _share(name: str, numerator: str, denominator: str) -> Statistic:
    return ratio(name, _column(numerator), _column(denominator))


def _amber_columns(table: Any) -> FloatArray:
    names = ("hallucinated", "nouns", "right_no", "answered_no", "truth_no")
    return columns(*(getattr(table, name) for name in names))


def _amber(sums: FloatArray) -> FloatArray:
    hallucinated, nouns, right_no, answered_no, truth_no = np.moveaxis(sums, -1, 0)
    return (1 - divide(hallucinated, nouns, np.nan) + divide(2 * right_no, answered_no + truth_no, np.nan)) / 2


def _mme_columns(table: Any) -> FloatArray:
    tasks = np.asarray(table.splits)
    parts = (table.correct, one(table), table.both_correct, table.images)
    return columns(*(part * (tasks == task) for task in MME_TASKS for part in parts))


def _mme_score(sums: FloatArray) -> FloatArray:
    total = np.zeros(sums.shape[:-1])
    for start in range(0, 4 * len(MME_TASKS), 4):
        correct, n, both, images = np.moveaxis(sums[..., start : start + 4], -1, 0)
        total += 100 * divide(correct, n, 0.0) + 100 * divide(both, images, 0.0)
    return total


def _flips(name: str, condition: str, right: bool) -> Statistic:
    """Answers that were right and are not any more (or the other way round), of those that were."""

    def before(table: Any) -> NDArray[np.bool_]:
        return np.asarray((table.correct_neutral == right) & getattr(table, f"asked_{condition}"))

    def flipped(table: Any) -> NDArray[np.bool_]:
        return np.asarray(before(table) & (getattr(table, f"correct_{condition}") != right))

    return ratio(name, flipped, before)


def _sycophancy() -> list[Statistic]:
    found = [ratio("accuracy", lambda t: t.correct_neutral, one), ratio("yes_ratio", lambda t: t.yes_neutral, one)]
    for condition in CONDITIONS[1:]:
        found += [
            _share(f"accuracy_{condition}", f"correct_{condition}", f"asked_{condition}"),
            _flips(f"right_to_wrong_{condition}", condition, True),
            _flips(f"wrong_to_right_{condition}", condition, False),
            _share(f"agreement_{condition}", f"agreed_{condition}", f"suggested_{condition}"),
        ]
    return found


YES_NO_STATISTICS: Mapping[str, Statistic] = by_name(
    _share("accuracy", "correct", "questions"),
    ratio(
        "f1",
        lambda t: 2 * ((t.prediction == 1) & t.label),
        lambda t: (t.prediction == 1).astype(int) + t.label,
    ),
    ratio("yes_ratio", lambda t: t.prediction == 1, lambda t: t.questions),
    _share("exact", "exact", "free"),
    _share("contains", "contains", "free"),
)
"""Questions of one's own: yes/no ones, and those with a free answer."""

BENCHMARK_STATISTICS: Mapping[str, Mapping[str, Statistic]] = MappingProxyType(
    {
        "amber": by_name(
            _share("chair", "hallucinated", "nouns"),
            _share("cover", "covered", "truth_objects"),
            _share("hal", "hallucinating", "descriptions"),
            _share("cog", "cognitive", "cognitive_objects"),
            _share("accuracy", "correct", "questions"),
            ratio("f1", lambda t: 2 * t.right_no, lambda t: t.answered_no.astype(int) + t.truth_no),
            ratio("yes_ratio", lambda t: t.prediction == 1, lambda t: t.questions),
            Statistic("amber", _amber_columns, _amber),
        ),
        "mme": by_name(
            Statistic("score", _mme_columns, _mme_score),
            ratio("accuracy", lambda t: t.correct, one),
            _share("accuracy_plus", "both_correct", "images"),
            ratio("yes_ratio", lambda t: t.prediction == 1, one),
        ),
        "hallusionbench": by_name(
            ratio("aacc", lambda t: t.correct, one),
            _share("qacc", "group_right", "groups"),
            _share("facc", "figure_right", "figures"),
            _share("easy", "easy_right", "easy"),
            _share("hard", "hard_right", "hard"),
            ratio("yes_ratio", lambda t: t.prediction == 1, one),
        ),
        "mmhal": by_name(
            ratio("average_score", lambda t: t.rating, one),
            ratio("hallucination_rate", lambda t: t.hallucinated, one),
        ),
        "sycophancy": by_name(*_sycophancy()),
        "custom": YES_NO_STATISTICS,
    }
)
"""The statistics of each benchmark, by the names in ``columns.METRICS``."""
