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
    sample,
    words,
)
from naive.reference import Reference, VarSpec, redistribute, sink_value
from transformers import DynamicCache

import vlmfix
from vlmfix.methods.var import find_sinks

TAU = 3.0
SUPPRESS = [PAD, IMAGE]


def var(**options: Any) -> vlmfix.VAR:
    return vlmfix.VAR(**{"sink_dims": SINK_DIMS, "sink_threshold": TAU, "layers": ":", **options})


def spec(**options: Any) -> VarSpec:
    return VarSpec(**{"sink_dims": SINK_DIMS, "tau": TAU, "layers": range(4), **options})


def assert_partly_selected(state: Any) -> None:
    """The case has power: some rows of some heads are edited, and some are not."""
    last_image = max(i for i, image in enumerate(state.is_image) if image)
    rows = len(state.ids) - 1 - last_image
    selected = sum(len(hits) for hits in state.selected.values())
    assert 0 < selected < 4 * 4 * rows


# Fast path against the reference.


@pytest.mark.parametrize(
    ("kind", "attn"),
    [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager")],
)
def test_generation_of_a_padded_batch_agrees_with_the_reference(build: Any, kind: str, attn: str) -> None:
    model = build(kind, sinks=True, attn=attn)
    reference = Reference(model, spec())
    _, stock = generate(model, collate(RAGGED), 3)
    vlmfix.patch(model, var())
    sequences, logits = generate(model, collate(RAGGED), 3)
    for row, each in enumerate(RAGGED):
        ids, expected = reference.generate(each.ids, each.pixels, 3, SUPPRESS)
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)
        assert sequences[row, -3:].tolist() == ids
        effect = (logits[row] - stock[row]).abs().max()
        assert effect > 0.05 if each.pixels is not None else effect < 1e-5
    assert vlmfix.status(model).edited[0] > 0


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_prefill_logits_of_every_position_agree_with_the_reference(build: Any, kind: str) -> None:
    model = build(kind, sinks=True)
    reference = Reference(model, spec())
    vlmfix.patch(model, var())
    inputs = collate(RAGGED)
    logits = forward(model, inputs).logits
    for row, each in enumerate(RAGGED):
        state, expected = reference.prompt(each.ids, each.pixels)
        torch.testing.assert_close(logits[row, -len(each.ids) :], expected, atol=1e-5, rtol=1e-5)
        if each.pixels is not None:
            assert_partly_selected(state)


@pytest.mark.parametrize(
    "options",
    [
        {"recycle": 0.4},
        {"recycle": 1.0},
        {"nonsink_ratio": 0.8, "image_mass": 0.0},
        {"nonsink_ratio": 0.0, "image_mass": 0.5},
        {"nonsink_ratio": 0.0, "image_mass": 0.0},
        {"layers": (1, 3)},
        {"sink_dims": (SINK_DIMS[1],)},
        {"sink_threshold": 4.0},
    ],
    ids=str,
)
def test_every_parameter_means_what_the_paper_says(build: Any, options: dict[str, Any]) -> None:
    model = build(sinks=True)
    names = {"nonsink_ratio": "rho", "sink_threshold": "tau"}
    reference = Reference(model, spec(**{names.get(key, key): value for key, value in options.items()}))
    each = RAGGED[3]
    _, stock = generate(model, collate([each]), 2)
    vlmfix.patch(model, var(**options))
    _, logits = generate(model, collate([each]), 2)
    _, expected = reference.generate(each.ids, each.pixels, 2, SUPPRESS)
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)
    assert (logits - stock).abs().max() > 1e-3


def test_further_turns_with_a_second_image_agree_with_the_reference(sinky: Any) -> None:
    reference = Reference(sinky, spec())
    vlmfix.patch(sinky, var())
    first, second = RAGGED[0], sample(2, 1, 5, seed=8)
    state, expected = reference.prompt(first.ids, first.pixels)
    cache = DynamicCache(config=sinky.config)
    with torch.no_grad():
        out = sinky(**collate([first]), past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-5)
        for token in (SINK_WORD, 21):  # a generated token never becomes a sink
            out = sinky(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[0, 0], reference.decode(state, token), atol=1e-5, rtol=1e-5)
        _, expected = reference.prompt(second.ids[1:], second.pixels, state)
        ids = torch.tensor([second.ids[1:]])
        out = sinky(input_ids=ids, pixel_values=second.pixels, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-5)
        out = sinky(input_ids=torch.tensor([[22]]), past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[0, 0], reference.decode(state, 22), atol=1e-5, rtol=1e-5)


def test_sinks_of_a_text_only_first_turn_count_in_the_second(sinky: Any) -> None:
    reference = Reference(sinky, spec())
    vlmfix.patch(sinky, var())
    turn, second = [BOS, *words(5, 7)], RAGGED[0]
    state, _ = reference.prompt(turn, None)
    _, expected = reference.prompt(second.ids[1:], second.pixels, state)
    cache = DynamicCache(config=sinky.config)
    with torch.no_grad():
        sinky(input_ids=torch.tensor([turn]), past_key_values=cache, use_cache=True)
        ids = torch.tensor([second.ids[1:]])
        out = sinky(input_ids=ids, pixel_values=second.pixels, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-5)


def test_a_visual_sink_cropped_away_is_gone(sinky: Any) -> None:
    """The first image has no visual sink, the second has one, and is dropped: text sinks alone recycle nothing."""
    with torch.no_grad():
        sinky.model.multi_modal_projector.linear_2.weight[list(SINK_DIMS)] *= 0.5
    pixels = torch.cat([pictures(1, 52), pictures(1, 0)])
    longer = Sample((BOS, 20, *[IMAGE] * 9, 21, SINK_WORD, *[IMAGE] * 9), pixels)
    shorter = Sample(longer.ids[:13], pixels[:1])
    sinks = Reference(sinky, spec()).prompt(longer.ids, longer.pixels)[0].sinks[0]
    assert not any(sinks[2:11])
    assert any(sinks[13:])
    assert sinks[0]
    vlmfix.patch(sinky, var(layers=[0]))
    caches = [DynamicCache(config=sinky.config) for _ in range(2)]
    for cache, each in zip(caches, (longer, shorter), strict=True):
        forward(sinky, collate([each]), past_key_values=cache, use_cache=True)
    caches[0].crop(-9)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        one.keys.copy_(other.keys)
        one.values.copy_(other.values)
    found = []
    for cache in caches:
        with torch.no_grad():
            found.append(sinky(input_ids=torch.tensor([[30]]), past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_decoding_agrees_with_recomputation_without_a_cache(sinky: Any) -> None:
    vlmfix.patch(sinky, var())
    suppressed = {"suppress_tokens": [PAD, IMAGE, BOS, SINK_WORD]}
    for each in RAGGED:
        cached, logits = generate(sinky, collate([each]), 4, **suppressed)
        recomputed, expected = generate(sinky, collate([each]), 4, use_cache=False, **suppressed)
        assert torch.equal(cached, recomputed)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


# Attention rows.


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_edited_rows_of_a_layer(build: Any, layer: int, side: str) -> None:
    """With one edited layer, its stock weights are known: every row is compared with them."""
    model = build(sinks=True, attn="eager")
    inputs = collate(RAGGED, side=side)
    out = forward(model, inputs, output_attentions=True, output_hidden_states=True)
    vlmfix.patch(model, var(layers=[layer]))
    edited_out = forward(model, inputs, output_attentions=True)
    for below in range(layer):
        assert torch.equal(out.attentions[below], edited_out.attentions[below])
    stock, edited = out.attentions[layer], edited_out.attentions[layer]
    counts = {"selected": 0, "unselected": 0, "text sinks": 0}
    for row, each in enumerate(RAGGED):
        length = len(each.ids)
        where = slice(inputs["input_ids"].shape[1] - length, None) if side == "left" else slice(0, length)
        is_image = [token == IMAGE for token in each.ids]
        states = out.hidden_states[layer][row, where]
        is_sink = [sink_value(x, SINK_DIMS) >= TAU for x in states]
        last_image = max((i for i, image in enumerate(is_image) if image), default=length)
        before, after = stock[row, :, where, where], edited[row, :, where, where]
        if side == "left" and where.start:
            assert not edited[row, :, where, : where.start].any()
        for head in range(before.shape[0]):
            for position in range(length):
                a, b = before[head, position], after[head, position]
                expected, selected = redistribute(a, is_image, is_sink, spec())
                if position <= last_image or not selected:
                    assert torch.equal(a, b)
                    counts["unselected"] += position > last_image
                    continue
                counts["selected"] += 1
                torch.testing.assert_close(b, expected, atol=1e-6, rtol=1e-5)
                assert abs(b.sum() - 1) < 1e-6
                assert (b >= 0).all()
                kinds = list(zip(is_image, is_sink, strict=True))
                sinks = torch.tensor([sink for _, sink in kinds])
                rest = torch.tensor([image and not sink for image, sink in kinds])
                torch.testing.assert_close(b[sinks], 0.4 * a[sinks], atol=1e-9, rtol=1e-6)
                assert torch.equal(b[~sinks & ~rest], a[~sinks & ~rest])
                ratios = b[rest] / a[rest]
                torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
                assert ratios[0] >= 1
                counts["text sinks"] += any(
                    sink and not image and w > 0 for (image, sink), w in zip(kinds, a, strict=True)
                )
    assert all(counts.values()), counts


def test_decode_rows_of_a_layer(build: Any) -> None:
    """Editing the last layer alone leaves all keys stock, so the stock rows of a decode step are known."""
    model = build(sinks=True, attn="eager")
    each, layer = RAGGED[1], 3
    is_image = [token == IMAGE for token in each.ids] + [False] * 3
    rows: dict[str, list[torch.Tensor]] = {}
    for name in ("stock", "edited"):
        cache = DynamicCache(config=model.config)
        out = forward(model, collate([each]), past_key_values=cache, use_cache=True, output_hidden_states=True)
        states = out.hidden_states[layer][0]
        for token in (40, SINK_WORD, 41):
            with torch.no_grad():
                ids = torch.tensor([[token]])
                out = model(input_ids=ids, past_key_values=cache, use_cache=True, output_attentions=True)
            rows.setdefault(name, []).append(out.attentions[layer][0, :, 0])
        if name == "stock":
            vlmfix.patch(model, var(layers=[layer]))
    is_sink = [sink_value(x, SINK_DIMS) >= TAU for x in states] + [False] * 3
    hits = 0
    for stock, edited in zip(rows["stock"], rows["edited"], strict=True):
        for head in range(4):
            seen = stock.shape[1]
            expected, selected = redistribute(stock[head], is_image[:seen], is_sink[:seen], spec())
            torch.testing.assert_close(edited[head], expected, atol=1e-6, rtol=1e-5)
            hits += selected
    assert 0 < hits < 12
    assert vlmfix.status(model).decode_steps == 3


def test_keys_and_values_up_to_the_edited_layer_are_unchanged(sinky: Any) -> None:
    inputs = collate(RAGGED)
    stock = forward(sinky, inputs, use_cache=True).past_key_values
    vlmfix.patch(sinky, var(layers=[2]))
    edited = forward(sinky, inputs, use_cache=True).past_key_values
    for layer in range(3):
        assert torch.equal(stock.layers[layer].keys, edited.layers[layer].keys)
        assert torch.equal(stock.layers[layer].values, edited.layers[layer].values)
    assert not torch.equal(stock.layers[3].keys, edited.layers[3].keys)


def test_prompt_positions_up_to_the_last_image_token_are_bitwise_stock(sinky: Any) -> None:
    each = RAGGED[1]
    stock = forward(sinky, collate([each])).logits
    vlmfix.patch(sinky, var())
    edited = forward(sinky, collate([each])).logits
    behind = max(i for i, token in enumerate(each.ids) if token == IMAGE) + 1
    assert torch.equal(stock[:, :behind], edited[:, :behind])
    assert not torch.equal(stock[:, behind:], edited[:, behind:])


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
    [{"recycle": 0.0}, {"sink_dims": ()}, {"sink_threshold": 50.0}, {"image_mass": 1.0, "nonsink_ratio": 1.0}],
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
    state, _ = Reference(sinky, spec()).prompt(RAGGED[0].ids, RAGGED[0].pixels)
    sinks = [i for known in state.sinks.values() for i, sink in enumerate(known) if sink]
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


def test_the_default_layers_leave_out_the_first_two_and_the_last(tiny: Any) -> None:
    assert vlmfix.VAR().default_layers(32) == tuple(range(2, 31))
    vlmfix.patch(tiny, "var", sink_dims=(1,))
    assert vlmfix.status(tiny).layers == (2,)
