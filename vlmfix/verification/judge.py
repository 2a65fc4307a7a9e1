"""Judges the object words of texts about images, and leaves out what is doubted."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmfix.observe.words import decode, token_ends
from vlmfix.verification.ask import Asked, Looked, Questioner
from vlmfix.verification.leave_out import Follower
from vlmfix.verification.phrases import NounPhrase, Sentence, read_sentences

LEAST = 1e-6
"""Probabilities are kept this far from 0 and 1, so that no single one outweighs all other evidence."""


@dataclass(frozen=True)
class Rule:
    """When a word is doubted; see ``Verify``."""

    asked_weight: float
    said_weight: float
    bias: float
    limit: float

    def odds(self, asked: float, said: float) -> float:
        """Return the log odds that a word is true.

        Args:
            asked: ``ln P(yes) - ln P(no)``.
            said: Probability of the word where it was said.
        """
        return self.bias + self.asked_weight * asked + self.said_weight * odds_of(said)


def odds_of(probability: float) -> float:
    """Return the log odds of a probability."""
    probability = min(max(probability, LEAST), 1 - LEAST)
    return math.log(probability / (1 - probability))


def first_places(text: str) -> dict[str, int]:
    """Return the object words of a text, and where each first stands."""
    found: dict[str, int] = {}
    for sentence in read_sentences(text):
        for phrase in sentence.phrases:
            if phrase.is_object:
                found.setdefault(phrase.name, sentence.span(phrase)[0])
    return found


def probabilities(
    tokenizer: Any, ids: Sequence[int], places: Mapping[str, int], logs: Sequence[float]
) -> dict[str, float]:
    """Return how likely words were where they were said: the probability of the token that each begins with.

    Args:
        tokenizer: The tokenizer.
        ids: The tokens of the text.
        places: Where the words begin in it.
        logs: The log probability of each token.
    """
    ends = token_ends(tokenizer, ids, decode(tokenizer, ids)) if places else []
    return {name: math.exp(logs[min(bisect_right(ends, at), len(ends) - 1)]) for name, at in places.items()}


@dataclass(frozen=True)
class Word:
    """An object word of a text, and the evidence for it.

    Attributes:
        name: The object as it was asked for.
        spans: Where it stands in the text, ``(start, end)`` each.
        asked: Probability of yes against no, asked with the image.
        without_image: The same without the image: what the model would answer anyway.
        said: Probability of the word where the text first says it, by this model.
        is_true: Probability that the object is there, by the method's rule.
        is_doubted: Whether phrases with it are left out.
    """

    name: str
    spans: tuple[tuple[int, int], ...]
    asked: float
    without_image: float
    said: float
    is_true: float
    is_doubted: bool


@dataclass
class Totals:
    """What a judge has done so far."""

    asked: int = 0
    doubted: int = 0
    left_out: int = 0
    sentences: int = 0

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.asked} words asked for, {self.doubted} doubted, {self.left_out} phrases with them left out of "
            f"{self.sentences} sentences"
        )


@dataclass
class Judge:
    """Judges words by a rule.

    Attributes:
        questioner: Asks the model.
        rule: When a word is doubted.
        totals: What was done so far.
    """

    questioner: Questioner
    rule: Rule
    totals: Totals = field(default_factory=Totals)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.questioner.processor.tokenizer


class Texts:
    """The texts of a batch while they are judged, as a whole or sentence by sentence.

    Args:
        judge: Judges.
        looked: The images, read.
        count: How many texts.
    """

    def __init__(self, judge: Judge, looked: Looked, count: int) -> None:
        self._judge = judge
        self._looked = looked
        self._known: list[dict[str, tuple[Asked, float, float]]] = [{} for _ in range(count)]
        self._followers = [Follower() for _ in range(count)]

    def judge(self, ids: Sequence[Sequence[int]], sentences: Sequence[Sequence[Sentence]]) -> None:
        """Ask for the words of some sentences that were not asked for before.

        Args:
            ids: Per text, its tokens up to the end of the sentences at least.
            sentences: Per text, the sentences.
        """
        new: list[dict[str, int]] = []
        for known, each in zip(self._known, sentences, strict=True):
            firsts: dict[str, int] = {}
            for sentence in each:
                for phrase in sentence.phrases:
                    if phrase.is_object and phrase.name not in known:
                        firsts.setdefault(phrase.name, sentence.span(phrase)[0])
            new.append(firsts)
        if not any(new):
            return
        asked = self._looked.ask([list(firsts) for firsts in new])
        rule, totals = self._judge.rule, self._judge.totals
        said = self._looked.said([each if firsts else [] for each, firsts in zip(ids, new, strict=True)])
        for known, firsts, answers, tokens, logs in zip(self._known, new, asked, ids, said, strict=True):
            for name, probability in probabilities(self._judge.tokenizer, tokens, firsts, logs).items():
                odds = rule.odds(answers[name].with_image, probability)
                known[name] = (answers[name], probability, odds)
                totals.asked += 1
                totals.doubted += odds < rule.limit

    def edit(self, row: int, text: str, sentence: Sentence) -> str:
        """Return a judged sentence without the phrases that are doubted; sentences must come in their order."""
        gone = sum(phrase.is_object and self._is_doubted(row, phrase) for phrase in sentence.phrases)
        self._judge.totals.left_out += gone
        said = self._followers[row].edit(text, sentence, lambda phrase: self._is_doubted(row, phrase))
        self._judge.totals.sentences += said != text[sentence.start : sentence.end]
        return said

    def has_doubts(self, row: int) -> bool:
        """Whether a word of a text that was judged is doubted."""
        return any(odds < self._judge.rule.limit for _, _, odds in self._known[row].values())

    def _is_doubted(self, row: int, phrase: NounPhrase) -> bool:
        return self._known[row][phrase.name][2] < self._judge.rule.limit

    def words(self, row: int, sentences: Sequence[Sentence]) -> tuple[Word, ...]:
        """Return the words of a text that was judged."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for sentence in sentences:
            for phrase in sentence.phrases:
                if phrase.is_object:
                    spans.setdefault(phrase.name, []).append(sentence.span(phrase))
        found = []
        for name, places in spans.items():
            asked, said, odds = self._known[row][name]
            with_image, without_image, is_true = map(_probability, (*asked, odds))
            is_doubted = odds < self._judge.rule.limit
            found.append(Word(name, tuple(places), with_image, without_image, said, is_true, is_doubted))
        return tuple(found)


def judge_texts(judge: Judge, looked: Looked, ids: Sequence[Sequence[int]], texts: Sequence[str]) -> Texts:
    """Judge whole texts.

    Args:
        judge: Judges.
        looked: Their images, read.
        ids: Their tokens.
        texts: The texts.
    """
    found = Texts(judge, looked, len(texts))
    found.judge(ids, [read_sentences(text) for text in texts])
    return found


def _probability(odds: float) -> float:
    return 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0
