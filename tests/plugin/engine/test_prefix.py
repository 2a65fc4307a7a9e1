"""Prompts that continue a shared prefix are answered like whole ones, or the prefix is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, available, by_name
from method_parameters import IN_FORWARDS, parameters_of
from transformers import DynamicCache

import vlmfix
from vlmfix.errors import MethodError, UnsupportedFeatureError, UnsupportedModelError

LEAVE_PREFIXES = {"none", "adaiat", "deco", "dola", "hgai", "iat", "iri", "modality_balance", "pai", "vaf", "var"}
"""Every other method edits or reads rows up to the last image token, or looks at the whole prompt."""


SHARE = {"llava", "llava_next", "llava_onevision", "vipllava", "internvl", "idefics3", "smolvlm", "mistral3", "pixtral"}
"""Some of the families whose prompts must be able to share a prefix."""


@pytest.fixture(scope="module")
def _model() -> Any:
    return by_name("llava").build()


@pytest.fixture
def model(_model: Any) -> Iterator[Any]:
    yield _model
    assert vlmfix.status(_model) is None


def questions(family: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[int]]:
    """Two images with a prompt each, five whole prompts about them, and which image each is about."""
    rows = [0, 0, 0, 1, 1]
    first = [family.sample(before, 1, 6, seed=seed) for before, seed in ((3, 1), (5, 2))]
    asked = []
    for number, row in enumerate(rows):
        behind = family.sample(0, 0, 3 + number, seed=20 + number).ids[-3 - number :]
        asked.append(dataclasses.replace(first[row], ids=(*first[row].ids[:-6], *behind)))
    return family.collate(first), family.collate(asked), rows


def answered(model: Any, inputs: dict[str, Any], tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens ``[prompts, tokens]`` and their logits ``[tokens, prompts, vocabulary]``."""
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -tokens:], torch.stack(out.logits)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", IN_FORWARDS)
def test_a_method_goes_on_from_a_prefix_or_refuses_it(name: str, model: Any) -> None:
    first, whole, rows = questions(by_name("llava"))
    stock = answered(model, whole)[1]
    plain = vlmfix.shared_prefix(model, first)
    with vlmfix.patched(model, name, **parameters_of(name, model)):
        if name not in LEAVE_PREFIXES:
            with pytest.raises(UnsupportedFeatureError, match=f"{name} edits or reads"):
                vlmfix.shared_prefix(model, first)
            with pytest.raises(UnsupportedFeatureError, match=f"{name} edits or reads"):
                plain.continued(whole, rows)
            return
        expected = answered(model, whole)
        own = vlmfix.shared_prefix(model, first)
        found = answered(model, own.continued(whole, rows))
        assert torch.equal(found[0], expected[0])
        close(found[1], expected[1])
        if name != "none":
            assert (expected[1] - stock).abs().max() > 1e-3, "the edit is visible"
        if name == "var":
            with pytest.raises(UnsupportedFeatureError, match="var learns from the rows of the prefix"):
                plain.continued(whole, rows)
        else:
            close(answered(model, plain.continued(whole, rows))[1], expected[1])
    close(answered(model, own.continued(whole, rows))[1], stock)


def test_a_prefix_is_continued_again_and_again(model: Any) -> None:
    """Each time from a cache of its own; a single row by any number of prompts."""
    family = by_name("llava")
    first, whole, rows = questions(family)
    prefix = vlmfix.shared_prefix(model, first)
    before = [keys.clone() for keys, _ in prefix.layers]
    once = answered(model, prefix.continued(whole, rows))
    again = answered(model, prefix.continued(whole, rows))
    assert all(map(torch.equal, once, again))
    assert all(torch.equal(keys, kept) for (keys, _), kept in zip(prefix.layers, before, strict=True))
    one = vlmfix.shared_prefix(model, family.collate([family.sample(3, 1, 6, seed=1)]))
    three = {name: value[:3] for name, value in whole.items()}
    close(answered(model, one.continued(three))[1], once[1][:, :3])


@pytest.mark.parametrize("method", [None, "pai"])
def test_a_prefix_read_with_other_weights_is_refused(method: str | None) -> None:
    """Adapters are switched, disabled and merged; a patch, answers and what goes back to as it was change nothing."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(by_name("llava").build(), adapter, adapter_name="a").eval()
    wrapped.add_adapter("b", adapter)
    first, whole, rows = questions(by_name("llava"))
    prefix = vlmfix.shared_prefix(wrapped, first)
    if method is not None:
        vlmfix.patch(wrapped, method)
    expected = answered(wrapped, whole)
    wrapped.set_adapter("b")
    with pytest.raises(UnsupportedFeatureError, match="an adapter was switched"):
        prefix.continued(whole, rows)
    wrapped.set_adapter("a")
    with wrapped.disable_adapter(), pytest.raises(UnsupportedFeatureError, match="an adapter was switched"):
        prefix.continued(whole, rows)
    close(answered(wrapped, prefix.continued(whole, rows))[1], expected[1])
    wrapped.merge_adapter()
    with pytest.raises(UnsupportedFeatureError, match="an adapter was switched"):
        prefix.continued(whole, rows)


def test_a_prefix_read_before_training_is_refused(model: Any) -> None:
    first, whole, rows = questions(by_name("llava"))
    prefix = vlmfix.shared_prefix(model, first)
    prefix.continued(whole, rows)
    with torch.no_grad():
        model.lm_head.weight.add_(0.0)  # an optimizer's step
    with pytest.raises(UnsupportedFeatureError, match="weights were changed"):
        prefix.continued(whole, rows)


def test_further_turns_go_on(model: Any) -> None:
    """The prompt that continues a prefix is continued itself, under a patch too."""
    first, whole, rows = questions(by_name("llava"))
    more = torch.randint(5, 60, (len(rows), 4), generator=torch.Generator().manual_seed(3))
    for method in ("none", "pai", "var"):
        with vlmfix.patched(model, method, **parameters_of(method, model)):
            found = []
            for inputs in (whole, vlmfix.shared_prefix(model, first).continued(whole, rows)):
                inputs = dict(inputs)
                cache = inputs.setdefault("past_key_values", DynamicCache())
                told = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
                ids = torch.cat([told, more], dim=1)
                mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 3 + 4, dtype=torch.long)], dim=1)
                turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
                found.append(answered(model, turn)[1])
            close(found[1], found[0])


def test_prompts_that_begin_otherwise_are_refused(model: Any) -> None:
    first, whole, _ = questions(by_name("llava"))
    prefix = vlmfix.shared_prefix(model, first)
    with pytest.raises(UnsupportedFeatureError, match="does not continue row 1"):
        prefix.continued(whole, [1, 0, 0, 1, 1])
    with pytest.raises(UnsupportedFeatureError, match="Say which row"):
        prefix.continued(whole)
    other = {**whole, "pixel_values": whole["pixel_values"].flip(0)}
    with pytest.raises(UnsupportedFeatureError, match="not those that this prefix was read with"):
        prefix.continued(other, [0, 0, 0, 1, 1])
    of_one = vlmfix.shared_prefix(model, {name: value[:1] for name, value in first.items()})
    with pytest.raises(UnsupportedFeatureError, match="not those that this prefix was read with"):
        of_one.continued({name: value[:2] for name, value in other.items()})
    short = {name: value[:, : prefix.input_ids.shape[1] + 1] for name, value in first.items() if name != "pixel_values"}
    with pytest.raises(UnsupportedFeatureError, match="at least two behind"):
        prefix.continued({name: value[1:] for name, value in short.items()}, [1])
    family = by_name("llava")
    two = family.collate(
        [dataclasses.replace(each, ids=(*each.ids, *family.block, 5, 6)) for each in (family.single(),)]
    )
    with pytest.raises(UnsupportedFeatureError, match="a further image"):
        vlmfix.shared_prefix(model, family.collate([family.single()])).continued(two)
    text = {name: whole[name][:, -3:] for name in ("input_ids", "attention_mask")}
    with pytest.raises(UnsupportedFeatureError, match="no image token"):
        vlmfix.shared_prefix(model, text)


@pytest.mark.families
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_family_answers_like_whole_prompts_or_refuses(name: str) -> None:
    family = available(name)
    if not family.text_only or family.image_first or family.side != "left":
        pytest.skip("its prompts are no text behind an image")
    model = family.build()
    first, whole, rows = questions(family)
    for method in ("none", "pai", "var"):
        try:
            vlmfix.patch(model, method, **parameters_of(method, model))
            prefix = vlmfix.shared_prefix(model, first)
        except (UnsupportedFeatureError, UnsupportedModelError, MethodError):
            assert name not in SHARE
            continue
        expected = answered(model, whole)
        found = answered(model, prefix.continued(whole, rows))
        close(found[1], expected[1])
        assert torch.equal(found[0], expected[0])
