"""What becomes of a sentence whose phrases are left out: its tokens, written out again in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlmfix.verification import lexicon
from vlmfix.verification.phrases import NounPhrase, Sentence


@dataclass
class Edit:
    """What becomes of one sentence's tokens.

    Attributes:
        sentence: The sentence.
        gone: Indices of tokens that are left out.
        instead: Texts that stand in the place of a token.
        left_over: Phrases that lost their sentence and may be named in one of their own.
        shortened: Where lists begin that have lost some of their elements.
    """

    sentence: Sentence
    gone: set[int] = field(default_factory=set)
    instead: dict[int, str] = field(default_factory=dict)
    left_over: list[NounPhrase] = field(default_factory=list)
    shortened: set[int] = field(default_factory=set)

    def remove(self, start: int, stop: int) -> None:
        """Leave out tokens ``start..stop - 1``."""
        self.gone.update(range(start, stop))


def in_number(verb: str, *, plural: bool) -> str:
    """Return a verb in the singular or the plural; anything else as it stands."""
    pairs = (("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"))
    for one, many in pairs:
        if verb.lower() in (one, many):
            return many if plural else one
    base = lexicon.verb_of(verb.lower())
    if base is None or plural or verb.lower() != base:
        return verb
    ending = "es" if base.endswith(("s", "sh", "ch", "x", "z")) else "s"
    return base[:-1] + "ies" if base.endswith("y") and base[-2] not in "aeiou" else base + ending


def rendered(text: str, edit: Edit) -> str:
    """Return what stays of a sentence, with its white space and marks in order."""
    sentence, pieces = edit.sentence, []
    end = sentence.start
    for index, token in enumerate(sentence.tokens):
        if index not in edit.gone:
            gap = text[end : token.start] if index == 0 or index - 1 not in edit.gone else " "
            pieces.append(gap + edit.instead.get(index, token.text))
        end = token.end
    said = "".join(pieces) + text[end : sentence.end]
    said = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"[ \t]+", " ", said)).strip()
    said = re.sub(r"^(?:[,;:]\s*)*(?:(?:and|but|or|while|so)\s+)?", "", said)
    said = re.sub(r"[,;:]+([.!?])", r"\1", said)
    said = re.sub(r"\s+(?:and|or|but|with)([.!?])", r"\1", said)
    if not re.search(r"\w", said):
        return ""
    return said[0].upper() + said[1:]


def there_is(text: str, sentence: Sentence, phrases: Sequence[NounPhrase]) -> str:
    """Name objects in a sentence of their own: "There are two dogs and a cat."."""
    if not phrases:
        return ""
    tokens = sentence.tokens
    named = []
    for phrase in phrases:
        said = text[tokens[phrase.first].start : tokens[phrase.last].end]
        first = tokens[phrase.first]
        begins_sentence = phrase.first == 0 and (first.text == "A" or not first.text.isupper())
        named.append(said[0].lower() + said[1:] if begins_sentence else said)
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"There {'are' if phrases[0].is_plural else 'is'} {listed}."
