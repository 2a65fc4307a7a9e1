"""MMA: Modality-Mutual Attention without training (after Wang et al., arXiv 2503.02597)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.selection import Range, Space
from vlmfix.methods.views import Layer, PromptRows
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class MMA(Method):
    """Let image tokens see the question behind them while the prompt is read.

    Pairs (i, j) with i an image token and j > i a token of the question get the additive mask ``log(gamma)`` instead of
    minus infinity; one softmax over old and opened keys. Image tokens among themselves, text, and decode steps keep the
    model's own mask. The paper trains models with this mask: using it without training is ours, and can hurt.

    Attributes:
        gamma: Weight of the opened pairs, in [0, 1]: 1 is the full mask, 0 the identity.
        columns: ``"question"``: text behind the last image of the prompt, the header of the answer included, as in the
            released code. ``"own_image"``: all text behind the image token itself, for prompts of several images.
        layers: Default: all but the last, whose image rows nothing reads.
    """

    name: ClassVar[str] = "mma"
    paper: ClassVar[str] = "arXiv 2503.02597"
    summary: ClassVar[str] = "lets image tokens see the question behind them"
    search_space: ClassVar[Space] = {"gamma": Range(0.05, 1.0)}
    opens_mask: ClassVar[bool] = True

    gamma: float = 1.0
    columns: Literal["question", "own_image"] = "question"

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        self.require(0 <= self.gamma <= 1, "gamma", "between 0 and 1 (0 switches the method off)")
        self.require(self.columns in ("question", "own_image"), "columns", "question or own_image")

    @property
    def is_identity(self) -> bool:
        """Whether ``gamma`` is 0."""
        return self.gamma == 0

    @property
    def prompt_rows(self) -> PromptRows:
        """No scores or weights are edited."""
        return "none"

    @property
    def needs_whole_prompt(self) -> bool:
        """An image token must see a question that comes later."""
        return True

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """All but the last."""
        return tuple(range(max(num_layers - 1, 1)))

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say what the method was made for."""
        return ("mma: the paper trains with this mask; without training it is an experiment",)

    @property
    def mask_bias(self) -> float:
        """``log(gamma)``."""
        return math.log(self.gamma)

    def open_mask(self, layer: Layer, start: int, stop: int) -> torch.Tensor:
        """Open (image token, later question token) pairs: bool ``[batch, stop - start, q_len]``."""
        image, text = layer.once(lambda: self._tokens(layer))
        pairs: torch.Tensor = image[:, start:stop, None] & text[:, None, :]
        return pairs.triu(1 + start)

    def _tokens(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are image tokens, and which belong to the question: bool ``[batch, q_len]``."""
        forward = layer.forward
        image, valid = forward.image_mask[:, -forward.prompt_len :], forward.valid_mask[:, -forward.prompt_len :]
        text = valid & ~image
        if self.columns == "question":
            text &= image.flip(1).cumsum(1).flip(1) == 0  # no image follows
        drafted = forward.q_len - forward.prompt_len
        image, text = (torch.nn.functional.pad(mask, (0, drafted)) for mask in (image, text))
        return image, text
