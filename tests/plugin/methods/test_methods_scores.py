"""HGAI, VAF, AdaptVis, EAH, modality balance and CMAI: what each must and must not change."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from families.tiny_llava import (
    BOS,
    IMAGE,
    RAGGED,
    SINK_WORD,
    Sample,
    collate,
    forward,
    generate,
    sample,
    words,
)
from invariants import close
from naive.reference import Reference
from transformers import DynamicCache

import vlmfix
from vlmfix.methods.adaptvis import AdaptVis
from vlmfix.methods.cmai import CMAI
from vlmfix.methods.eah import EAH
from vlmfix.methods.hgai import HGAI
from vlmfix.methods.modality_balance import ModalityBalance
from vlmfix.methods.registry import make_method


def balance(**options: Any) -> ModalityBalance:
    return ModalityBalance(experimental=True, **options)


def cmai(**options: Any) -> CMAI:
    return CMAI(experimental=True, **options)


METHODS = ("hgai", "vaf", "adaptvis", "eah", "modality_balance", "cmai")
CASES = {
    label: (make_method(name, parameters), formula)
    for label, (name, parameters, formula) in naive.cases().items()
    if name in METHODS
}
ONE = collate([RAGGED[1]])


def each_of(*names: str) -> Any:
    return pytest.mark.parametrize("method", [CASES[name][0] for name in names], ids=names)


EACH = each_of("hgai 0", "vaf 0", "vaf 1", "adaptvis 0", "eah 0", "modality_balance 0", "cmai 0")


# Agreement with the formulas (tests/plugin/methods/test_reference_methods.py has the answers of padded batches).


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["hgai 0", "vaf 0", "vaf 1", "adaptvis 1", "eah 0", "modality_balance 0", "cmai 0"])
def test_every_position_of_a_prompt_agrees_with_the_formula(build: Any, case: str, side: str) -> None:
    method, formula = CASES[case]
    model = build()
    reference = Reference(model, naive=[formula])
    vlmfix.patch(model, method)
    logits = forward(model, collate(RAGGED, side=side)).logits
    for row, each in enumerate(RAGGED):
        length = len(each.ids)
        found = logits[row, -length:] if side == "left" else logits[row, :length]
        close(found, reference.prompt(each.ids, each.pixels)[1])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "case", ["hgai 0", "vaf 0", "vaf 3", "eah 1", "eah 2", "modality_balance 0", "cmai 0", "cmai 1"]
)
def test_further_turns_agree_with_the_formula(build: Any, kind: str, case: str) -> None:
    """Text alone, then an image, then another one."""
    method, formula = CASES[case]
    model = build(kind, window=24)
    reference = Reference(model, naive=[formula])
    vlmfix.patch(model, method)
    turns = [Sample((BOS, *words(4, 7))), sample(2, 1, 5, seed=8), sample(1, 1, 4, seed=9)]
    cache, state = DynamicCache(config=model.config), None
    for turn in turns:
        ids = turn.ids if state is None else turn.ids[1:]
        state, expected = reference.prompt(ids, turn.pixels, state)
        with torch.no_grad():
            options = {"past_key_values": cache, "use_cache": True}
            out = model(input_ids=torch.tensor([ids]), pixel_values=turn.pixels, **options)
            close(out.logits[0], expected)
            for token in (SINK_WORD, 21):
                out = model(input_ids=torch.tensor([[token]]), **options)
                close(out.logits[0, 0], reference.decode(state, token))


# Of every method: caches, drafts, beams, chunks, precision.


# Of every method: which rows of the maps change.


def allowed_rows(method: Any, each: Sample, prompt: int) -> list[int]:
    """Rows of a padded prompt that a method may edit."""
    if each.pixels is None:
        return []
    pad = prompt - len(each.ids)
    last_image = pad + max(i for i, token in enumerate(each.ids) if token == IMAGE)
    if isinstance(method, HGAI | AdaptVis):
        return [prompt - 1]
    return list(range(pad if isinstance(method, EAH) else last_image + 1, prompt))


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
def test_keys_and_values_of_other_positions_stay_bitwise(build: Any, method: Any, side: str) -> None:
    model, inputs = build(), collate(RAGGED, side=side)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    forward(model, inputs, past_key_values=caches[0], use_cache=True)
    vlmfix.patch(model, method)
    forward(model, inputs, past_key_values=caches[1], use_cache=True)
    seen = 0.0
    for before, after in zip(caches[0].layers, caches[1].layers, strict=True):
        for row, each in enumerate(RAGGED):
            prompt = inputs["input_ids"].shape[1] if side == "left" else len(each.ids)
            rows = allowed_rows(method, each, prompt)
            others = [i for i in range(prompt) if i not in rows]  # padding behind a prompt sees edited rows
            for stock, edited in ((before.keys, after.keys), (before.values, after.values)):
                assert torch.equal(stock[row][:, others], edited[row][:, others])
                seen += float((stock[row][:, rows] - edited[row][:, rows]).abs().sum())
    assert seen > 0.1


# Parameters.


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("hgai", {"alpha": -0.1}),
        ("hgai", {"alpha": float("inf")}),
        ("hgai", {"edit_prompt": 1}),
        ("vaf", {"enhance": float("nan")}),
        ("vaf", {"suppress": float("inf")}),
        ("vaf", {"multiply": "plain"}),
        ("vaf", {"heads": "some"}),
        ("vaf", {"heads": None}),
        ("vaf", {"heads": [(1, 2, 3)]}),
        ("vaf", {"heads": [(-1, 2)]}),
        ("adaptvis", {"mode": "both"}),
        ("adaptvis", {"threshold": 1.1}),
        ("adaptvis", {"low": float("nan")}),
        ("adaptvis", {"factor": 2.0}),
        ("adaptvis", {"probe_tokens": []}),
        ("adaptvis", {"probe_tokens": [-1]}),
        ("eah", {"threshold": -0.1}),
        ("eah", {"threshold": 1.5}),
        ("eah", {"threshold": True}),
        ("eah", {"threshold": "high"}),
        ("modality_balance", {"tau": 1.5, "experimental": True}),
        ("cmai", {"rho": 0.0, "experimental": True}),
        ("cmai", {"rho": 1.1, "experimental": True}),
        ("cmai", {"renorm": "text", "experimental": True}),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(vlmfix.MethodError, match=f"{next(iter(parameters))} must be"):
        make_method(name, parameters)


@pytest.mark.parametrize("name", ["modality_balance", "cmai"])
def test_methods_without_evidence_must_be_asked_for(build: Any, name: str) -> None:
    model = build()
    with pytest.raises(vlmfix.MethodError, match=f"vlmfix.patch\\(model, '{name}', experimental=True\\)"):
        vlmfix.patch(model, name)
    assert vlmfix.status(model) is None
    vlmfix.patch(model, name, experimental=True)
    assert "not a" in vlmfix.status(model).notes[0]
    assert generate(model, ONE, 2)[1].isfinite().all()
