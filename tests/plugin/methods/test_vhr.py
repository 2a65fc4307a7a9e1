"""VHR: the fast path against the naive reference, and the invariants of the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.tiny_llava import (
    IMAGE,
    PAD,
    RAGGED,
    Sample,
    attention_modules,
    collate,
    forward,
    generate,
    pictures,
    sample,
    words,
)
from naive.reference import Reference, VhrSpec, choose_heads
from transformers import DynamicCache

import vlmfix
from vlmfix.methods.vhr import divergent_heads

SUPPRESS = [PAD, IMAGE]


def vhr(**options: Any) -> vlmfix.VHR:
    return vlmfix.VHR(**{"layers": ":", **options})


def spec(**options: Any) -> VhrSpec:
    return VhrSpec(**{"layers": range(4), **options})


def record_heads(model: Any) -> tuple[dict[int, list[torch.Tensor]], list[Any]]:
    """Collect the input of every output projection, ``[batch, rows, heads, head_dim]``, image-free passes excluded."""
    seen: dict[int, list[torch.Tensor]] = {}

    def hook(layer: int, size: int) -> Any:
        def record(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(layer, []).append(args[0].unflatten(-1, (-1, size)).clone())

        return record

    handles = [
        module.o_proj.register_forward_pre_hook(hook(module.layer_idx, module.head_dim))
        for module in attention_modules(model)
    ]
    return seen, handles


# Fast path against the reference.


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2"])
def test_generation_of_a_padded_batch_agrees_with_the_reference(build: Any, kind: str) -> None:
    model = build(kind)
    reference = Reference(model, vhr=spec())
    _, stock = generate(model, collate(RAGGED), 3)
    vlmfix.patch(model, vhr())
    sequences, logits = generate(model, collate(RAGGED), 3)
    for row, each in enumerate(RAGGED):
        ids, expected = reference.generate(each.ids, each.pixels, 3, SUPPRESS)
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)
        assert sequences[row, -3:].tolist() == ids
        effect = (logits[row] - stock[row]).abs().max()
        assert effect > 0.05 if each.pixels is not None else effect == 0


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5},
        {"alpha": 3.0},
        {"outliers": False},
        {"select": "all"},
        {"select": "unselected"},
        {"layers": (2, 3)},
        {"layers": (1, 3)},
        {"layers": (0,), "outliers": False},
    ],
    ids=str,
)
def test_every_parameter_means_what_the_paper_says(tiny: Any, options: dict[str, Any]) -> None:
    reference = Reference(tiny, vhr=spec(**options))
    each = RAGGED[1]
    _, stock = generate(tiny, collate([each]), 2)
    vlmfix.patch(tiny, vhr(**options))
    _, logits = generate(tiny, collate([each]), 2)
    _, expected = reference.generate(each.ids, each.pixels, 2, SUPPRESS)
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)
    assert (logits - stock).abs().max() > 0.01


def test_further_turns_with_a_second_image_agree_with_the_reference(tiny: Any) -> None:
    """Heads are chosen anew per prompt; the image-free stream reads the whole conversation, answers included."""
    reference = Reference(tiny, vhr=spec())
    vlmfix.patch(tiny, vhr())
    first, second = RAGGED[0], sample(2, 1, 5, seed=8)
    state, expected = reference.prompt(first.ids, first.pixels)
    cache = DynamicCache(config=tiny.config)
    with torch.no_grad():
        out = tiny(**collate([first]), past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-5)
        for token in (20, 21):
            out = tiny(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[0, 0], reference.decode(state, token), atol=1e-5, rtol=1e-5)
        frozen = {layer: list(heads) for layer, heads in state.heads.items()}
        _, expected = reference.prompt(second.ids[1:], second.pixels, state)
        assert state.heads != frozen
        ids = torch.tensor([second.ids[1:]])
        out = tiny(input_ids=ids, pixel_values=second.pixels, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-5)
        out = tiny(input_ids=torch.tensor([[22]]), past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[0, 0], reference.decode(state, 22), atol=1e-5, rtol=1e-5)


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


# What is scaled.


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_selected_heads_are_scaled_at_every_position_and_stay_frozen(tiny: Any, side: str) -> None:
    """With the last layer edited, the inputs of all output projections are known from the stock model."""
    inputs, layer = collate(RAGGED, side=side), 3
    reference = Reference(tiny, vhr=spec(layers=[layer]))
    chosen = [reference.prompt(each.ids, each.pixels)[0].heads.get(layer, [False] * 4) for each in RAGGED]
    seen = {}
    for name in ("stock", "edited"):
        seen[name], handles = record_heads(tiny)
        cache = DynamicCache(config=tiny.config)
        forward(tiny, inputs, past_key_values=cache, use_cache=True)
        if side == "left":
            mask = torch.cat([inputs["attention_mask"], torch.ones(4, 2, dtype=torch.long)], dim=1)
            for step, token in enumerate((20, 21)):
                ids = torch.full((4, 1), token)
                seen_mask = mask[:, : mask.shape[1] - 1 + step]
                with torch.no_grad():
                    positions = seen_mask.sum(1, keepdim=True) - 1
                    tiny(ids, attention_mask=seen_mask, position_ids=positions, past_key_values=cache, use_cache=True)
        for handle in handles:
            handle.remove()
        vlmfix.patch(tiny, vhr(layers=[layer]))
    lengths = (1, inputs["input_ids"].shape[1])  # the image-free pass is shorter than the prompt
    stock, edited = seen["stock"][layer], [each for each in seen["edited"][layer] if each.shape[1] in lengths]
    assert len(stock) == len(edited) == (3 if side == "left" else 1)
    for before, after in zip(stock, edited, strict=True):
        for row, heads in enumerate(chosen):
            for head, selected in enumerate(heads):
                expected = before[row, :, head] * 2 if selected else before[row, :, head]
                assert torch.equal(after[row, :, head], expected)
    counts = [sum(heads) for heads in chosen]
    assert counts[2] == 0
    assert 0 < max(counts) <= 2


def test_keys_and_values_below_the_edit_are_unchanged(tiny: Any) -> None:
    inputs = collate(RAGGED)
    stock = forward(tiny, inputs, use_cache=True).past_key_values
    vlmfix.patch(tiny, vhr(layers=[3]))
    edited = forward(tiny, inputs, use_cache=True).past_key_values
    for before, after in zip(stock.layers, edited.layers, strict=True):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
    vlmfix.patch(tiny, vhr(layers=[1]))
    edited = forward(tiny, inputs, use_cache=True).past_key_values
    assert torch.equal(stock.layers[1].keys, edited.layers[1].keys)
    assert not torch.equal(stock.layers[2].keys, edited.layers[2].keys)


def test_attention_weights_are_never_edited(build: Any) -> None:
    model = build(attn="eager")
    inputs = collate(RAGGED)
    stock = forward(model, inputs, output_attentions=True).attentions
    vlmfix.patch(model, vhr(layers=[1]))
    edited = forward(model, inputs, output_attentions=True).attentions
    assert torch.equal(stock[1], edited[1])
    valid = inputs["attention_mask"].bool()
    for weights in edited:
        sums = weights.sum(-1).transpose(1, 2)[valid]
        torch.testing.assert_close(sums, torch.ones_like(sums))


# Exact no-ops.


@pytest.mark.parametrize("select", ["divergent", "all", "unselected"])
def test_a_text_only_prompt_is_bitwise_stock(tiny: Any, select: str) -> None:
    inputs = collate([RAGGED[2], sample(12, 0, 8, seed=5)])
    stock = generate(tiny, inputs, 3)
    vlmfix.patch(tiny, vhr(select=select))
    edited = generate(tiny, inputs, 3)
    assert torch.equal(stock[1], edited[1])
    assert vlmfix.status(tiny).edited == (0,)
    assert vlmfix.status(tiny).prompts_without_image == 1


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
        _, expected = Reference(tiny, vhr=spec()).prompt(each.ids, each.pixels)
        with vlmfix.patched(tiny, vhr()):
            torch.testing.assert_close(forward(tiny, collate([each])).logits[0], expected, atol=1e-5, rtol=1e-5)


def test_embeddings_alone_are_refused_with_the_reason(tiny: Any) -> None:
    """The image-free pass needs the text."""
    vlmfix.patch(tiny, vhr())
    each = RAGGED[0]
    embeds = tiny.get_input_embeddings()(torch.tensor([each.ids]))
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="input_ids"), torch.no_grad():
        tiny(inputs_embeds=embeds, pixel_values=each.pixels)


def test_a_prompt_of_nothing_but_an_image_is_refused(tiny: Any) -> None:
    vlmfix.patch(tiny, vhr())
    each = Sample((IMAGE,) * 9, pictures(1))
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="no text"):
        forward(tiny, collate([each]))


def test_default_layers_are_the_paper_s(tiny: Any) -> None:
    assert vlmfix.VHR().default_layers(32) == (1, *range(18, 32))
    assert vlmfix.VHR().alpha == 2.0
    vlmfix.patch(tiny, "vhr")
    assert vlmfix.status(tiny).layers == (1, 2, 3)
