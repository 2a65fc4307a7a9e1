"""Every model type that transformers maps to images and text, and what is known of each.

The list is transformers' own. A type is *measured* if a tiny family has its config and class. It is *refused* if
``vlmfix.patch`` says so: then the reason is what it says to a model of the type that has no weights. It is *unbuilt*
if neither is known, and ``UNBUILT`` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

import vlmfix
from families import FAMILIES

LAYERS = 4
"""How deep the models without weights are."""

_DEPTHS = ("num_hidden_layers", "num_layers", "layers", "depth", "encoder_layers", "decoder_layers")


@dataclass(frozen=True)
class TypeRow:
    """What is known of a model type.

    Attributes:
        model_type: Its name in transformers.
        architecture: The class it is mapped to.
        standing: Whether it is measured, refused or neither.
        says: The titles of the families, or the reason.
    """

    model_type: str
    architecture: str
    standing: Literal["measured", "refused", "unbuilt", "unknown"]
    says: str


def mapped() -> dict[str, str]:
    """The class of every image-text-to-text model type of this version of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    return {kind: name if isinstance(name, str) else name[0] for kind, name in NAMES.items()}


@cache
def measured() -> dict[tuple[str, str], tuple[str, ...]]:
    """The titles of the families of every model type and class."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for family in FAMILIES:
        if family.unavailable() is None:
            key = (family.config().model_type, family.architecture)
            found[key] = (*found.get(key, ()), family.title)
    return found


def row(model_type: str) -> TypeRow:
    """What is known of one of the ``mapped`` types."""
    architecture = mapped()[model_type]
    titles = measured().get((model_type, architecture))
    if titles is not None:
        return TypeRow(model_type, architecture, "measured", ", ".join(titles))
    if model_type in REFUSED:
        return TypeRow(model_type, architecture, "refused", refusal(model_type))
    if model_type in UNBUILT:
        return TypeRow(model_type, architecture, "unbuilt", UNBUILT[model_type])
    return TypeRow(
        model_type, architecture, "unknown", "give it a tiny family, or a line in tests/families/model_types.py"
    )


def rows() -> tuple[TypeRow, ...]:
    """A row for every mapped type, in the order of their names."""
    return tuple(row(model_type) for model_type in sorted(mapped()))


def refusal(model_type: str) -> str:
    """What ``vlmfix.patch`` says to a model of a type in ``REFUSED``.

    Raises:
        AssertionError: It is not refused.
    """
    import transformers

    config = REFUSED[model_type]()
    with torch.device("meta"):
        model = getattr(transformers, mapped()[model_type])(config)
    try:
        vlmfix.patch(model, "none")
    except vlmfix.UnsupportedModelError as error:
        return str(error)
    raise AssertionError(f"{model_type} is patched; it needs a tiny family")


def shallow(model_type: str, **changes: Any) -> Callable[[], Any]:
    """Make the type's default config with few layers."""

    def config() -> Any:
        from transformers import AutoConfig

        made = AutoConfig.for_model(model_type, **changes)
        _cut(made)
        return made

    return config


def _cut(config: Any) -> None:
    for name in _DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, LAYERS)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, list(getattr(config, name))[:LAYERS])
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _cut(getattr(config, name))


def _captioner() -> Any:
    from transformers import GPT2Config, VisionEncoderDecoderConfig, ViTConfig

    return VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(num_hidden_layers=LAYERS), GPT2Config())


REFUSED: dict[str, Callable[[], Any]] = {
    **{
        name: shallow(name)
        for name in (
            *("blip", "git", "kosmos-2", "kosmos-2.5", "evolla", "mistral4", "pi0", "pix2struct", "pp_formulanet"),
            "udop",
        )
    },
    "vision-encoder-decoder": _captioner,
    "t5gemma2": shallow("t5gemma2"),
    "diffusion_gemma": shallow(
        "diffusion_gemma", text_config={"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    ),
}
"""How to configure a model of each type that is refused."""

_LATER = "no tiny model of it has been made yet: nothing is known of it"
UNBUILT: dict[str, str] = {}
"""Why neither is known, per type."""
