"""VHR, eqs. 4, 6 and 7: heads whose outputs differ most from those without the image, scaled in all rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from naive.reference import Naive, Reference, Row, State


class NaiveVhr(Naive):
    """alpha, layers, outlier rule, and the head controls."""

    def __init__(
        self,
        layers: Sequence[int] = range(4),
        alpha: float = 2.0,
        outliers: bool | str = True,
        select: str = "divergent",
    ) -> None:
        super().__init__(layers)
        self.alpha, self.outliers, self.select = alpha, outliers, select

    def begin(self, sequence: State, reference: Reference) -> None:
        """Read the words alone; the stream has no edits."""
        words = [each for each, image in zip(sequence.embeds, sequence.is_image, strict=True) if not image]
        sequence.notes[self] = [heads for heads, _ in reference.stream(words)]

    def outputs(self, rows: Sequence[Row], outputs: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        notes, layer = rows[0].sequence.notes, rows[0].layer
        if not rows[0].generated:
            divergent = choose_heads(outputs[-1], notes[self][layer], self.outliers)
            notes[self, layer] = [
                {"divergent": each, "unselected": not each, "all": True}[self.select] for each in divergent
            ]
        return [
            [self.alpha * head if chosen else head for head, chosen in zip(row, notes[self, layer], strict=True)]
            for row in outputs
        ]


def choose_heads(
    with_image: Sequence[torch.Tensor], without_image: Sequence[torch.Tensor], outliers: bool | str
) -> list[bool]:
    """Which heads lie above the layer's median divergence; ``"released"``: the official code's rule, by ports."""
    count = len(with_image)
    vhd = [math.dist(x.tolist(), y.tolist()) for x, y in zip(with_image, without_image, strict=True)]
    if outliers == "released":
        vhd = [value**2 for value in vhd]
        outliers = count > 1 and mean_plus_std(vhd) - sum(vhd) / count > 1
    if outliers and count > 1:
        surge = [sum(b**2 for b in y.tolist()) for y in without_image]
        limit_vhd, limit_surge = mean_plus_std(vhd), mean_plus_std(surge)
        vhd = [0.0 if vhd[i] > limit_vhd and surge[i] > limit_surge else vhd[i] for i in range(count)]
    ranked = sorted(vhd)
    median = ranked[(count - 1) // 2] if count % 2 else (ranked[count // 2 - 1] + ranked[count // 2]) / 2
    return [value > median for value in vhd]


def mean_plus_std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return mean + math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


CASES = [
    ({"layers": ":"}, NaiveVhr()),
    ({"layers": ":", "alpha": 0.5}, NaiveVhr(alpha=0.5)),
    ({"layers": (2, 3), "alpha": 3.0}, NaiveVhr((2, 3), 3.0)),
    ({"layers": ":", "outliers": False}, NaiveVhr(outliers=False)),
    ({"layers": (1, 3), "select": "all"}, NaiveVhr((1, 3), select="all")),
    ({"layers": ":", "select": "unselected"}, NaiveVhr(select="unselected")),
]
