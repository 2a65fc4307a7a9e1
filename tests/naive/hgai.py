"""HGAI: last row, image columns, a boost shared between the heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaiveHgai(Naive):
    def __init__(self, layers: Sequence[int], alpha: float = 0.5, edit_prompt: bool = True) -> None:
        super().__init__(layers)
        self.alpha, self.edit_prompt = alpha, edit_prompt

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        if not row.predicts or not (row.generated or self.edit_prompt):
            return scores
        edited = scores.clone()
        heads = range(len(scores))
        for j in row.sequence.image():
            if float(scores[0, j]) > float("-inf"):
                g = sum(abs(float(scores[h, j])) for h in heads) / len(heads)
                for h in heads:
                    edited[h, j] = float(scores[h, j]) + self.alpha * g
        return edited


CASES = [
    ({"layers": ":"}, NaiveHgai(range(4))),
    ({"alpha": 1.5, "edit_prompt": False, "layers": "1:"}, NaiveHgai([1, 2, 3], 1.5, False)),
]
