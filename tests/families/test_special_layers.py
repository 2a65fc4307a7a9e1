"""Layers that are not like the others: shared keys, several residual streams, prompts whose text sees what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlmfix
from families.altered import VHR, build, edited, gap, logits
from vlmfix.methods.var import VAR
from vlmfix.model.anatomy import analyse


def test_gemma4_reads_all_rows_of_layers_that_share_keys_only_where_something_is_edited() -> None:
    """The stock model reads only the last row of a prompt there, which says nothing about a column."""
    family, model = build("gemma4")
    inputs, text = family.collate([family.single()]), family.collate([family.text()])
    length = inputs["input_ids"].shape[1]
    rows: dict[str, list[int]] = {}

    def look(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            rows.setdefault(name, []).append((args[0] if args else kwargs["hidden_states"]).shape[1])

        return hook

    layers = model.model.language_model.layers
    handles = [layers[i].register_forward_pre_hook(look(str(i)), with_kwargs=True) for i in (0, 3)]
    stock, stock_text = logits(model, inputs, 2), logits(model, text, 1)
    stock_rows = {name: list(found) for name, found in rows.items()}
    rows.clear()
    vlmfix.patch(model, "none")
    assert torch.equal(logits(model, inputs, 2), stock)
    assert torch.equal(logits(model, text, 1), stock_text)
    assert rows == stock_rows
    rows.clear()
    vlmfix.patch(model, "act", layers=":", sink_threshold=0.05, min_rows=2)
    assert torch.equal(logits(model, text, 1), stock_text)
    rows.clear()
    changed = logits(model, inputs, 2)
    for handle in handles:
        handle.remove()
    assert rows == {"0": [length, 1], "3": [length, 1]}
    assert gap(family.forward(model, inputs).logits[:, -1], changed[:, 0]) < 1e-5
    assert gap(changed, stock) > 1e-3


def test_sinks_of_gemma3n_are_those_of_the_stream_that_attention_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    family, model = build("gemma3n")
    inputs = family.collate([family.single()])
    entering: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    learn = VAR.learn

    def watch(self: VAR, hidden_states: torch.Tensor, layer: Any) -> Any:
        shown.append(hidden_states.clone())
        return learn(self, hidden_states, layer)

    monkeypatch.setattr(VAR, "learn", watch)
    handle = model.model.language_model.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: entering.append((args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    vlmfix.patch(model, "var", layers=[2], sink_dims=list(range(32)), sink_threshold=2.0, image_mass=0.01)
    logits(model, inputs, 1)
    handle.remove()
    active = model.config.text_config.altup_active_idx
    assert entering[0].dim() == 4
    assert torch.equal(shown[0], entering[0][active])
    assert edited(model) > 0


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_the_image_free_pass_keeps_who_sees_whom(name: str) -> None:
    """PaliGemma's text sees what follows, in a padded batch as in a single prompt."""
    family, model = build(name)
    samples = family.ragged()
    vlmfix.patch(model, "vhr", **VHR)
    together = logits(model, family.collate(samples), 2)
    for row, sample in enumerate(samples):
        assert gap(logits(model, family.collate([sample]), 2)[0], together[row]) < 1e-5


def test_pairs_that_are_open_anyway_are_not_counted() -> None:
    """PaliGemma's image tokens see the question without MMA."""
    family, model = build("paligemma")
    inputs = family.collate([family.single()])
    stock = logits(model, inputs, 2)
    vlmfix.patch(model, "mma", layers=":")
    assert gap(logits(model, inputs, 2), stock) < 1e-5
    assert edited(model) == 0


@pytest.mark.parametrize(
    ("name", "gate"), [("qwen3_5", "q_proj"), ("step3p7", "g_proj"), ("muse_glimmer", "gate_proj")]
)
def test_gates_behind_the_attention_are_told_to_methods_on_heads(name: str, gate: str) -> None:
    model = build(name)[1]
    for method, is_told in (("vhr", True), ("spin", True), ("pai", False), ("none", False)):
        status = vlmfix.status(vlmfix.patch(model, method))
        assert status is not None
        assert any(f"by gates ({gate})" in note for note in status.notes) == is_told
    gated = next(site.module for site in analyse(model).sites)
    assert getattr(gated, gate).out_features in (4, 32, 64)


@pytest.mark.parametrize("name", ["llava", "mistral_large4", "kimi_k25"])
def test_no_gates_are_told_where_there_are_none(name: str) -> None:
    assert all(site.gate_behind is None for site in analyse(build(name)[1]).sites)


@pytest.mark.parametrize("name", ["llama4", "inkling2"])
def test_towers_that_turn_their_queries_are_refused_to_methods_that_read_them(name: str) -> None:
    with pytest.raises(vlmfix.UnsupportedModelError, match="turns queries and keys by their positions"):
        vlmfix.patch(build(name)[1], "fia")
