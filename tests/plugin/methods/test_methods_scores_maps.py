"""EAH and CMAI: whose map is copied, and which image tokens are hidden from whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, RAGGED, Sample, collate, forward, generate, sample
from invariants import close
from naive.eah import NaiveEah
from naive.reference import Reference
from transformers import DynamicCache

import vlmfix
from vlmfix.methods.cmai import CMAI, low_focus
from vlmfix.methods.eah import EAH

ONE = collate([RAGGED[1]])


def cmai(**options: Any) -> CMAI:
    return CMAI(experimental=True, **options)


# EAH: one map for all heads.


def test_eah_without_sinks_is_bitwise_stock(build: Any) -> None:
    model, inputs = build(), collate(RAGGED)
    stock = generate(model, inputs, 3)[1]
    vlmfix.patch(model, EAH(0.9, layers=":"))
    assert torch.equal(generate(model, inputs, 3)[1], stock)
    assert vlmfix.status(model).edited == (0,)


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
