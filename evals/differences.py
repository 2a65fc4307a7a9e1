"""The paired difference of two tables in one figure, whichever way its interval is made."""

from __future__ import annotations

from typing import Any

from .auc import paired_auc
from .columns import Metric
from .intervals import CONFIDENCE, RESAMPLES, Interval
from .metrics.pope import auc
from .stats import STATISTICS, paired_bootstrap


def value(metric: Metric, table: Any) -> float:
    """The figure of a whole table, NaN where it is not defined.

    Args:
        metric: The figure.
        table: A benchmark's table, or one loaded from ``counts.json``.
    """
    if metric.name == "auc":
        return auc(table.score, table.label)
    return STATISTICS[metric.benchmark][metric.name].of(table)


def difference(metric: Metric, table: Any, other: Any, seed: int) -> Interval:
    """Paired interval of ``table``'s figure minus ``other``'s, over resampled images.

    Args:
        metric: The figure; its benchmark names the statistics (``stats.STATISTICS``).
        table: The method's table.
        other: The baseline's, about the same images.
        seed: Seed of the bootstrap.
    """
    if metric.name == "auc":
        return paired_auc(table, other, seed=seed)
    statistic = STATISTICS[metric.benchmark][metric.name]
    return paired_bootstrap(statistic, table, other, n_resamples=RESAMPLES, seed=seed, confidence=CONFIDENCE)
