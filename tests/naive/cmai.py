"""CMAI: F = A_tt A_ti in a reference layer; later layers keep the smallest set of image tokens with a share rho."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaiveCmai(Naive):
    def __init__(self, layers: Sequence[int], rho: float = 0.9, renorm: str = "none") -> None:
        super().__init__(layers)
        self.rho, self.renorm = rho, renorm

    def maps(self, rows: Sequence[Row], maps: list[torch.Tensor]) -> list[torch.Tensor]:
        if rows[0].layer != self.layers[0]:
            return maps
        sequence = rows[0].sequence
        text_on_image: dict[int, dict[int, float]] = sequence.notes.setdefault((self, "A_ti"), {})
        hidden: dict[int, list[int]] = sequence.notes.setdefault((self, "hidden"), {})
        image = sequence.image()
        for row, weights in zip(rows, maps, strict=True):
            i = row.position
            if sequence.is_image[i]:
                continue
            mean = weights.mean(0).tolist()
            text_on_image[i] = {j: mean[j] for j in image}
            focus = {j: sum(mean[k] * seen.get(j, 0.0) for k, seen in text_on_image.items() if k <= i) for j in image}
            hidden[i] = self.low_focus(focus)
        return maps

    def low_focus(self, focus: dict[int, float]) -> list[int]:
        total = sum(focus.values())
        kept: list[int] = []
        for j in sorted(focus, key=lambda j: (-focus[j], j)):
            if sum(focus[k] for k in kept) >= self.rho * total:
                break
            kept.append(j)
        return [j for j in focus if j not in kept] if total > 0 else []

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        image = row.sequence.image()
        if row.layer == self.layers[0] or not row.is_behind_the_image:
            return scores
        hidden = row.sequence.notes[self, "hidden"][row.position]
        edited = scores.clone()
        for head in range(len(scores)):
            edited[head, hidden] = -torch.inf
            if self.renorm == "image":
                m, kept = self.share(scores[head], image), self.share(edited[head], image)
                if not (0 < m < 1):
                    continue
                if kept == 0:
                    edited[head] = scores[head]
                    continue
                for j in image:
                    edited[head, j] += math.log(m / (1 - m)) - math.log(kept / (1 - kept))
        return edited

    @staticmethod
    def share(scores: torch.Tensor, image: list[int]) -> float:
        weights = torch.softmax(scores.double(), dim=0)
        return float(sum(weights[j] for j in image))


CASES = [
    ({"experimental": True, "rho": 0.6}, NaiveCmai(range(4), 0.6)),
    (
        {"experimental": True, "rho": 0.5, "renorm": "image", "layers": "1:"},
        NaiveCmai([1, 2, 3], 0.5, "image"),
    ),
]
