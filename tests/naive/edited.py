"""The contrast with an edited branch: two references of the whole model, one stock and one with a method's formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from naive._branches import NaiveBranches, contrast
from naive.pai import NaivePai
from naive.reference import Naive, Reference


class NaiveEdited(NaiveBranches):
    def __init__(self, edit: Naive, alpha: float, beta: float) -> None:
        self.edit, self.alpha, self.beta = edit, alpha, beta

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        return contrast(logits, other, self.alpha, self.beta)

    @torch.no_grad()
    def generate(
        self, model: Any, ids: Sequence[int], pixels: torch.Tensor | None, tokens: int, suppress: Sequence[int] = ()
    ) -> tuple[list[int], torch.Tensor]:
        stock, edited = Reference(model), Reference(model, naive=[self.edit])
        if pixels is None:
            return stock.generate(ids, pixels, tokens, suppress)
        (own, first), (other, second) = stock.prompt(ids, pixels), edited.prompt(ids, pixels)
        mine, theirs = first[-1], second[-1]
        answer, steps = [], []
        for _ in range(tokens):
            step = self.combine(mine.tolist(), theirs.tolist(), len(answer) + 1)
            steps.append(step)
            allowed = [value for token, value in enumerate(step) if token not in suppress]
            answer.append(next(t for t, value in enumerate(step) if t not in suppress and value == max(allowed)))
            mine, theirs = stock.decode(own, answer[-1]), edited.decode(other, answer[-1])
        return answer, torch.tensor(steps)


PAI = {"method": "pai", "alpha": 0.7, "layers": ":"}
DECODING_CASES = [
    ({"edit": PAI}, NaiveEdited(NaivePai(range(4), 0.7), 1.0, 0.1)),
    ({"edit": PAI, "mode": "towards", "alpha": 0.5, "beta": 0.0}, NaiveEdited(NaivePai(range(4), 0.7), -0.5, 0.0)),
]
