"""The retrieval score of heads against a spelt-out count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, RAGGED, collate, sample

import vlmfix
from vlmfix.errors import MethodError
from vlmfix.probes import retrieval


def spelt_out(model: Any, inputs: Any, needle: list[int], said: list[int]) -> torch.Tensor:
    """Share of the needle's tokens that heads copy, or of the answer's whose row looks most at it, with eager maps."""
    prompt = inputs["input_ids"][0].tolist()
    whole = torch.tensor([[*prompt, *said]])
    maps = model(
        **{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}, output_attentions=True
    ).attentions
    scores = torch.zeros(len(maps), maps[0].shape[1])
    for layer, weights in enumerate(maps):
        for head in range(weights.shape[1]):
            copied = []
            for step, token in enumerate(said):
                most = int(weights[0, head, len(prompt) - 1 + step].argmax())
                if most in needle and (prompt[most] == token or prompt[most] == IMAGE):
                    copied.append(step if prompt[most] == IMAGE else token)
            wanted = len(said) if prompt[needle[0]] == IMAGE else len({prompt[at] for at in needle})
            scores[layer, head] = len(set(copied)) / wanted
    return scores


@pytest.mark.parametrize("of_image", [False, True])
def test_the_score_is_that_of_a_spelt_out_count(build: Any, of_image: bool) -> None:
    model, inputs = build(attn="eager"), collate([sample(3, 1, 9, seed=4)])
    ids = inputs["input_ids"][0]
    needle = (ids == IMAGE) if of_image else torch.arange(len(ids)) >= len(ids) - 7
    said = [int(each) for each in ids[-5:]] * 2
    found = retrieval(model, inputs, needle[None], answers=[said])
    expected = spelt_out(model, inputs, needle.nonzero()[:, 0].tolist(), said)
    assert torch.allclose(found.score[0], expected)
    assert expected.unique().numel() > 1, "heads differ"
    assert found.counted == (len(said) if of_image else ids[needle].unique().numel(),)


def test_a_batch_is_what_its_prompts_are_alone_and_patches_act(tiny: Any) -> None:
    inputs = collate(RAGGED[:2])
    needle = inputs["input_ids"] == IMAGE
    whole = retrieval(tiny, inputs, needle, answers=[[5, 6, 7], [8, 9]])
    padding = inputs["input_ids"].shape[1] - len(RAGGED[0].ids)
    alone = retrieval(tiny, collate(RAGGED[:1]), needle[:1, padding:], answers=[[5, 6, 7]])
    assert torch.equal(whole.score[:1], alone.score)
    vlmfix.patch(tiny, "pai", alpha=1.0)
    patched = retrieval(tiny, inputs, needle, answers=[[5, 6, 7], [8, 9]])
    assert patched.patch is not None and not torch.equal(patched.score, whole.score)
    assert patched.score.mean() > whole.score.mean(), "PAI turns heads to the image"


def test_needles_that_are_none_are_refused(tiny: Any) -> None:
    inputs = collate([sample(3, 1, 6)])
    for needle in (torch.ones_like(inputs["input_ids"]), torch.zeros_like(inputs["input_ids"]).bool()):
        with pytest.raises(MethodError, match="needle must be bool"):
            retrieval(tiny, inputs, needle)
    with pytest.raises(MethodError, match="either text or image"):
        retrieval(tiny, inputs, torch.ones_like(inputs["input_ids"]).bool())
