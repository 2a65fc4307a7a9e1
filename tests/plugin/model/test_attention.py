"""The attention function: explicit rows against every base kernel and mask, chunks, refusals."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from families.tiny_llava import RAGGED, SINK_DIMS, collate, forward, generate
from method_parameters import IN_FORWARDS, parameters_of
from transformers import AttentionInterface

import vlmfix
from vlmfix.methods.base import Method
from vlmfix.methods.registry import make_method
from vlmfix.model import attention

INPUTS = collate(RAGGED)
VALID = INPUTS["attention_mask"].bool()


@dataclass(frozen=True)
class WriteOut(Method):
    """Write the weights out and give them back unchanged: the explicit rows must equal the base kernel's."""

    name: ClassVar[str] = "write-out"
    edits_weights: ClassVar[bool] = True

    def edit_weights(self, attn_weights: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert attn_weights.dtype == torch.float32
        return attn_weights, torch.ones(attn_weights.shape[:3], dtype=torch.bool)


@dataclass(frozen=True)
class Sharpen(WriteOut):
    """A visible edit, the negative control."""

    name: ClassVar[str] = "sharpen"

    def edit_weights(self, attn_weights: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sharp = attn_weights**2
        sharp = sharp / sharp.sum(-1, keepdim=True)
        rows = torch.ones(attn_weights.shape[:3], dtype=torch.bool)
        return sharp, rows if layer.row_mask is None else rows & layer.row_mask[:, None]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_explicit_rows_equal_the_base_kernel(build: Any, kind: str, attn: str, cache: str | None) -> None:
    if kind == "gemma2" and attn == "sdpa":
        pytest.skip("sdpa has no softcap")
    model = build(kind, attn=attn)
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    for inputs in (INPUTS, collate([RAGGED[1]])):
        stock = generate(model, inputs, 4, **options)
        vlmfix.patch(model, WriteOut(layers=":"))
        found = generate(model, inputs, 4, **options)
        assert torch.equal(found[0], stock[0])
        torch.testing.assert_close(found[1], stock[1], atol=1e-5, rtol=1e-5)
        vlmfix.patch(model, Sharpen(layers=":"))
        assert (generate(model, inputs, 4, **options)[1] - stock[1]).abs().max() > 0.1
        vlmfix.unpatch(model)


def test_explicit_rows_equal_the_base_kernel_with_a_flex_mask(build: Any) -> None:
    pytest.importorskip("torch.nn.attention.flex_attention")
    model = build(hidden=64)
    stock = forward(model, INPUTS).logits
    vlmfix.patch(model, WriteOut(layers=":"))
    expected = forward(model, INPUTS).logits
    torch.testing.assert_close(expected[VALID], stock[VALID], atol=1e-5, rtol=1e-5)
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 20, 20, device="cpu", BLOCK_SIZE=16)
    rows = attention.block_mask_rows(mask, 2, torch.arange(5, 9), torch.arange(20))
    assert rows.shape == (2, 1, 4, 20)
    assert torch.equal(rows[0, 0], torch.arange(20) <= torch.arange(5, 9)[:, None])


@pytest.mark.parametrize(
    "name", sorted(n for n in IN_FORWARDS if n != "none" and not vlmfix.list_methods()[n].replaces_logits)
)
@pytest.mark.parametrize("size", [1, 3 * 4 * 4 * 33])
def test_rows_in_chunks_equal_rows_at_once(sinky: Any, monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    """One row at a time, or a few: also where a method observes all rows before it edits any."""
    method = make_method(name, parameters_of(name, sinky))
    vlmfix.patch(sinky, method)
    expected, edited = generate(sinky, INPUTS, 2)[1], vlmfix.status(sinky).edited
    assert edited[0] > 0
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", size)
    vlmfix.patch(sinky, method)
    torch.testing.assert_close(generate(sinky, INPUTS, 2)[1], expected, atol=1e-5, rtol=1e-5)
    assert vlmfix.status(sinky).edited == edited


def test_no_weights_of_all_rows_are_written_out(sinky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows behind the first of the last images are, and one row per decode step."""
    rows = []
    original = attention.explicit_scores

    def spy(call: Any, start: int, stop: int) -> Any:
        rows.append(stop - start)
        return original(call, start, stop)

    monkeypatch.setattr("vlmfix.engine.attend.explicit_scores", spy)
    vlmfix.patch(sinky, "var", sink_dims=SINK_DIMS, sink_threshold=3.0, layers=":")
    each = RAGGED[0]
    generate(sinky, collate([each]), 3)
    assert max(rows) == 6
    assert rows.count(1) == 8
    assert len(rows) == 4 + 8
    rows.clear()
    vlmfix.patch(sinky, "pai", layers=":")
    generate(sinky, collate([each]), 3)
    assert rows == [1] * 12


def test_a_layer_without_edits_gets_the_base_kernel_s_own_result(tiny: Any) -> None:
    stock = forward(tiny, INPUTS).logits
    vlmfix.patch(tiny, "none")
    calls = []
    original = AttentionInterface()["sdpa"]

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return original(*args, **kwargs)

    AttentionInterface.register("sdpa", spy)
    try:
        assert torch.equal(forward(tiny, INPUTS).logits, stock)
    finally:
        AttentionInterface.register("sdpa", original)
    assert sum(module.layer_idx >= 0 for module in calls if hasattr(module, "layer_idx")) == 4


def test_learned_sinks_in_the_softmax_are_refused(sinky: Any) -> None:
    vlmfix.patch(sinky, "var", sink_dims=SINK_DIMS, sink_threshold=3.0, layers=":")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="s_aux"):
        forward(sinky, INPUTS, s_aux=torch.zeros(1))


@pytest.mark.skipif(
    "position_bias" not in inspect.signature(AttentionInterface()["sdpa"]).parameters,
    reason="this transformers knows no position bias in sdpa",
)
def test_a_position_bias_is_part_of_the_scores(build: Any) -> None:
    model = build()
    length = INPUTS["input_ids"].shape[1]
    bias = torch.randn(1, 4, length, length, generator=torch.Generator().manual_seed(0))
    stock = forward(model, INPUTS, position_bias=bias).logits
    assert (stock - forward(model, INPUTS).logits)[VALID].abs().max() > 0.1
    vlmfix.patch(model, WriteOut(layers=":"))
    torch.testing.assert_close(
        forward(model, INPUTS, position_bias=bias).logits[VALID], stock[VALID], atol=1e-5, rtol=1e-5
    )


def test_output_attentions_hold_the_edited_rows(build: Any) -> None:
    model = build(attn="eager")
    stock = forward(model, INPUTS, output_attentions=True).attentions
    vlmfix.patch(model, Sharpen(layers=[0]))
    edited = forward(model, INPUTS, output_attentions=True).attentions
    row = RAGGED[0]
    behind = len(row.ids) - 6
    start = INPUTS["input_ids"].shape[1] - len(row.ids)
    expected = stock[0][0, :, start + behind :] ** 2
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(edited[0][0, :, start + behind :], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(edited[0][0, :, start : start + behind], stock[0][0, :, start : start + behind])
