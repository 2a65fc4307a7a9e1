"""What must hold of every method, whatever it edits; and how close floats must be."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, collate, forward, generate
from transformers import DynamicCache

import vlmfix


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


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
