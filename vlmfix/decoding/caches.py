"""Caches of two branches: both in the rows of one, so that a step is one forward; or each by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256
"""Tokens a buffer has room for before it is copied to a longer one."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache in buffers with room behind the last token: a new one is written, and nothing else copied."""

    keys: Any
    values: Any
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None
    _shown: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``[rows, heads, tokens, size]``; return all."""
        if key_states.requires_grad or not is_filled(self):
            longer: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return longer
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        # Keys that were cropped or reordered are not the buffer's: what others see of it must stay.
        if self._buffers is None or self._shown is not self.keys or stop > self._buffers[0].shape[2]:
            more = stop - start + ROOM
            self._buffers = (_with_room([self.keys], start, more), _with_room([self.values], start, more))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        self._shown = self.keys
        return self.keys, self.values

    def take(self, buffers: Sequence[torch.Tensor]) -> None:
        """Go on in buffers that begin with its keys and values and have room behind them."""
        self._buffers, self._shown = (buffers[0], buffers[1]), self.keys


def _with_room(parts: Sequence[torch.Tensor], length: int, room: int = ROOM) -> torch.Tensor:
    """Return the rows of some tensors under each other, padded on the left to ``length``, with room behind."""
    batch, heads, _, size = parts[0].shape
    buffer = parts[0].new_empty(len(parts) * batch, heads, length + room, size)
    for number, part in enumerate(parts):
        rows, start = slice(number * batch, (number + 1) * batch), length - part.shape[2]
        buffer[rows, :, :start] = 0
        buffer[rows, :, start:length] = part
    return buffer


_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer)


def is_plain(cache: Any) -> bool:
    """Whether a cache's layers hold nothing but keys and values by row and position."""
    layers: list[Any] = getattr(cache, "layers", None) or []
    return bool(layers) and not getattr(cache, "offloading", False) and all(type(layer) in _PLAIN for layer in layers)


def is_filled(layer: Any) -> bool:
    """Whether a layer of a cache holds keys (layers that share those of others never do)."""
    return layer.keys is not None and layer.keys.numel() > 0


_OF_OWN_BRANCH = ("_vlmfix", "reorder_cache", "batch_select_indices")
"""What is kept on the cache of the model's own branch, see ``vlmfix.methods.sequence.keep_state``."""


def with_new_layers(cache: Any) -> Any:
    """Return a copy of a cache whose layers are copies: the tensors are shared until a layer replaces its own."""
    copied = copy.copy(cache)
    copied.__dict__ = {name: value for name, value in vars(cache).items() if name not in _OF_OWN_BRANCH}
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def emptied(cache: Any) -> Any:
    """Return an empty cache of the same kind as a plain one."""
    empty = with_new_layers(cache)
    for layer in empty.layers:
        layer.keys = layer.values = None
        layer.is_initialized = False
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = 0
    return empty


def forget_prompt_length(empty: Any) -> None:
    """Let an empty cache hold another prompt than the one it was told of (Unlimited-OCR keeps prompts apart)."""
    for layer in getattr(empty, "layers", None) or []:
        if getattr(layer, "prefill_length", None) is not None:
            layer.prefill_length = None  # that of what is read first


def length_of_layer(layer: Any, length: int) -> int:
    """How many keys a layer holds of a sequence of ``length`` tokens."""
    return min(length, int(layer.sliding_window) - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length


def copy_columns(empty: Any, filled: Any, columns: torch.Tensor) -> bool:
    """Copy positions ``columns`` ``[rows, n]`` into an empty cache; say whether that could be done.

    Row ``i`` is copied from the first of the rows of ``filled`` that belong to it, when beams have repeated it. A
    sliding layer that has dropped some positions cannot give them.
    """
    count = columns.shape[1]
    if not (is_plain(empty) and is_plain(filled)) or not count:
        return False
    for to, layer in zip(empty.layers, filled.layers, strict=True):
        if is_filled(layer) and (layer.keys.shape[2] != filled.get_seq_length() or length_of_layer(to, count) < count):
            return False
    for to, layer in zip(empty.layers, filled.layers, strict=True):
        if is_filled(layer):
            index = columns.to(layer.keys.device)[:, None, :, None]
            states = [each[:: each.shape[0] // columns.shape[0]] for each in (layer.keys, layer.values)]
            to.update(*(each.gather(2, index.expand(-1, each.shape[1], -1, each.shape[3])) for each in states))
    return True


def _growing(layer: Any) -> Any:
    """Return a layer, or one like it that grows in place."""
    if type(layer) is not DynamicLayer:
        return layer
    growing = GrowingLayer()
    growing.__dict__.update(vars(layer))
    return growing


class PairedCache:
    """The caches of two branches as one of twice the rows: first the model's own, then the other's.

    The shorter branch is padded on the left. What the user holds, the model's own cache, is shown a view of its rows.

    Attributes:
        cache: The cache of ``2 * batch`` rows.
        padding: Empty columns before the model's own branch and before the other.
    """

    def __init__(self, own: Any, other: Any) -> None:
        lengths = (own.get_seq_length(), other.get_seq_length())
        self.length = max(lengths)
        self.padding = (self.length - lengths[0], self.length - lengths[1])
        self.cache = with_new_layers(own)
        self.cache.layers = [_growing(layer) for layer in self.cache.layers]
        for layer, mine, theirs in zip(self.cache.layers, own.layers, other.layers, strict=True):
            if not is_filled(mine):
                continue
            size = length_of_layer(layer, self.length)
            states = [_with_room([getattr(mine, name), getattr(theirs, name)], size) for name in ("keys", "values")]
            layer.keys, layer.values = (each[:, :, :size] for each in states)
            if isinstance(layer, GrowingLayer):
                layer.take(states)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = self.length

    @staticmethod
    def fits(own: Any, other: Any) -> bool:
        """Whether two caches can be paired."""
        if not (is_plain(own) and is_plain(other)):
            return False
        lengths = own.get_seq_length(), other.get_seq_length()
        return all(
            is_filled(mine) == is_filled(theirs)
            and mine.is_sliding == theirs.is_sliding
            and (not is_filled(mine) or mine.keys.shape[:2] == theirs.keys.shape[:2])
            for mine, theirs in zip(own.layers, other.layers, strict=True)
        ) and all(
            layer.keys.shape[2] == length_of_layer(layer, length)  # else it holds no tokens but image features
            for cache, length in zip((own, other), lengths, strict=True)
            for layer in cache.layers
            if is_filled(layer)
        )

    @property
    def own_length(self) -> int:
        """Tokens of the model's own branch."""
        return int(self.cache.get_seq_length()) - int(self.padding[0])

    def show(self, own: Any) -> None:
        """Let the model's own cache show its rows: views, which its next update replaces."""
        self._show(own, 0)

    def other(self) -> Any:
        """Return a cache of the other branch by itself: views, which its next update replaces."""
        cache = with_new_layers(self.cache)
        self._show(cache, 1)
        return cache

    def _show(self, cache: Any, branch: int) -> None:
        length = int(self.cache.get_seq_length()) - self.padding[branch]
        for layer, both in zip(cache.layers, self.cache.layers, strict=True):
            if not is_filled(both):
                continue
            batch, size = both.keys.shape[0] // 2, length_of_layer(both, length)
            rows = slice(branch * batch, (branch + 1) * batch)
            layer.keys, layer.values = both.keys[rows, :, -size:], both.values[rows, :, -size:]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = length

    def reorder(self, beams: torch.Tensor) -> None:
        """Let row ``i`` of both branches continue row ``beams[i]``."""
        self.cache.reorder_cache(torch.cat([beams, beams + beams.shape[0]]))

    def crop(self, own_length: int) -> None:
        """Follow a crop of the model's own cache."""
        extra = self.own_length - own_length
        if extra:
            self.cache.crop(-extra)
