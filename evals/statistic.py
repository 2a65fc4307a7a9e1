"""Figures that depend on a table only through sums over its rows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .intervals import FloatArray


class Table(Protocol):
    """One row per caption or question; ``image_ids`` int64 [n] is the image of each row."""

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """The image of each row."""


@dataclass(frozen=True)
class Statistic:
    """A figure that depends on a table only through sums of columns.

    Attributes:
        name: Its name in the table's ``summary()``.
        columns: Table -> float64 [n, k], one row per caption or question.
        value: Sums float64 [..., k] -> the figure, float64 [...].
    """

    name: str
    columns: Callable[[Any], FloatArray]
    value: Callable[[FloatArray], FloatArray]

    def of(self, table: Table) -> float:
        """The figure of a whole table."""
        return float(self.value(self.columns(table).sum(axis=0)))


def columns(*parts: ArrayLike) -> FloatArray:
    """Stack columns [n] to float64 [n, k]."""
    return np.column_stack([np.asarray(part, dtype=np.float64) for part in parts])


def ratio(
    name: str,
    numerator: Callable[[Any], ArrayLike],
    denominator: Callable[[Any], ArrayLike],
    *,
    empty: float = math.nan,
) -> Statistic:
    """The statistic sum(numerator) / sum(denominator).

    Args:
        name: Its name.
        numerator: Table -> [n].
        denominator: Table -> [n].
        empty: Its value where the denominator sums to zero.
    """
    return Statistic(
        name,
        lambda table: columns(numerator(table), denominator(table)),
        lambda s: divide(s[..., 0], s[..., 1], empty),
    )


def divide(numerator: FloatArray, denominator: FloatArray, empty: float) -> FloatArray:
    """``numerator / denominator``, and ``empty`` where the denominator is zero."""
    zero = denominator == 0
    return np.where(zero, empty, numerator / np.where(zero, 1.0, denominator))


def one(table: Table) -> FloatArray:
    """One per row, [n]."""
    return np.ones(len(table.image_ids))


def by_name(*statistics: Statistic) -> Mapping[str, Statistic]:
    """Statistics under their names."""
    return MappingProxyType({statistic.name: statistic for statistic in statistics})
