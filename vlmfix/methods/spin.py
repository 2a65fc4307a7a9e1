"""SPIN: Image-Guided Head Suppression (Sarkar, Che, Gavin, Beerel and Kundu, EMNLP 2025, arXiv 2505.16411)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import best
from vlmfix.methods.views import Layer, Rows
from vlmfix.model.anatomy import Anatomy, AttentionKind
from vlmfix.model.attention import explicit_scores, masked_softmax, visible_keys


@dataclass(frozen=True)
class SPIN(Method):
    """Shrink the outputs of the heads that look least at the image, chosen anew for every token.

    In the row that predicts the next token, ``g_h = sum_{j in image} q_h . k_j / sqrt(d)``. The ``floor(keep H)`` heads
    with the largest g stay as they are: at least one, and the lower index first among equals. The outputs of the others
    are multiplied by ``suppress`` in that row. The release first divides g by its standard deviation and takes a
    softmax over heads, which changes no order. Rows that see no image token are left alone.

    g is computed as ``q_h . sum_j k_j`` in fp32, before any cap on the scores. The sum of image keys is kept from the
    prompt on, and leaves out keys that a mask hides. In a batch, the release suppresses heads in the prompt of the last
    sample alone, which is a fault that is not followed. It edits all layers, and for the 13B model and Qwen-VL the
    first 20: ``layers=":20"``.
    """

    name = "spin"
    paper = "arXiv 2505.16411"
    summary = "shrinks the heads that look least at the image, chosen per token"
    edits_heads = True
    prompt_rows = "last"

    keep: float = parameter(
        0.95,
        low=0,
        high=1,
        off=1,
        search=Range(0.5, 1.0),
        help="Share of heads that stay as they are. The released 0.95 for captions with LLaVA-1.5-7B (0.8 for its "
        "POPE, 0.9 for MMHal with the 13B model, 0.7 for Qwen-VL).",
    )
    suppress: float = parameter(
        0.08,
        low=0,
        high=1,
        off=1,
        search=Range(0.0, 1.0),
        help="Factor of the other heads. The released 0.08 for captions (0.1 for POPE, 0 where none is given).",
    )
    score: Literal["scores", "mass"] = parameter(
        "scores",
        help='``"scores"`` as released: raw scores, to which a constant can be added without any change of attention. '
        '``"mass"`` (ours): the attention weight on the image.',
    )

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Wherever there are image keys; the share of attention on them (``"mass"``) needs others beside them."""
        return ("joint", "encoder") if self.score == "mass" else ("joint", "encoder", "image")

    @property
    def scales_heads(self) -> bool:  # type: ignore[override]
        """Unless what it suppresses becomes 0."""
        return self.suppress != 0

    def num_kept(self, num_heads: int) -> int:
        """Return how many of a layer's heads stay as they are."""
        return max(1, math.floor(self.keep * num_heads + 1e-9))  # .29 * 100 is 28.999...

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say when no head is suppressed."""
        if self.is_identity or self.num_kept(anatomy.num_heads) < anatomy.num_heads:
            return ()
        return (f"spin: keep={self.keep:g} suppresses none of the model's {anatomy.num_heads} heads",)

    def crop(self, learned: object, length: int) -> None:
        """Forget the sum of image keys: some of them may be gone."""

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Shrink heads of ``[batch, q_len, num_heads, head_dim]`` in the rows that predict a token."""
        rows = layer.forward.rows("last")
        if rows.start == rows.stop:
            return head_outputs
        gates, sees_image = (_image_mass if self.score == "mass" else _summed_scores)(layer, rows)
        suppressed = self.choose(gates) & sees_image[:, None]
        if rows.mask is not None:
            suppressed &= rows.mask[:, None].to(suppressed.device)
        layer.count(suppressed.sum() if layer.forward.is_prefill else suppressed)
        scale = torch.where(suppressed, self.suppress, 1.0).transpose(1, 2)[..., None].to(head_outputs.dtype)
        edited = head_outputs.clone() if head_outputs.requires_grad else head_outputs
        edited[:, rows.start : rows.stop].mul_(scale)
        return edited

    def choose(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the heads to suppress, by gates ``[batch, num_heads, rows]``: bool of that shape."""
        return ~best(gates, self.num_kept(gates.shape[1]))


def _summed_scores(layer: Layer, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the scores of the image, up to a positive factor.

    Returns:
        fp32 ``[batch, num_heads, rows]``, and which rows see any image key, bool ``[batch, rows or 1]``.
    """
    query, key = layer.call.query[:, :, rows.start : rows.stop].float(), layer.call.key
    known = None if layer.forward.is_prefill else layer.learned
    if known is None:
        seen = _seen_image_keys(layer, rows)
        known = seen.float()[:, None] @ key[:, :, : seen.shape[2]].float(), seen.any(2)
        if not layer.site.is_sliding:
            layer.learned = known
    sums, sees_image = known
    batch, num_heads, num_rows, size = query.shape
    # Query heads that share a key head stand next to each other.
    grouped = query.reshape(batch, key.shape[1], num_heads // key.shape[1], num_rows, size)
    return (grouped * sums[:, :, None]).sum(-1).flatten(1, 2), sees_image


def _seen_image_keys(layer: Layer, rows: Rows) -> torch.Tensor:
    """Return which image keys rows see: bool ``[batch, rows, keys]``.

    Without a window all rows see the same, and ``rows`` is 1.
    """
    visible = visible_keys(layer.call, rows.start, rows.stop)
    image = layer.keys("image", layer.call.key[..., 0] if visible is None else visible)[:, None]
    seen = image if visible is None else image & visible.any(1)
    if layer.site.is_sliding:
        return seen
    return (seen if rows.mask is None else seen & rows.mask[..., None].to(seen.device)).any(1, keepdim=True)


def _image_mass(layer: Layer, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the weights of the image; returns what ``_summed_scores`` does."""
    found = []
    for start, stop in layer.call.row_chunks(rows.start, rows.stop):
        attn_weights = masked_softmax(*explicit_scores(layer.call, start, stop))
        found.append((attn_weights * layer.keys("image", attn_weights)[:, None, None]).sum(-1))
    mass = torch.cat(found, dim=2)
    return mass, (mass > 0).any(1)
