"""Odd but legal ways to call a patched model, each of which was once answered wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import available
from families.tiny_llava import (
    PAD,
    RAGGED,
    Sample,
    attention_modules,
    collate,
    forward,
    generate,
    needs_chunks,
    position_ids,
    sample,
    words,
)
from invariants import Loop, close
from method_parameters import parameters_of
from transformers import DynamicCache, StaticCache

import vlmfix
from vlmfix.methods.measured import Calibration

VHR = vlmfix.VHR(layers=":")


@pytest.mark.parametrize("method", [VHR, vlmfix.PAI(alpha=0.8, layers=":")], ids=["vhr", "pai"])
def test_arguments_by_position_equal_those_by_name(tiny: Any, method: Any) -> None:
    """A padding mask given by position counts too: without it, pads are text, and the last row is one of them."""
    inputs = collate([RAGGED[0], RAGGED[1]], side="right")
    vlmfix.patch(tiny, method)
    with torch.no_grad():
        expected = tiny(**inputs).logits
        found = tiny(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", [VHR, vlmfix.MMA(layers=":"), None], ids=["vhr", "mma", "none"])
def test_padding_behind_a_short_answer_is_no_text_of_the_next_turn(tiny: Any, method: Any) -> None:
    """Answers of a batch end at different lengths; the caller hides what fills up the shorter ones."""
    if method is not None:
        vlmfix.patch(tiny, method)
    question, answer = torch.tensor([words(4, seed=5), words(4, seed=6)]), torch.tensor([[20, PAD, PAD], [21, 22, 23]])
    inputs = collate([RAGGED[0], RAGGED[1]])
    batch, single = DynamicCache(config=tiny.config), DynamicCache(config=tiny.config)
    forward(tiny, inputs, past_key_values=batch, use_cache=True)
    forward(tiny, collate([RAGGED[0]]), past_key_values=single, use_cache=True)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        for ids in (*answer.split(1, dim=1), question):
            new = torch.ones_like(ids) if ids is question else (ids != PAD).long()
            mask = torch.cat([mask, new], dim=1)
            positions = position_ids(mask)[:, -ids.shape[1] :]
            options = {"attention_mask": mask, "position_ids": positions, "past_key_values": batch, "use_cache": True}
            found = tiny(input_ids=ids, **options).logits[0]
        for ids in (answer[:1, :1], question[:1]):
            expected = tiny(input_ids=ids, past_key_values=single, use_cache=True).logits[0]
    close(found, expected)


@pytest.mark.parametrize("strength", [1, 60])
def test_half_precision_scores_do_not_overflow(build: Any, strength: int) -> None:
    """Products of queries and keys pass 65504 in some models, where fused kernels scale them first."""
    model = build(hidden=256, heads=2, kv_heads=1).half()
    inputs = collate([RAGGED[0]])
    inputs["pixel_values"] = inputs["pixel_values"].half()
    with torch.no_grad():
        for module in attention_modules(model):
            module.q_proj.weight.mul_(strength)
            module.k_proj.weight.mul_(strength)
    stock = generate(model, inputs, 3)[1]
    assert stock.isfinite().all()
    vlmfix.patch(model, "pai", alpha=1e-6, layers=":")
    found = generate(model, inputs, 3)[1]
    assert found.isfinite().all()
    assert vlmfix.status(model).edited[0] > 0
    if strength == 1:  # beyond, softmax is one-hot and a rounding decides
        torch.testing.assert_close(found, stock, atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", [None, 3000], ids=["whole", "in chunks"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["act", "cmai", "eah", "iri", "pai", "vaf", "var", "vhr", "vista"])
def test_gradients_are_the_same_under_checkpointing(
    tiny: Any, name: str, reentrant: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are computed again behind the forward: what a method learned in it is not learned twice."""
    if chunk is not None:
        monkeypatch.setattr("vlmfix.model.attention.CHUNK_ELEMENTS", chunk)
    inputs = collate([RAGGED[0], RAGGED[1]])
    more = {"vaf": {"heads": "visual"}}.get(name, {})
    name = name.partition(" ")[0]
    vlmfix.patch(tiny, name, **{**parameters_of(name, tiny), **more})
    found = []
    for again in (False, True):
        if again:
            tiny.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            tiny.enable_input_require_grads()
            tiny.train()
        tiny.zero_grad()
        positions = position_ids(inputs["attention_mask"])
        options = {"labels": inputs["input_ids"], "position_ids": positions, "use_cache": False}
        tiny(**inputs, **options).loss.backward()
        found.append([module.q_proj.weight.grad.clone() for module in attention_modules(tiny)])
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.abs().max() > 0
        close(checkpointed, plain)


@pytest.mark.parametrize("name", ["vhr", "vista", "vcd", "m3id"])
def test_a_cache_whose_rows_were_put_in_another_order_is_refused(tiny: Any, name: str) -> None:
    vlmfix.patch(tiny, name)
    inputs = collate([RAGGED[0], RAGGED[3]])
    loop, swapped = Loop(tiny, inputs), torch.tensor([1, 0])
    loop.cache.batch_select_indices(swapped)
    mask = F.pad(inputs["attention_mask"][swapped], (0, 1), value=1)
    step = {"input_ids": torch.tensor([[20], [20]]), "attention_mask": mask}
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="put in another order"):
        loop.read(**step)
    loop.read(**step, vlmfix=None)  # the stock model has no need to know


def test_a_cache_whose_rows_were_picked_or_repeated_is_refused(tiny: Any) -> None:
    """Unless a single prompt is continued in several ways, which is what it was repeated for."""
    vlmfix.patch(tiny, VHR)
    picked, one, two = Loop(tiny, collate(RAGGED)), Loop(tiny, collate([RAGGED[0]])), torch.tensor([[21], [20]])
    repeated = one.copied()
    picked.cache.batch_select_indices(torch.tensor([2, 0]))
    repeated.cache.batch_repeat_interleave(2)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="a batch of 4 sequences and is now used with 2"):
        picked.read(input_ids=two)
    close(repeated.read(input_ids=two)[1:], one.read(20))
    vlmfix.patch(tiny, "act", **parameters_of("act", tiny))
    act = Loop(tiny, collate([RAGGED[0]]))
    act.cache.batch_repeat_interleave(2)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="a batch of 1 sequences and is now used with 2"):
        act.read(input_ids=two)


def test_an_image_may_come_in_the_second_turn(tiny: Any) -> None:
    """Turns before it are stock, alone as beside a conversation whose first turn has one."""
    image = sample(2, 1, 6, seed=4)
    text = Sample(tuple(words(len(image.ids), seed=4)))
    second = sample(1, 1, 6, seed=23)
    vlmfix.patch(tiny, "act", **parameters_of("act", tiny))
    found = []
    for first in ([text], [text, image]):
        loop = Loop(tiny)
        for turn in (first, [second] * len(first)):
            loop.read(**{name: value for name, value in collate(turn).items() if name != "attention_mask"})
            logits = loop.read(input_ids=torch.full((len(first), 1), 20))[0]
        found.append(logits)
    close(*found)
    assert vlmfix.status(tiny).edited[0] > 0


@pytest.mark.parametrize("name", ["video_llama_3", "qwen2_5_omni"])
def test_drafts_are_refused_where_they_look_like_a_further_turn(name: str) -> None:
    family = available(name)
    model = family.build()
    inputs = family.collate([family.single()])
    options = {"max_new_tokens": 6, "do_sample": False}
    stock = model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    vlmfix.patch(model, "iat", layers=":")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="logits_to_keep"):
        model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3, vlmfix=None), stock)
    vlmfix.patch(model, "none")
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), stock)
    vlmfix.unpatch(model)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), stock)


@needs_chunks
@pytest.mark.parametrize("name", ["var", "vaf", "cmai", "modality_balance"])
def test_a_further_image_in_a_later_part_of_a_prompt_is_refused(tiny: Any, name: str) -> None:
    """The rows between the images are behind the last one only until then; one image may come in any part."""
    one, two = collate([sample(3, 1, 6, seed=2)]), collate([sample(3, 2, 6, seed=2, between=4)])
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    close(generate(tiny, one, 3, prefill_chunk_size=5)[1], generate(tiny, one, 3)[1])
    close(generate(tiny, two, 3, prefill_chunk_size=27)[1], generate(tiny, two, 3)[1])
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="needs a prompt in one forward"):
        generate(tiny, two, 3, prefill_chunk_size=16)


def test_a_saved_recipe_is_taken_as_a_dict_too(tiny: Any, tmp_path: Path) -> None:
    vlmfix.save_recipe(tmp_path / "recipe.json", [vlmfix.PAI(layers=":"), VHR])
    vlmfix.patch(tiny, json.loads((tmp_path / "recipe.json").read_text(encoding="utf-8")))
    assert [method.name for method in vlmfix.status(tiny).methods] == ["pai", "vhr"]


@pytest.mark.parametrize("method", [VHR, vlmfix.PAI(layers=":")], ids=["vhr", "pai"])
def test_embeddings_of_a_prompt_without_an_image_are_left_alone(tiny: Any, method: Any) -> None:
    inputs = collate([sample(9, 0, 4, seed=3)])
    embeds = {"inputs_embeds": tiny.get_input_embeddings()(inputs["input_ids"]).detach()}
    stock = generate(tiny, embeds, 3)[1]
    vlmfix.patch(tiny, method)
    assert torch.equal(generate(tiny, embeds, 3)[1], stock)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="no image placeholder"):
        generate(tiny, {"inputs_embeds": embeds["inputs_embeds"] + 0.1}, 3)


def test_what_was_calibrated_is_saved_beside_other_methods(tmp_path: Path) -> None:
    found = Calibration(vlmfix.ACT(heads=[(1, 2)]), {})
    for chosen in (found, [found, VHR]):
        vlmfix.save_recipe(tmp_path / "recipe.json", chosen)
        assert found.method in vlmfix.load_recipe(tmp_path / "recipe.json")


@pytest.mark.parametrize("name", ["vhr", "act", "pai"])
@pytest.mark.parametrize("is_additive", [False, True], ids=["bool", "additive"])
def test_padding_that_sees_itself_is_padding(tiny: Any, name: str, is_additive: bool) -> None:
    """Masks written out by a caller often leave padding its own key, so that no row is empty."""
    inputs = collate(RAGGED)
    tokens, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    pairs = torch.ones(length, length, dtype=torch.bool).tril() & tokens[:, None, None]
    pairs = pairs | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(pairs.shape).masked_fill(~pairs, -torch.inf) if is_additive else pairs
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    expected = forward(tiny, inputs).logits
    with torch.no_grad():
        positions = position_ids(inputs["attention_mask"])
        found = tiny(**{**inputs, "attention_mask": mask}, position_ids=positions).logits
    close(found[tokens], expected[tokens])


@pytest.mark.parametrize("name", ["vhr", "act", "var", "pai", "mma"])
def test_a_further_turn_on_a_static_cache_of_sliding_layers(build: Any, name: str) -> None:
    """The mask that generate writes out for it has no columns for what the window has left behind."""
    model = build("mistral", sinks=True, window=8)
    vlmfix.patch(model, name, **parameters_of(name, model))
    options = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True, "return_dict_in_generate": True}
    found = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=80)):
        ids = model.generate(**collate([RAGGED[0]]), past_key_values=cache, **options).sequences
        ids = torch.cat([ids, torch.tensor([words(5, 3)])], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        found.append(torch.cat(model.generate(**inputs, **options, output_logits=True).logits))
    close(*found)


@pytest.mark.parametrize("most", [2**24, 2**6])
def test_opened_rows_behind_pieces_of_padding_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A piece of 256 rows may see no key. The pieces of a long prompt, here any, are made one by one in every layer."""
    monkeypatch.setattr("vlmfix.engine.base_output.CHUNK_ELEMENTS", most)
    vlmfix.patch(tiny, "mma")
    inputs = collate([RAGGED[0]])
    expected = forward(tiny, inputs).logits[:, -1]
    pads = torch.zeros(1, 300, dtype=torch.long)
    padded = {
        **inputs,
        "input_ids": torch.cat([pads + PAD, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([pads, inputs["attention_mask"]], 1),
    }
    close(forward(tiny, padded).logits[:, -1], expected)
    assert vlmfix.status(tiny).moved[0] > 0.01
