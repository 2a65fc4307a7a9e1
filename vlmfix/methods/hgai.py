"""HGAI: Heads Guided Attention Intervention (Jiang et al., CVPR 2025, arXiv 2411.16724)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.methods.scores import RaisesImageScores, visible
from vlmfix.methods.selection import Range, Space, layers_by_depth
from vlmfix.methods.views import Layer


@dataclass(frozen=True)
class HGAI(RaisesImageScores):
    """Raise the image's scores by a boost that all heads of a layer share.

    ``s_hj <- s_hj + alpha * g_j`` with ``g_j = mean_h |s_hj|``, for image tokens j, in the row that predicts the next
    token: the last of the prompt, and every decode step. The mean is over query heads, in fp32. A head that ignores an
    image token is lifted by what the others see in it (PAI lifts each head by its own score). All heads of a layer
    must be on one device: under tensor parallelism, each device would average over its own.

    With it, captions repeat themselves and name fewer objects: look at recall, length and repeated n-grams too.

    Attributes:
        alpha: Strength, >= 0; 0 is the identity. 0.5 as in the released evaluation of LLaVA-1.5-7B.
        edit_prompt: Edit the prompt's last row too, as released.
        layers: Default: 5..18 (inclusive) of 32, scaled to the model's depth. The released function takes (5, 19).
    """

    name: ClassVar[str] = "hgai"
    paper: ClassVar[str] = "arXiv 2411.16724"
    summary: ClassVar[str] = "raises the image's scores by a boost shared between the heads of middle layers"
    search_space: ClassVar[Space] = {"alpha": Range(0.05, 0.8)}

    alpha: float = 0.5

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers 5 to 18 of 32, both included, by depth."""
        return layers_by_depth(5, 18, 32, num_layers)

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise the image columns of ``[batch, num_heads, rows, keys]``."""
        image = visible(layer.keys("image", scores), allowed)
        boost = torch.where(image, self.alpha * scores.abs().mean(1, keepdim=True), 0.0)
        return scores + boost, image.any(-1).expand(scores.shape[:3])
