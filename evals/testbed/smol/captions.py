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
_FAVOURITES = (0.6, 0.2, 0.1)
_SWAP, _EARLY, _REMARKED = 0.1, 0.15, 0.7
_COLOUR_SHARE, _SIZE_SHARE, _PLACE_SHARE, _RELATION_SHARE, _COUNT_SHARE = 0.3, 0.15, 0.25, 0.2, 0.3
_LONG_WORDS = (60, 100)


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
    writer = _Writer(kind, rng)
    order = _told(things, kind, rng)
    if length == "brief":
        return writer.brief(order)
    return writer.medium(order) if length == "medium" else writer.long(order)


def _told(things: Sequence[Thing], kind: int, rng: random.Random) -> list[Thing]:
    """The order in which to name things: a few neighbours swapped, what is unusual for the place last or anywhere."""
    order = list(things)
    for i in range(len(order) - 1):
        if rng.random() < _SWAP:
            order[i], order[i + 1] = order[i + 1], order[i]
    for thing in things:
        if thing.name not in SCENES[kind].typical and rng.random() < _EARLY:
            order.remove(thing)
            order.insert(rng.randint(0, len(order)), thing)
    return order


def _favourite(choices: Sequence[str], subject: str, rng: random.Random) -> str:
    """A pattern; more often than not one of three that belong to the subject, and of these mostly the first.

    If all patterns were equally likely for everything, the most probable caption would always sound the same.
    """
    draw = rng.random()
    for pattern, share in zip(random.Random(subject).sample(choices, len(_FAVOURITES)), _FAVOURITES, strict=True):
        if draw < share:
            return pattern
        draw -= share
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
    if thing.name == "broccoli":
        return "some broccoli"  # after "a green" hardly anything else is to be expected
    noun = " ".join([*words, thing.name])
    return f"a pair of {noun}" if thing.name in PAIRED else with_article(noun)


def _definite(thing: Thing) -> str:
    return f"the {'pair of ' if thing.name in PAIRED else ''}{thing.name}"


class _Writer:
    """Sentences of one caption; no pattern is used twice, and no fact is told twice.

    Args:
        kind: Index of the scene's place.
        rng: Source of every choice.
    """

    def __init__(self, kind: int, rng: random.Random) -> None:
        self.kind, self.rng, self.used = kind, rng, set[str]()
        self.subject = str(kind)
        name = SCENES[kind].name
        self.place = {"place": with_article(name), "in_place": f"{_PREPOSITIONS.get(name, 'in')} {with_article(name)}"}

    def brief(self, things: Sequence[Thing]) -> str:
        """One sentence about one to three things."""
        choices = patterns.BRIEF if self.rng.random() < 0.5 else patterns.OPENINGS
        return self._naming(choices, things[: self.rng.choice((1, 2, 2, 3))], self.subject)

    def medium(self, things: Sequence[Thing]) -> str:
        """A few sentences that name everything."""
        size = self.rng.choice((1, 2, 2, 3))
        sentences = [self._naming(patterns.OPENINGS, things[:size], self.subject)]
        rest = list(things[size:])
        unusual = self._split_off_unusual(rest)
        while rest:
            size = 1 if self.rng.random() < 0.3 else 2 + (self.rng.random() < 0.4)
            sentences.append(self._more(rest[:size], len(sentences)))
            if size == 1 and self.rng.random() < 0.2:
                sentences += self._details(rest[0], things, 1, clear=True)
            rest = rest[size:]
        if unusual:
            sentences.append(self._naming(patterns.UNUSUAL, unusual, self.subject))
        return " ".join(sentences)

    def _split_off_unusual(self, rest: list[Thing]) -> list[Thing]:
        """Take the things at the end that are not typical of the place out of a list, more often than not."""
        unusual: list[Thing] = []
        if self.rng.random() < _REMARKED:
            while rest and rest[-1].name not in SCENES[self.kind].typical:
                unusual.insert(0, rest.pop())
        return unusual

    def long(self, things: Sequence[Thing]) -> str:
        """Everything one after the other, each with its own details, and an end."""
        size = min(len(things), self.rng.choice((1, 1, 2)))
        sentences = [self._naming(patterns.OPENINGS, things[:size], self.subject)]
        goal = self.rng.randint(*_LONG_WORDS)
        rest, named = list(things[size:]), list(things[:size])
        unusual = self._split_off_unusual(rest)
        for index, thing in enumerate(things):
            if index >= size:
                if thing in unusual:
                    sentences.append(self._naming(patterns.UNUSUAL, [thing], self.subject))
                else:
                    sentences.append(self._more([thing], index))
                named.append(thing)
            # Whatever is told of an object is told at once, so that a caption never needs to come back to it.
            share = max(0, goal - _words(sentences)) / (7 * (len(things) - index))
            count = min(int(share + self.rng.random()), 1 if len(things) > 3 else 2)
            sentences += self._details(thing, named, count, clear=index >= size)
        closings = patterns.CLOSINGS
        if _words(sentences) < goal and self.rng.random() < 0.7:
            moods = [text for text in closings if not text.startswith("Overall")]
            sentences.append(_capital(self._pick(moods, self.subject).format(**self.place)))
        if _words(sentences) < goal or self.rng.random() < 0.3:
            ends = [text for text in closings if text.startswith("Overall")]
            sentences.append(_capital(self._pick(ends, self.subject).format(**self.place)))
        return " ".join(sentences)

    def _pick(self, choices: Sequence[str], subject: str) -> str:
        fresh = [text for text in choices if text not in self.used]
        for _ in range(4):
            if (pattern := _favourite(choices, subject, self.rng)) not in self.used:
                break
        else:
            pattern = self.rng.choice(fresh or choices)
        self.used.add(pattern)
        return pattern

    def _more(self, things: Sequence[Thing], index: int) -> str:
        """A later sentence that names things, one alone now and then with its place in the picture."""
        thing, subject = things[0], f"{self.subject} {index}"
        if len(things) == 1 and thing.row and self.rng.random() < _PLACE_SHARE:
            self.used.add(f"place of {thing.name}")
            return self._naming(patterns.PLACED, things, subject, where=_where(thing, self.rng))
        return self._naming(patterns.MORE, things, subject)

    def _naming(self, choices: Sequence[str], things: Sequence[Thing], subject: str, **words: str) -> str:
        phrases = [_phrase(thing, self.rng) for thing in things]
        for thing, phrase in zip(things, phrases, strict=True):
            self.used |= {
                f"{fact} of {thing.name}"
                for fact, word in (("colour", thing.colour), ("size", thing.size))
                if word and word in phrase.split()
            }
        listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
        many = len(things) > 1 or things[0].count > 1
        text = self._pick(choices, subject).format(
            objects=listed,
            **self.place,
            **words,
            first_be="are" if things[0].count > 1 else "is",
            be="are" if many else "is",
            s="" if many else "s",
            es="" if many else "es",
        )
        return _capital(text)

    def _details(self, thing: Thing, others: Sequence[Thing], count: int, clear: bool) -> list[str]:
        """At most ``count`` sentences about a thing that was just named, each with another fact.

        ``clear`` says that the sentence before was about this thing alone, so that "it" can begin the first one.
        """
        sentences: list[str] = []
        facts = self._facts(thing, others)
        chosen = self.rng.sample(sorted(facts), min(count, len(facts)))
        for fact in [
            fact for fact in facts if fact in chosen
        ]:  # in one order, so that it is clear what is still to tell
            choices, words = facts[fact]
            pattern = self._pick(choices, thing.name)
            pronoun = (clear or bool(sentences)) and pattern.startswith("{it} ") and self.rng.random() < 0.2
            sentences.append(_capital(pattern.format(it="it" if pronoun else _definite(thing), **words)))
        return sentences

    def _facts(self, thing: Thing, others: Sequence[Thing]) -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
        """What was not yet said about a thing: kind of fact to patterns and words."""
        if thing.count > 1:
            if thing.count >= len(_NUMBERS) or self.rng.random() > _COUNT_SHARE:
                return {}
            return {"count": (patterns.COUNT, {"count": _NUMBERS[thing.count], "plural": plural(thing.name)})}
        facts: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
        if thing.colour:
            facts["colour"] = patterns.COLOUR, {"colour": thing.colour}
        if thing.size:
            facts["size"] = patterns.SIZE, {"size": thing.size}
        facts["place"] = patterns.PLACE, {"where": _where(thing, self.rng)}
        lying = [(other, lies) for other in others if (lies := relation(thing, other)) is not None]
        if lying and self.rng.random() < _RELATION_SHARE:
            other, lies = self.rng.choice(lying)
            facts["relation"] = patterns.RELATION, {"other": _definite(other), "relation": lies}
        return {fact: words for fact, words in facts.items() if f"{fact} of {thing.name}" not in self.used}


def _where(thing: Thing, rng: random.Random) -> str:
    """The height of an object in the picture, as a phrase.

    Left and right are not told: the vision tower's patches hardly say where they are, and from the order of the tokens
    the language model learns rows alone.
    """
    if thing.row == "middle":
        return rng.choice(("in the middle", "halfway up", "near the center"))
    part = "upper" if thing.row == "top" else "lower"
    whole = rng.choice(("at the {row}", "near the {row}", "in the {part} part", "in the {part} half"))
    return whole.format(row=thing.row, part=part)


_DOWN = ("top", "middle", "bottom")


def relation(thing: Thing, other: Thing) -> str | None:
    """How one object lies to another one, or None unless they are at the top and at the bottom of the picture."""
    if other.name == thing.name or thing.row is None or other.row is None:
        return None
    down = _DOWN.index(thing.row) - _DOWN.index(other.row)
    return None if abs(down) < 2 else "above" if down < 0 else "below"
