"""OPERA: the penalty, the look-ahead, the way back, and plain beams where there is nothing to penalise."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from families import available, by_name
from families.tiny_llava import IMAGE, PAD, RAGGED, collate, sample
from naive.opera import NaiveOpera
from transformers import LogitsProcessor, LogitsProcessorList

import vlmfix
from vlmfix.decoding import opera, opera_search
from vlmfix.decoding.opera import above_least

ONE = collate([RAGGED[0]])
TEXT = collate([RAGGED[2]])


def search(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 8, **options: Any) -> tuple[torch.Tensor, Any]:
    """Ids of the best beam, and its score."""
    options = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, **options}
    out = model.generate(**inputs, **options, output_scores=True)
    return out.sequences[0, inputs["input_ids"].shape[1] :], out.sequences_scores


# Against the formula, step by step.


@pytest.mark.parametrize("mode", ["official", "paper"])
@pytest.mark.parametrize(("kind", "sigma"), [("llama", 50.0), ("mistral", 4.0)])
def test_it_agrees_with_the_formula(build: Any, kind: str, mode: str, sigma: float) -> None:
    """Beyond the first 10 tokens, where the penalty begins; no way back."""
    model = build(kind)
    each = sample(3, 1, 6, seed=1)
    naive = NaiveOpera(mode=mode, sigma=sigma, threshold=math.inf, candidates=4)
    ids, score, _ = naive.search(model, each.ids, each.pixels, 13, [PAD, IMAGE])
    options = {"mode": mode, "scale_factor": sigma, "threshold": None, "num_beams": 3, "num_attn_candidates": 4}
    vlmfix.patch(model, "opera", **options)
    found, scores = search(model, collate([each]), 13)
    assert found.tolist() == ids
    assert float(scores[0]) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("mode", ["official", "paper"])
def test_the_way_back_agrees_with_the_formula(tiny: Any, mode: str, monkeypatch: Any) -> None:
    """With the released code's first 10 tokens made 2, so that few tokens are enough."""
    monkeypatch.setattr(opera, "FIRST", 2)
    went = []
    original = opera_search.Search._return_to

    def watched(self: Any, position: int) -> None:
        before = self.steps[position]
        peaks, taken = before.peaks.clone(), (*before.rejected, *before.chosen)
        went.append(position)
        original(self, position)
        step = self.steps[-1]
        assert len(self.steps) == position + 1 and step.beams.num_generated == position
        assert torch.equal(step.peaks, peaks), "what was recorded there is kept"
        assert step.rejected == taken
        fresh = self._prompt_of_beams()  # the state of a fresh run with that answer
        sums = torch.zeros(len(step.beams.ids), 0)
        for end in range(1, position + 1):
            look = self._forward(step.beams.ids[:, : self.prompt_length + end], fresh)
            sums = self.method.columns(look.to_answer, sums)
        torch.testing.assert_close(self.logits, look.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(step.sums, sums, atol=1e-4, rtol=1e-4)
        for mine, other in zip(self.cache.layers, fresh.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys, atol=1e-5, rtol=1e-5)

    monkeypatch.setattr(opera_search.Search, "_return_to", watched)
    returns = again = 0
    for seed in range(1, 7):
        beams = 2 + seed % 2
        each = sample(3, 1, 6, seed=seed)
        naive = NaiveOpera(mode=mode, threshold=1, candidates=2, beams=beams, sigma=10.0, first=2)
        ids, score, times = naive.search(tiny, each.ids, each.pixels, 9, [PAD, IMAGE])
        options = {"mode": mode, "threshold": 1, "num_beams": beams, "num_attn_candidates": 2, "scale_factor": 10.0}
        vlmfix.patch(tiny, "opera", **options)
        went.clear()
        found, scores = search(tiny, collate([each]), 9)
        assert found.tolist() == ids
        assert float(scores[0]) == pytest.approx(score, abs=1e-4)
        assert len(went) == times
        assert all(went.count(position) <= 2 for position in went)
        returns += times
        again += len(went) - len(set(went))
        vlmfix.unpatch(tiny)
    assert returns > again > 0, "the way back must have been taken, and to one place twice"


def test_three_hits_in_a_row_make_a_knot() -> None:
    """Written out: the place recorded where a search went back to counts again there."""
    official, paper = vlmfix.OPERA(threshold=2), vlmfix.OPERA(threshold=3, mode="paper")
    hit, other = [11, 11], [11, 12]
    for method in (official, paper):
        assert not method.is_knot(torch.tensor([[3, 3], hit, hit]), 11, 0)
        assert method.is_knot(torch.tensor([[3, 3], hit, hit, hit]), 11, 0)
        assert not method.is_knot(torch.tensor([hit, hit, hit, other][1:]), 11, 0), "every beam must be stuck"
    assert not official.is_knot(torch.tensor([[9, 9]] * 4), 9, 0), "not among the first 10 tokens"
    assert paper.is_knot(torch.tensor([[9, 9]] * 4), 9, 9)
    assert not paper.is_knot(torch.tensor([[9, 9]] * 4), 9, 11), "never back before an earlier such place"
    assert not vlmfix.OPERA(threshold=None).is_knot(torch.tensor([hit] * 40), 11, 0)


def test_a_rejected_token_is_as_likely_as_the_least_likely_of_its_beam() -> None:
    logits = torch.tensor([[4.0, 1.0, 2.0, -3.0], [0.0, 9.0, -70.0, 2.0]])
    official = vlmfix.OPERA().choose_again(logits, [(0, 0), (1, 1), (0, 2)])
    expected = torch.tensor([[-3.0, 1.0, -3.0, -3.0], [0.0, -70.0, -70.0, 2.0]]).log_softmax(-1)
    torch.testing.assert_close(official, expected)
    paper = vlmfix.OPERA(mode="paper").choose_again(logits, [(0, 0), (1, 1), (0, 2)])
    assert paper.isinf().tolist() == [[True, False, True, False], [False, True, False, False]]
    torch.testing.assert_close(paper.exp().sum(-1), torch.ones(2))


def test_short_answers_never_go_back(tiny: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(opera_search.Search, "_return_to", lambda *_: pytest.fail("went back"))
    vlmfix.patch(tiny, "opera", threshold=1, num_beams=2, num_attn_candidates=2)
    search(tiny, ONE, 10)


# Plain beam search.


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_without_a_penalty_it_is_beam_search(tiny: Any, early_stopping: Any, length_penalty: float) -> None:
    for ends in (10**6, [5, 17, 33, 58]):
        options = {"eos_token_id": ends, "length_penalty": length_penalty, "early_stopping": early_stopping}
        inputs = collate([sample(3, 1, 6, seed=1)])
        ids, score = search(tiny, inputs, 6, num_beams=3, **options)
        free = {"penalty_weights": 0.0, "threshold": None, "num_attn_candidates": 15}
        vlmfix.patch(tiny, "opera", mode="paper", num_beams=3, **free)
        found, scores = search(tiny, inputs, 6, **options)
        vlmfix.unpatch(tiny)
        assert found.tolist() == ids.tolist()
        torch.testing.assert_close(scores, score, atol=1e-5, rtol=1e-5)


def test_without_an_image_it_is_beam_search_to_the_bit(tiny: Any) -> None:
    ids, score = search(tiny, TEXT, num_beams=5)
    vlmfix.patch(tiny, "opera")
    found, scores = search(tiny, TEXT)
    assert torch.equal(found, ids)
    assert torch.equal(scores, score)
    assert vlmfix.status(tiny).edited == (0,)


def test_it_acts_and_goes(tiny: Any) -> None:
    stock = search(tiny, ONE, 14, num_beams=5)
    own = type(tiny).generate
    vlmfix.patch(tiny, "opera")
    found = search(tiny, ONE, 14)
    assert found[0].tolist() != stock[0].tolist()
    status = vlmfix.status(tiny)
    assert (status.prompts, status.decode_steps, status.edited) == (1, 13, (14 * 5 * 5,))
    twin = copy.deepcopy(tiny)
    vlmfix.unpatch(tiny)
    assert tiny.generate.__func__ is own
    assert torch.equal(search(tiny, ONE, 14, num_beams=5)[0], stock[0])
    assert torch.equal(search(twin, ONE, 14)[0], found[0])
    assert twin.generate is not own


# The penalty.


def test_a_constant_changes_nothing_and_one_candidate_has_no_penalty() -> None:
    method = vlmfix.OPERA()
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    candidates = logits.topk(5).indices
    peaks = torch.linspace(10, 20, 10).view(2, 5)
    looks = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))

    def of_candidates(looks: torch.Tensor, length: int) -> torch.Tensor:
        return method.penalise(logits, candidates, peaks, looks, length).gather(1, candidates)

    torch.testing.assert_close(of_candidates(looks + 3, 10), of_candidates(looks, 10))
    assert not torch.allclose(of_candidates(looks, 11), of_candidates(looks, 10))
    alone = method.penalise(logits, candidates[:, :1], peaks[:, :1], looks[:, :1], 11)
    assert alone.gather(1, candidates[:, :1]).tolist() == [[0.0], [0.0]]


def test_the_ranking_is_the_released_one_where_that_does_not_overflow() -> None:
    generator = torch.Generator().manual_seed(3)
    method = vlmfix.OPERA()
    for _ in range(50):
        logits = torch.randn(1, 30, generator=generator) * 3
        candidates = logits.topk(5).indices
        phi = torch.rand(1, 5, generator=generator, dtype=torch.float64) * 4e7  # penalties up to 4
        scored = method.penalise(logits, candidates, phi.log().float(), torch.zeros(1, 5), 12)
        released = logits.gather(1, candidates) - 1e-7 * phi
        assert torch.equal(scored.gather(1, candidates).argsort(), released.argsort())
        assert (
            scored.argsort(descending=True)[0, :5].tolist()
            == candidates[0, released[0].argsort(descending=True)].tolist()
        )


def test_penalties_never_overflow() -> None:
    """Columns of 512 rows at 10 per row: e^1179."""
    peaks = torch.tensor([[1179.0, 1178.0, 1179.5, -torch.inf, 3.0], [-torch.inf] * 5])
    found = above_least(peaks, math.log(1e-7))
    assert found.tolist()[1] == [0.0] * 5
    assert found[0].tolist() == pytest.approx([100.0, 100.0, 100.0, 0.0, 1e-7 * math.exp(3)])
    close = above_least(torch.tensor([[20.0, 20.5]]), math.log(1e-7))
    assert close.tolist()[0] == pytest.approx([0.0, 1e-7 * (math.exp(20.5) - math.exp(20))])


def test_running_sums_are_the_products_of_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    for sigma in (50.0, 0.5):
        method = vlmfix.OPERA(scale_factor=sigma)
        rows = torch.rand(40, 40, generator=generator, dtype=torch.float64).tril()
        sums = torch.zeros(1, 0)
        for i in range(40):
            sums = method.columns(rows[i : i + 1, : i + 1].float(), sums)
        expected = [sum(math.log(sigma * float(rows[i, j])) for i in range(j, 40)) for j in range(40)]
        torch.testing.assert_close(sums[0].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-3, rtol=1e-4)


def test_half_precision_for_long(build: Any) -> None:
    model = build().half()
    inputs = {**ONE, "pixel_values": ONE["pixel_values"].half()}
    vlmfix.patch(model, "opera", scale_factor=1e4, num_beams=2, num_attn_candidates=2)
    found, scores = search(model, inputs, 60)
    assert scores.isfinite().all()
    assert PAD not in found.tolist()


# The look-ahead, and the row it reads.


def test_the_look_ahead_leaves_the_cache(tiny: Any, monkeypatch: Any) -> None:
    original = opera_search.Search._look_ahead

    def watched(self: Any, step: Any, candidates: Any) -> Any:
        before = [(layer.keys.clone(), layer.values.clone()) for layer in self.cache.layers]
        found = original(self, step, candidates)
        for layer, (keys, values) in zip(self.cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
        return found

    monkeypatch.setattr(opera_search.Search, "_look_ahead", watched)
    vlmfix.patch(tiny, "opera")
    search(tiny, ONE, 3)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_row_read_is_that_of_eager_attention(build: Any, kind: str, monkeypatch: Any) -> None:
    model = build(kind, attn="eager")
    seen = []
    original = opera_search.Search._forward

    def watched(self: Any, ids: Any, cache: Any) -> Any:
        look = original(self, ids, cache)
        seen.append((ids, torch.cat([look.to_prompt, look.to_answer], dim=1)))
        return look

    monkeypatch.setattr(opera_search.Search, "_forward", watched)
    vlmfix.patch(model, "opera", num_beams=2)
    search(model, ONE, 2)
    vlmfix.unpatch(model)
    for ids, found in zip(*seen[0], strict=True):
        with torch.no_grad():
            out = model(input_ids=ids[None], pixel_values=ONE["pixel_values"], output_attentions=True)
        expected = out.attentions[-1][0, :, -1].amax(0)
        torch.testing.assert_close(found, expected / expected.sum(), atol=1e-5, rtol=1e-5)
        assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_models_own_number_of_beams_counts(tiny: Any) -> None:
    vlmfix.patch(tiny, "opera", num_beams=5)
    wanted, other = search(tiny, ONE, 14, num_beams=2), search(tiny, ONE, 14)
    tiny.generation_config.num_beams = 2
    found = search(tiny, ONE, 14)
    assert torch.equal(found[1], wanted[1]) and not torch.equal(found[1], other[1])


def test_one_beam_is_no_wish(tiny: Any) -> None:
    """What callers pass by habit: the method's own number counts."""
    vlmfix.patch(tiny, "opera", num_beams=3)
    wanted = search(tiny, ONE, 14)[1]
    assert torch.equal(search(tiny, ONE, 14, num_beams=1)[1], wanted)
    assert not torch.equal(search(tiny, ONE, 14, num_beams=5)[1], wanted)
    assert torch.equal(search(tiny, TEXT, num_beams=1)[1], search(tiny, TEXT, num_beams=3)[1])


def test_a_placeholder_without_a_picture_is_text(tiny: Any) -> None:
    inputs = {name: ONE[name] for name in ("input_ids", "attention_mask")}
    expected = search(tiny, inputs, 4, num_beams=5)
    vlmfix.patch(tiny, "opera")
    assert torch.equal(search(tiny, inputs, 4)[1], expected[1])


def test_a_generate_of_somebody_else_stays_and_is_no_place_for_opera(tiny: Any) -> None:
    """A model folder may bring a generate of its own, which transformers keeps on the model."""

    def custom_generate(*, model: Any, **options: Any) -> Any:
        return type(model).generate(model, **{**options, "max_new_tokens": 2})

    tiny.generate = theirs = partial(custom_generate, model=tiny)
    with pytest.raises(vlmfix.MethodError, match="custom_generate"):
        vlmfix.patch(tiny, "opera")
    assert vlmfix.status(tiny) is None and tiny.generate is theirs
    for name in ("pai", "vcd"):
        vlmfix.patch(tiny, name)
        assert len(tiny.generate(**ONE, do_sample=False)[0]) == len(ONE["input_ids"][0]) + 2
        vlmfix.unpatch(tiny)
        assert tiny.generate is theirs
    del tiny.generate
    vlmfix.patch(tiny, "opera")
    tiny.generate = theirs  # put there after the patch
    vlmfix.unpatch(tiny)
    assert tiny.generate is theirs


def test_padding_changes_nothing(tiny: Any) -> None:
    vlmfix.patch(tiny, "opera")
    ids, score = search(tiny, ONE, 14)
    found, scores = search(tiny, collate([RAGGED[0]], pad_to=30), 14)
    assert torch.equal(found, ids)
    torch.testing.assert_close(scores, score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "gemma3", "paligemma"])
def test_other_families(name: str) -> None:
    family = available(name)
    model = family.build()
    inputs = family.collate([family.single()])
    ids, score = search(model, inputs, 4, num_beams=3)
    vlmfix.patch(model, "opera", mode="paper", penalty_weights=0.0, threshold=None, num_attn_candidates=40, num_beams=3)
    found, scores = search(model, inputs, 4)
    assert torch.equal(found, ids)
    torch.testing.assert_close(scores, score, atol=1e-5, rtol=1e-5)
    vlmfix.patch(model, "opera", num_beams=3, penalty_weights=20.0)
    assert (search(model, inputs, 4)[1] - score).abs().max() > 1e-3


def test_logits_processors_and_stopping_criteria(tiny: Any) -> None:
    class Ban(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, banned] = -torch.inf
            return scores

    vlmfix.patch(tiny, "opera")
    banned = int(search(tiny, ONE)[0][0])
    assert banned not in search(tiny, ONE, logits_processor=LogitsProcessorList([Ban()]))[0].tolist()
    first = search(tiny, ONE)[0].tolist()
    stopped = search(tiny, ONE, 30, max_time=0.0)[0]
    assert len(stopped) == 1
    plain = tiny.generate(**ONE, max_new_tokens=8, do_sample=False)
    assert plain[0, -8:].tolist() == first


# Refusals.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_sample": True}, "draws nothing"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "keeps no steps"),
        ({"cache_implementation": "static"}, "only grow"),
        ({"prefill_chunk_size": 4}, "one forward"),
        ({"use_cache": False}, "use_cache"),
        ({"stop_strings": ["."]}, "StopStringCriteria"),
    ],
)
def test_what_it_refuses(tiny: Any, options: dict[str, Any], reason: str) -> None:
    vlmfix.patch(tiny, "opera")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=reason):
        tiny.generate(**ONE, max_new_tokens=4, **{"do_sample": False, **options})


def test_batches_company_and_other_models_are_refused(tiny: Any) -> None:
    vlmfix.patch(tiny, "opera")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="one prompt at a time"):
        tiny.generate(**collate(RAGGED[:2]), max_new_tokens=4)
    with pytest.raises(vlmfix.MethodError, match="Choose it alone"):
        vlmfix.patch(tiny, ["opera", "pai"])
    with pytest.raises(vlmfix.MethodError, match="one layer"):
        vlmfix.patch(tiny, "opera", layers=":")
    for name in ("florence2", "mllama", "blip2_opt"):
        with pytest.raises(vlmfix.MethodError, match="does not act"):
            vlmfix.patch(by_name(name).build(), "opera")


@pytest.mark.parametrize(
    "wrong",
    [{"num_beams": 1}, {"threshold": 0}, {"num_attn_candidates": 0}, {"scale_factor": 0.0}, {"mode": "x"},
     {"penalty_weights": -1.0}],
)  # fmt: skip
def test_wrong_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(vlmfix.MethodError, match=next(iter(wrong))):
        vlmfix.OPERA(**wrong)
