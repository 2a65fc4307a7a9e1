"""What methods share that decide on the next token by what early layers say of it."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfix.methods.base import Method


@dataclass(frozen=True)
class EarlyLogits(Method):
    """Base class of methods whose ``layers`` are read by the model's head: see :meth:`~Method.mix_logits`."""

    counts = "next tokens"
    rewrites_logits = True
    needs_cache = False
    prompt_rows = "last"
    attention_kinds = ("joint",)

    @property
    def early_layers(self) -> tuple[int, ...]:
        """All layers of a bound method."""
        return self.layer_indices
