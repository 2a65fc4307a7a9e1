"""IAT, AdaIAT, AD-HH, SPIN and AllPath: the invariants of their definitions, beside the naive formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from families.tiny_llava import (
    IMAGE,
    PAD,
    RAGGED,
    SINK_WORD,
    Sample,
    collate,
    forward,
    generate,
    pictures,
    sample,
)
from invariants import close
from naive.adaiat import HALLUCINATED, REAL, STATISTICS
from naive.adaiat import case as adaiat_case
from naive.adhh import LISTED
from naive.allpath import BAD, GOOD
from naive.reference import Reference
from transformers import DynamicCache

import vlmfix
from vlmfix.methods.adaiat import AdaIAT
from vlmfix.methods.adhh import ADHH
from vlmfix.methods.allpath import AllPath
from vlmfix.methods.iat import IAT
from vlmfix.methods.measured import HALLUCINATION_HEADS, HeadStatistics, Shape
from vlmfix.methods.registry import method_from_dict
from vlmfix.methods.spin import SPIN
from vlmfix.recipes import load_recipe, save_recipe

TABLE = HeadStatistics.from_dict(STATISTICS)

IAT_ON = IAT(alpha=1.5, layers=":")
ADAIAT_ON = AdaIAT(statistics=TABLE, beta=2.0, layers=":")
ADHH_ON = ADHH(heads=LISTED)
SPIN_ON = SPIN(keep=0.5, layers=":")
ALLPATH_ON = AllPath(up_heads=GOOD, down_heads=BAD)
METHODS = [IAT_ON, ADAIAT_ON, ADHH_ON, SPIN_ON, ALLPATH_ON]
EACH = pytest.mark.parametrize("method", METHODS, ids=lambda each: each.name)
ONE = collate([RAGGED[1]])


FORMULAS = {label: case for label, case in naive.cases().items() if case[0] in {each.name for each in METHODS}}
WINDOW = {**FORMULAS, "adaiat 0": ("adaiat", *adaiat_case(6.0, 40.0))}  # few keys, much attention for each


def new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def decode(model: Any, inputs: Any, tokens: list[list[int]], **options: Any) -> list[Any]:
    """Read a prompt, then one forward for each list of tokens."""
    cache = new_cache(model)
    found = [forward(model, inputs, past_key_values=cache, use_cache=True, **options)]
    batch = inputs["input_ids"].shape[0]
    mask = inputs["attention_mask"]
    for each in tokens:
        mask = torch.cat([mask, mask.new_ones(batch, len(each))], dim=1)
        positions = mask.cumsum(1)[:, -len(each) :] - 1
        with torch.no_grad():
            found.append(
                model(
                    input_ids=torch.tensor([each] * batch),
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=len(each),
                    **options,
                )
            )
    return found


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


def assert_same_cache(before: Any, after: Any, tokens: torch.Tensor) -> None:
    """Keys and values of all layers are bit for bit those of the stock model where ``tokens`` ``[batch, q_len]`` is."""
    for one, two in zip(before.past_key_values.layers, after.past_key_values.layers, strict=True):
        assert torch.equal(one.keys.transpose(1, 2)[tokens], two.keys.transpose(1, 2)[tokens])
        assert torch.equal(one.values.transpose(1, 2)[tokens], two.values.transpose(1, 2)[tokens])


# Beside the agreement with the formulas (tests/plugin/methods/test_reference_methods.py).


@pytest.mark.parametrize("label", ["adaiat 0", "adaiat 1", "adaiat 2", "adhh 0"])
def test_the_cases_see_both_decisions(tiny: Any, label: str) -> None:
    """Negative control of the agreement: gates are open in some layers and rows, and closed in others."""
    formula = FORMULAS[label][2]
    formula.decisions.clear()
    reference = Reference(tiny, naive=[formula])
    for each in RAGGED:
        reference.generate(each.ids, each.pixels, 5, [PAD, IMAGE])
    assert 0.1 < sum(formula.decisions) / len(formula.decisions) < 0.95


@pytest.mark.parametrize("label", WINDOW)
def test_a_window_that_leaves_the_image_behind(build: Any, label: str) -> None:
    """Keys that left the cache belong to nothing; a row that sees no image is not ranked by it."""
    name, parameters, formula = WINDOW[label]
    model, each = build("mistral", window=6), RAGGED[0]
    _, expected = Reference(model, naive=[formula]).generate(each.ids, each.pixels, 7, [PAD, IMAGE])
    vlmfix.patch(model, name, **parameters)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        close(generate(model, collate([each]), 7, **options)[1][0], expected)
    if label in ("iat 0", "adaiat 0", "adhh 1", "allpath 0"):
        edited = vlmfix.status(model).edited[0]
        assert edited > 0, "the edit must be active"


@pytest.mark.parametrize("label", FORMULAS)
def test_a_second_turn_with_a_second_image_agrees_with_the_formula(tiny: Any, label: str) -> None:
    """The first answer is part of the prompt then."""
    name, parameters, formula = FORMULAS[label]
    reference = Reference(tiny, naive=[formula])
    vlmfix.patch(tiny, name, **parameters)
    cache, state, found, expected = new_cache(tiny), None, [], []
    for number, each in enumerate((RAGGED[0], sample(2, 1, 5, seed=22))):
        ids = each.ids[min(number, 1) :]
        with torch.no_grad():
            tokens = torch.tensor([ids])
            out = tiny(input_ids=tokens, pixel_values=each.pixels, past_key_values=cache, use_cache=True)
        state, logits = reference.prompt(ids, each.pixels, state)
        found.append(out.logits[0, -1])
        expected.append(logits[-1])
        for token in (20, 21, 22):
            with torch.no_grad():
                step = tiny(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            found.append(step.logits[0, -1])
            expected.append(reference.decode(state, token))
    close(torch.stack(found), torch.stack(expected))


# What holds for all of them.


@EACH
def test_a_cache_cropped_into_the_prompt_forgets_what_was_there(tiny: Any, method: Any) -> None:
    """Its second picture and a word go."""
    vlmfix.patch(tiny, method)
    each = RAGGED[0]
    longer = Sample((*each.ids, SINK_WORD, *[IMAGE] * 9), torch.cat([each.pixels, pictures(1, 6)]))
    kept, fresh = new_cache(tiny), new_cache(tiny)
    forward(tiny, collate([longer]), past_key_values=kept, use_cache=True)
    forward(tiny, collate([each]), past_key_values=fresh, use_cache=True)
    kept.crop(-10)
    for one, two in zip(kept.layers, fresh.layers, strict=True):  # the last row of the shorter prompt was edited
        one.keys.copy_(two.keys)
        one.values.copy_(two.values)
    for token in (20, 21, 22):
        with torch.no_grad():
            found = [tiny(input_ids=torch.tensor([[token]]), past_key_values=cache) for cache in (kept, fresh)]
        close(found[0].logits, found[1].logits)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("iat", {"alpha": -0.1}),
        ("iat", {"alpha": math.inf}),
        ("adaiat", {"alpha": -1.0}),
        ("adaiat", {"beta": math.nan}),
        ("adaiat", {"m_form": "plus_one"}),
        ("adaiat", {"gate": "sum"}),
        ("adaiat", {"statistics": 3}),
        ("adhh", {"tau": -0.1}),
        ("adhh", {"mode": "never"}),
        ("adhh", {"heads": [(0, 9)]}),
        ("adhh", {"heads": [(7, 0)]}),
        ("adhh", {"renormalize": True, "mode": "always"}),
        ("spin", {"keep": 1.2}),
        ("spin", {"suppress": -0.1}),
        ("spin", {"score": "weights"}),
        ("allpath", {"up": math.inf}),
        ("allpath", {"down": -1.0}),
        ("allpath", {"answers": "essay"}),
        ("allpath", {"up_heads": [(0, 4)]}),
        ("allpath", {"down_heads": [(0, 1, 2)]}),
    ],
)
def test_a_bad_parameter_is_named(tiny: Any, name: str, parameters: dict[str, Any]) -> None:
    pattern = "head" if "heads" in next(iter(parameters)) else next(iter(parameters))
    with pytest.raises(vlmfix.MethodError, match=pattern):
        vlmfix.patch(tiny, name, **parameters)
    assert vlmfix.status(tiny) is None


@pytest.mark.parametrize("name", ["adhh", "allpath", "adaiat"])
def test_what_must_be_calibrated_says_so(tiny: Any, name: str) -> None:
    with pytest.raises(vlmfix.MethodError, match=rf"vlmfix\.calibrate\(model, '{name}', data\)"):
        vlmfix.patch(tiny, name)
    assert vlmfix.status(tiny) is None


# What happens to a prompt.


@pytest.mark.parametrize("method", [IAT_ON, ADAIAT_ON], ids=lambda each: each.name)
def test_generated_text_methods_leave_the_prompt_alone(tiny: Any, method: Any) -> None:
    inputs = collate(RAGGED)
    stock, stock_answer = forward(tiny, inputs, use_cache=True), generate(tiny, inputs, 4)[1]
    vlmfix.patch(tiny, method)
    edited, answer = forward(tiny, inputs, use_cache=True), generate(tiny, inputs, 4)[1]
    assert_same_cache(stock, edited, inputs["attention_mask"].bool())
    assert torch.equal(stock.logits, edited.logits)
    assert torch.equal(stock_answer[:, 0], answer[:, 0])
    assert not torch.allclose(stock_answer[:, 1], answer[:, 1], atol=1e-3)


@pytest.mark.parametrize("method", [ADHH_ON, SPIN_ON], ids=lambda each: each.name)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_only_the_last_row_of_a_prompt_changes(build: Any, attn: str, method: Any) -> None:
    model, inputs = build(attn=attn), collate(RAGGED)
    stock = forward(model, inputs, use_cache=True)
    vlmfix.patch(model, method)
    edited = forward(model, inputs, use_cache=True)
    tokens = inputs["attention_mask"].bool()  # rows of padding see everything in the eager kernel
    tokens[:, -1] = False
    assert_same_cache(stock, edited, tokens)
    assert torch.equal(stock.logits[tokens], edited.logits[tokens])
    assert (stock.logits[:, -1] - edited.logits[:, -1]).abs().amax(1)[[0, 1, 3]].max() > 0.01
    assert torch.equal(stock.logits[2], edited.logits[2])


# IAT and AdaIAT.


@pytest.mark.parametrize("method", [IAT(alpha=1.5, layers=[0]), None], ids=["iat", "adaiat"])
def test_attention_to_generated_text_rises_and_ratios_hold(build: Any, method: Any) -> None:
    """In the first layer, whose keys do not depend on edits, so that weights before and after can be compared."""
    model, inputs = build(attn="eager"), collate(RAGGED)
    first = (0.06, 0.04, 0.01, 0.04)  # M: 1.5, 1, 1/4 (clamped), 1
    if method is None:
        table = HeadStatistics((first, *[(0.1,) * 4] * 3), ((0.04,) * 4, *[(0.1,) * 4] * 3), 9, 9)
        method = AdaIAT(statistics=table, beta=-1000.0, layers=[0])  # the gate is wide open
    tokens = [[20], [21], [22]]
    stock = decode(model, inputs, tokens, output_attentions=True)
    vlmfix.patch(model, method)
    edited = decode(model, inputs, tokens, output_attentions=True)
    generated = inputs["input_ids"].shape[1]
    with_image = torch.tensor([True, True, False, True])
    for one, two in zip(stock[1:], edited[1:], strict=True):
        before, after = one.attentions[0][:, :, 0], two.attentions[0][:, :, 0]
        close(before[~with_image], after[~with_image])
        before, after = before[with_image], after[with_image]
        share, new_share = before[..., generated:].sum(-1), after[..., generated:].sum(-1)
        close(
            after[..., :generated] / (1 - new_share)[..., None],
            before[..., :generated] / (1 - share)[..., None],
        )
        if method.name == "iat":
            assert (new_share > share).all()
            continue
        assert (new_share[:, 0] > share[:, 0]).all()
        close(after[:, [1, 3]], before[:, [1, 3]])
        assert (new_share[:, 2] == 0).all()
        close(
            after[:, 0, generated:] / new_share[:, :1],
            before[:, 0, generated:] / share[:, :1],
        )


def planted(weights: torch.Tensor, generated: torch.Tensor, **constants: Any) -> Any:
    """A layer for one call of a hook, with all keys visible."""
    return SimpleNamespace(call=None, keys=lambda name, like: generated, constant=lambda make: constants["constant"])


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
    for step in decode(model, ONE, [[20], [21]], output_attentions=True)[1:]:
        for attn_weights in step.attentions:
            assert (attn_weights >= 0).all()
            close(attn_weights.sum(-1), torch.ones(attn_weights.shape[:3]))
    assert vlmfix.status(model).edited > (0,)


def test_default_layers_follow_the_depth_and_wider_ones_are_noted(tiny: Any) -> None:
    assert vlmfix.IAT.default_layers(32) == tuple(range(5, 18))
    assert vlmfix.IAT.default_layers(64)[0] == 10
    assert vlmfix.IAT.default_layers(1) == (0,)
    vlmfix.patch(tiny, "iat")
    assert vlmfix.status(tiny).layers == vlmfix.IAT.default_layers(4)
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


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.4, 0.6])
def test_deactivated_rows_lose_the_text_behind_the_image(build: Any, tau: float, renormalize: bool) -> None:
    model, inputs = build(attn="eager"), collate(RAGGED)
    heads = [(0, head) for head in (0, 1, 3)]
    stock = decode(model, inputs, [[20], [21]], output_attentions=True)
    vlmfix.patch(model, ADHH(heads=heads, tau=tau, renormalize=renormalize))
    edited = decode(model, inputs, [[20], [21]], output_attentions=True)
    hits = []
    for one, two in zip(stock, edited, strict=True):
        before, after = one.attentions[0][:, :, -1], two.attentions[0][:, :, -1]
        for row in range(4):
            ids = inputs["input_ids"][row].tolist()
            text = [j for j in range(before.shape[-1]) if IMAGE in ids and j >= ids.index(IMAGE)]
            text = [j for j in text if j >= len(ids) or ids[j] != IMAGE]
            rest = [j for j in range(before.shape[-1]) if j not in text]
            for head in range(4):
                share = float(before[row, head, text].sum())
                if head == 2 or not text or share < tau:
                    close(after[row, head], before[row, head])
                    hits.append(False)
                    continue
                hits.append(True)
                assert (after[row, head, text] == 0).all()
                kept = 1 - share if renormalize else 1.0
                close(after[row, head, rest], before[row, head, rest] / kept)
                close(after[row, head].sum() * kept, torch.tensor(1 - share))
    assert 0 < sum(hits) < len(hits)
    assert vlmfix.status(model).edited == (sum(hits),)


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
    decode(tiny, collate(RAGGED), [[20]])
    vlmfix.patch(tiny, method)
    decode(tiny, collate(RAGGED), [[20]])
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


def test_suppressed_slices_are_scaled_and_kept_ones_bit_identical(tiny: Any) -> None:
    slices = Slices(tiny)
    inputs, steps = collate(RAGGED), [[20], [21], [22]]
    decode(tiny, inputs, steps)
    vlmfix.patch(tiny, SPIN(keep=0.5, suppress=0.25, layers=[0]))
    decode(tiny, inputs, steps)
    choices = set()
    for one, two in zip(slices.found[:4], slices.found[4:], strict=True):
        assert torch.equal(one[:, :-1], two[:, :-1])
        assert torch.equal(one[2], two[2])
        for row in (0, 1, 3):
            suppressed = [head for head in range(4) if not torch.equal(one[row, -1, head], two[row, -1, head])]
            assert len(suppressed) == 2
            assert torch.equal(two[row, -1, suppressed], 0.25 * one[row, -1, suppressed])
            choices.add(tuple(suppressed))
    assert len(choices) > 1, "chosen anew for every token"
    assert vlmfix.status(tiny).edited == (3 * 4 * 2,)


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
    cache = new_cache(tiny)
    forward(tiny, ONE, past_key_values=cache, use_cache=True)
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


def test_layers_below_the_lowest_listed_are_bit_identical_and_image_rows_are_scaled(tiny: Any) -> None:
    inputs = collate(RAGGED)
    slices = Slices(tiny, 2)
    stock = forward(tiny, inputs, use_cache=True)
    vlmfix.patch(tiny, AllPath(up_heads=[(2, 1)], down_heads=[(2, 3), (0, 0)], down=1.0))
    assert vlmfix.status(tiny).layers == (2,)
    edited = forward(tiny, inputs, use_cache=True)
    layers = list(zip(stock.past_key_values.layers, edited.past_key_values.layers, strict=True))
    assert all(torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values) for one, two in layers[:3])
    assert not torch.equal(layers[3][0].keys, layers[3][1].keys)
    one, two = slices.found
    with_image = [0, 1, 3]
    assert torch.equal(two[with_image][:, :, 1], 2 * one[with_image][:, :, 1])
    assert torch.equal(two[with_image][:, :, [0, 2, 3]], one[with_image][:, :, [0, 2, 3]])
    assert torch.equal(two[2], one[2])
    assert vlmfix.status(tiny).edited == (sum(len(RAGGED[row].ids) for row in with_image),)


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
