"""Families whose image is not simply among the tokens a decoder's forward is called with.

BLIP-2 and its kin (``generate`` hands embeddings over), cross-attention to image features, and encoder-decoders.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from method_parameters import parameters_of

import vlmfix
from families import Family
from families.altered import (
    ACT,
    ACTING,
    CASES,
    CROSS,
    EMBEDDED,
    ENCODED,
    EVERY,
    IDS,
    PAI,
    SPIN,
    TOKENS,
    VHR,
    build,
    edited,
    gap,
    logits,
    naive_vhr,
    recomputed,
    spelt_out,
    spied,
)
from families.tiny_llava import generate
from vlmfix.model.anatomy import analyse

# Strength zero and restoring.


@pytest.mark.parametrize("name", EVERY)
def test_strength_zero_and_unpatching_keep_every_bit(name: str) -> None:
    family, model = build(name)
    inputs = family.collate(family.ragged())
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    stock_logits, stock = family.forward(model, inputs).logits, logits(model, inputs)
    vlmfix.patch(model, "none")
    assert torch.equal(family.forward(model, inputs).logits, stock_logits)
    assert torch.equal(logits(model, inputs), stock)
    method, parameters = ACTING[name][0]
    vlmfix.patch(model, method, **parameters)
    assert gap(logits(model, inputs), stock) > 1e-3
    vlmfix.unpatch(model)
    assert torch.equal(logits(model, inputs), stock)
    for key, module in model.named_modules():
        assert vars(module).keys() == before[key].keys()
        assert getattr(module, "config", None) is before[key].get("config")


@pytest.mark.parametrize("name", ["mllama", "idefics", "florence2"])
def test_a_prompt_without_an_image_is_answered_by_the_stock_model(name: str) -> None:
    family, model = build(name)
    inputs, image = family.collate([family.text()]), family.collate([family.single()])
    stock = logits(model, inputs)
    for method, parameters in ACTING[name]:
        vlmfix.patch(model, method, **parameters)
        logits(model, image, 1)  # what is remembered of it must not leak into the next prompt
        before = edited(model)
        assert before > 0 or method == "iat"
        assert torch.equal(logits(model, inputs), stock)
        status = vlmfix.status(model)
        assert status is not None
        assert (status.edited[0], status.prompts, status.prompts_without_image) == (before, 2, 1)


@pytest.mark.parametrize("name", ["mllama", "florence2"])
def test_a_placeholder_without_pictures_is_a_word(name: str) -> None:
    family, model = build(name)
    inputs = family.collate([family.single()])
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    stock = logits(model, text)
    vlmfix.patch(model, "act", **ACT)
    assert torch.equal(logits(model, text), stock)
    status = vlmfix.status(model)
    assert status is not None
    assert (status.prompts, status.prompts_without_image, status.edited) == (1, 1, (0,))


# Which keys are image keys.


@pytest.mark.parametrize("name", [*EMBEDDED, *ENCODED])
@pytest.mark.parametrize("beams", [1, 3])
def test_image_keys_are_found_in_generate_and_in_forward(name: str, beams: int) -> None:
    family, model = build(name)
    inputs = family.collate(family.ragged() if family.text_only else family.even())
    expected = family.visual_mask(inputs["input_ids"]) & inputs["attention_mask"].bool()
    assert expected.any()
    kind = "joint" if name in EMBEDDED else "encoder"
    runs = {
        1: lambda: family.forward(model, inputs),
        beams: lambda: model.generate(**inputs, max_new_tokens=3, num_beams=beams, do_sample=False),
    }
    for times, run in runs.items():
        seen = [keys for each, _, keys in spied(model, run) if each == kind]
        assert seen
        want = expected.repeat_interleave(times, 0)
        for keys in seen:
            length = want.shape[1]
            assert torch.equal(keys["image"][:, :length], want)
            assert not keys["image"][:, length:].any()
            assert not (keys["generated"] & keys["image"]).any()
            assert not (keys["behind"] & keys["image"]).any()


@pytest.mark.parametrize("name", CROSS)
def test_all_keys_of_cross_attention_are_image_keys_of_samples_with_an_image(name: str) -> None:
    family, model = build(name)
    inputs = family.collate([family.single(), family.text()])
    kinds = set()
    for kind, _, keys in spied(model, lambda: logits(model, inputs)):
        kinds.add(kind)
        if kind == "image":
            assert keys["image"][0].all()
            assert not keys["image"][1].any()
    assert kinds == {"text", "image"}


@pytest.mark.parametrize("name", ENCODED)
def test_every_row_of_a_decoder_behind_an_encoder_is_one_of_the_answer(name: str) -> None:
    family, model = build(name)
    inputs = family.collate([family.single()])
    first = inputs["decoder_input_ids"].shape[1]
    seen = spied(model, lambda: logits(model, inputs, 3))
    assert [rows for _, rows, _ in seen] == [first] * 6 + [1] * 12
    for kind, _, keys in seen:
        if kind == "answer":
            assert keys["generated"].all()
            assert keys["first"].nonzero().tolist() == [[0, 0]]


# The formulas.


def _image_columns(family: Family, inputs: dict[str, torch.Tensor], num_keys: int) -> torch.Tensor:
    mask = family.visual_mask(inputs["input_ids"])[0]
    return torch.nn.functional.pad(mask, (0, num_keys - len(mask)))


@pytest.mark.parametrize("name", [*EMBEDDED, *ENCODED])
def test_pai_in_generate_is_what_the_formula_gives(name: str) -> None:
    family, model = build(name)
    inputs = family.collate([family.single()])
    naive = copy.deepcopy(model)
    naive.set_attn_implementation("eager")
    kind = "joint" if name in EMBEDDED else "encoder"
    modules = [site.module for site in analyse(naive).sites if site.kind == kind]
    prompt = inputs["input_ids"].shape[1] if kind == "joint" else 1

    def edit(module: Any, scores: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, None]:
        image = _image_columns(family, inputs, scores.shape[-1])
        rows = torch.arange(scores.shape[2]) >= prompt - 1
        raised = rows[:, None] & image
        return torch.where(raised, scores + 0.9 * scores.abs(), scores), None

    with spelt_out(modules, edit):
        expected = recomputed(family, naive, inputs, TOKENS)
    stock = logits(model, inputs)
    vlmfix.patch(model, "pai", **PAI)
    assert gap(logits(model, inputs), expected) < 1e-5
    assert gap(expected, stock) > 1e-2
    num_rows = sum(int(rows) for rows in [inputs.get("decoder_input_ids", torch.zeros(1, 1)).shape[1], TOKENS - 1])
    assert edited(model) == len(modules) * 4 * num_rows


@pytest.mark.parametrize("name", [*CROSS, *ENCODED])
def test_spin_in_cross_attention_is_what_the_formula_gives(name: str) -> None:
    family, model = build(name)
    inputs = family.collate([family.single()])
    naive = copy.deepcopy(model)
    naive.set_attn_implementation("eager")
    modules = [site.module for site in analyse(naive).sites if site.kind in ("image", "encoder")]
    prompt = inputs["input_ids"].shape[1] if name in CROSS else 1

    def edit(module: Any, scores: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = _image_columns(family, inputs, scores.shape[-1]) if name in ENCODED else torch.tensor(True)
        sums = torch.where(allowed & image, scores, 0.0).sum(-1)  # [1, heads, rows]
        factors = torch.ones_like(sums)
        for row in range(prompt - 1, sums.shape[2]):
            for head in sums[0, :, row].argsort()[:2].tolist():
                factors[0, head, row] = 0.1
        return scores, factors

    with spelt_out(modules, edit):
        expected = recomputed(family, naive, inputs, TOKENS)
    stock = logits(model, inputs)
    vlmfix.patch(model, "spin", **SPIN)
    assert gap(logits(model, inputs), expected) < 1e-5
    assert gap(expected, stock) > 1e-2


@pytest.mark.parametrize("name", EVERY)
def test_vhr_is_what_the_formula_gives(name: str) -> None:
    """The image-free prompt: without image tokens, from embeddings in ``generate``; without cross-attention."""
    family, model = build(name)
    inputs = family.collate([family.single()])
    ids = inputs["input_ids"]
    text = ids if name == "idefics" else ids[:, ~family.visual_mask(ids)[0]]
    naive = copy.deepcopy(model)

    def image_free() -> None:
        if name in EMBEDDED:
            naive.language_model(input_ids=text)
        elif name in ENCODED:
            inside = naive.language_model if name == "blip2_t5" else naive
            inside(input_ids=text, decoder_input_ids=inputs["decoder_input_ids"])
        elif name == "mllama":
            naive(input_ids=text)
        else:
            blank = torch.zeros_like(inputs["pixel_values"])
            naive(input_ids=text, pixel_values=blank, image_attention_mask=inputs["image_attention_mask"] * 0)

    modules = [site.module for site in analyse(naive).sites if site.kind in ("joint", "text", "encoder")]
    with naive_vhr(naive, modules, image_free, alpha=1.7):
        expected = logits(naive, inputs)
    stock = logits(model, inputs)
    vlmfix.patch(model, "vhr", **VHR)
    assert gap(logits(model, inputs), expected) < 1e-5
    assert gap(expected, stock) > 1e-2
    forward = family.forward(model, inputs).logits[:, -1]
    assert gap(forward, expected[:, 0]) < 1e-5


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("method", ["vhr", "pai", "act", "allpath"])
def test_an_answer_scores_behind_an_encoder_as_it_is_generated(name: str, method: str) -> None:
    """By labels, which begin behind what the decoder was given, and without a cache."""
    family, model = build(name)
    inputs = family.collate([family.single()])
    vlmfix.patch(model, method, **parameters_of(method, model))
    ids, expected = generate(model, inputs, 4)
    assert gap(generate(model, inputs, 4, use_cache=False)[1], expected) < 1e-5
    given = inputs.pop("decoder_input_ids").shape[1]
    labels = ids[:, 1:].clone()
    labels[:, : given - 1] = -100
    with torch.no_grad():
        scored = model(**inputs, decoder_input_ids=ids[:, :-1], labels=labels).logits
    assert gap(scored[:, -4:], expected) < 1e-5


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("method", ["pai", "spin", "act", "vaf"])
def test_cached_answers_agree_with_recomputation(name: str, method: str) -> None:
    """All rows of a decoder behind an encoder are edited, whether they come at once or one by one."""
    family, model = build(name)
    inputs = family.collate([family.single()])
    vlmfix.patch(model, method, **dict(ACTING[name])[method])
    cached = logits(model, inputs, 6)
    assert gap(logits(model, inputs, 6, use_cache=False), cached) < 1e-5
    assert gap(logits(model, inputs, 6, cache_implementation="static"), cached) < 1e-5
    assert gap(recomputed(family, model, inputs, 6), cached) < 1e-5
    assert gap(logits(model, inputs, 6, prefill_chunk_size=1), cached) < 1e-5
    assert edited(model) > 0


# Batches and beams.


@pytest.mark.parametrize(("name", "method", "parameters"), CASES, ids=IDS)
def test_a_batch_and_its_beams_equal_the_prompts_one_by_one(name: str, method: str, parameters: dict[str, Any]) -> None:
    family, model = build(name)
    samples = family.even()
    inputs, alone = family.collate(samples), [family.collate([sample]) for sample in samples]
    stock = logits(model, inputs)
    vlmfix.patch(model, method, **parameters)
    together = logits(model, inputs)
    assert gap(together, stock) > 1e-3
    assert edited(model) > 0
    for row, each in enumerate(alone):
        assert gap(logits(model, each)[0], together[row]) < 1e-5
    options = {"max_new_tokens": TOKENS, "num_beams": 3, "do_sample": False}
    beams = model.generate(**inputs, **options)
    for row, each in enumerate(alone):
        assert torch.equal(model.generate(**each, **options)[0, -TOKENS:], beams[row, -TOKENS:])
