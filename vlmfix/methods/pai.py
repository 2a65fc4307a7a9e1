"""PAI: Paying More Attention to Image (Liu, Zheng and Chen, ECCV 2024, arXiv 2407.21771)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.methods.scores import RaisesImageScores, raise_keys
from vlmfix.methods.selection import Range, Space
from vlmfix.methods.views import Layer


@dataclass(frozen=True)
class PAI(RaisesImageScores):
    """Raise the scores of the image in the row that predicts the next token: ``s_j <- s_j + alpha |s_j|``.

    All heads. The rows: the last of the prompt, and every decode step. This is the attention part of the method; its
    guidance by an image-free branch is a decoding method.

    Attributes:
        alpha: Strength, >= 0; 0 is the identity. The released code's 0.2; 0.5 was used for LLaVA-1.5. Recall, length
            and repetition suffer as it grows.
        edit_prompt: Edit the prompt's last row too. The released code skips it when its guidance is on.
        layers: Default: all but the first two.
    """

    name: ClassVar[str] = "pai"
    paper: ClassVar[str] = "arXiv 2407.21771"
    summary: ClassVar[str] = "raises the image's scores in the row that predicts the next token"
    search_space: ClassVar[Space] = {"alpha": Range(0.05, 0.8)}

    alpha: float = 0.2

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """All but the first two; the last layer of models of two layers or fewer."""
        return tuple(range(min(2, num_layers - 1), num_layers))

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise the image columns of ``[batch, num_heads, rows, keys]``."""
        return raise_keys(scores, layer, lambda: self.alpha * layer.keys("image", scores).float())
