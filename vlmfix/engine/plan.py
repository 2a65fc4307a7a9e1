"""The places in a model where a patch acts, with the methods that act there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.model.anatomy import Anatomy, AttentionKind, AttentionSite, own_config


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A patched attention module.

    Attributes:
        index: Its number among the model's text attention modules.
        name: Its path in the model.
        layer_idx: Its decoder layer's index.
        kind: What it looks at.
        module: The module.
        decoder_layer: The decoder layer it belongs to.
        base_config: The module's own config object, which the patch set aside.
        is_sliding: Whether its layer sees a sliding window of keys.
        readers: (method index, method) that read the layer's input.
        masks: Those that open the mask here.
        scores: Those that edit attention scores here.
        weights: Those that edit (or observe) attention weights here.
        heads: Those that edit head outputs here.
        written_heads: The query heads whose scores or weights any of them edits or observes; ``None`` for all.
    """

    index: int
    name: str
    layer_idx: int
    kind: AttentionKind
    module: nn.Module
    decoder_layer: nn.Module
    base_config: Any
    is_sliding: bool
    readers: tuple[tuple[int, Method], ...]
    masks: tuple[tuple[int, Method], ...]
    scores: tuple[tuple[int, Method], ...]
    weights: tuple[tuple[int, Method], ...]
    heads: tuple[tuple[int, Method], ...]
    written_heads: tuple[int, ...] | None


def make_sites(anatomy: Anatomy, methods: Sequence[Method]) -> tuple[Site, ...]:
    """Place bound methods in a model.

    Args:
        anatomy: The model.
        methods: Methods with their layers resolved, in the order of the path of attention.

    Returns:
        The sites in a layer of at least one method (methods that are switched off have sites, and act nowhere); every
        site, when a method edits the image-free stream, which has to pass all layers.

    Raises:
        UnsupportedFeatureError: That stream would have to pass layers without softmax attention.
    """
    follows = edits_text_only_stream(methods)
    sites = tuple(_make_sites(anatomy, methods, everywhere=follows))
    with_attention = {id(site.decoder_layer) for site in sites}
    if follows and any(id(layer) not in with_attention for layer in anatomy.decoder_layers):
        raise UnsupportedFeatureError(
            f"{type(anatomy.model).__name__} has decoder layers without softmax attention, through which an edited "
            "image-free stream cannot be followed. Leave reinforce_noimg off: vlmfix.patch(model, 'vhr')."
        )
    return sites


def acts_in_attention(method: Method) -> bool:
    """Whether a method needs attention modules patched; those that edit only the outputs of blocks do not."""
    in_attention = (method.opens_mask, method.edits_scores, method.edits_weights, method.edits_heads)
    return any(in_attention) or method.reads_layer_input or not method.edits_blocks


def edits_text_only_stream(methods: Sequence[Method]) -> bool:
    """Whether a method's edits also go into the image-free stream, which then advances layer by layer."""
    return any(method.text_only_stream == "edited" and not method.is_identity for method in methods)


def _make_sites(anatomy: Anatomy, methods: Sequence[Method], *, everywhere: bool) -> Iterator[Site]:
    for index, found in enumerate(anatomy.sites):
        here = [
            (n, method)
            for n, method in enumerate(methods)
            if found.layer_idx in method.layer_indices
            and (method.is_identity or (acts_in_attention(method) and found.kind in method.attention_kinds))
        ]
        if not here and not everywhere:
            continue
        active = [(number, method) for number, method in here if not method.is_identity]
        yield Site(
            index=index,
            name=found.name,
            layer_idx=found.layer_idx,
            kind=found.kind,
            module=found.module,
            decoder_layer=found.decoder_layer,
            base_config=own_config(found.module),
            is_sliding=_is_sliding(anatomy.text_config, found),
            readers=tuple((number, method) for number, method in active if method.reads_layer_input),
            masks=tuple((number, method) for number, method in active if method.opens_mask),
            scores=tuple((number, method) for number, method in active if method.edits_scores),
            weights=tuple((number, method) for number, method in active if method.edits_weights),
            heads=tuple((number, method) for number, method in active if method.edits_heads),
            written_heads=_written_heads([method for _, method in active], found.layer_idx),
        )


def _written_heads(methods: Sequence[Method], layer_idx: int) -> tuple[int, ...] | None:
    """Which heads the methods of a layer need together; whether each acts in a forward makes no difference."""
    heads: set[int] = set()
    for method in methods:
        if method.edits_scores or method.edits_weights:
            mine = method.heads_in(layer_idx)
            if mine is None:
                return None
            heads.update(mine)
    return tuple(sorted(heads)) or None


def _is_sliding(text_config: Any, site: AttentionSite) -> bool:
    if site.kind in ("image", "encoder"):
        return False
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None and site.layer_idx < len(layer_types):
        return bool(layer_types[site.layer_idx] != "full_attention")
    return getattr(text_config, "sliding_window", None) is not None
