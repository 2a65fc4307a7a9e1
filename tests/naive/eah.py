"""EAH: one head's whole map for all heads, where it has the most sinks in the image; prompts only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaiveEah(Naive):
    def __init__(self, layers: Sequence[int], threshold: float | str = 0.002) -> None:
        super().__init__(layers)
        self.threshold = threshold

    @staticmethod
    def released_winner(maps: torch.Tensor, threshold: float) -> int | None:
        """The head whose map ``[heads, rows, keys]`` the released file copies: constants of one prompt of LLaVA-1.5."""
        counts = [0] * len(maps)
        for head, weights in enumerate(maps):
            for j in range(36, 611):
                others = float(weights[:, j].sum()) - float(weights[j, j])
                counts[head] += others / (647 - j) > threshold
        found = counts.index(max(counts))
        return found if counts[found] > 0 and found > 0 else None

    def maps(self, rows: Sequence[Row], maps: list[torch.Tensor]) -> list[torch.Tensor]:
        if rows[0].generated:
            return maps
        sequence, past = rows[0].sequence, rows[0].position
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
        sequence.notes[self, rows[0].layer] = (best, counts)
        if max(counts) == 0:
            return maps
        return [row[best].expand_as(row) for row in maps]


CASES = [
    ({}, NaiveEah([1])),
    ({"threshold": "auto", "layers": [0, 2]}, NaiveEah([0, 2], "auto")),
    ({"threshold": 0.08, "layers": ":"}, NaiveEah(range(4), 0.08)),
]
