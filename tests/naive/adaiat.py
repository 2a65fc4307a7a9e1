"""AdaIAT, steps 1 to 4 of its definition, with the clamp: one row of one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from naive.reference import Naive, Row


class NaiveAdaIat(Naive):
    def __init__(
        self,
        layers: Sequence[int],
        alpha: float,
        beta: float,
        real: Sequence[Sequence[float]],
        hallucinated: Sequence[Sequence[float]],
        m_form: str = "minus_one",
        gate: str = "mean",
    ) -> None:
        super().__init__(layers)
        self.alpha, self.beta, self.real, self.hallucinated = alpha, beta, real, hallucinated
        self.m_form, self.gate = m_form, gate
        self.decisions: list[bool] = []

    def weights(self, row: Row, weights: torch.Tensor) -> torch.Tensor:
        if not row.generated:
            return weights
        first = max(row.sequence.prompt_length, row.reference.first_key(row))
        keys = range(first, row.position + 1)
        rows = weights.tolist()
        sums = [sum(each[j] for j in keys) for each in rows]
        ref = sum(total / len(keys) if self.gate == "mean" else total for total in sums)
        real, hallucinated = sum(self.real[row.layer]), sum(self.hallucinated[row.layer])
        self.decisions.append(ref < hallucinated + self.beta * (real - hallucinated))
        if not self.decisions[-1]:
            return weights
        for head, values in enumerate(rows):
            ratio = self.real[row.layer][head] / self.hallucinated[row.layer][head]
            factor = 1 + self.alpha * (ratio - 1 if self.m_form == "minus_one" else ratio)
            scaled = [each * max(0.0, factor) if j in keys else each for j, each in enumerate(values)]
            if sum(scaled) > 1e-6:  # nothing else in the window: the row stays
                rows[head] = [each / sum(scaled) for each in scaled]
        return torch.tensor(rows)


REAL = [[0.05, 0.04, 0.02, 0.05], [0.09, 0.03, 0.02, 0.04], [0.06, 0.06, 0.03, 0.02], [0.05, 0.05, 0.06, 0.05]]
HALLUCINATED = [[0.04, 0.02, 0.04, 0.04], [0.03, 0.03, 0.03, 0.03], [0.05, 0.04, 0.03, 0.02], [0.03, 0.02, 0.05, 0.03]]
"""Made-up statistics under which some gates are open and some are not, and some factors are clamped."""
STATISTICS = {"real": REAL, "hallucinated": HALLUCINATED, "num_real": 200, "num_hallucinated": 90}


def case(alpha: float, beta: float, **options: str) -> tuple[dict[str, Any], NaiveAdaIat]:
    """Parameters and their naive object."""
    statistics = {**STATISTICS, "kind": options.get("gate", "mean")}
    parameters = {"alpha": alpha, "beta": beta, "statistics": statistics, "layers": ":", **options}
    return parameters, NaiveAdaIat(range(4), alpha, beta, REAL, HALLUCINATED, **options)


CASES = [case(6.0, 2.0), case(3.0, 1.0, m_form="paper"), case(6.0, 8.0, gate="share")]
