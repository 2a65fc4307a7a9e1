"""Controls: what a plain shift of a threshold would have done to the unpatched model.

A method that makes a model say "no" more often, or stop earlier, moves along a trade-off that needs no method. Both
controls start from what the unpatched model already gave (scores and stop margins), so they cost no generation.

**Yes bias (POPE).** Let s_q be the logit of yes minus the logit of no. With a bias b on yes the answer is yes iff s_q +
b > 0. The ranking of the questions, and with it the AUC, does not depend on b; accuracy and F1 do. The bias is chosen
so that the yes-ratio is the method's.

**Early stop (CHAIR).** See :mod:`vlmfix.evals.early_stop`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from .metrics.pope import PopeTable, score_logits


@dataclass(frozen=True, eq=False)
class YesBiasControl:
    """The unpatched model's answers under a bias on yes.

    Attributes:
        bias: Added to the logit of yes.
        target_yes_ratio: What was asked for; ``table.summary()["yes_ratio"]`` is what ties allow.
        table: Answers under the bias; its scores, and so its AUC, are the unpatched model's.
    """

    bias: float
    target_yes_ratio: float
    table: PopeTable


def yes_bias_control(baseline: PopeTable, target_yes_ratio: float) -> YesBiasControl:
    """Shift the unpatched model's yes/no decision until it says yes as often as a method does.

    Answers are taken from the scores alone. Equal scores cannot be parted, so the yes-ratio is the nearest possible
    one; of two equally near ones, and of all biases that give it, the one closest to zero is taken (zero itself, or the
    middle between two scores).

    Args:
        baseline: Answers of the unpatched model with scores (logit of yes minus logit of no, float64 [n]).
        target_yes_ratio: Share of yes answers to match, 0 to 1.

    Raises:
        DataError: the table has no scores, or the target is not in [0, 1].
    """
    if baseline.score is None:
        raise DataError("the yes-bias control needs yes/no scores: run the baseline with scores stored")
    if not 0 <= target_yes_ratio <= 1:
        raise DataError(f"the target yes-ratio must be between 0 and 1, not {target_yes_ratio}")
    levels, counts = np.unique(baseline.score, return_counts=True)
    levels, counts = levels[::-1], counts[::-1]
    said_yes = np.concatenate([[0], np.cumsum(counts)])  # with the j highest levels as yes
    thresholds = [_threshold(levels, j) for j in range(len(levels) + 1)]
    distance = np.abs(said_yes - target_yes_ratio * len(baseline))
    best = min(range(len(thresholds)), key=lambda j: (distance[j], abs(thresholds[j])))
    bias = 0.0 - thresholds[best]
    table = score_logits(
        baseline.label.tolist(),
        baseline.score.tolist(),
        image_ids=baseline.image_ids.tolist(),
        question_ids=baseline.question_ids,
        bias=bias,
    )
    return YesBiasControl(bias, target_yes_ratio, table)


def _threshold(levels: NDArray[np.float64], j: int) -> float:
    """A threshold that exactly the j highest levels exceed, zero if possible; ``levels`` descend."""
    upper = float(levels[j - 1]) if j else np.inf
    lower = float(levels[j]) if j < len(levels) else -np.inf
    if lower <= 0 < upper:
        return 0.0
    if j == 0:
        return lower
    if j == len(levels):
        return upper - max(1.0, abs(upper) * 1e-6)
    middle = (lower + upper) / 2
    return middle if lower <= middle < upper else lower
