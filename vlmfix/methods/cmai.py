"""CMAI: inhibiting low-focus text-image attention (our reading of Yang et al., arXiv 2411.15453)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from vlmfix.errors import MethodError
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import ExperimentalMethod, log_mass, on_device, take_keys, visible
from vlmfix.methods.selection import DefaultLayers
from vlmfix.methods.views import EditedRows, Layer
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class CMAI(ExperimentalMethod):
    """Hide from each text token the image tokens that neither it nor the text it reads looks at.

    With the head-mean weights of a reference layer, ``A_ti`` of text on image tokens and ``A_tt`` of text on text, the
    focus of a text token is ``F = A_tt A_ti``. It keeps the smallest set of image tokens that holds ``rho`` of its
    focus. The others are masked out for it in all later layers and heads. The rows are those behind the last image
    token in a prompt, and that of every decode step; text between images lends its focus. Softmax shares what was
    hidden out among the kept image tokens **and** the text, so that the image's share falls: see ``renorm``.

    Only the paper's abstract was known to us: formula and numbers are our reading of it, a new method rather than a
    reproduction. Its companion that merges image tokens (VMTC) is left out: it changes the prompt's length, and its
    details are not known. The paper is about following instructions; no result on hallucination is published.
    """

    name = "cmai"
    paper = "arXiv 2411.15453 (abstract)"
    summary = "hides image tokens that a text token's context does not look at (experimental)"
    caveat = "our reading of a paper known by its abstract alone, not a reproduction"
    edits_scores = True
    hides_keys = True
    reorders = True  # generated rows differ between the beams of a prompt
    needs_past = True
    needs_cache = False
    observed_rows = "all"  # text between images lends its focus too
    default_layers = DefaultLayers(
        "from the one before a quarter of the depth on (ours); the first one is the reference, which is not edited",
        lambda num_layers: tuple(range(max(round(num_layers / 4), 1) - 1, num_layers)),
    )

    rho: float = parameter(
        0.9,
        above=0,
        high=1,
        off=1,
        search=Range(0.5, 1.0),
        help="Share of its focus a row keeps. 0.9 is ours, untested.",
    )
    renorm: Literal["none", "image"] = parameter(
        "none",
        help='``"image"`` raises the kept image tokens so that the image keeps its share of every row; ``"none"`` does '
        "not.",
    )

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

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
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


@dataclass(frozen=True)
class Focus:
    """What text looked at in a reference layer, and which image tokens the rows of a forward lose.

    Attributes:
        seen: Attention of text tokens to the image, fp32 ``[batch, prompt, keys]``, mean over heads: by image token
            (0 for others) and by text token, the latter aligned with the reference layer's keys.
        offset: Position of the first of those keys; a sliding cache drops early ones.
        dropped: Image tokens outside the focus of the rows of the forward, bool ``[batch, prompt, q_len]``.
    """

    seen: torch.Tensor
    offset: int | torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def extended(cls, known: Focus | None, attn_weights: torch.Tensor, layer: Layer, rho: float) -> Focus:
        """Add the rows a method observes, see ``Method.observe``, and find what is outside their focus."""
        forward, (start, stop) = layer.forward, layer.rows
        prompt, num_keys = forward.image_mask.shape[1], attn_weights.shape[-1]
        size = layer.call.key.shape[2]  # a static cache has its final size from the start
        offset = layer.key_offset(num_keys)
        weights = attn_weights.mean(1)  # [batch, rows, keys]
        image = forward.image_mask.to(weights.device)
        is_text = _text_rows(layer).to(weights.device)
        new = take_keys(weights, -offset, prompt) * (image[:, None] & is_text[..., None])
        seen = weights.new_zeros(weights.shape[0], prompt, size)
        if known is not None:
            seen = take_keys(known.seen.to(weights.device), offset - known.offset, size)
            seen = F.pad(seen, (0, 0, 0, prompt - seen.shape[1]))
        # Rows of drafts that were dropped stay until they are written anew: no row sees them before.
        positions = torch.arange(start, stop, device=weights.device) + on_device(forward.past - offset, weights.device)
        seen = seen.index_copy(2, positions, new.transpose(1, 2))
        dropped = low_focus(weights @ seen[..., :num_keys].transpose(1, 2), image, rho).transpose(1, 2)
        if start > 0 and known is not None:
            dropped = torch.cat([known.dropped.to(dropped.device), dropped], dim=2)
        return cls(seen, offset, dropped)

    def dropped_keys(self, layer: Layer, like: torch.Tensor) -> torch.Tensor:
        """Return what the rows in hand lose, by the keys of any layer: bool ``[batch, rows, keys]``, as ``like``."""
        start, stop = layer.rows
        by_key = layer.visible_keys(self.dropped[:, :, start:stop], like.shape[-1]).to(like.device)
        return F.pad(by_key, (0, 0, 0, like.shape[-1] - by_key.shape[1])).transpose(1, 2)


def low_focus(focus: torch.Tensor, image: torch.Tensor, rho: float) -> torch.Tensor:
    """Return the image tokens outside the smallest set with a share ``rho`` of each row's focus.

    Args:
        focus: fp32 ``[batch, rows, prompt]``, 0 where there is no image token.
        image: Bool ``[batch, prompt]``.
        rho: The share, in (0, 1].

    Returns:
        Bool ``[batch, rows, prompt]``; none in rows without any focus.
    """
    ranked, order = focus.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    total = ranked.sum(-1, keepdim=True)
    outside = (before >= rho * total) & (total > 0)
    return torch.zeros_like(outside).scatter(-1, order, outside) & image[:, None]


def _text_rows(layer: Layer) -> torch.Tensor:
    """Return which of the rows in hand are text tokens: bool ``[batch, rows]``."""
    forward, (start, stop) = layer.forward, layer.rows
    mask = forward.has_image[:, None].expand(-1, stop - start) if layer.row_mask is None else layer.row_mask
    if not forward.is_prefill:
        return mask
    image = forward.image_mask[:, -forward.prompt_len :][:, start:stop]
    return mask & ~F.pad(image, (0, stop - start - image.shape[1]))
