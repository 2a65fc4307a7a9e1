"""VAF: Visual Amplification Fusion (ClearSight, Yin, Si and Wang, CVPR 2025, arXiv 2503.13107)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import best, visible
from vlmfix.methods.selection import HeadSpec, listed_heads, scaled_layers
from vlmfix.methods.views import EditedRows, Layer, PromptRows


@dataclass(frozen=True)
class VAF(Method):
    """Multiply the scores of the image by ``enhance`` and those of the tokens before it by ``suppress``.

    The rows are those behind the last image token in a prompt, and that of every decode step. The tokens before the
    first image token (system prompt, first token) are the prefix; there is none where the image comes first. A factor
    on a score is a temperature around zero, not a boost: image tokens with negative scores lose, and much of the effect
    is what the first token, a strong sink, gives up.

    The released code has the prefix and the image at fixed places, and takes a call of at most 611 rows for a decode
    step: it then edits every row, and text without an image too. Here the rows are known. It edits the same layers in
    models of every depth, where these are scaled (ours). The paper speaks of heads that look at the image; the released
    code edits all, see ``heads``.
    """

    name = "vaf"
    paper = "arXiv 2503.13107"
    summary = "multiplies the scores of the image up and those of the tokens before it down"
    edits_scores = True
    needs_cache = False
    default_layers = scaled_layers(9, 14)

    enhance: float = parameter(
        1.15,
        remark="1 changes nothing",
        search=Range(1.0, 1.5),
        help="Factor of image scores; 1.15 as released. With ``suppress``, 1 switches the method off.",
    )
    suppress: float = parameter(
        0.95, remark="1 changes nothing", search=Range(0.7, 1.0), help="Factor of prefix scores; 0.95 as released."
    )
    multiply: Literal["signed", "abs"] = parameter(
        "signed",
        help='``"signed"``: ``s * f``, as released. ``"abs"``: ``s + (f - 1) |s|`` (ours), which never lowers the '
        "image's share while ``enhance`` >= 1 and ``suppress`` <= 1.",
    )
    heads: HeadSpec | Literal["all", "visual"] = parameter(
        "all",
        expected="all, visual or a list of (layer, head) pairs",
        help='``"all"`` as released. ``"visual"``: per layer, the half with the largest attention to the image in the '
        "prompt's last row, frozen for the answer; our reading of the paper's restriction to visual heads. Or (layer, "
        "head) pairs, such as the image-centric heads that ``vlmfix.calibrate`` finds.",
    )

    def validate(self) -> None:
        """Refuse ``None``: every head is ``"all"``."""
        self.require(self.heads is not None, "heads", "all, visual or a list of (layer, head) pairs")

    @property
    def is_identity(self) -> bool:
        """Whether both factors are 1 or no head is to be edited."""
        return self.enhance == self.suppress == 1 or self.heads == ()

    @property
    def observed_rows(self) -> PromptRows:
        """The prompt's last row, which chooses visual heads."""
        return "last" if self.heads == "visual" else "none"

    @property
    def needs_whole_prompt(self) -> bool:
        """Visual heads are chosen at the end of the prompt and edited in rows before it."""
        return self.heads == "visual"

    def observes_at(self, layer: Layer) -> bool:
        """Only prompts choose heads."""
        return layer.forward.is_prefill

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Choose the half of the heads that look most at the image in each sample's last row."""
        forward, (start, stop) = layer.forward, layer.rows
        assert layer.row_mask is not None
        rows = torch.arange(start, stop, device=attn_weights.device)
        is_last = layer.row_mask.to(rows.device) & (rows < forward.prompt_len)  # a draft may follow the prompt
        mass = (attn_weights * layer.keys("image", attn_weights)[:, None, None]).sum(-1)
        mass = torch.where(is_last[:, None], mass, 0.0).sum(-1)  # [batch, num_heads]
        chosen = best(mass, max(mass.shape[1] // 2, 1))
        known = torch.zeros_like(chosen) if layer.learned is None else layer.learned
        layer.learned = torch.where(is_last.any(1, keepdim=True), chosen, known)

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Scale the image and prefix columns of ``[batch, num_heads, rows, keys]``."""
        if self.heads == "visual":
            heads = layer.learned[:, :, None, None]
        else:
            heads = layer.constant(lambda: listed_heads(self.only_heads, layer, scores))[:, None, None]
        image, prefix = layer.keys("image", scores), layer.keys("prefix", scores)
        factor = torch.where(image, self.enhance, torch.where(prefix, self.suppress, 1.0))[:, None, None]
        scaled = scores * factor if self.multiply == "signed" else scores + (factor - 1) * scores.abs()
        edited = visible(image | prefix, allowed).any(-1) & heads[..., 0]
        return torch.where(heads, scaled, scores), edited.expand(scores.shape[:3])
