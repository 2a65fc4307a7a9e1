"""What a method's answers cost, and how many differ from the baseline's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.samples import Answer, Answers, Sample


def effort(samples: Sequence[Sample], answers: Answers, baseline: Answers) -> dict[str, Any]:
    """``changed``, ``seconds`` and ``pace`` of a method's answers."""
    keys = [sample.key for sample in samples]
    return {
        "changed": sum(_said(answers[key]) != _said(baseline[key]) for key in keys),
        "seconds": round(sum(answers[key].seconds for key in keys), 3),
        "pace": pace([(answers[key].seconds, baseline[key].seconds) for key in keys]),
    }


def pace(pairs: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """How long a method takes as a multiple of the baseline: the ratio of a batch's times, over batches.

    A batch is answered by all methods in turn, so that what else the machine does cancels, and a median does not mind
    the batches where it does not. Answers of one batch have equal times.

    Args:
        pairs: Of each answer, the method's seconds and the baseline's.

    Returns:
        ``median``, ``quartiles`` and the number of ``batches``; None without times.
    """
    ratios = [own / other for own, other in dict.fromkeys(pairs) if other > 0]
    if not ratios:
        return None
    low, middle, high = (round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return {"median": middle, "quartiles": [low, high], "batches": len(ratios)}


def _said(answer: Answer) -> tuple[Any, ...]:
    return answer.tokens, answer.text, answer.score
