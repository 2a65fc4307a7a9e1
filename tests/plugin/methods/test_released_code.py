"""Where a paper and its authors' code differ, the code's own numbers can be had too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, PAD, RAGGED, collate, forward, generate
from method_parameters import IN_FORWARDS, parameters_of
from naive._branches import last_logits
from naive.act import NaiveAct
from naive.eah import NaiveEah
from naive.guidance import NaiveGuidance
from naive.pai import NaivePai
from naive.reference import Reference
from naive.vhr import choose_heads

import vlmfix
from vlmfix.methods.eah import Columns
from vlmfix.methods.parameters import parameter_of
from vlmfix.methods.vhr import divergent_heads

# VHR: squared divergences, filtered only where they spread.


@pytest.mark.parametrize("heads", [1, 2, 7, 32])
@pytest.mark.parametrize("scale", [0.02, 1.0, 5.0])
def test_vhr_drops_outliers_as_the_ports_of_its_code_do(heads: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(heads)
    with_image = scale * torch.randn(60, heads, 8, generator=generator)
    without_image = scale * torch.randn(60, heads, 8, generator=generator)
    without_image *= torch.rand(60, heads, 1, generator=generator).exp() ** 3
    pairs = list(zip(with_image, without_image, strict=True))
    expected = torch.tensor([choose_heads(list(a), list(b), "released") for a, b in pairs])
    found = divergent_heads(with_image, without_image, "released")
    assert torch.equal(found, expected)
    plain = divergent_heads(with_image, without_image, False)
    if heads == 32:
        spread = (with_image - without_image).square().sum(-1).std(1)
        assert torch.equal(found[spread <= 1], plain[spread <= 1])
        assert (scale == 0.02) == bool((spread <= 1).all())
        assert (scale == 0.02) == torch.equal(found, plain)
        assert scale == 0.02 or not torch.equal(found, divergent_heads(with_image, without_image, True))


def test_vhr_as_released_runs_in_half_precision(build: Any) -> None:
    """A divergence of 300 squares to more than fp16 holds."""
    outputs = torch.zeros(1, 8, 4, dtype=torch.float16)
    outputs[0, :, 0] = torch.tensor([1.0, 2, 3, 4, 5, 6, 300, 350])
    found = divergent_heads(outputs.float(), torch.zeros(1, 8, 4), "released", torch.finfo(torch.float16).eps)
    assert found.tolist() == [[False] * 4 + [True] * 4]
    model = build().half()
    vlmfix.patch(model, vlmfix.VHR(outliers="released", layers=":"))
    assert (
        forward(model, {k: v.half() if v.is_floating_point() else v for k, v in collate(RAGGED).items()})
        .logits.isfinite()
        .all()
    )
    assert vlmfix.status(model).edited[0] > 0


# EAH: the constants of the released file.


def released_layer(keys: int, image: range, batch: int) -> Any:
    """What a method sees of a layer, for prompts with one image at the same place."""
    is_image = torch.zeros(batch, keys, dtype=torch.bool)
    is_image[:, list(image)] = True
    forward = SimpleNamespace(image_mask=is_image, valid_mask=torch.ones_like(is_image))
    return SimpleNamespace(forward=forward, keys=lambda name, like: is_image, per_keys=lambda make, like: make())


@pytest.mark.parametrize("threshold", [0.0008, 0.002])
def test_eah_counts_as_the_released_file_does(threshold: float) -> None:
    batch, heads, length = 6, 8, 624
    generator = torch.Generator().manual_seed(3)
    scores = 1.5 * torch.randn(batch, heads, length, length, generator=generator)
    scores += 1.5 * torch.randn(batch, heads, 1, length, generator=generator)  # columns that many rows look at
    maps = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = [NaiveEah.released_winner(each, threshold) for each in maps]
    columns = Columns(maps.tril(-1).sum(2), torch.arange(length - 1, -1, -1.0).expand(batch, -1))
    layer = released_layer(length, range(35, 611), batch)
    method = vlmfix.EAH(layers=[15], threshold=threshold, counting="released")
    winner, is_copied = method.choose_head(columns, maps, layer)
    found = [head if copied else None for head, copied in zip(winner.tolist(), is_copied.tolist(), strict=True)]
    assert found == expected
    assert len(set(found)) > 1
    exact = vlmfix.EAH(layers=[15], threshold=threshold).choose_head(columns, maps, layer)[0]
    assert not torch.equal(exact, winner) or None in found


def test_eah_refuses_the_released_constants_for_other_images(tiny: Any) -> None:
    vlmfix.patch(tiny, vlmfix.EAH(counting="released"))
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"one image of 576 tokens, .* have 9"):
        forward(tiny, collate([RAGGED[0]]))


# ACT: no least number of rows.


def test_act_counts_the_last_tokens_of_a_prompt_only_without_its_minimum(build: Any) -> None:
    """With 1, as in paper and code, a key seen by one row has a mean; the default of 8 is ours."""
    model, each = build(), RAGGED[0]
    found = {}
    for rows in (1, 8):
        formula = NaiveAct(range(4), alpha=1.0, min_rows=rows)
        _, expected = Reference(model, [formula]).prompt(each.ids, each.pixels)
        vlmfix.patch(model, vlmfix.ACT(layers=":", sink_threshold="1/N", min_rows=rows))
        found[rows] = forward(model, collate([each])).logits[0]
        torch.testing.assert_close(found[rows], expected, atol=1e-5, rtol=1e-5)
    assert (found[1] - found[8]).abs().max() > 1e-3
    assert vlmfix.ACT().min_rows == 8 and "ours" in (vlmfix.ACT.__doc__ or "")


# PAI: its guidance leaves the prompt's last row alone.


def test_pai_as_released_is_guidance_beside_an_unedited_prompt(tiny: Any) -> None:
    guidance = NaiveGuidance(1.1, 0.1)
    inputs, each = collate([RAGGED[0]]), RAGGED[0]
    vlmfix.patch(tiny, [vlmfix.PAI(alpha=0.6, edit_prompt=False, layers=":"), vlmfix.Guidance()])
    ids, logits = generate(tiny, inputs, 4)
    vlmfix.patch(tiny, [vlmfix.PAI(alpha=0.6, layers=":"), vlmfix.Guidance()])
    edited = generate(tiny, inputs, 4)[1]
    vlmfix.unpatch(tiny)

    reference = Reference(tiny, [NaivePai(range(4), 0.6, edit_prompt=False)])
    state, prompt = reference.prompt(each.ids, each.pixels)
    own, answer = prompt[-1], []
    (_, other) = guidance.prompts(list(each.ids), each.pixels)
    for step in range(4):
        expected = guidance.combine(own.tolist(), last_logits(tiny, other, answer), step + 1)
        torch.testing.assert_close(
            logits[0, step].log_softmax(-1), torch.tensor(expected).log_softmax(-1), atol=1e-5, rtol=1e-5
        )
        answer.append(int(ids[0, -4 + step]))
        own = reference.decode(state, answer[-1])
    finite = logits[0, 0].isfinite() & edited[0, 0].isfinite()
    assert (logits[0, 0] - edited[0, 0])[finite].abs().max() > 0.01
    assert {PAD, IMAGE}.isdisjoint(answer)


# Strength zero.


@pytest.mark.parametrize("name", sorted(set(IN_FORWARDS) - {"none"}))
def test_every_value_that_switches_a_method_off_does(tiny: Any, name: str) -> None:
    cls = vlmfix.list_methods()[name]
    given = parameters_of(name, tiny)
    off = {field: parameter_of(cls.__dataclass_fields__[field]).off for field in cls.__dataclass_fields__}
    values = {field: value for field, value in off.items() if value == () or isinstance(value, (int, float))}
    assert not cls(**given).is_identity
    for field, value in values.items():
        assert cls(**given | {field: value}).is_identity, f"{field}={value!r}"


def test_a_contrast_of_strength_zero_still_cuts() -> None:
    for cls in (vlmfix.VCD, vlmfix.IFG):
        assert not cls(alpha=0).is_identity and not cls(alpha=0).uses_branch
        assert cls(alpha=0, beta=0).is_identity
