"""VHR: Vision-aware Head Reinforcement (He et al., ACL 2025, arXiv 2412.13949v3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.selection import Choice, Range, Space
from vlmfix.methods.views import Layer
from vlmfix.model.anatomy import AttentionKind


@dataclass(frozen=True)
class VHR(Method):
    """Scale the outputs of the heads that change most when the image is taken away.

    In a prompt, the head outputs at the last position (the one that predicts the first new token) are compared with
    those of an image-free pass over the same text (eq. 4); heads that surge without the image are dropped (eq. 6); the
    heads above the layer's median are multiplied by ``alpha`` at every position (eq. 7) and stay frozen while decoding.
    Selection is per sample and per layer; attention weights are never edited. Where an encoder reads the prompt, the
    heads are those of the decoder's cross-attention, and the position is the last one before the answer; where image
    features are keys of cross-attention, the heads are those of self-attention (both ours).

    Attributes:
        alpha: Scale of the selected heads, > 0. 1 is the identity. The paper uses 2 on 7B models and reports broken
            text from 4 on.
        layers: Default: layer 1 and the last 14 of 32 layers (Table 5), scaled to the model's depth.
        outliers: Drop heads whose divergence and whose image-free output both exceed mean + std of the layer (eq. 6;
            the standard deviation divides by n - 1).
        select: ``"divergent"`` is the method. ``"all"`` and ``"unselected"`` are its controls: every head, or only
            those the method leaves alone.
    """

    name: ClassVar[str] = "vhr"
    paper: ClassVar[str] = "arXiv 2412.13949"
    summary: ClassVar[str] = "scales the heads that depend most on the image, chosen per prompt"
    search_space: ClassVar[Space] = {"alpha": Range(1.05, 3.0), "layers": Choice((None, "0:"))}
    edits_heads: ClassVar[bool] = True
    removed_parameters: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "reinforce_noimg": (
            False,
            "It scaled the heads in the image-free pass too, which the released code does not do, and it changed "
            "nothing that could be measured. Leave it out: heads are chosen against the stock model's pass.",
        )
    }

    alpha: float = 2.0
    outliers: bool = True
    select: Literal["divergent", "all", "unselected"] = "divergent"

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        self.require(0 < self.alpha < float("inf"), "alpha", "a finite number > 0 (1 switches the method off)")
        self.require(self.select in ("divergent", "all", "unselected"), "select", "divergent, all or unselected")

    @property
    def is_identity(self) -> bool:
        """Whether ``alpha`` is 1."""
        return self.alpha == 1

    @property
    def needs_text_only_heads(self) -> bool:
        """Whether heads are compared with an image-free pass; the control ``select="all"`` needs none."""
        return self.select != "all"

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Where the image-free pass has an output to compare with: not in cross-attention to image features."""
        return ("joint", "text", "encoder")

    @property
    def needs_whole_prompt(self) -> bool:
        """Heads are chosen at the end of the prompt and scaled in all of it."""
        return self.needs_text_only_heads

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layer 1 and the last 14 of 32 (a heuristic for other depths: the paper gives absolute counts)."""
        last = round(14 / 32 * num_layers)
        return tuple(sorted({min(1, num_layers - 1), *range(num_layers - last, num_layers)}))

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Scale ``[batch, q_len, num_heads, head_dim]``; in a prompt, choose the heads first."""
        if layer.forward.begins:
            heads = self.select_heads(head_outputs, layer)
            scale = torch.where(heads, self.alpha, 1.0).to(head_outputs.dtype)
            layer.learned = (scale[:, None, :, None], heads.sum())
            layer.count((heads.sum(1) * layer.forward.num_prompt_rows().to(heads.device)).sum())
        else:
            rows = head_outputs.shape[1]
            layer.count(layer.learned[1] if rows == 1 else layer.learned[1] * rows)
        frozen: torch.Tensor = layer.learned[0]  # exactly 1 for heads that were not chosen
        return head_outputs * frozen if head_outputs.requires_grad else head_outputs.mul_(frozen)

    def select_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Return the reinforced heads as bool ``[batch, num_heads]``; all false for a prompt without an image."""
        forward = layer.forward
        has_image = forward.has_image.to(head_outputs.device)[:, None]
        if self.select == "all":
            return has_image.expand(-1, head_outputs.shape[2])
        with_image = forward.at_last_position(head_outputs).float()
        without_image = layer.text_only_heads().float()
        divergent = divergent_heads(with_image, without_image, self.outliers, torch.finfo(head_outputs.dtype).eps)
        return (divergent if self.select == "divergent" else ~divergent) & has_image


def vision_divergence(with_image: torch.Tensor, without_image: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Return VHD, how far head outputs move when the image is taken away (eq. 4, Euclidean).

    Args:
        with_image: Head outputs, ``[..., num_heads, head_dim]``, fp32.
        without_image: The same from the image-free pass.
        eps: Machine epsilon of the outputs. A head whose outputs differ by no more than a few roundings does not see
            the image: its divergence counts as 0.

    Returns:
        fp32 ``[..., num_heads]``.
    """
    divergence: torch.Tensor = torch.linalg.vector_norm(with_image - without_image, dim=-1)
    rounding = 4 * eps * torch.linalg.vector_norm(without_image, dim=-1)
    return divergence.masked_fill(divergence <= rounding, 0.0)


def divergent_heads(
    with_image: torch.Tensor, without_image: torch.Tensor, outliers: bool = True, eps: float = 0.0
) -> torch.Tensor:
    """Return the vision-sensitive heads of one layer (eqs. 4, 6 and 7).

    Args:
        with_image: Head outputs at the last position, ``[batch, num_heads, head_dim]``, fp32.
        without_image: The same from the image-free pass.
        outliers: Whether to drop heads that surge when the image is removed.
        eps: See ``vision_divergence``.

    Returns:
        Bool ``[batch, num_heads]``, at most half of the heads.
    """
    divergence = vision_divergence(with_image, without_image, eps)
    if outliers and divergence.shape[1] > 1:
        surge = without_image.square().sum(-1)
        outlier = _above_one_std(divergence) & _above_one_std(surge)
        divergence = divergence.masked_fill(outlier, 0.0)
    selected: torch.Tensor = divergence > divergence.median(dim=1, keepdim=True).values
    return selected


def _above_one_std(values: torch.Tensor) -> torch.Tensor:
    above: torch.Tensor = values > values.mean(1, keepdim=True) + values.std(1, keepdim=True)
    return above
