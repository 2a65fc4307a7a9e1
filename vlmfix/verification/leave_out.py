"""Leaves noun phrases out of a text so that what stays are grammatical sentences. No new object word can appear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlmfix.verification import lexicon
from vlmfix.verification.clauses import Clause, clauses_of, is_finite
from vlmfix.verification.edit import Edit, in_number, rendered, there_is
from vlmfix.verification.phrases import NounPhrase, Sentence, read_sentences

_POINTS_BACK = frozenset(("it", "its", "they", "their", "them", "he", "she", "his", "her", "these", "those", "both"))
"""First words of a sentence that speak of what the sentence before named."""

_LOCATING = frozenset("located placed positioned situated found seated parked set mounted attached".split())
"""Participles that say nothing without the place behind them."""

_QUANTIFIERS = frozenset("some others another one each many both".split())
"""Words that may stand for what was named before."""

_SAYING_NOTHING = frozenset("appears appear seems seem looks look sits sit takes take stands stand comes come".split())


def leave_out(text: str, is_doubted: Callable[[NounPhrase], bool]) -> str:
    """Return a text without the noun phrases that are doubted.

    A list loses the element; a phrase behind a preposition or a participle goes with it ("with a dog", "holding a
    dog"); a subject or an object takes its clause along. What a clause named beside it and no other sentence names is
    said in a sentence of its own: "There is a bench.". A sentence that speaks of one that is gone ("It is red.") goes
    too.

    Args:
        text: Any text; without a doubted phrase it comes back character for character.
        is_doubted: Says so of a noun phrase that names an object.
    """
    sentences = read_sentences(text)
    if not any(is_doubted(phrase) for each in sentences for phrase in each.phrases if phrase.is_object):
        return text
    return "".join(edited_sentences(text, sentences, is_doubted)).strip()


def edited_sentences(
    text: str, sentences: Sequence[Sentence], is_doubted: Callable[[NounPhrase], bool], follower: Follower | None = None
) -> list[str]:
    """Return each sentence of a text as it is after the edit, with the white space before it; empty if it is gone.

    Args:
        text: The text.
        sentences: Its sentences.
        is_doubted: Says so of a noun phrase that names an object.
        follower: What is known of the sentences before, for a text that comes in parts.
    """
    follower = Follower() if follower is None else follower
    found: list[str] = []
    end = sentences[0].start if sentences else 0
    for sentence in sentences:
        gap, end = text[end : sentence.start], sentence.end
        said = follower.edit(text, sentence, is_doubted)
        found.append(gap + said if said else "")
    return found


class Follower:
    """Edits sentences in their order: whether the last one is gone decides on a pronoun in the next."""

    def __init__(self) -> None:
        self._last_is_gone = False
        self._named: set[str] = set()

    def edit(self, text: str, sentence: Sentence, is_doubted: Callable[[NounPhrase], bool]) -> str:
        """Return what stays of a sentence."""
        doubted = {phrase.first for phrase in sentence.phrases if phrase.is_object and is_doubted(phrase)}
        points_back = bool(sentence.tokens) and sentence.tokens[0].word in _POINTS_BACK
        if not doubted and not (self._last_is_gone and points_back):
            self._last_is_gone = False
            self._named.update(phrase.name for phrase in sentence.phrases)
            return text[sentence.start : sentence.end]
        edit = Edit(sentence)
        if self._last_is_gone and points_back:
            _drop_clause(edit, Clause(0, len(sentence.tokens)), doubted)
        else:
            for phrases in _lists(sentence):
                _edit_list(edit, phrases, doubted)
        kept = rendered(text, edit)
        stays = [p for p in sentence.phrases if p.first not in edit.gone]
        self._named.update(phrase.name for phrase in stays)
        new = [p for p in edit.left_over if p.name not in self._named and p.is_introduced]
        self._named.update(phrase.name for phrase in new)
        subject = sentence.phrases[0] if sentence.phrases else None
        # The rest of a list may still be what a pronoun speaks of.
        lost = subject is not None and subject.first == 0 and subject.first in doubted and 0 not in edit.shortened
        self._last_is_gone = not kept or lost
        more = there_is(text, sentence, new)
        return " ".join(filter(None, (kept, more)))


def _lists(sentence: Sentence) -> list[list[NounPhrase]]:
    """Group phrases that are coordinated: "a car, a bus and a dog"."""
    words = [token.word for token in sentence.tokens]
    groups: list[list[NounPhrase]] = []
    for phrase in sentence.phrases:
        between = words[groups[-1][-1].last + 1 : phrase.first] if groups else ["."]
        joined = tuple(between) in (("and",), ("or",), (",",), (",", "and"), (",", "or"), ("as", "well", "as"))
        if between == [","] and words[0] in lexicon.PREPOSITIONS and len(groups) == 1 == len(groups[0]):
            joined = False  # "In this image, a laptop and a toilet are seen."
        if joined and not _begins_clause(sentence, phrase, groups[-1]):
            groups[-1].append(phrase)
        else:
            groups.append([phrase])
    return groups


def _begins_clause(sentence: Sentence, phrase: NounPhrase, group: Sequence[NounPhrase]) -> bool:
    """Whether a phrase behind "and" is the subject of a clause of its own, not the end of a list."""
    words = [token.word for token in sentence.tokens]
    at, following = phrase.last, [each for each in sentence.phrases if each.first > phrase.last]
    for other in following:  # the rest of a list that it may begin
        if set(words[at + 1 : other.first]) <= {"and", "or", ","} and words[at + 1 : other.first]:
            at = other.last
        else:
            break
    verb_follows = at + 1 < len(words) and is_finite(words, at + 1)
    return verb_follows and not is_subject(sentence, group[0])


def is_subject(sentence: Sentence, phrase: NounPhrase) -> bool:
    """Whether a phrase stands where a clause begins."""
    if phrase.first == 0:
        return True
    before = sentence.tokens[phrase.first - 1].word
    return before in ("where", "while", "that", "as", "because", "since", "but", "and", ",", ":", ";")


def _edit_list(edit: Edit, phrases: Sequence[NounPhrase], doubted: set[int]) -> None:
    gone = [phrase for phrase in phrases if phrase.first in doubted]
    if not gone or phrases[0].first in edit.gone:
        return
    kept = [phrase for phrase in phrases if phrase.first not in doubted]
    if kept:
        _shorten(edit, phrases, kept)
    else:
        _remove_whole(edit, phrases, doubted)


def _shorten(edit: Edit, phrases: Sequence[NounPhrase], kept: Sequence[NounPhrase]) -> None:
    """Write a list with fewer elements, and let verbs agree with it."""
    tokens = edit.sentence.tokens
    first, last = phrases[0].first, phrases[-1].last
    is_oxford = len(phrases) > 2 and tokens[phrases[-1].first - 2].text == ","
    joiner = next((t.word for t in tokens[first:last] if t.word in ("and", "or")), "and")
    edit.remove(first, last + 1)
    edit.shortened.add(first)
    for place, phrase in enumerate(kept):
        edit.gone.difference_update(range(phrase.first, phrase.last + 1))
        if place == len(kept) - 1 and place:
            comma = "," if is_oxford and place > 1 else ""
            edit.instead[phrase.first] = f"{comma} {joiner} {tokens[phrase.first].text}"
        elif place:
            edit.instead[phrase.first] = f", {tokens[phrase.first].text}"
    words = [token.word for token in tokens]
    if kept[-1] is not phrases[-1] and first and words[first - 1] in lexicon.PREPOSITIONS:
        edit.remove(last + 1, _tail(edit.sentence, last + 1, set()))  # "the sink on the left and the tub on the right"
    was_plural = len(phrases) > 1 or phrases[0].is_plural
    is_plural = len(kept) > 1 or kept[0].is_plural
    if first >= 1 and words[first - 1] in ("is", "are", "was", "were"):  # "there is a dog"
        if not is_subject(edit.sentence, phrases[0]):
            edit.instead[first - 1] = in_number(tokens[first - 1].text, plural=kept[0].is_plural)
    if was_plural != is_plural and is_subject(edit.sentence, phrases[0]) and last + 1 < len(words):
        at = last + 1
        while at + 1 < len(words) and lexicon.is_adverb(words[at]):
            at += 1
        edit.instead[at] = in_number(tokens[at].text, plural=is_plural)


def _remove_whole(edit: Edit, phrases: Sequence[NounPhrase], doubted: set[int]) -> None:
    """Remove a list that has no element left, with what cannot stand without it."""
    sentence = edit.sentence
    words = [token.word for token in sentence.tokens]
    start, stop = phrases[0].first, _tail(sentence, phrases[-1].last + 1, doubted)
    while True:
        before = words[start - 1] if start else ""
        if before in lexicon.PREPOSITIONS or before in ("including", "such"):
            start = _preposition_start(words, start - 1)
            outer = next((p for p in sentence.phrases if p.last == start - 1), None)
            if words[start] == "of" and outer is not None:
                # "to the left of a dog", "the color of the dog": what is said of it goes with it.
                if outer.is_object:
                    break
                start = outer.first
                continue
            break
        break
    before = words[start - 1] if start else ""
    is_verb = lexicon.is_gerund(before) or lexicon.is_participle(before)
    behind_be = start >= 2 and _skip_adverbs(words, start - 2) in lexicon.BE
    is_behind_preposition = words[start] in lexicon.PREPOSITIONS or words[start] in ("including", "such")
    if is_behind_preposition:
        if start == 0:
            _remove_opening(edit, stop, doubted)
        elif before in lexicon.BE | _SAYING_NOTHING or (
            is_verb and behind_be and (before in _LOCATING or words[start] == "by")
        ):
            _drop_clause(edit, _clause_with(sentence, start), doubted)
        elif is_verb and not behind_be:
            _remove_modifier(edit, start - 1, stop, doubted)
        elif before == "there" or (is_finite(words, start - 1) and words[start] in ("of", "to", "for", "at")):
            _drop_clause(edit, _clause_with(sentence, start), doubted)
        else:
            _cut(edit, start, stop)
    elif is_verb and not behind_be and start >= 2:
        _remove_modifier(edit, start - 1, stop, doubted)
    else:
        _drop_clause(edit, _clause_with(sentence, start), doubted)


def _skip_adverbs(words: Sequence[str], at: int) -> str:
    while at > 0 and lexicon.is_adverb(words[at]):
        at -= 1
    return words[at]


def _preposition_start(words: Sequence[str], at: int) -> int:
    """Return where a preposition of several words begins: "next to", "along with", "close to", "out of"."""
    while at > 0 and (
        words[at - 1] in lexicon.PREPOSITIONS or words[at - 1] in ("close", "along", "together", "away", "such")
    ):
        at -= 1
    return at


def _tail(sentence: Sentence, at: int, doubted: set[int]) -> int:
    """Return where what describes a removed phrase ends: prepositional phrases that name nothing that stays."""
    words = [token.word for token in sentence.tokens]
    by_start = {phrase.first: phrase for phrase in sentence.phrases}
    end = at
    while at < len(words):
        if words[at] in lexicon.PREPOSITIONS:
            inner = at + 1
            while inner < len(words) and words[inner] in lexicon.PREPOSITIONS:
                inner += 1
            phrase = by_start.get(inner)
            if phrase is None:
                if inner < len(words) and words[inner] in ("it", "them", "him", "her"):
                    at = end = inner + 1
                    continue
                break
            if phrase.is_object and phrase.first not in doubted:
                break
            at = end = phrase.last + 1
        elif lexicon.is_adverb(words[at]) and words[at] not in ("also",):
            at = end = at + 1
        else:
            break
    return end


def _remove_opening(edit: Edit, stop: int, doubted: set[int]) -> None:
    """Remove a phrase that a sentence begins with, up to its comma."""
    words = [token.word for token in edit.sentence.tokens]
    if stop < len(words) and words[stop] == ",":
        edit.remove(0, stop + 1)
    else:
        _drop_clause(edit, Clause(0, len(words)), doubted)


def _remove_modifier(edit: Edit, start: int, stop: int, doubted: set[int]) -> None:
    """Remove a participle with its object: "holding a dog"; at the beginning, up to the comma."""
    words = [token.word for token in edit.sentence.tokens]
    while start > 0 and lexicon.is_adverb(words[start - 1]):
        start -= 1
    quantified = 3 if words[max(start - 2, 0) : start] == ["of", "them"] else 1
    if start > quantified and words[start - quantified] in _QUANTIFIERS:
        start -= quantified  # "with some of them sitting on a boat"
        joined = stop < len(words) and words[stop] in ("and", ",")
        if words[start - 1] in lexicon.PREPOSITIONS:
            start, stop = (start, stop + 1) if joined else (start - 1, stop)
    elif start > 0 and words[start - 1] in lexicon.PREPOSITIONS:
        start = _preposition_start(words, start - 1)  # "in the middle of throwing a pitch"
    if start == 0:
        _remove_opening(edit, stop, doubted)
    elif words[start - 1] in ("and", "or") and start >= 2 and words[start - 2] != ",":
        _cut(edit, start - 1, stop)
    else:
        _cut(edit, start, stop)


def _cut(edit: Edit, start: int, stop: int) -> None:
    """Remove tokens, and the comma before them if nothing but the end or another comma follows."""
    words = [token.word for token in edit.sentence.tokens]
    if start and words[start - 1] == "," and (stop >= len(words) or not words[stop][0].isalnum()):
        start -= 1
    elif start and words[start - 1] in ("and", ",") and stop < len(words) and words[stop] in ("and", ","):
        stop += 1
    elif start and words[start - 1] == "and" and (stop >= len(words) or not words[stop][0].isalnum()):
        start -= 1
    edit.remove(start, stop)


def _clause_with(sentence: Sentence, at: int) -> Clause:
    return next(clause for clause in clauses_of(sentence) if clause.start <= at < clause.stop)


def _drop_clause(edit: Edit, clause: Clause, doubted: set[int]) -> None:
    """Remove a clause; the whole sentence, if the rest cannot stand without it."""
    sentence = edit.sentence
    all_clauses = clauses_of(sentence)
    rest = [each for each in all_clauses if each.start != clause.start]
    if clause.is_subordinate:
        edit.remove(clause.start, clause.stop)
        gone = [clause]
    else:
        following = [each for each in rest if each.start > clause.start]
        dependent = [each for each in following if each.is_subordinate or not each.has_subject]
        stays = [each for each in rest if each not in dependent and not each.is_subordinate and each.has_subject]
        gone = [clause, *dependent] if stays else all_clauses
        for each in gone:
            edit.remove(each.start, each.stop)
    for phrase in sentence.phrases:
        if (
            any(each.start <= phrase.first < each.stop for each in gone)
            and phrase.is_object
            and phrase.first not in doubted
        ):
            edit.left_over.append(phrase)
