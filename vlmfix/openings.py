"""Pairs of query and key that the causal mask hides and a method opens, written out for a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from vlmfix.attention import visible_keys

if TYPE_CHECKING:
    from vlmfix.attention import AttentionCall
    from vlmfix.methods.base import Method
    from vlmfix.run import Layer


class Opening:
    """What one method opens in one attention call of a prompt.

    Attributes:
        bias: Added to the scores of opened pairs; 0 as if they had never been hidden.
    """

    def __init__(self, method: Method, layer: Layer) -> None:
        self._method = method
        self._layer = layer
        self.bias = method.mask_bias

    def pairs(self, start: int, stop: int) -> torch.Tensor:
        """Return the pairs of some query rows, aligned with the call's keys: bool ``[batch, 1, rows, keys]``."""
        call, run = self._layer.call, self._layer.run
        assert call is not None
        num_keys = call.key.shape[2]
        offset, past = run.key_offset(self._layer.site, num_keys), run.past
        assert isinstance(offset, int)
        assert isinstance(past, int)
        pairs = self._method.open_mask(self._layer, start, stop).to(call.query.device)
        left = past - offset
        return F.pad(pairs, (left, num_keys - left - pairs.shape[2]))[:, None]

    def count(self, call: AttentionCall, chunks: Sequence[tuple[int, int]]) -> None:
        """Count the rows of all heads that see a key they did not see before, once for all layers with such keys."""

        def newly_open_rows() -> torch.Tensor:
            found = []
            for start, stop in chunks:
                pairs, visible = self.pairs(start, stop), visible_keys(call, start, stop)
                if visible is not None:
                    hidden = ~F.pad(visible, (0, pairs.shape[3] - visible.shape[3])).all(1, keepdim=True)
                    found.append((pairs & hidden).any(3).sum())
            return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.int64, device=call.query.device)

        self._layer.count(self._layer.per_keys(newly_open_rows, call.key[..., 0]) * call.query.shape[1])
