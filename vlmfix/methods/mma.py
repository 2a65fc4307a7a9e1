"""MMA: Modality-Mutual Attention without training (after Wang et al., arXiv 2503.02597)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import all_but
from vlmfix.methods.sequence import from_the_end
from vlmfix.methods.views import Layer
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class MMA(Method):
    """Let image tokens see the question behind them while the prompt is read.

    Pairs (i, j) with i an image token and j > i a token of the question get the additive mask ``log(gamma)`` instead of
    minus infinity. One softmax runs over old and opened keys. Image tokens among themselves, text, and decode steps
    keep the model's own mask. The paper trains models with this mask. Using it without training is ours, and can hurt.
    So are ``gamma`` below 1 and leaving out the last layer, which changes nothing. The released code opens the question
    as far as the token that names the assistant; here what stands behind that (a line break) is opened too. It reads
    one image and one turn; the paper's mask for several images opens all pairs of different kinds, which is not
    offered.
    """

    name = "mma"
    paper = "arXiv 2503.02597"
    summary = "lets image tokens see the question behind them"
    opens_mask = True
    prompt_rows = "none"  # the mask alone is edited
    needs_whole_prompt = True  # an image token must see a question that comes later
    default_layers = all_but("all but the last, whose image rows nothing reads", last=1)

    gamma: float = parameter(
        1.0, low=0, high=1, off=0, search=Range(0.05, 1.0), help="Weight of the opened pairs; 1 is the full mask."
    )
    columns: Literal["question", "own_image"] = parameter(
        "question",
        help='``"question"``: text behind the last image of the prompt, the header of the answer included. '
        '``"own_image"`` (ours): all text behind the image token itself, for prompts of several images.',
    )

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
        return pairs.triu(1 + start)  # j > i, with i counted from ``start``

    def _tokens(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens are image tokens, and which belong to the question: bool ``[batch, q_len]``."""
        forward = layer.forward
        image, valid = forward.image_mask[:, -forward.prompt_len :], forward.valid_mask[:, -forward.prompt_len :]
        text = valid & ~image
        if self.columns == "question":
            text &= from_the_end(image) == 0  # no image follows
        drafted = forward.q_len - forward.prompt_len
        return F.pad(image, (0, drafted)), F.pad(text, (0, drafted))
