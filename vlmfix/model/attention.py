"""One attention call: the model's own kernel for all rows, and explicit scores and weights for some of them.

Softmax is written out in fp32, and only for the query rows that somebody wants to see or edit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import AttentionSite
from vlmfix.model.images import block_mask_rows
from vlmfix.model.kernels import base_kernel, is_flash

SINKS = ("s_aux", "sinks")
"""What models call learned terms of the softmax that belong to no key (gpt-oss, Inkling 2)."""


CHUNK_ELEMENTS = 2**24
"""Most attention weights written out at a time (64 MiB in fp32)."""


class Opening(NamedTuple):
    """(query, key) pairs that the mask hides and that are to be seen all the same.

    Attributes:
        bias: Added to the scores of opened pairs; 0 as if they had never been hidden.
        pairs: Returns the pairs of the rows ``start..stop - 1``, aligned with the call's keys: bool
            ``[batch, 1, rows, keys]``.
    """

    bias: float
    pairs: Callable[[int, int], torch.Tensor]


class AttentionCall(NamedTuple):
    """The arguments of one attention call.

    Attributes:
        site: The patched module's site.
        module: The attention module.
        query: ``[batch, num_heads, q_len, head_dim]``, rotary embedding applied.
        key: ``[batch, num_kv_heads, keys, head_dim]``, cache included, not repeated for grouped queries.
        value: ``[batch, num_kv_heads, keys, value_dim]``.
        attention_mask: What the stock model made for its own kernel, or ``None`` for causal.
        kwargs: Everything else.
        openings: Pairs to open; the explicit rows see them, the base kernel does not.
        heads: The query heads in hand, where a call holds only some of its layer's; ``None`` for all.
        head_index: The same on the call's device, int64.
    """

    site: AttentionSite
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: Any
    kwargs: dict[str, Any]
    openings: tuple[Opening, ...] = ()
    heads: tuple[int, ...] | None = None
    head_index: torch.Tensor | None = None

    @property
    def visibility(self) -> tuple[Hashable, ...]:
        """What decides, beside the mask, which keys the rows of a call see."""
        site, (num_keys, kwargs) = self.site, (self.key.shape[2], self.kwargs)
        flags = (kwargs.get("is_causal"), kwargs.get("sliding_window"))
        return (site.kind, site.is_sliding, self.query.shape[2], num_keys, self.key.device, *flags)

    def base(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model's own kernel: ``[batch, q_len, num_heads, value_dim]`` and its weights, if it returns them."""
        kernel, module = base_kernel(self.site, self.module)
        output: tuple[torch.Tensor, torch.Tensor | None] = kernel(
            module, self.query, self.key, self.value, self.attention_mask, **self.kwargs
        )
        return output

    def of_heads(self, heads: tuple[int, ...], head_index: torch.Tensor, key_index: torch.Tensor) -> AttentionCall:
        """Return the call of some query heads alone, each with its own copy of its key head.

        Args:
            heads: The query heads.
            head_index: The same, int64 on the call's device.
            key_index: The key heads they share, int64 on the call's device.
        """
        num_heads, mask, kwargs = self.query.shape[1], self.attention_mask, self.kwargs
        if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] == num_heads > 1:
            mask = mask.index_select(1, head_index)
        bias = kwargs.get("position_bias")
        if bias is not None and bias.shape[1] == num_heads > 1:
            kwargs = {**kwargs, "position_bias": bias.index_select(1, head_index)}
        return self._replace(
            query=self.query.index_select(1, head_index),
            key=self.key.index_select(1, key_index),
            value=self.value.index_select(1, key_index),
            attention_mask=mask,
            kwargs=kwargs,
            heads=heads,
            head_index=head_index,
        )

    def row_chunks(self, start: int, stop: int, most: int | None = None) -> Iterator[tuple[int, int]]:
        """Split query rows so that a chunk has at most ``most`` and its explicit weights ``CHUNK_ELEMENTS``."""
        per_row = self.query.shape[0] * self.query.shape[1] * self.key.shape[2]
        size = max(1, min(CHUNK_ELEMENTS // per_row, most or stop))
        for first in range(start, stop, size):
            yield first, min(first + size, stop)


def _computes_in_half(states: torch.Tensor) -> bool:
    """Whether a matrix product of these states is one of float16, by itself or under autocast."""
    kind = states.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype) == torch.float16


def explicit_scores(call: AttentionCall, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write out the scores of some query rows, before the softmax.

    Args:
        call: The attention call.
        start: First query row, relative to the forward.
        stop: End of the rows.

    Returns:
        fp32 ``[batch, num_heads, stop - start, keys]``, a fresh tensor, scaled and capped, with the additive parts of
        the mask; and the keys each row sees (bool, broadcastable to it), or ``None`` for all. Scores of hidden keys are
        arbitrary.

    Raises:
        UnsupportedFeatureError: The layer adds terms to its scores that are not written out here.
    """
    kwargs = call.kwargs
    sinks = [name for name in SINKS if kwargs.get(name) is not None]
    if sinks:
        raise UnsupportedFeatureError(
            f"{call.site.name} has learned sinks ({sinks[0]}) in its softmax, which methods that edit attention scores "
            "or weights do not support. Choose a method that edits head outputs, such as vlmfix.patch(model, 'vhr')."
        )
    key, allowed = _keys_and_mask(call, start, stop)
    query = call.query[:, :, start:stop]
    scaling = kwargs.get("scaling")
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _computes_in_half(query):  # unscaled scores overflow where those of fused kernels do not
        power = 2.0 ** math.floor(math.log2(scaling))  # exact, unlike the scaling itself
        query, scaling = query * power, scaling / power
    # Query heads that share a key head become rows of one product, so that no key is repeated.
    scores = _grouped(query, key.shape[1]) @ key.transpose(-1, -2)
    scores = _ungrouped(scores, stop - start).float()
    scores = scores * scaling if scores.requires_grad else scores.mul_(scaling)
    softcap = _softcap(call)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        scores = scores + position_bias[:, :, start:stop, : scores.shape[-1]]
    if allowed is not None and allowed.dtype != torch.bool:
        # An additive mask hides keys by its lowest value, and may add a bias to others (ALiBi).
        bias, allowed = allowed, allowed > torch.finfo(allowed.dtype).min / 2
        scores = scores + bias.masked_fill(~allowed, 0.0)
    for opening in call.openings:
        pairs = opening.pairs(start, stop)[..., : scores.shape[-1]]
        if allowed is not None:
            # Hidden keys were scored like others, so that an opened pair has its true score.
            newly = pairs & ~allowed
            scores = scores + opening.bias * newly
            allowed = allowed | pairs
    return scores, allowed


def visible_keys(call: AttentionCall, start: int, stop: int) -> torch.Tensor | None:
    """Return which keys some query rows see, apart from pairs opened by methods.

    Returns:
        Bool ``[batch or 1, num_heads or 1, stop - start, keys]``, where ``keys`` may be fewer than the call has: no row
        sees the others; or ``None`` when every row sees every key.
    """
    _, allowed = _keys_and_mask(call, start, stop)
    if allowed is None or allowed.dtype == torch.bool:
        return allowed
    return allowed > torch.finfo(allowed.dtype).min / 2


def masked_softmax(scores: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys each row sees; a row that sees none is spread evenly, as by the stock kernels' masks.

    Overwrites the scores of hidden keys, which mean nothing, unless autograd needs them.
    """
    if allowed is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~allowed, lowest) if scores.requires_grad else scores.masked_fill_(~allowed, lowest)
    return torch.softmax(scores, dim=-1)


def weighted_values(call: AttentionCall, attn_weights: torch.Tensor) -> torch.Tensor:
    """Weigh the values: ``[batch, num_heads, rows, keys]`` to head outputs ``[batch, rows, num_heads, value_dim]``."""
    value = call.value[:, :, : attn_weights.shape[-1]]
    outputs = _grouped(attn_weights.to(value.dtype), value.shape[1]) @ value
    return _ungrouped(outputs, attn_weights.shape[2]).transpose(1, 2)


def explicit_attention(call: AttentionCall, attn_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Head outputs of explicit weights, and the weights themselves where the base kernel would return them."""
    outputs = weighted_values(call, attn_weights).contiguous()
    return outputs, attn_weights.to(outputs.dtype) if call.site.implementation == "eager" else None


def is_plain(call: AttentionCall) -> bool:
    """Whether a layer's weights are a softmax of products and a mask, which a fused kernel can compute."""
    has_more = any(call.kwargs.get(name) is not None for name in ("position_bias", *SINKS))
    return not has_more and _softcap(call) is None


def opened_bias(call: AttentionCall, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the additive mask of rows with opened pairs, for the keys that any of them sees.

    Waits for the device.

    Returns:
        ``[batch, num_heads or 1, stop - start, seen]`` in the model's dtype, and these keys, int64 ``[seen]``.
    """
    key, allowed = _keys_and_mask(call, start, stop)
    if allowed is None:
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device)
    dtype = call.query.dtype
    lowest = torch.finfo(dtype).min
    bias = allowed.to(dtype)
    if allowed.dtype == torch.bool:
        bias = torch.zeros_like(bias).masked_fill(~allowed, lowest)
    bias = bias.expand(call.query.shape[0], -1, stop - start, key.shape[2])
    for opening in call.openings:
        pairs = opening.pairs(start, stop)[..., : key.shape[2]]
        bias = torch.where(pairs & (bias <= lowest / 2), opening.bias, bias)
    seen = (bias > lowest / 2).any(2).flatten(0, 1).any(0).nonzero()[:, 0]
    return bias.index_select(3, seen), seen


def opened_attention(call: AttentionCall, start: int, bias: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Head outputs ``[batch, rows, num_heads, value_dim]`` of rows from ``start`` on, see ``opened_bias``."""
    key, value = (states.index_select(2, seen) for states in (call.key, call.value))
    return _fused(call, call.query[:, :, start : start + bias.shape[2]], key, value, bias)


def masked_attention(call: AttentionCall, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Head outputs ``[batch, rows, num_heads, value_dim]`` of some rows, int64 ``[rows]``, see ``visible_keys``."""
    num_keys = call.key.shape[2] if mask is None else mask.shape[3]
    return _fused(call, call.query[:, :, rows], call.key[:, :, :num_keys], call.value[:, :, :num_keys], mask)


def _fused(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    options: Any = {"scale": call.kwargs.get("scaling"), "enable_gqa": key.shape[1] != query.shape[1]}
    return F.scaled_dot_product_attention(query, key, value, mask, **options).transpose(1, 2)


def _softcap(call: AttentionCall) -> float | None:
    """Return the cap on a layer's scores; sdpa ignores it where it does not refuse it."""
    softcap: float | None = call.kwargs.get("softcap")
    return None if softcap is None or call.site.implementation == "sdpa" else softcap


def _grouped(states: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Fold query heads that share a key head into rows: ``[batch, num_kv_heads, group * rows, ...]``."""
    batch, num_heads, rows, size = states.shape
    if num_heads == num_kv_heads:
        return states
    return states.reshape(batch, num_kv_heads, num_heads // num_kv_heads * rows, size)


def _ungrouped(states: torch.Tensor, rows: int) -> torch.Tensor:
    """Undo ``_grouped``: ``[batch, num_heads, rows, ...]``."""
    if states.shape[2] == rows:
        return states
    batch, num_kv_heads, grouped_rows, size = states.shape
    return states.reshape(batch, num_kv_heads * grouped_rows // rows, rows, size)


def _keys_and_mask(call: AttentionCall, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the keys to score and which of them each row may see.

    The mask is what the stock model made for its kernel: bool (true = attend) or additive, ``[batch, 1 or heads, rows,
    keys]``, or ``None`` when every key is visible.
    """
    mask, key = call.attention_mask, call.key
    q_len, num_keys = call.query.shape[2], key.shape[2]
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        return key, mask[:, :, start:stop, :num_keys]
    if mask is None and q_len == 1 and call.kwargs.get("sliding_window") is None:
        return key, None
    if mask is None and not is_flash(call.site.implementation):
        is_causal = call.kwargs.get("is_causal")
        if q_len == 1 or not (is_causal if is_causal is not None else getattr(call.module, "is_causal", True)):
            return key, None
        # As in transformers' sdpa: causal from the first key on (a longer static cache is still empty behind them).
        rows = torch.arange(start, stop, device=key.device)[:, None]
        return key[:, :, :q_len], (torch.arange(q_len, device=key.device) <= rows)[None, None]
    # Below, queries are the last ``q_len`` of the keys: flash kernels and block masks count them so.
    rows = torch.arange(start, stop, device=key.device)[:, None] + num_keys - q_len
    columns = torch.arange(num_keys, device=key.device)
    if mask is not None and not isinstance(mask, torch.Tensor):
        return key, block_mask_rows(mask, call.query.shape[0], torch.arange(start, stop, device=key.device), columns)
    allowed = (columns <= rows)[None, None]
    window = call.kwargs.get("sliding_window")
    if window is not None:
        allowed = allowed & (columns > rows - window)
    if mask is not None:  # flash attention's 2-D mask of keys that are no padding
        allowed = allowed & F.pad(mask[:, -num_keys:].bool(), (max(num_keys - mask.shape[-1], 0), 0))[:, None, None]
    return key, allowed
