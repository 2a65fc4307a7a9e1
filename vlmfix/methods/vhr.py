"""VHR: Vision-aware Head Reinforcement (He et al., ACL 2025, arXiv 2412.13949v3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import DefaultLayers
from vlmfix.methods.views import Layer
from vlmfix.model.anatomy import Anatomy

NARROW, HOLDS_NARROW = 1024, 1.5
"""Hidden size below which a model is narrow, and the largest factor that such models' texts were seen to stand.

On SmolLM2-135M (576) repeated runs of four words rise by 1.3 points at 1.2, by 4.7 at 1.5 and by 5.6 at 2, where 8 % of
the captions never end. The paper's models have 4,096 dimensions."""


@dataclass(frozen=True)
class VHR(Method):
    """Scale the outputs of the heads that change most when the image is taken away.

    In a prompt, the head outputs at the last position, which predicts the first new token, are compared with those of
    an image-free pass over the same text (eq. 4). Heads that surge without the image are dropped (eq. 6). The heads
    above the layer's median are multiplied by ``alpha`` at every position (eq. 7), and stay the same while decoding.
    Heads are selected per sample and per layer. Attention weights are never edited.

    The released code was not seen, so the paper is followed. In the pass with the image, a layer is compared after the
    heads below it were scaled, as in the paper; the image-free pass is the stock model's, its text without a gap in
    positions. A head that moves by no more than a few roundings counts as one that does not (ours). For InstructBLIP
    the paper takes the last 18 layers without layer 1.

    Where an encoder reads the prompt, the heads are those of the decoder's cross-attention, and the position is the
    last one before the answer. Where image features are keys of cross-attention, the heads are those of self-attention.
    Both are ours.
    """

    name = "vhr"
    paper = "arXiv 2412.13949"
    summary = "scales the heads that depend most on the image, chosen per prompt"
    edits_heads = True
    scales_heads = True
    minds_text_before_image = True  # heads are scaled in all rows
    attention_kinds = ("joint", "text", "encoder")  # not cross-attention to image features alone: nothing to compare
    default_layers = DefaultLayers(
        "layer 1 and the last 14 of 32 (Table 5), scaled to the model's depth",
        lambda n: tuple(sorted({min(1, n - 1), *range(n - round(14 / 32 * n), n)})),  # the paper gives absolute counts
    )
    search_layers = (None, "0:")
    removed_parameters: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "reinforce_noimg": (
            False,
            "It scaled the heads in the image-free pass too, which the released code does not do, and it changed "
            "nothing that could be measured. Leave it out: heads are chosen against the stock model's pass.",
        )
    }

    alpha: float = parameter(
        2.0,
        above=0,
        off=1,
        search=Range(1.05, 3.0),
        help="Scale of the selected heads. The paper uses 2 on 7B models and reports broken text from 4 on.",
    )
    outliers: bool | Literal["released"] = parameter(
        True,
        help="Drop heads that surge when the image is taken away. ``True``: heads whose divergence and whose "
        "image-free output both exceed mean + std of the layer (eq. 6; the standard deviation divides by n - 1). "
        '``"released"``: as public ports of the official code do it, with squared divergences, and only in layers '
        "where these have a standard deviation above 1.",
    )
    select: Literal["divergent", "all", "unselected"] = parameter(
        "divergent",
        help='``"divergent"`` is the method. ``"all"`` and ``"unselected"`` are its controls: every head, or only '
        "those the method leaves alone.",
    )

    @property
    def needs_text_only_heads(self) -> bool:
        """Whether heads are compared with an image-free pass; the control ``select="all"`` needs none."""
        return self.select != "all"

    @property
    def needs_whole_prompt(self) -> bool:
        """Heads are chosen at the end of the prompt and scaled in all of it."""
        return self.needs_text_only_heads

    def cautions(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say when a strength for 7B models is used on a model so small that it breaks the text."""
        if anatomy.hidden_size >= NARROW or self.alpha <= HOLDS_NARROW or self.is_identity:
            return ()
        return (
            f"vhr: alpha={self.alpha:g} is for models of 7B. In {anatomy.hidden_size} dimensions it may break the text "
            "(repeated phrases, endless captions): try 1.2, or let vlmfix tune choose",
        )

    def fixed_factors(self, num_heads: int) -> dict[tuple[int, int], float] | None:
        """Every head's, in the control ``select="all"`` alone."""
        if self.select != "all":
            return super().fixed_factors(num_heads)
        return {(layer, head): self.alpha for layer in self.layer_indices for head in range(num_heads)}

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
        without_image = forward.text_only_heads[layer.site.index].float()
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
    with_image: torch.Tensor,
    without_image: torch.Tensor,
    outliers: bool | Literal["released"] = True,
    eps: float = 0.0,
) -> torch.Tensor:
    """Return the vision-sensitive heads of one layer (eqs. 4, 6 and 7).

    Args:
        with_image: Head outputs at the last position, ``[batch, num_heads, head_dim]``, fp32.
        without_image: The same from the image-free pass.
        outliers: Whether, and how, to drop heads that surge when the image is taken away; see ``VHR.outliers``.
        eps: See ``vision_divergence``.

    Returns:
        Bool ``[batch, num_heads]``, at most half of the heads.
    """
    divergence = vision_divergence(with_image, without_image, eps)
    if outliers and divergence.shape[1] > 1:
        surge = without_image.square().sum(-1)
        compared = divergence.square() if outliers == "released" else divergence
        outlier = _above_one_std(compared) & _above_one_std(surge)
        if outliers == "released":
            outlier &= compared.std(1, keepdim=True) > 1
        divergence = divergence.masked_fill(outlier, 0.0)
    selected: torch.Tensor = divergence > divergence.median(dim=1, keepdim=True).values
    return selected


def _above_one_std(values: torch.Tensor) -> torch.Tensor:
    above: torch.Tensor = values > values.mean(1, keepdim=True) + values.std(1, keepdim=True)
    return above
