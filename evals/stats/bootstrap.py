"""Resampled images, and percentile intervals of what is made of them.

Images are resampled, not questions, because the answers about one image are not independent. A resample is a weight per
image: how often it was drawn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

FloatArray = NDArray[np.float64]

RESAMPLES = 2000

CONFIDENCE = 0.95

_CHUNK = 4_000_000  # resampling weights held at once (32 MB)


@dataclass(frozen=True)
class Interval:
    """An estimate with a percentile bootstrap interval.

    Attributes:
        estimate: The figure (or difference) on all images.
        low: Lower end; NaN with fewer than two images.
        high: Upper end; NaN with fewer than two images.
        n: Number of images (clusters).
        undefined: Resamples in which the figure had a zero denominator; they are left out.
        p_value: Of a difference, two-sided: the smallest alpha at which the interval of confidence 1 - alpha excludes
            zero, at least 2 / (resamples + 1). NaN for a single figure, and where there is no interval.
    """

    estimate: float
    low: float
    high: float
    n: int
    undefined: int = 0
    p_value: float = math.nan

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def percentile_interval(
    estimate: float, draws: FloatArray, n: int, confidence: float, *, difference: bool = False
) -> Interval:
    """The percentile interval, and for a difference the p-value, of bootstrap resamples.

    Args:
        estimate: The figure on all images.
        draws: float64 [resamples], NaN where the figure is undefined; empty where nothing was resampled.
        n: Number of images.
        confidence: Coverage of the interval.
        difference: Whether zero means "no difference", so that there is a p-value.
    """
    defined = np.sort(draws[~np.isnan(draws)])
    undefined = len(draws) - len(defined)
    if not len(defined):
        return Interval(estimate, math.nan, math.nan, n, undefined)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    p_value = _inverted(defined) if difference else math.nan
    return Interval(estimate, float(low), float(high), n, undefined, p_value)


def _inverted(draws: FloatArray) -> float:
    """Two-sided p-value by inverting the percentile interval of sorted draws, float64 [k].

    ``np.quantile`` interpolates between the draws, at level i / (k - 1) draw i. The interval at alpha excludes zero iff
    alpha / 2 is below the level up to which the quantiles are >= 0 on one side (<= 0 on the other).
    """
    k = len(draws)
    tails = []
    for side in (draws, -draws[::-1]):
        upto = int(np.searchsorted(side, 0.0, side="right"))  # draws on the wrong side of zero, or on it
        if upto == 0 or upto == k:
            tails.append(upto / k)
        else:
            below, above = side[upto - 1], side[upto]
            tails.append((upto - 1 + (0.0 - below) / (above - below)) / (k - 1))
    return float(min(1.0, max(2 * min(tails), 2 / (k + 1))))


def finite(summary: Mapping[str, float]) -> dict[str, float | None]:
    """A summary for JSON, which has no NaN: undefined figures become null."""
    return {name: None if math.isnan(value) else value for name, value in summary.items()}


def interval_dict(interval: Interval) -> dict[str, Any]:
    """An interval for JSON, undefined numbers as null."""
    return finite(asdict(interval))


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


def resamples(n: int, n_resamples: int, seed: int) -> Iterable[FloatArray]:
    """How often each of n clusters is drawn, in pieces float64 [chunk, n]; the same draws for every chunk size."""
    if n * n_resamples <= _CHUNK:
        return _one_piece(n, n_resamples, seed)
    return _pieces(n, n_resamples, seed)


@functools.lru_cache(maxsize=1)  # every figure of a run is drawn from the same resamples
def _one_piece(n: int, n_resamples: int, seed: int) -> tuple[FloatArray]:
    (weights,) = _pieces(n, n_resamples, seed)
    weights.setflags(write=False)
    return (weights,)


def _pieces(n: int, n_resamples: int, seed: int) -> Iterator[FloatArray]:
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    for start in range(0, n_resamples, chunk):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, n_resamples - start)).astype(np.float64)
