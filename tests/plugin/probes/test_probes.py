"""Probes against closed forms and spelt-out references; batches against singles; nothing left behind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import available, by_name
from families.tiny_llava import BOS, IMAGE, IMAGE_TOKENS, RAGGED, collate, forward, generate, sample, snapshot
from method_parameters import IN_FORWARDS, parameters_of

import vlmfix
from vlmfix.errors import MethodError, UnsupportedFeatureError, VlmfixError
from vlmfix.probes import ImageAttention, Sinks, attention_to_image, head_divergence, knockout, sinks

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "internvl", "gemma3", "idefics3")
PROBES: dict[str, Callable[..., Any]] = {
    "head_divergence": lambda model, inputs: head_divergence(model, inputs, max_new_tokens=3),
    "attention_to_image": lambda model, inputs: attention_to_image(
        model, inputs, max_new_tokens=3, maps=True, prompt=True
    ),
    "sinks": lambda model, inputs: sinks(model, inputs, sink_dims=(3, 7), hidden_threshold=2.0),
    "knockout": lambda model, inputs: knockout(model, inputs, ["image->question", "last->last"], window=2),
}


def flat(model: Any) -> Any:
    """Make every row look evenly at all it sees."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and "q_proj" in name:
                parameter.zero_()
    return model


@contextmanager
def watched_heads(model: Any) -> Iterator[list[torch.Tensor]]:
    """What enters every output projection of the language model in the last row, ``[batch, hidden]``."""
    seen: list[torch.Tensor] = []
    modules = [m for n, m in model.named_modules() if n.endswith("self_attn.o_proj") and "vision" not in n]
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1])) for m in modules]
    yield seen
    for hook in hooks:
        hook.remove()


# Attention to the image.


def test_even_attention_has_the_mass_of_its_tokens(tiny: Any) -> None:
    """Closed form: row t sees t + 1 tokens, 9 of them the image's."""
    inputs = collate([sample(3, 1, 6)])
    length = inputs["input_ids"].shape[1]
    found = attention_to_image(flat(tiny), inputs, max_new_tokens=3, maps=True, prompt=True)
    steps = torch.tensor([IMAGE_TOKENS / (length + t) for t in range(3)])
    assert torch.allclose(found.mass[0], steps[:, None, None].expand(3, 4, 4))
    assert found.maps is not None and found.prompt is not None
    assert torch.allclose(found.maps[0], (steps / IMAGE_TOKENS)[:, None, None].expand(3, 4, IMAGE_TOKENS))
    rows = torch.tensor([IMAGE_TOKENS / (row + 1) for row in found.prompt_rows])
    assert found.prompt_rows == tuple(range(4 + IMAGE_TOKENS, length))
    assert torch.allclose(found.prompt[0], rows[:, None, None].expand(-1, 4, 4))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_attention_is_that_of_eager_maps(build: Any, kind: str) -> None:
    model, inputs = build(kind, attn="eager"), collate(RAGGED)
    found = attention_to_image(model, inputs, max_new_tokens=4, maps=True, prompt=True)
    out = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    prompt_length = inputs["input_ids"].shape[1]
    assert found.tokens == tuple(map(tuple, out.sequences[:, prompt_length:].tolist()))
    image = inputs["input_ids"] == IMAGE
    assert found.num_image_tokens == tuple(image.sum(1).tolist()) == (9, 18, 0, 9)
    assert found.maps is not None and found.prompt is not None
    for step, layers in enumerate(out.attentions):
        for layer, weights in enumerate(layers):
            offset = prompt_length + step - weights.shape[-1]  # a sliding cache has dropped early keys
            for row in range(4):
                columns = [c - offset for c in image[row].nonzero()[:, 0].tolist()]
                weight = torch.zeros(len(columns), 4)
                for place, column in enumerate(columns):
                    weight[place] = weights[row, :, -1, column] if column >= 0 else 0.0
                assert torch.allclose(found.mass[row, step, layer], weight.sum(0), atol=1e-5)
                known = found.maps[row, step, layer]
                assert torch.allclose(known[: len(columns)], weight.mean(1), atol=1e-5)
                assert not known[len(columns) :].any()
    stock = torch.stack([(w * image[:, None, None]).sum(-1) for w in out.attentions[0]], dim=1)
    for row in range(4):
        behind = [c for c in range(prompt_length) if image[row].any() and not image[row, c:].any()]
        for number, column in enumerate(found.prompt_rows):
            known = found.prompt[row, number]
            if column in behind:
                assert torch.allclose(known, stock[row, :, :, column], atol=1e-5)
            else:
                assert known.isnan().all()


def test_long_prompts_in_pieces_give_the_same(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = collate(RAGGED)
    before = [probe(tiny, inputs).to_dict() for probe in PROBES.values()]
    monkeypatch.setattr("vlmfix.model.attention.CHUNK_ELEMENTS", 4 * 4 * 33 * 2)
    for whole, probe in zip(before, PROBES.values(), strict=True):
        assert close(whole, probe(tiny, inputs).to_dict(), 5e-4)


def test_answers_are_given_and_end_where_they_end(tiny: Any) -> None:
    inputs = collate(RAGGED[:2])
    found = attention_to_image(tiny, inputs, answers=[[9, 8, 7], [5]], maps=True)
    assert found.tokens == ((9, 8, 7), (5,))
    assert found.mass.shape[:2] == (2, 3)
    assert found.mass[1, 1:].isnan().all() and not found.mass[0].isnan().any()
    alone = attention_to_image(tiny, collate(RAGGED[1:2]), answers=[[5]])
    assert torch.allclose(alone.mass[0, 0], found.mass[1, 0], atol=1e-5)
    assert not torch.allclose(
        found.mass[0, 1], attention_to_image(tiny, inputs, answers=[[6, 8], [5]]).mass[0, 1], atol=1e-4
    )


# Head divergence.


def naive_divergence(model: Any, ids: list[int], inputs: dict[str, Any], answer: tuple[int, ...]) -> torch.Tensor:
    """Two plain forwards per token: with the image, and over the ids without image placeholders."""
    steps = []
    for step in range(len(answer)):
        whole = torch.tensor([[*ids, *answer[:step]]])
        text = torch.tensor([[i for i in whole[0].tolist() if i not in model_image_ids(model)]])
        with torch.no_grad(), watched_heads(model) as seen:
            extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
            if "token_type_ids" in extra:
                extra["token_type_ids"] = torch.nn.functional.pad(extra["token_type_ids"], (0, step))
            if "mm_token_type_ids" in extra:
                extra["mm_token_type_ids"] = torch.nn.functional.pad(extra["mm_token_type_ids"], (0, step))
            model(input_ids=whole, use_cache=False, **extra)
            model(
                input_ids=text, use_cache=False, **({"token_type_ids": 0 * text} if "token_type_ids" in extra else {})
            )
        half = len(seen) // 2
        heads = model.config.get_text_config().num_attention_heads
        apart = [(a - b).reshape(heads, -1).norm(dim=-1) for a, b in zip(seen[:half], seen[half:], strict=True)]
        steps.append(torch.stack(apart))
    return torch.stack(steps)


def model_image_ids(model: Any) -> tuple[int, ...]:
    from vlmfix.model.anatomy import analyse

    return analyse(model).image_token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_divergence_is_that_of_two_plain_forwards(name: str) -> None:
    family = by_name(name)
    model, single = family.build(), family.single()
    inputs = family.collate([single])
    found = head_divergence(model, inputs, max_new_tokens=3, top_k=2)
    expected = naive_divergence(model, list(single.ids), inputs, found.tokens[0])
    assert torch.allclose(found.divergence[0], expected, atol=2e-5)
    assert float(expected.min()) > 1e-3
    assert torch.allclose(found.token_divergence[0], expected.topk(2).values.sum((1, 2)), atol=1e-4)


def test_the_selected_heads_are_those_vhr_chooses(tiny: Any) -> None:
    inputs = collate(RAGGED)
    found = head_divergence(tiny, inputs)
    vlmfix.patch(tiny, "vhr", alpha=1.0001, layers=":")  # chooses, and changes next to nothing in the layers above
    learned = forward(tiny, inputs, use_cache=True).past_key_values._vlmfix.learned
    for number, layer in enumerate(found.layers):
        assert torch.equal(learned[0, layer][0][:, 0, :, 0] != 1, found.selected[:, number])
    assert found.selected.any()


@pytest.mark.parametrize("method", ["vhr", "spin"])
def test_a_patch_shows_from_the_layer_behind_its_own(tiny: Any, method: str) -> None:
    """Heads are looked at before a method scales them; what lower layers do to them is part of the patched model."""
    inputs, answers = collate(RAGGED), [[20, 21, 22]] * 4
    stock = head_divergence(tiny, inputs, answers=answers).divergence
    for layer in (3, 1):
        with vlmfix.patched(tiny, method, layers=[layer]):
            found = head_divergence(tiny, inputs, layers=":", answers=answers).divergence
        assert torch.equal(found[:, :, : layer + 1], stock[:, :, : layer + 1])
        assert layer == 3 or not torch.allclose(found[:2, :, layer + 1 :], stock[:2, :, layer + 1 :], atol=1e-3)


def test_even_attention_diverges_by_the_difference_of_two_means(build: Any) -> None:
    """Closed form for one layer: a head is the mean of what it sees."""
    model = flat(build(layers=1))
    inputs = collate([sample(3, 1, 6)])
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        hook = layer.self_attn.v_proj.register_forward_hook(lambda *args: seen.append(args[2]))
        model(**inputs)
        hook.remove()
    values = seen[0][0].view(-1, 2, 8)  # two key heads of 8
    text = inputs["input_ids"][0] != IMAGE
    apart = (values.mean(0) - values[text].mean(0)).norm(dim=-1)
    found = head_divergence(model, inputs)
    assert torch.allclose(found.divergence[0, 0, 0], apart.repeat_interleave(2), atol=1e-5)


# Sinks.


def test_even_attention_is_received_in_harmonic_shares(tiny: Any) -> None:
    """Closed form: token j gets the mean of 1 / (i + 1) over the rows i >= j."""
    inputs = collate([sample(3, 1, 6)])
    length = inputs["input_ids"].shape[1]
    found = sinks(flat(tiny), inputs, min_rows=1, attention_threshold=4.0)
    expected = torch.tensor([sum(1 / (i + 1) for i in range(j, length)) / (length - j) for j in range(length)])
    assert torch.allclose(found.received[0], expected.expand(4, 4, -1), atol=1e-6)
    assert torch.equal(found.attention_sinks[0, 0, 0], expected > 4 / length)
    assert torch.equal(found.is_image, inputs["input_ids"] == IMAGE)
    few = sinks(tiny, inputs, min_rows=length, attention_threshold=0.1)
    assert few.attention_sinks[0, 0, 0].nonzero().tolist() == [[0]]


def test_injected_sinks_are_found(sinky: Any) -> None:
    inputs = collate(RAGGED)
    found = sinks(sinky, inputs, sink_dims=(5, 11), hidden_threshold=5.0)
    is_bos = inputs["input_ids"] == BOS
    with_image = (inputs["input_ids"] == IMAGE).any(1)
    assert found.hidden_sinks[:, 0][is_bos & with_image[:, None]].all()
    assert not found.hidden_sinks[~with_image].any() and not found.received[~with_image].any()
    assert found.counts()["hidden, text"][with_image].min() >= 2
    hidden = sinky(**collate(RAGGED[:1]), output_hidden_states=True).hidden_states
    alone = sinks(sinky, collate(RAGGED[:1]), sink_dims=(5, 11))
    for layer in range(4):
        state = hidden[layer][0].float()
        phi = state[:, [5, 11]].abs().amax(1) / (state.square().mean(1) + 1e-6).sqrt()
        assert torch.allclose(alone.values[0, layer], phi, atol=1e-4)


@torch.no_grad()
def test_drains_peaks_and_the_sink_rate_are_those_spelt_out(sinky: Any) -> None:
    """Lengths of what the value projections give and of what enters the layers; sinks counted head by head."""
    inputs, values = collate(RAGGED[:1]), []
    modules = [m for n, m in sinky.named_modules() if n.endswith("self_attn.v_proj") and "vision" not in n]
    hooks = [m.register_forward_hook(lambda _, args, out: values.append(out[0])) for m in modules]
    hidden = sinky(**inputs, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    found = sinks(sinky, inputs, sink_dims=(5, 11))
    drains, peaks, rate = found.value_drains()[0], found.residual_peaks()[0], found.sink_rate(0.1)[0]
    tokens, heads = drains.shape[-1], drains.shape[1]
    config = sinky.config.text_config
    group, size = heads // config.num_key_value_heads, values[0].shape[-1] // config.num_key_value_heads
    for layer, (value, state) in enumerate(zip(values, hidden, strict=False)):
        length = [sum(float(x) ** 2 for x in state[0, token]) ** 0.5 for token in range(tokens)]
        middle = sorted(length)[(tokens - 1) // 2]
        assert peaks[layer].tolist() == pytest.approx([each / middle for each in length], rel=1e-4)
        for head in range(heads):
            part = value[:, head // group * size : (head // group + 1) * size]
            read = [sum(float(x) ** 2 for x in row) ** 0.5 for row in part]
            middle = sorted(read)[(tokens - 1) // 2]
            assert drains[layer, head].tolist() == pytest.approx([each / middle for each in read], rel=1e-4)
    for token in range(tokens):
        above = [float(found.received[0, layer, head, token]) > 0.1 for layer in range(4) for head in range(heads)]
        assert float(rate[token]) == pytest.approx(sum(above) / len(above))
    assert peaks[0, 0] > 2, "the injected sinks are long"


def test_received_attention_is_that_of_eager_maps(build: Any) -> None:
    model, inputs = build(attn="eager"), collate([RAGGED[0]])
    weights = torch.stack(model(**inputs, output_attentions=True).attentions, dim=1)
    rows = torch.arange(weights.shape[-1], 0, -1)
    assert torch.allclose(sinks(model, inputs).received, weights.sum(3) / rows, atol=1e-6)


# All probes.


def close(a: Any, b: Any, atol: float = 2e-5) -> bool:
    """Whether two JSON-ready results are alike."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], atol) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= atol * max(1.0, abs(a))
    return bool(a == b)


def of_sample(found: Any, row: int, length: int) -> dict[str, Any]:
    """One sample's part of a batch's result, as its single run has it."""
    result = found.to_dict()
    for name, value in result.items():
        if name in ("change",):
            result[name] = [[[windows[row]] for windows in pair] for pair in value]
        elif isinstance(value, list) and name not in ("layers", "pairs", "windows", "sink_dims", "prompt_rows"):
            result[name] = [value[row]]
    return result


@pytest.mark.parametrize("probe", list(PROBES))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_left_padded_batch_gives_what_its_prompts_give(name: str, probe: str) -> None:
    family = by_name(name)
    model = family.build()
    samples = family.even()
    inputs = family.collate(samples)
    whole = PROBES[probe](model, inputs)
    for row, each in enumerate(samples):
        alone = PROBES[probe](model, family.collate([each]))
        part, padding = of_sample(whole, row, len(each.ids)), inputs["input_ids"].shape[1] - len(each.ids)
        single = alone.to_dict()
        if isinstance(whole, Sinks):
            for key in (
                "received",
                "attention_sinks",
                "values",
                "hidden_sinks",
                "value_norms",
                "residual_norms",
                "is_image",
                "is_token",
            ):
                tensor = getattr(whole, key)[row : row + 1, ..., padding:]
                assert torch.allclose(tensor.float(), getattr(alone, key).float(), atol=2e-5), key
                assert not getattr(whole, key)[row, ..., :padding].any()
            continue
        if isinstance(whole, ImageAttention):
            assert whole.prompt is not None and alone.prompt is not None
            rows = [whole.prompt_rows.index(column + padding) for column in alone.prompt_rows]
            assert torch.allclose(whole.prompt[row, rows], alone.prompt[0], atol=2e-5)
            for result in (part, single):
                del result["prompt"], result["prompt_rows"]
        assert close(part, single, 5e-4 if probe == "knockout" else 2e-5)


@pytest.mark.parametrize("probe", list(PROBES))
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_nothing_is_left_behind(name: str, probe: str) -> None:
    family = by_name(name)
    model, inputs = family.build(), family.collate(family.even())
    before_ids, before = generate(model, inputs)
    seen, states = snapshot(model), (torch.get_rng_state(), random.getstate())
    first = PROBES[probe](model, inputs).to_dict()
    assert PROBES[probe](model, inputs).to_dict() == first  # deterministic
    assert snapshot(model) == seen
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    ids, after = generate(model, inputs)
    assert torch.equal(ids, before_ids) and torch.equal(after, before)


@pytest.mark.parametrize("probe", list(PROBES))
def test_nothing_is_left_behind_after_an_error(tiny: Any, probe: str) -> None:
    inputs = collate(RAGGED)
    broken = tiny.model.language_model.layers[2].mlp.down_proj

    def fail(*args: Any) -> None:
        raise RuntimeError("half way")

    for patch in ("none", "pai"):
        if patch == "pai":
            vlmfix.patch(tiny, patch)
        before, seen = generate(tiny, inputs)[1], snapshot(tiny)
        broken.forward = fail
        with pytest.raises(RuntimeError, match="half way"):
            PROBES[probe](tiny, inputs)
        del broken.forward
        assert torch.equal(generate(tiny, inputs)[1], before)
        assert (vlmfix.status(tiny) is None) == (patch == "none")
        if patch == "none":
            assert snapshot(tiny) == seen


@pytest.mark.parametrize("probe", list(PROBES))
def test_a_patched_model_stays_patched_and_the_result_says_so(tiny: Any, probe: str) -> None:
    inputs = collate(RAGGED)
    stock = PROBES[probe](tiny, inputs)
    assert stock.patch is None
    vlmfix.patch(tiny, ["vhr", vlmfix.PAI(alpha=1.5)])
    before = generate(tiny, inputs)[1]
    counted = vlmfix.status(tiny)
    found = PROBES[probe](tiny, inputs)
    assert vlmfix.status(tiny) == counted, "a probe is not counted"
    assert "VHR(" in found.patch and "PAI(" in found.patch
    assert not close(stock.to_dict() | {"patch": ""}, found.to_dict() | {"patch": ""})
    assert torch.equal(generate(tiny, inputs)[1], before)
    same = PROBES[probe](vlmfix.patch(tiny, "none"), inputs)
    assert close(stock.to_dict() | {"patch": ""}, same.to_dict() | {"patch": ""})


@pytest.mark.parametrize("method", IN_FORWARDS)
def test_the_weights_shown_are_those_behind_the_patch(build: Any, method: str) -> None:
    """Against the weights an eager model returns, the edited ones among them; every probe runs on every method."""
    model, inputs = build(attn="eager", sinks=True), collate([RAGGED[0]])
    vlmfix.patch(model, method, **parameters_of(method, model))
    if vlmfix.list_methods()[method].replaces_logits:
        for probe in PROBES.values():
            with pytest.raises(UnsupportedFeatureError, match=f"{method} decodes from two"):
                probe(model, inputs)
        return
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    found = attention_to_image(model, inputs, max_new_tokens=3, prompt=True)
    assert found.tokens[0] == tuple(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
    image = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    for step, layers in enumerate(out.attentions):
        mass = torch.stack([weights[0, :, -1][:, image].sum(-1) for weights in layers])
        assert torch.allclose(found.mass[0, step], mass, atol=1e-5)
    prompt = torch.stack([weights[0][..., image].sum(-1) for weights in out.attentions[0]])
    assert found.prompt is not None and found.prompt_rows == tuple(range(int(image[-1]) + 1, prompt.shape[-1]))
    assert torch.allclose(found.prompt[0], prompt[:, :, list(found.prompt_rows)].permute(2, 0, 1), atol=1e-5)
    for name, probe in PROBES.items():
        assert probe(model, inputs).patch is not None, name


@pytest.mark.parametrize("attn", ["sdpa"])
@pytest.mark.parametrize("probe", list(PROBES))
def test_kernels_agree(build: Any, probe: str, attn: str) -> None:
    inputs = collate(RAGGED[:2])
    expected = PROBES[probe](build(attn="eager"), inputs).to_dict()
    assert close(expected, PROBES[probe](build(attn=attn), inputs).to_dict(), 5e-4)


@pytest.mark.parametrize("probe", list(PROBES))
def test_a_text_only_batch_has_nothing_to_show(tiny: Any, probe: str) -> None:
    found = PROBES[probe](tiny, collate([RAGGED[2], RAGGED[2]]))
    for name in ("divergence", "mass", "received", "hidden_sinks", "change"):
        assert not getattr(found, name, torch.zeros(1)).any()


@pytest.mark.parametrize("name", ["mllama", "idefics", "florence2", "blip2_opt"])
@pytest.mark.parametrize("probe", list(PROBES))
def test_refused_with_a_reason(name: str, probe: str) -> None:
    family = available(name)
    with pytest.raises(UnsupportedFeatureError, match=f"{probe} looks at self-attention.*(keys|encoder|merged)"):
        PROBES[probe](family.build(), family.collate([family.single()]))


def test_right_padding_and_missing_ids_are_refused(tiny: Any) -> None:
    with pytest.raises(UnsupportedFeatureError, match="Pad on the left"):
        attention_to_image(tiny, collate(RAGGED, side="right"))
    with pytest.raises(UnsupportedFeatureError, match="input_ids"):
        sinks(tiny, {"inputs_embeds": torch.zeros(1, 2, 32)})


def test_wrong_parameters_are_refused(tiny: Any) -> None:
    inputs = collate(RAGGED)
    with pytest.raises(MethodError, match="top_k"):
        head_divergence(tiny, inputs, top_k=0)
    with pytest.raises(MethodError, match="layer 9"):
        attention_to_image(tiny, inputs, layers=[9])
    with pytest.raises(MethodError, match="answers"):
        attention_to_image(tiny, inputs, answers=[[1]])
    with pytest.raises(MethodError, match="vocabulary"):
        attention_to_image(tiny, inputs, answers=[[999]] * 4)
    with pytest.raises(MethodError, match="max_new_tokens"):
        attention_to_image(tiny, inputs, max_new_tokens=0)
    with pytest.raises(MethodError, match="Thresholds"):
        sinks(tiny, inputs, hidden_threshold=0)
    with pytest.raises(MethodError, match="hidden size"):
        sinks(tiny, inputs, sink_dims=(32,))


@pytest.mark.parametrize("probe", list(PROBES))
def test_results_write_and_draw_themselves(tiny: Any, probe: str, tmp_path: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = PROBES[probe](tiny, collate(RAGGED))
    data = json.loads(found.to_json(tmp_path / "probe.json"))
    assert data == json.loads((tmp_path / "probe.json").read_text())
    assert data["probe"] == type(found).__name__ and data["layers"] == [0, 1, 2, 3]
    axis = found.plot()
    assert "stock model" in axis.get_title()
    _, given = plt.subplots()
    assert found.plot(given) is given
    plt.close("all")
    with pytest.raises(AttributeError):
        found.patch = "other"


def test_without_matplotlib_plot_says_what_to_install(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = attention_to_image(tiny, collate(RAGGED))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(VlmfixError, match="pip install"):
        found.plot()


def test_layers_can_be_chosen(tiny: Any) -> None:
    inputs = collate(RAGGED)
    whole, part = attention_to_image(tiny, inputs), attention_to_image(tiny, inputs, layers="1,-1")
    assert part.layers == (1, 3)
    assert torch.allclose(part.mass, whole.mass[:, :, [1, 3]])


def test_a_model_in_training_mode_is_probed_without_dropout_and_stays_there(tiny: Any) -> None:
    inputs = collate(RAGGED)
    expected = head_divergence(tiny, inputs).to_dict()
    tiny.train()
    tiny.model.vision_tower.eval()
    for layer in tiny.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert head_divergence(tiny, inputs).to_dict() == expected
    assert tiny.training and not tiny.model.vision_tower.training
