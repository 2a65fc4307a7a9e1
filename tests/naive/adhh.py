"""AD-HH: a listed head whose weight behind the image reaches tau loses it, in the row that predicts a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row


class NaiveAdhh(Naive):
    def __init__(
        self,
        heads: Sequence[tuple[int, int]],
        tau: float = 0.4,
        renormalize: bool = False,
        mode: str = "adaptive",
    ) -> None:
        super().__init__(sorted({layer for layer, _ in heads}))
        self.list, self.tau, self.renormalize, self.mode = heads, tau, renormalize, mode
        self.decisions: list[bool] = []

    def weights(self, row: Row, weights: torch.Tensor) -> torch.Tensor:
        if self.mode == "always" or not row.predicts:
            return weights
        start = min(row.sequence.image())
        text = [j for j in range(start, row.position + 1) if not row.sequence.is_image[j]]
        edited = weights.clone()
        for layer, head in self.list:
            if layer != row.layer:
                continue
            share = sum(float(weights[head, j]) for j in text)
            self.decisions.append(share >= self.tau)
            if self.decisions[-1]:
                edited[head, text] = 0.0
                if self.renormalize and float(edited[head].sum()) > 0:
                    edited[head] /= edited[head].sum()
        return edited

    def heads(self, row: Row, heads: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.mode != "always":
            return heads
        return [0 * each if (row.layer, head) in self.list else each for head, each in enumerate(heads)]


LISTED = ((0, 1), (1, 0), (1, 3), (2, 2), (3, 1))
CASES = [
    ({"heads": LISTED}, NaiveAdhh(LISTED)),
    ({"heads": LISTED, "tau": 0.0, "renormalize": True}, NaiveAdhh(LISTED, 0.0, renormalize=True)),
    ({"heads": LISTED[:3], "mode": "always"}, NaiveAdhh(LISTED[:3], mode="always")),
]
