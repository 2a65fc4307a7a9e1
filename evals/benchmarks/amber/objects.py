"""The objects in one description of AMBER's: which nouns are in the image, and which are invented."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlmfix.errors import DataError, UnsupportedFeatureError

from ..nltk_words import perceptron_tagger, punkt_tokens
from .data import AmberData, AmberItem

Similarity = Callable[[str, str], float]

#: What :func:`caption_counts` counts, in this order.
DESCRIPTION_COUNTS = ("nouns", "hallucinated", "covered", "truth_objects", "cognitive", "cognitive_objects")

Nouns = Callable[[str], list[str]]

THRESHOLD = 0.8


@functools.cache
def _lemmas() -> tuple[frozenset[str], Mapping[str, str]]:
    raw: dict[str, Any] = json.loads((Path(__file__).parent / "amber_lemmas.json").read_text(encoding="utf-8"))
    return frozenset(raw["vocabulary"]), MappingProxyType(raw["table"])


def lemma_vocabulary() -> frozenset[str]:
    """The words that the lemmas of :func:`tagged_nouns` are exact for: the vocabulary of AMBER's release."""
    return _lemmas()[0]


def known_lemmas(data: AmberData) -> None:
    """Refuse annotations whose words the lemmas of :func:`tagged_nouns` do not cover.

    Raises:
        DataError: There is such a word.
    """
    if beyond := sorted(data.vocabulary - lemma_vocabulary()):
        raise DataError(
            f"relation.json has words that AMBER's release does not have (first: {beyond[0]!r}), and their lemmas "
            "are unknown: pass nouns=, a function from a response to its lemmatised nouns"
        )


def tagged_nouns() -> Nouns:
    """The function from a response to its nouns: Punkt and Treebank words, tags NN*, WordNet noun lemmas, case kept.

    Lemmas come from a table that holds every word that can lead into the vocabulary of AMBER, so WordNet itself is not
    needed; "men" and "vases" are lost as they are in the official script (WordNet has "men" and "vas").

    Raises:
        UnsupportedFeatureError: nltk is not installed.
        DataError: the tagger's weights or the Punkt tables are not found; the message says how to get them.
    """
    tokenize, tagger = punkt_tokens("AMBER's tokenizer"), perceptron_tagger("AMBER's tagger")
    _, table = _lemmas()
    return lambda text: [table.get(word, word) for word, tag in tagger.tag(tokenize(text)) if tag.startswith("NN")]


def spacy_similarity(model: str = "en_core_web_lg") -> Similarity:
    """Word similarity of a spaCy model (official: ``en_core_web_lg``), from -1 to 1.

    Raises:
        UnsupportedFeatureError: spaCy or the model is not installed.
    """
    try:
        pipeline = importlib.import_module("spacy").load(model)
    except (ImportError, OSError) as error:
        raise UnsupportedFeatureError(
            f"the spaCy model {model} is not installed: type `pip install spacy && python -m spacy download {model}`"
        ) from error
    parse = functools.cache(pipeline)
    return lambda first, second: float(parse(first).similarity(parse(second)))


def compared(similarity: Similarity) -> Callable[[str, str], bool]:
    """Whether two words are one: if their similarity is above the official threshold."""
    known: dict[tuple[str, str], bool] = {}  # Word vectors are slow, and the same words come again and again.

    def same(first: str, second: str) -> bool:
        if (first, second) not in known:
            known[first, second] = similarity(first, second) > THRESHOLD
        return known[first, second]

    return same


def caption_counts(
    nouns: Sequence[str], item: AmberItem, data: AmberData, same: Callable[[str, str], bool] | None
) -> tuple[int, int, int, int, int, int]:
    """Count one response: the numbers named in :data:`DESCRIPTION_COUNTS`."""
    found = [noun for noun in nouns if noun in data.vocabulary]
    truth, invented = _owners(item.truth, data), _owners(item.hallucination, data)
    covered: set[int] = set()
    cognitive: set[int] = set()
    hallucinated = 0
    for noun in found:
        if noun in data.safe_words:
            continue
        if noun in truth:
            covered.add(truth[noun])
            continue
        if noun in invented:
            cognitive.add(invented[noun])
        alike = [_alike(noun, words, same) for words in (invented, truth)]
        cognitive.update(alike[0])
        covered.update(alike[1])
        hallucinated += not alike[1]
    return (len(found), hallucinated, len(covered), len(item.truth), len(cognitive), len(item.hallucination))


def _owners(objects: Sequence[str], data: AmberData) -> dict[str, int]:
    """Word -> the object it stands for. Associated words come first, and the first object that has a word owns it."""
    owners: dict[str, int] = {}
    for index, name in enumerate(objects):
        for word in data.association[name]:
            owners.setdefault(word, index)
    for index, name in enumerate(objects):
        owners.setdefault(name, index)
    return owners


def _alike(noun: str, words: Mapping[str, int], same: Callable[[str, str], bool] | None) -> list[int]:
    """The object of the first word similar to the noun, in a list of at most one."""
    return [] if same is None else [index for word, index in words.items() if same(noun, word)][:1]
