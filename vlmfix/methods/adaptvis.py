"""AdaptVis and ScalingVis: confidence-gated scaling of image attention (Chen et al., ICML 2025, arXiv 2503.01773)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.scores import visible
from vlmfix.methods.selection import Range, Space
from vlmfix.methods.views import Layer, Prompt, PromptRows
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class AdaptVis(Method):
    """Multiply the image's scores in the prompt's last row by a factor, ``s_j <- w s_j``, chosen by confidence.

    ``w = low`` (look wider) where the unedited model gives its first new token less than ``threshold``, else ``high``
    (trust what it sees). All heads, all image tokens. Made for short spatial questions: rows of the answer are not
    edited. The confidence is read from a stock prefill of the same prompt, so a prompt costs two prefills (the released
    code repeats the generation; the paper's idea needs no more than this first distribution). Where answers begin with
    a blank or an article, it means little: see ``probe_tokens``.

    Attributes:
        mode: ``"adaptive"`` (AdaptVis), or ``"fixed"`` (ScalingVis): ``factor`` always, and no further prefill.
        threshold: In [0, 1]; confidence below it takes ``low``. 0.4 as in the released script, which tunes it per data
            set; not rounded (the release rounds confidence to two decimals).
        low: Factor when unsure; the released script's 0.5.
        high: Factor when sure; the released script's 1.5. With ``low``, 1 is the identity.
        factor: Factor of ``mode="fixed"``, of which the paper has no one value; 1 is the identity.
        center: Scale around the mean m of the row's image scores, ``m + w (s_j - m)`` (ours, untested): a temperature
            that does not move the image's mean score.
        decode: Edit the rows of generated tokens too (untested; the released code does not).
        probe_tokens: Ids of answer words: confidence is the largest probability among them alone (ours). ``None``: the
            whole vocabulary.
        layers: Default: all.
    """

    name: ClassVar[str] = "adaptvis"
    paper: ClassVar[str] = "arXiv 2503.01773"
    summary: ClassVar[str] = "sharpens or smooths the image's scores in the prompt's last row, by confidence"
    search_space: ClassVar[Space] = {"threshold": Range(0.1, 0.9), "low": Range(0.3, 1.0), "high": Range(1.0, 2.0)}
    edits_scores: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True

    mode: Literal["adaptive", "fixed"] = "adaptive"
    threshold: float = 0.4
    low: float = 0.5
    high: float = 1.5
    factor: float = 1.0
    center: bool = False
    decode: bool = False
    probe_tokens: Sequence[int] | None = None

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        self.require(self.mode in ("adaptive", "fixed"), "mode", "adaptive or fixed")
        self.require(0 <= self.threshold <= 1, "threshold", "between 0 and 1")
        for parameter in ("low", "high", "factor"):
            self.require(math.isfinite(getattr(self, parameter)), parameter, "a finite number (1 changes nothing)")
        self.require(self.mode == "fixed" or self.factor == 1, "factor", "left at 1 unless mode='fixed'")
        words = self.probe_tokens
        self.require(words is None or (len(words) > 0 and min(words) >= 0), "probe_tokens", "ids >= 0, at least one")

    @property
    def is_identity(self) -> bool:
        """Whether every factor it may choose is 1."""
        return self.factor == 1 if self.mode == "fixed" else self.low == self.high == 1

    @property
    def prompt_rows(self) -> PromptRows:
        """The last row."""
        return "last"

    @property
    def edits_decode(self) -> bool:
        """As chosen."""
        return self.decode

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say what confidence costs."""
        if self.is_identity:
            return ("adaptvis: the factor is 1, nothing is edited",)
        if self.mode == "fixed" or self.low == self.high:
            return ()
        return ("adaptvis: reads every prompt with an image twice; the first time unedited, for its confidence",)

    def begin(self, prompt: Prompt) -> torch.Tensor:
        """Choose the factor of every sample: fp32 ``[batch]``."""
        image = prompt.forward.image_mask
        if self.mode == "fixed" or self.low == self.high:
            only = self.factor if self.mode == "fixed" else self.low
            return torch.full((image.shape[0],), only, device=image.device)
        logits = prompt.first_logits()
        if self.probe_tokens is not None:
            limit = f"below the model's vocabulary of {logits.shape[-1]}"
            self.require(max(self.probe_tokens) < logits.shape[-1], "probe_tokens", limit)
            logits = logits[:, list(self.probe_tokens)]
        confidence = logits.float().softmax(-1).amax(-1)
        return torch.where(confidence < self.threshold, self.low, self.high)

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale the image columns of ``[batch, num_heads, rows, keys]``."""
        factor: torch.Tensor = layer.shared.to(scores.device)[:, None, None, None]
        image = visible(layer.keys("image", scores), allowed)
        scaled = factor * scores
        if self.center:
            total = torch.where(image, scores, 0.0).sum(-1, keepdim=True)
            scaled = scaled + (1 - factor) * total / image.sum(-1, keepdim=True).clamp_min(1)
        edited = image & (factor != 1)
        return torch.where(edited, scaled, scores), edited.any(-1).expand(scores.shape[:3])
