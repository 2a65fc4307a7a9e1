"""Sentences without some of their phrases: grammar by examples, and what holds for every text."""

from __future__ import annotations

import random

import pytest

from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.verification.leave_out import leave_out
from vlmfix.verification.phrases import read_sentences


def without(text: str, *names: str) -> str:
    return leave_out(text, lambda phrase: phrase.name in names)


@pytest.mark.parametrize(
    ("text", "gone", "left"),
    [
        ("There is a car, a bus and a dog.", "bus", "There is a car and a dog."),
        ("There is a car and two dogs.", "car", "There are two dogs."),
        ("There are two dogs, a car, and a bus.", "dog", "There is a car and a bus."),
        ("A car and a bus are visible.", "car", "A bus is visible."),
        ("A car and a bus complete the scene.", "bus", "A car completes the scene."),
        ("The image shows a kitchen with a sink and an oven.", "sink", "The image shows a kitchen with an oven."),
        ("The image shows a kitchen with a sink.", "sink", "The image shows a kitchen."),
        ("A woman holding a red umbrella sits on a bench.", "umbrella", "A woman sits on a bench."),
        ("A car is parked on the street, and a truck is visible.", "car", "A truck is visible."),
        ("A truck is visible, and a car is parked on the street.", "car", "A truck is visible."),
        ("The photo was taken in a kitchen, where a sink can be seen.", "sink", "The photo was taken in a kitchen."),
        ("There is a bench. The bench is to the left of a dog.", "dog", "There is a bench."),
        ("There is a bench. A dog is next to it. It is brown.", "dog", "There is a bench."),
        ("A woman is holding a dog.", "dog", "There is a woman."),
        ("Looking above the dog, one finds a car.", "dog", "One finds a car."),
        ("The color of the car is red. A dog sleeps.", "car", "A dog sleeps."),
        ("A dog sleeps.", "dog", ""),
        ("In this image, a cup and a dog are seen.", "cup", "In this image, a dog is seen."),
        ("A sheep and a dog are visible.", "dog", "A sheep is visible."),
        ("A boy is in the middle of throwing a ball.", "ball", "A boy is in the middle."),
        ("Two bears sit here, with some of them sitting on a boat.", "boat", "Two bears sit here."),
        (
            "Bears are here, with some holding a cup and others sleeping.",
            "cup",
            "Bears are here, with others sleeping.",
        ),
    ],
)
def test_what_stays_of_a_sentence(text: str, gone: str, left: str) -> None:
    assert without(text, gone) == left


CAPTIONS = (
    "The image features a woman sitting at a dining table, taking a picture of a pizza with her camera. The pizza is "
    "placed on a plate in front of her.\n\nA bench is visible in the background, and a chair can be seen close to the "
    "table. Additionally, there are two bottles on the table, one near the center and the other on the right.",
    "The image was taken in a bakery, where a cake can be seen. A sandwich and a hot dog are not far away. The hot dog "
    "is located to the right of the cake. It is yellow. A person is visible too.",
    "Two dogs and a cat lie on a couch next to a laptop, while a man holding a cup watches tv. He wears a tie",
)


@pytest.mark.parametrize("text", CAPTIONS)
def test_no_object_is_new_and_none_that_is_doubted_stays(text: str) -> None:
    matcher, rng = ChairMatcher("original"), random.Random(0)
    names = sorted({phrase.name for each in read_sentences(text) for phrase in each.phrases if phrase.is_object})
    assert without(text) == text
    for _ in range(60):
        gone = {name for name in names if rng.random() < 0.3}
        left = without(text, *gone)
        kept = {phrase.name for each in read_sentences(left) for phrase in each.phrases if phrase.is_object}
        assert kept <= set(names) - gone
        assert set(matcher.match(left).nodes) <= set(matcher.match(text).nodes)
        for sentence in read_sentences(left):
            said = left[sentence.start : sentence.end]
            assert said[0].isupper() and "  " not in said and " ," not in said and ",." not in said
        if not gone:
            assert left == text
