"""What is asked and what is answered, as data: free of torch, so that scoring starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One thing to ask: an image and a question.

    Attributes:
        benchmark: ``"chair"`` or ``"pope"``.
        image_id: COCO image id.
        path: Image file.
        question: What the user would type, without the chat template.
    """

    benchmark: str
    image_id: int
    path: Path
    question: str


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
        seconds: This answer's share of its batch's wall time in ``generate``.
    """

    text: str
    tokens: tuple[int, ...]
    truncated: bool
    eos_gaps: tuple[float, ...]
    score: float | None
    seconds: float
