"""A single call of ``generate`` chooses its methods: what it returns is what a model patched for it returns."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, collate, forward, generate
from method_parameters import IN_FORWARDS, parameters_of

import vlmfix

ONE = collate([RAGGED[0]])
BATCH = collate(RAGGED)
NAMES = [name for name in IN_FORWARDS if name != "none"]


def made(name: str, model: Any) -> Any:
    return vlmfix.list_methods()[name](**parameters_of(name, model))


@pytest.mark.parametrize("name", NAMES)
def test_a_call_with_methods_of_its_own(tiny: Any, name: str) -> None:
    stock = generate(tiny, ONE, 3)[0]
    other = copy.deepcopy(tiny)
    vlmfix.patch(other, made(name, tiny))
    expected = other.generate(**ONE, max_new_tokens=3, do_sample=False)
    vlmfix.patch(tiny, "pai", layers=":")
    own = generate(tiny, ONE, 3)[1]
    counted = vlmfix.status(tiny).edited
    assert torch.equal(tiny.generate(**ONE, max_new_tokens=3, do_sample=False, vlmfix=made(name, tiny)), expected)
    assert vlmfix.status(tiny).edited == counted
    assert torch.equal(generate(tiny, ONE, 3)[1], own)
    assert torch.equal(generate(tiny, ONE, 3, vlmfix=None)[0], stock)


def test_every_form_of_a_method(tiny: Any, tmp_path: Path) -> None:
    vlmfix.patch(tiny, "none")
    vhr = vlmfix.VHR(layers=":")
    expected = generate(vlmfix.patch(copy.deepcopy(tiny), vhr), BATCH, 3)[1]
    vlmfix.save_recipe(tmp_path / "recipe.json", vhr)
    for spec in (vhr, [vhr], vhr.to_dict(), str(tmp_path / "recipe.json"), tmp_path / "recipe.json"):
        assert torch.equal(generate(tiny, BATCH, 3, vlmfix=spec)[1], expected)
    assert not torch.equal(generate(tiny, BATCH, 3)[1], expected)
    with pytest.raises(vlmfix.MethodError, match="no method 'vhrr'"):
        generate(tiny, BATCH, 3, vlmfix="vhrr")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"generate\(..., vlmfix=...\)"):
        forward(tiny, BATCH, vlmfix="vhr")


def test_weights_are_shared_and_never_stale(tiny: Any) -> None:
    vlmfix.patch(tiny, "none")
    generate(tiny, BATCH, 2, vlmfix="vhr")
    (variant,) = (each for _, each in vars(tiny)["_vlmfix_patch"].variants.values())
    pairs = zip(tiny.named_parameters(), variant.named_parameters(), strict=True)
    assert all(name == other and mine is its for (name, mine), (other, its) in pairs)
    with torch.no_grad():
        tiny.lm_head.weight.mul_(2.0)
    expected = generate(vlmfix.patch(copy.deepcopy(tiny), "vhr"), BATCH, 2)[1]
    assert torch.equal(generate(tiny, BATCH, 2, vlmfix="vhr")[1], expected)
    tiny.lm_head = torch.nn.Linear(tiny.lm_head.in_features, tiny.lm_head.out_features, bias=False)
    expected = generate(vlmfix.patch(copy.deepcopy(tiny), "vhr"), BATCH, 2)[1]
    assert torch.equal(generate(tiny, BATCH, 2, vlmfix="vhr")[1], expected)


def test_what_is_done_to_a_model_is_done_to_its_single_calls(tiny: Any) -> None:
    """Adapters are switched, merged and disabled, and a hook is hung, after a call has chosen its methods."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny, adapter, adapter_name="a").eval()
    wrapped.add_adapter("b", adapter)
    vlmfix.patch(wrapped, "none")

    def found_and_right() -> tuple[torch.Tensor, torch.Tensor]:
        found = generate(wrapped, BATCH, 2, vlmfix="vhr")[1]
        with vlmfix.patched(wrapped, "vhr"):
            return found, generate(wrapped, BATCH, 2)[1]

    models = []
    for _ in range(2):
        generate(wrapped, BATCH, 2)
        generate(wrapped, BATCH, 2, vlmfix="vhr")
        models += [model for _, model in vars(tiny)["_vlmfix_patch"].variants.values()]
    assert models[0] is models[1]  # nothing has changed
    first = found_and_right()
    assert torch.equal(*first)
    wrapped.set_adapter("b")
    second = found_and_right()
    assert torch.equal(*second) and not torch.equal(first[0], second[0])
    with wrapped.disable_adapter():
        third = found_and_right()
    assert torch.equal(*third) and not torch.equal(second[0], third[0])
    wrapped.merge_adapter()
    merged = found_and_right()
    torch.testing.assert_close(merged[0], second[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(*merged)
    tiny.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    hooked = found_and_right()
    assert torch.equal(*hooked) and not torch.equal(hooked[0], merged[0])


def test_a_patch_that_is_taken_off_takes_the_choice_with_it(tiny: Any) -> None:
    vlmfix.patch(tiny, "pai")
    generate(tiny, BATCH, 2, vlmfix="vhr")
    vlmfix.unpatch(tiny)
    assert "generate" not in vars(tiny)
    with pytest.raises(ValueError, match="vlmfix"):
        generate(tiny, BATCH, 2, vlmfix="vhr")


def test_eight_threads_of_different_methods_on_one_model(tiny: Any) -> None:
    """As behind a web server: requests come at once, again and again, each with its own method."""
    specs = [None, "vhr", "pai", made("var", tiny), "mma", [made("var", tiny), "vhr"], "guidance", made("vcd", tiny)]
    expected = []
    for spec in specs:
        alone = copy.deepcopy(tiny)
        expected.append(generate(alone if spec is None else vlmfix.patch(alone, spec), BATCH, 4)[1])
    vlmfix.patch(tiny, "hgai")
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            found = threads.map(lambda spec: generate(tiny, BATCH, 4, vlmfix=spec)[1], specs)
            for answer, right in zip(found, expected, strict=True):
                torch.testing.assert_close(answer, right, atol=1e-5, rtol=1e-5)


def test_a_call_while_the_first_one_installs_hooks(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers hooks layers when hidden states are first collected; a copy made meanwhile would be hooked twice."""
    capturing = pytest.importorskip("transformers.utils.output_capturing", reason="no hooks in this release")
    install, installing = capturing.install_output_capuring_hook, threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> None:
        install(*args, **kwargs)
        installing.set()
        time.sleep(0.5)

    expected = generate(vlmfix.patch(copy.deepcopy(tiny), "pai"), ONE, 2)[1]
    vlmfix.patch(tiny, "none")
    monkeypatch.setattr(capturing, "install_output_capuring_hook", slowly)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(generate, tiny, ONE, 2)
        assert installing.wait(60)
        assert torch.equal(generate(tiny, ONE, 2, vlmfix="pai")[1], expected)
        first.result()
    (variant,) = (each for _, each in vars(tiny)["_vlmfix_patch"].variants.values())
    hooks = [[len(module._forward_hooks) for module in each.model.vision_tower.modules()] for each in (tiny, variant)]
    assert hooks[0] == hooks[1] and 1 in hooks[0]
