"""Paired statistics of two methods on the same images.

Images are resampled, not questions, because the answers about one image are not independent. A resample is a weight per
image: how often it was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from vlmfix.errors import DataError

from .intervals import CONFIDENCE, RESAMPLES, FloatArray, Interval, percentile_interval

_CHUNK = 4_000_000  # resampling weights held at once (32 MB)


class Weighted(Protocol):
    """A figure that is known for every choice of images (see ``figures.Statistic``)."""

    def of(self, table: Any, /) -> float:
        """The figure of a whole table."""

    def weighted(self, table: Any, weights: FloatArray, /) -> FloatArray:
        """The figure when each image counts as often as ``weights``, float64 [k, images], say: float64 [k]."""


def paired_bootstrap(
    statistic: Weighted,
    table_a: Any,
    table_b: Any,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Interval of the difference ``statistic(table_a) - statistic(table_b)``: the method first, the baseline second.

    Both tables are resampled with the same images, so what makes an image hard cancels.

    Args:
        statistic: The figure.
        table_a: Table of the method.
        table_b: Table of the baseline: the same images, and as many rows of each.
        n_resamples: Bootstrap resamples.
        seed: Of the resampling; the result is a function of the arguments.
        confidence: Coverage of the percentile interval.

    Raises:
        DataError: the tables are empty or not about the same images, or a number is out of range.
    """
    n = _images(table_a)
    if not np.array_equal(np.sort(table_a.image_ids), np.sort(table_b.image_ids)):
        raise DataError(
            f"the two tables are not about the same images ({n} and {_images(table_b)} images, "
            f"{len(table_a.image_ids)} and {len(table_b.image_ids)} rows): score both methods on the same ids"
        )

    def difference(weights: FloatArray) -> FloatArray:
        return statistic.weighted(table_a, weights) - statistic.weighted(table_b, weights)

    draws = drawn(difference, n, n_resamples=n_resamples, seed=seed, confidence=confidence)
    return percentile_interval(statistic.of(table_a) - statistic.of(table_b), draws, n, confidence, difference=True)


def bootstrap(
    statistic: Weighted,
    table: Any,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Interval of one figure of one table; arguments and errors as in :func:`paired_bootstrap`."""
    n = _images(table)

    def figure(weights: FloatArray) -> FloatArray:
        return statistic.weighted(table, weights)

    draws = drawn(figure, n, n_resamples=n_resamples, seed=seed, confidence=confidence)
    return percentile_interval(statistic.of(table), draws, n, confidence)


def _images(table: Any) -> int:
    if not len(table.image_ids):
        raise DataError("a table has no rows: there is nothing to compare")
    return len(np.unique(table.image_ids))


def drawn(
    figure: Callable[[FloatArray], FloatArray],
    n: int,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> FloatArray:
    """A figure in every resample of n images, float64 [n_resamples]; empty with fewer than two images.

    Args:
        figure: From weights float64 [k, n] to the figure, float64 [k].
        n: Images.
        n_resamples: Bootstrap resamples.
        seed: Of the resampling.
        confidence: Checked only.

    Raises:
        DataError: A number is out of range.
    """
    if n_resamples < 1 or not 0 < confidence < 1:
        raise DataError(f"expected n_resamples >= 1 and 0 < confidence < 1, found {n_resamples} and {confidence}")
    if n < 2:
        return np.empty(0)
    return np.concatenate([figure(weights) for weights in resamples(n, n_resamples, seed)])


def resamples(n: int, n_resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each of n clusters is drawn, in pieces float64 [chunk, n]; the same draws for every chunk size."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    for start in range(0, n_resamples, chunk):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, n_resamples - start)).astype(np.float64)
