"""LQCD: which clauses lead, whose answer it is, and what a tokenizer is needed for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import collate, generate, sample

import vlmfix
from vlmfix.decoding.lqcd import neutral

NEUTRAL = (
    "Is there a dog in the image?",
    "Please describe this image in detail.",
    "USER: <image>\nHow many cats are there? Answer with one word. ASSISTANT:",
    "What do you think of the man's expression?",
    "Is the sky clear, or does it look like rain?",
    "",
    "no words here",
)
LEADING = (
    ("Is there a dog in the image? I don't think so.", "Is there a dog in the image?"),
    ("Is there a dog? It seems that there is none.", "Is there a dog?"),
    ("I'm sure there is a dog. Is there a dog?", "Is there a dog?"),
    ("There is a dog, isn't there?", "There is a dog?"),
    ("It seems empty, is there anybody?", "is there anybody?"),
    ("Is there a dog? But I believe it is a cat! I am pretty sure.", "Is there a dog?"),
    ("Is it red? I think it is ASSISTANT:", "Is it red? ASSISTANT:"),
    ("Is it red, right?", "Is it red?"),
)


@pytest.mark.parametrize("text", NEUTRAL)
def test_neutral_questions_stay(text: str) -> None:
    assert neutral(text) == text


@pytest.mark.parametrize(("text", "expected"), LEADING)
def test_leading_clauses_go_and_what_is_left_is_neutral(text: str, expected: str) -> None:
    found = neutral(text)
    assert " ".join(found.split()) == expected
    assert neutral(found) == found


def test_a_pattern_of_the_users_own() -> None:
    text = "Is there a dog? My friend told me."
    assert neutral(text) == text
    assert neutral(text, [r"\s*my friend [^.]*\."]) == "Is there a dog?"
    with pytest.raises(vlmfix.MethodError, match="patterns"):
        vlmfix.LQCD(patterns=["("])


def test_a_text_that_only_asserts_stays() -> None:
    assert neutral("I think there is a dog.") == "I think there is a dog."


# Whose answer it is, in a model with a tokenizer.


@pytest.fixture
def spoken(processor_folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(processor_folder), AutoProcessor.from_pretrained(
        processor_folder
    )


def encoded(processor: Any, *texts: str) -> Any:
    from PIL import Image

    picture = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = [[Image.fromarray(picture.numpy())] for _ in texts]
    processor.tokenizer.padding_side = "left"
    return processor(
        images=images, text=[f"user : <image> {each} assistant :" for each in texts], padding=True, return_tensors="pt"
    )


def logits_of(model: Any, inputs: Any) -> torch.Tensor:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits, 1)


QUESTION = "is there a dog in the picture ?"
HINT = "no dog is in this picture ."
HINTED = f"{QUESTION} {HINT}"
RULES = [r"no dog [^.]*\."]
"""The tiny tokenizer has no words for opinions."""


def test_without_strength_a_leading_question_is_answered_as_its_neutral_form(spoken: Any) -> None:
    model, processor = spoken
    expected = logits_of(model, encoded(processor, QUESTION))
    leading = logits_of(model, encoded(processor, HINTED))
    assert (leading - expected).abs().max() > 0.05
    vlmfix.patch(model, "lqcd", alpha=0.0, beta=0.0, patterns=RULES)
    torch.testing.assert_close(logits_of(model, encoded(processor, HINTED)), expected, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(model, encoded(processor, QUESTION)), expected, atol=5e-5, rtol=1e-5)
    vlmfix.patch(model, "lqcd", alpha=0.0, beta=0.0, neutralise=False, patterns=RULES)
    assert torch.equal(logits_of(model, encoded(processor, HINTED)), leading)


def test_a_leading_question_and_its_neutral_form_with_that_hint_are_contrasted_alike(spoken: Any) -> None:
    """Which of the pair the user asks makes no difference; the first contrast is (1 + alpha) l_n - alpha l_l."""
    model, processor = spoken
    plain, leading = (logits_of(model, encoded(processor, text))[:, 0] for text in (QUESTION, HINTED))
    vlmfix.patch(model, "lqcd", beta=0.0, alpha=0.7, hint=HINT, patterns=RULES)
    asked = [logits_of(model, encoded(processor, text)) for text in (QUESTION, HINTED)]
    torch.testing.assert_close(asked[0][:, 0], 1.7 * plain - 0.7 * leading, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(asked[0], asked[1], atol=5e-5, rtol=1e-5)
    together = logits_of(model, encoded(processor, HINTED, "describe this picture .", QUESTION))
    torch.testing.assert_close(together[0], asked[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[2], asked[0][0], atol=1e-5, rtol=1e-5)
    alone = logits_of(model, encoded(processor, "describe this picture ."))
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)


def test_the_cut_is_by_the_neutral_question(spoken: Any) -> None:
    model, processor = spoken
    neutral_choice = logits_of(model, encoded(processor, QUESTION))[0, 0].argmax()
    vlmfix.patch(model, "lqcd", beta=1.0, alpha=3.0, patterns=RULES)
    first = logits_of(model, encoded(processor, HINTED))[0, 0]
    assert first.isfinite().nonzero().flatten().tolist() == [int(neutral_choice)]


def test_a_pair_without_a_difference_gives_plain_logits(tiny: Any) -> None:
    """Nothing to contrast: identical prompts, whatever the strength."""

    class Same(vlmfix.LQCD):
        def other_tokens(self, ids: Any, is_image: Any) -> Any:
            from vlmfix.decoding.base import OtherTokens

            return OtherTokens(tuple(ids), tuple(range(len(ids))))

    inputs = collate([sample(3, 1, 6, seed=1)])
    stock = generate(tiny, inputs)[1]
    vlmfix.patch(tiny, Same(hint=[5], behind=0, neutralise=False, beta=0.0, alpha=4.0))
    torch.testing.assert_close(generate(tiny, inputs)[1], stock, atol=5e-5, rtol=1e-5)


def test_a_model_without_a_tokenizer_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(vlmfix.MethodError, match="tokenizer="):
        vlmfix.patch(tiny, "lqcd")
    with pytest.raises(vlmfix.MethodError, match="tokenizer="):
        vlmfix.patch(tiny, "lqcd", tokenizer=str(tmp_path))
    assert vlmfix.status(tiny) is None


def test_decoding_without_a_cache_is_refused(tiny: Any) -> None:
    """There an answer cannot be told from the question."""
    vlmfix.patch(tiny, "lqcd", hint=[20], behind=0, neutralise=False)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="use_cache"):
        generate(tiny, collate([sample(3, 1, 6, seed=1)]), use_cache=False)


@pytest.mark.parametrize("wrong", [{"hint": ""}, {"hint": [1.5]}, {"behind": -1}, {"tokenizer": 3}, {"patterns": "x"}])
def test_wrong_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(vlmfix.MethodError, match=next(iter(wrong))):
        vlmfix.LQCD(**wrong)


# ICD writes words too.


def test_icd_writes_its_words_behind_the_image(build: Any, processor_folder: Any) -> None:
    from transformers import AutoTokenizer

    model = build()
    words = AutoTokenizer.from_pretrained(processor_folder)
    text = "there is a dog"
    vlmfix.patch(model, vlmfix.ICD(disturbance=text, tokenizer=str(processor_folder)))
    (bound,) = vlmfix.status(model).methods
    ids, is_image = [1, 9, 9, 5, 6], [False, True, True, False, False]
    disturbed = words.encode(f" {text}", add_special_tokens=False)
    found = bound.other_tokens(ids, is_image)
    assert found.ids == (1, 9, 9, *disturbed, 5, 6) and not found.is_swapped
    assert found.sources == (0, 1, 2, *[-1] * len(disturbed), 3, 4)
    assert bound.other_tokens([5, 6], [False, False]).ids == (5, 6), "a further turn is disturbed already"
    with pytest.raises(vlmfix.MethodError, match="icd reads or writes words"):
        vlmfix.patch(model, vlmfix.ICD(disturbance=text))
    with pytest.raises(vlmfix.MethodError, match="disturbance"):
        vlmfix.ICD(disturbance="")
