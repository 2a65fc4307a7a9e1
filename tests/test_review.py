"""Odd but legal ways to call a patched model, each of which was once answered wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import RAGGED, collate

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
