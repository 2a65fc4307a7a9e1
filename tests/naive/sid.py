"""SID: from layer 2 on, the second branch sees the image tokens with the least attention in layer 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.edited import NaiveEdited
from naive.reference import Naive, Row


class NaiveLeastSeen(Naive):
    def __init__(self, layers: Sequence[int], keep: int) -> None:
        super().__init__(layers)
        self.keep = keep

    def maps(self, rows: Sequence[Row], maps: list[torch.Tensor]) -> list[torch.Tensor]:
        if rows[0].layer == 1:
            sequence = rows[0].sequence
            seen = {j: sum(float(head[j]) for head in maps[-1]) for j in sequence.image()}
            kept = sorted(seen, key=lambda j: (seen[j], j))[: self.keep]
            sequence.notes["hidden"] = [j for j in seen if j not in kept]
        return maps

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        edited = scores.clone()
        if row.layer > 1:
            edited[:, row.sequence.notes["hidden"]] = -torch.inf
        return edited


DECODING_CASES = [
    ({"keep": 3}, NaiveEdited(NaiveLeastSeen(range(1, 4), 3), 1.0, 0.1)),
    ({"keep": 5, "alpha": 0.5, "beta": 0.0}, NaiveEdited(NaiveLeastSeen(range(1, 4), 5), 0.5, 0.0)),
]
