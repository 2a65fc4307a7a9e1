"""Modality balance: the image's share m of a row becomes (1 - tau) m + tau / 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaiveModalityBalance(Naive):
    def __init__(self, layers: Sequence[int], tau: float = 0.5) -> None:
        super().__init__(layers)
        self.tau = tau

    def weights(self, row: Row, weights: torch.Tensor) -> torch.Tensor:
        if not row.is_behind_the_image:
            return weights
        image = row.sequence.image()
        edited = weights.clone()
        for head in range(len(weights)):
            m = sum(float(weights[head, j]) for j in image)
            rest = sum(float(w) for j, w in enumerate(weights[head]) if j not in image)  # 1 - m, without cancellation
            if m > 0 and rest > 0:
                wanted = (1 - self.tau) * m + self.tau / 2
                for j in range(weights.shape[1]):
                    share = wanted / m if j in image else (1 - wanted) / rest
                    edited[head, j] = share * float(weights[head, j])
        return edited


CASES = [
    ({"experimental": True}, NaiveModalityBalance(range(4))),
    ({"experimental": True, "tau": 1.0, "layers": "2:"}, NaiveModalityBalance([2, 3], 1.0)),
]
