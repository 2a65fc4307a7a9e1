"""Methods that ask which token of an answer is being chosen: M3ID's growing weight, FLB's first logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, collate, generate, words
from invariants import Loop, close

import vlmfix
from vlmfix.decoding.base import AnswerToken

ONE = collate([RAGGED[0]])
TEXT = collate([RAGGED[2]])
STRONG = [vlmfix.M3ID(lam=0.15, alpha=1.0), vlmfix.FLB(gamma=2.0, lam=1.0, beta=0.0)]
EACH = pytest.mark.parametrize("method", STRONG, ids=lambda method: method.name)


# The formulas.


@pytest.mark.parametrize(("number", "weight"), [(1, 0.0202), (10, 0.2214), (35, 1.0138), (100, 6.3891), (200, 53.598)])
def test_the_weight_of_m3id_grows(number: int, weight: float) -> None:
    logits, other = torch.randn(2, 2, 30, generator=torch.Generator().manual_seed(0))
    found = vlmfix.M3ID(alpha=1.0).combine(logits, other, AnswerToken(number))
    torch.testing.assert_close(found, logits + weight * (logits - other), atol=1e-3, rtol=1e-4)
    as_guidance = vlmfix.Guidance(gamma=1 + weight, beta=0.0).combine(logits, other, AnswerToken(number))
    torch.testing.assert_close(found.softmax(-1), as_guidance.softmax(-1), atol=1e-4, rtol=1e-3)


def test_the_weight_of_m3id_stays_finite() -> None:
    logits, other = torch.randn(2, 1, 30, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = -torch.inf
    for lam in (0.2, 5.0):
        for number in (1, 200, 5000):
            found = vlmfix.M3ID(lam=lam, alpha=1.0).combine(logits, other, AnswerToken(number))
            assert found.isneginf().tolist() == logits.isneginf().tolist() and not found.isnan().any()


def test_the_gate_of_m3id_leaves_sure_rows_alone() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    other = torch.zeros(2, 3)
    found = vlmfix.M3ID(lam=0.3, alpha=0.5).combine(logits, other, AnswerToken(5))
    assert torch.equal(found[0], logits[0]) and not torch.equal(found[1], logits[1])


@pytest.mark.parametrize(("number", "weight"), [(1, 0.0), (2, 0.0146), (3, 0.0285), (6, 0.0664), (51, 0.2754)])
def test_the_weight_of_flb_grows_from_nothing(number: int, weight: float) -> None:
    logits, first = torch.randn(2, 2, 30, generator=torch.Generator().manual_seed(0))
    first[0, 2] = -torch.inf
    found = vlmfix.FLB(beta=0.0).combine(logits, logits, AnswerToken(number, first))
    expected = logits + weight * torch.where(first.isinf(), 0.0, first)
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)
    shifted = vlmfix.FLB(beta=0.0).combine(logits, logits, AnswerToken(number, first + 7))
    torch.testing.assert_close(shifted.softmax(-1)[1], found.softmax(-1)[1])


# Strength zero, no image, and the cut alone.


@pytest.mark.parametrize("method", [vlmfix.M3ID(lam=0.0, beta=0.3), vlmfix.FLB(gamma=0.0, beta=0.3)], ids=str)
def test_the_cut_alone_leaves_greedy_as_it_is(tiny: Any, method: Any) -> None:
    ids, logits = generate(tiny, ONE)
    vlmfix.patch(tiny, method)
    found, cut = generate(tiny, ONE)
    assert torch.equal(found, ids)
    kept = cut.isfinite()
    assert 0 < kept.sum() < kept.numel() and torch.equal(cut[kept], logits[kept])


def test_flb_reads_nothing_more_and_leaves_the_first_token(tiny: Any) -> None:
    stock = generate(tiny, ONE, 4)[1]
    seen = []
    handle = tiny.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    vlmfix.patch(tiny, STRONG[1])
    found = generate(tiny, ONE, 4)[1]
    handle.remove()
    assert seen == [(1, ONE["input_ids"].shape[1]), (1, 1), (1, 1), (1, 1)]
    assert torch.equal(found[:, 0], stock[:, 0]) and not torch.equal(found[:, 1], stock[:, 1])
    assert vlmfix.status(tiny).edited == (4,)
    vlmfix.patch(tiny, STRONG[1])
    generate(tiny, TEXT, 4)
    assert vlmfix.status(tiny).edited == (0,)


# What counts tokens.


@EACH
def test_a_crop_takes_tokens_back(tiny: Any, method: Any) -> None:
    vlmfix.patch(tiny, method)
    loop = Loop(tiny, ONE)
    expected = loop.copied().steps(20, 21, 22)
    loop.steps(20, 30, 31, 32)
    loop.cache.crop(-3)
    close(loop.steps(21, 22), expected[:, 1:])


@EACH
def test_a_turn_begins_anew(tiny: Any, method: Any) -> None:
    """The second answer equals that to the whole conversation as one prompt."""
    vlmfix.patch(tiny, method)
    answer, question = words(3, seed=31), words(4, seed=32)
    loop, whole = Loop(tiny, ONE), Loop(tiny)
    loop.steps(*answer)
    ids = torch.cat([ONE["input_ids"], torch.tensor([[*answer, *question]])], dim=1)
    start = whole.read(input_ids=ids, pixel_values=ONE["pixel_values"])
    close(loop.read(*question)[:, -1], start[:, -1])
    close(loop.steps(20, 21), whole.steps(20, 21))


@EACH
def test_without_a_cache_it_is_refused(tiny: Any, method: Any) -> None:
    vlmfix.patch(tiny, method)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Leave use_cache on"):
        generate(tiny, ONE, 4, use_cache=False)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="static cache"):
        tiny.generate(**ONE, max_new_tokens=4, cache_implementation="static")


# What status tells of the effect.


@pytest.mark.parametrize(
    "method", [vlmfix.VCD(), vlmfix.Guidance(), vlmfix.VCD(alpha=0.0, beta=0.3), *STRONG[1:]], ids=str
)
def test_status_tells_how_far_probabilities_moved(tiny: Any, method: Any) -> None:
    vlmfix.patch(tiny, method)
    generate(tiny, TEXT, 3)
    assert vlmfix.status(tiny).moved == (None,)
    generate(tiny, ONE, 3)
    status = vlmfix.status(tiny)
    assert status.moved[0] > 1e-3 and not status.notes


def test_status_warns_of_a_contrast_without_effect(tiny: Any) -> None:
    vlmfix.patch(tiny, vlmfix.VCD(noise_step=0, beta=0.0))
    generate(tiny, ONE, 3)
    assert "no effect" in vlmfix.status(tiny).notes[-1]
    vlmfix.patch(tiny, vlmfix.M3ID(alpha=0.01))  # sure of every token so far
    generate(tiny, ONE, 3)
    assert vlmfix.status(tiny).moved == (None,) and not vlmfix.status(tiny).notes
