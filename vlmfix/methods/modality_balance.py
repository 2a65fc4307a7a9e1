"""Modality balance: a hypothesis of ours, suggested by LACING's modality-split attention (arXiv 2411.14279)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import ExperimentalMethod, log_mass, visible
from vlmfix.methods.views import EditedRows, Layer


@dataclass(frozen=True)
class ModalityBalance(ExperimentalMethod):
    """Shift the image's scores so that each row's attention to the image moves towards one half.

    Let m be the image's share of a row of a head. A constant b is added to the row's image scores, with
    ``m* = (1 - tau) m + tau / 2`` and ``b = logit(m*) - logit(m)``: the share becomes m*, and weights keep their ratios
    within the image and within the text. Rows that see no image token, or nothing else, are left alone. The rows are
    those behind the last image token in a prompt, and that of every decode step.

    This is not LACING, which trains a model with two softmaxes per row, one over the image and one over the text;
    ``tau=1`` is half their sum. No result supports it without training.
    """

    name = "modality_balance"
    paper = "none (after arXiv 2411.14279)"
    summary = "moves each row's attention to the image towards one half (experimental)"
    caveat = "a hypothesis of ours, not a published method"
    edits_scores = True
    needs_cache = False

    tau: float = parameter(
        0.5, low=0, high=1, off=0, search=Range(0.05, 1.0), help="How far towards one half. Untested at every value."
    )

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Shift the image columns of ``[batch, num_heads, rows, keys]``."""
        is_image = layer.keys("image", scores)
        image, text = visible(is_image, allowed), visible(~is_image, allowed)
        logit = log_mass(scores, image) - log_mass(scores, text)  # of the image's share m
        target = (1 - self.tau) * torch.sigmoid(logit) + self.tau / 2  # m*
        rest = (1 - self.tau) * torch.sigmoid(-logit) + self.tau / 2  # 1 - m*, without cancellation
        edited = logit.isfinite()
        shift = torch.where(edited, target.log() - rest.log() - logit, 0.0)
        return torch.where(image, scores + shift[..., None], scores), edited
