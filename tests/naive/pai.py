"""PAI, section (a) of the paper's method: last row, image columns, all heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaivePai(Naive):
    def __init__(self, layers: Sequence[int], alpha: float, edit_prompt: bool = True) -> None:
        super().__init__(layers)
        self.alpha = alpha
        self.edit_prompt = edit_prompt

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        if not row.predicts or not (row.generated or self.edit_prompt):
            return scores
        edited = scores.clone()
        for head in range(len(scores)):
            for j in row.sequence.image():
                s = float(scores[head, j])
                if s > float("-inf"):
                    edited[head, j] = s + self.alpha * abs(s)
        return edited


CASES = [
    ({"alpha": 0.7, "layers": ":"}, NaivePai(range(4), 0.7)),
    ({"alpha": 1.5, "layers": "1:", "edit_prompt": False}, NaivePai([1, 2, 3], 1.5, edit_prompt=False)),
]
