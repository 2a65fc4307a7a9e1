"""Edits of attention scores that several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.methods.base import Method, PromptRows
from vlmfix.run import Layer


@dataclass(frozen=True)
class RaisesImageScores(Method):
    """Base of the methods that raise the image's scores in the row that predicts the next token.

    Attributes:
        alpha: Strength, >= 0; 0 is the identity.
        edit_prompt: Edit the prompt's last row too, not only those of generated tokens.
    """

    edits_scores: ClassVar[bool] = True

    alpha: float = 1.0
    edit_prompt: bool = True

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        self.require(0 <= self.alpha < math.inf, "alpha", "a finite number >= 0 (0 switches the method off)")

    @property
    def is_identity(self) -> bool:
        """Whether ``alpha`` is 0."""
        return self.alpha == 0

    @property
    def prompt_rows(self) -> PromptRows:
        """The last row, unless switched off."""
        return "last" if self.edit_prompt else "none"


def raise_scores(scores: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Add ``gain_j |s_j|`` to the scores, in place where autograd does not mind: never lowers one.

    Args:
        scores: ``[batch, num_heads, rows, keys]``.
        gain: fp32 ``[batch, 1, 1, keys]``, >= 0.
    """
    if scores.requires_grad:
        return torch.addcmul(scores, scores.abs(), gain)
    return scores.addcmul_(scores.abs(), gain)


def raise_keys(
    scores: torch.Tensor, layer: Layer, make_gain: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raise the scores of a layer by gains that all layers with the same keys share.

    Args:
        scores: ``[batch, num_heads, rows, keys]``.
        layer: The layer.
        make_gain: Returns the gains, fp32 ``[batch, keys]``, >= 0.

    Returns:
        The scores and which rows have a raised key, bool ``[batch, num_heads, rows]``.
    """

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        gain = make_gain()[:, None, None]
        return gain, (gain > 0).any(3)

    gain, edited = layer.per_keys(make, scores)
    return raise_scores(scores, gain), edited.expand(scores.shape[:3])


def visible(keys: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return which of some keys each row sees: bool ``[batch, 1 or num_heads, 1 or rows, keys]``.

    Args:
        keys: Bool ``[batch, keys]``.
        allowed: Bool, broadcastable to the scores ``[batch, num_heads, rows, keys]``.
    """
    return keys[:, None, None] & allowed


def log_mass(scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the log of the unnormalised weight of some keys: ``log sum_j exp(s_j)``.

    Args:
        scores: ``[batch, num_heads, rows, keys]``, fp32.
        keys: Bool, broadcastable to ``scores``.

    Returns:
        fp32 ``[batch, num_heads, rows]``; minus infinity where there are no keys.
    """
    return scores.masked_fill(~keys, -torch.inf).logsumexp(-1)
