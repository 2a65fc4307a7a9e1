"""How much attention heads pay to generated text, measured once per model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlmfix.errors import MethodError
from vlmfix.methods._measured import Measured

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, repr=False)
class HeadStatistics(Measured):
    """Mean attention to generated text at the tokens of real and of hallucinated objects.

    Attributes:
        real: ``[num_layers][num_heads]`` over all layers and heads; layers that were not measured hold zeros.
        hallucinated: The same at hallucinated objects.
        num_real: How many tokens the means are over.
        num_hallucinated: The same of hallucinated objects.
        kind: ``"mean"``: attention per generated key. ``"share"``: their sum.
        model: Name of the model.
        prompt: The prompt that was answered.
    """

    noun: ClassVar[str] = "statistics"

    real: Table
    hallucinated: Table
    num_real: int
    num_hallucinated: int
    kind: Literal["mean", "share"] = "mean"
    model: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        """Normalise what JSON delivers, then check it."""
        for name in ("real", "hallucinated"):
            object.__setattr__(self, name, _table(getattr(self, name), name))
        shapes = {(len(table), len(row)) for table in (self.real, self.hallucinated) for row in table}
        if len(shapes) != 1:
            raise MethodError(f"Statistics: 'real' and 'hallucinated' must have one shape, found {sorted(shapes)}.")
        for name in ("num_real", "num_hallucinated"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise MethodError(f"Statistics: {name!r} must be a whole number >= 1, got {value!r}.")
        if self.kind not in ("mean", "share"):
            raise MethodError(f"Statistics: 'kind' must be mean or share, got {self.kind!r}.")

    def __repr__(self) -> str:
        """Without the numbers: they are many."""
        layers, heads = self.shape
        return (
            f"HeadStatistics({layers} layers of {heads} heads, {self.num_real} real and {self.num_hallucinated} "
            f"hallucinated tokens, kind={self.kind!r}, model={self.model!r})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.real), len(self.real[0])

    def threshold(self, layer: int, beta: float) -> float:
        """Return ``Hal_l + beta (Real_l - Hal_l)``, sums over the heads of a layer."""
        real, hallucinated = sum(self.real[layer]), sum(self.hallucinated[layer])
        return hallucinated + beta * (real - hallucinated)

    def ratios(self, layer: int) -> list[float]:
        """Return ``M_lh``, real over hallucinated, of the heads of a layer."""
        return [real / hal for real, hal in zip(self.real[layer], self.hallucinated[layer], strict=True)]


def _table(value: Any, name: str) -> Table:
    is_table = isinstance(value, Sequence) and len(value) > 0 and all(_are_weights(row) for row in value)
    if not is_table:
        raise MethodError(f"Statistics: {name!r} must be a table [layers][heads] of finite numbers >= 0.")
    return tuple(tuple(float(each) for each in row) for row in value)


def _are_weights(row: Any) -> bool:
    return (
        isinstance(row, Sequence)
        and not isinstance(row, str)
        and len(row) > 0
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf for x in row)
    )
