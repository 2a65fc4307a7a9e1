"""The vision tower as a place: every image is edited that is read, unless a call asks for the stock model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import by_name
from families.tiny_llava import RAGGED, collate, forward, generate
from method_parameters import parameters_of

import vlmfix
from vlmfix.model.vision_tower import find_vision_layers

ONE = collate([RAGGED[1]])


def seen(model: Any) -> torch.Tensor:
    """The features of a picture, read outside of any forward."""
    features = model.get_image_features(pixel_values=ONE["pixel_values"])
    features = getattr(features, "pooler_output", features)
    return torch.cat(list(features)).detach()


@pytest.fixture
def turned(tiny: Any) -> Any:
    return vlmfix.patch(tiny, "vti", **{**parameters_of("vti", tiny), "alpha_text": 0.0})


def test_features_are_edited_outside_of_a_forward_too(turned: Any) -> None:
    edited = seen(turned)
    stock = seen(vlmfix.unpatch(turned))
    assert (edited - stock).abs().max() > 1e-3


def test_a_call_of_the_stock_model_leaves_no_trace_and_finds_none(turned: Any) -> None:
    edited, stock = forward(turned, ONE).logits, forward(copy.deepcopy(turned), ONE, vlmfix=None).logits
    assert not torch.equal(edited, stock)
    for options in ({"max_new_tokens": 2}, {"max_new_tokens": "two"}):
        try:
            turned.generate(**ONE, **options, vlmfix=None)
        except TypeError:
            assert options["max_new_tokens"] == "two"
        assert torch.equal(forward(turned, ONE).logits, edited)
        assert torch.equal(forward(turned, ONE, vlmfix=None).logits, stock)


def test_both_branches_of_a_contrast_read_the_edited_image(turned: Any) -> None:
    """So a contrast of a branch with itself, but for an edit of nothing, leaves the answer as it is."""
    method = vlmfix.status(turned).methods[0]
    expected = generate(turned, ONE, 3)[1]
    same = vlmfix.Edited(vlmfix.SPIN(keep=1.0, suppress=0.5, layers=":"), beta=0.0)
    vlmfix.patch(turned, [method, same])
    torch.testing.assert_close(generate(turned, ONE, 3)[1], expected, atol=1e-5, rtol=1e-5)


def test_passes_of_other_methods_read_the_edited_image(turned: Any) -> None:
    """AdaptVis asks the stock model how sure it is, and counts on it when the image is edited: the same features."""
    method = vlmfix.status(turned).methods[0]
    expected = generate(turned, ONE, 2)[1]
    vlmfix.patch(turned, [method, vlmfix.AdaptVis(low=1.0, high=1.0)])
    assert torch.equal(generate(turned, ONE, 2)[1], expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "pixtral", "internvl"])
def test_towers_that_are_known(family: str) -> None:
    found = by_name(family)
    if found.unavailable():
        pytest.skip(str(found.unavailable()))
    model = found.build()
    assert len(find_vision_layers(model)) == 2
    single = found.collate([found.single()])
    stock = generate(model, single, 2)[1]
    vlmfix.patch(model, "vti", **{**parameters_of("vti", model), "alpha_text": 0.0})
    assert (generate(model, single, 2)[1] - stock).abs().max() > 1e-3
    assert vlmfix.status(model).edited[0] > 0 and vlmfix.status(model).moved[0] > 0.1


@pytest.mark.parametrize(("family", "reason"), [("fuyu", "has none"), ("deepseek_vl_hybrid", "has several")])
def test_towers_that_are_not(family: str, reason: str) -> None:
    found = by_name(family)
    if found.unavailable():
        pytest.skip(str(found.unavailable()))
    model = found.build()
    parameters = parameters_of("vti", model)
    assert parameters["alpha_image"] == 0
    with pytest.raises(vlmfix.MethodError, match=f"{reason}.*alpha_image=0"):
        vlmfix.patch(model, "vti", **{**parameters, "alpha_image": 1.0})


def test_directions_of_another_tower_are_refused(tiny: Any) -> None:
    parameters = parameters_of("vti", tiny)
    short = {**parameters["directions"], "vision": parameters["directions"]["vision"][:1]}
    with pytest.raises(vlmfix.MethodError, match="vision tower with 1 layers"):
        vlmfix.patch(tiny, "vti", directions=short)
    wide = {**parameters["directions"], "vision": [[[1.0] * 5]] * 2}
    vlmfix.patch(tiny, "vti", directions=wide)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="1 tokens of width 5"):
        forward(tiny, ONE)
