"""EAH and CMAI: whose map is copied, and which image tokens are hidden from whom."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, RAGGED, Sample, collate, forward, generate, pictures, sample
from invariants import close
from naive.eah import NaiveEah
from naive.reference import Reference
from transformers import DynamicCache

import vlmfix
from vlmfix.methods.cmai import CMAI, low_focus
from vlmfix.methods.eah import EAH
from vlmfix.methods.modality_balance import ModalityBalance

ONE = collate([RAGGED[1]])


def balance(**options: Any) -> ModalityBalance:
    return ModalityBalance(experimental=True, **options)


def cmai(**options: Any) -> CMAI:
    return CMAI(experimental=True, **options)


# EAH: one map for all heads.


def eah_heads(model: Any, layer: int) -> tuple[list[torch.Tensor], Any]:
    """Record head outputs of a layer, ``[batch, rows, heads, head_dim]``."""
    seen: list[torch.Tensor] = []
    module = model.model.language_model.layers[layer].self_attn
    hook = module.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].unflatten(-1, (4, -1))))
    return seen, hook


@pytest.mark.parametrize("threshold", [0.002, 0.06, "auto"])
def test_eah_copies_the_map_of_the_head_with_most_sinks(build: Any, threshold: Any) -> None:
    model, inputs = build(attn="eager"), collate(RAGGED)
    length = inputs["input_ids"].shape[1]
    formula = NaiveEah([1], threshold)
    states = [Reference(model, naive=[formula]).prompt(each.ids, each.pixels)[0] for each in RAGGED]
    seen, hook = eah_heads(model, 1)
    values: list[torch.Tensor] = []
    v_proj = model.model.language_model.layers[1].self_attn.v_proj
    v_hook = v_proj.register_forward_hook(lambda *args: values.append(args[2].unflatten(-1, (2, -1))))
    stock = forward(model, inputs, output_attentions=True).attentions
    vlmfix.patch(model, EAH(threshold))
    edited = forward(model, inputs, output_attentions=True).attentions
    hook.remove()
    v_hook.remove()
    assert torch.equal(stock[0], edited[0])
    winners = set()
    for row, each in enumerate(RAGGED):
        pad = length - len(each.ids)
        if each.pixels is None:
            assert torch.equal(seen[0][row], seen[1][row])
            continue
        best, counts = states[row].notes[formula, 1]
        assert max(counts) > 0
        winners.add(best)
        assert torch.equal(seen[0][row, :, best], seen[1][row, :, best])
        copied = stock[1][row, best, pad:]
        for head in range(4):
            assert torch.equal(edited[1][row, head, pad:], copied)
            close(seen[1][row, pad:, head], copied @ values[0][row, :, head // 2])
    if threshold == 0.002:
        assert winners == {0}, "every head ties: the first one, and it is broadcast"
    else:
        assert winners - {0}


def test_eah_without_sinks_is_bitwise_stock(build: Any) -> None:
    model, inputs = build(), collate(RAGGED)
    stock = generate(model, inputs, 3)[1]
    vlmfix.patch(model, EAH(0.9, layers=":"))
    assert torch.equal(generate(model, inputs, 3)[1], stock)
    assert vlmfix.status(model).edited == (0,)


def test_eah_never_edits_decode_rows(build: Any) -> None:
    model = build()
    vlmfix.patch(model, EAH())
    cache = DynamicCache(config=model.config)
    forward(model, ONE, past_key_values=cache, use_cache=True)
    edited = vlmfix.status(model).edited
    assert edited == (3 * len(RAGGED[1].ids),)
    kept = copy.deepcopy(cache)
    del kept._vlmfix
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[20]]), past_key_values=cache, use_cache=True).logits
        vlmfix.unpatch(model)
        assert torch.equal(model(input_ids=torch.tensor([[20]]), past_key_values=kept, use_cache=True).logits, found)


def test_eah_sums_up_the_prompt_alone_and_all_of_it(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft beside the prompt is not counted; pieces of a map are."""
    model, each, draft = build(), RAGGED[1], (40, 41, 42)
    vlmfix.patch(model, EAH())
    prompts, found = [each.ids, (*each.ids, *draft), each.ids], []
    for number, ids in enumerate(prompts):
        if number == 2:
            monkeypatch.setattr("vlmfix.model.attention.CHUNK_ELEMENTS", 5 * 4 * len(ids))
        cache = DynamicCache(config=model.config)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": len(ids) - len(each.ids) + 1}
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), pixel_values=each.pixels, **options)
        (columns,) = cache._vlmfix.learned.values()
        found.append([part[..., : len(each.ids)] for part in columns])
    assert found[0][1][0].tolist() == list(range(len(each.ids) - 1, -1, -1))
    for sums, counts in found[1:]:
        close(sums, found[0][0])
        close(counts, found[0][1])


def test_eah_counts_no_row_for_an_image_at_the_end(build: Any) -> None:
    """The last image token has no later row: N_j is 0, and it is no sink."""
    model, each = build(), sample(3, 1, 0, seed=5)
    each = Sample(each.ids[: each.ids.index(IMAGE) + 9], each.pixels)
    formula = NaiveEah(range(4), 0.0)
    state, expected = Reference(model, naive=[formula]).prompt(each.ids, each.pixels)
    assert max(state.notes[formula, 0][1]) == 8
    vlmfix.patch(model, EAH(0.0, layers=":"))
    close(forward(model, collate([each])).logits[0], expected)


# CMAI: what is kept.


def test_low_focus_keeps_the_smallest_set() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 12, generator=generator) < 0.7
    focus = torch.rand(3, 5, 12, generator=generator) ** 3 * image[:, None]
    focus[0, 0] = 0
    for rho in (0.1, 0.5, 0.9):
        dropped = low_focus(focus, image, rho)
        assert not dropped[0, 0].any()
        assert not (dropped & ~image[:, None]).any()
        for row, seen, lost in zip(
            focus.flatten(0, 1), image.repeat_interleave(5, 0), dropped.flatten(0, 1), strict=True
        ):
            kept = row[seen & ~lost]
            if row.sum() > 0:
                assert kept.sum() >= rho * row.sum() - 1e-6
                assert kept.sum() - kept.min() < rho * row.sum()
                assert kept.min() >= row[lost].max() if lost.any() else True


@pytest.mark.parametrize("renorm", ["none", "image"])
def test_cmai_hides_image_tokens_from_text_rows_alone(build: Any, renorm: str) -> None:
    model, inputs = build(attn="eager"), ONE
    stock = forward(model, inputs, output_attentions=True).attentions[2]
    vlmfix.patch(model, cmai(rho=0.4, renorm=renorm, layers=[0, 2]))
    edited = forward(model, inputs, output_attentions=True).attentions[2]
    image = inputs["input_ids"][0] == IMAGE
    start = int(image.nonzero().max()) + 1
    rows = edited[0, :, start:, image]
    assert torch.equal(rows == 0, (rows == 0)[:1].expand_as(rows)), "all heads lose the same"
    assert (rows == 0).any(-1).all()
    assert (rows > 0).any(-1).all()
    before, after = (each[0, :, start:, image].sum(-1) for each in (stock, edited))
    if renorm == "image":
        close(after, before)
    else:
        assert (after < before).all()
    text = edited[0, :, start:, ~image] / stock[0, :, start:, ~image].clamp_min(1e-30)
    seen = stock[0, :, start:, ~image] > 0
    for ratios, mask in zip(text.flatten(0, 1), seen.flatten(0, 1), strict=True):
        close(ratios[mask], ratios[mask][:1].expand_as(ratios[mask]))


def test_cmai_needs_a_reference_layer_and_one_to_edit(build: Any) -> None:
    with pytest.raises(vlmfix.MethodError, match="needs two"):
        vlmfix.patch(build(), cmai(layers=[2]))


def test_a_cache_cropped_into_the_prompt_continues_like_a_fresh_one(build: Any) -> None:
    """The second image goes; what text looked at is kept for the first one."""
    model, each = build(), RAGGED[0]
    longer = Sample((*each.ids, 20, *[IMAGE] * 9, 21), torch.cat([each.pixels, pictures(1, 6)]))
    vlmfix.patch(model, cmai(rho=0.5))
    kept, fresh = DynamicCache(config=model.config), DynamicCache(config=model.config)
    forward(model, collate([longer]), past_key_values=kept, use_cache=True)
    forward(model, collate([each]), past_key_values=fresh, use_cache=True)
    kept.crop(-11)
    for one, other in zip(kept.layers, fresh.layers, strict=True):  # rows of the longer prompt were not edited alike
        one.keys.copy_(other.keys)
        one.values.copy_(other.values)
    for token in (20, 21, 22):
        with torch.no_grad():
            options = {"input_ids": torch.tensor([[token]]), "use_cache": True}
            close(model(**options, past_key_values=kept).logits, model(**options, past_key_values=fresh).logits)
