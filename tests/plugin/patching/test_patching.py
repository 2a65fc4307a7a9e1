"""The transaction: patch, unpatch, nesting, failures, residue, copies, switches and refusals."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from typing import Any

import pytest
import torch
from families.tiny_llava import (
    IMAGE,
    RAGGED,
    SINK_DIMS,
    collate,
    forward,
    generate,
    llava_config,
    snapshot,
    tiny_llava,
)
from invariants import Loop, close
from naive.iri import RANKING
from naive.reference import Reference
from naive.var import NaiveVar
from torch import nn
from transformers import DynamicCache

import vlmfix

INPUTS = collate(RAGGED)
VAR = vlmfix.VAR(sink_dims=SINK_DIMS, sink_threshold=3.0, layers=":")
VHR = vlmfix.VHR(layers=":")
IRI = vlmfix.IRI(2.0, 2.0, k1=2, k2=4, ranking=RANKING)
VISTA = vlmfix.VISTA(lam=0.8)


def logits(model: Any, inputs: Any = INPUTS, **options: Any) -> torch.Tensor:
    out: torch.Tensor = forward(model, inputs, **options).logits
    return out


# Residue.


def test_a_patch_changes_only_hooks_and_the_configs_of_attention_modules(sinky: Any) -> None:
    before = snapshot(sinky)
    vlmfix.patch(sinky, [VAR, VHR])
    after = snapshot(sinky)
    assert after.keys() == before.keys()
    for name, attributes in before.items():
        changed = {key for key, value in attributes.items() if after[name].get(key) != value}
        changed |= after[name].keys() - attributes.keys()
        allowed = (
            {"config", "config.vars", "_vlmfix_site"}
            if name.endswith("self_attn")
            else {key for key in changed if "hooks" in key}
        )
        if name in ("", "model"):
            allowed |= {"_vlmfix_patch"}
        if not name:
            # One refuses, one tells forwards that they read a prompt, one lets a call choose its methods.
            tells = "_prefill" if hasattr(sinky, "_prefill") else "_get_initial_cache_position"
            allowed |= {"init_continuous_batching", tells, "generate"}
        assert changed <= allowed, name
    assert sinky.config.text_config._attn_implementation == "sdpa"


def test_a_patched_model_can_be_freed(tiny: Any) -> None:
    copied = copy.deepcopy(tiny)
    vlmfix.patch(copied, VHR)
    generate(copied, INPUTS, 2)
    gone = weakref.ref(copied)
    del copied
    gc.collect()
    assert gone() is None


# Replacing and nesting.


def test_patching_twice_replaces(sinky: Any) -> None:
    vlmfix.patch(sinky, VAR)
    only_var = logits(sinky)
    hooks = sum(len(module._forward_pre_hooks) for module in sinky.modules())
    vlmfix.patch(sinky, VHR)
    vlmfix.patch(sinky, VAR)
    assert torch.equal(logits(sinky), only_var)
    assert sum(len(module._forward_pre_hooks) for module in sinky.modules()) == hooks
    assert [method.name for method in vlmfix.status(sinky).methods] == ["var"]


def test_unpatching_a_stock_model_does_nothing(tiny: Any) -> None:
    before = snapshot(tiny)
    assert vlmfix.unpatch(tiny) is tiny
    assert snapshot(tiny) == before


def test_nested_contexts_restore_step_by_step(sinky: Any) -> None:
    stock = logits(sinky)
    before = snapshot(sinky)
    with vlmfix.patched(sinky, VAR) as same:
        assert same is sinky
        outer = logits(sinky)
        with vlmfix.patched(sinky, VHR):
            inner = logits(sinky)
            with vlmfix.patched(sinky, "none"):
                assert torch.equal(logits(sinky), stock)
            assert torch.equal(logits(sinky), inner)
        assert torch.equal(logits(sinky), outer)
        assert [method.name for method in vlmfix.status(sinky).methods] == ["var"]
    assert not torch.equal(outer, stock)
    assert not torch.equal(inner, outer)
    assert torch.equal(logits(sinky), stock)
    assert snapshot(sinky) == before


def test_a_context_restores_a_patch_put_on_before(tiny: Any) -> None:
    vlmfix.patch(tiny, VHR)
    logits(tiny)
    with vlmfix.patched(tiny, "none"):
        pass
    status = vlmfix.status(tiny)
    assert status.methods[0].name == "vhr"
    assert status.prompts == 1


def test_contexts_left_out_of_order_leave_the_stock_model(tiny: Any) -> None:
    before = snapshot(tiny)
    first, second = vlmfix.patched(tiny, VHR), vlmfix.patched(tiny, "none")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert vlmfix.status(tiny) is None
    assert snapshot(tiny) == before


def test_patching_and_unpatching_inside_a_context(tiny: Any) -> None:
    before = snapshot(tiny)
    with vlmfix.patched(tiny, VHR):
        vlmfix.patch(tiny, "none")
    assert snapshot(tiny) == before
    with vlmfix.patched(tiny, VHR):
        vlmfix.unpatch(tiny)
    assert snapshot(tiny) == before


def test_an_exception_inside_a_context_restores_the_model(tiny: Any) -> None:
    before = snapshot(tiny)
    with pytest.raises(ZeroDivisionError), vlmfix.patched(tiny, VHR):
        1 / 0  # noqa: B018
    assert snapshot(tiny) == before


def test_an_exception_inside_a_forward_leaves_no_state(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlmfix.patch(tiny, VHR)
    expected = logits(tiny)
    layer = tiny.model.language_model.layers[2]
    monkeypatch.setattr(layer.mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(tiny)
    monkeypatch.undo()
    assert torch.equal(logits(tiny), expected)
    vlmfix.unpatch(tiny)


# Failing half-way.


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_a_failure_half_way_leaves_no_residue(tiny: Any, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    before = snapshot(tiny)
    original, calls = nn.Module.register_forward_pre_hook, []

    def register(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        if len(calls) == fails_at:
            raise RuntimeError("half-way")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", register)
    try:
        vlmfix.patch(tiny, VHR)
    except RuntimeError:
        assert snapshot(tiny) == before
        assert vlmfix.status(tiny) is None
    else:
        assert len(calls) < fails_at > 2


def test_a_failure_half_way_keeps_the_patch_that_was_on(sinky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlmfix.patch(sinky, VAR)
    expected = logits(sinky)
    original, calls = nn.Module.register_forward_pre_hook, []

    def register(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("half-way")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", register)
    with pytest.raises(RuntimeError):
        vlmfix.patch(sinky, VHR)
    monkeypatch.undo()
    assert torch.equal(logits(sinky), expected)
    assert [method.name for method in vlmfix.status(sinky).methods] == ["var"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model: vlmfix.patch(model, "vhr", layers=[99]),
        lambda model: vlmfix.patch(model, "var", sink_dims=(64,)),
        lambda model: vlmfix.patch(model, "vhr", alpha=-1),
        lambda model: vlmfix.patch(model, "no such method"),
        lambda model: vlmfix.patch(model, ["vhr", "vhr"]),
        lambda model: vlmfix.patch(model, []),
        lambda model: vlmfix.patch(model, vlmfix.VHR(layers="9:12")),
        lambda model: vlmfix.patched(model, "vhr", layers=[99]).__enter__(),
    ],
)
def test_bad_methods_keep_the_patch_that_was_on(sinky: Any, wrong: Any) -> None:
    vlmfix.patch(sinky, VAR)
    expected, before = logits(sinky), snapshot(sinky)
    with pytest.raises(vlmfix.MethodError):
        wrong(sinky)
    assert torch.equal(logits(sinky), expected)
    assert snapshot(sinky).keys() == before.keys()
    vlmfix.unpatch(sinky)
    before = snapshot(sinky)
    with pytest.raises(vlmfix.MethodError):
        wrong(sinky)
    assert snapshot(sinky) == before


# Several models.


def test_two_models_with_one_config_object(tiny: Any) -> None:
    config = llava_config()
    one, two = tiny_llava(config=config, seed=1), tiny_llava(config=config, seed=2)
    assert one.config.text_config is two.config.text_config
    stock = logits(one), logits(two)
    vlmfix.patch(one, VHR)
    assert vlmfix.status(two) is None
    assert torch.equal(logits(two), stock[1])
    assert not torch.equal(logits(one), stock[0])
    vlmfix.unpatch(one)
    assert torch.equal(logits(one), stock[0])


def test_two_models_with_different_methods_do_not_meet(build: Any) -> None:
    one, two = build(sinks=True), build(sinks=True)
    vlmfix.patch(one, VAR)
    vlmfix.patch(two, VHR)
    expected = logits(one), logits(two)
    assert not torch.equal(*expected)
    vlmfix.unpatch(one)
    assert torch.equal(logits(two), expected[1])
    vlmfix.patch(one, VAR)
    assert torch.equal(logits(one), expected[0])


@pytest.mark.parametrize("method", [VHR, VAR, IRI, VISTA], ids=["vhr", "var", "iri", "vista"])
def test_a_deep_copy_is_patched_on_its_own(sinky: Any, method: Any) -> None:
    stock = logits(sinky)
    before = snapshot(sinky)
    vlmfix.patch(sinky, method)
    expected = logits(sinky)
    copied = copy.deepcopy(sinky)
    assert torch.equal(logits(copied), expected)
    assert vlmfix.status(copied).prompts == 2
    assert vlmfix.status(sinky).prompts == 1
    vlmfix.unpatch(copied)
    assert torch.equal(logits(copied), stock)
    assert torch.equal(logits(sinky), expected)
    again = copy.deepcopy(sinky)
    vlmfix.unpatch(sinky)
    assert snapshot(sinky) == before
    assert torch.equal(logits(sinky), stock)
    assert torch.equal(logits(again), expected)
    vlmfix.patch(again, "none")
    assert torch.equal(logits(again), stock)


def test_a_patch_on_the_inner_model_is_the_same_patch(tiny: Any) -> None:
    before = snapshot(tiny)
    vlmfix.patch(tiny.model, VHR)
    assert vlmfix.status(tiny) is not None
    vlmfix.patch(tiny, "none")
    vlmfix.unpatch(tiny)
    assert vlmfix.status(tiny.model) is None
    assert snapshot(tiny) == before


def test_the_inner_model_can_be_patched_and_run(tiny: Any) -> None:
    stock = logits(tiny)
    vlmfix.patch(tiny, VHR)
    expected = logits(tiny)
    inner = forward(tiny.model, INPUTS).last_hidden_state
    with torch.no_grad():
        assert torch.equal(tiny.lm_head(inner), expected)
    vlmfix.unpatch(tiny.model)
    assert torch.equal(logits(tiny), stock)


# Switches.


def test_a_patch_survives_a_change_of_the_attention_implementation(sinky: Any) -> None:
    vlmfix.patch(sinky, [VAR, VHR])
    expected = logits(sinky)
    sinky.set_attn_implementation("eager")
    attentions = forward(sinky, INPUTS, output_attentions=True).attentions
    assert attentions[0] is not None
    valid = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(logits(sinky)[valid], expected[valid], atol=2e-5, rtol=1e-5)
    vlmfix.unpatch(sinky)
    assert sinky.config.text_config._attn_implementation == "eager"


def test_composition_is_in_the_order_of_the_path(sinky: Any) -> None:
    vlmfix.patch(sinky, [VAR, VHR])
    expected = logits(sinky)
    vlmfix.patch(sinky, [VHR, VAR])
    assert torch.equal(logits(sinky), expected)
    assert [method.name for method in vlmfix.status(sinky).methods] == ["var", "vhr"]
    assert all(vlmfix.status(sinky).edited)


# Status.


def test_status_counts_edits_prompts_and_steps(sinky: Any) -> None:
    vlmfix.patch(sinky, VAR)
    status = vlmfix.status(sinky)
    assert (status.prompts, status.prompts_without_image, status.decode_steps, status.edited) == (0, 0, 0, (0,))
    assert status.image_token_ids == (IMAGE,)
    assert status.layers == (0, 1, 2, 3)
    generate(sinky, collate([RAGGED[0]]), 4)
    generate(sinky, collate([RAGGED[2]]), 4)
    status = vlmfix.status(sinky)
    assert (status.prompts, status.prompts_without_image, status.decode_steps) == (2, 1, 6)
    assert status.edited[0] > 0
    assert "var" in str(status)
    assert str(status.edited[0]) in str(status)
    assert "\n  layers 0-3; " in str(status)
    assert "\n  layers 1, 3; " in str(vlmfix.status(vlmfix.patch(sinky, vlmfix.VHR(layers=[1, 3]))))


def test_status_counts_exactly_the_selected_rows(sinky: Any) -> None:
    formula = NaiveVar()
    reference = Reference(sinky, [formula])
    vlmfix.patch(sinky, VAR)
    logits(sinky)
    for each in RAGGED:
        reference.prompt(each.ids, each.pixels)
    assert vlmfix.status(sinky).edited == (sum(formula.decisions),)


def test_status_counts_across_inference_and_grad_modes(tiny: Any) -> None:
    vlmfix.patch(tiny, vlmfix.VHR(layers=":", outliers=False))
    inputs = collate([RAGGED[0]])
    with torch.inference_mode():
        tiny(**inputs)
    with torch.no_grad():
        tiny(**inputs)
    tiny(**inputs)
    with torch.inference_mode():
        tiny(**inputs)
    assert vlmfix.status(tiny).edited == (4 * 4 * 2 * len(RAGGED[0].ids),)


def test_patch_returns_the_model_and_defaults_to_vhr(tiny: Any) -> None:
    assert vlmfix.patch(tiny) is tiny
    assert vlmfix.status(tiny).methods[0].name == "vhr"


# Refusals.


@pytest.mark.parametrize(
    "thing", [None, "llava", 3, nn.Linear(2, 2), object()], ids=["None", "str", "int", "Linear", "object"]
)
@pytest.mark.parametrize("call", [vlmfix.patch, vlmfix.unpatch, vlmfix.status])
def test_things_that_are_no_model(call: Any, thing: Any) -> None:
    with pytest.raises(vlmfix.UnsupportedModelError, match="Expected a Hugging Face"):
        call(thing)


def test_inputs_embeds_with_placeholders_kept_work(sinky: Any) -> None:
    each = RAGGED[1]
    vlmfix.patch(sinky, VAR)
    expected = logits(sinky, collate([each]))
    with torch.no_grad():
        embeds = sinky.get_input_embeddings()(torch.tensor([each.ids]))
        out = sinky(inputs_embeds=embeds, pixel_values=each.pixels)
    assert torch.equal(out.logits, expected)


@pytest.mark.parametrize("method", [VAR, VHR], ids=["var", "vhr"])
def test_merged_inputs_embeds_are_refused(sinky: Any, method: Any) -> None:
    each = RAGGED[0]
    with torch.no_grad():
        embeds = sinky.get_input_embeddings()(torch.tensor([each.ids]))
        features = sinky.get_image_features(pixel_values=each.pixels)
        features = getattr(features, "pooler_output", features)  # transformers 4 returns the list itself
        embeds[0, [i for i, token in enumerate(each.ids) if token == IMAGE]] = torch.cat(list(features))
        stock = sinky(inputs_embeds=embeds).logits
        vlmfix.patch(sinky, method)
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="input_ids"):
            sinky(inputs_embeds=embeds)
        assert torch.equal(sinky(inputs_embeds=embeds, vlmfix=None).logits, stock)


def test_a_cache_filled_before_patching_is_refused(tiny: Any) -> None:
    loop = Loop(tiny, collate([RAGGED[0]]))
    vlmfix.patch(tiny, VHR)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="empty cache"):
        loop.read(20)


@pytest.mark.parametrize("new_ids", [[20], [20, 21, 22]])
def test_a_cache_of_another_patch_is_refused(tiny: Any, new_ids: list[int]) -> None:
    vlmfix.patch(tiny, VHR)
    loop = Loop(tiny, collate([RAGGED[0]]))
    vlmfix.patch(tiny, "vhr", alpha=1.5)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="empty cache"):
        loop.read(*new_ids)


def test_a_cache_used_with_another_batch_is_refused(tiny: Any) -> None:
    vlmfix.patch(tiny, VHR)
    loop = Loop(tiny, collate([RAGGED[0]]))
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="batch"):
        loop.read(input_ids=torch.tensor([[20, 21], [22, 23]]))


@pytest.mark.parametrize("method", ["none", VHR, IRI, VISTA], ids=["none", "vhr", "iri", "vista"])
def test_calling_the_language_model_alone_is_refused(tiny: Any, method: Any) -> None:
    vlmfix.patch(tiny, method)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="whole model"), torch.no_grad():
        tiny.model.language_model(input_ids=torch.tensor([[1, 20, 21]]))


def test_calling_the_forward_method_alone_is_refused(tiny: Any) -> None:
    """``model.forward`` bypasses hooks: an error, never a silently stock model."""
    vlmfix.patch(tiny, VHR)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="whole model"), torch.no_grad():
        tiny.model.forward(**collate([RAGGED[0]]))


def test_a_paged_cache_is_refused(tiny: Any) -> None:
    vlmfix.patch(tiny, "none")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Continuous batching"):
        forward(tiny, collate([RAGGED[0]]), cache=object())


def test_tuple_outputs_keep_the_state_of_the_cache(tiny: Any) -> None:
    vlmfix.patch(tiny, VHR)
    for model in (tiny, tiny.model):
        out = forward(model, collate([RAGGED[0]]), use_cache=True, return_dict=False)
        (cache,) = [each for each in out if isinstance(each, DynamicCache)]
        with torch.no_grad():
            model(input_ids=torch.tensor([[20]]), past_key_values=cache, use_cache=True)


def test_a_second_turn_that_asks_for_several_logits_is_a_prompt(sinky: Any) -> None:
    vlmfix.patch(sinky, VAR)
    found = []
    for keep in (0, 2):
        loop = Loop(sinky, collate([RAGGED[0]]))
        loop.read(20)
        found.append(loop.turn(RAGGED[3], logits_to_keep=keep)[:, -2:])
    close(*found)


@pytest.mark.parametrize("method", [VAR, VHR], ids=["var", "vhr"])
def test_asking_for_all_logits_changes_none_of_them(sinky: Any, method: Any) -> None:
    """``logits_to_keep`` selects outputs; an image among them is still part of the prompt."""
    each = collate([RAGGED[0]])
    vlmfix.patch(sinky, method)
    expected = logits(sinky, each)
    assert torch.equal(logits(sinky, each, logits_to_keep=each["input_ids"].shape[1]), expected)
    assert vlmfix.status(sinky).prompts_without_image == 0


@pytest.mark.parametrize("keep", [2, 3])
def test_asking_for_a_few_logits_changes_none_of_them(sinky: Any, keep: int) -> None:
    """Drafts are checked with a cache; a bare forward has none."""
    each = collate([RAGGED[0]])
    vlmfix.patch(sinky, VHR)
    expected = logits(sinky, each)[:, -keep:]
    torch.testing.assert_close(logits(sinky, each, logits_to_keep=keep), expected, atol=1e-5, rtol=1e-5)


def test_the_log_names_the_methods(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="vlmfix"):
        vlmfix.patch(tiny, VHR)
    assert "VHR" in caplog.text


def test_the_config_of_a_patched_model_is_serialisable(tiny: Any) -> None:
    vlmfix.patch(tiny, VHR)
    assert "vlmfix" not in json.dumps(tiny.config.to_dict(), default=str)
