"""AllPath: sum_n lambda[l,n] H[l,n] with lambda = up in Z+ minus Z-, down in Z- minus Z+, else 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaiveAllPath(Naive):
    def __init__(
        self, good: Sequence[tuple[int, int]], bad: Sequence[tuple[int, int]], up: float = 2.0, down: float = 0.0
    ) -> None:
        super().__init__(range(100))
        self.good, self.bad, self.up, self.down = good, bad, up, down

    def heads(self, row: Row, heads: list[torch.Tensor]) -> list[torch.Tensor]:
        scaled = []
        for head, each in enumerate(heads):
            good, bad = (row.layer, head) in self.good, (row.layer, head) in self.bad
            scaled.append(each * (self.up if good and not bad else self.down if bad and not good else 1.0))
        return scaled


GOOD, BAD = ((0, 2), (1, 1), (1, 3), (3, 0), (0, 2)), ((1, 0), (2, 2), (3, 0))
CASES = [
    ({"up_heads": GOOD, "down_heads": BAD}, NaiveAllPath(GOOD, BAD)),
    ({"up": 1.0, "down": 0.3, "up_heads": GOOD, "down_heads": BAD}, NaiveAllPath(GOOD, BAD, 1.0, 0.3)),
]
