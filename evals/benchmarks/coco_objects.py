"""The COCO objects that a caption names, in CHAIR's two official word normalisations, and the objects of an image.

``original`` follows Rohrbach et al. 2018 (pattern.en singular forms), ``nltk`` follows the port that most papers on
vision-language models use (part-of-speech tags, then WordNet lemmas). Both need only small tables shipped beside this
file, because a word matters only if it is in the vocabulary before or after normalisation.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from vlmfix.errors import DataError

from .nltk_words import FastTagger, Words, perceptron_tagger, punkt_tokens

ChairMode = Literal["original", "nltk"]

Tokenizer = Literal["regex", "punkt"]

# One token: an initialism (u.s.), or word characters, glued over an inner hyphen or symbol and over an apostrophe that
# does not start a contraction ('s, 're, ...), or one other character. With the tables below it finds the same mentions
# as Punkt + Treebank; it does not count the same tokens.
_TOKEN = re.compile(
    r"(?:[^\W\d_]\.){2,}(?!\w)"
    r"|[\w\u200b]+(?:(?:-|[/.&+*~^|=]+)[\w\u200b]+|'(?!(?:s|re|ve|ll|d|m)(?![\w/-]))\w+)*/*"
    r"|[^\w\s]"
)


def _load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    return data


@functools.cache
def objects_by_word() -> Mapping[str, str]:
    """Vocabulary of CHAIR: each word that counts as an object -> that object (one of the 80 COCO names)."""
    objects = _load("coco_vocabulary.json")["objects"]
    return MappingProxyType({word: name for name, words in objects.items() for word in words})


@functools.cache
def double_words() -> Mapping[str, str]:
    """Pairs of normalised words ("hot dog") -> the one word they become ("hot dog", "baby bird" -> "bird")."""
    return MappingProxyType(dict(_load("coco_vocabulary.json")["double_words"]))


@functools.cache
def _singular_table() -> Mapping[str, str]:
    return MappingProxyType(dict(_load("coco_lemmas_original.json")["table"]))


@functools.cache
def _lemma_table() -> Mapping[str, Mapping[str, str]]:
    return MappingProxyType(dict(_load("coco_lemmas_nltk.json")["table"]))


def regex_tokens(text: str) -> list[str]:
    """Tokens of lower-cased ``text`` without any dependency: exact for CHAIR mentions, not for token counts."""
    return _TOKEN.findall(text)


def singulars(tokens: list[str]) -> list[str]:
    """Singular forms as pattern.en makes them, its errors included ("bus" is lost, "buses" becomes "bus")."""
    table = _singular_table()
    return [table.get(token, token) for token in tokens]


def tagged_lemmas() -> Callable[[list[str]], list[str]]:
    """WordNet lemmas under the tags of nltk's perceptron tagger ("seated" becomes "seat"), without WordNet itself.

    Raises:
        UnsupportedFeatureError: nltk is not installed.
        DataError: the tagger's weights are not found; the message says how to get them.
    """
    tagger, table = perceptron_tagger(), _lemma_table()
    part_of_speech = {"J": "a", "V": "v", "R": "r"}
    fast = FastTagger(tagger.model.weights, tagger.tagdict, tagger.classes)

    def lemmas(tokens: list[str]) -> list[str]:
        tags = fast.tag(tokens, table.__contains__)
        return [
            table[token].get(part_of_speech.get((tag or "")[:1], "n"), token) if token in table else token
            for token, tag in zip(tokens, tags, strict=True)
        ]

    return lemmas


def make_words(mode: ChairMode, tokenizer: Tokenizer) -> Words:
    """The function from a lower-cased caption to its normalised words.

    Args:
        mode: ``"original"`` or ``"nltk"``.
        tokenizer: ``"regex"`` (no dependency) or ``"punkt"`` (nltk and its data). The tagger of ``nltk`` mode must see
            Punkt's tokens.

    Raises:
        DataError: an unknown mode or tokenizer, or data of nltk is missing.
        UnsupportedFeatureError: nltk is not installed.
    """
    if mode == "original" and tokenizer == "regex":
        return lambda text: singulars(regex_tokens(text))
    if mode == "original" and tokenizer == "punkt":
        tokenize = punkt_tokens()
        return lambda text: singulars(tokenize(text))
    if mode == "nltk" and tokenizer == "punkt":
        tokenize, lemmas = punkt_tokens(), tagged_lemmas()
        return lambda text: lemmas(tokenize(text))
    raise DataError(
        "CHAIR knows the mode 'original' (tokenizer 'regex' or 'punkt') and the mode 'nltk' (tokenizer 'punkt'), not "
        f"mode {mode!r} with tokenizer {tokenizer!r}; leave the tokenizer out to get the mode's own"
    )


@dataclass(frozen=True)
class ChairMatch:
    """The objects found in one caption; the official script calls the fields words, node_words, idxs and double_words.

    Attributes:
        words: The vocabulary words found, in order, repeats kept ("man", "ski").
        nodes: The object of each word ("person", "skis").
        idxs: Position of each word in the tokens before two-word names are merged. As in the official script, positions
            behind a dropped "seat" (captions with "toilet" and "seat") are those of the token before. Exact with the
            ``punkt`` tokenizer, else those of the regex tokens.
        tokens: All normalised tokens with two-word names merged; "" stands for a token whose normal form is outside the
            vocabulary.
    """

    words: tuple[str, ...]
    nodes: tuple[str, ...]
    idxs: tuple[int, ...]
    tokens: tuple[str, ...]


class ChairMatcher:
    """Finds the mentions of COCO objects in captions.

    Args:
        mode: ``"original"`` (singular forms of pattern.en, no dependency) or ``"nltk"`` (tagger and WordNet lemmas:
            what papers on vision-language models print; needs the extra ``vlmfix[nltk]`` and two data packages of
            nltk).
        tokenizer: ``"regex"`` or ``"punkt"`` (nltk ``word_tokenize``). Default: regex for ``original``, punkt for
            ``nltk`` (its only one). Mentions are the same with both; the official length in tokens exists only with
            ``"punkt"``.

    Raises:
        DataError: unknown mode or tokenizer, or data of nltk is missing (never replaced by the other mode).
        UnsupportedFeatureError: nltk is not installed.
    """

    def __init__(self, mode: ChairMode = "original", *, tokenizer: Tokenizer | None = None):
        self.mode: ChairMode = mode
        self.tokenizer: Tokenizer = tokenizer or ("punkt" if mode == "nltk" else "regex")
        self._words = make_words(self.mode, self.tokenizer)
        self._objects = objects_by_word()
        self._doubles = double_words()
        self._first_words = frozenset(pair.split(" ", 1)[0] for pair in self._doubles)

    @property
    def exact_tokens(self) -> bool:
        """Whether token counts and positions are those of the official scripts."""
        return self.tokenizer == "punkt"

    def as_written(self, caption: str) -> list[tuple[str, str]]:
        """Find the words of ``caption``, lower-cased, that name objects: (word, object), in order.

        Empty where the place of words is not known: with the punkt tokenizer, and in captions with both "toilet" and
        "seat", where the official script loses it.
        """
        match = self.match(caption)
        if self.tokenizer != "regex" or {"toilet", "seat"} <= set(match.tokens):
            return []
        words = regex_tokens(caption.lower())
        return [(words[place], node) for place, node in zip(match.idxs, match.nodes, strict=True)]

    def match(self, caption: str) -> ChairMatch:
        """Find the objects that ``caption`` names. There is no negation: "not a dog" names a dog."""
        tokens, starts = self._merge(self._words(caption.lower()))
        kept = tokens
        if "toilet" in tokens and "seat" in tokens:  # "the seat of the toilet" is not a chair
            kept = [token for token in tokens if token != "seat"]
        found = [(word, starts[i]) for i, word in enumerate(kept) if word in self._objects]
        return ChairMatch(
            words=tuple(word for word, _ in found),
            nodes=tuple(self._objects[word] for word, _ in found),
            idxs=tuple(start for _, start in found),
            tokens=tuple(tokens),
        )

    def node(self, category: str) -> str:
        """The object that a category name stands for.

        Raises:
            DataError: the name is not in the vocabulary of CHAIR, which covers the 80 COCO categories only.
        """
        try:
            return self._objects[category]
        except KeyError:
            raise DataError(
                f"CHAIR covers the 80 COCO categories, and {category!r} is none of them: "
                "use annotations with COCO category names"
            ) from None

    def _merge(self, words: list[str]) -> tuple[list[str], list[int]]:
        """Merge two-word names from left to right; returns the tokens and where each began."""
        tokens: list[str] = []
        starts: list[int] = []
        i = 0
        last, first_words = len(words) - 1, self._first_words
        while i <= last:
            merged = self._doubles.get(f"{words[i]} {words[i + 1]}") if words[i] in first_words and i < last else None
            tokens.append(words[i] if merged is None else merged)
            starts.append(i)
            i += 1 if merged is None else 2
        return tokens, starts


class Annotations(Protocol):
    """What :func:`ground_truth` asks of a data set (``vlmfix.evals.data.coco.CocoData`` has it)."""

    def objects(self, image_id: int) -> Collection[str]:
        """Category names of the image's instance annotations."""

    def captions(self, image_id: int) -> Collection[str]:
        """The image's reference captions."""


def ground_truth(coco: Annotations, image_ids: Iterable[int], matcher: ChairMatcher) -> dict[int, frozenset[str]]:
    """The objects of each image: its instance annotations united with the objects its reference captions name.

    Args:
        coco: Annotations, loaded with captions.
        image_ids: The images to build it for.
        matcher: Finds objects in the reference captions. Use the matcher of the scored captions, unless a "mixed"
            published figure is to be reproduced (captions in ``nltk`` mode against an ``original`` ground truth).

    Returns:
        Image id -> object names.

    Raises:
        DataError: an image without annotations, or a category name outside the 80 of COCO.
    """
    truth: dict[int, frozenset[str]] = {}
    for image_id in image_ids:
        named = {node for caption in coco.captions(image_id) for node in matcher.match(caption).nodes}
        try:
            truth[image_id] = frozenset(named | {matcher.node(name) for name in coco.objects(image_id)})
        except DataError as error:
            raise DataError(f"{getattr(coco, 'source', 'the annotations')}, image {image_id}: {error}") from error
    return truth


# For the gallery of a report


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
