"""The contract every method fulfils: a frozen dataclass that edits one or more places on the path of attention."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from vlmfix.errors import MethodError

if TYPE_CHECKING:
    import torch

    from vlmfix.anatomy import Anatomy
    from vlmfix.run import Layer

LayerSpec = Sequence[int] | str | None
"""Which decoder layers: ``None`` (the method's default), indices (negative ones count from the end), or a string such
as ``"1,18:32"`` or ``"0.25:0.75"`` (slices of indices or of fractions of the depth)."""

M = TypeVar("M", bound="Method")


@dataclass(frozen=True)
class Method:
    """Base class of all methods.

    A method overrides only the hooks of the places it edits and declares them in the class attributes. It never keeps
    state: what it learns in a prompt is returned from :meth:`learn` or stored in ``layer.learned`` and lives on the
    sequence's cache.

    Attributes:
        layers: Decoder layers to edit, see ``LayerSpec``. ``None`` is the method's own default.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    edits_weights: ClassVar[bool] = False
    edits_heads: ClassVar[bool] = False
    reads_layer_input: ClassVar[bool] = False

    layers: LayerSpec = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Normalise what JSON and the command line deliver, then check ranges."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
            if kind == "float":
                self.require(isinstance(value, (int, float)) and not isinstance(value, bool), field.name, "a number")
            elif kind == "bool":
                self.require(isinstance(value, bool), field.name, "true or false")
            elif kind in ("LayerSpec", "Sequence[int] | None") and value is not None:
                if kind == "LayerSpec" and isinstance(value, str):
                    continue
                self.require(_are_indices(value), field.name, "a list of whole numbers")
                object.__setattr__(self, field.name, tuple(value))
        self.validate()

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""

    @property
    def is_identity(self) -> bool:
        """Whether the parameters switch the method off: then nothing is computed and outputs are bitwise stock."""
        return False

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The layers of a bound method."""
        return tuple(layer for layer in self.layers or () if isinstance(layer, int))

    @property
    def text_only_stream(self) -> str | None:
        """``"plain"`` or ``"edited"`` when :meth:`edit_heads` needs the head outputs of an image-free pass."""
        return None

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers edited when ``layers`` is ``None``."""
        return tuple(range(num_layers))

    def bind(self: M, anatomy: Anatomy) -> M:
        """Return a copy with everything that depends on the model resolved (layers, dimensions)."""
        num_layers = anatomy.num_layers
        if self.layers is None:
            layers = self.default_layers(num_layers)
        else:
            layers = resolve_layers(self.layers, num_layers, self.name)
        return dataclasses.replace(self, layers=layers)

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """What a user should know about this method on this model; shown by ``vlmfix.status``."""
        return ()

    # The hooks, in the order of the path. ``layer`` gives the masks, the rows and the learned state.

    def learn(self, hidden_states: torch.Tensor, layer: Layer) -> Any:
        """See the residual stream entering a decoder layer in a prompt; what is returned becomes ``layer.learned``.

        Args:
            hidden_states: ``[batch, q_len, hidden_size]``, before the layer's input norm.
            layer: The layer; ``layer.learned`` holds what earlier parts of the same sequence taught, or ``None``.
        """
        raise NotImplementedError

    def crop(self, learned: Any, length: int) -> Any:
        """Forget what was learned of tokens behind the first ``length``: the cache was cropped into the prompt."""
        return learned

    def settle(self, learned: Mapping[int, Any]) -> None:
        """See everything learned in a prompt (by site index) once it is over: the one place that may synchronise."""

    def acts_at(self, layer: Layer) -> bool:
        """Whether :meth:`edit_weights` has anything to do; ``False`` leaves the layer to the base kernel."""
        return True

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Edit post-softmax weights of the requested rows.

        Args:
            attn_weights: ``[batch, num_heads, rows, keys]``, fp32, owned by the caller (may be edited in place).
            layer: The layer.

        Returns:
            The edited weights and a bool tensor ``[batch, num_heads, rows]``: the rows that were edited. In a prompt,
            all other rows keep what the base kernel computed, and so do rows that are not up for edits
            (``layer.row_mask``).
        """
        raise NotImplementedError

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Edit head outputs ``[batch, q_len, num_heads, head_dim]`` before the output projection."""
        raise NotImplementedError

    def reapply_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Apply what :meth:`edit_heads` froze in the prompt to further ``[batch, n, num_heads, head_dim]``."""
        raise NotImplementedError

    # Recipes.

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict ``{"method": name, **parameters}``; ``vlmfix.recipes`` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"method": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    def require(self, condition: bool, parameter: str, expected: str) -> None:
        """Raise ``MethodError`` naming the parameter, its value and what is expected, unless ``condition``."""
        if not condition:
            value = getattr(self, parameter)
            raise MethodError(f"{type(self).__name__}({parameter}={value!r}): {parameter} must be {expected}.")


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


def _are_indices(value: object) -> bool:
    if isinstance(value, str) or not isinstance(value, (Sequence, range)):
        return False
    return all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _bound(text: str | None, num_layers: int) -> int | None:
    if not text:
        return None
    return round(float(text) * num_layers) if "." in text else int(text)
