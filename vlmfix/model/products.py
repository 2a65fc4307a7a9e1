"""Products with weight matrices in fp32 on a CPU: by oneDNN, where torch would take MKL.

PyTorch has both. MKL's product with two rows takes nearly twice as long as with one, although it reads a weight once;
oneDNN's takes about as long with two as MKL's with one. On AMD processors MKL also leaves the widest instructions
unused: products of whole prompts take twice as long as oneDNN's. Both round within fp32, each in its own way.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_LINEAR = F.linear


class ProductsByOneDnn(TorchFunctionMode):
    """Within it, ``F.linear`` of plain fp32 tensors on the CPU is oneDNN's, in this thread.

    Not where gradients are kept, nor under autocast, which takes other types, nor in code that is compiled within it.
    Weights are read where they lie: nothing is repacked or changed.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or oneDNN's in its place."""
        if func is not _LINEAR:  # whatever a layer does comes here, shapes included
            return func(*args, **kwargs) if kwargs else func(*args)
        if not kwargs and not torch.compiler.is_compiling() and all(map(_is_plain, args)):
            states, weight, bias = (*args, None)[:3]
            if states.numel() and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
                return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _is_plain(value: Any) -> bool:
    return value is None or (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.dtype is torch.float32
        and value.device.type == "cpu"
        and value.is_contiguous()
    )


def fast_products(model: Any) -> AbstractContextManager[Any]:
    """Return a context in which a model's products are oneDNN's.

    It does nothing for a model that has no fp32 weights on the CPU, in code that is being compiled, with another
    processor than an x86 (where this was measured), without oneDNN, or where ``torch.backends.mkldnn`` is switched off.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    suits = model.dtype is torch.float32 and model.device.type == "cpu"
    return ProductsByOneDnn() if suits and has_onednn() else nullcontext()


def has_onednn() -> bool:
    """Whether products can be oneDNN's on this machine."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
