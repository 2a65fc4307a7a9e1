"""VISTA, section (a): a vector per layer from two passes, every MLP output turned towards it; early logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from naive.reference import Naive, Reference, Row, State


class NaiveVista(Naive):
    def __init__(
        self,
        lam: float,
        alpha: float,
        layers: Sequence[int] = range(4),
        early: Sequence[int] = (2,),
        norm: bool = False,
        artefact: bool = False,
    ) -> None:
        super().__init__(layers)
        self.lam, self.alpha, self.early, self.norm, self.artefact = lam, alpha, early, norm, artefact

    def begin(self, sequence: State, reference: Reference) -> None:
        words = [i for i, token in enumerate(sequence.ids) if not sequence.is_image[i]]
        with_image = reference.stream(sequence.embeds)
        without = reference.stream([sequence.embeds[i] for i in words])
        vectors = [
            (one.double() - two.double()).tolist() for (_, one), (_, two) in zip(with_image, without, strict=True)
        ]
        if self.artefact:
            vectors[0][0] += 1
        sequence.notes[self] = vectors

    def block(self, row: Row, kind: str, added: torch.Tensor) -> torch.Tensor:
        if kind != "mlp":
            return added
        x, v = added.tolist(), unit(row.sequence.notes[self][row.layer])
        cosine = sum(a * b for a, b in zip(unit(x), v, strict=True))
        gain = self.lam * (1 + max(0.0, -cosine))
        turned = unit([a + gain * b for a, b in zip(unit(x), v, strict=True)])
        return torch.tensor([length(x) * each for each in turned], dtype=added.dtype)

    def logits(
        self, sequence: State, reference: Reference, stream: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        states = [stream[k] for k in self.early]
        if self.norm:
            states = [reference.language_model.norm(x[None])[0] for x in states]
        early = sum(reference.read(x) for x in states) / len(states)
        return self.alpha * early + (1 - self.alpha) * logits


def length(vector: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in vector))


def unit(vector: Sequence[float]) -> list[float]:
    return [x / length(vector) for x in vector]


CASES: list[tuple[dict[str, Any], NaiveVista]] = [
    ({"lam": 0.5, "sla_alpha": 0.0}, NaiveVista(0.5, 0.0)),
    ({"lam": 0.3}, NaiveVista(0.3, 0.3, early=[2])),
    (
        {"lam": 1.0, "sla_alpha": 0.5, "sla_layers": [0, 2, 3], "sla_final_norm": True, "layers": "1:3"},
        NaiveVista(1.0, 0.5, [1, 2], [0, 2, 3], norm=True),
    ),
    ({"lam": 0.4, "sla_alpha": 0.2, "paper_code": True}, NaiveVista(0.4, 0.2, artefact=True)),
    ({"lam": 0.0, "sla_alpha": 0.6, "sla_layers": "1:"}, NaiveVista(0.0, 0.6, early=[1, 2, 3])),
]
