"""PAI, MMA, ACT and FIA: the invariants of their definitions, beside the agreement with the naive formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.tiny_llava import (
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    RAGGED,
    Sample,
    collate,
    forward,
    generate,
    sample,
    tiny_llava,
    words,
)
from naive.fia import NaiveFia, class_token_rows
from naive.reference import Reference

import vlmfix
from vlmfix.methods.scores import raise_scores

PAI = vlmfix.PAI(alpha=0.8, layers=":")
MMA = vlmfix.MMA(layers=":")
ACT = vlmfix.ACT(layers=":", sink_threshold="1.5/N", min_rows=2)
FIA = vlmfix.FIA(layers=":", local_ratio=0.5)
ONE = collate([RAGGED[1]])


def weights_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(forward(model, inputs, output_attentions=True).attentions)


# What holds for all of them.


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("pai", {"alpha": -0.1}),
        ("pai", {"alpha": math.inf}),
        ("mma", {"gamma": 1.5}),
        ("mma", {"columns": "answer"}),
        ("act", {"beta": 1.1}),
        ("act", {"sink_threshold": "five"}),
        ("act", {"sink_threshold": -1.0}),
        ("act", {"heads": [1, 2]}),
        ("act", {"heads": [(0, -1)]}),
        ("act", {"heads": [(0, 4)]}),
        ("act", {"heads": [(9, 0)]}),
        ("act", {"heads": [(1, 0)], "layers": [2]}),
        ("act", {"rows": "some"}),
        ("act", {"min_rows": 0}),
        ("fia", {"local_ratio": 2.0}),
        ("fia", {"beta": -1.0}),
    ],
)
def test_a_bad_parameter_is_named(tiny: Any, name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(vlmfix.MethodError, match=next(iter(parameters)).rstrip("s")):
        vlmfix.patch(tiny, name, **parameters)
    assert vlmfix.status(tiny) is None


# PAI.


def test_scores_are_raised_never_lowered() -> None:
    scores = torch.tensor([-2.0, 2.0, 3.0])[None, None, None]
    raised = raise_scores(scores.clone(), 0.5 * torch.tensor([[[[1.0, 1.0, 0.0]]]]))
    assert raised.flatten().tolist() == [-1.0, 3.0, 3.0]


@pytest.mark.parametrize("method", [PAI, FIA], ids=lambda each: each.name)
def test_only_the_last_row_of_a_prompt_changes(tiny: Any, method: Any) -> None:
    inputs = collate(RAGGED)
    stock = forward(tiny, inputs, use_cache=True)
    vlmfix.patch(tiny, method)
    edited = forward(tiny, inputs, use_cache=True)
    for before, after in zip(stock.past_key_values.layers, edited.past_key_values.layers, strict=True):
        assert torch.equal(before.keys[:, :, :-1], after.keys[:, :, :-1])
        assert torch.equal(before.values[:, :, :-1], after.values[:, :, :-1])
    assert torch.equal(stock.logits[:, :-1], edited.logits[:, :-1])
    assert (stock.logits[:, -1] - edited.logits[:, -1]).abs().amax(1)[[0, 1, 3]].min() > 0.01


def test_pai_raises_the_share_of_the_image(build: Any) -> None:
    model = build(attn="eager")
    stock = weights_of(model, ONE)
    vlmfix.patch(model, PAI, **{})
    image = ONE["input_ids"][0] == IMAGE
    before, after = (states[0][0, :, -1][:, image].sum(-1) for states in (stock, weights_of(model, ONE)))
    assert (after > before).all()


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_hidden_image_tokens_stay_hidden(build: Any, alpha: float) -> None:
    """Gains of 1 and more must not lift a masked score: an image outside the window stays outside."""
    model = build("mistral", window=6, attn="eager")
    vlmfix.patch(model, vlmfix.PAI(alpha=alpha, layers=":"))
    last = weights_of(model, ONE)[0][0, :, -1]
    assert (last[:, :-6] == 0).all()


def test_pai_without_the_prompt_leaves_the_first_token_alone(tiny: Any) -> None:
    stock = generate(tiny, ONE, 3)[1]
    vlmfix.patch(tiny, "pai", alpha=1.0, edit_prompt=False, layers=":")
    edited = generate(tiny, ONE, 3)[1]
    assert torch.equal(stock[:, 0], edited[:, 0])
    assert not torch.allclose(stock[:, 1], edited[:, 1], atol=1e-3)


# MMA.


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_only_image_rows_read_differently_in_the_first_layer(build: Any, attn: str) -> None:
    """Text rows have the model's own mask in every layer, so those before the image stay bitwise."""
    model = build(attn=attn)
    each = RAGGED[0]
    inputs = collate([each])
    image = inputs["input_ids"][0] == IMAGE
    stock = forward(model, inputs, output_hidden_states=True).hidden_states
    vlmfix.patch(model, MMA)
    edited = forward(model, inputs, output_hidden_states=True).hidden_states
    changed = (stock[1] != edited[1]).any(-1)[0]
    assert torch.equal(changed, image)
    first_image = int(image.int().argmax())
    assert all(
        torch.equal(before[:, :first_image], after[:, :first_image])
        for before, after in zip(stock, edited, strict=True)
    )
    assert not torch.equal(stock[2][0, -1], edited[2][0, -1])


def test_opened_pairs_are_the_image_and_the_question(build: Any) -> None:
    model = build(attn="eager")
    vlmfix.patch(model, MMA)
    inputs = collate(RAGGED)
    weights = weights_of(model, inputs)[0]
    for row, each in enumerate(RAGGED):
        ids = [-1] * (inputs["input_ids"].shape[1] - len(each.ids)) + list(each.ids)
        image = [i for i, token in enumerate(ids) if token == IMAGE]
        for i, token in enumerate(ids):
            if token < 0:
                continue
            for j in range(i + 1, len(ids)):
                opened = bool(image) and token == IMAGE and j > max(image)
                assert bool((weights[row, :, i, j] > 0).all()) is opened, (row, i, j)


def test_own_image_columns_reach_text_between_the_pictures(build: Any) -> None:
    model = build(attn="eager")
    vlmfix.patch(model, vlmfix.MMA(columns="own_image", layers=":"))
    each = RAGGED[1]
    weights = weights_of(model, collate([each]))[0][0]
    image = [i for i, token in enumerate(each.ids) if token == IMAGE]
    between = [i for i in range(image[0], image[-1]) if each.ids[i] != IMAGE]
    assert between
    assert (weights[:, image[0], between] > 0).all()
    assert (weights[:, image[-1], between] > 0).all()  # causal anyway
    later = image[IMAGE_TOKENS]
    assert (weights[:, image[0], later] == 0).all()  # pictures stay causal


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


def test_sinks_keep_beta_and_ratios_hold(build: Any) -> None:
    model = build(attn="eager")
    stock = weights_of(model, ONE)[0][0]
    tokens = stock.shape[-1]
    method = vlmfix.ACT(beta=0.25, layers=[0], sink_threshold=0.05, min_rows=1, heads=[(0, 1), (0, 2)])
    vlmfix.patch(model, method)
    edited = weights_of(model, ONE)[0][0]
    assert torch.equal(stock[[0, 3]], edited[[0, 3]])
    hits = 0
    for head in (1, 2):
        means = [float(stock[head, j:, j].mean()) for j in range(tokens)]
        sinks = [j for j in range(1, tokens) if means[j] > 0.05]
        rest = [j for j in range(tokens) if j not in sinks]
        assert 0 in rest
        for i in range(tokens):
            seen = [j for j in sinks if j <= i]
            if not seen:
                assert torch.equal(stock[head, i], edited[head, i])
                continue
            torch.testing.assert_close(edited[head, i, seen], 0.25 * stock[head, i, seen])
            ratio = edited[head, i, rest] / stock[head, i, rest].clamp_min(1e-30)
            ratio = ratio[[k for k, j in enumerate(rest) if j <= i]]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-4, rtol=1e-4)
            hits += 1
    assert hits > 5


def test_rows_choose_which_prompt_rows_change(tiny: Any) -> None:
    inputs = collate([RAGGED[0]])
    stock = forward(tiny, inputs, output_hidden_states=True).hidden_states[1][0]
    image = [i for i, token in enumerate(RAGGED[0].ids) if token == IMAGE]
    for rows, expected in (("last", len(stock) - 1), ("text", max(image) + 1), ("all", 0)):
        vlmfix.patch(tiny, vlmfix.ACT(rows=rows, layers=[0], sink_threshold=0.02, min_rows=1))
        edited = forward(tiny, inputs, output_hidden_states=True).hidden_states[1][0]
        changed = (stock != edited).any(-1).nonzero().flatten().tolist()
        assert changed
        assert min(changed) >= expected
        assert rows != "all" or min(changed) <= max(image)


def test_a_decoded_row_has_the_sinks_of_a_recomputation(tiny: Any) -> None:
    """Sums go on: the row of a decoded token is edited as if it had been the last row of a prompt."""
    vlmfix.patch(tiny, vlmfix.ACT(layers=[0], sink_threshold="1.5/N", min_rows=2))
    each = RAGGED[0]
    answer = words(3, 7)
    out = forward(tiny, collate([each]), use_cache=True)
    for token in answer:
        with torch.no_grad():
            out = tiny(
                input_ids=torch.tensor([[token]]),
                past_key_values=out.past_key_values,
                use_cache=True,
                output_hidden_states=True,
            )
    decoded = out.hidden_states[1][0, -1]
    whole = Sample((*each.ids, *answer), each.pixels)
    again = forward(tiny, collate([whole]), output_hidden_states=True).hidden_states[1][0, -1]
    torch.testing.assert_close(decoded, again, atol=1e-5, rtol=1e-5)


def test_a_row_wholly_on_sinks_is_left_alone() -> None:
    attn_weights = torch.tensor([[[[0.0, 0.5, 0.5], [0.2, 0.4, 0.4]]]])
    method = vlmfix.ACT(beta=0.0)
    is_sink = torch.tensor([False, True, True]).expand(1, 1, 1, 3)
    layer: Any = SimpleNamespace(constant=lambda make: torch.tensor([True]), learned=None)
    edited, rows = type("Planted", (vlmfix.ACT,), {"find_sinks": lambda *_: is_sink})(beta=0.0).edit_weights(
        attn_weights, layer
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


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"alpha": 0.3, "beta": 1.2, "local_ratio": 0.9}], ids=str)
def test_fia_agrees_with_the_formula(tiny: Any, options: dict[str, Any]) -> None:
    method = vlmfix.FIA(layers=":", **{"local_ratio": 0.5, **options})
    vlmfix.patch(tiny, method)
    stock = tiny_llava()
    _, logits = generate(tiny, collate(RAGGED), 4)
    for row, each in enumerate(RAGGED):
        naive = (
            []
            if each.pixels is None
            else [NaiveFia(range(4), each.pixels, method.alpha, method.beta, method.local_ratio)]
        )
        _, expected = Reference(stock, naive=naive).generate(each.ids, each.pixels, 4, [PAD, IMAGE])
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_share_the_patches_of_their_prompt(tiny: Any, beams: int) -> None:
    vlmfix.patch(tiny, FIA)
    options = {"num_beams": beams, "max_new_tokens": 4, "do_sample": False}
    batch = tiny.generate(**collate(RAGGED), **options)
    for row, each in enumerate(RAGGED):
        assert torch.equal(batch[row, -4:], tiny.generate(**collate([each]), **options)[0, -4:])


def test_a_second_image_in_a_later_turn_has_its_own_patches(tiny: Any) -> None:
    vlmfix.patch(tiny, FIA)
    first, second = sample(3, 1, 4, seed=21), sample(2, 1, 5, seed=22)
    out = forward(tiny, collate([first]), use_cache=True)
    token = torch.tensor([[20]])
    with torch.no_grad():
        out = tiny(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        ids = torch.tensor([second.ids[1:]])
        turn = tiny(input_ids=ids, pixel_values=second.pixels, past_key_values=out.past_key_values, use_cache=True)
    (gain,) = [value for value in turn.past_key_values._vlmfix.learned.values() if isinstance(value, torch.Tensor)]
    is_image = torch.tensor([*first.ids, 20, *second.ids[1:]]) == IMAGE
    tower = tiny_llava().model.vision_tower
    expected = [
        FIA.patch_gains(*(torch.tensor(row) for row in class_token_rows(tower, each.pixels[0])))
        for each in (first, second)
    ]
    assert torch.equal(gain[0, is_image], torch.cat(expected))
    assert not gain[0, ~is_image].any()


def test_a_tower_without_class_token_is_refused(tiny: Any) -> None:
    tower = tiny.model.vision_tower
    del getattr(tower, "vision_model", tower).embeddings.class_embedding
    with pytest.raises(vlmfix.UnsupportedModelError, match="class token"):
        vlmfix.patch(tiny, "fia")
    assert vlmfix.status(tiny) is None


def test_a_tower_of_one_layer_is_refused(tiny: Any) -> None:
    tower = tiny.model.vision_tower
    del getattr(tower, "vision_model", tower).encoder.layers[1]
    with pytest.raises(vlmfix.UnsupportedModelError, match="1 layers"):
        vlmfix.patch(tiny, "fia")


def test_features_without_patches_are_refused(tiny: Any) -> None:
    """Tiled images have no one-to-one order of patches and tokens."""
    vlmfix.patch(tiny, FIA)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="vision tower"):
        embeds = tiny.get_input_embeddings()(ONE["input_ids"])
        with torch.no_grad():
            tiny(inputs_embeds=embeds)
