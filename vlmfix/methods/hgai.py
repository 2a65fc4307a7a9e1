"""HGAI: Heads Guided Attention Intervention (Jiang et al., CVPR 2025, arXiv 2411.16724)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import RaisesImageScores, visible
from vlmfix.methods.selection import scaled_layers
from vlmfix.methods.views import EditedRows, Layer


@dataclass(frozen=True)
class HGAI(RaisesImageScores):
    """Raise the image's scores by a boost that all heads of a layer share.

    ``s_hj <- s_hj + alpha g_j`` with ``g_j = mean_h |s_hj|``, for image tokens j. The rows are the last of the prompt
    and that of every decode step. The mean is over query heads, in fp32. A head that ignores an image token is lifted
    by what the others see in it, whereas PAI lifts each head by its own score. All heads of a layer must be on one
    device: under tensor parallelism, each device would average over its own. Keys that a mask hides stay hidden, which
    in the released code they do not from ``alpha=1`` on. Layers of models of other depths are scaled (ours); those of
    the paper's other models were not released.

    Captions repeat themselves and name fewer objects with it. Look at recall, length and repeated n-grams too.
    """

    name = "hgai"
    paper = "arXiv 2411.16724"
    summary = "raises the image's scores by a boost shared between the heads of middle layers"
    default_layers = scaled_layers(5, 18)  # the released function takes (5, 19), the end excluded

    alpha: float = parameter(
        0.5, low=0, off=0, search=Range(0.05, 0.8), help="Strength. 0.5 in the released evaluation of LLaVA-1.5-7B."
    )

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Raise the image columns of ``[batch, num_heads, rows, keys]``."""
        image = visible(layer.keys("image", scores), allowed)
        boost = torch.where(image, self.alpha * scores.abs().mean(1, keepdim=True), 0.0)
        return scores + boost, image.any(-1).expand(scores.shape[:3])
