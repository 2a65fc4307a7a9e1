"""Where tensors belong in a model that lies on one device, or on several."""

from __future__ import annotations

import itertools
from typing import Any

import torch


def input_device(model: Any) -> Any:
    """Where a model's inputs belong: for one spread over several devices, the first that computes.

    The first weights may lie on the disk, and those on the CPU may be computed with on a GPU.
    """
    placement = getattr(model, "hf_device_map", None)
    if not placement:
        return model.device
    computing = [device for device in placement.values() if str(device) not in ("cpu", "disk", "meta")]
    return torch.device(computing[0] if computing else "cpu")


def states_device(module: torch.nn.Module, model: Any) -> Any:
    """Where what goes into one of a model's modules belongs.

    That is where its weights are; if they are loaded as it is called, its hook moves what comes from any real device.
    """
    device = weights_device(module)
    return input_device(model) if device is None else device


def weights_device(module: torch.nn.Module) -> torch.device | None:
    """Where a module's weights are; ``None`` if they are loaded as it is called, or hidden in it (packed weights)."""
    weights = next(itertools.chain(module.parameters(), module.buffers()), None)
    return None if weights is None or weights.device.type == "meta" else weights.device
