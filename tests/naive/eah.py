"""EAH: one head's whole map for all heads, where it has the most sinks in the image; prompts only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reference import Naive, State


class NaiveEah(Naive):
    def __init__(
        self, layers: Sequence[int], threshold: float | str = 0.002, windows: Sequence[int | None] | None = None
    ) -> None:
        super().__init__(layers)
        self.threshold, self.windows = threshold, windows

    def maps(
        self, sequence: State, number: int, past: int, maps: list[torch.Tensor], generated: bool
    ) -> list[torch.Tensor]:
        if generated:
            return maps
        total = len(maps)
        window = None if self.windows is None else self.windows[number]
        threshold = 1.2 / total if self.threshold == "auto" else float(self.threshold)
        counts = []
        for head in range(len(maps[0])):
            count = 0
            for j in sequence.image():
                later = range(j + 1, total if window is None else min(total, j + window))
                if len(later) and sum(float(maps[i][head, j]) for i in later) / len(later) > threshold:
                    count += 1
            counts.append(count)
        best = counts.index(max(counts))
        sequence.notes[self, number] = (best, counts)
        if max(counts) == 0:
            return maps
        return [row[best].expand_as(row) for row in maps]
