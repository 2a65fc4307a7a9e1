"""Ways to call a model that decoding methods must follow or refuse: none may give stock logits without a word."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from typing import Any

import pytest
import torch
import transformers
from families.tiny_llava import RAGGED, collate, forward, generate, sample
from invariants import close
from method_parameters import parameters_of
from transformers import DynamicCache

import vlmfix
from vlmfix.decoding.other_image import replace_images

ONE = collate([RAGGED[0]])
CONTRASTS = [
    vlmfix.VCD(beta=0.0),
    vlmfix.IFG(beta=0.0),
    vlmfix.Guidance(gamma=1.5, beta=0.0),
    vlmfix.LQCD(beta=0.0, hint=(7, 8), behind=2, neutralise=False),
]
EACH = pytest.mark.parametrize("method", CONTRASTS, ids=lambda method: method.name)


# model.forward(...) instead of model(...).


@EACH
def test_forward_called_by_its_name(tiny: Any, method: Any) -> None:
    """As PEFT did up to 0.20, and as torch's own wrappers do."""
    stock = forward(tiny, ONE).logits
    vlmfix.patch(tiny, method)
    expected = forward(tiny, ONE).logits
    assert (expected - stock).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(tiny.forward(**ONE, use_cache=True).logits, expected)
        assert torch.equal(tiny.forward(ONE["input_ids"], ONE["pixel_values"], use_cache=True).logits, expected)
        assert torch.equal(tiny.forward(**ONE, vlmfix=None).logits, stock)
        cache = DynamicCache(config=tiny.config)
        tiny.forward(**ONE, past_key_values=cache, use_cache=True)
        step = tiny.forward(input_ids=torch.tensor([[20]]), past_key_values=cache, use_cache=True).logits
        ids = torch.cat([ONE["input_ids"], torch.tensor([[20]])], dim=1)
        if method.name != "lqcd":  # whose question would end elsewhere
            close(step[:, -1], tiny(input_ids=ids, pixel_values=ONE["pixel_values"]).logits[:, -1])
        with pytest.raises(ValueError, match="input_ids"):
            tiny.forward(pixel_values=ONE["pixel_values"])
    assert inspect.signature(tiny.forward) == inspect.signature(type(tiny).forward.__get__(tiny))
    twin = copy.deepcopy(tiny)
    vlmfix.unpatch(tiny)
    assert "forward" not in vars(tiny)
    with torch.no_grad():
        assert torch.equal(tiny.forward(**ONE, use_cache=True).logits, stock)
        assert torch.equal(twin.forward(**ONE, use_cache=True).logits, expected)


def test_a_forward_that_others_have_wrapped(tiny: Any) -> None:
    """Before the patch (accelerate's hooks do) and after it, when taking the patch off leaves theirs in place."""

    def wrapped(inner: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    calls: list[int] = []
    stock = forward(tiny, ONE).logits
    vlmfix.patch(tiny, CONTRASTS[0])
    expected = forward(tiny, ONE).logits
    vlmfix.unpatch(tiny)
    tiny.forward = before = functools.partial(wrapped, tiny.forward)
    vlmfix.patch(tiny, CONTRASTS[0])
    assert torch.equal(forward(tiny, ONE).logits, expected)
    assert len(calls) == 2, "each branch passes it"
    vlmfix.unpatch(tiny)
    assert tiny.forward is before
    del tiny.forward
    vlmfix.patch(tiny, CONTRASTS[0])
    tiny.forward = functools.partial(wrapped, tiny.forward)
    assert torch.equal(forward(tiny, ONE).logits, expected)
    vlmfix.unpatch(tiny)
    assert torch.equal(forward(tiny, ONE).logits, stock)
    with torch.no_grad():
        assert torch.equal(tiny.forward(**ONE, use_cache=True).logits, stock)


def test_hooks_that_somebody_has_cleared(tiny: Any) -> None:
    vlmfix.patch(tiny, CONTRASTS[0])
    tiny._forward_pre_hooks.clear()
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="hooks"):
        forward(tiny, ONE)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="hooks"):
        tiny.forward(**ONE)


# What a prompt may come as.


@EACH
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_embeddings_beside_pictures(tiny: Any, method: Any, options: dict[str, Any]) -> None:
    """``generate(inputs_embeds=..., pixel_values=...)``, with placeholders among the embeddings."""
    inputs = collate(RAGGED[:2])
    embeds = {**inputs, "inputs_embeds": tiny.get_input_embeddings()(inputs["input_ids"]).detach()}
    del embeds["input_ids"]
    vlmfix.patch(tiny, method)
    if not method.changes_image:
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="Pass input_ids"):
            generate(tiny, embeds, 3, **options)
        return
    ids, logits = generate(tiny, inputs, 4, **options)
    found, same = generate(tiny, embeds, 4, **options)
    assert torch.equal(found[:, -4:], ids[:, -4:])
    close(same, logits)


@EACH
@pytest.mark.parametrize("size", [5, 8, 13])
def test_a_prompt_in_chunks_is_refused(tiny: Any, method: Any, size: int) -> None:
    try:
        generate(tiny, ONE, 3, prefill_chunk_size=size)
    except ValueError as error:
        pytest.skip(f"upstream: {error}")
    vlmfix.patch(tiny, method)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="prefill_chunk_size unset"):
        generate(tiny, ONE, 3, prefill_chunk_size=size)


@EACH
def test_the_last_position_of_a_row_padded_on_the_right_is_refused(tiny: Any, method: Any) -> None:
    inputs = collate([sample(3, 1, 6, seed=1), sample(3, 1, 4, seed=2)], side="right")
    vlmfix.patch(tiny, method)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Pad on the left"):
        forward(tiny, inputs, logits_to_keep=1)
    left = collate([sample(3, 1, 6, seed=1), sample(3, 1, 4, seed=2)])
    close(forward(tiny, left, logits_to_keep=1).logits[:, -1], forward(tiny, left).logits[:, -1])
    ends = inputs["attention_mask"].sum(1) - 1
    close(forward(tiny, inputs).logits[range(2), ends], forward(tiny, left).logits[:, -1])


@pytest.mark.parametrize("name", ["adaptvis", "causalmm", "deco", "dola", "flb", "pai", "vcd", "vhr", "vista"])
@pytest.mark.parametrize("places", [[3], [3, 32], [32, 3], [32, 32], [-1], [3, -1], [5, 9]], ids=str)
def test_logits_of_named_positions_are_those_of_all_or_refused(tiny: Any, name: str, places: list[int]) -> None:
    inputs = collate([RAGGED[1]])
    assert inputs["input_ids"].shape[1] == 33
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    expected = forward(tiny, inputs).logits[:, places]
    try:
        found = forward(tiny, inputs, logits_to_keep=torch.tensor(places)).logits
    except vlmfix.UnsupportedFeatureError as error:
        assert "must come last" in str(error) and name in ("causalmm", "flb", "vcd")
        assert places not in ([3, 32], [-1], [3, -1])
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_mask_longer_than_the_prompt(tiny: Any) -> None:
    """What a loop passes that makes the mask of the whole answer in advance."""
    vlmfix.patch(tiny, CONTRASTS[0])
    inputs = collate(RAGGED)
    expected = generate(tiny, inputs, 3)
    long = torch.cat([inputs["attention_mask"], torch.ones(len(RAGGED), 5, dtype=torch.int64)], dim=1)
    cache, length = DynamicCache(config=tiny.config), inputs["input_ids"].shape[1]
    positions = (long.cumsum(1) - 1).clamp_min(0)
    logits = [forward(tiny, inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
    for step, token in enumerate(expected[0][:, length : length + 2].T):
        options = {"attention_mask": long[:, : length + step + 1], "position_ids": positions[:, length + step, None]}
        with torch.no_grad():
            logits.append(tiny(input_ids=token[:, None], past_key_values=cache, **options).logits[:, -1])
    close(torch.stack(logits, dim=1), expected[1])


# Models without a next token, and pictures under several names.


def classifier() -> Any:
    text = {
        "model_type": "gemma3_text",
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    vision = {
        "model_type": "siglip_vision_model",
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 16, "patch_size": 4, "vision_use_head": False},
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3, num_labels=3
    )
    return transformers.Gemma3ForSequenceClassification(config).eval()


@pytest.mark.parametrize("method", [*CONTRASTS, vlmfix.OPERA()], ids=lambda method: method.name)
def test_a_classification_head_is_refused(method: Any) -> None:
    model = classifier()
    with pytest.raises(vlmfix.MethodError, match="next token"):
        vlmfix.patch(model, method)
    assert vlmfix.status(model) is None


@pytest.mark.parametrize("method", [vlmfix.VCD(), vlmfix.IFG()], ids=["vcd", "ifg"])
def test_every_picture_argument_is_replaced(method: Any) -> None:
    """As models take them that look at a picture in two sizes, at crops, or at frames of a video too."""
    shapes = {"pixel_values": (1, 3, 8, 8), "high_res_pixel_values": (1, 3, 16, 16), "pixel_values_local": (4, 3, 8, 8)}
    shapes |= {"pixel_values_videos": (1, 2, 3, 8, 8), "image_patches": (1, 6, 48), "flattened_patches": (1, 6, 50)}
    inputs = {name: torch.rand(shape) + 1 for name, shape in shapes.items()}
    inputs["image_sizes"] = torch.tensor([[8, 8]])
    found = replace_images(inputs, method.other_images)
    assert torch.equal(found["image_sizes"], inputs["image_sizes"])
    for name, shape in shapes.items():
        same = torch.isclose(found[name], inputs[name]).float().mean()
        assert found[name].shape == shape and same < 0.1, name
    assert torch.equal(found["flattened_patches"][..., :2], inputs["flattened_patches"][..., :2]), "row and column"


# One call of the stock model.


@pytest.mark.parametrize("method", [*CONTRASTS, vlmfix.OPERA(num_beams=2)], ids=lambda method: method.name)
def test_calls_of_the_stock_model_beside_calls_of_the_method(tiny: Any, method: Any) -> None:
    """Several ways of ``generate(..., vlmfix=None)``, each in a thread, and the method in two others."""
    if method.name == "opera" and not hasattr(tiny, "_prefill"):
        pytest.skip("refused: generate has no prefill of its own")

    def answer(number: int, **options: Any) -> torch.Tensor:
        return tiny.generate(**collate([RAGGED[number]]), max_new_tokens=6, do_sample=False, **options)

    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}]
    stock = [answer(number % len(RAGGED), **{**way, "vlmfix": None}) for number, way in enumerate(ways)]
    vlmfix.patch(tiny, method)
    expected = answer(0)
    before = vlmfix.status(tiny)
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        for _ in range(2):
            way = {**ways[number], "vlmfix": None} if number < len(ways) else {}
            found[number] = answer(number % len(RAGGED) if way else 0, **way)

    work(2)
    assert vlmfix.status(tiny) == before, "nothing is counted of it"
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(ways) + 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(len(ways) + 2):
        assert torch.equal(found[number], stock[number] if number < len(ways) else expected)
