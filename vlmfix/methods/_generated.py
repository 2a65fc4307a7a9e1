"""What methods that edit attention to generated text share."""

from __future__ import annotations

from collections.abc import Sequence

from vlmfix.methods.base import layers_by_depth


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
