"""CausalMM: counterfactual attention (Zhou et al., ICLR 2025, arXiv 2410.04780), its half in the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlmfix.decoding.base import plausibility, strength
from vlmfix.decoding.edited import AgainstEdit
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import parameter
from vlmfix.methods.selection import LAYERS_IN_WORDS, LayerSpec
from vlmfix.methods.views import EditedRows, Layer


@dataclass(frozen=True)
class CounterfactualAttention(Method):
    """The edit of CausalMM's second branch: other weights of the keys that a row sees, in every row and head."""

    name = "counterfactual_attention"
    edits_scores = True
    prompt_rows = "all"
    needs_cache = False  # every row is edited alike
    minds_text_before_image = True
    needs_text_keys = False
    attention_kinds = ("joint", "text")

    weights: Literal["reversed", "uniform"] = parameter("reversed", help="See ``CausalMM``.")

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Replace ``[batch, num_heads, rows, keys]`` by the logarithms of the other weights."""
        other = allowed.expand(scores.shape).to(scores.dtype)
        if self.weights == "reversed":
            stock = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            other = other * (stock.amax(-1, keepdim=True) - stock)
        edited = other.amax(-1) > 0  # a row that sees one key has no other weights
        return torch.where(edited[..., None], other.clamp_min(torch.finfo(other.dtype).tiny).log(), scores), edited


@dataclass(frozen=True)
class CausalMM(AgainstEdit):
    """Contrast the answer with that under counterfactual attention: ``(1 + alpha) l - alpha l'``.

    ``l'`` are the logits where the attention weights of some layers are replaced: ``"reversed"`` by
    ``max_k a_k - a_j``, ``"uniform"`` by the same weight for every key that a row sees. Only tokens with
    ``l >= max l + ln(beta)`` may be chosen.

    This is the half of the method in the language model, of which the authors show a snippet and leave the layers open.
    Rows of weights are divided by their sum here (ours). The half in the vision encoder multiplies an image's features
    by a scrambled attention map. The weights of a map over 577 tokens are about .0017, so that its counterfactual is
    nearly an image of zeros, however it is scrambled: ``ifg`` with ``stand_in="blank"`` is close to it.
    """

    name = "causalmm"
    paper = "arXiv 2410.04780"
    summary = "contrasts the answer with that under reversed or uniform attention"

    alpha: float = strength(1.0)
    beta: float = plausibility(0.1)
    weights: Literal["reversed", "uniform"] = parameter("reversed", help="The counterfactual weights.")
    in_layers: LayerSpec = parameter(
        "0.25:0.75",
        expected=LAYERS_IN_WORDS,
        help="The layers of the other branch that get them, see ``LayerSpec``. The default is ours.",
    )

    def edit_of_branch(self) -> Method:
        """Replace the weights."""
        return CounterfactualAttention(self.weights, layers=self.in_layers)
