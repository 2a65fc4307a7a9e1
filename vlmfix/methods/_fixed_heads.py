"""Scaling of a fixed list of heads, for methods that choose theirs offline."""

from __future__ import annotations

import torch

from vlmfix.run import Layer


def scale_heads(head_outputs: torch.Tensor, scale: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Multiply head outputs in all rows of samples with an image, and count them.

    Args:
        head_outputs: ``[batch, q_len, num_heads, head_dim]``.
        scale: fp32 ``[num_heads]``; heads with 1 come back bit for bit.
        layer: The layer.
    """
    has_image, num_rows = layer.once(lambda: _rows_with_image(layer))
    layer.count(num_rows.to(scale.device) * (scale != 1).sum())
    per_sample = torch.where(has_image.to(scale.device)[:, None], scale, 1.0)
    return head_outputs * per_sample[:, None, :, None].to(head_outputs.dtype)


def _rows_with_image(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which samples have an image, bool ``[batch]``, and how many rows these have in all, padding left out."""
    run = layer.run
    has_image = run.has_image
    num_rows = run.num_prompt_rows() if run.is_prefill else run.q_len
    return has_image, (has_image * num_rows).sum()
