"""Attention with edits: what the methods of a layer do to it, in the order of the path (mask, scores, weights, heads).

The base kernel computes all rows. Softmax is written out for the rows and heads a method asks for, and written over its
result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vlmfix.engine.base_output import BaseOutput, is_measured, opening_of, with_opened_rows
from vlmfix.engine.plan import Numbered, PatchedSite
from vlmfix.methods.base import Method
from vlmfix.methods.views import Forward, Layer, Rows
from vlmfix.model.attention import (
    AttentionCall,
    explicit_attention,
    explicit_scores,
    masked_softmax,
    weighted_values,
)

Edits = Sequence[tuple["Method", "Layer"]]
"""Methods that edit a layer, in the order of the path, each with its view of the layer."""

_HEAD_INDEX = -1
"""In the keys of a sequence's constants: no method's, but the indices of a site's heads."""


def attend(forward: Forward, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with the edits of a site; without any, exactly what the base kernel returns."""
    if not forward.acts:
        return call.base()
    if forward.is_prefill and site.masks:
        openers = _layers(forward, site.masks, call)
        call = call._replace(openings=tuple(opening_of(method, layer) for method, layer in openers))
    if site.scores or site.weights:
        head_outputs, weights = _with_edits(forward, site, call)
    elif call.openings:
        head_outputs, weights = _over_base(forward, site, call, call, [])
    else:
        head_outputs, weights = call.base()
    for method, layer in _layers(forward, site.heads, call):
        # Heads are scaled in place; the last row is enough to see how far they move.
        stock = head_outputs[:, -1:].detach().clone() if is_measured(forward) else None
        head_outputs = method.edit_heads(head_outputs, layer)
        if stock is not None:
            has_image = forward.has_image.to(stock.device)[:, None, None, None]
            layer.record_move(stock, head_outputs[:, -1:], has_image)
    return head_outputs, weights


def _layers(forward: Forward, methods: Numbered, call: AttentionCall) -> Edits:
    return [(method, Layer(forward, call.site, number, call)) for number, method in methods]


def _with_edits(forward: Forward, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Edit scores and weights of the heads that the methods of a site ask for."""
    layers = _layers(forward, (*site.scores, *site.weights), call)
    edits = [(method, layer) for method, layer in layers if method.acts_at(layer)]
    heads = site.written_heads
    if heads is not None and len(heads) >= call.key.shape[1]:  # copies of their keys would be more than there are
        heads = None
    if not forward.is_prefill and any(method.edits_decode for method, _ in edits):
        # The base kernel would compute the same rows a second time.
        if heads is None:
            attn_weights, edited, _ = _edited_weights(forward, call, 0, forward.q_len, edits, observe=True)
        else:
            head_index = _head_index(forward, site, call)[0]
            attn_weights, edited = _with_edited_heads(forward, call, heads, head_index, edits)
        output = explicit_attention(call, attn_weights)
        if edited is not None and is_measured(forward):
            numbers = [layer.index for _, layer in edits]
            forward.record_move(numbers, call.base()[0], output[0], edited.transpose(1, 2)[..., None])
        return output
    if not edits and not call.openings:
        return call.base()
    part = call if heads is None else call.of_heads(heads, *_head_index(forward, site, call))
    return _over_base(forward, site, call, part, [(method, layer.at(part)) for method, layer in edits])


def _head_index(forward: Forward, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the written heads of a site and the key heads they share, int64 on the call's device."""
    constants, key = forward.state.constants, (_HEAD_INDEX, site.index)
    if key not in constants:
        assert site.written_heads is not None
        index = torch.tensor(site.written_heads, device=call.query.device)
        constants[key] = (index, index // (call.query.shape[1] // call.key.shape[1]))
    found: tuple[torch.Tensor, torch.Tensor] = constants[key]
    return found


def _with_edited_heads(
    forward: Forward, call: AttentionCall, heads: tuple[int, ...], head_index: torch.Tensor, edits: Edits
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write out the weights of all heads of a decode step, of which some are edited: no key is copied for these few.

    Returns:
        The weights ``[batch, num_heads, rows, keys]``, and in measured forwards which rows were edited.
    """
    part = call._replace(heads=heads, head_index=head_index)
    scores, allowed = explicit_scores(call, 0, forward.q_len)
    mine = allowed if allowed is None or allowed.shape[1] == 1 else allowed.index_select(1, head_index)
    edits = [(method, layer.at(part)) for method, layer in edits]
    edits_scores = any(method.edits_scores for method, _ in edits)
    states = scores if edits_scores else masked_softmax(scores, allowed)
    own = (states.index_select(1, head_index), mine)
    some = _edited_weights(forward, part, 0, forward.q_len, edits, observe=True, written=own)
    edited = None
    if some.edited is not None and is_measured(forward):
        edited = torch.zeros_like(states[..., 0], dtype=torch.bool).index_copy(1, head_index, some.edited)
    attn_weights = masked_softmax(states, allowed) if edits_scores else states
    return attn_weights.index_copy(1, head_index, some.weights), edited


def _rows(forward: Forward, method: Method) -> Rows:
    return forward.rows(method.prompt_rows, method.edits_decode, every=method.acts_without_image)


def _observed_rows(forward: Forward, method: Method) -> Rows:
    return forward.rows(method.observed_rows, every=method.acts_without_image)


def _observes(method: Method, layer: Layer) -> bool:
    return method.observed_rows != "none" and method.observes_at(layer)


def _over_base(
    forward: Forward, site: PatchedSite, call: AttentionCall, part: AttentionCall, edits: Edits
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the base kernel for all rows and write the edited rows over its result, chunk by chunk.

    ``part`` is the call for the heads to be written out, ``edits`` are those of scores and weights.
    """
    if call.openings:
        base = with_opened_rows(forward, call, [layer for _, layer in _layers(forward, site.masks, call)])
    else:
        base = BaseOutput(forward, call)
    wanted = [_rows(forward, method) for method, _ in edits]
    observed = [_observed_rows(forward, method) for method, layer in edits if _observes(method, layer)]
    ranges = [(rows.start, rows.stop) for rows in (*wanted, *observed) if rows.start < rows.stop]
    if not ranges:
        return base.result()
    chunks = list(part.row_chunks(min(start for start, _ in ranges), max(stop for _, stop in ranges)))
    # A method sees all rows before it edits any: in one chunk on the way, of several chunks beforehand.
    observe_first = len(chunks) > 1 and bool(observed)
    if observe_first and not forward.is_over:
        for number, (method, layer) in enumerate(edits):
            if _observes(method, layer):
                for start, stop in chunks:
                    with torch.no_grad():
                        seen = _edited_weights(forward, part, start, stop, edits[:number], counts=False)
                        _show(method, layer, part, start, stop, seen.weights, seen.allowed)
    for start, stop in chunks:
        new = _edited_weights(forward, part, start, stop, edits, observe=not observe_first)
        if new.edited is not None:
            new_heads, numbers = weighted_values(part, new.weights), [layer.index for _, layer in edits]
            base.write(start, new_heads, new.weights, new.edited, numbers, part.head_index)
    return base.result()


class _Rows(NamedTuple):
    """Rows that were written out.

    Attributes:
        weights: fp32 ``[batch, num_heads, rows, keys]``.
        edited: Which rows some method edited, bool ``[batch, num_heads, rows]``; ``None`` without any method.
        allowed: The keys each row sees, bool, broadcastable to ``weights``; ``None`` for all.
    """

    weights: torch.Tensor
    edited: torch.Tensor | None
    allowed: torch.Tensor | None


def _edited_weights(
    forward: Forward,
    call: AttentionCall,
    start: int,
    stop: int,
    edits: Edits,
    *,
    observe: bool = False,
    counts: bool = True,
    written: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> _Rows:
    """Write out the weights of some rows, edited.

    Args:
        forward: The forward.
        call: The attention call.
        start: First row.
        stop: End of the rows.
        edits: The methods to apply.
        observe: Whether methods see the weights in between.
        counts: Whether edited rows are counted.
        written: What is known of the rows: their scores, as by ``explicit_scores``, or their weights if no method edits
            scores.
    """
    states, allowed = explicit_scores(call, start, stop) if written is None else written
    is_softmaxed = written is not None and not any(method.edits_scores for method, _ in edits)
    selected: torch.Tensor | None = None
    for method, layer in edits:
        if method.edits_weights and not is_softmaxed:
            states, is_softmaxed = masked_softmax(states, allowed), True
        if observe and _observes(method, layer) and not forward.is_over:
            with torch.no_grad():
                observed = states if is_softmaxed else masked_softmax(states, allowed)
                _show(method, layer, call, start, stop, observed, allowed)
        rows = _rows(forward, method).part(start, stop)
        here = layer.at(call, rows)
        # A prompt's only edit may overwrite rows outside its mask, because nothing reads them; otherwise keep a copy.
        keep = states.clone() if rows.mask is not None and (len(edits) > 1 or not forward.is_prefill) else None
        if method.edits_weights:
            states, edited = method.edit_weights(states, here)
        else:
            states, edited = method.edit_scores(states, _all_if_none(forward, allowed, states), here)
        if rows.mask is not None:
            mask = rows.mask[:, None].to(edited.device)
            edited = edited & mask
            if keep is not None:
                states = torch.where(mask[..., None], states, keep)
        if method.hides_keys:
            shown = states > torch.finfo(states.dtype).min / 2
            allowed = shown if allowed is None else allowed & shown
        if counts:
            here.count(edited.sum() if forward.is_prefill else edited)
        selected = edited if selected is None else selected | edited
    return _Rows(states if is_softmaxed else masked_softmax(states, allowed), selected, allowed)


def _show(
    method: Method,
    layer: Layer,
    call: AttentionCall,
    start: int,
    stop: int,
    attn_weights: torch.Tensor,
    allowed: torch.Tensor | None,
) -> None:
    """Show a method the weights of the rows ``start..stop - 1`` before it edits any."""
    forward = layer.forward
    seen = layer.at(call, _observed_rows(forward, method).part(start, stop))
    method.observe(attn_weights, _all_if_none(forward, allowed, attn_weights), seen)


def _all_if_none(forward: Forward, allowed: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return the keys each row sees; an all-true mask where that is ``None``."""
    if allowed is not None:
        return allowed
    device = like.device
    every: torch.Tensor = forward.once(
        ("every key", device), lambda: torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    )
    return every
