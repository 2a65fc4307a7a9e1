"""VHR: the fast path against the naive reference, and the invariants of the method."""

from __future__ import annotations

import warnings
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
    pictures,
    sample,
    words,
)
from naive.reference import Reference
from naive.vhr import NaiveVhr, choose_heads

import vlmfix
from vlmfix.methods.vhr import divergent_heads


def vhr(**options: Any) -> vlmfix.VHR:
    return vlmfix.VHR(**{"layers": ":", **options})


# Selection.


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7, 8, 32])
@pytest.mark.parametrize("outliers", [False, True])
def test_selection_is_the_paper_rule(heads: int, outliers: bool) -> None:
    generator = torch.Generator().manual_seed(heads)
    with_image = torch.randn(40, heads, 8, generator=generator)
    without_image = torch.randn(40, heads, 8, generator=generator)
    without_image *= torch.rand(40, heads, 1, generator=generator).exp() ** 3
    expected = torch.tensor(
        [choose_heads(list(a), list(b), outliers) for a, b in zip(with_image, without_image, strict=True)]
    )
    found = divergent_heads(with_image, without_image, outliers)
    assert torch.equal(found, expected)
    assert (found.sum(1) <= heads // 2).all()
    if heads == 32:
        plain = divergent_heads(with_image, without_image, False)
        assert (plain.sum(1) == 16).all()
        assert outliers == (not torch.equal(found, plain))


def test_heads_that_cannot_see_the_image_are_not_chosen_by_rounding(build: Any) -> None:
    """The window of the last position holds no image: with and without image agree up to rounding."""
    model = build("mistral", window=6)
    vlmfix.patch(model, vhr(layers=[0]))
    each = sample(3, 1, 8, seed=1)
    forward(model, collate([each]))
    assert vlmfix.status(model).edited == (0,)


def test_equal_divergences_select_nothing() -> None:
    same = torch.ones(2, 8, 4)
    assert not divergent_heads(same, same).any()
    assert not divergent_heads(same, 2 * same).any()


def test_outliers_need_both_conditions() -> None:
    without_image = torch.zeros(1, 4, 2)
    with_image = torch.tensor([[[1.0, 0], [2.0, 0], [3.0, 0], [20.0, 0]]])
    assert divergent_heads(with_image, without_image).tolist() == [[False, False, True, True]]
    without_image[0, 3] = torch.tensor([40.0, 0])
    assert divergent_heads(with_image, without_image).tolist() == [[False, True, True, False]]
    assert divergent_heads(with_image, without_image, outliers=False).tolist() == [[False, False, True, True]]


# Exact no-ops.


def test_the_strength_of_large_models_is_warned_of_on_small_ones(tiny: Any) -> None:
    with pytest.warns(UserWarning, match="alpha=2 is for models of 7B"):
        vlmfix.patch(tiny, "vhr")
    assert "may break the text" in vlmfix.status(tiny).notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not vlmfix.status(vlmfix.patch(tiny, "vhr", alpha=1.2)).notes
    assert vlmfix.VHR().cautions(SimpleNamespace(hidden_size=4096)) == (), "the published models take it"


@pytest.mark.parametrize("select", ["divergent", "all", "unselected"])
def test_a_sample_without_image_in_a_batch_with_images_is_bitwise_stock(tiny: Any, select: str) -> None:
    stock = generate(tiny, collate(RAGGED), 3)[1]
    vlmfix.patch(tiny, vhr(select=select))
    edited = generate(tiny, collate(RAGGED), 3)[1]
    assert torch.equal(stock[2], edited[2])
    assert not torch.equal(stock[0], edited[0])


# Batches, precision, refusals.


def test_the_position_of_the_image_does_not_matter_to_the_text(tiny: Any) -> None:
    """An image in the middle, at the end and at the start: the image-free stream is the text in its order."""
    picture = pictures(1, 3)
    text = words(9, 3)
    for cut in (0, 4, 9):
        each = Sample((1, *text[:cut], *[IMAGE] * 9, *text[cut:]), picture)
        _, expected = Reference(tiny, [NaiveVhr()]).prompt(each.ids, each.pixels)
        with vlmfix.patched(tiny, vhr()):
            torch.testing.assert_close(forward(tiny, collate([each])).logits[0], expected, atol=1e-5, rtol=1e-5)
