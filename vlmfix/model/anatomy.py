"""Finds what a model is made of: text attention modules, decoder layers, image-token ids. By structure, not by path."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmfix.errors import UnsupportedModelError
from vlmfix.model.refusals import check_supported

FORWARD_KWARG = "vlmfix"
"""The keyword argument that carries the ``Forward`` to the attention function; ``None`` asks for the stock model."""


SITE_ATTRIBUTE = "_vlmfix_site"
"""The attribute of a patched attention module that holds its ``AttentionSite``."""


AttentionKind = Literal["joint", "text", "image", "encoder", "answer"]
"""What a decoder's attention module looks at. ``"joint"``: prompt and answer, image tokens among the text. Where image
features are keys of cross-attention (Mllama, Idefics), that is ``"image"`` and self-attention is ``"text"``, prompt and
answer alone. Where an encoder reads the prompt (Florence-2, BLIP-2 with T5), cross-attention to its image and text
tokens is ``"encoder"``, and self-attention over the answer ``"answer"``."""


OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "o")
"""What attention modules call the projection of their head outputs."""


_IMAGE_ID_FIELDS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")


_MARKER = re.compile(r"(((low_res_)?image|vision|video)_(start|end)|boi|eoi)_token_(id|index)")


_NORM_BEHIND = re.compile(r"(o|out|output|attn_out|attn_sub|inner_attn|sub)_?(norm|ln|layer_?norm)")
"""What attention modules call a norm of their head outputs."""


_GATE_BEHIND = re.compile(r"(g|gate|o_gate|out_gate|output_gate|attn_gate)(_proj)?")
"""What attention modules call the projection of the gates their head outputs are multiplied by."""


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One text attention module.

    Attributes:
        index: Its number among the text attention modules of the model.
        name: Its path in the model.
        module: The module.
        config: The config it was built with, also while it is patched.
        layer_idx: Its decoder layer's index; for a cross-attention block between decoder layers, that of the layer
            behind it.
        decoder_layer: The decoder layer (or block) it belongs to.
        kind: What it looks at.
        is_sliding: Whether its layer sees a sliding window of keys.
        norm_behind: The name of a norm between its head outputs and their projection, if any. It undoes factors.
        gate_behind: The name of the projection that makes the gates by which its head outputs are multiplied, if any.
    """

    index: int
    name: str
    module: nn.Module
    config: Any
    layer_idx: int
    decoder_layer: nn.Module
    kind: AttentionKind
    is_sliding: bool
    norm_behind: str | None
    gate_behind: str | None

    @property
    def implementation(self) -> str:
        """The name of the attention function the unpatched module would call now."""
        return self.config._attn_implementation or "eager"

    @property
    def output_projection(self) -> nn.Module:
        """The projection of its head outputs."""
        children = (getattr(self.module, name, None) for name in OUTPUT_PROJECTIONS)
        return next(child for child in children if isinstance(child, nn.Module))

    @property
    def selects_keys(self) -> bool:
        """Whether a sparse indexer chooses the keys that each row sees."""
        return hasattr(self.module, "indexer")


@dataclass(frozen=True)
class Anatomy:
    """What vlmfix knows about a model.

    Attributes:
        model: The Hugging Face model, free of wrappers.
        language_model: The model that ``generate`` calls: ``model`` itself, but for BLIP-2 and its kin, whose
            ``generate`` hands embeddings to the language model inside.
        inner: What is inside the head of ``language_model``: takes ids or embeddings, and images where ``model`` does.
        text_config: The language model's config.
        sites: Its text attention modules, in forward order; of an encoder-decoder model, the decoder's.
        decoder_layers: All decoder layers, also those without softmax attention.
        image_token_ids: Ids that stand for image (or video) tokens in a prompt. Idefics names none.
        num_layers: Depth of the language model (of its decoder).
        hidden_size: Width of its residual stream.
        num_heads: Query heads of its attention layers.
        encoder: The encoder that reads the prompt, in an encoder-decoder model.
        projector: The module whose output rows replace the image tokens' embeddings, where ``generate`` does that
            before any patched forward.
    """

    model: PreTrainedModel
    language_model: PreTrainedModel
    inner: nn.Module
    text_config: Any
    sites: tuple[AttentionSite, ...]
    decoder_layers: tuple[nn.Module, ...]
    image_token_ids: tuple[int, ...]
    num_layers: int
    hidden_size: int
    num_heads: int
    encoder: nn.Module | None = None
    projector: nn.Module | None = None

    @property
    def kinds(self) -> frozenset[AttentionKind]:
        """The kinds of attention of its sites."""
        return frozenset(site.kind for site in self.sites)

    @property
    def reads_image_tokens(self) -> bool:
        """Whether its prompts hold the image's tokens, and all its text attention reads them there."""
        return self.kinds == {"joint"} and self.projector is None

    def is_image(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which ids stand for image tokens: bool, of the same shape."""
        return torch.isin(ids, torch.tensor(self.image_token_ids, device=ids.device))


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
    text_config = config.get_text_config(decoder=True)
    image_token_ids = tuple(dict.fromkeys(_image_token_ids(config)))
    language_model = _language_model(hf_model)
    encoder = language_model.get_encoder() if getattr(text_config, "is_encoder_decoder", False) else None
    sites = tuple(_attention_sites(hf_model, text_config, encoder))
    if not image_token_ids and not any(site.kind == "image" for site in sites):
        raise UnsupportedModelError(
            f"{kind} has no image token in its config, so vlmfix cannot find images in a prompt. It patches "
            "vision-language models whose prompts hold a token for every image feature; if this is one, set "
            "model.config.image_token_id = <id of that token>."
        )
    if not sites:
        raise UnsupportedModelError(
            f"No text attention found in {kind} that goes through transformers' attention interface (remote-code "
            "models and encoder-decoders of older versions do not). Use the architecture's implementation in "
            "transformers, if there is one, and the latest transformers: pip install -U transformers."
        )
    check_supported(hf_model, kind, sites)
    inner = getattr(language_model, language_model.base_model_prefix or "model", language_model)
    inner = inner if isinstance(inner, nn.Module) else language_model  # LLaVA of transformers 4: no prefix
    _check_keywords(language_model, inner)
    projector = _projector(hf_model, inner) if encoder is not None or language_model is not hf_model else None
    decoder_layers = _decoder_layers(hf_model, sites[0].decoder_layer)
    return Anatomy(
        model=hf_model,
        language_model=language_model,
        inner=inner,
        text_config=text_config,
        sites=sites,
        decoder_layers=decoder_layers,
        image_token_ids=image_token_ids,
        num_layers=text_config.num_hidden_layers if encoder is None else len(decoder_layers),
        hidden_size=text_config.hidden_size,
        num_heads=getattr(text_config, "decoder_attention_heads", text_config.num_attention_heads),
        encoder=encoder,
        projector=projector,
    )


def _check_keywords(*models: nn.Module) -> None:
    """Refuse models that do not hand keyword arguments down to their attention."""
    for model in models:
        parameters = inspect.signature(type(model).forward).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            raise UnsupportedModelError(
                f"{type(model).__name__} of this version of transformers does not pass keyword arguments on to its "
                "attention, which vlmfix needs. Install the latest: pip install -U transformers."
            )


def _image_token_ids(config: Any) -> Iterator[int]:
    for source in (config, getattr(config, "vision_config", None)):
        for name in _IMAGE_ID_FIELDS:
            value = getattr(source, name, None)
            if isinstance(value, int):
                yield value
    yield from getattr(config, "visual_indicator_token_ids", None) or ()  # Ovis2


def image_markers(config: Any) -> tuple[int, ...]:
    """Return the ids that mark where an image (or video) begins and ends, as far as a model's config names them."""
    values = (value for name, value in vars(config).items() if _MARKER.fullmatch(name))
    return tuple(dict.fromkeys(value for value in values if isinstance(value, int)))


def _language_model(model: PreTrainedModel) -> PreTrainedModel:
    inside = getattr(model, "language_model", None)
    if isinstance(inside, PreTrainedModel) and hasattr(model, "language_projection"):
        return inside  # BLIP-2, InstructBLIP
    return model


def _projector(model: PreTrainedModel, inner: nn.Module) -> nn.Module:
    for owner in (model, inner):
        for name in ("language_projection", "multi_modal_projector"):
            module = getattr(owner, name, None)
            if isinstance(module, nn.Module):
                return module
    raise UnsupportedModelError(
        f"{type(model).__name__} merges image features into its prompt before its forward, and vlmfix does not know "
        "the module they come from (expected 'language_projection' or 'multi_modal_projector')."
    )


def _attention_sites(model: PreTrainedModel, text_config: Any, encoder: nn.Module | None) -> Iterator[AttentionSite]:
    encoding = set() if encoder is None else {id(module) for module in encoder.modules()}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if id(module) not in encoding
        and _is_of(own_config(module), text_config)
        and getattr(module, "layer_idx", None) is not None
        and _is_attention(name, module)
        and any(isinstance(getattr(module, child, None), nn.Module) for child in OUTPUT_PROJECTIONS)
    ]
    # Cross-attention is told by the module's name. Where there is any, the rest looks at text, or at the answer.
    across = {name for name, _ in found if re.search("cross|enc", name.rpartition(".")[2], re.IGNORECASE)}
    for index, (name, module) in enumerate(found):
        kind: AttentionKind = "joint"
        if across:
            kinds: tuple[AttentionKind, AttentionKind] = ("text", "image") if encoder is None else ("answer", "encoder")
            kind = kinds[name in across]
        layer_idx = int(module.layer_idx)
        if kind == "image":  # Idefics counts its blocks of cross-attention by themselves
            layer_idx *= getattr(text_config, "cross_layer_interval", 1)
        decoder_layer, is_sliding = _decoder_layer(model, name), _is_sliding(text_config, layer_idx, kind)
        norm_behind = next((child for child, _ in module.named_children() if _NORM_BEHIND.fullmatch(child)), None)
        behind = (norm_behind, _gate_behind(module))
        yield AttentionSite(
            index, name, module, own_config(module), layer_idx, decoder_layer, kind, is_sliding, *behind
        )


def _is_attention(name: str, module: nn.Module) -> bool:
    """Whether a module mixes tokens by attention: by its class, its bases, or its name, since classes are exchanged."""
    is_named = any("Attention" in kind.__name__ for kind in type(module).__mro__)
    return is_named or name.rpartition(".")[2] in ("self_attn", "cross_attn")


def _gate_behind(module: nn.Module) -> str | None:
    """Return the name of the projection of the gates: one of its own, or the queries', if it is twice as wide."""
    own = next((child for child, _ in module.named_children() if _GATE_BEHIND.fullmatch(child)), None)
    queries = getattr(getattr(module, "q_proj", None), "out_features", None)
    heads = getattr(getattr(module, "o_proj", None), "in_features", None)
    size = getattr(module, "head_dim", None)
    if own is not None or queries is None or heads is None or size is None:
        return own
    return "q_proj" if queries == 2 * heads and heads % size == 0 and hasattr(module, "q_norm") else None


def _is_sliding(text_config: Any, layer_idx: int, kind: AttentionKind) -> bool:
    if kind in ("image", "encoder"):
        return False
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None and layer_idx < len(layer_types):
        return bool(layer_types[layer_idx] != "full_attention")
    return getattr(text_config, "sliding_window", None) is not None


def _is_of(config: Any, text_config: Any) -> bool:
    """Whether a module's config is the language model's; the stacks of an encoder-decoder may have copies of it."""
    is_copied = getattr(text_config, "is_encoder_decoder", False)
    return config is text_config or bool(is_copied and type(config) is type(text_config))


def own_config(module: nn.Module) -> Any:
    """Return the config the module was built with, also while it is patched."""
    site = getattr(module, SITE_ATTRIBUTE, None)
    return getattr(module, "config", None) if site is None else site.config


def _decoder_layer(model: PreTrainedModel, name: str) -> nn.Module:
    """Return the decoder layer around an attention module: the outermost entry of a list of modules on its path."""
    parts = name.split(".")
    stop = len(parts) - 1
    for length in range(1, stop):
        if isinstance(model.get_submodule(".".join(parts[:length])), nn.ModuleList):
            stop = length + 1
            break
    decoder_layer: nn.Module = model.get_submodule(".".join(parts[:stop]))
    return decoder_layer


def _decoder_layers(model: PreTrainedModel, decoder_layer: nn.Module) -> tuple[nn.Module, ...]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(layer is decoder_layer for layer in module):
            return tuple(module)
    return (decoder_layer,)
