"""IRI, section (b): sources below are added to a target at the last position, and its length is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from naive.reference import Naive, Row
from naive.vista import length

RATES = {"attention": [0.3, 0.5, -0.2, 0.4], "mlp": [0.9, -0.1, 0.2, 0.6]}
RANKING = {"model": "", "rr_attn": RATES["attention"], "rr_mlp": RATES["mlp"]}


class NaiveIri(Naive):
    def __init__(
        self,
        strength: dict[str, float],
        k1: int,
        k2: int,
        layers: Sequence[int] = range(4),
        sources: str = "raw",
        rates: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__(layers)
        self.strength, self.k1, self.k2, self.inject = strength, k1, k2, sources
        self.rates = rates or RATES

    def ranked(self, kind: str) -> list[int]:
        return sorted(self.layers, key=lambda layer: -self.rates[kind][layer])

    def block(self, row: Row, kind: str, added: torch.Tensor) -> torch.Tensor:
        if not row.predicts:
            return added
        ranked = self.ranked(kind)
        notes: dict[int, list[float]] = row.sequence.notes.setdefault((self, kind, row.position), {})
        raw = added.tolist()
        edited = raw
        if row.layer in ranked[: self.k2]:
            moved = list(raw)
            for source in ranked[: self.k1]:
                if source < row.layer and self.rates[kind][source] > 0:
                    share = self.strength[kind] * self.rates[kind][source]
                    moved = [u + share * c for u, c in zip(moved, notes[source], strict=True)]
            if moved != raw:
                edited = [u * length(raw) / length(moved) for u in moved]
        notes[row.layer] = raw if self.inject == "raw" else edited
        return torch.tensor(edited, dtype=added.dtype)


def case(
    lambda_a: float, lambda_m: float, k1: int, k2: int, sources: str = "raw", layers: str = ":"
) -> tuple[dict[str, Any], NaiveIri]:
    options = {"lambda_a": lambda_a, "lambda_m": lambda_m, "k1": k1, "k2": k2, "sources": sources, "layers": layers}
    chosen = range(4)[1:] if layers == "1:" else range(4)
    naive = NaiveIri({"attention": lambda_a, "mlp": lambda_m}, k1, k2, chosen, sources)
    return {**options, "ranking": RANKING}, naive


CASES = [
    case(0.8, 0.6, 3, 4),
    case(0.9, 0.0, 1, 2),
    case(2.0, 3.0, 2, 3, "edited"),
    case(1.5, 1.0, 2, 2, layers="1:"),
]
