"""DoLa, section (a): the early layer whose probabilities differ most, and the log-probabilities against its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from naive.reference import Naive, Reference, State


class NaiveDoLa(Naive):
    def __init__(
        self, early: Sequence[int], top: float = 0.1, alpha: float = 1.0, jsd: bool = False, norm: bool = False
    ) -> None:
        super().__init__(())
        self.early, self.top, self.alpha, self.jsd, self.norm = tuple(early), top, alpha, jsd, norm

    def logits(
        self, sequence: State, reference: Reference, stream: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        own = probabilities(logits.tolist())
        chosen, most = own, -1.0
        for layer in self.early:
            state = stream[layer]
            early = probabilities(
                reference.read(reference.language_model.norm(state[None])[0] if self.norm else state).tolist()
            )
            differs = sum(self.distance(p, q) for p, q in zip(own, early, strict=True))
            if differs > most:
                chosen, most = early, differs
        mixed = [
            math.log(p) - self.alpha * math.log(q) if p >= self.top * max(own) else -math.inf
            for p, q in zip(own, chosen, strict=True)
        ]
        return torch.tensor(mixed, dtype=logits.dtype)

    def distance(self, p: float, q: float) -> float:
        middle = (p + q) / 2
        if self.jsd:
            return p * math.log(p / middle) + q * math.log(q / middle)
        return middle * math.log(middle / p) + middle * math.log(middle / q)


def probabilities(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    raised = [math.exp(each - highest) for each in logits]
    return [each / sum(raised) for each in raised]


CASES: list[tuple[dict[str, Any], NaiveDoLa]] = [
    ({}, NaiveDoLa([0])),  # of four layers the lower half has the embedding only, and the first layer is taken
    ({"depth": "high", "relative_top": 0.01}, NaiveDoLa([1], top=0.01)),
    ({"layers": [0, 1, 2], "relative_top": 0.0, "alpha": 0.5}, NaiveDoLa([0, 1, 2], top=0.0, alpha=0.5)),
    ({"layers": "0:3", "divergence": "jsd", "early_norm": True}, NaiveDoLa([0, 1, 2], jsd=True, norm=True)),
]
