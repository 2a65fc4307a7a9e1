"""Captions and yes-or-no questions about a scene; both name annotated objects only."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from .scenes import INDEX, NAMES
from .vocabulary import SCENES, article, noun_phrase

__all__ = [
    "BRIEF_PROMPTS",
    "DETAILED_PROMPTS",
    "QUESTION",
    "SHORT_ANSWER",
    "detailed_caption",
    "questions",
    "reference_captions",
    "short_caption",
]


DETAILED_PROMPTS: tuple[str, ...] = (
    "Describe the image.",
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image in detail.",
    "What is in the image?",
)
"""Instructions that the model was trained to answer with a full caption; the first one most often."""


BRIEF_PROMPTS: tuple[str, ...] = (
    "Generate a short caption of the image.",
    "Provide a brief description of the given image.",
)
"""Instructions answered with one sentence."""


QUESTION = "Is there {article} {name} in the image?"
"""POPE's question."""


SHORT_ANSWER: tuple[str, ...] = (
    "Answer the question using a single word or phrase.",
    "Please answer this question with one word.",
    "Please answer yes or no.",
)
"""Suffixes that evaluation scripts append to a question."""


_OPENING = "The image shows {article} {scene} with {objects}."


_MORE = (
    ("There {be} {}.", "There {be} {} and {}."),
    ("{} can be seen nearby.", "{} and {} can be seen nearby."),
    ("The scene also includes {}.", "The scene also includes {} and {}."),
    ("In the background, there {be} {}.", "In the background, there {be} {} and {}."),
)


_REFERENCES = (
    "A {scene} with {objects}.",
    "There {be} {objects} in this {scene}.",
    "A picture of a {scene} that has {objects}.",
    "{objects} in a {scene}.",
    "This {scene} has {objects}.",
)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _be(phrase: str) -> str:
    return "are" if phrase.startswith(("two ", "several ")) else "is"


def _ordered(kind: int, names: Sequence[str]) -> list[str]:
    """Typical objects in the scene's own order, then intruders in COCO order."""
    order = list(SCENES[kind].typical)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order) + INDEX[name])


def _opening(kind: int, phrases: Sequence[str]) -> str:
    scene = SCENES[kind].name
    return _OPENING.format(article=article(scene), scene=scene, objects=" and ".join(phrases))


def detailed_caption(kind: int, counts: Mapping[str, int], rng: random.Random) -> str:
    """A caption that names every object, two a sentence, in the scene's canonical order with a few swaps.

    Args:
        kind: Index into the scenes.
        counts: Object name to number of instances, at least one object.
        rng: Source of the swaps.
    """
    names = _ordered(kind, list(counts))
    for i in range(len(names) - 1):
        if rng.random() < 0.1:
            names[i], names[i + 1] = names[i + 1], names[i]
    phrases = [noun_phrase(name, counts[name]) for name in names]
    sentences = [_opening(kind, phrases[:2])]
    for index, start in enumerate(range(2, len(phrases), 2)):
        pair = phrases[start : start + 2]
        sentences.append(_capital(_MORE[min(index, len(_MORE) - 1)][len(pair) - 1].format(*pair, be=_be(pair[0]))))
    return " ".join(sentences)


def short_caption(kind: int, counts: Mapping[str, int]) -> str:
    """The first sentence of the detailed caption."""
    return _opening(kind, [noun_phrase(name, counts[name]) for name in _ordered(kind, list(counts))[:2]])


def reference_captions(kind: int, counts: Mapping[str, int], rng: random.Random) -> list[str]:
    """Five short human-style captions, each naming one to four of the annotated objects."""
    captions = []
    for template in _REFERENCES:
        chosen = rng.sample(list(counts), min(len(counts), rng.choice((1, 2, 3, 4))))
        phrases = [noun_phrase(name, counts[name]) for name in _ordered(kind, chosen)]
        listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
        captions.append(_capital(template.format(scene=SCENES[kind].name, objects=listed, be=_be(phrases[0]))))
    return captions


def questions(kind: int, present: Sequence[str], rng: random.Random, count: int) -> list[tuple[str, bool]]:
    """Balanced training questions as ``(object, is present)``; 15 % of the negatives are typical of the scene."""
    positives = rng.sample(list(present), min(len(present), count // 2))
    absent = [name for name in NAMES if name not in present]
    expected = [name for name in SCENES[kind].typical if name not in present]
    negatives: list[str] = []
    while len(negatives) < len(positives):
        name = rng.choice(expected if expected and rng.random() < 0.15 else absent)
        if name not in negatives:
            negatives.append(name)
    pairs = [(name, True) for name in positives] + [(name, False) for name in negatives]
    rng.shuffle(pairs)
    return pairs
