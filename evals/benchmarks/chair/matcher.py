"""The COCO objects that captions name, in the two official word normalisations, and the objects of an image."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from vlmfix.errors import DataError

from .words import ChairMode, Tokenizer, double_words, make_words, objects_by_word, regex_tokens


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
