"""Which layers and heads a method edits: how they are written, checked against a model and scaled to its depth."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmfix.errors import MethodError
from vlmfix.methods.parameters import Parameter, Parametrised, described

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from vlmfix.methods.views import Layer
    from vlmfix.model.anatomy import Anatomy, AttentionKind


LayerSpec = Sequence[int] | str | None
"""Which decoder layers: ``None`` (the method's default), indices (negative ones count from the end), or a string such
as ``"1,18:32"`` or ``"0.25:0.75"`` (slices of indices or of fractions of the depth)."""


LAYERS_IN_WORDS = "a list of whole numbers, or a text such as '1,18:32' or '0.25:0.75'"


HeadSpec = Sequence[Sequence[int]] | None
"""Attention heads as (layer, head) pairs, counted from 0; heads are query heads."""


def check_heads(
    name: str, heads: Sequence[Sequence[int]], anatomy: Anatomy, kinds: Sequence[AttentionKind]
) -> set[int]:
    """Check a list of heads against a model, and return the layers they are in.

    Args:
        name: The method's name, for the messages.
        heads: (layer, head) pairs.
        anatomy: The model.
        kinds: The kinds of attention the method acts in.

    Raises:
        MethodError: A head outside the model, or outside the attention the method acts in.
    """
    for layer, head in heads:
        if layer >= anatomy.num_layers or head >= anatomy.num_heads:
            raise MethodError(
                f"{name}: head ({layer}, {head}) does not exist in this model of {anatomy.num_layers} layers with "
                f"{anatomy.num_heads} heads. The list belongs to another model."
            )
    layers = {layer for layer, _ in heads}
    reachable = {site.layer_idx for site in anatomy.sites if site.kind in kinds}
    if not layers <= reachable:
        raise MethodError(
            f"{name}: the attention it acts in is in layers {sorted(reachable)} of this model; heads are listed in "
            f"layers {sorted(layers - reachable)} too. The list belongs to another model."
        )
    return layers


def listed_heads(heads: HeadSpec, layer: Layer, like: torch.Tensor) -> torch.Tensor:
    """Return which heads of ``[batch, num_heads, ...]`` are in a list (``None``: all): bool ``[num_heads]``."""
    import torch

    in_hand = range(like.shape[1]) if layer.heads is None else layer.heads
    here = in_hand if heads is None else heads_of(heads, layer.site.layer_idx)
    return torch.tensor([head in here for head in in_hand], device=like.device)


def heads_of(heads: Sequence[Sequence[int]], layer_idx: int) -> tuple[int, ...]:
    """Return the heads of one layer in a list of (layer, head) pairs, in order."""
    return tuple(sorted({head for at, head in heads if at == layer_idx}))


@dataclass(frozen=True)
class DefaultLayers:
    """The layers a method edits by default, in a model of any depth.

    Attributes:
        words: The same in words, for help texts.
        choose: Returns the layers of a model with that many of them, in order.
    """

    words: str
    choose: Callable[[int], tuple[int, ...]]

    def __call__(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers, in order."""
        return self.choose(num_layers)


ALL_LAYERS = DefaultLayers("all", lambda num_layers: tuple(range(num_layers)))


def all_but(words: str, first: int = 0, last: int = 0) -> DefaultLayers:
    """All layers but the ``first`` and the ``last`` ones; the middle layer where that leaves none."""
    return DefaultLayers(words, lambda num_layers: tuple(range(first, num_layers - last)) or (num_layers // 2,))


def scaled_layers(first: int, last: int) -> DefaultLayers:
    """The layers ``first..last`` (inclusive) of a model of 32 layers, scaled to the model's own depth."""

    def choose(num_layers: int) -> tuple[int, ...]:
        low, high = round(first / 32 * num_layers), round(last / 32 * num_layers)
        return tuple(range(min(low, num_layers - 1), min(max(high, low), num_layers - 1) + 1))

    return DefaultLayers(f"{first}..{last} (inclusive) of 32, scaled to the model's depth", choose)


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


def _bound(text: str | None, num_layers: int) -> int | None:
    if not text:
        return None
    return round(float(text) * num_layers) if "." in text else int(text)


@dataclass(frozen=True)
class InLayers(Parametrised):
    """What methods share about the layers and heads that they act in."""

    name: ClassVar[str] = ""
    """Its short name: that of its file."""
    default_layers: ClassVar[DefaultLayers] = ALL_LAYERS
    """The layers it edits unless ``layers`` says otherwise."""
    search_layers: ClassVar[tuple[LayerSpec, ...]] = ()
    """Values of ``layers`` that it searches too, the default first."""

    layers: LayerSpec = dataclasses.field(
        default=None,
        kw_only=True,
        metadata=described("Decoder layers it acts in, see ``LayerSpec``. Default: ", expected=LAYERS_IN_WORDS),
    )

    @classmethod
    def meaning_of(cls, name: str, known: Parameter) -> str:
        """Return what a parameter means: of ``layers``, the default too."""
        return f"{known.help}{cls.default_layers.words}." if name == "layers" else known.help

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention it acts in."""
        raise NotImplementedError

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The layers of a bound method."""
        return tuple(layer for layer in self.layers or () if isinstance(layer, int))

    @property
    def only_heads(self) -> HeadSpec:
        """The (layer, head) pairs it is confined to, each counted from 0; ``None`` for every head of its layers.

        By default those that its parameter ``heads`` lists, if it has one.
        """
        heads: HeadSpec | str = getattr(self, "heads", None)
        return None if isinstance(heads, str) else heads

    def bind(self, anatomy: Anatomy) -> Self:
        """Return a copy with everything that depends on the model resolved (layers, dimensions).

        Raises:
            MethodError: Layers or heads that the model does not have.
        """
        num_layers = anatomy.num_layers
        if self.layers is None:
            layers = self.default_layers(num_layers)
        else:
            layers = resolve_layers(self.layers, num_layers, self.name)
        if self.only_heads is not None:
            with_heads = check_heads(self.name, self.only_heads, anatomy, self.attention_kinds)
            chosen = with_heads if self.layers is None else with_heads & set(layers)
            if with_heads and not chosen:
                raise MethodError(f"{self.name}: layers={self.layers!r} holds none of the listed heads.")
            layers = tuple(sorted(chosen)) or layers
        return dataclasses.replace(self, layers=layers)

    def heads_in(self, layer_idx: int) -> Sequence[int] | None:
        """Return which query heads' scores or weights it edits or observes in a layer; ``None`` for all.

        Its hooks may then be given these heads alone, or with others: ``layer.heads`` says which.
        """
        return None if self.only_heads is None else heads_of(self.only_heads, layer_idx)
