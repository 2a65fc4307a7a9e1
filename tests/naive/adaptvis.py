"""AdaptVis: the prompt's last row, image scores times a factor chosen by the stock model's confidence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Reference, Row, State


class NaiveAdaptVis(Naive):
    def __init__(
        self,
        layers: Sequence[int],
        factor: float | None = None,
        threshold: float = 0.4,
        low: float = 0.5,
        high: float = 1.5,
        center: bool = False,
        decode: bool = False,
        probe_tokens: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layers)
        self.factor, self.threshold, self.low, self.high = factor, threshold, low, high
        self.center, self.decode, self.probe_tokens = center, decode, probe_tokens

    def begin(self, sequence: State, reference: Reference) -> None:
        factor = self.factor
        if factor is None:
            stock = Reference(reference.model, image_id=reference.image_id)
            stock._embed = lambda ids, pixels: torch.stack(sequence.embeds)  # type: ignore[method-assign]
            logits = stock.prompt(sequence.ids, None)[1][-1]
            words = range(len(logits)) if self.probe_tokens is None else self.probe_tokens
            exponents = [float(torch.exp(logits[word] - logits.max())) for word in words]
            factor = self.low if max(exponents) / sum(exponents) < self.threshold else self.high
        sequence.notes[self] = factor

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        if not row.predicts or (row.generated and not self.decode):
            return scores
        factor = row.sequence.notes[self]
        edited = scores.clone()
        for head in range(len(scores)):
            seen = [j for j in row.sequence.image() if float(scores[head, j]) > float("-inf")]
            middle = sum(float(scores[head, j]) for j in seen) / max(len(seen), 1) if self.center else 0.0
            for j in seen:
                edited[head, j] = middle + factor * (float(scores[head, j]) - middle)
        return edited


CASES = [
    ({"threshold": 0.22}, NaiveAdaptVis(range(4), threshold=0.22)),
    ({"mode": "fixed", "factor": 2.0}, NaiveAdaptVis(range(4), 2.0)),
    (
        {"threshold": 0.22, "low": -0.5, "high": 3.0, "center": True, "decode": True, "layers": "1:"},
        NaiveAdaptVis([1, 2, 3], None, 0.22, -0.5, 3.0, center=True, decode=True),
    ),
    (
        {"threshold": 0.75, "low": 0.0, "probe_tokens": [20, 21]},
        NaiveAdaptVis(range(4), threshold=0.75, low=0.0, probe_tokens=[20, 21]),
    ),
]
