"""Attention knockout: the nine invariants of its specification, a closed form, and a model with masks of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import available
from families.saved_llava import build_tiny_llava
from families.tiny_llava import IMAGE, IMAGE_TOKENS, RAGGED, attention_modules, collate, generate, sample
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmfix
from vlmfix.errors import MethodError
from vlmfix.model.anatomy import analyse
from vlmfix.probes import knockout
from vlmfix.probes.knockout import PAIRS, Cut, window_of
from vlmfix.probes.spans import cells_of, find_spans, is_subset, text_span

ALL = 100
"""A window over every layer."""


def spans_of(model: Any, inputs: Any, **options: Any) -> dict[str, torch.Tensor]:
    return find_spans(analyse(model), inputs, **options)


@contextmanager
def masks_cut(model: Any, source: torch.Tensor, target: torch.Tensor, layers: Any, keep_self: bool) -> Iterator[None]:
    """Close pairs in the mask an eager attention module is called with, in a forward over a whole prompt."""
    rows, columns = target[:, None, :, None], source[:, None, None]
    pairs = rows & columns
    if keep_self:
        pairs = pairs & ~torch.eye(target.shape[1], dtype=torch.bool)

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": mask.masked_fill(pairs, torch.finfo(mask.dtype).min)}

    with ExitStack() as hooks:
        for number, module in enumerate(attention_modules(model)):
            if number in layers:
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def first_probability(model: Any, inputs: Any, tokens: Any) -> torch.Tensor:
    probability = generate(model, inputs, 1)[1][:, 0].float().softmax(-1)
    return probability.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("pair", [*PAIRS, "question->question", "text->last", "image->image"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_knockout_is_a_closed_mask(build: Any, kind: str, pair: str) -> None:
    """Against an eager model that is handed masks with those pairs closed; window and pair as specified."""
    model, inputs = build(kind, attn="eager"), collate(RAGGED)
    found = knockout(model, inputs, [pair], window=2)
    spans = spans_of(model, inputs)
    source, target = pair.split("->")
    has_image = spans["image"].any(1)
    before = first_probability(model, inputs, found.tokens)
    assert torch.allclose(found.probability, before, atol=1e-6)
    seen = 0
    for number, (first, last) in enumerate(found.windows):
        layers = range(first, last + 1)
        keep_self = pair != "last->last"
        with masks_cut(model, spans[source], spans[target] & has_image[:, None], layers, keep_self):
            after = first_probability(model, inputs, found.tokens)
        expected = (100 * (after - before) / before) * has_image
        assert torch.allclose(found.change[0, number], expected, atol=2e-2, rtol=1e-4)
        seen += int((expected.abs() > 0.1).sum())
    assert seen > 3, "the edit is invisible"


def test_even_attention_without_the_image_is_the_mean_of_the_rest(build: Any) -> None:
    """Closed form for one flat layer: the row's output is the mean value of what it still sees."""
    model = build(layers=1)
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight.zero_()
    inputs = collate([sample(3, 1, 6)])
    heads: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda *args: values.append(args[2][0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0][0, -1])),
    ]
    knockout(model, inputs, ["image->last"], window=1)
    for hook in hooks:
        hook.remove()
    text = inputs["input_ids"][0] != IMAGE
    whole, rest = values[0].view(-1, 2, 8).mean(0), values[0][text].view(-1, 2, 8).mean(0)
    assert torch.allclose(heads[0].view(4, 8), whole.repeat_interleave(2, 0), atol=1e-5)
    assert torch.allclose(heads[1].view(4, 8), rest.repeat_interleave(2, 0), atol=1e-5)


# The invariants, in the order of the specification.


def test_1_an_empty_source_or_window_changes_exactly_nothing(tiny: Any) -> None:
    inputs = collate(RAGGED)
    nobody = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    found = knockout(tiny, inputs, ["nobody->last", "image->nobody"], window=ALL, layers=[1], spans={"nobody": nobody})
    assert not found.change.any()
    assert found.mean().eq(0).all()


def test_1_layers_without_attention_have_an_empty_window() -> None:
    family = available("qwen3_5")
    model, inputs = family.build(), family.collate([family.single()])
    there = {site.layer_idx for site in analyse(model).sites}
    found = knockout(model, inputs, ["image->last"], window=1)
    assert set(found.layers) == there
    assert found.change.abs().amax() > 0.1


@pytest.mark.parametrize("window", [1, ALL])
def test_2_a_later_source_changes_exactly_nothing(tiny: Any, window: int) -> None:
    inputs = collate(RAGGED)
    found = knockout(tiny, inputs, ["last->question", "question->image", "last->image"], window=window)
    assert not found.change.any()


def test_3_rows_but_the_last_do_not_matter_in_the_last_layer(tiny: Any) -> None:
    inputs = collate(RAGGED)
    found = knockout(tiny, inputs, ["image->question", "question->question", "image->last"], window=1, layers=[3, 2])
    at = found.layers.index(3)
    assert not found.change[:2, at].any()
    assert found.change[2, at].any() and found.change[:2, 1 - at].any(), "negative control"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_4_no_row_becomes_empty(build: Any, kind: str) -> None:
    """Everything hidden from everyone: each row is left with itself, and last->last spares a row that sees no other."""
    model, inputs = build(kind, attn="eager"), collate(RAGGED)
    every = spans_of(model, inputs)
    whole = every["text"] | every["image"]
    with vlmfix.patched(model, Cut(whole, whole)):
        out = model(
            **inputs, output_attentions=True, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        )
    with_image = every["image"].any(1)
    for weights in out.attentions:
        mine = weights[with_image].transpose(1, 2)[whole[with_image]]  # [tokens, heads, keys]
        assert torch.allclose(mine.sum(-1), torch.ones(mine.shape[:2]), atol=1e-6)
        assert torch.allclose(
            weights[with_image].diagonal(dim1=2, dim2=3).transpose(1, 2)[whole[with_image]].min(), torch.ones(())
        )
    assert not out.logits.isnan().any()
    lonely = torch.zeros_like(whole)
    lonely[0, RAGGED_START] = True  # the first token of a row sees only itself
    with vlmfix.patched(model, Cut(lonely, lonely, keep_self=False)):
        edited = model(**inputs).logits
        assert vlmfix.status(model).edited == (0,)
    assert torch.equal(edited, model(**inputs).logits)


RAGGED_START = max(len(each.ids) for each in RAGGED) - len(RAGGED[0].ids)


@pytest.mark.parametrize("pair", PAIRS)
def test_5_inside_the_window_exactly_those_pairs_are_closed(build: Any, pair: str) -> None:
    model, inputs = build(attn="eager"), collate(RAGGED)
    spans = spans_of(model, inputs)
    source, target = (spans[name] for name in pair.split("->"))
    stock = model(**inputs, output_attentions=True).attentions
    keep_self = pair != "last->last"
    with vlmfix.patched(model, Cut(source, target, keep_self=keep_self, layers=[1, 2])):
        cut = model(**inputs, output_attentions=True).attentions
    with_image = spans["image"].any(1)
    hidden = (target & with_image[:, None])[:, None, :, None] & source[:, None, None]
    if keep_self:
        hidden = hidden & ~torch.eye(hidden.shape[-1], dtype=torch.bool)
    for layer in (1, 2):
        assert not cut[layer][hidden.expand_as(cut[layer])].any()
        rows = cut[layer].sum(-1)
        assert torch.allclose(rows, stock[layer].sum(-1), atol=1e-5)
    assert torch.equal(cut[0], stock[0])
    touched = (target & with_image[:, None])[:, None].expand(-1, 4, -1)
    assert torch.equal(
        cut[1][~touched], stock[1][~touched]
    )  # same inputs there: rows that are no target keep every bit
    assert not torch.equal(cut[1], stock[1])
    if pair != "image->question":
        assert torch.equal(cut[2][~touched], stock[2][~touched]), (
            "only the last row has changed, which nobody else sees"
        )


def test_5_layers_outside_the_window_and_image_rows_keep_their_masks(build: Any) -> None:
    """The masks the base kernels are called with are those of the stock model, in every layer."""
    import transformers.models.llama.modeling_llama as modeling

    model, inputs = build(attn="eager"), collate(RAGGED)
    seen: list[torch.Tensor] = []
    kernel = modeling.eager_attention_forward

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append(mask)
        return kernel(module, query, key, value, mask, **kwargs)

    modeling.eager_attention_forward = spy
    try:
        model(**inputs)
        spans = spans_of(model, inputs)
        with vlmfix.patched(model, Cut(spans["image"], spans["question"], layers=[1])):
            model(**inputs)
    finally:
        modeling.eager_attention_forward = kernel
    assert len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))


def test_6_kernels_agree(build: Any) -> None:
    inputs = collate(RAGGED)
    eager, sdpa = (knockout(build(attn=attn), inputs, window=2) for attn in ("eager", "sdpa"))
    assert torch.allclose(eager.change, sdpa.change, atol=1e-2)
    assert eager.change.abs().mean() > 1


def test_7_text_only_prompts_report_exactly_zero_and_do_not_count(tiny: Any) -> None:
    for inputs in (collate([RAGGED[2]]), collate(RAGGED[1:3])):
        found = knockout(tiny, inputs, window=2)
        assert not found.change[..., -1].any()
        assert not found.counted[-1]
    assert found.change[..., 0].any() and found.counted[0]
    assert knockout(tiny, collate([RAGGED[2]])).mean().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_8_half_precision_has_no_nan(build: Any, dtype: torch.dtype) -> None:
    found = knockout(build().to(dtype), {**collate(RAGGED), "pixel_values": collate(RAGGED)["pixel_values"].to(dtype)})
    assert not found.change.isnan().any()
    assert found.change.any()


def test_9_windows() -> None:
    assert [window_of(at, 9, 32) for at in (0, 16, 31)] == [(0, 4), (12, 20), (27, 31)]
    assert [window_of(at, 1, 4) for at in range(4)] == [(at, at) for at in range(4)]
    assert [window_of(at, 2, 4) for at in range(4)] == [(0, 0), (0, 1), (1, 2), (2, 3)]
    assert window_of(2, ALL, 6) == (0, 5)


def test_9_the_windows_reported_are_those_cut(tiny: Any) -> None:
    found = knockout(tiny, collate(RAGGED), window=9)
    assert found.windows == ((0, 3),) * 4
    assert torch.equal(found.change[:, 0], found.change[:, 3])
    parts = knockout(tiny, collate(RAGGED), window=1, layers=[0, 2])
    assert parts.windows == ((0, 0), (2, 2)) and parts.layers == (0, 2)


# Spans, boxes, figures.


def test_spans_of_a_padded_batch(tiny: Any) -> None:
    inputs = collate(RAGGED)
    spans = spans_of(tiny, inputs)
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    assert torch.equal(spans["image"], ids == IMAGE)
    assert spans["last"].nonzero().tolist() == [[row, ids.shape[1] - 1] for row in range(4)]
    assert spans["question"].sum(1).tolist() == [5, 4, 0, 8]
    assert torch.equal(spans["text"] | spans["image"], valid)
    for each in spans.values():
        assert not (each & ~valid).any()


def test_boxes_name_image_tokens(tiny: Any) -> None:
    inputs = collate([RAGGED[0], RAGGED[3]])
    boxes = [[(0.0, 0.0, 0.3, 0.3)], [(0.4, 0.0, 0.6, 1.0), (0.7, 0.7, 1.0, 1.0)]]
    spans = spans_of(tiny, inputs, boxes=boxes)
    first = [row.nonzero()[0, 0].item() for row in spans["image"]]
    assert (spans["object"][0].nonzero()[:, 0] - first[0]).tolist() == [0]
    assert (spans["object"][1].nonzero()[:, 0] - first[1]).tolist() == [1, 4, 7, 8]
    assert torch.equal(spans["object"] ^ spans["other"], spans["image"])
    found = knockout(tiny, inputs, boxes=boxes, window=2)
    assert found.pairs == (*PAIRS, "object->question", "other->question")
    mask = {"mine": spans["object"]}
    again = knockout(tiny, inputs, ["mine->question"], window=2, spans=mask)
    assert torch.equal(again.change[0], found.change[4]) and again.change.any()


class Words:
    """A tokenizer with one word per token: ``w7`` is token 7."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join("" if token == IMAGE else f"w{token}" for token in ids)


def test_the_question_of_the_study_is_its_text_alone(tiny: Any) -> None:
    """Without template and instruction: tokens 2 to 4 behind the image are the question here."""
    samples = [RAGGED[0], RAGGED[3]]
    inputs = collate(samples)
    asked = [[at + 1 for at, token in enumerate(each.ids) if token == IMAGE][-1] + 1 for each in samples]
    questions = [
        " ".join(f"w{token}" for token in each.ids[at : at + 3]) for each, at in zip(samples, asked, strict=True)
    ]
    span = text_span(Words(), inputs, questions)
    pads = [inputs["input_ids"].shape[1] - len(each.ids) for each in samples]
    assert span.nonzero().tolist() == [[row, pads[row] + asked[row] + i] for row in range(2) for i in range(3)]
    assert is_subset(span, spans_of(tiny, inputs)["question"])
    found = knockout(tiny, inputs, ["image->asked", "image->question"], window=2, spans={"asked": span})
    assert (found.change[0] - found.change[1]).abs().max() > 0.01
    twice = {"input_ids": torch.tensor([[5, 6, 5, 6]])}
    for text, says in (("w5 w6", "more than once"), ("w6 w7", "nowhere"), ("", "nowhere")):
        with pytest.raises(MethodError, match=says):
            text_span(Words(), twice, [text])
    with pytest.raises(MethodError, match="one text for each of 1"):
        text_span(Words(), twice, [])


def test_cells_of_a_box() -> None:
    assert cells_of((0, 0, 1, 1), 2, 3) == [0, 1, 2, 3, 4, 5]
    assert cells_of((0, 0, 0.5, 0.5), 2, 2) == [0]
    assert cells_of((0.49, 0.0, 0.51, 0.5), 2, 2) == [0, 1]
    for box in [(0.5, 0, 0.5, 1), (-0.1, 0, 1, 1), (0, 0.5, 1, 0.4), (0, 0, 1, 1.1)]:
        with pytest.raises(MethodError, match="parts of the image"):
            cells_of(box, 2, 2)


def test_given_answers_and_the_floor(tiny: Any) -> None:
    inputs = collate(RAGGED)
    found = knockout(tiny, inputs, ["image->last"], answers=[7, 8, 9, 10], layers=[1])
    assert found.tokens == (7, 8, 9, 10)
    expected = generate(tiny, inputs, 1)[1][:, 0].softmax(-1)[range(4), [7, 8, 9, 10]]
    assert torch.allclose(found.probability, expected, atol=1e-6)
    assert torch.equal(found.counted, (expected >= 0.05) & torch.tensor([True, True, False, True]))
    all_in = knockout(tiny, inputs, ["image->last"], answers=[7, 8, 9, 10], layers=[1], floor=0.0)
    assert all_in.counted.tolist() == [True, True, False, True]
    change = all_in.change[0, 0, [0, 1, 3]]
    assert torch.allclose(all_in.mean()[0, 0], change.mean())
    assert torch.allclose(all_in.standard_error()[0, 0], change.std() / 3**0.5)


def test_wrong_pairs_boxes_and_windows_are_refused(tiny: Any) -> None:
    inputs = collate(RAGGED)
    with pytest.raises(MethodError, match="source->target"):
        knockout(tiny, inputs, ["image"])
    with pytest.raises(MethodError, match=r"image, question.*boxes=\.\.\."):
        knockout(tiny, inputs, ["object->last"])
    with pytest.raises(MethodError, match="window"):
        knockout(tiny, inputs, window=0)
    with pytest.raises(MethodError, match="4 samples"):
        knockout(tiny, inputs, boxes=[[]])
    with pytest.raises(MethodError, match="grid=\\(rows, columns\\)"):
        knockout(tiny, collate([RAGGED[1]]), boxes=[[(0, 0, 1, 1)]])
    with pytest.raises(MethodError, match="new name"):
        knockout(tiny, inputs, spans={"image": torch.zeros_like(inputs["input_ids"], dtype=torch.bool)})
    assert IMAGE_TOKENS == 9


def test_a_cut_reaches_generated_rows(build: Any) -> None:
    """Targets in the answer: as if the same text were read at once with those pairs closed."""
    model, inputs = build(attn="eager"), collate([RAGGED[0]])
    length = inputs["input_ids"].shape[1]
    answer = [9, 12, 7]
    source = torch.nn.functional.pad(inputs["input_ids"] == IMAGE, (0, 3))
    target = torch.zeros(1, length + 3, dtype=torch.bool)
    target[:, length:] = True
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    from vlmfix.observe.ask import look_at

    subject = look_at(model, "test", inputs)
    found = subject.answer(inputs, Cut(source, target), answers=[[*answer, 5]], logits=True)
    with masks_cut(model, source, target, range(4), keep_self=True):
        expected = model(**whole).logits[0, length - 1 :].log_softmax(-1)
    assert torch.allclose(found.log_probs()[0], expected[range(4), [*answer, 5]], atol=1e-4)
    stock = subject.answer(inputs, answers=[[*answer, 5]], logits=True).log_probs()[0]
    assert torch.equal(stock[0], found.log_probs()[0, 0])
    assert (stock[1:] - found.log_probs()[0, 1:]).abs().min() > 1e-3


def test_the_question_alone_as_in_the_study(tmp_path: Path) -> None:
    """Without the line break, the instruction and the role's name around it."""
    folder = build_tiny_llava(tmp_path, layers=2)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    questions = ["is there a dog in the image ?", "is there a cat ?"]
    prompts = [f"USER: <image>\n{text} answer the question using a single word . ASSISTANT:" for text in questions]
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    pictures = [[Image.fromarray(picture)] for picture in noise]
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    asked = text_span(processor.tokenizer, inputs, questions)
    for row, text in enumerate(questions):
        assert processor.tokenizer.decode(inputs["input_ids"][row, asked[row]]) == text
    behind = spans_of(model, inputs)["question"]
    assert bool((behind | ~asked).all()) and int(asked.sum()) < int(behind.sum())
    found = knockout(model, inputs, ["image->question", "question->last"], question=asked, window=ALL, layers=[0])
    named = knockout(model, inputs, ["image->q", "q->last"], spans={"q": asked}, window=ALL, layers=[0])
    assert torch.equal(found.change, named.change)
    whole = knockout(model, inputs, ["image->question", "question->last"], window=ALL, layers=[0])
    assert not torch.allclose(found.change, whole.change, atol=1e-3)
    for texts, says in (
        (["is there a horse ?", questions[1]], "stands nowhere"),
        (["the", questions[1]], "more than once"),
        (questions[:1], "one text for each of 2 prompts, got 1"),
    ):
        with pytest.raises(MethodError, match=says):
            text_span(processor.tokenizer, inputs, texts)
    with pytest.raises(MethodError, match="must be a new name"):
        knockout(model, inputs, question=asked[:1])
