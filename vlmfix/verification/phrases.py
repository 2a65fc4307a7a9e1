"""Noun phrases of an English text, and the object each of them names: found by closed word lists, without a tagger."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlmfix.verification import lexicon

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]|_")
_SENTENCE = re.compile(r"[^\s].*?(?:[.!?]+[\"'”’)]*(?=\s|$)|(?=\n\s*\n)|(?=\n\s*(?:[-*•]|\d+[.)]))|\Z)", re.DOTALL)


class Token(NamedTuple):
    """A word or a punctuation mark.

    Attributes:
        text: As written.
        start: Where it begins in the text.
        end: Where it ends.
    """

    text: str
    start: int
    end: int

    @property
    def word(self) -> str:
        """The word in lower case, with a plain apostrophe."""
        return self.text.lower().replace("’", "'")

    @property
    def is_word(self) -> bool:
        """Whether it is no punctuation."""
        return self.text[0].isalnum()


@dataclass(frozen=True)
class NounPhrase:
    """A noun phrase, such as "a pair of red skis".

    Attributes:
        name: The object as it is asked for: singular, with what belongs to its name ("dining table").
        first: Index of its first token in the sentence, the determiner included.
        last: Index of its last token, the head.
        name_first: Index of the first token of the name.
        is_plural: Whether a verb behind it is plural.
        is_introduced: Whether it names something for the first time, as "a dog", "two dogs" or "dogs" do.
        is_object: Whether it names something that could be seen and be absent.
        measure: The word that stands for it before "of" ("pair"), or empty.
    """

    name: str
    first: int
    last: int
    name_first: int
    is_plural: bool
    is_introduced: bool
    is_object: bool
    measure: str = ""


@dataclass(frozen=True)
class Sentence:
    """A sentence with its tokens and noun phrases.

    Attributes:
        start: Where it begins in the text.
        end: Where it ends, its full stop included.
        tokens: Its tokens, at their places in the text.
        phrases: Its noun phrases, in order; those that name no object too.
    """

    start: int
    end: int
    tokens: tuple[Token, ...]
    phrases: tuple[NounPhrase, ...]

    @property
    def is_closed(self) -> bool:
        """Whether it ends with a mark that ends sentences."""
        return bool(self.tokens) and any(token.text in ".!?" for token in self.tokens[-3:])

    def span(self, phrase: NounPhrase) -> tuple[int, int]:
        """Return where a phrase's name stands in the text."""
        return self.tokens[phrase.name_first].start, self.tokens[phrase.last].end


def read_sentences(text: str) -> list[Sentence]:
    """Return the sentences of a text with their noun phrases."""
    return [_read(text, *match.span()) for match in _SENTENCE.finditer(text)]


def _read(text: str, start: int, end: int) -> Sentence:
    tokens = tuple(Token(m.group(), m.start(), m.end()) for m in _TOKEN.finditer(text, start, end))
    words = [token.word if token.is_word else token.text for token in tokens]
    return Sentence(start, end, tokens, tuple(_phrases(words)))


def _phrases(words: Sequence[str]) -> Iterator[NounPhrase]:
    at = 0
    while at < len(words):
        found = _phrase_at(words, at)
        if found is None:
            at += 1
            continue
        at = found.last + 1
        yield found


def _phrase_at(words: Sequence[str], first: int) -> NounPhrase | None:
    """Return the noun phrase that begins with a token, if one does."""
    at, measure = first, ""
    while True:
        determined = at
        while at < len(words) and _is_determiner(words, at, determined):
            at += 1
        start, stop = at, _end_of_run(words, at, has_determiner=at > determined or bool(measure))
        head = words[stop - 1] if stop > start else ""
        if head in lexicon.MEASURES and words[stop : stop + 1] == ["of"] and (at > determined or not measure):
            if _end_of_run(words, _behind_determiners(words, stop + 1), has_determiner=True) > stop + 1:
                at, measure = stop + 1, head
                continue
        break
    if stop <= start:
        return None
    has_determiner = start > first
    if not has_determiner and not _stands_bare(words, start, stop):
        return None
    name_first = _name_start(words, start, stop)
    name = " ".join([*words[name_first : stop - 1], lexicon.singular(head)])
    opening = words[first:start]
    counted = any(word in lexicon.PLURAL_DETERMINERS or word.isdigit() for word in opening)
    is_one = any(word in lexicon.SINGULAR_DETERMINERS for word in opening)  # "a sheep"
    plural = counted or (lexicon.is_plural(head) and not is_one)
    if measure in ("pair", "slice", "piece", "bunch", "row", "pile", "stack", "bit", "team", "view"):
        plural = lexicon.is_plural(measure) or (opening[0] not in lexicon.SINGULAR_DETERMINERS and opening[0] != "the")
    is_object = not lexicon.is_abstract(head) and len(head) > 1 and head not in lexicon.NO_HEADS
    definite = bool(opening) and (
        opening[0] in ("the", "this", "that", "these", "those", "both", "all") or opening[0] in lexicon.POSSESSIVES
    )
    names_nothing = "no" in opening or "any" in opening
    is_introduced = not definite and (bool(opening) or lexicon.is_plural(head))
    return NounPhrase(
        name,
        first,
        stop - 1,
        name_first,
        is_plural=plural,
        is_introduced=is_introduced,
        is_object=is_object and not names_nothing,
        measure=measure,
    )


def _is_determiner(words: Sequence[str], at: int, first: int) -> bool:
    word = words[at]
    if word in lexicon.DETERMINERS or word.isdigit():
        # "that" and "one" also stand alone, before a verb or a preposition.
        following = words[at + 1] if at + 1 < len(words) else "."
        if word in ("one", "each", "this", "that") and lexicon.is_plural(following):
            return False  # "one sees a dog", "this appears to be a beach"
        if word in ("that", "this", "one", "all", "some", "many", "both", "most", "other", "another", "more", "half"):
            return (
                following not in lexicon.AUXILIARIES
                and following[0].isalnum()
                and following not in lexicon.PREPOSITIONS
            )
        return True
    return word.endswith("'s") and len(word) > 3 and word not in lexicon.AUXILIARIES


def _behind_determiners(words: Sequence[str], at: int) -> int:
    first = at
    while at < len(words) and _is_determiner(words, at, first):
        at += 1
    return at


def _end_of_run(words: Sequence[str], start: int, *, has_determiner: bool) -> int:
    """Return where a run of adjectives and nouns ends."""
    at = start
    while at < len(words):
        if _continues(words, start, at, has_determiner):
            at += 1
        elif _joins_adjectives(words, start, at, has_determiner):
            at += 1  # "a large, white bear"
            start = at
        else:
            break
    # What is left may end in a word that describes what stands before ("a bottle visible").
    while at - start > 1 and words[at - 1] in lexicon.PREDICATES:
        at -= 1
    return at


def _joins_adjectives(words: Sequence[str], start: int, at: int, has_determiner: bool) -> bool:
    """Whether a comma or "and" stands between the adjectives of one noun."""
    run = words[start:at]
    if not has_determiner or not run or words[at] not in (",", "and", "or") or at + 1 == len(words):
        return False
    are_adjectives = all(each in lexicon.ADJECTIVES or lexicon.is_adjective(each) or each.endswith("y") for each in run)
    return are_adjectives and _continues(words, at + 1, at + 1, has_determiner)


def _continues(words: Sequence[str], start: int, at: int, has_determiner: bool) -> bool:
    """Whether a token belongs to a run of adjectives and nouns."""
    word = words[at]
    following = words[at + 1] if at + 1 < len(words) else "."
    is_first = at == start
    if word == "nearby" and is_first and has_determiner and following[0].isalpha():
        return True
    if not word[0].isalpha() or word in _NEVER or lexicon.is_adverb(word):
        return False
    before = words[at - 1] if at else "."
    nouns_follow = following[0].isalpha() and following not in _NEVER and not lexicon.is_adverb(following)
    if word in lexicon.ACTIVITIES and not nouns_follow:
        return False  # "a cat sleeping on a couch"
    if lexicon.is_gerund(word):
        return is_first and has_determiner and nouns_follow
    if lexicon.is_participle(word):
        return ((is_first and has_determiner) or lexicon.is_adjective(before)) and nouns_follow
    verb = lexicon.verb_of(word)
    if is_first and not has_determiner:
        return verb is None or (lexicon.is_plural(word) and verb not in lexicon.NEVER_NOUNS)
    if is_first or (not lexicon.is_plural(word) and verb is None):
        return True
    determiner = words[start - 1] if start else "."
    if verb in lexicon.NEVER_NOUNS or (verb is not None and following in lexicon.DETERMINERS | {"out"}):
        return False
    if verb is not None and not lexicon.is_adjective(before):
        # "the image features a dog", "people stand near a car"; but "wine glasses", "a bus stop".
        agrees = before in lexicon.ONE_FORM or lexicon.is_plural(word) != lexicon.is_plural(before)
        if agrees and (not nouns_follow or following in lexicon.DETERMINERS or lexicon.is_gerund(following)):
            return not _takes_object(following, word)
    if determiner in lexicon.SINGULAR_DETERMINERS and lexicon.is_plural(word) and word not in lexicon.ONLY_PLURAL:
        return not _takes_object(following, word) or lexicon.is_adjective(before)
    return True


def _takes_object(following: str, word: str) -> bool:
    """Whether a word that may be a verb is one, by what follows it."""
    return (
        following in lexicon.DETERMINERS
        or following in lexicon.PREPOSITIONS
        or following in lexicon.PRONOUNS
        or lexicon.is_adverb(following)
        or following in ("to", "that")
        or lexicon.is_gerund(following)
        or (not following[0].isalnum() and lexicon.verb_of(word) is not None)
    )


_NEVER = (
    lexicon.DETERMINERS
    | lexicon.PREPOSITIONS
    | lexicon.CONJUNCTIONS
    | lexicon.RELATIVES
    | lexicon.PRONOUNS
    | lexicon.AUXILIARIES
)


def _stands_bare(words: Sequence[str], start: int, stop: int) -> bool:
    """Whether a run without a determiner is a noun phrase: a plural, or behind a preposition, a verb or in a list."""
    head = words[stop - 1]
    before = words[start - 1] if start else ""
    following = words[stop] if stop < len(words) else "."
    if head in lexicon.ADJECTIVES | lexicon.PREDICATES or lexicon.is_adjective(head):
        return False
    if stop - start == 1 and lexicon.verb_of(head) is not None and following in lexicon.DETERMINERS:
        return False  # "and shows a dog"
    if lexicon.is_plural(head) and (stop - start > 1 or lexicon.verb_of(head) is None or not start):
        return True
    if before in lexicon.BE or lexicon.is_adverb(before):
        return before == "are" and start > 1 and words[start - 2] == "there"
    in_list = before in ("and", "or", ",") and start > 1
    if before == "to":
        return False  # an infinitive
    return before in lexicon.PREPOSITIONS or in_list or lexicon.is_gerund(before) or lexicon.verb_of(before) is not None


def _name_start(words: Sequence[str], start: int, stop: int) -> int:
    """Return where the name begins: of the words before the head, only a noun that makes a compound with it counts."""
    at = stop - 1
    if at > start:
        word = words[at - 1]
        is_noun = word in lexicon.NAME_BEGINNINGS or not (
            lexicon.is_adjective(word)
            or lexicon.is_gerund(word)
            or lexicon.is_participle(word)
            or word.endswith("'s")
            or word.endswith("y")
        )
        at -= is_noun and word != "nearby"
    return at
