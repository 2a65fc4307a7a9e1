"""FLB: First Logit Boosting (Ha, Baek and So, CVPR 2026, arXiv 2604.00455)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlmfix.decoding.base import AnswerToken, DecodingMethod, cut, plausibility
from vlmfix.methods.parameters import Range, parameter


@dataclass(frozen=True)
class FLB(DecodingMethod):
    """Add the logits of the answer's first token to those of every later one: ``l_t + w_t l_0``.

    ``w_t = gamma (1 - exp(-lam t))`` at token ``t = 0, 1, ...`` of the answer. Only tokens with
    ``l_t >= max l_t + ln(beta)`` may be chosen. No second branch and no further forward is run. The first token is
    plain; its logits hold what the image says, and mostly raise words that begin a sentence.

    The released runs apply the cut to the method only. Compare with ``FLB(gamma=0)``, which is the cut alone.
    """

    name = "flb"
    paper = "arXiv 2604.00455"
    summary = "adds the logits of the answer's first token to those of every later one"
    needs_cache = True
    keeps_first_logits = True
    uses_branch = False

    gamma: float = parameter(
        0.3,
        low=0,
        remark="0: nothing is added",
        search=Range(0.02, 1.0),
        help="Largest weight. Default: the released code's.",
    )
    lam: float = parameter(
        0.05, low=0, search=Range(0.01, 0.5, log=True), help="Growth per token. Default: the released code's."
    )
    beta: float = plausibility(0.1, "Default: the released code's.")

    @property
    def is_identity(self) -> bool:
        """Whether nothing is added and nothing cut."""
        return self.gamma * self.lam == 0 and self.beta == 0

    def combine(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> torch.Tensor:
        """Boost and cut fp32 ``[batch, vocab]``."""
        first = token.first_logits
        assert first is not None
        weight = -self.gamma * math.expm1(-self.lam * (token.number - 1))
        boosted = logits + weight * first.to(logits.device).masked_fill(~first.isfinite().to(logits.device), 0.0)
        return cut(boosted, logits, self.beta)
