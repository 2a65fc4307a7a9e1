"""EAH: one head's whole map for all heads, where it has the most sinks in the image; prompts only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, State


class NaiveEah(Naive):
    def __init__(self, layers: Sequence[int], threshold: float | str = 0.002) -> None:
        super().__init__(layers)
        self.threshold = threshold

    def maps(
        self, sequence: State, number: int, past: int, maps: list[torch.Tensor], generated: bool
    ) -> list[torch.Tensor]:
        if generated:
            return maps
        total = past + len(maps)
        threshold = 1.2 / total if self.threshold == "auto" else float(self.threshold)
        counts = []
        for head in range(len(maps[0])):
            count = 0
            for j in sequence.image():
                later = [float(maps[i - past][head, j]) for i in range(max(j + 1, past), total)]
                seen = [weight for weight in later if weight > 0]  # hidden keys have weight 0
                if seen and sum(seen) / len(seen) > threshold:
                    count += 1
            counts.append(count)
        best = counts.index(max(counts))
        sequence.notes[self, number] = (best, counts)
        if max(counts) == 0:
            return maps
        return [row[best].expand_as(row) for row in maps]


CASES = [
    ({}, NaiveEah([1])),
    ({"threshold": "auto", "layers": [0, 2]}, NaiveEah([0, 2], "auto")),
    ({"threshold": 0.08, "layers": ":"}, NaiveEah(range(4), 0.08)),
]
