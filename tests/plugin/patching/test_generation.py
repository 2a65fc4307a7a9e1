"""What ``generate`` does with a patched model, beside the invariants: windows, drafts, compiled code, wrappers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import (
    BOS,
    IMAGE,
    PAD,
    RAGGED,
    SINK_DIMS,
    SINK_WORD,
    Sample,
    collate,
    forward,
    generate,
    pictures,
)
from invariants import Loop, close
from method_parameters import parameters_of
from naive.act import NaiveAct
from naive.iri import RANKING
from naive.mma import NaiveMma
from naive.pai import NaivePai
from naive.reference import Reference
from naive.var import NaiveVar
from naive.vhr import NaiveVhr
from transformers import StaticCache

import vlmfix

VAR = vlmfix.VAR(sink_dims=SINK_DIMS, sink_threshold=3.0, layers=":")
VHR = vlmfix.VHR(layers=":")
ACT = vlmfix.ACT(layers=":", sink_threshold="1.5/N", min_rows=2)
MMA = vlmfix.MMA(layers=":")
PAI = vlmfix.PAI(alpha=0.8, layers=":")
IRI = vlmfix.IRI(2.0, 2.0, k1=2, k2=4, ranking=RANKING)
VISTA = vlmfix.VISTA(lam=0.8)
ALL_AT_ONCE = [MMA, PAI, ACT, VAR, VHR]
METHODS = pytest.mark.parametrize(
    "method",
    [VAR, VHR, [VAR, VHR], ACT, MMA, PAI, ALL_AT_ONCE],
    ids=["var", "vhr", "both", "act", "mma", "pai", "all"],
)
ONE = collate([RAGGED[1]])


def reference_of(model: Any, method: Any) -> Reference:
    """The naive reference of one of ``METHODS``."""
    methods = method if isinstance(method, list) else [method]
    act = NaiveAct(range(4), alpha=1.5, min_rows=2)
    formulas = {MMA: NaiveMma(range(4)), PAI: NaivePai(range(4), 0.8), ACT: act, VAR: NaiveVar(), VHR: NaiveVhr()}
    return Reference(model, [formula for each, formula in formulas.items() if each in methods])


def assert_differs(found: torch.Tensor, stock: torch.Tensor) -> None:
    """Negative control: the edit is visible, so that an equality means something."""
    assert (found - stock).abs().max() > 0.05


# Caches.


@pytest.mark.parametrize("method", [VHR, [VAR, VHR], ALL_AT_ONCE], ids=["vhr", "both", "all"])
def test_a_sliding_window_far_behind_the_image(build: Any, method: Any) -> None:
    """The window leaves the image while decoding; then there is nothing to redistribute, and heads stay frozen."""
    model = build("mistral", sinks=True, window=8)
    each = RAGGED[0]
    reference = reference_of(model, method)
    vlmfix.patch(model, method)
    _, expected = reference.generate(each.ids, each.pixels, 6, [PAD, IMAGE])
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        close(generate(model, collate([each]), 6, **options)[1][0], expected)


def test_a_cache_cropped_too_far_for_running_sums_is_refused(sinky: Any) -> None:
    """ACT keeps the rows of the last forward apart, older ones are summed up."""
    vlmfix.patch(sinky, ACT)
    for crop in (-2, -4):
        loop = Loop(sinky, collate([RAGGED[0]]))
        loop.steps(20, 21, 22)
        loop.cache.crop(crop)
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="cropped"):
            loop.read(23)


def test_generated_image_ids_are_no_images(sinky: Any) -> None:
    """A model may emit the placeholder's id; it stays text."""
    each = RAGGED[0]
    reference = Reference(sinky, [NaiveVar()])
    state, _ = reference.prompt(each.ids, each.pixels)
    vlmfix.patch(sinky, VAR)
    loop = Loop(sinky, collate([each]))
    for token in (IMAGE, IMAGE, 20):
        close(loop.read(token)[0, 0], reference.decode(state, token))


# The pipeline.


@pytest.mark.parametrize("name", ["vhr", "var", "act", "mma", "pai", "vcd", "guidance", "m3id"])
def test_pipeline(processor_folder: Path, name: str) -> None:
    from PIL import Image
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(processor_folder), device="cpu")
    pipe.processor.tokenizer.padding_side = "left"
    colours = [(200, 30, 60), (10, 200, 90), (90, 90, 250)]
    questions = ["is there a dog ?", "describe the image in detail .", "cat or dog or bird ?"]
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.new("RGB", (40, 40), colour)},
                    {"type": "text", "text": question},
                ],
            }
        ]
        for colour, question in zip(colours, questions, strict=True)
    ]
    options = {
        "generate_kwargs": {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12},
        "return_full_text": False,
    }

    def answers(batch_size: int) -> list[str]:
        return [out[0]["generated_text"] for out in pipe(messages, batch_size=batch_size, **options)]

    strong = {
        "vhr": {"alpha": 3.0},
        "pai": {"alpha": 2.0},
        "act": {"beta": 0.0, "sink_threshold": 0.02},
        "m3id": {"lam": 1.0},
    }.get(name, {})
    stock = answers(1)
    assert vlmfix.patch(pipe, name, **{**parameters_of(name, pipe.model), **strong}) is pipe
    assert vlmfix.status(pipe).methods[0].name == name
    assert vlmfix.status(pipe.model) is not None
    single = answers(1)
    assert vlmfix.status(pipe).edited[0] > 0
    assert single != stock
    assert answers(2) == single
    vlmfix.unpatch(pipe)
    assert answers(1) == stock


# Drafted tokens.


def repetitive() -> Sample:
    """A prompt whose last words occurred before, so that prompt lookup drafts tokens from the first step on."""
    phrase = (20, 21, SINK_WORD, 22, 23)
    return Sample((BOS, *phrase, *[IMAGE] * 9, *phrase, *phrase, 20, 21), pictures(1, 4))


@METHODS
def test_an_assistant_s_drafts_equal_plain_greedy(build: Any, method: Any) -> None:
    model, assistant = build(sinks=True), build(sinks=True)
    vlmfix.patch(model, method)
    inputs = collate([repetitive()])
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    found = model.generate(**inputs, max_new_tokens=10, do_sample=False, assistant_model=assistant)
    assert torch.equal(found[:, : expected.shape[1]], expected)


def test_tokens_drafted_beside_the_prompt_are_never_sinks(sinky: Any) -> None:
    """The first forward of drafting holds prompt and draft; an accepted sink word must not become a sink."""
    each = repetitive()
    vlmfix.patch(sinky, VAR)
    draft = (SINK_WORD, SINK_WORD, 22)
    found = Loop(sinky).read(*each.ids, *draft, pixel_values=each.pixels, logits_to_keep=len(draft) + 1)
    close(found[:, -3:], Loop(sinky, collate([each])).steps(*draft))


# torch.compile.


COMPILED = pytest.mark.parametrize("method", [VAR, VHR, ACT, PAI, MMA], ids=["var", "vhr", "act", "pai", "mma"])


def decode(model: Any, prefill: Any) -> torch.Tensor:
    """Logits of decode steps with a static cache; the prompt is read by ``prefill``."""
    length = ONE["input_ids"].shape[1]
    cache = StaticCache(config=prefill.config, max_cache_len=length + 12)
    with torch.compiler.set_stance("force_eager"):
        forward(prefill, ONE, past_key_values=cache, use_cache=True)
    found = []
    for step in range(4):
        ids, position = torch.tensor([[20 + step]]), torch.tensor([[length + step]])
        with torch.no_grad():
            out = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
        found.append(out.logits.clone())
    return torch.stack(found)


@pytest.mark.usefixtures("fresh_dynamo")
@COMPILED
def test_patching_after_compiling_takes_effect_and_unpatching_too(build: Any, method: Any) -> None:
    model = build(sinks=True, layers=2)
    stock = decode(model, model)
    compiled = torch.compile(model, backend="eager")
    close(decode(compiled, model), stock)
    vlmfix.patch(compiled, method)
    expected = decode(model, model)
    assert_differs(expected, stock)
    close(decode(compiled, model), expected)
    vlmfix.unpatch(compiled)
    close(decode(compiled, model), stock)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_prefill_equals_eager(build: Any) -> None:
    model = build(sinks=True, layers=2)
    stock = forward(model, ONE).logits
    vlmfix.patch(model, [VAR, VHR])
    expected = forward(model, ONE).logits
    assert_differs(expected, stock)
    close(forward(torch.compile(model, backend="eager"), ONE).logits, expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_patching_keeps_module_compile(build: Any) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = build(sinks=True, layers=2)
    stock = decode(model, model)
    model.compile(backend=backend)
    close(decode(model, model), stock)
    before = len(graphs)
    assert before
    vlmfix.patch(model, VAR)
    assert_differs(decode(model, model), stock)
    assert len(graphs) > before


# Wrappers and precision.


@pytest.mark.parametrize("method", [VAR, VHR, ACT, PAI, MMA, IRI, VISTA], ids=lambda method: method.name)
def test_peft_before_and_after(sinky: Any, method: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], r=2, init_lora_weights=False)
    other = copy.deepcopy(sinky)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(sinky, config).eval()
    stock = generate(wrapped, collate(RAGGED), 3)[1]
    assert vlmfix.patch(wrapped, method) is wrapped
    after = generate(wrapped, collate(RAGGED), 3)[1]
    vlmfix.patch(other, method)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = generate(peft.get_peft_model(other, config).eval(), collate(RAGGED), 3)[1]
    assert torch.equal(before, after)
    assert_differs(after, stock)
    assert vlmfix.status(wrapped).edited[0] > 0
    vlmfix.unpatch(wrapped)
    assert torch.equal(generate(wrapped, collate(RAGGED), 3)[1], stock)


@METHODS
def test_inference_mode_and_use_cache_false(sinky: Any, method: Any) -> None:
    vlmfix.patch(sinky, method)
    _, expected = generate(sinky, ONE, 1)
    with torch.inference_mode():
        close(sinky(**ONE, use_cache=False).logits[:, -1:], expected)
