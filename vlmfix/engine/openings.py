"""(query, key) pairs that methods open in the causal mask of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from vlmfix.model.attention import (
    AttentionCall,
    Opening,
    explicit_scores,
    masked_softmax,
    opened_attention,
    visible_keys,
    weighted_values,
)

if TYPE_CHECKING:
    from vlmfix.engine.base_output import BaseOutput
    from vlmfix.methods.base import Method
    from vlmfix.methods.views import Layer


def opening_of(method: Method, layer: Layer) -> Opening:
    """Return what a method opens in an attention call of a prompt."""
    call, past = layer.call, layer.forward.past
    assert call is not None
    num_keys, device = call.key.shape[2], call.query.device
    offset = layer.key_offset(num_keys)
    assert isinstance(offset, int)
    assert isinstance(past, int)
    before = past - offset

    def pairs(start: int, stop: int) -> torch.Tensor:
        opened = method.open_mask(layer, start, stop).to(device)
        return F.pad(opened, (before, num_keys - before - opened.shape[2]))[:, None]

    return Opening(method.mask_bias, pairs)


def write_opened_rows(base: BaseOutput, call: AttentionCall, openers: Sequence[Layer], stop: int) -> None:
    """Compute rows with opened pairs and write them over the base kernel's.

    Args:
        base: What the kernel computed.
        call: The attention call, with its openings.
        openers: For each of them, the opening method's view of the layer.
        stop: End of the rows that may have opened pairs.
    """
    chunks, numbers = list(call.row_chunks(0, stop)), [layer.index for layer in openers]
    for first, last in chunks:
        opened = torch.stack([opening.pairs(first, last).any(3) for opening in call.openings]).any(0)  # [batch, 1, q]
        if base.weights is None:
            base.write(first, opened_attention(call, first, last), None, opened, numbers)
        else:
            attn_weights = masked_softmax(*explicit_scores(call, first, last))
            base.write(first, weighted_values(call, attn_weights), attn_weights, opened, numbers)
    for layer, opening in zip(openers, call.openings, strict=True):
        _count(layer, opening, call, chunks)


def _count(layer: Layer, opening: Opening, call: AttentionCall, chunks: Sequence[tuple[int, int]]) -> None:
    """Count the rows of all heads that see a key they did not see before, once for all layers with such keys."""

    def newly_open_rows() -> torch.Tensor:
        found = [torch.zeros((), dtype=torch.int64, device=call.query.device)]
        for start, stop in chunks:
            pairs, visible = opening.pairs(start, stop), visible_keys(call, start, stop)
            if visible is not None:
                hidden = ~F.pad(visible, (0, pairs.shape[3] - visible.shape[3])).all(1, keepdim=True)
                found.append((pairs & hidden).any(3).sum())
        return torch.stack(found).sum()

    layer.count(layer.per_keys(newly_open_rows, call.key[..., 0]) * call.query.shape[1])
