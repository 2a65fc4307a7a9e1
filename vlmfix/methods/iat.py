"""IAT: Increase Attention to Generated Text (Zhong, He, Zheng, Li, Wang and Kang, CVPR 2026, arXiv 2603.04908)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.methods.scores import RaisesGeneratedText, raise_keys
from vlmfix.methods.selection import Range, Space
from vlmfix.methods.views import Layer


@dataclass(frozen=True)
class IAT(RaisesGeneratedText):
    """Raise the scores of the generated text in the rows of generated tokens: ``s_j <- s_j + alpha |s_j|``.

    All heads; j runs over the tokens generated since the prompt, the row's own included. The prompt is not touched, so
    that the first new token is that of the stock model; answers of earlier turns belong to the prompt. Prompts without
    an image are left alone. Made for long captions: one-word answers hardly change.

    Attributes:
        alpha: Strength, >= 0; 0 is the identity. The released .8 for LLaVA-1.5-7B, where captions get 20 % shorter.
        layers: Default: 5 to 17 of 32, scaled to the model's depth (ours for other depths).
    """

    name: ClassVar[str] = "iat"
    paper: ClassVar[str] = "arXiv 2603.04908"
    summary: ClassVar[str] = "raises the scores of the text generated so far"
    search_space: ClassVar[Space] = {"alpha": Range(0.1, 1.5)}
    edits_scores: ClassVar[bool] = True

    alpha: float = 0.8

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise the generated columns of ``[batch, num_heads, rows, keys]``."""
        return raise_keys(scores, layer, lambda: self.alpha * layer.keys("generated", scores).float())
