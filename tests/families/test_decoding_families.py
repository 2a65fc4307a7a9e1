"""Decoding methods in families whose image arguments have shapes of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from invariants import Loop, close

import vlmfix
from families import available
from families.capability import Trial, measure
from families.tiny_llava import generate
from vlmfix.decoding.other_image import looks_of, packed, replace_images, unpacked
from vlmfix.methods.base import Method

SIZES = [(4, 4), (4, 8), (2, 6)]


def by_patches(pictures: Sequence[torch.Tensor], patch: int) -> torch.Tensor:
    """Pictures cut to patches one by one, row by row, and laid beside each other."""
    cut = [
        picture[:, row : row + patch, column : column + patch]
        for picture in pictures
        for row in range(0, picture.shape[1], patch)
        for column in range(0, picture.shape[2], patch)
    ]
    return torch.cat(cut, dim=-1)[None]


# MiniCPM-V 4.6: the pictures of a batch are one row of patches.


def test_rows_of_patches_are_put_together_to_pictures() -> None:
    pictures = [torch.randn(3, 5 * height, 5 * width) for height, width in SIZES]
    rows = by_patches(pictures, 5)
    assert all(torch.equal(*pair) for pair in zip(unpacked(rows, SIZES), pictures, strict=True))
    assert torch.equal(packed(pictures, 5), rows)


@pytest.mark.parametrize(
    "method", [vlmfix.VCD(), vlmfix.IFG(), vlmfix.IFG(stand_in="blurred")], ids=["vcd", "mean", "blurred"]
)
@pytest.mark.parametrize("suffix", ["", "_videos"])
def test_each_of_them_is_changed_as_a_picture_alone(method: Any, suffix: str) -> None:
    pictures = [torch.randn(3, 4 * height, 4 * width) for height, width in SIZES]
    name = f"pixel_values{suffix}"
    inputs = {name: by_patches(pictures, 4), f"target_sizes{suffix}": torch.tensor(SIZES, dtype=torch.int32)}
    found = replace_images(inputs, method.other_images)[name]
    alone = [method.other_images(name, picture[None], None)[0] for picture in pictures]
    assert torch.equal(found, by_patches(alone, 4))
    assert not torch.equal(found, inputs[name])


@pytest.mark.parametrize("method", [vlmfix.VCD(beta=0.0), vlmfix.IFG(beta=0.0)], ids=["vcd", "ifg"])
@pytest.mark.parametrize("name", ["minicpmv4_6", "phi4_multimodal"])
def test_a_batch_equals_its_prompts(name: str, method: Method) -> None:
    family = available(name)
    model, samples = family.build(), family.ragged()
    stock = generate(model, family.collate(samples), 3)[1]
    vlmfix.patch(model, method)
    together = generate(model, family.collate(samples), 3)[1]
    assert (together - stock).abs().amax((1, 2))[0] > 1e-3
    for row, each in enumerate(samples):
        close(together[row], generate(model, family.collate([each]), 3)[1][0])


@pytest.mark.parametrize("name", ["minicpmv4_6", "phi4_multimodal"])
@pytest.mark.parametrize("method", [vlmfix.PAI(), vlmfix.MMA(), vlmfix.VCD(beta=0.0)], ids=lambda method: method.name)
def test_an_image_in_a_later_turn(name: str, method: Method) -> None:
    """Text first, then an image: as if both were read at once."""
    family = available(name)
    model, text, later = family.build(), family.sample(5, 0, 4, seed=5), family.single()
    whole = family.collate([dataclasses.replace(later, ids=(*text.ids, *later.ids))])
    turn = family.collate([later]) | {"attention_mask": whole["attention_mask"]}
    stock = Loop(model, whole).logits[:, -1]
    vlmfix.patch(model, method)
    loop, at_once = Loop(model, family.collate([text])), Loop(model, whole)
    close(loop.read(**turn)[:, -1], at_once.logits[:, -1])
    close(loop.read(21), at_once.read(21))
    assert (at_once.logits[:, -1] - stock).abs().max() > 1e-3


# Phi-4: its image_attention_mask says which patches of a crop are padding, not where a token looks.


def test_masks_of_patches_are_no_masks_of_tokens() -> None:
    by_token, of_patches = torch.ones(1, 9, 2), torch.ones(1, 3, 4, 4)
    assert looks_of({"image_attention_mask": by_token})["image_attention_mask"] is by_token
    assert looks_of({"image_attention_mask": of_patches}) == {}
    assert looks_of({"cross_attention_mask": of_patches})["cross_attention_mask"] is of_patches


def test_another_question_in_phi4_contrasts_two_plain_prompts() -> None:
    family = available("phi4_multimodal")
    model = family.build()
    own = family.collate([family.single()])
    ids, hint = own["input_ids"], torch.tensor([[20, 21, 22]])
    longer = {**own, "input_ids": torch.cat([ids[:, :-1], hint, ids[:, -1:]], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    neutral, leading = (generate(model, inputs, 1)[1] for inputs in (own, longer))
    vlmfix.patch(model, "lqcd", hint=[20, 21, 22], behind=1, neutralise=False, alpha=1.0, beta=0.0)
    found = generate(model, own, 1)[1]
    close(found, 2 * neutral - leading)
    assert (found - neutral).abs().max() > 1e-3


# Llama 4 and Fuyu: generate cannot repeat their images for beams, and OPERA has no need to.


@pytest.mark.parametrize("name", ["llama4", "fuyu"])
def test_opera_reads_the_image_once(name: str) -> None:
    """The search without a penalty scores the answer it finds as the unpatched model does."""
    family = available(name)
    model = family.build()
    model.generation_config.suppress_tokens = list(family.visual_ids)
    inputs = family.collate([family.single()])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    free = {"mode": "paper", "penalty_weights": 0.0, "threshold": None, "num_attn_candidates": 40, "num_beams": 3}
    vlmfix.patch(model, "opera", **free)
    found = model.generate(**inputs, **options)
    vlmfix.unpatch(model)
    answer = found.sequences[:, -4:]
    whole = {**inputs, "input_ids": found.sequences, "attention_mask": torch.ones_like(found.sequences)}
    with torch.no_grad():
        logits = model(**whole).logits[:, -5:-1].float()
    expected = logits.log_softmax(-1).gather(-1, answer[..., None]).mean()
    close(found.sequences_scores[0], expected)
    assert measure(Trial(family), "opera").mark == "active"


# Pictures of a batch come in one tensor: what another picture is made of must not depend on what stands beside it.

PICTURES = [torch.randn(3, 8 * height, 8 * width) for height, width in ((1, 2), (3, 1))]
"""Of different sizes."""


def _padded(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([F.pad(each, (0, 16 - each.shape[2], 0, 24 - each.shape[1])) for each in pictures])


def _as_patches(picture: torch.Tensor) -> torch.Tensor:
    """``[patches, 3 * 8 * 8]``."""
    return picture.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(-1, 3 * 64)


def _beside_each_other(kind: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], Any]:
    """Arguments of a forward with both pictures, how each comes alone, and what takes it out of the tensor again."""
    rows = [_as_patches(each) for each in PICTURES]
    grid = torch.tensor([[1, 2], [3, 1]])
    if kind == "sizes":
        inputs = {"pixel_values": _padded(PICTURES), "image_sizes": 8 * grid}
        return inputs, PICTURES, lambda found: [found[0, :, :8, :16], found[1, :, :, :8]]
    if kind == "pixel mask":
        mask = _padded([torch.ones_like(each) for each in PICTURES])[:, 0].bool()
        inputs = {"pixel_values": _padded(PICTURES)[None], "pixel_attention_mask": mask[None]}
        return inputs, PICTURES, lambda found: [found[0, 0, :, :8, :16], found[0, 1, :, :, :8]]
    if kind in ("patch mask", "places"):
        padded = torch.stack([F.pad(each, (0, 0, 0, 3 - len(each))) for each in rows])
        places = torch.tensor([[[0, 0], [0, 1], [-1, -1]], [[0, 0], [1, 0], [2, 0]]])
        said = {"image_position_ids": places} if kind == "places" else {"pixel_attention_mask": places[..., 0] >= 0}
        return {"pixel_values": padded, **said}, rows, lambda found: [found[0, :2], found[1]]
    by_grid = {"pixel_values": torch.cat(rows)}
    if kind == "grid_hw":
        by_grid["image_grid_hw"] = grid
    else:
        by_grid["image_grid_thw"] = F.pad(grid, (1, 0), value=1)
        if kind == "square patches":
            by_grid["pixel_values"] = by_grid["pixel_values"].reshape(-1, 3, 8, 8)
    return by_grid, rows, lambda found: [found.reshape(5, -1)[:2], found.reshape(5, -1)[2:]]


@pytest.mark.parametrize(
    "kind", ["sizes", "pixel mask", "patch mask", "places", "grid_hw", "grid_thw", "square patches"]
)
@pytest.mark.parametrize("method", [vlmfix.VCD(), vlmfix.IFG()], ids=["vcd", "ifg"])
def test_a_picture_is_changed_as_if_it_came_alone(kind: str, method: Any) -> None:
    inputs, alone, take = _beside_each_other(kind)
    found = replace_images(inputs, method.other_images)["pixel_values"]
    assert found.shape == inputs["pixel_values"].shape
    for picture, one in zip(take(found), alone, strict=True):
        unit = one[None] if one.dim() == 3 else one
        assert torch.equal(picture.reshape(unit.shape), method.other_images("pixel_values", unit, None))
        assert not torch.equal(picture.reshape(one.shape), one)
    if "mask" in kind or kind in ("sizes", "places"):
        assert torch.equal(found == 0, inputs["pixel_values"] == 0)  # padding stays


@pytest.mark.parametrize("shape", [(16, 48), (16, 2, 14, 14, 3)])
def test_patches_that_nobody_counted_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="no argument says how many of them each picture"):
        replace_images({"pixel_values": torch.randn(shape)}, vlmfix.VCD().other_images)


def test_another_prompt_is_kept_apart_from_the_answer_at_its_own_length() -> None:
    """Unlimited-OCR sees the whole prompt and a window of the answer; ``generate`` says how long its prompt is."""
    trial = Trial(available("unlimited_ocr"))
    assert measure(trial, "icd").mark == "active"
