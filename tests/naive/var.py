"""VAR, steps 1 to 4 of the paper: sinks by hidden dimensions, heads by their image mass, weight moved within a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from families.tiny_llava import SINK_DIMS

from naive.reference import Naive, Row


class NaiveVar(Naive):
    """In the paper's notation: D_sink, tau, rho, least image mass, w, layers."""

    needs_sinks = True

    def __init__(
        self,
        layers: Sequence[int] = range(4),
        sink_dims: Sequence[int] = SINK_DIMS,
        tau: float = 3.0,
        rho: float = 0.5,
        image_mass: float = 0.2,
        recycle: float = 0.6,
    ) -> None:
        super().__init__(layers)
        self.sink_dims, self.tau, self.rho, self.image_mass, self.recycle = sink_dims, tau, rho, image_mass, recycle
        self.decisions: list[bool] = []

    def enter(self, row: Row) -> None:
        known = row.sequence.notes.setdefault((self, row.layer), [])
        known.append(not row.generated and sink_value(row.state, self.sink_dims) >= self.tau)

    def weights(self, row: Row, weights: torch.Tensor) -> torch.Tensor:
        if not row.is_behind_the_image:
            return weights
        is_sink = row.sequence.notes[self, row.layer]
        edited = [self.redistribute(each, row.sequence.is_image, is_sink) for each in weights]
        self.decisions += [selected for _, selected in edited]
        return torch.stack([each for each, _ in edited])

    def redistribute(
        self, row: torch.Tensor, is_image: Sequence[bool], is_sink: Sequence[bool]
    ) -> tuple[torch.Tensor, bool]:
        """Steps 3 and 4 on one attention row ``[keys]``: the edited row, and whether it was selected."""
        keys, weights = range(len(row)), row.tolist()
        visual_sinks = [j for j in keys if is_sink[j] and is_image[j]]
        rest = [j for j in keys if is_image[j] and not is_sink[j]]
        image_mass = sum(weights[j] for j in keys if is_image[j])
        sink_mass, rest_mass = sum(weights[j] for j in visual_sinks), sum(weights[j] for j in rest)
        if not visual_sinks or image_mass <= 0 or rest_mass <= 0:
            return row, False
        if image_mass < self.image_mass or 1 - sink_mass / image_mass < self.rho:
            return row, False
        omega = self.recycle * sum(weights[j] for j in keys if is_sink[j])
        edited = [(1 - self.recycle) * weights[j] if is_sink[j] else weights[j] for j in keys]
        for j in rest:
            edited[j] = weights[j] + omega * weights[j] / rest_mass
        return torch.tensor(edited, dtype=row.dtype), True


def sink_value(x: torch.Tensor, sink_dims: Sequence[int]) -> float:
    """phi(x) = max_d |x_d| / sqrt(mean x^2 + 1e-6)."""
    x = x.double()
    rms = math.sqrt(float((x * x).mean()) + 1e-6)
    return max(abs(float(x[d])) for d in sink_dims) / rms


MARKED = {"sink_dims": SINK_DIMS, "sink_threshold": 3.0, "layers": ":"}
CASES = [
    (MARKED, NaiveVar()),
    ({**MARKED, "recycle": 0.4}, NaiveVar(recycle=0.4)),
    ({**MARKED, "recycle": 1.0}, NaiveVar(recycle=1.0)),
    ({**MARKED, "nonsink_ratio": 0.8, "image_mass": 0.0}, NaiveVar(rho=0.8, image_mass=0.0)),
    ({**MARKED, "nonsink_ratio": 0.0, "image_mass": 0.5}, NaiveVar(rho=0.0, image_mass=0.5)),
    ({**MARKED, "nonsink_ratio": 0.0, "image_mass": 0.0}, NaiveVar(rho=0.0, image_mass=0.0)),
    ({**MARKED, "layers": (1, 3), "sink_threshold": 2.5}, NaiveVar((1, 3), tau=2.5)),
    ({**MARKED, "sink_dims": SINK_DIMS[1:]}, NaiveVar(sink_dims=SINK_DIMS[1:])),
]
