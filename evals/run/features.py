"""Image features that are computed once: for all methods that answer a batch, and for all its questions on one image.

Nothing here may change an answer, not by rounding either. What is handed out again for another method is the very
tensor that the model computed for the same pixels in the same batch. A repeated image of a batch is left out of the
computation only where that was seen to give the same bits: kernels may round differently for another number of rows,
so every pair of sizes is computed both ways once.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from vlmfix.model.anatomy import FORWARD_KWARG, analyse

_STATES = ("last_hidden_state", "hidden_states", "attentions")


class OtherLayout(Exception):
    """Features that are not one row, or one entry, per image."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which rows of a batch's tensors belong to which image: one each or, behind one another, its patches.

    Attributes:
        images: Number of images.
        patches: Per image, its number of rows in tensors of patches; None where there are none.
    """

    images: int
    patches: tuple[int, ...] | None = None

    @classmethod
    def find(cls, tensors: Sequence[torch.Tensor]) -> Layout | None:
        """The layout of what a model is asked with; None where it cannot be told.

        Patches are told by a grid, an integer tensor ``[images, 2 or 3]`` whose products say how many an image has.
        """
        lengths = {len(each) if each.dim() else 0 for each in tensors}
        images, most = min(lengths), max(lengths)
        if len(lengths) == 1:
            return cls(images) if images else None
        for each in tensors:
            if len(lengths) == 2 and each.dim() == 2 and len(each) == images and not each.is_floating_point():
                patches = tuple(each.prod(-1).tolist())
                if sum(patches) == most:
                    return cls(images, patches)
        return None

    def parts(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A tensor's rows, image by image."""
        sizes = [1] * self.images if len(tensor) == self.images else list(self.patches or ())
        return torch.split(tensor, sizes)


def positions_of(tensors: Sequence[torch.Tensor], layout: Layout) -> list[int]:
    """Per image, its place among the images that differ in one of the tensors."""
    parts = [layout.parts(each) for each in tensors]
    sums = torch.stack([torch.stack([part.sum(dtype=torch.float64) for part in each]) for each in parts], dim=1)
    seen: dict[tuple[float, ...], list[int]] = {}  # images of equal sums, which are few, are compared
    firsts: list[int] = []
    positions = []
    for image, key in enumerate(map(tuple, sums.tolist())):
        for place in seen.setdefault(key, []):
            if all(torch.equal(each[image], each[firsts[place]]) for each in parts):
                positions.append(place)
                break
        else:
            seen[key].append(len(firsts))
            positions.append(len(firsts))
            firsts.append(image)
    return positions


def rows_of(values: Any, layout: Layout, images: Sequence[int]) -> Any:
    """The arguments of some images only."""
    if isinstance(values, dict):
        return {name: rows_of(value, layout, images) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(rows_of(value, layout, images) for value in values)
    if not isinstance(values, torch.Tensor):
        return values
    parts = layout.parts(values)
    return torch.cat([parts[image] for image in images])


def without_states(output: Any) -> Any:
    """The features without the states they were made from, which are many times as large and which no model reads."""
    if getattr(output, "pooler_output", None) is None:
        return output
    return _changed(output, lambda name, value: None if name in _STATES else value)


def _changed(output: Any, change: Callable[[str, Any], Any]) -> Any:
    """A copy of a transformers output; some carry attributes that are no fields of their class."""
    values = {name: change(name, value) for name, value in vars(output).items()}
    fields = [field.name for field in dataclasses.fields(output)]
    copied = type(output)(**{name: values.pop(name) for name in fields if name in values})
    for name, value in values.items():
        setattr(copied, name, value)
    return copied


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a nested value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (ModelOutput, list, tuple)):
        for each in vars(value).values() if isinstance(value, ModelOutput) else value:
            yield from tensors_of(each)


def picked(output: Any, rows: list[int] | None) -> Any:
    """Features for every row of a batch, in containers of their own: a model may fill in more.

    Raises:
        OtherLayout: They are not one per row.
    """
    if isinstance(output, ModelOutput):
        return _changed(output, lambda _, value: picked(value, rows))
    if isinstance(output, torch.Tensor):
        if rows is None:
            return output
        if not output.dim() or len(output) != max(rows) + 1:
            raise OtherLayout
        return output[rows]
    if isinstance(output, (list, tuple)):
        if rows is None:
            return type(output)(output)
        if len(output) != max(rows) + 1 or not all(isinstance(each, torch.Tensor) for each in output):
            raise OtherLayout
        return type(output)(output[row] for row in rows)
    return output


def same_bits(left: Any, right: Any) -> bool:
    """Whether two nested values are equal to the bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        alike = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
        return left is right or (alike and torch.equal(left, right))
    if isinstance(left, ModelOutput):
        return same_bits(vars(left), vars(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


METHOD = "get_image_features"


_PLAIN = (type(None), bool, int, float, str, torch.dtype)


@dataclasses.dataclass
class Kept:
    """Image features with what they were computed from.

    Attributes:
        arguments: Everything the model was asked with, by name.
        rows: Per row of the batch, the row of ``output`` that holds its features; None for one each.
        seconds: How long the model took, for one image.
        output: What the model gave, states of inner layers left out.
        tensors: All tensors of these with their version counters: nobody must have written into them since.
    """

    arguments: dict[str, Any]
    rows: list[int] | None
    seconds: float
    output: Any
    tensors: list[tuple[torch.Tensor, int]]

    @property
    def is_intact(self) -> bool:
        """Whether nobody wrote into the features, or into what they were computed from."""
        return all(tensor._version == version for tensor, version in self.tensors)


class ImageFeatures:
    """Stands before a model's ``get_image_features`` and keeps what it gives.

    A method that looks at, or changes, what happens inside the vision tower has hooks there: for it, the tower runs.

    Attributes:
        reason: Why nothing can be reused, or None.
        asked: Images that forwards needed.
        encoded: Images that the model encoded.
        looked_inside: Images that it encoded because the method has hooks there.
        saved: Seconds that were saved since this was last set to 0, less what checks took: added to the time of a
            batch, they give the time it would take by itself.
    """

    def __init__(self, model: Any) -> None:
        """Look for the method and the modules behind it; the model must carry no patch yet."""
        self.reason: str | None = None
        self.asked = self.encoded = self.looked_inside = 0
        self.saved = 0.0
        self._shares_rows: bool | None = None
        self._repeated = "none"
        self._kept: list[Kept] = []
        self._capacity = 0
        self._same_bits: set[tuple[Any, ...]] = set()
        self._owner = _owner(model)
        if self._owner is None:
            self.reason = f"{type(model).__name__} encodes images inside its forward, not in a method of its own"
            return
        anatomy = analyse(model)
        text = [*anatomy.decoder_layers, *([] if anatomy.encoder is None else [anatomy.encoder])]
        apart = {id(module) for each in text for module in each.modules()}
        apart |= {id(each) for each in (anatomy.model, anatomy.language_model, anatomy.inner, self._owner)}
        self._vision = [module for module in self._owner.modules() if id(module) not in apart]
        self._stock = self._interference()

    def forget(self, rows: int = 0) -> None:
        """Drop what is kept, before a batch of other images (of ``rows`` rows) or when memory is needed."""
        self._kept.clear()
        self._capacity = 2 * rows

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Within the block, the model hands out what it computed before for the same images."""
        if self._owner is None or METHOD in self._owner.__dict__:
            yield
            return
        stock = getattr(self._owner, METHOD)

        @functools.wraps(stock)
        def features(*args: Any, **kwargs: Any) -> Any:
            return self._features(stock, *args, **kwargs)

        self._owner.__dict__[METHOD] = features
        try:
            yield
        finally:
            del self._owner.__dict__[METHOD]

    def summary(self) -> dict[str, Any]:
        """What was saved, for ``config.json``."""
        if self.reason is not None:
            return {"reused": False, "reason": self.reason}
        counts = {"asked": self.asked, "encoded": self.encoded, "encoded_for_methods_inside": self.looked_inside}
        return {"reused": True, "repeated_in_batch": self._repeated, **counts}

    def _features(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Some models hand on what a patch gives their text layers, which the vision part does not read.
        arguments = {name: value for name, value in kwargs.items() if name != FORWARD_KWARG}
        arguments |= {str(i): value for i, value in enumerate(args)}
        rows = _num_rows(arguments)
        if rows is None or torch.is_grad_enabled():
            return stock(*args, **kwargs)
        self.asked += rows
        if self._interference() != self._stock:
            self.encoded += rows
            self.looked_inside += rows
            return stock(*args, **kwargs)
        for kept in self._kept:
            if same_bits(kept.arguments, arguments) and kept.is_intact:
                self.saved += rows * kept.seconds
                return picked(kept.output, kept.rows)
        kept = self._computed(stock, args, kwargs, arguments, rows)
        while self._kept and sum(_num_rows(each.arguments) or 0 for each in self._kept) + rows > self._capacity:
            self._kept.pop(0)
        if rows <= self._capacity:
            self._kept.append(kept)
        return picked(kept.output, kept.rows)

    def _computed(
        self, stock: Callable[..., Any], args: Any, kwargs: Any, arguments: dict[str, Any], rows: int
    ) -> Kept:
        """The features of a batch, computed from every row, or from the distinct ones."""
        found = None if self._shares_rows is False else self._distinct(arguments, rows)
        if found is None:
            return self._encode(stock, args, kwargs, arguments, None)
        layout, positions = found
        firsts = [positions.index(i) for i in range(max(positions) + 1)]
        few = functools.partial(
            self._encode, stock, rows_of(args, layout, firsts), rows_of(kwargs, layout, firsts), arguments, positions
        )
        patches = layout.patches and (layout.patches, tuple(layout.patches[first] for first in firsts))
        shapes = (tuple(value.shape[1:]) for value in arguments.values() if isinstance(value, torch.Tensor))
        sizes = (rows, len(firsts), patches, *shapes)
        if sizes in self._same_bits:
            kept = few()
            self.saved += (rows - len(firsts)) * kept.seconds
            return kept
        every = self._encode(stock, args, kwargs, arguments, None)
        try:
            again = few()
            self.saved -= len(firsts) * again.seconds
            self._shares_rows = same_bits(picked(again.output, positions), every.output)
            self._repeated = "encoded once" if self._shares_rows else "encoded again, as fewer rows round differently"
        except torch.OutOfMemoryError:
            raise
        except (OtherLayout, RuntimeError, ValueError, IndexError, TypeError):
            self._shares_rows, self._repeated = False, "encoded again, as features are not laid out per image"
        if self._shares_rows:
            self._same_bits.add(sizes)
        return every

    def _encode(
        self, stock: Callable[..., Any], args: Any, kwargs: Any, arguments: dict[str, Any], positions: list[int] | None
    ) -> Kept:
        images = (_num_rows(arguments) or 0) if positions is None else max(positions) + 1
        on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in arguments.values())
        start = _now(on_gpu)
        output = without_states(stock(*args, **kwargs))
        seconds = (_now(on_gpu) - start) / max(images, 1)
        self.encoded += images
        tensors = [(each, each._version) for each in tensors_of([output, *arguments.values()])]
        return Kept(arguments, positions, seconds, output, tensors)

    def _distinct(self, arguments: dict[str, Any], rows: int) -> tuple[Layout, list[int]] | None:
        """Per image, its place among the images that differ; None where all differ or cannot be told apart."""
        tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        layout = Layout.find(tensors)
        if layout is None or any(_is_plain_list(value) and len(value) == rows for value in arguments.values()):
            self._shares_rows, self._repeated = False, "encoded again, as inputs are not laid out per image"
            return None
        positions = positions_of(tensors, layout)
        return (layout, positions) if max(positions) + 1 < rows else None

    def _interference(self) -> list[int]:
        """Per module of the vision part, how many hooks and replaced forwards there are, but for transformers' own."""
        return [sum(map(_is_foreign, _added(module))) for module in self._vision]


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _added(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    if "forward" in module.__dict__:
        yield module.__dict__["forward"]


def _is_foreign(function: Any) -> bool:
    """Whether a function is not one of those by which transformers collects the outputs of inner layers."""
    function = getattr(function, "__func__", function)
    return not str(getattr(function, "__globals__", {}).get("__name__", "")).startswith("transformers.")


def _owner(model: nn.Module) -> nn.Module | None:
    """The innermost module that gives image features; what is around it calls it."""
    owners = [module for module in model.modules() if hasattr(type(module), METHOD)]
    return owners[-1] if owners else None


def _num_rows(arguments: dict[str, Any]) -> int | None:
    """How many images there are: rows of the shortest tensor; None for arguments that cannot be compared."""
    values = list(arguments.values())
    if not all(isinstance(value, (torch.Tensor, *_PLAIN)) or _is_plain_list(value) for value in values):
        return None
    return min((len(value) for value in values if isinstance(value, torch.Tensor) and value.dim()), default=None)


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, _PLAIN) for each in value)
