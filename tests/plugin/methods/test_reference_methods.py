"""Every method has a naive formula and agrees with it: prompt and decode, padded batches, grouped queries, images."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from families.tiny_llava import IMAGE, PAD, RAGGED, collate, generate
from naive.reference import Reference

import vlmfix


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("case", naive.cases().values(), ids=naive.cases().keys())
def test_a_padded_batch_agrees_with_the_formula(build: Any, kind: str, case: tuple[str, dict[str, Any], Any]) -> None:
    name, parameters, formula = case
    model = build(kind)
    stock = generate(model, collate(RAGGED), 5)[1]
    reference = Reference(model, naive=[formula])
    vlmfix.patch(model, name, **parameters)
    _, logits = generate(model, collate(RAGGED), 5)
    for row, each in enumerate(RAGGED):
        _, expected = reference.generate(each.ids, each.pixels, 5, [PAD, IMAGE])
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)
        assert (each.pixels is None) == bool((logits[row] - stock[row]).abs().max() < 1e-4), "the edit must be visible"


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("case", naive.cases("DECODING_CASES").values(), ids=naive.cases("DECODING_CASES").keys())
def test_two_branches_of_a_padded_batch_agree_with_the_formula(
    build: Any, kind: str, case: tuple[str, dict[str, Any], Any]
) -> None:
    name, parameters, formula = case
    model = build(kind)
    stock = generate(model, collate(RAGGED), 5)[1]
    expected = [formula.generate(model, each.ids, each.pixels, 5, [PAD, IMAGE]) for each in RAGGED]
    vlmfix.patch(model, name, **parameters)
    ids, logits = generate(model, collate(RAGGED), 5)
    for row, (each, (answer, steps)) in enumerate(zip(RAGGED, expected, strict=True)):
        assert ids[row, -5:].tolist() == answer
        found = logits[row].log_softmax(-1) if formula.up_to_a_constant else logits[row]
        steps = steps.log_softmax(-1) if formula.up_to_a_constant else steps
        torch.testing.assert_close(found, steps, atol=1e-5, rtol=1e-5)
        is_stock = torch.allclose(logits[row], stock[row], atol=1e-4)
        assert is_stock == (each.pixels is None), "the contrast must be visible"


def test_every_method_has_a_formula() -> None:
    in_reference = {"none", "var", "vhr"}
    assert set(vlmfix.list_methods()) == set(naive.names()) | in_reference
