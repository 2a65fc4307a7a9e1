"""Clauses of a sentence: what can be left out without the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmfix.verification import lexicon
from vlmfix.verification.phrases import NounPhrase, Sentence

_SUBORDINATORS = frozenset("while where which who whose because since although though whereas as".split())


@dataclass(frozen=True)
class Clause:
    """A clause, by the indices of its tokens; the word and the comma that lead it in belong to it.

    Attributes:
        start: Its first token.
        stop: One behind its last; the full stop of the sentence belongs to none.
        is_subordinate: Whether it depends on the clause before.
        has_subject: Whether it has a subject of its own.
    """

    start: int
    stop: int
    is_subordinate: bool = False
    has_subject: bool = True


def is_finite(words: Sequence[str], at: int) -> bool:
    """Whether a token may be the verb of a clause, by its form; adverbs before it are skipped."""
    while at < len(words) and lexicon.is_adverb(words[at]):
        at += 1
    if at >= len(words):
        return False
    return words[at] in lexicon.AUXILIARIES or lexicon.verb_of(words[at]) is not None


def clauses_of(sentence: Sentence) -> list[Clause]:
    """Return the clauses of a sentence, in order; together they hold all its tokens but the mark at its end."""
    words = [token.word for token in sentence.tokens]
    stop = len(words)
    while stop and not words[stop - 1][0].isalnum():
        stop -= 1
    starts: list[tuple[int, bool, bool]] = [(0, False, True)]
    by_start = {phrase.first: phrase for phrase in sentence.phrases}
    for at in range(1, stop):
        if at <= starts[-1][0] + 1 and starts[-1][0]:
            continue
        opened = _opens(words, at, by_start, stop)
        if opened is not None:
            begin = at - 1 if words[at - 1] == "," else at
            starts.append((begin, *opened))
    ends = [start for start, _, _ in starts[1:]] + [stop]
    return [
        Clause(start, end, subordinate, subject)
        for (start, subordinate, subject), end in zip(starts, ends, strict=True)
        if end > start
    ]


def _opens(words: Sequence[str], at: int, by_start: dict[int, NounPhrase], stop: int) -> tuple[bool, bool] | None:
    """Return whether a clause that a word leads in is subordinate, and has a subject; ``None``: it leads none in."""
    word = words[at]
    if word in _SUBORDINATORS or (word == "that" and words[at - 1] not in ("so", "than")):
        verbs = any(is_finite(words, place) for place in range(at + 1, min(stop, at + 12)))
        if word == "as" and not (words[at - 1] == "," and verbs):
            return None
        if word == "that":
            behind_noun = any(phrase.last == at - 1 for phrase in by_start.values())
            return (True, False) if behind_noun and is_finite(words, at + 1) else None
        return (
            (True, word in ("while", "where", "because", "since", "although", "though", "whereas", "as"))
            if verbs
            else None
        )
    if word == "with" and words[at - 1] == ",":
        return True, True
    if word in ("and", "but", "so", ";"):
        if at + 1 in by_start:
            end = at + 1
            while end in by_start:  # a list as the subject
                end = by_start[end].last + 1
                while end < stop and words[end] in ("and", "or", ",") and end + 1 in by_start:
                    end += 1
            while end < stop and words[end] in lexicon.PREPOSITIONS and end + 1 in by_start:
                end = by_start[end + 1].last + 1
            return (
                (False, True)
                if end < stop and is_finite(words, end) and not _is_subject_list(words, at, by_start)
                else None
            )
        if at + 1 < stop and words[at + 1] in ("it", "they", "he", "she", "there", "we", "you"):
            return False, True
        if at + 1 < stop and is_finite(words, at + 1):
            return False, False
    return None


def _is_subject_list(words: Sequence[str], at: int, by_start: dict[int, NounPhrase]) -> bool:
    """Whether "and" stands in a list that is itself a subject: "A dog and a cat are visible"."""
    begin = at
    while True:
        before = next((p for p in by_start.values() if p.last == begin - 1), None)
        if before is None:
            return False
        first = before.first
        if first == 0 or words[first - 1] in ("where", "while", "that", "there"):
            return True
        if words[first - 1] not in ("and", ",", "or"):
            return False
        begin = first - 1
        if words[begin - 1] == "," and begin:
            begin -= 1
