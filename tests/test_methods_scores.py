"""HGAI, VAF, AdaptVis, EAH, modality balance and CMAI: their naive formulas, and what each must and must not change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models import BOS, IMAGE, PAD, RAGGED, SINK_WORD, Sample, collate, forward, generate, pictures, sample, words
from naive.adaptvis import NaiveAdaptVis
from naive.cmai import NaiveCmai
from naive.eah import NaiveEah
from naive.hgai import NaiveHgai
from naive.modality_balance import NaiveModalityBalance
from naive.vaf import NaiveVaf
from reference import Naive, Reference
from transformers import DynamicCache

import vlmfix
from vlmfix.methods.adaptvis import AdaptVis
from vlmfix.methods.cmai import CMAI
from vlmfix.methods.eah import EAH
from vlmfix.methods.hgai import HGAI
from vlmfix.methods.modality_balance import ModalityBalance
from vlmfix.methods.vaf import VAF

ALL = range(4)
HEADS = [(0, 1), (2, 0), (2, 3)]
SUPPRESS = [PAD, IMAGE]


def balance(**options: Any) -> ModalityBalance:
    return ModalityBalance(experimental=True, **options)


def cmai(**options: Any) -> CMAI:
    return CMAI(experimental=True, **options)


CASES: dict[str, tuple[vlmfix.Method, Naive]] = {
    "hgai": (HGAI(layers=":"), NaiveHgai(ALL)),
    "hgai, not the prompt": (HGAI(1.5, edit_prompt=False, layers="1:"), NaiveHgai([1, 2, 3], 1.5, False)),
    "vaf": (VAF(1.5, 0.7, layers=":"), NaiveVaf(ALL, 1.5, 0.7)),
    "vaf, abs": (VAF(1.5, 0.7, multiply="abs", layers="1:3"), NaiveVaf([1, 2], 1.5, 0.7, "abs")),
    "vaf, visual": (VAF(-1.5, 2.0, heads="visual", layers=":"), NaiveVaf(ALL, -1.5, 2.0, heads="visual")),
    "vaf, heads": (VAF(2.0, 0.5, heads=HEADS), NaiveVaf([0, 2], 2.0, 0.5, heads=HEADS)),
    "scalingvis": (AdaptVis("fixed", factor=2.0), NaiveAdaptVis(ALL, 2.0)),
    "adaptvis": (AdaptVis(threshold=0.22), NaiveAdaptVis(ALL, threshold=0.22)),
    "adaptvis, centred": (
        AdaptVis(threshold=0.22, low=-0.5, high=3.0, center=True, decode=True, layers="1:"),
        NaiveAdaptVis([1, 2, 3], None, 0.22, -0.5, 3.0, center=True, decode=True),
    ),
    "adaptvis, words": (
        AdaptVis(threshold=0.75, low=0.0, probe_tokens=[20, 21]),
        NaiveAdaptVis(ALL, threshold=0.75, low=0.0, probe_tokens=[20, 21]),
    ),
    "eah": (EAH(), NaiveEah([1])),
    "eah, auto": (EAH("auto", layers=[0, 2]), NaiveEah([0, 2], "auto")),
    "eah, few sinks": (EAH(0.08, layers=":"), NaiveEah(ALL, 0.08)),
    "modality balance": (balance(), NaiveModalityBalance(ALL)),
    "modality balance, full": (balance(tau=1.0, layers="2:"), NaiveModalityBalance([2, 3], 1.0)),
    "cmai": (cmai(rho=0.6), NaiveCmai(ALL, 0.6)),
    "cmai, renorm": (cmai(rho=0.5, renorm="image", layers="1:"), NaiveCmai([1, 2, 3], 0.5, "image")),
}
ONE_OF_EACH = ["hgai", "vaf", "vaf, visual", "adaptvis", "eah", "modality balance", "cmai"]
EACH = pytest.mark.parametrize("method", [CASES[name][0] for name in ONE_OF_EACH], ids=ONE_OF_EACH)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Agreement with the formulas.


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_agrees_with_the_formula(build: Any, kind: str, case: str) -> None:
    method, naive = CASES[case]
    if isinstance(naive, NaiveEah):
        naive.windows = {"llama": None, "mistral": [12] * 4, "gemma2": [12, None, 12, None]}[kind]
    model = build(kind)
    stock = generate(model, collate(RAGGED), 4)[1]
    reference = Reference(model, naive=[naive])
    vlmfix.patch(model, method)
    _, logits = generate(model, collate(RAGGED), 4)
    for row, each in enumerate(RAGGED):
        _, expected = reference.generate(each.ids, each.pixels, 4, SUPPRESS)
        close(logits[row], expected)
        assert (each.pixels is None) == bool((logits[row] - stock[row]).abs().max() < 1e-4), "the edit must be visible"
