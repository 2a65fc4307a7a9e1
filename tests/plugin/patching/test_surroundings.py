"""What other libraries and threads do to a model while it is patched: as if it had been done before, or refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, Sample, collate, forward, generate, pictures
from invariants import Loop, close
from method_parameters import IN_FORWARDS, parameters_of
from torch import nn

import vlmfix

BATCH = collate(RAGGED)


def acting(model: Any, name: str) -> Any:
    return vlmfix.patch(model, name, **parameters_of(name, model))


# Modules that are exchanged.


class Scaled(nn.Module):
    """What adapters and quantisers put in the place of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 1.3 * self.inner(states)


def quantise(model: Any) -> None:
    """The weights of every linear layer, the head's too, are packed: no parameter is left of them."""
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def exchange_norms(model: Any) -> None:
    language_model = model.model.language_model
    language_model.norm = Scaled(language_model.norm)
    for layer in language_model.layers:
        layer.input_layernorm = Scaled(layer.input_layernorm)


def exchange_blocks(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.mlp = Scaled(layer.mlp)
        layer.self_attn.o_proj = Scaled(layer.self_attn.o_proj)


def double(model: Any) -> None:
    model.to(torch.float64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("name", ["deco", "dola", "memvr", "var", "vcd", "vhr", "vista"])
@pytest.mark.parametrize("change", [quantise, exchange_norms, exchange_blocks, double], ids=lambda each: each.__name__)
def test_a_model_that_is_changed_after_patching(tiny: Any, name: str, change: Callable[[Any], None]) -> None:
    other = copy.deepcopy(tiny)
    change(other)
    stock = generate(other, BATCH, 3)[1]
    expected = generate(acting(other, name), BATCH, 3)[1]
    change(acting(tiny, name))
    torch.testing.assert_close(generate(tiny, BATCH, 3)[1], expected, atol=1e-4, rtol=1e-4)
    assert (expected - stock).abs().max() > 1e-3
    vlmfix.unpatch(tiny)
    torch.testing.assert_close(generate(tiny, BATCH, 3)[1], stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["deco", "dola", "vista"])
@pytest.mark.parametrize("is_told", [True, False], ids=["config too", "modules alone"])
def test_layers_that_are_lost_after_patching_are_missed(tiny: Any, name: str, is_told: bool) -> None:
    acting(tiny, name)
    tiny.model.language_model.layers = tiny.model.language_model.layers[:3]
    tiny.config.text_config.num_hidden_layers = 3 if is_told else 4
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"vlmfix\.(un)?patch\(model"):
        forward(tiny, BATCH)


def test_a_single_call_behind_a_class_that_was_exchanged(tiny: Any) -> None:
    vlmfix.patch(tiny, "none")
    generate(tiny, BATCH, 2, vlmfix="vhr")
    mlp = tiny.model.language_model.layers[1].mlp

    class Other(type(mlp)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 1.5 * super().forward(states)

    mlp.__class__ = Other
    found = generate(tiny, BATCH, 2, vlmfix="vhr")[1]
    assert torch.equal(found, generate(vlmfix.patch(tiny, "vhr"), BATCH, 2)[1])


def test_a_tower_or_layers_that_are_new_are_missed(build: Any) -> None:
    model = acting(build(), "vti")
    forward(model, BATCH)
    model.model.vision_tower = build(seed=5).model.vision_tower
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"exchanged. .* vlmfix.patch"):
        forward(model, BATCH)
    forward(acting(model, "vti"), BATCH)
    layers = model.model.language_model.layers
    layers.append(copy.deepcopy(layers[0]))
    layers[-1].self_attn.layer_idx = 4
    model.config.text_config.num_hidden_layers = 5
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"5 layers, .* vlmfix.patch"):
        forward(model, BATCH)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["pai", "vcd"])
def test_a_traced_graph_is_refused(tiny: Any, name: str) -> None:
    class Logits(nn.Module):
        def forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = tiny(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            return logits

    acting(tiny, name)
    one = collate([RAGGED[0]])
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Export the stock model"):
        torch.jit.trace(Logits(), (one["input_ids"], one["pixel_values"]), check_trace=False)


@pytest.mark.parametrize("name", ["deco", "pai", "vcd"])
def test_what_accelerate_wraps_and_unwraps(tiny: Any, name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = generate(acting(copy.deepcopy(tiny), name), BATCH, 3)[1]
    stock = generate(tiny, BATCH, 3)[1]
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        wrapped = accelerator.prepare(acting(tiny, name))
        assert (generate(wrapped, BATCH, 3)[1] - expected).abs().median() < 0.1 < (stock - expected).abs().max()
        model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    assert torch.equal(generate(model, BATCH, 3)[1], expected)
    assert torch.equal(generate(vlmfix.unpatch(model), BATCH, 3)[1], stock)


# Weights that lie elsewhere.


def on_the_cpu(model: Any, folder: Path) -> None:
    from accelerate import dispatch_model

    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True, main_device="cpu")


def on_the_disk(model: Any, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["deco", "pai", "vcd", "vhr", "vti"])
@pytest.mark.parametrize("move", [on_the_cpu, on_the_disk])
@pytest.mark.parametrize("order", ["patched first", "moved first"])
def test_hooks_of_accelerate_come_and_go(tiny: Any, tmp_path: Path, name: str, move: Any, order: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    stock = generate(tiny, BATCH, 3)[1]
    expected = generate(acting(copy.deepcopy(tiny), name), BATCH, 3)[1]
    steps = [lambda: acting(tiny, name), lambda: move(tiny, tmp_path)]
    for step in steps if order == "patched first" else reversed(steps):
        step()
    assert torch.equal(generate(tiny, BATCH, 3)[1], expected)
    hooks.remove_hook_from_module(tiny, recurse=True)
    assert torch.equal(generate(tiny, BATCH, 3)[1], expected)
    vlmfix.unpatch(tiny)
    assert torch.equal(generate(tiny, BATCH, 3)[1], stock)


def test_embeddings_of_words_are_recognised_where_their_table_cannot_be_read(tiny: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    text = collate([RAGGED[2]])
    embeds = tiny.get_input_embeddings()(text["input_ids"]).detach()
    with torch.no_grad():
        stock = tiny(inputs_embeds=embeds).logits
        accelerate.cpu_offload(vlmfix.patch(tiny, "pai", layers=":"), execution_device="cpu")
        assert torch.equal(tiny(inputs_embeds=embeds).logits, stock)
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="inputs_embeds"):
            tiny(inputs_embeds=embeds + 1)


# Rows of a cache.


@pytest.mark.parametrize("name", [name for name in IN_FORWARDS if name not in ("none", "opera")])
@pytest.mark.parametrize("are_alike", [True, False], ids=["one text", "two texts"])
def test_rows_that_change_places_take_along_what_is_known_or_are_refused(tiny: Any, name: str, are_alike: bool) -> None:
    """As a loop of the user's own puts the answers of a batch in another order."""
    first = RAGGED[0]
    samples = (first, Sample(first.ids, pictures(1, seed=9))) if are_alike else (first, RAGGED[3])
    acting(tiny, name)
    loop = Loop(tiny, collate(samples))
    loop.cache.reorder_cache(torch.tensor([1, 0]))
    mask = torch.nn.functional.pad(collate(samples)["attention_mask"][[1, 0]], (0, 1), value=1)
    step = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    if not are_alike:
        with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"another order \(reorder_cache\)"):
            loop.read(input_ids=torch.tensor([[20], [21]]), **step)
        return
    found = loop.read(input_ids=torch.tensor([[20], [21]]), **step)
    expected = [Loop(tiny, collate([each])).read(token) for each, token in zip(samples[::-1], (20, 21), strict=True)]
    close(found, torch.cat(expected))


# Models without a next token, and patches that change meanwhile.


def test_confidence_in_a_next_token_needs_one(tiny: Any) -> None:
    with pytest.raises(vlmfix.MethodError, match="predicts none"):
        vlmfix.patch(tiny.model, "adaptvis")
    vlmfix.patch(tiny.model, "adaptvis", mode="fixed", factor=2.0)


@pytest.mark.parametrize("name", ["pai", "vcd"])
@pytest.mark.parametrize("change", ["taken off", "replaced", "put on anew"])
def test_a_patch_that_changes_while_generate_runs(tiny: Any, name: str, change: str) -> None:
    """In another thread; what a logits processor changes itself, it knows."""
    expected = generate(acting(tiny, name), BATCH, 4)[1]

    def switch() -> None:
        vlmfix.unpatch(tiny)
        if change != "taken off":
            acting(tiny, "vhr" if change == "replaced" else name)

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == BATCH["input_ids"].shape[1] + 2:
            other = threading.Thread(target=switch)
            other.start()
            other.join()
        return scores

    with pytest.raises(vlmfix.UnsupportedFeatureError, match="while generate ran"):
        tiny.generate(**BATCH, max_new_tokens=4, do_sample=False, logits_processor=[process])
    assert torch.equal(generate(acting(tiny, name), BATCH, 4)[1], expected)
