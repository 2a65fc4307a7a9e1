"""Two branches of one answer: what every decoding method of that kind keeps, and what the engine refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import available, by_name
from families.tiny_llava import RAGGED, Sample, collate, forward, generate, position_ids, sample, words
from invariants import Loop, close, continued
from method_parameters import parameters_of
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.cache_utils import DynamicLayer

import vlmfix
from vlmfix.decoding.base import contrast, cut
from vlmfix.decoding.caches import PairedCache
from vlmfix.decoding.edited import AgainstEdit
from vlmfix.methods.registry import make_method

METHODS = sorted(name for name, cls in vlmfix.list_methods().items() if getattr(cls, "uses_branch", False))
METHODS = [name for name in METHODS if name not in ("edited", "sid")]  # see test_edited
JOINED = [name for name in METHODS if not issubclass(vlmfix.list_methods()[name], AgainstEdit)]
EACH = pytest.mark.parametrize("name", METHODS)
EACH_JOINED = pytest.mark.parametrize("name", JOINED)
"""Edited branches run apart, and edit the text before an image too."""
NEEDS_CACHE = {"flb", "lqcd", "m3id"}
"""An answer cannot be told from the question without a cache, and every turn has a question of its own."""
ONE = collate([RAGGED[0]])
TEXT = collate([RAGGED[2]])
EVEN = collate([sample(3, 1, 6, seed=1), sample(3, 1, 6, seed=11)])


def patch(model: Any, name: str, **changes: Any) -> Any:
    return vlmfix.patch(model, make_method(name, {**parameters_of(name, model), **changes}))


def run_loop(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """A loop of the user's own: logits of every step ``[batch, tokens, vocab]``."""
    cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
    logits = [forward(model, inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
    for _ in range(tokens - 1):
        allowed = logits[-1].clone()
        allowed[:, model.generation_config.suppress_tokens] = -torch.inf
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        options = {"attention_mask": mask, "position_ids": position_ids(mask)[:, -1:], "past_key_values": cache}
        with torch.no_grad():
            logits.append(model(input_ids=allowed.argmax(-1)[:, None], use_cache=True, **options).logits[:, -1])
    return torch.stack(logits, dim=1)


@contextmanager
def counted(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Record (rows, tokens) of every forward of the language model."""
    seen: list[tuple[int, int]] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    handle = model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# What no parameters or no image leave as it was.


@EACH
def test_without_an_image_nothing_is_done(tiny: Any, name: str) -> None:
    stock = generate(tiny, TEXT)[1]
    patch(tiny, name)
    with counted(tiny) as seen:
        assert torch.equal(generate(tiny, TEXT)[1], stock)
    assert seen == [(1, TEXT["input_ids"].shape[1])] + [(1, 1)] * 5
    status = vlmfix.status(tiny)
    assert (status.edited, status.prompts_without_image) == ((0,), 1)


def test_without_contrast_the_cut_leaves_greedy_as_it_is(tiny: Any) -> None:
    stock = generate(tiny, ONE)
    vlmfix.patch(tiny, "vcd", alpha=0.0, beta=0.5)
    with counted(tiny) as seen:
        ids, logits = generate(tiny, ONE)
    assert torch.equal(ids, stock[0])
    kept = logits.isfinite()
    assert torch.equal(logits[kept], stock[1][kept])
    assert 0 < kept.sum() < kept.numel()
    assert {rows for rows, _ in seen} == {1}, "no second branch"


@pytest.mark.parametrize("alpha", [0.3, 1.0, 50.0])
def test_identical_branches_give_plain_logits(tiny: Any, alpha: float) -> None:
    stock = generate(tiny, ONE)[1]
    vlmfix.patch(tiny, "vcd", noise_step=0, alpha=alpha, beta=0.0)
    torch.testing.assert_close(generate(tiny, ONE)[1], stock, atol=1e-6 * (1 + alpha) * 10, rtol=1e-5)


# The contrast and the cut.


def test_the_cut() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5, -4.0], [0.0, 0.0, -9.0, -torch.inf]])
    assert torch.equal(cut(logits, logits, 0.0), logits)
    assert cut(logits, logits, 1.0).isfinite().tolist() == [[False, True, False, False], [True, True, False, False]]
    half = cut(torch.full_like(logits, 7.0), logits, 0.5)
    assert half.tolist()[0] == [-torch.inf, 7.0, 7.0, -torch.inf], "3 + ln 0.5 = 2.31"
    assert contrast(logits, logits, 3.0).tolist() == logits.tolist()


def test_no_nan_of_infinite_logits() -> None:
    inf = torch.inf
    logits, other = torch.tensor([[0.0, -inf, 1.0, -inf]]), torch.tensor([[-inf, -inf, 2.0, 3.0]])
    for alpha in (0.0, 1.0, 4.0):
        assert contrast(logits, other, alpha).tolist() == [[0.0, -inf, 1.0 - alpha, -inf]]


@EACH
def test_half_precision_is_contrasted_in_single(build: Any, name: str) -> None:
    model = build().half()
    inputs = {**ONE, "pixel_values": ONE["pixel_values"].half()}
    patch(model, name)
    logits = generate(model, inputs)[1]
    assert not logits.isnan().any()
    assert not torch.equal(logits, logits.half().float()), "the result must not have been rounded"
    out = forward(model, inputs).logits
    assert out.dtype == torch.float16


# One step is one forward; tokens both branches begin with are read once; storage is never shared.


@EACH_JOINED
def test_forwards_and_tokens_read(tiny: Any, name: str) -> None:
    length = ONE["input_ids"].shape[1]
    patch(tiny, name)
    with counted(tiny) as seen:
        generate(tiny, ONE, 4)
    (first, second), steps = seen[:2], seen[2:]
    assert first == (1, length)
    assert second[0] == 1
    other = {"guidance": length - 9, "m3id": length - 9, "lqcd": length + 3, "icd": length + 3}.get(name, length)
    shared = {"lqcd": length - 1, "icd": 4 + 9}.get(name, 4)
    assert second[1] == other - shared, "the beginning is read once"
    assert steps == [(2, 1)] * 3


@EACH_JOINED
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_returned_cache_holds_the_own_branch_and_shares_nothing(build: Any, name: str, kind: str) -> None:
    model = build(kind)
    stock = model.generate(**EVEN, max_new_tokens=4, return_dict_in_generate=True, do_sample=False)
    patch(model, name)
    forced = stock.sequences
    loop = Loop(model, EVEN)
    for token in forced[:, EVEN["input_ids"].shape[1] : -1].T:
        loop.read(input_ids=token[:, None])
    cache = loop.cache
    branch = cache._vlmfix.branch
    other = branch.pair.other()
    assert cache.get_seq_length() == stock.past_key_values.get_seq_length()
    added = cache.get_seq_length() - EVEN["input_ids"].shape[1]
    assert other.get_seq_length() == branch.valid.shape[1] + added, "both read every token"
    for mine, theirs, plain in zip(cache.layers, other.layers, stock.past_key_values.layers, strict=True):
        close(mine.keys, plain.keys)
        close(mine.values, plain.values)
        before = mine.keys.clone()
        theirs.keys.zero_()
        assert torch.equal(mine.keys, before)


def test_a_buffer_grows_and_never_writes_over_what_others_see() -> None:
    from vlmfix.decoding.caches import ROOM, GrowingLayer

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 2, 2, 3 + ROOM + 5, 4, generator=generator)
    layer, expected = GrowingLayer(), DynamicLayer()
    for each in (layer, expected):
        each.update(*states[..., :3, :])
    for place in range(3, 3 + ROOM + 5):
        found = layer.update(*states[..., place : place + 1, :])
        plain = expected.update(*states[..., place : place + 1, :])
        assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))
    seen = layer.keys
    before = seen.clone()
    layer.crop(-4)
    layer.update(*torch.zeros(2, 2, 2, 2, 4))
    assert torch.equal(seen, before)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.update(*torch.ones(2, 2, 2, 1, 4))[0][0, :, :-1], layer.keys[0, :, :-1])
    assert torch.equal(layer.keys[1, :, : ROOM + 4], before[0, :, : ROOM + 4])
    start = torch.zeros(2, 2, 1, 4, requires_grad=True)
    keys, _ = layer.update(start, start)
    keys.sum().backward()
    assert start.grad is not None


# Ways to decode.


@EACH
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_with_and_without_a_cache(build: Any, name: str, kind: str) -> None:
    model = build(kind)
    patch(model, name)
    inputs = collate(RAGGED)
    if name in NEEDS_CACHE:
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="Leave use_cache on"):
            generate(model, inputs, 5, use_cache=False)
        return
    close(generate(model, inputs, 5)[1], generate(model, inputs, 5, use_cache=False)[1])


@EACH
def test_a_loop_of_the_users_own(tiny: Any, name: str) -> None:
    patch(tiny, name)
    close(run_loop(tiny, collate(RAGGED), 5), generate(tiny, collate(RAGGED), 5)[1])


@EACH
def test_a_bare_forward_replaces_the_last_row_only(tiny: Any, name: str) -> None:
    inputs = collate(RAGGED)
    stock = forward(tiny, inputs).logits
    patch(tiny, name)
    found = forward(tiny, inputs).logits
    assert torch.equal(found[:, :-1], stock[:, :-1])
    close(found[:, -1], generate(tiny, inputs, 1)[1][:, 0])
    right = collate(RAGGED, side="right")
    ends = right["attention_mask"].sum(1) - 1
    close(forward(tiny, right).logits[range(4), ends], found[:, -1])
    with torch.no_grad():
        as_tuple = tiny(**inputs, position_ids=position_ids(inputs["attention_mask"]), return_dict=False)
    close(as_tuple[0], found)


@EACH
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_beams_of_a_batch_equal_those_alone_and_without_cache(build: Any, name: str, kind: str) -> None:
    model = build(kind)
    stock = beams(model, collate(RAGGED[:2]))[0]
    patch(model, name)
    together = beams(model, collate(RAGGED[:2]))
    assert not torch.equal(together[0], stock)
    for row, each in enumerate(RAGGED[:2]):
        alone = beams(model, collate([each]))
        assert torch.equal(together[0][row], alone[0][0])
        close(together[1][row], alone[1][0])
    if name not in NEEDS_CACHE:
        without = beams(model, collate(RAGGED[:2]), use_cache=False)
        assert torch.equal(together[0], without[0])
        close(together[1], without[1])


def beams(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "return_dict_in_generate": True, **options}
    out = model.generate(**inputs, **options, output_scores=True)
    return out.sequences[:, -6:], out.sequences_scores


@EACH
def test_sampling_draws_from_the_contrast(tiny: Any, name: str) -> None:
    """Drawn by hand from a bare loop's logits, with the same random numbers."""
    patch(tiny, name)
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "num_return_sequences": 3}
    torch.manual_seed(5)
    found = tiny.generate(**ONE, **options)[:, -4:]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    inputs = {key: value.repeat_interleave(3, 0) for key, value in ONE.items()}
    loop, drawn = Loop(tiny, inputs), []
    logits = loop.logits[:, -1]
    for _ in range(4):
        logits[:, tiny.generation_config.suppress_tokens] = -torch.inf
        drawn.append(torch.multinomial(logits.softmax(-1), 1))
        logits = loop.read(input_ids=drawn[-1])[:, -1].clone()
    assert torch.equal(torch.cat(drawn, 1), found)
    assert torch.equal(torch.get_rng_state(), state), "nothing else is drawn from the global generator"


class Recorder(LogitsProcessor):
    """Bans a token and records what it was given."""

    def __init__(self, banned: int) -> None:
        self.banned, self.seen = banned, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        scores[:, self.banned] = -torch.inf
        return scores


@EACH
def test_logits_processors_see_the_contrast_once_per_token(tiny: Any, name: str) -> None:
    patch(tiny, name)
    plain_ids, plain = generate(tiny, ONE, 4)
    recorder = Recorder(int(plain_ids[0, -4]))
    ids, _ = generate(tiny, ONE, 4, logits_processor=LogitsProcessorList([recorder]))
    assert len(recorder.seen) == 4
    allowed = [token for token in range(64) if token not in tiny.generation_config.suppress_tokens]
    close(recorder.seen[0][:, allowed], plain[:, 0, allowed])
    assert recorder.banned not in ids[0, -4:].tolist()


@EACH
def test_a_further_turn_continues_both_branches(tiny: Any, name: str) -> None:
    """A question, its answer and another question equal the whole conversation as one prompt."""
    if name in NEEDS_CACHE:
        pytest.skip("every turn begins anew")
    patch(tiny, name)
    first, answer, question = RAGGED[0], words(3, seed=31), words(4, seed=32)
    loop = Loop(tiny, collate([first]))
    loop.steps(*answer)
    found = [loop.read(*question)[0, -1], loop.read(20)[0, -1]]
    ids = (*first.ids, *answer, *question)
    for ending, each in zip(((), (20,)), found, strict=True):
        close(each, forward(tiny, collate([Sample((*ids, *ending), first.pixels)])).logits[0, -1])


@EACH_JOINED
def test_an_image_in_a_later_turn(tiny: Any, name: str) -> None:
    if name in NEEDS_CACHE:
        pytest.skip("every turn begins anew")
    patch(tiny, name)
    later = sample(2, 1, 4, seed=6)
    loop = Loop(tiny, TEXT)
    loop.read(20)
    found = loop.read(*later.ids, pixel_values=later.pixels)[0, -1]
    step = loop.read(21)[0, -1]
    ids = (*RAGGED[2].ids, 20, *later.ids)
    close(found, forward(tiny, collate([Sample(ids, later.pixels)])).logits[0, -1])
    close(step, forward(tiny, collate([Sample((*ids, 21), later.pixels)])).logits[0, -1])


@EACH
def test_a_cropped_and_a_copied_cache(tiny: Any, name: str) -> None:
    patch(tiny, name)
    loop = Loop(tiny, ONE)
    expected = loop.copied().steps(20, 21)[:, 1:]
    loop.steps(20, 30, 31)
    loop.cache.crop(-2)
    close(loop.read(21), expected)
    loop.cache.crop(-6)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="cropped into its prompt"):
        loop.read(21)


# With attention methods: they act in the model's own branch.


@EACH_JOINED
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_attention_methods_act_in_the_own_branch_only(build: Any, name: str, kind: str) -> None:
    model = build(kind)
    method = make_method(name, parameters_of(name, model))
    pai = vlmfix.PAI(alpha=0.8, layers=":")
    for inputs in (collate(RAGGED), ONE):
        forced = generate(model, inputs, 3)[0]
        found = []
        for chosen in ([method], [pai], None, [pai, method]):
            vlmfix.unpatch(model) if chosen is None else vlmfix.patch(model, chosen)
            found.append(continued(model, inputs, forced[:, -3:, None].unbind(1))[-1].logits[:, -1])
        contrasted, boosted, plain, both = found
        if name == "lqcd":
            continue  # linear in neither alone: see test_decoding_lqcd
        strength = {"guidance": 0.5, "m3id": math.expm1(0.1 * 4)}.get(name, 1.0)
        # plain + a (plain - other) = contrasted gives other; boosted + a (boosted - other) must be both.
        other = plain - (contrasted - plain) / strength
        rows = [row for row in range(len(plain)) if inputs is ONE or RAGGED[row].pixels is not None]
        torch.testing.assert_close(both[rows], (boosted + strength * (boosted - other))[rows], atol=1e-4, rtol=1e-4)
        assert (both - contrasted)[rows].abs().max() > 0.01
        vlmfix.unpatch(model)


@EACH_JOINED
@pytest.mark.parametrize("company", [[], ["pai"], ["act", "vhr"]], ids=["alone", "pai", "act+vhr"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_one_forward_for_both_branches_equals_two(
    build: Any, name: str, kind: str, company: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one branch is longer, with padding on its left, and once a window of 24 has left it."""
    model = build(kind, window=24) if kind == "mistral" else build(kind)
    methods = [make_method(each, parameters_of(each, model)) for each in (*company, name)]
    for inputs in (ONE, collate(RAGGED)):
        vlmfix.patch(model, methods)
        with counted(model) as seen:
            joined = generate(model, inputs, 14)[1]
        assert max(rows for rows, tokens in seen if tokens == 1) == 2 * len(inputs["input_ids"])
        with monkeypatch.context() as context:
            context.setattr(PairedCache, "fits", lambda own, other: False)
            apart = generate(model, inputs, 14)[1]
        close(joined, apart)


@pytest.mark.parametrize("window", [64, 27])
@pytest.mark.parametrize("other", ["pai", "vhr", "var", "act"])
def test_joined_steps_equal_steps_apart(build: Any, other: str, window: int, monkeypatch: Any) -> None:
    """Also where the model's own branch is the shorter one, and its padding lies within a sliding window."""
    model = build("mistral", sinks=True, window=window)
    methods = [make_method(each, {**parameters_of(each, model), **more}) for each, more in
               ((other, {"layers": ":"}), ("lqcd", {}))]  # fmt: skip
    vlmfix.patch(model, methods)
    joined = generate(model, collate(RAGGED), 8)[1]
    monkeypatch.setattr("vlmfix.decoding.caches.PairedCache.fits", staticmethod(lambda own, other: False))
    close(joined, generate(model, collate(RAGGED), 8)[1])


@EACH_JOINED
@pytest.mark.parametrize("are_joined", [True, False], ids=["joined", "apart"])
def test_a_step_waits_no_more_for_the_device_than_its_forwards(
    tiny: Any, name: str, are_joined: bool, monkeypatch: Any
) -> None:
    if not are_joined:
        monkeypatch.setattr("vlmfix.decoding.caches.PairedCache.fits", staticmethod(lambda own, other: False))
    stock = waits_of_a_step(tiny)
    patch(tiny, name)
    assert waits_of_a_step(tiny) <= stock * (1 if are_joined else 2)


def waits_of_a_step(model: Any) -> int:
    """How often a decode step asks for the value of a tensor."""
    inputs, cache = collate(RAGGED), DynamicCache(config=model.config)
    forward(model, inputs, past_key_values=cache, use_cache=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 1, dtype=torch.int64)], dim=1)
    waits: list[str] = []
    asked: list[Any] = []

    def count(name: str) -> Any:
        stock = getattr(torch.Tensor, name)

        def value(self: Any) -> Any:
            if any(self is each for each in asked):  # a mode for functions of torch calls this a second time
                return stock(self)
            waits.append(name)
            asked.append(self)
            try:
                return stock(self)
            finally:
                asked.pop()

        return value

    options = {"attention_mask": mask, "position_ids": position_ids(mask)[:, -1:], "past_key_values": cache}
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        for each in ("__bool__", "__int__", "__float__", "item", "tolist"):
            patched.setattr(torch.Tensor, each, count(each))
        model(input_ids=torch.full((4, 1), 20), use_cache=True, **options)
    return len(waits)


@EACH
@pytest.mark.parametrize("by_config", [True, False], ids=["config", "argument"])
def test_watched_states_are_those_of_the_own_branch(build: Any, name: str, by_config: bool) -> None:
    model = build()
    model.set_attn_implementation("eager")
    patch(model, name)
    expected = generate(model, EVEN, 3)[1]
    watched = {"output_hidden_states": True, "output_attentions": True}
    if by_config:
        for config in (model.config, model.config.text_config):
            for each in watched:
                setattr(config, each, True)
    cache, options = DynamicCache(config=model.config), {} if by_config else watched
    forward(model, EVEN, past_key_values=cache, use_cache=True)
    with torch.no_grad():
        out = model(input_ids=expected[:, 0].argmax(-1)[:, None], past_key_values=cache, use_cache=True, **options)
    assert {each.shape[0] for each in (*out.hidden_states, *out.attentions)} == {2}
    assert cache.get_seq_length() == EVEN["input_ids"].shape[1] + 1


# Families.


@pytest.mark.parametrize("name", [*METHODS, "flb"])
@pytest.mark.parametrize(
    "family", ["llava_next", "qwen2_vl", "gemma3", "mllama", "qwen3_5", "paligemma", "minicpmv4_6", "phi4_multimodal"]
)
def test_other_families(name: str, family: str) -> None:
    """Crops, patch lists with positions in three dimensions, images seen both ways, caches that cannot be joined."""
    found = available(family)
    model = found.build()
    single = found.collate([found.single()])
    stock = generate(model, single, 4)[1]
    if (name, family) == ("ibd", "mllama"):
        with pytest.raises(vlmfix.MethodError, match=r"ibd \(image_bias\) does not act in Mllama"):
            patch(model, name)
        return
    patch(model, name)
    _, logits = generate(model, single, 4)
    assert (logits - stock).abs().max() > 1e-3
    if name not in NEEDS_CACHE:
        close(logits, generate(model, single, 4, use_cache=False)[1])
    samples = [found.sample(seed=1), found.sample(after=8, seed=2)]
    together = generate(model, found.collate(samples), 4)[1]
    for row, each in enumerate(samples):
        close(together[row], generate(model, found.collate([each]), 4)[1][0])
    vlmfix.unpatch(model)
    assert torch.equal(generate(model, single, 4)[1], stock)


@EACH
@pytest.mark.parametrize("family", ["qwen3_5", "gemma3", "qwen2_vl"])
def test_beams_and_draws_in_other_families(name: str, family: str) -> None:
    """Prompts repeated for their beams, whatever the layers of the cache hold."""
    found = available(family)
    model = found.build()
    patch(model, name)
    samples = [found.sample(seed=1), found.sample(after=8, seed=2)]
    together = beams(model, found.collate(samples), max_new_tokens=4)
    for row, each in enumerate(samples):
        alone = beams(model, found.collate([each]), max_new_tokens=4)
        assert torch.equal(together[0][row][-4:], alone[0][0][-4:])
        close(together[1][row], alone[1][0])
    options = {"max_new_tokens": 3, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    drawn = model.generate(**found.collate(samples), **options)[:, -3:]
    greedy = generate(model, found.collate(samples), 3)[0][:, -3:]
    assert torch.equal(drawn, greedy.repeat_interleave(3, 0))


# Refusals.


def test_two_decoding_methods_are_refused(tiny: Any) -> None:
    with pytest.raises(vlmfix.MethodError, match="both decide on the next token"):
        vlmfix.patch(tiny, ["vcd", METHODS[0] if METHODS[0] != "vcd" else METHODS[1]])


def test_layers_are_refused() -> None:
    with pytest.raises(vlmfix.MethodError, match="not in layers"):
        vlmfix.VCD(layers=":")
    assert "layers" not in vlmfix.VCD().to_dict()


@EACH
def test_assisted_decoding_is_refused(tiny: Any, name: str) -> None:
    patch(tiny, name)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="contrasts the next one only"):
        tiny.generate(**ONE, max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="several"):
        tiny(**ONE, logits_to_keep=3, use_cache=True)


@EACH
def test_static_caches_losses_and_chunks_are_refused(tiny: Any, name: str) -> None:
    patch(tiny, name)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="static cache"):
        tiny.generate(**ONE, max_new_tokens=4, cache_implementation="static")
    cache = StaticCache(config=tiny.config, max_cache_len=64)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="static cache"):
        forward(tiny, ONE, past_key_values=cache)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="no loss"):
        tiny(**ONE, labels=ONE["input_ids"])
    loop, ids = Loop(tiny), ONE["input_ids"]
    loop.read(input_ids=ids[:, :-2], pixel_values=ONE["pixel_values"])
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="one forward"):
        loop.read(input_ids=ids[:, -2:])


@EACH
@pytest.mark.parametrize("family", ["florence2", "blip2_opt"])
def test_models_that_read_the_prompt_elsewhere_are_refused(name: str, family: str) -> None:
    model = by_name(family).build()
    with pytest.raises(vlmfix.MethodError, match="no second branch"):
        patch(model, name)
    assert vlmfix.status(model) is None


def test_another_number_of_rows_is_refused(tiny: Any) -> None:
    vlmfix.patch(tiny, "vcd")
    loop = Loop(tiny, ONE)
    loop.cache.batch_repeat_interleave(2)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="batch of 1"):
        loop.read(input_ids=torch.tensor([[20], [21]]))


def test_images_only_as_features_are_refused(tiny: Any) -> None:
    if not hasattr(tiny, "_prepare_multimodal_encoder_kwargs_for_generation"):
        pytest.skip("this transformers takes no features")
    encoded = tiny._prepare_multimodal_encoder_kwargs_for_generation({"pixel_values": ONE["pixel_values"]})
    vlmfix.patch(tiny, "vcd")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="needs the image itself"):
        tiny(input_ids=ONE["input_ids"], mm_encoder_outputs=encoded["mm_encoder_outputs"])


# The noise of VCD.


def test_the_noise_does_not_depend_on_the_batch_or_on_the_global_generator(tiny: Any) -> None:
    vlmfix.patch(tiny, "vcd", beta=0.0)
    torch.manual_seed(1)
    forwards = generate(tiny, collate([RAGGED[0], RAGGED[3]]))[1]
    torch.manual_seed(2)
    backwards = generate(tiny, collate([RAGGED[3], RAGGED[0]]))[1]
    close(forwards, backwards.flip(0))
    vlmfix.patch(tiny, "vcd", beta=0.0, seed=1)
    assert (generate(tiny, collate([RAGGED[0], RAGGED[3]]))[1] - forwards).abs().max() > 0.05


def test_the_schedule_of_the_noise() -> None:
    """Weights of signal and noise, as published with the method's code."""
    from vlmfix.decoding.vcd import signal_left

    for step, signal, noise in ((100, 0.998, 0.058), (300, 0.981, 0.194), (500, 0.863, 0.505), (999, 0.285, 0.958)):
        assert signal_left(step) ** 0.5 == pytest.approx(signal, abs=6e-4)
        assert (1 - signal_left(step)) ** 0.5 == pytest.approx(noise, abs=6e-4)


def test_patches_of_several_images_get_the_noise_of_each_alone() -> None:
    method = vlmfix.VCD()
    patches = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    found = method.other_images("pixel_values", patches, [4, 6])
    close(found[:4], method.other_images("pixel_values", patches[:4], [4]))
    close(found[4:], method.other_images("pixel_values", patches[4:], [6]))
    crops = torch.randn(2, 3, 3, 8, 8)
    assert torch.equal(
        method.other_images("pixel_values", crops, None)[1, :2], method.other_images("p", crops[1:, :2], None)[0]
    )
