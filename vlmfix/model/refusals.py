"""What cannot be patched although its attention can be found, each with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from vlmfix.errors import MethodError, UnsupportedFeatureError, UnsupportedModelError, VlmfixError

MASKED_KERNELS = ("eager", "sdpa")
"""The attention functions to which sparse indexers hand the keys they select in the mask."""


_ANOTHER = "Load a model that is one: transformers.AutoModelForImageTextToText.from_pretrained(...)."


class Site(Protocol):
    """What is asked of a text attention module (``vlmfix.model.anatomy.AttentionSite``)."""

    @property
    def name(self) -> str:
        """Its path in the model."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    @property
    def kind(self) -> str:
        """What it looks at."""

    @property
    def implementation(self) -> str:
        """The name of the stock attention function."""

    @property
    def selects_keys(self) -> bool:
        """Whether a sparse indexer chooses its keys."""


def check_supported(model: PreTrainedModel, kind: str, sites: Sequence[Site]) -> None:
    """Refuse a model whose attention, or whose way to an answer, is none that methods are defined for.

    Args:
        model: The model.
        kind: What to call it.
        sites: Its text attention modules.

    Raises:
        UnsupportedModelError: It merges encoder and answer in one softmax, does not generate token by token, selects
            keys out of sight of the mask, reads in both directions, or is split by tensor parallelism.
    """
    if getattr(model.config, "is_encoder_decoder", False) and all(site.kind == "joint" for site in sites):
        raise UnsupportedModelError(
            f"{kind} attends to the prompt that its encoder has read and to the answer in one softmax, so its keys are "
            f"not in the order of a prompt; vlmfix does not know where the image is among them. {_ANOTHER}"
        )
    if model.can_generate() and not isinstance(model, GenerationMixin):
        raise UnsupportedModelError(
            f"{kind} does not generate its answer token by token. vlmfix patches autoregressive models: a prompt "
            f"is read once, and each step adds a token. {_ANOTHER}"
        )
    if not model.can_generate() and any(is_two_way(site) for site in sites):
        raise UnsupportedModelError(
            f"{kind} reads a text in both directions and generates none (encoders, masked language models, retrieval). "
            f"vlmfix patches autoregressive models: a prompt is read once, and each step adds a token. {_ANOTHER}"
        )
    for site in sites:
        if site.selects_keys:
            check_selection(site, UnsupportedModelError)
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            f"{kind} is split by tensor parallelism, so that no device sees all heads of a layer, which most methods "
            "need. Load it with device_map='auto' instead of tp_plan."
        )
    # The model without its head: the image-free pass runs it, and users may call it.


def is_two_way(site: Site) -> bool:
    """Whether a module lets every token of a prompt see those behind it (PaliGemma's do, and it generates)."""
    return site.kind == "joint" and getattr(site.module, "is_causal", True) is False


def check_selection(site: Site, kind: type[VlmfixError] = UnsupportedFeatureError) -> None:
    """Refuse a module whose sparse indexer hands the keys it selects to the kernel beside the mask; raises ``kind``."""
    if site.implementation not in MASKED_KERNELS:
        raise kind(
            f"{site.name} selects keys with a sparse indexer, and hands them to the attention function "
            f"{site.implementation!r} outside the mask, where vlmfix cannot see them. Choose another one: "
            "model.set_attn_implementation('sdpa')."
        )


def check_next_token(method: str, model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not those of a next token.

    Raises:
        MethodError: It has another head (classes, rewards), or none.
    """
    if not model.can_generate() and model.get_output_embeddings() is None:
        raise MethodError(
            f"{method} decides on the next token, and {type(model).__name__} predicts none: it has no "
            "language-model head. Load the model with AutoModelForImageTextToText."
        )
