"""PAI, MMA, ACT and FIA: the invariants of their definitions, beside the agreement with the naive formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.tiny_llava import (
    IMAGE,
    RAGGED,
    Sample,
    collate,
    forward,
    generate,
    sample,
)

import vlmfix
from vlmfix.methods.scores import raise_scores

MMA = vlmfix.MMA(layers=":")
FIA = vlmfix.FIA(layers=":", local_ratio=0.5)
ONE = collate([RAGGED[1]])


# PAI.


def test_scores_are_raised_never_lowered() -> None:
    scores = torch.tensor([-2.0, 2.0, 3.0])[None, None, None]
    raised = raise_scores(scores.clone(), 0.5 * torch.tensor([[[[1.0, 1.0, 0.0]]]]))
    assert raised.flatten().tolist() == [-1.0, 3.0, 3.0]


# MMA.


def test_opening_the_last_layer_alone_changes_no_answer(tiny: Any) -> None:
    stock = generate(tiny, ONE, 4)[1]
    vlmfix.patch(tiny, vlmfix.MMA(layers=[-1]))
    assert torch.equal(generate(tiny, ONE, 4)[1], stock)
    assert vlmfix.status(tiny).edited[0] > 0


def test_no_text_behind_the_image_is_a_no_op(tiny: Any) -> None:
    each = sample(6, 1, 0, seed=3)
    each = Sample(each.ids[: 1 + max(i for i, token in enumerate(each.ids) if token == IMAGE)], each.pixels)
    stock = forward(tiny, collate([each])).logits
    vlmfix.patch(tiny, MMA)
    assert torch.equal(forward(tiny, collate([each])).logits, stock)


# ACT.


@pytest.mark.parametrize("is_prefill", [False, True])
def test_a_row_wholly_on_sinks_is_left_alone(is_prefill: bool) -> None:
    attn_weights = torch.tensor([[[[0.0, 0.5, 0.5], [0.2, 0.4, 0.4]]]])
    method = vlmfix.ACT(beta=0.0)
    is_sink = torch.tensor([False, True, True]).expand(1, 1, 1, 3)
    forward = SimpleNamespace(is_prefill=is_prefill)
    layer: Any = SimpleNamespace(constant=lambda make: torch.tensor([True]), learned=None, forward=forward)
    edited, rows = type("Planted", (vlmfix.ACT,), {"find_sinks": lambda *_: is_sink})(beta=0.0).edit_weights(
        attn_weights.clone(), layer
    )
    assert rows.tolist() == [[[False, True]]]
    assert torch.equal(edited[0, 0, 0], attn_weights[0, 0, 0])
    torch.testing.assert_close(edited[0, 0, 1], torch.tensor([1.0, 0.0, 0.0]))
    assert method.beta == 0


def test_the_published_threshold_depends_on_the_number_of_tokens() -> None:
    assert vlmfix.ACT()._threshold == (5.0, True)
    assert vlmfix.ACT(sink_threshold=" 2.5 / n")._threshold == (2.5, True)
    assert vlmfix.ACT(sink_threshold=0.1)._threshold == (0.1, False)


def test_all_heads_is_said_not_to_be_the_paper(tiny: Any) -> None:
    vlmfix.patch(tiny, "act")
    assert any("calibrate" in note for note in vlmfix.status(tiny).notes)
    vlmfix.patch(tiny, "act", heads=[(2, 1)])
    assert vlmfix.status(tiny).layers == (2,)
    assert not vlmfix.status(tiny).notes


# FIA.


def test_summary_patches_are_outliers_of_the_second_to_last_layer() -> None:
    method = vlmfix.FIA(alpha=0.7, beta=0.4, local_ratio=0.25)
    first = torch.arange(16.0)
    penultimate = torch.ones(16)
    expected = torch.tensor([0.0] * 12 + [0.7] * 4)
    assert torch.equal(method.patch_gains(first, penultimate), expected)
    penultimate[[2, 13]] = 50.0
    gains = method.patch_gains(first, penultimate)
    expected[[2, 13]] = 0.4  # summary wins
    assert torch.equal(gains, expected)
