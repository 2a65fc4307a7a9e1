"""Records the attention of the vision tower's class token, for methods that rank patches by it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmfix.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vlmfix.anatomy import Anatomy


class VisionRecorder:
    """Hooks on a CLIP-like vision tower that keep its class token's attention to the patches until a prompt asks.

    The tower runs before the forward that reads the prompt (``generate`` encodes images first) or inside it, in the
    same thread; what it saw last is kept per thread and taken by the next prompt.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        raise UnsupportedModelError(f"{type(anatomy.model).__name__} has no class token.")

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        raise NotImplementedError

    def patch_attention(self, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        """See ``Prompt.patch_attention``."""
        raise NotImplementedError


__all__ = ["VisionRecorder", "nn", "threading"]
