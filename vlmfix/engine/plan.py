"""The places in a model where a patch acts, with the methods that act there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from vlmfix.methods.base import Method
from vlmfix.model.anatomy import Anatomy, AttentionSite

Numbered = tuple[tuple[int, Method], ...]
"""Methods with their numbers in the patch, in the order of the path of attention."""


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedSite(AttentionSite):
    """A patched attention module.

    Attributes:
        readers: Methods that read the layer's input.
        masks: Those that open the mask here.
        scores: Those that edit attention scores here.
        weights: Those that edit (or observe) attention weights here.
        heads: Those that edit head outputs here.
        written_heads: The query heads whose scores or weights any of them edits or observes; ``None`` for all.
    """

    readers: Numbered
    masks: Numbered
    scores: Numbered
    weights: Numbered
    heads: Numbered
    written_heads: tuple[int, ...] | None


def make_sites(anatomy: Anatomy, methods: Sequence[Method], others: Sequence[Method] = ()) -> Iterator[PatchedSite]:
    """Place bound methods in a model: the attention modules they touch, in forward order.

    Args:
        anatomy: The model.
        methods: Methods with their layers resolved, in the order of the path of attention.
        others: Methods that act in another branch, whose modules are patched too.
    """
    for site in anatomy.sites:
        here = [(number, method) for number, method in enumerate(methods) if _is_at(method, site)]
        if not here and not any(_is_at(method, site) for method in others):
            continue
        # A method that is switched off still marks its layers as patched, and does nothing there.
        active = [(number, method) for number, method in here if not method.is_identity]
        yield PatchedSite(
            **{field.name: getattr(site, field.name) for field in dataclasses.fields(site)},
            readers=_those_that("reads_layer_input", active),
            masks=_those_that("opens_mask", active),
            scores=_those_that("edits_scores", active),
            weights=_those_that("edits_weights", active),
            heads=_those_that("edits_heads", active),
            written_heads=_written_heads([method for _, method in active], site.layer_idx),
        )


def _is_at(method: Method, site: AttentionSite) -> bool:
    """Whether a method has a place in an attention module."""
    acts = method.is_identity or (acts_in_attention(method) and site.kind in method.attention_kinds)
    return site.layer_idx in method.layer_indices and acts


def _those_that(act: str, active: Sequence[tuple[int, Method]]) -> Numbered:
    return tuple((number, method) for number, method in active if getattr(method, act))


def acts_in_attention(method: Method) -> bool:
    """Whether a method needs attention modules patched; those that edit only the outputs of blocks do not."""
    in_attention = (method.opens_mask, method.edits_scores, method.edits_weights, method.edits_heads)
    return any(in_attention) or method.reads_layer_input or not method.edits_blocks


def _written_heads(methods: Sequence[Method], layer_idx: int) -> tuple[int, ...] | None:
    """Return which heads the methods of a layer need together, whether or not each of them acts in a forward."""
    heads: set[int] = set()
    for method in methods:
        if method.edits_scores or method.edits_weights:
            mine = method.heads_in(layer_idx)
            if mine is None:
                return None
            heads.update(mine)
    return tuple(sorted(heads)) or None
