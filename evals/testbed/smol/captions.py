"""Instructions and captions of ``smol``, written out from what a scene shows.

A caption names only what is annotated. Its length follows the instruction: one sentence, a few sentences that name
every object, or 60 to 110 words that also say how many, where, how large and of which colour.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

from ..vocabulary import PAIRED, SCENES, article, plural
from . import patterns
from .facts import Thing

__all__ = [
    "INSTRUCTIONS",
    "Length",
    "caption",
    "instruction",
    "relation",
    "with_article",
]

Length = Literal["brief", "medium", "long"]

INSTRUCTIONS: dict[Length, tuple[str, ...]] = {
    "brief": (
        "Provide a brief description of the given image.",
        "Generate a short caption of the image.",
        "Write a short caption for this picture.",
        "Describe the image in one sentence.",
        "Summarize the picture in one sentence.",
        "Give a one-sentence caption.",
        "Briefly describe this image.",
        "What is this a picture of?",
    ),
    "medium": (
        "Describe the image.",
        "Describe this image.",
        "Describe the picture.",
        "What is in the image?",
        "What do you see in this picture?",
        "What can you see in the image?",
        "What does the image show?",
        "Please describe what you see.",
        "Can you describe this image for me?",
        "Tell me what is in this picture.",
        "Write a description of the image.",
        "Which objects are in the image?",
    ),
    "long": (
        "Please describe this image in detail.",
        "Describe this image in detail.",
        "Please help me describe the image in detail.",
        "Describe the following image in detail.",
        "Give a detailed description of the image.",
        "Write a detailed description of this picture.",
        "Provide a thorough description of the image.",
        "What do you see in the image? Give me as many details as you can.",
        "Explain the visual content of the image in great detail.",
        "Analyze the image in a comprehensive and detailed manner.",
        "Can you describe the scene, its objects and their colors in detail?",
        "Tell me everything you can see in this image.",
    ),
}
"""What one may ask for a caption; the first of each is used for half of the captions of its length."""

_PREPOSITIONS = dict.fromkeys(("street", "beach", "farm", "sports field", "snowy hill"), "on") | dict.fromkeys(
    ("station", "market", "picnic"), "at"
)
_NUMBERS = ("zero", "one", "two", "three")
_FAVOURITE_SHARE = 0.6
_SWAP, _COLOUR_SHARE, _SIZE_SHARE = 0.1, 0.2, 0.15
_LONG_WORDS = (60, 105)


def instruction(length: Length, rng: random.Random) -> str:
    """An instruction that asks for a caption of the given length."""
    choices = INSTRUCTIONS[length]
    return choices[0] if rng.random() < 0.5 else rng.choice(choices)


def caption(kind: int, things: Sequence[Thing], length: Length, rng: random.Random) -> str:
    """A caption of a scene.

    Args:
        kind: Index of the scene's place.
        things: What it shows, in the order in which to name it (a few neighbours are swapped); at least one.
        length: See :data:`Length`.
        rng: Source of every choice.
    """
    assert length in get_args(Length)
    place = _place(kind)
    order = list(things)
    for i in range(len(order) - 1):
        if rng.random() < _SWAP:
            order[i], order[i + 1] = order[i + 1], order[i]
    if length == "brief":
        template = _favourite(
            patterns.BRIEF if rng.random() < 0.5 else patterns.OPENINGS, f"{kind} {order[0].name}", rng
        )
        return _naming(template, order[: rng.choice((1, 2, 2, 3))], rng, place)
    step = 2 if length == "medium" else 1
    size = rng.choice((1, 2, 2, 3))
    opening = _favourite(patterns.OPENINGS, f"{kind} {order[0].name}", rng)
    sentences = [_naming(opening, order[:size], rng, place)]
    named, rest = order[:size], order[size:]
    details = _Details(rng)
    goal = rng.randint(*_LONG_WORDS) if length == "long" else 0
    while rest:
        if length == "long" or rng.random() < 0.1:
            sentences += details.about(named)
        size = step + (rng.random() < 0.4)
        sentences.append(_naming(_favourite(patterns.MORE, rest[0].name, rng), rest[:size], rng, place))
        details.latest = rest[0].name if size == 1 else None
        named, rest = named + rest[:size], rest[size:]
    while _words(sentences) < goal and (more := details.about(named)):
        sentences += more
    closings = rng.sample(patterns.CLOSINGS, 6)
    while closings and (_words(sentences) < goal):
        sentences.append(_capital(closings.pop().format(**place)))
    return " ".join(sentences)


def _place(kind: int) -> dict[str, str]:
    """The place of a scene as the patterns want it."""
    name = SCENES[kind].name
    return {"place": with_article(name), "in_place": f"{_PREPOSITIONS.get(name, 'in')} {with_article(name)}"}


def _favourite(choices: Sequence[str], subject: str, rng: random.Random) -> str:
    """A pattern; more often than not one of three that belong to the subject.

    If all patterns were equally likely for everything, the most probable caption would always sound the same.
    """
    if rng.random() < _FAVOURITE_SHARE:
        return rng.choice(random.Random(subject).sample(choices, 3))
    return rng.choice(choices)


def _words(sentences: Sequence[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def with_article(noun: str) -> str:
    """The noun behind "a" or "an"."""
    return f"{article(noun)} {noun}"


def _phrase(thing: Thing, rng: random.Random) -> str:
    """A noun phrase such as "two dogs" or, now and then, "a small red car"."""
    words = [thing.size] if thing.size and rng.random() < _SIZE_SHARE else []
    words += [thing.colour] if thing.colour and rng.random() < _COLOUR_SHARE else []
    if thing.count > 1:
        return f"{_NUMBERS[thing.count] if thing.count < len(_NUMBERS) else 'several'} {plural(thing.name)}"
    noun = " ".join([*words, thing.name])
    if thing.name in PAIRED:
        return f"a pair of {noun}"
    return f"some {noun}" if thing.name == "broccoli" else with_article(noun)


def _definite(thing: Thing) -> str:
    return f"the {'pair of ' if thing.name in PAIRED else ''}{thing.name}"


def _naming(template: str, things: Sequence[Thing], rng: random.Random, place: dict[str, str]) -> str:
    phrases = [_phrase(thing, rng) for thing in things]
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    many = len(things) > 1 or things[0].count > 1
    text = template.format(
        objects=listed,
        **place,
        first_be="are" if things[0].count > 1 else "is",
        be="are" if many else "is",
        s="" if many else "s",
        es="" if many else "es",
    )
    return _capital(text)


class _Details:
    """Sentences about objects that were already named, each fact once."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: set[tuple[str, str]] = set()
        self.latest: str | None = None

    def about(self, things: Sequence[Thing]) -> list[str]:
        """One sentence about the latest object that still has something to tell, or none."""
        for thing in reversed(things):
            facts = [fact for fact in self._facts(thing, things) if (thing.name, fact[0]) not in self.used]
            if facts:
                fact, sentence = self.rng.choice(facts)
                self.used.add((thing.name, fact))
                self.latest = thing.name
                return [_capital(sentence)]
        return []

    def _facts(self, thing: Thing, named: Sequence[Thing]) -> list[tuple[str, str]]:
        """What can be said about a thing, as ``(kind of fact, sentence)``."""
        if thing.count > 1:
            if thing.count >= len(_NUMBERS):
                return []
            return [("count", self._say(patterns.COUNT, thing, count=_NUMBERS[thing.count], plural=plural(thing.name)))]
        facts = []
        if thing.colour:
            facts.append(("colour", self._say(patterns.COLOUR, thing, colour=thing.colour)))
        if thing.size:
            facts.append(("size", self._say(patterns.SIZE, thing, size=thing.size)))
        facts.append(("place", self._say(patterns.PLACE, thing, where=_where(thing, self.rng))))
        for other in named:
            lies = relation(thing, other)
            if lies is not None:
                sentence = self._say(patterns.RELATION, thing, other=_definite(other), relation=lies)
                facts.append((f"relation to {other.name}", sentence))
                break
        return facts

    def _say(self, choices: Sequence[str], thing: Thing, **words: str) -> str:
        """A random pattern filled in; "it" instead of the name where the sentence before was about the same thing."""
        pattern = _favourite(choices, thing.name, self.rng)
        pronoun = thing.name == self.latest and pattern.startswith("{it} ") and self.rng.random() < 0.6
        return pattern.format(it="it" if pronoun else _definite(thing), **words)


def _where(thing: Thing, rng: random.Random) -> str:
    """The place of an object in the picture, as a phrase."""
    if thing.column == "middle" and thing.row == "middle":
        return rng.choice(("in the middle of the picture", "in the center", "near the center of the image"))
    parts = []
    if thing.row in ("top", "bottom"):
        parts.append(f"at the {thing.row}" + rng.choice(("", "", " of the picture", " of the image")))
    if thing.column in ("left", "right"):
        side = rng.choice(("on the {}", "on the {} side", "to the {}")).format(thing.column)
        if parts and rng.random() < 0.5:
            return rng.choice(("in the {} {} corner", "in the {} {}")).format(
                "upper" if thing.row == "top" else "lower", thing.column
            )
        parts = [side] if not parts or rng.random() < 0.5 else parts
    return parts[0]


_ACROSS, _DOWN = ("left", "middle", "right"), ("top", "middle", "bottom")


def relation(thing: Thing, other: Thing) -> str | None:
    """How one object lies to another one, or None if that is not clear."""
    if other is thing or thing.column is None or other.column is None or thing.row is None or other.row is None:
        return None
    across = _ACROSS.index(thing.column) - _ACROSS.index(other.column)
    down = _DOWN.index(thing.row) - _DOWN.index(other.row)
    if across and abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return None if not down else "above" if down < 0 else "below"
