"""The contrast with an edited branch: an attention method acts in the second branch, and only there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from families import available
from families.tiny_llava import IMAGE, RAGGED, Sample, collate, generate, words
from invariants import Loop, close, continued
from transformers import DynamicCache

import vlmfix
from vlmfix.decoding.sid import LeastSeenImage
from vlmfix.methods.registry import method_from_dict

ONE = collate([RAGGED[0]])
EDITS = [
    vlmfix.PAI(alpha=0.8, layers=":"),
    vlmfix.IAT(alpha=1.0, layers=":"),
    vlmfix.SPIN(keep=0.5, layers=":"),
    vlmfix.VAF(layers=":"),
    vlmfix.MMA(layers=":"),
    vlmfix.EAH(layers=[1], threshold=0.01),
]


def forced(model: Any, inputs: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of every step of a given answer ``[batch, steps + 1, vocab]``."""
    return torch.stack([step.logits[:, -1] for step in continued(model, inputs, tokens[..., None].unbind(1))], dim=1)


EACH = pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)


@EACH
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_towards_it_is_the_edited_model_and_away_its_mirror(build: Any, kind: str, edit: Any) -> None:
    """Both branches, at every step, of a padded batch."""
    model, inputs = build(kind), collate(RAGGED)
    answer = generate(model, inputs, 5)[0][:, -5:]
    stock = forced(model, inputs, answer)
    vlmfix.patch(model, edit)
    edited = forced(model, inputs, answer)
    assert (edited - stock).abs().max() > 1e-3
    vlmfix.patch(model, vlmfix.Edited(edit, mode="towards", alpha=1.0, beta=0.0))
    close(forced(model, inputs, answer), edited)
    vlmfix.patch(model, vlmfix.Edited(edit, alpha=0.5, beta=0.0))
    close(forced(model, inputs, answer), stock + 0.5 * (stock - edited))
    vlmfix.unpatch(model)
    assert torch.equal(forced(model, inputs, answer), stock)


@EACH
def test_the_first_branch_is_the_stock_model_to_the_bit(tiny: Any, edit: Any) -> None:
    answer = generate(tiny, ONE, 4)[0][:, -4:]
    caches = []
    for method in (None, vlmfix.Edited(edit)):
        if method is not None:
            vlmfix.patch(tiny, method)
        loop = Loop(tiny, ONE)
        loop.steps(*answer[0].tolist())
        caches.append(loop.cache)
    for stock, own in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(stock.keys, own.keys) and torch.equal(stock.values, own.values)
    other = caches[1]._vlmfix.branch.cache
    assert other is not None and other.get_seq_length() == caches[1].get_seq_length()


def test_methods_beside_it_act_in_the_first_branch_only(tiny: Any) -> None:
    inside, beside = vlmfix.PAI(alpha=0.8, layers=":"), vlmfix.VAF(layers=":")
    answer = generate(tiny, ONE, 4)[0][:, -4:]
    found = []
    for methods in (beside, inside, [beside, vlmfix.Edited(inside, beta=0.0)]):
        vlmfix.patch(tiny, methods)
        found.append(forced(tiny, ONE, answer))
    first, second, both = found
    close(both, 2 * first - second)


@pytest.mark.parametrize("edit", [EDITS[0], EDITS[2]], ids=lambda edit: edit.name)
def test_turns_crops_beams_and_no_cache(tiny: Any, edit: Any) -> None:
    vlmfix.patch(tiny, vlmfix.Edited(edit, beta=0.0))
    answer, question = words(3, seed=31), words(4, seed=32)
    loop = Loop(tiny, ONE)
    expected = loop.copied().steps(*answer)
    loop.steps(answer[0], 50)
    loop.cache.crop(-1)
    close(loop.read(answer[1]), expected[:, 1:2])
    loop.read(answer[2])
    assert loop.read(*question)[:, -1].isfinite().all()
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    beams = tiny.generate(**collate(RAGGED[:2]), **options)[:, -5:]
    for row, each in enumerate(RAGGED[:2]):
        assert torch.equal(beams[row], tiny.generate(**collate([each]), **options)[0, -5:])


def test_an_image_in_a_later_turn(tiny: Any) -> None:
    vlmfix.patch(tiny, vlmfix.Edited(EDITS[0], beta=0.0))
    first, later = RAGGED[2], RAGGED[0]
    loop = Loop(tiny, collate([first]))
    whole = Loop(tiny, collate([Sample((*first.ids, *later.ids), later.pixels)]))
    close(loop.read(*later.ids, pixel_values=later.pixels)[0, -1], whole.logits[0, -1])
    close(loop.read(21), whole.read(21))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "gemma3", "qwen3_5"])
def test_other_families(family: str) -> None:
    found = available(family)
    model = found.build()
    single = found.collate([found.single()])
    stock = generate(model, single, 4)[1]
    edit = vlmfix.PAI(alpha=0.8, layers=":")
    with vlmfix.patched(model, edit):
        edited = generate(model, single, 4)
    vlmfix.patch(model, vlmfix.Edited(edit, mode="towards", beta=0.0))
    assert (edited[1] - stock).abs().max() > 1e-3
    close(generate(model, single, 4)[1], edited[1])


def test_it_is_given_by_name_dict_or_method_and_kept_in_recipes(tiny: Any) -> None:
    by_hand = vlmfix.Edited(vlmfix.PAI(alpha=0.4))
    assert vlmfix.Edited({"method": "pai", "alpha": 0.4}) == by_hand
    assert vlmfix.Edited("pai") == vlmfix.Edited(vlmfix.PAI())
    assert method_from_dict(json.loads(json.dumps(by_hand.to_dict()))) == by_hand
    vlmfix.patch(tiny, "edited", edit="vaf", alpha=0.3)
    assert vlmfix.status(tiny).methods[0].edit == vlmfix.VAF()
    for wrong, reason in (("vcd", "more than that"), ("vhr", "more than that"), ("vista", "more than that"),
                          ("nothing", "no method"), (3, "edit")):  # fmt: skip
        with pytest.raises(vlmfix.MethodError, match=reason):
            vlmfix.Edited(wrong)


@pytest.mark.parametrize("keep", [1, 4, 100])
def test_sid_shows_its_branch_so_many_image_tokens(build: Any, keep: int) -> None:
    """From layer 2 on, in every forward: those with the least attention in layer 1, which stays as it is."""
    model, inputs = build(attn="eager"), collate(RAGGED)
    images = (inputs["input_ids"] == IMAGE) & torch.tensor([each.pixels is not None for each in RAGGED])[:, None]

    def watched(answer: torch.Tensor) -> list[Any]:
        cache, mask, found = DynamicCache(config=model.config), inputs["attention_mask"], []
        for step in range(answer.shape[1] + 1):
            given = inputs if step == 0 else {"input_ids": answer[:, step - 1, None], "attention_mask": mask}
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -given["input_ids"].shape[1] :]
            options = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
            with torch.no_grad():
                found.append(model(**given, **options, output_attentions=True).attentions)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return found

    answer = generate(model, inputs, 2)[0][:, -2:]
    stock = watched(answer)
    vlmfix.patch(model, LeastSeenImage(keep))
    for maps, plain in zip(watched(answer), stock, strict=True):
        for row, image in enumerate(images):
            places = image.nonzero().flatten()
            seen = [layer[row, :, -1, places].amax(0) > 0 for layer in maps]
            assert all(bool(layer.all()) for layer in seen[:2])
            wanted = maps[1][row, :, -1, places].mean(0).sort(stable=True).indices[:keep]
            for layer in seen[2:]:
                assert layer.nonzero().flatten().tolist() == sorted(wanted.tolist())
        for layer in range(2):
            if maps[0].shape[2] > 1:
                close(maps[layer], plain[layer])
