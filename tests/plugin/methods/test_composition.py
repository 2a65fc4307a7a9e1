"""Methods together: which pairs compose, in what order, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, PAD, RAGGED, SINK_DIMS, collate, generate
from method_parameters import IN_FORWARDS, parameters_of
from naive.act import NaiveAct
from naive.mma import NaiveMma
from naive.pai import NaivePai
from naive.reference import Reference
from naive.var import NaiveVar
from naive.vhr import NaiveVhr

import vlmfix
from vlmfix.methods.base import Method
from vlmfix.methods.registry import make_method

NAMES = sorted(set(IN_FORWARDS) - {"none"})


def method(name: str, model: Any) -> Method:
    return make_method(name, parameters_of(name, model))


SEARCHES = {name for name in NAMES if vlmfix.list_methods()[name].searches}
"""Composes with none: see its own tests."""
LISTED = vlmfix.list_methods()
DECODING = [name for name in NAMES if LISTED[name].replaces_logits or LISTED[name].rewrites_logits]
ONE_ENGINE = (set(DECODING) - {"guidance", "vcd", "dola"}) | SEARCHES
"""Decoding methods that compose as those three do: branches of equal and of unequal length, and early logits."""
PAIRS = [
    pair for pair in itertools.combinations(NAMES, 2) if not set(pair) <= set(DECODING) and ONE_ENGINE.isdisjoint(pair)
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_every_pair_composes(sinky: Any, first: str, second: str) -> None:
    """Both act, the batch equals its singles, and only methods at the same place depend on the order given."""
    pair = [method(first, sinky), method(second, sinky)]
    found = []
    for order in (pair, pair[::-1]):
        vlmfix.patch(sinky, order)
        found.append(generate(sinky, collate(RAGGED), 3)[1])
        status = vlmfix.status(sinky)
        assert all(edited > 0 for edited in status.edited), status
    assert found[0].isfinite().all()
    for row in (1, 2):
        single = generate(sinky, collate([RAGGED[row]]), 3)[1][0]
        torch.testing.assert_close(found[1][row], single, atol=1e-5, rtol=1e-5)
    if place(pair[0]) != place(pair[1]):
        assert torch.equal(*found)


def place(each: Method) -> int:
    attention = (each.opens_mask, each.edits_scores, each.edits_weights, each.edits_heads)
    return (*attention, bool(each.edits_blocks), each.replaces_logits or each.rewrites_logits).index(True)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_one_of_each_place_agrees_with_the_formulas(build: Any, kind: str) -> None:
    model = build(kind, sinks=True)
    naive = [
        NaiveMma(range(4)),
        NaivePai(range(4), 0.6),
        NaiveAct(range(4), alpha=1.5, min_rows=2),
        NaiveVar(),
        NaiveVhr(),
    ]
    vhr, mma, pai = vlmfix.VHR(layers=":"), vlmfix.MMA(layers=":"), vlmfix.PAI(alpha=0.6, layers=":")
    act = vlmfix.ACT(layers=":", sink_threshold="1.5/N", min_rows=2)
    var = vlmfix.VAR(sink_dims=SINK_DIMS, sink_threshold=3.0, layers=":")
    reference = Reference(model, naive)
    vlmfix.patch(model, [vhr, act, pai, var, mma])  # any order
    _, logits = generate(model, collate(RAGGED), 3)
    for row, each in enumerate(RAGGED):
        _, expected = reference.generate(each.ids, each.pixels, 3, [PAD, IMAGE])
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


def test_methods_of_one_place_run_in_the_order_given(tiny: Any) -> None:
    found = []
    for order in (["pai", "hgai"], ["hgai", "pai"]):
        vlmfix.patch(tiny, [method(name, tiny) for name in order])
        assert [each.name for each in vlmfix.status(tiny).methods] == order
        found.append(generate(tiny, collate([RAGGED[0]]), 2)[1])
    assert not torch.allclose(*found, atol=1e-4)


def test_a_method_switched_off_changes_nothing_in_a_composition(sinky: Any) -> None:
    vlmfix.patch(sinky, method("pai", sinky))
    alone = generate(sinky, collate(RAGGED), 3)[1]
    off = [vlmfix.MMA(gamma=0), vlmfix.ACT(beta=1), vlmfix.VHR(alpha=1), make_method("none", {})]
    vlmfix.patch(sinky, [*off, method("pai", sinky)])
    assert torch.equal(generate(sinky, collate(RAGGED), 3)[1], alone)


def test_the_same_method_twice_is_refused(tiny: Any) -> None:
    with pytest.raises(vlmfix.MethodError, match="given twice"):
        vlmfix.patch(tiny, [vlmfix.PAI(alpha=0.1), vlmfix.PAI(alpha=0.2)])


def test_together_they_keep_caches_beams_and_batches(sinky: Any) -> None:
    vlmfix.patch(sinky, [method(name, sinky) for name in ("mma", "pai", "var", "act", "vhr", "vista")])
    inputs = collate(RAGGED)
    ids, expected = generate(sinky, inputs, 4)
    static = generate(sinky, inputs, 4, cache_implementation="static", disable_compile=True)
    assert torch.equal(static[0], ids)
    torch.testing.assert_close(static[1], expected, atol=1e-5, rtol=1e-5)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    batch = sinky.generate(**inputs, **options)
    for row, each in enumerate(RAGGED):
        assert torch.equal(batch[row, -4:], sinky.generate(**collate([each]), **options)[0, -4:])
    vlmfix.unpatch(sinky)
    assert not torch.allclose(generate(sinky, inputs, 4)[1], expected, atol=0.05)
