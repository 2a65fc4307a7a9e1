"""Which rows of a batch's tensors, and of the features made from them, belong to which image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.utils import ModelOutput

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
        """Find the layout of what a model is asked with; None where it cannot be told.

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
        """Split a tensor into its rows, image by image."""
        sizes = [1] * self.images if len(tensor) == self.images else list(self.patches or ())
        return torch.split(tensor, sizes)


def positions_of(tensors: Sequence[torch.Tensor], layout: Layout) -> list[int]:
    """Return per image its place among the images that differ in one of the tensors."""
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
    """Return the arguments of some images only."""
    if isinstance(values, dict):
        return {name: rows_of(value, layout, images) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(rows_of(value, layout, images) for value in values)
    if not isinstance(values, torch.Tensor):
        return values
    parts = layout.parts(values)
    return torch.cat([parts[image] for image in images])


def without_states(output: Any) -> Any:
    """Return features without the states they were made from: many times as large, and read by no model."""
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
    """Yield every tensor in a nested value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (ModelOutput, list, tuple)):
        for each in vars(value).values() if isinstance(value, ModelOutput) else value:
            yield from tensors_of(each)


def picked(output: Any, rows: list[int] | None) -> Any:
    """Return features for every row of a batch, in containers of their own: a model may fill in more.

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
