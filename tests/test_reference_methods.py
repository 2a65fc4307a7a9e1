"""Every method agrees with its naive formula: prompt and decode, padded batches, grouped queries, several images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import IMAGE, PAD, RAGGED, collate, generate
from naive.act import NaiveAct
from naive.mma import NaiveMma
from naive.pai import NaivePai
from reference import Naive, Reference

import vlmfix

ALL = range(4)
CASES: dict[str, tuple[vlmfix.Method, Naive]] = {
    "pai": (vlmfix.PAI(alpha=0.7, layers=":"), NaivePai(ALL, 0.7)),
    "pai, not the prompt": (
        vlmfix.PAI(alpha=1.5, layers="1:", edit_prompt=False),
        NaivePai([1, 2, 3], 1.5, edit_prompt=False),
    ),
    "mma": (vlmfix.MMA(layers=":"), NaiveMma(ALL)),
    "mma, gamma": (vlmfix.MMA(gamma=0.3, layers="0:2"), NaiveMma([0, 1], 0.3)),
    "mma, own image": (vlmfix.MMA(columns="own_image", layers=":"), NaiveMma(ALL, columns="own_image")),
    "act": (vlmfix.ACT(layers=":", sink_threshold="1.5/N", min_rows=2), NaiveAct(ALL, alpha=1.5, min_rows=2)),
    "act, heads": (
        vlmfix.ACT(beta=0.0, sink_threshold=0.05, heads=[(0, 1), (2, 0), (2, 3)], rows="text", min_rows=1),
        NaiveAct([0, 2], 0.0, None, 0.05, [(0, 1), (2, 0), (2, 3)], rows="text", min_rows=1),
    ),
    "act, frozen": (
        vlmfix.ACT(layers=":", sink_threshold=0.04, sinks="frozen", rows="last", recipients="image"),
        NaiveAct(ALL, 0.4, None, 0.04, rows="last", sinks="frozen", recipients="image"),
    ),
}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_agrees_with_the_formula(build: Any, kind: str, case: str) -> None:
    method, naive = CASES[case]
    model = build(kind)
    stock = generate(model, collate(RAGGED), 4)[1]
    reference = Reference(model, naive=[naive])
    vlmfix.patch(model, method)
    _, logits = generate(model, collate(RAGGED), 4)
    for row, each in enumerate(RAGGED):
        _, expected = reference.generate(each.ids, each.pixels, 4, [PAD, IMAGE])
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)
        assert (each.pixels is None) == bool((logits[row] - stock[row]).abs().max() < 1e-4), "the edit must be visible"
