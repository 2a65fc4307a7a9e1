"""Edits of attention scores that several methods share."""

from __future__ import annotations

import torch


def raise_scores(scores: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``gain_j |s_j|`` to the scores: never lowers one.

    Args:
        scores: ``[batch, num_heads, rows, keys]``.
        gain: fp32 ``[batch, keys]``, >= 0.

    Returns:
        The scores and which rows have a raised key, bool ``[batch, num_heads, rows]``.
    """
    edited = (gain > 0).any(1)[:, None, None].expand(scores.shape[:3])
    return scores + scores.abs() * gain[:, None, None], edited
