"""M3ID, section (a): log-probabilities, a weight that grows with the number of the token, and the gate."""

from __future__ import annotations

import math

from naive.guidance import NaiveGuidance, log_probabilities


class NaiveM3ID(NaiveGuidance):
    def __init__(self, lam: float, alpha: float, beta: float) -> None:
        self.lam, self.alpha, self.beta = lam, alpha, beta

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        with_image, without = log_probabilities(logits), log_probabilities(other)
        gamma = math.exp(-self.lam * number)
        weight = (1 - gamma) / gamma if max(with_image) < math.log(self.alpha) else 0.0
        limit = max(with_image) + math.log(self.beta) if self.beta else -math.inf
        return [
            mine + weight * (mine - theirs) if mine >= limit else -math.inf
            for mine, theirs in zip(with_image, without, strict=True)
        ]


DECODING_CASES = [
    ({}, NaiveM3ID(0.02, 0.3, 0.0)),
    ({"lam": 0.3, "alpha": 1.0, "beta": 0.1}, NaiveM3ID(0.3, 1.0, 0.1)),
    ({"lam": 0.3, "alpha": 0.25}, NaiveM3ID(0.3, 0.25, 0.0)),
]
