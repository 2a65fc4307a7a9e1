"""Which kinds of attention a method means something in: the one place that decides, by what a method declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmfix.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmfix.anatomy import Anatomy, AttentionKind
    from vlmfix.methods.base import Method

_MEANING: dict[AttentionKind, str] = {
    "joint": "self-attention over a prompt that holds the image's tokens",
    "text": "self-attention over text alone",
    "image": "cross-attention to image features alone",
    "encoder": "cross-attention to an encoder's image and text tokens",
    "answer": "self-attention over the answer alone",
}


def check_placement(method: Method, anatomy: Anatomy) -> None:
    """Refuse a method that means nothing in a model.

    Raises:
        MethodError: None of the model's kinds of attention is one the method acts in, or it edits an image-free pass
            that cannot be followed; the message says why.
    """
    if method.is_identity or method.replaces_logits:
        return
    model = type(anatomy.model).__name__
    if method.text_only_stream == "edited" and anatomy.encoder is not None:
        raise MethodError(
            f"{method.name} cannot edit its image-free pass in {model}: an encoder reads the prompt, and the layers of "
            "the decoder cannot be followed one by one beside the answer. Leave reinforce_noimg off."
        )
    if anatomy.kinds.isdisjoint(method.attention_kinds):
        raise MethodError(
            f"{method.name} does not act in {model}: {_reason(anatomy)}. {method.name} is defined for "
            f"{' or '.join(_MEANING[kind] for kind in method.attention_kinds)}. Choose another method; "
            "vlmfix.methods() lists them."
        )


def layers_with(methods: Sequence[Method], anatomy: Anatomy) -> list[int]:
    """Return the layers with attention that one of the methods acts in."""
    kinds = {kind for method in methods for kind in method.attention_kinds}
    return sorted({site.layer_idx for site in anatomy.sites if site.kind in kinds})


def _reason(anatomy: Anatomy) -> str:
    if "image" in anatomy.kinds:
        return (
            "all keys of its cross-attention are image keys and its self-attention is over text alone, so that no row "
            "weighs the image against text"
        )
    if "encoder" in anatomy.kinds:
        return "an encoder reads its prompt, and every row of its decoder is one of the answer"
    return "its images are tokens of the prompt"
