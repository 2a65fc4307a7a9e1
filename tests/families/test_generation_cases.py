"""What transformers' own model and generation tests ask of every model, asked of patched ones.

A case is a function that raises where a model breaks a promise of ``transformers``. It is run on the unpatched model
first: what fails there is upstream. Then it must hold under every method, or be refused where a limit is documented.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from method_parameters import parameters_of
from transformers import DynamicCache

import vlmfix
from families import Family, available, by_name
from families.tiny_llava import generate

NAMES = ("llava", "llava_mistral", "qwen2_vl", "qwen3_5", "gemma3", "paligemma", "idefics3", "mllama", "llama4")
METHODS = ("none", "vhr", "pai", "var", "act", "iri", "vcd", "guidance", "flb", "sid")
CONTRASTS = frozenset({"vcd", "guidance", "flb", "sid"})
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def prompts(family: Family) -> dict[str, torch.Tensor]:
    """Two padded prompts of unequal length with an image each."""
    return family.collate(family.even()[:2])


def length_of(inputs: dict[str, torch.Tensor]) -> int:
    return int(inputs["input_ids"].shape[1])


# The cases.


def the_parts_of_a_returned_dictionary(model: Any, family: Family) -> None:
    inputs = prompts(family)
    watched = ("output_scores", "output_logits", "output_hidden_states")
    out = model.generate(**inputs, **GREEDY, **dict.fromkeys(watched, True), return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(**inputs, **GREEDY))
    assert out.sequences.shape == (2, length_of(inputs) + 3)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 3
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert scores.shape == logits.shape and scores.shape[0] == 2 and scores.dtype == torch.float32
        assert torch.equal(scores.argmax(-1), out.sequences[:, length_of(inputs) + step])
    layers = model.config.get_text_config().num_hidden_layers
    for step, states in enumerate(out.hidden_states):
        assert len(states) == layers + 1
        assert all(each.shape[:2] == (2, 1 if step else length_of(inputs)) for each in states)
    assert out.past_key_values.get_seq_length() == length_of(inputs) + 2


def attention_weights_are_returned(model: Any, family: Family) -> None:
    inputs = family.collate([family.single()])
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model.generate(**inputs, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    finally:
        model.set_attn_implementation(before)
    assert len(out.attentions) == 3
    for step, layers in enumerate(out.attentions):
        for weights in layers:
            if weights is not None:
                assert weights.shape[0] == 1 and weights.shape[2] == (1 if step else length_of(inputs))
                close(weights[:, :, -1].sum(-1), torch.ones_like(weights[:, :, -1, 0]))


def sampling_and_beams_return_as_many_as_asked(model: Any, family: Family) -> None:
    inputs = prompts(family)
    ways: tuple[dict[str, Any], ...] = (
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    )
    for options in ways:
        found = []
        for _ in range(2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                found.append(model.generate(**inputs, **options, max_new_tokens=3))
        assert found[0].shape == (4, length_of(inputs) + 3)
        assert torch.equal(*found)
        assert torch.equal(found[0][::2, : length_of(inputs)], inputs["input_ids"])


def drafted_tokens_change_nothing(model: Any, family: Family) -> None:
    inputs = family.collate([family.single()])
    found = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
    assert torch.equal(found, model.generate(**inputs, **GREEDY))


def kernels_agree(model: Any, family: Family) -> None:
    inputs = prompts(family)
    before, found = model.config._attn_implementation, []
    try:
        for kernel in ("eager", "sdpa"):
            model.set_attn_implementation(kernel)
            found.append(generate(model, inputs, 3)[1])
    finally:
        model.set_attn_implementation(before)
    close(*found)


def padding_on_the_left_changes_nothing(model: Any, family: Family) -> None:
    one = family.collate([family.single()])
    padded = family.collate([family.single()], pad_to=length_of(one) + 9)
    close(generate(model, padded, 3)[1], generate(model, one, 3)[1])


def a_static_cache_changes_nothing(model: Any, family: Family) -> None:
    inputs = prompts(family)
    static = generate(model, inputs, 3, cache_implementation="static", disable_compile=True)[1]
    close(static, generate(model, inputs, 3)[1])


def no_cache_changes_nothing(model: Any, family: Family) -> None:
    inputs = prompts(family)
    close(generate(model, inputs, 3, use_cache=False)[1], generate(model, inputs, 3)[1])


def an_answer_goes_on_from_its_cache(model: Any, family: Family) -> None:
    inputs = family.collate([family.single()])
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    first = model.generate(**inputs, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    behind = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    if "mm_token_type_ids" in inputs:
        behind["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2))
    cache = first.past_key_values
    assert torch.equal(model.generate(**behind, past_key_values=cache, **GREEDY), whole)


def embeddings_stand_for_their_ids(model: Any, family: Family) -> None:
    inputs = family.collate([family.text() if family.text_only else family.single()])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        close(model(**rest, inputs_embeds=embeds).logits, model(**inputs).logits)
    found = model.generate(**rest, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(found, model.generate(**inputs, **GREEDY)[:, length_of(inputs) :])


def a_forward_returns_what_is_asked(model: Any, family: Family) -> None:
    inputs = family.collate([family.single()])
    with torch.no_grad():
        whole = model(**inputs)
        assert torch.equal(model(**inputs).logits, whole.logits)
        assert torch.equal(model(**inputs, return_dict=False)[0], whole.logits)
        close(model(**inputs, logits_to_keep=1).logits[:, -1], whole.logits[:, -1])
        close(model(**inputs, output_hidden_states=True).logits, whole.logits)
        cache = DynamicCache(config=model.config)
        close(model(**inputs, past_key_values=cache, use_cache=True).logits, whole.logits)


def a_larger_vocabulary_changes_nothing(model: Any, family: Family) -> None:
    inputs = family.collate([family.single()])
    expected = generate(model, inputs, 2)[1]
    larger = copy.deepcopy(model)
    size = larger.get_input_embeddings().num_embeddings
    larger.resize_token_embeddings(size + 8, mean_resizing=False)
    close(generate(larger, inputs, 2)[1][..., :size], expected[..., :size])


def weights_are_saved_and_loaded(model: Any, family: Family) -> None:
    inputs = family.collate([family.single()])
    expected = generate(model, inputs, 2)[1]
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not other.load_state_dict(torch.load(stored), strict=True).missing_keys
    close(generate(other, inputs, 2)[1], expected)


CASES: tuple[Callable[[Any, Family], None], ...] = (
    the_parts_of_a_returned_dictionary,
    attention_weights_are_returned,
    sampling_and_beams_return_as_many_as_asked,
    drafted_tokens_change_nothing,
    kernels_agree,
    padding_on_the_left_changes_nothing,
    a_static_cache_changes_nothing,
    no_cache_changes_nothing,
    an_answer_goes_on_from_its_cache,
    embeddings_stand_for_their_ids,
    a_forward_returns_what_is_asked,
    a_larger_vocabulary_changes_nothing,
    weights_are_saved_and_loaded,
)

# Where a method's own definition sets a limit: what the refusal says.
LIMITS: dict[tuple[str, str], str] = {
    **{("drafted_tokens_change_nothing", name): "Assisted decoding" for name in CONTRASTS},
    **{("a_static_cache_changes_nothing", name): "static cache" for name in CONTRASTS},
    **{("no_cache_changes_nothing", name): "Leave use_cache on" for name in ("flb", "sid")},
}


@cache
def built(name: str) -> Any:
    return by_name(name).build()


@cache
def fails_upstream(name: str, case: Callable[[Any, Family], None]) -> str:
    """Why a case fails on the unpatched model; empty if it does not."""
    try:
        case(copy.deepcopy(built(name)), by_name(name))
    except Exception as error:
        return f"the unpatched model: {type(error).__name__}: {error}"[:200]
    return ""


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    found = available(request.param)
    yield found


@pytest.mark.families
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_promise_of_transformers_holds_under_a_patch(
    request: pytest.FixtureRequest, family: Family, case: Callable[[Any, Family], None], method: str
) -> None:
    if reason := fails_upstream(family.name, case):
        pytest.skip(reason)
    model = copy.deepcopy(built(family.name))
    try:
        vlmfix.patch(model, method, **parameters_of(method, model))
    except vlmfix.MethodError as error:
        pytest.skip(f"refused when patching: {error}"[:200])
    limit = LIMITS.get((case.__name__, method))
    if limit is None:
        case(model, family)
        return
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=limit):
        case(model, family)
