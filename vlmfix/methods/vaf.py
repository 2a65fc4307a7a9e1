"""VAF: Visual Amplification Fusion (ClearSight, Yin, Si and Wang, CVPR 2025, arXiv 2503.13107)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.scores import visible
from vlmfix.methods.selection import HeadSpec, Range, Space, bind_heads, heads_of, layers_by_depth, listed_heads
from vlmfix.methods.views import Layer, PromptRows
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class VAF(Method):
    """Multiply the scores of the image by ``enhance`` and those of the tokens before it by ``suppress``.

    Rows: those behind the last image token in a prompt, and every decode step. The tokens before the first image token
    (system prompt, first token) are the prefix. A factor on a score is a temperature around zero, not a boost: image
    tokens with negative scores lose, and much of the effect is what the first token, a strong sink, gives up. It is the
    whole prefix where the image comes first.

    Attributes:
        enhance: Factor of image scores; 1.15 as released.
        suppress: Factor of prefix scores; 0.95 as released. With ``enhance`` 1, 1 is the identity.
        multiply: ``"signed"``: ``s * f``, as released; ``"abs"``: ``s + (f - 1) |s|`` (ours), which with ``enhance`` >=
            1 and ``suppress`` <= 1 never lowers the image's share.
        heads: ``"all"`` as released. ``"visual"``: per layer, the half with the largest attention to the image in the
            prompt's last row, frozen for the answer; our reading of the paper's restriction to visual heads. Or (layer,
            head) pairs, such as the image-centric heads that ``vlmfix.calibrate`` finds.
        layers: Default: 9..14 (inclusive) of 32, scaled to the model's depth, or those of ``heads``.
    """

    name: ClassVar[str] = "vaf"
    paper: ClassVar[str] = "arXiv 2503.13107"
    summary: ClassVar[str] = "multiplies the scores of the image up and those of the tokens before it down"
    search_space: ClassVar[Space] = {"enhance": Range(1.0, 1.5), "suppress": Range(0.7, 1.0)}
    edits_scores: ClassVar[bool] = True

    enhance: float = 1.15
    suppress: float = 0.95
    multiply: Literal["signed", "abs"] = "signed"
    heads: HeadSpec | str = "all"

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        for parameter in ("enhance", "suppress"):
            self.require(math.isfinite(getattr(self, parameter)), parameter, "a finite number (1 changes nothing)")
        self.require(self.multiply in ("signed", "abs"), "multiply", "signed or abs")
        if self.heads is None or isinstance(self.heads, str):
            self.require(self.heads in ("all", "visual"), "heads", "all, visual or a list of (layer, head) pairs")

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

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers 9 to 14 of 32, both included, by depth."""
        return layers_by_depth(9, 14, 32, num_layers)

    def bind(self, anatomy: Anatomy) -> VAF:
        """Resolve layers; with a list of heads, those that have some."""
        return bind_heads(self, super().bind(anatomy), self._listed(), anatomy)

    def heads_in(self, layer_idx: int) -> tuple[int, ...] | None:
        """Those of the list, if there is one."""
        heads = self._listed()
        return None if heads is None else heads_of(heads, layer_idx)

    def _listed(self) -> HeadSpec:
        return None if isinstance(self.heads, str) else self.heads

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
        ranks = mass.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = ranks < max(mass.shape[1] // 2, 1)
        known = torch.zeros_like(chosen) if layer.learned is None else layer.learned
        layer.learned = torch.where(is_last.any(1, keepdim=True), chosen, known)

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale the image and prefix columns of ``[batch, num_heads, rows, keys]``."""
        if self.heads == "visual":
            heads = layer.learned[:, :, None, None]
        else:
            heads = layer.constant(lambda: listed_heads(self._listed(), layer, scores))[:, None, None]
        image, prefix = layer.keys("image", scores), layer.keys("prefix", scores)
        factor = torch.where(image, self.enhance, torch.where(prefix, self.suppress, 1.0))[:, None, None]
        scaled = scores * factor if self.multiply == "signed" else scores + (factor - 1) * scores.abs()
        edited = visible(image | prefix, allowed).any(-1) & heads[..., 0]
        return torch.where(heads, scaled, scores), edited.expand(scores.shape[:3])
