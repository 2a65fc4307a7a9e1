"""The vision tower: the blocks of its layers, and a record of its class token's attention to the patches."""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmfix.errors import UnsupportedFeatureError, UnsupportedModelError
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.uncopied import Uncopied

POSITION_ARGUMENTS = {"position_embeddings", "freqs_ci", "rotary_pos_emb", "cu_seqlens"}
"""Arguments of an attention module that turns queries and keys by their positions, or packs images into one row."""


_TOWER = re.compile("vis(ion|ual)|image|img")
"""What stands in the path of a vision tower's layers."""


_NO_TOWER = re.compile("audio|connector|deepstack|language_model|qformer|vqmodel")
"""What stands in the path of other lists of layers."""


_MIXERS = ("self_attn", "attn", "attention", "conv")
_MLPS = ("mlp", "feed_forward", "ffn")


@dataclass(frozen=True, eq=False)
class VisionLayer:
    """One layer of a vision tower.

    Attributes:
        layer: The layer. What leaves it is a tensor, or a tuple that begins with it.
        attention: The module whose output is what the token mixer adds to the residual stream, up to a factor.
        mlp: The same of the MLP.
    """

    layer: nn.Module
    attention: nn.Module
    mlp: nn.Module


def find_vision_layers(model: nn.Module) -> tuple[VisionLayer, ...]:
    """Find the layers of a model's vision tower, in order. By structure: each has one token mixer and one MLP.

    Raises:
        UnsupportedModelError: There is no such tower, or there are several.
    """
    found = {
        name: layers
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _TOWER.search(name) and not _NO_TOWER.search(name)
        if all(layers := [_vision_layer(each) for each in module]) and layers
    }
    if len(found) != 1:
        reason = f"has several, {', '.join(found)}," if found else "has none"
        raise UnsupportedModelError(
            f"{type(model).__name__} {reason} of the vision towers that vlmfix knows (layers with one attention and "
            "one MLP each), so no method can act in it."
        )
    return tuple(each for layers in found.values() for each in layers if each is not None)


def _vision_layer(module: nn.Module) -> VisionLayer | None:
    parts = dict(module.named_children())
    mixers, mlps = ([name for name in names if name in parts] for names in (_MIXERS, _MLPS))
    if len(mixers) != 1 or len(mlps) != 1:
        return None
    attention, mlp = parts[mixers[0]], parts[mlps[0]]
    if "post_feedforward_layernorm" in parts:  # Gemma: norms stand before the additions too
        attention, mlp = parts["post_attention_layernorm"], parts["post_feedforward_layernorm"]
    return VisionLayer(module, attention, mlp)


class VisionRecorder:
    """Hooks on a CLIP-like vision tower that keep its class token's attention to the patches until a prompt asks.

    The tower runs before the forward that reads the prompt (``generate`` encodes images first) or inside it, in the
    same thread; what it saw last is kept per thread and taken by the next prompt. The row is computed from what enters
    a layer's attention, so it does not depend on the tower's attention kernel.
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
        self._seen: Uncopied[int, dict[int, torch.Tensor]] = Uncopied()

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        # Partials of a bound method follow ``copy.deepcopy(model)``.
        return [
            module.register_forward_pre_hook(functools.partial(self.before_attention, layer), with_kwargs=True)
            for layer, module in self._modules.items()
        ]

    @torch.no_grad()
    def before_attention(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """See what enters a layer's attention, ``[images, 1 + patches, width]``.

        Its projections are called as they are now: adapters and quantised weights come in their place.
        """
        states = args[0] if args else kwargs["hidden_states"]
        projected = (module.q_proj(states[:, :1]), module.k_proj(states))
        query, key = (each.view(*each.shape[:2], module.num_heads, -1).transpose(1, 2).float() for each in projected)
        row = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1)
        self._seen.setdefault(threading.get_ident(), {})[layer] = row[:, :, 0, 1:].sum(1)

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
