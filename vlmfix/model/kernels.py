"""The attention function that the unpatched module would call now: the model's own kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import AttentionSite


class _WithConfig:
    """An attention module as its stock kernel expects it: the same module, with the original config.

    Flash kernels read ``module.config._attn_implementation`` to choose their library.
    """

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def base_kernel(site: AttentionSite, module: nn.Module) -> tuple[Callable[..., Any], Any]:
    """Return the attention function the unpatched module would call now, and the module to hand to it."""
    implementation = site.implementation
    if implementation == "eager":
        return _eager_kernel(type(module)), module
    kernel = AttentionInterface()[implementation]
    return kernel, _WithConfig(module, site.config) if is_flash(implementation) else module


def is_flash(implementation: str) -> bool:
    """Whether a kernel takes flash attention's masks; one from the hub is called by its repository."""
    if implementation in ("eager", "sdpa"):
        return False
    return "flash" in implementation or AttentionMaskInterface().get(implementation) is flash_attention_mask


def _eager_kernel(attention: type) -> Callable[..., Any]:
    """Return the eager function beside an attention class, or beside the class that it extends."""
    for parent in attention.__mro__:
        kernel: Callable[..., Any] | None = getattr(sys.modules[parent.__module__], "eager_attention_forward", None)
        if kernel is not None:
            return kernel
    raise UnsupportedFeatureError(
        f"No eager_attention_forward was found beside {attention.__name__} or the classes it extends. Choose another "
        "attention function: model.set_attn_implementation('sdpa')."
    )
