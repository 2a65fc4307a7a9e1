"""Finding a language model's sink dimensions."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.tiny_llava import BOS, RAGGED, SINK_DIMS, collate, forward, snapshot

import vlmfix
from vlmfix.model.sink_dims import known_sink_dims


def with_massive_first_token(model: Any, dims: dict[int, float]) -> Any:
    with torch.no_grad():
        for dim, value in dims.items():
            model.get_input_embeddings().weight[BOS, dim] = value
    return model


@pytest.mark.parametrize(
    "dims", [{5: 60.0}, {5: -60.0, 20: 50.0}, {31: 90.0, 0: -60.0, 7: 50.0}], ids=["one", "two", "three"]
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_known_dimensions_are_found_exactly(build: Any, kind: str, dims: dict[int, float]) -> None:
    model = with_massive_first_token(build(kind), dims)
    found = vlmfix.find_sink_dims(model)
    assert set(found) == set(dims)
    assert isinstance(found, tuple)
    assert found[0] == max(dims, key=lambda dim: abs(dims[dim]))


def test_a_layer_that_drops_its_sinks_midway_does_not_hide_them(build: Any) -> None:
    model = with_massive_first_token(build("llama", layers=8), {5: 60.0, 20: 50.0})
    layers = model.model.language_model.layers

    def scaled(factor: float) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[:, 0, [5, 20]] *= factor
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    for index, factor in ((3, 0.01), (4, 100.0)):
        layers[index].register_forward_hook(scaled(factor))
    assert set(vlmfix.find_sink_dims(model)) == {5, 20}
    layers[5].register_forward_hook(scaled(0.01))  # and stays without: in half of the layers there is none
    layers[2].register_forward_hook(scaled(0.01))
    assert vlmfix.find_sink_dims(model) == ()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_random_model_has_none(build: Any, kind: str, seed: int) -> None:
    assert vlmfix.find_sink_dims(build(kind, seed=seed)) == ()


def test_it_is_deterministic_and_leaves_no_trace(tiny: Any) -> None:
    with_massive_first_token(tiny, {5: 60.0, 20: 50.0})
    forward(tiny, collate([RAGGED[0]]))
    before, states = snapshot(tiny), (torch.get_rng_state(), random.getstate())
    assert vlmfix.find_sink_dims(tiny) == vlmfix.find_sink_dims(tiny) == (5, 20)
    assert snapshot(tiny) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_it_works_while_patched_and_is_not_counted(tiny: Any) -> None:
    with_massive_first_token(tiny, {5: 60.0})
    vlmfix.patch(tiny, "vhr", layers=":")
    assert vlmfix.find_sink_dims(tiny) == (5,)
    assert vlmfix.status(tiny).prompts == 0


def test_texts_of_one_s_own(tiny: Any) -> None:
    with_massive_first_token(tiny, {5: 60.0})
    assert vlmfix.find_sink_dims(tiny, torch.tensor([[BOS, 20, 21], [BOS, 30, 31]])) == (5,)
    assert vlmfix.find_sink_dims(tiny, torch.tensor([[22, 20, 21]])) == ()


@pytest.mark.parametrize("ids", [torch.tensor([1, 2, 3]), torch.zeros(2, 0, dtype=torch.long)])
def test_texts_of_a_wrong_shape(tiny: Any, ids: torch.Tensor) -> None:
    with pytest.raises(vlmfix.MethodError, match="batch"):
        vlmfix.find_sink_dims(tiny, ids)


def test_no_model() -> None:
    with pytest.raises(vlmfix.UnsupportedModelError):
        vlmfix.find_sink_dims("llava")


def test_var_looks_for_unknown_dimensions_itself(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with_massive_first_token(tiny, {5: 60.0})
    with caplog.at_level("INFO", logger="vlmfix"):
        vlmfix.patch(tiny, "var")
    assert vlmfix.status(tiny).methods[0].sink_dims == (5,)
    assert "find_sink_dims" in caplog.text


def test_var_says_when_there_are_none_and_edits_nothing(tiny: Any) -> None:
    stock = forward(tiny, collate(RAGGED)).logits
    vlmfix.patch(tiny, "var", layers=":")
    assert torch.equal(forward(tiny, collate(RAGGED)).logits, stock)
    status = vlmfix.status(tiny)
    assert status.edited == (0,)
    assert status.methods[0].sink_dims == ()
    assert any("no sink dimensions" in note for note in status.notes)
    assert "no sink dimensions" in str(status)


def test_var_says_when_no_token_can_reach_the_threshold(sinky: Any) -> None:
    vlmfix.patch(sinky, "var", sink_dims=SINK_DIMS)
    assert any("sink_threshold=20" in note for note in vlmfix.status(sinky).notes)
    vlmfix.patch(sinky, "var", sink_dims=SINK_DIMS, sink_threshold=3.0)
    assert not vlmfix.status(sinky).notes


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        (("llama", 4096, 32, 11008, 32000), (1415, 2533)),
        (("llama", 4096, 32, 11008, 32064), (1415, 2533)),
        (("llama", 5120, 40, 13824, 32064), (2100, 4743)),
        (("qwen2_vl_text", 3584, 28, 18944, 152064), (458, 2570)),
        (("llama", 4096, 32, 14336, 128256), None),
        (("mistral", 4096, 32, 11008, 32000), None),
    ],
)
def test_published_dimensions(shape: tuple[Any, ...], dims: tuple[int, ...] | None) -> None:
    names = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    known = known_sink_dims(SimpleNamespace(**dict(zip(names, shape, strict=True))))
    assert (known and known.dims) == dims


def test_models_without_image_tokens_have_no_sinks_to_find() -> None:
    from families import by_name

    family = by_name("mllama")
    with pytest.raises(vlmfix.MethodError, match="find_sink_dims"):
        vlmfix.find_sink_dims(family.build())
