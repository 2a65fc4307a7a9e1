"""Where a model lies that accelerate may have spread over devices."""

from __future__ import annotations

from typing import Any

import torch


def placement(model: Any) -> str:
    """Where a model lies, for a reader: the name of its device, or of all that hold a part of it."""
    devices = dict.fromkeys((getattr(model, "hf_device_map", None) or {"": model.device}).values())
    found = [torch.device("cpu" if each == "disk" else each) for each in devices]
    names = [torch.cuda.get_device_name(each) if each.type == "cuda" else str(each) for each in found]
    names = ["disk" if each == "disk" else name for each, name in zip(devices, names, strict=True)]
    return ", ".join(dict.fromkeys(names))
