"""HGAI, VAF, AdaptVis, EAH, modality balance and CMAI: what each must and must not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive
import pytest
import torch
from families.tiny_llava import (
    BOS,
    IMAGE,
    RAGGED,
    SINK_WORD,
    Sample,
    collate,
    forward,
    generate,
    pictures,
    sample,
    words,
)
from invariants import close
from naive.reference import Reference
from transformers import DynamicCache, StaticCache

import vlmfix
from vlmfix.methods.adaptvis import AdaptVis
from vlmfix.methods.cmai import CMAI
from vlmfix.methods.eah import EAH
from vlmfix.methods.hgai import HGAI
from vlmfix.methods.modality_balance import ModalityBalance
from vlmfix.methods.registry import make_method
from vlmfix.methods.vaf import VAF


def balance(**options: Any) -> ModalityBalance:
    return ModalityBalance(experimental=True, **options)


def cmai(**options: Any) -> CMAI:
    return CMAI(experimental=True, **options)


METHODS = ("hgai", "vaf", "adaptvis", "eah", "modality_balance", "cmai")
CASES = {
    label: (make_method(name, parameters), formula)
    for label, (name, parameters, formula) in naive.cases().items()
    if name in METHODS
}
NO_OPS = {
    "hgai": HGAI(0.0),
    "vaf": VAF(1.0, 1.0),
    "vaf, no head": VAF(heads=[]),
    "scalingvis": AdaptVis("fixed"),
    "adaptvis": AdaptVis(low=1.0, high=1.0),
    "eah": EAH(1.0),
    "modality balance": balance(tau=0.0),
    "cmai": cmai(rho=1.0),
}
ONE = collate([RAGGED[1]])


def each_of(*names: str) -> Any:
    return pytest.mark.parametrize("method", [CASES[name][0] for name in names], ids=names)


EACH = each_of("hgai 0", "vaf 0", "vaf 1", "adaptvis 0", "eah 0", "modality_balance 0", "cmai 0")
IN_CHUNKS = each_of("vaf 0", "modality_balance 0", "cmai 0", "cmai 1")
WHOLE = each_of("hgai 0", "vaf 1", "adaptvis 0", "eah 0")


# Agreement with the formulas (tests/plugin/methods/test_reference_methods.py has the answers of padded batches).


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["hgai 0", "vaf 0", "vaf 1", "adaptvis 1", "eah 0", "modality_balance 0", "cmai 0"])
def test_every_position_of_a_prompt_agrees_with_the_formula(build: Any, case: str, side: str) -> None:
    method, formula = CASES[case]
    model = build()
    reference = Reference(model, naive=[formula])
    vlmfix.patch(model, method)
    logits = forward(model, collate(RAGGED, side=side)).logits
    for row, each in enumerate(RAGGED):
        length = len(each.ids)
        found = logits[row, -length:] if side == "left" else logits[row, :length]
        close(found, reference.prompt(each.ids, each.pixels)[1])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "case", ["hgai 0", "vaf 0", "vaf 3", "eah 1", "eah 2", "modality_balance 0", "cmai 0", "cmai 1"]
)
def test_further_turns_agree_with_the_formula(build: Any, kind: str, case: str) -> None:
    """Text alone, then an image, then another one."""
    method, formula = CASES[case]
    model = build(kind, window=24)
    reference = Reference(model, naive=[formula])
    vlmfix.patch(model, method)
    turns = [Sample((BOS, *words(4, 7))), sample(2, 1, 5, seed=8), sample(1, 1, 4, seed=9)]
    cache, state = DynamicCache(config=model.config), None
    for turn in turns:
        ids = turn.ids if state is None else turn.ids[1:]
        state, expected = reference.prompt(ids, turn.pixels, state)
        with torch.no_grad():
            options = {"past_key_values": cache, "use_cache": True}
            out = model(input_ids=torch.tensor([ids]), pixel_values=turn.pixels, **options)
            close(out.logits[0], expected)
            for token in (SINK_WORD, 21):
                out = model(input_ids=torch.tensor([[token]]), **options)
                close(out.logits[0, 0], reference.decode(state, token))


# Of every method: caches, drafts, beams, chunks, precision.


@EACH
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_static_cache_equals_dynamic(build: Any, kind: str, method: Any) -> None:
    model = build(kind)
    vlmfix.patch(model, method)
    for inputs in (ONE, collate(RAGGED)):
        ids, expected = generate(model, inputs, 5)
        static_ids, static = generate(model, inputs, 5, cache_implementation="static", disable_compile=True)
        assert torch.equal(ids, static_ids)
        close(static, expected)


@EACH
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_prompt_lookup_equals_plain_greedy(build: Any, kind: str, method: Any) -> None:
    model = build(kind, window=40)
    phrase = (20, 21, SINK_WORD, 22, 23)
    inputs = collate([Sample((BOS, *phrase, *[IMAGE] * 9, 30, *phrase, 20, 21), pictures(1, 3))])
    vlmfix.patch(model, method)
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    found = model.generate(**inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(found[:, : expected.shape[1]], expected)


@EACH
def test_a_prompt_with_its_draft_equals_step_by_step(build: Any, method: Any) -> None:
    """Rows of a rejected draft leave nothing behind."""
    model, each, draft = build(), RAGGED[1], (40, 41, 42)
    vlmfix.patch(model, method)
    plain, drafted = DynamicCache(config=model.config), DynamicCache(config=model.config)
    forward(model, ONE, past_key_values=plain, use_cache=True)
    ids = torch.tensor([[*each.ids, *draft]])
    options = {"past_key_values": drafted, "use_cache": True}
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=each.pixels, logits_to_keep=len(draft) + 1, **options).logits
        for step, token in enumerate(draft):
            expected = model(input_ids=torch.tensor([[token]]), past_key_values=plain, use_cache=True).logits
            close(found[:, step + 1], expected[:, 0])
        drafted.crop(-3)
        plain.crop(-3)
        for tokens in ((50, 51, 52), (53,)):
            found = model(input_ids=torch.tensor([tokens]), logits_to_keep=len(tokens), **options).logits[:, -1]
            for token in tokens:
                expected = model(input_ids=torch.tensor([[token]]), past_key_values=plain, use_cache=True).logits
            close(found, expected[:, 0])


@EACH
def test_beams_of_a_batch_equal_recomputed_singles(build: Any, method: Any) -> None:
    model = build()
    vlmfix.patch(model, method)
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "length_penalty": 0.0}
    scores = {"return_dict_in_generate": True, "output_scores": True}
    batch = model.generate(**collate(RAGGED), **options)
    for row, each in enumerate(RAGGED):
        inputs = collate([each])
        single = model.generate(**inputs, **options, **scores)
        assert torch.equal(batch[row, -5:], single.sequences[0, -5:])
        cache = DynamicCache(config=model.config)
        logits = forward(model, inputs, past_key_values=cache, use_cache=True).logits[0, -1]
        total = 0.0
        for token in single.sequences[0, -5:].tolist():
            total += float(logits.log_softmax(-1)[token])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
        assert abs(total - float(single.sequences_scores[0])) < 1e-4


@pytest.fixture
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@each_of("hgai 0", "vaf 1", "adaptvis 2", "eah 0", "modality_balance 0", "cmai 0")
def test_compiled_decoding_equals_eager_and_compiles_once(build: Any, method: Any) -> None:
    model, length = build(layers=2), ONE["input_ids"].shape[1]
    vlmfix.patch(model, method)
    graphs: list[Any] = []

    def count(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def decode(run: Any) -> tuple[torch.Tensor, list[int]]:
        cache, logits, counts = StaticCache(config=model.config, max_cache_len=length + 12), [], []
        with torch.compiler.set_stance("force_eager"):
            forward(model, ONE, past_key_values=cache, use_cache=True)
        for step in range(4):
            ids, position = torch.tensor([[20 + step]]), torch.tensor([[length + step]])
            with torch.no_grad():
                out = run(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
            logits.append(out.logits.clone())
            counts.append(len(graphs))
        return torch.stack(logits), counts

    found, counts = decode(torch.compile(model, backend=count, fullgraph=True))
    close(found, decode(model)[0])
    assert counts == [1] * 4


@IN_CHUNKS
def test_decoding_equals_recomputation_without_a_cache(build: Any, method: Any) -> None:
    """Methods that edit all text rows alike; what a step needs of earlier rows was kept."""
    model = build()
    vlmfix.patch(model, method)
    cached, logits = generate(model, collate(RAGGED), 5)
    recomputed, expected = generate(model, collate(RAGGED), 5, use_cache=False)
    assert torch.equal(cached, recomputed)
    close(logits, expected)


@EACH
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rows_in_small_chunks_equal_one_piece(
    build: Any, kind: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    vlmfix.patch(model, method)
    right = collate(RAGGED, side="right")
    expected, logits = generate(model, collate(RAGGED), 3)[1], forward(model, right).logits
    monkeypatch.setattr("vlmfix.model.attention.CHUNK_ELEMENTS", 3 * 4 * 4 * 40)
    close(generate(model, collate(RAGGED), 3)[1], expected)
    close(forward(model, right).logits[right["attention_mask"] > 0], logits[right["attention_mask"] > 0])


@IN_CHUNKS
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_prompt_in_parts_equals_one_shot(build: Any, kind: str, method: Any) -> None:
    model, each = build(kind), RAGGED[0]
    vlmfix.patch(model, method)
    expected = forward(model, collate([each])).logits
    cache, found = DynamicCache(config=model.config), []
    parts = [each.ids[:2], each.ids[2:15], each.ids[15:17], each.ids[17:]]
    for part in parts:
        pixels = each.pixels if IMAGE in part else None
        with torch.no_grad():
            options = {"past_key_values": cache, "use_cache": True}
            found.append(model(input_ids=torch.tensor([part]), pixel_values=pixels, **options).logits)
    close(torch.cat(found, 1), expected)


@WHOLE
def test_a_prompt_in_parts_is_refused(build: Any, method: Any) -> None:
    model, each = build(), RAGGED[0]
    vlmfix.patch(model, method)
    cache = DynamicCache(config=model.config)
    options = {"past_key_values": cache, "use_cache": True}
    model(input_ids=torch.tensor([each.ids[:-2]]), pixel_values=each.pixels, **options)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="one forward"):
        model(input_ids=torch.tensor([each.ids[-2:]]), **options)


@EACH
def test_a_text_only_prompt_is_bitwise_stock(build: Any, method: Any) -> None:
    model, inputs = build(), collate([RAGGED[2]])
    stock = generate(model, inputs, 4)[1]
    vlmfix.patch(model, method)
    assert torch.equal(generate(model, inputs, 4)[1], stock)
    assert vlmfix.status(model).edited == (0,)
    assert vlmfix.status(model).prompts_without_image == 1


@pytest.mark.parametrize("name", NO_OPS)
def test_the_identity_is_bitwise_stock(build: Any, name: str) -> None:
    model, inputs = build(), collate(RAGGED)
    stock = generate(model, inputs, 4)[1]
    vlmfix.patch(model, NO_OPS[name])
    assert torch.equal(generate(model, inputs, 4)[1], stock)
    assert vlmfix.status(model).edited == (0,)


@EACH
def test_a_second_call_repeats_the_first(build: Any, method: Any) -> None:
    model = build()
    vlmfix.patch(model, method)
    first = generate(model, collate(RAGGED), 4)[1]
    generate(model, ONE, 2)
    assert torch.equal(generate(model, collate(RAGGED), 4)[1], first)
    edited = vlmfix.status(model).edited[0]
    assert edited > 0


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_half_precision_is_finite(build: Any, method: Any, dtype: torch.dtype, attn: str) -> None:
    model, inputs = build(attn=attn).to(dtype), collate(RAGGED)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    vlmfix.patch(model, method)
    assert generate(model, inputs, 3)[1].isfinite().all()
    assert vlmfix.status(model).edited[0] > 0


# Of every method: which rows of the maps change.


def allowed_rows(method: Any, each: Sample, prompt: int) -> list[int]:
    """Rows of a padded prompt that a method may edit."""
    if each.pixels is None:
        return []
    pad = prompt - len(each.ids)
    last_image = pad + max(i for i, token in enumerate(each.ids) if token == IMAGE)
    if isinstance(method, HGAI | AdaptVis):
        return [prompt - 1]
    return list(range(pad if isinstance(method, EAH) else last_image + 1, prompt))


@EACH
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_only_the_right_rows_of_a_layer_change_and_they_sum_to_one(build: Any, kind: str, method: Any) -> None:
    model, inputs = build(kind, attn="eager", window=16), collate(RAGGED)
    prompt = inputs["input_ids"].shape[1]
    stock = forward(model, inputs, output_attentions=True).attentions
    vlmfix.patch(model, replace(method, layers=[0, 2] if isinstance(method, CMAI) else [2]))
    edited = forward(model, inputs, output_attentions=True).attentions
    assert all(torch.equal(stock[below], edited[below]) for below in range(2))
    sums = edited[2].sum(-1)
    for row, each in enumerate(RAGGED):
        rows = allowed_rows(method, each, prompt)
        others = [i for i in range(prompt) if i not in rows]
        assert torch.equal(edited[2][row, :, others], stock[2][row, :, others])
        close(sums[row, :, rows], torch.ones_like(sums[row, :, rows]))
        assert (edited[2][row, :, rows] - stock[2][row, :, rows]).abs().sum() > 0 or not rows
        hidden = stock[2][row, :, rows] == 0
        assert (edited[2][row, :, rows][hidden] == 0).all()


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
def test_keys_and_values_of_other_positions_stay_bitwise(build: Any, method: Any, side: str) -> None:
    model, inputs = build(), collate(RAGGED, side=side)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    forward(model, inputs, past_key_values=caches[0], use_cache=True)
    vlmfix.patch(model, method)
    forward(model, inputs, past_key_values=caches[1], use_cache=True)
    seen = 0.0
    for before, after in zip(caches[0].layers, caches[1].layers, strict=True):
        for row, each in enumerate(RAGGED):
            prompt = inputs["input_ids"].shape[1] if side == "left" else len(each.ids)
            rows = allowed_rows(method, each, prompt)
            others = [i for i in range(prompt) if i not in rows]  # padding behind a prompt sees edited rows
            for stock, edited in ((before.keys, after.keys), (before.values, after.values)):
                assert torch.equal(stock[row][:, others], edited[row][:, others])
                seen += float((stock[row][:, rows] - edited[row][:, rows]).abs().sum())
    assert seen > 0.1


# Parameters.


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("hgai", {"alpha": -0.1}),
        ("hgai", {"alpha": float("inf")}),
        ("hgai", {"edit_prompt": 1}),
        ("vaf", {"enhance": float("nan")}),
        ("vaf", {"suppress": float("inf")}),
        ("vaf", {"multiply": "plain"}),
        ("vaf", {"heads": "some"}),
        ("vaf", {"heads": None}),
        ("vaf", {"heads": [(1, 2, 3)]}),
        ("vaf", {"heads": [(-1, 2)]}),
        ("adaptvis", {"mode": "both"}),
        ("adaptvis", {"threshold": 1.1}),
        ("adaptvis", {"low": float("nan")}),
        ("adaptvis", {"factor": 2.0}),
        ("adaptvis", {"probe_tokens": []}),
        ("adaptvis", {"probe_tokens": [-1]}),
        ("eah", {"threshold": -0.1}),
        ("eah", {"threshold": 1.5}),
        ("eah", {"threshold": True}),
        ("eah", {"threshold": "high"}),
        ("modality_balance", {"tau": 1.5, "experimental": True}),
        ("cmai", {"rho": 0.0, "experimental": True}),
        ("cmai", {"rho": 1.1, "experimental": True}),
        ("cmai", {"renorm": "text", "experimental": True}),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(vlmfix.MethodError, match=f"{next(iter(parameters))} must be"):
        make_method(name, parameters)


@pytest.mark.parametrize("name", ["modality_balance", "cmai"])
def test_methods_without_evidence_must_be_asked_for(build: Any, name: str) -> None:
    model = build()
    with pytest.raises(vlmfix.MethodError, match=f"vlmfix.patch\\(model, '{name}', experimental=True\\)"):
        vlmfix.patch(model, name)
    assert vlmfix.status(model) is None
    vlmfix.patch(model, name, experimental=True)
    assert "not a" in vlmfix.status(model).notes[0]
    assert generate(model, ONE, 2)[1].isfinite().all()
