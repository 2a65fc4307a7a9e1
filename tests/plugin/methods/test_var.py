"""VAR: the fast path against the naive reference, and the invariants of the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.tiny_llava import (
    BOS,
    IMAGE,
    PAD,
    RAGGED,
    SINK_DIMS,
    SINK_WORD,
    Sample,
    collate,
    forward,
    generate,
    pictures,
)
from invariants import Loop, close, hold_the_same
from naive.reference import Reference
from naive.var import NaiveVar, sink_value

import vlmfix
from vlmfix.methods.var import find_sinks


def var(**options: Any) -> vlmfix.VAR:
    return vlmfix.VAR(**{"sink_dims": SINK_DIMS, "sink_threshold": 3.0, "layers": ":", **options})


# Fast path against the reference.


def test_a_visual_sink_cropped_away_is_gone(sinky: Any) -> None:
    """The first image has no visual sink, the second has one, and is dropped: text sinks alone recycle nothing."""
    with torch.no_grad():
        sinky.model.multi_modal_projector.linear_2.weight[list(SINK_DIMS)] *= 0.5
    pixels = torch.cat([pictures(1, 52), pictures(1, 0)])
    longer = Sample((BOS, 20, *[IMAGE] * 9, 21, SINK_WORD, *[IMAGE] * 9), pixels)
    shorter = Sample(longer.ids[:13], pixels[:1])
    formula = NaiveVar([0])
    sinks = Reference(sinky, [formula]).prompt(longer.ids, longer.pixels)[0].notes[formula, 0]
    assert not any(sinks[2:11])
    assert any(sinks[13:])
    assert sinks[0]
    vlmfix.patch(sinky, var(layers=[0]))
    cropped, fresh = (Loop(sinky, collate([each])) for each in (longer, shorter))
    cropped.cache.crop(-9)
    hold_the_same(cropped.cache, fresh.cache)
    close(cropped.read(30), fresh.read(30))


def test_decoding_agrees_with_recomputation_without_a_cache(sinky: Any) -> None:
    vlmfix.patch(sinky, var())
    suppressed = {"suppress_tokens": [PAD, IMAGE, BOS, SINK_WORD]}
    for each in RAGGED:
        cached, logits = generate(sinky, collate([each]), 4, **suppressed)
        recomputed, expected = generate(sinky, collate([each]), 4, use_cache=False, **suppressed)
        assert torch.equal(cached, recomputed)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


# Attention rows.


def test_find_sinks_is_the_paper_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 50, 64, generator=generator)
    states[..., 7] *= 5
    found = find_sinks(states, (7, 9), 2.5)
    expected = torch.tensor([[sink_value(x, (7, 9)) >= 2.5 for x in row] for row in states])
    assert torch.equal(found, expected)
    assert 0 < found.sum() < found.numel()
    assert torch.equal(find_sinks(states.half(), (7, 9), 2.5), expected)
    assert find_sinks(torch.zeros(1, 2, 64), (7,), 2.5).any().item() is False
    huge = torch.full((1, 1, 64), 6e4, dtype=torch.float16)
    assert not find_sinks(huge, (7,), 2.5).any()  # the mean square overflows in half precision


# Exact no-ops.


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{"sink_threshold": 50.0}, {"image_mass": 1.0, "nonsink_ratio": 1.0}],
    ids=str,
)
def test_nothing_to_recycle_is_bitwise_stock(build: Any, attn: str, options: dict[str, Any]) -> None:
    model = build(sinks=True, attn=attn)
    inputs = collate(RAGGED)
    stock = generate(model, inputs, 3)
    vlmfix.patch(model, var(**options))
    edited = generate(model, inputs, 3)
    status = vlmfix.status(model)
    assert status.edited == (0,)
    assert torch.equal(stock[0], edited[0])
    if "image_mass" in options:  # rows are looked at while decoding: equal up to the kernel
        torch.testing.assert_close(stock[1], edited[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(stock[1][:, 0], edited[1][:, 0])
    else:
        assert torch.equal(stock[1], edited[1])


def test_text_sinks_alone_are_a_no_op(sinky: Any) -> None:
    with torch.no_grad():
        sinky.model.multi_modal_projector.linear_2.weight[list(SINK_DIMS)] = 0
    formula = NaiveVar()
    state, _ = Reference(sinky, [formula]).prompt(RAGGED[0].ids, RAGGED[0].pixels)
    sinks = [i for layer in range(4) for i, sink in enumerate(state.notes[formula, layer]) if sink]
    assert sinks
    assert not any(state.is_image[i] for i in sinks)
    inputs = collate(RAGGED)
    stock = generate(sinky, inputs, 3)
    vlmfix.patch(sinky, var())
    edited = generate(sinky, inputs, 3)
    assert torch.equal(stock[1], edited[1])
    assert vlmfix.status(sinky).edited == (0,)


# Batches, samples, precision.


def test_padding_is_never_a_sink(sinky: Any) -> None:
    with torch.no_grad():
        sinky.get_input_embeddings().weight[PAD, SINK_DIMS[0]] = 40.0
    vlmfix.patch(sinky, var())
    inputs = collate(RAGGED, pad_to=50)
    _, batch = generate(sinky, inputs, 3)
    for row, each in enumerate(RAGGED):
        _, single = generate(sinky, collate([each]), 3)
        torch.testing.assert_close(batch[row], single[0], atol=1e-5, rtol=1e-5)


def test_a_padded_image_placeholder_is_no_image(sinky: Any) -> None:
    """Padding with the placeholder's id would otherwise make every pad an image token."""
    vlmfix.patch(sinky, var())
    each = RAGGED[2]
    inputs = collate([each], pad_to=30)
    inputs["input_ids"][:, : 30 - len(each.ids)] = IMAGE
    forward(sinky, inputs)
    assert vlmfix.status(sinky).prompts_without_image == 1
