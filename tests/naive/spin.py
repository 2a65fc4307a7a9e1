"""SPIN, steps 1 to 5 as released: scores summed one by one, divided by their deviation, softmax over heads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from naive.reference import Naive, Reference, State


class NaiveSpin(Naive):
    def __init__(self, layers: Sequence[int], keep: float, suppress: float, score: str = "scores") -> None:
        super().__init__(layers)
        self.keep, self.suppress, self.score = keep, suppress, score

    def begin(self, sequence: State, reference: Reference) -> None:
        sequence.notes["reference"] = reference

    def heads(
        self,
        sequence: State,
        number: int,
        position: int,
        heads: list[torch.Tensor],
        query: torch.Tensor,
        keys: torch.Tensor,
        generated: bool,
    ) -> list[torch.Tensor]:
        if not sequence.is_last_row(position, generated):
            return heads
        reference: Reference = sequence.notes["reference"]
        window = reference._window(number)
        image = [j for j in sequence.image() if window is None or j > position - window]
        if not image:
            return heads
        share = len(heads) // keys.shape[1]
        if self.score == "scores":
            gates = [
                sum(float(query[h] @ keys[j, h // share]) for j in image) / math.sqrt(query.shape[1])
                for h in range(len(heads))
            ]
            deviation = statistics.pstdev(gates)
            top = max(gates)
            gates = [math.exp((each - top) / deviation) for each in gates]
            gates = [each / sum(gates) for each in gates]
        else:
            row = torch.softmax(reference._scores(number, query, keys, position), dim=1)
            gates = [float(row[h, image].sum()) for h in range(len(heads))]
        ranked = sorted(range(len(heads)), key=lambda h: -gates[h])
        kept = ranked[: max(1, int(self.keep * len(heads)))]
        return [each if h in kept else self.suppress * each for h, each in enumerate(heads)]


CASES = [
    ({"keep": 0.5}, NaiveSpin(range(4), 0.5, 0.08)),
    ({"keep": 0.95, "suppress": 0.0, "layers": "1:"}, NaiveSpin([1, 2, 3], 0.95, 0.0)),
    ({"keep": 0.25, "score": "mass"}, NaiveSpin(range(4), 0.25, 0.08, "mass")),
]
