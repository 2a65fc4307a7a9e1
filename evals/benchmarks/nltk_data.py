"""Where nltk's tables come from, and its tokenizers as the official scripts had them, in every version from 3.8.1."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, UnsupportedFeatureError, how_to_install

from .nltk_words import FastTokenizer, Words

_NLTK_DATA_HINT = (
    "type `python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`, or set NLTK_DATA to a folder that "
    "holds tokenizers/punkt_tab and taggers/averaged_perceptron_tagger_eng"
)


def _nltk(what: str) -> Any:
    try:
        import nltk
    except ImportError as error:
        raise UnsupportedFeatureError(
            f"{what} needs the nltk package, which is not installed: type {how_to_install('nltk')}"
        ) from error
    return nltk


def punkt_tokens(what: str = "CHAIR's punkt tokenizer") -> Words:
    """The official tokeniser: Punkt sentences, then Treebank words (nltk ``word_tokenize``).

    Args:
        what: Whose tokenizer it is, for messages.

    Raises:
        UnsupportedFeatureError: nltk is not installed.
        DataError: the Punkt tables are not found; the message says how to get them.
    """
    nltk = _nltk(what)
    try:
        sentences = _punkt(nltk)
    except LookupError as error:
        raise DataError(f"nltk does not find the data punkt_tab: {_NLTK_DATA_HINT}") from error
    sentences._lang_vars = _official_punctuation(nltk.tokenize.punkt.PunktLanguageVars)
    return FastTokenizer(sentences, _official_words(nltk.tokenize.NLTKWordTokenizer))


def _official_punctuation(base: Any) -> Any:
    """The punctuation that Punkt knew when the official counts were made (nltk 3.8.1): no curly quotes.

    Args:
        base: nltk's ``PunktLanguageVars``.
    """

    class Punctuation(base):  # type: ignore[misc]
        re_boundary_realignment = re.compile(r"""["')\]}]+?(?:\s+|(?=--)|$)""", re.MULTILINE)

        @property
        def _re_non_word_chars(self) -> str:
            ends = re.escape("".join(set(self.sent_end_chars) - {"."}))
            return rf"""(?:[)";}}\]\*:@'({{\[{ends}])"""

    return Punctuation()


def _official_words(base: Any) -> Any:
    """The word tokenizer of nltk 3.8.1, with which the official counts were made, of any later version.

    Later versions part words at en and em dashes ("people—two" is one word in the official counts), and read
    apostrophes at a word's beginning and runs of blanks otherwise.

    Args:
        base: nltk's ``NLTKWordTokenizer``.
    """
    tokenizer = base()
    apostrophe = (re.compile(r"(?i)(\')(?!re|ve|ll|m|t|s|d|n)(\w)\b"), r"\1 \2")
    tokenizer.STARTING_QUOTES = [*base.STARTING_QUOTES[:-1], apostrophe]
    tokenizer.PUNCTUATION = [rule for rule in base.PUNCTUATION if not rule[0].search("—")]
    tokenizer.ENDING_QUOTES = [rule for rule in base.ENDING_QUOTES if not rule[0].search("  ")]
    return tokenizer


_WEIGHTS = "taggers/averaged_perceptron_tagger_eng/averaged_perceptron_tagger_eng.{}.json"

_TAGGER_PARTS = ("weights", "tagdict", "classes")

_PUNKT_FILES = ("abbrev_types.txt", "sent_starters.txt", "collocations.tab", "ortho_context.tab")


def _punkt(nltk: Any) -> Any:
    """Punkt for English, with the tables of the data package punkt_tab."""
    if hasattr(nltk.tokenize, "PunktTokenizer"):
        return nltk.tokenize.PunktTokenizer("english")
    parameters = nltk.tokenize.punkt.PunktParameters()  # Before 3.9 the tables were pickles.
    lines = {name: _data_lines(nltk, f"tokenizers/punkt_tab/english/{name}") for name in _PUNKT_FILES}
    parameters.abbrev_types.update(lines["abbrev_types.txt"])
    parameters.sent_starters.update(lines["sent_starters.txt"])
    parameters.collocations.update(tuple(line.split("\t")) for line in lines["collocations.tab"])
    for word, context in (line.split("\t") for line in lines["ortho_context.tab"]):
        parameters.ortho_context[word] = int(context)
    return nltk.tokenize.punkt.PunktSentenceTokenizer(parameters)


def _data_lines(nltk: Any, name: str) -> list[str]:
    """The lines of a data file, which versions before 3.9 look for under names of their own."""
    for folder in nltk.data.path:
        if (path := Path(folder) / name).is_file():
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    raise LookupError(name)


def perceptron_tagger(what: str = "CHAIR's nltk mode") -> Any:
    """Nltk's ``PerceptronTagger`` with its weights.

    Args:
        what: Whose tagger it is, for messages.

    Raises:
        UnsupportedFeatureError: nltk is not installed.
        DataError: the tagger's weights are not found; the message says how to get them.
    """
    nltk = _nltk(what)
    try:
        if hasattr(nltk.tokenize, "PunktTokenizer"):
            return nltk.tag.PerceptronTagger()
        tagger = nltk.tag.PerceptronTagger(load=False)  # Before 3.9 the weights were a pickle.
        read = {part: json.loads("\n".join(_data_lines(nltk, _WEIGHTS.format(part)))) for part in _TAGGER_PARTS}
        tagger.model.weights, tagger.tagdict, tagger.classes = read["weights"], read["tagdict"], set(read["classes"])
        tagger.model.classes = tagger.classes
        return tagger
    except LookupError as error:
        raise DataError(f"nltk does not find the data averaged_perceptron_tagger_eng: {_NLTK_DATA_HINT}") from error
