"""PAI's guidance, section (a) 2: on log-probabilities, against the prompt with its image span removed."""

from __future__ import annotations

import math

import torch
from families.tiny_llava import IMAGE

from naive._branches import NaiveBranches, Prompt


class NaiveGuidance(NaiveBranches):
    up_to_a_constant = True

    def __init__(self, gamma: float, beta: float) -> None:
        self.gamma, self.beta = gamma, beta

    def prompts(self, ids: list[int], pixels: torch.Tensor) -> tuple[Prompt, Prompt]:
        return (ids, pixels), ([token for token in ids if token != IMAGE], None)

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        with_image, without = log_probabilities(logits), log_probabilities(other)
        limit = max(with_image) + math.log(self.beta) if self.beta else -math.inf
        return [
            self.gamma * (mine - theirs) + theirs if mine >= limit else -math.inf
            for mine, theirs in zip(with_image, without, strict=True)
        ]


def log_probabilities(logits: list[float]) -> list[float]:
    largest = max(logits)
    total = largest + math.log(sum(math.exp(value - largest) for value in logits))
    return [value - total for value in logits]


DECODING_CASES = [
    ({}, NaiveGuidance(1.1, 0.1)),
    ({"gamma": 2.0, "beta": 0.0}, NaiveGuidance(2.0, 0.0)),
]
