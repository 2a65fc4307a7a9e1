"""Odd but legal ways to call a patched model, each of which was once answered wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import PAD, RAGGED, collate, forward, position_ids, words
from transformers import DynamicCache

import vlmfix

VHR = vlmfix.VHR(layers=":")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [VHR, vlmfix.PAI(alpha=0.8, layers=":")], ids=["vhr", "pai"])
def test_arguments_by_position_equal_those_by_name(tiny: Any, method: Any) -> None:
    """A padding mask given by position counts too: without it, pads are text, and the last row is one of them."""
    inputs = collate([RAGGED[0], RAGGED[1]], side="right")
    vlmfix.patch(tiny, method)
    with torch.no_grad():
        expected = tiny(**inputs).logits
        found = tiny(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", [VHR, vlmfix.MMA(layers=":"), None], ids=["vhr", "mma", "none"])
def test_padding_behind_a_short_answer_is_no_text_of_the_next_turn(tiny: Any, method: Any) -> None:
    """Answers of a batch end at different lengths; the caller hides what fills up the shorter ones."""
    if method is not None:
        vlmfix.patch(tiny, method)
    question, answer = torch.tensor([words(4, seed=5), words(4, seed=6)]), torch.tensor([[20, PAD, PAD], [21, 22, 23]])
    inputs = collate([RAGGED[0], RAGGED[1]])
    batch, single = DynamicCache(config=tiny.config), DynamicCache(config=tiny.config)
    forward(tiny, inputs, past_key_values=batch, use_cache=True)
    forward(tiny, collate([RAGGED[0]]), past_key_values=single, use_cache=True)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        for ids in (*answer.split(1, dim=1), question):
            new = torch.ones_like(ids) if ids is question else (ids != PAD).long()
            mask = torch.cat([mask, new], dim=1)
            positions = position_ids(mask)[:, -ids.shape[1] :]
            options = {"attention_mask": mask, "position_ids": positions, "past_key_values": batch, "use_cache": True}
            found = tiny(input_ids=ids, **options).logits[0]
        for ids in (answer[:1, :1], question[:1]):
            expected = tiny(input_ids=ids, past_key_values=single, use_cache=True).logits[0]
    close(found, expected)
