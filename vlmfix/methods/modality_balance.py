"""Modality balance: a hypothesis of ours, suggested by LACING's modality-split attention (arXiv 2411.14279)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.methods.experimental import ExperimentalMethod
from vlmfix.methods.scores import log_mass, visible
from vlmfix.methods.selection import Range, Space
from vlmfix.methods.views import Layer


@dataclass(frozen=True)
class ModalityBalance(ExperimentalMethod):
    """Shift the image's scores so that each row's attention to the image moves towards one half.

    With m the image's share of a row of a head, a constant b is added to its image scores: ``m* = (1 - tau) m + tau /
    2``, ``b = logit(m*) - logit(m)``. The share becomes m*; weights keep their ratios within the image and within the
    text. Rows that see no image token, or nothing else, are left alone. Rows: those behind the last image token in a
    prompt, and every decode step.

    Not LACING, which trains a model with two softmaxes per row, one over the image and one over the text: ``tau=1`` is
    half their sum. No result supports it without training.

    Attributes:
        tau: In [0, 1]; 0 is the identity. 0.5 is untested, as every value is.
        experimental: Must be true.
        layers: Default: all.
    """

    name: ClassVar[str] = "modality_balance"
    paper: ClassVar[str] = "none (after arXiv 2411.14279)"
    summary: ClassVar[str] = "moves each row's attention to the image towards one half (experimental)"
    search_space: ClassVar[Space] = {"tau": Range(0.05, 1.0)}
    caveat: ClassVar[str] = "a hypothesis of ours, not a published method"
    edits_scores: ClassVar[bool] = True

    tau: float = 0.5

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        super().validate()
        self.require(0 <= self.tau <= 1, "tau", "between 0 and 1 (0 switches the method off)")

    @property
    def is_identity(self) -> bool:
        """Whether ``tau`` is 0."""
        return self.tau == 0

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift the image columns of ``[batch, num_heads, rows, keys]``."""
        is_image = layer.keys("image", scores)
        image, text = visible(is_image, allowed), visible(~is_image, allowed)
        logit = log_mass(scores, image) - log_mass(scores, text)  # of the image's share
        target = (1 - self.tau) * torch.sigmoid(logit) + self.tau / 2
        rest = (1 - self.tau) * torch.sigmoid(-logit) + self.tau / 2
        edited = logit.isfinite()
        shift = torch.where(edited, target.log() - rest.log() - logit, 0.0)
        return torch.where(image, scores + shift[..., None], scores), edited
