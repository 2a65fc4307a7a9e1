"""Records the attention of the vision tower's class token, for methods that rank patches by it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlmfix.errors import UnsupportedFeatureError, UnsupportedModelError
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.uncopied import Uncopied

POSITION_ARGUMENTS = {"position_embeddings", "freqs_ci", "rotary_pos_emb", "cu_seqlens"}
"""Arguments of an attention module that turns queries and keys by their positions, or packs images into one row."""


class VisionRecorder:
    """Hooks on a CLIP-like vision tower that keep its class token's attention to the patches until a prompt asks.

    The tower runs before the forward that reads the prompt (``generate`` encodes images first) or inside it, in the
    same thread; what it saw last is kept per thread and taken by the next prompt. The row is computed from the outputs
    of the projections, so it does not depend on the tower's attention kernel.
    """

    def __init__(self, anatomy: Anatomy, layers: Sequence[int]) -> None:
        attention = _class_token_attention(anatomy.model)
        if not attention:
            raise UnsupportedModelError(
                f"The vision tower of {type(anatomy.model).__name__} has no class token with attention of its own "
                "(CLIP has), which this method ranks image patches by. Choose a method without it, such as "
                "vlmfix.patch(model, 'pai')."
            )
        if POSITION_ARGUMENTS & set(inspect.signature(attention[0].forward).parameters):
            raise UnsupportedModelError(
                f"The vision tower of {type(anatomy.model).__name__} turns queries and keys by their positions behind "
                "the projections from which this method reads the class token's attention (CLIP adds positions "
                "before). Choose a method without it, such as vlmfix.patch(model, 'pai')."
            )
        deepest = max(layer if layer >= 0 else -layer - 1 for layer in layers)
        if deepest >= len(attention):
            raise UnsupportedModelError(
                f"The vision tower of {type(anatomy.model).__name__} has {len(attention)} layers; this method reads "
                f"layers {', '.join(map(str, layers))}. Choose another, such as vlmfix.patch(model, 'pai')."
            )
        self._modules = {layer: attention[layer] for layer in layers}
        self._projected: Uncopied[tuple[int, int, str], torch.Tensor] = Uncopied()
        self._seen: Uncopied[int, dict[int, torch.Tensor]] = Uncopied()

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        handles = []
        for layer, module in self._modules.items():
            for name in ("q_proj", "k_proj"):
                # A partial of a bound method follows ``copy.deepcopy(model)``.
                hook = functools.partial(self.after_projection, layer, name)
                handles.append(getattr(module, name).register_forward_hook(hook))
        return handles

    @torch.no_grad()
    def after_projection(self, layer: int, name: str, module: nn.Module, args: Any, states: torch.Tensor) -> None:
        """Take the queries or keys ``[images, 1 + patches, width]`` of a layer."""
        thread = threading.get_ident()
        self._projected[thread, layer, name] = states[:, :1] if name == "q_proj" else states
        query = self._projected.get((thread, layer, "q_proj"))
        key = self._projected.get((thread, layer, "k_proj"))
        if query is None or key is None:
            return
        num_heads = self._modules[layer].num_heads
        query, key = (each.view(*each.shape[:2], num_heads, -1).transpose(1, 2).float() for each in (query, key))
        row = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1)
        self._seen.setdefault(thread, {})[layer] = row[:, :, 0, 1:].sum(1)
        for each in ("q_proj", "k_proj"):
            del self._projected[thread, layer, each]

    def patch_attention(self) -> dict[int, torch.Tensor]:
        """Take what the tower saw last in this thread: per layer, fp32 ``[images, patches]``, summed over heads.

        Raises:
            UnsupportedFeatureError: The tower did not run since the last prompt with images.
        """
        seen = self._seen.pop(threading.get_ident(), {})
        if set(seen) != set(self._modules):
            raise UnsupportedFeatureError(
                "This method ranks image patches by the vision tower's attention, but the tower did not run for this "
                "prompt (were image features passed in?). Pass pixel_values."
            )
        return seen


def _class_token_attention(model: nn.Module) -> list[Any]:
    """Return the attention modules of the vision tower whose first token is a class token, in order."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "class_embedding", None), nn.Parameter):
            tower = model.get_submodule(name.rpartition(".")[0])
            found = [
                each
                for each in tower.modules()
                if all(isinstance(getattr(each, child, None), nn.Module) for child in ("q_proj", "k_proj"))
                and hasattr(each, "num_heads")
            ]
            if found:
                return found
    return []
