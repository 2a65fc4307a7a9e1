"""IBD: towards the branch with raised image scores, by alpha times the Jensen-Shannon divergence."""

from __future__ import annotations

import math

import torch

from naive._branches import contrast
from naive.dola import probabilities
from naive.edited import NaiveEdited
from naive.reference import Naive, Row


class NaiveBias(Naive):
    def __init__(self, epsilon: float) -> None:
        super().__init__(range(4))
        self.epsilon = epsilon

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        edited = scores.clone()
        for j in row.sequence.image():
            edited[:, j] += self.epsilon / math.sqrt(len(row.query[0]))
        return edited


class NaiveIbd(NaiveEdited):
    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        own, theirs = probabilities(logits), probabilities(other)
        mean = [(p + q) / 2 for p, q in zip(own, theirs, strict=True)]
        distance = (divergence(own, mean) + divergence(theirs, mean)) / 2
        return contrast(logits, other, -self.alpha * distance, self.beta)


def divergence(one: list[float], two: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(one, two, strict=True) if p > 0)


DECODING_CASES = [
    ({"epsilon": 6.0, "alpha": 3.0}, NaiveIbd(NaiveBias(6.0), 3.0, 0.1)),
    ({"epsilon": 3.0, "alpha": 10.0, "beta": 0.0}, NaiveIbd(NaiveBias(3.0), 10.0, 0.0)),
]
