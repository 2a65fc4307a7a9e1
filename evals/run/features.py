"""Image features that are computed once: for all methods that answer a batch, and for all its questions on one image.

What is handed out again for another method is the very tensor that the model computed for the same pixels in the same
batch. A repeated image of a batch is left out of the computation only if that was seen to give the same bits in the
first batch that has one: kernels may round differently for another number of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlmfix.model.anatomy import FORWARD_KWARG, analyse

from .image_rows import Layout, OtherLayout, picked, positions_of, rows_of, same_bits, tensors_of, without_states

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
        """Compute the features of a batch from every row or, once that was seen to round alike, the distinct ones."""
        found = None if self._shares_rows is False else self._distinct(arguments, rows)
        if found is None:
            return self._encode(stock, args, kwargs, arguments, None)
        layout, positions = found
        firsts = [positions.index(i) for i in range(max(positions) + 1)]
        few = (stock, rows_of(args, layout, firsts), rows_of(kwargs, layout, firsts), arguments, positions)
        if self._shares_rows:
            kept = self._encode(*few)
            self.saved += (rows - len(firsts)) * kept.seconds
            return kept
        every = self._encode(stock, args, kwargs, arguments, None)
        try:
            again = self._encode(*few)
            self.saved -= len(firsts) * again.seconds
            self._shares_rows = same_bits(picked(again.output, positions), every.output)
            self._repeated = "encoded once" if self._shares_rows else "encoded again, as fewer rows round differently"
        except torch.OutOfMemoryError:
            raise
        except (OtherLayout, RuntimeError, ValueError, IndexError, TypeError):
            self._shares_rows, self._repeated = False, "encoded again, as features are not laid out per image"
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
