"""The paired interval of an AUC: not a function of sums over rows, so that it has a bootstrap of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .intervals import CONFIDENCE, RESAMPLES, Interval, percentile_interval
from .metrics.pope import PopeTable


def paired_auc(table: PopeTable, other: PopeTable, *, seed: int = 0) -> Interval:
    """Paired interval of an AUC difference: images are resampled, and each question weighs as often as its image.

    Args:
        table: Answers with scores, float64 [n].
        other: Answers with scores to the same questions in the same order.
        seed: Seed of the resampling.

    Returns:
        Estimate and percentile interval; not defined (NaN ends) with fewer than two images.
    """
    images, inverse = np.unique(table.image_ids, return_inverse=True)
    n = len(images)
    ranked = [ranked_questions(t) for t in (table, other)]
    ones = np.ones((1, n))
    estimate = float(np.subtract(*(weighted_auc(r, ones[:, inverse]) for r in ranked))[0])
    rng = np.random.default_rng(seed)
    draws = [np.empty(0)]
    for start in range(0, RESAMPLES if n > 1 else 0, 250):  # Bounds the memory at 250 weights per question.
        count = min(250, RESAMPLES - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)[:, inverse]
        draws.append(np.subtract(*(weighted_auc(r, weights) for r in ranked)))
    return percentile_interval(estimate, np.concatenate(draws), n, CONFIDENCE, difference=True)


def ranked_questions(table: PopeTable) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Questions by rising score: their order, the last index of each one's run of equal scores, and their labels."""
    assert table.score is not None
    order = np.argsort(table.score, kind="stable")
    scores = table.score[order]
    first = np.searchsorted(scores, scores, side="left")
    return order, np.stack([first, np.searchsorted(scores, scores, side="right")]), table.label[order]


def weighted_auc(
    ranked: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUC [k] of weighted questions, weights [k, n]: P(positive above negative), ties counted half."""
    order, (first, last), label = ranked
    sorted_weights = weights[:, order]
    negative = np.where(label, 0.0, sorted_weights)
    positive = sorted_weights - negative
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(negative, axis=1)], axis=1)
    wins = (positive * (below[:, first] + below[:, last]) / 2).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    auc: NDArray[np.float64] = np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
    return auc
