"""SPIN, steps 1 to 5 as released: scores summed one by one, divided by their deviation, softmax over heads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaiveSpin(Naive):
    def __init__(self, layers: Sequence[int], keep: float, suppress: float, score: str = "scores") -> None:
        super().__init__(layers)
        self.keep, self.suppress, self.score = keep, suppress, score

    def heads(self, row: Row, heads: list[torch.Tensor]) -> list[torch.Tensor]:
        if not row.predicts:
            return heads
        image = [j for j in row.sequence.image() if j >= row.reference.first_key(row)]
        if not image:
            return heads
        share = len(heads) // row.keys.shape[1]
        if self.score == "scores":
            gates = [
                sum(float(row.query[h] @ row.keys[j, h // share]) for j in image) / math.sqrt(row.query.shape[1])
                for h in range(len(heads))
            ]
            deviation = statistics.pstdev(gates)
            top = max(gates)
            gates = [math.exp((each - top) / deviation) for each in gates]
            gates = [each / sum(gates) for each in gates]
        else:
            weights = torch.softmax(row.reference.scores(row), dim=1)
            gates = [float(weights[h, image].sum()) for h in range(len(heads))]
        ranked = sorted(range(len(heads)), key=lambda h: -gates[h])
        kept = ranked[: max(1, int(self.keep * len(heads)))]
        return [each if h in kept else self.suppress * each for h, each in enumerate(heads)]


CASES = [
    ({"keep": 0.5}, NaiveSpin(range(4), 0.5, 0.08)),
    ({"keep": 0.95, "suppress": 0.0, "layers": "1:"}, NaiveSpin([1, 2, 3], 0.95, 0.0)),
    ({"keep": 0.25, "score": "mass"}, NaiveSpin(range(4), 0.25, 0.08, "mass")),
]
