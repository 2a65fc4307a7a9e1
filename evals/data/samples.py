"""What is asked and what is answered, as data, and what answers cost: free of torch, so that scoring starts at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

#: What is noted beside the text: end-token gaps and tokens, the yes-minus-no score, or nothing.
Records = Literal["gaps", "score", "text"]


@dataclass(frozen=True)
class Sample:
    """One thing to ask: a question, about an image or about none.

    Attributes:
        benchmark: Name of its benchmark, such as ``"chair"`` or ``"pope"``.
        image_id: COCO image id, or the number of the image within the benchmark; 0 without an image.
        path: Image file, or None for a question without an image.
        question: What the user would type, without the chat template.
        max_new_tokens: Limit of the answer's length.
        records: What is noted beside the answer's text.
        second: What the user says behind the model's own answer to ``question``; the sample's answer is the one to
            that. None for a single turn.
    """

    benchmark: str
    image_id: int
    path: Path | None
    question: str
    max_new_tokens: int = 16
    records: Records = "score"
    second: str | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells its answer from the others of a method."""
        asked = self.question if self.second is None else f"{self.question}\n\n{self.second}"
        return self.benchmark, self.image_id, asked

    @property
    def first(self) -> Sample:
        """The sample of the first turn."""
        return replace(self, second=None)


@dataclass(frozen=True)
class Answer:
    """What a model said, and the figures recorded on the way.

    Attributes:
        text: Decoded answer without special tokens, stripped.
        tokens: Generated token ids, without the end token.
        truncated: No end token came within the allowed number of new tokens.
        eos_gaps: Per greedy step, the end token's included: largest logit minus the best end-token logit; 0 where the
            model ended. Empty where not recorded.
        score: First-step log-odds of yes against no (logsumexp of the yes tokens minus that of the no tokens), None
            where not recorded or not finite.
        seconds: This answer's share of its batch's wall time in ``generate``, the encoding of its image counted as if
            features were not reused.
        rows: Size of the batch that gave it, where memory was too small for the planned one.
        asked: Log odds of yes of the unpatched model, asked for each object that the answer names; None where it was
            not asked.
        asked_seconds: What asking took.
    """

    text: str
    tokens: tuple[int, ...] = ()
    truncated: bool = False
    eos_gaps: tuple[float, ...] = ()
    score: float | None = None
    seconds: float = 0.0
    rows: int | None = None
    asked: Mapping[str, float] | None = None
    asked_seconds: float = 0.0


#: A method's answers by ``Sample.key``.
Answers = Mapping[tuple[str, int, str], Answer]


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
