"""IRI: the invariants of its definition, beside the agreement with the naive formula."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, collate, forward, generate
from invariants import Loop
from naive.iri import RANKING

import vlmfix
from vlmfix.methods.iri import Plan, turned
from vlmfix.methods.measured import LayerRanking

ONE = collate([RAGGED[1]])
IRI = vlmfix.IRI(2.0, 2.0, k1=2, k2=4, ranking=RANKING)
BLOCKS = ("self_attn", "mlp")


def block_outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[tuple[int, str], list[torch.Tensor]]:
    """Every block's output before and behind the hooks that are on it."""
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles = []
    for number, layer in enumerate(model.model.language_model.layers):
        for name in BLOCKS:

            def keep(module: Any, args: Any, output: Any, key: tuple[int, str] = (number, name)) -> None:
                seen.setdefault(key, []).append((output[0] if isinstance(output, tuple) else output).clone())

            module = getattr(layer, name)
            handles += [module.register_forward_hook(keep, prepend=True), module.register_forward_hook(keep)]
    forward(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_the_length_of_every_output_is_kept(tiny: Any) -> None:
    vlmfix.patch(tiny, IRI)
    turns = 0.0
    for before, after in block_outputs(tiny, collate(RAGGED)).values():
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5, atol=1e-6)
        turns = max(turns, float((1 - torch.cosine_similarity(before, after, dim=-1)).max()))
    assert turns > 0.1


def test_a_target_without_a_source_below_is_left_alone(tiny: Any) -> None:
    """Source 2 alone: layers 0 to 2 keep every bit of their blocks, layer 3 does not."""
    rates = {"model": "", "rr_attn": [0.1, 0.2, 0.9, 0.3], "rr_mlp": [-1.0, -2.0, -0.5, -3.0]}
    vlmfix.patch(tiny, vlmfix.IRI(2.0, 2.0, k1=1, k2=4, ranking=rates))
    for (number, name), (before, after) in block_outputs(tiny, ONE).items():
        assert torch.equal(before, after) == ((number, name) != (3, "self_attn"))
    assert any("mlp" in note for note in vlmfix.status(tiny).notes)  # rates below 0 are no sources
    assert vlmfix.status(tiny).edited == (1,)


def test_the_top_layer_alone_as_a_source_changes_nothing(tiny: Any) -> None:
    stock = generate(tiny, ONE, 3)[1]
    rates = {"model": "", "rr_attn": [0.1, 0.2, 0.3, 0.9], "rr_mlp": [0.1, 0.2, 0.3, 0.9]}
    vlmfix.patch(tiny, vlmfix.IRI(k1=1, ranking=rates))
    assert torch.equal(generate(tiny, ONE, 3)[1], stock)


def test_only_lambda_times_the_rates_counts(tiny: Any) -> None:
    found = []
    for factor in (1.0, 8.0):
        scaled = {name: [factor * rate for rate in RANKING[name]] for name in ("rr_attn", "rr_mlp")}
        vlmfix.patch(tiny, vlmfix.IRI(1.6 / factor, 0.8 / factor, ranking={**RANKING, **scaled}))
        found.append(generate(tiny, collate(RAGGED), 4)[1])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_turning_zero_and_turning_by_zero() -> None:
    zero, some = torch.zeros(1, 1, 4), torch.tensor([[[3.0, 0.0, 4.0, 0.0]]])
    assert torch.equal(turned(zero, some), zero)
    assert torch.equal(turned(some, -some), some)  # nothing left to scale
    torch.testing.assert_close(turned(some, some), some)
    large = torch.full((1, 1, 4), 6e4)  # near the end of fp16
    assert turned(large, large).isfinite().all()


def test_sources_and_targets_by_hand() -> None:
    plan = Plan.of([0.2, 0.5, -0.1, 0.5, 0.3], range(5), k1=4, k2=2)
    assert plan.sources == {0: 0.2, 1: 0.5, 3: 0.5, 4: 0.3}
    assert plan.targets == {1, 3}
    assert Plan.of([0.2, 0.5, -0.1], range(3), k1=3, k2=3).sources == {0: 0.2, 1: 0.5}
    assert Plan.of([0.9, 0.5, 0.1], [1, 2], k1=1, k2=1) == Plan({1: 0.5}, frozenset({1}))


def test_half_precision_near_the_end_of_its_range_stays_finite(tiny: Any) -> None:
    with torch.no_grad():
        for layer in tiny.model.language_model.layers:
            layer.mlp.down_proj.weight *= 2e4
    vlmfix.patch(tiny.half(), IRI)
    inputs = {**ONE, "pixel_values": ONE["pixel_values"].half()}
    for before, after in block_outputs(tiny, inputs).values():
        if before.isfinite().all():
            assert after.isfinite().all()
            torch.testing.assert_close(after.float().norm(dim=-1), before.float().norm(dim=-1), rtol=2e-3, atol=1e-3)


def test_nothing_is_kept_on_the_cache_and_scratch_dies_with_the_forward(tiny: Any) -> None:
    vlmfix.patch(tiny, IRI)
    assert Loop(tiny, ONE).cache._vlmfix.learned == {}


# The ranking.


def test_a_checkpoint_is_known_by_the_last_part_of_its_name(tiny: Any) -> None:
    tiny.config._name_or_path = "/models/llava-1.5-7b-hf"
    ranking = {**RANKING, "model": "llava-hf/llava-1.5-7b-hf"}
    vlmfix.patch(tiny, "iri", ranking=ranking)
    tiny.config._name_or_path = ""
    with pytest.raises(vlmfix.MethodError, match="this model is ''"):
        vlmfix.patch(tiny, "iri", ranking=ranking)


def test_a_ranking_comes_from_a_file_or_a_recipe(tiny: Any, tmp_path: Path) -> None:
    expected = generate(vlmfix.patch(tiny, IRI), ONE, 3)[1]
    (tmp_path / "ranking.json").write_text(json.dumps(RANKING))
    vlmfix.patch(tiny, dataclasses.replace(IRI, ranking=tmp_path / "ranking.json"))
    assert torch.equal(generate(tiny, ONE, 3)[1], expected)
    vlmfix.save_recipe(tmp_path / "recipe.json", IRI)
    vlmfix.patch(tiny, tmp_path / "recipe.json")
    assert torch.equal(generate(tiny, ONE, 3)[1], expected)
    (bound,) = vlmfix.status(tiny).methods
    assert bound.to_dict()["ranking"] == LayerRanking(**RANKING).to_dict()  # type: ignore[arg-type]
