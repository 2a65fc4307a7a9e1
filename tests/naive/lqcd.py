"""LQCD, section (a): the same image, a hint behind the question; the answer is to the neutral one."""

from __future__ import annotations

import torch

from naive._branches import NaiveBranches, Prompt, contrast


class NaiveLqcd(NaiveBranches):
    def __init__(self, alpha: float, beta: float, hint: list[int], behind: int) -> None:
        self.alpha, self.beta, self.hint, self.behind = alpha, beta, hint, behind

    def prompts(self, ids: list[int], pixels: torch.Tensor) -> tuple[Prompt, Prompt]:
        end = len(ids) - self.behind
        return (ids, pixels), (ids[:end] + self.hint + ids[end:], pixels)

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        return contrast(logits, other, self.alpha, self.beta)


HINT = {"hint": [20, 21, 22], "neutralise": False}
DECODING_CASES = [
    ({**HINT, "behind": 1}, NaiveLqcd(1.0, 0.1, [20, 21, 22], 1)),
    ({**HINT, "behind": 0, "alpha": 2.0, "beta": 0.0}, NaiveLqcd(2.0, 0.0, [20, 21, 22], 0)),
]
