"""The method and ``vlmfix.verify`` on the embedded model: against naive questions, and what must stay as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import snapshot
from naive import verify as naive
from PIL import Image

import vlmfix
from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.evals.testbed import load
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.methods.registry import method_from_dict
from vlmfix.model.anatomy import analyse
from vlmfix.observe.ask import answer
from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.observe.unfinished import can_drop
from vlmfix.prefix import prefix_left_behind
from vlmfix.verification.ask import Questioner
from vlmfix.verification.said import SaidLog

IMAGES = [Image.fromarray(make_scene(image_id("calibration", index)).pixels) for index in (4, 7, 9, 1)]
STRICT = {"lost_per_false": 3.0, "asked_weight": 0.6, "said_weight": 0.5, "bias": -0.3}
"""Leaves out something of most answers."""
PROMPT = "Please describe this image in detail."


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load("tiny")


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Any:
    yield loaded[0]
    vlmfix.unpatch(loaded[0])


@pytest.fixture
def processor(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


def inputs_of(processor: Any, images: list[Any], prompt: str = PROMPT) -> Any:
    return encode(processor, [PromptBuilder(processor)(prompt)] * len(images), images)


def answers(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, **{"max_new_tokens": 70, "do_sample": False, **options})


def texts(processor: Any, inputs: Any, out: torch.Tensor) -> list[str]:
    return processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.is_over = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.is_over = True


def test_the_method_equals_questions_asked_one_by_one(model: Any, processor: Any) -> None:
    rule, changed = vlmfix.Verify(**STRICT), 0
    inputs = inputs_of(processor, IMAGES)
    stock = answers(model, inputs)
    vlmfix.patch(model, rule)
    found = texts(processor, inputs, answers(model, inputs))
    vlmfix.unpatch(model)
    for row, image in enumerate(IMAGES):
        ids = [token for token in stock[row, inputs["input_ids"].shape[1] :].tolist() if token > 3]
        expected = naive.verified(model, processor, image, inputs_of(processor, [image]), ids, rule)
        assert found[row].strip() == expected.strip()
        changed += expected.strip() != processor.tokenizer.decode(ids).strip()
    assert changed >= 2


def test_a_batch_a_single_prompt_and_a_stream_give_the_same(model: Any, processor: Any) -> None:
    inputs = inputs_of(processor, IMAGES)
    vlmfix.patch(model, "verify", **STRICT)
    batch = texts(processor, inputs, answers(model, inputs))
    for row, image in enumerate(IMAGES):
        one, heard = inputs_of(processor, [image]), Heard()
        out = answers(model, one, streamer=heard)
        assert texts(processor, one, out) == [batch[row]]
        assert torch.equal(out, answers(model, one))
        assert heard.is_over and [token for part in heard.parts for token in part] == out[0].tolist()


def test_beams_samples_and_several_answers_of_a_prompt(model: Any, processor: Any) -> None:
    inputs = inputs_of(processor, IMAGES[:2])
    options = {"num_beams": 3, "num_return_sequences": 2}
    stock = texts(processor, inputs, answers(model, inputs, **options))
    vlmfix.patch(model, "verify", **STRICT)
    found = texts(processor, inputs, answers(model, inputs, **options))
    assert len(found) == 4 and found != stock
    assert all(len(edited) <= len(text) for edited, text in zip(found, stock, strict=True))
    torch.manual_seed(0)
    one = answers(model, inputs, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(one, answers(model, inputs, do_sample=True))


def test_off_without_an_image_for_one_call_and_taken_off_it_is_the_stock_model(model: Any, processor: Any) -> None:
    inputs = inputs_of(processor, IMAGES)
    stock, before = answers(model, inputs), snapshot(model)
    text = encode(processor, [PromptBuilder(processor)(PROMPT, image=False)], [None])
    stock_text = answers(model, text)
    vlmfix.patch(model, "verify", lost_per_false=0)
    assert torch.equal(answers(model, inputs), stock) and vlmfix.status(model).edited == (0,)
    vlmfix.patch(model, "verify", **STRICT)
    assert torch.equal(answers(model, text), stock_text) and vlmfix.status(model).edited == (0,)
    assert torch.equal(answers(model, inputs, vlmfix=None), stock)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert not torch.equal(answers(model, inputs), stock) and vlmfix.status(model).edited[0] > 0
    vlmfix.unpatch(model)
    assert snapshot(model) == before and torch.equal(answers(model, inputs), stock)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


def test_more_may_be_lost_more_is_left_out(model: Any, processor: Any) -> None:
    inputs, gone = inputs_of(processor, IMAGES), []
    for limit in (0.05, 0.7, 3.0, 100.0):
        vlmfix.patch(model, "verify", **{**STRICT, "lost_per_false": limit})
        answers(model, inputs)
        gone.append(vlmfix.status(model).edited[0])
    assert gone == sorted(gone) and gone[0] < gone[-1]


def test_answers_are_not_judged_before_they_are_whole(model: Any, processor: Any) -> None:
    inputs = inputs_of(processor, IMAGES * 3)
    vlmfix.patch(model, "verify", **STRICT)
    assert not can_drop(model, len(IMAGES) * 3)
    found = answer(model, inputs, 70, drop_ended=True)
    whole = texts(processor, inputs, answers(model, inputs))
    assert [processor.tokenizer.decode(list(ids)).strip() for ids in found.words] == [each.strip() for each in whole]
    vlmfix.patch(model, "verify", lost_per_false=0)
    assert can_drop(model, len(IMAGES) * 3)


def test_status_counts_words(model: Any, processor: Any) -> None:
    vlmfix.patch(model, "verify", **STRICT)
    answers(model, inputs_of(processor, IMAGES))
    status = vlmfix.status(model)
    (note,) = (note for note in status.notes if note.startswith("verify"))
    asked, doubted, left_out, sentences = (int(word) for word in note.split() if word.isdigit())
    assert asked > doubted >= 2 and left_out == status.edited[0] >= doubted and sentences >= 2
    assert note in str(status) and "\n  in no layer; " in str(status)


def test_what_goes_with_tokens_is_refused_and_a_cache_is_cut_where_the_text_was(model: Any, processor: Any) -> None:
    inputs = inputs_of(processor, IMAGES[:1])
    vlmfix.patch(model, "verify", **{**STRICT, "lost_per_false": 100.0})
    with pytest.raises(UnsupportedFeatureError, match="vlmfix=None, output_scores=True"):
        answers(model, inputs, output_scores=True, return_dict_in_generate=True)
    out = answers(model, inputs, return_dict_in_generate=True)
    stock = answers(model, inputs, vlmfix=None)
    same = 0
    while out.sequences[0, same] == stock[0, same]:
        same += 1
    assert out.past_key_values.get_seq_length() == same
    with pytest.raises(UnsupportedFeatureError, match="pixel_values"):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=2)
    with pytest.raises(UnsupportedFeatureError, match="Give it whole prompts"):
        vlmfix.shared_prefix(model, inputs)
    assert vlmfix.shared_prefix(model, inputs, stock=True).is_stock
    with pytest.raises(UnsupportedFeatureError, match="input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 128), max_new_tokens=2)


def test_methods_in_forwards_act_and_the_stock_model_is_asked(model: Any, processor: Any) -> None:
    inputs = inputs_of(processor, IMAGES)
    vlmfix.patch(model, "vhr", alpha=1.4)
    said = texts(processor, inputs, answers(model, inputs))
    vlmfix.patch(model, [vlmfix.VHR(alpha=1.4), vlmfix.Verify(**STRICT)])
    found = texts(processor, inputs, answers(model, inputs))
    status = vlmfix.status(model)
    assert status.edited[0] > 0 and status.edited[1] > 0 and status.prompts == 1
    for row, image in enumerate(IMAGES):
        ids = processor.tokenizer(said[row], add_special_tokens=False)["input_ids"]
        vlmfix.unpatch(model)
        prompt = inputs_of(processor, [image])
        expected = naive.verified(model, processor, image, prompt, ids, vlmfix.Verify(**STRICT))
        assert found[row].strip() == expected.strip()


def test_it_survives_json_a_recipe_and_a_copy(model: Any, processor: Any, tmp_path: Path) -> None:
    import copy

    inputs = inputs_of(processor, IMAGES)
    vlmfix.patch(model, "verify", **STRICT)
    expected = answers(model, inputs)
    (bound,) = vlmfix.status(model).methods
    assert method_from_dict(json.loads(json.dumps(bound.to_dict()))) == bound
    vlmfix.save_recipe(tmp_path / "recipe.json", bound)
    assert torch.equal(answers(copy.deepcopy(model), inputs), expected)
    vlmfix.patch(model, tmp_path / "recipe.json")
    assert torch.equal(answers(model, inputs), expected)
    vlmfix.patch(model, "verify", **STRICT, processor=processor)
    assert torch.equal(answers(model, inputs), expected)
    vlmfix.patch(model, "none")
    assert torch.equal(answers(model, inputs, vlmfix={"method": "verify", **STRICT}), expected)


def test_a_missing_processor_and_a_model_that_cannot_share_are_named(tiny: Any, build: Any) -> None:
    with pytest.raises(MethodError, match=r"vlmfix\.patch\(model, 'verify', processor='FOLDER_OR_HUB_ID'\)"):
        vlmfix.patch(tiny, "verify")
    with pytest.raises(MethodError, match=r"vlmfix\.verify\(model, processor, image, text\)"):
        vlmfix.patch(build("gemma2"), "verify")
    with pytest.raises(MethodError, match=r"with \{name\} in it"):
        vlmfix.Verify(question="Is it there?")
    with pytest.raises(MethodError, match="layers"):
        vlmfix.Verify(layers=(1,))


def test_any_text_is_verified_and_its_evidence_shown(model: Any, processor: Any) -> None:
    text = "The image shows a kitchen.  A zebra and a hot dog are visible, next to a refrigerator."
    vlmfix.patch(model, "vhr", alpha=3.0)
    found = vlmfix.verify(model, processor, IMAGES[0], text)
    assert found.original == text and str(found) == found.text
    assert {word.name for word in found.words} == {"zebra", "hot dog", "refrigerator"}
    rule = vlmfix.Verify()
    vlmfix.unpatch(model)
    for word in found.words:
        ((start, end),) = word.spans
        assert text[start:end] == word.name
        asked = naive.log_odds_of_yes(model, processor, IMAGES[0], f"Is there a {word.name} in the image?")
        assert abs(math.log(word.asked / (1 - word.asked)) - asked) < 1e-3
        odds = rule.asked_weight * asked + rule.said_weight * math.log(word.said / (1 - word.said))
        assert abs(math.log(word.is_true / (1 - word.is_true)) - odds) < 1e-3
        assert word.is_doubted == (odds < math.log(rule.lost_per_false)) == (word.name in found.doubted)
    assert found.doubted == ("hot dog", "refrigerator")
    assert found.text == "The image shows a kitchen.  A zebra is visible."
    assert json.loads(json.dumps(found.to_dict()))["words"][0]["name"] == "zebra"
    everything = vlmfix.verify(model, None, IMAGES[0], text, vlmfix.Verify(lost_per_false=0))
    assert everything.text == text
    nothing = vlmfix.verify(model, processor, IMAGES[0], "It is nice.")
    assert nothing.text == "It is nice." and nothing.words == () and nothing.cost.questions == 0


def test_asking_changes_no_prefix_and_does_not_depend_on_the_other_questions(model: Any, processor: Any) -> None:
    questioner = Questioner(model, processor, batch_size=3)
    looked = questioner.look(inputs_of(processor, IMAGES[:2]))
    names = ["dog", "person", "zebra", "car", "clock"]
    before = [(keys.clone(), values.clone()) for keys, values in looked.prefix.layers]
    together = looked.ask([names, names[::-1]])
    alone = [looked.ask([[name], []])[0][name] for name in names]
    for name, one in zip(names, alone, strict=True):
        assert abs(together[0][name].with_image - one.with_image) < 1e-4
        assert together[0][name].without_image == one.without_image
    for (keys, values), now in zip(before, looked.prefix.layers, strict=True):
        assert torch.equal(keys, now[0]) and torch.equal(values, now[1])
    assert questioner.cost.questions == 15 and questioner.cost.prefix_tokens == 2 * 67
    assert analyse(model).model is model


def test_a_method_that_somebody_put_on_the_model_still_collects_the_processors(model: Any, processor: Any) -> None:
    collected: list[int] = []

    def collects(*args: Any, **kwargs: Any) -> Any:
        found = type(model)._get_logits_processor(model, *args, **kwargs)
        collected.append(len(found))
        return found

    inputs = inputs_of(processor, IMAGES)
    model._get_logits_processor = collects
    with vlmfix.patched(model, vlmfix.Verify(**STRICT, processor=processor)):
        answers(model, inputs)
        assert collected, "it was passed over"
    assert model.__dict__.pop("_get_logits_processor") is collects


def test_what_was_said_is_noted_while_it_is_said_or_read_again(model: Any, processor: Any) -> None:
    """Beams and processors of the caller's model settings make the tokens of an answer unlike what was noted."""
    inputs = inputs_of(processor, IMAGES)
    found = {}
    for name, options in {
        "noted": {},
        "sampled": {"do_sample": True, "temperature": 0.5},
        "penalised": {"repetition_penalty": 1.2},
        "beams": {"num_beams": 2},
    }.items():
        vlmfix.patch(model, vlmfix.Verify(**STRICT))
        torch.manual_seed(0)
        answers(model, inputs, **options)
        judge = vlmfix.status(model).methods[-1]._judge
        found[name] = judge.questioner.cost.answer_tokens
        assert judge.totals.asked
    assert found.pop("beams") > 0 and not any(found.values())
    # Noted and read again, the same tokens have the same probabilities.
    vlmfix.unpatch(model)
    stock = answers(model, inputs)
    log = SaidLog()
    vlmfix.patch(model, vlmfix.Verify(lost_per_false=1e-9, processor=processor))
    out = answers(model, inputs, logits_processor=[log], repetition_penalty=1.3)
    length = inputs["input_ids"].shape[1]
    rows = out[:, length:].tolist()
    ends = analyse(model).model.generation_config.eos_token_id
    ids = [row[: row.index(ends)] if ends in row else row for row in rows]
    noted = log.of(out[:, length:], out)
    again = Questioner(model, processor).look(inputs).said(ids)
    assert noted is not None and not torch.equal(out, stock)
    for mine, other in zip(noted, again, strict=True):
        torch.testing.assert_close(torch.tensor(mine[: len(other)]), torch.tensor(other), atol=1e-3, rtol=1e-3)
    assert SaidLog().of(out[:, length:], out) is None


def test_an_image_that_the_answer_was_read_from_is_not_read_again(model: Any, processor: Any) -> None:
    prompts = [PromptBuilder(processor)(text) for text in (PROMPT, "Describe the image.", PROMPT)]
    inputs = encode(processor, prompts[:2], IMAGES[:2])
    three = encode(processor, [*prompts[:1], PromptBuilder(processor)(PROMPT, image=False), *prompts[:1]], IMAGES[:2])
    for given, rows, beams in ((inputs_of(processor, IMAGES[:2]), (0, 1), 1), (three, (0, 2), 2)):
        pictures = {**given, "input_ids": given["input_ids"][list(rows)]}
        pictures["attention_mask"] = given["attention_mask"][list(rows)]
        out = answers(model, given, num_beams=beams, return_dict_in_generate=True)
        batch = len(given["input_ids"])
        found = prefix_left_behind(analyse(model), pictures, out.past_key_values, rows, batch)
        expected = vlmfix.shared_prefix(model, pictures, stock=True)
        assert torch.equal(found.input_ids, expected.input_ids) and found.is_stock
        assert torch.equal(found.attention_mask, expected.attention_mask)
        for pair, own in zip(found.layers, expected.layers, strict=True):
            for part, other in zip(pair, own, strict=True):
                torch.testing.assert_close(part, other, atol=1e-4, rtol=1e-4)
    out = answers(model, inputs, return_dict_in_generate=True)
    assert inputs["attention_mask"].sum(1).unique().numel() == 2, "padded, so that prefixes end in different columns"
    assert prefix_left_behind(analyse(model), inputs, out.past_key_values, (0, 1), 2) is None
    for methods, tokens in (([], 0), ([vlmfix.VHR(alpha=1.2)], 67)):
        vlmfix.patch(model, [*methods, vlmfix.Verify(**STRICT)])
        assert isinstance(answers(model, inputs_of(processor, IMAGES[:1])), torch.Tensor)
        cost = vlmfix.status(model).methods[-1]._judge.questioner.cost
        assert cost.prefix_tokens == tokens and cost.questions and not cost.text_tokens
