"""What the base kernel computed for all rows of an attention call, and edited rows written over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vlmfix.methods.views import Forward
    from vlmfix.model.attention import AttentionCall


class BaseOutput:
    """The base kernel's output of one attention call.

    Args:
        forward: The forward.
        call: The call; the kernel runs at once.

    Attributes:
        head_outputs: ``[batch, q_len, num_heads, value_dim]``.
        weights: ``[batch, num_heads, q_len, keys]``, or ``None`` where the kernel returns none.
    """

    def __init__(self, forward: Forward, call: AttentionCall) -> None:
        self.head_outputs, self.weights = call.base()
        self._forward = forward
        if self.head_outputs.requires_grad:  # autograd keeps what the kernel returned
            self.head_outputs = self.head_outputs.clone()
            self.weights = None if self.weights is None else self.weights.clone()

    def write(
        self,
        start: int,
        new_heads: torch.Tensor,
        new_weights: torch.Tensor | None,
        edited: torch.Tensor,
        numbers: Sequence[int],
        head_index: torch.Tensor | None = None,
    ) -> None:
        """Write edited rows over it.

        Args:
            start: The first of the query rows in hand.
            new_heads: ``[batch, rows, heads, value_dim]``.
            new_weights: ``[batch, heads, rows, keys]``, where the kernel returns weights.
            edited: bool ``[batch, heads or 1, rows]``: which of them to write.
            numbers: The methods that edited them.
            head_index: The heads in hand, int64; ``None`` for all.
        """
        rows = slice(start, start + new_heads.shape[1])
        in_heads = edited.transpose(1, 2)[..., None]
        self._write(self.head_outputs[:, rows], new_heads, in_heads, head_index, 2, numbers)
        if self.weights is not None and new_weights is not None:
            weights = self.weights[:, :, rows, : new_weights.shape[-1]]
            self._write(weights, new_weights.to(weights.dtype), edited[..., None], head_index, 1, ())

    def _write(
        self,
        stock: torch.Tensor,
        new: torch.Tensor,
        where: torch.Tensor,
        head_index: torch.Tensor | None,
        heads_dim: int,
        numbers: Sequence[int],
    ) -> None:
        old = stock if head_index is None else stock.index_select(heads_dim, head_index)
        if numbers and is_measured(self._forward):
            self._forward.record_move(numbers, old, new, where)
        if head_index is None:
            stock.copy_(torch.where(where, new, old))
        else:
            stock.index_copy_(heads_dim, head_index, torch.where(where, new, old))


def is_measured(forward: Forward) -> bool:
    """Whether it is measured how far outputs move; compiled code leaves it out."""
    return forward.is_measured and not torch.compiler.is_compiling()
