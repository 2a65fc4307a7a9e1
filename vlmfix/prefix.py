"""Prompts about one image begin alike: what they share, up to the last image token, is read once.

A causal model computes the keys and values of a token from the tokens before it. Those of everything up to the last
image token are therefore the same for every question about an image, and under every method that leaves these rows
alone (:attr:`Method.leaves_prefix <vlmfix.methods.base.Method.leaves_prefix>`): they edit rows behind the image only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmfix.decoding.other_image import is_image_argument
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.sequence import STATE_ATTRIBUTE, SequenceState, rows_of, state_of
from vlmfix.model.anatomy import FORWARD_KWARG, Anatomy, analyse
from vlmfix.model.devices import input_device
from vlmfix.model.uncopied import weights_of
from vlmfix.patching import find_patch


@dataclass(frozen=True, eq=False)
class Prefix:
    """What prompts share up to their last image token, as a model has read it; made by :func:`shared_prefix`.

    Attributes:
        input_ids: int64 ``[batch, length]``, left-padded; every row ends with an image token.
        attention_mask: int64 ``[batch, length]``, 0 for padding.
        methods: The methods that were on the model.
        learned: What they learned, by (method index, site index).
        layers: Keys and values ``[batch, key_heads, length, head_dim]`` of every decoder layer.
        pictures: The arguments that held the pictures.
        weights: What the model computed with, see :func:`weights_of <vlmfix.model.uncopied.weights_of>`.
        is_stock: Whether the stock model has read it, whatever is on the model: it goes on as the stock model too.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    methods: tuple[Method, ...]
    learned: Mapping[tuple[int, int], Any]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    pictures: Mapping[str, torch.Tensor]
    weights: tuple[Any, ...]
    _anatomy: Anatomy
    is_stock: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    def continued(self, inputs: Mapping[str, Any], rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Return what ``model.generate`` needs for prompts that begin with this prefix.

        The prefix may be continued any number of times, with the patch that was on the model when it was read or with
        any other whose methods leave a prefix alone and learn nothing from it.

        Args:
            inputs: The processor's output for the whole prompts: ``input_ids`` ``[prompts, length]`` and
                ``attention_mask``. Pictures are not read again: those beside the prompts must be those of the prefix.
            rows: Which row of the prefix each prompt continues. By default the only one, or row ``i`` for prompt ``i``.

        Returns:
            ``input_ids``, ``attention_mask`` and ``past_key_values``, a cache of its own. Between the prefix and a
            prompt's shorter continuation lies padding. For a stock prefix of a patched model also ``vlmfix=None``.

        Raises:
            UnsupportedFeatureError: A prompt begins otherwise, ends with the prefix or shows another or a further
                image, a method of the patch on the model cannot go on from here, or the model has other weights by now.
        """
        if weights_of(self._anatomy.model) != self.weights:
            raise UnsupportedFeatureError(
                "This prefix was read with other weights than the model has now: an adapter was switched, merged or "
                "disabled since, or weights were changed. Read it again: vlmfix.shared_prefix(model, inputs)."
            )
        ids, mask = _ids_and_mask(inputs)
        ids, mask = ids.to(self.input_ids.device), mask.to(self.input_ids.device)
        if rows is None:
            rows = [0] * len(ids) if len(self) == 1 else range(len(ids))
        if len(rows) != len(ids) or not all(0 <= row < len(self) for row in rows):
            raise UnsupportedFeatureError(
                f"A prefix of {len(self)} rows cannot be continued by {len(ids)} prompts in rows {list(rows)}. Say "
                "which row each prompt continues: prefix.continued(inputs, rows=[...])."
            )
        parts = [self._behind(tokens[valid.bool()], row) for tokens, valid, row in zip(ids, mask, rows, strict=True)]
        self._check_pictures(inputs, rows)
        new_ids, new_mask = _left_padded(parts)
        index = torch.as_tensor(rows, device=ids.device)
        input_ids = torch.cat([self.input_ids[index], new_ids], dim=1)
        cache = DynamicCache(config=self._anatomy.text_config)
        for layer, (keys, values) in enumerate(self.layers):
            chosen = index.to(keys.device)
            # Filled with nothing first: what a cache takes, it copies once more.
            cache.update(keys[:0, :, :0], values[:0, :, :0], layer)
            cache.layers[layer].keys = keys.index_select(0, chosen)
            cache.layers[layer].values = values.index_select(0, chosen)
        patch = find_patch(self._anatomy.model)
        if patch is not None and not self.is_stock:
            setattr(cache, STATE_ATTRIBUTE, self._state(patch.methods, index))
        return {
            "input_ids": input_ids,
            "attention_mask": torch.cat([self.attention_mask[index], new_mask], dim=1),
            "past_key_values": cache,
            **({FORWARD_KWARG: None} if patch is not None and self.is_stock else {}),
        }

    def _behind(self, tokens: torch.Tensor, row: int) -> torch.Tensor:
        """Return what follows the prefix in a prompt without padding."""
        known = self.input_ids[row][self.attention_mask[row].bool()]
        if len(tokens) < len(known) + 2 or not torch.equal(tokens[: len(known)], known):
            raise UnsupportedFeatureError(
                f"A prompt of {len(tokens)} tokens does not continue row {row} of this prefix, whose {len(known)} "
                "tokens must come first, with at least two behind them."
            )
        if bool(self._anatomy.is_image(tokens[len(known) :]).any()):
            raise UnsupportedFeatureError(
                "A prompt shows a further image behind this prefix, which is read without pictures. Read a prefix that "
                "goes up to its last image."
            )
        return tokens[len(known) :]

    def _check_pictures(self, inputs: Mapping[str, Any], rows: Sequence[int]) -> None:
        """Refuse pictures beside the prompts that are known not to be those of the prefix."""
        for name, mine in self.pictures.items():
            given = inputs.get(name)
            if list(rows) == list(range(len(self))):
                expected = mine
            elif len(self) == 1:
                expected = torch.cat([mine] * len(rows))
            elif len(mine) == len(self):
                expected = mine[list(rows)]
            else:
                continue
            if isinstance(given, torch.Tensor) and not torch.equal(given.to(expected), expected):
                raise UnsupportedFeatureError(
                    f"The {name} beside these prompts are not those that this prefix was read with. Read a prefix of "
                    "their pictures: vlmfix.shared_prefix(model, inputs)."
                )

    def _state(self, methods: tuple[Method, ...], rows: torch.Tensor) -> SequenceState:
        """Return what is known about the tokens of the prefix, for the methods that go on from here."""
        _check_methods(methods)
        learned: dict[tuple[int, int], Any] = {}
        for index, method in enumerate(methods):
            if not method.reads_layer_input or method.is_identity:
                continue
            if method not in self.methods:
                raise UnsupportedFeatureError(
                    f"{method.name} learns from the rows of the prefix, which were read without it. Read the prefix "
                    "while the model is patched with it."
                )
            own = self.methods.index(method)
            learned |= {(index, site): rows_of(v, rows, len(self)) for (n, site), v in self.learned.items() if n == own}
        valid = self.attention_mask[rows].bool()
        return SequenceState(
            methods,
            self._anatomy.is_image(self.input_ids[rows]) & valid,
            valid,
            self.input_ids[rows],
            any_image=True,
            all_images=True,
            learned=learned,
            prompts=((0, valid.shape[1]),),
        )


def shared_prefix(model: object, inputs: Mapping[str, Any], *, stock: bool = False) -> Prefix:
    """Read what prompts hold up to their last image token, so that further prompts can go on from there.

    >>> prefix = vlmfix.shared_prefix(model, processor(images=image, text=prompts[:1], return_tensors="pt"))
    >>> inputs = processor(images=[image] * 6, text=prompts, padding=True, return_tensors="pt")
    >>> model.generate(**prefix.continued(inputs), max_new_tokens=16)

    The answers are those of whole prompts, up to rounding: kernels may round differently for other numbers of rows.

    Args:
        model: A Hugging Face vision-language model, patched or not.
        inputs: The processor's output for prompts with images, one per row of the prefix: left-padded ``input_ids``,
            ``attention_mask``, ``pixel_values``, ... What follows the last image is not read.
        stock: Whether the stock model reads it and goes on from it, although the model is patched.

    Raises:
        UnsupportedFeatureError: The model's prompts cannot be continued so (images that are no tokens of the prompt,
            positions that depend on the grid of an image, caches with windows or recurrent states), or a method of its
            patch edits rows up to the last image token.
    """
    anatomy = analyse(model)
    check_shares_prefix(anatomy)
    patch = find_patch(model)
    methods = () if patch is None or stock else patch.methods
    _check_methods(methods)
    ids, mask = _ids_and_mask(inputs)
    image = anatomy.is_image(ids) & mask.bool()
    if not bool(image.any(1).all()):
        raise UnsupportedFeatureError("A prompt has no image token, so there is no prefix to share up to one.")
    places = torch.arange(ids.shape[1], device=ids.device)
    kept = mask.bool() & (places <= torch.where(image, places, -1).amax(1, keepdim=True))
    per_token = {name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.shape == ids.shape}
    shared = {name: value for name, value in inputs.items() if name not in per_token}
    for name in per_token - {"attention_mask"}:
        shared[name], mask = _left_padded([row[keep] for row, keep in zip(inputs[name], kept, strict=True)])
    shared["attention_mask"] = mask
    if "position_ids" in inspect.signature(anatomy.model.forward).parameters:
        shared["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)  # as generate counts them
    _check_positions(anatomy, shared)
    device = input_device(anatomy.model)
    shared = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in shared.items()}
    cache = DynamicCache(config=anatomy.text_config)
    if patch is not None and stock:
        shared[FORWARD_KWARG] = None
    with torch.no_grad():
        anatomy.model(**shared, past_key_values=cache, use_cache=True)
    _check_cache(anatomy, cache)
    state = state_of(cache)
    return Prefix(
        shared["input_ids"],
        shared["attention_mask"],
        methods,
        {} if state is None else state.learned,
        tuple((layer.keys, layer.values) for layer in cache.layers),
        _pictures(shared),
        weights_of(anatomy.model),
        anatomy,
        stock,
    )


def prefix_left_behind(
    anatomy: Anatomy, inputs: Mapping[str, Any], cache: object, rows: Sequence[int], batch: int
) -> Prefix | None:
    """Take a prefix out of the cache of a stock answer, so that it need not be read again.

    Args:
        anatomy: The model.
        inputs: As for :func:`shared_prefix`.
        cache: What ``generate`` has left behind.
        rows: Which prompts of the batch that was answered these are.
        batch: How many it held; the cache has a row per prompt, or per beam.

    Returns:
        What :func:`shared_prefix` would read, up to rounding. None where it is not in the cache as it would be read:
        prompts whose prefixes end in different columns, or a cache of another kind.

    Raises:
        UnsupportedFeatureError: See :func:`shared_prefix`.
    """
    layers = cache.layers if isinstance(cache, DynamicCache) and not cache.offloading else []
    ids, mask = _ids_and_mask(inputs)
    ends = [int(row.nonzero()[-1]) + 1 for row in anatomy.is_image(ids) & mask.bool()]
    if not layers or len(set(ends)) > 1 or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    beams = len(layers[0].keys) // batch
    index = torch.as_tensor(rows) * beams
    columns = slice(int(mask.any(0).nonzero()[0]), ends[0])
    device = input_device(anatomy.model)
    shared = {"input_ids": ids[:, columns].to(device), "attention_mask": mask[:, columns].to(device)}
    _check_positions(anatomy, shared | {"position_ids": (shared["attention_mask"].cumsum(1) - 1).clamp_min(0)})
    return Prefix(
        **shared,
        methods=(),
        learned={},
        layers=tuple((each.keys[index, :, columns], each.values[index, :, columns]) for each in layers),
        pictures=_pictures(inputs),
        weights=weights_of(anatomy.model),
        _anatomy=anatomy,
        is_stock=True,
    )


def _pictures(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor) and is_image_argument(n, v)}


def check_shares_prefix(anatomy: Anatomy) -> None:
    """Refuse a model whose prompts cannot go on from one reading of their image, as far as its structure tells.

    Raises:
        UnsupportedFeatureError: See :func:`shared_prefix`.
    """
    name = type(anatomy.model).__name__
    if not (anatomy.reads_image_tokens and anatomy.image_token_ids):
        raise UnsupportedFeatureError(
            f"{name} has no image tokens in its prompt, so there is no prefix up to the last."
        )
    if any("rope_deltas" in vars(module) for module in anatomy.model.modules()):
        raise UnsupportedFeatureError(
            f"{name} counts positions by the grid of its images and remembers them for the last prompt only, so that "
            "prompts cannot share a prefix."
        )
    _check_cache(anatomy, DynamicCache(config=anatomy.text_config))


def _check_cache(anatomy: Anatomy, cache: DynamicCache) -> None:
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UnsupportedFeatureError(
            f"{type(anatomy.model).__name__} keeps more than the keys and values of all tokens (sliding windows, "
            "recurrent states), which further prompts cannot go on from."
        )


def _check_positions(anatomy: Anatomy, prompt: Mapping[str, Any]) -> None:
    """Refuse a model that drops the positions it is given: it counts padding, and a prefix has other padding."""
    if "position_ids" not in inspect.signature(anatomy.model.forward).parameters:
        return
    places = torch.arange(prompt["input_ids"].shape[1], device=prompt["input_ids"].device)
    prepared = anatomy.model.prepare_inputs_for_generation(
        prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        position_ids=prompt["position_ids"],
        cache_position=places,
        is_first_iteration=True,
    )
    if prepared.get("position_ids") is None:
        raise UnsupportedFeatureError(
            f"{type(anatomy.model).__name__} counts the padding of a prompt as positions, so that prompts cannot share "
            "a prefix."
        )


def _check_methods(methods: Sequence[Method]) -> None:
    for method in methods:
        if not method.leaves_prefix:
            raise UnsupportedFeatureError(
                f"{method.name} edits or reads rows up to the last image token by what comes behind them, so that "
                "prompts cannot share them. Give it whole prompts."
            )


def _ids_and_mask(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise UnsupportedFeatureError("A prefix needs the processor's output with input_ids [batch, length].")
    mask = inputs.get("attention_mask")
    return ids, torch.ones_like(ids) if mask is None else mask


def _left_padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of different lengths as one tensor ``[batch, length]``, and the mask of what is no padding."""
    length = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows], device=padded.device)
    return padded, (torch.arange(length, device=padded.device) >= length - lengths).long()
