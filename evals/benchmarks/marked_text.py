"""Answers with the objects that they name marked, for the gallery of a report."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .coco_objects import ChairMatcher, double_words


@dataclass(frozen=True)
class Part:
    """A piece of a text; ``kind`` is ``"invented"`` or ``"present"`` for the object ``name``, else empty."""

    text: str
    kind: str = ""
    name: str = ""


@dataclass(frozen=True)
class MarkedText:
    """A text in parts, and the objects that it names and that are not there, sorted."""

    parts: tuple[Part, ...]
    invented: tuple[str, ...]


def mark_objects(matcher: ChairMatcher, present: Collection[str], text: str) -> MarkedText:
    """Mark the COCO objects of a text, as far as their place in it is known.

    Args:
        matcher: Finds them.
        present: The objects in the image.
        text: The text.
    """
    return MarkedText(tuple(_parts(matcher, present, text)), tuple(sorted({*matcher.match(text).nodes} - {*present})))


def _parts(matcher: ChairMatcher, present: Collection[str], text: str) -> Iterator[Part]:
    start = 0
    for word, node in matcher.as_written(text):
        found = re.search(rf"\b{re.escape(word)}\b", text[start:], re.IGNORECASE)
        if found is None:
            continue
        yield Part(text[start : start + found.start()])
        end = start + found.end() + _second_word(found[0], text[start + found.end() :])
        yield Part(text[start + found.start() : end], "present" if node in present else "invented", node)
        start = end
    yield Part(text[start:])


def _second_word(first: str, rest: str) -> int:
    """How many characters of the rest belong to a name of two words that ``first`` begins; 0 for none."""
    following = re.match(r"\s+(\w+)", rest)
    if following is None:
        return 0
    names = {f"{first} {form}".lower() for form in (following[1], following[1].removesuffix("s"))}
    return following.end() if names & double_words().keys() else 0
