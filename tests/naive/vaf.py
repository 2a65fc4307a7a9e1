"""VAF: rows behind the image; image scores times one factor, scores before the image times another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row, State


class NaiveVaf(Naive):
    def __init__(
        self,
        layers: Sequence[int],
        enhance: float = 1.15,
        suppress: float = 0.95,
        multiply: str = "signed",
        heads: str | Sequence[tuple[int, int]] = "all",
    ) -> None:
        super().__init__(layers)
        self.enhance, self.suppress, self.multiply, self.heads_of = enhance, suppress, multiply, heads
        self.waiting: list[torch.Tensor] = []

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        if not row.generated and self.heads_of == "visual":  # who is edited is known at the last row only: see ``maps``
            self.waiting = [] if row.position == row.sequence.turn else self.waiting
            self.waiting.append(scores)
            return scores
        if not row.is_behind_the_image:
            return scores
        return self.edit(row.sequence, scores, self.choice(row, len(scores)))

    def maps(self, rows: Sequence[Row], maps: list[torch.Tensor]) -> list[torch.Tensor]:
        if rows[0].generated or self.heads_of != "visual":
            return maps
        sequence = rows[0].sequence
        mass = [sum(float(row[j]) for j in sequence.image()) for row in maps[-1]]
        ranked = sorted(range(len(mass)), key=lambda head: (-mass[head], head))
        chosen = sequence.notes[self, rows[0].layer] = ranked[: max(len(mass) // 2, 1)]
        return [
            torch.softmax(self.edit(sequence, scores, chosen), dim=1) if row.is_behind_the_image else weights
            for row, scores, weights in zip(rows, self.waiting, maps, strict=True)
        ]

    def choice(self, row: Row, heads: int) -> list[int]:
        if self.heads_of == "all":
            return list(range(heads))
        if self.heads_of == "visual":
            return list(row.sequence.notes[self, row.layer])
        return [head for layer, head in self.heads_of if layer == row.layer]

    def edit(self, sequence: State, scores: torch.Tensor, heads: list[int]) -> torch.Tensor:
        edited = scores.clone()
        first = min(sequence.image())
        for head in heads:
            for j in [*range(first), *sequence.image()]:
                factor = self.suppress if j < first else self.enhance
                s = float(scores[head, j])
                if s > float("-inf"):
                    edited[head, j] = factor * s if self.multiply == "signed" else s + (factor - 1) * abs(s)
        return edited


HEADS = [(0, 1), (2, 0), (2, 3)]
CASES = [
    ({"enhance": 1.5, "suppress": 0.7, "layers": ":"}, NaiveVaf(range(4), 1.5, 0.7)),
    (
        {"enhance": -1.5, "suppress": 2.0, "heads": "visual", "layers": ":"},
        NaiveVaf(range(4), -1.5, 2.0, heads="visual"),
    ),
    ({"enhance": 1.5, "suppress": 0.7, "multiply": "abs", "layers": "1:3"}, NaiveVaf([1, 2], 1.5, 0.7, "abs")),
    ({"enhance": 2.0, "suppress": 0.5, "heads": HEADS}, NaiveVaf([0, 2], 2.0, 0.5, heads=HEADS)),
]
