"""CMAI: inhibiting low-focus text-image attention (our reading of Yang et al., arXiv 2411.15453)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.anatomy import Anatomy
from vlmfix.errors import MethodError
from vlmfix.methods._experimental import ExperimentalMethod
from vlmfix.methods._scores import log_mass, visible
from vlmfix.methods.base import PromptRows
from vlmfix.run import Layer


@dataclass(frozen=True)
class Focus:
    """What text looked at in the reference layer, and which image tokens the rows of a forward keep.

    Attributes:
        seen: Attention of text tokens to the image, fp32 ``[batch, prompt, keys]``, mean over heads: by image token
            (0 for others) and by text token, the latter aligned with the reference layer's keys.
        offset: Position of the first of those keys; a sliding cache drops early ones.
        dropped: Image tokens that the rows of the forward no longer look at, bool ``[batch, prompt, q_len]``.
    """

    seen: torch.Tensor
    offset: int | torch.Tensor
    dropped: torch.Tensor


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
    caveat: ClassVar[str] = "our reading of a paper known by its abstract alone, not a reproduction"
    edits_scores: ClassVar[bool] = True
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
        run, (start, stop) = layer.run, layer.rows
        known: Focus | None = layer.shared
        prompt, num_keys = run.image_mask.shape[1], attn_weights.shape[-1]
        offset = run.key_offset(layer.site, num_keys)
        weights = attn_weights.mean(1)  # [batch, rows, keys]
        image = run.image_mask.to(weights.device)
        new = take(weights, -offset, prompt) * (image[:, None] & self._is_text(layer)[..., None].to(image.device))
        seen = weights.new_zeros(weights.shape[0], prompt, num_keys)
        if known is not None:
            seen = take(known.seen.to(weights.device), offset - known.offset, num_keys)
            seen = torch.nn.functional.pad(seen, (0, 0, 0, prompt - seen.shape[1]))
        positions = torch.arange(start, stop, device=weights.device) + (run.past - offset)
        seen = seen.index_copy(2, positions, new.transpose(1, 2))
        dropped = self.low_focus(weights @ seen.transpose(1, 2), image).transpose(1, 2)
        if start > 0 and known is not None:
            dropped = torch.cat([known.dropped.to(dropped.device), dropped], dim=2)
        layer.shared = Focus(seen, offset, dropped)

    @staticmethod
    def _is_text(layer: Layer) -> torch.Tensor:
        """Which of the rows in hand are text tokens: bool ``[batch, rows]``."""
        run, (start, stop) = layer.run, layer.rows
        mask = run.has_image[:, None].expand(-1, stop - start) if layer.row_mask is None else layer.row_mask
        if not run.is_prefill:
            return mask
        image = run.image_mask[:, -run.prompt_len :][:, start:stop]
        return mask & ~torch.nn.functional.pad(image, (0, stop - start - image.shape[1]))

    def low_focus(self, focus: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Return the image tokens outside the smallest set with a share ``rho`` of each row's focus.

        Args:
            focus: F, fp32 ``[batch, rows, prompt]``, 0 where there is no image token.
            image: Bool ``[batch, prompt]``.

        Returns:
            Bool ``[batch, rows, prompt]``; none in rows without any focus.
        """
        ranked, order = focus.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        total = ranked.sum(-1, keepdim=True)
        outside = (before >= self.rho * total) & (total > 0)
        return torch.zeros_like(outside).scatter(-1, order, outside) & image[:, None]

    def reorder(self, learned: Focus, beams: torch.Tensor) -> Focus:
        """Follow beam search: generated rows differ between the beams of a prompt."""
        seen, dropped = (each.index_select(0, beams.to(each.device)) for each in (learned.seen, learned.dropped))
        return Focus(seen, learned.offset, dropped)

    def crop(self, learned: Focus, length: int) -> Focus:
        """Forget image tokens behind ``length``; rows behind it are written anew before they are read."""
        return dataclasses.replace(learned, seen=learned.seen[:, :length], dropped=learned.dropped[:, :length])

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hide keys from the rows ``[batch, num_heads, rows, keys]``."""
        if self.observes_at(layer):
            return scores, torch.zeros_like(scores[..., 0], dtype=torch.bool)
        start, stop = layer.rows
        by_key = layer.visible_keys(layer.shared.dropped[:, :, start:stop], scores.shape[-1]).to(scores.device)
        by_key = torch.nn.functional.pad(by_key, (0, 0, 0, scores.shape[-1] - by_key.shape[1]))
        dropped = by_key.transpose(1, 2)[:, None] & allowed
        edited = dropped.any(-1).expand(scores.shape[:3])
        hidden = scores.masked_fill(dropped, torch.finfo(scores.dtype).min)
        if self.renorm == "image":
            image = visible(layer.keys("image", scores), allowed)
            shift = log_mass(scores, image) - log_mass(scores, image & ~dropped)
            edited = edited & shift.isfinite()  # a window may show no image token that is kept
            hidden = torch.where(image & ~dropped, scores + shift[..., None], hidden)
        return torch.where(edited[..., None], hidden, scores), edited


def take(per_key: torch.Tensor, start: int | torch.Tensor, length: int) -> torch.Tensor:
    """Return entries ``start..start + length - 1`` of the last dimension, 0 where there are none."""
    wanted = torch.arange(length, device=per_key.device) + start
    inside = (wanted >= 0) & (wanted < per_key.shape[-1])
    return per_key[..., wanted.clamp(0, per_key.shape[-1] - 1)] * inside
