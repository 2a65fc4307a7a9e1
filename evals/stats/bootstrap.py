"""Paired statistics of two methods on the same images.

Every figure of CHAIR and POPE is a function of sums over rows (captions or questions): sum the rows of an image,
resample the images, and recompute the figure from the resampled sums. One matrix product does all resamples. Images,
not questions, are resampled, because the answers about one image are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmfix.errors import DataError

from .intervals import CONFIDENCE, RESAMPLES, FloatArray, Interval, Statistic, Table, interval_dict, percentile_interval

_CHUNK = 4_000_000  # resampling weights held at once (32 MB)


def paired_bootstrap(
    statistic: Statistic,
    table_a: Table,
    table_b: Table,
    *,
    clusters: ArrayLike | None = None,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Interval of the difference ``statistic(table_a) - statistic(table_b)``: the method first, the baseline second.

    Both tables are resampled with the same images, so what makes an image hard cancels.

    Args:
        statistic: For example ``CHAIR_STATISTICS["chair_i"]``.
        table_a: Table of the method.
        table_b: Table of the baseline: the same images, and as many rows of each.
        clusters: [n], what to resample, one label per row of both tables, whose rows must then be in the same order.
            Default: their ``image_ids``.
        n_resamples: Bootstrap resamples.
        seed: Of the resampling; the result is a function of the arguments.
        confidence: Coverage of the percentile interval.

    Raises:
        DataError: the tables are empty or not about the same images, or a number is out of range.
    """
    keys_a = _keys(table_a, clusters)
    keys_b = _keys(table_b, clusters)
    if not np.array_equal(np.sort(keys_a), np.sort(keys_b)):
        raise DataError(
            f"the two tables are not about the same images ({len(np.unique(keys_a))} and {len(np.unique(keys_b))} "
            f"images, {len(keys_a)} and {len(keys_b)} rows): score both methods on the same ids"
        )
    a = _cluster_sums(statistic, table_a, keys_a)
    b = _cluster_sums(statistic, table_b, keys_b)

    def difference(sums: FloatArray) -> FloatArray:
        return statistic.value(sums[..., : a.shape[1]]) - statistic.value(sums[..., a.shape[1] :])

    found = _bootstrap(np.concatenate([a, b], axis=1), difference, n_resamples, seed, confidence)
    return percentile_interval(*found, confidence, difference=True)


def bootstrap(
    statistic: Statistic,
    table: Table,
    *,
    clusters: ArrayLike | None = None,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Interval of one figure of one table; arguments and errors as in :func:`paired_bootstrap`."""
    sums = _cluster_sums(statistic, table, _keys(table, clusters))
    return percentile_interval(*_bootstrap(sums, statistic.value, n_resamples, seed, confidence), confidence)


def _keys(table: Table, clusters: ArrayLike | None) -> NDArray[Any]:
    n = len(table.image_ids)
    if not n:
        raise DataError("a table has no rows: there is nothing to compare")
    keys = np.asarray(table.image_ids if clusters is None else clusters)
    if keys.shape != (n,):
        raise DataError(f"expected one cluster label per row ({n}), found shape {keys.shape}")
    return keys


def _cluster_sums(statistic: Statistic, table: Table, keys: NDArray[Any]) -> FloatArray:
    """Column sums per cluster, float64 [clusters, k], clusters in sorted order."""
    rows = statistic.columns(table)
    unique, inverse = np.unique(keys, return_inverse=True)
    sums = np.zeros((len(unique), rows.shape[1]))
    np.add.at(sums, inverse, rows)
    return sums


def _bootstrap(
    sums: FloatArray, value: Callable[[FloatArray], FloatArray], n_resamples: int, seed: int, confidence: float
) -> tuple[float, FloatArray, int]:
    """The figure, its resamples float64 [n_resamples] (none with fewer than two clusters), and the clusters' number."""
    if n_resamples < 1 or not 0 < confidence < 1:
        raise DataError(f"expected n_resamples >= 1 and 0 < confidence < 1, found {n_resamples} and {confidence}")
    n = len(sums)
    estimate = float(value(sums.sum(axis=0)))
    if n < 2:
        return estimate, np.empty(0), n
    return estimate, np.concatenate([value(weights @ sums) for weights in resamples(n, n_resamples, seed)]), n


def resamples(n: int, n_resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each of n clusters is drawn, in pieces float64 [chunk, n]; the same draws for every chunk size."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    for start in range(0, n_resamples, chunk):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, n_resamples - start)).astype(np.float64)


def _difference(statistic: Statistic, own: Any, other: Any, seed: int) -> dict[str, Any]:
    return interval_dict(
        paired_bootstrap(statistic, own, other, n_resamples=RESAMPLES, seed=seed, confidence=CONFIDENCE)
    )
