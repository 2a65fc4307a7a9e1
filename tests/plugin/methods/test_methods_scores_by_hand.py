"""HGAI, VAF, AdaptVis and modality balance: what they do to scores, by hand, and how they choose."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, RAGGED, collate, forward, generate, sample
from invariants import Loop, close
from transformers import DynamicCache

import vlmfix
from vlmfix.methods.adaptvis import AdaptVis
from vlmfix.methods.cmai import CMAI
from vlmfix.methods.hgai import HGAI
from vlmfix.methods.modality_balance import ModalityBalance
from vlmfix.methods.registry import method_from_dict
from vlmfix.methods.vaf import VAF

ONE = collate([RAGGED[1]])


def balance(**options: Any) -> ModalityBalance:
    return ModalityBalance(experimental=True, **options)


def cmai(**options: Any) -> CMAI:
    return CMAI(experimental=True, **options)


# Scores by hand.


class HandMade:
    """What a score method sees of a layer: image and prefix keys, and what was learned."""

    def __init__(self, image: list[int], prefix: list[int] = (), keys: int = 6, **known: Any) -> None:
        self.columns = {"image": image, "prefix": prefix}
        self.num_keys = keys
        self.learned = known.pop("learned", None)
        self.shared = known.pop("shared", None)
        self.site = SimpleNamespace(layer_idx=1)
        self.heads = None

    def keys(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[j in self.columns[name] for j in range(self.num_keys)]])

    def constant(self, make: Callable[[], Any]) -> Any:
        return make()

    def per_keys(self, make: Callable[[], Any], like: torch.Tensor) -> Any:
        return make()


def edit(method: Any, scores: Any, layer: Any, allowed: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Edit scores ``[heads, keys]`` of one row."""
    scores = torch.as_tensor(scores, dtype=torch.float32)[None, :, None]
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool) if allowed is None else torch.tensor(allowed)[None, None, None]
    found, edited = method.edit_scores(scores.clone(), allowed, layer)
    return found[0, :, 0], edited[0, :, 0]


def shares(scores: torch.Tensor, columns: list[int]) -> torch.Tensor:
    return scores.softmax(-1)[:, columns].sum(-1)


RANDOM = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)) * 2
SEES = [True, True, True, False, True, True]


def test_hgai_gives_all_heads_the_same_boost() -> None:
    found, edited = edit(HGAI(0.7), RANDOM, HandMade([2, 3]))
    boost = found - RANDOM
    close(boost, boost[:1].expand_as(boost))
    close(boost[0, [2, 3]], 0.7 * RANDOM[:, [2, 3]].abs().mean(0))
    assert (boost[:, [0, 1, 4, 5]] == 0).all()
    assert (shares(found, [2, 3]) > shares(RANDOM, [2, 3])).all()
    assert edited.all()


def test_hgai_with_heads_that_agree_up_to_sign_is_pai() -> None:
    signs = torch.tensor([1.0, -1, 1, -1, 1])[:, None]
    scores = RANDOM[:1] * signs
    image = HandMade([2, 3])
    close(edit(HGAI(0.7), scores, image)[0], edit(vlmfix.PAI(0.7), scores, image)[0])


@pytest.mark.parametrize(
    "method",
    [HGAI(2.0), VAF(-3.0, 0.0), VAF(-3.0, 0.0, multiply="abs"), AdaptVis("fixed", factor=-2.0, center=True), balance()],
    ids=str,
)
@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, 7.0])
def test_hidden_image_columns_are_neither_read_nor_shown(method: Any, hidden: float) -> None:
    """What hidden keys hold is of no consequence, and the visible ones never become NaN."""
    layer = HandMade([2, 3], [0, 1], shared=torch.tensor([-2.0]))
    scores = RANDOM.clone()
    scores[:, 3] = hidden
    found = edit(method, scores, layer, SEES)[0][:, SEES]
    scores[:, 3] = 0.0
    expected = edit(method, scores, layer, SEES)[0][:, SEES]
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", [HGAI(), VAF(2.0, 1.0), AdaptVis("fixed", factor=2.0), balance()], ids=str)
def test_rows_that_see_no_image_come_back_as_they_were(method: Any) -> None:
    layer = HandMade([3], shared=torch.tensor([2.0]))
    found, edited = edit(method, RANDOM, layer, SEES)
    assert torch.equal(found[:, SEES], RANDOM[:, SEES])
    assert not edited.any()


def test_hgai_means_over_query_heads() -> None:
    """Grouped queries: the same as a model whose keys and values are repeated."""
    from families.tiny_llava import tiny_llava

    grouped = tiny_llava(heads=4, kv_heads=2)
    repeated = tiny_llava(heads=4, kv_heads=4)
    weights = grouped.state_dict()
    for name in list(weights):
        if "language_model" in name and ("k_proj" in name or "v_proj" in name):
            weights[name] = weights[name].view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    found = [generate(vlmfix.patch(model, HGAI(layers=":")), ONE, 3)[1] for model in (grouped, repeated)]
    close(*found)


def test_vaf_scales_signed_scores() -> None:
    layer = HandMade([2, 3], [0, 1])
    scores = [[10.0, -10.0, 2.0, -2.0, 5.0, -5.0]]
    close(edit(VAF(), scores, layer)[0], torch.tensor([[9.5, -9.5, 2.3, -2.3, 5.0, -5.0]]))
    close(edit(VAF(multiply="abs"), scores, layer)[0], torch.tensor([[9.5, -10.5, 2.3, -1.7, 5.0, -5.0]]))


def test_vaf_signed_can_lower_the_image_and_abs_cannot() -> None:
    layer, negative = HandMade([2, 3], [0]), -RANDOM.abs()
    before = shares(negative, [2, 3])
    assert (shares(edit(VAF(suppress=1.0), negative, layer)[0], [2, 3]) < before).all()
    for scores in (negative, RANDOM, RANDOM.abs()):
        found = edit(VAF(multiply="abs"), scores, layer)[0]
        assert (shares(found, [2, 3]) >= shares(scores, [2, 3])).all()


def test_vaf_depends_on_a_constant_added_to_a_row() -> None:
    """Unlike softmax: scores must reach it as the model computes them."""
    layer = HandMade([2, 3], [0])
    found = [edit(VAF(), RANDOM + shift, layer)[0].softmax(-1) for shift in (0.0, 3.0)]
    assert (found[0] - found[1]).abs().max() > 0.01


def test_vaf_edits_half_of_the_heads_and_keeps_them(build: Any) -> None:
    model, inputs = build(attn="eager"), ONE
    stock = forward(model, inputs, output_attentions=True).attentions[1]
    image = inputs["input_ids"][0] == IMAGE
    visual = stock[0, :, -1, image].sum(-1).topk(2).indices.tolist()
    vlmfix.patch(model, VAF(3.0, heads="visual", layers=[1]))
    cache = DynamicCache(config=model.config)
    out = forward(model, inputs, output_attentions=True, past_key_values=cache, use_cache=True)
    changed = (out.attentions[1] != stock)[0].flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(visual)
    before = vlmfix.status(model).edited[0]
    with torch.no_grad():
        model(input_ids=torch.tensor([[20]]), past_key_values=cache, use_cache=True)
    assert vlmfix.status(model).edited[0] == before + 2


def test_vaf_takes_listed_heads(build: Any) -> None:
    model = build()
    vlmfix.patch(model, "vaf", heads=[[3, 2], [0, 1]])
    assert vlmfix.status(model).layers == (0, 3)
    assert method_from_dict(VAF(heads=[(0, 1)]).to_dict()) == VAF(heads=((0, 1),))


# AdaptVis: the factor.


@pytest.mark.parametrize(("factor", "expected"), [(0.5, [1.0, -1.0]), (1.5, [3.0, -3.0]), (0.0, [0.0, 0.0])])
def test_adaptvis_scales_around_zero(factor: float, expected: list[float]) -> None:
    layer = HandMade([2, 3], shared=torch.tensor([factor]))
    found, edited = edit(AdaptVis("fixed", factor=0.5), [[1.0, 1.0, 2.0, -2.0, 3.0, -3.0]], layer)
    close(found, torch.tensor([[1.0, 1.0, *expected, 3.0, -3.0]]))
    assert edited.all()


def test_adaptvis_keeps_the_order_of_image_tokens_and_centred_keeps_their_mean() -> None:
    image = [1, 2, 3, 5]
    for factor in (0.3, 2.0):
        layer = HandMade(image, shared=torch.tensor([factor]))
        for center in (False, True):
            found = edit(AdaptVis("fixed", factor=0.5, center=center), RANDOM, layer)[0][:, image]
            assert torch.equal(found.argsort(-1), RANDOM[:, image].argsort(-1))
        close(found.mean(-1), RANDOM[:, image].mean(-1))


def stock_confidence(model: Any) -> torch.Tensor:
    return forward(model, collate(RAGGED)).logits[:, -1].float().softmax(-1).amax(-1)


def test_adaptvis_chooses_per_sample_from_the_stock_distribution(build: Any) -> None:
    model, inputs = build(), collate(RAGGED)
    confidence = stock_confidence(model)
    with_image = [confidence[row] for row in (0, 1, 3)]
    for threshold in (*map(float, with_image), 0.0, 1.0):  # one of them exactly on it
        vlmfix.patch(model, AdaptVis(threshold=threshold, low=0.25, high=3.0))
        found = generate(model, inputs, 2)[1]
        for row in (0, 1, 3):
            factor = 0.25 if confidence[row] < threshold else 3.0
            vlmfix.patch(model, AdaptVis("fixed", factor=factor))
            close(found[row], generate(model, collate([RAGGED[row]]), 2)[1][0])
    assert len({bool(each < with_image[0]) for each in with_image}) == 2, "both factors were chosen at once"


def test_adaptvis_counts_only_samples_with_a_factor(build: Any) -> None:
    model = build()
    confidence = stock_confidence(model)
    vlmfix.patch(model, AdaptVis(threshold=float(confidence[0]), low=1.0, high=3.0))
    forward(model, collate(RAGGED))
    sure = sum(bool(confidence[row] >= confidence[0]) for row in (0, 1, 3))
    assert 0 < sure < 3
    assert vlmfix.status(model).edited == (4 * 4 * sure,)


def test_the_pass_for_confidence_leaves_no_trace(build: Any) -> None:
    """As if only the edited run had happened: bitwise, with sampling too, with a cache of earlier turns."""
    model = build()
    first, second = RAGGED[0], sample(2, 1, 4, seed=9)
    found = []
    for method in (AdaptVis("fixed", factor=1.5), AdaptVis(threshold=0.0, high=1.5)):
        vlmfix.patch(model, method)
        loop = Loop(model, collate([first]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            loop.read(20)
            turn = loop.turn(second)
            assert loop.cache.get_seq_length() == len(first.ids) + len(second.ids)
            found.append((turn, model.generate(**ONE, do_sample=True, max_new_tokens=5)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_adaptvis_leaves_decoding_alone_unless_asked(build: Any) -> None:
    model = build()
    for decode in (False, True):
        vlmfix.patch(model, AdaptVis("fixed", factor=2.0, decode=decode))
        generate(model, ONE, 4)
        assert vlmfix.status(model).edited == (4 * 4 * (1 + 3 * decode),)


def test_adaptvis_says_what_it_costs_and_when_it_does_nothing(build: Any) -> None:
    model = build()
    assert "twice" in vlmfix.status(vlmfix.patch(model, "adaptvis")).notes[0]
    assert "nothing is edited" in vlmfix.status(vlmfix.patch(model, "adaptvis", mode="fixed")).notes[0]
    vlmfix.patch(model, AdaptVis(probe_tokens=[99]))
    with pytest.raises(vlmfix.MethodError, match="vocabulary of 64"):
        forward(model, ONE)


# Modality balance: the share.


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_modality_balance_moves_the_share_exactly(tau: float) -> None:
    image, text = [1, 2, 4], [0, 3, 5]
    found, edited = edit(balance(tau=tau), RANDOM * 3, HandMade(image))
    close(shares(found, image), (1 - tau) * shares(RANDOM * 3, image) + tau / 2)
    assert edited.all()
    for columns in (image, text):
        close(found[:, columns].softmax(-1), (RANDOM * 3)[:, columns].softmax(-1))


@pytest.mark.parametrize("image", [[], [0, 1, 2, 4, 5]], ids=["no image", "nothing else"])
def test_modality_balance_leaves_rows_of_one_kind_alone(image: list[int]) -> None:
    found, edited = edit(balance(), RANDOM, HandMade(image), SEES)
    assert torch.equal(found, RANDOM)
    assert not edited.any()


def test_modality_balance_of_extreme_rows_is_finite() -> None:
    scores = torch.tensor([[0.0, 200.0, 0, 0, 0, 0], [0.0, -200.0, 0, 0, 0, 0]])
    found = edit(balance(tau=1.0), scores, HandMade([1]))[0]
    close(shares(found, [1]), torch.full((2,), 0.5))
