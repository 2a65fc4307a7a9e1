"""The words of an answer, the tokens that spell them, and the groups of layers that maps are averaged over."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmfix.observe.words import token_ends

if TYPE_CHECKING:
    from vlmfix.observe.words import Mention


GROUPS = ("all layers", "first third", "middle third", "last third")
"""Layers a map is averaged over."""


@dataclass(frozen=True)
class Span:
    """A word in a text and the tokens that spell it."""

    text: str
    tokens: tuple[int, ...]


def word_spans(tokenizer: Any, ids: Sequence[int], text: str, part: slice = slice(None)) -> list[Span]:
    """Split a part of a text at white space; a word's tokens are those that spell it without punctuation around it."""
    ends = token_ends(tokenizer, ids, text)
    begins = [0, *ends[:-1]]
    found = []
    for match in re.compile(r"\S+").finditer(text, *part.indices(len(text))[:2]):
        core = re.search(r"\w(?:.*\w)?", match[0])
        first, last = match.span() if core is None else (match.start() + core.start(), match.start() + core.end())
        spelt = tuple(i for i, (a, b) in enumerate(zip(begins, ends, strict=True)) if a < last and b > first and b > a)
        if spelt:
            found.append(Span(match[0], spelt))
    return found


def bare(text: str) -> str:
    """Return the letters and digits of a word, lower-cased."""
    return re.sub(r"\W", "", text).lower()


def word_of(spans: Sequence[Span], token: int) -> Span:
    """Return the word that a token helps to spell; one without text if none does."""
    return next((span for span in spans if token in span.tokens), Span("", (token,)))


def context_of(spans: Sequence[Span], mentions: Sequence[Mention], scene_words: Container[str]) -> list[int]:
    """Return the tokens of an answer that name objects or the place: what a language prior goes by."""
    tokens = {token for mention in mentions for token in word_of(spans, mention.token).tokens}
    return sorted(tokens | {token for span in spans if bare(span.text) in scene_words for token in span.tokens})


def layer_groups(num_layers: int) -> tuple[range, ...]:
    """Return the places of the layers of each of ``GROUPS``; fewer than three layers are all in each."""
    if num_layers < 3:
        return (range(num_layers),) * len(GROUPS)
    cuts = [round(third * num_layers / 3) for third in range(4)]
    return (range(num_layers), *(range(a, b) for a, b in itertools.pairwise(cuts)))
