"""``vlmfix.status`` tells effect, not attempts; a model that would undo an edit is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, collate, forward, generate
from method_parameters import IN_FORWARDS, parameters_of
from torch import nn

import vlmfix
from vlmfix.methods.registry import method_class
from vlmfix.methods.views import EditedRows, Layer

ONE = collate([RAGGED[0]])
NAMES = [
    name
    for name in IN_FORWARDS
    if name != "none" and not method_class(name).searches and not getattr(method_class(name), "is_gated", False)
]


class Idle(vlmfix.PAI):
    """Says that it edits, and edits nothing."""

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        return scores, torch.ones(scores.shape[:3], dtype=torch.bool)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_that_edits_moves_something(tiny: Any, name: str) -> None:
    stock = generate(tiny, ONE, 2)[1]
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    edited = generate(tiny, ONE, 2)[1]
    status = vlmfix.status(tiny)
    both = stock.isfinite() & edited.isfinite()
    assert (status.moved[0] or 0) > 1e-4
    assert (stock - edited)[both].abs().max() > 1e-4
    assert ", moved by " in str(status)


def test_how_far_the_heads_of_vhr_move(tiny: Any) -> None:
    """All heads times 1 + x: every output moves by x of its length."""
    for alpha in (1.5, 3.0):
        vlmfix.patch(tiny, "vhr", alpha=alpha, select="all", layers=":")
        generate(tiny, ONE, 3)
        assert vlmfix.status(tiny).moved == pytest.approx((alpha - 1,), rel=1e-5)


def test_a_method_that_acts_and_moves_nothing_is_told(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    vlmfix.patch(tiny, Idle(layers=":"))
    generate(tiny, ONE, 2)
    with caplog.at_level(logging.WARNING, "vlmfix"):
        status = vlmfix.status(tiny)
    assert status.edited[0] > 0
    assert 0 <= status.moved[0] < 1e-6
    assert "none of them moved: it has no effect here" in str(status)
    assert "has no effect" in caplog.text


def test_nothing_is_measured_where_nothing_is_edited(tiny: Any) -> None:
    vlmfix.patch(tiny, "pai")
    generate(tiny, {name: value[:, :3] for name, value in ONE.items() if value.dim() == 2}, 2)
    status = vlmfix.status(tiny)
    assert (status.edited, status.moved, status.notes) == ((0,), (None,), ())


class HeadNorm(nn.Module):
    """RMS per head, without a weight."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        heads = states.view(*states.shape[:-1], 4, -1)
        return (heads * heads.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).view_as(states)


class NormedProjection(nn.Linear):
    """An output projection behind such a norm."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(HeadNorm()(states))


def test_scaled_heads_behind_which_a_norm_undoes_the_scale_are_refused(tiny: Any) -> None:
    """As in Muse Spark."""
    for layer in tiny.model.language_model.layers:
        layer.self_attn.o_proj.__class__ = NormedProjection
    stock = forward(tiny, ONE).logits
    vlmfix.patch(tiny, "vhr", layers=":", select="all", alpha=8.0)
    torch.testing.assert_close(forward(tiny, ONE).logits, stock, atol=1e-3, rtol=1e-3)  # what would go unnoticed
    vlmfix.unpatch(tiny)
    for layer in tiny.model.language_model.layers:
        layer.self_attn.o_norm = HeadNorm()
    for name, options in (("vhr", {}), ("spin", {"suppress": 0.1}), ("allpath", {"up_heads": [(0, 1)]})):
        with pytest.raises(vlmfix.MethodError, match=r"normalises them .*\(o_norm\).*patch\(model, 'pai'\)"):
            vlmfix.patch(tiny, name, **options)
    for name, options in (("pai", {}), ("spin", {"suppress": 0.0, "keep": 0.5})):
        vlmfix.patch(tiny, name, layers=":", **options)
        assert (forward(tiny, ONE).logits - stock).abs().max() > 1e-3
