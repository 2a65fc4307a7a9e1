"""From an AMBER response to its nouns, and the similarity of two words."""

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlmfix.errors import DataError, UnsupportedFeatureError

from .chair_words import punkt_tokens

Similarity = Callable[[str, str], float]
Nouns = Callable[[str], list[str]]


@functools.cache
def _lemmas() -> tuple[frozenset[str], Mapping[str, str]]:
    raw: dict[str, Any] = json.loads((Path(__file__).parent / "amber_lemmas.json").read_text(encoding="utf-8"))
    return frozenset(raw["vocabulary"]), MappingProxyType(raw["table"])


def lemma_vocabulary() -> frozenset[str]:
    """The words that the lemmas of :func:`tagged_nouns` are exact for: the vocabulary of AMBER's release."""
    return _lemmas()[0]


def tagged_nouns() -> Nouns:
    """The function from a response to its nouns: Punkt and Treebank words, tags NN*, WordNet noun lemmas, case kept.

    Lemmas come from a table that holds every word that can lead into the vocabulary of AMBER, so WordNet itself is not
    needed; "men" and "vases" are lost as they are in the official script (WordNet has "men" and "vas").

    Raises:
        UnsupportedFeatureError: nltk is not installed.
        DataError: the tagger's weights or the Punkt tables are not found; the message says how to get them.
    """
    try:
        import nltk
    except ImportError as error:
        raise UnsupportedFeatureError(
            "AMBER's descriptions need the nltk package: type `pip install 'vlmfix[nltk]'`"
        ) from error
    tokenize = punkt_tokens()
    try:
        tagger = nltk.tag.PerceptronTagger()
    except LookupError as error:
        raise DataError(
            "nltk does not find the data averaged_perceptron_tagger_eng: type `python -m nltk.downloader punkt_tab "
            "averaged_perceptron_tagger_eng`, or set NLTK_DATA to a folder that holds them"
        ) from error
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
