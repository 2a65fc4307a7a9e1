"""Attention with edits: what the methods of a layer do to it, in the order of the path (mask, scores, weights, heads).

The base kernel computes all rows. Softmax is written out for the rows and heads a method asks for, and written over its
result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import SITE_ATTRIBUTE
from vlmfix.model.attention import (
    AttentionCall,
    _allowed_keys,
    explicit_attention,
    explicit_scores,
    masked_softmax,
    visible_keys,
    weighted_values,
)

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.engine.plan import Site
    from vlmfix.methods.base import Method
    from vlmfix.methods.views import Forward, Layer, Rows


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
        call, forward = self._layer.call, self._layer.forward
        assert call is not None
        num_keys = call.key.shape[2]
        offset, past = forward.key_offset(self._layer.site, num_keys), forward.past
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


class _Missing:
    """Marks a forward that did not pass through the patched model."""


_MISSING = _Missing()


def vlmfix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    vlmfix: Forward | _Missing | None = _MISSING,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a patched module, with the signature of transformers' attention functions.

    Returns:
        Head outputs ``[batch, q_len, num_heads, value_dim]`` and the weights where the base kernel returns them.

    Raises:
        UnsupportedFeatureError: The call did not come through the patched model's forward, or uses a paged cache.
    """
    site: Site = getattr(module.config, SITE_ATTRIBUTE)
    call = AttentionCall(site, module, query, key, value, attention_mask, kwargs)
    if vlmfix is None:
        return call.base()
    if isinstance(vlmfix, _Missing):
        raise UnsupportedFeatureError(
            f"The attention module {site.name} of a patched model was reached without going through the model's own "
            "forward, so vlmfix cannot know where the image is. Call the whole model (model(...) or "
            "model.generate(...)), or take the patch off first: vlmfix.unpatch(model)."
        )
    if kwargs.get("cache") is not None:
        raise UnsupportedFeatureError(
            "Continuous batching (a paged cache) packs several prompts into one row, which vlmfix does not support. "
            "Use model.generate(...) with a padded batch, or vlmfix.unpatch(model) first."
        )
    return vlmfix.attend(site, call)


def opened_attention(call: AttentionCall, start: int, stop: int) -> torch.Tensor:
    """Head outputs ``[batch, rows, num_heads, value_dim]`` of rows with opened keys, by a fused kernel where possible.

    The additive mask of all their keys is written out; the attention weights are only where the layer caps its scores
    or has a position bias.
    """
    implementation = call.site.base_config._attn_implementation or "eager"
    is_plain = call.kwargs.get("position_bias") is None and call.kwargs.get("s_aux") is None
    if not is_plain or (call.kwargs.get("softcap") is not None and implementation != "sdpa"):
        return weighted_values(call, masked_softmax(*explicit_scores(call, start, stop)))
    key, allowed = _allowed_keys(call, start, stop, implementation)
    query = call.query[:, :, start:stop]
    if allowed is None:
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device)
    bias = allowed.to(query.dtype)
    if allowed.dtype == torch.bool:
        bias = torch.zeros_like(bias).masked_fill(~allowed, torch.finfo(query.dtype).min)
    bias = bias.expand(query.shape[0], -1, stop - start, key.shape[2])
    for opening in call.openings:
        pairs = opening.pairs(start, stop)[..., : key.shape[2]]
        bias = torch.where(pairs & (bias <= torch.finfo(bias.dtype).min / 2), opening.bias, bias)
    outputs = F.scaled_dot_product_attention(
        query,
        key,
        call.value[:, :, : key.shape[2]],
        attn_mask=bias,
        scale=call.kwargs.get("scaling"),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return outputs.transpose(1, 2)


ATTENTION_NAME = "vlmfix"
"""The name in ``AttentionInterface``. A plain word: transformers gives names with 'sdpa', 'flash' or '/' a meaning."""

Edits = Sequence[tuple["Method", "Layer"]]
"""Methods that edit scores or weights in a layer, in the order of the path, each with its view of the layer."""


def attend(forward: Forward, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with the edits of a site; without any, exactly what the base kernel returns."""
    if not forward.state.any_image:
        return call.base()
    if forward.is_prefill and site.masks:
        call = call._replace(
            openings=tuple(Opening(method, forward.layer(site, n).at(call)) for n, method in site.masks)
        )
    if site.scores or site.weights:
        head_outputs, weights = _with_edits(forward, site, call)
    elif call.openings:
        head_outputs, weights = _over_base(forward, call, call, [])
    else:
        head_outputs, weights = call.base()
    for index, method in site.heads:
        head_outputs = method.edit_heads(head_outputs, forward.layer(site, index).at(call))
    return head_outputs, weights


def _with_edits(forward: Forward, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Edit scores and weights of the heads that the methods of a site ask for."""
    edits = [(method, forward.layer(site, n).at(call)) for n, method in (*site.scores, *site.weights)]
    edits = [(method, layer) for method, layer in edits if method.acts_at(layer)]
    heads = site.written_heads
    if heads is not None and len(heads) >= call.key.shape[1]:  # copies of their keys would be more than there are
        heads = None
    if not forward.is_prefill and any(method.edits_decode for method, _ in edits):
        # The base kernel would compute the same rows a second time.
        if heads is None:
            return explicit_attention(call, _edited_weights(forward, call, 0, forward.q_len, edits, observe=True)[0])
        return explicit_attention(
            call, _with_edited_heads(forward, call, heads, forward.head_index(site, call)[0], edits)
        )
    if not edits and not call.openings:
        return call.base()
    part = call if heads is None else call.of_heads(heads, *forward.head_index(site, call))
    return _over_base(forward, call, part, [(method, layer.at(part)) for method, layer in edits])


def _with_edited_heads(
    forward: Forward, call: AttentionCall, heads: tuple[int, ...], head_index: torch.Tensor, edits: Edits
) -> torch.Tensor:
    """Write out the weights of all heads of a decode step, of which some are edited: no key is copied for these few."""
    part = call._replace(heads=heads, head_index=head_index)
    scores, allowed = explicit_scores(call, 0, forward.q_len)
    mine = allowed if allowed is None or allowed.shape[1] == 1 else allowed.index_select(1, head_index)
    edits = [(method, layer.at(part)) for method, layer in edits]
    own = (scores.index_select(1, head_index), mine)
    attn_weights, _ = _edited_weights(forward, part, 0, forward.q_len, edits, observe=True, written=own)
    return masked_softmax(scores, allowed).index_copy(1, head_index, attn_weights)


def _rows(forward: Forward, method: Method) -> Rows:
    return forward.rows(method.prompt_rows, method.edits_decode)


def _observes(method: Method, layer: Layer) -> bool:
    return method.observed_rows != "none" and method.observes_at(layer)


def _base(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the base kernel; its result may be written over."""
    head_outputs, weights = call.base()
    if head_outputs.requires_grad:  # autograd keeps what the kernel returned
        head_outputs = head_outputs.clone()
        weights = None if weights is None else weights.clone()
    return head_outputs, weights


def _over_base(
    forward: Forward, call: AttentionCall, part: AttentionCall, edits: Edits
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the base kernel for all rows and write the edited rows over its result, chunk by chunk.

    Args:
        forward: The forward.
        call: The attention call.
        part: The same for the heads to be written out.
        edits: Those of scores and weights.
    """
    head_outputs, weights = _base(call)
    if call.openings:
        _write_opened_rows(forward, call, head_outputs, weights)
    wanted = [_rows(forward, method) for method, _ in edits]
    observed = [forward.rows(method.observed_rows) for method, layer in edits if _observes(method, layer)]
    ranges = [(rows.start, rows.stop) for rows in (*wanted, *observed) if rows.start < rows.stop]
    if not ranges:
        return head_outputs, weights
    chunks = list(part.row_chunks(min(start for start, _ in ranges), max(stop for _, stop in ranges)))
    observe_first = len(chunks) > 1 and bool(observed)
    if observe_first and not forward.finished:
        for number, (method, layer) in enumerate(edits):
            if _observes(method, layer):
                for start, stop in chunks:
                    show = (method, layer.at(part, forward.rows(method.observed_rows).part(start, stop)))
                    with torch.no_grad():
                        _edited_weights(forward, part, start, stop, edits[:number], show_to=show)
    for start, stop in chunks:
        attn_weights, edited = _edited_weights(forward, part, start, stop, edits, observe=not observe_first)
        if edited is not None:
            _write_heads(head_outputs[:, start:stop], weighted_values(part, attn_weights), edited, part.head_index)
            if weights is not None:
                _write_weights(weights[:, :, start:stop], attn_weights, edited, part.head_index)
    return head_outputs, weights


def _write_opened_rows(
    forward: Forward, call: AttentionCall, head_outputs: torch.Tensor, weights: torch.Tensor | None
) -> None:
    chunks = list(call.row_chunks(0, forward.image_stop))
    for start, stop in chunks:
        opened = torch.stack([opening.pairs(start, stop).any(3) for opening in call.openings]).any(0)  # [batch, 1, q]
        if weights is None:
            new_rows = opened_attention(call, start, stop)
        else:
            attn_weights = masked_softmax(*explicit_scores(call, start, stop))
            new_rows = weighted_values(call, attn_weights)
            _write_weights(weights[:, :, start:stop], attn_weights, opened, None)
        _write_heads(head_outputs[:, start:stop], new_rows, opened, None)
    for opening in call.openings:
        opening.count(call, chunks)


def _write_heads(
    rows: torch.Tensor, new_rows: torch.Tensor, edited: torch.Tensor, head_index: torch.Tensor | None
) -> None:
    """Write new head outputs ``[batch, rows, heads, d]`` over those ``edited``, bool ``[batch, heads or 1, rows]``."""
    edited = edited.transpose(1, 2)[..., None]
    if head_index is None:
        rows.copy_(torch.where(edited, new_rows, rows))
    else:
        rows.index_copy_(2, head_index, torch.where(edited, new_rows, rows.index_select(2, head_index)))


def _write_weights(
    rows: torch.Tensor, attn_weights: torch.Tensor, edited: torch.Tensor, head_index: torch.Tensor | None
) -> None:
    """Write new weights ``[batch, heads, rows, keys]`` over those ``edited``, bool ``[batch, heads or 1, rows]``."""
    stock, new = rows[..., : attn_weights.shape[-1]], attn_weights.to(rows.dtype)
    if head_index is None:
        stock.copy_(torch.where(edited[..., None], new, stock))
    else:
        stock.index_copy_(1, head_index, torch.where(edited[..., None], new, stock.index_select(1, head_index)))


def _edited_weights(
    forward: Forward,
    call: AttentionCall,
    start: int,
    stop: int,
    edits: Edits,
    *,
    observe: bool = False,
    show_to: tuple[Method, Layer] | None = None,
    written: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write out the weights of some rows, edited.

    Args:
        forward: The forward.
        call: The attention call.
        start: First row.
        stop: End of the rows.
        edits: The methods to apply.
        observe: Whether methods see the weights in between.
        show_to: A method that sees the result; nothing is counted then.
        written: The scores, where they are known, as by ``explicit_scores``.

    Returns:
        fp32 ``[batch, num_heads, rows, keys]``, and which rows some method edited, ``[batch, num_heads, rows]``
        (``None`` without any method).
    """
    scores, allowed = explicit_scores(call, start, stop) if written is None else written
    states, is_softmaxed = scores, False
    every_key = forward.every_key(scores.device)
    selected: torch.Tensor | None = None
    for method, layer in edits:
        if method.edits_weights and not is_softmaxed:
            states, is_softmaxed = masked_softmax(states, allowed), True
        if observe and _observes(method, layer) and not forward.finished:  # checkpointing computes layers again
            with torch.no_grad():
                seen = layer.at(call, forward.rows(method.observed_rows).part(start, stop))
                observed = states if is_softmaxed else masked_softmax(states, allowed)
                method.observe(observed, every_key if allowed is None else allowed, seen)
        rows = _rows(forward, method).part(start, stop)
        here = layer.at(call, rows)
        # A lone edit of a prompt may spoil the other rows: they are not used.
        keep = states.clone() if rows.mask is not None and (len(edits) > 1 or not forward.is_prefill) else None
        if method.edits_weights:
            states, edited = method.edit_weights(states, here)
        else:
            states, edited = method.edit_scores(states, every_key if allowed is None else allowed, here)
        if rows.mask is not None:
            mask = rows.mask[:, None].to(edited.device)
            edited = edited & mask
            if keep is not None:
                states = torch.where(mask[..., None], states, keep)
        if method.hides_keys:
            shown = states > torch.finfo(states.dtype).min / 2
            allowed = shown if allowed is None else allowed & shown
        if show_to is None:
            here.count(edited.sum() if forward.is_prefill else edited)
        selected = edited if selected is None else selected | edited
    attn_weights = states if is_softmaxed else masked_softmax(states, allowed)
    if show_to is not None:
        method, layer = show_to
        method.observe(attn_weights, every_key if allowed is None else allowed, layer)
    return attn_weights, selected


AttentionInterface.register(ATTENTION_NAME, vlmfix_attention)
