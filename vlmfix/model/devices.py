"""Where tensors belong in a model that lies on one device, or on several."""

from __future__ import annotations

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
    device = next(module.parameters()).device
    return input_device(model) if device.type == "meta" else device
