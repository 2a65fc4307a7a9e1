"""M3ID: Multi-Modal Mutual-Information Decoding (Favero et al., CVPR 2024, arXiv 2403.14003)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlmfix.decoding.base import AnswerToken, WithoutImage, plausibility
from vlmfix.methods.parameters import Range, parameter

LARGEST = 1e4
"""The largest weight. Beyond it nothing changes but the risk of infinities: ``exp(0.2 * 200)`` is 2e17."""


@dataclass(frozen=True)
class M3ID(WithoutImage):
    """Contrast the answer with that to the prompt without its image, more with every token: ``l + w_t (l - l')``.

    ``w_t = exp(lam t) - 1`` at token ``t = 1, 2, ...`` of the answer, because the image is forgotten as the text grows.
    Only where the model is not sure: if its likeliest token has a probability of ``alpha`` or more, the logits are its
    own. The other prompt is that of ``guidance``: the text without the image's tokens. In every turn ``t`` begins at 1.

    No code was released. Formula and defaults are those that readers and ports quote from the paper. Ports leave
    the gate out and cut implausible tokens instead: ``M3ID(alpha=1, beta=0.1)``.
    """

    name = "m3id"
    paper = "arXiv 2403.14003"
    summary = "contrasts the answer with that to the prompt without its image, more with every token"
    needs_cache = True
    is_gated = True

    lam: float = parameter(
        0.02, low=0, remark="0: no contrast", search=Range(0.002, 0.2, log=True), help="Growth per token."
    )
    alpha: float = parameter(
        0.3,
        low=0,
        high=1,
        remark="0: never contrast; 1: always",
        search=Range(0.1, 1.0),
        help="Gate: the probability of the likeliest token from which a step is left alone.",
    )
    beta: float = plausibility(0.0, "The paper's formula cuts nothing.")

    @property
    def uses_branch(self) -> bool:
        """Whether any step can be contrasted."""
        return self.lam != 0 and self.alpha != 0

    def weight(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> torch.Tensor:
        """``exp(lam t) - 1`` where the model is unsure, else 0."""
        is_unsure = logits.softmax(-1).amax(-1, keepdim=True) < self.alpha
        return torch.where(is_unsure, min(math.expm1(min(self.lam * token.number, 100.0)), LARGEST), 0.0)
