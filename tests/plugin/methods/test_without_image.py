"""``ACT(without_image=True)``: prompts of text alone are calibrated, as the paper does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, PAD, RAGGED, collate, forward, generate, sample
from invariants import close
from naive.act import NaiveAct
from naive.reference import Reference
from transformers import DynamicCache

import vlmfix

OPTIONS: dict[str, Any] = {"layers": ":", "sink_threshold": "1.5/N", "min_rows": 2}
TEXT = [RAGGED[2], sample(12, 0, 8, seed=5)]


@pytest.fixture
def calibrated(tiny: Any) -> Any:
    return vlmfix.patch(tiny, "act", without_image=True, **OPTIONS)


@pytest.mark.parametrize("rows", ["all", "text", "last"])
def test_text_alone_agrees_with_the_formula(tiny: Any, rows: str) -> None:
    formula = NaiveAct(range(4), alpha=1.5, min_rows=2, rows="last" if rows == "last" else "all")
    formula.acts_without_image = True
    reference = Reference(tiny, [formula])
    stock = generate(tiny, collate(TEXT), 4)[1]
    vlmfix.patch(tiny, "act", without_image=True, rows=rows, **OPTIONS)
    logits = generate(tiny, collate(TEXT), 4)[1]
    for row, each in enumerate(TEXT):
        close(logits[row], reference.generate(each.ids, None, 4, [PAD, IMAGE])[1])
    assert (logits - stock).abs().max() > 1e-3
    assert vlmfix.status(tiny).prompts_without_image == 1 and vlmfix.status(tiny).edited[0] > 0


def test_a_batch_with_and_without_images_equals_its_prompts(calibrated: Any) -> None:
    batch = generate(calibrated, collate(RAGGED, pad_to=50), 3)[1]
    for row, each in enumerate(RAGGED):
        close(batch[row], generate(calibrated, collate([each]), 3)[1][0])


def test_prompts_with_an_image_are_calibrated_as_ever(calibrated: Any) -> None:
    found = generate(calibrated, collate([RAGGED[0]]), 3)[1]
    vlmfix.patch(calibrated, "act", **OPTIONS)
    assert torch.equal(generate(calibrated, collate([RAGGED[0]]), 3)[1], found)


def test_text_in_parts_is_refused(calibrated: Any) -> None:
    ids, cache = torch.tensor([TEXT[1].ids]), DynamicCache(config=calibrated.config)
    calibrated(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="one forward"):
        calibrated(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)


def test_switched_off_it_is_the_stock_model(tiny: Any) -> None:
    stock = forward(tiny, collate(TEXT)).logits
    vlmfix.patch(tiny, "act", without_image=True, beta=1.0)
    assert torch.equal(forward(tiny, collate(TEXT)).logits, stock)
