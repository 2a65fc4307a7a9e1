"""CMAI: inhibiting low-focus text-image attention (our reading of Yang et al., arXiv 2411.15453)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.anatomy import Anatomy
from vlmfix.errors import MethodError
from vlmfix.methods._experimental import ExperimentalMethod
from vlmfix.methods._focus import Focus
from vlmfix.methods._scores import log_mass, visible
from vlmfix.methods.base import PromptRows
from vlmfix.run import Layer
from vlmfix.space import Range, Space


@dataclass(frozen=True)
class CMAI(ExperimentalMethod):
    """Hide from each text token the image tokens that neither it nor the text it reads looks at.

    With the head-mean weights of a reference layer, ``A_ti`` of text on image tokens and ``A_tt`` of text on text, the
    focus of a text token is ``F = A_tt A_ti``. It keeps the smallest set of image tokens that holds ``rho`` of its
    focus; the others are masked out for it in all later layers and heads. Rows: those behind the last image token in a
    prompt, and every decode step; text between images lends its focus. Softmax shares what was hidden out among the
    kept image tokens **and** the text, so that the image's share falls: see ``renorm``.

    Only the paper's abstract was known to us: formula and numbers are our reading of it, a new method rather than a
    reproduction. Its companion that merges image tokens (VMTC) is left out: it changes the prompt's length, and its
    details are not known. The paper is about following instructions; no result on hallucination is published.

    Attributes:
        rho: Share of its focus a row keeps, in (0, 1]; 1 is the identity. 0.9 is ours, untested.
        renorm: ``"image"`` raises the kept image tokens so that the image keeps its share of every row; ``"none"``
            does not.
        experimental: Must be true.
        layers: The first one is the reference, which is not edited; the others are. Default: from the one before a
            quarter of the depth on (ours).
    """

    name: ClassVar[str] = "cmai"
    paper: ClassVar[str] = "arXiv 2411.15453 (abstract)"
    summary: ClassVar[str] = "hides image tokens that a text token's context does not look at (experimental)"
    search_space: ClassVar[Space] = {"rho": Range(0.5, 1.0)}
    caveat: ClassVar[str] = "our reading of a paper known by its abstract alone, not a reproduction"
    edits_scores: ClassVar[bool] = True
    hides_keys: ClassVar[bool] = True
    reorders: ClassVar[bool] = True
    needs_past: ClassVar[bool] = True

    rho: float = 0.9
    renorm: Literal["none", "image"] = "none"

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        super().validate()
        self.require(0 < self.rho <= 1, "rho", "above 0 and at most 1 (1 switches the method off)")
        self.require(self.renorm in ("none", "image"), "renorm", "none or image")

    @property
    def is_identity(self) -> bool:
        """Whether ``rho`` is 1."""
        return self.rho == 1

    @property
    def observed_rows(self) -> PromptRows:
        """All: text between images counts too."""
        return "all"

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """From the reference layer, the one before a quarter of the depth, to the last."""
        return tuple(range(max(round(num_layers / 4), 1) - 1, num_layers))

    def bind(self, anatomy: Anatomy) -> CMAI:
        """Resolve layers; those without softmax attention are left out."""
        bound = super().bind(anatomy)
        with_attention = {site.layer_idx for site in anatomy.sites}
        layers = tuple(layer for layer in bound.layer_indices if layer in with_attention)
        if len(layers) < 2:
            raise MethodError(
                f"cmai: layers={self.layers!r} leaves {len(layers)} layer(s) with softmax attention, and it needs two: "
                "a reference layer and one to edit. Choose more with layers=..."
            )
        return dataclasses.replace(bound, layers=layers)

    def observes_at(self, layer: Layer) -> bool:
        """Whether this is the reference layer."""
        return layer.site.layer_idx == self.layer_indices[0]

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Add rows to what text looked at, and choose what they keep."""
        layer.shared = Focus.extended(layer.shared, attn_weights, layer, self.rho)

    def reorder(self, learned: Focus, beams: torch.Tensor) -> Focus:
        """Follow beam search: generated rows differ between the beams of a prompt."""
        return learned.reordered(beams)

    def crop(self, learned: Focus, length: int) -> Focus:
        """Forget image tokens behind ``length``; rows behind it are written anew before they are read."""
        return learned.cropped(length)

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hide keys from the rows ``[batch, num_heads, rows, keys]``."""
        if self.observes_at(layer):
            return scores, torch.zeros_like(scores[..., 0], dtype=torch.bool)
        focus: Focus = layer.shared
        dropped = focus.dropped_keys(layer, scores)[:, None] & allowed
        edited = dropped.any(-1).expand(scores.shape[:3])
        hidden = scores.masked_fill(dropped, torch.finfo(scores.dtype).min)
        if self.renorm == "image":
            image = visible(layer.keys("image", scores), allowed)
            shift = log_mass(scores, image) - log_mass(scores, image & ~dropped)
            edited = edited & shift.isfinite()  # a window may show no image token that is kept
            hidden = torch.where(image & ~dropped, scores + shift[..., None], hidden)
        return torch.where(edited[..., None], hidden, scores), edited
