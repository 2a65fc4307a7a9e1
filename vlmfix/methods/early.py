"""What methods share that decide on the next token by what early layers say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import Self

from vlmfix.methods.base import Method
from vlmfix.methods.selection import DefaultLayers
from vlmfix.model.anatomy import Anatomy

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class EarlyLogits(Method):
    """Base class of methods whose ``layers`` are read by the model's head: see :meth:`~Method.mix_logits`."""

    counts = "next tokens"
    rewrites_logits = True
    prompt_rows = "last"
    attention_kinds = ("joint",)
    default_layers = DefaultLayers("as the class says", lambda num_layers: tuple(range(num_layers)))

    @property
    def early_layers(self) -> tuple[int, ...]:
        """All layers of a bound method."""
        return self.layer_indices

    def default_candidates(self, num_layers: int) -> Sequence[int]:
        """The layers of a model of some depth if none are given."""
        raise NotImplementedError

    def check_candidates(self, anatomy: Anatomy) -> None:
        """Refuse layers that mean nothing here."""

    def bind(self, anatomy: Anatomy) -> Self:
        """Resolve the layers."""
        bound = super().bind(anatomy)
        if self.layers is None:
            bound = dataclasses.replace(bound, layers=tuple(self.default_candidates(anatomy.num_layers)))
        bound.require(bool(bound.layers), "layers", "given: a model of this depth has no default ones")
        bound.check_candidates(anatomy)
        return bound
