"""Causal tracing: hand-computable cases, and the invariants of its definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import available
from families.tiny_llava import IMAGE_TOKENS, RAGGED, collate, forward, sample, snapshot

import vlmfix
from vlmfix import probes
from vlmfix.model.anatomy import analyse
from vlmfix.probes.causal_trace import GROUPS, ObjectPlace, recovery_rates, token_groups
from vlmfix.probes.component_runs import COMPONENTS, Tracer, repeated
from vlmfix.probes.corruption import choose_sigma

PICTURED = (RAGGED[0], RAGGED[1], RAGGED[3])
ONE = collate([RAGGED[1]])
MEAN = probes.Corruption("mean")
SEVEN = GROUPS[:-1]


def answer_of(model: Any, inputs: Any, corruption: Any = MEAN) -> list[int]:
    """The token whose probability the corruption lowers most, in the mean over the batch."""
    clean, broken = (forward(model, each).logits[:, -1].softmax(-1) for each in (inputs, corruption(inputs)))
    return [int((clean - broken).mean(0).argmax())]


def trace(model: Any, inputs: Any, answer: list[int] | None = None, **options: Any) -> Any:
    options = {"corruption": MEAN, "floor": 1e-4, **options}
    return probes.causal_trace(model, inputs, answer or answer_of(model, ONE), **options)


# By hand.


def test_patching_everything_recovers_all_and_patching_a_corrupted_value_nothing(tiny: Any) -> None:
    found = trace(tiny, ONE, components=["hidden"], groups=["all"])
    torch.testing.assert_close(found.of("hidden", "all"), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)
    tracer = Tracer(analyse(tiny), tuple(found.answer), COMPONENTS, (0, 1, 2, 3))
    groups = token_groups(analyse(tiny), ONE)
    broken = MEAN(ONE)
    with torch.no_grad():
        corrupted, own = tracer.record(broken)
        targets = [(component, layer, "all") for component in COMPONENTS for layer in range(4)]
        patched = tracer.patched(broken, own, groups, targets, 5)
    torch.testing.assert_close(patched, corrupted.expand(12, 1), atol=1e-6, rtol=0)
    assert found.p_clean[0] - corrupted[0] > 1e-3


def test_behind_the_last_layer_only_the_last_token_counts(tiny: Any) -> None:
    places = [ObjectPlace(cells=[3, 4], word=[len(RAGGED[1].ids) - 3])]
    found = trace(tiny, ONE, components=["hidden"], groups=SEVEN, places=places)
    for group in SEVEN:
        expected = float(group == "last")
        assert found.of("hidden", group)[-1] == pytest.approx(expected, abs=1e-5)
    assert (found.recovery[0, 0, :3].abs() > 1e-3).any()  # in the first layer the image's tokens carry it


def test_text_before_the_image_carries_nothing(tiny: Any) -> None:
    each = sample(5, 1, 6, seed=3)
    found = trace(tiny, collate([each]), components=COMPONENTS, groups=["text_before", "text_object"],
                  places=[ObjectPlace(word=[2, 3, 4])])  # fmt: skip
    assert found.recovery.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("component", ["attention", "mlp"])
def test_a_rate_equals_hooks_by_hand(build: Any, kind: str, component: str) -> None:
    model = build(kind)
    layer = model.model.language_model.layers[1]
    behind = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[component]
    plain = {"attention": "self_attn", "mlp": "mlp"}[component]
    module = getattr(layer, behind if kind == "gemma2" else plain)
    answer = answer_of(model, ONE)

    def probability(inputs: Any, hook: Any) -> float:
        handle = module.register_forward_hook(hook)
        found = forward(model, inputs).logits[0, -1].double().softmax(-1)[answer].sum()
        handle.remove()
        return float(found)

    seen: list[torch.Tensor] = []
    clean = probability(ONE, lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[:, -1].clone()))

    def put(module: Any, args: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[:, -1] = seen[0]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    corrupted = probability(MEAN(ONE), lambda *args: None)
    patched = probability(MEAN(ONE), put)
    found = trace(model, ONE, answer)
    assert found.of(component)[1] == pytest.approx((patched - corrupted) / (clean - corrupted), abs=1e-4)
    assert abs(found.of(component)[1]) > 1e-3
    assert found.p_clean[0] == pytest.approx(clean, abs=1e-6)
    assert found.p_corrupted[0] == pytest.approx(corrupted, abs=1e-6)


def test_averages_by_hand_and_samples_that_lose_nothing() -> None:
    clean, corrupted = torch.tensor([0.9, 0.6, 0.5, 0.2]), torch.tensor([0.1, 0.5, 0.5, 0.4])
    patched = torch.tensor([[0.5, 0.1], [0.7, 0.5], [0.0, 0.0], [1.0, 1.0]])
    mean, ratio, kept = recovery_rates(clean, corrupted, patched, 0.05)
    assert kept.tolist() == [True, True, False, False]
    torch.testing.assert_close(mean, torch.tensor([(0.4 / 0.8 + 0.2 / 0.1) / 2, 0.0]))
    torch.testing.assert_close(ratio, torch.tensor([(0.4 + 0.2) / 0.9, 0.0]))
    assert recovery_rates(clean, clean, patched, 0.0)[2].sum() == 0  # never divided by 0


# Groups and images.


def test_the_seven_groups_are_disjoint_and_cover_all_but_padding(tiny: Any) -> None:
    inputs = collate(RAGGED)
    places = [
        ObjectPlace([2, 3, 6], [15, 16]),
        ObjectPlace([0, 17], [3]),
        ObjectPlace(None, [4]),
        ObjectPlace([8], [1]),
    ]
    groups = token_groups(analyse(tiny), inputs, places)
    counts = torch.stack([groups[name] for name in SEVEN]).sum(0)
    assert torch.equal(counts, inputs["attention_mask"])
    assert torch.equal(groups["all"], inputs["attention_mask"].bool())
    by_name = {name: groups[name][0].sum().item() for name in SEVEN}
    assert by_name == {
        "image_before": 2, "image_object": 3, "image_after": IMAGE_TOKENS - 5,
        "text_before": 6, "text_object": 2, "text_after": 1, "last": 1,
    }  # fmt: skip
    assert groups["last"][:, -1].all()


@pytest.mark.parametrize(
    "place", [ObjectPlace([9]), ObjectPlace(None, [40]), ObjectPlace(None, [6]), ObjectPlace([-1])], ids=str
)
def test_places_outside_the_prompt_are_named(tiny: Any, place: ObjectPlace) -> None:
    with pytest.raises(vlmfix.MethodError, match=r"sample 0|image token"):
        token_groups(analyse(tiny), collate([RAGGED[0]]), [place])
    with pytest.raises(vlmfix.MethodError, match="one for each"):
        token_groups(analyse(tiny), collate(RAGGED), [ObjectPlace()])


def test_noise_belongs_to_an_image_and_a_seed() -> None:
    inputs = collate(PICTURED)
    together = probes.Corruption("noise", 2.0, seed=5)(inputs)["pixel_values"]
    state = torch.get_rng_state()
    apart = [probes.Corruption("noise", 2.0, seed=5)(collate([each]))["pixel_values"] for each in PICTURED]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together, torch.cat(apart))
    other = probes.Corruption("noise", 2.0, seed=6)(inputs)["pixel_values"]
    assert not torch.equal(together, other)
    noise = together - inputs["pixel_values"]
    assert noise.std() == pytest.approx(2.0, rel=0.05)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(probes.Corruption(sigma=0.0)(inputs)["pixel_values"], inputs["pixel_values"])


def test_a_mean_colour_is_flat_and_each_image_has_its_own() -> None:
    images = MEAN(collate(PICTURED))["pixel_values"]
    expected = collate(PICTURED)["pixel_values"].mean((-1, -2), keepdim=True).expand_as(images)
    torch.testing.assert_close(images, expected)
    patches = torch.randn(10, 6)
    found = MEAN({"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 3]])})["pixel_values"]
    torch.testing.assert_close(found[:4], patches[:4].mean(0).expand(4, 6))
    torch.testing.assert_close(found[4:], patches[4:].mean(0).expand(6, 6))


# The machine.


def test_a_padded_batch_equals_its_prompts(tiny: Any) -> None:
    noise = probes.Corruption(sigma=3.0)
    options = {"corruption": noise, "floor": 1e-3, "components": COMPONENTS, "groups": SEVEN}
    inputs = collate(PICTURED)
    answer = answer_of(tiny, inputs, noise)
    places = [ObjectPlace([1, 2], [len(each.ids) - 2]) for each in PICTURED]
    batch = trace(tiny, inputs, answer, places=places, **options)
    several = trace(tiny, (collate([each]) for each in PICTURED), answer, places=places, **options)
    for name in ("p_clean", "p_corrupted", "p_patched"):
        torch.testing.assert_close(getattr(several, name), getattr(batch, name), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(several.recovery, batch.recovery, atol=1e-4, rtol=1e-4)
    assert (batch.p_patched - batch.p_corrupted[:, None, None, None]).abs().amax((1, 2, 3)).min() > 1e-4


def test_rows_of_a_forward_do_not_matter(tiny: Any) -> None:
    found = [trace(tiny, ONE, rows=rows, components=COMPONENTS, groups=("last", "all")).recovery for rows in (1, 5, 64)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-5)


def test_looking_changes_no_bit(tiny: Any) -> None:
    tracer = Tracer(analyse(tiny), (5,), COMPONENTS, (0, 1, 2, 3))
    with torch.no_grad():
        seen, states = tracer.record(ONE)
        assert torch.equal(seen, tracer.probability(ONE))
    assert len(states) == 12


@pytest.mark.parametrize("patched", [False, True])
def test_the_stock_model_is_traced_and_left_as_found(tiny: Any, patched: bool) -> None:
    expected = trace(tiny, ONE)
    answer = list(expected.answer)
    if patched:
        vlmfix.patch(tiny, [vlmfix.VISTA(lam=1.0), vlmfix.PAI(alpha=2.0, layers=":")])
    tiny.train()
    before = snapshot(tiny)
    found = trace(tiny, ONE, answer)
    assert snapshot(tiny) == before
    assert tiny.training
    torch.testing.assert_close(found.recovery, expected.recovery, atol=1e-6, rtol=1e-6)
    assert found.patch is None
    with pytest.raises(RuntimeError, match="stop"):
        trace(tiny, ONE, answer, corruption=stop)
    assert snapshot(tiny) == before


def stop(inputs: Any) -> Any:
    raise RuntimeError("stop")


def test_same_seed_same_table_and_what_it_records(tiny: Any, tmp_path: Path) -> None:
    noise = probes.Corruption(sigma=3.0, seed=4)
    answer = answer_of(tiny, collate(PICTURED), noise)
    inputs = collate(PICTURED)
    options = {"corruption": noise, "ids": ["a", 7, "c"], "floor": 0.001}
    first, again = (trace(tiny, inputs, answer, **options) for _ in range(2))
    assert torch.equal(first.recovery, again.recovery)
    other = trace(tiny, inputs, answer, **{**options, "corruption": probes.Corruption(sigma=3.0, seed=5)})
    assert not torch.equal(first.recovery, other.recovery)
    text = first.to_json(tmp_path / "trace.json")
    data = json.loads((tmp_path / "trace.json").read_text())
    assert data == json.loads(text)
    assert data["probe"] == "CausalTrace"
    assert data["corruption"] == {"kind": "noise", "sigma": 3.0, "seed": 4}
    assert (data["num_layers"], data["ids"], data["answer"]) == (4, ["a", 7, "c"], answer)
    assert data["num_skipped"] == 3 - sum(data["is_kept"])
    assert len(data["recovery"]) == 2 and len(data["recovery"][0]) == 4
    assert all(0 <= p <= 1 for p in data["p_clean"] + data["p_corrupted"])


def test_the_least_noise_that_halves_the_answer(tiny: Any) -> None:
    inputs = collate(PICTURED)
    strong = probes.Corruption(sigma=8.0)
    clean, broken = (forward(tiny, each).logits[:, -1].softmax(-1).mean(0) for each in (inputs, strong(inputs)))
    answer = (clean > 2 * broken).nonzero()[:, 0].tolist()
    tracer = Tracer(analyse(tiny), tuple(answer), (), ())
    with torch.no_grad():
        means = {s: float(tracer.probability(probes.Corruption(sigma=s)(inputs)).mean()) for s in (0.0, 0.5, 2.0, 8.0)}
    expected = next((s for s in (0.5, 2.0, 8.0) if means[s] <= means[0.0] / 2), None)
    assert expected is not None
    assert choose_sigma(tiny, lambda: [inputs], answer, sigmas=(0.5, 2.0, 8.0)) == expected
    with pytest.raises(vlmfix.DataError, match="more than half"):
        choose_sigma(tiny, lambda: [inputs], answer, sigmas=(1e-4,))
    found = probes.causal_trace(tiny, inputs, answer, floor=0.0)
    assert found.corruption.kind == "noise"
    assert float(found.p_corrupted.mean()) <= float(found.p_clean.mean()) / 2


@pytest.mark.families
@pytest.mark.parametrize(
    "name",
    ["llava_next", "qwen2_5_vl", "qwen3_vl", "cohere2_vision", "lfm2_vl", "llama4", "gemma3", "gemma4", "idefics3"],
)
def test_hidden_states_of_the_last_token_recover_all_in_every_family(name: str) -> None:
    family = available(name)
    model = family.build()
    inputs = family.collate(family.even()[:2])
    answer = [int((family.forward(model, inputs).logits[:, -1].softmax(-1)
                   - family.forward(model, MEAN(inputs)).logits[:, -1].softmax(-1)).mean(0).argmax())]  # fmt: skip
    found = trace(model, inputs, answer, components=COMPONENTS, groups=("last", "text_object"), floor=0.0)
    assert found.of("hidden")[-1] == pytest.approx(1.0, abs=1e-4)
    assert found.of("hidden", "text_object").abs().max() < 1e-4  # no such token
    blocks = found.recovery[:2, :, 0]
    assert blocks.abs().max() > 1e-3


def test_inputs_are_repeated_sample_by_sample() -> None:
    inputs = {"a": torch.tensor([[1], [2]]), "b": [torch.ones(1), torch.zeros(1)], "c": None, "d": torch.tensor(3)}
    found = repeated(inputs, 2)
    assert found["a"].flatten().tolist() == [1, 2, 1, 2]
    assert len(found["b"]) == 4
    assert (found["c"], int(found["d"])) == (None, 3)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"components": ["heads"]}, vlmfix.MethodError, "components"),
        ({"groups": []}, vlmfix.MethodError, "groups"),
        ({"groups": ["last", "last"]}, vlmfix.MethodError, "groups"),
        ({"rows": 0}, vlmfix.MethodError, "rows"),
        ({"layers": [9]}, vlmfix.MethodError, "layer 9"),
        ({"corruption": probes.Corruption(sigma=0.0)}, vlmfix.DataError, "none of 1 samples"),
        ({"floor": 2.0}, vlmfix.DataError, "none of 1 samples"),
    ],
)
def test_what_is_wrong_is_named(tiny: Any, options: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        trace(tiny, ONE, [5], **options)


def test_other_mistakes(tiny: Any) -> None:
    with pytest.raises(vlmfix.MethodError, match="token ids"):
        probes.causal_trace(tiny, ONE, [])
    with pytest.raises(vlmfix.DataError, match="No prompts"):
        probes.causal_trace(tiny, [], [5], corruption=MEAN)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="pixel_values"):
        trace(tiny, collate([RAGGED[2]]), [5])
    with pytest.raises(vlmfix.MethodError, match="noise"):
        probes.Corruption("blur")  # type: ignore[arg-type]
    with pytest.raises(vlmfix.MethodError, match="sigma"):
        probes.Corruption(sigma=-1.0)


def test_plots(tiny: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    lines = trace(tiny, ONE)
    ax = lines.plot()
    drawn = [line for line in ax.get_lines() if line.get_label() in ("attention", "mlp")]
    assert [line.get_label() for line in drawn] == ["attention", "mlp"]
    assert drawn[1].get_ydata() == pytest.approx(lines.of("mlp").tolist())
    ax = trace(tiny, ONE, groups=SEVEN).plot(component="mlp")
    assert [label.get_text().replace("\n", "_") for label in ax.get_xticklabels()] == list(SEVEN)
    assert ax.figure.axes[1].get_ylabel() == "recovery rate"
