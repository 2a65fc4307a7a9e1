"""VCD, section (a): the schedule of the noise, the contrast and the cut."""

from __future__ import annotations

import math

import torch

from naive._branches import NaiveBranches, Prompt, contrast


class NaiveVcd(NaiveBranches):
    def __init__(self, alpha: float, beta: float, step: int, seed: int = 0) -> None:
        self.alpha, self.beta, self.step, self.seed = alpha, beta, step, seed

    def prompts(self, ids: list[int], pixels: torch.Tensor) -> tuple[Prompt, Prompt]:
        noise = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(self.seed))
        left = 1.0
        for t in range(self.step + 1):
            left *= 1 - (1e-5 + (0.005 - 1e-5) / (1 + math.exp(-(-6 + 12 * t / 999))))
        noised = [math.sqrt(left) * picture + math.sqrt(1 - left) * noise for picture in pixels]
        return (ids, pixels), (ids, torch.stack(noised))

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        return contrast(logits, other, self.alpha, self.beta)


DECODING_CASES = [
    ({}, NaiveVcd(1.0, 0.2, 500)),
    ({"alpha": 0.5, "beta": 0.0, "noise_step": 900, "seed": 7}, NaiveVcd(0.5, 0.0, 900, seed=7)),
]
