"""DoLa: Decoding by Contrasting Layers (Chuang et al., ICLR 2024, arXiv 2309.03883)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vlmfix.methods.early import EarlyLogits
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import DefaultLayers
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class DoLa(EarlyLogits):
    """Contrast the next token's log-probabilities with those of the early layer that differs most.

    With ``p = softmax(logits)`` and ``p_j`` the same read from the output of early layer j, and ``M = (p + p_j) / 2``:
    ``j* = argmax_j (KL(M || p) + KL(M || p_j))``, and the logits become ``ln p - alpha ln p_j*`` for tokens with
    ``p >= relative_top max p``; others cannot be chosen. Every sample of a batch has a layer of its own.

    As released: the divergence has its arguments the other way round than the paper's Jensen-Shannon divergence
    (``divergence="jsd"``), and early states are read without the final norm (``early_norm=True`` applies it). Left out:
    the embedding as a candidate, which is no layer's output; one layer for a whole batch; a repetition penalty, which
    the authors recommend (set ``repetition_penalty=1.2`` in ``generate`` if you want theirs). ``alpha`` is ours.

    Made for facts in text. No published table of vision-language models shows a benefit beyond noise.
    """

    name = "dola"
    paper = "arXiv 2309.03883"
    default_layers = DefaultLayers("those of ``depth``", lambda num_layers: tuple(range(num_layers)))
    summary = "contrasts the next token with what the early layer that differs most says"

    alpha: float = parameter(1.0, low=0, search=Range(0.1, 1.5), remark="0: no contrast", help="Strength (ours).")
    relative_top: float = parameter(
        0.1,
        low=0,
        high=1,
        remark="0: no cut; 1: only the most likely token is left",
        help="Least probability of a token that may be chosen, over the largest. Default: the released code's.",
    )
    depth: Literal["low", "high"] = parameter(
        "low", help="Candidates if no layers are given: every other one of the lower or of the upper half, as released."
    )
    divergence: Literal["released", "jsd"] = parameter("released", help="What tells which layer differs most.")
    early_norm: bool = parameter(False, help="Apply the model's final norm to early states (ours).")

    @property
    def is_identity(self) -> bool:
        """Whether nothing is contrasted and nothing cut."""
        return self.alpha == 0 == self.relative_top

    def bind(self, anatomy: Anatomy) -> DoLa:
        """Choose the candidates, and refuse the last layer with the norm, whose logits are the model's own."""
        layers = self._candidates(anatomy.num_layers) if self.layers is None else self.layers
        bound = super(DoLa, dataclasses.replace(self, layers=layers)).bind(anatomy)
        is_itself = bound.early_norm and anatomy.num_layers - 1 in bound.layer_indices
        bound.require(not is_itself, "layers", "without the last one, which would contrast with itself")
        return bound

    def _candidates(self, num_layers: int) -> list[int]:
        """Every other layer of one half; of more than 40 layers, ten of the first or of the last 20."""
        if self.depth == "low":
            first, last = 0, num_layers // 2 if num_layers <= 40 else 20
        else:
            first, last = num_layers // 2 if num_layers <= 40 else num_layers - 20, num_layers
        # The release counts the embedding as 0, which is left out: its candidate 2 is the output of layer 1.
        return [index - 1 for index in range(first, last, 2) if index > 0] or [0]

    def mix_logits(self, logits: torch.Tensor, early: Sequence[torch.Tensor]) -> torch.Tensor:
        """Contrast fp32 ``[batch, rows, vocab]``."""
        own = logits.log_softmax(-1)
        chosen, most = torch.zeros_like(own), torch.full_like(own[..., :1], -torch.inf)
        for each in early:
            other = each.log_softmax(-1)
            differs = self._divergence(own, other)
            chosen = torch.where(differs > most, other, chosen)  # of equal ones the lower layer
            most = torch.maximum(most, differs)
        cut = math.log(self.relative_top) if self.relative_top else -math.inf
        kept = own >= own.amax(-1, keepdim=True) + cut
        return torch.where(kept, own - self.alpha * chosen if self.alpha else logits, -torch.inf)

    def _divergence(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """How much log-probabilities differ, ``[batch, rows, 1]``."""
        middle = torch.logaddexp(own, other) - math.log(2)
        if self.divergence == "jsd":
            terms = own.exp() * (own - middle) + other.exp() * (other - middle)
        else:
            terms = middle.exp() * (2 * middle - own - other)
        return terms.nan_to_num(0.0).sum(-1, keepdim=True)  # 0 ln 0 is 0: tokens that a processor has ruled out
