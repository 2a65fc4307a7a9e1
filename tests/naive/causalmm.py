"""CausalMM, in the language model: against the branch whose attention is turned round, or the same for all keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.edited import NaiveEdited
from naive.reference import Naive, Row


class NaiveCounterfactual(Naive):
    def __init__(self, layers: Sequence[int], kind: str) -> None:
        super().__init__(layers)
        self.kind = kind

    def weights(self, row: Row, weights: torch.Tensor) -> torch.Tensor:
        seen = range(row.reference.first_key(row), row.position + 1)
        edited = torch.zeros_like(weights)
        for head, each in enumerate(weights.tolist()):
            other = {j: max(each) - each[j] if self.kind == "reversed" else 1.0 for j in seen}
            total = sum(other.values())
            if total == 0:  # the only key
                edited[head] = weights[head]
                continue
            for j in seen:
                edited[head, j] = other[j] / total
        return edited


DECODING_CASES = [
    ({}, NaiveEdited(NaiveCounterfactual([1, 2], "reversed"), 1.0, 0.1)),
    (
        {"weights": "uniform", "in_layers": [0, 3], "alpha": 0.5, "beta": 0.0},
        NaiveEdited(NaiveCounterfactual([0, 3], "uniform"), 0.5, 0.0),
    ),
]
