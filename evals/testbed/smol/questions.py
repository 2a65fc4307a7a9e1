"""Questions about a scene with short answers: what exists, how many, of which colour, and where."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..scenes import NAMES
from ..vocabulary import PAIRED, SCENES, plural
from .captions import relation, with_article
from .facts import Thing

__all__ = ["TAUGHT", "Question", "existence_questions", "other_questions"]

_ONE_WORD = (
    "\nAnswer the question using a single word or phrase.",
    "\nPlease answer this question with one word.",
    " Please answer yes or no.",
    " Answer with yes or no.",
)
_SAYS_ANY = 2  # the first suffixes fit every question


@dataclass(frozen=True)
class Question:
    """A question with its short answer.

    Attributes:
        kind: ``"existence"``, ``"count"``, ``"colour"``, ``"column"``, ``"row"``, ``"relation"`` or ``"unusual"``.
        text: The question.
        answer: One word, such as ``"Yes"``, ``"2"``, ``"red"``, ``"left"``.
        name: The object asked about.
    """

    kind: str
    text: str
    answer: str
    name: str


_EXISTENCE = (
    "Is there {a} in the image?",
    "Is there {a} in this picture?",
    "Do you see {a} in the image?",
    "Can you see {a} in this picture?",
    "Does the image show {a}?",
    "Does this image contain {a}?",
)
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "count": (
        "How many {plural} are there in the image?",
        "How many {plural} are in the picture?",
        "What is the number of {plural} in this image?",
    ),
    "colour": (
        "What color is the {name}?",
        "What is the color of the {name} in the image?",
        "Which color does the {name} have?",
    ),
    "column": (
        "Is the {name} on the left or on the right side of the image?",
        "On which side of the picture is the {name}, left or right?",
    ),
    "row": (
        "Is the {name} at the top or at the bottom of the image?",
        "Where is the {name}, at the top or at the bottom?",
    ),
    "relation": (
        "Is the {name} {relation} the {other}?",
        "Is the {name} located {relation} the {other} in the image?",
    ),
    "unusual": (
        "What is unusual about this picture?",
        "What would one not expect in such a place?",
        "Which object does not belong here?",
    ),
}
TAUGHT = ("count", "colour", "row", "relation", "unusual")
"""The kinds of :func:`other_questions` that are in the training: the tower's features do not tell left from right."""

_OPPOSITE = {"above": "below", "below": "above"}


def _suffixed(text: str, rng: random.Random, any_answer: bool) -> tuple[str, bool]:
    """A question with or without a request for a short answer, and whether it has one."""
    draw = rng.random()
    if draw < 0.5:
        return text, False
    suffix = _ONE_WORD[0] if draw < 0.8 else rng.choice(_ONE_WORD[:_SAYS_ANY] if any_answer else _ONE_WORD)
    return text + suffix, True


def existence_questions(
    kind: int, things: Sequence[Thing], rng: random.Random, count: int, typical_share: float
) -> list[Question]:
    """Questions for present and absent objects, equally many.

    Args:
        kind: Index of the scene's place.
        things: What it shows.
        rng: Source of every choice.
        count: Number of questions, or twice the number of things if that is less.
        typical_share: Share of the absent objects that are typical of the place; the others never are.
    """
    present = [thing.name for thing in things]
    positives = rng.sample(present, min(len(present), count // 2))
    expected = [name for name in SCENES[kind].typical if name not in present]
    unexpected = [name for name in NAMES if name not in present and name not in expected]
    negatives: list[str] = []
    while len(negatives) < len(positives):
        name = rng.choice(expected if expected and rng.random() < typical_share else unexpected)
        if name not in negatives:
            negatives.append(name)
    asked = []
    for name, found in [(name, True) for name in positives] + [(name, False) for name in negatives]:
        text = (_EXISTENCE[0] if rng.random() < 0.7 else rng.choice(_EXISTENCE)).format(a=with_article(name))
        text, short = _suffixed(text, rng, any_answer=False)
        answer = "Yes" if found else "No"
        if not short and rng.random() < 0.15:
            answer += (
                f", there is {with_article(name)} in the image." if found else f", there is no {name} in the image."
            )
        asked.append(Question("existence", text, answer, name))
    rng.shuffle(asked)
    return asked


def other_questions(
    kind: int, things: Sequence[Thing], rng: random.Random, count: int, kinds: Sequence[str] = tuple(_QUESTIONS)
) -> list[Question]:
    """Questions about number, colour and place, at most one of a kind for each object, the kinds taking turns."""
    asked: dict[str, list[Question]] = {name: [] for name in _QUESTIONS}
    for thing in things:
        if thing.name not in PAIRED:
            asked["count"].append(_ask("count", thing.name, str(thing.count), rng))
        if thing.colour:
            asked["colour"].append(_ask("colour", thing.name, thing.colour.capitalize(), rng))
        if thing.column in ("left", "right"):
            asked["column"].append(_ask("column", thing.name, thing.column.capitalize(), rng))
        if thing.row in ("top", "bottom"):
            asked["row"].append(_ask("row", thing.name, thing.row.capitalize(), rng))
        lying = [(other, lies) for other in things if (lies := relation(thing, other)) is not None]
        if lying:
            other, lies = rng.choice(lying)
            true = rng.random() < 0.5
            words = {"relation": lies if true else _OPPOSITE[lies], "other": other.name}
            asked["relation"].append(_ask("relation", thing.name, "Yes" if true else "No", rng, **words))
    strange = [thing.name for thing in things if thing.name not in SCENES[kind].typical]
    if strange or rng.random() < 0.3:
        name = rng.choice(strange) if strange else ""
        asked["unusual"].append(_ask("unusual", name, name.capitalize() or "Nothing", rng))
    # Nearly all counts are one: keep those of several, and half as many others.
    several = [question for question in asked["count"] if question.answer != "1"]
    single = [question for question in asked["count"] if question.answer == "1"]
    absent = [name for name in SCENES[kind].typical if name not in {thing.name for thing in things} | PAIRED]
    if absent and rng.random() < 0.15:
        several.append(_ask("count", rng.choice(absent), "0", rng))
    asked["count"] = several + rng.sample(single, min(len(single), (len(several) + 1) // 2))
    turns = rng.sample(sorted(kinds), len(kinds))
    for questions in asked.values():
        rng.shuffle(questions)
    in_turn = [asked[name][turn] for turn in range(len(things)) for name in turns if turn < len(asked[name])]
    return in_turn[:count]


def _ask(kind: str, name: str, answer: str, rng: random.Random, **words: str) -> Question:
    template = rng.choice(_QUESTIONS[kind])
    text, _ = _suffixed(template.format(name=name, plural=plural(name), **words), rng, any_answer=kind != "relation")
    return Question(kind, text, answer, name)
