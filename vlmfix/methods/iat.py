"""IAT: Increase Attention to Generated Text (Zhong, He, Zheng, Li, Wang and Kang, CVPR 2026, arXiv 2603.04908)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import RaisesGeneratedText, raise_keys
from vlmfix.methods.views import EditedRows, Layer


@dataclass(frozen=True)
class IAT(RaisesGeneratedText):
    """Raise the scores of the generated text in the rows of generated tokens: ``s_j <- s_j + alpha |s_j|``.

    In all heads. j runs over the tokens generated since the prompt, the row's own included. The prompt is not edited,
    so that the first new token is the stock model's. Answers of earlier turns belong to the prompt. Prompts without an
    image are left alone. The released code takes everything from position 625 on for generated text, which is right
    for one prompt and one size of image. The method was made for long captions; one-word answers hardly change.
    """

    name = "iat"
    paper = "arXiv 2603.04908"
    summary = "raises the scores of the text generated so far"
    edits_scores = True

    alpha: float = parameter(
        0.8,
        low=0,
        off=0,
        search=Range(0.1, 1.5),
        help="Strength. The released 0.8 for LLaVA-1.5-7B, where captions get 20 % shorter.",
    )

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Raise the generated columns of ``[batch, num_heads, rows, keys]``."""
        return raise_keys(scores, layer, lambda: self.alpha * layer.keys("generated", scores).float())
