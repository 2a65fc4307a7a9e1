"""A method with a list of heads: only these are written out, and the others keep what the base kernel gave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, SINK_DIMS, collate, forward, generate

import vlmfix
from vlmfix.model.attention import explicit_scores

HEADS = [(1, 2), (2, 0), (2, 3), (3, 1)]
ONE_PER_LAYER = [(1, 2), (2, 3), (3, 1)]


def act(heads: Any) -> vlmfix.ACT:
    return vlmfix.ACT(heads=heads, beta=0.2, sink_threshold="1.2/N", min_rows=2)


def vaf(heads: Any) -> vlmfix.VAF:
    return vlmfix.VAF(heads=heads, enhance=2.0, suppress=0.5)


LISTED = pytest.mark.parametrize("make", [act, vaf], ids=["act", "vaf"])


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the scores that are written out."""
    seen: list[tuple[int, ...]] = []

    def spy(*args: Any) -> Any:
        scores, allowed = explicit_scores(*args)
        seen.append(tuple(scores.shape))
        return scores, allowed

    monkeypatch.setattr("vlmfix.engine.attend.explicit_scores", spy)
    return seen


@LISTED
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_only_listed_heads_are_written_out(build: Any, make: Any, attn: str, shapes: list[Any]) -> None:
    """With the answer that writing out all heads gives."""
    inputs = collate(RAGGED)
    model = build(sinks=True, attn=attn, kv_heads=4)
    stock = generate(model, inputs, 4)[1]
    vlmfix.patch(model, make(HEADS))
    few = generate(model, inputs, 4)[1]
    length = inputs["input_ids"].shape[1]
    assert {shape[1] for shape in shapes if shape[3] == length} == {1, 2}, "in the prompt"
    shapes.clear()
    # A method that edits next to nothing, but may edit every head, has them all written out.
    vlmfix.patch(model, [make(HEADS), vlmfix.PAI(alpha=1e-9, layers=":")])
    every = generate(model, inputs, 4)[1]
    assert {shape[1] for shape in shapes} == {4}
    torch.testing.assert_close(few, every, atol=1e-5, rtol=1e-5)
    assert (few - stock).abs().max() > 1e-3


@LISTED
def test_grouped_queries(build: Any, make: Any, shapes: list[Any]) -> None:
    """One head of two that share keys; as many heads as there are keys to share are not worth a copy of them."""
    inputs = collate(RAGGED)
    model = build(sinks=True)
    assert model.config.text_config.num_key_value_heads == 2
    for heads, written in ((ONE_PER_LAYER, {1}), (HEADS, {1, 4})):
        vlmfix.patch(model, make(heads))
        few = generate(model, inputs, 4)[1]
        assert {shape[1] for shape in shapes if shape[3] == inputs["input_ids"].shape[1]} == written
        vlmfix.patch(model, [make(heads), vlmfix.PAI(alpha=1e-9, layers=":")])
        torch.testing.assert_close(few, generate(model, inputs, 4)[1], atol=1e-5, rtol=1e-5)
        shapes.clear()


@LISTED
def test_unlisted_heads_keep_their_bits(build: Any, make: Any) -> None:
    """What enters the output projection differs in the listed head alone; in decode steps, to rounding."""
    inputs = collate(RAGGED)
    model = build(sinks=True, kv_heads=4)
    size = model.config.text_config.hidden_size // 4
    rows: list[torch.Tensor] = []
    projection = model.model.language_model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, args: rows.append(args[0].unflatten(-1, (4, size)).clone()))
    for method in ("none", make([(1, 2)])):
        vlmfix.patch(model, method)
        cache = forward(model, inputs, use_cache=True).past_key_values
        with torch.no_grad():
            model(input_ids=torch.full((len(RAGGED), 1), 40), past_key_values=cache)
    (prompt, step), (edited_prompt, edited_step) = rows[:2], rows[2:]
    assert torch.equal(prompt[:, :, [0, 1, 3]], edited_prompt[:, :, [0, 1, 3]])
    torch.testing.assert_close(step[:, :, [0, 1, 3]], edited_step[:, :, [0, 1, 3]], atol=1e-6, rtol=1e-5)
    assert (prompt[:, :, 2] - edited_prompt[:, :, 2]).abs().max() > 1e-4
    assert (step[:, :, 2] - edited_step[:, :, 2]).abs().max() > 1e-4


def test_beside_a_method_that_acts_only_in_some_steps(build: Any) -> None:
    """The heads in hand are the same in all forwards, so that sums go on where they stopped."""
    inputs = collate([RAGGED[0]])
    no_sinks = build(kv_heads=4)
    vlmfix.patch(no_sinks, [vlmfix.VAR(sink_dims=SINK_DIMS, sink_threshold=5.5, layers=":"), act(HEADS)])
    both = generate(no_sinks, inputs, 5)[1]
    edited = vlmfix.status(no_sinks).edited
    assert edited[0] == 0 < edited[1], "VAR leaves off after the prompt"
    vlmfix.patch(no_sinks, act(HEADS))
    torch.testing.assert_close(both, generate(no_sinks, inputs, 5)[1], atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_listed_heads(build: Any) -> None:
    inputs = collate([RAGGED[0]])
    model = build(sinks=True, kv_heads=4)
    vlmfix.patch(model, act(HEADS))
    model(**inputs).logits.float().square().mean().backward()
    gradient = model.model.language_model.layers[1].self_attn.q_proj.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
