"""Figures as functions of a table: one statistic serves the table, its interval, the controls and the comparison.

A statistic knows no benchmark. It reads the columns of a table (see :mod:`vlmfix.evals.stats.table`) and gives the
figure when every image counts once, or as often as a resample draws it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmfix.errors import DataError

from .bootstrap import CONFIDENCE, FloatArray, Interval, drawn, percentile_interval

_PIECE = 250  # resamples of an AUC at once, which bounds the memory at as many weights per question


class Statistic(ABC):
    """One figure as a function of a table."""

    @abstractmethod
    def weighted(self, table: Any, weights: FloatArray) -> FloatArray:
        """The figure when each image counts several times.

        Args:
            table: One method's table.
            weights: float64 [k, images], how often each image counts; images in the order of their ids.

        Returns:
            float64 [k], NaN where the figure is undefined.
        """

    def is_defined(self, table: Any) -> bool:
        """Whether the table has what the figure is made of; answers that nobody could score have no table (None)."""
        return table is not None

    def of(self, table: Any) -> float:
        """The figure of a whole table, NaN where it is undefined."""
        return float(self.weighted(table, np.ones((1, len(np.unique(table.image_ids)))))[0])

    def interval(self, table: Any, *, confidence: float = CONFIDENCE, **options: Any) -> Interval:
        """Percentile interval of the figure of one table; arguments and errors as of :meth:`difference`."""
        n = _images(table)
        draws = drawn(lambda weights: self.weighted(table, weights), n, confidence=confidence, **options)
        return percentile_interval(self.of(table), draws, n, confidence)

    def difference(self, table: Any, other: Any, *, confidence: float = CONFIDENCE, **options: Any) -> Interval:
        """Paired percentile interval of the table's figure minus another table's, over resampled images.

        Both tables are resampled with the same images, so what makes an image hard cancels.

        Args:
            table: The method's table.
            other: The baseline's: the same images, and as many rows of each.
            confidence: Coverage of the interval.
            options: ``n_resamples`` and ``seed`` of :func:`~vlmfix.evals.stats.bootstrap.drawn`.

        Raises:
            DataError: the tables are empty or not about the same images, or a number is out of range.
        """
        n = _images(table)
        if not np.array_equal(np.sort(table.image_ids), np.sort(other.image_ids)):
            raise DataError(
                f"the two tables are not about the same images ({n} and {_images(other)} images, "
                f"{len(table.image_ids)} and {len(other.image_ids)} rows): score both methods on the same ids"
            )

        def figure(weights: FloatArray) -> FloatArray:
            return self.weighted(table, weights) - self.weighted(other, weights)

        draws = drawn(figure, n, confidence=confidence, **options)
        return percentile_interval(self.of(table) - self.of(other), draws, n, confidence, difference=True)


def _images(table: Any) -> int:
    if not len(table.image_ids):
        raise DataError("a table has no rows: there is nothing to compare")
    return len(np.unique(table.image_ids))


@dataclass(frozen=True)
class SumStatistic(Statistic):
    """A figure that depends on a table only through sums of columns.

    Attributes:
        columns: Table -> float64 [n, k], one row per caption or question.
        value: Sums float64 [..., k] -> the figure, float64 [...].
        needs: Names of columns that not every table has.
    """

    columns: Callable[[Any], FloatArray]
    value: Callable[[FloatArray], FloatArray]
    needs: tuple[str, ...] = ()

    def is_defined(self, table: Any) -> bool:
        """Whether the table has the columns."""
        return table is not None and all(hasattr(table, name) for name in self.needs)

    def weighted(self, table: Any, weights: FloatArray) -> FloatArray:
        """The figure of the weighted sums."""
        return self.value(weights @ sums_per_image(self.columns(table), table.image_ids))

    def of(self, table: Any) -> float:
        """See :meth:`Statistic.of`."""
        return float(self.value(self.columns(table).sum(axis=0)))


class Auc(Statistic):
    """Area under the ROC curve of the column ``score`` (higher means yes) against ``label``."""

    def is_defined(self, table: Any) -> bool:
        """Whether every answer has a score."""
        return table is not None and getattr(table, "score", None) is not None

    def weighted(self, table: Any, weights: FloatArray) -> FloatArray:
        """See :meth:`Statistic.weighted`."""
        _, image = np.unique(table.image_ids, return_inverse=True)
        ranked = _ranked(table.score, table.label)
        pieces = [weights[start : start + _PIECE] for start in range(0, len(weights), _PIECE)]
        return np.concatenate([_weighted_auc(*ranked, piece[:, image]) for piece in pieces])

    def of(self, table: Any) -> float:
        """See :meth:`Statistic.of`."""
        return auc(table.score, table.label)


@dataclass(frozen=True)
class Figure:
    """A figure that a benchmark declares. Everything that is made of it follows from here.

    Attributes:
        name: Its name in summaries, such as ``chair_i``.
        title: Heading of its column.
        better: 1 if more is better, -1 if less is, 0 if neither.
        statistic: How a table gives it.
        percent: Whether it is printed as percent; otherwise as it is.
        column: Whether it is a column of the result table, with its difference to the baseline; otherwise it stands in
            the summaries only.
        control: The control that a method is compared with on this figure: ``"early stop"`` or ``"yes bias"``.
        head_control: Whether a method that scales heads is compared on it with other heads.
        headline: Whether it stands in the short table that a run ends with, and in its sentences.
        ability: Whether it measures ability, not hallucination: a sentence on a method always says what that costs.
        less: What less of it is called in a sentence: ``"fewer invented objects"``.
        more: What more of it is called.
        help: One line that explains it.
        benchmark: Name of its benchmark; set where the benchmark is defined.
    """

    name: str
    title: str
    better: int
    statistic: Statistic
    percent: bool = True
    column: bool = True
    control: str | None = None
    head_control: bool = False
    headline: bool = False
    ability: bool = False
    less: str = ""
    more: str = ""
    help: str = ""
    benchmark: str = ""

    @property
    def key(self) -> str:
        """Its name among those of all benchmarks, such as ``chair.chair_i``."""
        return f"{self.benchmark}.{self.name}"

    @property
    def phrases(self) -> tuple[str, str]:
        """What less and more of it is called in a sentence."""
        return self.less or f"lower {self.full_title}", self.more or f"higher {self.full_title}"

    @property
    def full_title(self) -> str:
        """Title that names its benchmark: ``CHAIR_i``, ``POPE accuracy``."""
        name = self.benchmark.upper()
        return self.title if self.title.startswith(f"{name}_") else f"{name} {self.title}"

    @property
    def heading(self) -> str:
        """The title with an arrow towards the better values."""
        return f"{self.title} {self._arrow}".rstrip()

    @property
    def full_heading(self) -> str:
        """The title that names its benchmark, with the arrow."""
        return f"{self.full_title} {self._arrow}".rstrip()

    @property
    def _arrow(self) -> str:
        return "↓ ↑"[self.better + 1]


def sums_per_image(rows: FloatArray, image_ids: NDArray[np.int64]) -> FloatArray:
    """Sum the rows of each image: float64 [images, k], images in the order of their ids.

    Args:
        rows: float64 [n, k].
        image_ids: int64 [n], the image of each row.
    """
    unique, image = np.unique(image_ids, return_inverse=True)
    return np.stack([np.bincount(image, weights=column, minlength=len(unique)) for column in rows.T], axis=1)


def stacked(*parts: ArrayLike) -> FloatArray:
    """Columns [n] side by side, float64 [n, k]."""
    return np.column_stack([np.asarray(part, dtype=np.float64) for part in parts])


def divide(numerator: FloatArray, denominator: FloatArray, empty: float = math.nan) -> FloatArray:
    """``numerator / denominator``, and ``empty`` where the denominator is zero."""
    zero = denominator == 0
    return np.where(zero, empty, numerator / np.where(zero, 1.0, denominator))


def one(table: Any) -> FloatArray:
    """One per row, [n]."""
    return np.ones(len(table.image_ids))


Column = str | Callable[[Any], ArrayLike]
"""A column of a table: its name, or how it is computed."""


def read_column(column: Column) -> Callable[[Any], ArrayLike]:
    """How a column is read off a table."""
    if callable(column):
        return column
    return lambda table: np.asarray(getattr(table, column), dtype=np.float64)


def share(numerator: Column, denominator: Column = one, *, empty: float = math.nan) -> SumStatistic:
    """The statistic sum(numerator) / sum(denominator).

    Args:
        numerator: A column.
        denominator: Another; by default one per row, which makes a mean.
        empty: Its value where the denominator sums to zero.
    """
    above, below = read_column(numerator), read_column(denominator)
    return SumStatistic(
        lambda table: stacked(above(table), below(table)),
        lambda sums: divide(sums[..., 0], sums[..., 1], empty),
        tuple(column for column in (numerator, denominator) if isinstance(column, str)),
    )


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half.

    Args:
        scores: [n], higher means yes.
        labels: [n].

    Returns:
        0 to 1; NaN if there are no positives or no negatives.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.bool_)
    return float(_weighted_auc(*_ranked(values, positive), np.ones((1, len(positive))))[0])


def _ranked(
    score: FloatArray, label: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Questions by ascending score: their order, the ends of each one's run of equal scores, and their labels."""
    order = np.argsort(score, kind="stable")
    ascending = score[order]
    ends = [np.searchsorted(ascending, ascending, side=side) for side in ("left", "right")]  # type: ignore[call-overload]
    return order, np.stack(ends), label[order]


def _weighted_auc(
    order: NDArray[np.int64], ends: NDArray[np.int64], label: NDArray[np.bool_], weights: FloatArray
) -> FloatArray:
    """AUC [k] of weighted questions, weights [k, n]: P(positive above negative), ties counted half."""
    ascending = weights[:, order]
    negative = np.where(label, 0.0, ascending)
    positive = ascending - negative
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(negative, axis=1)], axis=1)
    wins = (positive * (below[:, ends[0]] + below[:, ends[1]]) / 2).sum(axis=1)
    return divide(wins, positive.sum(axis=1) * negative.sum(axis=1))
