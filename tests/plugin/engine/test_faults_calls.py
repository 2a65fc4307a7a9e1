"""Ways people call a model: the value is that of the plain way, or the call is refused with the reason."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families.tiny_llava import IMAGE, IMAGE_TOKENS, RAGGED, collate, generate, needs_chunks, sample
from invariants import continued
from method_parameters import IN_FORWARDS, parameters_of
from transformers import DynamicCache, StaticCache

import vlmfix
from vlmfix.methods.registry import method_class

NAMES = [name for name in IN_FORWARDS if not method_class(name).searches and name != "none"]
IN_ATTENTION = [name for name in NAMES if not method_class(name).replaces_logits]
ONE = collate([sample(3, 1, 6, seed=1)])
LENGTH = ONE["input_ids"].shape[1]


def on(model: Any, name: str) -> Any:
    return vlmfix.patch(model, name, **parameters_of(name, model))


def last(model: Any, inputs: Any = ONE, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**{**inputs, **options}).logits[:, -1]
    return logits


def differs(found: torch.Tensor, stock: torch.Tensor) -> bool:
    both = found.isfinite() & stock.isfinite()
    return bool((found - stock)[both].abs().max() > 1e-3)


@pytest.mark.parametrize("name", IN_ATTENTION)
def test_a_mask_as_long_as_a_static_cache_is_one_of_the_prompt(tiny: Any, name: str) -> None:
    on(tiny, name)

    def prompt(length: int) -> torch.Tensor:
        cache = StaticCache(config=tiny.config.get_text_config(), max_cache_len=64)
        mask = F.pad(ONE["attention_mask"], (0, length - LENGTH))
        return last(tiny, attention_mask=mask, past_key_values=cache, use_cache=True)

    torch.testing.assert_close(prompt(64), prompt(LENGTH), atol=1e-5, rtol=1e-5)
    assert vlmfix.status(tiny).prompts_without_image == 0


@pytest.mark.parametrize("name", ["vista", "vhr"])  # contrasts: decoding/test_ways_to_call.py
def test_forward_by_name_is_the_call(tiny: Any, name: str) -> None:
    """Users write ``model.forward(...)``, and so does PEFT up to 0.20."""
    stock, names = last(tiny), inspect.signature(tiny.forward)
    on(tiny, name)
    assert inspect.signature(tiny.forward) == names
    with torch.no_grad():
        found = tiny.forward(**ONE).logits[:, -1]
    torch.testing.assert_close(found, last(tiny), atol=1e-5, rtol=1e-5)
    assert differs(found, stock)
    vlmfix.unpatch(tiny)
    assert "forward" not in vars(tiny)
    with torch.no_grad():
        assert torch.equal(tiny.forward(**ONE).logits[:, -1], stock)


@pytest.mark.parametrize("name", ["vcd", "vista", "vhr"])
def test_a_replica_has_the_role_of_its_model(tiny: Any, name: str) -> None:
    """As ``DataParallel`` makes them: other objects with the same hooks."""
    on(tiny, name)
    replica = tiny._replicate_for_data_parallel()
    assert replica is not tiny
    torch.testing.assert_close(last(replica), last(tiny), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "is_refused"), [("vhr", True), ("vcd", True), ("vista", True), ("pai", False)])
def test_a_replica_elsewhere_is_refused_where_the_model_itself_is_run(tiny: Any, name: str, is_refused: bool) -> None:
    """``DataParallel`` sends replicas to other devices, and a pass beside the forward would stay on the first."""
    on(tiny, name)
    replica = tiny._replicate_for_data_parallel()
    elsewhere = {name: value.to("meta") for name, value in ONE.items()}
    with pytest.raises(Exception) as failed, torch.no_grad():
        replica(**elsewhere)
    assert isinstance(failed.value, vlmfix.UnsupportedFeatureError) == is_refused
    assert ("one process per device" in str(failed.value)) == is_refused


def same_or_refused(run: Any, expected: torch.Tensor) -> bool:
    """Whether it was refused."""
    try:
        found = run()
    except vlmfix.UnsupportedFeatureError:
        return True
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    return False


@needs_chunks
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [1, 2])
def test_the_end_of_a_prompt_in_a_forward_of_its_own(tiny: Any, name: str, cut: int) -> None:
    """A single last token of a prompt looks like one of the answer; ``generate`` knows better."""
    on(tiny, name)
    expected = generate(tiny, ONE, 3)[1]
    chunked = same_or_refused(lambda: generate(tiny, ONE, 3, prefill_chunk_size=LENGTH - cut)[1], expected)

    def cached() -> torch.Tensor:
        cache = DynamicCache(config=tiny.config.get_text_config())
        start = {name: value[:, : LENGTH - cut] if value.dim() == 2 else value for name, value in ONE.items()}
        last(tiny, start, past_key_values=cache, use_cache=True)
        whole = {name: value for name, value in ONE.items() if name != "pixel_values"}
        found: torch.Tensor = generate(tiny, whole, 3, past_key_values=cache)[1]
        return found

    prefix = same_or_refused(cached, expected)
    bound = vlmfix.status(tiny).methods[0]
    assert chunked == prefix == bound.needs_whole_prompt


@pytest.mark.parametrize("name", NAMES)
def test_text_that_was_read_before_the_image(tiny: Any, name: str) -> None:
    """A system prompt that is kept in a cache."""
    on(tiny, name)
    first = int((ONE["input_ids"][0] == IMAGE).int().argmax())

    def apart() -> torch.Tensor:
        cache = DynamicCache(config=tiny.config.get_text_config())
        options = {"past_key_values": cache, "use_cache": True}
        last(tiny, {"input_ids": ONE["input_ids"][:, :first]}, **options)
        rest = {"input_ids": ONE["input_ids"][:, first:], "pixel_values": ONE["pixel_values"]}
        return last(tiny, rest, **options)

    refused = same_or_refused(apart, last(tiny, {**ONE, "attention_mask": None}))
    assert refused == vlmfix.status(tiny).methods[0].minds_text_before_image


@needs_chunks
@pytest.mark.parametrize("name", ["vcd", "vhr"])
def test_a_first_chunk_that_cuts_an_image_is_refused(tiny: Any, name: str) -> None:
    on(tiny, name)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Leave prefill_chunk_size unset"):
        generate(tiny, ONE, 2, prefill_chunk_size=8)


def packed() -> dict[str, Any]:
    parts = [collate([sample(3, 1, 6, seed=1)]), collate([sample(2, 1, 4, seed=2)])]
    lengths = [each["input_ids"].shape[1] for each in parts]
    return {
        "input_ids": torch.cat([each["input_ids"] for each in parts], 1),
        "pixel_values": torch.cat([each["pixel_values"] for each in parts]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "use_cache": False,
    }


def test_prompts_packed_into_one_row_are_refused(tiny: Any) -> None:
    stock = last(tiny, packed())
    vlmfix.patch(tiny, "pai")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"holds several prompts.*padded batch"):
        last(tiny, packed())
    vlmfix.patch(tiny, "pai", alpha=0.0)
    assert torch.equal(last(tiny, packed()), stock)


def test_positions_of_a_padded_batch_are_no_packing(tiny: Any) -> None:
    inputs = collate(RAGGED)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    on(tiny, "pai")
    expected = last(tiny, inputs)
    torch.testing.assert_close(last(tiny, inputs, position_ids=positions), expected, atol=1e-5, rtol=1e-5)


# Scoring an answer.


ANSWER = torch.tensor([[20, 21, 22, 23]])


def labelled(inputs: dict[str, Any]) -> dict[str, Any]:
    answer = ANSWER.expand(len(inputs["input_ids"]), -1)
    ids = torch.cat([inputs["input_ids"], answer], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    labels = ids.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {**inputs, "input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


def stepwise(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The loss of the answer when it is read token by token."""
    steps = continued(model, inputs, ANSWER[0, :-1, None].tolist())
    logits = torch.stack([step.logits[:, -1] for step in steps], 1)
    return F.cross_entropy(logits.flatten(0, 1), ANSWER.expand(len(logits), -1).flatten())


@pytest.mark.parametrize("name", IN_ATTENTION)
@pytest.mark.parametrize("samples", [1, 3])
def test_the_loss_of_an_answer_is_that_of_generating_it(tiny: Any, name: str, samples: int) -> None:
    inputs = collate(RAGGED[:samples])
    with torch.no_grad():
        stock = tiny(**labelled(inputs)).loss
    on(tiny, name)
    with torch.no_grad():
        found = tiny(**labelled(inputs)).loss
    torch.testing.assert_close(found, stepwise(tiny, inputs), atol=1e-5, rtol=1e-5)
    if sum(vlmfix.status(tiny).edited) > 0:
        assert abs(found - stock) > 1e-6


def test_answers_that_begin_in_different_columns_are_refused(tiny: Any) -> None:
    inputs = labelled(collate(RAGGED[:2]))
    inputs["labels"][1, -ANSWER.shape[1]] = -100
    with torch.no_grad():
        stock = tiny(**inputs).loss
        on(tiny, "pai")
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="labels of this batch begin in different columns"):
            tiny(**inputs)
        vlmfix.patch(tiny, "none")
        assert torch.equal(tiny(**inputs).loss, stock)


# Images.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["input_ids", "inputs_embeds"])
def test_a_placeholder_without_a_picture_is_a_word(tiny: Any, name: str, what: str) -> None:
    ids = torch.tensor([[1, 20, *[IMAGE] * IMAGE_TOKENS, 30, 31, 32]])
    tokens = ids if what == "input_ids" else tiny.get_input_embeddings()(ids).detach()
    inputs = {what: tokens, "attention_mask": torch.ones_like(ids)}
    stock = last(tiny, inputs)
    on(tiny, name)
    assert torch.equal(last(tiny, inputs), stock)
    assert vlmfix.status(tiny).prompts_without_image == 1


@pytest.mark.parametrize(
    ("name", "options"), [("none", {}), ("vhr", {"alpha": 1.0}), ("vcd", {"alpha": 0.0, "beta": 0.0})]
)
def test_a_method_that_is_off_takes_what_the_model_takes(tiny: Any, name: str, options: dict[str, Any]) -> None:
    """Soft prompts, in which no image can be found, and a cache filled before."""
    inputs = {"inputs_embeds": torch.randn(1, 8, tiny.config.text_config.hidden_size), "attention_mask": None}
    cache = DynamicCache(config=tiny.config.get_text_config())
    last(tiny, past_key_values=cache, use_cache=True)
    stock = last(tiny, inputs)
    vlmfix.patch(tiny, name, **options)
    assert torch.equal(last(tiny, inputs), stock)
    more = {"input_ids": torch.tensor([[20, 21]])}
    assert last(tiny, more, past_key_values=cache, use_cache=True).isfinite().all()
    vlmfix.patch(tiny, "pai")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="no image placeholder"):
        last(tiny, inputs)


def test_one_token_alone(tiny: Any) -> None:
    """The shortest prompt there is."""
    on(tiny, "vhr")
    assert last(tiny, {"input_ids": torch.tensor([[1]])}).isfinite().all()
