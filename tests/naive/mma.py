"""MMA: image rows see later question tokens, with bias log(gamma)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from naive.reference import Naive, State


class NaiveMma(Naive):
    def __init__(self, layers: Sequence[int], gamma: float = 1.0, columns: str = "question") -> None:
        super().__init__(layers)
        self.gamma = gamma
        self.columns = columns

    def opens(self, sequence: State, row: int, key: int) -> float | None:
        image = [i for i in sequence.image() if i >= sequence.turn]  # those of earlier turns are in the cache already
        if row not in image or key >= sequence.prompt_length or sequence.is_image[key]:
            return None
        if self.columns == "question" and key < max(image):
            return None
        return math.log(self.gamma)


CASES = [
    ({"layers": ":"}, NaiveMma(range(4))),
    ({"gamma": 0.3, "layers": "0:2"}, NaiveMma([0, 1], 0.3)),
    ({"columns": "own_image", "layers": ":"}, NaiveMma(range(4), columns="own_image")),
]
