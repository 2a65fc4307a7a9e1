"""From a caption to normalised words: the two official normalisations of CHAIR.

``original`` follows Rohrbach et al. 2018 (pattern.en singular forms), ``nltk`` follows the port that most papers on
vision-language models use (part-of-speech tags, then WordNet lemmas). Both need only small tables shipped beside this
file, because a word matters for CHAIR only if it is in the vocabulary before or after normalisation.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from vlmfix.errors import DataError, UnsupportedFeatureError

from .nltk_words import FastTagger, FastTokenizer

ChairMode = Literal["original", "nltk"]
Tokenizer = Literal["regex", "punkt"]
Words = Callable[[str], list[str]]

# One token: an initialism (u.s.), or word characters, glued over an inner hyphen or symbol and over an apostrophe that
# does not start a contraction ('s, 're, ...), or one other character. With the tables below it finds the same mentions
# as Punkt + Treebank; it does not count the same tokens.
_TOKEN = re.compile(
    r"(?:[^\W\d_]\.){2,}(?!\w)"
    r"|[\w\u200b]+(?:(?:-|[/.&+*~^|=]+)[\w\u200b]+|'(?!(?:s|re|ve|ll|d|m)(?![\w/-]))\w+)*/*"
    r"|[^\w\s]"
)
_NLTK_DATA_HINT = (
    "type `python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`, or set NLTK_DATA to a folder that "
    "holds tokenizers/punkt_tab and taggers/averaged_perceptron_tagger_eng"
)


def _load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    return data


@functools.cache
def objects_by_word() -> Mapping[str, str]:
    """Vocabulary of CHAIR: each word that counts as an object -> that object (one of the 80 COCO names)."""
    objects = _load("chair_vocabulary.json")["objects"]
    return MappingProxyType({word: name for name, words in objects.items() for word in words})


@functools.cache
def double_words() -> Mapping[str, str]:
    """Pairs of normalised words ("hot dog") -> the one word they become ("hot dog", "baby bird" -> "bird")."""
    return MappingProxyType(dict(_load("chair_vocabulary.json")["double_words"]))


@functools.cache
def _singular_table() -> Mapping[str, str]:
    return MappingProxyType(dict(_load("chair_lemmas_original.json")["table"]))


@functools.cache
def _lemma_table() -> Mapping[str, Mapping[str, str]]:
    return MappingProxyType(dict(_load("chair_lemmas_nltk.json")["table"]))


def regex_tokens(text: str) -> list[str]:
    """Tokens of lower-cased ``text`` without any dependency: exact for CHAIR mentions, not for token counts."""
    return _TOKEN.findall(text)


def _nltk(part: str) -> Any:
    try:
        import nltk
    except ImportError as error:
        raise UnsupportedFeatureError(
            f"CHAIR's {part} needs the nltk package, which is not installed: type `pip install 'vlmfix[nltk]'`"
        ) from error
    return nltk


def punkt_tokens() -> Words:
    """The official tokeniser: Punkt sentences, then Treebank words (nltk ``word_tokenize``).

    Raises:
        UnsupportedFeatureError: nltk is not installed.
        DataError: the Punkt tables are not found; the message says how to get them.
    """
    nltk = _nltk("punkt tokenizer")
    try:
        sentences = nltk.tokenize.PunktTokenizer("english")
    except LookupError as error:
        raise DataError(f"nltk does not find the data punkt_tab: {_NLTK_DATA_HINT}") from error
    return FastTokenizer(sentences, nltk.tokenize.NLTKWordTokenizer())


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
    nltk = _nltk("nltk mode")
    try:
        tagger = nltk.tag.PerceptronTagger()
    except LookupError as error:
        raise DataError(f"nltk does not find the data averaged_perceptron_tagger_eng: {_NLTK_DATA_HINT}") from error
    table = _lemma_table()
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
