"""IAT: S[h,q,j] += alpha |S[h,q,j]| for the generated keys j in P..q of a generated row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaiveIat(Naive):
    def __init__(self, layers: Sequence[int], alpha: float) -> None:
        super().__init__(layers)
        self.alpha = alpha

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        if not row.generated:
            return scores
        edited = scores.clone()
        for head in range(len(scores)):
            for j in range(row.sequence.prompt_length, row.position + 1):
                s = float(scores[head, j])
                if s > float("-inf"):
                    edited[head, j] = s + self.alpha * abs(s)
        return edited


CASES = [
    ({"alpha": 1.5, "layers": ":"}, NaiveIat(range(4), 1.5)),
    ({"alpha": 0.8, "layers": [1, 3]}, NaiveIat([1, 3], 0.8)),
]
