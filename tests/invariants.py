"""What must hold of every method, whatever it edits; and how close floats must be."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, Sample, collate, forward, generate
from transformers import DynamicCache

import vlmfix


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Loop:
    """A model and a cache that it reads into, forward by forward, as a loop of a user's own does.

    Attributes:
        cache: What was read.
        logits: Of the prompt, ``[batch, tokens, vocab]``.
    """

    def __init__(self, model: Any, inputs: Any = None, *, cache: Any = None) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config) if cache is None else cache
        if inputs is not None:
            self.logits = forward(model, inputs, past_key_values=self.cache, use_cache=True).logits

    def copied(self) -> Loop:
        """The same model with a copy of the cache."""
        return Loop(self.model, cache=copy.deepcopy(self.cache))

    @torch.no_grad()
    def read(self, *tokens: int, **options: Any) -> torch.Tensor:
        """The logits of one forward that reads some tokens of a single prompt, or ``input_ids`` among the options."""
        options.setdefault("input_ids", torch.tensor([tokens]))
        logits: torch.Tensor = self.model(past_key_values=self.cache, use_cache=True, **options).logits
        return logits

    def turn(self, each: Sample, **options: Any) -> torch.Tensor:
        """The logits of a further turn, without the first token of a prompt."""
        return self.read(*each.ids[1:], pixel_values=each.pixels, **options)

    def steps(self, *tokens: int, **options: Any) -> torch.Tensor:
        """The logits of one forward for each token, ``[1, tokens, vocab]``."""
        found = [self.read(token, **options) for token in tokens]
        return torch.cat(found, dim=1) if found else torch.empty(1, 0, 0)


def hold_the_same(cache: Any, other: Any) -> None:
    """Put the keys and values of another cache of the same length into a cache."""
    for own, theirs in zip(cache.layers, other.layers, strict=True):
        own.keys.copy_(theirs.keys)
        own.values.copy_(theirs.values)


def continued(model: Any, inputs: Any, steps: Sequence[Any], **options: Any) -> list[Any]:
    """Read a prompt, then one forward for each of the steps: tokens of every row, or ``[batch, tokens]``."""
    cache, mask, batch = DynamicCache(config=model.config), inputs["attention_mask"], len(inputs["input_ids"])
    found = [forward(model, inputs, past_key_values=cache, use_cache=True, **options)]
    for tokens in steps:
        ids = tokens if isinstance(tokens, torch.Tensor) else torch.tensor([tokens] * batch)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        more = {"position_ids": mask.cumsum(1)[:, -ids.shape[1] :] - 1, "logits_to_keep": ids.shape[1], **options}
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more))
    return found


def assert_four_threads_equal_one(model: Any, more: Sequence[Any], tokens: int) -> None:
    """Each prompt alone, all at once, and further ones: in turn, then spread over four threads."""
    work = [collate([each]) for each in RAGGED] + [collate(RAGGED), *more, collate([RAGGED[3]])]
    expected = [generate(model, inputs, tokens)[1] for inputs in work]
    found: dict[int, torch.Tensor] = {}

    def run(start: int) -> None:
        for index in range(start, len(work), 4):
            found[index] = generate(model, work[index], tokens)[1]

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(len(work)))


def assert_offloaded_equals_loaded(model: Any, method: Any, order: str, tokens: int) -> None:
    """Weights that live elsewhere and come to the device layer by layer; ``order``: patched or offloaded first."""
    accelerate = pytest.importorskip("accelerate")
    inputs = collate(RAGGED)
    stock = generate(model, inputs, tokens)[1]
    vlmfix.patch(model, method)
    expected = generate(model, inputs, tokens)[1]
    assert not torch.equal(stock, expected)
    if order == "offloaded first":
        vlmfix.unpatch(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    if order == "offloaded first":
        vlmfix.patch(model, method)
    assert torch.equal(generate(model, inputs, tokens)[1], expected)
    vlmfix.unpatch(model)
    assert torch.equal(generate(model, inputs, tokens)[1], stock)
