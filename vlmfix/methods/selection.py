"""Which layers and heads a method edits: how they are written, checked against a model and scaled to its depth."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vlmfix.errors import MethodError

if TYPE_CHECKING:
    import torch

    from vlmfix.methods.base import Method
    from vlmfix.methods.views import Layer
    from vlmfix.model.anatomy import Anatomy


LayerSpec = Sequence[int] | str | None
"""Which decoder layers: ``None`` (the method's default), indices (negative ones count from the end), or a string such
as ``"1,18:32"`` or ``"0.25:0.75"`` (slices of indices or of fractions of the depth)."""


HeadSpec = Sequence[Sequence[int]] | None
"""Attention heads as (layer, head) pairs, counted from 0; heads are query heads."""


M = TypeVar("M", bound="Method")


def bind_heads(method: M, bound: M, heads: HeadSpec, anatomy: Anatomy) -> M:
    """Check a list of heads against a model and edit only layers that have some of them.

    Args:
        method: The method as the user wrote it.
        bound: Its copy with layers resolved.
        heads: Its (layer, head) pairs, or ``None`` for all heads.
        anatomy: The model.

    Raises:
        MethodError: A head outside the model or its attention, or none in the chosen layers.
    """
    if heads is None:
        return bound
    for layer, head in heads:
        if layer >= anatomy.num_layers or head >= anatomy.num_heads:
            raise MethodError(
                f"{method.name}: head ({layer}, {head}) does not exist in this model of {anatomy.num_layers} layers "
                f"with {anatomy.num_heads} heads. The list belongs to another model."
            )
    with_heads = {layer for layer, _ in heads}
    reachable = {site.layer_idx for site in anatomy.sites if site.kind in method.attention_kinds}
    if not with_heads <= reachable:
        raise MethodError(
            f"{method.name}: the attention it acts in is in layers {sorted(reachable)} of this model; heads are listed "
            f"in layers {sorted(with_heads - reachable)} too. The list belongs to another model."
        )
    if method.layers is not None:
        with_heads &= set(bound.layer_indices)
    if heads and not with_heads:
        raise MethodError(f"{method.name}: layers={method.layers!r} holds none of the listed heads.")
    return dataclasses.replace(bound, layers=tuple(sorted(with_heads)) or bound.layers)


def listed_heads(heads: HeadSpec, layer: Layer, like: torch.Tensor) -> torch.Tensor:
    """Return which heads in hand are in a list (``None``: all): bool ``[num_heads]`` on the device of ``like``.

    Args:
        heads: (layer, head) pairs.
        layer: The layer.
        like: A tensor ``[batch, num_heads, ...]``.
    """
    import torch

    in_hand = range(like.shape[1]) if layer.heads is None else layer.heads
    here = in_hand if heads is None else heads_of(heads, layer.site.layer_idx)
    return torch.tensor([head in here for head in in_hand], device=like.device)


def heads_of(heads: Sequence[Sequence[int]], layer_idx: int) -> tuple[int, ...]:
    """Return the heads of one layer in a list of (layer, head) pairs, in order."""
    return tuple(sorted({head for at, head in heads if at == layer_idx}))


def layers_by_depth(first: int, last: int, depth: int, num_layers: int) -> tuple[int, ...]:
    """Scale the layers ``first..last`` (inclusive) of a model of ``depth`` layers to one of ``num_layers``."""
    low, high = round(first / depth * num_layers), round(last / depth * num_layers)
    return tuple(range(min(low, num_layers - 1), min(max(high, low), num_layers - 1) + 1))


def resolve_layers(spec: Sequence[int] | str, num_layers: int, name: str = "method") -> tuple[int, ...]:
    """Resolve a layer specification against a model.

    Args:
        spec: Indices or a string, see ``LayerSpec``.
        num_layers: Depth of the language model.
        name: Method name for error messages.

    Returns:
        Sorted distinct indices in ``[0, num_layers)``.

    Raises:
        MethodError: An index outside the model, an unreadable string, or no layer at all.
    """
    chosen: set[int] = set()
    for part in spec.split(",") if isinstance(spec, str) else spec:
        if isinstance(part, int) or re.fullmatch(r"\s*-?\d+\s*", part):
            index = int(part)
            if not -num_layers <= index < num_layers:
                raise MethodError(f"{name}: layer {index} does not exist, the model has layers 0..{num_layers - 1}.")
            chosen.add(index % num_layers)
            continue
        match = re.fullmatch(rf"\s*({_BOUND})?\s*:\s*({_BOUND})?\s*", part)
        if match is None:
            raise MethodError(
                f"{name}: cannot read layers={spec!r}; write for example layers='1,18:32' or '0.25:0.75'."
            )
        start, stop = (_bound(text, num_layers) for text in match.groups())
        chosen.update(range(num_layers)[slice(start, stop)])
    if not chosen:
        raise MethodError(f"{name}: layers={spec!r} selects none of the model's {num_layers} layers.")
    return tuple(sorted(chosen))


_BOUND = r"-?\d+|-?\d*\.\d+"


def are_indices(value: object) -> bool:
    """Whether a value is a list of whole numbers."""
    if isinstance(value, str) or not isinstance(value, (Sequence, range)):
        return False
    return all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _bound(text: str | None, num_layers: int) -> int | None:
    if not text:
        return None
    return round(float(text) * num_layers) if "." in text else int(text)


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included.

    Attributes:
        low: The smallest; near where the method does nothing, so that a search can find out that less is better.
        high: The largest worth trying: beyond it, published runs break the text.
        log: Whether orders of magnitude matter rather than differences.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """A few values.

    Attributes:
        values: JSON values, the default first.
    """

    values: tuple[Any, ...]


Space = Mapping[str, Range | Choice]
"""Parameters to search, by name."""
