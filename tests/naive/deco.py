"""DeCo, section (a): of the likeliest tokens, those that an early layer is sure of are raised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from naive.dola import probabilities
from naive.reference import Naive, Reference, State


class NaiveDeCo(Naive):
    def __init__(
        self, early: Sequence[int], alpha: float = 0.6, top_p: float = 0.9, top_k: int = 20, cut: bool = True
    ) -> None:
        super().__init__(())
        self.early, self.alpha, self.top_p, self.top_k, self.cut = tuple(early), alpha, top_p, top_k, cut

    def logits(
        self, sequence: State, reference: Reference, stream: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        own, candidates, together = probabilities(logits.tolist()), list[int](), 0.0
        for token in sorted(range(len(own)), key=lambda each: -own[each])[: self.top_k]:
            candidates.append(token)
            together += own[token]
            if together >= self.top_p:
                break
        chosen, sure = [0.0] * len(own), 0.0
        for layer in self.early:
            early = reference.read(reference.language_model.norm(stream[layer][None])[0]).tolist()
            most = max(probabilities(early)[token] for token in candidates)
            if most > sure:
                chosen, sure = early, most
        corrected = [value + self.alpha * sure * other for value, other in zip(logits.tolist(), chosen, strict=True)]
        kept = [value if not self.cut or token in candidates else -math.inf for token, value in enumerate(corrected)]
        return torch.tensor(kept, dtype=logits.dtype)


CASES: list[tuple[dict[str, Any], NaiveDeCo]] = [
    ({}, NaiveDeCo([1, 2, 3])),  # of four layers: the outputs of 20/32 to 28/32 of them, counted as released
    ({"layers": [0, 2], "alpha": 2.0, "top_p": 0.999, "top_k": 5}, NaiveDeCo([0, 2], 2.0, 0.999, 5)),
    ({"layers": "1:", "cut": False, "alpha": 1.0}, NaiveDeCo([1, 2, 3], 1.0, cut=False)),
]
