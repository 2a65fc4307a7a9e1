"""Guidance by an image-free branch: the optional half of PAI (Liu, Zheng and Chen, ECCV 2024, arXiv 2407.21771)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmfix.decoding.base import AnswerToken, WithoutImage, plausibility
from vlmfix.methods.parameters import Range, parameter


@dataclass(frozen=True)
class Guidance(WithoutImage):
    """Contrast the answer with that to the prompt without its image: ``gamma (p - p') + p'``, ``p`` log-probabilities.

    Computed on logits, where it is the same but for a constant: ``l + (gamma - 1)(l - l')``. Tokens with
    ``p < max p + ln(beta)`` are cut. The other prompt is the same text with the image's tokens taken out, its positions
    without a gap. Beside ``pai`` or ``fia``, whose published runs use it, it is their guidance: their edits act in the
    branch with the image only. ``[PAI(edit_prompt=False), Guidance()]`` is what PAI's released code computes.
    """

    name = "guidance"
    paper = "arXiv 2407.21771"
    summary = "contrasts the answer with that to the prompt without its image"

    gamma: float = parameter(
        1.1,
        low=1,
        off=1,
        search=Range(1.02, 2.5),
        help="Strength. Default: the README value of PAI's code (2 in its CHAIR script).",
    )
    beta: float = plausibility(0.1, "Default: the released code's.")

    def weight(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> float:
        """``gamma - 1``."""
        return self.gamma - 1
