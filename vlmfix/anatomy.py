"""Finds what a model is made of: text attention modules, decoder layers, image-token ids. By structure, not by path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vlmfix.attention import SITE_ATTRIBUTE
from vlmfix.errors import UnsupportedModelError

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "o")
_IMAGE_ID_FIELDS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")

_REFUSED = {
    "blip-2": "its generate() bypasses the model's forward",
    "instructblip": "its generate() bypasses the model's forward",
    "instructblipvideo": "its generate() bypasses the model's forward",
    "idefics": "its image tokens are keys of cross-attention layers, not tokens of the prompt",
    "mllama": "its image tokens are keys of cross-attention layers, not tokens of the prompt",
    "florence2": "it is an encoder-decoder model",
}
"""Families whose structure alone does not tell that they cannot be patched (yet), and why."""


@dataclass(frozen=True)
class AttentionSite:
    """One text attention module.

    Attributes:
        name: Its path in the model.
        module: The module.
        layer_idx: Its decoder layer's index.
        decoder_layer: The decoder layer it belongs to.
    """

    name: str
    module: nn.Module
    layer_idx: int
    decoder_layer: nn.Module


@dataclass(frozen=True)
class Anatomy:
    """What vlmfix knows about a model.

    Attributes:
        model: The Hugging Face model, free of wrappers.
        inner: The model inside its language-model head, which takes ``input_ids`` and images.
        text_config: The language model's config.
        sites: Its text attention modules, in forward order.
        decoder_layers: All decoder layers, also those without softmax attention.
        image_token_ids: Ids that stand for image (or video) tokens in a prompt.
        num_layers: Depth of the language model.
        hidden_size: Width of its residual stream.
        num_heads: Query heads of its attention layers.
    """

    model: PreTrainedModel
    inner: nn.Module
    text_config: Any
    sites: tuple[AttentionSite, ...]
    decoder_layers: tuple[nn.Module, ...]
    image_token_ids: tuple[int, ...]
    num_layers: int
    hidden_size: int
    num_heads: int


def unwrap(model: object) -> PreTrainedModel:
    """Return the Hugging Face model inside a pipeline, PEFT, compiled or data-parallel wrapper.

    Raises:
        UnsupportedModelError: There is none.
    """
    current: Any = model
    while not isinstance(current, PreTrainedModel):
        if hasattr(current, "get_base_model"):  # PEFT
            current = current.get_base_model()
        elif hasattr(current, "_orig_mod"):  # torch.compile
            current = current._orig_mod
        elif isinstance(current, nn.Module) and isinstance(getattr(current, "module", None), nn.Module):  # DDP
            current = current.module
        elif not isinstance(current, nn.Module) and isinstance(getattr(current, "model", None), nn.Module):  # pipeline
            current = current.model
        else:
            raise UnsupportedModelError(
                f"Expected a Hugging Face vision-language model or a pipeline around one, got {type(model).__name__}. "
                "Load one with transformers.AutoModelForImageTextToText.from_pretrained(...)."
            )
    return current


def analyse(model: object) -> Anatomy:
    """Describe a model, without changing it.

    Args:
        model: A Hugging Face vision-language model, or a wrapper around one.

    Raises:
        UnsupportedModelError: No text attention that transformers dispatches, no image token, or a known refusal.
    """
    hf_model = unwrap(model)
    config = hf_model.config
    kind = f"{type(hf_model).__name__} (model_type {config.model_type!r})"
    reason = _REFUSED.get(config.model_type)
    if reason is None and getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    if reason is not None:
        raise UnsupportedModelError(
            f"vlmfix does not support {kind} yet: {reason}. Supported: decoder-only models "
            "whose prompt holds one token per image feature (LLaVA, Qwen-VL, InternVL, ...)."
        )
    text_config = config.get_text_config(decoder=True)
    image_token_ids = tuple(dict.fromkeys(_image_token_ids(config)))
    if not image_token_ids:
        raise UnsupportedModelError(
            f"{kind} has no image token in its config, so vlmfix cannot find images in a prompt. It patches "
            "vision-language models; if this is one, set model.config.image_token_id = <id of the image token>."
        )
    sites = tuple(_attention_sites(hf_model, text_config))
    if not sites:
        raise UnsupportedModelError(
            f"No text attention found in {kind} that goes through transformers' attention interface (remote-code "
            "models usually do not). Use the architecture's implementation in transformers, if there is one."
        )
    if any(hasattr(site.module, "indexer") for site in sites):
        raise UnsupportedModelError(
            f"{kind} selects keys with a sparse indexer that depends on the attention implementation's name; "
            "patching would silently drop that selection."
        )
    inner = getattr(hf_model, hf_model.base_model_prefix or "model", hf_model)  # LLaVA of transformers 4: no prefix
    return Anatomy(
        model=hf_model,
        inner=inner if isinstance(inner, nn.Module) else hf_model,
        text_config=text_config,
        sites=sites,
        decoder_layers=_decoder_layers(hf_model, sites[0].decoder_layer),
        image_token_ids=image_token_ids,
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        num_heads=text_config.num_attention_heads,
    )


def _image_token_ids(config: Any) -> Iterator[int]:
    for source in (config, getattr(config, "vision_config", None)):
        for name in _IMAGE_ID_FIELDS:
            value = getattr(source, name, None)
            if isinstance(value, int):
                yield value
    yield from getattr(config, "visual_indicator_token_ids", None) or ()  # Ovis2


def _attention_sites(model: PreTrainedModel, text_config: Any) -> Iterator[AttentionSite]:
    for name, module in model.named_modules():
        if (
            own_config(module) is text_config
            and hasattr(module, "layer_idx")
            and "Attention" in type(module).__name__
            and any(isinstance(getattr(module, child, None), nn.Module) for child in _OUTPUT_PROJECTIONS)
        ):
            decoder_layer = model.get_submodule(name.rpartition(".")[0])
            yield AttentionSite(name, module, int(module.layer_idx), decoder_layer)


def own_config(module: nn.Module) -> Any:
    """Return the config the module was built with, also while it is patched."""
    config = getattr(module, "config", None)
    site = getattr(config, SITE_ATTRIBUTE, None)
    return config if site is None else site.base_config


def _decoder_layers(model: PreTrainedModel, decoder_layer: nn.Module) -> tuple[nn.Module, ...]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(layer is decoder_layer for layer in module):
            return tuple(module)
    return (decoder_layer,)
