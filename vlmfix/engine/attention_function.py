"""The attention function that is registered with transformers, under a name that only patched modules ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from vlmfix.engine.forwards import MISSING, reached_from_outside
from vlmfix.engine.plan import PatchedSite
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import SITE_ATTRIBUTE
from vlmfix.model.attention import AttentionCall
from vlmfix.model.refusals import check_selection

ATTENTION_NAME = "vlmfix"
"""The name in ``AttentionInterface``. A plain word: transformers gives names with 'sdpa', 'flash' or '/' a meaning."""


class NameOfBoth(str):
    """The name for a module that asks it what mask its kernel takes.

    A sparse indexer folds the keys it selects into the mask of kernels called ``"eager"`` and ``"sdpa"``. It hands them
    to other kernels beside the mask. So this name leads to vlmfix's attention function, and equals the stock kernel's
    name as well.

    Attributes:
        config: The config that names the stock kernel, also if that is changed while the model is patched.
    """

    config: Any

    def __new__(cls, config: Any) -> NameOfBoth:
        """Name the attention function of a module with this config."""
        name = super().__new__(cls, ATTENTION_NAME)
        name.config = config
        return name

    def __getnewargs__(self) -> tuple[Any]:  # type: ignore[override]
        """Let a deep copy hold its own copy of the config."""
        return (self.config,)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == (self.config._attn_implementation or "eager")

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def vlmfix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    vlmfix: Any = MISSING,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let what travels with the forward compute a module's attention; the signature is that of transformers.

    Args:
        module: The attention module.
        query: ``[batch, num_heads, q_len, head_dim]``.
        key: ``[batch, num_kv_heads, keys, head_dim]``.
        value: ``[batch, num_kv_heads, keys, value_dim]``.
        attention_mask: What the stock model made for its own kernel.
        vlmfix: What travels with the forward (``vlmfix.engine.forwards``); ``None`` asks for the stock model.
        **kwargs: What the module hands to its kernel beside it.

    Returns:
        Head outputs ``[batch, q_len, num_heads, value_dim]`` and the weights where the base kernel returns them.

    Raises:
        UnsupportedFeatureError: The call did not come through the patched model's forward, uses a paged cache, or
            selects keys out of sight of the mask.
    """
    site: PatchedSite = getattr(module, SITE_ATTRIBUTE)
    call = AttentionCall(site, module, query, key, value, attention_mask, kwargs)
    if vlmfix is None:
        return call.base()
    if vlmfix is MISSING:
        raise reached_from_outside(f"The attention module {site.name}")
    if site.selects_keys:
        check_selection(site)
    if kwargs.get("cache") is not None:
        raise UnsupportedFeatureError(
            "Continuous batching (a paged cache) packs several prompts into one row, which vlmfix does not support. "
            "Use model.generate(...) with a padded batch, or vlmfix.unpatch(model) first."
        )
    output: tuple[torch.Tensor, torch.Tensor | None] = vlmfix.attend(site, call)
    return output


AttentionInterface.register(ATTENTION_NAME, vlmfix_attention)
