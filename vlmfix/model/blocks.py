"""Finds, in every decoder layer, the two modules whose outputs are added to the residual stream. By structure.

``h' = h + a + m``: ``a`` leaves the token mixer (attention; in some layers of some models a convolution or linear
attention), ``m`` the MLP (or all experts of a mixture together). Where a norm follows one of them before the addition
(Gemma, GLM-4V), what is added is the output of that norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from vlmfix.errors import UnsupportedFeatureError, UnsupportedModelError

if TYPE_CHECKING:
    from vlmfix.model.anatomy import Anatomy


BlockKind = Literal["embedding", "attention", "mlp"]
"""Where what is added to the residual stream comes from: a decoder layer's token mixer or its MLP; or, in front of the
first layer, the embeddings, which are what the projector made of the image where image tokens are."""


_MIXERS = ("self_attn", "linear_attn", "conv")


_MLPS = ("mlp", "feed_forward", "fc2")


_BEFORE = ("input_layernorm", "operator_norm", "ffn_norm", "self_attn_layer_norm", "final_layer_norm", "fc1")
"""What stands before one of them, or inside the MLP (OPT's ``fc1``)."""


_BETWEEN = ("post_attention_layernorm", "pre_feedforward_layernorm", "pre_feedforward_layernorm_2")


_BEHIND = ("post_self_attn_layernorm", "post_mlp_layernorm", "post_feedforward_layernorm")


_EXPERTS = ("router", "experts", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
"""Gemma 4 sums its experts and its MLP before the last norm."""


_FURTHER = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
"""Gemma 4 adds a third term behind the MLP's."""


_PLAIN = ("act_fn", "activation_fn")


_KNOWN = frozenset((*_MIXERS, *_MLPS, *_BEFORE, *_BETWEEN, *_BEHIND, *_EXPERTS, *_FURTHER, *_PLAIN))


@dataclass(frozen=True, eq=False)
class ResidualBlocks:
    """What one decoder layer adds to the residual stream.

    Attributes:
        layer_idx: The layer's index.
        decoder_layer: The layer.
        mixer: Its token mixer, which takes the keyword arguments of the layer.
        attention: The module whose output is what the token mixer adds; a tensor, or a tuple that begins with it.
        mlp: The same of the MLP. OPT's and Llama 4's come flat, ``[batch * q_len, hidden_size]``.
        mlp_entrance: The module whose first argument is what enters the MLP.
    """

    layer_idx: int
    decoder_layer: nn.Module
    mixer: nn.Module
    attention: nn.Module
    mlp: nn.Module
    mlp_entrance: nn.Module

    def module(self, kind: BlockKind) -> nn.Module:
        """Return one of its two modules."""
        return self.attention if kind == "attention" else self.mlp


def find_blocks(anatomy: Anatomy) -> tuple[ResidualBlocks, ...]:
    """Find the blocks of all decoder layers.

    Args:
        anatomy: The model.

    Raises:
        UnsupportedModelError: A layer is built differently from those known; the message names what is in it.
    """
    return tuple(_blocks_of(anatomy, index, layer) for index, layer in enumerate(anatomy.decoder_layers))


def _blocks_of(anatomy: Anatomy, index: int, layer: nn.Module) -> ResidualBlocks:
    parts = {name: each for name, each in layer.named_children() if not isinstance(each, (nn.Dropout, nn.Identity))}
    mixers = [name for name in _MIXERS if name in parts]
    mlps = [name for name in _MLPS if name in parts]
    unknown = sorted(set(parts) - _KNOWN)
    factor = getattr(layer, "residual_multiplier", 1.0)
    if factor != 1.0:  # Granite
        raise UnsupportedModelError(
            f"{type(layer).__name__} of {type(anatomy.model).__name__} multiplies what its blocks add to the residual "
            f"stream by {factor:g}, which methods on block outputs do not know. Choose one that edits attention."
        )
    if len(mixers) != 1 or len(mlps) != 1 or unknown:
        found = f"and also {', '.join(unknown)}" if unknown else f"found {', '.join(parts)}"
        raise UnsupportedModelError(
            f"{type(layer).__name__} of {type(anatomy.model).__name__} does not simply add the outputs of one "
            f"attention and one MLP block to one residual stream (expected self_attn and mlp with their norms, {found})"
            ", so methods and probes on that stream cannot act there. Choose a method on attention: "
            "vlmfix.list_methods() lists them."
        )
    attention, mlp = parts[mixers[0]], parts[mlps[0]]
    mlp_entrance = parts.get("fc1", mlp)
    if getattr(layer, "norm_after", False) or getattr(anatomy.text_config, "swin_norm", False):
        # Molmo 2 and large Chameleon: the same norms, behind their blocks
        attention, mlp = parts["input_layernorm"], parts["post_attention_layernorm"]
    if "post_feedforward_layernorm" in parts:  # Gemma; without norms before the blocks: OLMo 2
        mlp = parts["post_feedforward_layernorm"]
        attention = parts.get("post_attention_layernorm", attention)
    attention = parts.get("post_self_attn_layernorm", attention)  # GLM-4
    mlp = parts.get("post_mlp_layernorm", mlp)
    return ResidualBlocks(index, layer, parts[mixers[0]], attention, mlp, mlp_entrance)


_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm")


def final_norm(anatomy: Anatomy) -> Callable[[], nn.Module]:
    """Find the norm between the last decoder layer and the language-model head; return what gets it as it is then.

    Raises:
        UnsupportedFeatureError: It was not found.
    """
    for module in anatomy.model.modules():
        for layers in module.children():
            if isinstance(layers, nn.ModuleList) and any(each is anatomy.decoder_layers[0] for each in layers):
                for name in _FINAL_NORMS:
                    if isinstance(getattr(module, name, None), nn.Module):
                        return functools.partial(getattr, module, name)
    raise UnsupportedFeatureError(
        f"The final norm of {type(anatomy.model).__name__} was not found. Read layers without it, as released: "
        "lens_norm=False of allpath's search, sla_final_norm=False of vista."
    )
