"""What words rest on: probabilities against plain forwards, the doubt formula, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from families import by_name
from families.tiny_llava import IMAGE, RAGGED, collate, generate, snapshot
from PIL import Image as Images
from test_probes import FAMILIES
from test_probes_knockout import masks_cut

import vlmfix
from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.evals import testbed
from vlmfix.observe.prompts import encode
from vlmfix.probes import attention_to_image, doubt, evidence, head_divergence

ANSWER = [9, 12, 7, 33]


def plain(model: Any, ids: list[int], **inputs: Any) -> torch.Tensor:
    """Probabilities of the answer behind a prompt, read at once: fp32 ``[steps]``."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *ANSWER]]), use_cache=False, **inputs).logits
    rows = logits[0, len(ids) - 1 : -1].float().softmax(-1)
    return rows[range(len(ANSWER)), ANSWER]


def test_every_probability_is_that_of_a_plain_forward(build: Any) -> None:
    model, sample = build(attn="eager"), RAGGED[0]
    inputs, ids = collate([sample]), list(sample.ids)
    found = evidence(model, inputs, answers=[ANSWER], context=[[0, 2]])
    whole = torch.tensor([[*ids, *ANSWER]])
    image, length = whole == IMAGE, len(ids)
    pixels = {"pixel_values": inputs["pixel_values"]}
    assert torch.allclose(found.probability[0], plain(model, ids, **pixels), atol=1e-5)
    text = [token for token in ids if token != IMAGE]
    assert torch.allclose(found.without_image[0], plain(model, text), atol=1e-5)
    behind = torch.arange(whole.shape[1])[None] > image[0].nonzero().max()
    with masks_cut(model, image, behind, range(4), keep_self=True):
        hidden = plain(model, ids, **pixels)
    assert torch.allclose(found.image_hidden[0], hidden, atol=1e-5)
    source = torch.zeros_like(image)
    source[0, [length, length + 2]] = True
    with masks_cut(model, source, behind, range(4), keep_self=True):
        without_words = plain(model, ids, **pixels)
    assert torch.allclose(found.context_hidden[0], without_words, atol=1e-5)
    apart = [found.probability, found.without_image, found.image_hidden]
    for one in apart:
        assert sum(torch.allclose(one, other, atol=1e-3) for other in apart) == 1, "negative control"
    assert torch.equal(found.context_hidden[0, :2], found.probability[0, :2]), "a token goes on seeing itself"
    assert (found.context_hidden - found.probability)[0, 2].abs() > 1e-3
    assert torch.allclose(found.gain(), (found.probability / found.without_image).log())
    looks = attention_to_image(model, inputs, answers=[ANSWER])
    assert torch.allclose(found.mass, looks.mass.mean((2, 3)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_gives_what_its_prompts_give(name: str) -> None:
    family = by_name(name)
    model, samples = family.build(), family.even()
    answers, context = [[9, 12, 7], [33], [20, 21]], [[0, 1], [], [0]]
    whole = evidence(model, family.collate(samples), answers=answers, context=context)
    for row, sample in enumerate(samples):
        alone = evidence(model, family.collate([sample]), answers=[answers[row]], context=[context[row]])
        for key in ("probability", "without_image", "image_hidden", "context_hidden", "mass"):
            part = getattr(whole, key)[row]
            known = len(answers[row])
            assert torch.allclose(part[:known], getattr(alone, key)[0], atol=2e-5, equal_nan=True), key
            assert part[known:].isnan().all()
    assert whole.context_hidden[1].isnan().all() and not whole.context_hidden[0].isnan().any()


@pytest.mark.parametrize("patch", [None, "vhr"])
def test_nothing_is_left_behind(tiny: Any, patch: str | None) -> None:
    inputs = collate(RAGGED)
    if patch:
        vlmfix.patch(tiny, patch)
    before, counted = generate(tiny, inputs)[1], vlmfix.status(tiny)
    seen, states = snapshot(tiny), (torch.get_rng_state(), random.getstate())
    found = evidence(tiny, inputs, max_new_tokens=3, context=[[0], [0], [0], [0]])
    assert (found.patch is None) == (patch is None)
    if patch is None:
        assert snapshot(tiny) == seen
    assert vlmfix.status(tiny) == counted
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert torch.equal(generate(tiny, inputs)[1], before)


def test_a_patch_acts_in_all_but_the_image_free_prompt(tiny: Any) -> None:
    inputs = collate(RAGGED[:1])
    stock = evidence(tiny, inputs, answers=[ANSWER])
    patched = evidence(vlmfix.patch(tiny, "vhr"), inputs, answers=[ANSWER])
    assert torch.allclose(stock.without_image, patched.without_image, atol=1e-6)
    assert not torch.allclose(stock.probability, patched.probability, atol=1e-3)
    assert not torch.allclose(stock.image_hidden, patched.image_hidden, atol=1e-3)


def test_doubt_by_hand() -> None:
    assert doubt(1.0, 0.0) == 0.0 and doubt(1.0, 1.0, 1.0) == 0.0
    assert doubt(0.5, 0.0) == pytest.approx(0.25)
    assert doubt(0.5, 0.25) == pytest.approx(0.5 * 0.75)
    assert doubt(0.5, 0.5) == doubt(0.5, 0.9) == pytest.approx(0.5)
    assert doubt(0.5, 0.5, 0.5) == pytest.approx(0.75)
    assert doubt(0.8, 0.0, 0.0) == pytest.approx(0.5)
    assert doubt(0.0, 0.3, 0.9) == 1.0
    grid = [0.0, 0.2, 0.5, 0.9, 1.0]
    values = [doubt(p, free, q) for p in grid for free in grid for q in grid]
    assert min(values) == 0 and max(values) == 1


def test_decoding_from_two_branches_is_refused_with_the_way_out(tiny: Any) -> None:
    inputs = collate(RAGGED[:1])
    vlmfix.patch(tiny, "vcd")
    with pytest.raises(UnsupportedFeatureError, match=r"vcd decodes from two.*unpatch.*answers=\[ids\]"):
        evidence(tiny, inputs)
    assert evidence(vlmfix.unpatch(tiny), inputs, answers=[ANSWER]).patch is None


def test_answers_that_are_rewritten_afterwards_are_refused_with_the_way_out() -> None:
    model, processor = testbed.load("tiny")
    inputs = encode(processor, ["<image>\nDescribe the image."], [Images.new("RGB", (96, 96))], model)
    vlmfix.patch(model, "verify", processor=processor)
    for probe in (evidence, attention_to_image, head_divergence):
        with pytest.raises(UnsupportedFeatureError, match=r"verify leaves words out.*unpatch.*answers=\[ids\]"):
            probe(model, inputs)
    assert evidence(vlmfix.patch(model, vlmfix.Verify(lost_per_false=0)), inputs).tokens, "switched off"


def test_a_context_that_does_not_fit_is_refused(tiny: Any) -> None:
    for context in ([[0]], [[4], []], [[-1], [0]]):
        with pytest.raises(MethodError, match="context must hold"):
            evidence(tiny, collate(RAGGED[:2]), answers=[ANSWER, [5]], context=context)


def test_it_writes_and_draws_itself(tiny: Any) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    found = evidence(tiny, collate(RAGGED[:2]), answers=[ANSWER, [5]])
    assert "without the image" in [line.get_label() for line in found.plot().get_lines()]
    assert found.to_dict()["context_hidden"] == [[None] * 4, [None] * 4]
