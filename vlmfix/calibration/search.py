"""What searches share: means of per-head records in two classes, ranks of heads, and what is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmfix.methods.base import Method

Head = tuple[int, int]


@dataclass
class Contrast:
    """Running means of records ``[layers, num_heads]`` in two classes; summed up in double precision.

    Attributes:
        sums: The two sums, by class.
        counts: How many records each has.
        dropped: Records that were not finite.
    """

    sums: dict[bool, torch.Tensor] = field(default_factory=dict)
    counts: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    dropped: int = 0

    def add(self, record: torch.Tensor, positive: bool) -> None:
        """Add a record to a class, or drop it if a number in it is not finite."""
        record = record.double().cpu()
        if not bool(record.isfinite().all()):
            self.dropped += 1
            return
        self.sums[positive] = self.sums[positive] + record if positive in self.sums else record
        self.counts[positive] += 1

    def mean(self, positive: bool) -> torch.Tensor:
        """Return the mean of a class."""
        return self.sums[positive] / self.counts[positive]

    def difference(self) -> torch.Tensor:
        """Return the mean of the positive class minus that of the other one."""
        return self.mean(True) - self.mean(False)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        method: The method with it.
        counts: What it rests on.
        scores: Tables ``[layers, num_heads]`` by name.
        layers: The layers of the tables.
        options: The search's options, resolved.
    """

    method: Method
    counts: dict[str, int]
    scores: dict[str, torch.Tensor]
    layers: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def ranked(scores: torch.Tensor, layers: Sequence[int]) -> list[Head]:
    """Return the heads of a table ``[layers, num_heads]`` by descending score; ties in model order."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    heads = scores.shape[1]
    return [(layers[index // heads], index % heads) for index in order]


def scaled_count(published: int, num_heads: int) -> int:
    """Scale a number of heads from a model of 1024 heads to one of ``num_heads``: a heuristic; at least 1."""
    return max(1, round(published / 1024 * num_heads))
