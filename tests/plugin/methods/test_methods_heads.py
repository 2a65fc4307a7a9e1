"""IAT, AdaIAT, AD-HH, SPIN and AllPath: the invariants of their definitions, beside the naive formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.tiny_llava import (
    IMAGE,
    RAGGED,
    collate,
    forward,
    generate,
)
from invariants import Loop, close, continued
from naive.adaiat import HALLUCINATED, REAL, STATISTICS
from naive.adhh import LISTED
from naive.allpath import BAD, GOOD
from naive.reference import Reference

import vlmfix
from vlmfix.methods.adaiat import AdaIAT
from vlmfix.methods.adhh import ADHH
from vlmfix.methods.allpath import AllPath
from vlmfix.methods.measured import HALLUCINATION_HEADS, HeadStatistics, Shape
from vlmfix.methods.registry import method_from_dict
from vlmfix.methods.spin import SPIN
from vlmfix.model.attention import AttentionCall
from vlmfix.recipes import load_recipe, save_recipe

TABLE = HeadStatistics.from_dict(STATISTICS)

SPIN_ON = SPIN(keep=0.5, layers=":")
ONE = collate([RAGGED[1]])


class Slices:
    """What enters the output projection of a layer: ``[batch, q_len, num_heads, head_dim]`` per forward."""

    def __init__(self, model: Any, layer: int = 0) -> None:
        self.found: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        attention = model.model.language_model.layers[layer].self_attn
        self.size = attention.head_dim
        self.handle = attention.o_proj.register_forward_hook(self.see)

    def see(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.found.append(args[0].unflatten(-1, (-1, self.size)).clone())
        self.outputs.append(output)


# IAT and AdaIAT.


def planted(weights: torch.Tensor, generated: torch.Tensor, **constants: Any) -> Any:
    """A layer for one call of a hook, whose only row sees all keys."""
    query, key = weights[..., :1], weights[:, :1].transpose(2, 3)
    call = AttentionCall(SimpleNamespace(implementation="sdpa"), None, query, key, key, None, {})
    return SimpleNamespace(
        call=call, rows=(0, 1), keys=lambda name, like: generated, constant=lambda make: constants["constant"]
    )


@pytest.mark.parametrize("gate", ["mean", "share"])
def test_a_closed_gate_and_heads_without_preference_come_back_bit_for_bit(gate: str) -> None:
    """Per sample: one is below the threshold, one above."""
    attn_weights = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]])[:, None, None].repeat(1, 3, 1, 1)
    generated = torch.tensor([[False, False, True, True]] * 2)
    factors = torch.tensor([2.5, 1.0, 0.0])[:, None]
    layer = planted(attn_weights, generated, constant=(factors, 0.9 if gate == "mean" else 1.8))
    edited, rows = AdaIAT(gate=gate).edit_weights(attn_weights.clone(), layer)
    assert rows[..., 0].tolist() == [[True, False, True], [False, False, False]]
    assert torch.equal(edited[1], attn_weights[1])
    assert torch.equal(edited[0, 1], attn_weights[0, 1])
    close(edited[0, 0, 0], torch.tensor([0.5, 0.3, 0.25, 0.25]) / 1.3)
    close(edited[0, 2, 0], torch.tensor([0.625, 0.375, 0.0, 0.0]))


def test_a_row_wholly_on_generated_text_is_never_emptied() -> None:
    attn_weights = torch.tensor([[[[0.0, 0.0, 0.4, 0.6]]]])
    layer = planted(attn_weights, torch.tensor([[False, False, True, True]]), constant=(torch.zeros(1, 1), 9.0))
    edited, rows = AdaIAT().edit_weights(attn_weights.clone(), layer)
    assert torch.equal(edited, attn_weights)
    assert not rows.any()


@pytest.mark.parametrize("alpha", [0.1, 6.0, 1e4])
def test_weights_are_never_negative(build: Any, alpha: float) -> None:
    """M far below 1 has a negative factor in the released code."""
    model = build(attn="eager")
    table = HeadStatistics(((0.001, 0.01, 0.1, 0.5),) * 4, ((0.1,) * 4,) * 4, 9, 9)
    vlmfix.patch(model, AdaIAT(alpha=alpha, statistics=table, beta=100.0, layers=":"))
    for step in continued(model, ONE, [[20], [21]], output_attentions=True)[1:]:
        for attn_weights in step.attentions:
            assert (attn_weights >= 0).all()
            close(attn_weights.sum(-1), torch.ones(attn_weights.shape[:3]))
    assert vlmfix.status(model).edited > (0,)


def test_layers_beyond_the_default_are_noted(tiny: Any) -> None:
    vlmfix.patch(tiny, "iat")
    assert not vlmfix.status(tiny).notes
    vlmfix.patch(tiny, "iat", layers=":")
    assert "wider scopes" in vlmfix.status(tiny).notes[0]


def test_statistics_can_be_a_file(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(TABLE.to_dict()))
    assert HeadStatistics.load(path) == TABLE
    vlmfix.patch(tiny, "adaiat", statistics=path)
    assert vlmfix.status(tiny).methods[0].statistics == TABLE
    assert AdaIAT(statistics=path) == method_from_dict(AdaIAT(statistics=path).to_dict())
    assert "0.05" not in str(vlmfix.status(tiny))


def table(**changes: Any) -> dict[str, Any]:
    return {**TABLE.to_dict(), **changes}


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (
            table(real=REAL[:3], hallucinated=HALLUCINATED[:3]),
            "3 layers with 4 heads.*4 layers with 4 heads.*calibrate",
        ),
        (table(real=REAL[:3]), "one shape"),
        (table(real=[[0.1, "a"]]), "'real' must be a table"),
        (table(real=[[-0.1] * 4] * 4), "'real' must be a table"),
        (table(hallucinated=[[math.nan] * 4] * 4), "'hallucinated' must be a table"),
        (table(hallucinated=[[0.0] * 4] * 4), "hold zeros for layers"),
        (table(num_real=0), "num_real"),
        (table(kind="share"), "gate='mean'"),
        (table(kind="sum"), "'kind'"),
        ({"real": REAL}, "missing.*hallucinated"),
        (table(means=3), "means"),
        ("nowhere.json", "nowhere.json"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_statistics_that_do_not_fit_are_refused(tiny: Any, statistics: Any, message: str) -> None:
    with pytest.raises(vlmfix.MethodError, match=message):
        vlmfix.patch(tiny, "adaiat", statistics=statistics)
    assert vlmfix.status(tiny) is None


def test_statistics_of_layers_that_are_not_edited_may_be_missing(tiny: Any) -> None:
    unmeasured = [[0.0] * 4] * 2
    statistics = table(real=[*REAL[:2], *unmeasured], hallucinated=[*HALLUCINATED[:2], *unmeasured])
    vlmfix.patch(tiny, "adaiat", statistics=statistics, layers=[0, 1])
    generate(tiny, ONE, 3)
    assert vlmfix.status(tiny).methods[0].layers == (0, 1)


def test_statistics_of_another_model_are_noted(tiny: Any) -> None:
    tiny.config._name_or_path = "here/model"
    for name, notes in (("there/model", 1), ("here/model", 0), ("", 0)):
        vlmfix.patch(tiny, "adaiat", statistics=table(model=name))
        assert len(vlmfix.status(tiny).notes) == notes


# AD-HH.


def test_below_the_threshold_a_row_is_bit_identical() -> None:
    attn_weights = torch.tensor([[0.5, 0.2, 0.3], [0.3, 0.2, 0.5]]).expand(1, 2, 2, 3).clone()
    layer = planted(attn_weights, torch.tensor([[False, False, True]]), constant=torch.tensor([True, False]))
    for renormalize in (False, True):
        edited, rows = ADHH(renormalize=renormalize).edit_weights(attn_weights.clone(), layer)
        assert rows.tolist() == [[[False, True], [False, False]]]
        assert torch.equal(edited[0, 1], attn_weights[0, 1])
        assert torch.equal(edited[0, 0, 0], attn_weights[0, 0, 0])
        assert edited[0, 0, 1, 2] == 0


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_that_keeps_nothing_is_zero(build: Any, renormalize: bool, dtype: torch.dtype) -> None:
    """The window holds the question only."""
    model = build("mistral", window=4).to(dtype)
    slices = Slices(model)
    vlmfix.patch(model, ADHH(heads=[(0, 1)], renormalize=renormalize))
    inputs = collate([RAGGED[0]])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert forward(model, inputs).logits.isfinite().all()
    assert (slices.found[0][0, -1, 1] == 0).all()
    assert (slices.found[0][0, -1, 0] != 0).any()


@pytest.mark.parametrize(
    "method",
    [
        ADHH(heads=[(0, 1)], tau=0.0),
        ADHH(heads=[(0, 1)], mode="always"),
        AllPath(up_heads=[(0, 1)]),
        AllPath(down_heads=[(0, 1)]),
    ],
    ids=str,
)
def test_slices_of_unlisted_heads_are_bit_identical(tiny: Any, method: Any) -> None:
    """Also of the head that shares its key head; decode rows of weight methods are equal up to the kernel."""
    slices = Slices(tiny)
    continued(tiny, collate(RAGGED), [[20]])
    vlmfix.patch(tiny, method)
    continued(tiny, collate(RAGGED), [[20]])
    stock, edited = slices.found[:2], slices.found[2:]
    for one, two in zip(stock, edited, strict=True):
        atol = 0.0 if method.edits_heads and method.name != "adhh" else 1e-6
        torch.testing.assert_close(one[:, :, [0, 2, 3]], two[:, :, [0, 2, 3]], atol=atol, rtol=atol)
        assert torch.equal(stock[0][:, :, [0, 2, 3]], edited[0][:, :, [0, 2, 3]])
        assert not torch.allclose(one[:, :, 1], two[:, :, 1])


def test_published_heads_are_recognised_by_shape(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists exist in the models they name; a model of another shape gets none."""
    for shape, (_, heads) in HALLUCINATION_HEADS.items():
        assert len(heads) == len(set(heads)) == {32: 20, 40: 35, 60: 10}[shape.num_layers]
        assert all(layer < shape.num_layers and head < shape.num_heads for layer, head in heads)
    here = Shape("llava", "llama", 32, 4, 4, 2, 24)
    monkeypatch.setitem(HALLUCINATION_HEADS, here, ("a tiny model", LISTED))
    vlmfix.patch(tiny, "adhh")
    status = vlmfix.status(tiny)
    assert status.methods[0].heads == LISTED
    assert status.layers == (0, 1, 2, 3)
    assert "a tiny model" in status.notes[0]
    monkeypatch.setitem(HALLUCINATION_HEADS, here._replace(num_kv_heads=4), ("another", LISTED))
    monkeypatch.delitem(HALLUCINATION_HEADS, here)
    with pytest.raises(vlmfix.MethodError, match="calibrate"):
        vlmfix.patch(tiny, "adhh")


def test_the_shape_of_llava_is_that_of_its_config() -> None:
    """Read off the configurations, without building the models."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from vlmfix.methods.measured import shape_of

    vision = CLIPVisionConfig(image_size=336, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig())
    anatomy: Any = SimpleNamespace(
        model=SimpleNamespace(config=config),
        text_config=config.text_config,
        hidden_size=config.text_config.hidden_size,
        num_layers=config.text_config.num_hidden_layers,
        num_heads=config.text_config.num_attention_heads,
    )
    assert HALLUCINATION_HEADS[shape_of(anatomy)][0] == "LLaVA-1.5-7B"


# SPIN.


@pytest.mark.parametrize(
    ("keep", "heads", "kept"),
    [(0.95, 32, 30), (0.8, 32, 25), (0.9, 32, 28), (0.7, 32, 22), (0.95, 40, 38), (0.0, 8, 1), (0.29, 100, 29)],
)
def test_how_many_heads_are_kept(keep: float, heads: int, kept: int) -> None:
    assert SPIN(keep=keep).num_kept(heads) == kept
    gates = torch.randn(3, heads, 2, generator=torch.Generator().manual_seed(0))
    chosen = SPIN(keep=keep).choose(gates)
    assert (chosen.sum(1) == heads - kept).all()
    for b in range(3):
        for row in range(2):
            values = gates[b, :, row]
            assert values[chosen[b, :, row]].max() <= values[~chosen[b, :, row]].min()


def test_the_released_gate_has_the_same_order() -> None:
    gates = 30 * torch.randn(50, 32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    released = (gates / gates.std(1, keepdim=True)).softmax(1)
    assert torch.equal(SPIN(keep=0.8).choose(gates), SPIN(keep=0.8).choose(released))


def test_among_equal_heads_the_lowest_are_kept() -> None:
    chosen = SPIN(keep=0.5).choose(torch.zeros(1, 4, 1))
    assert chosen.flatten().tolist() == [False, False, True, True]


def test_image_keys_hidden_by_a_mask_do_not_count(build: Any) -> None:
    """A mask of pairs hides one picture of two from the last row."""
    each, tiny = RAGGED[1], build(seed=2)
    length, image = len(each.ids), [i for i, token in enumerate(each.ids) if token == IMAGE]
    reference = Reference(tiny)
    embeds = reference._embed(list(each.ids), each.pixels)
    with torch.no_grad():
        projected = [reference._project(0, x, position) for position, x in enumerate(embeds)]
    query = projected[-1][0]
    slices = Slices(tiny)
    vlmfix.patch(tiny, SPIN(keep=0.25, suppress=0.0, layers=[0]))
    seen = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    choices = []
    for columns in (image, image[:9], image[9:]):
        mask = seen.clone()
        mask[..., -1, [j for j in image if j not in columns]] = False
        with torch.no_grad():
            tiny(input_ids=torch.tensor([each.ids]), pixel_values=each.pixels, attention_mask=mask)
        gates = [sum(float(query[h] @ projected[j][1][h // 2]) for j in columns) for h in range(4)]
        choices.append([h for h in range(4) if (slices.found[-1][0, -1, h] != 0).any()])
        assert choices[-1] == [gates.index(max(gates))]
    assert len({tuple(each) for each in choices}) > 1, "the mask must matter"


def test_large_keys_do_not_overflow_in_half_precision() -> None:
    from vlmfix.methods.spin import _summed_scores
    from vlmfix.methods.views import Rows

    key = torch.full((1, 1, 576, 2), 200.0, dtype=torch.float16)
    query = torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float16)[None, :, None]
    site = SimpleNamespace(implementation="sdpa", is_sliding=False)
    call = SimpleNamespace(site=site, query=query, key=key, attention_mask=None, kwargs={}, module=None)
    layer: Any = SimpleNamespace(
        call=call,
        site=site,
        forward=SimpleNamespace(is_prefill=True),
        keys=lambda name, like: torch.ones(1, 576, dtype=torch.bool),
        learned=None,
    )
    gates, sees = _summed_scores(layer, Rows(0, 1, None))
    assert gates.flatten().tolist() == [2 * 576 * 200, 3 * 576 * 200]
    assert sees.all()


def test_the_sum_of_image_keys_is_read_once_per_prompt(tiny: Any) -> None:
    """Changing cached image keys behind its back changes attention, not the choice; a new prompt reads them again."""
    vlmfix.patch(tiny, SPIN_ON)
    cache = Loop(tiny, ONE).cache
    (known, *_) = [value for value in cache._vlmfix.learned.values() if isinstance(value, tuple)]
    image = ONE["input_ids"][0] == IMAGE
    close(known[0][0, :, 0], cache.layers[0].keys[0, :, image].sum(1))


def test_a_model_without_a_head_to_suppress_is_noted(build: Any) -> None:
    model = build(heads=1, kv_heads=1)
    vlmfix.patch(model, "spin")
    assert "suppresses none" in vlmfix.status(model).notes[0]
    generate(model, ONE, 2)
    assert vlmfix.status(model).edited == (0,)
    vlmfix.patch(build(), "spin")


# AllPath.


def test_a_head_in_both_lists_keeps_one_and_a_repeated_one_is_scaled_once() -> None:
    method = AllPath(up=3.0, down=0.5, up_heads=[(0, 1), (0, 1), (1, 1)], down_heads=[(1, 1), (2, 0)])
    assert method.factors == {(0, 1): 3.0, (2, 0): 0.5}
    assert AllPath(up=1.0, up_heads=[(0, 1)], down_heads=[(1, 1)]).factors == {(1, 1): 0.0}


def test_removed_slices_are_zero_and_a_bias_is_added_once(tiny: Any) -> None:
    """The scaled sum of the heads' own projections."""
    projection = tiny.model.language_model.layers[0].self_attn.o_proj
    projection.bias = torch.nn.Parameter(torch.arange(32.0))
    slices = Slices(tiny)
    forward(tiny, ONE)
    vlmfix.patch(tiny, AllPath(up_heads=[(0, 0)], down_heads=[(0, 3)]))
    forward(tiny, ONE)
    one, two = slices.found
    assert (two[:, :, 3] == 0).all()
    parts = projection.weight.unflatten(1, (4, -1))
    expected = sum(factor * one[:, :, head] @ parts[:, head].T for head, factor in enumerate((2.0, 1.0, 1.0, 0.0)))
    close(slices.outputs[1], expected + projection.bias)


def test_the_format_of_answers_is_kept(tmp_path: Path) -> None:
    method = AllPath(up_heads=GOOD, down_heads=BAD, answers="yesno")
    save_recipe(tmp_path / "recipe.json", method)
    assert load_recipe(tmp_path / "recipe.json")[0].answers == "yesno"
