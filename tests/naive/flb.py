"""FLB, section (a): the logits of the answer's first token are added to those of every later one."""

from __future__ import annotations

import math

import torch

from naive._branches import NaiveBranches, Prompt


class NaiveFLB(NaiveBranches):
    def __init__(self, gamma: float, lam: float, beta: float) -> None:
        self.gamma, self.lam, self.beta = gamma, lam, beta

    def prompts(self, ids: list[int], pixels: torch.Tensor) -> tuple[Prompt, Prompt]:
        return (ids, pixels), (ids, pixels)

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        if number == 1:
            self.first = logits
        weight = self.gamma * (1 - math.exp(-self.lam * (number - 1)))
        limit = max(logits) + math.log(self.beta) if self.beta else -math.inf
        return [
            now + weight * first if now >= limit else -math.inf for now, first in zip(logits, self.first, strict=True)
        ]


DECODING_CASES = [
    ({}, NaiveFLB(0.3, 0.05, 0.1)),
    ({"gamma": 1.0, "lam": 0.5, "beta": 0.0}, NaiveFLB(1.0, 0.5, 0.0)),
]
