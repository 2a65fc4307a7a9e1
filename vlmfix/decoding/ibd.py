"""IBD: Image-Biased Decoding (CVPR Workshops 2025, arXiv 2402.18476), without its index of content words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlmfix.decoding.base import AnswerToken, plausibility, strength
from vlmfix.decoding.edited import AgainstEdit
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import visible
from vlmfix.methods.views import EditedRows, Layer


@dataclass(frozen=True)
class ImageBias(Method):
    """The edit of IBD's second branch: ``s_j <- s_j + epsilon / sqrt(d)`` for the image's keys, in every row."""

    name = "image_bias"
    edits_scores = True
    prompt_rows = "all"
    needs_cache = False  # every row is edited alike

    epsilon: float = parameter(2.0, off=0, help="What is added to the scores before their division by ``sqrt(d)``.")

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Raise the image's columns of ``[batch, num_heads, rows, keys]``."""
        image = layer.keys("image", scores)
        edited = visible(image, allowed).any(-1).expand(scores.shape[:3])
        return scores + self.epsilon / math.sqrt(layer.call.query.shape[-1]) * image[:, None, None], edited


@dataclass(frozen=True)
class IBD(AgainstEdit):
    """Move the answer towards that of the same model with more attention to the image: ``l + w (l' - l)``.

    ``l'`` are the logits where ``epsilon`` is added to the scores of the image's keys, in all layers and rows. The
    weight ``w = alpha JSD(p, p')`` grows with the distance of the two distributions: their Jensen-Shannon divergence,
    at most ``ln 2``. Only tokens with ``l >= max l + ln(beta)`` may be chosen.

    No code was released, and the paper was read second-hand. It multiplies by a second index, for content words, whose
    definition we do not have: it is left out. All numbers are ours.
    """

    name = "ibd"
    paper = "arXiv 2402.18476"
    summary = "moves the answer towards that of the same model with more attention to the image"

    alpha: float = strength(1.0)
    beta: float = plausibility(0.1)
    epsilon: float = parameter(
        2.0, low=0, search=Range(0.2, 10.0, log=True), help="What is added to the scores, before ``sqrt(d)`` divides."
    )

    def edit_of_branch(self) -> Method:
        """Raise the image's scores."""
        return ImageBias(self.epsilon)

    def weight(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> torch.Tensor:
        """``-alpha JSD(p, p')``."""
        shares = [each.softmax(-1) for each in (logits, other)]
        entropies = [torch.special.entr(each).sum(-1, keepdim=True) for each in (*shares, (shares[0] + shares[1]) / 2)]
        distance: torch.Tensor = (entropies[2] - (entropies[0] + entropies[1]) / 2).clamp_min(0)
        return -self.alpha * distance
