"""SID: Self-Introspective Decoding (Huo et al., ICLR 2025, arXiv 2408.02032)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlmfix.decoding.base import plausibility, strength
from vlmfix.decoding.edited import AgainstEdit
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Choice, parameter
from vlmfix.methods.scores import take_keys, visible
from vlmfix.methods.selection import DefaultLayers
from vlmfix.methods.views import EditedRows, Layer


@dataclass(frozen=True)
class LeastSeenImage(Method):
    """The edit of SID's second branch: only the image tokens that get the least attention stay visible.

    In the first of its layers, which stays as it is, the weights of the row that predicts the next token are averaged
    over heads. The ``keep`` image keys with the smallest weight stay; of equal ones, the first. All other image keys
    are hidden in the layers behind, from every row of the forward. Every forward chooses anew.
    """

    name = "least_seen_image"
    edits_scores = True
    hides_keys = True
    prompt_rows = "all"
    observed_rows = "last"
    attention_kinds = ("joint",)
    default_layers = DefaultLayers(
        "1 is read, those behind it are edited", lambda num_layers: tuple(range(1, num_layers))
    )

    keep: int = parameter(50, low=1, help="How many image tokens stay visible.")

    def observes_at(self, layer: Layer) -> bool:
        """Only where it reads."""
        return layer.site.layer_idx == self.layer_indices[0]

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Add up the weights of each sample's last row, which is in one of the pieces shown."""
        weights = attn_weights.mean(1)  # [batch, rows, keys]
        if layer.row_mask is not None:
            weights = weights * layer.row_mask[..., None].to(weights.device)
        prompt = layer.forward.image_mask.shape[1]
        looks = take_keys(weights.sum(1), -layer.key_offset(attn_weights.shape[-1]), prompt)
        notes = layer.scratch
        notes["looks"] = looks + notes["looks"] if "looks" in notes else looks

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Hide image keys in ``[batch, num_heads, rows, keys]``."""
        if self.observes_at(layer):
            return scores, torch.zeros_like(scores[..., 0], dtype=torch.bool)
        notes = layer.scratch
        if "hidden" not in notes:
            image = layer.forward.image_mask.to(scores.device)
            order = notes["looks"].to(scores.device).masked_fill(~image, torch.inf).argsort(dim=1, stable=True)
            notes["hidden"] = image & (order.argsort(dim=1) >= self.keep)
        hidden = layer.visible_keys(notes["hidden"].to(scores.device), scores.shape[-1])
        hidden = F.pad(hidden, (0, scores.shape[-1] - hidden.shape[1]))
        edited = visible(hidden, allowed).any(-1).expand(scores.shape[:3])
        return scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min), edited


@dataclass(frozen=True)
class SID(AgainstEdit):
    """Contrast the answer with that to the image tokens which get the least attention: ``(1 + alpha) l - alpha l'``.

    ``l'`` is the model's own answer to the same prompt, where from layer 2 on only the ``keep`` image tokens with the
    smallest weight in layer 1 are visible: the mean over heads in the row that predicts the next token, chosen anew in
    every forward. Only tokens with ``l >= max l + ln(beta)`` may be chosen.

    The released code chooses greedily before it cuts. Here the cut comes first, for every way to choose.
    """

    name = "sid"
    paper = "arXiv 2408.02032"
    summary = "contrasts the answer with that to the image tokens which get the least attention"
    needs_cache = True

    alpha: float = strength(1.0)
    beta: float = plausibility(0.1)
    keep: int = parameter(
        50,
        low=1,
        search=Choice((50, 10, 25, 100, 200)),
        help="How many image tokens the second branch sees. The released code's 50 for captions of LLaVA-1.5, which "
        "has 576 (100 for POPE).",
    )

    def edit_of_branch(self) -> Method:
        """Hide all but ``keep`` image tokens."""
        return LeastSeenImage(self.keep)
