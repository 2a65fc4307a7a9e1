"""``vlmfix.calibrate``: every search against a plain computation, refusals, and a model left as it was found."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from families.saved_llava import CATEGORIES, build_coco_folder, build_tiny_llava
from families.tiny_llava import snapshot
from PIL import Image

import vlmfix
from vlmfix import Calibration, CalibrationSample, DataError, MethodError, UnsupportedFeatureError, probes
from vlmfix.calibration import adhh
from vlmfix.calibration.logit_lens import LogitLens, StreamLog
from vlmfix.calibration.session import Contrast, Session, ranked, scaled_count
from vlmfix.cli import main
from vlmfix.model.anatomy import analyse
from vlmfix.observe.watch import AttentionLog, AttentionWatch
from vlmfix.observe.words import find_word, locate_mentions, need_yes_no_tokens, word_tokens

LAYERS, HEADS = 3, 4
PROMPT = "please describe this image in detail ."
IMAGE = 4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = build_tiny_llava(tmp_path_factory.mktemp("llava"), layers=LAYERS, heads=HEADS, kv_heads=2, seed=3)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Any:
    return copy.deepcopy(loaded[0])


@pytest.fixture
def processor(loaded: tuple[Any, Any]) -> Any:
    return copy.deepcopy(loaded[1])


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 40))


def mentions(caption: str) -> list[tuple[str, str]]:
    return [(word, word) for word in re.findall(r"\w+", caption) if word in CATEGORIES]


def described(number: int = 4, objects: Sequence[str] = CATEGORIES[::2]) -> list[CalibrationSample]:
    return [CalibrationSample(picture(seed), PROMPT, objects=objects, image_id=seed) for seed in range(number)]


def asked(number: int = 5) -> list[CalibrationSample]:
    """Questions of two lengths, about an object each."""
    samples = []
    for seed in range(number):
        name = CATEGORIES[seed]
        more = "answer the question using a single word ." if seed % 2 else ""
        samples.append(
            CalibrationSample(
                picture(seed),
                f"is there a {name} in the image ? {more}",
                answer=seed % 3 == 0,
                objects={name} if seed % 3 == 0 else None,
                absent=None if seed % 3 == 0 else {name},
            )
        )
    return samples


def encode(processor: Any, sample: CalibrationSample) -> dict[str, torch.Tensor]:
    text = f"USER: <image>\n{sample.question} ASSISTANT:"
    return dict(processor(images=[sample.load()], text=[text], return_tensors="pt"))


def table(calibration: Calibration, name: str) -> torch.Tensor:
    return torch.tensor(calibration.provenance["scores"][name], dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), atol=2e-6, rtol=1e-5)  # kept to six digits


# The plain computations: one sample at a time, no cache, whole sequences, weights read where they are.


class Plain:
    """A model looked at with hooks of the test's own."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.layers = model.model.language_model.layers

    @torch.no_grad()
    def caption(self, sample: CalibrationSample, tokens: int) -> list[int]:
        inputs = encode(self.processor, sample)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
        row = output[0, inputs["input_ids"].shape[1] :].tolist()
        return row[: row.index(2)] if 2 in row else row

    def events(self, samples: Sequence[CalibrationSample], tokens: int) -> list[tuple[int, int, str, bool, list[int]]]:
        """(sample, token index, name, is real, caption): the tokenizer has one token per word."""
        vocabulary = self.processor.tokenizer.convert_ids_to_tokens
        found = []
        for number, sample in enumerate(samples):
            ids = self.caption(sample, tokens)
            for index, word in enumerate(vocabulary(ids)):
                if word in CATEGORIES:
                    assert sample.objects is not None
                    found.append((number, index, word, word in sample.objects, ids))
        return found

    @torch.no_grad()
    def read(self, sample: CalibrationSample, ids: Sequence[int] = (), ablate: tuple[int, int] | None = None) -> Any:
        """Read a prompt and generated ids at once, with one head's slice zeroed in the last row."""
        inputs = encode(self.processor, sample)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(ids)], dtype=torch.int64)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        self.slices: dict[int, torch.Tensor] = {}
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(self._hook(at, ablate))
            for at, layer in enumerate(self.layers)
        ]
        output = self.model(**inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        self.ids = inputs["input_ids"][0]
        return output

    def _hook(self, at: int, ablate: tuple[int, int] | None) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            heads = args[0].clone()
            if ablate is not None and ablate[0] == at:
                size = heads.shape[-1] // HEADS
                heads[0, -1, ablate[1] * size : (ablate[1] + 1) * size] = 0
            self.slices[at] = heads[0, -1]
            return (heads,)

        return hook

    @torch.no_grad()
    def gain(self, output: Any, tokens: Sequence[int], norm: bool = False) -> torch.Tensor:
        """ln P(tokens | r + H) - ln P(tokens | r), from the last forward."""
        result = torch.zeros(LAYERS, HEADS)
        for at in range(LAYERS):
            residual = output.hidden_states[at][0, -1]
            size = len(self.slices[at]) // HEADS
            for head in range(HEADS):
                part = slice(head * size, (head + 1) * size)
                weight = self.layers[at].self_attn.o_proj.weight
                added = weight[:, part] @ self.slices[at][part]
                values = []
                for state in (residual + added, residual):
                    if norm:
                        state = self.model.model.language_model.norm(state)
                    p = torch.softmax(self.model.lm_head.weight.double() @ state.double(), dim=0)
                    values.append(math.log(sum(float(p[token]) for token in tokens)))
                result[at, head] = values[0] - values[1]
        return result

    def attention(self, output: Any, row: int, keys: Sequence[int]) -> torch.Tensor:
        return torch.stack([weights[0, :, row, list(keys)].sum(-1) for weights in output.attentions])

    def image_keys(self) -> list[int]:
        return (self.ids == IMAGE).nonzero()[:, 0].tolist()


@pytest.fixture
def plain(model: Any, processor: Any) -> Plain:
    return Plain(copy.deepcopy(model), processor)


YES_NO = dict(batch_size=2)
CAPTIONS: dict[str, Any] = dict(mentions=mentions, max_new_tokens=24, batch_size=3)


def test_act_equals_single_runs(model: Any, processor: Any, plain: Plain) -> None:
    samples = asked()
    found = vlmfix.calibrate(model, "act", samples, processor=processor, layers=[0, 2], share=0.5, **YES_NO)
    yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))

    def margin(sample: CalibrationSample) -> float:
        logits = plain.read(sample).logits[0, -1]
        return float(logits[yes] - logits[no]) * (1 if sample.answer else -1)

    before = [margin(sample) for sample in samples]
    gains = torch.zeros(2, HEADS)
    for row, at in enumerate((0, 2)):
        for head in range(HEADS):
            with vlmfix.patched(plain.model, vlmfix.ACT(heads=[(at, head)])):
                gains[row, head] = sum(margin(s) - b for s, b in zip(samples, before, strict=True)) / len(samples)
    close(table(found, "margin_gain"), gains)
    assert gains.abs().max() > 1e-3
    better = [(float(gains[row, head]), (at, head)) for row, at in enumerate((0, 2)) for head in range(HEADS)]
    expected = [head for gain, head in sorted(better, key=lambda pair: -pair[0]) if gain > 0][:4]
    assert list(found.method.heads) == expected  # type: ignore[attr-defined]
    one = vlmfix.calibrate(model, "act", samples, processor=processor, layers=[0, 2], share=0.01, **YES_NO)
    assert one.method.heads == tuple(expected[:1])  # type: ignore[attr-defined]


def test_adhh_equals_whole_recomputation(model: Any, processor: Any, plain: Plain) -> None:
    samples = [*described(2), *described(1, CATEGORIES)]  # the last one invents nothing
    found = vlmfix.calibrate(model, "adhh", samples, processor=processor, count=3, variants=5, **CAPTIONS)
    sums, counts = {True: torch.zeros(LAYERS, HEADS), False: torch.zeros(LAYERS, HEADS)}, {True: 0, False: 0}
    events = plain.events(samples, 24)
    hallucinating = {number for number, index, _, is_real, _ in events if not is_real and index > 0}
    for number, index, _, is_real, ids in events:
        if number not in hallucinating or index == 0:
            continue
        counts[is_real] += 1
        p = plain.read(samples[number], ids[:index]).logits[0, -1].softmax(-1)[ids[index]]
        for at in range(LAYERS):
            for head in range(HEADS):
                logits = plain.read(samples[number], ids[:index], ablate=(at, head)).logits[0, -1]
                sums[is_real][at, head] += p - logits.softmax(-1)[ids[index]]
    assert min(counts.values()) > 0
    assert len(hallucinating) == found.provenance["counts"]["captions"] < len({event[0] for event in events})
    assert found.provenance["counts"]["hallucinated"] == counts[False]
    assert found.provenance["counts"]["real"] == counts[True]
    expected = sums[False] / counts[False] - sums[True] / counts[True]
    close(table(found, "score"), expected)
    assert expected.abs().max() > 1e-3
    best = expected.flatten().argsort(descending=True)[:3].tolist()
    assert found.method.heads == tuple((each // HEADS, each % HEADS) for each in best)  # type: ignore[attr-defined]


@pytest.mark.parametrize("gate", ["mean", "share"])
def test_adaiat_equals_whole_recomputation(gate: str, model: Any, processor: Any, plain: Plain) -> None:
    samples = described()
    found = vlmfix.calibrate(model, "adaiat", samples, processor=processor, min_generated=3, gate=gate, **CAPTIONS)
    records: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    early = 0
    for number, index, _, is_real, ids in plain.events(samples, 24):
        if index < 3:
            early += 1
            continue
        output = plain.read(samples[number], ids[:index])
        generated = range(len(plain.ids) - index, len(plain.ids))
        share = plain.attention(output, -1, generated)
        records[is_real].append(share / index if gate == "mean" else share)
    assert found.provenance["counts"]["early"] == early > 0
    statistics = found.method.statistics  # type: ignore[attr-defined]
    assert (statistics.num_real, statistics.num_hallucinated) == (len(records[True]), len(records[False]))
    assert statistics.kind == gate
    close(torch.tensor(statistics.real, dtype=torch.float64), torch.stack(records[True]).mean(0))
    close(torch.tensor(statistics.hallucinated, dtype=torch.float64), torch.stack(records[False]).mean(0))


@pytest.mark.parametrize("norm", [False, True])
def test_allpath_of_questions(norm: bool, model: Any, processor: Any, plain: Plain) -> None:
    samples = asked()
    cells = {CATEGORIES[3]: [0, 5, 6]}
    samples[3] = dataclasses.replace(samples[3], cells=cells)  # an object that is there
    found = vlmfix.calibrate(
        model, "allpath", samples, processor=processor, answers="yesno", lens_norm=norm, xi=2, zeta=1, **YES_NO
    )
    tokens = {
        True: processor.tokenizer.convert_tokens_to_ids("yes"),
        False: processor.tokenizer.convert_tokens_to_ids("no"),
    }
    text = torch.zeros(LAYERS, HEADS)
    image: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for number, sample in enumerate(samples):
        output = plain.read(sample)
        text += plain.gain(output, [tokens[bool(sample.answer)]], norm)
        text -= plain.gain(output, [tokens[not sample.answer]], norm)
        row = plain.ids.tolist().index(processor.tokenizer.convert_tokens_to_ids(CATEGORIES[number]))
        keys = plain.image_keys()
        if sample.cells:
            keys = [keys[cell] for cell in cells[CATEGORIES[3]]]
        image[bool(sample.answer)].append(plain.attention(output, row, keys))
    close(table(found, "text"), text / len(samples))
    expected = torch.stack(image[True]).mean(0) - torch.stack(image[False]).mean(0)
    close(table(found, "image"), expected)
    by_text = [(each // HEADS, each % HEADS) for each in text.flatten().argsort(descending=True).tolist()]
    best = int(expected.flatten().argmax())
    method: Any = found.method
    assert set(method.up_heads) == {*by_text[:2], (best // HEADS, best % HEADS)}
    assert method.down_heads == (by_text[-1], by_text[-2])
    assert method.answers == "yesno"


def test_allpath_of_captions(model: Any, processor: Any, plain: Plain) -> None:
    samples = described(3)
    found = vlmfix.calibrate(model, "allpath", samples, processor=processor, **CAPTIONS)
    text: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    image: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    seen = set()
    for number, index, name, is_real, ids in plain.events(samples, 24):
        output = plain.read(samples[number], ids[:index])
        text[is_real].append(plain.gain(output, [ids[index]]))
        if (number, name) not in seen:
            seen.add((number, name))
            image[is_real].append(plain.attention(output, -1, plain.image_keys()))
    assert found.provenance["counts"]["text_safe"] == len(text[True]) > len(image[True])
    close(table(found, "text"), torch.stack(text[True]).mean(0) - torch.stack(text[False]).mean(0))
    close(table(found, "image"), torch.stack(image[True]).mean(0) - torch.stack(image[False]).mean(0))
    assert found.provenance["options"] == {"answers": "caption", "lens_norm": False, "xi": 1, "zeta": 1}


def test_vaf_takes_the_half_that_looks_at_the_image(model: Any, processor: Any, plain: Plain) -> None:
    samples = asked()
    found = vlmfix.calibrate(model, "vaf", samples, processor=processor, layers=[0, 2], **YES_NO)
    outputs = [(plain.read(sample), plain.image_keys()) for sample in samples]
    mass = torch.stack([plain.attention(output, -1, keys) for output, keys in outputs]).mean(0)
    close(table(found, "image_mass"), mass)
    best = {at: mass[at].argsort(descending=True)[: HEADS // 2].tolist() for at in (0, 2)}
    assert found.method.heads == tuple((at, head) for at in (0, 2) for head in sorted(best[at]))  # type: ignore[attr-defined]
    limit = float(mass.flatten().sort().values[-5:-3].mean())
    found = vlmfix.calibrate(model, "maskcd", samples, processor=processor, threshold=limit, alpha=0.5, **YES_NO)
    heads = found.method.heads  # type: ignore[attr-defined]
    assert heads == tuple(map(tuple, (mass > limit).nonzero().tolist())) and len(heads) == 4
    vlmfix.patch(model, found)


def with_sinks(model: Any, dims: tuple[int, ...] = (7, 19)) -> Any:
    """Make the first token of every prompt a sink."""
    with torch.no_grad():
        model.get_input_embeddings().weight[1, list(dims)] = torch.tensor([90.0, -60.0])
        for layer in model.model.language_model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[list(dims)] = 0.05
    return model


@pytest.mark.parametrize("planted", [True, False])
def test_var_finds_planted_sink_dimensions(planted: bool, model: Any, processor: Any) -> None:
    found = vlmfix.calibrate(with_sinks(model) if planted else model, "var", asked(), processor=processor, **YES_NO)
    assert found.method.sink_dims == ((7, 19) if planted else ())  # type: ignore[attr-defined]


def test_var_finds_a_threshold_that_image_tokens_reach(
    model: Any, processor: Any, plain: Plain, caplog: pytest.LogCaptureFixture
) -> None:
    """20 is out of reach in a model of width 32, whose phi is at most 5.7."""
    samples, options = asked(), {"processor": processor, "layers": "1:", "image_mass": 0.0, **YES_NO}
    found = vlmfix.calibrate(with_sinks(model), "var", samples, sink_share=0.1, **options)
    with_sinks(plain.model)
    values = []
    for sample in samples:
        states = torch.stack(plain.read(sample).hidden_states[1:LAYERS])[:, 0, plain.image_keys()]
        peak = states[..., [7, 19]].abs().amax(-1)
        values.append(peak / (states.square().mean(-1) + 1e-6).sqrt())
    phi = torch.cat(values, dim=1)
    method, provenance = found.method, found.provenance
    threshold = method.sink_threshold  # type: ignore[attr-defined]
    assert 0.1 * phi.numel() < int((phi >= threshold).sum()) <= 0.1 * phi.numel() + 2
    assert provenance["options"] == {
        "sink_threshold": threshold,
        "threshold_from": "image tokens",
        "sink_share": 0.1,
        "largest_phi": pytest.approx(float(phi.max()), rel=1e-4),
    }
    assert provenance["counts"]["sinks_in_some_layer"] == int((phi >= threshold).any(0).sum()) > 0
    assert f"reaches sink_threshold=20: the largest phi is {phi.max():.1f}" in caplog.text
    assert f"The recipe has {threshold:g}" in caplog.text
    edited = []
    for recipe in (found, dataclasses.replace(method, sink_threshold=20.0)):  # type: ignore[call-arg]
        vlmfix.patch(model, recipe)
        model(**encode(processor, samples[0]))
        edited.append(vlmfix.status(model).edited[0])
    vlmfix.unpatch(model)
    assert edited[0] > 0 == edited[1]
    caplog.clear()
    kept = vlmfix.calibrate(model, "var", samples, sink_threshold=20.0, **options)
    assert kept.method.sink_threshold == 20.0 and "The recipe changes nothing" in caplog.text  # type: ignore[attr-defined]
    caplog.clear()
    low = vlmfix.calibrate(model, "var", samples, sink_threshold=float(phi.max()) - 0.01, **options)
    assert low.provenance["options"]["threshold_from"] == "caller" and not caplog.text


def test_iri_ranks_by_causal_tracing(model: Any, processor: Any) -> None:
    """Questions answered with yes, one at a time; the rest is left out."""
    noise = probes.Corruption(sigma=4.0, seed=2)
    options = {"sigma": 4.0, "noise_seed": 2, "floor": 0.0, "batch_size": 2, "rows": 3}
    found = vlmfix.calibrate(model, "iri", asked(8), processor=processor, k1=1, **options)
    asked_yes = [sample for sample in asked(8) if sample.answer]
    answer = need_yes_no_tokens(processor.tokenizer).yes
    singles = (encode(processor, sample) for sample in asked_yes)
    traced = probes.causal_trace(model, singles, answer, corruption=noise, floor=0.0)
    ranking = found.method.ranking  # type: ignore[attr-defined]
    for component, rates in (("attention", ranking.rr_attn), ("mlp", ranking.rr_mlp)):
        torch.testing.assert_close(torch.tensor(rates).double(), traced.of(component), atol=1e-3, rtol=1e-3)
        close(table(found, f"recovery_{component}")[:, 0], torch.tensor(rates))
    counts = found.provenance["counts"]
    assert counts["answered_no"] == 8 - len(asked_yes)
    assert counts["traced"] == int(traced.is_kept.sum()) > 0
    assert found.provenance["options"]["sigma"] == 4.0
    assert ranking.model == Path(model.config._name_or_path).name
    inputs = encode(processor, asked_yes[0])
    stock = model(**inputs).logits
    vlmfix.patch(model, found)
    assert vlmfix.status(model).methods[0].k1 == 1
    assert not torch.equal(model(**inputs).logits, stock)
    vlmfix.unpatch(model)
    model.config._name_or_path = "another/model"
    with pytest.raises(MethodError, match="Rankings do not carry over"):
        vlmfix.patch(model, found)


@torch.no_grad()
def test_a_planted_head_is_the_only_one_that_matters(model: Any, processor: Any) -> None:
    """All other heads write nothing: their influence is 0, and the one that is left decides."""
    planted, size = (1, 2), 32 // HEADS
    for at, layer in enumerate(model.model.language_model.layers):
        keep = layer.self_attn.o_proj.weight[:, planted[1] * size : (planted[1] + 1) * size].clone()
        layer.self_attn.o_proj.weight.zero_()
        if at == planted[0]:
            layer.self_attn.o_proj.weight[:, planted[1] * size : (planted[1] + 1) * size] = 8 * keep
    options: dict[str, Any] = {"processor": processor, **CAPTIONS}
    # Whatever it favours, one of the two labellings calls it hallucinated.
    runs = [vlmfix.calibrate(model, "adhh", described(4, CATEGORIES[start::2]), **options) for start in (0, 1)]
    for run in runs:
        scores = table(run, "score")
        assert scores[planted].abs() > 1e-3
        scores[planted] = 0
        assert (scores == 0).all()
    assert planted in [run.method.heads[0] for run in runs]  # type: ignore[attr-defined]
    act = vlmfix.calibrate(model, "act", asked(), processor=processor, layers="0:", share=1.0)
    gains = table(act, "margin_gain")
    assert gains[planted] != 0
    gains[planted] = 0
    assert gains.abs().max() < 1e-5
    lens = vlmfix.calibrate(model, "allpath", described(), **options)
    text = table(lens, "text")
    assert text[planted] != 0 and lens.provenance["counts"]["text_dropped"] == 0
    text[planted] = 0
    assert text.abs().max() == 0


EVERY = [
    ("act", "asked", {}),
    ("vaf", "asked", {}),
    ("var", "asked", {}),
    ("allpath", "asked", {"answers": "yesno"}),
    ("allpath", "described", CAPTIONS),
    ("adaiat", "described", CAPTIONS),
    ("adhh", "described", {**CAPTIONS, "max_new_tokens": 12}),
    ("iri", "asked", {"corruption": "mean", "floor": 0.0}),
]


@pytest.mark.parametrize(("name", "data", "options"), EVERY)
def test_round_trip_and_determinism(
    name: str, data: str, options: dict[str, Any], model: Any, processor: Any, tmp_path: Path
) -> None:
    samples = asked() if data == "asked" else described(3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = vlmfix.calibrate(model, name, samples, processor=processor, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = vlmfix.calibrate(model, name, iter(samples), processor=processor, **options)
    assert again.method == first.method and again.provenance == first.provenance
    first.save(tmp_path / "recipe.json")
    vlmfix.save_recipe(tmp_path / "plain.json", first.method)
    assert (
        vlmfix.load_recipe(tmp_path / "recipe.json") == vlmfix.load_recipe(tmp_path / "plain.json") == (first.method,)
    )
    saved = json.loads((tmp_path / "recipe.json").read_text())["calibration"]
    assert saved == first.provenance
    assert saved["sample_ids"] == list(range(len(samples)))
    assert saved["num_samples"] == len(samples) and saved["seed"] == 0 and saved["versions"]["torch"]
    for recipe in (first, tmp_path / "recipe.json"):
        vlmfix.patch(model, recipe)
        status = vlmfix.status(model)
        assert status is not None and status.methods[0].name == name
    vlmfix.unpatch(model)


def test_limit_draws_by_seed(model: Any, processor: Any) -> None:
    runs = [vlmfix.calibrate(model, "vaf", described(9), processor=processor, limit=3, seed=s) for s in (0, 0, 1)]
    ids = [run.provenance["sample_ids"] for run in runs]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 3 and ids[0] == sorted(ids[0])


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(("name", "data", "options"), EVERY)
def test_the_model_is_left_as_found(
    name: str, data: str, options: dict[str, Any], patched: bool, model: Any, processor: Any
) -> None:
    samples = asked() if data == "asked" else described(3)
    expected = vlmfix.calibrate(model, name, samples, processor=processor, **options)
    processor.tokenizer.padding_side = "right"
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5  # felt in training mode only
    model.train()
    model.model.vision_tower.eval()
    if patched:
        vlmfix.patch(model, "vhr", alpha=3.0)
    before, status = snapshot(model), vlmfix.status(model)
    found = vlmfix.calibrate(model, name, samples, processor=processor, **options)
    assert found.method == expected.method  # the stock model in evaluation mode was looked at
    after = snapshot(model)
    for module, attributes in before.items():
        assert attributes.keys() == after[module].keys()
        for attribute, value in attributes.items():
            if not attribute.startswith("_forward") and attribute != "config":
                assert after[module][attribute] == value, (module, attribute)
            elif not patched:
                assert after[module][attribute] == value, (module, attribute)
    assert vlmfix.status(model) == status
    assert processor.tokenizer.padding_side == "right"


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_left_as_found_after_an_exception(patched: bool, model: Any, processor: Any) -> None:
    inputs = encode(processor, described(1)[0])
    if patched:
        vlmfix.patch(model, "vhr", alpha=3.0)
    before = model(**inputs).logits

    def fail(caption: str) -> list[tuple[str, str]]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        vlmfix.calibrate(model, "adhh", described(), processor=processor, mentions=fail)
    watching = dataclasses.replace(described(1)[0], cells={"dog": [999]})
    with pytest.raises(DataError, match="cells of 'dog' must be from 0 to 15"):
        vlmfix.calibrate(model, "allpath", [watching], processor=processor, mentions=mentions)
    assert (vlmfix.status(model) is not None) == patched
    assert torch.equal(model(**inputs).logits, before)


# Other families: positions, caches and layers of their own.


def family_session(name: str) -> tuple[Any, Any]:
    """A session on a tiny model of a family whose only sample is the family's own."""
    family = families.available(name)
    inputs = family.collate([family.sample()])

    class OneSample(Session):
        def encode(self, samples: Sequence[CalibrationSample]) -> Any:
            return dict(inputs)

    return OneSample(analyse(family.build().eval()), (), None, str, None, 1, 5), inputs


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "lfm2_vl", "llava_gemma2", "paligemma"])
@torch.no_grad()
def test_heads_are_ablated_in_every_kind_of_cache(name: str) -> None:
    """Against a caption read step by step with a hook of the test's own; and what generate says at each step."""
    session, inputs = family_session(name)
    model, token = session.model, 3
    log, streams = AttentionLog(), StreamLog(session.anatomy)
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    stock = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    with streams.watch(), vlmfix.patched(model, AttentionWatch(log.see)):
        assert torch.equal(model.generate(**inputs, **options), stock.sequences)
    ids = stock.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ((index, found),) = adhh._influences(session, None, ids, [token], 3)  # type: ignore[arg-type]
    assert index == token and found.shape == (len(session.layers()), session.anatomy.num_heads)

    def read(ablate: tuple[int, int] | None) -> torch.Tensor:
        cache = model(**inputs, use_cache=True).past_key_values

        def step(each: int) -> torch.Tensor:
            positions = {}
            if "cache_position" in inspect.signature(model.forward).parameters:  # generate of older versions tells it
                positions = {"cache_position": torch.tensor([cache.get_seq_length()])}
            logits: torch.Tensor = model(
                input_ids=torch.tensor([[each]]), past_key_values=cache, use_cache=True, **positions
            ).logits[0, -1]
            return logits

        for each in ids[: token - 1]:
            step(each)

        def zero(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            heads, size = args[0].clone(), args[0].shape[-1] // session.anatomy.num_heads
            assert ablate is not None
            heads[..., ablate[1] * size : (ablate[1] + 1) * size] = 0
            return (heads, *args[1:])

        sites = [site for site in session.anatomy.sites if ablate is not None and site.layer_idx == ablate[0]]
        handles = [site.output_projection.register_forward_pre_hook(zero) for site in sites]
        logits = step(ids[token - 1])
        for handle in handles:
            handle.remove()
        return logits

    whole = read(None)
    torch.testing.assert_close(whole, stock.logits[token][0], atol=1e-5, rtol=1e-5)
    for row, layer in enumerate(session.layers()):
        head = row % session.anatomy.num_heads
        fall = whole.softmax(-1)[ids[token]] - read((layer, head)).softmax(-1)[ids[token]]
        torch.testing.assert_close(found[row, head], fall, atol=1e-6, rtol=1e-4)
    assert found.abs().max() > 1e-5
    for use_norm in (False, True):
        gains = LogitLens(session.anatomy, use_norm=use_norm).gains(streams, token, 0, ([ids[token]],))[0]
        assert gains.shape == found.shape and bool(gains.isfinite().all())
    assert bool((log.on_generated(token, 0, "mean") <= 1 / token + 1e-6).all())


@pytest.mark.parametrize("name", ["blip2_opt", "mllama", "florence2"])
def test_models_without_image_tokens_in_their_prompt_are_refused(name: str) -> None:
    family = families.available(name)
    with pytest.raises(UnsupportedFeatureError, match="cannot be calibrated"):
        vlmfix.calibrate(family.build(), "vaf", asked(1))


# Refusals.


@pytest.mark.parametrize(
    ("name", "data", "options", "error", "says"),
    [
        ("pai", asked(1), {}, MethodError, "'pai' learns nothing from data"),
        ("act", [], {}, DataError, "data is empty"),
        ("act", [("image", "question")], {}, DataError, "CalibrationSample"),
        ("act", described(2), {}, DataError, "2 of 2 samples have no answer"),
        ("act", asked(1), {"heads": [(0, 1)]}, MethodError, "heads of act is what calibrate finds"),
        ("act", asked(1), {"alpha": 1}, MethodError, "act has no parameter 'alpha'"),
        ("act", asked(1), {"share": 0}, MethodError, "share must be above 0"),
        ("act", asked(1), {"batch_size": 0}, MethodError, "batch_size must be at least 1"),
        ("act", asked(1), {"prompt": lambda question: question}, DataError, "The processor rejects the prompt"),
        ("adhh", asked(2), {"mentions": mentions}, DataError, "do not say what is in the image"),
        ("adhh", described(1), {}, MethodError, "Pass mentions="),
        ("adhh", described(1), {"mentions": lambda text: []}, DataError, "No hallucinated object"),
        ("adhh", described(2, CATEGORIES), {"mentions": mentions}, DataError, "No hallucinated object"),
        ("adhh", described(2, ()), {"mentions": mentions}, DataError, "No real object"),
        ("adhh", described(1), {"mentions": mentions, "count": 0}, MethodError, "count must be at least 1"),
        ("adaiat", described(1), {"mentions": lambda text: []}, DataError, "No real object"),
        ("adaiat", described(1), {"mentions": mentions, "max_new_tokens": 4}, DataError, "allow longer captions"),
        ("allpath", asked(1), {"answers": "mcq"}, MethodError, "'yesno' and 'caption' only"),
        ("allpath", asked(1), {"answers": "yesno"}, DataError, "objects that are not"),
        ("allpath", asked(1), {"answers": "yesno", "xi": 13}, MethodError, "xi must be from 1 to 12"),
        ("allpath", described(1), {"mentions": lambda text: []}, DataError, "allpath needs records"),
        ("maskcd", asked(1), {"threshold": 1.0}, MethodError, "threshold must lie between 0 and 1"),
        ("maskcd", asked(1), {"threshold": 0.999}, DataError, "Choose a lower threshold"),
        ("var", asked(1), {"sink_share": 0}, MethodError, "sink_share must lie between 0 and 1"),
        ("iri", described(2), {}, DataError, "2 of 2 samples have no answer"),
        ("iri", asked()[1:3], {}, DataError, "none of 2 questions has that answer"),
        ("iri", asked(), {"ranking": "r.json"}, MethodError, "ranking of iri is what calibrate finds"),
        ("iri", asked(), {"rr_token": "first"}, MethodError, "groups must be"),
        ("iri", asked(), {"corruption": "mean", "floor": 0.99}, DataError, "none of 2 samples"),
        ("vaf", [CalibrationSample(Path("nowhere.png"), PROMPT)], {}, DataError, "Cannot read the image nowhere.png"),
    ],
)  # fmt: skip
def test_refusals(name: str, data: Any, options: Any, error: Any, says: str, model: Any, processor: Any) -> None:
    model(**encode(processor, described(1)[0]))  # transformers installs hooks of its own in the first forward
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(says)):
        vlmfix.calibrate(model, name, data, processor=processor, **{"max_new_tokens": 16, **options})
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["act", "allpath"])
def test_answers_of_several_tokens_are_refused(name: str, model: Any, processor: Any) -> None:
    from tokenizers import Tokenizer

    data = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    vocabulary["maybe"] = vocabulary.pop("yes")
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    options = {"answers": "yesno"} if name == "allpath" else {}
    with pytest.raises(UnsupportedFeatureError, match="several tokens"):
        vlmfix.calibrate(model, name, asked(), processor=processor, **options)


def test_without_a_processor(model: Any) -> None:
    model.config._name_or_path = "nowhere/to-be-found"
    with pytest.raises(vlmfix.VlmfixError, match="Pass processor="):
        vlmfix.calibrate(model, "vaf", asked(1))


def test_records_that_are_not_finite_are_dropped_and_counted() -> None:
    contrast = Contrast()
    contrast.add(torch.tensor([[1.0, 2.0]]), True)
    contrast.add(torch.tensor([[float("nan"), 2.0]]), True)
    contrast.add(torch.tensor([[float("inf"), 2.0]]), False)
    contrast.add(torch.tensor([[0.5, 4.0]]), False)
    assert contrast.dropped == 2 and contrast.counts == {True: 1, False: 1}
    assert contrast.difference().tolist() == [[0.5, -2.0]]
    assert ranked(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), [4, 6]) == [(4, 1), (6, 0), (6, 1), (4, 0)]
    assert [scaled_count(20, heads) for heads in (1024, 1600, 48, 4)] == [20, 31, 1, 1]


# Words.


@pytest.fixture(scope="module")
def pieces() -> Any:
    """A tokenizer with pieces of words, which joins words with spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "a", "cat", "##alog", "##s", "dog", "hot", "-", '"', "dining", "table", "##d", "yes", "No", "con"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("text", "found", "tokens"),
    [
        ("a cat", [("cat", "cat")], [1]),
        ("catalog cat", [("cat", "cat")], [2]),  # not the beginning of a longer word
        ("cats a cat", [("cats", "cat"), ("cat", "cat")], [0, 3]),
        ("dog cat dog", [("dog", "dog"), ("dog", "dog")], [0, 2]),
        ("dog", [("dog", "dog"), ("dog", "dog")], [0]),  # named once only
        ("a dining tables", [("dining tables", "dining table")], [1]),
        ("a dining table", [("table", "dining table")], [2]),
        ("a dog", [("cat", "cat")], []),
        ("A DOG", [("dog", "dog")], []),  # unknown to this vocabulary
    ],
)
def test_mentions_are_located_by_tokens(pieces: Any, text: str, found: Any, tokens: list[int]) -> None:
    ids = pieces(text, add_special_tokens=False)["input_ids"]
    mentions, missed = locate_mentions(pieces, ids, found)
    assert [mention.token for mention in mentions] == tokens and missed == len(found) - len(tokens)


def test_a_token_that_holds_more_than_the_word_is_no_mention() -> None:
    class Glued:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(['a "dog', " dog", "gy", " x-dog", " dog"][each] for each in ids)

    assert locate_mentions(Glued(), [0], [("dog", "dog")]) == ([], 1)
    assert [m.token for m in locate_mentions(Glued(), [1, 2, 3, 4], [("dog", "dog")])[0]] == [3]
    assert word_tokens(Glued(), [1, 2, 1], "doggy") == [0, 1] and word_tokens(Glued(), [1], "cat") == []


def test_words_stand_alone() -> None:
    assert find_word("The catalog: CAT.", "cat") == (13, 16)
    assert find_word("a hot-dog", "dog") is None and find_word("dog-like dogs", "dog") is None
    assert find_word("the dog's", "dog") == (4, 7) and find_word("a  dining\ntable", "dining table") == (3, 15)
    assert find_word("dog dog", "dog", 1) == (4, 7) and find_word("dog", " ") is None


def test_answer_tokens(pieces: Any) -> None:
    assert need_yes_no_tokens(pieces) == ((12,), (13,))


# The command.


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(build_tiny_llava(tmp_path / "m", layers=2, kv_heads=2))
    data = build_coco_folder(tmp_path / "c", num_images=5)
    words = ["--model", folder, "--data", str(data), "--batch-size", "4", "--max-new-tokens", "24"]
    for name, more in (
        ("vaf", []),
        ("act", ["--set", "share=1", "layers=0:"]),
        ("allpath", ["--set", "answers=yesno"]),
        ("iri", ["--set", "corruption=mean", "floor=0"]),
    ):
        out = tmp_path / f"{name}.json"
        assert main(["calibrate", name, *words, *more, "--limit", "4", "--out", str(out)]) == 0
        assert vlmfix.load_recipe(out)[0].name == name
        provenance = json.loads(out.read_text())["calibration"]
        assert provenance["data"] == str(data) and provenance["model"]["weights"].startswith("sha256 ")
        assert len(set(provenance["sample_ids"])) == 4
    assert "written: " in capsys.readouterr().out
    used = provenance["sample_ids"][0]
    for text in (f"{used}\n7", f"[{used}]", f"COCO_val2014_{used:012d}.jpg"):
        (tmp_path / "ids.txt").write_text(text)
        refused = [
            "calibrate",
            "vaf",
            *words,
            "--exclude",
            str(tmp_path / "ids.txt"),
            "--out",
            str(tmp_path / "x.json"),
        ]
        assert main(refused) == 2
        assert "would be evaluated on what they learned from" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "ids.txt").write_text("7")
    assert main(refused) == 0


def test_the_command_finds_words_where_chair_does() -> None:
    from vlmfix.evals.benchmarks.coco_objects import ChairMatcher

    found = ChairMatcher("original").as_written
    text = "Two dogs, a dining table and a man's hot dog."
    assert found(text) == [("dogs", "dog"), ("table", "dining table"), ("man", "person"), ("hot", "hot dog")]
    assert found("The seat of the toilet and a dog.") == []
    assert found("A toilet seat and a dog.") == [("toilet", "toilet"), ("dog", "dog")]


@pytest.mark.parametrize("words", [["pai"], ["act", "--set", "share"], ["adhh", "--set", "beta=1"]])
def test_the_command_refuses_before_it_loads(words: list[str], refused: Any) -> None:
    assert "/nowhere" not in refused(["calibrate", *words, "--model", "/nowhere", "--data", "/nowhere"])


def test_the_testbed_is_calibrated_on_its_own_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmfix.evals.testbed.scenes import image_id

    monkeypatch.setenv("VLMFIX_CACHE", str(tmp_path))
    assert main(["calibrate", "adaiat", "--limit", "6", "--out", str(tmp_path / "r.json")]) == 0
    provenance = json.loads((tmp_path / "r.json").read_text())["calibration"]
    assert provenance["sample_ids"] == [image_id("calibration", index) for index in range(6)]
