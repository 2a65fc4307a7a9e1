"""What holds for every method, whatever it edits: one test per promise, over all methods.

A new method is found here by its name. What it is tested with stands in ``tests/method_parameters.py``, unless its
defaults act on a tiny model; what switches it off stands there too.
"""

from __future__ import annotations

import copy
import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
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
    needs_chunks,
    pictures,
    sample,
    snapshot,
)
from invariants import (
    Loop,
    assert_four_threads_equal_one,
    assert_offloaded_equals_loaded,
    close,
    continued,
)
from method_parameters import IN_FORWARDS, OFF, parameters_of
from transformers import DynamicCache, LogitsProcessor, StaticCache

import vlmfix
from vlmfix.methods.registry import method_class, method_from_dict
from vlmfix.recipes import load_recipe, save_recipe

ONE = collate([RAGGED[1]])
BATCH = collate(RAGGED)
TEXT = collate([RAGGED[2], sample(12, 0, 8, seed=5)])

ACTING = [name for name in IN_FORWARDS if name != "none"]
SEARCHES = [name for name in ACTING if method_class(name).searches]
"""They take the place of ``generate`` and read one prompt at a time."""
CONTRASTS = [name for name in ACTING if method_class(name).replaces_logits and name not in SEARCHES]
"""They run a second branch beside the prompt's own."""
EDITS = [name for name in ACTING if name not in SEARCHES and name not in CONTRASTS]
"""They edit what happens inside a forward."""
CANNOT_FORGET = ("act",)
"""What they learn of a prompt cannot be told apart again."""


def each_of(names: Any) -> Any:
    return pytest.mark.parametrize("name", names)


def acting(model: Any, name: str, **changes: Any) -> Any:
    """Patch a model so that the method has something to do."""
    return vlmfix.patch(model, name, **{**parameters_of(name, model), **changes})


def answer(model: Any, name: str, inputs: Any, tokens: int = 4) -> list[torch.Tensor]:
    """Greedy ids, and the logits of every step from methods that have steps."""
    if name in SEARCHES:
        return [model.generate(**inputs, max_new_tokens=tokens, do_sample=False)]
    return list(generate(model, inputs, tokens))


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


# Switched off, taken off, without an image.


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "off"), OFF, ids=str)
def test_strength_zero_is_bitwise_stock(build: Any, name: str, off: dict[str, Any], attn: str) -> None:
    model = build(attn=attn)
    stock, logits = generate(model, BATCH, 3), forward(model, BATCH).logits
    acting(model, name, **off)
    assert vlmfix.status(model).methods[0].is_identity
    edited = generate(model, BATCH, 3)
    assert torch.equal(stock[0], edited[0]) and torch.equal(stock[1], edited[1])
    assert torch.equal(forward(model, BATCH).logits, logits)
    assert vlmfix.status(model).edited == (0,)


def test_every_method_but_a_search_can_be_switched_off() -> None:
    assert {name for name, _ in OFF} == set(ACTING) - set(SEARCHES)


@each_of(ACTING)
def test_it_acts_and_unpatching_leaves_every_bit_and_no_residue(sinky: Any, name: str, tmp_path: Path) -> None:
    inputs = ONE if name in SEARCHES else BATCH
    stock = generate(sinky, inputs, 4)  # transformers leaves its own traces at the first call
    sinky.save_pretrained(tmp_path / "stock")
    before, weights = snapshot(sinky), {key: value.clone() for key, value in sinky.state_dict().items()}
    assert acting(sinky, name) is sinky
    found = answer(sinky, name, inputs)
    assert vlmfix.status(sinky).edited[0] > 0
    if name not in SEARCHES:
        assert (found[1] - stock[1]).abs().max() > 0.01
    sinky.save_pretrained(tmp_path / "patched")
    assert vlmfix.unpatch(sinky) is sinky and vlmfix.status(sinky) is None
    assert snapshot(sinky) == before
    after = generate(sinky, inputs, 4)
    assert torch.equal(after[0], stock[0]) and torch.equal(after[1], stock[1])
    assert all(torch.equal(value, weights[key]) for key, value in sinky.state_dict().items())
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()


class _TakesOff(LogitsProcessor):
    """Takes the patch off when the second token is chosen."""

    def __init__(self, model: Any) -> None:
        self.model, self.left = model, 2

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            vlmfix.unpatch(self.model)
        return scores


@each_of(["act", "cmai", "vhr", "vista", "flb", "ifg", "m3id", "vcd"])
def test_beams_go_on_where_a_patch_is_taken_off_in_the_middle(tiny: Any, name: str) -> None:
    def beams(inputs: Any) -> torch.Tensor:
        acting(tiny, name)
        options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
        return tiny.generate(**inputs, **options, logits_processor=[_TakesOff(tiny)])[:, -5:]

    together = beams(collate(RAGGED[:2]))
    assert vlmfix.status(tiny) is None
    assert all(torch.equal(row, beams(collate([each]))[0]) for row, each in zip(together, RAGGED, strict=False))
    acting(tiny, name)
    loop, greedy = Loop(tiny, collate([RAGGED[0]])), []
    logits = loop.logits
    for step in range(5):
        if step == 1:
            vlmfix.unpatch(tiny)
        logits[:, -1, tiny.generation_config.suppress_tokens] = -torch.inf
        greedy.append(int(logits[0, -1].argmax()))
        logits = loop.read(greedy[-1]).clone()
    acting(tiny, name)
    options = {"max_new_tokens": 5, "do_sample": False}
    found = tiny.generate(**collate([RAGGED[0]]), **options, logits_processor=[_TakesOff(tiny)])
    assert found[0, -5:].tolist() == greedy, "the method's first tokens, and the stock model's behind them"


@each_of(ACTING)
def test_a_prompt_without_an_image_is_bitwise_stock(tiny: Any, name: str) -> None:
    inputs = collate([RAGGED[2]]) if name in SEARCHES else TEXT
    options = {"num_beams": 2} if name in SEARCHES else {}
    stock = tiny.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
    logits = forward(tiny, inputs).logits
    acting(tiny, name)
    assert torch.equal(tiny.generate(**inputs, max_new_tokens=4, do_sample=False, **options), stock)
    assert torch.equal(forward(tiny, inputs).logits, logits)
    status = vlmfix.status(tiny)
    assert status.edited == (0,) and status.prompts_without_image > 0


@each_of(ACTING)
def test_one_call_can_ask_for_the_stock_model(tiny: Any, name: str) -> None:
    stock, logits = generate(tiny, ONE, 4), forward(tiny, ONE).logits
    acting(tiny, name)
    found = generate(tiny, ONE, 4, vlmfix=None)
    assert torch.equal(found[0], stock[0]) and torch.equal(found[1], stock[1])
    assert torch.equal(forward(tiny, ONE, vlmfix=None).logits, logits)


@each_of(ACTING)
def test_inputs_and_random_states_are_left_alone(tiny: Any, name: str) -> None:
    inputs = copy.deepcopy(ONE)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    acting(tiny, name)
    tiny.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
    assert inputs.keys() == ONE.keys() and all(torch.equal(inputs[key], ONE[key]) for key in ONE)


@each_of(ACTING)
def test_it_survives_json_and_a_recipe_file(tiny: Any, name: str, tmp_path: Path) -> None:
    acting(tiny, name)
    (bound,) = vlmfix.status(tiny).methods
    assert method_from_dict(json.loads(json.dumps(bound.to_dict()))) == bound
    save_recipe(tmp_path / "recipe.json", bound)
    (read,) = load_recipe(tmp_path / "recipe.json")
    assert read == bound and hash(read) == hash(bound)
    expected = answer(tiny, name, ONE)
    vlmfix.patch(tiny, tmp_path / "recipe.json")
    assert same(answer(tiny, name, ONE), expected)


# Batches.


@each_of(EDITS + CONTRASTS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_batch_equals_its_prompts_one_by_one(build: Any, name: str, kind: str) -> None:
    model = build(kind)
    acting(model, name)
    batch = generate(model, collate(RAGGED, pad_to=50), 3)[1]
    for row, each in enumerate(RAGGED):
        close(batch[row], generate(model, collate([each]), 3)[1][0])


@each_of(EDITS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_position_of_a_batch_equals_that_of_its_prompts(build: Any, name: str, side: str) -> None:
    model, inputs = build(), collate(RAGGED, side=side, pad_to=50)
    acting(model, name)
    batch = forward(model, inputs).logits
    for row, each in enumerate(RAGGED):
        close(batch[row, inputs["attention_mask"][row].bool()], forward(model, collate([each])).logits[0])


@each_of(EDITS + CONTRASTS)
def test_beams_of_a_batch_equal_those_of_its_prompts(tiny: Any, name: str) -> None:
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    acting(tiny, name)
    batch = tiny.generate(**BATCH, **options)
    for row, each in enumerate(RAGGED):
        assert torch.equal(batch[row, -5:], tiny.generate(**collate([each]), **options)[0, -5:])


@each_of(EDITS + CONTRASTS)
def test_a_beam_scores_as_its_tokens_one_by_one(tiny: Any, name: str) -> None:
    acting(tiny, name)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "length_penalty": 0.0}
    out = tiny.generate(**ONE, **options, return_dict_in_generate=True, output_scores=True)
    tokens = out.sequences[0, -4:].tolist()
    steps = continued(tiny, ONE, [[token] for token in tokens[:-1]])
    total = sum(float(step.logits[0, -1].log_softmax(-1)[token]) for step, token in zip(steps, tokens, strict=True))
    assert abs(total - float(out.sequences_scores[0])) < 1e-4


@each_of(EDITS + CONTRASTS)
def test_sampling_repeats_with_its_seed(tiny: Any, name: str) -> None:
    acting(tiny, name)
    found = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            found.append(tiny.generate(**ONE, do_sample=True, max_new_tokens=6, num_return_sequences=3))
    assert torch.equal(*found)
    assert len({tuple(row) for row in found[0].tolist()}) > 1


@each_of(ACTING)
def test_a_second_answer_starts_afresh(tiny: Any, name: str) -> None:
    acting(tiny, name)
    first = answer(tiny, name, collate([RAGGED[0]]))
    answer(tiny, name, collate([RAGGED[3]]))
    assert same(answer(tiny, name, collate([RAGGED[0]])), first)


@each_of(EDITS + CONTRASTS)
def test_four_threads_equal_one(tiny: Any, name: str) -> None:
    acting(tiny, name)
    assert_four_threads_equal_one(tiny, [], 3)


@each_of(EDITS + CONTRASTS)
def test_a_stream_from_a_thread_equals_generate(tiny: Any, name: str) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Tokens(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    acting(tiny, name)
    options = {**ONE, "max_new_tokens": 5, "do_sample": False}
    expected = tiny.generate(**options)
    streamer = Tokens()
    thread = threading.Thread(target=tiny.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    thread.join()
    assert streamer.tokens == expected[0].tolist()


# Caches.


@each_of(EDITS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_static_cache_equals_a_dynamic_one(build: Any, name: str, kind: str) -> None:
    model = build(kind)
    acting(model, name)
    for inputs in (ONE, BATCH):
        ids, expected = generate(model, inputs, 4)
        found = generate(model, inputs, 4, cache_implementation="static", disable_compile=True)
        assert torch.equal(found[0], ids)
        close(found[1], expected)


@each_of(EDITS)
def test_a_static_cache_can_be_reset_and_used_again(tiny: Any, name: str) -> None:
    acting(tiny, name)
    cache = StaticCache(config=tiny.config, max_cache_len=60)
    for each in RAGGED:
        expected = generate(tiny, collate([each]), 3)[1]
        close(generate(tiny, collate([each]), 3, past_key_values=cache, disable_compile=True)[1], expected)
        cache.reset()


@each_of(EDITS + CONTRASTS)
def test_a_copied_prefix_serves_several_continuations(tiny: Any, name: str) -> None:
    acting(tiny, name)
    prefix = Loop(tiny, ONE)
    assert torch.equal(*(prefix.copied().steps(20, 21) for _ in range(2)))
    assert prefix.cache.get_seq_length() == ONE["input_ids"].shape[1]


@each_of(EDITS)
def test_a_cropped_answer_leaves_nothing_behind(tiny: Any, name: str) -> None:
    """The prompt stays, a token of the answer goes; a step and a further turn with an image follow."""
    acting(tiny, name)
    cropped, fresh = (Loop(tiny, collate([RAGGED[0]])) for _ in range(2))
    cropped.steps(20, 21)
    fresh.steps(20)
    cropped.cache.crop(-1)
    assert torch.equal(cropped.read(23), fresh.read(23))
    second = sample(2, 1, 4, seed=9)
    assert torch.equal(cropped.turn(second), fresh.turn(second))


@each_of(EDITS + CONTRASTS)
@pytest.mark.parametrize("answer", [(), (20, 21)], ids=["unread", "answered"])
@pytest.mark.parametrize("rest", [(33,), (33, 34)], ids=["a token", "tokens"])
@pytest.mark.parametrize("kept", ["all but one", "behind the image", "text alone"])
def test_a_cache_cropped_into_the_prompt_is_right_or_refused(
    tiny: Any, name: str, answer: tuple[int, ...], rest: tuple[int, ...], kept: str
) -> None:
    """What comes next is the rest of a prompt, as if the model had read that prompt at once."""
    (method,) = vlmfix.status(acting(tiny, name)).methods
    each = RAGGED[0]
    length = {"all but one": len(each.ids) - 1, "behind the image": len(each.ids) - 3, "text alone": 3}[kept]
    loop, fresh = Loop(tiny), Loop(tiny)
    loop.read(*each.ids, pixel_values=each.pixels)
    loop.steps(*answer)
    loop.cache.crop(length - loop.cache.get_seq_length())
    try:
        found = loop.read(*rest)
    except vlmfix.UnsupportedFeatureError:
        assert method.minds_text_before_image if kept == "text alone" else method.needs_whole_prompt
        return
    pixels = None if kept == "text alone" else each.pixels
    close(found[:, -1], fresh.read(*each.ids[:length], *rest, pixel_values=pixels)[:, -1])
    close(loop.read(22), fresh.read(22))


@each_of(EDITS + CONTRASTS)
@pytest.mark.parametrize("rest", ["a token", "a turn", "a turn with an image"])
def test_a_turn_cropped_away_leaves_nothing_behind(tiny: Any, name: str, rest: str) -> None:
    """The answer before it goes on, or another turn follows, as if it had never been read."""
    (method,) = vlmfix.status(acting(tiny, name)).methods
    first, second, third = RAGGED[0], sample(2, 2, 4, seed=9), sample(3, 1, 4, seed=11)
    loop, fresh = Loop(tiny), Loop(tiny)
    for each in (loop, fresh):
        each.read(*first.ids, pixel_values=first.pixels)
        each.steps(20, 21)
    loop.turn(second)
    loop.read(23)
    loop.cache.crop(-len(second.ids))
    ids, pixels = {"a token": ([24], None), "a turn": ([24, 25, 26], None)}.get(rest, (third.ids[1:], third.pixels))
    expected = [fresh.read(*ids, pixel_values=pixels), fresh.read(22)]
    try:
        found = [loop.read(*ids, pixel_values=pixels), loop.read(22)]
    except vlmfix.UnsupportedFeatureError:
        keeps_choice = method.keeps_choice and rest == "a token"
        assert keeps_choice or name in CANNOT_FORGET or name in CONTRASTS
    else:
        for one, two in zip(found, expected, strict=True):
            close(one[:, -1], two[:, -1])


@each_of(EDITS + CONTRASTS)
def test_a_cache_that_the_stock_model_has_read_on_is_refused(tiny: Any, name: str) -> None:
    """Of what it read, nothing is known: neither where an answer ends nor where a picture is."""
    loop = Loop(acting(tiny, name), ONE)
    copied = loop.copied()
    loop.read(20, 21, vlmfix=None)
    loop.read(22, vlmfix=None)
    for tokens in ((23,), (23, 24)):
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="stock model has read"):
            loop.read(*tokens)
    copied.read(23)


@each_of(EDITS + CONTRASTS)
def test_generate_from_all_but_the_last_token_of_a_prompt_is_right_or_refused(tiny: Any, name: str) -> None:
    (method,) = vlmfix.status(acting(tiny, name)).methods
    cache, text = DynamicCache(config=tiny.config), {k: v for k, v in ONE.items() if k != "pixel_values"}
    first = generate(tiny, ONE, 3, past_key_values=cache)
    cache.crop(ONE["input_ids"].shape[1] - 1 - cache.get_seq_length())
    try:
        found = generate(tiny, text, 3, past_key_values=cache)
    except vlmfix.UnsupportedFeatureError:
        assert method.needs_whole_prompt
    else:
        close(found[1], first[1])


@each_of(EDITS + CONTRASTS)
def test_generate_continues_a_conversation(tiny: Any, name: str) -> None:
    """A returned cache with a second image in the second turn, against the same steps by hand."""
    acting(tiny, name)
    first, second = RAGGED[0], sample(2, 1, 5, seed=8)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    turn = tiny.generate(**collate([first]), **options)
    ids = torch.cat([turn.sequences, torch.tensor([second.ids[1:]])], dim=1)
    more = {"attention_mask": torch.ones_like(ids), "pixel_values": second.pixels}
    after = tiny.generate(input_ids=ids, past_key_values=turn.past_key_values, **more, **options)
    loop = Loop(tiny, collate([first]))
    loop.steps(*turn.sequences[0, -3:-1].tolist())
    new = ids[:, loop.cache.get_seq_length() :]
    close(after.logits[0][0], loop.read(input_ids=new, pixel_values=second.pixels)[0, -1])


@each_of(EDITS + CONTRASTS)
@pytest.mark.parametrize("beams", [1, 2])
def test_without_a_cache_answers_are_the_same_or_refused(tiny: Any, name: str, beams: int) -> None:
    (method,) = vlmfix.status(acting(tiny, name)).methods
    options = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    expected = tiny.generate(**BATCH, **options)
    if method.needs_cache and (name in CONTRASTS or method.vision_layers):
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="Leave use_cache on"):
            tiny.generate(**BATCH, use_cache=False, **options)
        return
    found = tiny.generate(**BATCH, use_cache=False, **options)
    assert torch.equal(found.sequences, expected.sequences)
    close(torch.stack(found.logits), torch.stack(expected.logits))


@each_of(SEARCHES)
def test_a_search_without_a_cache_is_refused(tiny: Any, name: str) -> None:
    acting(tiny, name)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="use_cache"):
        answer(tiny, name, {**ONE, "use_cache": False})


# Prompts in parts, and tokens that were drafted.


@needs_chunks
@each_of(EDITS + CONTRASTS)
@pytest.mark.parametrize("size", [7, 13])
def test_a_prompt_in_chunks_is_right_or_refused(tiny: Any, name: str, size: int) -> None:
    expected = generate(acting(tiny, name), collate([RAGGED[0]]), 3)[1]
    (method,) = vlmfix.status(tiny).methods
    try:
        found = generate(tiny, collate([RAGGED[0]]), 3, prefill_chunk_size=size)[1]
    except vlmfix.UnsupportedFeatureError:
        assert method.needs_whole_prompt or name in CONTRASTS
    else:
        close(found, expected)


@each_of(EDITS)
def test_a_prompt_in_parts_is_right_or_refused(tiny: Any, name: str) -> None:
    expected = forward(acting(tiny, name), collate([RAGGED[0]])).logits
    (method,) = vlmfix.status(tiny).methods
    ids, loop, found = RAGGED[0].ids, Loop(tiny), []
    try:
        for part in (ids[:15], ids[15:17], ids[17:]):
            found.append(loop.read(*part, pixel_values=RAGGED[0].pixels if IMAGE in part else None))
    except vlmfix.UnsupportedFeatureError as error:
        assert method.needs_whole_prompt and "one forward" in str(error)
    else:
        close(torch.cat(found, 1)[:, -1], expected[:, -1])
        if not method.needs_whole_prompt:
            close(torch.cat(found, 1), expected)


@each_of(EDITS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_prompt_lookup_equals_greedy(build: Any, name: str, kind: str) -> None:
    model, phrase = build(kind, window=40), (20, 21, SINK_WORD, 22, 23)
    each = Sample((BOS, *phrase, *[IMAGE] * 9, *phrase, *phrase, 20, 21), pictures(1, 4))
    acting(model, name)
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**collate([each]), **options)
    found = model.generate(**collate([each]), prompt_lookup_num_tokens=4, **options)
    assert torch.equal(found[:, : expected.shape[1]], expected)


@each_of(EDITS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_drafted_rows_equal_single_steps(build: Any, name: str, kind: str) -> None:
    model = build(kind)
    acting(model, name)
    singles = continued(model, BATCH, [[20], [21], [22], [23]])
    drafted = continued(model, BATCH, [[20], [21, 22, 23]])
    close(drafted[2].logits, torch.cat([step.logits for step in singles[2:]], dim=1))


@each_of(EDITS)
def test_a_draft_beside_the_prompt_equals_single_steps(tiny: Any, name: str) -> None:
    acting(tiny, name)
    each, draft = RAGGED[0], [20, 21, 22]
    expected = continued(tiny, collate([each]), [[token] for token in draft])
    options = {"past_key_values": DynamicCache(config=tiny.config), "use_cache": True, "logits_to_keep": 4}
    found = forward(tiny, collate([Sample((*each.ids, *draft), each.pixels)]), **options).logits
    close(found, torch.cat([step.logits[:, -1:] for step in expected], dim=1))


# What a kernel computes.


@each_of(EDITS + CONTRASTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_half_precision_is_finite_and_near_single(build: Any, name: str, dtype: torch.dtype, attn: str) -> None:
    """bf16 has 8 bits: logits of order 1 differ by some hundredths."""
    model = build(attn=attn)
    acting(model, name)
    inputs = collate(RAGGED)
    expected = forward(model, inputs).logits
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    logits = forward(model.to(dtype), inputs).logits
    valid = inputs["attention_mask"].bool()
    assert logits.dtype == dtype and logits[valid].isfinite().all()
    assert (logits.float() - expected)[valid].abs().median() < (0.005 if dtype == torch.float16 else 0.05)
    assert generate(model, inputs, 3)[1].isfinite().all()


@each_of(EDITS)
def test_kernels_agree(build: Any, name: str) -> None:
    found = []
    for attn in ("sdpa", "eager"):
        model = build(attn=attn)
        acting(model, name)
        found.append(generate(model, BATCH, 3)[1])
    close(*found)


@each_of([name for name in EDITS if method_class(name).edits_scores or method_class(name).edits_weights])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rows_written_in_small_pieces_equal_one_piece(
    build: Any, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, right = build(kind), collate(RAGGED, side="right")
    acting(model, name)
    valid = right["attention_mask"] > 0
    expected, logits = generate(model, BATCH, 3)[1], forward(model, right).logits
    monkeypatch.setattr("vlmfix.model.attention.CHUNK_ELEMENTS", 3 * 4 * 4 * 40)
    close(generate(model, BATCH, 3)[1], expected)
    close(forward(model, right).logits[valid], logits[valid])


@each_of(EDITS)
def test_rows_of_weights_sum_to_one_and_none_is_negative(build: Any, name: str) -> None:
    """AD-HH takes text away and, as released, puts nothing in its place: there sums may only fall."""
    model = build(attn="eager")
    acting(model, name)
    mask = BATCH["attention_mask"].bool()
    for number, output in enumerate(continued(model, BATCH, [[20], [21]], output_attentions=True)):
        for weights in output.attentions:
            assert (weights >= 0).all()
            sums = weights.sum(-1).transpose(1, 2)
            sums = sums[mask] if number == 0 else sums
            assert (sums <= 1 + 1e-5).all()
            if name != "adhh":
                close(sums, torch.ones_like(sums))


@each_of(EDITS)
def test_gradients_flow_through_returned_maps(build: Any, name: str) -> None:
    model = build(attn="eager")
    acting(model, name)
    without = forward(model, BATCH, output_attentions=True)
    model.get_input_embeddings().requires_grad_(True)
    output = model(**BATCH, output_attentions=True)
    close(output.logits, without.logits)
    for weights in output.attentions:
        weights.retain_grad()
    output.logits[:, -1].square().sum().backward()
    for weights in output.attentions:
        assert weights.grad is not None
        assert weights.grad.abs().max() > 0


IN_THE_DECODER = {"vti": {"alpha_image": 0.0}}
"""What keeps a method out of the vision tower, where all that the decoder reads of an image changes."""


def rows_up_for_edits(method: Any, each: Sample, length: int) -> list[int]:
    """Rows of a left-padded prompt whose scores or weights a method declares to edit."""
    if each.pixels is None or method.prompt_rows == "none" or not (method.edits_scores or method.edits_weights):
        return []
    pad = length - len(each.ids)
    behind = pad + 1 + max(i for i, token in enumerate(each.ids) if token == IMAGE)
    return list(range({"last": length - 1, "text": behind, "all": pad}[method.prompt_rows], length))


@each_of([name for name in EDITS if not method_class(name).opens_mask])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_other_rows_than_those_declared_keep_their_bits(build: Any, name: str, kind: str) -> None:
    model, length = build(kind, attn="eager", window=16), BATCH["input_ids"].shape[1]
    stock = forward(model, BATCH, output_attentions=True).attentions
    acting(model, name, **IN_THE_DECODER.get(name, {}))
    (method,) = vlmfix.status(model).methods
    edited = forward(model, BATCH, output_attentions=True).attentions
    first = min(method.layer_indices)
    for row, each in enumerate(RAGGED):
        others = sorted({*range(length)} - {*rows_up_for_edits(method, each, length)})
        assert torch.equal(edited[first][row, :, others], stock[first][row, :, others])
        hidden = stock[first][row] == 0
        assert (edited[first][row][hidden] == 0).all(), "what a row does not see stays hidden"


def rows_a_method_changes(name: str, each: Sample) -> set[int]:
    """Rows of a prompt whose further way a method may change, by its paper."""
    image = [i for i, token in enumerate(each.ids) if token == IMAGE]
    if not image or name in ("iat", "adaiat"):  # they act on generated text
        return set()
    rows = range(len(each.ids))
    if name in ("pai", "hgai", "fia", "adaptvis", "adhh", "spin", "iri"):
        return set(rows[-1:])
    if name in ("vaf", "var", "modality_balance", "cmai"):
        return set(rows[max(image) + 1 :])
    return set(image) if name == "mma" else set(rows)


@each_of(EDITS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_keys_and_values_change_only_behind_the_edited_layer_and_in_its_rows(build: Any, name: str, side: str) -> None:
    model, inputs = build(), collate(RAGGED, side=side)
    stock = forward(model, inputs, use_cache=True).past_key_values
    layers = [1, 2] if name in ("cmai", "iri") else [2]  # which read one layer and edit the next
    acting(model, name, layers=layers, **IN_THE_DECODER.get(name, {}))
    edited = forward(model, inputs, use_cache=True).past_key_values
    changes = 0
    for number, (before, after) in enumerate(zip(stock.layers, edited.layers, strict=True)):
        changed = (before.keys != after.keys).any(-1).any(1) | (before.values != after.values).any(-1).any(1)
        for row, each in enumerate(RAGGED):
            start = 0 if side == "right" else len(changed[row]) - len(each.ids)
            found = set(changed[row, start : start + len(each.ids)].nonzero().flatten().tolist())
            assert found <= (rows_a_method_changes(name, each) if number > layers[0] else set())
            changes += len(found)
    assert bool(changes) == (name not in ("iat", "adaiat") and not method_class(name).rewrites_logits)


@each_of(EDITS + CONTRASTS)
def test_gradients_pass(tiny: Any, name: str) -> None:
    acting(tiny, name)
    with torch.enable_grad():
        loss = tiny(**ONE).logits[0, -1].logsumexp(-1)
    loss.backward()
    gradient = tiny.model.language_model.layers[0].self_attn.q_proj.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.usefixtures("fresh_dynamo")
@each_of(EDITS)
def test_compiled_decoding_equals_eager_and_compiles_its_first_step_alone(build: Any, name: str) -> None:
    """No later one, and none behind a padded prompt of the same length with its image elsewhere."""
    model, length = build(layers=2), ONE["input_ids"].shape[1]
    padded = collate([RAGGED[3]], pad_to=length)
    acting(model, name)
    graphs: list[Any] = []

    def count(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def decode(run: Any, prompt: Any) -> tuple[torch.Tensor, list[int]]:
        cache, logits, counts = StaticCache(config=model.config, max_cache_len=length + 12), [], []
        with torch.compiler.set_stance("force_eager"):
            forward(model, prompt, past_key_values=cache, use_cache=True)
        for step in range(4):
            ids, position = torch.tensor([[20 + step]]), torch.tensor([[length + step]])
            with torch.no_grad():
                out = run(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
            logits.append(out.logits.clone())
            counts.append(len(graphs))
        return torch.stack(logits), counts

    compiled = torch.compile(model, backend=count, fullgraph=True)
    counts = []
    for prompt in (ONE, padded):
        found, graphs_so_far = decode(compiled, prompt)
        close(found, decode(model, prompt)[0])
        counts += graphs_so_far
    assert 0 < counts[0] <= 2 and counts == counts[:1] * 8


@each_of(EDITS + CONTRASTS)
def test_weights_that_come_to_the_device_layer_by_layer(tiny: Any, name: str) -> None:
    method = method_from_dict({"method": name, **parameters_of(name, tiny)})
    assert_offloaded_equals_loaded(tiny, method, "patched first", 3)
