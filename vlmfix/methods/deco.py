"""DeCo: Dynamic Correction Decoding (Wang et al., ICLR 2025, arXiv 2410.11779)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmfix.methods.early import EarlyLogits
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import DefaultLayers


def _upper_middle(num_layers: int) -> tuple[int, ...]:
    # The release counts the embedding as 0: its 20 to 28 are the outputs of layers 19 to 27.
    first, last = (max(round(place / 32 * num_layers) - 1, 0) for place in (20, 28))
    return tuple(range(first, max(first, last) + 1))


@dataclass(frozen=True)
class DeCo(EarlyLogits):
    """Raise, among the likeliest next tokens, those that an upper middle layer is sure of.

    Candidates C are the ``top_k`` most likely tokens, or as many of them as together reach ``top_p``. Early layer j
    reads logits ``e_j`` through the model's final norm and head, with probabilities ``p_j``. The layer j* that gives a
    candidate the largest probability pi of all is chosen, and the candidates' logits become
    ``l + alpha pi e_j*``; other tokens cannot be chosen.

    The released code reads one prompt at a time, and early logits in the model's precision; here they are fp32. It
    mixes before logits processors, as this does.

    Since the end token is seldom a candidate where an object could follow, captions can run on: look at the share of
    truncated ones beside CHAIR. ``cut=False`` (ours) lets all tokens be chosen.
    """

    name = "deco"
    paper = "arXiv 2410.11779"
    summary = "raises the likely tokens that an upper middle layer is sure of"
    early_norm = True
    default_layers = DefaultLayers(
        "19..27 (inclusive) of 32 as released, elsewhere in proportion (ours)", _upper_middle
    )

    alpha: float = parameter(
        0.6, low=0, search=Range(0.1, 1.0), remark="0: nothing is added", help="Strength. Default: the released code's."
    )
    top_p: float = parameter(0.9, low=0, high=1, help="Probability that the candidates reach together.")
    top_k: int = parameter(20, low=1, help="Most candidates.")
    cut: bool = parameter(True, help="Whether only candidates may be chosen, as released.")

    @property
    def is_identity(self) -> bool:
        """Whether nothing is added and nothing cut."""
        return self.alpha == 0 and not self.cut

    def mix_logits(self, logits: torch.Tensor, early: Sequence[torch.Tensor]) -> torch.Tensor:
        """Correct fp32 ``[batch, rows, vocab]``."""
        probabilities, ids = logits.softmax(-1).topk(min(self.top_k, logits.shape[-1]), dim=-1)
        before = probabilities.cumsum(-1) - probabilities
        is_candidate = (before < self.top_p) | (torch.arange(ids.shape[-1], device=ids.device) == 0)
        raised, most = torch.zeros_like(logits), torch.zeros_like(logits[..., :1])
        for each in early:
            of_candidates = each.softmax(-1).gather(-1, ids).masked_fill(~is_candidate, 0.0)
            sure = of_candidates.amax(-1, keepdim=True)
            raised = torch.where(sure > most, each, raised)  # of equal ones the lower layer
            most = torch.maximum(most, sure)
        corrected = logits + self.alpha * most * raised if self.alpha else logits
        allowed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, is_candidate)
        return torch.where(allowed, corrected, -torch.inf if self.cut else corrected)
