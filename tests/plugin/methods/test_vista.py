"""VISTA: the invariants of its definition, beside the agreement with the naive formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import available
from families.tiny_llava import IMAGE, RAGGED, collate, forward, generate
from invariants import Loop, close
from test_iri import block_outputs

import vlmfix
from vlmfix.methods.vista import beyond_rounding, steered

ONE = collate([RAGGED[1]])
VISTA = vlmfix.VISTA(lam=0.8)
STEERING = vlmfix.VISTA(lam=0.8, sla_alpha=0.0)


def vectors(model: Any, method: Any, inputs: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The vectors a prompt leaves on its cache."""
    vlmfix.patch(model, method)
    found: dict[int, torch.Tensor] = Loop(model, inputs).cache._vlmfix.learned[0, -1]
    return found


def test_the_vector_is_what_the_image_adds(tiny: Any) -> None:
    """By two forwards of the stock model: the prompt, and its words alone."""
    each = RAGGED[1]
    words = collate([type(each)(tuple(token for token in each.ids if token != IMAGE))])
    with_image = forward(tiny, ONE, output_hidden_states=True).hidden_states[1:-1]
    without = forward(tiny, words, output_hidden_states=True).hidden_states[1:-1]
    found = vectors(tiny, STEERING, ONE)
    assert set(found) == {0, 1, 2, 3}
    for layer, (one, two) in enumerate(zip(with_image, without, strict=True)):  # the last is normed
        close(found[layer][0], torch.nn.functional.normalize(one[0, -1] - two[0, -1], dim=0))


@pytest.mark.families
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "glm4v"])
def test_markers_of_an_image_leave_with_it(name: str) -> None:
    family = available(name)
    model, each = family.build(), family.single()
    vlmfix.patch(model, STEERING)
    seen: list[list[int]] = []
    inner = model.model
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    generate(model, family.collate([each]), 1)
    whole, words, again = seen
    assert words == [token for token in each.ids if token not in family.block]
    assert whole == again == list(each.ids)


def test_the_vector_depends_on_the_prompt_alone(tiny: Any) -> None:
    first = vectors(tiny, STEERING, collate(RAGGED))
    for method in (STEERING, vlmfix.VISTA(lam=0.01), VISTA):
        again = vectors(tiny, method, collate(RAGGED))
        assert all(torch.equal(again[layer], first[layer]) for layer in first)
    vlmfix.patch(tiny, [STEERING, vlmfix.PAI(alpha=2.0, layers=":")])  # always the stock model's
    cache = Loop(tiny, collate(RAGGED)).cache
    found = next(value for value in cache._vlmfix.learned.values() if isinstance(value, dict))
    assert all(torch.equal(found[layer], first[layer]) for layer in first)


def test_the_artefact_of_the_release_is_one_coordinate(tiny: Any) -> None:
    plain = vectors(tiny, STEERING, ONE)
    released = vectors(tiny, vlmfix.VISTA(lam=0.8, sla_alpha=0.0, paper_code=True), ONE)
    assert all(torch.equal(plain[layer], released[layer]) for layer in (1, 2, 3))
    turned = released[0] / released[0][:, 1:].norm() * plain[0][:, 1:].norm()
    close(turned[:, 1:], plain[0][:, 1:])
    assert released[0][0, 0] > plain[0][0, 0]


def test_outputs_keep_their_length_and_turn_towards_the_vector(tiny: Any) -> None:
    inputs = collate(RAGGED)
    found = vectors(tiny, STEERING, inputs)
    rows = inputs["attention_mask"].bool()
    rows[2] = False
    turns = 0.0
    for (number, name), (*_, before, after) in block_outputs(tiny, inputs).items():
        if name == "self_attn":
            assert torch.equal(before, after)
            continue
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5, atol=1e-6)
        assert torch.equal(before[~rows], after[~rows])  # padding, and the prompt without an image
        assert bool(((before - after).abs().amax(-1) > 0)[rows].all())  # every other position, image tokens too
        vector = found[number][:, None]
        gained = torch.cosine_similarity(after, vector, -1) - torch.cosine_similarity(before, vector, -1)
        assert gained[rows].min() > -1e-6
        turns = max(turns, float(gained[rows].max()))
    assert turns > 0.3


def test_a_turn_by_hand() -> None:
    """Across: tan = lam. Straight back: pulled twice as hard, never over."""
    vector = torch.tensor([0.0, 1.0])
    across, along, against = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.0, -2.0])
    turned = steered(across, vector, 0.5)
    close(turned, 3 * torch.tensor([math.cos(math.atan(0.5)), math.sin(math.atan(0.5))]))
    close(steered(along, vector, 0.5), along)
    close(steered(against, vector, 0.4), against)  # -1 + .8 still points back
    close(steered(against, vector, 0.6), -against)  # -1 + 1.2 points forth
    oblique = torch.tensor([0.6, -0.8])
    moved = torch.tensor([0.6, -0.8 + 0.5 * 1.8])
    close(steered(oblique, vector, 0.5), moved / moved.norm())


def test_nothing_to_turn_and_nowhere_to_turn_to() -> None:
    zero, some = torch.zeros(2, 3), torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]])
    assert torch.equal(steered(zero, some, 0.5), zero)
    close(steered(some, zero, 0.5), some)
    states = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    moved = states.clone()
    moved[0] *= 1 + 1e-6  # rounding
    moved[1] *= 1.01
    found = beyond_rounding(moved, states)
    assert torch.equal(found[0], torch.zeros(64))
    close(found[1], 0.01 * states[1])


def test_cached_decoding_equals_recomputation_with_the_same_vector(tiny: Any) -> None:
    """By hooks of the test's own on the stock model, everything anew at each step."""
    found = vectors(tiny, STEERING, ONE)
    ids, logits = generate(tiny, ONE, 5)
    vlmfix.unpatch(tiny)
    stock = generate(tiny, ONE, 5)[1]
    for number, layer in enumerate(tiny.model.language_model.layers):
        vector = found[number][:, None]
        layer.mlp.register_forward_hook(lambda module, args, output, v=vector: steered(output, v, 0.8))
    length = ONE["input_ids"].shape[1]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": ONE["pixel_values"]}
    expected = forward(tiny, whole, use_cache=False).logits
    close(logits, expected[:, length - 1 : -1])
    assert (logits - stock).abs().max() > 0.05


def test_the_price_is_two_prefills(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    tiny.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    each = RAGGED[1]
    words = sum(token != IMAGE for token in each.ids)
    for method, extra in ((VISTA, [len(each.ids), words]), (vlmfix.VISTA(lam=0), [])):
        vlmfix.patch(tiny, method)
        lengths.clear()
        generate(tiny, ONE, 3)
        assert lengths == [*extra, len(each.ids), 1, 1]


# Early logits.


CAPPED = {"final_logit_softcapping": 1.5, "logit_scale": 0.25, "logits_scaling": 4.0}
"""What the configs of some language models say about logits, and some composite models leave out."""


@pytest.mark.parametrize(
    "name",
    [
        "llava",
        "llava_gemma2",
        "aya_vision",
        "cohere2_vision",
        "paligemma2",
        "gemma3",
        "gemma4",
        "blip2_opt",
        "qwen3_5",
        "lfm2_vl",
    ],
)
@pytest.mark.families
def test_the_last_layer_through_the_norm_is_the_model_itself(name: str) -> None:
    """The head is found, and its logits are scaled and capped where the model does it."""
    family = available(name)
    model = family.build()
    text = model.config.get_text_config(decoder=True)
    for field, value in CAPPED.items():
        if hasattr(text, field):
            setattr(text, field, value)
    inputs = family.collate(family.ragged())
    stock = generate(model, inputs, 3)[1]
    vlmfix.patch(model, vlmfix.VISTA(lam=0, sla_alpha=0.7, sla_layers=[-1], sla_final_norm=True))
    close(generate(model, inputs, 3)[1], stock)
    assert vlmfix.status(model).edited[0] > 0
    vlmfix.patch(model, vlmfix.VISTA(lam=0, sla_alpha=0.7, sla_layers=[-1]))
    assert (generate(model, inputs, 3)[1] - stock).abs().max() > 0.02  # without the norm it is not


def test_early_logits_by_hand_and_only_in_the_last_row(tiny: Any) -> None:
    inputs = collate(RAGGED)
    out = forward(tiny, inputs, output_hidden_states=True)
    with torch.no_grad():
        early = (tiny.lm_head(out.hidden_states[1]) + tiny.lm_head(out.hidden_states[3])) / 2
    expected = out.logits.clone()
    expected[:, -1] = 0.4 * early[:, -1] + 0.6 * out.logits[:, -1]
    expected[2] = out.logits[2]
    vlmfix.patch(tiny, vlmfix.VISTA(lam=0, sla_alpha=0.4, sla_layers=[0, 2]))
    found = forward(tiny, inputs).logits
    close(found, expected)
    assert torch.equal(found[:, :-1], out.logits[:, :-1])
    assert torch.equal(found[2], out.logits[2])
    length = inputs["input_ids"].shape[1]
    for keep in (1, torch.tensor([length - 1]), torch.tensor([0, length - 1, 3]), torch.tensor([2, 5])):
        chosen = expected[:, -1:] if isinstance(keep, int) else expected[:, keep]
        close(forward(tiny, inputs, logits_to_keep=keep).logits, chosen)
    assert vlmfix.status(tiny).edited == (5 * 3,)
    first, *_ = forward(tiny, inputs, return_dict=False)
    close(first, expected)
    loss, logits, *_ = forward(tiny, inputs, labels=inputs["input_ids"], return_dict=False)
    assert loss.dim() == 0
    close(logits, expected)


def test_processors_see_mixed_logits(tiny: Any) -> None:
    seen: list[torch.Tensor] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return scores

    vlmfix.patch(tiny, vlmfix.VISTA(lam=0, sla_alpha=0.6, sla_layers=[0]))
    logits = generate(tiny, ONE, 3, logits_processor=[look])[1]
    for step, scores in enumerate(seen):
        close(scores[0, 4:], logits[0, step, 4:])


def test_the_inner_model_has_no_logits_to_mix(tiny: Any) -> None:
    stock = forward(tiny.model, ONE).last_hidden_state
    vlmfix.patch(tiny, vlmfix.VISTA(lam=0, sla_alpha=0.6, sla_layers=[0]))
    assert torch.equal(forward(tiny.model, ONE).last_hidden_state, stock)


# Parameters.


def test_strengths_go_by_task(tiny: Any) -> None:
    assert [vlmfix.VISTA(task=task).strength for task in ("caption", "short", None)] == [0.17, 0.01, 0.1]
    assert vlmfix.VISTA(lam=0.3).strength == 0.3
    vlmfix.patch(tiny, "vista")
    assert "lam must match the task" in str(vlmfix.status(tiny))
    vlmfix.patch(tiny, "vista", task="short")
    assert not vlmfix.status(tiny).notes


@pytest.mark.parametrize(
    ("depth", "expected"), [(32, (25, 26, 27, 28, 29, 30)), (4, (2,)), (2, (0,)), (1, (0,)), (40, tuple(range(31, 39)))]
)
def test_the_window_of_early_layers(depth: int, expected: tuple[int, ...]) -> None:
    class Anatomy:
        num_layers = depth

    bound = vlmfix.VISTA().bind(Anatomy())  # type: ignore[arg-type]
    assert bound.early_layers == expected
    assert bound.layer_indices == tuple(range(depth))
    assert vlmfix.VISTA(sla_alpha=0).bind(Anatomy()).early_layers == ()  # type: ignore[arg-type]
