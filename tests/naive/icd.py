"""ICD, section (a): the same image, and other words between it and the question."""

from __future__ import annotations

import torch
from families.tiny_llava import IMAGE

from naive._branches import NaiveBranches, Prompt, contrast


class NaiveICD(NaiveBranches):
    def __init__(self, alpha: float, beta: float, disturbance: list[int]) -> None:
        self.alpha, self.beta, self.disturbance = alpha, beta, disturbance

    def prompts(self, ids: list[int], pixels: torch.Tensor) -> tuple[Prompt, Prompt]:
        end = len(ids) - ids[::-1].index(IMAGE)
        return (ids, pixels), (ids[:end] + self.disturbance + ids[end:], pixels)

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        return contrast(logits, other, self.alpha, self.beta)


DECODING_CASES = [
    ({"disturbance": [20, 21, 22]}, NaiveICD(1.0, 0.1, [20, 21, 22])),
    ({"disturbance": [40], "alpha": 2.0, "beta": 0.0}, NaiveICD(2.0, 0.0, [40])),
]
