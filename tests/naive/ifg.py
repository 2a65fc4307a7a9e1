"""IFG, section (b): the scale form ``l_u + s (l_c - l_u)`` behind a cut by ``l_c``, with a stand-in for the image."""

from __future__ import annotations

import math

import torch

from naive._branches import NaiveBranches, Prompt


class NaiveIfg(NaiveBranches):
    def __init__(self, scale: float, beta: float, stand_in: str = "mean") -> None:
        self.scale, self.beta, self.stand_in = scale, beta, stand_in

    def prompts(self, ids: list[int], pixels: torch.Tensor) -> tuple[Prompt, Prompt]:
        other = torch.full_like(pixels, 1e-6)  # blank: zeros are what some models take for padding
        for picture, made in zip(pixels, other, strict=True):
            for channel in range(len(picture)):
                if self.stand_in == "mean":
                    made[channel] = sum(picture[channel].flatten().tolist()) / picture[channel].numel()
                if self.stand_in == "blurred":
                    made[channel] = blurred(picture[channel], 6)
        return (ids, pixels), (ids, other)

    def combine(self, logits: list[float], other: list[float], number: int) -> list[float]:
        limit = max(logits) + math.log(self.beta) if self.beta else -math.inf
        return [
            theirs + self.scale * (mine - theirs) if mine >= limit else -math.inf
            for mine, theirs in zip(logits, other, strict=True)
        ]


def blurred(channel: torch.Tensor, block: int) -> torch.Tensor:
    """Means of blocks, linear between their centres."""
    size = len(channel)
    count = size // block
    means = [
        [float(channel[y * block : (y + 1) * block, x * block : (x + 1) * block].mean()) for x in range(count)]
        for y in range(count)
    ]

    def weights(pixel: int) -> tuple[int, int, float]:
        place = min(max((pixel + 0.5) / block - 0.5, 0.0), count - 1.0)
        low = min(int(place), count - 1)
        return low, min(low + 1, count - 1), place - low

    made = torch.zeros_like(channel)
    for y in range(size):
        for x in range(size):
            (top, bottom, down), (left, right, across) = weights(y), weights(x)
            upper = (1 - across) * means[top][left] + across * means[top][right]
            lower = (1 - across) * means[bottom][left] + across * means[bottom][right]
            made[y, x] = (1 - down) * upper + down * lower
    return made


DECODING_CASES = [
    ({}, NaiveIfg(1.5, 0.1)),
    ({"alpha": 2.0, "beta": 0.0, "stand_in": "blank"}, NaiveIfg(3.0, 0.0, "blank")),
    ({"beta": 0.0, "stand_in": "blurred"}, NaiveIfg(1.5, 0.0, "blurred")),
]
