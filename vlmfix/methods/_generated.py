"""What methods that edit attention to generated text share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmfix.anatomy import Anatomy, AttentionKind
from vlmfix.methods.base import Method, PromptRows, layers_by_depth


@dataclass(frozen=True)
class RaisesGeneratedText(Method):
    """Base of the methods that raise attention to generated text, in the rows of generated tokens alone.

    Attributes:
        alpha: Strength, >= 0; 0 is the identity.
    """

    alpha: float = 1.0

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        self.require(0 <= self.alpha < math.inf, "alpha", "a finite number >= 0 (0 switches the method off)")

    @property
    def is_identity(self) -> bool:
        """Whether ``alpha`` is 0."""
        return self.alpha == 0

    @property
    def prompt_rows(self) -> PromptRows:
        """None."""
        return "none"

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Self-attention over prompt and answer: the answer is weighed against the prompt."""
        return ("joint", "text")

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers 5 to 17 of 32, scaled."""
        return generated_text_layers(num_layers)

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say when the layers are wider than the paper's."""
        return scope_note(self.name, self.layer_indices, anatomy.num_layers)


def generated_text_layers(num_layers: int) -> tuple[int, ...]:
    """Layers 5 to 17 of 32, scaled to the model's depth."""
    return layers_by_depth(5, 17, 32, num_layers)


def scope_note(name: str, layers: Sequence[int], num_layers: int) -> tuple[str, ...]:
    """Say when layers outside the default ones were chosen."""
    scope = generated_text_layers(num_layers)
    if set(layers) <= set(scope):
        return ()
    return (
        f"{name}: layers outside {scope[0]}..{scope[-1]} (5..17 of 32, scaled): wider scopes broke the paper's texts",
    )
