"""What surrounds a model at run time: quantised and offloaded caches, accelerate's hooks, quantised weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, SINK_DIMS, collate, for_tests, forward, generate, llava_config, tiny_llava
from naive.var import NaiveVar, sink_value

import vlmfix

METHODS = pytest.mark.parametrize(
    "method",
    [
        vlmfix.VAR(sink_dims=SINK_DIMS, sink_threshold=3.0, layers=":"),
        vlmfix.VHR(layers=":"),
        vlmfix.ACT(layers=":", sink_threshold="1.5/N", min_rows=2),
        vlmfix.MMA(layers=":"),
        vlmfix.PAI(alpha=0.8, layers=":"),
    ],
    ids=lambda method: method.name,
)
needs_quanto = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None, reason="optimum-quanto is not installed (quantised caches)"
)
QUANTISED = {
    "cache_implementation": "quantized",
    "cache_config": {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 8},
}


@pytest.fixture
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpack four bits here: quanto's function in C++ would first be compiled, which takes most of a minute."""
    from optimum.quanto.library.extensions import cpp

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        assert bits == 4
        return torch.cat([packed & 0x0F, packed >> 4])

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))


# Caches.


@needs_quanto
@pytest.mark.usefixtures("_without_a_compiler")
@METHODS
def test_a_quantised_cache(sinky: Any, method: Any) -> None:
    """Strength zero is bitwise stock, the method acts, and a batch without padding equals its singles."""
    inputs = collate([RAGGED[0], RAGGED[0]])
    stock = generate(sinky, inputs, 6, **QUANTISED)[1]
    assert (stock - generate(sinky, inputs, 6)[1]).abs().max() > 0.01, "quantisation must be visible"
    vlmfix.patch(sinky, "none")
    assert torch.equal(generate(sinky, inputs, 6, **QUANTISED)[1], stock)
    vlmfix.patch(sinky, method)
    edited = generate(sinky, inputs, 6, **QUANTISED)[1]
    assert (edited[:, 0] - generate(sinky, inputs, 6)[1][:, 0]).abs().max() < 1e-5, "the prompt is not quantised yet"
    assert (edited - stock).abs().max() > 0.05
    torch.testing.assert_close(edited[0], edited[1], atol=1e-5, rtol=1e-5)


@needs_quanto
@pytest.mark.usefixtures("_without_a_compiler")
def test_rows_over_quantised_keys_are_redistributed_by_the_formula(build: Any) -> None:
    """The masks line up with what the cache gives back, also behind its residual part."""
    from transformers import QuantizedCache

    model = build(sinks=True, attn="eager", layers=1)
    each = RAGGED[0]
    rows: dict[str, list[torch.Tensor]] = {}
    for name in ("stock", "edited"):
        cache = QuantizedCache("quanto", model.config.text_config, nbits=4, residual_length=3, q_group_size=8)
        states = forward(model, collate([each]), past_key_values=cache, use_cache=True, output_hidden_states=True)
        for token in (40, 41, 42, 43, 44, 45):
            with torch.no_grad():
                ids = torch.tensor([[token]])
                out = model(input_ids=ids, past_key_values=cache, use_cache=True, output_attentions=True)
            rows.setdefault(name, []).append(out.attentions[0][0, :, 0])
        if name == "stock":
            vlmfix.patch(model, vlmfix.VAR(sink_dims=SINK_DIMS, sink_threshold=3.0, layers=":", image_mass=0.05))
    image = model.config.image_token_index if hasattr(model.config, "image_token_index") else 3
    is_image = [token == image for token in each.ids] + [False] * 6
    is_sink = [sink_value(x, SINK_DIMS) >= 3.0 for x in states.hidden_states[0][0]] + [False] * 6
    hits = 0
    for stock, edited in zip(rows["stock"], rows["edited"], strict=True):
        seen = stock.shape[1]
        for head in range(4):
            formula = NaiveVar(image_mass=0.05)
            expected, selected = formula.redistribute(stock[head], is_image[:seen], is_sink[:seen])
            torch.testing.assert_close(edited[head], expected, atol=1e-6, rtol=1e-5)
            hits += selected
    assert hits > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need CUDA streams")
@METHODS
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_equals_dynamic(sinky: Any, method: Any, kind: str) -> None:
    model = sinky.cuda()
    inputs = {name: value.cuda() for name, value in collate([RAGGED[0]]).items()}
    vlmfix.patch(model, method)
    expected = generate(model, inputs, 5)[1]
    found = generate(model, inputs, 5, cache_implementation=kind, disable_compile=True)[1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# Hooks and weights of other libraries.


@METHODS
def test_a_model_loaded_with_a_device_map(tmp_path: Path, method: Any) -> None:
    """Some layers on disk, the rest in memory, as for a model that does not fit."""
    from transformers import AutoModelForImageTextToText

    whole = tiny_llava(sinks=True)
    whole.save_pretrained(tmp_path / "model")
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    device_map |= {f"model.language_model.layers.{layer}": "disk" if layer > 1 else "cpu" for layer in range(4)}
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    for_tests(model)
    inputs = collate(RAGGED)
    vlmfix.patch(whole, method)
    vlmfix.patch(model, method)
    torch.testing.assert_close(generate(model, inputs, 3)[1], generate(whole, inputs, 3)[1], atol=1e-6, rtol=1e-6)


@METHODS
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_weights(tmp_path: Path, method: Any) -> None:
    """Nothing reads the weight of a linear layer: quantised layers are only called."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = llava_config(hidden=128, heads=2, kv_heads=2)
    tiny_llava(config=config).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=[
                "model.vision_tower",
                "model.multi_modal_projector",
                "lm_head",
            ],  # too narrow for its blocks
        ),
        device_map={"": "cpu"},
    )
    for_tests(model)
    assert type(model.model.language_model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    inputs = collate([RAGGED[0], RAGGED[1]])
    stock = generate(model, inputs, 3)[1]
    if method.name == "var":
        method = vlmfix.VAR(sink_dims=tuple(range(128)), sink_threshold=2.5, layers=":", nonsink_ratio=0.1)
    if method.name == "vhr":
        method = vlmfix.VHR(layers=":", outliers=False)
    vlmfix.patch(model, method)
    edited = generate(model, inputs, 3)[1]
    assert vlmfix.status(model).edited[0] > 0
    assert (edited - stock).abs().max() > 0.01
    for row, each in enumerate((RAGGED[0], RAGGED[1])):
        if method.name == "vhr":
            break  # its choice of heads may flip with the rounding of the 4-bit kernel, which depends on the batch
        single = generate(model, collate([each]), 3)[1][0]
        torch.testing.assert_close(edited[row], single, atol=1e-4, rtol=1e-4)
    vlmfix.unpatch(model)
    assert torch.equal(generate(model, inputs, 3)[1], stock)
