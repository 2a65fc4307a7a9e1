"""What the base kernel computed for all rows of an attention call; edited rows, and rows with opened keys, over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vlmfix.methods.base import Method
from vlmfix.methods.views import Forward, Layer
from vlmfix.model.attention import (
    CHUNK_ELEMENTS,
    AttentionCall,
    Opening,
    explicit_scores,
    is_plain,
    masked_attention,
    masked_softmax,
    opened_attention,
    opened_bias,
    visible_keys,
    weighted_values,
)


class BaseOutput:
    """The output of one attention call, by default the base kernel's, which runs at once.

    Attributes:
        forward: The forward.
        head_outputs: ``[batch, q_len, num_heads, value_dim]``.
        weights: ``[batch, num_heads, q_len, keys]``, or ``None`` where the kernel returns none.
    """

    def __init__(
        self,
        forward: Forward,
        call: AttentionCall,
        output: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> None:
        self.head_outputs, self.weights = output or call.base()
        self.forward, self._call = forward, call
        if self.head_outputs.requires_grad:  # autograd keeps what the kernel returned
            self.head_outputs = self.head_outputs.clone()
            self.weights = None if self.weights is None else self.weights.clone()

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return head outputs and weights; where gradients may flow through these, the outputs are made of them."""
        if self.weights is not None and self.weights.requires_grad:
            return weighted_values(self._call, self.weights), self.weights
        return self.head_outputs, self.weights

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
        if numbers and is_measured(self.forward):
            self.forward.record_move(numbers, old, new, where)
        if head_index is None:
            stock.copy_(torch.where(where, new, old))
        else:
            stock.index_copy_(heads_dim, head_index, torch.where(where, new, old))


def is_measured(forward: Forward) -> bool:
    """Whether it is measured how far outputs move; compiled code leaves it out."""
    return forward.is_measured and not torch.compiler.is_compiling()


def opening_of(method: Method, layer: Layer) -> Opening:
    """Return what a method opens in an attention call of a prompt."""
    call, past = layer.call, layer.forward.past
    num_keys, device = call.key.shape[2], call.query.device
    offset = layer.key_offset(num_keys)
    assert isinstance(offset, int)
    assert isinstance(past, int)
    before = past - offset

    def pairs(start: int, stop: int) -> torch.Tensor:
        opened = method.open_mask(layer, start, stop).to(device)
        return F.pad(opened, (before, num_keys - before - opened.shape[2]))[:, None]

    return Opening(method.mask_bias, pairs)


def with_opened_rows(forward: Forward, call: AttentionCall, openers: Sequence[Layer]) -> BaseOutput:
    """Compute a call of a prompt in which pairs are opened.

    Where every sample has an image and the kernel is SDPA, its rows are computed once, with the opened mask. Else the
    base kernel runs first: samples without an image then keep what it gives, to the bit.

    Args:
        forward: The forward.
        call: The attention call, with its openings.
        openers: For each of them, the opening method's view of the layer.

    Returns:
        The output, with the opened pairs.
    """
    stop, numbers = forward.image_stop, tuple(layer.index for layer in openers)
    for layer, opening in zip(openers, call.openings, strict=True):
        _count(layer, opening, call, list(call.row_chunks(0, stop)))
    if stop and call.site.implementation == "sdpa" and is_plain(call) and forward.state.all_images:
        rows = _pieces(forward, call, numbers, call.query.shape[2])
        heads = torch.cat([opened_attention(call, piece.start, piece.bias, piece.seen) for piece in rows], 1)
        if is_measured(forward):
            key = ("watched", numbers, *call.visibility)
            index, mask, where = forward.once_for(key, (call.attention_mask,), lambda: _watched_rows(call, stop))
            forward.record_move(numbers, masked_attention(call, index, mask), heads.index_select(1, index), where)
        return BaseOutput(forward, call, (heads, None))
    base = BaseOutput(forward, call)
    if base.weights is None and is_plain(call):
        for first, opened, bias, seen in _pieces(forward, call, numbers, stop):
            if len(seen):
                base.write(first, opened_attention(call, first, bias, seen), None, opened, numbers)
    else:
        for first, last in call.row_chunks(0, stop):
            attn_weights = masked_softmax(*explicit_scores(call, first, last))
            opened = _opened(call, first, last)
            base.write(first, weighted_values(call, attn_weights), attn_weights, opened, numbers)
    return base


def _pieces(forward: Forward, call: AttentionCall, numbers: tuple[int, ...], stop: int) -> Iterable[OpenedRows]:
    """Return the rows before ``stop`` in pieces, once for all layers with one mask; one by one where they are large."""
    if call.query.shape[0] * stop * call.key.shape[2] > CHUNK_ELEMENTS:
        return _opened_rows(call, stop)
    key = ("opened", numbers, stop, *call.visibility)
    found: list[OpenedRows] = forward.once_for(key, (call.attention_mask,), lambda: list(_opened_rows(call, stop)))
    return found


def _watched_rows(call: AttentionCall, stop: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Pick some 32 rows, spread over those before ``stop``, by which it is measured how far outputs move.

    Returns:
        The rows, int64 ``[rows]``; which keys they see as stock, see ``visible_keys``; and in which of them pairs are
        opened, bool ``[batch, rows, 1, 1]``.
    """
    rows = range(stop - 1, -1, -max(1, stop // 32))  # each by itself: never a square of the prompt
    visible = [visible_keys(call, row, row + 1) for row in rows]
    mask = torch.cat([each for each in visible if each is not None], 2) if visible[0] is not None else None
    opened = torch.cat([_opened(call, row, row + 1) for row in rows], 2)
    return torch.tensor(list(rows), device=call.query.device), mask, opened.transpose(1, 2)[..., None]


class OpenedRows(NamedTuple):
    """Rows of a prompt in which pairs are opened; the same in all layers with one mask.

    Attributes:
        start: The first row.
        opened: In which rows pairs are opened, bool ``[batch, 1, rows]``.
        bias: Their additive mask for the keys that any of them sees, ``[batch, num_heads or 1, rows, seen]``.
        seen: These keys, int64 ``[seen]``.
    """

    start: int
    opened: torch.Tensor
    bias: torch.Tensor
    seen: torch.Tensor


def _opened_rows(call: AttentionCall, stop: int) -> Iterator[OpenedRows]:
    """Yield the rows before ``stop`` in pieces, few enough that a piece does not see every key."""
    for first, last in call.row_chunks(0, stop, most=256):
        yield OpenedRows(first, _opened(call, first, last), *opened_bias(call, first, last))


def _opened(call: AttentionCall, start: int, stop: int) -> torch.Tensor:
    return torch.stack([opening.pairs(start, stop).any(3) for opening in call.openings]).any(0)


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
