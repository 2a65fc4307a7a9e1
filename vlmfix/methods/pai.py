"""PAI: Paying More Attention to Image (Liu, Zheng and Chen, ECCV 2024, arXiv 2407.21771)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import RaisesImageScores, raise_keys
from vlmfix.methods.selection import all_but
from vlmfix.methods.views import EditedRows, Layer


@dataclass(frozen=True)
class PAI(RaisesImageScores):
    """Raise the scores of the image in the row that predicts the next token: ``s_j <- s_j + alpha |s_j|``.

    In all heads. The rows are the last of the prompt and that of every decode step. This is the attention part of the
    method. Its other part, guidance by an image-free branch, is the decoding method ``guidance``.

    The released code is followed; the paper was not read. Keys that a mask hides stay hidden, which in that code they
    do not from ``alpha=1`` on. With guidance, the released code does not edit the prompt's last row:
    ``[PAI(edit_prompt=False), Guidance()]`` is PAI as released. Recall, length and repetition suffer as ``alpha``
    grows.
    """

    name = "pai"
    paper = "arXiv 2407.21771"
    summary = "raises the image's scores in the row that predicts the next token"
    default_layers = all_but("all but the first two", first=2)

    alpha: float = parameter(
        0.2, low=0, off=0, search=Range(0.05, 0.8), help="Strength. The released code's 0.2; LLaVA-1.5 was run at 0.5."
    )

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Raise the image columns of ``[batch, num_heads, rows, keys]``."""
        return raise_keys(scores, layer, lambda: self.alpha * layer.keys("image", scores).float())
