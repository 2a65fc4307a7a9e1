"""Attention with edits: what the methods of a layer do to it, in the order of the path (mask, scores, weights, heads).

The base kernel computes all rows. Softmax is written out for the rows a method asks for, and written over its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from vlmfix.attention import (
    AttentionCall,
    Opening,
    explicit_attention,
    explicit_scores,
    masked_softmax,
    opened_attention,
    visible_keys,
    weighted_values,
)

if TYPE_CHECKING:
    from vlmfix.methods.base import Method
    from vlmfix.run import Layer, Rows, Run
    from vlmfix.sites import Site

Edits = Sequence[tuple["Method", "Layer"]]
"""Methods that edit scores or weights in a layer, in the order of the path, each with its view of the layer."""


def attend(run: Run, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with the edits of a site; without any, exactly what the base kernel returns."""
    if not run.state.any_image:
        return call.base()
    if run.is_prefill and site.masks:
        call = call._replace(openings=tuple(_opening(method, run.layer(site, n), call) for n, method in site.masks))
    edits = [(method, run.layer(site, n).at(call)) for n, method in (*site.scores, *site.weights)]
    edits = [(method, layer) for method, layer in edits if method.acts_at(layer)]
    if not run.is_prefill and any(method.edits_decode for method, _ in edits):
        # The base kernel would compute the same rows a second time.
        attn_weights, _ = _edited_weights(run, call, 0, run.q_len, edits, observe=True)
        head_outputs, weights = explicit_attention(call, attn_weights)
    elif edits or call.openings:
        head_outputs, weights = _over_base(run, call, edits)
    else:
        head_outputs, weights = call.base()
    for index, method in site.heads:
        head_outputs = method.edit_heads(head_outputs, run.layer(site, index).at(call))
    return head_outputs, weights


def _rows(run: Run, method: Method) -> Rows:
    return run.rows(method.prompt_rows, method.edits_decode)


def _observes(method: Method, layer: Layer) -> bool:
    return method.observed_rows != "none" and method.observes_at(layer)


def _opening(method: Method, layer: Layer, call: AttentionCall) -> Opening:
    """Align a method's opened pairs ``[batch, q_len, q_len]`` with the keys of a call."""
    pairs, bias = method.open_mask(layer)
    run, num_keys = layer.run, call.key.shape[2]
    offset, past = run.key_offset(layer.site, num_keys), run.past
    assert isinstance(offset, int)
    assert isinstance(past, int)
    left = past - offset
    aligned = F.pad(pairs, (left, num_keys - left - pairs.shape[2])).to(call.query.device)
    visible = visible_keys(call, 0, call.query.shape[2])
    if visible is None:
        newly = torch.zeros_like(aligned)
    else:
        newly = aligned & ~F.pad(visible, (0, num_keys - visible.shape[3])).all(1)
    layer.count(newly.any(2).sum() * call.query.shape[1])
    return Opening(aligned[:, None], bias)


def _over_base(run: Run, call: AttentionCall, edits: Edits) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the base kernel for all rows and write the edited rows over its result, chunk by chunk."""
    head_outputs, weights = call.base()
    if head_outputs.requires_grad:  # autograd keeps what the kernel returned
        head_outputs = head_outputs.clone()
        weights = None if weights is None else weights.clone()
    if call.openings:
        _write_opened_rows(run, call, head_outputs, weights)
    wanted = [_rows(run, method) for method, _ in edits]
    observed = [run.rows(method.observed_rows) for method, layer in edits if _observes(method, layer)]
    ranges = [(rows.start, rows.stop) for rows in (*wanted, *observed) if rows.start < rows.stop]
    if not ranges:
        return head_outputs, weights
    chunks = list(call.row_chunks(min(start for start, _ in ranges), max(stop for _, stop in ranges)))
    observe_first = len(chunks) > 1 and bool(observed)
    if observe_first and not run.finished:
        for number, (method, layer) in enumerate(edits):
            if _observes(method, layer):
                for start, stop in chunks:
                    show = (method, layer.at(call, run.rows(method.observed_rows).part(start, stop)))
                    with torch.no_grad():
                        _edited_weights(run, call, start, stop, edits[:number], show_to=show)
    for start, stop in chunks:
        attn_weights, edited = _edited_weights(run, call, start, stop, edits, observe=not observe_first)
        rows = head_outputs[:, start:stop]
        new_rows = weighted_values(call, attn_weights)
        head_outputs[:, start:stop] = torch.where(edited.transpose(1, 2)[..., None], new_rows, rows)
        if weights is not None:
            _write_weights(weights, attn_weights, start, edited)
    return head_outputs, weights


def _write_opened_rows(run: Run, call: AttentionCall, head_outputs: torch.Tensor, weights: torch.Tensor | None) -> None:
    opened = torch.stack([opening.pairs.any(3)[:, 0] for opening in call.openings]).any(0)  # [batch, q_len]
    for start, stop in call.row_chunks(0, run.image_stop):
        rows = head_outputs[:, start:stop]
        mask = opened[:, start:stop]
        if weights is None:
            new_rows = opened_attention(call, start, stop)
        else:
            attn_weights = masked_softmax(*explicit_scores(call, start, stop))
            new_rows = weighted_values(call, attn_weights)
            _write_weights(weights, attn_weights, start, mask[:, None])
        head_outputs[:, start:stop] = torch.where(mask[..., None, None], new_rows, rows)


def _write_weights(weights: torch.Tensor, attn_weights: torch.Tensor, start: int, edited: torch.Tensor) -> None:
    rows, known = attn_weights.shape[2:]
    stock = weights[:, :, start : start + rows, :known]
    weights[:, :, start : start + rows, :known] = torch.where(edited[..., None], attn_weights.to(stock.dtype), stock)


def _edited_weights(
    run: Run,
    call: AttentionCall,
    start: int,
    stop: int,
    edits: Edits,
    *,
    observe: bool = False,
    show_to: tuple[Method, Layer] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write out the weights of some rows, edited.

    Args:
        run: The forward.
        call: The attention call.
        start: First row.
        stop: End of the rows.
        edits: The methods to apply.
        observe: Whether methods see the weights in between.
        show_to: A method that sees the result; nothing is counted then.

    Returns:
        fp32 ``[batch, num_heads, rows, keys]``, and which rows some method edited, ``[batch, num_heads, rows]``.
    """
    scores, allowed = explicit_scores(call, start, stop)
    states, is_softmaxed = scores, False
    every_key = scores.new_ones((1, 1, 1, 1), dtype=torch.bool)
    selected = scores.new_zeros(scores.shape[:3], dtype=torch.bool)
    for method, layer in edits:
        if method.edits_weights and not is_softmaxed:
            states, is_softmaxed = masked_softmax(states, allowed), True
        if observe and _observes(method, layer) and not run.finished:  # checkpointing computes layers again
            with torch.no_grad():
                seen = layer.at(call, run.rows(method.observed_rows).part(start, stop))
                observed = states if is_softmaxed else masked_softmax(states, allowed)
                method.observe(observed, every_key if allowed is None else allowed, seen)
        rows = _rows(run, method).part(start, stop)
        here = layer.at(call, rows)
        # A lone edit of a prompt may spoil the other rows: they are not used.
        keep = states.clone() if rows.mask is not None and (len(edits) > 1 or not run.is_prefill) else None
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
            here.count(edited.sum())
        selected = selected | edited
    attn_weights = states if is_softmaxed else masked_softmax(states, allowed)
    if show_to is not None:
        method, layer = show_to
        method.observe(attn_weights, every_key if allowed is None else allowed, layer)
    return attn_weights, selected
