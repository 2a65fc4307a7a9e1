"""Two branches, spelt out for one sample: two full forwards of the stock model for every token, no cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

Prompt = tuple[list[int], "torch.Tensor | None"]
"""Token ids and pictures."""


class NaiveBranches:
    """A decoding method's formula; one subclass per method.

    Attributes:
        up_to_a_constant: Whether it is one of log-probabilities, which say no more than differences of logits.
    """

    up_to_a_constant = False

    def prompts(self, ids: list[int], pixels: torch.Tensor) -> tuple[Prompt, Prompt]:
        """The prompt whose answer is wanted, and the one to contrast it with."""
        raise NotImplementedError

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        """The logits of token ``number`` of the answer (from 1), from those of both branches."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self, model: Any, ids: Sequence[int], pixels: torch.Tensor | None, tokens: int, suppress: Sequence[int] = ()
    ) -> tuple[list[int], torch.Tensor]:
        """Greedy ids and the logits of every step, in double precision."""
        own: Prompt = (list(ids), pixels)
        other: Prompt | None = None
        if pixels is not None:
            own, other = self.prompts(list(ids), pixels)
        answer: list[int] = []
        steps = []
        for _ in range(tokens):
            step = last_logits(model, own, answer)
            if other is not None:
                step = self.combine(step, last_logits(model, other, answer), len(answer) + 1)
            steps.append(step)
            allowed = [value for token, value in enumerate(step) if token not in suppress]
            answer.append(next(t for t, value in enumerate(step) if t not in suppress and value == max(allowed)))
        return answer, torch.tensor(steps)


def last_logits(model: Any, prompt: Prompt, answer: list[int]) -> list[float]:
    """The logits behind a prompt and an answer, by one full forward."""
    ids, pixels = prompt
    found = model(input_ids=torch.tensor([ids + answer]), pixel_values=pixels, use_cache=False)
    return found.logits[0, -1].tolist()


def contrast(logits: list[float], other: list[float], alpha: float, beta: float) -> list[float]:
    """``(1 + alpha) l - alpha l'``, and minus infinity where ``l < max l + ln beta``."""
    limit = max(logits) + math.log(beta) if beta > 0 else -math.inf
    return [
        (1 + alpha) * mine - alpha * theirs if mine >= limit else -math.inf
        for mine, theirs in zip(logits, other, strict=True)
    ]
