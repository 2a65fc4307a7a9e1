"""Every method has a naive formula and agrees with it: prompts and answers, padded batches, further turns, windows."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from families.tiny_llava import BOS, IMAGE, PAD, RAGGED, SINK_WORD, Sample, collate, forward, generate, sample, words
from invariants import Loop, close
from naive.adaiat import case as adaiat_case
from naive.reference import Reference

import vlmfix

CASES = {**naive.cases(), "adaiat wide": ("adaiat", *adaiat_case(6.0, 40.0))}  # few keys, much attention for each
DECODING_CASES = naive.cases("DECODING_CASES")
EACH = pytest.mark.parametrize("case", CASES)
SUPPRESS = [PAD, IMAGE]
FEW_KINDS = ("fia", "var", "vhr")
"""Methods whose further cases are about their parameters, not about the model."""
KINDS = [
    (case, kind)
    for case in CASES
    for kind in ("llama", "mistral", "gemma2", "qwen2")
    if (kind != "qwen2" or case in ("pai 0", "var 0", "vhr 0"))
    and (kind == "llama" or case.endswith(" 0") or CASES[case][0] not in FEW_KINDS)
]


def both(build: Any, case: str, kind: str = "llama", **options: Any) -> tuple[Any, Reference]:
    """A model with the method of a case, and its naive reference."""
    name, parameters, formula = CASES[case]
    model = build(kind, sinks=formula.needs_sinks, **options)
    reference = Reference(model, [formula])
    return vlmfix.patch(model, name, **parameters), reference


@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_a_padded_batch_agrees_with_the_formula(build: Any, case: str, kind: str) -> None:
    model, reference = both(build, case, kind)
    ids, logits = generate(model, collate(RAGGED), 5)
    stock = generate(vlmfix.unpatch(model), collate(RAGGED), 5)[1]
    for row, each in enumerate(RAGGED):
        answer, expected = reference.generate(each.ids, each.pixels, 5, SUPPRESS)
        close(logits[row], expected)
        assert ids[row, -5:].tolist() == answer
        assert (each.pixels is None) == bool((logits[row] - stock[row]).abs().max() < 1e-4), "the edit must be visible"


@EACH
def test_every_position_of_a_prompt_agrees_with_the_formula(build: Any, case: str) -> None:
    model, reference = both(build, case)
    found = {side: forward(model, collate(RAGGED, side=side)).logits for side in ("left", "right")}
    for row, each in enumerate(RAGGED):
        expected = reference.prompt(each.ids, each.pixels)[1]
        close(found["left"][row, -len(each.ids) :], expected)
        close(found["right"][row, : len(each.ids)], expected)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] not in ("act", "vista")])
def test_further_turns_agree_with_the_formula(build: Any, kind: str, case: str) -> None:
    """Text alone, then an image, then another one; what was generated is part of the next prompt.

    Left out: what ACT and VISTA learn from the cache of earlier turns, which their formulas read anew.
    """
    model, reference = both(build, case, kind, window=24)
    turns = [Sample((BOS, *words(4, 7))), sample(2, 1, 5, seed=8), sample(1, 1, 4, seed=9)]
    loop, state = Loop(model), None
    for turn in turns:
        ids = turn.ids if state is None else turn.ids[1:]
        state, expected = reference.prompt(ids, turn.pixels, state)
        close(loop.read(*ids, pixel_values=turn.pixels)[0], expected)
        for token in (SINK_WORD, 21):
            close(loop.read(token)[0, 0], reference.decode(state, token))


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] not in ("vhr", "vista")])
def test_a_window_that_leaves_the_image_behind(build: Any, case: str) -> None:
    """Keys that left the cache belong to nothing; a row that sees no image is not ranked by it.

    Left out: two methods whose formulas would compare rounding errors where the image is out of sight.
    """
    each = RAGGED[0]
    model, reference = both(build, case, "mistral", window=6)
    _, expected = reference.generate(each.ids, each.pixels, 7, SUPPRESS)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        close(generate(model, collate([each]), 7, **options)[1][0], expected)


@pytest.mark.parametrize("case", ["adaiat 0", "adaiat 1", "adaiat 2", "adhh 0", "var 0", "var 1", "var 3", "var 6"])
def test_the_cases_see_both_decisions(build: Any, case: str) -> None:
    """Negative control of the agreement: gates are open in some layers and rows, and closed in others."""
    formula = CASES[case][2]
    formula.decisions.clear()
    reference = both(build, case)[1]
    for each in RAGGED:
        reference.generate(each.ids, each.pixels, 5, SUPPRESS)
    assert 0.1 < sum(formula.decisions) / len(formula.decisions) < 0.95


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("case", DECODING_CASES.values(), ids=DECODING_CASES.keys())
def test_two_branches_of_a_padded_batch_agree_with_the_formula(
    build: Any, kind: str, case: tuple[str, dict[str, Any], Any]
) -> None:
    name, parameters, formula = case
    model = build(kind)
    stock = generate(model, collate(RAGGED), 5)[1]
    expected = [formula.generate(model, each.ids, each.pixels, 5, SUPPRESS) for each in RAGGED]
    vlmfix.patch(model, name, **parameters)
    ids, logits = generate(model, collate(RAGGED), 5)
    for row, (each, (answer, steps)) in enumerate(zip(RAGGED, expected, strict=True)):
        assert ids[row, -5:].tolist() == answer
        found = logits[row].log_softmax(-1) if formula.up_to_a_constant else logits[row]
        close(found, steps.log_softmax(-1) if formula.up_to_a_constant else steps)
        is_stock = torch.allclose(logits[row], stock[row], atol=1e-4)
        assert is_stock == (each.pixels is None), "the contrast must be visible"


def test_every_method_has_a_formula() -> None:
    assert set(vlmfix.list_methods()) == {*naive.names(), "none"}
